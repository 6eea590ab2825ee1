"""Several runs in one process, whose packs share the passes over one resident base.

A run is a generator that yields while it waits for a pass. The fleet steps one run after another until all of them wait; then
their packs go through the device together, as lanes of one pass. Nothing is concurrent, so the same runs give the same bits
each time. A client's numbers beside other lanes are those of training alone up to rounding.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsim.aggregators import Accumulator
from fedsim.core.errors import OutOfMemory, is_out_of_memory
from fedsim.core.heartbeat import at_work
from fedsim.core.params import Layout, Params
from fedsim.core.types import Engine, Measured, Memory, Pack, Report, Scores, Scoring, Share
from fedsim.executors.serial import MakeWorker, Trainer, buffers, client_failed


class Host(Trainer, Protocol):
    """A trainer that takes in the packs of other runs."""

    takes_guests: bool

    def train_together(self, shares: Sequence[Share]) -> list[Report]:
        """Train packs of several runs side by side."""
        ...

    def score_together(self, asked: Sequence[tuple[Any, Scoring, Tensor]]) -> list[list[Scores]]:
        """Evaluate (trainer, request, global parameters) of several runs side by side."""
        ...


@dataclass
class _Request:
    """What a run waits for: a pack's share of a pass, or evaluations; `answer` is there once it was served."""

    run: FleetExecutor
    asked: Share | Sequence[Scoring]
    answer: Any = None
    served: bool = field(default=False)

    def serve(self, answer: Any) -> None:
        self.answer, self.served = answer, True

    def wait(self) -> Generator[None, None, Any]:
        """Yield until it is served; raises what went wrong."""
        while not self.served:
            yield None
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Fleet:
    """Runs that share a device pass by pass.

    Args:
        device: of all runs.
        threads: CPU threads of a pass.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self.host: Host | None = None
        self.waiting: list[_Request] = []
        self._most: int | None = None  # lanes of a pass, once there was not memory for more

    def executor(self, make_worker: MakeWorker, join: Callable[[Any], Any]) -> FleetExecutor:
        """An executor for one of the runs.

        Args:
            make_worker: (device, engine) -> trainer, for the run that comes first.
            join: trainer of the first run -> a trainer of this one, on the same model.
        """
        return FleetExecutor(self, make_worker, join)

    def run(self, runs: Sequence[Iterator[None]]) -> None:
        """Step runs to their ends. What one raises ends the others where they wait, and is raised here."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        active = list(runs)
        try:
            while active:
                ended = [run for run in active if not _step(run)]
                active = [run for run in active if run not in ended]
                self._serve()
        finally:
            for run in active:
                run.close()
            self.host, self.waiting = None, []
            torch.set_num_threads(before)

    # ------------------------------------------------------------------------------------------- the device

    def _serve(self) -> None:
        """Do what the runs wait for, training first."""
        asked, self.waiting = self.waiting, []
        training = deque(r for r in asked if isinstance(r.asked, Share))
        while training:
            chosen, lanes = [], 0
            for request in list(training):
                more = len(request.asked.pack.tasks)
                fits = all(r.run.trainer.takes_guests for r in [*chosen, request]) and (
                    self._most is None or lanes + more <= self._most
                )
                if fits or not chosen:
                    chosen.append(request)
                    training.remove(request)
                    lanes += more
            for request, found in zip(chosen, self._pass([r.asked for r in chosen]), strict=True):
                request.serve(found)
        if scoring := [r for r in asked if not isinstance(r.asked, Share)]:
            self._score(scoring)

    def _pass(self, shares: list[Share]) -> list[Report | Exception]:
        """Reports of a pass, or what went wrong; packs that fail together are run one by one, to know which one fails."""
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
        # Outside the handler, whose traceback keeps the tensors alive.
        if short:
            self._most = max(1, sum(len(s.pack.tasks) for s in shares) // 2) if len(shares) > 1 else self._most
            self.host.shrink()
        return [one for share in shares for one in self._pass([share])] if len(shares) > 1 else [found]

    def _score(self, requests: Sequence[_Request]) -> None:
        """Evaluate what several runs ask for in common passes; what fails together is done again run by run."""
        flat = [(r, scoring) for r in requests for scoring in r.asked]
        try:
            with at_work():
                if all(r.run.trainer.takes_guests for r in requests):
                    found = self.host.score_together([(r.run.trainer, s, r.run.params) for r, s in flat])
                else:
                    found = [r.run.trainer.score(s, r.run.params, r.run.server) for r, s in flat]
        except Exception as error:
            short, trace = is_out_of_memory(error), traceback.format_exc()
        else:
            for request in requests:
                request.serve([scores for (r, _), scores in zip(flat, found, strict=True) if r is request])
            return
        if short:  # outside the handler, whose traceback keeps the tensors alive
            self.host.shrink()
        for request in requests:
            if len(requests) > 1:
                self._score([request])
            else:
                request.serve(client_failed([], self.device, trace))


def _step(run: Iterator[None]) -> bool:
    """Let a run work until it waits; False if it has ended."""
    try:
        next(run)
    except StopIteration:
        return False
    return True


class FleetExecutor:
    """What one run of a fleet sees of the device; see `SerialExecutor`."""

    def __init__(self, fleet: Fleet, make_worker: MakeWorker, join: Callable[[Any], Any]) -> None:
        self._fleet, self._make, self._join = fleet, make_worker, join
        self.device = torch.device(fleet.device)
        self.trainer: Any = None
        self.params: Tensor | None = None

    def start(self, layout: Layout, server: Layout, engine: Engine, summed: int, many: bool = False) -> Memory:
        """Make the trainer, or join the one that is there, and allocate the run's memory; see `SerialExecutor.start`."""
        fleet = self._fleet
        if fleet.host is None:
            fleet.host = self.trainer = self._make(self.device, engine)
        else:
            self.trainer = self._join(fleet.host)
        assert self.trainer.layout.sums == layout, "the trainer's parameters are not those the run was started with"
        self.params, self._server = layout.empty(self.device), server.empty(self.device)
        self._server_layout = server
        # A pass that fails together is run again one by one, so a pack's messages stay apart until they count.
        self._slot = torch.zeros(summed, dtype=layout.dtype, device=self.device)
        return Memory(self.params, *buffers(layout, summed, many, self.device))

    @property
    def server(self) -> Params:
        """The server's state as it was sent last."""
        return self._server_layout.views(self._server)

    def broadcast(self, params: Tensor, server: Params) -> None:
        """Send the global parameters (flat `[N]`) and the server's state."""
        if params is not self.params:
            self.params.copy_(params)
        if server:
            self._server_layout.fill(self._server, server)
        else:
            self._server.zero_()

    def train(self, packs: Sequence[Pack], acc: Accumulator | None) -> Iterator[Report | None]:
        """Train packs beside those of other runs; None while they wait. Their messages are added to `acc`, if there is one.

        Raises:
            ClientError: if a client's training raised.
            OutOfMemory: if a pack did not fit by itself.
        """
        server = self._server_layout.views(self._server)
        for i, pack in enumerate(packs):  # one at a time: packs of the runs meet, and a run needs one buffer
            request = _Request(self, Share(self.trainer, pack, self.params, server, self._slot))
            self._fleet.waiting.append(request)
            report = yield from request.wait()
            if acc is not None:
                acc.place(i).add_(self._slot)
                acc.weight += report.weight
                acc.added()
            yield report
        if acc is not None:
            acc.close()

    def score(self, requests: Sequence[Scoring]) -> Iterator[list[Scores] | None]:
        """Evaluate each request, in order; None while they wait."""
        if requests:
            request = _Request(self, list(requests))
            self._fleet.waiting.append(request)
            yield from (yield from request.wait())

    def measure(self, rows: Sequence[Any]) -> Measured | None:
        """What a pass over these examples takes by itself; None if it does not fit."""
        try:
            return self._fleet.host.measure(rows, self.params)
        except Exception as error:
            if not is_out_of_memory(error):
                raise client_failed([], str(self.device), traceback.format_exc()) from error
        self._fleet.host.shrink()
        return None

    def configure(self, engine: Engine) -> None:
        """Train like this from now on, all runs of the fleet."""
        self._fleet.host.configure(engine)

    def peaks(self) -> list[int]:
        """Highest memory in use so far, in bytes, of the whole fleet."""
        return [self._fleet.host.peak()]

    def close(self) -> None:
        """Leave the fleet; may be called twice."""
        self.trainer = self.params = None
