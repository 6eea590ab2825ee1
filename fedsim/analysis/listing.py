"""The runs below a folder as a table: what ran, how far it is, how good it was; filtered and sorted."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.analysis import load
from fedsim.analysis.configs import MISSING, as_number, differences, flatten_config, is_number, say
from fedsim.analysis.load import SCOPES, PathLike
from fedsim.analysis.scores import model_scores
from fedsim.core.errors import UserError

_SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def list_runs(path: PathLike | Iterable[PathLike]) -> pd.DataFrame:
    """One row per run at or below `path`.

    Returns:
        Columns `experiment`, `run`, `state` (from status.json, else "unknown"), `modes`, `rounds_done` (by the mode
        that is furthest behind), `rounds` (planned), `metric` (the run's `best.metric`), `best_local` (mean over clients
        of each client's best), `best_federated`, `best_central` (validation, NaN where there is none), `path`.

    Raises:
        UserError: as `load_runs`.
    """
    rows = []
    for folder in load.find_runs(path):
        config, df = load.read_config(folder), load.read_metrics(folder)
        best = config.get("best") or {}
        metric = str(best.get("metric") or "accuracy")
        df = df.assign(**{"best.metric": metric, "best.mode": str(best.get("mode") or load.metric_mode(metric))})
        models = model_scores(df, metric)
        bests = {f"best_{scope}": float(models.loc[models["scope"] == scope, "best"].mean()) for scope in SCOPES}
        modes = list(config.get("modes") or [scope for scope in SCOPES if (df["scope"] == scope).any()])
        done = [load.rows_of(df, scope)["round"].max() for scope in modes if scope in SCOPES]
        rows.append(
            {
                "experiment": load.experiment_name(config, folder),
                "run": folder.resolve().name,
                "state": load.read_state(folder),
            }
            | {
                "modes": ", ".join(modes),
                "rounds_done": min((0 if pd.isna(one) else int(one) for one in done), default=0),
            }
            | {"rounds": config.get("rounds"), "metric": metric, **bests, "path": str(folder)}
        )
    return pd.DataFrame(rows)


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
    configs = [load.read_config(Path(folder)) for folder in frame["path"]]
    varied: dict[str, list[Any]] = {}
    for places in frame.groupby("experiment", sort=False).indices.values():
        for key, values in differences([configs[place] for place in places]).items():
            if key not in frame and len({say(value) for value in values if value is not MISSING}) > 1:
                column = varied.setdefault(key, [None] * len(frame))
                for place, value in zip(places, values, strict=True):
                    column[place] = None if value is MISSING else value
    at = list(frame.columns).index("metric")
    frame = pd.concat([frame.iloc[:, :at], pd.DataFrame(varied, dtype=object), frame.iloc[:, at:]], axis=1)
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
            best_first = key.startswith("best_") and set(map(load.metric_mode, frame["metric"])) == {"max"}
        except UserError:
            values = [_last_value(Path(folder), key) for folder in frame["path"]]
            if all(value is None for value in values):
                raise
            frame.insert(list(frame.columns).index("path"), key, pd.Series(values, dtype="float64"))
            best_first = load.metric_mode(key) == "max"
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
    wanted, number = as_number(text), is_number(value)
    if sign in ("=", "==", "!="):
        same = value == wanted if number and wanted is not None else say(value) == text
        if isinstance(value, Mapping):  # of a section its name
            same = same or value.get("name") == text
        return same == (sign != "!=")
    if wanted is None:
        raise UserError(f"--where: {condition!r}: {text!r} is not a number, and {sign} compares numbers")
    return number and bool(_SIGNS[sign](value, wanted))


def _order(value: Any) -> tuple[bool, float, str]:
    return (False, float(value), "") if is_number(value) else (True, 0.0, say(value))


def _last_value(folder: Path, metric: str) -> float | None:
    df = load.load_runs(folder)
    if not (df["name"] == metric).any():
        return None
    models = model_scores(df, metric).groupby("scope")["last"].mean()
    return next((float(models[scope]) for scope in ("federated", "central", "local") if scope in models), None)
