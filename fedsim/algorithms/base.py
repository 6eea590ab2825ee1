"""The federated algorithm's interface, whose defaults are FedAvg, and `Local`, which never merges.

FedAvg: H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas. Communication-Efficient Learning of Deep
Networks from Decentralized Data. AISTATS 2017, algorithm 1. A client starts from the global parameters w_t, trains,
and hands back u_k = w_k - w_t; the server sets w_{t+1} = w_t + sum_k p_k u_k.

Deviations: the weights p_k may be uniform or by steps beside the paper's n_k / n; the optimiser of a client may be
AdamW, and may keep its moments from round to round (the paper's is plain SGD).

State is passed in and handed back, never kept on `self`: it can then be checkpointed, sent to a worker and compared.
Tensors may carry a leading lane axis `[K, ...]`; written elementwise, the same lines serve K packed adapters, one
adapter and a whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsim.core.params import Params, add, sub


@dataclass(frozen=True)
class Context:
    """What an algorithm may look at while a client trains.

    Attributes:
        round: from 1.
        weights: the global parameters the round started from, by name; `[...]`, without a lane axis.
        server: the server's state, by name.
        client: this client's state as the last round left it, by name.
    """

    round: int
    weights: Params
    server: Params
    client: Params


@dataclass(frozen=True)
class Algorithm:
    """Federated averaging. A method is a subclass that overrides what it does otherwise."""

    merges: bool = True
    """Whether updates are averaged into global parameters at the end of a round."""

    def init(self, params: Params) -> tuple[Params, Params]:
        """State before round 1: (the server's, every client's). FedAvg keeps none."""
        return {}, {}

    def start(self, ctx: Context) -> Params:
        """The parameters a client starts its round from."""
        return ctx.weights

    def adjust_grads(self, grads: Params, params: Params, ctx: Context) -> None:
        """Change a step's gradients in place, before clipping. FedAvg leaves them."""

    def client_update(self, params: Params, ctx: Context) -> tuple[Params, Params]:
        """(update = local - global, the client's new state) after its last step."""
        return sub(params, ctx.weights), ctx.client

    def server_update(
        self, params: Params, server: Params, mean: Params, info: dict[str, Any]
    ) -> tuple[Params, Params]:
        """(new global parameters, new server state) from the weighted mean of the updates."""
        return add(params, mean), server


@dataclass(frozen=True)
class Local(Algorithm):
    """Each client goes on from its own parameters, and nothing is ever merged. With one client it is plain training."""

    merges: bool = False

    def init(self, params: Params) -> tuple[Params, Params]:
        """Every client's state is its own parameters."""
        return {}, dict(params)

    def start(self, ctx: Context) -> Params:
        """The client's own parameters; in its first round these are the initial ones."""
        return ctx.client

    def client_update(self, params: Params, ctx: Context) -> tuple[Params, Params]:
        """(nothing to send, its parameters)."""
        return {}, params
