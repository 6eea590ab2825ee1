"""The config: defaults, overrides, paths, what is refused and in which words, and back to YAML."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiers import fast_only

from fedsim.config import adapters, datasets, reference, sections, yaml_text
from fedsim.config.experiment import Experiment, components, expand_path
from fedsim.config.reference import every_key
from fedsim.core.errors import UserError
from fedsim.core.section import fields_of, keys_of
from fedsim.data import partitioners

NEEDED: dict[tuple[str, str], dict[str, Any]] = {  # what a component cannot do without
    ("data", "financial_phrasebank"): {"path": "Sentences_AllAgree.txt"},
    ("data", "table"): {"path": "rows.csv"},
    ("data", "hub"): {"path": "org/name"},
    ("data", "instructions"): {"sources": [{"format": "alpaca", "path": "alpaca.json"}]},
    ("partition", "class_counts"): {"counts": [[1, 2], [3, 4]]},
    ("partition", "by_column"): {"column": "user"},
}
COMPONENTS = [
    (section, name or "loha")
    for section in ("adapter", "data", "partition", "algorithm", "aggregator", "executor")
    for name in components(section)
]

# The example of the design document, as it stands there: these names are a contract with other people's scripts.
DESIGN = """
name: lora_sentiment            # results/<name>/<run id>/
seed: 0
modes: [local, federated, central]
rounds: 5
results: results                # root of the run folders
model:     {path: tiny, dtype: float32, task: causal_lm}
adapter:   {name: lora, r: 32, alpha: 32, dropout: 0.0, target_modules: auto}
data:      {name: financial_phrasebank, path: "${oc.env:FEDSIM_DATA}/financial_phrasebank/Sentences_AllAgree.txt", template: "{sentence} sentiment: {label}", labels: [negative, neutral, positive], columns: {}, max_length: 128, too_long: truncate}
partition: {name: class_counts, counts: [[6, 59, 25], [221, 525, 0], [19, 523, 433]]}
cohort:    {size: all}          # or a number of clients per round
local:     {steps: 200, batch_size: 128, micro_batch: 4, optimizer: adamw, lr: 1e-4, weight_decay: 0.01, betas: [0.9, 0.98], clip: 1.0, schedule: cosine, warmup: 50, min_lr: 1e-6, horizon: 2000, schedule_over: run, keep_state: true, epochs: null, shuffle: true, drop_last: false}
central:   {match: epochs}
algorithm: {name: fedavg, weights: steps}
best:      {metric: accuracy, mode: max}
checkpoint: {every: 1, keep: 2}
evaluate:  {every_steps: 100, every_rounds: 1, batch_size: 64, generate: false}
training:  {lanes: auto}
executor:  {name: serial}
tracking:  {with: []}
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDSIM_DATA", "/somewhere")
    monkeypatch.delenv("FEDSIM_NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Experiment:
    """The experiment of a YAML text with overrides."""
    file = Path("experiment.yaml")
    file.write_text(text, encoding="utf-8")
    return Experiment.load(file, overrides)


def refusal(text: str, *overrides: str) -> str:
    """The message with which a config is refused."""
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ defaults


def test_the_default_experiment_goes_to_yaml_and_back() -> None:
    first = Experiment()
    second = load(first.to_yaml())
    assert second == first
    assert second.to_yaml() == first.to_yaml()
    assert first == load(""), "an empty file is the defaults"
    assert (first.adapter.name, first.data.name, first.partition.name) == ("lora", "headlines", "iid")


def test_every_components_defaults_go_to_yaml_and_back() -> None:
    for section, name in COMPONENTS:
        first = Experiment(**{section: {"name": name, **NEEDED.get((section, name), {})}})
        assert getattr(first, section).name == name
        second = load(first.to_yaml())
        assert second == first, (section, name)
        assert second.to_yaml() == first.to_yaml()
        assert Experiment.from_dict(first.to_dict()) == first


def test_a_config_far_from_the_defaults_goes_to_yaml_and_back() -> None:
    first = Experiment(
        name="a.b-c_1",
        modes=["central"],
        model={"path": "org/name", "dtype": "bfloat16", "task": "sequence_classification"},
        adapter={"name": "lora", "r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        data={
            "name": "table",
            "path": "x.csv",
            "validation": "v.csv",
            "test": 0,
            "labels": ["ja: é", "1", "null", "#"],
        },
        partition={"name": "dirichlet", "num_clients": 7, "alpha": 1e-5, "by": "site"},
        cohort={"size": 3},
        local={"epochs": 2, "lr": 1e-7, "clip": None, "optimizer": "sgd", "momentum": 0.5},
        tracking={"with": ["tensorboard"]},
        executor={"name": "pool", "devices": ["cpu"], "workers": 2, "threads": 1},
    )
    assert load(first.to_yaml()) == first


@fast_only(0, 1, 2)
@pytest.mark.parametrize(
    "text",
    [
        "{sentence}\n\n sentiment:\t{label} ",
        "cost ${sentence} is {label}",
        "a \\${sentence} # {label}: 'x' \"y\"",
        "{{json}} {sentence}: {label}",
        "1e5 {sentence} {label}",
        "x " * 100 + "{sentence} {label}",
    ],
)
def test_a_template_comes_back_from_the_resolved_config_as_it_was(text: str) -> None:
    first = Experiment(data={"name": "headlines", "template": text})
    assert load(first.to_yaml()).data.template == text


@pytest.mark.parametrize("words", [["1e3", "2e3"], ["yes", "no"], ["1.50", "007"], ["null", "~"], ["???", "é"]])
def test_label_words_that_look_like_numbers_stay_words(words: list[str]) -> None:
    first = Experiment(data={"name": "headlines", "labels": words})
    assert load(first.to_yaml()).data.labels == words
    assert yaml.safe_load(first.to_yaml())["data"]["labels"] == words, "for readers of YAML 1.1, too"


def test_plain_text_that_yaml_1_1_takes_for_something_else_is_text() -> None:
    words = [
        "yes",
        "No",
        "on",
        "OFF",
        "y",
        "n",
        "2024-01-01",
        "1_000",
        "0x1F",
        "0o17",
        "007",
        "1:30",
        "12:30:45",
        "none",
        "=",
        "<",
    ]
    text = f"name: on\ndata: {{name: table, path: x.csv, labels: [{', '.join(words)}], columns: {{yes: no, 1: 010}}}}"
    exp = load(text)
    assert exp.name == "on" and exp.data.labels == words and exp.data.columns == {"yes": "no", "1": "010"}
    assert load(exp.to_yaml()) == exp
    with pytest.raises(UserError, match="^rounds: '1:30' is not a whole number$"):
        load("rounds: 1:30")


@fast_only(0, 3, 5, 9, 12, 15, 17, 19, 22, 23)
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("~", None), ("", None), ("null", None), ("true", True), ("False", False), ("12", 12), ("-3", -3), ("+4", 4), ("0", 0),
        ("1.5", 1.5), ("1.", 1.0), (".5", 0.5), ("1e3", 1000.0), ("-2.5E-3", -0.0025), ("1e+2", 100.0), (".inf", math.inf),
        ("-.INF", -math.inf), ("!!str 12", "12"), ("'12'", "12"), ("1.2.3", "1.2.3"), ("1e", "1e"), ("- ", [None]),
        ("{1: a, null: b, yes: c}", {"1": "a", "null": "b", "yes": "c"}), ("[&a {x: 1}, {<<: *a, y: 2}]", [{"x": 1}, {"x": 1, "y": 2}]),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = yaml_text.parse(text)
    assert found == value and type(found) is type(value)


def test_aliases_are_copies() -> None:
    exp = load(
        "model: &m {path: tiny}\nseed: 1\ndata: {name: headlines, labels: &l [a, b]}\nadapter: {name: lora, target_modules: *l}",
        "data.labels=[c, d]",
    )
    assert exp.adapter.target_modules == ["a", "b"]


@pytest.mark.parametrize(("word", "shown"), [("1.5", "1.5"), ("true", "True"), ("~", "None"), ("3", "3")])
def test_a_label_that_is_a_number_is_told_how_to_be_written(word: str, shown: str) -> None:
    assert (
        refusal(f"data: {{name: headlines, labels: [a, {word}]}}")
        == f"data.labels[1]: {shown} is not text; put it in quotes"
    )
    assert load(f"data: {{name: headlines, labels: [a, '{word}']}}").data.labels == ["a", word]


def test_a_long_value_is_cut_in_its_message() -> None:
    for override in (
        f"data.labels=[{', '.join(['a'] * 40000)}]",
        f"local.lr={'9x' * 5000}",
        f"local.{'k' * 9000}=1",
        f"{'k' * 9000}",
    ):
        message = refusal("data: {name: headlines}", override)
        assert len(message) < 600 and "characters)" in message, message
    long = UserError(f"begin {'x' * 10**6} end")
    assert len(str(long)) <= 1000 and str(long).startswith("begin x") and str(long).endswith("x end")


def test_the_designs_example_loads_with_its_values() -> None:
    exp = load(DESIGN)
    assert exp.local.lr == 1e-4 and exp.local.min_lr == 1e-6 and exp.local.betas == [0.9, 0.98]
    assert exp.partition.counts == [[6, 59, 25], [221, 525, 0], [19, 523, 433]]
    assert (exp.local.steps, exp.local.epochs, exp.cohort.size) == (200, None, "all")
    assert exp.tracking.with_ == [] and exp.executor.name == "serial"
    for override in (
        "partition={name: dirichlet, num_clients: 10, alpha: 0.5, min_rows: 10}",
        "executor={name: pool, devices: [cpu], workers: 2, threads: 1}",
        "model.dtype=float64",
    ):
        load(DESIGN, override)


def test_one_epoch_is_the_work_where_none_is_given() -> None:
    assert Experiment().local.epochs == 1
    assert load("local: {steps: null, epochs: null}").local.epochs == 1
    assert Experiment(local={"steps": 3}).local.epochs is None


def test_numbers_are_taken_where_they_mean_the_same() -> None:
    exp = load("local: {lr: 1, steps: 2, betas: [0, 0.5]}")
    assert exp.local.lr == 1.0 and isinstance(exp.local.lr, float)
    assert refusal("local: {steps: 1e3}") == "local.steps: 1000.0 is not a whole number or null; write 1000"
    assert exp.local.betas == [0.0, 0.5]


def test_the_identity_leaves_out_what_changes_no_number() -> None:
    base = Experiment(local={"steps": 2})
    same = dataclasses.replace(
        base,
        rounds=9,
        results="elsewhere",
        executor={"name": "pool", "workers": 2},
        tracking={"with": ["mlflow"]},
        checkpoint={"every": 3},
    )
    assert same.identity() == base.identity()
    for change in ({"seed": 1}, {"local": {"steps": 3}}, {"modes": ["local"]}, {"evaluate": {"every_steps": 1}}):
        assert dataclasses.replace(base, **change).identity() != base.identity(), change


def test_sections_may_be_given_as_dataclasses() -> None:
    exp = Experiment(adapter=adapters.PTuning(hidden=7), local=sections.LocalWork(steps=3))
    assert exp == Experiment(adapter={"name": "p_tuning", "hidden": 7}, local={"steps": 3})
    with pytest.raises(UserError, match=r"^r: must be >= 1 \(got 0\)$"):
        Experiment(adapter=adapters.Lora(r=0))


# ------------------------------------------------------------------------------------------------ overrides

FILE = "adapter: {name: lora, r: 4, alpha: 99}\npartition: {name: dirichlet, num_clients: 7, alpha: 0.25}\n"


def test_another_name_drops_the_files_keys_of_that_section_only() -> None:
    exp = load(FILE, "adapter.name=ia3")
    assert exp.adapter == adapters.Ia3()
    assert exp.partition == partitioners.Dirichlet(num_clients=7, alpha=0.25)
    exp = load(FILE, "partition.name=dirichlet_fedma")
    assert exp.partition == partitioners.DirichletFedma(), "not the file's 7 clients, though it takes that key as well"


def test_the_same_name_keeps_the_files_keys() -> None:
    assert load(FILE, "adapter.name=lora").adapter == adapters.Lora(r=4, alpha=99)
    assert load(FILE, "adapter.r=5").adapter == adapters.Lora(r=5, alpha=99)


def test_a_whole_section_replaces_the_files() -> None:
    assert load(FILE, "adapter={name: lora, r: 2}").adapter == adapters.Lora(r=2)
    assert load(FILE, "adapter={name: p_tuning}").adapter == adapters.PTuning()


def test_keys_after_a_new_name_are_the_new_components() -> None:
    assert load(FILE, "adapter.name=prefix", "adapter.hidden=3").adapter == adapters.Prefix(hidden=3)
    message = refusal(FILE, "adapter.name=prefix", "adapter.r=3")
    assert message.startswith("unknown key adapter.r (did you mean adapter.r with adapter.name=lora?)"), message
    assert "name, num_virtual_tokens" in message


def test_later_overrides_win() -> None:
    assert load(FILE, "seed=1", "seed=2").seed == 2
    assert load(FILE, "adapter.name=prefix", "adapter.name=lora").adapter == adapters.Lora()


def test_overrides_reach_sections_the_file_lacks() -> None:
    assert load(FILE, "local.steps=3").local.steps == 3
    assert load(FILE, "executor.workers=2").executor == sections.AutoExecutor(workers=2)
    assert load(FILE, "algorithm.weights=uniform").algorithm.weights == "uniform"


@fast_only(0, 1, 2, 4, 5, 7)
@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("local.lr=1e-3", 1e-3),
        ("local.betas=[0.5, 0.75]", [0.5, 0.75]),
        ("local.clip=null", None),
        ("local.keep_state=false", False),
        ("results=a=b", "a=b"),
        ('data.template="{sentence} sentiment: {label}"', "{sentence} sentiment: {label}"),
        ("data.labels=[negative, neutral, positive]", ["negative", "neutral", "positive"]),
        (
            "data.labels=[yes, off, 2024-01-01, 1:30, 0x1F, 007, 1_000]",
            ["yes", "off", "2024-01-01", "1:30", "0x1F", "007", "1_000"],
        ),
        ("name=on", "on"),
    ],
)
def test_override_values_are_read_as_yaml(override: str, value: Any) -> None:
    exp: Any = load("data: {name: headlines}", override)
    for part in override.partition("=")[0].split("."):
        exp = getattr(exp, part)
    assert exp == value


# ------------------------------------------------------------------------------------------------ refusals

# (override, the key path the message opens with, the value it shows, words of the way out)
WRONG = [
    ("seed=-1", "seed", "-1", ">= 0"),
    ("rounds=0", "rounds", "0", ">= 1"),
    ("rounds=2.5", "rounds", "2.5", "whole number"),
    ("rounds=true", "rounds", "True", "whole number"),
    ("name=a/b", "name", "'a/b'", "letters"),
    ("name=..", "name", "'..'", "letters"),
    ("modes=[]", "modes", "[]", "local, federated, central"),
    ("modes=[local, lokal]", "modes[1]", "'lokal'", "local, federated, central"),
    ("modes=[local, local]", "modes", "['local', 'local']", "twice"),
    ("model=tiny", "model", "'tiny'", "path"),
    ("model.path=''", "model.path", "''", "hub id"),
    ("model.dtype=float8", "model.dtype", "'float8'", "bfloat16"),
    ("model.task=regression", "model.task", "'regression'", "sequence_classification"),
    ("model.base_dropout=1", "model.base_dropout", "1", "true or false"),
    ("adapter=lora", "adapter", "'lora'", "adapter.name=lora"),
    ("adapter.name=loar", "adapter.name", "'loar'", "did you mean lora?"),
    ("adapter={r: 3}", "adapter.name", "r", "lora, p_tuning"),
    ("adapter.r=0", "adapter.r", "0", ">= 1"),
    ("adapter.r=many", "adapter.r", "'many'", "whole number"),
    ("adapter.alpha=-1", "adapter.alpha", "-1", "> 0"),
    ("adapter.alpha=.inf", "adapter.alpha", "inf", "a finite number"),
    ("adapter.dropout=1", "adapter.dropout", "1", "< 1"),
    ("adapter.dropout=.nan", "adapter.dropout", "nan", "a finite number"),
    ("adapter.target_modules=q", "adapter.target_modules", "'q'", "a list"),
    ("adapter.target_modules=[]", "adapter.target_modules", "[]", "auto"),
    ("adapter={name: p_tuning, num_virtual_tokens: 0}", "adapter.num_virtual_tokens", "0", ">= 1"),
    ("adapter={name: adapter, bottleneck: 0}", "adapter.bottleneck", "0", ">= 1"),
    ("adapter={name: prefix, hidden: 0}", "adapter.hidden", "0", ">= 1"),
    ("adapter={name: ia3, target_modules: [k]}", "adapter.feedforward_modules", "'auto'", "both or none"),
    ("data.name=headline", "data.name", "'headline'", "did you mean headlines?"),
    ("data.max_length=1", "data.max_length", "1", ">= 2"),
    ("data.too_long=cut", "data.too_long", "'cut'", "truncate, drop, error"),
    ("data.template=hello", "data.template", "'hello'", "braces"),
    ("data.labels=[a]", "data.labels", "['a']", "two"),
    ("data.labels=[a, a]", "data.labels", "['a', 'a']", "twice"),
    ("data.labels=[1, 2]", "data.labels[0]", "1", "text"),
    ("data.columns=[a]", "data.columns", "['a']", "mapping"),
    ("data={name: financial_phrasebank}", "data.path", "missing", "Sentences_AllAgree.txt"),
    ("data={name: table}", "data.path", "missing", ".csv"),
    ("data={name: table, path: x.csv, validation: 0}", "data.validation", "0.0", "validation examples"),
    ("data={name: table, path: x.csv, validation: 2}", "data.validation", "2", "fraction of the training"),
    ("data={name: table, path: x.csv, validation: 0.6, test: 0.5}", "data.test", "0.5", "no training examples"),
    ("data={name: hub, path: a/b, validation: 0.6, test: 0.5}", "data.test", "0.5", "no training examples"),
    ("data={name: table, path: x.csv, validation: ''}", "data.validation", "''", "file"),
    ("data={name: hub}", "data.path", "missing", "org/name"),
    ("partition=iid", "partition", "'iid'", "partition.name=iid"),
    ("partition.name=random", "partition.name", "'random'", "dirichlet_fedma"),
    ("partition.num_clients=0", "partition.num_clients", "0", ">= 1"),
    ("partition={name: dirichlet, alpha: 0}", "partition.alpha", "0", "> 0"),
    ("partition={name: dirichlet_fedma, alpha: .inf}", "partition.alpha", "inf", "a finite number"),
    ("partition={name: dirichlet, max_redraws: 0}", "partition.max_redraws", "0", ">= 1"),
    ("partition={name: class_counts}", "partition.counts", "missing", "each client"),
    ("partition={name: class_counts, counts: [[1, 2], [3]]}", "partition.counts", "[[1, 2], [3]]", "length"),
    ("partition={name: class_counts, counts: [[1, -2]]}", "partition.counts[0][1]", "-2", ">= 0"),
    ("partition={name: class_counts, counts: [[], []]}", "partition.counts[0]", "[]", "per class"),
    ("partition={name: class_counts, counts: [[1, x]]}", "partition.counts[0][1]", "'x'", "whole number"),
    ("partition={name: shards, classes_per_client: 0}", "partition.classes_per_client", "0", ">= 1"),
    ("partition={name: by_column}", "partition.column", "missing", "clients' ids"),
    ("partition={name: quantity, exponent: -1}", "partition.exponent", "-1", ">= 0"),
    ("cohort.size=0", "cohort.size", "0", "or all"),
    ("cohort.size=some", "cohort.size", "'some'", "or all"),
    ("local={steps: 2, epochs: 1}", "local.steps", "2", "local.epochs=1"),
    ("local.steps=0", "local.steps", "0", ">= 1"),
    ("local={steps: 2, drop_last: true}", "local.drop_last", "True", "epochs"),
    ("local.batch_size=0", "local.batch_size", "0", ">= 1"),
    ("local.micro_batch=64", "local.micro_batch", "64", "batch_size=32"),
    ("local.optimizer=adam", "local.optimizer", "'adam'", "adamw, sgd"),
    ("local.lr=0", "local.lr", "0", "> 0"),
    ("local.lr=.nan", "local.lr", "nan", "a finite number"),
    ("local.lr=fast", "local.lr", "'fast'", "a number"),
    ("local.min_lr=1", "local.min_lr", "1.0", "lr=0.001"),
    ("local.weight_decay=-0.1", "local.weight_decay", "-0.1", ">= 0"),
    ("local.weight_decay=.inf", "local.weight_decay", "inf", "a finite number"),
    ("local.betas=[0.9]", "local.betas", "[0.9]", ">= 2"),
    ("local.betas=[0.9, 1.0]", "local.betas[1]", "1.0", "< 1"),
    ("local.eps=0", "local.eps", "0", "> 0"),
    ("local.eps=.inf", "local.eps", "inf", "a finite number"),
    ("local.momentum=0.9", "local.momentum", "0.9", "sgd"),
    ("local.clip=0", "local.clip", "0", "null"),
    ("local.horizon=10", "local.horizon", "10", "cosine"),
    ("local={schedule: cosine, warmup: 10, horizon: 10}", "local.horizon", "10", "warmup=10"),
    ("local.keep_state=maybe", "local.keep_state", "'maybe'", "true or false"),
    ("central.match=rows", "central.match", "'rows'", "epochs, steps"),
    ("algorithm.name=fedprocks", "algorithm.name", "'fedprocks'", "fedprox"),
    ("algorithm.weights=size", "algorithm.weights", "'size'", "samples, steps, uniform"),
    ("best.metric=f1", "best.metric", "'f1'", "accuracy, loss"),
    ("best.metric=exact_match", "best.metric", "'exact_match'", "evaluate.generate=true"),
    ("checkpoint.keep=0", "checkpoint.keep", "0", ">= 1"),
    ("evaluate.every_steps=0", "evaluate.every_steps", "0", ">= 1"),
    ("evaluate.max_new_tokens=0", "evaluate.max_new_tokens", "0", ">= 1"),
    ("training.lanes=0", "training.lanes", "0", "auto"),
    ("executor=pool", "executor", "'pool'", "executor.name=pool"),
    ("executor.name=ray", "executor.name", "'ray'", "auto, serial, pool"),
    ("executor={name: serial, device: gpu}", "executor.device", "'gpu'", "cuda:N"),
    ("executor={name: pool, devices: []}", "executor.devices", "[]", "[cpu]"),
    ("executor={name: pool, devices: [cpu, gpu]}", "executor.devices[1]", "'gpu'", "cuda:N"),
    ("executor={name: pool, devices: [cpu, cpu], workers: 1}", "executor.workers", "1", "devices"),
    ("executor.threads=0", "executor.threads", "0", ">= 1"),
    ("executor.hang_s=0", "executor.hang_s", "0", "null = wait forever"),
    ("executor={name: pool, hang_s: .inf}", "executor.hang_s", "inf", "null = wait forever"),
    ("tracking.with=[neptune]", "tracking.with[0]", "'neptune'", "wandb"),
    ("tracking.with=wandb", "tracking.with", "'wandb'", "a list"),
    ("messages={up: int7}", "messages.up", "'int7'", "blockwise8"),
    ("messages.error_feedback=true", "messages.error_feedback", "True", "messages.up"),
    ("messages={up: fp32, error_feedback: true}", "messages.error_feedback", "True", "messages.up, e.g. nf4"),
    ("messages={up: fp32, down: nf4, error_feedback: true}", "messages.error_feedback", "True", "float32 as it is"),
    ("aggregation.chunk_mb=0", "aggregation.chunk_mb", "0", ">= 1"),
    ("aggregation.device=tpu", "aggregation.device", "'tpu'", "cpu"),
    ("checkpoint.shard_mb=0", "checkpoint.shard_mb", "0", ">= 1"),
    ("training.packing=true", "training.packing", "True", "adapter.name=none"),
    ("training.master_weights=false", "training.master_weights", "False", "model.dtype=bfloat16; leave it out"),
    ("results=3", "results", "3", "text"),
    ("local=3", "local", "3", "steps"),
    ("local.lr.x=3", "local.lr", "{'x': 3}", "a number"),
    ("model={path: tiny, dtype: float16, task: x}", "model.task", "'x'", "causal_lm"),
    ("name=${oc.env:FEDSIM_NOWHERE}", "name", "FEDSIM_NOWHERE", "not found"),
    ("model.path=${oc.env:FEDSIM_NOWHERE}/m", "model.path", "'${oc.env:FEDSIM_NOWHERE}/m'", "set FEDSIM_NOWHERE"),
    ("results=${oc.env:FEDSIM_NOWHERE}", "results", "'${oc.env:FEDSIM_NOWHERE}'", "set FEDSIM_NOWHERE"),
]

SECTIONS = "adapter: {name: lora}\ndata: {name: headlines}\npartition: {name: iid}\n"


@fast_only(
    0,
    2,
    3,
    4,
    7,
    8,
    9,
    11,
    15,
    16,
    20,
    23,
    24,
    28,
    32,
    34,
    35,
    37,
    38,
    41,
    46,
    51,
    52,
    53,
    61,
    63,
    65,
    70,
    73,
    74,
    77,
    79,
    80,
    86,
    93,
    94,
    96,
    98,
    101,
    103,
    104,
    109,
    110,
    111,
    113,
    115,
)
@pytest.mark.parametrize(("override", "path", "value", "way"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_value_is_one_line_with_path_value_and_way_out(override: str, path: str, value: str, way: str) -> None:
    message = refusal(SECTIONS, override)
    assert "\n" not in message, message
    assert message.startswith(f"{path}: "), message
    assert value in message, message
    assert way in message, message


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ({"adapter": {"name": "none"}, "model": {"dtype": "float16"}}, "model.dtype"),
        ({"model": {"task": "sequence_classification"}, "evaluate": {"generate": True}}, "evaluate.generate"),
        ({"adapter": {"name": "none"}, "training": {"master_weights": False}}, "training.master_weights"),
        ({"model": {"dtype": "bfloat16"}, "training": {"master_weights": False}}, "training.master_weights"),
        ({"local": None}, "local"),
        ({"adapter": None}, "adapter"),
    ],
)
def test_what_does_not_go_together_is_refused_from_python_too(sections: dict[str, Any], path: str) -> None:
    with pytest.raises(UserError) as caught:
        Experiment.from_dict(sections)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"messages": {"up": "fp32", "error_feedback": True}, "model": {"dtype": "float64"}},  # fp32 loses half of it
        {"messages": {"up": "bf16", "error_feedback": True}, "model": {"dtype": "bfloat16"}},  # trained in float32
        {"adapter": {"name": "none"}, "model": {"dtype": "bfloat16"}, "training": {"master_weights": False}},
    ],
)
def test_what_has_an_effect_is_taken(sections: dict[str, Any]) -> None:
    Experiment.from_dict(sections)


# (override, unknown key, what is probably meant, one of the valid keys shown): names of other libraries, of other sections, and misspelt
UNKNOWN = [
    ("modle.path=x", "modle", "modes or model", "seed"),
    ("local.learning_rate=1", "local.learning_rate", "local.lr", "steps"),
    ("model.name=gpt2", "model.name", "model.path", "path"),
    ("learningRate=1", "learningRate", "local.lr", "seed"),
    ("adapter.lora_alpha=8", "adapter.lora_alpha", "adapter.alpha", "dropout"),
    ("adapter.rank=8", "adapter.rank", "adapter.r", "dropout"),
    ("local.lr_scheduler_type=linear", "local.lr_scheduler_type", "local.schedule", "lr"),
    ("training.max_grad_norm=1", "training.max_grad_norm", "local.clip", "lanes"),
    ("per_device_train_batch_size=1", "per_device_train_batch_size", "local.batch_size", "seed"),
    ("output_dir=x", "output_dir", "results", "seed"),
    ("fraction_fit=0.1", "fraction_fit", "cohort.size", "seed"),
    ("bf16=true", "bf16", "model.dtype=bfloat16", "seed"),
    ("data.max_seq_length=8", "data.max_seq_length", "data.max_length", "too_long"),
    ("num_clients=8", "num_clients", "partition.num_clients", "seed"),
    ("weight_decay=0", "weight_decay", "local.weight_decay", "seed"),
    ("local.target_modules=[q]", "local.target_modules", "adapter.target_modules", "lr"),
    ("batch-size=8", "batch-size", "local.batch_size or evaluate.batch_size", "seed"),
    ("local.epoch=8", "local.epoch", "local.epochs", "steps"),
    ("local.with=1", "local.with", "tracking.with", "epochs"),
    ("lora.r=8", "lora", "adapter.name=lora", "seed"),
    ("adapter={name: none, r: 3}", "adapter.r", "adapter.r with adapter.name=lora", "name"),
    ("adapter={lora_r: 3}", "adapter.lora_r", "adapter.r", "num_virtual_tokens"),
    (
        "partition.alpha=1",
        "partition.alpha",
        "partition.alpha with partition.name=dirichlet or dirichlet_fedma",
        "num_clients",
    ),
    (
        "executor={name: serial, workers: 2}",
        "executor.workers",
        "executor.workers with executor.name=auto or pool",
        "device",
    ),
    ("adapter={name: loha, rr: 3}", "adapter.rr", "adapter.r", "r"),
    ("algorithm.mu=0.1", "algorithm.mu", "algorithm.mu with algorithm.name=fedprox or fednova", "weights"),
    ("recovery.retries=2", "recovery", "", "seed"),
]


EXACT = [
    ("rounds=0", "rounds: must be >= 1 (got 0)"),
    ("rounds=x", "rounds: 'x' is not a whole number"),
    ("local.lr=-1", "local.lr: must be > 0 (got -1)"),
    ("local.clip=.inf", "local.clip: must be a finite number (got inf); null = no clipping"),
    ("local.betas=[0.9, 1]", "local.betas[1]: must be < 1 (got 1)"),
    ("local.optimizer=adam", "local.optimizer: 'adam' is not one of adamw, sgd; did you mean adamw?"),
    ("cohort.size=0", "cohort.size: must be >= 1 (got 0); give a whole number or all"),
    (
        "adapter.target_modules=[]",
        "adapter.target_modules: number of values must be >= 1 (got []); give leaf names of the layers to adapt, or one of auto, all-linear",
    ),
    ("data={name: hub}", "data.path: missing; give a data set id such as org/name, or a folder"),
    ("partition={name: dirichlet, alpha: 0}", "partition.alpha: must be > 0 (got 0)"),
    (
        "algorithm.name=fedagv",
        f"algorithm.name: 'fedagv' is not known; did you mean fedavg? one of {', '.join(components('algorithm'))}",
    ),
    (
        "executor={name: serial, thread: 2}",
        "unknown key executor.thread (did you mean executor.threads?). Valid keys: name, device, threads",
    ),
]


@fast_only(0, 2, 5, 8, 10, 11)
@pytest.mark.parametrize(("override", "message"), EXACT, ids=[e[0] for e in EXACT])
def test_messages_word_by_word(override: str, message: str) -> None:
    assert refusal(SECTIONS, override) == message


def test_the_identity_of_the_defaults_stays_whatever_keys_are_added() -> None:
    empty = ("model", "cohort", "central", "best", "evaluate", "training")
    assert Experiment().identity() == {
        "modes": ["local", "federated", "central"],
        **{section: {} for section in empty},
        **{"adapter": {"name": "lora"}, "data": {"name": "headlines"}, "partition": {"name": "iid"}},
        **{"algorithm": {"name": "fedavg"}, "local": {"epochs": 1}},
    }
    assert Experiment(faults={"policy": "skip"}).identity()["faults"] == {"policy": "skip"}


@fast_only(0, 1, 3, 9, 13, 19, 20, 22, 25)
@pytest.mark.parametrize(("override", "key", "meant", "valid"), UNKNOWN, ids=[u[0] for u in UNKNOWN])
def test_an_unknown_key_is_one_line_with_the_one_that_is_meant(override: str, key: str, meant: str, valid: str) -> None:
    message = refusal(SECTIONS, override)
    hint = f" (did you mean {meant}?)" if meant else ""
    assert message.startswith(f"unknown key {key}{hint}. Valid keys: ") and "\n" not in message, message
    assert valid in message.partition("Valid keys: ")[2].split(", "), message


def test_python_gets_the_same_line_for_an_unknown_key() -> None:
    for keys, why in [({"adaptor": {}}, "adapter"), ({"learning_rate": 1}, "local.lr"), ({"num_rounds": 1}, "rounds")]:
        with pytest.raises(UserError, match=rf"^unknown key \w+ .did you mean {why}\?.. Valid keys: name, seed"):
            Experiment(**keys)
    assert dataclasses.replace(Experiment(), seed=3) == pickle.loads(pickle.dumps(Experiment(seed=3)))


def test_every_synonym_leads_to_a_key_that_exists() -> None:
    paths = {k.path for k in every_key()} | {f.name for f in dataclasses.fields(Experiment)}
    assert {path.partition("=")[0] for path in reference.synonyms().values()} <= paths


@pytest.mark.parametrize("override", ["lr", "=3", "local.lr=[1", "", "partition.counts[0]=3"])
def test_what_is_no_override_is_one_line_that_shows_one(override: str) -> None:
    message = refusal(SECTIONS, override)
    assert "\n" not in message and repr(override) in message and "key=value" in message


def test_an_unquoted_template_override_says_to_quote_it() -> None:
    message = refusal(SECTIONS, "data.template={sentence} sentiment: {label}")
    assert "\n" not in message and "quote" in message.lower(), message


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"name: a\nname: b\n", "duplicate key name"),
        (b"name:\n\t- a\n", "line 2"),
        (b"- a\n- b\n", "list"),
        ("name: café\n".encode("latin-1"), "UTF-8"),
        (b"1: 2\n", "unknown key 1."),
        (b"local:\n", "local: None is not a section"),
    ],
)
def test_a_bad_file_is_one_line_that_says_why(content: bytes, why: str) -> None:
    Path("bad.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        Experiment.load("bad.yaml")
    assert "\n" not in str(caught.value) and why in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_key() -> None:
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbfname: x\n")
    assert Experiment.load("bom.yaml").name == "x"


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(UserError, match="no such file; give the YAML file"):
        Experiment.load(name)


# ------------------------------------------------------------------------------------------------ paths


def test_environment_variables_in_paths_stay_in_the_resolved_config(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = "${oc.env:FEDSIM_DATA}/financial_phrasebank/Sentences_AllAgree.txt"
    exp = load(DESIGN)
    assert exp.data.path == raw and raw in exp.to_yaml()
    assert expand_path(exp.data.path, "data.path") == "/somewhere/financial_phrasebank/Sentences_AllAgree.txt"
    monkeypatch.setenv("FEDSIM_DATA", "/elsewhere")
    assert expand_path(exp.data.path, "data.path").startswith("/elsewhere/")
    monkeypatch.delenv("FEDSIM_DATA")
    message = refusal(DESIGN)
    assert message.startswith("data.path: ") and "set FEDSIM_DATA" in message and "data.path=PATH" in message


def test_interpolation_outside_paths_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_DATA", "abc")
    exp = load("seed: 3\nname: run-${oc.env:FEDSIM_DATA}\nlocal: {steps: '${seed}'}")
    assert (exp.local.steps, exp.name) == (3, "run-abc")
    assert "${" not in exp.to_yaml()


def test_relative_paths_are_looked_up_here_first_then_beside_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    file = folder / "e.yaml"
    file.write_text("data: {name: table, path: rows.csv, validation: held.csv, test: 0.1}\nmodel: {path: base}\n")
    (folder / "rows.csv").touch()
    (folder / "base").mkdir()
    exp = Experiment.load(file)
    assert exp.data.path == str(folder / "rows.csv"), "only beside the YAML file"
    assert exp.model.path == str(folder / "base")
    assert exp.data.validation == "held.csv" and exp.data.test == 0.1, "what is nowhere stays as it was written"
    (tmp_path / "rows.csv").touch()
    assert Experiment.load(file).data.path == str(tmp_path / "rows.csv"), "the current directory comes first"
    again = tmp_path / "run" / "config.yaml"
    again.parent.mkdir()
    again.write_text(exp.to_yaml())
    assert Experiment.load(again) == exp


@pytest.mark.parametrize("path", ["tiny", "package:json/decoder.py", "org/name"])
def test_model_names_that_are_no_paths_stay(path: str) -> None:
    assert load("", f"model.path={path}").model.path == path


def test_home_in_a_path_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_path("~/x", "results") == str(tmp_path / "x")
    assert expand_path("x~y", "results") == "x~y"


# ------------------------------------------------------------------------------------------------ sentences


def test_every_key_and_every_section_has_a_sentence() -> None:
    for key in every_key():
        assert len(key.about) > 4 and key.about.endswith("."), key
    for section, info in fields_of(Experiment).items():
        assert (info.description or "").endswith("."), section
    for section in ("adapter", "data", "partition", "algorithm", "aggregator", "executor"):
        for cls in components(section).values():
            assert (cls.__doc__ or "").partition("\n")[0].endswith("."), cls


def test_help_and_the_reference_page_hold_every_sentence() -> None:
    help_text, page = inspect.getdoc(Experiment) or "", reference.page()
    keys = every_key()
    assert len(keys) > 150 and len({(k.path, k.owner) for k in keys}) == len(keys)
    for key in keys:
        assert key.about in help_text and f"| `{key.path}` |" in page and key.about.replace("|", "\\|") in page, key
    committed = Path(__file__).resolve().parents[1] / "docs" / "config.md"
    assert committed.read_text(encoding="utf-8") == page, "run: python -m fedsim.config.reference > docs/config.md"


def test_keys_sections_and_components_are_explained() -> None:
    assert reference.explain("local.schedule").splitlines() == [
        "local.schedule",
        f"  {sections_module_sentence('LocalWork', 'schedule')}",
        "  type: one of constant, cosine, linear",
        '  default: "constant"',
    ]
    assert reference.explain("partition.alpha").count("default: 1.0") == 2, "of both Dirichlet partitions"
    section, component = reference.explain("cohort"), reference.explain("dirichlet")
    assert section.startswith("cohort: ") and "\ncohort.size\n" in section and "a whole number or all" in section
    assert component.startswith("partition.name=dirichlet: ") and "partition.min_rows" in component
    assert reference.explain("partition.name=dirichlet") == component
    with pytest.raises(UserError, match="^unknown key learning_rate .did you mean local.lr"):
        reference.explain("learning_rate")


def sections_module_sentence(cls: str, field: str) -> str:
    """The string under a field, read from the source by its lines alone."""
    lines = Path(sections.__file__).read_text(encoding="utf-8").partition(f"class {cls}:")[2].splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith(f"    {field}: ")][:1]
    return lines[at + 1].strip().strip('"')


def test_keys_are_listed_as_the_user_writes_them() -> None:
    assert keys_of(sections.Tracking) == ["with", "clients"]
    assert "name" in keys_of(adapters.Lora) and "max_length" in keys_of(datasets.Table)
    with pytest.raises(KeyError):
        components("local")
