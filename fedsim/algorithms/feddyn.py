"""FedDyn: D. A. E. Acar, Y. Zhao, R. Matas Navarro, M. Mattina, P. N. Whatmough, V. Saligrama. Federated Learning Based on Dynamic
Regularization. ICLR 2021 (arXiv:2111.04263), algorithm 1. Client k minimizes F_k(y) - <g_k, y> + alpha / 2 |y - x|^2, so that each
gradient gains alpha (y - x) - g_k, and sets after its round

    g_k -= alpha (y_k - x)

The server keeps h -= alpha / N sum over the cohort of (y_k - x), and sets x = mean_k(y_k) - h / alpha.

Deviations:
- Clients may have weights: the mean is weighted, and h is the weighted mean of all g_k, as for SCAFFOLD's variates. Uniform weights
  give the paper's rule.
- Clients take the configured local steps, by any optimizer, in place of an exact minimization; moments and clipping see the whole
  gradient.

Peers:
- PFLlib: penalizes the norm of y - x in place of its square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim.algorithms.base import Algorithm, ClientView, Info, Server

if TYPE_CHECKING:
    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class FedDyn(Algorithm):
    """Dynamic regularization of the clients' objectives (Acar et al., 2021)."""

    alpha: float = 0.1
    """Weight of the regularization."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha: {self.alpha} is not a number above 0; without regularization it is fedavg")

    def init(self, params: Params) -> tuple[Params, Params]:
        """h = 0 and g_k = 0."""
        zeros = {n: p.new_zeros(p.shape) for n, p in params.items()}
        return zeros, dict(zeros)

    def adjust(self, grads: Params, params: Params, scratch: Params, c: ClientView) -> None:
        """g += alpha (y - x) - g_k."""
        for name, grad in grads.items():
            grad.add_(params[name] - c.params[name], alpha=self.alpha).sub_(c.state[name])

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """y - x, g_k - alpha (y - x)."""
        update = {n: p - c.params[n] for n, p in params.items()}
        return {"update": update}, {n: g - self.alpha * update[n] for n, g in c.state.items()}

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """h -= alpha sum_k w_k (y_k - x) / (weight of all clients); x = mean y - h / alpha."""
        share, update = info.weight / info.all_weight, reduced["update"]
        h = {n: server.state[n] - self.alpha * share * d for n, d in update.items()}
        return Server({n: server.params[n] + d - h[n] / self.alpha for n, d in update.items()}, h)
