"""A worker whose clients train by users' scripts, between `receive` and `send`; all else of a round is as for any client."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms import Algorithm
from fedsim.client.context import EVALUATE, STEPS, SUBMIT, TRAIN, FLModel, ParamsType
from fedsim.client.runner import Script, ScriptClient, ScriptFailed, settle
from fedsim.core.errors import ClientError, UserError
from fedsim.core.params import Layout, Params
from fedsim.core.store import Store
from fedsim.core.types import Engine, Fault, Pack, Report, Row, Scores, Scoring, Share, Task, Turn
from fedsim.training.config import LocalTrainingConfig
from fedsim.training.lanes import LaneGroup
from fedsim.training.packs import RunPack
from fedsim.training.trainer import Fit
from fedsim.training.worker import Worker

END = "end"  # the mode in which scripts come to their end


class _Lanes:
    """What a lane group asks of a trainer."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.net = layout, SimpleNamespace(device=torch.device("cpu"))
        self.reserve(1)
        self.optimizer: Any = None

    def reserve(self, lanes: int) -> None:
        """Have room for so many lanes."""
        self.flat, self.grad = (torch.zeros(lanes, self.layout.numel, dtype=self.layout.dtype) for _ in range(2))


class ScriptWorker(Worker):
    """The clients of a run whose training is a script.

    Args:
        script: what they run.
        layout: of the parameters, in the type of sums.
        kinds: parameter -> the type that scripts know it by.
        algorithms, config, seed, state: as for any worker.
        rounds: of the run.
    """

    def __init__(
        self,
        script: Script,
        layout: Layout,
        kinds: Mapping[str, torch.dtype],
        algorithms: dict[str, Algorithm],
        config: LocalTrainingConfig,
        seed: int,
        state: Path,
        rounds: int,
    ) -> None:
        super().__init__(_Lanes(layout), None, None, algorithms, config, seed, state)  # pyright: ignore
        self.script, self.kinds, self.rounds, self.state = script, kinds, rounds, state
        self.clients: dict[tuple[str, str], ScriptClient] = {}
        settle(script)

    # ------------------------------------------------------------------------------------------- a round

    def train(self, pack: Pack, weights: Tensor, server: Params, out: Tensor, turn: Turn | None = None) -> Report:
        """Run the scripts of the pack's clients; see `Worker.train`. A pack of another mode scores, submits or ends."""
        if pack.mode in (EVALUATE, SUBMIT, END):
            return self._other(pack, weights)
        run = RunPack(Share(self, pack, weights, server, out, turn or Turn()))
        group, tasks = LaneGroup(run, run.algorithm.parts[0], self.trainer), list(pack.tasks)
        group.take(list(range(len(tasks))), tasks, [None] * len(tasks))
        self.trainer.reserve(len(tasks))
        group.start()
        steps, losses = [], []
        for i, task in enumerate(tasks):
            try:
                answer = self._ask(pack.mode, task, TRAIN, self.layout.views(self.trainer.flat[i]))
                self._put(task, answer, self.trainer.flat[i])
            except (UserError, ClientError) as error:
                if self.config.policy != "skip":
                    raise
                print(f"fedsim: {error}", file=sys.stderr)
                run.report.faults.append(Fault(task.client, task.name, "skipped", "script", math.nan))
                self.clients.pop((pack.mode, task.name), None)
                steps.append(1)
                losses.append(0.0)
                continue
            weight = _number(answer.meta, STEPS, 1.0)
            steps.append(max(1, int(weight)))
            losses.append(0.0)
            by_steps = run.algorithm.weighing != "uniform"
            tasks[i] = group.tasks[i] = _weighed(task, weight if by_steps else 1.0)
            run.report.rows += self._rows(pack.mode, task, answer, weight)
        fit = Fit(
            losses,
            np.zeros(len(tasks), dtype=np.int64),
            np.zeros(len(tasks), dtype=np.int64),
            steps,
            torch.ones(len(tasks)),
        )
        group.judge(fit)
        group.finish(fit)
        return run.report

    def _ask(self, mode: str, task: Task, kind: str, params: Params | None) -> FLModel:
        """The answer of a client's script; one that lives for all rounds is first brought to where it was."""
        key = (mode, task.name)
        client = self.clients.get(key)
        if client is None or not self.script.once:
            names: list[str | int] = [task.name] if self.script.once else [task.name, task.round]
            client = self.clients[key] = ScriptClient(
                self.script, task.name, [*names, *([] if mode == "federated" else [mode])]
            )
            if self.script.once:
                self._replay(mode, task, client)
        try:
            answer = client.ask(kind, self._model(params, task.round, kind))
            if not self.script.once:
                client.end()
        except ScriptFailed as error:
            raise _told(f"client {task.name}, round {task.round}", error) from None
        if self.script.once and kind == TRAIN:
            self._note(mode, task, answer)
        return answer

    def _model(self, params: Params | None, round: int, kind: str) -> FLModel:
        given = None if params is None else {n: self._given(n, t) for n, t in params.items()}
        meta = {"current_round": round - 1, "total_rounds": self.rounds, "task": kind}
        return FLModel(None, given or {}, current_round=round - 1, total_rounds=self.rounds, meta=meta)

    def _given(self, name: str, tensor: Tensor) -> Any:
        kind = self.kinds[name]
        out = tensor.round().to(kind) if not kind.is_floating_point else tensor.to(kind, copy=True)
        return out if self.script.torch else out.float().numpy() if kind == torch.bfloat16 else out.numpy()

    def _put(self, task: Task, answer: FLModel, into: Tensor) -> None:
        """Put an answer's parameters into `into`, `[N]`, which holds what the client received."""
        if answer.params is None:
            raise UserError(f"client {task.name}, round {task.round}: the answer to train has no params")
        sent, views = arrays(answer.params), self.layout.views(into)
        if odd := sorted(sent.keys() ^ views.keys()):
            where = "are not sent" if odd[0] in views else "were not received"
            raise UserError(
                f"client {task.name}, round {task.round}: parameters {', '.join(odd[:3])} {where}; send the names received"
            )
        for name, tensor in sent.items():
            if tensor.shape != views[name].shape:
                raise UserError(
                    f"client {task.name}, round {task.round}: {name} has shape {tuple(tensor.shape)}, received "
                    f"{tuple(views[name].shape)}"
                )
            if answer.params_type == ParamsType.DIFF:
                views[name].add_(tensor.to(views[name]))
            else:
                views[name].copy_(tensor)

    def _rows(self, mode: str, task: Task, answer: FLModel, weight: float) -> list[Row]:
        """Scores of the model received, that of the round before, and what the script logged in this one."""
        step, name = task.steps_done, task.name
        place = ("site", "merged_") if mode == "federated" else ("validation", "")
        metrics = numbers(answer.metrics)
        rows = [Row(task.round - 1, step, mode, name, place[0], place[1] + n, v, weight) for n, v in metrics.items()]
        client = self.clients[mode, task.name]
        at = step + max(1, int(weight))
        rows += [
            Row(task.round, at if s is None else s, mode, name, "train", n, v, weight) for n, v, s in client.logged
        ]
        client.logged.clear()
        return rows

    # -------------------------------------------------------------------------------------- replay

    def _history(self, mode: str, site: str) -> Path:
        return self.state / "answers" / f"{mode}-{hashlib.sha256(site.encode()).hexdigest()[:16]}.jsonl"

    def _note(self, mode: str, task: Task, answer: FLModel) -> None:
        """Write down that a script has answered, and what."""
        file = self._history(mode, task.name)
        file.parent.mkdir(exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"round": task.round, "hash": _hash(answer), "read": task.read}) + "\n")

    def _replay(self, mode: str, task: Task, client: ScriptClient) -> None:
        """Give a script the tasks again that it had before this round."""
        file = self._history(mode, task.name)
        if not file.is_file():
            return
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        past = {line["round"]: line for line in lines if line["round"] < task.round}
        file.write_text("".join(json.dumps(line) + "\n" for line in past.values()), encoding="utf-8")
        incoming = Store(self.state / f"incoming-{mode}.bin", self.layout.numel, self.layout.dtype)
        before: Tensor | None = None
        for round, line in sorted(past.items()):
            flat = incoming.read(round if mode == "federated" or before is None else 0) if before is None else before
            params = self.layout.views(flat)
            if mode == "federated":
                params = self.downlink.down(params)
            answer = client.ask(TRAIN, self._model(params, round, TRAIN))
            client.logged.clear()
            if _hash(answer) != line["hash"]:
                raise UserError(
                    f"client {task.name}: its script gives another answer to round {round} than before the stop, so it cannot be "
                    "brought back to where it was; set client.launch=each_round"
                )
            if mode == "local":
                before = flat.clone()
                self._put(task, answer, before)

    # ------------------------------------------------------------------------------ scores, models and the end

    def _other(self, pack: Pack, weights: Tensor) -> Report:
        report = Report(pack.index)
        for task in pack.tasks:
            if pack.mode == END:
                for key in [k for k in self.clients if k[1] == task.name]:
                    try:
                        self.clients.pop(key).end()
                    except ScriptFailed as error:
                        raise _told(f"client {task.name}, after the last round", error) from None
                continue
            answer = self._ask(
                "federated", task, pack.mode, self.layout.views(weights) if pack.mode == EVALUATE else None
            )
            if pack.mode == EVALUATE:
                report.rows += [
                    Row(
                        task.round,
                        task.steps_done,
                        "federated",
                        task.name,
                        EVALUATE,
                        n,
                        v,
                        _number(answer.meta, STEPS, 1.0),
                    )
                    for n, v in numbers(answer.metrics).items()
                ]
            else:
                flat = torch.zeros(self.layout.numel, dtype=self.layout.dtype)
                self._put(task, answer, flat)
                self.stores[SUBMIT].write_at(task.write, 0, flat)
        return report

    def score(self, request: Scoring, weights: Tensor, server: Params | None = None) -> list[Scores]:
        """Scripts score models themselves."""
        raise AssertionError("scripts score in packs")

    def configure(self, engine: Engine) -> None:
        """Nothing: scripts configure themselves."""

    def shrink(self) -> None:
        """Nothing is held."""


def _told(where: str, error: ScriptFailed) -> Exception:
    """A script's own traceback, or one line."""
    text = str(error)
    return ClientError(f"{where}: its script raised:\n{text}") if "\n" in text else UserError(f"{where}: {text}")


def arrays(params: Any) -> dict[str, Tensor]:
    """Parameters as scripts send them: name -> array, tensor or number, as tensors.

    Raises:
        UserError: for what is none of these.
    """
    if not isinstance(params, Mapping):
        raise UserError(f"params: {type(params).__name__} is not a dict of names and arrays")
    out = {}
    for name, value in params.items():
        try:
            out[str(name)] = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError):
            raise UserError(f"params: {name} is a {type(value).__name__}, not an array") from None
    return out


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """The numbers among metrics."""
    out = {}
    for name, value in (metrics or {}).items():
        try:
            out[str(name)] = float(value)
        except (TypeError, ValueError):
            continue
    return out


def _number(meta: Mapping[str, Any], key: str, default: float) -> float:
    try:
        found = float(meta.get(key, default))
    except (TypeError, ValueError):
        return default
    return found if math.isfinite(found) and found > 0 else default


def _weighed(task: Task, weight: float) -> Task:
    return dataclasses.replace(task, weight=task.weight * weight)


def _hash(answer: FLModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(arrays(answer.params or {}).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(repr(sorted(numbers(answer.metrics).items())).encode())
    return digest.hexdigest()


class ScriptSpec:
    """Makes the worker in its process."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __call__(self, device: torch.device, engine: Engine) -> ScriptWorker:
        return ScriptWorker(*self.args)


def first_model(script: Script, site: str, rounds: int) -> dict[str, Tensor]:
    """What a script sends when it has received no parameters: the initial model.

    Raises:
        UserError: if the script fails.
    """
    settle(script)
    client = ScriptClient(script, site, ["init"])
    try:
        model = FLModel(None, {}, current_round=0, total_rounds=rounds, meta={"task": TRAIN})
        answer = client.ask(TRAIN, model)
        client.end()
    except ScriptFailed as error:
        raise UserError(f"client.init: script: {site}, which starts without parameters: {error}") from None
    if answer.params is None:
        raise UserError(f"client.init: script: {site} sent no params")
    return arrays(answer.params)
