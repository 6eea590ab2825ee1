"""FedSA-LoRA: P. Guo, S. Zeng, Y. Wang, H. Fan, F. Wang, L. Qu. Selective Aggregation for Low-Rank Adaptation in Federated
Learning. ICLR 2025 (arXiv:2410.01463), section 3. Clients train A and B, and only A is sent and averaged: it learns what is general,
and each client's B stays with it.

Deviations: none.

Peers: the authors' code keeps the classification head with the clients too, of which the paper does not speak (private_head);
FedLLM-Factory loads only A between clients, so that B goes from one client to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsim.algorithms.base import Algorithm
from fedsim.algorithms.factors import is_b, is_head


@dataclass(frozen=True, kw_only=True)
class FedSALora(Algorithm):
    """LoRA of which only A is shared (Guo et al., 2025)."""

    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})

    private_head: bool = True
    """Whether a classification head stays with the clients, as in the authors' code; false: it is averaged, as in the paper."""

    def travels(self, name: str, round: int) -> bool:
        """A, and a head that is shared."""
        return not is_b(name) and not (self.private_head and is_head(name))
