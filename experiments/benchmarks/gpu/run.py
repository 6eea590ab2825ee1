"""What lanes make of a GPU: speed beside a plain PEFT loop, share of the matrix peak, aggregation, workers, memory.

    python experiments/benchmarks/gpu/run.py --device cuda
    python experiments/benchmarks/gpu/run.py --device cpu        # a small size, the same code

What cannot be measured is null in results.json, with a reason. See README.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
from common import COLORS, JUDGED_AFTER, TOLERANCE, Group, SideFailed, dropping, killing, spread  # noqa: E402

PLAIN, CENTRAL = "plain", "central"
CLOCKED = 3  # rounds in which aggregation is timed
FLOPS = (
    "useful tokens/s x 4 x parameters of the base's layers: 2 a token and parameter forward, 2 for the gradient with "
    "respect to activations; embeddings, head, attention's own products and the adapter are not counted"
)
BYTES = (
    "4 x N x (3 K + 5 P + 8) bytes for N trained parameters, K clients, P packs: each client's parameters read, its update "
    "written and read; a pack's global parameters read, its sum written and read, the running sum read and written; that "
    "sum cleared 1, mean 2, server step 3, in place 2"
)
TARGETS = {
    "speed": 8.0,  # x the plain loop's tokens/s, at least
    "tax": 1.0,  # below: a federated round over a central one of as many rows
    "aggregation": 0.02,  # of a round, below
    "memory": 0.15,  # measured peak off the predicted one
    "growth": 0.01,  # of memory after round 2
}


def nothing(reason: str) -> dict[str, Any]:
    """What stands for something that could not be measured."""
    return {"value": None, "reason": reason}


# ------------------------------------------------------------------------------------------------ measuring


def measure(args: argparse.Namespace, helper: Group, work: Path) -> dict[str, Any]:
    """All of it, in the order of the table."""
    made = common.make_base(helper, args.base, work / "base")
    total = 2 + args.repeats + args.rounds + CLOCKED
    out = work / "cell"
    more = [f"rounds={total + 1}"]
    config = HERE / "gpu.yaml"
    cell = common.make_cell(helper, config, args.base, made["path"], args.batch, args, out, more, args.tokens or None)
    common.note("limits of the device ...")
    limits = helper.ask("limits", device=args.device, size=args.matmul, copy_mb=args.copy)[0]
    value = {**{k: made[k] for k in ("parameters", "layer_parameters")}, "config": cell["config"], "limits": limits}
    value |= measure_lanes(args, helper, cell, out, made["layer_parameters"], limits)
    value["workers"] = measure_workers(args, helper, cell, out)
    value["environment"] = helper.ask("environment", device=args.device, threads=args.threads)[0]
    return value


def measure_lanes(
    args: argparse.Namespace, helper: Group, cell: dict[str, Any], out: Path, layers: int, limits: dict[str, Any]
) -> dict[str, Any]:
    """Speed, share of the peak, aggregation, memory of all clients in lanes."""
    failed: dict[str, str] = {}
    packed = f"lanes {args.lanes}"
    keys = {packed: [f"training.lanes={args.lanes}"], CENTRAL: ["modes=[central]", "training.lanes=1"]}
    with killing({}) as groups:
        groups[PLAIN] = Group(PLAIN, "plain", out, args.start)
        groups[PLAIN].tell("load", model=cell["model"])
        for name in keys:
            groups[name] = Group(name, "fedsim", out, args.start)
        with dropping(groups, PLAIN, failed):
            groups[PLAIN].hear()
        common.note("the plain loop, central training and lanes, in turn ...")
        said = common.begin_cell(groups, out / "config.yaml", keys, failed)
        start, files = out / "start.safetensors", {}
        records, skipped = common.take_turns(
            groups,
            args.repeats,
            args.budget,
            failed,
            lambda: files.update(common.save_all(groups, out, "early", failed, start)),
        )
        if skipped or packed not in groups:
            return _no_lanes(skipped or failed[packed], failed)
        ends = {}
        for name in [n for n in groups if n != packed]:
            with dropping(groups, name, failed):
                ends[name] = groups[name].end()
                groups.pop(name).kill()
        common.note(f"{args.rounds} rounds in lanes ...")
        memory: list[dict[str, float]] = []
        clocked: list[dict[str, Any]] = []
        with dropping(groups, packed, failed):
            memory += [groups[packed].round(held=True)["memory"] for _ in range(args.rounds)][1:]
            clocked = [groups[packed].round(clock=True) for _ in range(CLOCKED)]
            ends[packed] = groups[packed].end()
    left = [n for n in (PLAIN, packed, CENTRAL) if n in ends and all(n in r for r in records)]
    if packed not in left:
        return _no_lanes(failed[packed], failed)
    sides = common.summarise(records, left, PLAIN)
    for name in left:
        sides[name] |= ends[name]
    apart: dict[str, Any] = nothing(failed.get(PLAIN, ""))
    if PLAIN in left:
        found = helper.ask("compare", files={packed: files[packed]}, reference=files[PLAIN], start=str(start))
        apart = found[0][packed]
    plan = said[packed]["plan"]
    result = {"sides": sides, "failed": failed, "plan": plan, "apart": apart}
    result["speed"] = sides[packed].get("speed") or nothing(failed.get(PLAIN, "no plain loop"))
    result["tax"] = nothing(failed.get(CENTRAL, ""))
    if CENTRAL in left:
        result["tax"] = spread([r[packed]["seconds"] / r[CENTRAL]["seconds"] for r in records])
    rate = limits["bf16_flops_per_s"]["best"]
    result["share_of_peak"] = {
        "formula": FLOPS,
        **{n: s["tokens_per_s"]["median"] * 4 * layers / rate for n, s in sides.items()},
    }
    result["aggregation"] = aggregation(clocked, said[packed]["trained"], limits)
    result["memory"] = beside_plan(plan, sides[packed], args.lanes)
    result["flat"] = flat(memory)
    return result


def _no_lanes(reason: str, failed: dict[str, str]) -> dict[str, Any]:
    parts = ("sides", "speed", "tax", "share_of_peak", "aggregation", "memory", "flat", "apart")
    return {part: nothing(reason) for part in parts} | {"failed": failed}


def aggregation(rounds: list[dict[str, Any]], trained: int, limits: dict[str, Any]) -> dict[str, Any]:
    """Seconds, share of a round, and bytes over the time against the copy bandwidth."""
    if not rounds:
        return nothing("no round in which it was timed")
    seconds = statistics.median(r["merging"] for r in rounds)
    moved = 4 * trained * (3 * rounds[0]["clients"] + 5 * rounds[0]["packs"] + 8)
    bandwidth = limits["copy_bytes_per_s"]["best"]
    return {
        "formula": BYTES,
        "trained_parameters": trained,
        "bytes": moved,
        "seconds": seconds,
        "seconds_at_copy_bandwidth": moved / bandwidth,
        "share_of_copy_bandwidth": moved / seconds / bandwidth,
        "share_of_round": spread([r["merging"] / r["seconds"] for r in rounds]),
    }


def beside_plan(plan: dict[str, Any], side: dict[str, Any], lanes: int) -> dict[str, Any]:
    """What plan.json predicts, part by part, beside the measured peak; MB."""
    known = plan["memory"]
    if not known:
        return nothing(f"the plan predicts nothing: {plan['why_not'] or 'one lane'}")
    mb = {k: v / 1e6 for k, v in known.items()}
    parts = {"base": mb["base"], "lanes": plan["lanes"] * mb["lane"], "activations": mb["activations"]}
    return {
        "lanes": plan["lanes"],
        "lanes_asked_for": lanes,
        "parts_mb": {**parts, "rest": mb["predicted"] - sum(parts.values())},
        "a_lane_mb": mb["lane"],
        "predicted_mb": mb["predicted"],
        "measured_mb": side["peak_mb"],
        "off": side["peak_mb"] / mb["predicted"] - 1,
    }


def flat(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Memory at the end of each round from the second on, and by how much it grows after that one.

    On the CPU the resident memory, after the C library has given back what was freed: of that it keeps now more, now less.
    """
    on_gpu = bool(rounds) and "gpu" in rounds[0]
    if not rounds or not (on_gpu or "rss" in rounds[0]):
        return nothing("this system does not tell a process's memory")
    keys = ("gpu", "gpu_peak", "gpu_reserved", "rss") if on_gpu else ("rss",)
    series = {k: [r[k] for r in rounds] for k in keys}
    growth = {k: max(v) / v[0] - 1 for k, v in series.items()}
    judged = {k: growth[k] for k in (("gpu", "gpu_peak") if on_gpu else ("rss",))}
    out = {"first_round": 2, "rounds": len(rounds) + 1, "mb": series, "growth": growth, "judged": max(judged.values())}
    if not on_gpu:
        out["gpu"] = nothing("no CUDA device: it is the resident memory of the process")
    return out


def measure_workers(args: argparse.Namespace, helper: Group, cell: dict[str, Any], out: Path) -> dict[str, Any]:
    """Several worker processes on this one device against one, with the same packs."""
    failed: dict[str, str] = {}
    packs = max(args.workers)
    lanes = max(1, cell["clients"] // packs)
    threads = max(1, args.threads // packs)  # of a worker, the same for any number of them: the bits depend on it
    devices = {n: "[" + ", ".join([f"'{args.device}'"] * n) + "]" for n in args.workers}
    keys = {
        f"workers {n}": [
            f"training.lanes={lanes}",
            f"executor={{name: pool, devices: {devices[n]}, workers: {n}, threads: {threads}}}",
        ]
        for n in args.workers
    }
    common.note("workers ...")
    with killing({}) as groups:
        for name in keys:
            groups[name] = Group(name, "fedsim", out, args.start)
        common.begin_cell(groups, out / "config.yaml", keys, failed)
        first = next(iter(keys))
        records, skipped = common.take_turns(groups, args.repeats, args.budget, failed)
        files, ends = common.save_all(groups, out, "workers", failed), {}
        for name in list(groups):
            with dropping(groups, name, failed):
                ends[name] = groups[name].end()
        left = [n for n in groups if all(n in r for r in records)]
    if skipped or first not in left:
        return {**nothing(skipped or failed[first]), "failed": failed}
    sides = common.summarise(records, left, first)
    for name in left:
        sides[name] |= ends[name]
    files = {n: files[n] for n in left}
    apart = helper.ask("compare", files=files, reference=files[first], start=None)[0]
    return {
        "lanes": lanes,
        "sides": sides,
        "same_bits": all(a["relative"] == 0 for a in apart.values()),
        "failed": failed,
    }


# ------------------------------------------------------------------------------------------------ what comes out


def lines_of(v: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The table."""
    limits, rate = v["limits"], v["limits"]["bf16_flops_per_s"]
    out = [
        f"{limits['gpu'] or 'CPU'}; {args.base}, {v['parameters'] / 1e6:.1f}M parameters, {v['layer_parameters'] / 1e6:.1f}M in "
        f"its layers, {args.dtype}; {args.clients} clients x {args.steps} steps x {args.batch} rows of {args.tokens or 'any number of'} tokens",
        f"measured limits: bf16 products of {limits['matmul_size']} at {rate['best'] / 1e12:.2f} TFLOP/s (median "
        f"{rate['median'] / 1e12:.2f}); copy at {limits['copy_bytes_per_s']['best'] / 1e9:.1f} GB/s read and written",
        "",
    ]

    def missing(part: dict[str, Any]) -> str | None:
        return f"not measured: {part['reason']}" if part.get("value", 0) is None else None

    def judged(key: str, ok: bool, text: str) -> str:
        return f"(target {text} {TARGETS[key]:g}: {'met' if ok else 'NOT met'})"

    if why := missing(v["sides"]):
        return [*out, f"lanes: {why}"]
    out.append(
        f"{'':12s} {'s a round':>10s} {'tokens/s':>12s} {'x plain':>8s} {'range':>16s} {'of the peak':>12s} {'peak MB':>9s}"
    )
    for name, s in v["sides"].items():
        x = s.get("speed")
        ratio = f"{x['median']:8.2f} {x['min']:7.2f} to {x['max']:.2f}" if x else f"{'':25s}"
        out.append(
            f"{name:12s} {s['seconds']['median']:10.3f} {s['tokens_per_s']['median']:12,.0f} {ratio:25s} "
            f"{v['share_of_peak'][name]:12.2%} {s['peak_mb']:9,.0f}"
        )
    out += ["", f"share of the peak: {FLOPS}"]
    why = missing(v["speed"])
    out.append("speed: " + (why or f"{v['speed']['median']:.2f} x the plain loop's tokens/s "))
    if not why:
        out[-1] += judged("speed", v["speed"]["median"] >= TARGETS["speed"], "at least")
    why = missing(v["tax"])
    out.append("federation tax: " + (why or f"{v['tax']['median']:.2f} x a central round of as many rows "))
    if not why:
        out[-1] += judged("tax", v["tax"]["median"] < TARGETS["tax"], "below")
    a = v["aggregation"]
    if why := missing(a):
        out.append(f"aggregation: {why}")
    else:
        share = a["share_of_round"]["median"]
        out.append(
            f"aggregation: {a['bytes'] / 1e6:.1f} MB in {a['seconds'] * 1e3:.2f} ms, {a['share_of_copy_bandwidth']:.1%} of the "
            f"copy bandwidth; {share:.2%} of a round {judged('aggregation', share < TARGETS['aggregation'], 'below')}"
        )
        out.append(f"  {BYTES}")
    m = v["memory"]
    if why := missing(m):
        out.append(f"memory of {args.lanes} lanes: {why}")
    else:
        parts = ", ".join(f"{n} {mb:,.1f}" for n, mb in m["parts_mb"].items())
        out.append(
            f"memory of {m['lanes']} lanes: {parts} = {m['predicted_mb']:,.1f} MB predicted, {m['measured_mb']:,.1f} MB "
            f"measured, {m['off']:+.1%} {judged('memory', abs(m['off']) <= TARGETS['memory'], 'within')}"
        )
    f = v["flat"]
    if why := missing(f):
        out.append(f"memory over rounds: {why}")
    else:
        grown = ", ".join(f"{k} {g:+.2%}" for k, g in f["growth"].items())
        ok = f["judged"] < TARGETS["growth"]
        out.append(f"memory from round 2 to {f['rounds']}: {grown} {judged('growth', ok, 'below')}")
    w = v["workers"]
    if why := missing(w):
        out.append(f"workers: {why}")
    else:
        each = ", ".join(f"{n.split()[1]}: {s['speed']['median']:.2f} x" for n, s in w["sides"].items())
        bits = "the same bits" if w["same_bits"] else "OTHER bits"
        out.append(f"workers on one device, {w['lanes']} lanes a pack, tokens/s beside one: {each}; {bits}")
    p = v["apart"]
    if why := missing(p):
        out.append(f"parameters: {why}")
    else:
        judgement = f" (limit {TOLERANCE:.0e})" if args.dtype == "float32" else f"; not judged in {args.dtype}"
        out.append(
            f"parameters: {p['relative']:.1e} from the plain loop's after {JUDGED_AFTER} rounds, norm over norm{judgement}"
        )
    return out


def figure(path: Path, v: dict[str, Any], args: argparse.Namespace) -> None:
    """Speed, shares of the limits, workers, memory by part and by round."""
    plt = common.figures()
    fig = plt.figure(figsize=(7.2, 4.6), layout="constrained")
    grid = fig.add_gridspec(2, 3)
    blue, red, green, pink, yellow, _ = COLORS

    def bars(axis: Any, values: dict[str, float], title: str, ylabel: str, form: str) -> None:
        colors = [blue if "lanes" in n or "aggregation" in n else "#999999" for n in values]
        drawn = axis.bar(range(len(values)), list(values.values()), 0.65, color=colors)
        axis.bar_label(drawn, [form.format(x) for x in values.values()], fontsize=7)
        axis.set_xticks(range(len(values)), list(values))
        axis.margins(y=0.15)
        axis.set(title=title, ylabel=ylabel)
        axis.grid(axis="x", visible=False)

    sides = v["sides"]
    speeds = {n.replace(" ", "\n"): s["tokens_per_s"]["median"] for n, s in sides.items()}
    bars(fig.add_subplot(grid[0, 0]), speeds, "Speed", "useful tokens/s", "{:,.0f}")
    shares = {n.replace(" ", "\n"): 100 * v["share_of_peak"][n] for n in sides}
    bars(fig.add_subplot(grid[0, 1]), shares, "Useful share of the peak", "% of measured bf16 peak", "{:.1f}")
    if v["workers"].get("sides"):
        found = {n.split()[1]: s["speed"]["median"] for n, s in v["workers"]["sides"].items()}
        axis = fig.add_subplot(grid[0, 2])
        bars(axis, found, "Workers on one device", "tokens/s, x one worker", "{:.2f}")
        axis.set_xlabel("worker processes")
    if v["memory"].get("parts_mb"):
        axis, under = fig.add_subplot(grid[1, 0]), 0.0
        for (name, mb), color in zip(v["memory"]["parts_mb"].items(), (blue, green, yellow, "#BBBBBB"), strict=True):
            axis.bar(0, mb, 0.65, bottom=under, color=color, label=name)
            under += mb
        axis.bar(1, v["memory"]["measured_mb"], 0.65, color="#555555")
        axis.set_xticks([0, 1], ["predicted", "measured"])
        axis.set(title=f"Memory of {v['memory']['lanes']} lanes", ylabel="peak MB", xlim=(-0.5, 1.5))
        axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        axis.grid(axis="x", visible=False)
    if v["flat"].get("mb"):
        axis = fig.add_subplot(grid[1, 1:])
        named = {"gpu": "allocated", "gpu_peak": "peak allocated", "gpu_reserved": "reserved", "rss": "resident, host"}
        for (name, series), color in zip(v["flat"]["mb"].items(), (blue, red, green, pink), strict=False):
            axis.plot(range(2, 2 + len(series)), series, color=color, label=named[name])
        axis.set(title="Memory at the end of a round", xlabel="round", ylabel="MB")
        axis.set_ylim(0, 1.1 * max(max(series) for series in v["flat"]["mb"].values()))
        axis.legend(fontsize=7, frameon=False, loc="lower right", ncols=2)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def arguments() -> argparse.Namespace:
    """The command line; on the CPU everything is small."""
    parser = argparse.ArgumentParser(description="What lanes make of a GPU; a small size of the same on the CPU.")
    parser.add_argument("--base", choices=list(common.BASES), help="default: gpt2-medium, on the CPU gpt2-mini")
    parser.add_argument("--clients", type=int, help="of a round; default 32, on the CPU 8")
    parser.add_argument("--lanes", type=int, help="clients side by side; default: all")
    parser.add_argument("--batch", type=int, default=4, help="rows of an optimiser step")
    parser.add_argument("--tokens", type=int, default=64, help="of every row; 0 = rows as they are")
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a client in a round")
    parser.add_argument("--rounds", type=int, default=50, help="rounds over which memory is watched")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each side, at most")
    parser.add_argument("--budget", type=float, default=60, help="seconds for the timed rounds in turn")
    parser.add_argument("--workers", type=common.numbers, help="on the one device; default 1,2,4, on the CPU 1,2")
    parser.add_argument(
        "--matmul", type=int, help="size of the products that give the peak; default 8192, on the CPU 1024"
    )
    parser.add_argument(
        "--copy", type=int, help="MB of the copy that gives the bandwidth; default 2000, on the CPU 200"
    )
    parser.add_argument("--data", choices=["headlines", "phrasebank"], default="headlines", help="rows")
    args = common.parse(common.machine_options(parser, "gpu", device="cuda", dtype="bfloat16"))
    small = args.device == "cpu"
    defaults = {"base": "gpt2-mini", "clients": 8, "workers": [1, 2], "matmul": 1024, "copy": 200}
    large = {"base": "gpt2-medium", "clients": 32, "workers": [1, 2, 4], "matmul": 8192, "copy": 2000}
    for key, value in (defaults if small else large).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.lanes = args.lanes or args.clients
    return args


def main() -> int:
    """Measure, print, write; 1 if a side failed, or did not end with the parameters of the plain loop in float32."""
    args = arguments()
    if why := common.missing(args.base, args.device):
        print(f"{args.base}: {why}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="fedsim-") as folder, killing({}) as helpers:
        work = Path(folder).resolve()
        helper = helpers["helper"] = Group("helper", "helper", work, args.start)
        try:
            value = measure(args, helper, work)
        except SideFailed as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    value = {"options": common.shown(args), "environment": value.pop("environment"), "targets": TARGETS, **value}
    common.write(args.out, value)
    print("\n".join(lines_of(value, args)))
    written = [args.out / "results.json"]
    if value["sides"].get("value", 0) is not None:
        figure(args.out / "gpu.png", value, args)
        written.append(args.out / "gpu.png")
    print(f"written: {', '.join(map(str, written))}")
    failed = {**value["failed"], **value["workers"].get("failed", {})}
    for name, why in failed.items():
        print(f"{name} FAILED: {why}")
    same = args.dtype != "float32" or value["apart"].get("relative", float("inf")) <= TOLERANCE
    return 0 if same and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
