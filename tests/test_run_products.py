"""What a run leaves behind beside metrics and models: trackers' files, predictions, the paired comparison."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim.build import prepare
from fedsim.config import Experiment
from fedsim.files import folder_names


def _exp(folder: Path, **keys: Any) -> Experiment:
    base: dict[str, Any] = {
        "name": "products",
        "results": str(folder),
        "rounds": 2,
        "partition": {"name": "iid", "num_clients": 2},
        "local": {"steps": 2, "batch_size": 8},
        "executor": {"name": "serial", "threads": 1},
    }
    return Experiment(**{**base, **keys})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fedsim.run(_exp(tmp_path_factory.mktemp("products")), progress=False).path


def test_the_comparison_is_that_of_the_predictions_row_by_row(run: Path) -> None:
    """Difference and standard error worked out again from the CSV, one row at a time."""
    with (run / "predictions.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    found = json.loads((run / "comparison.json").read_text())
    assert set(found) == {"central", "local site-1", "local site-2"}
    for name, told in found.items():
        pairs = [(r["federated"] == r["label"], r[name] == r["label"]) for r in rows]
        d = np.array([int(a) - int(b) for a, b in pairs], dtype=float)
        assert told["rows"] == len(rows) == 227
        assert told["difference"] == pytest.approx(d.mean())
        assert told["standard_error"] == pytest.approx(np.sqrt(((d - d.mean()) ** 2).sum() / (len(d) - 1) / len(d)))
        assert (told["only_federated"], told["only_other"]) == (int((d == 1).sum()), int((d == -1).sum()))


def test_the_test_score_is_that_of_the_predictions(run: Path) -> None:
    with (run / "predictions.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    df = fedsim.load_runs(run)
    scored = df[(df["split"] == "test") & (df["name"] == "accuracy")]
    assert len(scored) == 4, "two sites, the merged model and the central one, each once"
    merged = scored[scored["scope"] == "federated"]["value"].item()
    assert merged == pytest.approx(np.mean([r["federated"] == r["label"] for r in rows]))


def test_the_scores_by_row_add_up_to_the_metrics(run: Path) -> None:
    """Last models on the validation rows and chosen ones on the test rows, losses and predictions, each model's own."""
    df = fedsim.load_runs(run)
    with np.load(run / "scores.npz") as found:
        scores = {name: found[name] for name in found.files}
    names = list(scores["names"])
    assert sorted(names) == ["central", "federated", "local site-1", "local site-2"]
    seen = set()
    for split, kind, rows, tokens in (("validation", "last", 226, "tokens"), ("test", "chosen", 227, "test_tokens")):
        labels = scores[f"{split}_labels"]
        assert scores[f"{split}_rows"].tolist() == list(range(rows)) and set(labels) == {0, 1, 2}
        for i, name in enumerate(names):
            scope, client = ("local", name[6:]) if name.startswith("local ") else (name, None)
            told = df[(df["scope"] == scope) & (df["split"] == split) & (df["round"] > 0)]
            told = told[told["client"] == client] if client else told[told["client"].isna()]
            told = told.drop_duplicates("name", keep="last").set_index("name")["value"]
            loss = scores[f"{kind}_nll"][i].sum() / scores[tokens].sum()
            assert told["loss"] == pytest.approx(loss, rel=1e-6)
            assert told["accuracy"] == pytest.approx((scores[f"{kind}_predicted"][i] == labels).mean())
            seen.add(round(loss, 9))
    assert len(seen) == 8, "no two models score alike"
    with (run / "predictions.csv").open(newline="") as handle:
        table = list(csv.DictReader(handle))
    words = ["negative", "neutral", "positive"]
    for i, name in enumerate(names):
        assert [words[p] for p in scores["chosen_predicted"][i]] == [row[name] for row in table]


def test_scores_by_row_without_classes(lab: Any) -> None:
    """Free text has losses by row and no predictions; without test rows the chosen models have none."""
    data = {"labels": None, "template": "{label}: {sentence}", "test": 0.0}
    run = lab.run(data=data, modes=["federated"])
    with np.load(run / "scores.npz") as scores:
        assert scores["names"].tolist() == ["federated"] and (scores["last_predicted"] == -1).all()
        assert np.isfinite(scores["last_nll"]).all() and scores["chosen_nll"].shape == (1, 0)
        loss = scores["last_nll"].sum() / scores["tokens"].sum()
    assert lab.value(run, scope="federated", client=None, split="validation", name="loss", round=1) == pytest.approx(
        loss
    )
    assert not (run / "predictions.csv").exists()


def test_a_finished_run_without_figures_draws_them_again(run: Path) -> None:
    config = Experiment.load(run / "config.yaml")
    for file in (run / "figures").iterdir():
        file.unlink()
    (run / "figures").rmdir()
    assert fedsim.run(config, progress=False).path == run
    assert (run / "figures" / "accuracy.png").is_file()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_the_merged_models_scores(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    exp = _exp(tmp_path, modes=["federated"], tracking={"with": ["tensorboard"]})
    path = fedsim.run(exp, progress=False).path
    events = next((path / "tensorboard").rglob("events*"))
    log = EventAccumulator(str(events.parent))
    log.Reload()
    df = fedsim.load_runs(path)
    rows = df[df["client"].isna() & (df["split"] == "validation") & (df["name"] == "accuracy")]
    points = log.Scalars("federated/merged/validation/accuracy")
    assert [p.step for p in points] == rows["step"].tolist() == [0, 2, 4]
    assert [p.value for p in points] == pytest.approx(rows["value"].tolist(), rel=1e-6)


def test_keys_beside_a_name_hold_in_any_order(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("partition: {name: iid, num_clients: 3}\nadapter: {name: lora, r: 4}\n")
    names = ["partition.name=dirichlet", "adapter.name=p_tuning"]
    keys = ["partition.alpha=0.1", "partition.num_clients=7", "adapter.num_virtual_tokens=3"]
    for order in ([*names, *keys], [*keys, *names], [keys[0], *names, *keys[1:]]):
        exp = Experiment.load(file, order)
        assert (exp.partition.alpha, exp.partition.num_clients, exp.adapter.num_virtual_tokens) == (0.1, 7, 3)


def test_batches_follow_the_run_where_rows_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"instruction": f"say {i}", "response": "" if i % 7 == 0 else f"word {i}"} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    data = {"name": "table", "path": str(file), "template": "{instruction} {response}"}
    exp = _exp(tmp_path, data=data, local={"epochs": 1, "batch_size": 8})
    parts = prepare(exp)
    answers = parts.source.splits["train"].columns["response"]
    drawn = np.concatenate([b for client in (0, 1) for b in fedsim.batches(exp, client, 1)])
    assert sorted(drawn) == [i for i, a in enumerate(answers) if a], "each row with an answer once, no other"


def test_a_tsv_without_quoting_keeps_its_rows(tmp_path: Path) -> None:
    """A lone quotation mark is text: read as an opening quote it would swallow the rows up to the next one."""
    file = tmp_path / "glue.tsv"
    lines = [f'"start {i}\t{i % 2}' if i % 5 == 0 else f'said "x" {i}\t{i % 2}' for i in range(40)]
    file.write_text("\n".join(["text\tlabel", *lines]))
    from fedsim.data.sources import table

    source = table(path=str(file), validation=0.25, test=0, split_seed=0, labels=None, columns={}, needs_labels=True)
    texts = [t for s in source.splits.values() for t in s.columns["text"]]
    assert sorted(texts) == sorted(line.split("\t")[0] for line in lines)


NAMES = [
    *("site-1", "Klinik-Köln", "a.b", "-rf", "x" * 246, "best", "clients.json"),  # folders' names as they are
    *(
        "a/b",
        "a_b",
        "..",
        ".",
        "/",
        "north west",
        "x ",
        ".hidden",
        "x.",
        "a\0b",
        "a\0c",
        'CON<>:"|?*\\',
        "\n",
        "\N{BABY}",
    ),
    *("x" * 247, "x" * 250, "x" * 5000, "\u533b" * 90, "\u533b" * 91, "\U00020000" * 70, "\N{BABY}" * 70),
    *("Ko\u0308ln", "K\u00f6ln"),  # one name to a reader, two ids
    "a_b-c14cddc0",  # what "a/b" would be called
]


def test_each_client_has_a_folder_of_its_own_inside_the_run(tmp_path: Path) -> None:
    names = folder_names(NAMES)
    assert sorted(names) == sorted(NAMES)
    assert len(set(names.values())) == len(NAMES)
    assert [names[n] for n in (*NAMES[:7], "a_b", "a_b-c14cddc0", "K\u00f6ln")] == [
        *(*NAMES[:7], "a_b", "a_b-c14cddc0", "K\u00f6ln")
    ]
    assert names["north west"] == "north_west-" + hashlib.sha256(b"north west").hexdigest()[:8], (
        "as in earlier versions"
    )
    for name in names.values():
        beside = tmp_path / f".{name}.{4194304}"  # the largest pid
        beside.mkdir()
        place = beside.replace(tmp_path / name)
        assert place.parent == tmp_path and place.is_dir() and not name.startswith(".")
    assert len(list(tmp_path.iterdir())) == len(NAMES)
