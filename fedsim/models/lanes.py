"""The lanes of a pass, and the trained leaves of PEFT's layers with K sets of weights in place of one.

A leaf multiplies lane k's part of the stream by lane k's weights. Outside a pass it is PEFT's own again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.data.stream import Span, Stream
from fedsim.models.projections import loops, one_by_one
from fedsim.models.unsuitable import Unsuitable

Leaf = Callable[[nn.Parameter], Callable[[], Tensor]]
"""Parameter -> function that returns its K sets of values, as they are bound at the time of the call."""


class Lanes:
    """The state of a pass that the replaced layers read.

    Attributes:
        stream: the examples of the pass; None outside a pass, when every layer is PEFT's own again.
        apart: whether each example is a lane of its own, with a copy of its client's weights.
        prefix: keys and values in front of each example, `[R, V, layers, 2, H, d]`; None but for prefix tuning.
        prompt: how the virtual tokens divide into lanes while a prompt is made.
    """

    def __init__(self) -> None:
        self.prompt: Span | None = None
        self.set(None)

    def set(self, stream: Stream | None, apart: bool = False) -> None:
        """A pass begins; None = it has ended, its backward pass too."""
        self.stream, self.apart, self.prefix = stream, apart, None
        self._last: tuple[Tensor, Span, Tensor] | None = None

    def span(self, kind: str) -> Span:
        """How the positions that a layer sees divide into lanes: those of tokens, rows, scored or prompt."""
        return self.prompt if kind == "prompt" else getattr(self.stream, kind)

    def split(self, x: Tensor, span: Span) -> Tensor:
        """`[..., D]` -> `[K, L, D]`; layers side by side on one input (query, key, value) share the result."""
        if self._last is not None and self._last[0] is x and self._last[1] is span:
            return self._last[2]
        out = span.split(x.reshape(-1, x.shape[-1]))
        if span.index is not None:
            self._last = (x, span, out)
        return out

    def in_front(self, made: Tensor) -> Tensor:
        """What each lane puts in front of each of its examples: `[K, V, ...]` -> `[R, V, ...]`."""
        span, k = self.stream.rows, made.shape[0]  # a join, whose backward pass sums over a lane's examples
        wide = made.reshape(k, 1, -1).expand(-1, span.longest, -1)
        return span.join(wide).reshape(-1, *made.shape[1:])

    def prefix_of(self, module: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in front of these examples in an attention layer, each `[R, H, V, d]`."""
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise Unsuitable("its attention layers have no numbers, which prefix tuning needs")
        both = self.prefix[:, :, layer].index_select(0, rows).permute(2, 0, 3, 1, 4)  # [2, R, H, V, d]
        return both[0], both[1]


def stacked(layer: nn.Module, kind: str, lanes: Lanes, leaf: Leaf) -> tuple[Callable, list[nn.Parameter]] | None:
    """A layer's forward with K sets of weights, and the parameters that it covers; None if its type has no stacked form."""
    if hasattr(layer, "ia3_l") and "default" in layer.ia3_l:
        return _ia3(layer, kind, lanes, leaf), [layer.ia3_l["default"]]
    parameters = list(layer.parameters())
    if type(layer) is nn.Linear and all(p.requires_grad for p in parameters):
        return _linear(layer, kind, lanes, leaf), parameters
    return None


def _linear(layer: nn.Linear, kind: str, lanes: Lanes, leaf: Leaf) -> Callable:
    """K weights `[K, O, I]` and biases `[K, O]` in place of one; `[..., I]` -> `[..., O]`."""
    original, weight = layer.forward, leaf(layer.weight)
    bias = (lambda: None) if layer.bias is None else leaf(layer.bias)

    def forward(x: Tensor) -> Tensor:
        if lanes.stream is None:
            return original(x)
        span, w, b = lanes.span(kind), weight(), bias()
        if not lanes.apart and loops(x, w, span):  # of single examples there are too many for a loop
            return one_by_one(x.reshape(-1, x.shape[-1]), w, b, span.sizes).view(*x.shape[:-1], -1)
        split, turned = lanes.split(x, span), w.transpose(1, 2)  # [K, L, I], [K, I, O]
        y = split @ turned if b is None else torch.baddbmm(b[:, None], split, turned)
        return span.join(y).view(*x.shape[:-1], -1)

    return forward


def _ia3(layer: nn.Module, kind: str, lanes: Lanes, leaf: Leaf) -> Callable:
    """K vectors in place of one: they scale the input of a feed-forward layer and the output of others, as PEFT does."""
    original, vector = layer.forward, leaf(layer.ia3_l["default"])

    def scale(x: Tensor) -> Tensor:
        span, own = lanes.span(kind), vector()
        y = lanes.split(x.to(own.dtype), span) * own.reshape(len(own), 1, -1)
        return span.join(y).view(x.shape).to(x.dtype)

    def forward(x: Tensor, *args: Any, **keys: Any) -> Tensor:
        if lanes.stream is None:
            return original(x, *args, **keys)
        return layer.base_layer(scale(x)) if layer.is_feedforward else scale(layer.base_layer(x))

    return forward
