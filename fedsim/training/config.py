"""What a worker is told of a run: how its clients train, and which examples belong to whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.algorithms import Algorithm
from fedsim.channel import Filters
from fedsim.data.batches import BatchSampler
from fedsim.training.attack import Attack
from fedsim.training.optim import Optim
from fedsim.training.private import PrivateExamples


@dataclass(frozen=True)
class LocalTrainingConfig:
    """How clients train and are evaluated; see the config's keys of the same names.

    Attributes:
        optim, draw: optimizer and batches.
        micro_batch: examples of one forward and backward pass.
        schedule_over: run | round.
        horizon: explicit horizon of the schedule, or None.
        keep_state: by mode, whether optimizer state is kept from round to round.
        every_steps: evaluate inside a round after so many steps since the start, or None.
        eval_batch, generate, max_new_tokens: evaluation.
        chunk: elements of the parameters that are summed, sent or stored at a time; None = all.
        up, down: codec of what a client sends and receives, or None: as it is.
        error_feedback: whether what a codec lost is added to the client's next message.
        row_tokens: where examples lie end to end in one model: a pass holds as many as fit into `micro_batch` times so many
            tokens; None = `micro_batch` examples.
        policy, max_norm: what becomes of updates that are not finite, or of a larger norm.
        slots: how many clients can send a message in one round.
        attack: what simulated attackers do in federated rounds; None = there are none.
        root: examples that the server trains on by itself.
        ranks: LoRA rank by client number, int64; None = the algorithm's, or the adapter's.
        meter: whether the aggregation error of LoRA's factors is measured, where these fit.
        examples: how DP-SGD clips gradients and adds noise in the mode federated; None = it does not.
        filters: what changes updates before they are sent; None = nothing.
        private: whether all that a client sends is clipped as one vector, to the norm that its pack names.
    """

    optim: Optim
    draw: BatchSampler
    micro_batch: int
    schedule_over: str
    horizon: int | None
    keep_state: dict[str, bool]
    every_steps: int | None
    eval_batch: int
    generate: bool
    max_new_tokens: int
    chunk: int | None = None
    up: str | None = None
    down: str | None = None
    error_feedback: bool = False
    row_tokens: int | None = None
    policy: str = "fail"
    max_norm: float | None = None
    slots: int = 1
    attack: Attack | None = None
    root: np.ndarray | None = None
    ranks: np.ndarray | None = None
    meter: bool = False
    examples: PrivateExamples | None = None
    filters: Filters | None = None
    private: bool = False

    def rank_of(self, algorithm: Algorithm, client: int) -> int | None:
        """A client's LoRA rank; None = the adapter's."""
        if client < 0:
            return None
        return algorithm.rank(client) if self.ranks is None else int(self.ranks[client])


@dataclass(frozen=True)
class Sites:
    """Example numbers by client, int64.

    Attributes:
        train: client -> its training examples.
        own: client -> its own validation examples, which may be none.
        with_own: the clients that may have such examples: on these the global model is evaluated.
        everything: -> examples of the centralized client, ascending.
    """

    train: Callable[[int], np.ndarray]
    own: Callable[[int], np.ndarray]
    with_own: Sequence[int]
    everything: Callable[[], np.ndarray]
