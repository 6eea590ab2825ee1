"""The lanes of one run in a pass: what its algorithm starts them from, changes between steps, and makes of them at the end."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fedsim.channel import Senders
from fedsim.core.params import Chunk, Message, Params
from fedsim.core.pulse import beat
from fedsim.core.types import Report, Share, Task
from fedsim.training.faults import judge, norms
from fedsim.training.received import Received, View
from fedsim.training.trainer import Fit, Trainer


@dataclass
class _Piece:
    """A chunk of neighboring lanes, as an algorithm changes them between steps.

    Attributes:
        chunk: its number.
        own, lanes: where the lanes are among the group's clients, and in the pass.
        grads, params, scratch: by name, `[K, ...]`.
    """

    chunk: int
    own: slice
    lanes: slice
    grads: Params
    params: Params
    scratch: Params


class LaneGroup:
    """The lanes of one run in a pass.

    Args:
        share: the run's part of the pass.
        trainer: whose lanes they are.

    Attributes:
        lanes, tasks: its lanes, ascending, and the task of each.
        report: what the run's part comes to.
    """

    def __init__(self, share: Share, trainer: Trainer) -> None:
        self.worker, self.trainer, self.device = share.worker, trainer, trainer.net.device
        self.pack, self.weights, self.server, self.out, self.turn = (
            *(share.pack, share.weights, share.server),
            *(share.out, share.turn),
        )
        mode = share.pack.mode
        self.algorithm, self.store = self.worker.algorithms[mode], self.worker.stores[mode]
        self.reducer, self.chunks, self.record = self.worker.setups[mode]
        self.report = Report(share.pack.index)
        self.lanes: list[int] = []
        self.tasks: list[Task] = []
        self.scratch: list[Params] = []  # by chunk
        self._pieces: tuple[int, list[_Piece]] = (0, [])  # of so many active lanes
        self._received: Received | None = None

    def __len__(self) -> int:
        return len(self.lanes)

    @functools.cached_property
    def server_flat(self) -> Tensor:
        """The server's state end to end."""
        return torch.cat([t.reshape(-1) for t in self.server.values()])

    def received(self, chunk: int) -> Received:
        """What its clients received; kept for the round where there is but one chunk."""
        found = self._received or Received(self, self.chunks[chunk])
        if len(self.chunks) == 1:
            self._received = found
        return found

    def place(self, clients: Sequence[int]) -> slice | list[int]:
        """The lanes of these clients, by their places in `tasks`; a slice where they are the first ones: nothing is copied then."""
        lanes = [self.lanes[i] for i in clients]
        return slice(0, len(lanes)) if lanes == list(range(len(lanes))) else lanes

    # --------------------------------------------------------------------------------------- start and steps

    def start(self) -> None:
        """Fill the lanes with what the clients start from."""
        k = len(self)
        none = torch.zeros(k, dtype=self.trainer.layout.sums.dtype, device=self.device)
        own = self.place(range(k))
        for i, chunk in enumerate(self.chunks):
            beat()
            view = View(self.received(i), slice(None), [0] * k, none)
            start = self.algorithm.start(view)
            for name, lanes in chunk.views(self.trainer.flat[:, chunk.span]).items():
                lanes[own] = start[name].to(lanes.dtype)
            self.scratch.append(self.algorithm.scratch(view))

    def adjust(self, active: int, step: int, lr_sums: Tensor) -> None:
        """The algorithm's `adjust`, chunk by chunk."""
        for p in self._active(active):
            self.algorithm.adjust(p.grads, p.params, p.scratch, self._view(p, step, lr_sums))

    def after_step(self, active: int, step: int, lr_sums: Tensor, rates: Tensor) -> None:
        """The algorithm's `after_step`, chunk by chunk."""
        for p in self._active(active):
            self.algorithm.after_step(p.params, p.scratch, self._view(p, step, lr_sums), rates[p.lanes])

    def _view(self, piece: _Piece, steps: int, lr_sums: Tensor) -> View:
        """What the algorithm may look at, of a piece whose clients have done so many steps."""
        lr_sum = lr_sums[piece.lanes]
        return View(self.received(piece.chunk), piece.own, [steps] * len(lr_sum), lr_sum)

    def _active(self, active: int) -> list[_Piece]:
        """The pieces of its lanes among the first `active` ones."""
        if self._pieces[0] != active:
            self._pieces = active, list(self._cut(active))
        return self._pieces[1]

    def _cut(self, active: int) -> Iterator[_Piece]:
        at = 0
        # Neighbors together, so that all tensors are views.
        for _, run in groupby(enumerate(j for j in self.lanes if j < active), lambda place: place[1] - place[0]):
            lanes = [j for _, j in run]
            own, here = slice(at, at + len(lanes)), slice(lanes[0], lanes[-1] + 1)
            at += len(lanes)
            for i, chunk in enumerate(self.chunks):
                grads, params = (chunk.views(x[here, chunk.span]) for x in (self.trainer.grad, self.trainer.flat))
                yield _Piece(i, own, here, grads, params, {n: t[own] for n, t in self.scratch[i].items()})

    # ------------------------------------------------------------------------------------------------- finish

    def finish(self, fit: Fit) -> None:
        """Add the clients' messages to the accumulator, and write what the clients keep.

        A client whose update counts for nothing leaves no trace but a fault: no steps, no state.
        """
        config, merges = self.worker.config, self.algorithm.merges
        most = config.max_norm if merges else None
        seen = self._norms_of_parameters() if most is None else self._norms_of_updates(fit)
        good, found = judge(self.tasks, [fit.losses[j] for j in self.lanes], seen, config.policy, most)
        self.report.faults += found
        tasks, senders = [self.tasks[i] for i in good], Senders([seen[i] for i in good])
        weights, slots = [t.weight for t in tasks], [t.slot for t in tasks]
        if merges and not self.turn.wait():
            return  # the round is given up
        for i, chunk in enumerate(self.chunks if good else ()):
            beat()
            message, state = self._made(i, good, fit)
            if merges:
                message, lost = self.worker.uplink.up(message, senders, self._lost(i, tasks))
                self.reducer.add(self.out, message, weights, slots, chunk)
                self._keep_lost(i, tasks, lost)
            for task, flat in zip(tasks, _flat(state), strict=bool(state)):
                if task.write >= 0:
                    self.store.write_at(task.write, chunk.start, flat)
            message = state = lost = None  # before those of the next chunk are made
        if merges:
            self.report.weight = sum(weights, 0.0)
            self.turn.done()
        for i, task in zip(good, tasks, strict=True):
            lane = self.lanes[i]
            self.report.steps[task.client] = fit.steps[lane]
            if task.write >= 0 and self.record.optimizer:
                for j, kept in enumerate(self.trainer.optimizer.kept(lane)):
                    beat()
                    self.store.write_at(task.write, self.record.state + j * self.trainer.layout.numel, kept)

    def _made(self, chunk: int, clients: list[int], fit: Fit) -> tuple[Message, Params]:
        """(messages, new state) of these clients, by their places in `tasks`."""
        own, here = self.place(clients), self.chunks[chunk]
        chosen = slice(None) if len(clients) == len(self) else clients
        view = View(self.received(chunk), chosen, [fit.steps[self.lanes[i]] for i in clients], fit.lr_sums[own])
        params = here.views(self.trainer.flat[:, here.span][own].to(self.trainer.layout.sums.dtype))
        return self.algorithm.finish(params, {n: t[chosen] for n, t in self.scratch[chunk].items()}, view)

    def _norms_of_parameters(self) -> list[float]:
        """2-norms of the clients' parameters, which need no copy and tell as well as updates whether all are finite."""
        flat, own = self.trainer.flat, self.place(range(len(self)))
        found = torch.stack([torch.linalg.vector_norm(flat[:, c.span][own], dim=1) for c in self.chunks])
        return found.square_().sum(dim=0).sqrt_().tolist()

    def _norms_of_updates(self, fit: Fit) -> list[float]:
        """2-norms of the clients' updates as the server would decode them."""

        def pieces() -> Iterator[Params]:
            for i in range(len(self.chunks)):
                beat()
                message, _ = self._made(i, list(range(len(self))), fit)
                message, _ = self.worker.uplink.up(message, Senders(), self._lost(i, self.tasks))
                yield message.get("update", {})

        return norms(pieces(), len(self))

    def _places(self, chunk: int) -> Iterator[tuple[str, Chunk, int]]:
        """Group, its chunk, and where a record has what this chunk of its messages has lost."""
        place = self.record.state + self.record.optimizer
        for name, group in self.reducer.groups.items():
            here = self.reducer.chunk_of(group, self.chunks[chunk])
            yield name, here, place + here.start
            place += group.layout.numel

    def _lost(self, chunk: int, tasks: Sequence[Task]) -> Message:
        """What the clients' messages have lost so far, where they keep that."""
        out: Message = {}
        for group, here, place in self._places(chunk) if self.record.lost else ():
            size, dtype = here.stop - here.start, self.reducer.params.dtype
            read = [
                self.store.read(t.read, place, place + size) if t.read >= 0 else torch.zeros(size, dtype=dtype)
                for t in tasks
            ]
            out[group] = here.views(torch.stack(read).to(self.device))
        return out

    def _keep_lost(self, chunk: int, tasks: Sequence[Task], lost: Message) -> None:
        """Write what the clients' messages have lost now."""
        for group, _, place in self._places(chunk) if lost else ():
            for task, flat in zip(tasks, _flat(lost[group]), strict=True):
                self.store.write_at(task.write, place, flat)


def _flat(params: Params) -> list[Tensor]:
    """The tensors `[K, ...]` end to end, client by client."""
    return [torch.cat([t.reshape(-1) for t in each]) for each in zip(*params.values(), strict=True)]
