"""Every committed experiment loads and prepares, and every command the documents show names what exists."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tiers import fast_only

from fedsim.config import json_schema
from fedsim.config.experiment import Experiment, read_yaml
from fedsim.core.errors import UserError
from fedsim.runs import sweep_plan
from fedsim.runs.build import Parts, prepare
from fedsim.runs.reproduce import Reproduction
from fedsim.runs.sweep import Sweep

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "docs" / "experiment.schema.json"
EVERY = sorted((ROOT / "experiments").rglob("*.yaml"))
REPRODUCED = [f for f in EVERY if f.name == "reproduce.yaml"]  # tests/test_reproduce.py
SWEEPS = [f for f in EVERY if f not in REPRODUCED and "experiment" in read_yaml(f)]
FILES = [f for f in EVERY if f not in REPRODUCED and f not in SWEEPS]
HOW_MANY = {
    "experiments": 24,
    "sweeps": 15,
    "reproduced": 3,
}  # change it with every file: a test that finds none must not pass
DOCUMENTS = [
    *(ROOT / n for n in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
]
EMBEDDED = Experiment.load(ROOT / "experiments" / "sft_instructions" / "tiny.yaml")  # instructions of our own words
PUBLISHED = [[6, 59, 25], [221, 525, 0], [19, 523, 433]]  # alpha 1, negative / neutral / positive by site


def on_embedded_parts(file: Path, tmp_path: Path) -> tuple[Experiment, Parts]:
    """The experiment as it is, and prepared with headlines for its data and tiny for its base where it has others.

    Instruction data sets are replaced by the small ones of the same formats, so that templates and partitions by source hold.
    """
    exp = Experiment.load(file)
    overrides = [f"results={tmp_path}"]
    if exp.data.name == "instructions":
        if exp.data.sources != EMBEDDED.data.sources:
            overrides.append(f"data.sources={json.dumps(EMBEDDED.data.sources)}")
    elif exp.data.name != "headlines":
        overrides.append("data.name=headlines")
    if exp.model.path != "tiny":
        overrides.append("model.path=tiny")
    return exp, prepare(Experiment.load(file, overrides))


def test_the_committed_schema_is_that_of_the_keys_and_of_the_sweeps() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == json_schema.text(), "run: fedsim schema > docs/experiment.schema.json"
    assert tuple(json_schema.schema()["$defs"]["Sweep"]["properties"]) == sweep_plan._KEYS


def test_every_file_names_the_schema_and_fits_it() -> None:
    valid = jsonschema.Draft7Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for file in EVERY:
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema="), (file, first)
        assert (file.parent / first.partition("=")[2]).resolve() == SCHEMA, file
        assert [e.message for e in valid.iter_errors(read_yaml(file))] == [], file


@fast_only(0, 4, 8, 11)
@pytest.mark.parametrize(
    ("tree", "fits"),
    [
        ({"local": {"learning_rate": 1}}, False),
        ({"rounds": 0}, False),
        ({"rounds": True}, False),
        ({"adapter": {"name": "lora", "rr": 3}}, False),
        ({"adapter": {"name": "loha", "r": 3}}, True),
        ({"partition": {"num_clients": 3}}, False),
        ({"partition": {"name": "iid", "num_clients": 3}}, True),
        ({"executor": {"workers": 2}}, True),
        ({"executor": {"workers": 0}}, False),
        ({"data": {"name": "table"}}, False),
        ({"data": {"name": "instructions", "sources": [{"format": "alpacca", "path": "a"}]}}, False),
        ({"tracking": {"with": ["wandb"]}}, True),
        ({"experiment": {"rounds": 0}}, False),
        ({"experiment": "a.yaml", "grids": {}}, False),
    ],
)
def test_the_schema_takes_what_the_config_takes(tree: dict[str, Any], fits: bool) -> None:
    assert jsonschema.Draft7Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).is_valid(tree) == fits
    sections = tree.get("experiment", tree)
    if isinstance(sections, dict):
        with contextlib.nullcontext() if fits else pytest.raises(UserError):
            Experiment.from_dict(sections)


def test_the_number_of_experiments_is_known() -> None:
    found = {"experiments": FILES, "sweeps": SWEEPS, "reproduced": REPRODUCED}
    assert {k: len(v) for k, v in found.items()} == HOW_MANY, [str(f.relative_to(ROOT)) for f in EVERY]


@pytest.mark.parametrize("file", SWEEPS, ids=[str(f.relative_to(ROOT / "experiments")) for f in SWEEPS])
def test_a_sweep_loads_and_its_runs_differ(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    plan = Sweep.load(file)
    assert len({e.to_yaml() for e in plan.experiments}) == len(plan.experiments) > 1
    assert plan.name != Experiment().name and not plan.path.is_absolute()


@fast_only(0, 9, 12, 15)
@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(ROOT / "experiments")) for f in FILES])
def test_an_experiment_loads_and_prepares(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    exp, parts = on_embedded_parts(file, tmp_path)
    assert exp.name != Experiment().name, "its runs have a folder of their own"
    assert not Path(exp.results).is_absolute() and str(ROOT) not in file.read_text(), "runs on any machine"
    splits = ["train", "validation", *(["test"] if getattr(exp.data, "test_rows", None) != 0 else [])]
    assert len(parts.clients) >= 2 and all(len(parts.tokens[s]) for s in splits)
    assert parts.report["rows"] == int(parts.partition.sizes.sum()) > 0
    assert not list(tmp_path.iterdir()), "preparing writes nothing"


@pytest.mark.parametrize("name", ["tiny.yaml", "smollm2.yaml"])
def test_lora_sentiment_divides_the_rows_as_published(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    _, parts = on_embedded_parts(ROOT / "experiments" / "lora_sentiment" / name, tmp_path)
    assert parts.report["class_counts"] == PUBLISHED
    assert parts.source.labels == ["negative", "neutral", "positive"]
    assert set(parts.exp.modes) == {"local", "federated", "central"}


def test_sft_instructions_has_one_client_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    for name in ("tiny.yaml", "smollm2.yaml", "full.yaml"):
        exp, parts = on_embedded_parts(ROOT / "experiments" / "sft_instructions" / name, tmp_path)
        assert parts.report["client_names"] == ["alpaca", "dolly", "oasst1"], name
        sizes = parts.partition.sizes.tolist()
        assert sizes == [320, 200, 72] and parts.report["class_counts"] == [[320, 0, 0], [0, 200, 0], [0, 0, 72]]
        assert parts.report["truncated"] == {} and parts.report["left_out"] == {}
        validated = parts.source.splits["validation"].columns["source"]
        few = exp.data.validation_rows is not None  # of 40, 25 and 9: 32.4, 20.3 and 7.3 of 60
        assert [validated.count(c) for c in parts.report["client_names"]] == ([33, 20, 7] if few else [40, 25, 9])
        assert exp.adapter.name == "none" and exp.algorithm.weights == "uniform" and exp.best.metric == "loss"


def test_the_small_instruction_sets_are_what_their_script_makes() -> None:
    folder = ROOT / "experiments" / "sft_instructions"
    made = runpy.run_path(str(folder / "make_data.py"))["make_all"]()
    assert sorted(made) == sorted(f.name for f in (folder / "data").iterdir())
    for name, text in made.items():
        assert (folder / "data" / name).read_text(encoding="utf-8") == text, f"{name}: run make_data.py again"


# ------------------------------------------------------------------------------------------------ documents


def _blocks(text: str) -> list[str]:
    """Lines of fenced blocks, and code spans, comments cut off."""
    fenced = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in fenced for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line.strip().removeprefix("$ ") for line in [*lines, *spans]]


def commands(program: str) -> list[tuple[str, list[str]]]:
    """(document, words after the program) of every whole command shown; words in capitals stand for the reader's own."""
    out = []
    for document in DOCUMENTS:
        if not document.is_file():
            continue
        for line in _blocks(document.read_text(encoding="utf-8")):
            words = shlex.split(line, comments=True) if line.startswith(f"{program} ") else []
            if len(words) > 1 and not any(re.fullmatch(r"\[?[A-Z]{3,}[\]. ]*", w) or w.startswith("[") for w in words):
                out.append((str(document.relative_to(ROOT)), words[1:]))
    return out


def test_the_readme_shows_the_two_setup_commands() -> None:
    shown = [words for document, words in commands("make") if document == "README.md"]
    assert ["demo"] in shown and ["test"] in shown


def test_every_make_command_shown_is_a_target() -> None:
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    for document, words in commands("make"):
        assert {w for w in words if "=" not in w and not w.startswith("-")} <= targets, (document, words)


def test_every_fedsim_command_shown_works_on_files_that_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    monkeypatch.chdir(ROOT)
    known = {
        "init",
        "config",
        "schema",
        "run",
        "sweep",
        "reproduce",
        "partition",
        "plot",
        "list",
        "diff",
        "doctor",
        "eval",
        "predict",
        "privacy",
        "script",
        "--help",
        "--install-completion",
    }
    shown = commands("fedsim")
    assert len(shown) >= 4, "the README shows how to run, partition, plot and list"
    for document, (command, *words) in shown:
        assert command in known, (document, command)
        files = [w for w in words if w.endswith((".yaml", ".yml"))]
        for file in files:
            assert file == "experiment.yaml" or (ROOT / file).is_file(), (
                f"{document}: {file} does not exist"
            )  # of fedsim init
        changes = [w for w in words if "=" in w and not w.startswith("-")]
        if (
            command in ("run", "sweep", "partition", "config")
            and files != ["experiment.yaml"]
            and "--explain" not in words
        ):
            assert len(files) == 1, (document, words)
            (Sweep if command == "sweep" else Experiment).load(files[0], changes)
        if command == "reproduce" and words:
            given = {key: words[words.index(f"--{key}") + 1] for key in ("size", "budget") if f"--{key}" in words}
            Reproduction.load(words[0], **given, overrides=changes)


def test_every_script_shown_exists() -> None:
    shown = commands("python") + commands(".venv/bin/python")
    for document, words in shown:
        for script in (w for w in words if w.endswith(".py")):
            assert (ROOT / script).is_file(), f"{document}: {script} does not exist"


def test_links_in_the_documents_lead_somewhere() -> None:
    checked = 0
    for document in (d for d in DOCUMENTS if d.is_file()):
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:"):
                checked += 1
                assert (document.parent / target).exists(), f"{document.relative_to(ROOT)}: {target} does not exist"
    assert checked >= 3


def test_notebooks_hold_no_paths_of_one_machine() -> None:
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        assert cells
        text = "".join("".join(cell["source"]) for cell in cells)
        assert not re.search(r"/(home|Users|work|tmp|root)/", text), notebook.name
