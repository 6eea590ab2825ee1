"""A small laboratory for the tests that run experiments: few rows, models of a few thousand parameters, plain loaders."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell that starts tests in the background, or nohup, has them and all that they start ignore these.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

LABELS = ["negative", "neutral", "positive"]
COUNTS = {"train": (12, 28, 20), "validation": (6, 10, 8), "test": (4, 6, 5)}  # rows per class
TEMPLATE = "{sentence} sentiment: {label}"
WIDTH, LAYERS, HEADS = 32, 2, 2


def _merge(into: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `into`, section by section; a section whose `name` changes starts afresh."""
    out = dict(into)
    for key, value in new.items():
        same = isinstance(value, dict) and isinstance(out.get(key), dict)
        if same and value.get("name", out[key].get("name")) == out[key].get("name"):
            out[key] = {**out[key], **value}
        else:
            out[key] = value
    return out


def _config(kind: str) -> Any:
    import transformers as tf

    size = {"vocab_size": 1536, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    wide = {**size, "intermediate_size": 2 * WIDTH, **ends}
    if kind == "llama":
        return tf.LlamaConfig(**wide, max_position_embeddings=256, tie_word_embeddings=True)
    if kind == "phi":  # fused projections and unfused ones in one family: phi has q, k, v and a `dense` output
        return tf.PhiConfig(**wide, max_position_embeddings=256)
    if kind == "gpt_neox":
        return tf.GPTNeoXConfig(**wide, max_position_embeddings=256)
    if kind == "bert":
        return tf.BertConfig(**wide, max_position_embeddings=256, num_labels=len(LABELS))
    if kind == "opt":
        return tf.OPTConfig(**size, **ends, ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH, max_position_embeddings=256)
    if kind == "gpt2":
        return tf.GPT2Config(vocab_size=1536, n_positions=256, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, **ends)
    far = {**wide, "max_position_embeddings": 256}
    if kind == "llama_shared":  # two query heads share one head of keys and values each
        return tf.LlamaConfig(**{**far, "num_attention_heads": 4}, num_key_value_heads=2, tie_word_embeddings=True)
    if kind == "qwen2":
        return tf.Qwen2Config(**far, num_key_value_heads=1)
    if kind == "gemma":
        return tf.GemmaConfig(**far, num_key_value_heads=1, head_dim=16)
    if kind == "mistral":  # a window that most rows are longer than
        return tf.MistralConfig(**far, num_key_value_heads=1, sliding_window=4)
    if kind == "phi3":  # other rotary frequencies for rows of more than 16 tokens
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
        rope |= {"original_max_position_embeddings": 16, "factor": 16.0}
        return tf.Phi3Config(**far, rope_parameters=rope, original_max_position_embeddings=16)
    if kind == "roberta":
        return tf.RobertaConfig(**far, type_vocab_size=1, num_labels=len(LABELS))
    if kind == "distilbert":
        size = {"dim": WIDTH, "hidden_dim": 2 * WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "num_labels": len(LABELS)}
        return tf.DistilBertConfig(vocab_size=1536, max_position_embeddings=256, pad_token_id=1, **size)
    if kind == "deberta":  # keys are made of embeddings of distances, too
        how = {"relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
        return tf.DebertaV2Config(**far, **how, max_relative_positions=-1, num_labels=len(LABELS))
    if kind == "xlnet":  # its head reads the last position, not the first
        return tf.XLNetConfig(
            vocab_size=1536,
            d_model=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            d_inner=64,
            pad_token_id=1,
            num_labels=len(LABELS),
        )
    if kind == "mixtral":
        return tf.MixtralConfig(**far, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    if kind == "bloom":  # position by ALiBi, inside the attention
        return tf.BloomConfig(vocab_size=1536, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, **ends)
    if kind == "mamba":  # no attention: tokens mix in a recurrence
        return tf.MambaConfig(vocab_size=1536, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=4, **ends)
    raise KeyError(kind)


def metrics_lines(run: Path) -> list[str]:
    """The lines of a run's metrics files, mode after mode."""
    files = [run / "metrics.jsonl", *(run / "metrics" / f"{mode}.jsonl" for mode in ("local", "federated", "central"))]
    return [line for file in files if file.is_file() for line in file.read_text().splitlines()]


class Lab:
    """Where a test's experiments run.

    Attributes:
        root: folder of the test.
        rows: split -> [(sentence, label)], in the order of the data files.
    """

    def __init__(self, root: Path, shared: Path, rows: dict[str, list[tuple[str, str]]]) -> None:
        self.root, self.shared, self.rows = root, shared, rows

    def base(self, kind: str) -> str:
        """Folder of a random model of 32 features and 2 layers, with the tokenizer of `tiny`.

        Every parameter is moved off its initial value, so that no bias or gain starts at 0 or 1 and no gradient
        vanishes for a reason a real model does not have.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        from fedsim.models.locate import TINY

        folder = self.shared / kind
        if not folder.is_dir():
            encoder = kind in ("bert", "roberta", "distilbert", "deberta", "xlnet")
            auto = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(11)
                model = auto.from_config(_config(kind))
                for parameter in model.parameters():
                    parameter.data += 0.08 * torch.randn_like(parameter)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
        return str(folder)

    def tree(self, **sections: Any) -> dict[str, Any]:
        """The nested dict of a small experiment in float64, with these sections changed."""
        data = {f: str(self.shared / f"{n}.jsonl") for f, n in zip(("path", "validation", "test"), COUNTS, strict=True)}
        tree = {
            "name": "lab",
            "seed": 3,
            "results": str(self.root / "results"),
            "rounds": 1,
            "modes": ["federated"],
            "model": {"path": self.base("llama"), "dtype": "float64"},
            "adapter": {"name": "lora", "r": 3, "alpha": 6},
            "data": {"name": "table", **data, "template": TEMPLATE, "labels": LABELS},
            "partition": {"name": "iid", "num_clients": 3},
            "local": {"steps": 2, "batch_size": 6, "lr": 5e-3, "betas": [0.9, 0.98]},
            "training": {"lanes": 2},  # nothing is measured; 3 sites are a pack of two and one of one
            "executor": {"name": "serial", "threads": 1},
        }
        return _merge(tree, sections)

    def exp(self, **sections: Any) -> Any:
        """The same, as an `Experiment`."""
        from fedsim import Experiment

        return Experiment.from_dict(self.tree(**sections))

    def run(self, exp: Any = None, **sections: Any) -> Path:
        """Run it; its folder."""
        import fedsim

        return fedsim.run(exp if exp is not None else self.exp(**sections), progress=False).path

    @staticmethod
    def metrics(folder: Path) -> list[dict[str, Any]]:
        """Metrics rows in order, less the seconds and what checkpoints took."""
        rows = [row for row in map(json.loads, metrics_lines(folder)) if not row["name"].startswith("checkpoint_")]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    @staticmethod
    def value(folder: Path, **where: Any) -> float:
        """The value of the one metrics row that has these columns."""
        rows = [r for r in Lab.metrics(folder) if all(r[k] == v for k, v in where.items())]
        assert len(rows) == 1, f"{len(rows)} rows with {where}"
        return rows[0]["value"]

    @staticmethod
    def tensors(folder: Path) -> dict[str, dict[str, Any]]:
        """Relative path -> tensors of every safetensors file in a run folder, checkpoints included."""
        from safetensors.torch import load_file

        return {str(f.relative_to(folder)): load_file(f) for f in sorted(folder.rglob("*.safetensors"))}

    def same_bits(self, one: Path, other: Path) -> None:
        """Assert that two run folders hold the same tensors, metrics rows and test predictions, bit for bit."""
        import torch

        a, b = self.tensors(one), self.tensors(other)
        assert a, f"no tensors in {one}"
        assert a.keys() == b.keys()
        for file in a:
            assert a[file].keys() == b[file].keys(), file
            for name, tensor in a[file].items():
                assert torch.equal(tensor, b[file][name]), f"{file}: {name}"
        assert self.metrics(one) == self.metrics(other)
        for name in ("predictions.csv", "scores.npz"):
            found = [f / name for f in (one, other)]
            assert len({p.read_bytes() if p.exists() else None for p in found}) == 1, name


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[tuple[str, str]]]]:
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import fedsim.runs.run  # noqa: F401

    gc.collect()
    gc.freeze()  # every run collects garbage at its end; looking through the libraries each time would be most of a test
    folder = tmp_path_factory.mktemp("lab")
    return folder, make_rows(folder)


def make_rows(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Write the laboratory's data files; split -> [(sentence, label)]."""
    from fedsim.data.headlines import generate

    made, rows = generate(5), {}
    for split, counts in COUNTS.items():
        by_length = sorted(made[split], key=lambda r: (len(r[0]), r[0]))
        group = {label: [r for r in by_length if r[1] == label] for label in LABELS}
        # Mostly short ones, for speed, and some of the longest, so that batches are padded.
        taken = {w: group[w][: n - n // 4] + group[w][-(n // 4) :] for w, n in zip(LABELS, counts, strict=True)}
        rows[split] = sorted(r for group in taken.values() for r in group)
        lines = [json.dumps({"sentence": s, "label": label}) for s, label in rows[split]]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return rows


@pytest.fixture
def lab(
    tmp_path: Path, _shared: tuple[Path, dict[str, list[tuple[str, str]]]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lab]:
    """A laboratory in the test's own folder: one torch thread, no figures (they have tests of their own)."""
    import torch

    import fedsim.analysis.plots

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(fedsim.plots, "save_figures", lambda folder: [])
    yield Lab(tmp_path, *_shared)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def distance() -> Callable[[dict[str, Any], dict[str, Any]], float]:
    """(tensors, tensors expected) -> the largest relative difference of a tensor, by 2-norms; both hold the same names."""

    def largest(found: dict[str, Any], expected: dict[str, Any]) -> float:
        assert found.keys() == expected.keys()
        assert expected, "nothing to compare"
        return max(float((found[n] - e).norm() / e.norm().clamp_min(1e-30)) for n, e in expected.items())

    return largest
