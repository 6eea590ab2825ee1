"""A base model on a stream of rows that lie end to end: attention kept inside each row, and frozen layers made fast.

transformers lets attention be exchanged by name; ours gathers rows of like length from the stream, so that no other layer
ever sees a pad. What an architecture does beside that interface is found out by trying (`fedsim.models.stacked.probe`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.data.stream import Group, Span, Stream

ATTENTION = "fedsim_rows"
PADDED = "fedsim_padded"


class Unsuitable(Exception):
    """The base needs something that rows lying end to end do not give; the text says what."""


def register() -> None:
    """Tell transformers about the attention functions; may be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **keys: None)
    AttentionInterface.register(PADDED, _eager)
    AttentionMaskInterface.register(PADDED, _eager_mask)


def use_padded(model: nn.Module) -> None:
    """Exchange transformers' eager attention for one that stays finite at pads; others are finite there by themselves.

    A pad whose window holds pads alone attends to nothing. transformers adds the smallest float64 (or float16) to all its
    scores, which the softmax, in float32, takes for minus infinity: NaN, which the next layer spreads to real tokens.
    """
    register()
    if model.config._attn_implementation == "eager":
        model.config._attn_implementation = PADDED


def _eager(module: nn.Module, *args: Any, **keys: Any) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the module's own architecture."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **keys)


def _eager_mask(*args: Any, **keys: Any) -> Tensor | None:
    """transformers' eager mask, in which a token that may attend to nothing attends to everything: nobody reads it."""
    from transformers.masking_utils import eager_mask

    mask = eager_mask(*args, **keys)  # [B, 1, T, T'], 0 or the smallest number of the type
    return None if mask is None else mask.masked_fill((mask < 0).all(-1, keepdim=True), 0)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **keys: Any,
) -> tuple[Tensor, None]:
    """Attention of a stream's tokens to those of their own row, and to their lane's prefix.

    Args:
        module: the attention layer; its attribute `fedsim_lanes` tells whose rows these are.
        query: `[1, H, N, d]`; key and value may have fewer heads, each then serves several of the query's.
        attention_mask: must be None: rows alone say what may be seen.
        scaling: of the products; None = 1 / sqrt(d).
        is_causal: None = as the layer says.
        sliding_window: tokens that a token sees at most, itself included.

    Returns:
        `[1, N, H, d]`, and no weights.

    Raises:
        Unsuitable: for a mask of the model's own, soft-capping, sinks, or dropout on the weights.
    """
    lanes = getattr(module, "fedsim_lanes", None)
    if lanes is None or lanes.stream is None:
        raise Unsuitable("its attention was called outside a pass")
    wants = [n for n in ("softcap", "s_aux", "position_bias") if keys.get(n) is not None]
    if wants or attention_mask is not None or dropout:
        raise Unsuitable(f"its attention wants {wants[0] if wants else 'a mask or dropout of its own'}")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if sliding_window is not None and (lanes.prefix is not None or not causal):
        raise Unsuitable("its attention slides a window over more than a row's own past")
    stream: Stream = lanes.stream
    heads, shared = query.shape[1], key.shape[1]
    packed = [x.transpose(1, 2).reshape(x.shape[2], -1) for x in (query, key, value)]  # [N, H d]
    packed = [stream.attention.gather(x) for x in packed]
    sizes = [g.count * g.length for g in stream.attention.groups]
    parts = zip(*(x.split(sizes) for x in packed), strict=True)
    out = []
    for group, (q, k, v) in zip(stream.attention.groups, parts, strict=True):
        q, k, v = (
            x.view(group.count, group.length, h, -1).transpose(1, 2) for x, h in ((q, heads), (k, shared), (v, shared))
        )  # [R, H, T, d]
        prefix = 0
        if lanes.prefix is not None:
            front = lanes.prefix_of(module, group.rows)  # 2 x [R, H, V, d]
            prefix = front[0].shape[2]
            k, v = (torch.cat([f.to(x.dtype), x], dim=2) for f, x in zip(front, (k, v), strict=True))
        if heads != shared:
            k, v = (x.repeat_interleave(heads // shared, dim=1) for x in (k, v))
        mask = _mask(group, causal, prefix, sliding_window, q.device)  # None: is_causal says it all
        a = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scaling)
        out.append(a.transpose(1, 2).reshape(group.count * group.length, -1))
    whole = out[0] if len(out) == 1 else torch.cat(out)
    return stream.attention.scatter(whole).view(1, query.shape[2], heads, -1), None


def _mask(group: Group, causal: bool, prefix: int, window: int | None, device: torch.device) -> Tensor | None:
    """What a token may see, bool `[1 or R, 1, T, V + T]`; None where causality alone, or nothing, has to be said.

    Under a causal mask pads need no word: they stand behind all real tokens of their row.
    """
    narrow = window is not None and group.length > window
    if causal and not prefix and not narrow:
        return None
    if causal:
        place = torch.arange(group.length, device=device)
        apart = place[:, None] - place
        seen = (apart >= 0) & (apart < window) if narrow else apart >= 0
        seen = seen[None, None]
    elif group.real is not None:
        seen = group.real[:, None, None, :].expand(-1, 1, group.length, -1)
    else:
        return None
    return F.pad(seen, (prefix, 0), value=True) if prefix else seen


# --------------------------------------------------------------------------------------------- trained projections


class LaneLinear(torch.autograd.Function):
    """K linear layers on a stream, one after another, each on its own stretch: nothing is copied, nothing padded."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
        """`[N, I]`, `[K, O, I]`, `[K, O]` -> `[N, O]`; `sizes` are the positions of each lane, N in all."""
        ctx.save_for_backward(x, weight)
        ctx.sizes, ctx.has_bias = sizes, bias is not None
        out = x.new_empty(len(x), weight.shape[1])
        for k, (part, into) in enumerate(zip(x.split(sizes), out.split(sizes), strict=True)):
            if bias is None:
                torch.mm(part, weight[k].t(), out=into)
            else:
                torch.addmm(bias[k], part, weight[k].t(), out=into)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        into = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        of_bias = weight.new_empty(weight.shape[:2]) if ctx.has_bias else None
        start = 0
        for k, size in enumerate(ctx.sizes):
            g, part = grad[start : start + size], x[start : start + size]
            if into is not None:
                torch.mm(g, weight[k], out=into[start : start + size])
            torch.mm(g.t(), part, out=of_weight[k])
            if of_bias is not None:
                torch.sum(g, dim=0, out=of_bias[k])
            start += size
        return into, of_weight, of_bias, None


_LOOP = 1 << 15  # multiply-adds of a lane from which a call of its own costs less than padding all lanes to one length


def worth_a_loop(x: Tensor, weight: Tensor, span: Span) -> bool:
    """Whether K linear layers run faster one after another than as one batched product: on the CPU, where lanes differ."""
    if span.index is None or x.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    return x.numel() * weight.shape[1] >= _LOOP * len(span.sizes)


# ---------------------------------------------------------------------------------------------- frozen projections


class _Frozen(torch.autograd.Function):
    """x W^T + b with oneDNN's kernels, and g W on the way back; W and b get no gradient."""

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


_WORTH = 1 << 21  # multiply-adds from which the call's overhead is made up for; see docs/log.md


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
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() * layer.weight.shape[turned] < _WORTH:
            return original(x)
        return _Frozen.apply(x, weight.t() if turned else weight, layer.bias)

    return forward
