"""Federated algorithms, by the name the config uses."""

from __future__ import annotations

from fedsim.algorithms.base import Algorithm, Context, Local

ALGORITHMS: dict[str, type[Algorithm]] = {"fedavg": Algorithm, "local": Local}

__all__ = ["ALGORITHMS", "Algorithm", "Context", "Local"]
