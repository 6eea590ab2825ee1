"""Client-level differential privacy with a trusted server.

H. B. McMahan, D. Ramage, K. Talwar, L. Zhang. Learning Differentially Private Recurrent Language Models. ICLR 2018
(arXiv:1710.06963), algorithm 1, with the estimator of a fixed denominator: with u_k the update of client k, clipped to norm C as
one vector over all that it sends, and w_k its weight, at most w_max,

    (sum_k w_k u_k + N(0, (z C w_max)^2)) / (q sum over all clients of w_k)

Noise is added once, to the sum; the denominator does not depend on who takes part.

Adaptive clipping: G. Andrew, O. Thakkar, H. B. McMahan, S. Ramaswamy. Differentially Private Learning with Adaptive Clipping.
NeurIPS 2021 (arXiv:1905.03871). With b the number of clients whose update is not longer than C and m the expected cohort

    C *= exp(-eta ((b + N(0, (m / 20)^2)) / m - gamma))

The updates' noise multiplier is then (z^-2 - (2 m / 20)^-2)^(-1/2), so that both releases together cost what one with z would.

Deviation: m is the expected cohort, also where cohorts are of fixed size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.privacy.accounting import Accountant, Neighbours, Sampler, check, epsilon, noise_multiplier


@dataclass(frozen=True)
class Adaptive:
    """How the clip follows the norms of updates: towards which quantile, how fast, from where."""

    quantile: float
    lr: float
    start: float


@dataclass(frozen=True)
class Cohorts:
    """How cohorts are drawn: `size` of `clients` in each round, expected or exactly."""

    size: int
    clients: int
    sampler: Sampler

    @property
    def sampling(self) -> float:
        """The share of clients in a round."""
        return self.size / self.clients


@dataclass(frozen=True)
class CentralPrivacy:
    """What a run guarantees of each client.

    Attributes:
        cohorts: how they are drawn.
        z: noise multiplier, of both releases together where the clip adapts.
        delta, accountant, neighbours: as in `accounting.epsilon`.
        clip: norm to which updates are clipped, or how it adapts.
        max_weight: the largest weight of a client.
        weight: the sum of all clients' weights.
        seed: the experiment's.
    """

    cohorts: Cohorts
    z: float
    delta: float
    accountant: Accountant
    neighbours: Neighbours
    clip: float | Adaptive
    max_weight: float
    weight: float
    seed: int

    @property
    def start(self) -> float:
        """The clip of round 1."""
        return self.clip.start if isinstance(self.clip, Adaptive) else self.clip

    @property
    def expected_weight(self) -> float:
        """The denominator of a mean: the weights that a cohort is expected to have."""
        return self.cohorts.sampling * self.weight

    @property
    def z_update(self) -> float:
        """The noise multiplier of the updates alone."""
        return update_noise(self.z, self.cohorts) if isinstance(self.clip, Adaptive) else self.z

    def epsilon(self, rounds: int) -> float:
        """Epsilon after so many rounds."""
        return epsilon(
            noise_multiplier=self.z, rounds=rounds, **how(self.cohorts, self.delta, self.accountant, self.neighbours)
        )

    def noise(self, round: int, group: str, name: str, shape: tuple[int, ...], clip: float) -> np.ndarray:
        """Noise on the sum of one tensor of a message group, float64: a function of (seed, round, group, name)."""
        rng = stream(self.seed, "privacy noise", round, group, name)
        return rng.normal(0.0, self.z_update * clip * self.max_weight, shape) if self.z_update else np.zeros(shape)

    def next_clip(self, round: int, clip: float, within: int) -> float:
        """The clip of the next round, where so many clients' updates were not longer than this round's."""
        if not isinstance(self.clip, Adaptive):
            return clip
        m = self.cohorts.size
        noise = stream(self.seed, "privacy clip", round).normal(0.0, m / 20) if self.z else 0.0
        return clip * math.exp(-self.clip.lr * ((within + noise) / m - self.clip.quantile))

    def last_round(self, rounds: int, most: float | None) -> int:
        """The last of so many rounds after which epsilon is at most `most`; None = no limit.

        Raises:
            UserError: if not even one round is.
        """
        if most is None or self.epsilon(rounds) <= most:
            return rounds
        low, high = 0, rounds  # low rounds are few enough, high are too many
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(middle) <= most else (low, middle)
        if low == 0:
            raise UserError(
                f"privacy.max_epsilon: {most:g}, but one round has epsilon {self.epsilon(1):.3g}; "
                "raise it or noise_multiplier, or lower cohort.size"
            )
        return low


def how(cohorts: Cohorts, delta: float, accountant: str, neighbours: str) -> dict[str, Any]:
    """What `accounting.epsilon` is told of a run's cohorts."""
    about = {"sampling": cohorts.sampling, "sampler": cohorts.sampler, "population": cohorts.clients, "delta": delta}
    return {**about, "accountant": accountant, "neighbours": neighbours}


def update_noise(z: float, cohorts: Cohorts) -> float:
    """The noise multiplier of updates beside a noisy count with standard deviation m / 20.

    Raises:
        UserError: if the count alone costs more than z allows.
    """
    if z == 0:
        return 0.0
    left = z**-2 - (2 * cohorts.size / 20) ** -2
    if left <= 0:
        raise UserError(
            f"privacy.clip: adaptive with cohort.size={cohorts.size} counts with noise of {cohorts.size / 20:g}, which alone costs "
            f"more than noise_multiplier {z:.3g} allows; give a fixed clip, or cohorts of more than {10 * z:.0f}"
        )
    return left**-0.5


def central(
    *,
    cohorts: Cohorts,
    rounds: int,
    noise: float | None,
    target: float | None,
    delta: float,
    accountant: Accountant,
    neighbours: Neighbours | None,
    clip: float | Adaptive,
    max_weight: float,
    weight: float,
    seed: int,
) -> CentralPrivacy:
    """The guarantee of a run; without `noise` the multiplier is solved for `target`, the epsilon of all rounds.

    Raises:
        UserError: for what does not go together, or a target that cannot be reached.
    """
    relation = check(cohorts.sampler, accountant, neighbours)
    if noise is None:
        assert target is not None, "a section has one of the two"
        noise = noise_multiplier(target_epsilon=target, rounds=rounds, **how(cohorts, delta, accountant, relation))
    made = CentralPrivacy(cohorts, noise, delta, accountant, relation, clip, max_weight, weight, seed)
    _ = made.z_update  # which may be impossible
    return made
