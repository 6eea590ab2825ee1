"""Client state that outlives a round, in one file of equal records.

A record is a flat vector: the algorithm's client state, then the optimizer's moments. Only clients that have been seen
have records, so a million clients cost nothing until they take part. Workers read the record they were told to read and
write the one they were told to write, in place; parameters never travel through a pickle. A round writes into a record that
no checkpoint refers to, so what a checkpoint refers to is never half-written.

Files are read and written, not mapped: what does not fit on a full disk is an error that can be told, where a mapped page
would end the process with SIGBUS, and nothing of them counts as memory in use.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
_AT_ONCE = 1 << 22  # elements that are copied at once
_PIECE = 1 << 24  # bytes that are summed at once
_READ = 1 << 20  # bytes of them that are in memory
_THREADS_FROM = 1 << 27  # bytes of which a checksum takes several threads


class Store:
    """Records of `width` elements in the file at `path`; opening it twice, from any process, sees the same records."""

    def __init__(self, path: Path, width: int, dtype: torch.dtype) -> None:
        self.path, self.width, self.dtype = path, width, dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        return self.width * self.dtype.itemsize

    def read(self, record: int, start: int = 0, stop: int | None = None) -> Tensor:
        """A copy of a record, or of a stretch of it, `[stop - start]`, on the CPU.

        Raises:
            OSError: if the file ends before.
        """
        stop = self.width if stop is None else stop
        out = np.empty(stop - start, dtype=_NUMPY[self.dtype])
        if out.size:
            handle = os.open(self.path, os.O_RDONLY)
            try:
                self._fill(handle, memoryview(out).cast("B"), self._offset(record, start))
            finally:
                os.close(handle)
        return torch.from_numpy(out)

    def write(self, record: int, *parts: Tensor) -> None:
        """Fill a record with these vectors, end to end; the file grows as needed."""
        start = 0
        for part in parts:
            self.write_at(record, start, part)
            start += part.numel()
        assert start == self.width, f"a record has {self.width} elements, got {start}"

    def write_at(self, record: int, start: int, part: Tensor) -> None:
        """Fill a stretch of a record, from element `start` on, with a vector of any device and floating type.

        Raises:
            OSError: if it cannot be written: the disk is full, say.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            for i in range(0, part.numel(), _AT_ONCE):
                piece = part[i : i + _AT_ONCE].detach().to("cpu", self.dtype).contiguous()
                left, at = memoryview(piece.numpy()).cast("B"), self._offset(record, start + i)
                while left:  # no writer makes the file smaller, so two that make it larger lose nothing
                    done = os.pwrite(handle, left, at)
                    left, at = left[done:], at + done
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        finally:
            os.close(handle)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self.path.exists():
            with open(self.path, "rb") as handle:
                os.fsync(handle.fileno())

    def copy(self, record: int, into: Store, other: int, stop: int) -> None:
        """Copy the first `stop` elements of a record to the start of another store's record."""
        for i in range(0, stop, _AT_ONCE):
            into.write_at(other, i, self.read(record, i, min(stop, i + _AT_ONCE)))

    def checksums(self, records: list[int]) -> list[int]:
        """CRC-32 of each record; a long one's is that of its pieces' together.

        Raises:
            OSError: if the file is not there, or ends before.
        """
        if not records or not self.width:
            return [0] * len(records)
        cuts = list(range(0, self.nbytes, _PIECE))
        work = [(record, at) for record in records for at in cuts]
        handle = os.open(self.path, os.O_RDONLY)
        try:

            def piece(one: tuple[int, int]) -> int:
                record, at = one
                found, end, out = 0, min(at + _PIECE, self.nbytes), memoryview(bytearray(_READ))
                while at < end:
                    part = out[: end - at]
                    self._fill(handle, part, record * self.nbytes + at)
                    found, at = zlib.crc32(part, found), at + len(part)
                return found

            if len(records) * self.nbytes < _THREADS_FROM:
                found = [piece(one) for one in work]
            else:
                with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
                    found = list(threads.map(piece, work))
        finally:
            os.close(handle)
        parts = [found[i : i + len(cuts)] for i in range(0, len(found), len(cuts))]
        return [p[0] if len(p) == 1 else zlib.crc32(np.array(p, dtype=np.uint32).tobytes()) for p in parts]

    def _offset(self, record: int, start: int) -> int:
        return record * self.nbytes + start * self.dtype.itemsize

    def _fill(self, handle: int, into: memoryview, at: int) -> None:
        while into:
            done = os.preadv(handle, [into], at)
            if done == 0:
                raise OSError(errno.EIO, "ends before the record that was asked for", str(self.path))
            into, at = into[done:], at + done


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
        self._sums: dict[int, int] = {}  # record -> checksum, of those that were looked at since they were written

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
        self._sums.pop(record, None)
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

    def digest(self, store: Store) -> tuple[str, int]:
        """What tells whether records are as they are now: (hash of who has which record and of what is in them, bytes looked at).

        Only records that were written since the last call are read.

        Raises:
            OSError: if the store's file is not there, or too short.
        """
        new = [record for record in self.table.values() if record not in self._sums]
        self._sums |= dict(zip(new, store.checksums(new), strict=True))
        rows = [
            np.fromiter(column, dtype=np.int64, count=len(self.table)) for column in (self.table, self.table.values())
        ]
        sums = np.fromiter((self._sums[r] for r in self.table.values()), dtype=np.int64, count=len(self.table))
        return hashlib.sha256(np.stack([*rows, sums]).tobytes()).hexdigest(), len(new) * store.nbytes
