"""`fedsim.run`: one experiment from start to end, in a run folder.

It has no global state: it can be called in a loop, in a notebook, twice in a row. It ends everything that it starts, and
the same call resumes a run folder that is already there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.config.experiment import Experiment, results_of
from fedsim.core.errors import CallbackError, UserError, shown
from fedsim.core.numerics import settled
from fedsim.core.types import RoundEnd
from fedsim.executors import Fleet
from fedsim.runs.build import Shared, prepare
from fedsim.runs.folder import RunFolder, disk_error
from fedsim.runs.progress import Progress
from fedsim.runs.resolve import devices_of
from fedsim.runs.resume import as_before, find_run, is_finished, read_status
from fedsim.runs.session import session
from fedsim.runs.trackers import check_trackers

if TYPE_CHECKING:
    from fedsim.runs.seeds import SeedRuns


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        id: its id: a hash of the config and of the content of data and model.
    """

    path: Path
    id: str

    def metrics(self) -> Any:
        """Its metrics as a `pandas.DataFrame`; see `fedsim.load_runs`."""
        from fedsim.analysis.load import load_runs

        return load_runs(self.path)

    def table(self) -> Any:
        """local / federated / central as a `pandas.DataFrame`."""
        from fedsim.analysis.scores import summary

        df = self.metrics()
        return summary(df, metric="accuracy" if (df["name"] == "accuracy").any() else "loss")


def run_folder_of(exp: Experiment, run_id: str) -> Path:
    """Where an experiment's run lies."""
    return results_of(exp) / exp.name / run_id


def run(
    exp: Experiment | dict[str, Any],
    *,
    progress: bool | Progress = True,
    shared: Shared | None = None,
    resume: str | Path | None = None,
    callback: Callable[[RoundEnd], object] | None = None,
) -> Run | SeedRuns:
    """Run an experiment, or resume it from its last checkpoint.

    Args:
        exp: the config, as `Experiment` or as the nested dict that YAML gives.
        progress: show progress on standard error; or where to show it.
        shared: examples and base that other runs in this process have in common with this one.
        resume: resume exactly this run: its folder, or its id under `exp.results`. Keys that the numbers depend on must be its
            own; `rounds` may be raised if no learning rate depends on them.
        callback: called in this process after each round that this call trains, once the round is logged and checkpointed. What
            it returns is ignored. An exception that it raises stops the run as Ctrl-C does, and is raised here: the same
            call resumes after that round.

    Returns:
        The run: its folder holds `config.yaml`, `metrics/`, the partition, the models and the figures. With `exp.seeds` a
        `fedsim.runs.seeds.SeedRuns`: the run of each seed, and mean and interval over them.

    Raises:
        UserError: for what the user can fix; nothing has been trained then.
        ClientError: if a client's training raised: its round, id and traceback.
    """
    if isinstance(exp, dict):
        exp = Experiment.from_dict(exp)
    if callback is not None and not callable(callback):
        raise UserError(
            f"callback: {shown(callback)} cannot be called; give a function of one argument, the round's end"
        )
    if exp.seeds is not None:
        for name, given in (("resume", resume), ("callback", callback)):
            if given is not None:
                raise UserError(
                    f"{name}: applies to a single run, and seeds={exp.seeds} asks for several; set seed instead"
                )
        from fedsim.runs.seeds import run_seeds  # brings pandas

        return run_seeds(exp, progress=progress if isinstance(progress, bool) else progress.show)
    with settled(devices_of(exp)[1]):
        steps = run_steps(exp, progress=progress, shared=shared, resume=resume, callback=callback)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value


def run_steps(
    exp: Experiment,
    *,
    progress: bool | Progress = True,
    shared: Shared | None = None,
    fleet: Fleet | None = None,
    resume: str | Path | None = None,
    callback: Callable[[RoundEnd], object] | None = None,
) -> Generator[None, None, Run]:
    """`run` for one seed, as a generator that yields while it waits for the other runs of its fleet."""
    kind, devices = devices_of(exp)
    if exp.client is not None:
        return (yield from _run_script(exp, devices, progress, resume, callback))
    check_trackers(exp.tracking.with_)
    place = None if resume is None else find_run(resume, exp)
    parts = prepare(exp, shared)
    if place is not None:
        parts = as_before(place, parts)
    exp = parts.exp
    run_id = parts.run_id() if place is None else place.resolve().name

    def begin(folder: RunFolder, show: Progress, status: dict[str, Any]) -> Iterator[None]:
        return session(parts, folder, show, kind, devices, status, shared or Shared(), fleet, callback)

    return (yield from _in_folder(exp, run_id, place, progress, resume is not None, begin))


def _run_script(
    exp: Experiment,
    devices: list[str],
    progress: bool | Progress,
    resume: str | Path | None,
    callback: Callable[[RoundEnd], object] | None,
) -> Generator[None, None, Run]:
    """The same for clients that are a user's script."""
    from fedsim.runs.scripts import script_parts, script_session

    check_trackers(exp.tracking.with_)
    place = None if resume is None else find_run(resume, exp)
    parts = script_parts(exp)
    run_id = parts.run_id()
    if place is not None and place.resolve().name != run_id:
        raise UserError(
            f"--resume: {place} is not the run of this script and config, whose id is {run_id}; leave --resume out for a run of its own"
        )

    def begin(folder: RunFolder, show: Progress, status: dict[str, Any]) -> Iterator[None]:
        return script_session(parts, folder, show, devices, status, callback)

    return (yield from _in_folder(exp, run_id, place, progress, resume is not None, begin))


def _in_folder(
    exp: Experiment,
    run_id: str,
    place: Path | None,
    progress: bool | Progress,
    resumed: bool,
    begin: Callable[[RunFolder, Progress, dict[str, Any]], Iterator[None]],
) -> Generator[None, None, Run]:
    """Lock the run's folder and, where the run is not finished, go on with it."""
    folder = RunFolder(place or run_folder_of(exp, run_id), results_of(exp))
    show = Progress(progress, exp.rounds) if isinstance(progress, bool) else progress
    try:
        unlocked = folder.lock()
        if unlocked is not None:
            show.warn(unlocked)
        status = read_status(folder, show)
        if not is_finished(folder, status, exp, resumed, show):
            yield from begin(folder, show, status)
    except CallbackError as error:
        for note in getattr(error, "__notes__", []):  # where it stopped
            error.cause.add_note(note)
        raise error.cause from None
    except UserError:
        folder.discard_new()
        raise
    except Exception as error:
        told = disk_error(error, folder.path)
        if told is None:
            raise
        raise told from error
    finally:
        show.end()
        folder.close()
    return Run(folder.path, run_id)
