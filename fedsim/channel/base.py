"""The channel between server and clients: stages that change a message on its way, called in listed order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim.core.params import Message, Params

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sizes:
    """Bytes of a message: `values`, and `scales` with the tables of levels."""

    values: int
    scales: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.values + self.scales

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(self.values + other.values, self.scales + other.scales)


@dataclass(frozen=True)
class Senders:
    """What a stage is told of the K clients whose messages it is handed.

    Attributes:
        norms: 2-norm of each client's whole group `update`, as the server would decode it if nothing bounded it; with `clip`, of
            all groups as one vector. None in the pass in which these norms are measured.
        clip: norm to which all groups together are clipped; None = they are not.
        steps: optimizer steps of each client in the round.
        streams: the names of each client's random streams in the round, after their purpose.
    """

    norms: Sequence[float] | None = None
    clip: float | None = None
    steps: Sequence[int] = ()
    streams: Sequence[tuple[str | int, ...]] = ()


class Stage:
    """One thing that happens to messages; by default nothing does. A stage overrides the directions that it changes.

    A large message comes in chunks, one after another: what a stage must know of the whole message is in `Senders`.
    """

    @property
    def keeps(self) -> bool:
        """Whether clients keep a state for it, laid out like a message and zero at first."""
        return False

    def up(self, message: Message, c: Senders, state: Message) -> tuple[Message, Message]:
        """(the messages as the server will decode them, the clients' new state); all tensors `[K, ...]`."""
        return message, state

    def down(self, params: Params) -> Params:
        """Parameters as clients receive them, `[...]`."""
        return params

    def nbytes(self, shapes: Iterable[tuple[int, ...] | int], dtype: torch.dtype) -> Sizes | None:
        """Bytes of a message of tensors of these shapes and of this type; None where the stage does not change the bytes."""
        return None


class Channel(Stage):
    """Stages in order, as one stage."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages

    @property
    def keeps(self) -> bool:
        """Whether clients keep a state for any of them."""
        return any(s.keeps for s in self.stages)

    def up(self, message: Message, c: Senders, state: Message) -> tuple[Message, Message]:
        """Each stage's `up`, in order."""
        for stage in self.stages:
            message, state = stage.up(message, c, state)
        return message, state

    def down(self, params: Params) -> Params:
        """Each stage's `down`, in order."""
        for stage in self.stages:
            params = stage.down(params)
        return params

    def nbytes(self, shapes: Iterable[tuple[int, ...] | int], dtype: torch.dtype) -> Sizes | None:
        """As the last stage says that changes the bytes."""
        shapes = list(shapes)
        return next((size for s in reversed(self.stages) if (size := s.nbytes(shapes, dtype)) is not None), None)
