"""Bounds the 2-norm of what a client sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsim.channel.base import Senders, Stage
from fedsim.core.params import Message, Params


@dataclass(frozen=True)
class Clip(Stage):
    """Scales the group `update` of a client down to a norm of `most` where it is larger.

    The norm is that of the message as the server decodes it, so that it bounds what leaves the client: scales of blocks follow
    the values, so that a scaled message is decoded to the scaled values, up to the rounding of a scale.
    """

    most: float

    def up(self, message: Message, c: Senders, state: Message) -> tuple[Message, Message]:
        """Scale each client's update; while norms are measured nothing is changed."""
        if c.norms is None or all(norm <= self.most for norm in c.norms) or "update" not in message:
            return message, state
        return {**message, "update": scaled(message["update"], c.norms, self.most)}, state


class ClipWhole(Stage):
    """Scales all that a client sends, as one vector, down to a norm of `Senders.clip` where it is larger: the last stage.

    It comes after the codec, so that nothing can make the message longer again: a client sends its code and one float32, by which
    the server multiplies what it decodes. Error feedback keeps what the codec lost, and not what was clipped.
    """

    def up(self, message: Message, c: Senders, state: Message) -> tuple[Message, Message]:
        """Scale each client's message; while norms are measured nothing is changed."""
        if c.norms is None or c.clip is None or all(norm <= c.clip for norm in c.norms):
            return message, state
        return {group: scaled(params, c.norms, c.clip) for group, params in message.items()}, state


def scaled(params: Params, norms: Sequence[float], most: float) -> Params:
    """Each client's tensors, `[K, ...]`, times what brings its norm down to `most`."""
    scales = [min(1.0, most / norm) if norm > 0 else 1.0 for norm in norms]
    return {
        name: x * torch.tensor(scales, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))
        for name, x in params.items()
    }
