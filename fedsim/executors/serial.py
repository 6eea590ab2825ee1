"""Packs one after another in this process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsim.aggregators import Accumulator
from fedsim.core.errors import ClientError, OutOfMemory, is_out_of_memory
from fedsim.core.heartbeat import at_work
from fedsim.core.params import Layout, Params
from fedsim.core.types import Engine, Measured, Memory, Pack, Report, Scores, Scoring, Task, Turn


class Trainer(Protocol):
    """What an executor is handed, see `fedsim.training`. It beats (`core.heartbeat`) at each pass, batch, and piece it copies."""

    layout: Layout

    def train(self, pack: Pack, weights: Tensor, server: Params, out: Tensor, turn: Turn | None = None) -> Report:
        """Train a pack and add its clients' messages to `out`, in its turn."""
        ...

    def score(self, request: Scoring, weights: Tensor, server: Params | None = None) -> list[Scores]:
        """Score the global parameters, or those of records."""
        ...

    def measure(self, rows: Sequence[Any], weights: Tensor) -> Measured:
        """What a pass over these rows takes."""
        ...

    def configure(self, engine: Engine) -> None:
        """Train like this from now on."""
        ...

    def shrink(self) -> None:
        """Free what lanes hold."""
        ...

    def peak(self) -> int:
        """Highest memory in use so far, in bytes."""
        ...


MakeWorker = Callable[[torch.device, Engine], Trainer]


def clients(tasks: Sequence[Task]) -> str:
    """Whose tasks they are."""
    names = [t.name for t in tasks]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"client{'s' if len(names) > 1 else ''} {', '.join(names[:8])}{more}"


def client_failed(tasks: Sequence[Task], device: str, trace: str, what: str = "evaluation") -> ClientError:
    """The error of a pack: round and ids first, then its own traceback; without tasks, of what else was done."""
    who = f"round {tasks[0].round}, {clients(tasks)}" if tasks else what
    return ClientError(f"{who} failed on {device}; its traceback:\n{trace}")


def buffers(layout: Layout, summed: int, many: bool, device: torch.device | str) -> tuple[Tensor | None, Tensor | None]:
    """An accumulator's two buffers in the type of `layout`, or None for what is not needed; see `SerialExecutor.start`."""
    made = [torch.zeros(summed, dtype=layout.dtype, device=device) for _ in range(1 + many)] if summed else []
    total, spare, *_ = [*made, None, None]
    return total, spare


class SerialExecutor:
    """Runs everything on one device in this process.

    Args:
        make_worker: (device, engine) -> trainer.
        device: where.
        threads: CPU threads while it runs; the process's own number is restored afterwards.
        home: where the global parameters and the running sum lie; None = on the device.
    """

    def __init__(self, make_worker: MakeWorker, device: str, threads: int, home: str | None = None) -> None:
        self.home = torch.device(home or device)
        self.device, self._make, self._threads = torch.device(device), make_worker, threads
        self.workers = [device]
        self._before: int | None = None
        self._trainer: Trainer | None = None
        self._params: Tensor | None = None

    def start(self, layout: Layout, server: Layout, engine: Engine, summed: int, many: bool = False) -> Memory:
        """Make the trainer and allocate the run's memory: global parameters, and the buffers of an accumulator.

        Args:
            layout: of the global parameters.
            server: of the server's state that clients receive.
            engine: how to train.
            summed: elements of an accumulator; 0 where no mode merges.
            many: whether a round can have more packs than are summed at once.
        """
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        self._trainer = self._make(self.device, engine)
        assert self._trainer.layout.sums == layout, "the trainer's parameters are not those the run was started with"
        self._params, self._server = layout.empty(self.home), server.empty(self.device)
        self._server_layout = server
        return Memory(self._params, *buffers(layout, summed, many, self.home))

    def broadcast(self, params: Tensor, server: Params) -> None:
        """Send the global parameters (flat `[N]`) and the server's state; nothing is copied that lies where it is read."""
        if params is not self._params:
            self._params.copy_(params)
        if server:
            self._server_layout.fill(self._server, server)
        else:
            self._server.zero_()

    def train(self, packs: Sequence[Pack], acc: Accumulator | None) -> Iterator[Report]:
        """Train packs in order; their messages are added to `acc`, pack by pack, where there is one.

        Raises:
            ClientError: where a client's training raised.
            OutOfMemory: where a pack did not fit.
        """
        server = self._server_layout.views(self._server)
        for i, pack in enumerate(packs):
            out = None if acc is None else acc.place(i)
            try:
                with at_work():
                    report = self._trainer.train(pack, self._params, server, out)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise client_failed(pack.tasks, str(self.device), traceback.format_exc()) from error
                report = None
            if report is None:  # outside the handler, whose traceback holds the tensors
                self._trainer.shrink()
                raise OutOfMemory(str(self.device))
            if acc is not None:
                acc.weight += report.weight
                acc.added()
            yield report
        if acc is not None:
            acc.close()

    def score(self, requests: Sequence[Scoring]) -> Iterator[list[Scores]]:
        """Evaluate each request, in order."""
        for request in requests:
            try:
                with at_work():
                    found = self._trainer.score(request, self._params, self._server_layout.views(self._server))
            except Exception as error:
                raise client_failed([], str(self.device), traceback.format_exc()) from error
            yield found

    def measure(self, rows: Sequence[Any]) -> Measured | None:
        """What a pass over these rows (one array a lane) takes at the global parameters; None if it does not fit."""
        try:
            return self._trainer.measure(rows, self._params)
        except Exception as error:
            if not is_out_of_memory(error):
                raise client_failed([], str(self.device), traceback.format_exc()) from error
        self._trainer.shrink()
        return None

    def configure(self, engine: Engine) -> None:
        """Train like this from now on."""
        self._trainer.configure(engine)

    def peaks(self) -> list[int]:
        """Highest memory in use so far, in bytes, by worker."""
        return [self._trainer.peak()]

    def close(self) -> None:
        """Free the model and restore the number of threads; may be called twice."""
        self._trainer = self._params = None
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None
