"""All that a worker process needs to make its worker: base, adapter, rows and sites; it pickles, with its tensors shared."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.algorithms import Algorithm
from fedsim.core.errors import UserError
from fedsim.core.numerics import settle_cpu, use_kernels
from fedsim.core.types import Engine
from fedsim.data.partition import Partition, VirtualPartition
from fedsim.data.tokens import Tokens
from fedsim.models import adapters, base
from fedsim.models.forward import Net
from fedsim.models.probe import probe
from fedsim.models.stacked import StackedNet, StreamNet
from fedsim.models.unsuitable import Unsuitable
from fedsim.training.config import LocalTrainingConfig, Sites
from fedsim.training.scoring import Evaluator
from fedsim.training.trainer import Trainer
from fedsim.training.worker import Worker


@dataclass
class WorkerSpec:
    """All that a worker needs to make its worker; pickles as handles to shared memory."""

    model: nn.Module
    adapter: str
    settings: dict[str, Any]
    task: str
    base_dropout: bool
    autocast: torch.dtype | None
    seed: int
    tokens: dict[str, Tokens]
    train: tuple[Tensor, Tensor] | VirtualPartition
    own: tuple[Tensor, Tensor] | None
    algorithms: dict[str, Algorithm]
    recipe: LocalTrainingConfig
    state: Path
    tokenizer: Any
    masters: bool = True
    packing: bool = False
    kernels: str = "off"

    def shared(self) -> list[Tensor]:
        """Tensors of row numbers that workers share; virtual clients have none, their rows are worked out anywhere."""
        return [] if isinstance(self.train, VirtualPartition) else [*self.train, *self.own]

    def sites(self) -> Sites:
        """What a worker is told of the clients' rows; no virtual client has validation rows of its own."""
        if isinstance(self.train, VirtualPartition):
            return Sites(self.train.rows, lambda client: np.empty(0, dtype=np.int64), range(0), self.train.all_rows)
        offsets, indices = self.train
        return Sites(
            functools.partial(_rows, offsets, indices),
            functools.partial(_rows, *self.own),
            range(len(offsets) - 1),
            lambda: np.sort(indices.numpy()),
        )

    def attach(self) -> tuple[nn.Module, list[nn.Module]]:
        """Put the adapter on the base, in place."""
        keys = {"task": self.task, "seed": self.seed, "masters": self.masters}
        return adapters.attach(self.model, self.adapter, self.settings, **keys)

    def worker(self, model: nn.Module, own: list[nn.Module], device: torch.device, engine: Engine) -> Worker:
        """The worker around a model that already has its adapter."""
        model.to(device)
        net: Net | StackedNet
        if engine.packed:
            net = StackedNet(model, own, task=self.task, device=device)
        elif self.packing:
            net = StreamNet(model, own, task=self.task, device=device, autocast=self.autocast)
        else:
            net = Net(model, own, task=self.task, device=device, base_dropout=self.base_dropout, autocast=self.autocast)
        by_name = any(a.overrides("trains", "resets") for a in self.algorithms.values())
        trainer = Trainer(net, self.tokens["train"], self.recipe, by_name)
        trainer.configure(engine)
        return self._worker(trainer, Evaluator(trainer, self.tokens, self.tokenizer))

    def guest(self, host: Worker) -> Worker:
        """A worker of this run on the device and the model of another's."""
        return self._worker(host.trainer, host.evaluator)

    def _worker(self, *device: Any) -> Worker:
        return Worker(*device, self.sites(), self.algorithms, self.recipe, self.seed, self.state)

    def why_not_packed(self, model: nn.Module, own: list[nn.Module]) -> str | None:
        """Why clients cannot train in lanes, found out on the CPU; None where they can."""
        if self.adapter == "none":
            return "the whole model is trained, of which a device holds one"
        if self.base_dropout:
            return "model.base_dropout draws for all rows of a pass at once"
        return _tried(StackedNet, model, own, self.task)

    def check_packing(self, model: nn.Module, own: list[nn.Module]) -> None:
        """Whether rows of a whole model can lie end to end, found out on the CPU.

        Raises:
            UserError: if they cannot.
        """
        why = "model.base_dropout draws for padded batches" if self.base_dropout else None
        why = why or _tried(StreamNet, model, own, self.task)
        if why is not None:
            raise UserError(f"training.packing: true, but {why}; set it to false")

    def __call__(self, device: torch.device, engine: Engine) -> Worker:
        # In a worker, whose torch is as it comes: what the main process was told of kernels holds here too.
        settle_cpu() if device.type == "cpu" else use_kernels(self.kernels)
        with base.quiet():
            return self.worker(*self.attach(), device, engine)


def _tried(kind: type, model: nn.Module, own: list[nn.Module], task: str) -> str | None:
    """Why rows cannot lie end to end in a model, or None where they can."""
    try:
        net = kind(model, own, task=task, device=torch.device("cpu"))
        try:
            probe(net)
        finally:
            net.release()
    except Unsuitable as reason:
        return str(reason)
    return None


def _rows(offsets: Tensor, indices: Tensor, client: int) -> np.ndarray:
    return indices.numpy()[int(offsets[client]) : int(offsets[client + 1])]


def shareable(partition: Partition | VirtualPartition) -> tuple[Tensor, Tensor] | VirtualPartition:
    """A partition as a worker spec holds it: `offsets`, `indices`; or itself, where rows are worked out anywhere."""
    if isinstance(partition, VirtualPartition):
        return partition
    return torch.tensor(partition.offsets), torch.tensor(partition.indices)
