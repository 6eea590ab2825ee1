"""What a run leaves behind beside metrics and models: trackers' files, predictions, the paired comparison."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim.config.experiment import Experiment
from fedsim.core.files import folder_names
from fedsim.runs.build import prepare
from fedsim.runs.trackers import Trackers, _name, by_round


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
def test_tensorboard_gets_one_step_per_round_and_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    exp = _exp(tmp_path, tracking={"with": ["tensorboard"]})
    path = fedsim.run(exp, progress=False).path
    log = EventAccumulator(str(path / "tensorboard" / "seed=0"))
    log.Reload()
    df = fedsim.load_runs(path)
    rows = df[(df["split"] == "validation") & (df["name"] == "accuracy")]
    for scope in ("federated", "central"):
        points, own = (
            log.Scalars(f"{scope}/validation/accuracy"),
            rows[(rows["scope"] == scope) & rows["client"].isna()],
        )
        assert [p.step for p in points] == [0, 1, 2]
        assert [p.value for p in points] == pytest.approx(own.groupby("round")["value"].last().tolist(), rel=1e-6)
    local = rows[(rows["scope"] == "local") & (rows["round"] == 2)].groupby("client")["value"].last()
    for name, value in (("mean", local.mean()), ("min", local.min()), ("max", local.max())):
        assert log.Scalars(f"local/validation/accuracy_{name}")[-1].value == pytest.approx(value, rel=1e-6)
    sent = df[(df["name"] == "bytes_up") & (df["round"] == 1)]["value"].sum()
    assert log.Scalars("federated/train/bytes_up")[0].value == sent
    assert set(log.Tags()["images"]) == {
        f"figures/{name}" for name in ("accuracy", "loss", "partition", "confusion", "clients")
    }
    assert not any("site-1" in tag for tag in log.Tags()["scalars"]) and len(log.Tags()["scalars"]) < 150


def _row(round: int, scope: str, client: str | None, split: str, name: str, value: float) -> dict[str, Any]:
    at = {"round": round, "step": 10 * round, "scope": scope, "client": client, "split": split, "name": name}
    return at | {"value": value, "weight": 1.0, "seconds": float(round)}


ROWS = [
    *[_row(0, "local", c, "validation", "loss", 9.0) for c in ("a", "b")],
    *[_row(1, "local", c, "validation", "loss", v) for c, v in (("a", 7.0), ("b", 4.0), ("a", 2.0))],
    *[_row(1, "local", c, "train", "tokens", v) for c, v in (("a", 5.0), ("b", 6.0))],
    _row(1, "local", "a", "validation", "predicted:x", 3.0),
    _row(1, "local", None, "run", "checkpoint_seconds", 0.5),  # of round 1, known in round 2
    *[_row(2, "local", c, "validation", "loss", v) for c, v in (("a", 1.0), ("b", 3.0))],
    _row(2, "local", "b", "fault", "dropped", 1.0),
    _row(2, "local", None, "run", "checkpoint_seconds", 0.7),
    _row(1, "local", "a", "test", "loss", 1.5),  # the best round's model
    _row(0, "federated", None, "validation", "loss", 9.0),
    _row(1, "federated", None, "validation", "loss", 8.0),
]


def test_rows_become_one_step_per_round() -> None:
    found = list(by_round(ROWS))
    assert [round for round, _ in found] == [0, 1, 2, 0, 1]
    assert found[1][1] == {
        **{"local/validation/loss_mean": 3.0, "local/validation/loss_min": 2.0, "local/validation/loss_max": 4.0},
        **{"local/train/tokens": 11.0, "local/seconds": 1.0},
    }
    assert found[2][1]["local/run/checkpoint_seconds"] == 0.7 and found[2][1]["local/fault/dropped"] == 1.0
    assert found[2][1]["local/test/loss_mean"] == 1.5
    assert found[4][1] == {"federated/validation/loss": 8.0, "federated/seconds": 1.0}
    each = list(by_round(ROWS, clients=True))[1][1]
    assert each["clients/local/validation/loss/a"] == 2.0 and each["clients/local/train/tokens/b"] == 6.0
    for names in (
        set(found[2][1]),
        set(each),
    ):  # MLflow makes a file of a name and folders of what is before its slashes
        assert not any(other.startswith(f"{name}/") for name in names for other in names)
    (late,) = by_round([_row(2, "local", None, "run", "checkpoint_seconds", 0.7), ROWS[-3]])
    assert late[0] == 2, "what comes alone after the last round is of that round"


def test_wandb_and_mlflow_are_called_once_per_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes with what accelerate calls of both; a resumed run goes on under its ids, and keeps its parameters."""
    from accelerate import PartialState

    PartialState._reset_state()  # as in a process of its own
    calls: list[tuple[Any, ...]] = []

    class Run:
        def __init__(self, id: str) -> None:
            self.id, self.info = id, SimpleNamespace(run_id=id)

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **keys: calls.append((f"wandb.{name}", *args, {k: v for k, v in keys.items() if v}))

    def init(**keys: Any) -> Run:
        calls.append(("wandb.init", {k: v for k, v in keys.items() if v}))
        return Run(keys.get("id") or "w1")

    def start_run(**keys: Any) -> Run:
        calls.append(("mlflow.start", {k: v for k, v in keys.items() if v}))
        return Run(keys.get("run_id") or "m1")

    wandb = SimpleNamespace(init=init, config=SimpleNamespace(update=lambda v, **_: calls.append(("wandb.config", v))))
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    mlflow = SimpleNamespace(
        search_experiments=lambda **_: [],
        create_experiment=lambda **keys: keys["name"],
        start_run=start_run,
        log_params=lambda values: calls.append(("mlflow.params", values)),
        log_metrics=lambda values, step: calls.append(("mlflow.log", values, step)),
        log_artifacts=lambda local_dir, artifact_path: calls.append(("mlflow.artifacts", local_dir, artifact_path)),
        end_run=lambda: calls.append(("mlflow.end",)),
        utils=SimpleNamespace(validation=limits),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    folder = tmp_path / "rates" / "abc"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "loss.png").touch()
    runs = [{"run": "abc", "settings": {"local.lr": 1e-5, "seed": 2}, "state": "running", "reason": None}]
    (folder.parent / "sweep.json").write_text(json.dumps({"name": "rates", "keys": [], "runs": runs}))
    config = {"seed": 2, "local": {"lr": 1e-5}}
    trackers = Trackers(["wandb", "mlflow"], "rates", folder, config)
    trackers.log(ROWS)
    name = "local.lr=1e-05 seed=2"
    assert calls[0] == ("wandb.init", {"project": "rates", "name": name, "group": "rates"})
    assert calls[1:3] == [("wandb.define_metric", "round", {}), ("wandb.define_metric", "*", {"step_metric": "round"})]
    assert ("wandb.config", {"seed": 2, "local.lr": 1e-5}) in calls
    assert next(call for call in calls if call[0] == "mlflow.start")[1]["run_name"] == name
    logged = [call for call in calls if call[0] == "wandb.log"]
    assert [values["round"] for _, values, _ in logged] == [0, 1, 2, 0, 1] and not any(keys for *_, keys in logged)
    assert [step for kind, *_, step in calls if kind == "mlflow.log"] == [0, 1, 2, 0, 1]
    trackers.close()
    state = {"rounds": {"local": 2, "federated": 1}, "name": name, "wandb": "w1", "mlflow": "m1"}
    assert trackers.state == state == json.loads(json.dumps(state))
    calls.clear()
    again = Trackers(["wandb", "mlflow"], "rates", folder, config, trackers.state)
    again.log([*ROWS[-2:], _row(2, "federated", None, "validation", "loss", 7.0)])
    (logged,) = [call[1] for call in calls if call[0] == "wandb.log"]
    assert (logged["round"], logged["federated/validation/loss"]) == (2, 7.0), "no round twice"
    again.log_figures(folder / "figures", 2)
    assert calls[0][1] == {"project": "rates", "name": name, "group": "rates", "id": "w1", "resume": "allow"}
    assert not any(call[0] in ("wandb.config", "mlflow.params") for call in calls), "set once"
    assert ("wandb.log_artifact", str(folder / "figures"), {"name": "figures-w1", "type": "figures"}) in calls
    assert ("mlflow.artifacts", str(folder / "figures"), "figures") in calls


def test_a_run_outside_a_sweep_is_named_by_what_varies(tmp_path: Path) -> None:
    config = {"seed": 0, "adapter": {"name": "lora", "r": 8}, "rounds": 2, "tracking": {"with": []}}
    for name, r in (("one", 8), ("two", 4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(json.dumps(config | {"adapter": {"name": "lora", "r": r}}))
        found = _name(tmp_path / name, config | {"adapter": {"name": "lora", "r": r}})
        assert found == {"one": "seed=0", "two": "adapter.r=4"}[name]


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
