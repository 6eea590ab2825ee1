"""The stack: every client's message as it is, in the order of the clients, for servers that have to see them side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsim.aggregators.slots import Slotted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Stack(Slotted):
    """The messages of the K clients that sent one, `[K, n]`; their shares of the weight are in `Info.shares`."""

    blockwise: ClassVar[bool] = False
    weighs: ClassVar[bool] = True

    def reduce(self, values: Tensor, weights: Tensor) -> Tensor:
        """The messages, `[K, n]`."""
        return values
