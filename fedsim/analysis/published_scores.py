"""Published zero-shot scores and message sizes beside ours: `zero_shot` and `messages` in an experiment's `reproduce.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.analysis.finished import FinishedRun, Runs, read_json
from fedsim.analysis.report_spec import Column, Form, Messages, ZeroShot
from fedsim.analysis.tables import Table
from fedsim.core.errors import UserError

NOISE = 1.96  # standard errors, as `fedsim eval` marks differences


@dataclass(frozen=True)
class _Scores:
    """A model's scores and their mean, float64 [columns + 1], with standard errors (NaN: not known).

    `noise` says of each whether the difference from the base model is not significant.
    """

    values: np.ndarray
    errors: np.ndarray
    noise: np.ndarray

    def cells(self) -> list[str]:
        parts = zip(self.values, self.errors, self.noise, strict=True)
        return [f"{v:.3f}{'' if np.isnan(e) else f' ± {e:.3f}'}{' ~' if near else ''}" for v, e, near in parts]


def zero_shot_file(run: Path) -> dict[str, Any]:
    """What `fedsim eval` wrote for a run: `models` with `model` (its name) and `scores`, `tasks` with `items`; {} if nothing.

    `scores` has under TASK_METRIC `value` and `stderr`, and of the comparison with the base `difference`,
    `difference_stderr` and `within_noise`.

    Raises:
        UserError: the file is not that.
    """
    file = Path(run) / "eval.json"
    found = read_json(file)
    try:
        named = not file.exists() or all("model" in one and isinstance(one["scores"], dict) for one in found["models"])
    except (KeyError, TypeError):
        named = False
    if not named:
        raise UserError(f"{file}: not the scores of fedsim eval; delete it or evaluate the run again")
    return found


def zero_shot_part(about: ZeroShot, runs: Runs, unscored: str | None) -> dict[str, Any]:
    """The table as a report shows it: `table`, `pairs` of rows, `columns`, examples `taken` for ours, and why ours are `unscored`."""
    members = runs.get(about.run) or []
    found = zero_shot_file(members[0].path) if members and unscored is None else {}
    tasks = list(dict.fromkeys(column.task for column in about.columns))
    if not found:
        command = f"fedsim eval {members[0].path if members else 'RUN'} --tasks {','.join(tasks)}"
        unscored = unscored or f"no eval.json in the run; make it with: {command}"
    base = next((_published(row.published, about.columns) for row in about.rows if row.model == "base"), None)
    rows, scores = [], {}
    for row in about.rows:
        theirs = _published(row.published, about.columns, base if row.model != "base" else None)
        ours = _ours(found, row.model, about.columns) if found else None
        scores[row.name] = {"published": theirs} | ({"ours": ours} if ours else {})
        rows.append([row.name, "published", *theirs.cells()])
        if found:
            rows.append(["", "ours", *(ours.cells() if ours else ["-"] * (len(about.columns) + 1))])
    pairs = []
    for one, other in about.against:
        both = [whose for whose in scores[one] if whose in scores[other]]
        said = "; ".join(f"{whose} {_apart(scores[one][whose], scores[other][whose])}" for whose in both)
        pairs.append({"one": one, "other": other, "said": said})
    n = len(about.columns)
    head = ["model", "", *(f"{column.task} {column.metric}" for column in about.columns), f"mean of {n}"]
    taken = {task: (found.get("tasks") or {}).get(task) or {} for task in tasks}
    items = [f"{task} {one['items']} of {one['of']}" for task, one in taken.items() if "of" in one]
    table = Table(head, rows, range(2, n + 3))
    return {"table": table, "pairs": pairs, "columns": n, "taken": items, "unscored": unscored}


def _published(values: Sequence[float], columns: Sequence[Column], base: _Scores | None = None) -> _Scores:
    """Published scores with binomial standard errors."""
    share, items = np.array(values, dtype=float), np.array([column.items for column in columns])
    found = _with_mean(share, np.sqrt(share * (1.0 - share) / items), columns)
    if base is None:
        return found
    near = ~(np.abs(found.values - base.values) > NOISE * np.hypot(found.errors, base.errors))
    return _Scores(found.values, found.errors, near)


def _with_mean(values: np.ndarray, errors: np.ndarray, columns: Sequence[Column]) -> _Scores:
    """The standard error of the mean: errors of one task rest on the same examples and are added, tasks are independent."""
    by_task: dict[str, float] = {}
    for error, column in zip(errors, columns, strict=True):
        by_task[column.task] = by_task.get(column.task, 0.0) + float(error)
    of_mean = np.linalg.norm([*by_task.values()]) / len(columns)
    return _Scores(np.append(values, values.mean()), np.append(errors, of_mean), np.zeros(len(columns) + 1, dtype=bool))


def _ours(found: Mapping[str, Any], model: str, columns: Sequence[Column]) -> _Scores | None:
    """A model's scores by `fedsim eval`; None where it has none in one of the columns."""
    scores = next((one["scores"] for one in found["models"] if one["model"] == model), {})
    keys = [f"{column.task}_{column.metric}" for column in columns]
    if not all(key in scores for key in keys):
        return None
    if "mean" in scores and len(scores) == len(keys) + 1:  # of these columns and no other
        keys.append("mean")
    values = np.array([scores[key]["value"] for key in keys], dtype=float)
    errors = np.array([scores[key].get("stderr") for key in keys], dtype=float)  # None becomes NaN
    near = np.array([bool(scores[key].get("within_noise")) for key in keys])
    if keys[-1] == "mean":
        return _Scores(values, errors, near)
    made = _with_mean(values, errors, columns)
    return _Scores(made.values, made.errors, np.append(near, False))


def _apart(one: _Scores, other: _Scores) -> str:
    difference, error = one.values[-1] - other.values[-1], np.hypot(one.errors[-1], other.errors[-1])
    known = "not known" if np.isnan(error) else f"at most {error:.3f}"
    significant = "statistically significant" if abs(difference) > NOISE * error else "not statistically significant"
    return f"{difference:+.3f}, standard error {known}, {significant}"


# ------------------------------------------------------------------------------------------------ sizes of a message


def messages_part(about: Messages, runs: Runs) -> dict[str, Any]:
    """What a model weighs in each form: published, by arithmetic, and ours; and the bytes that our run recorded."""
    members = runs.get(about.run) or []
    model = read_json(members[0].path / "model.json") if members else {}
    trained, tensors = int(model.get("trained") or 0), model.get("tensors")
    rows = [
        [
            *(form.name, _mib(form.values, form.scales), _mib(*message_mib(about.parameters, about.tensors, form))),
            _mib(*message_mib(trained, int(tensors or 0), form)) if trained else "-",
        ]
        for form in about.forms
    ]
    head = ["form", "published", f"{about.parameters / 1e6:,.1f}M parameters", f"ours, {trained / 1e6:,.1f}M"]
    no_tables = trained > 0 and tensors is None and any(form.table for form in about.forms)
    return {"table": Table(head, rows, range(1, 4)), "no_tables": no_tables, "recorded": _recorded_mib(members)}


def message_mib(parameters: int, tensors: int, form: Form) -> tuple[float, float]:
    """MiB of one message: values, and scales with code tables.

    Args:
        parameters: elements, those of shared tensors once.
        tensors: how many tensors they lie in.
        form: bits of an element, elements per scale, entries of a tensor's code table.
    """
    scales = 4 * parameters / form.block if form.block else 0.0
    return parameters * form.bits / 8 / 2**20, (scales + 4 * tensors * form.table) / 2**20


def _mib(*parts: float) -> str:
    """`1,353 + 1.6`; what is 0 is left out."""
    shown = [part for part in parts if part] or [0.0]
    return " + ".join(f"{part:,.0f}" if part >= 100 else f"{part:.3g}" for part in shown)


def _recorded_mib(members: Sequence[FinishedRun]) -> str:
    """The bytes per client and round that the first run recorded, by direction."""
    if not members:
        return ""
    found = members[0].metrics
    found = found[(found["scope"] == "federated") & (found["round"] > 0)].dropna(subset="value")
    last = found.groupby(found["name"].astype(str))["value"].last() / 2**20
    ways = [f"{last[f'bytes_{way}']:,.4g} MiB {way}" for way in ("up", "down") if f"bytes_{way}" in last]
    return f"{' and '.join(ways)} per client and round" if ways else ""
