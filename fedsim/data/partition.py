"""Who holds which rows: partitions, the functions that draw them, and the report that measures them.

A partitioner is a plain function `f(labels, rng, *, ...) -> Partition` with the config section of its keys above it;
`PARTITIONERS` at the bottom names them all.
They settle counts first (a matrix of clients by classes) and deal rows once, so a redraw costs no pass over the data.
One is different: `virtual` deals nothing. Its clients, up to millions, draw rows with repetition when asked for them.

Sources: McMahan et al. 2017 (arXiv:1602.05629); Hsu et al. 2019 (arXiv:1909.06335); Yurochkin et al. 2019
(arXiv:1905.12022); Wang et al. 2020, FedMA (arXiv:2002.06440).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator, Field, model_validator
from scipy.special import rel_entr

from fedsim.core.errors import UserError
from fedsim.core.section import Count, Natural, Positive, Text, section, wrong

_MOST_CLIENTS = 10**6  # where clients may be without rows


@dataclass(frozen=True, eq=False)
class Partition:
    """Client -> row numbers, compact enough for a million clients.

    Attributes:
        offsets: int64 `[C + 1]`; client `c` holds `indices[offsets[c]:offsets[c + 1]]`.
        indices: int64 `[rows]`, no row twice. Both arrays are read-only.
        names: one name a client, all different; None stands for site-1 ... site-C.
        notes: what had to be done, JSON-able: redraws, rows moved by repair, rows left out. Goes to the report of
            `measure`, not to the arrays.

    Raises:
        UserError: offsets, indices or names do not describe a partition (a damaged file, a slip in a script).
    """

    offsets: np.ndarray
    indices: np.ndarray
    names: tuple[str, ...] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("offsets", "indices"):
            given = np.asarray(getattr(self, key))
            if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
                raise UserError(f"partition: {key} must be a 1-d array of integers, got {given.dtype} {given.shape}")
            # A view, so that the caller's own array stays writable.
            array = given.astype(np.int64, copy=False).view()
            array.flags.writeable = False
            object.__setattr__(self, key, array)
        steps = np.diff(self.offsets)
        if steps.size == 0 or self.offsets[0] != 0 or steps.min() < 0 or self.offsets[-1] != self.indices.size:
            raise UserError(
                f"partition: offsets must rise from 0 to the number of rows, {self.indices.size}, over >= 1 client"
            )
        if self.indices.size and (self.indices.min() < 0 or np.unique(self.indices).size != self.indices.size):
            raise UserError("partition: indices must be >= 0 and name no row twice")
        if self.names is not None:
            object.__setattr__(self, "names", tuple(self.names))
            if len(self.names) != steps.size or len(set(self.names)) != steps.size:
                raise UserError(f"partition: {steps.size} clients need as many different names, got {len(self.names)}")

    @property
    def num_clients(self) -> int:
        return self.offsets.size - 1

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each client, int64 `[C]`."""
        return np.diff(self.offsets)

    def rows(self, client: int) -> np.ndarray:
        """Row numbers of one client: a read-only int64 view (ascending in every partition drawn here)."""
        self._check(client)
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    def all_rows(self) -> np.ndarray:
        """The rows that clients hold, each once, ascending int64: those of the centralised client."""
        return np.sort(self.indices)

    def name(self, client: int) -> str:
        self._check(client)
        return f"site-{client + 1}" if self.names is None else self.names[client]

    def number(self, name: str) -> int | None:
        """The number of the client of this name, or None."""
        if self.names is None:
            return _site_number(name, self.num_clients)
        return self.names.index(name) if name in self.names else None

    def _check(self, client: int) -> None:
        # A negative index would wrap around to a wrong, silently empty slice.
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client} of {self.num_clients}")

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


def _site_number(name: str, num_clients: int) -> int | None:
    """The number of the client that `site-N` names, or None."""
    tail = name.removeprefix("site-")
    number = int(tail) - 1 if tail.isascii() and tail.isdigit() and len(tail) < 20 else -1
    return number if 0 <= number < num_clients and name == f"site-{number + 1}" else None


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
class VirtualPartition:
    """Client -> row numbers drawn with repetition when they are asked for, so a client costs memory only for its size.

    The one partition whose clients may overlap, and in which a client may hold a row twice. Size and rows of a client
    are a function of (key, client), the bounds and the rows to draw from: `num_clients` changes neither. Used like a
    `Partition`.

    Attributes:
        key: 0 ... 2^64 - 1, drawn from the experiment's seed.
        num_clients: >= 1.
        min_rows, max_rows: sizes are uniform on min_rows ... max_rows, both included; 1 <= min_rows <= max_rows.
        kept: int64 `[n]`, the rows to draw from, each as likely as the others and none twice; read-only.
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

    names: ClassVar[None] = None

    def __post_init__(self) -> None:
        clients = _whole("num_clients", self.num_clients, 1)
        least = _whole("min_rows", self.min_rows, 1)
        most = _whole("max_rows", self.max_rows, least)
        if most >= 2**31:
            raise UserError(f"partition.max_rows: got {most}, needs a whole number below {2**31}")
        if not (isinstance(self.key, Integral) and 0 <= self.key < 2**64):
            raise UserError(f"partition: key must be a whole number from 0 to 2^64 - 1, got {self.key!r}")
        for key, value in (("key", int(self.key)), ("num_clients", clients), ("min_rows", least), ("max_rows", most)):
            object.__setattr__(self, key, value)
        given = np.asarray(self.kept)
        if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
            raise UserError(f"partition: kept must be a 1-d array of integers, got {given.dtype} {given.shape}")
        kept = given.astype(np.int64, copy=False).view()
        if kept.min() < 0 or np.unique(kept).size != kept.size:
            raise UserError("partition: kept must be >= 0 and name no row twice")
        kept.flags.writeable = False
        object.__setattr__(self, "kept", kept)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the sizes: whoever needs them works them out, and a worker never does.
        return VirtualPartition, (self.key, self.num_clients, self.min_rows, self.max_rows, self.kept, self.notes)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Rows of each client, int32 `[C]`, read-only."""
        out = np.empty(self.num_clients, dtype=np.int32)
        for start in range(0, out.size, 1 << 16):  # in pieces: the hash needs several times the room of its result
            part = np.arange(start, min(start + (1 << 16), out.size), dtype=np.uint64)
            out[start : start + part.size] = self._sizes(self._seeds(part))
        out.flags.writeable = False
        return out

    def rows(self, client: int) -> np.ndarray:
        """Row numbers of one client, int64, in the order drawn; a row may occur more than once."""
        self._check(client)
        seed = self._seeds(np.array([client], dtype=np.uint64))
        place = np.arange(1, int(self._sizes(seed)[0]) + 1, dtype=np.uint64)
        # The remainder favours low numbers by n / 2^64, which no experiment can see.
        return self.kept[(_splitmix(seed, place) % np.uint64(self.kept.size)).astype(np.int64)]

    def all_rows(self) -> np.ndarray:
        """The rows to draw from, each once, ascending int64: those of the centralised client.

        Every one of them, drawn by a client or not: not the clients' rows together, which repeat.
        """
        return np.sort(self.kept)

    def name(self, client: int) -> str:
        self._check(client)
        return f"site-{client + 1}"

    def number(self, name: str) -> int | None:
        """The number of the client of this name, or None."""
        return _site_number(name, self.num_clients)

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

    def _check(self, client: int) -> None:
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client} of {self.num_clients}")

    def _seeds(self, clients: np.ndarray) -> np.ndarray:
        """Each client's own seed: its output 0 is the size, the later ones are the rows. uint64, like `clients`."""
        return _splitmix(np.array([self.key], dtype=np.uint64), clients)

    def _sizes(self, seeds: np.ndarray) -> np.ndarray:
        span = np.uint64(self.max_rows - self.min_rows + 1)
        return self.min_rows + (_splitmix(seeds, np.zeros(1, dtype=np.uint64)) % span).astype(np.int64)


# Checks: what the user wrote, before anything is drawn.


def _whole(key: str, value: Any, least: int, most: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"partition.{key}: got {value!r}, needs a whole number, at least {least}{most}")
    return int(value)


def _number(key: str, value: Any, zero: bool) -> float:
    ok = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < 0 or (value == 0 and not zero):
        bound = "at least 0" if zero else "above 0"
        raise UserError(f"partition.{key}: got {value!r}, needs a finite number {bound}, such as 0.5 or 1.0")
    return float(value)


def _labels(labels: np.ndarray) -> np.ndarray:
    array = np.asarray(labels)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserError(f"partition: labels must be one integer a row, got {array.dtype} of shape {array.shape}")
    if array.size == 0:
        raise UserError("partition: the training split has no rows; check data.path")
    return array.astype(np.int64, copy=False)


def _feasible(num_clients: Any, min_rows: Any, rows: int) -> tuple[int, int]:
    least = _whole("min_rows", min_rows, 0)
    clients = _whole("num_clients", num_clients, 1, f" and at most {rows // max(least, 1)}")
    most = max(rows, _MOST_CLIENTS)  # those without rows take memory too
    if clients > most and least == 0:
        raise UserError(
            f"partition.num_clients: {clients} is above {most}; for more clients use partition.name=virtual"
        )
    if clients * least > rows:
        best = f"min_rows is {rows // clients} (or num_clients {rows // least})"
        if rows < least:  # then not even one client would do
            best = f"min_rows is {rows // clients}"
        raise UserError(
            f"partition.min_rows: {least} x {clients} clients needs {clients * least} rows, "
            f"the training split has {rows}; the largest feasible {best}"
        )
    return clients, least


# From counts to rows.


def _from_owner(
    owner: np.ndarray, num_clients: int, names: tuple[str, ...] | None = None, notes: dict[str, Any] | None = None
) -> Partition:
    """owner: client of each row, int64 `[n]`, -1 where no client holds it."""
    unowned = int((owner < 0).sum())
    sizes = np.bincount(owner[owner >= 0], minlength=num_clients)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Partition(offsets, np.argsort(owner, kind="stable")[unowned:], names, notes or {})


def _deal(codes: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Owner of each row, int64 `[n]`: client c gets `counts[c, l]` random rows of class l. codes: class of each row."""
    owner = np.full(codes.size, -1, dtype=np.int64)
    by_class = np.argsort(codes, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=counts.shape[1]))])
    for label in range(counts.shape[1]):
        rows = rng.permutation(by_class[starts[label] : starts[label + 1]])
        takers = np.repeat(np.arange(counts.shape[0]), counts[:, label])
        owner[rows[: takers.size]] = takers
    return owner


def _class_counts(partition: Partition, codes: np.ndarray, num_classes: int) -> np.ndarray:
    """Rows of each client and class, int64 `[C, num_classes]`."""
    owner = np.repeat(np.arange(partition.num_clients), partition.sizes)
    cells = np.bincount(owner * num_classes + codes[partition.indices], minlength=partition.num_clients * num_classes)
    return cells.reshape(partition.num_clients, num_classes)


def _round_up(floor: np.ndarray, remainder: np.ndarray, total: int, tie: np.ndarray) -> np.ndarray:
    """Largest remainder: one more for the largest remainders until `floor` sums to `total`; the lowest `tie` first."""
    short = total - int(floor.sum())
    assert 0 <= short <= floor.size
    counts = floor.astype(np.int64)
    counts[np.lexsort((tie, -remainder))[:short]] += 1
    return counts


def _cut(proportions: np.ndarray, rows: int, shift: float) -> np.ndarray:
    """Counts `[C]` that sum to `rows`: differences of `floor(cumulated share x rows + shift)`, 0 <= shift < 1."""
    edges = np.floor(np.cumsum(proportions) * rows + shift).astype(np.int64)
    edges = np.minimum(edges, rows)
    edges[-1] = rows  # a cumulated sum may end a little below or above 1
    return np.diff(edges, prepend=0)


def _shares(alpha: float, clients: int, rng: np.random.Generator) -> np.ndarray:
    # Beyond these bounds a draw is one-hot or uniform to the last bit anyway, and NumPy's sampler over- or underflows.
    shares = rng.dirichlet(np.full(clients, min(max(alpha, 1e-100), 1e100)))
    assert np.isfinite(shares).all()
    return shares


def _until(
    draw: Callable[[], np.ndarray], min_rows: int, max_redraws: int, repair: bool
) -> tuple[np.ndarray, dict[str, int]]:
    """Counts `[C, L]` drawn until each client has `min_rows`, at most `max_redraws` times; the best ones for repair."""
    best, best_key = None, (-1, 0)
    for number in range(max_redraws):
        counts = draw()
        sizes = counts.sum(axis=1)
        # The same minimum in many draws is common (zero, with many clients): then the one with the least to move.
        key = (int(sizes.min()), -int(np.maximum(min_rows - sizes, 0).sum()))
        if best is None or key > best_key:
            best, best_key = counts, key
        if best_key[0] >= min_rows:
            return best, {"redraws": number, "rows_moved": 0}
    if not repair:
        raise UserError(
            f"partition: after {max_redraws} draws the smallest client had at most {best_key[0]} rows, min_rows is "
            f"{min_rows}; raise alpha, lower min_rows, or set partition.repair=true"
        )
    assert best is not None
    return best, {"redraws": max_redraws - 1, "rows_moved": -best_key[1]}


def _repair(owner: np.ndarray, num_clients: int, min_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Lower the largest clients to a common level, random rows of theirs going to clients below `min_rows`."""
    sizes = np.bincount(owner, minlength=num_clients)
    need = np.maximum(min_rows - sizes, 0)
    total = int(need.sum())
    low, high = min_rows, int(sizes.max())  # the highest level that frees enough rows lies in [low, high]
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= total else (low, level - 1)
    give = np.maximum(sizes - low, 0)
    donors = np.flatnonzero(give)
    give[donors[: int(give.sum()) - total]] -= 1  # the level may free a few rows too many, at most one a donor
    order = np.lexsort((rng.random(owner.size), owner))
    rank = np.arange(owner.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moved = order[rank < give[owner[order]]]
    repaired = owner.copy()
    repaired[rng.permutation(moved)] = np.repeat(np.arange(num_clients), need)
    return repaired


def _label_skew(
    labels: np.ndarray,
    rng: np.random.Generator,
    draw: Callable[[float, int, np.ndarray, np.random.Generator], np.ndarray],
    num_clients: int,
    alpha: float,
    min_rows: int,
    max_redraws: int,
    repair: bool,
) -> Partition:
    """Check, draw counts until the minimum holds, deal rows, repair. `draw(alpha, C, class sizes, rng)` -> `[C, L]`."""
    array = _labels(labels)
    alpha, max_redraws = _number("alpha", alpha, zero=False), _whole("max_redraws", max_redraws, 1)
    clients, least = _feasible(num_clients, min_rows, array.size)
    _, codes, class_sizes = np.unique(array, return_inverse=True, return_counts=True)
    counts, notes = _until(lambda: draw(alpha, clients, class_sizes, rng), least, max_redraws, repair)
    owner = _deal(codes, counts, rng)
    return _from_owner(_repair(owner, clients, least, rng) if notes["rows_moved"] else owner, clients, notes=notes)


# The partitioners.


def _dealt(num_clients: int) -> int:
    if num_clients > _MOST_CLIENTS:
        way = f"is above {_MOST_CLIENTS:,}; use fewer, or partition.name=virtual, which takes up to 100,000,000"
        raise wrong("", num_clients, way)
    return num_clients


@section
class _Clients:
    """What most partitioners take."""

    num_clients: Annotated[Count, AfterValidator(_dealt)] = 3
    """Number of clients."""


@section
class _ByClass(_Clients):
    by: str | None = None
    """Column whose values are the classes to divide by; null = the label."""


@section
class _DirichletKeys(_ByClass):
    alpha: Positive = 1.0
    """Concentration parameter: small = each class on few clients, large = all clients alike."""
    min_rows: Natural = 10
    """Minimum number of examples per client; the partition is resampled until this holds."""
    max_redraws: Count = 100
    """Number of resampling attempts before the partition fails or is repaired."""
    repair: bool = False
    """Instead of failing, take the best attempt and move examples from the largest clients to those below `min_rows`."""


@section
class Iid(_Clients):
    """Examples dealt at random; client sizes differ by at most one."""

    name: Literal["iid"] = "iid"


def iid(labels: np.ndarray, rng: np.random.Generator, *, num_clients: int, min_rows: int = 1) -> Partition:
    """Random rows, sizes that differ by one at most (the first clients have the extra row).

    Args:
        labels: int64 `[n]`; only their number matters.

    Raises:
        UserError: `num_clients` < 1, or more than `n / min_rows`.

    Source: the IID split of McMahan et al. 2017, section 3.
    """
    rows = _labels(labels).size
    if min_rows == 1 and isinstance(num_clients, Integral) and num_clients > rows:
        raise UserError(
            f"partition.num_clients: {num_clients} clients, the training split has {rows} rows; give at most {rows}"
        )
    clients, _ = _feasible(num_clients, min_rows, rows)
    owner = np.empty(rows, dtype=np.int64)
    owner[rng.permutation(rows)] = np.arange(rows) % clients
    return _from_owner(owner, clients)


@section
class Dirichlet(_DirichletKeys):
    """Each class divided over the clients by Dirichlet proportions, without a cap."""

    name: Literal["dirichlet"] = "dirichlet"


def dirichlet(
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    num_clients: int,
    alpha: float,
    min_rows: int = 10,
    max_redraws: int = 100,
    repair: bool = False,
) -> Partition:
    """Each class is shared out over the clients in proportions drawn from Dir(alpha, ..., alpha).

    Small alpha: few clients hold a class; large alpha: every client holds the global mix. No limit on a client's size.
    Shares become counts by systematic rounding (one uniform shift a class), so every client's expected count is exactly
    its share, also where a class has fewer rows than there are clients.

    Args:
        labels: int64 `[n]`.
        alpha: concentration, > 0.
        min_rows: every client ends with at least this many rows; 0 allows empty clients.
        max_redraws: how many whole draws to try for that.
        repair: when none will do, keep the best draw and move rows from the largest clients to those below `min_rows`.

    Raises:
        UserError: impossible settings, before any draw; or no draw reached `min_rows` and `repair` is off.

    Source: Yurochkin et al. 2019, section 4 (proportions over clients, class by class); also the usual implementation
    of the label skew of Hsu et al. 2019, who draw a class mix per client instead.
    """
    return _label_skew(labels, rng, _draw_plain, num_clients, alpha, min_rows, max_redraws, repair)


def _draw_plain(alpha: float, clients: int, class_sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.stack([_cut(_shares(alpha, clients, rng), int(n), rng.random()) for n in class_sizes], axis=1)


@section
class DirichletFedma(_DirichletKeys):
    """The published sampler (FedMA, NVFlare, FedML): a client that already has N/K examples gets none of the remaining classes."""

    name: Literal["dirichlet_fedma"] = "dirichlet_fedma"


def dirichlet_fedma(
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    num_clients: int,
    alpha: float,
    min_rows: int = 10,
    max_redraws: int = 100,
    repair: bool = False,
) -> Partition:
    """The sampler published with FedMA and used by NVFlare and FedML: Dirichlet over labels with a cap.

    Classes in label order; a client that already holds n/num_clients rows or more drops out of the next class's draw,
    its proportion set to zero and the others rescaled. Shares become counts by truncating the cumulated sum. The whole
    partition is redrawn until every client has `min_rows`.

    Rescaled like that, the proportions of the remaining clients are again Dir(alpha, ..., alpha) over those clients and
    independent of the ones struck out. So we draw over the remaining clients directly: the same distribution, without
    the 0/0 when alpha is so small that all the mass fell on clients that had dropped out. Deviation: `max_redraws`
    and `repair` bound the published endless loop.

    Args, Raises: as `dirichlet`.

    Source: Wang et al. 2020, section 4 and the code published with it.
    """
    return _label_skew(labels, rng, _draw_fedma, num_clients, alpha, min_rows, max_redraws, repair)


def _draw_fedma(alpha: float, clients: int, class_sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    counts = np.zeros((clients, class_sizes.size), dtype=np.int64)
    sizes, rows = np.zeros(clients, dtype=np.int64), int(class_sizes.sum())
    for label, n in enumerate(class_sizes):
        # Never empty: were every client at rows/clients or above, no row would be left for this class.
        open_clients = np.flatnonzero(sizes * clients < rows)
        counts[open_clients, label] = _cut(_shares(alpha, open_clients.size, rng), int(n), 0.0)
        sizes += counts[:, label]
    return counts


@section
class ClassCounts:
    """Explicit numbers of examples per class and client; which ones is drawn by the seed."""

    name: Literal["class_counts"] = "class_counts"
    counts: Annotated[list[Annotated[list[Natural], Field(min_length=1)]], Field(min_length=1)]
    """A list of counts per class for each client: counts[client][class], classes in the order of `data.labels`."""
    by: str | None = None
    """Column whose values are the classes; null = the label."""

    @model_validator(mode="after")
    def _check(self) -> ClassCounts:
        if len({len(row) for row in self.counts}) > 1:
            uneven = "has rows of different length; each client needs one count per class"
            raise wrong("counts", self.counts, uneven)
        return self


def class_counts(labels: np.ndarray, rng: np.random.Generator, *, counts: Sequence[Sequence[int]]) -> Partition:
    """Exactly so many rows of each class for each client, the rows drawn at random; the rest stays unused.

    Args:
        labels: int64 `[n]`, values 0 ... L - 1.
        counts: `[C][L]`, rows of class l for client c. `notes["rows_unused"]` says how many rows no client got.

    Raises:
        UserError: a ragged table, a count that is no whole number >= 0, fewer columns than classes, or more rows of a
            class than there are (names the class, the rows asked for and those available).

    Source: for partitions that a paper prints as a table.
    """
    array = _labels(labels)
    try:
        table = [list(row) for row in counts]
    except TypeError:
        raise UserError(f"partition.counts: {counts!r} must be a list of lists, counts[client][class]") from None
    if not table or not table[0]:
        raise UserError("partition.counts: the table is empty; write one list of class counts per client")
    for client, row in enumerate(table):
        if len(row) != len(table[0]):
            raise UserError(
                f"partition.counts: client {client + 1} lists {len(row)} classes, client 1 lists {len(table[0])}; "
                "write 0 where a client has no row of a class"
            )
        for label, value in enumerate(row):
            _whole(f"counts[{client}][{label}]", value, 0)
    wanted = np.array(table, dtype=np.int64)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= wanted.shape[1]:
        wrong = low if low < 0 else high
        raise UserError(
            f"partition.counts: {wanted.shape[1]} classes listed, the labels hold class {wrong}; add its column"
        )
    available = np.bincount(array, minlength=wanted.shape[1])
    for label, (asked, there) in enumerate(zip(wanted.sum(axis=0), available, strict=True)):
        if asked > there:
            raise UserError(
                f"partition.counts: class {label} is asked for {asked} rows, the training split has {there}; "
                f"the largest feasible sum of column {label} is {there}"
            )
    owner = _deal(array, wanted, rng)
    return _from_owner(owner, wanted.shape[0], notes={"rows_unused": int((owner < 0).sum())})


@section
class Shards(_ByClass):
    """Each client gets examples of at most s classes."""

    name: Literal["shards"] = "shards"
    classes_per_client: Count = 2
    """s, the maximum number of classes per client."""


def shards(labels: np.ndarray, rng: np.random.Generator, *, num_clients: int, classes_per_client: int) -> Partition:
    """Rows sorted by label, cut into `num_clients * classes_per_client` shards, that many a client at random.

    Deviation: the paper cuts at equal distances, so a shard may straddle two classes and a client may see up to twice
    `classes_per_client` classes. Here no shard crosses a class boundary: each class starts as one shard, and the class
    with the largest shards is cut once more until there are enough. A client thus has rows of at most
    `classes_per_client` classes (fewer when dealt two shards of one class); the shards of a class differ by one row at
    most, those of different classes by what the boundaries ask for.

    Raises:
        UserError: more classes a client than exist, fewer shards than classes (some row would stay unassigned), or
            more shards than rows.

    Source: McMahan et al. 2017, section 3 (the pathological non-IID split).
    """
    array = _labels(labels)
    clients, per_client = _whole("num_clients", num_clients, 1), _whole("classes_per_client", classes_per_client, 1)
    _, codes, class_sizes = np.unique(array, return_inverse=True, return_counts=True)
    total, classes, rows = clients * per_client, class_sizes.size, array.size
    if per_client > classes:
        raise UserError(
            f"partition.classes_per_client: {per_client} asked, the training split has {classes} classes; "
            f"the largest feasible is {classes}"
        )
    if total > rows:
        raise UserError(
            f"partition.num_clients: {clients} clients x {per_client} shards needs {total} rows, "
            f"the training split has {rows}; the largest feasible num_clients is {rows // per_client}"
        )
    if total < classes:
        raise UserError(
            f"partition.classes_per_client: {clients} clients x {per_client} cannot hold {classes} classes; "
            f"the smallest feasible is {-(-classes // clients)} (or num_clients {-(-classes // per_client)})"
        )
    pieces = np.ones(classes, dtype=np.int64)
    heap = [(-float(n), label) for label, n in enumerate(class_sizes)]
    heapq.heapify(heap)
    for _ in range(total - classes):
        label = heap[0][1]
        pieces[label] += 1
        heapq.heapreplace(heap, (-class_sizes[label] / pieces[label], label))
    # Shards lie in class order, `place` counts them within their class; the first ones of a class take its odd rows.
    shard_class = np.repeat(np.arange(classes), pieces)
    place = np.arange(total) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    sizes = class_sizes[shard_class] // pieces[shard_class] + (place < (class_sizes % pieces)[shard_class])
    client_of = rng.permutation(total) % clients
    owner = np.empty(rows, dtype=np.int64)
    by_class = np.lexsort((rng.random(rows), codes))  # classes in order, rows of one class shuffled
    owner[by_class] = np.repeat(client_of, sizes)
    return _from_owner(owner, clients)


@section
class ByColumn:
    """One client per value of a column: natural ids such as users, sites or sources."""

    name: Literal["by_column"] = "by_column"
    column: Text
    """The column that holds the clients' ids."""
    min_rows: Count = 1
    """Minimum number of examples per client; a value with fewer is an error, since every example belongs to a client."""


def by_column(
    labels: np.ndarray | None, rng: np.random.Generator | None, *, values: Sequence[str | int], min_rows: int = 1
) -> Partition:
    """One client for each value of a column: natural ids such as a user, an author, a source.

    Clients are named by the value as text (1 and "1" are one client) and ordered by it, by number if all are integers.
    Nothing is drawn.

    Args:
        labels, rng: unused, may be None; here so that every partitioner is called alike.
        values: `[n]`, strings or integers.

    Raises:
        UserError: a row without a value, or a client with fewer than `min_rows` rows.

    Source: natural partitions as in LEAF (Caldas et al. 2018, arXiv:1812.01097).
    """
    least = _whole("min_rows", min_rows, 0)
    keys = _keys(values)
    if not keys:
        raise UserError("partition.column: the training split has no rows; check data.path")
    numeric = all(isinstance(v, Integral) for v in values)
    names = tuple(sorted(set(keys), key=int if numeric else None))
    number = {name: client for client, name in enumerate(names)}
    owner = np.fromiter((number[key] for key in keys), dtype=np.int64, count=len(keys))
    partition = _from_owner(owner, len(names), names)
    few, fewest, smallest = int((partition.sizes < least).sum()), partition.sizes.min(), partition.sizes.argmin()
    if few:
        raise UserError(
            f"partition.min_rows: client {names[smallest]!r} has {fewest} rows, min_rows is {least} "
            f"({few} of {len(names)} clients are below); the largest feasible min_rows is {fewest}"
        )
    return partition


def _keys(values: Sequence[str | int]) -> list[str]:
    """Column values as client names; a name must be visible, and NUL at its end would not survive a NumPy array."""
    for row, value in enumerate(values):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole and not (isinstance(value, str) and value.strip() and not value.endswith("\0")):
            raise UserError(
                f"partition.column: row {row} has {value!r}; every row needs a non-empty string or an integer"
            )
    return [str(value) for value in values]


@section
class Quantity(_Clients):
    """Examples dealt at random; client sizes follow a power law."""

    name: Literal["quantity"] = "quantity"
    exponent: float = Field(1.0, ge=0)
    """The size of the k-th largest client is proportional to k^-exponent; 0 = equal sizes."""
    min_rows: Natural = 10
    """Minimum number of examples per client."""


def quantity(
    labels: np.ndarray, rng: np.random.Generator, *, num_clients: int, exponent: float = 1.0, min_rows: int = 1
) -> Partition:
    """Random rows, sizes by a power law: client k of 1 ... C gets rows in proportion to `k ** -exponent`.

    Where that is below `min_rows` a client gets `min_rows`, and the others share the rest by the same law. Site-1 is
    the largest; exponent 0 gives equal sizes.

    Args:
        labels: int64 `[n]`; only their number matters.
        exponent: >= 0.

    Raises:
        UserError: exponent negative or not finite, `num_clients` < 1, or `num_clients * min_rows` > n.

    Source: quantity skew in the sense of Li et al. 2022 (arXiv:2102.02079), with Zipf's law for the sizes.
    """
    rows = _labels(labels).size
    exponent = _number("exponent", exponent, zero=True)
    clients, least = _feasible(num_clients, min_rows, rows)
    law = np.arange(1, clients + 1, dtype=np.float64) ** -exponent
    # If the first m follow the law, its scale is what clients m + 1 ... C leave over; m is the most that stay >= least.
    scale = (rows - least * np.arange(clients - 1, -1, -1)) / np.cumsum(law)
    follow = int(np.flatnonzero(scale * law >= least * (1 - 1e-12))[-1]) + 1
    above = np.zeros(clients)
    above[:follow] = np.maximum(scale[follow - 1] * law[:follow] - least, 0)
    spare = rows - clients * least
    quota = above / max(above.sum(), 1e-300) * spare
    sizes = least + _round_up(np.floor(quota), quota % 1, spare, np.arange(clients))
    owner = np.empty(rows, dtype=np.int64)
    owner[rng.permutation(rows)] = np.repeat(np.arange(clients), sizes)
    return _from_owner(owner, clients)


@section
class Virtual:
    """Any number of clients, each with examples sampled with replacement: clients may overlap."""

    name: Literal["virtual"] = "virtual"
    num_clients: int = Field(1000, ge=1, le=10**8)
    """Number of clients; a client's examples do not depend on it."""
    min_rows: Count = 10
    """Minimum number of examples per client."""
    max_rows: int = Field(100, ge=1, le=10**7)
    """Maximum number of examples per client; sizes are drawn uniformly between the two, both included."""

    @model_validator(mode="after")
    def _check(self) -> Virtual:
        if self.max_rows < self.min_rows:
            raise wrong("max_rows", self.max_rows, f"is below min_rows={self.min_rows}")
        return self


def virtual(
    labels: np.ndarray, rng: np.random.Generator, *, num_clients: int, min_rows: int, max_rows: int
) -> VirtualPartition:
    """Clients that draw their rows with repetition, so that there may be more clients than rows; they may overlap.

    A size is uniform on `min_rows` ... `max_rows`, both included, and a row uniform over all rows.

    Args:
        labels: int64 `[n]`; only their number matters.
        rng: one number is taken from it, whatever the settings: the key that sizes and rows are a function of.

    Raises:
        UserError: `num_clients` or `min_rows` < 1, or `max_rows` < `min_rows`.

    Source: for measuring how a simulation scales; no published split.
    """
    rows = _labels(labels).size
    key = int(rng.integers(0, 2**64 - 1, dtype=np.uint64, endpoint=True))
    return VirtualPartition(key, num_clients, min_rows, max_rows, np.arange(rows))


# The rows of another split for the same clients.


def site_rows(
    partition: Partition, labels_train: np.ndarray, labels_other: np.ndarray, rng: np.random.Generator
) -> Partition:
    """Deal another split (validation) to the clients of `partition`, so that each site has rows of its own class mix.

    The rows of a class are shared in proportion to the clients' training rows of that class, by largest remainder, ties
    at random. Rows of a class that no client trains on stay unassigned; `notes["rows_unassigned"]` counts them.

    Args:
        partition: of the training rows.
        labels_train: int64 `[n]`, the labels that `partition.indices` points into.
        labels_other: int64 `[m]`.

    Returns:
        A partition of `0 ... m - 1` with the same clients and names.
    """
    train, other = np.asarray(labels_train), np.asarray(labels_other)
    classes, codes = np.unique(np.concatenate([train, other]), return_inverse=True)
    held = _class_counts(partition, codes[: train.size], classes.size)
    codes, totals = codes[train.size :], held.sum(axis=0)
    counts = np.zeros_like(held)
    for label, rows in enumerate(np.bincount(codes, minlength=classes.size)):
        if totals[label]:
            exact = held[:, label] * rows  # whole numbers over totals[label]: ties are exact
            tie = rng.permutation(partition.num_clients)
            counts[:, label] = _round_up(exact // totals[label], exact % totals[label], int(rows), tie)
    owner = _deal(codes, counts, rng)
    return _from_owner(owner, partition.num_clients, partition.names, {"rows_unassigned": int((owner < 0).sum())})


def site_rows_by_column(partition: Partition, values: Sequence[str | int]) -> Partition:
    """Another split for the clients of `by_column`: each client gets the rows whose value is its name.

    Args:
        values: `[m]`, the same column in the other split.

    Returns:
        A partition of `0 ... m - 1` with the same clients and names; rows of unknown values stay unassigned
        (`notes["rows_unassigned"]`).

    Raises:
        UserError: a row without a value.
    """
    number = {partition.name(client): client for client in range(partition.num_clients)}
    keys = _keys(values)
    owner = np.fromiter((number.get(key, -1) for key in keys), dtype=np.int64, count=len(keys))
    return _from_owner(owner, partition.num_clients, partition.names, {"rows_unassigned": int((owner < 0).sum())})


# The report.


def gini(sizes: np.ndarray) -> float:
    """Gini coefficient of sizes `[C]` >= 0: 0 when all are equal, 1 - 1/C when one client holds everything."""
    ordered = np.sort(np.asarray(sizes, dtype=np.float64))
    total, clients = ordered.sum(), ordered.size
    if total == 0:
        return 0.0
    ranks = np.arange(1, clients + 1)
    return max(0.0, float((2 * ranks - clients - 1) @ ordered / (clients * total)))


def js_divergence(counts: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits of each row of `counts` `[C, L]` to `reference` `[L]`: float64 `[C]` in [0, 1].

    Both are normalised here; a client without rows has NaN. This is the divergence, not its square root (the distance).

    Source: Lin 1991, eq. 4.1 with equal weights and base-2 logarithms.
    """
    with np.errstate(invalid="ignore"):
        p = counts / counts.sum(axis=1, keepdims=True)
        q = reference / reference.sum()
    middle = (p + q) / 2
    bits = (rel_entr(p, middle) + rel_entr(np.broadcast_to(q, p.shape), middle)).sum(axis=1) / (2 * math.log(2))
    return np.clip(bits, 0.0, 1.0)


SAMPLED = 1000  # virtual clients in a report: their classes must be counted client by client


def measure(partition: Partition | VirtualPartition, labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """How heterogeneous a partition is, ready for JSON.

    Of a `VirtualPartition` of more than 1,000 clients, whatever is by client or by class is of 1,000 of them, drawn by
    its key: class_counts, sizes, client_names, js, js_mean, js_max. The rest is of all clients.

    Args:
        labels: int64 `[n]`, values 0 ... num_classes - 1.

    Returns:
        class_counts `[C][L]`, sizes `[C]`, client_names `[C]`, num_clients, rows, min_rows, median_rows, max_rows,
        js `[C]` (bits, divergence of a client's label mix to that of all rows held by clients; None for an empty
        client), js_mean (weighted by rows) and js_max, size_gini, empty_clients (names), notes. js_mean and js_max are
        None when no client holds a row. Of a `VirtualPartition` also sampled_clients, the C of the above.
    """
    array = np.asarray(labels).astype(np.int64, copy=False)
    assert array.size == 0 or (array.min() >= 0 and array.max() < num_classes)
    if isinstance(partition, VirtualPartition):
        clients = partition.sample(SAMPLED)
        counts = np.stack([np.bincount(array[partition.rows(c)], minlength=num_classes) for c in clients.tolist()])
    else:
        clients = np.arange(partition.num_clients)
        counts = _class_counts(partition, array, num_classes)
    every, sizes = partition.sizes, counts.sum(axis=1)
    js, held = js_divergence(counts, counts.sum(axis=0)), sizes > 0
    names = [partition.name(client) for client in clients.tolist()]
    return {
        "num_clients": partition.num_clients,
        **({"sampled_clients": clients.size} if isinstance(partition, VirtualPartition) else {}),
        "rows": int(every.sum()),
        "client_names": names,
        "class_counts": counts.tolist(),
        "sizes": sizes.tolist(),
        "min_rows": int(every.min()),
        "median_rows": float(np.median(every)),
        "max_rows": int(every.max()),
        "size_gini": gini(every),
        "js": [float(bits) if some else None for bits, some in zip(js, held, strict=True)],
        "js_mean": float(np.average(js[held], weights=sizes[held])) if held.any() else None,
        "js_max": float(js[held].max()) if held.any() else None,
        "empty_clients": [names[client] for client in np.flatnonzero(~held)],
        "notes": dict(partition.notes),
    }


class Partitioner(NamedTuple):
    """A way to divide examples: the section of its keys, and the function that takes them."""

    keys: type
    draw: Callable[..., Partition | VirtualPartition]


PARTITIONERS = {
    "iid": Partitioner(Iid, iid),
    "dirichlet": Partitioner(Dirichlet, dirichlet),
    "dirichlet_fedma": Partitioner(DirichletFedma, dirichlet_fedma),
    "class_counts": Partitioner(ClassCounts, class_counts),
    "shards": Partitioner(Shards, shards),
    "by_column": Partitioner(ByColumn, by_column),
    "quantity": Partitioner(Quantity, quantity),
    "virtual": Partitioner(Virtual, virtual),
}
