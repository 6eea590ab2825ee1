"""Packs on worker processes, one or more per device, alive for the whole run.

Global parameters and partial sums lie in tensors that are shared once at the start - shared memory on the CPU, CUDA IPC
on GPUs - and are refilled in place: no parameter travels through a pipe. What a pack computes does not depend on who
computes it, and partial sums are handed out in pack order, so any number of workers gives the bits of the serial
executor at the same threads per worker.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from fedsim.errors import OutOfMemory, is_out_of_memory
from fedsim.executors.processes import die_with_parent, died_of, main_not_imported, without_interrupt
from fedsim.executors.serial import MakeTrainer, client_failed
from fedsim.params import Layout, Params
from fedsim.types import Engine, Measured, Pack, Report, Scores, Scoring, Task

_TWO_SLOTS_BELOW = 1 << 28  # bytes: with two, a worker need not wait until an earlier pack elsewhere is merged


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    device: str
    weights: Tensor | None = None
    server: Tensor | None = None
    slots: list[Tensor] = field(default_factory=list)
    free: deque[int] = field(default_factory=deque)
    busy: Pack | Scoring | None = None


class PoolExecutor:
    """Runs packs on worker processes.

    Args:
        make_trainer: (device, engine) -> trainer; must pickle. What it holds in shared memory is not copied.
        devices: one per worker; a device may occur several times.
        threads: CPU threads of a worker.
    """

    def __init__(self, make_trainer: MakeTrainer, devices: Sequence[str], threads: int) -> None:
        self.workers = list(devices)
        self._pool: list[_Worker] = []
        context = mp.get_context("spawn")
        try:
            with main_not_imported(), without_interrupt():
                for i, device in enumerate(devices):
                    here, there = context.Pipe()
                    process = context.Process(
                        target=_work,
                        args=(there, make_trainer, device, threads),
                        name=f"fedsim-worker-{i}",
                        daemon=True,
                    )
                    process.start()
                    there.close()
                    self._pool.append(_Worker(process, here, device))
        except BaseException:
            self.close()
            raise

    def start(self, layout: Layout, server: Layout, engine: Engine) -> None:
        """Share the buffers with the workers and wait until their models are loaded.

        Raises:
            ClientError: if a worker cannot load its model, with its traceback.
        """
        by_device: dict[str, tuple[Tensor, Tensor]] = {}
        copies = 2 if layout.nbytes < _TWO_SLOTS_BELOW else 1
        for worker in self._pool:
            if worker.device not in by_device:
                by_device[worker.device] = (_shared(layout, worker.device), _shared(server, worker.device))
            worker.weights, worker.server = by_device[worker.device]
            worker.slots = [_shared(layout, worker.device) for _ in range(copies)]
            worker.free = deque(range(copies))
            self._send(worker, ("share", layout, server, worker.weights, worker.server, worker.slots, engine))
        self.weights = self._pool[0].weights
        self._server_layout = server
        for worker in self._pool:
            self._receive(worker)

    def broadcast(self, weights: Tensor, server: Params) -> None:
        """Refill the global parameters (flat `[N]`) and the server's state on every device, in place."""
        done = set()
        for worker in self._pool:
            if id(worker.weights) not in done:
                done.add(id(worker.weights))
                worker.weights.copy_(weights)
                self._server_layout.fill(worker.server, server)
        for device in {w.device for w in self._pool if w.device.startswith("cuda")}:
            torch.cuda.synchronize(device)  # the copies must have landed before another process reads them

    def run(self, packs: Sequence[Pack]) -> Iterator[tuple[Report, Tensor]]:
        """Train packs on whichever worker is free; yields (report, partial sum `[N]`) in the order of `packs`.

        A pack goes out only to a worker with a free buffer, in order; so the pack that is waited for is always under way.

        Raises:
            ClientError: where a client's training raised, or a worker died.
            OutOfMemory: where a pack did not fit; the others under way are waited for and dropped.
        """
        waiting, ready = deque(packs), {}
        for pack in packs:
            while pack.index not in ready:
                for worker in self._pool:
                    if waiting and worker.busy is None and worker.free:
                        worker.busy = waiting.popleft()
                        self._send(worker, ("train", worker.busy, worker.free[0]))
                for worker in self._ready():
                    report = self._receive(worker)
                    if report is None:
                        worker.busy = None
                        self._drop_all()
                        raise OutOfMemory(worker.device)
                    ready[report.index] = (report, worker, worker.free.popleft())
                    worker.busy = None
            report, worker, slot = ready.pop(pack.index)
            yield report, worker.slots[slot]
            worker.free.append(slot)

    def _drop_all(self) -> None:
        """Wait for what is under way and forget it; all buffers are free then."""
        for worker in self._pool:
            if worker.busy is not None:
                self._receive(worker)
                worker.busy = None
            worker.free = deque(range(len(worker.slots)))

    def measure(self, rows: Sequence[Any]) -> Measured | None:
        """What a pass over these rows (one array a lane) takes on the first worker; None if it does not fit."""
        self._send(self._pool[0], ("measure", rows))
        return self._receive(self._pool[0])

    def configure(self, engine: Engine) -> None:
        """Train like this from now on, on all workers."""
        for worker in self._pool:
            self._send(worker, ("configure", engine))
            self._receive(worker)

    def peaks(self) -> list[int]:
        """Highest memory in use so far, in bytes, by worker."""
        for worker in self._pool:
            self._send(worker, ("peak",))
        return [self._receive(worker) for worker in self._pool]

    def score(self, requests: Sequence[Scoring]) -> list[list[Scores]]:
        """Score each request on whichever worker is free; the answers are in the order of `requests`."""
        out: list[list[Scores] | None] = [None] * len(requests)
        waiting, places = deque(enumerate(requests)), {}
        while any(s is None for s in out):
            for worker in self._pool:
                if waiting and worker.busy is None:
                    places[id(worker)], worker.busy = waiting.popleft()
                    self._send(worker, ("score", worker.busy))
            for worker in self._ready():
                out[places[id(worker)]] = self._receive(worker)
                worker.busy = None
        return out

    def close(self) -> None:
        """End the workers and free what was shared; may be called twice."""
        for worker in self._pool:
            with contextlib.suppress(OSError):
                worker.pipe.send(("stop",))
        for worker in self._pool:
            if worker.busy is None:
                worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
            worker.process.close()
        self._pool = []
        self.weights = None

    # ------------------------------------------------------------------------------------------- messages

    def _send(self, worker: _Worker, message: tuple[Any, ...]) -> None:
        try:
            worker.pipe.send(message)
        except OSError:
            raise self._died(worker) from None

    def _ready(self) -> list[_Worker]:
        """Busy workers that have answered, after waiting for one; a worker that has died raises."""
        busy = [w for w in self._pool if w.busy is not None]
        answered = wait([w.pipe for w in busy] + [w.process.sentinel for w in self._pool])
        ready = [w for w in busy if w.pipe in answered]
        for worker in self._pool:
            if worker.process.sentinel in answered and worker not in ready:
                raise self._died(worker)
        return ready

    def _receive(self, worker: _Worker) -> Any:
        try:
            kind, *rest = worker.pipe.recv()
        except (EOFError, OSError):
            raise self._died(worker) from None
        if kind == "error":
            raise client_failed(_tasks(worker), f"{worker.device} ({worker.process.name})", rest[0])
        return rest[0]

    def _died(self, worker: _Worker) -> Exception:
        how = died_of(worker.process)
        return client_failed(
            _tasks(worker), f"{worker.device} ({worker.process.name})", f"the worker process died: {how}"
        )


def _tasks(worker: _Worker) -> Sequence[Task]:
    return worker.busy.tasks if isinstance(worker.busy, Pack) else []


def _shared(layout: Layout, device: str) -> Tensor:
    tensor = layout.empty(device)
    return (
        tensor.share_memory_() if tensor.device.type == "cpu" else tensor
    )  # CUDA tensors are shared by handle when sent


def _work(pipe: Connection, make_trainer: MakeTrainer, device_name: str, threads: int) -> None:
    """A worker's life: load the model, then train and score what it is told to, until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the main process decides
    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    trainer, weights, server, server_layout, slots = None, None, None, None, []
    while True:
        try:
            kind, *rest = pipe.recv()
        except (EOFError, OSError):
            return
        if kind == "stop":
            # Views into shared memory go before the process does, or CUDA reports leaked handles.
            del trainer, weights, server, slots
            return
        try:
            if kind == "share":
                layout, server_layout, weights, server, slots, engine = rest
                trainer = make_trainer(device, engine)
                assert trainer.layout == layout, "the worker's parameters are not those the run was started with"
                answer: Any = None
            elif kind == "train":
                pack, slot = rest
                answer = trainer.train(pack, weights, server_layout.views(server), slots[slot])
            elif kind == "measure":
                answer = trainer.measure(rest[0], weights)
            elif kind == "configure":
                answer = trainer.configure(rest[0])
            elif kind == "peak":
                answer = trainer.peak()
            else:
                answer = trainer.score(rest[0], weights)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # what was written must be visible to the process that reads it next
            pipe.send(("done", answer))
        except Exception as error:
            if not (is_out_of_memory(error) and kind in ("train", "measure")):
                pipe.send(("error", traceback.format_exc()))
                continue
        else:
            continue
        trainer.shrink()  # outside the handler, whose traceback holds the tensors
        pipe.send(("done", None))
