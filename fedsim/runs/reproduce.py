"""A published experiment by one command: its runs, then a report of ours beside what was published.

A folder under `experiments/` with a `reproduce.yaml`, whose keys are the sections here and `fedsim.analysis.report_spec`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fedsim.analysis.report_spec import Report
from fedsim.config.experiment import Experiment, expand_path, read_yaml, results_of
from fedsim.core.errors import UserError
from fedsim.core.files import check_own
from fedsim.core.section import Natural, Text, section
from fedsim.runs.sweep_plan import Job

SIZES = ("tiny", "smollm2", "full")


@section
class Size:
    """A size of base model and data."""

    file: Text
    """The experiment's file, beside `reproduce.yaml`."""
    budgets: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> what a training budget sets in the experiment, the published one first."""


@section
class Runs:
    """Runs that differ in their seed alone."""

    label: Text
    """By which the rest of the file names them."""
    title: Text
    """What a reader of the report sees."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted key -> value in the experiment."""
    set_for: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Size -> what is set for it alone."""
    sizes: list[Text] | None = None
    """Sizes that have these runs; null = all."""
    budgets: list[Text | None] | None = None
    """Budgets that have these runs, null for sizes without budgets; null = all."""
    seeds: dict[str, list[Natural]] = Field(default_factory=dict)
    """Size -> seeds; 0 where it is not named."""


@section
class Spec(Report):
    """A `reproduce.yaml`."""

    sizes: Annotated[dict[str, Size], Field(min_length=1)]
    """Name -> size."""
    runs: Annotated[list[Runs], Field(min_length=1)]
    """The runs."""


@dataclass(frozen=True)
class Reproduction:
    """The runs of an experiment at one size.

    Attributes:
        spec: the experiment's `reproduce.yaml`.
        labels, titles: of each run; runs of one label differ in their seed alone.
        jobs: the runs.
        size: tiny | smollm2 | full, or whatever the file names.
        budget: the name of the budget, or None where the size has but one.
        path: where the report goes.
    """

    spec: Spec
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
        file = folder / "reproduce.yaml"
        try:
            spec = Spec(**{key: value for key, value in read_yaml(file).items() if value is not None})
            spec.check_labels(one.label for one in spec.runs)
        except UserError as error:
            raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
        _one_of(size, list(spec.sizes), f"{folder.name}: --size")
        about = spec.sizes[size]
        if budget is None and about.budgets:
            Experiment.load(folder / about.file, overrides)  # a wrong key is reported before torch is imported
            import torch

            budget = list(about.budgets)[0 if torch.cuda.is_available() else -1]
        if budget is not None:
            _one_of(budget, list(about.budgets), f"{folder.name}, {size}: --budget")
        labels, titles, jobs = [], [], []
        for one in spec.runs:
            if size not in (one.sizes or spec.sizes) or budget not in (one.budgets or [budget]):
                continue
            settings = {**about.budgets.get(budget or "", {}), **one.set, **one.set_for.get(size, {})}
            for seed in one.seeds.get(size, [0]):
                try:
                    _check_free(overrides, {**settings, "seed": seed})
                    exp = Experiment.load(folder / about.file, overrides, {**settings, "seed": seed})
                except UserError as error:
                    raise UserError(f"{file}, run {one.label}: {error}") from None
                labels.append(one.label)
                titles.append(one.title)
                jobs.append(Job({"run": one.label, "seed": seed}, exp))
        if not jobs:
            raise UserError(f"{file}: names no run for size {size!r}")
        name = "report" if budget in (None, *list(about.budgets)[-1:]) else f"report-{budget}"
        if overrides:  # other runs than those that were published have a report of their own
            name += "-" + hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:6]
        return cls(spec, labels, titles, jobs, size, budget, results_of(jobs[0].exp) / jobs[0].exp.name / name)

    @property
    def limit(self) -> int | None:
        """Examples of a zero-shot task that are scored: those of the budget, else of the size; None = all."""
        limits = self.spec.zero_shot.limit if self.spec.zero_shot else {}
        return limits.get(self.budget or "", limits.get(self.size))


def _check_free(overrides: Sequence[str], settings: dict[str, Any]) -> None:
    """Raise a UserError about an override of what the experiment sets itself, which would have no effect."""
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
    way = f"{f'did you mean {near[0]}? ' if near else ''}give one of: {', '.join(found) or '(none)'}; or its folder"
    raise UserError(f"{str(experiment)!r}: no experiment with a reproduce.yaml; {way}")


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

    A single run has all cores of the machine. Where there can be no zero-shot scores, the report says why.

    Args:
        plan: from `Reproduction.load`.
        command: what the user typed; printed in the report.
        progress: show what goes on, on standard error.
        workers: runs at once.
        on_jobs: as in `sweep.run_jobs`.
        formats: further formats of the figures, see `fedsim.plots.FORMATS`; the report has PNG.

    Returns:
        `report.md`, or None where a run failed: a report without it would leave checks out.
    """
    from fedsim.analysis.report import Member, build
    from fedsim.runs.sweep import run_jobs

    check_own(plan.path, results_of(plan.jobs[0].exp))
    workers = 1 if workers is None and len(plan.jobs) == 1 else workers
    run_jobs(plan.jobs, workers=workers, progress=progress, on_jobs=on_jobs)
    if any(job.state != "finished" for job in plan.jobs):
        return None
    spec = plan.spec.only(plan.labels)
    about = {"command": command, "size": plan.size} | ({"budget": plan.budget} if plan.budget is not None else {})
    paths = [job.path for job in plan.jobs]
    unscored = None
    if spec.zero_shot:
        run = paths[plan.labels.index(spec.zero_shot.run)]
        unscored = score(run, spec.zero_shot.tasks, plan.limit, progress)
    members = list(map(Member, plan.labels, plan.titles, paths))
    return build(spec, members, plan.path, about, unscored, formats)


def score(run: Path, tasks: Sequence[str], limit: int | None = None, progress: bool = False) -> str | None:
    """Score a run's models zero-shot, unless it has the scores of these tasks already; writes `eval.json` into its folder.

    Returns:
        None, or in a line why there are no such scores.
    """
    from fedsim.analysis.published_scores import zero_shot_file

    try:
        found = zero_shot_file(run)
        if found and found.get("limit") == limit and set(tasks) <= set(found.get("tasks") or {}):
            return None
        from fedsim.zero_shot import evaluate_zero_shot

        evaluate_zero_shot(run, tasks, limit=limit, progress=progress).save(run)
    except UserError as error:
        return str(error)
    except ImportError as error:
        return f"{error}; install what fedsim eval needs: pip install -e '.[eval]'"
    except Exception as error:  # lm-eval and the hub fail in many ways, and hours of training are done by now
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None
