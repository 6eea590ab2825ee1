"""A slot for each client, for rules that have to see all messages at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsim.aggregators.base import Buffer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Slotted:
    """Keeps each client's message, in the order of the clients, so that any number of workers gives the same bits.

    A rule is a subclass with `reduce`.

    Attributes:
        weighs: whether the rule uses the clients' weights.
        root_examples: training examples of the server's own, whose update has the slot after all clients'; 0 = none.
    """

    blockwise: ClassVar[bool] = True
    weighs: ClassVar[bool] = False
    root_examples: ClassVar[int] = 0

    @property
    def least(self) -> int:
        """The least number of clients that the rule is defined for."""
        return 1

    def buffers(self, slots: int) -> dict[str, Buffer]:
        """The messages, and the weight of each client plus a mark that it sent one."""
        rows = Buffer(slots, by_element=False)
        return {"values": Buffer(slots), "weights": rows, "sent": rows}

    def add(self, acc: dict[str, Tensor], values: Tensor, weights: Sequence[float], slots: Sequence[int]) -> None:
        """Put each client's values into its slot."""
        for i, (slot, weight) in enumerate(zip(slots, weights, strict=True)):
            acc["values"][slot] = values[i]
            acc["weights"][slot], acc["sent"][slot] = weight, 1.0

    def result(self, acc: dict[str, Tensor], weight: float) -> Tensor:
        """The rule's value over the clients that sent something, `[n]`."""
        sent = acc["sent"] > 0
        if bool(sent.all()):  # no copy of all messages
            return self.reduce(acc["values"], acc["weights"])
        return self.reduce(acc["values"][sent], acc["weights"][sent])

    def reduce(self, values: Tensor, weights: Tensor) -> Tensor:
        """One message, `[n]`, of those of K clients: `values` `[K, n]`, in the clients' order, and their weights `[K]`; both are left as they are."""
        raise NotImplementedError
