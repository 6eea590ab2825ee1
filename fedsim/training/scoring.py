"""Evaluates models on a device: lanes in the middle of training, global parameters, and models in client records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Size, Tensor

from fedsim.core.errors import is_out_of_memory
from fedsim.core.heartbeat import beat
from fedsim.core.types import Row, Scores, Scoring, Task
from fedsim.data.tokens import Tokens
from fedsim.training.evaluation import score_rows, to_scores
from fedsim.training.records import START
from fedsim.training.trainer import Trainer

if TYPE_CHECKING:
    from fedsim.training.worker import Worker


@dataclass(frozen=True)
class Model:
    """A model to evaluate: a run's global parameters, or a record's."""

    worker: Worker
    request: Scoring
    weights: Tensor
    record: int | None

    def read(self, start: int, stop: int) -> Tensor:
        """A stretch of its parameters, `[stop - start]`."""
        if self.record is None:
            return self.weights[start:stop]
        store = self.worker.stores[self.request.store]
        if not self.request.owned:
            return store.read(self.record, start, stop)
        out = self.weights[start:stop].clone()
        held = self.worker.setups[self.request.store].record
        for name, shape in self.worker.layout.shapes.items():
            at, size = held.places[name], Size(shape).numel()
            begin, end = max(start, at), min(stop, at + size)
            if name in held.own and begin < end:
                place = held.own[name] - at
                found = (
                    self.worker.stores[START].read(0, begin, end)
                    if self.record < 0
                    else store.read(self.record, place + begin, place + end)
                )
                out[begin - start : end - start] = found.to(out)
        return out

    def own(self) -> dict[int, np.ndarray]:
        """Client -> its own validation examples, where they are asked for."""
        sites = self.worker.sites
        return {c: sites.own(c) for c in sites.with_own} if self.request.sites else {}

    @property
    def kind(self) -> tuple[str, bool, bool]:
        """What models in one pass have to agree in."""
        return self.request.split, self.request.generate, self.request.by_row


class Evaluator:
    """Evaluates models on the device of a trainer.

    Args:
        trainer: whose model and lanes are used.
        tokens: split -> arrays.
        tokenizer: for generation.

    Attributes:
        seconds: spent on lanes so far.
    """

    def __init__(self, trainer: Trainer, tokens: dict[str, Tokens], tokenizer: Any) -> None:
        self.trainer, self.tokens, self.tokenizer, self.seconds = trainer, tokens, tokenizer, 0.0

    def score(
        self,
        weights: Tensor,
        split: str,
        generate: bool,
        own: Sequence[dict[int, np.ndarray]],
        by_row: bool = False,
        lanes: Sequence[int] | None = None,
    ) -> list[Scores]:
        """Scores of each row of `weights`, `[K, N]`, or of these rows; `own`: client -> examples to sum up apart, for each."""
        net, config, tokens = self.trainer.net, self.trainer.config, self.tokens[split]
        net.bind(weights, None)
        found = score_rows(
            net,
            tokens,
            len(weights),
            batch_size=config.eval_batch,
            tokenizer=self.tokenizer if generate else None,
            max_new_tokens=config.max_new_tokens,
            wanted=lanes,
        )
        return [to_scores(r, tokens, o, by_row) for r, o in zip(found, own, strict=True)]

    def lanes(
        self, weights: Tensor, lanes: Sequence[int], whose: Sequence[tuple[Worker, str, Task]], steps: Sequence[int]
    ) -> list[list[Row]]:
        """Metrics of the models in these lanes, on the shared validation examples and on each client's own.

        The pass takes all lanes that train, also where only some are due: how many go through a pass decides the last bits,
        and with another evaluation frequency others are due.

        Args:
            weights: the models of all lanes, `[K, N]`.
            lanes: those due.
            whose: run, mode and task of every lane.
            steps: optimizer steps of the round, of each lane that is due.
        """
        if not lanes:
            return []
        device = self.trainer.net.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # training that is under way is not evaluation
        began = time.monotonic()
        own = [{t.client: w.sites.own(t.client)} if t.client >= 0 else {} for w, _, t in (whose[j] for j in lanes)]
        generate = self.trainer.config.generate
        found = self.score(weights, "validation", generate, own, lanes=lanes)
        out = []
        for j, n, scores in zip(lanes, steps, found, strict=True):
            _, mode, task = whose[j]
            name, step = None if mode == "central" else task.name, task.steps_done + n
            rows = [Row(task.round, step, mode, name, "validation", n, v, w) for n, (v, w) in scores.values.items()]
            for values in scores.sites.values():
                rows += [Row(task.round, step, mode, name, "site", n, v, w) for n, (v, w) in values.items()]
            out.append(rows)
        self.seconds += time.monotonic() - began
        return out

    def together(self, asked: Sequence[tuple[Worker, Scoring, Tensor]]) -> list[list[Scores]]:
        """Scores of what several runs ask for - (worker, request, global parameters) - like requests side by side."""
        out: list[list[Scores]] = [[] for _ in asked]
        groups: dict[tuple[str, bool, bool], list[tuple[int, Model]]] = {}
        for i, (worker, request, weights) in enumerate(asked):
            for record in request.records or (None,):
                model = Model(worker, request, weights, record)
                groups.setdefault(model.kind, []).append((i, model))
        # No more side by side than have trained so, or than one run asks for: their memory is known to be there.
        most = max(len(self.trainer.flat), *(len(request.records) for _, request, _ in asked))
        for models in groups.values():
            for begin in range(0, len(models), most):
                part = models[begin : begin + most]
                for (i, _), scores in zip(part, self._models([m for _, m in part]), strict=True):
                    out[i].append(scores)
        return out

    def _models(self, models: Sequence[Model]) -> list[Scores]:
        """Scores of models of one kind, halved where memory is too little."""
        half, trainer = len(models) // 2, self.trainer
        (split, generate, by_row), n = models[0].kind, trainer.layout.numel
        if half == 0 or trainer.stacked:
            try:
                if trainer.stacked:
                    weights = torch.stack([m.read(0, n).to(trainer.net.device) for m in models])
                else:  # a model that may be large, copied in pieces to where it would be trained
                    weights = trainer.flat[:1]
                    for chunk in trainer.layout.chunks(trainer.config.chunk):
                        beat()
                        weights[0, chunk.span].copy_(models[0].read(chunk.start, chunk.stop))
                return self.score(weights, split, generate, [m.own() for m in models], by_row)
            except Exception as error:
                if half == 0 or not is_out_of_memory(error):
                    raise
        return [s for part in (models[:half], models[half:]) for s in self._models(part)]
