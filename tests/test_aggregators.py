"""The running mean and FedAvg against NumPy loops straight from the paper, and against a known fixed point."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsim.aggregators import Accumulator, Buffer
from fedsim.aggregators.reducer import Reducer
from fedsim.algorithms import ALGORITHMS, Algorithm, ClientView, Info, Local, Server
from fedsim.core.params import ALIGN, Layout, Params
from fedsim.core.seeding import stream

SHAPES = {"a": (3, 2), "b": (4,), "c": ()}
LAYOUT = Layout(SHAPES, torch.float64)


def draw(rng: np.random.Generator) -> Params:
    return {n: torch.from_numpy(np.asarray(rng.normal(size=s))) for n, s in SHAPES.items()}


def one_lane(update: Params) -> Params:
    return {n: t[None] for n, t in update.items()}


def reducer(slots: int = 1, **aggregates: Any) -> Reducer:
    return Reducer(aggregates, dict.fromkeys(aggregates, LAYOUT), LAYOUT, slots)


def empty(made: Reducer) -> Accumulator:
    return made.zero(torch.full((made.numel,), 7.0, dtype=torch.float64))


def expected(updates: list[Params], weights: list[float], name: str) -> np.ndarray:
    """sum_k n_k u_k, as a loop over scalars."""
    total = np.zeros(SHAPES[name])
    for update, weight in zip(updates, weights, strict=True):
        total = total + weight * update[name].numpy()
    return total


def test_each_group_of_a_message_has_its_own_aggregator() -> None:
    """sum_k n_k u_k / n, McMahan et al. 2017, algorithm 1, beside sum_k n_k c_k; client by client and side by side."""
    rng = stream(0, "mean")
    updates, controls, weights = (
        [draw(rng) for _ in range(5)],
        [draw(rng) for _ in range(5)],
        [3.0, 1.0, 0.0, 20.0, 7.5],
    )
    made = reducer(update="mean", control="sum")
    one, together = empty(made), empty(made)
    for i, (update, control, weight) in enumerate(zip(updates, controls, weights, strict=True)):
        made.add(one.total, {"control": one_lane(control), "update": one_lane(update)}, [weight], [i])
    stacked = [{n: torch.stack([u[n] for u in each]) for n in SHAPES} for each in (updates, controls)]
    made.add(together.total, dict(zip(("update", "control"), stacked, strict=True)), weights, range(5))
    for total in (one, together):
        total.weight = sum(weights)
        found = made.result(total)
        for name in SHAPES:
            mean = expected(updates, weights, name) / sum(weights)
            np.testing.assert_allclose(found["update"][name].numpy(), mean, rtol=1e-13)
            np.testing.assert_allclose(found["control"][name].numpy(), expected(controls, weights, name), rtol=1e-13)


@pytest.mark.parametrize("groups", [{"update"}, {"update", "control", "extra"}])
def test_a_group_that_is_missing_or_unknown_is_an_error(groups: set[str]) -> None:
    made, lane = reducer(update="mean", control="sum"), one_lane(draw(stream(8, "groups")))
    with pytest.raises(ValueError, match="control"):
        made.add(empty(made).total, dict.fromkeys(groups, lane), [1.0], [0])


@pytest.mark.parametrize("change", ["name", "shape"])
def test_names_and_shapes_of_a_group_are_checked(change: str) -> None:
    made, lane = reducer(update="mean"), one_lane(draw(stream(9, "names")))
    if change == "name":
        del lane["b"]
    else:
        lane["b"] = lane["b"][:, :2]
    with pytest.raises(ValueError, match="'update'.* b "):
        made.add(empty(made).total, {"update": lane}, [1.0], [0])


class Median:
    """Of each coordinate; unweighted."""

    blockwise = True

    def buffers(self, slots: int) -> dict[str, Buffer]:
        return {"values": Buffer(slots), "seen": Buffer(slots, by_element=False)}

    def add(self, acc: dict[str, torch.Tensor], values: torch.Tensor, weights: Any, slots: Any) -> None:
        acc["values"][list(slots)] = values
        acc["seen"][list(slots)] = 1.0

    def result(self, acc: dict[str, torch.Tensor], weight: float) -> torch.Tensor:
        return acc["values"][acc["seen"] > 0].quantile(0.5, dim=0)


def test_an_aggregator_of_ones_own_has_a_slot_for_each_client() -> None:
    """A client that sent nothing does not count; partial accumulators are merged by addition."""
    rng = stream(6, "median")
    updates, made = [draw(rng) for _ in range(4)], reducer(6, update=Median())
    parts = [empty(made), empty(made)]
    for i, slots in enumerate(([5, 0], [2, 3])):
        two = {n: torch.stack([updates[s % 4][n] for s in slots]) for n in SHAPES}
        made.add(parts[i].total, {"update": two}, [1.0, 9.0], slots)
        parts[i].weight = 10.0
    made.merge(parts[0], parts[1])
    found = made.result(parts[0])["update"]
    for name in SHAPES:
        np.testing.assert_allclose(
            found[name], np.median([updates[s][name].numpy() for s in (1, 0, 2, 3)], axis=0), rtol=1e-14
        )


def test_chunk_by_chunk_is_the_same_as_all_at_once() -> None:
    """Tensors of several chunks, in a group behind another one."""
    layout = Layout({"a": (3, ALIGN), "b": (5,), "c": (2 * ALIGN + 7,)}, torch.float64)
    made = Reducer({"control": "sum", "update": Median()}, dict.fromkeys(("control", "update"), layout), layout, 3)
    flat = [torch.randn(3, layout.numel, dtype=torch.float64) for _ in range(2)]
    whole, pieces = empty(made), empty(made)
    made.add(
        whole.total, {g: layout.lanes(f) for g, f in zip(("control", "update"), flat, strict=True)}, [1, 2, 3], range(3)
    )
    for chunk in layout.chunks(ALIGN):
        message = {g: chunk.views(f[:, chunk.span]) for g, f in zip(("control", "update"), flat, strict=True)}
        made.add(pieces.total, message, [1, 2, 3], range(3), chunk)
    assert torch.equal(whole.total, pieces.total) and len(layout.chunks(ALIGN)) > 4
    whole.weight = pieces.weight = 6.0
    for chunk in layout.chunks(2 * ALIGN):
        found = made.result(whole, chunk)
        for group, whole_group in made.result(pieces).items():
            whole_flat = torch.cat([t.reshape(-1) for t in whole_group.values()])
            assert torch.equal(torch.cat([t.reshape(-1) for t in found[group].values()]), whole_flat[chunk.span])


def test_merging_partial_sums_is_adding_all_in_one() -> None:
    rng = stream(1, "merge")
    updates = [draw(rng) for _ in range(6)]
    made = reducer(update="mean")
    one, parts = empty(made), [empty(made) for _ in range(3)]
    for i, update in enumerate(updates):
        for into in (one, parts[i // 2]):
            made.add(into.total, {"update": one_lane(update)}, [float(i + 1)], [i])
            into.weight += i + 1
    total = empty(made)
    for part in parts:
        made.merge(total, part)
    assert total.weight == one.weight == 21.0
    torch.testing.assert_close(total.total, one.total, rtol=1e-14, atol=1e-14)


def test_adding_leaves_the_update_and_asking_leaves_the_sum() -> None:
    made, update = reducer(update="mean", control="sum"), draw(stream(2, "pure"))
    total, before = empty(made), {n: t.clone() for n, t in update.items()}
    made.add(total.total, dict.fromkeys(("update", "control"), one_lane(update)), [2.0], [0])
    total.weight = 2.0
    first, second = made.result(total), made.result(total)
    for name in SHAPES:
        assert torch.equal(update[name], before[name])
        assert torch.equal(first["update"][name], second["update"][name])
        assert torch.equal(first["update"][name], update[name])
        first["control"][name].zero_()
        assert torch.equal(made.result(total)["control"][name], 2 * update[name])


@pytest.mark.parametrize("weight", [None, 0.0])
def test_the_mean_of_nothing_is_an_error(weight: float | None) -> None:
    made = reducer(update="mean")
    total = empty(made)
    if weight is not None:
        made.add(total.total, {"update": one_lane(draw(stream(3, "none")))}, [weight], [0])
    with pytest.raises(ZeroDivisionError):
        made.result(total)


# ---------------------------------------------------------------------------------------- FedAvg on quadratics

CURVES = np.array([[1.0, 0.2], [0.5, 2.0], [3.0, 1.0]])  # client k: f_k(w) = sum_j a_kj (w_j - c_kj)^2 / 2
CENTRES = np.array([[1.0, -2.0], [4.0, 0.5], [-1.0, 3.0]])
ROWS = np.array([10.0, 30.0, 5.0])
RATE, STEPS = 0.1, 4


def rounds(algorithm: Algorithm, weights: np.ndarray, n: int) -> list[np.ndarray]:
    """Global parameters after each round, by the package's parts: gradient descent at every client in between."""
    layout = Layout({"w": (2,)}, torch.float64)
    made, params = (
        Reducer(algorithm.aggregates, algorithm.messages(layout), layout, 3),
        {"w": torch.tensor([10.0, -10.0]).double()},
    )
    server, out = Server(params, algorithm.init(params)[0]), []
    none = torch.zeros(1)
    for r in range(1, n + 1):
        total = empty(made)
        for k in range(3):
            view = ClientView(r, server.params, {}, {}, none, none)
            local = one_lane({"w": algorithm.start(view)["w"].clone()})
            for _ in range(STEPS):
                local["w"] -= RATE * torch.from_numpy(CURVES[k]) * (local["w"] - torch.from_numpy(CENTRES[k]))
            made.add(total.total, algorithm.finish(local, {}, view)[0], [float(weights[k])], [k])
            total.weight += float(weights[k])
        server = algorithm.step(server, made.result(total), Info(r, 3, total.weight, 3, total.weight))
        out.append(server.params["w"].numpy().copy())
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
    view = ClientView(1, shared, {}, own, torch.zeros(1), torch.zeros(1))
    assert all(torch.equal(algorithm.start(view)[n], own[n]) for n in SHAPES)
    message, state = algorithm.finish(own, {}, view)
    assert message == {} and state.keys() == own.keys()
