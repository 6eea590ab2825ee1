"""FedAdam: S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konečný, S. Kumar, H. B. McMahan. Adaptive Federated
Optimization. ICLR 2021 (arXiv:2003.00295), algorithm 2. With the clients' mean update D_t the server sets

    m_t = beta1 m_{t-1} + (1 - beta1) D_t,  v_t = beta2 v_{t-1} + (1 - beta2) D_t^2,  w_{t+1} = w_t + eta m_t / (sqrt(v_t) + tau)

from m = 0 and v = tau^2, without bias correction, as in the paper.

Deviations: the mean is weighted as the config says; clients may use AdamW (the paper's use SGD).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim.algorithms.base import Algorithm, Info, Server

if TYPE_CHECKING:
    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class FedAdam(Algorithm):
    """Adam on the server (Reddi et al., 2021)."""

    server_lr: float = 0.01
    """Learning rate of the server."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.99
    """Decay of the second moment."""
    tau: float = 1e-3
    """Degree of adaptivity: added to the root of the second moment, which starts at its square."""

    def __post_init__(self) -> None:
        for name in ("server_lr", "tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)} is not a number above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not in [0, 1)")

    def init(self, params: Params) -> tuple[Params, Params]:
        """m = 0 and v = tau^2 on the server."""
        m = {f"m.{n}": p.new_zeros(p.shape) for n, p in params.items()}
        return m | {f"v.{n}": p.new_full(p.shape, self.tau**2) for n, p in params.items()}, {}

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """Algorithm 2, lines 10 to 13."""
        params: Params = {}
        state: Params = {}
        for name, delta in reduced["update"].items():
            m = self.beta1 * server.state[f"m.{name}"] + (1 - self.beta1) * delta
            v = self.beta2 * server.state[f"v.{name}"] + (1 - self.beta2) * delta**2
            params[name] = server.params[name] + self.server_lr * m / (v.sqrt() + self.tau)
            state |= {f"m.{name}": m, f"v.{name}": v}
        return Server(params, state)
