"""What a round of users' scripts costs beside training, and what a client holds in memory.

    python experiments/benchmarks/scripts/run.py [--rounds 200] [--out FOLDER]

Scripts add 1 to a 3 x 3 array. Time is the median of rounds on the clock, with metrics, and with a checkpoint synced to the disk after each round or only after the last; memory is
the worker's resident memory with 108 clients less that with 8, a client.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import fedsim
from fedsim.core.types import RoundEnd
from fedsim.runs.environment import environment

HERE = Path(__file__).resolve().parent
TARGET_MS, TARGET_MB = 10.0, 1.0


def worker_mb() -> float:
    """Resident memory of this process's worker, in MB."""
    found = 0.0
    for task in Path("/proc/self/task").glob("*/children"):
        for child in task.read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                status = Path(f"/proc/{child}/status").read_text().splitlines()
                found = max(found, *(int(line.split()[1]) / 1e3 for line in status if line.startswith("VmRSS")))
    return found


def case(folder: str, clients: int, rounds: int, every: int) -> tuple[list[float], float]:
    """Seconds of each round, and the worker's memory after the last."""
    ends, held = [], [0.0]

    def told(end: RoundEnd) -> None:
        ends.append(time.perf_counter())
        if end.round == rounds:
            held[0] = worker_mb()

    tree = {
        "name": f"of-{clients}-{every}",
        "rounds": rounds,
        "clients": clients,
        "checkpoint": {"every": every},
        "client": {"script": str(HERE / "plus_one.py"), "init": f"{folder}/start.npz"},
        "results": folder,
    }
    fedsim.run(tree, progress=False, callback=told)
    return [b - a for a, b in itertools.pairwise(ends[4:])], held[0]


def main() -> int:
    """The command; exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/scripts"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/start.npz", w=np.zeros((3, 3), np.float32))
        few, small = case(folder, 8, asked.rounds, asked.rounds)
        each, _ = case(folder, 8, asked.rounds, 1)
        _, large = case(folder, 108, 10, 10)
    value = {
        "rounds": asked.rounds,
        "ms_a_round": round(1e3 * statistics.median(few), 2),
        "ms_a_round_with_checkpoint": round(1e3 * statistics.median(each), 2),
        "mb_a_client": round((large - small) / 100, 3),
        "environment": environment(["cpu"], 1),
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(json.dumps(value, indent=2) + "\n")
    print({k: v for k, v in value.items() if k != "environment"})
    return int(value["ms_a_round"] > TARGET_MS or value["mb_a_client"] > TARGET_MB)


if __name__ == "__main__":
    raise SystemExit(main())
