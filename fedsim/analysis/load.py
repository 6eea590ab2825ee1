"""Reading run folders: what ran, every metric as one DataFrame, the partition report, predicted classes.

A run folder is `results/<experiment>/<run id>/` with `config.yaml` and its metrics, `metrics/<mode>.jsonl` or, in older
folders, `metrics.jsonl`. Reading needs no torch.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from fedsim.analysis.configs import flatten_config
from fedsim.core.errors import Notice, UserError
from fedsim.core.files import DAMAGED_ARRAYS, metrics_files, read_file, read_json, warn_of_damage, warn_of_damaged_rows

_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {  # column of the metrics -> what a line may hold, in words
    "round": ((int,), "a number"),
    "step": ((int, type(None)), "a number"),
    "scope": ((str,), "a string"),
    "client": ((str, type(None)), "a string"),
    "split": ((str,), "a string"),
    "name": ((str,), "a string"),
    **dict.fromkeys(("value", "weight", "seconds"), ((int, float, type(None)), "a number")),
}
COLUMNS = tuple(_FIELDS)
SCOPES = ("local", "federated", "central")
PathLike = str | os.PathLike[str]


def run_path(run: Any) -> Path:
    """A run's folder, from its path or from the `Run` that `fedsim.run` returned."""
    return Path(getattr(run, "path", run))


def paths_of(path: PathLike | Iterable[PathLike]) -> list[Path]:
    """One path or several, as a list."""
    return [Path(path)] if isinstance(path, (str, os.PathLike)) else list(map(Path, path))


def find_runs(path: PathLike | Iterable[PathLike]) -> list[Path]:
    """The run folders at or below the paths, each once, in sorted order under each path.

    Raises:
        UserError: a path does not exist, or no run (`config.yaml` beside metrics) is in it.
    """
    found: dict[Path, Path] = {}
    for root in paths_of(path):
        if not root.is_dir():
            raise UserError(f"no folder {str(root)!r}; give a run folder, an experiment's folder or the results root")
        below = []
        for folder, subfolders, files in os.walk(root):
            if "config.yaml" in files and ("metrics.jsonl" in files or "metrics" in subfolders):
                below.append(Path(folder))
                subfolders.clear()  # a run's checkpoints and figures hold no further runs
        if not below:
            raise UserError(f"no run in {str(root)!r}: no folder there holds config.yaml and metrics/ or metrics.jsonl")
        for run in sorted(below):
            found.setdefault(run.resolve(), run)
    if not found:
        raise UserError("no run given: name at least one run folder, experiment's folder or results root")
    return list(found.values())


def load_runs(path: PathLike | Iterable[PathLike], names: Sequence[str] | None = None) -> pd.DataFrame:
    """Every metric of the runs at or below `path`, with run, experiment and the config beside it.

    Args:
        path: a run folder, an experiment's folder, the results root, or several of these.
        names: keep only metrics with one of these names (`["accuracy", "loss"]`); None keeps all.

    Returns:
        One row per metric: `round`, `step` (Int64), `scope`, `client` (object, None for the global or centralized
        model), `split`, `name`, `value`, `weight`, `seconds` (float64), `run`, `experiment`, and each config value
        under its dotted key (`partition.alpha`); lists as JSON strings, numbers as numbers, all else categorical.
        Where a resumed run logged a metric again, the later one holds.

    Raises:
        UserError: a missing path, no run in it, a damaged file (with its line), or a name that no run recorded.
    """
    folders = find_runs(path)
    configs = [read_config(folder) for folder in folders]
    frames = [read_metrics(folder) for folder in folders]
    if names is not None:
        known = sorted({str(name) for frame in frames for name in frame["name"].unique()})
        for name in names:
            if name not in known:
                raise UserError(f"no metric {name!r} in these runs; recorded: {', '.join(known) or 'nothing'}")
        frames = [frame[frame["name"].isin(list(names))] for frame in frames]
    lengths = [len(frame) for frame in frames]
    table = pd.concat(frames, ignore_index=True).astype(dict.fromkeys(("scope", "split", "name"), "category"))
    about = [flatten_config(config) for config in configs]
    for one, config, folder, label in zip(about, configs, folders, run_labels(folders), strict=True):
        one |= {"run": label, "experiment": experiment_name(config, folder)}
    columns = {key: _repeat([one.get(key) for one in about], lengths) for one in about for key in one}
    order = ["run", "experiment", *(key for key in columns if key not in (*COLUMNS, "run", "experiment"))]
    return pd.DataFrame({key: table[key] for key in COLUMNS} | {key: columns[key] for key in order})


def run_labels(folders: Sequence[Path]) -> list[str]:
    """The id of each run; the path where copies of one run lie in several places."""
    ids, places = [folder.resolve().name for folder in folders], {folder.resolve() for folder in folders}
    names = [place.name for place in places]
    return [str(folder) if names.count(run) > 1 else run for run, folder in zip(ids, folders, strict=True)]


def _repeat(values: list[Any], lengths: list[int]) -> Any:
    """One value per run, repeated for its rows: numbers where all are numbers, booleans likewise, else categorical."""
    kinds = set(map(type, values))
    if kinds in ({int}, {bool}):
        return np.repeat(values, lengths)
    if kinds & {int, float} and kinds <= {int, float, type(None)}:
        return np.repeat(np.array(values, dtype=np.float64), lengths)
    codes, known = pd.factorize(pd.Series(values, dtype=object))
    return pd.Categorical.from_codes(np.repeat(codes, lengths), categories=pd.Index(known, dtype=object))


def read_metrics(folder: Path) -> pd.DataFrame:
    """The metrics of one run, `COLUMNS`; the later of two that stand for the same."""
    keys = ["round", "step", "scope", "client", "split", "name"]
    return logged_metrics(folder).drop_duplicates(keys, keep="last", ignore_index=True)


def logged_metrics(folder: Path) -> pd.DataFrame:
    """The metrics of one run in the order of the files, with those that were logged again."""
    frame = pd.concat([_read_lines(file) for file in metrics_files(folder)] or [_to_frame([])], ignore_index=True)
    warn_of_damage(folder, "config.yaml")
    warn_of_damaged_rows(folder)
    return frame


def _read_lines(file: Path) -> pd.DataFrame:
    lines = read_file(file).decode("utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    torn = len(lines) if lines and _problem(lines[-1]) else 0
    if torn:
        lines.pop()
    try:
        rows = json.loads(f"[{','.join(lines)}]")  # one call for all lines: several times faster than one per line
        frame = _to_frame(rows)
        sound = len(rows) == len(lines) and frame[["round", "scope", "split", "name"]].notna().all(axis=None)
        sound = sound and set(map(type, frame["client"])) <= {str, type(None)}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        sound = False
    if sound:
        if torn:
            warnings.warn(f"{file}: the last line ({torn}) is torn and left out", Notice, stacklevel=4)
        return frame
    for number, text in enumerate(lines, start=1):
        if problem := _problem(text):
            raise UserError(f"{file}, line {number}: {problem}; correct or delete this line")
    raise UserError(f"{file}: not a metrics file; every line must be one JSON object with {', '.join(COLUMNS)}")


def _to_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    data = {key: [row.get(key) for row in rows] for key in COLUMNS}
    types = dict.fromkeys(COLUMNS, "object") | dict.fromkeys(("round", "step"), "Int64")
    types |= dict.fromkeys(("value", "weight", "seconds"), "float64")
    return pd.DataFrame({key: pd.Series(data[key], dtype=types[key]) for key in COLUMNS})


def _problem(text: str) -> str | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(row, dict):
        return "not a JSON object"
    for key, (kinds, what) in _FIELDS.items():
        value = row.get(key)
        if not isinstance(value, kinds) or (key in ("round", "step") and abs(value or 0) >= 2**63):
            return f"{key} is {value!r}, not {what}"
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """A run folder's `config.yaml` as a nested dict.

    Raises:
        UserError: it cannot be read, or is no config.
    """
    file = folder / "config.yaml"
    try:
        config = yaml.safe_load(read_file(file).decode())
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file}: not YAML ({' '.join(str(error).split())}); restore the file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start}); restore the file") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds no sections; restore the file")
    for key, kind, what in (
        *((key, dict, "section") for key in ("model", "best", "data", "partition")),
        ("modes", list, "list"),
    ):
        if not isinstance(config.get(key) or kind(), kind):
            raise UserError(f"{file}: {key}: {config[key]!r} is not a {what}; restore the file")
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
    counts = np.bincount(size * true.astype(np.int64) + predicted, minlength=size**2).reshape(size, size)
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
    needed = ("names", f"{split}_labels", f"{kinds[split]}_predicted")
    try:
        with np.load(file, allow_pickle=False) as scores:
            arrays = [scores[name] for name in needed if name in scores]
    except DAMAGED_ARRAYS as error:
        raise UserError(f"{file}: not the scores of a run ({' '.join(str(error).split())}); do the run again") from None
    if len(arrays) < len(needed):  # of an earlier version
        return {}
    names, true, predicted = arrays
    known = len(true) > 0 and bool((true >= 0).all())
    return {str(n): (true, p) for n, p in zip(names, predicted, strict=True) if known and (p >= 0).all()}


def rows_of(df: pd.DataFrame, scope: str) -> pd.DataFrame:
    """The metrics of a scope's models that are kept: the local models, the global model, the centralized one."""
    rows = df[df["scope"] == scope]
    return rows if scope == "central" else rows[rows["client"].notna() == (scope == "local")]


def metric_mode(metric: str) -> str:
    """ "max" or "min": which way a metric is better, by its name."""
    return "min" if metric.endswith(("loss", "perplexity")) else "max"


def mode_of(df: pd.DataFrame, metric: str) -> str:
    """ "max" or "min": which way the metric is better; the config's `best.mode` where `best.metric` is this metric."""
    if "best.metric" in df and "best.mode" in df:
        said = df.loc[df["best.metric"] == metric, "best.mode"].dropna()
        if len(said):
            return str(said.iloc[0])
    return metric_mode(metric)


def require_metric(df: pd.DataFrame, metric: str, split: str | None = None) -> None:
    """Raise a UserError that lists what was recorded if no row (of the split) has this name."""
    rows = df if split is None else df[df["split"] == split]
    if not (rows["name"] == metric).any():
        known = ", ".join(sorted(rows["name"].astype(str).unique())) or "nothing"
        where = "these rows" if split is None else f"split {split!r}"
        raise UserError(f"no metric {metric!r} in {where}; recorded: {known}")
