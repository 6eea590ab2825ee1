"""From the partition section to the examples of each client."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from fedsim.config.experiment import Experiment
from fedsim.core.errors import UserError, nearest_first
from fedsim.core.seeding import stream
from fedsim.core.user_code import UserCode, errors_of
from fedsim.data.dealing import by_name, site_rows
from fedsim.data.labels import missing, sound
from fedsim.data.partition import Partition, VirtualPartition
from fedsim.data.partitioners import ByColumn, ClassCounts
from fedsim.data.skew import measure
from fedsim.data.sources import Source, Split

CENTRAL = "central"


def _classes(exp: Experiment, source: Source) -> tuple[dict[str, np.ndarray], list[str]]:
    """Split -> class of each example, by which clients are divided and skew is measured; and the classes' names."""
    by, needed = getattr(exp.partition, "by", None), hasattr(exp.partition, "by")
    train = source.splits["train"]
    if not needed and exp.data.name == "instructions":
        by = "source"  # nothing is divided by it: skew is measured by it, and validation examples are dealt by it
    if by is not None:
        if by not in train.columns:
            raise UserError(f"partition.by: {by!r} is no column; the data has: {nearest_first(by, train.columns)}")
        names = sorted({str(v) for v in train.columns[by]})
        index = {n: i for i, n in enumerate(names)}
        return {
            s: np.array([index.get(str(v), -1) for v in split.columns.get(by, [])], dtype=np.int64)
            for s, split in source.splits.items()
        }, names
    if source.labels is not None:
        return {s: split.labels for s, split in source.splits.items()}, source.labels
    if needed:
        raise UserError(
            f"partition.by: null, but these examples have no classes to divide by; name one of: {', '.join(train.columns)}"
        )
    return {s: np.zeros(len(split), dtype=np.int64) for s, split in source.splits.items()}, ["rows"]


def divide(
    exp: Experiment, source: Source, kept: dict[str, np.ndarray]
) -> tuple[Partition | VirtualPartition, Partition | None, dict[str, Any]]:
    """Clients -> training and validation examples of those kept, and the report."""
    classes, names = _classes(exp, source)
    draw, rng = exp.partition, stream(exp.seed, "partition")
    train, held, held_kept = classes["train"][kept["train"]], classes["validation"], kept["validation"]
    if isinstance(draw, ByColumn):
        partition = draw(_ids(exp, source.splits["train"], kept["train"]))
    elif isinstance(draw.name, UserCode):
        with errors_of(draw.name, "partition.name"):
            made = draw(train, rng)
        partition = Partition.given(made, len(train), draw.name.wanted)
    else:
        if isinstance(draw, ClassCounts):
            _check_counts(draw.counts, names)
        partition = draw(train, rng)
    report = {**measure(partition, train, len(names)), "class_names": names, "partitioner": draw.name}
    if isinstance(partition, VirtualPartition):  # validation examples dealt to a million clients would be none for most
        return dataclasses.replace(partition, kept=kept["train"][partition.kept]), None, report
    if CENTRAL in (partition.names or ()):
        raise UserError(f"partition: a client is named {CENTRAL!r}, as the centralized run is; rename it in the data")
    if isinstance(draw, ByColumn):
        validation = source.splits["validation"]
        _check_ids(validation, draw.column, "validation", held_kept)
        there = validation.columns.get(draw.column, [])
        own = by_name([str(there[r]) for r in held_kept] if there else [], partition.names)
    else:
        held_kept = held_kept[held[held_kept] >= 0] if len(held) else held_kept[:0]
        own = site_rows(partition, train, held[held_kept], stream(exp.seed, "site validation"))
    partition = dataclasses.replace(partition, indices=kept["train"][partition.indices])
    return partition, dataclasses.replace(own, indices=held_kept[own.indices]), report


def _ids(exp: Experiment, train: Split, kept: np.ndarray) -> list[Any]:
    """The clients' ids of the training examples that are kept.

    Raises:
        UserError: if a value names no client, or a client is left without an example.
    """
    column = exp.partition.column
    if column not in train.columns:
        raise UserError(
            f"partition.column: {column!r} is no column; the data has: {nearest_first(column, train.columns)}"
        )
    ids = train.columns[column]
    _check_ids(train, column, "train", range(len(train)))
    held = [ids[r] for r in kept]
    counts = Counter(map(str, ids))
    if gone := sorted(counts.keys() - set(map(str, held))):
        others = f" ({len(gone)} such clients)" if len(gone) > 1 else ""
        way = f"none fits data.max_length={exp.data.max_length} with data.too_long={exp.data.too_long} and has text and an answer"
        raise UserError(
            f"partition.column: client {gone[0]!r} is left without an example{others}: of its {counts[gone[0]]} {way}; change these keys, or take them out"
        )
    return held


def _check_ids(split: Split, column: str, name: str, rows: Iterable[int]) -> None:
    for row in rows if column in split.columns else ():
        value = split.columns[column][row]
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        named = isinstance(value, str) and value.strip() and not value.endswith("\0") and sound(value)
        if not whole and not named:
            shown = "nothing" if missing(value) else repr(value)[:60]
            way = "every example needs an id, text that is not blank or a whole number"
            raise UserError(f"partition.column: {split.place(row, name)} has {shown} in {column!r}; {way}")


def _check_counts(counts: list[list[int]], names: list[str]) -> None:
    for i, row in enumerate(counts):
        if len(row) != len(names):
            raise UserError(
                f"partition.counts[{i}]: {row!r} has {len(row)} counts for {len(names)} classes: {', '.join(names)}"
            )
