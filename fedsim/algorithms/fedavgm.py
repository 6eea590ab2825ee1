"""FedAvgM: T.-M. H. Hsu, H. Qi, M. Brown. Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification. 2019 (arXiv:1909.06335), section 4.4. With the clients' mean update D_t the server keeps a velocity and steps by it,

    v_t = beta1 v_{t-1} + D_t,  w_{t+1} = w_t + eta v_t

from v_0 = 0; beta1 = 0 and eta = 1 are FedAvg.

Deviations:
- The mean is weighted as the config says.
- The server has a learning rate of its own, as in Reddi et al., 2021; the paper's is 1.

Peers:
- Flower: the same rule with beta1 = 0 by default, so that its default is FedAvg.
- FL4Health: the same rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim.algorithms.base import Algorithm, Info, Server

if TYPE_CHECKING:
    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class FedAvgM(Algorithm):
    """FedAvg with momentum on the server (Hsu et al., 2019)."""

    server_lr: float = 1.0
    """Learning rate of the server."""
    beta1: float = 0.9
    """Momentum of the server; 0 is FedAvg."""

    def __post_init__(self) -> None:
        if not 0 < self.server_lr < math.inf:
            raise ValueError(f"server_lr: {self.server_lr} is not a number above 0")
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1: {self.beta1} is not in [0, 1)")

    def init(self, params: Params) -> tuple[Params, Params]:
        """v = 0 on the server; none without momentum."""
        return {n: p.new_zeros(p.shape) for n, p in params.items()} if self.beta1 else {}, {}

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """v = beta1 v + D; w += eta v."""
        update = reduced["update"]
        v = {n: self.beta1 * server.state[n] + d for n, d in update.items()} if self.beta1 else update
        return Server({n: server.params[n] + self.server_lr * v[n] for n in v}, v if self.beta1 else {})
