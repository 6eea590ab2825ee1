"""Comparing run folders: differences of a known kind in each part, and real runs."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from tiers import fast_only

import fedsim
from fedsim.analysis.diff import Difference, diff_runs
from fedsim.cli.main import main
from fedsim.core.errors import UserError
from fedsim.data.partition import Partition, VirtualPartition

PARTS = ["config", "plan", "partition", "metrics", "models", "predictions", "scores"]
CONFIG: dict[str, Any] = {
    "name": "synthetic",
    "seed": 0,
    "modes": ["local", "federated"],
    "rounds": 3,
    "results": "results",
    "data": {"name": "table", "path": "/data/rows.csv", "columns": {}},
    "local": {"steps": 2, "lr": 0.001, "betas": [0.9, 0.98], "micro_batch": None},
    "evaluate": {"every_steps": None, "every_rounds": 1, "clients": True},
    "training": {"lanes": "auto"},
    "executor": {"name": "serial", "threads": 1},
    "checkpoint": {"every": 1, "keep": 2},
    "tracking": {"with": []},
}
PLAN = {"threads": 1, "packed": True, "lanes": 2, "micro_batch": 4, "checkpointing": False, "halved": []}
ROWS = 20 + 23  # of `metrics_rows` that are compared: alone and federated, less the three that are measured
NAMES = ["federated", "local site-1", "local site-2"]


def metric(
    round: int,
    step: int | None,
    scope: str,
    client: str | None,
    split: str,
    name: str,
    value: float,
    weight: float = 1.0,
) -> dict[str, Any]:
    key = {"round": round, "step": step, "scope": scope, "client": client, "split": split, "name": name}
    return {**key, "value": value, "weight": weight, "seconds": 0.5 * round}


def metrics_rows() -> list[dict[str, Any]]:
    """Two sites alone and merged, three rounds of two steps, in the order in which a run writes them."""
    out = []
    for scope in ("local", "federated"):
        out.append(metric(0, 0, scope, "site-1" if scope == "local" else None, "validation", "accuracy", 0.25, 8.0))
        for number in (1, 2, 3):
            for site in ("site-10", "site-2"):
                out.append(metric(number, 2 * number, scope, site, "train", "loss", 2.0 / number))
                out.append(metric(number, 2 * number, scope, site, "train", "computed_tokens", 64.0))
                out.append(metric(number, 2 * number, scope, site, "validation", "accuracy", 0.25 * number, 8.0))
            if scope == "federated":
                out.append(metric(number, 2 * number, scope, None, "validation", "accuracy", 0.25 * number, 8.0))
                out.append(metric(number, 2 * number, scope, None, "train", "checkpoint_seconds", 0.01))
        out.append(metric(2, 4, scope, "site-2" if scope == "local" else None, "test", "accuracy", 0.5, 4.0))
    return out


def tensors(shift: float = 0.0) -> dict[str, np.ndarray]:
    return {"a.weight": np.array([[3.0, 4.0]]) + shift, "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder like the others, but for what is given."""

    def one(
        name: str,
        config: dict[str, Any] | None = None,
        rows: Sequence[dict[str, Any]] | None = None,
        plan: dict[str, Any] | None = None,
        partition: Any = None,
        predicted: Sequence[str] = ("up", "down"),
        **arrays: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        tree = json.loads(json.dumps(CONFIG))
        for key, value in (config or {}).items():
            section, _, last = key.rpartition(".")
            (tree[section] if section else tree)[last] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        lines = [json.dumps(row) + "\n" for row in (metrics_rows() if rows is None else rows)]
        (folder / "metrics.jsonl").write_text("".join(lines))
        (folder / "plan.json").write_text(json.dumps({**PLAN, **(plan or {})}))
        (folder / "status.json").write_text(json.dumps({"state": "finished"}))
        held = Partition(np.array([0, 2, 5]), np.array([0, 3, 1, 2, 4])) if partition is None else partition
        np.savez(folder / "partition.npz", **held.to_arrays())
        for place in ("global", "best", "local/site-2", "local/site-2/best", "local/site-10"):
            (folder / place).mkdir(parents=True)
            save_file(tensors(), folder / place / "adapter_model.safetensors")
        with (folder / "predictions.csv").open("w", newline="") as handle:
            csv.writer(handle).writerows(
                [["row", "label", *NAMES], [5, "up", "up", *predicted], [7, "up", "up", "up", "up"]]
            )
        scores = {
            "names": np.array(NAMES),
            **{"validation_rows": np.array([2, 4]), "test_rows": np.array([5, 7])},
            **{"last_nll": np.array([[1.0, np.nan]] * 3), "chosen_nll": np.array([[1.0, 2.0]] * 3)},
            "last_predicted": np.zeros((3, 2), dtype=np.int16),
        }
        np.savez(folder / "scores.npz", **{**scores, **arrays})
        return folder

    return one


@pytest.fixture
def pair(write: Callable[..., Path]) -> tuple[Path, Path]:
    return write("a"), write("b")


def differing(found: Difference) -> list[str]:
    """The parts that do not agree; all of them are there, in their order, and the whole says what the parts say."""
    assert [name for name, _, _ in found.parts] == PARTS
    assert found.agree == all(agrees for _, agrees, _ in found.parts) == (found.first is None)
    return [name for name, agrees, _ in found.parts if not agrees]


def text(found: Difference, part: str) -> str:
    return {name: words for name, _, words in found.parts}[part]


def changed(where: dict[str, Any], **new: Any) -> list[dict[str, Any]]:
    """The metrics rows with those that have these columns changed; at least one does."""
    rows = metrics_rows()
    hit = [row for row in rows if where.items() <= row.items()]
    assert hit
    for row in hit:
        row.update(new)
    return rows


# ------------------------------------------------------------------------------------------------------ agreement


def test_equal_folders_agree_whatever_is_measured(write: Callable[..., Path]) -> None:
    rows = [{**row, "seconds": 9.0} for row in changed({"name": "checkpoint_seconds"}, value=7.0)]
    rows.append(metric(3, 6, "federated", None, "train", "peak_memory_bytes", 1e9))
    other = {"name": "again", "results": "/elsewhere", "executor.name": "pool", "executor.workers": 3}
    other |= {"checkpoint.every": 5, "tracking.with": ["tensorboard"]}
    found = diff_runs(write("a"), write("b", config=other, rows=rows[::-1]))
    assert differing(found) == [] and found.first is None
    assert text(found, "metrics") == f"{ROWS} metrics agree"
    assert text(found, "models") == "10 tensors of 5 models"
    assert text(found, "plan") == "threads 1, lanes 2, micro_batch 4"


def test_simulated_seconds_are_compared(write: Callable[..., Path]) -> None:
    one, other = ([metric(1, 2, "federated", None, "train", "simulated_seconds", v)] for v in (1.0, 2.0))
    found = diff_runs(write("a", rows=one), write("b", rows=other))
    assert differing(found) == ["metrics"] and found.first["name"] == "simulated_seconds"


def test_nan_equals_nan_and_nothing_else(write: Callable[..., Path]) -> None:
    last = {"round": 3, "scope": "federated", "client": None, "split": "validation"}
    both = [write(name, rows=changed(last, value=math.nan, weight=math.inf)) for name in "ab"]
    assert differing(diff_runs(*both)) == []
    found = diff_runs(both[0], write("c", rows=changed(last, value=0.75, weight=math.inf)), rtol=0.5, atol=10.0)
    assert differing(found) == ["metrics"]
    assert math.isnan(found.first["a"]) and found.first["b"] == 0.75 and found.first["relative"] == math.inf


# ---------------------------------------------------------------------------------------------------------- config


def test_config_keys_that_differ_are_named(write: Callable[..., Path]) -> None:
    found = diff_runs(write("a"), write("b", config={"local.lr": 0.002, "local.betas": [0.9, 0.99], "local.new": True}))
    assert differing(found) == ["config"]
    assert found.first == {"part": "config", "key": "local.lr", "a": 0.001, "b": 0.002}
    said = "3 keys differ: local.lr 0.001 / 0.002, local.betas [0.9, 0.98] / [0.9, 0.99], local.new (no key) / true"
    assert text(found, "config") == said


def test_paths_are_said_where_the_ids_say_that_the_content_is_the_same(write: Callable[..., Path]) -> None:
    moved = {"data.path": "/mnt/rows.csv"}
    one, same, other = write("x/0123456789ab"), write("y/0123456789ab", config=moved), write("other", config=moved)
    found = diff_runs(one, same)
    assert differing(found) == [] and text(found, "config") == "data.path /data/rows.csv / /mnt/rows.csv"
    assert diff_runs(one, other).first["key"] == "data.path"
    edited = write("z/0123456789ab", config={"seed": 1})  # a config that its id does not belong to
    assert diff_runs(one, edited).first["key"] == "seed"


def test_common_rounds_are_compared_where_rounds_differ(write: Callable[..., Path]) -> None:
    two = [r for r in metrics_rows() if r["round"] < 3 and r["split"] != "test"]
    # The last round of the shorter run and a chosen model are scored there only; a model of round 1 has test rows.
    two += [metric(2, 4, "federated", "site-2", "site", "accuracy", 0.5)]
    two += [metric(1, 2, "federated", None, "test", "accuracy", 0.3)]
    short = write("short", config={"rounds": 2}, rows=two)
    shutil.rmtree(short / "global")
    (short / "scores.npz").unlink()
    found = diff_runs(write("long"), short)
    assert differing(found) == []
    assert text(found, "config") == "rounds 3 / 2: rounds up to 2 are compared"
    assert text(found, "metrics") == "28 metrics agree; 2 only in a, not compared; 2 only in b, not compared"
    assert all("not compared" in text(found, part) for part in ("models", "predictions", "scores"))
    # A row of training of a common round is in both or they differ.
    lost = [r for r in two if (r["round"], r["client"], r["name"]) != (2, "site-10", "loss")]
    found = diff_runs(write("whole"), write("lost", config={"rounds": 2}, rows=lost))
    assert differing(found) == ["metrics"] and "2 only in a;" in text(found, "metrics")
    assert (found.first["round"], found.first["client"], found.first["only"]) == (2, "site-10", "a")


def test_rows_that_both_have_are_compared_with_another_evaluation_frequency(write: Callable[..., Path]) -> None:
    sparse = {"evaluate.every_rounds": 3, "evaluate.clients": False}
    few = [r for r in metrics_rows() if r["split"] == "train" or r["round"] in (0, 3)]
    one, other = write("a"), write("b", config=sparse, rows=few, chosen_nll=np.zeros((3, 2)))
    save_file(tensors(1.0), other / "best" / "adapter_model.safetensors")
    save_file(tensors(1.0), other / "local/site-2/best" / "adapter_model.safetensors")
    found = diff_runs(one, other)
    assert differing(found) == []
    said = "evaluate.every_rounds 1 / 3, evaluate.clients true / false: metrics that both have are compared"
    assert text(found, "config") == said
    assert text(found, "metrics") == f"{len(few) - 3} metrics agree; 12 only in a, not compared"
    assert "6 tensors of 3 models" in text(found, "models") and "chosen models" in text(found, "models")
    save_file(tensors(1.0), other / "local/site-10" / "adapter_model.safetensors")
    assert differing(diff_runs(one, other)) == ["models"]
    # What training says of itself does not hang on where models are scored.
    lost = [r for r in few if (r["round"], r["scope"], r["client"], r["name"]) != (2, "federated", "site-2", "loss")]
    found = diff_runs(one, write("lost", config=sparse, rows=lost))
    assert "1 only in a; 12 only in a, not compared" in text(found, "metrics")
    key = {"round": 2, "scope": "federated", "client": "site-2", "split": "train", "name": "loss", "only": "a"}
    assert key.items() <= found.first.items()
    few[0]["value"] += 1.0
    found = diff_runs(one, write("c", config=sparse, rows=few))
    assert differing(found) == ["metrics"] and (found.first["a"], found.first["b"]) == (0.25, 1.25)


# ------------------------------------------------------------------------------------------------ plan and partition


def test_another_plan_is_said_and_is_no_difference(write: Callable[..., Path]) -> None:
    rows = changed({"name": "computed_tokens"}, value=80.0)
    keys = {"training.lanes": 1, "local.micro_batch": 2}
    other = write("b", config=keys, plan={"lanes": 1, "threads": 2, "packed": False}, rows=rows)
    found = diff_runs(write("a"), other)
    assert differing(found) == []
    assert text(found, "plan") == "threads 1 / 2; packed true / false; lanes 2 / 1: the last bits may differ"
    assert "training.lanes auto / 1" in text(found, "config")
    assert "computed_tokens not compared" in text(found, "metrics")
    found = diff_runs(write("c"), write("d", plan={"threads": 2}, rows=rows))
    assert differing(found) == ["metrics"], "threads do not decide how many tokens are computed"
    (other / "plan.json").write_text("{")
    assert text(diff_runs(other, other), "plan") == "no plan.json in a and b"


def test_other_versions_and_kinds_of_device_are_said(pair: tuple[Path, Path]) -> None:
    for folder, torch, devices in zip(pair, ("2.1", "2.2"), (["cpu"], ["cuda:0", "cuda:1"]), strict=True):
        about = {"versions": {"torch": torch}, "cpu": "one kind", "devices": devices}
        (folder / "environment.json").write_text(json.dumps(about))
    found = diff_runs(*pair)
    assert differing(found) == []
    assert text(found, "plan") == "torch 2.1 / 2.2; device cpu / cuda: the last bits may differ"


def test_a_device_that_promises_nothing_is_said(pair: tuple[Path, Path]) -> None:
    (pair[0] / "environment.json").write_text(json.dumps({"deterministic": {"promised": True}}))
    assert "promise" not in text(diff_runs(*pair), "plan")
    (pair[1] / "environment.json").write_text(json.dumps({"deterministic": {"promised": False}}))
    found = diff_runs(*pair)
    assert differing(found) == [] and text(found, "plan").endswith("see environment.json")


def test_rows_scored_at_once_are_said_and_are_no_difference_by_themselves(write: Callable[..., Path]) -> None:
    one, other = write("a", config={"evaluate.batch_size": 64}), write("b", config={"evaluate.batch_size": 8})
    found = diff_runs(one, other)
    assert differing(found) == [] and text(found, "config") == "evaluate.batch_size 64 / 8"


def test_long_lists_of_rows_are_cut_where_they_are_shown(write: Callable[..., Path]) -> None:
    one, other = (Partition(np.array([0, 30]), np.arange(30) + shift) for shift in (0, 1))
    found = diff_runs(write("a", partition=one), write("b", partition=other))
    assert found.first["b"] == list(range(1, 31))
    assert f"  b  {list(range(1, 21))} and 10 more" in str(found).splitlines()


def test_the_first_client_that_holds_other_rows(write: Callable[..., Path]) -> None:
    offsets = np.array([0, 2, 4, 6])
    one = write("a", partition=Partition(offsets, np.arange(6), names=("x", "y", "z")))
    moved = write("b", partition=Partition(offsets, np.array([0, 1, 2, 4, 3, 5]), names=("x", "y", "z")))
    found = diff_runs(one, moved)
    assert differing(found) == ["partition"]
    assert found.first == {"part": "partition", "client": "y", "a": [2, 3], "b": [2, 4]}
    assert text(found, "partition") == "2 of 3 clients have other examples, the first is y"
    renamed = write("c", partition=Partition(offsets, np.arange(6), names=("x", "y", "w")))
    assert diff_runs(one, renamed).first["client"] == "z / w"
    fewer = write("d", partition=Partition(offsets[:3], np.arange(4), names=("x", "y")))
    assert diff_runs(one, fewer).first == {"part": "partition", "client": "z", "only": "a"}


def test_virtual_partitions_differ_by_what_their_rows_are_a_function_of(write: Callable[..., Path]) -> None:
    made = [VirtualPartition(key, clients, 1, 3, np.arange(50)) for key, clients in ((1, 9), (1, 9), (2, 9), (1, 12))]
    folders = [write(f"v{i}", partition=p) for i, p in enumerate(made)]
    assert differing(diff_runs(folders[0], folders[1])) == []
    first = diff_runs(folders[0], folders[2]).first
    number = next(c for c in range(9) if not np.array_equal(made[0].rows(c), made[2].rows(c)))
    assert first["client"] == f"site-{number + 1}" and first["a"] == made[0].rows(number).tolist()
    assert diff_runs(folders[0], folders[3]).first == {"part": "partition", "client": "site-10", "only": "b"}


# --------------------------------------------------------------------------------------------------------- metrics


def test_the_first_row_in_the_order_of_rounds_scopes_and_clients(write: Callable[..., Path]) -> None:
    one = write("a")
    late = {"round": 2, "scope": "federated", "client": None, "split": "validation"}
    found = diff_runs(one, write("b", rows=changed(late, value=0.625)))
    assert differing(found) == ["metrics"]
    key = {"part": "metrics", "round": 2, "scope": "federated", "client": None, "step": 4, "split": "validation"}
    assert found.first == {**key, "name": "accuracy", "column": "value", "a": 0.5, "b": 0.625, "relative": 0.2}
    assert f"1 of {ROWS} metrics differ; largest relative difference (metrics): accuracy 0.2 (1)" in text(
        found, "metrics"
    )

    rows = changed({"round": 2, "scope": "federated"}, value=9.0)
    found = diff_runs(one, write("c", rows=rows))
    first = [found.first[k] for k in ("client", "split", "name")]
    assert first == ["site-2", "train", "computed_tokens"], "site-2 before site-10 before the merged model"
    rows = changed({"round": 3, "scope": "local", "client": "site-10"}, value=9.0)
    rows[-2]["value"] = 9.0  # the last round of the merged model
    assert diff_runs(one, write("d", rows=rows)).first["scope"] == "local"


def test_test_rows_come_after_the_rows_that_chose_their_model(write: Callable[..., Path]) -> None:
    later = {"round": 3, "scope": "federated", "client": None, "split": "validation"}
    rows = changed(later, value=0.1)
    where = {"scope": "federated", "split": "test"}
    (test,) = [row for row in rows if where.items() <= row.items()]
    test |= {"round": 1, "step": 2}
    found = diff_runs(write("a"), write("b", rows=rows))
    assert (found.first["round"], found.first["split"]) == (3, "validation")
    assert "1 only in a; 1 only in b" in text(found, "metrics")
    only_test = diff_runs(write("c"), write("d", rows=changed(where, round=1, step=2)))
    assert (only_test.first["round"], only_test.first["only"], only_test.first["b"]) == (1, "b", 0.5)


def test_weights_are_compared_and_the_largest_difference_is_by_name(write: Callable[..., Path]) -> None:
    rows = changed({"name": "accuracy", "round": 1, "client": "site-2"}, weight=10.0)
    for row, factor in zip([r for r in rows if r["name"] == "loss"], (1.5, 2.0, 1.0), strict=False):
        row["value"] *= factor
    found = diff_runs(write("a"), write("b", rows=rows))
    assert f"4 of {ROWS} metrics differ" in text(found, "metrics")
    assert "loss 0.5 (2), accuracy 0.2 (2)" in text(found, "metrics")
    only_weight = diff_runs(write("c"), write("d", rows=changed({"split": "test"}, weight=8.0)))
    assert only_weight.first["column"] == "weight" and (only_weight.first["a"], only_weight.first["b"]) == (4.0, 8.0)


def test_tolerances(write: Callable[..., Path]) -> None:
    one, other = write("a"), write("b", rows=changed({"name": "loss", "round": 1}, value=2.0 + 1e-6))
    save_file(tensors(1e-6), other / "global" / "adapter_model.safetensors")
    assert differing(diff_runs(one, other)) == ["metrics", "models"]
    for tolerance in ({"rtol": 1e-6}, {"atol": 2e-6}):
        found = diff_runs(one, other, **tolerance)
        assert differing(found) == [] and "within the tolerance" in text(found, "metrics")
    assert differing(diff_runs(one, other, rtol=1e-7)) == ["metrics", "models"]
    for bad in (-1e-6, math.nan, math.inf):
        with pytest.raises(UserError, match="rtol.*no tolerance"):
            diff_runs(one, other, rtol=bad)


def test_a_torn_last_line_is_left_out_and_said(write: Callable[..., Path]) -> None:
    one, other = write("a", rows=metrics_rows()[:-1]), write("b")
    whole = (other / "metrics.jsonl").read_text().rstrip("\n")
    (other / "metrics.jsonl").write_text(whole[:-10])
    found = diff_runs(one, other)
    assert differing(found) == [] and "torn" in text(found, "metrics")
    assert diff_runs(write("c"), other).first["only"] == "a"
    (other / "metrics.jsonl").write_text(whole[:-10] + "\n" + whole)
    with pytest.raises(UserError, match=r"metrics.jsonl, line \d+: not JSON"):
        diff_runs(one, other)


def test_a_row_that_is_there_twice_is_a_difference_unless_both_have_it(write: Callable[..., Path]) -> None:
    rows = metrics_rows()
    twice = [*rows, rows[2]]
    found = diff_runs(write("a"), write("b", rows=twice))
    assert differing(found) == ["metrics"] and "1 metric in b more than once" in text(found, "metrics")
    assert found.first["repeated"] and found.first["only"] == "b"
    assert (found.first["round"], found.first["client"], found.first["name"]) == (1, "site-10", "computed_tokens")
    assert differing(diff_runs(write("c", rows=twice), write("d", rows=[rows[2], *rows]))) == []


def test_runs_without_a_row(write: Callable[..., Path]) -> None:
    empty = write("empty", rows=[])
    assert differing(diff_runs(empty, empty)) == []
    found = diff_runs(empty, write("full"))
    assert found.first["only"] == "b" and found.first["round"] == 0


# ---------------------------------------------------------------------------------------------------------- models


def test_the_first_tensor_and_the_largest_difference_of_norms(pair: tuple[Path, Path]) -> None:
    a, b = pair
    save_file({**tensors(), "a.weight": np.array([[3.0, 4.0 + 5.0]])}, b / "local/site-2" / "adapter_model.safetensors")
    save_file(tensors(1e-3), b / "local/site-10" / "adapter_model.safetensors")
    found = diff_runs(a, b)
    assert differing(found) == ["models"]
    assert found.first["model"] == "local/site-2" and found.first["tensor"] == "a.weight"
    # || (3, 4) - (3, 9) || = 5, the larger norm is that of (3, 9).
    assert found.first["relative"] == pytest.approx(5 / math.sqrt(90), rel=1e-15)
    assert text(found, "models") == "2 of 10 tensors differ; largest relative difference 0.53"
    save_file({**tensors(), "a.weight": np.array([[3.0, np.nan]])}, b / "global" / "adapter_model.safetensors")
    found = diff_runs(a, b, rtol=0.9)
    assert (found.first["model"], found.first["relative"]) == ("global", math.inf)


def test_tensors_and_models_that_one_run_lacks_and_other_shapes(pair: tuple[Path, Path]) -> None:
    a, b = pair
    shutil.rmtree(a / "local/site-10")
    found = diff_runs(a, b)
    assert found.first == {"part": "models", "model": "local/site-10", "tensor": "a.weight", "only": "b"}
    assert text(found, "models") == "8 tensors of 5 models; 2 tensors only in b"
    save_file({"a.weight": np.zeros((2, 1)), "b.weight": np.zeros((2, 3))}, b / "global" / "adapter_model.safetensors")
    first = diff_runs(a, b).first
    assert (first["tensor"], first["a"], first["b"]) == ("a.weight", "F64 [1, 2]", "F64 [2, 1]")
    for place in ("global", "best", "local"):
        shutil.rmtree(a / place)
    assert differing(diff_runs(a, b)) == ["models"]
    assert text(diff_runs(a, a), "models") == "neither run has any"


def test_shards_are_compared_as_one_file(pair: tuple[Path, Path]) -> None:
    whole = tensors()
    for folder, first in zip(pair, ("a.weight", "b.weight"), strict=True):
        (folder / "global" / "adapter_model.safetensors").unlink()
        second = next(n for n in whole if n != first)
        for i, name in enumerate((first, second), start=1):
            save_file({name: whole[name]}, folder / "global" / f"model-{i:05d}-of-00002.safetensors")
    assert differing(diff_runs(*pair)) == []


def write_raw(file: Path, **given: tuple[str, list[int], bytes]) -> None:
    """A safetensors file by its definition: length of the header, header, bytes."""
    header, body = {}, b""
    for name, (dtype, shape, raw) in given.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_types_that_numpy_lacks(pair: tuple[Path, Path]) -> None:
    # The upper halves of the float32 numbers 3 and 4, and of 3 and 5; || (0, 1) || / || (3, 5) ||.
    bf16 = [np.array(v, dtype=np.float32).view(np.uint32) >> 16 for v in ([3.0, 4.0], [3.0, 5.0])]
    for folder, raw in zip(pair, bf16, strict=True):
        write_raw(folder / "global" / "model.safetensors", w=("BF16", [2], raw.astype("<u2").tobytes()))
    found = diff_runs(*pair)
    assert found.first["tensor"] == "w" and found.first["relative"] == pytest.approx(1 / math.sqrt(34), rel=1e-15)
    assert differing(diff_runs(*pair, rtol=0.2)) == []
    for folder, byte in zip(pair, (b"\x01\x02", b"\x01\x03"), strict=True):
        write_raw(folder / "global" / "model.safetensors", w=("F8_E4M3", [2], byte), empty=("F32", [0], b""))
    found = diff_runs(*pair)
    assert found.first["relative"] is None and "other bytes" in found.first["a"] and "F8_E4M3 [2]" in str(found)
    assert differing(diff_runs(pair[0], pair[0])) == []


def test_the_same_numbers_in_other_bits_agree_and_whole_numbers_are_exact(pair: tuple[Path, Path]) -> None:
    def put(*values: np.ndarray) -> None:
        for folder, value in zip(pair, values, strict=True):
            save_file({"n": value}, folder / "global" / "model.safetensors")

    quiet = np.array([0x7FF8000000000000, 0x7FF8000000000001], dtype=np.uint64).view(np.float64)
    put(np.array([0.0, quiet[0]]), np.array([-0.0, quiet[1]]))
    assert differing(diff_runs(*pair)) == []
    put(np.array([2**60]), np.array([2**60 + 1]))  # the same float64
    assert differing(diff_runs(*pair, rtol=0.1)) == ["models"]


def test_large_tensors_are_compared_in_pieces(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.analysis.tensors._CHUNK", 64)
    long = np.ones(100)
    for folder in pair:
        save_file({"long": long}, folder / "global" / "model.safetensors")
        long = long.copy()
        long[99] = 2.0
    assert diff_runs(*pair).first["relative"] == pytest.approx(1 / math.sqrt(103), rel=1e-15)


# ------------------------------------------------------------------------------------------- predictions and scores


def test_predictions_differ_by_row_and_model(write: Callable[..., Path]) -> None:
    found = diff_runs(write("a"), write("b", predicted=("up", "up")))
    assert differing(found) == ["predictions"]
    assert found.first == {"part": "predictions", "row": "5", "model": "local site-2", "a": "down", "b": "up"}
    assert text(found, "predictions") == "words that differ, of 2 test examples: local site-2 1"
    short = write("c")
    (short / "predictions.csv").write_text("".join((short / "predictions.csv").read_text().splitlines(True)[:2]))
    assert diff_runs(write("d"), short).first == {"part": "predictions", "row": "7", "only": "a"}
    (short / "predictions.csv").unlink()
    assert diff_runs(short, write("e")).first == {"part": "predictions", "file": "predictions.csv", "only": "b"}


def test_scores_differ_by_model_and_row(write: Callable[..., Path]) -> None:
    nll = np.array([[1.0, np.nan], [1.0, np.nan], [1.25, np.nan]])
    found = diff_runs(write("a"), write("b", last_nll=nll))
    assert differing(found) == ["scores"]
    where = {"array": "last_nll", "model": "local site-2", "row": 2}
    assert found.first == {"part": "scores", **where, "a": 1.0, "b": 1.25, "relative": 0.2}
    assert text(found, "scores") == "last_nll 1 of 6, at most 0.2"
    assert differing(diff_runs(write("c"), write("d", last_nll=nll), rtol=0.21)) == []
    fewer = diff_runs(write("e"), write("f", last_nll=nll[:, :1], extra=np.zeros(1)))
    assert fewer.first["a"] == "float64 [3, 2]" and "extra only in b" in text(fewer, "scores")
    words = diff_runs(write("g"), write("h", last_predicted=np.array([["x"] * 2] * 3)))
    assert differing(words) == ["scores"]


# ------------------------------------------------------------------------------------------------- the command line


def test_the_command_says_what_differs_first_and_ends_with_1(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = write("a"), write("b", config={"seed": 1}, rows=changed({"round": 2, "name": "loss"}, value=1.25))
    assert main(["diff", str(one), str(one)]) == 0
    assert "the runs agree" in capsys.readouterr().out
    assert main(["diff", str(one), str(other)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"a  {one} (finished)"
    assert [line.split()[0] for line in lines[3:10]] == PARTS
    assert "config       differs  1 key differs: seed 0 / 1" in lines
    at = lines.index("first difference: round 2, local, client site-2, step 4, train loss")
    assert lines[at + 1 : at + 4] == ["  a  1.0", "  b  1.25", "  relative difference 0.2"]
    assert lines[-1] == "the runs differ"
    assert main(["diff", str(one), str(other), "--atol", "0.5"]) == 1, "another seed"
    assert main(["diff", str(one), str(write("c", rows=changed({"name": "loss"}, value=1.0))), "--atol", "1"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{a}", "nowhere"], "no folder 'nowhere'"),
        (["{a}", "{a}/global"], "no run in"),
        (["{a}", "{root}"], "holds 2 runs; give the folder of one"),
        (["{a}"], "see fedsim --help"),
        (["{a}", "{b}", "--rtol", "-1"], "rtol: -1.0"),
        (["{a}", "{b}", "--rtol", "much"], "'--rtol'"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    words: list[str],
    said: str,
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(pair[0].parent)
    names = {"a": pair[0], "b": pair[1], "root": pair[0].parent}
    assert main(["diff", *(w.format(**names) for w in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "partition.npz",
        "scores.npz",
        "global/adapter_model.safetensors",
        "best/adapter_model.safetensors",
    ],
)
@fast_only(0)
@pytest.mark.parametrize("part", ["cut", "empty", "garbled"])
def test_damaged_files_are_named(
    name: str, part: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = pair[1] / name
    raw = file.read_bytes()
    damage = {"cut": raw[: len(raw) // 2], "empty": b"", "garbled": b"\xff\xfe: [" + raw[5:]}[part]
    if name == "config.yaml" and part == "cut":
        damage = b"seed: [0"
    file.write_bytes(damage)
    assert main(["diff", str(pair[0]), str(pair[1])]) == 2
    err = capsys.readouterr().err
    assert str(file) in err and len(err.splitlines()) == 1


def test_a_predictions_file_that_is_no_table_is_named(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (pair[0] / "predictions.csv").write_text('row,label\n5,"up')  # a quote that does not end
    assert main(["diff", str(pair[0]), str(pair[1])]) == 2
    assert f"{pair[0] / 'predictions.csv'}: not readable" in capsys.readouterr().err


def test_ids_from_data_do_not_reach_the_terminal_raw(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = ([metric(1, 2, "local", "s\x1b[31m\ud800", "train", "loss", v)] for v in (1.0, 2.0))
    assert main(["diff", str(write("a", rows=one)), str(write("b", rows=other))]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"client s\x1b[31m\ud800," in out


def test_reading_needs_no_torch() -> None:
    code = "import sys, fedsim; fedsim.diff_runs; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------- real runs


def test_real_runs_the_same_twice_another_frequency_and_another_seed(lab: Any) -> None:
    modes, work = ["local", "federated", "central"], {"steps": 2, "batch_size": 3}
    one = lab.run(name="one", modes=modes, rounds=2, local=work)
    again = lab.run(name="again", modes=modes, rounds=2, local=work)
    found = fedsim.diff_runs(one, again)
    assert differing(found) == [], str(found)
    lab.same_bits(one, again)
    often = lab.run(name="often", modes=modes, rounds=2, local=work, evaluate={"every_steps": 1})
    found = diff_runs(one, often)
    assert differing(found) == [] and "only in b, not compared" in text(found, "metrics")
    other = lab.run(name="other", modes=modes, rounds=2, local=work, seed=4)
    found = diff_runs(one, other)
    assert set(differing(found)) - {"predictions"} == set(PARTS) - {"plan", "predictions"}  # a few words may agree
    assert text(found, "config") == "1 key differs: seed 3 / 4"
    first = {k: found.first[k] for k in ("round", "scope", "client", "step", "split", "name")}
    mine, theirs = ({tuple(r[k] for k in first): r["value"] for r in lab.metrics(f)} for f in (one, other))
    key = tuple(first.values())
    assert mine[key] != theirs[key] and found.first["a"] == mine[key] and found.first["b"] == theirs[key]
    assert found.first["round"] == 1, "LoRA starts as the base, whatever the seed"
