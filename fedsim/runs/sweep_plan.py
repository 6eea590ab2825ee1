"""What a sweep's file asks for: its experiments and where they run. Reading it brings no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.config.experiment import Experiment, expand_path, read_yaml, results_of
from fedsim.core.errors import UserError, shown
from fedsim.core.section import near_key, plain
from fedsim.runs.tuning import Candidates, Score

_NOT_SWEPT = {
    "name": "the runs of a sweep lie in one folder",
    "results": "the runs of a sweep lie in one folder",
    "rounds": "it is no part of a run's id, so two numbers of rounds are one run; use sweeps of other names",
    "executor": "no number depends on it; give devices, workers and threads beside the grid",
    "tracking": "no number depends on it; set it in the experiment",
    "checkpoint": "no number depends on it; set it in the experiment",
    "aggregation": "no number depends on it; set it in the experiment",
}
_MOST = 20_000  # runs of a grid; more is a slip, and takes minutes to be read
_KEYS = ("name", "title", "experiment", "tuned", "grid", "list", "claims", "notes")
_KEYS += ("devices", "workers", "threads", "together")


@dataclass
class Job:
    """One run of a sweep.

    Attributes:
        settings: what is changed in the experiment: dotted key -> value.
        exp: the experiment with it.
        path: its run folder, once the data is known; None before, and where that failed.
        state: waiting | running | finished | failed.
        reason: why it failed, in a line.
        skipped: whether it was finished before.
        seconds: wall-clock in this call.
    """

    settings: dict[str, Any]
    exp: Experiment
    path: Path | None = None
    state: str = "waiting"
    reason: str | None = None
    skipped: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file asks for.

    Attributes:
        name: folder of its runs under `results`.
        keys: the swept keys, in the order of the file.
        settings: of each run: dotted key -> value.
        experiments: of each run.
        devices: where runs go; "auto" = all CUDA devices, else the CPU.
        workers: processes; None = one per device, on the CPU one per core.
        threads: CPU threads of each worker; None = the cores divided among them.
        together: runs whose packs share the passes of a worker, where possible.
        about: what the report shows: title, claims and notes, the file's, and the keys that were tuned.
        tuned: the sweep that runs first and gives this one the best values of some keys.
        retuned: this sweep with these values, given the scores of that one's runs.
    """

    name: str
    keys: list[str]
    settings: list[dict[str, Any]]
    experiments: list[Experiment]
    devices: list[str] | str = "auto"
    workers: int | None = None
    threads: int | None = None
    together: int = 1
    about: dict[str, Any] = field(default_factory=dict)
    tuned: Sweep | None = None
    retuned: Callable[[Sequence[Score]], Sweep] | None = None

    @property
    def path(self) -> Path:
        """The sweep's folder."""
        return results_of(self.experiments[0]) / self.name

    @classmethod
    def load(cls, file: str | Path, overrides: Sequence[str] = ()) -> Sweep:
        """The sweep of a YAML file.

        `experiment` is an experiment's file (looked up from the sweep's folder) or its sections; `grid` maps keys to lists of
        values, of which every combination is run, or is a list of such grids; `list` holds single settings. A value may be
        a whole section.

        Args:
            file: the YAML file.
            overrides: `key=value` for the experiment, under what the sweep sets.

        Raises:
            UserError: for anything invalid in it, with the settings of the run in question.
        """
        path = Path(expand_path(str(file), "FILE"))
        plan = cls.from_dict(read_yaml(path), path, overrides)
        command = " ".join(["fedsim sweep", str(file), *map(shlex.quote, overrides)])
        return dataclasses.replace(plan, about={**plan.about, "command": command})

    @classmethod
    def from_dict(
        cls,
        tree: dict[str, Any],
        file: str | Path = "sweep",
        overrides: Sequence[str] = (),
        known: Candidates | None = None,
    ) -> Sweep:
        """The sweep of what such a file holds.

        Args:
            tree: the file's keys.
            file: named in errors; paths are looked up from its folder.
            overrides: as in `load`.
            known: the values that `tuned` has found; None = not yet, so that the first ones stand for them.
        """
        path = Path(file)
        for key in tree:
            if key not in _KEYS:
                raise UserError(f"{path}: {near_key(str(key), _KEYS)}")
        base, folder = _experiment(path, tree.get("experiment"))
        asked, first = list(_settings(path, tree)), None
        if "tuned" in tree and known is None:
            first, known = _tuned(path, tree["tuned"], overrides)
        if not asked:
            raise UserError(f"{path}: names no run; give grid: {{key: [values]}} or list: [{{key: value}}]")
        name = str(tree.get("name") or base.get("name") or path.stem)
        settings: list[dict[str, Any]] = []
        experiments: list[Experiment] = []
        for one in asked:
            try:
                one = {**one, **known.best(one)} if known else one
                exp = Experiment.from_tree({**base, "name": name}, folder, overrides, one)
                settings += [one] if exp.seeds is None else [{**one, "seed": seed} for seed in exp.seeds]
                experiments += seed_by_seed(exp)
            except UserError as error:
                raise UserError(f"{path}, run with {said(one) or 'no setting'}: {error}") from None
        for section, why in _NOT_SWEPT.items():
            if len({repr(plain(getattr(exp, section))) for exp in experiments}) > 1:
                raise UserError(f"{path}: {section!r} cannot be swept: {why}")
        keys = list(dict.fromkeys(key for one in settings for key in one))
        # What the experiment says of devices and threads holds where the sweep says nothing.
        executor = experiments[0].executor
        own = getattr(executor, "devices", "auto")
        if own == "auto" and (one_device := getattr(executor, "device", "auto")) != "auto":
            own = [one_device]
        workers, threads, together = (_count(path, tree, key) for key in ("workers", "threads", "together"))
        devices = _devices(path, tree.get("devices")) or own
        about: dict[str, Any] = {key: str(tree[key]) for key in ("title", "notes") if key in tree}
        if "claims" in tree:
            from fedsim.analysis.claims import check_claims

            about["claims"] = check_claims(tree["claims"], keys, str(path))
        if known is not None:
            about["tuned"] = list(known.keys)  # a pair of a claim may differ in these
        threads = threads or executor.threads
        plan = cls(name, keys, settings, experiments, devices, workers, threads, together or 1, about)
        if first is None or known is None:
            return plan
        again = lambda scores: cls.from_dict(tree, file, overrides, dataclasses.replace(known, scores=scores))  # noqa: E731
        return dataclasses.replace(plan, tuned=first, retuned=again)


def seed_by_seed(exp: Experiment) -> list[Experiment]:
    """The experiment once for each of its seeds."""
    return [exp] if exp.seeds is None else [dataclasses.replace(exp, seeds=None, seed=seed) for seed in exp.seeds]


def _experiment(path: Path, found: Any) -> tuple[dict[str, Any], Path]:
    """The keys of the experiment that a sweep's file names or holds, and the folder that its paths are looked up from."""
    if isinstance(found, dict):
        return found, path.resolve().parent
    if not isinstance(found, str):
        raise UserError(f"{path}: experiment: {shown(found)} is neither an experiment's file nor its sections")
    beside = path.parent / found
    file = beside if beside.is_file() else Path(expand_path(found, f"{path}: experiment"))
    return read_yaml(file), file.resolve().parent


def _tuned(path: Path, found: Any, overrides: Sequence[str]) -> tuple[Sweep, Candidates]:
    """The sweep that a file's `tuned` names, and the values that it tries."""
    where = f"{path}: tuned"
    if not isinstance(found, dict) or found.keys() != {"file", "keys"}:
        raise UserError(f"{where}: {shown(found)} is not {{file: SWEEP.yaml, keys: [local.lr]}}")
    beside = path.parent / str(found["file"])
    first = Sweep.load(beside if beside.is_file() else found["file"], overrides)
    keys = found["keys"] if isinstance(found["keys"], list) else [found["keys"]]
    if unknown := [key for key in keys if not any(key in one for one in first.settings)]:
        raise UserError(f"{where}.keys: no run of {found['file']} sets {shown(unknown[0])}; add it to its grid")
    if first.tuned is not None:
        raise UserError(f"{where}: {found['file']} is tuned itself; name a sweep that is not")
    return first, Candidates(tuple(keys), first.settings)


def _count(path: Path, tree: Mapping[str, Any], key: str) -> int | None:
    value = tree.get(key)
    if value is not None and (type(value) is not int or not 1 <= value <= 1024):
        raise UserError(
            f"{path}: {key}: {shown(value)} is not a whole number from 1 to 1024; give one, or leave it out"
        )
    return value


def _devices(path: Path, value: Any) -> list[str] | str | None:
    if value in (None, "auto") or (isinstance(value, list) and value and all(isinstance(d, str) for d in value)):
        return value
    raise UserError(
        f"{path}: devices: {shown(value)} is not a list of devices, e.g. [cpu] or [cuda:0, cuda:1]; or auto"
    )


def _settings(path: Path, tree: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of each grid, then the list."""
    grids, single = tree.get("grid") or [], tree.get("list") or []
    if not isinstance(grids, (dict, list)) or not isinstance(single, list):
        raise UserError(
            f"{path}: grid is a mapping of keys to lists of values (or a list of such), list a list of settings"
        )
    for grid in [grids] if isinstance(grids, dict) else grids:
        if not isinstance(grid, dict):
            raise UserError(f"{path}: grid: {shown(grid)} is not a mapping of keys to lists of values")
        for key, values in grid.items():
            if not isinstance(values, list):
                raise UserError(f"{path}: grid.{key}: {shown(values)} is not a list of values; write [{values}]")
            if not values:
                raise UserError(f"{path}: grid.{key}: [] is empty; give one value or more, or leave the key out")
        if (count := math.prod(map(len, grid.values()))) > _MOST:
            raise UserError(f"{path}: grid: {count} combinations are more than {_MOST} runs; divide it into sweeps")
        yield from (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    for one in single:
        if not isinstance(one, dict):
            raise UserError(f"{path}: list: {shown(one)} is not a setting; write {{key: value}}")
        yield one


def said(settings: Mapping[str, Any]) -> str:
    """Settings in a few words: `alpha=0.1 seed=2`."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + " ".join(f"{k}={text(v)}" if k != "name" else str(v) for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(text(v) for v in value) + "]"
        return str(value)

    return " ".join(f"{key}={text(value)}" for key, value in settings.items())
