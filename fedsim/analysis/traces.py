"""One run's metrics as curves on an axis of rounds, means over runs, and where the ends of rounds lie on other axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fedsim.analysis.load import SCOPES, rows_of
from fedsim.analysis.style import X_LABELS
from fedsim.core.errors import UserError

_LOGGED = {"simulated": ("simulated", "seconds"), "epsilon": ("privacy", "epsilon")}  # axes whose totals a run logs

Scale = tuple[np.ndarray, np.ndarray]  # rounds, and where their ends lie on another axis


@dataclass(frozen=True)
class Traces:
    """One run's curves. Every curve is float64 [points, 2]: position on the axis of rounds, value.

    Position 0 is before training, 2 the end of round 2, 1.5 the middle of round 2 by optimizer steps of that model.
    `clients[r]` are the cohort's curves inside round r; each begins with the global model that the round started from.
    """

    local: dict[str, np.ndarray]
    clients: dict[int, dict[str, np.ndarray]]
    merged: np.ndarray
    central: np.ndarray


def traces(df: pd.DataFrame, metric: str = "accuracy", split: str = "validation") -> Traces:
    """The curves of one run on the axis of rounds, from its rows in `load_runs`' table.

    With split "site" the global model's value is the mean over clients of its `merged_<metric>` rows.
    """
    df = df.assign(position=_positions(df))
    df = df[(df["split"] == split) & df["value"].notna() & df["position"].notna()]
    rows = df[df["name"] == metric]
    merged = rows_of(rows, "federated")
    if split == "site":
        merged = df[(df["scope"] == "federated") & (df["name"] == f"merged_{metric}")]
        merged = merged.assign(position=merged["round"].astype(float))
    merged_curve = _curve(merged)
    start = {int(at): value for at, value in merged_curve}
    clients: dict[int, dict[str, np.ndarray]] = {}
    inside = rows[(rows["scope"] == "federated") & rows["client"].notna() & (rows["round"] > 0)]
    for (number, client), part in inside.groupby(["round", "client"], sort=True):
        first = [[number - 1, start[number - 1]]] if number - 1 in start else np.empty((0, 2))
        clients.setdefault(int(number), {})[str(client)] = np.vstack([first, _curve(part)])
    local = {str(client): _curve(part) for client, part in rows_of(rows, "local").groupby("client", sort=False)}
    return Traces(local, clients, merged_curve, _curve(rows_of(rows, "central")))


def _curve(rows: pd.DataFrame) -> np.ndarray:
    return rows.astype({"value": float}).groupby("position")["value"].mean().reset_index().to_numpy(float)


def round_ends(df: pd.DataFrame, scope: str) -> pd.Series:
    """Optimizer steps at each round's end (index: round, from 0) in one run's scope: the global model's, else the
    furthest client's.
    """
    rows = df[(df["scope"] == scope) & df["step"].notna()]
    furthest = rows.groupby("round")["step"].max().astype(float)
    stated = rows_of(rows, scope).groupby("round")["step"].max().astype(float)
    return pd.concat([pd.Series({0: 0.0}), stated.combine_first(furthest).drop(0, errors="ignore")])


def _positions(df: pd.DataFrame) -> np.ndarray:
    """Where each row of one run lies on the axis of rounds, float64 [rows]: round - 1 + the part of its steps done."""
    keys = ["scope", "client", "round"]
    rows = df[["scope", "client", "round", "step"]].astype({"scope": object, "round": float, "step": float})
    rows["client"] = rows["client"].where(rows["client"].notna() & (rows["scope"] != "central"), "")
    # A client's rows of the global model carry that model's step, not the client's.
    own = ~df["name"].astype(str).str.startswith("merged_").to_numpy()
    ends = rows[own].groupby(keys)["step"].max().rename("end").reset_index()
    before = ends.groupby(["scope", "client"])[["round", "end"]].shift().fillna(0.0)
    # Rounds without a row in between are taken to have been equally long ...
    ends["start"] = ends["end"] - (ends["end"] - before["end"]) / (ends["round"] - before["round"]).clip(lower=1.0)
    # ... but a federated client may have sat them out: only one in step with the global model trained in all of them.
    merged = round_ends(df, "federated")
    at, steps = merged.index.to_numpy(float), merged.to_numpy(float)
    in_step = ends["end"] == np.interp(ends["round"], at, steps)
    start = np.where(in_step, np.interp(ends["round"] - 1.0, at, steps), before["end"])
    ends["start"] = np.where(ends["scope"] == "federated", start, ends["start"])
    rows = rows.merge(ends, on=keys, how="left")
    length, number = rows["end"] - rows["start"], rows["round"]
    part = ((rows["step"] - rows["start"]) / length).where(length > 0, 1.0).clip(0.0, 1.0)
    return (number - 1.0 + part).where(number > 0, 0.0).round(9).to_numpy(float)


# ------------------------------------------------------------------------------------------------ several runs


def stack(members: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Curves [n, 2] on one grid: the positions [G] that all of them reach, values [members, G]."""
    members = list(members)
    grid = np.unique(np.concatenate([one[:, 0] for one in members]))
    grid = grid[(grid >= max(one[0, 0] for one in members)) & (grid <= min(one[-1, 0] for one in members))]
    return grid, np.stack([np.interp(grid, one[:, 0], one[:, 1]) for one in members])


def mean_curve(members: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of curves [n, 2], as far as all of them go."""
    grid, values = stack(members)
    return np.column_stack([grid, values.mean(axis=0)])


def bundle(runs: Sequence[Iterable[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The curves of one run, or the mean curve of each of several, on one grid, as `stack`."""
    return stack(runs[0]) if len(runs) == 1 else stack(map(mean_curve, runs))


def saw_tooth(found: Sequence[Traces]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Federated curves as far as all runs go: positions [n], values [runs, n], which are aggregated models [n]."""
    merged = [dict(one.merged) for one in found]
    pieces = []
    for number in sorted({int(key) for one in found for key in (*one.clients, *one.merged[:, 0])}):
        if all(number in one.clients for one in found):
            grid, inside = stack(mean_curve(one.clients[number].values()) for one in found)
            pieces.append((grid, inside, np.zeros(len(grid), dtype=bool)))
        if all(number in one for one in merged):
            model = np.array([[one[number]] for one in merged])
            pieces.append((np.array([float(number)]), model, np.array([number > 0])))  # 0: the model before training
    if not pieces:
        return np.empty(0), np.empty((len(found), 0)), np.empty(0, dtype=bool)
    places, values, aggregated = zip(*pieces, strict=True)
    return np.concatenate(places), np.concatenate(values, axis=1), np.concatenate(aggregated)


# --------------------------------------------------------------------------------------------------- other axes


def scales_of(df: pd.DataFrame, x: str | None) -> tuple[str, dict[str, Scale | None]]:
    """The axis that `x` stands for, a key of `X_LABELS`, and each scope's scale on it.

    Raises:
        UserError: an unknown x, or no scope recorded what it asks for.
    """
    if x not in (None, *X_LABELS):
        raise UserError(f"x={x!r} is not an axis; use one of {', '.join(key for key in X_LABELS if key != 'own_step')}")
    alike = _same_steps(df)
    if x is None:
        known = all(scale_of(df, scope, "tokens") for scope in SCOPES if (df["scope"] == scope).any())
        x = "step" if alike else "tokens" if known else "round"
    scales = {scope: scale_of(df, scope, x) for scope in SCOPES}
    if all(scale is None for scale in scales.values()):
        missing = {"tokens": "tokens rows", "bytes": "bytes_up or bytes_down rows", "simulated": "simulated seconds"}
        missing["epsilon"] = "epsilon (privacy)"
        found = missing.get(x, f"{x} values")
        raise UserError(f"x={x!r}: these runs recorded no {found}; use x='step' or x='round'")
    return "own_step" if x == "step" and not alike else x, scales


def _same_steps(df: pd.DataFrame) -> bool:
    """Whether each centralized model does as many optimizer steps per round as the clients of its run; of any run, where it
    has none.
    """
    runs = [rows for _, rows in df.groupby("run", observed=True)]
    central = {n: _steps(rows, "central") for n, rows in enumerate(runs) if (rows["scope"] == "central").any()}
    clients = {n: _steps(rows, "local") for n, rows in enumerate(runs) if (rows["scope"] != "central").any()}
    for number, steps in central.items():
        others = [clients[number]] if number in clients else list(clients.values())
        pairs = [pd.concat([steps, other], axis=1, join="inner") for other in others]
        if pairs and not any((pair[0] == pair[1]).all() for pair in pairs):
            return False
    return True


def scale_of(df: pd.DataFrame, scope: str, x: str) -> Scale | None:
    """Where the ends of rounds lie on axis `x` for a scope, the mean over runs; None where it has no rows for that."""
    runs = [run for _, run in df.groupby("run", observed=True) if (run["scope"] == scope).any()]
    ends = [pd.Series(dtype=float), *(_progress(run, scope, x) for run in runs)]
    mean = pd.concat(ends, axis=1).sort_index().mean(axis=1).dropna()
    return (mean.index.to_numpy(float), mean.to_numpy(float)) if len(mean) else None


def _progress(run: pd.DataFrame, scope: str, x: str) -> pd.Series:
    """Round -> the total on axis `x` by its end, of one run's scope; empty where it has no rows for that."""
    rows = run[run["scope"] == scope]
    if x == "round":
        return pd.Series(np.arange(int(run["round"].max()) + 1.0))
    if x in ("step", "own_step"):
        return _steps(run, scope)
    if x == "seconds":
        clock = rows[~rows["split"].isin(("test", "run"))].groupby("round")["seconds"].max().dropna()
        return clock - clock.get(0, rows["seconds"].min())
    if x in _LOGGED:
        split, name = _LOGGED[x]
        logged = rows[(rows["split"] == split) & (rows["name"] == name) & rows["client"].isna()]
        total = logged.set_index("round")["value"]
    else:
        spent = rows[
            rows["name"].isin(("bytes_up", "bytes_down") if x == "bytes" else ("tokens",)) & (rows["round"] > 0)
        ]
        total = spent.groupby("round")["value"].sum().cumsum() / (2**20 if x == "bytes" else 1)
    return total if total.empty else pd.concat([pd.Series({0: 0.0}), total])


def _steps(run: pd.DataFrame, scope: str) -> pd.Series:
    """Optimizer steps at each round's end: the centralized model's, or those of the client that is furthest."""
    scopes = [scope] if scope == "central" else [s for s in ("federated", "local") if (run["scope"] == s).any()]
    return pd.concat([round_ends(run, s) for s in scopes], axis=1).max(axis=1).sort_index()
