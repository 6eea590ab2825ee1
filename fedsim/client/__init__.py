"""The client API: a local training script becomes a federated client with a few lines. Behaves as NVFlare's `nvflare.client`.

    import fedsim.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        ...  # load model.params, train
        flare.send(flare.FLModel(params=..., metrics={"accuracy": ...}, meta={"NUM_STEPS_CURRENT_ROUND": steps}))

docs/client-api.md has every name. Importing it imports neither torch nor numpy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fedsim.client.compat import compat
from fedsim.client.context import EVALUATE, SUBMIT, TRAIN, FLModel, ParamsType, here, warn_twice

__all__ = [
    "FLModel",
    "ParamsType",
    "clear",
    "compat",
    "evaluate",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "pending",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]


def init(rank: Any = None, config_file: str | None = None) -> None:
    """Begin; a second call only warns. The arguments are NVFlare's and have no effect.

    Raises:
        RuntimeError: outside a run.
    """
    context = here()
    if context.asked:
        warn_twice()
    context.asked = True


def receive(timeout: float | None = None) -> FLModel | None:
    """The model of the task at hand, waiting for the next task if there is none; None once the run has ended."""
    return here().receive()


def send(model: FLModel, clear_cache: bool = True) -> None:
    """Answer the task at hand: parameters, metrics or both.

    Args:
        model: the answer; to `train` its metrics are the scores of the model received.
        clear_cache: set `params` of the answer and of the model received to None, and let `receive` wait for the next task.

    Raises:
        RuntimeError: without a received model, twice for one task, or for an empty answer.
        TypeError: for what is no `FLModel`.
    """
    here().send(model, clear_cache)


def clear() -> None:
    """Forget the model received: `receive` waits for the next task."""
    here().received = None


def pending() -> bool:
    """Whether a task is at hand that has no answer yet."""
    context = here()
    return context.received is not None and not context.answered


def is_running() -> bool:
    """Whether there is a task, waiting for the next one if none is at hand."""
    return receive() is not None


def is_train() -> bool:
    """Whether the task at hand is to train."""
    return get_task_name() == TRAIN


def is_evaluate() -> bool:
    """Whether the task at hand is to score the model received: the answer holds metrics."""
    return get_task_name() == EVALUATE


def is_submit_model() -> bool:
    """Whether the task at hand is to send the client's own model, for cross-site evaluation."""
    return get_task_name() == SUBMIT


def get_task_name() -> str | None:
    """train, validate or submit_model; of the next task if none is at hand, and None once the run has ended."""
    context = here()
    context.receive()
    return context.task


def get_site_name() -> str:
    """The client's name."""
    return here().site


def get_job_id() -> str:
    """The run's id."""
    return here().job


def get_config() -> dict[str, Any]:
    """The `client` section of the config."""
    return here().config


def system_info() -> dict[str, str]:
    """Names of the client (`site_name`, `identity`) and of the run (`job_id`)."""
    context = here()
    return {"identity": context.site, "site_name": context.site, "job_id": context.job}


def log(key: str, value: Any, data_type: Any = None, global_step: int | None = None, **extra: Any) -> bool:
    """Log a number as a metric of this client, of the split `train`; what is no number is left out.

    Returns:
        Whether it was logged.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        return False
    step = global_step if global_step is not None else extra.get("step")
    here().on_log(str(key), number, None if step is None else int(step))
    return True


def shutdown() -> None:
    """No more tasks for this client: `receive` gives None, and what is sent is dropped."""
    context = here()
    context.over, context.received = True, None


def _task(function: Callable[..., Any], answer: Callable[[Any], FLModel]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **keys: Any) -> Any:
        given = receive()
        found = function(*(args or (given,)), **keys)
        if pending():
            send(answer(found))
        return found

    return wrapped


def train(function: Callable[..., FLModel]) -> Callable[..., FLModel]:
    """Decorator: the function gets the model received and returns the answer, which is sent."""
    return _task(function, lambda found: found)


def evaluate(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the function gets the model received and returns a number or a dict of metrics.

    Of a `train` task they go with the answer to come; an `evaluate` task is answered with them.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **keys: Any) -> Any:
        given = receive()
        found = function(*(args or (given,)), **keys)
        metrics = found if isinstance(found, dict) else {"score": float(found)}
        context = here()
        if context.task == EVALUATE and pending():
            send(FLModel(metrics=metrics))
        elif context.received is not None:
            context.metrics = metrics
        return found

    return wrapped
