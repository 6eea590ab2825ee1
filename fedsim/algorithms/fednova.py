"""FedNova: J. Wang, Q. Liu, H. Liang, G. Joshi, H. V. Poor. Tackling the Objective Inconsistency Problem in Heterogeneous
Federated Optimization. NeurIPS 2020 (arXiv:2007.07481), equation 10 and section 4. Clients that do more local work pull the mean
towards their own objective. So client k sends its change per unit of work, and the server scales the mean back:

    d_k = (y_k - x) / a_k,  x += (sum_k p_k a_k) sum_k p_k d_k

a_k, the 1-norm of its accumulation vector, is the total weight of its gradients in x - y_k, over the learning rate: for K steps
of SGD K; with momentum rho (K - rho (1 - rho^K) / (1 - rho)) / (1 - rho); with a proximal term (1 - (1 - eta mu)^K) / (eta mu).

Deviations:
- a_k is summed step by step with the rates that were used, which gives these sums under a constant rate and the right ones under
  schedules; momentum and the proximal term may go together.
- The paper restarts momentum every round. Momentum kept from round to round (local.keep_state) brings in earlier gradients, whose
  weight a_k then counts too.
- Weight decay and gradient clipping are part of the gradient.
- normalise: steps takes a_k = K under any optimizer, for which the paper has no rule; the displacement of a step of AdamW is not linear
  in the gradients.
- faults.max_norm bounds d_k, which is what a client sends.

Peers:
- The authors' code: adds up the vectors of momentum and of the proximal term, where both are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsim.algorithms.base import Algorithm, ClientOptimizer, ClientView, Info, Server, per_lane

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class FedNova(Algorithm):
    """Updates normalized by the clients' local work (Wang et al., 2020)."""

    aggregates: ClassVar[Mapping[str, Any]] = {"update": "mean", "work": "mean"}
    exact: ClassVar[frozenset[str]] = frozenset({"work"})
    needs: ClassVar[frozenset[str]] = frozenset({"optimizer_steps"})

    mu: float = 0.0
    """Weight of a proximal term mu / 2 |w - w_t|^2 in the clients' objective, as in FedProx."""
    normalise: Literal["exact", "steps"] = "exact"
    """A client's work: `exact`, the weight of its gradients in its update, for local.optimizer=sgd; or its number of `steps`, for any optimizer."""

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise ValueError(f"mu: {self.mu} is not a number of at least 0")

    def suits(self, optim: ClientOptimizer) -> None:
        """Only SGD's update is a weighted sum of gradients."""
        if self.normalise == "exact" and optim.optimizer != "sgd":
            raise ValueError(
                f"normalise: 'exact' is for local.optimizer=sgd; an update of {optim.optimizer} is no weighted sum of gradients; "
                "set local.optimizer=sgd or algorithm.normalise=steps"
            )

    def message(self, params: Params) -> Message:
        """The normalized update, and one number: a_k."""
        return {"update": params, "work": {"work": next(iter(params.values())).new_zeros(1)}}

    def scratch(self, c: ClientView) -> Params:
        """The momentum of a gradient that is 1 at every step, and the total weight of gradients so far; `[K]`."""
        rho, done = c.optim.momentum, c.facts["optimizer_steps"].to(c.lr_sum)
        return {"momentum": (1 - rho**done) / (1 - rho), "weight": c.lr_sum.new_zeros(len(done))}

    def adjust(self, grads: Params, params: Params, scratch: Params, c: ClientView) -> None:
        """g += mu (y - x)."""
        if self.mu:
            for name, grad in grads.items():
                grad.add_(params[name] - c.params[name], alpha=self.mu)

    def after_step(self, params: Params, scratch: Params, c: ClientView, lr: Tensor) -> None:
        """m = rho m + (1 - mu weight); weight += eta m."""
        scratch["momentum"].mul_(c.optim.momentum).add_(1 - self.mu * scratch["weight"])
        scratch["weight"].add_(lr * scratch["momentum"])

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """((y - x) / a_k, a_k); a client without work sends zeros."""
        work = scratch["weight"] / c.optim.lr if self.normalise == "exact" else c.steps.to(c.lr_sum)
        over = work.where(work > 0, math.inf)
        update = {n: (p - c.params[n]) / per_lane(over, p) for n, p in params.items()}
        return {"update": update, "work": {"work": work[:, None]}}, c.state

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """x += (mean of a_k) (mean of d_k)."""
        work = reduced["work"]["work"]
        return Server({n: server.params[n] + work * d for n, d in reduced["update"].items()}, server.state)
