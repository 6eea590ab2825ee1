"""Packs on worker processes, one or more per device, alive for the whole run.

Global parameters and sums lie in tensors that are shared once at the start - shared memory on the CPU, CUDA IPC on GPUs -
and are refilled in place: no parameter travels through a pipe. Small updates go into a worker's partial sums, so that it
need not wait for others; large ones straight into the one sum, when it is the pack's turn. What a pack computes does not
depend on who computes it, and updates are added in pack order, so any number of workers gives the bits of the serial
executor at the same threads per worker.

A process that dies is replaced, and what it had to do is done again, from the same parameters and random streams, to the
same bits: what it may have left half-done is cleared or overwritten. Only a process that dies while it adds to the one sum
takes the round with it. A process that hangs is ended, and has died then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_sharer
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch
import torch.multiprocessing as mp
from torch import Tensor

from fedsim.aggregators import Accumulator
from fedsim.core.errors import OutOfMemory, SumLost, WorkerDied, is_lost_context, is_out_of_memory
from fedsim.core.params import LARGE, Layout, Params
from fedsim.core.pulse import LOOK_S, Watch, at_work, beat, pulses, silence, watched_by
from fedsim.core.types import Engine, Measured, Memory, Pack, Report, Scores, Scoring, Task, Turn
from fedsim.executors.processes import (
    DEATHS,
    die_with_parent,
    died_of,
    main_not_imported,
    without_interrupt,
)
from fedsim.executors.serial import MakeTrainer, buffers, client_failed, clients

_SLOTS_BELOW = LARGE  # bytes of an update that goes into partial sums, of which each worker has two


@dataclass
class _Job:
    """What a worker is told to do, and told again after a death.

    Attributes:
        message: as it is sent.
        what: that is, in words.
        again: what happens after a death, in words.
        about: a pack, or the place of a scoring request.
        tasks: a pack's.
        deaths: how the processes that were at it have ended.
    """

    message: tuple[Any, ...]
    what: str
    again: str
    about: Any = None
    tasks: Sequence[Task] = ()
    deaths: list[str] = field(default_factory=list)

    @property
    def during(self) -> str:
        """When a process died that was at it."""
        return f"in round {self.tasks[0].round} with {clients(self.tasks)}" if self.tasks else f"while {self.what}"


@dataclass
class _Worker:
    """A place for a process; processes may follow one another in it.

    Attributes:
        place: its number.
        device: where it computes.
        process, pipe: of the process that is there now.
        weights, server: global parameters and server state that it reads.
        slots: partial sums; none: it adds to the one sum itself.
        free: slots that hold nothing.
        job: what it is at.
        loaded: whether it has its model.
        turn: of a pack that adds to the one sum: "" | waits | adds | added.
        loads: how processes have ended here before they had their model, since one last had.
        watch: over the signs of life of the process.
        why: what its process was ended for, where that is known.
        ended: how its process has ended, once that was told.
    """

    place: int
    device: str
    process: Any = None
    pipe: Connection | None = None
    weights: Tensor | None = None
    server: Tensor | None = None
    slots: list[Tensor] = field(default_factory=list)
    free: deque[int] = field(default_factory=deque)
    job: _Job | None = None
    loaded: bool = False
    turn: str = ""
    loads: list[str] = field(default_factory=list)
    watch: Watch | None = None
    why: str | None = None
    ended: str | None = None

    @property
    def idle(self) -> bool:
        """Whether it can be told to do something."""
        return self.loaded and self.job is None

    @property
    def where(self) -> str:
        """Device and name."""
        return f"{self.device} ({self.name})"

    @property
    def name(self) -> str:
        """As its processes are called."""
        return f"fedsim-worker-{self.place}"


class PoolExecutor:
    """Runs packs on worker processes.

    Args:
        make_trainer: (device, engine) -> trainer; must pickle, at any time: a process that follows a dead one gets it too.
            What it holds in shared memory is not copied.
        devices: one per worker; a device may occur several times.
        threads: CPU threads of a worker.
        home: where the global parameters and the running sum lie; None = the parameters on each worker's device, the sum on the
            first one's.
        hang_s: seconds without a beat after which a worker that is at work is ended; None = never. A trainer beats at each
            pass, batch and piece, see `Trainer.beat`; loading the model and waiting for a turn are not limited.
        note: called with a line when a worker has died, from any thread.
    """

    def __init__(
        self,
        make_trainer: MakeTrainer,
        devices: Sequence[str],
        threads: int,
        home: str | None = None,
        *,
        hang_s: float | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.workers, self.home = list(devices), home
        self.weights: Tensor | None = None
        self.total: Tensor | None = None
        self.spare: Tensor | None = None
        self._make, self._threads, self._hang_s, self._note = make_trainer, threads, hang_s, note
        self._pulses = pulses(len(devices))
        self._deaths: dict[Any, list[str]] = {}  # by pack, while its round is under way
        self._unread = False  # whether handles were sent to a process that may have died before it took them
        self._pool = [_Worker(i, device) for i, device in enumerate(devices)]
        # Held by whoever looks at processes or changes them: this thread, or the one that watches.
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="fedsim-watcher", daemon=True)
        try:
            for worker in self._pool:
                self._spawn(worker)
            self._watcher.start()
        except BaseException:
            self.close()
            raise

    def _spawn(self, worker: _Worker) -> None:
        """Start a process; it waits for what it shares."""
        context = mp.get_context("spawn")
        with main_not_imported(), without_interrupt():
            here, there = context.Pipe()
            pulse = self._pulses[worker.place].zero_()
            process = context.Process(
                target=_work,
                args=(there, pulse, self._make, worker.device, self._threads),
                name=worker.name,
                daemon=True,
            )
            process.start()
            there.close()
            worker.process, worker.pipe, worker.watch = process, here, Watch(pulse)
            worker.loaded, worker.job, worker.turn, worker.why, worker.ended = False, None, "", None, None

    def start(self, layout: Layout, server: Layout, engine: Engine, summed: int, many: bool = False) -> Memory:
        """Share the buffers with the workers and wait until their models are loaded; see `SerialExecutor.start`.

        Raises:
            ClientError: if a worker cannot load its model, with its traceback.
            WorkerDied: if processes die of it.
        """
        self.total, self.spare = map(_shared, buffers(layout, summed, many, self.home or self._pool[0].device))
        by_home: dict[str, Tensor] = {}
        by_device: dict[str, Tensor] = {}
        copies = 2 if summed and summed * layout.dtype.itemsize < _SLOTS_BELOW else 0
        self._layout, self._server_layout, self._engine = layout, server, engine
        for worker in self._pool:
            home = self.home or worker.device
            if home not in by_home:
                by_home[home] = _shared(layout.empty(home))
            if worker.device not in by_device:
                by_device[worker.device] = _shared(server.empty(worker.device))
            worker.weights, worker.server = by_home[home], by_device[worker.device]
            worker.slots = [_shared(buffers(layout, summed, False, worker.device)[0]) for _ in range(copies)]
            worker.free = deque(range(copies))
            self._load(worker)
        self.weights = self._pool[0].weights
        while not all(worker.loaded for worker in self._pool):
            self._next()
        return Memory(self.weights, self.total, self.spare)

    def _load(self, worker: _Worker) -> None:
        """Tell a fresh process to load its model, and where the buffers are."""
        sums = (None, None) if worker.slots else (self.total, self.spare)
        shared = (worker.weights, worker.server, worker.slots, sums)
        message = ("share", self._layout, self._server_layout, *shared, self._engine)
        self._send(worker, _Job(message, "loading the model", "it loads again", deaths=worker.loads))

    def broadcast(self, weights: Tensor, server: Params) -> None:
        """Refill the global parameters (flat `[N]`) and the server's state on every device, in place."""
        done = {id(weights)}
        for worker in self._pool:
            if id(worker.weights) not in done:
                done.add(id(worker.weights))
                worker.weights.copy_(weights)
            if server and id(worker.server) not in done:
                done.add(id(worker.server))
                self._server_layout.fill(worker.server, server)
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
        waiting, ready = deque(packs), {}
        added: list[int] = []  # packs whose updates are in the one sum
        if total is not None and total.total.is_cuda:  # it was set to zero here, and other processes add to it
            torch.cuda.synchronize(total.total.device)
        for pack in packs:
            while pack.index not in ready:
                for worker in self._pool:
                    if waiting and worker.idle and (worker.free or not slotted):
                        next_one = waiting.popleft()
                        place: int | str | None = None
                        if total is not None:
                            # What is in the sum is not added again: the pack is run for the rest that it leaves.
                            done = next_one.index in added
                            direct = "spare" if total.place(next_one.index) is total.spare else "sum"
                            place = worker.free[0] if slotted else "nowhere" if done else direct
                        self._send(worker, self._training(next_one, place))
                for worker in self._pool:
                    if worker.turn == "waits" and worker.job.about.index == packs[len(added)].index:
                        worker.turn = "adds"
                        self._tell(worker, ("go", True))
                worker, job, kind, found = self._next()
                if kind == "ready":
                    worker.turn = "waits"
                elif kind == "added":
                    worker.turn = "added"
                    added.append(job.about.index)
                    self._count(total)
                elif kind == "lost" and found == "adds":
                    self._drop_all()
                    raise SumLost(worker.where)
                elif kind == "lost" and job is not None:
                    waiting = deque(sorted([job.about, *waiting], key=lambda p: p.index))
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

    def _training(self, pack: Pack, place: int | str | None) -> _Job:
        """A pack as a job; what has died of it before, in this round, is remembered."""
        key = (pack.mode, pack.tasks[0].round, tuple(t.client for t in pack.tasks))
        deaths = self._deaths.setdefault(key, [])
        return _Job(("train", pack, place), "training", "its pack starts again", pack, pack.tasks, deaths)

    def _drop_all(self) -> None:
        """Wait for what is under way and forget it; all buffers are free then."""
        while any(worker.loaded and worker.job is not None for worker in self._pool):
            for worker in self._pool:
                if worker.turn == "waits":
                    worker.turn = ""
                    self._tell(worker, ("go", False))
            worker, _, kind, _ = self._next()
            if kind == "ready":
                worker.turn = "waits"
        for worker in self._pool:
            worker.free = deque(range(len(worker.slots)))

    def measure(self, rows: Sequence[Any]) -> Measured | None:
        """What a pass over these rows (one array a lane) takes on the first worker; None if it does not fit."""
        return self._ask(self._pool[0], "measuring a pass", "measure", rows)

    def configure(self, engine: Engine) -> None:
        """Train like this from now on, on all workers."""
        self._engine = engine
        for worker in self._pool:
            self._ask(worker, "taking in how to train", "configure", engine)

    def peaks(self) -> list[int]:
        """Highest memory in use so far, in bytes, by worker."""
        return [self._ask(worker, "telling its memory", "peak") for worker in self._pool]

    def score(self, requests: Sequence[Scoring]) -> Iterator[list[Scores]]:
        """Score each request on whichever worker is free; the answers are in the order of `requests`."""
        jobs = [_Job(("score", r), "a scoring pass", "which is made again", i) for i, r in enumerate(requests)]
        out: list[list[Scores] | None] = [None] * len(jobs)
        waiting = deque(jobs)
        while any(s is None for s in out):
            for worker in self._pool:
                if waiting and worker.idle:
                    self._send(worker, waiting.popleft())
            _, job, kind, found = self._next()
            if kind == "done":
                out[job.about] = found
            elif kind == "lost" and job is not None:
                waiting.appendleft(job)
        yield from out

    def close(self) -> None:
        """End the workers and free what was shared; may be called twice."""
        self._closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        pool = [worker for worker in self._pool if worker.process is not None]
        for worker in pool:
            with contextlib.suppress(OSError):
                worker.pipe.send(("stop",))
        for worker in pool:
            if worker.job is None:
                worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join(timeout=30)
            worker.pipe.close()
            if not worker.process.is_alive():
                worker.process.close()
            self._unread |= worker.job is not None and not worker.loaded
        if self._unread:  # handles that nobody will take would keep the buffers in memory
            resource_sharer.stop(timeout=5)
            self._unread = False
        self._pool = []
        self.weights = self.total = self.spare = None

    # ------------------------------------------------------------------------------------------- messages

    def _send(self, worker: _Worker, job: _Job) -> None:
        """Give an idle worker, or a fresh process, something to do; one that has died is met in `_next`."""
        worker.watch.told()
        worker.job = job
        try:
            worker.pipe.send(job.message)
        except OSError:
            with self._lock:  # it had died before
                worker.job = None
                self._settle(worker)
                worker.job = job

    @staticmethod
    def _tell(worker: _Worker, message: tuple[Any, ...]) -> None:
        """Say something about the job that a worker is at."""
        worker.watch.told()
        with contextlib.suppress(OSError):  # it has died, which `_next` finds
            worker.pipe.send(message)

    def _ask(self, worker: _Worker, what: str, *message: Any) -> Any:
        """What a worker answers; asked again where its process dies."""
        job = _Job(message, what, "which is asked again")
        while True:
            if worker.idle:
                self._send(worker, job)
            _, answered, kind, found = self._next()
            if answered is job and kind == "done":
                return found

    def _next(self) -> tuple[_Worker, _Job | None, str, Any]:
        """What happens next, after waiting for it: the worker, what it was at, and

        - `done`, its answer: it is idle now;
        - `ready`, `added`: it waits for its turn to add to the one sum, or has added;
        - `loaded`: it has its model now;
        - `lost`, its turn: its process has died and another one is starting; what it was at has to be done again.

        Raises:
            ClientError: where it raised.
            WorkerDied: where too many processes died of what it was at.
        """
        pipes = {w.pipe: w for w in self._pool if w.job is not None}
        ends = {w.process.sentinel: w for w in self._pool}
        answered = wait([*pipes, *ends])
        worker = next((pipes[a] for a in answered if a in pipes), None)
        if worker is None:
            return self._replace(next(ends[a] for a in answered))
        try:
            kind, found = worker.pipe.recv()
        except (EOFError, OSError):
            return self._replace(worker)
        if kind == "dies":
            worker.why = found
            return self._replace(worker)
        job = worker.job
        if kind == "error":
            raise client_failed(job.tasks, worker.where, found, job.what)
        if kind == "done":
            worker.job, worker.turn = None, ""
            if not worker.loaded:
                worker.loaded, kind = True, "loaded"
                worker.loads.clear()
        return worker, job, kind, found

    # ---------------------------------------------------------------------------------------------- deaths

    def _replace(self, worker: _Worker) -> tuple[_Worker, _Job | None, str, Any]:
        """Start a process in the place of one that has ended, or is about to."""
        with self._lock:
            self._settle(worker)
            job, turn, loaded = worker.job, worker.turn, worker.loaded
            self._unread |= not loaded
            deaths = worker.loads if not loaded else job.deaths if job is not None else []
            if len(deaths) >= DEATHS:
                self._give_up(worker, deaths)
            if worker.process.is_alive():
                raise WorkerDied(
                    f"worker {worker.name} on {worker.device}: {worker.ended}, and its process {worker.process.pid} does not "
                    "end, not even by SIGKILL: its device or its driver hangs"
                )
            worker.pipe.close()
            worker.process.close()
            worker.process = None
            self._spawn(worker)
        self._load(worker)
        return worker, job if loaded else None, "lost", turn

    def _settle(self, worker: _Worker) -> None:
        """Find out how a process has ended, count that, and say it; once."""
        if worker.ended is not None:
            return
        worker.process.join(timeout=5)
        if worker.process.is_alive():  # it has closed its pipe, or said that it ends
            worker.process.kill()
            worker.process.join(timeout=30)
        worker.ended = worker.why or died_of(worker.process)
        job = worker.job
        deaths = worker.loads if not worker.loaded else job.deaths if job is not None else []
        deaths.append(f"{worker.ended} on {worker.where}")
        if not worker.loaded:
            during, again = "while loading the model", ", which starts again"
        elif job is None:
            during, again = "while idle", ""
        else:
            during, again = job.during, f", {job.again}"
        if worker.turn == "adds":
            again = ", the round starts again: its update was half added"
        if len(deaths) < DEATHS:
            with contextlib.suppress(OSError, ValueError):  # nobody may be listening; the run goes on
                self._note(f"worker {worker.name} on {worker.device} died ({worker.ended}) {during}; replaced{again}")

    def _give_up(self, worker: _Worker, deaths: list[str]) -> NoReturn:
        job = worker.job
        what = "loading the model" if not worker.loaded else job.what
        if worker.loaded and job.tasks:
            what = f"round {job.tasks[0].round}, {clients(job.tasks)}"
        lines = [f"{what} failed: {len(deaths)} worker processes died of it, one after another: {'; '.join(deaths)}"]
        if any(d.startswith("SIGKILL") for d in deaths):
            lines.append(
                "SIGKILL is most often the kernel's out-of-memory killer: fewer executor.workers or training.lanes, or a "
                "lower local.micro_batch, evaluate.batch_size or data.max_length take less memory"
            )
        if any("executor.hang_s" in d for d in deaths):
            lines.append("where one pass takes longer than that, set executor.hang_s to more seconds, or to null")
        raise WorkerDied("\n".join(lines))

    def _watch(self) -> None:
        """End workers that hang, and say which have died while nobody waits for an answer; in a thread of its own."""
        last = time.monotonic()
        while not self._closing.wait(LOOK_S):
            now = time.monotonic()
            passed, last = now - last, now
            with self._lock:
                for worker in self._pool:
                    if worker.process is not None:
                        self._look_at(worker, passed)

    def _look_at(self, worker: _Worker, passed: float) -> None:
        said = wait([worker.process.sentinel, worker.pipe], timeout=0)
        if worker.process.sentinel in said:
            if worker.job is None or not worker.loaded:  # of others it is known sooner, in `_next`
                self._settle(worker)
            return
        expected = worker.job is not None and worker.loaded and worker.turn != "waits" and not said
        silent = worker.watch.look(passed, expected)
        if self._hang_s is not None and silent >= self._hang_s and worker.why is None:
            worker.why = silence(self._hang_s)
            worker.process.kill()


def _shared(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.is_cuda:  # CUDA tensors are shared by handle when sent
        return tensor
    return tensor.share_memory_()


class _Turn(Turn):
    """A worker asks, and adds when the main process says so; it says when it has."""

    def __init__(self, pipe: Connection, devices: set[torch.device], beat: Callable[[], None]) -> None:
        self._pipe, self._devices, self._beat = pipe, [d for d in devices if d.type == "cuda"], beat

    def wait(self) -> bool:
        self._pipe.send(("ready", None))
        _, go = self._pipe.recv()
        self._beat()
        return go

    def done(self) -> None:
        for device in self._devices:  # what was added must be there before another process adds to it
            torch.cuda.synchronize(device)
        self._pipe.send(("added", None))


def _work(pipe: Connection, pulse: Tensor, make_trainer: MakeTrainer, device_name: str, threads: int) -> None:
    """A worker's life: load the model, then train and score what it is told to, until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the main process decides
    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    watched_by(pulse)
    try:
        with at_work():
            _serve(pipe, make_trainer, torch.device(device_name))
    except Exception as error:
        if not is_lost_context(error):
            raise
        pipe.send(("dies", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"))
        os._exit(1)  # cleaning up would need the context


def _serve(pipe: Connection, make_trainer: MakeTrainer, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    trainer, weights, server, server_layout, slots, sums, out = None, None, None, None, [], (None, None), None
    while True:
        try:
            kind, *rest = pipe.recv()
        except (EOFError, OSError):
            return
        beat()
        if kind == "stop":
            # Views into shared memory go before the process does, or CUDA reports leaked handles.
            del trainer, weights, server, slots, sums, out
            return
        try:
            if kind == "share":
                layout, server_layout, weights, server, slots, sums, engine = rest
                trainer = make_trainer(device, engine)
                trainer.beat = beat
                assert trainer.layout.sums == layout, "the worker's parameters are not those the run was started with"
                answer: Any = None
            elif kind == "train":
                pack, place = rest
                out, turn = None, None
                if isinstance(place, int):
                    out = slots[place].zero_()
                elif place in ("sum", "spare"):
                    out = sums[place == "spare"]
                    turn = _Turn(pipe, {device, out.device}, beat)
                elif place == "nowhere":  # adding to it is no work and takes no memory
                    out = torch.empty_like(sums[0], device="meta")
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
                if is_lost_context(error):
                    raise
                pipe.send(("error", traceback.format_exc()))
                continue
        else:
            continue
        trainer.shrink()  # outside the handler, whose traceback holds the tensors
        pipe.send(("done", None))
