"""Scores of models, and which differences are statistically significant.

Two models are compared example by example, as they answer the same ones. For a metric that is a mean over n examples, with
d_i the difference of the two models on example i:

    difference = mean(d),    standard error = sqrt(sum((d_i - mean(d))^2) / (n - 1) / n)

A difference is not significant, and marked `~`, if |difference| <= 1.96 standard errors, or if fewer than 6 examples differ
between the two models: no sign test reaches 5 % then. The mean over columns is compared in the same way, with d_i summed over
the metrics of a task, since they rest on the same examples, and the variances of the tasks added. A metric that is not a mean
over examples (perplexity) has no pairs: the standard error of a difference is sqrt(s_a^2 + s_b^2) of the harness's two.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.core.errors import UserError
from fedsim.core.files import check_own, metrics_files, write_atomic
from fedsim.zero_shot.models import Candidate

NOISE = 1.96  # standard errors: 95 % of a normal distribution
FEWEST = 6  # examples that must differ between two models: 2 x 0.5^5 is still more than 5 %


@dataclass(frozen=True)
class Score:
    """One model's value of one metric.

    Attributes:
        value: as the harness gives it.
        stderr: its standard error by the harness, if it gives one.
        items: float64 `[n]`, the value on each example; None if the metric is not a mean over examples.
    """

    value: float
    stderr: float | None
    items: np.ndarray | None = None


Column = tuple[str, str]  # task, metric


@dataclass
class Result:
    """One model's scores."""

    model: Candidate
    scores: dict[Column, Score]
    seconds: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """A model against another.

    Attributes:
        value: the model's minus the other's.
        stderr: of that difference; None if unknown.
        distinct: number of examples on which the two differ; None without pairs.
    """

    value: float
    stderr: float | None
    distinct: int | None

    @property
    def within_noise(self) -> bool:
        """The module's rule; a difference without a standard error is never significant."""
        few = self.distinct is not None and self.distinct < FEWEST
        return few or self.stderr is None or abs(self.value) <= NOISE * self.stderr


def compare(a: dict[Column, Score], b: dict[Column, Score]) -> Difference:
    """The mean over the metrics of one model against another's; with one metric, that metric. See the module's formula.

    Args:
        a: task and metric -> score of the model.
        b: the same of the other, over the same examples.
    """
    value = float(np.mean([a[c].value - b[c].value for c in a]))
    if any(s.items is None for s in (*a.values(), *b.values())):
        errors = [s.stderr for s in (*a.values(), *b.values())]
        known = None not in errors
        return Difference(value, math.sqrt(sum(e**2 for e in errors)) / len(a) if known else None, None)
    by_task = _by_task({c: a[c].items - b[c].items for c in a})
    return Difference(value, _stderr(by_task, len(a)), sum(int((d != 0).sum()) for d in by_task))


def _by_task(items: dict[Column, np.ndarray]) -> list[np.ndarray]:
    """Sum over each task's metrics, example by example: they rest on the same examples, those of different tasks do not."""
    tasks = dict.fromkeys(task for task, _ in items)
    return [np.sum([v for (t, _), v in items.items() if t == task], axis=0) for task in tasks]


def _stderr(by_task: list[np.ndarray], columns: int) -> float | None:
    if any(len(x) < 2 for x in by_task):
        return None
    return math.sqrt(sum(x.var(ddof=1) / len(x) for x in by_task)) / columns


@dataclass
class Evaluation:
    """Scores of models on tasks.

    Attributes:
        results: one per model, in the order of the table.
        against: the row that each row is compared with, by index; None for a row that is compared with none.
        settings: tasks with their versions and numbers of examples, limit, device, versions of the packages.
    """

    results: list[Result]
    against: list[int | None]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> list[Column]:
        """Task and metric of each column."""
        return list(dict.fromkeys(c for r in self.results for c in r.scores))

    @property
    def averaged(self) -> list[Column]:
        """The columns that are accuracies, each example 0 to 1: the mean is over these."""
        scores = [(c, [r.scores[c].items for r in self.results]) for c in self.columns]
        return [c for c, all_ in scores if all(i is not None and i.min() >= 0 and i.max() <= 1 for i in all_)]

    def against_best(self) -> None:
        """Compare all rows with the one whose mean over accuracies (the first column if there is none) is highest."""
        columns = self.averaged or self.columns[:1]
        best = int(np.argmax([np.mean([r.scores[c].value for c in columns]) for r in self.results]))
        self.against = [None if i == best else best for i in range(len(self.results))]

    def scores(self, row: int) -> dict[str, dict[str, Any]]:
        """Column name -> value, standard error and comparison of one row; `mean` where there are several accuracies."""
        result, other = self.results[row], self.against[row]
        groups = {f"{task}_{metric}": [(task, metric)] for task, metric in self.columns}
        if len(self.averaged) > 1:
            groups["mean"] = self.averaged
        out: dict[str, dict[str, Any]] = {}
        for name, columns in groups.items():
            own = {c: result.scores[c] for c in columns}
            one = own[columns[0]]
            if len(columns) == 1:
                cell = {"value": one.value, "stderr": one.stderr}
            else:
                stderr = _stderr(_by_task({c: s.items for c, s in own.items()}), len(own))
                cell = {"value": float(np.mean([s.value for s in own.values()])), "stderr": stderr}
            cell |= {"difference": None, "difference_stderr": None, "within_noise": None}
            if other is not None:
                d = compare(own, {c: self.results[other].scores[c] for c in columns})
                cell |= {"difference": d.value, "difference_stderr": d.stderr, "within_noise": d.within_noise}
            out[name] = cell
        return out

    def table(self) -> pd.DataFrame:
        """One row per model: `run`, `model`, and of each column NAME its value, `NAME_stderr`, `NAME_difference` (from the
        row it is compared with), `NAME_difference_stderr`, `NAME_within_noise`."""
        rows = []
        for i, result in enumerate(self.results):
            row: dict[str, Any] = {"run": result.model.run, "model": result.model.name}
            for name, cell in self.scores(i).items():
                row |= {name if k == "value" else f"{name}_{k}": v for k, v in cell.items()}
            rows.append(row)
        return pd.DataFrame(rows)

    def text(self) -> pd.DataFrame:
        """The table as it is printed: value, standard error, and `~` for a difference that is not significant."""
        rows, titles = [], {f"{task}_{metric}": f"{task} {metric}" for task, metric in self.columns}
        for i, result in enumerate(self.results):
            row = {"run": result.model.run, "model": result.model.name}
            for name, cell in self.scores(i).items():
                shown = f"{cell['value']:.4f}" + ("" if cell["stderr"] is None else f" ± {cell['stderr']:.4f}")
                title = titles.get(name, f"mean of {len(self.averaged)}")
                row[title] = shown + (" ~" if cell["within_noise"] else "")
            rows.append(row)
        frame = pd.DataFrame(rows)
        return frame if frame["run"].nunique() > 1 else frame.drop(columns="run")

    def note(self) -> str:
        """What the mark means, for below the table; "" if nothing is compared."""
        others = dict.fromkeys(self.results[i].model.name for i in self.against if i is not None)
        name = "its base" if len(others) > 1 else next(iter(others), "")
        if not name:
            return ""
        pair = f"{NOISE} standard errors of the paired difference"
        few = f"fewer than {FEWEST} examples differ between the two"
        return f"~ not statistically significant: |difference from {name}| <= {pair}, or {few}"

    def to_dict(self) -> dict[str, Any]:
        """What `eval.json` holds."""
        models = []
        for i, result in enumerate(self.results):
            other = self.against[i]
            about = {"run": result.model.run, "model": result.model.name, "base": result.model.base}
            about |= {"against": None if other is None else self.results[other].model.name, "scores": self.scores(i)}
            models.append({**about, "seconds": round(result.seconds, 1), **result.settings})
        return {"models": models, "noise": self.note(), **self.settings}

    def save(self, out: Path | None = None) -> list[Path]:
        """Write `eval.json` and `eval.csv`; returns their paths.

        Args:
            out: the folder; None: each run's own folder, and `eval/` for models of no run and for several runs together.
        """
        models = [r.model for r in self.results]
        own = {m.home for m in models} if out is None else set()
        places = homes(models, out)
        for place in own & set(places):
            check_own(place)
        return [p for place in places for p in (self._of_run(place) if place in own else self)._write(place)]

    def _write(self, folder: Path) -> list[Path]:
        data = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_atomic(folder / "eval.json", data.encode())
        write_atomic(folder / "eval.csv", self.table().to_csv(index=False, lineterminator="\n").encode())
        return [folder / "eval.json", folder / "eval.csv"]

    def _of_run(self, home: Path) -> Evaluation:
        """The rows of one run, and those that they are compared with."""
        own = [i for i, r in enumerate(self.results) if r.model.home == home]
        kept = sorted({*own, *(self.against[i] for i in own if self.against[i] is not None)})
        against = [kept.index(self.against[i]) if self.against[i] in kept else None for i in kept]
        return Evaluation([self.results[i] for i in kept], against, self.settings)


def homes(models: list[Candidate], out: Path | None = None) -> list[Path]:
    """The folders that scores of these models are saved in: `out`, or as `Evaluation.save` says."""
    if out is not None:
        return [out]
    own = list(dict.fromkeys(m.home for m in models if m.home is not None))
    outside = any(m.home is None and m.folder is not None for m in models)
    return own if len(own) == 1 and not outside else [*own, Path("eval")]


def check_writable(folders: list[Path], key: str) -> None:
    """Whether `eval.json` and `eval.csv` can be written into folders, which need not be there yet.

    Raises:
        UserError: for a file in a folder's place, a folder in a file's, or one that cannot be written to.
    """
    for folder in folders:
        if metrics_files(folder):
            check_own(folder)
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not there.is_dir():
            what = "is" if there == folder else f"lies below {str(there)!r},"
            raise UserError(f"{key}: {str(folder)!r} {what} a file; give a folder")
        taken = [p for p in (folder / "eval.json", folder / "eval.csv") if p.is_dir()]
        if taken:
            raise UserError(
                f"{key}: {str(taken[0])!r} is a folder, where the scores are to be; move it, or give another"
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{key}: {str(there)!r} cannot be written to; give another folder")


def baselines(models: list[Candidate], against: str | None) -> list[int | None] | None:
    """For each row the one it is compared with; None: the best, which is known afterwards.

    Args:
        models: the rows.
        against: base (each row with its own base's), best, the name of a row, or None: base where there is such a row.

    Raises:
        UserError: if there is no such row, or more than one.
    """
    base_rows = {m.base: i for i, m in enumerate(models) if m.folder is None}
    if against == "best" or (against is None and not base_rows):
        return None
    if against in (None, "base") and base_rows:
        return [None if m.folder is None else base_rows.get(m.base) for m in models]
    rows = [i for i, m in enumerate(models) if against in (m.name, f"{m.run}/{m.name}")]
    if len(rows) != 1:
        names = ", ".join(m.name if sum(m.name == o.name for o in models) == 1 else f"{m.run}/{m.name}" for m in models)
        many = "no" if not rows else "more than one"
        raise UserError(f"--against: {against!r} is {many} row; give best or one of: {names}")
    return [None if i == rows[0] else rows[0] for i in range(len(models))]


def scores_of(results: dict[str, Any]) -> dict[Column, Score]:
    """The harness's scores: of tasks, and of groups whose score replaces those of their members."""
    inside = {m for g in results.get("groups", {}) for m in _members(results["group_subtasks"], g)}
    out: dict[Column, Score] = {}
    for task, values in results["results"].items():
        if task in inside:
            continue
        samples = sorted(results["samples"].get(task, []), key=lambda s: s["doc_id"])
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            found = [s.get(metric) for s in samples if s["filter"] == chosen]
            items = None
            if found and all(isinstance(v, (int, float)) for v in found):
                items = np.array(found, dtype=np.float64)
                if not math.isclose(items.mean(), value, rel_tol=1e-9, abs_tol=1e-12):
                    items = None  # aggregated in some other way than by a mean
            name = metric if chosen == "none" else f"{metric}_{chosen}"
            out[task, name] = Score(float(value), stderr if isinstance(stderr, float) else None, items)
    return out


def _members(children: dict[str, list[str]], group: str) -> set[str]:
    found = set(children.get(group, []))
    return found.union(*(_members(children, child) for child in found)) if found else found
