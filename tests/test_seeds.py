"""`seeds` makes a run for each seed, and the mean and the interval over them; a callback sees every round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from tiers import fast_only

import fedsim
from fedsim.cli.main import main
from fedsim.config.experiment import Experiment
from fedsim.core.errors import UserError
from fedsim.core.types import RoundEnd
from fedsim.runs.seeds import SeedRuns, curves, over_seeds
from fedsim.runs.sweep_plan import Sweep

KEYS: dict[str, Any] = {"rounds": 2, "modes": ["local", "federated"], "model": {"dtype": "float32"}}


def tree(lab: Any, **keys: Any) -> dict[str, Any]:
    found = lab.tree(**{**KEYS, **keys})
    if "seeds" in keys:
        del found["seed"]
    return found


def test_every_seed_is_an_ordinary_run_and_is_resumed(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr("fedsim.runs.progress.Relay.round", lambda *args: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            fedsim.run(tree(lab, seeds=[5, 6]), progress=False)
    done = fedsim.run(tree(lab, seeds=[5, 6]), progress=False)
    assert isinstance(done, SeedRuns)
    for run, seed in zip(done.runs, (5, 6), strict=True):
        alone = fedsim.run(tree(lab, seed=seed, results=str(lab.root / "other")), progress=False)
        assert (run.id, run.path.parent.name) == (alone.id, "lab")
        assert Experiment.load(run.path / "config.yaml").seed == seed
        lab.same_bits(run.path, alone.path)

    def never(*args: Any) -> None:
        pytest.fail("a finished run was run again")

    monkeypatch.setattr(fedsim.runs.run, "session", never)
    again = fedsim.run(tree(lab, seeds=[5, 6]), progress=False)
    assert again.runs == done.runs and all(figure.is_file() for figure in again.figures)


def test_mean_and_interval_by_hand() -> None:
    """Student's t with 2 degrees of freedom has its 97.5 % quantile at 4.302653 (any table); s of 0.5, 0.7, 0.9 is 0.2."""
    rows = []
    for run, (accuracy, loss) in enumerate([(0.5, 2.0), (0.7, 1.0), (0.9, 1.5)]):
        for number in (1, 2):
            for name, value in (("accuracy", accuracy - 0.1 * (number == 1)), ("loss", loss)):
                rows.append(
                    {"round": number, "step": 10 * number, "scope": "central", "client": None, "split": "validation"}
                    | {"name": name, "value": value, "weight": 9.0, "seconds": 0.0, "run": str(run)}
                )
        rows.append({**rows[-2], "split": "test", "name": "accuracy", "value": accuracy / 2})
    df = pd.DataFrame(rows).assign(**{"best.metric": "accuracy", "best.mode": "max"})
    half = 4.302653 * 0.2 / np.sqrt(3)
    (row,) = over_seeds(df).to_dict("records")
    assert row["model"] == "central" and row["runs"] == 3
    assert (row["validation"], row["test"]) == pytest.approx((0.7, 0.35))
    assert (row["validation low"], row["validation high"]) == pytest.approx((0.7 - half, 0.7 + half))
    assert (row["test low"], row["test high"]) == pytest.approx((0.35 - half / 2, 0.35 + half / 2))
    line = curves(df)
    assert line["mean"].tolist() == pytest.approx([0.6, 0.7])
    assert (line["high"] - line["low"]).tolist() == pytest.approx([2 * half] * 2)
    alone = over_seeds(df[df["run"] == "0"])
    assert alone["validation"].tolist() == pytest.approx([0.5]) and alone["validation low"].isna().all()
    with pytest.raises(UserError, match="level=1.0 is not between 0 and 1"):
        over_seeds(df, level=1.0)


def test_on_the_command_line(lab: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`seeds=` replaces the seed that the file has; the table has the means of the runs' own tables."""
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(tree(lab, rounds=1, modes=["federated"])))
    assert main(["run", str(file), "seeds=[0,1]", "-q"]) == 0
    out = capsys.readouterr().out
    assert "accuracy of 2 seeds: mean and 95 % t interval" in out and "seeds/" in out and ".png" in out
    folders = [path for path in (lab.root / "results" / "lab").iterdir() if (path / "config.yaml").is_file()]
    assert sorted(yaml.safe_load((f / "config.yaml").read_text())["seed"] for f in folders) == [0, 1]
    test = [
        next(r["value"] for r in lab.metrics(f) if r["split"] == "test" and r["name"] == "accuracy") for f in folders
    ]
    (line,) = [line for line in out.splitlines() if line.startswith("federated")][:1]
    assert f"{np.mean(test):.4f}" in line.split()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seed": 0, "seeds": [0, 1]}, r"^seeds: \[0, 1\] and seed=0 exclude each other; leave one out$"),
        (
            {"seeds": []},
            r"^seeds: number of values must be >= 1 \(got \[\]\); give random seeds instead of `seed`: one run for each",
        ),
        ({"seeds": [1, 1]}, r"^seeds: \[1, 1\] has 1 twice; remove one$"),
        ({"seeds": [0, -1]}, r"^seeds\[1\]: must be >= 0 \(got -1\)$"),
        ({"seeds": 3}, r"^seeds: 3 is not a list"),
    ],
)
def test_seeds_that_cannot_be_are_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Experiment.from_dict(keys)


def test_seeds_are_no_part_of_the_id_and_survive_being_written(lab: Any) -> None:
    exp = Experiment.from_dict({"seeds": [3, 4]})
    assert Experiment.from_dict(exp.to_dict()) == exp == Experiment.from_dict(yaml.safe_load(exp.to_yaml()))
    assert "seeds" not in Experiment().to_dict() and "seeds" not in exp.identity()
    for keys in ({"resume": "x"}, {"callback": print}):
        with pytest.raises(UserError, match=f"^{next(iter(keys))}: applies to a single run"):
            fedsim.run(exp, **keys)
    with pytest.raises(UserError, match=r"^seeds: \[3, 4\] is for fedsim run and sweeps; give one seed here"):
        fedsim.batches(exp, client=0, round=1)


def test_a_sweep_takes_the_seeds_of_its_experiment(lab: Any) -> None:
    base = tree(lab, seeds=[0, 1])
    plan = Sweep.from_dict({"experiment": base, "grid": {"local.lr": [1e-3, 1e-2]}})
    assert plan.settings == [{"local.lr": lr, "seed": s} for lr in (1e-3, 1e-2) for s in (0, 1)]
    assert [exp.seed for exp in plan.experiments] == [0, 1, 0, 1]
    swept = Sweep.from_dict({"experiment": base, "grid": {"seed": [7]}})
    assert [exp.seed for exp in swept.experiments] == [7], "a swept seed replaces them"


# ------------------------------------------------------------------------------------------------- the callback


def test_a_callback_sees_every_round_with_its_metrics(lab: Any) -> None:
    seen: list[RoundEnd] = []
    run = fedsim.run(tree(lab), progress=False, callback=lambda end: seen.append(end) or False)
    assert [(end.mode, end.round, end.rounds) for end in seen] == [
        (mode, number, 2) for mode in ("local", "federated") for number in (1, 2)
    ]
    logged = [{k: v for k, v in row.items() if k != "seconds"} for row in lab.metrics(run.path)]
    for end in seen:
        assert end.metrics and all(vars(row) in logged for row in end.metrics)
        assert {(row.scope, row.round) for row in end.metrics} == {(end.mode, end.round)}


def test_a_callback_that_cannot_be_called_is_told_before_training(lab: Any) -> None:
    with pytest.raises(UserError, match="^callback: 3 cannot be called"):
        fedsim.run(tree(lab), progress=False, callback=3)


@fast_only(0, 3)
@pytest.mark.parametrize(
    "error", [ValueError("enough"), UserError("enough"), OSError(28, "enough"), KeyboardInterrupt()]
)
def test_an_exception_of_a_callback_stops_the_run_which_goes_on_later(lab: Any, error: BaseException) -> None:
    def stop(end: RoundEnd) -> None:
        if (end.mode, end.round) == ("federated", 1):
            raise error

    with pytest.raises(type(error)) as caught:
        fedsim.run(tree(lab), progress=False, callback=stop)
    assert caught.value is error and any(entry.name == "stop" for entry in caught.traceback)
    assert error.__notes__ == ["stopped after round 1 (federated); run the same command to resume"]
    (folder,) = (lab.root / "results" / "lab").iterdir()
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    seen: list[tuple[str, int]] = []
    again = fedsim.run(tree(lab), progress=False, callback=lambda end: seen.append((end.mode, end.round)))
    assert seen == [("federated", 2)]
    lab.same_bits(again.path, fedsim.run(tree(lab, name="whole"), progress=False).path)
