"""Federated algorithms, by the name the config uses."""

from __future__ import annotations

from fedsim.algorithms.base import Algorithm, ClientView, Info, Local, Server, per_lane
from fedsim.algorithms.fedavg import FedAvg

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
}

__all__ = ["ALGORITHMS", "Algorithm", "ClientView", "FedAvg", "Info", "Local", "Server", "per_lane"]
