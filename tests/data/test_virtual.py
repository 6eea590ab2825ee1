"""Virtual clients: rows as a function of (seed, client), drawn with repetition; nothing is done for those not asked for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare
from tiers import fast_only

import fedsim
from fedsim.analysis import plots
from fedsim.cli.main import main
from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.data.batches import BatchSampler
from fedsim.data.partition import Partition, VirtualPartition, _splitmix
from fedsim.data.partitioners import Iid, Virtual
from fedsim.data.skew import SAMPLED, measure
from fedsim.runs.build import prepare
from fedsim.runs.progress import Progress
from fedsim.simulate.rounds import Schedule

ROWS = 40
MASK = 2**64 - 1


def made(seed: int = 0, clients: int = 50, least: int = 5, most: int = 12, rows: int = ROWS) -> VirtualPartition:
    labels = np.arange(rows) % 3
    return Virtual(num_clients=clients, min_rows=least, max_rows=most)(labels, stream(seed, "partition"))


def held(partition: VirtualPartition, clients: int) -> list[list[int]]:
    return [partition.rows(c).tolist() for c in range(clients)]


def plain_splitmix(state: int) -> Any:
    """splitmix64 as it is published: one number after another, in whole numbers of any length."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


# ------------------------------------------------------------------------------------------------- the draws


def test_the_hash_is_splitmix64() -> None:
    """The numbers that its authors' programs give for seed 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    seed, place = np.array([1234567], dtype=np.uint64), np.arange(5, dtype=np.uint64)
    assert _splitmix(seed, place).tolist() == known
    assert _splitmix(seed, place[3:4]).tolist() == known[3:4], "any place without those before it"
    generator = plain_splitmix(1234567)
    assert [next(generator) for _ in known] == known


def test_sizes_and_rows_are_those_of_a_plain_loop() -> None:
    partition = made(seed=5)
    clients = plain_splitmix(partition.key)
    for client in range(50):
        own = plain_splitmix(next(clients))
        size = 5 + next(own) % 8
        assert partition.rows(client).tolist() == [next(own) % ROWS for _ in range(size)]
        assert partition.sizes[client] == size


def test_a_clients_rows_are_a_function_of_seed_and_client() -> None:
    few, many = made(clients=20), made(clients=100_000)
    assert held(few, 20) == held(many, 20), "the number of clients changes nothing"
    assert few.sizes.tolist() == many.sizes[:20].tolist()
    assert held(many, 20)[::-1] == [many.rows(c).tolist() for c in range(19, -1, -1)], "nor does the order of asking"
    rows = held(few, 20)
    assert len({tuple(r) for r in rows}) == 20, "clients differ"
    reseeded = held(made(seed=1, clients=20), 20)
    assert all(one != other for one, other in zip(rows, reseeded, strict=True)), "seeds differ"


def test_sizes_keep_to_their_bounds_and_reach_all_between() -> None:
    partition = made(clients=2000, least=3, most=9)
    assert set(partition.sizes.tolist()) == set(range(3, 10))
    assert [len(partition.rows(c)) for c in range(2000)] == partition.sizes.tolist()
    assert set(made(least=4, most=4).sizes.tolist()) == {4}
    assert chisquare(np.bincount(partition.sizes)[3:]).pvalue > 1e-3


def test_rows_repeat_and_clients_overlap() -> None:
    partition = made(clients=30, least=60, most=60)
    rows = [partition.rows(c) for c in range(30)]
    assert all(r.dtype == np.int64 and r.min() >= 0 and r.max() < ROWS for r in rows)
    assert all(len(set(r.tolist())) < 60 for r in rows), "60 of 40 rows: some come twice"
    assert set(rows[0].tolist()) & set(rows[1].tolist())
    assert "overlap" in partition.notes["overlap"]


def test_rows_are_drawn_uniformly() -> None:
    """Over all draws, by place in the draw, and after one another; with these seeds, at a level of 0.001."""
    partition = made(seed=7, clients=4000, least=10, most=10, rows=10)
    rows = np.stack([partition.rows(c) for c in range(4000)])
    assert chisquare(np.bincount(rows.ravel(), minlength=10)).pvalue > 1e-3
    for place in (0, 9):
        assert chisquare(np.bincount(rows[:, place], minlength=10)).pvalue > 1e-3
    pairs = rows[:, :-1] * 10 + rows[:, 1:]
    assert chisquare(np.bincount(pairs.ravel(), minlength=100)).pvalue > 1e-3
    neighbours = rows[:-1, 0] * 10 + rows[1:, 0]
    assert chisquare(np.bincount(neighbours, minlength=100)).pvalue > 1e-3


def test_only_rows_that_are_kept_are_drawn(lab: Any, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    lines = [{"instruction": f"say {i}", "response": "" if i % 3 == 0 else f"word {i}"} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, lines)))
    data = {"name": "table", "path": str(file), "template": "{instruction} {response}", "labels": None}
    data |= {"validation": 0.2, "test": 0.2}
    parts = prepare(lab.exp(data=data, partition={"name": "virtual"}))
    kept = set(parts.tokens["train"].kept().tolist())
    assert len(kept) < len(parts.tokens["train"])
    assert set(np.concatenate([parts.partition.rows(c) for c in range(200)]).tolist()) == kept
    assert set(parts.partition.all_rows().tolist()) == kept


# ------------------------------------------------------------------------------------------ a million clients


def test_a_million_clients_are_small() -> None:
    partition = made(clients=1_000_000, least=10, most=100)
    assert partition.sizes.nbytes <= 8_000_000
    assert (int(partition.sizes.min()), int(partition.sizes.max())) == (10, 100)
    assert len(partition.rows(999_999)) == partition.sizes[999_999]
    assert len(pickle.dumps(partition)) < 10_000 + partition.kept.nbytes, "without the sizes"
    arrays = partition.to_arrays()
    assert sum(a.nbytes for a in arrays.values()) < 10_000
    with pytest.raises(IndexError):
        partition.rows(1_000_000)
    with pytest.raises(IndexError):
        partition.rows(-1)


def test_pickled_or_saved_it_gives_the_same_rows(tmp_path: Path) -> None:
    partition = made(seed=9)
    kept = VirtualPartition(partition.key, 50, 5, 12, np.array([70, 3, 900]))
    for one in (partition, kept):
        np.savez(tmp_path / "partition.npz", **one.to_arrays())
        with np.load(tmp_path / "partition.npz", allow_pickle=False) as arrays:
            saved = Partition.from_arrays(arrays)
        for other in (saved, pickle.loads(pickle.dumps(one))):
            assert isinstance(other, VirtualPartition)
            assert held(other, 50) == held(one, 50) and other.sizes.tolist() == one.sizes.tolist()
            assert other.notes == one.notes
    assert set(np.concatenate([kept.rows(c) for c in range(50)]).tolist()) == {3, 70, 900}
    assert kept.all_rows().tolist() == [3, 70, 900]


@fast_only(0, 2, 5, 6, 8)
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"virtual": [1, 2, 3, 4]}, "array kept is missing"),
        ({"virtual": [1, 2, 3], "kept": [0]}, "four whole numbers"),
        ({"virtual": [1, 0, 3, 4], "kept": [0]}, "num_clients"),
        ({"virtual": [1, 2, 0, 4], "kept": [0]}, "min_rows"),
        ({"virtual": [1, 2, 4, 3], "kept": [0]}, "max_rows"),
        ({"virtual": [-1, 2, 3, 4], "kept": [0]}, "key"),
        ({"virtual": [1, 2, 3, 4], "kept": [1, 1]}, "no example twice"),
        ({"virtual": [1, 2, 3, 4], "kept": [-1, 1]}, "no example twice"),
        ({"virtual": [1, 2, 3, 4], "kept": np.empty(0, dtype=int)}, "1-d array of integers"),
    ],
)
def test_a_damaged_file_is_refused(arrays: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^partition.*{message}"):
        Partition.from_arrays({key: np.array(value) for key, value in arrays.items()})


def test_clients_are_found_by_name() -> None:
    partition = made(clients=1_000_000)
    assert [partition.name(c) for c in (0, 999_999)] == ["site-1", "site-1000000"]
    assert partition.number("site-1000000") == 999_999
    for wrong in ("site-0", "site-1000001", "site-01", "site-", "site--1", "site-x", "site-²", "1", "site-1 "):
        assert partition.number(wrong) is None, wrong
    dealt = Iid(num_clients=3)(np.zeros(9, dtype=int), stream(0))
    assert dealt.number("site-3") == 2 and dealt.number("site-4") is None
    named = Partition(dealt.offsets, dealt.indices, ("b", "a", "site-1"))
    assert named.number("site-1") == 2 and named.number("site-2") is None


# ---------------------------------------------------------------------------------------------------- report


def test_the_report_of_many_clients_is_of_a_sample() -> None:
    labels = np.arange(ROWS) % 3
    partition = made(clients=1_000_000)
    report = measure(partition, labels, 3)
    assert report == measure(made(clients=1_000_000), labels, 3), "the sample is a function of the seed"
    assert report["num_clients"] == 1_000_000 and report["sampled_clients"] == SAMPLED == 1000
    assert report["rows"] == int(partition.sizes.sum())
    assert (report["min_rows"], report["max_rows"]) == (5, 12)
    lengths = {len(report[key]) for key in ("client_names", "class_counts", "sizes", "js")}
    assert lengths == {1000} and len(json.dumps(report)) < 200_000
    for name, counts, size in zip(report["client_names"], report["class_counts"], report["sizes"], strict=True):
        rows = partition.rows(partition.number(name))
        assert np.bincount(labels[rows], minlength=3).tolist() == counts and len(rows) == size
    assert 0 < report["js_mean"] < report["js_max"] <= 1
    assert "clients may overlap" in report["notes"]["overlap"] and report["empty_clients"] == []
    few = measure(made(clients=20), labels, 3)
    assert few["client_names"] == [f"site-{i}" for i in range(1, 21)] and few["sampled_clients"] == 20


def test_the_figure_says_that_it_shows_a_sample() -> None:
    labels = np.arange(ROWS) % 3
    many = plots.partition(measure(made(clients=5000), labels, 3))
    assert many.get_title().startswith("a sample of 1,000 of 5,000 clients\n")
    assert not plots.partition(measure(made(clients=20), labels, 3)).get_title().startswith("a sample")


def test_the_command_line_shows_a_million_clients(lab: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "many.yaml"
    file.write_text(lab.exp(partition={"name": "virtual", "num_clients": 1_000_000}).to_yaml())
    assert main(["partition", str(file), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "1000000 clients" in out and "a sample of 1000 clients" in out and "clients may overlap" in out
    assert "and 960 more clients of the sample" in out and "10 to 100, median" in out
    assert len(out.splitlines()) < 60 and err == ""
    assert (tmp_path / "out" / "partition.json").stat().st_size < 200_000
    assert (tmp_path / "out" / "partition.png").is_file()


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"num_clients": 0}, ("partition.num_clients: must be >= 1 (got 0)",)),
        ({"num_clients": 10**9}, ("partition.num_clients: must be <= 100,000,000 (got 1000000000)",)),
        ({"min_rows": 0}, ("partition.min_rows: must be >= 1 (got 0)",)),
        ({"min_rows": 5, "max_rows": 4}, ("partition.max_rows: 4", "below min_rows=5")),
        ({"max_rows": 2**31}, ("partition.max_rows: must be <= 10,000,000 (got 2147483648)",)),
        ({"min_rows": 2.5}, ("partition.min_rows: 2.5", "a whole number")),
        ({"alpha": 1.0}, ("unknown key partition.alpha", "min_rows, max_rows")),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(keys: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        fedsim.Experiment(partition={"name": "virtual", **keys})
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_a_cohort_larger_than_the_clients_is_refused(lab: Any) -> None:
    with pytest.raises(UserError, match=r"^cohort\.size: 21, but only 20 clients have examples"):
        prepare(lab.exp(partition={"name": "virtual", "num_clients": 20}, cohort={"size": 21}))


# ------------------------------------------------------------------------------------------------------ runs

MANY: dict[str, Any] = {
    "modes": ["local", "federated", "central"],
    "rounds": 3,
    "partition": {"name": "virtual", "num_clients": 1_000_000, "min_rows": 4, "max_rows": 20},
    "cohort": {"size": 3},
    "model": {"dtype": "float32"},
    "local": {"steps": 2, "batch_size": 4},
    "evaluate": {"every_rounds": 2},
}


def cohorts() -> dict[int, set[str]]:
    draws = {r: stream(3, "cohort", r).choice(1_000_000, 3, replace=False, shuffle=False) for r in (1, 2, 3)}
    return {r: {f"site-{c + 1}" for c in draw} for r, draw in draws.items()}


def test_three_modes_of_a_million_clients(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[int] = set()
    rows_of = VirtualPartition.rows

    def rows(self: VirtualPartition, client: int) -> np.ndarray:
        asked.add(client)
        return rows_of(self, client)

    exp = lab.exp(**MANY)
    sampled = set(prepare(exp).partition.sample(SAMPLED).tolist())
    monkeypatch.setattr(VirtualPartition, "rows", rows)
    folder = lab.run(exp)
    seen = set().union(*cohorts().values())
    assert {f"site-{c + 1}" for c in asked - sampled} == seen, "rows of the cohorts' clients, and of no other"
    found = lab.metrics(folder)
    assert {r["client"] for r in found if r["client"]} == seen
    assert not [r for r in found if r["split"] == "site"], "no virtual client has validation rows of its own"
    for scope in ("local", "federated"):
        for r, names in cohorts().items():
            trained = [
                x for x in found if (x["scope"], x["round"], x["name"], x["split"]) == (scope, r, "loss", "train")
            ]
            assert {x["client"] for x in trained} == names
    starts = [r["client"] for r in found if r["scope"] == "local" and r["step"] == 0 and r["name"] == "loss"]
    assert starts == sorted(seen, key=lambda name: int(name[5:])), "a curve for each client that trains"
    central = [r["step"] for r in found if r["scope"] == "central" and r["split"] == "train" and r["name"] == "loss"]
    assert central == [6, 12, 18], "as many rows as the cohort: 3 clients x 2 steps"
    assert {p.name for p in (folder / "local").iterdir()} == seen
    with np.load(folder / "partition.npz", allow_pickle=False) as arrays:
        saved = Partition.from_arrays(arrays)
    assert saved.rows(12345).tolist() == rows_of(prepare(exp).partition, 12345).tolist()
    assert json.loads((folder / "partition.json").read_text())["notes"]["overlap"]


def test_batches_can_be_followed(lab: Any) -> None:
    exp = lab.exp(**MANY)
    partition = prepare(exp).partition
    own = np.concatenate(fedsim.batches(exp, "site-777777", 2))
    assert set(own.tolist()) <= set(partition.rows(777_776).tolist()) and len(own) == 8
    # 60 training rows, 6 steps of 4 a round: no row comes twice before every row came once.
    central = np.concatenate(fedsim.batches(exp, "central", 1))
    assert len(central) == 24 == len(set(central.tolist()))
    with pytest.raises(UserError, match=r"^client: 'site-1000001' is none of this partition's: site-1, .* \.\.\.$"):
        fedsim.batches(exp, "site-1000001", 1)


@pytest.mark.parametrize("size", [4, 3])
def test_central_holds_every_row_once_and_does_the_cohorts_work(size: int) -> None:
    """Also with all clients: then it is passes over rows that it does not hold so often."""
    sizes = np.array([30, 7, 90, 64], dtype=np.int32)
    keys: dict[str, Any] = {"clients": np.arange(4), "sizes": sizes, "size": size, "name": str, "weights": "samples"}
    keys |= {"mode": "central", "seed": 0, "rounds": 2, "length": float, "every_rounds": 1, "batch_size": 8}
    made = Schedule(**keys, steps=None, epochs=2, count=BatchSampler(8, 2).count, match="epochs", central_rows=50)
    rows = sizes[made.cohort(1)].sum() * 2
    assert made.central_total == 50
    assert made.central_steps(1) == int(rows / 8 + 0.5)


def test_pool_and_serial_give_the_same_bits(lab: Any) -> None:
    pool = {"name": "pool", "workers": 2, "devices": ["cpu"], "threads": 1}
    one = lab.run(**{**MANY, "name": "serial"})
    lab.same_bits(one, lab.run(**{**MANY, "name": "pool", "executor": pool}))


def test_stopped_and_gone_on_gives_the_same_bits(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    begin, modes = Progress.begin, []

    def note(self: Progress, mode: str, *rest: Any) -> None:
        modes.append(mode)
        begin(self, mode, *rest)

    for mode, round in (("local", 2), ("federated", 1), ("central", 2)):

        def stop(self: Progress, done: int, text: str, at: tuple[str, int] = (mode, round)) -> None:
            if (modes[-1], done) == at:
                raise Stopped

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "begin", note)
            patch.setattr(Progress, "round", stop)
            with pytest.raises(Stopped):
                lab.run(**{**MANY, "name": "stopped"})
    lab.same_bits(lab.run(**{**MANY, "name": "stopped"}), lab.run(**{**MANY, "name": "whole"}))


def test_a_client_in_no_cohort_has_no_curve(lab: Any) -> None:
    """In every partition: one client of six a round, two rounds."""
    few = {"modes": ["local"], "rounds": 2, "cohort": {"size": 1}, "partition": {"name": "iid", "num_clients": 6}}
    found = lab.metrics(lab.run(**few))
    drawn = {int(stream(3, "cohort", r).choice(6, 1, replace=False, shuffle=False)[0]) for r in (1, 2)}
    assert {r["client"] for r in found} == {f"site-{c + 1}" for c in drawn}
