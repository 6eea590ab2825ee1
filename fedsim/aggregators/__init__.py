"""Aggregators: how the messages of a round's clients become one."""

from __future__ import annotations

from collections.abc import Callable

from fedsim.aggregators.base import GROUP, Accumulator, Aggregator, Buffer
from fedsim.aggregators.coordinates import Median, TrimmedMean
from fedsim.aggregators.fltrust import FLTrust
from fedsim.aggregators.geometric import GeometricMedian, NormClip
from fedsim.aggregators.krum import Bulyan, Krum, MultiKrum
from fedsim.aggregators.mean import WeightedMean, WeightedSum
from fedsim.aggregators.slots import Slotted
from fedsim.aggregators.stack import Stack

AGGREGATORS: dict[str, Callable[[int], Aggregator]] = {
    "mean": WeightedMean,
    "sum": WeightedSum,
    "stack": lambda nbytes: Stack(),
}
"""Name -> bytes of the parameters -> aggregator."""

RULES: dict[str, type[Slotted]] = {
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "bulyan": Bulyan,
    "geometric_median": GeometricMedian,
    "norm_clip": NormClip,
    "fltrust": FLTrust,
}
"""Rules that keep a slot for each client, by the name the config uses; their fields are the keys of the section."""

__all__ = [
    "AGGREGATORS",
    "GROUP",
    "RULES",
    "Accumulator",
    "Aggregator",
    "Buffer",
    "Slotted",
    "Stack",
    "WeightedMean",
    "WeightedSum",
]
