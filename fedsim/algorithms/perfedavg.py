"""Per-FedAvg: A. Fallah, A. Mokhtari, A. Ozdaglar. Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
Meta-Learning Approach. NeurIPS 2020 (arXiv:2002.07948), algorithm 1, first order. Each step draws two batches D and D':

    w' = w - alpha grad f(w; D),  w -= beta grad f(w'; D')

and the server averages. The global model is the start from which a client's own is one step away.

Deviations:
- First order alone: the Hessian's term is left out.
- beta is local.lr, of local.optimizer; the loss that is logged is the mean of both batches'.
- A client's own model, which is scored and exported, is one step w - alpha grad f(w; D) from the global one, on a batch of its own that no
  round has drawn.

Peers: PFLlib is first order too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsim.algorithms.base import Algorithm, ClientView, Local, above_zero

if TYPE_CHECKING:
    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class OneStep(Local):
    """w - alpha grad f(w; D), whatever the optimizer."""

    alpha: float

    def start(self, c: ClientView) -> Params:
        """The global model."""
        return c.params

    def scratch(self, c: ClientView) -> Params:
        """The gradient."""
        return {n: p.new_zeros(len(c.lr_sum), *p.shape) for n, p in c.params.items()}

    def adjust(self, grads: Params, params: Params, scratch: Params, c: ClientView) -> None:
        """Keep it."""
        for name, grad in grads.items():
            scratch[name].copy_(grad)

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """(nothing to send, the model one step away)."""
        return {}, {n: p - self.alpha * scratch[n] for n, p in c.params.items()}


@dataclass(frozen=True, kw_only=True)
class PerFedAvg(Algorithm):
    """Meta-learning of a start for every client (Fallah et al., 2020)."""

    batches: ClassVar[int] = 2

    alpha: float = 0.01
    """Rate of the inner step, on the first batch."""

    def __post_init__(self) -> None:
        above_zero(self, "alpha")

    def adapted(self) -> Algorithm:
        """One inner step."""
        return OneStep(alpha=self.alpha)

    def scratch(self, c: ClientView) -> Params:
        """The gradient of the first batch."""
        return {n: p.new_zeros(len(c.lr_sum), *p.shape) for n, p in c.params.items()}

    def at(self, params: Params, scratch: Params, c: ClientView) -> Params:
        """w, then w - alpha grad f(w; D)."""
        return params if c.batch == 0 else {n: p - self.alpha * scratch[n] for n, p in params.items()}

    def adjust(self, grads: Params, params: Params, scratch: Params, c: ClientView) -> None:
        """Keep the first batch's gradient; the step is by the second's."""
        if c.batch == 0:
            for name, grad in grads.items():
                scratch[name].copy_(grad)
