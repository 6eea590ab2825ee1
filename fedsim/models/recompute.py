"""Activation checkpointing: layers whose activations are computed a second time instead of kept.

transformers' own switch works in training mode alone, which would turn the base's dropout on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedsim.core.errors import UserError


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model that can be computed a second time; none where it does not mark them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def check_layers(model: nn.Module) -> list[nn.Module]:
    """`layers_of`, which must not be empty.

    Raises:
        UserError: if the architecture has no such layers.
    """
    if layers := layers_of(model):
        return layers
    kind = model.config.model_type
    raise UserError(f"training.checkpointing: true, but the layers of this base ({kind}) cannot be computed twice")


def compute_twice(model: nn.Module, when: Callable[[], bool]) -> None:
    """From now on compute the layers of the model a second time, in place, in passes in which `when` says so.

    Raises:
        UserError: if the architecture has no such layers.
    """
    for layer in check_layers(model):
        layer.forward = _twice(layer.forward, when)


def _twice(original: Callable, when: Callable[[], bool]) -> Callable:
    def forward(*args: Any, **keys: Any) -> Any:
        if not (when() and torch.is_grad_enabled()):
            return original(*args, **keys)
        # A layer appends to the cache that holds its prefix: each time it is computed it gets the cache as it came.
        return checkpoint(
            lambda *a, **k: original(*_own_caches(a), **_own_caches(k)), *args, use_reentrant=False, **keys
        )

    return forward


def _own_caches(values: Any) -> Any:
    """Arguments of a layer, its caches copied so that what it appends stays there; their tensors are shared."""
    from transformers import Cache

    if isinstance(values, dict):
        return {k: _own_caches(v) for k, v in values.items()}
    if isinstance(values, tuple):
        return tuple(map(_own_caches, values))
    if not isinstance(values, Cache):
        return values
    out = copy.copy(values)
    out.layers = [copy.copy(layer) for layer in values.layers]
    return out
