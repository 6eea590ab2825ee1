"""Scores against a loop that takes one row at a time, unpadded, through plain transformers and peft.

The run's reported validation score of `global/` and `best/` is got again from those folders by code that shares nothing
with the package.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tiers import fast_only
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import fedsim
from fedsim.core.errors import UserError
from fedsim.models.adapters import attach
from fedsim.models.forward import Net
from fedsim.models.locate import TINY
from fedsim.runs.build import prepare
from fedsim.training.evaluation import greedy as greedy_ids
from fedsim.training.evaluation import macro_f1

LABELS = ["negative", "neutral", "positive"]
WORK = {"steps": 6, "batch_size": 8, "lr": 2e-2}
VALIDATION = {"scope": "federated", "client": None, "split": "validation"}


def base_of(exp: Any) -> nn.Module:
    """The base in float64, as transformers loads it."""
    if exp.model.task == "causal_lm":
        return AutoModelForCausalLM.from_pretrained(exp.model.path, dtype=torch.float64)
    return AutoModelForSequenceClassification.from_pretrained(exp.model.path, dtype=torch.float64, num_labels=3)


def in_double(exp: Any, folder: Path) -> nn.Module:
    """An adapter by plain peft, exact: PEFT makes virtual tokens in float32 and would round them."""
    from safetensors.torch import load_file

    model = peft.PeftModel.from_pretrained(base_of(exp), str(folder)).double().eval()
    peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


@torch.no_grad()
def by_words(
    model: nn.Module,
    tok: Any,
    rows: Iterable[tuple[str, str]],
    words: Sequence[str],
    prompt: str = " sentiment:",
    ends: bool = False,
) -> tuple[float, float, list[int]]:
    """(mean loss per answer token, accuracy, predictions): every label of every row is a pass of its own.

    The end of text is trained on; `ends` says whether it is part of a label's likelihood.
    """
    nll, tokens, predictions, right = 0.0, 0, [], 0
    for sentence, word in rows:
        head = tok(sentence + prompt)["input_ids"]
        scores = []
        for candidate in words:
            answer = tok(f"{sentence}{prompt} {candidate}")["input_ids"][len(head) :]
            ids = torch.tensor([head + answer + [tok.eos_token_id]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
            logp = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[len(head) - 1 :, 0]
            scores.append(float(logp.sum() if ends else logp[:-1].sum()))
            if candidate == word:
                nll -= float(logp.sum())
                tokens += len(logp)
        predictions.append(int(torch.tensor(scores).argmax()))
        right += words[predictions[-1]] == word
    return nll / tokens, right / len(predictions), predictions


@torch.no_grad()
def by_head(model: nn.Module, tok: Any, rows: Iterable[tuple[str, str]]) -> tuple[float, float]:
    """(mean loss per row, accuracy) of a classification head."""
    losses, right = [], []
    for sentence, label in rows:
        ids = torch.tensor([tok(f"{sentence} sentiment:")["input_ids"]])
        logp = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        losses.append(-float(logp[LABELS.index(label)]))
        right.append(int(logp.argmax()) == LABELS.index(label))
    return sum(losses) / len(losses), sum(right) / len(right)


def reported(lab: Any, run: Path, round: int, **where: Any) -> tuple[float, float]:
    """(loss, accuracy) in the metrics."""
    return tuple(lab.value(run, **{**VALIDATION, **where}, round=round, name=n) for n in ("loss", "accuracy"))


# ----------------------------------------------------------------------------------------- the exported models


@fast_only(0, 2, 5)
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("llama", {"name": "lora", "r": 3}),
        ("gpt2", {"name": "ia3"}),
        ("llama", {"name": "prompt", "num_virtual_tokens": 3}),
        ("gpt2", {"name": "p_tuning", "num_virtual_tokens": 3, "hidden": 16}),
        ("llama", {"name": "prefix", "num_virtual_tokens": 3}),
        ("gpt2", {"name": "prefix", "num_virtual_tokens": 3, "projection": True, "hidden": 16}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(k for k, x in v.items() if x is True) or v["name"],
)
def test_plain_peft_gets_the_reported_score_again(lab: Any, kind: str, adapter: dict) -> None:
    exp = lab.exp(model={"path": lab.base(kind)}, adapter=adapter, local=WORK)
    run = lab.run(exp)
    tok = AutoTokenizer.from_pretrained(exp.model.path)
    loss, accuracy, predictions = by_words(in_double(exp, run / "global"), tok, lab.rows["validation"], LABELS)
    assert reported(lab, run, 1) == pytest.approx((loss, accuracy), rel=1e-9)
    for i, word in enumerate(LABELS):
        assert lab.value(run, **VALIDATION, round=1, name=f"predicted:{word}") == predictions.count(i)
    untrained = by_words(in_double(exp, run / "init"), tok, lab.rows["validation"], LABELS)
    assert reported(lab, run, 0) == pytest.approx(untrained[:2], rel=1e-9)
    assert abs(untrained[0] - loss) > 0.1, "training changed nothing, so the comparison says little"


def test_whole_models_are_loaded_again_by_transformers(lab: Any) -> None:
    exp = lab.exp(adapter={"name": "none"}, local=WORK)
    run = lab.run(exp)
    model = AutoModelForCausalLM.from_pretrained(run / "global", dtype=torch.float64)
    tok = AutoTokenizer.from_pretrained(run / "global")
    assert reported(lab, run, 1) == pytest.approx(by_words(model, tok, lab.rows["validation"], LABELS)[:2], rel=1e-9)
    with pytest.raises(UserError, match="whole model"):
        fedsim.load_adapter(base_of(exp), run / "global")


@pytest.mark.parametrize("trainable", [False, True])
@fast_only(0, 3, 5)
@pytest.mark.parametrize(
    "adapter",
    [
        {"name": "adapter", "bottleneck": 4},
        {"name": "p_tuning", "num_virtual_tokens": 3, "hidden": 16},
        {"name": "prefix", "num_virtual_tokens": 3},
        {"name": "prefix", "num_virtual_tokens": 3, "projection": True, "hidden": 16},
        {"name": "prompt", "num_virtual_tokens": 3},
        {"name": "lora", "r": 3},
    ],
    ids=["adapter", "p_tuning", "prefix", "prefix-projection", "prompt", "lora"],
)
def test_load_adapter_gets_the_reported_score_again(lab: Any, adapter: dict, trainable: bool) -> None:
    """float32 here: what PEFT keeps of a prompt in float64 it rounds to that when it is loaded."""
    exp = lab.exp(adapter=adapter, local=WORK, model={"dtype": "float32"})
    run = lab.run(exp)
    base = AutoModelForCausalLM.from_pretrained(exp.model.path, dtype=torch.float32)
    model = fedsim.load_adapter(base, run / "global", trainable=trainable).eval()
    tok = AutoTokenizer.from_pretrained(exp.model.path)
    loss, accuracy, _ = by_words(model, tok, lab.rows["validation"], LABELS)
    assert reported(lab, run, 1) == pytest.approx((loss, accuracy), rel=1e-4)
    grads = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        return
    states = [lab.tensors(run / "global").get(f) for f in ("fedsim_state.safetensors", "fedsim_adapter.safetensors")]
    for state in filter(None, states):
        assert grads.keys() == state.keys(), "exactly what was trained can be trained on"
        assert all(torch.equal(grads[n].detach(), t) for n, t in state.items())
    ids = torch.tensor([tok("a b")["input_ids"]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
    assert grads and all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in grads.values())


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("name", ["lora", "none"])
def test_heads_are_scored_row_by_row(lab: Any, kind: str, name: str) -> None:
    """On a decoder the head reads the last token of a row, however far the batch is padded."""
    exp = lab.exp(model={"path": lab.base(kind), "task": "sequence_classification"}, adapter={"name": name}, local=WORK)
    run = lab.run(exp)
    if name == "none":
        model = AutoModelForSequenceClassification.from_pretrained(run / "global", dtype=torch.float64)
    else:
        model = in_double(exp, run / "global")
    model.config.pad_token_id = None if kind == "llama" else model.config.pad_token_id  # one row: nothing is padding
    tok = AutoTokenizer.from_pretrained(exp.model.path)
    assert reported(lab, run, 1) == pytest.approx(by_head(model, tok, lab.rows["validation"]), rel=1e-9)


@pytest.mark.parametrize("adapter", [{"name": "p_tuning", "num_virtual_tokens": 3, "hidden": 8}, {"name": "none"}])
def test_a_summary_of_the_last_position_is_of_the_last_token(lab: Any, adapter: dict) -> None:
    """XLNet, which transformers runs in float32 alone, takes the last position of a batch; for most rows that is a pad."""
    model = {"path": lab.base("xlnet"), "task": "sequence_classification", "dtype": "float32"}
    exp = lab.exp(model=model, adapter=adapter, local=WORK)
    run = lab.run(exp)
    base = AutoModelForSequenceClassification.from_pretrained(
        run / "global" if adapter["name"] == "none" else model["path"]
    )
    plain = base if adapter["name"] == "none" else peft.PeftModel.from_pretrained(base, str(run / "global"))
    tok = AutoTokenizer.from_pretrained(model["path"])
    assert reported(lab, run, 1) == pytest.approx(by_head(plain.eval(), tok, lab.rows["validation"]), rel=1e-5)


def test_a_trained_head_keeps_the_names_of_its_classes(lab: Any) -> None:
    """Before training and in what is exported, a class is what `id2label` calls it, in whatever order."""
    base = Path(shutil.copytree(lab.base("bert"), lab.root / "base"))
    config = json.loads((base / "config.json").read_text())
    names = {"0": "positive", "1": "negative", "2": "neutral"}
    (base / "config.json").write_text(json.dumps({**config, "id2label": names}))
    model = {"path": str(base), "task": "sequence_classification"}
    run = lab.run(model=model, adapter={"name": "none"}, local={**WORK, "steps": 2})
    tok = AutoTokenizer.from_pretrained(base)
    for folder, r in ((base, 0), (run / "global", 1)):
        plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
        right = []
        for sentence, label in lab.rows["validation"]:
            ids = torch.tensor([tok(f"{sentence} sentiment:")["input_ids"]])
            with torch.no_grad():
                right.append(plain.config.id2label[int(plain(input_ids=ids).logits.argmax())] == label)
        assert reported(lab, run, r)[1] == pytest.approx(sum(right) / len(right))


def test_best_is_the_best_round_and_global_the_last(lab: Any) -> None:
    """A rate far too high makes later rounds worse, so the two differ."""
    exp = lab.exp(rounds=4, local={**WORK, "lr": 0.4, "clip": None}, best={"metric": "loss"})
    run = lab.run(exp)
    losses = [reported(lab, run, r)[0] for r in range(1, 5)]
    best = losses.index(min(losses)) + 1
    assert best < 4
    tok = AutoTokenizer.from_pretrained(exp.model.path)
    for folder, r in (("best", best), ("global", 4)):
        found = by_words(in_double(exp, run / folder), tok, lab.rows["validation"], LABELS)
        assert found[:2] == pytest.approx(reported(lab, run, r), rel=1e-9), folder
    test = by_words(in_double(exp, run / "best"), tok, lab.rows["test"], LABELS)
    assert reported(lab, run, best, split="test") == pytest.approx(test[:2], rel=1e-9)
    lines = (run / "predictions.csv").read_text().splitlines()[1:]
    assert [line.split(",") for line in lines] == [
        [str(i), label, LABELS[p]] for i, ((_, label), p) in enumerate(zip(lab.rows["test"], test[2], strict=True))
    ]


def test_best_of_a_site_alone_is_its_best_round(lab: Any) -> None:
    exp = lab.exp(
        modes=["local", "central"], rounds=3, local={**WORK, "lr": 0.3, "clip": None}, best={"metric": "loss"}
    )
    run = lab.run(exp)
    tok = AutoTokenizer.from_pretrained(exp.model.path)
    for scope, client, folder in (("local", "site-2", "local/site-2"), ("central", None, "central")):
        losses = [reported(lab, run, r, scope=scope, client=client)[0] for r in (1, 2, 3)]
        chosen = by_words(in_double(exp, run / folder / "best"), tok, lab.rows["validation"], LABELS)[0]
        last = by_words(in_double(exp, run / folder), tok, lab.rows["validation"], LABELS)[0]
        assert chosen == pytest.approx(min(losses), rel=1e-9)
        assert last == pytest.approx(losses[-1], rel=1e-9)


# -------------------------------------------------------------------------------------------- labels and padding


def renamed(lab: Any, words: dict[str, str]) -> dict[str, Any]:
    """A data section whose labels are these words."""
    files = {}
    for key, split in (("path", "train"), ("validation", "validation"), ("test", "test")):
        file = lab.root / f"{split}.csv"
        file.write_text(
            "\n".join(["sentence,label", *(f'"{s}",{words[label]}' for s, label in lab.rows[split])]) + "\n"
        )
        files[key] = str(file)
    return {**files, "labels": list(words.values())}


@pytest.mark.parametrize(
    "words",
    [
        {"negative": "down", "neutral": "the same as before", "positive": "rather more"},
        {"negative": "up and down", "neutral": "up and away", "positive": "up so much"},
    ],
    ids=["of differing length", "with a common start"],
)
def test_labels_of_several_tokens(lab: Any, words: dict[str, str]) -> None:
    exp = lab.exp(data=renamed(lab, words), local=WORK, evaluate={"batch_size": 5})
    run = lab.run(exp)
    tok = AutoTokenizer.from_pretrained(exp.model.path)
    lengths = {len(tok(f"a {w}")["input_ids"]) for w in words.values()}
    assert max(lengths) > 3, "these labels do not test what they should"
    rows = [(s, words[label]) for s, label in lab.rows["validation"]]
    loss, accuracy, predictions = by_words(in_double(exp, run / "global"), tok, rows, list(words.values()))
    assert reported(lab, run, 1) == pytest.approx((loss, accuracy), rel=1e-9)
    assert len(set(predictions)) > 1 or len(lengths) > 1, "of labels of one length no one may always win"
    for i, word in enumerate(words.values()):
        assert lab.value(run, **VALIDATION, round=1, name=f"predicted:{word}") == predictions.count(i)


@pytest.mark.parametrize(
    "words",
    [
        {"negative": "up and down", "neutral": "up and", "positive": "up"},
        {"negative": "1", "neutral": "10", "positive": "2"},
    ],
    ids=["words", "numbers"],
)
def test_a_label_that_begins_another_is_scored_with_its_end(lab: Any, words: dict[str, str]) -> None:
    """Else it would be the likelier of the two whatever the model has learned."""
    work = {**WORK, "steps": 30, "lr": 5e-3}
    exp = lab.exp(model={"path": str(TINY)}, data=renamed(lab, words), local=work, evaluate={"batch_size": 5})
    run = lab.run(exp)
    tok = AutoTokenizer.from_pretrained(exp.model.path)
    rows = [(s, words[label]) for s, label in lab.rows["validation"]]
    model = in_double(exp, run / "global")
    loss, accuracy, predictions = by_words(model, tok, rows, list(words.values()), ends=True)
    assert reported(lab, run, 1) == pytest.approx((loss, accuracy), rel=1e-9)
    assert predictions != by_words(model, tok, rows, list(words.values()))[2]
    for i, word in enumerate(words.values()):
        assert lab.value(run, **VALIDATION, round=1, name=f"predicted:{word}") == predictions.count(i)


def normalizing(lab: Any, kind: dict[str, Any]) -> Path:
    """The pretrained base with a tokenizer that normalizes text."""
    folder = Path(shutil.copytree(TINY, lab.root / "base"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": kind}))
    return folder


def test_labels_that_are_the_same_tokens_are_refused(lab: Any) -> None:
    data = renamed(lab, {"negative": "Down", "neutral": "flat", "positive": "down"})
    with pytest.raises(UserError, match="data.labels: 'Down' and 'down' are the same tokens"):
        prepare(lab.exp(data=data, model={"path": str(normalizing(lab, {"type": "Lowercase"}))}))


# ------------------------------------------------------------------------------------- scores from predictions


def f1_by_class(true: list[str], predicted: list[str]) -> list[float]:
    """F1 of each class that occurs, from precision and recall as scikit-learn defines them (0 where one is undefined)."""
    out = []
    for word in sorted({*true, *predicted}):
        right = sum(t == p == word for t, p in zip(true, predicted, strict=True))
        precision, recall = right / max(1, predicted.count(word)), right / max(1, true.count(word))
        out.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return out


def test_macro_f1_is_the_mean_over_the_classes_that_occur() -> None:
    cases = [("aabbcc", "aabbcc"), ("aabb", "aaab"), ("aaaa", "bbbb"), ("aaaa", "aaaa"), ("abbd", "abcd"), ("d", "d")]
    values = []
    for true, predicted in cases:
        arrays = (np.array(["abcd".index(x) for x in text]) for text in (true, predicted))
        scores = f1_by_class(list(true), list(predicted))
        values.append(macro_f1(*arrays))
        assert values[-1] == pytest.approx(sum(scores) / len(scores))
    assert values[0] == values[3] == values[5] == 1.0 and values[2] == 0.0
    assert values[4] == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)  # c is predicted, and in no row


@pytest.mark.parametrize("model", [{}, {"task": "sequence_classification"}], ids=["words", "head"])
def test_metrics_of_classes_agree_with_the_predictions(lab: Any, model: dict) -> None:
    exp = lab.exp(model=model, local={**WORK, "steps": 12}, modes=["federated", "central"], best={"metric": "macro_f1"})
    assert prepare(exp).exp.best.mode == "max"
    run = lab.run(exp)
    lines = [line.split(",") for line in (run / "predictions.csv").read_text().splitlines()]
    for at, scope in ((2, "federated"), (3, "central")):
        assert lines[0][at] == scope
        true, predicted = ([line[i] for line in lines[1:]] for i in (1, at))
        table = fedsim.confusion_matrix(run, scope)
        assert list(table.index) == list(table.columns) == LABELS
        for a in LABELS:
            for b in LABELS:
                pairs = zip(true, predicted, strict=True)
                assert table.loc[a, b] == sum(pair == (a, b) for pair in pairs)
        where = {"scope": scope, "client": None, "split": "test"}
        scores = f1_by_class(true, predicted)
        assert lab.value(run, **where, name="macro_f1") == pytest.approx(sum(scores) / len(scores))
    last = fedsim.confusion_matrix(run, split="validation").to_numpy()
    assert last.trace() / last.sum() == pytest.approx(reported(lab, run, 1)[1])
    for keys, why in (({"model": "nobody"}, "models: federated, central"), ({"split": "train"}, "neither test nor")):
        with pytest.raises(UserError, match=why):
            fedsim.confusion_matrix(run, **keys)
    (run / "scores.npz").write_bytes((run / "scores.npz").read_bytes()[:500])
    with pytest.raises(UserError, match="not the scores of a run"):
        fedsim.confusion_matrix(run)


def test_perplexity_is_of_the_mean_over_answer_tokens(lab: Any) -> None:
    exp = lab.exp(local=WORK, rounds=3, best={"metric": "perplexity"}, data={"template": "{label} means {sentence}"})
    run = lab.run(exp)
    tok = AutoTokenizer.from_pretrained(exp.model.path)
    model, nll, count = in_double(exp, run / "global"), 0.0, 0
    for sentence, label in lab.rows["validation"]:
        head = tok(f"{label} means")["input_ids"]
        ids = torch.tensor([tok(f"{label} means {sentence}")["input_ids"] + [tok.eos_token_id]])
        with torch.no_grad():
            logp = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        nll -= float(logp[:-1].gather(1, ids[0, 1:, None])[len(head) - 1 :].sum())
        count += ids.shape[1] - len(head)
    assert lab.value(run, **VALIDATION, round=3, name="perplexity") == pytest.approx(np.exp(nll / count), rel=1e-9)
    values = [lab.value(run, **VALIDATION, round=r, name="perplexity") for r in (1, 2, 3)]
    chosen = 1 + values.index(min(values))
    assert lab.value(run, client=None, split="test", name="perplexity", round=chosen) > 1, "less is better"


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"best": {"metric": "macro_f1"}, "data": {"template": "{label} {sentence}"}}, "'macro_f1' needs label words"),
        ({"best": {"metric": "perplexity"}, "model": {"task": "sequence_classification"}}, "of a head use loss"),
        ({"evaluate": {"max_examples": 0}}, "evaluate.max_examples: must be >= 1 .got 0."),
        ({"evaluate": {"max_new_tokens": 10**9}}, "evaluate.max_new_tokens: must be <= 65,536 .got 1000000000."),
    ],
)
def test_scores_that_cannot_be_are_refused(lab: Any, keys: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        prepare(lab.exp(**keys))


def test_a_subset_is_the_same_for_all_and_changes_no_training(lab: Any) -> None:
    keys = {"modes": ["local", "federated"], "rounds": 2, "local": WORK}
    subset = {"evaluate": {"max_examples": 9}}
    runs = {n: lab.run(**keys, **k) for n, k in (("all", {}), ("some", subset), ("seed", {**subset, "seed": 4}))}
    runs["lanes"] = lab.run(**keys, **subset, training={"lanes": 1})
    rows = {name: np.load(run / "scores.npz")["validation_rows"] for name, run in runs.items()}
    assert len(rows["all"]) == 24 and len(rows["some"]) == 9
    assert (rows["some"] == rows["seed"]).all() and (rows["some"] == rows["lanes"]).all()
    assert rows["some"].tolist() != list(range(9)), "a random subset, not the first rows"
    tensors = [lab.tensors(runs[name])["global/adapter_model.safetensors"] for name in ("all", "some")]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    scores = [r for r in lab.metrics(runs["some"]) if r["split"] == "validation" and r["name"] == "loss"]
    assert {r["weight"] for r in scores} == {9.0} and len(scores) > 8
    assert {r["weight"] for r in lab.metrics(runs["some"]) if r["split"] == "test"} == {15.0}
    exp = lab.exp()
    model, tok = in_double(exp, runs["some"] / "global"), AutoTokenizer.from_pretrained(exp.model.path)
    chosen = [lab.rows["validation"][r] for r in rows["some"]]
    assert reported(lab, runs["some"], 2) == pytest.approx(by_words(model, tok, chosen, LABELS)[:2], rel=1e-9)
    assert prepare(lab.exp()).run_id() == prepare(lab.exp(evaluate={"max_examples": None})).run_id()
    assert prepare(lab.exp()).run_id() != prepare(lab.exp(**subset)).run_id()


def test_a_line_tells_that_evaluation_takes_most_of_a_round(lab: Any, monkeypatch: Any, capsys: Any) -> None:
    """Passes of evaluation, and they alone, are made long; of two rounds of two modes one says so."""
    from fedsim.training import scoring
    from fedsim.training.trainer import Trainer

    clock = [0.0]
    scores = scoring.score_rows
    monkeypatch.setattr(scoring.time, "monotonic", lambda: clock[0])

    def slow(*args: Any, **keys: Any) -> Any:
        clock[0] += 30.0
        return scores(*args, **keys)

    for seconds, count in ((1.0, 1), (1000.0, 0)):
        original = Trainer.backward

        def backward(self: Any, *args: Any, of: Any = original, took: float = seconds) -> Any:
            clock[0] += took
            return of(self, *args)

        monkeypatch.setattr(scoring, "score_rows", slow)
        monkeypatch.setattr(Trainer, "backward", backward)
        fedsim.run(lab.exp(name=f"t{count}", modes=["local", "federated"], rounds=2))
        said = [line for line in capsys.readouterr().err.splitlines() if "evaluation took" in line]
        assert len(said) == count and all("evaluate.max_examples" in s and "every_rounds" in s for s in said)
        monkeypatch.setattr(Trainer, "backward", original)


@pytest.mark.parametrize("model", [{}, {"task": "sequence_classification"}], ids=["words", "head"])
def test_scores_do_not_depend_on_padding(lab: Any, model: dict) -> None:
    found = []
    for size in (1, 7, 64):
        run = lab.run(name=f"b{size}", model=model, local=WORK, evaluate={"batch_size": size})
        found.append({(r["round"], r["client"], r["split"], r["name"]): r["value"] for r in lab.metrics(run)})
    assert found[0] == pytest.approx(found[1], rel=1e-10)
    assert found[0] == pytest.approx(found[2], rel=1e-10)


def test_a_site_is_scored_on_its_own_rows(lab: Any) -> None:
    exp = lab.exp(partition={"name": "dirichlet", "num_clients": 3, "alpha": 1.0, "min_rows": 5}, local=WORK)
    run = lab.run(exp)
    own, tok = prepare(exp).own, AutoTokenizer.from_pretrained(exp.model.path)
    model = in_double(exp, run / "global")
    taken = [int(r) for c in range(3) for r in own.rows(c)]
    assert sorted(taken) == list(range(24)), "each validation row belongs to one site"
    checked = 0
    for c in range(3):
        rows = [lab.rows["validation"][r] for r in own.rows(c)]
        if not rows:
            continue
        loss, accuracy, _ = by_words(model, tok, rows, LABELS)
        where = {"round": 1, "client": f"site-{c + 1}", "split": "site"}
        assert lab.value(run, **where, name="merged_loss") == pytest.approx(loss, rel=1e-9)
        assert lab.value(run, **where, name="merged_accuracy") == pytest.approx(accuracy)
        checked += 1
    assert checked > 1


# ------------------------------------------------------------------------------------------------- generated text


@torch.no_grad()
def greedy(model: nn.Module, tok: Any, prompt: str, limit: int) -> str:
    """One token after another, each from a pass over all that stands before it."""
    ids, out = tok(prompt)["input_ids"], []
    for _ in range(limit):
        at = torch.tensor([ids + out])
        token = int(model(input_ids=at, attention_mask=torch.ones_like(at)).logits[0, -1].argmax())
        if token == tok.eos_token_id:
            break
        out.append(token)
    return tok.decode(out, skip_special_tokens=True)


@fast_only(0, 4)
@pytest.mark.parametrize(
    "adapter",
    [
        {"name": "lora", "r": 8},
        {"name": "p_tuning", "num_virtual_tokens": 3, "hidden": 16},
        {"name": "prefix", "num_virtual_tokens": 6},
        {"name": "prompt", "num_virtual_tokens": 6},
        {"name": "none"},
    ],
    ids=lambda a: a["name"],
)
def test_exact_match_is_that_of_greedy_decoding_row_by_row(lab: Any, adapter: dict) -> None:
    """The pretrained base, trained until it answers with a label word: some rows match and some do not."""
    work = {"steps": 20, "batch_size": 8, "lr": {"none": 1e-3, "lora": 5e-3}.get(adapter["name"], 3e-2)}
    evaluate = {"generate": True, "batch_size": 12, "max_new_tokens": 6}
    model = {"path": str(TINY)}
    exp = lab.exp(model=model, adapter=adapter, local=work, evaluate=evaluate, partition={"num_clients": 1})
    run = lab.run(exp)
    model = (
        AutoModelForCausalLM.from_pretrained(run / "global", dtype=torch.float64)
        if adapter["name"] == "none"
        else in_double(exp, run / "global")
    )
    tok = AutoTokenizer.from_pretrained(exp.model.path)
    texts = [greedy(model, tok, f"{s} sentiment:", 6) for s, _ in lab.rows["validation"]]
    right = [t.strip() == label for t, (_, label) in zip(texts, lab.rows["validation"], strict=True)]
    assert lab.value(run, **VALIDATION, round=1, name="exact_match") == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right), texts


METHODS = {
    "lora": {"r": 3, "target_modules": "all-linear"},
    "adapter": {"bottleneck": 4},
    "prompt": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3, "hidden": 16},
    "prefix": {"num_virtual_tokens": 3},
    "none": {},
}


@fast_only(0, 3, 8, 12, 18)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, "prompt") for kind in ("llama", "gpt2", "opt", "bloom", "gpt_neox", "mistral", "phi3")]
    + [(kind, "lora") for kind in ("bloom", "mistral", "phi3", "opt")]
    + [(kind, "prefix") for kind in ("llama_shared", "gpt2", "opt", "gemma")]
    + [("gpt2", "p_tuning"), ("llama", "adapter"), ("bloom", "none"), ("mamba", "none")],
)
def test_generated_text_does_not_depend_on_the_texts_beside_it(lab: Any, kind: str, name: str) -> None:
    """Positions learned, rotary, by ALiBi, by recurrence, with windows and with frequencies by length."""
    exp = lab.exp(model={"path": lab.base(kind)}, adapter={"name": name, **METHODS[name]})
    base = base_of(exp)
    base.generation_config.update(repetition_penalty=1.9, no_repeat_ngram_size=2, suppress_tokens=[5], num_beams=2)
    settings = {k: v for k, v in exp.to_dict()["adapter"].items() if k != "name"}
    model, own = attach(base, name, settings, task="causal_lm", seed=3)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # far from where a text is one token over and over
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    net = Net(model, own, task="causal_lm", device=torch.device("cpu"), base_dropout=False, autocast=None)
    net.train(False)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 1500, n) for n in (9, 2, 14, 5, 5)]
    expected = []
    for prompt in prompts:
        ids = prompt.tolist()
        for _ in range(8):
            at = torch.tensor([ids])
            with torch.no_grad():
                ids.append(int(model(input_ids=at, attention_mask=torch.ones_like(at)).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert len({t for e in expected for t in e}) > 4, expected
    assert greedy_ids(net, prompts, 8, None) == expected
    end = expected[0][-1]
    expected = [e[: e.index(end)] if end in e else e for e in expected]
    assert greedy_ids(net, prompts, 8, end) == expected


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ({"type": "NFC"}, ["re\u0301sume\u0301", "cafe\u0301", "nai\u0308ve"]),
        ({"type": "Lowercase"}, ["Paris", "ROME", "New  York"]),
        ({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}, ["a  b", "c   d", "e f"]),
    ],
    ids=["NFC", "lowercase", "white space"],
)
def test_answers_are_compared_as_the_tokenizer_writes_them(lab: Any, kind: dict[str, Any], answers: list[str]) -> None:
    rows = [{"q": f"word of number {i % 3}", "a": answers[i % 3]} for i in range(48)]
    wrong = [{"q": f"word of number {i % 3}", "a": answers[(i + 1) % 3]} for i in range(3)]
    files = {}
    for name, part in (("path", rows), ("validation", rows[:12] + wrong)):
        files[name] = str(lab.root / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in part))
    run = lab.run(
        model={"path": str(normalizing(lab, kind)), "dtype": "float32"},
        data={**files, "template": "{q} answer: {a}", "labels": None, "test": 0.0},
        adapter={"name": "none"},
        partition={"num_clients": 1},
        local={"steps": 60, "batch_size": 8, "lr": 4e-3},
        evaluate={"generate": True, "max_new_tokens": 24},
    )
    assert lab.value(run, **VALIDATION, round=1, name="exact_match") == pytest.approx(12 / 15)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_tokens_beyond_the_positions_of_a_base_are_refused_at_the_start(lab: Any, kind: str) -> None:
    """The base has 256 positions; the longest prompt decides how many are left for new tokens."""
    keys = {"model": {"path": lab.base(kind)}, "adapter": {"name": "prompt", "num_virtual_tokens": 4}}
    tokens = prepare(lab.exp(**keys)).tokens
    prompt = max(int(tokens[split].prompts.max()) for split in ("validation", "test"))
    most = 256 - 4 - prompt + 1  # the last one is not looked at again
    with pytest.raises(UserError, match=f"evaluate.max_new_tokens: {most + 1} .* 4 virtual tokens .*at most {most} or"):
        prepare(lab.exp(**keys, evaluate={"generate": True, "max_new_tokens": most + 1}))
    prepare(lab.exp(**keys, evaluate={"max_new_tokens": most + 1}))
    lab.run(**keys, evaluate={"generate": True, "max_new_tokens": most})
    lab.run(**{**keys, "model": {"path": lab.base("bloom")}}, evaluate={"generate": True, "max_new_tokens": most + 9})


def test_a_label_that_exceeds_the_positions_is_refused_at_the_start(lab: Any) -> None:
    """Each row fits with its own label, but not with the longest one, whose likelihood is asked for too."""
    data = renamed(lab, {"negative": "a b c d e f g h i j k l", "neutral": "b", "positive": "c"})
    for split in ("validation", "test"):
        text = "\n".join(["sentence,label", f"{'word ' * 300},b"]) + "\n"
        Path(data[split]).write_text(text)
    with pytest.raises(UserError, match="data.max_length: 256 .* the longest label .* the 256 positions"):
        prepare(lab.exp(model={"path": lab.base("gpt2")}, data={**data, "max_length": 256}))
    prepare(lab.exp(data={**data, "max_length": 256}))
