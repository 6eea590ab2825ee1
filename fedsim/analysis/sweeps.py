"""The tables of a sweep: a row for each model of every run, and each cell's mean with its bootstrap interval.

A sweep is a folder of run folders with `sweep.json` beside them, which says what was changed in which run. Any other run
folders will do as well: what was changed is then read from their configs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.analysis import load
from fedsim.analysis.configs import MISSING, differences, is_number, say
from fedsim.analysis.load import SCOPES, PathLike
from fedsim.analysis.scores import central_budget, model_scores
from fedsim.core.errors import UserError
from fedsim.core.files import check_own, read_json, write_atomic
from fedsim.core.seeding import stream

VALUES = ("last", "best", "own", "test", "merged_own", "gain_own", "gain")
_TYPES = {
    **{"scope": "object", "client": "object", "rows": "Int64", "js": "float64", "js_mean": "float64"},
    **{"size_gini": "float64", "num_clients": "Int64", "metric": "object", "last": "float64", "best": "float64"},
    **{"round": "Int64", "own": "float64", "test": "float64", "steps": "Int64"},
    **dict.fromkeys(("merged_own", "gain_own", "gain"), "float64"),
}
MODEL_COLUMNS = tuple(_TYPES)
RESAMPLES = 10_000


def sweep_table(path: PathLike | Iterable[PathLike], metric: str | None = None) -> pd.DataFrame:
    """The tidy table of a sweep: a row for each model (local, global, centralized) of every finished run.

    Args:
        path: the sweep's folder; or run folders, an experiment's folder, the results root, or several of these.
        metric: "accuracy", "loss" or any other recorded name; None = the runs' own `best.metric`.

    Returns:
        These columns, in this order:

        - `run`, `experiment`, and a column for each swept key of `sweep.json`: its value in the run's settings, else in its
          config; missing (NaN or None) for a run of nothing but the centralized model, which stands for all values.
          Without `sweep.json`: every config key in which the runs differ, but `modes` and what no result depends on; one
          column for a section whose `name` differs. Sections are text (`lora r=8`). `seed` is always there.
        - `scope` (local, federated, central), `client` (of a local model), `rows` (training examples of the client, or all;
          NA for a centralized model beside virtual clients, whose draws it does not hold), `js` (Jensen-Shannon
          divergence of the client's labels from those of all, bits), and of the run's partition `js_mean` (bits,
          weighted by examples), `size_gini` and `num_clients`. NaN where the partition report has no such client.
        - `metric`, `last` and `best` (shared validation examples: the model of the last round, and the one that validation
          chose, after `round`), `own` (a client's own validation examples; of the global model the mean over clients),
          `test` (the chosen model), `steps` (optimizer steps).
        - of local models `merged_own` (the global model on that client's own examples), `gain_own` = `merged_own` - `own`,
          and `gain` = the global model's `last` - the client's; both turned so that positive means the global model is
          better, whichever way the metric goes.

    Raises:
        UserError: a missing path, no run or no finished run in it, a damaged file, runs with different `best.metric`
            while `metric` is None, or a run that did not record the metric.
    """
    keys, members = members_of(path)
    folders, given = [folder for folder, _ in members], [settings for _, settings in members]
    configs, labels = [load.read_config(folder) for folder in folders], load.run_labels(folders)
    metric = metric or _common_metric(configs, labels)
    found = [_models(folder, label, metric) for folder, label in zip(folders, labels, strict=True)]
    if keys is None:
        settings = differences(configs)
    else:
        central = [set(models["scope"]) <= {"central"} for models in found]
        settings = {key: [_setting(key, n, given, configs, central[n]) for n in range(len(given))] for key in keys}
    settings.setdefault("seed", [config.get("seed", MISSING) for config in configs])
    names = [load.experiment_name(config, folder) for config, folder in zip(configs, folders, strict=True)]
    about = pd.DataFrame({"run": labels, "experiment": names}, dtype=object)
    about = about.assign(**{key: _column(values) for key, values in settings.items()})
    models = pd.concat(found, keys=range(len(found)), names=["number", None]).reset_index("number")
    models = models.reindex(columns=["number", *MODEL_COLUMNS]).astype(_TYPES)
    out = about.take(models.pop("number").to_numpy()).reset_index(drop=True).join(models.reset_index(drop=True))
    central = [n for n, one in enumerate(found) if (one["scope"] == "central").any()]
    out.attrs["central_budget"] = central_budget((configs[n].get("central") or {}).get("match") for n in central)
    return out


def members_of(path: PathLike | Iterable[PathLike]) -> tuple[list[str] | None, list[tuple[Path, dict[str, Any]]]]:
    """The swept keys, None without `sweep.json`, and of each finished run its folder and settings."""
    one = isinstance(path, (str, os.PathLike))
    if one and (Path(path) / "sweep.json").is_file():
        file = Path(path) / "sweep.json"
        try:
            sweep = read_json(file)
            keys = [str(key) for key in sweep["keys"]]
            listed = [(run["run"], dict(run["settings"])) for run in sweep["runs"]]
        except (KeyError, TypeError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"{file}: not a sweep's list of runs ({why}); run the sweep again to write it anew"
            ) from None
        members = [(Path(path) / str(run), settings) for run, settings in listed if run is not None]
    else:
        keys, members = None, [(folder, {}) for folder in load.find_runs(path)]
        listed = members
    states = [load.read_state(folder) for folder, _ in members]
    finished = [member for member, state in zip(members, states, strict=True) if state == "finished"]
    if not finished:
        states += ["never started"] * (len(listed) - len(members))
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none is listed"
        where = repr(str(path)) if one else "the folders given"
        raise UserError(f"no finished run in {where} ({counts}); run it to its end first")
    return keys, finished


def _common_metric(configs: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    found: dict[str, list[str]] = {}
    for config, label in zip(configs, labels, strict=True):
        found.setdefault(str((config.get("best") or {}).get("metric") or "accuracy"), []).append(label)
    if len(found) > 1:
        said = "; ".join(f"{m} in {', '.join(runs[:3])}{' ...' * (len(runs) > 3)}" for m, runs in found.items())
        raise UserError(f"the runs' best.metric differ ({said}); name one with metric={next(iter(found))!r}")
    return next(iter(found))


def _models(folder: Path, label: str, metric: str) -> pd.DataFrame:
    """The rows of one run, without what its settings say."""
    df = load.load_runs(folder)
    try:
        load.require_metric(df, metric)
    except UserError as error:
        raise UserError(f"run {label}: {error}") from None
    models = model_scores(df, metric)
    report = load.load_partition(folder) if (folder / "partition.json").is_file() else {}
    for key in ("js_mean", "size_gini", "num_clients"):
        models[key] = report.get(key)
    names = report.get("client_names") or []
    sizes, js = (dict(zip(names, report.get(key) or [], strict=False)) for key in ("sizes", "js"))
    merged = df[(df["scope"] == "federated") & (df["split"] == "site") & (df["name"] == f"merged_{metric}")]
    last = models.set_index("scope")["last"].get("federated", np.nan)
    local = models["scope"] == "local"
    # Virtual clients draw with repetition: their examples together are not those of the centralized model.
    virtual = (models["scope"] == "central") & ("sampled_clients" in report)
    every = report.get("rows", sum(sizes.values()) if sizes else np.nan)
    models["rows"] = models["client"].map(sizes).astype(float).where(local, every).mask(virtual)
    models["js"] = models["client"].map(js).where(local)
    models["merged_own"] = models["client"].map(merged.groupby("client")["value"].last()).where(local)
    sign = 1.0 if load.mode_of(df, metric) == "max" else -1.0
    gain_own, gain = sign * (models["merged_own"] - models["own"]), sign * (last - models["last"])
    return models.assign(metric=metric, gain_own=gain_own, gain=gain.where(local))


def _setting(
    key: str, number: int, given: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]], central: bool
) -> Any:
    """A run's value of a swept key: from its settings, else from its config (see `sweep_table`)."""
    if key in given[number]:
        return given[number][key]
    if central and key != "seed":
        return MISSING
    value: Any = configs[number]
    for part in key.split("."):
        value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    if isinstance(value, dict):  # of a whole section what the other runs name of it
        named = {part for one in given if isinstance(one.get(key), dict) for part in one[key]} | {"name"}
        return {part: kept for part, kept in value.items() if part in named}
    return value


def _column(values: Sequence[Any]) -> pd.Series:
    """One value per run: numbers as numbers where all are, else text; missing ones NaN, NA or None."""
    given = [value for value in values if value is not MISSING]
    if not given or not all(map(is_number, given)):
        return pd.Series([None if value is MISSING else say(value) for value in values], dtype=object)
    whole = all(isinstance(value, int) for value in given)
    dtype = "float64" if not whole else "int64" if len(given) == len(values) else "Int64"
    return pd.Series([None if value is MISSING else value for value in values], dtype=dtype)


def swept_keys(table: pd.DataFrame) -> list[str]:
    """The columns of a `sweep_table` that tell its settings apart: swept keys, less `seed` and `modes`."""
    columns = list(table.columns)
    if not {"experiment", "scope"} <= set(columns):
        raise UserError("the table has no columns experiment and scope; give what sweep_table(path) returns")
    between = columns[columns.index("experiment") + 1 : columns.index("scope")]
    return [key for key in between if key not in ("seed", "modes")]


def cells(
    table: pd.DataFrame, by: Sequence[str] | None = None, value: str = "last", level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean and bootstrap interval of each cell: the runs of one setting, scope by scope.

    Of local models the mean over the clients of each run is taken first (unweighted). The interval is the percentile
    bootstrap over runs: it covers what differs between the runs of a cell, as a rule the seeds, but neither the choice of
    the validation examples, which all runs share, nor the spread of clients within a run. With 3 to 5 runs it is too
    narrow: its bounds lie between the lowest and the highest run.

    Args:
        table: from `sweep_table`.
        by: the columns that make a cell; None = the swept keys less `seed` and `modes`.
        value: a column with scores: "last", "best", "own", "test", "merged_own", "gain_own" or "gain".
        level: confidence level of the interval, between 0 and 1.
        seed: seed of the 10,000 resamples, drawn anew for each cell.

    Returns:
        `by`, `scope`, `runs` (those that have the value), `mean`, `low`, `high` (NaN with fewer than 2 runs), `sd`
        (over runs, divided by n - 1; NaN likewise), and the means over runs of `js_mean` and `size_gini`. Sorted by
        `by`: numbers by size, all else in the order of the table. A cell in which no run has the value has no row.

    Raises:
        UserError: `by` or `value` is no such column, or `level` is out of range.
    """
    by = swept_keys(table) if by is None else list(by)
    for key in by:
        if key not in table or key in ("run", *MODEL_COLUMNS):
            raise UserError(f"by: {key!r} is no swept key of this table; use some of: {', '.join(swept_keys(table))}")
    if value not in VALUES or value not in table:
        raise UserError(f"value={value!r} is no column of scores; use one of {', '.join(VALUES)}")
    if not 0.0 < level < 1.0:
        raise UserError(f"level={level!r} is not between 0 and 1; 0.95 is usual")
    known = table[table[value].notna()]
    runs = known.groupby([*by, "scope", "run"], dropna=False, sort=False)[[value, "js_mean", "size_gini"]].mean()
    rows = []
    for found, cell in runs.groupby([*by, "scope"], dropna=False, sort=False):
        values = cell[value].to_numpy(float)
        finite = len(values) > 1 and np.isfinite(values).all()
        low, high = _interval(values, level, seed) if finite else (np.nan, np.nan)
        line = [len(cell), values.mean(), low, high, values.std(ddof=1) if finite else np.nan]
        rows.append([*found, *line, cell["js_mean"].mean(), cell["size_gini"].mean()])
    columns = [*by, "scope", "runs", "mean", "low", "high", "sd", "js_mean", "size_gini"]
    out = pd.DataFrame(rows, columns=columns)
    order = {}
    for key in by:
        out[key] = out[key].astype(object).where(out[key].notna(), None).astype(table[key].dtype)
        numeric, places = pd.api.types.is_numeric_dtype(table[key]), list(table[key].dropna().unique())
        order[key] = (out[key] if numeric else out[key].map(places.index, na_action="ignore")).astype(float)
    order["scope"] = out["scope"].map(SCOPES.index)
    return out.loc[pd.DataFrame(order).sort_values(list(order), kind="stable").index].reset_index(drop=True)


def _interval(values: np.ndarray, level: float, seed: int) -> tuple[float, float]:
    if (values == values[0]).all():  # the mean of equal numbers may differ from them in the last bit
        return float(values[0]), float(values[0])
    from scipy.stats import bootstrap  # half a second to import

    rng, how = stream(seed, "bootstrap"), {"n_resamples": RESAMPLES, "method": "percentile"}
    found = bootstrap((values,), np.mean, confidence_level=level, random_state=rng, **how).confidence_interval
    return float(found.low), float(found.high)


def write_tables(path: PathLike, metric: str | None = None) -> list[Path]:
    """Write `table.csv`, `table.parquet` (both `sweep_table`) and `cells.csv` (`cells`) into the sweep's folder.

    A reader never sees a part of a file.

    Args:
        path: the sweep's folder.
        metric: as in `sweep_table`.

    Returns:
        The files written.

    Raises:
        UserError: as `sweep_table`.
    """
    table = sweep_table(path, metric)
    files = {
        "table.csv": table.to_csv(index=False).encode(),
        "table.parquet": table.to_parquet(index=False),
        "cells.csv": cells(table).to_csv(index=False).encode(),
    }
    check_own(Path(path), names=files)
    for name, data in files.items():
        write_atomic(Path(path) / name, data)
    return [Path(path) / name for name in files]
