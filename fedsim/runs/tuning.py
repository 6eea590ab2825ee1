"""A sweep that finds the best values of some keys for another one: each method at its own learning rate, say.

`tuned: {file: rates.yaml, keys: [local.lr]}` in a sweep's file names a sweep that runs first. Of its runs with the settings that
a run here has too, the best on validation gives the run its values of the keys; of equal scores the lower loss. Settings that only
one of the two sweeps names, and the seed, do not count; runs that differ in their seed alone count by their mean. A key that a
setting has not, as `algorithm.server_lr` of FedAvg, is not given to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedsim.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.runs.sweep_plan import Job

Score = tuple[float, float]  # the score of a model, and what decides between equal ones; more is better


@dataclass(frozen=True)
class Candidates:
    """What is known of the values of keys.

    Attributes:
        keys: whose values are sought.
        settings: of each run of the sweep that seeks them.
        scores: of these runs, see `scores_of`; None = not known yet, so that the first values are taken.
    """

    keys: tuple[str, ...]
    settings: Sequence[Mapping[str, Any]]
    scores: Sequence[Score] | None = None

    def best(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """The best values of the keys for a run with these settings.

        Raises:
            UserError: if the run sets one of the keys itself, or there is no run to learn from.
        """
        if own := [key for key in self.keys if key in run]:
            raise UserError(f"{own[0]} is set here and by tuned; name it in one place")
        found: dict[str, tuple[dict[str, Any], list[Score]]] = {}
        for i, tried in enumerate(self.settings):
            shared = (tried.keys() & run.keys()) - {"seed", *self.keys}
            if all(tried[key] == run[key] for key in shared):
                values = {key: tried[key] for key in self.keys if key in tried}
                scores = found.setdefault(repr(values), (values, []))[1]
                scores.append(self.scores[i] if self.scores else (0.0, 0.0))
        if not found:
            raise UserError("the sweep that tuned names has no run with these settings; add them to its grid")
        return max(found.values(), key=lambda each: [math.fsum(of) / len(of) for of in zip(*each[1], strict=True)])[0]


def scores_of(jobs: Sequence[Job], table: pd.DataFrame, losses: pd.DataFrame) -> list[Score]:
    """The validation score and loss of each run's best model - the global one, else the centralized one, else the mean over
    the local ones - signed so that more is better; minus infinity where a model has none.

    Args:
        jobs: finished runs.
        table, losses: of these, from `sweep_table`, of their `best.metric` and of the loss.
    """
    from fedsim.analysis.load import metric_mode

    out: list[Score] = []
    for job in jobs:
        assert job.path is not None, "a finished run has its folder"
        found: list[float] = []
        for each in (table, losses):
            rows = each[each["run"] == job.path.name]
            by_scope = rows.groupby("scope")["best"].mean()
            scope = next(s for s in ("federated", "central", "local") if s in by_scope.index)
            metric = str(rows["metric"].iloc[0])
            mode = (job.exp.best.mode if each is table else None) or metric_mode(metric)
            value = float(by_scope[scope]) * (1 if mode == "max" else -1)
            found.append(value if math.isfinite(value) else -math.inf)
        out.append((found[0], found[1]))
    return out
