"""Many runs from one file: a grid or a list over any config keys, spread over devices; finished runs are skipped.

Runs in a process share what they have in common: the tokenized examples and the weights of the base (`build.Shared`). Each is
an ordinary run with its own folder, `results/<sweep>/<run id>/`, and resumes what another sweep or `fedsim run` left there.
Beside them lie `sweep.json` (settings and state of each run), the tables and the figures.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fedsim.config.experiment import Experiment, results_of
from fedsim.config.sections import Pool
from fedsim.core.errors import ClientError, UserError
from fedsim.core.files import RUN_RECORD, check_own, damage, read_checked, read_json, write_atomic
from fedsim.core.numerics import settled
from fedsim.executors.fleet import Fleet
from fedsim.executors.supervisor import Supervisor, Work, Worker, heard
from fedsim.runs.build import Parts, Shared, prepare
from fedsim.runs.crews import crews_of, places_of
from fedsim.runs.progress import Board, Progress, Relay
from fedsim.runs.run import run_folder_of, run_steps
from fedsim.runs.scripts import script_parts
from fedsim.runs.signals import ended_by_signals
from fedsim.runs.sweep_plan import Job, Sweep, said
from fedsim.runs.tuning import scores_of

Outcome = tuple[str, str, str]  # finished | failed, what to say, a traceback


@dataclass(frozen=True)
class Swept:
    """A sweep that was run.

    Attributes:
        path: its folder, `results/<sweep>/`.
        jobs: its runs, in the order of the file.
        problem: why there are no tables and figures, or None.
    """

    path: Path
    jobs: list[Job]
    problem: str | None = None

    @property
    def failed(self) -> list[Job]:
        """Runs that did not come to an end; each has its `reason`."""
        return [job for job in self.jobs if job.state == "failed"]

    def table(self, metric: str | None = None) -> Any:
        """One row a model, as a `pandas.DataFrame`; see `fedsim.analysis.sweeps.sweep_table`."""
        from fedsim.analysis.sweeps import sweep_table

        return sweep_table(self.path, metric)

    def cells(self, metric: str | None = None) -> Any:
        """Mean and bootstrap interval over seeds of each cell; see `fedsim.analysis.sweeps.cells`."""
        from fedsim.analysis.sweeps import cells

        return cells(self.table(metric))


def run_sweep(
    plan: Sweep | dict[str, Any] | str | Path,
    *,
    progress: bool = True,
    workers: int | None = None,
    metric: str | None = None,
    on_jobs: Callable[[list[Job]], None] | None = None,
    formats: Sequence[str] = ("png",),
) -> Swept:
    """Run what is not finished yet, and write the tables and figures of all finished runs.

    Args:
        plan: a sweep, the file of one, or what such a file holds.
        progress: show a live table of runs on a terminal, else a line for each, on standard error.
        workers: concurrent runs; takes precedence over the file's own.
        metric: shown in tables and figures; None = the runs' own `best.metric`.
        on_jobs: called with all runs when their folders are known, before the first starts.
        formats: of the figures, see `fedsim.plots.FORMATS`.

    Returns:
        The runs; those that failed say why.

    Raises:
        UserError: for an invalid sweep, or a device that is not there.
    """
    from fedsim.analysis.plots import save_sweep
    from fedsim.analysis.sweep_report import write_report
    from fedsim.analysis.sweeps import write_tables

    if not isinstance(plan, Sweep):
        plan = Sweep.from_dict(plan) if isinstance(plan, dict) else Sweep.load(plan)
    if plan.tuned is not None:
        plan = _tune(plan, progress, workers, formats)
    jobs = [Job(settings, exp) for settings, exp in zip(plan.settings, plan.experiments, strict=True)]
    path = plan.path
    check_own(path, results_of(plan.experiments[0]), names=["sweep.json"])

    def save() -> None:
        runs = [
            {"run": job.path and job.path.name, "settings": job.settings, "state": job.state, "reason": job.reason}
            for job in jobs
        ]
        about = {"name": plan.name, "keys": plan.keys, **plan.about, "runs": runs}
        text = json.dumps(about, indent=1, ensure_ascii=False)
        write_atomic(path / "sweep.json", (text + "\n").encode())

    run_jobs(
        jobs,
        devices=plan.devices,
        workers=workers or plan.workers,
        threads=plan.threads,
        together=plan.together,
        progress=progress,
        on_change=save,
        on_jobs=on_jobs,
    )
    problem = None
    if any(job.state == "finished" for job in jobs):
        try:
            write_tables(path, metric)
            write_report(path, save_sweep(path, metric=metric, formats=formats), metric)
        except UserError as error:
            problem = str(error)
    return Swept(path, jobs, problem)


def _tune(plan: Sweep, progress: bool, workers: int | None, formats: Sequence[str]) -> Sweep:
    """The sweep with the best values of the keys that another one finds, which runs first."""
    assert plan.tuned is not None and plan.retuned is not None
    first = run_sweep(plan.tuned, progress=progress, workers=workers, formats=formats)
    if first.failed or first.problem:
        why = first.problem or f"{len(first.failed)} of {len(first.jobs)} runs failed: {first.failed[0].reason}"
        raise UserError(f"{first.path}: {why}; the values that it finds are needed first")
    tuned = plan.retuned(scores_of(first.jobs, first.table(), first.table("loss")))
    return dataclasses.replace(tuned, about={**plan.about, **tuned.about})


@settled()  # examples and bases are loaded here
def run_jobs(
    jobs: list[Job],
    *,
    devices: list[str] | str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    together: int = 1,
    progress: bool = True,
    on_change: Callable[[], None] = lambda: None,
    on_jobs: Callable[[list[Job]], None] | None = None,
) -> None:
    """Run jobs, each in one process on one device, as many at once as there are workers; changes them in place.

    A job that fails is marked with its reason, its traceback goes into `errors/` beside the run folders, and the others
    continue. Jobs that come to the same run are run once.

    Args:
        jobs: waiting ones.
        devices, workers, threads, together: as in `Sweep`.
        progress: show the states of the jobs.
        on_change: called when a job has changed its state.
        on_jobs: called once folders and finished jobs are known.

    Raises:
        UserError: for a device that is not there.
    """
    places, threads = places_of(devices, workers, threads)
    shared, board = Shared(), Board(progress, [said(job.settings) for job in jobs])
    runs = _Runs(jobs, board, on_change)
    try:
        by_base: dict[str | None, list[tuple[int, Parts]]] = {}  # only one base is in memory at a time
        for i, parts in runs.prepare(shared):
            by_base.setdefault(Shared.base_key(parts.exp), []).append((i, parts))
        if on_jobs is not None:
            on_jobs(jobs)
        for i, job in enumerate(jobs):
            board.update(i, job.state, "finished before" if job.skipped else job.reason or "")
        on_change()
        for base, group in by_base.items():
            shared.keep_only({base})
            try:
                if base is not None:
                    shared.base(group[0][1])
            except Exception as error:
                for i, _ in group:
                    runs.end(i, ("failed", _in_a_line(error), ""))
                continue
            # Every worker has something to do before runs go side by side.
            crews = crews_of(group, min(together, max(1, -(-len(group) // len(places)))))
            scripts = group[0][1].exp.client is not None  # these have worker processes of their own
            if min(len(places), len(crews)) > 1 and not scripts:
                _run_apart(runs, crews, shared, places, threads)
                continue
            for crew in crews:
                runs.begin(crew)
                work = [(i, jobs[i].exp, jobs[i].path, Relay(functools.partial(board.tell, i))) for i in crew]
                _attempt(work, shared, places[0], threads, runs.end)
    finally:
        for job in jobs:
            job.state = "waiting" if job.state == "running" else job.state
        on_change()
        board.end()


class _Runs:
    """The states of jobs: what is shown and written of them."""

    def __init__(self, jobs: list[Job], board: Board, on_change: Callable[[], None]) -> None:
        self.jobs, self.board, self._on_change = jobs, board, on_change
        self._same: dict[int, list[int]] = {}  # job -> others that come to the same run
        self._began: dict[int, float] = {}

    def prepare(self, shared: Shared) -> list[tuple[int, Parts]]:
        """Find each job's run folder, or why there is none; the runs that are to be made."""
        waiting: list[tuple[int, Parts]] = []
        first: dict[Path, int] = {}
        for place in {run_folder_of(job.exp, "errors") for job in self.jobs}:
            check_own(place, results_of(self.jobs[0].exp))
        for i, job in enumerate(self.jobs):
            try:
                parts = prepare(job.exp, shared) if job.exp.client is None else script_parts(job.exp)
            except Exception as error:
                job.state, job.reason = "failed", _in_a_line(error)
                continue
            job.path = run_folder_of(parts.exp, parts.run_id())
            same = first.setdefault(job.path, i)
            if same != i:
                self._same.setdefault(same, []).append(i)
                job.state, job.skipped = self.jobs[same].state, self.jobs[same].skipped
            elif _finished(job.path, job.exp.rounds) and not damage(job.path):
                job.state, job.skipped = "finished", True
            else:
                waiting.append((i, parts))
        return waiting

    def begin(self, crew: Sequence[int]) -> None:
        """Jobs are run from now on."""
        for i in crew:
            self.jobs[i].state, self.jobs[i].reason, self._began[i] = "running", None, time.monotonic()
            self.board.update(i, "running", "")

    def end(self, i: int, outcome: Outcome) -> None:
        """A job has come to its end, and with it those that are the same run."""
        job, (state, text, trace) = self.jobs[i], outcome
        job.state, job.reason = state, text if state == "failed" else None
        if i in self._began:
            job.seconds = time.monotonic() - self._began[i]
        if trace and job.path is not None:
            write_atomic(job.path.parent / "errors" / f"{job.path.name}.txt", trace.encode())
        self.board.update(i, state, text if state == "failed" else f"{text}, {job.seconds:.0f} s")
        for twin in self._same.get(i, []):
            self.jobs[twin].state, self.jobs[twin].reason = job.state, job.reason
            self.board.update(twin, job.state, f"the same run as {i + 1}")
        self._on_change()


def _in_a_line(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _finished(path: Path, rounds: int) -> bool:
    try:
        status = read_json(path / "status.json")
    except (OSError, UserError):  # the run says so, and writes it anew
        return False
    return status.get("state") == "finished" and status.get("rounds") == rounds and status.get("figures", True)


# ------------------------------------------------------------------------------------------------ one run


def _attempt(
    work: Sequence[tuple[int, Experiment, Path | None, Progress]],
    shared: Shared,
    device: str,
    threads: int,
    ended: Callable[[int, Outcome], None],
) -> None:
    """Run experiments on a device, several of them side by side; `ended` is called as each comes to its end."""
    fleet = Fleet(device, threads)

    def one(i: int, exp: Experiment, path: Path | None, progress: Progress) -> Iterator[None]:
        ended(i, (yield from _run_one(exp, path, shared, device, threads, progress, fleet if len(work) > 1 else None)))

    with settled([device]):
        fleet.run([one(*each) for each in work])


def _run_one(
    exp: Experiment,
    path: Path | None,
    shared: Shared,
    device: str,
    threads: int,
    progress: Progress,
    fleet: Fleet | None,
) -> Generator[None, None, Outcome]:
    """Run one experiment: (state, result or reason, traceback)."""
    try:
        tree = exp.to_dict()
        # The last bits depend on the threads: a run that was started before keeps its own.
        known = None if path is None else (read_checked(path / RUN_RECORD) or {}).get("plan")
        tree["executor"] = {"name": "serial", "device": device, "threads": known["threads"] if known else threads}
        done = yield from run_steps(Experiment.from_dict(tree), progress=progress, shared=shared, fleet=fleet)
        return "finished", _result(done.path), ""
    except (UserError, ClientError) as error:
        lines = str(error).strip().split("\n")
        return "failed", lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}", str(error)
    except Exception as error:
        return "failed", _in_a_line(error), traceback.format_exc()
    finally:
        if device.startswith("cuda") and fleet is None:
            torch.cuda.empty_cache()  # what the last run's allocator keeps would look taken to the next one's planner


def _result(path: Path) -> str:
    """What a run came to, in a few words."""
    from fedsim.analysis.listing import list_runs

    row = list_runs(path).iloc[0]
    shown = [(s, row[f"best_{s}"]) for s in ("local", "federated", "central")]
    return f"best {row['metric']}: " + ", ".join(f"{s} {v:.3f}" for s, v in shown if v == v)


# ------------------------------------------------------------------------------------------------ worker processes


@dataclass(eq=False, kw_only=True)
class _Run(Work):
    """A job as the work of processes."""

    number: int


def _run_apart(runs: _Runs, crews: Sequence[list[int]], shared: Shared, places: Sequence[str], threads: int) -> None:
    """Hand runs to worker processes, the next ones to whichever is free; if one dies or hangs, its runs resume in another."""
    shared.share()
    workers = [Worker(f"fedsim-sweep-{n}", device) for n, device in enumerate(places[: len(crews)])]
    supervisor = Supervisor(workers, _work, (shared, threads), threads)
    waiting = deque([_Run(number=i) for i in crew] for crew in crews)
    try:
        while waiting or any(worker.work for worker in workers):
            for worker in workers:
                if waiting and worker.process is None:
                    supervisor.start(worker)
                if waiting and worker.idle:
                    crew = waiting.popleft()
                    runs.begin([one.number for one in crew])
                    asked = [(one.number, runs.jobs[one.number]) for one in crew]
                    limits = [getattr(job.exp.executor, "hang_s", Pool.hang_s) for _, job in asked]
                    message = [(i, job.exp.to_dict(), job.path) for i, job in asked]
                    supervisor.send(worker, message, crew, None if None in limits else max(limits))
            worker, kind, *rest = supervisor.next()
            if kind == "died":
                died, lost = rest
                left = [one for one in lost if not one.given_up]
                for one in left:
                    runs.board.warn(one.number, f"{died}; replaced, the run resumes")
                    runs.board.update(one.number, "waiting", "")
                for one in lost:
                    if one.given_up:
                        runs.end(one.number, ("failed", "; ".join([*one.why, "start the sweep again"]), ""))
                if left:
                    waiting.appendleft(left)
            elif kind == "done":
                number, outcome = rest
                worker.work = [one for one in worker.work if one.number != number]
                runs.end(number, outcome)
            else:
                number, text = rest
                runs.board.tell(number, kind, text)
    finally:
        supervisor.close(gently=True)


def _work(pipe: Connection, device: str, shared: Shared, threads: int) -> None:
    """One run, or some side by side, after another, until the pipe is closed."""

    def relay(i: int) -> Relay:
        return Relay(lambda kind, text: pipe.send((kind, i, text)))

    with ended_by_signals():  # told to end, a run says in its folder that it was stopped
        for asked in heard(pipe):
            work = [(i, Experiment.from_dict(tree), path, relay(i)) for i, tree, path in asked]
            _attempt(work, shared, device, threads, lambda i, outcome: pipe.send(("done", i, outcome)))
