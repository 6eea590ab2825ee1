"""NVFlare's module names for the client API, so that a script written for it runs with no change.

`nvflare` and what scripts import from it stand for the modules of `fedsim.client` where the real package is not installed. The
constants are NVFlare's names and values.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

_LAZY = {"tracking": "fedsim.client.tracking", "lightning": "fedsim.client.lightning", "hf": "fedsim.client.hf"}


class FLMetaKey:
    """Keys of `FLModel.meta`."""

    JOB_ID = "job_id"
    CURRENT_ROUND = "current_round"
    TOTAL_ROUNDS = "total_rounds"
    NUM_STEPS_CURRENT_ROUND = "NUM_STEPS_CURRENT_ROUND"
    PROCESS_RC_KEY = "_process_rc_"
    SITE_NAME = "site_name"
    INITIAL_METRICS = "initial_metrics"
    FILTERS = "filters"


class ModelName:
    """Names of models that a client may be asked for."""

    BEST_MODEL = "best_model"
    FINAL_MODEL = "final_model"


class NPConstants:
    """Names in scripts that train arrays."""

    NUMPY_KEY = "numpy_key"
    NUMPY_MODEL = "numpy_model"
    INIT_MODEL = "init_model"


class AppConstants:
    """Names of the server's events and tasks."""

    CURRENT_ROUND = "current_round"
    NUM_ROUNDS = "num_rounds"
    TASK_TRAIN = "train"
    TASK_VALIDATION = "validate"
    TASK_SUBMIT_MODEL = "submit_model"
    SUBMIT_MODEL_NAME = "submit_model_name"


class AlgorithmConstants:
    """Names that SCAFFOLD puts into a message's meta."""

    SCAFFOLD_CTRL_DIFF = "scaffold_c_diff"
    SCAFFOLD_CTRL_GLOBAL = "scaffold_c_global"


class ConfigKey:
    """Keys of a client's configuration."""

    EXCHANGE_FORMAT = "exchange_format"
    TRANSFER_TYPE = "transfer_type"
    TRAIN_WITH_EVAL = "train_with_evaluation"
    TASK_EXCHANGE = "TASK_EXCHANGE"
    METRICS_EXCHANGE = "METRICS_EXCHANGE"


class ExchangeFormat:
    """What parameters are exchanged as."""

    RAW = "raw"
    NUMPY = "numpy"
    PYTORCH = "pytorch"


class ReservedKey:
    """Names of properties of a run."""

    JOB_ID = "__job_id__"
    IDENTITY_NAME = "__identity_name__"


def compat() -> bool:
    """Put the client API under NVFlare's names for the scripts of this process; False where NVFlare is installed.

    Names that fedsim does not have fail at import with one line.
    """
    held = sys.modules.get("nvflare")
    if held is None and importlib.util.find_spec("nvflare") is not None:
        return False
    if held is not None:
        return getattr(held, "__fedsim__", False)
    from fedsim import client

    holds: dict[str, dict[str, Any]] = {
        "nvflare": {"__fedsim__": True},
        "nvflare.client": {name: getattr(client, name) for name in client.__all__},
        "nvflare.client.config": {"ConfigKey": ConfigKey, "ExchangeFormat": ExchangeFormat},
        "nvflare.client.api": {name: getattr(client, name) for name in client.__all__},
        "nvflare.app_common": {},
        "nvflare.app_common.abstract": {},
        "nvflare.app_common.abstract.fl_model": {"FLModel": client.FLModel, "ParamsType": client.ParamsType},
        "nvflare.app_common.app_constant": {
            "ModelName": ModelName,
            "AppConstants": AppConstants,
            "AlgorithmConstants": AlgorithmConstants,
        },
        "nvflare.app_common.np": {},
        "nvflare.app_common.np.constants": {"NPConstants": NPConstants},
        "nvflare.apis": {},
        "nvflare.apis.fl_constant": {"FLMetaKey": FLMetaKey, "ReservedKey": ReservedKey},
    }
    for name, values in holds.items():
        _add(name, values)
    for name, source in _LAZY.items():
        _add(f"nvflare.client.{name}", {}, source)
    return True


class _Module(ModuleType):
    """A module under NVFlare's name; what it lacks comes from `source`, which is imported when it is asked for."""

    source: str | None = None

    def __getattr__(self, name: str) -> Any:
        if self.source is not None and not name.startswith("__"):
            return getattr(importlib.import_module(self.source), name)
        raise AttributeError(f"{self.__name__} has no {name!r} under fedsim; docs/client-api.md lists what there is")


def _add(name: str, values: dict[str, Any], source: str | None = None) -> None:
    module = _Module(name)
    module.__path__ = []
    vars(module).update(values)
    module.source = source
    sys.modules[name] = module
    above, _, last = name.rpartition(".")
    if above:
        setattr(sys.modules[above], last, module)
