"""The report of a reproduced experiment: figures, published numbers beside ours, checks; as Markdown and as HTML.

`build` reads finished run folders and fills the template `assets/report.md.jinja`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.analysis.documents import render
from fedsim.analysis.finished import format_score, load_run, read_json
from fedsim.analysis.published import published_part
from fedsim.analysis.published_scores import NOISE, messages_part, zero_shot_part
from fedsim.analysis.report_figures import RunGroup, draw_figures
from fedsim.analysis.report_spec import Report
from fedsim.analysis.scores import central_budget, model_scores
from fedsim.analysis.tables import Table
from fedsim.analysis.verdicts import judge
from fedsim.core.errors import Notice, UserError
from fedsim.core.files import write_atomic

WORDS = {False: "FAILED", None: "NOT JUDGED", True: "PASSED"}  # failed checks come first


@dataclass(frozen=True)
class Member:
    """One run of the experiment as it was made.

    `label` is the key by which `published`, `verdicts` and `figures` name it (several seeds share one), `title` what a
    reader sees, `path` the finished run's folder.
    """

    label: str
    title: str
    path: Path


def build(
    report: Report,
    members: Sequence[Member],
    out: Path,
    about: Mapping[str, str],
    unscored: str | None = None,
    formats: Sequence[str] = (),
) -> Path:
    """Write `report.md`, `report.html` and `figures/*.png`.

    A summary and the checks, failed ones first, stand at the top.

    Args:
        report: what is shown. Lines about a label without a run are printed as such.
        members: the finished runs, in the order in which they are shown.
        out: the folder, made where missing.
        about: lines for the setup, such as size, budget and command.
        unscored: why there are no zero-shot scores; None: the run's `eval.json` is looked for.
        formats: of the figures beside PNG, see `fedsim.plots.FORMATS`.

    Returns:
        The path of `report.md`.

    Raises:
        UserError: no member, or a run folder that cannot be read.
    """
    if not members:
        raise UserError("no run to report on: let at least one run of the experiment finish first")
    groups: dict[str, RunGroup] = {}
    for member in members:
        groups.setdefault(member.label, RunGroup(member.label, member.title, [])).runs.append(load_run(member.path))
    runs, out = {label: group.runs for label, group in groups.items()}, Path(out)
    verdicts = [judge(line, runs, report.metric) for line in report.verdicts]
    counts = [f"{sum(one.passed is passed for one in verdicts)} {WORDS[passed]}" for passed in (True, False, None)]
    figures, missing = draw_figures(report, groups, out, ["png", *formats])
    markdown, page = render(
        "report",
        {figure.place: figure.file for figure in figures},
        title=report.title,
        source=report.source,
        metric=report.metric,
        summary=_summary(report.metric, groups),
        verdicts=sorted(verdicts, key=lambda one: [*WORDS].index(one.passed)),
        counts=", ".join(counts),
        words=WORDS,
        setup={**about, **environment_of([member.path for member in members])},
        figures=figures,
        missing=missing,
        published=published_part(report, runs) if report.published else None,
        zero_shot=zero_shot_part(report.zero_shot, runs, unscored) if report.zero_shot else None,
        noise=NOISE,
        messages=messages_part(report.messages, runs) if report.messages else None,
        examples=_examples(members[0]),
        runs=_runs_table(groups.values(), out),
        notes=report.notes.strip(),
    )
    write_atomic(out / "report.html", page.encode())
    write_atomic(out / "report.md", markdown.encode())
    return out / "report.md"


def _summary(metric: str, groups: Mapping[str, RunGroup]) -> Table:
    """Last validation scores of each setting: mean of the local-only models, federated and centralized, means over runs."""
    names = {"local": "local-only, mean of clients", "federated": "federated", "central": "centralized"}
    every = [run.metrics for group in groups.values() for run in group.runs]
    recorded = {str(name) for metrics in every for name in metrics["name"].unique()}
    rows = []
    for group in groups.values():
        for name in dict.fromkeys((metric, *(extra for extra in ("macro_f1", "perplexity") if extra in recorded))):
            found = [run.metrics for run in group.runs if (run.metrics["name"] == name).any()]
            if not found:
                continue
            tables = [model_scores(metrics, name).groupby("scope")["last"].mean() for metrics in found]
            means = pd.concat(tables, axis=1).mean(axis=1)
            cells = [format_score(float(means.get(scope, np.nan)), name) for scope in names]
            match = group.runs[0].metrics.get("central.match")
            budget = central_budget(match.unique()) if match is not None and "central" in means else ""
            rows.append([group.title, name, *cells, budget, str(len(found))])
    return Table(["setting", "metric", *names.values(), "centralized has", "runs"], rows, (2, 3, 4, 6))


def environment_of(runs: Iterable[Path]) -> dict[str, str]:
    """What runs ran on; where they differ, each different value."""
    runs = list(runs)
    found = [about for run in runs if (about := _readable(run / "environment.json"))]
    status = [_readable(run / "status.json") for run in runs]
    seconds = [float(one["seconds"]) for one in status if one.get("seconds") is not None]

    def commit(about: dict[str, Any]) -> str:
        return f"{about['commit'][:12]}{', with changes' if about.get('dirty') else ''}" if about.get("commit") else ""

    def machine(about: dict[str, Any]) -> str:
        gpus = about.get("gpus") or []
        parts = [", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus))]
        parts.append(f"{about.get('cpu', 'CPU')}, {about.get('cores', '?')} cores")
        parts.append(f"devices {', '.join(about['devices'])}" if about.get("devices") else "")
        return "; ".join(filter(None, parts))

    def versions(about: dict[str, Any]) -> str:
        names = {"python": about.get("python"), **(about.get("versions") or {})}
        return ", ".join(f"{n} {names[n]}" for n in ("python", "torch", "transformers", "peft") if names.get(n))

    out = {
        one.__name__: " / ".join(dict.fromkeys(filter(None, map(one, found)))) for one in (commit, machine, versions)
    }
    if seconds:
        each = f" for {len(seconds)} runs, {_duration(min(seconds))} to {_duration(max(seconds))} each"
        out["time"] = _duration(sum(seconds)) + (each if len(seconds) > 1 else "")
    return {key: value for key, value in out.items() if value}


def _readable(file: Path) -> dict[str, Any]:
    """What a file about a run holds; nothing, and a warning, where it is damaged."""
    try:
        return read_json(file)
    except UserError as error:
        warnings.warn(str(error), Notice, stacklevel=2)
        return {}


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _runs_table(groups: Iterable[RunGroup], out: Path) -> Table:
    rows = []
    for group, run in [(one, run) for one in groups for run in one.runs]:
        status = read_json(run.path / "status.json")
        seconds = "-" if status.get("seconds") is None else f"{status['seconds']:,.0f}"
        rows.append([group.label, group.title, "-" if run.seed is None else str(run.seed), status.get("state", "-")])
        rows[-1] += [seconds, run.path.resolve().name, Path(os.path.relpath(run.path, out)).as_posix()]
    return Table(["label", "title", "seed", "state", "seconds", "run", "path"], rows, (2, 4))


def _examples(member: Member) -> dict[str, Any] | None:
    """A run's `figures/examples.md`: its table, or its plain lines where it is not the table that a run writes."""
    file = member.path / "figures" / "examples.md"
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    table = [_cells(line) for line in text.split("\n") if line.startswith("|")]
    after = [line for line in text.split("\n") if line.strip() and not line.startswith("|")]
    out = {"title": member.title, "text": text, "table": None, "after": after}
    if len(table) < 3 or len({len(row) for row in table}) != 1 or len(table[0]) < 3:
        return out
    # The first two columns are text of the data, in which the marks of bold text are text.
    places = [(i, j) for i, row in enumerate(table[2:]) for j in range(2, len(row))]
    wrong = {(i, j) for i, j in places if re.fullmatch(r"\*\*.+\*\*", table[2:][i][j])}
    rows = [[cell[2:-2] if (i, j) in wrong else cell for j, cell in enumerate(row)] for i, row in enumerate(table[2:])]
    return {**out, "table": Table(table[0], rows, strong=wrong)}


def _cells(line: str) -> list[str]:
    parts = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
    return [part.strip().replace("\\|", "|") for part in parts]
