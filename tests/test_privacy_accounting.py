"""Epsilons against formulas and numbers that do not come from the accountant."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.special import gammaln, logsumexp
from scipy.stats import norm

from fedsim.core.errors import UserError
from fedsim.privacy import epsilon, noise_multiplier

pytest.importorskip("dp_accounting")


def gaussian(z: float, delta: float) -> float:
    """Balle and Wang, 2018, theorem 8: the exact epsilon of one Gaussian mechanism of sensitivity 1."""

    def spent(eps: float) -> float:
        return norm.cdf(0.5 / z - eps * z) - math.exp(eps) * norm.cdf(-0.5 / z - eps * z)

    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= delta else (middle, high)
    return high


def sampled_rdp(q: float, z: float, rounds: int, delta: float) -> float:
    """Mironov et al., 2019, section 3.3 for whole orders; Canonne et al., 2020, proposition 12, to epsilon."""
    best = math.inf
    for a in range(2, 257):
        k = np.arange(a + 1)
        terms = gammaln(a + 1) - gammaln(k + 1) - gammaln(a - k + 1) + (a - k) * math.log1p(-q) + k * math.log(q)
        rdp = rounds * logsumexp(terms + (k * k - k) / (2 * z * z)) / (a - 1)
        best = min(best, rdp + math.log1p(-1 / a) - math.log(delta * a) / (a - 1))
    return best


@pytest.mark.parametrize(("z", "rounds"), [(1.0, 1), (2.5, 1), (3.0, 9)])
def test_without_sampling_it_is_the_gaussian_mechanism(z: float, rounds: int) -> None:
    exact = gaussian(z / math.sqrt(rounds), 1e-5)
    how: dict[str, Any] = {"sampling": 1.0, "rounds": rounds, "delta": 1e-5}
    assert epsilon(noise_multiplier=z, accountant="pld", **how) == pytest.approx(exact, rel=2e-3)
    assert exact <= epsilon(noise_multiplier=z, **how) <= 1.15 * exact
    # A client that is replaced moves the sum twice as far as one that is left out.
    fixed = {**how, "sampler": "fixed", "population": 50}
    assert epsilon(noise_multiplier=2 * z, **fixed) == epsilon(noise_multiplier=z, **how)
    assert epsilon(noise_multiplier=z, neighbours="zero_out", **fixed) == epsilon(noise_multiplier=z, **how)
    replaced = epsilon(noise_multiplier=2 * z, neighbours="replace_one", accountant="pld", **how)
    assert replaced == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(("q", "z", "rounds"), [(0.1, 1.0, 100), (0.01, 0.8, 1000), (0.5, 2.0, 30)])
def test_poisson_cohorts_amplify_as_the_formula_says(q: float, z: float, rounds: int) -> None:
    found = epsilon(sampling=q, noise_multiplier=z, rounds=rounds, delta=1e-5)
    whole = sampled_rdp(q, z, rounds, 1e-5)
    assert 0.97 * whole <= found <= whole + 1e-9  # the accountant has orders between the whole ones too
    assert epsilon(sampling=q, noise_multiplier=z, rounds=rounds, delta=1e-5, accountant="pld") < found


def test_published_settings_of_fixed_cohorts() -> None:
    """A million clients, 1,500 rounds: without replacement costs more than Poisson, and replacing more than zeroing."""
    how: dict[str, Any] = {"rounds": 1500, "delta": 1e-6, "noise_multiplier": 0.513, "population": 1_000_000}
    fixed = epsilon(sampling=513e-6, sampler="fixed", neighbours="zero_out", **how)
    poisson = epsilon(sampling=513e-6, **how)
    assert poisson < fixed < epsilon(sampling=513e-6, sampler="fixed", **how)


def test_no_noise_no_rounds_and_growth() -> None:
    how: dict[str, Any] = {"sampling": 0.1, "delta": 1e-5}
    assert (
        epsilon(noise_multiplier=0.0, rounds=3, **how) == math.inf and epsilon(noise_multiplier=1, rounds=0, **how) == 0
    )
    grown = [epsilon(noise_multiplier=1.0, rounds=t, **how) for t in (1, 10, 100)]
    assert grown == sorted(grown) and grown[0] < grown[2]


@pytest.mark.parametrize("how", [{}, {"sampler": "fixed", "population": 100}, {"accountant": "pld"}])
def test_the_noise_for_a_target_is_the_least(how: dict[str, Any]) -> None:
    known: dict[str, Any] = {"sampling": 0.1, "rounds": 20, "delta": 1e-5, **how}
    z = noise_multiplier(target_epsilon=3.0, **known)
    assert epsilon(noise_multiplier=z, **known) <= 3.0 < epsilon(noise_multiplier=z * 0.999, **known)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"sampler": "fixed", "accountant": "pld", "population": 10}, "accountant: pld has no bound"),
        ({"sampler": "fixed", "neighbours": "add_remove"}, "neighbours: add_remove does not go with"),
        ({"neighbours": "replace_one"}, "neighbours: replace_one with cohort.sampler: poisson has no bound under rdp"),
        ({"sampler": "fixed"}, "population: None is no number of clients"),
        ({"sampler": "fixed", "population": 7}, "sampling: 0.1 of 7 clients is no whole number"),
        ({"sampling": 0.0}, "sampling: 0.0 is out of range"),
        ({"delta": 1.0}, "delta: 1.0 is out of range"),
        ({"noise_multiplier": -1.0}, "noise_multiplier: -1.0 is out of range"),
        ({"rounds": 1.5}, "rounds: 1.5 is out of range"),
        ({"accountant": "prv"}, "accountant: 'prv' is not known"),
    ],
)
def test_what_does_not_go_together_is_one_line(how: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        epsilon(**{"sampling": 0.1, "noise_multiplier": 1.0, "rounds": 5, "delta": 1e-5, **how})
    with pytest.raises(UserError, match="target_epsilon: 0.001 needs noise of more than"):
        noise_multiplier(target_epsilon=1e-3, sampling=1.0, rounds=10**6, delta=1e-5)
