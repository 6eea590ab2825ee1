"""Whether two run folders agree: config, plan, partition, metrics, models, predictions, scores; and where they first do not.

Two values agree if they are equal, if both are NaN, or if |a - b| <= atol + rtol max(|a|, |b|). Tensors are held to the
same by their 2-norms: ||a - b|| <= atol + rtol max(||a||, ||b||). Relative differences are |a - b| / max(|a|, |b|), of
tensors by norms, and infinite where one side is not finite and the other is another value.

Not compared: wall-clock seconds and what was measured of the machine; with other `rounds` or another evaluation frequency
what cannot be the same, which the text of the part says. Reading needs no torch.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.analysis.configs import flatten_config
from fedsim.analysis.finished import read_arrays
from fedsim.analysis.load import SCOPES, PathLike, find_runs, logged_metrics, read_config
from fedsim.analysis.tensors import MODELS, stored_tensors, tensor_difference
from fedsim.core.errors import Notice, UserError, visible
from fedsim.core.files import natural, read_json, recorded, warn_of_damage, warn_of_damaged_rows
from fedsim.data.partition import Partition, VirtualPartition

# Sections that no number depends on.
_NO_NUMBER = ("name", "results", "executor", "tracking", "checkpoint", "aggregation")
# Which metrics there are, not what is in them.
_FREQUENCY = ("evaluate.every_steps", "evaluate.every_rounds", "evaluate.clients")
# What the plan is made of, and how many examples are evaluated at once.
_LAST_BITS = ("training.lanes", "training.checkpointing", "local.micro_batch", "evaluate.batch_size")
_PATHS = ("model.path", "data.path", "data.validation", "data.test")  # the run's id goes by what lies there
_PLAN = ("threads", "packed", "lanes", "micro_batch", "checkpointing", "halved")
_GROUPS = ("packed", "lanes", "micro_batch", "halved")  # which examples go through the base together
_KEYS = ["round", "scope", "client", "step", "split", "name"]
_VALUES = ("value", "weight")
_SPLITS = ("train", "validation", "site")
# Metrics that are measured, so that no two runs have the same: wall-clock (a simulated one is not), memory, checkpoints.
_MEASURED = re.compile(r"(?!simulated).*seconds|.*memory.*|checkpoint_.*", re.DOTALL)
_WAY_OUT = "put it back, or delete the run and make it again"
_SHOWN = 6  # of a list of names, before "and 3 more"


@dataclass(frozen=True)
class Difference:
    """What `diff_runs` found; `str()` of it is what the command line shows.

    Attributes:
        agree: every part agrees.
        parts: (name, whether it agrees, text) of config, plan, partition, metrics, models, predictions, scores.
        first: the first metric that differs, where metrics do, else the first difference in the order of the parts;
            None if they agree. `part` names it; `a` and `b` hold both sides, or `only` says which run has it ("a", "b");
            `relative` the relative difference where there is one. A metric has `round`, `scope`, `client`, `step`,
            `split`, `name`, `column` (value or weight); others `key`, `client`, `model` and `tensor`, `row` and `array`.
    """

    agree: bool
    parts: list[tuple[str, bool, str]]
    first: dict[str, Any] | None

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.parts)
        lines = [
            f"{n:{width}s}  {'agrees ' if agrees else 'differs'}  {text}".rstrip() for n, agrees, text in self.parts
        ]
        return visible("\n".join(lines + (["", *_in_full(self.first)] if self.first else [])), lines=True)


@dataclass(frozen=True)
class _Common:
    """What two configs and plans leave to compare, and how far apart values may lie.

    Attributes:
        rtol, atol: tolerances.
        rounds: up to which round; None = all.
        sparse: models were evaluated at other places.
        regrouped: other clients or examples went through the base together, which decides how much padding was computed.
    """

    rtol: float
    atol: float
    rounds: int | None = None
    sparse: bool = False
    regrouped: bool = False


@dataclass(frozen=True)
class _Part:
    """What was found of one part: a line about it, its first difference or None."""

    text: str
    first: dict[str, Any] | None = None


def diff_runs(a: PathLike, b: PathLike, rtol: float = 0.0, atol: float = 0.0) -> Difference:
    """Compare two run folders, part by part.

    Args:
        a: a run's folder.
        b: another's.
        rtol: relative tolerance of metrics, scores and tensors.
        atol: absolute tolerance.

    Returns:
        What agrees and what does not. Plans (lanes, threads, micro-batch) that differ are reported and are no difference by
        themselves: they decide the last bits, and those are in the other parts. So are `rounds` (the rounds that both
        have are compared, models and predictions are not) and the evaluation frequency (the metrics and the last models
        that both have are compared; the models that validation chose are not).

    Raises:
        UserError: a path is not one run's folder, a file in it is damaged, or a tolerance is negative.
    """
    for key, value in (("rtol", rtol), ("atol", atol)):
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"{key}: {value!r} is no tolerance; give 0 or a small number such as 1e-6")
    runs = [_one_run(path) for path in (a, b)]
    config, rounds, sparse = _config(*runs)
    plan, regrouped = _plan(*runs)
    common = _Common(rtol, atol, rounds, sparse, regrouped)
    found = {"config": config, "plan": plan, "partition": _partition(*runs), "metrics": _metrics(*runs, common)}
    found |= {name: compare(*runs, common) for name, compare in _FINAL.items()}
    first = next(({"part": name, **found[name].first} for name in ("metrics", *found) if found[name].first), None)
    return Difference(first is None, [(name, part.first is None, part.text) for name, part in found.items()], first)


def _one_run(path: PathLike) -> Path:
    found = find_runs(path)
    if len(found) > 1:
        raise UserError(f"{str(path)!r} holds {len(found)} runs; give the folder of one, such as {str(found[0])!r}")
    warn_of_damage(found[0], *(name for name in recorded(found[0]) if not name.startswith("metrics")))
    warn_of_damaged_rows(found[0])
    return found[0]


# ----------------------------------------------------------------------------------------------- config, plan, partition


def _config(a: Path, b: Path) -> tuple[_Part, int | None, bool]:
    """The keys that differ; up to which round to compare (None = all); whether models were evaluated at other places."""
    flat = [flatten_config(read_config(folder)) for folder in (a, b)]
    ids = {folder.resolve().name for folder in (a, b)}
    # The id hashes what the numbers depend on, data and model by content: the same id, the same content.
    same_id = len(ids) == 1 and re.fullmatch("[0-9a-f]{12}", *ids) is not None
    rounds, first, differ, reported, frequency = None, None, [], [], []
    for key in dict.fromkeys(key for one in flat for key in one):
        there, (one, other) = [key in each for each in flat], (each.get(key) for each in flat)
        if (all(there) and (one == other or (one != one and other != other))) or key.split(".")[0] in _NO_NUMBER:
            continue
        shown = f"{key} " + " / ".join(_short(v) if t else "(no key)" for v, t in zip((one, other), there, strict=True))
        if key == "rounds" and isinstance(one, int) and isinstance(other, int):
            rounds = min(one, other)
            reported.append(f"{shown}: rounds up to {rounds} are compared")
        elif key in _FREQUENCY:
            frequency.append(shown)
        elif key in _LAST_BITS or (same_id and (key in _PATHS or not all(there))):
            reported.append(shown)
        else:
            differ.append(shown)
            first = first or {"key": key, "a": one, "b": other}
    if frequency:
        reported.append(f"{_listed(frequency)}: metrics that both have are compared")
    if differ:
        reported.insert(0, f"{_plural(len(differ), 'key differs', 'keys differ')}: {_listed(differ)}")
    return _Part("; ".join(reported), first), rounds, bool(frequency)


def _plan(a: Path, b: Path) -> tuple[_Part, bool]:
    """What decides the last bits; whether packs or micro-batches were formed otherwise."""
    plans, places = [_json(f / "plan.json") for f in (a, b)], [_json(f / "environment.json") for f in (a, b)]
    if missing := [name for name, plan in zip("ab", plans, strict=True) if not plan]:
        return _Part(f"no plan.json in {' and '.join(missing)}"), False
    pairs = {key: [plan.get(key) for plan in plans] for key in _PLAN if all(key in plan for plan in plans)}
    kinds = [sorted({str(device).split(":")[0] for device in place.get("devices") or []}) for place in places]
    machine = {"torch": [(place.get("versions") or {}).get("torch") for place in places]}
    machine |= {"cpu": [place.get("cpu") for place in places], "device": ["+".join(kind) or None for kind in kinds]}
    pairs |= {key: pair for key, pair in machine.items() if None not in pair}
    differ = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    text = ", ".join(f"{key} {pairs[key][0]}" for key in ("threads", "lanes", "micro_batch") if key in pairs)
    if differ:
        text = "; ".join(f"{key} {' / '.join(map(_short, pair))}" for key, pair in differ.items())
        text += ": the last bits may differ"
    promised = [place.get("deterministic") for place in places]
    if any(isinstance(about, dict) and about.get("promised") is False for about in promised):
        text += "; a device does not promise the last bits: see environment.json"
    return _Part(text), any(key in _GROUPS for key in differ)


def _partition(a: Path, b: Path) -> _Part:
    parts = [_read_partition(folder / "partition.npz") for folder in (a, b)]
    if missing := _missing(parts, "partition.npz"):
        return missing
    one, other = parts
    least, most = sorted(part.num_clients for part in parts)
    virtual = [isinstance(part, VirtualPartition) for part in parts]
    keys = [(p.key, p.min_rows, p.max_rows, p.kept.tolist()) for p in parts] if all(virtual) else [0, 1]
    differing = (
        client
        for client in range(0 if keys[0] == keys[1] else least)  # virtual ones are a function of these
        if one.name(client) != other.name(client) or not np.array_equal(one.rows(client), other.rows(client))
    )
    first = next(differing, None)  # of virtual clients, which may be a million, the others are not looked for
    sizes = f"{one.num_clients} / {other.num_clients} clients; " if least != most else ""
    if first is None and least == most:
        return _Part(f"{_plural(least, 'client', 'clients')}, {len(one.all_rows())} examples")
    if first is None:
        only, longer = ("a", one) if one.num_clients == most else ("b", other)
        text = f"{sizes}the first {least} have the same examples"
        return _Part(text, {"client": longer.name(least), "only": only})
    client = " / ".join(dict.fromkeys([one.name(first), other.name(first)]))
    text = f"{sizes}the first client with other examples is {client}"
    if not any(virtual):
        count = 1 + sum(1 for _ in differing)
        text = f"{sizes}{count} of {least} clients have other examples, the first is {client}"
    return _Part(text, {"client": client, "a": one.rows(first).tolist(), "b": other.rows(first).tolist()})


def _read_partition(file: Path) -> Partition | VirtualPartition | None:
    arrays = read_arrays(file)
    try:
        return None if arrays is None else Partition.from_arrays(arrays)
    except UserError as error:
        raise UserError(f"{file}: {error}; {_WAY_OUT}") from None


# ------------------------------------------------------------------------------------------------------ metrics


def _metrics(a: Path, b: Path, common: _Common) -> _Part:
    (one, torn_a), (other, torn_b) = (_read_metrics(folder, common) for folder in (a, b))
    both = one.merge(other, how="outer", on=[*_KEYS, "again"], suffixes=("_a", "_b"), indicator="only")
    both["only"] = both["only"].astype(object).map({"left_only": "a", "right_only": "b", "both": "both"})
    lonely, matched = both[both["only"] != "both"], both[(both["only"] == "both") & (both["again"] == 0)]
    found = {c: _apart(matched[f"{c}_a"].to_numpy(float), matched[f"{c}_b"].to_numpy(float), common) for c in _VALUES}
    (by_value, of_value), (by_weight, of_weight) = found["value"], found["weight"]
    about = {"column": np.where(by_value, "value", "weight"), "relative": np.where(by_value, of_value, of_weight)}
    differing = matched.assign(**about)[by_value | by_weight]
    # Evaluated at other places: of another frequency; of another number of rounds the last one's, a client's in its last
    # cohort, the model's that was chosen. What training says of itself both have.
    excused = (lonely["split"] != "train") & (common.sparse or common.rounds is not None)
    agree = f"agree{' within the tolerance' if common.rtol or common.atol else ''}"
    text = [f"{_plural(len(matched), 'metric', 'metrics')} {agree}"]
    if len(differing):
        largest = differing.groupby(differing["name"].astype(str))["relative"].agg(["max", "size"])
        largest = largest.sort_values("max", ascending=False, kind="stable")
        by_name = _listed(f"{name} {worst:.2g} ({count})" for name, worst, count in largest.itertuples())
        text = [f"{len(differing)} of {_plural(len(matched), 'metric', 'metrics')} differ"]
        text.append(f"largest relative difference (metrics): {by_name}")
    for side, words in itertools.product("ab", ("", ", not compared")):
        if count := int(((lonely["only"] == side) & (excused == bool(words))).sum()):
            text.append(f"{count} only in {side}{words}")
    for side, frame in (("a", one), ("b", other)):
        if count := int((frame["again"] > 0).sum()):
            text.append(f"{_plural(count, 'metric', 'metrics')} in {side} more than once, the last of each holds")
    text += ["computed_tokens not compared: another plan"] if common.regrouped else []
    return _Part("; ".join([*text, *torn_a, *torn_b]), _first_metric(pd.concat([differing, lonely[~excused]])))


def _read_metrics(folder: Path, common: _Common) -> tuple[pd.DataFrame, list[str]]:
    """The metrics that can be compared, and what there is to say of a torn last line.

    Where a metric was logged more than once, `again` counts from the last, 0.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frame = logged_metrics(folder)[[*_KEYS, *_VALUES]]
    torn = [str(w.message) for w in caught if "torn" in str(w.message)]
    measured = {name for name in frame["name"].unique() if _MEASURED.fullmatch(name)}
    left_out = measured | ({"computed_tokens"} if common.regrouped else set())
    kept = ~frame["name"].isin(left_out) & (frame["round"] <= (math.inf if common.rounds is None else common.rounds))
    frame = frame[kept.astype(bool)]
    # Numbers in place of the keys: pandas groups by no text that holds half of a character.
    codes = pd.DataFrame({key: pd.factorize(frame[key].to_numpy(object))[0] for key in _KEYS}, index=frame.index)
    return frame.assign(again=codes[::-1].groupby(_KEYS).cumcount()), torn[:1]


def _first_metric(differing: pd.DataFrame) -> dict[str, Any] | None:
    """The first in the order round, scope, client (the global model after its clients), step, split, name.

    Test metrics come after all others: they carry the round of the chosen model but are logged when the run is over, so
    another choice would look like a difference in that round.
    """
    if differing.empty:
        return None

    def rank(value: str, known: tuple[str, ...]) -> tuple[int, str]:
        return (known.index(value), "") if value in known else (len(known), value)

    def order(row: Any) -> tuple[Any, ...]:
        client = (pd.isna(row.client), natural("" if pd.isna(row.client) else str(row.client)))
        step = -1 if pd.isna(row.step) else int(row.step)
        return row.split == "test", row.round, rank(row.scope, SCOPES), client, step, rank(row.split, _SPLITS), row.name

    row = min(differing.itertuples(index=False), key=order)
    key = {k: None if pd.isna(getattr(row, k)) else getattr(row, k) for k in _KEYS}
    key |= {k: int(key[k]) for k in ("round", "step") if key[k] is not None}
    if row.only == "both":
        sides = {side: float(getattr(row, f"{row.column}_{side}")) for side in "ab"}
        return {**key, "column": row.column, **sides, "relative": float(row.relative)}
    if row.again:
        return {**key, "only": row.only, "repeated": True}
    return {**key, "only": row.only, row.only: float(getattr(row, f"value_{row.only}"))}


# ------------------------------------------------------------------------------------- models, predictions and scores


def _match(
    a: Mapping[Any, Any],
    b: Mapping[Any, Any],
    keys: Iterable[Any],
    difference: Callable[[Any, Any], dict[str, Any] | None],
) -> dict[Any, dict[str, Any]]:
    """Key -> both sides where they differ, or `only` where one of the two has it; in the order of the keys."""
    lonely = {key: {"only": "a" if key in a else "b"} for key in keys if key not in a or key not in b}
    found = {key: lonely.get(key) or difference(a[key], b[key]) for key in keys}
    return {key: about for key, about in found.items() if about}


def _models(a: Path, b: Path, common: _Common) -> _Part:
    if common.rounds is not None:
        return _Part("not compared: they are of other rounds")
    one, other = (stored_tensors(folder, chosen=not common.sparse) for folder in (a, b))
    keys = sorted({*one, *other}, key=lambda key: (MODELS.index(key[0].split("/")[0]), *map(natural, key)))
    if not keys:
        return _Part("neither run has any")
    found = _match(one, other, keys, lambda x, y: tensor_difference(x, y, common.rtol, common.atol))
    lonely = [about["only"] for about in found.values() if "only" in about]
    tensors, models = _plural(len(keys) - len(lonely), "tensor", "tensors"), len({key[0] for key in keys})
    text = [f"{tensors} of {_plural(models, 'model', 'models')}"]
    if differ := len(found) - len(lonely):
        text = [f"{differ} of {tensors} differ"]
    if largest := max((about.get("relative") or 0.0 for about in found.values()), default=0.0):
        text.append(f"largest relative difference {largest:.2g}")
    text += [f"{_plural(n, 'tensor', 'tensors')} only in {side}" for side in "ab" if (n := lonely.count(side))]
    text += ["chosen models not compared: another evaluation frequency"] if common.sparse else []
    first = next(({"model": key[0], "tensor": key[2], **about} for key, about in found.items()), None)
    return _Part("; ".join(text), first)


def _predictions(a: Path, b: Path, common: _Common) -> _Part:
    """`predictions.csv`: the words that the chosen models predict, by example and model."""
    if common.rounds is not None or common.sparse:
        return _Part("not compared: " + ("other rounds" if common.rounds else "another evaluation frequency"))
    tables = [_table(folder / "predictions.csv") for folder in (a, b)]
    if missing := _missing(tables, "predictions.csv"):
        return missing
    of = _plural(len(tables[0]), "test example", "test examples")
    columns, lengths = list(dict.fromkeys([*tables[0], *tables[1]])), [len(table) for table in tables]
    one, other = (table.reindex(columns=columns).iloc[: min(lengths)] for table in tables)
    differs = (one != other) & (one.notna() | other.notna())
    counts = {column: int(count) for column, count in differs.sum().items() if count}
    first, side = None, "ab"[lengths[1] > lengths[0]]
    if lengths[0] != lengths[1]:
        counts[f"examples only in {side}"] = abs(lengths[0] - lengths[1])
        row = tables["ab".index(side)].iloc[min(lengths)]
        first = {"row": row.get("row", str(min(lengths))), "only": side}
    if differs.any(axis=None):
        at, column = np.argwhere(differs.to_numpy())[0]
        sides = {
            side: None if pd.isna(t.iat[at, column]) else t.iat[at, column] for side, t in (("a", one), ("b", other))
        }
        first = {"row": one.iloc[at].get("row", str(at)), "model": columns[column], **sides}
    if first is None:
        return _Part(of)
    return _Part(f"words that differ, of {of}: {_listed(f'{model} {n}' for model, n in counts.items())}", first)


def _scores(a: Path, b: Path, common: _Common) -> _Part:
    """`scores.npz`: each model's loss and prediction by example."""
    if common.rounds is not None:
        return _Part("not compared: other rounds")
    one, other = (read_arrays(folder / "scores.npz") for folder in (a, b))
    if missing := _missing([one, other], "scores.npz"):
        return missing
    names = [n for n in dict.fromkeys([*one, *other]) if not (common.sparse and n.startswith("chosen_"))]
    found = _match(one, other, names, lambda x, y: _array_difference(x, y, common))
    text = [f"{name} " + (about.get("text") or f"only in {about['only']}") for name, about in found.items()]
    said = _listed(text) if text else _plural(len(names), "array", "arrays")
    said += "; chosen models not compared: another evaluation frequency" if common.sparse else ""
    first = None
    if found:
        name, about = next(iter(found.items()))
        place = _place(one, name, about["at"]) if "at" in about else {}
        first = {"array": name, **place, **{key: about[key] for key in ("only", "a", "b", "relative") if key in about}}
    return _Part(said, first)


def _array_difference(x: np.ndarray, y: np.ndarray, common: _Common) -> dict[str, Any] | None:
    """Both sides of the first value that differs, where it is (`at`), and a `text`; None where they agree."""
    if x.shape != y.shape or (x.dtype.kind == "U") != (y.dtype.kind == "U"):
        shapes = [f"{v.dtype} {list(v.shape)}" for v in (x, y)]
        return {"text": " / ".join(shapes), "a": shapes[0], "b": shapes[1]}
    floats = x.dtype.kind == "f" and y.dtype.kind == "f"
    differs, relative = _apart(x, y, common) if floats else (np.asarray(x != y), None)
    if not differs.any():
        return None
    at = tuple(int(i) for i in np.argwhere(differs)[0])
    worst = f", at most {relative[differs].max():.2g}" if floats else ""
    sides = {"a": x[at].item(), "b": y[at].item()} | ({"relative": float(relative[at])} if floats else {})
    return {"text": f"{int(differs.sum())} of {differs.size}{worst}", "at": at, **sides}


def _place(arrays: dict[str, np.ndarray], name: str, at: tuple[int, ...]) -> dict[str, Any]:
    """Which model and example of the data a place in an array of `scores.npz` stands for."""
    examples = arrays.get("test_rows" if name.startswith("chosen_") else "validation_rows")
    names = arrays.get("names")
    if len(at) == 2 and names is not None and examples is not None and at[0] < len(names) and at[1] < len(examples):
        return {"model": str(names[at[0]]), "row": int(examples[at[1]])}
    return {"index": list(at)}


_FINAL = {"models": _models, "predictions": _predictions, "scores": _scores}


# ------------------------------------------------------------------------------------------------------- helpers


def _apart(x: np.ndarray, y: np.ndarray, common: _Common) -> tuple[np.ndarray, np.ndarray]:
    """Which values of two arrays of one shape do not agree, and all relative differences."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        finite = np.isfinite(x) & np.isfinite(y)
        gap, size = np.abs(x - y), np.maximum(np.abs(x), np.abs(y))
        near = finite & (gap <= common.atol + common.rtol * size)
        relative = np.where(same, 0.0, np.where(finite, gap / size, np.inf))
    return ~(same | near), relative


def _missing(sides: list[Any], name: str) -> _Part | None:
    """What to say where a file is not in both folders; None where it is."""
    there = [side for side, value in zip("ab", sides, strict=True) if value is not None]
    if len(there) == 2:
        return None
    return (
        _Part(f"{name} only in {there[0]}", {"file": name, "only": there[0]})
        if there
        else _Part(f"neither run has {name}")
    )


def _table(file: Path) -> pd.DataFrame | None:
    """A CSV file as text, or None where there is none."""
    if not file.is_file():
        return None
    try:
        return pd.read_csv(file, dtype=str, keep_default_na=False, index_col=False, encoding_errors="replace")
    except ValueError as error:
        raise UserError(f"{file}: not readable ({' '.join(str(error).split())}); {_WAY_OUT}") from None


def _json(file: Path) -> dict[str, Any]:
    """A JSON file's keys; none where it is not there, or, with a `Notice`, not whole."""
    try:
        return read_json(file)
    except OSError:
        return {}
    except UserError as error:
        if file.name not in recorded(file.parent):  # else it has been named
            warnings.warn(str(error), Notice, stacklevel=2)
        return {}


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plural(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _listed(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _in_full(first: dict[str, Any]) -> list[str]:
    """The first difference: where it is, both sides, how far apart."""
    if first["part"] == "metrics":
        who = f"client {first['client']}" if first["client"] is not None else "no client"
        step = "no step" if first["step"] is None else f"step {first['step']}"
        column = "" if first.get("column", "value") == "value" else f", {first['column']}"
        metric = f"{first['split']} {first['name']}"
        where = f"round {first['round']}, {first['scope']}, {who}, {step}, {metric}{column}"
    else:
        keys = ("key", "file", "client", "model", "tensor", "array", "row", "index")
        where = ", ".join([first["part"], *(f"{key} {first[key]}" for key in keys if key in first)])
    lines = [f"first difference: {where}"]
    if "only" in first:
        again = "a second time " if first.get("repeated") else ""
        value = f": {first[first['only']]!r}" if first["only"] in first else ""
        return [*lines, f"  {again}only in {first['only']}{value}"]
    for side in "ab":
        value = first[side]
        many = isinstance(value, list) and len(value) > 20
        shown = f"{value[:20]} and {len(value) - 20} more" if many else value
        lines.append(f"  {side}  {shown if isinstance(shown, str) else repr(shown)}")
    if first.get("relative") is not None:
        lines.append(f"  relative difference {first['relative']:.3g}")
    return lines
