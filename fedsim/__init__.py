"""fedsim: federated fine-tuning of language models, simulated on one machine.

Importing it imports nothing heavy; torch and transformers come with the first run.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Experiment": "fedsim.config",
    "run": "fedsim.experiment",
    "Run": "fedsim.experiment",
    "Sweep": "fedsim.sweep",
    "run_sweep": "fedsim.sweep",
    "batches": "fedsim.build",
    "load_runs": "fedsim.runs",
    "list_runs": "fedsim.runs",
    "load_partition": "fedsim.runs",
    "confusion_matrix": "fedsim.runs",
    "diff_runs": "fedsim.diff",
    "summary": "fedsim.runs",
    "sweep_table": "fedsim.tables",
    "load_adapter": "fedsim.models.adapters",
    "evaluate_zero_shot": "fedsim.zero_shot",
    "UserError": "fedsim.errors",
    "ClientError": "fedsim.errors",
    "plots": "",
}
__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "plots":
        return import_module("fedsim.plots")
    if name not in _WHERE:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
