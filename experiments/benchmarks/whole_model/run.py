"""Size: full fine-tuning of a 1.3B model, what its aggregation moves, and p-tuning of a 20B model, by three clients on a GPU.

    python experiments/benchmarks/whole_model/run.py --device cuda [--part full|bandwidth|large]
    python experiments/benchmarks/whole_model/run.py --device cpu        # small shapes, the same code

Weights are random; nothing is read but what the package holds. What cannot be measured is null in results.json, with a
reason. See README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
from common import COLORS, Group, SideFailed, Turn, finish_work, killing, memory, spread  # noqa: E402

PARTS = ("full", "bandwidth", "large")
CONFIGS = {"full": "whole_model.yaml", "bandwidth": "whole_model.yaml", "large": "large.yaml"}
WARM_UP = 1  # rounds that are not counted
TARGETS = {
    "share": 0.05,  # of a round that is not training, below
    "bandwidth": 0.70,  # of the measured copy bandwidth, at least
}
_MINI = {"vocab_size": 1536, "hidden_size": 64, "max_position_embeddings": 512}
_SMALL = {"vocab_size": 8192, "max_position_embeddings": 512}
# name -> (kind of model, keys of its config that are not its published ones)
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-neo-1.3B": ("gpt_neo", {}),
    "gpt-neo-77M": (
        "gpt_neo",
        {**_SMALL, "hidden_size": 768, "num_layers": 10, "num_heads": 12, "attention_types": [[["global"], 10]]},
    ),
    "gpt-neo-23M": (
        "gpt_neo",
        {**_SMALL, "hidden_size": 512, "num_layers": 6, "num_heads": 8, "attention_types": [[["global"], 6]]},
    ),
    "gpt-neo-mini": ("gpt_neo", {**_MINI, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
}
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-neox-20B": ("gpt_neox", {}),
    "gpt-neox-mini": (
        "gpt_neox",
        {**_MINI, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256},
    ),
}
SHAPES = {**BASES, **LARGE}
# By part; on the CPU aggregation has a base of its own: from 256 MiB on a model's updates are added in one pass.
ON_GPU = {"full": "gpt-neo-1.3B", "bandwidth": "gpt-neo-1.3B", "large": "gpt-neox-20B"}
ON_CPU = {"full": "gpt-neo-23M", "bandwidth": "gpt-neo-77M", "large": "gpt-neox-mini"}
# On the CPU, in place of what the YAML files say.
_FEW = {"steps": 2, "batch": 2, "micro": 1, "tokens": 64}
SMALL = {
    "full": _FEW,
    "bandwidth": _FEW,
    "large": {"steps": 2, "batch": 2, "tokens": 32},
}
# Copies of the float32 weights that a run folder holds at most: init/, start.bin, two checkpoints while one takes the
# other's place, two records of the best model, global/, best/.
COPIES_ON_DISK = 8
DISK_TO_SPARE = 1_000_000_000  # bytes
BYTES = {
    "copying in": "4 x N x 4: the global parameters read, the client's written, two moments cleared",
    "adding": "4 x N x 4: the client's parameters, the global ones and the sum read, the sum written",
    "clearing": "4 x N: the sum written, once a round",
    "server step": "4 x N x 3: the sum and the global parameters read, the global ones written",
    "a round": "4 x N x (4 K + 4): clearing, adding K clients' updates, the server's step",
}
MOVED = {"copying in": 4, "adding": 4, "clearing": 1, "server step": 3}  # times 4 x N bytes
# Parts of a round that hold up training whatever the experiment keeps and scores; the others are the run's own choice.
ALWAYS = ("copying in", "adding the update", "merging", "other")
CHOSEN = ("scoring", "best model to disk", "checkpoint")
FLOPS = {
    "full": "tokens/s x 6 x parameters of the layers: 2 operations a token and parameter forward, 4 backward",
    "large": "tokens/s x 4 x parameters of the layers: 2 operations a token and parameter forward, 2 backward",
}


def nothing(reason: str) -> dict[str, Any]:
    """What stands for something that could not be measured."""
    return {"value": None, "reason": reason}


def missing(part: dict[str, Any]) -> str | None:
    """Why a part was not measured; None where it was."""
    return part["reason"] if part.get("value", 0) is None else None


# ------------------------------------------------------------------------------------------------ in a child


class Clock:
    """Seconds of each round by what they were spent on.

    What is timed waits for the device before and after; time spent in a timed call inside another one counts for the
    inner one alone. That are a dozen waits a round, none between the steps of a client.

    Args:
        now: tells the time, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.rounds: list[dict[str, Any]] = []
        self._now, self._inner = now, [0.0]
        self._parts: dict[str, float] = defaultdict(float)
        self._began = now()

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, whose time counts for `part`."""

        @functools.wraps(function)
        def call(*args: Any, **keys: Any) -> Any:
            finish_work()
            began = self._now()
            self._inner.append(0.0)
            try:
                return function(*args, **keys)
            finally:
                finish_work()
                seconds = self._now() - began
                self._parts[part] += seconds - self._inner.pop()
                self._inner[-1] += seconds

        return call

    def begin(self) -> None:
        """A round begins."""
        finish_work()
        self._parts, self._began = defaultdict(float), self._now()

    def end(self, **about: Any) -> None:
        """It is over, and the next one begins; what was in no timed call is `other`."""
        finish_work()
        seconds = self._now() - self._began
        parts = {**self._parts, "other": seconds - sum(self._parts.values())}
        self.rounds.append({"seconds": seconds, "parts": parts, **about})
        self.begin()


def clock_engine(*clocks: Clock) -> None:
    """Have fedsim's round loop, in this process, tell the clocks what it does."""
    import fedsim.runs.modes as modes
    import fedsim.simulate.rounds as loop
    from fedsim.aggregators.reducer import Reducer
    from fedsim.core.store import Store
    from fedsim.executors import SerialExecutor
    from fedsim.runs.checkpoints import Checkpoints
    from fedsim.training.lanes import LaneGroup
    from fedsim.training.scoring import Evaluator
    from fedsim.training.worker import Worker

    for owner, name, part in (
        (Worker, "train", "training"),
        (LaneGroup, "start", "copying in"),
        (LaneGroup, "finish", "adding the update"),
        (Evaluator, "lanes", "scoring"),
        (SerialExecutor, "score", "scoring"),
        (Reducer, "zero", "merging"),
        (loop, "server_step", "merging"),
        (SerialExecutor, "broadcast", "merging"),
        (Store, "write", "best model to disk"),
        (Checkpoints, "save", "checkpoint"),
    ):
        for clock in clocks:
            setattr(owner, name, clock.timed(part, getattr(owner, name)))

    rounds = loop.rounds

    def clocked(world: Any, state: Any, executor: Any) -> Iterator[Any]:
        packs: list[Any] = []
        for clock in clocks:
            clock.begin()
        for event in rounds(world, state, executor):
            if isinstance(event, loop.PackDone):
                packs.append(event.report)
            yield event
            if isinstance(event, loop.Round):
                sums = {"tokens": sum(p.tokens for p in packs), "computed": sum(p.computed for p in packs)}
                for clock in clocks:
                    clock.end(**sums, packs=len(packs), clients=sum(len(p.steps) for p in packs))
                packs.clear()

    modes.rounds = clocked


def make_on_device(device: str) -> None:
    """Exchange what loads a base for what makes it of its config where it is used: no copy of it on disk or in the host's
    memory; and have the trial of lanes run there as well."""
    import torch
    import transformers

    import fedsim.runs.build
    import fedsim.runs.worker_spec
    from fedsim.models import base

    there = torch.device(device)
    gpus = [there] if there.type == "cuda" else []

    def load_base(parts: Any) -> Any:
        with base.quiet(), there, torch.random.fork_rng(devices=gpus):
            torch.manual_seed(0)
            config = base.load_config(parts.model)
            dtype = getattr(torch, parts.exp.model.dtype)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.config.use_cache = False
        model.requires_grad_(False)
        return model.eval()

    tried = fedsim.runs.worker_spec._tried

    def tried_there(kind: Callable, *rest: Any) -> str | None:
        def make(model: Any, own: Any, *, task: str, device: Any) -> Any:
            return kind(model, own, task=task, device=there)  # where the model is, instead of where it is asked for

        return tried(make, *rest)

    fedsim.runs.build.load_base, fedsim.runs.worker_spec._tried = load_base, tried_there


def engine_side(turn: Turn) -> None:
    """`fedsim.run` as a user calls it; the rounds are clocked, and that is all."""
    import fedsim.runs.run as experiment

    message = turn.hear()
    wall, cpu = Clock(), Clock(time.process_time)
    clock_engine(cpu, wall)
    if message["on_device"]:
        make_on_device(message["device"])
    folder = experiment.run(experiment.Experiment.load(message["config"]), progress=False).path
    rows = [json.loads(line) for line in (folder / "metrics" / "federated.jsonl").read_text().splitlines()]
    losses = [r["value"] for r in rows if (r["round"], r["split"], r["name"]) == (1, "train", "loss")]
    said = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("plan", "memory", "model")}
    disk = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    rounds = [
        {**w, "cpu_seconds_in_training": c["parts"]["training"]} for w, c in zip(wall.rounds, cpu.rounds, strict=True)
    ]
    turn.say(rounds=rounds, losses=losses, disk_mb=disk / 1e6, host=memory(), **said)


def plain_side(turn: Turn) -> None:
    """Fine-tuning of the whole model as one would write it by hand, with transformers and torch: one client's batches, round
    after round, without any federation."""
    import torch
    import torch.nn.functional as F
    import transformers

    message = turn.hear()
    job = json.loads(Path(message["job"]).read_text())
    torch.set_num_threads(message["threads"])
    device, dtype = torch.device(message["device"]), getattr(torch, job["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["location"], dtype=torch.float32).to(device).eval()
    model.config.use_cache = False
    gc.collect()
    common.reset_peak()
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), **job["adamw"], **fused)
    tokens, prompts = job["tokens"], job["prompts"]
    rounds = []
    for batches in job["rounds"]:
        finish_work()
        began, cpu = time.perf_counter(), time.process_time()
        useful, loss = 0, torch.zeros((), device=device)
        for rows in batches:
            optimizer.zero_grad(set_to_none=False)
            answers = sum(len(tokens[r]) - prompts[r] for r in rows)
            for i in range(0, len(rows), job["micro_batch"]):
                part = rows[i : i + job["micro_batch"]]
                ids = torch.tensor([tokens[r] for r in part], device=device)  # all of one length
                place = torch.arange(ids.shape[1], device=device)
                asked = place >= torch.tensor([prompts[r] for r in part], device=device)[:, None]
                labels = torch.where(asked, ids, -100)
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    logits = model(input_ids=ids).logits
                logits, labels = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
                one = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / answers
                one.backward()
                loss += one.detach()
                useful += ids.numel()
            if job["clip"] is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), job["clip"])
            optimizer.step()
        finish_work()
        about = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        rounds.append({**about, "tokens": useful, "loss": float(loss) / len(batches)})
    turn.say(rounds=rounds, memory=memory())


def bandwidth_side(turn: Turn) -> None:
    """A client's start, the adding of its update and the server's step, by the engine's own functions, for several chunks."""
    import torch
    import transformers

    from fedsim import Experiment
    from fedsim.aggregators import Accumulator
    from fedsim.algorithms import ALGORITHMS, Info
    from fedsim.core.params import Layout
    from fedsim.core.store import Records
    from fedsim.core.types import Pack, Share, Task
    from fedsim.runs.resolve import recipe_of
    from fedsim.simulate import rounds
    from fedsim.training.lanes import LaneGroup
    from fedsim.training.packs import RunPack
    from fedsim.training.trainer import Fit, Trainer
    from fedsim.training.worker import Worker

    message = turn.hear()
    torch.set_num_threads(message["threads"])
    device, exp = torch.device(message["device"]), Experiment.load(message["config"])
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(message["base"])
        model = transformers.AutoModelForCausalLM.from_config(config)
    layout = Layout({n: tuple(p.shape) for n, p in model.named_parameters()}, torch.float32)
    algorithm = ALGORITHMS[exp.algorithm.name]()
    net = SimpleNamespace(layout=layout, device=device, adopt=lambda flat: None)  # lanes need no more to start and end
    config, state = recipe_of(exp), Path(message["base"]).parent
    trainer = Trainer(net, None, config)
    weights, total = layout.empty(device), layout.empty(device)
    task = Task(0, "site-1", 1, None, 0, 0, 0, weight=1.0)
    pack, clients = Pack(0, "federated", (task,), 0), message["clients"]

    def once(chunk: int) -> tuple[dict[str, float], float]:
        """Seconds of each operation, and how far the mean of equal clients is from a client's own parameters."""
        worker = Worker(
            trainer, None, None, {"federated": algorithm}, dataclasses.replace(config, chunk=chunk), exp.seed, state
        )
        run = RunPack(Share(worker, pack, weights, {}, total))
        group = LaneGroup(run, "shared", trainer)
        group.take([0], [task])
        reducer, fit = run.setup.reducer, Fit([0.0], [0], [0], [1], torch.zeros(1))
        seconds: dict[str, float] = {}

        def clocked(name: str, function: Callable) -> Any:
            finish_work()
            began = time.perf_counter()
            out = function()
            finish_work()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
            return out

        def add() -> None:
            group.judge(fit)
            group.finish(fit)

        weights.fill_(1.0)
        clocked("copying in", group.start)
        trainer.flat.add_(0.5)  # what training did
        clocked("clearing", lambda: reducer.zero(total))
        for _ in range(clients):
            clocked("adding", add)
        summed = Accumulator(total, weight=float(clients))
        here, info = rounds.State(weights, {}, Records(), keeps=False), Info(1, clients, clients, clients, clients)
        clocked("server step", lambda: rounds.server_step(algorithm, reducer, layout, summed, here, info, chunk))
        seconds["a round"] = seconds["clearing"] + seconds["adding"] + seconds["server step"]
        seconds["adding"] /= clients
        return seconds, max(abs(float(f(weights)) - 1.5) for f in (torch.min, torch.max))

    found, wrong = {}, 0.0
    for mb in message["chunks"]:
        chunk = mb * (1 << 18)
        tries = [once(chunk) for _ in range(2 + message["repeats"])][2:]
        wrong = max(wrong, *(w for _, w in tries))
        found[str(mb)] = {n: spread([t[n] for t, _ in tries]) for n in tries[0][0]}
        found[str(mb)]["pieces"] = len(layout.chunks(chunk))
    turn.say(chunks=found, parameters=layout.numel, off=wrong, memory=memory())


def helper(turn: Turn) -> None:
    """Bases and rows, the device's limits, the environment."""
    common.helper_side(turn, {"base": make_base, "cell": make_cell})


def make_base(name: str, folder: str, device: str, weights: bool) -> dict[str, Any]:
    """A folder with the config of a shape and the embedded base's tokenizer, and either random weights in bfloat16, made on the
    device, or an empty file in their place; its parameters, in all and in the layers."""
    import torch
    import transformers
    from safetensors.torch import save_file

    from fedsim.models import base, locate

    kind, keys = SHAPES[name]
    tokenizer = base.load_tokenizer(locate.find("tiny"))
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.AutoConfig.for_model(kind, **keys, **ends, pad_token_id=tokenizer.pad_token_id)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    layers = max(sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    if weights:
        torch.manual_seed(0)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        common.release()
    else:
        Path(folder).mkdir(parents=True)
        config.save_pretrained(folder)
        save_file({}, Path(folder) / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return {"parameters": count, "layer_parameters": layers}


def make_cell(config: str, overrides: list[str], base: str, out: str, rows: int) -> dict[str, Any]:
    """Rows of `data.max_length` tokens, about half of them the answer; `config.yaml` for fedsim and `job.json` for the plain
    loop, which takes the batches of the first client.

    Args:
        config: YAML file of the benchmark.
        overrides: its keys for this machine.
        base: the base's folder.
        out: folder.
        rows: of the training split; a few more validate.
    """
    from fedsim import Experiment
    from fedsim.core.seeding import stream
    from fedsim.data.templates import Template
    from fedsim.runs.build import load_source, prepare
    from fedsim.runs.checks import sampler_of

    exp, folder = Experiment.load(config, overrides), Path(out)
    tokens = exp.data.max_length
    text = load_source(exp).splits["train"].columns["sentence"]
    held = max(2, 2 * exp.evaluate.batch_size)
    template = "{prompt} {response}"
    assert Template.parse(template).fields[-1] == "response"
    few = max(1, tokens // 60)  # sentences that are not half a row, of some 20 to 30 tokens each
    for name, count in (("train", rows), ("validation", held)):
        lines = []
        for i in range(count):
            pick = [
                text[(7 * i + k) % len(text)] for k in range(few + tokens)
            ]  # more than fill a row: the prompt is cut
            lines.append(json.dumps({"prompt": " ".join(pick[few:]), "response": " ".join(pick[:few])}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tree = exp.to_dict()
    tree["model"]["path"] = base
    tree["data"] = {
        "name": "table",
        "path": str(folder / "train.jsonl"),
        "validation": str(folder / "validation.jsonl"),
        "test": 0,
        "template": template,
        "max_length": tokens,
    }
    tree["results"] = str(folder / "runs")
    exp = Experiment.from_dict(tree)
    (folder / "config.yaml").write_text(exp.to_yaml())
    parts = prepare(exp)
    exp, train = parts.exp, parts.tokens["train"]
    found = {len(train.row(i)) for i in range(len(train))}
    assert found == {tokens}, f"rows of {sorted(found)} tokens, asked for {tokens}"
    client = int(parts.clients[0])
    name, local = parts.partition.name(client), exp.local
    rounds = []
    for r in range(1, exp.rounds + 1):
        rng = stream(exp.seed, "batches", name, r)
        rounds.append([b.tolist() for b in sampler_of(exp).batches(parts.partition.rows(client), rng, local.steps)])
    job = {
        "location": base,
        "dtype": exp.model.dtype,
        "tokens": [train.row(i).tolist() for i in range(len(train))],
        "prompts": train.prompts.tolist(),
        "adamw": {"lr": local.lr, "betas": local.betas, "eps": local.eps, "weight_decay": local.weight_decay},
        "clip": local.clip,
        "micro_batch": local.micro_batch or local.batch_size,
        "rounds": rounds,
    }
    (folder / "job.json").write_text(json.dumps(job))
    answers = sum(len(train.row(i)) - int(train.prompts[i]) for i in range(len(train))) / len(train)
    shown = {k: v for k, v in Experiment.load(config, overrides).to_dict().items() if k != "results"}
    about = {"training": len(train), "validation": held, "tokens": tokens, "answer_tokens": answers}
    return {"config": shown, "rows": about}


# ------------------------------------------------------------------------------------------------ in the benchmark


def sizes_of(part: str, args: argparse.Namespace) -> list[str]:
    """The config's keys for this machine and command line."""
    small = SMALL[part] if args.device == "cpu" else {}
    keys = {"steps": "local.steps", "batch": "local.batch_size", "micro": "local.micro_batch"}
    keys |= {"tokens": "data.max_length", "rounds": "rounds", "clients": "partition.num_clients"}
    values = {k: getattr(args, k) or small.get(k) for k in keys}
    if part == "large":
        values["micro"] = None
    elif values["batch"] is not None:  # a pass is no more than a step
        values["micro"] = min(values["micro"] or values["batch"], values["batch"])
    out = [f"{keys[k]}={v}" for k, v in values.items() if v is not None]
    if values["clients"] is not None and part == "large":
        out.append(f"training.lanes={values['clients']}")
    if args.device == "cpu":
        out.append("evaluate.batch_size=4")
    executor = f"executor={{name: serial, device: '{args.device}', threads: {args.threads}}}"
    return [*out, f"model.dtype={args.dtype}", executor]


def get_ready(part: str, args: argparse.Namespace, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Base, rows, limits and environment of a part, made by a process that is gone when the part is measured.

    Returns:
        What results.json says of them, and where they lie: `config`, `job`, `base`. With `value` None in the first where it
        cannot be measured.
    """
    name = (args.large if part == "large" else args.base) or (ON_CPU if args.device == "cpu" else ON_GPU)[part]
    places = {k: str(work / v) for k, v in (("config", "config.yaml"), ("job", "job.json"), ("base", "base"))}
    with killing({}) as helpers:
        side = helpers["helper"] = Group("helper", helper, work, args.start)
        about = side.ask("base", name=name, folder=str(work / "shape"), device=args.device, weights=False)[0]
        if part == "full":
            need = (4 * COPIES_ON_DISK + 2) * about["parameters"] + DISK_TO_SPARE
            free = shutil.disk_usage(work).free
            if free < need:
                way = "set TMPDIR to a folder with more room, or give a smaller --base"
                return nothing(f"{need / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} are free; {way}"), places
            side.ask("base", name=name, folder=places["base"], device=args.device, weights=True)
        else:
            places["base"] = str(work / "shape")
        side.ask("limits", device=args.device, size=32, copy_mb=1)  # loads what the first product loads
        limits = side.ask("limits", device=args.device, size=args.matmul, copy_mb=args.copy)[0]
        keys = {"config": str(HERE / CONFIGS[part]), "overrides": sizes_of(part, args), "rows": args.rows}
        made = side.ask("cell", base=places["base"], out=str(work), **keys)[0]
        made["config"]["model"]["path"] = name  # not where it lies on this machine
        environment = side.ask("environment", device=args.device, threads=args.threads)[0]
    return {"base": name, **about, **made, "limits": limits, "environment": environment}, places


def alone(name: str, side: Callable[[Turn], None], work: Path, args: argparse.Namespace, **message: Any) -> Any:
    """What a side says at its end, in a process of its own while nothing else runs."""
    common.note(f"{name} ...")
    with killing({}) as groups:
        group = groups[name] = Group(name, side, work, args.start)
        return group.ask("go", device=args.device, threads=args.threads, **message)[0]


def peaks_of(said: dict[str, Any]) -> dict[str, Any]:
    """Measured peak beside the plan's, MB; and what the plan has by what for."""
    predicted, measured = said["memory"]["predicted_bytes"], max(said["memory"]["measured_bytes"])
    return {
        "kind": said["memory"]["kind"],
        "predicted_mb": None if predicted is None else predicted / 1e6,
        "measured_mb": measured / 1e6,
        "off": None if predicted is None else measured / predicted - 1,
        "parts_mb": {k: v / 1e6 for k, v in said["plan"]["memory"].items() if k != "predicted"},
        "host_peak_mb": said["host"].get("peak"),
    }


def round_of(rounds: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Where the time of a round goes: seconds by part, the share that is not training, and tokens a second.

    `without` counts what every round needs; `with` counts scoring, the best model and the checkpoint too. `steps_for_target`
    are the steps of each client from which on a round is within the target, where its other parts take what they took here.
    """
    counted = rounds[WARM_UP:]
    parts = {name: [r["parts"].get(name, 0.0) for r in counted] for name in ("training", *ALWAYS, *CHOSEN)}
    seconds = {name: spread(values) for name, values in parts.items()}
    out: dict[str, Any] = {
        "counted": len(counted),
        "seconds": {"all": spread([r["seconds"] for r in counted]), **seconds},
    }
    training, always, chosen = (
        [sum(parts[n][i] for n in which) for i in range(len(counted))] for which in (("training",), ALWAYS, CHOSEN)
    )
    both = [a + c for a, c in zip(always, chosen, strict=True)]
    for name, rest in (("without", always), ("with", both)):
        shares = [b / (t + b) for t, b in zip(training, rest, strict=True)]
        needed = statistics.median(b / t for t, b in zip(training, rest, strict=True)) * steps
        needed *= (1 - TARGETS["share"]) / TARGETS["share"]
        out[f"not_training_{name}"] = {**spread(shares), "steps_for_target": needed}
    tokens = [r["tokens"] for r in counted]
    over = {"training": training, "without": [t + a for t, a in zip(training, always, strict=True)]}
    over["round"] = [r["seconds"] for r in counted]
    out["tokens_per_s"] = {n: spread([t / s for t, s in zip(tokens, v, strict=True)]) for n, v in over.items()}
    return out


def measure_full(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Full fine-tuning by all clients, beside the plain loop."""
    value, places = get_ready("full", args, work)
    if missing(value):
        return value
    said = alone("fedsim", engine_side, work, args, config=places["config"], on_device=False)
    shutil.rmtree(work / "runs")
    plain = alone("plain", plain_side, work, args, job=places["job"])
    steps, rate = value["config"]["local"]["steps"], value["limits"]["bf16_flops_per_s"]["best"]
    counted = plain["rounds"][WARM_UP:]
    value |= {"rounds": said["rounds"], "plan": said["plan"], "trained": said["model"]["trained"]}
    value["round"] = round_of(said["rounds"], steps)
    value["memory"] = peaks_of(said)
    on_gpu = "gpu_peak" in plain["memory"]
    peak = plain["memory"]["gpu_peak" if on_gpu else "peak"]
    extra = {k: value["memory"]["parts_mb"][k] for k in ("global", "sum", "chunk")}
    beyond = value["memory"]["measured_mb"] - peak
    value["memory"] |= {"plain_mb": peak, "beyond_plain_mb": beyond, "global_sum_chunk_mb": sum(extra.values())}
    value["plain"] = {"rounds": plain["rounds"], "tokens_per_s": spread([r["tokens"] / r["seconds"] for r in counted])}
    speed = value["round"]["tokens_per_s"]["training"]["median"]
    value["speed"] = speed / value["plain"]["tokens_per_s"]["median"]
    value["speed_by_cpu_time"] = nothing("on a GPU the CPU's time says little")
    if not on_gpu:
        ours = sum(r["tokens"] for r in said["rounds"]) / sum(r["cpu_seconds_in_training"] for r in said["rounds"])
        theirs = sum(r["tokens"] for r in plain["rounds"]) / sum(r["cpu_seconds"] for r in plain["rounds"])
        value["speed_by_cpu_time"] = {"value": ours / theirs}
    value["share_of_peak"] = {"formula": FLOPS["full"], "value": speed * 6 * value["layer_parameters"] / rate}
    value["disk_mb"] = said["disk_mb"]
    ours, theirs = said["losses"][0], plain["rounds"][0]["loss"]
    limit = 1e-4 if args.dtype == "float32" else 2e-2
    apart = abs(ours - theirs) / abs(theirs)
    value["same_work"] = {"loss": ours, "plain_loss": theirs, "apart": apart, "limit": limit, "same": apart <= limit}
    return value


def measure_bandwidth(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What aggregation moves a second, against the copy bandwidth of the device."""
    value, places = get_ready("bandwidth", args, work)
    clients = args.clients or value["config"]["partition"]["num_clients"]
    more = {"base": places["base"], "chunks": args.chunks, "repeats": args.repeats, "clients": clients}
    said = alone("bandwidth", bandwidth_side, work, args, config=places["config"], **more)
    n, best = said["parameters"], value["limits"]["copy_bytes_per_s"]["best"]
    moved = {k: 4 * n * times for k, times in MOVED.items()} | {"a round": 4 * n * (4 * clients + 4)}
    for seconds in said["chunks"].values():
        for name, nbytes in moved.items():
            seconds[name]["of_copy_bandwidth"] = nbytes / seconds[name]["median"] / best
    shares = {int(mb): s["a round"]["of_copy_bandwidth"] for mb, s in said["chunks"].items()}
    top = max(shares, key=shares.__getitem__)
    default = value["config"]["aggregation"]["chunk_mb"]
    value |= {"clients": clients, "formulas": BYTES, "bytes": moved, "chunks": said["chunks"]}
    value["best"] = {"chunk_mb": top, "of_copy_bandwidth": shares[top]}
    absent = nothing(f"chunks of {default} MiB, as the config has them, are not among --chunks")
    value["default"] = {"chunk_mb": default, "of_copy_bandwidth": shares[default]} if default in shares else absent
    value["result_is_off_by"] = said["off"]
    return value


def measure_large(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """P-tuning of a base that is made on the device, all clients in one pack."""
    value, places = get_ready("large", args, work)
    said = alone("large", engine_side, work, args, config=places["config"], on_device=True)
    steps, rate = value["config"]["local"]["steps"], value["limits"]["bf16_flops_per_s"]["best"]
    value |= {"rounds": said["rounds"], "plan": said["plan"], "trained": said["model"]["trained"]}
    value["round"], value["memory"] = round_of(said["rounds"], steps), peaks_of(said)
    speed = value["round"]["tokens_per_s"]["training"]["median"]
    value["share_of_peak"] = {"formula": FLOPS["large"], "value": speed * 4 * value["layer_parameters"] / rate}
    value["lanes"] = {"asked_for": value["config"]["training"]["lanes"], "had": said["plan"]["lanes"]}
    value["lanes"] |= {"packs_a_round": said["rounds"][-1]["packs"], "why_not": said["plan"]["why_not"]}
    return value


# ------------------------------------------------------------------------------------------------ what comes out


def judged(ok: bool, text: str) -> str:
    """Whether a target is met."""
    return f"(target {text}: {'met' if ok else 'NOT met'})"


def lines_of(value: dict[str, Any]) -> list[str]:
    """The tables of all parts."""
    out = []
    for part, lines in (("full", full_lines), ("bandwidth", bandwidth_lines), ("large", large_lines)):
        why = missing(value[part])
        out += [f"{part}: not measured: {why}"] if why else lines(value[part])
        out.append("")
    return out[:-1]


def head_of(part: str, v: dict[str, Any]) -> list[str]:
    """What was measured, and the device's limits."""
    limits, local, rows = v["limits"], v["config"]["local"], v["rows"]
    where = limits["gpu"] or "CPU"
    clients = v["config"]["partition"]["num_clients"]
    return [
        f"{part}: {where}; {v['base']}, {v['parameters'] / 1e6:,.1f}M parameters, {v['config']['model']['dtype']}",
        f"  {clients} clients x {local['steps']} steps x {local['batch_size']} rows of {rows['tokens']} tokens, "
        f"{rows['validation']} rows to validate on; bf16 products at {limits['bf16_flops_per_s']['best'] / 1e12:.2f} TFLOP/s, "
        f"copy at {limits['copy_bytes_per_s']['best'] / 1e9:.1f} GB/s read and written",
    ]


def round_lines(v: dict[str, Any]) -> list[str]:
    """Tokens a second, and where a round's time goes."""
    r = v["round"]
    rates, all_of = r["tokens_per_s"], r["seconds"]["all"]["median"]
    out = [
        f"  tokens/s: {rates['training']['median']:,.0f} in training, {rates['without']['median']:,.0f} with aggregation, "
        f"{rates['round']['median']:,.0f} with scoring and files; {v['share_of_peak']['value']:.1%} of the measured peak",
        f"  a round of {all_of:.2f} s: "
        + ", ".join(f"{n} {s['median']:.3f}" for n, s in r["seconds"].items() if n != "all"),
    ]
    for name, text in (("without", "without scoring and files"), ("with", "with scoring, best model and checkpoint")):
        share = r[f"not_training_{name}"]
        judgement = judged(share["median"] < TARGETS["share"], f"below {TARGETS['share']:.0%}")
        out.append(
            f"  not training, {text}: {share['median']:.2%} {judgement}; below it from {share['steps_for_target']:,.0f} steps on"
        )
    return out


def memory_line(m: dict[str, Any]) -> str:
    """Measured beside predicted."""
    if m["predicted_mb"] is None:
        return f"  peak memory ({m['kind']}): {m['measured_mb']:,.0f} MB; the plan predicts nothing"
    parts = ", ".join(f"{k} {mb:,.0f}" for k, mb in m["parts_mb"].items())
    return f"  peak memory ({m['kind']}): {m['measured_mb']:,.0f} MB, predicted {m['predicted_mb']:,.0f} ({m['off']:+.1%}; {parts})"


def full_lines(v: dict[str, Any]) -> list[str]:
    """Full fine-tuning."""
    m, plain, same, cpu = v["memory"], v["plain"]["tokens_per_s"], v["same_work"], v["speed_by_cpu_time"]
    by_cpu = "" if missing(cpu) else f" ({cpu['value']:.2f} x by CPU time)"
    return [
        *head_of("full fine-tuning", v),
        *round_lines(v),
        f"  plain loop: {plain['median']:,.0f} tokens/s, so training is {v['speed']:.2f} x as fast{by_cpu}; {m['plain_mb']:,.0f} MB",
        memory_line(m),
        f"  beyond the plain loop: {m['beyond_plain_mb']:,.0f} MB; global copy, sum and a chunk are {m['global_sum_chunk_mb']:,.0f} MB",
        f"  loss of the first client's first round {same['loss']:.4f}, the plain loop's {same['plain_loss']:.4f}: "
        f"{'the same work' if same['same'] else 'OTHER work'}",
    ]


def bandwidth_lines(v: dict[str, Any]) -> list[str]:
    """Aggregation, by chunk."""
    names = [*MOVED, "a round"]
    out = head_of("aggregation", v)[:1]
    copy = v["limits"]["copy_bytes_per_s"]["best"]
    out.append(f"  {v['clients']} clients; copy at {copy / 1e9:.1f} GB/s read and written")
    out.append(f"  {'chunk MiB':>9s} {'pieces':>7s}  " + "  ".join(f"{n:>20s}" for n in names))
    for mb, s in v["chunks"].items():
        cells = [f"{s[n]['median'] * 1e3:11.2f} ms {s[n]['of_copy_bandwidth']:6.1%}" for n in names]
        out.append(f"  {mb:>9s} {s['pieces']:7d}  " + "  ".join(f"{c:>20s}" for c in cells))
    best = v["best"]
    ok = best["of_copy_bandwidth"] >= TARGETS["bandwidth"]
    out.append(
        f"  best: chunks of {best['chunk_mb']} MiB, {best['of_copy_bandwidth']:.1%} of the copy bandwidth "
        + judged(ok, f"at least {TARGETS['bandwidth']:.0%}")
    )
    default = v["default"]
    out.append(
        f"  default: {missing(default)}"
        if missing(default)
        else f"  default: chunks of {default['chunk_mb']} MiB, {default['of_copy_bandwidth']:.1%}"
    )
    return out + [f"  {name}: {formula}" for name, formula in v["formulas"].items()]


def large_lines(v: dict[str, Any]) -> list[str]:
    """P-tuning of the large base."""
    lanes, m = v["lanes"], v["memory"]
    how = f"{lanes['had']} lanes, {lanes['packs_a_round']} pack(s) a round"
    out = [
        *head_of("p-tuning", v),
        f"  {v['trained']:,} trained; {how}" + (f": {lanes['why_not']}" if lanes["why_not"] else ""),
    ]
    out += [*round_lines(v), memory_line(m)]
    if m["host_peak_mb"] is not None:
        out.append(f"  host memory of the process: {m['host_peak_mb']:,.0f} MB at most")
    return out


def figure(path: Path, value: dict[str, Any]) -> None:
    """Memory and a round of both trainings; bandwidth against the chunk's size."""
    plt = common.figures()
    fig, axes = plt.subplots(2, 3, figsize=(7.6, 5.0), layout="constrained")
    for row, (part, title) in enumerate((("full", "Full fine-tuning"), ("large", "P-tuning"))):
        v = value[part]
        if why := missing(v):
            for axis in axes[row, :2]:
                _empty(axis, f"{title}: not measured", why)
            continue
        _draw_memory(axes[row, 0], f"{title}: memory", v["memory"])
        _draw_round(axes[row, 1], f"{title}: a round", v["round"]["seconds"])
    named = [f"{part}: {value[part]['base']}" for part in PARTS if not missing(value[part])]
    gpus = {value[part]["limits"]["gpu"] for part in PARTS if not missing(value[part])}
    where = ", ".join(sorted(gpu or "CPU" for gpu in gpus))
    fig.suptitle(f"{where}   {', '.join(named)}", fontsize=8)
    _draw_bandwidth(axes[0, 2], value["bandwidth"])
    _draw_speed(axes[1, 2], value)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _empty(axis: Any, title: str, why: str) -> None:
    import textwrap

    axis.set(title=title, xticks=[], yticks=[])
    axis.text(0.5, 0.5, textwrap.fill(why, 28), ha="center", va="center", fontsize=7, transform=axis.transAxes)


def _draw_memory(axis: Any, title: str, m: dict[str, Any]) -> None:
    bars = {"predicted": m["predicted_mb"], "measured": m["measured_mb"], "plain loop": m.get("plain_mb")}
    known = {k: mb / 1e3 for k, mb in bars.items() if mb is not None}
    colors = {"predicted": COLORS[4], "measured": COLORS[0], "plain loop": "#999999"}
    drawn = axis.bar(range(len(known)), list(known.values()), 0.65, color=[colors[k] for k in known])
    axis.bar_label(drawn, [f"{gb:.2f}" if gb < 10 else f"{gb:.1f}" for gb in known.values()], fontsize=7)
    axis.set_xticks(range(len(known)), [k.replace(" ", "\n") for k in known], fontsize=7)
    axis.margins(y=0.15)
    axis.set(title=title, ylabel="peak, GB")
    axis.grid(axis="x", visible=False)


def _draw_round(axis: Any, title: str, seconds: dict[str, Any]) -> None:
    parts = {n: s["median"] for n, s in seconds.items() if n != "all"}
    names = list(parts)[::-1]
    colors = [COLORS[0] if n == "training" else "#999999" if n in CHOSEN else COLORS[1] for n in names]
    drawn = axis.barh(range(len(names)), [parts[n] for n in names], 0.7, color=colors)
    axis.bar_label(drawn, [f" {parts[n]:.3f}" for n in names], fontsize=6)
    axis.set_yticks(range(len(names)), names, fontsize=6.5)
    axis.set(title=title, xlabel="seconds", xlim=(0, 1.3 * max(parts.values())))
    axis.grid(axis="y", visible=False)


def _draw_bandwidth(axis: Any, v: dict[str, Any]) -> None:
    if why := missing(v):
        _empty(axis, "Aggregation: not measured", why)
        return
    chunks = [int(mb) for mb in v["chunks"]]
    for name, style, color in (
        ("a round", "o-", COLORS[0]),
        ("adding", "s--", COLORS[2]),
        ("server step", "^:", COLORS[3]),
    ):
        shares = [100 * s[name]["of_copy_bandwidth"] for s in v["chunks"].values()]
        axis.plot(chunks, shares, style, color=color, label=name, markersize=3.5, linewidth=1.2)
    axis.axhline(100 * TARGETS["bandwidth"], color="#555555", linewidth=0.8)
    axis.text(chunks[-1], 100 * TARGETS["bandwidth"], "target", fontsize=6.5, ha="right", va="bottom", color="#555555")
    axis.set_xscale("log", base=2)
    axis.set_xticks(chunks, [str(c) for c in chunks])
    axis.minorticks_off()
    axis.set(title="Aggregation", xlabel="aggregation.chunk_mb", ylabel="% of the copy bandwidth")
    axis.set_ylim(0, max(100, axis.get_ylim()[1]))
    axis.legend(fontsize=6.5, frameon=False)


def _draw_speed(axis: Any, value: dict[str, Any]) -> None:
    rates = {}
    if not missing(value["full"]):
        rates["full"] = value["full"]["round"]["tokens_per_s"]["training"]["median"]
        rates["plain\nloop"] = value["full"]["plain"]["tokens_per_s"]["median"]
    if not missing(value["large"]):
        rates["p-tuning"] = value["large"]["round"]["tokens_per_s"]["training"]["median"]
    if not rates:
        _empty(axis, "Speed: not measured", "neither training was")
        return
    colors = ["#999999" if "plain" in n else COLORS[0] for n in rates]
    drawn = axis.bar(range(len(rates)), list(rates.values()), 0.65, color=colors)
    axis.bar_label(drawn, [f"{r:,.0f}" for r in rates.values()], fontsize=7)
    axis.set_xticks(range(len(rates)), list(rates))
    axis.margins(y=0.15)
    axis.set(title="Speed in training", ylabel="tokens/s")
    axis.grid(axis="x", visible=False)


def arguments() -> argparse.Namespace:
    """The command line; on the CPU everything is small."""
    parser = argparse.ArgumentParser(description="Whole models and large ones; small sizes of the same on the CPU.")
    parser.add_argument(
        "--part", choices=["all", *PARTS], default="all", help="one part alone; the others stay as they are"
    )
    parser.add_argument("--base", choices=list(BASES), help="default: gpt-neo-1.3B, on the CPU two small ones")
    parser.add_argument("--large", choices=list(LARGE), help="default: gpt-neox-20B, on the CPU gpt-neox-mini")
    for name, text in (
        ("clients", "clients of a round"),
        ("steps", "optimiser steps of a client in a round"),
        ("batch", "rows of an optimiser step"),
        ("micro", "rows of a pass, of whole models"),
        ("tokens", "tokens of every row"),
        ("rounds", "rounds, of which the first is not counted"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{text}; default: as the YAML files say, less on the CPU")
    parser.add_argument("--rows", type=int, default=300, help="training rows")
    parser.add_argument("--chunks", type=common.numbers, help="aggregation.chunk_mb, MiB; default 1,4,16,64,256")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats for each chunk")
    parser.add_argument(
        "--matmul", type=int, help="size of the products that give the peak; default 8192, on the CPU 1024"
    )
    parser.add_argument(
        "--copy", type=int, help="MB of the copy that gives the bandwidth; default 2000, on the CPU 200"
    )
    args = common.parse(common.machine_options(parser, "whole_model", device="cuda", dtype="bfloat16"))
    small, large = {"matmul": 1024, "copy": 200}, {"matmul": 8192, "copy": 2000}
    for key, default in (small if args.device == "cpu" else large).items():
        if getattr(args, key) is None:
            setattr(args, key, default)
    args.chunks = args.chunks or [1, 4, 16, 64, 256]
    if args.rounds is not None and args.rounds <= WARM_UP:
        parser.error(f"--rounds {args.rounds}: the first {WARM_UP} is not counted; give more")
    return args


def main() -> int:
    """Measure, print, write; 1 if a part failed, did other work than the plain loop, or merged to a wrong mean."""
    args = arguments()
    measure = {"full": measure_full, "bandwidth": measure_bandwidth, "large": measure_large}
    asked = PARTS if args.part == "all" else (args.part,)
    before, failed = {}, {}
    if args.part != "all" and (args.out / "results.json").is_file():
        before = json.loads((args.out / "results.json").read_text())
    value: dict[str, Any] = {"options": common.shown(args), "environment": None, "targets": TARGETS}
    value |= {part: before.get(part, nothing(f"--part {args.part}")) for part in PARTS}
    for part in asked:
        with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
            try:
                value[part] = {**measure[part](args, Path(folder).resolve()), "options": common.shown(args)}
            except SideFailed as error:
                failed[part] = str(error)
                value[part] = nothing(str(error))
        value["environment"] = value[part].get("environment") or value["environment"]
        common.write(args.out, value)
    print("\n".join(lines_of(value)))
    figure(args.out / "whole_model.png", value)
    print(f"written: {args.out / 'results.json'}, {args.out / 'whole_model.png'}")
    wrong = {**failed}
    if "full" in asked and not value["full"].get("same_work", {}).get("same", True):
        wrong["full"] = "its loss is not the plain loop's"
    if "bandwidth" in asked and not value["bandwidth"].get("result_is_off_by", 0.0) <= 1e-6:
        wrong["bandwidth"] = "the mean of equal clients is not a client's parameters"
    for part, why in wrong.items():
        print(f"{part} FAILED: {why}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
