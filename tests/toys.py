"""Algorithms that use every hook, as a user's file holds them: it stands alone, and workers load its bytes."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedsim.algorithms import Algorithm, per_lane


@dataclass(frozen=True)
class Neutral(Algorithm):
    """Overrides every hook with what FedAvg does."""

    def trains(self, name, round, step):
        return True

    def travels(self, name, round):
        return True

    def resets(self, name, round):
        return False

    def start(self, c):
        return {n: t.clone() for n, t in c.params.items()}

    def scratch(self, c):
        return {n: torch.zeros(len(c.lr_sum), *t.shape).to(t) for n, t in c.params.items()}

    def at(self, params, scratch, c):
        return {n: p + scratch[n] for n, p in params.items()}

    def adjust(self, grads, params, scratch, c):
        for n, g in grads.items():
            g += scratch[n]

    def after_step(self, params, scratch, c, lr):
        for n, p in params.items():
            p += scratch[n]

    def finish(self, params, scratch, c):
        return super().finish(params, scratch, c)


@dataclass(frozen=True)
class Personal(Algorithm):
    """FedPer: some parameters stay with the clients. FedRep, with `first`: these train for so many steps, then the others."""

    own: str = "lora_B"
    first: int = 0

    def travels(self, name, round):
        return self.own not in name

    def trains(self, name, round, step):
        return not self.first or (step < self.first) == (self.own in name)


@dataclass(frozen=True)
class Alternating(Algorithm):
    """RoLoRA: one half trains and travels in odd rounds, the other one in even rounds; `fresh` optimizer state each time."""

    half: str = "lora_B"
    fresh: bool = False

    def trains(self, name, round, step):
        return (self.half in name) == (round % 2 == 1)

    def travels(self, name, round):
        return self.trains(name, round, 0)

    def resets(self, name, round):
        return self.fresh and self.trains(name, round, 0)


@dataclass(frozen=True)
class Ditto(Algorithm):
    """Beside the shared model each client trains one of its own, which is held near the shared one."""

    parts: ClassVar[tuple] = ("shared", "own")
    lam: float = 0.3

    def init(self, params):
        return {}, {f"own/{n}": p for n, p in params.items()}

    def start(self, c):
        return c.params if c.part == "shared" else c.state

    def adjust(self, grads, params, scratch, c):
        if c.part == "own":
            for n, g in grads.items():
                g += self.lam * (params[n] - c.params[n])

    def finish(self, params, scratch, c):
        return super().finish(params, scratch, c) if c.part == "shared" else ({}, params)


@dataclass(frozen=True)
class PerAvg(Algorithm):
    """First-order Per-FedAvg: the gradient of the second batch where a step on the first one leads."""

    batches: ClassVar[int] = 2
    alpha: float = 0.05

    def scratch(self, c):
        return {n: torch.zeros(len(c.lr_sum), *t.shape).to(t) for n, t in c.params.items()}

    def at(self, params, scratch, c):
        return params if c.batch == 0 else {n: p - self.alpha * scratch[n] for n, p in params.items()}

    def adjust(self, grads, params, scratch, c):
        if c.batch == 0:
            for n, g in grads.items():
                scratch[n].copy_(g)


@dataclass(frozen=True)
class ByLoss(Algorithm):
    """An update counts by the loss that the client's round began with."""

    needs: ClassVar[frozenset] = frozenset({"start_loss"})

    def finish(self, params, scratch, c):
        loss = c.facts["start_loss"]
        return {"update": {n: per_lane(loss, p) * (p - c.params[n]) for n, p in params.items()}}, {}


@dataclass(frozen=True)
class Ranked(Algorithm):
    """Clients of LoRA rank 1, 2 and 3; each gradient and each step is shifted, which must not reach what a client lacks."""

    def rank(self, client):
        return 1 + client % 3

    def adjust(self, grads, params, scratch, c):
        for g in grads.values():
            g += 1e-3 * per_lane(c.rank, g).to(g.dtype)

    def after_step(self, params, scratch, c, lr):
        for p in params.values():
            p -= 1e-3 * per_lane(lr, p)
