"""Aggregators: how the messages of a round's clients become one."""

from __future__ import annotations

from collections.abc import Callable

from fedsim.aggregators.base import GROUP, Accumulator, Aggregator, Buffer
from fedsim.aggregators.mean import WeightedMean, WeightedSum

AGGREGATORS: dict[str, Callable[[int], Aggregator]] = {"mean": WeightedMean, "sum": WeightedSum}
"""Name -> bytes of the parameters -> aggregator."""

__all__ = ["AGGREGATORS", "GROUP", "Accumulator", "Aggregator", "Buffer", "WeightedMean", "WeightedSum"]
