"""Gradients of single examples, clipped and summed by lane: what DP-SGD needs of a backward pass.

M. Abadi et al. Deep Learning with Differential Privacy. CCS 2016 (arXiv:1607.00133), algorithm 1. Each example goes through the model
as a lane of its own with a copy of its client's weights (`StackedNet.clipped`), so that one backward pass leaves the gradients of
all examples side by side, as batched products of activations and output gradients, whatever the trained layer is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Examples:
    """R examples of K lanes, those of a lane end to end.

    Args:
        counts: examples of each lane, K numbers; a lane may have none.
        device: where the sums are needed.

    Attributes:
        lane: lane of each example, int64 `[R]`, NumPy.
        of: the same on the device.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        sizes = np.asarray(counts, dtype=np.int64)
        self.shape = (len(sizes), int(sizes.max()))
        self.lane = np.repeat(np.arange(len(sizes)), sizes)
        within = np.arange(len(self.lane)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self.of = torch.from_numpy(self.lane).to(device)
        self._place = torch.from_numpy(self.lane * self.shape[1] + within).to(device)

    def sums(self, x: Tensor) -> Tensor:
        """`[R, ...]` -> `[K, ...]`: the sum over each lane's examples; no lane sees the values of another."""
        k, most = self.shape
        padded = x.new_zeros(k * most, *x.shape[1:]).index_copy_(0, self._place, x)
        return padded.view(k, most, *x.shape[1:]).sum(dim=1)

    def totals(self, sizes: Sequence[int]) -> list[int]:
        """The same of whole numbers, one for each example."""
        return np.bincount(self.lane, sizes, self.shape[0]).astype(np.int64).tolist()


def clipped_sums(grads: Sequence[Tensor], examples: Examples, clip: float, trains: Tensor) -> list[Tensor]:
    """Sum over each lane's examples of their gradients, each scaled down to norm `clip`.

    A gradient g is multiplied by min(1, clip / (|g| + 1e-6)), as in Opacus; one that is not finite counts 0, so that the bound
    holds whatever an example does.

    Args:
        grads: of each parameter, `[R, ...]`.
        examples: whose they are.
        clip: bound of the 2-norm over all parameters that train.
        trains: whether a parameter trains in a lane, bool `[K, P]`; where it does not, its gradient counts 0.

    Returns:
        Of each parameter `[K, ...]`.
    """
    mine = trains.index_select(0, examples.of)  # [R, P]
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in grads]
    norm = torch.where(mine, torch.stack(norms, dim=1), 0.0).square().sum(dim=1).sqrt()  # [R]
    factor = (clip / (norm + 1e-6)).clamp(max=1.0)
    out = []
    for g, counts in zip(grads, (mine & norm.isfinite()[:, None]).unbind(dim=1), strict=True):
        shape = (-1, *[1] * (g.dim() - 1))
        out.append(examples.sums(torch.where(counts.view(shape), g * factor.to(g.dtype).view(shape), 0.0)))
    return out
