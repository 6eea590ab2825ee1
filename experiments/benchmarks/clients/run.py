"""What a round costs beside training, and what a run holds in memory, from 1,000 to 1,000,000 virtual clients.

    python experiments/benchmarks/clients/run.py [key=value ...] [--clients N ...] [--cohorts K ...] [--out FOLDER]

Each case is a process of its own, so that its peak memory is its own. It runs `fedsim.run` as a user calls it and takes
the time of each round; from that go the seconds that the packs' reports say they trained. The cases of a cohort take
their rounds in turn, so that whatever else the machine does weighs on all of them. This process imports nothing heavy
before they have ended.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
CLIENTS = [1_000, 10_000, 100_000, 1_000_000]
COHORTS = [10, 500]
WARM_UP = 2  # rounds that are not counted
TARGET_MS, TARGET_MB = 50.0, 200.0  # more than with the fewest clients, at the same cohort
KEYS = ["modes=[federated]", "executor.name=serial"]  # in a pool packs train at the same time: their seconds overlap


# ------------------------------------------------------------------------------------------------ a case


def one_case(overrides: list[str], out: Path, turn: Callable[[], None]) -> None:
    """Run one experiment in this process and write what its rounds took; see `measure` for the keys.

    Args:
        overrides: key=value, over `clients.yaml`.
        out: file to write.
        turn: returns when the next round may begin.
    """
    import fedsim.runs.modes
    import fedsim.runs.run
    from fedsim.runs.environment import environment
    from fedsim.simulate.rounds import PackDone, Round, rounds

    exp = fedsim.Experiment.load(HERE / "clients.yaml", overrides)
    told: list[dict[str, Any]] = []
    value: dict[str, Any] = {"clients": exp.partition.num_clients, "cohort": exp.cohort.size, "rounds": told}

    def timed(world: Any, state: Any, executor: Any) -> Iterator[Any]:
        value["start"] = time.perf_counter() - called
        turn()
        trained, began = 0.0, time.perf_counter()
        for event in rounds(world, state, executor):
            if isinstance(event, PackDone):
                trained += event.report.seconds
            yield event
            if isinstance(event, Round):  # with metrics, checkpoint and progress, which are part of it
                seconds = time.perf_counter() - began
                told.append(
                    {"round": event.round, "seconds": seconds, "training": trained, "outside": seconds - trained}
                )
                if event.round < exp.rounds:
                    turn()
                trained, began = 0.0, time.perf_counter()
        value["rounds_mb"], value["seen"] = peak_mb(), len(state.steps)

    fedsim.runs.modes.rounds = timed
    called = time.perf_counter()
    fedsim.runs.run.run(exp, progress=False)
    value["process_mb"] = peak_mb()
    value["environment"] = environment([exp.executor.device], exp.executor.threads)
    value["config"] = {k: v for k, v in exp.to_dict().items() if k != "results"}
    out.write_text(json.dumps(value))


def turn_of(out: IO[str]) -> Callable[[], None]:
    """A child's end of the line: say `ready`, and wait to be called."""

    def turn() -> None:
        print("ready", file=out, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("the benchmark has ended early")

    return turn


def peak_mb() -> float:
    """Largest resident memory of this process so far (`VmHWM`), MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status names no VmHWM")


# ------------------------------------------------------------------------------------------------ taking turns


class Case:
    """A case's process, seen from outside.

    Args:
        clients, cohort: what makes the case.
        overrides: key=value, of all cases.
        folder: empty; its runs and what it writes.
    """

    def __init__(self, clients: int, cohort: int, overrides: list[str], folder: Path) -> None:
        self.name, self._out, self._log = f"{clients:,} clients, {cohort} a round", folder / "case.json", folder / "log"
        case = [f"partition.num_clients={clients}", f"cohort.size={cohort}", f"results={folder / 'runs'}"]
        command = [sys.executable, str(Path(__file__).resolve()), "--one", str(self._out), *overrides, *case, *KEYS]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with self._log.open("wb") as log:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env)

    def ready(self) -> bool:
        """Wait until it is ready for a round; False where it has done its last one and is over."""
        if self.process.stdout.readline():
            return True
        if self.process.wait():
            raise RuntimeError(f"{self.name} failed:\n{self._log.read_text()[-4000:]}")
        return False

    def go(self) -> None:
        """Let it do a round."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """What it wrote, with the median, minimum and maximum of the counted rounds."""
        value = json.loads(self._out.read_text())
        counted = [r["outside"] for r in value["rounds"][WARM_UP:]]
        return value | {"outside": {f.__name__: f(counted) for f in (statistics.median, min, max)}}

    def kill(self) -> None:
        """End it if it is still there."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def measure(numbers: list[int], cohort: int, overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """All cases of a cohort, round by round, each round led by another one.

    Returns:
        A case each: clients, cohort, seen (clients that trained), start (s, from the call of `fedsim.run` to the first
        round), rounds (each: round, seconds, training, outside; s), outside (of the counted rounds, s), rounds_mb and
        process_mb (peak resident memory after the last round, and with exports and figures), environment, config.
    """
    cases: list[Case] = []
    try:
        for clients in numbers:
            place = folder / str(clients)
            place.mkdir()
            cases.append(Case(clients, cohort, overrides, place))
            cases[-1].ready()
            print(f"{cases[-1].name}: ready", file=sys.stderr, flush=True)
        waiting = list(cases)
        while waiting:
            still = []
            for case in waiting:
                case.go()
                if case.ready():
                    still.append(case)
            waiting = still[1:] + still[:1]
        return [case.result() for case in cases]
    finally:
        for case in cases:
            case.kill()


# ------------------------------------------------------------------------------------------------ what comes out


def growth(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By cohort: what the case with the most clients takes more than the one with the fewest.

    In time the median of the differences of single rounds, which the two did right after one another.
    """
    out = []
    for cohort in dict.fromkeys(c["cohort"] for c in cases):
        same = sorted((c for c in cases if c["cohort"] == cohort), key=lambda c: c["clients"])
        first, last = same[0], same[-1]
        pairs = list(zip(first["rounds"], last["rounds"], strict=True))[WARM_UP:]
        more_ms = statistics.median(b["outside"] - a["outside"] for a, b in pairs) * 1e3
        more_mb = {key: last[key] - first[key] for key in ("rounds_mb", "process_mb")}
        met = more_ms < TARGET_MS and max(more_mb.values()) < TARGET_MB
        ends = {"cohort": cohort, "from": first["clients"], "to": last["clients"]}
        out.append({**ends, "outside_ms": more_ms, **more_mb, "met": met})
    return out


def table(cases: list[dict[str, Any]]) -> str:
    """The figures to read."""
    head = [
        "clients",
        "a round",
        "seen",
        "outside ms",
        "min",
        "max",
        "training ms",
        "start s",
        "rounds MB",
        "process MB",
    ]
    lines = ["  ".join(f"{h:>11s}" for h in head)]
    for c in cases:
        outside = [f"{c['outside'][key] * 1e3:.1f}" for key in ("median", "min", "max")]
        training = statistics.median(r["training"] for r in c["rounds"][WARM_UP:]) * 1e3
        cells = [f"{c['clients']:,}", str(c["cohort"]), f"{c['seen']:,}", *outside, f"{training:.0f}"]
        cells += [f"{c['start']:.1f}", f"{c['rounds_mb']:.0f}", f"{c['process_mb']:.0f}"]
        lines.append("  ".join(f"{cell:>11s}" for cell in cells))
    return "\n".join(lines)


def figure(path: Path, cases: list[dict[str, Any]]) -> None:
    """Time of a round outside training, and peak memory, against the number of clients; a line for each cohort."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    looks = zip(("o-", "s--", "^:", "v-."), ("#0072B2", "#D55E00", "#009E73", "#000000"), strict=True)
    for cohort, (style, color) in zip(dict.fromkeys(c["cohort"] for c in cases), looks, strict=False):
        same = sorted((c for c in cases if c["cohort"] == cohort), key=lambda c: c["clients"])
        at, label = [c["clients"] for c in same], f"{cohort} clients a round"
        left.plot(at, [c["outside"]["median"] * 1e3 for c in same], style, color=color, label=label)
        right.plot(at, [c["process_mb"] for c in same], style, color=color)
    left.set(yscale="log", ylabel="ms a round, median", title="Outside training")
    right.set(ylim=(0, 1.15 * max(c["process_mb"] for c in cases)), ylabel="MB", title="Peak memory")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="clients")
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> int:
    """Measure, print, write; 1 if time or memory grows by more than the targets."""
    parser = argparse.ArgumentParser(description="A round's cost outside training, by number of clients.")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, help="numbers of clients")
    parser.add_argument(
        "--cohorts", type=int, nargs="+", default=COHORTS, help="clients of a round; beyond the first only at both ends"
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/clients"), help="where the figures go")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="key=value, as for fedsim run")
    args = parser.parse_intermixed_args()
    if args.one:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints is no message
        one_case(args.overrides, args.one, turn_of(out))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    cases = []
    for cohort in args.cohorts:
        # Of further cohorts only the ends: 500 clients a round take minutes a case.
        numbers = args.clients if cohort == args.cohorts[0] else sorted({min(args.clients), max(args.clients)})
        with tempfile.TemporaryDirectory(dir=args.out, prefix=".work-") as folder:  # checkpoints go to that disk
            cases += measure(numbers, cohort, args.overrides, Path(folder).resolve())
    abouts = [{key: case.pop(key) for key in ("environment", "config")} for case in cases]
    about = abouts[0]
    del about["config"]["partition"]["num_clients"], about["config"]["cohort"]["size"]  # they stand with each case
    more = growth(cases)
    value = {**about, "warm_up": WARM_UP, "growth": more, "cases": cases}
    (args.out / "results.json").write_text(json.dumps(value, indent=2) + "\n")
    figure(args.out / "clients.png", cases)
    print(f"median of {len(cases[0]['rounds']) - WARM_UP} rounds; times in ms a round, peak resident memory in MB\n")
    print(table(cases) + "\n")
    for g in more:
        print(
            f"{g['cohort']} a round, from {g['from']:,} to {g['to']:,} clients: {g['outside_ms']:+.1f} ms a round outside "
            f"training (target below {TARGET_MS:+.0f}), {g['rounds_mb']:+.0f} MB after the last round and "
            f"{g['process_mb']:+.0f} MB in all (target below {TARGET_MB:+.0f}): {'met' if g['met'] else 'NOT met'}"
        )
    print(f"written: {args.out / 'results.json'}, {args.out / 'clients.png'}")
    return 0 if all(g["met"] for g in more) else 1


if __name__ == "__main__":
    sys.exit(main())
