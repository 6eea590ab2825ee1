"""PEFT's options go through, and what a run exports gives its reported loss again in the libraries' own loaders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_equivalence import Texts, adamw, load, train
from tiers import fast, fast_only
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ElectraConfig,
    OPTConfig,
    pipeline,
)

import fedsim
from fedsim.core.errors import UserError
from fedsim.models import adapters
from fedsim.models.base import quiet
from fedsim.models.card import write_card
from fedsim.models.locate import TINY, Source, find

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


@pytest.mark.parametrize("what", fast(OPTIONS, "ranks", "head of classes", "p_tuning"))
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


@pytest.mark.parametrize(("given", "name"), [(peft.LoraConfig, "LoraConfig"), (peft.PeftConfig(), "PeftConfig")])
def test_what_is_no_config_of_one_method_is_one_line(given: Any, name: str) -> None:
    with pytest.raises(fedsim.UserError, match=rf"^adapter: {name} is not the config of one method"):
        fedsim.Experiment(adapter=given)


@pytest.mark.parametrize("what", fast(CONFIGS, "vera"))
def test_a_config_object_of_peft_is_a_section_of_plain_keys(lab: Any, what: str) -> None:
    make, section = CONFIGS[what]
    exp, written = lab.exp(adapter=make(), **ONE), lab.exp(adapter=section, **ONE)
    assert exp == written and exp.to_dict()["adapter"].keys() == section.keys()
    run = lab.run(exp)
    assert fedsim.Experiment.load(run / "config.yaml").adapter == exp.adapter
    again = peft.PeftModel.from_pretrained(load(exp), str(run / "global")).double()
    assert loss_of(lab, exp, again) == pytest.approx(reported(lab, run), rel=1e-6)


@fast_only(0, 2, 4, 6)
@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (
            {"name": "lora", "peft": {"use_dorra": True}},
            ["unknown key adapter.peft.use_dorra (did you mean adapter.peft.use_dora?)"],
        ),
        ({"name": "lora", "peft": {"lora_alpha": 32}}, ["adapter.peft.lora_alpha: 32", "write adapter.alpha"]),
        ({"name": "lora", "peft": {"use_dora": "maybe"}}, ["adapter.peft.use_dora: 'maybe'", "true or false"]),
        ({"name": "prefix", "peft": {"rank": 2}}, ["unknown key adapter.peft.rank", "num_layers"]),
        ({"name": "adalora", "target_r": 2}, ["adapter.name: 'adalora'", "rank_pattern"]),
        (
            {"name": "lora", "peft": {"init_lora_weights": "pissa"}},
            ["adapter.peft.init_lora_weights: 'pissa'", "orthogonal"],
        ),
        (
            {"name": "lora", "peft": {"init_lora_weights": "olora"}},
            ["adapter.peft.init_lora_weights: 'olora'", "gaussian"],
        ),
        ({"name": "lora", "peft": {"bias": "no such"}}, ["adapter.name: 'lora'", "bias"]),
    ],
    ids=["key", "own key", "type", "foreign key", "adalora", "pissa", "olora", "value"],
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


WITH_POOLER: list[dict[str, Any]] = [
    *({"name": "lora", "r": 3}, {"name": "ia3"}, {"name": "prefix", "num_virtual_tokens": 3}, {"name": "none"}),
    *({"name": "adapter", "bottleneck": 4}, {"name": "vera", "r": 4, "target_modules": ["query"]}),
]


@pytest.mark.parametrize(
    "adapter",
    fast(WITH_POOLER, WITH_POOLER[0], *WITH_POOLER[3:5]),
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


@pytest.mark.parametrize("name", fast(["prompt", "p_tuning"], "p_tuning"))
@pytest.mark.parametrize("kind", fast(["electra", "opt"], "electra"))
def test_virtual_tokens_are_as_wide_as_the_embeddings(lab: Any, kind: str, name: str) -> None:
    """Some bases have embeddings narrower than their layers, with a projection between the two."""
    folder, heads = str(lab.root / kind), kind == "electra"
    size = {"vocab_size": 1536, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 1}
    config = (
        ElectraConfig(**size, embedding_size=16, intermediate_size=64, num_labels=3)
        if heads
        else OPTConfig(**size, word_embed_proj_dim=16, ffn_dim=64, max_position_embeddings=256, eos_token_id=0)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        (AutoModelForSequenceClassification if heads else AutoModelForCausalLM).from_config(config).save_pretrained(
            folder
        )
    AutoTokenizer.from_pretrained(lab.base("bert")).save_pretrained(folder)
    adapter = {"name": name, "num_virtual_tokens": 3}
    exp = lab.exp(model={"path": folder, "dtype": "float32", **(HEADS if heads else {})}, adapter=adapter, **ONE)
    run = lab.run(exp)
    again = peft.PeftModel.from_pretrained(load(exp).float(), str(run / "global"))
    assert loss_of(lab, exp, again) == pytest.approx(reported(lab, run), rel=1e-5)


# ---------------------------------------------------------------------------------------- in other people's loaders


def run_card(folder: Path, base: str) -> dict[str, Any]:
    """What the Python in a folder's model card makes, with the places filled in that it leaves open."""
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    made: dict[str, Any] = {"FOLDER": str(folder), "BASE": base}
    with quiet():
        exec(code, made)
    return made


LOADERS = {"lora": {"name": "lora", "r": 3}, "prefix": {"name": "prefix", "num_virtual_tokens": 3}}
LOADERS |= {"adapter": {"name": "adapter", "bottleneck": 4}, "none": {"name": "none"}}


CARDS = [(name, model) for name in LOADERS for model in ("tiny", "folder", "heads")]


@pytest.mark.parametrize(
    ("name", "model"), fast(CARDS, ("lora", "tiny"), ("prefix", "heads"), ("adapter", "folder"), ("none", "tiny"))
)
def test_the_code_of_a_model_card_gives_the_scores_that_stand_in_it(lab: Any, name: str, model: str) -> None:
    """`global/`, the central model and the chosen one: base found, tokenizer there, loss as reported."""
    base = "tiny" if model == "tiny" else lab.base("llama")
    heads = HEADS if model == "heads" else {}
    modes = {"modes": ["federated", "central"], "data": {"max_length": 64}, **ONE}
    exp = lab.exp(model={"path": base, "dtype": "float32", **heads}, adapter=LOADERS[name], **modes)
    run = lab.run(exp)
    found = str(TINY) if model == "tiny" else base
    for place in ("global", "best", "central", "central/best"):
        card = (run / place / "README.md").read_text()
        assert str(lab.root) not in card and str(TINY) not in card and "More Information Needed" not in card
        assert "60 training examples" in card and "iid, num_clients 1" in card
        said = float(re.search(r"\| validation \| loss \| ([\d.]+) \|", card)[1])
        scope = "central" if "central" in place else "federated"
        assert round(lab.value(run, split="validation", client=None, round=1, name="loss", scope=scope), 4) == said
        made = run_card(run / place, found)
        told = Texts(found, lab.rows["validation"], exp.data.labels, bool(heads))
        told.tok = made["tokenizer"]
        with torch.no_grad():
            loss = told.loss(made["model"].eval(), range(len(lab.rows["validation"]))).item()
        assert loss == pytest.approx(said, abs=1e-4)
    if not heads:
        assert made["pipe"]("Profit rose sentiment:", max_new_tokens=2)[0]["generated_text"].startswith("Profit")


def test_a_folder_alone_is_a_pipeline(lab: Any) -> None:
    """transformers takes an adapter's folder for a model: it finds the base by the adapter's config."""
    run = lab.run(model={"path": "tiny", "dtype": "float32"}, **ONE)
    with quiet():
        pipe = pipeline("text-generation", model=str(run / "global"))
    assert json.loads((run / "global" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(TINY)
    assert any("lora" in n for n, _ in pipe.model.named_parameters())
    assert len(pipe.tokenizer) == len(AutoTokenizer.from_pretrained(TINY))


def test_a_card_names_a_hub_base_and_no_local_path(tmp_path: Path) -> None:
    config = fedsim.Experiment(
        data={"name": "table", "path": str(tmp_path / "rows.csv"), "labels": ["a", "b"]},
        adapter={"name": "PROMPT_TUNING", "num_virtual_tokens": 3, "tokenizer_name_or_path": str(tmp_path)},
    ).to_dict()
    about = {"title": "federated model", "scores": [("test", "accuracy", 0.5)], "examples": 7}
    write_card(tmp_path, config, find("org/base"), **about)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: org/base\n" in card and "table `rows.csv`, 7 training" in card and str(tmp_path) not in card
    assert (
        "| test | accuracy | 0.5000 |" in card
        and "AutoPeftModelForCausalLM.from_pretrained(FOLDER, dtype='float32')" in card
    )
    write_card(tmp_path, config, Source("x.gguf", str(tmp_path), gguf="x.gguf"), **about)
    card = (tmp_path / "README.md").read_text()
    assert "gguf_file='x.gguf'" in card and "base_model:" not in card and str(tmp_path) not in card
