"""Writers with the methods of TensorBoard's, MLflow's and W&B's: numbers become metrics of the client (`fedsim.client.log`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.client import log


class SummaryWriter:
    """As `torch.utils.tensorboard.SummaryWriter`, for numbers; texts are left out."""

    def __init__(self, *args: Any, **keys: Any) -> None: ...

    def add_scalar(self, tag: str, scalar: float, global_step: int | None = None, **keys: Any) -> None:
        """Log one number."""
        log(tag, scalar, global_step=global_step)

    def add_scalars(self, tag: str, scalars: Mapping[str, float], global_step: int | None = None, **keys: Any) -> None:
        """Log numbers as TAG/NAME."""
        for name, value in scalars.items():
            log(f"{tag}/{name}", value, global_step=global_step)

    def add_text(self, tag: str, text: str, global_step: int | None = None, **keys: Any) -> None:
        """Nothing: a metric is a number."""

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing to close."""


class MLflowWriter:
    """As the functions of `mlflow`, for metrics; parameters and tags are left out."""

    def __init__(self, *args: Any, **keys: Any) -> None: ...

    def log_metric(self, key: str, value: float, step: int | None = None) -> None:
        """Log one number."""
        log(key, value, global_step=step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log several numbers."""
        for key, value in metrics.items():
            log(key, value, global_step=step)

    def log_param(self, key: str, value: Any) -> None:
        """Nothing: the config of a run has its parameters."""

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def log_text(self, text: str, artifact_file_path: str) -> None:
        """Nothing."""

    def set_tag(self, key: str, tag: Any) -> None:
        """Nothing."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Nothing."""


class WandBWriter:
    """As a run of `wandb`, for numbers."""

    def __init__(self, *args: Any, **keys: Any) -> None: ...

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log several numbers."""
        for key, value in metrics.items():
            log(key, value, global_step=step)
