"""One client at a time on one device: a plain loop over a resident base, whose adapter is refilled for every client.

All trained tensors are views of one flat vector, so starting a client is one copy, an optimiser step one call, and its
update one subtraction, whatever the method and the number of tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators import Partial, WeightedMean
from fedsim.algorithms import Algorithm, Context
from fedsim.data.batches import Draw, collate
from fedsim.data.tokens import Tokens
from fedsim.evaluation import score_rows, to_scores
from fedsim.models.adapters import trained
from fedsim.models.forward import Net
from fedsim.params import Layout, Params
from fedsim.seeding import stream, stream_seed
from fedsim.store import Store
from fedsim.training.optim import FlatOptimizer, Optim
from fedsim.types import Pack, Report, Row, Scores, Scoring, Task


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


def stores_of(folder: Path, algorithms: dict[str, Algorithm], params: Params, recipe: Recipe) -> dict[str, Store]:
    """Mode -> file of client state, one record a client: the algorithm's state, then the moments where they are kept.

    A record of width 0 means that the mode keeps nothing. Where nothing is merged, `best-<mode>` holds the parameters of
    each client's chosen model.
    """
    size = sum(p.numel() for p in params.values())
    dtype = next(iter(params.values())).dtype
    out = {}
    for mode, algorithm in algorithms.items():
        state = sum(t.numel() for t in algorithm.init(params)[1].values())
        moments = recipe.optim.num_moments * size if recipe.keep_state[mode] else 0
        out[mode] = Store(folder / f"{mode}.bin", state + moments, dtype)
        if not algorithm.merges:
            out[f"best-{mode}"] = Store(folder / f"best-{mode}.bin", size, dtype)
    return out


@dataclass(frozen=True)
class Sites:
    """Rows by client: `train(c)` and, of the validation split, `own(c)`; row numbers, int64."""

    train: Callable[[int], np.ndarray]
    own: Callable[[int], np.ndarray]
    count: int


class SoloTrainer:
    """Trains the tasks of a pack one after another.

    Args:
        net: the model on its device.
        tokens: split -> arrays.
        sites: which rows belong to whom.
        algorithms: mode -> algorithm.
        recipe: how to train.
        seed: the experiment's.
        state: folder of the files that hold client state.
        tokenizer: for generation.
    """

    def __init__(
        self,
        net: Net,
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
        params = trained(net.model)
        self.layout = Layout.of(params)
        self.flat = self.layout.fill(self.layout.empty(net.device), {n: p.detach() for n, p in params.items()})
        self.grad = self.layout.empty(net.device)
        self.params, self.grads = self.layout.views(self.flat), self.layout.views(self.grad)
        for name, parameter in params.items():
            parameter.data = self.params[name]
            parameter.grad = self.grads[name]
        self.optimizer = FlatOptimizer(recipe.optim, self.flat, self.grad)
        self.aggregator = WeightedMean(self.layout)
        self.stores = stores_of(state, algorithms, self.params, recipe)

    # ------------------------------------------------------------------------------------------- training

    def train(
        self,
        pack: Pack,
        weights: Tensor,
        server: Params,
        out: Tensor,
        on_task: Callable[[Task], None] = lambda task: None,
    ) -> Report:
        """Train the pack's clients from the global parameters.

        Args:
            pack: whose turn it is.
            weights: the global parameters, flat `[N]`, on this device.
            server: the server's state.
            out: buffer `[N]` for the weighted sum of the updates.
            on_task: called before each client, so that an error can be told whose it is.
        """
        began = time.monotonic()
        algorithm = self.algorithms[pack.mode]
        partial = self.aggregator.zero(out) if algorithm.merges else Partial(out)
        report = Report(pack.index)
        for task in pack.tasks:
            on_task(task)
            self._train_client(task, pack, algorithm, weights, server, partial, report)
        report.weight = partial.weight
        report.seconds = time.monotonic() - began
        return report

    def _train_client(
        self,
        task: Task,
        pack: Pack,
        algorithm: Algorithm,
        weights: Tensor,
        server: Params,
        partial: Partial,
        report: Report,
    ) -> None:
        recipe, mode = self.recipe, pack.mode
        views = self.layout.views(weights)
        template = algorithm.init(views)[1]
        state, moments = self._load(task, mode, template)
        ctx = Context(task.round, views, server, state if state is not None else template)
        self.layout.fill(self.flat, algorithm.start(ctx))
        kept = recipe.keep_state[mode]
        self.optimizer.reset(task.steps_done, moments if kept else None)

        rows = self._rows(task)
        batches = recipe.draw.batches(rows, stream(self.seed, "batches", task.name, task.round), task.steps)
        horizon = recipe.horizon or (task.horizon if recipe.schedule_over == "run" else len(batches))
        start = task.schedule_from if recipe.schedule_over == "run" else 0
        adjusts = type(algorithm).adjust_grads is not Algorithm.adjust_grads
        loss, tokens, done = torch.zeros((), dtype=torch.float64, device=self.net.device), 0, task.steps_done
        with torch.random.fork_rng(devices=[self.net.device] if self.net.device.type == "cuda" else []):
            torch.manual_seed(stream_seed(self.seed, "dropout", task.name, task.round))
            self.net.train(True)
            for i, batch in enumerate(batches):
                step_loss, step_tokens = self._backward(batch)
                if adjusts:
                    algorithm.adjust_grads(self.grads, self.params, ctx)
                self.optimizer.step(recipe.optim.lr_at(start + i, horizon))
                loss += step_loss
                tokens += step_tokens
                done += 1
                inside = recipe.every_steps and done % recipe.every_steps == 0 and i + 1 < len(batches)
                if inside:
                    report.rows += self._score_rows(task, mode, done)
                    self.net.train(True)
        update, state = algorithm.client_update(self.params, ctx)
        if algorithm.merges:
            self.aggregator.add(partial, update, task.weight)
        if task.write >= 0:
            self._save(task, mode, state, kept)
        report.steps[task.client] = len(batches)
        report.tokens += tokens
        name = None if mode == "central" else task.name
        mean = float(loss) / max(1, len(batches))
        report.rows.append(Row(task.round, done, mode, name, "train", "loss", mean, float(len(batches))))
        report.rows.append(Row(task.round, done, mode, name, "train", "tokens", float(tokens)))
        if pack.evaluate or (recipe.every_steps and done % recipe.every_steps == 0):
            report.rows += self._score_rows(task, mode, done)

    def _backward(self, batch: np.ndarray) -> tuple[Tensor, int]:
        """Gradient of the mean loss over all answer tokens of a batch, into `self.grad`; (that loss, tokens trained on)."""
        tokens, size = self.tokens["train"], self.recipe.micro_batch
        self.grad.zero_()
        if size < len(batch):  # like lengths together: less padding, the same sum
            batch = batch[np.argsort(tokens.lengths_of(batch), kind="stable")]
        micro = [collate(tokens, batch[i : i + size]) for i in range(0, len(batch), size)]
        answers = sum(len(m.targets) for m in micro)
        loss: Tensor | float = 0.0
        for part in micro:
            mean = self.net.loss_sum(part.to(self.net.device)) / answers
            mean.backward()
            loss = loss + mean.detach()
        return loss, int(sum(int(m.lengths.sum()) for m in micro))

    def _rows(self, task: Task) -> np.ndarray:
        if task.client < 0:
            return np.sort(np.concatenate([self.sites.train(c) for c in range(self.sites.count)]))
        return self.sites.train(task.client)

    def _load(self, task: Task, mode: str, template: Params) -> tuple[Params | None, Tensor | None]:
        if task.read < 0:
            return None, None
        record = self.stores[mode].read(task.read).to(self.net.device)
        layout = Layout.of(template) if template else None
        size = layout.numel if layout else 0
        state = layout.views(record[:size]) if layout else {}
        moments = record[size:] if record.numel() > size else None
        return state, moments

    def _save(self, task: Task, mode: str, state: Params, kept: bool) -> None:
        parts = [t.reshape(-1) for t in state.values()]
        self.stores[mode].write(task.write, *parts, *(self.optimizer.moments if kept else []))

    # -------------------------------------------------------------------------------------------- scoring

    def _score_rows(self, task: Task, mode: str, step: int) -> list[Row]:
        """Rows of the client's model as it is, on the shared validation rows and on the site's own."""
        own = {task.client: self.sites.own(task.client)} if task.client >= 0 else {}
        scores = self._score("validation", self.recipe.generate, own)
        name = None if mode == "central" else task.name
        out = [Row(task.round, step, mode, name, "validation", n, v, w) for n, (v, w) in scores.values.items()]
        for values in scores.sites.values():
            out += [Row(task.round, step, mode, name, "site", n, v, w) for n, (v, w) in values.items()]
        return out

    def _score(self, split: str, generate: bool, own: dict[int, np.ndarray]) -> Scores:
        tokens = self.tokens[split]
        tokenizer = self.tokenizer if generate else None
        rows = score_rows(
            self.net,
            tokens,
            batch_size=self.recipe.eval_batch,
            tokenizer=tokenizer,
            max_new_tokens=self.recipe.max_new_tokens,
        )
        return to_scores(rows, tokens, own)

    def score(self, request: Scoring, weights: Tensor) -> Scores:
        """Score the global parameters `weights` (flat `[N]`), or those that open a record."""
        if request.record >= 0:
            weights = self.stores[request.store].read(request.record)[: self.layout.numel]
        self.flat.copy_(weights)
        own = {c: self.sites.own(c) for c in range(self.sites.count)} if request.sites else {}
        return self._score(request.split, request.generate, own)
