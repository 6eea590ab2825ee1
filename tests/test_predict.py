"""`fedsim predict`: the models of a run on new examples, against the run's own scores and a loop through plain peft."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_evaluation import LABELS, WORK, greedy, in_double, reported
from test_hooks import toy
from tiers import fast_only
from transformers import AutoTokenizer

import fedsim
from fedsim.cli.main import main
from fedsim.core.errors import Notice, UserError
from fedsim.core.files import OWN
from fedsim.runs.build import prepare
from fedsim.zero_shot.models import find_models

SITES = {"name": "iid", "num_clients": 3}


def validation(lab: Any) -> list[dict[str, str]]:
    return [{"sentence": s, "label": w} for s, w in lab.rows["validation"]]


def shares(frame: pd.DataFrame) -> np.ndarray:
    return frame[[f"probability:{word}" for word in LABELS]].to_numpy()


@torch.no_grad()
def by_hand(model: Any, tok: Any, sentence: str) -> np.ndarray:
    """Probabilities of the labels: each label's likelihood by a pass of its own, and their shares of the sum."""
    head, out = tok(f"{sentence} sentiment:")["input_ids"], []
    for word in LABELS:
        ids = torch.tensor([tok(f"{sentence} sentiment: {word}")["input_ids"]])
        logp = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :].log_softmax(-1)
        out.append(float(logp[:-1].gather(1, ids[0, 1:, None])[len(head) - 1 :].sum()))
    return np.exp(out) / np.exp(out).sum()


@fast_only(0, 3, 4)
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("llama", {}),
        ("gpt2", {"adapter": {"name": "p_tuning", "num_virtual_tokens": 3, "hidden": 16}}),
        ("llama", {"adapter": {"name": "adapter", "bottleneck": 4}}),
        ("llama", {"adapter": {"name": "none"}}),
        ("bert", {"model": {"task": "sequence_classification"}}),
    ],
    ids=["lora", "p_tuning", "adapter", "whole", "head"],
)
def test_predictions_are_those_of_the_run(lab: Any, kind: str, keys: dict[str, Any]) -> None:
    model = {"path": lab.base(kind), **keys.get("model", {})}
    exp = lab.exp(**{**keys, "model": model}, local=WORK, modes=["local", "federated", "central"])
    run, rows = lab.run(exp), validation(lab)
    words = [row["label"] for row in rows]
    found = {name: fedsim.predict(run, rows, name) for name in ("global", "central", "client:site-2")}
    for name, scope, client in (("global", "federated", None), ("central", "central", None)):
        accuracy = reported(lab, run, 1, scope=scope, client=client)[1]
        assert np.mean(found[name]["prediction"] == words) == pytest.approx(accuracy)
    accuracy = reported(lab, run, 1, scope="local", client="site-2")[1]
    assert np.mean(found["client:site-2"]["prediction"] == words) == pytest.approx(accuracy)
    with np.load(run / "scores.npz") as scores:
        for model, name in (("global", "federated"), ("central", "central"), ("client:site-2", "local site-2")):
            kept = scores["last_predicted"][scores["names"].tolist().index(name)]
            assert found[model]["prediction"].tolist() == [LABELS[p] for p in kept]
    for name, frame in found.items():
        assert frame["row"].tolist() == list(range(len(rows))) and (frame["model"] == name).all()
        assert np.abs(shares(frame).sum(axis=1) - 1).max() < 1e-12
        assert [LABELS[i] for i in shares(frame).argmax(axis=1)] == frame["prediction"].tolist()
    assert not np.allclose(shares(found["global"]), shares(found["central"]), atol=1e-4)
    without = fedsim.predict(run, pd.DataFrame(rows)[["sentence"]])
    assert without["prediction"].equals(found["global"]["prediction"])
    assert np.allclose(shares(without), shares(found["global"]), rtol=1e-9), "the label has no say"
    assert (
        fedsim.predict(fedsim.run(exp, progress=False), rows, "best")
        .drop(columns="model")
        .equals(found["global"].drop(columns="model"))
    )
    if kind == "llama" and not keys:
        loaded, tok = in_double(exp, run / "global"), AutoTokenizer.from_pretrained(exp.model.path)
        for i in (0, 7, 23):
            assert shares(found["global"])[i] == pytest.approx(by_hand(loaded, tok, rows[i]["sentence"]), rel=1e-9)


def test_each_client_s_examples_go_to_its_own_model(lab: Any) -> None:
    """The own models of the algorithm go before the local-only ones; examples stay in their order."""
    exp = lab.exp(modes=["local", "federated"], algorithm=toy("Ditto"), partition=SITES, local=WORK)
    run = lab.run(exp)
    rows = [{**row, "ward": f"site-{1 + i * 7 % 3}"} for i, row in enumerate(validation(lab))]
    mixed = fedsim.predict(run, rows, site_column="ward")
    assert mixed["model"].tolist() == [f"client:{row['ward']}" for row in rows]
    alone = {s: fedsim.predict(run, rows, f"client:site-{s}") for s in (1, 2, 3)}
    expected = [shares(alone[int(row["ward"][-1])])[i] for i, row in enumerate(rows)]
    assert np.allclose(shares(mixed), expected, rtol=1e-9)
    tok = AutoTokenizer.from_pretrained(exp.model.path)
    own, local = (in_double(exp, run / top / "site-2") for top in (OWN, "local"))
    assert shares(alone[2])[3] == pytest.approx(by_hand(own, tok, rows[3]["sentence"]), rel=1e-9)
    assert shares(alone[2])[3] != pytest.approx(by_hand(local, tok, rows[3]["sentence"]), rel=1e-3)


def test_own_models_are_compared_and_evaluated_like_others(lab: Any, tmp_path: Path) -> None:
    run = lab.run(modes=["local", "federated"], algorithm=toy("Ditto"), partition=SITES)
    names = [one.name for one in find_models(run, base=False)]
    assert names == ["global", *(f"{top}/site-{n}" for top in ("local", OWN) for n in (1, 2, 3))]
    other = shutil.copytree(run, tmp_path / "other")
    assert fedsim.diff_runs(run, other).agree
    shutil.copy(run / "local/site-2/adapter_model.safetensors", other / OWN / "site-2/adapter_model.safetensors")
    found = fedsim.diff_runs(run, other)
    assert not found.agree and f"{OWN}/site-2" in str(found)


def test_text_is_generated_where_answers_are_no_labels(lab: Any) -> None:
    data = {"labels": None, "template": "{label}: {sentence}"}
    exp = lab.exp(data=data, local={**WORK, "steps": 20}, evaluate={"generate": True, "max_new_tokens": 6})
    run, rows = lab.run(exp), validation(lab)
    found = fedsim.predict(run, rows)
    assert list(found) == ["row", "model", "prediction"]
    loaded, tok = in_double(exp, run / "global"), AutoTokenizer.from_pretrained(exp.model.path)
    texts = [greedy(loaded, tok, f"{row['label']}:", 6).strip() for row in rows]
    assert found["prediction"].tolist() == texts and len(set(texts)) > 1
    where = {"scope": "federated", "client": None, "split": "validation", "round": 1, "name": "exact_match"}
    assert lab.value(run, **where) == np.mean([t == row["sentence"] for t, row in zip(texts, rows, strict=True)])
    assert fedsim.predict(run, {"label": [row["label"] for row in rows]})["prediction"].tolist() == texts


def test_files_have_the_columns_of_the_run_s_data(lab: Any, tmp_path: Path, capsys: Any) -> None:
    """Other names of columns, labels by number, a delimiter; through the command line, as CSV and as JSON lines."""
    lines = [f"{s.replace(';', ',')};{LABELS.index(w)}" for s, w in lab.rows["train"]]
    (tmp_path / "train.csv").write_text("\n".join(["note;grade", *lines]) + "\n")
    data = {"name": "table", "path": str(tmp_path / "train.csv"), "delimiter": ";", "test": 0.0}
    data |= {"columns": {"sentence": "note", "label": "grade"}, "labels": {str(i): w for i, w in enumerate(LABELS)}}
    tree = lab.tree(local=WORK)
    run = lab.run(fedsim.Experiment.from_dict({**tree, "data": {**data, "template": tree["data"]["template"]}}))
    notes = [s.replace(";", ",") for s, _ in lab.rows["validation"]]
    (tmp_path / "new.csv").write_text("\n".join(["ward;note", *(f"a;{note}" for note in notes)]) + "\n")
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"note": note}) + "\n" for note in notes))
    frame = fedsim.predict(run, tmp_path / "new.csv")
    assert frame.equals(fedsim.predict(run, str(tmp_path / "new.jsonl")))
    assert main(["predict", str(run), "--input", str(tmp_path / "new.csv")]) == 0
    table = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["prediction"] for row in table] == frame["prediction"].tolist()
    assert [float(row["probability:neutral"]) for row in table] == frame["probability:neutral"].tolist()
    out = tmp_path / "made" / "out.jsonl"
    given = ["--input", str(tmp_path / "new.jsonl"), "--output", str(out)]
    assert main(["predict", str(run), *given, "--model", "global"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["probabilities"] for record in records] == [
        dict(zip(LABELS, row, strict=True)) for row in shares(frame).tolist()
    ]
    assert main(["predict", str(run), *given, "--format", "csv"]) == 0
    assert out.read_text().splitlines()[0] == "row,model,prediction," + ",".join(f"probability:{w}" for w in LABELS)


@pytest.mark.parametrize("chat", [False, True])
def test_instructions_are_written_as_the_run_writes_them(lab: Any, tmp_path: Path, chat: bool) -> None:
    """An instruction with a context, or the prompt that the run made of both."""
    marks = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>{% endfor %}"
    marks += "{% if add_generation_prompt %}<assistant>{% endif %}"
    base = tmp_path / "base"
    tok = AutoTokenizer.from_pretrained(lab.base("llama"))
    tok.chat_template = marks
    for file in Path(lab.base("llama")).iterdir():
        base.mkdir(exist_ok=True)
        (base / file.name).write_bytes(file.read_bytes())
    tok.save_pretrained(base)
    lines = [
        {"instruction": f"rate {s}", "context": f"note {i}", "response": w}
        for i, (s, w) in enumerate(lab.rows["train"])
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    source = {"format": "prompt_response", "path": str(tmp_path / "d.jsonl"), "columns": {"prompt": "instruction"}}
    data = {"name": "instructions", "sources": [source], "validation": 0.2, "chat_template": chat, "max_length": 120}
    tree = lab.tree(model={"path": str(base)}, local={**WORK, "steps": 20}, partition={"name": "iid", "num_clients": 2})
    evaluate = {"generate": True, "max_new_tokens": 5}
    exp = fedsim.Experiment.from_dict({**tree, "data": data, "evaluate": evaluate})
    run = lab.run(exp)
    held = prepare(exp).source.splits["validation"].columns
    found = fedsim.predict(run, {"instruction": held["instruction"], "context": held["context"]})["prediction"].tolist()
    assert fedsim.predict(run, {"prompt": held["prompt"]})["prediction"].tolist() == found
    right = np.mean([a == b for a, b in zip(found, held["response"], strict=True)])
    where = {"scope": "federated", "client": None, "split": "validation", "round": 1, "name": "exact_match"}
    assert lab.value(run, **where) == pytest.approx(right)
    if chat:
        asked = [[{"role": "user", "content": prompt}] for prompt in held["prompt"]]
        assert fedsim.predict(run, [{"messages": turns} for turns in asked])["prediction"].tolist() == found


def test_examples_that_cannot_be_predicted_are_named(lab: Any) -> None:
    run = lab.run(data={"max_length": 16, "too_long": "drop"})
    rows = [{"sentence": "profit rose"}, {"sentence": "long " * 40}, {"sentence": "profit fell"}]
    with pytest.warns(Notice, match=r"1 of 3 examples have no prediction \(1 too long\): row 2 of the input"):
        found = fedsim.predict(run, rows)
    assert found["prediction"].isna().tolist() == [False, True, False]
    assert np.isnan(shares(found)[1]).all() and np.isfinite(shares(found)[[0, 2]]).all()


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"model": "client:site-22"}, r"'client:site-22' is no client with a model in .*; clients: site-2"),
        ({"model": "globl"}, "'globl': is no model in .*, which has: global, best, client:ID"),
        ({"model": "central"}, "'central': is no model in"),
        ({"site_column": "wrd"}, "'wrd' is no column; found: ward"),
        ({"site_column": "ward", "model": "global"}, "so model='global' has no use"),
        ({"site_column": "sentence"}, "row 1 of the input: 'client:a' is no client with a model"),
        ({"examples": [{"text": "a"}]}, "the column 'sentence', which the run's template takes, .*; found: text"),
        ({"examples": "none.csv"}, "input: 'none.csv' does not exist"),
        ({"examples": []}, "has no rows"),
        ({"device": "cuda:77"}, "'cuda:77' is not on this machine"),
    ],
)
def test_mistakes_are_one_line(lab: Any, keys: dict[str, Any], why: str) -> None:
    run = lab.run(modes=["local", "federated"])
    examples = keys.pop("examples", [{"sentence": "a", "ward": "site-1"}])
    with pytest.raises(UserError, match=why) as caught:
        fedsim.predict(run, examples, **keys)
    assert "\n" not in str(caught.value)


def test_other_runs_are_refused(lab: Any, tmp_path: Path, capsys: Any) -> None:
    run = lab.run()
    with pytest.raises(UserError, match="client:a': no client has a model in .*, which has: global, best"):
        fedsim.predict(run, [{"sentence": "a"}], "client:a")
    file = run / "global" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(UserError, match=r"adapter_model.safetensors was changed or damaged .*or choose another model"):
        fedsim.predict(run, [{"sentence": "a"}])
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "stopped"}))
    with pytest.raises(UserError, match="stopped, not finished; run it to its end"):
        fedsim.predict(run, [{"sentence": "a"}])
    assert main(["predict", str(run), "--input", "x.csv", "--format", "xml"]) == 2
    assert capsys.readouterr().err == "fedsim: --format: 'xml' is not known; give one of csv, jsonl\n"
