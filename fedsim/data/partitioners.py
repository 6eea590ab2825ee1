"""How the examples are divided among the clients: one class per partitioner, and the table of their names.

A partitioner is a config section that can be called: its fields are the keys, and `(labels, rng) -> Partition` draws. Those
by class settle counts first (a matrix of clients by classes) and deal the examples once, so a redraw is cheap.

Sources: McMahan et al. 2017 (arXiv:1602.05629); Hsu et al. 2019 (arXiv:1909.06335); Yurochkin et al. 2019
(arXiv:1905.12022); Wang et al. 2020, FedMA (arXiv:2002.06440).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from fedsim.core.errors import UserError
from fedsim.core.section import Count, Natural, Positive, Text, section, wrong
from fedsim.data.dealing import by_name, cut, deal, from_owner, round_up
from fedsim.data.partition import Partition, VirtualPartition

_MOST_CLIENTS = 10**6  # where clients may be without examples


def _dealt(num_clients: int) -> int:
    if num_clients > _MOST_CLIENTS:
        way = f"is above {_MOST_CLIENTS:,}; use fewer, or partition.name=virtual, which takes up to 100,000,000"
        raise wrong("", num_clients, way)
    return num_clients


@section
class _Clients:
    num_clients: Annotated[Count, AfterValidator(_dealt)] = 3
    """Number of clients."""

    def _check_rows(self, min_rows: int, rows: int) -> None:
        clients = self.num_clients
        if clients * min_rows > rows:
            or_clients = f" (or num_clients {rows // min_rows})" if rows >= min_rows else ""
            raise UserError(
                f"partition.min_rows: {min_rows} x {clients} clients needs {clients * min_rows} examples, the training split "
                f"has {rows}; the largest feasible min_rows is {rows // clients}{or_clients}"
            )


@section
class _ByClass(_Clients):
    by: str | None = None
    """Column whose values are the classes to divide by; null = the label."""


@section
class Iid(_Clients):
    """Examples dealt at random; client sizes differ by at most one."""

    name: Literal["iid"] = "iid"

    def __call__(self, labels: np.ndarray, rng: np.random.Generator) -> Partition:
        """The first clients have the extra example. Of `labels` `[n]` only the number matters.

        Raises:
            UserError: for more clients than examples.

        Source: the IID split of McMahan et al. 2017, section 3.
        """
        rows, clients = labels.size, self.num_clients
        if clients > rows:
            raise UserError(
                f"partition.num_clients: {clients} clients, the training split has {rows} examples; give at most {rows}"
            )
        owner = np.empty(rows, dtype=np.int64)
        owner[rng.permutation(rows)] = np.arange(rows) % clients
        return from_owner(owner, clients)


# ------------------------------------------------------------------------------------------------ label skew


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

    def __call__(self, labels: np.ndarray, rng: np.random.Generator) -> Partition:
        """Draw counts until each client has `min_rows`, deal the examples, repair.

        Args:
            labels: int64 `[n]`.

        Raises:
            UserError: for a `min_rows` that cannot be, or that no draw reached where `repair` is off.
        """
        self._check_rows(self.min_rows, labels.size)
        _, codes, class_sizes = np.unique(labels, return_inverse=True, return_counts=True)
        counts, notes = self._until(lambda: self._draw(class_sizes, rng))
        owner = deal(codes, counts, rng)
        if notes["rows_moved"]:
            owner = _repair(owner, self.num_clients, self.min_rows, rng)
        return from_owner(owner, self.num_clients, notes=notes)

    def _draw(self, class_sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Counts `[C, L]`."""
        raise NotImplementedError

    def _shares(self, clients: int, rng: np.random.Generator) -> np.ndarray:
        # Beyond these bounds a draw is one-hot or uniform to the last bit anyway, and NumPy's sampler over- or underflows.
        shares = rng.dirichlet(np.full(clients, min(max(self.alpha, 1e-100), 1e100)))
        assert np.isfinite(shares).all()
        return shares

    def _until(self, draw: Callable[[], np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
        """Counts `[C, L]` drawn until each client has `min_rows`, at most `max_redraws` times; the best ones for repair."""
        best, best_key = None, (-1, 0)
        for number in range(self.max_redraws):
            counts = draw()
            sizes = counts.sum(axis=1)
            # The same minimum in many draws is common (zero, with many clients): then the one with the least to move.
            key = (int(sizes.min()), -int(np.maximum(self.min_rows - sizes, 0).sum()))
            if best is None or key > best_key:
                best, best_key = counts, key
            if best_key[0] >= self.min_rows:
                return best, {"redraws": number, "rows_moved": 0}
        if not self.repair:
            raise UserError(
                f"partition: after {self.max_redraws} draws the smallest client had at most {best_key[0]} examples, min_rows "
                f"is {self.min_rows}; raise alpha, lower min_rows, or set partition.repair=true"
            )
        assert best is not None
        return best, {"redraws": self.max_redraws - 1, "rows_moved": -best_key[1]}


def _repair(owner: np.ndarray, num_clients: int, min_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Lower the largest clients to a common level, random examples of theirs going to clients below `min_rows`."""
    sizes = np.bincount(owner, minlength=num_clients)
    need = np.maximum(min_rows - sizes, 0)
    total = int(need.sum())
    low, high = min_rows, int(sizes.max())  # the highest level that frees enough examples lies in [low, high]
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= total else (low, level - 1)
    give = np.maximum(sizes - low, 0)
    donors = np.flatnonzero(give)
    give[donors[: int(give.sum()) - total]] -= 1  # the level may free a few examples too many, at most one per donor
    order = np.lexsort((rng.random(owner.size), owner))
    rank = np.arange(owner.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moved = order[rank < give[owner[order]]]
    repaired = owner.copy()
    repaired[rng.permutation(moved)] = np.repeat(np.arange(num_clients), need)
    return repaired


@section
class Dirichlet(_DirichletKeys):
    """Each class divided over the clients by Dirichlet proportions, without a cap."""

    # Shares become counts by systematic rounding (one uniform shift per class), so every client's expected count is exactly
    # its share, also where a class has fewer examples than there are clients.
    #
    # Source: Yurochkin et al. 2019, section 4 (proportions over clients, class by class); also the usual implementation of
    # the label skew of Hsu et al. 2019, who draw a class mix per client instead.
    name: Literal["dirichlet"] = "dirichlet"

    def _draw(self, class_sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        cuts = [cut(self._shares(self.num_clients, rng), int(n), rng.random()) for n in class_sizes]
        return np.stack(cuts, axis=1)


@section
class DirichletFedma(_DirichletKeys):
    """The published sampler (FedMA, NVFlare, FedML): a client that already has N/K examples gets none of the remaining classes."""

    # Classes in label order; shares become counts by truncating the cumulated sum. The published code sets the proportions of
    # full clients to zero and rescales the others: these are again Dir(alpha, ..., alpha) over the remaining clients, and
    # independent of those struck out. So we draw over the remaining clients directly: the same distribution, without the 0/0
    # when alpha is so small that all the mass fell on full clients. Deviation: `max_redraws` and `repair` bound the published
    # endless loop.
    #
    # Source: Wang et al. 2020, section 4 and the code published with it.
    name: Literal["dirichlet_fedma"] = "dirichlet_fedma"

    def _draw(self, class_sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        counts = np.zeros((self.num_clients, class_sizes.size), dtype=np.int64)
        sizes, rows = np.zeros(self.num_clients, dtype=np.int64), int(class_sizes.sum())
        for label, n in enumerate(class_sizes):
            # Never empty: were every client at rows/clients or above, no example would be left for this class.
            open_clients = np.flatnonzero(sizes * self.num_clients < rows)
            counts[open_clients, label] = cut(self._shares(open_clients.size, rng), int(n), 0.0)
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
            raise wrong("counts", self.counts, "has lists of different length; each client needs one count per class")
        return self

    def __call__(self, labels: np.ndarray, rng: np.random.Generator) -> Partition:
        """Examples drawn at random; the rest stays unused (`notes["rows_unused"]`).

        Args:
            labels: int64 `[n]`, values 0 ... L - 1 for L columns of `counts`.

        Raises:
            UserError: for more examples of a class than there are.
        """
        wanted = np.array(self.counts, dtype=np.int64)
        available = np.bincount(labels, minlength=wanted.shape[1])
        for label, (asked, there) in enumerate(zip(wanted.sum(axis=0), available, strict=True)):
            if asked > there:
                raise UserError(
                    f"partition.counts: class {label} is asked for {asked} examples, the training split has {there}; "
                    f"the largest feasible sum of column {label} is {there}"
                )
        owner = deal(labels, wanted, rng)
        return from_owner(owner, wanted.shape[0], notes={"rows_unused": int((owner < 0).sum())})


@section
class Shards(_ByClass):
    """Each client gets examples of at most s classes."""

    name: Literal["shards"] = "shards"
    classes_per_client: Count = 2
    """s, the maximum number of classes per client."""

    def __call__(self, labels: np.ndarray, rng: np.random.Generator) -> Partition:
        """Examples sorted by label, cut into `num_clients * classes_per_client` shards, that many per client at random.

        Deviation: the paper cuts at equal distances, so a shard may straddle two classes and a client may see up to twice
        `classes_per_client` classes. Here no shard crosses a class boundary: each class starts as one shard, and the class
        with the largest shards is cut once more until there are enough. A client thus has examples of at most
        `classes_per_client` classes (fewer when dealt two shards of one class); the shards of a class differ by one example
        at most, those of different classes by what the boundaries ask for.

        Raises:
            UserError: more classes per client than exist, fewer shards than classes (some example would stay unassigned), or
                more shards than examples.

        Source: McMahan et al. 2017, section 3 (the pathological non-IID split).
        """
        clients, per_client = self.num_clients, self.classes_per_client
        _, codes, class_sizes = np.unique(labels, return_inverse=True, return_counts=True)
        total, classes, rows = clients * per_client, class_sizes.size, labels.size
        if per_client > classes:
            raise UserError(
                f"partition.classes_per_client: {per_client} asked, the training split has {classes} classes; "
                f"the largest feasible is {classes}"
            )
        if total > rows:
            raise UserError(
                f"partition.num_clients: {clients} clients x {per_client} shards needs {total} examples, "
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
        # Shards lie in class order, `place` counts them within their class; the first ones of a class take its odd examples.
        shard_class = np.repeat(np.arange(classes), pieces)
        place = np.arange(total) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        sizes = class_sizes[shard_class] // pieces[shard_class] + (place < (class_sizes % pieces)[shard_class])
        client_of = rng.permutation(total) % clients
        owner = np.empty(rows, dtype=np.int64)
        by_class = np.lexsort((rng.random(rows), codes))  # classes in order, examples of one class shuffled
        owner[by_class] = np.repeat(client_of, sizes)
        return from_owner(owner, clients)


# ------------------------------------------------------------------------------------------------ others


@section
class ByColumn:
    """One client per value of a column: natural ids such as users, sites or sources."""

    name: Literal["by_column"] = "by_column"
    column: Text
    """The column that holds the clients' ids."""
    min_rows: Count = 1
    """Minimum number of examples per client; a value with fewer is an error, since every example belongs to a client."""

    def __call__(self, values: Sequence[str | int], rng: np.random.Generator | None = None) -> Partition:
        """Clients named by the value as text (1 and "1" are one client) and ordered by it, by number if all are integers.

        Args:
            values: of the column, `[n]`; no label.
            rng: nothing is drawn.

        Raises:
            UserError: for a client with fewer than `min_rows` examples.

        Source: natural partitions as in LEAF (Caldas et al. 2018, arXiv:1812.01097).
        """
        keys = [str(value) for value in values]
        names = sorted(set(keys), key=int if all(isinstance(v, Integral) for v in values) else None)
        partition = by_name(keys, names)
        sizes = partition.sizes
        if few := int((sizes < self.min_rows).sum()):
            raise UserError(
                f"partition.min_rows: client {names[sizes.argmin()]!r} has {sizes.min()} examples, min_rows is {self.min_rows} "
                f"({few} of {len(names)} clients are below); the largest feasible min_rows is {sizes.min()}"
            )
        return partition


@section
class Quantity(_Clients):
    """Examples dealt at random; client sizes follow a power law."""

    name: Literal["quantity"] = "quantity"
    exponent: float = Field(1.0, ge=0)
    """The size of the k-th largest client is proportional to k^-exponent; 0 = equal sizes."""
    min_rows: Natural = 10
    """Minimum number of examples per client."""

    def __call__(self, labels: np.ndarray, rng: np.random.Generator) -> Partition:
        """Client k of 1 ... C gets examples in proportion to `k ** -exponent`, but `min_rows` at least.

        The clients above that share the rest by the same law. Of `labels` `[n]` only the number matters.

        Raises:
            UserError: for `num_clients * min_rows` > n.

        Source: quantity skew in the sense of Li et al. 2022 (arXiv:2102.02079), with Zipf's law for the sizes.
        """
        rows, clients, least = labels.size, self.num_clients, self.min_rows
        self._check_rows(least, rows)
        law = np.arange(1, clients + 1, dtype=np.float64) ** -self.exponent
        # If the first m follow the law, its scale is what clients m + 1 ... C leave over; m is the most that stay >= least.
        scale = (rows - least * np.arange(clients - 1, -1, -1)) / np.cumsum(law)
        follow = int(np.flatnonzero(scale * law >= least * (1 - 1e-12))[-1]) + 1
        above = np.zeros(clients)
        above[:follow] = np.maximum(scale[follow - 1] * law[:follow] - least, 0)
        spare = rows - clients * least
        quota = above / max(above.sum(), 1e-300) * spare
        sizes = least + round_up(np.floor(quota), quota % 1, spare, np.arange(clients))
        owner = np.empty(rows, dtype=np.int64)
        owner[rng.permutation(rows)] = np.repeat(np.arange(clients), sizes)
        return from_owner(owner, clients)


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

    def __call__(self, labels: np.ndarray, rng: np.random.Generator) -> VirtualPartition:
        """Of `labels` `[n]` only the number matters; one number is taken from `rng`, whatever the settings: the key."""
        key = int(rng.integers(0, 2**64 - 1, dtype=np.uint64, endpoint=True))
        return VirtualPartition(key, self.num_clients, self.min_rows, self.max_rows, np.arange(labels.size))


PARTITIONERS: dict[str, Any] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "dirichlet_fedma": DirichletFedma,
    "class_counts": ClassCounts,
    "shards": Shards,
    "by_column": ByColumn,
    "quantity": Quantity,
    "virtual": Virtual,
}
