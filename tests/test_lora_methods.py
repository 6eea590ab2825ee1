"""LoRA methods that average factors: against plain loops written from their papers, and what must hold of factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_algorithms import SMALL
from test_equivalence import adapter_of
from test_hooks import Loop, Named
from torch import Tensor

from fedsim.algorithms.factors import pairs
from fedsim.algorithms.fedrot_lora import rotation
from fedsim.algorithms.fedsvd import balanced
from fedsim.core.errors import UserError
from fedsim.runs.build import prepare
from fedsim.runs.resolve import ranks_of

WORK = {"steps": 3, "batch_size": 4, "lr": 5e-3, "weight_decay": 0.1, "clip": 0.5, "keep_state": True}


def run_and_loop(lab: Any, algorithm: dict[str, Any], **more: Any) -> tuple[Any, Loop]:
    exp = lab.exp(**{**SMALL, "algorithm": algorithm, "local": WORK, **more})
    run = lab.run(exp)
    return run, Loop(lab, exp, run)


def is_b(name: str) -> bool:
    return "lora_B" in name


def products(named: Named) -> list[Tensor]:
    return [named[b] @ named[a] for a, b in pairs(named)]


def test_ffa_keeps_a_and_is_exact(lab: Any, distance: Any) -> None:
    run, loop = run_and_loop(lab, {"name": "ffa_lora"})
    for t, cohort in enumerate(loop.cohorts, 1):
        found = {k: loop.fit(k, loop.x, loop.batches(k, t), lambda n, i: is_b(n)) for k in cohort}
        total = sum(loop.sizes[k] for k in cohort)
        exact = [
            sum(loop.sizes[k] / total * products(y)[i] for k, y in found.items()) for i in range(len(pairs(loop.x)))
        ]
        loop.average(found, is_b)
        assert all(float((p - e).abs().max()) < 1e-12 for p, e in zip(products(loop.x), exact, strict=True))
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9
    start, end = adapter_of(run / "init"), adapter_of(run / "global")
    assert all(torch.equal(start[n], end[n]) for n in start if "lora_A" in n)


@pytest.mark.parametrize("first", ["B", "A"])
def test_rolora_trains_halves_in_turn(lab: Any, distance: Any, first: str) -> None:
    """The half that rests keeps its bits, moments and step counts; with A first, round 1 changes nothing but A's decay."""
    run, loop = run_and_loop(lab, {"name": "rolora", "first": first})
    for t, cohort in enumerate(loop.cohorts, 1):
        on = lambda n, t=t: is_b(n) == ((t % 2 == 1) == (first == "B"))  # noqa: E731
        found = {k: loop.fit(k, loop.x, loop.batches(k, t), lambda n, i, on=on: on(n)) for k in cohort}
        loop.average(found, on)
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9


def test_rolora_sends_what_a_client_has_missed(lab: Any) -> None:
    run = lab.run(**{**SMALL, "rounds": 3}, algorithm={"name": "rolora"})
    start = adapter_of(run / "init")
    a, b = (sum(8 * t.numel() for n, t in start.items() if f"lora_{h}" in n) for h in "AB")
    rows = [r for r in lab.metrics(run) if r["name"] == "bytes_down"]
    seen: dict[str, int] = {}
    for r in sorted(rows, key=lambda r: r["round"]):
        since, t = seen.get(r["client"], 0), r["round"]
        changed = {"B" if s % 2 else "A" for s in range(since, t)} if since else {"A", "B"}
        assert r["value"] == a * ("A" in changed) + b * ("B" in changed)
        seen[r["client"]] = t
    assert len({r["value"] for r in rows}) > 1


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_every_stack_that_a_client_has_missed_comes_down(lab: Any, name: str) -> None:
    """The factors of all clients of each round since it last began, or since the start."""
    run = lab.run(**{**SMALL, "rounds": 4}, algorithm={"name": name})
    size = sum(8 * t.numel() for t in adapter_of(run / "init").values())
    rows = [r for r in lab.metrics(run) if r["name"] == "bytes_down"]
    seen: dict[str, int] = {}
    for r in sorted(rows, key=lambda r: r["round"]):
        since = max(1, seen.get(r["client"], 1))
        assert r["value"] == size * (1 + 3 * (r["round"] - since))  # cohorts of three
        seen[r["client"]] = r["round"]
    assert len({r["value"] for r in rows}) > 2


def test_clients_that_keep_their_factors_send_twice_the_rank_and_receive_stacks(lab: Any) -> None:
    """Up B_k' A_k' - B_k A_k; down the stacks of these, and factors only at first: the server never changes them."""
    ranks = [1, 3, 2, 3]
    adapter = {"name": "lora", "r": 3, "alpha": 6, "ranks": ranks}
    run = lab.run(**{**SMALL, "rounds": 4}, adapter=adapter, algorithm={"name": "flora", "reinit": False})
    one = sum(8 * t.numel() for t in adapter_of(run / "init").values()) // 3  # bytes of a rank
    rows = [r for r in lab.metrics(run) if r["name"] in ("bytes_up", "bytes_down")]
    rank = {f"site-{k + 1}": r for k, r in enumerate(ranks)}
    cohorts = {t: {r["client"] for r in rows if r["round"] == t} for t in range(1, 5)}
    seen: dict[str, int] = {}
    for r in sorted((r for r in rows if r["name"] == "bytes_down"), key=lambda r: r["round"]):
        since = seen.get(r["client"], 0)
        stacks = sum(2 * one * rank[c] for t in range(max(since, 1), r["round"]) for c in cohorts[t])
        assert r["value"] == stacks + (0 if since else one * rank[r["client"]])
        seen[r["client"]] = r["round"]
    assert all(r["value"] == 2 * one * rank[r["client"]] for r in rows if r["name"] == "bytes_up")


@pytest.mark.parametrize("private_head", [True, False])
def test_fedsa_shares_a_alone(lab: Any, distance: Any, private_head: bool) -> None:
    """After a round a client's B is what it has trained, to the bit, and no other client's."""
    task = {"model": {"task": "sequence_classification"}}
    run, loop = run_and_loop(lab, {"name": "fedsa_lora", "private_head": private_head}, **task)
    own = lambda n: is_b(n) or (private_head and "modules_to_save" in n)  # noqa: E731
    assert any("modules_to_save" in n for n in loop.x)
    heads: dict[str, Named] = {}
    first = dict(loop.x)
    for t, cohort in enumerate(loop.cohorts, 1):
        found = {}
        for k in cohort:
            start = {n: heads.get(k, first)[n] if own(n) else x for n, x in loop.x.items()}
            found[k] = heads[k] = loop.fit(k, start, loop.batches(k, t))
        loop.average(found, lambda n: not own(n))
    for k, head in heads.items():
        model = {n: head[n] if own(n) else x for n, x in loop.x.items()}
        assert distance(adapter_of(run / "clients" / k), loop.exported(model)) < 1e-9
    start, end = adapter_of(run / "init"), adapter_of(run / "global")
    assert all(torch.equal(start[n], end[n]) for n in start if "lora_B" in n)


# ------------------------------------------------------------------------------------------------ ranks

RANKS = [1, 3, 2, 3]


def has(name: str, value: Tensor, rank: int) -> Tensor:
    out = torch.zeros_like(value)
    out[(slice(rank),) if "lora_A" in name else (slice(None), slice(rank))] = 1.0
    return out


@pytest.mark.parametrize("mean", ["zero_pad", "slot", "norm", "uniform"])
def test_hetlora_is_its_papers_loop(lab: Any, distance: Any, mean: str) -> None:
    """Cho et al., 2024: cut, train, pad with zeros, average; RBLA leaves missing slots out."""
    run, loop = run_and_loop(lab, {"name": "hetlora", "mean": mean}, adapter={"name": "lora", "r": 3, "ranks": RANKS})
    for t, cohort in enumerate(loop.cohorts, 1):
        found, weights = {}, {}
        for k in cohort:
            rank = RANKS[int(k.removeprefix("site-")) - 1]
            start = {n: x * has(n, x, rank) for n, x in loop.x.items()}
            masked = lambda y, numbers, rank=rank: {n: g * has(n, g, rank) for n, g in loop.grads(y, numbers).items()}  # noqa: E731
            found[k] = loop.fit(k, start, loop.batches(k, t), gradient=masked)
            size = sum(float((p**2).sum()) for p in products(found[k])) ** 0.5
            weights[k] = {"norm": size, "uniform": 1.0}.get(mean, loop.sizes[k])
        total = sum(weights.values())
        for n, x in loop.x.items():
            summed = sum(weights[k] * y[n] for k, y in found.items())
            if mean == "slot":
                there = sum(weights[k] * has(n, x, RANKS[int(k.removeprefix("site-")) - 1]) for k in cohort)
                loop.x[n] = torch.where(there > 0, summed / there.clamp(min=1e-30), x)
            else:
                loop.x[n] = summed / total
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9


def test_equal_ranks_are_fedavg(lab: Any, distance: Any) -> None:
    fedavg = {w: lab.run(**SMALL, name=w, algorithm={"weights": w}) for w in ("samples", "uniform")}
    for mean, weights in (("zero_pad", "samples"), ("slot", "samples"), ("uniform", "uniform")):
        found = lab.run(**SMALL, name=f"het-{mean}", algorithm={"name": "hetlora", "mean": mean})
        assert distance(adapter_of(found / "global"), adapter_of(fedavg[weights] / "global")) < 1e-12


def test_ranks_come_from_the_config(lab: Any) -> None:
    def ranks(given: Any, r: int = 3, seed: int = 0) -> list[int]:
        exp = lab.exp(
            **SMALL, seed=seed, algorithm={"name": "hetlora"}, adapter={"name": "lora", "r": r, "ranks": given}
        )
        found = ranks_of(prepare(exp))
        assert found is not None
        return found.tolist()

    assert ranks(3) == [3] * 4 and ranks(RANKS) == RANKS
    drawn = [ranks({"choices": [1, 3], "weights": [3.0, 1.0]}, seed=s) for s in range(60)]
    assert 0.6 < np.mean(np.array(drawn) == 1) < 0.9 and ranks({"choices": [1, 3]}) == ranks({"choices": [1, 3]})
    with pytest.raises(UserError, match="adapter.r: 8, but the largest of adapter.ranks is 3; set adapter.r=3"):
        ranks(RANKS, r=8)
    with pytest.raises(UserError, match="adapter.ranks: has 2 ranks, and there are 4 clients"):
        ranks([3, 1])
    with pytest.raises(
        UserError, match="adapter.ranks: .*algorithm.name=fedavg needs one rank for all clients; take one of .*hetlora"
    ):
        lab.run(**SMALL, adapter={"name": "lora", "r": 3, "ranks": RANKS})
    with pytest.raises(UserError, match="is not one for each of the 2 choices"):
        ranks({"choices": [1, 3], "weights": [1.0]})


# ------------------------------------------------------------------------------------------------ new factors


def test_fedsvd_keeps_the_product_and_makes_a_orthonormal(lab: Any, distance: Any) -> None:
    run, loop = run_and_loop(lab, {"name": "fedsvd"})
    for t, cohort in enumerate(loop.cohorts, 1):
        found = {k: loop.fit(k, loop.x, loop.batches(k, t), lambda n, i: is_b(n), fresh=is_b) for k in cohort}
        loop.average(found, is_b)
        before = products(loop.x)
        for i, (a, b) in enumerate(pairs(loop.x)):
            u, s, vt = torch.linalg.svd(before[i], full_matrices=False)
            r = len(loop.x[a])
            sign = torch.where(vt[:r].sum(dim=1) < 0, -1.0, 1.0).double()
            loop.x[b], loop.x[a] = u[:, :r] * s[:r] * sign, vt[:r] * sign[:, None]
        assert all(float((p - q).abs().max()) < 1e-12 for p, q in zip(products(loop.x), before, strict=True))
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-6  # singular values may lie close
    end = adapter_of(run / "global")
    for name, a in end.items():
        if "lora_A" in name:
            assert float((a @ a.T - torch.eye(len(a), dtype=a.dtype)).abs().max()) < 1e-12


def test_balanced_factors_on_any_shape() -> None:
    for m, n, r in ((4, 3, 2), (5, 5, 3), (2, 7, 2), (3, 6, 4)):
        b, a = (
            torch.randn(*s, dtype=torch.float64, generator=torch.Generator().manual_seed(m)) for s in ((m, r), (r, n))
        )
        left, right = balanced(b, a)
        assert float((left @ right - b @ a).abs().max()) < 1e-12


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_fedrot_turns_factors_towards_the_global_ones(lab: Any, distance: Any, lam: float) -> None:
    run, loop = run_and_loop(lab, {"name": "fedrot_lora", "lam": lam}, local={**WORK, "keep_state": False})
    for t, cohort in enumerate(loop.cohorts, 1):
        found = {}
        for k in cohort:
            y = loop.fit((k, t), loop.x, loop.batches(k, t))
            for a, b in pairs(y) if t > 1 and lam else ():
                m = y[a] @ loop.x[a].T if t % 2 == 0 else y[b].T @ loop.x[b]
                u, _, vt = np.linalg.svd(m.numpy())
                u[:, -1] *= np.sign(np.linalg.det(u @ vt))
                r = u @ vt
                if lam < 1:
                    u, _, vt = np.linalg.svd((1 - lam) * np.eye(len(r)) + lam * r)
                    r = u @ vt
                turned = {a: torch.from_numpy(r.T) @ y[a], b: y[b] @ torch.from_numpy(r)}
                assert float((turned[b] @ turned[a] - y[b] @ y[a]).abs().max()) < 1e-12
                if lam == 1 and t % 2 == 0:
                    assert float((turned[a] - loop.x[a]).norm()) <= float((y[a] - loop.x[a]).norm()) + 1e-12
                y |= turned
            found[k] = y
        loop.average(found)
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9


def test_rotations_are_proper() -> None:
    m = torch.randn(6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for lam in (0.3, 1.0):
        r = rotation(m, lam)
        one = torch.eye(4, dtype=torch.float64)
        assert float((r @ r.mT - one).abs().max()) < 1e-12 and torch.allclose(
            torch.linalg.det(r), torch.ones(6).double()
        )


LORA = ["ffa_lora", "rolora", "fedsa_lora", "hetlora", "fedsvd", "fedrot_lora", "fedex_lora", "flora", "flexlora"]


@pytest.mark.parametrize("name", LORA)
def test_other_adapters_and_late_messages_are_refused(lab: Any, name: str) -> None:
    for adapter in ({"name": "none"}, {"name": "ia3"}):
        with pytest.raises(UserError, match=f"algorithm.name: {name} works on the factors of adapter.name=lora"):
            lab.run(**SMALL, algorithm={"name": name}, adapter=adapter)
    if name not in ("ffa_lora", "fedsa_lora", "hetlora"):
        late = {"speeds": [50, 800], "deadline_s": 1.0, "late": "next"}
        with pytest.raises(UserError, match=r"simulation.late: 'next', but algorithm.name="):
            lab.run(**SMALL, algorithm={"name": name}, simulation=late)
