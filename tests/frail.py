"""Processes that come to grief at chosen points, as often as a test has said; and a trainer of a few lines that does.

What a test arms are files, so that it holds for processes that follow one another. Imports little: workers of the tests
start with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.core.heartbeat import beat
from fedsim.core.params import Layout, Params
from fedsim.core.types import Engine, Measured, Pack, Report, Scores, Scoring, Task, Turn

LAYOUT = Layout({"w": (2, 2)}, torch.float64)
WEIGHTS = torch.arange(1.0, 5.0, dtype=torch.float64)
SERVER = Layout({"c": (1,)}, torch.float64)
ENGINE = Engine(packed=True, micro_batch=4)


def arm(folder: Path, point: str, how: str, times: int = 1) -> None:
    """Whoever next comes to a point comes to grief there: kill | stop | exit | cuda | hang | raise | slow;
    assert: a kernel fails, on a GPU."""
    before = len(list(folder.glob(f"{point}.*")))
    for i in range(before, before + times):
        (folder / f"{point}.{i}").write_text(how)


def armed(folder: Path) -> list[str]:
    """Points that nobody has come to."""
    return sorted(p.name for p in folder.iterdir())


def come_to(folder: Path, point: str) -> None:
    """A process comes to a point."""
    for file in sorted(folder.glob(f"{point}.*")):
        try:
            how = file.read_text()
            file.unlink()
        except FileNotFoundError:  # another process was first
            continue
        if how in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        elif how == "exit":
            os._exit(3)
        elif how == "cuda":
            raise torch.AcceleratorError("CUDA error: device-side assert triggered\nmore about it")
        elif how == "assert":
            torch.zeros(2, device="cuda")[torch.full((1,), 5, device="cuda")].cpu()
        elif how in ("hang", "slow"):
            time.sleep(3600 if how == "hang" else 1.5)
        else:
            raise ValueError("the user's own trouble")
        return


def left_behind(pids: Sequence[int]) -> list[str]:
    """Live children, and shared memory that these processes made and nobody freed."""
    names = [f"torch_{pid}_" for pid in [os.getpid(), *pids]]
    shm = Path("/dev/shm")
    files = [p.name for p in shm.iterdir() if any(p.name.startswith(n) for n in names)] if shm.is_dir() else []
    return files + [str(p) for p in multiprocessing.active_children()] + [str(p) for p in pids if alive(p)]


def alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pack(index: int, *clients: int) -> Pack:
    """A pack of round 4."""
    tasks = tuple(Task(c, f"site-{c}", 4, 1, 0, 0, 1, 1.0) for c in clients)
    return Pack(index, "federated", tasks, 1)


def sweep_worker(*args: Any) -> None:
    """A sweep's worker that may come to grief where it trains: points train-SEED."""
    from fedsim.runs import sweep
    from fedsim.training.worker import Worker

    train = Worker.train

    def training(self: Worker, *args: Any, **keys: Any) -> Report:
        come_to(Path(os.environ["FEDSIM_TEST_POINTS"]), f"train-{self.seed}")
        return train(self, *args, **keys)

    Worker.train = training
    sweep._work(*args)


@dataclass
class Frail:
    """Adds client x weights + the server's state, client by client.

    Points: load, measure, configure, peak, score-N of record N, and of pack N: pack-N at its start, half-N when a part of its
    update is added, added-N when all is. Client 7 is slow, and beats meanwhile.
    """

    folder: Path
    layout: Layout = LAYOUT

    def __call__(self, device: torch.device, engine: Engine) -> Frail:
        come_to(self.folder, "load")
        self.engine = engine
        return self

    def train(self, pack: Pack, weights: Tensor, server: Params, out: Tensor, turn: Turn | None = None) -> Report:
        turn = turn or Turn()
        if any(t.client == 7 for t in pack.tasks):
            for _ in range(50):
                time.sleep(0.1)
                beat()
        come_to(self.folder, f"pack-{pack.index}")
        if turn.wait():
            for task in pack.tasks:
                out += (task.client * weights + server["c"]).to(out.device)
                come_to(self.folder, f"half-{pack.index}")
            turn.done()
        come_to(self.folder, f"added-{pack.index}")
        return Report(pack.index, steps={t.client: 1 for t in pack.tasks}, weight=float(len(pack.tasks)))

    def score(self, request: Scoring, weights: Tensor, server: Any = None) -> list[Scores]:
        for record in request.records:
            come_to(self.folder, f"score-{record}")
        return [Scores({"loss": (float(weights.sum()) + r, 1.0)}) for r in request.records]

    def measure(self, rows: Sequence[Any], weights: Tensor) -> Measured:
        come_to(self.folder, "measure")
        return Measured(len(rows), self.engine.micro_batch, float(weights.sum()), 0, 0, os.getpid())

    def configure(self, engine: Engine) -> None:
        come_to(self.folder, "configure")
        self.engine = engine

    def shrink(self) -> None:
        """There is nothing to let go of."""

    def peak(self) -> int:
        come_to(self.folder, "peak")
        return os.getpid()
