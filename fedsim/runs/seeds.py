"""One experiment with several seeds: the runs, and the mean and the interval over them.

The interval is Student's t: mean +- t(level, n - 1) x s / sqrt(n) over n runs, s their standard deviation with n - 1. It
covers whatever differs from seed to seed - partition, initial values, order of the examples - under normally distributed
scores, and not the choice of the validation examples, which all runs share.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedsim.analysis.load import SCOPES, load_runs, require_metric, rows_of
from fedsim.analysis.scores import summary
from fedsim.core.errors import ClientError, UserError
from fedsim.core.files import check_own, write_atomic, write_figure

if TYPE_CHECKING:
    from fedsim.config.experiment import Experiment
    from fedsim.runs.run import Run


@dataclass(frozen=True)
class SeedRuns:
    """The finished runs of an experiment with `seeds`.

    Attributes:
        runs: one for each seed, in order; each is an ordinary run.
        path: folder of the table and the figures over all of them.
        figures: the figures.
    """

    runs: list[Run]
    path: Path
    figures: list[Path]

    def metrics(self) -> pd.DataFrame:
        """The metrics of all runs; see `fedsim.load_runs`."""
        return load_runs([run.path for run in self.runs])

    def table(self, metric: str | None = None) -> pd.DataFrame:
        """Mean and interval over the seeds; see `over_seeds`. `metric` is the experiment's `best.metric` where it is None."""
        df = self.metrics()
        return over_seeds(df, metric or str(df["best.metric"].iloc[0]))


def run_seeds(exp: Experiment, progress: bool = True) -> SeedRuns:
    """Run an experiment once for each of its seeds; finished runs are skipped and stopped ones resumed.

    Runs go one after another, or one per device, with as many threads as a run of its own would have, so each gives the
    same numbers as with `seed` alone.

    Raises:
        UserError: if no run can start.
        ClientError: if a run failed; the others are finished then.
    """
    from fedsim.config.experiment import results_of
    from fedsim.runs.resolve import devices_of
    from fedsim.runs.run import Run
    from fedsim.runs.sweep import run_jobs
    from fedsim.runs.sweep_plan import Job, seed_by_seed

    devices = devices_of(exp)[1]
    jobs = [Job({"seed": one.seed}, one) for one in seed_by_seed(exp)]
    run_jobs(jobs, devices=devices, workers=len(devices), threads=exp.executor.threads, progress=progress)
    failed = [job for job in jobs if job.state == "failed"]
    if failed and all(job.path is None for job in failed):
        raise UserError(str(failed[0].reason))
    if failed:
        why = "; ".join(f"seed={job.exp.seed}: {job.reason}" for job in failed)
        raise ClientError(f"{len(failed)} of {len(jobs)} runs failed: {why}")
    runs = [Run(job.path, job.path.name) for job in jobs]
    digest = hashlib.sha256(" ".join(run.id for run in runs).encode()).hexdigest()[:12]
    path = results_of(exp) / exp.name / "seeds" / digest
    check_own(path, results_of(exp))
    df = load_runs([run.path for run in runs])
    every = ("accuracy", "macro_f1", "exact_match", "loss", "perplexity")
    names = [name for name in every if (df["name"] == name).any()]
    for name in names:
        write_atomic(path / f"{name}.csv", over_seeds(df, name).to_csv(index=False).encode())
    return SeedRuns(runs, path, [_draw(df, name, path / f"{name}.png") for name in names])


def over_seeds(df: pd.DataFrame, metric: str = "accuracy", level: float = 0.95) -> pd.DataFrame:
    """Mean and Student's t interval over runs that differ in the seed alone, for the models that validation chose.

    Args:
        df: metrics of the runs from `load_runs`.
        metric: a recorded name.
        level: confidence level of the interval, between 0 and 1.

    Returns:
        One row per model of `fedsim.summary`: `model`, `runs` (that have it), and for `validation`, `site` and `test` the mean
        and the bounds `... low` and `... high`, NaN with fewer than two runs.

    Raises:
        UserError: no run recorded the metric, or the level is out of range.
    """
    if not 0.0 < level < 1.0:
        raise UserError(f"level={level!r} is not between 0 and 1; 0.95 is usual")
    rows = []
    for model, part in summary(df, metric, which="best").groupby("model", sort=False):
        row: dict[str, Any] = {"model": model, "runs": len(part)}
        for key in ("validation", "site", "test"):
            row |= zip((key, f"{key} low", f"{key} high"), interval(part[key], level), strict=True)
        rows.append(row)
    return pd.DataFrame(rows)


def interval(values: pd.Series, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of the values that are not NaN and the bounds of its Student's t interval; NaN where there are too few."""
    from scipy.stats import t

    found = values.dropna().to_numpy(float)
    n = len(found)
    mean = float(np.mean(found)) if n else float("nan")
    half = float(t.ppf(0.5 + level / 2, n - 1) * np.std(found, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return mean, mean - half, mean + half


def curves(df: pd.DataFrame, metric: str = "accuracy") -> pd.DataFrame:
    """Validation scores at the ends of rounds over runs that differ in the seed alone.

    Returns:
        `scope`, `round`, `runs`, `mean`, `low`, `high`: of local models the mean over sites of each run is taken first.

    Raises:
        UserError: no run recorded the metric.
    """
    require_metric(df, metric, "validation")
    scored = df[(df["split"] == "validation") & (df["name"] == metric)]
    out = []
    for scope in SCOPES:
        rows = rows_of(scored, scope).sort_values("step")
        ends = rows.groupby(["run", "round", rows["client"].fillna("")], observed=True)["value"].last()
        for number, values in ends.groupby(["run", "round"], observed=True).mean().groupby("round"):
            out.append((scope, int(number), len(values), *interval(values)))
    return pd.DataFrame(out, columns=["scope", "round", "runs", "mean", "low", "high"])


def _draw(df: pd.DataFrame, metric: str, file: Path) -> Path:
    """A line for each scope, the mean over the seeds, in a band, its 95 % t interval."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from fedsim.analysis.style import SCOPE_LOOKS, STYLE, Y_LABELS

    table = curves(df, metric)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.0, 3.6), layout="constrained")
        ax = figure.add_subplot()
        for scope, part in table.groupby("scope", sort=False):
            color, _, name = SCOPE_LOOKS[scope]
            ax.plot(part["round"], part["mean"], color=color, marker="o", markersize=3.0, label=name)
            ax.fill_between(part["round"], part["low"], part["high"], color=color, alpha=0.18, linewidth=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(
            xlabel="round",
            ylabel=Y_LABELS.get(metric, metric),
            title=f"{df['run'].nunique()} seeds: mean and 95 % t interval",
        )
        ax.legend()
        write_figure(file, figure, 150)
    return file
