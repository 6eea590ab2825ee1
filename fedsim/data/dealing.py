"""From counts to examples: who owns which, once it is settled how many each client gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsim.data.partition import Partition


def from_owner(
    owner: np.ndarray, num_clients: int, names: tuple[str, ...] | None = None, notes: dict[str, Any] | None = None
) -> Partition:
    """owner: client of each example, int64 `[n]`, -1 where no client holds it."""
    unowned = int((owner < 0).sum())
    sizes = np.bincount(owner[owner >= 0], minlength=num_clients)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Partition(offsets, np.argsort(owner, kind="stable")[unowned:], names, notes or {})


def by_name(keys: Sequence[str], names: Sequence[str]) -> Partition:
    """Each client gets the examples whose key is its name; others go to nobody."""
    number = {name: client for client, name in enumerate(names)}
    owner = np.fromiter((number.get(key, -1) for key in keys), dtype=np.int64, count=len(keys))
    return from_owner(owner, len(names), tuple(names))


def deal(codes: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Owner of each example, int64 `[n]`: client c gets `counts[c, l]` random examples of class l. codes: their classes."""
    owner = np.full(codes.size, -1, dtype=np.int64)
    by_class = np.argsort(codes, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=counts.shape[1]))])
    for label in range(counts.shape[1]):
        rows = rng.permutation(by_class[starts[label] : starts[label + 1]])
        takers = np.repeat(np.arange(counts.shape[0]), counts[:, label])
        owner[rows[: takers.size]] = takers
    return owner


def class_counts_of(partition: Partition, codes: np.ndarray, num_classes: int) -> np.ndarray:
    """Examples of each client and class, int64 `[C, num_classes]`."""
    owner = np.repeat(np.arange(partition.num_clients), partition.sizes)
    cells = np.bincount(owner * num_classes + codes[partition.indices], minlength=partition.num_clients * num_classes)
    return cells.reshape(partition.num_clients, num_classes)


def site_rows(
    partition: Partition, labels_train: np.ndarray, labels_other: np.ndarray, rng: np.random.Generator
) -> Partition:
    """Deal another split (validation) to the clients of `partition`, so that each has examples of its own class mix.

    The examples of a class are shared in proportion to the clients' training examples of that class, by largest remainder,
    ties at random. Those of a class that no client trains on stay unassigned.

    Args:
        partition: of the training examples.
        labels_train: int64 `[n]`, the labels that `partition.indices` points into.
        labels_other: int64 `[m]`.

    Returns:
        A partition of `0 ... m - 1` with the same clients and names.
    """
    classes, codes = np.unique(np.concatenate([labels_train, labels_other]), return_inverse=True)
    held = class_counts_of(partition, codes[: labels_train.size], classes.size)
    codes, totals = codes[labels_train.size :], held.sum(axis=0)
    counts = np.zeros_like(held)
    for label, rows in enumerate(np.bincount(codes, minlength=classes.size)):
        if totals[label]:
            exact = held[:, label] * rows  # whole numbers over totals[label]: ties are exact
            tie = rng.permutation(partition.num_clients)
            counts[:, label] = round_up(exact // totals[label], exact % totals[label], int(rows), tie)
    return from_owner(deal(codes, counts, rng), partition.num_clients, partition.names)


def round_up(floor: np.ndarray, remainder: np.ndarray, total: int, tie: np.ndarray) -> np.ndarray:
    """Largest remainder: one more for the largest remainders until `floor` sums to `total`; the lowest `tie` first."""
    short = total - int(floor.sum())
    assert 0 <= short <= floor.size
    counts = floor.astype(np.int64)
    counts[np.lexsort((tie, -remainder))[:short]] += 1
    return counts


def cut(proportions: np.ndarray, rows: int, shift: float) -> np.ndarray:
    """Counts `[C]` that sum to `rows`: differences of `floor(cumulated share x rows + shift)`, 0 <= shift < 1."""
    edges = np.floor(np.cumsum(proportions) * rows + shift).astype(np.int64)
    edges = np.minimum(edges, rows)
    edges[-1] = rows  # a cumulated sum may end a little below or above 1
    return np.diff(edges, prepend=0)
