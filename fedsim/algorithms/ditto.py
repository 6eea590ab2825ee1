"""Ditto: T. Li, S. Hu, A. Beirami, V. Smith. Ditto: Fair and Robust Federated Learning Through Personalization. ICML 2021
(arXiv:2012.04221), algorithm 1. Beside FedAvg's model each client k trains one of its own, v_k, by the gradient of

    F_k(v) + lam / 2 |v - w_t|^2

where w_t is the global model that the client received in the round. v_k stays with the client.

Deviations:
- Both models see the same batches in a round, each with optimizer state of its own; that of v_k lives on from round to round.
- v_k begins as the global model that the client receives when it first takes part.

Peers: PFLlib trains v_k by epochs of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsim.algorithms.base import Algorithm, ClientView

if TYPE_CHECKING:
    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class Ditto(Algorithm):
    """A model of each client's own, held near the global one (Li et al., 2021)."""

    parts: ClassVar[tuple[str, ...]] = ("shared", "own")
    lives_on: ClassVar[frozenset[str]] = frozenset({"own"})

    lam: float = 0.1
    """Weight of lam / 2 |v - w_t|^2; 0 = each client trains on its own."""

    def __post_init__(self) -> None:
        if not 0 <= self.lam < math.inf:
            raise ValueError(f"lam: {self.lam} is not a number of at least 0")

    def init(self, params: Params) -> tuple[Params, Params]:
        """v_k = w_t of the client's first round."""
        return {}, {f"own/{n}": p for n, p in params.items()}

    def start(self, c: ClientView) -> Params:
        """w_t, and v_k."""
        return c.params if c.part == "shared" else c.state

    def adjust(self, grads: Params, params: Params, scratch: Params, c: ClientView) -> None:
        """g += lam (v - w_t), of the client's own model."""
        if self.lam and c.part == "own":
            for name, grad in grads.items():
                grad.add_(params[name] - c.params[name], alpha=self.lam)

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """The update of the shared model; the client's own model, which it keeps."""
        return super().finish(params, scratch, c) if c.part == "shared" else ({}, params)
