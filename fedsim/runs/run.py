"""One experiment, start to end: build, run the modes, score the chosen models once on the test rows, export, report.

`run` is a function without global state: it can be called in a loop, in a notebook, twice in a row. Everything it starts
it ends, and the same call goes on from the last complete round of a run folder that is already there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.config.experiment import Experiment, expand_path, results_of
from fedsim.core.errors import CallbackError, UserError, shown
from fedsim.core.files import SMALL, damage, read_checked
from fedsim.core.numerics import settled
from fedsim.core.types import RoundEnd
from fedsim.executors.fleet import Member
from fedsim.runs.build import Parts, Shared, identity_of, prepare
from fedsim.runs.folder import RunFolder, disk_error
from fedsim.runs.progress import Progress
from fedsim.runs.resolve import devices_of
from fedsim.runs.session import Session, draw_figures
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
    member: Member | None = None,
    resume: str | Path | None = None,
    callback: Callable[[RoundEnd], object] | None = None,
) -> Run | SeedRuns:
    """Run an experiment, or resume it from the last complete round of its run folder.

    Args:
        exp: the config, as `Experiment` or as the nested dict that YAML gives.
        progress: show what goes on, on standard error; or where to show it.
        shared: rows and base that other runs in this process have in common with this one.
        member: of a fleet of runs whose packs share passes.
        resume: go on with exactly this run: its folder, or its id under `exp.results`. Keys that the numbers depend on must be
            its own; `rounds` may be raised where no learning rate depends on them.
        callback: called in this process after each round that this call trains, once the round is logged and checkpointed. What
            it returns is ignored. An exception that it raises stops the run as Ctrl-C does, and is raised here: the same
            call resumes after that round.

    Returns:
        The run: its folder holds `config.yaml`, `metrics.jsonl`, the partition, the models and the figures. With
        `exp.seeds` a `fedsim.runs.seeds.SeedRuns`: the run of each seed, and mean and interval over them.

    Raises:
        UserError: for what the user can put right; nothing has been trained then.
        ClientError: where a client's training raised: its round, id and traceback.
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
    kind, devices = devices_of(exp)
    # A fleet's runs take turns in one process: who starts the fleet settles it.
    with settled(devices) if member is None else nullcontext():
        return _run(exp, kind, devices, progress, shared, member, resume, callback)


def _run(
    exp: Experiment,
    kind: str,
    devices: list[str],
    progress: bool | Progress,
    shared: Shared | None,
    member: Member | None,
    resume: str | Path | None,
    callback: Callable[[RoundEnd], object] | None,
) -> Run:
    check_trackers(exp.tracking.with_)
    place = None if resume is None else _find_run(resume, exp)
    parts = prepare(exp, shared)
    if place is not None:
        parts = _as_before(place, parts)
    exp = parts.exp
    run_id = parts.run_id() if place is None else place.resolve().name
    folder = RunFolder(place or run_folder_of(exp, run_id), results_of(exp))
    show = Progress(progress, exp.rounds) if isinstance(progress, bool) else progress
    try:
        unlocked = folder.lock()
        if unlocked is not None:
            show.warn(unlocked)
        status = folder.read_json("status.json")
        if not isinstance(status, dict):
            if (folder.path / "status.json").is_file():
                show.warn(f"{folder.path / 'status.json'}: damaged, and written anew")
            status = {}
        rounds = _rounds_of(folder, status)
        if rounds is not None and status.get("rounds", rounds) != rounds:
            said = status["rounds"]
            show.warn(f"{folder.path / 'status.json'}: says {said} rounds, but the run was started with {rounds}")
        if rounds is not None and rounds != exp.rounds:
            _check_rounds(exp, folder.path, rounds, resume is not None)
        finished = status.get("state") == "finished" and rounds == exp.rounds
        damaged = damage(folder.path, SMALL if resume is None else None) if finished else []
        if damaged:
            way = "put back, or made anew by --resume" if resume is None else "made anew"
            show.warn(f"{folder.path}: finished, but damaged or missing since: {', '.join(damaged)}; to be {way}")
        if finished and not (damaged and resume is not None):
            show.note(f"already finished: {folder.path}")
            if not status.get("figures", True) or not (folder.path / "figures").is_dir():
                draw_figures(folder, show)
                folder.write_json("status.json", {k: v for k, v in status.items() if k != "figures"})
        else:
            Session(exp, parts, folder, show, kind, devices, status, shared or Shared(), member, callback).run()
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


def _find_run(name: str | Path, exp: Experiment) -> Path:
    """The folder of a run, from its path or its id.

    Raises:
        UserError: if there is none, or several.
    """
    path = Path(expand_path(str(name), "--resume"))
    if _is_run(path):
        return path
    root = results_of(exp)
    found = [path] if path.is_dir() else []
    if not found and len(path.parts) == 1 and root.is_dir():
        found = sorted(p / path for p in root.iterdir() if _is_run(p / path))
    if len(found) > 1:
        raise UserError(
            f"--resume: {str(name)!r} is the id of several runs: {', '.join(map(str, found))}; give a folder"
        )
    if not found or not _is_run(found[0]):
        raise UserError(
            f"--resume: {str(name)!r} is neither a run's folder nor the id of a run under {str(root)!r}; see fedsim list"
        )
    return found[0]


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "checkpoints").is_dir()


def _as_before(place: Path, parts: Parts) -> Parts:
    """The parts under the name of the run that goes on.

    Raises:
        UserError: if a key that the numbers depend on is not what it was, or the content of data or model is not.
    """
    from fedsim.analysis.configs import flatten_config

    run_id = place.resolve().name
    is_id = re.fullmatch(r"[0-9a-f]{12}", run_id) is not None
    try:
        before = Experiment.load(place / "config.yaml")
    except UserError as error:
        if is_id and parts.run_id() == run_id:
            return parts
        file = place / "config.yaml"
        raise UserError(f"--resume: {file} does not tell what the run was ({error}); put the file back") from None
    if is_id and parts.run_id() == run_id:  # whatever its config.yaml says by now
        return dataclasses.replace(parts, exp=dataclasses.replace(parts.exp, name=before.name))
    parts = dataclasses.replace(parts, exp=dataclasses.replace(parts.exp, name=before.name))
    old, new = (flatten_config(identity_of(exp)) for exp in (before, parts.exp))
    unlike = [key for key in {**old, **new} if repr(old.get(key)) != repr(new.get(key))]
    if unlike:
        both = [f"{key}: {_value(parts.exp, key)} (the run has {_value(before, key)})" for key in unlike]
        way = "take them back, or leave --resume out for a run of its own"
        raise UserError(f"--resume: {place} cannot go on with other numbers: {'; '.join(both)}; {way}")
    if is_id and parts.run_id() != run_id:
        way = "put the files back, or leave --resume out for a run of its own"
        raise UserError(
            f"--resume: {place} was made with other content of data or model files than is there now; {way}"
        )
    return parts


def _value(exp: Experiment, key: str) -> Any:
    """A config's value by its dotted key; "no such key" where the component has none."""
    value: Any = exp.to_dict()
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return "no such key"
        value = value[part]
    return json.dumps(value, ensure_ascii=False)


def _rounds_of(folder: RunFolder, status: dict[str, Any]) -> int | None:
    """The rounds a run was last started with; None where nothing tells. What is under a hash is asked first."""
    kept = read_checked(folder.path / "checkpoints" / "rounds.json")
    if kept is not None:
        return kept["rounds"]
    for mode in ("central", "federated", "local"):
        infos = [folder.done(mode), *reversed([info for _, info in folder.checkpoints(mode)])]
        if told := [info["rounds"] for info in infos if info]:
            return told[0]
    found = status.get("rounds")
    if found is None and (folder.path / "config.yaml").is_file():
        from fedsim.analysis.load import read_config

        with contextlib.suppress(UserError, OSError):
            found = read_config(folder.path).get("rounds")
    return found if isinstance(found, int) else None


def _check_rounds(exp: Experiment, path: Path, before: int, resume: bool) -> None:
    """Whether a run may go on to another number of rounds.

    Raises:
        UserError: if not.
    """
    work = exp.local
    if not resume:
        raise UserError(
            f"rounds: {exp.rounds}, but {path} was started with {before}; use another name or results folder, or --resume to raise them"
        )
    if exp.rounds < before:
        raise UserError(f"rounds: {exp.rounds}, but {path} was started with {before}; they can be raised, not lowered")
    if work.schedule != "constant" and work.horizon is None and work.schedule_over == "run":
        why = f"its learning rates reach local.min_lr after {before} rounds (local.schedule={work.schedule} without local.horizon)"
        way = "use another name, and set local.horizon or local.schedule=constant in runs that may grow"
        raise UserError(f"rounds: {exp.rounds}, but {path} was started with {before}, and {why}; {way}")
