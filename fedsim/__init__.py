"""fedsim: federated fine-tuning of language models, simulated on one machine.

Importing it imports nothing heavy; torch and transformers come with the first run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # editors and type checkers do not follow __getattr__
    from fedsim import plots
    from fedsim.build import batches
    from fedsim.config import Experiment
    from fedsim.diff import diff_runs
    from fedsim.errors import ClientError, UserError
    from fedsim.experiment import Run, run
    from fedsim.models.adapters import load_adapter
    from fedsim.runs import confusion_matrix, list_runs, load_partition, load_runs, summary
    from fedsim.sweep import run_sweep
    from fedsim.sweep_plan import Sweep
    from fedsim.tables import sweep_table
    from fedsim.zero_shot import evaluate_zero_shot

__version__ = "0.1.0"
__all__ = [
    "ClientError",
    "Experiment",
    "Run",
    "Sweep",
    "UserError",
    "__version__",
    "batches",
    "confusion_matrix",
    "diff_runs",
    "evaluate_zero_shot",
    "list_runs",
    "load_adapter",
    "load_partition",
    "load_runs",
    "plots",
    "run",
    "run_sweep",
    "summary",
    "sweep_table",
]
_WHERE = {
    "Experiment": "config",
    "run": "experiment",
    "Run": "experiment",
    "Sweep": "sweep_plan",
    "run_sweep": "sweep",
    "batches": "build",
    "load_runs": "runs",
    "list_runs": "runs",
    "load_partition": "runs",
    "confusion_matrix": "runs",
    "diff_runs": "diff",
    "summary": "runs",
    "sweep_table": "tables",
    "load_adapter": "models.adapters",
    "evaluate_zero_shot": "zero_shot",
    "UserError": "errors",
    "ClientError": "errors",
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "plots":
            return import_module("fedsim.plots")
        if name not in _WHERE:
            raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
        return getattr(import_module(f"fedsim.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
