"""What a config comes to on this data and machine: how clients train, who trains when, and on which devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedsim.channel.filters import Filters, Percentile, SparseVector
from fedsim.config.components import algorithm_of
from fedsim.config.experiment import Experiment
from fedsim.config.sections import Simulation
from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.core.store import Records
from fedsim.core.types import ADAPTED, ROOT
from fedsim.data.partition import VirtualPartition
from fedsim.runs.build import Parts
from fedsim.runs.checks import sampler_of
from fedsim.simulate.availability import ClientAvailability, by_number
from fedsim.simulate.schedule import CENTRAL as CENTRAL_CLIENT
from fedsim.simulate.schedule import Schedule
from fedsim.simulate.state import State
from fedsim.training.config import LocalTrainingConfig
from fedsim.training.optim import Optim


def recipe_of(exp: Experiment) -> LocalTrainingConfig:
    """How the experiment's clients train and are scored."""
    work, ev = exp.local, exp.evaluate
    names = [f.name for f in dataclasses.fields(Optim)]
    keys = {n: getattr(work, n) for n in names}
    # Alone and central nothing is merged: rounds are only places where they are scored, so the optimizer lives on.
    keep = {"federated": work.keep_state, "local": True, "central": True, ADAPTED: False}
    return LocalTrainingConfig(
        Optim(**{**keys, "betas": tuple(work.betas)}),
        sampler_of(exp),
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
        meter=exp.adapter.name == "lora" and exp.privacy.name == "none",
        filters=filters_of(exp),
        private=exp.privacy.name == "central",
    )


def filters_of(exp: Experiment) -> Filters | None:
    """What changes updates before they are sent; None = nothing."""
    s = exp.privacy
    if s.name != "filters":
        return None
    percentile = s.percentile and Percentile(s.percentile.percentile, s.percentile.gamma)
    v = s.sparse_vector
    vector = v and SparseVector(v.fraction, v.epsilon, v.noise_var, v.gamma, v.tau, v.replace)
    exclude = tuple(s.exclude) if isinstance(s.exclude, list) else s.exclude
    return Filters(exclude, percentile, vector, exp.seed)


def ranks_of(parts: Parts) -> np.ndarray | None:
    """LoRA rank by client number; None where the config names none.

    Raises:
        UserError: for a list that is not one for each client, or a largest rank other than the adapter's.
    """
    given, clients = getattr(parts.exp.adapter, "ranks", None), parts.partition.num_clients
    if given is None:
        return None
    if isinstance(given, int):
        found = np.full(clients, given)
    elif isinstance(given, list):
        if len(given) != clients:
            raise UserError(
                f"adapter.ranks: has {len(given)} ranks, and there are {clients} clients; give one for each"
            )
        found = np.array(given)
    else:
        weights = np.array(given.weights or [1.0] * len(given.choices))
        if len(weights) != len(given.choices):
            raise UserError(
                f"adapter.ranks.weights: {given.weights} is not one for each of the {len(given.choices)} choices; give as many"
            )
        found = stream(parts.exp.seed, "ranks").choice(given.choices, clients, p=weights / weights.sum())
    most = given if isinstance(given, int) else max(given if isinstance(given, list) else given.choices)
    if most != parts.exp.adapter.r:
        raise UserError(
            f"adapter.r: {parts.exp.adapter.r}, but the largest of adapter.ranks is {most}; set adapter.r={most}"
        )
    return found.astype(np.int64)


def behavior_of(parts: Parts) -> ClientAvailability | None:
    """The simulated availability, dropout and speed of the clients; None if the config simulates none.

    Raises:
        UserError: for a client that is not there, or is not named where all have to be.
    """
    exp, partition = parts.exp, parts.partition
    if dataclasses.replace(exp.simulation, attackers=None) == Simulation():
        return None
    keys = {"availability": exp.simulation.availability, "speeds": exp.simulation.speeds}
    for key, needed in (("availability", ()), ("speeds", parts.clients.tolist())):
        if isinstance(keys[key], dict):
            names = [partition.name(c) for c in range(partition.num_clients)]
            keys[key] = by_number(keys[key], names, needed, f"simulation.{key}")
        elif isinstance(keys[key], list):
            keys[key] = tuple(keys[key])
    sim = exp.simulation
    return ClientAvailability(exp.seed, partition.name, drop=sim.drop, deadline_s=sim.deadline_s, late=sim.late, **keys)


def schedule_of(parts: Parts, mode: str) -> Schedule:
    """Who trains when and how much, for one mode."""
    exp, partition = parts.exp, parts.partition
    clients = parts.clients
    size = len(clients) if exp.cohort.size == "all" else exp.cohort.size
    lengths = parts.tokens["train"].lengths
    private = exp.privacy.name == "central"
    capped = private and exp.privacy.max_weight is not None
    algorithm = algorithm_of(exp.algorithm, exp.aggregator)

    def mean_length(client: int) -> float:
        if client == ROOT:
            return float(lengths[parts.root].mean())
        return float(lengths.mean() if client == CENTRAL_CLIENT else lengths[partition.rows(client)].mean())

    return Schedule(
        mode=mode,
        seed=exp.seed,
        rounds=exp.rounds,
        clients=clients,
        size=size,
        name=partition.name,
        sizes=partition.sizes,
        count=sampler_of(exp).count,
        steps=exp.local.steps,
        epochs=exp.local.epochs or 1,
        batch_size=exp.local.batch_size,
        match=exp.central.match,
        weights=algorithm.weighing if capped or not private else "uniform",
        length=mean_length,
        every_rounds=exp.evaluate.every_rounds,
        scores_clients=exp.evaluate.clients,
        central_rows=len(partition.kept) if isinstance(partition, VirtualPartition) else None,
        behavior=behavior_of(parts),
        root=0 if parts.root is None else len(parts.root),
        sampler=exp.cohort.sampler,
        max_weight=exp.privacy.max_weight if capped else None,
        buffered=algorithm.buffered(size) if mode == "federated" else None,
        discount=algorithm.discount,
    )


def work_of(parts: Parts, mode: str) -> float:
    """What a round of a mode takes, in tokens trained on; evaluating a token counts as a third of that: no backward pass.

    An estimate from round 1 with all clients available, for the time left.
    """
    schedule = dataclasses.replace(schedule_of(parts, mode), behavior=None, sampler="fixed")
    packs = schedule.packs(1, State(torch.empty(0), {}, Records(), keeps=False), 1)
    models = len(packs) if mode != "federated" or schedule.scores_clients else 0
    models += mode == "federated"
    held = parts.tokens["validation"]
    scored = float(held.lengths_of(held.kept()).sum()) * models / schedule.every_rounds
    return sum(pack.tokens for pack in packs) + scored / 3


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


def device_named(name: str) -> torch.device:
    """The device of a command's --device: auto | cpu | cuda | cuda:N.

    Raises:
        UserError: for one that is not there.
    """
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        return torch.device(cuda[0] if cuda else "cpu")
    name = "cuda:0" if name == "cuda" else name
    if name not in ("cpu", *cuda):
        raise UserError(f"--device: {name!r} is not on this machine, which has: {', '.join(['cpu', *cuda])}")
    return torch.device(name)


def token_bytes(model: nn.Module) -> int:
    """Bytes of one token's activation in the widest frozen layer; vocabulary-sized ones see few positions and do not count."""
    seen = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    left_out = {id(w) for w in (*seen, getattr(head, "weight", None))}
    frozen = [p for p in model.parameters() if p.dim() == 2 and not p.requires_grad and id(p) not in left_out]
    return max((max(p.shape) * p.element_size() for p in frozen), default=1)


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


def free_memory(device: str) -> int | None:
    """Bytes that are free on a device; None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024
