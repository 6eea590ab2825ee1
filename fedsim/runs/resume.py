"""Finding the run that is resumed, and checking that it is the same experiment."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from fedsim.config.experiment import Experiment, expand_path, results_of
from fedsim.core.errors import UserError
from fedsim.core.files import SMALL, damage
from fedsim.runs.build import Parts, identity_of
from fedsim.runs.folder import RunFolder
from fedsim.runs.plan import recorded
from fedsim.runs.progress import Progress
from fedsim.runs.session import draw_figures


def find_run(name: str | Path, exp: Experiment) -> Path:
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


def as_before(place: Path, parts: Parts) -> Parts:
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


def read_status(folder: RunFolder, show: Progress) -> dict[str, Any]:
    """`status.json` of a run; {} if there is none, or it is damaged."""
    status = folder.read_json("status.json")
    if not isinstance(status, dict):
        if (folder.path / "status.json").is_file():
            show.warn(f"{folder.path / 'status.json'}: damaged, and written anew")
        return {}
    return status


def is_finished(folder: RunFolder, status: dict[str, Any], exp: Experiment, resume: bool, show: Progress) -> bool:
    """Whether a run has come to its end; then say so, and name what was damaged since.

    Raises:
        UserError: if the folder holds a run that cannot be resumed: of another number of rounds, or of an earlier layout.
    """
    path, said = folder.path, status.get("rounds")
    old = (path / "metrics.jsonl").exists()
    rounds = said if old else recorded(folder).get("rounds", said)
    rounds = rounds if isinstance(rounds, int) else None
    if rounds is not None and said not in (None, rounds):
        show.warn(f"{path / 'status.json'}: says {said} rounds, but the run was started with {rounds}")
    if rounds is not None and rounds != exp.rounds:
        _check_rounds(exp, path, rounds, resume)
    if status.get("state") != "finished" or rounds != exp.rounds:
        if old:
            way = "it can be read, not resumed; use another name or results folder to run it again"
            raise UserError(f"{path}: written by an earlier version of fedsim: {way}")
        return False
    if damaged := damage(path, None if resume else SMALL):
        way = "restore these files, or delete the folder to run it again"
        show.warn(f"{path}: finished, but damaged or missing since: {', '.join(damaged)}; {way}")
    show.note(f"already finished: {path}")
    if not status.get("figures", True) or not (path / "figures").is_dir():
        draw_figures(folder, show)
        folder.write_json("status.json", {k: v for k, v in status.items() if k != "figures"})
    return True


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
    if exp.client is not None:
        raise UserError(
            f"rounds: {exp.rounds}, but {path} was started with {before}, which its scripts were told; use another name"
        )
    if work.schedule != "constant" and work.horizon is None and work.schedule_over == "run":
        why = f"its learning rates reach local.min_lr after {before} rounds (local.schedule={work.schedule} without local.horizon)"
        way = "use another name, and set local.horizon or local.schedule=constant in runs that may grow"
        raise UserError(f"rounds: {exp.rounds}, but {path} was started with {before}, and {why}; {way}")
