"""The command line as a user types it: what it prints, writes, refuses, and the exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import metrics_lines
from tiers import fast_only

import fedsim
from fedsim.cli.main import main
from fedsim.config.experiment import Experiment, components

YAML = """
name: small
rounds: 2
modes: [local, federated]
data: {name: headlines, max_length: 96}
partition: {name: class_counts, counts: [[2, 6, 0], [4, 4, 4]]}
local: {steps: 2, batch_size: 4, lr: 1.0e-3}
evaluate: {batch_size: 128}
executor: {name: serial, device: cpu, threads: 1}
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory of one's own with an experiment in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(YAML)
    return tmp_path


class Finished:
    """A finished run and what the command said."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "small.yaml").write_text(YAML)
        self.results = root / "results"
        command = [sys.executable, "-m", "fedsim", "run", "small.yaml"]
        (root / "tmp").mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "60"}
        environment["TMPDIR"] = str(root / "tmp")
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # as where torch's compiler makes a folder on being imported
        self.done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)

    @property
    def path(self) -> Path:
        (run,) = (self.results / "small").iterdir()
        return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("cli"))


def files(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which a command is refused; it starts with the program's name and nothing is printed besides."""
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.startswith("fedsim: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


# ------------------------------------------------------------------------------------------------ run


def test_run_makes_a_run_folder_and_prints_the_table_and_the_figures(finished: Finished) -> None:
    done, run = finished.done, finished.path
    assert done.returncode == 0, done.stderr
    there = {p.name for p in run.iterdir()}
    assert there >= {"config.yaml", "environment.json", "partition.npz", "metrics", "status.json"}
    assert there >= {"init", "global", "best", "local", "figures", "checkpoints"} and "central" not in there
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    figures = [line for line in done.stdout.splitlines() if "/figures/" in line]
    assert {Path(f).name for f in figures} >= {"accuracy.png", "loss.png", "partition.png", "examples.md"}
    assert all((finished.root / f).stat().st_size > 100 for f in figures), "whole paths, whatever the terminal's width"
    for row in ("local site-1", "local site-2", "local mean", "federated"):
        assert sum(line.startswith(f"{row}  ") for line in done.stdout.splitlines()) == 4, f"{row} in each table"
    rows = [json.loads(line) for line in metrics_lines(run)]
    merged = [r for r in rows if r["scope"] == "federated" and r["client"] is None and r["split"] == "validation"]
    assert [r["round"] for r in merged if r["name"] == "accuracy"] == [0, 1, 2]
    (line,) = [x for x in done.stdout.partition("macro_f1 of")[0].splitlines() if x.startswith("federated  ")]
    (chosen,) = [r["value"] for r in merged if r["name"] == "accuracy" and r["round"] == int(line.split()[1])]
    assert line.split()[2] == f"{chosen:.4f}", "the table shows the metrics file's number of that round"


def test_a_run_leaves_no_temporary_file(finished: Finished) -> None:
    assert finished.done.returncode == 0 and list((finished.root / "tmp").iterdir()) == []


def test_progress_goes_to_standard_error_in_plain_lines_where_there_is_no_terminal(finished: Finished) -> None:
    lines = finished.done.stderr.splitlines()
    assert not any("\x1b" in line or "\r" in line for line in lines)
    for mode in ("local", "federated"):
        for number in (1, 2):
            assert sum(line.split()[:3] == [mode, "round", f"{number}/2"] for line in lines) == 1
    assert any("parameters are trained" in line and "per client and round" in line for line in lines)
    assert "Warning" not in finished.done.stderr and "round 1/2" not in finished.done.stdout


def test_the_same_command_finds_the_finished_run(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.root)
    before = files(finished.path)
    assert main(["run", "small.yaml"]) == 0
    out, err = capsys.readouterr()
    assert f"already finished: results/small/{finished.path.name}" in err
    assert out == finished.done.stdout
    assert files(finished.path) == before, "and changes nothing"


def test_the_resolved_config_of_a_run_is_the_same_experiment(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.root)
    config = finished.path / "config.yaml"
    resolved = yaml.safe_load(config.read_text())
    assert resolved["best"] == {"metric": "accuracy", "mode": "max"}
    assert resolved["data"]["labels"] == ["negative", "neutral", "positive"]
    assert resolved["data"]["template"] == "{sentence} sentiment: {label}"
    assert main(["run", str(config), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert finished.path.name in out and err == "", "quiet says nothing but the end"
    assert len(list((finished.results / "small").iterdir())) == 1


def test_other_rounds_for_a_run_that_is_there_are_refused(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.root)
    before = files(finished.path)
    err = refused(capsys, "run", "small.yaml", "rounds=3")
    assert "rounds: 3" in err and "another name" in err
    assert files(finished.path) == before


# ------------------------------------------------------------------------------------------------ the other commands


def test_partition_writes_a_table_and_a_figure_before_any_training(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["partition", "small.yaml"]) == 0
    out, err = capsys.readouterr()
    place = here / "results" / "small" / "partition"
    assert sorted(p.name for p in place.iterdir()) == ["partition.json", "partition.png"]
    assert (place / "partition.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((place / "partition.json").read_text())
    assert report["class_counts"] == [[2, 6, 0], [4, 4, 4]] and report["sizes"] == [8, 12]
    rows = {line.split()[0]: line.split()[1:5] for line in out.splitlines() if line.startswith("site-")}
    assert rows == {"site-1": ["8", "2", "6", "0"], "site-2": ["12", "4", "4", "4"]}
    assert "2 clients, 20 examples" in out and "Gini" in out and err == ""
    assert [p.name for p in (here / "results" / "small").iterdir()] == ["partition"], "no run folder"


def test_partition_takes_overrides_and_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    override = "partition={name: dirichlet, num_clients: 50, alpha: 5, min_rows: 1}"
    assert main(["partition", "small.yaml", override, "--out", "p"]) == 0
    out, _ = capsys.readouterr()
    assert "50 clients, 1811 examples" in out and "and 10 more clients" in out
    report = json.loads((here / "p" / "partition.json").read_text())
    assert len(report["sizes"]) == 50 and sum(report["sizes"]) == 1811
    assert not (here / "results").exists()


def test_plot_draws_the_figures_again(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(finished.path), "--out", str(tmp_path / "f")]) == 0
    out, _ = capsys.readouterr()
    made = [Path(line) for line in out.splitlines()]
    assert {p.name for p in made} >= {"accuracy.png", "loss.png"}
    assert all(p.parent == tmp_path / "f" and p.read_bytes().startswith(b"\x89PNG") for p in made)
    assert main(["plot", str(finished.results), "--out", str(tmp_path / "g"), "--metric", "loss"]) == 0
    assert {p.name for p in (tmp_path / "g").iterdir()} >= {"loss.png"}
    assert not (tmp_path / "g" / "accuracy.png").exists()


def test_home_is_meant_by_every_path(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.path, tmp_path / "runs/r")
    shutil.copy(tmp_path / "runs/r/config.yaml", tmp_path / "e.yaml")
    capsys.readouterr()
    assert main(["plot", "~/runs/r", "--out", "~/drawn"]) == 0
    assert main(["partition", "~/e.yaml", "--out", "~/dealt"]) == 0
    assert main(["list", "~/runs"]) == 0
    assert main(["diff", "~/runs/r", "~/runs"]) == 0
    capsys.readouterr()
    assert (tmp_path / "drawn/loss.png").is_file() and (tmp_path / "dealt/partition.png").is_file()
    assert not list(tmp_path.glob("~*"))


def test_list_shows_the_runs_with_state_and_scores(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(finished.results)]) == 0
    out, _ = capsys.readouterr()
    (line,) = [x for x in out.splitlines() if finished.path.name in x and x.startswith("small")]
    assert "finished" in line and "1 run(s)" in out and "best_federated" in out


def test_init_writes_an_experiment_that_runs_and_never_overwrites(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "mine.yaml"]) == 0
    text = (here / "mine.yaml").read_text()
    assert capsys.readouterr().out == "mine.yaml\n" and text.count("#") > 10 and "fedsim run mine.yaml" in text
    assert "already exists" in refused(capsys, "init", "mine.yaml")
    assert "No such file or directory" in refused(capsys, "init", "nowhere/mine.yaml")
    assert (here / "mine.yaml").read_text() == text
    few = [
        "rounds=1",
        "local.steps=1",
        "local.schedule=constant",
        "executor={name: serial, threads: 1}",
        "training.lanes=1",
    ]
    assert main(["run", "mine.yaml", "-q", *few]) == 0
    assert "federated" in capsys.readouterr().out and len(list((here / "results" / "my_experiment").iterdir())) == 1
    assert main(["init"]) == 0 and (here / "experiment.yaml").read_text() == text.replace(
        "mine.yaml", "experiment.yaml"
    )


def test_config_prints_what_a_run_would_take(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "small.yaml", "local.lr=1e-2", "adapter.name=ia3"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    exp = Experiment.load("small.yaml", ["local.lr=1e-2", "adapter.name=ia3"])
    assert shown == exp.to_dict() and shown["local"]["lr"] == 0.01 and shown["adapter"]["name"] == "ia3"
    assert Experiment.from_dict(shown) == exp and [p.name for p in here.iterdir()] == ["small.yaml"]
    assert "unknown key local.learning_rate (did you mean local.lr?)" in refused(
        capsys, "config", "small.yaml", "local.learning_rate=1"
    )
    assert "--explain KEY" in refused(capsys, "config")


def test_config_explains_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain", "cohort.size"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cohort.size\n") and "type: a whole number or all" in out and 'default: "all"' in out
    assert "did you mean adapter.r?" in refused(capsys, "config", "--explain", "lora_rank")


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedsim {fedsim.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("fedsim rep", ["reproduce"]), ("fedsim run x.yaml local.b", ["local.batch_size=", "local.betas="])],
)
def test_a_shell_completes_commands_and_keys(typed: str, offered: list[str]) -> None:
    asked = {"_FEDSIM_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    code = "from fedsim.cli.main import cli; cli()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == offered, done.stderr


def test_list_components_names_every_component_with_its_keys(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--components"]) == 0
    out, _ = capsys.readouterr()
    for section in ("data", "partition", "adapter", "algorithm", "aggregator", "executor"):
        assert f"\n{section}:" in f"\n{out}"
        for name in components(section):
            assert not name or any(line.split()[:1] == [name] for line in out.splitlines()), name
    assert "(any PEFT method)" in out and "num_virtual_tokens" in out


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("FEDSIM_DATA", "/somewhere/else")
    assert main(["doctor"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    found = {k.strip(): v.strip() for k, v in lines.items()}
    assert found["torch"] == torch.__version__ and found["FEDSIM_DATA"] == "/somewhere/else"
    assert {"python", "fedsim-llm", "transformers", "peft", "CPU", "default executor", "tracker wandb"} <= found.keys()
    monkeypatch.delenv("FEDSIM_DATA")
    assert main(["doctor"]) == 0
    assert "not set" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--help"],
            [
                "init",
                "config",
                "run",
                "partition",
                "plot",
                "list",
                "doctor",
                "--version",
                "--install-completion",
                "experiments/lora_sentiment/tiny.yaml",
            ],
        ),
        (["run", "--help"], ["KEY=VALUE", "metrics/", "drops the file's other keys", "--quiet"]),
        (["partition", "--help"], ["without training", "--out"]),
        (["plot", "--help"], ["--metric", "figures"]),
        (["list", "--help"], ["--components", "results"]),
        (["doctor", "--help"], ["versions, devices"]),
    ],
)
def test_help_is_worth_reading(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    text = " ".join(out.split())
    for word in words:
        assert word in text, word


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert text.lstrip().startswith("Usage: fedsim") and "doctor" in text and "see fedsim --help" not in text


# ------------------------------------------------------------------------------------------------ wrong things


@fast_only(0, 2, 3, 4, 5, 7, 12, 18, 20, 21, 24, 26)
@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["runn"], "No such command 'runn'"),
        (["run"], "Missing argument"),
        (["run", "--bogus"], "No such option"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["run", "small.yaml", "local.lr=-1"], "local.lr: must be > 0 (got -1)"),
        (["run", "small.yaml", "local.lrr=1"], "unknown key local.lrr"),
        (["run", "small.yaml", "lr"], "'lr': not an override"),
        (["run", "small.yaml", "partition.counts=[[300, 0, 0]]"], "246"),
        (["run", "small.yaml", "partition.counts=[[1, 2]]"], "partition.counts[0]: [1, 2]"),
        (["run", "small.yaml", "partition={name: iid, num_clients: 2000}"], "1811"),
        (["run", "small.yaml", "partition={name: class_counts, counts: [[0, 0, 0]]}"], "no client has an example"),
        (["run", "small.yaml", "partition={name: by_column, column: user}"], "sentence, label"),
        (["run", "small.yaml", "cohort.size=3"], "cohort.size: 3"),
        (["run", "small.yaml", "local={epochs: 1, drop_last: true, batch_size: 9}"], "site-1 (8 examples"),
        (["run", "small.yaml", "adapter={name: p_tuning, num_virtual_tokens: 9999}"], "9999 virtual tokens"),
        (["run", "small.yaml", "data.template='{title} {label}'"], "{title} is no column"),
        (["run", "small.yaml", "data.template='{sentence} {label'"], "data.template"),
        (["run", "small.yaml", "data.max_length=8", "data.too_long=error"], "data.max_length: 8"),
        (["run", "small.yaml", "model.path=./nowhere"], "'./nowhere' does not exist"),
        (["run", "small.yaml", "data={name: table, path: nowhere.csv}"], "'nowhere.csv' does not exist"),
        (["run", "small.yaml", "executor={name: serial, device: 'cuda:99'}"], "'cuda:99' is not on this machine"),
        (["run", "small.yaml", "results=small.yaml"], "results: "),
        (["partition", "small.yaml", "partition.counts=[[300, 0, 0]]"], "246"),
        (["partition", "small.yaml", "results=small.yaml"], "small.yaml"),
        (["partition", "small.yaml", "--out", "small.yaml"], "small.yaml"),
        (["plot"], "Missing argument"),
        (["plot", "nowhere"], "nowhere"),
        (["plot", "."], "no run in"),
        (["list", "nowhere"], "no folder 'nowhere'"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    argv: list[str], why: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(here)
    assert why in refused(capsys, *argv)
    assert files(here) == before and [p.name for p in here.iterdir()] == ["small.yaml"]


def test_a_mistake_is_found_before_a_model_is_loaded(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **keys: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fedsim.models.base.load_base", never)
    for override in ("cohort.size=3", "partition={name: iid, num_clients: 5000}", "adapter={name: loha, rr: 1}"):
        refused(capsys, "run", "small.yaml", override)
    with pytest.raises(AssertionError, match="a model was loaded"):
        main(["run", "small.yaml", "-q"])


def test_a_real_process_exits_with_2_and_one_line(here: Path) -> None:
    command = [sys.executable, "-m", "fedsim", "run", "small.yaml", "local.lr=-1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("fedsim: local.lr: must be > 0 (got -1)") and done.stderr.count("\n") == 1
    done = subprocess.run([sys.executable, "-m", "fedsim", "list", "--components"], capture_output=True, text=True)
    assert done.returncode == 0 and "dirichlet_fedma" in done.stdout and done.stderr == ""


# ------------------------------------------------------------------------------------------------ failures


def test_a_failing_client_exits_with_1_its_round_and_id_first_then_its_traceback(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim.training.worker import Worker

    batches = Worker._batches

    def fail(self: Worker, task: Any, *more: Any) -> Any:
        if (task.round, task.name) == (2, "site-2"):
            raise ZeroDivisionError("deep inside a client")
        return batches(self, task, *more)

    monkeypatch.setattr(Worker, "_batches", fail)
    command = ["run", "small.yaml", "-q", "modes=[federated]", "data.too_long=drop", "training.lanes=1"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0].startswith("fedsim: round 2, client site-2 failed on cpu")
    assert lines[1].startswith("Traceback") and "ZeroDivisionError: deep inside a client" in err and "in fail" in err
    assert err.count("Traceback") == 1, "its own traceback, not the program's around it"
    (run,) = (here / "results" / "small").iterdir()
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and status["reason"].startswith("round 2, client site-2 failed")
    done = [json.loads(x) for x in metrics_lines(run)]
    assert max(r["round"] for r in done) == 1, "no row of the round that failed"

    monkeypatch.setattr(Worker, "_batches", batches)
    assert main(command) == 0, "the same command goes on"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    rows = [json.loads(x) for x in metrics_lines(run)]
    assert rows[: len(done)] == done, "after round 1, whose rows stay"


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **keys: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedsim.runs.run.run", interrupt)
    assert main(["run", "small.yaml"]) == 130
    err = capsys.readouterr().err
    assert "resume from the last complete round" in err and "Traceback" not in err


def test_a_bug_keeps_its_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*args: Any, **keys: Any) -> Any:
        raise KeyError("a bug of ours")

    monkeypatch.setattr("fedsim.runs.run.run", bug)
    with pytest.raises(KeyError, match="a bug of ours"):
        main(["run", "small.yaml"])
