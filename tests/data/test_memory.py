"""Examples that a script hands over in Python: whatever they are held in, they are those of the same file."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

import fedsim
from fedsim.cli.main import main
from fedsim.config.experiment import Experiment
from fedsim.core.errors import UserError
from fedsim.data.memory import InMemory
from fedsim.runs.build import prepare

FRAME = pd.DataFrame({"text": [f"some text {i}" for i in range(40)], "label": ["ab"[i % 2] for i in range(40)]})


def tree(root: Path, data: Any, **keys: Any) -> dict[str, Any]:
    small = {"adapter": {"name": "lora", "r": 2}, "local": {"steps": 1, "batch_size": 2}, "modes": ["federated"]}
    parts = {"partition": {"name": "iid", "num_clients": 2}, "executor": {"name": "serial", "threads": 1}}
    return {
        "name": "m",
        "results": str(root),
        "rounds": 1,
        "training": {"lanes": 1},
        **small,
        **parts,
        "data": data,
    } | keys


def texts(source: Any) -> dict[str, list[str]]:
    return {name: split.columns["text"] for name, split in source.splits.items()}


def test_frames_and_data_sets_are_the_examples_of_a_file(tmp_path: Path) -> None:
    FRAME.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    wanted = prepare(Experiment(**tree(tmp_path, {"name": "table", "path": str(tmp_path / "rows.jsonl")})))
    rows = Dataset.from_pandas(FRAME)
    for data in (FRAME, rows, *({"name": "table", key: r} for key in ("path", "data") for r in (FRAME, rows))):
        found = prepare(Experiment(**tree(tmp_path, data)))
        assert texts(found.source) == texts(wanted.source) and found.source.labels == ["a", "b"]
        assert found.run_id() == wanted.run_id(), "content is what an id is made of"
    assert prepare(Experiment(**tree(tmp_path, FRAME[:39]))).run_id() != wanted.run_id()


def test_splits_may_be_handed_over_apart(tmp_path: Path) -> None:
    held, last = FRAME[:6], FRAME[6:10]
    parts = {"train": FRAME, "validation": held, "test": last}
    sets = DatasetDict({name: Dataset.from_pandas(frame, preserve_index=False) for name, frame in parts.items()})
    apart = {"name": "table", "data": FRAME, "validation": held, "test": Dataset.from_pandas(last)}
    for data in (sets, apart, {"name": "table", "path": sets, "validation": "validation"}):
        source = prepare(Experiment(**tree(tmp_path, data))).source
        assert texts(source) == {name: frame["text"].tolist() for name, frame in parts.items()}
    source = prepare(Experiment(**tree(tmp_path, {"name": "table", "data": sets, "validation": "test"}))).source
    assert texts(source)["validation"] == last["text"].tolist()
    only = prepare(Experiment(**tree(tmp_path, DatasetDict(train=sets["train"])))).source
    assert [len(s) for s in only.splits.values()] == [32, 4, 4], "what a DatasetDict lacks is held out"


def test_class_names_chats_and_cells_that_hold_nothing(tmp_path: Path) -> None:
    named = Dataset.from_pandas(FRAME).cast_column("label", ClassLabel(names=["b", "a"]))
    assert prepare(Experiment(**tree(tmp_path, named))).source.labels == ["b", "a"]
    for dtype in ("string", "object", "category", "Int64"):
        values = [0, 1] * 20 if dtype == "Int64" else FRAME["label"]
        frame = FRAME.assign(label=pd.Series(values, dtype=dtype))
        frame.loc[3, "label"] = None
        with pytest.raises(UserError, match="row 4 of 'in memory: 40 examples, .* has the label empty"):
            prepare(Experiment(**tree(tmp_path, frame)))
    turns = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes"}] for i in range(20)]
    frame = pd.DataFrame({"messages": turns})
    frame.to_parquet(tmp_path / "chats.parquet")
    for rows in (frame, pd.read_parquet(tmp_path / "chats.parquet"), Dataset.from_dict({"messages": turns})):
        data = {"name": "instructions", "sources": [{"format": "messages", "path": rows}]}
        source = prepare(Experiment(**tree(tmp_path, data))).source
        assert sorted(p for s in source.splits.values() for p in s.columns["prompt"]) == sorted(
            f"q{i}" for i in range(20)
        )


def test_a_run_is_named_by_its_content_and_goes_on_when_given_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = Experiment(**tree(tmp_path, FRAME, local={"steps": 1, "batch_size": 2, "schedule": "constant"}))
    run = fedsim.run(exp, progress=False)
    held = Experiment.load(run.path / "config.yaml")
    assert held.data.path == exp.data.path and exp.data.path.startswith("in memory: 40 examples, sha256 ")
    assert str(FRAME["text"][7]) not in (run.path / "config.yaml").read_text(), "the config stays readable"
    assert main(["run", str(run.path / "config.yaml")]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("fedsim: data.path: the examples were given in Python (40 examples") and said.count("\n") == 1
    )
    more = Experiment(**{**exp.to_dict(), "rounds": 2, "data": FRAME.copy()})
    assert fedsim.run(more, progress=False, resume=run.path).id == run.id
    assert fedsim.load_runs(run.path)["round"].max() == 2
    with pytest.raises(UserError, match="other content of data"):
        fedsim.run(Experiment(**tree(tmp_path, FRAME[:38])), progress=False, resume=run.path)


def test_workers_of_a_pool_have_them_too(tmp_path: Path) -> None:
    runs = [
        fedsim.run(tree(tmp_path / name, FRAME, executor={"name": name, "threads": 1, **keys}), progress=False)
        for name, keys in (("serial", {}), ("pool", {"workers": 2}))
    ]
    assert runs[0].id == runs[1].id and fedsim.diff_runs(runs[0].path, runs[1].path).agree


def test_they_are_plain_values_of_a_config(tmp_path: Path) -> None:
    frame = FRAME.copy()
    exp = Experiment(**tree(tmp_path, frame))
    frame.loc[0, "text"] = "changed later"
    for same in (pickle.loads(pickle.dumps(exp)), copy.deepcopy(exp), Experiment.from_dict(exp.to_dict())):
        assert same == exp and same.data.path.table.values["text"] == FRAME["text"].tolist()
    assert (
        isinstance(exp.data.path, InMemory) and json.loads(json.dumps(exp.to_dict()))["data"]["path"] == exp.data.path
    )


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (FRAME[:0], "data.path: the DataFrame has no rows"),
        (pd.concat([FRAME, FRAME], axis=1), "data.path: the DataFrame has the column 'text' twice"),
        ({"name": "table", "path": FRAME["text"]}, "data.path: a Series cannot be read; give a pandas DataFrame"),
        ({"name": "table", "data": FRAME, "delimiter": ";"}, "data.path: header, names, delimiter and encoding"),
        ({"name": "hub", "path": FRAME}, "data.path: 40 examples in memory are no data set of the hub"),
        ({"name": "financial_phrasebank", "path": FRAME}, "data.path: 40 examples in memory are no PhraseBank file"),
        (
            {"name": "table", "data": FRAME, "columns": {"text": "x"}},
            "data.columns.text: 'x' is no column of 'in memory",
        ),
        (DatasetDict(dev=Dataset.from_pandas(FRAME)), "data.path: no split 'train' in the DatasetDict; it has: dev"),
        (
            {"name": "table", "data": DatasetDict(train=Dataset.from_pandas(FRAME)), "validation": "dev"},
            "data.validation: no split 'dev' in the DatasetDict; it has: train",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, data: Any, why: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(Experiment(**tree(tmp_path, data)))
    assert str(caught.value).startswith(why) and "\n" not in str(caught.value)
