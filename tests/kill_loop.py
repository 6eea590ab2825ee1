"""Kill real runs at random moments, start them again, and compare what comes out bit for bit.

    python tests/kill_loop.py --n 50 --seed 0 --log results/kill_loop/log.txt

One small experiment - three modes, sampled cohorts, kept optimizer states, error feedback - runs once undisturbed. Then,
`n` times, the same command starts in a folder of its own and is killed: after a random time, or right before a random
system call on a file (open, rename, remove, write, fsync, truncate), by SIGKILL, sometimes by SIGTERM or SIGINT, sometimes in
one of its workers or with all of them at once; a trial holds one to three such ends, on any number of workers. What is finished at last must have every
safetensors file, metrics row (less what is measured), score and prediction of the undisturbed run, and leave no process, no
shared memory and no temporary file behind. A line a trial; exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
TOKEN = "FEDSIM_KILL_LOOP"
EXECUTORS = {
    "serial": ["executor={name: serial, device: cpu, threads: 1}"],
    **{f"pool {n}": [f"executor={{name: pool, devices: [cpu], workers: {n}, threads: 1}}"] for n in (1, 2, 3)},
}
EXPERIMENT: dict[str, Any] = {
    "name": "killed",
    "modes": ["local", "federated", "central"],
    "rounds": 4,
    "cohort": {"size": 2},
    "model": {"dtype": "float32"},
    "adapter": {"name": "lora", "r": 3, "dropout": 0.3},
    "partition": {"name": "iid", "num_clients": 4},
    "local": {"steps": 2, "batch_size": 4, "schedule": "cosine", "keep_state": True},
    "messages": {"up": "blockwise8", "error_feedback": True},
    "evaluate": {"every_steps": 3},
    "training": {"lanes": 1},
    "checkpoint": {"keep": 1},
}
# Run as a child: counts system calls on files, and ends itself right before the one that is asked for.
CHILD = """
import os, signal, sys
at, said, argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
count = 0
def step():
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
for name in ("fsync", "pwrite"):
    def counted(*args, _call=getattr(os, name), **keys):
        step()
        return _call(*args, **keys)
    setattr(os, name, counted)
names = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir", "shutil.rmtree")
def hook(event, args):
    if event in names and "results" in str(args[0]):
        step()
import fedsim.cli.main
sys.addaudithook(hook)
code = fedsim.cli.main.main(argv)
if said != "-":
    with open(said, "w") as file:
        file.write(str(count))
sys.exit(code)
"""


@dataclass
class Ending:
    """How a start of the run is to end.

    Attributes:
        kind: time | group (likewise, with all its workers at once) | call | worker | none (it may go on to its end).
        at: seconds after the run folder is there, or number of the system call.
        number: the signal.
    """

    kind: str
    at: float = 0.0
    number: int = signal.SIGKILL


@dataclass
class Loop:
    """The laboratory of the trials.

    Attributes:
        root: a folder of its own; everything that is written lies in it.
        file: the experiment's YAML file.
        whole: the run that nothing disturbed.
        calls: its system calls on files.
        seconds: from the first sign of the run folder to the end.
    """

    root: Path
    file: Path
    whole: Path
    calls: int
    seconds: float
    starts: int = field(default=0)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    def make(cls, root: Path, algorithm: dict[str, Any] | None = None) -> Loop:
        """Write base, data and experiment, and run it undisturbed."""
        sys.path.insert(0, str(HERE))
        from conftest import Lab, make_rows

        (root / "shared").mkdir(parents=True)
        lab = Lab(root, root / "shared", make_rows(root / "shared"))
        file = root / "experiment.yaml"
        tree = lab.tree(**EXPERIMENT, algorithm=algorithm or {"name": "fedavg"})
        tree.pop("results")
        file.write_text(yaml.safe_dump(tree))
        loop = cls(root, file, Path(), 0, 60.0)
        place = root / "whole"
        done = loop.start(place, "serial", Ending("none"), said=root / "calls")
        assert done[0] == 0, f"the undisturbed run failed:\n{done[1]}"
        (loop.whole,) = (place / "results/killed").iterdir()
        loop.calls, loop.seconds = int((root / "calls").read_text()), done[2]
        return loop

    def start(self, place: Path, executor: str, ending: Ending, said: Path | None = None) -> tuple[int, str, float]:
        """Start the command once in `place`: (exit code, standard error, seconds since its folder was there)."""
        (place / "tmp").mkdir(parents=True, exist_ok=True)
        self.starts += 1
        env = self.environment(place)
        argv = ["run", str(self.file), f"results={place / 'results'}", *EXECUTORS[executor]]
        command = [sys.executable, "-m", "fedsim", *argv]
        if ending.kind == "call" or said is not None:
            at = int(ending.at) if ending.kind == "call" else -1
            command = [sys.executable, "-c", CHILD, str(at), str(said or "-"), *argv]
        before = _stamps(place)
        with open(place / "tmp.err", "w+") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, env=env, cwd=place, start_new_session=True
            )
            self.running.append(process)
            while process.poll() is None and _stamps(place) == before:
                time.sleep(0.01)
            began = time.monotonic()
            if ending.kind in ("time", "group", "worker"):
                try:
                    process.wait(ending.at)
                except subprocess.TimeoutExpired:
                    targets = [process.pid]
                    if ending.kind == "worker":
                        targets = _children(process.pid) or targets
                    kill = os.killpg if ending.kind == "group" else os.kill
                    with contextlib.suppress(ProcessLookupError):
                        kill(targets[-1], ending.number)
            process.wait(900)
            took = time.monotonic() - began
            errors.seek(0)
            return process.returncode, errors.read(), took

    @staticmethod
    def environment(place: Path) -> dict[str, str]:
        """Of a start in `place`: what it leaves behind can be told from other processes' doing."""
        path = f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # Set by whoever imported torch's compiler: the start would not make the folder that it might leave.
        env.pop("TORCHINDUCTOR_CACHE_DIR", None)
        return env | {"TMPDIR": str(place / "tmp"), TOKEN: str(place)}

    def trial(self, number: int, rng: random.Random, executors: list[str], most: int = 3) -> tuple[str, bool]:
        """One folder, killed one to `most` times and then left alone: what to say of it, and whether all is as it should be."""
        place = self.root / f"trial-{number}"
        told, wrong = [], []
        endings = [self._ending(rng) for _ in range(rng.randint(1, most))] + [Ending("none")] * 4
        for ending in endings:
            executor = rng.choice(executors)
            code, errors, _ = self.start(place, executor, ending)
            said = "time" if ending.kind == "none" else f"{ending.kind} {ending.at:.4g}"
            name = signal.Signals(ending.number).name
            told.append(
                f"{executor}: {'left alone' if ending.kind == 'none' else f'{name} at {said}'} -> {code} {_where(place)}"
            )
            if "Traceback" in errors and "worker process died" not in errors:
                wrong.append(f"traceback: {errors.strip().splitlines()[-1]}")
            expected = {0, -ending.number, 128 + ending.number} | ({1} if ending.kind == "worker" else set())
            if code not in expected:
                wrong.append(f"exit code {code}: {errors.strip().splitlines()[-1:]}")
            wrong += left_over(place)
            if code == 0:
                break
        runs = sorted((place / "results/killed").glob("*"))
        if len(runs) != 1:
            wrong.append(f"{len(runs)} run folders")
        else:
            wrong += differences(self.whole, runs[0]) + _left_files(place, runs[0])
        shutil.rmtree(place)
        return f"{number:4d}  {'; '.join(told)}  {'ok' if not wrong else 'WRONG: ' + ' | '.join(wrong)}", not wrong

    def _ending(self, rng: random.Random) -> Ending:
        if rng.random() < 0.5:
            return Ending("call", rng.randint(1, self.calls))
        if rng.random() < 0.2:
            return Ending("worker", rng.uniform(0, self.seconds))
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        kind = rng.choice(["time", "group"]) if number == signal.SIGKILL else "time"
        return Ending(kind, rng.uniform(0, self.seconds), number)


def differences(whole: Path, run: Path) -> list[str]:
    """What of a run is not what it is in the one that nothing disturbed."""
    out = []
    names = [{str(f.relative_to(r)) for f in r.rglob("*.safetensors")} for r in (whole, run)]
    if names[0] != names[1]:
        out.append(f"other safetensors files: {sorted(names[0] ^ names[1])}")
    exact = ("predictions.csv", "scores.npz", "comparison.json", "partition.npz")
    for name in (*sorted(names[0] & names[1]), *exact):
        found = [(r / name).read_bytes() if (r / name).is_file() else b"" for r in (whole, run)]
        if found[0] != found[1]:
            out.append(f"{name} differs")
    rows = [_rows(r) for r in (whole, run)]
    if rows[0] != rows[1]:
        first = next((i for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), min(map(len, rows)))
        out.append(f"metrics rows differ from row {first + 1} on ({len(rows[0])} and {len(rows[1])} rows)")
    return out


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for file in sorted(run.glob("metrics/*.jsonl")) for line in file.read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return [{**row, "value": 0.0} if row["name"] == "checkpoint_seconds" else row for row in rows]


def _stamps(place: Path) -> list[int]:
    """Changes when a start of the run has come to its folder."""
    return sorted(f.stat().st_mtime_ns for f in place.glob("results/killed/*/config.yaml"))


def _where(place: Path) -> str:
    """Where the run is, by its status and the length of its metrics."""
    for run in (place / "results/killed").glob("*"):
        try:
            state = json.loads((run / "status.json").read_text())["state"]
        except (OSError, ValueError, KeyError):
            state = "no status"
        return f"({state}, {sum(f.stat().st_size for f in run.glob('metrics/*.jsonl'))} bytes of metrics)"
    return "(no folder yet)"


def _processes(place: Path) -> list[int]:
    """Processes that were started for a trial, whoever their parent is now."""
    wanted = f"{TOKEN}={place}".encode()
    out = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                out.append(int(entry.name))
        except OSError:
            pass
    return out


def _children(pid: int) -> list[int]:
    out = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            out += [int(c) for c in task.read_text().split()]
    return [c for c in out if b"spawn_main" in _command(c)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


_BEFORE = set(Path("/dev/shm").glob("torch_*"))  # of others, and none of the loop's business


def left_over(place: Path) -> list[str]:
    """Processes, shared memory and temporary files that outlive a start; processes have a minute to go: one that still loads
    its libraries ends when it has."""
    until = time.monotonic() + 60
    while (alive := _processes(place)) and time.monotonic() < until:
        time.sleep(0.1)
    out = [f"process left: {_command(pid)[:200]!r}" for pid in alive]
    shared = [
        f.name
        for f in {*Path("/dev/shm").glob("torch_*")} - _BEFORE
        if not Path(f"/proc/{f.name.split('_')[1]}").exists()
    ]
    out += [f"shared memory left: {name}" for name in shared]
    kinds = ("pymp-", "torchinductor")
    return out + [f"temporary file left: {f.name}" for f in (place / "tmp").iterdir() if f.name.startswith(kinds)]


def _left_files(place: Path, run: Path) -> list[str]:
    """What a finished run has no use for."""
    out = [str(f.relative_to(run)) for f in run.rglob(".*")]
    out += [str(f.relative_to(run)) for f in run.rglob("*") if f.name in ("start.bin", "rows.jsonl")]
    return [f"file left: {name}" for name in (*out, *(f.name for f in (place / "tmp").iterdir()))]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50, help="trials")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", default="random", help="serial, 1, 2, 3, or random on every start")
    parser.add_argument("--algorithm", default="{name: fedavg}", help="the config section, as YAML")
    parser.add_argument("--log", type=Path, help="file for the lines, besides standard output")
    asked = parser.parse_args()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it that starts this in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    named = {"serial": ["serial"], **{str(n): [f"pool {n}"] for n in (1, 2, 3)}}
    executors = named.get(asked.workers, list(EXECUTORS))
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if asked.log is not None:
            asked.log.parent.mkdir(parents=True, exist_ok=True)
            asked.log.write_text("\n".join(lines) + "\n")

    sys.path.insert(0, str(HERE.parent))
    from fedsim.runs.signals import ended_by_signals

    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="kill-loop-") as folder, contextlib.ExitStack() as last:
        loop = Loop.make(Path(folder), yaml.safe_load(asked.algorithm))
        last.callback(lambda: [process.kill() for process in loop.running])
        say(f"python tests/kill_loop.py --n {asked.n} --seed {asked.seed} --workers {asked.workers}")
        say(f"undisturbed: {len(_rows(loop.whole))} metrics rows, {loop.calls} system calls on files")
        good = 0
        for number in range(1, asked.n + 1):
            line, right = loop.trial(number, random.Random(f"{asked.seed}/{number}"), executors)
            say(line)
            good += right
        say(f"{good} of {asked.n} trials as if never disturbed, {loop.starts} starts")
    return 0 if good == asked.n else 1


if __name__ == "__main__":
    sys.exit(main())
