"""Packs one after another in this process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedsim.errors import ClientError
from fedsim.params import Layout, Params
from fedsim.types import Pack, Report, Scores, Scoring, Task


class Trainer(Protocol):
    """What an executor is handed: see `fedsim.training`."""

    layout: Layout

    def train(
        self, pack: Pack, weights: Tensor, server: Params, out: Tensor, on_task: Callable[[Task], None]
    ) -> Report:
        """Train a pack and leave its partial sum in `out`."""
        ...

    def score(self, request: Scoring, weights: Tensor) -> Scores:
        """Score the global parameters, or those of a record."""
        ...


MakeTrainer = Callable[[torch.device], Trainer]


def client_failed(task: Task | None, device: str, trace: str) -> ClientError:
    """The error of a client: round and id first, then its own traceback."""
    who = "a scoring pass" if task is None else f"round {task.round}, client {task.name}"
    return ClientError(f"{who} failed on {device}; its traceback:\n{trace}")


class SerialExecutor:
    """Runs everything on one device in this process.

    Args:
        make_trainer: device -> trainer.
        device: where.
        threads: CPU threads while it runs; the process's own number is restored afterwards.
    """

    def __init__(self, make_trainer: MakeTrainer, device: str, threads: int) -> None:
        self.device, self._make, self._threads = torch.device(device), make_trainer, threads
        self.workers = [device]
        self._before: int | None = None
        self._trainer: Trainer | None = None

    def start(self, layout: Layout, server: Layout) -> None:
        """Make the trainer and the buffers: global parameters `weights`, the server's state, and one partial sum."""
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        self._trainer = self._make(self.device)
        assert self._trainer.layout == layout, "the trainer's parameters are not those the run was started with"
        self.weights, self._server = layout.empty(self.device), server.empty(self.device)
        self._server_layout = server
        self._slot = layout.empty(self.device)

    def broadcast(self, weights: Tensor, server: Params) -> None:
        """Refill the global parameters (flat `[N]`) and the server's state in place."""
        self.weights.copy_(weights)
        self._server_layout.fill(self._server, server)

    def run(self, packs: Sequence[Pack]) -> Iterator[tuple[Report, Tensor]]:
        """Train packs in order; yields (report, partial sum `[N]`), which the next one overwrites.

        Raises:
            ClientError: where a client's training raised.
        """
        server = self._server_layout.views(self._server)
        current: list[Task] = []
        for pack in packs:
            try:
                report = self._trainer.train(pack, self.weights, server, self._slot, current.append)
            except Exception as error:
                raise client_failed(
                    current[-1] if current else None, str(self.device), traceback.format_exc()
                ) from error
            yield report, self._slot

    def score(self, requests: Sequence[Scoring]) -> list[Scores]:
        """Score each request, in order."""
        try:
            return [self._trainer.score(request, self.weights) for request in requests]
        except Exception as error:
            raise client_failed(None, str(self.device), traceback.format_exc()) from error

    def close(self) -> None:
        """Free the model and restore the number of threads; may be called twice."""
        self._trainer = None
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None
