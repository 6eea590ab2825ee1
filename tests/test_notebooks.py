"""The notebooks run from nothing to their last cell, and were committed as they ran."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ["quickstart", "local_vs_federated", "heterogeneity_sweep", "your_own_data", "compare_algorithms"]


def cells(notebook: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def images(notebook: dict[str, Any]) -> int:
    outputs = [out for cell in cells(notebook, "code") for out in cell["outputs"]]
    return sum("image/png" in out.get("data", {}) for out in outputs)


def execute(name: str, folder: Path, source: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a notebook in a folder of its own, where it finds no earlier runs."""
    import nbformat
    from nbclient import NotebookClient

    place = folder / "notebooks"
    place.mkdir()
    text = json.dumps(source) if source else (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(place)}}).execute()
    return notebook


def test_these_are_the_notebooks() -> None:
    assert sorted(f.stem for f in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_with_what_came_out(name: str) -> None:
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    code = cells(notebook, "code")
    assert 0 < len(code) < 15 and len(cells(notebook, "markdown")) >= len(code) / 2
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "from top to bottom, once"
    assert images(notebook) >= 2
    assert not any(out["output_type"] == "error" or out.get("name") == "stderr" for c in code for out in c["outputs"])


@pytest.mark.thorough
@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_a_notebook_runs_from_nothing(name: str, tmp_path: Path) -> None:
    done = execute(name, tmp_path)
    committed = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert images(done) == images(committed)
    runs = [f.parent for f in (tmp_path / "results" / "local").rglob("status.json")]
    assert runs and all(json.loads((r / "status.json").read_text())["state"] == "finished" for r in runs)


@pytest.mark.slow
@pytest.mark.parametrize("client", ["ward", None])
def test_your_own_data_takes_another_file(client: str | None, tmp_path: Path) -> None:
    """Other column names, other labels, quotes and commas in the text, with and without a column for the clients."""
    shutil.copytree(NOTEBOOKS, tmp_path / "source")
    notebook = json.loads((tmp_path / "source" / "your_own_data.ipynb").read_text(encoding="utf-8"))
    lines = ["note,triage,ward"]
    for i in range(240):
        word, label = [("calm", "later"), ("fever", "today"), ("collapse", "now")][i % 3]
        lines.append(f'"patient {i}, with ""{word}"" since noon",{label},ward {"ABC"[i * 7 % 3 if i % 5 else i % 3]}')
    (tmp_path / "notes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code = cells(notebook, "code")
    code[1]["source"] = f'CSV = "{tmp_path / "notes.csv"}"\nTEXT, LABEL, CLIENT = "note", "triage", {client!r}'
    done = execute("your_own_data", tmp_path, notebook)
    assert images(done) >= 3
