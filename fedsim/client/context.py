"""What the client API of a script talks to: the task at hand, and the way to the next one. One context per client, by thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

TRAIN, EVALUATE, SUBMIT = "train", "validate", "submit_model"
TASKS = (TRAIN, EVALUATE, SUBMIT)
STEPS = "NUM_STEPS_CURRENT_ROUND"
_log = logging.getLogger("fedsim.client")
_here = threading.local()


class ParamsType(StrEnum):
    """Whether parameters are a model, or its difference from the model received."""

    FULL = "FULL"
    DIFF = "DIFF"


class FLModel:
    """What travels between the server and a client's script.

    Args:
        params_type: FULL or DIFF; None = FULL where there are parameters.
        params: name -> array or tensor; None for metrics alone.
        optimizer_params: carried along, not used.
        metrics: name -> number; of an answer to `train`, the scores of the model received.
        start_round, current_round, total_rounds: numbers of rounds; the first is 0.
        meta: anything; `NUM_STEPS_CURRENT_ROUND` is the weight in the mean.

    Raises:
        ValueError: for neither parameters nor metrics, or a params_type that is none.
    """

    def __init__(
        self,
        params_type: ParamsType | str | None = None,
        params: Any = None,
        optimizer_params: Any = None,
        metrics: dict[str, Any] | None = None,
        start_round: int | None = 0,
        current_round: int | None = None,
        total_rounds: int | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        if params_type is not None:
            try:
                params_type = ParamsType(params_type)
            except ValueError:
                raise ValueError(f"params_type: {params_type!r} is not FULL or DIFF") from None
            if params is None:
                raise ValueError(f"params_type: {params_type.value} needs params")
        elif params is not None:
            params_type = ParamsType.FULL
        for name, value in (("metrics", metrics), ("meta", meta)):
            if not isinstance(value or {}, Mapping):
                raise ValueError(f"{name}: {value!r} is not a dict")
        self.params_type, self.params, self.optimizer_params = params_type, params, optimizer_params
        self.metrics, self.meta = metrics, dict(meta or {})
        self.start_round, self.current_round, self.total_rounds = start_round, current_round, total_rounds

    def __repr__(self) -> str:
        held = "none" if self.params is None else len(self.params)
        return f"FLModel(round {self.current_round} of {self.total_rounds}, params: {held}, metrics: {self.metrics})"


@dataclass
class Context:
    """One client's side of the API.

    Attributes:
        site, job: names of the client and of the run.
        next_task: waits for the next task, (kind, model), None = there is none any more; the script gives up its turn in it.
        on_send: called with each answer.
        on_log: called with (name, value, step).
        task: kind of the task at hand.
        received: its model, until it is cleared.
        answered: whether the task at hand has its answer.
        over: the run has ended for this client.
        asked: whether `init` was called.
        config: the section `client` of the config.
        metrics: scores of the model received, for an answer that brings none.
    """

    site: str
    job: str
    next_task: Callable[[], tuple[str, FLModel] | None]
    on_send: Callable[[FLModel], None]
    on_log: Callable[[str, float, int | None], None]
    task: str | None = None
    received: FLModel | None = None
    answered: bool = False
    over: bool = False
    asked: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] | None = None

    def receive(self) -> FLModel | None:
        """The model of the task at hand, or of the next one; None once there is none any more."""
        if self.received is None and not self.over:
            found = self.next_task()
            if found is None:
                self.over, self.task = True, None
            else:
                (self.task, self.received), self.answered, self.metrics = found, False, None
        return self.received

    def send(self, model: FLModel, clear_cache: bool) -> None:
        """Answer the task at hand."""
        if self.over:
            return
        if self.received is None:
            raise RuntimeError("send without receive: each answer belongs to one model received; call receive first")
        if self.answered:
            raise RuntimeError("send: this task has its answer already; send once for each model received")
        if not isinstance(model, FLModel):
            raise TypeError(f"send: {type(model).__name__} is not an FLModel")
        if model.params is None and model.metrics is None:
            raise RuntimeError("send: the model has neither params nor metrics")
        self.answered = True
        model.metrics = self.metrics if model.metrics is None else model.metrics
        self.on_send(model)
        if clear_cache:
            model.params = None
            self.received.params = None
            self.received = None


def use(context: Context | None) -> None:
    """The context of this thread."""
    _here.context = context


def here() -> Context:
    """The context of the script that calls.

    Raises:
        RuntimeError: outside a run.
    """
    found = getattr(_here, "context", None)
    if found is None:
        raise RuntimeError(
            "no federated run: start the script by `fedsim script FILE.py`, or as client.script of a config"
        )
    return found


def warn_twice() -> None:
    """A second `init` in a script."""
    _log.warning("init was called before in this script; the second call has no effect")
