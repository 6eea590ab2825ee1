"""Running weighted means: `zero / add / merge / result`, in a fixed order, in the memory of the device.

A worker adds its clients' updates to a partial sum; the partial sums are merged in pack order, whoever made them, and
divided once at the end. Sums are float32 (float64 under a float64 base) whatever the base's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.params import Layout, Params


@dataclass
class Partial:
    """A sum under way: `total` `[numel]` holds the sum of weight x update, `weight` the sum of the weights."""

    total: Tensor
    weight: float = 0.0


class WeightedMean:
    """sum_k w_k u_k / sum_k w_k (McMahan et al., 2017, algorithm 1), for updates laid out by `layout`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def zero(self, total: Tensor) -> Partial:
        """An empty sum in the buffer `total`, `[numel]`, which is cleared."""
        total.zero_()
        return Partial(total)

    def add(self, partial: Partial, updates: Params, weights: Sequence[float]) -> None:
        """Add the updates of K clients, by name `[K, ...]`, each with its weight; in place."""
        into = self.layout.views(partial.total)
        w = torch.tensor(weights, dtype=partial.total.dtype, device=partial.total.device)
        for name, total in into.items():
            total.add_(torch.tensordot(w, updates[name], dims=1))
        partial.weight += sum(weights)

    def merge(self, into: Partial, other: Partial) -> None:
        """Add another sum, which may lie on another device; in place."""
        into.total.add_(other.total.to(into.total.device, non_blocking=False))
        into.weight += other.weight

    def result(self, partial: Partial) -> Params:
        """The mean, by name.

        Raises:
            ZeroDivisionError: if nothing, or only weight zero, was added.
        """
        if partial.weight == 0:
            raise ZeroDivisionError("the mean of no updates, or of updates whose weights are all zero")
        return self.layout.views(partial.total / partial.weight)
