"""One trajectory each: what fedsim trains equals a plain PyTorch loop that follows `fedsim.batches` and `init/`.

The loops here share nothing with the package but the rows and the initial tensors: torch's AdamW or SGD over separate
parameters, transformers' schedules, whole padded batches, torch's cross entropy. Differences are relative 2-norms per
tensor, in float64, where rounding is some 1e-15 and every mistake in the mathematics is far above 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiers import fast
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)
from transformers import get_cosine_with_min_lr_schedule_with_warmup as cosine

import fedsim

TOLERANCE = 1e-9
Rows = Sequence[tuple[str, str]]


# ------------------------------------------------------------------------------------------- the plain loop


class Texts:
    """Rows as tensors, one batch at a time, by the tokenizer of `base`."""

    def __init__(self, base: str, rows: Rows, labels: Sequence[str], heads: bool) -> None:
        self.tok, self.rows, self.labels, self.heads = AutoTokenizer.from_pretrained(base), rows, list(labels), heads

    def batch(self, numbers: Iterable[int]) -> dict[str, Tensor]:
        """Padded ids, mask and, for a causal LM, the answer's tokens in place and -100 elsewhere; else classes."""
        ids, answers, classes = [], [], []
        for number in numbers:
            sentence, label = self.rows[number]
            classes.append(self.labels.index(label))
            if self.heads:  # a head reads what stands before the label
                ids.append(self.tok(f"{sentence} sentiment:")["input_ids"])
                continue
            prompt = self.tok(f"{sentence} sentiment:")["input_ids"]
            full = [*self.tok(f"{sentence} sentiment: {label}")["input_ids"], self.tok.eos_token_id]
            assert full[: len(prompt)] == prompt
            ids.append(full)
            answers.append([-100] * len(prompt) + full[len(prompt) :])
        width = max(map(len, ids))
        pad = self.tok.pad_token_id
        out = {
            "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        }
        if self.heads:
            return out | {"labels": torch.tensor(classes)}
        return out | {"labels": torch.tensor([row + [-100] * (width - len(row)) for row in answers])}

    def loss(self, model: nn.Module, numbers: Iterable[int]) -> Tensor:
        """Mean over all answer tokens of the batch, or over its rows under a head."""
        batch = self.batch(numbers)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if self.heads:
            return F.cross_entropy(logits, labels)
        logits = logits[:, -labels.shape[1] :]  # virtual tokens stand in front
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def load(exp: Any) -> nn.Module:
    """The base in float64, as transformers loads it."""
    auto = AutoModelForCausalLM if exp.model.task == "causal_lm" else AutoModelForSequenceClassification
    more = {} if exp.model.task == "causal_lm" else {"num_labels": 3}
    return auto.from_pretrained(exp.model.path, dtype=torch.float64, **more).eval()


def adamw(exp: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """torch's AdamW as the config states it."""
    w = exp.local
    return lambda ps: torch.optim.AdamW(ps, lr=w.lr, betas=tuple(w.betas), eps=w.eps, weight_decay=w.weight_decay)


def train(
    model: nn.Module,
    texts: Texts,
    steps: Iterable[np.ndarray],
    optimizer: torch.optim.Optimizer,
    *,
    clip: float | None = 1.0,
    schedule: Any = None,
) -> list[float]:
    """The loop that everybody writes; the loss of each step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for numbers in steps:
        optimizer.zero_grad()
        loss = texts.loss(model, numbers)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


def peft_model(exp: Any, init: Path) -> nn.Module:
    """The adapter of `init/` on the base, by PEFT alone."""
    config = peft.PeftConfig.from_pretrained(str(init))
    if config.is_prompt_learning:  # PEFT refuses to train these further, so they are made anew
        config.inference_mode = False
        model = peft.get_peft_model(load(exp), config).double().eval()
    else:
        model = peft.PeftModel.from_pretrained(load(exp), str(init), is_trainable=True).double().eval()
    peft.set_peft_model_state_dict(model, adapter_of(init))  # PEFT makes virtual tokens in float32, and rounds to that
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def state(model: nn.Module) -> dict[str, Tensor]:
    """What PEFT would save."""
    return {k: v.detach() for k, v in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()}


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def texts_of(lab: Any, exp: Any) -> Texts:
    return Texts(exp.model.path, lab.rows["train"], exp.data.labels, exp.model.task == "sequence_classification")


# ------------------------------------------------------------------------------- one client, one round, any method

ONE = {"partition": {"name": "iid", "num_clients": 1}, "local": {"steps": 4, "batch_size": 6, "lr": 5e-3}}
HEADS = {"task": "sequence_classification"}
PEFT_CASES = [
    ("llama", "lora", {"r": 3}, {}),
    ("llama", "prompt", {"num_virtual_tokens": 3}, {}),
    ("llama", "ia3", {}, {}),
    ("gpt2", "lora", {"r": 3}, {}),
    ("gpt2", "prompt", {"num_virtual_tokens": 3}, {}),
    ("gpt2", "ia3", {}, {}),
    ("bert", "lora", {"r": 3}, HEADS),
    ("bert", "prompt", {"num_virtual_tokens": 3}, HEADS),
    ("bert", "ia3", {}, HEADS),
    ("llama", "lora", {"r": 3}, HEADS),
]


@pytest.mark.parametrize(
    ("kind", "name", "keys", "model"), fast(PEFT_CASES, PEFT_CASES[0], PEFT_CASES[4], PEFT_CASES[8], PEFT_CASES[9])
)
def test_one_client_is_plain_peft_training(
    lab: Any, distance: Any, kind: str, name: str, keys: dict, model: dict
) -> None:
    exp = lab.exp(**ONE, adapter={"name": name, **keys}, model={"path": lab.base(kind), **model})
    run = lab.run(exp)
    plain, texts = peft_model(exp, run / "init"), texts_of(lab, exp)
    start = {k: v.clone() for k, v in state(plain).items()}
    train(plain, texts, fedsim.batches(exp, "site-1", 1), adamw(exp)(trained(plain)))
    assert distance(adapter_of(run / "global"), state(plain)) < TOLERANCE
    moved = {k for k, v in state(plain).items() if not torch.equal(v, start[k])}
    assert moved == set(start), "some tensors never moved, so their comparison says nothing"
    if model:
        assert any("score" in k or "classifier" in k for k in moved), "the head is trained and exchanged too"


@pytest.mark.parametrize("kind", fast(["llama", "gpt2", "bert"], "gpt2"))
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("p_tuning", {"num_virtual_tokens": 3, "hidden": 16}),
        ("prefix", {"num_virtual_tokens": 3}),
        ("prefix", {"num_virtual_tokens": 3, "projection": True, "hidden": 16}),
    ],
    ids=["p_tuning", "prefix", "prefix projection"],
)
def test_one_client_is_plain_training_of_the_prompt_encoder(
    lab: Any, distance: Any, kind: str, name: str, keys: dict
) -> None:
    exp = lab.exp(
        **ONE, adapter={"name": name, **keys}, model={"path": lab.base(kind), **(HEADS if kind == "bert" else {})}
    )
    run = lab.run(exp)
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    config = (
        peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=3, encoder_hidden_size=16)
        if name == "p_tuning"
        else peft.PrefixTuningConfig(
            task_type=task,
            num_virtual_tokens=3,
            prefix_projection="projection" in keys,
            encoder_hidden_size=keys.get("hidden"),
        )
    )
    plain = peft.get_peft_model(load(exp), config).double().eval()
    init = load_file(run / "init/fedsim_state.safetensors")
    own = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    assert init.keys() == own.keys()
    for key, parameter in own.items():
        parameter.data.copy_(init[key])
    train(plain, texts_of(lab, exp), fedsim.batches(exp, "site-1", 1), adamw(exp)(trained(plain)))
    found = load_file(run / "global/fedsim_state.safetensors")
    expected = {k: p.detach() for k, p in own.items()}
    assert distance(found, expected) < TOLERANCE
    assert all(not torch.equal(init[k], found[k]) for k in init)


@pytest.mark.parametrize("kind", fast(["llama", "gpt2", "bert"], "bert"))
def test_one_client_is_plain_training_of_the_whole_model(lab: Any, distance: Any, kind: str) -> None:
    exp = lab.exp(**ONE, adapter={"name": "none"}, model={"path": lab.base(kind), **(HEADS if kind == "bert" else {})})
    run = lab.run(exp)
    plain = load(lab.exp(**ONE, model={"path": str(run / "init"), "task": exp.model.task}))
    train(plain, texts_of(lab, exp), fedsim.batches(exp, "site-1", 1), adamw(exp)(list(plain.parameters())))
    found = load_file(run / "global/model.safetensors")
    expected = {k: p.detach() for k, p in plain.named_parameters() if k in found}
    assert len(expected) == len(found)
    assert distance(found, expected) < TOLERANCE


class HookedBottleneck(nn.Module):
    """Houlsby's adapter written apart from the package: up(gelu(down(h))) added to a projection's output by a hook."""

    def __init__(self, base: nn.Module, places: Sequence[str], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.own = nn.ParameterDict({k.replace(".", "|"): nn.Parameter(t.clone()) for k, t in tensors.items()})
        for place in places:
            base.get_submodule(place).register_forward_hook(self._hook(place))

    def _hook(self, place: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, h: Tensor) -> Tensor:
            names = [f"{place}.adapter_{part}" for part in ("down", "up")]
            weights = [
                (self.own[f"{n}.weight".replace(".", "|")], self.own[f"{n}.bias".replace(".", "|")]) for n in names
            ]
            (down, down_bias), (up, up_bias) = weights
            return h + (F.gelu(h @ down.T + down_bias) @ up.T + up_bias)

        return hook

    def forward(self, **batch: Tensor) -> Any:
        return self.base(**batch)


BOTTLENECKS = {
    "llama": ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"],
    "gpt2": ["transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"],
}


@pytest.mark.parametrize("kind", fast(BOTTLENECKS, "gpt2"))
def test_one_client_is_plain_training_of_bottleneck_adapters(lab: Any, distance: Any, kind: str) -> None:
    exp = lab.exp(**ONE, adapter={"name": "adapter", "bottleneck": 5}, model={"path": lab.base(kind)})
    run = lab.run(exp)
    init = load_file(run / "init/fedsim_adapter.safetensors")
    places = [p.format(layer) for layer in range(2) for p in BOTTLENECKS[kind]]
    assert {k.split(".adapter_")[0] for k in init} == set(places), "after attention and MLP of every layer"
    plain = HookedBottleneck(load(exp), places, init)
    train(plain, texts_of(lab, exp), fedsim.batches(exp, "site-1", 1), adamw(exp)(trained(plain)))
    found = load_file(run / "global/fedsim_adapter.safetensors")
    assert distance(found, {k.replace("|", "."): p.detach() for k, p in plain.own.items()}) < TOLERANCE
    assert all(float(found[k].norm()) > 0 for k in found)


def test_float32_follows_the_plain_loop_to_single_precision(lab: Any, distance: Any) -> None:
    exp = lab.exp(**ONE, model={"dtype": "float32"})
    run = lab.run(exp)
    base = AutoModelForCausalLM.from_pretrained(exp.model.path, dtype=torch.float32).eval()
    plain = peft.PeftModel.from_pretrained(base, str(run / "init"), is_trainable=True).eval()
    train(plain, texts_of(lab, exp), fedsim.batches(exp, "site-1", 1), adamw(exp)(trained(plain)))
    found = adapter_of(run / "global")
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert distance(found, state(plain)) < 1e-4


# -------------------------------------------------------------------------------------------- the optimizer step


def test_micro_batches_change_no_number(lab: Any, distance: Any) -> None:
    """Rows of 5 to 20 tokens and answers of differing length: a mean of means would differ in the first digits."""
    words = {"negative": "negative", "neutral": "neutral and nothing else", "positive": "positive"}
    found = []
    for micro in (None, 1, 3, 4):
        exp = lab.exp(**ONE, name=f"m{micro}")
        tree = exp.to_dict()
        tree["local"]["micro_batch"] = micro
        tree["data"] |= {"template": "{sentence} sentiment: {answer}", "labels": None}
        for key, split in (("path", "train"), ("validation", "validation"), ("test", "test")):
            file = lab.root / f"{split}.csv"
            lines = [f'"{s}","{words[label]}"' for s, label in lab.rows[split]]
            file.write_text("\n".join(["sentence,answer", *lines]) + "\n")
            tree["data"][key] = str(file)
        tree["best"] = {"metric": None, "mode": None}
        found.append(adapter_of(lab.run(fedsim.Experiment.from_dict(tree)) / "global"))
    for other in found[1:]:
        assert distance(other, found[0]) < TOLERANCE


@pytest.mark.parametrize("momentum", fast([0.0, 0.9], 0.9))
@pytest.mark.parametrize("clip", fast([None, 0.05], 0.05))
def test_sgd_and_clipping_follow_torch(lab: Any, distance: Any, momentum: float, clip: float | None) -> None:
    work = {"optimizer": "sgd", "momentum": momentum, "clip": clip, "lr": 0.5, "weight_decay": 0.1}
    exp = lab.exp(**{**ONE, "local": {**ONE["local"], **work}})
    run = lab.run(exp)
    plain = peft_model(exp, run / "init")
    optimizer = torch.optim.SGD(trained(plain), lr=0.5, momentum=momentum, weight_decay=0.1)
    train(plain, texts_of(lab, exp), fedsim.batches(exp, "site-1", 1), optimizer, clip=clip)
    assert distance(adapter_of(run / "global"), state(plain)) < TOLERANCE


def test_the_norm_that_is_clipped_is_that_of_all_trained_tensors(lab: Any, distance: Any) -> None:
    """Clipped to c, one step of SGD with rate 1 moves all parameters together by exactly c."""
    work = {"optimizer": "sgd", "clip": 1e-3, "lr": 1.0, "weight_decay": 0.0, "steps": 1, "min_lr": 0.0}
    run = lab.run(lab.exp(**{**ONE, "local": {**ONE["local"], **work}}))
    a, b = adapter_of(run / "init"), adapter_of(run / "global")
    moved = torch.cat([(b[k] - a[k]).reshape(-1) for k in a]).norm()
    assert float(moved) == pytest.approx(1e-3, rel=1e-5)  # torch divides by the norm + 1e-6


def test_weight_decay_acts_on_every_trained_tensor(lab: Any) -> None:
    """With a rate of 1e-4 and a decay of 1e4 - 1e-4 the product is nearly one: a step wipes out what was there."""
    work = {"lr": 1e-4, "weight_decay": 9999.0, "steps": 1}
    exp = lab.exp(
        **{**ONE, "local": {**ONE["local"], **work}}, adapter={"name": "none"}, model={"path": lab.base("gpt2")}
    )
    run = lab.run(exp)
    before, after = (load_file(run / place / "model.safetensors") for place in ("init", "global"))
    for name, tensor in before.items():
        # AdamW: p <- p (1 - lr decay) - lr sign-like step of at most lr / sqrt(1 - ...) <= lr on the first step
        assert float((after[name] - tensor * 1e-4).abs().max()) <= 1e-4 * (1 + 1e-9), name


def test_the_reported_training_loss_is_the_mean_over_steps(lab: Any) -> None:
    exp = lab.exp(**ONE)
    run = lab.run(exp)
    plain = peft_model(exp, run / "init")
    losses = train(plain, texts_of(lab, exp), fedsim.batches(exp, "site-1", 1), adamw(exp)(trained(plain)))
    reported = lab.value(run, split="train", name="loss", client="site-1")
    assert reported == pytest.approx(np.mean(losses), rel=1e-9)


# ------------------------------------------------------------------------------------------------- schedules


SCHEDULES = {
    "cut short": {"schedule": "cosine", "warmup": 3, "horizon": 9, "min_lr": 1e-3},
    "past its horizon": {"schedule": "cosine", "warmup": 2, "horizon": 5},
    "whole run": {"schedule": "cosine"},
    "linear": {"schedule": "linear", "warmup": 2},
    "linear past its horizon": {"schedule": "linear", "warmup": 3, "horizon": 7},
    "constant": {"schedule": "constant", "warmup": 5},
}


@pytest.mark.parametrize("what", fast(SCHEDULES, "cut short", "past its horizon", "linear"))
def test_schedule_follows_transformers_over_rounds(lab: Any, distance: Any, what: str) -> None:
    """Three rounds of 4 steps are 12 steps of one schedule; past a horizon fedsim stays at min_lr, as documented."""
    work = SCHEDULES[what]
    exp = lab.exp(**{**ONE, "local": {**ONE["local"], **work}}, rounds=3)
    run = lab.run(exp)
    plain = peft_model(exp, run / "init")
    optimizer = adamw(exp)(trained(plain))
    warmup, horizon, low = work.get("warmup", 0), work.get("horizon") or 12, work.get("min_lr", 0.0)
    if work["schedule"] == "cosine":
        schedule = cosine(optimizer, warmup, horizon, min_lr=low)
        shape = schedule.lr_lambdas[0]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(min(step, horizon)))
    elif work["schedule"] == "linear":
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, horizon)
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / warmup))
    steps = [b for r in (1, 2, 3) for b in fedsim.batches(exp, "site-1", r)]
    assert len(steps) == 12
    train(plain, texts_of(lab, exp), steps, optimizer, schedule=schedule)
    assert distance(adapter_of(run / "global"), state(plain)) < TOLERANCE


def test_a_linear_schedule_ends_at_min_lr() -> None:
    from fedsim.training.optim import Optim

    optim = Optim("adamw", 1.0, 0.0, (0.9, 0.999), 1e-8, 0.0, None, "linear", 2, 0.2)
    found = [optim.lr_at(step, 10) for step in (0, 1, 2, 6, 10, 11)]
    assert found == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2, 0.2])  # by hand: halfway between 1 and 0.2 at step 6


def test_schedule_over_the_round_begins_anew_every_round(lab: Any, distance: Any) -> None:
    work = {"schedule": "cosine", "warmup": 1, "min_lr": 1e-4, "schedule_over": "round"}
    exp = lab.exp(**{**ONE, "local": {**ONE["local"], **work}}, rounds=2)
    run = lab.run(exp)
    plain = peft_model(exp, run / "init")
    optimizer = adamw(exp)(trained(plain))
    for r in (1, 2):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = exp.local.lr
        train(
            plain,
            texts_of(lab, exp),
            fedsim.batches(exp, "site-1", r),
            optimizer,
            schedule=cosine(optimizer, 1, 4, min_lr=1e-4),
        )
    assert distance(adapter_of(run / "global"), state(plain)) < TOLERANCE


# ----------------------------------------------------------------------------------------- state, modes, rounds


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "fresh"])
@pytest.mark.parametrize("optimizer", fast(["adamw", "sgd"], "adamw"))
def test_optimizer_state_is_kept_or_fresh_across_rounds(lab: Any, distance: Any, keep: bool, optimizer: str) -> None:
    work = {"keep_state": keep, "optimizer": optimizer} | ({"momentum": 0.9, "lr": 0.1} if optimizer == "sgd" else {})
    exp = lab.exp(**{**ONE, "local": {**ONE["local"], **work}}, rounds=3)
    run = lab.run(exp)
    plain = peft_model(exp, run / "init")

    def make() -> torch.optim.Optimizer:
        if optimizer == "sgd":
            return torch.optim.SGD(trained(plain), lr=0.1, momentum=0.9, weight_decay=exp.local.weight_decay)
        return adamw(exp)(trained(plain))

    current = make()
    for r in (1, 2, 3):
        current = current if keep else make()
        train(plain, texts_of(lab, exp), fedsim.batches(exp, "site-1", r), current)
    assert distance(adapter_of(run / "global"), state(plain)) < TOLERANCE


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "fresh"])
def test_local_mode_is_plain_training_of_each_site_over_all_rounds(lab: Any, distance: Any, keep: bool) -> None:
    """Alone nothing is merged, so the optimizer lives on whatever `keep_state` says of federated rounds."""
    exp = lab.exp(modes=["local"], rounds=3, local={"steps": 3, "keep_state": keep, "schedule": "cosine"})
    run = lab.run(exp)
    for site in ("site-1", "site-2", "site-3"):
        plain = peft_model(exp, run / "init")
        optimizer = adamw(exp)(trained(plain))
        steps = [b for r in (1, 2, 3) for b in fedsim.batches(exp, site, r)]
        train(plain, texts_of(lab, exp), steps, optimizer, schedule=cosine(optimizer, 0, 9, min_lr=0.0))
        assert distance(adapter_of(run / "local" / site), state(plain)) < TOLERANCE, site


@pytest.mark.parametrize(("match", "steps"), [("epochs", [9, 9]), ("steps", [3, 3])])
def test_central_mode_is_plain_training_on_all_rows(lab: Any, distance: Any, match: str, steps: list[int]) -> None:
    """3 sites x 3 steps are 9 central steps for the same passes over the data, or 3 for the same steps."""
    exp = lab.exp(modes=["central"], rounds=2, local={"steps": 3, "schedule": "cosine"}, central={"match": match})
    run = lab.run(exp)
    batches = [fedsim.batches(exp, "central", r) for r in (1, 2)]
    assert [len(b) for b in batches] == steps
    plain = peft_model(exp, run / "init")
    optimizer = adamw(exp)(trained(plain))
    schedule = cosine(optimizer, 0, sum(steps), min_lr=0.0)
    train(plain, texts_of(lab, exp), batches[0] + batches[1], optimizer, schedule=schedule)
    assert distance(adapter_of(run / "central"), state(plain)) < TOLERANCE


def test_central_mode_in_epochs_passes_over_every_row(lab: Any, distance: Any) -> None:
    exp = lab.exp(modes=["central"], local={"steps": None, "epochs": 2, "batch_size": 7})
    run = lab.run(exp)
    batches = fedsim.batches(exp, "central", 1)
    assert [len(b) for b in batches] == ([7] * 8 + [4]) * 2  # 60 rows, twice
    assert sorted(np.concatenate(batches[:9])) == list(range(60))
    plain = peft_model(exp, run / "init")
    train(plain, texts_of(lab, exp), batches, adamw(exp)(trained(plain)))
    assert distance(adapter_of(run / "central"), state(plain)) < TOLERANCE


@pytest.mark.parametrize(
    ("weights", "shares"),
    [("samples", (48 / 60, 12 / 60)), ("steps", (8 / 10, 2 / 10)), ("uniform", (0.5, 0.5))],
)
def test_two_clients_are_the_weighted_mean_of_two_plain_runs(
    lab: Any, distance: Any, weights: str, shares: tuple[float, float]
) -> None:
    """48 and 12 rows; one pass in batches of 6 is 8 and 2 steps, kept apart from rows by a short batch: see below."""
    counts = [[8, 22, 18], [4, 6, 2]]
    work = {"steps": None, "epochs": 1, "optimizer": "sgd", "lr": 0.5, "clip": None}
    exp = lab.exp(
        partition={"name": "class_counts", "counts": counts},
        local=work,
        algorithm={"name": "fedavg", "weights": weights},
    )
    run = lab.run(exp)
    start = adapter_of(run / "init")
    expected = {k: torch.zeros_like(v) for k, v in start.items()}
    for site, share in zip(("site-1", "site-2"), shares, strict=True):
        plain = peft_model(exp, run / "init")
        optimizer = torch.optim.SGD(trained(plain), lr=0.5, weight_decay=0.01)
        train(plain, texts_of(lab, exp), fedsim.batches(exp, site, 1), optimizer, clip=None)
        expected = {k: expected[k] + share * v for k, v in state(plain).items()}
    assert distance(adapter_of(run / "global"), expected) < TOLERANCE


def test_weights_by_steps_count_the_steps_of_a_short_last_batch(lab: Any, distance: Any) -> None:
    """31 and 29 rows in batches of 30 are 2 steps and 1: by steps 2/3 and 1/3, by samples nearly a half each."""
    work = {"steps": None, "epochs": 1, "batch_size": 30}
    counts = [[6, 15, 10], [6, 13, 10]]
    exp = lab.exp(
        partition={"name": "class_counts", "counts": counts},
        local=work,
        algorithm={"name": "fedavg", "weights": "steps"},
    )
    run = lab.run(exp)
    expected: dict[str, Tensor] = {}
    for site, share in (("site-1", 2 / 3), ("site-2", 1 / 3)):
        plain = peft_model(exp, run / "init")
        train(plain, texts_of(lab, exp), fedsim.batches(exp, site, 1), adamw(exp)(trained(plain)))
        expected = {k: expected.get(k, 0) + share * v for k, v in state(plain).items()}
    assert distance(adapter_of(run / "global"), expected) < TOLERANCE


def test_rounds_start_from_the_mean_of_the_last(lab: Any, distance: Any) -> None:
    """Two rounds of three clients with kept moments, against two rounds of plain loops and a mean in between."""
    exp = lab.exp(rounds=2)
    run = lab.run(exp)
    models = {s: peft_model(exp, run / "init") for s in ("site-1", "site-2", "site-3")}
    optimizers = {s: adamw(exp)(trained(m)) for s, m in models.items()}
    for r in (1, 2):
        for site, plain in models.items():
            train(plain, texts_of(lab, exp), fedsim.batches(exp, site, r), optimizers[site])
        with torch.no_grad():
            for same in zip(*(trained(m) for m in models.values()), strict=True):
                mean = sum(same) / 3
                for parameter in same:
                    parameter.copy_(mean)
    assert distance(adapter_of(run / "global"), state(models["site-1"])) < TOLERANCE


# ------------------------------------------------------------------------------------------------------ dropout


def test_dropout_does_not_depend_on_who_else_trains(lab: Any) -> None:
    """A client's first loss is the same in a cohort of one, in one of three and alone, whatever its place in it."""
    drop = {"adapter": {"name": "lora", "r": 3, "dropout": 0.5}, "local": {"steps": 3}}
    places = set()
    for seed in (3, 4, 5):
        whole = lab.run(name="three", seed=seed, **drop)
        alone = lab.run(name="local", seed=seed, modes=["local"], **drop)
        one = lab.run(name="one", seed=seed, cohort={"size": 1}, **drop)
        losses = {
            run: {r["client"]: r["value"] for r in lab.metrics(run) if (r["split"], r["name"]) == ("train", "loss")}
            for run in (whole, alone, one)
        }
        assert losses[whole] == losses[alone]
        ((client, loss),) = losses[one].items()
        assert losses[whole][client] == loss
        places.add(list(losses[whole]).index(client))
    assert places != {0}, "these seeds test nothing: the client would have been first anyway"


def test_dropout_differs_by_seed_client_and_round(lab: Any) -> None:
    """GPT-2's own dropout under a rate of nearly zero: the same rows give another loss only if other units drop out."""

    def losses(on: bool, seed: int) -> list[float]:
        work = {"steps": None, "epochs": 1, "batch_size": 60, "shuffle": False, "lr": 1e-12}
        run = lab.run(
            name=f"on{on}",
            seed=seed,
            rounds=2,
            partition={"num_clients": 1},
            model={"path": lab.base("gpt2"), "base_dropout": on},
            local=work,
        )
        return [r["value"] for r in lab.metrics(run) if (r["split"], r["name"]) == ("train", "loss")]

    still = losses(False, 3) + losses(False, 4)
    assert still == pytest.approx([still[0]] * 4, rel=1e-6)
    moving = losses(True, 3) + losses(True, 4)
    assert min(abs(a - b) for i, a in enumerate(moving) for b in moving[:i]) > 1e-4


def test_dropout_of_the_base_acts_only_where_asked(lab: Any, distance: Any) -> None:
    """GPT-2's own dropout is 0.1; a run equals the plain loop of a model in eval mode unless base_dropout is on."""
    found = {}
    for on in (False, True):
        exp = lab.exp(**ONE, name=f"on{on}", model={"path": lab.base("gpt2"), "base_dropout": on})
        found[on] = adapter_of(lab.run(exp) / "global")
    assert distance(found[True], found[False]) > 1e-4


def test_global_random_state_is_left_alone(lab: Any) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    lab.run(adapter={"name": "lora", "r": 3, "dropout": 0.5})
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
