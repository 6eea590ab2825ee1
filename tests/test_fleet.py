"""Runs whose packs share passes: the numbers of runs alone, whatever is beside them, and nobody pays for another's fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiers import fast_only

import fedsim.runs.sweep as sweeps
from fedsim.runs.build import Shared, prepare
from fedsim.runs.crews import crews_of
from fedsim.runs.folder import Metrics
from fedsim.runs.sweep import Sweep, run_sweep
from fedsim.training.scoring import Evaluator
from fedsim.training.trainer import Trainer
from fedsim.training.worker import Worker

CLOSE = 1e-9  # of a tensor's norm: the same sums in another order, in float64
MODES = ["local", "federated", "central"]


@pytest.fixture
def plan(lab: Any) -> Callable[..., Sweep]:
    """(runs' settings, `together`, results folder, sections of the experiment) -> a sweep in this process."""

    def plan(settings: list[dict], together: int, results: str = "runs", **sections: Any) -> Sweep:
        tree = lab.tree(results=str(lab.root / results), **{"modes": MODES, "rounds": 2, **sections})
        keys = {"name": "fleet", "experiment": tree, "list": settings, "workers": 1, "threads": 1, "together": together}
        return Sweep.from_dict(keys)

    return plan


def close(lab: Any, one: Path, other: Path, distance: Any) -> None:
    """The same rows in the same order, and the same numbers up to rounding."""
    a, b = lab.tensors(one), lab.tensors(other)
    assert a.keys() == b.keys() and a
    for file in a:
        if "checkpoints" not in file:
            assert distance(a[file], b[file]) < CLOSE, file
    rows = lab.metrics(one), lab.metrics(other)
    assert len(rows[0]) == len(rows[1])
    for x, y in zip(*rows, strict=True):
        assert {k: v for k, v in x.items() if k != "value"} == {k: v for k, v in y.items() if k != "value"}
        if x["name"] != "computed_tokens":  # a stream is filled up to a size that its kernels know
            assert x["value"] == pytest.approx(y["value"], rel=1e-8), x


SETTINGS = {
    "seeds": [{"seed": s} for s in (0, 1, 2)],
    "rates": [{"local.lr": r, "local.warmup": w} for r, w in ((1e-3, 0), (1e-2, 1))],
    "partitions": [
        {"partition": {"name": "iid", "num_clients": 5}},
        {"partition": {"name": "class_counts", "counts": [[0, 1, 0], [6, 10, 10]]}, "local.steps": 4},
        {"partition": {"name": "iid", "num_clients": 4}, "cohort.size": 2, "seed": 4, "evaluate.every_steps": 1},
    ],
    "modes": [{"modes": ["central"]}, {"modes": ["federated"], "local.steps": 5}, {"modes": ["local"], "seed": 1}],
    "kept state": [
        {"local.keep_state": False},
        {"local.keep_state": True, "seed": 5},
        {"algorithm.weights": "uniform"},
    ],
    "algorithms": [
        {"algorithm": {"name": "fedbuff", "buffer": 2}, "simulation.speeds": [20, 900]},
        {"algorithm": {"name": "fednova", "normalise": "steps"}, "local.lr": 3e-3},
        {"algorithm": {"name": "qfedavg"}, "local.lr": 2e-3},
    ],
}


@fast_only(0, 3)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_runs_side_by_side_are_runs_alone(plan: Any, lab: Any, distance: Any, settings: list[dict]) -> None:
    alone = run_sweep(plan(settings, 1, "alone"), progress=False).jobs
    beside = run_sweep(plan(settings, len(settings), "beside"), progress=False).jobs
    assert [j.state for j in beside] == ["finished"] * len(settings)
    for one, other in zip(alone, beside, strict=True):
        assert one.path.name == other.path.name and one.path != other.path
        close(lab, one.path, other.path, distance)


@fast_only(0, 3)
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("gpt2", {"name": "lora", "r": 2, "dropout": 0.3}),
        ("llama", {"name": "p_tuning", "num_virtual_tokens": 2, "hidden": 8}),
        ("gpt2", {"name": "prefix", "num_virtual_tokens": 2}),
        ("gpt_neox", {"name": "adapter", "bottleneck": 4}),
        ("llama", {"name": "ia3"}),
        ("bert", {"name": "lora", "r": 2}),
        ("llama", {"name": "loha", "r": 2, "target_modules": ["q_proj"]}),
    ],
    ids=lambda v: v if isinstance(v, str) else v["name"],
)
def test_every_method_side_by_side(plan: Any, lab: Any, distance: Any, kind: str, adapter: dict) -> None:
    """Heads start by the seed, so a base with a new head is shared by runs of one seed alone; loha has no lanes."""
    task = "sequence_classification" if kind == "bert" else "causal_lm"
    sections = {"model": {"path": lab.base(kind), "dtype": "float64", "task": task}, "adapter": adapter}
    settings = [{"local.lr": 1e-3}, {"local.lr": 3e-3}] if kind == "bert" else [{"seed": 0}, {"seed": 1}]
    alone = run_sweep(plan(settings, 1, "alone", **sections), progress=False).jobs
    beside = run_sweep(plan(settings, 2, "beside", **sections), progress=False).jobs
    for one, other in zip(alone, beside, strict=True):
        close(lab, one.path, other.path, distance)


def lanes_of_passes(monkeypatch: pytest.MonkeyPatch, most: int = 99) -> tuple[list[int], list[int]]:
    """Lanes of every training pass and of every scoring pass from now on; more than `most` train out of memory."""
    trained, scored, measuring = [], [], []
    backward, score, measure = Trainer.backward, Evaluator.score, Worker.measure

    def spy_measure(self: Worker, *args: Any) -> Any:
        measuring.append(True)
        try:
            return measure(self, *args)
        finally:
            measuring.pop()

    def spy_backward(self: Trainer, batches: Any) -> Any:
        if not measuring:
            trained.append(len(batches))
        if len(batches) > most:
            raise MemoryError
        return backward(self, batches)

    def spy_score(self: Evaluator, weights: torch.Tensor, *args: Any, **keys: Any) -> Any:
        scored.append(len(weights))
        return score(self, weights, *args, **keys)

    monkeypatch.setattr(Worker, "measure", spy_measure)
    monkeypatch.setattr(Trainer, "backward", spy_backward)
    monkeypatch.setattr(Evaluator, "score", spy_score)
    return trained, scored


def test_packs_of_several_runs_are_in_one_pass(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, scored = lanes_of_passes(monkeypatch)
    settings = SETTINGS["seeds"]
    run_sweep(plan(settings, 3, modes=["federated"], training={"lanes": 3}), progress=False)
    assert set(trained) == {9}, "three clients of three runs"
    assert set(scored) == {9, 3}, "their clients, and the three global models, before training too"
    trained.clear()
    run_sweep(plan(settings, 2, "two", modes=["federated"], training={"lanes": 3}), progress=False)
    assert set(trained) == {6, 3}, "two and one"


def test_no_more_models_are_scored_at_once_than_have_trained_at_once(
    plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten sites of two runs ask to be scored at the end; two lanes a run have been shown to fit."""
    trained, scored = lanes_of_passes(monkeypatch)
    five = {"partition": {"name": "iid", "num_clients": 5}, "training": {"lanes": 2}}
    run_sweep(plan(SETTINGS["seeds"][:2], 2, modes=["local"], **five), progress=False)
    assert max(trained) == 4 and max(scored) == 4


def test_the_same_runs_give_the_same_bits_again(plan: Any, lab: Any) -> None:
    jobs = [run_sweep(plan(SETTINGS["partitions"], 3, name), progress=False).jobs for name in ("a", "b")]
    for one, other in zip(*jobs, strict=True):
        lab.same_bits(one.path, other.path)


def test_a_client_that_fails_costs_its_own_run_alone(
    plan: Any, lab: Any, distance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run_sweep(plan(SETTINGS["seeds"], 1, "alone"), progress=False).jobs
    batches = Worker._batches

    def fail(self: Worker, task: Any, *more: Any) -> Any:
        if self.seed == 1 and task.name == "site-2" and task.round == 2:
            raise ValueError("a bad row")
        return batches(self, task, *more)

    monkeypatch.setattr(Worker, "_batches", fail)
    jobs = run_sweep(plan(SETTINGS["seeds"], 3, "beside"), progress=False).jobs
    assert [j.state for j in jobs] == ["finished", "failed", "finished"]
    assert (
        "round 2" in jobs[1].reason and "site-2" in jobs[1].reason and jobs[1].reason.endswith("ValueError: a bad row")
    )
    for i in (0, 2):
        close(lab, alone[i].path, jobs[i].path, distance)


def test_a_run_that_cannot_be_scored_fails_alone(
    plan: Any, lab: Any, distance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run_sweep(plan(SETTINGS["seeds"], 1, "alone"), progress=False).jobs
    together = Worker.score_together

    def fail(asked: Any) -> Any:
        if any(worker.seed == 1 and request.split == "test" for worker, request, _ in asked):
            raise ValueError("no scores")
        return together(asked)

    monkeypatch.setattr(Worker, "score_together", staticmethod(fail))
    jobs = run_sweep(plan(SETTINGS["seeds"], 3, "beside"), progress=False).jobs
    assert [j.state for j in jobs] == ["finished", "failed", "finished"]
    assert jobs[1].reason.endswith("ValueError: no scores")
    for i in (0, 2):
        close(lab, alone[i].path, jobs[i].path, distance)


def test_too_little_memory_for_all_is_no_fault_of_any(
    plan: Any, lab: Any, distance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run_sweep(plan(SETTINGS["seeds"], 1, "alone"), progress=False).jobs
    trained, _ = lanes_of_passes(monkeypatch, most=4)
    jobs = run_sweep(plan(SETTINGS["seeds"], 3, "beside"), progress=False).jobs
    assert [j.state for j in jobs] == ["finished"] * 3
    assert trained[0] == 6 and trained.count(6) == 1 and max(trained[1:]) <= 3, "six lanes once, then not above half"
    for one, other in zip(alone, jobs, strict=True):
        assert json.loads((other.path / "plan.json").read_text())["halved"] == []
        close(lab, one.path, other.path, distance)


def test_a_fleet_that_is_stopped_goes_on(plan: Any, lab: Any, distance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS["seeds"]
    alone = run_sweep(plan(settings, 1, "alone", rounds=3), progress=False).jobs
    count, log = [0], Metrics.log

    def stop(self: Metrics, rows: list, seconds: float) -> None:
        count[0] += 1
        if count[0] == 14:
            raise KeyboardInterrupt
        log(self, rows, seconds)

    monkeypatch.setattr(Metrics, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan(settings, 3, "beside", rounds=3), progress=False)
    monkeypatch.undo()
    states = {json.loads(f.read_text())["state"] for f in (lab.root / "beside").rglob("status.json")}
    assert states == {"stopped"}, "all three were under way"
    jobs = run_sweep(plan(settings, 3, "beside", rounds=3), progress=False).jobs
    assert [j.state for j in jobs] == ["finished"] * 3
    for one, other in zip(alone, jobs, strict=True):
        close(lab, one.path, other.path, distance)


def test_every_worker_has_work_before_runs_go_side_by_side(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[int]]] = []
    monkeypatch.setattr(sweeps, "_run_apart", lambda jobs, crews, *rest: seen.append(crews))
    run_sweep(plan([{"seed": s} for s in range(3)], 3), progress=False, workers=2)
    assert seen == [[[0, 1], [2]]]


def test_two_workers_with_two_runs_each(plan: Any, lab: Any, distance: Any) -> None:
    settings = [{"seed": s} for s in range(4)]
    alone = run_sweep(plan(settings, 1, "alone"), progress=False).jobs
    jobs = run_sweep(plan(settings, 2, "beside"), progress=False, workers=2).jobs
    assert [j.state for j in jobs] == ["finished"] * 4
    for one, other in zip(alone, jobs, strict=True):
        close(lab, one.path, other.path, distance)


def test_who_goes_with_whom(lab: Any) -> None:
    shared = Shared()

    def crews(together: int, *sections: dict[str, Any]) -> list[list[int]]:
        exps = [lab.exp(**s) for s in sections]
        return crews_of([(i, prepare(e, shared)) for i, e in enumerate(exps)], together)

    base = lab.tree()["local"]
    assert crews(1, {}, {"seed": 1}) == [[0], [1]]
    assert crews(2, {}, {"seed": 1}, {"seed": 2}) == [[0, 1], [2]]
    unlike = [
        {"local": {**base, "batch_size": 3}},
        {"local": {**base, "betas": [0.9, 0.999]}},
        {"adapter": {"name": "lora", "r": 4}},
        {"model": {"path": lab.base("gpt2")}},
        {"data": {"max_length": 64}},
        {"evaluate": {"batch_size": 7}},
        {"training": {"lanes": 1}},
        {"adapter": {"name": "none"}},
    ]
    for other in unlike:
        assert crews(4, {}, other) == [[0], [1]], other
    assert crews(4, *[{"adapter": {"name": "none"}, "seed": s} for s in (0, 1)]) == [[0], [1]]
    like = [{"seed": 9}, {"rounds": 7}, {"local": {**base, "lr": 1.0, "steps": 9}}, {"partition": {"num_clients": 2}}]
    assert crews(9, {}, *like) == [[0, 1, 2, 3, 4]]


def test_the_command_line_takes_it(lab: Any, capsys: pytest.CaptureFixture) -> None:
    from fedsim.cli.main import main

    file = lab.root / "sweep.yaml"
    keys = {"name": "cli", "experiment": lab.tree(), "grid": {"seed": [0, 1, 2, 3]}, "workers": 1, "together": 4}
    file.write_text(yaml.safe_dump(keys))
    assert main(["sweep", str(file), "-q"]) == 0
    assert "4 of 4 run(s)" in capsys.readouterr().out
    file.write_text(yaml.safe_dump({**keys, "together": 0}))
    assert main(["sweep", str(file), "-q"]) == 2
    assert "together: 0" in capsys.readouterr().err
