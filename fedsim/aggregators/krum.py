"""Krum and Multi-Krum: P. Blanchard, E. M. El Mhamdi, R. Guerraoui, J. Stainer. Machine Learning with Adversaries: Byzantine
Tolerant Gradient Descent. NeurIPS 2017 (arXiv:1703.02757), section 4. Of n updates, f of them from attackers, each has as score
the sum of its n - f - 2 least squared distances to others; Krum is the update with the least score, Multi-Krum the mean of
the n - f with the least scores. n >= 2 f + 3.

Bulyan: E. M. El Mhamdi, R. Guerraoui, S. Rouault. The Hidden Vulnerability of Distributed Learning in Byzantium. ICML 2018
(arXiv:1802.07927), section 4. theta = n - 2 f updates are chosen one after another, each by Krum among those that are left; then each
coordinate is the mean of the theta - 2 f chosen values that are nearest to their median. n >= 4 f + 3.

Deviations:
- byzantine = null takes the largest f that the number of arrivals allows.
- Multi-Krum averages m = n - f updates (the paper leaves m open), without weights.
- Among few that are left, Bulyan's Krum takes at least one distance. Of equal scores the lower client wins; of two values as near to
  the median the smaller one.

Peers: Flower takes max(1, n - f - 2) distances, averages Multi-Krum by examples, and takes Bulyan's theta from one pass of Krum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsim.aggregators.slots import Slotted

if TYPE_CHECKING:
    from torch import Tensor


PIECE = 1 << 20  # coordinates that are worked on at a time


def squared_distances(values: Tensor) -> Tensor:
    """Between all pairs of updates `[K, n]`; `[K, K]`, float64, summed difference by difference: products would cancel."""
    import torch

    out = torch.zeros(len(values), len(values), dtype=torch.float64, device=values.device)
    for part in values.split(PIECE, dim=1):
        exact = part.double()
        for i in range(len(values) - 1):
            out[i, i + 1 :] += (exact[i + 1 :] - exact[i]).square().sum(dim=1)
    return out + out.T


def krum_scores(distances: Tensor, byzantine: int) -> Tensor:
    """The sum of each one's n - f - 2 least distances to others, `[n]`."""
    n = len(distances)
    near = distances.sort(dim=1).values[:, 1:]  # without the one to itself
    return near[:, : max(1, n - byzantine - 2)].sum(dim=1)


def near_median(values: Tensor, count: int) -> Tensor:
    """The mean of so many values of each coordinate, those nearest to the median; `values` are `[K, n]`."""
    values = values.sort(dim=0).values
    k = len(values)
    median = values[(k - 1) // 2 : k // 2 + 1].mean(dim=0)
    order = (values - median).abs().argsort(dim=0, stable=True)[:count]
    return values.gather(0, order).mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class Krum(Slotted):
    """The update that is nearest to its neighbors (Blanchard et al., 2017)."""

    blockwise: ClassVar[bool] = False
    per_attacker: ClassVar[int] = 2  # n >= per_attacker * f + 3

    byzantine: int | None = None
    """Attackers among the clients of a round; null = the most that the number of arrivals allows."""

    def __post_init__(self) -> None:
        if self.byzantine is not None and self.byzantine < 0:
            raise ValueError(f"byzantine: {self.byzantine} is not a number of at least 0")

    @property
    def least(self) -> int:
        """2 f + 3, or 3."""
        return self.per_attacker * (self.byzantine or 0) + 3

    def attackers(self, n: int) -> int:
        """f among n arrivals."""
        return (n - 3) // self.per_attacker if self.byzantine is None else self.byzantine

    def reduce(self, values: Tensor, weights: Tensor) -> Tensor:
        """The one with the least score."""
        scores = krum_scores(squared_distances(values), self.attackers(len(values)))
        return values[int(scores.argmin())].clone()


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Krum):
    """The mean of the updates that are nearest to their neighbors (Blanchard et al., 2017)."""

    def reduce(self, values: Tensor, weights: Tensor) -> Tensor:
        """The mean of the n - f with the least scores, in the clients' order."""
        f = self.attackers(len(values))
        scores = krum_scores(squared_distances(values), f)
        chosen = scores.argsort(stable=True)[: len(values) - f].sort().values
        return values[chosen].mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class Bulyan(Krum):
    """Repeated Krum, then a trimmed mean around the median (El Mhamdi et al., 2018)."""

    per_attacker: ClassVar[int] = 4

    def reduce(self, values: Tensor, weights: Tensor) -> Tensor:
        """Choose n - 2 f one after another, then average the values nearest to the median."""
        import torch

        f = self.attackers(len(values))
        distances, left, chosen = squared_distances(values), list(range(len(values))), list[int]()
        for _ in range(len(values) - 2 * f):
            among = torch.tensor(left, device=values.device)
            best = int(krum_scores(distances[among][:, among], f).argmin()) if len(left) > 1 else 0
            chosen.append(left.pop(best))
        who = torch.tensor(sorted(chosen), device=values.device)
        return torch.cat([near_median(part[who], len(who) - 2 * f) for part in values.split(PIECE, dim=1)])
