"""Runs whose clients train by a user's script: prepared without model and data, trained by the same rounds, written to the same folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms import Algorithm, Local
from fedsim.channel import downlink, uplink
from fedsim.client.context import EVALUATE, SUBMIT
from fedsim.client.runner import Script
from fedsim.config.components import algorithm_of
from fedsim.config.experiment import Experiment
from fedsim.config.scripts import names_of
from fedsim.config.sections import Pool
from fedsim.core.errors import CallbackError, ClientError, UserError
from fedsim.core.files import CLIENT_FOLDERS, CROSS, folder_names, record
from fedsim.core.params import Layout
from fedsim.core.store import Store
from fedsim.core.types import Engine, Memory, Pack, RoundEnd, Row, Task
from fedsim.core.user_code import UserCode
from fedsim.executors import PoolExecutor
from fedsim.executors.processes import die_with_parent
from fedsim.runs.environment import environment
from fedsim.runs.folder import Metrics, RunFolder
from fedsim.runs.modes import resume_mode, train_rounds
from fedsim.runs.plan import MODES
from fedsim.runs.progress import Progress
from fedsim.runs.resolve import behavior_of, recipe_of
from fedsim.runs.tracking import Tracking
from fedsim.simulate.rounds import World, mean_of_received
from fedsim.simulate.schedule import Schedule
from fedsim.simulate.state import GLOBAL, Choice
from fedsim.training.packs import reducer_of
from fedsim.training.planner import Plan
from fedsim.training.records import START, stores_of
from fedsim.training.script import END, ScriptSpec, arrays, first_model

MODEL = "model.safetensors"
_CANNOT = ("trains", "at", "adjust", "after_step", "resets", "beside", "rank", "adapted")


@dataclass(frozen=True)
class ScriptParts:
    """A script's experiment, ready to run.

    Attributes:
        exp: the config.
        names: clients, by number.
        args: client -> its own arguments.
    """

    exp: Experiment
    names: list[str]
    args: dict[str, str]
    attack: None = None
    ledger: None = None

    def run_id(self) -> str:
        """Hash of the config, of script, modules beside it and initial model."""
        identity = self.exp.identity()
        init = self.exp.client.init
        identity["client"]["init"] = init.identity if isinstance(init, UserCode) else _content(init)
        return hashlib.sha256(repr(_sorted(identity)).encode()).hexdigest()[:12]

    def name(self, client: int) -> str:
        """A client's name."""
        return self.names[client]

    @property
    def num_clients(self) -> int:
        """How many there are."""
        return len(self.names)

    @property
    def clients(self) -> np.ndarray:
        """Their numbers."""
        return np.arange(len(self.names))

    @property
    def partition(self) -> ScriptParts:
        """Names by number."""
        return self


def _sorted(value: Any) -> Any:
    return sorted((k, _sorted(v)) for k, v in value.items()) if isinstance(value, dict) else value


def _content(init: str) -> str:
    """What a file of initial parameters holds, as a hash."""
    if init == "script":
        return init
    try:
        return hashlib.sha256(Path(init).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"client.init: {init!r} cannot be read ({error.strerror}); give a file that is there") from None


def script_parts(exp: Experiment) -> ScriptParts:
    """Check an experiment of a script.

    Raises:
        UserError: for what a script cannot do.
    """
    args = names_of(exp.clients)
    algorithm = algorithm_of(exp.algorithm, exp.aggregator)
    hooks = [hook for hook in _CANNOT if algorithm.overrides(hook)]
    why = (
        f"works between a client's steps ({hooks[0]}), which a script does by itself"
        if hooks
        else f"needs {min(algorithm.needs)}, which is measured on a client's examples"
        if algorithm.needs
        else "trains several models a client"
        if len(algorithm.parts) > 1
        else "is for LoRA's factors alone"
        if algorithm.adapters
        else None
    )
    if why is not None:
        raise UserError(
            f"algorithm.name: {exp.algorithm.name!r} {why}; use one that only merges, e.g. fedavg or fedadam"
        )
    if exp.privacy.name == "local_sgd":
        raise UserError(
            "privacy.name: 'local_sgd' clips each example's gradient, which a script computes by itself; leave privacy out"
        )
    if exp.privacy.name == "central":
        raise UserError("privacy.name: 'central' is not supported with client.script yet; leave privacy out")
    if exp.simulation.speeds is not None or exp.simulation.attackers is not None:
        key = "speeds" if exp.simulation.speeds is not None else "attackers"
        raise UserError(
            f"simulation.{key}: is worked out from a client's examples, of which a script's nothing is known; leave it out"
        )
    if algorithm.buffered(1) is not None:
        raise UserError(
            f"algorithm.name: {exp.algorithm.name!r} needs simulation.speeds, which scripts do not have; use fedavg"
        )
    return ScriptParts(exp, list(args), args)


# ---------------------------------------------------------------------------------------------- one start of a run


@dataclass
class _Setup:
    """What the rounds of a mode ask of a run's setup; see `fedsim.runs.setup.Setup`."""

    parts: ScriptParts
    folder: RunFolder
    show: Progress
    plan: Plan
    layout: Layout
    kinds: dict[str, torch.dtype]
    executor: PoolExecutor
    memory: Memory
    stores: dict[str, Store]
    first: Store
    algorithms: dict[str, Algorithm]
    recipe: Any
    slow_evaluation: bool = True

    @property
    def exp(self) -> Experiment:
        """The config."""
        return self.parts.exp

    def checkpoints(self, mode: str) -> Any:
        """The checkpoints of a mode."""
        from fedsim.runs.checkpoints import Checkpoints

        keep, shard = self.exp.checkpoint.keep, self.exp.checkpoint.shard_mb << 20
        return Checkpoints(self.folder.path, mode, self.stores[mode], self.stores[f"best-{mode}"], keep, shard)

    def read(self, store: Store, at: int) -> Tensor:
        """Copy the parameters of a record into the run's own vector."""
        self.memory.params.copy_(store.read(at, 0, self.layout.numel))
        return self.memory.params


def script_session(
    parts: ScriptParts,
    folder: RunFolder,
    show: Progress,
    devices: list[str],
    before: dict[str, Any],
    callback: Callable[[RoundEnd], object] | None,
) -> Iterator[None]:
    """Run a script's experiment to its end in a folder that is locked; see `fedsim.runs.session.session`."""
    from fedsim.runs.session import Status, draw_figures, record_files

    exp = parts.exp
    status = Status(folder, exp.rounds, before)
    folder.clear()
    status.write("running")
    folder.record(files=None)
    folder.write_text("config.yaml", exp.to_yaml())
    workers = len(parts.names) if exp.client.spawn else getattr(exp.executor, "workers", None) or len(devices)
    threads = exp.executor.threads or max(1, (os.cpu_count() or 1) // workers)
    folder.write_json("environment.json", environment(devices, threads))
    names = folder_names(parts.names)
    if unlike := {place: client for client, place in names.items() if place != client}:
        folder.write_json(CLIENT_FOLDERS, unlike)
    folder.record(rounds=exp.rounds)
    with contextlib.closing(Tracking(exp, folder)) as tracking:
        try:
            setup = _set_up(parts, folder, show, devices, workers, threads)
            try:
                for mode in (m for m in MODES if m in exp.modes):
                    yield from _mode(setup, mode, status.seconds, tracking, callback)
                    status.write("running")
                if exp.evaluate.cross_site and "federated" in exp.modes:
                    from fedsim.analysis.cross_site import write_cross_site

                    write_cross_site(folder.path)
            finally:
                with contextlib.suppress(OSError):
                    setup.first.path.unlink(missing_ok=True)
                setup.executor.close()
        except BaseException as error:
            stopped = not isinstance(error, Exception) or isinstance(error, CallbackError)
            reason = str(error).split("\n")[0][:300] or type(error).__name__
            with contextlib.suppress(OSError):
                status.write("stopped" if stopped else "failed", None if stopped else reason)
            raise
        record_files(exp, folder)
        status.write("finished", figures=False)
        draw_figures(folder, show)
        status.write("finished")


def _set_up(
    parts: ScriptParts, folder: RunFolder, show: Progress, devices: list[str], workers: int, threads: int
) -> _Setup:
    exp, client = parts.exp, parts.exp.client
    state = folder.path / "checkpoints"
    state.mkdir(exist_ok=True)
    script = Script(
        Path(client.script.removesuffix(":")),
        client.script.files,
        {name: own or client.args for name, own in parts.args.items()},
        *(client.launch == "once", client.exchange == "torch", client.compat, client.share_base),
        exp.to_dict()["client"],
        *(exp.seed, folder.path.name),
        {name: folder.path / "logs" / f"{folder_names(parts.names).get(name, name)}.log" for name in parts.names},
    )
    show.note(f"{script.path.name}: {len(parts.names)} clients, {workers} worker process(es)")
    params = _initial(exp, script, parts.names[0])
    kinds = {name: tensor.dtype for name, tensor in params.items()}
    wide = torch.float64 if torch.float64 in kinds.values() else torch.float32
    layout = Layout({n: tuple(t.shape) for n, t in params.items()}, wide)
    algorithms: dict[str, Algorithm] = {
        m: algorithm_of(exp.algorithm, exp.aggregator) if m == "federated" else Local() for m in exp.modes
    }
    if exp.evaluate.cross_site:
        algorithms[SUBMIT] = Local()
    size = len(parts.names) if exp.cohort.size == "all" else exp.cohort.size
    recipe = recipe_of(exp)
    keeps = dict.fromkeys([*recipe.keep_state, SUBMIT], False)
    recipe = dataclasses.replace(recipe, keep_state=keeps, slots=size, chunk=None, meter=False)
    spec = ScriptSpec(script, layout, kinds, algorithms, recipe, exp.seed, state, exp.rounds)
    places = [devices[i % len(devices)] for i in range(workers)]
    executor = PoolExecutor(
        spec, places, threads, "cpu", hang_s=getattr(exp.executor, "hang_s", Pool.hang_s), note=show.warn
    )
    try:
        first = Store(state / f"{START}.bin", layout.numel, layout.dtype)
        first.write(0, *[t.to(wide).reshape(-1) for t in params.values()])
        summed = max(reducer_of(a, layout, recipe).numel for a in algorithms.values())
        memory = executor.start(layout, Layout({}, wide), Engine(False, 1), summed, True)
        stores = stores_of(state, algorithms, layout, recipe)
        plan = Plan(threads, micro_batch=1)
        return _Setup(parts, folder, show, plan, layout, kinds, executor, memory, stores, first, algorithms, recipe)
    except BaseException:
        executor.close()
        raise


def _initial(exp: Experiment, script: Script, site: str) -> dict[str, Tensor]:
    """The initial parameters."""
    init = exp.client.init
    if isinstance(init, UserCode):
        return _in_process(_made_by, init)
    if init == "script":
        return _in_process(first_model, script, site, exp.rounds)
    try:
        if init.endswith(".npz"):
            with np.load(init, allow_pickle=False) as held:
                return arrays(dict(held))
        from safetensors.torch import load_file

        return load_file(init)
    except Exception as error:
        raise UserError(f"client.init: {init!r} cannot be read ({' '.join(str(error).split())[:200]})") from None


def _made_by(init: UserCode) -> dict[str, Tensor]:
    """What a function in a user's file returns: a module's state, or a dict of arrays."""
    name = next(iter(init.files))
    space: dict[str, Any] = {"__name__": "fedsim_init", "__file__": str(init.folder / name)}
    import sys

    sys.path.insert(0, str(init.folder))
    exec(compile(init.files[name], space["__file__"], "exec"), space)
    if not callable(space.get(init.wanted)):
        raise UserError(f"client.init: {name} has no function {init.wanted!r}")
    found = space[init.wanted]()
    return arrays(found.state_dict() if hasattr(found, "state_dict") else found)


def _in_process(function: Callable[..., dict[str, Tensor]], *args: Any) -> dict[str, Tensor]:
    """Call it in a process of its own: a user's code changes what it likes there."""
    context = multiprocessing.get_context("spawn")  # ends with this process, see `_answer`
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, args))
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        raise ClientError("client.init: the process that makes the initial model has died") from None
    finally:
        process.join()
    if isinstance(found, Exception):
        raise found
    return {name: torch.from_numpy(value) if not isinstance(value, Tensor) else value for name, value in found.items()}


def _answer(pipe: Any, function: Callable[..., dict[str, Tensor]], args: tuple[Any, ...]) -> None:
    threading.Thread(target=die_with_parent, daemon=True).start()
    try:
        made = function(*args)
        pipe.send({n: t.numpy() if t.dtype != torch.bfloat16 else t for n, t in made.items()})
    except UserError as error:
        pipe.send(error)
    except Exception:
        pipe.send(ClientError(f"client.init failed; its traceback:\n{traceback.format_exc()}"))


# -------------------------------------------------------------------------------------------------- a mode


def _mode(
    setup: _Setup,
    mode: str,
    seconds: Callable[[], float],
    tracking: Tracking,
    callback: Callable[[RoundEnd], object] | None,
) -> Generator[None, None, None]:
    exp, folder, parts = setup.exp, setup.folder, setup.parts
    checkpoints = setup.checkpoints(mode)
    done, why = checkpoints.done(exp.rounds)
    if done is not None:
        tracking.tell(mode, done["metrics"])
        return
    if why is not None:
        setup.show.warn(f"{mode}: {why}; its end is done again")
    world = _world(setup, mode)
    state, info = resume_mode(setup, world, mode)
    if exp.client.launch == "once" and state.round:
        turns = sum(
            1 for c in range(len(parts.names)) for r in range(1, state.round + 1) if c in world.schedule.cohort(r)
        )
        setup.show.note(
            f"{mode}: client.launch=once: {turns} client rounds are done again to bring the scripts to round {state.round}"
        )
    with contextlib.closing(Metrics(folder.path, mode, info and info["metrics"])) as metrics:
        tracking.cut(mode, metrics.mark())
        setup.show.begin(mode, state.round)
        yield from train_rounds(setup, world, state, info, metrics, seconds, tracking, callback)
        rows = _finish(setup, world, state)
        metrics.log(rows, seconds())
        exported = _export(setup, world, state)
        mark = metrics.mark()
        checkpoints.end(rounds=exp.rounds, models=0, metrics=mark, files=record(folder.path, exported))
        tracking.tell(mode, mark)
    setup.show.end()


def _world(setup: _Setup, mode: str) -> World:
    exp, parts = setup.exp, setup.parts
    algorithm = setup.algorithms[mode]
    count = len(parts.names)
    schedule = Schedule(
        mode=mode,
        seed=exp.seed,
        rounds=exp.rounds,
        clients=np.arange(count),
        size=count if exp.cohort.size == "all" else min(exp.cohort.size, count),
        name=parts.name,
        sizes=np.ones(count, dtype=np.int64),
        count=lambda examples, steps: 1,
        steps=1,
        epochs=1,
        batch_size=1,
        match="epochs",
        weights="uniform",
        length=lambda client: 1.0,
        every_rounds=1,
        scores_clients=False,
        behavior=behavior_of(parts) if mode == "federated" else None,
        sampler=exp.cohort.sampler,
    )
    dtype = setup.layout.dtype
    sizes = [tuple(s) for s in setup.layout.shapes.values()]
    up, down = (
        uplink(exp.messages.up).nbytes(sizes, dtype).total,
        downlink(exp.messages.down).nbytes(sizes, dtype).total,
    )
    metric = exp.client.metric or exp.best.metric or ""
    choice = Choice(metric, exp.best.mode or ("min" if metric.endswith(("loss", "perplexity")) else "max"))
    incoming = None
    if exp.client.launch == "once" and mode == "federated":
        incoming = Store(setup.folder.path / "checkpoints" / f"incoming-{mode}.bin", setup.layout.numel, dtype)
    return World(
        schedule,
        algorithm,
        setup.layout,
        reducer_of(algorithm, setup.layout, setup.recipe),
        choice,
        setup.plan,
        setup.memory,
        setup.stores[mode],
        setup.stores[f"best-{mode}"],
        False,
        None,
        lambda round, client, since: (up, down),
        scripted=True,
        incoming=incoming,
    )


def _finish(setup: _Setup, world: World, state: Any) -> list[Row]:
    """Cross-site evaluation by the scripts' own `evaluate`, where it is asked for; then the scripts' end."""
    exp, names, mode = setup.exp, setup.parts.names, world.schedule.mode
    executor, rows = setup.executor, []

    def packs(kind: str, write: bool = False) -> list[Pack]:
        return [
            Pack(
                i,
                kind,
                (Task(i, name, exp.rounds, 1, state.steps.get(i, 0), 0, 1, 1.0, write=i if write else -1),),
                1,
                home=i,
            )
            for i, name in enumerate(names)
        ]

    if exp.evaluate.cross_site and mode == "federated":
        models: list[tuple[str | None, Tensor]] = [(None, state.params.clone())]
        list(executor.train(packs(SUBMIT, write=True), None))
        models += [(name, setup.stores[SUBMIT].read(i)) for i, name in enumerate(names)]
        for owner, flat in models:
            executor.broadcast(flat, {})
            for report in executor.train(packs(EVALUATE), None):
                rows += [
                    dataclasses.replace(row, client=owner, split=f"{CROSS}{row.client}", step=state.step)
                    for row in report.rows
                ]
                if owner is None:
                    rows += [dataclasses.replace(row, split="site", name=f"merged_{row.name}") for row in report.rows]
        executor.broadcast(state.params, {})
        of_global = [row for row in rows if row.split == "site"]
        rows += mean_of_received(of_global, exp.rounds)
    list(executor.train(packs(END), None))
    return rows


def _export(setup: _Setup, world: World, state: Any) -> list[str]:
    """Write models with names and types as scripts know them; returns the folders."""
    from safetensors.torch import save_file

    written: list[str] = []

    def write(place: str, flat: Tensor) -> None:
        folder = setup.folder.path / place
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        beside.mkdir(parents=True, exist_ok=True)
        made = {}
        for name, view in setup.layout.views(flat).items():
            kind = setup.kinds[name]
            made[name] = (view.round() if not kind.is_floating_point else view).to(kind).contiguous().clone()
        save_file(made, beside / MODEL, metadata={"format": "pt"})
        setup.folder.replace(place, beside)
        written.append(place)

    folders = folder_names(setup.parts.names)
    if world.algorithm.merges:
        write("global", state.params)
        if state.best is not None:
            write("best", world.best.read(state.best_records.read(GLOBAL)))
    else:
        for client, at in sorted(state.records.table.items()):
            name = setup.parts.name(client)
            write(f"local/{folders.get(name, name)}", world.store.read(at, 0, setup.layout.numel))
    return written


def run_script(script: str | Path, *, clients: Any = 2, rounds: int = 5, progress: bool = True, **keys: Any) -> Any:
    """Run a training script as federated clients.

    Args:
        script: the file, which uses `fedsim.client`.
        clients: their number, names, or names with arguments of their own.
        rounds: federated rounds.
        progress: as for `fedsim.run`.
        keys: further keys of the section `client` (args, launch, exchange, init, ...), and of the config (name, seed, results, modes, ...).

    Returns:
        The run, as `fedsim.run`.

    Raises:
        UserError: for what the user can fix.
        ClientError: if a script raised, with its traceback.
    """
    from fedsim.config.scripts import ClientScript
    from fedsim.runs.run import run

    own = {k: keys.pop(k) for k in list(keys) if k in ClientScript.__dataclass_fields__}
    name = keys.pop("name", Path(script).stem)
    return run(
        Experiment.from_dict(
            {"name": name, "client": {"script": str(script), **own}, "clients": clients, "rounds": rounds, **keys}
        ),
        progress=progress,
    )
