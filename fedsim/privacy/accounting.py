"""Epsilon of rounds of a noisy sum over sampled clients, by dp-accounting.

Each round adds the updates of a cohort, each of norm at most C, and Gaussian noise of standard deviation z C (C times the largest
weight, where clients have weights); z is the noise multiplier. Who is a neighbor of a data set, and how the cohort is drawn, go
together:

- `poisson` with `add_remove`: each client takes part with probability q, independently; neighbors differ by one client more.
  Mironov, Talwar, Zhang, Renyi Differential Privacy of the Sampled Gaussian Mechanism, 2019 (arXiv:1908.10530).
- `fixed` with `replace_one`: a cohort of fixed size without replacement; neighbors differ in one client, whose update in the one
  is replaced by another in the other, so the sum moves by up to 2 C, and the accountant is told z / 2. Wang, Balle,
  Kasiviswanathan, Subsampled Renyi Differential Privacy and Analytical Moments Accountant, AISTATS 2019 (arXiv:1808.00087).
- `zero_out`: neighbors differ in one client, whose update is zero in one of them. The sum moves by up to C, so z is taken as it is.
  With a fixed cohort this is the weaker relation that published numbers often use without saying so.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any, Literal

from fedsim.core.errors import UserError

Accountant = Literal["rdp", "pld"]
Sampler = Literal["poisson", "fixed"]
Neighbours = Literal["add_remove", "replace_one", "zero_out"]


def epsilon(
    *,
    sampling: float,
    noise_multiplier: float,
    rounds: int,
    delta: float,
    accountant: Accountant = "rdp",
    sampler: Sampler = "poisson",
    population: int | None = None,
    neighbours: Neighbours | None = None,
) -> float:
    """Epsilon after so many rounds.

    Args:
        sampling: the share of clients in a round, in (0, 1]: the probability of each (poisson), or cohort / population (fixed).
        noise_multiplier: standard deviation of the noise on the sum / (clip x largest weight).
        rounds: how many.
        delta: in (0, 1).
        accountant: rdp (Renyi) or pld (privacy loss distributions, tighter; poisson only).
        sampler: poisson or fixed.
        population: how many clients there are; needed for fixed.
        neighbours: add_remove (the default with poisson), replace_one (with fixed) or zero_out.

    Returns:
        Epsilon; infinity without noise, 0 for no round.

    Raises:
        UserError: for values out of range, what does not go together, or without dp-accounting.
    """
    relation = check(sampler, accountant, neighbours)
    for key, value, fine in (
        ("sampling", sampling, 0 < sampling <= 1),
        ("delta", delta, 0 < delta < 1),
        ("noise_multiplier", noise_multiplier, 0 <= noise_multiplier < math.inf),
        ("rounds", rounds, rounds >= 0 and rounds == int(rounds)),
    ):
        if not fine:
            raise UserError(f"{key}: {value!r} is out of range; {_RANGES[key]}")
    if rounds == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    dp = _library()
    how = (sampling, noise_multiplier, sampler, population, relation)
    with _quiet():  # an order that does not converge is left out, which makes the bound no smaller
        if accountant == "rdp":  # of one round, times the rounds
            orders, rdp = _rdp(*how)
            return float(dp.rdp.compute_epsilon(orders, int(rounds) * rdp, delta)[0])
        found = dp.pld.PLDAccountant(neighboring_relation=_relation(dp, sampler, relation))
        found.compose(dp.SelfComposedDpEvent(_round(dp, *how), int(rounds)))
        return float(found.get_epsilon(delta))


def noise_multiplier(*, target_epsilon: float, most: float = 1e4, **how: Any) -> float:
    """The least noise multiplier whose epsilon is at most the target, to four digits and never less than needed.

    Args:
        target_epsilon: above 0.
        most: the largest multiplier that is tried.
        how: as in `epsilon`.

    Raises:
        UserError: as `epsilon`; or if the target cannot be reached.
    """
    if not 0 < target_epsilon < math.inf:
        raise UserError(f"target_epsilon: {target_epsilon!r} is not a number above 0")

    def enough(z: float) -> bool:
        return epsilon(noise_multiplier=z, **how) <= target_epsilon

    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, high * 2
        if high > most:
            raise UserError(
                f"target_epsilon: {target_epsilon!r} needs noise of more than {most:g} x the clip; "
                "raise it, or lower rounds or cohort.size"
            )
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def check(sampler: str, accountant: str, neighbours: str | None) -> Neighbours:
    """The neighbor relation, after a check that all three go together.

    Raises:
        UserError: with the reason.
    """
    for key, value, known in (
        ("sampler", sampler, ("poisson", "fixed")),
        ("accountant", accountant, ("rdp", "pld")),
        ("neighbours", neighbours, (None, "add_remove", "replace_one", "zero_out")),
    ):
        if value not in known:
            raise UserError(f"{key}: {value!r} is not known; use one of {', '.join(map(str, known))}")
    relation: Any = neighbours or ("add_remove" if sampler == "poisson" else "replace_one")
    if sampler == "fixed" and accountant == "pld":
        raise UserError("accountant: pld has no bound for cohorts of fixed size; use rdp, or cohort.sampler: poisson")
    if sampler == "fixed" and relation == "add_remove":
        raise UserError(
            "neighbours: add_remove does not go with cohorts of fixed size, whose size would tell; use replace_one or "
            "zero_out, or cohort.sampler: poisson"
        )
    if sampler == "poisson" and relation == "replace_one" and accountant == "rdp":
        raise UserError(
            "neighbours: replace_one with cohort.sampler: poisson has no bound under rdp; use accountant: pld, or add_remove"
        )
    return relation


_RANGES = {
    "sampling": "give a share in (0, 1]",
    "delta": "give a number in (0, 1), well below 1 / clients",
    "noise_multiplier": "give a number of at least 0",
    "rounds": "give a whole number of at least 0",
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise UserError("privacy needs the package dp-accounting: pip install 'fedsim[dp]'") from None
    return dp_accounting


def _relation(dp: Any, sampler: str, relation: Neighbours) -> Any:
    """For one accountant a fixed cohort is always a replacement; zero_out differs from it in the noise alone."""
    replaces = sampler == "fixed" or relation == "replace_one"
    return dp.NeighboringRelation.REPLACE_ONE if replaces else dp.NeighboringRelation.ADD_OR_REMOVE_ONE


@functools.lru_cache(maxsize=1 << 14)
def _rdp(sampling: float, noise: float, sampler: str, population: int | None, relation: Neighbours) -> tuple[Any, Any]:
    """Orders, and the Renyi divergence of one round at each of them."""
    dp = _library()
    made = dp.rdp.RdpAccountant(neighboring_relation=_relation(dp, sampler, relation))
    made.compose(_round(dp, sampling, noise, sampler, population, relation))
    return made._orders, made._rdp


def _round(dp: Any, sampling: float, noise: float, sampler: str, population: int | None, relation: Neighbours) -> Any:
    """One round, as the library's event; its noise is relative to how far one client moves the sum."""
    if sampler == "poisson":
        gaussian = dp.GaussianDpEvent(noise)
        return gaussian if sampling == 1 and relation != "replace_one" else dp.PoissonSampledDpEvent(sampling, gaussian)
    if population is None or population < 1 or population != int(population):
        raise UserError(f"population: {population!r} is no number of clients, which cohorts of fixed size need")
    cohort = round(sampling * population)
    if cohort < 1 or abs(cohort - sampling * population) > 1e-6 * population:
        raise UserError(f"sampling: {sampling!r} of {population} clients is no whole number of them")
    gaussian = dp.GaussianDpEvent(noise / (2 if relation == "replace_one" else 1))
    return gaussian if cohort == population else dp.SampledWithoutReplacementDpEvent(int(population), cohort, gaussian)
