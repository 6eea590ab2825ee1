"""Sweeps: what a file asks for, runs that share a base, skipping, going on, failing, and worker processes."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frail
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import yaml
from tiers import fast_only

import fedsim
import fedsim.runs.sweep as sweeps
from fedsim.analysis.claims import Claim, judge
from fedsim.analysis.method_plots import methods
from fedsim.analysis.plots import save_figures
from fedsim.cli.main import main
from fedsim.core.errors import UserError
from fedsim.core.types import Row
from fedsim.models import sharing
from fedsim.runs.build import Shared, prepare
from fedsim.runs.sweep import Job, Sweep, run_jobs, run_sweep, said
from fedsim.runs.tuning import Candidates


@pytest.fixture
def write(lab: Any) -> Callable[..., Path]:
    """(sweep's keys, sections of the experiment) -> the file of a sweep over the lab's small experiment."""

    def write(keys: dict[str, Any], **sections: Any) -> Path:
        tree = lab.tree(**sections)
        (lab.root / "base.yaml").write_text(yaml.safe_dump(tree))
        file = lab.root / "sweep.yaml"
        file.write_text(yaml.safe_dump({"name": "mine", "experiment": "base.yaml", **keys}, sort_keys=False))
        return file

    return write


# ------------------------------------------------------------------------------------------------ the file


def test_a_sweep_takes_the_values_that_another_one_finds(write: Any, lab: Any) -> None:
    """Each method gets its own rate: the best on validation, over the mean of the seeds, whatever else differs."""
    methods = [{"name": "fedavg"}, {"name": "fedprox", "mu": 1.0}]
    rates = {"algorithm": methods, "local.lr": [1e-6, 1e-2], "seed": [0, 1]}
    (lab.root / "rates.yaml").write_text(yaml.safe_dump({"name": "rates", "experiment": "base.yaml", "grid": rates}))
    keys = {
        "tuned": {"file": "rates.yaml", "keys": ["local.lr"]},
        "grid": {"algorithm": methods, "partition.num_clients": [2, 3], "seed": [0, 5]},
    }
    file = write(keys, modes=["federated"], rounds=1, best={"metric": "loss"})
    plan = Sweep.load(file)
    assert [e.local.lr for e in plan.experiments] == [1e-6] * 8  # not known yet
    done = run_sweep(file, progress=False)
    table = fedsim.sweep_table(lab.root / "results" / "rates", "loss")
    means = table.groupby(["algorithm", "local.lr"])["best"].mean()
    assert not done.failed and len(done.jobs) == 8
    for job in done.jobs:
        mine = means[next(a for a in means.index.levels[0] if a.split()[0] == job.exp.algorithm.name)]
        assert job.exp.local.lr == mine.idxmin() == job.settings["local.lr"]
    assert fedsim.run_sweep(file, progress=False).jobs[0].skipped


def test_of_equal_scores_the_lower_loss_gives_the_value() -> None:
    tried = [{"local.lr": lr, "seed": s} for lr in (0.1, 0.2, 0.3) for s in (0, 1)]
    scores = [(0.5, -2.0), (0.7, -2.0), (0.7, -1.0), (0.5, -2.0), (0.6, -9.0), (float("-inf"), 0.0)]
    assert Candidates(("local.lr",), tried, scores).best({"seed": 7}) == {"local.lr": 0.2}
    tried = [{"algorithm.name": "fedavg", "lr": 1}, {"algorithm.name": "fedadam", "lr": 2, "algorithm.server_lr": 3}]
    known = Candidates(("lr", "algorithm.server_lr"), tried, [(0.0, 0.0)] * 2)
    assert known.best({"algorithm.name": "fedavg"}) == {"lr": 1}
    assert known.best({"algorithm.name": "fedadam"}) == {"lr": 2, "algorithm.server_lr": 3}


def test_a_claim_compares_pairs_of_runs() -> None:
    """Two seeds at two alphas; fedprox is better by 0.1, 0.3, 0.1, 0.3 on accuracy, and worse where alpha is 9."""
    labels, rows = iter("abcdefgh"), []
    members: list[tuple[str, dict[str, Any]]] = []
    for name, scores in (("fedavg", [0.5, 0.4, 0.5, 0.9]), ("fedprox", [0.6, 0.7, 0.6, 0.5])):
        for score, (alpha, seed) in zip(scores, [(1, 0), (1, 1), (2, 0), (9, 0)], strict=True):
            label = next(labels)
            members.append((label, {"algorithm": {"name": name}, "alpha": alpha, "seed": seed, "lr": score}))
            rows.append({"run": label, "scope": "federated", "last": score, "metric": "accuracy"})
    table = pd.DataFrame(rows)

    def found(better: str, worse: str, metric: str = "accuracy", **where: Any) -> Any:
        claim = Claim(claim="c", better={"algorithm": better}, worse={"algorithm": worse}, where=where)
        return judge(claim, members, table.assign(metric=metric), ["lr"])

    gaps = np.array([0.1, 0.3])
    half = scipy.stats.t.ppf(0.975, 1) * gaps.std(ddof=1) / 2**0.5
    one = found("fedprox", "fedavg", alpha=1)
    assert (one.pairs, one.mean) == (2, pytest.approx(0.2)) and one.holds is None
    assert (one.low, one.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert found("fedprox", "fedavg").pairs == 4 and found("fedprox", "fedavg", alpha=3).pairs == 0
    assert found("fedavg", "fedprox", alpha=9).mean == pytest.approx(0.4) and found("a", "b").holds is None
    assert found("fedavg", "fedprox", "loss", alpha=1).mean == pytest.approx(0.2)
    sure = table.assign(last=[0.1, 0.1, 0.1, 0.1, 0.5, 0.51, 0.52, 0.53])
    claim = Claim(claim="c", better={"algorithm": "fedprox"}, worse={"algorithm": "fedavg"})
    assert judge(claim, members, sure, ["lr"]).holds is True
    assert judge(Claim(claim="c", better=claim.worse, worse=claim.better), members, sure, ["lr"]).holds is False
    with pytest.raises(UserError, match="claims: beta was not swept; use some of algorithm, alpha, lr, seed"):
        found("fedprox", "fedavg", beta=1)


def test_a_sweeps_report_has_its_claims_and_figures(write: Any, capsys: pytest.CaptureFixture) -> None:
    claim = {"claim": "more is better", "better": {"local.lr": 0.01}, "worse": {"local.lr": 1e-6}}
    keys = {"grid": {"local.lr": [1e-6, 0.01], "seed": [0, 1]}, "claims": [claim], "title": "Rates", "notes": "A note."}
    file = write(keys, modes=["federated"], rounds=1, best={"metric": "loss"})
    assert main(["sweep", str(file), "--quiet"]) == 0
    place = Path(capsys.readouterr().out.split("report.md")[0].split("\n")[-1]) / "report.md"
    text = place.read_text()
    assert text.startswith("# Rates\n") and "4 of 4 runs are finished" in text and "A note." in text
    assert re.search(r"0 FAILED, [01] OPEN, [01] HOLDS\.", text) and "over 2 pairs" in text
    assert "![figures/score_by_local.lr.png](figures/score_by_local.lr.png)" in text and f"fedsim sweep {file}" in text
    place.unlink()
    assert main(["plot", str(place.parent)]) == 0 and place.read_text() == text
    assert main(["sweep", str(write({**keys, "claims": [{**claim, "better": {"rounds": 3}}]}))]) == 2
    assert "claims: rounds is not swept; use some of local.lr, seed" in capsys.readouterr().err


def test_methods_of_a_sweep_are_drawn_as_the_mean_of_their_seeds(write: Any, lab: Any) -> None:
    methods_ = [{"name": "fedavg"}, {"name": "fedprox", "mu": 1.0}]
    grid = {"algorithm": methods_, "partition.num_clients": [2, 3], "seed": [0, 1]}
    done = run_sweep(write({"grid": grid}, modes=["federated"], rounds=2), progress=False, metric="loss")
    assert {f"methods_by_{x}.png" for x in ("round", "bytes", "tokens")} <= {
        f.name for f in done.path.glob("figures/*")
    }
    table, df = done.table("loss"), fedsim.load_runs(done.path)
    panels = methods(df, table).axes
    assert [ax.get_title() for ax in panels] == ["num_clients = 2", "num_clients = 3"]
    of_global = df[
        (df["scope"] == "federated") & df["client"].isna() & (df["split"] == "validation") & (df["round"] > 0)
    ]
    for ax, clients in zip(panels, (2, 3), strict=True):
        assert len(ax.lines) == 2 and len(ax.collections) == 2  # a line and a band for each method
        for line, name in zip(ax.lines, ("fedavg", "fedprox"), strict=True):
            rows = of_global[(of_global["algorithm.name"] == name) & (of_global["partition.num_clients"] == clients)]
            expected = rows[rows["name"] == "loss"].groupby("round")["value"].mean()
            assert list(line.get_xdata()) == [1, 2] and line.get_ydata() == pytest.approx(expected.to_numpy())


@pytest.mark.parametrize(
    ("tuned", "grid", "said"),
    [
        ({"file": "rates.yaml"}, {"seed": [0]}, r"tuned: \{.*\} is not \{file: SWEEP.yaml, keys:"),
        ({"file": "rates.yaml", "keys": ["local.lr"]}, {"local.lr": [1.0]}, "local.lr is set here and by tuned"),
        (
            {"file": "rates.yaml", "keys": ["local.steps"]},
            {"seed": [0]},
            "no run of rates.yaml sets 'local.steps'",
        ),
        (
            {"file": "rates.yaml", "keys": ["local.lr"]},
            {"rounds": [1], "adapter.r": [7]},
            "has no run with these settings",
        ),
    ],
)
def test_wrong_tuning_is_one_line(write: Any, lab: Any, tuned: Any, grid: Any, said: str) -> None:
    rates = {"local.lr": [1e-3, 1e-2], "adapter.r": [2]}
    (lab.root / "rates.yaml").write_text(yaml.safe_dump({"name": "rates", "experiment": "base.yaml", "grid": rates}))
    with pytest.raises(UserError, match=said):
        Sweep.load(write({"tuned": tuned, "grid": grid}))


def test_a_grid_is_every_combination_in_the_order_of_the_file(write: Any) -> None:
    plan = Sweep.load(write({"grid": {"seed": [0, 1], "local.lr": [0.1, 0.2, 0.3]}}))
    assert [(e.seed, e.local.lr) for e in plan.experiments] == [(s, lr) for s in (0, 1) for lr in (0.1, 0.2, 0.3)]
    assert plan.keys == ["seed", "local.lr"] and {e.name for e in plan.experiments} == {"mine"}


def test_grids_and_lists_add_up_and_sections_can_be_values(write: Any) -> None:
    keys = {
        "grid": [{"seed": [0, 1]}, {"adapter": [{"name": "ia3"}, {"name": "lora", "r": 2}]}],
        "list": [{"modes": ["central"], "seed": 7}],
    }
    plan = Sweep.load(write(keys))
    assert [e.adapter.name for e in plan.experiments] == ["lora", "lora", "ia3", "lora", "lora"]
    assert [getattr(e.adapter, "r", None) for e in plan.experiments] == [3, 3, None, 2, 3], (
        "a section replaces the file's"
    )
    assert plan.experiments[-1].modes == ["central"] and plan.experiments[-1].seed == 7
    assert plan.keys == ["seed", "adapter", "modes"]


def test_a_swept_name_drops_the_other_keys_of_its_section(write: Any) -> None:
    plan = Sweep.load(write({"grid": {"partition.name": ["iid", "dirichlet"], "partition.num_clients": [2]}}))
    assert [e.partition.name for e in plan.experiments] == ["iid", "dirichlet"]
    assert [e.partition.num_clients for e in plan.experiments] == [2, 2]


def test_overrides_hold_under_what_is_swept(write: Any) -> None:
    plan = Sweep.load(write({"grid": {"seed": [4]}}), ["seed=9", "rounds=3"])
    assert (plan.experiments[0].seed, plan.experiments[0].rounds) == (4, 3)


def test_the_experiment_can_stand_in_the_file(lab: Any) -> None:
    file = lab.root / "whole.yaml"
    file.write_text(yaml.safe_dump({"experiment": lab.tree(), "grid": {"seed": [0]}}))
    assert Sweep.load(file).name == "lab"


@fast_only(0, 1, 2, 8, 11, 12, 15)
@pytest.mark.parametrize(
    ("keys", "said_in_error"),
    [
        (
            {"gird": {}},
            "sweep.yaml: unknown key gird (did you mean grid?). Valid keys: name, title, experiment, tuned, grid",
        ),
        ({}, "names no run"),
        ({"grid": {"seed": 3}}, "grid.seed: 3 is not a list of values"),
        ({"grid": {"seed": []}}, "grid.seed: [] is empty; give one value or more"),
        ({"grid": 3}, "grid is a mapping"),
        ({"list": [3]}, "list: 3 is not a setting"),
        ({"grid": [3]}, "grid: 3 is not a mapping"),
        ({"grid": {"seed": [0]}, "workers": 0}, "workers: 0"),
        ({"grid": {"seed": [0]}, "threads": "two"}, "threads: 'two'"),
        ({"grid": {"seed": [0]}, "devices": "cuda:0"}, "devices: 'cuda:0' is not a list"),
        ({"grid": {"seed": [0]}, "experiment": 3}, "experiment: 3 is neither"),
        ({"grid": {"seed": [0]}, "experiment": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"grid": {"rounds": [1, 2]}}, "'rounds' cannot be swept"),
        ({"grid": {"name": ["a", "b"]}}, "'name' cannot be swept"),
        ({"grid": {"executor.threads": [1, 2]}}, "'executor' cannot be swept"),
        ({"grid": {"local.lrr": [0.1]}}, "run with local.lrr=0.1: unknown key local.lrr (did you mean local.lr?)"),
        ({"grid": {"partition.alpha": [0.1]}}, "run with partition.alpha=0.1: unknown key partition.alpha"),
    ],
)
def test_a_wrong_file_is_one_line_and_code_2(
    write: Any, capsys: pytest.CaptureFixture, keys: dict, said_in_error: str
) -> None:
    file = str(write(keys))
    capsys.readouterr()  # what making the base wrote
    assert main(["sweep", file]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said_in_error in lines[0]


def test_settings_in_a_few_words() -> None:
    settings = {"partition.alpha": 0.1, "adapter": {"name": "lora", "r": 8}, "modes": ["local", "central"]}
    assert said(settings) == "partition.alpha=0.1 adapter={lora r=8} modes=[local,central]"


# ------------------------------------------------------------------------------------------------ sharing a base


@fast_only(1)
@pytest.mark.parametrize("lanes", [1, 2])
@fast_only(0, 6)
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("llama", {"name": "lora", "r": 2}),
        ("llama", {"name": "p_tuning", "num_virtual_tokens": 2, "hidden": 8}),
        ("gpt2", {"name": "adapter", "bottleneck": 4}),
        ("gpt2", {"name": "ia3"}),
        ("bert", {"name": "adapter", "bottleneck": 4}),
        ("bert", {"name": "lora", "r": 2}),
        ("llama", {"name": "none"}),
    ],
    ids=lambda v: v if isinstance(v, str) else v["name"],
)
def test_runs_that_share_a_base_leave_the_bits_of_runs_alone(lab: Any, kind: str, adapter: dict, lanes: int) -> None:
    """Twice each, so that a base that the first run changed would show in the second."""
    task = "sequence_classification" if kind == "bert" else "causal_lm"
    modes = ["local", "federated", "central"]
    model = {"path": lab.base(kind), "dtype": "float64", "task": task}
    shared, results = Shared(), str(lab.root / "together")
    for seed in (0, 1):
        exp = lab.exp(model=model, adapter=adapter, modes=modes, seed=seed, training={"lanes": lanes})
        alone = lab.run(exp)
        together = fedsim.run(
            lab.exp(model=model, adapter=adapter, modes=modes, seed=seed, training={"lanes": lanes}, results=results),
            progress=False,
            shared=shared,
        )
        assert together.id == alone.name
        lab.same_bits(alone, together.path)


def test_a_borrowed_model_shares_memory_but_not_its_modules(lab: Any) -> None:
    shared, parts = Shared(), prepare(lab.exp())
    one, other = shared.base(parts), shared.base(parts)
    tied = one.lm_head.weight
    assert one is not other and tied is one.model.embed_tokens.weight, "tied weights stay tied"
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a is not b and a.data_ptr() == b.data_ptr()
    own = one.model.norm.weight
    sharing.own_memory([own], sharing.memory_of(other))
    assert own.data_ptr() != other.model.norm.weight.data_ptr() and torch.equal(own, other.model.norm.weight)
    shared.keep_only([])
    again = shared.base(parts)
    assert again.model.norm.weight.data_ptr() != other.model.norm.weight.data_ptr(), "freed, so loaded anew"


def test_bases_are_shared_where_they_are_the_same(lab: Any) -> None:
    def key(**sections: Any) -> str | None:
        return Shared.base_key(prepare(lab.exp(**sections)).exp)

    assert key() == key(seed=9) == key(adapter={"name": "ia3"}) == key(partition={"name": "iid", "num_clients": 2})
    assert key() != key(model={"path": lab.base("llama"), "dtype": "float32"}) != key(model={"path": lab.base("gpt2")})
    assert key(adapter={"name": "none"}) is None, "trained as a whole: each run needs its own"
    head = {"path": lab.base("bert"), "task": "sequence_classification"}
    assert key(model=head) == key(model=head, adapter={"name": "ia3"}) != key(model=head, seed=9), (
        "heads start by the seed"
    )


# ------------------------------------------------------------------------------------------------ running


GRID = {"grid": {"seed": [0, 1], "local.lr": [1e-3, 5e-3]}}


def test_a_sweep_makes_ordinary_runs_tables_and_its_own_record(write: Any, lab: Any) -> None:
    plan = Sweep.load(write({**GRID, "workers": 1, "threads": 1}, modes=["local", "federated", "central"]))
    jobs = run_sweep(plan, progress=False).jobs
    assert [j.state for j in jobs] == ["finished"] * 4 and not any(j.skipped for j in jobs)
    alone = lab.run(fedsim.Experiment.from_dict({**plan.experiments[2].to_dict(), "results": str(lab.root / "alone")}))
    assert alone.name == jobs[2].path.name
    lab.same_bits(alone, jobs[2].path)
    told = json.loads((plan.path / "sweep.json").read_text())
    assert told["name"] == "mine" and told["keys"] == ["seed", "local.lr"]
    assert [r["settings"] for r in told["runs"]] == [j.settings for j in jobs]
    assert [r["run"] for r in told["runs"]] == [j.path.name for j in jobs] and len(
        {r["run"] for r in told["runs"]}
    ) == 4
    for name in ("table.csv", "table.parquet", "cells.csv"):
        assert (plan.path / name).is_file()
    assert list((plan.path / "figures").glob("*.png"))


def test_finished_runs_are_skipped_and_more_rounds_are_not_finished(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write({**GRID, "workers": 1, "threads": 1})
    first = run_sweep(file, progress=False).jobs
    before = {j.path: (j.path / "metrics/federated.jsonl").stat().st_mtime_ns for j in first}
    calls: list[str] = []
    monkeypatch.setattr(sweeps, "run_steps", lambda exp, **k: calls.append(exp.name))
    again = run_sweep(file, progress=False).jobs
    assert not calls and all(j.skipped and j.state == "finished" for j in again)
    assert {j.path: (j.path / "metrics/federated.jsonl").stat().st_mtime_ns for j in again} == before


def test_a_failed_run_does_not_stop_the_rest(write: Any, lab: Any, capsys: pytest.CaptureFixture) -> None:
    """Rows that no client can have, and a layer that is not there, found out before and after the base is loaded."""
    keys = {
        "list": [
            {"partition": {"name": "dirichlet", "num_clients": 3, "min_rows": 500}},
            {"adapter": {"name": "lora", "target_modules": ["nowhere"]}},
            {"seed": 5},
        ],
        "workers": 1,
        "threads": 1,
    }
    file = write(keys)
    assert main(["sweep", str(file), "-q"]) == 1
    out, err = capsys.readouterr()
    assert "1 of 3 run(s)" in out and "2 of 3 run(s) failed" in err
    assert "min_rows=500}: partition.min_rows" in err and "'nowhere' does not exist in this base" in err
    runs = json.loads((lab.root / "results" / "mine" / "sweep.json").read_text())["runs"]
    assert [r["state"] for r in runs] == ["failed", "failed", "finished"]
    assert "min_rows" in runs[0]["reason"] and runs[0]["run"] is None
    (trace,) = (lab.root / "results" / "mine" / "errors").iterdir()
    assert trace.stem == runs[1]["run"]


def test_a_client_that_fails_names_itself_in_the_reason(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.training.worker import Worker

    def fail(self: Worker, *args: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(Worker, "train", fail)
    jobs = run_sweep(Sweep.load(write({"list": [{"seed": 0}], "workers": 1, "threads": 1})), progress=False).jobs
    assert [j.state for j in jobs] == ["failed"]
    assert jobs[0].reason.startswith("round 1, clients") and jobs[0].reason.endswith("ValueError: no such thing")


def test_an_interrupted_sweep_goes_on_where_it_was(write: Any, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write({**GRID, "workers": 1, "threads": 1}, rounds=3, results=str(lab.root / "stopped"))
    from fedsim.runs.folder import Metrics

    count, log = [0], Metrics.log

    def stop(self: Metrics, rows: list[Row], seconds: float) -> None:
        count[0] += 1
        if count[0] == 12:  # in the second run, with a round of it and its checkpoint behind
            raise KeyboardInterrupt
        log(self, rows, seconds)

    monkeypatch.setattr(Metrics, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(file, progress=False)
    monkeypatch.undo()
    plan = Sweep.load(file)
    states = [r["state"] for r in json.loads((plan.path / "sweep.json").read_text())["runs"]]
    assert states == ["finished", "waiting", "waiting", "waiting"]
    jobs = run_sweep(plan, progress=False).jobs
    assert [j.skipped for j in jobs] == [True, False, False, False]
    whole = run_sweep(Sweep.load(file, [f"results={lab.root / 'whole'}"]), progress=False).jobs
    for one, other in zip(jobs, whole, strict=True):
        lab.same_bits(one.path, other.path)


def test_the_same_run_twice_is_made_once(write: Any) -> None:
    """The initial learning rate written out is the same experiment."""
    file = write({"list": [{"seed": 1}, {"seed": 1, "local.lr": 5e-3}], "workers": 1, "threads": 1})
    jobs = run_sweep(file, progress=False).jobs
    assert jobs[0].path == jobs[1].path and [j.state for j in jobs] == ["finished", "finished"]


@pytest.mark.thorough
def test_two_workers_leave_the_bits_of_one(write: Any, lab: Any) -> None:
    keys = {
        "grid": {"seed": [0, 1, 2], "model": [{"path": lab.base(k), "dtype": "float64"} for k in ("llama", "gpt2")]}
    }
    one = run_sweep(write({**keys, "workers": 1, "threads": 1}), progress=False).jobs
    plan = Sweep.load(write({**keys, "workers": 2, "threads": 1}), [f"results={lab.root / 'two'}"])
    two = run_sweep(plan, progress=False).jobs
    assert [j.state for j in two] == ["finished"] * 6
    for a, b in zip(one, two, strict=True):
        assert a.path.parent != b.path.parent
        lab.same_bits(a.path, b.path)


@pytest.mark.thorough
def test_a_worker_that_dies_is_replaced_and_its_run_goes_on(
    write: Any, lab: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write({"grid": {"seed": [0, 1, 2, 3]}, "workers": 2, "threads": 1}, rounds=30)
    start, killed = sweeps.Supervisor.start, []
    update = sweeps.Board.update
    workers = []

    def started(self: Any, worker: Any) -> None:
        start(self, worker)
        workers.append(worker)

    def kill(self: Any, run: int, state: str, text: str) -> None:
        update(self, run, state, text)
        if not killed and state == "running" and "round 3" in text:
            killed.append(run)
            (victim,) = [w for w in workers if [one.number for one in w.work] == [run]]
            os.kill(victim.process.pid, signal.SIGKILL)

    monkeypatch.setattr(sweeps.Supervisor, "start", started)
    monkeypatch.setattr(sweeps.Board, "update", kill)
    jobs = run_sweep(file, progress=False).jobs
    assert [j.state for j in jobs] == ["finished"] * 4 and len(workers) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if "/4  seed=" in line]
    name = "worker fedsim-sweep-[01] on cpu"
    assert re.fullmatch(
        rf"{killed[0] + 1}/4  seed={killed[0]}  {name} died \(SIGKILL\); replaced, the run resumes", said[0]
    )
    assert said[1:] in (
        [],
        [f"{killed[0] + 1}/4  seed={killed[0]}  metrics/federated.jsonl: its last line was torn, and is cut off"],
    )
    whole = lab.run(fedsim.Experiment.from_dict({**jobs[killed[0]].exp.to_dict(), "results": str(lab.root / "w")}))
    lab.same_bits(whole, jobs[killed[0]].path)


@fast_only(0)
@pytest.mark.parametrize(
    ("how", "what"),
    [("kill", "SIGKILL"), ("stop", "no heartbeat for 2 s (executor.hang_s)"), ("exit", "exit code 3")],
)
def test_a_run_of_which_three_processes_end_is_given_up_and_the_others_are_not(
    write: Any, lab: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str, what: str
) -> None:
    """Killed, stopped by a signal in the middle of its training, so that it beats no more, or ended."""
    points = lab.root / "points"
    points.mkdir()
    frail.arm(points, "train-1", how, 3)
    monkeypatch.setenv("FEDSIM_TEST_POINTS", str(points))
    monkeypatch.setattr(sweeps, "_work", frail.sweep_worker)
    executor = {"name": "pool", "devices": ["cpu"], "hang_s": 2}
    file = write({"grid": {"seed": [0, 1, 2]}, "workers": 2, "threads": 1}, executor=executor)
    jobs = run_sweep(file, progress=False).jobs
    assert [j.state for j in jobs] == ["finished", "failed", "finished"]
    reason, name = jobs[1].reason, r"fedsim-sweep-\d"
    assert re.match(rf"3 worker processes died of it, .*(; )?({re.escape(what)} on cpu \({name}\)(; )?){{3}}", reason)
    assert reason.endswith("; start the sweep again") and ("out-of-memory killer" in reason) == (how == "kill")
    said = re.sub(name, "NAME", capsys.readouterr().err).splitlines()
    assert said == [f"2/3  seed=1  worker NAME on cpu died ({what}); replaced, the run resumes"] * 2
    assert frail.left_behind([]) == [] and frail.armed(points) == []
    assert [j.state for j in run_sweep(file, progress=False).jobs] == ["finished"] * 3


def test_a_run_that_was_started_with_other_threads_keeps_them(write: Any, lab: Any) -> None:
    file = write({"grid": {"seed": [0]}, "workers": 1, "threads": 1}, rounds=2)
    plan = Sweep.load(file)
    jobs = [Job(s, e) for s, e in zip(plan.settings, plan.experiments, strict=True)]
    run_jobs(jobs, workers=1, threads=2, progress=False)
    status = jobs[0].path / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "state": "running"}))
    assert [j.reason for j in run_sweep(plan, progress=False).jobs] == [None]
    assert json.loads((jobs[0].path / "plan.json").read_text())["threads"] == 2


def test_a_device_that_is_not_there_is_said_at_once(write: Any) -> None:
    with pytest.raises(UserError, match="'cuda:9' is not on this machine"):
        run_sweep(Sweep.load(write({"grid": {"seed": [0]}, "devices": ["cuda:9"]})), progress=False)
    assert main(["sweep", str(write({"grid": {"seed": [0]}, "devices": ["cuda:9"]}))]) == 2


def test_lines_where_there_is_no_terminal(write: Any, capsys: pytest.CaptureFixture) -> None:
    file = write({"grid": {"seed": [0, 1]}, "workers": 1, "threads": 1}, modes=["federated"])
    assert main(["sweep", str(file)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [line.split()[:3] for line in lines] == [
        [f"{i}/2", s, f"seed={i - 1}"] for i in (1, 2) for s in ("running", "finished")
    ]
    assert "best accuracy: federated" in lines[1]


def test_the_live_table_shows_what_matters_when_there_is_little_room() -> None:
    from rich.console import Console

    from fedsim.runs.progress import Board

    board = Board(False, [f"run-{i}" for i in range(60)])
    for i in range(30):
        board.update(i, "finished", "best")
    board.update(12, "failed", "why")
    for i in (30, 31):
        board.update(i, "running", "federated round 3")
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(board._table())
    text = console.export_text()
    assert "30 of 60 runs" in text and "29 finished, 2 running, 1 failed, 28 waiting" in text
    for shown in ("run-30 ", "run-31 ", "run-12 ", "run-29 ", "run-32 "):
        assert shown in text, shown
    assert "run-0 " not in text and len(text.splitlines()) <= 24


def test_plot_draws_a_sweeps_folder_again(
    write: Any, lab: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.plots.save_figures", save_figures)  # the laboratory draws none
    done = run_sweep(write({"grid": {"local.lr": [1e-3, 1e-2]}, "workers": 1, "threads": 1}), progress=False)
    for file in ("table.csv", "cells.csv", "figures/score_by_local.lr.png"):
        (done.path / file).unlink()
    assert main(["plot", str(done.path)]) == 0
    told = {Path(line) for line in capsys.readouterr().out.splitlines()}
    figure = "figures/score_by_local.lr.png"
    assert {done.path / "table.csv", done.path / "cells.csv", done.path / figure} <= told
    assert all(path.is_file() for path in told)
    tables = (done.path / "table.csv").stat().st_mtime_ns
    assert main(["plot", str(done.path), "--metric", "loss", "--out", str(lab.root / "drawn")]) == 0
    assert (lab.root / "drawn" / "score_by_local.lr.png").is_file()
    assert (done.path / "table.csv").stat().st_mtime_ns == tables, (
        "another metric elsewhere leaves the sweep's own tables"
    )
    assert main(["plot", str(done.path), "--x", "bytes"]) == 2
    run = str(done.jobs[0].path)
    assert main(["plot", run, "--x", "bytes", "--out", str(lab.root / "one")]) == 0
    assert (lab.root / "one" / "accuracy_by_bytes.png").is_file()
    assert main(["plot", run, "--x", "money"]) == 2
    assert "x='money' is not an axis" in capsys.readouterr().err


def test_a_damaged_plan_is_taken_from_its_copy(write: Any) -> None:
    file = write({"grid": {"seed": [0, 1]}, "workers": 1, "threads": 1})
    done = run_sweep(file, progress=False)
    for job in done.jobs:
        (job.path / "status.json").write_text('{"state": "running", "rounds": 1}')
    (done.jobs[0].path / "plan.json").write_text("{}")
    before = json.loads((done.jobs[1].path / "plan.json").read_text())
    again = run_sweep(file, progress=False)
    assert [j.state for j in again.jobs] == ["finished", "finished"]
    assert json.loads((done.jobs[0].path / "plan.json").read_text())["lanes"] == before["lanes"]


def test_figures_that_failed_are_drawn_again(write: Any, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedsim.analysis.plots

    def fail(folder: Path) -> list[Path]:
        raise ZeroDivisionError

    drawn: list[Path] = []
    file = write({"grid": {"seed": [0]}, "workers": 1, "threads": 1})
    monkeypatch.setattr(fedsim.plots, "save_figures", fail)
    assert run_sweep(file, progress=False).jobs[0].reason == "ZeroDivisionError: "
    monkeypatch.setattr(fedsim.plots, "save_figures", lambda folder: drawn.append(folder) or [])
    job = run_sweep(file, progress=False).jobs[0]
    assert job.state == "finished" and drawn == [job.path]
    assert run_sweep(file, progress=False).jobs[0].skipped and len(drawn) == 1


def test_runs_that_choose_by_different_metrics_need_one_named(write: Any, capsys: pytest.CaptureFixture) -> None:
    file = str(write({"grid": {"best.metric": ["accuracy", "loss"]}, "workers": 1, "threads": 1}))
    assert main(["sweep", file, "-q"]) == 2
    err = capsys.readouterr().err
    assert "2 run(s) are finished, but there are no tables" in err and "best.metric" in err
    assert main(["sweep", file, "-q", "--metric", "loss"]) == 0


def test_what_the_experiment_says_of_devices_and_threads_holds(lab: Any) -> None:
    tree = lab.tree(executor={"name": "pool", "devices": ["cpu"], "workers": 2, "threads": 3})
    plan = Sweep.from_dict({"experiment": tree, "grid": {"seed": [0]}})
    assert (plan.devices, plan.threads, plan.workers) == (["cpu"], 3, None)
    assert Sweep.from_dict({"experiment": tree, "grid": {"seed": [0]}, "threads": 1}).threads == 1
    assert Sweep.from_dict({"experiment": lab.tree(executor={"name": "auto"}), "grid": {"seed": [0]}}).devices == "auto"
