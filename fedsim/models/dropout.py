"""Dropout whose masks are a function of a lane's own stream, the pass and the layer alone.

A mask is drawn for a lane's real tokens, end to end, so that the same client drops the same units whether it trains alone
in padded batches or beside others in one stream, and again when a checkpointed layer is computed a second time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.models.adapters import base_of

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): neighbouring numbers become unlike ones."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class Draws:
    """What the dropout layers of a model share: which positions belong to which lane, and the number of the pass."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.passes: list[int] = []
        self.sizes: dict[str, Sequence[int]] = {}
        self.real: Tensor | None = None
        self._generators: dict[torch.device, torch.Generator] = {}

    def begin(self, seeds: Sequence[int]) -> None:
        """A pack begins: one stream for each lane."""
        self.seeds, self.passes = list(seeds), [0] * len(seeds)

    def next(self, sizes: dict[str, Sequence[int]], real: Tensor | None = None) -> None:
        """A pass begins.

        Args:
            sizes: tokens | scored | rows -> how many each lane has; a lane without tokens is not part of the pass.
            real: bool `[B, T]`, where tokens are in a padded batch; None where examples lie end to end.
        """
        self.sizes, self.real = sizes, real
        for k, size in enumerate(sizes["tokens"]):
            self.passes[k] += size > 0

    def mask(self, x: Tensor, p: float, layer: int, kind: str) -> Tensor | None:
        """Factors 0 or 1 / (1 - p) in the shape of `x`, `[..., D]`; None if its positions are no `kind` of the pass.

        Args:
            x: its leading axes are positions in order: all of a padded batch, or those of the lanes end to end.
            p: probability of a 0.
            layer: the layer's number.
            kind: tokens | scored | rows.
        """
        device, width = x.device, x.shape[-1]
        positions, sizes = x.numel() // width, self.sizes[kind]
        padded = kind == "tokens" and self.real is not None
        if padded:  # by shape, not by number: a table of as many positions is not the batch
            known = tuple(x.shape[:-1]) in (tuple(self.real.shape), (self.real.numel(),))
        else:  # a stream may be filled up at its end
            known = positions == sum(sizes) or (kind == "tokens" and positions > sum(sizes))
        if not known:
            return None
        generator = self._generators.setdefault(device, torch.Generator(device))
        parts = []
        for k, size in enumerate(sizes):
            if size:
                generator.manual_seed(_mix(_mix(self.seeds[k]) ^ _mix((self.passes[k] << 20) + layer)) >> 1)
                part = torch.empty(size, width, dtype=x.dtype, device=device)
                parts.append(part.bernoulli_(1 - p, generator=generator))
        drawn = torch.cat(parts).div_(1 - p)
        if padded:
            out = drawn.new_zeros(positions, width)
            out[self.real.reshape(-1)] = drawn
            return out.view(x.shape)
        more = positions - len(drawn)  # tokens that fill a stream up and belong to no example
        return F.pad(drawn, (0, 0, 0, more)).view(x.shape)


class LaneDropout(nn.Module):
    """Dropout with probability `p`, in training, by the draws of its model.

    Args:
        p: probability that a unit is dropped.
        draws: of the model.
        layer: the layer's number in the model.
        kind: what its positions are: tokens | scored | rows.
    """

    def __init__(self, p: float, draws: Draws, layer: int, kind: str) -> None:
        super().__init__()
        self.p, self.draws, self.layer, self.kind = p, draws, layer, kind

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`.

        Raises:
            LookupError: if the positions are not tokens of a stream.
        """
        if not self.training:
            return x
        mask = self.draws.mask(x, self.p, self.layer, self.kind)
        if mask is not None:
            return x * mask
        if self.draws.real is None:
            raise LookupError("a dropout layer sees positions that belong to no lane")
        return F.dropout(x, self.p)  # one client at a time: it has torch's own stream for itself


def put_dropout(model: nn.Module, own: Sequence[nn.Module], task: str, draws: Draws) -> list[LaneDropout]:
    """Replace the dropout layers among the adapter's `own` modules, in place; returns them."""
    ids, out, kinds = set(map(id, own)), [], position_kinds(model, task)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LaneDropout):
                child.draws = draws  # the model had another net around it before
                out.append(child)
            elif isinstance(child, nn.Dropout) and id(child) in ids and child.p > 0:
                new = LaneDropout(child.p, draws, len(out), kinds.get(id(child), "tokens"))
                setattr(parent, name, new)
                out.append(new)
    return out


def position_kinds(model: nn.Module, task: str) -> dict[int, str]:
    """`id` of a module -> the kind of positions that it sees, where they are not all tokens.

    The output head of a language model sees scored positions alone; what is outside a classifier's body, and a pooler in
    it, one position for each example; the encoder of a prompt its virtual tokens.
    """
    base = base_of(model)
    encoder = getattr(model, "prompt_encoder", None)
    out = {} if encoder is None else {id(m): "prompt" for m in encoder.modules()}
    if task == "causal_lm":
        head = base.get_output_embeddings()
        return out if head is None else out | {id(m): "scored" for m in head.modules()}
    body = getattr(base, base.base_model_prefix, base)
    inside = set(body.modules())
    poolers = {m for name, m in body.named_modules() if "pooler" in name.split(".")}
    return out | {id(m): "rows" for m in base.modules() if m not in inside or m in poolers}
