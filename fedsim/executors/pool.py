"""Packs on worker processes, one or more per device, alive for the whole run.

Global parameters and sums lie in tensors that are shared once at the start - shared memory on the CPU, CUDA IPC on GPUs - and
are refilled in place: no parameter travels through a pipe. Small updates go into partial sums of each worker, so that it need
not wait for others; large ones go straight into the one sum, when it is the pack's turn. What a pack computes does not depend
on who computes it, and updates are added in pack order, so any number of workers gives the bits of the serial executor at the
same threads per worker.

If a process dies, another one does its work again, from the same parameters and random streams, to the same bits: what may
be left half done is cleared or overwritten. Only a process that dies while it adds to the one sum takes the round with it.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_sharer
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from fedsim.aggregators import Accumulator
from fedsim.core.errors import (
    ClientError,
    OutOfMemory,
    SumLost,
    UserError,
    WorkerDied,
    is_lost_context,
    is_out_of_memory,
)
from fedsim.core.heartbeat import at_work, beat
from fedsim.core.params import LARGE, Layout, Params
from fedsim.core.types import Engine, Measured, Memory, Pack, Report, Scores, Scoring, Turn
from fedsim.executors.serial import MakeWorker, buffers, client_failed, clients
from fedsim.executors.supervisor import Supervisor, Work, Worker, heard

_SLOTS_BELOW = LARGE  # bytes of an update that goes into partial sums, of which each worker has two


@dataclass(eq=False, kw_only=True)
class _Job(Work):
    """What a worker is told to do, and told again after a death.

    Attributes:
        message: as it is sent.
        what: that is, where it is no pack.
        pack: to train.
        turn: of a pack that adds to the one sum: "" | waits | adds | added.
    """

    message: tuple[Any, ...] = ()
    what: str = ""
    pack: Pack | None = None
    turn: str = ""

    @property
    def tasks(self) -> Sequence[Any]:
        """The pack's."""
        return () if self.pack is None else self.pack.tasks


@dataclass(eq=False)
class _Worker(Worker):
    """A worker of the pool.

    Attributes:
        weights, server: global parameters and server state that it reads.
        slots: partial sums; none: it adds to the one sum itself.
        free: slots that hold nothing.
        loading: its model, as a job.
    """

    weights: Tensor | None = None
    server: Tensor | None = None
    slots: list[Tensor] = field(default_factory=list)
    free: deque[int] = field(default_factory=deque)
    loading: _Job = field(default_factory=lambda: _Job(what="model loading"))


class PoolExecutor:
    """Runs packs on worker processes.

    Args:
        make_worker: (device, engine) -> trainer; must pickle, at any time: a process that follows a dead one gets it too.
            What it holds in shared memory is not copied.
        devices: one per worker; a device may occur several times.
        threads: CPU threads of a worker.
        home: where the global parameters and the running sum lie; None = the parameters on each worker's device, the sum on the
            first one's.
        hang_s: seconds without a heartbeat after which a worker at work is ended; None = never. A trainer beats at each pass,
            batch and piece of what it copies; loading the model and waiting for a turn are not limited.
        note: called with a line when a worker has died.
    """

    def __init__(
        self,
        make_worker: MakeWorker,
        devices: Sequence[str],
        threads: int,
        home: str | None = None,
        *,
        hang_s: float | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.weights: Tensor | None = None
        self.total: Tensor | None = None
        self.spare: Tensor | None = None
        self._home, self._hang_s, self._note = home, hang_s, note
        self._deaths: dict[Any, list[str]] = {}  # by pack, while its round is under way
        self._unread = False  # whether handles were sent to a process that may have died before it took them
        self._pool = [_Worker(f"fedsim-worker-{i}", device) for i, device in enumerate(devices)]
        self._supervisor = Supervisor(self._pool, _serve, (make_worker,), threads)
        try:
            for worker in self._pool:
                self._supervisor.start(worker)
        except BaseException:
            self.close()
            raise

    def start(self, layout: Layout, server: Layout, engine: Engine, summed: int, many: bool = False) -> Memory:
        """Share the buffers with the workers and wait until their models are loaded; see `SerialExecutor.start`.

        Raises:
            ClientError: if a worker cannot load its model, with its traceback.
            WorkerDied: if processes die of it.
        """
        self.total, self.spare = map(_shared, buffers(layout, summed, many, self._home or self._pool[0].device))
        params_on = functools.cache(lambda home: _shared(layout.empty(home)))
        state_on = functools.cache(lambda device: _shared(server.empty(device)))
        copies = 2 if summed and summed * layout.dtype.itemsize < _SLOTS_BELOW else 0
        self._layout, self._server_layout, self._engine = layout, server, engine
        for worker in self._pool:
            worker.weights, worker.server = params_on(self._home or worker.device), state_on(worker.device)
            worker.slots = [_shared(buffers(layout, summed, False, worker.device)[0]) for _ in range(copies)]
            worker.free = deque(range(copies))
            self._load(worker)
        self.weights = self._pool[0].weights
        while not all(worker.idle for worker in self._pool):
            self._next()
        return Memory(self.weights, self.total, self.spare)

    def _load(self, worker: _Worker) -> None:
        """Tell a fresh process to load its model, and where the buffers are."""
        sums = (None, None) if worker.slots else (self.total, self.spare)
        shared = (worker.weights, worker.server, worker.slots, sums)
        message = ("load", self._layout, self._server_layout, *shared, self._engine)
        self._supervisor.send(worker, message, [worker.loading], None)

    def broadcast(self, weights: Tensor, server: Params) -> None:
        """Refill the global parameters (flat `[N]`) and the server's state on every device, in place."""
        for own in {id(w.weights): w.weights for w in self._pool}.values():
            if own is not weights:
                own.copy_(weights)
        for own in {id(w.server): w.server for w in self._pool}.values():
            if server:
                self._server_layout.fill(own, server)
            else:
                own.zero_()
        for device in {w.device for w in self._pool if w.device.startswith("cuda")}:
            torch.cuda.synchronize(device)  # the copies must have landed before another process reads them

    def train(self, packs: Sequence[Pack], total: Accumulator | None) -> Iterator[Report]:
        """Train packs on whichever worker is free; their messages are added to `total` in the order of `packs`, where there is one.

        A pack goes out in order, to a worker that has somewhere to put its update; so the pack that is waited for is always
        under way. A pack whose worker died goes out again before all later ones.

        Raises:
            ClientError: where a client's training raised.
            WorkerDied: where processes died of the same pack again and again.
            OutOfMemory: where a pack did not fit; the others under way are waited for and dropped.
            SumLost: where a process died while it added to `total`; likewise.
        """
        slotted = total is not None and bool(self._pool[0].slots)
        waiting, ready = [self._training(pack) for pack in packs], {}
        if total is not None and total.total.is_cuda:  # it was set to zero here, and other processes add to it
            torch.cuda.synchronize(total.total.device)
        for pack in packs:
            while pack.index not in ready:
                for number, worker in enumerate(self._pool):
                    mine = (j for j in waiting if j.pack.home is None or j.pack.home % len(self._pool) == number)
                    job = next(mine, None) if worker.idle and (worker.free or not slotted) else None
                    if job is not None:
                        waiting.remove(job)
                        place = None if total is None else worker.free[0] if slotted else self._place(job, total)
                        job.message = ("train", job.pack, place)
                        self._send(worker, job)
                for worker in self._pool:
                    for job in worker.work:
                        if job.turn == "waits" and job.pack.index == total.packs:
                            self._take_turn(worker, job, True)
                worker, job, kind, found = self._next()
                if kind == "added":
                    self._count(total)
                elif kind == "lost" and job.turn == "adds":
                    self._drop_all()
                    raise SumLost(worker.place)
                elif kind == "lost":
                    job.turn = "" if job.turn == "waits" else job.turn
                    bisect.insort(waiting, job, key=lambda job: job.pack.index)
                elif kind == "done" and found is None:
                    self._drop_all()
                    raise OutOfMemory(worker.device)
                elif kind == "done":
                    ready[found.index] = (found, worker, worker.free.popleft() if slotted else None)
            report, worker, slot = ready.pop(pack.index)
            if slot is not None:
                total.place(total.packs).add_(worker.slots[slot].to(total.total.device))
                worker.free.append(slot)
                self._count(total)
            if total is not None:
                total.weight += report.weight
            yield report
        if total is not None:
            total.close()
        self._deaths.clear()

    @staticmethod
    def _count(total: Accumulator) -> None:
        """Count a pack that was added; what this adds must be there before another process adds to it."""
        total.added()
        if total.total.is_cuda and total.spare is not None:
            torch.cuda.synchronize(total.total.device)

    def _training(self, pack: Pack) -> _Job:
        """A pack as a job; what has died of it before, in this round, is remembered."""
        key = (pack.mode, pack.tasks[0].round, tuple(t.client for t in pack.tasks))
        return _Job(pack=pack, deaths=self._deaths.setdefault(key, []))

    @staticmethod
    def _place(job: _Job, total: Accumulator) -> str:
        """Where a pack adds its update; one that is in the sum is not added again, but trained for what else it leaves."""
        return "nowhere" if job.turn else "spare" if total.place(job.pack.index) is total.spare else "sum"

    def _take_turn(self, worker: _Worker, job: _Job, go: bool) -> None:
        """Let a pack that waits for its turn add its update, or tell it that the round is given up."""
        job.turn = "adds" if go else ""
        self._supervisor.tell(worker, ("go", go), self._hang_s)

    def _drop_all(self) -> None:
        """Wait for what is under way and forget it; all buffers are free then."""
        while busy := [(w, job) for w in self._pool for job in w.work if job is not w.loading]:
            for worker, job in busy:
                if job.turn == "waits":
                    self._take_turn(worker, job, False)
            self._next()
        for worker in self._pool:
            worker.free = deque(range(len(worker.slots)))

    def measure(self, rows: Sequence[Any]) -> Measured | None:
        """What a pass over these rows (one array per lane) takes on the first worker; None if it does not fit."""
        return self._do([_Job(message=("measure", rows), what="measuring")], self._pool[:1])[0]

    def configure(self, engine: Engine) -> None:
        """Train like this from now on, on all workers."""
        self._engine = engine
        for worker in self._pool:
            self._do([_Job(message=("configure", engine), what="configuration")], [worker])

    def peaks(self) -> list[int]:
        """Highest memory in use so far, in bytes, by worker."""
        return [self._do([_Job(message=("peak",), what="reading the peak")], [worker])[0] for worker in self._pool]

    def score(self, requests: Sequence[Scoring]) -> Iterator[list[Scores]]:
        """Evaluate each request on whichever worker is free; the answers are in the order of `requests`."""
        yield from self._do([_Job(message=("score", request), what="evaluation") for request in requests], self._pool)

    def _do(self, jobs: Sequence[_Job], workers: Sequence[_Worker]) -> list[Any]:
        """The answers to jobs that any of these workers can do, in the order of `jobs`."""
        waiting, answers = list(jobs), {}
        while len(answers) < len(jobs):
            for worker in workers:
                if waiting and worker.idle:
                    self._send(worker, waiting.pop(0))
            _, job, kind, found = self._next()
            if kind == "done":
                answers[job] = found
            elif kind == "lost":
                waiting.insert(0, job)
        return [answers[job] for job in jobs]

    def close(self) -> None:
        """End the workers and free what was shared; may be called twice."""
        self._unread |= any(worker.loading in worker.work for worker in self._pool)
        self._supervisor.close()
        if self._unread:  # handles that nobody will take would keep the buffers in memory
            resource_sharer.stop(timeout=5)
        self._unread, self._pool = False, []
        self.weights = self.total = self.spare = None

    # ------------------------------------------------------------------------------------------- messages

    def _send(self, worker: _Worker, job: _Job) -> None:
        self._supervisor.send(worker, job.message, [job], self._hang_s)

    def _next(self) -> tuple[_Worker, _Job | None, str, Any]:
        """What happens next, after waiting for it: the worker, what it was at, and

        - `done`, its answer: it is idle now;
        - `ready`, `added`: it waits for its turn to add to the one sum, or has added;
        - `lost`: its process has died and another one is starting; the job has to be done again;
        - `loaded`, `replaced`: its process has its model, or was replaced while it had nothing to do.

        Raises:
            ClientError: where it raised.
            WorkerDied: where too many processes died of what it was at.
        """
        worker, kind, found, *lost = self._supervisor.next()
        if kind == "died":
            return self._replace(worker, found, *lost[0])
        (job,) = worker.work
        if kind == "error" and isinstance(found, Exception):
            raise found
        if kind == "error":
            raise client_failed(job.tasks, worker.place, found, job.what)
        if kind == "ready":
            job.turn, worker.hang_s = "waits", None
        elif kind == "added":
            job.turn = "added"
        else:
            worker.work = []
            if job is worker.loading:
                kind = "loaded"
                job.deaths.clear()
        return worker, job, kind, found

    def _replace(self, worker: _Worker, died: str, job: _Job | None = None) -> tuple[_Worker, _Job | None, str, Any]:
        """Start a process in the place of one that has died, and say so."""
        self._unread |= job is worker.loading
        if job is not None and job.given_up:
            what = f"round {job.tasks[0].round}, {clients(job.tasks)}" if job.tasks else job.what
            raise WorkerDied("\n".join([f"{what} failed: {job.why[0]}", *job.why[1:]]))
        if job is None:
            said = "while idle; replaced"
        elif not job.tasks:
            said = f"during {job.what}; replaced, and it starts again"
        else:
            again = (
                "the round starts again: its update was half added" if job.turn == "adds" else "its pack starts again"
            )
            said = f"in round {job.tasks[0].round} with {clients(job.tasks)}; replaced, {again}"
        with contextlib.suppress(OSError, ValueError):  # nobody may be listening; the run goes on
            self._note(f"{died} {said}")
        self._supervisor.start(worker)
        self._load(worker)
        return worker, job, "replaced" if job in (None, worker.loading) else "lost", None


def _shared(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.is_cuda:  # CUDA tensors are shared by handle when sent
        return tensor
    return tensor.share_memory_()


# ------------------------------------------------------------------------------------------- in a worker process


class _Turn(Turn):
    """A worker asks, and adds when the main process says so; it says when it has."""

    def __init__(self, pipe: Connection, devices: set[torch.device]) -> None:
        self._pipe, self._devices = pipe, [d for d in devices if d.type == "cuda"]

    def wait(self) -> bool:
        self._pipe.send(("ready", None))
        _, go = self._pipe.recv()
        beat()
        return go

    def done(self) -> None:
        for device in self._devices:  # what was added must be there before another process adds to it
            torch.cuda.synchronize(device)
        self._pipe.send(("added", None))


def _serve(pipe: Connection, device_name: str, make_worker: MakeWorker) -> None:
    """Load the model, then train and score what is asked for, until the pipe is closed."""
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with at_work():
        for kind, *rest in heard(pipe):
            beat()
            try:
                if kind == "load":
                    layout, server_layout, weights, server, slots, sums, engine = rest
                    trainer = make_worker(device, engine)
                    assert trainer.layout.sums == layout, "the worker's parameters are not those of the run"
                    answer: Any = None
                elif kind == "train":
                    pack, place = rest
                    out, turn = None, None
                    if isinstance(place, int):
                        out = slots[place].zero_()
                    elif place == "nowhere":  # adding to it is no work and takes no memory
                        out = torch.empty_like(sums[0], device="meta")
                    elif place is not None:
                        out = sums[place == "spare"]
                        turn = _Turn(pipe, {device, out.device})
                    answer = trainer.train(pack, weights, server_layout.views(server), out, turn)
                else:
                    at = [weights] if kind in ("measure", "score") else []
                    at += [server_layout.views(server)] if kind == "score" else []
                    answer = getattr(trainer, kind)(*rest, *at)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # what was written must be visible to the process that reads it next
                pipe.send(("done", answer))
            except Exception as error:
                if not (is_out_of_memory(error) and kind in ("train", "measure")):
                    if is_lost_context(error):
                        raise
                    told = isinstance(error, (UserError, ClientError))
                    pipe.send(("error", error if told else traceback.format_exc()))
                    continue
            else:
                continue
            trainer.shrink()  # outside the handler, whose traceback holds the tensors
            pipe.send(("done", None))
