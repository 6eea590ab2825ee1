"""Claims of a sweep's file: which setting should be better than which other one, and whether its runs bear that out.

Runs of both sides are paired where all other swept keys agree, the seed among them, so that both were made on the same
clients. A claim holds if the mean difference of the pairs is above zero together with its 95 % interval (Student's t over the
pairs), fails if the interval lies below zero, and is open in between or with fewer than two pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from fedsim.analysis.load import metric_mode
from fedsim.core.errors import UserError
from fedsim.core.section import Text, section

WORDS = {False: "FAILED", None: "OPEN", True: "HOLDS"}  # what failed comes first


@section
class Claim:
    """A line of `claims` in a sweep's file."""

    claim: Text
    """What is expected, and why or by whom."""
    better: dict[str, Any]
    """Swept key -> its value on the side that should be better; of a section without other keys its name will do."""
    worse: dict[str, Any]
    """The same of the other side."""
    where: dict[str, Any] = field(default_factory=dict)
    """Swept key -> value that both sides have."""
    value: Literal["last", "best", "own", "test"] = "last"
    """Score that is compared, a column of `sweep_table`: on the shared validation examples at the end, of the best model there, on
    the clients' own validation examples, or on the test examples."""


@dataclass(frozen=True)
class Judged:
    """A claim and how it came out.

    Attributes:
        claim: what was judged.
        mean, low, high: the mean difference over the pairs and its interval, positive where the claim is right; NaN where there
            is none.
        pairs: how many runs of each side were compared.
    """

    claim: Claim
    mean: float
    low: float
    high: float
    pairs: int

    @property
    def holds(self) -> bool | None:
        """Whether it holds; None = open."""
        return True if self.low > 0 else False if self.high < 0 else None

    @property
    def observed(self) -> str:
        """What was seen, in words."""
        if not self.pairs:
            return "no pair of finished runs"
        known = f" ({self.low:+.4f} to {self.high:+.4f})" if self.pairs > 1 else ""
        return f"{self.mean:+.4f}{known} over {self.pairs} pair{'s' * (self.pairs > 1)}"


def judge(
    claim: Claim, members: Sequence[tuple[str, Mapping[str, Any]]], table: pd.DataFrame, ignore: Sequence[str] = ()
) -> Judged:
    """Whether the runs of a sweep bear a claim out, by a score of the global model.

    Args:
        claim: the claim.
        members: (label, settings) of each finished run.
        table: of these, from `sweep_table`.
        ignore: keys in which the runs of a pair may differ, as those that were tuned for each setting.

    Raises:
        UserError: if a key of the claim was not swept.
    """
    swept = {key for _, settings in members for key in settings}
    for key in (*claim.better, *claim.worse, *claim.where):
        if key not in swept:
            raise UserError(f"claims: {key} was not swept; use some of {', '.join(sorted(swept))}")
    federated = table[table["scope"] == "federated"]
    scores = dict(zip(federated["run"], federated[claim.value], strict=True))
    metric = str(table["metric"].iloc[0])
    mode = "max" if metric_mode(metric) == "max" else "min"
    sides: list[dict[str, float]] = []
    for side in (claim.better, claim.worse):
        asked, found = {**claim.where, **side}, {}
        for label, settings in members:
            if label in scores and all(key in settings and _fits(value, settings[key]) for key, value in asked.items()):
                rest = {k: v for k, v in settings.items() if k not in (*claim.better, *claim.worse, *ignore)}
                found[json.dumps(rest, sort_keys=True)] = float(scores[label])
        sides.append(found)
    better, worse = sides
    sign = 1.0 if mode == "max" else -1.0
    gaps = np.array([sign * (better[key] - worse[key]) for key in better if key in worse])
    gaps = gaps[np.isfinite(gaps)]
    if len(gaps) < 2:
        return Judged(claim, float(gaps.mean()) if len(gaps) else math.nan, math.nan, math.nan, len(gaps))
    from scipy.stats import t

    mean, half = float(gaps.mean()), float(t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps)))
    return Judged(claim, mean, mean - half, mean + half, len(gaps))


def _fits(asked: Any, value: Any) -> bool:
    """Whether a run's value is the one asked for; a name stands for a section that has nothing but that name."""
    return value == ({"name": asked} if isinstance(value, dict) and isinstance(asked, str) else asked)


def check_claims(found: Any, swept: Sequence[str], where: str) -> list[Mapping[str, Any]]:
    """The claims of a sweep's file as they are written.

    Raises:
        UserError: for anything wrong in them.
    """
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{where}: claims is a list of {{claim: TEXT, better: {{key: value}}, worse: {{key: value}}}}")
    for one in found:
        claim = Claim(**one)
        for key in (*claim.better, *claim.worse, *claim.where):
            if key not in swept:
                raise UserError(f"{where}: claims: {key} is not swept; use some of {', '.join(swept)}")
    return found
