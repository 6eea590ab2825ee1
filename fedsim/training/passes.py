"""A pass: one fit of the lanes of several runs and parts, and what is measured of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedsim.core.types import ROOT, Row
from fedsim.models import fold
from fedsim.training.lanes import LaneGroup
from fedsim.training.scoring import Evaluator
from fedsim.training.trainer import Fit, Trainer


class Pass:
    """One fit of the lanes of all groups.

    Args:
        groups: of one run or of several; parts of a run side by side, its first part last.
        trainer, evaluator: of the device.
    """

    def __init__(self, groups: Sequence[LaneGroup], trainer: Trainer, evaluator: Evaluator) -> None:
        self.groups, self.trainer, self.evaluator = groups, trainer, evaluator
        every = [
            (g, task, g.run.worker.lane(task, g.run.pack.mode, g.number)) for g in groups for task in g.run.pack.tasks
        ]
        # Longest first; `order` are their places in the packs.
        self.order = sorted(range(len(every)), key=lambda i: -len(every[i][2].batches))
        self.owners, self.tasks, self.lanes = zip(*(every[i] for i in self.order), strict=True)
        self.whose = [(g.run.worker, g.run.pack.mode, t) for g, t in zip(self.owners, self.tasks, strict=True)]
        self.inside: dict[int, list[Row]] = {}  # metrics from inside the round, by lane
        if len({group.batches for group in groups}) > 1:  # what fails together is done again run by run
            raise ValueError("runs whose algorithms draw different numbers of batches for a step cannot go together")
        for group in groups:
            lanes = [j for j, owner in enumerate(self.owners) if owner is group]
            group.take(lanes, [self.tasks[j] for j in lanes], [self.lanes[j].private for j in lanes])

    def run(self) -> None:
        """Start, fit, finish, evaluate, report."""
        self.trainer.reserve(len(self.lanes))
        self._measure()
        for group in self.groups:
            group.start()
        with fold.beside(self.trainer.net, self.groups[0].beside):  # of one run: those that use it take no guests
            fit = self.trainer.fit(self.lanes, self.groups, self.evaluate)
            for group in self.groups:
                group.judge(fit)
            for group in self.groups:
                group.finish(fit)
            ends = [j for j in range(len(self.lanes)) if self._is_own(j) and self._counts(j) and self._ends_due(j, fit)]
            found = self._score(ends, [fit.steps[j] for j in ends])
        final = dict(zip(ends, found, strict=True))
        for j in sorted(range(len(self.lanes)), key=lambda j: self.order[j]):  # metrics in the packs' order
            self._report(j, fit, final.get(j, []))

    def _measure(self) -> None:
        """The facts that algorithms need."""
        if any("start_loss" in group.run.algorithm.needs for group in self.groups):
            for group in self.groups:
                group.receive()
            loss = self.trainer.losses([worker.examples_of(task, mode) for worker, mode, task in self.whose])
            for group in self.groups:
                group.facts["start_loss"] = loss[group.lanes]
        for group in self.groups:
            if "optimizer_steps" in group.run.algorithm.needs:
                kept = [0 if lane.optimizer_state is None else np.max(lane.steps_done) for lane in self.lanes]
                group.facts["optimizer_steps"] = torch.tensor([kept[j] for j in group.lanes], device=group.device)

    def evaluate(self, lanes: list[int], step: int) -> None:
        """Evaluate those of these lanes that are due, in the middle of the round."""
        lanes = [j for j in lanes if self._is_own(j)]
        for j, rows in zip(lanes, self._score(lanes, [step] * len(lanes)), strict=True):
            self.inside.setdefault(j, []).extend(rows)

    def _score(self, lanes: Sequence[int], steps: Sequence[int]) -> list[list[Row]]:
        """Metrics of these lanes; clients with scales alpha / r_k of their own are scored with these."""
        weights = self.trainer.flat[: len(self.lanes)]
        scaled = [group for group in self.groups if group.ranks is not None] if lanes else []
        if scaled:
            weights, none = weights.clone(), torch.zeros(len(self.lanes), device=weights.device)
            for group in scaled:
                group.at(weights, len(self.lanes), 0, none, 0)
        return self.evaluator.lanes(weights, lanes, self.whose, steps)

    # ------------------------------------------------------------------------------------------------ metrics

    def _is_own(self, j: int) -> bool:
        """Whether a lane has the model that its client calls its own: that of the last part."""
        group = self.owners[j]
        return group.number == len(group.run.algorithm.parts) - 1

    def _counts(self, j: int) -> bool:
        return self.owners[j].run.counts(self.tasks[j].client)

    def _ends_due(self, j: int, fit: Fit) -> bool:
        return self.tasks[j].evaluate or self.owners[j].run.worker.is_due(self.tasks[j], fit.steps[j])

    def _report(self, j: int, fit: Fit, final: list[Row]) -> None:
        """Add a lane's metrics to its run's report."""
        (_, mode, task), report, steps = self.whose[j], self.owners[j].run.report, fit.steps[j]
        report.computed += int(fit.computed[j])
        if not self._counts(j):
            return
        report.tokens += int(fit.tokens[j])
        if not self._is_own(j) or task.client == ROOT:
            return
        name, done = None if mode == "central" else task.name, task.steps_done + steps
        train = {"loss": (fit.losses[j] / max(1, steps), float(steps)), "tokens": (float(fit.tokens[j]), 1.0)}
        train["computed_tokens"] = (float(fit.computed[j]), 1.0)
        report.rows += self.inside.get(j, [])
        report.rows += [Row(task.round, done, mode, name, "train", n, v, w) for n, (v, w) in train.items()]
        report.rows += final
