"""FLTrust: X. Cao, M. Fang, J. Liu, N. Z. Gong. FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping. NDSS 2021
(arXiv:2012.13995), algorithm 2. The server trains an update g_0 of its own on a small root set, and trusts each client by

    t_k = max(0, cos(g_k, g_0)),  g = sum_k t_k (|g_0| / |g_k|) g_k / sum_k t_k

Deviations:
- The root set is drawn from the training examples of all clients, as in the paper's first case, and stays with them; the server does
  the local work of a client on it, with the same optimizer.
- Where no client is trusted the update is 0: the global model stays as it is, unless the algorithm's server has momentum.

Peers: some copies divide by the number of clients instead of the sum of trust.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsim.aggregators.base import Buffer
from fedsim.aggregators.slots import Slotted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FLTrust(Slotted):
    """Updates count by how much they point where the server's own does (Cao et al., 2021)."""

    blockwise: ClassVar[bool] = False

    root_examples: int = 100
    """Training examples on which the server trains, drawn from those of all clients."""

    def __post_init__(self) -> None:
        if self.root_examples < 1:
            raise ValueError(f"root_examples: {self.root_examples} is not a number of at least 1")

    def buffers(self, slots: int) -> dict[str, Buffer]:
        """One slot more, for the server's own update: the last one."""
        return super().buffers(slots + 1)

    def result(self, acc: dict[str, Tensor], weight: float) -> Tensor:
        """The trusted mean; zeros without trust, or without an update of the server."""
        import torch

        root, sent = acc["values"][-1], acc["sent"][:-1] > 0
        if not float(acc["sent"][-1]):
            return torch.zeros_like(root)
        values, own = acc["values"][:-1][sent], root.double()
        norms = torch.stack([v.double().norm() for v in values]).clamp(min=torch.finfo(torch.float64).tiny)
        trust = (torch.stack([v.double() @ own for v in values]) / norms / own.norm().clamp(min=1e-300)).clamp(min=0)
        if float(trust.sum()) == 0:
            return torch.zeros_like(root)
        by = trust * own.norm() / norms / trust.sum()
        return by.to(values.dtype) @ values
