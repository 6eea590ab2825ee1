"""PEFT's options go through, and what a run exports gives its reported loss again in the libraries' own loaders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_equivalence import Texts, adamw, load, train
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

import fedsim
from fedsim.errors import UserError
from fedsim.models import adapters

ONE = {"partition": {"name": "iid", "num_clients": 1}, "local": {"steps": 3}}
HEADS = {"task": "sequence_classification"}


def reported(lab: Any, run: Path) -> float:
    """The loss of the merged model after the last round, on all validation rows."""
    return lab.value(run, split="validation", client=None, round=1, name="loss")


def texts(lab: Any, exp: Any, split: str = "validation") -> Texts:
    """The rows of a split, by the base's tokenizer."""
    return Texts(exp.model.path, lab.rows[split], exp.data.labels, exp.model.task != "causal_lm")


@torch.no_grad()
def loss_of(lab: Any, exp: Any, model: nn.Module) -> float:
    """The same by a model that a plain loader gave."""
    return texts(lab, exp).loss(model.eval(), range(len(lab.rows["validation"]))).item()


# ------------------------------------------------------------------------------------------------------ options

OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "dora": ("llama", {}, {"name": "lora", "r": 3}, {"use_dora": True}),
    "ranks": (
        *("llama", {}, {"name": "lora", "r": 3, "alpha": 6}),
        {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 2}, "layers_to_transform": [1]},
    ),
    "head of words": ("gpt2", {}, {"name": "lora", "r": 3}, {"modules_to_save": ["lm_head"]}),
    "head of classes": ("llama", HEADS, {"name": "lora", "r": 3}, {"modules_to_save": ["score", "norm"]}),
    "biases": ("phi", {}, {"name": "lora", "r": 3}, {"bias": "lora_only", "target_modules": ".*layers.1.*(q|k)_proj"}),
    "ia3": ("llama", {}, {"name": "ia3"}, {"modules_to_save": ["lm_head"]}),
    "prefix": ("llama", HEADS, {"name": "prefix", "num_virtual_tokens": 3}, {"modules_to_save": ["norm"]}),
    "prompt": ("llama", {}, {"name": "prompt", "num_virtual_tokens": 3}, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p_tuning": (
        *("llama", {}, {"name": "p_tuning", "num_virtual_tokens": 3, "hidden": 8}),
        {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
    ),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options_of_peft_train_as_in_a_plain_loop_and_load_again(lab: Any, distance: Any, what: str) -> None:
    kind, model, adapter, options = OPTIONS[what]
    exp = lab.exp(model={"path": lab.base(kind), **model}, adapter={**adapter, "peft": options}, **ONE)
    run = lab.run(exp)
    config = json.loads((run / "init" / "adapter_config.json").read_text())
    for key, value in options.items():
        assert set(value).issubset(config[key]) if key == "modules_to_save" else config[key] == value
    plain = fedsim.load_adapter(load(exp), run / "init", trainable=True).double().eval()
    own = adapters.trained(plain)
    train(plain, texts(lab, exp, "train"), fedsim.batches(exp, 0, 1), adamw(exp)(list(own.values())))
    merged = adapters.trained(fedsim.load_adapter(load(exp), run / "global", trainable=True).double())
    start = adapters.trained(fedsim.load_adapter(load(exp), run / "init", trainable=True).double())
    assert any(not torch.equal(start[n], merged[n]) for n in merged)
    assert distance({n: p.detach() for n, p in merged.items()}, {n: p.detach() for n, p in own.items()}) < 1e-6
    again = peft.PeftModel.from_pretrained(load(exp), str(run / "global")).double()
    assert loss_of(lab, exp, again) == pytest.approx(reported(lab, run), rel=1e-6)


CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (
        lambda: peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["q_proj", "v_proj"]),
        {"name": "LORA", "r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    ),
    "vera": (
        lambda: peft.VeraConfig(r=4, target_modules={"v_proj"}),
        {"name": "VERA", "r": 4, "target_modules": ["v_proj"]},
    ),
    "prompt": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        {"name": "PROMPT_TUNING", "num_virtual_tokens": 3},
    ),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_object_of_peft_is_a_section_of_plain_keys(lab: Any, what: str) -> None:
    make, section = CONFIGS[what]
    exp, written = lab.exp(adapter=make(), **ONE), lab.exp(adapter=section, **ONE)
    assert exp == written and exp.to_dict()["adapter"].keys() == section.keys()
    run = lab.run(exp)
    assert fedsim.Experiment.load(run / "config.yaml").adapter == exp.adapter
    again = peft.PeftModel.from_pretrained(load(exp), str(run / "global")).double()
    assert loss_of(lab, exp, again) == pytest.approx(reported(lab, run), rel=1e-6)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"name": "lora", "peft": {"use_dorra": True}}, ["adapter.peft.use_dorra: True", "did you mean use_dora?"]),
        ({"name": "lora", "peft": {"lora_alpha": 32}}, ["adapter.peft.lora_alpha: 32", "write adapter.alpha"]),
        ({"name": "prefix", "peft": {"rank": 2}}, ["adapter.peft.rank: 2", "num_layers"]),
        ({"name": "adalora", "target_r": 2}, ["adapter.name: 'adalora'", "rank_pattern"]),
        ({"name": "lora", "peft": {"init_lora_weights": "pissa"}}, ["rewrites", "q_proj.weight"]),
        ({"name": "lora", "peft": {"init_lora_weights": "olora"}}, ["rewrites", "k_proj.weight"]),
        ({"name": "lora", "peft": {"init_lora_weights": "no such"}}, ["adapter.name: 'lora'", "no such"]),
    ],
    ids=["key", "own key", "foreign key", "adalora", "pissa", "olora", "value"],
)
def test_options_that_cannot_be_are_one_line(lab: Any, adapter: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        lab.run(lab.exp(adapter=adapter, model={"dtype": "float32"}, **ONE))
    assert all(w in str(caught.value) for w in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_section_of_options_keeps_the_runs_id(lab: Any) -> None:
    assert "peft" not in lab.exp().identity()["adapter"]
    assert lab.exp(adapter={"peft": {"use_rslora": True}}).identity()["adapter"]["peft"] == {"use_rslora": True}


# ------------------------------------------------------------------------------- what starts anew is in the export


@pytest.mark.parametrize(
    "adapter",
    [
        {"name": "lora", "r": 3},
        {"name": "ia3"},
        {"name": "prefix", "num_virtual_tokens": 3},
        {"name": "adapter", "bottleneck": 4},
        {"name": "vera", "r": 4, "target_modules": ["query"]},
        {"name": "none"},
    ],
    ids=lambda a: a["name"],
)
def test_a_pooler_that_the_base_lacks_is_trained_and_saved(lab: Any, adapter: dict) -> None:
    """A loader draws pooler and head anew, each time others; those of the run come with its export."""
    folder = str(lab.root / "body")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        body = BertModel(BertConfig(vocab_size=1536, pad_token_id=1, **size), add_pooling_layer=False)
    body.save_pretrained(folder)
    AutoTokenizer.from_pretrained(lab.base("bert")).save_pretrained(folder)
    exp = lab.exp(model={"path": folder, "dtype": "float32", **HEADS}, adapter=adapter, **ONE)
    run = lab.run(exp)
    tensors = [load_file(f) for f in (run / "global").glob("*.safetensors")]
    assert any("pooler" in name for held in tensors for name in held)
    torch.manual_seed(12345)
    if adapter["name"] == "none":
        model = AutoModelForSequenceClassification.from_pretrained(run / "global")
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        loader = fedsim.load_adapter if adapter["name"] == "adapter" else peft.PeftModel.from_pretrained
        model = loader(base, str(run / "global"))
    assert loss_of(lab, exp, model) == pytest.approx(reported(lab, run), rel=1e-4)
