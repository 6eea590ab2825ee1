"""Clients of unequal LoRA rank: one layout of the largest rank, in which the slots beyond a client's rank are zero.

LoRA's A is `[R, D]` and its B `[D, R]`: slot i is row i of A and column i of B. A slot that is zero in both has gradients of
zero, so it stays zero under the optimizer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.core.errors import UserError
from fedsim.core.params import Layout

Shape = tuple[int, ...]
_AXES = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}


def _axis(name: str) -> int | None:
    """The axis of a parameter that counts slots."""
    return next((_AXES[part] for part in name.split(".") if part in _AXES), None)


def largest_rank(layout: Layout) -> int:
    """The adapter's rank."""
    found = {shape[axis] for name, shape in layout.shapes.items() if (axis := _axis(name)) is not None}
    if not found:
        raise UserError("algorithm: ranks by client need adapter.name=lora; this adapter has no rank")
    return max(found)


def shape_at(name: str, shape: Shape, rank: int | None, full: Shape | None = None) -> Shape:
    """The shape of a parameter at this rank; None = as it is. A message may hold several of `full`, the parameter's own shape, side by side."""
    axis = _axis(name)
    if rank is None or axis is None:
        return shape
    if full is not None:
        rank *= shape[axis] // full[axis]
    if not 1 <= rank <= shape[axis]:
        raise UserError(f"algorithm: rank {rank} of a client is not between 1 and {shape[axis]}; raise adapter.r")
    return (*shape[:axis], rank, *shape[axis + 1 :])


def slots(layout: Layout, rank: int | None) -> Tensor:
    """Which elements of the layout's vector a client of this rank has, bool `[N]`."""
    out = torch.zeros(layout.numel, dtype=torch.bool)
    for name, view in layout.views(out).items():
        view[tuple(slice(n) for n in shape_at(name, layout.shapes[name], rank))] = True
    return out
