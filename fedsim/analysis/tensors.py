"""Comparing the tensors of two runs, piece by piece and without torch, by their 2-norms."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.core.errors import UserError
from fedsim.core.files import OWN, client_folders, model_name

MODELS = ("global", "best", "central", "local", OWN)
_TYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "C64": np.complex64, "BOOL": np.bool_},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
}
_CHUNK = 1 << 24  # bytes of a tensor that are looked at together


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type as safetensors names it, its shape, and the place of its bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    def fits(self, start: int, size: int) -> bool:
        """Whether its bytes are in the file and as many as its shape needs."""
        known = self.dtype in _TYPES
        whole = not known or self.end - self.begin == math.prod(self.shape) * np.dtype(_TYPES[self.dtype]).itemsize
        return start <= self.begin <= self.end <= size and whole


def stored_tensors(run: Path, chosen: bool = True) -> dict[tuple[str, str, str], StoredTensor]:
    """(model, file, tensor) -> where it is, of the models of a run; the shards of a large model are one file.

    Args:
        run: the run's folder.
        chosen: with the models that validation chose.
    """
    out, clients = {}, client_folders(run)
    for file in sorted(f for top in MODELS for f in (run / top).rglob("*.safetensors")):
        place = file.parent.relative_to(run)
        is_chosen = place.parts in (("best",), ("central", "best")) or (len(place.parts) == 3 and place.name == "best")
        if (is_chosen and not chosen) or any(part.startswith(".") for part in (*place.parts, file.name)):
            continue
        stem = re.sub(r"-\d+-of-\d+$", "", file.stem)
        for name, tensor in _header(file).items():
            out[model_name(place.as_posix(), clients), stem, name] = tensor
    return out


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: eight bytes with the header's length, the header as JSON, the tensors' bytes.

    Read here, since NumPy has no type for some of them, such as bfloat16.
    """
    try:
        with file.open("rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
            size = file.stat().st_size
            header = json.loads(handle.read(start - 8)) if start <= size else {"": "cut off"}
        header.pop("__metadata__", None)
        out = {}
        for name, about in header.items():
            begin, end = (start + int(offset) for offset in about["data_offsets"])
            out[name] = StoredTensor(file, str(about["dtype"]), tuple(map(int, about["shape"])), begin, end)
        sound = all(tensor.fits(start, size) for tensor in out.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{file}: not a whole safetensors file; put it back, or delete the run and make it again")
    return out


def tensor_difference(a: StoredTensor, b: StoredTensor, rtol: float, atol: float) -> dict[str, Any] | None:
    """Both sides and the relative difference of norms, or None where ||a - b|| <= atol + rtol max(||a||, ||b||)."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return {"a": str(a), "b": str(b), "relative": None}
    if a.begin == a.end:
        return None
    raw = [np.memmap(tensor.file, mode="r")[tensor.begin : tensor.end] for tensor in (a, b)]
    pieces = [[part[i : i + _CHUNK] for part in raw] for i in range(0, a.end - a.begin, _CHUNK)]
    if all(np.array_equal(*piece) for piece in pieces):
        return None
    if a.dtype not in _TYPES and a.dtype != "BF16":
        return {"a": f"{a}, other bytes", "b": str(b), "relative": None}
    sums = np.zeros(3)  # of the squares of a - b, a, b
    for piece in pieces:
        x, y = (_numbers(part, a.dtype) for part in piece)
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.where((x == y) | ((x != x) & (y != y)), 0, x - y)
            finite = [np.where(np.isfinite(v), v, 0) for v in (x, y)]
            sums += [float(np.sum(np.abs(v) ** 2)) for v in (gap, *finite)]
    gap, *norms = np.sqrt(sums).tolist()
    known = math.isfinite(gap) and all(map(math.isfinite, norms))
    whole = a.dtype != "BF16" and np.dtype(_TYPES[a.dtype]).kind in "iub"  # whole numbers are the same or are not
    # Without a gap these are other bits of the same numbers: 0 and -0, or two kinds of NaN.
    if known and not whole and gap <= atol + rtol * max(norms):
        return None
    sides = {side: f"norm {norm!r}" for side, norm in zip("ab", norms, strict=True)}
    return {**sides, "relative": math.inf if not known else gap / max(norms) if gap else 0.0}


def _numbers(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes as float64 (complex128 for complex ones)."""
    if dtype == "BF16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(_TYPES[dtype]).astype(np.complex128 if dtype == "C64" else np.float64)
