"""What fedsim costs and saves: clients in lanes, and one after another, beside a plain PyTorch loop of the same work.

    python experiments/benchmarks/overhead/run.py [--rounds N] [--data phrasebank] [--out FOLDER] [key=value ...]

Each side is a process of its own, so that its peak memory is its own; another one prepares rows and batches. This
process starts them, hands out the rounds in turn, in another order each round, and takes the ratio of the times of each
round, so that whatever else the machine does weighs on all. It imports nothing heavy before they have ended: a child's
peak memory, as Linux counts it, begins with that of the process that forked it. Whole processes, from start to end, are
timed after that, one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
PHRASEBANK = [
    "data.name=financial_phrasebank",
    "data.path=${oc.env:FEDSIM_DATA}/financial_phrasebank/Sentences_AllAgree.txt",
]
TOLERANCE = 1e-4  # norm of the difference over the norm, per tensor
TARGET_RATIO, AIM_RATIO, TARGET_WHOLE = 0.60, 0.35, 0.75  # x the plain loop's
SIDES = {"auto": "fedsim, lanes: auto", "one": "fedsim, lanes: 1", "plain": "plain loop"}


# ------------------------------------------------------------------------------------------------ the plain loop


def plain_side(work: Path, turn: Turn) -> None:
    """Federated averaging of LoRA adapters as one would write it by hand: transformers, PEFT, torch, nothing of fedsim.

    Rows and batches come from `work.json`, the starting point from the PEFT folder that fedsim's run began with.
    """
    import torch
    import torch.nn.functional as F
    from peft import PeftModel
    from safetensors.torch import save_file
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    job = json.loads((work / "work.json").read_text())
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    base = AutoModelForSequenceClassification.from_pretrained(
        job["model"], num_labels=job["num_labels"], dtype=getattr(torch, job["dtype"])
    )
    model = PeftModel.from_pretrained(base, job["init"], is_trainable=True)
    model.eval()  # no dropout, as in fedsim: the base's is off there, and the adapter has none
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tokens, labels = {}, {}
    for split, rows in job["splits"].items():
        ids = tokenizer(rows["texts"], truncation=True, max_length=job["max_length"])["input_ids"]
        tokens[split], labels[split] = [torch.tensor(i) for i in ids], torch.tensor(rows["labels"])
    by_length = sorted(range(len(tokens["validation"])), key=lambda i: len(tokens["validation"][i]))

    def logits(split: str, rows: list[int]) -> torch.Tensor:
        """`[B, L]`, rows padded to the longest of them."""
        sequences = [tokens[split][i] for i in rows]
        ids = pad_sequence(sequences, batch_first=True, padding_value=tokenizer.pad_token_id)
        lengths = torch.tensor([len(s) for s in sequences])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return model(input_ids=ids, attention_mask=mask).logits

    @torch.no_grad()
    def accuracy() -> float:
        right, size = 0, job["eval_batch"]
        for i in range(0, len(by_length), size):
            rows = by_length[i : i + size]
            right += int((logits("validation", rows).argmax(-1) == labels["validation"][rows]).sum())
        return right / len(by_length)

    def train(batches: list[list[int]], state: dict[str, Any] | None) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(params.values(), **job["adamw"])
        if state is not None:
            optimizer.load_state_dict(state)
        for rows in batches:
            optimizer.zero_grad()
            F.cross_entropy(logits("train", rows), labels["train"][rows]).backward()
            if job["clip"] is not None:
                torch.nn.utils.clip_grad_norm_(params.values(), job["clip"])
            optimizer.step()
        return optimizer

    weights = {n: p.detach().clone() for n, p in params.items()}
    states: dict[str, dict[str, Any]] = {}
    for clients in job["rounds"]:
        turn.wait()
        total = {n: torch.zeros_like(w) for n, w in weights.items()}
        for client, batches, share in clients["cohort"]:
            with torch.no_grad():
                for n, p in params.items():
                    p.copy_(weights[n])
            optimizer = train(batches, states.get(client))
            if job["keep_state"]:
                states[client] = optimizer.state_dict()
            for n, p in params.items():
                total[n].add_(p.detach(), alpha=share)
            if clients["scored"]:
                accuracy()
        weights = total
        if clients["scored"]:
            with torch.no_grad():
                for n, p in params.items():
                    p.copy_(weights[n])
            accuracy()
        turn.done()
    turn.wait()
    save_file(weights, work / "plain.safetensors")


# ------------------------------------------------------------------------------------------------ the other sides


def fedsim_side(work: Path, turn: Turn, side: str) -> None:
    """`fedsim.run` as a user calls it; only its round loop waits for its turn, and tells the time of each round."""
    from safetensors.torch import save_file

    import fedsim.runs.modes
    import fedsim.runs.run
    from fedsim.simulate.rounds import Round, rounds

    def in_turns(world: Any, state: Any, executor: Any) -> Iterator[Any]:
        turn.wait()
        for event in rounds(world, state, executor):
            began = time.perf_counter()
            yield event
            if isinstance(event, Round):
                turn.done(after=time.perf_counter() - began)
                turn.wait()
        start = {n: t.clone() for n, t in world.layout.views(state.params).items()}
        save_file(start, work / f"{side}.safetensors")

    fedsim.runs.modes.rounds = in_turns
    fedsim.runs.run.run(fedsim.Experiment.load(work / f"{side}.yaml"))


def prepare_side(work: Path, turn: Turn) -> None:
    """Write what the plain loop is handed: rows, the batches of each client and round, shares, settings."""
    import fedsim
    from fedsim.runs.build import prepare
    from fedsim.runs.environment import environment
    from fedsim.runs.resolve import schedule_of

    parts = prepare(fedsim.Experiment.load(work / "auto.yaml"))
    exp, schedule = parts.exp, schedule_of(parts, "federated")
    rounds = []
    for r in range(1, exp.rounds + 1):
        cohort = [(parts.partition.name(int(c)), int(parts.partition.sizes[c])) for c in schedule.cohort(r)]
        total = sum(size for _, size in cohort)
        rows = [(name, [b.tolist() for b in fedsim.batches(exp, name, r)], size / total) for name, size in cohort]
        rounds.append({"cohort": rows, "scored": schedule.evaluates(r)})
    local = exp.local
    splits = {
        name: {"texts": split.columns["sentence"], "labels": split.labels.tolist()}
        for name, split in parts.source.splits.items()
    }
    job = {
        "model": parts.model.location,
        "init": str(work / "runs" / exp.name / parts.run_id() / "init"),
        "num_labels": len(parts.source.labels),
        "max_length": exp.data.max_length,
        "threads": exp.executor.threads,
        "dtype": exp.model.dtype,
        "adamw": {"lr": local.lr, "betas": local.betas, "eps": local.eps, "weight_decay": local.weight_decay},
        "clip": local.clip,
        "keep_state": local.keep_state,
        "eval_batch": exp.evaluate.batch_size,
        "splits": splits,
        "rounds": rounds,
    }
    (work / "work.json").write_text(json.dumps(job))
    lengths = parts.tokens["train"].lengths
    batches = [lengths[b] for r in rounds for _, steps, _ in r["cohort"] for b in steps]
    about = {
        "run": parts.run_id(),
        "environment": environment(["cpu"], exp.executor.threads),
        "steps": len(batches) / exp.rounds,
        "rows": sum(map(len, batches)) / exp.rounds,
        "useful": float(sum(n.sum() for n in batches) / sum(len(n) * n.max() for n in batches)),
    }
    (work / "about.json").write_text(json.dumps(about))


# ------------------------------------------------------------------------------------------------ taking turns


class Turn:
    """A child's end of the line: wait for a round, say how long it took.

    Args:
        inp, out: one line of JSON a message. Whatever else a library prints goes to standard error.
        free: nobody hands out turns: never wait, say nothing.
    """

    def __init__(self, inp: IO[str], out: IO[str], free: bool) -> None:
        self._in, self._out, self._free = inp, out, free
        self._wall = self._cpu = 0.0

    def wait(self) -> None:
        """Say that this side is ready, and wait to be called."""
        if self._free:
            return
        print("ready", file=self._out, flush=True)
        if not self._in.readline():
            raise SystemExit("the benchmark has ended early")
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def done(self, **more: float) -> None:
        """Tell the seconds since `wait` returned, on the clock and of this process's CPU time."""
        seconds, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        if not self._free:
            print(json.dumps({"seconds": seconds, "cpu": cpu, **more}), file=self._out, flush=True)


class Side:
    """A child process, seen from outside."""

    def __init__(self, name: str, work: Path, free: bool = False) -> None:
        self.name, self._log = name, work / f"{name}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--side", name, "--work", str(work)]
                + (["--free"] if free else []),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )

    def ready(self) -> None:
        """Wait until the side has loaded what it needs."""
        self._line()

    def go(self) -> None:
        """Let it go on."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def round(self) -> dict[str, float]:
        """Have it do a round; see `Turn.done`."""
        self.go()
        return json.loads(self._line())

    def peak_mb(self) -> float:
        """Its highest resident memory so far, in MB, as /proc has it; NaN where there is none."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return float("nan")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6

    def end(self) -> float:
        """Wait for its end; the highest resident memory of its whole life, in MB."""
        _, code, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(code)
        if self.process.returncode:
            self._failed()
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6

    def kill(self) -> None:
        """End it if it is still there."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        return line if line else self._failed()

    def _failed(self) -> Any:
        raise RuntimeError(f"the {self.name} side failed:\n{self._log.read_text()[-4000:]}")


def measure(work: Path, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run all sides round by round; (one record a round, peak memory of each side)."""
    sides = {}
    try:
        prepare = sides["prepare"] = Side("prepare", work)
        prepare.end()
        for name in SIDES:  # the loop starts from the folder that fedsim's run writes first
            sides[name] = Side(name, work)
            sides[name].ready()
        out, names = [], list(SIDES)
        for r in range(1, rounds + 1):
            order = names[r % len(names) :] + names[: r % len(names)]
            times = {name: sides[name].round() for name in order}
            out.append({"round": r, "first": order[0], **{n: times[n] for n in names}})
            for name in order:
                sides[name].ready()
        peaks = {n: {"rounds_mb": sides[n].peak_mb()} for n in names}
        for name, peak in peaks.items():
            sides[name].go()
            peak["process_mb"] = sides[name].end()
        return out, peaks
    finally:
        for side in sides.values():
            side.kill()


def measure_whole(work: Path) -> dict[str, float]:
    """Seconds of each side's whole process, from its start to its end: imports, loading, all rounds, figures."""
    out = {}
    for name in ("auto", "plain"):
        began = time.perf_counter()
        side = Side(name, work, free=True)
        try:
            side.end()
        finally:
            side.kill()
        out[name] = time.perf_counter() - began
    return out


# ------------------------------------------------------------------------------------------------ what comes out


def difference(work: Path) -> dict[str, dict[str, float]]:
    """How far each side's parameters are from the loop's: largest norm of a difference over the norm, largest element."""
    from safetensors.torch import load_file

    b, out = load_file(work / "plain.safetensors"), {}
    for name in ("auto", "one"):
        a = load_file(work / f"{name}.safetensors")
        assert a.keys() == b.keys(), f"the sides train different tensors: {sorted(a.keys() ^ b.keys())}"
        relative = max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a)
        out[name] = {"relative": relative, "largest": max(float((a[n] - b[n]).abs().max()) for n in a)}
    return out


def summarise(timed: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds a round by side, on the clock and of CPU time, and the median of the rounds' own ratios to the loop."""
    out = {}
    for side, label in SIDES.items():
        for kind, more in (("seconds", ""), ("cpu", ", CPU time")):
            values, plain = ([t[n][kind] for t in timed] for n in (side, "plain"))
            ratios = [v / p for v, p in zip(values, plain, strict=True)]
            out[label + more] = {f.__name__: f(values) for f in (statistics.median, min, max)}
            out[label + more] |= {"ratio": statistics.median(ratios), "ratios": ratios}
    return out


def table(summary: dict[str, Any], peaks: dict[str, Any]) -> str:
    """The figures to read."""
    lines = ["seconds per round                           median     min     max   x plain, and its range"]
    for name, s in summary.items():
        ratio = f"{s['ratio']:7.3f}  {min(s['ratios']):.2f} to {max(s['ratios']):.2f}"
        lines.append(f"{name:42s} {s['median']:7.3f} {s['min']:7.3f} {s['max']:7.3f}   {ratio}")
    lines += ["", "peak resident memory, MB                     rounds   whole process"]
    for name, p in peaks.items():
        lines.append(f"{SIDES[name]:42s} {p['rounds_mb']:8.0f} {p['process_mb']:15.0f}")
    return "\n".join(lines)


def figure(path: Path, timed: list[dict[str, Any]], summary: dict[str, Any], peaks: dict[str, Any]) -> None:
    """Ratio of each round, and peak memory of each side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8), width_ratios=(2.4, 1), layout="constrained")
    colors = {"auto": "#0072B2", "one": "#E69F00", "plain": "#999999"}
    for side in ("auto", "one"):
        s = summary[SIDES[side]]
        rounds = [t["round"] for t in timed]
        left.plot(rounds, s["ratios"], "o", color=colors[side], label=f"{SIDES[side]}: {s['ratio']:.2f}")
        left.axhline(s["ratio"], color=colors[side])
    left.axhline(TARGET_RATIO, color="#D55E00", ls="--", label=f"target {TARGET_RATIO:.2f}")
    left.set_ylim(0, None)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel="round", ylabel="time / plain loop's", title="Time of a round")
    fig.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    names = ["lanes:\nauto", "lanes:\n1", "plain"]
    right.bar(names, [p["process_mb"] for p in peaks.values()], color=list(colors.values()), width=0.6)
    right.set(ylabel="MB", title="Peak memory")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def load(args: argparse.Namespace, results: Path) -> Any:
    """The experiment that both sides do.

    Raises:
        UserError: for a key that the plain loop has no counterpart of.
    """
    from fedsim import Experiment, UserError

    data = PHRASEBANK if args.data == "phrasebank" else []
    rounds = [f"rounds={args.rounds + 2}", f"results={results}"]
    exp = Experiment.load(HERE / "overhead.yaml", [*data, *args.overrides, *rounds])
    knows = {
        ("adapter", "name"): "lora",
        ("adapter", "dropout"): 0.0,
        ("model", "task"): "sequence_classification",
        ("model", "base_dropout"): False,
        ("local", "optimizer"): "adamw",
        ("local", "schedule"): "constant",
        ("local", "warmup"): 0,
        ("local", "micro_batch"): None,
        ("algorithm", "weights"): "samples",
        ("data", "template"): None,
        ("evaluate", "every_steps"): None,
        ("executor", "name"): "serial",
        ("executor", "device"): "cpu",
    }
    if exp.modes != ["federated"]:
        raise UserError(f"modes: {exp.modes!r}, but the plain loop is federated only; leave the key out")
    if exp.executor.threads is None:
        raise UserError("executor.threads: null, but both sides must use the same number; give executor.threads=1")
    for (section, key), only in knows.items():
        value = getattr(getattr(exp, section), key, None)
        if value != only:
            way = f"but the plain loop beside it knows only {only!r}; leave the key out"
            raise UserError(f"{section}.{key}: {value!r}, {way}")
    return exp


def write_config(exp: Any, work: Path, side: str, lanes: int | None = None, results: Path | None = None) -> None:
    """A side's config: `SIDE.yaml` in the work folder."""
    tree = exp.to_dict()
    tree["training"]["lanes"] = lanes or tree["training"]["lanes"]
    tree["results"] = str(results or tree["results"])
    (work / f"{side}.yaml").write_text(type(exp).from_dict(tree).to_yaml())


def main() -> int:
    """Measure, print, write; 1 if the two sides did not end with the same parameters."""
    parser = argparse.ArgumentParser(description="fedsim's serial executor beside a plain PyTorch loop.")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds; one before and one after are not timed")
    data = ["headlines", "phrasebank"]
    parser.add_argument("--data", choices=data, default=data[0], help="embedded, or the real one in $FEDSIM_DATA")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/overhead"), help="where the figures go")
    parser.add_argument("--side", choices=["prepare", *SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--free", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="key=value, as for fedsim run")
    args = parser.parse_args()
    if args.side:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        turn = Turn(sys.stdin, out, args.free)
        if args.side in ("auto", "one"):
            fedsim_side(args.work, turn, args.side)
        else:
            {"prepare": prepare_side, "plain": plain_side}[args.side](args.work, turn)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".work-") as folder:  # checkpoints go to the disk of results
        work = Path(folder).resolve()
        exp = load(args, work / "runs")
        write_config(exp, work, "auto")
        write_config(exp, work, "one", lanes=1)
        rounds, peaks = measure(work, exp.rounds)
        apart, about = difference(work), json.loads((work / "about.json").read_text())
        plan = json.loads((work / "runs" / exp.name / about.pop("run") / "plan.json").read_text())
        write_config(exp, work, "auto", results=work / "whole")
        whole = measure_whole(work)
    timed = rounds[1:-1]
    summary = summarise(timed)
    furthest = max(a["relative"] for a in apart.values())
    same = furthest <= TOLERANCE or exp.model.dtype == "bfloat16"  # where rounding alone is larger than that
    config = {k: v for k, v in exp.to_dict().items() if k != "results"}
    value = {"data": args.data, **about, "config": config, "apart": apart, "summary": summary, "memory": peaks}
    value |= {"whole_process_s": whole, "plan": plan}
    (args.out / "results.json").write_text(json.dumps({**value, "rounds": rounds}, indent=2) + "\n")
    figure(args.out / "overhead.png", timed, summary, peaks)
    print(
        f"{args.data}: {about['rows']:.0f} rows and {about['steps']:.0f} steps a round, {len(timed)} rounds timed; ",
        end="",
    )
    print(f"{about['useful']:.0%} of the computed tokens are not padding")
    print(table(summary, peaks))
    ratio, end_to_end = summary[SIDES["auto"]]["ratio"], whole["auto"] / whole["plain"]
    print(
        f"\nlanes: auto took {plan['lanes']} lanes; time of a round x {ratio:.3f} (target {TARGET_RATIO}, aim {AIM_RATIO})"
    )
    print(
        f"whole process of {exp.rounds} rounds: {whole['auto']:.1f} s against {whole['plain']:.1f} s, x {end_to_end:.3f} "
        f"(target {TARGET_WHOLE})"
    )
    verdict = "the same" if furthest <= TOLERANCE else "rounding of bfloat16" if same else "NOT the same work"
    print(f"parameters after {exp.rounds} rounds: {furthest:.1e} apart (norm over norm, worst tensor): {verdict}")
    print(f"written: {args.out / 'results.json'}, {args.out / 'overhead.png'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
