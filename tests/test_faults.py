"""Workers that are killed, hang or lose their GPU, at every point of a run: the same bits, one line each, and nothing left."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from frail import ENGINE, LAYOUT, SERVER, WEIGHTS, Frail, alive, arm, armed, come_to, left_behind, pack
from tiers import fast_only

import fedsim
import fedsim.runs.setup
from fedsim.aggregators import Accumulator
from fedsim.aggregators.reducer import Reducer
from fedsim.cli.main import main
from fedsim.core.errors import SumLost, WorkerDied, is_lost_context, is_out_of_memory
from fedsim.core.params import ALIGN
from fedsim.core.store import Records
from fedsim.core.types import Engine, Pack, Report, Scoring, Turn
from fedsim.executors import PoolExecutor
from fedsim.runs.build import prepare
from fedsim.runs.progress import Progress
from fedsim.runs.resolve import schedule_of
from fedsim.runs.worker_spec import WorkerSpec
from fedsim.simulate.rounds import State
from fedsim.training.received import Received

POOL = {"name": "pool", "devices": ["cpu"], "workers": 2, "threads": 1}


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where points are armed; workers of whole runs know it too."""
    folder = tmp_path / "points"
    folder.mkdir()
    monkeypatch.setenv("FEDSIM_TEST_POINTS", str(folder))
    return folder


# ------------------------------------------------------------------------------------------------ the pool alone


@pytest.fixture
def pool(points: Path) -> Iterator[Callable[..., tuple[PoolExecutor, list[str]]]]:
    """(pools of frail trainers, the lines they showed); closed at the end, after which nothing may be left."""
    made: list[tuple[PoolExecutor, set[int]]] = []

    def make(workers: int, hang_s: float | None = None, start: bool = True) -> tuple[PoolExecutor, list[str]]:
        notes: list[str] = []
        executor = PoolExecutor(Frail(points), ["cpu"] * workers, 1, hang_s=hang_s, note=notes.append)
        pids: set[int] = set()
        spawn = executor._supervisor.start

        def noted(worker: Any) -> None:
            spawn(worker)
            pids.add(worker.process.pid)

        executor._supervisor.start = noted
        pids.update(w.process.pid for w in executor._pool)
        made.append((executor, pids))
        if start:
            executor.memory = executor.start(LAYOUT, SERVER, ENGINE, LAYOUT.numel)
            executor.broadcast(WEIGHTS, {"c": torch.tensor([0.5]).double()})
        return executor, notes

    yield make
    for executor, pids in made:
        executor.close()
        executor.close()  # twice is once
        assert left_behind(sorted(pids)) == []


@pytest.fixture(params=["partial sums", pytest.param("one sum", marks=pytest.mark.thorough)])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether updates count as large, and go straight into the one sum, pack by pack."""
    if request.param == "one sum":
        monkeypatch.setattr("fedsim.executors.pool._SLOTS_BELOW", 0)
    return request.param == "one sum"


def run(executor: PoolExecutor, packs: Sequence[Pack]) -> tuple[list[Report], Accumulator, int]:
    """All reports, what the packs add to a sum of zeros, and how often the sum was lost: as the round loop does."""
    for lost in range(4):
        total = Accumulator(executor.memory.total.zero_())
        try:
            return list(executor.train(packs, total)), total, lost
        except SumLost:
            pass
    raise AssertionError("a round started again and again")


def test_whatever_a_worker_dies_of_is_done_again(pool: Any, points: Path, large: bool) -> None:
    """One pool, since starting processes is what takes long: at each point, one after another, by signal, exit and CUDA error."""
    arm(points, "load", "kill")
    executor, notes = pool(2)
    (line,) = notes
    assert line.startswith("worker fedsim-worker-") and line.endswith(
        " on cpu died (SIGKILL) during model loading; replaced, and it starts again"
    )

    packs = [pack(0, 2, 3), pack(1, 2), pack(2, 4, 5), pack(3, 6), pack(4, 1)]
    clients = [t.client for p in packs for t in p.tasks]
    expected = sum(clients) * WEIGHTS + 0.5 * len(clients)
    arm(points, "pack-1", "kill")
    arm(points, "half-2", "exit")
    arm(points, "added-3", "cuda")
    notes.clear()
    reports, total, lost = run(executor, packs)
    assert [r.index for r in reports] == [0, 1, 2, 3, 4] and armed(points) == []
    assert torch.equal(total.total, expected) and total.weight == len(clients)
    assert lost == (1 if large else 0), "half an update in the one sum takes the round with it, and nothing else does"
    said = {n.partition(" died ")[2] for n in notes}
    again = "the round starts again: its update was half added" if large else "its pack starts again"
    assert said == {
        "(SIGKILL) in round 4 with client site-2; replaced, its pack starts again",
        f"(exit code 3) in round 4 with clients site-4, site-5; replaced, {again}",
        "(AcceleratorError: CUDA error: device-side assert triggered) in round 4 with client site-6; replaced, its pack starts again",
    }

    notes.clear()
    arm(points, "score-3", "kill", 2)
    arm(points, "measure", "kill")
    arm(points, "configure", "kill")
    scores = list(executor.score([Scoring("test", records=(i, i + 10)) for i in range(5)]))
    assert [[s.values["loss"][0] for s in each] for each in scores] == [[10.0 + i, 20.0 + i] for i in range(5)]
    executor.configure(Engine(packed=True, micro_batch=2))
    measured = executor.measure([[1], [2]])
    assert (measured.lanes, measured.tokens, measured.seconds) == (2, 2, 10.0), "as it was told before it died"
    assert len(notes) == 4 and armed(points) == []
    assert len(set(executor.peaks())) == 2

    victim = executor._pool[1].process
    os.kill(victim.pid, signal.SIGKILL)  # while it has nothing to do, and nobody waits for it
    notes.clear()
    victim.join(timeout=30)
    assert torch.equal(run(executor, packs)[1].total, expected)
    assert notes == ["worker fedsim-worker-1 on cpu died (SIGKILL) while idle; replaced"]


def test_a_worker_without_a_heartbeat_is_ended(pool: Any, points: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack 0 takes five seconds and beats; pack 1 waits for its turn as long; pack 2 is stopped, pack 3 sleeps."""
    monkeypatch.setattr("fedsim.executors.pool._SLOTS_BELOW", 0)
    executor, notes = pool(2, hang_s=3)
    arm(points, "pack-2", "stop")
    arm(points, "pack-3", "hang")
    reports, total, lost = run(executor, [pack(0, 7), pack(1, 1), pack(2, 2), pack(3, 3)])
    assert len(reports) == 4 and lost == 0 and torch.equal(total.total, 13 * WEIGHTS + 2.0)
    assert sorted(n.partition(" on ")[2] for n in notes) == [
        f"cpu died (no heartbeat for 3 s (executor.hang_s)) in round 4 with client site-{c}; replaced, its pack starts again"
        for c in (2, 3)
    ]
    arm(points, "score-0", "exit", 2)
    arm(points, "score-0", "stop")
    with pytest.raises(WorkerDied, match="^evaluation failed: 3 .*no heartbeat for 3 s.*\n.*raise executor.hang_s"):
        list(executor.score([Scoring("test", records=(0,))]))


def test_what_kills_three_processes_is_not_tried_again(pool: Any, points: Path) -> None:
    arm(points, "load", "exit", 3)
    executor, notes = pool(1, start=False)
    with pytest.raises(WorkerDied, match=r"^model loading failed: 3 worker processes died .*: exit code 3 on cpu "):
        executor.memory = executor.start(LAYOUT, SERVER, ENGINE, LAYOUT.numel)
    assert len(notes) == 2 and armed(points) == [], "the third death is the error, not a line"


def test_a_pack_that_kills_while_it_adds_ends_the_round_after_three(
    pool: Any, points: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.executors.pool._SLOTS_BELOW", 0)
    executor, notes = pool(1)
    arm(points, "half-1", "kill", 3)
    three = "; ".join([r"SIGKILL on cpu \(fedsim-worker-0\)"] * 3)
    with pytest.raises(WorkerDied, match=rf"^round 4, client site-2 failed: 3 worker.*: {three}\n.*-memory killer"):
        run(executor, [pack(0, 1), pack(1, 2)])
    assert len(notes) == 2


def test_errors_that_lose_the_context_and_those_that_do_not() -> None:
    for error in (
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    ):
        assert is_lost_context(error) and not is_out_of_memory(error)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert is_out_of_memory(error) and not is_lost_context(error)
    assert not is_lost_context(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_context(ValueError("CUDA error"))


SCRIPT = """
import sys, time
from pathlib import Path
from frail import *
from fedsim.executors.pool import PoolExecutor
from fedsim.aggregators import Accumulator
executor = PoolExecutor(Frail(Path(sys.argv[1])), ["cpu"] * 2, 1)
try:
    executor.memory = executor.start(LAYOUT, SERVER, ENGINE, LAYOUT.numel)
    print(*[w.process.pid for w in executor._pool], flush=True)
    list(executor.train([pack(0, 1), pack(1, 2)], Accumulator(executor.memory.total)))
finally:
    executor.close()
"""


@fast_only(0)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_main_process_that_is_stopped(points: Path, how: signal.Signals) -> None:
    """One worker is stopped by a signal, the other sleeps: neither could end by itself."""
    arm(points, "pack-0", "stop")
    arm(points, "pack-1", "hang")
    paths = os.pathsep.join([str(Path(fedsim.__file__).parent.parent), str(Path(__file__).parent)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TMPDIR": str(points.parent)}
    done = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(points)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    pids = [int(p) for p in done.stdout.readline().split()]
    deadline = time.monotonic() + 120
    while armed(points) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and armed(points) == [] and all(alive(p) for p in pids)
    done.send_signal(how)
    done.communicate(timeout=120)
    assert done.returncode in (-how, 1)
    while any(alive(p) for p in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind([done.pid, *pids]) == []
    assert sorted(p.name for p in points.parent.iterdir()) == ["points"], "no temporary files"


OPEN = """
import os, signal, sys, tempfile
from pathlib import Path
from frail import *
from fedsim.executors.pool import PoolExecutor
from fedsim.aggregators import Accumulator
for time in range(2):
    executor = PoolExecutor(Frail(Path(sys.argv[1])), ["cpu"] * 2, 1)
    executor.memory = executor.start(LAYOUT, SERVER, ENGINE, LAYOUT.numel)
    list(executor.train([pack(0, 1), pack(1, 2)], Accumulator(executor.memory.total)))
    print(*os.listdir(tempfile.gettempdir()), flush=True)
    if sys.argv[2] == "killed" and time == 1:
        os.killpg(0, signal.SIGKILL)
    executor.close()
"""


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_a_pool_makes_no_temporary_file(points: Path, how: str) -> None:
    """So none is left by a signal that kills the whole group at once. The path of TMPDIR is too long for a socket's."""
    temporary = points.parent / ("t" * 100)
    temporary.mkdir()
    paths = os.pathsep.join([str(Path(fedsim.__file__).parent.parent), str(Path(__file__).parent)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(temporary)  # fedsim's own commands see to it that no folder is made for it
    command = [sys.executable, "-c", OPEN, str(points), how]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, start_new_session=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL if how == "killed" else 0, "")
    assert done.stdout == "\n\n"
    assert list(temporary.iterdir()) == []


# ------------------------------------------------------------------------------------------------ whole runs


@dataclass
class FrailBundle(WorkerSpec):
    """The run's bundle, whose workers come to grief where the test says.

    Points: load; score, of merged models; and of each client MODE-ROUND-CLIENT-, with step in the middle of training, kept when
    what it keeps is being written, scored before it is scored; in the one sum also wait when it waits for its turn, half when
    its update is in the sum but for a last word, added when that was said.
    """

    def worker(self, *args: Any) -> Any:
        made, folder = super().worker(*args), Path(os.environ["FEDSIM_TEST_POINTS"])
        come_to(folder, "load")
        at: dict[str, Any] = {"names": [], "steps": 0}

        def point(kind: str) -> None:
            for name in at["names"]:
                come_to(folder, f"{name}-{kind}")

        def before(owner: Any, name: str, kind: str) -> None:
            original = getattr(owner, name)

            def wrapped(*args: Any, **keys: Any) -> Any:
                at["steps"] += kind == "step"
                if kind != "step" or at["steps"] == 2:
                    point(kind)
                return original(*args, **keys)

            setattr(owner, name, wrapped)

        train, score = made.train, made.score

        def training(pack: Pack, weights: Any, server: Any, out: Any, turn: Turn | None = None) -> Any:
            at.update(names=[f"{pack.mode}-{t.round}-{t.name}" for t in pack.tasks], steps=0)
            if turn is not None:
                send, said = turn._pipe.send, turn.done

                def wait() -> bool:
                    send(("ready", None))
                    time.sleep(0.3)
                    point("wait")
                    return turn._pipe.recv()[1]

                def done() -> None:
                    point("half")
                    said()
                    time.sleep(0.3)
                    point("added")

                turn.wait, turn.done = wait, done
            return train(pack, weights, server, out, turn)

        def scoring(*args: Any) -> Any:
            found = score(*args)
            come_to(folder, "score")
            return found

        before(made.trainer, "backward", "step")
        before(made.evaluator, "lanes", "scored")
        for mode in self.algorithms:
            before(made.stores[mode], "write_at", "kept")
        made.train, made.score = training, scoring
        return made


class Lines(Progress):
    """Keeps what is shown; at the end of a round, does what a test asks for."""

    def __init__(self, on_round: Callable[[str, int], None] = lambda mode, round: None) -> None:
        super().__init__(False, 0)
        self.lines: list[str] = []
        self._on_round = on_round

    def note(self, text: str) -> None:
        self.lines.append(text)

    warn = note

    def round(self, round: int, text: str) -> None:
        super().round(round, text)
        self._on_round(self._mode, round)

    @property
    def deaths(self) -> list[str]:
        """Lines about deaths."""
        return [line.partition(" died ")[2] for line in self.lines if " died " in line]


@pytest.mark.parametrize("adapter", [{"name": "lora", "r": 3}, {"name": "none"}])
def test_a_trainer_beats_before_each_pass_and_each_piece(
    lab: Any, adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, scoring and generating; starting, adding and keeping piece by piece."""
    events: list[str] = []

    def noted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **keys: Any) -> Any:
            events.append(name)
            return original(*args, **keys)

        monkeypatch.setattr(owner, name, wrapped)

    noted(transformers.LlamaForCausalLM, "forward")
    noted(Received, "_sent")  # of a chunk
    noted(Reducer, "add")
    for place in ("trainer", "lanes", "scoring", "evaluation"):
        monkeypatch.setattr(f"fedsim.training.{place}.beat", lambda: events.append("beat"))
    original = fedsim.runs.setup.recipe_of
    cut = {"chunk": ALIGN} if adapter["name"] == "none" else {}
    monkeypatch.setattr(fedsim.runs.setup, "recipe_of", lambda exp: dataclasses.replace(original(exp), **cut))
    evaluate = {"generate": True, "max_new_tokens": 3, "batch_size": 8}
    keys = {"modes": ["federated"], "rounds": 2, "local": {"micro_batch": 2}}
    lab.run(**keys, adapter=adapter, evaluate=evaluate)
    heard = events[events.index("beat") :]  # before the first one, the base is tried without a trainer
    pieces = len([e for e in heard if e == "add"])
    assert pieces > 20 if cut else pieces == 4, "two packs a round, or many chunks a client"
    twice = [(a, b) for a, b in itertools.pairwise(heard) if a == b == "forward" or (a, b) == ("add", "_sent")]
    assert heard.count("forward") > 100 and twice == []


@pytest.fixture
def frail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of runs come to grief where points are armed."""
    monkeypatch.setattr(fedsim.runs.setup, "WorkerSpec", FrailBundle)


def kill_a_worker() -> None:
    """From outside, as the system would."""
    workers = [p for p in multiprocessing.active_children() if p.name.startswith("fedsim-worker")]
    os.kill(workers[0].pid, signal.SIGKILL)


FEDERATED: dict[str, Any] = {
    "modes": ["federated"],
    "rounds": 3,
    "model": {"dtype": "float32"},
    "adapter": {"name": "lora", "r": 3, "dropout": 0.2},
    "training": {"lanes": 1},
    "local": {"steps": 2, "batch_size": 4},
}


def test_a_run_whose_workers_die_has_the_bits_of_one_whose_do_not(lab: Any, points: Path, frail: None) -> None:
    keys = {**FEDERATED, "modes": ["local", "federated"], "partition": {"num_clients": 4}}
    serial = lab.run(**keys, name="serial")
    for point in ("local-1-site-2-kept", "federated-1-site-1-step", "federated-2-site-3-scored"):
        arm(points, point, "kill")
    arm(points, "score", "exit")
    show = Lines(lambda mode, round: kill_a_worker() if (mode, round) == ("local", 2) else None)
    folder = fedsim.run(lab.exp(**keys, name="pool", executor=POOL), progress=show).path
    assert armed(points) == [] and len(show.deaths) == 5, show.deaths
    lab.same_bits(folder, serial)
    assert left_behind([]) == []
    assert not [p for p in folder.rglob(".*") if p.is_file()]
    for said in (
        "(SIGKILL) in round 1 with client site-2; replaced, its pack starts again",
        "(SIGKILL) in round 2 with client site-3; replaced, its pack starts again",
    ):
        assert said in show.deaths


@pytest.mark.thorough
def test_a_whole_model_is_summed_to_the_same_bits_whoever_dies(
    lab: Any, points: Path, frail: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates go straight into the one sum, in turns; clients keep moments and what their messages lost."""
    monkeypatch.setattr("fedsim.executors.pool._SLOTS_BELOW", 0)
    messages = {"up": "nf4", "error_feedback": True}
    keys = {**FEDERATED, "adapter": {"name": "none"}, "messages": messages}
    serial = lab.run(**keys, name="serial")
    exp = lab.exp(**keys, name="pool", executor=POOL)
    packs = schedule_of(prepare(exp), "federated").packs(1, State(torch.empty(0), {}, Records(), keeps=False), 1)
    first, second, third = (p.tasks[0].name for p in packs)
    arm(points, f"federated-1-{first}-wait", "slow")
    arm(points, f"federated-1-{second}-wait", "kill")  # before its turn
    arm(points, f"federated-2-{second}-half", "kill")
    arm(points, f"federated-3-{third}-added", "kill")
    show = Lines()
    folder = fedsim.run(exp, progress=show).path
    assert armed(points) == []
    assert show.deaths == [
        f"(SIGKILL) in round 1 with client {second}; replaced, its pack starts again",
        f"(SIGKILL) in round 2 with client {second}; replaced, the round starts again: its update was half added",
        f"(SIGKILL) in round 3 with client {third}; replaced, its pack starts again",
    ]
    lab.same_bits(folder, serial)
    assert left_behind([]) == []


@pytest.mark.thorough
def test_three_deaths_end_a_run_and_the_same_command_goes_on(
    lab: Any, points: Path, frail: None, capsys: pytest.CaptureFixture[str]
) -> None:
    serial = lab.run(**FEDERATED, name="serial")
    file = lab.root / "run.yaml"
    file.write_text(yaml.safe_dump(lab.tree(**FEDERATED, name="pool", executor=POOL)))
    arm(points, "federated-3-site-1-step", "kill", 2)
    arm(points, "federated-3-site-1-scored", "exit")
    assert main(["run", str(file)]) == 1
    said = capsys.readouterr().err
    assert said.count(" died (") == 2 and "Traceback" not in said
    message = said[said.index("fedsim: ") :].splitlines()
    assert message[0].startswith(
        "fedsim: round 3, client site-1 failed: 3 worker processes died of it, one after another: "
    )
    assert message[0].count("SIGKILL on cpu (fedsim-worker-") == 2 and "; exit code 3 on cpu" in message[0]
    assert message[1].startswith("SIGKILL is most often the kernel's out-of-memory killer")
    assert message[-1] == "stopped after round 2 (federated); the same command resumes from there"
    (folder,) = (lab.root / "results" / "pool").iterdir()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and status["reason"].startswith("round 3, client site-1 failed: 3 worker")
    assert left_behind([]) == [] and armed(points) == []
    arm(points, "federated-3-site-1-step", "kill")
    assert main(["run", str(file), "--quiet"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert " died (SIGKILL) in round 3 with client site-1; replaced, its pack starts again" in line
    lab.same_bits(folder, serial)
