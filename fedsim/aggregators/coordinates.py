"""Rules for each coordinate by itself: D. Yin, Y. Chen, K. Ramchandran, P. Bartlett. Byzantine-Robust Distributed Learning:
Towards Optimal Statistical Rates. ICML 2018 (arXiv:1803.01498), definitions 1 and 2. The median, or the mean without the
int(beta K) smallest and the int(beta K) largest of K values.

Deviations: of an even number of values the median is the mean of the two in the middle. Weights are not used, as in the paper.

Peers: Flower cuts int(beta K) at each end too; NVFlare has neither rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim.aggregators.slots import Slotted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(Slotted):
    """The mean of each coordinate without its smallest and largest values (Yin et al., 2018)."""

    beta: float = 0.2
    """Share of the clients that is cut at each end."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 0.5:
            raise ValueError(f"beta: {self.beta} is not in [0, 0.5)")

    def reduce(self, values: Tensor, weights: Tensor) -> Tensor:
        """Sort, cut, average."""
        cut = int(self.beta * len(values))
        return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class Median(Slotted):
    """The median of each coordinate (Yin et al., 2018)."""

    def reduce(self, values: Tensor, weights: Tensor) -> Tensor:
        """The middle value, or the mean of the two middle ones."""
        ordered, k = values.sort(dim=0).values, len(values)
        return ordered[(k - 1) // 2 : k // 2 + 1].mean(dim=0)
