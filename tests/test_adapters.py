"""What is put on which base, what is trained, how it starts, and what its files say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiers import fast, fast_only
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import fedsim
from fedsim.core.errors import UserError
from fedsim.models import adapters

LORA = {"r": 3, "alpha": 6, "dropout": 0.0, "target_modules": "auto", "init": "kaiming"}
HEADS = {"model": {"task": "sequence_classification"}}


@pytest.fixture
def attach(lab: Any) -> Callable[..., nn.Module]:
    """(architecture, adapter, keys) -> the model with it, in float32 unless told otherwise."""

    def make(
        kind: str, name: str, keys: dict, *, dtype: Any = torch.float32, seed: int = 0, heads: bool = False
    ) -> Any:
        auto = AutoModelForSequenceClassification if heads or kind == "bert" else AutoModelForCausalLM
        base = auto.from_pretrained(lab.base(kind), dtype=dtype).requires_grad_(False)
        task = "sequence_classification" if heads or kind == "bert" else "causal_lm"
        return adapters.attach(base, name, keys, task=task, seed=seed)[0]

    return make


# ---------------------------------------------------------------------------------------------- where it goes


@pytest.mark.parametrize(
    ("kind", "leaves"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj"}),
        ("gpt2", {"c_attn"}),
        ("bert", {"query", "key", "value"}),
        ("gpt_neox", {"query_key_value"}),
    ],
)
def test_auto_finds_the_attention_input_projections(attach: Any, kind: str, leaves: set[str]) -> None:
    names = [n for n in adapters.trained(attach(kind, "lora", LORA)) if ".lora_A." in n]
    assert {n.split(".lora_A.")[0].rsplit(".", 1)[-1] for n in names} == leaves
    assert len(names) == 2 * len(leaves), "in both layers"


@fast_only(0, 1, 2)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "gpt_neox", "opt", "phi"])
def test_bottlenecks_follow_attention_and_mlp_in_every_layer(attach: Any, kind: str) -> None:
    model = attach(kind, "adapter", {"bottleneck": 4, "dropout": 0.0, "activation": "gelu", "target_modules": "auto"})
    names = [n for n in adapters.trained(model) if n.endswith("adapter_down.weight")]
    assert len(names) == 4, names  # two layers, two places each


@pytest.mark.parametrize("kind", fast(["llama", "gpt2", "bert", "gpt_neox", "opt", "phi"], "gpt2", "bert"))
@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_training_starts_from_the_base_exactly(lab: Any, attach: Any, kind: str, name: str) -> None:
    keys = LORA if name == "lora" else {"bottleneck": 4, "dropout": 0.0, "activation": "relu", "target_modules": "auto"}
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    ids = torch.arange(12).reshape(2, 6) + 5
    with torch.no_grad():
        plain = auto.from_pretrained(lab.base(kind)).eval()(input_ids=ids).logits
        assert torch.equal(attach(kind, name, keys).eval()(input_ids=ids).logits, plain)


@pytest.mark.parametrize("name", fast(["lora", "adapter", "ia3"], "lora", "adapter"))
def test_a_target_that_does_not_exist_is_told_with_those_that_do(lab: Any, name: str) -> None:
    keys = {"target_modules": ["q_proj", "wrong_proj"], **({"feedforward_modules": []} if name == "ia3" else {})}
    with pytest.raises(UserError) as caught:
        lab.run(adapter={"name": name, **keys})
    text = str(caught.value)
    assert text.startswith("adapter.target_modules: 'wrong_proj' does not exist")
    assert all(leaf in text for leaf in ("q_proj", "k_proj", "o_proj", "down_proj", "gate_proj"))
    assert "\n" not in text


# ---------------------------------------------------------------------------------------- any other PEFT method


@pytest.mark.parametrize(
    ("name", "keys"),
    fast(
        [
            ("vera", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
            ("loha", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
            ("LOKR", {"r": 2, "target_modules": "all-linear"}),
            ("ln_tuning", {"target_modules": ["input_layernorm"]}),
        ],
        ("LOKR", {"r": 2, "target_modules": "all-linear"}),
    ),
)
def test_any_peft_method_trains_by_its_name(lab: Any, distance: Any, name: str, keys: dict) -> None:
    run = lab.run(adapter={"name": name, **keys}, model={"dtype": "float32"})
    start, end = (load_file(run / place / "adapter_model.safetensors") for place in ("init", "global"))
    assert any(not torch.equal(start[k], end[k]) for k in start)
    base = AutoModelForCausalLM.from_pretrained(lab.base("llama"))
    model = peft.PeftModel.from_pretrained(base, str(run / "global"))
    assert model.peft_config["default"].peft_type.value.lower() == name.lower()
    loaded = peft.get_peft_model_state_dict(model)
    assert distance({k: loaded[k] for k in end}, end) == 0


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"name": "vera", "rank": 3}, ["unknown key adapter.rank", "Valid keys", "target_modules"]),
        ({"name": "lorra"}, ["adapter.name: 'lorra'", "did you mean lora?", "p_tuning", "vera"]),
        (
            {"name": "lora", "rank": 3},
            ["unknown key adapter.rank (did you mean adapter.r?)", "name, r, alpha"],
        ),
    ],
    ids=["key of PEFT's", "name", "key of ours"],
)
def test_a_wrong_name_or_key_is_told_before_any_model_is_loaded(lab: Any, adapter: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        lab.exp(adapter=adapter, model={"path": str(lab.root / "no such model")})
    assert all(w in str(caught.value) for w in words), str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------- types and counts


@pytest.mark.parametrize("dtype", fast(["bfloat16", "float16"], "bfloat16"))
@pytest.mark.parametrize(
    "adapter",
    fast(
        [{"name": "lora", "r": 3}, {"name": "adapter", "bottleneck": 4}, {"name": "prefix", "num_virtual_tokens": 3}],
        *({"name": "adapter", "bottleneck": 4}, {"name": "prefix", "num_virtual_tokens": 3}),
    ),
    ids=lambda a: a["name"],
)
def test_what_is_trained_is_float32_on_a_16_bit_base(attach: Any, lab: Any, dtype: str, adapter: dict) -> None:
    run = lab.run(adapter=adapter, model={"dtype": dtype})
    for file, tensors in lab.tensors(run).items():
        assert {t.dtype for t in tensors.values()} == {torch.float32}, file
    losses = [r["value"] for r in lab.metrics(run) if r["name"] == "loss"]
    assert losses and all(x == x and x < 100 for x in losses)


def test_heads_are_float32_on_a_16_bit_base_whose_weights_stay_frozen(attach: Any) -> None:
    model = attach("llama", "lora", LORA, dtype=torch.bfloat16, heads=True)
    kinds = {n: p.dtype for n, p in adapters.trained(model).items()}
    assert set(kinds.values()) == {torch.float32}
    assert any(".score." in n for n in kinds)
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_a_whole_model_under_16_bit_is_kept_in_float32(lab: Any) -> None:
    run = lab.run(adapter={"name": "none"}, model={"dtype": "bfloat16"})
    assert {t.dtype for t in load_file(run / "global/model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("adapter", "trained"),
    [
        ({"name": "lora", "r": 3}, 2 * 3 * 3 * (32 + 32)),  # layers x (q, k, v) x rank x (in + out)
        ({"name": "adapter", "bottleneck": 4}, 2 * 2 * (32 * 4 + 4 + 4 * 32 + 32)),  # layers x places x two affine maps
        ({"name": "prompt", "num_virtual_tokens": 5}, 5 * 32),
        ({"name": "prefix", "num_virtual_tokens": 5}, 5 * 2 * 2 * 32),  # layers x (key, value)
        ({"name": "ia3"}, 2 * (32 + 32 + 64)),  # keys, values, the MLP's inner activations
        ({"name": "none"}, 1536 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32),  # the tied head counts once
    ],
    ids=lambda v: v["name"] if isinstance(v, dict) else "",
)
def test_what_is_trained_and_travels_is_counted(lab: Any, adapter: dict, trained: int) -> None:
    run = lab.run(adapter=adapter, model={"dtype": "float32"})
    about = json.loads((run / "model.json").read_text())
    assert about["trained"] == trained
    assert about["bytes_up"] == about["bytes_down"] == 4 * trained
    base = 1536 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert about["parameters"] == base + (0 if adapter["name"] == "none" else trained)
    assert about["per_cent"] == pytest.approx(100 * trained / about["parameters"])


@pytest.mark.parametrize("name", ["lora", "adapter", "p_tuning"])
@pytest.mark.parametrize("kind", fast(["llama", "bert"], "bert"))
def test_the_head_is_trained_exchanged_and_loaded_again(lab: Any, name: str, kind: str) -> None:
    run = lab.run(model={"path": lab.base(kind), "task": "sequence_classification"}, adapter={"name": name})
    file = {"adapter": "fedsim_adapter", "p_tuning": "fedsim_state"}.get(name, "adapter_model") + ".safetensors"
    start, end = load_file(run / "init" / file), load_file(run / "global" / file)
    head = [k for k in end if "score" in k or "classifier" in k]
    assert head and all(not torch.equal(start[k], end[k]) for k in head)
    base = AutoModelForSequenceClassification.from_pretrained(lab.base(kind), dtype=torch.float64, num_labels=3)
    base.config.pad_token_id = 1
    loaded = dict(fedsim.load_adapter(base, run / "global").named_parameters())
    (weight,) = [k for k in head if k.endswith("weight")]
    assert any(torch.equal(p.detach(), end[weight]) for p in loaded.values() if p.shape == end[weight].shape)


# -------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("name", ["lora", "p_tuning", "adapter", "prefix", "prompt"])
def test_how_it_starts_is_a_function_of_the_seed(attach: Any, name: str) -> None:
    keys = {
        "lora": LORA,
        "p_tuning": {"num_virtual_tokens": 3, "hidden": 8},
        "adapter": {"bottleneck": 4, "dropout": 0.0, "activation": "gelu", "target_modules": "auto"},
        "prefix": {"num_virtual_tokens": 3, "projection": False, "hidden": 8},
        "prompt": {"num_virtual_tokens": 3, "init_text": None},
    }[name]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = {n: p.detach() for n, p in adapters.trained(attach("llama", name, keys)).items()}
    assert torch.equal(torch.random.get_rng_state(), before), "the process's own generator is left alone"
    torch.manual_seed(2)
    same = adapters.trained(attach("llama", name, keys))
    other = adapters.trained(attach("llama", name, keys, seed=1))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_a_new_head_is_a_function_of_the_seed(lab: Any) -> None:
    heads = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = lab.run(**HEADS, name=name, seed=seed)
        tensors = load_file(run / "init/adapter_model.safetensors")
        heads.append(next(t for k, t in tensors.items() if "score" in k))
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize(
    ("init", "deviation"),
    [
        ("kaiming", (3 * 32) ** -0.5),  # uniform within 1 / sqrt(in): a = sqrt(5) in PEFT's default
        ("xavier", (2 / (32 + 16)) ** 0.5),  # Glorot and Bengio, 2010, normal
        ("gaussian", 1 / 16),  # PEFT's: 1 / r
    ],
)
def test_lora_starts_as_named(attach: Any, init: str, deviation: float) -> None:
    """3072 draws in six matrices of 16 x 32: the standard deviation is known to 1.3 per cent; within 5 of those."""
    params = adapters.trained(attach("llama", "lora", {**LORA, "r": 16, "init": init}))
    drawn = torch.cat([p.detach().flatten() for n, p in params.items() if ".lora_A." in n])
    assert len(drawn) == 3072
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.065)
    assert all(not p.any() for n, p in params.items() if ".lora_B." in n)


def test_a_prompt_may_start_from_a_text(lab: Any) -> None:
    """Its rows are the embeddings of the text's tokens, repeated or cut to the number asked for."""
    from transformers import AutoTokenizer

    run = lab.run(
        adapter={"name": "prompt", "num_virtual_tokens": 4, "init_text": "the profit"}, model={"dtype": "float32"}
    )
    start = load_file(run / "init/adapter_model.safetensors")["prompt_embeddings"]
    base = AutoModelForCausalLM.from_pretrained(lab.base("llama"))
    ids = AutoTokenizer.from_pretrained(lab.base("llama"))("the profit")["input_ids"]
    expected = base.get_input_embeddings().weight.detach()[torch.tensor((ids * 4)[:4])]
    assert torch.equal(start, expected)


# -------------------------------------------------------------------------------------------------------- files


def test_the_exported_config_names_the_base_as_the_user_did(lab: Any) -> None:
    run = lab.run()
    for place in ("init", "global", "best"):
        config = json.loads((run / place / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == lab.base("llama")
        assert config["inference_mode"] is True


@pytest.mark.parametrize("name", ["adapter", "p_tuning"])
def test_loading_on_another_base_is_told(lab: Any, name: str) -> None:
    run = lab.run(adapter={"name": name})
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    )
    other = LlamaForCausalLM(config)
    with pytest.raises(UserError, match="does not fit this base"):
        fedsim.load_adapter(other, run / "global", trainable=True)


def test_a_folder_without_an_adapter_is_told(lab: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(lab.base("llama"))
    with pytest.raises(UserError, match="holds no adapter; give global/"):
        fedsim.load_adapter(base, lab.root)
