"""Partitions: what always holds, what is known in closed form, what must fail and how it says so."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import ks_2samp
from tiers import fast_only

from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.data.dealing import by_name, cut, site_rows
from fedsim.data.partition import Partition
from fedsim.data.partitioners import PARTITIONERS, _repair
from fedsim.data.skew import gini, js_divergence, measure

COUNTS = (246, 1107, 458)  # negative, neutral, positive: the published training cut, 1,811 rows
PUBLISHED = {
    1: [[6, 59, 25], [221, 525, 0], [19, 523, 433]],
    5: [[89, 231, 71], [92, 376, 156], [65, 500, 231]],
    10: [[111, 366, 96], [43, 465, 266], [92, 276, 96]],
}


def make_labels(*counts: int, seed: int = 0) -> np.ndarray:
    return stream(seed, "labels").permutation(np.repeat(np.arange(len(counts)), counts))


LABELS = make_labels(*COUNTS)


def draw(name: str, labels: Any, rng: Any = None, **keys: Any) -> Partition:
    """What the partitioner of this name makes of labels, or of the values of a column."""
    return PARTITIONERS[name](**keys)(labels, rng)


names = ("iid", "dirichlet", "dirichlet_fedma", "class_counts", "shards", "quantity")
iid, dirichlet, dirichlet_fedma, class_counts, shards, quantity = (functools.partial(draw, name) for name in names)
by_column = functools.partial(draw, "by_column", column="user")


def rng(*names: str | int) -> np.random.Generator:
    return stream(0, "test", *names)


def assert_partition(partition: Partition, rows: int, num_clients: int, covering: bool = True) -> None:
    assert partition.num_clients == num_clients == partition.sizes.size
    held = np.concatenate([partition.rows(client) for client in range(num_clients)])
    assert np.unique(held).size == held.size
    assert held.size == 0 or (held.min() >= 0 and held.max() < rows)
    assert held.dtype == partition.offsets.dtype == np.int64
    if covering:
        assert held.size == rows


def counts_of(partition: Partition, labels: np.ndarray, classes: int) -> np.ndarray:
    """The obvious loop."""
    rows = [np.bincount(labels[partition.rows(c)], minlength=classes) for c in range(partition.num_clients)]
    return np.stack(rows)


SETTINGS = {
    "iid": ("iid", {"num_clients": 7}),
    "dirichlet 0.1": ("dirichlet", {"num_clients": 5, "alpha": 0.1, "min_rows": 1}),
    "dirichlet 1": ("dirichlet", {"num_clients": 10, "alpha": 1.0}),
    "dirichlet 100": ("dirichlet", {"num_clients": 40, "alpha": 100.0}),
    "dirichlet repaired": ("dirichlet", {"num_clients": 60, "alpha": 0.05, "repair": True, "max_redraws": 3}),
    "fedma 1": ("dirichlet_fedma", {"num_clients": 3, "alpha": 1.0}),
    "fedma 0.1": ("dirichlet_fedma", {"num_clients": 4, "alpha": 0.1, "min_rows": 0}),
    "fedma repaired": ("dirichlet_fedma", {"num_clients": 100, "alpha": 0.05, "repair": True, "max_redraws": 3}),
    "shards": ("shards", {"num_clients": 12, "classes_per_client": 2}),
    "quantity": ("quantity", {"num_clients": 20, "exponent": 1.5, "min_rows": 3}),
    "class_counts": ("class_counts", {"counts": PUBLISHED[1]}),
}
CLIENTS = {"class_counts": 3}


def test_settings_name_every_partitioner() -> None:
    assert {name for name, _ in SETTINGS.values()} == set(PARTITIONERS) - {
        "virtual",
        "by_column",
    }  # see test_virtual.py; nothing is drawn by a column


@pytest.mark.parametrize("key", SETTINGS)
def test_disjoint_covering_seeded(key: str) -> None:
    name, arguments = SETTINGS[key]
    clients = arguments.get("num_clients", CLIENTS.get(name))
    for seed in range(20):
        first = draw(name, LABELS, stream(seed, "partition"), **arguments)
        again = draw(name, LABELS, stream(seed, "partition"), **arguments)
        assert_partition(first, len(LABELS), clients)
        assert first.sizes.min() >= arguments.get("min_rows", 0)
        assert np.array_equal(first.offsets, again.offsets)
        assert np.array_equal(first.indices, again.indices)
        assert first.notes == again.notes
        for client in range(clients):
            assert (np.diff(first.rows(client)) > 0).all()
    other = draw(name, LABELS, stream(99, "partition"), **arguments)
    assert not np.array_equal(first.indices, other.indices)


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_fedma"])
@fast_only(0, 4)
@pytest.mark.parametrize("alpha", [5e-324, 1e-3, 0.5, 1e5, 1.7e308])
@fast_only(0, 2, 4)
@pytest.mark.parametrize("counts", [COUNTS, (50,), (0, 40, 0, 3, 0), (1, 1, 1), (7, 0)])
def test_dirichlet_extremes(name: str, alpha: float, counts: tuple[int, ...]) -> None:
    labels = make_labels(*counts)
    for clients in (1, 2, 3, len(labels), 2 * len(labels)):
        partition = draw(name, labels, rng(name, clients), num_clients=clients, alpha=alpha, min_rows=0)
        assert_partition(partition, len(labels), clients)
        report = measure(partition, labels, len(counts))
        assert all(bits is None or 0 <= bits <= 1 for bits in report["js"])
        if clients <= len(labels):
            least = len(labels) // clients
            full = draw(
                name, labels, rng(name), num_clients=clients, alpha=alpha, min_rows=least, max_redraws=2, repair=True
            )
            assert_partition(full, len(labels), clients)
            assert full.sizes.min() == least


def test_alpha_moves_from_one_hot_to_the_global_mix() -> None:
    labels = make_labels(3000, 5000, 2000)
    js = [
        np.mean(
            [
                measure(dirichlet(labels, rng(n), num_clients=8, alpha=a, min_rows=0), labels, 3)["js_mean"]
                for n in range(20)
            ]
        )
        for a in (1e-3, 0.1, 1.0, 10.0, 1e5)
    ]
    assert js == sorted(js, reverse=True)
    assert js[0] > 0.25
    assert js[-1] < 1e-4
    even = dirichlet(labels, rng(), num_clients=8, alpha=1e9)
    assert np.abs(counts_of(even, labels, 3) - np.array([375, 625, 250])).max() <= 1
    single = dirichlet(labels, rng(), num_clients=8, alpha=1e-9, min_rows=0)
    assert sorted(counts_of(single, labels, 3).ravel())[-3:] == [2000, 3000, 5000]


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_fedma"])
def test_the_limits_of_alpha_in_floating_point(name: str) -> None:
    labels = np.zeros(1000, dtype=np.int64)
    even = draw(name, labels, rng(), num_clients=8, alpha=1.7e308)
    assert np.abs(even.sizes - 125).max() <= 1
    for alpha in (5e-324, 1e-200):
        draws = [draw(name, labels, rng(s), num_clients=4, alpha=alpha, min_rows=0).sizes for s in range(200)]
        assert all(sizes.max() == 1000 for sizes in draws)
        # Each client in turn: 50 of 200 expected, standard deviation 6.1.
        assert np.bincount([sizes.argmax() for sizes in draws], minlength=4).min() > 25


def test_cuts_survive_rounding_of_the_cumulated_sum() -> None:
    for error in (-1e-9, 1e-9):
        for shift in (0.0, 1e-7, 1 - 1e-7):
            counts = cut(np.array([0.5, 0.5 + error, 0.0]), 1000, shift)
            assert counts.sum() == 1000
            assert counts.min() >= 0


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_fedma"])
def test_rows_are_drawn_not_taken_in_order(name: str) -> None:
    labels = np.zeros(1000, dtype=np.int64)
    rows = draw(name, labels, rng(), num_clients=2, alpha=100.0).rows(0)
    assert 350 < rows.mean() < 650
    dealt = shards(labels, rng(), num_clients=2, classes_per_client=1).rows(0)
    assert 400 < dealt.mean() < 600
    repaired = _repair(labels, 2, 400, rng())
    assert 400 < np.flatnonzero(repaired == 1).mean() < 600


def test_dirichlet_expected_counts_are_fair_with_more_clients_than_rows() -> None:
    labels = np.zeros(10, dtype=np.int64)
    total = np.zeros(40)
    for seed in range(4000):
        total += dirichlet(labels, rng(seed), num_clients=40, alpha=1e6, min_rows=0).sizes
    # 10 rows over 40 clients: a client gets one with probability 1/4, standard error 0.0068.
    assert np.abs(total / 4000 - 0.25).max() < 5 * 0.0068


def fedma_loop(labels: np.ndarray, clients: int, alpha: float, generator: np.random.Generator) -> np.ndarray:
    """The published sampler in plain loops, one draw: strike out full clients, rescale, truncate. Counts `[C, L]`."""
    held: list[list[int]] = [[] for _ in range(clients)]
    for label in range(labels.max() + 1):
        rows = generator.permutation(np.flatnonzero(labels == label))
        p = generator.dirichlet([alpha] * clients)
        for client in range(clients):
            if len(held[client]) >= len(labels) / clients:
                p[client] = 0.0
        p = p / p.sum()
        start = 0.0
        for client in range(clients):
            stop = start + p[client]
            last = client == clients - 1
            held[client] += list(rows[int(start * len(rows)) : len(rows) if last else int(stop * len(rows))])
            start = stop
    return np.stack([np.bincount(labels[np.array(rows, dtype=int)], minlength=labels.max() + 1) for rows in held])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 10.0])
def test_fedma_has_the_published_distribution(alpha: float) -> None:
    labels = make_labels(25, 110, 46)
    loop = np.stack([fedma_loop(labels, 3, alpha, stream(seed, "loop")) for seed in range(1500)])
    ours = np.stack(
        [
            counts_of(dirichlet_fedma(labels, stream(seed, "ours"), num_clients=3, alpha=alpha, min_rows=0), labels, 3)
            for seed in range(1500)
        ]
    )
    for client in range(3):
        for label in range(3):
            assert ks_2samp(loop[:, client, label], ours[:, client, label]).pvalue > 1e-3, (client, label)
    for of in (
        lambda c: c.sum(axis=2).max(axis=1),
        lambda c: c.sum(axis=2).min(axis=1),
        lambda c: c[:, 0, 1] - c[:, 0, 2],
    ):
        assert ks_2samp(of(loop), of(ours)).pvalue > 1e-3


def test_fedma_caps_and_plain_does_not() -> None:
    labels = make_labels(*[100] * 10)
    for seed in range(30):
        capped = dirichlet_fedma(labels, rng(seed), num_clients=5, alpha=0.05, min_rows=0)
        # A client just under the cap of 200 rows can still draw one whole class.
        assert capped.sizes.max() < 200 + 100
    plain = [dirichlet(labels, rng(seed), num_clients=5, alpha=0.05, min_rows=0).sizes.max() for seed in range(30)]
    assert max(plain) > 400


def test_redraws_are_counted_and_reach_the_minimum() -> None:
    notes = []
    for seed in range(30):
        partition = dirichlet(LABELS, stream(seed, "p"), num_clients=10, alpha=0.5, min_rows=30)
        assert partition.sizes.min() >= 30
        notes.append(partition.notes)
    assert all(note["rows_moved"] == 0 for note in notes)
    assert len({note["redraws"] for note in notes}) > 1


def test_repair_moves_only_what_is_missing_from_the_largest() -> None:
    owner = np.repeat([0, 1, 2, 3, 4], [50, 40, 12, 3, 0])
    sizes = np.bincount(owner, minlength=5)
    repaired = _repair(owner, 5, 10, rng())
    after = np.bincount(repaired, minlength=5)
    moved = owner != repaired
    assert moved.sum() == 7 + 10
    # 50 + 40 - 17 = 73 rows left for the two largest: 36 and 37.
    assert sorted(after[:2]) == [36, 37]
    assert list(after[2:]) == [12, 10, 10]
    assert set(owner[moved]) == {0, 1}
    assert set(repaired[moved]) == {3, 4}
    assert sizes.sum() == after.sum()


def test_repair_notes_are_true() -> None:
    settings = {"num_clients": 60, "alpha": 0.05, "max_redraws": 5}
    partition = dirichlet(LABELS, stream(3, "p"), min_rows=10, repair=True, **settings)
    with pytest.raises(UserError) as error:
        dirichlet(LABELS, stream(3, "p"), min_rows=10, **settings)
    assert str(error.value) == (
        "partition: after 5 draws the smallest client had at most 0 examples, min_rows is 10; raise alpha, lower min_rows, "
        "or set partition.repair=true"
    )
    assert partition.notes["redraws"] == 4
    assert 0 < partition.notes["rows_moved"] < 600
    assert partition.sizes.min() == 10


def test_best_minimum_seen_is_the_best_of_the_draws() -> None:
    generator, settings = stream(5, "p"), {"num_clients": 10, "alpha": 1.0}
    sizes = np.unique(LABELS, return_counts=True)[1]
    minima = [PARTITIONERS["dirichlet"](**settings)._draw(sizes, generator).sum(axis=1).min() for _ in range(20)]
    with pytest.raises(
        UserError, match=f"after 20 draws the smallest client had at most {max(minima)} examples, min_rows is 170"
    ):
        dirichlet(LABELS, stream(5, "p"), min_rows=170, max_redraws=20, **settings)


@pytest.mark.parametrize("alpha", PUBLISHED)
def test_published_partitions(alpha: int) -> None:
    partition = class_counts(LABELS, rng(alpha), counts=PUBLISHED[alpha])
    assert_partition(partition, 1811, 3)
    report = measure(partition, LABELS, 3)
    assert report["class_counts"] == PUBLISHED[alpha]
    assert report["sizes"] == [sum(row) for row in PUBLISHED[alpha]]
    assert report["notes"] == {"rows_unused": 0}
    assert report["client_names"] == ["site-1", "site-2", "site-3"]


def test_class_counts_may_leave_rows_unused() -> None:
    partition = class_counts(LABELS, rng(), counts=[[10, 0, 5, 0], [0, 20, 0, 0], [0, 0, 0, 0]])
    assert_partition(partition, len(LABELS), 3, covering=False)
    assert counts_of(partition, LABELS, 4).tolist() == [[10, 0, 5, 0], [0, 20, 0, 0], [0, 0, 0, 0]]
    assert partition.notes == {"rows_unused": 1811 - 35}
    assert measure(partition, LABELS, 4)["empty_clients"] == ["site-3"]


@fast_only(0, 1, 6)
@pytest.mark.parametrize(
    ("counts", "clients", "per_client"),
    [
        (COUNTS, 10, 2),
        (COUNTS, 3, 1),
        (COUNTS, 1, 3),
        ((5, 0, 5), 5, 2),
        ((1, 99), 50, 2),
        ((30,), 30, 1),
        ((2, 3, 997), 100, 3),
    ],
)
def test_shards_hold_few_classes(counts: tuple[int, ...], clients: int, per_client: int) -> None:
    labels = make_labels(*counts)
    for seed in range(10):
        partition = shards(labels, rng(seed), num_clients=clients, classes_per_client=per_client)
        assert_partition(partition, len(labels), clients)
        held = counts_of(partition, labels, len(counts))
        assert ((held > 0).sum(axis=1) <= per_client).all()
        assert partition.sizes.min() >= per_client


def test_shards_of_equal_classes_are_equal() -> None:
    # 10 classes of 600 rows, 100 clients of 2 shards: 200 shards of 30 rows, as in the paper with 300.
    labels = make_labels(*[600] * 10)
    partition = shards(labels, rng(), num_clients=100, classes_per_client=2)
    assert (partition.sizes == 60).all()
    assert set(counts_of(partition, labels, 10).ravel()) == {0, 30, 60}


def test_by_column_names_and_order() -> None:
    partition = by_column(["b", "a", "b", "C", "a", "b"])
    assert partition.names == ("C", "a", "b")
    assert [partition.rows(c).tolist() for c in range(3)] == [[3], [1, 4], [0, 2, 5]]
    assert by_column([10, 9, -1, 10]).names == ("-1", "9", "10")
    assert by_column(["10", "9"]).names == ("10", "9")
    assert by_column(np.array([3, 1, 3])).names == ("1", "3")


def test_quantity_is_a_power_law_above_the_minimum() -> None:
    labels = np.zeros(100_000, dtype=np.int64)
    sizes = quantity(labels, rng(), num_clients=50, exponent=1.2, min_rows=0).sizes
    law = np.arange(1, 51) ** -1.2
    assert np.abs(sizes - law / law.sum() * 100_000).max() < 1
    floor = quantity(labels, rng(), num_clients=50, exponent=1.2, min_rows=900).sizes
    above = floor > 900
    assert floor.min() == 900
    assert 1 < above.sum() < 49
    assert np.abs(floor[above] / law[above] / (floor[0] / law[0]) - 1).max() < 2e-3
    assert np.ptp(quantity(labels, rng(), num_clients=7, exponent=0).sizes) == 1
    assert (quantity(labels, rng(), num_clients=100, exponent=2.0, min_rows=1000).sizes == 1000).all()
    assert quantity(labels, rng(), num_clients=3, exponent=1e6, min_rows=5).sizes.tolist() == [99_990, 5, 5]
    for clients in range(1, 60):
        for exponent in (0.3, 1.0, 3.0):
            some = quantity(labels[:61], rng(), num_clients=clients, exponent=exponent, min_rows=1)
            assert_partition(some, 61, clients)
            assert (np.diff(some.sizes) <= 0).all()
            assert some.sizes.min() >= 1


def test_iid_sizes_differ_by_one() -> None:
    partition = iid(LABELS, rng(), num_clients=3)
    assert partition.sizes.tolist() == [604, 604, 603]
    assert iid(LABELS, rng(), num_clients=1811).sizes.tolist() == [1] * 1811
    assert measure(partition, LABELS, 3)["js_max"] < 0.005


def test_no_partitioner_draws_before_it_has_checked() -> None:
    class Forbidden:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"drew with {name}")

    for name, arguments, _ in WRONG:
        with pytest.raises(UserError):
            draw(name, LABELS, Forbidden(), **arguments)


WRONG = [
    (
        "dirichlet",
        {"num_clients": 300, "alpha": 1.0},
        "partition.min_rows: 10 x 300 clients needs 3000 examples, the training split has 1811; "
        "the largest feasible min_rows is 6 (or num_clients 181)",
    ),
    (
        "dirichlet_fedma",
        {"num_clients": 1, "alpha": 1.0, "min_rows": 2000},
        "partition.min_rows: 2000 x 1 clients needs 2000 examples, the training split has 1811; "
        "the largest feasible min_rows is 1811",
    ),
    (
        "iid",
        {"num_clients": 2000},
        "partition.num_clients: 2000 clients, the training split has 1811 examples; give at most 1811",
    ),
    (
        "quantity",
        {"num_clients": 4, "min_rows": 453},
        "partition.min_rows: 453 x 4 clients needs 1812 examples, the training split has 1811; "
        "the largest feasible min_rows is 452 (or num_clients 3)",
    ),
    (
        "class_counts",
        {"counts": [[200, 0, 0], [100, 0, 0]]},
        "partition.counts: class 0 is asked for 300 examples, the training split has 246; "
        "the largest feasible sum of column 0 is 246",
    ),
    (
        "class_counts",
        {"counts": [[1, 1, 1, 1]]},
        "partition.counts: class 3 is asked for 1 examples, the training split has 0; "
        "the largest feasible sum of column 3 is 0",
    ),
    (
        "shards",
        {"num_clients": 3, "classes_per_client": 4},
        "partition.classes_per_client: 4 asked, the training split has 3 classes; the largest feasible is 3",
    ),
    (
        "shards",
        {"num_clients": 1000, "classes_per_client": 2},
        "partition.num_clients: 1000 clients x 2 shards needs 2000 examples, the training split has 1811; "
        "the largest feasible num_clients is 905",
    ),
    (
        "shards",
        {"num_clients": 2, "classes_per_client": 1},
        "partition.classes_per_client: 2 clients x 1 cannot hold 3 classes; "
        "the smallest feasible is 2 (or num_clients 3)",
    ),
]


@fast_only(0, 2, 3, 4, 6, 8)
@pytest.mark.parametrize(("name", "arguments", "message"), WRONG)
def test_a_mistake_says_the_way_out(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        draw(name, LABELS, rng(), **arguments)
    assert str(error.value) == message


def test_a_client_of_a_column_with_too_few_examples_is_named() -> None:
    said = "client 'b' has 1 examples, min_rows is 2 (1 of 2 clients are below); the largest feasible min_rows is 1"
    with pytest.raises(UserError) as error:
        by_column(["a", "b", "a"], min_rows=2)
    assert str(error.value) == f"partition.min_rows: {said}"


def test_arrays_round_trip_without_pickle(tmp_path: Path) -> None:
    for partition in (
        iid(LABELS, rng(), num_clients=4),
        by_column(["é a", "b", "é a", "longer name"]),
    ):
        np.savez(tmp_path / "partition.npz", **partition.to_arrays())
        with np.load(tmp_path / "partition.npz", allow_pickle=False) as arrays:
            loaded = Partition.from_arrays(arrays)
        assert np.array_equal(loaded.offsets, partition.offsets)
        assert np.array_equal(loaded.indices, partition.indices)
        assert loaded.names == partition.names
        assert [loaded.name(c) for c in range(4 if partition.names is None else 3)] == [
            partition.name(c) for c in range(partition.num_clients)
        ]


@fast_only(0, 1, 6, 8, 9)
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"offsets": [0, 1]}, "array indices is missing"),
        ({"offsets": [0, 2], "indices": [0, 1, 2]}, "offsets must rise"),
        ({"offsets": [0, 2, 1, 3], "indices": [0, 1, 2]}, "offsets must rise"),
        ({"offsets": [1, 3], "indices": [0, 1, 2]}, "offsets must rise"),
        ({"offsets": [0], "indices": []}, "offsets must rise"),
        ({"offsets": [], "indices": []}, "offsets must rise"),
        ({"offsets": [0, 2], "indices": [1, 1]}, "no example twice"),
        ({"offsets": [0, 2], "indices": [-1, 1]}, "no example twice"),
        ({"offsets": [0, 2], "indices": [0.0, 1.0]}, "indices must be a 1-d array of integers"),
        ({"offsets": [0, 1, 2], "indices": [0, 1], "names": ["a", "a"]}, "2 clients need as many different names"),
        ({"offsets": [0, 1, 2], "indices": [0, 1], "names": ["a"]}, "2 clients need as many different names, got 1"),
    ],
)
def test_a_damaged_partition_is_refused(arrays: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^partition: .*{message}"):
        Partition.from_arrays({key: np.array(value) for key, value in arrays.items()})


def test_rows_are_views_that_cannot_be_spoilt() -> None:
    indices = np.arange(5)
    partition = Partition(np.array([0, 2, 5]), indices)
    assert np.shares_memory(partition.rows(1), indices)
    with pytest.raises(ValueError, match="read-only"):
        partition.rows(1)[0] = 7
    indices[:] = indices[:]  # the caller's own array stays as it was
    for client in (-1, 2):
        with pytest.raises(IndexError, match=f"client {client} of 2"):
            partition.rows(client)
        with pytest.raises(IndexError, match=f"client {client} of 2"):
            partition.name(client)


def test_a_million_clients_have_names_without_storing_them() -> None:
    partition = iid(np.zeros(1_000_000, dtype=np.int64), rng(), num_clients=1_000_000)
    assert partition.names is None
    assert partition.name(999_999) == "site-1000000"
    assert partition.rows(123_456).size == 1


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_fedma"])
def test_ten_thousand_clients_are_repaired(name: str) -> None:
    labels = rng().integers(0, 10, 100_000)
    partition = draw(name, labels, rng(), num_clients=10_000, alpha=0.3, min_rows=5, max_redraws=2, repair=True)
    assert_partition(partition, 100_000, 10_000)
    assert partition.sizes.min() == 5
    assert partition.notes["rows_moved"] > 1000


# The report.


def test_js_closed_forms() -> None:
    # One of two equal classes: p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4) gives 3/2 - 3/4 log2 3 bits.
    partition = class_counts(make_labels(100, 100), rng(), counts=[[100, 0], [0, 100]])
    report = measure(partition, make_labels(100, 100), 2)
    known = 1.5 - 0.75 * np.log2(3)
    assert report["js"] == pytest.approx([known, known], abs=1e-12)
    assert report["js_mean"] == pytest.approx(known, abs=1e-12)
    assert known == pytest.approx(0.311278, abs=1e-6)
    # One of L equal classes.
    for classes in (3, 10, 1000):
        one = np.eye(classes)[:1]
        expected = (
            np.log2(2 * classes / (classes + 1)) + np.log2(2 / (classes + 1)) / classes + (classes - 1) / classes
        ) / 2
        assert js_divergence(one, np.ones(classes))[0] == pytest.approx(expected, abs=1e-12)
    assert js_divergence(np.array([[3, 0], [0, 8]]), np.array([0, 5])).tolist() == [1.0, 0.0]
    assert np.isnan(js_divergence(np.array([[0, 0]]), np.array([1, 5]))).all()


def test_js_is_the_square_of_scipys_distance() -> None:
    counts = rng().integers(0, 50, (30, 6))
    total = counts.sum(axis=0)
    expected = [jensenshannon(row, total, base=2) ** 2 for row in counts]
    assert js_divergence(counts, total) == pytest.approx(expected, abs=1e-12)


def test_js_mean_is_weighted_and_empty_clients_are_named() -> None:
    labels = make_labels(30, 70)
    partition = class_counts(labels, rng(), counts=[[30, 0], [0, 0], [0, 70]])
    report = json.loads(json.dumps(measure(partition, labels, 3)))
    alone = js_divergence(np.array([[30, 0, 0], [0, 70, 0]]), np.array([30, 70, 0]))
    assert report["js"] == pytest.approx([alone[0], None, alone[1]])
    assert report["js_mean"] == pytest.approx(0.3 * alone[0] + 0.7 * alone[1])
    assert report["js_max"] == pytest.approx(alone[0])
    assert report["empty_clients"] == ["site-2"]
    assert report["class_counts"] == [[30, 0, 0], [0, 0, 0], [0, 70, 0]]
    assert (report["min_rows"], report["median_rows"], report["max_rows"], report["rows"]) == (0, 30.0, 70, 100)
    nothing = measure(Partition(np.array([0, 0, 0]), np.array([], dtype=np.int64)), labels, 2)
    assert (nothing["js"], nothing["js_mean"], nothing["js_max"], nothing["size_gini"]) == (
        [None, None],
        None,
        None,
        0.0,
    )


def test_gini_closed_forms() -> None:
    assert gini(np.full(9, 4)) == 0.0
    assert gini(np.array([0, 0, 0, 12])) == pytest.approx(0.75)
    for n in (1, 2, 10, 101):
        assert gini(np.arange(1, n + 1)) == pytest.approx((n - 1) / (3 * n))
    sizes = rng().integers(0, 100, 40)
    lorenz = np.concatenate([[0], np.cumsum(np.sort(sizes))]) / sizes.sum()
    area = ((lorenz[1:] + lorenz[:-1]) / 2).sum() / sizes.size
    assert gini(sizes) == pytest.approx(1 - 2 * area)
    differences = np.abs(sizes[:, None] - sizes[None]).mean() / (2 * sizes.mean())
    assert gini(sizes) == pytest.approx(differences)


# The rows of another split.


@pytest.mark.parametrize("alpha", PUBLISHED)
def test_site_rows_follow_the_sites_class_mix(alpha: int) -> None:
    validation = make_labels(26, 147, 53, seed=1)
    train = class_counts(LABELS, rng(), counts=PUBLISHED[alpha])
    sites = site_rows(train, LABELS, validation, rng())
    assert_partition(sites, 226, 3)
    exact = np.array(PUBLISHED[alpha]) / np.array(COUNTS) * np.array([26, 147, 53])
    held = counts_of(sites, validation, 3)
    assert (np.abs(held - exact) < 1).all()
    assert held.sum(axis=0).tolist() == [26, 147, 53]
    assert (held[np.array(PUBLISHED[alpha]) == 0] == 0).all()


def test_site_rows_properties() -> None:
    for seed in range(30):
        generator = stream(seed, "site rows")
        labels = generator.integers(0, 6, 300)
        labels[labels == 4] = 5  # nobody trains on class 4
        other = generator.integers(0, 8, 90)  # nor on 6 and 7
        train = dirichlet(labels, generator, num_clients=9, alpha=0.3, min_rows=1, repair=True)
        sites = site_rows(train, labels, other, stream(seed, "deal"))
        assert_partition(sites, 90, 9, covering=False)
        assert np.array_equal(np.sort(sites.indices), np.flatnonzero(np.isin(other, [0, 1, 2, 3, 5])))
        again = site_rows(train, labels, other, stream(seed, "deal"))
        assert np.array_equal(sites.indices, again.indices)
        assert np.array_equal(sites.offsets, again.offsets)


def test_site_rows_break_ties_at_random() -> None:
    labels, other = np.zeros(40, dtype=np.int64), np.zeros(1, dtype=np.int64)
    train = iid(labels, rng(), num_clients=4)
    winners = [int(site_rows(train, labels, other, rng(seed)).sizes.argmax()) for seed in range(200)]
    assert np.bincount(winners, minlength=4).min() > 25


def test_site_rows_by_column_match_names() -> None:
    train = by_column(["b", "a", "c"])
    sites = by_name(["a", "z", "b", "a"], train.names)
    assert sites.names == ("a", "b", "c")
    assert [sites.rows(c).tolist() for c in range(3)] == [[0, 3], [2], []]


@fast_only(1)
@pytest.mark.parametrize("clients", [2_000_000, 5 * 10**8, 10**12])
@pytest.mark.parametrize("name", ["iid", "dirichlet", "dirichlet_fedma", "quantity", "shards"])
def test_more_clients_than_memory_holds_are_one_line(name: str, clients: int) -> None:
    """Also where clients may be without rows, and a table of clients by classes would be made."""
    keys = {"quantity": {"exponent": 1.0}, "shards": {"classes_per_client": 1}}.get(name, {"alpha": 1.0})
    keys = {} if name == "iid" else {**keys, "min_rows": 0} if name != "shards" else keys
    with pytest.raises(UserError, match=rf"^num_clients: {clients} is above 1,000,000") as caught:
        draw(name, np.arange(200) % 3, rng(), num_clients=clients, **keys)
    assert "\n" not in str(caught.value)
