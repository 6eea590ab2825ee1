"""From an experiment's parts to an executor that is ready to train: base, adapter, workers, plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.algorithms import Algorithm, Local
from fedsim.config.components import algorithm_of
from fedsim.config.experiment import Experiment
from fedsim.core.errors import UserError
from fedsim.core.files import differing, record
from fedsim.core.numerics import kernels, threads
from fedsim.core.params import Layout, Params, meta
from fedsim.core.store import Store
from fedsim.core.types import ADAPTED, Engine, Memory, Scores, Scoring
from fedsim.executors import FleetExecutor, PoolExecutor, SerialExecutor
from fedsim.executors.fleet import Fleet
from fedsim.models import adapters, sharing
from fedsim.models.recompute import check_layers
from fedsim.runs.build import Parts, Shared
from fedsim.runs.checkpoints import Checkpoints
from fedsim.runs.describe import describe
from fedsim.runs.export import save_model
from fedsim.runs.folder import RunFolder
from fedsim.runs.plan import MODES, choose, save_plan
from fedsim.runs.progress import Progress
from fedsim.runs.resolve import check_memory, ranks_of, recipe_of, schedule_of
from fedsim.runs.worker_spec import WorkerSpec, shareable
from fedsim.simulate.rounds import collect
from fedsim.simulate.state import Choice
from fedsim.training.config import LocalTrainingConfig
from fedsim.training.packs import reducer_of
from fedsim.training.planner import Plan
from fedsim.training.planner import describe as describe_plan
from fedsim.training.private import PrivateExamples
from fedsim.training.ranks import largest_rank, shape_at
from fedsim.training.records import START, stores_of


@dataclass
class Setup:
    """A run that is ready to train.

    Attributes:
        parts: config, examples and partition.
        folder, show: the run folder, and where progress is shown.
        devices: of each worker.
        plan: threads and lanes.
        spec: what workers are made of.
        model: the base with the adapter, in this process.
        layout: of the global parameters.
        executor, memory: where packs run, and what it allocated for this run.
        stores: by mode, records of client state, and `best-<mode>` of best models.
        first: the parameters that training starts from, as one record.
        bytes_of: (round, client, round in which it last began, or 0) -> bytes that it sends and receives.
        initial: validation scores before training, once they are known.
        slow_evaluation: whether the user was told that evaluation takes most of a round.
    """

    parts: Parts
    folder: RunFolder
    show: Progress
    devices: list[str]
    plan: Plan
    spec: WorkerSpec
    model: nn.Module
    layout: Layout
    executor: Any
    memory: Memory
    stores: dict[str, Store]
    first: Store
    bytes_of: Callable[[int, int, int], tuple[int, int]]
    initial: Scores | None = None
    slow_evaluation: bool = False

    @property
    def exp(self) -> Experiment:
        """The config."""
        return self.parts.exp

    @property
    def modes(self) -> list[str]:
        """The modes of the run, in their order."""
        return [m for m in MODES if m in self.exp.modes]

    @property
    def choice(self) -> Choice:
        """How the best model is chosen."""
        return Choice(self.exp.best.metric, self.exp.best.mode)

    def checkpoints(self, mode: str) -> Checkpoints:
        """The checkpoints of a mode."""
        keep, shard = self.exp.checkpoint.keep, self.exp.checkpoint.shard_mb << 20
        return Checkpoints(self.folder.path, mode, self.stores[mode], self.stores[f"best-{mode}"], keep, shard)

    def read(self, store: Store, record: int) -> Tensor:
        """Copy the parameters of a record into the run's own vector, a chunk at a time; returns that."""
        for chunk in self.layout.chunks(self.spec.recipe.chunk):
            self.memory.params[chunk.span].copy_(store.read(record, chunk.start, chunk.stop))
        return self.memory.params

    def initial_scores(self) -> Generator[None, None, Scores]:
        """Validation scores of the model that training starts from, which the executor must have been sent."""
        if self.initial is None:
            request = Scoring("validation", generate=self.exp.evaluate.generate)
            ((self.initial,),) = yield from collect(self.executor.score([request]))
        return self.initial


def set_up(
    parts: Parts,
    folder: RunFolder,
    show: Progress,
    kind: str,
    devices: list[str],
    plan: Plan,
    known: bool,
    shared: Shared,
    fleet: Fleet | None,
) -> Generator[None, None, Setup]:
    """Load the base once, start the executor, attach the adapter, resolve the plan, and say what is trained.

    Args:
        parts: config, examples and partition.
        folder, show: the run folder, and where progress is shown.
        kind: serial | pool.
        devices: of each worker.
        plan, known: from `resolve_plan`.
        shared: what other runs of this process have loaded.
        fleet: of runs whose packs share passes; None = this run alone.
    """
    exp = parts.exp
    full = exp.adapter.name == "none"
    show.note(f"loading {exp.model.path}")
    model = shared.base(parts)
    if note := getattr(model, "head_note", None):
        show.note(note)
    (folder.path / "checkpoints").mkdir(exist_ok=True)
    spec = _spec(parts, model, folder)
    home = "cpu" if exp.aggregation.device == "cpu" else None
    executor: SerialExecutor | PoolExecutor | FleetExecutor | None = None
    if kind == "pool":
        check_memory(devices, sum(p.nbytes for p in model.parameters()), full)
        executor = _pool(spec, model, parts, devices, plan.threads, home, show)
    try:
        lent = sharing.memory_of(model)
        with threads(plan.threads):
            model, own = spec.attach()
        trained = adapters.trained(model)
        if not full:  # a head of the base that is trained; exports write into the trained parameters
            sharing.own_memory(trained.values(), lent)
        if not known and (exp.training.lanes != 1 or parts.ledger is not None):
            plan.why_not = spec.why_not_packed(model, own)
            plan.packed = plan.why_not is None
        if parts.ledger is not None and not plan.packed:
            raise UserError(
                f"privacy.name: local_sgd needs the gradient of each example, which lanes give, but {plan.why_not}; take an adapter "
                "and a base that train in lanes, such as adapter.name=lora on a Llama, or another privacy"
            )
        if exp.training.packing:
            spec.check_packing(model, own)
        if exp.training.checkpointing is True:
            check_layers(model)  # fails here, where the user sees it, and not in a worker
        layout = Layout.of(trained).sums
        stores = stores_of(spec.state, spec.algorithms, Layout.of(trained), spec.recipe)
        if executor is None:

            def make(device: torch.device, engine: Engine) -> Any:
                return spec.worker(model, own, device, engine)

            if fleet is not None:
                executor = fleet.executor(make, spec.guest)
            else:
                executor = SerialExecutor(make, devices[0], plan.threads, home)
        if "federated" in spec.algorithms:
            _check_algorithm(parts, spec.recipe, spec.algorithms["federated"], layout)
        bytes_of = describe(parts, folder, show, spec, model, layout, stores, f"{kind} on {', '.join(devices)}", plan)
        first = _keep_start(parts, folder, spec, model, layout)
        memory = _start(executor, parts, spec, layout, plan.engine)
        made = Setup(parts, folder, show, devices, plan, spec, model, layout, executor, memory, stores, first, bytes_of)
        made.read(first, 0)
        if full and kind == "pool":  # this process's model is that of the global parameters
            for name, view in layout.views(memory.params).items():
                model.get_parameter(name).data = view
        executor.broadcast(memory.params, _sent(spec, layout.views(memory.params)))
        yield from _fill_in(made, known)
    except BaseException:
        if kind == "pool":
            executor.close()
        raise
    return made


def _check_algorithm(parts: Parts, config: LocalTrainingConfig, algorithm: Algorithm, layout: Layout) -> None:
    """Whether the algorithm's hooks suit the run.

    Raises:
        UserError: if late messages would be added to others that hold other parameters, or clients have ranks that the
            adapter does not have.
    """
    try:
        algorithm.check_names(tuple(layout.shapes))
    except ValueError as error:
        raise UserError(f"algorithm.{error}") from None
    if config.ranks is not None or algorithm.overrides("rank"):
        largest_rank(layout)
        for rank in {config.rank_of(algorithm, int(client)) for client in parts.clients}:
            for name, shape in layout.shapes.items():
                shape_at(name, shape, rank)
    late = parts.exp.simulation.late == "next"
    for name in layout.shapes if (late or algorithm.buffered(1)) and algorithm.overrides("travels") else ():
        if len({algorithm.travels(name, round) for round in range(1, parts.exp.rounds + 1)}) > 1:
            key, way = ("simulation.late: 'next'", "; set simulation.late=drop") if late else ("algorithm.buffered", "")
            raise UserError(f"{key}, but this algorithm does not send the same parameters in every round{way}")


def _spec(parts: Parts, model: nn.Module, folder: RunFolder) -> WorkerSpec:
    exp = parts.exp
    sixteen = exp.model.dtype in ("bfloat16", "float16")
    settings = exp.to_dict()["adapter"]
    settings.pop("name")
    settings.pop("ranks", None)  # of the clients, not of PEFT
    return WorkerSpec(
        model=model,
        adapter=exp.adapter.name,
        settings=settings,
        task=exp.model.task,
        base_dropout=exp.model.base_dropout,
        autocast=getattr(torch, exp.model.dtype)
        if exp.adapter.name == "none" and sixteen and exp.training.master_weights
        else None,
        seed=exp.seed,
        tokens=parts.tokens,
        train=shareable(parts.partition),
        own=None if parts.own is None else shareable(parts.own),
        algorithms=_algorithms(exp),
        recipe=dataclasses.replace(
            recipe_of(exp),
            slots=schedule_of(parts, "federated").slots,
            attack=parts.attack,
            root=parts.root,
            ranks=ranks_of(parts),
            examples=parts.ledger and PrivateExamples(parts.ledger.clip, parts.ledger.z),
        ),
        state=folder.path / "checkpoints",
        tokenizer=parts.tokenizer,
        masters=exp.training.master_weights,
        packing=exp.training.packing,
        kernels=kernels(),
    )


def _algorithms(exp: Experiment) -> dict[str, Algorithm]:
    """Mode -> algorithm; with `ADAPTED` for what clients train in front of an evaluation."""
    federated = algorithm_of(exp.algorithm, exp.aggregator)
    out = {m: federated if m == "federated" else Local() for m in exp.modes}
    adapted = federated.adapted() if "federated" in out else None
    return out if adapted is None else {**out, ADAPTED: adapted}


def _pool(
    spec: WorkerSpec, model: nn.Module, parts: Parts, devices: list[str], count: int, home: str | None, show: Progress
) -> PoolExecutor:
    """A pool whose workers share the base and the examples with this process.

    Workers are sent modules of their own, on which nothing is put here, since a worker that replaces a dead one starts late.
    The weights of full fine-tuning are the global parameters.
    """
    full = parts.exp.adapter.name == "none"
    if not full:
        sharing.share_memory(model)
    bare = sharing.blank(model) if full else sharing.borrow(model)
    sharing.share_memory(bare)  # its buffers
    for tensor in spec.shared():
        tensor.share_memory_()
    for tokens in parts.tokens.values():
        tokens.share()
    made = dataclasses.replace(spec, model=bare)
    return PoolExecutor(made, devices, count, home, hang_s=parts.exp.executor.hang_s, note=show.warn)


def _start(executor: Any, parts: Parts, spec: WorkerSpec, layout: Layout, engine: Engine) -> Memory:
    summed = max(reducer_of(a, layout, spec.recipe).numel for a in spec.algorithms.values())
    server = Layout.of(_sent(spec, meta(layout)))
    return executor.start(layout, server, engine, summed, schedule_of(parts, "federated").many_packs)


def _sent(spec: WorkerSpec, params: Params) -> Params:
    """The server's state that clients of the first round receive."""
    algorithm = spec.algorithms.get("federated")
    return algorithm.sent(algorithm.init(params)[0]) if algorithm else {}


def _keep_start(parts: Parts, folder: RunFolder, spec: WorkerSpec, model: nn.Module, layout: Layout) -> Store:
    """Write what training starts from: `init/`, a folder that reloads, and the same as one record.

    Neither stays in memory, where a full model would be one copy too many.
    """
    first, start = Store(folder.path / "checkpoints" / f"{START}.bin", layout.numel, layout.dtype), 0
    for parameter in adapters.trained(model).values():
        first.write_at(0, start, parameter.data.reshape(-1))
        start += parameter.numel()
    kept = folder.record().get("init")
    if not kept or differing(folder.path, kept) or not (folder.path / "init").is_dir():
        save_model(parts, folder, spec, model, layout, None, "init")
        folder.record(init=record(folder.path, ["init"]))
    return first


def _fill_in(setup: Setup, known: bool) -> Generator[None, None, None]:
    """Resolve the plan at the first start of a run, and show it."""
    exp, plan, executor, hint = setup.exp, setup.plan, setup.executor, None
    if known or not (plan.packed or exp.adapter.name == "none"):
        if not known:
            plan.checkpointing = exp.training.checkpointing is True
        executor.configure(plan.engine)
    else:
        hint = choose(plan, setup.parts, setup.spec, setup.model, setup.layout, executor, setup.devices)
        yield from setup.initial_scores()  # takes what every evaluation takes
        plan.saw(executor.peaks()[0])
    save_plan(setup.folder, plan)
    for line in [hint] * (hint is not None) + describe_plan(plan, ", ".join(setup.devices)):
        setup.show.note(line)
