"""The report of a reproduced experiment: figures, published numbers beside ours, verdicts; as Markdown and as HTML.

`build` makes a list of blocks from finished run folders and renders it twice. Text from configs and data is escaped in
both. The HTML is one file: figures inside, no script, no link.
"""

from __future__ import annotations

import base64
import html
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedsim.analysis import plots
from fedsim.analysis.load import SCOPES, load_runs
from fedsim.analysis.scores import central_budget, model_scores
from fedsim.analysis.verdicts import (
    PROPORTIONS,
    TINY,
    FinishedRun,
    Verdict,
    binomial_error,
    check_line,
    format_score,
    inside_rounds,
    judge,
    labels_of,
    load_run,
    ratio_error,
    read_json,
    trained,
)
from fedsim.core.errors import UserError
from fedsim.core.files import write_atomic

DRAWN = ("curves", "each_site")
NOISE = 1.96  # standard errors, as `fedsim eval` marks differences
WHAT = ("merged", "clients", "local_mean", "local_min", "local_max", "local", "central")
LINE_KEYS = ("name", "run", "what", "site", "round", "at", "best", "metric", "value")
SCREEN_DPI = 120  # letters of 9 points in a figure are then as tall as 15 pixels, as the text is
WORDS = {True: "PASSED", False: "FAILED", None: "NOT JUDGED"}
ERRORS = (
    "Ours is the mean over the runs of a line. Standard error: with several runs (seeds) their standard deviation over the "
    "root of their number; with one run that of the score over the validation rows - sqrt(p (1 - p) / n) for a share of "
    "right rows; for the loss at the end the ratio estimator over single rows, where the run keeps them (scores.npz), else "
    "none. A mean over sites or clients has the mean of their standard errors, an upper bound, as all are scored on the "
    "same rows."
)


@dataclass(frozen=True)
class Member:
    """One run of the experiment as it was made.

    `label` is the key by which `published`, `verdicts` and `figures` name it (several seeds share one), `title` what a
    reader sees, `path` the finished run's folder.
    """

    label: str
    title: str
    path: Path


# The blocks of a document: text in them is plain and is escaped when it is rendered.


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the document's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list; each item is a word set in bold (or "") and a text."""

    items: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table; `numbers` are the columns set flush right, `strong` the cells (row, column) set in bold."""

    head: list[str]
    rows: list[list[str]]
    numbers: frozenset[int] = frozenset()
    strong: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A PNG file with its place relative to the document, what it shows in a few words, and its caption."""

    file: Path
    place: str
    shows: str
    caption: str


@dataclass(frozen=True)
class Preformatted:
    """Lines that stand as they are."""

    text: str


@dataclass(frozen=True)
class Notes:
    """Markdown by the experiment's author: in Markdown as it is, in HTML as its escaped source with its line breaks."""

    markdown: str


Block = Heading | Paragraph | Items | Table | Picture | Preformatted | Notes


def build(
    spec: Mapping[str, Any],
    members: Sequence[Member],
    out: Path,
    about: Mapping[str, str],
    unscored: str | None = None,
    formats: Sequence[str] = (),
) -> Path:
    """Write `report.md`, `report.html` and `figures/*.png`.

    A summary and the checks, failed ones first, stand at the top.

    Args:
        spec: the experiment's `reproduce.yaml`, parsed: `title`, `source`, `metric`, `published`, `verdicts`, `figures`,
            `zero_shot`, `messages` and `notes`, see `check`. Lines about a label without a run are printed as such.
        members: the finished runs, in the order in which they are shown.
        out: the folder, made where missing.
        about: lines for the head of the report, such as size, budget and command.
        unscored: why there are no zero-shot scores; None: the run's `eval.json` is looked for.
        formats: of the figures beside PNG, see `fedsim.plots.FORMATS`.

    Returns:
        The path of `report.md`.

    Raises:
        UserError: a wrong line in `spec`, no member, or a run folder that cannot be read.
    """
    check(spec)
    if not members:
        raise UserError("no run to report on: let at least one run of the experiment finish first")
    runs: dict[str, list[FinishedRun]] = {}
    titles: dict[str, str] = {}
    for member in members:
        runs.setdefault(member.label, []).append(load_run(member.path))
        titles.setdefault(member.label, member.title)
    metric = str(spec.get("metric") or "accuracy")
    verdicts = [judge(line, runs, metric) for line in spec.get("verdicts") or []]
    out = Path(out)
    blocks: list[Block] = [Heading(str(spec.get("title", "Report")), 1)]
    if spec.get("source"):
        blocks.append(Paragraph(f"Published in: {spec['source']}"))
    blocks += [Heading("Summary"), *_summary(metric, runs, titles)]
    if verdicts:
        blocks += [Heading("Expected behaviour"), *_judged(verdicts)]
    if facts := [(f"{key}:", str(value)) for key, value in about.items()] + _environment(members):
        blocks += [Heading("Setup"), Items(facts)]
    blocks += _figures(spec, metric, runs, titles, out, ["png", *formats])
    if spec.get("published"):
        blocks += [Heading("Published and ours"), *_published(spec, runs)]
    if spec.get("zero_shot"):
        blocks += [Heading("Zero-shot"), *_zero_shot(spec["zero_shot"], runs, unscored)]
    if spec.get("messages"):
        blocks += [Heading("Size of a message"), *_messages(spec["messages"], runs)]
    blocks += _examples(members[0])
    blocks += [Heading("Runs"), _runs_table(members, runs, out)]
    if str(spec.get("notes") or "").strip():
        blocks += [Heading("Notes"), Notes(str(spec["notes"]).strip())]
    write_atomic(out / "report.html", to_html(blocks).encode())
    write_atomic(out / "report.md", to_markdown(blocks).encode())
    return out / "report.md"


def check(spec: Any, labels: Iterable[str] | None = None) -> None:
    """See that a report's description is one that `build` takes, so that a slip shows before the runs are made.

    Args:
        spec: the parsed YAML. A line of `published` has `name`, `run` (a label) and `what` (one of `WHAT`; `local` with
            `site`); the place by `round` (from 1) or `at` (fraction of the steps), default the end, or `best: true`,
            the best over the run; `metric` in place of the experiment's; `value`, the published number, null if none.
            A line of `verdicts` is one for `fedsim.analysis.verdicts.judge`. A line of `figures` is a label, or `run` (a label)
            with `scopes`, those of its curves that are drawn, `title`, and `draw`: `curves`, or `each_site` for a figure
            of its own with `fedsim.plots.each_site`; default: every label, all scopes, curves. `zero_shot` has `run`,
            `tasks`, `columns` ({task, metric, items}: how many items the published score rests on), `rows` ({name,
            model, published}: a model as `fedsim eval` names it, and a number a column), optionally `limit` (size or
            budget -> items a task, for `fedsim reproduce`) and `against`, pairs of rows whose means are compared.
            `messages` has `run`, the published model's `parameters` and `tensors`, and `forms`: {name, bits} with
            `block` and `table` (elements that share a float32 scale, entries of a float32 code table of each tensor),
            `values` and `scales`, the published MiB.
        labels: the labels that will have runs; None: any label is accepted.

    Raises:
        UserError: a key, value or label that does not fit.
    """
    if not isinstance(spec, Mapping):
        raise UserError(
            f"the report's description holds {type(spec).__name__}, not keys; see experiments/ for examples"
        )
    for key in ("published", "verdicts", "figures"):
        if not isinstance(spec.get(key) or [], list):
            raise UserError(f"{key}: {spec[key]!r} is no list; give one line each")
    for number, line in enumerate(spec.get("published") or []):
        _check_published(line, f"published[{number}]")
    for number, line in enumerate(spec.get("verdicts") or []):
        check_line(line, f"verdicts[{number}]")
    for number, panel in enumerate(spec.get("figures") or []):
        _check_panel(panel, f"figures[{number}]")
    for key, one in (("zero_shot", _check_zero_shot), ("messages", _check_messages)):
        if spec.get(key):
            one(spec[key])
    if labels is None:
        return
    known = list(labels)
    for key in ("zero_shot", "messages"):
        if spec.get(key):
            _known(str(spec[key]["run"]), known, key)
    for key in ("published", "verdicts"):
        for number, line in enumerate(spec.get(key) or []):
            for label in labels_of(line):
                _known(label, known, f"{key}[{number}]")
    for panel in spec.get("figures") or []:
        _known(_panel(panel)[0], known, "figures")


def _known(label: str, known: Sequence[str], where: str) -> None:
    if label not in known:
        raise UserError(f"{where}: no run has the label {label!r}; the labels are {', '.join(known)}")


def _check_published(line: Any, where: str) -> None:
    if not isinstance(line, Mapping):
        raise UserError(f"{where}: {line!r} is no line of the table; give name, run, what and value")
    for key in ("name", "run", "what"):
        if key not in line:
            raise UserError(f"{where}: {key!r} is missing; a line takes {', '.join(LINE_KEYS)}")
    for key in line:
        if key not in LINE_KEYS:
            raise UserError(f"{where}.{key}: no such key; a line takes {', '.join(LINE_KEYS)}")
    if line["what"] not in WHAT:
        raise UserError(f"{where}.what: {line['what']!r} is not known; use one of {', '.join(WHAT)}")
    if (line["what"] == "local") != ("site" in line):
        raise UserError(f"{where}.site: goes with what: local, and only there; name the site or use local_mean")
    if sum(bool(line.get(key)) if key == "best" else key in line for key in ("round", "at", "best")) > 1:
        raise UserError(f"{where}: more than one of round, at and best; give one place")
    place = line.get("round", 1)
    if isinstance(place, bool) or not isinstance(place, int) or place < 1:
        raise UserError(f"{where}.round: {place!r} is no round; rounds are whole numbers from 1")
    for key, low, high in (("at", 0.0, 1.0), ("value", -np.inf, np.inf)):
        value = line.get(key)
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        if not right and (key == "at" or value is not None) and key in line:
            way = "a fraction of the steps, 0 to 1" if key == "at" else "a number, or null where none was published"
            raise UserError(f"{where}.{key}: {value!r} does not fit; give {way}")


def _check_panel(panel: Any, where: str) -> None:
    if isinstance(panel, str):
        return
    if not isinstance(panel, Mapping) or "run" not in panel:
        raise UserError(f"{where}: {panel!r} is no panel; give a label, or run with scopes and title")
    for key in panel:
        if key not in ("run", "scopes", "title", "draw"):
            raise UserError(f"{where}.{key}: no such key; a panel takes run, scopes, title, draw")
    if panel.get("draw", "curves") not in DRAWN:
        raise UserError(f"{where}.draw: {panel['draw']!r} is not known; use one of {', '.join(DRAWN)}")
    scopes = panel.get("scopes", ["local"])
    if not isinstance(scopes, list) or not scopes or not all(scope in SCOPES for scope in scopes):
        raise UserError(f"{where}.scopes: {scopes!r} does not fit; give a list of {', '.join(SCOPES)}")


def _panel(panel: str | Mapping[str, Any]) -> tuple[str, Sequence[str], str | None, str]:
    """A line of `figures`: label, scopes, title (None: the label's), how it is drawn."""
    if isinstance(panel, str):
        return panel, SCOPES, None, "curves"
    return str(panel["run"]), panel.get("scopes", SCOPES), panel.get("title"), panel.get("draw", "curves")


def _check_zero_shot(about: Any) -> None:
    _check_keys(about, "zero_shot", ("run", "tasks", "columns", "rows"), ("limit", "against"))
    _check_lists(about, "zero_shot", ("tasks", "columns", "rows"))
    for number, column in enumerate(about["columns"]):
        where = f"zero_shot.columns[{number}]"
        _check_keys(column, where, ("task", "metric", "items"))
        if column["task"] not in about["tasks"]:
            tasks = ", ".join(map(str, about["tasks"]))
            raise UserError(f"{where}.task: {column['task']!r} is none of the tasks: {tasks}")
        _check_number(column["items"], f"{where}.items", 1.0)
    for number, row in enumerate(about["rows"]):
        where = f"zero_shot.rows[{number}]"
        _check_keys(row, where, ("name", "model", "published"))
        if not isinstance(row["published"], list) or len(row["published"]) != len(about["columns"]):
            way = f"give {len(about['columns'])} numbers, one a column"
            raise UserError(f"{where}.published: {row['published']!r} does not fit; {way}")
        for value in row["published"]:
            _check_number(value, f"{where}.published", 0.0, 1.0)
    for size, most in (about.get("limit") or {}).items():
        _check_number(most, f"zero_shot.limit.{size}", 1.0)
    names = [row["name"] for row in about["rows"]]
    for pair in about.get("against") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not set(pair) <= set(names):
            raise UserError(f"zero_shot.against: {pair!r} is no pair of rows; the rows are {', '.join(names)}")


def _check_messages(about: Any) -> None:
    _check_keys(about, "messages", ("run", "parameters", "tensors", "forms"))
    _check_lists(about, "messages", ("forms",))
    for key in ("parameters", "tensors"):
        _check_number(about[key], f"messages.{key}", 1.0)
    for number, form in enumerate(about["forms"]):
        where = f"messages.forms[{number}]"
        _check_keys(form, where, ("name", "bits", "values"), ("block", "table", "scales"))
        for key in ("bits", "values", "block", "table", "scales"):
            if key in form:
                _check_number(form[key], f"{where}.{key}", 1.0 if key in ("bits", "block") else 0.0)


def _check_lists(about: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> None:
    for key in keys:
        if not isinstance(about[key], list) or not about[key]:
            raise UserError(f"{where}.{key}: {about[key]!r} is no list with something in it; give one line each")


def _check_number(value: Any, where: str, low: float, high: float = np.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        span = f"from {low:g} up" if high == np.inf else f"from {low:g} to {high:g}"
        raise UserError(f"{where}: {value!r} does not fit; give a number {span}")


def _check_keys(value: Any, where: str, needed: tuple[str, ...], known: tuple[str, ...] = ()) -> None:
    takes = f"it takes {', '.join((*needed, *known))}"
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {value!r} holds no keys; {takes}")
    for key in needed:
        if key not in value:
            raise UserError(f"{where}: {key!r} is missing; {takes}")
    for key in value:
        if key not in (*needed, *known):
            raise UserError(f"{where}.{key}: no such key; {takes}")


# ---------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class _Measured:
    """One run's number: value, its standard error over validation rows, where it was taken in rounds (NaN: the best)."""

    value: float
    error: float
    place: float = float("nan")


def published_table(spec: Mapping[str, Any], runs: Mapping[str, Sequence[FinishedRun]]) -> pd.DataFrame:
    """The published numbers beside ours, one row per line of `published`.

    Ours is the mean over the label's runs. No score is interpolated: each curve gives its last point at or before the
    place asked for. `best: true` takes the best of each curve after training began (for `clients` the best round's mean
    before the merge), and then the mean, the lowest or the highest of the sites.

    Returns:
        Columns `name`, `run`, `metric`, `published`, `ours`, `difference` (ours - published), `standard_error`, `runs`
        (that gave a number), `note` ("" or where the number was taken instead).
    """
    table = []
    for line in spec.get("published") or []:
        metric = str(line.get("metric") or spec.get("metric") or "accuracy")
        members = runs.get(str(line["run"])) or []
        measured = [_measure(run, line, metric) for run in members]
        pairs = [(run, one) for run, one in zip(members, measured, strict=True) if one is not None]
        values = np.array([one.value for _, one in pairs])
        count = len(values)
        ours = float(values.mean()) if count else float("nan")
        error = (
            float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else pairs[0][1].error if count else float("nan")
        )
        value = float("nan") if line.get("value") is None else float(line["value"])
        row = {"name": str(line["name"]), "run": str(line["run"]), "metric": metric, "published": value, "ours": ours}
        row |= {"difference": ours - value, "standard_error": error, "runs": count}
        table.append(row | {"note": _note(line, metric, members, pairs)})
    columns = ["name", "run", "metric", "published", "ours", "difference", "standard_error", "runs", "note"]
    return pd.DataFrame(table, columns=columns)


def _measure(run: FinishedRun, line: Mapping[str, Any], metric: str) -> _Measured | None:
    """One run's number for a line; None where it recorded none at or before that place, or has fewer rounds."""
    place = _place(run, line)
    if place > run.rounds + TINY:
        return None
    better = np.argmax if run.sign(metric) > 0 else np.argmin
    if line["what"] == "clients":
        return _clients(run, metric, None if line.get("best") else place, better)
    models = [f"local {site}" for site in run.sites(metric)]
    if line["what"] == "local":
        models = [model for model in models if model == f"local {line['site']}"]
    elif line["what"] in ("merged", "central"):
        models = ["federated" if line["what"] == "merged" else "central"]
    found = []
    for model in models:
        curve = run.curve(model, metric)
        curve = trained(curve) if line.get("best") else curve[curve[:, 0] <= place + TINY]
        if len(curve):
            at = int(better(curve[:, 1])) if line.get("best") else len(curve) - 1
            value = float(curve[at, 1])
            last = curve[at, 0] == run.curve(model, metric)[-1, 0]
            taken = float("nan") if line.get("best") else float(curve[at, 0])
            found.append(_Measured(value, _error(run, model, metric, value, last), taken))
    if not found:
        return None
    values = [one.value for one in found]
    if line["what"] == "local_min":
        return found[int(np.argmin(values))]
    if line["what"] == "local_max":
        return found[int(np.argmax(values))]
    error = float(np.mean([one.error for one in found]))
    return _Measured(float(np.mean(values)), error, float(np.min([one.place for one in found])))


def _clients(
    run: FinishedRun, metric: str, place: float | None, better: Callable[[np.ndarray], Any]
) -> _Measured | None:
    """The mean of the cohort's clients at a place in rounds (r: just before merge r), or, None, at the best merge."""
    points = []  # (position, scores of the clients)
    for number, (at, values) in sorted(inside_rounds(run, metric).items()):
        for position, scores in zip(at, values.T, strict=True):
            if position == number if place is None else position <= place + TINY:
                points.append((float(position), scores))
    if not points:
        return None
    chosen = int(better(np.array([scores.mean() for _, scores in points]))) if place is None else len(points) - 1
    position, scores = points[chosen]
    error = float(np.mean([binomial_error(run, float(score), metric) for score in scores]))
    return _Measured(float(scores.mean()), error, float("nan") if place is None else position)


def _error(run: FinishedRun, model: str, metric: str, value: float, last: bool) -> float:
    """Standard error of one model's score over the validation rows; NaN if not known."""
    if metric == "loss":
        parts = run.scores.parts(model, metric) if run.scores is not None and last else None
        return float("nan") if parts is None else ratio_error(*parts)
    return binomial_error(run, value, metric)


def _place(run: FinishedRun, line: Mapping[str, Any]) -> float:
    """Where a line asks for a number, on the axis of rounds."""
    return float(line["round"]) if "round" in line else float(line.get("at", 1.0)) * run.rounds


def _note(
    line: Mapping[str, Any],
    metric: str,
    members: Sequence[FinishedRun],
    pairs: Sequence[tuple[FinishedRun, _Measured]],
) -> str:
    if not members:
        return f"no finished run {line['run']!r}"
    if not pairs:
        rounds = max(run.rounds for run in members)
        if line.get("round", 0) > rounds:
            return f"the run has {rounds} round{'s' if rounds > 1 else ''}"
        if line["what"] == "local" and line["site"] not in (known := members[0].sites(metric)):
            return f"no site {line['site']!r} with a curve of its own; there are {', '.join(known) or 'none'}"
        return f"no validation {metric} was recorded at or before this place"
    notes = [] if len(pairs) == len(members) else [f"{len(members) - len(pairs)} of {len(members)} runs gave no number"]
    apart = [(_place(run, line) - one.place, run, one) for run, one in pairs if np.isfinite(one.place)]
    gap, run, one = max(apart, key=lambda entry: entry[0], default=(0.0, None, None))
    if run is not None and one is not None and gap > 1e-6:
        asked = f"after round {line['round']}" if "round" in line else f"at {_percent(_place(run, line) / run.rounds)}"
        notes.append(
            f"asked for {asked}, taken at {_percent(one.place / run.rounds)} of the steps, the last score before"
        )
    return "; ".join(notes)


def _percent(part: float) -> str:
    return f"{100 * part:.3g} %"


def _published(spec: Mapping[str, Any], runs: Mapping[str, Sequence[FinishedRun]]) -> list[Block]:
    table = published_table(spec, runs)
    several = table["run"].nunique() > 1
    main = str(spec.get("metric") or "accuracy")
    rows, notes = [], []
    for row in table.itertuples():
        name = row.name + (f", {row.metric}" if row.metric != main and row.metric not in row.name else "")
        if row.note:
            notes.append((f"{len(notes) + 1}:", row.note))
            name += f" ({len(notes)})"
        cells = [row.run] if several else []
        as_given = row.metric not in PROPORTIONS and np.isfinite(row.published)
        cells += [name, _as_given(row.published) if as_given else format_score(row.published, row.metric)]
        cells += [format_score(row.ours, row.metric), format_score(row.difference, row.metric, sign=True)]
        cells += [format_score(row.standard_error, row.metric)]
        rows.append([*cells, str(row.runs)])
    head = [*(["run"] if several else []), "", "published", "ours", "difference", "standard error", "runs"]
    numbers = frozenset(range(len(head) - 5, len(head)))
    what = f"Validation {main}{'' if (table['metric'] == main).all() else ', where a line names no other metric'}. "
    blocks: list[Block] = [Table(head, rows, numbers)]
    if notes:
        blocks.append(Items(notes))
    return [*blocks, Paragraph(what + ERRORS)]


def _summary(metric: str, runs: Mapping[str, Sequence[FinishedRun]], titles: Mapping[str, str]) -> list[Block]:
    """Last validation scores of each setting: local models' mean, federated and centralized, means over runs."""
    names = {"local": "local, mean of clients", "federated": "federated", "central": "centralized"}
    recorded = {str(name) for found in runs.values() for run in found for name in run.rows["name"].unique()}
    rows = []
    for label, found in runs.items():
        for name in dict.fromkeys((metric, *(extra for extra in ("macro_f1", "perplexity") if extra in recorded))):
            tables = [pd.DataFrame(model_scores(run.rows, name)) for run in found if (run.rows["name"] == name).any()]
            if not tables:
                continue
            means = pd.concat([table.groupby("scope")["last"].mean() for table in tables], axis=1).mean(axis=1)
            cells = [format_score(float(means.get(scope, np.nan)), name) for scope in names]
            budget = central_budget(found[0].rows["central.match"].unique()) if "central.match" in found[0].rows else ""
            rows.append([titles[label], name, *cells, budget if "central" in means else "", str(len(tables))])
    head = ["setting", "metric", *names.values(), "centralized has", "runs"]
    return [Table(head, rows, frozenset({2, 3, 4, 6})), Paragraph("Validation scores of the last models.")]


def _as_given(value: float) -> str:
    """A published value, no more exact than it was given; 2.00 is 2.0 once it is read."""
    text = f"{value:g}"
    return f"{value:.2f}" if abs(value) < 10 and len(text.partition(".")[2]) < 2 else text


def _judged(verdicts: Sequence[Verdict]) -> list[Block]:
    counts = [(word, sum(one.passed is passed for one in verdicts)) for passed, word in WORDS.items()]
    in_order = sorted(verdicts, key=lambda one: [False, None, True].index(one.passed))
    items = [(WORDS[one.passed], f"{one.name}. Expected: {one.demanded}. Observed: {one.seen}.") for one in in_order]
    return [Paragraph(", ".join(f"{count} {word}" for word, count in counts) + "."), Items(items)]


# --------------------------------------------------------------------------------- zero-shot scores and messages


@dataclass(frozen=True)
class _Cell:
    """A score, its standard error, and whether it differs from the base model's by no more than noise (None: no base)."""

    value: float
    error: float
    noise: bool | None = None


def zero_shot_file(run: Path) -> dict[str, Any] | None:
    """What `fedsim eval` wrote for a run: `models` with `model` (its name) and `scores`, `tasks` with `items`; None if nothing.

    `scores` has under TASK_METRIC `value` and `stderr`, and of the comparison with the base `difference`,
    `difference_stderr` and `within_noise`.

    Raises:
        UserError: the file is not that.
    """
    file = Path(run) / "eval.json"
    found = read_json(file)
    if found is None:
        return None
    try:
        named = all("model" in one and isinstance(one["scores"], dict) for one in found["models"])
    except (KeyError, TypeError):
        named = False
    if not named:
        raise UserError(f"{file}: not the scores of fedsim eval; delete it or score the run again")
    return found


def _zero_shot(
    about: Mapping[str, Any], runs: Mapping[str, Sequence[FinishedRun]], unscored: str | None
) -> list[Block]:
    """Table 1 of the published kind: a row a model, published above ours, with standard errors and what is inside the noise."""
    columns, members = about["columns"], runs.get(str(about["run"])) or []
    found = zero_shot_file(members[0].path) if members and unscored is None else None
    tasks = list(dict.fromkeys(column["task"] for column in columns))
    names = [f"{column['task']} {column['metric']}" for column in columns]
    base = next((row for row in about["rows"] if row["model"] == "base"), None)
    first = _published_cells(base["published"], columns) if base else None
    rows, means = [], {}
    for row in about["rows"]:
        published = _published_cells(row["published"], columns, first if row is not base else None)
        ours = _own_cells(found, row["model"], columns) if found else None
        means[row["name"]] = (published[-1], ours[-1] if ours else None)
        rows.append([row["name"], "published", *map(_score_text, published)])
        if found:
            rows.append(["", "ours", *(map(_score_text, ours) if ours else ["-"] * (len(columns) + 1))])
    blocks: list[Block] = []
    if found is None:
        first_run = members[0].path if members else "RUN"
        why = unscored or f"no eval.json in the run; make it with: fedsim eval {first_run} --tasks {','.join(tasks)}"
        blocks.append(Paragraph(f"Ours: not scored ({why})."))
    blocks.append(Table(["model", "", *names, f"mean of {len(columns)}"], rows, frozenset(range(2, len(columns) + 3))))
    for one, other in about.get("against") or []:
        parts = [
            f"{whose} {_apart(a, b)}"
            for whose, a, b in zip(("published", "ours"), means[one], means[other], strict=True)
            if a is not None and b is not None
        ]
        if parts:
            blocks.append(Paragraph(f"{one} less {other}, mean of {len(columns)}: {'; '.join(parts)}."))
    text = (
        f"Score, standard error; ~ after it: differs from the base model by no more than {NOISE} standard errors of the "
        "difference. Published standard errors are sqrt(p (1 - p) / n), their differences those of unlike items, an upper "
        "bound, as all models answer the same ones; in the mean, metrics of one task count as one."
    )
    if found:
        text += " Ours are paired item by item, but between two trained models, where they too are the upper bound."
        text += _items_said(found, tasks)
    return [*blocks, Paragraph(text)]


def _published_cells(
    values: Sequence[float], columns: Sequence[Mapping[str, Any]], base: Sequence[_Cell] | None = None
) -> list[_Cell]:
    """The columns' cells and that of their mean, with binomial standard errors."""
    errors = [np.sqrt(v * (1.0 - v) / c["items"]) for v, c in zip(values, columns, strict=True)]
    cells = [_Cell(float(v), float(e)) for v, e in zip(values, errors, strict=True)]
    cells.append(_Cell(float(np.mean(values)), _error_of_mean(errors, columns)))
    if base is None:
        return cells
    return [_Cell(one.value, one.error, _is_noise(one, other)) for one, other in zip(cells, base, strict=True)]


def _error_of_mean(errors: Sequence[float], columns: Sequence[Mapping[str, Any]]) -> float:
    """Of the mean over columns: those of a task rest on the same items and are added, tasks are independent."""
    by_task: dict[str, float] = {}
    for error, column in zip(errors, columns, strict=True):
        by_task[column["task"]] = by_task.get(column["task"], 0.0) + float(error)
    return float(np.sqrt(sum(value**2 for value in by_task.values())) / len(columns))


def _own_cells(found: Mapping[str, Any], model: str, columns: Sequence[Mapping[str, Any]]) -> list[_Cell] | None:
    """A model's cells by `fedsim eval`; None where it has no score in one of the columns."""
    scores = next((one["scores"] for one in found["models"] if one["model"] == model), {})
    keys = [f"{column['task']}_{column['metric']}" for column in columns]
    if not all(key in scores for key in keys):
        return None
    cells = [_own_cell(scores[key]) for key in keys]
    if "mean" in scores and len(scores) == len(keys) + 1:  # of these columns and no other
        return [*cells, _own_cell(scores["mean"])]
    errors = [cell.error for cell in cells]
    return [*cells, _Cell(float(np.mean([cell.value for cell in cells])), _error_of_mean(errors, columns))]


def _own_cell(score: Mapping[str, Any]) -> _Cell:
    error = score.get("stderr")
    return _Cell(float(score["value"]), float("nan") if error is None else float(error), score.get("within_noise"))


def _is_noise(one: _Cell, other: _Cell) -> bool:
    return not abs(one.value - other.value) > NOISE * np.hypot(one.error, other.error)


def _apart(one: _Cell, other: _Cell) -> str:
    error = np.hypot(one.error, other.error)
    said = "inside the noise" if _is_noise(one, other) else "more than noise"
    return f"{one.value - other.value:+.3f}, standard error {'not known' if np.isnan(error) else f'at most {error:.3f}'}, {said}"


def _score_text(cell: _Cell) -> str:
    error = "" if np.isnan(cell.error) else f" \N{PLUS-MINUS SIGN} {cell.error:.3f}"
    return f"{cell.value:.3f}{error}{' ~' if cell.noise else ''}"


def _items_said(found: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """How many items ours rest on."""
    about = found.get("tasks") or {}
    said = [
        f"{task} {about[task]['items']} of {about[task]['of']}" for task in tasks if "of" in (about.get(task) or {})
    ]
    return f" Items of ours: {', '.join(said)}." if said else ""


def _messages(about: Mapping[str, Any], runs: Mapping[str, Sequence[FinishedRun]]) -> list[Block]:
    """What a whole model weighs in each form: published, by arithmetic, and of our model."""
    members = runs.get(str(about["run"])) or []
    model = (read_json(members[0].path / "model.json") or {}) if members else {}
    trained_here = int(model.get("trained") or 0)
    tensors = model.get("tensors")
    rows = []
    for form in about["forms"]:
        theirs = message_mib(int(about["parameters"]), int(about["tensors"]), form)
        row = [form["name"], _mib(float(form["values"]), float(form.get("scales") or 0.0)), _mib(*theirs)]
        rows.append([*row, _mib(*message_mib(trained_here, int(tensors or 0), form)) if trained_here else "-"])
    head = ["form", "published", f"{about['parameters'] / 1e6:,.1f}M parameters", f"ours, {trained_here / 1e6:,.1f}M"]
    text = "MiB of one message, values + scales, by arithmetic: elements x width, a float32 scale a block, a code table a tensor."
    if trained_here and tensors is None and any(form.get("table") for form in about["forms"]):
        text += " Ours without the code tables: the run does not say how many tensors there are."
    if sent := _recorded_mib(members):
        text += f" Recorded in our run: {sent}."
    return [Table(head, rows, frozenset({1, 2, 3})), Paragraph(text)]


def message_mib(parameters: int, tensors: int, form: Mapping[str, Any]) -> tuple[float, float]:
    """MiB of one message: values, and scales with code tables.

    Args:
        parameters: elements, those of shared tensors once.
        tensors: how many tensors they lie in.
        form: `bits` of an element; `block`, elements that share a float32 scale; `table`, float32 entries of the code
            table that goes with each tensor.
    """
    scales = 4 * parameters / form["block"] if form.get("block") else 0.0
    return parameters * form["bits"] / 8 / 2**20, (scales + 4 * tensors * form.get("table", 0)) / 2**20


def _mib(*parts: float) -> str:
    """`1,353 + 1.6`; what is 0 is left out."""
    shown = [part for part in parts if part] or [0.0]
    return " + ".join(f"{part:,.0f}" if part >= 100 else f"{part:.3g}" for part in shown)


def _recorded_mib(members: Sequence[FinishedRun]) -> str:
    """The bytes of a client and round that the run recorded, by direction."""
    if not members:
        return ""
    rows, parts = members[0].rows, []
    rows = rows[(rows["scope"] == "federated") & (rows["round"] > 0)]
    for name, way in (("bytes_up", "up"), ("bytes_down", "down")):
        sent = rows.loc[rows["name"] == name, "value"].dropna()
        if len(sent):
            parts.append(f"{sent.iloc[-1] / 2**20:,.4g} MiB {way}")
    return f"{' and '.join(parts)} for a client and round" if parts else ""


# -------------------------------------------------------------------------------------- figures, runs, examples


def _figures(
    spec: Mapping[str, Any],
    metric: str,
    runs: Mapping[str, Sequence[FinishedRun]],
    titles: Mapping[str, str],
    out: Path,
    formats: Sequence[str],
) -> list[Block]:
    """Curves, up to four panels in one figure or else three a figure, and each different partition once."""
    wanted = [_panel(panel) for panel in spec.get("figures") or runs]
    drawn: list[tuple[str, str, pd.DataFrame]] = []  # label, title, rows
    missing: list[str] = []
    alone: list[tuple[str, str, pd.DataFrame]] = []  # the same, of panels that are figures of their own
    for label, scopes, title, how in wanted:
        rows = _together(runs[label]) if label in runs else None
        rows = None if rows is None else rows[rows["scope"].isin(scopes)]
        if rows is None or not ((rows["split"] == "validation") & (rows["name"] == metric)).any():
            missing.append(title or label)
        else:
            (drawn if how == "curves" else alone).append((label, title or titles[label], rows))
    blocks: list[Block] = [Heading("Figures")]
    for number, (label, title, rows) in enumerate(alone, start=1):
        with matplotlib.rc_context(plots.STYLE):
            figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
            plots.each_site(rows, figure.add_subplot(), metric).set_title(textwrap.fill(title, 60))
        name = f"{_file_name(metric)}-sites{f'-{number}' if len(alone) > 1 else ''}"
        over = f" Means over {len(runs[label])} runs." if len(runs[label]) > 1 else ""
        caption = f"{title}.{over} Thin, from dot to dot: each client in the colour of its site."
        blocks.append(_save(figure, out, name, formats, f"Validation {metric}, each site alone", caption))
    each = 4 if len(drawn) <= 4 else 3
    parts = [drawn[at : at + each] for at in range(0, len(drawn), each)]
    for number, part in enumerate(parts, start=1):
        figure = plots.panels([(title, rows) for _, title, rows in part], metric)
        name = f"{_file_name(metric)}{f'-{number}' if len(parts) > 1 else ''}"
        whose = "; ".join(dict.fromkeys(title for _, title, _ in part))
        seeds = max(len(runs[label]) for label, _, _ in part)
        over = f" Means and ranges of {seeds} runs where there are several." if seeds > 1 else ""
        blocks.append(_save(figure, out, name, formats, f"Validation {metric}", f"{whose}.{over}"))
    if missing:
        blocks.append(Paragraph(f"Not drawn, without a finished run or its validation {metric}: {', '.join(missing)}."))
    partitions: dict[str, list[str]] = {}
    for label in dict.fromkeys(label for label, *_ in wanted):
        report = runs[label][0].partition if label in runs else None
        if report and report.get("class_counts"):
            partitions.setdefault(str(report["class_counts"]), []).append(label)
    for number, labels in enumerate(partitions.values(), start=1):
        report = runs[labels[0]][0].partition
        with matplotlib.rc_context(plots.STYLE):
            height = min(1.5 + 0.27 * len(report["class_counts"]), 5.5)
            figure = Figure(figsize=(plots.WIDTH, height), layout="constrained")
            plots.partition(report, figure.add_subplot())
        caption = f"{'; '.join(titles[label] for label in labels)}."
        if any(_partitions(runs[label]) > 1 for label in labels):
            caption += f" Drawn by seed {runs[labels[0]][0].seed}; other seeds draw other rows."
        name = f"partition{f'-{number}' if len(partitions) > 1 else ''}"
        blocks.append(_save(figure, out, name, formats, "Training rows per client and class", caption))
    return blocks if len(blocks) > 1 else []


def _together(members: Sequence[FinishedRun]) -> pd.DataFrame:
    """Rows of a label's runs in one table; copies of one run in several folders stay apart."""
    if len(members) == 1:
        return members[0].rows
    return load_runs([run.path for run in members])


def _partitions(members: Sequence[FinishedRun]) -> int:
    return len({str((run.partition or {}).get("class_counts")) for run in members})


def _save(figure: Figure, out: Path, name: str, formats: Sequence[str], shows: str, caption: str) -> Picture:
    file, *_ = plots.save_figure(figure, out / "figures" / name, formats)
    return Picture(file, f"figures/{file.name}", shows, f"{shows}: {caption}")


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "_", text)


def _environment(members: Sequence[Member]) -> list[tuple[str, str]]:
    """What the runs ran on; where they differ, each different value."""
    found = [about for member in members if (about := read_json(member.path / "environment.json"))]
    status = [read_json(member.path / "status.json") or {} for member in members]
    seconds = [float(one["seconds"]) for one in status if one.get("seconds") is not None]

    def each(value: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(dict.fromkeys(text for about in found if (text := value(about))))

    def commit(about: dict[str, Any]) -> str:
        return f"{about['commit'][:12]}{', with changes' if about.get('dirty') else ''}" if about.get("commit") else ""

    def machine(about: dict[str, Any]) -> str:
        gpus = about.get("gpus") or []
        parts = [", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus))]
        parts.append(f"{about.get('cpu', 'CPU')}, {about.get('cores', '?')} cores")
        parts.append(f"devices {', '.join(about['devices'])}" if about.get("devices") else "")
        return "; ".join(part for part in parts if part)

    def versions(about: dict[str, Any]) -> str:
        names = {"python": about.get("python"), **(about.get("versions") or {})}
        shown = ("python", "torch", "transformers", "peft")
        return ", ".join(f"{name} {names[name]}" for name in shown if names.get(name))

    lines = [("commit:", each(commit)), ("machine:", each(machine)), ("versions:", each(versions))]
    if seconds:
        one = f" for {len(seconds)} runs, {_duration(min(seconds))} to {_duration(max(seconds))} each"
        lines.append(("time:", _duration(sum(seconds)) + (one if len(seconds) > 1 else "")))
    return [line for line in lines if line[1]]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _runs_table(members: Sequence[Member], runs: Mapping[str, Sequence[FinishedRun]], out: Path) -> Table:
    rows = []
    for label, found in runs.items():
        own = [member for member in members if member.label == label]
        for member, run in zip(own, found, strict=True):
            status = read_json(member.path / "status.json") or {}
            seconds = status.get("seconds")
            place = Path(os.path.relpath(member.path, out)).as_posix()
            rows.append(
                [label, member.title, "-" if run.seed is None else str(run.seed), str(status.get("state", "-"))]
            )
            rows[-1] += ["-" if seconds is None else f"{seconds:,.0f}", member.path.resolve().name, place]
    head = ["label", "title", "seed", "state", "seconds", "run", "folder, from here"]
    return Table(head, rows, frozenset({2, 4}))


def _examples(member: Member) -> list[Block]:
    """A run's `figures/examples.md` as a table; as plain lines where it is not the table that a run writes."""
    file = member.path / "figures" / "examples.md"
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    lines = text.split("\n")
    table = [_cells(line) for line in lines if line.startswith("|")]
    after = [line for line in lines if line.strip() and not line.startswith("|")]
    blocks: list[Block] = [Heading(f"Examples: {member.title}")]
    if len(table) < 3 or len({len(row) for row in table}) != 1 or len(table[0]) < 3:
        return [*blocks, Preformatted(text)]
    head, rows = table[0], table[2:]
    wrong = {
        (i, j)
        for i, row in enumerate(rows)
        for j, cell in enumerate(row)
        if j >= 2 and len(cell) > 4 and cell.startswith("**") and cell.endswith("**")
    }
    plain = [[cell[2:-2] if (i, j) in wrong else cell for j, cell in enumerate(row)] for i, row in enumerate(rows)]
    return [*blocks, Table(head, plain, strong=frozenset(wrong)), *(Paragraph(line) for line in after)]


def _cells(line: str) -> list[str]:
    parts = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
    return [part.strip().replace("\\|", "|") for part in parts]


# -------------------------------------------------------------------------------------------------- rendering

# Control characters, those that turn the direction of writing, and halves of pairs that no file can hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_TIGHT_FROM = 100  # characters of a row, at the widest of each column; a page has room for about so many
STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
h1, h2, li, p, figcaption { overflow-wrap: anywhere; } td { overflow-wrap: break-word; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
.long { min-width: 12rem; } .tight { font-size: 0.78rem; } .tight th, .tight td { padding: 0.25rem 0.3rem; }
th { border-bottom: 2px solid #999; } .number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { font-size: 0.9rem; color: #444; }
li { margin: 0.3rem 0; } .passed { color: #00614d; } .failed { color: #fff; background: #b00020; padding: 0 0.3rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.85rem; background: #f5f5f5; padding: 0.7rem; }
@media print { body { max-width: none; padding: 0; } figure, tr, li { break-inside: avoid; } h2 { break-after: avoid; }
  .wide { overflow: visible; } .failed { color: #000; background: none; border: 2px solid #000; } }
""".strip()


def to_markdown(blocks: Sequence[Block]) -> str:
    """The document as Markdown, GitHub's flavour."""
    return "\n\n".join(filter(None, map(_block_markdown, blocks))) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """The document as one HTML file: style and figures inside, no script, no link; its title is the first heading."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    body = "\n".join(map(_block_html, blocks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text_html(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _block_markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_text_markdown(text)}"
        case Paragraph(text):
            return _line_markdown(text)
        case Items(items):
            return "\n".join(
                f"- **{_text_markdown(lead)}** {_text_markdown(text)}" if lead else f"- {_line_markdown(text)}"
                for lead, text in items
            )
        case Table(head, rows, numbers, strong):
            rule = ["---:" if column in numbers else "---" for column in range(len(head))]
            cells = [
                [f"**{_text_markdown(c)}**" if (i, j) in strong else _text_markdown(c) for j, c in enumerate(row)]
                for i, row in enumerate(rows)
            ]
            return "\n".join(f"| {' | '.join(row)} |" for row in [[*map(_text_markdown, head)], rule, *cells])
        case Picture(_, place, shows, caption):
            return f"![{_text_markdown(shows)}]({place})\n\n*{_text_markdown(caption)}*"
        case Preformatted(text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}\n{_lines(text)}\n{fence}"
        case Notes(markdown):
            return markdown


def _block_html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_text_html(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_text_html(text)}</p>"
        case Items(items):
            return (
                "<ul>\n"
                + "\n".join(f"<li>{_lead_html(lead)}{_text_html(text)}</li>" for lead, text in items)
                + "\n</ul>"
            )
        case Table(head, rows, numbers, strong):
            long = [max((len(row[column]) for row in rows), default=0) > 24 for column in range(len(head))]
            names = ["number" if column in numbers else "long" if long[column] else "" for column in range(len(head))]
            kind = [f' class="{name}"' if name else "" for name in names]
            top = "".join(f"<th{k}>{_text_html(c)}</th>" for k, c in zip(kind, head, strict=True))
            body = ""
            for i, row in enumerate(rows):
                cells = [f"<b>{_text_html(c)}</b>" if (i, j) in strong else _text_html(c) for j, c in enumerate(row)]
                body += "<tr>" + "".join(f"<td{k}>{c}</td>" for k, c in zip(kind, cells, strict=True)) + "</tr>\n"
            room = sum(max(len(row[column]) for row in [head, *rows]) for column in range(len(head)))
            tight = ' class="tight"' if room > _TIGHT_FROM else ""
            return f'<div class="wide"><table{tight}>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>'
        case Picture(file, _, shows, caption):
            data = file.read_bytes()
            wide = round(int.from_bytes(data[16:20], "big") * SCREEN_DPI / plots.DPI)  # PNG: its width stands there
            source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
            image = f'<img src="{source}" width="{wide}" alt="{_text_html(shows)}">'
            return f"<figure>{image}<figcaption>{_text_html(caption)}</figcaption></figure>"
        case Preformatted(text) | Notes(text):
            return f"<pre>{html.escape(_lines(text))}</pre>"


def _lead_html(lead: str) -> str:
    known = {WORDS[True]: ' class="passed"', WORDS[False]: ' class="failed"'}
    return f"<strong{known.get(lead, '')}>{_text_html(lead)}</strong> " if lead else ""


def _plain(text: str) -> str:
    """Text on one line, without characters that no document should hold."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))


def _lines(text: str) -> str:
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))


def _text_html(text: str) -> str:
    return html.escape(_plain(text))


def _text_markdown(text: str) -> str:
    """Text inside a line of Markdown, with everything escaped that would be more than text."""
    text = re.sub(r"([\\`*\[\]<>|~&$#])", r"\\\1", _plain(text))
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it is no mark
    return text.replace("://", "\\://").replace("www.", "www\\.").replace("@", "\\@")  # no links from bare addresses


def _line_markdown(text: str) -> str:
    """The same at the start of a line, where further signs would open a list, a rule or a heading."""
    text = re.sub(r"^([-+=])", r"\\\1", _text_markdown(text))
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", text)
