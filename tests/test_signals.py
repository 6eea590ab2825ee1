"""Real processes that are told to end, or killed: what they say, what they leave behind, and how they go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from conftest import Lab
from kill_loop import EXECUTORS, Ending, Loop, differences, left_over
from tiers import fast_only

from fedsim.core.errors import Ended
from fedsim.runs.checkpoints import Checkpoints
from fedsim.runs.folder import Metrics, RunFolder
from fedsim.runs.signals import ended_by_signals

STOPPED = "; run the same command to resume"


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """One experiment of four rounds and three modes, run once undisturbed."""
    return Loop.make(tmp_path_factory.mktemp("loop"))


@pytest.mark.thorough
def test_a_run_killed_at_five_random_moments_ends_as_if_it_never_was(loop: Loop) -> None:
    """Serial and on workers, by time and right before system calls; `python tests/kill_loop.py` does it for hours."""
    rng, place = random.Random(7), loop.root / "killed"
    for i in range(5):
        ending = Ending("call", rng.randint(loop.calls // 20, loop.calls // 6))
        if i % 2:
            ending = Ending("time", rng.uniform(0, loop.seconds / 6))
        code, errors, _ = loop.start(place, ["serial", "pool 2"][i == 3], ending)
        assert code in (0, -signal.SIGKILL), errors
        assert "Traceback" not in errors
    code, errors, _ = loop.start(place, "serial", Ending("none"))
    assert code == 0, errors
    (run,) = (place / "results/killed").iterdir()
    assert differences(loop.whole, run) == []
    assert [f.name for f in run.rglob(".*")] == []


@fast_only(0)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_in_order(loop: Loop, number: signal.Signals) -> None:
    """Workers are gone, the status says stopped, one line says how to go on, and a second signal changes nothing."""
    place, executor = loop.root / f"told-{number.name}", "pool 2" if number == signal.SIGTERM else "serial"
    (place / "tmp").mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "fedsim",
        "run",
        str(loop.file),
        f"results={place / 'results'}",
        *EXECUTORS[executor],
    ]
    env = loop.environment(place)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=place)
    for line in process.stderr:
        if line.startswith("local     round 1/"):
            break
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors and out == ""
    last = errors.splitlines()[-1]
    assert last.startswith("fedsim: stopped after round ") and last.endswith(STOPPED)
    (run,) = (place / "results/killed").iterdir()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert left_over(place) == []
    assert [f.name for f in run.rglob(".*")] == [] and not (run / "checkpoints/start.bin").exists()
    if number == signal.SIGTERM:
        code, errors, _ = loop.start(place, "pool 3", Ending("none"))
        assert code == 0 and "resumed after round" in errors
        assert differences(loop.whole, run) == []


def test_a_second_process_is_refused_with_the_pid_of_the_first(loop: Loop) -> None:
    place = loop.root / "whole"
    (run,) = (place / "results/killed").iterdir()
    folder = RunFolder(run)
    folder.lock()
    try:
        code, errors, _ = loop.start(place, "serial", Ending("none"))
    finally:
        folder.close()
    assert code == 2
    assert errors.splitlines()[-1].endswith(f"is being run by process {os.getpid()}; wait for it, or stop it")


def test_handlers_are_what_they_were_afterwards() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(n) for n in numbers]
    with pytest.raises(Ended) as ended, ended_by_signals() as came:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143 and came == [signal.SIGTERM]
    assert [signal.getsignal(n) for n in numbers] == before


def test_a_signal_right_after_another_is_left_out() -> None:
    with ended_by_signals() as came:
        with pytest.raises(Ended):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert came == [signal.SIGINT] * 2


def test_what_is_ignored_stays_ignored() -> None:
    """`nohup fedsim run` goes on when the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals() as came:
            signal.raise_signal(signal.SIGHUP)
        assert came == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_a_thread_signals_are_left_alone() -> None:
    found: list[object] = []

    def body() -> None:
        with ended_by_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("name", ["save", "end", "log"])
def test_the_round_that_is_named_is_the_one_that_is_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner = Metrics if name == "log" else Checkpoints
    usual, calls = getattr(owner, name), []

    def stopped(self: Any, *args: Any, **keys: Any) -> Any:
        calls.append(name)
        done = usual(self, *args, **keys)
        if len(calls) == 2 or name == "end":  # right behind round 2's checkpoint file, or its end; or round 1's rows
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(owner, name, stopped)
    with pytest.raises(KeyboardInterrupt) as caught:
        lab.run(rounds=2)
    kept = {"save": 2, "end": 2, "log": 0}[name]
    said = f"after round {kept} (federated)" if kept else "before round 1"
    assert caught.value.__notes__ == [f"stopped {said}; run the same command to resume"]
    (folder,) = (lab.root / "results/lab").iterdir()
    assert len(list(folder.glob("checkpoints/federated/round-*/manifest.json"))) == kept
    monkeypatch.setattr(owner, name, usual)
    lab.same_bits(lab.run(rounds=2), lab.run(rounds=2, results=str(lab.root / "whole")))
