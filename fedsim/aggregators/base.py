"""What an aggregator is, and the accumulator that packs add to in a fixed order.

The order of addition is part of a run's numbers: packs are added in order within consecutive groups of `GROUP`, and the
groups in order, on any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:  # a config is read before torch is loaded
    from torch import Tensor

GROUP = 16  # packs that are summed before their sum is added to the others'


@dataclass(frozen=True)
class Buffer:
    """What an aggregator keeps of a message group with n elements: `[rows, n]`, or `[rows]` if not `by_element`."""

    rows: int = 1
    by_element: bool = True


class Aggregator(Protocol):
    """How the messages of a round's clients become one. Its buffers start at zero; those of two packs are merged by addition.

    Attributes:
        blockwise: whether `result` may be called on a stretch of the elements; false where it has to see them all, as Krum has.
    """

    blockwise: ClassVar[bool]

    def buffers(self, slots: int) -> dict[str, Buffer]:
        """The buffers it needs, by name.

        Args:
            slots: how many clients can send a message in one round.
        """
        ...

    def add(self, acc: dict[str, Tensor], values: Tensor, weights: Sequence[float], slots: Sequence[int]) -> None:
        """Add one tensor of the messages of K clients, in place.

        Args:
            acc: the buffers at the tensor's n elements: `[rows, n]`, or `[rows]` if not by element.
            values: `[K, n]`.
            weights: of each client.
            slots: each client's number in the round, below that of `buffers`.
        """
        ...

    def result(self, acc: dict[str, Tensor], weight: float) -> Tensor:
        """The merged message, `[n]`.

        Args:
            acc: the buffers.
            weight: the sum of the weights of all clients that were added; above zero.
        """
        ...


@dataclass
class Accumulator:
    """The messages of a round under way.

    Attributes:
        total: all buffers of all message groups, flat.
        spare: likewise, for groups of packs after the first; None where a round has at most `GROUP` packs.
        weight: sum of the clients' weights.
        packs: how many packs were added.
        clients: how many clients' messages they hold.
    """

    total: Tensor
    spare: Tensor | None = None
    weight: float = 0.0
    packs: int = 0
    clients: int = 0

    def place(self, index: int) -> Tensor:
        """Where the pack with this number, from 0, adds its messages."""
        if index < GROUP:
            return self.total
        assert self.spare is not None, f"a round of more than {GROUP} packs needs a second buffer"
        return self.spare

    def added(self) -> None:
        """Count a pack that has added its messages; the last of a group closes the group."""
        self.packs += 1
        if self.packs % GROUP == 0:
            self.close()

    def close(self) -> None:
        """Add the group under way to those before it."""
        if self.packs > GROUP and self.spare is not None:
            self.total.add_(self.spare)
            self.spare.zero_()
