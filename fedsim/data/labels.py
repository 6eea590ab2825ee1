"""Label words, the class of each example, and a split by classes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from fedsim.core.errors import Notice, UserError, nearest_first
from fedsim.core.seeding import stream
from fedsim.data.files import header_hint
from fedsim.data.memory import Table


def sound(text: str) -> bool:
    """Whether text can be written as UTF-8: JSON can hold halves of characters, which no tokenizer or file takes."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def missing(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or (isinstance(value, float) and np.isnan(value))


def words_of(values: list[Any], path: str) -> list[str]:
    words = sorted({_word(v, row, path) for row, v in enumerate(values) if not missing(v)} - {""})
    if len(words) < 2:
        raise UserError(
            f"data.columns.label: the label column of {path!r} holds {len(words)} different value(s){f', {words[0]!r}' if words else ''}; classification needs two or more: name the right column, or list data.labels"
        )
    if len(words) > 1000:
        raise UserError(
            f"data.columns.label: the label column of {path!r} holds {len(words)} different values; name the right column, or list data.labels"
        )
    return words


def _word(value: Any, row: int, of: str) -> str:
    if isinstance(value, (dict, list, tuple, bytes, np.ndarray)) or (
        isinstance(value, str) and ("\0" in value or not sound(value))
    ):
        problem = f"row {row + 1} of {of!r} has {str(value)[:60]!r}, which is no label"
        raise UserError(f"data.columns.label: {problem}; write a word or a whole number")
    # A column of whole numbers with a gap in it comes back as floats: 1.0 means 1.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def classes_of(
    frame: Table, column: str, labels: list[str] | dict[str, str], split: str, file: str | None
) -> np.ndarray:
    """Class of each example; `labels` are the words in order, or what the file holds -> word."""
    of = repr(file) if file else split
    if column not in frame.columns:
        raise UserError(
            f"data.columns.label: {column!r} is no column of {of}, which has: {nearest_first(column, frame.columns)}{header_hint(file)}; the {split} rows need it too"
        )
    mapped = isinstance(labels, dict)
    words = list(dict.fromkeys(labels.values())) if mapped else labels
    number = {w: i for i, w in enumerate(words)}
    index = {held: number[w] for held, w in labels.items()} if mapped else number
    values = [None if missing(v) else _word(v, i, file or split) or None for i, v in enumerate(frame.values[column])]
    numbered = all(v is not None and v.isdecimal() and len(v) < 10 for v in values)
    counted = numbered and not mapped and not any(v in index for v in values)
    if counted:
        index |= {v: int(v) for v in set(values) if int(v) < len(words)}
    out = np.empty(len(values), dtype=np.int64)
    for i, value in enumerate(values):
        if value not in index:
            shown = "empty" if value is None else repr(value)
            way = "put the row right, or list all labels"
            if value is not None and value.isdecimal() and not mapped:
                count = f"numbers count data.labels from 0, so {len(words)} labels are 0 to {len(words) - 1}"
                way = f"{count}; where the file counts otherwise, map what it holds: labels={{{value}: WORD, ...}}"
            raise UserError(
                f"data.columns.label: row {i + 1} of {of} has the label {shown}; data.labels has: {nearest_first(value or '', labels)}; {way}"
            )
        out[i] = index[value]
    if counted and split == "train" and "0" not in values:
        way = "where the file counts from 1, map what it holds: labels={1: WORD, ...}"
        said = f"data.labels: numbers count them from 0, and no row of {of} has 0 ({words[0]}); {way}"
        warnings.warn(said, Notice, stacklevel=2)
    return out


def hold_out(n: int, classes: np.ndarray | None, fractions: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Examples of train and of each held-out split, ascending; classes are spread alike over the splits."""
    rng = stream(seed, "hold out")
    order = rng.permutation(n)
    if classes is not None:
        # Sorting a shuffled order by its rank inside the class, relative to the class's size, interleaves the classes.
        rank = np.empty(n)
        for c in np.unique(classes):
            own = order[classes[order] == c]
            rank[own] = (np.arange(len(own)) + rng.random()) / len(own)
        order = order[np.argsort(rank[order], kind="stable")]
    out, start = {}, 0
    for name, fraction in fractions.items():
        size = max(1, round(fraction * n)) if fraction > 0 else 0
        out[name] = np.sort(order[start : start + size])
        start += size
    out["train"] = np.sort(order[start:])
    return out
