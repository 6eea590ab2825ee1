"""The training loop: the clients of a pack side by side, each in its lane, on one device.

All trained tensors of all lanes are views of one `[K, N]` tensor, so starting a pack is one copy, an optimiser step a few
calls, and the sum of the updates one product, whatever the method. With `Net` K is 1 and the model is PEFT's own
in padded batches; with `StackedNet` K lanes share each forward and backward pass.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators.reducer import Reducer
from fedsim.algorithms import Algorithm, ClientView, per_lane
from fedsim.channel.codecs import codec
from fedsim.core.errors import is_out_of_memory
from fedsim.core.heartbeat import beat
from fedsim.core.params import ALIGN, Chunk, Layout, Message, Params, meta
from fedsim.core.seeding import stream, stream_seed
from fedsim.core.store import Store
from fedsim.core.types import Engine, Fault, Measured, Pack, Report, Row, Scores, Scoring, Share, Task, Turn
from fedsim.data.batches import BatchSampler
from fedsim.data.tokens import Tokens
from fedsim.models.forward import Net
from fedsim.models.stacked import StackedNet, StreamNet
from fedsim.training.evaluation import score_rows, to_scores
from fedsim.training.optim import FlatOptimizer, LaneOptimizer, Optim

_TRIM_EVERY_S = 2.0


@dataclass(frozen=True)
class Recipe:
    """How a client trains and is scored; see the config's keys of the same names.

    Attributes:
        optim, draw: optimiser and batches.
        micro_batch: rows of one forward and backward pass.
        schedule_over: run | round.
        horizon: explicit horizon of the schedule, or None.
        keep_state: by mode, whether moments live on from round to round.
        every_steps: score inside a round after so many steps since the start, or None.
        eval_batch, generate, max_new_tokens: scoring.
        chunk: elements of the parameters that are summed, sent or kept at a time; None = all.
        up, down: codec of what a client sends and receives, or None: as it is.
        error_feedback: whether what a codec lost is added to the client's next message.
        row_tokens: where rows lie end to end in one model: a pass holds as many as fit into `micro_batch` times so many
            tokens; None = `micro_batch` rows.
        policy, max_norm: what becomes of updates that are not finite, or of a larger norm.
        slots: how many clients can send a message in one round.
    """

    optim: Optim
    draw: BatchSampler
    micro_batch: int
    schedule_over: str
    horizon: int | None
    keep_state: dict[str, bool]
    every_steps: int | None
    eval_batch: int
    generate: bool
    max_new_tokens: int
    chunk: int | None = None
    up: str | None = None
    down: str | None = None
    error_feedback: bool = False
    row_tokens: int | None = None
    policy: str = "fail"
    max_norm: float | None = None
    slots: int = 1


def stores_of(folder: Path, algorithms: dict[str, Algorithm], layout: Layout, recipe: Recipe) -> dict[str, Store]:
    """Mode -> file of client state, one record a client: the algorithm's state, then the moments where they are kept, then
    what its messages have lost so far, where that is fed back.

    A record of width 0 means that the mode keeps nothing. `best-<mode>` holds the parameters of chosen models: each
    client's where nothing is merged, else the merged one's.
    """
    size, sums = layout.numel, layout.sums
    out = {}
    for mode, algorithm in algorithms.items():
        state = sum(t.numel() for t in algorithm.init(meta(layout))[1].values())
        moments = recipe.optim.num_moments * size if recipe.keep_state[mode] else 0
        lost = sum(sent.numel for sent in algorithm.messages(sums).values()) if recipe.error_feedback else 0
        out[mode] = Store(folder / f"{mode}.bin", state + moments + lost, sums.dtype)
        out[f"best-{mode}"] = Store(folder / f"best-{mode}.bin", size, sums.dtype)
    return out


@dataclass(frozen=True)
class Sites:
    """Rows by client; row numbers, int64.

    Attributes:
        train: client -> its training rows.
        own: client -> its own rows of the validation split, which may be none.
        with_own: the clients that may have such rows: on these the merged model is scored.
        everything: -> rows of the centralised client, ascending.
    """

    train: Callable[[int], np.ndarray]
    own: Callable[[int], np.ndarray]
    with_own: Sequence[int]
    everything: Callable[[], np.ndarray]


def filled(rows: np.ndarray, lengths: np.ndarray, room: int) -> Iterator[np.ndarray]:
    """Rows in order, cut where the next one would not fit into `room` tokens; a longer one is by itself."""
    begin, held = 0, 0
    for i, n in enumerate(lengths):
        if i > begin and held + n > room:
            yield rows[begin:i]
            begin, held = i, 0
        held += int(n)
    yield rows[begin:]


def reducers_of(algorithms: dict[str, Algorithm], layout: Layout, recipe: Recipe) -> dict[str, Reducer]:
    """Mode -> how its clients' messages become one."""
    return {m: Reducer(a.aggregates, a.messages(layout), layout, recipe.slots) for m, a in algorithms.items()}


def chunks_of(algorithm: Algorithm, layout: Layout, reducer: Reducer, most: int | None) -> list[Chunk]:
    """Chunks of the parameters that an algorithm's client side is called on: one, where it has to see all at once."""
    server, client = algorithm.init(meta(layout))
    kept = [Layout.of(p).shapes for p in (algorithm.sent(server), client) if p]
    apart = algorithm.blockwise and reducer.blockwise and all(shapes == layout.shapes for shapes in kept)
    return layout.chunks(most if apart else None)


class _Received:
    """A chunk of what a run's clients received and kept, read when it is first looked at."""

    def __init__(self, trainer: Trainer, part: _Part, tasks: Sequence[Task], chunk: Chunk) -> None:
        self.trainer, self.part, self.tasks, self.chunk = trainer, part, tasks, chunk

    @functools.cached_property
    def params(self) -> Params:
        return self.chunk.views(self.trainer._received(self.part, self.part.weights, self.chunk))

    @functools.cached_property
    def server(self) -> Params:
        if not self.part.algorithm.sends_state:
            return {}
        (whole,) = Layout.of(self.part.server).chunks()
        here = whole if len(self.part.chunks) == 1 else self.chunk
        return here.views(self.trainer._received(self.part, self.part.server_flat, here))

    @functools.cached_property
    def state(self) -> Params:
        template = self.part.algorithm.init(self.params)[1]
        if not template:
            return {}
        layout, store = Layout.of(template), self.part.trainer.stores[self.part.pack.mode]
        begin, found = self.chunk.start, []
        for task in self.tasks:
            if task.read < 0:
                found.append(template)
                continue
            flat = store.read(task.read, begin, begin + layout.numel)
            found.append(layout.views(flat.to(next(iter(template.values())))))
        return {n: torch.stack([s[n] for s in found]) for n in template}


class _View(ClientView):
    """A `ClientView` of some of a run's clients that costs nothing until it is looked at, as FedAvg does not inside a round."""

    def __init__(self, received: _Received, own: slice | list[int], steps: Sequence[int], lr_sum: Tensor) -> None:
        # `ClientView` is frozen.
        self.__dict__.update(round=received.tasks[0].round, lr_sum=lr_sum, _received=received, _own=own, _steps=steps)

    @functools.cached_property
    def params(self) -> Params:
        return self._received.params

    @functools.cached_property
    def server(self) -> Params:
        return self._received.server

    @functools.cached_property
    def state(self) -> Params:
        return {n: t[self._own] for n, t in self._received.state.items()}

    @functools.cached_property
    def steps(self) -> Tensor:
        return torch.tensor(self._steps, device=self.lr_sum.device)


@dataclass
class _Piece:
    """A chunk of neighbouring lanes of a run, as an algorithm changes them between steps.

    Attributes:
        part: the run's.
        chunk: its number.
        own, lanes: where the lanes are among the run's clients, and in the pass.
        grads, params, scratch: by name, `[K, ...]`.
    """

    part: _Part
    chunk: int
    own: slice
    lanes: slice
    grads: Params
    params: Params
    scratch: Params


class _Part:
    """A run's part of a pass: what it shares (`Share`), where its lanes are, what it comes to."""

    def __init__(self, share: Share, algorithm: Algorithm) -> None:
        self.trainer: Trainer = share.trainer
        self.pack, self.weights, self.server, self.out = share.pack, share.weights, share.server, share.out
        self.algorithm, self.turn = algorithm, share.turn
        self.report = Report(share.pack.index)
        self.lanes: list[int] = []
        self.tasks: list[Task] = []  # by lane
        self.chunks, self.width = self.trainer.cuts[share.pack.mode]
        self.scratch: list[Params] = []  # by chunk
        self._received: _Received | None = None

    def whole(self, k: int) -> slice | list[int]:
        """The run's lanes, as a slice where they are the first ones: nothing is copied then."""
        return slice(0, k) if self.lanes == list(range(k)) else self.lanes

    @functools.cached_property
    def server_flat(self) -> Tensor:
        """The server's state end to end."""
        return torch.cat([t.reshape(-1) for t in self.server.values()])

    def received(self, host: Trainer, chunk: int) -> _Received:
        """What its clients received; kept for the round where there is but one chunk."""
        if self._received is not None:
            return self._received
        found = _Received(host, self, self.tasks, self.chunks[chunk])
        if len(self.chunks) == 1:
            self._received = found
        return found

    def pieces(self, active: int, flat: Tensor, grad: Tensor) -> Iterator[_Piece]:
        """Its lanes among the first `active` ones: neighbours together, so that all of them are views."""
        at = 0
        lanes = [j for j in self.lanes if j < active]
        while at < len(lanes):
            end = at + 1
            while end < len(lanes) and lanes[end] == lanes[end - 1] + 1:
                end += 1
            own, here = slice(at, end), slice(lanes[at], lanes[end - 1] + 1)
            for i, chunk in enumerate(self.chunks):
                grads, params = (chunk.views(x[here, chunk.span]) for x in (grad, flat))
                scratch = {n: t[own] for n, t in self.scratch[i].items()}
                yield _Piece(self, i, own, here, grads, params, scratch)
            at = end


class Trainer:
    """Trains the tasks of a pack and scores models.

    Args:
        net: the model on its device.
        tokens: split -> arrays.
        sites: which rows belong to whom.
        algorithms: mode -> algorithm.
        recipe: how to train.
        seed: the experiment's.
        state: folder of the files that hold client state.
        tokenizer: for generation.

    Attributes:
        beat: called at each pass, scoring batch, and piece of what is copied, added or kept; whoever watches over this process
            puts something else in its place.
    """

    def __init__(
        self,
        net: Net | StackedNet,
        tokens: dict[str, Tokens],
        sites: Sites,
        algorithms: dict[str, Algorithm],
        recipe: Recipe,
        seed: int,
        state: Path,
        tokenizer: object,
    ) -> None:
        self.net, self.tokens, self.sites, self.algorithms = net, tokens, sites, algorithms
        self.recipe, self.seed, self.tokenizer = recipe, seed, tokenizer
        self.layout = net.layout
        self._keep(state)
        self._trimmed, self._scoring = -math.inf, 0.0
        self.beat: Callable[[], None] = beat
        self._allocate(1)
        if not isinstance(net, StackedNet) or isinstance(net, StreamNet):
            net.adopt(self.flat)
        self._give_back()  # what reading the rows and loading the base have held

    def _keep(self, state: Path) -> None:
        """What follows from the run's algorithms: where clients' state lies, how messages become one, and by mode what is started,
        sent and kept at a time, and the elements of the algorithm's state that open a client's record."""
        self.stores = stores_of(state, self.algorithms, self.layout, self.recipe)
        self.reducers = reducers_of(self.algorithms, self.layout.sums, self.recipe)
        self.cuts: dict[str, tuple[list[Chunk], int]] = {}
        for mode, algorithm in self.algorithms.items():
            chunks = chunks_of(algorithm, self.layout, self.reducers[mode], self.recipe.chunk)
            width = sum(t.numel() for t in algorithm.init(meta(self.layout))[1].values())
            self.cuts[mode] = chunks, width

    def _allocate(self, lanes: int) -> None:
        """Room for so many lanes: parameters, gradients, moments."""
        self.optimizer = self.flat = self.grad = None  # freed before the new ones are made
        self.flat, self.grad = (
            torch.zeros(lanes, self.layout.numel, dtype=self.layout.dtype, device=self.net.device) for _ in range(2)
        )
        if self.takes_guests:
            self.optimizer = LaneOptimizer(self.recipe.optim, self.flat, self.grad)
        else:
            self.optimizer = FlatOptimizer(self.recipe.optim, self.flat, self.grad, self.recipe.chunk)

    # ------------------------------------------------------------------------------------------- training

    def train(
        self,
        pack: Pack,
        weights: Tensor,
        server: Params,
        out: Tensor,
        turn: Turn | None = None,
    ) -> Report:
        """Train the pack's clients from the global parameters.

        Args:
            pack: whose turn it is.
            weights: the global parameters, flat `[N]`, on any device.
            server: the server's state.
            out: an accumulator's buffer, on any device: each client's message is added to it.
            turn: when that may be done; None = at once.
        """
        return self.train_together([Share(self, pack, weights, server, out, turn or Turn())])[0]

    def train_together(self, shares: Sequence[Share]) -> list[Report]:
        """Train packs of several runs side by side, each from its own global parameters, and each with its own trainer's rows,
        seed, learning rate and kept state; see `guest`."""
        began, self._scoring = time.monotonic(), 0.0
        parts = [_Part(share, share.trainer.algorithms[share.pack.mode]) for share in shares]
        first, task = shares[0].trainer, shares[0].pack.tasks[0]
        with torch.random.fork_rng(devices=[self.net.device] if self.net.device.type == "cuda" else []):
            # What draws from torch's own stream trains one client at a time: dropout of the base, or deep in a method.
            torch.manual_seed(stream_seed(first.seed, "dropout", task.name, task.round))
            self._train_lanes(parts)
        self._give_back()
        for part in parts:
            part.report.seconds, part.report.scoring = time.monotonic() - began, self._scoring
        return [part.report for part in parts]

    def guest(self, sites: Sites, algorithms: dict[str, Algorithm], recipe: Recipe, seed: int, state: Path) -> Trainer:
        """A trainer of another run on the same model, with rows of the same data: what `train_together` takes beside this one.

        The runs have to agree in all that a pass has in common: micro-batch, optimiser, scoring batches.
        """
        made = copy.copy(self)
        made.sites, made.algorithms, made.recipe, made.seed = sites, algorithms, recipe, seed
        made._keep(state)
        made.flat = made.grad = made.optimizer = None  # lanes are this one's
        return made

    @property
    def takes_guests(self) -> bool:
        """Whether packs of several runs can go side by side."""
        return isinstance(self.net, StackedNet) and not isinstance(self.net, StreamNet)

    def _train_lanes(self, parts: Sequence[_Part]) -> None:
        every = [(part, task) for part in parts for task in part.pack.tasks]
        k = len(every)
        if k > len(self.flat):
            self._allocate(k)
        # Longest first: the lanes that still have steps to do are then always the first ones, and the rest rests.
        drawn = [part.trainer._batches(task) for part, task in every]
        order = sorted(range(k), key=lambda i: -len(drawn[i]))
        lanes, batches = [every[i] for i in order], [drawn[i] for i in order]
        for part in parts:
            part.lanes = [j for j, (owner, _) in enumerate(lanes) if owner is part]
            part.tasks = [lanes[j][1] for j in part.lanes]
            self._start(part)
        rates = [part.trainer._rate(task, len(b)) for (part, task), b in zip(lanes, batches, strict=True)]
        table = [
            [r(i) if i < len(b) else 0.0 for r, b in zip(rates, batches, strict=True)] for i in range(len(batches[0]))
        ]
        lrs = torch.tensor(table, dtype=self.layout.sums.dtype, device=self.net.device).view(-1, k)
        lr_sums = torch.cat([lrs.new_zeros(1, k), lrs.cumsum(dim=0)])  # before each step, and at the end
        loss = torch.zeros(k, dtype=torch.float64, device=self.net.device)
        useful, computed = np.zeros(k, dtype=np.int64), np.zeros(k, dtype=np.int64)
        inside: dict[int, list[Row]] = {}
        self.net.begin([stream_seed(p.trainer.seed, "dropout", t.name, t.round) for p, t in lanes])
        bound, pieces = 0, []
        for i in range(len(batches[0])):
            active = sum(len(b) > i for b in batches)
            if active != bound:
                self.net.train(True)
                self.net.bind(self.flat[:active], self.grad[:active])
                bound = active
                pieces = [p for part in parts for p in part.pieces(active, self.flat, self.grad)]
            step_loss, step_useful, step_computed = self._backward([b[i] for b in batches[:active]])
            for p in pieces:
                view = self._view(p, i, lr_sums[i])
                p.part.algorithm.adjust(p.grads, p.params, p.scratch, view)
            self.optimizer.step(table[i][:active])
            for p in pieces:
                view = self._view(p, i + 1, lr_sums[i + 1])
                p.part.algorithm.after_step(p.params, p.scratch, view, lrs[i, p.lanes])
            loss[:active] += step_loss
            useful[:active] += step_useful
            computed[:active] += step_computed
            due = [
                j for j in range(active) if lanes[j][0].trainer._is_due(lanes[j][1], i + 1) and i + 1 < len(batches[j])
            ]
            if due:
                for j, rows in zip(due, self._score_lanes(due, lanes, i + 1), strict=True):
                    inside.setdefault(j, []).extend(rows)
                bound = 0
        losses = loss.tolist()
        for part in parts:
            self._finish(part, [len(batches[j]) for j in part.lanes], losses, lr_sums[-1])
        counts = [task.client in part.report.steps for part, task in lanes]
        due = [t.evaluate or p.trainer._is_due(t, len(b)) for (p, t), b in zip(lanes, batches, strict=True)]
        ends = [j for j in range(k) if counts[j] and due[j]]
        scored = self._score_lanes(ends, lanes, [len(batches[j]) for j in ends])
        final = dict(zip(ends, scored, strict=True))
        for j in sorted(range(k), key=lambda j: order[j]):  # rows in the packs' order
            (part, task), steps = lanes[j], len(batches[j])
            part.report.computed += int(computed[j])
            if not counts[j]:
                continue
            mode, report = part.pack.mode, part.report
            name, done = None if mode == "central" else task.name, task.steps_done + steps
            report.rows += inside.get(j, [])
            train = {"loss": (losses[j] / max(1, steps), float(steps)), "tokens": (float(useful[j]), 1.0)}
            train["computed_tokens"] = (float(computed[j]), 1.0)
            report.rows += [Row(task.round, done, mode, name, "train", n, v, w) for n, (v, w) in train.items()]
            report.rows += final.get(j, [])
            report.tokens += int(useful[j])

    def _rate(self, task: Task, steps: int) -> Callable[[int], float]:
        """Step of the round, from 0 -> learning rate."""
        over_run, optim = self.recipe.schedule_over == "run", self.recipe.optim
        start = task.schedule_from if over_run else 0
        horizon = self.recipe.horizon or (task.horizon if over_run else steps)
        return lambda i: optim.lr_at(start + i, horizon)

    def _is_due(self, task: Task, steps: int) -> bool:
        every = self.recipe.every_steps
        return bool(every) and (task.steps_done + steps) % every == 0

    def _batches(self, task: Task) -> list[np.ndarray]:
        rows = self.sites.everything() if task.client < 0 else self.sites.train(task.client)
        return self.recipe.draw.batches(rows, stream(self.seed, "batches", task.name, task.round), task.steps)

    def _view(self, piece: _Piece, steps: int, lr_sums: Tensor) -> _View:
        """What an algorithm may look at of a piece, whose clients have done so many steps."""
        received = piece.part.received(self, piece.chunk)
        lr_sum = lr_sums[piece.lanes]
        return _View(received, piece.own, [steps] * len(lr_sum), lr_sum)

    def _received(self, part: _Part, flat: Tensor, chunk: Chunk) -> Tensor:
        """A chunk of what the server sends, `[stop - start]`, as clients receive it."""
        flat = flat[chunk.span].to(self.net.device)
        if not part.algorithm.merges or part.trainer.recipe.down is None:
            return flat
        sent = codec(part.trainer.recipe.down)
        return torch.cat([sent.round_trip(w.reshape(-1)) for w in chunk.views(flat).values()])

    def _start(self, part: _Part) -> None:
        """Fill a run's lanes with what its clients start from."""
        owner, mode, tasks = part.trainer, part.pack.mode, part.tasks
        keeps = owner.recipe.keep_state[mode]
        for lane, task in zip(part.lanes, tasks, strict=True):
            self.beat()
            moments = None
            if keeps and task.read >= 0:
                record = functools.partial(owner.stores[mode].read, task.read)
                moments = lambda a, b, record=record: record(part.width + a, part.width + b)  # noqa: E731
            self.optimizer.reset(lane, task.steps_done, moments)
        own, none = (
            part.whole(len(tasks)),
            torch.zeros(len(tasks), dtype=self.layout.sums.dtype, device=self.net.device),
        )
        for i, chunk in enumerate(part.chunks):
            self.beat()
            view = _View(part.received(self, i), slice(None), [0] * len(tasks), none)
            start = part.algorithm.start(view)
            for name, lanes in chunk.views(self.flat[:, chunk.span]).items():
                lanes[own] = start[name].to(lanes.dtype)
            part.scratch.append(part.algorithm.scratch(view))

    def _finish(self, part: _Part, steps: Sequence[int], losses: Sequence[float], lr_sums: Tensor) -> None:
        """Add a run's messages to its sum, and keep what its clients keep; `losses` are summed over the steps, by lane.

        A client whose update counts for nothing leaves no trace but a fault: no steps, no state.
        """
        owner, mode, algorithm = part.trainer, part.pack.mode, part.algorithm
        store, sums = owner.stores[mode], self.layout.sums.dtype
        keeps = owner.recipe.keep_state[mode]
        good, scales = self._judge(part, part.tasks, part.chunks, [losses[j] for j in part.lanes])
        every = len(good) == len(part.tasks)
        lanes, tasks, steps = ([x[i] for i in good] for x in (part.lanes, part.tasks, steps))
        own, chosen = (part.whole(len(tasks)), slice(None)) if every else (lanes, good)
        if algorithm.merges and not part.turn.wait():
            return  # the round is given up
        for i, chunk in enumerate(part.chunks if good else ()):
            self.beat()
            view = _View(part.received(self, i), chosen, steps, lr_sums[own])
            scratch = {n: t[chosen] for n, t in part.scratch[i].items()}
            message, state = algorithm.finish(chunk.views(self.flat[:, chunk.span][own].to(sums)), scratch, view)
            if algorithm.merges:
                if any(s != 1 for s in scales) and "update" in message:
                    by = torch.tensor(scales, dtype=sums, device=self.flat.device)
                    message["update"] = {n: u * per_lane(by, u) for n, u in message["update"].items()}
                message = self._sent(part, tasks, chunk, message)
                weights, slots = [t.weight for t in tasks], [t.slot for t in tasks]
                owner.reducers[mode].add(part.out, message, weights, slots, chunk)
            for j, task in enumerate(tasks if state else ()):
                if task.write >= 0:
                    flat = torch.cat([t[j].reshape(-1) for t in state.values()])
                    store.write_at(task.write, chunk.start, flat)
            del view, message, state, scratch  # before those of the next chunk are made
        if algorithm.merges:
            part.report.weight = sum((t.weight for t in tasks), 0.0)
            part.turn.done()
        for i, (lane, task) in enumerate(zip(lanes, tasks, strict=True)):
            part.report.steps[task.client] = steps[i]
            if task.write >= 0 and keeps:
                for j, moment in enumerate(self.optimizer.kept(lane)):
                    self.beat()
                    store.write_at(task.write, part.width + j * self.layout.numel, moment)

    def _judge(
        self, part: _Part, tasks: Sequence[Task], chunks: Sequence[Chunk], losses: Sequence[float]
    ) -> tuple[list[int], list[float]]:
        """Which of a run's clients count, as places in `tasks`, and what their updates are multiplied by."""
        recipe = part.trainer.recipe
        most = recipe.max_norm if part.algorithm.merges else None
        norms = self._norms(part, chunks, most is not None)
        good, scales = [], []
        for i, (task, loss, norm) in enumerate(zip(tasks, losses, norms, strict=True)):
            of = "loss" if not math.isfinite(loss) else "update" if not math.isfinite(norm) else "norm"
            if of != "norm" or (most is not None and norm > most):
                action = "clipped" if of == "norm" and recipe.policy == "clip" else "skipped"
                action = "failed" if recipe.policy == "fail" else action
                part.report.faults.append(Fault(task.client, task.name, action, of, loss if of == "loss" else norm))
                if action != "clipped":
                    continue
            good.append(i)
            scales.append(most / norm if most is not None and norm > most else 1.0)
        return good, scales

    def _norms(self, part: _Part, chunks: Sequence[Chunk], of_updates: bool) -> list[float]:
        """2-norms of the updates of a run's clients; or, where no limit is set, of their parameters, which need no copy and tell as
        well whether they are finite.

        Squares are summed in blocks of `ALIGN` elements of a tensor and the blocks exactly, so a norm does not depend on the
        chunks.
        """
        if not of_updates:
            own = part.whole(len(part.lanes))
            found = torch.stack([torch.linalg.vector_norm(self.flat[:, c.span][own], dim=1) for c in chunks])
            return found.square_().sum(dim=0).sqrt_().tolist()
        squares: list[list[float]] = [[] for _ in part.lanes]
        for chunk in chunks:
            self.beat()
            start = chunk.views(self._received(part, part.weights, chunk))
            for name, local in chunk.views(self.flat[:, chunk.span]).items():
                for i, lane in enumerate(part.lanes):
                    moved = (local[lane].double() - start[name].double()).reshape(-1).square_()
                    full = moved.numel() // ALIGN * ALIGN
                    squares[i] += moved[:full].view(-1, ALIGN).sum(dim=1).tolist()
                    squares[i].append(float(moved[full:].sum()))
        return [math.sqrt(math.fsum(s)) for s in squares]

    def _sent(self, part: _Part, tasks: Sequence[Task], chunk: Chunk, message: Message) -> Message:
        """The messages as the server receives them.

        With error feedback a client adds what its messages have lost so far, and keeps what this one loses (Seide et al., 1-bit
        SGD, Interspeech 2014; Karimireddy et al., Error feedback fixes SignSGD, ICML 2019).
        """
        recipe, mode = part.trainer.recipe, part.pack.mode
        if recipe.up is None:
            return message
        sent, store = codec(recipe.up), part.trainer.stores[mode]
        groups = part.trainer.reducers[mode].groups
        place = store.width - sum(g.layout.numel for g in groups.values())  # the last part of a record
        out: Message = {}
        for group, tensors in message.items():
            out[group], at = {}, place + chunk.start  # groups that are whole come in one chunk, which begins at 0
            for name, u in tensors.items():
                flat = u.reshape(len(tasks), -1)
                size = flat.shape[1]
                if recipe.error_feedback:
                    lost = [
                        store.read(t.read, at, at + size).to(flat) if t.read >= 0 else flat.new_zeros(size)
                        for t in tasks
                    ]
                    flat = flat + torch.stack(lost)
                received = sent.round_trip(flat)
                if recipe.error_feedback:
                    for task, left in zip(tasks, flat - received, strict=True):
                        store.write_at(task.write, at, left)
                out[group][name] = received.view(u.shape)
                at += size
            place += groups[group].layout.numel
        return out

    def _backward(self, batches: Sequence[np.ndarray]) -> tuple[Tensor, list[int], np.ndarray]:
        """Gradient of each lane's mean loss over all answer tokens of its batch, into `self.grad`.

        Returns:
            Those losses `[k]`, tokens trained on and tokens computed, by lane.
        """
        tokens, size, k = self.tokens["train"], self.recipe.micro_batch, len(batches)
        self.grad[:k].zero_()
        # Like lengths together: less padding, the same sum. A batch that is not cut stays as it is, whoever is beside it.
        several = self.recipe.row_tokens is not None
        batches = [
            b[np.argsort(tokens.lengths_of(b), kind="stable")] if several or size < len(b) else b for b in batches
        ]
        every = np.concatenate(batches)
        lane_of = np.repeat(np.arange(k), [len(b) for b in batches])
        useful = np.bincount(lane_of, weights=tokens.lengths_of(every), minlength=k).astype(np.int64)
        answers = np.bincount(lane_of, weights=tokens.answers_of(every), minlength=k)
        # In the type of sums: bfloat16 cannot count beyond 256.
        over = torch.from_numpy(answers).to(self.net.device, self.layout.sums.dtype, non_blocking=True)
        loss: Tensor | None = None
        computed = np.zeros(k, dtype=np.int64)
        for rows in self._passes(tokens, batches):
            self.beat()
            part, sizes = self.net.backward(tokens, rows, over)
            loss = part if loss is None else loss + part
            computed += sizes
        return loss, useful, computed

    def _passes(self, tokens: Tokens, batches: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """The rows of each forward and backward pass, one array a lane."""
        size = self.recipe.micro_batch
        if self.recipe.row_tokens is None:
            for i in range(0, max(map(len, batches)), size):
                yield [b[i : i + size] for b in batches]
            return
        (batch,) = batches
        yield from ([part] for part in filled(batch, tokens.lengths_of(batch), size * self.recipe.row_tokens))

    # -------------------------------------------------------------------------------------------- scoring

    def _score_lanes(
        self, lanes: Sequence[int], every: Sequence[tuple[_Part, Task]], steps: int | Sequence[int]
    ) -> list[list[Row]]:
        """Rows of these lanes' models as they are, on the shared validation rows and on each site's own.

        The pass takes all of the pack's lanes (`every`), also where only some are due: how many go through a pass decides the
        last bits, and with another evaluation frequency others are due.
        """
        if not lanes:
            return []
        if self.net.device.type == "cuda":
            torch.cuda.synchronize(self.net.device)  # training that is under way is not evaluation
        began = time.monotonic()
        steps = [steps] * len(lanes) if isinstance(steps, int) else steps
        whose = [every[j] for j in lanes]
        own = [{t.client: p.trainer.sites.own(t.client)} if t.client >= 0 else {} for p, t in whose]
        out = []
        scored = self._score(self.flat[: len(every)], "validation", self.recipe.generate, own, lanes=lanes)
        for (part, task), n, scores in zip(whose, steps, scored, strict=True):
            mode = part.pack.mode
            name, step = None if mode == "central" else task.name, task.steps_done + n
            rows = [Row(task.round, step, mode, name, "validation", n, v, w) for n, (v, w) in scores.values.items()]
            for values in scores.sites.values():
                rows += [Row(task.round, step, mode, name, "site", n, v, w) for n, (v, w) in values.items()]
            out.append(rows)
        self._scoring += time.monotonic() - began
        return out

    def _score(
        self,
        weights: Tensor,
        split: str,
        generate: bool,
        own: Sequence[dict[int, np.ndarray]],
        by_row: bool = False,
        lanes: Sequence[int] | None = None,
    ) -> list[Scores]:
        """Scores of each row of `weights`, `[K, N]`, or of these rows."""
        tokens = self.tokens[split]
        self.net.bind(weights, None)
        rows = score_rows(
            self.net,
            tokens,
            len(weights),
            batch_size=self.recipe.eval_batch,
            tokenizer=self.tokenizer if generate else None,
            max_new_tokens=self.recipe.max_new_tokens,
            wanted=lanes,
            beat=self.beat,
        )
        return [to_scores(r, tokens, o, by_row) for r, o in zip(rows, own, strict=True)]

    def score(self, request: Scoring, weights: Tensor) -> list[Scores]:
        """Score the global parameters `weights` (flat `[N]`), or the parameters that open each of the records."""
        return self.score_together([(self, request, weights)])[0]

    def score_together(self, asked: Sequence[tuple[Trainer, Scoring, Tensor]]) -> list[list[Scores]]:
        """Score what several runs ask for - (trainer, request, global parameters) - like requests side by side."""
        out: list[list[Scores]] = [[] for _ in asked]
        groups: dict[tuple[str, bool, bool], list[tuple[int, int | None]]] = {}
        for i, (_, request, _) in enumerate(asked):
            kind = (request.split, request.generate, request.by_row)
            groups.setdefault(kind, []).extend((i, r) for r in request.records or (None,))
        # No more side by side than have trained so, or than one run asks for: their memory is known to be there.
        most = max(len(self.flat), *(len(request.records) for _, request, _ in asked))
        for kind, models in groups.items():
            for begin in range(0, len(models), most):
                part = models[begin : begin + most]
                for (i, _), scores in zip(part, self._score_models(asked, kind, part), strict=True):
                    out[i].append(scores)
        return out

    def _score_models(
        self,
        asked: Sequence[tuple[Trainer, Scoring, Tensor]],
        kind: tuple[str, bool, bool],
        models: Sequence[tuple[int, int | None]],
    ) -> list[Scores]:
        """Scores of models - place in `asked`, record or None for the global parameters - halved where memory is too little."""
        half = len(models) // 2
        if not self.takes_guests and half == 0:
            return [self._score_one(asked, kind, models[0])]
        if half == 0 or self.takes_guests:
            weights, own = [], []
            for i, record in models:
                owner, request, flat = asked[i]
                read = None if record is None else owner.stores[request.store].read(record)[: self.layout.numel]
                weights.append((flat if read is None else read).to(self.net.device))
                own.append({c: owner.sites.own(c) for c in owner.sites.with_own} if request.sites else {})
            split, generate, by_row = kind
            try:
                return self._score(torch.stack(weights), split, generate, own, by_row)
            except Exception as error:
                if half == 0 or not is_out_of_memory(error):
                    raise
        return [s for part in (models[:half], models[half:]) for s in self._score_models(asked, kind, part)]

    def _score_one(
        self,
        asked: Sequence[tuple[Trainer, Scoring, Tensor]],
        kind: tuple[str, bool, bool],
        model: tuple[int, int | None],
    ) -> Scores:
        """Scores of one model, copied piece by piece to where training would have it."""
        (i, record), (split, generate, by_row) = model, kind
        owner, request, flat = asked[i]
        for chunk in self.layout.chunks(self.recipe.chunk):
            self.beat()
            if record is None:
                piece = flat[chunk.span]
            else:
                piece = owner.stores[request.store].read(record, chunk.start, chunk.stop)
            self.flat[0, chunk.span].copy_(piece)
        own = {c: owner.sites.own(c) for c in owner.sites.with_own} if request.sites else {}
        return self._score(self.flat[:1], split, generate, [own], by_row)[0]

    # ------------------------------------------------------------------------------------------- measuring

    def measure(self, rows: Sequence[np.ndarray], weights: Tensor) -> Measured:
        """One forward and backward pass without a step: what it takes.

        Args:
            rows: row numbers of the training split, one array a lane.
            weights: the parameters to do it at, flat `[N]`.
        """
        k, device = len(rows), self.net.device
        if k > len(self.flat):
            self._allocate(k)
        self.flat[:k] = weights
        self.net.train(True)
        self.net.begin([0] * k)
        self.net.bind(self.flat[:k], self.grad[:k])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        known = {t.untyped_storage().data_ptr() for t in (*self.net.model.parameters(), *self.net.model.buffers())}
        known |= {self.flat.untyped_storage().data_ptr(), self.grad.untyped_storage().data_ptr()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        ):
            began = time.perf_counter()
            _, useful, _ = self._backward(rows)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        state = k * self.layout.nbytes * (2 + self.recipe.optim.num_moments)
        return Measured(k, int(sum(useful)), seconds, sum(kept.values()), state, peak)

    def _give_back(self) -> None:
        """Return freed memory to the system, now and then: passes of ever new sizes leave holes in the C heap."""
        now = time.monotonic()
        if self.net.device.type == "cpu" and now - self._trimmed > _TRIM_EVERY_S:
            self._trimmed = now
            with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
                ctypes.CDLL(None).malloc_trim(0)

    def configure(self, engine: Engine) -> None:
        """Train like this from now on."""
        self.recipe = dataclasses.replace(self.recipe, micro_batch=engine.micro_batch)
        self.net.checkpoint(engine.checkpointing)
        if self.net.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.net.device)

    def peak(self) -> int:
        """Highest memory so far, in bytes: allocated on the GPU, or resident in this process where there is none."""
        if self.net.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.net.device)
        return memory_now("VmHWM")

    def shrink(self) -> None:
        """Let go of all lanes' memory, after there was too little of it; one model's weights and moments stay where they are."""
        if self.takes_guests:
            self._allocate(1)
        gc.collect()
        if self.net.device.type == "cuda":
            torch.cuda.empty_cache()


def memory_now(key: str) -> int:
    """This process's resident memory (`VmRSS`) or its highest so far (`VmHWM`), in bytes; 0 where Linux does not tell."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(text.split(f"{key}:")[1].split()[0]) * 1024
