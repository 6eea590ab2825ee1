"""Stopped and gone on = never stopped: the same bits and the same metrics rows, wherever it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim.errors import UserError
from fedsim.progress import Progress
from fedsim.run_folder import RunFolder
from fedsim.training.trainer import Trainer

MODES = ["local", "federated", "central"]
LONG: dict[str, Any] = {
    "modes": MODES,
    "rounds": 4,
    "cohort": {"size": 2},
    "model": {"dtype": "float32"},
    "adapter": {"name": "lora", "r": 3, "dropout": 0.3},
    "local": {"steps": 2, "batch_size": 4, "schedule": "cosine"},
    "evaluate": {"every_steps": 3},
}


class Stopped(Exception):
    """Stands for the end of a process."""


def stop_after(monkeypatch: pytest.MonkeyPatch, mode: str, round: int) -> None:
    """The run stops right after this round of this mode is complete and checkpointed."""
    begin, state = Progress.begin, {"mode": ""}

    def note(self: Progress, mode: str, *rest: Any) -> None:
        state["mode"] = mode
        begin(self, mode, *rest)

    def stop(self: Progress, done: int, headline: str) -> None:
        if (state["mode"], done) == (mode, round):
            raise Stopped

    monkeypatch.setattr(Progress, "begin", note)
    monkeypatch.setattr(Progress, "round", stop)


@pytest.fixture
def whole(lab: Any) -> Callable[..., Path]:
    """The same experiment, never stopped."""
    return lambda **more: lab.run(**{**LONG, **more, "name": "whole"})


def test_a_run_stopped_in_every_mode_gives_the_same_bits(lab: Any, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = {**LONG, "name": "stopped"}
    for mode, round in (("local", 1), ("local", 3), ("federated", 2), ("central", 1), ("central", 4)):
        with monkeypatch.context() as patch:
            stop_after(patch, mode, round)
            with pytest.raises(Stopped):
                lab.run(**stopped)
    lab.same_bits(lab.run(**stopped), whole())


@pytest.mark.parametrize("every", [1, 3])
def test_rounds_since_the_last_checkpoint_are_done_again(
    lab: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Stopped while round 3 is written down: its rows are in the file already and may not stay there twice."""
    fed = {"modes": ["federated"], "checkpoint": {"every": every}}
    save = RunFolder.save_checkpoint

    def fail(self: RunFolder, mode: str, round: int, *rest: Any) -> None:
        if round == 3:
            self.sync_metrics()
            raise Stopped
        save(self, mode, round, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", fail)
        with pytest.raises(Stopped):
            lab.run(**{**LONG, **fed, "name": "stopped"})
    lab.same_bits(lab.run(**{**LONG, **fed, "name": "stopped"}), whole(**fed))


def test_a_run_killed_amid_its_rows_gives_the_same_bits(lab: Any, whole: Any) -> None:
    """SIGKILL in a process of its own, when half of the rows of federated round 2 are in the file."""
    script = (
        "import os, signal, fedsim, fedsim.run_folder as rf\n"
        "log = rf.RunFolder.log\n"
        "def killed(self, rows, seconds):\n"
        "    rows = list(rows)\n"
        "    here = [r for r in rows if (r.round, r.scope) == (2, 'federated')]\n"
        "    log(self, rows[: len(rows) // 2] if here else rows, seconds)\n"
        "    if here:\n"
        '        self._metrics.write(b\'{"round": 2, "st\')\n'
        "        self.sync_metrics()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "rf.RunFolder.log = killed\n"
        f"fedsim.run({lab.tree(**{**LONG, 'name': 'killed'})!r}, progress=False)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(fedsim.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=lab.root)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (folder,) = (lab.root / "results" / "killed").iterdir()
    assert json.loads((folder / "status.json").read_text())["state"] == "running"
    assert lab.run(**{**LONG, "name": "killed"}) == folder
    lab.same_bits(folder, whole())


@pytest.mark.parametrize("damage", ["cut", "changed", "half a JSON file"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    lab: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    mode = "federated"
    fed = {"modes": [mode]}
    with monkeypatch.context() as patch:
        stop_after(patch, mode, 3)
        with pytest.raises(Stopped):
            lab.run(**{**LONG, **fed, "name": "stopped"})
    (folder,) = (lab.root / "results" / "stopped").iterdir()
    newest = folder / "checkpoints" / mode / "round-00003.safetensors"
    data = newest.read_bytes()
    if damage == "cut":
        newest.write_bytes(data[:-8])
    elif damage == "changed":
        newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        newest.with_suffix(".json").write_bytes(newest.with_suffix(".json").read_bytes()[:30])
    resumed, batches = set(), Trainer._batches

    def note(self: Trainer, task: Any) -> Any:
        resumed.add(task.round)
        return batches(self, task)

    monkeypatch.setattr(Trainer, "_batches", note)
    lab.run(**{**LONG, **fed, "name": "stopped"})
    assert resumed == {3, 4}
    lab.same_bits(folder, whole(**fed))


def test_a_finished_run_is_left_as_it_is(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {**LONG, "rounds": 1, "modes": ["federated"]}
    folder = lab.run(**short)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    def never(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "train", never)
    monkeypatch.setattr(Trainer, "score", never)
    assert lab.run(**short) == folder
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before


def test_another_number_of_rounds_is_refused(lab: Any) -> None:
    short = {**LONG, "rounds": 1, "modes": ["federated"]}
    lab.run(**short)
    with pytest.raises(UserError, match=r"^rounds: 2, but .* was started with 1; "):
        lab.run(**{**short, "rounds": 2})


def test_threads_are_those_of_the_first_start(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = {**LONG, "modes": ["federated"], "rounds": 2}
    with monkeypatch.context() as patch:
        stop_after(patch, "federated", 1)
        with pytest.raises(Stopped):
            lab.run(**fed)
    with pytest.raises(UserError, match=r"^executor\.threads: 2, but .* has 1: "):
        lab.run(**{**fed, "executor": {"name": "serial", "threads": 2}})
    folder = lab.run(**{**fed, "executor": {"name": "serial"}})
    assert json.loads((folder / "environment.json").read_text())["threads"] == 1


def test_another_seed_or_model_is_another_run(lab: Any) -> None:
    short = {**LONG, "rounds": 1, "modes": ["federated"]}
    folders = {
        lab.run(**short),
        lab.run(**short, seed=4),
        lab.run(**{**short, "model": {"path": lab.base("gpt2")}}),
        lab.run(**{**short, "local": {**LONG["local"], "lr": 1e-4}}),
    }
    assert len(folders) == 4
