"""Tables of runs: of a sweep a row for each model, and for each cell with its bootstrap interval; runs by what varies.

A sweep is a folder of run folders with `sweep.json` beside them, which says what was changed in which run. Any other run
folders will do as well: what was changed is then read from their configs. No torch is needed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.analysis.configs import MISSING, as_number, differences, flatten_config, is_number, say
from fedsim.analysis.load import (
    SCOPES,
    PathLike,
    central_budget,
    experiment_name,
    find_runs,
    list_runs,
    load_partition,
    load_runs,
    metric_mode,
    mode_of,
    model_scores,
    read_config,
    read_state,
    require_metric,
)
from fedsim.core.errors import UserError
from fedsim.core.files import check_own, read_json, write_atomic
from fedsim.core.seeding import stream

VALUES = ("last", "best", "own", "test", "merged_own", "gain_own", "gain")
MODEL_COLUMNS = (
    *("scope", "client", "rows", "js", "js_mean", "size_gini", "num_clients"),
    *("metric", "last", "best", "round", "own", "test", "steps", "merged_own", "gain_own", "gain"),
)
RESAMPLES = 10_000


def sweep_table(path: PathLike | Iterable[PathLike], metric: str | None = None) -> pd.DataFrame:
    """The tidy table of a sweep: one row for each model of every finished run.

    A model is a site alone (`scope` local, `client` its id), the merged model (federated) or the centralised one
    (central). Runs that are not finished by their `status.json` are left out.

    Args:
        path: the sweep's folder; or run folders, an experiment's folder, the results root, or several of these.
        metric: "accuracy", "loss" or any other recorded name; None = the runs' own `best.metric`.

    Returns:
        These columns, in this order:

        - `run`, `experiment`, and a column for each swept key. They are those of `sweep.json`; a key that a run's
          settings leave out has the value of its config, but is missing (NaN or None) for a run of nothing but the
          centralised model, which stands for all values of that key. Without `sweep.json`, every config key in which
          the runs differ, but `modes` and what no result depends on; where a section's `name` differs, the section is
          one column. Sections are text (`lora r=8`), numbers numbers. `seed` is always there.
        - `scope`, `client`, `rows` (training rows of the site; all of them for the other models. NA for a centralised
          model beside virtual clients, which does not hold what they draw), `js` (divergence of the site's labels from
          those of all, Jensen-Shannon, bits), and of the run's partition `js_mean` (bits, weighted by rows),
          `size_gini` and `num_clients`. NaN where the partition report has no such site, as most virtual clients.
        - `metric`, `last` and `best` (shared validation rows: the model of the last round, and the one that validation chose,
          after `round`), `own`
          (a site's own validation rows; of the merged model the mean over sites), `test` (the chosen model), `steps` (optimiser steps).
        - for local models also `merged_own` (the merged model of the same run on that site's own rows), `gain_own` =
          `merged_own` - `own`, and `gain` = the merged model's `last` - the site's. Both gains are turned so that a
          positive one means that the merged model is better, whichever way the metric goes.

    Raises:
        UserError: a missing path, no run or no finished run in it, a damaged file, runs with different `best.metric`
            while `metric` is None, or a run that did not record the metric.
    """
    keys, members = _members(path)
    folders = [folder for folder, _ in members]
    configs = [read_config(folder) for folder in folders]
    ids = [folder.resolve().name for folder in folders]
    places = {folder.resolve() for folder in folders}
    several = {run for run in ids if sum(place.name == run for place in places) > 1}
    labels = [str(folder) if run in several else run for run, folder in zip(ids, folders, strict=True)]
    metric = metric or _common_metric(configs, labels)
    models: list[dict[str, Any]] = []
    of: list[int] = []  # which run a model belongs to
    for number, (folder, label) in enumerate(zip(folders, labels, strict=True)):
        found = _models(folder, label, metric)
        models += found
        of += [number] * len(found)
    if keys is None:
        settings = differences(configs)
    else:
        of_sites = {number for number, model in zip(of, models, strict=True) if model["scope"] != "central"}
        given = [chosen or {} for _, chosen in members]
        settings = {key: [_setting(key, n, given, configs, n in of_sites) for n in range(len(given))] for key in keys}
    if "seed" not in settings:
        settings["seed"] = [config.get("seed", MISSING) for config in configs]
    columns: dict[str, pd.Series] = {"run": pd.Series(labels, dtype=object)}
    columns["experiment"] = pd.Series(
        [experiment_name(c, f) for c, f in zip(configs, folders, strict=True)], dtype=object
    )
    columns |= {key: _column(values) for key, values in settings.items()}
    table = {key: column.take(of).reset_index(drop=True) for key, column in columns.items()}
    for key in MODEL_COLUMNS:
        dtype = {"scope": object, "client": object, "metric": object}.get(key, "float64")
        dtype = "Int64" if key in ("rows", "num_clients", "round", "steps") else dtype
        table[key] = pd.Series(
            [model.get(key, np.nan if dtype == "float64" else None) for model in models], dtype=dtype
        )
    out = pd.DataFrame(table)
    matches = [(configs[n].get("central") or {}).get("match") for n in dict.fromkeys(of)]
    central = {n for n, model in zip(of, models, strict=True) if model["scope"] == "central"}
    out.attrs["central_budget"] = central_budget(
        m for n, m in zip(dict.fromkeys(of), matches, strict=True) if n in central
    )
    return out


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

    Of local models first the mean over the sites of each run is taken (unweighted), then all goes by runs. The interval
    is the percentile bootstrap over runs. So it covers what differs from run to run in a cell, as a rule the seeds: the
    draw of the partition, the initial values, the order of the rows. It does not cover the choice of the validation
    rows, which all runs share, nor the spread of sites within a run; and with 3 to 5 runs it is too narrow: its bounds
    can be no further out than the lowest and the highest run.

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
        low, high = _interval(values, level, seed)
        line = dict(zip([*by, "scope"], found, strict=True)) | {"runs": len(cell), "mean": float(values.mean())}
        spread = len(cell) > 1 and np.isfinite(values).all()
        line |= {"low": low, "high": high, "sd": float(values.std(ddof=1)) if spread else np.nan}
        rows.append(line | {key: float(cell[key].mean()) for key in ("js_mean", "size_gini")})
    columns = [*by, "scope", "runs", "mean", "low", "high", "sd", "js_mean", "size_gini"]
    out = pd.DataFrame(rows, columns=columns)
    for key in by:
        missing = out[key].isna()
        out[key] = out[key].astype(object).where(~missing, None).astype(table[key].dtype)
    order = [_rank(out[key], table[key]) for key in by] + [out["scope"].map(SCOPES.index)]
    at = pd.concat(order, axis=1, keys=range(len(order))).sort_values(list(range(len(order))), kind="stable").index
    return out.loc[at].reset_index(drop=True)


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


def list_table(path: PathLike | Iterable[PathLike], where: Sequence[str] = (), sort: str | None = None) -> pd.DataFrame:
    """`list_runs` with a column for each config key that varies within an experiment, filtered and sorted.

    Args:
        path: as in `list_runs`.
        where: conditions `KEY=VALUE`, all of which hold; also with `!=`, `<`, `<=`, `>` and `>=`. A key is a column of
            the table, a config key, or the end of one config key (`lr` for `local.lr`).
        sort: a key as in `where`, ascending, or a recorded metric: then the global model's last validation value
            (else the centralized model's, else the mean of local ones) is a column, and the best run comes first.
            A `-` before it turns the order.

    Raises:
        UserError: as `list_runs`, an unknown key, or a condition that cannot be read.
    """
    frame = list_runs(path)
    configs = [read_config(Path(folder)) for folder in frame["path"]]
    varied: dict[str, list[Any]] = {}
    for places in frame.groupby("experiment", sort=False).indices.values():
        for key, values in differences([configs[place] for place in places]).items():
            if key not in frame and len({say(value) for value in values if value is not MISSING}) > 1:
                column = varied.setdefault(key, [None] * len(frame))
                for place, value in zip(places, values, strict=True):
                    column[place] = None if value is MISSING else value
    at = list(frame.columns).index("metric")
    for key, values in reversed(varied.items()):
        frame.insert(at, key, pd.Series(values, dtype=object))
    frame.attrs["exact"] = list(varied)
    flat = [flatten_config(config) for config in configs]
    kept = np.ones(len(frame), dtype=bool)
    for condition in where:
        found = re.fullmatch(r"([^=<>!]+)(==|!=|<=|>=|=|<|>)(.*)", condition, re.DOTALL)
        if found is None:
            raise UserError(f"--where: {condition!r} is not a condition; write KEY=VALUE, or with != < <= > >=")
        key, sign, text = (part.strip() for part in found.groups())
        kept &= [_holds(value, sign, text, condition) for value in _values_of(key, frame, flat, "--where")]
    if sort is not None:
        key, backwards = sort.removeprefix("-"), sort.startswith("-")
        try:
            values = _values_of(key, frame, flat, "--sort")
            best_first = key.startswith("best_") and set(map(metric_mode, frame["metric"])) == {"max"}
        except UserError:
            values = [_last_value(Path(folder), key) for folder in frame["path"]]
            if all(value is None for value in values):
                raise
            frame.insert(list(frame.columns).index("path"), key, pd.Series(values, dtype="float64"))
            best_first = metric_mode(key) == "max"
        order = sorted(range(len(frame)), key=lambda n: _order(values[n]), reverse=best_first != backwards)
        order.sort(key=lambda n: values[n] is None or values[n] != values[n])  # runs without a value come last
        frame, kept = frame.iloc[order], kept[order]
    return frame[kept].reset_index(drop=True)


def _values_of(key: str, frame: pd.DataFrame, flat: Sequence[Mapping[str, Any]], option: str) -> list[Any]:
    """Each run's value of a column or a config key; None where it has none."""
    if key in frame:
        return frame[key].tolist()
    known = dict.fromkeys(name for one in flat for name in one)
    ends = [name for name in known if name in (key, f"{key}.name")] or [n for n in known if n.endswith(f".{key}")]
    if len(ends) > 1:
        raise UserError(f"{option}: {key!r} may be {' or '.join(ends)}; give the whole key")
    if not ends:
        short = [name.rpartition(".")[2] for name in known]
        near = difflib.get_close_matches(key, [*frame.columns, *known, *short], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{option}: no run has {key!r}; {hint}use a config key, or one of {', '.join(frame.columns)}")
    return [one.get(ends[0]) for one in flat]


def _holds(value: Any, sign: str, text: str, condition: str) -> bool:
    wanted = as_number(text)
    if sign in ("=", "==", "!="):
        same = value == wanted if is_number(value) and wanted is not None else say(value) == text
        if isinstance(value, Mapping):  # of a section its name
            same = same or value.get("name") == text
        return same == (sign != "!=")
    if wanted is None:
        raise UserError(f"--where: {condition!r}: {text!r} is not a number, and {sign} compares numbers")
    if not is_number(value):
        return False
    return {"<": value < wanted, "<=": value <= wanted, ">": value > wanted, ">=": value >= wanted}[sign]


def _order(value: Any) -> tuple[bool, float, str]:
    return (False, float(value), "") if is_number(value) else (True, 0.0, say(value))


def _last_value(folder: Path, metric: str) -> float | None:
    df = load_runs(folder)
    if not (df["name"] == metric).any():
        return None
    models = pd.DataFrame(model_scores(df, metric)).groupby("scope")["last"].mean()
    return next((float(models[scope]) for scope in ("federated", "central", "local") if scope in models), None)


def _members(path: PathLike | Iterable[PathLike]) -> tuple[list[str] | None, list[tuple[Path, dict[str, Any] | None]]]:
    """The swept keys, and of each finished run its folder and settings; keys and settings None without `sweep.json`."""
    if isinstance(path, (str, os.PathLike)) and (Path(path) / "sweep.json").is_file():
        keys, listed = _read_sweep(Path(path) / "sweep.json")
        members = [(Path(path) / str(run), settings) for run, settings in listed if run is not None]
        states = [read_state(folder) for folder, _ in members] + ["never started"] * (len(listed) - len(members))
        members = [one for one, state in zip(members, states, strict=False) if state == "finished"]
    else:
        keys, found = None, find_runs(path)
        states = [read_state(folder) for folder in found]
        members = [(folder, None) for folder, state in zip(found, states, strict=True) if state == "finished"]
    if not members:
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none is listed"
        where = repr(str(path)) if isinstance(path, (str, os.PathLike)) else "the folders given"
        raise UserError(f"no finished run in {where} ({counts}); run it to its end first")
    return keys, members


def _read_sweep(file: Path) -> tuple[list[str], list[tuple[str | None, dict[str, Any]]]]:
    try:
        sweep = read_json(file)
        return [str(key) for key in sweep["keys"]], [(run["run"], dict(run["settings"])) for run in sweep["runs"]]
    except (KeyError, TypeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{file}: not a sweep's list of runs ({why}); run the sweep again to write it anew") from None


def _common_metric(configs: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    found: dict[str, list[str]] = {}
    for config, label in zip(configs, labels, strict=True):
        found.setdefault(str((config.get("best") or {}).get("metric") or "accuracy"), []).append(label)
    if len(found) > 1:
        said = "; ".join(f"{m} in {', '.join(runs[:3])}{' ...' * (len(runs) > 3)}" for m, runs in found.items())
        raise UserError(f"the runs' best.metric differ ({said}); name one with metric={next(iter(found))!r}")
    return next(iter(found))


def _models(folder: Path, label: str, metric: str) -> list[dict[str, Any]]:
    """The rows of one run, without what its settings say."""
    df = load_runs(folder)
    try:
        require_metric(df, metric)
    except UserError as error:
        raise UserError(f"run {label}: {error}") from None
    models = model_scores(df, metric)
    report = load_partition(folder) if (folder / "partition.json").is_file() else {}
    names = report.get("client_names") or []
    sizes = dict(zip(names, report.get("sizes") or [], strict=False))
    js = dict(zip(names, report.get("js") or [], strict=False))
    about = {key: report.get(key) for key in ("js_mean", "size_gini", "num_clients")} | {"metric": metric}
    sign = 1.0 if mode_of(df, metric) == "max" else -1.0
    merged = df[(df["scope"] == "federated") & (df["split"] == "site") & (df["name"] == f"merged_{metric}")]
    merged_own = merged.groupby("client")["value"].last()
    federated = next((model["last"] for model in models if model["scope"] == "federated"), float("nan"))
    for model in models:
        client = model["client"]
        model |= about
        if model["scope"] != "local":
            # Virtual clients draw with repetition: their rows together are not those of the centralised model.
            virtual = model["scope"] == "central" and "sampled_clients" in report
            model["rows"] = None if virtual else report.get("rows", sum(sizes.values()) if sizes else None)
            continue
        model |= {"rows": sizes.get(client), "js": js.get(client), "merged_own": merged_own.get(client, float("nan"))}
        model["gain_own"] = sign * (model["merged_own"] - model["own"])
        model["gain"] = sign * (federated - model["last"])
    return models


def _setting(
    key: str, number: int, given: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]], of_sites: bool
) -> Any:
    """A run's value of a swept key: from its settings, else from its config (see `sweep_table`)."""
    if key in given[number]:
        return given[number][key]
    if not of_sites and key != "seed":
        return MISSING
    value: Any = configs[number]
    for part in key.split("."):
        value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    if isinstance(value, dict):  # of a whole section what the other runs name of it
        named = {part for one in given if isinstance(one.get(key), dict) for part in one[key]} | {"name"}
        return {part: kept for part, kept in value.items() if part in named}
    return value


def _column(values: Sequence[Any]) -> pd.Series:
    """One value a run: numbers as numbers where all are, else text; missing ones NaN, NA or None."""
    given = [value for value in values if value is not MISSING]
    missing = len(given) < len(values)
    if given and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in given):
        if all(isinstance(value, int) for value in given):
            return pd.Series(
                [None if value is MISSING else value for value in values], dtype="Int64" if missing else "int64"
            )
        return pd.Series([np.nan if value is MISSING else float(value) for value in values], dtype="float64")
    return pd.Series([None if value is MISSING else say(value) for value in values], dtype=object)


def _interval(values: np.ndarray, level: float, seed: int) -> tuple[float, float]:
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan"), float("nan")
    if (values == values[0]).all():  # the mean of equal numbers may differ from them in the last bit
        return float(values[0]), float(values[0])
    from scipy.stats import bootstrap  # half a second to import

    rng = stream(seed, "bootstrap")
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=level, method="percentile", random_state=rng
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _rank(column: pd.Series, of: pd.Series) -> pd.Series:
    """What to sort a key by: numbers themselves, text in the order in which the table has it; missing ones last."""
    if pd.api.types.is_numeric_dtype(of):
        return column.astype(float)
    places = {value: place for place, value in enumerate(of.dropna().unique())}
    return column.map(places).astype(float)
