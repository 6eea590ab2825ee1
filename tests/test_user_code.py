"""A user's own file: an algorithm and an aggregator that nobody registered, through lanes, pool, resume and the command line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_algorithms import POOL, SMALL
from test_equivalence import adapter_of

import fedsim
from fedsim.config.sections import algorithm_of
from fedsim.core.errors import UserError

OWN = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from fedsim.algorithms import Algorithm, Server, per_lane


class TrimmedMean:
    """Per coordinate, without the smallest and the largest value."""

    blockwise = True

    def buffers(self, slots):
        from fedsim.aggregators import Buffer

        return {"values": Buffer(slots), "seen": Buffer(slots, by_element=False)}

    def add(self, acc, values, weights, slots):
        acc["values"][list(slots)] = values
        acc["seen"][list(slots)] = 1.0

    def result(self, acc, weight):
        return acc["values"][acc["seen"] > 0].sort(dim=0).values[1:-1].mean(dim=0)


@dataclass(frozen=True)
class Toy(Algorithm):
    """SCAFFOLD for uniform weights."""

    aggregates: ClassVar[dict] = {"update": "mean", "control": "sum"}
    sends_state: ClassVar[bool] = True
    server_lr: float = 1.0
    """Learning rate of the server."""

    def init(self, params):
        zeros = {n: torch.zeros_like(p) for n, p in params.items()}
        return zeros, zeros

    def after_step(self, params, scratch, c, lr):
        for n, p in params.items():
            p -= per_lane(lr, p) * (c.server[n] - c.state[n])

    def finish(self, params, scratch, c):
        update = {n: p - c.params[n] for n, p in params.items()}
        new = {n: c.state[n] - c.server[n] - u / per_lane(c.lr_sum, u) for n, u in update.items()}
        return {"update": update, "control": {n: new[n] - c.state[n] for n in new}}, new

    def step(self, server, reduced, info):
        params = {n: x + self.server_lr * reduced["update"][n] for n, x in server.params.items()}
        return Server(params, {n: c + reduced["control"][n] / info.all_clients for n, c in server.state.items()})


@dataclass(frozen=True)
class Trimmed(Algorithm):
    """FedAvg with a trimmed mean."""

    aggregates: ClassVar[dict] = {"update": TrimmedMean()}
'''


@pytest.fixture
def own(lab: Any) -> Path:
    """A user's file, beside the YAML."""
    file = lab.root / "mine" / "my_file.py"
    file.parent.mkdir()
    file.write_text(OWN)
    return file


def test_a_strangers_scaffold_runs_from_the_command_line(lab: Any, distance: Any, own: Path) -> None:
    """With lanes, in a pool from another directory, resumed; it gives what the package's own gives."""
    keys = {**SMALL, "algorithm": {"name": "my_file.py:Toy", "server_lr": 0.7, "weights": "uniform"}}
    env = {**os.environ, "PYTHONPATH": str(Path(fedsim.__file__).parent.parent), "OMP_NUM_THREADS": "1"}

    def run(name: str, *flags: str, **more: Any) -> Path:
        file = own.parent / f"{name}.yaml"
        file.write_text(json.dumps(lab.tree(**{**keys, **more, "name": name})))
        argv = [sys.executable, "-m", "fedsim", "run", str(file), *flags]
        done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=lab.root)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = (lab.root / "results" / name).iterdir()
        return folder

    pool = run("pool", "--resume", str(run("pool", executor=POOL, rounds=2)), executor=POOL)
    serial = run("serial")
    lab.same_bits(pool, serial)
    builtin = lab.run(**{**keys, "name": "builtin", "algorithm": {**keys["algorithm"], "name": "scaffold"}})
    assert distance(adapter_of(serial / "global"), adapter_of(builtin / "global")) < 1e-12


def test_a_strangers_aggregator_sees_every_client(lab: Any, distance: Any, own: Path) -> None:
    """Of 3 clients the trimmed mean is the median of their parameters, whatever the packs and workers."""
    name = {"algorithm": {"name": f"{own}:Trimmed"}}
    keys = {"evaluate": {"clients": False}, "modes": ["local", "federated"]}
    run = lab.run(**keys, **name)
    lab.same_bits(lab.run(**keys, **name, executor=POOL), run)
    alone = [adapter_of(run / "local" / f"site-{k}") for k in (1, 2, 3)]
    median = {n: torch.stack([a[n] for a in alone]).median(dim=0).values for n in alone[0]}
    assert distance(adapter_of(run / "global"), median) < 1e-12


def test_the_files_content_is_in_the_id_and_travels_as_it_was_read(lab: Any, own: Path) -> None:
    exp = lab.exp(algorithm={"name": f"{own}:Toy"})
    before, sent = exp.identity()["algorithm"], pickle.dumps(algorithm_of(exp.algorithm))
    assert before["name"].startswith("Toy@") and fedsim.Experiment.from_dict(exp.to_dict()) == exp
    other = own.parent / "other.py"
    other.write_text(OWN)
    assert lab.exp(algorithm={"name": f"{other}:Toy"}).identity()["algorithm"] == before, "not where it lies"
    own.write_text(OWN.replace("server_lr: float = 1.0", "server_lr: float = 2.0"))
    assert lab.exp(algorithm={"name": f"{own}:Toy"}).identity()["algorithm"] != before
    code = f"import pickle; made = pickle.loads({sent!r}); print(type(made).__name__, made.server_lr, type(made)().server_lr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Toy", "1.0", "1.0"], "the bytes that were read first, in every process"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py:Toy", "algorithm.name: 'nowhere.py' cannot be read"),
        ("my_file.py:Tou", "has no class 'Tou' derived from Algorithm; it has Toy, Trimmed"),
        ("my_file.py:TrimmedMean", "has no class 'TrimmedMean' derived from Algorithm; it has Toy, Trimmed"),
        ("broken.py:Toy", "broken.py, line 2: ZeroDivisionError: division by zero"),
        ("wrong.py:Toy", "wrong.py, line 1: SyntaxError"),
        ("bare.py:Toy", "Toy is no dataclass; put @dataclass"),
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
