"""Packs on worker processes, one or more per device, alive for the whole run.

Global parameters and sums lie in tensors that are shared once at the start - shared memory on the CPU, CUDA IPC on GPUs -
and are refilled in place: no parameter travels through a pipe. Small updates go into a worker's partial sums, so that it
need not wait for others; large ones straight into the one sum, when it is the pack's turn. What a pack computes does not
depend on who computes it, and updates are added in pack order, so any number of workers gives the bits of the serial
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
from fedsim.params import LARGE, Layout, Params
from fedsim.types import Engine, Measured, Pack, Partial, Report, Scores, Scoring, Task, Turn

_SLOTS_BELOW = LARGE  # bytes of an update that goes into partial sums, of which each worker has two


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    device: str
    weights: Tensor | None = None
    server: Tensor | None = None
    slots: list[Tensor] = field(default_factory=list)  # none: it adds to the one sum itself
    free: deque[int] = field(default_factory=deque)
    busy: Pack | Scoring | None = None
    waits: bool = False  # for its turn to add


class PoolExecutor:
    """Runs packs on worker processes.

    Args:
        make_trainer: (device, engine) -> trainer; must pickle. What it holds in shared memory is not copied.
        devices: one per worker; a device may occur several times.
        threads: CPU threads of a worker.
        home: where the global parameters and the running sum lie; None = the parameters on each worker's device, the sum on the
            first one's.
    """

    def __init__(
        self, make_trainer: MakeTrainer, devices: Sequence[str], threads: int, home: str | None = None
    ) -> None:
        self.workers, self.home = list(devices), home
        self.weights: Tensor | None = None
        self.total: Tensor | None = None
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

    def start(self, layout: Layout, server: Layout, engine: Engine, merges: bool) -> None:
        """Share the buffers with the workers and wait until their models are loaded; see `SerialExecutor.start`.

        Raises:
            ClientError: if a worker cannot load its model, with its traceback.
        """
        self.total = _shared(layout, self.home or self._pool[0].device) if merges else None
        by_home: dict[str, Tensor] = {}
        by_device: dict[str, Tensor] = {}
        copies = 2 if merges and layout.nbytes < _SLOTS_BELOW else 0
        for worker in self._pool:
            home = self.home or worker.device
            if home not in by_home:
                by_home[home] = _shared(layout, home)
            if worker.device not in by_device:
                by_device[worker.device] = _shared(server, worker.device)
            worker.weights, worker.server = by_home[home], by_device[worker.device]
            worker.slots = [_shared(layout, worker.device) for _ in range(copies)]
            worker.free = deque(range(copies))
            total = None if copies else self.total
            self._send(worker, ("share", layout, server, worker.weights, worker.server, worker.slots, total, engine))
        self.weights = self._pool[0].weights
        self._server_layout = server
        for worker in self._pool:
            self._receive(worker)

    def broadcast(self, weights: Tensor, server: Params) -> None:
        """Refill the global parameters (flat `[N]`) and the server's state on every device, in place."""
        done = {id(weights)}
        for worker in self._pool:
            if id(worker.weights) not in done:
                done.add(id(worker.weights))
                worker.weights.copy_(weights)
            if id(worker.server) not in done:
                done.add(id(worker.server))
                self._server_layout.fill(worker.server, server)
        for device in {w.device for w in self._pool if w.device.startswith("cuda")}:
            torch.cuda.synchronize(device)  # the copies must have landed before another process reads them

    def run(self, packs: Sequence[Pack], total: Partial | None) -> Iterator[Report]:
        """Train packs on whichever worker is free; their updates are added to `total` in the order of `packs`, where there is one.

        A pack goes out in order, to a worker that has somewhere to put its update; so the pack that is waited for is always
        under way.

        Raises:
            ClientError: where a client's training raised, or a worker died.
            OutOfMemory: where a pack did not fit; the others under way are waited for and dropped.
        """
        waiting, ready, turn = deque(packs), {}, 0
        if total is not None and total.total.is_cuda:  # it was set to zero here, and other processes add to it
            torch.cuda.synchronize(total.total.device)
        for pack in packs:
            while pack.index not in ready:
                for worker in self._pool:
                    slotted = total is not None and bool(worker.slots)
                    if waiting and worker.busy is None and (worker.free or not slotted):
                        worker.busy = waiting.popleft()
                        self._send(
                            worker, ("train", worker.busy, worker.free[0] if slotted else None, total is not None)
                        )
                for worker in self._pool:
                    if worker.waits and worker.busy.index == packs[turn].index:
                        worker.waits = False
                        self._send(worker, ("go", True))
                for worker in self._ready():
                    kind, found = self._message(worker)
                    if kind == "ready":
                        worker.waits = True
                    elif kind == "added":
                        turn += 1
                    elif found is None:
                        worker.busy = None
                        self._drop_all()
                        raise OutOfMemory(worker.device)
                    else:
                        slotted = total is not None and bool(worker.slots)
                        ready[found.index] = (found, worker, worker.free.popleft() if slotted else None)
                        worker.busy = None
            report, worker, slot = ready.pop(pack.index)
            if slot is not None:
                total.total.add_(worker.slots[slot].to(total.total.device))
                worker.free.append(slot)
            if total is not None:
                total.weight += report.weight
            yield report

    def _drop_all(self) -> None:
        """Wait for what is under way and forget it; all buffers are free then."""
        for worker in self._pool:
            while worker.busy is not None:
                if worker.waits:
                    worker.waits = False
                    self._send(worker, ("go", False))
                kind, _ = self._message(worker)
                worker.waits = kind == "ready"
                if kind == "done":
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
        self.weights = self.total = None

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
        return self._message(worker)[1]

    def _message(self, worker: _Worker) -> tuple[str, Any]:
        """What a worker says next: (done, its answer), or that it is ready to add, or that it has added."""
        try:
            kind, *rest = worker.pipe.recv()
        except (EOFError, OSError):
            raise self._died(worker) from None
        if kind == "error":
            raise client_failed(_tasks(worker), f"{worker.device} ({worker.process.name})", rest[0])
        return kind, rest[0]

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


class _Turn(Turn):
    """A worker asks, and adds when the main process says so; it says when it has."""

    def __init__(self, pipe: Connection, devices: set[torch.device]) -> None:
        self._pipe, self._devices = pipe, [d for d in devices if d.type == "cuda"]

    def wait(self) -> bool:
        self._pipe.send(("ready", None))
        _, go = self._pipe.recv()
        return go

    def done(self) -> None:
        for device in self._devices:  # what was added must be there before another process adds to it
            torch.cuda.synchronize(device)
        self._pipe.send(("added", None))


def _work(pipe: Connection, make_trainer: MakeTrainer, device_name: str, threads: int) -> None:
    """A worker's life: load the model, then train and score what it is told to, until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the main process decides
    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    trainer, weights, server, server_layout, slots, total, out = None, None, None, None, [], None, None
    while True:
        try:
            kind, *rest = pipe.recv()
        except (EOFError, OSError):
            return
        if kind == "stop":
            # Views into shared memory go before the process does, or CUDA reports leaked handles.
            del trainer, weights, server, slots, total, out
            return
        try:
            if kind == "share":
                layout, server_layout, weights, server, slots, total, engine = rest
                trainer = make_trainer(device, engine)
                assert trainer.layout.sums == layout, "the worker's parameters are not those the run was started with"
                answer: Any = None
            elif kind == "train":
                pack, slot, merges = rest
                if slot is not None:
                    slots[slot].zero_()
                turn = _Turn(pipe, {device, total.device}) if merges and slot is None else None
                out = slots[slot] if slot is not None else total if merges else None
                answer = trainer.train(pack, weights, server_layout.views(server), out, turn)
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
