"""DP-SGD at a client: noise on the sum of clipped gradients of each logical batch.

M. Abadi et al. Deep Learning with Differential Privacy. CCS 2016 (arXiv:1607.00133), algorithm 1, with the estimator of a fixed
denominator: with a batch S in which each of the n examples is with probability q, independently,

    (sum over S of clipped gradients + N(0, (z C)^2)) / (q n)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrivateLane:
    """DP-SGD in one lane and round.

    Attributes:
        clip: bound of the 2-norm of an example's gradient.
        expected: examples that a batch is expected to have.
        std: standard deviation of the noise on the sum of a batch.
        seed: step of the round, from 0 -> seed of its noise.
    """

    clip: float
    expected: float
    std: float
    seed: Callable[[int], int]

    def noise(self, step: int, like: Tensor) -> Tensor:
        """Noise on the mean gradient `[N]` of a step: on a kind of device a function of (seed, client, round, step)."""
        generator = torch.Generator(like.device).manual_seed(self.seed(step))
        drawn = torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        return drawn.mul_(self.std / self.expected)


@dataclass(frozen=True)
class PrivateExamples:
    """DP-SGD of a run.

    Attributes:
        clip: bound of the 2-norm of an example's gradient.
        noise_multiplier: standard deviation of the noise on the sum of a batch / clip.
    """

    clip: float
    noise_multiplier: float

    def lane(self, expected: float, seed: Callable[[int], int]) -> PrivateLane:
        """In a lane whose batches are expected to have so many examples; `seed`: step -> seed of its noise."""
        return PrivateLane(self.clip, expected, self.noise_multiplier * self.clip, seed)
