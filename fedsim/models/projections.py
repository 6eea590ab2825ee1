"""Linear layers on a stream: those that are trained, with K sets of weights, and frozen ones by a faster kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.data.stream import Span

_LOOP = 1 << 15  # multiply-adds of a lane from which a call of its own costs less than padding all lanes to one length
_WORTH = 1 << 21  # multiply-adds from which oneDNN pays for the overhead of its call; see docs/log.md


def loops(x: Tensor, weight: Tensor, span: Span) -> bool:
    """Whether K linear layers run faster one after another than as one batched product: on the CPU, where lanes differ."""
    if span.index is None or x.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    return x.numel() * weight.shape[1] >= _LOOP * len(span.sizes)


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """K linear layers, each on its own part of the stream, without padding.

    Args:
        x: `[N, I]`.
        weight: `[K, O, I]`.
        bias: `[K, O]`, or None.
        sizes: positions of each lane, N in all.

    Returns:
        `[N, O]`.
    """
    biases = [None] * len(sizes) if bias is None else bias.unbind()
    parts = zip(x.split(sizes), weight.unbind(), biases, strict=True)
    return torch.cat([F.linear(part, w, b) for part, w, b in parts])


class _Frozen(torch.autograd.Function):
    """x W^T + b by oneDNN's kernels, and g W in the backward pass; W and b get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _onednn(grad.contiguous(), weight.t(), None), None, None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def has_fast_float32() -> bool:
    """Whether frozen float32 projections on this CPU go through oneDNN: it has AVX-512, and torch was built with it.

    MKL, torch's default, runs at half the speed of oneDNN on AMD's AVX-512 (docs/log.md).
    """
    capable = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return capable and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fast_frozen(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A faster forward of a frozen float32 `nn.Linear` or `Conv1D` on the CPU, or None where there is none."""
    from transformers.pytorch_utils import Conv1D

    exact = type(layer) in (nn.Linear, Conv1D)  # a subclass may do more than a product
    if not exact or layer.weight.dtype != torch.float32 or layer.weight.requires_grad or not has_fast_float32():
        return None
    turned, original = type(layer) is Conv1D, layer.forward

    def forward(x: Tensor) -> Tensor:
        weight = layer.weight
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() * weight.shape[turned] < _WORTH:
            return original(x)
        return _Frozen.apply(x, weight.t() if turned else weight, layer.bias)

    return forward
