"""The supervisor of worker processes, of the pool of a run and of a sweep alike.

It starts processes, passes messages, ends those that hang, finds out why one died, counts the deaths of the same work, and
ends all that is left. What workers do, and what happens to the work of one that died, is the owner's part.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from fedsim.core.errors import WorkerDied, is_lost_context
from fedsim.core.heartbeat import LOOK_S, Watch, beat_into, new_heartbeat
from fedsim.executors.processes import die_with_parent, died_of, spawning

_DEATHS = 3  # processes that may die of the same work before it is given up


@dataclass(eq=False, kw_only=True)
class Work:
    """Something that workers do, again and again until it is done or given up.

    Attributes:
        deaths: how the processes ended that died of it.
    """

    deaths: list[str] = field(default_factory=list)

    @property
    def given_up(self) -> bool:
        """Whether too many processes have died of it."""
        return len(self.deaths) >= _DEATHS

    @property
    def why(self) -> list[str]:
        """Why it was given up: the deaths, then what to do about them; a line each."""
        lines = [f"{len(self.deaths)} worker processes died of it, one after another: {'; '.join(self.deaths)}"]
        if any(death.startswith("SIGKILL") for death in self.deaths):
            lines.append(
                "SIGKILL is most often the kernel's out-of-memory killer: fewer workers (executor.workers) or training.lanes, "
                "or a lower local.micro_batch, evaluate.batch_size or data.max_length take less memory"
            )
        if any("executor.hang_s" in death for death in self.deaths):
            lines.append("if one pass takes longer than that, raise executor.hang_s, or set it to null")
        return lines


@dataclass(eq=False)
class Worker:
    """A place for a process; a process that died is followed by another.

    Attributes:
        name: of its processes.
        device: where they compute.
        process, pipe, watch: of the process that is there now; no process: none was started, or it has died.
        work: what the process is at.
        hang_s: seconds without a heartbeat after which the process is ended while it is at work; None = never.
        reason: why the process was ended, or said that it ends.
    """

    name: str
    device: str
    process: Any = None
    pipe: Connection | None = None
    watch: Watch | None = None
    work: list[Any] = field(default_factory=list)
    hang_s: float | None = None
    reason: str | None = None

    @property
    def idle(self) -> bool:
        """Whether it can be given work."""
        return not self.work and self.process is not None and self.process.is_alive()

    @property
    def place(self) -> str:
        """Device and name."""
        return f"{self.device} ({self.name})"


class Supervisor:
    """Keeps the processes of workers.

    Args:
        workers: in whose places processes are started.
        serve: what a process does, `serve(pipe, device, *args)`, until its pipe is closed: see `heard`. Imported by name.
        args: must pickle, at any time: a process that follows a dead one gets them too.
        threads: CPU threads of a process.
    """

    def __init__(
        self, workers: Sequence[Worker], serve: Callable[..., None], args: tuple[Any, ...], threads: int
    ) -> None:
        self.workers = workers
        self._life = (threads, serve, args)

    def start(self, worker: Worker) -> None:
        """Start a process in a worker's place."""
        context, heartbeat = mp.get_context("spawn"), new_heartbeat()
        with spawning():
            pipe, there = context.Pipe()
            args = (there, heartbeat, worker.device, *self._life)
            process = context.Process(target=_live, args=args, name=worker.name, daemon=True)
            process.start()
        there.close()
        worker.process, worker.pipe, worker.watch = process, pipe, Watch(heartbeat)
        worker.work, worker.reason = [], None

    def send(self, worker: Worker, message: Any, work: list[Any], hang_s: float | None) -> None:
        """Give a worker work; if its process has just died, `next` says so."""
        worker.work = work
        self.tell(worker, message, hang_s)

    def tell(self, worker: Worker, message: Any, hang_s: float | None) -> None:
        """Say something about the work that a worker is at."""
        worker.hang_s = hang_s
        worker.watch.restart()
        with contextlib.suppress(OSError):
            worker.pipe.send(message)

    def next(self) -> tuple[Any, ...]:
        """Wait for what a worker says: `(worker, kind, ...)`, or `(worker, "died", in words, its work)`.

        Raises:
            WorkerDied: if a process does not end, not even by SIGKILL.
        """
        while True:
            pipes = {worker.pipe: worker for worker in self.workers if worker.process is not None}
            for worker in pipes.values():
                if not worker.work and not worker.process.is_alive():  # its pipe may be closed a moment later
                    return worker, "died", *self._bury(worker)
                self._end_if_hung(worker)
            for pipe in wait(list(pipes), timeout=LOOK_S):
                worker = pipes[pipe]
                try:
                    kind, *rest = pipe.recv()
                except (EOFError, OSError):
                    return worker, "died", *self._bury(worker)
                if kind == "dies":
                    (worker.reason,) = rest
                    return worker, "died", *self._bury(worker)
                return worker, kind, *rest

    def close(self, *, gently: bool = False) -> None:
        """End all processes, by SIGTERM (`gently`) or SIGKILL where they are at work; may be called twice."""
        running = [worker for worker in self.workers if worker.process is not None]
        for worker in running:
            if worker.work:
                worker.process.terminate() if gently else worker.process.kill()
            worker.pipe.close()  # an idle process ends when its pipe does
        for worker in running:
            if _join(worker.process, 10):
                worker.process.close()
            worker.process = None
        self.workers = []

    @staticmethod
    def _end_if_hung(worker: Worker) -> None:
        watched = worker.work and worker.hang_s is not None and not worker.pipe.poll()
        if not watched:
            worker.watch.restart()
        elif worker.watch.silent_s() >= worker.hang_s and worker.reason is None:
            worker.reason = f"no heartbeat for {worker.hang_s:g} s (executor.hang_s)"
            worker.process.kill()

    @staticmethod
    def _bury(worker: Worker) -> tuple[str, list[Any]]:
        """Take a process out of its place that has died or is about to: (that in words, what it was at)."""
        process, work = worker.process, worker.work
        ended = _join(process, 5)  # it has closed its pipe, or said that it ends
        how = worker.reason or died_of(process)
        if not ended:
            raise WorkerDied(
                f"worker {worker.name} on {worker.device}: {how}, and its process {process.pid} does not end, not even by "
                "SIGKILL: its device or its driver hangs"
            )
        for one in work:
            one.deaths.append(f"{how} on {worker.place}")
        worker.pipe.close()
        process.close()
        worker.process, worker.work = None, []
        return f"worker {worker.name} on {worker.device} died ({how})", work


def _join(process: Any, patience_s: float) -> bool:
    """Wait for a process to end, kill it where it does not; whether it has ended."""
    process.join(timeout=patience_s)
    if process.is_alive():
        process.kill()
        process.join(timeout=30)
    return not process.is_alive()


def heard(pipe: Connection) -> Iterator[Any]:
    """What the main process says to this one, until it closes the pipe."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield pipe.recv()


def _live(
    pipe: Connection, heartbeat: Tensor, device: str, threads: int, serve: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """A worker process from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    beat_into(heartbeat)
    try:
        serve(pipe, device, *args)
    except Exception as error:
        if not is_lost_context(error):
            raise
        pipe.send(("dies", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"))
        os._exit(1)  # cleaning up would need the context
