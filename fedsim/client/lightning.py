"""Lightning's `Trainer` as a client; behaves as NVFlare's `nvflare.client.lightning` (docs/client-api.md).

    flare.patch(trainer)
    while flare.is_running():
        trainer.validate(module)  # the received model: the score by which the best global model is selected
        trainer.fit(module)       # one round

Works with trainers of the packages `lightning` and `pytorch_lightning`. Everything lies on the trainer, so that those of many
clients share a process.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from fedsim import client as flare
from fedsim.client import *  # noqa: F403  scripts import the rest of the client API from here, too
from fedsim.client.patching import (
    EVALUATE,
    STEPS,
    SUBMIT,
    TRAIN,
    Task,
    copied,
    is_running,  # noqa: F401  in `__all__`
    load,
    meta_of,
    numbers,
    state_of,
)
from fedsim.core.errors import UserError

__all__ = [*flare.__all__, "logger", "patch"]
_log = logging.getLogger(__name__)
_PACKAGES = ("pytorch_lightning", "lightning.pytorch")
_UNLIMITED = 1000  # epochs of a fit that has no limit


def patch(
    trainer: Any, restore_state: bool = True, load_state_dict_strict: bool = True, update_fit_loop: bool = True
) -> Any:
    """Make `trainer.validate` and `trainer.fit` receive the model of the round, and send theirs.

    A round trains `max_epochs` epochs or `max_steps` steps, as the trainer was made. `__fl_meta__` of the module, a dict, goes
    with the model.

    Args:
        trainer: a Lightning `Trainer` on one process.
        restore_state: optimizers, their schedulers and the scaler go on in the next round; False: each begins afresh.
        load_state_dict_strict: received and own names have to be the same.
        update_fit_loop: raise the trainer's `max_epochs` and `max_steps` from round to round; False: the script does.

    Returns:
        The trainer.

    Raises:
        TypeError: `trainer` is no Lightning `Trainer`.
        UserError: it trains on several processes.
    """
    package = next((p for p in _PACKAGES if any(c.__module__.startswith(p) for c in type(trainer).__mro__)), None)
    if package is None or not hasattr(trainer, "fit_loop"):
        raise TypeError(f"patch takes a Lightning Trainer, not {type(trainer).__name__}")
    if trainer.world_size > 1:
        raise UserError(f"patch takes trainers on one process, this one has {trainer.world_size}; give devices=1")
    if getattr(trainer, "_fedsim", None) is None:
        trainer._fedsim = _Rounds(trainer, restore_state, load_state_dict_strict, update_fit_loop)
        base = import_module(f"{package}.callbacks").Callback
        hooks = {
            name: getattr(trainer._fedsim, name) for name in ("on_fit_start", "on_train_start", "on_validation_start")
        }
        trainer.callbacks.append(type("FLCallback", (base,), {n: staticmethod(f) for n, f in hooks.items()})())
    return trainer


class _Rounds:
    """One patched trainer: the task at hand, and what lives on across its rounds."""

    def __init__(self, trainer: Any, restore: bool, strict: bool, update: bool) -> None:
        self.trainer, self.restore, self.strict, self.update, self.task = trainer, restore, strict, update, Task()
        unlimited = trainer.max_epochs is None and trainer.max_steps == -1
        self.epochs, self.steps = _UNLIMITED if unlimited else trainer.max_epochs, trainer.max_steps
        self.states: dict[str, Any] = {}  # of optimizers, schedulers and precision, after the last round
        self.trained: dict[str, Any] | None = None  # the last model sent
        self.explicit = False  # inside `trainer.validate`
        self.do = {name: getattr(trainer, name) for name in ("fit", "validate")}
        trainer.fit, trainer.validate = self.fit, self.validate

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.validate` of the received model; without a task that of the module as it is."""
        kind = self.task.kind()
        if kind == SUBMIT:
            return self.submit(*args, **kwargs)
        self.explicit = kind is not None
        try:
            scores = self.do["validate"](*args, **kwargs)
        finally:
            self.explicit = False
        if kind is not None and self.task.metrics is None:
            self.task.metrics = numbers(self.trainer.callback_metrics)
        if kind == EVALUATE:
            self.task.answer()
        return scores

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer.fit` for one round; where no training is asked for, nothing."""
        kind, trainer = self.task.kind(), self.trainer
        if kind == SUBMIT:
            self.submit(*args, **kwargs)
        if kind != TRAIN:
            _log.info("fit is skipped: this task is not to train, or is done")
            return
        before = trainer.global_step
        if self.update and self.epochs is not None and self.epochs > 0:
            trainer.fit_loop.max_epochs = trainer.current_epoch + self.epochs
        if self.update and self.steps > 0:
            trainer.fit_loop.epoch_loop.max_steps = before + self.steps
        self.do["fit"](*args, **kwargs)
        trainer.num_sanity_val_steps = 0  # once is enough
        if self.restore:
            self.states = {
                "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "precision": trainer.precision_plugin.state_dict(),
            }
        module = trainer.lightning_module
        self.trained = copied(state_of(module))
        self.task.answer(self.trained, meta_of(module, trainer.global_step - before))

    def submit(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        """Send the model as it was after its last round."""
        module = self.trainer.lightning_module if model is None else model
        self.task.answer(copied(state_of(module)) if self.trained is None else self.trained, {STEPS: 0})

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """The optimizers are new in each fit; they take up the states of the last."""
        if self.states:
            trainer.strategy.load_optimizer_state_dict(self.states)
            trainer.precision_plugin.load_state_dict(self.states["precision"])
            for config, state in zip(trainer.lr_scheduler_configs, self.states["schedulers"], strict=True):
                config.scheduler.load_state_dict(state)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Training starts from the received parameters, whatever checkpoint or sanity check came before."""
        load(module, self.task.model.params, self.strict)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """An explicit validation is of the received model; one inside a fit is of the model in training."""
        if self.explicit:
            load(module, self.task.model.params, self.strict)


def logger() -> Any:
    """A logger for `Trainer(logger=...)` that sends what the module logs as metrics of the client."""
    package = next((p for p in _PACKAGES if p in sys.modules), _PACKAGES[0])

    class ClientLogger(import_module(f"{package}.loggers.logger").Logger):
        """Sends metrics; hyperparameters stay here."""

        name, version = "fedsim", None

        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            for name, value in numbers(metrics).items():
                flare.log(name, value, global_step=step)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    return ClientLogger()
