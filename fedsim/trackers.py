"""Experiment trackers - TensorBoard, W&B, MLflow - through accelerate; each metrics row becomes one point."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.errors import UserError
from fedsim.types import Row

_PACKAGE = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def check_trackers(names: Sequence[str]) -> None:
    """Whether the trackers' packages are here.

    Raises:
        UserError: if one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(_PACKAGE[name]) is None:
            raise UserError(
                f"tracking.with: {name!r} is not installed; pip install {_PACKAGE[name]}, or take it off the list"
            )


class Trackers:
    """The trackers of one run; see `check_trackers` for what they need.

    Args:
        names: tensorboard | wandb | mlflow.
        experiment: the experiment's name.
        folder: the run folder; TensorBoard writes into it.
        config: the resolved config.

    """

    def __init__(self, names: Sequence[str], experiment: str, folder: Path, config: dict[str, Any]) -> None:
        self._trackers: list[Any] = []
        if not names:
            return
        from accelerate import tracking

        for name in names:
            if name == "tensorboard":
                tracker = tracking.TensorBoardTracker(run_name=experiment, logging_dir=folder / "tensorboard")
            elif name == "wandb":
                tracker = tracking.WandBTracker(run_name=experiment, name=folder.name)
            else:
                tracker = tracking.MLflowTracker(experiment_name=experiment, run_name=folder.name)
            tracker.start()
            tracker.store_init_configuration(_flat(config))
            self._trackers.append(tracker)

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def log(self, rows: Sequence[Row]) -> None:
        """One point a row: `scope/client/split/name` at the row's optimiser step."""
        for row in rows if self._trackers else ():
            key = "/".join((row.scope, row.client or "merged", row.split, row.name))
            for tracker in self._trackers:
                # W&B drops points whose step is behind its last one, and every client starts at 0: it counts by itself.
                if tracker.name == "wandb":
                    tracker.log({key: row.value, f"{key}/step": row.step})
                else:
                    tracker.log({key: row.value}, step=row.step)

    def close(self) -> None:
        """Finish; may be called twice."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return out
