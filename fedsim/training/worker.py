"""A worker: trains the packs of a run on a device. Start, fit, finish; several runs can share a trainer, and a pass of it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms import Algorithm
from fedsim.channel import downlink, uplink
from fedsim.core.params import Params
from fedsim.core.seeding import stream, stream_seed
from fedsim.core.types import ROOT, Engine, Measured, Pack, Report, Scores, Scoring, Share, Task, Turn
from fedsim.data.batches import BatchSampler
from fedsim.models import fold
from fedsim.training import memory
from fedsim.training.config import LocalTrainingConfig, Sites
from fedsim.training.lanes import LaneGroup
from fedsim.training.packs import RunPack, Setup
from fedsim.training.passes import Pass
from fedsim.training.private import PrivateLane
from fedsim.training.records import stores_of
from fedsim.training.scoring import Evaluator
from fedsim.training.trainer import Lane, Trainer


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
        most = config.max_norm if clips else None
        self.uplink = uplink(config.up, config.error_feedback, most, config.private, config.filters)
        self.stores = stores_of(state, algorithms, self.layout, config)
        self.setups = {m: Setup.of(m, a, self.layout, config, self.stores[m]) for m, a in algorithms.items()}

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
        packs = [RunPack(share) for share in shares]
        with torch.random.fork_rng(devices=[trainer.net.device] if trainer.net.device.type == "cuda" else []):
            # What draws from torch's own stream trains one client at a time: dropout of the base, or deep in a method.
            torch.manual_seed(stream_seed(first.seed, "dropout", *task.stream))
            # A client's last part first: the first part closes the client's round.
            groups = [LaneGroup(p, part, trainer) for p in packs for part in reversed(p.algorithm.parts)]
            if len(shares) > 1 and any(fold.of_state(share.server) for share in shares):
                raise ValueError("runs that fold into their base cannot go together")  # they are done again one by one
            for side_by_side in [groups] if trainer.stacked else [[group] for group in groups]:
                with fold.folded(trainer.net.model, shares[0].server):
                    Pass(side_by_side, trainer, evaluator).run()
        trainer.trim()
        for pack in packs:
            pack.report.seconds = time.monotonic() - began
            pack.report.scoring = evaluator.seconds - scored
        return [pack.report for pack in packs]

    def lane(self, task: Task, mode: str, part: int = 0) -> Lane:
        """What one part of a task does in its lane."""
        config, setup = self.config, self.setups[mode]
        algorithm, record, store = setup.algorithm, setup.record, setup.store
        front, over_run = algorithm.first_steps, config.schedule_over == "run"
        draws = [self._batches(task, mode, 0 if algorithm.same_batch else i, front) for i in range(algorithm.batches)]
        steps = len(draws[0]) - front
        start = task.schedule_from if over_run else 0
        horizon = config.horizon or (task.horizon if over_run else steps)
        kept, done, fresh = None, task.steps_done, None
        lives_on = config.keep_state[mode] or algorithm.parts[part] in algorithm.lives_on
        if record.optimizer and task.read >= 0 and lives_on:
            at = record.optimizer_at(part)
            kept = lambda a, b: store.read(task.read, at + a, at + b)  # noqa: E731
            if record.counts:
                done = kept(record.optimizer - record.counts, record.optimizer).numpy().astype(np.int64)
        if algorithm.overrides("resets"):
            fresh = np.array([algorithm.resets(name, task.round) for name in self.layout.shapes])
        return Lane(
            list(zip(*draws, strict=True)),
            [config.optim.lr_at(start + max(0, i), horizon) for i in range(-front, steps)],
            stream_seed(self.seed, "dropout", *task.stream),
            done,
            kept,
            functools.partial(self.is_due, task),
            fresh,
            self._private(task, mode),
        )

    def _private(self, task: Task, mode: str) -> PrivateLane | None:
        """What DP-SGD does in a client's lane."""
        private, rows = self.config.examples, self.examples_of(task, mode)
        if private is None or mode != "federated" or not len(rows):
            return None
        seed = functools.partial(stream_seed, self.seed, "example noise", *task.stream)
        return private.lane(self.config.draw.rate(len(rows)) * len(rows), seed)

    def is_due(self, task: Task, steps: int) -> bool:
        """Whether a client is evaluated after so many steps of its round."""
        every = self.config.every_steps
        return bool(every) and (task.steps_done + steps) % every == 0

    def _batches(self, task: Task, mode: str, draw: int, front: int) -> list[np.ndarray]:
        """Examples of each step, a function of (seed, client, round).

        Args:
            task, mode: the client's work.
            draw: which of several batches of a step.
            front: steps in front of the round's own.
        """
        which = [draw] if draw else []
        if front:
            rng = stream(self.seed, "first batches", *task.stream, *which)
            first = self._draw(mode).batches(self.examples_of(task, mode), rng, front)
            return [*first, *self._batches(task, mode, draw, 0)]
        rng = stream(self.seed, "batches", *task.stream, *which)
        return self._draw(mode).batches(self.examples_of(task, mode), rng, task.steps)

    def _draw(self, mode: str) -> BatchSampler:
        """How batches are drawn: under DP-SGD each example by itself, which epsilon rests on."""
        private = self.config.examples is not None and mode == "federated"
        return dataclasses.replace(self.config.draw, poisson=True) if private else self.config.draw

    def examples_of(self, task: Task, mode: str) -> np.ndarray:
        """A client's training examples."""
        if task.client == ROOT:
            assert self.config.root is not None, "the server has examples of its own"
            return self.config.root
        if task.client < 0:
            return self.sites.everything()
        held, attack = self.sites.train(task.client), self.config.attack
        return held if attack is None or mode != "federated" else attack.seen(task.client, held)

    # ------------------------------------------------------------------------------- evaluation and the device

    def score(self, request: Scoring, weights: Tensor, server: Params | None = None) -> list[Scores]:
        """Evaluate the global parameters `weights` (flat `[N]`), or the parameters that open each of the records."""
        with fold.folded(self.trainer.net.model, {} if request.records else server or {}):
            return self.score_together([(self, request, weights)])[0]

    @staticmethod
    def score_together(asked: Sequence[tuple[Worker, Scoring, Tensor]]) -> list[list[Scores]]:
        """Evaluate what several runs ask for - (worker, request, global parameters) - like requests side by side."""
        return asked[0][0].evaluator.together(asked)

    @property
    def takes_guests(self) -> bool:
        """Whether packs of several runs can go side by side."""
        return self.trainer.stacked and not any(a.lora for a in self.algorithms.values())

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
