"""Simulated attackers: clients that send something else than what they have learned, so that robust aggregators matter.

Which clients attack is drawn by the seed. They train, are evaluated and report metrics like all others; only their message, or the
labels that they train on in federated rounds, are changed. What they send is changed before clip, codec and error feedback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.core.params import Message
from fedsim.core.seeding import stream, stream_seed
from fedsim.core.types import Task


@dataclass(frozen=True)
class Attack:
    """What attackers do.

    Attributes:
        kind: sign_flip (send minus the update) | scaled (send it times `factor`) | gaussian (send noise of standard deviation `std`)
            | label_flip (train on the class C - 1 - c instead of c).
        clients: their numbers.
        factor, std: see `kind`.
        seed: the experiment's.
        examples: with label_flip the attackers' training examples, ascending; their relabeled copies follow all other examples.
        total: examples before these copies.
    """

    kind: str
    clients: frozenset[int]
    factor: float
    std: float
    seed: int
    examples: np.ndarray
    total: int

    @property
    def relabels(self) -> bool:
        """Whether attackers train on other labels."""
        return self.kind == "label_flip"

    @property
    def whole(self) -> bool:
        """Whether messages have to be whole: noise is drawn tensor by tensor."""
        return self.kind == "gaussian"

    def seen(self, client: int, examples: np.ndarray) -> np.ndarray:
        """The examples that a client trains on in a federated round, where these are its own."""
        if not self.relabels or client not in self.clients:
            return examples
        return self.total + np.searchsorted(self.examples, examples)

    def apply(self, message: Message, tasks: Sequence[Task]) -> Message:
        """The messages `[K, ...]` of these clients as the attackers among them send them: their group `update` is another."""
        attackers = [i for i, task in enumerate(tasks) if task.client in self.clients]
        if not attackers or self.relabels or "update" not in message:
            return message
        update = {}
        for name, values in message["update"].items():
            values = values.clone()
            for i in attackers:
                values[i] = self._sent(name, values[i], tasks[i])
            update[name] = values
        return {**message, "update": update}

    def _sent(self, name: str, values: torch.Tensor, task: Task) -> torch.Tensor:
        if self.kind == "sign_flip":
            return -values
        if self.kind == "scaled":
            return self.factor * values
        draw = torch.Generator().manual_seed(stream_seed(self.seed, "attack", task.name, task.round, name))
        return (self.std * torch.randn(values.shape, generator=draw, dtype=torch.float64)).to(values)


def attackers(seed: int, clients: np.ndarray, fraction: float) -> list[int]:
    """The numbers of the clients that attack, ascending: a share of all that have examples, rounded half up."""
    count = int(fraction * len(clients) + 0.5)
    return sorted(stream(seed, "attackers").choice(clients, count, replace=False).tolist())
