"""The lanes of a run in a pass: what its algorithm starts them from, changes between steps, and makes of them at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms import ClientOptimizer
from fedsim.algorithms.base import Factors
from fedsim.channel import Senders
from fedsim.core.heartbeat import beat
from fedsim.core.params import Chunk, Message, Params
from fedsim.core.types import ROOT, Task
from fedsim.training.faults import judge, norms
from fedsim.training.packs import RunPack, factors
from fedsim.training.private import PrivateLane
from fedsim.training.ranks import largest_rank, slots
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
    """The lanes of one part of a run's clients; the hooks around their steps.

    Args:
        run: the run's pack.
        part: which of the algorithm's parts.
        trainer: whose lanes they are.

    Attributes:
        lanes, tasks: its lanes, ascending, and the task of each.
        beside: what the clients' models are without, by adapted layer.
        private: what DP-SGD does in each; None where gradients are not private.
        facts: what the algorithm needs, by name, `[K]`.
        ranks, slots: rank of each client, `[K]`, and which elements it has, bool `[K, N]`; None where the algorithm gives none.
    """

    def __init__(self, run: RunPack, part: str, trainer: Trainer) -> None:
        self.run, self.part, self.trainer, self.device = run, part, trainer, trainer.net.device
        self.number = run.algorithm.parts.index(part)
        self.chunks, self.batches = run.setup.chunks, run.algorithm.batches
        self.moves, self.freezes = (run.algorithm.overrides(hook) for hook in ("at", "trains"))
        self._trains, optim = run.algorithm.trains, run.worker.config.optim
        self.optim = ClientOptimizer(optim.optimizer, optim.lr, optim.momentum)
        self.lanes: list[int] = []
        self.tasks: list[Task] = []
        self.private: list[PrivateLane | None] = []
        self.facts: dict[str, Tensor] = {}
        self.ranks: Tensor | None = None
        self.slots: Tensor | None = None
        self.scratch: list[Params] = []  # by chunk
        self.beside: Factors = {}
        self._norms: list[float] = []  # of whole messages where these are clipped, of updates, or of parameters
        self._pieces: tuple[int, list[_Piece]] = (0, [])  # of so many active lanes
        self._received: Received | None = None

    def __len__(self) -> int:
        return len(self.lanes)

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

    def take(self, lanes: list[int], tasks: list[Task], private: list[PrivateLane | None]) -> None:
        """These are its lanes, their tasks, and what DP-SGD does in them."""
        self.lanes, self.tasks, self.private = lanes, tasks, private
        if self.run.setup.ranked:
            layout = self.trainer.layout
            most = largest_rank(layout)
            given = [self.run.worker.config.rank_of(self.run.algorithm, t.client) for t in tasks]
            ranks = [most if rank is None else rank for rank in given]
            self.slots = torch.stack([slots(layout, rank) for rank in ranks]).to(self.device)
            self.ranks = torch.tensor(ranks, device=self.device)

    # --------------------------------------------------------------------------------------- start and steps

    def fill(self, chunk: int, params: Params) -> None:
        """Put these parameters, with or without a lane axis, into the lanes."""
        own, here = self.place(range(len(self))), self.chunks[chunk]
        for name, lanes in here.views(self.trainer.flat[:, here.span]).items():
            lanes[own] = params[name].to(lanes.dtype)
        if self.slots is not None:
            self.trainer.flat[:, here.span][own] *= self.slots[:, here.span]

    def receive(self) -> None:
        """Fill the lanes with what the clients received."""
        for i in range(len(self.chunks)):
            beat()
            self.fill(i, self.received(i).params)

    def start(self) -> None:
        """Fill the lanes with what the clients start from."""
        k, algorithm = len(self), self.run.algorithm
        none = torch.zeros(k, dtype=self.trainer.layout.sums.dtype, device=self.device)
        for i in range(len(self.chunks)):
            beat()
            view = View(self.received(i), slice(None), [0] * k, none)
            self.fill(i, algorithm.start(view))
            self.scratch.append(algorithm.scratch(view))
            self.beside |= algorithm.beside(view)

    def at(self, point: Tensor, active: int, step: int, lr_sums: Tensor, batch: int) -> None:
        """Put where the algorithm takes the gradient into its lanes of `point`, `[K, N]`, which hold the parameters."""
        for p in self._active(active) if self.moves else ():
            found = self.run.algorithm.at(p.params, p.scratch, self._view(p, step, lr_sums, batch))
            here = self.chunks[p.chunk]
            for name, view in here.views(point[p.lanes, here.span]).items():
                if found[name] is not p.params[name]:
                    view.copy_(found[name])

    def adjust(self, active: int, step: int, lr_sums: Tensor, batch: int) -> None:
        """Noise on private gradients, then the algorithm's `adjust`, chunk by chunk."""
        self._add_noise(active, step)
        for p in self._active(active) if self.run.algorithm.overrides("adjust") else ():
            view = self._view(p, step, lr_sums, batch)
            self.run.algorithm.adjust(self._training(p.grads, step), self._training(p.params, step), p.scratch, view)
            self._cut_to_rank(p, p.grads)

    def _add_noise(self, active: int, step: int) -> None:
        """Once for each batch, however many passes it took; nothing on what a client's rank leaves out."""
        for i, (j, private) in enumerate(zip(self.lanes, self.private, strict=True)):
            if j < active and private is not None and private.std > 0:
                noise = private.noise(step, self.trainer.grad[j])
                self.trainer.grad[j] += noise if self.slots is None else noise * self.slots[i]

    def after_step(self, active: int, step: int, lr_sums: Tensor, rates: Tensor) -> None:
        """The algorithm's `after_step`, chunk by chunk."""
        for p in self._active(active) if self.run.algorithm.overrides("after_step") else ():
            view = self._view(p, step, lr_sums, 0)
            self.run.algorithm.after_step(self._training(p.params, step - 1), p.scratch, view, rates[p.lanes])
            self._cut_to_rank(p, p.params)

    def freeze(self, trains: np.ndarray, step: int) -> None:
        """Mark what trains in its lanes, bool `[active, P]`."""
        if self.freezes:
            names, round = self.trainer.layout.shapes, self.tasks[0].round
            trains[[j for j in self.lanes if j < len(trains)]] = [self._trains(n, round, step) for n in names]

    def _cut_to_rank(self, piece: _Piece, params: Params) -> None:
        """Make what lies beyond the clients' ranks zero."""
        if self.slots is not None:
            chunk = self.chunks[piece.chunk]
            for name, has in chunk.views(self.slots[piece.own, chunk.span]).items():
                params[name].mul_(has)

    def _training(self, params: Params, step: int) -> Params:
        """Those that train at a step."""
        round = self.tasks[0].round
        return {n: t for n, t in params.items() if self._trains(n, round, step)} if self.freezes else params

    def _view(self, piece: _Piece, steps: int, lr_sums: Tensor, batch: int) -> View:
        """What the algorithm may look at, of a piece whose clients have done so many steps."""
        lr_sum = lr_sums[piece.lanes]
        return View(self.received(piece.chunk), piece.own, [steps] * len(lr_sum), lr_sum, batch)

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

    def judge(self, fit: Fit) -> None:
        """Note what went wrong with its clients."""
        config = self.run.worker.config
        most = config.max_norm if self.run.algorithm.merges else None
        bounded = most is not None or self.run.pack.clip is not None
        self._norms = self._norms_of_messages(fit) if bounded else self._norms_of_parameters()
        # A private client is judged by what is private, its noisy parameters, and not by its loss.
        losses = [fit.losses[j] if p is None else 0.0 for j, p in zip(self.lanes, self.private, strict=True)]
        _, found = judge(self.tasks, losses, self._norms, config.policy, most)
        self.run.report.faults += [f for f in found if f.client not in self.run.failed]

    def finish(self, fit: Fit) -> None:
        """Add the clients' messages to the accumulator, and write what the clients keep.

        A client whose update counts for nothing leaves no trace but a fault: no steps, no state.
        """
        run, record = self.run, self.run.setup.record
        good = [i for i, t in enumerate(self.tasks) if t.client not in run.failed]
        tasks, clip = [self.tasks[i] for i in good], run.pack.clip
        norms = [self._norms[i] for i in good]
        senders = Senders(norms, clip, *self._senders(good, fit))
        if clip is not None and self.number == 0:
            run.report.within += sum(norm <= clip for norm in norms)
        if self.number == 0 and not run.may_add():
            return
        for i, chunk in enumerate(self.chunks if good else ()):
            beat()
            message, state = self._made(i, good, fit)
            if message and run.algorithm.merges:
                if not run.may_add():
                    return
                coded = {g: sent for g, sent in message.items() if g not in run.algorithm.exact}
                coded, lost = run.worker.uplink.up(coded, senders, self._lost(i, tasks, coded))
                run.add(message | coded, tasks, chunk)
                self._keep_lost(i, tasks, lost)
            self._write(tasks, record.state_at(self.number) + chunk.start, state)
            message = coded = state = lost = None  # before those of the next chunk are made
        if self.number == 0:
            self._keep_factors(good, fit)
            self._keep_personal(good)
            run.done(tasks, [fit.steps[self.lanes[i]] for i in good])
        for i, task in zip(good, tasks, strict=True):
            if task.write >= 0 and record.optimizer:
                self._keep_optimizer(self.lanes[i], task.write)

    def _keep_factors(self, clients: list[int], fit: Fit) -> None:
        """Keep LoRA's factors beside the messages, where the aggregation error is measured."""
        reducer, algorithm = self.run.setup.reducer, self.run.algorithm
        clients = [i for i in clients if self.tasks[i].client != ROOT]
        if reducer.metered is None or not clients:
            return
        layout = self.trainer.layout.sums
        (whole,) = layout.chunks()
        params = whole.views(self.trainer.flat[self.place(clients)].to(layout.dtype))
        if algorithm.overrides("carried"):
            own = self.place(clients)
            view = View(self.received(0), clients, [fit.steps[self.lanes[i]] for i in clients], fit.lr_sums[own])
            params = algorithm.carried(params, view)
        named = {}
        for layer, (a, b) in factors(algorithm, layout).items():
            named |= {f"A of {layer}": params[a], f"B of {layer}": params[b]}
        tasks = [self.tasks[i] for i in clients]
        self.run.add_factors(named, tasks)

    def _keep_optimizer(self, lane: int, into: int) -> None:
        record, optimizer = self.run.setup.record, self.trainer.optimizer
        kept, at = optimizer.kept(lane), record.optimizer_at(self.number)
        if record.counts:
            kept = [*kept, torch.from_numpy(optimizer.steps[lane].astype(np.float64))]
        for part in kept:
            beat()
            self.run.setup.store.write_at(into, at, part)
            at += part.numel()

    def _keep_personal(self, clients: Sequence[int]) -> None:
        for chunk in self.chunks if clients else ():
            views = chunk.views(self.trainer.flat[:, chunk.span])
            for name, place in self.run.setup.record.personal_in(chunk):
                for i in clients:
                    if self.tasks[i].write >= 0:
                        self.run.setup.store.write_at(
                            self.tasks[i].write, place, views[name][self.lanes[i]].reshape(-1)
                        )

    def _write(self, tasks: Sequence[Task], place: int, params: Params) -> None:
        """Write `[K, ...]` tensors end to end into the clients' records."""
        for j, task in enumerate(tasks if params else ()):
            if task.write >= 0:
                flat = torch.cat([t[j].reshape(-1) for t in params.values()])
                self.run.setup.store.write_at(task.write, place, flat)

    def _made(self, chunk: int, clients: list[int], fit: Fit) -> tuple[Message, Params]:
        """(messages of what travels, new state) of these clients, by their places in `tasks`."""
        own, here, algorithm = self.place(clients), self.chunks[chunk], self.run.algorithm
        chosen = slice(None) if len(clients) == len(self) else clients
        view = View(self.received(chunk), chosen, [fit.steps[self.lanes[i]] for i in clients], fit.lr_sums[own])
        params = here.views(self.trainer.flat[:, here.span][own].to(self.trainer.layout.sums.dtype))
        scratch = {n: t[chosen] for n, t in self.scratch[chunk].items()}
        message, state = algorithm.finish(params, scratch, view)
        message = {g: {n: t for n, t in sent.items() if self.run.travels(n)} for g, sent in message.items()}
        if (attack := self.run.worker.config.attack) is not None and message:
            message = attack.apply(message, [self.tasks[i] for i in clients])
        return message, state

    def _senders(self, clients: Sequence[int], fit: Fit) -> tuple[list[int], list[tuple[str | int, ...]]]:
        """Optimizer steps and random streams of these clients, by their places in `tasks`."""
        return [fit.steps[self.lanes[i]] for i in clients], [self.tasks[i].stream for i in clients]

    def _norms_of_parameters(self) -> list[float]:
        """2-norms of the clients' parameters, which need no copy and tell as well as updates whether all are finite."""
        flat, own = self.trainer.flat, self.place(range(len(self)))
        found = torch.stack([torch.linalg.vector_norm(flat[:, c.span][own], dim=1) for c in self.chunks])
        return found.square_().sum(dim=0).sqrt_().tolist()

    def _norms_of_messages(self, fit: Fit) -> list[float]:
        """2-norms of the clients' updates as the server would decode them; of all that they send, where that is clipped."""
        whole, every = self.run.pack.clip is not None, list(range(len(self)))
        senders = Senders(None, None, *self._senders(every, fit))

        def pieces() -> Iterator[Params]:
            for i in range(len(self.chunks)):
                beat()
                message, _ = self._made(i, every, fit)
                sent, _ = self.run.worker.uplink.up(message, senders, self._lost(i, self.tasks, message))
                yield from sent.values() if whole else [sent.get("update", {})]

        return norms(pieces(), len(self))

    def _places(self, chunk: int, groups: Message) -> Iterator[tuple[str, Chunk, int]]:
        """Group, its chunk, and where a record has what this chunk of its messages has lost."""
        place = self.run.setup.record.lost_at
        for name, group in self.run.setup.reducer.groups.items():
            if name in self.run.algorithm.exact:
                continue
            here = self.run.setup.reducer.chunk_of(group, self.chunks[chunk])
            if name in groups:
                yield name, here, place + here.start
            place += group.layout.numel

    def _lost(self, chunk: int, tasks: Sequence[Task], groups: Message) -> Message:
        """What these groups of the clients' messages have lost so far, where clients keep that."""
        out: Message = {}
        setup = self.run.setup
        for group, here, place in self._places(chunk, groups) if setup.record.lost else ():
            size, dtype = here.stop - here.start, setup.reducer.params.dtype
            read = [
                setup.store.read(t.read, place, place + size) if t.read >= 0 else torch.zeros(size, dtype=dtype)
                for t in tasks
            ]
            out[group] = here.views(torch.stack(read).to(self.device))
        return out

    def _keep_lost(self, chunk: int, tasks: Sequence[Task], lost: Message) -> None:
        """Write what the clients' messages have lost now."""
        for group, _, place in self._places(chunk, lost):
            self._write(tasks, place, lost[group])
