"""The tables of a sweep: which runs and models are in them, every number by hand, intervals with known ends."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from tiers import fast_only

from fedsim.analysis.listing import list_table
from fedsim.analysis.sweeps import MODEL_COLUMNS, cells, sweep_table, swept_keys, write_tables
from fedsim.analysis.tables import Table, text_table
from fedsim.cli.main import main
from fedsim.core.errors import UserError

SITES = {"a": 30, "b": 10}  # rows of each site
JS = {"a": 0.02, "b": 0.3}
NAN = float("nan")


def write_run(
    folder: Path,
    local: dict[str, float] | None = None,
    federated: float | None = None,
    central: float | None = None,
    own: dict[str, float] | None = None,
    merged_own: dict[str, float] | None = None,
    metric: str = "accuracy",
    state: str = "finished",
    sizes: dict[str, int] | None = None,
    js: dict[str, float] | None = None,
    report: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A run of two rounds with these scores at its end; in round 1 each score was 0.01 better, test scores are 0.02 up.

    `config` takes dotted keys, and whole sections as dicts.
    """
    sign = -1.0 if metric == "loss" else 1.0
    rows: list[dict[str, Any]] = []

    def log(number: int, step: int, scope: str, client: str | None, value: float, split: str, name: str) -> None:
        key = {"round": number, "step": step, "scope": scope, "client": client, "split": split, "name": name}
        rows.append(key | {"value": value, "weight": 40.0, "seconds": 1.0})

    finals: list[tuple[str, str | None, float]] = [("local", name, value) for name, value in (local or {}).items()]
    finals += [("federated", None, federated)] if federated is not None else []
    finals += [("central", None, central)] if central is not None else []
    for number in (1, 2):
        for scope, client, value in finals:
            step = 10 * number * (3 if scope == "central" else 1)
            log(number, step, scope, client, value + 0.01 * sign * (number == 1), "validation", metric)
    for scope, client, value in finals:
        log(1, 30 if scope == "central" else 10, scope, client, value + 0.02, "test", metric)
    for number in (1, 2):
        for client, value in (own or {}).items():
            log(number, 10 * number, "local", client, value - 0.5 * (number == 1), "site", metric)
        for client, value in (merged_own or {}).items():
            log(number, 10 * number, "federated", client, value - 0.5 * (number == 1), "site", f"merged_{metric}")

    scopes = [scope for scope, given in (("local", local), ("federated", federated), ("central", central)) if given]
    tree: dict[str, Any] = {"name": "lab", "seed": 0, "modes": scopes, "rounds": 2}
    tree |= {"best": {"metric": metric, "mode": "min" if metric == "loss" else "max"}}
    tree |= {"partition": {"name": "dirichlet", "alpha": 1.0, "num_clients": 2}, "results": str(folder)}
    for key, value in config.items():
        *sections, last = key.split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "status.json").write_text(json.dumps({"state": state}))
    sizes, js = sizes or SITES, js or JS
    found = {"num_clients": len(sizes), "rows": sum(sizes.values()), "client_names": list(sizes)}
    found |= {"sizes": list(sizes.values()), "js": [js[name] for name in sizes], "js_mean": 0.09, "size_gini": 0.25}
    (folder / "partition.json").write_text(json.dumps(found | (report or {})))
    return folder


def write_sweep(folder: Path, runs: list[dict[str, Any]]) -> Path:
    """A sweep's folder: of each run `settings` and, unless it never started, what `write_run` takes."""
    listed = []
    for number, run in enumerate(runs):
        settings, started = run["settings"], len(run) > 1
        name = f"run{number}"
        if started:
            write_run(folder / name, **{k: v for k, v in run.items() if k != "settings"}, **settings)
        state = run.get("state", "finished") if started else "failed"
        listed.append({"run": name if started else None, "settings": settings, "state": state, "reason": None})
    keys = list(dict.fromkeys(key for run in runs for key in run["settings"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"name": folder.name, "keys": keys, "runs": listed}))
    return folder


def three_scopes(alpha: float, seed: int, up: float = 0.0, **more: Any) -> dict[str, Any]:
    settings = {"partition.alpha": alpha, "seed": seed}
    scores = {"local": {"a": 0.7 + up, "b": 0.5 + up}, "federated": 0.8 + up}
    scores |= {"own": {"a": 0.72, "b": 0.6}, "merged_own": {"a": 0.75, "b": 0.55}}
    return {"settings": settings, **scores, **more}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Alpha 10 and 0.1, two seeds each, one of them failed, and a centralized run of each seed; alpha 10 is first."""
    runs = [three_scopes(10.0, 0, 0.1), three_scopes(10.0, 1, 0.14), three_scopes(0.1, 0)]
    runs += [three_scopes(0.1, 1, state="failed"), {"settings": {"partition.alpha": 0.1, "seed": 2}}]
    runs += [{"settings": {"modes": ["central"], "seed": n}, "central": 0.9 + 0.01 * n} for n in (0, 1)]
    return write_sweep(tmp_path / "results" / "alphas", runs)


def test_every_number_of_the_table_by_hand(sweep: Path) -> None:
    table = sweep_table(sweep)
    assert list(table.columns) == ["run", "experiment", "partition.alpha", "seed", "modes", *MODEL_COLUMNS]
    assert table["run"].tolist() == ["run0"] * 3 + ["run1"] * 3 + ["run2"] * 3 + ["run5", "run6"]
    assert table["scope"].tolist() == ["local", "local", "federated"] * 3 + ["central"] * 2
    assert table["client"].tolist() == ["a", "b", None] * 3 + [None] * 2
    assert table["partition.alpha"].tolist()[:9] == [10.0] * 6 + [0.1] * 3
    assert table["partition.alpha"].iloc[9:].isna().all(), "the centralized model stands for every alpha"
    assert table["seed"].tolist() == [0] * 3 + [1] * 3 + [0] * 3 + [0, 1]
    assert set(table["experiment"]) == {"lab"} and set(table["metric"]) == {"accuracy"}
    assert table["rows"].tolist() == [30, 10, 40] * 3 + [40, 40] and set(table["num_clients"]) == {2}
    assert table["js"].tolist() == pytest.approx([0.02, 0.3, NAN] * 3 + [NAN] * 2, nan_ok=True)
    assert set(table["js_mean"]) == {0.09} and set(table["size_gini"]) == {0.25}
    first = table[table["run"] == "run0"].set_index("client")
    a, b, merged = first.loc["a"], first.loc["b"], first.iloc[2]
    assert (a["round"], merged["round"]) == (1, 1), "best and test are of the model of round 1, last and own of round 2"
    assert (a["last"], a["best"], a["own"], a["test"], a["steps"]) == pytest.approx((0.8, 0.81, 0.72, 0.82, 20))
    assert (merged["last"], merged["best"], merged["test"]) == pytest.approx((0.9, 0.91, 0.92))
    assert merged["own"] == pytest.approx(0.65), "the mean over sites of 0.75 and 0.55, at the end"
    assert (a["merged_own"], a["gain_own"], a["gain"]) == pytest.approx((0.75, 0.03, 0.1))
    assert (b["merged_own"], b["gain_own"], b["gain"]) == pytest.approx((0.55, -0.05, 0.3))
    others = table[table["scope"] != "local"]
    assert others[["merged_own", "gain_own", "gain"]].isna().all(axis=None)
    assert table["steps"].tolist()[-2:] == [60, 60] and table["own"].iloc[-2:].isna().all()


def test_a_gain_is_positive_where_the_merged_model_has_the_lower_loss(tmp_path: Path) -> None:
    loss = {"metric": "loss", "local": {"a": 0.9, "b": 0.5}, "federated": 0.6}
    loss |= {"own": {"a": 0.8, "b": 0.4}, "merged_own": {"a": 0.5, "b": 0.5}}
    table = sweep_table(write_sweep(tmp_path / "s", [{"settings": {"seed": 0}, **loss}])).set_index("client")
    assert table.loc[["a", "b"], "gain"].tolist() == pytest.approx([0.3, -0.1])
    assert table.loc[["a", "b"], "gain_own"].tolist() == pytest.approx([0.3, -0.1])
    assert table.loc["a", "best"] == pytest.approx(0.89) and set(table["metric"]) == {"loss"}


def test_sections_are_text_and_keys_left_out_come_from_the_config(tmp_path: Path) -> None:
    adapters = [{"name": "lora", "r": 8}, {"name": "p_tuning", "layers": [1, 2], "bias": True}]
    runs = [{"settings": {"adapter": one, "local.clip": None}, "federated": 0.5} for one in adapters]
    table = sweep_table(write_sweep(tmp_path / "s", runs))
    assert table["adapter"].tolist() == ["lora r=8", "p_tuning layers=[1, 2] bias=true"]
    assert table["local.clip"].tolist() == ["null", "null"] and table["seed"].tolist() == [0, 0]
    default = {"name": "lora", "r": 16, "dropout": 0.0}
    write_run(tmp_path / "s" / "base", federated=0.6, **{"adapter": default, "local.clip": 1.0, "seed": 7})
    listed = json.loads((tmp_path / "s" / "sweep.json").read_text())
    listed["runs"].append({"run": "base", "settings": {}, "state": "finished", "reason": None})
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(listed))
    table = sweep_table(tmp_path / "s")
    assert table["adapter"].tolist()[2] == "lora r=16", "of the section what the sweep names elsewhere"
    assert table["local.clip"].tolist() == ["null", "null", "1"] and table["seed"].tolist() == [0, 0, 7]
    assert swept_keys(table) == ["adapter", "local.clip"]


def test_without_a_list_of_runs_the_configs_tell_what_differs(tmp_path: Path) -> None:
    for n, adapter in enumerate(({"name": "lora", "r": 8}, {"name": "lora", "r": 16}, {"name": "prompt", "size": 4})):
        write_run(tmp_path / "e" / f"r{n}", {"a": 0.5}, 0.6, adapter=adapter, **{"local.lr": 10.0**-n, "seed": 5})
    write_run(tmp_path / "e" / "c", central=0.9, adapter={"name": "lora", "r": 8}, **{"local.lr": 1.0, "seed": 5})
    table = sweep_table(tmp_path / "e").set_index("run")
    assert swept_keys(table.reset_index()) == ["adapter", "local.lr"], "neither modes nor results"
    assert table.loc["r0", "adapter"].tolist() == ["lora r=8"] * 2 and table.loc["c", "adapter"] == "lora r=8"
    assert table.loc["r1", "adapter"].tolist() == ["lora r=16"] * 2
    assert table.loc["r2", "adapter"].tolist() == ["prompt"] * 2, "only one prompt run: its size tells nothing apart"
    assert table["local.lr"].tolist() == [1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert set(table["seed"]) == {5} and list(table.columns)[3:5] == ["seed", "scope"]
    one = sweep_table([tmp_path / "e" / "r0", tmp_path / "e" / "r1"])
    assert one["adapter.r"].tolist() == [8, 8, 16, 16] and one["adapter.r"].dtype == np.int64


def test_copies_of_a_run_stay_apart_and_a_run_in_two_settings_is_one_run(tmp_path: Path) -> None:
    for place in ("here", "there"):
        write_run(tmp_path / place / "same", federated=0.5)
    assert sweep_table(tmp_path)["run"].nunique() == 2
    write_sweep(tmp_path / "s", [{"settings": {"rounds": 2, "seed": 0}, "federated": 0.5}])
    listed = json.loads((tmp_path / "s" / "sweep.json").read_text())
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(listed | {"runs": listed["runs"] * 2}))
    table = sweep_table(tmp_path / "s")
    assert table["run"].tolist() == ["run0"] * 2 and cells(table)["runs"].tolist() == [1]


def test_a_sample_of_virtual_clients(tmp_path: Path) -> None:
    report = {"client_names": ["a"], "sizes": [30], "js": [0.02], "num_clients": 1000, "rows": 20000}
    run = write_run(tmp_path / "r", {"a": 0.5, "z": 0.4}, 0.6, 0.7, report=report | {"sampled_clients": 1})
    table = sweep_table(run).set_index("scope")
    assert table.loc["local", "rows"].tolist() == [30, pd.NA] and np.isnan(table.loc["local", "js"].iloc[1])
    assert table.loc["federated", "rows"] == 20000 and table.loc["central", "rows"] is pd.NA
    assert set(table["num_clients"]) == {1000}
    (run / "partition.json").unlink()
    bare = sweep_table(run)
    assert bare[["rows", "js", "js_mean", "num_clients"]].isna().all(axis=None) and bare["last"].notna().all()


def test_a_missing_mode_leaves_gains_empty(tmp_path: Path) -> None:
    table = sweep_table(write_run(tmp_path / "r", {"a": 0.5, "b": 0.6}, own={"a": 0.4}))
    assert table["scope"].tolist() == ["local", "local"]
    assert table[["gain", "gain_own", "merged_own"]].isna().all(axis=None)
    assert table["own"].tolist() == pytest.approx([0.4, NAN], nan_ok=True)


def test_errors_of_the_table(tmp_path: Path, sweep: Path) -> None:
    with pytest.raises(UserError, match=r"run run0: no metric 'f1' in these rows; recorded: accuracy"):
        sweep_table(sweep, "f1")
    with pytest.raises(UserError, match="no folder"):
        sweep_table(tmp_path / "nowhere")
    write_run(tmp_path / "two" / "x", federated=0.5)
    write_run(tmp_path / "two" / "y", federated=0.5, metric="loss")
    with pytest.raises(UserError, match=r"accuracy in x; loss in y.*metric='accuracy'"):
        sweep_table(tmp_path / "two")
    with pytest.raises(UserError, match="run y: no metric 'accuracy'"):
        sweep_table(tmp_path / "two", "accuracy")
    for run in (tmp_path / "two").iterdir():
        (run / "status.json").write_text('{"state": "running"}')
    with pytest.raises(UserError, match=r"no finished run in .*two' \(2 running\)"):
        sweep_table(tmp_path / "two")
    for run in sweep.glob("run*"):
        (run / "status.json").unlink()
    with pytest.raises(UserError, match=r"6 unknown, 1 never started"):
        sweep_table(sweep)
    for damaged in ("{", "[]", '{"keys": [], "runs": [{}]}', '{"keys": [], "runs": [{"run": "x", "settings": 3}]}'):
        (sweep / "sweep.json").write_text(damaged)
        with pytest.raises(UserError, match=r"sweep.json: (not|holds) .*(again|anew)"):
            sweep_table(sweep)
    with pytest.raises(UserError, match="no columns experiment and scope"):
        swept_keys(pd.DataFrame({"run": [1]}))


def test_cells_by_hand(sweep: Path) -> None:
    out = cells(sweep_table(sweep))
    assert list(out.columns)[:3] == ["partition.alpha", "scope", "runs"]
    assert out["partition.alpha"].tolist() == pytest.approx([0.1, 0.1, 10.0, 10.0, NAN], nan_ok=True)
    assert out["scope"].tolist() == ["local", "federated", "local", "federated", "central"]
    assert out["runs"].tolist() == [1, 1, 2, 2, 2], "sites are no runs, and the failed run is not there"
    assert out["mean"].tolist() == pytest.approx([0.6, 0.8, 0.72, 0.92, 0.905])
    assert out["sd"].tolist() == pytest.approx([NAN, NAN, 0.04 / 2**0.5, 0.04 / 2**0.5, 0.01 / 2**0.5], nan_ok=True)
    assert out["low"].tolist() == pytest.approx([NAN, NAN, 0.70, 0.90, 0.90], nan_ok=True)
    assert out["high"].tolist() == pytest.approx([NAN, NAN, 0.74, 0.94, 0.91], nan_ok=True)
    assert out["js_mean"].tolist() == pytest.approx([0.09] * 5)
    gains = cells(sweep_table(sweep), value="gain_own")
    assert gains["scope"].tolist() == ["local", "local"] and gains["mean"].tolist() == pytest.approx([-0.01, -0.01])
    alike = cells(sweep_table(sweep), by=[])
    assert alike["runs"].tolist() == [3, 3, 2] and alike["mean"].tolist() == pytest.approx([0.68, 0.88, 0.905])
    assert cells(sweep_table(sweep), by=["seed"])["runs"].tolist() == [2, 2, 1, 1, 1, 1]


def of_runs(values: list[float]) -> pd.DataFrame:
    """A table of one federated model a run."""
    fixed = {"experiment": "e", "seed": range(len(values)), "scope": "federated", "js_mean": 0.1, "size_gini": 0.2}
    return pd.DataFrame({"run": [str(n) for n in range(len(values))], **fixed, "last": values})


@pytest.mark.parametrize(
    ("values", "level", "low", "high"),
    [
        ([0.2, 0.6], 0.95, 0.2, 0.6),  # a resample's mean is 0.2, 0.4, 0.4 or 0.6, each with probability 1/4
        ([0.2, 0.6], 0.40, 0.4, 0.4),  # the 30th and the 70th of a hundred
        ([0.0, 0.3, 0.9], 0.95, 0.0, 0.9),  # of 27 resamples one has the mean 0.0: 3.7 %, more than 2.5 % ...
        ([0.0, 0.3, 0.9], 0.90, 0.1, 0.7),  # ... and less than 5 %; next are three of (0 + 0 + 0.3) / 3
    ],
)
def test_the_interval_is_the_percentile_bootstrap(values: list[float], level: float, low: float, high: float) -> None:
    found = cells(of_runs(values), level=level).iloc[0]
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert cells(of_runs(values), level=level, seed=3)["low"].tolist() == pytest.approx([low])


def test_intervals_of_one_run_of_equal_runs_and_of_a_diverged_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cells(of_runs([0.3]))[["low", "high", "sd"]].isna().all(axis=None)
        equal = cells(of_runs([0.1, 0.1, 0.1])).iloc[0]
        infinite = cells(of_runs([0.1, float("inf")])).iloc[0]
        assert cells(of_runs([NAN, 0.2]))["runs"].tolist() == [1], "a run without the value is not counted"
        assert cells(of_runs([NAN])).empty
    assert (equal["low"], equal["high"]) == (0.1, 0.1) and equal["sd"] == pytest.approx(0.0, abs=1e-15)
    assert np.isnan(infinite["low"]) and np.isinf(infinite["mean"])


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.linspace(0.2, 0.9, 7).tolist()
    one, again, other = (cells(of_runs(values), seed=seed).loc[0, ["low", "high"]].tolist() for seed in (0, 0, 1))
    assert one == again and one != other and one == pytest.approx(other, abs=0.02)


def test_text_keys_stand_in_the_order_of_the_table(tmp_path: Path) -> None:
    runs = [{"settings": {"algorithm.name": name}, "federated": 0.5} for name in ("scaffold", "fedavg", "fedprox")]
    out = cells(sweep_table(write_sweep(tmp_path / "s", runs)))
    assert out["algorithm.name"].tolist() == ["scaffold", "fedavg", "fedprox"]


def test_errors_of_cells(sweep: Path) -> None:
    table = sweep_table(sweep)
    with pytest.raises(UserError, match="'local.lr' is no swept key of this table; use some of: partition.alpha"):
        cells(table, by=["local.lr"])
    with pytest.raises(UserError, match="value='loss' is no column of scores; use one of last, best"):
        cells(table, value="loss")
    for level in (0.0, 1.0, 95):
        with pytest.raises(UserError, match="not between 0 and 1"):
            cells(table, level=level)


def test_tables_are_written_whole(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = sweep_table(sweep)
    written = write_tables(sweep)
    assert written == [sweep / name for name in ("table.csv", "table.parquet", "cells.csv")]
    kept, text = pd.read_parquet(written[1]), ["run", "experiment", "modes", "scope", "client", "metric"]
    pd.testing.assert_frame_equal(kept.drop(columns=text), table.drop(columns=text))
    assert kept[text].fillna("").to_numpy().tolist() == table[text].fillna("").to_numpy().tolist()
    read = pd.read_csv(written[0])
    assert list(read.columns) == list(table.columns) and read["last"].tolist() == table["last"].tolist()
    assert read["steps"].tolist() == table["steps"].tolist()
    pd.testing.assert_frame_equal(pd.read_csv(written[2]), cells(table), check_dtype=False)
    before = {file.name: file.read_bytes() for file in sweep.iterdir() if file.is_file()}

    def full(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_tables(sweep)
    assert {file.name: file.read_bytes() for file in sweep.iterdir() if file.is_file()} == before
    assert [run.name for run in sweep.iterdir() if run.is_dir()], "run folders are left alone"


# ------------------------------------------------------------------------------------------- lists and printed tables


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    runs = {
        "a": (1e-5, {"name": "lora", "r": 8}, 0.5),
        "b": (2e-5, {"name": "ia3"}, 0.9),
        "c": (2e-5, {"name": "ia3"}, 0.7),
    }
    for n, (name, (lr, adapter, score)) in enumerate(runs.items()):
        write_run(
            tmp_path / "e" / name,
            federated=score,
            adapter=adapter,
            seed=n,
            **{"local.lr": lr, "local.clip": None, "local.alpha": 1},
        )
    return tmp_path


@fast_only(0, 2, 3, 4, 9, 11, 13, 14)
@pytest.mark.parametrize(
    ("where", "sort", "found"),
    [
        ([], None, "abc"),
        (["local.lr=1e-5"], None, "a"),
        (["lr=0.00002"], "seed", "bc"),
        (["lr>1e-5", "seed<=1"], None, "b"),
        (["adapter=ia3"], "-seed", "cb"),
        (["adapter!=ia3"], None, "a"),
        (["adapter.r=8"], None, "a"),
        (["r>4"], None, "a"),
        (["clip=null", "state=finished"], None, "abc"),
        (["best_federated >= 0.72"], None, "b"),
        ([], "accuracy", "bca"),
        ([], "-accuracy", "acb"),
        ([], "best_federated", "bca"),
        ([], "adapter", "bca"),
        (["seed>7"], None, ""),
    ],
)
def test_list_filters_and_sorts(listed: Path, where: list[str], sort: str | None, found: str) -> None:
    table = list_table(listed, where, sort)
    assert "".join(table["run"]) == found
    assert {"local.lr", "adapter", "seed"} <= set(table) and "local.clip" not in table, "only what varies"


@pytest.mark.parametrize(
    ("where", "sort", "why"),
    [
        (["learning"], None, "'learning' is not a condition; write KEY=VALUE"),
        (["lrr=1"], None, "no run has 'lrr'; did you mean lr?"),
        (["lr<high"], None, "'high' is not a number"),
        (["alpha=1"], None, "may be local.alpha or partition.alpha; give the whole key"),
        ([], "f1", "--sort: no run has 'f1'"),
    ],
)
def test_a_list_that_cannot_be_is_one_line(listed: Path, where: list[str], sort: str | None, why: str) -> None:
    with pytest.raises(UserError, match=why):
        list_table(listed, where, sort)


def test_list_on_the_command_line(listed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert main(["list", str(listed), "--where", "adapter=ia3", "--sort", "accuracy", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [(one["run"], one["local.lr"], one["adapter"], one["best_local"]) for one in records] == [
        ("b", 2e-5, {"name": "ia3"}, None),
        ("c", 2e-5, {"name": "ia3"}, None),
    ]
    assert main(["list", str(listed)]) == 0
    out = capsys.readouterr().out
    assert "1e-05" in out and "2e-05" in out and "lora" in out and "3 run(s)" in out
    (listed / "none").mkdir()
    monkeypatch.chdir(listed / "none")
    for argv, said in (([], "no runs in results\n"), (["."], "no runs in .\n"), ([".", "--json"], "[]\n")):
        assert main(["list", *argv]) == 0 and capsys.readouterr().out == said
    assert main(["list", "mistyped"]) == 2 and "no folder 'mistyped'" in capsys.readouterr().err


def test_printed_values_that_differ_look_different() -> None:
    rates = [1e-5, 2e-5, 0.1, 0.30000000000000004, 0.3, 1234567.0, 1234568.0, 10.0]
    text = text_table(pd.DataFrame({"lr": rates, "loss": [0.00002, 0.5, 0.0, NAN, -2e-7, 1e9, 12.0, 1.0]}), ["lr"])
    shown = [line.split() for line in text.splitlines()[2:]]
    assert [float(lr) for lr, _ in shown] == rates
    assert [loss for _, loss in shown] == ["2e-05", "0.5000", "0.0000", "-", "-2e-07", "1e+09", "12.0000", "1.0000"]


def test_console_cells_of_a_sweep_tell_small_rates_apart(tmp_path: Path) -> None:
    runs = [{"settings": {"local.lr": lr, "seed": s}, "federated": 0.5} for lr in (1e-5, 2e-5) for s in (0, 1)]
    table = sweep_table(write_sweep(tmp_path / "s", runs))
    lines = text_table(cells(table), swept_keys(table)).splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["1e-05", "2e-05"]


def test_one_table_as_text_and_as_markdown() -> None:
    table = Table(["model", "a|b"], [["local\x1b", "0.5"], ["<i>x_y</i> _z_", "12.0"]], numbers={1}, strong={(1, 1)})
    assert table.text().splitlines() == [
        "model            a|b",
        "--------------  ----",
        "local\\x1b        0.5",
        "<i>x_y</i> _z_  12.0",
    ]
    assert table.markdown().splitlines() == [
        r"| model | a\|b |",
        "| --- | ---: |",
        "| local\N{REPLACEMENT CHARACTER} | 0.5 |",
        r"| \<i\>x_y\</i\> \_z\_ | **12.0** |",
    ]
