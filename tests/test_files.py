"""A run folder that somebody else has packed, or that a disk has damaged: named in one line, and nothing else is touched."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiers import fast_only

import fedsim
import fedsim.analysis.plots
from fedsim.analysis.plots import save_figures
from fedsim.cli.main import main
from fedsim.core.errors import Notice, UserError

KEYS: dict[str, Any] = {
    "name": "lab",
    "modes": ["local", "federated"],
    "rounds": 2,
    "model": {"dtype": "float32"},
    "partition": {"name": "iid", "num_clients": 2},
    "local": {"steps": 1, "keep_state": True},
}
CSV = "checkpoints/federated/round-00002/tensors.safetensors"


@pytest.fixture(scope="module")
def made(_shared: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"root": tmp_path_factory.mktemp("made")}


@pytest.fixture
def run(lab: Any, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of a sweep of one, `results/lab/ID`, a copy for each test; `experiment.yaml` and `sweep.yaml` beside it."""
    if "run" not in made:
        tree = lab.tree(**KEYS, results=str(made["root"] / "results"))
        (made["root"] / "sweep.yaml").write_text(yaml.safe_dump({"experiment": tree, "list": [{"seed": 3}]}))
        (made["root"] / "experiment.yaml").write_text(yaml.safe_dump(tree))
        assert main(["sweep", str(made["root"] / "sweep.yaml"), "-q"]) == 0
        made["run"] = next(p for p in (made["root"] / "results/lab").iterdir() if (p / "config.yaml").is_file())
    shutil.copytree(made["root"], lab.root, dirs_exist_ok=True)
    for name in ("sweep.yaml", "experiment.yaml"):
        file = lab.root / name
        file.write_text(file.read_text().replace(str(made["root"] / "results"), str(lab.root / "results")))
    monkeypatch.chdir(lab.root)
    # `fedsim plot` draws; the ends of runs do not, as elsewhere in the laboratory.
    monkeypatch.setattr(fedsim.plots, "save_figures", lambda run, *asked: save_figures(run, *asked) if asked else [])
    return lab.root / made["run"].relative_to(made["root"])


def contents(folder: Path) -> dict[str, Any]:
    """What lies in a folder: times and bytes of files, and where links lead to."""
    return {
        str(p.relative_to(folder)): (p.lstat().st_mtime_ns, p.lstat().st_mode, p.read_bytes() if p.is_file() else None)
        for p in sorted(folder.rglob("*"))
    }


def link_away(place: Path, outside: Path) -> None:
    """A symbolic link takes a file's or folder's place; what was there lies outside now."""
    there = outside / place.name
    place.rename(there) if place.exists() else there.write_text("precious")
    place.symlink_to(there)


def dangling(place: Path, outside: Path) -> None:
    remove(place)
    place.symlink_to(outside / "made through a link")


def second_name(place: Path, outside: Path) -> None:
    """A hard link takes a file's place."""
    there = outside / place.name
    place.rename(there) if place.exists() else there.write_text("precious")
    os.link(there, place)


def pipe(place: Path, outside: Path) -> None:
    remove(place)
    os.mkfifo(place)


def listening(place: Path, outside: Path) -> None:
    remove(place)
    here = os.getcwd()
    os.chdir(place.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(place.name)
    os.chdir(here)


def remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


FILES = [
    *(".lock", "metrics/local.jsonl", "status.json", "config.yaml", "partition.npz", "scores.npz", "anything-else"),
    *("checkpoints/federated/round-00002/manifest.json", "checkpoints/local.bin", "checkpoints/run.json"),
    *("global/adapter_model.safetensors", "local/site-1/best/adapter_config.json", "init/adapter_config.json"),
]
FOLDERS = ["checkpoints", "checkpoints/local", "global", "best", "local", "local/site-2", "init", "figures", "."]
KINDS: dict[str, Callable[[Path, Path], None]] = {
    "symbolic link": link_away,
    "dangling link": dangling,
    "hard link": second_name,
    "named pipe": pipe,
    "socket": listening,
}
CASES = [(kind, name) for kind in KINDS for name in FILES]
CASES += [("symbolic link", name) for name in FOLDERS] + [("dangling link", name) for name in FOLDERS[:3]]


@fast_only(0, 1, 10, 13, 27, 40, 53, 65, 67, 73, 74)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_nothing_is_written_through_a_link(
    run: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], kind: str, name: str
) -> None:
    """By none of the commands that write into a run folder, and none of them waits for a pipe."""
    outside = tmp_path_factory.mktemp("outside")
    (run / "figures").mkdir(exist_ok=True)
    KINDS[kind](run / name, outside)
    before = contents(outside)
    commands = [
        ["run", "experiment.yaml", "-q"],
        ["run", "experiment.yaml", "-q", "--resume", str(run)],
        ["plot", str(run)],
        ["eval", str(run), "--limit", "1", "-q"],
    ]
    for command in commands:
        if command[0] != "run" and kind == "dangling link" and name in (".", "config.yaml", "metrics/local.jsonl"):
            continue  # no run is there
        code, said = main(command), capsys.readouterr().err
        assert code == 2, (command, said)
        assert said.count("\n") == 1 and str(run / name) in said, said
        assert contents(outside) == before


def test_links_around_a_run_folder(
    run: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of all results may be a link; what fedsim makes in it may not."""
    outside = tmp_path_factory.mktemp("outside")
    Path("results").rename(outside / "results")
    Path("results").symlink_to(outside / "results")
    assert main(["run", "experiment.yaml", "-q"]) == 0
    capsys.readouterr()
    experiment = outside / "results" / "lab"
    for name in (".", "sweep.json", "figures", "errors", "partition", "table.csv"):
        place = experiment / name
        kept = outside / "kept"
        shutil.copytree(experiment, kept)
        place.mkdir(exist_ok=True) if "." not in name else None
        link_away(place, outside)
        before = contents(outside / place.name)
        command = {".": "run", "partition": "partition"}.get(name, "sweep")
        code = main(
            [command, "sweep.yaml" if command == "sweep" else "experiment.yaml", *["-q"] * (command != "partition")]
        )
        said = capsys.readouterr().err
        assert (code, said.count("\n")) == (2, 1), (name, said)
        assert f"lab{'' if name == '.' else '/' + name} is a symbolic link" in said
        assert contents(outside / place.name) == before
        remove(experiment)
        remove(outside / place.name)
        kept.rename(experiment)


# ------------------------------------------------------------------------------------------------ damage


def another_digit(file: Path) -> None:
    """JSON that can be read and says something else."""
    data = bytearray(file.read_bytes())
    at = data.index(b'"value": ') + 9
    data[at] = ord("1") if data[at] != ord("1") else ord("2")
    file.write_bytes(bytes(data))


def another_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(bytes(data))


def notices(call: Callable[[], Any]) -> list[str]:
    with pytest.warns() as caught:
        call()
    return [str(w.message) for w in caught if issubclass(w.category, Notice)]


READERS: dict[str, Callable[[Path], Any]] = {
    "load_runs": fedsim.load_runs,
    "list": lambda run: main(["list", str(run.parent)]),
    "plot": lambda run: main(["plot", str(run)]),
    "diff": lambda run: main(["diff", str(run), str(run)]),
}


@pytest.mark.parametrize("finished", [True, False])
@fast_only(0, 3)
@pytest.mark.parametrize("reader", READERS)
def test_readers_name_damaged_rows(run: Path, capsys: pytest.CaptureFixture[str], reader: str, finished: bool) -> None:
    if not finished:
        (run / "status.json").write_text('{"state": "stopped", "rounds": 2}')
        (run / "checkpoints/run.json").unlink()
    READERS[reader](run)
    assert capsys.readouterr().err == "", "no false alarm"
    another_digit(run / "metrics/local.jsonl")
    if reader == "load_runs":
        said = notices(lambda: fedsim.load_runs(run))
    else:
        assert READERS[reader](run) == 0
        said = capsys.readouterr().err.splitlines()
    (line,) = [text for text in said if "local.jsonl" in text]
    assert f"{run / 'metrics/local.jsonl'} was changed or damaged" in line and "restore it, or delete" in line


def test_readers_name_damaged_scores(run: Path) -> None:
    """Wherever the changed bit lies: another number is never used in silence, and nothing but a `UserError` comes out."""
    whole = (run / "scores.npz").read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        data = bytearray(whole)
        data[place] ^= 4
        (run / "scores.npz").write_bytes(bytes(data))
        with pytest.warns(Notice, match="scores.npz was changed or damaged"), contextlib.suppress(UserError):
            fedsim.confusion_matrix(run)


def test_a_damaged_model_is_not_scored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    another_bit(run / "global/adapter_model.safetensors")
    for what in (run, run / "global"):
        assert main(["eval", str(what), "--limit", "1", "-q"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(run / "global/adapter_model.safetensors") in said
    assert main(["diff", str(run), str(run)]) == 0
    assert "global/adapter_model.safetensors was changed or damaged" in capsys.readouterr().err


DAMAGED: dict[str, Callable[[Path], None]] = {
    "metrics/local.jsonl": another_digit,
    "global/adapter_model.safetensors": another_bit,
    "local/site-1/best/adapter_config.json": another_bit,
    "init/adapter_model.safetensors": another_bit,
    "partition.npz": another_bit,
    "config.yaml": another_bit,
    "scores.npz": another_bit,
    "model.json": Path.unlink,
    "checkpoints/run.json": Path.unlink,
    "checkpoints/federated/done.json": another_bit,
    "checkpoints/federated/round-00002/tensors.safetensors": another_bit,
    "checkpoints/federated/round-00002/manifest.json": another_bit,
    "checkpoints/local.bin": another_bit,
}


@pytest.mark.parametrize("resume", [False, True])
@fast_only(0, 1, 4, 10)
@pytest.mark.parametrize("name", DAMAGED)
def test_a_finished_run_names_each_damaged_file_and_changes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, resume: bool
) -> None:
    command = ["run", "experiment.yaml", *(["--resume", str(run)] if resume else [])]
    assert main(command) == 0 and "damaged" not in capsys.readouterr().err
    DAMAGED[name](run / name)
    before = contents(run)
    assert main(command) == 0
    said = capsys.readouterr().err
    assert f"finished, but damaged or missing since: {name}; restore these files, or delete the folder" in said
    assert contents(run) == before


def test_a_sweep_names_what_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    another_digit(run / "metrics/local.jsonl")
    another_bit(run / "global/adapter_model.safetensors")
    before = contents(run)
    assert main(["sweep", "sweep.yaml"]) == 0
    said = capsys.readouterr().err
    assert "damaged or missing since: metrics/local.jsonl, global/adapter_model.safetensors" in said
    assert contents(run) == before


# ------------------------------------------------------------------------------------------------ JSON of another kind

WRONG = {
    "list": b"[1, 2]",
    "number": b"7",
    "null": b"null",
    "text": b'"x"',
    "nested": b"[" * 200_000,
    "many digits": b"1" * 10_000,
    "not UTF-8": b'{"state": "\xff"}',
    "UTF-16": '{"state": "finished"}'.encode("utf-16"),
    "nothing": b"",
    "no file": None,
}
JSON_FILES = ["status.json", "plan.json", "environment.json", "partition.json", "model.json", "checkpoints/run.json"]


def put(file: Path, data: bytes | None) -> None:
    file.unlink()
    file.write_bytes(data) if data is not None else os.mkfifo(file)


@fast_only(0, 4, 6, 9)
@pytest.mark.parametrize("kind", WRONG)
def test_json_of_another_kind_is_one_line(run: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Of every JSON file of a run, and for every command that reads it: no traceback, and the file is named once."""
    commands = {"list": [str(run.parent)], "plot": [str(run)], "diff": [str(run), str(run)]}
    read_by = {"status.json": ["list"], "partition.json": ["plot", "diff"], "checkpoints/run.json": list(commands)}
    for name in JSON_FILES:
        kept = (run / name).read_bytes()
        put(run / name, WRONG[kind])
        for command in read_by.get(name, ["diff"]):
            code, said = main([command, *commands[command]]), capsys.readouterr().err
            assert code in (0, 2) and said.count(str(run / name)) == said.count("\n") <= 1, (name, command, said)
            assert said or (name == "checkpoints/run.json" and WRONG[kind] is None), "without that file nothing tells"
        (run / name).unlink()
        (run / name).write_bytes(kept)
    sweep = run.parent / "sweep.json"
    put(sweep, WRONG[kind])
    code, said = main(["plot", str(run.parent)]), capsys.readouterr().err
    # A pipe is no file, so this is no sweep's folder, and the run in it is drawn.
    assert (code, said.count(str(sweep)), said.count("\n")) == ((2, 1, 1) if WRONG[kind] is not None else (0, 0, 0))


def test_counts_that_are_no_table_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((run / "partition.json").read_text())
    report["class_counts"][0].pop()
    (run / "partition.json").write_text(json.dumps(report))
    assert main(["plot", str(run)]) == 2
    said = capsys.readouterr().err
    assert "partition.json: class_counts" in said and said.count("\n") == 1


@fast_only(2)
@pytest.mark.parametrize("kind", ["list", "nested", "not UTF-8"])
def test_a_sweep_goes_on_whatever_json_holds(run: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    names = JSON_FILES if kind == "list" else JSON_FILES[:1]
    for name in names:
        kept = (run / name).read_bytes()
        put(run / name, WRONG[kind])
        code = main(["sweep", "sweep.yaml"])
        assert code == 0 or name == "partition.json", "without it there are no tables"
        said = capsys.readouterr().err
        assert f"{run / name}: damaged" in said or f"damaged or missing since: {name}" in said, (name, said)
        (run / name).unlink()
        (run / name).write_bytes(kept)
    assert main(["sweep", "sweep.yaml"]) == 0
    assert "finished before" in (said := capsys.readouterr().err) and "damaged" not in said


# ------------------------------------------------------------------------------------------------ modes


@pytest.fixture
def umask() -> Iterator[Callable[[int], Any]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@fast_only(0, 2)
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_follow_the_umask(lab: Any, umask: Callable[[int], Any], mask: int) -> None:
    umask(mask)
    run = lab.run(**KEYS)
    modes = {str(p.relative_to(run)): stat.S_IMODE(p.stat().st_mode) for p in run.rglob("*")}
    assert {m for f, m in modes.items() if (run / f).is_file()} == {0o666 & ~mask}, modes
    assert {m for f, m in modes.items() if (run / f).is_dir()} == {0o777 & ~mask}, modes
    assert "global/adapter_model.safetensors" in modes and CSV in modes


# ------------------------------------------------------------------------------------------------ clients


def test_any_client_id_has_a_folder_and_is_shown_as_it_is(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ids = ["\u533b" * 90, "x" * 250, "../../up", "a\0b", "a\0c", "plain"]
    rows = [{"text": f"{i} said", "label": "ab"[(i // 7) % 2], "user": ids[i % len(ids)]} for i in range(96)]
    data = lab.root / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    files = dict.fromkeys(("path", "validation", "test"), str(data))
    run = lab.run(
        modes=["local"],
        model={"path": "tiny", "dtype": "float32"},
        data={"name": "table", **files, "template": "{text} {label}", "labels": ["a", "b"]},
        partition={"name": "by_column", "column": "user"},
        local={"steps": 1},
    )
    folders = json.loads((run / "client_folders.json").read_text())
    assert sorted(folders.values()) == sorted(set(ids) - {"plain"})
    assert {p.name for p in (run / "local").iterdir()} == {*folders, "plain"}
    assert set(fedsim.load_runs(run)["client"].dropna()) == set(ids)
    from fedsim.zero_shot.models import find_models

    assert {m.name for m in find_models(run)} == {"base", *(f"local/{i}" for i in ids)}
    other = lab.root / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "local" / next(f for f, i in folders.items() if i == "../../up"))
    assert main(["diff", str(run), str(other)]) == 1
    assert "model local/../../up" in capsys.readouterr().out
