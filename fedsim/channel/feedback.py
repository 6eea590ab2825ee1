"""Error feedback: what a codec lost of a message is added to the client's next one.

Seide, Fu, Droppo, Li, Yu. 1-bit Stochastic Gradient Descent. Interspeech 2014. Karimireddy, Rebjock, Stich, Jaggi. Error Feedback
Fixes SignSGD and other Gradient Compression Schemes. ICML 2019, algorithm 1: p = u + e, sent = D(Q(p)), e' = p - sent.

Deviation: where a clip bounds what is sent, p is clipped after the error was added, and e' is what the codec alone lost: what
was clipped away does not come back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fedsim.channel.base import Senders, Sizes, Stage
from fedsim.core.params import Message


@dataclass(frozen=True)
class ErrorFeedback(Stage):
    """Error feedback around a codec.

    Attributes:
        codec: what loses something of a message.
        before: what happens between the addition and the codec.
    """

    codec: Stage
    before: Stage

    @property
    def keeps(self) -> bool:
        """What was lost."""
        return True

    def up(self, message: Message, c: Senders, state: Message) -> tuple[Message, Message]:
        """Add what was lost, send, and keep what is lost now."""
        wanted = {g: {n: u + state[g][n] for n, u in group.items()} for g, group in message.items()}
        wanted, _ = self.before.up(wanted, c, {})
        sent, _ = self.codec.up(wanted, c, {})
        # What is not sent in this round keeps what it has lost.
        return sent, {g: state[g] | {n: w - sent[g][n] for n, w in group.items()} for g, group in wanted.items()}

    def nbytes(self, shapes: Iterable[tuple[int, ...] | int], dtype: torch.dtype) -> Sizes | None:
        """As the codec's."""
        return self.codec.nbytes(shapes, dtype)
