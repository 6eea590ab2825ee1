"""SCAFFOLD: S. P. Karimireddy, S. Kale, M. Mohri, S. J. Reddi, S. U. Stich, A. T. Suresh. SCAFFOLD: Stochastic Controlled
Averaging for Federated Learning. ICML 2020 (arXiv:1910.06378), algorithm 1. A client k corrects each step by the difference of
the server's and its own control variate, y -= eta (g + c - c_k), and sets after its last step (option II)

    c_k' = c_k - c + (x - y) / (K eta)

The server sets x += eta_g mean_k (y - x) and c += 1 / N sum_k (c_k' - c_k).

Deviations:
- K eta is the sum of the learning rates that were used, so schedules are allowed.
- Clients may have weights: c is the weighted mean of all c_k, with the weights of the mean of updates, so
  c += sum_k w_k (c_k' - c_k) / (sum of the weights of all clients). Uniform weights give the paper's rule.
- correction = null: before under SGD, after under adaptive optimizers.
- correction = after: the step is the optimizer's own, then y -= eta (c - c_k). For plain SGD it is the paper's step; under
  AdamW the variates are in units of its steps, and its moments stay free of corrections (Li et al., NIID-Bench, ICDE 2022).
- correction = before: the raw gradient is corrected before clipping and moments, and c_k' is the mean raw gradient of the
  round, which for plain SGD is option II. Never mixed with displacements, whose units are others.
- Moments that clients keep still hold the corrections of earlier rounds, under before.

Peers:
- NIID-Bench, NVFlare and OpenFedLLM: as after, whatever the optimizer.
- declearn: as before, but its server divides by the clients seen so far in place of all.
- NVFlare: clients and variates are weighted by steps alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsim.algorithms.base import Algorithm, ClientView, Info, Server, per_lane

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class Scaffold(Algorithm):
    """Control variates against client drift (Karimireddy et al., 2020)."""

    aggregates: ClassVar[Mapping[str, Any]] = {"update": "mean", "control": "sum"}
    sends_state: ClassVar[bool] = True

    correction: Literal["after", "before"] | None = None
    """Correct the parameters `after` the optimizer's step, or the gradient `before` it; for plain SGD without clipping both are the paper's. null = before under local.optimizer=sgd, after under adamw."""
    server_lr: float = 1.0
    """Learning rate of the server on the mean update."""

    def __post_init__(self) -> None:
        if not 0 < self.server_lr < math.inf:
            raise ValueError(f"server_lr: {self.server_lr} is not a number above 0")

    def before(self, c: ClientView) -> bool:
        """Whether gradients are corrected, in place of parameters."""
        return (self.correction or ("before" if c.optim.optimizer == "sgd" else "after")) == "before"

    def init(self, params: Params) -> tuple[Params, Params]:
        """c = 0 and c_k = 0."""
        zeros = {n: p.new_zeros(p.shape) for n, p in params.items()}
        return zeros, dict(zeros)

    def scratch(self, c: ClientView) -> Params:
        """The sum of the round's raw gradients, where these are corrected."""
        return {n: t.new_zeros(t.shape) for n, t in c.state.items()} if self.before(c) else {}

    def adjust(self, grads: Params, params: Params, scratch: Params, c: ClientView) -> None:
        """g += c - c_k."""
        if self.before(c):
            for name, grad in grads.items():
                scratch[name].add_(grad)
                grad.add_(c.server[name] - c.state[name])

    def after_step(self, params: Params, scratch: Params, c: ClientView, lr: Tensor) -> None:
        """y -= eta (c - c_k)."""
        if not self.before(c):
            for name, param in params.items():
                param.sub_(per_lane(lr, param) * (c.server[name] - c.state[name]))

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """(y - x, c_k' - c_k), c_k'; a client that took no step, or only steps of rate 0, keeps its c_k."""
        update = {n: p - c.params[n] for n, p in params.items()}
        before = self.before(c)
        state: Params = {}
        for name, own in c.state.items():
            rates = per_lane(c.lr_sum, own)
            if before:
                new = scratch[name] / per_lane(c.steps, own).clamp(min=1)
            else:
                new = own - c.server[name] - update[name] / rates.where(rates > 0, 1.0)
            state[name] = new.where(rates > 0, own)
        return {"update": update, "control": {n: t - c.state[n] for n, t in state.items()}}, state

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """x += eta_g mean update; c += sum_k w_k (c_k' - c_k) / (weight of all clients)."""
        params = {n: x + self.server_lr * reduced["update"][n] for n, x in server.params.items()}
        return Server(params, {n: server.state[n] + c / info.all_weight for n, c in reduced["control"].items()})
