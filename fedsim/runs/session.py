"""One start of a run: set up, go through the modes, write what came out. The folder is all that outlives it."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

from fedsim.config.experiment import Experiment
from fedsim.core.errors import CallbackError, WorkerDied
from fedsim.core.files import CLIENT_FOLDERS, folder_names, read_checked, record
from fedsim.core.types import RoundEnd
from fedsim.executors.fleet import Fleet
from fedsim.models.projections import has_fast_float32
from fedsim.runs.build import Parts, Shared
from fedsim.runs.environment import changes, environment
from fedsim.runs.folder import RunFolder, disk_error
from fedsim.runs.modes import run_mode
from fedsim.runs.plan import MODES, recorded, resolve_plan
from fedsim.runs.predictions import ByRow, write_predictions
from fedsim.runs.progress import Progress
from fedsim.runs.resolve import work_of
from fedsim.runs.setup import Setup, set_up
from fedsim.runs.tracking import Tracking

_PRODUCTS = (
    *("config.yaml", "environment.json", "plan.json", "memory.json", "model.json", "privacy.json"),
    *("partition.npz", "partition.json", CLIENT_FOLDERS, "metrics", "scores.npz", "predictions.csv"),
    *("comparison.json", "figures/examples.md", "cross_site"),
)


class Status:
    """`status.json`: running, stopped, failed or finished, and the seconds of all starts together."""

    def __init__(self, folder: RunFolder, rounds: int, before: dict[str, Any]) -> None:
        self._folder, self._rounds, self._began = folder, rounds, time.monotonic()
        self._before = before["seconds"] if isinstance(before.get("seconds"), (int, float)) else 0.0

    def seconds(self) -> float:
        """Seconds that the run has taken."""
        return self._before + time.monotonic() - self._began

    def write(self, state: str, reason: str | None = None, figures: bool = True) -> None:
        """Say how the run stands; `figures` are drawn after everything else."""
        value = {"state": state, "rounds": self._rounds, "seconds": round(self.seconds(), 3)}
        value |= ({"reason": reason} if reason else {}) | ({} if figures else {"figures": False})
        self._folder.write_json("status.json", value)


def session(
    parts: Parts,
    folder: RunFolder,
    show: Progress,
    kind: str,
    devices: list[str],
    before: dict[str, Any],
    shared: Shared,
    fleet: Fleet | None,
    callback: Callable[[RoundEnd], object] | None,
) -> Iterator[None]:
    """Run an experiment to its end in a folder that is locked.

    Args:
        parts: config, examples and partition.
        folder, show: the run folder, and where progress is shown.
        kind, devices: serial | pool, and the device of each worker.
        before: `status.json` as the start before left it.
        shared: what other runs of this process have loaded.
        fleet: of runs whose packs share passes; None = this run alone.
        callback: called after each round.

    Yields:
        None, while it waits for the other runs of its fleet.
    """
    exp = parts.exp
    status = Status(folder, exp.rounds, before)
    plan, known = resolve_plan(exp, folder, devices)
    folder.clear()
    status.write("running")
    _write_inputs(parts, folder, show, devices, plan.threads)
    with contextlib.closing(Tracking(exp, folder)) as tracking:
        try:
            setup = yield from set_up(parts, folder, show, kind, devices, plan, known, shared, fleet)
            try:
                yield from _modes(setup, status, tracking, callback)
                _compare_memory(setup)
            finally:
                with contextlib.suppress(OSError):
                    setup.first.path.unlink(missing_ok=True)
                setup.executor.close()
                del setup  # the base need not be in memory while figures are drawn
        except BaseException as error:
            # Ctrl-C, a signal, the end of a fleet, or the user's own callback.
            stopped = not isinstance(error, Exception) or isinstance(error, CallbackError)
            reason = str(disk_error(error, folder.path) or error).split("\n")[0][:300] or type(error).__name__
            if stopped:
                error.add_note(f"stopped {_reached(exp, folder)}; run the same command to resume")
            with contextlib.suppress(OSError):  # the disk may be full
                status.write("stopped" if stopped else "failed", None if stopped else reason)
            if isinstance(error, WorkerDied):
                way = f"stopped {_reached(exp, folder)}; the same command resumes from there"
                raise WorkerDied(f"{error}\n{way}") from None
            raise
        gc.collect()
        record_files(exp, folder)
        status.write("finished", figures=False)
        draw_figures(folder, show)
        tracking.trackers.log_figures(folder.path / "figures", exp.rounds)
        status.write("finished")


def draw_figures(folder: RunFolder, show: Progress) -> None:
    """Draw the figures of a run."""
    from fedsim.analysis.plots import save_figures

    for path in save_figures(folder.path):
        show.note(f"figure: {path}")


def _write_inputs(parts: Parts, folder: RunFolder, show: Progress, devices: list[str], threads: int) -> None:
    """Write what the run is made of, and record it; a finished run's record of its files does not hold any more."""
    folder.record(files=None)
    folder.write_text("config.yaml", parts.exp.to_yaml())
    kernels = "oneDNN" if has_fast_float32() else "torch"
    about = {**environment(devices, threads), "frozen_float32_on_cpu": kernels}
    if _reached(parts.exp, folder) != "before training":
        before = folder.read_json("environment.json")
        if before is None:
            show.warn("environment.json: damaged, so what the earlier rounds were computed with is unknown")
        elif unlike := changes(before, about):
            show.warn(
                f"resuming on different hardware or library versions: results may differ in the last bits: {'; '.join(unlike)}"
            )
    folder.write_json("environment.json", about)
    folder.write_arrays("partition.npz", parts.partition.to_arrays())
    folder.write_json("partition.json", parts.report)
    names = folder_names(parts.partition.names or ())
    if unlike_names := {place: client for client, place in names.items() if place != client}:
        folder.write_json(CLIENT_FOLDERS, unlike_names)
    folder.record(rounds=parts.exp.rounds)


def _modes(
    setup: Setup, status: Status, tracking: Tracking, callback: Callable[[RoundEnd], object] | None
) -> Iterator[None]:
    """All modes, and the predictions of their models side by side."""
    parts, exp = setup.parts, setup.exp
    left = {m: exp.rounds - max((r for r, i in setup.checkpoints(m).kept() if i), default=0) for m in setup.modes}
    setup.show.plan({mode: (work_of(parts, mode), left[mode]) for mode in setup.modes})
    found: dict[str, ByRow] = {}
    for mode in setup.modes:
        found |= yield from run_mode(setup, mode, status.seconds, tracking, callback)
        status.write("running")
    write_predictions(setup.folder, parts.source, parts.tokens, exp.data.columns, found)
    if exp.evaluate.cross_site:
        from fedsim.analysis.cross_site import write_cross_site  # brings pandas

        held = write_cross_site(setup.folder.path)
        if without := [name for name in map(parts.partition.name, parts.clients) if name not in held]:
            names = f"{', '.join(without[:8])}{' ...' if len(without) > 8 else ''}"
            of = f"{len(without)} of {len(parts.clients)} clients have no validation examples of their own"
            setup.show.note(f"cross-site evaluation: {of}, and no column: {names}")


def _compare_memory(setup: Setup) -> None:
    """The highest memory in use, beside what the plan predicted."""
    peaks, predicted = setup.executor.peaks(), setup.plan.memory.get("predicted")
    where = "allocated on the GPU" if setup.devices[0].startswith("cuda") else "resident in the process"
    setup.folder.write_json("memory.json", {"kind": where, "predicted_bytes": predicted, "measured_bytes": peaks})
    if predicted is not None:
        each = ", ".join(f"{p / 1e6:,.1f}" for p in peaks)
        setup.show.note(f"peak memory: {each} MB, predicted {predicted / 1e6:,.1f} MB")


def _reached(exp: Experiment, folder: RunFolder) -> str:
    """How far a run has come, as its checkpoints tell."""
    for mode in (m for m in reversed(MODES) if m in exp.modes):
        kept = (folder.path / "checkpoints" / mode).glob("round-*/manifest.json")
        if rounds := [int(p.parent.name[6:]) for p in kept]:
            return f"after round {max(rounds)} ({mode})"
    return "before training" if "plan" not in recorded(folder) else "before round 1"


def record_files(exp: Experiment, folder: RunFolder) -> None:
    """Record sizes and checksums of what a finished run holds, so that later damage is found."""
    run = folder.path
    held = [f.relative_to(run).as_posix() for f in sorted((run / "checkpoints").rglob("*")) if f.is_file()]
    unsteady = ("checkpoints/run.json", "checkpoints/tracked.json")  # have checksums of their own, and change
    files = record(run, [*_PRODUCTS, *(name for name in held if name not in unsteady)])
    for mode in exp.modes:  # as they were when they were written
        files |= (read_checked(run / "checkpoints" / mode / "done.json") or {}).get("files", {})
    folder.record(files=files | folder.record().get("init", {}))
