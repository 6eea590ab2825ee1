"""Bounds the 2-norm of a client's update."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsim.channel.base import Senders, Stage
from fedsim.core.params import Message


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
        scales = [min(1.0, self.most / norm) if norm > 0 else 1.0 for norm in c.norms]
        update = {}
        for name, u in message["update"].items():
            by = torch.tensor(scales, dtype=u.dtype, device=u.device)
            update[name] = u * by.view(-1, *[1] * (u.dim() - 1))
        return {**message, "update": update}, state
