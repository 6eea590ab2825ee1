"""The training loop: the clients of a pack side by side, each in its lane, on one device.

All trained tensors of all lanes are views of one `[K, N]` tensor, so starting a pack is one copy, an optimiser step a few
calls, and the weighted sum of the updates one product, whatever the method. With `Net` K is 1 and the model is PEFT's own
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

from fedsim.aggregators.mean import WeightedMean
from fedsim.algorithms import Algorithm, Context
from fedsim.channel.codecs import codec
from fedsim.core.errors import is_out_of_memory
from fedsim.core.params import ALIGN, Chunk, Layout, Params
from fedsim.core.pulse import beat
from fedsim.core.seeding import stream, stream_seed
from fedsim.core.store import Store
from fedsim.core.types import Engine, Fault, Measured, Pack, Partial, Report, Row, Scores, Scoring, Share, Task, Turn
from fedsim.data.batches import Draw
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
    """

    optim: Optim
    draw: Draw
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


def stores_of(folder: Path, algorithms: dict[str, Algorithm], layout: Layout, recipe: Recipe) -> dict[str, Store]:
    """Mode -> file of client state, one record a client: the algorithm's state, then the moments where they are kept, then
    what its messages have lost so far, where that is fed back.

    A record of width 0 means that the mode keeps nothing. `best-<mode>` holds the parameters of chosen models: each
    client's where nothing is merged, else the merged one's.
    """
    size, sums = layout.numel, layout.sums
    params = layout.views(torch.empty(size, dtype=layout.dtype, device="meta"))
    out = {}
    for mode, algorithm in algorithms.items():
        state = sum(t.numel() for t in algorithm.init(params)[1].values())
        moments = recipe.optim.num_moments * size if recipe.keep_state[mode] else 0
        lost = size if recipe.error_feedback and algorithm.merges else 0
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


class _Part:
    """A run's part of a pass: what it shares (`Share`), where its lanes are, what it comes to."""

    def __init__(self, share: Share, algorithm: Algorithm) -> None:
        self.trainer: Trainer = share.trainer
        self.pack, self.weights, self.server = share.pack, share.weights, share.server
        self.algorithm, self.turn = algorithm, share.turn
        self.partial = Partial(share.out)
        self.report = Report(share.pack.index)
        self.lanes: list[int] = []
        self.ctx: Context | None = None  # of the only chunk, where there is but one

    def whole(self, k: int) -> slice | list[int]:
        """The run's lanes, as a slice where they are the first ones: nothing is copied then."""
        return slice(0, k) if self.lanes == list(range(k)) else self.lanes


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
        self.aggregator = WeightedMean(self.layout.sums)
        self.stores = stores_of(state, algorithms, self.layout, recipe)
        self.cuts: dict[str, tuple[list[Chunk], int]] = {}  # by mode
        self._trimmed, self._scoring = -math.inf, 0.0
        self.beat: Callable[[], None] = beat
        self._allocate(1)
        if not isinstance(net, StackedNet) or isinstance(net, StreamNet):
            net.adopt(self.flat)
        self._give_back()  # what reading the rows and loading the base have held

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
            out: the sum, `[N]`, on any device: weight x update of each client is added to it.
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
            part.report.weight = part.partial.weight
            part.report.seconds, part.report.scoring = time.monotonic() - began, self._scoring
        return [part.report for part in parts]

    def guest(self, sites: Sites, algorithms: dict[str, Algorithm], recipe: Recipe, seed: int, state: Path) -> Trainer:
        """A trainer of another run on the same model, with rows of the same data: what `train_together` takes beside this one.

        The runs have to agree in all that a pass has in common: micro-batch, optimiser, scoring batches.
        """
        made = copy.copy(self)
        made.sites, made.algorithms, made.recipe, made.seed = sites, algorithms, recipe, seed
        made.stores = stores_of(state, algorithms, self.layout, recipe)
        made.cuts = {}
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
            part.ctx = self._start(part, [lanes[j][1] for j in part.lanes])
        rates = [part.trainer._rate(task, len(b)) for (part, task), b in zip(lanes, batches, strict=True)]
        adjusts = type(parts[0].algorithm).adjust_grads is not Algorithm.adjust_grads
        assert not adjusts or len(parts) == 1, "an algorithm that adjusts gradients looks at all lanes of a pass"
        loss = torch.zeros(k, dtype=torch.float64, device=self.net.device)
        useful, computed = np.zeros(k, dtype=np.int64), np.zeros(k, dtype=np.int64)
        inside: dict[int, list[Row]] = {}
        self.net.begin([stream_seed(p.trainer.seed, "dropout", t.name, t.round) for p, t in lanes])
        bound = 0
        for i in range(len(batches[0])):
            active = sum(len(b) > i for b in batches)
            if active != bound:
                self.net.train(True)
                self.net.bind(self.flat[:active], self.grad[:active])
                bound = active
            step_loss, step_useful, step_computed = self._backward([b[i] for b in batches[:active]])
            if adjusts:
                ctx = parts[0].ctx
                assert ctx is not None, "an algorithm that adjusts gradients looks at all parameters at once"
                own = Context(ctx.round, ctx.weights, ctx.server, {n: t[:active] for n, t in ctx.client.items()})
                views = (self.layout.lanes(x[:active]) for x in (self.grad, self.flat))
                parts[0].algorithm.adjust_grads(*views, own)
            self.optimizer.step([rate(i) for rate in rates[:active]])
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
            self._finish(part, [lanes[j][1] for j in part.lanes], [len(batches[j]) for j in part.lanes], losses)
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

    def _cut(self, part: _Part) -> tuple[list[Chunk], int]:
        """What is started, sent and kept at a time, and the elements of the algorithm's state that open a client's record.

        Pieces where the algorithm keeps nothing, or a state like the parameters; else all at once.
        """
        known, mode, algorithm = part.trainer.cuts, part.pack.mode, part.algorithm
        if mode not in known:
            example = self.layout.views(torch.empty(self.layout.numel, dtype=self.layout.dtype, device="meta"))
            server, client = algorithm.init(example)
            elementwise = type(algorithm).adjust_grads is Algorithm.adjust_grads and not server
            alike = not client or {n: tuple(t.shape) for n, t in client.items()} == self.layout.shapes
            chunks = self.layout.chunks(self.recipe.chunk if elementwise and alike else None)
            known[mode] = chunks, sum(t.numel() for t in client.values())
        return known[mode]

    def _context(self, part: _Part, tasks: Sequence[Task], chunk: Chunk) -> Context:
        """What an algorithm may look at of a chunk: the parameters as they were received, and the clients' states."""
        store = part.trainer.stores[part.pack.mode]
        flat = self._received(part, chunk)
        weights = chunk.views(flat)
        template = part.algorithm.init(weights)[1]
        layout = Layout.of(template) if template else None
        states = []
        for task in tasks if template else ():
            if task.read < 0:
                states.append(template)
                continue
            states.append(layout.views(store.read(task.read, chunk.start, chunk.start + layout.numel).to(flat)))
        client = {n: torch.stack([s[n] for s in states]) for n in template}
        return Context(tasks[0].round, weights, part.server, client)

    def _received(self, part: _Part, chunk: Chunk) -> Tensor:
        """A chunk of the global parameters, `[stop - start]`, as clients receive it."""
        flat = part.weights[chunk.span].to(self.net.device)
        if not part.algorithm.merges or part.trainer.recipe.down is None:
            return flat
        sent = codec(part.trainer.recipe.down)
        return torch.cat([sent.round_trip(w.reshape(-1)) for w in chunk.views(flat).values()])

    def _start(self, part: _Part, tasks: Sequence[Task]) -> Context | None:
        """Fill a run's lanes with what its clients start from; what the algorithm may look at, if that is in one chunk."""
        owner, mode = part.trainer, part.pack.mode
        keeps, (chunks, width) = owner.recipe.keep_state[mode], self._cut(part)
        for lane, task in zip(part.lanes, tasks, strict=True):
            self.beat()
            moments = None
            if keeps and task.read >= 0:
                record = functools.partial(owner.stores[mode].read, task.read)
                moments = lambda a, b, record=record: record(width + a, width + b)  # noqa: E731
            self.optimizer.reset(lane, task.steps_done, moments)
        own = part.whole(len(tasks))
        for chunk in chunks:
            self.beat()
            ctx = self._context(part, tasks, chunk)
            start = part.algorithm.start(ctx)
            for name, view in chunk.views(self.flat[:, chunk.span]).items():
                view[own] = start[name].to(view.dtype)
        return ctx if len(chunks) == 1 else None

    def _finish(self, part: _Part, tasks: Sequence[Task], steps: Sequence[int], losses: Sequence[float]) -> None:
        """Add a run's updates to its sum, and keep what its clients keep; `losses` are summed over the steps, by lane.

        A client whose update counts for nothing leaves no trace but a fault: no steps, no state.
        """
        owner, mode, algorithm = part.trainer, part.pack.mode, part.algorithm
        store, sums = owner.stores[mode], self.aggregator.layout.dtype
        keeps, (chunks, width) = owner.recipe.keep_state[mode], self._cut(part)
        good, scales = self._judge(part, tasks, chunks, [losses[j] for j in part.lanes])
        every = len(good) == len(tasks)
        lanes, tasks, steps = ([x[i] for i in good] for x in (part.lanes, tasks, steps))
        own = part.whole(len(tasks)) if every else lanes
        if algorithm.merges and not part.turn.wait():
            return  # the round is given up
        for chunk in chunks if good else ():
            self.beat()
            ctx = part.ctx if part.ctx is not None and every else self._context(part, tasks, chunk)
            update, state = algorithm.client_update(chunk.views(self.flat[:, chunk.span][own].to(sums)), ctx)
            if algorithm.merges:
                if any(s != 1 for s in scales):
                    by = torch.tensor(scales, dtype=sums, device=self.flat.device)
                    update = {n: u * by.view(-1, *[1] * (u.dim() - 1)) for n, u in update.items()}
                update = self._sent(part, tasks, chunk, update)
                self.aggregator.add(part.partial, update, [t.weight for t in tasks], chunk)
            for i, task in enumerate(tasks if state else ()):
                if task.write >= 0:
                    flat = torch.cat([t[i].reshape(-1) for t in state.values()])
                    store.write_at(task.write, chunk.start, flat)
            del ctx, update, state  # before those of the next chunk are made
        if algorithm.merges:
            part.turn.done()
        for i, (lane, task) in enumerate(zip(lanes, tasks, strict=True)):
            part.report.steps[task.client] = steps[i]
            if task.write >= 0 and keeps:
                for j, moment in enumerate(self.optimizer.kept(lane)):
                    self.beat()
                    store.write_at(task.write, width + j * self.layout.numel, moment)

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
            start = chunk.views(self._received(part, chunk))
            for name, local in chunk.views(self.flat[:, chunk.span]).items():
                for i, lane in enumerate(part.lanes):
                    moved = (local[lane].double() - start[name].double()).reshape(-1).square_()
                    full = moved.numel() // ALIGN * ALIGN
                    squares[i] += moved[:full].view(-1, ALIGN).sum(dim=1).tolist()
                    squares[i].append(float(moved[full:].sum()))
        return [math.sqrt(math.fsum(s)) for s in squares]

    def _sent(self, part: _Part, tasks: Sequence[Task], chunk: Chunk, update: Params) -> Params:
        """The updates as the server receives them.

        With error feedback a client adds what its messages have lost so far, and keeps what this one loses (Seide et al., 1-bit
        SGD, Interspeech 2014; Karimireddy et al., Error feedback fixes SignSGD, ICML 2019).
        """
        recipe = part.trainer.recipe
        if recipe.up is None:
            return update
        sent = codec(recipe.up)
        out, at = {}, chunk.start
        store = part.trainer.stores[part.pack.mode]
        place = store.width - self.layout.numel  # the last part of a record
        for name, u in update.items():
            flat = u.reshape(len(tasks), -1)
            size = flat.shape[1]
            if recipe.error_feedback:
                lost = [
                    store.read(t.read, place + at, place + at + size).to(flat) if t.read >= 0 else flat.new_zeros(size)
                    for t in tasks
                ]
                flat = flat + torch.stack(lost)
            received = sent.round_trip(flat)
            if recipe.error_feedback:
                for task, left in zip(tasks, flat - received, strict=True):
                    store.write_at(task.write, place + at, left)
            out[name] = received.view(u.shape)
            at += size
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
