"""A user's own file: an algorithm and an aggregator that nobody registered, through lanes, pool, resume and the command line."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_algorithms import POOL, SMALL
from test_equivalence import adapter_of

import fedsim
from fedsim.config.sections import algorithm_of
from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.runs.build import prepare

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


PARTITIONER = """
import numpy as np
from dataclasses import dataclass
from typing import Literal
from helpers import shares

@dataclass(frozen=True)
class Turns:
    '''Examples dealt in turns.'''
    num_clients: int = 2
    '''Number of clients.'''
    order: Literal["given", "drawn"] = "given"

    def __call__(self, labels, rng):
        numbers = np.arange(len(labels)) if self.order == "given" else rng.permutation(len(labels))
        return shares(numbers, self.num_clients)

def by_class(labels, rng, *, bad: str = ""):
    import pkg.names as names
    held = {names.of(k): np.flatnonzero(labels == k) for k in range(3)}
    broken = {
        "range": [[0, len(labels)]], "twice": [[0, 1], [1]], "left": [[0]], "kind": 7,
        "floats": [np.arange(len(labels)) / 2],
    }
    return 1 / 0 if bad == "raises" else broken.get(bad, held)

class Bare:
    pass
"""
SOURCE = """
import json
from dataclasses import dataclass

@dataclass(frozen=True)
class Lines:
    '''JSON lines.'''
    path: str
    validation_path: str
    template: str = "{sentence} sentiment: {label}"

    def __call__(self):
        return {"train": read(self.path), "validation": read(self.validation_path)}

def read(path):
    return [json.loads(line) for line in open(path)]

def columns(*, kind: str = "columns"):
    rows = {"text": [f"text {k}" for k in range(20)], "label": ["a", "b"] * 10}
    return {"columns": rows, "nothing": [], "odd": 7, "uneven": {**rows, "label": ["a"]}, "split": {"train": rows, "dev": rows},
            "labels": {**rows, "label": ["a"] * 20}}[kind]
"""


@pytest.fixture
def mine(own: Path) -> Path:
    """A partitioner and a source, with the modules beside the file that they import, one of them inside a function."""
    folder = own.parent
    (folder / "pkg").mkdir()
    for name, text in {
        "my_partition.py": PARTITIONER,
        "my_source.py": SOURCE,
        "helpers.py": "def shares(numbers, count):\n    return [numbers[k::count] for k in range(count)]\n",
        "pkg/names.py": "from .words import WORDS\n\ndef of(k):\n    return WORDS[k]\n",
        "pkg/words.py": "WORDS = ['bad', 'flat', 'good']\n",
    }.items():
        (folder / name).write_text(text)
    return folder


def test_a_strangers_partitioner_and_source_run_from_the_command_line(lab: Any, mine: Path) -> None:
    """With lanes, in a pool from another directory, resumed, in a sweep: the bits of the built-in ones."""
    plain = lab.tree()["data"]
    paths = {"path": plain["path"], "validation_path": plain["validation"]}
    keys = {
        "rounds": 2,
        "partition": {"name": "my_partition.py:Turns", "num_clients": 3, "order": "drawn"},
        "data": {"name": "my_source.py:Lines", **paths, "labels": plain["labels"], "test": 0},
    }
    env = {**os.environ, "PYTHONPATH": str(Path(fedsim.__file__).parent.parent), "OMP_NUM_THREADS": "1"}

    def command(what: str, name: str, tree: dict[str, Any], *flags: str) -> Path:
        file = mine / f"{name}.yaml"
        file.write_text(json.dumps(tree))
        argv = [sys.executable, "-m", "fedsim", what, str(file), *flags]
        done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=lab.root)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = (p for p in (lab.root / "results" / name).iterdir() if (p / "config.yaml").is_file())
        return folder

    def run(name: str, *flags: str, **more: Any) -> Path:
        return command("run", name, {**lab.tree(), **keys, "name": name, **more}, *flags)

    pool = run("pool", "--resume", str(run("pool", executor=POOL, rounds=1)), executor=POOL)
    serial = run("serial")
    lab.same_bits(pool, serial)
    sweep = {
        "experiment": {**lab.tree(), **keys},
        "name": "swept",
        "grid": {"seed": [3]},
        "devices": ["cpu"],
        "workers": 2,
    }
    swept = command("sweep", "swept", sweep)
    lab.same_bits(swept, serial)
    data = {**plain, "test": 0}
    lab.same_bits(
        lab.run(fedsim.Experiment.from_tree({**lab.tree(), **keys, "name": "table", "data": data}, mine)), serial
    )
    offsets, indices = (np.load(serial / "partition.npz")[name] for name in ("offsets", "indices"))
    drawn = stream(3, "partition").permutation(len(indices))
    assert all((indices[a:b] == drawn[k::3]).all() for k, (a, b) in enumerate(itertools.pairwise(offsets)))


def test_modules_beside_the_file_belong_to_it(mine: Path, lab: Any) -> None:
    """They are in the id, travel with the name, and do not meet others of that name, also where a function imports them."""
    keys = {"name": f"{mine}/my_partition.py:by_class"}
    exp = lab.exp(partition=keys)
    assert set(exp.partition.name.files) == {"my_partition.py", "helpers.py", "pkg/names.py", "pkg/words.py"}
    before, sent = exp.identity()["partition"], pickle.dumps(exp.to_dict())
    (mine / "pkg" / "words.py").write_text("WORDS = ['x', 'y', 'z']\n")
    after = lab.exp(partition=keys)
    assert after.identity()["partition"] != before
    assert prepare(after).partition.names == ("x", "y", "z")
    for kept in (exp, fedsim.Experiment.from_dict(pickle.loads(sent))):
        assert kept.identity()["partition"] == before
        assert prepare(kept).partition.names == ("bad", "flat", "good")
    assert pickle.loads(pickle.dumps(exp.partition)) == exp.partition
    assert not {"helpers", "pkg"} & sys.modules.keys()


@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        ("partition", "my_partition.py:Bare", "my_partition.py: Bare is no frozen dataclass"),
        ("partition", "my_partition.py:Turn", "has no class or function 'Turn'; it has Turns, by_class, Bare"),
        ("partition", "my_partition.py:Turns num_clients=x", "partition.num_clients: 'x' is not a whole number"),
        ("partition", "my_partition.py:Turns order=x", "partition.order: 'x' is not one of given, drawn"),
        ("partition", "my_partition.py:Turns clients=2", "unknown key partition.clients .*Valid keys: .*num_clients"),
        ("partition", "my_partition.py:by_class bad=range", "by_class gave 'site-1' example 60; there are 0 to 59"),
        (
            "partition",
            "my_partition.py:by_class bad=twice",
            r"by_class gave example 1 to 2 clients \(59 such examples\)",
        ),
        ("partition", "my_partition.py:by_class bad=left", "by_class gave example 1 to no clients"),
        ("partition", "my_partition.py:by_class bad=kind", "by_class returned 7; return the example numbers"),
        ("partition", "my_partition.py:by_class bad=floats", "by_class gave 'site-1' .*give a list of whole numbers"),
        ("partition", "my_partition.py:by_class bad=raises", "my_partition.py, line 25: ZeroDivisionError"),
        ("data", "my_source.py:Lines path=x", "data.validation_path: missing"),
        ("data", "my_source.py:Lines path=x validation_path=x", "my_source.py, line 16: FileNotFoundError"),
        ("data", "my_source.py:columns kind=nothing", "columns .train.: the .* has no rows"),
        ("data", "my_source.py:columns kind=odd", "columns .train.: int holds no examples"),
        ("data", "my_source.py:columns kind=uneven", "columns .train.: columns have different lengths, 1, 20"),
        (
            "data",
            "my_source.py:columns kind=split",
            "columns returned the split 'dev'; splits are train, validation, test",
        ),
        ("data", "my_source.py:columns kind=labels", "the label column of 'columns' holds 1 different value"),
        (
            "data",
            "my_source.py:columns validation=0",
            "data.validation: the validation split of .columns. is left without an example",
        ),
    ],
)
def test_what_is_wrong_with_them_is_one_line(
    lab: Any, mine: Path, monkeypatch: pytest.MonkeyPatch, section: str, keys: str, said: str
) -> None:
    monkeypatch.chdir(mine)
    name, *more = keys.split()
    tree = lab.tree()
    tree[section] = {"name": name} | {key: 0 if value == "0" else value for key, value in (m.split("=") for m in more)}
    with pytest.raises(UserError, match=said) as caught:
        prepare(fedsim.Experiment.from_dict(tree))
    assert "\n" not in str(caught.value)


def test_the_examples_of_the_document_run(lab: Any) -> None:
    """docs/extend.md: each file that it shows, with the section below it."""
    text = (Path(__file__).parents[1] / "docs" / "extend.md").read_text(encoding="utf-8")
    files = {code.split()[1]: code for code in re.findall(r"```python\n(# \w+\.py\n.*?)```", text, re.DOTALL)}
    for name, code in files.items():
        (lab.root / name).write_text(code)
    reviews = "".join(f"review {k} of a film,{k % 5 + 1}\n" for k in range(60))
    (lab.root / "reviews.csv").write_text(f"review,stars\n{reviews}")
    sections = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert {s[k]["name"].split(":")[0] for s in sections for k in s if ".py:" in s[k]["name"]} == set(files)
    for changed in sections:
        lab.run(fedsim.Experiment.from_tree({**lab.tree(), **changed}, lab.root))


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
        ("bare.py:Toy", "Toy is no frozen dataclass; put @dataclass"),
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
