"""The planner: what it chooses from what it measures, and what a run does when memory is too little after all."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedsim
import fedsim.runs.plan
import fedsim.runs.session
from fedsim.core.errors import UserError
from fedsim.core.types import Engine, Measured
from fedsim.models.stacked import StackedNet
from fedsim.runs.checkpoints import Checkpoints
from fedsim.training.planner import Packs, Plan, choose_lanes, describe, lanes_of
from fedsim.training.worker import Worker

MB = 1_000_000


class Device:
    """A device on which a pass of K lanes with T tokens takes `seconds(K)` and a known number of bytes.

    Args:
        seconds: lanes -> of a pass.
        room: bytes there are; a pass that needs more is out of memory.
        per_token: bytes of activations; a fifth of that when they are computed twice.
        base: bytes that are taken whatever the lanes.
        state: bytes of a lane's parameters, gradient and moments.
    """

    def __init__(
        self, seconds: Callable[[int], float], room: int, per_token: int = MB, base: int = 0, state: int = MB
    ) -> None:
        self.seconds, self.room, self.per_token, self.base, self.state = seconds, room, per_token, base, state
        self.engine = Engine(True, 8)
        self.tried: list[tuple[int, int, bool]] = []
        self.peak, self.of_evaluation = base, 0

    def configure(self, engine: Engine) -> None:
        self.engine = engine

    def measure(self, rows: Sequence[np.ndarray]) -> Measured | None:
        k, tokens = len(rows), sum(map(len, rows))
        self.tried.append((k, tokens, self.engine.checkpointing))
        kept = tokens * self.per_token // (5 if self.engine.checkpointing else 1)
        peak = self.base + k * self.state + kept
        self.peak = max(self.peak, peak)
        return None if peak > self.room else Measured(k, tokens, self.seconds(k), kept, k * self.state, peak)

    def highest(self) -> int:
        return self.peak

    def evaluate(self) -> None:
        self.peak = max(self.peak, self.base + self.of_evaluation)

    def choose(self, clients: int = 32, workers: int = 1, on_gpu: bool = True, **keys: Any) -> Plan:
        """Each client's pass has `micro_batch` tokens."""
        plan = Plan(1, packed=True, micro_batch=8)
        packs = keys.pop("packs", None) or Packs(
            clients, lambda k, m: [np.zeros(m)] * min(k, clients), lambda k, m: k * m
        )
        asked = {"lanes": "measure", "checkpointing": "auto", "base_bytes": self.base, "resident": 500 * MB, **keys}
        choose_lanes(
            plan,
            packs,
            self.measure,
            self.configure,
            self.highest,
            workers=workers,
            token_bytes=1024,
            free=self.room - self.base,
            total=self.room if on_gpu else None,
            on_gpu=on_gpu,
            **asked,
        )
        self.evaluate()
        plan.saw(self.highest())
        return plan


def flat(k: int) -> float:
    """Lanes cost nothing: a pass takes as long as one of one lane."""
    return 1.0


def linear(k: int) -> float:
    """Lanes bring nothing."""
    return float(k)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_takes_as_many_lanes_as_pay(on_gpu: bool) -> None:
    roomy = 10**6 * MB
    assert Device(flat, roomy).choose(on_gpu=on_gpu).lanes == 32
    assert Device(linear, roomy).choose(on_gpu=on_gpu).lanes == 1
    assert Device(lambda k: max(k, 8) / 8, roomy).choose(on_gpu=on_gpu).lanes == 8, "full at 8"


def test_every_worker_has_a_pack() -> None:
    roomy = 10**6 * MB
    assert Device(flat, roomy).choose(clients=20, workers=3).lanes == 7
    assert Device(flat, roomy).choose(clients=3, workers=2).lanes == 2
    assert Device(flat, roomy).choose(clients=3, workers=8).lanes == 1


def test_takes_no_more_lanes_than_fit_and_predicts_their_peak() -> None:
    """A lane has 1 MB of its own and 8 MB of activations; the base 100 MB, of 250: 85 % of 150 MB are 14 lanes."""
    device = Device(flat, room=250 * MB, base=100 * MB)
    plan = device.choose()
    assert plan.lanes == 8, "16 would fill 144 MB of 150"
    assert plan.memory == {"base": 100 * MB, "lane": MB, "activations": 64 * MB, "predicted": 172 * MB}
    assert plan.memory["predicted"] == device.measure([np.zeros(8)] * 8).peak
    assert max(k for k, _, _ in device.tried) == 8, "what would not fit is not tried"


def test_one_lane_fits_by_checkpointing_then_by_smaller_micro_batches() -> None:
    kept_twice = Device(flat, room=8 * MB, state=MB).choose()
    assert (kept_twice.checkpointing, kept_twice.micro_batch) == (True, 8), "1 + 8 MB are too many, 1 + 8 / 5 are not"
    forbidden = Device(flat, room=8 * MB, state=MB).choose(checkpointing=False)
    assert (forbidden.checkpointing, forbidden.micro_batch) == (False, 4)
    tiny = Device(flat, room=2 * MB, state=MB).choose()
    assert (tiny.checkpointing, tiny.micro_batch, tiny.lanes) == (True, 4, 1)
    with pytest.raises(UserError, match="one row of one client does not fit"):
        Device(flat, room=MB, state=MB).choose()


def test_an_explicit_number_depends_on_nothing_measured() -> None:
    for seconds in (flat, linear):
        assert Device(seconds, 10**6 * MB).choose(lanes=8).lanes == 8
    assert Device(flat, 10**6 * MB).choose(lanes=50, clients=20).lanes == 20, "there are no more clients"
    device = Device(linear, 10**6 * MB)
    device.choose(lanes=8, on_gpu=False)
    assert [k for k, _, _ in device.tried] == [1, 8], "one lane and all of them, to tell what they take"


def test_the_peak_on_the_cpu_is_that_of_a_pass_of_all_lanes_or_of_evaluation() -> None:
    """Of 8 lanes, 8 tokens each: 4 MB that a pass needs and does not keep; the largest pass is half as large again."""
    device = Device(flat, 10**6 * MB, base=500 * MB)
    measure = device.measure

    def more(rows: Sequence[np.ndarray]) -> Measured | None:
        found = measure(rows)
        device.peak += 4 * MB * (len(rows) == 8)
        return found

    device.measure = more  # type: ignore[method-assign]
    packs = Packs(8, lambda k, m: [np.zeros(m)] * k, lambda k, m: 3 * k * m // 2)
    keys = {"lanes": 8, "on_gpu": False, "packs": packs}
    assert device.choose(**keys).memory["predicted"] == 500 * MB + (8 + 64 + 4) * MB * 3 // 2
    device.of_evaluation = 300 * MB
    assert device.choose(**keys).memory["predicted"] == 800 * MB


def test_the_plan_says_what_was_found() -> None:
    lines = "\n".join(describe(Device(flat, room=250 * MB, base=100 * MB).choose(), "cuda:0"))
    for part in ("cuda:0", "8 lanes", "base 100.0 MB once", "a lane 1.0 MB", "activations 64.0 MB", "peak 172.0 MB"):
        assert part in lines
    assert describe(Plan(1, why_not="it trains a thing"), "cpu") == [
        "plan: cpu, clients one after another: it trains a thing"
    ]


def test_halving_holds_from_its_round_on_in_its_mode() -> None:
    plan = Plan(1, packed=True, lanes=8)
    assert plan.halve("federated", 3) == 4 and plan.halve("federated", 5) == 2
    assert [plan.lanes_at("federated", r) for r in (2, 3, 4, 5, 9)] == [8, 4, 4, 2, 2]
    assert plan.lanes_at("local", 9) == 8
    assert plan.halve("federated", 5) == 1
    with pytest.raises(UserError, match=r"round 6 \(federated\) does not fit with one lane; lower local.micro_batch"):
        plan.halve("federated", 6)
    assert Plan(**json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


# -------------------------------------------------------------------------------------------------- whole runs

FOUR = {"partition": {"name": "iid", "num_clients": 4}, "rounds": 3, "training": {"lanes": 4}}


def too_small(patch: pytest.MonkeyPatch, most: int, after: int = 0) -> list[int]:
    """From the pass `after` on, memory is too little for more than `most` lanes; the lanes of all passes that ran."""
    backward, ran = StackedNet.backward, []

    def limited(self: StackedNet, tokens: Any, rows: Sequence[np.ndarray], answers: torch.Tensor) -> Any:
        if len(rows) > most and len(ran) >= after:
            raise torch.OutOfMemoryError("a device of modest size")
        ran.append(len(rows))
        return backward(self, tokens, rows, answers)

    patch.setattr(StackedNet, "backward", limited)
    return ran


def plan_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.parametrize("mode", ["federated", "local"])
def test_too_little_memory_halves_the_lanes_and_goes_on(
    lab: Any, distance: Any, monkeypatch: pytest.MonkeyPatch, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Round 1 runs with 4 lanes (after two passes of the planner), round 2 does not: it starts again with 2."""
    with monkeypatch.context() as patch:
        ran = too_small(patch, most=2, after=2 + 2)
        found = fedsim.run(lab.exp(**FOUR, name="small", modes=[mode]), progress=True).path
    assert f"{mode}: out of memory in round 2; it starts again with 2 lane(s)" in capsys.readouterr().err
    assert ran == [1, 4, 4, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert plan_of(found)["lanes"] == 4 and plan_of(found)["halved"] == [{"mode": mode, "round": 2, "lanes": 2}]
    whole = lab.run(**FOUR, name="whole", modes=[mode])
    places = ["global"] if mode == "federated" else [f"local/site-{i}" for i in (1, 2, 3, 4)]
    for place in places:
        a, b = lab.tensors(found / place), lab.tensors(whole / place)
        assert a.keys() == b.keys()
        assert max(distance(a[f], b[f]) for f in a) < 1e-9
    names = [(r["round"], r["client"], r["split"], r["name"]) for r in lab.metrics(found)]
    assert sorted(map(str, names)) == sorted(
        str((r["round"], r["client"], r["split"], r["name"])) for r in lab.metrics(whole)
    ), "the round that started again has its rows once"


def test_a_resume_keeps_the_plan_and_its_halvings(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the halving, resumed where there is room enough: the same bits as the run that was not stopped."""
    with monkeypatch.context() as patch:
        too_small(patch, most=2, after=2 + 2)
        whole = lab.run(**FOUR, name="whole")

    class Stopped(Exception):
        pass

    with monkeypatch.context() as patch:
        too_small(patch, most=2, after=2 + 2)
        save = Checkpoints.save

        def stop(self: Any, state: Any, *rest: Any, **more: Any) -> Any:
            saved = save(self, state, *rest, **more)
            if state.round == 2:
                raise Stopped
            return saved

        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(Stopped):
            lab.run(**FOUR, name="stopped")
    with monkeypatch.context() as patch:
        ran = too_small(patch, most=4)
        lab.same_bits(whole, lab.run(**FOUR, name="stopped"))
    assert ran == [2, 2, 2, 2], "round 3 in two packs of two steps, and nothing measured"


def test_a_run_that_does_not_fit_with_one_lane_ends_with_a_line(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    too_small(monkeypatch, most=0, after=1)
    with pytest.raises(UserError, match=r"^memory: round 1 \(federated\) does not fit with one lane; lower local"):
        lab.run(**FOUR)


def test_auto_is_a_function_of_sizes_alone() -> None:
    """Tokens of a pass: at most 2,048 on the CPU, of which the widest layer makes 8 MiB; 16,384 on a GPU, as memory allows."""

    def lanes(clients: int = 100, rows: int = 4, mean: float = 32, on_gpu: bool = False, **sizes: Any) -> int:
        packs = Packs(clients, lambda k, m: [], lambda k, m: 0, mean=mean)
        given = {"token_bytes": 1024, "lane_bytes": MB, "kept": 1000.0, "room": None, **sizes}
        return lanes_of(packs, rows, on_gpu=on_gpu, **given)

    assert lanes() == 16 and lanes(rows=1) == 64 and lanes(rows=16) == 4 and lanes(rows=200) == 1
    assert lanes(clients=10) == 10, "no more than there are clients"
    assert lanes(token_bytes=16 << 10) == 4, "512 tokens of 16 KiB"
    assert lanes(lane_bytes=512 << 20) == 2, "a GiB for parameters, gradients and moments"
    assert lanes(on_gpu=True) == 100 and lanes(on_gpu=True, clients=500) == 128
    assert lanes(on_gpu=True, room=100 * MB, kept=125_000.0) == 5, "85 MB hold 5 of 1 + 16 MB"
    assert lanes(on_gpu=True, room=MB, kept=125_000.0) == 1
    plans = [Device(seconds, 10**6 * MB).choose(lanes="auto", workers=w) for seconds in (flat, linear) for w in (1, 4)]
    assert len({plan.lanes for plan in plans}) == 1 and not any(plan.measured for plan in plans)


@pytest.mark.parametrize("asked", ["auto", "measure"])
def test_lanes_are_resolved_once(lab: Any, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """The second start decides nothing, whatever the first one chose, and reads the same number."""
    keys = {**FOUR, "training": {"lanes": asked}}
    with monkeypatch.context() as patch:
        patch.setattr(fedsim.runs.session, "run_mode", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lab.run(**keys)
    (folder,) = (lab.root / "results" / "lab").iterdir()
    before = plan_of(folder)
    assert before["packed"] and 1 <= before["lanes"] <= 4 and bool(before["measured"]) == (asked == "measure")
    monkeypatch.setattr(fedsim.runs.plan, "choose_lanes", lambda *args, **keys: pytest.fail("chosen again"))
    assert lab.run(**keys) == folder
    assert plan_of(folder) == before
    memory = json.loads((folder / "memory.json").read_text())
    assert memory["predicted_bytes"] == before["memory"]["predicted"] and min(memory["measured_bytes"]) > 0


def test_by_default_every_start_has_the_same_lanes_and_bits_whatever_passes_take(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which each pass takes another time, in one process and in two: the same plan, the same bits."""
    keys = {**FOUR, "rounds": 2, "modes": ["local", "federated", "central"], "training": {"lanes": "auto"}}
    first = lab.run(**keys, name="first")
    measure, slow = Worker.measure, itertools.count(1)

    def by_chance(self: Worker, rows: Any, weights: Any) -> Measured:
        found = measure(self, rows, weights)
        return dataclasses.replace(found, seconds=found.seconds * 10 ** (next(slow) % 3))

    monkeypatch.setattr(Worker, "measure", by_chance)
    for name, executor in (("again", {"name": "serial"}), ("pool", {"name": "pool", "devices": ["cpu"], "workers": 2})):
        other = lab.run(**keys, name=name, executor={"threads": 1, **executor})
        assert {k: plan_of(other)[k] for k in ("lanes", "micro_batch", "checkpointing")} == {
            k: plan_of(first)[k] for k in ("lanes", "micro_batch", "checkpointing")
        }
        lab.same_bits(first, other)
    assert plan_of(first)["lanes"] == 4
    assert lab.run(**{**keys, "training": {"lanes": "measure"}}, name="first") != first, "measuring is another run"


def test_a_method_without_a_stacked_form_trains_one_at_a_time_and_says_why(lab: Any) -> None:
    for adapter, why in [({"name": "none"}, "whole model"), ({"name": "ln_tuning"}, "has no stacked form")]:
        plan = plan_of(lab.run(**FOUR, name=adapter["name"], adapter=adapter))
        assert not plan["packed"] and plan["lanes"] == 1 and why in plan["why_not"]


def test_checkpointing_of_a_base_whose_layers_cannot_be_computed_twice_is_refused(lab: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.modeling_layers.GradientCheckpointingLayer", type("Other", (), {}))
        with pytest.raises(UserError, match=r"^training.checkpointing: true, but the layers of this base \(llama\)"):
            lab.run(adapter={"name": "none"}, training={"lanes": 2, "checkpointing": True})
