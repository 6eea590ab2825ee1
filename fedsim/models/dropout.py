"""Dropout whose draws belong to a lane: a function of (its stream, pass, layer), of nobody else's rows and of no layout.

A mask is drawn for a lane's real tokens, end to end, so that the same client drops the same units whether it trains alone
in padded batches or beside others in one stream, and again when a checkpointed layer is computed a second time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): neighbouring numbers become unlike ones."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class Draws:
    """What the dropout layers of a model share: whose tokens are under way, and which pass this is."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.passes: list[int] = []
        self.sizes: dict[bool, Sequence[int]] = {}
        self.real: Tensor | None = None
        self._generators: dict[torch.device, torch.Generator] = {}

    def begin(self, seeds: Sequence[int]) -> None:
        """A pack begins: one stream a lane."""
        self.seeds, self.passes = list(seeds), [0] * len(seeds)

    def next(self, tokens: Sequence[int], scored: Sequence[int], real: Tensor | None = None) -> None:
        """A pass begins.

        Args:
            tokens: real tokens of each lane; a lane that has none is not part of the pass.
            scored: positions of each lane that the output head sees.
            real: bool `[B, T]`, where tokens are in a padded batch; None where they lie end to end.
        """
        self.sizes, self.real = {False: tokens, True: scored}, real
        for k, size in enumerate(tokens):
            self.passes[k] += size > 0

    def mask(self, x: Tensor, p: float, layer: int, in_head: bool) -> Tensor:
        """Factors 0 or 1 / (1 - p) in the shape of `x`: `[..., D]`, its leading axes the positions of the pass, in order."""
        device, width = x.device, x.shape[-1]
        generator = self._generators.setdefault(device, torch.Generator(device))
        parts = []
        for k, size in enumerate(self.sizes[in_head]):
            if size:
                generator.manual_seed(_mix(_mix(self.seeds[k]) ^ _mix((self.passes[k] << 20) + layer)) >> 1)
                part = torch.empty(size, width, dtype=x.dtype, device=device)
                parts.append(part.bernoulli_(1 - p, generator=generator))
        drawn = torch.cat(parts).div_(1 - p)
        if in_head or self.real is None:
            more = x.numel() // width - len(drawn)  # tokens that fill a stream up and belong to nobody
            return (torch.cat([drawn, drawn.new_zeros(more, width)]) if more else drawn).view(x.shape)
        out = x.new_zeros(x.shape)
        out[self.real] = drawn
        return out


class LaneDropout(nn.Module):
    """Dropout with probability `p`, in training, by the draws of its model.

    Args:
        p: probability that a unit is dropped.
        draws: of the model.
        layer: the layer's number in the model.
        in_head: whether it lies behind the choice of scored positions.
    """

    def __init__(self, p: float, draws: Draws, layer: int, in_head: bool) -> None:
        super().__init__()
        self.p, self.draws, self.layer, self.in_head = p, draws, layer, in_head

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        return x * self.draws.mask(x, self.p, self.layer, self.in_head) if self.training else x


def put_dropout(model: nn.Module, own: Sequence[nn.Module], head: nn.Module | None, draws: Draws) -> list[LaneDropout]:
    """Replace the adapter's own dropout layers, in place; returns them.

    Args:
        model: with its adapter.
        own: the adapter's modules.
        head: the output head of a language model.
        draws: what the layers share from now on.
    """
    ids, out = set(map(id, own)), []
    behind = set(map(id, head.modules())) if head is not None else set()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LaneDropout):
                child.draws = draws  # a model that has had another net around it
                out.append(child)
            elif isinstance(child, nn.Dropout) and id(child) in ids and child.p > 0:
                new = LaneDropout(child.p, draws, len(out), id(child) in behind)
                setattr(parent, name, new)
                out.append(new)
    return out
