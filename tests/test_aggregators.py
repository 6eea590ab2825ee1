"""The running mean and FedAvg against NumPy loops straight from the paper, and against a known fixed point."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.aggregators.mean import Partial, WeightedMean
from fedsim.algorithms import ALGORITHMS, Algorithm, Context, Local
from fedsim.core.params import Layout, Params
from fedsim.core.seeding import stream

SHAPES = {"a": (3, 2), "b": (4,), "c": ()}
LAYOUT = Layout(SHAPES, torch.float64)


def draw(rng: np.random.Generator) -> Params:
    return {n: torch.from_numpy(np.asarray(rng.normal(size=s))) for n, s in SHAPES.items()}


def one_lane(update: Params) -> Params:
    return {n: t[None] for n, t in update.items()}


def partial() -> Partial:
    return WeightedMean(LAYOUT).zero(torch.full((LAYOUT.numel,), 7.0, dtype=torch.float64))


def test_result_is_the_weighted_mean() -> None:
    """sum_k n_k u_k / n, McMahan et al. 2017, algorithm 1, as a loop over scalars."""
    rng = stream(0, "mean")
    updates, weights = [draw(rng) for _ in range(5)], [3.0, 1.0, 0.0, 20.0, 7.5]
    mean, total = WeightedMean(LAYOUT), partial()
    for update, weight in zip(updates, weights, strict=True):
        mean.add(total, one_lane(update), [weight])
    found = mean.result(total)
    for name in SHAPES:
        expected = np.zeros(SHAPES[name])
        for update, weight in zip(updates, weights, strict=True):
            expected = expected + weight * update[name].numpy()
        np.testing.assert_allclose(found[name].numpy(), expected / sum(weights), rtol=1e-13)


def test_lanes_are_added_with_a_weight_each() -> None:
    rng = stream(5, "lanes")
    updates, weights = [draw(rng) for _ in range(4)], [3.0, 0.0, 20.0, 7.5]
    mean, one, all_at_once = WeightedMean(LAYOUT), partial(), partial()
    for update, weight in zip(updates, weights, strict=True):
        mean.add(one, one_lane(update), [weight])
    mean.add(all_at_once, {n: torch.stack([u[n] for u in updates]) for n in SHAPES}, weights)
    assert all_at_once.weight == one.weight == 30.5
    torch.testing.assert_close(all_at_once.total, one.total, rtol=1e-13, atol=0)


def test_merging_partial_sums_is_adding_all_in_one() -> None:
    rng = stream(1, "merge")
    updates = [draw(rng) for _ in range(6)]
    mean, one, parts = WeightedMean(LAYOUT), partial(), [partial() for _ in range(3)]
    for i, update in enumerate(updates):
        mean.add(one, one_lane(update), [float(i + 1)])
        mean.add(parts[i // 2], one_lane(update), [float(i + 1)])
    total = partial()
    for part in parts:
        mean.merge(total, part)
    assert total.weight == one.weight == 21.0
    torch.testing.assert_close(total.total, one.total, rtol=1e-14, atol=1e-14)


def test_adding_leaves_the_update_and_asking_leaves_the_sum() -> None:
    mean, total, update = WeightedMean(LAYOUT), partial(), draw(stream(2, "pure"))
    before = {n: t.clone() for n, t in update.items()}
    mean.add(total, one_lane(update), [2.0])
    first, second = mean.result(total), mean.result(total)
    for name in SHAPES:
        assert torch.equal(update[name], before[name])
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], update[name])


@pytest.mark.parametrize("weight", [None, 0.0])
def test_the_mean_of_nothing_is_an_error(weight: float | None) -> None:
    mean, total = WeightedMean(LAYOUT), partial()
    if weight is not None:
        mean.add(total, one_lane(draw(stream(3, "none"))), [weight])
    with pytest.raises(ZeroDivisionError):
        mean.result(total)


# ---------------------------------------------------------------------------------------- FedAvg on quadratics

CURVES = np.array([[1.0, 0.2], [0.5, 2.0], [3.0, 1.0]])  # client k: f_k(w) = sum_j a_kj (w_j - c_kj)^2 / 2
CENTRES = np.array([[1.0, -2.0], [4.0, 0.5], [-1.0, 3.0]])
ROWS = np.array([10.0, 30.0, 5.0])
RATE, STEPS = 0.1, 4


def rounds(algorithm: Algorithm, weights: np.ndarray, n: int) -> list[np.ndarray]:
    """Global parameters after each round, by the package's parts: gradient descent at every client in between."""
    layout = Layout({"w": (2,)}, torch.float64)
    mean, params = WeightedMean(layout), {"w": torch.tensor([10.0, -10.0], dtype=torch.float64)}
    server, out = algorithm.init(params)[0], []
    for r in range(1, n + 1):
        total = mean.zero(layout.empty())
        for k in range(3):
            ctx = Context(r, params, server, {})
            local = {"w": algorithm.start(ctx)["w"].clone()}
            for _ in range(STEPS):
                local["w"] -= RATE * torch.from_numpy(CURVES[k]) * (local["w"] - torch.from_numpy(CENTRES[k]))
            mean.add(total, one_lane(algorithm.client_update(local, ctx)[0]), [float(weights[k])])
        params, server = algorithm.server_update(params, server, mean.result(total), {"round": r, "clients": 3})
        out.append(params["w"].numpy().copy())
    return out


def test_fedavg_is_the_papers_loop() -> None:
    """Algorithm 1: w_{t+1} = sum_k n_k / n w_k, each w_k from E steps of gradient descent from w_t."""
    w, expected = np.array([10.0, -10.0]), []
    for _ in range(6):
        new = np.zeros(2)
        for k in range(3):
            w_k = w.copy()
            for _ in range(STEPS):
                w_k = w_k - RATE * CURVES[k] * (w_k - CENTRES[k])
            new = new + ROWS[k] / ROWS.sum() * w_k
        w = new
        expected.append(w)
    np.testing.assert_allclose(rounds(ALGORITHMS["fedavg"](), ROWS, 6), expected, rtol=1e-12)


@pytest.mark.parametrize("weights", [ROWS, np.ones(3)], ids=["samples", "uniform"])
def test_fedavg_reaches_its_fixed_point(weights: np.ndarray) -> None:
    """E steps leave (1 - rate a)^E of the distance to c_k, so w* = sum p_k s_k c_k / sum p_k s_k, s = 1 - (1 - rate a)^E.

    It is not the minimum of the weighted sum, which has a_k in place of s_k: FedAvg's known bias.
    """
    share = weights[:, None] * (1 - (1 - RATE * CURVES) ** STEPS)
    fixed = (share * CENTRES).sum(0) / share.sum(0)
    found = rounds(Algorithm(), weights, 200)[-1]
    np.testing.assert_allclose(found, fixed, rtol=1e-12)
    curved = weights[:, None] * CURVES
    assert np.abs(found - (curved * CENTRES).sum(0) / curved.sum(0)).max() > 0.05


def test_local_starts_from_its_own_and_hands_back_nothing() -> None:
    algorithm, own, shared = Local(), draw(stream(4, "own")), draw(stream(4, "shared"))
    assert not algorithm.merges and Algorithm().merges
    ctx = Context(1, shared, {}, own)
    assert all(torch.equal(algorithm.start(ctx)[n], own[n]) for n in SHAPES)
    update, state = algorithm.client_update(own, ctx)
    assert update == {} and state.keys() == own.keys()
