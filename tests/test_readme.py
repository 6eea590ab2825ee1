"""What the README and the documents show is what the files hold: experiment files, code, figures, benchmarks, versions."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_experiments_files import DOCUMENTS

from fedsim.config import yaml_text
from fedsim.config.experiment import Experiment
from fedsim.runs.build import prepare

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_experiment_file_shown_is_the_file() -> None:
    shown = re.findall(r"^<!-- file: (\S+) -->\n```yaml\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert [file for file, _ in shown] == ["experiments/lora_sentiment/tiny.yaml"]
    assert len(blocks(README, "yaml")) == 2, "the other one is a part of an experiment"
    for file, block in shown:
        assert block == (ROOT / file).read_text(encoding="utf-8"), f"copy {file} into the README again"
        mine, theirs = Experiment.from_tree(yaml_text.parse(block), ROOT), Experiment.load(ROOT / file)
        assert prepare(mine).run_id() == prepare(theirs).run_id()


def test_every_yaml_block_of_the_documents_is_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the files of the page on extensions lie
    for code in blocks((ROOT / "docs" / "extend.md").read_text(encoding="utf-8"), "python"):
        (tmp_path / code.split()[1]).write_text(code)
    for name in ("client.py", "model.py"):  # of the page on scripts
        (tmp_path / name).write_text("import fedsim.client\n")
    found = [(d.name, block) for d in DOCUMENTS for block in blocks(d.read_text(encoding="utf-8"), "yaml")]
    assert len(found) >= 3
    for document, block in found:
        tree = yaml_text.parse(block)
        assert Experiment.from_dict(tree).to_dict().keys() >= tree.keys(), document


def test_the_block_on_a_table_without_a_header_reads_one(tmp_path: Path) -> None:
    (block,) = (b for b in blocks(README, "yaml") if "ag_news" in b)
    for name, rows in (("train.csv", 200), ("test.csv", 8)):
        lines = [f'"{i % 4 + 1}","Title ""{i}""","Text, {i}"' for i in range(rows)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    parts = prepare(Experiment.from_tree(yaml_text.parse(block), tmp_path))
    assert parts.source.labels == ["World", "Sports", "Business", "Sci/Tech"] and len(parts.source.splits["test"]) == 8
    test = parts.source.splits["test"]
    assert [str(c + 1) for c in test.labels] == test.columns["label"]


def test_the_budget_is_said_as_central_match_sets_it() -> None:
    """By default the centralized model takes more optimizer steps than a client, so no budget is the same in every sense."""
    assert Experiment().central.match == "epochs"
    assert not re.search(r"same (budget|optimizer steps and)", README) and "`central.match`" in README


def test_the_python_blocks_run_on_a_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    block, in_memory = blocks(README, "python")
    words = {"up": "profit rose", "down": "profit fell"}
    rows = [f"{words[label]} in year {i},{label}" for i in range(60) for label in words]
    (tmp_path / "headlines.csv").write_text("text,sentiment\n" + "\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(block, scope)
    assert scope["run"].path.parent == Path("results/mine") and {"federated", "local"} <= set(scope["df"]["scope"])
    assert set(scope["df"]["data.columns.label"]) == {"sentiment"}
    capsys.readouterr()
    exec(in_memory, scope)
    assert capsys.readouterr().out.splitlines()[:2] == ["federated 1 2", "federated 2 2"]


def test_a_figures_caption_names_the_config_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_DATA", "/somewhere")
    figures = re.findall(r"!\[.*?\]\((results/reference/[^)]*)\)\n\n\*(.*?)\*\n", README, flags=re.DOTALL)
    assert len(figures) == 2
    for figure, caption in figures:
        folder = (ROOT / figure).parents[1]
        (file,) = re.findall(r"fedsim (?:run|sweep) (\S+\.yaml)", caption)
        (environment,) = re.findall(r"\((\S*environment\.json)\)", caption)
        assert json.loads((ROOT / environment).read_text())["versions"]["torch"]
        if (folder / "sweep.json").is_file():
            runs = {run["run"] for run in json.loads((folder / "sweep.json").read_text())["runs"]}
            assert Path(environment).parent.name in runs and f"({file})" in caption
            continue
        assert f"({folder.relative_to(ROOT)}/config.yaml)" in caption and (ROOT / environment).parent == folder
        made, now = (Experiment.load(f).identity() for f in (folder / "config.yaml", ROOT / file))
        assert {k: made[k] for k in now if k != "best"} == {k: v for k, v in now.items() if k != "best"}


def measured(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / "reference" / "benchmarks" / name / "results.json").read_text())


def case(name: str, **shape: Any) -> dict[str, Any]:
    (one,) = [c for c in measured(name)["cases"] if shape.items() <= c.items()]
    return one


def ratio(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} x ({values['min']:.2f} to {values['max']:.2f})"


def overhead(name: str) -> list[str]:
    value = measured(name)
    ours, plain, whole = (
        value["summary"]["fedsim, lanes: auto"],
        value["summary"]["plain loop"],
        value["whole_process_s"],
    )
    spread = ratio({"median": ours["ratio"], "min": min(ours["ratios"]), "max": max(ours["ratios"])})
    return [
        f"{ours['median']:.2f} s per round",
        f"{plain['median']:.2f} s",
        f"{spread}; whole process {whole['auto'] / whole['plain']:.2f} x",
    ]


def packing(name: str, lanes: int, **shape: Any) -> list[str]:
    sides = case(name, clients=lanes, **shape)["sides"]
    ours, plain = sides[f"lanes {lanes}"], sides["plain"]
    return [*(f"{side['tokens_per_s']['median']:,.0f} tokens/s" for side in (ours, plain)), ratio(ours["speed"])]


def tax() -> list[str]:
    sides = case("federation_tax", base="minilm", batch=1, clients=16)["sides"]
    ours = sides["federated, lanes auto"]
    beside = sides[ours["tax"]["beside"]]["seconds"]["median"]
    return [f"{ours['seconds']['median']:.2f} s", f"{beside:.2f} s (centralized, in fedsim)", ratio(ours["tax"])]


def clients() -> list[str]:
    few, many = (case("clients", clients=n, cohort=10)["outside"]["median"] * 1e3 for n in (1000, 1_000_000))
    (growth,) = [g["process_mb"] for g in measured("clients")["growth"] if g["cohort"] == 10]
    return [f"{few:.1f} ms and {many:.1f} ms per round outside training", "", f"+{growth:.0f} MB"]


def scripts() -> list[str]:
    value = measured("scripts")
    return [f"{value['ms_a_round']:.1f} ms per round", "", f"{value['mb_a_client']:.2f} MB per client"]


def test_the_benchmark_table_is_what_was_measured() -> None:
    table = re.search(r"^\| benchmark \|.*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].strip().splitlines()[2:]]
    expected = [
        overhead("overhead_phrasebank"),
        overhead("overhead_three_sites"),
        packing("packing", 32, base="tiny", batch=2),
        packing("packing_bases", 8, base="smollm2", batch=1),
        tax(),
        clients(),
        scripts(),
    ]
    assert [row[1:] for row in rows] == expected


def test_the_versions_shown_are_those_that_are_required() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    shown = re.findall(r"`((?:torch|transformers|peft|accelerate|datasets)>=[^`]*)`", README)
    assert shown == [r for r in required if re.match(r"(torch|transformers|peft|accelerate|datasets)\b", r)]
    assert f"Python {setup['options']['python_requires'].removeprefix('>=')} or later" in README
