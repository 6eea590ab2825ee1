"""pFedMe: C. T. Dinh, N. H. Tran, T. D. Nguyen. Personalized Federated Learning with Moreau Envelopes. NeurIPS 2020
(arXiv:2006.08848), algorithm 1. For each batch D a client finds its own model near w by a few inner steps,

    theta ~ argmin f(theta; D) + lam / 2 |theta - w|^2,  then  w -= eta lam (w - theta)

and the server sets x = (1 - beta) x + beta mean_k(w_k).

Deviations:
- Inner steps are plain gradient steps of rate local.lr from theta = w.
- The outer gradient lam (w - theta) goes through local.optimizer and gradient clipping; local.optimizer = sgd is the paper's.
- The client's own model is the theta of its last batch.

Peers: PFLlib adds a weight decay to the inner steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsim.algorithms.base import Algorithm, ClientView, Info, Server, above_zero

if TYPE_CHECKING:
    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class PFedMe(Algorithm):
    """Own models by Moreau envelopes (Dinh et al., 2020)."""

    same_batch: ClassVar[bool] = True

    lam: float = 15.0
    """Weight of lam / 2 |theta - w|^2."""
    inner_steps: int = 5
    """Inner steps for each batch."""
    beta: float = 1.0
    """How far the server goes towards the mean."""

    def __post_init__(self) -> None:
        above_zero(self, "lam")
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps: {self.inner_steps} is not a number of at least 1")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta: {self.beta} is not a number above 0")

    @property
    def batches(self) -> int:  # type: ignore[override]
        """A gradient for each inner step."""
        return self.inner_steps

    def init(self, params: Params) -> tuple[Params, Params]:
        """The client's own model."""
        return {}, {f"own/{n}": p for n, p in params.items()}

    def scratch(self, c: ClientView) -> Params:
        """theta."""
        return {n: p.new_zeros(len(c.lr_sum), *p.shape) for n, p in c.params.items()}

    def at(self, params: Params, scratch: Params, c: ClientView) -> Params:
        """theta, which begins at w."""
        if c.batch == 0:
            for name, param in params.items():
                scratch[name].copy_(param)
        return scratch

    def adjust(self, grads: Params, params: Params, scratch: Params, c: ClientView) -> None:
        """theta -= eta (g + lam (theta - w)); after the last inner step the gradient is lam (w - theta)."""
        for name, grad in grads.items():
            theta = scratch[name]
            theta.sub_(c.optim.lr * (grad + self.lam * (theta - params[name])))
            if c.batch == self.inner_steps - 1:
                grad.copy_(self.lam * (params[name] - theta))

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """w_k - x, and theta."""
        return super().finish(params, scratch, c)[0], {f"own/{n}": theta for n, theta in scratch.items()}

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """x += beta mean update."""
        return Server({n: p + self.beta * reduced["update"][n] for n, p in server.params.items()}, server.state)
