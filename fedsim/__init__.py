"""fedsim: federated fine-tuning of language models, simulated on one machine.

Importing it imports nothing heavy; torch and transformers come with the first run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # editors and type checkers do not follow __getattr__
    from fedsim import privacy
    from fedsim.analysis import plots
    from fedsim.analysis.cross_site import cross_site
    from fedsim.analysis.diff import diff_runs
    from fedsim.analysis.listing import list_runs
    from fedsim.analysis.load import confusion_matrix, load_partition, load_runs
    from fedsim.analysis.scores import summary
    from fedsim.analysis.sweeps import sweep_table
    from fedsim.config.experiment import Experiment
    from fedsim.core.errors import ClientError, UserError
    from fedsim.models.export import load_adapter
    from fedsim.runs.build import batches
    from fedsim.runs.predict import predict
    from fedsim.runs.run import Run, run
    from fedsim.runs.scripts import run_script
    from fedsim.runs.sweep import run_sweep
    from fedsim.runs.sweep_plan import Sweep
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
    "cross_site",
    "diff_runs",
    "evaluate_zero_shot",
    "list_runs",
    "load_adapter",
    "load_partition",
    "load_runs",
    "plots",
    "predict",
    "privacy",
    "run",
    "run_script",
    "run_sweep",
    "summary",
    "sweep_table",
]
_WHERE = {
    "Experiment": "config.experiment",
    "run": "runs.run",
    "Run": "runs.run",
    "Sweep": "runs.sweep_plan",
    "run_script": "runs.scripts",
    "run_sweep": "runs.sweep",
    "batches": "runs.build",
    "predict": "runs.predict",
    "load_runs": "analysis.load",
    "list_runs": "analysis.listing",
    "load_partition": "analysis.load",
    "confusion_matrix": "analysis.load",
    "cross_site": "analysis.cross_site",
    "diff_runs": "analysis.diff",
    "summary": "analysis.scores",
    "sweep_table": "analysis.sweeps",
    "load_adapter": "models.export",
    "evaluate_zero_shot": "zero_shot",
    "UserError": "core.errors",
    "ClientError": "core.errors",
}
_MODULES = {"plots": "fedsim.analysis.plots", "privacy": "fedsim.privacy"}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(_MODULES[name])
        if name not in _WHERE:
            raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
        return getattr(import_module(f"fedsim.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
