"""FedRot-LoRA: H. Zhang, D. Kim, S. Cha, H. Vikalo. FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA. ICML 2026
(arXiv:2602.23638). B A is the same for B R and R^T A, so clients' factors can differ by a rotation alone, and their mean suffers. Before it sends, a client turns its
factors towards the global ones: R = U V^T from the SVD of A_k A^T in one round, and of B_k^T B in the next; it sends R^T A_k and B_k R, which
are averaged as in FedAvg.

Deviations:
- lam < 1 is the soft rotation: the orthogonal factor of (1 - lam) I + lam R, after R's determinant was made +1.
- Round 1 is not aligned, since the global B is zero then; even rounds align A, odd ones B.
- Optimizer state that clients keep is of the factors before they are turned, so it is reset in every round.

Peers: the authors' code takes lam above 1 as no softening at all, and repairs the determinant in the soft case alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsim.algorithms.base import Algorithm, ClientView
from fedsim.algorithms.factors import is_a, is_b, pairs

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.params import Message, Params


def rotation(m: Tensor, lam: float) -> Tensor:
    """The rotations R = U V^T of matrices m = U S V^T, `[K, r, r]`, softened towards the identity."""
    import torch

    u, _, vt = torch.linalg.svd(m)
    sign = torch.ones(m.shape[:-1], dtype=m.dtype, device=m.device)
    sign[:, -1] = torch.linalg.det(u @ vt).sign()
    r = (u * sign[:, None, :]) @ vt
    if lam == 1:
        return r
    one = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    u, _, vt = torch.linalg.svd((1 - lam) * one + lam * r)
    return u @ vt


@dataclass(frozen=True, kw_only=True)
class FedRotLora(Algorithm):
    """LoRA whose factors are rotated towards the global ones before they are averaged (ICML 2026)."""

    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})
    takes_late: ClassVar[bool] = False
    blockwise: ClassVar[bool] = False

    lam: float = 0.5
    """How far a client turns: 0 = not at all, 1 = as far as aligns best."""

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam: {self.lam} is not in [0, 1]")

    def resets(self, name: str, round: int) -> bool:
        """Factors are turned from round to round."""
        return is_a(name) or is_b(name)

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """R^T A_k - A and B_k R - B."""
        turned = dict(params)
        for a, b in pairs(params) if self.lam and c.round > 1 else ():
            m = params[a] @ c.params[a].mT if c.round % 2 == 0 else params[b].mT @ c.params[b]
            r = rotation(m, self.lam)
            turned[a], turned[b] = r.mT @ params[a], params[b] @ r
        return {"update": {n: p - c.params[n] for n, p in turned.items()}}, c.state
