"""Flat layouts, and the file of client records: a record that something refers to is never handed out again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fedsim
from fedsim.core.params import Layout, clone
from fedsim.core.seeding import stream, stream_seed
from fedsim.core.store import Records, Store


def test_views_lie_end_to_end_and_write_through() -> None:
    layout = Layout({"a": (2, 3), "b": (), "c": (4,)}, torch.float32)
    assert layout.numel == 11 and layout.nbytes == 44
    flat = torch.arange(11.0)
    views = layout.views(flat)
    assert views["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert views["b"].item() == 6 and views["c"].tolist() == [7, 8, 9, 10]
    views["a"][1, 2] = -1.0
    assert flat[5] == -1.0
    with pytest.raises(ValueError, match="11 elements, the vector 12"):
        layout.views(torch.zeros(12))


def test_fill_copies_by_name_and_casts() -> None:
    layout = Layout({"a": (2,), "b": (1,)}, torch.float32)
    flat = layout.empty()
    assert layout.fill(flat, {"b": torch.tensor([3.0]).double(), "a": torch.tensor([1.0, 2.0])}) is flat
    assert flat.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(KeyError):
        layout.fill(flat, {"a": torch.zeros(2)})


def test_a_layout_is_of_one_dtype() -> None:
    assert Layout.of({"a": torch.zeros(2, dtype=torch.float64)}).dtype == torch.float64
    assert Layout.of({}).numel == 0
    with pytest.raises(ValueError, match="one dtype"):
        Layout.of({"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float64)})


def test_a_clone_shares_no_memory() -> None:
    a = {"x": torch.tensor([5.0])}
    clone(a)["x"].add_(1)
    assert a["x"].item() == 5.0


def test_streams_are_functions_of_their_names() -> None:
    def first(*names: str | int) -> float:
        return float(stream(*names).random())

    assert first(0, "cohort", 3) == first(0, "cohort", 3)
    others = [(1, "cohort", 3), (0, "cohort", 4), (0, "batches", 3), (0, "cohort", "3"), (0, "cohort3"), (0, "cohort")]
    assert len({first(*n) for n in others} | {first(0, "cohort", 3)}) == 7
    assert first(0, "ab", "c") != first(0, "a", "bc")
    assert 0 <= stream_seed(0, "dropout", "site-1", 2) < 2**63


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_store_holds_its_records_for_whoever_opens_it(tmp_path: Path, dtype: torch.dtype) -> None:
    store = Store(tmp_path / "s.bin", 5, dtype)
    store.write(3, torch.arange(2.0, dtype=dtype), torch.arange(3.0, dtype=dtype) + 10)
    store.write(0, torch.full((5,), 0.1, dtype=dtype))
    other = Store(tmp_path / "s.bin", 5, dtype)
    assert other.read(3).tolist() == [0.0, 1.0, 10.0, 11.0, 12.0]
    assert torch.equal(other.read(0), torch.full((5,), 0.1, dtype=dtype))
    copy = other.read(3)
    copy += 1
    assert store.read(3).tolist() == [0.0, 1.0, 10.0, 11.0, 12.0], "what is read is a copy"
    other.write(1, torch.ones(5, dtype=dtype))
    assert (tmp_path / "s.bin").stat().st_size == 4 * store.nbytes, "a lower record does not cut the file"
    store.sync()
    with pytest.raises(AssertionError, match="5 elements"):
        store.write(0, torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_record_in_use_is_never_handed_out(keep: int) -> None:
    """500 random rounds: cohorts of 3 of 8 clients, checkpoints now and then, restarts from a kept checkpoint.

    In use: what a client's newest state lies in, and what the last `keep` checkpoints refer to. The file stays small.
    """
    rng, records = stream(keep, "records"), Records()
    kept: list[dict[int, int]] = []
    most = 0
    for _ in range(500):
        in_use = set(records.table.values()).union(*(set(t.values()) for t in kept))
        cohort = rng.choice(8, 3, replace=False)
        new = [(int(c), records.new()) for c in cohort]
        assert len({r for _, r in new}) == 3
        assert not {r for _, r in new} & in_use
        for client, record in new:
            records.wrote(client, record)
            assert records.read(client) == record
        most = max(most, *(r for _, r in new))
        if rng.random() < 0.6:
            records.commit(keep)
            kept = [*kept, dict(records.table)][-keep:]
        if kept and rng.random() < 0.1:
            back = int(rng.integers(1, len(kept) + 1))  # the newest may be damaged
            kept = kept[:back]
            records = Records(kept[-1], kept)
    assert records.read(99) == -1
    assert most < 8 + 3 * (keep + 6), "records that nothing refers to are used again"


def test_bits_survive_a_store(tmp_path: Path) -> None:
    values = torch.tensor([np.nan, np.inf, -0.0, 1e-310, 0.1], dtype=torch.float64)
    store = Store(tmp_path / "s.bin", 5, torch.float64)
    store.write(0, values)
    assert store.read(0).view(torch.int64).tolist() == values.view(torch.int64).tolist()


GROW = """
import sys, time, torch
from pathlib import Path
from fedsim.core.store import Store
folder, first, begin = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
for n in range(60):
    while time.time() < begin + 0.02 * n:  # both make the file, and let it grow, at the same moment
        pass
    store = Store(folder / f"{n}.bin", 3, torch.float64)
    for record in range(first, 40, 2):
        store.write(record, torch.full((3,), float(record + 1), dtype=torch.float64))
"""


def test_two_processes_that_make_a_file_and_let_it_grow_lose_nothing(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(fedsim.__file__).parent.parent)}
    begin = str(time.time() + 8.0)
    both = [subprocess.Popen([sys.executable, "-c", GROW, str(tmp_path), str(i), begin], env=env) for i in (0, 1)]
    assert [p.wait() for p in both] == [0, 0]
    for n in range(60):
        found = np.fromfile(tmp_path / f"{n}.bin", dtype=np.float64).reshape(-1, 3)
        np.testing.assert_array_equal(found, np.repeat(np.arange(1.0, 41.0)[:, None], 3, axis=1))
