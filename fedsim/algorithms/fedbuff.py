"""FedBuff: J. Nguyen, K. Malik, H. Zhan, A. Yousefpour, M. Rabbat, M. Malek, D. Huba. Federated Learning with Buffered Asynchronous
Aggregation. AISTATS 2022 (arXiv:2106.06639), algorithm 1. A fixed number of clients is at work all the time, each from the model that
it received; one that arrives is replaced at once. With B messages in its buffer the server steps,

    x += eta_g / B sum_k s(tau_k) (y_k - x_k),  s(tau) = 1 / sqrt(1 + tau)

where x_k is the model that client k received and tau_k the server's steps since then. A round is one step of the server.

Deviations:
- The order of arrival is that of a simulated clock: a client takes (its tokens) / (its speed) seconds. Equal arrivals are taken in the
  order in which the clients started, and all that arrive at one moment before others start; so a buffer of the cohort and clients that
  are equally fast are FedAvg.
- No client is at work twice at a time; those that start are drawn from the others, uniformly.
- Clients may have weights, relative to the mean weight of all clients; uniform, the default here, is the paper's rule.
- A client's place in a schedule of learning rates, and its batches, follow from the round in which it starts.
- What has not arrived after the last round is dropped. It is trained, so that a run can go on from there with more rounds.

Peers:
- FLSim: divides s(tau) by s at an average staleness that is given, 1 by default, and applies what is left in the buffer at the end
  of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsim.algorithms.base import Algorithm, Buffered, Info, Server

if TYPE_CHECKING:
    from fedsim.core.params import Message


@dataclass(frozen=True, kw_only=True)
class FedBuff(Algorithm):
    """Asynchronous clients and a buffer of their updates (Nguyen et al., 2022); needs `simulation.speeds`."""

    aggregates: ClassVar[Mapping[str, Any]] = {"update": "sum"}

    weights: Literal["samples", "steps", "uniform"] = "uniform"
    """A client's weight, relative to the mean of all clients: its number of examples, its optimizer steps in a round, or 1."""
    buffer: int = 10
    """Messages that the server waits for before it steps."""
    server_lr: float = 1.0
    """Learning rate of the server."""
    staleness: Literal["sqrt", "constant"] = "sqrt"
    """Weight of a message whose model is tau server steps old: `sqrt`, 1 / sqrt(1 + tau), or `constant`, 1."""
    concurrency: int | None = None
    """Clients at work at a time; null = cohort.size."""

    def __post_init__(self) -> None:
        for name in ("buffer", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not at least 1")
        if not 0 < self.server_lr < math.inf:
            raise ValueError(f"server_lr: {self.server_lr} is not a number above 0")

    def buffered(self, cohort: int) -> Buffered:
        """The buffer, and the clients at work."""
        return Buffered(self.buffer, self.concurrency or cohort)

    def discount(self, staleness: int) -> float:
        """s(tau)."""
        return 1.0 if self.staleness == "constant" else (1 + staleness) ** -0.5

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """x += eta_g / B sum_k s(tau_k) w_k / (mean weight of all clients) (y_k - x_k)."""
        by = self.server_lr / (self.buffer * (info.all_weight / info.all_clients))
        return Server({n: server.params[n] + by * d for n, d in reduced["update"].items()}, server.state)
