"""One call of `run`: build, go through the modes or take them up where a checkpoint left them, score, export.

The folder is all that outlives it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms import Algorithm, Local
from fedsim.channel import Sizes, downlink, uplink
from fedsim.config.experiment import Experiment
from fedsim.config.sections import algorithm_of
from fedsim.core.errors import CallbackError, UserError, WorkerDied
from fedsim.core.files import CLIENT_FOLDERS, differing, folder_names, read_checked, record, write_checked
from fedsim.core.numerics import kernels, threads
from fedsim.core.params import Layout, Params, clone, meta
from fedsim.core.seeding import stream
from fedsim.core.store import Records, Store
from fedsim.core.types import Engine, Report, RoundEnd, Row, Scores, Scoring
from fedsim.executors import PoolExecutor, SerialExecutor
from fedsim.executors.fleet import FleetExecutor, Member
from fedsim.models import adapters, base
from fedsim.models.card import write_card
from fedsim.models.flat import has_fast_float32
from fedsim.models.forward import Recompute, layers_of
from fedsim.runs.build import CENTRAL, Parts, Shared
from fedsim.runs.bundle import Bundle, shareable
from fedsim.runs.folder import RunFolder, disk_error, environment, replace_folder, save_arrays
from fedsim.runs.predictions import ByRow, by_row, load_by_row, save_by_row, write_predictions
from fedsim.runs.progress import Progress
from fedsim.runs.resolve import check_memory, free_memory, recipe_of, schedule_of, token_bytes, work_of
from fedsim.runs.trackers import Trackers
from fedsim.simulate.rounds import CENTRAL as CENTRAL_CLIENT
from fedsim.simulate.rounds import (
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
from fedsim.training.packs import reducer_of
from fedsim.training.planner import Packs, Plan, choose_lanes, describe
from fedsim.training.ranks import largest_rank, shape_at
from fedsim.training.records import RecordLayout, stores_of
from fedsim.training.trainer import filled
from fedsim.training.worker import Worker

_PRODUCTS = (
    *("config.yaml", "environment.json", "plan.json", "memory.json", "model.json", "partition.npz", "partition.json"),
    *(CLIENT_FOLDERS, "metrics.jsonl", "scores.npz", "predictions.csv", "comparison.json", "figures/examples.md"),
)
BY_ROW_SITES = 100  # sites alone whose last models are scored row by row; of more, only the chosen ones


class Session:
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
        callback: Callable[[RoundEnd], object] | None = None,
    ) -> None:
        self.exp, self.parts, self.folder, self.show = exp, parts, folder, show
        self.shared, self.member, self.callback = shared, member, callback
        self.kind, self.devices, self.status = kind, devices, status
        before = status.get("seconds")
        self.before, self.began = before if isinstance(before, (int, float)) else 0.0, time.monotonic()
        self.choice = Choice(exp.best.metric, exp.best.mode)
        self.initial: Scores | None = None
        self.by_row: dict[str, ByRow] = {}
        self.at: tuple[str, int] | None = None  # the mode at work and its last committed round
        self.costs: list[tuple[list[Row], float]] = []  # what checkpoints took, not logged yet
        self.exported: dict[str, tuple[str | None, int]] = {}  # folder -> whose model, of which round
        self.slow_evaluation = False  # whether it was said

    # ------------------------------------------------------------------------------------------ start to end

    def run(self) -> None:
        exp, folder = self.exp, self.folder
        self.plan = self._plan()
        folder.clear()
        self._write_inputs()
        known = self._told()
        settings = exp.tracking
        self.trackers = Trackers(
            settings.with_, exp.name, folder.path, exp.to_dict(), known.get("trackers"), settings.clients
        )
        with contextlib.closing(self.trackers):
            if self.trackers:
                self._note_tracked(known.get("metrics_bytes", 0))
            self._run_modes()
            gc.collect()
            self._note_files()
            self._status("finished", figures=False)
            draw_figures(folder, self.show)
            self.trackers.log_figures(folder.path / "figures", exp.rounds)
            self._status("finished")

    def _run_modes(self) -> None:
        exp, folder = self.exp, self.folder
        executor = None
        try:
            executor = self._build()
            end = 0
            self.show.plan({mode: (work_of(self.parts, mode), self._rounds_left(mode)) for mode in self._modes()})
            for mode in self._modes():
                end = self._mode(mode, end, executor)
            folder.cut_metrics(end)
            parts = self.parts
            write_predictions(folder, parts.source, parts.tokens, exp.data.columns, self.by_row)
            self._compare_memory(executor)
        except BaseException as error:
            # Ctrl-C, a signal, the end of a fleet, or the user's own callback.
            stopped = not isinstance(error, Exception) or isinstance(error, CallbackError)
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
            # The base need not lie in memory while figures are drawn.
            executor = self.executor = self.model = self.bundle = None

    def _rounds_left(self, mode: str) -> int:
        return self.exp.rounds - max((r for r, info in self.folder.checkpoints(mode) if info is not None), default=0)

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
        self._status("running")  # first: what a finished run recorded of its files does not hold any more
        (folder.path / "checkpoints" / "files.json").unlink(missing_ok=True)
        folder.write_text("config.yaml", self.exp.to_yaml())
        kernels = "oneDNN" if has_fast_float32() else "torch"
        about = {**environment(self.devices, self.plan.threads), "frozen_float32_on_cpu": kernels}
        self._compare_environment(about)
        folder.write_json("environment.json", about)
        save_arrays(folder, "partition.npz", parts.partition.to_arrays())
        folder.write_json("partition.json", parts.report)
        self.folders = folder_names(parts.partition.names or ())
        if unlike := {place: client for client, place in self.folders.items() if place != client}:
            folder.write_json(CLIENT_FOLDERS, unlike)
        write_checked(folder.path / "checkpoints" / "rounds.json", {"rounds": self.exp.rounds})

    def _compare_environment(self, now: dict[str, Any]) -> None:
        """Say where rounds that are done were computed otherwise than those to come."""
        file = self.folder.path / "environment.json"
        if not file.exists() or not any(self.folder.checkpoints(mode) for mode in self._modes()):
            return
        before = self.folder.read_json(file.name)
        if before is None:
            self.show.warn("environment.json: damaged, so what the rounds before were computed with cannot be told")
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
        if mode:  # a signal may come between a checkpoint and the note of it: the folder knows
            round = max((r for r, info in self.folder.checkpoints(mode) if info is not None), default=round)
        where = (
            f"after round {round} of {mode}" if round else f"before round 1 of {mode}" if mode else "before training"
        )
        return f"stopped {where}; the same command goes on from there"

    def _note_files(self) -> None:
        """Record sizes and checksums of what a finished run holds, so that later damage is found."""
        run = self.folder.path
        records = [f"checkpoints/{file.name}" for file in sorted((run / "checkpoints").glob("*.bin"))]
        files = record(run, [*_PRODUCTS, *records, "init", *(f"checkpoints/{mode}" for mode in self._modes())])
        for mode in self._modes():
            files |= (self.folder.done(mode) or {}).get("files", {})
        write_checked(run / "checkpoints" / "files.json", files)

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
        if note := getattr(model, "head_note", None):
            self.show.note(note)
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
            train=shareable(parts.partition),
            own=None if parts.own is None else shareable(parts.own),
            algorithms={m: algorithm_of(exp.algorithm) if m == "federated" else Local() for m in exp.modes},
            recipe=dataclasses.replace(recipe_of(exp), slots=schedule_of(parts, "federated").slots),
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

                def make(device: torch.device, engine: Engine) -> Worker:
                    return self.bundle.worker(self.model, own, device, engine)

                if self.member is not None:
                    executor = self.member.make_executor(make, self.bundle.guest)
                else:
                    executor = SerialExecutor(make, self.devices[0], self.plan.threads, home)
            self._describe(adapters.trained(self.model))
            self._keep_start()
            algorithm = self.bundle.algorithms.get("federated")
            if algorithm is not None and exp.simulation.late == "next":
                _check_late(algorithm, self.layout, exp.rounds)
            if algorithm is not None and algorithm.overrides("rank"):
                largest_rank(self.layout)
                for rank in {algorithm.rank(int(client)) for client in self.parts.clients}:
                    for name, shape in self.layout.shapes.items():
                        shape_at(name, shape, rank)
            server = Layout.of(algorithm.sent(algorithm.init(meta(self.layout))[0]) if algorithm else {})
            self.reducers = {
                m: reducer_of(a, self.layout, self.bundle.recipe) for m, a in self.bundle.algorithms.items()
            }
            summed = max(reducer.numel for reducer in self.reducers.values())
            many = schedule_of(self.parts, "federated").many_packs
            executor.start(self.layout, server, self.plan.engine, summed, many)
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
        if kept is None or differing(self.folder.path, kept) or not (self.folder.path / "init").is_dir():
            self._save_model(None, self.folder.path / "init")
            write_checked(self.folder.path / "checkpoints" / "init.json", record(self.folder.path, ["init"]))

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
        return algorithm.sent(algorithm.init(self.layout.views(flat))[0]) if algorithm else {}

    def _describe(self, params: Params) -> None:
        about = adapters.describe(self.model, params)
        messages, dtype = self.exp.messages, next(iter(params.values())).dtype
        up, down = self._sizes(dtype, 1, None)
        self.sizes = functools.cache(functools.partial(self._sizes, dtype))
        about |= {"bytes_up": up.total, "bytes_down": down.total, "up": vars(up), "down": vars(down)}
        kept = {m: self.stores[m].nbytes for m in self.exp.modes}
        self.folder.write_json("model.json", {**about, "adapter": self.exp.adapter.name, "kept_bytes_per_client": kept})
        how = [f" as {name}" if name else "" for name in (messages.up, messages.down)]
        self.show.note(
            f"{self.exp.adapter.name} on {self.exp.model.path}: {about['trained']:,} of {about['parameters']:,} parameters are trained "
            f"({about['per_cent']:.2f} %); a client sends {up.total / 1e6:.2f} MB{how[0]} and receives {down.total / 1e6:.2f} MB{how[1]} a round"
        )
        if "federated" not in self.exp.modes and any(how):
            self.show.note(
                "messages: nothing travels without the mode federated, so messages.up and down have no effect"
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
            if empty := ", ".join(f"{n} rows left out ({k})" for k, n in why.items() if k != "too long"):
                self.show.note(f"{split}: {empty}")
        for split, tokens in self.parts.tokens.items():
            if (over := tokens.over(self.exp.data.max_length)) is not None:
                share, text = over
                (self.show.warn if share > 0.05 else self.show.note)(
                    f"{'warning: ' if share > 0.05 else ''}{split}: {text}"
                )

    def _choose_lanes(self, executor: SerialExecutor | PoolExecutor) -> None:
        """Resolve the plan at the run's first start, and show it."""
        exp, plan, device = self.exp, self.plan, self.devices[0]
        if not self.planned:
            plan.checkpointing = exp.training.checkpointing is True
            whole = exp.adapter.name == "none"
            if plan.packed or whole:
                on_gpu, here = device.startswith("cuda"), self.devices.count(device)
                frozen = [*self.model.buffers(), *([] if whole else self.model.parameters())]
                first = self._first_packs()
                choose_lanes(
                    plan,
                    first,
                    executor.measure,
                    executor.configure,
                    lambda: executor.peaks()[0],
                    lambda: self._initial_scores(executor),
                    workers=len(self.devices),
                    lanes=1 if whole else exp.training.lanes,
                    checkpointing=exp.training.checkpointing if layers_of(self.model) else False,
                    base_bytes=sum(t.nbytes for t in frozen),
                    token_bytes=token_bytes(self.model),
                    total=torch.cuda.mem_get_info(device)[1] if on_gpu else None,
                    free=None if (free := free_memory(device)) is None else free // here,
                    # A whole model's weights are there already, and are counted with its gradient and moments.
                    resident=executor.peaks()[0] - (self.layout.nbytes if whole and not on_gpu else 0),
                    on_gpu=on_gpu,
                )
                packs = -(-first.clients // plan.lanes)
                if packs < len(self.devices) and first.clients > packs:
                    way = f"lower training.lanes (now {plan.lanes})"
                    self.show.note(f"{packs} pack(s) a round for {len(self.devices)} workers: {way} to give each one")
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
        sites = bundle.sites()
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
        mean = float(tokens.lengths_of(tokens.kept()).mean()) + front
        return Packs(len(tasks), first, largest, last if short else None, len(some), mean)

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
            damaged = differing(folder.path, done["files"])
        if done is None or damaged:
            if damaged:
                self.show.warn(f"{mode}: damaged or missing, and made anew: {', '.join(damaged)}")
            return self._run_mode(mode, begin, executor, done)
        if folder.where_rows(mode, done, begin) == "aside":
            self._begin_rows(mode, begin, done)
            done |= folder.stretch()
            folder.end_mode(mode, done)
        self.by_row |= load_by_row(folder, mode)
        for round, info in folder.checkpoints(mode):
            if info is None or not folder.has_tensors(mode, info) or not self._has_records(mode, info):
                folder.drop_checkpoint(mode, round)  # else the end of the run would record it as it is now
                left = [r for r, _ in folder.checkpoints(mode)]
                where = f"go on from round {left[-1]}" if left else "train this mode from the start"
                self.show.warn(
                    f"{mode}: its models and scores are whole, but its checkpoint of round {round} is damaged and is "
                    f"removed: a run with more rounds would {where}"
                )
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
            self._note_tracked(end)

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
                    restore(state, self.layout, self.reducers[mode].numel, infos, folder.load_tensors(mode, info))
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

    def _has_records(self, mode: str, info: dict[str, Any]) -> bool:
        """Whether the records of client state and best models that a checkpoint refers to are what they were."""
        tables = {mode: info["table"], f"best-{mode}": info["best_table"]}
        try:
            found = [Records(dict(zip(*t, strict=True))).digest(self.stores[name])[0] for name, t in tables.items()]
        except OSError:
            return False
        return found == info["records"]

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
        self.at, self.costs, self.exported = (mode, state.round), [], {}
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
        spent: list[tuple[float, float]] = []  # a round's seconds by pack: evaluation, all

        def on_pack(round: int, report: Report) -> None:
            self.useful += report.tokens
            self.computed += report.computed
            spent.append((report.scoring, report.seconds))
            self.show.pack(round, report)

        def on_round(round: int, rows: list[Row]) -> None:
            merged = state.evaluation_seconds
            self._compare_times(round, *np.sum([*spent, (merged, merged)], axis=0))
            spent.clear()
            self._log_costs()
            self._log(rows)
            if round % exp.checkpoint.every == 0 or round == exp.rounds:
                self._checkpoint(mode, state, algorithm)
            self.show.round(round, _headline(rows, round, self.choice.metric))
            if self.callback is not None:
                try:
                    self.callback(RoundEnd(mode, round, exp.rounds, list(rows)))
                except Exception as error:
                    raise CallbackError(error) from error

        run_rounds(
            schedule,
            algorithm,
            self.layout,
            self.reducers[mode],
            executor,
            state,
            self.choice,
            lanes=lambda round: max(1, self.plan.lanes_at(mode, round) // len(algorithm.parts)),
            halve=functools.partial(self._halve, mode),
            generate=exp.evaluate.generate,
            chunk=self.bundle.recipe.chunk,
            bytes_of=lambda round, client: tuple(s.total for s in self.sizes(round, algorithm.rank(client))),
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
        self._write_cards(mode)
        about = {"models": len(found), "rounds": exp.rounds, "plan": dataclasses.asdict(self.plan)}
        about["files"] = record(folder.path, [*self.exported, f"checkpoints/{mode}/by_row.npz"])
        about |= {key: done[key] for key in ("metrics_begin", "metrics_bytes", "metrics_sha256")}
        folder.end_mode(mode, about)
        self._track(about["metrics_bytes"])
        self.show.end()
        return about["metrics_bytes"]

    def _compare_times(self, round: int, evaluation: float, total: float) -> None:
        """Say once that evaluation takes more than half of a round."""
        if evaluation <= total / 2 or self.slow_evaluation:
            return
        self.slow_evaluation = True
        self.show.note(
            f"evaluation took {evaluation / total:.0%} of round {round}; to spend less, set evaluate.max_examples, or evaluate.every_rounds above {self.exp.evaluate.every_rounds}"
        )

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
            self.trackers.log([json.loads(line) for line in self.folder.rows(begin, end).splitlines()])
            self._note_tracked(end)

    def _note_tracked(self, end: int) -> None:
        value = {"metrics_bytes": end, "trackers": self.trackers.state}
        write_checked(self.folder.path / "checkpoints" / "tracked.json", value)

    def _tracked(self) -> int:
        """Bytes of the metrics file that trackers were told of."""
        return self._told().get("metrics_bytes", 0)

    def _told(self) -> dict[str, Any]:
        return read_checked(self.folder.path / "checkpoints" / "tracked.json") or {}

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

    def _sizes(self, dtype: torch.dtype, round: int, rank: int | None) -> tuple[Sizes, Sizes]:
        """Bytes of a client's message in a round, and of what it receives: all that ever travels, as it may have missed rounds."""
        algorithm, messages = self.bundle.algorithms.get("federated", Algorithm()), self.exp.messages
        layouts = algorithm.messages(self.layout).values()
        sent = [(n, s) for layout in layouts for n, s in layout.shapes.items() if algorithm.travels(n, round)]
        stays, state = algorithm.stays(self.layout.shapes), algorithm.sent(algorithm.init(meta(self.layout))[0])
        received = [*self.layout.shapes.items(), *((n, tuple(t.shape)) for n, t in state.items())]
        received = [(n, s) for n, s in received if n not in stays]
        sent, received = ([shape_at(n, s, rank) for n, s in each] for each in (sent, received))
        return uplink(messages.up).nbytes(sent, dtype), downlink(messages.down).nbytes(received, dtype)

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
            executor.broadcast(state.params, self.bundle.algorithms[mode].sent(state.server))
        initial = merged_rows(0, 0, self._initial_scores(executor), "", schedule.name)
        clients = sorted(set(schedule.last_rounds) - set(known)) if mode == "local" else []
        names = [schedule.name(c) for c in clients] if mode == "local" else [None]
        return [dataclasses.replace(row, scope=mode, client=name) for name in names for row in initial]

    def _initial_scores(self, executor: SerialExecutor | PoolExecutor) -> Scores:
        """Scores of the global parameters that training starts from, which the executor has."""
        if self.initial is None:
            self.initial = executor.score([Scoring("validation", generate=self.exp.evaluate.generate)])[0][0]
        return self.initial

    # ------------------------------------------------------------------------------------------- the end

    def _finish_mode(
        self, mode: str, state: State, executor: SerialExecutor | PoolExecutor
    ) -> tuple[dict[str, ByRow], list[Row]]:
        """Export last and chosen models, score the chosen ones once on the test rows: each row's scores by model, and the rows."""
        owners: list[tuple[str | None, Chosen, str]] = []
        if self.bundle.algorithms[mode].merges:
            self._export("global", (None, state.round))
            last = self._by_row("validation", [mode], executor.score([Scoring("validation", by_row=True)]))
            self._export_personal(mode, state)
            requests: list[Scoring] = []
            if state.best is not None:
                self._read(self.stores[f"best-{mode}"], state.best_records.read(MERGED), executor.weights)
                self._export("best", (None, state.best.round))
                executor.broadcast(executor.weights, {})
                requests.append(Scoring("test"))
                owners.append((None, state.best, mode))
        else:
            labels, records, best_records = [], [], []
            for client, record in sorted(state.records.table.items()):
                name = CENTRAL if client == CENTRAL_CLIENT else self.parts.partition.name(client)
                place = CENTRAL if client == CENTRAL_CLIENT else f"local/{self.folders.get(name, name)}"
                label = CENTRAL if client == CENTRAL_CLIENT else f"local {name}"
                self._read(self.stores[mode], record, executor.weights)
                who = None if client == CENTRAL_CLIENT else name
                self._export(place, (who, state.round))
                labels.append(label)
                records.append(record)
                if client not in state.site_best:
                    continue
                best = state.best_records.read(client)
                self._read(self.stores[f"best-{mode}"], best, executor.weights)
                self._export(f"{place}/best", (who, state.site_best[client].round))
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

    def _export(self, place: str, of: tuple[str | None, int]) -> None:
        """Write a folder of the model with the executor's global parameters, which are a client's (None: all's) of a round."""
        self._save_model(self.executor.weights, self.folder.path / place)
        self.exported[place] = of

    def _export_personal(self, mode: str, state: State) -> None:
        """Write a folder of each client's own model, where the algorithm has clients keep one, or a part of one."""
        own = RecordLayout.of(mode, self.bundle.algorithms[mode], self.layout, self.bundle.recipe).own
        views = {n: view for n, view in self.layout.views(self.executor.weights).items() if n in own}
        shared = clone(views)
        for client, place in sorted(state.records.table.items()) if own else ():
            for name, view in views.items():
                view.copy_(self.stores[mode].read(place, own[name], own[name] + view.numel()).view(view.shape))
            name = self.parts.partition.name(client)
            self._export(f"personal/{self.folders.get(name, name)}", (name, state.round))
        for name, view in views.items():
            view.copy_(shared[name])

    def _write_cards(self, mode: str) -> None:
        """Model cards of what the mode exported, with the scores that were logged for each."""
        scores: dict[tuple[str | None, int], dict[tuple[str, str], float]] = {}
        for split in ("validation", "test"):
            for row in self.folder.rows_of(split):
                if row["scope"] == mode:  # of two of a round the later is the merged model's
                    scores.setdefault((row["client"], row["round"]), {})[split, row["name"]] = row["value"]
        examples = len(self.parts.tokens["train"].kept())
        for place, (client, to) in self.exported.items():
            round = max((r for c, r in scores if c == client and r <= to), default=to)  # a site may have sat some out
            title = f"{mode} model{f' of {client}' if client else ''} after round {round}"
            found = [(*key, value) for key, value in scores.get((client, round), {}).items() if ":" not in key[1]]
            about = {"title": title, "scores": found, "examples": examples}
            write_card(self.folder.path / place, self.exp.to_dict(), self.parts.model, **about)

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
        settings, whole = self.bundle.settings, exp.adapter.name == "none"
        try:
            adapters.save(
                self.model,
                beside,
                name=exp.adapter.name,
                settings=settings,
                base_name=self.parts.model.reference,
                # Beside adapters of sites, which can be many and a megabyte each, it would be most of what is written.
                tokenizer=None
                if any(place.is_relative_to(self.folder.path / of) for of in ("local", "personal")) and not whole
                else self.parts.tokenizer,
                shard_mb=exp.checkpoint.shard_mb,
            )
            replace_folder(beside, place)
        except BaseException:  # a full disk gets its room back
            shutil.rmtree(beside, ignore_errors=True)
            raise


def _check_late(algorithm: Algorithm, layout: Layout, rounds: int) -> None:
    """Late messages are added to those of the next round, which have to hold the same parameters."""
    if algorithm.overrides("travels"):
        for name in layout.shapes:
            if len({algorithm.travels(name, round) for round in range(1, rounds + 1)}) > 1:
                raise UserError(
                    "simulation.late: 'next', but this algorithm does not send the same parameters in every round; "
                    "set simulation.late=drop"
                )


def draw_figures(folder: RunFolder, show: Progress) -> None:
    from fedsim.analysis.plots import save_figures

    folder.sync_metrics()
    for path in save_figures(folder.path):
        show.note(f"figure: {path}")


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
