"""Models that use the same weights: in one process by reference, in several through shared memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn


def borrow(model: nn.Module) -> nn.Module:
    """A model of the same modules whose parameters lie in the same memory; buffers are its own.

    What is attached to it, or replaced in it, does not touch the model it was made from. A parameter that is to be
    written in place needs memory of its own first: see `own_memory`.
    """
    return _copied(model, lambda p: nn.Parameter(p.data, requires_grad=p.requires_grad))


def blank(model: nn.Module) -> nn.Module:
    """A model of the same modules and shapes whose parameters all read one zero in shared memory.

    It is for callers that put values of their own in their place.
    """
    zeros = {dtype: torch.zeros(1, dtype=dtype).share_memory_() for dtype in {p.dtype for p in model.parameters()}}
    return _copied(model, lambda p: nn.Parameter(zeros[p.dtype].expand(p.shape), p.requires_grad))


def _copied(model: nn.Module, parameter: Callable[[nn.Parameter], nn.Parameter]) -> nn.Module:
    # `parameters` yields tied ones once, and the copy ties them again.
    return copy.deepcopy(model, {id(p): parameter(p) for p in model.parameters()})


def memory_of(model: nn.Module) -> set[int]:
    """Addresses of the memory blocks in which a model's parameters lie."""
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def own_memory(parameters: Iterable[nn.Parameter], lent: set[int]) -> None:
    """Give those parameters that lie in lent memory memory of their own, in place."""
    for parameter in parameters:
        if parameter.untyped_storage().data_ptr() in lent:
            parameter.data = parameter.data.clone()


def share_memory(model: nn.Module) -> None:
    """Move all weights into one block of shared memory per dtype, in place; buffers into one of their own.

    A whole model that is trained lets go of the weights' block and keeps its buffers. One block is one file handle for a
    worker to open, whatever the number of tensors, and on the CPU all workers then read the same pages.
    """
    tensors = [(t, kind) for kind in ("parameters", "buffers") for t in getattr(model, kind)() if not t.is_shared()]
    for wanted in {(t.dtype, kind) for t, kind in tensors}:
        dtype, group = wanted[0], [t for t, kind in tensors if (t.dtype, kind) == wanted]
        # Tensors are aligned as torch aligns its own: the last bits of a product may depend on that.
        step = 64 // dtype.itemsize
        sizes = [-(-t.numel() // step) * step for t in group]
        block = torch.empty(sum(sizes), dtype=dtype).share_memory_()
        for tensor, part in zip(group, block.split(sizes), strict=True):
            view = part[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor.data)
            tensor.data = view
