"""q-FedAvg: T. Li, M. Sanjabi, A. Beirami, V. Smith. Fair Resource Allocation in Federated Learning. ICLR 2020
(arXiv:1905.10497), algorithm 2. Clients whose loss is high count for more: the objective is sum_k F_k^(q+1) / (q + 1). With L = 1 / eta
and F_k the loss of the received model x on its data, client k sends

    d_k = F_k^q L (x - y_k),  h_k = q F_k^(q-1) |L (x - y_k)|^2 + L F_k^q

with the 2-norm over all parameters together, and the server sets x -= sum_k d_k / sum_k h_k. q = 0 is FedAvg.

Deviations:
- The sums may be weighted, by weights; uniform, the default here, is the paper's rule.
- eta is the peak rate local.lr, also under a schedule, so that q = 0 is FedAvg under any.
- Clients may use AdamW, for which L = 1 / eta is no bound of the curvature; the paper's use SGD.
- F_k is the mean loss of an answer token, at least 1e-10.
- faults.max_norm bounds d_k, with the opposite sign, which is what a client sends.

Peers:
- The authors' code adds 1e-10 to every loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsim.algorithms.base import Algorithm, ClientView, Info, Server, per_lane

if TYPE_CHECKING:
    from fedsim.core.params import Message, Params

_LEAST = 1e-10  # of a loss, whose power may be negative


@dataclass(frozen=True, kw_only=True)
class QFedAvg(Algorithm):
    """Fairness by weights that grow with the clients' losses (Li et al., 2020)."""

    blockwise: ClassVar[bool] = False
    aggregates: ClassVar[Mapping[str, Any]] = {"update": "mean", "scale": "mean"}
    exact: ClassVar[frozenset[str]] = frozenset({"scale"})
    needs: ClassVar[frozenset[str]] = frozenset({"start_loss"})

    weights: Literal["samples", "steps", "uniform"] = "uniform"
    """A client's weight in both sums: its number of examples, its optimizer steps in the round, or 1."""
    q: float = 1.0
    """Fairness: the power of the loss that weighs a client; 0 is FedAvg."""

    def __post_init__(self) -> None:
        if not 0 <= self.q < math.inf:
            raise ValueError(f"q: {self.q} is not a number of at least 0")

    def message(self, params: Params) -> Message:
        """-d_k, and one number: h_k."""
        return {"update": params, "scale": {"scale": next(iter(params.values())).new_zeros(1)}}

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """(F^q L (y - x), q F^(q-1) |L (y - x)|^2 + L F^q)."""
        steep = 1 / c.optim.lr
        loss = c.facts["start_loss"].to(c.lr_sum).clamp(min=_LEAST)
        change = {n: steep * (p - c.params[n]) for n, p in params.items()}
        scale = steep * loss**self.q
        if self.q:
            square = sum(d.flatten(1).square().sum(dim=1) for d in change.values())
            scale = scale + self.q * loss ** (self.q - 1) * square
            change = {n: per_lane(loss**self.q, d) * d for n, d in change.items()}
        return {"update": change, "scale": {"scale": scale[:, None]}}, c.state

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """x += mean of -d_k / mean of h_k."""
        scale = reduced["scale"]["scale"]
        return Server({n: server.params[n] + d / scale for n, d in reduced["update"].items()}, server.state)
