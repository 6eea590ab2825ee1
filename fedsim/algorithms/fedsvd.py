"""FedSVD: S. Lee, S. Park, D. B. Lee, D. Wagner, H. Seong, T. Bocklet, J. Lee, S. J. Hwang. FedSVD: Adaptive Orthogonalization for
Private Federated Learning with LoRA. NeurIPS 2025 (arXiv:2505.12805), algorithm 1. Clients train and send B alone, whose mean is exact for the A that all share; then the server makes
new factors of the same product by its SVD, B A = U S V^T: B := U S and A := V^T, whose rows are orthonormal.

Deviations:
- Optimizer state is reset in every round, since the factors are others.
- A classification head trains and is averaged. The SVD is of the small matrix between QR factors of B and A^T.

Peers: none known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsim.algorithms.base import Algorithm, Info, Server
from fedsim.algorithms.factors import is_a, is_b, pairs

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.params import Message, Params


def balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(U S, V^T) of a product B A, `[m, r]` and `[r, n]`, in the sign in which each row of V^T sums to at least 0."""
    import torch

    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    left, right = q_b @ u * s, vt @ q_a.T
    sign = torch.where(right.sum(dim=1) < 0, -1.0, 1.0).to(right)
    rest = b.shape[1] - len(right)  # of a rank above the matrix's
    pad = torch.nn.functional.pad
    return pad(left * sign, (0, rest)), pad(right * sign[:, None], (0, 0, 0, rest))


@dataclass(frozen=True, kw_only=True)
class FedSVD(Algorithm):
    """LoRA whose A is made anew from the product by the server (Lee et al., 2025)."""

    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})
    takes_late: ClassVar[bool] = False
    blockwise: ClassVar[bool] = False

    def trains(self, name: str, round: int, step: int) -> bool:
        """All but A."""
        return not is_a(name)

    def travels(self, name: str, round: int) -> bool:
        """What trains."""
        return not is_a(name)

    def changes(self, name: str, round: int) -> bool:
        """The server changes A too."""
        return True

    def resets(self, name: str, round: int) -> bool:
        """B is another one in each round."""
        return is_b(name)

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """The mean, then B := U S, A := V^T."""
        params: Params = {
            n: p + reduced["update"][n] if n in reduced["update"] else p for n, p in server.params.items()
        }
        for a, b in pairs(params):
            if float(params[b].abs().max()) > 0:  # of a product of zeros A can stay as it is
                params[b], params[a] = balanced(params[b], params[a])
        return Server(params, server.state)
