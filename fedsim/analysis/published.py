"""Published numbers beside ours: the lines of `published` in an experiment's `reproduce.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedsim.analysis.finished import (
    PROPORTIONS,
    TINY,
    FinishedRun,
    Runs,
    binomial_error,
    format_score,
    inside_rounds,
    score_error,
)
from fedsim.analysis.report_spec import Published, Report
from fedsim.analysis.tables import Table

COLUMNS = ("name", "run", "metric", "published", "ours", "difference", "standard_error", "runs", "note")


def published_table(report: Report, runs: Runs) -> pd.DataFrame:
    """The published numbers beside ours, one row per line of `published`.

    Ours is the mean over the label's runs. No score is interpolated: each curve gives its last point at or before the
    place asked for. `best: true` takes the best of each curve after training began (for `clients` the best round's mean
    before aggregation), and then the mean, the lowest or the highest of the clients.

    Returns:
        Columns `name`, `run`, `metric`, `published`, `ours`, `difference` (ours - published), `standard_error`, `runs`
        (that gave a number), `note` ("" or where the number was taken instead).
    """
    table = []
    for line in report.published:
        metric, members = line.metric or report.metric, runs.get(line.run) or []
        # Of each run with a number: its place in rounds (NaN: the best), value, standard error over validation examples.
        found = {i: one for i, run in enumerate(members) if (one := _measure(run, line, metric)) is not None}
        _, values, errors = np.array([*found.values()]).reshape(-1, 3).T
        n, published = len(values), np.nan if line.value is None else float(line.value)
        ours = values.mean() if n else np.nan
        error = values.std(ddof=1) / np.sqrt(n) if n > 1 else errors[0] if n else np.nan
        note = _note(line, metric, members, {i: one[0] for i, one in found.items()})
        table.append((line.name, line.run, metric, published, ours, ours - published, error, n, note))
    return pd.DataFrame(table, columns=[*COLUMNS])


def _measure(run: FinishedRun, line: Published, metric: str) -> np.ndarray | None:
    """(place, value, standard error) of a line; None where nothing was recorded at or before that place."""
    place = _place(run, line)
    if place > run.rounds + TINY:
        return None
    sign, found = run.sign(metric), []
    for curve in _curves(run, line, metric):
        if line.best:
            curve = curve[(curve[:, 0] > 0) & ((line.what != "clients") | (curve[:, 0] % 1 == 0))]
            found += [[np.nan, *curve[np.argmax(sign * curve[:, 1]), 1:]]] if len(curve) else []
        else:
            found += curve[curve[:, 0] <= place + TINY][-1:].tolist()
    if not found:
        return None
    table = np.array(found)
    if line.what in ("local_min", "local_max"):
        return table[np.argmin(table[:, 1]) if line.what == "local_min" else np.argmax(table[:, 1])]
    return np.array([table[:, 0].min(), *table[:, 1:].mean(axis=0)])


def _curves(run: FinishedRun, line: Published, metric: str) -> list[np.ndarray]:
    """The curves that a line is about, float64 [points, 3]: place in rounds, value, standard error."""
    if line.what == "clients":
        points = [
            (at, scores.mean(), np.mean(binomial_error(run, scores, metric)))
            for _, (places, values) in sorted(inside_rounds(run, metric).items())
            for at, scores in zip(places, values.T, strict=True)
        ]
        return [np.array(points).reshape(-1, 3)]
    models = [f"local {client}" for client in run.clients(metric) if line.site in (None, client)]
    models = {"merged": ["federated"], "central": ["central"]}.get(line.what, models)
    out = []
    for model in models:
        curve = run.curve(model, metric)
        errors = binomial_error(run, curve[:, 1], metric)
        if metric not in PROPORTIONS and len(curve):  # known of the last model alone
            errors[-1] = score_error(run, model, curve[-1, 1], metric)
        out.append(np.column_stack([curve, errors]))
    return out


def _place(run: FinishedRun, line: Published) -> float:
    """Where a line asks for a number, on the axis of rounds."""
    return float(line.round) if line.round is not None else (1.0 if line.at is None else line.at) * run.rounds


def _note(line: Published, metric: str, members: Sequence[FinishedRun], places: dict[int, float]) -> str:
    """What a reader has to know of a number; `places` are those of the members that gave one."""
    if not members:
        return f"no finished run {line.run!r}"
    if not places:
        rounds = max(run.rounds for run in members)
        if (line.round or 0) > rounds:
            return f"the run has {rounds} round{'s' if rounds > 1 else ''}"
        if line.site is not None and line.site not in (known := members[0].clients(metric)):
            return f"no client {line.site!r} with a local-only model; there are {', '.join(known) or 'none'}"
        return f"no validation {metric} was recorded at or before this place"
    missing = len(members) - len(places)
    notes = [f"{missing} of {len(members)} runs gave no number"] if missing else []
    early = {i: _place(members[i], line) - place for i, place in places.items() if np.isfinite(place)}
    furthest = max(early, key=lambda i: early[i], default=None)
    if furthest is not None and early[furthest] > 1e-6:
        run = members[furthest]
        asked, taken = (f"{100 * place / run.rounds:.3g} %" for place in (_place(run, line), places[furthest]))
        asked = f"at {asked}" if line.round is None else f"after round {line.round}"
        notes.append(f"asked for {asked}, taken at {taken} of the steps, the last score before")
    return "; ".join(notes)


def published_part(report: Report, runs: Runs) -> dict[str, Any]:
    """The table as a report shows it: `table`, `notes` in their order, and whether there are `other_metrics`."""
    found, rows, notes = published_table(report, runs), [], []
    several = found["run"].nunique() > 1
    for line in found.itertuples():
        name = line.name
        if line.metric != report.metric and line.metric not in name:
            name += f", {line.metric}"
        if line.note:
            notes.append(line.note)
            name += f" ({len(notes)})"
        exact = line.metric not in PROPORTIONS and np.isfinite(line.published)
        cells = [as_given(line.published) if exact else format_score(line.published, line.metric)]
        cells += [format_score(line.ours, line.metric), format_score(line.difference, line.metric, sign=True)]
        cells += [format_score(line.standard_error, line.metric), str(line.runs)]
        rows.append([*([line.run] if several else []), name, *cells])
    head = [*(["run"] if several else []), "", "published", "ours", "difference", "standard error", "runs"]
    other = bool((found["metric"] != report.metric).any())
    numbers = range(len(head) - 5, len(head))
    return {"table": Table(head, rows, numbers), "notes": notes, "other_metrics": other}


def as_given(value: float) -> str:
    """A published value, no more exact than it was given; 2.00 is 2.0 once it is read."""
    text = f"{value:g}"
    return f"{value:.2f}" if abs(value) < 10 and len(text.partition(".")[2]) < 2 else text
