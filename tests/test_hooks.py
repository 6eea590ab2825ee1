"""The hooks of an algorithm: toy algorithms (tests/toys.py) against plain loops, and what holds for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_algorithms import POOL, SMALL, Plain
from test_equivalence import adapter_of, state
from tiers import fast_only
from torch import Tensor

import fedsim
from fedsim.core.errors import UserError
from fedsim.core.seeding import stream

TOYS = Path(__file__).with_name("toys.py")
WORK = {"steps": 3, "batch_size": 4, "lr": 5e-3, "weight_decay": 0.1, "clip": 0.5}
Named = dict[str, Tensor]


def toy(name: str, **keys: Any) -> dict[str, Any]:
    return {"name": f"{TOYS}:{name}", **keys}


class Loop(Plain):
    """Rounds of a plain loop over PEFT's own model, one client at a time, parameters by name."""

    def __init__(self, lab: Any, exp: Any, run: Path) -> None:
        super().__init__(lab, exp, run)
        self.named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.x = {n: p.detach().clone() for n, p in self.named.items()}
        self.kept: dict[Any, tuple[dict, int]] = {}

    def put(self, values: Named) -> None:
        for n, p in self.named.items():
            p.data.copy_(values[n])

    def grads(self, at: Named, numbers: np.ndarray) -> Named:
        self.put(at)
        for p in self.named.values():
            p.grad = None
        self.texts.loss(self.model, numbers).backward()
        return {n: p.grad.clone() for n, p in self.named.items()}

    def fit(
        self,
        who: Any,
        start: Named,
        batches: Sequence[Any],
        trains: Callable[[str, int], bool] = lambda name, step: True,
        gradient: Callable[[Named, Any], Named] | None = None,
        fresh: Callable[[str], bool] = lambda name: False,
        keep: bool = False,
    ) -> Named:
        """torch's AdamW from `start`; what does not train has no gradient. Optimizer state is kept under `who`."""
        work, y = self.exp.local, {n: torch.nn.Parameter(x.clone()) for n, x in start.items()}
        optimizer = torch.optim.AdamW(
            y.values(), lr=work.lr, betas=tuple(work.betas), eps=work.eps, weight_decay=work.weight_decay
        )
        for n, kept in self.kept.get(who, {}).items():
            if not fresh(n):
                optimizer.state[y[n]].update(kept)
        for i, numbers in enumerate(batches):
            found = (gradient or self.grads)({n: p.detach() for n, p in y.items()}, numbers)
            for n, p in y.items():
                p.grad = found[n] if trains(n, i) else None
            torch.nn.utils.clip_grad_norm_(y.values(), work.clip)
            optimizer.step()
        if work.keep_state or keep:
            self.kept[who] = {n: dict(optimizer.state[p]) for n, p in y.items() if p in optimizer.state}
        return {n: p.detach() for n, p in y.items()}

    def batches(self, name: str, round: int) -> list[np.ndarray]:
        return list(fedsim.batches(self.exp, name, round))

    def average(self, found: dict[str, Named], names: Callable[[str], bool] = lambda name: True) -> None:
        """x += sum_k n_k u_k / sum_k n_k, of these names."""
        total = sum(self.sizes[k] for k in found)
        mean = {n: sum(self.sizes[k] * (y[n] - self.x[n]) for k, y in found.items()) / total for n in self.x}
        self.x = {n: x + mean[n] if names(n) else x for n, x in self.x.items()}

    def exported(self, values: Named) -> Named:
        self.put(values)
        return state(self.model)


@pytest.fixture
def rounds(lab: Any) -> Callable[..., tuple[Path, Loop]]:
    """A run of a toy in lanes, clients of unequal size of which some stay away, and a plain loop beside it."""

    def make(algorithm: dict[str, Any], **local: Any) -> tuple[Path, Loop]:
        exp = lab.exp(**SMALL, algorithm=algorithm, local={**WORK, **local})
        run = lab.run(exp)
        return run, Loop(lab, exp, run)

    return make


@pytest.mark.parametrize("first", [0, 1], ids=["fedper", "fedrep"])
@pytest.mark.parametrize("keep", [False, True], ids=["fresh", "kept"])
def test_personal_parameters_stay_with_their_clients(
    rounds: Any, lab: Any, distance: Any, first: int, keep: bool
) -> None:
    """Arivazhagan et al., 2019; Collins et al., 2021: the head is the client's own, here every B of LoRA."""
    run, loop = rounds(toy("Personal", first=first), keep_state=keep)

    def own(name: str) -> bool:
        return "lora_B" in name

    def trains(name: str, step: int) -> bool:
        return not first or (step < first) == own(name)

    heads: dict[str, Named] = {}
    for t, cohort in enumerate(loop.cohorts, 1):
        found = {}
        for k in cohort:
            start = {n: heads.get(k, loop.x)[n] if own(n) else x for n, x in loop.x.items()}
            found[k] = heads[k] = loop.fit(k, start, loop.batches(k, t), trains)
        loop.average(found, lambda n: not own(n))
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9
    for k, head in heads.items():
        model = {n: head[n] if own(n) else x for n, x in loop.x.items()}
        assert distance(adapter_of(run / "clients" / k), loop.exported(model)) < 1e-9
    assert sorted(p.name for p in (run / "clients").iterdir()) == sorted(heads)
    start, end = adapter_of(run / "init"), adapter_of(run / "global")
    assert all(torch.equal(start[n], end[n]) for n in start if own(n)), "the server never saw one"


@pytest.mark.parametrize("fresh", [False, True])
def test_what_does_not_train_keeps_value_and_optimizer_state(rounds: Any, distance: Any, fresh: bool) -> None:
    """RoLoRA: halves alternate by round; a half that rests has neither decay nor a step, and its own step counts."""
    run, loop = rounds(toy("Alternating", fresh=fresh), keep_state=True)
    for t, cohort in enumerate(loop.cohorts, 1):
        on = lambda n, t=t: ("lora_B" in n) == (t % 2 == 1)  # noqa: E731
        found = {
            k: loop.fit(
                k, loop.x, loop.batches(k, t), lambda n, i, on=on: on(n), fresh=lambda n, on=on: fresh and on(n)
            )
            for k in cohort
        }
        loop.average(found, on)
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9


def test_bytes_are_of_what_travels(lab: Any) -> None:
    """A's of rank 3 on 16 and more inputs; in a round of RoLoRA one half goes up, and what has changed comes down."""
    sent = {}
    for name in ("Neutral", "Personal", "Alternating"):
        run = lab.run(name=name, rounds=2, algorithm=toy(name))
        rows = [r for r in lab.metrics(run) if r["client"] == "site-1"]
        sent[name] = [
            next(r["value"] for r in rows if (r["name"], r["round"]) == (f"bytes_{way}", t))
            for t in (1, 2)
            for way in ("up", "down")
        ]
        a, b = (sum(8 * t.numel() for n, t in adapter_of(run / "init").items() if f"lora_{h}" in n) for h in "AB")
    assert sent == {"Neutral": [a + b] * 4, "Personal": [a] * 4, "Alternating": [b, a + b, a, b]}


def test_late_messages_do_not_meet_those_of_another_half(lab: Any) -> None:
    life = {"speeds": [50, 800], "deadline_s": 1.0, "late": "next"}
    with pytest.raises(UserError, match=r"^simulation\.late: 'next', but .*set simulation\.late=drop"):
        lab.run(rounds=2, algorithm=toy("Alternating"), simulation=life)


def test_two_parts_are_two_models_of_a_client(rounds: Any, lab: Any, distance: Any) -> None:
    """Ditto (Li et al., 2021): v_k by the gradient of F_k(v) + lambda / 2 |v - w_t|^2 beside FedAvg, on the same batches."""
    run, loop = rounds(toy("Ditto"), keep_state=True)
    own: dict[str, Named] = {}
    for t, cohort in enumerate(loop.cohorts, 1):
        found, x = {}, loop.x
        for k in cohort:
            batches = loop.batches(k, t)

            def near(y: Named, numbers: Any, x: Named = x) -> Named:
                return {n: g + 0.3 * (y[n] - x[n]) for n, g in loop.grads(y, numbers).items()}

            found[k] = loop.fit((k, "shared"), x, batches)
            own[k] = loop.fit((k, "own"), own.get(k, x), batches, gradient=near)
        loop.average(found)
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9
    for k, model in own.items():
        assert distance(adapter_of(run / "clients" / k), loop.exported(model)) < 1e-9
    packs = lab.run(**{**SMALL, "algorithm": toy("Ditto"), "local": WORK, "name": "one", "training": {"lanes": 1}})
    wide = lab.run(**{**SMALL, "algorithm": toy("Ditto"), "local": WORK, "name": "four", "training": {"lanes": 4}})
    assert distance(adapter_of(packs / "global"), adapter_of(wide / "global")) < 1e-9
    assert distance(adapter_of(packs / "clients/site-1"), adapter_of(wide / "clients/site-1")) < 1e-9


def test_the_gradient_is_taken_elsewhere_on_a_second_batch(rounds: Any, lab: Any, distance: Any) -> None:
    """Fallah et al., 2020, first order: w -= step of grad F(w - alpha grad F(w; D); D')."""
    run, loop = rounds(toy("PerAvg", alpha=0.05))
    prepared = fedsim.runs.build.prepare(loop.exp)
    for t, cohort in enumerate(loop.cohorts, 1):
        found = {}
        for k in cohort:
            rows = prepared.partition.rows(int(k.removeprefix("site-")) - 1)
            rng = stream(loop.exp.seed, "batches", k, t, 1)
            second = fedsim.runs.checks.sampler_of(loop.exp).batches(rows, rng, loop.exp.local.steps)

            def ahead(y: Named, numbers: Any) -> Named:
                g = loop.grads(y, numbers[0])
                return loop.grads({n: v - 0.05 * g[n] for n, v in y.items()}, numbers[1])

            found[k] = loop.fit(k, loop.x, list(zip(loop.batches(k, t), second, strict=True)), gradient=ahead)
        loop.average(found)
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9


def test_the_loss_at_the_start_is_of_all_examples_of_the_client(rounds: Any, distance: Any) -> None:
    run, loop = rounds(toy("ByLoss"))
    for t, cohort in enumerate(loop.cohorts, 1):
        found = {}
        for k in cohort:
            batches = loop.batches(k, t)
            loop.put(loop.x)
            with torch.no_grad():
                loss = loop.texts.loss(loop.model, loop.examples(k))
            found[k] = {n: loop.x[n] + loss * (y - loop.x[n]) for n, y in loop.fit(k, loop.x, batches).items()}
        loop.average(found)
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9


def test_a_client_of_lower_rank_has_the_first_slots_alone(rounds: Any, lab: Any, distance: Any) -> None:
    """HetLoRA (Cho et al., 2024), without its weights: cut to the client's rank, train, pad with zeros, average."""
    run, loop = rounds(toy("Ranked"), keep_state=False)

    def has(name: str, rank: int) -> Tensor:
        out = torch.zeros_like(loop.x[name])
        out[(slice(rank),) if "lora_A" in name else (slice(None), slice(rank))] = 1.0
        return out

    for t, cohort in enumerate(loop.cohorts, 1):
        found = {}
        for k in cohort:
            rank = 1 + (int(k.removeprefix("site-")) - 1) % 3
            mask, work = {n: has(n, rank) for n in loop.x}, loop.exp.local

            def shifted(y: Named, numbers: Any, mask: Named = mask, rank: int = rank) -> Named:
                return {n: (g + 1e-3 * rank) * mask[n] for n, g in loop.grads(y, numbers).items()}

            y = {n: x * mask[n] for n, x in loop.x.items()}
            start = {n: v.clone() for n, v in y.items()}
            for numbers in loop.batches(k, t):  # a step at a time, with the optimizer state between them
                y = loop.fit(("step", k, t), y, [numbers], gradient=shifted, keep=True)
                y = {n: v - 1e-3 * work.lr * mask[n] for n, v in y.items()}
            found[k] = {n: loop.x[n] + y[n] - start[n] for n in y}
        loop.average(found)
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9
    rows = [r for r in lab.metrics(run) if r["name"] == "bytes_up"]
    by_client = {r["client"]: r["value"] for r in rows}
    assert by_client["site-2"] == 2 * by_client["site-1"] and by_client["site-3"] == 3 * by_client["site-1"]
    with pytest.raises(UserError, match=r"^algorithm: ranks by client need adapter\.name=lora"):
        lab.run(algorithm=toy("Ranked"), adapter={"name": "none"})
    with pytest.raises(UserError, match=r"^algorithm: rank 3 of a client is not between 1 and 2; raise adapter\.r"):
        lab.run(algorithm=toy("Ranked"), adapter={"name": "lora", "r": 2})


# ------------------------------------------------------------------------------------------- what all have in common

TOYS_OF: dict[str, dict[str, Any]] = {
    "fedper": toy("Personal"),
    "fedrep": toy("Personal", first=1),
    "alternating": toy("Alternating", fresh=True),
    "ditto": toy("Ditto"),
    "per-fedavg": toy("PerAvg"),
    "by loss": toy("ByLoss"),
    "ranks": toy("Ranked"),
}


@fast_only(1, 3)
@pytest.mark.parametrize("name", TOYS_OF)
def test_workers_and_a_stop_change_no_bit_and_lanes_only_round(lab: Any, distance: Any, name: str) -> None:
    """With error feedback, which keeps what each half has lost."""
    keys = {**SMALL, "algorithm": TOYS_OF[name], "local": {**WORK, "keep_state": True}}
    keys |= {"messages": {"up": "bf16", "error_feedback": True}}
    whole = lab.run(**keys)
    lab.same_bits(lab.run(**keys, name="pool", executor=POOL), whole)
    stopped = lab.run(**{**keys, "name": "stopped", "rounds": 2})
    fedsim.run(lab.exp(**{**keys, "name": "stopped"}), progress=False, resume=stopped)
    lab.same_bits(stopped, whole)
    exact = {**keys, "messages": {}}
    one, many = (lab.run(**{**exact, "name": str(n), "training": {"lanes": n}}) for n in (1, 4))
    assert distance(adapter_of(one / "global"), adapter_of(many / "global")) < 1e-9


@fast_only(0, 3)
@pytest.mark.parametrize("name", TOYS_OF)
def test_a_whole_model_in_chunks_is_the_same_in_one_piece(lab: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    algorithm = dict(TOYS_OF[name])
    algorithm |= {"own": "layers.1"} if "own" in algorithm or "Personal" in algorithm["name"] else {}
    algorithm |= {"half": "layers.1"} if "Alternating" in algorithm["name"] else {}
    keys = {**SMALL, "rounds": 2, "adapter": {"name": "none"}, "algorithm": algorithm, "local": {**WORK, "lr": 1e-3}}
    keys |= {"faults": {"policy": "clip", "max_norm": 1e-3}}
    keys |= {"adapter": {"name": "lora", "r": 3, "target_modules": ["q_proj", "down_proj"]}} if name == "ranks" else {}
    whole = lab.run(**keys)
    assert any(r["name"] == "clipped_norm" for r in lab.metrics(whole))
    original = fedsim.runs.setup.recipe_of
    monkeypatch.setattr(fedsim.runs.setup, "recipe_of", lambda exp: dataclasses.replace(original(exp), chunk=4096))
    lab.same_bits(lab.run(**keys, name="chunks"), whole)


@pytest.mark.parametrize("adapter", [{"name": "lora", "r": 3, "alpha": 6}, {"name": "none"}], ids=["lora", "full"])
def test_neutral_hooks_are_fedavg_to_the_bit(lab: Any, adapter: dict[str, Any]) -> None:
    keys = {**SMALL, "adapter": adapter, "local": {**WORK, "keep_state": True}}
    fedavg = lab.run(**keys)
    neutral = lab.run(**keys, name="neutral", algorithm=toy("Neutral"))
    if adapter["name"] == "none":
        found = [lab.tensors(run)["global/model.safetensors"] for run in (fedavg, neutral)]
    else:
        found = [adapter_of(run / "global") for run in (fedavg, neutral)]
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    rows = [[r for r in lab.metrics(run) if r["name"] != "bytes_up"] for run in (fedavg, neutral)]
    assert rows[0] == rows[1]
