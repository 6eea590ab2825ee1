"""Reading run folders: types, paths, damaged files, the summary table, the axis of rounds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import metrics_lines
from tiers import fast_only

from fedsim.analysis.listing import list_runs
from fedsim.analysis.load import find_runs, load_partition, load_runs
from fedsim.analysis.scores import summary
from fedsim.analysis.traces import round_ends, traces
from fedsim.cli.main import main
from fedsim.core.errors import Notice, UserError
from fedsim.core.seeding import stream

COUNTS = ((6, 59, 25), (221, 525, 0), (19, 523, 433))
PLATEAU = (0.89, 0.766, 0.955)  # what each site reaches alone
MODES = ("local", "federated", "central")


def write_run(
    folder: Path,
    seed: int = 0,
    modes: tuple[str, ...] = MODES,
    rounds: int = 5,
    steps: int = 200,
    every: int = 100,
    sites: int = 3,
    cohort: int | None = None,
    **config: Any,
) -> Path:
    """A run folder as fedsim writes it, with curves of the published kind: plateaus, saw-tooth, central on top.

    `config` takes dotted keys; `cohort` clients a round keep step counts of their own.
    """
    rng = stream(seed, "synthetic", str(config))
    folder.mkdir(parents=True)
    names = [f"site-{n + 1}" for n in range(sites)]
    counts = np.array(COUNTS) if sites == 3 else rng.multinomial(40, rng.dirichlet([0.4] * 3, sites))
    plateau = np.array(PLATEAU) if sites == 3 else rng.uniform(0.6, 0.95, sites)
    plateau = plateau + rng.normal(0, 0.01, sites)  # seeds differ
    plateau = 0.97 - (0.97 - plateau) / (1.0 + 0.3 * np.log(config.get("partition.alpha", 1.0)))
    rows: list[dict[str, Any]] = []
    clock = 0.0

    def log(
        number: int, step: int, scope: str, client: str | None, value: float, name: str = "", split: str = "validation"
    ) -> None:
        nonlocal clock
        clock += 0.5
        base = {"round": number, "step": step, "scope": scope, "client": client, "split": split, "weight": 226.0}
        if name:
            rows.append(base | {"name": name, "value": value, "seconds": clock})
            return
        noisy = float(np.clip(value + rng.normal(0, 0.004), 0.0, 1.0))
        loss = 0.05 + 4.0 * (1.0 - noisy) ** 1.5
        for metric, own in (("accuracy", noisy), ("loss", loss)):
            rows.append(base | {"name": metric, "value": own, "seconds": clock})

    def climb(top: float, step: float) -> float:
        return 0.25 + (top - 0.25) * (1.0 - float(np.exp(-step / 60.0)))

    evaluated = [*range(every, steps + 1, every)]
    if "local" in modes:
        for client in names:
            log(0, 0, "local", client, 0.25)
        for number in range(1, rounds + 1):
            for client, top in zip(names, plateau, strict=True):
                for step in evaluated:
                    done = (number - 1) * steps + step
                    log(number, done, "local", client, climb(top, done))
                log(number, number * steps, "local", client, 9000.0, "tokens", "train")
                log(number, number * steps, "local", client, climb(top, number * steps) + 0.01, "", "site")
        for client, top in zip(names, plateau, strict=True):
            log(rounds, rounds * steps, "local", client, top - 0.01, "accuracy", "test")
    if "federated" in modes:
        log(0, 0, "federated", None, 0.25)
        own_steps = dict.fromkeys(names, 0)
        merged = 0.25
        for number in range(1, rounds + 1):
            chosen = names if cohort is None else [names[n] for n in sorted(rng.choice(sites, cohort, replace=False))]
            target = 0.97 - 0.03 * 0.5**number + rng.normal(0, 0.004)
            for client in chosen:
                top = 0.5 * (plateau[names.index(client)] + target)
                for step in evaluated:
                    own_steps[client] += every
                    part = 1.0 - float(np.exp(-step / 60.0))
                    log(number, own_steps[client], "federated", client, merged + (top - merged) * part)
                for name, value in (("tokens", 9000.0), ("bytes_up", 2.0**20), ("bytes_down", 2.0**20)):
                    log(number, own_steps[client], "federated", client, value, name, "train")
                log(number, own_steps[client], "federated", client, top + 0.01, "", "site")
                log(number, own_steps[client], "federated", client, target + 0.005, "merged_accuracy", "site")
            merged = target
            log(number, number * steps, "federated", None, merged)
        log(rounds, rounds * steps, "federated", None, 0.96, "accuracy", "test")
    if "central" in modes:
        log(0, 0, "central", None, 0.25)
        longer = 2 * sites  # the same passes over all rows are more steps than one site does
        for number in range(1, rounds + 1):
            for step in evaluated:
                done = longer * ((number - 1) * steps + step)
                log(number, done, "central", None, climb(0.975, done / 3))
            log(number, longer * number * steps, "central", None, 9000.0 * sites, "tokens", "train")
        log(rounds, longer * rounds * steps, "central", None, 0.97, "accuracy", "test")

    for row in (row for row in rows if row["split"] == "test"):  # the chosen model's
        alike = [r for r in rows if r["split"] == "validation" and r["name"] == "accuracy" and r["round"] > 0]
        alike = [r for r in alike if (r["scope"], r["client"]) == (row["scope"], row["client"])]
        ends = [r for r in alike if r["step"] == max(a["step"] for a in alike if a["round"] == r["round"])]
        row |= {key: max(ends, key=lambda r: r["value"])[key] for key in ("round", "step")}

    resolved: dict[str, Any] = {"name": folder.parent.name, "seed": seed, "modes": list(modes), "rounds": rounds}
    resolved |= {
        "partition": {"name": "dirichlet", "alpha": 1.0},
        "local": {"steps": steps, "lr": 0.0001, "betas": [0.9, 0.98]},
    }
    resolved |= {
        "best": {"metric": "accuracy", "mode": "max"},
        "cohort": {"size": cohort or "all"},
        "data": {"columns": {}},
    }
    for key, value in config.items():
        section, _, name = key.rpartition(".")
        (resolved.setdefault(section, {}) if section else resolved)[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "status.json").write_text(json.dumps({"state": "finished"}))
    report = {
        "class_counts": counts.tolist(),
        "class_names": ["negative", "neutral", "positive"],
        "client_names": names,
    }
    report |= {"sizes": counts.sum(axis=1).tolist(), "js_mean": 0.1373, "size_gini": 0.326}
    (folder / "partition.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "results" / "lora" / "a1b2c3")


def test_load_runs_types_and_config(run: Path) -> None:
    df = load_runs(run)
    lines = metrics_lines(run)
    assert len(df) == len(lines)
    assert (df["round"].dtype, df["step"].dtype, df["value"].dtype) == ("Int64", "Int64", np.float64)
    assert df["client"].dtype == object
    merged = df[(df["scope"] == "federated") & (df["step"] == 400) & (df["name"] == "accuracy") & df["client"].isna()]
    wanted = [json.loads(line) for line in lines]
    wanted = [
        r for r in wanted if (r["scope"], r["step"], r["client"], r["name"]) == ("federated", 400, None, "accuracy")
    ]
    assert merged["client"].tolist() == [None]
    assert merged["value"].tolist() == [wanted[0]["value"]]
    assert set(df["run"]) == {"a1b2c3"} and set(df["experiment"]) == {"lora"}
    assert set(df["local.lr"]) == {0.0001} and df["local.steps"].dtype == np.int64
    assert set(df["local.betas"]) == {"[0.9, 0.98]"} and set(df["cohort.size"]) == {"all"}
    assert set(df["name"]) >= {"accuracy", "loss", "tokens"}, "the config's name must not replace the metric's"


def test_a_folder_with_one_metrics_file_per_mode_reads_the_same(run: Path) -> None:
    whole, listed = load_runs(run), list_runs(run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").unlink()
    (run / "metrics").mkdir()
    for mode in MODES:
        own = [line for line in lines if json.loads(line)["scope"] == mode]
        (run / "metrics" / f"{mode}.jsonl").write_text("".join(own))
    assert load_runs(run.parent).equals(whole) and list_runs(run).equals(listed)
    with (run / "metrics/local.jsonl").open("a") as file:
        file.write("{")
    with pytest.warns(Notice, match=r"metrics/local.jsonl: the last line \(\d+\) is torn"):
        assert load_runs(run).equals(whole)
    for mode in MODES:
        (run / "metrics" / f"{mode}.jsonl").unlink()
    assert len(load_runs(run)) == 0 and list_runs(run)["rounds_done"].tolist() == [0], "nothing is logged yet"


def test_several_runs_mixed_config_and_names(tmp_path: Path) -> None:
    first = write_run(tmp_path / "e" / "one", seed=1, **{"partition.alpha": 0.5, "flag": True})
    second = write_run(tmp_path / "f" / "two", seed=2, cohort=2, **{"partition.name": "iid", "local.clip": None})
    df = load_runs([first, second], names=["accuracy"])
    assert set(df["name"]) == {"accuracy"}
    by_run = df.drop_duplicates("run").set_index("run")
    assert by_run["seed"].to_dict() == {"one": 1, "two": 2}
    assert by_run["cohort.size"].to_dict() == {"one": "all", "two": 2}
    assert by_run.loc["one", "flag"] is True and pd.isna(by_run.loc["two", "flag"])
    assert by_run["local.clip"].isna().all()
    assert df.groupby("partition.name", observed=True).ngroups == 2
    assert load_runs(tmp_path, names=["accuracy"]).equals(df), "a root finds the same runs in the same order"
    with pytest.raises(UserError, match="'acuracy'.*accuracy, .*tokens"):
        load_runs(tmp_path, names=["acuracy"])


def test_copies_of_one_run_stay_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "here" / "e" / "same")
    write_run(tmp_path / "there" / "e" / "same")
    assert load_runs(tmp_path)["run"].nunique() == 2


@pytest.mark.parametrize("reader", [find_runs, load_runs, list_runs])
def test_missing_or_empty_paths(tmp_path: Path, reader: Any) -> None:
    with pytest.raises(UserError, match="no folder '.*nowhere'"):
        reader(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no run in"):
        reader(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0")
    with pytest.raises(UserError, match="metrics.jsonl"):
        reader(tmp_path)
    with pytest.raises(UserError, match="no run given"):
        reader([])


def test_a_run_given_twice_counts_once(run: Path) -> None:
    assert len(find_runs([run, run.parent, run / ".." / run.name])) == 1


def test_torn_last_line_is_left_out(run: Path) -> None:
    whole = load_runs(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write('{"round": 6, "scope": "zürich'.encode()[:-4])  # torn inside a character
    with pytest.warns(UserWarning, match=r"metrics.jsonl: the last line \(\d+\) is torn"):
        assert load_runs(run).equals(whole)


def test_torn_last_line_is_a_plain_line_of_a_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round": 6, "sco')
    for command in (["list", str(run)], ["plot", str(run), "--out", str(run / "f"), "--metric", "loss"]):
        assert main(command) == 0
        err = capsys.readouterr().err
        assert re.fullmatch(r"fedsim: \S+metrics.jsonl: the last line \(\d+\) is torn and left out\n", err), err
    with pytest.warns(Notice):  # in Python it is a warning as ever
        load_runs(run)


@fast_only(0, 2, 4)
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ('{"round": 1, "sco', "not JSON"),
        ("", "not JSON"),
        ("17", "not a JSON object"),
        ('{"round": 1}, {"round": 2}', "not JSON"),
        ('{"round": 1, "step": 1, "scope": "local", "split": "test", "value": 0.5}', "name is None"),
        ('{"round": null, "scope": "local", "split": "test", "name": "loss", "value": 0.5}', "round is None"),
        ('{"round": 1, "scope": "local", "split": "test", "name": "loss", "value": "high"}', "value is 'high'"),
    ],
)
def test_bad_middle_line_is_named(run: Path, bad: str, why: str) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[6] = bad
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line 7: {why}"):
        load_runs(run)


def test_no_value_is_nan_and_an_empty_file_has_no_rows(run: Path) -> None:
    row = {"round": 1, "step": None, "scope": "local", "client": "a", "split": "test", "name": "loss", "value": None}
    (run / "metrics.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"round": 2, "value": float("nan")}) + "\n"
    )
    df = load_runs(run)
    assert df["value"].isna().all() and df["step"].isna().all() and df["seconds"].isna().all() and len(df) == 2
    (run / "metrics.jsonl").write_text("")
    assert len(load_runs(run)) == 0


def test_rows_logged_again_after_a_resume_replace_the_first(run: Path) -> None:
    df = load_runs(run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    again = json.loads(lines[-1]) | {"value": 0.125}
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines([*lines[-5:-1], json.dumps(again) + "\n"])
    read = load_runs(run)
    assert len(read) == len(df) and read["value"].iloc[-1] == 0.125


def test_list_runs(tmp_path: Path) -> None:
    first = write_run(tmp_path / "e" / "one")
    second = write_run(tmp_path / "e" / "two", modes=("local", "federated"), rounds=2)
    (second / "status.json").unlink()
    table = list_runs(tmp_path).set_index("run")
    assert table["state"].to_dict() == {"one": "finished", "two": "unknown"}
    assert table["rounds_done"].to_dict() == {"one": 5, "two": 2}
    assert table.loc["two", "modes"] == "local, federated" and np.isnan(table.loc["two", "best_central"])
    df = load_runs(first, names=["accuracy"])
    scored = df[(df["split"] == "validation") & (df["round"] > 0)]
    local = scored[scored["scope"] == "local"].groupby("client")["value"].max().mean()
    merged = scored[(scored["scope"] == "federated") & scored["client"].isna()]["value"].max()
    assert table.loc["one", "best_local"] == pytest.approx(local)
    assert table.loc["one", "best_federated"] == merged
    # killed while the federated mode was in round 3: its merged model is that of round 2
    kept = [r for r in map(json.loads, (first / "metrics.jsonl").open()) if r["scope"] != "central"]
    kept = [r for r in kept if r["scope"] == "local" or r["round"] < 3 or (r["round"] == 3 and r["client"])]
    (first / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (first / "config.yaml").write_text((first / "config.yaml").read_text().replace("- central\n", ""))
    assert list_runs(first)["rounds_done"].tolist() == [2]


def test_load_partition(run: Path, tmp_path: Path) -> None:
    assert load_partition(run)["class_counts"] == [list(row) for row in COUNTS]
    with pytest.raises(UserError, match="partition.json"):
        load_partition(tmp_path)
    (run / "partition.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_partition(run)


def _rows(*rows: tuple[int, int, str, str | None, str, str, float], run: str = "r") -> pd.DataFrame:
    keys = ("round", "step", "scope", "client", "split", "name", "value")
    df = pd.DataFrame([dict(zip(keys, row, strict=True)) for row in rows]).astype({"round": "Int64", "step": "Int64"})
    client = pd.Series([row[3] for row in rows], dtype=object)
    return df.assign(client=client, run=run, seconds=0.0)


def test_summary_by_hand() -> None:
    acc = ("validation", "accuracy")
    df = _rows(
        (0, 0, "local", "a", *acc, 0.99),  # before training: never a best
        (1, 10, "local", "a", *acc, 0.8),
        (1, 20, "local", "a", *acc, 0.6),
        (1, 20, "local", "a", "site", "accuracy", 0.7),
        (1, 20, "local", "a", "test", "accuracy", 0.5),
        (1, 30, "local", "b", *acc, 0.4),
        (1, 20, "federated", "a", *acc, 0.95),  # a client before the merge is not the merged model
        (1, 20, "federated", "a", "site", "merged_accuracy", 0.2),
        (1, 20, "federated", "b", "site", "merged_accuracy", 0.4),
        (1, 20, "federated", None, *acc, 0.9),
        (2, 40, "federated", "a", "site", "merged_accuracy", 0.6),
        (2, 40, "federated", None, *acc, 0.85),
        (1, 20, "federated", None, "test", "accuracy", 0.87),  # of the chosen model, after round 1
        (1, 20, "federated", None, "validation", "loss", 0.5),
        (2, 40, "federated", None, "validation", "loss", 0.3),
    )
    table = summary(df)
    assert list(table.columns) == ["model", "round", "validation", "site", "test", "steps"]
    assert table["model"].tolist() == ["local a", "local b", "local mean", "federated", "federated (last)"]
    assert table["round"].tolist() == [1, 1, pd.NA, 1, 2]
    assert table["validation"].tolist() == pytest.approx([0.6, 0.4, 0.5, 0.9, 0.85]), "0.8 was inside a round"
    assert table["site"].tolist() == pytest.approx([0.7, np.nan, 0.7, 0.3, 0.6], nan_ok=True)
    assert table["test"].tolist() == pytest.approx([0.5, np.nan, np.nan, 0.87, np.nan], nan_ok=True), (
        "no mean over some of the sites"
    )
    assert table["steps"].tolist() == [20, 30, 30, 20, 40]
    assert summary(df, which="last")["model"].tolist() == ["local a", "local b", "local mean", "federated"]
    assert summary(df, which="last")["validation"].tolist() == pytest.approx([0.6, 0.4, 0.5, 0.85])
    assert summary(df, which="best")["validation"].tolist() == pytest.approx([0.6, 0.4, 0.5, 0.9])
    loss = summary(df, "loss", which="best").set_index("model")
    assert loss.loc["federated", "validation"] == 0.5, "the loss of the model that accuracy chose, not the lowest loss"
    assert np.isnan(loss.loc["local a", "validation"])
    with pytest.raises(UserError, match="no metric 'f1' in these rows; recorded: accuracy, loss, merged_accuracy"):
        summary(df, "f1")
    with pytest.raises(UserError, match="which='first' is unknown; use best, last or both"):
        summary(df, which="first")


def test_summary_of_a_metric_that_is_better_when_low_and_of_several_runs() -> None:
    rows = [(1, 10, "central", None, "validation", "loss", 0.2), (2, 20, "central", None, "validation", "loss", 0.4)]
    table = summary(pd.concat([_rows(*rows, run="x"), _rows(*rows, run="y")], ignore_index=True), "loss")
    assert (
        table["run"].tolist() == ["x", "x", "y", "y"] and table["model"].tolist() == ["central", "central (last)"] * 2
    )
    assert table["validation"].tolist() == [0.2, 0.4] * 2
    own = _rows(*rows).assign(**{"best.metric": "loss", "best.mode": "max"})
    assert summary(own, "loss")["validation"].tolist() == [0.4], "the config's word on the direction holds"


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [([0.5, 0.3, 0.4, 0.2], 2), ([0.5, 0.3, 0.3, 0.2], 3), ([0.3, np.nan, 0.4, 0.2], 1), ([np.nan] * 4, 3)],
)
def test_without_test_rows_ties_go_to_the_lower_loss_then_to_the_later_round(losses: list[float], chosen: int) -> None:
    rows = []
    for number, (value, loss) in enumerate(zip([0.8, 0.8, 0.8, 0.7], losses, strict=True), start=1):
        rows.append((number, 10 * number, "federated", None, "validation", "accuracy", value))
        rows.append((number, 10 * number, "federated", None, "validation", "loss", loss))
    df = _rows(*rows).assign(**{"best.metric": "accuracy", "best.mode": "max"})
    for metric, value in (("accuracy", 0.8), ("loss", losses[chosen - 1])):
        table = summary(df, metric, which="best")
        assert table["round"].tolist() == [chosen] and table["steps"].tolist() == [10 * chosen]
        assert table["validation"].tolist() == pytest.approx([value], nan_ok=True)


def test_traces_place_points_by_each_models_own_steps() -> None:
    acc = ("validation", "accuracy")
    df = _rows(
        (0, 0, "federated", None, *acc, 0.1),
        (1, 5, "federated", "a", *acc, 0.2),
        (1, 10, "federated", "a", *acc, 0.3),
        (1, 10, "federated", None, *acc, 0.5),
        (2, 5, "federated", "b", *acc, 0.4),  # the first round of b: its own count starts at 0
        (2, 10, "federated", "b", *acc, 0.45),
        (2, 20, "federated", None, *acc, 0.6),
        (0, 0, "central", None, *acc, 0.1),
        (1, 30, "central", None, *acc, 0.7),
        (2, 45, "central", None, *acc, 0.8),
        (2, 60, "central", None, *acc, 0.9),
        (1, 4, "local", "a", *acc, 0.5),
        (1, 8, "local", "a", *acc, 0.6),
    )
    found = traces(df)
    assert found.merged.tolist() == [[0, 0.1], [1, 0.5], [2, 0.6]]
    assert {name: one.tolist() for name, one in found.clients[1].items()} == {"a": [[0, 0.1], [0.5, 0.2], [1, 0.3]]}
    assert {name: one.tolist() for name, one in found.clients[2].items()} == {"b": [[1, 0.5], [1.5, 0.4], [2, 0.45]]}
    assert found.central.tolist() == [[0, 0.1], [1, 0.7], [1.5, 0.8], [2, 0.9]]
    assert found.local["a"].tolist() == [[0.5, 0.5], [1, 0.6]]
    assert round_ends(df, "federated").to_dict() == {0: 0.0, 1: 10.0, 2: 20.0}


def test_traces_where_only_every_second_round_is_scored() -> None:
    acc = ("validation", "accuracy")
    rows = [
        (2, 30, "federated", "a", *acc, 0.3),
        (2, 40, "federated", "a", *acc, 0.4),
        (2, 40, "federated", None, *acc, 0.6),
    ]
    rows += [(2, 40, "local", "a", *acc, 0.3), (4, 70, "local", "a", *acc, 0.4), (4, 80, "local", "a", *acc, 0.5)]
    found = traces(_rows(*rows))
    assert found.clients[2]["a"].tolist() == [[1.5, 0.3], [2, 0.4]], "half of round 2 is done at step 30"
    assert found.local["a"].tolist() == [[2, 0.3], [3.5, 0.4], [4, 0.5]]


def test_traces_on_the_sites_own_rows() -> None:
    df = _rows(
        (1, 10, "federated", "a", "site", "accuracy", 0.7),
        (1, 10, "federated", "a", "site", "merged_accuracy", 0.8),
        (1, 14, "federated", "b", "site", "merged_accuracy", 0.6),
    )
    assert traces(df, split="site").merged.tolist() == [[1, pytest.approx(0.7)]]


def test_reading_and_plotting_need_no_torch() -> None:
    heavy = "('torch', 'transformers', 'matplotlib.pyplot')"
    code = f"import sys, fedsim.analysis.load, fedsim.analysis.plots; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_config_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes(b"name: caf\xe9\n")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml: not UTF-8 \(byte 9\)"):
        load_runs(run)
