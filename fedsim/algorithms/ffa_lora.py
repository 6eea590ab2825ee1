"""FFA-LoRA: Y. Sun, Z. Li, Y. Li, B. Ding. Improving LoRA in Privacy-preserving Federated Learning. ICLR 2024
(arXiv:2403.12313), section 3. A keeps its initial value, which is the same on all clients; B is trained, sent and averaged. The mean of
the products is then the product of the means: sum_k p_k B_k A_0 = (sum_k p_k B_k) A_0.

Deviations: a classification head trains and is averaged.

Peers: some copies freeze the head too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsim.algorithms.base import Algorithm
from fedsim.algorithms.factors import is_a


@dataclass(frozen=True, kw_only=True)
class FFALora(Algorithm):
    """LoRA with a frozen A (Sun et al., 2024)."""

    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})

    def trains(self, name: str, round: int, step: int) -> bool:
        """All but A."""
        return not is_a(name)

    def travels(self, name: str, round: int) -> bool:
        """What trains."""
        return not is_a(name)
