"""The plan of a run - threads, lanes, micro-batch - resolved once, at its first start, and read by every resume."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import numpy as np
import torch
from torch import nn

from fedsim.config.experiment import Experiment
from fedsim.core.errors import UserError
from fedsim.core.params import Layout
from fedsim.core.seeding import stream
from fedsim.core.store import Records, Store
from fedsim.models.recompute import layers_of
from fedsim.runs.build import Parts
from fedsim.runs.checkpoints import Checkpoints
from fedsim.runs.folder import RunFolder
from fedsim.runs.resolve import free_memory, schedule_of, token_bytes
from fedsim.runs.worker_spec import WorkerSpec
from fedsim.simulate.schedule import CENTRAL
from fedsim.simulate.state import State
from fedsim.training.packs import reducer_of
from fedsim.training.planner import Packs, Plan, choose_lanes
from fedsim.training.trainer import filled

MODES = ("local", "federated", "central")


def resolve_plan(exp: Experiment, folder: RunFolder, devices: list[str]) -> tuple[Plan, bool]:
    """The plan that the run was started with, or a new one to be filled in; and whether it was known.

    Threads and lanes decide the last bits, so they are resolved once and hold for every resume.

    Raises:
        UserError: if the config asks for other threads than the run was started with.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, micro = exp.executor.threads, exp.local.micro_batch or exp.local.batch_size
    known = recorded(folder).get("plan")
    if known is None:
        return Plan(threads or max(1, cores // len(devices)), micro_batch=micro), False
    if threads is not None and threads != known["threads"]:
        way = "the run was started with another number, which its last bits depend on; leave the key out, or use another name"
        raise UserError(f"executor.threads: {threads}, but {folder.path.name} has {known['threads']}: {way}")
    return Plan(**{"micro_batch": micro, **known}), True


def recorded(folder: RunFolder) -> dict[str, Any]:
    """What a run recorded of itself: rounds and plan; from its last checkpoints if the record is damaged."""
    found = folder.record()
    for mode in reversed(MODES):
        if "plan" not in found:
            kept = Checkpoints(folder.path, mode, *[Store(folder.path, 0, torch.float32)] * 2).kept()
            info = next((info for _, info in reversed(kept) if info is not None), {})
            found |= {key: info[key] for key in ("rounds", "plan") if key in info}
    return found


def save_plan(folder: RunFolder, plan: Plan) -> None:
    """Write the plan, for the next resume and to be read."""
    value = dataclasses.asdict(plan)
    folder.record(plan=value)
    folder.write_json("plan.json", value)


def choose(
    plan: Plan, parts: Parts, spec: WorkerSpec, model: nn.Module, layout: Layout, executor: Any, devices: list[str]
) -> str | None:
    """Choose lanes and micro-batch by what passes of the first round take.

    Returns:
        A hint for the user if workers will be idle.
    """
    exp, device = parts.exp, devices[0]
    full, on_gpu = exp.adapter.name == "none", device.startswith("cuda")
    frozen = [*model.buffers(), *([] if full else model.parameters())]
    first, free = first_packs(parts, spec), free_memory(device)
    choose_lanes(
        plan,
        first,
        executor.measure,
        executor.configure,
        lambda: executor.peaks()[0],
        workers=len(devices),
        lanes=1 if full else exp.training.lanes,
        checkpointing=exp.training.checkpointing if layers_of(model) else False,
        base_bytes=sum(t.nbytes for t in frozen),
        token_bytes=token_bytes(model),
        total=torch.cuda.mem_get_info(device)[1] if on_gpu else None,
        free=None if free is None else free // devices.count(device),
        # The weights of full fine-tuning are there already, and are counted with its gradient and optimizer state.
        resident=executor.peaks()[0] - (layout.nbytes if full and not on_gpu else 0),
        on_gpu=on_gpu,
    )
    sums = max(reducer_of(a, layout, spec.recipe).numel for a in spec.algorithms.values()) * layout.dtype.itemsize
    if sums > 2 * layout.nbytes:  # an aggregator that has a slot for each client
        plan.memory["messages"] = sums
        plan.memory["predicted"] += 0 if on_gpu else sums  # zeros, of which a CPU holds nothing yet
    if full:
        plan.memory |= {"global": layout.nbytes, "sum": sums}
        plan.memory["chunk"] = min(layout.nbytes, 4 * (spec.recipe.chunk or 0))
    packs = -(-first.clients // plan.lanes)
    if packs < len(devices) and first.clients > packs:
        way = f"lower training.lanes (now {plan.lanes})"
        return f"{packs} pack(s) per round for {len(devices)} workers: {way} to give each one"
    return None


def first_packs(parts: Parts, spec: WorkerSpec) -> Packs:
    """What round 1 trains, for the planner: its first passes are measured, its largest one is predicted."""
    exp = parts.exp
    mode = next(m for m in ("federated", "local", "central") if m in exp.modes)
    # As if every client were available, and the cohort as large as is expected.
    schedule = dataclasses.replace(schedule_of(parts, mode), behavior=None, sampler="fixed")
    sites = spec.sites()
    tokens, draw, most = parts.tokens["train"], spec.recipe.draw, spec.recipe.row_tokens
    front = spec.settings.get("num_virtual_tokens", 0) if spec.adapter in ("p_tuning", "prompt") else 0
    state = State(torch.empty(0), {}, Records(), keeps=False)
    tasks = {t.client: t for t in schedule.tasks(1, state)}

    @functools.cache
    def batches(client: int) -> list[np.ndarray]:
        rows = sites.everything() if client == CENTRAL else sites.train(client)
        return draw.batches(rows, stream(exp.seed, "batches", tasks[client].name, 1), tasks[client].steps)

    def one_pass(batch: np.ndarray, rows: int) -> np.ndarray:
        """The examples of a first pass; packed end to end, of the fullest one."""
        if most is None:
            return batch[:rows]
        batch = batch[np.argsort(tokens.lengths_of(batch), kind="stable")]
        passes = filled(batch, tokens.lengths_of(batch), rows * most)
        return max(passes, key=lambda p: tokens.lengths_of(p).sum())

    def first(lanes: int, rows: int) -> list[np.ndarray]:
        return [one_pass(batches(t.client)[0], rows) for t in schedule.packs(1, state, lanes)[0].tasks]

    def last(lanes: int, rows: int) -> list[np.ndarray]:
        return [batches(t.client)[-1][:rows] for t in schedule.packs(1, state, lanes)[0].tasks]

    def largest(lanes: int, rows: int) -> int:
        found = 0
        for pack in schedule.packs(1, state, lanes):
            each = [batches(t.client) for t in pack.tasks]
            for i in range(min(50, max(map(len, each)))):  # the steps of a round are much alike
                here = [b[i] for b in each if i < len(b)]
                if most is not None:
                    found = max(found, *(int(tokens.lengths_of(one_pass(b, rows)).sum()) for b in here))
                else:
                    longest = [np.sort(tokens.lengths_of(b))[-rows:] for b in here]
                    found = max(found, int(sum(n.sum() + front * len(n) for n in longest)))
        return found

    some = batches(next(iter(tasks)))
    short = len(some) > 1 and len(some[-1]) < len(some[0])
    mean = float(tokens.lengths_of(tokens.kept()).mean()) + front
    return Packs(len(tasks), first, largest, last if short else None, len(some), mean)
