"""Whether two run folders agree: config, plan, partition, metrics rows, models, predictions; and where they first do not.

Two values agree if they are equal, if both are NaN, or if |a - b| <= atol + rtol max(|a|, |b|). Tensors are held to the
same by their 2-norms: ||a - b|| <= atol + rtol max(||a||, ||b||). Relative differences are |a - b| / max(|a|, |b|), of
tensors by norms, and infinite where one side is not finite and the other is another value.

Not compared: wall-clock seconds and what was measured of the machine; with other `rounds` or another evaluation frequency
what cannot be the same, which is said. Reading needs no torch.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.analysis.configs import flatten_config
from fedsim.analysis.load import SCOPES, PathLike, find_runs, load_runs, read_config
from fedsim.core.errors import Notice, UserError
from fedsim.core.files import (
    DAMAGED_ARRAYS,
    client_folders,
    metrics_files,
    model_name,
    read_json,
    recorded,
    warn_of_damage,
    warn_of_damaged_rows,
)
from fedsim.data.partition import Partition, VirtualPartition

# Sections that no number depends on.
_NO_NUMBER = ("name", "results", "executor", "tracking", "checkpoint", "aggregation")
# Which rows there are, not what is in them.
_FREQUENCY = ("evaluate.every_steps", "evaluate.every_rounds", "evaluate.clients")
# What the plan is made of, and how many rows are scored at once.
_LAST_BITS = ("training.lanes", "training.checkpointing", "local.micro_batch", "evaluate.batch_size")
_PATHS = ("model.path", "data.path", "data.validation", "data.test")  # the run's id goes by what lies there
_PLAN = ("threads", "packed", "lanes", "micro_batch", "checkpointing", "halved")
_GROUPS = ("packed", "lanes", "micro_batch", "halved")  # which rows go through the base together
_KEYS = ["round", "scope", "client", "step", "split", "name"]
_SPLITS = ("train", "validation", "site")
# Metrics that are measured, so that no two runs have the same: wall-clock (a simulated one is not), memory, checkpoints.
_MEASURED = re.compile(r"(?!simulated).*seconds|.*memory.*|checkpoint_.*", re.DOTALL)
_MODELS = ("global", "best", "central", "local")
_TYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "C64": np.complex64, "BOOL": np.bool_},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
}
_WAY_OUT = "put it back, or delete the run and make it again"
_CHUNK = 1 << 24  # bytes of a tensor that are looked at together
_SHOWN = 6  # of a list of names, before "and 3 more"


@dataclass(frozen=True)
class Difference:
    """What `diff_runs` found; `str()` of it is what the command line shows.

    Attributes:
        agree: every part agrees.
        parts: (name, whether it agrees, text) of config, plan, partition, metrics, models, predictions, scores.
        first: the first metrics row that differs, where rows do, else the first difference in the order of the parts;
            None if they agree. `part` names it; `a` and `b` hold both sides, or `only` says which run has it ("a", "b");
            `relative` the relative difference where there is one. A metrics row has `round`, `scope`, `client`, `step`,
            `split`, `name`, `column` (value or weight); others `key`, `client`, `model` and `tensor`, `row` and `array`.
    """

    agree: bool
    parts: list[tuple[str, bool, str]]
    first: dict[str, Any] | None

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.parts)
        lines = [
            f"{name:{width}s}  {'agrees ' if agrees else 'differs'}  {text}".rstrip()
            for name, agrees, text in self.parts
        ]
        if self.first is not None:
            lines += ["", *_in_full(self.first)]
        return "\n".join(_printable(line) for line in lines)


@dataclass(frozen=True)
class _Common:
    """What two configs and plans leave to compare, and how far apart values may lie.

    Attributes:
        rounds: up to which round; None = all.
        sparse: rows were scored at other places.
        regrouped: other clients or rows went through the base together, which decides how much padding was computed.
        rtol, atol: tolerances.
    """

    rounds: int | None
    sparse: bool
    regrouped: bool
    rtol: float
    atol: float


@dataclass(frozen=True)
class _Found:
    """Of one part: whether it agrees, a line about it, its first difference."""

    agrees: bool
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
        What agrees and what does not. Plans (lanes, threads, micro-batch) that differ are said and are no difference by
        themselves: they decide the last bits, and those are in the other parts. So are `rounds` (the rounds that both
        have are compared, models and predictions are not) and the evaluation frequency (the rows and the last models
        that both have are compared; those that validation chose are not).

    Raises:
        UserError: a path is not one run's folder, a file in it is damaged, or a tolerance is negative.
    """
    for key, value in (("rtol", rtol), ("atol", atol)):
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"{key}: {value!r} is no tolerance; give 0 or a small number such as 1e-6")
    one, other = _one_run(a), _one_run(b)
    config, rounds, sparse = _config(one, other)
    plan, regrouped = _plan(one, other)
    common = _Common(rounds, sparse, regrouped, rtol, atol)
    found = {
        "config": config,
        "plan": plan,
        "partition": _partition(one, other),
        "metrics": _metrics(one, other, common),
        "models": _models(one, other, common),
        "predictions": _predictions(one, other, common),
        "scores": _scores(one, other, common),
    }
    order = ["metrics", *found]
    first = next(({"part": name, **found[name].first} for name in order if found[name].first is not None), None)
    return Difference(first is None, [(name, part.agrees, part.text) for name, part in found.items()], first)


def _one_run(path: PathLike) -> Path:
    found = find_runs(path)
    if len(found) > 1:
        raise UserError(f"{str(path)!r} holds {len(found)} runs; give the folder of one, such as {str(found[0])!r}")
    warn_of_damage(found[0], *(name for name in recorded(found[0]) if not name.startswith("metrics")))
    warn_of_damaged_rows(found[0])
    return found[0]


# ----------------------------------------------------------------------------------------------- config, plan, partition


def _config(a: Path, b: Path) -> tuple[_Found, int | None, bool]:
    """The keys that differ; up to which round to compare (None = all of them); whether rows were scored at other places."""
    flat = [flatten_config(_read_config(folder)) for folder in (a, b)]
    ids = {folder.resolve().name for folder in (a, b)}
    # The id hashes what the numbers depend on, data and model by content: the same id, the same content.
    same_id = len(ids) == 1 and re.fullmatch("[0-9a-f]{12}", *ids) is not None
    rounds, differ, said, frequency = None, [], [], []
    for key in dict.fromkeys(key for one in flat for key in one):
        one, other = (each.get(key) for each in flat)
        there = [key in each for each in flat]
        if (there[0] == there[1] and _equal(one, other)) or key.split(".")[0] in _NO_NUMBER:
            continue
        shown = f"{key} " + " / ".join(_short(v) if t else "(no key)" for v, t in zip((one, other), there, strict=True))
        if key == "rounds" and isinstance(one, int) and isinstance(other, int):
            rounds = min(one, other)
            said.append(f"{shown}: rounds up to {rounds} are compared")
        elif key in _FREQUENCY:
            frequency.append(shown)
        elif key in _LAST_BITS or (same_id and (key in _PATHS or not all(there))):
            said.append(shown)
        else:
            differ.append((shown, {"key": key, "a": one, "b": other}))
    if frequency:
        said.append(f"{_listed(frequency)}: rows that both have are compared")
    text = f"{_plural(len(differ), 'key differs', 'keys differ')}: {_listed(s for s, _ in differ)}" if differ else ""
    text = "; ".join([*([text] if text else []), *said])
    return _Found(not differ, text, differ[0][1] if differ else None), rounds, bool(frequency)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return read_config(folder)
    except UnicodeDecodeError as error:
        why = f"not UTF-8 text ({error.reason} at byte {error.start})"
        raise UserError(f"{folder / 'config.yaml'}: {why}; restore the file") from None


def _plan(a: Path, b: Path) -> tuple[_Found, bool]:
    """What decides the last bits; whether packs or micro-batches were formed otherwise."""
    plans, places = [_json(f / "plan.json") for f in (a, b)], [_json(f / "environment.json") for f in (a, b)]
    if missing := [name for name, plan in zip("ab", plans, strict=True) if not plan]:
        return _Found(True, f"no plan.json in {' and '.join(missing)}"), False
    pairs = [(key, *(plan.get(key) for plan in plans)) for key in _PLAN if all(key in plan for plan in plans)]
    pairs.append(("torch", *((place.get("versions") or {}).get("torch") for place in places)))
    pairs.append(("cpu", *(place.get("cpu") for place in places)))
    kinds = [sorted({str(d).split(":")[0] for d in place.get("devices") or []}) for place in places]
    pairs.append(("device", *("+".join(kind) or None for kind in kinds)))
    differ = [(key, x, y) for key, x, y in pairs if x != y and (key in _PLAN or None not in (x, y))]
    promised = [place.get("deterministic") for place in places]
    loose = any(isinstance(about, dict) and about.get("promised") is False for about in promised)
    said = "; a device does not promise the last bits: see environment.json" if loose else ""
    if differ:
        text = "; ".join(f"{key} {_short(x)} / {_short(y)}" for key, x, y in differ) + ": the last bits may differ"
        return _Found(True, text + said), any(key in _GROUPS for key, _, _ in differ)
    known = [f"{key} {x}" for key, x, _ in pairs if key in ("threads", "lanes", "micro_batch")]
    return _Found(True, ", ".join(known) + said), False


def _partition(a: Path, b: Path) -> _Found:
    parts = [_read_partition(folder / "partition.npz") for folder in (a, b)]
    if (missing := _missing(parts, "partition.npz")) is not None:
        return missing
    one, other = parts
    least, most = sorted(part.num_clients for part in parts)
    differing = _clients_that_differ(one, other, least)
    # Of virtual clients, which may be a million, only the first that differs is looked for.
    first = next(differing, None)
    if first is None and least == most:
        return _Found(True, f"{_plural(least, 'client', 'clients')}, {len(one.all_rows())} rows")
    sizes = f"{one.num_clients} / {other.num_clients} clients; " if least != most else ""
    if first is None:
        only, longer = ("a", one) if one.num_clients == most else ("b", other)
        text = f"{sizes}the first {least} hold the same rows"
        return _Found(False, text, {"client": longer.name(least), "only": only})
    client = " / ".join(dict.fromkeys([one.name(first), other.name(first)]))
    if isinstance(one, VirtualPartition) or isinstance(other, VirtualPartition):
        text = f"{sizes}the first client that holds other rows is {client}"
    else:
        text = f"{sizes}{1 + sum(1 for _ in differing)} of {least} clients hold other rows, the first is {client}"
    rows = {side: part.rows(first).tolist() for side, part in zip("ab", parts, strict=True)}
    return _Found(False, text, {"client": client, **rows})


def _clients_that_differ(
    a: Partition | VirtualPartition, b: Partition | VirtualPartition, clients: int
) -> Iterator[int]:
    if isinstance(a, VirtualPartition) and isinstance(b, VirtualPartition):
        same = (a.key, a.min_rows, a.max_rows) == (b.key, b.min_rows, b.max_rows)
        if same and np.array_equal(a.kept, b.kept):
            return  # rows are a function of these
    for client in range(clients):
        if a.name(client) != b.name(client) or not np.array_equal(a.rows(client), b.rows(client)):
            yield client


def _read_partition(file: Path) -> Partition | VirtualPartition | None:
    arrays = _arrays(file)
    try:
        return None if arrays is None else Partition.from_arrays(arrays)
    except UserError as error:
        raise UserError(f"{file}: {error}; {_WAY_OUT}") from None


# ------------------------------------------------------------------------------------------------------ metrics


def _metrics(a: Path, b: Path, common: _Common) -> _Found:
    (one, torn_a), (other, torn_b) = _rows(a, common), _rows(b, common)
    both = one.merge(other, how="outer", on=_KEYS, suffixes=("_a", "_b"), indicator="where")
    matched = both["where"] == "both"
    differs, relative = {}, {}
    for column in ("value", "weight"):
        pair = (both.loc[matched, f"{column}_{side}"].to_numpy(float) for side in "ab")
        differs[column], relative[column] = _apart(*pair, common)
    apart = differs["value"] | differs["weight"]
    rows = both[matched][apart].assign(
        column=np.where(differs["value"], "value", "weight")[apart],
        relative=np.where(differs["value"], relative["value"], relative["weight"])[apart],
    )
    lonely = both[~matched]
    # Scored at other places: of another frequency; of another number of rounds the last one's, a client's in its last
    # cohort, the model's that was chosen. What training says of itself both have.
    excused = (lonely["split"] != "train") & (common.sparse or common.rounds is not None)
    alone = lonely[~excused]
    twice = [_repeated(folder, frame, torn, common) for folder, frame, torn in ((a, one, torn_a), (b, other, torn_b))]
    said = []
    if len(rows):
        largest = rows.groupby(rows["name"].astype(str), sort=True)["relative"].agg(["max", "size"])
        largest = largest.sort_values("max", ascending=False, kind="stable")
        said.append(f"{len(rows)} of {_plural(int(matched.sum()), 'row', 'rows')} differ")
        by_name = (f"{name} {worst:.2g} ({count})" for name, worst, count in largest.itertuples())
        said.append(f"largest relative difference (rows): {_listed(by_name)}")
    else:
        agree = "agree within the tolerance" if common.rtol or common.atol else "agree"
        said.append(f"{_plural(int(matched.sum()), 'row', 'rows')} {agree}")
    for side, label in (("a", "left_only"), ("b", "right_only")):
        if count := int((alone["where"] == label).sum()):
            said.append(f"{count} only in {side}")
        if count := int((lonely["where"] == label).sum()) - count:
            said.append(f"{count} only in {side}, not compared")
    for side, keys in zip("ab", twice, strict=True):
        if keys:
            said.append(f"{_plural(len(keys), 'row', 'rows')} in {side} more than once, the last of each holds")
    said += ["computed_tokens not compared: another plan"] if common.regrouped else []
    said += [text for text in (torn_a, torn_b) if text]
    first = _first_row(pd.concat([rows, alone]))
    if first is None:  # a row that one run holds once more than the other
        counts = [Counter(keys) for keys in twice]
        more = [(side, key) for side, i in (("a", 0), ("b", 1)) for key in counts[i] - counts[1 - i]]
        if more:
            first = {**dict(zip(_KEYS, more[0][1], strict=True)), "only": more[0][0], "repeated": True}
    return _Found(first is None, "; ".join(said), first)


def _rows(folder: Path, common: _Common) -> tuple[pd.DataFrame, str]:
    """The rows that can be compared, and what there is to say of a torn last line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frame = load_runs(folder)[[*_KEYS, "value", "weight"]]
    frame = frame.astype(dict.fromkeys(("scope", "split", "name"), object))
    kept = ~frame["name"].isin([name for name in frame["name"].unique() if _left_out(name, common)])
    if common.rounds is not None:
        kept &= frame["round"] <= common.rounds
    torn = [str(w.message) for w in caught if "torn" in str(w.message)]
    return frame[kept.astype(bool)], torn[0] if torn else ""


def _left_out(name: str, common: _Common) -> bool:
    """Whether a metric is not compared."""
    return _MEASURED.fullmatch(name) is not None or (common.regrouped and name == "computed_tokens")


def _repeated(folder: Path, frame: pd.DataFrame, torn: str, common: _Common) -> list[tuple[Any, ...]]:
    """Keys of rows that are there a second time, in the order of the file."""
    text = "\n".join(f.read_bytes().decode("utf-8", errors="replace") for f in metrics_files(folder))
    lines = [x for x in text.split("\n") if x.strip()]
    if len(lines) - bool(torn) == len(frame):
        return []
    seen: set[tuple[Any, ...]] = set()
    out = []
    for line in lines[: len(lines) - bool(torn)]:
        row = json.loads(line)
        key = tuple(row.get(k) for k in _KEYS)
        if _left_out(row["name"], common) or (common.rounds is not None and row["round"] > common.rounds):
            continue
        if key in seen:
            out.append(key)
        seen.add(key)
    return out


def _first_row(rows: pd.DataFrame) -> dict[str, Any] | None:
    """The first in the order round, scope, client (the merged model after its clients), step, split, name.

    Test rows come after all others: they carry the round of the chosen model but are scored when the run is over, so
    another choice would look like a difference in that round.
    """
    if rows.empty:
        return None
    late = rows["split"] == "test"
    rows = rows[late] if late.all() else rows[~late]
    rows = rows[rows["round"] == rows["round"].min()]

    def order(row: Any) -> tuple[Any, ...]:
        scope = (SCOPES.index(row.scope), "") if row.scope in SCOPES else (len(SCOPES), row.scope)
        split = (_SPLITS.index(row.split), "") if row.split in _SPLITS else (len(_SPLITS), row.split)
        client = (pd.isna(row.client), _natural("" if pd.isna(row.client) else str(row.client)))
        return scope, client, -1 if pd.isna(row.step) else int(row.step), split, row.name

    row = min(rows.itertuples(index=False), key=order)
    key = {k: None if pd.isna(getattr(row, k)) else getattr(row, k) for k in _KEYS}
    key |= {k: int(key[k]) for k in ("round", "step") if key[k] is not None}
    if row.where == "both":
        sides = {side: float(getattr(row, f"{row.column}_{side}")) for side in "ab"}
        return {**key, "column": row.column, **sides, "relative": float(row.relative)}
    side = "a" if row.where == "left_only" else "b"
    return {**key, "only": side, side: float(getattr(row, f"value_{side}"))}


# ------------------------------------------------------------------------------------------------------- models


def _models(a: Path, b: Path, common: _Common) -> _Found:
    if common.rounds is not None:
        return _Found(True, "not compared: they are of other rounds")
    one, other = _tensors(a, common), _tensors(b, common)
    keys = sorted({*one, *other}, key=lambda k: (_MODELS.index(k[0].split("/")[0]), *map(_natural, k)))
    if not keys:
        return _Found(True, "neither run holds any")
    first, differ, largest = None, 0, 0.0
    lonely = {"a": 0, "b": 0}
    for key in keys:
        where = {"model": key[0], "tensor": key[2]}
        if key not in one or key not in other:
            side = "a" if key in one else "b"
            lonely[side] += 1
            first = first or {**where, "only": side}
            continue
        found = _tensor_difference(one[key], other[key], common)
        if found is not None:
            differ, first = differ + 1, first or {**where, **found}
            largest = max(largest, found["relative"] or 0.0)
    compared = len(keys) - sum(lonely.values())
    models = len({key[0] for key in keys})
    said = [f"{differ} of {_plural(compared, 'tensor', 'tensors')} differ"] if differ else []
    if not differ and compared:
        said.append(f"{_plural(compared, 'tensor', 'tensors')} of {_plural(models, 'model', 'models')}")
    said += [f"largest relative difference {largest:.2g}"] if differ and largest else []
    said += [f"{_plural(count, 'tensor', 'tensors')} only in {side}" for side, count in lonely.items() if count]
    said += ["chosen models not compared: another evaluation frequency"] if common.sparse else []
    return _Found(first is None, "; ".join(said), first)


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies: its type as safetensors names it, its shape, and its bytes in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def _tensors(run: Path, common: _Common) -> dict[tuple[str, str, str], _Tensor]:
    """(model, file, tensor) -> where it lies, of the models of a run; the shards of a large model are one file."""
    out, clients = {}, client_folders(run)
    for file in sorted(f for top in _MODELS for f in (run / top).rglob("*.safetensors")):
        place = file.parent.relative_to(run)
        chosen = place.parts in (("best",), ("central", "best")) or (len(place.parts) == 3 and place.name == "best")
        if (chosen and common.sparse) or any(part.startswith(".") for part in (*place.parts, file.name)):
            continue
        stem = re.sub(r"-\d+-of-\d+$", "", file.stem)
        for name, tensor in _header(file).items():
            out[model_name(place.as_posix(), clients), stem, name] = tensor
    return out


def _header(file: Path) -> dict[str, _Tensor]:
    """The tensors of a safetensors file: eight bytes with the header's length, the header as JSON, the tensors' bytes.

    Read here, since NumPy has no type for some of them, such as bfloat16.
    """
    try:
        with file.open("rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
            size = file.stat().st_size
            header = json.loads(handle.read(start - 8)) if start <= size else {"": "cut off"}
        out = {}
        for name, about in header.items():
            if name != "__metadata__":
                begin, end = (start + int(offset) for offset in about["data_offsets"])
                out[name] = _Tensor(file, str(about["dtype"]), tuple(map(int, about["shape"])), begin, end)
        sound = all(start <= t.begin <= t.end <= size for t in out.values())
        sound = sound and all(
            t.end - t.begin == math.prod(t.shape) * np.dtype(_TYPES[t.dtype]).itemsize
            for t in out.values()
            if t.dtype in _TYPES
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{file}: not a whole safetensors file; {_WAY_OUT}")
    return out


def _tensor_difference(a: _Tensor, b: _Tensor, common: _Common) -> dict[str, Any] | None:
    """Both sides and the relative difference, or None where they agree."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return {"a": str(a), "b": str(b), "relative": None}
    if a.begin == a.end:
        return None
    raw = [np.memmap(tensor.file, mode="r")[tensor.begin : tensor.end] for tensor in (a, b)]
    cuts = range(0, a.end - a.begin, _CHUNK)
    if all(np.array_equal(raw[0][i : i + _CHUNK], raw[1][i : i + _CHUNK]) for i in cuts):
        return None
    if a.dtype not in _TYPES and a.dtype != "BF16":
        return {"a": f"{a}, other bytes", "b": str(b), "relative": None}
    sums = np.zeros(3)  # of the squares of a - b, a, b
    for i in cuts:
        x, y = (_numbers(part[i : i + _CHUNK], a.dtype) for part in raw)
        with np.errstate(invalid="ignore", over="ignore"):
            same = (x == y) | ((x != x) & (y != y))
            gap = np.where(same, 0, x - y)
            finite = [np.where(np.isfinite(v), v, 0) for v in (x, y)]
            sums += [float(np.sum(np.abs(v) ** 2)) for v in (gap, *finite)]
    gap, *norms = np.sqrt(sums).tolist()
    known = math.isfinite(gap) and all(map(math.isfinite, norms))
    whole = a.dtype != "BF16" and np.dtype(_TYPES[a.dtype]).kind in "iub"  # whole numbers are the same or are not
    # Without a gap these are other bits of the same numbers: 0 and -0, or two kinds of NaN.
    if known and not whole and gap <= common.atol + common.rtol * max(norms):
        return None
    sides = {side: f"norm {norm!r}" for side, norm in zip("ab", norms, strict=True)}
    return {**sides, "relative": math.inf if not known else gap / max(norms) if gap else 0.0}


def _numbers(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes as float64 (complex128 for complex ones)."""
    if dtype == "BF16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(_TYPES[dtype]).astype(np.complex128 if dtype == "C64" else np.float64)


# -------------------------------------------------------------------------------------------- predictions and scores


def _predictions(a: Path, b: Path, common: _Common) -> _Found:
    """`predictions.csv`: the words that the chosen models predict, by row and model."""
    if common.rounds is not None or common.sparse:
        return _Found(True, "not compared: " + ("other rounds" if common.rounds else "another evaluation frequency"))
    tables = [_table(folder / "predictions.csv") for folder in (a, b)]
    if (missing := _missing(tables, "predictions.csv")) is not None:
        return missing
    first, by_model = None, Counter()
    for i, (one, other) in enumerate(itertools.zip_longest(*tables)):
        if one is None or other is None:
            side = "b" if one is None else "a"
            by_model[f"rows only in {side}"] += 1
            first = first or {"row": (one or other).get("row", str(i)), "only": side}
            continue
        for column in dict.fromkeys([*one, *other]):
            if one.get(column) != other.get(column):
                by_model[str(column)] += 1
                sides = {"a": one.get(column), "b": other.get(column)}
                first = first or {"row": one.get("row", str(i)), "model": str(column), **sides}
    if first is None:
        return _Found(True, _plural(len(tables[0]), "test row", "test rows"))
    counted = _listed(f"{model} {n}" for model, n in by_model.items())
    return _Found(False, f"words that differ, of {_plural(len(tables[0]), 'test row', 'test rows')}: {counted}", first)


def _scores(a: Path, b: Path, common: _Common) -> _Found:
    """`scores.npz`: each model's loss and prediction by row."""
    if common.rounds is not None:
        return _Found(True, "not compared: other rounds")
    one, other = (_arrays(folder / "scores.npz") for folder in (a, b))
    if (missing := _missing([one, other], "scores.npz")) is not None:
        return missing
    names = [n for n in dict.fromkeys([*one, *other]) if not (common.sparse and n.startswith("chosen_"))]
    said, first = [], None
    for name in names:
        x, y = one.get(name), other.get(name)
        if x is None or y is None:
            side = "b" if x is None else "a"
            said.append(f"{name} only in {side}")
            first = first or {"array": name, "only": side}
        elif x.shape != y.shape or (x.dtype.kind == "U") != (y.dtype.kind == "U"):
            shapes = [f"{v.dtype} {list(v.shape)}" for v in (x, y)]
            said.append(f"{name} {' / '.join(shapes)}")
            first = first or {"array": name, "a": shapes[0], "b": shapes[1]}
        else:
            floats = x.dtype.kind == "f" and y.dtype.kind == "f"
            differs, relative = _apart(x, y, common) if floats else (np.asarray(x != y), None)
            if differs.any():
                worst = f", at most {relative[differs].max():.2g}" if floats else ""
                said.append(f"{name} {int(differs.sum())} of {differs.size}{worst}")
                if first is None:
                    at = tuple(int(i) for i in np.argwhere(differs)[0])
                    first = {"array": name, **_place(one, name, at), "a": x[at].item(), "b": y[at].item()}
                    first |= {"relative": float(relative[at])} if floats else {}
    text = _listed(said) if said else _plural(len(names), "array", "arrays")
    left_out = "; chosen models not compared: another evaluation frequency" if common.sparse else ""
    return _Found(first is None, text + left_out, first)


def _place(arrays: dict[str, np.ndarray], name: str, at: tuple[int, ...]) -> dict[str, Any]:
    """Which model and row of the data a place in an array of `scores.npz` stands for."""
    if len(at) != 2:
        return {"index": list(at)}
    rows = arrays.get("test_rows" if name.startswith("chosen_") else "validation_rows")
    names = arrays.get("names")
    known = names is not None and rows is not None and at[0] < len(names) and at[1] < len(rows)
    return {"model": str(names[at[0]]), "row": int(rows[at[1]])} if known else {"index": list(at)}


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


def _missing(sides: list[Any], name: str) -> _Found | None:
    """What to say where a file is not in both folders; None where it is."""
    there = [side for side, value in zip("ab", sides, strict=True) if value is not None]
    if len(there) == 2:
        return None
    if not there:
        return _Found(True, f"neither run holds {name}")
    return _Found(False, f"{name} only in {there[0]}", {"file": name, "only": there[0]})


def _table(file: Path) -> list[dict[str, str]] | None:
    """The rows of a CSV file by column, or None where there is none."""
    if not file.is_file():
        return None
    text = file.read_bytes().decode("utf-8", errors="replace")
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UserError(f"{file}: not readable ({error}); {_WAY_OUT}") from None


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


def _arrays(file: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an `.npz` file, or None where there is none."""
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except DAMAGED_ARRAYS as error:
        why = " ".join(str(error).split())
        raise UserError(f"{file}: not readable ({why}); {_WAY_OUT}") from None


def _equal(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)


def _natural(text: str) -> tuple[Any, ...]:
    """site-2 before site-10."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text)))


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plural(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _listed(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _printable(text: str) -> str:
    """Client ids and words come from data: control characters in them are shown, not sent to the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
