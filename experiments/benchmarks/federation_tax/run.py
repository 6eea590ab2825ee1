"""What a federated round costs beside centralised training on as many rows at the same local batch: the federation tax.

    python experiments/benchmarks/federation_tax/run.py [--bases tiny,minilm] [--batches 1,4,16] [--device cuda] ...

Both are runs of fedsim, each in a process of its own; rounds are taken in turn and timed on the clock. See README.md.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
from common import COLORS, TOLERANCE, Group, dropping, killing  # noqa: E402

SIDES = {  # name -> the run's own keys
    "federated, lanes auto": ["modes=[federated]", "training.lanes=auto"],
    "federated, lanes 1": ["modes=[federated]", "training.lanes=1"],
    "central": ["modes=[central]", "training.lanes=1"],
    "central, in a lane": ["modes=[central]", "training.lanes=auto"],
}
FEDERATED, CENTRAL = [n for n in SIDES if n.startswith("fed")], [n for n in SIDES if n.startswith("central")]


def measure_base(
    args: argparse.Namespace, base: str, helper: Group, work: Path, failed: dict[str, str], done: Callable
) -> dict[str, Any]:
    """All batch sizes of a base; see `common.over_bases`. Its parameters."""
    made = common.make_base(helper, base, work / "base")
    with killing({}) as groups:
        for name in SIDES:
            groups[name] = Group(name, "fedsim", work, args.start)
        for batch in args.batches:
            place = work / f"batch-{batch}"
            cell = common.make_cell(helper, HERE / "federation_tax.yaml", base, made["path"], batch, args, place)
            if why := args.is_late():
                done({**cell, "skipped": why})
                continue
            common.note(f"  batch {batch}: {cell['clients']} clients x {cell['steps']} steps")
            done({**cell, **measure_cell(groups, helper, args, place, failed)})
    return {"parameters": made["parameters"]}


def measure_cell(
    groups: dict[str, Group], helper: Group, args: argparse.Namespace, work: Path, failed: dict[str, str]
) -> dict[str, Any]:
    """A case: everyone's rounds in turn, and whether lanes changed what came out."""
    said = common.begin_cell(groups, work / "config.yaml", {n: SIDES[n] for n in groups}, failed)
    files: dict[str, str] = {}

    def early() -> None:
        files.update(common.save_all(groups, work, "early", failed))

    records, skipped = common.take_turns(groups, args.repeats, args.budget, failed, early)
    ends = {}
    for name in list(groups):
        with dropping(groups, name, failed):
            ends[name] = groups[name].end()
    if skipped:
        return {"skipped": skipped}
    left = [n for n in groups if all(n in r for r in records)]
    if not left:
        return {"skipped": "every side failed"}
    out: dict[str, Any] = {"turns": len(records), "sides": common.summarise(records, left, "central")}
    for name in left:
        rows = {r[name]["rows"] for r in records}
        out["sides"][name] |= ends[name] | {"lanes": said[name]["lanes"], "rows_a_round": sorted(rows)}
    if all(n in left for n in FEDERATED):
        packed, one = FEDERATED
        found = helper.ask("compare", files={packed: files[packed]}, reference=files[one], start=None)[0]
        out["sides"][packed]["apart"] = found[packed]
    central = [n for n in CENTRAL if n in left]
    for name in [n for n in FEDERATED if n in left and central]:
        # The faster of the two central sides is what federation is held against.
        best = min(central, key=lambda n: out["sides"][n]["seconds"]["median"])
        ratios = [r[name]["seconds"] / r[best]["seconds"] for r in records]
        out["sides"][name]["tax"] = {**common.spread(ratios), "beside": best}
    out["rounds"] = [{n: r[n]["seconds"] for n in left} for r in records]
    return out


# ------------------------------------------------------------------------------------------------ what comes out


def lines_of(case: dict[str, Any], dtype: str) -> list[str]:
    """The table of a case."""
    head = f"{case['base']}, batch {case['batch']}: {case['clients']} clients x {case['steps']} steps"
    if "skipped" in case:
        return [f"{head}: skipped, {case['skipped']}", ""]
    rows = case["rows_of_a_round"]
    out = [f"{head} = {rows} rows a round; median of {case['turns']} rounds, {dtype}"]
    out.append(
        f"{'':24s} {'s a round':>10s} {'min':>8s} {'max':>8s} {'tokens/s':>10s} {'tax':>7s} {'range':>14s} {'lanes':>6s} "
        f"{'peak MB':>9s} {'useful':>7s}"
    )
    for name, s in case["sides"].items():
        t, tax = s["seconds"], s.get("tax")
        ratio = f"{tax['median']:7.2f} {tax['min']:6.2f} to {tax['max']:.2f}" if tax else f"{'':22s}"
        useful = f"{s['useful_of_computed']:7.1%}" if s["useful_of_computed"] else f"{'':7s}"
        out.append(
            f"{name:24s} {t['median']:10.3f} {t['min']:8.3f} {t['max']:8.3f} {s['tokens_per_s']['median']:10,.0f} {ratio:22s} "
            f"{s['lanes']:6d} {s['peak_mb']:9,.0f} {useful}"
        )
    return [*out, ""]


def problems(cases: list[dict[str, Any]], dtype: str) -> list[str]:
    """What makes a comparison unfair: other numbers of rows, or lanes that change what comes out."""
    out = []
    for case in cases:
        where, rows = f"{case['base']}, batch {case['batch']}", case["rows_of_a_round"]
        for name, s in case["sides"].items():
            if s["rows_a_round"] != [rows]:
                out.append(f"{where}, {name}: {s['rows_a_round']} rows a round, not {rows}")
            apart = s.get("apart", {}).get("relative", 0.0)
            if dtype == "float32" and not apart <= TOLERANCE:
                out.append(f"{where}, {name}: parameters {apart:.1e} from those of one lane (limit {TOLERANCE:.0e})")
    return out


def figure(path: Path, cases: list[dict[str, Any]]) -> None:
    """The tax by base and batch size."""
    plt = common.figures()
    bases = list(dict.fromkeys(c["base"] for c in cases))
    fig, axes = plt.subplots(
        1,
        len(bases),
        figsize=(min(8.6, max(4.2, 2.4 * len(bases) + 0.4)), 2.8),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axis, base in zip(axes[0], bases, strict=True):
        mine = [c for c in cases if c["base"] == base]
        for i, (name, color) in enumerate(zip(reversed(FEDERATED), COLORS[1::-1], strict=True)):
            taxes = [c["sides"][name]["tax"] if "tax" in c["sides"].get(name, {}) else None for c in mine]
            at = [k + (i - 0.5) * 0.38 for k, t in enumerate(taxes) if t]
            there = [t for t in taxes if t]
            middle = [t["median"] for t in there]
            reach = [[t["median"] - t["min"] for t in there], [t["max"] - t["median"] for t in there]]
            axis.bar(at, middle, 0.36, yerr=reach, color=color, label=name, error_kw={"lw": 0.8})
        axis.axhline(1, color="#555555", ls=":", lw=1, label="central")
        axis.set_xticks(range(len(mine)), [str(c["batch"]) for c in mine])
        axis.grid(axis="x", visible=False)
        axis.set(xlabel="local batch, rows", title=base)
    axes[0, 0].set_ylabel("time of a round, x central")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> int:
    """Measure, print, write; 1 if a side failed or the sides did not do the same work."""
    parser = common.options("federation_tax", "A federated round beside centralised training on as many rows.")
    args = common.parse(parser)
    value = common.over_bases(args, functools.partial(measure_base, args), lines_of)
    whole = [c for c in value["cases"] if c.get("sides")]
    value["problems"] = problems(whole, args.dtype)
    common.write(args.out, value)
    written = [args.out / "results.json"]
    if any("tax" in s for c in whole for s in c["sides"].values()):
        figure(args.out / "federation_tax.png", whole)
        written.append(args.out / "federation_tax.png")
    print("tax: time of a federated round over that of the faster central side; median of the turns' own ratios, range")
    for line in value["problems"]:
        print(f"NOT the same work: {line}")
    if whole and not value["problems"]:
        more = "; lanes ended where one lane did" if args.dtype == "float32" else ""
        print(f"all sides trained on as many rows a round{more}")
    print(f"written: {', '.join(map(str, written))}")
    return 0 if whole and not value["problems"] and not any(b["failed"] for b in value["bases"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
