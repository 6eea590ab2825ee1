"""A published experiment by one command: its runs, then a report of ours beside what was published.

A folder under `experiments/` with a `reproduce.yaml`: `sizes` (an experiment file each, with `budgets` that change its keys),
`runs` (label, title, what is set in the file, for which sizes and budgets, with which seeds), and what `fedsim.analysis.report` prints: the
published values, the verdicts, and zero-shot scores, which are made once the runs are finished.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.analysis.report import check as check_report
from fedsim.analysis.report import zero_shot_file
from fedsim.config.experiment import Experiment, expand_path, read_yaml, results_of
from fedsim.core.errors import UserError
from fedsim.core.files import check_own
from fedsim.runs.sweep_plan import Job

SIZES = ("tiny", "smollm2", "full")


@dataclass(frozen=True)
class Reproduction:
    """The runs of an experiment at one size.

    Attributes:
        spec: the parsed `reproduce.yaml`.
        labels, titles: of each run; runs of one label differ in their seed alone.
        jobs: the runs.
        size: tiny | smollm2 | full, or whatever the file names.
        budget: the name of the budget, or None where the size has but one.
        path: where the report goes.
    """

    spec: dict[str, Any]
    labels: list[str]
    titles: list[str]
    jobs: list[Job]
    size: str
    budget: str | None
    path: Path

    @classmethod
    def load(
        cls, experiment: str | Path, size: str = "tiny", budget: str | None = None, overrides: Sequence[str] = ()
    ) -> Reproduction:
        """The runs of an experiment.

        Args:
            experiment: a folder with a `reproduce.yaml`, or the name of one under `experiments/`.
            size: of the base and the data.
            budget: of the size's budgets; None takes the first on a machine with a GPU, else the last.
            overrides: `key=value` for all runs; not for keys that the experiment sets itself.

        Raises:
            UserError: for an experiment, size or budget that is not there, or a file that cannot be.
        """
        folder = _folder(experiment)
        spec = read_yaml(folder / "reproduce.yaml")
        _check(spec, folder / "reproduce.yaml")
        sizes = spec["sizes"]
        _one_of(size, list(sizes), f"{folder.name}: --size")
        about = sizes[size]
        budgets = about.get("budgets") or {}
        if budget is None and budgets:
            Experiment.load(folder / about["file"], overrides)  # a slip is told before torch is imported
            import torch

            budget = list(budgets)[0 if torch.cuda.is_available() else -1]
        if budget is not None:
            _one_of(budget, list(budgets), f"{folder.name}, {size}: --budget")
        labels, titles, jobs = [], [], []
        for one in spec.get("runs") or []:
            if size not in one.get("sizes", list(sizes)) or budget not in one.get("budgets", [budget]):
                continue
            set_for_size = (one.get("set_for") or {}).get(size) or {}
            settings = {**(budgets.get(budget) or {}), **(one.get("set") or {}), **set_for_size}
            for seed in (one.get("seeds") or {}).get(size, [0]):
                try:
                    _refuse(overrides, {**settings, "seed": seed})
                    exp = Experiment.load(folder / about["file"], overrides, {**settings, "seed": seed})
                except UserError as error:
                    raise UserError(f"{folder / 'reproduce.yaml'}, run {one['label']}: {error}") from None
                labels.append(one["label"])
                titles.append(one["title"])
                jobs.append(Job({"run": one["label"], "seed": seed}, exp))
        if not jobs:
            raise UserError(f"{folder / 'reproduce.yaml'}: names no run for size {size!r}")
        name = "report" if budget in (None, *list(budgets)[-1:]) else f"report-{budget}"
        if overrides:  # other runs than those that were published have a report of their own
            name += "-" + hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:6]
        path = results_of(jobs[0].exp) / jobs[0].exp.name / name
        return cls(spec, labels, titles, jobs, size, budget, path)


def _check(spec: dict[str, Any], file: Path) -> None:
    """Whether sizes and runs are what this module reads; the rest is checked by the report before any run."""
    sizes, runs = spec.get("sizes"), spec.get("runs")
    if not isinstance(sizes, dict) or not sizes:
        raise UserError(f"{file}: sizes: {sizes!r} is no mapping of sizes to {{file: EXPERIMENT.yaml}}")
    for size, about in sizes.items():
        if not isinstance(about, dict) or not isinstance(about.get("file"), str):
            raise UserError(f"{file}: sizes.{size}: {about!r} names no file; write {{file: EXPERIMENT.yaml}}")
        if not isinstance(about.get("budgets") or {}, dict):
            raise UserError(f"{file}: sizes.{size}.budgets: {about['budgets']!r} is no mapping of names to settings")
        for name, settings in (about.get("budgets") or {}).items():
            if not isinstance(settings or {}, dict):
                raise UserError(f"{file}: sizes.{size}.budgets.{name}: {settings!r} is no mapping of keys to values")
    if not isinstance(runs, list) or not runs or not all(isinstance(one, dict) for one in runs):
        raise UserError(f"{file}: runs: {runs!r} is no list of runs, each with label and title")
    for one in runs:
        for key in ("label", "title"):
            if not isinstance(one.get(key), str):
                raise UserError(f"{file}: runs: {one!r} has no {key}")
        for key, kind, what in (
            ("sizes", list, "list of sizes"),
            ("budgets", list, "list of budgets"),
            ("set", dict, "mapping of keys to values"),
            ("set_for", dict, "mapping of sizes to settings"),
            ("seeds", dict, "mapping of sizes to lists of seeds"),
        ):
            inside = one.get(key)
            nested = {"set_for": dict, "seeds": list}.get(key)
            sound = isinstance(inside, kind) and (
                nested is None or all(isinstance(v, nested) for v in inside.values() if v is not None)
            )
            if inside is not None and not sound:
                raise UserError(f"{file}: runs: {one['label']}: {key}: {inside!r} is no {what}")
    for key in ("published", "verdicts"):
        lines = spec.get(key) or []
        if not isinstance(lines, list):
            raise UserError(f"{file}: {key}: {lines!r} is no list of lines")
    check_report(_only(spec, {one["label"] for one in runs}, every=True), {one["label"] for one in runs})


def _refuse(overrides: Sequence[str], settings: dict[str, Any]) -> None:
    """Overrides of what the experiment sets itself would be lost without a word."""
    for text in overrides:
        key = text.partition("=")[0].strip()
        for own in settings:
            if key == own or key.startswith(f"{own}.") or own.startswith(f"{key}."):
                way = "use fedsim run or fedsim sweep on the experiment's file for another one"
                raise UserError(f"{text!r}: this experiment sets {own} itself; {way}")


def _folder(experiment: str | Path) -> Path:
    roots = [Path("experiments"), Path(__file__).resolve().parents[2] / "experiments"]
    for folder in (Path(expand_path(str(experiment), "EXPERIMENT")), *(root / experiment for root in roots)):
        if (folder / "reproduce.yaml").is_file():
            return folder
    found = sorted({f.parent.name for root in roots for f in root.glob("*/reproduce.yaml")})
    near = difflib.get_close_matches(str(experiment), found, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"{str(experiment)!r}: no experiment with a reproduce.yaml; {hint}here are: {', '.join(found) or 'none'}; or give its folder"
    )


def _one_of(value: str, known: list[str], what: str) -> None:
    if value not in known:
        raise UserError(f"{what}: {value!r} is not there; give one of: {', '.join(known) or '(none)'}")


def reproduce(
    plan: Reproduction,
    *,
    command: str,
    progress: bool = True,
    workers: int | None = None,
    on_jobs: Callable[[list[Job]], None] | None = None,
    formats: Sequence[str] = (),
) -> Path | None:
    """Make the runs that are not finished yet, score them where the experiment asks for it, and write the report.

    A single run has all cores of the machine. Zero-shot scores that cannot be made are no reason for no report: it says why.

    Args:
        plan: from `Reproduction.load`.
        command: what the user typed; printed in the report.
        progress: show what goes on, on standard error.
        workers: runs at once.
        on_jobs: as in `sweep.run_jobs`.
        formats: further formats of the figures, see `fedsim.plots.FORMATS`; the report has PNG.

    Returns:
        `report.md`, or None where a run failed: a report without it would leave verdicts out.
    """
    from fedsim.analysis.report import Member, build
    from fedsim.runs.sweep import run_jobs

    check_own(plan.path, results_of(plan.jobs[0].exp))
    workers = 1 if workers is None and len(plan.jobs) == 1 else workers
    run_jobs(plan.jobs, workers=workers, progress=progress, on_jobs=on_jobs)
    if any(job.state != "finished" for job in plan.jobs):
        return None
    members = [
        Member(label, title, job.path) for label, title, job in zip(plan.labels, plan.titles, plan.jobs, strict=True)
    ]
    about = {"command": command, "size": plan.size}
    if plan.budget is not None:
        about["budget"] = plan.budget
    spec = _only(plan.spec, {member.label for member in members})
    unscored = None
    if spec.get("zero_shot"):
        first = next(member for member in members if member.label == spec["zero_shot"]["run"])
        unscored = score(first.path, spec["zero_shot"]["tasks"], limit_of(plan), progress)
    return build(spec, members, plan.path, about, unscored, formats)


def limit_of(plan: Reproduction) -> int | None:
    """Items of a zero-shot task that are scored: those of the plan's budget, else of its size; None = all."""
    limits = (plan.spec.get("zero_shot") or {}).get("limit") or {}
    return limits.get(plan.budget, limits.get(plan.size))


def score(run: Path, tasks: Sequence[str], limit: int | None = None, progress: bool = False) -> str | None:
    """Score a run's models zero-shot, unless it has the scores of these tasks already; writes `eval.json` into its folder.

    Returns:
        None, or in a line why there are no such scores.
    """
    try:
        found = zero_shot_file(run)
        if found is not None and found.get("limit") == limit and set(tasks) <= set(found.get("tasks") or {}):
            return None
        from fedsim.zero_shot import evaluate_zero_shot

        evaluate_zero_shot(run, tasks, limit=limit, progress=progress).save(run)
    except UserError as error:
        return str(error)
    except ImportError as error:
        return f"{error}; install what fedsim eval needs: pip install -e '.[eval]'"
    except Exception as error:  # the harness and the hub fail in many ways, and hours of training are done by now
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def _only(spec: dict[str, Any], labels: set[str], every: bool = False) -> dict[str, Any]:
    """The file without sizes and runs, and without lines that are about runs of other sizes (unless `every`)."""

    def about(line: dict[str, Any]) -> bool:
        return every or set(line.get("runs") or [line["run"]]) <= labels

    out = {k: v for k, v in spec.items() if k not in ("sizes", "runs")}
    for key in ("published", "verdicts"):
        out[key] = [line for line in spec.get(key) or [] if about(line)]
    for key in ("zero_shot", "messages"):
        if out.get(key) and not every and out[key]["run"] not in labels:
            del out[key]
    if "figures" in out and not every:
        out["figures"] = [f for f in out["figures"] if (f["run"] if isinstance(f, dict) else f) in labels]
    return out
