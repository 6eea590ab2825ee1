"""Stopped and gone on = never stopped: the same bits and the same metrics rows, wherever it stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics_lines
from tiers import fast_only

import fedsim
from fedsim.core.errors import UserError
from fedsim.runs.checkpoints import Checkpoints
from fedsim.runs.folder import Metrics, RunFolder
from fedsim.runs.progress import Progress
from fedsim.runs.trackers import Trackers
from fedsim.training.worker import Worker

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


@fast_only(1)
@pytest.mark.parametrize("every", [1, 3])
def test_rounds_since_the_last_checkpoint_are_done_again(
    lab: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Stopped while round 3 is written down: its rows are in the file already and may not stay there twice."""
    fed = {"modes": ["federated"], "checkpoint": {"every": every}}
    save = Checkpoints.save

    def fail(self: Checkpoints, state: Any, tensors: Any, metrics: Metrics, **more: Any) -> Any:
        if state.round == 3:
            metrics.mark()
            raise Stopped
        return save(self, state, tensors, metrics, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", fail)
        with pytest.raises(Stopped):
            lab.run(**{**LONG, **fed, "name": "stopped"})
    lab.same_bits(lab.run(**{**LONG, **fed, "name": "stopped"}), whole(**fed))


def test_a_run_killed_amid_its_rows_gives_the_same_bits(lab: Any, whole: Any) -> None:
    """SIGKILL in a process of its own, when half of the rows of federated round 2 are in the file."""
    script = (
        "import os, signal, fedsim, fedsim.runs.folder as rf\n"
        "log = rf.Metrics.log\n"
        "def killed(self, rows, seconds):\n"
        "    rows = list(rows)\n"
        "    here = [r for r in rows if (r.round, r.scope) == (2, 'federated')]\n"
        "    log(self, rows[: len(rows) // 2] if here else rows, seconds)\n"
        "    if here:\n"
        '        self._out.write(b\'{"round": 2, "st\')\n'
        "        self.mark()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "rf.Metrics.log = killed\n"
        f"fedsim.run({lab.tree(**{**LONG, 'name': 'killed'})!r}, progress=False)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(fedsim.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=lab.root)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (folder,) = (lab.root / "results" / "killed").iterdir()
    assert json.loads((folder / "status.json").read_text())["state"] == "running"
    assert lab.run(**{**LONG, "name": "killed"}) == folder
    lab.same_bits(folder, whole())


@fast_only(1)
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
    newest = folder / "checkpoints" / mode / "round-00003" / "tensors.safetensors"
    data = newest.read_bytes()
    if damage == "cut":
        newest.write_bytes(data[:-8])
    elif damage == "changed":
        newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        manifest = newest.with_name("manifest.json")
        manifest.write_bytes(manifest.read_bytes()[:30])
    resumed, batches = set(), Worker._batches

    def note(self: Worker, task: Any, *more: Any) -> Any:
        resumed.add(task.round)
        return batches(self, task, *more)

    monkeypatch.setattr(Worker, "_batches", note)
    lab.run(**{**LONG, **fed, "name": "stopped"})
    assert resumed == {3, 4}
    lab.same_bits(folder, whole(**fed))


def test_a_finished_run_is_left_as_it_is(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {**LONG, "rounds": 1, "modes": ["federated"]}
    folder = lab.run(**short)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    def never(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Worker, "train", never)
    monkeypatch.setattr(Worker, "score", never)
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


# ------------------------------------------------------------------------------------------- damage


def stopped_run(lab: Any, monkeypatch: pytest.MonkeyPatch, mode: str, round: int, **keys: Any) -> Path:
    with monkeypatch.context() as patch:
        stop_after(patch, mode, round)
        with pytest.raises(Stopped):
            lab.run(**keys)
    (folder,) = (lab.root / "results" / keys["name"]).iterdir()
    return folder


def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the user is told, from now on."""
    said: list[str] = []
    for kind in ("note", "warn"):
        monkeypatch.setattr(Progress, kind, lambda self, text: said.append(text))
    return said


def change(file: Path, *places: int) -> None:
    """Another byte at each of these places; from the end where they are negative."""
    data = bytearray(file.read_bytes())
    for at in places:
        data[at] ^= 1
    file.write_bytes(bytes(data))


def digit(file: Path, before: bytes) -> None:
    """Another digit behind this text: JSON that can be read, and says something else."""
    data = file.read_bytes()
    at = data.index(before) + len(before)
    other = b"1" if data[at : at + 1] != b"1" else b"2"
    file.write_bytes(data[:at] + other + data[at + 1 :])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def put(file: Path, **values: Any) -> None:
    """Other values in a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


CENTRAL = "checkpoints/central/round-00002/manifest.json"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "records": (lambda r: change(r / "checkpoints/central.bin", -5), "records of client state"),
    "records are gone": (lambda r: (r / "checkpoints/central.bin").unlink(), "records of client state"),
    "records end early": (lambda r: cut(r / "checkpoints/central.bin"), "records of client state"),
    "best model": (
        lambda r: change(r / "checkpoints/best-central.bin", *range(0, 9000, 64)),
        "records of client state",
    ),
    "a digit of a checkpoint": (lambda r: digit(r / CENTRAL, b'"steps": [[-1], ['), "round 2 is not used: damaged"),
    "the last metrics": (lambda r: change(r / "metrics/central.jsonl", -30), "metrics/central.jsonl is damaged"),
    "the first metrics": (lambda r: digit(r / "metrics/local.jsonl", b'"value": '), "metrics/local.jsonl is damaged"),
    "no metrics": (lambda r: (r / "metrics/local.jsonl").unlink(), "local: metrics/local.jsonl is damaged or missing"),
    "a torn line": (lambda r: (r / "metrics/central.jsonl").open("a").write('{"round": 3, "st'), "last line was torn"),
    "an export": (
        lambda r: change(r / "global/adapter_model.safetensors", -1),
        "federated: damaged or missing: global/adapter_model.safetensors; its end is done again",
    ),
    "an export is gone": (lambda r: shutil.rmtree(r / "local/site-2"), "local: damaged or missing: local/site-2/"),
    "scores by row": (
        lambda r: cut(r / "checkpoints/local/by_row.npz"),
        "local: damaged or missing: checkpoints/local",
    ),
    "the end of a mode": (lambda r: digit(r / "checkpoints/local/done.json", b'"models": '), "done.json is damaged"),
    "the plan": (lambda r: digit(r / "plan.json", b'"lanes": '), ""),
    "no plan": (lambda r: (r / "plan.json").unlink(), ""),
    "the record": (lambda r: cut(r / "checkpoints/run.json"), ""),
    "the status": (lambda r: cut(r / "status.json"), "status.json: damaged"),
    "another number of rounds": (lambda r: digit(r / "status.json", b'"rounds": '), "the run was started with 3"),
    "a status of text": (lambda r: put(r / "status.json", seconds="x"), ""),
    "an environment of numbers": (lambda r: put(r / "environment.json", devices=3, versions=[1]), "is unknown"),
    "the start": (lambda r: change(r / "init/adapter_model.safetensors", -1), ""),
    "all else": (
        lambda r: [cut(r / n) for n in ("partition.npz", "environment.json", "config.yaml", "model.json")],
        "",
    ),
}


@pytest.fixture(scope="module")
def damaged_from(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"root": tmp_path_factory.mktemp("damaged")}


@fast_only(0, 4, 5, 8, 9, 12, 13, 21)
@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_found_and_made_again(
    lab: Any, damaged_from: dict[str, Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Stopped in central round 2, the other modes at their ends; then one file is no longer what it was."""
    keys = {**LONG, "rounds": 3, "partition": {"name": "iid", "num_clients": 3}}
    lab.root = damaged_from["root"]
    if "whole" not in damaged_from:
        damaged_from["whole"] = lab.run(**{**keys, "name": "whole"})
        damaged_from["stopped"] = stopped_run(lab, monkeypatch, "central", 2, **{**keys, "name": "stopped"})
        shutil.copytree(damaged_from["stopped"], lab.root / "kept")
    run = damaged_from["stopped"]
    shutil.rmtree(run)
    shutil.copytree(lab.root / "kept", run)
    damage, line = DAMAGE[what]
    damage(run)
    said = notes(monkeypatch)
    assert lab.run(**{**keys, "name": "stopped"}) == run
    assert any(line in text for text in said), said
    lab.same_bits(run, damaged_from["whole"])
    assert not [f for f in run.rglob("*") if f.name in ("rows.jsonl", "start.bin") or f.name.startswith(".")]


@pytest.mark.parametrize("asked", [False, True], ids=["run", "--resume"])
def test_a_finished_run_that_is_damaged_is_named_and_left_as_it_is(
    lab: Any, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Missing, or of the same size and one digit or one bit from what it was."""
    keys = {**LONG, "rounds": 2, "modes": ["federated"]}
    run = lab.run(**keys)
    (run / "best/adapter_model.safetensors").unlink()
    digit(run / "metrics/federated.jsonl", b'"value": ')
    change(run / "global/adapter_model.safetensors", -2)
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    said = notes(monkeypatch)
    assert fedsim.run(lab.exp(**keys), resume=run if asked else None).path == run
    (line,) = [text for text in said if "finished, but damaged or missing since: " in text]
    names = {"metrics/federated.jsonl", "global/adapter_model.safetensors", "best/adapter_model.safetensors"}
    assert set(line.partition("since: ")[2].partition(";")[0].split(", ")) == names
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_a_damaged_checkpoint_of_a_finished_run_is_not_resumed_by_more_rounds(lab: Any) -> None:
    keys = {**LONG, "modes": ["federated"], "local": {**LONG["local"], "schedule": "constant"}}
    run = lab.run(**{**keys, "name": "raised", "rounds": 2})
    cut(run / "checkpoints/federated/round-00002/tensors.safetensors")
    fedsim.run(lab.exp(**{**keys, "name": "raised", "rounds": 3}), progress=False, resume=run)
    lab.same_bits(run, lab.run(**{**keys, "name": "whole", "rounds": 3}))


def test_a_run_of_the_first_layout_is_read_and_not_resumed(lab: Any) -> None:
    """One metrics file, as the committed reference runs have it."""
    keys = {**LONG, "modes": ["federated"], "rounds": 1}
    run = lab.run(**keys)
    (run / "metrics/federated.jsonl").rename(run / "metrics.jsonl")
    shutil.rmtree(run / "metrics")
    shutil.rmtree(run / "checkpoints")
    assert len(fedsim.load_runs(run)) and lab.run(**keys) == run, "finished, and taken as it is"
    put(run / "status.json", state="stopped")
    with pytest.raises(
        UserError, match=r"written by an earlier version of fedsim: it can be read, not resumed; use"
    ) as e:
        lab.run(**keys)
    assert "\n" not in str(e.value)


@fast_only(1)
@pytest.mark.parametrize("damage", ["none", "digit", "name", "gone"])
def test_a_resumed_run_is_told_by_its_id_whatever_its_config_says(
    lab: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    keys = {**LONG, "rounds": 3, "modes": ["federated"]}
    run = stopped_run(lab, monkeypatch, "federated", 2, **{**keys, "name": "stopped"})
    config = run / "config.yaml"
    text = config.read_text()
    other = {
        "none": text,
        "digit": text.replace("batch_size: 4", "batch_size: 5"),
        "name": text.replace("name: stopped", "name: [1]"),
    }
    config.unlink() if damage == "gone" else config.write_text(other[damage])
    assert damage in ("none", "gone") or config.read_text() != text
    assert fedsim.run(lab.exp(**keys, name="stopped"), progress=False, resume=run).path == run
    lab.same_bits(run, whole(rounds=3, modes=["federated"]))
    with pytest.raises(UserError, match="cannot go on with other numbers: seed: 77"):
        fedsim.run(lab.exp(**keys, seed=77), progress=False, resume=run)
    config.write_text("name: [1]\n")
    with pytest.raises(UserError, match=r"config\.yaml does not tell what the run was \(.*name.*; put the file back"):
        fedsim.run(lab.exp(**keys, seed=77), progress=False, resume=run)


# ------------------------------------------------------------------------------------------- what it costs


def test_rows_of_what_checkpoints_took_are_there_once(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped_run(lab, monkeypatch, "local", 3, **{**LONG, "name": "stopped"})
    for mode, round in (("federated", 4), ("central", 2)):
        stopped_run(lab, monkeypatch, mode, round, **{**LONG, "name": "stopped"})
    lab.run(**{**LONG, "name": "stopped"})
    found: dict[str, list[Any]] = {}
    for folder in (run, lab.run(**{**LONG, "name": "whole"})):
        rows = [json.loads(line) for line in metrics_lines(folder)]
        took = [r for r in rows if r["split"] == "run"]
        assert sorted({(r["scope"], r["round"]) for r in took}) == sorted((m, n) for m in MODES for n in range(1, 5))
        assert len(took) == 2 * 3 * 4 and all(r["value"] > 0 and r["client"] is None for r in took)
        found[folder.parent.name] = [r["value"] for r in took if r["name"] == "checkpoint_bytes"]
    assert found["stopped"] == found["whole"]
    assert fedsim.diff_runs(run, folder).agree


@fast_only(1)
@pytest.mark.parametrize("damaged", [False, True])
def test_trackers_get_every_committed_row_once(lab: Any, monkeypatch: pytest.MonkeyPatch, damaged: bool) -> None:
    """A round that was dropped reaches no tracker; what was committed right before the end reaches it at the next start.
    Where the note on what they were told is damaged, they are told all of it again."""
    told: list[Any] = []
    starts: list[Any] = []
    damaged_now = False

    class Told(Trackers):
        def __init__(self, *args: Any) -> None:
            self.state = {"name": "kept"} if args[4] is None else args[4]
            assert args[4] == (None if not starts or damaged_now else {"name": "kept"})
            starts.append(args)

        def log_figures(self, folder: Path, round: int) -> None:
            pass

        def __bool__(self) -> bool:
            return True

        def log(self, rows: Any) -> None:
            told.extend(rows)

        def close(self) -> None:
            pass

    monkeypatch.setattr("fedsim.runs.tracking.Trackers", Told)
    save, log = Checkpoints.save, Told.log

    def before(self: Checkpoints, state: Any, *rest: Any, **more: Any) -> Any:
        if (self.mode, state.round) == ("federated", 3):
            raise Stopped
        return save(self, state, *rest, **more)

    def after(self: Told, rows: Any) -> None:
        if any((r["scope"], r["round"]) == ("central", 2) for r in rows):
            raise Stopped
        log(self, rows)

    for name, patched in (("runs.checkpoints.Checkpoints.save", before), ("", after)):
        with monkeypatch.context() as patch:
            patch.setattr(f"fedsim.{name}", patched) if name else patch.setattr(Told, "log", patched)
            with pytest.raises(Stopped):
                lab.run(**LONG)
    (run,) = (lab.root / "results" / "lab").iterdir()
    if damaged:
        digit(run / "checkpoints/tracked.json", b'"local": ')
        told.clear()
        damaged_now = True
    assert lab.run(**LONG) == run
    rows = [json.loads(line) for line in metrics_lines(run)]
    assert told == rows


# ------------------------------------------------------------------------------------------- --resume


GROWS = {
    "constant": {},
    "every second round is scored": {"evaluate": {"every_rounds": 2}},
    "a horizon": {"local": {**LONG["local"], "horizon": 12}},
    "a cosine each round": {"local": {**LONG["local"], "schedule_over": "round"}},
}


@fast_only(1, 2)
@pytest.mark.parametrize("how", GROWS)
def test_rounds_that_are_raised_give_the_run_of_so_many(lab: Any, how: str) -> None:
    keys = {**LONG, "local": {**LONG["local"], "schedule": "constant"}, **GROWS[how]}
    run = lab.run(**{**keys, "name": "raised", "rounds": 3})
    more = lab.exp(**{**keys, "name": "raised", "rounds": 5})
    assert fedsim.run(more, progress=False, resume=run.name).path == run
    assert json.loads((run / "status.json").read_text())["rounds"] == 5
    whole = lab.run(**{**keys, "name": "whole", "rounds": 5})
    found = [sorted(lab.metrics(r), key=repr) for r in (run, whole)]  # a site's first row may come later
    assert found[0] == found[1]
    assert (run / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    assert fedsim.run(more, progress=False).path == run, "the same rounds need no option"
    a, b = lab.tensors(run), lab.tensors(whole)
    assert a.keys() == b.keys()
    assert all(torch.equal(t, b[f][n]) for f in a for n, t in a[f].items())


def test_rounds_that_learning_rates_hang_on_cannot_be_raised(lab: Any) -> None:
    keys = {**LONG, "modes": ["federated"], "rounds": 2}
    run = lab.run(**keys)
    for rounds, why in ((3, "learning rates reach"), (1, "can be raised, not lowered")):
        with pytest.raises(UserError, match=rf"^rounds: {rounds}, but .* was started with 2.*{why}"):
            fedsim.run(lab.exp(**{**keys, "rounds": rounds}), progress=False, resume=run)


def test_keys_that_change_the_numbers_are_named(lab: Any) -> None:
    keys = {**LONG, "modes": ["federated"], "rounds": 1}
    run = lab.run(**keys)
    other = {**keys, "seed": 4, "local": {**LONG["local"], "lr": 1e-4}, "adapter": {"name": "ia3"}}
    with pytest.raises(UserError) as error:
        fedsim.run(lab.exp(**other), progress=False, resume=run)
    text = str(error.value)
    assert "seed: 4 (the run has 3)" in text and "local.lr: 0.0001 (the run has 0.005)" in text
    assert 'adapter.name: "ia3" (the run has "lora")' in text and "\n" not in text
    with pytest.raises(UserError, match="other content of data or model files"):
        fedsim.run(
            lab.exp(**{**keys, "model": {"path": lab.base("gpt2"), "dtype": "float32"}}), progress=False, resume=run
        )
    with pytest.raises(UserError, match="neither a run's folder nor the id of a run"):
        fedsim.run(lab.exp(**keys), progress=False, resume="0123456789ab")
    free = {"name": "other", "checkpoint": {"keep": 1}, "executor": {"name": "serial"}, "aggregation": {"chunk_mb": 1}}
    assert fedsim.run(lab.exp(**{**keys, **free}), progress=False, resume=run).path == run


def test_a_resume_elsewhere_says_that_bits_may_differ(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**LONG, "modes": ["federated"], "rounds": 2, "name": "stopped"}
    run = stopped_run(lab, monkeypatch, "federated", 1, **keys)
    about = json.loads((run / "environment.json").read_text())
    about["devices"], about["versions"]["torch"] = ["cuda:0"], "1.0"
    (run / "environment.json").write_text(json.dumps(about))
    said = notes(monkeypatch)
    lab.run(**keys)
    (line,) = [text for text in said if "may differ" in text]
    assert "device cuda then, cpu now" in line and "torch 1.0 then" in line


# ------------------------------------------------------------------------------------------- one at a time


def test_a_run_folder_is_run_once_at_a_time(lab: Any) -> None:
    keys = {**LONG, "modes": ["federated"], "rounds": 1}
    run = lab.run(**keys)
    holder = RunFolder(run)
    assert holder.lock() is None
    with pytest.raises(UserError, match=rf"is being run by process {os.getpid()}; wait for it, or stop it$"):
        lab.run(**keys)
    assert len(fedsim.load_runs(run)) > 0, "reading is free"
    holder.close()
    assert lab.run(**keys) == run and not (run / ".lock").exists()


def test_who_is_refused_removes_nothing_of_the_holders(tmp_path: Path) -> None:
    """Two first starts at once: both saw no folder, one of them has the lock."""
    place = tmp_path / "results" / "name" / "id"
    refused = RunFolder(place)
    refused._made = [place, place.parent, place.parent.parent]
    holder = RunFolder(place)
    holder._made = list(refused._made)
    assert holder.lock() is None
    with pytest.raises(UserError, match="is being run by process"):
        refused.lock()
    refused.discard_new()
    refused.close()
    assert (place / ".lock").is_file()
    holder.discard_new()
    holder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib; from fedsim.runs.folder import RunFolder\n"
        "RunFolder(pathlib.Path(sys.argv[1])).lock(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(fedsim.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL and (tmp_path / ".lock").is_file()
    folder = RunFolder(tmp_path)
    assert folder.lock() is None
    folder.close()


def test_where_there_are_no_locks_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    folder = RunFolder(tmp_path)
    assert "no locks on this file system" in str(folder.lock())
    folder.close()


# ------------------------------------------------------------------------------------------- a full disk


@fast_only(0, 2)
@pytest.mark.parametrize("where", ["os.pwrite", "os.fsync", "safetensors", "the end"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    lab: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    keys = {**LONG, "name": "stopped"}
    stopped_run(lab, monkeypatch, "federated", 2, **keys)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(*args: Any, **more: Any) -> Any:
        raise full if where != "safetensors" else RuntimeError("I/O error: No space left on device (os error 28)")

    places = {"safetensors": "safetensors.torch.save_file", "the end": "fedsim.models.export.save"}
    with monkeypatch.context() as patch:
        patch.setattr(places.get(where, where), fails)
        with pytest.raises(
            UserError, match=r"cannot be written to \(No space left on device\); the last complete round"
        ) as error:
            lab.run(**keys)
    assert "\n" not in str(error.value)
    lab.same_bits(lab.run(**keys), whole())


@pytest.mark.thorough
def test_a_file_that_may_not_grow_is_one_line(lab: Any, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own limit on the size of files, in the process that writes records and in its workers."""
    keys = {**LONG, "modes": ["central"], "executor": {"name": "pool", "devices": ["cpu"], "workers": 1, "threads": 1}}
    script = (
        "import multiprocessing, resource, sys, fedsim.cli.main, fedsim.runs.session as session\n"
        "begin = session.run_mode\n"
        "def limited(*args):\n"  # workers are there by now, and what they share
        "    for pid in (0, *(p.pid for p in multiprocessing.active_children())):\n"
        "        resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "    return begin(*args)\n"
        "session.run_mode = limited\n"
        "sys.exit(fedsim.cli.main.main(['run', *sys.argv[1:]]))\n"
    )
    file = lab.root / "experiment.yaml"
    file.write_text(json.dumps(lab.tree(**{**keys, "name": "limited"})))
    env = {**os.environ, "PYTHONPATH": str(Path(fedsim.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)], capture_output=True, text=True, env=env, cwd=lab.root
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "cannot be written to (File too large)" in done.stderr.splitlines()[-1]
    (run,) = (lab.root / "results" / "limited").iterdir()
    lab.run(**{**keys, "name": "limited"})
    lab.same_bits(run, whole(modes=["central"]))


def test_a_results_folder_that_cannot_be_is_refused(lab: Any) -> None:
    (lab.root / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"^results: .*taken.* cannot be written to"):
        lab.run(**{**LONG, "results": str(lab.root / "taken")})
