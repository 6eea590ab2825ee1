"""Running weighted means: `zero / add / merge / result`, in a fixed order, in the memory of the device.

Updates are added in pack order, whoever made them: straight into the one sum, chunk by chunk, or to a worker's partial sum
that is merged in its turn. The sum is divided once at the end; it is float32 (float64 under a float64 base) whatever the
base's type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.core.params import LARGE, Chunk, Layout, Params
from fedsim.core.types import Partial

__all__ = ["Partial", "WeightedMean"]


class WeightedMean:
    """sum_k w_k u_k / sum_k w_k (McMahan et al., 2017, algorithm 1), for updates laid out by `layout`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        (self.everything,) = layout.chunks()

    def zero(self, total: Tensor) -> Partial:
        """An empty sum in the buffer `total`, `[numel]`, which is cleared."""
        total.zero_()
        return Partial(total)

    def add(self, partial: Partial, updates: Params, weights: Sequence[float], chunk: Chunk | None = None) -> None:
        """Add the updates of K clients, by name `[K, ...]`, each with its weight; in place.

        Args:
            partial: the sum, on any device.
            updates: of the chunk.
            weights: one a client.
            chunk: where they belong; None = everywhere. Weights count once, with the last chunk.
        """
        chunk = chunk or self.everything
        for name, total in chunk.views(partial.total[chunk.span]).items():
            update = updates[name].to(total.device)
            if len(weights) == 1 and self.layout.nbytes >= LARGE:
                total.add_(update[0], alpha=weights[0])  # one pass over memory; the product is not rounded by itself
            else:
                w = torch.tensor(weights, dtype=total.dtype, device=total.device)
                total.add_(torch.tensordot(w, update.to(total.dtype), dims=1))  # as by way of a partial sum, to the bit
        if chunk.stop == self.layout.numel:
            partial.weight += sum(weights)

    def merge(self, into: Partial, other: Partial) -> None:
        """Add another sum, which may lie on another device; in place."""
        into.total.add_(other.total.to(into.total.device, non_blocking=False))
        into.weight += other.weight

    def result(self, partial: Partial, chunk: Chunk | None = None) -> Params:
        """The mean, by name, of a chunk or of everything.

        Raises:
            ZeroDivisionError: if nothing, or only weight zero, was added.
        """
        if partial.weight == 0:
            raise ZeroDivisionError("the mean of no updates, or of updates whose weights are all zero")
        chunk = chunk or self.everything
        return chunk.views(partial.total[chunk.span] / partial.weight)
