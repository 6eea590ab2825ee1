"""What a finished run says: its curves, last scores, scores of single examples, and the standard errors of these.

A model is named "federated" (the global model), "central" or "local CLIENT".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.analysis.load import load_runs, mode_of
from fedsim.analysis.traces import Traces, traces
from fedsim.core import files
from fedsim.core.errors import UserError

PROPORTIONS = ("accuracy", "exact_match")  # an example is right or wrong: binomial
PAIRED = "paired on the same validation examples"
PAIRED_TEST = (
    "paired on the same test examples, of the models chosen on validation; no scores of single validation examples"
)
UNPAIRED = "unpaired, binomial: no scores of single examples"
UNKNOWN = "no standard error: no scores of single examples"
TINY = 1e-9  # scores are fractions such as 173/226: rounding must not decide


@dataclass(frozen=True)
class ExampleScores:
    """Scores of single validation examples by the last models of a run (`scores.npz`); M models, n examples.

    `labels` int64 [n] and `predicted` int [M, n] hold classes, -1 where there are none; `nll` float64 [M, n] is the
    nats of an example's answer, NaN where the model was not scored, `tokens` int64 [n] its length.
    """

    names: list[str]
    labels: np.ndarray
    tokens: np.ndarray
    nll: np.ndarray
    predicted: np.ndarray

    def parts(self, model: str, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A model's score as sum over sum: numerator and denominator of each example, float64 [n]; None if not known."""
        if model not in self.names:
            return None
        at = self.names.index(model)
        if metric == "loss" and not np.isnan(self.nll[at]).any():
            return self.nll[at].astype(float), self.tokens.astype(float)
        if metric == "accuracy" and not (self.labels < 0).any() and not (self.predicted[at] < 0).any():
            return (self.predicted[at] == self.labels).astype(float), np.ones(len(self.labels))
        return None


@dataclass
class FinishedRun:
    """The files of one finished run; `partition` and `comparison` are {} and `scores` is None where there is no file."""

    path: Path
    metrics: pd.DataFrame
    partition: dict[str, Any]
    comparison: dict[str, Any]
    scores: ExampleScores | None
    _traces: dict[str, Traces] = field(default_factory=dict, init=False, repr=False)

    @property
    def seed(self) -> int | None:
        """The seed it ran with."""
        return int(self.metrics["seed"].iloc[0]) if "seed" in self.metrics else None

    @property
    def rounds(self) -> int:
        """Rounds of the run, planned and, as it is finished, done."""
        return int(self.metrics["rounds"].iloc[0] if "rounds" in self.metrics else self.metrics["round"].max())

    def traces(self, metric: str) -> Traces:
        """Its curves on the shared validation examples, on the axis of rounds."""
        if metric not in self._traces:
            self._traces[metric] = traces(self.metrics, metric)
        return self._traces[metric]

    def curve(self, model: str, metric: str) -> np.ndarray:
        """A model's curve, float64 [points, 2]; may be empty."""
        found = self.traces(metric)
        own = found.local.get(model.removeprefix("local "), np.empty((0, 2)))
        return {"federated": found.merged, "central": found.central}.get(model, own)

    def clients(self, metric: str) -> list[str]:
        """The clients that have a local-only model with a score at the end."""
        return [client for client in self.traces(metric).local if np.isfinite(self.last(f"local {client}", metric))]

    def last(self, model: str, metric: str) -> float:
        """A model's validation score at the end; NaN if it was not scored after training began."""
        curve = trained(self.curve(model, metric))
        return float(curve[-1, 1]) if len(curve) else float("nan")

    def sign(self, metric: str) -> float:
        """1 where more is better, -1 where less is."""
        return 1.0 if mode_of(self.metrics, metric) == "max" else -1.0

    def weight(self, metric: str) -> float:
        """Validation examples that a score rests on; NaN where it was not recorded."""
        found = self.metrics[(self.metrics["split"] == "validation") & (self.metrics["name"] == metric)]
        found = found["weight"].dropna()
        return float(found.iloc[-1]) if len(found) else float("nan")


Runs = Mapping[str, Sequence[FinishedRun]]


def load_run(path: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        UserError: no run there, no metrics in it, or a damaged file.
    """
    path = Path(path)
    metrics = load_runs(path)
    if metrics.empty or metrics["run"].nunique() != 1:
        raise UserError(f"{str(path)!r} is not the folder of one run with metrics; give RESULTS/NAME/ID")
    files.warn_of_damage(path, "partition.json", "comparison.json", "scores.npz")
    about = (read_json(path / f"{name}.json") for name in ("partition", "comparison"))
    return FinishedRun(path, metrics, *about, _example_scores(path / "scores.npz"))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object; {} where there is no file. A UserError where it is something else."""
    return files.read_json(file) if file.is_file() else {}


def read_arrays(file: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an `.npz` file; None where there is none. A UserError where it is damaged."""
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except files.DAMAGED_ARRAYS as error:
        why = " ".join(str(error).split())
        raise UserError(f"{file}: not readable ({why}); put it back, or delete the run and make it again") from None


def _example_scores(file: Path) -> ExampleScores | None:
    if (arrays := read_arrays(file)) is None:
        return None
    keys = ("names", "validation_labels", "tokens", "last_nll", "last_predicted")
    if missing := [key for key in keys if key not in arrays]:
        raise UserError(f"{file}: not the scores of a run (no {missing[0]}); delete it or do the run again")
    names, *values = (arrays[key] for key in keys)
    found = ExampleScores(list(map(str, names)), *values)
    models = (len(found.names), len(found.labels))
    if found.nll.shape != models or found.predicted.shape != models or found.tokens.shape != models[1:]:
        raise UserError(f"{file}: arrays do not fit {models[0]} models and {models[1]} examples; do the run again")
    return found


def trained(curve: np.ndarray) -> np.ndarray:
    """The points of a curve [points, 2] after training began."""
    return curve[curve[:, 0] > 0]


def inside_rounds(run: FinishedRun, metric: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The cohort's clients inside each round: positions [p] where all of them were scored, scores [clients, p].

    The aggregation of round r is at position r; the global model that the round began with is not among the points.
    """
    found = {}
    for number, members in run.traces(metric).clients.items():
        own = [curve[curve[:, 0] > number - 1] for curve in members.values()]
        at = reduce(np.intersect1d, [curve[:, 0] for curve in own])
        if len(at):
            found[number] = (at, np.stack([curve[np.isin(curve[:, 0], at), 1] for curve in own]))
    return found


# -------------------------------------------------------------------------------------------------- standard errors


def differences(run: FinishedRun, models: Sequence[str], metric: str) -> tuple[dict[str, tuple[float, float]], str]:
    """The global model's score minus that of each of `models`, with the standard error, all from one source.

    Returns:
        Model -> (difference, its standard error, NaN if not known), and the source: `PAIRED` (last models, scores.npz),
        `PAIRED_TEST` (chosen models, comparison.json, accuracy), `UNPAIRED` or `UNKNOWN` (last models).
    """
    if run.scores is not None:
        own, *others = (run.scores.parts(model, metric) for model in ("federated", *models))
        if own is not None and all(other is not None for other in others):
            apart = {model: own[0] - other[0] for model, other in zip(models, others, strict=True)}
            size = own[1]
            return {m: (float(d.sum() / size.sum()), ratio_error(d, size)) for m, d in apart.items()}, PAIRED
    if metric == "accuracy" and all(model in run.comparison for model in models):
        keys = ("difference", "standard_error")
        return {model: tuple(float(run.comparison[model][key]) for key in keys) for model in models}, PAIRED_TEST
    last = {model: run.last(model, metric) for model in ("federated", *models)}
    error = {model: binomial_error(run, value, metric) for model, value in last.items()}
    found = {m: (last["federated"] - last[m], float(np.hypot(error["federated"], error[m]))) for m in models}
    return found, UNPAIRED if metric in PROPORTIONS else UNKNOWN


def ratio_error(total: np.ndarray, size: np.ndarray) -> float:
    """Standard error of sum(total) / sum(size) over independently drawn examples [n], by the ratio estimator.

    With R the ratio and e = total - R size, it is sqrt(n / (n - 1) sum(e^2)) / sum(size): for sizes of 1 the standard
    error of the mean (Cochran, Sampling Techniques, chapter 6). NaN with fewer than two examples.
    """
    n = len(total)
    if n < 2:
        return float("nan")
    left = total - total.sum() / size.sum() * size
    return float(np.sqrt(n / (n - 1) * np.square(left).sum()) / size.sum())


def binomial_error(run: FinishedRun, value: Any, metric: str) -> Any:
    """sqrt(p (1 - p) / n) of a share (or an array of shares) of the n validation examples; NaN for other metrics."""
    if metric not in PROPORTIONS:
        return value * float("nan")
    return np.sqrt(np.maximum(value * (1.0 - value), 0.0) / run.weight(metric))


def score_error(run: FinishedRun, model: str, value: float, metric: str) -> float:
    """Standard error of one model's score; NaN if not known. That of a loss is the last model's."""
    if metric in PROPORTIONS:
        return float(binomial_error(run, value, metric))
    parts = run.scores.parts(model, metric) if run.scores is not None else None
    return float("nan") if parts is None else ratio_error(*parts)


def format_score(value: float, metric: str, sign: bool = False) -> str:
    """A score or a difference as text: three decimals for shares, else three digits; "-" for NaN."""
    if not np.isfinite(value):
        return "-"
    return f"{value + 0.0:{'+' if sign else ''}{'.3f' if metric in PROPORTIONS else '#.3g'}}".rstrip(".")
