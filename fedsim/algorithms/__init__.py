"""Federated algorithms, by the name the config uses."""

from __future__ import annotations

from fedsim.algorithms.apfl import APFL
from fedsim.algorithms.base import Algorithm, Buffered, ClientOptimizer, ClientView, Info, Local, Server, per_lane
from fedsim.algorithms.ditto import Ditto
from fedsim.algorithms.fedavg import FedAvg
from fedsim.algorithms.fedavgm import FedAvgM
from fedsim.algorithms.fedbuff import FedBuff
from fedsim.algorithms.feddyn import FedDyn
from fedsim.algorithms.fedex_lora import FedExLora
from fedsim.algorithms.fednova import FedNova
from fedsim.algorithms.fedopt import FedAdagrad, FedAdam, FedYogi
from fedsim.algorithms.fedper import FedPer, FedRep
from fedsim.algorithms.fedprox import FedProx
from fedsim.algorithms.fedrot_lora import FedRotLora
from fedsim.algorithms.fedsa_lora import FedSALora
from fedsim.algorithms.fedsvd import FedSVD
from fedsim.algorithms.ffa_lora import FFALora
from fedsim.algorithms.flexlora import FlexLora
from fedsim.algorithms.flora import Flora
from fedsim.algorithms.hetlora import HetLora
from fedsim.algorithms.perfedavg import PerFedAvg
from fedsim.algorithms.pfedme import PFedMe
from fedsim.algorithms.qfedavg import QFedAvg
from fedsim.algorithms.rolora import RoLora
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
    "ditto": Ditto,
    "fedper": FedPer,
    "fedrep": FedRep,
    "apfl": APFL,
    "pfedme": PFedMe,
    "perfedavg": PerFedAvg,
    "ffa_lora": FFALora,
    "rolora": RoLora,
    "fedsa_lora": FedSALora,
    "hetlora": HetLora,
    "fedsvd": FedSVD,
    "fedrot_lora": FedRotLora,
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
