"""Many runs from one file: a grid or a list over any config keys, spread over devices, finished ones skipped.

Runs in a process share what they have in common: the tokenised rows, and the weights of the base (`build.Shared`). Each is
an ordinary run with a folder of its own under the sweep's, `results/<sweep>/<run id>/`; a run of which another sweep or
`fedsim run` left a part goes on from there. Beside them lie `sweep.json` (settings and state of each run), the tables and the
figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from fedsim.config.experiment import Experiment, results_of
from fedsim.config.sections import Pool
from fedsim.core.errors import ClientError, UserError
from fedsim.core.files import check_own, damage, read_checked, read_json, write_atomic
from fedsim.core.numerics import settled
from fedsim.core.pulse import LOOK_S, Watch, pulses, silence, watched_by
from fedsim.core.section import plain
from fedsim.executors.fleet import Fleet, Member
from fedsim.executors.processes import (
    DEATHS,
    die_with_parent,
    died_of,
    main_not_imported,
    without_interrupt,
)
from fedsim.runs.build import Parts, Shared, prepare
from fedsim.runs.progress import Board, Progress
from fedsim.runs.resolve import devices_of
from fedsim.runs.run import run, run_folder_of
from fedsim.runs.signals import ended_by_signals
from fedsim.runs.sweep_plan import Job, Sweep, said

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
    """Run what is not finished yet, and write the tables and figures of all that is.

    Args:
        plan: a sweep, the file of one, or what such a file holds.
        progress: show a live table of runs on a terminal, else a line for each, on standard error.
        workers: runs at once; over the file's own.
        metric: of the tables and figures; None = the runs' own `best.metric`.
        on_jobs: called with all runs when their folders are known, before the first starts.
        formats: of the figures, see `fedsim.plots.FORMATS`.

    Returns:
        The runs; those that failed say why.

    Raises:
        UserError: for a sweep that cannot be, or a device that is not there.
    """
    from fedsim.analysis.plots import save_sweep
    from fedsim.analysis.sweeps import write_tables

    if not isinstance(plan, Sweep):
        plan = Sweep.from_dict(plan) if isinstance(plan, dict) else Sweep.load(plan)
    jobs = [Job(settings, exp) for settings, exp in zip(plan.settings, plan.experiments, strict=True)]
    path = plan.path
    check_own(path, results_of(plan.experiments[0]), names=["sweep.json"])

    def save() -> None:
        runs = [
            {
                "run": None if job.path is None else job.path.name,
                "settings": job.settings,
                "state": job.state,
                "reason": job.reason,
            }
            for job in jobs
        ]
        text = json.dumps({"name": plan.name, "keys": plan.keys, "runs": runs}, indent=1, ensure_ascii=False)
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
            save_sweep(path, metric=metric, formats=formats)
        except UserError as error:
            problem = str(error)
    return Swept(path, jobs, problem)


# ------------------------------------------------------------------------------------------------ running


@settled()  # rows and bases are loaded here
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

    A job that fails is marked with its reason, its whole traceback goes into `errors/` beside the run folders, and the
    others go on. Jobs that come to the same run are run once.

    Args:
        jobs: waiting ones.
        devices: as `Sweep.devices`.
        workers: processes.
        threads: CPU threads of each.
        together: runs that share the passes of a worker.
        progress: show what goes on.
        on_change: called when a job has changed its state.
        on_jobs: called once folders and finished jobs are known.

    Raises:
        UserError: for a device that is not there.
    """
    places, threads = _places(devices, workers, threads)
    shared = Shared()
    board = Board(progress, [said(job.settings) for job in jobs])
    twins: dict[int, list[int]] = {}

    def changed(i: int) -> None:
        for twin in twins.get(i, []):
            jobs[twin].state, jobs[twin].reason = jobs[i].state, jobs[i].reason
            board.update(twin, jobs[twin].state, f"the same run as {i + 1}")
        on_change()

    try:
        waiting = _prepare(jobs, shared, twins)
        if on_jobs is not None:
            on_jobs(jobs)
        for i, job in enumerate(jobs):
            board.update(i, job.state, "finished before" if job.skipped else job.reason or "")
        on_change()
        for group in _by_base(waiting):
            shared.keep_only({Shared.base_key(parts.exp) for _, parts in group})
            todo = _load_base(jobs, group, shared, board, changed)
            left = [(i, parts) for i, parts in group if i in todo]
            # Every worker has something to do before runs go side by side.
            crews = _crews(left, min(together, max(1, -(-len(left) // len(places)))))
            if len(places) == 1 or len(crews) == 1:
                for crew in crews:
                    _start(jobs, crew, board)
                    work = [(i, jobs[i].exp, jobs[i].path, board.reporter(i)) for i in crew]

                    def ended(i: int, outcome: Outcome) -> None:
                        board.update(i, *_end(jobs[i], outcome))
                        changed(i)

                    _attempt(work, shared, places[0], threads, ended)
            elif crews:
                _run_apart(jobs, crews, shared, places, threads, board, changed)
    finally:
        for job in jobs:
            job.state = "waiting" if job.state == "running" else job.state
        on_change()
        board.end()


def _prepare(jobs: list[Job], shared: Shared, twins: dict[int, list[int]]) -> list[tuple[int, Parts]]:
    """Find each run's folder, and what cannot be; the runs that are to be made. Jobs that come to the same run go into `twins`."""
    waiting: list[tuple[int, Parts]] = []
    first: dict[Path, int] = {}
    for place in {run_folder_of(job.exp, "errors") for job in jobs}:
        check_own(place, results_of(jobs[0].exp))
    for i, job in enumerate(jobs):
        try:
            parts = prepare(job.exp, shared)
        except UserError as error:
            job.state, job.reason = "failed", str(error)
            continue
        except Exception as error:
            job.state, job.reason = "failed", _in_a_line(error)
            continue
        job.path = run_folder_of(parts.exp, parts.run_id())
        other = first.setdefault(job.path, i)
        if other != i:
            twins.setdefault(other, []).append(i)
            job.state, job.skipped = jobs[other].state, jobs[other].skipped
        elif _finished(job.path, job.exp.rounds) and not damage(job.path):
            job.state, job.skipped = "finished", True
        else:
            waiting.append((i, parts))
    return waiting


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _places(devices: list[str] | str, workers: int | None, threads: int | None) -> tuple[list[str], int]:
    """(the device of each worker, threads of each)."""
    found = devices_of(Experiment(executor={"name": "pool", "devices": devices}))[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is None:
        # One thread a run: on a CPU runs beside each other waste less than threads that wait for each other.
        workers = max(len(found), max(1, cores // (threads or 1)) if found == ["cpu"] else 1)
    places = [found[i % len(found)] for i in range(workers)]
    return places, threads or max(1, cores // len(places))


def _finished(path: Path, rounds: int) -> bool:
    try:
        status = read_json(path / "status.json")
    except (OSError, UserError):  # the run says so, and writes it anew
        return False
    return status.get("state") == "finished" and status.get("rounds") == rounds and status.get("figures", True)


def _by_base(waiting: list[tuple[int, Parts]]) -> Iterator[list[tuple[int, Parts]]]:
    """Runs of one base after those of another: only one base is in memory at a time."""
    groups: dict[str | None, list[tuple[int, Parts]]] = {}
    for i, parts in waiting:
        groups.setdefault(Shared.base_key(parts.exp), []).append((i, parts))
    yield from groups.values()


def _load_base(
    jobs: list[Job], group: list[tuple[int, Parts]], shared: Shared, board: Board, changed: Callable[[int], None]
) -> list[int]:
    """Load the base that a group shares; if that fails, so do all of them."""
    if Shared.base_key(group[0][1].exp) is not None:
        try:
            shared.base(group[0][1])
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else _in_a_line(error)
            for i, _ in group:
                jobs[i].state, jobs[i].reason = "failed", why
                board.update(i, "failed", why)
                changed(i)
            return []
    return [i for i, _ in group]


def _crews(group: list[tuple[int, Parts]], together: int) -> list[list[int]]:
    """Runs that go side by side, at most `together` of them: those that agree in all that a pass has in common."""
    alike: dict[str, list[int]] = {}
    for i, parts in group:
        alike.setdefault(repr(i) if together == 1 else _pass_key(parts.exp), []).append(i)
    return [runs[a : a + together] for runs in alike.values() for a in range(0, len(runs), together)]


def _pass_key(exp: Experiment) -> str:
    """What runs must have in common to share passes; rates, schedules, steps, seeds, clients and partitions may differ."""
    own = ("steps", "epochs", "lr", "min_lr", "warmup", "schedule", "schedule_over", "horizon", "keep_state", "shuffle")
    local = {k: v for k, v in plain(exp.local).items() if k not in (*own, "drop_last")}
    how = ("batch_size", "generate", "max_new_tokens", "max_examples")
    evaluate = {k: v for k, v in plain(exp.evaluate).items() if k in how}
    same = (plain(exp.model), plain(exp.data), plain(exp.adapter), local, evaluate, plain(exp.training))
    # An initial head is the seed's, see Shared.base_key; a whole model has a device to itself.
    return repr((Shared.base_key(exp) or id(exp), same))


def _start(jobs: list[Job], crew: Sequence[int], board: Board) -> None:
    for i in crew:
        jobs[i].state, jobs[i].reason, jobs[i].seconds = "running", None, time.monotonic()
        board.update(i, "running", "")


def _end(job: Job, outcome: Outcome) -> tuple[str, str]:
    """Settle a job; returns what the board shows."""
    state, text, trace = outcome
    job.state, job.seconds = state, time.monotonic() - job.seconds
    if state == "failed":
        job.reason = text
        if trace and job.path is not None:
            write_atomic(job.path.parent / "errors" / f"{job.path.name}.txt", trace.encode())
    return state, text if state == "failed" else f"{text}, {job.seconds:.0f} s"


def _attempt(
    work: Sequence[tuple[int, Experiment, Path | None, Progress]],
    shared: Shared,
    device: str,
    threads: int,
    ended: Callable[[int, Outcome], None],
) -> None:
    """Run experiments on a device, several of them side by side; `ended` is called as each comes to its end."""
    if len(work) == 1:
        i, exp, path, progress = work[0]
        ended(i, _run_one(exp, path, shared, device, threads, progress))
        return

    def body(i: int, exp: Experiment, path: Path | None, progress: Progress) -> Callable[[Member], None]:
        return lambda member: ended(i, _run_one(exp, path, shared, device, threads, progress, member))

    with settled([device]):
        Fleet(device, threads).run([body(*one) for one in work])


def _run_one(
    exp: Experiment,
    path: Path | None,
    shared: Shared,
    device: str,
    threads: int,
    progress: Progress,
    member: Member | None = None,
) -> Outcome:
    """Run one experiment: (state, result or reason, traceback)."""
    try:
        tree = exp.to_dict()
        # The last bits depend on the threads: a run that was started before keeps its own.
        known = None
        if path is not None:
            with contextlib.suppress(OSError, UserError):  # the run itself says that the file is damaged
                plan = read_checked(path / "checkpoints" / "plan.json") or read_json(path / "plan.json")
                known = plan.get("threads")
        tree["executor"] = {"name": "serial", "device": device, "threads": known or threads}
        # A finished run is here only if it is damaged: what can be made again is.
        resume = path if path is not None and _finished(path, exp.rounds) else None
        done = run(Experiment.from_dict(tree), progress=progress, shared=shared, member=member, resume=resume)
        return "finished", _result(done.path), ""
    except (UserError, ClientError) as error:
        lines = str(error).strip().split("\n")
        return "failed", lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}", str(error)
    except Exception as error:
        return "failed", _in_a_line(error), traceback.format_exc()
    finally:
        if device.startswith("cuda") and member is None:
            torch.cuda.empty_cache()  # what the last run's allocator keeps would look taken to the next one's planner


def _result(path: Path) -> str:
    """What a run came to, in a few words."""
    from fedsim.analysis.listing import list_runs

    row = list_runs(path).iloc[0]
    shown = [(s, row[f"best_{s}"]) for s in ("local", "federated", "central")]
    return f"best {row['metric']}: " + ", ".join(f"{s} {v:.3f}" for s, v in shown if v == v)


# ------------------------------------------------------------------------------------------------ worker processes


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    device: str
    watch: Watch
    crew: list[int] = field(default_factory=list)  # runs it has not ended yet
    why: str | None = None  # its process was ended
    gone: bool = False

    def ended(self) -> str:
        """What ended its process."""
        return self.why or died_of(self.process)


def _run_apart(
    jobs: list[Job],
    crews: Sequence[list[int]],
    shared: Shared,
    places: Sequence[str],
    threads: int,
    board: Board,
    changed: Callable[[int], None],
) -> None:
    """Hand runs to worker processes, the next to whichever is free; a worker that dies or hangs is replaced, and its runs go
    on from their last checkpoints."""
    shared.share()
    waiting, pool = deque(crews), []
    deaths: dict[int, list[str]] = {}  # by run

    def lost(worker: _Worker) -> None:
        """Runs whose process has ended go on in another one, unless too many have."""
        how, left = worker.ended(), []
        for i in worker.crew:
            deaths.setdefault(i, []).append(how)
            if len(deaths[i]) < DEATHS:
                left.append(i)
                board.warn(i, f"the process on {worker.device} died ({how}); replaced, the run goes on")
                board.update(i, "waiting", "")
            else:
                why = f"{DEATHS} processes on {worker.device} died of it: {', '.join(deaths[i])}; start the sweep again"
                board.update(i, *_end(jobs[i], ("failed", why, "")))
                changed(i)
        worker.crew, worker.gone = [], True
        if left:
            waiting.appendleft(left)

    last = time.monotonic()
    try:
        for device in places[: len(crews)]:
            pool.append(_spawn(shared, device, threads))
        while waiting or any(w.crew for w in pool):
            for place, worker in enumerate(pool):
                if not worker.crew and waiting:
                    if worker.gone:
                        worker = pool[place] = _spawn(shared, worker.device, threads)
                    worker.crew = list(waiting.popleft())
                    _start(jobs, worker.crew, board)
                    with contextlib.suppress(OSError):  # it has died: its sentinel says so below
                        worker.pipe.send([(i, jobs[i].exp.to_dict(), jobs[i].path) for i in worker.crew])
            busy = [w for w in pool if w.crew]
            ready = wait([w.pipe for w in busy] + [w.process.sentinel for w in busy], timeout=LOOK_S)
            now = time.monotonic()
            passed, last = now - last, now
            for worker in busy:
                limits = [getattr(jobs[i].exp.executor, "hang_s", Pool.hang_s) for i in worker.crew]
                silent = worker.watch.look(passed)
                if worker.why is None and None not in limits and silent >= max(limits):
                    worker.why = silence(max(limits))
                    worker.process.kill()
                if worker.pipe not in ready and worker.process.sentinel not in ready:
                    continue
                try:
                    kind, i, *rest = worker.pipe.recv()
                except (EOFError, OSError):
                    lost(worker)
                    continue
                if kind == "shows":
                    board.update(i, "running", rest[0])
                elif kind == "warns":
                    board.warn(i, rest[0])
                else:
                    worker.crew.remove(i)
                    board.update(i, *_end(jobs[i], tuple(rest)))
                    changed(i)
    finally:
        for worker in pool:
            if worker.crew:
                worker.process.terminate()
            with contextlib.suppress(OSError):
                worker.pipe.close()  # an idle worker ends when its pipe does
            worker.process.join(timeout=10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _spawn(shared: Shared, device: str, threads: int) -> _Worker:
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    (pulse,) = pulses(1)
    with main_not_imported(), without_interrupt():
        process = context.Process(target=_work, args=(there, pulse, shared, device, threads), daemon=True)
        process.start()
    there.close()
    return _Worker(process, here, device, Watch(pulse))


class _Sender(Progress):
    """Progress of a run, sent to the process that shows it."""

    def __init__(self, pipe: Connection, run: int) -> None:
        super().__init__(False, 0)
        self._pipe, self._run = pipe, run

    def round(self, round: int, text: str) -> None:
        """A round is done."""
        self._pipe.send(("shows", self._run, f"{self._mode} round {round}: {text}"))

    def warn(self, text: str) -> None:
        """One line on what went wrong."""
        self._pipe.send(("warns", self._run, text))


def _work(pipe: Connection, pulse: Tensor, shared: Shared, device: str, threads: int) -> None:
    """A worker's life: one run, or some side by side, after another, until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the main process decides
    watched_by(pulse)
    with ended_by_signals():  # told to end, a run says in its folder that it was stopped
        _work_on(pipe, shared, device, threads)


def _work_on(pipe: Connection, shared: Shared, device: str, threads: int) -> None:
    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            asked = pipe.recv()
        except (EOFError, OSError):
            return
        work = [(i, Experiment.from_dict(tree), path, _Sender(pipe, i)) for i, tree, path in asked]
        _attempt(work, shared, device, threads, lambda i, outcome: pipe.send(("done", i, *outcome)))
