"""FedProx: T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith. Federated Optimization in Heterogeneous
Networks. MLSys 2020 (arXiv:1812.06127), algorithm 2. A client minimizes F_k(w) + mu / 2 |w - w_t|^2, so the gradient of each
step gains mu (w - w_t); the server averages as in FedAvg.

Deviations:
- Clients are sampled and weighted as the config says; the paper samples with probability p_k and takes the plain mean.
- The local solver may be AdamW, whose moments then see the proximal term.
- Gradients are clipped with the term.

Peers:
- NVFlare's patch for Lightning: the term is added after accumulation and before clipping, as here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim.algorithms.base import Algorithm, ClientView

if TYPE_CHECKING:
    from fedsim.core.params import Params


@dataclass(frozen=True, kw_only=True)
class FedProx(Algorithm):
    """FedAvg with a proximal term (Li et al., 2020)."""

    mu: float = 0.01
    """Weight of the proximal term mu / 2 |w - w_t|^2; 0 is FedAvg."""

    def __post_init__(self) -> None:
        if not (self.mu >= 0 and math.isfinite(self.mu)):
            raise ValueError(f"mu: {self.mu} is not a number of at least 0")

    def adjust(self, grads: Params, params: Params, scratch: Params, c: ClientView) -> None:
        """g += mu (w - w_t)."""
        if self.mu:
            for name, grad in grads.items():
                grad.add_(params[name] - c.params[name], alpha=self.mu)
