"""Federated algorithms, by the name the config uses."""

from __future__ import annotations

from fedsim.algorithms.base import Algorithm, Buffered, ClientOptimizer, ClientView, Info, Local, Server, per_lane
from fedsim.algorithms.fedavg import FedAvg
from fedsim.algorithms.fedavgm import FedAvgM
from fedsim.algorithms.fedbuff import FedBuff
from fedsim.algorithms.feddyn import FedDyn
from fedsim.algorithms.fedex_lora import FedExLora
from fedsim.algorithms.fednova import FedNova
from fedsim.algorithms.fedopt import FedAdagrad, FedAdam, FedYogi
from fedsim.algorithms.fedprox import FedProx
from fedsim.algorithms.flexlora import FlexLora
from fedsim.algorithms.flora import Flora
from fedsim.algorithms.qfedavg import QFedAvg
from fedsim.algorithms.scaffold import Scaffold

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fednova": FedNova,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "feddyn": FedDyn,
    "qfedavg": QFedAvg,
    "fedbuff": FedBuff,
    "flora": Flora,
    "fedex_lora": FedExLora,
    "flexlora": FlexLora,
}

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Buffered",
    "ClientOptimizer",
    "ClientView",
    "FedAvg",
    "Info",
    "Local",
    "Server",
    "per_lane",
]
