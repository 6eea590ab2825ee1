"""FedAdam, FedYogi, FedAdagrad: S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konečný, S. Kumar, H. B. McMahan.
Adaptive Federated Optimization. ICLR 2021 (arXiv:2003.00295), algorithm 2. With the clients' mean update D_t the server sets

    m_t = beta1 m_{t-1} + (1 - beta1) D_t
    v_t = beta2 v_{t-1} + (1 - beta2) D_t^2                       (Adam)
    v_t = v_{t-1} - (1 - beta2) D_t^2 sign(v_{t-1} - D_t^2)       (Yogi)
    v_t = v_{t-1} + D_t^2                                         (Adagrad)
    w_{t+1} = w_t + eta m_t / (sqrt(v_t) + tau)

from m_0 = 0 and v_0 = tau^2, without bias correction.

Deviations:
- The mean is weighted as the config says.
- Clients may use AdamW; the paper's use SGD.
- flavour: flower is the rule of Flower 1.x instead: v_0 = 0, and Adam's rate in round t, from 1, is
  eta sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1)). It changes the rule alone, no default of another key.

Peers:
- Flower: v_0 = 0 and a bias correction of Adam's rate that is one round ahead; its defaults are eta 0.1 (Yogi 0.01), tau 1e-9
  (Yogi 1e-3).
- NVFlare: any torch optimizer on the gradient -D, so v_0 = 0 and Adam's usual bias correction.
- OpenFedLLM: v is the mean of m^2 in place of D^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedsim.algorithms.base import Algorithm, Info, Server

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Algorithm):
    """Adagrad on the server (Reddi et al., 2021)."""

    server_lr: float = 0.01
    """Learning rate of the server."""
    beta1: float = 0.0
    """Decay of the first moment."""
    tau: float = 1e-3
    """Degree of adaptivity: added to the root of the second moment, which starts at its square."""
    flavour: Literal["paper", "flower"] = "paper"
    """`paper`: the second moment starts at tau^2, no bias correction; `flower`: it starts at 0, and Adam's rate is corrected as in Flower."""

    def __post_init__(self) -> None:
        for name in ("server_lr", "tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)} is not a number above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name, 0.0) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not in [0, 1)")

    def init(self, params: Params) -> tuple[Params, Params]:
        """m = 0 and v = tau^2 on the server."""
        first = self.tau**2 if self.flavour == "paper" else 0.0
        m = {f"m.{n}": p.new_zeros(p.shape) for n, p in params.items()}
        return m | {f"v.{n}": p.new_full(p.shape, first) for n, p in params.items()}, {}

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """v_t of v_{t-1} and D_t^2."""
        return v + square

    def rate(self, round: int) -> float:
        """eta of a round."""
        return self.server_lr

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """Algorithm 2, lines 10 to 13."""
        params: Params = {}
        state: Params = {}
        for name, delta in reduced["update"].items():
            m = self.beta1 * server.state[f"m.{name}"] + (1 - self.beta1) * delta
            v = self.second(server.state[f"v.{name}"], delta**2)
            params[name] = server.params[name] + self.rate(info.round) * m / (v.sqrt() + self.tau)
            state |= {f"m.{name}": m, f"v.{name}": v}
        return Server(params, state)


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdagrad):
    """Yogi on the server (Reddi et al., 2021)."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.99
    """Decay of the second moment."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """v_{t-1} - (1 - beta2) D_t^2 sign(v_{t-1} - D_t^2)."""
        return v - (1 - self.beta2) * square * (v - square).sign()


@dataclass(frozen=True, kw_only=True)
class FedAdam(FedYogi):
    """Adam on the server (Reddi et al., 2021)."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """beta2 v_{t-1} + (1 - beta2) D_t^2."""
        return self.beta2 * v + (1 - self.beta2) * square

    def rate(self, round: int) -> float:
        """eta, in Flower's flavour with its bias correction."""
        if self.flavour == "paper":
            return self.server_lr
        return self.server_lr * math.sqrt(1 - self.beta2 ** (round + 1)) / (1 - self.beta1 ** (round + 1))
