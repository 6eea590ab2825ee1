"""One experiment, start to end: build, run the modes, score the chosen models once on the test rows, export, report.

`run` is a function without global state: it can be called in a loop, in a notebook, twice in a row. Everything it starts
it ends, and the same call goes on from the last complete round of a run folder that is already there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.algorithms import ALGORITHMS, Algorithm
from fedsim.build import CENTRAL, Parts, Shared, draw_of, identity_of, prepare
from fedsim.config import Experiment, results_of
from fedsim.data.partition import Partition, VirtualPartition
from fedsim.data.tokens import Tokens
from fedsim.errors import UserError, WorkerDied
from fedsim.executors import PoolExecutor, SerialExecutor
from fedsim.executors.fleet import FleetExecutor, Member
from fedsim.messages import codec
from fedsim.models import adapters, base
from fedsim.models.flat import Unsuitable, has_fast_float32
from fedsim.models.forward import Net, Recompute, layers_of
from fedsim.models.stacked import StackedNet, StreamNet, probe, probe_stream
from fedsim.numerics import kernels, settle_cpu, settled, threads, use_kernels
from fedsim.params import Layout, Params, clone
from fedsim.planner import Packs, Plan, choose_lanes, describe
from fedsim.predictions import ByRow, by_row, load_by_row, save_by_row, write_predictions
from fedsim.progress import Progress
from fedsim.rounds import CENTRAL as CENTRAL_CLIENT
from fedsim.rounds import (
    MERGED,
    SIMULATED,
    Choice,
    Chosen,
    Schedule,
    State,
    describe_faults,
    merged_rows,
    restore,
    run_rounds,
    state_info,
    state_tensors,
)
from fedsim.run_folder import (
    RunFolder,
    disk_error,
    environment,
    read_checked,
    replace_folder,
    save_arrays,
    write_checked,
)
from fedsim.sections import Simulation
from fedsim.seeding import stream
from fedsim.simulation import Life, by_number
from fedsim.store import Records, Store
from fedsim.trackers import Trackers, check_trackers
from fedsim.training.optim import Optim
from fedsim.training.trainer import Recipe, Sites, Trainer, filled, stores_of
from fedsim.types import Engine, Report, Row, Scores, Scoring

BY_ROW_SITES = 100  # sites alone whose last models are scored row by row; of more, only the chosen ones


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
        from fedsim.runs import load_runs

        return load_runs(self.path)

    def table(self) -> Any:
        """local / federated / central as a `pandas.DataFrame`."""
        from fedsim.runs import summary

        df = self.metrics()
        return summary(df, metric="accuracy" if (df["name"] == "accuracy").any() else "loss")


# ------------------------------------------------------------------------------------------------ parts


@dataclass
class Bundle:
    """All that a worker needs to make its trainer; pickles as handles to shared memory."""

    model: nn.Module
    adapter: str
    settings: dict[str, Any]
    task: str
    base_dropout: bool
    autocast: torch.dtype | None
    seed: int
    tokens: dict[str, Tokens]
    train: tuple[Tensor, Tensor] | VirtualPartition
    own: tuple[Tensor, Tensor] | None
    algorithms: dict[str, Algorithm]
    recipe: Recipe
    state: Path
    tokenizer: Any
    masters: bool = True
    packing: bool = False
    kernels: str = "off"

    def shared(self) -> list[Tensor]:
        """Tensors of row numbers that workers share; virtual clients have none, their rows are worked out anywhere."""
        return [] if isinstance(self.train, VirtualPartition) else [*self.train, *self.own]

    def attach(self) -> tuple[nn.Module, list[nn.Module]]:
        """Put the adapter on the base, in place."""
        keys = {"task": self.task, "seed": self.seed, "masters": self.masters}
        return adapters.attach(self.model, self.adapter, self.settings, **keys)

    def trainer(self, model: nn.Module, own: list[nn.Module], device: torch.device, engine: Engine) -> Trainer:
        """The trainer around a model that already has its adapter."""
        model.to(device)
        net: Net | StackedNet
        if engine.packed:
            net = StackedNet(model, own, task=self.task, device=device)
        elif self.packing:
            net = StreamNet(model, own, task=self.task, device=device, autocast=self.autocast)
        else:
            net = Net(model, own, task=self.task, device=device, base_dropout=self.base_dropout, autocast=self.autocast)
        sites = _sites(self.train, self.own)
        made = Trainer(net, self.tokens, sites, self.algorithms, self.recipe, self.seed, self.state, self.tokenizer)
        made.configure(engine)
        return made

    def guest(self, host: Trainer) -> Trainer:
        """A trainer of this run on the model of another's."""
        return host.guest(_sites(self.train, self.own), self.algorithms, self.recipe, self.seed, self.state)

    def why_not_packed(self, model: nn.Module, own: list[nn.Module]) -> str | None:
        """Why clients cannot train in lanes, found out on the CPU; None where they can."""
        if self.adapter == "none":
            return "the whole model is trained, of which a device holds one"
        if self.base_dropout:
            return "model.base_dropout draws for all rows of a pass at once"
        return _tried(StackedNet, probe, model, own, self.task)

    def check_packing(self, model: nn.Module, own: list[nn.Module]) -> None:
        """Whether rows of a whole model can lie end to end, found out on the CPU.

        Raises:
            UserError: if they cannot.
        """
        why = "model.base_dropout draws for padded batches" if self.base_dropout else None
        why = why or _tried(StreamNet, probe_stream, model, own, self.task)
        if why is not None:
            raise UserError(f"training.packing: true, but {why}; set it to false")

    def __call__(self, device: torch.device, engine: Engine) -> Trainer:
        # In a worker, whose torch is as it comes: what the main process was told of kernels holds here too.
        settle_cpu() if device.type == "cpu" else use_kernels(self.kernels)
        with base.quiet():
            return self.trainer(*self.attach(), device, engine)


def _tried(kind: type, trial: Callable[[Any], None], model: nn.Module, own: list[nn.Module], task: str) -> str | None:
    """Why rows cannot lie end to end in a model, or None where they can."""
    try:
        net = kind(model, own, task=task, device=torch.device("cpu"))
        try:
            trial(net)
        finally:
            net.release()
    except Unsuitable as reason:
        return str(reason)
    return None


def _rows(offsets: Tensor, indices: Tensor, client: int) -> np.ndarray:
    return indices.numpy()[int(offsets[client]) : int(offsets[client + 1])]


def _sites(train: tuple[Tensor, Tensor] | VirtualPartition, own: tuple[Tensor, Tensor] | None) -> Sites:
    """What a trainer is told of the clients' rows; no virtual client has validation rows of its own."""
    if isinstance(train, VirtualPartition):
        return Sites(train.rows, lambda client: np.empty(0, dtype=np.int64), range(0), train.all_rows)
    offsets, indices = train
    return Sites(
        functools.partial(_rows, offsets, indices),
        functools.partial(_rows, *own),
        range(len(offsets) - 1),
        lambda: np.sort(indices.numpy()),
    )


def recipe_of(exp: Experiment) -> Recipe:
    """How the experiment's clients train and are scored."""
    work, ev = exp.local, exp.evaluate
    names = [f.name for f in dataclasses.fields(Optim)]
    keys = {n: getattr(work, n) for n in names}
    # Alone and central nothing is merged: rounds are only places where they are scored, so the optimiser lives on.
    keep = {"federated": work.keep_state, "local": True, "central": True}
    return Recipe(
        Optim(**{**keys, "betas": tuple(work.betas)}),
        draw_of(exp),
        work.micro_batch or work.batch_size,
        work.schedule_over,
        work.horizon,
        keep,
        ev.every_steps,
        ev.batch_size,
        ev.generate,
        ev.max_new_tokens,
        chunk=exp.aggregation.chunk_mb * (1 << 18),
        up=exp.messages.up,
        down=exp.messages.down,
        error_feedback=exp.messages.error_feedback,
        row_tokens=exp.data.max_length if exp.training.packing else None,
        policy=exp.faults.policy,
        max_norm=exp.faults.max_norm,
    )


def life_of(parts: Parts) -> Life | None:
    """The clients' simulated life, or None where the config says nothing of it.

    Raises:
        UserError: for a client that is not there, or is not named where all have to be.
    """
    exp, partition = parts.exp, parts.partition
    if exp.simulation == Simulation():
        return None
    keys = {"availability": exp.simulation.availability, "speeds": exp.simulation.speeds}
    for key, needed in (("availability", ()), ("speeds", parts.clients.tolist())):
        if isinstance(keys[key], dict):
            names = [partition.name(c) for c in range(partition.num_clients)]
            keys[key] = by_number(keys[key], names, needed, f"simulation.{key}")
        elif isinstance(keys[key], list):
            keys[key] = tuple(keys[key])
    sim = exp.simulation
    return Life(exp.seed, partition.name, drop=sim.drop, deadline_s=sim.deadline_s, late=sim.late, **keys)


def schedule_of(parts: Parts, mode: str) -> Schedule:
    """Who trains when and how much, for one mode."""
    exp, partition = parts.exp, parts.partition
    clients = parts.clients
    size = len(clients) if exp.cohort.size == "all" else exp.cohort.size
    lengths = parts.tokens["train"].lengths

    def mean_length(client: int) -> float:
        return float(lengths.mean() if client == CENTRAL_CLIENT else lengths[partition.rows(client)].mean())

    return Schedule(
        mode=mode,
        seed=exp.seed,
        rounds=exp.rounds,
        clients=clients,
        size=size,
        name=partition.name,
        sizes=partition.sizes,
        count=draw_of(exp).count,
        steps=exp.local.steps,
        epochs=exp.local.epochs or 1,
        batch_size=exp.local.batch_size,
        match=exp.central.match,
        weights=exp.algorithm.weights,
        length=mean_length,
        every_rounds=exp.evaluate.every_rounds,
        scores_clients=exp.evaluate.clients,
        central_rows=len(partition.kept) if isinstance(partition, VirtualPartition) else None,
        life=life_of(parts),
    )


def devices_of(exp: Experiment) -> tuple[str, list[str]]:
    """(serial | pool, the device of each worker) for this machine.

    Raises:
        UserError: for a device that is not there, or a type it cannot compute in.
    """
    ex = exp.executor
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if ex.name == "serial":
        kind, devices = "serial", [(cuda[0] if cuda else "cpu") if ex.device == "auto" else ex.device]
    else:
        given = getattr(ex, "devices", "auto")
        devices = (cuda or ["cpu"]) if given == "auto" else list(given)
        count = ex.workers or len(devices)
        kind = "serial" if ex.name == "auto" and count == 1 else "pool"
        devices = [devices[i % len(devices)] for i in range(max(count, len(devices)) if ex.name == "pool" else count)]
    devices = ["cuda:0" if d == "cuda" else d for d in devices]
    if exp.aggregation.device == "cuda" and not all(d.startswith("cuda") for d in devices):
        raise UserError(f"aggregation.device: 'cuda', but training is on {', '.join(devices)}; use auto or cpu")
    for device in devices:
        if device.startswith("cuda") and device not in cuda:
            raise UserError(f"executor: {device!r} is not on this machine, which has: {', '.join(['cpu', *cuda])}")
        if device in cuda and exp.model.dtype == "bfloat16" and torch.cuda.get_device_capability(device)[0] < 8:
            name = torch.cuda.get_device_name(device)
            raise UserError(
                f"model.dtype: 'bfloat16', which {device} ({name}) does not compute in; use float32 or float16"
            )
    return kind, devices


WORKER_BYTES = 300 << 20  # of memory of its own: Python with its libraries, measured on the CPU


def check_memory(devices: list[str], base_bytes: int, whole: bool) -> None:
    """Whether a machine holds these workers, before they are started; an estimate from below.

    Args:
        devices: of each worker.
        base_bytes: of the base. CPU workers share it, a GPU holds it once a worker; where the whole model is trained each
            worker has weights, gradient and two moments of its own.
        whole: whether the whole model is trained.

    Raises:
        UserError: where they need more than is free.
    """
    for device in dict.fromkeys(devices):
        count, free = devices.count(device), free_memory(device)
        each = WORKER_BYTES + (4 * base_bytes if whole else base_bytes if device.startswith("cuda") else 0)
        if count > 1 and free is not None and count * each > free:
            fit = max(1, free // each)
            raise UserError(
                f"executor.workers: {count} on {device} need at least {count * each / 2**30:.1f} GiB ({each / 2**30:.1f} each), {free / 2**30:.1f} are free; give at most {fit}"
            )


# ------------------------------------------------------------------------------------------------ the run


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
) -> Run:
    """Run an experiment, or go on with it from the last complete round of its run folder.

    Args:
        exp: the config, as `Experiment` or as the nested dict that YAML gives.
        progress: show what goes on, on standard error; or where to show it.
        shared: rows and base that other runs in this process have in common with this one.
        member: of a fleet of runs whose packs share passes.
        resume: go on with exactly this run: its folder, or its id under `exp.results`. Keys that the numbers depend on must be
            its own; `rounds` may be raised where no learning rate depends on them.

    Returns:
        The run: its folder holds `config.yaml`, `metrics.jsonl`, the partition, the models and the figures.

    Raises:
        UserError: for what the user can put right; nothing has been trained then.
        ClientError: where a client's training raised: its round, id and traceback.
    """
    if isinstance(exp, dict):
        exp = Experiment.from_dict(exp)
    kind, devices = devices_of(exp)
    # A fleet's runs take turns in one process: who starts the fleet settles it.
    with settled(devices) if member is None else nullcontext():
        return _run(exp, kind, devices, progress, shared, member, resume)


def _run(
    exp: Experiment,
    kind: str,
    devices: list[str],
    progress: bool | Progress,
    shared: Shared | None,
    member: Member | None,
    resume: str | Path | None,
) -> Run:
    check_trackers(exp.tracking.with_)
    place = None if resume is None else _find_run(resume, exp)
    parts = prepare(exp, shared)
    if place is not None:
        parts = _as_before(place, parts)
    exp = parts.exp
    run_id = parts.run_id() if place is None else place.resolve().name
    folder = RunFolder(place or run_folder_of(exp, run_id))
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
        if rounds is not None and rounds != exp.rounds:
            _check_rounds(exp, folder.path, rounds, resume is not None)
        finished = status.get("state") == "finished" and rounds == exp.rounds
        damaged = folder.damaged(_kept(folder), content=False) if finished else []
        if damaged:
            way = "put back, or made anew by --resume" if resume is None else "made anew"
            show.warn(f"{folder.path}: finished, but damaged or missing since: {', '.join(damaged)}; to be {way}")
        if finished and not (damaged and resume is not None):
            show.note(f"already finished: {folder.path}")
            if not status.get("figures", True) or not (folder.path / "figures").is_dir():
                _draw(folder, show)
                folder.write_json("status.json", {k: v for k, v in status.items() if k != "figures"})
        else:
            _Session(exp, parts, folder, show, kind, devices, status, shared or Shared(), member).run()
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
    path = Path(name).expanduser()
    if (path / "config.yaml").is_file():
        return path
    root = results_of(exp)
    found = [path] if path.is_dir() else []
    if not found and len(path.parts) == 1 and root.is_dir():
        found = sorted(p / path for p in root.iterdir() if (p / path / "config.yaml").is_file())
    if len(found) > 1:
        raise UserError(
            f"--resume: {str(name)!r} is the id of several runs: {', '.join(map(str, found))}; give a folder"
        )
    if not found or not (found[0] / "config.yaml").is_file():
        raise UserError(
            f"--resume: {str(name)!r} is neither a run's folder nor the id of a run under {str(root)!r}; see fedsim list"
        )
    return found[0]


def _as_before(place: Path, parts: Parts) -> Parts:
    """The parts under the name of the run that goes on.

    Raises:
        UserError: if a key that the numbers depend on is not what it was, or the content of data or model is not.
    """
    from fedsim.runs import flatten_config

    before = Experiment.load(place / "config.yaml")
    parts = dataclasses.replace(parts, exp=dataclasses.replace(parts.exp, name=before.name))
    old, new = (flatten_config(identity_of(exp)) for exp in (before, parts.exp))
    unlike = [key for key in {**old, **new} if repr(old.get(key)) != repr(new.get(key))]
    if unlike:
        both = [f"{key}: {_value(parts.exp, key)} (the run has {_value(before, key)})" for key in unlike]
        way = "take them back, or leave --resume out for a run of its own"
        raise UserError(f"--resume: {place} cannot go on with other numbers: {'; '.join(both)}; {way}")
    run_id = place.resolve().name
    if re.fullmatch(r"[0-9a-f]{12}", run_id) and parts.run_id() != run_id:
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
    """The rounds a run was last started with; None where nothing tells."""
    found = status.get("rounds")
    if found is None and (folder.path / "config.yaml").is_file():
        from fedsim.runs import read_config

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


def _kept(folder: RunFolder) -> dict[str, list[int]]:
    """Files that a finished run holds, with sizes, where that was written down."""
    return read_checked(folder.path / "checkpoints" / "files.json") or {}


class _Session:
    """One call of `run`: what its steps share. Nothing of it outlives the call but the folder."""

    def __init__(
        self,
        exp: Experiment,
        parts: Parts,
        folder: RunFolder,
        show: Progress,
        kind: str,
        devices: list[str],
        status: dict,
        shared: Shared,
        member: Member | None,
    ) -> None:
        self.exp, self.parts, self.folder, self.show = exp, parts, folder, show
        self.shared, self.member = shared, member
        self.kind, self.devices, self.status = kind, devices, status
        self.before, self.began = float(status.get("seconds", 0.0)), time.monotonic()
        self.choice = Choice(exp.best.metric, exp.best.mode)
        self.initial: list[Row] | None = None
        self.by_row: dict[str, ByRow] = {}
        self.at: tuple[str, int] | None = None  # the mode at work and its last committed round
        self.costs: list[tuple[list[Row], float]] = []  # what checkpoints took, not logged yet
        self.exported: list[str] = []

    # ------------------------------------------------------------------------------------------ start to end

    def run(self) -> None:
        exp, folder = self.exp, self.folder
        self.plan = self._plan()
        folder.clear()
        self._write_inputs()
        self.trackers = Trackers(exp.tracking.with_, exp.name, folder.path, exp.to_dict())
        executor = None
        try:
            executor = self._build()
            end = 0
            for mode in self._modes():
                end = self._mode(mode, end, executor)
            folder.cut_metrics(end)
            parts = self.parts
            write_predictions(folder, parts.source, parts.tokens, exp.data.columns, self.by_row)
            self._compare_memory(executor)
        except BaseException as error:
            stopped = not isinstance(error, Exception)  # Ctrl-C, a signal, or the end of a fleet
            reason = str(disk_error(error, folder.path) or error).split("\n")[0][:300] or type(error).__name__
            if stopped:
                error.add_note(self._stopped_at())
            with contextlib.suppress(OSError):  # the disk may be full
                self._status("stopped" if stopped else "failed", None if stopped else reason)
            if isinstance(error, WorkerDied):
                raise WorkerDied(f"{error}\n{self._goes_on()}") from None
            raise
        finally:
            with contextlib.suppress(OSError):
                (folder.path / "checkpoints" / "start.bin").unlink(missing_ok=True)
            if executor is not None:
                executor.close()
            self.trackers.close()
            # The base need not lie in memory while figures are drawn.
            executor = self.executor = self.model = self.bundle = None
        gc.collect()
        self._note_files()
        self._status("finished", figures=False)
        _draw(self.folder, self.show)
        self._status("finished")

    def _goes_on(self) -> str:
        """Where the next start takes the run up."""
        for mode in ("central", "federated", "local"):
            if rounds := [r for r, info in self.folder.checkpoints(mode) if info is not None]:
                return f"the last checkpoint is of round {rounds[-1]} ({mode}); the same command goes on from it"
        return "there is no checkpoint yet: the same command starts from the beginning"

    def _plan(self) -> Plan:
        """What is resolved at the first start and holds for every resume: threads and lanes decide the last bits."""
        known = self._known_plan()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads, micro = self.exp.executor.threads, self.exp.local.micro_batch or self.exp.local.batch_size
        self.planned = known is not None
        fields = {f.name for f in dataclasses.fields(Plan)}
        if known is not None and not (isinstance(known, dict) and "threads" in known and fields.issuperset(known)):
            way = "put it back, or delete the run folder to start anew"
            raise UserError(f"{self.folder.path / 'plan.json'}: holds no plan of this version; {way}")
        if known is None:
            return Plan(threads or max(1, cores // len(self.devices)), micro_batch=micro)
        if threads is not None and threads != known["threads"]:
            way = "the run was started with another number, which its last bits depend on; leave the key out, or use another name"
            raise UserError(f"executor.threads: {threads}, but {self.folder.path.name} has {known['threads']}: {way}")
        return Plan(**{"micro_batch": micro, **known})

    def _known_plan(self) -> dict[str, Any] | None:
        """The plan that rounds were trained by: `plan.json`, unless it is not what the checked copy or the checkpoints say."""
        folder, names = self.folder, {f.name for f in dataclasses.fields(Plan)}
        found = folder.read_json("plan.json")
        kept = read_checked(folder.path / "checkpoints" / "plan.json")
        for mode in reversed(self._modes()):
            infos = [folder.done(mode), *reversed([info for _, info in folder.checkpoints(mode)])]
            kept = kept or next((info["plan"] for info in infos if info), None)
        if kept is None:  # of a start that came to no plan
            whole = isinstance(found, dict) and isinstance(found.get("threads"), int) and names.issuperset(found)
            return found if whole else None
        if found != kept:
            self.show.warn("plan.json: damaged or missing, and taken from the last checkpoint")
            folder.write_json("plan.json", kept)
        return kept

    def _save_plan(self) -> None:
        value = dataclasses.asdict(self.plan)
        write_checked(self.folder.path / "checkpoints" / "plan.json", value)
        self.folder.write_json("plan.json", value)

    def _write_inputs(self) -> None:
        folder, parts = self.folder, self.parts
        folder.write_text("config.yaml", self.exp.to_yaml())
        kernels = "oneDNN" if has_fast_float32() else "torch"
        about = {**environment(self.devices, self.plan.threads), "frozen_float32_on_cpu": kernels}
        self._compare_environment(about)
        folder.write_json("environment.json", about)
        save_arrays(folder, "partition.npz", parts.partition.to_arrays())
        folder.write_json("partition.json", parts.report)
        self._status("running")

    def _compare_environment(self, now: dict[str, Any]) -> None:
        """Say where rounds that are done were computed otherwise than those to come."""
        before = self.folder.read_json("environment.json")
        if not isinstance(before, dict) or not any(self.folder.checkpoints(mode) for mode in self._modes()):
            return

        def of(about: dict[str, Any]) -> dict[str, Any]:
            kinds = sorted({str(d).split(":")[0] for d in about.get("devices") or []})
            cuda = {"GPU": ", ".join(sorted(set(about.get("gpus") or [])))} if "cuda" in kinds else {}
            cpu = {"kernels": about.get("frozen_float32_on_cpu"), "CPU": about.get("cpu")} if "cpu" in kinds else {}
            found = about.get("versions") or {}
            return {"device": ", ".join(kinds), **cuda, **cpu} | {
                n: found.get(n) for n in ("torch", "transformers", "peft")
            }

        old, new = of(before), of(now)
        unlike = [f"{k} {old[k]} then, {new[k]} now" for k in old if k in new and old[k] != new[k]]
        if unlike:
            self.show.warn(f"goes on elsewhere, so the last bits may differ from those of one go: {'; '.join(unlike)}")

    def _modes(self) -> list[str]:
        return [m for m in ("local", "federated", "central") if m in self.exp.modes]

    def _stopped_at(self) -> str:
        mode, round = self.at or ("", 0)
        where = (
            f"after round {round} of {mode}" if round else f"before round 1 of {mode}" if mode else "before training"
        )
        return f"stopped {where}; the same command goes on from there"

    def _note_files(self) -> None:
        """Write down what a finished run holds, so that what is lost later can be told."""
        files = self.folder.files(["metrics.jsonl", "scores.npz", "predictions.csv", "comparison.json"])
        for mode in self._modes():
            files |= (self.folder.done(mode) or {}).get("files", {})
        write_checked(self.folder.path / "checkpoints" / "files.json", files)

    def _status(self, state: str, reason: str | None = None, figures: bool = True) -> None:
        value = {"state": state, "rounds": self.exp.rounds, "seconds": round(self._seconds(), 3)}
        value |= ({"reason": reason} if reason else {}) | ({} if figures else {"figures": False})
        self.folder.write_json("status.json", value)

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def _build(self) -> SerialExecutor | PoolExecutor:
        """Load the base once, start the executor, attach the adapter, and say what is trained and what travels."""
        exp, parts = self.exp, self.parts
        whole = exp.adapter.name == "none"
        sixteen = exp.model.dtype in ("bfloat16", "float16")
        self.show.note(f"loading {exp.model.path}")
        model = self.shared.base(parts)
        (self.folder.path / "checkpoints").mkdir(exist_ok=True)
        settings = exp.to_dict()["adapter"]
        settings.pop("name")
        self.bundle = Bundle(
            model=model,
            adapter=exp.adapter.name,
            settings=settings,
            task=exp.model.task,
            base_dropout=exp.model.base_dropout,
            autocast=getattr(torch, exp.model.dtype) if whole and sixteen and exp.training.master_weights else None,
            seed=exp.seed,
            tokens=parts.tokens,
            train=_shareable(parts.partition),
            own=None if parts.own is None else _shareable(parts.own),
            algorithms={m: ALGORITHMS["local" if m != "federated" else exp.algorithm.name]() for m in exp.modes},
            recipe=recipe_of(exp),
            state=self.folder.path / "checkpoints",
            tokenizer=parts.tokenizer,
            masters=exp.training.master_weights,
            packing=exp.training.packing,
            kernels=kernels(),
        )
        home = "cpu" if exp.aggregation.device == "cpu" else None
        executor: SerialExecutor | PoolExecutor | FleetExecutor
        if self.kind == "pool":
            check_memory(self.devices, sum(p.nbytes for p in model.parameters()), whole)
            # Workers are sent modules of their own, on which nothing is put here: one that follows a dead one starts late. A
            # whole model's weights are those of the global parameters.
            if not whole:
                base.share_memory(model)
            bare = base.blank(model) if whole else base.borrow(model)
            base.share_memory(bare)  # its buffers
            for shared in self.bundle.shared():
                shared.share_memory_()
            for tokens in parts.tokens.values():
                tokens.share()
            made = dataclasses.replace(self.bundle, model=bare)
            watch = {"hang_s": exp.executor.hang_s, "note": self.show.warn}
            executor = PoolExecutor(made, self.devices, self.plan.threads, home, **watch)
        try:
            lent = base.memory_of(model)
            with threads(self.plan.threads):
                self.model, own = self.bundle.attach()
            if not whole:  # a head of the base that is trained; exports write into the trained parameters
                base.own_memory(adapters.trained(self.model).values(), lent)
            if not self.planned and exp.training.lanes != 1:
                self.plan.why_not = self.bundle.why_not_packed(self.model, own)
                self.plan.packed = self.plan.why_not is None
            if exp.training.packing:
                self.bundle.check_packing(self.model, own)
            if exp.training.checkpointing is True:
                Recompute(self.model, lambda: False).release()  # here, and not in a worker, it is told to the user
            trained = Layout.of(adapters.trained(self.model))
            self.layout = trained.sums
            self.stores = stores_of(self.bundle.state, self.bundle.algorithms, trained, self.bundle.recipe)
            if self.kind == "serial":

                def make(device: torch.device, engine: Engine) -> Trainer:
                    return self.bundle.trainer(self.model, own, device, engine)

                if self.member is not None:
                    executor = self.member.make_executor(make, self.bundle.guest)
                else:
                    executor = SerialExecutor(make, self.devices[0], self.plan.threads, home)
            self._describe(adapters.trained(self.model))
            self._keep_start()
            algorithm = self.bundle.algorithms.get("federated")
            example = self.layout.views(torch.empty(self.layout.numel, dtype=self.layout.dtype, device="meta"))
            server = Layout.of(algorithm.init(example)[0] if algorithm else {})
            merges = any(a.merges for a in self.bundle.algorithms.values())
            executor.start(self.layout, server, self.plan.engine, merges)
            self.executor = executor
            self._read(self.first, 0, executor.weights)
            if whole:
                self._lend(executor.weights)
            executor.broadcast(executor.weights, self._server(executor.weights))
            self._choose_lanes(executor)
        except BaseException:
            if self.kind == "pool":
                executor.close()
            raise
        return executor

    def _keep_start(self) -> None:
        """Write what training starts from: `init/`, a folder that reloads, and the same as one record.

        Neither stays in memory: a whole model's would be one copy too many.
        """
        self.first = Store(self.folder.path / "checkpoints" / "start.bin", self.layout.numel, self.layout.dtype)
        start = 0
        for parameter in adapters.trained(self.model).values():
            self.first.write_at(0, start, parameter.data.reshape(-1))
            start += parameter.numel()
        kept = read_checked(self.folder.path / "checkpoints" / "init.json")
        if kept is None or self.folder.damaged(kept) or not (self.folder.path / "init").is_dir():
            self._save_model(None, self.folder.path / "init")
            write_checked(self.folder.path / "checkpoints" / "init.json", self.folder.files(["init"]))

    def _read(self, store: Store, record: int, into: Tensor) -> None:
        """Copy parameters from a record into a flat vector, a chunk at a time."""
        for chunk in self.layout.chunks(self.bundle.recipe.chunk):
            into[chunk.span].copy_(store.read(record, chunk.start, chunk.stop))

    def _lend(self, flat: Tensor) -> None:
        """This process's whole model has the global parameters as its own; what it was loaded into is let go.

        Where it trains here, the trainer exchanges them for its own before each pass.
        """
        if self.kind == "pool":
            for name, view in self.layout.views(flat).items():
                self.model.get_parameter(name).data = view

    def _server(self, flat: Tensor) -> Params:
        algorithm = self.bundle.algorithms.get("federated")
        return clone(algorithm.init(self.layout.views(flat))[0]) if algorithm else {}

    def _describe(self, params: Params) -> None:
        about = adapters.describe(self.model, params)
        shapes, messages = list(self.layout.shapes.values()), self.exp.messages
        dtype = next(iter(params.values())).dtype
        up, down = (codec(name).nbytes(shapes, dtype) for name in (messages.up, messages.down))
        self.bytes_of = (up.total, down.total)
        about |= {"bytes_up": up.total, "bytes_down": down.total, "up": vars(up), "down": vars(down)}
        kept = {m: self.stores[m].nbytes for m in self.exp.modes}
        self.folder.write_json("model.json", {**about, "adapter": self.exp.adapter.name, "kept_bytes_per_client": kept})
        how = [f" as {name}" if name else "" for name in (messages.up, messages.down)]
        self.show.note(
            f"{self.exp.adapter.name} on {self.exp.model.path}: {about['trained']:,} of {about['parameters']:,} parameters are trained "
            f"({about['per_cent']:.2f} %); a client sends {up.total / 1e6:.2f} MB{how[0]} and receives {down.total / 1e6:.2f} MB{how[1]} a round"
        )
        if any(kept.values()):
            # A round writes beside what checkpoints refer to.
            most = self.exp.checkpoint.keep + 1 + (self.exp.checkpoint.every > 1)
            records = {m: most * (1 if m == "central" else len(self.parts.clients)) for m in kept}
            each = ", ".join(f"{m} {b / 1e6:,.1f} MB a client" for m, b in kept.items() if b)
            total = sum(b * records[m] for m, b in kept.items()) / 1e6
            self.show.note(f"kept from round to round in files: {each}; {total:,.1f} MB at most in all")
        report = self.parts.report
        skew = f"mean JS divergence {report['js_mean']:.3f} bits, size Gini {report['size_gini']:.2f}"
        self.show.note(
            f"{len(self.parts.clients)} clients, {report['rows']} rows, {skew}; {self.kind} on {', '.join(self.devices)}, {self.plan.threads} thread(s)"
        )
        tokenizer = self.parts.tokenizer
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            self.show.note(f"rows are padded with the end-of-text token {tokenizer.eos_token!r}")
        if "overlap" in report["notes"]:
            self.show.note(f"virtual clients: {report['notes']['overlap']}")
        if report["empty_clients"]:
            names = report["empty_clients"]
            self.show.note(
                f"left out, no rows: {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}"
            )
        for split, why in report["left_out"].items():
            self.show.note(f"{split}: " + ", ".join(f"{n} rows left out ({k})" for k, n in why.items()))
        for split, n in report["truncated"].items():
            self.show.note(f"{split}: {n} rows cut to data.max_length={self.exp.data.max_length}")

    def _choose_lanes(self, executor: SerialExecutor | PoolExecutor) -> None:
        """Resolve the plan at the run's first start, and show it."""
        exp, plan, device = self.exp, self.plan, self.devices[0]
        if not self.planned:
            plan.checkpointing = exp.training.checkpointing is True
            whole = exp.adapter.name == "none"
            if plan.packed or whole:
                on_gpu, here = device.startswith("cuda"), self.devices.count(device)
                frozen = [*self.model.buffers(), *([] if whole else self.model.parameters())]
                choose_lanes(
                    plan,
                    self._first_packs(),
                    executor.measure,
                    executor.configure,
                    workers=len(self.devices),
                    lanes=1 if whole else exp.training.lanes,
                    checkpointing=exp.training.checkpointing if layers_of(self.model) else False,
                    base_bytes=sum(t.nbytes for t in frozen),
                    free=None if (free := free_memory(device)) is None else free // here,
                    # A whole model's weights are there already, and are counted with its gradient and moments.
                    resident=executor.peaks()[0] - (self.layout.nbytes if whole and not on_gpu else 0),
                    on_gpu=on_gpu,
                )
                if whole:
                    plan.memory |= dict.fromkeys(("global", "sum"), self.layout.nbytes)
                    plan.memory["chunk"] = min(self.layout.nbytes, 4 * (self.bundle.recipe.chunk or 0))
            else:
                executor.configure(plan.engine)
            self._save_plan()
        for line in describe(plan, ", ".join(self.devices)):
            self.show.note(line)

    def _compare_memory(self, executor: SerialExecutor | PoolExecutor) -> None:
        """The highest memory in use, beside what the plan predicted."""
        peaks = executor.peaks()
        value = {"kind": "allocated on the GPU" if self.devices[0].startswith("cuda") else "resident in the process"}
        value |= {"predicted_bytes": self.plan.memory.get("predicted"), "measured_bytes": peaks}
        self.folder.write_json("memory.json", value)
        if self.plan.memory:
            each = ", ".join(f"{p / 1e6:,.1f}" for p in peaks)
            self.show.note(f"peak memory: {each} MB, predicted {self.plan.memory['predicted'] / 1e6:,.1f} MB")

    def _first_packs(self) -> Packs:
        """What round 1 trains, for the planner: its first passes are measured, its largest one is predicted."""
        exp, bundle = self.exp, self.bundle
        mode = next(m for m in ("federated", "local", "central") if m in exp.modes)
        schedule = dataclasses.replace(schedule_of(self.parts, mode), life=None)  # as if all were there
        sites = _sites(bundle.train, bundle.own)
        tokens, draw = self.parts.tokens["train"], bundle.recipe.draw
        front = bundle.settings.get("num_virtual_tokens", 0) if bundle.adapter in ("p_tuning", "prompt") else 0
        state = State(torch.empty(0), {}, Records(), keeps=False)

        tasks = {t.client: t for t in schedule.tasks(1, state)}

        @functools.cache
        def batches(client: int) -> list[np.ndarray]:
            rows, task = sites.everything() if client == CENTRAL_CLIENT else sites.train(client), tasks[client]
            return draw.batches(rows, stream(exp.seed, "batches", task.name, 1), task.steps)

        def passes(batch: np.ndarray, rows: int) -> list[np.ndarray]:
            """Where rows of one model lie end to end, as many make a pass as fit."""
            batch = batch[np.argsort(tokens.lengths_of(batch), kind="stable")]
            return list(filled(batch, tokens.lengths_of(batch), rows * bundle.recipe.row_tokens))

        def fullest(batch: np.ndarray, rows: int) -> np.ndarray:
            return max(passes(batch, rows), key=lambda p: tokens.lengths_of(p).sum())

        def first(lanes: int, rows: int) -> list[np.ndarray]:
            pack = schedule.packs(1, state, lanes)[0]
            if bundle.recipe.row_tokens is not None:
                return [fullest(batches(t.client)[0], rows) for t in pack.tasks]
            return [batches(t.client)[0][:rows] for t in pack.tasks]

        def largest(lanes: int, rows: int) -> int:
            most = 0
            for pack in schedule.packs(1, state, lanes):
                each = [batches(t.client) for t in pack.tasks]
                for i in range(min(50, max(map(len, each)))):  # steps of a round are much alike
                    if bundle.recipe.row_tokens is not None:
                        full = [fullest(b[i], rows) for b in each if i < len(b)]
                        most = max(most, *(int(tokens.lengths_of(rows).sum()) for rows in full))
                        continue
                    longest = [np.sort(tokens.lengths_of(b[i]))[-rows:] for b in each if i < len(b)]
                    most = max(most, int(sum(n.sum() + front * len(n) for n in longest)))
            return most

        def last(lanes: int, rows: int) -> list[np.ndarray]:
            pack = schedule.packs(1, state, lanes)[0]
            return [batches(t.client)[-1][:rows] for t in pack.tasks]

        some = batches(next(iter(tasks)))
        short = len(some) > 1 and len(some[-1]) < len(some[0])
        return Packs(len(tasks), first, largest, last if short else None, len(some))

    # ------------------------------------------------------------------------------------------- a mode

    def _mode(self, mode: str, begin: int, executor: SerialExecutor | PoolExecutor) -> int:
        """Run a mode, or go on with it, or take it as it is where it came to its end.

        Args:
            mode: which.
            begin: where its rows begin in the metrics file, in bytes.
            executor: where it runs.

        Returns:
            Where they end.
        """
        exp, folder = self.exp, self.folder
        done, damaged = folder.done(mode), []
        if done is None and (folder.path / "checkpoints" / mode / "done.json").is_file():
            self.show.warn(f"{mode}: done.json is damaged; its end is done again")
        if done is not None and done["rounds"] != exp.rounds:
            done = None
        if done is not None and folder.where_rows(mode, done, begin) is None:
            self.show.warn(f"{mode}: its rows in metrics.jsonl are damaged or missing")
            done = None
        if done is not None:
            damaged = folder.damaged(done["files"])
        if done is None or damaged:
            if damaged:
                self.show.warn(f"{mode}: damaged or missing, and made anew: {', '.join(damaged)}")
            return self._run_mode(mode, begin, executor, done)
        if folder.where_rows(mode, done, begin) == "aside":
            self._begin_rows(mode, begin, done)
            done |= folder.stretch()
            folder.end_mode(mode, done)
        self.by_row |= load_by_row(folder, mode)
        self._track(done["metrics_bytes"])
        return done["metrics_bytes"]

    def _begin_rows(self, mode: str, begin: int, info: dict[str, Any] | None) -> None:
        """Let the metrics file end with these rows of the mode; those of later modes are kept apart."""
        for later in self._modes()[self._modes().index(mode) + 1 :]:
            self.folder.put_aside(later)
        torn = self.folder.begin_mode(mode, begin, info)
        if torn is not None:
            self.show.warn(torn)
        if self.trackers and self._tracked() > (end := self.folder.sync_metrics()):
            self.folder.write_json("checkpoints/tracked.json", {"metrics_bytes": end})

    def _restore(
        self, mode: str, begin: int, schedule: Schedule, algorithm: Algorithm
    ) -> tuple[State, dict[str, Any] | None]:
        """The state of the newest checkpoint that is whole, and what it says of itself; where there is none, a fresh one."""
        folder = self.folder
        kept = folder.checkpoints(mode)
        for at in reversed(range(len(kept))):
            round, info = kept[at]
            why = "damaged" if info is None else None
            try:
                why = why or self._why_not(mode, info, begin, schedule)
                if why is None:
                    state = self._state(mode, algorithm)
                    infos = [i for _, i in kept[: at + 1] if i is not None]
                    restore(state, self.layout, infos, folder.load_tensors(mode, info))
                    if self._records(mode, state)[0] != info["records"]:
                        why = "records of client state are damaged or missing"
            except OSError:
                why = "records of client state are damaged or missing"
            except UserError:
                raise
            except (KeyError, TypeError, ValueError):
                why = "of another version"
            if why is None:
                if at + 1 < len(kept):
                    folder.drop_checkpoints(mode, round)
                return state, info
            self.show.warn(f"{mode}: the checkpoint of round {round} is not used: {why}")
        if kept:
            self.show.warn(f"{mode}: no checkpoint can be used; starts afresh")
        folder.drop_checkpoints(mode, 0)
        for name in (mode, f"best-{mode}"):
            self.stores[name].path.unlink(missing_ok=True)
        return self._state(mode, algorithm), None

    def _why_not(self, mode: str, info: dict[str, Any], begin: int, schedule: Schedule) -> str | None:
        """Why a checkpoint cannot be gone on from, as far as files tell; None where it can."""
        if not schedule.scores_as(info["rounds"], info["round"]):
            return f"a run of {info['rounds']} rounds scores models after other rounds"
        if self.folder.where_rows(mode, info, begin) is None:
            return "its rows in metrics.jsonl are damaged or missing"
        return None if self.folder.has_tensors(mode, info) else "its tensors are damaged or missing"

    def _records(self, mode: str, state: State) -> tuple[list[str], int]:
        """Hashes of the records that a state refers to; bytes that were read for them."""
        found = [
            records.digest(self.stores[name])
            for name, records in ((mode, state.records), (f"best-{mode}", state.best_records))
        ]
        return [digest for digest, _ in found], sum(size for _, size in found)

    def _run_mode(
        self, mode: str, begin: int, executor: SerialExecutor | PoolExecutor, done: dict[str, Any] | None
    ) -> int:
        """Run a mode's remaining rounds and its end; `done` where only its end has to be made again, its rows being whole."""
        exp, folder = self.exp, self.folder
        algorithm = self.bundle.algorithms[mode]
        schedule = schedule_of(self.parts, mode)
        state, info = self._restore(mode, begin, schedule, algorithm)
        self.at, self.costs, self.exported = (mode, state.round), [], []
        if done is not None and (info is None or state.round < exp.rounds):
            done = None
        if done is None or folder.where_rows(mode, done, begin) == "aside":
            self._begin_rows(mode, begin, done or info)
        if done is not None:
            self._track(done["metrics_bytes"])
        elif info is not None:
            if self.trackers:
                self._track(folder.sync_metrics())
            self._note_cost(mode, state, info)
            self.show.note(f"{mode}: going on after round {state.round}")
            former = dataclasses.replace(schedule, rounds=info["rounds"])
            if mode == "local" and former.rounds != exp.rounds:  # clients that a longer run comes to
                self._log(self._initial_rows(mode, schedule, executor, state, former.last_rounds))
        else:
            self._log(self._initial_rows(mode, schedule, executor, state))
        self.show.begin(mode, state.round)
        self.useful = self.computed = 0

        def on_pack(round: int, report: Report) -> None:
            self.useful += report.tokens
            self.computed += report.computed
            self.show.pack(round, report)

        def on_round(round: int, rows: list[Row]) -> None:
            self._log_costs()
            self._log(rows)
            if round % exp.checkpoint.every == 0 or round == exp.rounds:
                self._checkpoint(mode, state, algorithm)
            self.show.round(round, _headline(rows, round, self.choice.metric))

        run_rounds(
            schedule,
            algorithm,
            self.layout,
            executor,
            state,
            self.choice,
            lanes=functools.partial(self.plan.lanes_at, mode),
            halve=functools.partial(self._halve, mode),
            generate=exp.evaluate.generate,
            chunk=self.bundle.recipe.chunk,
            bytes_of=self.bytes_of,
            copy_best=functools.partial(self._copy_best, mode),
            on_pack=on_pack,
            on_round=on_round,
        )
        if self.computed:
            self.show.note(
                f"{mode}: {self.useful:,} useful of {self.computed:,} computed tokens ({self.useful / self.computed:.1%})"
            )
        faults = [row for row in folder.rows_of("fault") if row["scope"] == mode]
        for line in describe_faults(mode, faults):
            asked_for = all(row["name"] in SIMULATED for row in faults)
            (self.show.note if asked_for else self.show.warn)(line)
        found, rows = self._finish_mode(mode, state, executor)
        self.by_row |= found
        save_by_row(folder, mode, found)
        if done is None:
            self._log_costs()
            self._log(rows)
            done = folder.stretch()
        elif done["metrics_begin"] != begin:
            done = folder.stretch()
        about = {"models": len(found), "rounds": exp.rounds, "plan": dataclasses.asdict(self.plan)}
        about["files"] = folder.files([*self.exported, f"checkpoints/{mode}/by_row.npz"])
        about |= {key: done[key] for key in ("metrics_begin", "metrics_bytes", "metrics_sha256")}
        folder.end_mode(mode, about)
        self._track(about["metrics_bytes"])
        self.show.end()
        return about["metrics_bytes"]

    def _halve(self, mode: str, round: int) -> None:
        """Go on with half the lanes, and remember from which round on."""
        lanes = self.plan.halve(mode, round)
        self._save_plan()
        self.show.warn(f"{mode}: out of memory in round {round}; it starts again with {lanes} lane(s)")

    def _state(self, mode: str, algorithm: Algorithm) -> State:
        # Merging happens in the buffer that the first worker reads.
        flat = self.executor.weights
        self._read(self.first, 0, flat)
        server = clone(algorithm.init(self.layout.views(flat))[0])
        return State(flat, server, Records(), keeps=self.stores[mode].width > 0)

    def _log(self, rows: list[Row]) -> None:
        self.folder.log(rows, self._seconds())

    def _log_costs(self) -> None:
        """Rows of what checkpoints took: known once they are there, so they go with the next round's, or the mode's last."""
        for rows, seconds in self.costs:
            self.folder.log(rows, seconds)
        self.costs = []

    def _note_cost(self, mode: str, state: State, info: dict[str, Any], seconds: float | None = None) -> None:
        """What the state's checkpoint took, to be logged: a resume has it from the checkpoint, less its last file's part."""
        step = max(state.steps.values(), default=0)
        took = {"checkpoint_seconds": seconds or info["seconds"], "checkpoint_bytes": float(info["bytes"])}
        rows = [Row(state.round, step, mode, None, "run", name, v) for name, v in took.items()]
        self.costs.append((rows, self._seconds()))

    def _track(self, end: int) -> None:
        """Tell the trackers all committed rows that they have not been told of."""
        begin = self._tracked() if self.trackers else end
        if begin < end:
            rows = [json.loads(line) for line in self.folder.rows(begin, end).splitlines()]
            self.trackers.log([Row(**{k: v for k, v in row.items() if k != "seconds"}) for row in rows])
            self.folder.write_json("checkpoints/tracked.json", {"metrics_bytes": end})

    def _tracked(self) -> int:
        """Bytes of the metrics file that trackers were told of."""
        known = self.folder.read_json("checkpoints/tracked.json")
        found = known.get("metrics_bytes") if isinstance(known, dict) else None
        return found if isinstance(found, int) else 0

    def _checkpoint(self, mode: str, state: State, algorithm: Algorithm) -> None:
        began = time.monotonic()
        for name in (mode, f"best-{mode}"):
            if name in self.stores:
                self.stores[name].sync()
        keep = self.exp.checkpoint.keep
        tensors = state_tensors(state, self.layout, algorithm.merges)
        shard = self.exp.checkpoint.shard_mb << 20
        records, read = self._records(mode, state)
        info = {
            **state_info(state),
            "records": records,
            "rounds": self.exp.rounds,
            "plan": dataclasses.asdict(self.plan),
        }
        info["bytes"] = read + sum(t.nbytes for t in tensors.values())
        self.folder.save_checkpoint(mode, state.round, tensors, info, keep, shard, began)
        self.at = (mode, state.round)
        self._note_cost(mode, state, {**info, "seconds": 0.0}, time.monotonic() - began)
        state.records.commit(keep)
        state.best_records.commit(keep)
        if self.trackers:
            self._track(self.folder.sync_metrics())
        self._status("running")

    def _copy_best(self, mode: str, record: int | None, into: int) -> None:
        best = self.stores[f"best-{mode}"]
        if record is None:
            best.write(into, self.executor.weights)
        else:
            self.stores[mode].copy(record, best, into, self.layout.numel)

    def _initial_rows(
        self,
        mode: str,
        schedule: Schedule,
        executor: SerialExecutor | PoolExecutor,
        state: State,
        known: Collection[int] = (),
    ) -> list[Row]:
        """Scores before training, the start of every curve; all modes start from the same parameters.

        A site that is in no cohort of the run never trains and has no curve. `known` sites have their rows.
        """
        if self.initial is None:
            executor.broadcast(state.params, state.server)
            scores = executor.score([Scoring("validation", generate=self.exp.evaluate.generate)])[0][0]
            self.initial = merged_rows(0, 0, scores, "", schedule.name)
        clients = sorted(set(schedule.last_rounds) - set(known)) if mode == "local" else []
        names = [schedule.name(c) for c in clients] if mode == "local" else [None]
        return [dataclasses.replace(row, scope=mode, client=name) for name in names for row in self.initial]

    # ------------------------------------------------------------------------------------------- the end

    def _finish_mode(
        self, mode: str, state: State, executor: SerialExecutor | PoolExecutor
    ) -> tuple[dict[str, ByRow], list[Row]]:
        """Export last and chosen models, score the chosen ones once on the test rows: each row's scores by model, and the rows."""
        owners: list[tuple[str | None, Chosen, str]] = []
        if self.bundle.algorithms[mode].merges:
            self._export("global")
            last = self._by_row("validation", [mode], executor.score([Scoring("validation", by_row=True)]))
            requests: list[Scoring] = []
            if state.best is not None:
                self._read(self.stores[f"best-{mode}"], state.best_records.read(MERGED), executor.weights)
                self._export("best")
                executor.broadcast(executor.weights, state.server)
                requests.append(Scoring("test"))
                owners.append((None, state.best, mode))
        else:
            labels, records, best_records = [], [], []
            for client, record in sorted(state.records.table.items()):
                name = CENTRAL if client == CENTRAL_CLIENT else self.parts.partition.name(client)
                place = CENTRAL if client == CENTRAL_CLIENT else f"local/{folder_name(name)}"
                label = CENTRAL if client == CENTRAL_CLIENT else f"local {name}"
                self._read(self.stores[mode], record, executor.weights)
                self._export(place)
                labels.append(label)
                records.append(record)
                if client not in state.site_best:
                    continue
                best = state.best_records.read(client)
                self._read(self.stores[f"best-{mode}"], best, executor.weights)
                self._export(f"{place}/best")
                best_records.append(best)
                owners.append((None if client == CENTRAL_CLIENT else name, state.site_best[client], label))
            few = slice(0, BY_ROW_SITES)
            last = self._by_row("validation", labels[few], executor.score(self._packed(mode, mode, records[few])))
            requests = self._packed(mode, f"best-{mode}", best_records)
        if len(self.parts.tokens["test"].kept()) == 0:
            return last, []
        generate = self.exp.evaluate.generate
        asked = [dataclasses.replace(r, split="test", generate=generate, by_row=True) for r in requests]
        answers = executor.score(asked)
        rows = []
        for scores, (client, best, _) in zip((s for part in answers for s in part), owners, strict=True):
            rows += [Row(best.round, best.step, mode, client, "test", n, v, w) for n, (v, w) in scores.values.items()]
        chosen = self._by_row("test", [label for *_, label in owners], answers)
        return {label: {**last.get(label, {}), **chosen.get(label, {})} for label in {**last, **chosen}}, rows

    def _packed(self, mode: str, store: str, records: list[int]) -> list[Scoring]:
        """Requests to score these records on the validation rows, as many side by side as there are lanes."""
        lanes = self.plan.lanes_at(mode, self.exp.rounds)
        parts = [tuple(records[i : i + lanes]) for i in range(0, len(records), lanes)]
        return [Scoring("validation", records=part, store=store, by_row=True) for part in parts]

    @staticmethod
    def _by_row(split: str, labels: list[str], answers: list[list[Scores]]) -> dict[str, ByRow]:
        found = [scores for part in answers for scores in part]
        return {label: by_row(split, scores) for label, scores in zip(labels, found, strict=True)}

    def _export(self, place: str) -> None:
        """Write a folder of the model with the executor's global parameters."""
        self._save_model(self.executor.weights, self.folder.path / place)
        self.exported.append(place)

    def _save_model(self, flat: Tensor | None, place: Path) -> None:
        """Write a folder of the model with these parameters, `[N]`; None = as it is."""
        views = {} if flat is None else self.layout.views(flat)
        for name, view in views.items():
            parameter = self.model.get_parameter(name)
            if self.exp.adapter.name == "none":
                parameter.data = view  # copying would take a second model's memory
            else:
                parameter.data.copy_(view)
        if self.exp.adapter.name == "none":  # transformers copies what lies in one block with others
            for parameter in self.model.parameters():
                parameter.data = torch.from_dlpack(parameter.data)
        beside = place.with_name(f".{place.name}.{os.getpid()}")
        exp = self.exp
        settings = self.bundle.settings
        try:
            adapters.save(
                self.model,
                beside,
                name=exp.adapter.name,
                settings=settings,
                base_name=exp.model.path,
                tokenizer=self.parts.tokenizer,
                shard_mb=exp.checkpoint.shard_mb,
            )
            replace_folder(beside, place)
        except BaseException:  # a full disk gets its room back
            shutil.rmtree(beside, ignore_errors=True)
            raise


def free_memory(device: str) -> int | None:
    """Bytes that are free on a device; None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024


def _draw(folder: RunFolder, show: Progress) -> None:
    from fedsim.plots import save_figures

    folder.sync_metrics()
    for path in save_figures(folder.path):
        show.note(f"figure: {path}")


def _shareable(partition: Partition | VirtualPartition) -> tuple[Tensor, Tensor] | VirtualPartition:
    if isinstance(partition, VirtualPartition):
        return partition
    return torch.tensor(partition.offsets), torch.tensor(partition.indices)


def folder_name(client: str) -> str:
    """A client's id as a folder's name; an id with other characters gets a hash so that no two collide."""
    safe = re.sub(r"[^\w.+-]", "_", client).strip(".") or "_"
    return safe if safe == client else f"{safe[:60]}-{hashlib.sha256(client.encode()).hexdigest()[:8]}"


def _headline(rows: list[Row], round: int, metric: str) -> str:
    """What a round came to, in a few words."""
    last = [r for r in rows if r.split == "validation" and r.name == metric]
    merged = [r.value for r in last if r.client is None]
    own = [r.value for r in {r.client: r for r in last if r.client is not None}.values()]
    train = [r.value for r in rows if r.split == "train" and r.name == "loss"]
    parts = [f"train loss {np.mean(train):.3f}"] if train else []
    parts += [f"clients' {metric} {np.mean(own):.3f}"] if own else []
    parts += [f"{metric} {merged[-1]:.3f}"] if merged else []
    return ", ".join(parts)
