"""A user's own files: components that nobody registered, through lanes, pool, resume, sweeps and the command line."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_algorithms import POOL, SMALL
from test_equivalence import adapter_of
from test_readme import blocks
from tiers import fast_only

import fedsim
from fedsim.aggregators import AGGREGATORS, RULES
from fedsim.config import yaml_text
from fedsim.config.components import algorithm_of, component_of
from fedsim.config.experiment import components
from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.runs.build import prepare

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "extend.md").read_text(encoding="utf-8")
SHOWN = {code.split()[1]: code for code in blocks(DOCUMENT, "python")}  # the first line of each: `# FILE`
MORE_ALGORITHMS = """
from my_aggregator import TrimmedMean


@dataclass(frozen=True)
class Fixed(Algorithm):
    aggregates: ClassVar[dict] = {"update": TrimmedMean(0.34)}


@dataclass(frozen=True)
class Other(Algorithm):
    aggregates: ClassVar[dict] = {"other": "mean"}


@dataclass(frozen=True, kw_only=True)
class Open(Algorithm):
    mu: float


class Bare(Algorithm):
    mu: float = 1.0
"""
DEALT = """
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

class Callable:
    def __call__(self, labels, rng):
        return [labels]
"""
RECORDS = """
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
def mine(lab: Any) -> Path:
    """A folder of a user's files: those of docs/extend.md, and others that import modules beside them."""
    folder = lab.root / "mine"
    (folder / "pkg").mkdir(parents=True)
    files = {
        **SHOWN,
        "my_file.py": SHOWN["my_file.py"] + MORE_ALGORITHMS,
        "deal.py": DEALT,
        "records.py": RECORDS,
        "broken.py": "x = 1\ny = x / 0\n",
        "wrong.py": "def (:\n",
        "helpers.py": "def shares(numbers, count):\n    return [numbers[k::count] for k in range(count)]\n",
        "pkg/names.py": "from .words import WORDS\n\ndef of(k):\n    return WORDS[k]\n",
        "pkg/words.py": "WORDS = ['bad', 'flat', 'good']\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def command(lab: Any, mine: Path) -> Callable[..., Path]:
    """(command, tree, flags) -> folder of its run, from another directory than that of the YAML file."""
    env = {**os.environ, "PYTHONPATH": str(Path(fedsim.__file__).parent.parent), "OMP_NUM_THREADS": "1"}

    def call(what: str, tree: dict[str, Any], *flags: str) -> Path:
        file = mine / f"{tree['name']}.yaml"
        file.write_text(json.dumps(tree))
        argv = [sys.executable, "-m", "fedsim", what, str(file), *flags]
        done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=lab.root)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = (p for p in (lab.root / "results" / tree["name"]).iterdir() if (p / "config.yaml").is_file())
        return folder

    return call


@pytest.fixture
def run(lab: Any, command: Any) -> Callable[..., Path]:
    """(name, flags, keys) -> folder of a run."""
    return lambda name, *flags, **keys: command("run", lab.tree(**keys, name=name), *flags)


# ------------------------------------------------------------------------------------------------ runs


def test_the_examples_of_the_document_run(lab: Any) -> None:
    """docs/extend.md: each file that it shows, with the section below it."""
    for name, code in SHOWN.items():
        (lab.root / name).write_text(code)
    reviews = "".join(f"review {k} of a film,{k % 5 + 1}\n" for k in range(60))
    (lab.root / "reviews.csv").write_text(f"review,stars\n{reviews}")
    sections = [yaml_text.parse(block) for block in blocks(DOCUMENT, "yaml")]
    assert [s[k]["name"].split(":")[0] for s in sections for k in s] == list(SHOWN)
    for changed in sections:
        lab.run(fedsim.Experiment.from_tree({**lab.tree(), **changed}, lab.root))


def test_an_own_scaffold_gives_what_the_built_in_one_gives(lab: Any, distance: Any, run: Any) -> None:
    """With lanes, in a pool, resumed."""
    keys = {**SMALL, "algorithm": {"name": "my_file.py:MyScaffold", "server_lr": 0.7, "weights": "uniform"}}
    pool = {**keys, "executor": POOL}
    resumed = run("pool", "--resume", str(run("pool", **{**pool, "rounds": 2})), **pool)
    serial = run("serial", **keys)
    lab.same_bits(resumed, serial)
    builtin = lab.run(**{**keys, "name": "builtin", "algorithm": {**keys["algorithm"], "name": "scaffold"}})
    assert distance(adapter_of(serial / "global"), adapter_of(builtin / "global")) < 1e-12


def test_an_own_trimmed_mean_is_the_median_of_three(lab: Any, distance: Any, run: Any, mine: Path) -> None:
    """With lanes, in a pool, resumed; an algorithm may fix it, from a module beside its file."""
    keys: dict[str, Any] = {"evaluate": {"clients": False}, "modes": ["local", "federated"], "rounds": 1}
    own = {"aggregator": {"name": "my_aggregator.py:TrimmedMean", "trim": 0.34}}
    serial = run("serial", **keys, **own)
    alone = [adapter_of(serial / "local" / f"site-{k}") for k in (1, 2, 3)]
    median = {n: torch.stack([a[n] for a in alone]).median(dim=0).values for n in alone[0]}
    assert distance(adapter_of(serial / "global"), median) < 1e-12
    pool = {**keys, **own, "executor": POOL}
    resumed = run("pool", "--resume", str(run("pool", **pool)), **{**pool, "rounds": 2})
    lab.same_bits(resumed, run("two", **{**keys, **own, "rounds": 2}))
    lab.same_bits(lab.run(**keys, algorithm={"name": f"{mine}/my_file.py:Fixed"}, executor=POOL, name="fixed"), serial)


def test_an_own_partitioner_and_source_give_the_bits_of_the_built_in_ones(
    lab: Any, mine: Path, command: Any, run: Any
) -> None:
    """With lanes, in a pool, resumed, in a sweep."""
    plain = lab.tree()["data"]
    paths = {"path": plain["path"], "validation_path": plain["validation"]}
    keys = {
        "rounds": 2,
        "partition": {"name": "deal.py:Turns", "num_clients": 3, "order": "drawn"},
        "data": {"name": "records.py:Lines", **paths, "labels": plain["labels"], "test": 0},
    }
    pool = {**keys, "executor": POOL}
    resumed = run("pool", "--resume", str(run("pool", **{**pool, "rounds": 1})), **pool)
    serial = run("serial", **keys)
    lab.same_bits(resumed, serial)
    sweep = {"experiment": lab.tree(**keys), "name": "swept", "grid": {"seed": [3]}, "devices": ["cpu"], "workers": 2}
    lab.same_bits(command("sweep", sweep), serial)
    table = lab.tree(**{**keys, "name": "table", "data": {**plain, "test": 0}})
    lab.same_bits(lab.run(fedsim.Experiment.from_tree(table, mine)), serial)
    offsets, indices = (np.load(serial / "partition.npz")[name] for name in ("offsets", "indices"))
    drawn = stream(3, "partition").permutation(len(indices))
    assert all((indices[a:b] == drawn[k::3]).all() for k, (a, b) in enumerate(itertools.pairwise(offsets)))


# ------------------------------------------------------------------------------------------------ sections


@pytest.mark.parametrize(
    ("algorithm", "why"),
    [
        ("scaffold", None),
        ("Fixed", "aggregator.name: 'sum' has no use: algorithm.name=.*:Fixed fixes its aggregator"),
        ("Other", "aggregator.name: 'sum' has no use: algorithm.name=.*:Other sends no message group update"),
    ],
)
def test_an_aggregator_is_of_the_updates_of_an_algorithm_that_takes_their_mean(
    lab: Any, mine: Path, algorithm: str, why: str | None
) -> None:
    name = algorithm if why is None else f"{mine}/my_file.py:{algorithm}"
    keys = {"algorithm": {"name": name}, "aggregator": {"name": "sum"}}
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
    assert [*AGGREGATORS, *RULES] == [*AGGREGATORS, *list(components("aggregator"))[2:]]
    assert list(components("aggregator"))[:2] == ["mean", "sum"]


@pytest.mark.parametrize(
    ("section", "name", "field", "more"),
    [
        ("algorithm", "my_file.py:MyScaffold", "server_lr", {}),
        ("aggregator", "my_aggregator.py:TrimmedMean", "trim", {}),
        ("partition", "my_partition.py:Halves", "share", {}),
        ("data", "my_source.py:Reviews", "threshold", {"path": "reviews.csv"}),
    ],
)
def test_the_files_content_is_in_the_id_and_travels_as_it_was_read(
    lab: Any, mine: Path, section: str, name: str, field: str, more: dict[str, Any]
) -> None:
    file, wanted = name.split(":")

    def made(path: Path) -> Any:
        return lab.exp(**{section: {"name": f"{path}:{wanted}", **more}})

    exp = made(mine / file)
    before, held = exp.identity()[section], getattr(exp, section)
    assert before["name"].startswith(f"{wanted}@") and fedsim.Experiment.from_dict(exp.to_dict()) == exp
    other = mine / "other.py"
    other.write_text((mine / file).read_text())
    assert made(other).identity()[section] == before, "not where it lies"
    component, value = component_of(held), getattr(held, field)
    sent = pickle.dumps((component, held))
    (mine / file).write_text(re.sub(rf"( {field}: .*) = .*", r"\1 = 2", (mine / file).read_text()))
    assert made(mine / file).identity()[section] != before
    kept = fedsim.Experiment.from_tree(  # through interpolation, too
        {**exp.to_dict(), "name": "${adapter.name}"}, mine
    )
    assert kept.identity()[section] == before
    code = f"import pickle; made, held = pickle.loads({sent!r}); print(type(made).__name__, held.{field}, type(made).{field})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [wanted, str(value), str(value)], "the bytes that were read first, in every process"


def test_modules_beside_the_file_belong_to_it(mine: Path, lab: Any) -> None:
    """They are in the id, travel with the name, and do not meet others of that name, also where a function imports them."""
    keys = {"name": f"{mine}/deal.py:by_class"}
    exp = lab.exp(partition=keys)
    assert set(exp.partition.name.files) == {"deal.py", "helpers.py", "pkg/names.py", "pkg/words.py"}
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


# ------------------------------------------------------------------------------------------------ messages


@fast_only(0, 1, 3, 5, 6, 7, 9, 10, 11, 13, 14, 16, 18, 20, 21, 22, 25)
@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        ("algorithm", "nowhere.py:Toy", "algorithm.name: 'nowhere.py' cannot be read"),
        (
            "algorithm",
            "my_file.py:Tou",
            r"no class derived from fedsim\S+ named 'Tou'; it has MyScaffold, Fixed, Other",
        ),
        ("algorithm", "my_file.py:TrimmedMean", "named 'TrimmedMean'; it has MyScaffold, Fixed, Other"),
        ("algorithm", "broken.py:Toy", "broken.py, line 2: ZeroDivisionError: division by zero"),
        ("algorithm", "wrong.py:Toy", "wrong.py, line 1: SyntaxError"),
        ("algorithm", "my_file.py:Bare", "my_file.py: Bare is not a frozen dataclass; put @dataclass"),
        ("algorithm", "my_file.py:Open", "algorithm.mu: missing"),
        ("aggregator", "my_aggregator.py:Buffer", "no class with blockwise, .* named 'Buffer'; it has TrimmedMean"),
        ("aggregator", "deal.py:Bare", "no class with blockwise, .* named 'Bare'; see docs/extend.md"),
        ("partition", "deal.py:Bare", "no function, or class with __call__, named 'Bare'; it has Turns, by_class"),
        ("partition", "deal.py:Callable", "deal.py: Callable is not a frozen dataclass"),
        ("partition", "deal.py:Turns num_clients=x", "partition.num_clients: 'x' is not a whole number"),
        ("partition", "deal.py:Turns order=x", "partition.order: 'x' is not one of given, drawn"),
        ("partition", "deal.py:Turns clients=2", "unknown key partition.clients .*Valid keys: .*num_clients"),
        ("partition", "deal.py:by_class bad=range", "by_class gave 'site-1' example 60; there are 0 to 59"),
        ("partition", "deal.py:by_class bad=twice", r"by_class gave example 1 to 2 clients \(59 such examples\)"),
        ("partition", "deal.py:by_class bad=left", "by_class gave example 1 to no clients"),
        ("partition", "deal.py:by_class bad=kind", "by_class returned 7; return the example numbers"),
        ("partition", "deal.py:by_class bad=floats", "by_class gave 'site-1' .*give a list of whole numbers"),
        ("partition", "deal.py:by_class bad=raises", "deal.py, line 25: ZeroDivisionError"),
        ("data", "records.py:Lines path=x", "data.validation_path: missing"),
        ("data", "records.py:Lines path=x validation_path=x", "records.py, line 16: FileNotFoundError"),
        ("data", "records.py:columns kind=nothing", "columns .train.: the .* has no rows"),
        ("data", "records.py:columns kind=odd", "columns .train.: int holds no examples"),
        ("data", "records.py:columns kind=uneven", "columns .train.: columns have different lengths, 1, 20"),
        (
            "data",
            "records.py:columns kind=split",
            "columns returned the split 'dev'; splits are train, validation, test",
        ),
        ("data", "records.py:columns kind=labels", "the label column of 'columns' holds 1 different value"),
        ("data", "records.py:columns validation=0", "data.validation: .* of .columns. is left without an example"),
    ],
)
def test_what_is_wrong_with_a_component_is_one_line(
    lab: Any, mine: Path, monkeypatch: pytest.MonkeyPatch, section: str, keys: str, said: str
) -> None:
    monkeypatch.chdir(mine)
    name, *more = keys.split()
    held = {"name": name} | {key: 0 if value == "0" else value for key, value in (m.split("=") for m in more)}
    with pytest.raises(UserError, match=said) as caught:
        prepare(fedsim.Experiment.from_dict({**lab.tree(), section: held}))
    assert "\n" not in str(caught.value)
