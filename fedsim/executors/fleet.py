"""Several runs in one process, their packs side by side in the same passes over one resident base.

Runs take turns: one of them works until it asks for the device, then the next, until all wait; then what they asked for goes
through the device together, packs of different runs as lanes of one pass. Nothing is concurrent, so what a run does between
two requests needs no locks, and the same runs give the same bits each time. Beside other lanes a client's numbers are
those of training alone up to rounding.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsim.aggregators import Accumulator
from fedsim.core.errors import OutOfMemory, is_out_of_memory
from fedsim.core.heartbeat import at_work
from fedsim.core.params import Layout, Params
from fedsim.core.types import Engine, Measured, Pack, Report, Scores, Scoring, Share
from fedsim.executors.serial import MakeTrainer, Trainer, buffers, client_failed


class Host(Trainer, Protocol):
    """A trainer that takes in the packs of others."""

    takes_guests: bool

    def train_together(self, shares: Sequence[Share]) -> list[Report]:
        """Train packs of several runs side by side."""
        ...

    def score_together(self, asked: Sequence[tuple[Any, Scoring, Tensor]]) -> list[list[Scores]]:
        """Score (trainer, request, global parameters) of several runs side by side."""
        ...


class Stopped(BaseException):
    """Raised in a run that waits when the fleet is stopped."""


class Fleet:
    """Runs that share a device pass by pass.

    Args:
        device: where.
        threads: CPU threads of a pass.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self.host: Host | None = None
        self._most: int | None = None  # lanes of a pass, once there was not memory for more

    def run(self, bodies: Sequence[Callable[[Member], None]]) -> None:
        """Run bodies to their ends; each is called with its member, whose executor it has to use.

        What a body raises stops the others where they wait, and is raised here.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        members = [Member(self, body) for body in bodies]
        active = list(members)
        try:
            while active:
                for member in list(active):
                    member.go()
                    if member.ended:
                        active.remove(member)
                    if member.error is not None:
                        raise member.error
                self._serve(active)
        finally:
            for member in active:
                member.stop()
            self.host = None
            torch.set_num_threads(before)

    # ------------------------------------------------------------------------------------------- the device

    def _serve(self, members: Sequence[Member]) -> None:
        """Answer what the members wait for."""
        asked = {kind: [m for m in members if m.kind == kind] for kind in ("train", "score")}
        if asked["train"]:
            self._train(asked["train"])
        if asked["score"]:
            self._score(asked["score"])
        for member in (m for m in members if m.kind == "call"):
            member.answer(member.asked)

    def _train(self, members: Sequence[Member]) -> None:
        waiting = deque(members)
        while waiting:
            chosen, lanes = [], 0
            for member in list(waiting):
                more = len(member.asked.pack.tasks)
                fits = self.host.takes_guests and (self._most is None or lanes + more <= self._most)
                if fits or not chosen:
                    chosen.append(member)
                    waiting.remove(member)
                    lanes += more
            for member, found in zip(chosen, self._pass([m.asked for m in chosen]), strict=True):
                member.answers = [found]
                member.done()

    def _pass(self, shares: list[Share]) -> list[Report | Exception]:
        """Reports of a pass, or what went wrong; what fails together is done again one by one, to know whose fault it is."""
        for share in shares:
            share.out.zero_()
        try:
            with at_work():
                return list(self.host.train_together(shares))
        except Exception as error:
            short = is_out_of_memory(error)
            if len(shares) == 1:
                where = shares[0].pack.tasks, self.device, traceback.format_exc()
                found: Exception = OutOfMemory(self.device) if short else client_failed(*where)
        if len(shares) > 1:  # outside the handler, whose traceback holds the tensors
            if short:
                self._most = max(1, sum(len(s.pack.tasks) for s in shares) // 2)
                self.host.shrink()
            return [one for share in shares for one in self._pass([share])]
        if short:
            self.host.shrink()
        return [found]

    def _score(self, members: Sequence[Member]) -> None:
        """Score what several runs ask for in common passes; what fails together is done again run by run."""
        flat = [(m, request) for m in members for request in m.asked]
        found: list[list[Scores]] | None = None
        try:
            with at_work():
                found = self.host.score_together([(m.executor.trainer, r, m.executor.weights) for m, r in flat])
        except Exception as error:
            short = is_out_of_memory(error)
            trace = traceback.format_exc()
        if found is None:  # outside the handler, whose traceback holds the tensors
            if short:
                self.host.shrink()
            if len(members) > 1:
                for member in members:
                    self._score([member])
                return
            members[0].answers = [client_failed([], self.device, trace)]
        else:
            for member in members:
                member.answers = [scores for (m, _), scores in zip(flat, found, strict=True) if m is member]
        for member in members:
            member.done()


class Member:
    """A run of a fleet: a thread that works only while it has the turn."""

    def __init__(self, fleet: Fleet, body: Callable[[Member], None]) -> None:
        self.fleet, self.executor, self.ended = fleet, None, False
        self.kind: str | None = None
        self.asked: Any = None
        self.answers: list[Any] = []
        self._stopped, self.error = False, None
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, args=(body,), daemon=True)
        self._thread.start()

    def _live(self, body: Callable[[Member], None]) -> None:
        self._mine.acquire()
        try:
            if not self._stopped:
                body(self)
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.ended, self.kind = True, None
            self._theirs.release()

    def go(self) -> None:
        """Give the run its turn, until it asks for something or ends."""
        self._mine.release()
        self._theirs.acquire()

    def stop(self) -> None:
        """End a run that waits: what it waits for raises in it."""
        self._stopped = True
        while not self.ended:
            self.go()

    def ask(self, kind: str, asked: Any) -> list[Any]:
        """Wait until the fleet has answered; the run's side."""
        self.kind, self.asked = kind, asked
        self._theirs.release()
        self._mine.acquire()
        if self._stopped:
            raise Stopped
        self.asked = None
        return self.answers

    def answer(self, call: Callable[[], Any]) -> None:
        """Do a call for the run, in the thread that has the device."""
        try:
            self.answers = [call()]
        except Exception as error:
            self.answers = [error]
        self.done()

    def done(self) -> None:
        """The run's request is answered."""
        self.kind = None

    def make_executor(self, make_trainer: MakeTrainer, join: Callable[[Any], Any]) -> FleetExecutor:
        """The run's executor.

        Args:
            make_trainer: (device, engine) -> trainer, for the run that comes first.
            join: trainer of the first run -> a trainer of this one, on the same model.
        """
        self.executor = FleetExecutor(self, make_trainer, join)
        return self.executor


class FleetExecutor:
    """What a run of a fleet sees of the device; see `SerialExecutor`."""

    def __init__(self, member: Member, make_trainer: MakeTrainer, join: Callable[[Any], Any]) -> None:
        self._member, self._make, self._join = member, make_trainer, join
        self.device = torch.device(member.fleet.device)
        self.workers = [member.fleet.device]
        self.trainer: Any = None

    def _call(self, call: Callable[[], Any]) -> Any:
        (found,) = self._member.ask("call", call)
        if isinstance(found, Exception):
            raise found
        return found

    def start(self, layout: Layout, server: Layout, engine: Engine, summed: int, many: bool = False) -> None:
        """Make the trainer, or join the one that is there, and the buffers; see `SerialExecutor.start`."""
        fleet = self._member.fleet

        def make() -> Any:
            if fleet.host is None:
                fleet.host = self._make(self.device, engine)
                return fleet.host
            return self._join(fleet.host)

        self.trainer = self._call(make)
        assert self.trainer.layout.sums == layout, "the trainer's parameters are not those the run was started with"
        self.weights, self._server = layout.empty(self.device), server.empty(self.device)
        self.total, self.spare = buffers(layout, summed, many, self.device)
        # A pass that fails together is done again run by run, so a pack's messages stay apart until they are known to count.
        self._server_layout = server
        self._slot = torch.zeros(summed, dtype=layout.dtype, device=self.device)

    def broadcast(self, weights: Tensor, server: Params) -> None:
        """Refill the global parameters (flat `[N]`) and the server's state in place."""
        if weights is not self.weights:
            self.weights.copy_(weights)
        if server:
            self._server_layout.fill(self._server, server)

    def run(self, packs: Sequence[Pack], total: Accumulator | None) -> Iterator[Report]:
        """Train packs beside those of other runs; their messages are added to `total`, pack by pack, where there is one.

        Raises:
            ClientError: where a client's training raised.
            OutOfMemory: where a pack did not fit by itself.
        """
        server = self._server_layout.views(self._server)
        for i, pack in enumerate(
            packs
        ):  # one at a time: those of different runs meet pack by pack, and one sum a run is in memory
            (found,) = self._member.ask("train", Share(self.trainer, pack, self.weights, server, self._slot))
            if isinstance(found, Exception):
                raise found
            if total is not None:
                total.place(i).add_(self._slot)
                total.weight += found.weight
                total.added()
            yield found
        if total is not None:
            total.close()

    def score(self, requests: Sequence[Scoring]) -> list[list[Scores]]:
        """Score each request, in order."""
        if not requests:
            return []
        answers = self._member.ask("score", list(requests))
        for found in answers:
            if isinstance(found, Exception):
                raise found
        return answers

    def measure(self, rows: Sequence[Any]) -> Measured | None:
        """What a pass over these rows takes by itself; None if it does not fit."""
        try:
            return self._call(lambda: self._member.fleet.host.measure(rows, self.weights))
        except Exception as error:
            if not is_out_of_memory(error):
                raise client_failed([], str(self.device), traceback.format_exc()) from error
        self._call(self._member.fleet.host.shrink)
        return None

    def configure(self, engine: Engine) -> None:
        """Train like this from now on, all runs of the fleet."""
        self._call(lambda: self._member.fleet.host.configure(engine))

    def peaks(self) -> list[int]:
        """Highest memory in use so far, in bytes, of the whole fleet."""
        return [self._call(self._member.fleet.host.peak)]

    def close(self) -> None:
        """Leave the fleet; may be called twice."""
        self.trainer = self.weights = self.total = self.spare = None
