"""Who holds which examples: the two kinds of partitions.

A `Partition` deals each example to one client at most. The clients of a `VirtualPartition`, up to millions, draw examples
with repetition when they are asked for. `partitioners.py` makes them, `skew.py` measures them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar

import numpy as np

from fedsim.core.errors import UserError, shown


class _Sites:
    """Clients by number and name."""

    num_clients: int
    names: tuple[str, ...] | None

    def name(self, client: int) -> str:
        self._check(client)
        return f"site-{client + 1}" if self.names is None else self.names[client]

    def number(self, name: str) -> int | None:
        """The number of the client of this name, or None."""
        if self.names is not None:
            return self.names.index(name) if name in self.names else None
        tail = name.removeprefix("site-")
        number = int(tail) - 1 if tail.isascii() and tail.isdigit() and len(tail) < 20 else -1
        return number if 0 <= number < self.num_clients and name == f"site-{number + 1}" else None

    def _check(self, client: int) -> None:
        # A negative index would wrap around to a wrong, silently empty slice.
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client} of {self.num_clients}")


def _numbers(key: str, given: Any) -> np.ndarray:
    """A read-only int64 view, so that the caller's own array stays writable."""
    array = np.asarray(given)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserError(f"partition: {key} must be a 1-d array of integers, got {array.dtype} {array.shape}")
    view = array.astype(np.int64, copy=False).view()
    view.flags.writeable = False
    return view


def _check_each_once(key: str, numbers: np.ndarray) -> None:
    if numbers.size and (numbers.min() < 0 or np.unique(numbers).size != numbers.size):
        raise UserError(f"partition: {key} must be >= 0 and name no example twice")


@dataclass(frozen=True, eq=False)
class Partition(_Sites):
    """Client -> example numbers, compact enough for a million clients.

    Attributes:
        offsets: int64 `[C + 1]`; client `c` holds `indices[offsets[c]:offsets[c + 1]]`.
        indices: int64 `[n]`, no example twice. Both arrays are read-only.
        names: one name per client, all different; None stands for site-1 ... site-C.
        notes: what had to be done, JSON-able: redraws, examples moved or left out. Goes to the report of `skew.measure`.

    Raises:
        UserError: offsets, indices or names do not describe a partition (a damaged file, a slip in a script).
    """

    offsets: np.ndarray
    indices: np.ndarray
    names: tuple[str, ...] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("offsets", "indices"):
            object.__setattr__(self, key, _numbers(key, getattr(self, key)))
        steps = np.diff(self.offsets)
        if steps.size == 0 or self.offsets[0] != 0 or steps.min() < 0 or self.offsets[-1] != self.indices.size:
            raise UserError(
                f"partition: offsets must rise from 0 to the number of examples, {self.indices.size}, over >= 1 client"
            )
        _check_each_once("indices", self.indices)
        if self.names is not None:
            object.__setattr__(self, "names", tuple(self.names))
            if len(self.names) != steps.size or len(set(self.names)) != steps.size:
                raise UserError(f"partition: {steps.size} clients need as many different names, got {len(self.names)}")

    @property
    def num_clients(self) -> int:  # type: ignore[override]
        return self.offsets.size - 1

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, int64 `[C]`."""
        return np.diff(self.offsets)

    def rows(self, client: int) -> np.ndarray:
        """Example numbers of one client: a read-only int64 view (ascending in every built-in partition)."""
        self._check(client)
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    def all_rows(self) -> np.ndarray:
        """The examples that clients hold, each once, ascending int64: those of the centralized client."""
        return np.sort(self.indices)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for `np.savez`: offsets, indices, and names as a fixed-width unicode array where there are any."""
        arrays = {"offsets": self.offsets, "indices": self.indices}
        return arrays if self.names is None else {**arrays, "names": np.array(self.names, dtype=np.str_)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Partition | VirtualPartition:
        """The partition that `to_arrays` wrote; takes what `np.load` returns, with `allow_pickle=False`.

        Raises:
            UserError: an array is missing or they do not describe a partition.
        """
        if "virtual" in arrays:
            return VirtualPartition.from_arrays(arrays)
        if missing := [key for key in ("offsets", "indices") if key not in arrays]:
            raise UserError(f"partition: array {missing[0]} is missing; write the file with Partition.to_arrays")
        names = tuple(str(n) for n in arrays["names"]) if "names" in arrays else None
        return cls(np.asarray(arrays["offsets"]), np.asarray(arrays["indices"]), names)

    @classmethod
    def given(cls, made: Any, size: int, by: str) -> Partition | VirtualPartition:
        """The partition that a user's own partitioner made.

        Args:
            made: the example numbers of each client, in a list or in a mapping from the clients' names; or a partition.
            size: n, examples of the training split.
            by: the partitioner, for messages.

        Raises:
            UserError: unless each of 0 ... n - 1 belongs to exactly one client.
        """
        if isinstance(made, VirtualPartition):
            return made
        if isinstance(made, Partition):
            made = {made.name(client): made.rows(client) for client in range(made.num_clients)}
        if not isinstance(made, (Mapping, list, tuple)) or not made:
            way = "return the example numbers of each client, in a list or in a mapping from the clients' names"
            raise UserError(f"partition.name: {by} returned {shown(made)}; {way}")
        names = tuple(map(str, made)) if isinstance(made, Mapping) else None
        held = [np.asarray(rows) for rows in (made.values() if isinstance(made, Mapping) else made)]
        for client, rows in enumerate(held):
            whose = f"site-{client + 1}" if names is None else names[client]
            if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
                raise UserError(
                    f"partition.name: {by} gave {whose!r} {shown(rows.tolist())}; give a list of whole numbers"
                )
            if rows.size and not (rows.min() >= 0 and rows.max() < size):
                odd = rows[(rows < 0) | (rows >= size)][0]
                raise UserError(f"partition.name: {by} gave {whose!r} example {odd}; there are 0 to {size - 1}")
        indices = np.concatenate(held).astype(np.int64)
        counts = np.bincount(indices, minlength=size)
        if (odd := np.flatnonzero(counts != 1)).size:
            said = f"example {odd[0]} to {counts[odd[0]] or 'no'} clients ({odd.size:,} such examples)"
            raise UserError(f"partition.name: {by} gave {said}; give each of the {size:,} to exactly one, once")
        return cls(np.cumsum([0, *(rows.size for rows in held)]), indices, names)


def _splitmix(seed: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Outputs of the generator splitmix64 by seed and place in its sequence (from 0); uint64, broadcast together.

    Any output can be had without those before it. Products and sums wrap around at 2^64, as they are meant to.

    Source: Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators; constants as in Vigna's public
    domain version.
    """
    z = seed + (number + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


OVERLAP = "rows are drawn with repetition: clients may overlap, and a client may hold a row twice"


@dataclass(frozen=True, eq=False)
class VirtualPartition(_Sites):
    """Client -> example numbers drawn with repetition when they are asked for; a client costs memory only for its size.

    The one partition whose clients may overlap, and in which a client may hold an example twice. A client's examples are a
    function of (key, client), the bounds and the examples to draw from: `num_clients` does not change them.

    Attributes:
        key: 0 ... 2^64 - 1, drawn from the experiment's seed.
        num_clients: >= 1.
        min_rows, max_rows: sizes are uniform on min_rows ... max_rows, both included; 1 <= min_rows <= max_rows.
        kept: int64 `[n]`, the examples to draw from, each as likely as the others and none twice; read-only.
        notes: as in `Partition`.

    Raises:
        UserError: the numbers or `kept` do not describe such a partition (a damaged file, a slip in a script).
    """

    key: int
    num_clients: int
    min_rows: int
    max_rows: int
    kept: np.ndarray
    notes: dict[str, Any] = field(default_factory=lambda: {"overlap": OVERLAP})

    names: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        numbers = {"key": (0, 2**64 - 1), "num_clients": (1, 2**63), "min_rows": (1, 2**31 - 1)}
        for key, (least, most) in {**numbers, "max_rows": (self.min_rows, 2**31 - 1)}.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value <= most:
                raise UserError(f"partition.{key}: {value!r} is not a whole number from {least} to {most}")
            object.__setattr__(self, key, int(value))
        kept = _numbers("kept", self.kept)
        if kept.size == 0:
            raise UserError("partition: kept must be a 1-d array of integers, got none")
        _check_each_once("kept", kept)
        object.__setattr__(self, "kept", kept)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the sizes: whoever needs them works them out, and a worker never does.
        return VirtualPartition, (self.key, self.num_clients, self.min_rows, self.max_rows, self.kept, self.notes)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Examples of each client, int32 `[C]`, read-only."""
        out = np.empty(self.num_clients, dtype=np.int32)
        for start in range(0, out.size, 1 << 16):  # in pieces: the hash needs several times the room of its result
            part = np.arange(start, min(start + (1 << 16), out.size), dtype=np.uint64)
            out[start : start + part.size] = self._sizes(self._seeds(part))
        out.flags.writeable = False
        return out

    def rows(self, client: int) -> np.ndarray:
        """Example numbers of one client, int64, in the order drawn; an example may occur more than once."""
        self._check(client)
        seed = self._seeds(np.array([client], dtype=np.uint64))
        place = np.arange(1, int(self._sizes(seed)[0]) + 1, dtype=np.uint64)
        # The remainder favours low numbers by n / 2^64, which no experiment can see.
        return self.kept[(_splitmix(seed, place) % np.uint64(self.kept.size)).astype(np.int64)]

    def all_rows(self) -> np.ndarray:
        """The examples to draw from, each once, ascending int64, whether a client drew them or not."""
        return np.sort(self.kept)

    def sample(self, most: int) -> np.ndarray:
        """Numbers of at most `most` clients, int64 ascending: all of them, or as many drawn by the key."""
        if self.num_clients <= most:
            return np.arange(self.num_clients)
        rng = np.random.default_rng(self.key)
        return np.sort(rng.choice(self.num_clients, most, replace=False, shuffle=False))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for `np.savez`: `virtual`, uint64 key, num_clients, min_rows, max_rows; and `kept`."""
        numbers = [self.key, self.num_clients, self.min_rows, self.max_rows]
        return {"virtual": np.array(numbers, dtype=np.uint64), "kept": self.kept}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> VirtualPartition:
        """The partition that `to_arrays` wrote; takes what `np.load` returns, with `allow_pickle=False`.

        Raises:
            UserError: an array is missing or they do not describe such a partition.
        """
        if missing := [key for key in ("virtual", "kept") if key not in arrays]:
            raise UserError(f"partition: array {missing[0]} is missing; write the file with VirtualPartition.to_arrays")
        numbers = np.asarray(arrays["virtual"])
        if numbers.shape != (4,) or numbers.dtype.kind not in "iu":
            raise UserError(f"partition: virtual must be four whole numbers, got {numbers.dtype} {numbers.shape}")
        return cls(*numbers.tolist(), np.asarray(arrays["kept"]))

    def _seeds(self, clients: np.ndarray) -> np.ndarray:
        """Each client's own seed: its output 0 is the size, the later ones are the examples. uint64, like `clients`."""
        return _splitmix(np.array([self.key], dtype=np.uint64), clients)

    def _sizes(self, seeds: np.ndarray) -> np.ndarray:
        span = np.uint64(self.max_rows - self.min_rows + 1)
        return self.min_rows + (_splitmix(seeds, np.zeros(1, dtype=np.uint64)) % span).astype(np.int64)
