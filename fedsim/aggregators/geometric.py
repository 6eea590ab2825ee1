"""Rules that weigh whole updates.

RFA: K. Pillutla, S. M. Kakade, Z. Harchaoui. Robust Aggregation for Federated Learning. 2019 (arXiv:1912.13445), algorithm 2, the
smoothed Weiszfeld algorithm for the geometric median: from the weighted mean z, a few passes of

    b_k = p_k / max(nu, |z - u_k|),  z = sum_k b_k u_k / sum_k b_k

Norm clipping: Z. Sun, P. Kairouz, A. T. Suresh, H. B. McMahan. Can You Really Backdoor Federated Learning? 2019 (arXiv:1911.07963):
the weighted mean of the updates, each scaled down to norm C where it is longer.

Deviations: distances are taken in float64.

Peers: Flower divides by the norm of an update that is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsim.aggregators.slots import Slotted

if TYPE_CHECKING:
    from torch import Tensor


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """The mean of `[K, n]` with these weights `[K]`."""
    weights = weights.to(values.dtype)
    return weights @ values / weights.sum()


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Slotted):
    """The point with the least sum of distances to the updates (Pillutla et al., 2019)."""

    blockwise: ClassVar[bool] = False
    weighs: ClassVar[bool] = True

    passes: int = 4
    """Passes of the smoothed Weiszfeld algorithm."""
    nu: float = 1e-6
    """Distances below it count as this."""

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ValueError(f"passes: {self.passes} is not a number of at least 1")
        if not self.nu > 0:
            raise ValueError(f"nu: {self.nu} is not a number above 0")

    def reduce(self, values: Tensor, weights: Tensor) -> Tensor:
        """Passes from the weighted mean."""
        import torch

        z, p = weighted(values, weights), weights.double() / weights.double().sum()
        for _ in range(self.passes):
            away = torch.stack([(z.double() - u.double()).norm() for u in values]).clamp(min=self.nu)
            z = weighted(values, p / away)
        return z


@dataclass(frozen=True, kw_only=True)
class NormClip(Slotted):
    """The weighted mean of updates whose norm is bounded (Sun et al., 2019)."""

    blockwise: ClassVar[bool] = False
    weighs: ClassVar[bool] = True

    clip: float = 1.0
    """Maximum 2-norm of an update over all trained parameters."""

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"clip: {self.clip} is not a number above 0")

    def reduce(self, values: Tensor, weights: Tensor) -> Tensor:
        """Scale, then average."""
        import torch

        norms = torch.stack([u.double().norm() for u in values])
        scales = self.clip / norms.clamp(min=self.clip)
        return (weights.double() * scales / weights.double().sum()).to(values.dtype) @ values
