"""Bases whose attention slides a window, on examples shorter and longer than it: training and scoring against a plain loop."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from tiers import fast
from torch import Tensor, nn

from fedsim.data.tokens import Tokens
from fedsim.models import adapters
from fedsim.models.attention import use_padded
from fedsim.models.base import load_base, quiet
from fedsim.models.forward import Net
from fedsim.models.locate import find
from fedsim.models.probe import probe
from fedsim.models.stacked import StackedNet
from fedsim.models.unsuitable import Unsuitable

WINDOW, CPU = 8, torch.device("cpu")
LENGTHS = (30, 5, 21, 8, 9, 2)
ROWS = [np.random.default_rng(n).integers(3, 97, n) for n in LENGTHS]
PROMPTS = np.array([max(1, n // 3) for n in LENGTHS])
SINGLE = ("mixtral", "gpt_oss")  # transformers' experts have no product in float64
UNPACKED = ("gemma2", "gpt_neo", *SINGLE)  # soft caps, masks of their own, experts
SIZE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SIZE |= {
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"]}
BASES: dict[str, Any] = {
    "gemma2": lambda: tf.Gemma2Config(**SIZE, head_dim=16, sliding_window=WINDOW),
    "gemma3": lambda: tf.Gemma3TextConfig(**SIZE, **LOCAL, head_dim=16, sliding_window=WINDOW),
    "mistral": lambda: tf.MistralConfig(**SIZE, sliding_window=WINDOW),
    "qwen2": lambda: tf.Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": lambda: tf.Qwen3Config(**SIZE, **LOCAL, head_dim=16, use_sliding_window=True, sliding_window=WINDOW),
    "phi3": lambda: tf.Phi3Config(**SIZE, sliding_window=WINDOW),
    "cohere2": lambda: tf.Cohere2Config(**SIZE, **LOCAL, sliding_window=WINDOW),
    "starcoder2": lambda: tf.Starcoder2Config(**SIZE, sliding_window=WINDOW),
    "olmo3": lambda: tf.Olmo3Config(**SIZE, **LOCAL, sliding_window=WINDOW),
    "exaone4": lambda: tf.Exaone4Config(**SIZE, **LOCAL, sliding_window=WINDOW),
    "smollm3": lambda: tf.SmolLM3Config(**SIZE, **LOCAL, use_sliding_window=True, sliding_window=WINDOW),
    "mixtral": lambda: tf.MixtralConfig(**SIZE, sliding_window=WINDOW, num_local_experts=2),
    "gpt_oss": lambda: tf.GptOssConfig(
        **SIZE, **LOCAL, head_dim=16, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1
    ),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=2,
        window_size=WINDOW,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "alpha": 6, "dropout": 0.0, "target_modules": "all-linear", "init": "gaussian"},
    "prefix": {"num_virtual_tokens": 9, "projection": False, "hidden": 8},
    "prompt": {"num_virtual_tokens": 4, "init_text": None},
    "p_tuning": {"num_virtual_tokens": 4, "hidden": 8},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def weights(kind: str) -> tuple[Any, dict[str, Tensor]]:
    """A config, and random weights of which none is at its initial value."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(7)
        model = tf.AutoModelForCausalLM.from_config(BASES[kind]())
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.config, model.state_dict()


def base(kind: str, **keys: Any) -> nn.Module:
    """The frozen base, as transformers makes it."""
    config, state = weights(kind)
    with quiet():
        model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(config), **keys)
        model.load_state_dict(state)
    model.config.use_cache = False
    return model.to(torch.float32 if kind in SINGLE else torch.float64).requires_grad_(False).eval()


def attached(model: nn.Module, method: str) -> tuple[nn.Module, list[nn.Module], dict[str, nn.Parameter]]:
    """The model with an adapter that is moved off its start; the adapter's modules; and what is trained."""
    model, own = adapters.attach(model, method, METHODS[method], task="causal_lm", seed=1)
    params = adapters.trained(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in params.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval(), own, params


def plain(kind: str, method: str) -> tuple[Tensor, list[Tensor]]:
    """Log-likelihood of each answer token by transformers' eager attention on one unpadded row after another, and gradients."""
    model, _, params = attached(base(kind, attn_implementation="eager"), method)
    logs = []
    for row, prompt in zip(ROWS, PROMPTS, strict=True):
        ids = torch.from_numpy(row)[None]
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(row) :]
        logs.append(-F.cross_entropy(out[prompt - 1 : -1].double(), ids[0, prompt:], reduction="none"))
    found = torch.cat(logs)
    return found.detach(), list(torch.autograd.grad(found.sum(), list(params.values())))


def ours(net: Any, params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same by a net of fedsim's, all rows at once."""
    logits, _, targets = net.logits(ROWS, PROMPTS, 0)
    found = -F.cross_entropy(logits[0].double(), targets, reduction="none")
    return found.detach(), list(torch.autograd.grad(found.sum(), params))


def same(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    """Eager attention has its softmax in float32 whatever the base's type, so float64 agrees no further than that."""
    assert torch.allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        assert float((a.view(b.shape) - b).norm()) < 1e-5 * float(b.norm())


PRODUCTS = [(k, m) for k in BASES for m in ("lora", "prefix")]
PRODUCTS += [(k, m) for k in ("gemma2", "gemma3", "phi3") for m in ("prompt", "p_tuning")]


COVER = [("gemma2", "lora"), ("gemma3", "lora"), ("mistral", "lora"), ("gpt_oss", "lora"), ("gpt_neo", "prefix")]
COVER += [("qwen2", "prefix"), ("phi3", "prompt")]


@pytest.mark.parametrize(("kind", "method"), fast(PRODUCTS, *COVER))
def test_padded_batches_and_lanes_are_rows_alone(kind: str, method: str) -> None:
    """Of six rows three are longer than the window, one by far; the prefix is longer than it, too."""
    expected = plain(kind, method)
    model = base(kind)
    use_padded(model)
    model, own, params = attached(model, method)
    net = Net(model, own, task="causal_lm", device=CPU, base_dropout=False, autocast=None)
    net.train(False)
    same(ours(net, list(params.values())), expected)
    try:
        stacked = StackedNet(model, own, task="causal_lm", device=CPU)
        probe(stacked)
    except Unsuitable:
        assert kind in UNPACKED or method == "prefix"
        return
    assert kind not in UNPACKED and method != "prefix"
    flat = stacked.layout.fill(stacked.layout.empty(CPU), {n: p.detach() for n, p in params.items()})
    stacked.bind(flat[None], torch.zeros_like(flat)[None])
    stacked.train(False)
    same(ours(stacked, list(stacked.leaves.values())), expected)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("kind", fast(["gemma2", "gemma3", "qwen2"], "gemma2"))
def test_pads_on_either_side_leave_no_trace(tmp_path: Path, kind: str, dtype: str) -> None:
    """As the base is loaded: generation pads on the left, where the first pads attend to nothing at all."""
    base(kind).save_pretrained(tmp_path)
    model = load_base(find(str(tmp_path)), task="causal_lm", dtype=dtype, labels=None, pad_token_id=0, seed=0)
    width = max(LENGTHS)
    for side in ("left", "right"):
        places = [slice(width - n, None) if side == "left" else slice(n) for n in LENGTHS]
        ids = torch.zeros(len(ROWS), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, (row, place) in enumerate(zip(ROWS, places, strict=True)):
            ids[i, place], mask[i, place] = torch.from_numpy(row), 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        assert out.isfinite().all()
        for i, (row, place) in enumerate(zip(ROWS, places, strict=True)):
            alone = model(input_ids=torch.from_numpy(row)[None]).logits[0]
            near = {"float64": 1e-6, "float16": 2e-2}[dtype]
            assert float((out[i, place] - alone).norm()) < near * float(alone.norm())


@pytest.mark.parametrize("kind", fast(["gemma2", "gemma3", "mistral", "gpt_neo"], "gemma2"))
def test_a_prefix_survives_that_layers_are_computed_twice(kind: str) -> None:
    """A layer appends its keys to the cache that holds the prefix; computed again it must find the prefix alone."""
    tokens = Tokens(
        ids=torch.from_numpy(np.concatenate(ROWS).astype(np.int32)),
        offsets=torch.tensor(np.cumsum([0, *LENGTHS])),
        prompts=torch.tensor(PROMPTS, dtype=torch.int32),
        labels=torch.zeros(len(ROWS), dtype=torch.int64),
        pad_id=0,
        is_classes=False,
    )
    model = base(kind)
    use_padded(model)
    model, own, params = attached(model, "prefix")
    net = Net(model, own, task="causal_lm", device=CPU, base_dropout=False, autocast=None)
    found = []
    for on in (False, True):
        grad = torch.zeros(1, net.layout.numel, dtype=torch.float64)
        weights = net.layout.fill(net.layout.empty(CPU), {n: p.detach().clone() for n, p in params.items()})[None]
        net.checkpoint(on)
        net.bind(weights.clone(), grad)
        loss, _ = net.backward(tokens, [np.arange(len(ROWS))], torch.tensor([1.0]))
        found.append((loss, grad))
    assert float(found[0][1].norm()) > 0
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
