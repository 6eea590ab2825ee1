"""Client state that outlives a round, in one memory-mapped file of equal records.

A record is a flat vector: the algorithm's client state, then the optimiser's moments. Only clients that have been seen
have records, so a million clients cost nothing until they take part. Workers map the record they were told to read and
the one they were told to write; parameters never travel through a pickle. A round writes into a record that no
checkpoint refers to, so what a checkpoint refers to is never half-written.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
_AT_ONCE = 1 << 22  # elements that are mapped at once


class Store:
    """Records of `width` elements in the file at `path`; opening it twice, from any process, sees the same records."""

    def __init__(self, path: Path, width: int, dtype: torch.dtype) -> None:
        self.path, self.width, self.dtype = path, width, dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        return self.width * self.dtype.itemsize

    def read(self, record: int, start: int = 0, stop: int | None = None) -> Tensor:
        """A copy of a record, or of a stretch of it, `[stop - start]`, on the CPU."""
        stop = self.width if stop is None else stop
        if start == stop:  # nothing cannot be mapped
            return torch.empty(0, dtype=self.dtype)
        return torch.from_numpy(np.array(self._map(record, "r", start, stop)))

    def write(self, record: int, *parts: Tensor) -> None:
        """Fill a record with these vectors, end to end; the file grows as needed."""
        start = 0
        for part in parts:
            self.write_at(record, start, part)
            start += part.numel()
        assert start == self.width, f"a record has {self.width} elements, got {start}"

    def write_at(self, record: int, start: int, part: Tensor) -> None:
        """Fill a stretch of a record, from element `start` on, with a vector of any device and floating type."""
        end = (record + 1) * self.nbytes
        if not self.path.exists() or self.path.stat().st_size < end:
            # Its own last byte: another process may be making the file larger at the same time, and none makes it smaller.
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.pwrite(handle, b"\0", end - 1)
            finally:
                os.close(handle)
        # Mapped pages count as this process's memory until they are unmapped.
        for i in range(0, part.numel(), _AT_ONCE):
            piece = part[i : i + _AT_ONCE].detach().to("cpu", self.dtype)
            self._map(record, "r+", start + i, start + i + piece.numel())[:] = piece.numpy()

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self.path.exists():
            with open(self.path, "rb") as handle:
                os.fsync(handle.fileno())

    def copy(self, record: int, into: Store, other: int, stop: int) -> None:
        """Copy the first `stop` elements of a record to the start of another store's record."""
        for i in range(0, stop, _AT_ONCE):
            into.write_at(other, i, self.read(record, i, min(stop, i + _AT_ONCE)))

    def _map(self, record: int, mode: str, start: int, stop: int) -> np.memmap:
        offset = record * self.nbytes + start * self.dtype.itemsize
        return np.memmap(self.path, dtype=_NUMPY[self.dtype], mode=mode, offset=offset, shape=(stop - start,))


class Records:
    """Which record holds which client's state: what the last checkpoint refers to, and what the rounds since wrote.

    Lives in the main process; a checkpoint saves `table`.
    """

    def __init__(self, table: dict[int, int] | None = None, committed: list[dict[int, int]] | None = None) -> None:
        self.table: dict[int, int] = dict(table or {})  # client -> record of its newest state
        self._kept: list[set[int]] = [set(t.values()) for t in committed or []]
        used = set(self.table.values()).union(*self._kept)
        self._next = max(used, default=-1) + 1
        self._free = deque(sorted(set(range(self._next)) - used))

    def read(self, client: int) -> int:
        """The record of the client's newest state, or -1 where it has none."""
        return self.table.get(client, -1)

    def new(self) -> int:
        """A record that nothing refers to."""
        if self._free:
            return self._free.popleft()
        self._next += 1
        return self._next - 1

    def give_back(self, record: int) -> None:
        """A record from `new` will not be written after all."""
        self._free.appendleft(record)

    def wrote(self, client: int, record: int) -> None:
        """The client's newest state is now in `record`; its former one is free unless a checkpoint refers to it."""
        former = self.table.get(client)
        self.table[client] = record
        if former is not None and not any(former in kept for kept in self._kept):
            self._free.append(former)

    def commit(self, keep: int) -> None:
        """A checkpoint refers to the table as it is; those before the last `keep` no longer hold records."""
        self._kept.append(set(self.table.values()))
        dropped = self._kept[:-keep]
        self._kept = self._kept[-keep:]
        alive = set(self.table.values()).union(*self._kept)
        gone = set().union(*dropped) - alive if dropped else set()
        self._free = deque(sorted(gone.union(self._free)))
