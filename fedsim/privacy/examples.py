"""What example-level differential privacy costs each client: the ledger of DP-SGD.

A client's neighbors differ in one of its examples, there or not. A step draws each of its n examples with probability q =
min(1, batch_size / n) and releases a noisy sum of clipped gradients; everything that leaves the client is computed from these sums.
So a client's epsilon is a function of (q, z) and of the steps that it has done in all its rounds. That clients are sampled does not
count: whoever sees the messages sees who sent them. Mironov, Talwar, Zhang, 2019 (arXiv:1908.10530). Numbers of examples are public.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedsim.privacy.accounting import epsilon, noise_multiplier

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class ExamplePrivacy:
    """What a run guarantees of each example of a client.

    Attributes:
        clip: bound of the 2-norm of an example's gradient.
        z: noise multiplier.
        delta: of the guarantee.
        sizes: examples by client number.
        clients: numbers of the clients that have examples.
        batch_size: examples that a batch is expected to have; clients with fewer take all of them in each step.
    """

    clip: float
    z: float
    delta: float
    sizes: np.ndarray
    clients: np.ndarray
    batch_size: int

    def epsilons(self, steps: Mapping[int, int]) -> dict[int, float]:
        """Epsilon of each client of the run that has done so many steps; 0 of those that have done none."""
        found = {pair: self._epsilon(self.z, *pair) for pair in self._pairs(steps)}
        return {c: found[self._pair(c, steps)] for c in map(int, self.clients)}

    @staticmethod
    def summary(each: Mapping[int, float]) -> dict[str, float]:
        """The largest epsilon of a client, under `epsilon`, and the mean and quantiles over all clients."""
        values = np.array(list(each.values()))
        out = {"epsilon": float(values.max()), "epsilon_mean": float(values.mean())}
        # Observed values: between infinity and a number there is none.
        return out | {
            f"epsilon_q{q * 100:.0f}": float(np.quantile(values, q, method="inverted_cdf")) for q in QUANTILES
        }

    def solve(self, target: float, steps: Mapping[int, int]) -> float:
        """The least noise multiplier whose largest epsilon after these steps is at most `target`.

        Raises:
            UserError: if it cannot be reached.
        """
        pairs = sorted(self._pairs(steps), key=lambda p: p[0] * p[1] ** 0.5)
        worst, z = pairs[-1], 0.0
        while True:  # the least noise for the costliest client so far, until no other costs more
            need = noise_multiplier(target_epsilon=target, sampling=worst[0], rounds=worst[1], delta=self.delta)
            z = max(z, need)
            spent = {pair: self._epsilon(z, *pair) for pair in pairs}
            worst = max(pairs, key=lambda p: spent[p])
            if spent[worst] <= target:
                return z

    def sampling(self, client: int) -> float:
        """The probability of each of a client's examples to be in a batch."""
        return min(1.0, self.batch_size / int(self.sizes[client]))

    def _epsilon(self, z: float, sampling: float, steps: int) -> float:
        return epsilon(sampling=sampling, noise_multiplier=z, rounds=steps, delta=self.delta)

    def _pair(self, client: int, steps: Mapping[int, int]) -> tuple[float, int]:
        return self.sampling(client), steps.get(client, 0)

    def _pairs(self, steps: Mapping[int, int]) -> set[tuple[float, int]]:
        return {self._pair(c, steps) for c in map(int, self.clients)}
