"""What `hf` and `lightning` share: the task that a patched trainer works on, and parameters in and out of a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import client as flare
from fedsim.client import FLModel, ParamsType
from fedsim.core.errors import UserError

TRAIN, EVALUATE, SUBMIT = "train", "evaluate", "submit_model"
STEPS = "NUM_STEPS_CURRENT_ROUND"


class Task:
    """The task at hand: received once, when a trainer first needs it, and answered once.

    Attributes:
        model: the model received, or None before the first task.
        loaded: whether its parameters are in the trainer's model.
        metrics: scores of the received model: they go with the trained one, for the selection of the best global model.
    """

    def __init__(self) -> None:
        self.model: FLModel | None = None
        self.loaded, self.answered = False, False
        self.metrics: dict[str, float] | None = None

    def kind(self) -> str | None:
        """What is asked for; None where nothing is: the task is answered, or the run has ended."""
        if self.answered and not flare.pending():
            return None  # `receive` would wait for the next round in the middle of this one
        model = flare.receive()
        if model is None:
            return None
        if model is not self.model:
            Task.__init__(self)
            self.model = model
            model.begun = True
        return TRAIN if flare.is_train() else EVALUATE if flare.is_evaluate() else SUBMIT

    def answer(self, params: dict[str, Tensor] | None = None, meta: Mapping[str, Any] | None = None) -> None:
        """Send the parameters with the metrics, or the metrics alone."""
        what = {} if params is None else {"params": params, "params_type": ParamsType.FULL, "meta": dict(meta or {})}
        self.answered = True
        flare.send(FLModel(metrics=self.metrics, **what), clear_cache=False)
        flare.clear()


def is_running() -> bool:
    """As that of the API, but for a loop that would never end.

    Raises:
        RuntimeError: a trainer has begun the task at hand and not answered it.
    """
    if flare.pending() and getattr(flare.receive(), "begun", False):
        name = flare.get_task_name()
        method = "evaluate or validate" if name == "validate" else "train or fit"
        raise RuntimeError(
            f"the task at hand, {name}, has no answer yet: call the trainer's {method} before is_running"
        )
    return flare.is_running()


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among metrics, without the epoch and what measures the machine: two runs would differ in that."""
    machine = ("_runtime", "_per_second", "_preparation_time", "_compilation_time")
    values = {
        n: v.item() if hasattr(v, "item") else v for n, v in metrics.items() if n != "epoch" and not n.endswith(machine)
    }
    return {n: float(v) for n, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def copied(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """A model's tensors on the CPU, as copies: training goes on with the model's own."""
    return {prefix + n: t.detach().to("cpu", copy=True) for n, t in state.items() if isinstance(t, Tensor)}


def state_of(model: nn.Module, whole: bool = False) -> dict[str, Any]:
    """What travels: a model's state, but of each PEFT model in it the adapter alone, by PEFT's names; `whole`: all of it."""
    state, adapters = model.state_dict(), {} if whole else _adapters(model)
    kept = {n: t for n, t in state.items() if not n.startswith(tuple(adapters))}
    for prefix, adapter in adapters.items():
        kept |= {prefix + n: t for n, t in sys.modules["peft"].get_peft_model_state_dict(adapter).items()}
    return kept


def load(model: nn.Module, received: Mapping[str, Any] | None, strict: bool, whole: bool = False) -> None:
    """Put received parameters into a model, in place; none received: it stays as it is.

    Args:
        model: the model.
        received: name -> array or tensor, by the names of `state_of`.
        strict: names have to be the same on both sides; else those in common are loaded.
        whole: as for `state_of`.

    Raises:
        UserError: for names or shapes that do not match.
    """
    if not received:
        return
    state = state_of(model, whole)
    unknown, missing = [n for n in received if n not in state], [n for n in state if n not in received]
    if len(unknown) == len(received) or (strict and (unknown or missing)):
        raise UserError(
            f"the received parameters are not this model's: {_some(unknown)} not in the model, {_some(missing)} not "
            "received; look at the initial model, and at the arguments of patch"
        )
    for name in (n for n in received if n in state):
        if tuple(received[name].shape) != tuple(state[name].shape):
            got, has = tuple(received[name].shape), tuple(state[name].shape)
            raise UserError(f"the received parameter {name} has shape {got}, the model's {has}")
    values = {n: v if isinstance(v, Tensor) else torch.tensor(v) for n, v in received.items() if n in state}
    for prefix, adapter in ({} if whole else _adapters(model)).items():
        own = {n.removeprefix(prefix): values.pop(n) for n in list(values) if n.startswith(prefix)}
        sys.modules["peft"].set_peft_model_state_dict(adapter, own)
    model.load_state_dict(values, strict=False)


def _adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The PEFT models in a model, by the prefix of their names."""
    peft = sys.modules.get("peft")  # a script that has not imported it has none
    modules = [] if peft is None else model.named_modules()
    return {f"{n}." if n else "": m for n, m in modules if isinstance(m, peft.PeftModel)}


def _some(names: Iterable[str]) -> str:
    """`3 names (a, b, ...)`."""
    names = list(names)
    shown = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
    return f"{len(names)} name{'s' * (len(names) != 1)}" + (f" ({shown})" if names else "")


def meta_of(model: Any, steps: int) -> dict[str, Any]:
    """What goes with a trained model: `__fl_meta__` of the model, if it has one, over the steps of this round."""
    meta = getattr(model, "__fl_meta__", None) or {}
    if not isinstance(meta, dict):
        raise UserError(f"__fl_meta__: {meta!r} is not a dict")
    return {STEPS: steps, **meta}
