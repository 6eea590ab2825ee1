"""Serial and pool give the same bits; a failure names its client; nothing is left running or lying about.

Most of the pool's behavior is tested with a trainer of a few lines, whose sums are known; it is made in the worker from
this module, as fedsim's own trainer is made from its bundle.
"""

from __future__ import annotations

import functools
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frail import ENGINE, LAYOUT, SERVER, WEIGHTS, left_behind, pack
from torch import Tensor

import fedsim
import fedsim.runs.setup
from fedsim.aggregators import GROUP, Accumulator
from fedsim.core.errors import ClientError, OutOfMemory
from fedsim.core.params import Layout, Params
from fedsim.core.types import Engine, Measured, Pack, Report, Scores, Scoring, Task, Turn
from fedsim.executors import PoolExecutor, SerialExecutor
from fedsim.runs.worker_spec import WorkerSpec


@dataclass
class Stub:
    """A trainer that adds client x weights + the server's state; clients in `faults` come to grief."""

    faults: dict[int, str]
    layout: Layout = LAYOUT

    def __call__(self, device: torch.device, engine: Engine) -> Stub:
        assert engine == ENGINE
        if "load" in self.faults.values():
            raise RuntimeError("no room for the model")
        return self

    def train(self, pack: Pack, weights: Tensor, server: Params, out: Tensor, turn: Turn | None = None) -> Report:
        turn = turn or Turn()
        waited = False
        for task in pack.tasks:
            fault = self.faults.get(task.client)
            if fault == "raise":
                raise ValueError("the user's own trouble")
            if fault == "memory":
                raise torch.OutOfMemoryError("a pack too large")
            if fault == "no sum":
                assert out is None and turn.__class__ is Turn
                continue
            if fault == "slow":
                time.sleep(0.3)
            if fault == "hang":
                time.sleep(3600)
            if not waited and not turn.wait():
                break
            waited = True
            out += task.client * weights + server["c"]
        else:
            turn.done()
        return Report(
            pack.index, steps={t.client: 1 for t in pack.tasks}, weight=float(len(pack.tasks)), tokens=os.getpid()
        )

    def score(self, request: Scoring, weights: Tensor, server: Any = None) -> list[Scores]:
        time.sleep(0.2 if 0 in request.records else 0.0)
        return [Scores({"loss": (float(weights.sum()) + r, 1.0)}) for r in request.records]

    def measure(self, rows: Sequence[Any], weights: Tensor) -> Measured:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("three are too many")
        return Measured(len(rows), 1, float(weights.sum()), 0, 0, os.getpid())

    def configure(self, engine: Engine) -> None:
        self.engine = engine

    def shrink(self) -> None:
        self.shrunk = True

    def peak(self) -> int:
        return os.getpid() if hasattr(self, "shrunk") else -os.getpid()


@pytest.fixture
def pool() -> Iterator[Callable[..., PoolExecutor]]:
    """Pools of stub trainers, started; closed at the end, after which nothing may be left."""
    made: list[tuple[PoolExecutor, list[int]]] = []

    def make(workers: int, faults: dict[int, str] | None = None, start: bool = True) -> PoolExecutor:
        executor = PoolExecutor(Stub(faults or {}), ["cpu"] * workers, 1)
        made.append((executor, [w.process.pid for w in executor._pool]))
        if start:
            executor.memory = executor.start(LAYOUT, SERVER, ENGINE, LAYOUT.numel, True)
            executor.broadcast(WEIGHTS, {"c": torch.tensor([0.5]).double()})
        return executor

    yield make
    for executor, pids in made:
        executor.close()
        executor.close()  # twice is once
        assert left_behind(pids) == []


# ------------------------------------------------------------------------------------------------ the pool alone


@pytest.fixture(params=["partial sums", "one sum"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether updates count as large, and go straight into the one sum, pack by pack."""
    if request.param == "one sum":
        monkeypatch.setattr("fedsim.executors.pool._SLOTS_BELOW", 0)
    return request.param == "one sum"


def run(executor: Any, packs: Sequence[Pack]) -> tuple[list[Report], Accumulator]:
    """All reports, and what the packs add to a sum of zeros."""
    memory = executor.memory
    total = Accumulator(memory.total.zero_(), memory.spare.zero_())
    return list(executor.train(packs, total)), total


def test_a_pool_of_two(pool: Any, large: bool) -> None:
    """One pool of two workers, since starting them is what takes long: order, buffers, broadcast, scores, a death."""
    main = sys.modules["__main__"]
    before = {k: main.__dict__.get(k, "absent") for k in ("__file__", "__spec__")}
    executor = pool(2, {1: "slow"})
    assert {k: main.__dict__.get(k, "absent") for k in ("__file__", "__spec__")} == before
    assert all(bool(w.slots) != large for w in executor._pool)

    # 9 packs on 2 workers; pack 0 is slow, so later ones are ready first and have to wait their turn.
    total, order, workers = Accumulator(executor.memory.total.zero_()), [], set()
    for report in executor.train([pack(i, i + 1) for i in range(9)], total):
        order.append(report.index)
        workers.add(report.tokens)
        done = report.index + 1
        expected = sum(range(1, done + 1)) * WEIGHTS + 0.5 * done
        if not large:  # into the one sum a worker adds as soon as it may
            assert torch.equal(total.total, expected), "packs count in their order"
        assert total.weight == done
        time.sleep(0.02)
    assert order == list(range(9))
    assert torch.equal(total.total, expected)
    assert len(workers) == 2, "both workers took part"

    threes = torch.full((4,), 3.0, dtype=torch.float64)
    executor.broadcast(threes, {"c": torch.zeros(1, dtype=torch.float64)})
    assert torch.equal(run(executor, [pack(i, 2) for i in range(4)])[1].total, 8 * threes)

    scores = list(executor.score([Scoring("test", records=(i, i + 10)) for i in range(5)]))  # the first is slow
    assert [[s.values["loss"][0] for s in each] for each in scores] == [[12.0 + i, 22.0 + i] for i in range(5)]

    os.kill(executor._pool[1].process.pid, signal.SIGKILL)  # while it has nothing to do
    assert torch.equal(run(executor, [pack(i, 2) for i in range(4)])[1].total, 8 * threes)


def test_updates_are_added_in_the_order_of_the_packs(pool: Any, large: bool) -> None:
    """Sums of floats depend on their order: 1e16 + 1 - 1e16 is 0, and 1e16 - 1e16 + 1 is 1. Pack 0 is the slow one."""
    executor = pool(2, {10**16: "slow"})
    ones = torch.ones(4, dtype=torch.float64)
    executor.broadcast(ones, {"c": torch.zeros(1, dtype=torch.float64)})
    for clients, expected in (((10**16, 1, -(10**16)), 0.0), ((10**16, -(10**16), 1), 1.0)):
        for _ in range(3):
            found = run(executor, [pack(i, c) for i, c in enumerate(clients)])[1].total
            assert torch.equal(found, torch.full_like(found, expected))


def test_packs_are_added_in_groups_of_sixteen_on_any_number_of_workers(pool: Any, large: bool) -> None:
    """40 packs: ((p1 + ... + p16) + (p17 + ... + p32)) + (p33 + ... + p40), in floats whose sum depends on the order."""
    rng = np.random.default_rng(3)
    values = [float(v) for v in rng.integers(-(2**58), 2**58, 40)]
    assert GROUP == 16
    first, *rest = (values[i : i + GROUP] for i in range(0, 40, GROUP))
    expected = 0.0
    for value in first:
        expected += value
    for group in rest:
        part = 0.0
        for value in group:
            part += value
        expected += part
    assert expected != functools.reduce(operator.add, values), "one after another gives another sum"
    ones = torch.ones(4, dtype=torch.float64)
    for workers in (0, 1, 2, 3):
        executor = pool(workers) if workers else SerialExecutor(Stub({}), "cpu", 1)
        if not workers:
            executor.memory = executor.start(LAYOUT, SERVER, ENGINE, LAYOUT.numel, True)
        executor.broadcast(ones, {"c": torch.zeros(1, dtype=torch.float64)})
        for _ in range(2):
            _, found = run(executor, [pack(i, int(value)) for i, value in enumerate(values)])
            assert torch.equal(found.total, torch.full_like(found.total, expected)) and found.weight == 40
        executor.close()


def test_a_client_that_raises_is_named_with_its_own_traceback(pool: Any) -> None:
    """The other worker is busy for an hour; nobody waits for it."""
    executor = pool(2, {3: "raise", 9: "hang"})
    with pytest.raises(ClientError) as caught:
        run(executor, [pack(0, 9), pack(1, 1, 3)])
    text = str(caught.value)
    assert type(caught.value) is ClientError and text.startswith("round 4, clients site-1, site-3 failed on cpu ")
    assert "the user's own trouble" in text and "Traceback" in text and "test_executors.py" in text


def test_too_little_memory_frees_the_workers_and_their_buffers(pool: Any, large: bool) -> None:
    """Pack 0 is slow, pack 1 does not fit, others may wait for their turn; all are dropped, and the round can start again."""
    executor = pool(2, {1: "slow", 3: "memory"})
    for packs in ([pack(0, 1), pack(1, 3), pack(2, 2), pack(3, 2)], [pack(0, 1), pack(1, 2), pack(2, 3)]):
        for _ in range(2):
            with pytest.raises(OutOfMemory):
                run(executor, packs)
    reports, total = run(executor, [pack(i, 2) for i in range(6)])
    assert [r.index for r in reports] == list(range(6))
    assert torch.equal(total.total, 6 * (2 * WEIGHTS + 0.5))
    assert max(executor.peaks()) > 0, "whoever ran out of memory was told to let go of it"
    measured = executor.measure([[1], [2]])
    assert (measured.lanes, measured.seconds) == (2, 10.0)
    assert executor.measure([[1], [2], [3]]) is None
    executor.configure(Engine(packed=True, micro_batch=1))


def test_packs_that_are_not_merged_need_no_sum(pool: Any, large: bool) -> None:
    executor = pool(2, {7: "no sum"})
    reports = list(executor.train([pack(i, 7) for i in range(4)], None))
    assert [r.index for r in reports] == [0, 1, 2, 3]


def test_a_worker_that_cannot_load_its_model_says_why(pool: Any) -> None:
    executor = pool(1, {0: "load"}, start=False)
    with pytest.raises(ClientError, match="no room for the model"):
        executor.memory = executor.start(LAYOUT, SERVER, ENGINE, LAYOUT.numel, True)


# ------------------------------------------------------------------------------------------------ serial alone


def test_serial_names_the_client_that_raises_and_restores_threads() -> None:
    before = torch.get_num_threads()
    executor = SerialExecutor(Stub({3: "raise"}), "cpu", 1)
    try:
        torch.set_num_threads(2)
        executor.memory = executor.start(LAYOUT, SERVER, ENGINE, LAYOUT.numel, True)
        assert torch.get_num_threads() == 1
        with pytest.raises(ClientError, match=r"^round 4, client site-3 failed") as caught:
            run(executor, [pack(0, 1), pack(1, 3)])
        assert "the user's own trouble" in str(caught.value)
        executor.close()
        executor.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ whole runs

ALL = {
    "modes": ["local", "federated", "central"],
    "rounds": 2,
    "partition": {"name": "quantity", "num_clients": 5, "min_rows": 4},
    "cohort": {"size": 4},
    "adapter": {"name": "lora", "r": 3, "dropout": 0.2},
    "model": {"dtype": "float32"},
    "local": {"steps": 2, "batch_size": 4},
    "evaluate": {"every_steps": 1},
}


@dataclass
class Failing(WorkerSpec):
    """The run's bundle, but client site-2 raises in round 2."""

    def worker(self, *args: Any) -> Any:
        made = super().worker(*args)
        batches = made._batches

        def failing(task: Task, *more: Any) -> Any:
            if (task.round, task.name) == (2, "site-2"):
                raise ArithmeticError("a fault of site-2")
            return batches(task, *more)

        made._batches = failing
        return made


def test_a_run_that_fails_in_a_worker_names_the_client_and_goes_on_in_serial(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    federated = {**ALL, "modes": ["federated"], "name": "fails", "training": {"lanes": 1}}
    pool = {"name": "pool", "devices": ["cpu"], "workers": 1, "threads": 1}
    with monkeypatch.context() as patch:
        patch.setattr(fedsim.runs.setup, "WorkerSpec", Failing)
        with pytest.raises(ClientError) as caught:
            lab.run(**{**federated, "executor": pool})
    text = str(caught.value)
    assert text.startswith("round 2, client site-2 failed") and "a fault of site-2" in text and "Traceback" in text
    assert left_behind([]) == []
    (stopped,) = (lab.root / "results" / "fails").iterdir()
    assert '"failed"' in (stopped / "status.json").read_text()
    assert lab.run(**federated) == stopped
    lab.same_bits(stopped, lab.run(**{**federated, "name": "apart"}))


def test_serial_and_a_pool_of_two_give_the_same_bits(lab: Any) -> None:
    """All modes, with dropout, more clients than workers; twice in one process."""
    torch.set_num_threads(2)
    serial = lab.run(name="serial", **ALL)
    assert torch.get_num_threads() == 2, "the process's own number of threads is restored"
    torch.set_num_threads(1)
    pool = {"name": "pool", "devices": ["cpu"], "workers": 2, "threads": 1}
    lab.same_bits(serial, lab.run(**{**ALL, "name": "pool", "executor": pool}))
    assert left_behind([]) == []


def test_a_script_without_a_main_guard_may_use_the_pool(lab: Any) -> None:
    """Spawned workers do not run the user's script again; a pool of one gives the serial bits."""
    exp = lab.tree(name="script", executor={"name": "pool", "devices": ["cpu"], "workers": 1, "threads": 1})
    script = lab.root / "script.py"
    script.write_text(
        "import pathlib, fedsim\n"
        "fedsim.plots.save_figures = lambda folder: []\n"
        f"pathlib.Path({str(lab.root / 'ran')!r}).open('a').write('x')\n"
        f"print(fedsim.run({exp!r}, progress=False).path)\n"
    )
    root = Path(fedsim.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, cwd=lab.root)
    assert done.returncode == 0, done.stderr
    assert (lab.root / "ran").read_text() == "x"
    lab.same_bits(Path(done.stdout.strip().splitlines()[-1]), lab.run(name="here"))
