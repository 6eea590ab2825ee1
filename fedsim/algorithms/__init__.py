"""Federated algorithms, by the name the config uses."""

from __future__ import annotations

from fedsim.algorithms.base import Algorithm, ClientView, Info, Local, Server, per_lane
from fedsim.algorithms.fedavg import FedAvg
from fedsim.algorithms.fedopt import FedAdam
from fedsim.algorithms.fedprox import FedProx
from fedsim.algorithms.scaffold import Scaffold

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedadam": FedAdam,
    "scaffold": Scaffold,
}

__all__ = ["ALGORITHMS", "Algorithm", "ClientView", "FedAvg", "Info", "Local", "Server", "per_lane"]
