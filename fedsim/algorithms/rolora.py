"""RoLoRA: S. Chen, Y. Guo, Y. Ju, H. Dalal, Z. Zhu, A. Khisti. Robust Federated Finetuning of LLMs via Alternating
Optimization of LoRA. NeurIPS 2025 (arXiv:2502.01755), algorithm 1. In odd rounds clients train, send and average B, in even rounds A;
the other half is the same on all clients, so that the mean of the products is the product of the means.

Deviations:
- first says which half begins. B, the default, is the paper's; with A the first round is lost, since B = 0 makes A's gradient 0.
- A classification head trains and is averaged in every round.
- The half that rests keeps its optimizer state and step counts.

Peers: FedLLM-Factory starts with A; the released supplement also alternates while it evaluates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedsim.algorithms.base import Algorithm
from fedsim.algorithms.factors import is_a, is_b


@dataclass(frozen=True, kw_only=True)
class RoLora(Algorithm):
    """LoRA whose halves train in turn (Chen et al., 2025)."""

    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})
    takes_late: ClassVar[bool] = False

    first: Literal["A", "B"] = "B"
    """The half that trains in round 1."""

    def trains(self, name: str, round: int, step: int) -> bool:
        """B in odd rounds and A in even ones, or the other way round."""
        return not (is_a(name) if (round % 2 == 1) == (self.first == "B") else is_b(name))

    def travels(self, name: str, round: int) -> bool:
        """What trains."""
        return self.trains(name, round, 0)
