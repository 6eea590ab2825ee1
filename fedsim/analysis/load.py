"""Reading run folders: what ran, every metrics row as one DataFrame, the partition report, the summary table.

A run folder is `results/<experiment>/<run id>/` with `config.yaml` and an append-only `metrics.jsonl`; reading it needs
no torch. `traces` turns one run's rows into curves on an axis of rounds, which `fedsim.analysis.plots` draws.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from fedsim.analysis.configs import MISSING, differences, flatten_config, say  # noqa: F401
from fedsim.core.errors import Notice, UserError
from fedsim.core.files import DAMAGED_ARRAYS, read_file, read_json, warn_of_damage, warn_of_damaged_rows

COLUMNS = ("round", "step", "scope", "client", "split", "name", "value", "weight", "seconds")
SCOPES = ("local", "federated", "central")
PathLike = str | os.PathLike[str]
MATCHED = {"epochs": "same examples as all clients", "steps": "same steps as one client"}  # by `central.match`


def find_runs(path: PathLike | Iterable[PathLike]) -> list[Path]:
    """The run folders at or below the paths, each once, in sorted order under each path.

    Raises:
        UserError: a path does not exist, or no run (`config.yaml` beside `metrics.jsonl`) is in it.
    """
    found: dict[Path, Path] = {}
    for root in [path] if isinstance(path, (str, os.PathLike)) else list(path):
        if not Path(root).is_dir():
            raise UserError(f"no folder {str(root)!r}; give a run folder, an experiment's folder or the results root")
        below = []
        for folder, subfolders, files in os.walk(root):
            if "config.yaml" in files and ("metrics.jsonl" in files or "metrics" in subfolders):
                below.append(Path(folder))
                subfolders.clear()  # a run's checkpoints and figures hold no further runs
        if not below:
            raise UserError(f"no run in {str(root)!r}: no folder there holds both config.yaml and metrics.jsonl")
        for run in sorted(below):
            found.setdefault(run.resolve(), run)
    if not found:
        raise UserError("no run given: name at least one run folder, experiment's folder or results root")
    return list(found.values())


def load_runs(path: PathLike | Iterable[PathLike], names: Sequence[str] | None = None) -> pd.DataFrame:
    """Every metrics row of the runs at or below `path`, with run, experiment and the config beside it.

    Args:
        path: a run folder, an experiment's folder, the results root, or several of these.
        names: keep only rows whose `name` is one of these (`["accuracy", "loss"]`); None keeps all.

    Returns:
        One row per metrics row: `round`, `step` (Int64), `scope`, `client` (object, None for the merged or central
        model), `split`, `name`, `value`, `weight`, `seconds` (float64), `run`, `experiment`, and each config value
        under its dotted key (`partition.alpha`); lists as JSON strings, numbers as numbers, all else categorical.
        Where a resumed run logged a row again, the later one holds.

    Raises:
        UserError: a missing path, no run in it, a damaged file (with its line), or a name that no run recorded.
    """
    folders = find_runs(path)
    configs = [read_config(folder) for folder in folders]
    frames = [_metrics(folder) for folder in folders]
    if names is not None:
        known = sorted({str(name) for frame in frames for name in frame["name"].unique()})
        for name in names:
            if name not in known:
                raise UserError(f"no metric {name!r} in these runs; recorded: {', '.join(known) or 'nothing'}")
        frames = [frame[frame["name"].isin(list(names))] for frame in frames]
    lengths = [len(frame) for frame in frames]
    table = pd.concat(frames, ignore_index=True)
    columns: dict[str, Any] = {key: table[key] for key in COLUMNS}
    for key in ("scope", "split", "name"):
        columns[key] = table[key].astype("category")
    ids = [folder.resolve().name for folder in folders]
    labels = [str(folder) if ids.count(run) > 1 else run for run, folder in zip(ids, folders, strict=True)]
    columns["run"] = _repeat(labels, lengths)  # copies of one run in several places stay apart
    columns["experiment"] = _repeat([experiment_name(c, f) for c, f in zip(configs, folders, strict=True)], lengths)
    flat = [flatten_config(config) for config in configs]
    for key in dict.fromkeys(key for one in flat for key in one):
        if key not in columns:  # the config's own `name` is the column `experiment`
            columns[key] = _repeat([one.get(key) for one in flat], lengths)
    return pd.DataFrame(columns)


def list_runs(path: PathLike | Iterable[PathLike]) -> pd.DataFrame:
    """One row per run at or below `path`.

    Returns:
        Columns `experiment`, `run`, `state` (from status.json, else "unknown"), `modes`, `rounds_done` (by the mode
        that is furthest behind), `rounds` (planned), `metric` (the run's `best.metric`), `best_local` (mean over sites
        of each site's best), `best_federated`, `best_central` (validation, NaN where there is none), `path`.

    Raises:
        UserError: as `load_runs`.
    """
    rows = []
    for folder in find_runs(path):
        config, df = read_config(folder), _metrics(folder)
        best = config.get("best") or {}
        metric = str(best.get("metric") or "accuracy")
        df = df.assign(**{"best.metric": metric, "best.mode": str(best.get("mode") or metric_mode(metric))})
        models = pd.DataFrame(model_scores(df, metric), columns=["scope", "best"])
        modes = list(config.get("modes") or [scope for scope in SCOPES if (df["scope"] == scope).any()])
        bests, done = {}, []
        for scope in SCOPES:
            bests[f"best_{scope}"] = float(models.loc[models["scope"] == scope, "best"].mean())
            if scope in modes:
                rounds = rows_of(df, scope)["round"]
                done.append(int(rounds.max()) if rounds.notna().any() else 0)
        rows.append(
            {"experiment": experiment_name(config, folder), "run": folder.resolve().name, "state": read_state(folder)}
            | {"modes": ", ".join(modes), "rounds_done": min(done, default=0), "rounds": config.get("rounds")}
            | {"metric": metric, **bests, "path": str(folder)}
        )
    return pd.DataFrame(rows)


def central_budget(matches: Iterable[Any]) -> str:
    """What of the clients' budget the centralized runs have, from their `central.match`; "" where they differ or do not say."""
    found = set(matches)
    return MATCHED.get(found.pop(), "") if len(found) == 1 else ""


def load_partition(run: PathLike) -> dict[str, Any]:
    """The partition report (`partition.json`) of one run folder.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    file = Path(run) / "partition.json"
    if not file.is_file():
        raise UserError(f"no partition report {str(file)!r}; give the folder of a run that has built its partition")
    report = read_json(file)
    warn_of_damage(Path(run), "partition.json")
    return report


def confusion_matrix(run: PathLike, model: str = "federated", split: str = "test") -> pd.DataFrame:
    """Examples by true class (rows) and predicted class (columns), as `confusion_matrix` of scikit-learn counts them.

    Args:
        run: the folder of a finished run.
        model: "federated", "central" or "local SITE".
        split: "test", where each model is the one chosen on the validation examples, or "validation", where it is the last
            one; with `evaluate.max_examples`, of those that were evaluated.

    Returns:
        Counts, int64 [classes, classes], with the labels as index (`label`) and columns (`predicted`).

    Raises:
        UserError: no such split or model, no predictions (the run is not finished, or its answers are no classes), or a
            damaged file.
    """
    found = class_predictions(run, split)
    if model not in found:
        known = ", ".join(found)[:200] or "none; the run is not finished, or its answers are no classes"
        raise UserError(f"model: {model!r} has no predicted classes of the {split} examples in {run}; models: {known}")
    true, predicted = found[model]
    labels = (read_config(Path(run)).get("data") or {}).get("labels") or []
    size = max(len(labels), int(true.max()) + 1, int(predicted.max()) + 1)
    labels = [str(label) for label in labels] if size == len(labels) else [str(n) for n in range(size)]
    counts = np.zeros((size, size), dtype=np.int64)
    np.add.at(counts, (true, predicted), 1)
    return pd.DataFrame(counts, pd.Index(labels, name="label"), pd.Index(labels, name="predicted"))


def class_predictions(run: PathLike, split: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Model -> true and predicted classes of the examples of a split, each int [examples], as `scores.npz` has them; without
    the models that predicted none.

    Raises:
        UserError: an unknown split, or a damaged file.
    """
    kinds = {"test": "chosen", "validation": "last"}
    if split not in kinds:
        raise UserError(f"split: {split!r} is neither test nor validation")
    file = Path(run) / "scores.npz"
    if not file.is_file():
        return {}
    warn_of_damage(Path(run), "scores.npz")
    try:
        with np.load(file, allow_pickle=False) as scores:
            arrays = [
                scores[name] for name in ("names", f"{split}_labels", f"{kinds[split]}_predicted") if name in scores
            ]
    except DAMAGED_ARRAYS as error:
        raise UserError(f"{file}: not the scores of a run ({' '.join(str(error).split())}); do the run again") from None
    if len(arrays) < 3:  # of an earlier version
        return {}
    names, true, predicted = arrays
    known = len(true) > 0 and bool((true >= 0).all())
    return {str(n): (true, p) for n, p in zip(names, predicted, strict=True) if known and (p >= 0).all()}


def summary(df: pd.DataFrame, metric: str = "accuracy", which: str = "both") -> pd.DataFrame:
    """The table that closes a run: each site alone, their mean, federated, central; a row is of one model.

    Args:
        df: rows from `load_runs`; with several runs a column `run` comes first.
        metric: "accuracy", "loss", "exact_match" or any other recorded name.
        which: "best" = the models that validation chose, "last" = those of the last round; "both" = the chosen ones, and
            where the last one is another model, a row `... (last)` after it.

    Returns:
        Columns `model`, `round` (after which the model was scored, Int64; NA in the mean over sites), `validation`, `site`
        (own validation rows; the mean over sites for the merged model), `test` (scored for the chosen models alone), `steps`
        (optimiser steps by then, Int64). NaN where nothing was recorded. The mean over sites is unweighted.

    Raises:
        UserError: no run recorded the metric, or `which` is none of these.
    """
    if which not in ("best", "last", "both"):
        raise UserError(f"which={which!r} is unknown; use best, last or both")
    require_metric(df, metric)
    blocks = []
    for run, rows in df.groupby("run", sort=False, observed=True):
        block = pd.DataFrame(_summary_rows(rows, metric, which), columns=_SUMMARY)
        if df["run"].nunique() > 1:
            block.insert(0, "run", str(run))
        blocks.append(block)
    return pd.concat(blocks, ignore_index=True).astype({"round": "Int64", "steps": "Int64"})


_SUMMARY = ("model", "round", "validation", "site", "test", "steps")


def _summary_rows(df: pd.DataFrame, metric: str, which: str) -> list[dict[str, Any]]:
    table, of_sites = [], []
    models = model_scores(df, metric)
    for place, model in enumerate(models):
        name = f"local {model['client']}" if model["scope"] == "local" else model["scope"]
        best = dict(
            zip(_SUMMARY, (name, *(model[k] for k in ("round", "best", "best_own", "test", "best_steps"))), strict=True)
        )
        last = dict(
            zip(_SUMMARY, (name, *(model[k] for k in ("last_round", "last", "own")), None, model["steps"]), strict=True)
        )
        if model["round"] == model["last_round"]:
            last["test"] = best["test"]
        pair = (best, last) if which == "both" else (best, best) if which == "best" else (last, last)
        table += _with_last(*pair)
        if model["scope"] == "local":
            of_sites.append(pair)
            if place + 1 == len(models) or models[place + 1]["scope"] != "local":
                table += _with_last(*(_mean_over_sites([p[i] for p in of_sites]) for i in (0, 1)))
    return table


def _with_last(best: dict[str, Any], last: dict[str, Any]) -> list[dict[str, Any]]:
    """The chosen model's row, then that of the last one where it is another."""
    return [best] if repr(best) == repr(last) else [best, {**last, "model": f"{last['model']} (last)"}]


def _mean_over_sites(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sites = pd.DataFrame(rows, columns=_SUMMARY).drop(columns=["model", "round"]).astype(float)
    mean = {
        **sites.mean(),
        "test": sites["test"].mean(skipna=False),
    }  # last models are tested only where they are chosen
    return {"model": "local mean", "round": None, **mean, "steps": sites["steps"].max()}


def model_scores(df: pd.DataFrame, metric: str) -> list[dict[str, Any]]:
    """The models that one run kept, with their scores: each site alone, then the merged one, then the centralised one.

    Of each there are two, that of the last round and the one that validation chose: the one whose test score is recorded;
    where none is, the best at the ends of rounds by the run's `best.metric`, of equal ones the one with the lower loss, then
    the later one.

    Args:
        df: the rows of one run from `load_runs`.
        metric: a recorded name.

    Returns:
        A dict a model: `scope` and `client` (None for the merged and the centralised one); of the last model `last_round`,
        `last` (validation), `own` (a site's validation rows; of the merged model the mean over sites) and `steps` (optimiser
        steps); of the chosen one `round`, `best` (validation), `best_own`, `test` and `best_steps`. NaN where nothing was
        recorded.
    """
    models = []
    for scope in SCOPES:
        rows = rows_of(df, scope)
        if rows.empty:
            continue
        # The other scopes have one model each, here called "".
        who = rows["client"].astype(object) if scope == "local" else pd.Series("", index=rows.index, dtype=object)
        rows = rows.assign(client=who)
        ends = rows.groupby(["client", "round"])["step"].max()
        keys = pd.MultiIndex.from_frame(rows[["client", "round"]])
        at_end = rows[(rows["step"].to_numpy() == ends.reindex(keys).to_numpy()) & (rows["round"] > 0).to_numpy()]
        validation = at_end[at_end["split"] == "validation"].set_index(["client", "round"])[["name", "value"]]
        validation = {name: part["value"].dropna() for name, part in validation.groupby("name", observed=True)}
        tested = rows[rows["split"] == "test"]
        if scope == "federated":
            site = df[(df["scope"] == scope) & (df["split"] == "site") & (df["name"] == f"merged_{metric}")]
            own = site.assign(client="").groupby(["client", "round"])["value"].mean()
        else:
            own = at_end[(at_end["split"] == "site") & (at_end["name"] == metric)]
            own = own.groupby(["client", "round"])["value"].last()
        score = validation.get(metric, pd.Series(dtype=float))
        last = {c: r for part in validation.values() for c, r in sorted(part.index)}
        best = _chosen(df, metric, validation) | tested.groupby("client")["round"].last().to_dict()
        test = tested[tested["name"] == metric].groupby("client")["value"].last()
        for client in dict.fromkeys(who):
            model: dict[str, Any] = {"scope": scope, "client": client or None}
            model |= {"last_round": last.get(client), "round": best.get(client)}
            at, chosen = (client, model["last_round"]), (client, model["round"])
            model |= {
                "last": _at(score, at),
                "best": _at(score, chosen),
                "own": _at(own, at),
                "best_own": _at(own, chosen),
            }
            model |= {"test": _at(test, client), "steps": ends.loc[client].max(), "best_steps": ends.get(chosen)}
            models.append(model)
    return models


def _chosen(df: pd.DataFrame, metric: str, validation: dict[str, pd.Series]) -> dict[str, int]:
    """Client -> the round whose model is the best: the rule of `fedsim.simulate.rounds.Choice`, for a run without test scores."""
    said = df["best.metric"].dropna() if "best.metric" in df else ()
    by = str(said.iloc[0]) if len(said) else metric
    if by not in validation:
        return {}
    table = pd.DataFrame({"score": validation[by] * (1.0 if mode_of(df, by) == "max" else -1.0)})
    table["loss"] = -validation["loss"].reindex(table.index) if "loss" in validation else np.nan
    table = table.reset_index().sort_values(["score", "loss", "round"], na_position="first")
    return table.groupby("client")["round"].last().to_dict()


def _at(values: pd.Series, key: Any) -> float:
    return float(values.get(key, math.nan))


def mode_of(df: pd.DataFrame, metric: str) -> str:
    """ "max" or "min": which way the metric is better; the config's `best.mode` where `best.metric` is this metric."""
    if "best.metric" in df and "best.mode" in df:
        said = df.loc[df["best.metric"] == metric, "best.mode"].dropna()
        if len(said):
            return str(said.iloc[0])
    return metric_mode(metric)


@dataclass(frozen=True)
class Traces:
    """One run's curves. Every curve is float64 [points, 2]: position on the axis of rounds, value.

    Position 0 is before training, 2 the end of round 2, 1.5 the middle of round 2 by optimiser steps of that model.
    `clients[r]` are the cohort's curves inside round r; each opens with the merged model the round started from.
    """

    local: dict[str, np.ndarray]
    clients: dict[int, list[np.ndarray]]
    merged: np.ndarray
    central: np.ndarray


def traces(df: pd.DataFrame, metric: str = "accuracy", split: str = "validation") -> Traces:
    """The curves of one run on the axis of rounds, from its rows in `load_runs`' table.

    With split "site" the merged model's value is the mean over sites of its `merged_<metric>` rows.
    """
    df = df.assign(position=_positions(df))
    df = df[(df["split"] == split) & df["value"].notna() & df["position"].notna()]
    rows = df[df["name"] == metric]
    merged = _curve(rows_of(rows, "federated"))
    if split == "site":
        named = df[(df["scope"] == "federated") & (df["name"] == f"merged_{metric}")]
        merged = _curve(named.assign(position=named["round"].astype(float)))
    start = {int(at): value for at, value in merged}
    clients: dict[int, list[np.ndarray]] = {}
    inside = rows[(rows["scope"] == "federated") & rows["client"].notna() & (rows["round"] > 0)]
    for (number, _), part in inside.groupby(["round", "client"], sort=True):
        curve = _curve(part)
        if number - 1 in start:
            curve = np.vstack([[number - 1, start[number - 1]], curve])
        clients.setdefault(int(number), []).append(curve)
    local = {str(client): _curve(part) for client, part in rows_of(rows, "local").groupby("client", sort=False)}
    return Traces(local, clients, merged, _curve(rows_of(rows, "central")))


def _curve(rows: pd.DataFrame) -> np.ndarray:
    at, place = np.unique(rows["position"].to_numpy(float), return_inverse=True)
    return np.column_stack([at, np.bincount(place, rows["value"].to_numpy(float)) / np.bincount(place)])


def round_ends(df: pd.DataFrame, scope: str) -> pd.Series:
    """Optimiser steps at each round's end (index: round, from 0) in one run's scope: the merged model's, else the
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
    # A site's rows of the merged model carry that model's step, not the site's.
    own = ~df["name"].astype(str).str.startswith("merged_").to_numpy()
    ends = rows[own].groupby(keys)["step"].max().rename("end").reset_index()
    before = ends.groupby(["scope", "client"])[["round", "end"]].shift().fillna(0.0)
    # Rounds without a row in between are taken to have been equally long ...
    ends["start"] = ends["end"] - (ends["end"] - before["end"]) / (ends["round"] - before["round"]).clip(lower=1.0)
    # ... but a federated client may have sat them out: only one in step with the merged model trained in all of them.
    merged = round_ends(df, "federated")
    at, steps = merged.index.to_numpy(float), merged.to_numpy(float)
    in_step = ends["end"] == np.interp(ends["round"], at, steps)
    start = np.where(in_step, np.interp(ends["round"] - 1.0, at, steps), before["end"])
    ends["start"] = np.where(ends["scope"] == "federated", start, ends["start"])
    rows = rows.merge(ends, on=keys, how="left")
    length = (rows["end"] - rows["start"]).to_numpy(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(length > 0, (rows["step"] - rows["start"]).to_numpy(float) / length, 1.0)
    number = rows["round"].to_numpy(float)
    return np.round(np.where(number == 0, 0.0, number - 1.0 + np.clip(part, 0.0, 1.0)), 9)


def rows_of(df: pd.DataFrame, scope: str) -> pd.DataFrame:
    """A scope's models that are kept: the sites of `local`, the merged model of `federated`, the one of `central`."""
    rows = df[df["scope"] == scope]
    return rows if scope == "central" else rows[rows["client"].notna() == (scope == "local")]


def metric_mode(metric: str) -> str:
    """ "max" or "min": which way a metric is better, by its name."""
    return "min" if metric.endswith(("loss", "perplexity")) else "max"


def require_metric(df: pd.DataFrame, metric: str, split: str | None = None) -> None:
    """Raise a UserError that lists what was recorded if no row (of the split) has this name."""
    rows = df if split is None else df[df["split"] == split]
    if not (rows["name"] == metric).any():
        known = ", ".join(sorted(rows["name"].astype(str).unique())) or "nothing"
        where = "these rows" if split is None else f"split {split!r}"
        raise UserError(f"no metric {metric!r} in {where}; recorded: {known}")


def _metrics(folder: Path) -> pd.DataFrame:
    files = [folder / "metrics.jsonl", *(folder / "metrics" / f"{scope}.jsonl" for scope in SCOPES)]
    frames = [_metrics_file(f) for f in files if f.is_file()] or [_metrics_file(files[0])]
    warn_of_damage(folder, "config.yaml")
    warn_of_damaged_rows(folder)
    return pd.concat(frames, ignore_index=True)


def _metrics_file(file: Path) -> pd.DataFrame:
    lines = read_file(file).decode("utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    torn = len(lines) if lines and _problem(lines[-1]) else 0
    if torn:
        lines.pop()
    try:
        rows = json.loads(f"[{','.join(lines)}]")  # one call for all lines: several times faster than one a line
        data: dict[str, Any] = {key: [row.get(key) for row in rows] for key in COLUMNS}
        frame = pd.DataFrame(
            {key: pd.array(data[key], dtype="Int64") for key in ("round", "step")}
            | {key: pd.Series(data[key], dtype=object) for key in ("scope", "client", "split", "name")}
            | {key: np.array(data[key], dtype=np.float64) for key in ("value", "weight", "seconds")}
        )[list(COLUMNS)]
        sound = len(rows) == len(lines) and frame[["round", "scope", "split", "name"]].notna().all(axis=None)
        sound = sound and set(map(type, data["client"])) <= {str, type(None)}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        sound = False
    if not sound:
        for number, text in enumerate(lines, start=1):
            if problem := _problem(text):
                raise UserError(f"{file}, line {number}: {problem}; mend or delete this line")
        raise UserError(f"{file}: not a metrics file; every line must be one JSON object with {', '.join(COLUMNS)}")
    if torn:
        warnings.warn(f"{file}: the last line ({torn}) is torn and left out", Notice, stacklevel=3)
    return frame.drop_duplicates(["round", "step", "scope", "client", "split", "name"], keep="last", ignore_index=True)


def _problem(text: str) -> str | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(row, dict):
        return "not a JSON object"
    for key in ("scope", "split", "name"):
        if not isinstance(row.get(key), str):
            return f"{key} is {row.get(key)!r}, not a string"
    if not isinstance(row.get("client"), (str, type(None))):
        return f"client is {row.get('client')!r}, not a string"
    for key in ("round", "step"):
        if isinstance(row.get(key), int) and abs(row[key]) >= 2**63:
            return f"{key} is {row[key]!r}, not a number of the kind"
    for key in ("round", "step", "value", "weight", "seconds"):
        kinds = (int,) if key in ("round", "step") else (int, float)
        if not isinstance(row.get(key), kinds) and (key == "round" or row.get(key) is not None):
            return f"{key} is {row.get(key)!r}, not a number"
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """A run folder's `config.yaml` as a nested dict; a UserError where it cannot be read."""
    try:
        config = yaml.safe_load(read_file(folder / "config.yaml").decode())
    except (yaml.YAMLError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.yaml'}: not YAML ({why}); restore the file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / 'config.yaml'}: not UTF-8 (byte {error.start}); restore the file") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'}: holds no sections; restore the file")
    for key in ("model", "best", "data", "partition"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{folder / 'config.yaml'}: {key}: {config[key]!r} is no section; restore the file")
    if not isinstance(config.get("modes") or [], list):
        raise UserError(f"{folder / 'config.yaml'}: modes: {config['modes']!r} is no list; restore the file")
    return config


def experiment_name(config: dict[str, Any], folder: Path) -> str:
    """The config's `name`, else that of the folder around the run's."""
    return str(config.get("name") or folder.resolve().parent.name)


def read_state(folder: Path) -> str:
    """running, finished, stopped or failed, from `status.json`; "unknown", with a `Notice`, where that cannot be read."""
    try:
        return str(read_json(folder / "status.json").get("state", "unknown"))
    except OSError:
        return "unknown"
    except UserError as error:
        warnings.warn(str(error), Notice, stacklevel=2)
        return "unknown"


def _repeat(values: list[Any], lengths: list[int]) -> Any:
    """One value a run, spread over its rows: a number column where all are numbers, else categorical."""
    if all(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values):
        if any(value is not None for value in values):
            whole = all(isinstance(value, int) for value in values)
            return np.repeat(np.array(values, dtype=np.int64 if whole else np.float64), lengths)
    elif all(isinstance(value, bool) for value in values):
        return np.repeat(np.array(values, dtype=bool), lengths)
    kinds = list(dict.fromkeys(value for value in values if value is not None))
    codes = [-1 if value is None else kinds.index(value) for value in values]
    return pd.Categorical.from_codes(np.repeat(codes, lengths), categories=pd.Index(kinds, dtype=object))
