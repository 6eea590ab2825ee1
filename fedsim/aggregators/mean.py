"""The weighted mean and the weighted sum.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017, algorithm 1.
Divided once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fedsim.aggregators.base import Buffer

if TYPE_CHECKING:
    from torch import Tensor


class WeightedSum:
    """sum_k w_k x_k.

    Args:
        nbytes: of all parameters. From `LARGE` on, one client's values are added in one pass over memory, without rounding the
            product by itself.
    """

    blockwise: ClassVar[bool] = True

    def __init__(self, nbytes: int = 0) -> None:
        from fedsim.core.params import LARGE

        self.large = nbytes >= LARGE

    def buffers(self, slots: int) -> dict[str, Buffer]:
        """One sum."""
        return {"sum": Buffer()}

    def add(self, acc: dict[str, Tensor], values: Tensor, weights: Sequence[float], slots: Sequence[int]) -> None:
        """Add weight x value of each client."""
        import torch

        total = acc["sum"][0]
        if len(weights) == 1 and self.large:
            total.add_(values[0], alpha=weights[0])
        else:
            w = torch.tensor(weights, dtype=total.dtype, device=total.device)
            found: Tensor = torch.tensordot(w, values.to(total.dtype), dims=1)  # pyright: ignore[reportUnknownMemberType]
            total.add_(found)

    def result(self, acc: dict[str, Tensor], weight: float) -> Tensor:
        """The sum."""
        return acc["sum"][0].clone()


class WeightedMean(WeightedSum):
    """sum_k w_k x_k / sum_k w_k."""

    def result(self, acc: dict[str, Tensor], weight: float) -> Tensor:
        """The sum over the weights'."""
        return acc["sum"][0] / weight
