"""What happens to a message on its way between server and clients."""

from __future__ import annotations

from fedsim.channel.base import Channel, Senders, Sizes, Stage
from fedsim.channel.clip import Clip, ClipWhole
from fedsim.channel.codecs import codec
from fedsim.channel.feedback import ErrorFeedback
from fedsim.channel.filters import Filters


def uplink(
    name: str | None,
    error_feedback: bool = False,
    most: float | None = None,
    private: bool = False,
    filters: Filters | None = None,
) -> Channel:
    """What a client's messages pass on their way to the server.

    Args:
        name: codec, or None for messages as they are.
        error_feedback: what the codec lost is added to the client's next message.
        most: bound of the norm of an update, or None; it is the last thing before the codec.
        private: all that a client sends is clipped as one vector, after everything else.
        filters: change an update before everything else.
    """
    coded, clip = codec(name), Channel([] if most is None else [Clip(most)])
    last = [ClipWhole()] if private else []
    first = [] if filters is None else [filters]
    return Channel([*first, *([ErrorFeedback(coded, clip)] if error_feedback else [clip, coded]), *last])


def downlink(name: str | None) -> Channel:
    """What parameters pass on their way to the clients."""
    return Channel([codec(name)])


__all__ = ["Channel", "Filters", "Senders", "Sizes", "Stage", "downlink", "uplink"]
