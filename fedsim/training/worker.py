"""A worker: trains the packs of a run on a device. Start, fit, finish; several runs can share a trainer, and a pass of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators.reducer import Reducer
from fedsim.algorithms import Algorithm
from fedsim.channel import downlink, uplink
from fedsim.core.params import Chunk, Layout, Params, meta
from fedsim.core.seeding import stream, stream_seed
from fedsim.core.types import Engine, Measured, Pack, Report, Row, Scores, Scoring, Share, Task, Turn
from fedsim.training import memory
from fedsim.training.config import LocalTrainingConfig, Sites
from fedsim.training.lanes import LaneGroup
from fedsim.training.records import RecordLayout, stores_of
from fedsim.training.scoring import Evaluator
from fedsim.training.trainer import Fit, Lane, Trainer


def reducers_of(algorithms: dict[str, Algorithm], layout: Layout, config: LocalTrainingConfig) -> dict[str, Reducer]:
    """Mode -> how its clients' messages become one."""
    return {m: Reducer(a.aggregates, a.messages(layout), layout, config.slots) for m, a in algorithms.items()}


def chunks_of(algorithm: Algorithm, layout: Layout, reducer: Reducer, most: int | None) -> list[Chunk]:
    """Chunks of the parameters that an algorithm's client side is called on: one, where it has to see all at once."""
    server, client = algorithm.init(meta(layout))
    kept = [Layout.of(p).shapes for p in (algorithm.sent(server), client) if p]
    apart = algorithm.blockwise and reducer.blockwise and all(shapes == layout.shapes for shapes in kept)
    return layout.chunks(most if apart else None)


class Worker:
    """A run's side of training on a device.

    Args:
        trainer: owns the device; other runs may share it, where they agree in model, data, micro-batch, optimizer and evaluation.
        evaluator: on the same device.
        sites: which examples belong to whom.
        algorithms: mode -> algorithm.
        config: how clients train.
        seed: the experiment's.
        state: folder of the files that hold client state.
    """

    def __init__(
        self,
        trainer: Trainer,
        evaluator: Evaluator,
        sites: Sites,
        algorithms: dict[str, Algorithm],
        config: LocalTrainingConfig,
        seed: int,
        state: Path,
    ) -> None:
        self.trainer, self.evaluator, self.sites, self.algorithms = trainer, evaluator, sites, algorithms
        self.config, self.seed, self.layout = config, seed, trainer.layout
        self.downlink = downlink(config.down)
        clips = config.policy == "clip"
        self.uplink = uplink(config.up, config.error_feedback, config.max_norm if clips else None)
        self.stores = stores_of(state, algorithms, self.layout, config)
        reducers = reducers_of(algorithms, self.layout.sums, config)
        self.setups = {  # by mode
            m: (r, chunks_of(a, self.layout, r, config.chunk), RecordLayout.of(m, a, self.layout, config))
            for (m, a), r in zip(algorithms.items(), reducers.values(), strict=True)
        }

    # ------------------------------------------------------------------------------------------- training

    def train(self, pack: Pack, weights: Tensor, server: Params, out: Tensor, turn: Turn | None = None) -> Report:
        """Train the pack's clients from the global parameters.

        Args:
            pack: whose turn it is.
            weights: the global parameters, flat `[N]`, on any device.
            server: the server's state.
            out: an accumulator's buffer, on any device: each client's message is added to it.
            turn: when that may be done; None = at once.
        """
        return self.train_together([Share(self, pack, weights, server, out, turn or Turn())])[0]

    @staticmethod
    def train_together(shares: Sequence[Share]) -> list[Report]:
        """Train packs of several runs, whose workers share a trainer, side by side."""
        first, task = shares[0].worker, shares[0].pack.tasks[0]
        trainer, evaluator = first.trainer, first.evaluator
        began, scored = time.monotonic(), evaluator.seconds
        groups = [LaneGroup(share, trainer) for share in shares]
        with torch.random.fork_rng(devices=[trainer.net.device] if trainer.net.device.type == "cuda" else []):
            # What draws from torch's own stream trains one client at a time: dropout of the base, or deep in a method.
            torch.manual_seed(stream_seed(first.seed, "dropout", task.name, task.round))
            _Pass(groups, trainer, evaluator).run()
        trainer.trim()
        for group in groups:
            group.report.seconds = time.monotonic() - began
            group.report.scoring = evaluator.seconds - scored
        return [group.report for group in groups]

    def lane(self, task: Task, mode: str) -> Lane:
        """What a task does in its lane."""
        config, record = self.config, self.setups[mode][2]
        batches = self._batches(task)
        over_run = config.schedule_over == "run"
        start = task.schedule_from if over_run else 0
        horizon = config.horizon or (task.horizon if over_run else len(batches))
        kept = None
        if record.optimizer and task.read >= 0:
            read = functools.partial(self.stores[mode].read, task.read)
            kept = lambda a, b: read(record.state + a, record.state + b)  # noqa: E731
        return Lane(
            batches,
            [config.optim.lr_at(start + i, horizon) for i in range(len(batches))],
            stream_seed(self.seed, "dropout", task.name, task.round),
            task.steps_done,
            kept,
            functools.partial(self.is_due, task),
        )

    def is_due(self, task: Task, steps: int) -> bool:
        """Whether a client is evaluated after so many steps of its round."""
        every = self.config.every_steps
        return bool(every) and (task.steps_done + steps) % every == 0

    def _batches(self, task: Task) -> list[np.ndarray]:
        examples = self.sites.everything() if task.client < 0 else self.sites.train(task.client)
        return self.config.draw.batches(examples, stream(self.seed, "batches", task.name, task.round), task.steps)

    # ------------------------------------------------------------------------------- evaluation and the device

    def score(self, request: Scoring, weights: Tensor) -> list[Scores]:
        """Evaluate the global parameters `weights` (flat `[N]`), or the parameters that open each of the records."""
        return self.score_together([(self, request, weights)])[0]

    @staticmethod
    def score_together(asked: Sequence[tuple[Worker, Scoring, Tensor]]) -> list[list[Scores]]:
        """Evaluate what several runs ask for - (worker, request, global parameters) - like requests side by side."""
        return asked[0][0].evaluator.together(asked)

    @property
    def takes_guests(self) -> bool:
        """Whether packs of several runs can go side by side."""
        return self.trainer.stacked

    def measure(self, examples: Sequence[np.ndarray], weights: Tensor) -> Measured:
        """What a pass over these training examples (one array per lane) takes."""
        return memory.measure(self.trainer, examples, weights)

    def configure(self, engine: Engine) -> None:
        """Train like this from now on."""
        self.trainer.configure(engine)

    def shrink(self) -> None:
        """Free what lanes hold, after there was too little memory."""
        self.trainer.shrink()

    def peak(self) -> int:
        """Highest memory so far, in bytes."""
        return memory.peak(self.trainer.net.device)


class _Pass:
    """One fit of the lanes of all groups; the hooks around its steps."""

    def __init__(self, groups: Sequence[LaneGroup], trainer: Trainer, evaluator: Evaluator) -> None:
        self.groups, self.trainer, self.evaluator = groups, trainer, evaluator
        every = [(g, task, g.worker.lane(task, g.pack.mode)) for g in groups for task in g.pack.tasks]
        # Longest first; `order` are their places in the packs.
        self.order = sorted(range(len(every)), key=lambda i: -len(every[i][2].batches))
        self.owners, self.tasks, self.lanes = zip(*(every[i] for i in self.order), strict=True)
        self.whose = [(g.worker, g.pack.mode, t) for g, t in zip(self.owners, self.tasks, strict=True)]
        self.inside: dict[int, list[Row]] = {}  # metrics from inside the round, by lane
        for group in groups:
            group.lanes = [j for j, owner in enumerate(self.owners) if owner is group]
            group.tasks = [self.tasks[j] for j in group.lanes]

    def run(self) -> None:
        """Start, fit, finish, evaluate, report."""
        self.trainer.reserve(len(self.lanes))
        for group in self.groups:
            group.start()
        fit = self.trainer.fit(self.lanes, self)
        for group in self.groups:
            group.finish(fit)
        ends = [j for j in range(len(self.lanes)) if self._counts(j) and self._ends_due(j, fit.steps[j])]
        found = self.evaluator.lanes(ends, self.whose, [fit.steps[j] for j in ends])
        final = dict(zip(ends, found, strict=True))
        for j in sorted(range(len(self.lanes)), key=lambda j: self.order[j]):  # metrics in the packs' order
            self._report(j, fit, final.get(j, []))

    def adjust(self, active: int, step: int, lr_sums: Tensor) -> None:
        """See `Hooks`."""
        for group in self.groups:
            group.adjust(active, step, lr_sums)

    def after_step(self, active: int, step: int, lr_sums: Tensor, rates: Tensor) -> None:
        """See `Hooks`."""
        for group in self.groups:
            group.after_step(active, step, lr_sums, rates)

    def evaluate(self, lanes: list[int], step: int) -> None:
        """See `Hooks`."""
        for j, rows in zip(lanes, self.evaluator.lanes(lanes, self.whose, [step] * len(lanes)), strict=True):
            self.inside.setdefault(j, []).extend(rows)

    def _counts(self, j: int) -> bool:
        return self.tasks[j].client in self.owners[j].report.steps

    def _ends_due(self, j: int, steps: int) -> bool:
        return self.tasks[j].evaluate or self.owners[j].worker.is_due(self.tasks[j], steps)

    def _report(self, j: int, fit: Fit, final: list[Row]) -> None:
        """Add a lane's metrics to its run's report."""
        (_, mode, task), report, steps = self.whose[j], self.owners[j].report, fit.steps[j]
        report.computed += int(fit.computed[j])
        if not self._counts(j):
            return
        name, done = None if mode == "central" else task.name, task.steps_done + steps
        train = {"loss": (fit.losses[j] / max(1, steps), float(steps)), "tokens": (float(fit.tokens[j]), 1.0)}
        train["computed_tokens"] = (float(fit.computed[j]), 1.0)
        report.rows += self.inside.get(j, [])
        report.rows += [Row(task.round, done, mode, name, "train", n, v, w) for n, (v, w) in train.items()]
        report.rows += final
        report.tokens += int(fit.tokens[j])
