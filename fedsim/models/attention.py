"""Attention on a stream of examples that lie end to end, kept inside each of them; and eager attention that stays finite.

transformers lets attention be replaced by name; ours gathers examples of similar length from the stream, so that no other
layer ever sees a pad. Whatever an architecture does beside that interface a trial finds (`fedsim.models.probe`).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.data.stream import Group, Stream
from fedsim.models.unsuitable import Unsuitable

ATTENTION = "fedsim_rows"
PADDED = "fedsim_padded"


def register() -> None:
    """Tell transformers about the attention functions; may be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **keys: None)
    AttentionInterface.register(PADDED, _eager)
    AttentionMaskInterface.register(PADDED, _eager_mask)


def use_padded(model: nn.Module) -> None:
    """Replace transformers' eager attention by one that stays finite at pads, as the other kinds do by themselves.

    A pad whose window holds only pads attends to nothing. transformers adds the smallest float64 (or float16) to all its
    scores, which the softmax, in float32, takes for minus infinity: NaN, which the next layer spreads to real tokens.
    """
    register()
    if model.config._attn_implementation == "eager":
        model.config._attn_implementation = PADDED


def _eager(module: nn.Module, *args: Any, **keys: Any) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the module's own architecture."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **keys)


def _eager_mask(*args: Any, **keys: Any) -> Tensor | None:
    """transformers' eager mask, in which a token that may attend to nothing attends to everything: its output is not used."""
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
    """Attention of a stream's tokens to those of their own example, and to their lane's prefix.

    Args:
        module: the attention layer; its attribute `fedsim_lanes` knows the stream.
        query: `[1, H, N, d]`; key and value may have fewer heads, each then serves several of the query's.
        attention_mask: must be None: examples alone decide what may be seen.
        scaling: of the products; None = 1 / sqrt(d).
        is_causal: None = the layer's own attribute.
        sliding_window: tokens that a token sees at most, itself included.

    Returns:
        `[1, N, H, d]`, and no weights.

    Raises:
        Unsuitable: for a mask of the model's own, soft-capping, sinks, or dropout on the weights.
    """
    lanes = getattr(module, "fedsim_lanes", None)
    if lanes is None or lanes.stream is None:
        raise Unsuitable("its attention was called outside a pass")
    needs = [n for n in ("softcap", "s_aux", "position_bias") if keys.get(n) is not None]
    if needs or attention_mask is not None or dropout:
        raise Unsuitable(f"its attention needs {needs[0] if needs else 'a mask or dropout of its own'}")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if sliding_window is not None and (lanes.prefix is not None or not causal):
        raise Unsuitable("its attention slides a window over more than the past of an example")
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
        mask = _mask(group, causal, prefix, sliding_window, q.device)
        a = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scaling)
        out.append(a.transpose(1, 2).reshape(group.count * group.length, -1))
    whole = out[0] if len(out) == 1 else torch.cat(out)
    return stream.attention.scatter(whole).view(1, query.shape[2], heads, -1), None


def _mask(group: Group, causal: bool, prefix: int, window: int | None, device: torch.device) -> Tensor | None:
    """What a token may see, bool `[1 or R, 1, T, V + T]`; None where no mask is needed beside causality.

    Under a causal mask pads need none: they follow all real tokens of their example.
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
