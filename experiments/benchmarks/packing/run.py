"""Clients side by side in lanes, against a plain sequential PEFT loop and against a process for each client.

    python experiments/benchmarks/packing/run.py [--bases tiny,minilm] [--batches 1,4,16] [--lanes 1,2,4] [--device cuda] ...

All sides train the same clients on the same rows in the same batches, round by round in turn, and must end with the same
parameters. See README.md.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
from common import COLORS, JUDGED_AFTER, TOLERANCE, Group, dropping, killing  # noqa: E402

PLAIN = "plain"


def measure_base(
    args: argparse.Namespace, base: str, helper: Group, work: Path, failed: dict[str, str], done: Callable
) -> dict[str, Any]:
    """All batch sizes of a base; see `common.over_bases`. Its parameters, and seconds that processes took to load."""
    made = common.make_base(helper, base, work / "base")
    cells = {}
    for batch in args.batches:
        out = work / f"batch-{batch}"
        cells[batch] = common.make_cell(helper, HERE / "packing.yaml", base, made["path"], batch, args, out)
    model = next(iter(cells.values()))["model"]
    loading = {}
    with killing({}) as groups:
        for count in args.processes:  # alone, so that nothing else slows their loading down
            name = f"{count} process{'es' * (count > 1)}"
            with dropping(groups, name, failed):
                groups[name] = Group(name, "plain", work, args.start, count)
                groups[name].ask("load", model={**model, "threads": max(1, args.threads // count)})
                loading[name] = time.perf_counter() - groups[name].began
                note = f"{base}: {name} took {loading[name]:.1f} s to start and load, each its own base"
                print(f"{note}; not in the rates below\n", flush=True)
        with dropping(groups, PLAIN, failed):
            groups[PLAIN] = Group(PLAIN, "plain", work, args.start)
            groups[PLAIN].ask("load", model=model)
        for batch, cell in cells.items():
            if why := args.is_late():
                done({**cell, "skipped": why})
                continue
            for k in [k for k in args.lanes if k <= cell["clients"] and f"lanes {k}" not in {*groups, *failed}]:
                groups[f"lanes {k}"] = Group(f"lanes {k}", "fedsim", work, args.start)
            common.note(f"  batch {batch}: {cell['clients']} clients x {cell['steps']} steps")
            done(measure_cell(groups, helper, cell, args, work / f"batch-{batch}", failed))
            if args.device == "cpu":  # oneDNN keeps something of every shape it met: memory is that of a new process
                for name in [n for n in groups if n.startswith("lanes")]:
                    groups.pop(name).kill()
    return {"parameters": made["parameters"], "loading_s": loading}


def measure_cell(
    groups: dict[str, Group],
    helper: Group,
    cell: dict[str, Any],
    args: argparse.Namespace,
    work: Path,
    failed: dict[str, str],
) -> dict[str, Any]:
    """A case: everyone's rounds in turn, memory, and whether all ended with the same parameters."""
    fits = {n: g for n, g in groups.items() if not n.startswith("lanes") or int(n.split()[1]) <= cell["clients"]}
    keys = {n: [f"training.lanes={n.split()[1]}"] for n in fits if n.startswith("lanes")}
    said = common.begin_cell(fits, work / "config.yaml", keys, failed)
    start, files = work / "start.safetensors", {}

    def early() -> None:
        files["apart"] = common.save_all(fits, work, "early", failed, start)

    records, skipped = common.take_turns(fits, args.repeats, args.budget, failed, early)
    files["apart_at_end"] = common.save_all(fits, work, "end", failed, start)
    ends = {}
    for name in list(fits):
        with dropping(fits, name, failed):
            ends[name] = fits[name].end()
    for name in [n for n in groups if n in failed]:
        del groups[name]
    out = {**cell, "trained": next((s["trained"] for s in said.values() if "trained" in s), None)}
    if skipped:
        return {**out, "skipped": skipped}
    left = [n for n in fits if all(n in r for r in records)]
    if not left:
        return {**out, "skipped": "every side failed"}
    out["sides"] = common.summarise(records, left, PLAIN)
    for name in left:
        out["sides"][name] |= ends[name] | {"lanes": said[name]["lanes"]}
        if said[name].get("plan"):
            out["sides"][name]["halved"] = said[name]["plan"]["halved"]
    if PLAIN in left:
        for key, saved in files.items():
            others = {n: saved[n] for n in left if n != PLAIN}
            apart = helper.ask("compare", files=others, reference=saved[PLAIN], start=str(start))[0]
            for name, found in apart.items():
                out["sides"][name][key] = found
    return {**out, "turns": len(records), "rounds": [{n: r[n]["seconds"] for n in left if n in r} for r in records]}


# ------------------------------------------------------------------------------------------------ what comes out


def lines_of(case: dict[str, Any], dtype: str) -> list[str]:
    """The table of a case."""
    head = f"{case['base']}, batch {case['batch']}: {case['clients']} clients x {case['steps']} steps"
    if "skipped" in case:
        return [f"{head}: skipped, {case['skipped']}", ""]
    rows = case["rows_of_a_round"]
    tokens = next(iter(case["sides"].values()))["useful_tokens"] / case["turns"] / rows
    out = [f"{head} = {rows} rows of {tokens:.0f} tokens a round; median of {case['turns']} rounds, {dtype}"]
    out.append(
        f"{'':14s} {'samples/s':>10s} {'tokens/s':>10s} {'x plain':>8s} {'range':>14s} {'peak MB':>9s} "
        f"{'twice MB':>8s} {'useful':>7s} {'apart':>8s}"
    )
    for name, s in case["sides"].items():
        speed = s.get("speed")
        apart = f"{s['apart']['relative']:.0e}" if "apart" in s else ""
        ratio = f"{speed['median']:8.2f} {speed['min']:6.2f} to {speed['max']:.2f}" if speed else f"{'':23s}"
        useful = f"{s['useful_of_computed']:7.1%}" if s["useful_of_computed"] else f"{'':7s}"
        out.append(
            f"{name:14s} {s['samples_per_s']['median']:10.1f} {s['tokens_per_s']['median']:10,.0f} {ratio:23s} "
            f"{s['peak_mb']:9,.0f} {s['counted_twice_mb']:8,.0f} {useful} {apart:>8s}"
        )
        if s.get("halved"):
            out.append(f"{'':14s} out of memory: {', '.join(str(h['lanes']) for h in s['halved'])} lanes in the end")
    return [*out, ""]


def verdict(cases: list[dict[str, Any]], dtype: str) -> tuple[str, bool]:
    """A sentence on whether all sides did the same work, and whether that is all right."""
    found = [(s["apart"]["relative"], c, n) for c in cases for n, s in c.get("sides", {}).items() if "apart" in s]
    if not found:
        return "parameters: nothing was compared, since no plain loop finished beside another side", False
    worst, case, name = max(found, key=lambda f: (math.isnan(f[0]), f[0]))
    where = f"{worst:.1e} apart at most after {JUDGED_AFTER} rounds (norm over norm; {case['base']}, batch {case['batch']}, {name})"
    if dtype != "float32":
        return f"parameters: {where}; in {dtype} the order of sums shows, so this is not judged", True
    same = worst <= TOLERANCE
    return f"parameters: {where}, {'the same' if same else 'NOT the same work'} (limit {TOLERANCE:.0e})", same


def figure(path: Path, cases: list[dict[str, Any]], device: str) -> None:
    """Speed and memory against lanes, a column for each base and a line for each batch size."""
    plt = common.figures()
    bases = list(dict.fromkeys(c["base"] for c in cases))
    batches = sorted({c["batch"] for c in cases})
    fig, axes = plt.subplots(
        2,
        len(bases),
        figsize=(min(8.6, max(3.6, 2.4 * len(bases) + 0.4)), 4.6),
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    crowds = []
    for column, base in enumerate(bases):
        top, bottom = axes[:, column]
        for batch, color in zip(batches, COLORS, strict=False):
            case = next((c for c in cases if c["base"] == base and c["batch"] == batch), None)
            if case is None:
                continue
            sides = case["sides"]
            lanes = [(int(n.split()[1]), s) for n, s in sides.items() if n.startswith("lanes") and "speed" in s]
            at, speeds = [k for k, _ in lanes], [s["speed"] for _, s in lanes]
            middle = [s["median"] for s in speeds]
            reach = [[s["median"] - s["min"] for s in speeds], [s["max"] - s["median"] for s in speeds]]
            top.errorbar(at, middle, reach, fmt="o-", color=color, ms=3.5, lw=1.2, elinewidth=0.8)
            bottom.plot(at, [s["peak_mb"] for _, s in lanes], "o-", color=color, ms=3.5, lw=1.2)
            for name in [n for n in sides if n.endswith(("process", "processes"))]:
                crowds = list(dict.fromkeys([*crowds, name]))
                style = ("--", "-.", (0, (1, 1)))[crowds.index(name) % 3]
                if "speed" in sides[name]:
                    top.axhline(sides[name]["speed"]["median"], color=color, ls=style, lw=1)
                bottom.axhline(sides[name]["peak_mb"], color=color, ls=style, lw=1)
            if PLAIN in sides:
                bottom.axhline(sides[PLAIN]["peak_mb"], color=color, ls=":", lw=1)
        top.axhline(1, color="#555555", ls=":", lw=1)
        top.set(title=base, ylim=(0, None))
        bottom.set(xlabel="lanes", ylim=(0, None))
        every = sorted({int(n.split()[1]) for c in cases for n in c["sides"] if n.startswith("lanes")})
        bottom.set_xscale("log", base=2)
        bottom.set_xticks(every, [str(k) for k in every])
        bottom.minorticks_off()
    axes[0, 0].set_ylabel("samples/s, x plain loop")
    axes[1, 0].set_ylabel("peak MB " + ("on the GPU" if device != "cpu" else "resident"))
    shown = [
        (plt.Line2D([], [], color=c, marker="o", ms=3.5), f"batch {b}") for b, c in zip(batches, COLORS, strict=False)
    ]
    shown.append((plt.Line2D([], [], color="#555555", ls=":"), "plain loop"))
    for i, name in enumerate(crowds):
        shown.append(
            (plt.Line2D([], [], color="#555555", ls=("--", "-.", (0, (1, 1)))[i % 3]), f"{name}, a client each")
        )
    columns = 2 if len(bases) == 1 else 3 if len(bases) == 2 else 5
    fig.legend(*zip(*shown, strict=True), loc="outside lower center", ncols=columns, frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> int:
    """Measure, print, write; 1 if a side failed or did not end with the parameters of the plain loop."""
    parser = common.options("packing", "Clients in lanes against a plain PEFT loop and a process for each client.")
    parser.add_argument("--lanes", type=common.numbers, default=[1, 2, 4, 8, 16, 32], help="clients side by side")
    parser.add_argument("--processes", type=common.numbers, help="at once; default: as many as threads, 4 on a GPU")
    args = common.parse(parser)
    args.processes = args.processes or [args.threads if args.device == "cpu" else 4]
    value = common.over_bases(args, functools.partial(measure_base, args), lines_of)
    whole = [c for c in value["cases"] if c.get("sides")]
    sentence, same = verdict(whole, args.dtype)
    value["same_parameters"] = {"checked": args.dtype == "float32", "same": same, "sentence": sentence}
    common.write(args.out, value)
    written = [args.out / "results.json"]
    if whole:
        figure(args.out / "packing.png", whole, args.device)
        written.append(args.out / "packing.png")
    print(sentence)
    print(f"written: {', '.join(map(str, written))}")
    return 0 if same and not any(b["failed"] for b in value["bases"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
