"""A user's own file: an algorithm and an aggregator that nobody registered, through lanes, pool, resume and the command line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_algorithms import POOL, SMALL
from test_equivalence import adapter_of
from test_readme import blocks

import fedsim
from fedsim.aggregators import AGGREGATORS
from fedsim.config.components import algorithm_of, component_of
from fedsim.config.experiment import components
from fedsim.core.errors import UserError

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "extend.md"
OWN = (
    "\n".join(blocks(DOCUMENT.read_text(encoding="utf-8"), "python"))
    + """
@dataclass(frozen=True)
class Fixed(Algorithm):
    aggregates: ClassVar[dict] = {"update": TrimmedMean(0.34)}


@dataclass(frozen=True)
class Other(Algorithm):
    aggregates: ClassVar[dict] = {"other": "mean"}
"""
)


@pytest.fixture
def own(lab: Any) -> Path:
    """A user's file, beside the YAML."""
    file = lab.root / "mine" / "my_file.py"
    file.parent.mkdir()
    file.write_text(OWN)
    return file


@pytest.fixture
def command(lab: Any, own: Path) -> Callable[..., Path]:
    """(name, flags, keys) -> folder of a run by the command line, in another directory than the YAML file's."""
    env = {**os.environ, "PYTHONPATH": str(Path(fedsim.__file__).parent.parent), "OMP_NUM_THREADS": "1"}

    def run(name: str, *flags: str, **keys: Any) -> Path:
        file = own.parent / f"{name}.yaml"
        file.write_text(json.dumps(lab.tree(**{**keys, "name": name})))
        argv = [sys.executable, "-m", "fedsim", "run", str(file), *flags]
        done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=lab.root)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = (lab.root / "results" / name).iterdir()
        return folder

    return run


def test_a_strangers_scaffold_runs_from_the_command_line(lab: Any, distance: Any, command: Any) -> None:
    """With lanes, in a pool from another directory, resumed; it gives what the package's own gives."""
    keys = {**SMALL, "algorithm": {"name": "my_file.py:MyScaffold", "server_lr": 0.7, "weights": "uniform"}}
    pool = {**keys, "executor": POOL}
    resumed = command("pool", "--resume", str(command("pool", **{**pool, "rounds": 2})), **pool)
    serial = command("serial", **keys)
    lab.same_bits(resumed, serial)
    builtin = lab.run(**{**keys, "name": "builtin", "algorithm": {**keys["algorithm"], "name": "scaffold"}})
    assert distance(adapter_of(serial / "global"), adapter_of(builtin / "global")) < 1e-12


def test_a_strangers_aggregator_runs_from_the_command_line(lab: Any, distance: Any, command: Any, own: Path) -> None:
    """Of 3 clients the trimmed mean is the median, whatever the lanes and workers, resumed or not; an algorithm may fix it."""
    keys = {"training": {"lanes": 2}, "evaluate": {"clients": False}, "modes": ["local", "federated"], "rounds": 1}
    keys["aggregator"] = {"name": "my_file.py:TrimmedMean", "trim": 0.34}
    run = command("serial", **keys)
    alone = [adapter_of(run / "local" / f"site-{k}") for k in (1, 2, 3)]
    median = {n: torch.stack([a[n] for a in alone]).median(dim=0).values for n in alone[0]}
    assert distance(adapter_of(run / "global"), median) < 1e-12
    pool = {**keys, "executor": POOL}
    resumed = command("pool", "--resume", str(command("pool", **pool)), **{**pool, "rounds": 2})
    lab.same_bits(resumed, command("two", **{**keys, "rounds": 2}))
    fixed = {k: v for k, v in keys.items() if k != "aggregator"} | {"algorithm": {"name": f"{own}:Fixed"}}
    lab.same_bits(lab.run(**fixed, name="fixed"), run)


@pytest.mark.parametrize(
    ("algorithm", "why"),
    [
        ("scaffold", None),
        ("Fixed", "aggregator.name: 'sum' has no use: algorithm.name=.*:Fixed fixes its aggregator"),
        ("Other", "aggregator.name: 'sum' has no use: algorithm.name=.*:Other sends no message group update"),
    ],
)
def test_an_aggregator_is_of_the_updates_of_an_algorithm_that_takes_their_mean(
    lab: Any, own: Path, algorithm: str, why: str | None
) -> None:
    keys = {"algorithm": {"name": algorithm if why is None else f"{own}:{algorithm}"}, "aggregator": {"name": "sum"}}
    if why is not None:
        with pytest.raises(UserError, match=why):
            lab.exp(**keys)
        return
    exp = lab.exp(**keys)
    assert algorithm_of(exp.algorithm, exp.aggregator).aggregates == {"update": "sum", "control": "sum"}
    assert exp.identity()["aggregator"] == {"name": "sum"} and "aggregator" not in lab.exp().identity()
    again = pickle.loads(pickle.dumps(algorithm_of(exp.algorithm, exp.aggregator)))
    assert again.aggregates["update"] == "sum", "in a worker too"


def test_the_aggregators_of_the_config_are_those_there_are() -> None:
    assert list(AGGREGATORS) == list(components("aggregator"))


@pytest.mark.parametrize(
    ("section", "name", "field"), [("algorithm", "MyScaffold", "server_lr"), ("aggregator", "TrimmedMean", "trim")]
)
def test_the_files_content_is_in_the_id_and_travels_as_it_was_read(
    lab: Any, own: Path, section: str, name: str, field: str
) -> None:
    def identity(file: Path) -> Any:
        return lab.exp(**{section: {"name": f"{file}:{name}"}}).identity()[section]

    exp = lab.exp(**{section: {"name": f"{own}:{name}"}})
    before, sent = exp.identity()[section], pickle.dumps(component_of(getattr(exp, section)))
    assert before["name"].startswith(f"{name}@") and fedsim.Experiment.from_dict(exp.to_dict()) == exp
    other = own.parent / "other.py"
    other.write_text(OWN)
    assert identity(other) == before, "not where it lies"
    value = getattr(component_of(getattr(exp, section)), field)
    own.write_text(OWN.replace(f"{field}: float = {value}", f"{field}: float = 0.5"))
    assert identity(own) != before
    code = (
        f"import pickle; made = pickle.loads({sent!r}); print(type(made).__name__, made.{field}, type(made)().{field})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [name, str(value), str(value)], "the bytes that were read first, in every process"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py:Toy", "algorithm.name: 'nowhere.py' cannot be read"),
        ("my_file.py:Tou", "has no class 'Tou' derived from Algorithm; it has MyScaffold, Fixed, Other"),
        (
            "my_file.py:TrimmedMean",
            "has no class 'TrimmedMean' derived from Algorithm; it has MyScaffold, Fixed, Other",
        ),
        ("broken.py:Toy", "broken.py, line 2: ZeroDivisionError: division by zero"),
        ("wrong.py:Toy", "wrong.py, line 1: SyntaxError"),
        ("bare.py:Toy", "Toy is not a frozen dataclass; put @dataclass"),
        ("open.py:Toy", "open.py:Toy: mu has no default"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(
    own: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(own.parent)
    head = "from dataclasses import dataclass\nfrom fedsim.algorithms import Algorithm\n"
    Path("broken.py").write_text("x = 1\ny = x / 0\n")
    Path("wrong.py").write_text("def (:\n")
    Path("bare.py").write_text(f"{head}class Toy(Algorithm):\n    mu: float = 1.0\n")
    Path("open.py").write_text(f"{head}@dataclass(frozen=True, kw_only=True)\nclass Toy(Algorithm):\n    mu: float\n")
    with pytest.raises(UserError, match=said) as caught:
        fedsim.Experiment(algorithm={"name": name})
    assert "\n" not in str(caught.value)


def test_a_class_that_is_no_aggregator_is_told_in_one_line(own: Path) -> None:
    with pytest.raises(UserError, match=r"'MyScaffold' with blockwise, buffers, add and result; it has TrimmedMean"):
        fedsim.Experiment(aggregator={"name": f"{own}:MyScaffold"})
    own.write_text(OWN.replace("@dataclass(frozen=True)\nclass TrimmedMean", "@dataclass\nclass TrimmedMean"))
    with pytest.raises(UserError, match="TrimmedMean is not a frozen dataclass"):
        fedsim.Experiment(aggregator={"name": f"{own}:TrimmedMean"})
