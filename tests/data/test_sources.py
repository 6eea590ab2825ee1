"""Where rows come from: the real PhraseBank, tables of every format, local data set folders, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiers import fast_only

from fedsim.config.experiment import Experiment
from fedsim.core.errors import Notice, UserError
from fedsim.data.files import Form, read_table
from fedsim.data.sources import Source, Split, financial_phrasebank, headlines, hub, missing, table
from fedsim.runs.build import load_source, prepare

SENTIMENT = ["negative", "neutral", "positive"]
PAIRS = [(f"text {i}", "ab"[i % 2]) for i in range(20)]


def read(path: Path, **keys: Any) -> Source:
    """`table` with the config's defaults, but a fifth of the rows held out for each split."""
    defaults: dict[str, Any] = {"validation": 0.2, "test": 0.2, "split_seed": 0, "labels": None, "columns": {}}
    return table(path=str(path), **{**defaults, "needs_labels": None, **keys})


def refusal(action: Callable[[], Any]) -> str:
    """The message of a refusal: always one line."""
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def all_rows(source: Source, *columns: str) -> list[tuple[Any, ...]]:
    """Rows of all splits, sorted."""
    parts = [zip(*(s.columns[c] for c in columns), strict=True) for s in source.splits.values()]
    return sorted(row for part in parts for row in part)


def csv_of(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


# ------------------------------------------------------------------------------------------------ PhraseBank


def phrasebank_file(*parts: str) -> Path:
    root = os.environ.get("FEDSIM_DATA")
    if not root:
        pytest.skip("FEDSIM_DATA is not set")
    file = Path(root, "financial_phrasebank", *parts)
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return file


@pytest.mark.real
def test_the_real_phrasebank_has_the_published_cut_in_both_encodings() -> None:
    """Counts: NVFlare 2.4.0's peft example on Sentences_AllAgree, 1,811 / 226 / 227 rows; see the published figure."""
    published = {"train": [246, 1107, 458], "validation": [26, 147, 53]}
    found = [
        financial_phrasebank(path=str(phrasebank_file(*place)), shuffle_seed=1234, labels=None)
        for place in (("Sentences_AllAgree.txt",), ("latin1", "Sentences_AllAgree.txt"))
    ]
    for source in found:
        assert [len(s) for s in source.splits.values()] == [1811, 226, 227]
        for name, counts in published.items():
            assert np.bincount(source.splits[name].labels).tolist() == counts
        everything = [s for split in source.splits.values() for s in split.columns["sentence"]]
        assert len(everything) == 2264 and not any("@" in s[-10:] for s in everything)
    for name in published:
        assert found[0].splits[name].columns == found[1].splits[name].columns, "the same sentences, decoded alike"
    accents = [s for s in found[0].splits["train"].columns["sentence"] if not s.isascii()]
    assert accents and not any("\ufffd" in s or "Ã" in s for s in accents)


@pytest.mark.real
def test_another_shuffle_seed_cuts_the_real_file_elsewhere() -> None:
    file = str(phrasebank_file("Sentences_AllAgree.txt"))
    first, second = (financial_phrasebank(path=file, shuffle_seed=s, labels=None) for s in (1234, 1))
    assert first.splits["validation"].columns != second.splits["validation"].columns
    assert all_rows(first, "sentence", "label") == all_rows(second, "sentence", "label")


def _lines(n: int = 20) -> str:
    return "".join(f"sentence {i}@{SENTIMENT[i % 3]}\n" for i in range(n))


def bank(path: Path, labels: list[str] | None = None) -> Source:
    return financial_phrasebank(path=str(path), shuffle_seed=1234, labels=labels)


def test_labels_may_stand_in_another_order(tmp_path: Path) -> None:
    file = csv_of(tmp_path / "s.txt", _lines())
    usual, turned = bank(file), bank(file, ["positive", "negative", "neutral"])
    assert usual.labels == SENTIMENT and turned.labels == ["positive", "negative", "neutral"]
    for name in usual.splits:
        words = [usual.labels[c] for c in usual.splits[name].labels]
        assert words == [turned.labels[c] for c in turned.splits[name].labels] == usual.splits[name].columns["label"]
    assert "'good'" in refusal(lambda: bank(file, ["good", "bad", "neutral"]))


def test_an_at_sign_in_a_sentence_and_dos_line_ends_are_text(tmp_path: Path) -> None:
    text = (_lines() + "write to a@b.fi now @positive\n").replace("\n", "\r\n")
    rows = all_rows(bank(csv_of(tmp_path / "s.txt", text)), "sentence", "label")
    assert ("write to a@b.fi now", "positive") in rows and len(rows) == 21


@pytest.mark.parametrize(
    ("mark", "encoding"), [("\x85", "latin-1"), ("\u2028", "utf-8"), ("\x0c", "utf-8"), ("\x1c", "utf-8")]
)
def test_only_a_newline_ends_a_line(tmp_path: Path, mark: str, encoding: str) -> None:
    """Python's `str.splitlines` also breaks at these; 0x85 is the ellipsis of Windows' form of ISO-8859-1."""
    file = csv_of(tmp_path / "s.txt", _lines() + f"profit{mark}rose é@positive\n", encoding)
    assert len(all_rows(bank(file), "sentence")) == 21


@pytest.mark.parametrize("line", ["no label", "x@good", "@neutral", "x@"])
def test_a_line_that_is_no_sentence_and_label_is_named_by_number(tmp_path: Path, line: str) -> None:
    message = refusal(lambda: bank(csv_of(tmp_path / "s.txt", _lines() + "\n" + line + "\n")))
    assert "s.txt: line 22 is" in message and repr(line) in message and "negative, neutral, positive" in message


def test_phrasebank_files_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    assert "no sentences" in refusal(lambda: bank(csv_of(tmp_path / "s.txt", "\n\n")))
    assert "too few" in refusal(lambda: bank(csv_of(tmp_path / "s.txt", "a@neutral\n")))
    message = refusal(lambda: bank(tmp_path / "nowhere.txt"))
    assert "nowhere.txt" in message and "Sentences_AllAgree.txt" in message


def test_headlines_have_the_published_counts_by_the_words_order() -> None:
    usual = headlines(seed=0, labels=None)
    assert np.bincount(usual.splits["train"].labels).tolist() == [246, 1107, 458]
    turned = headlines(seed=0, labels=["positive", "neutral", "negative"])
    assert np.bincount(turned.splits["train"].labels).tolist() == [458, 1107, 246]


# ------------------------------------------------------------------------------------------------ tables


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    frame = pd.DataFrame(rows)
    kind = path.suffix
    if kind in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="," if kind == ".csv" else "\t")
    elif kind == ".parquet":
        frame.to_parquet(path)
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


FORMATS = [".csv", ".tsv", ".json", ".jsonl", ".parquet"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_rows_and_cut(tmp_path: Path, kind: str) -> None:
    source = read(_write(tmp_path / f"rows{kind}", [{"text": t, "label": w, "extra": 1} for t, w in PAIRS]))
    assert source.labels == ["a", "b"] and source.template == "{text} label: {label}" and source.text == "{text}"
    assert {n: len(s) for n, s in source.splits.items()} == {"train": 12, "validation": 4, "test": 4}
    assert all_rows(source, "text", "label") == sorted(PAIRS)
    for split in source.splits.values():
        assert [source.labels[c] for c in split.labels] == split.columns["label"]
        assert np.bincount(split.labels).tolist() == [len(split) // 2] * 2, "classes are spread alike over the splits"
    other = read(_write(tmp_path / "same.csv", [{"text": t, "label": w} for t, w in PAIRS]))
    assert [s.columns["text"] for s in other.splits.values()] == [s.columns["text"] for s in source.splits.values()]
    moved = read(tmp_path / "same.csv", split_seed=1)
    assert moved.splits["validation"].columns != other.splits["validation"].columns
    assert all_rows(moved, "text", "label") == sorted(PAIRS)


@fast_only(0, 4)
@pytest.mark.parametrize("kind", FORMATS)
def test_splits_may_be_files_of_their_own(tmp_path: Path, kind: str) -> None:
    files = {
        n: _write(tmp_path / f"{n}{kind}", [{"text": f"{n} {t}", "label": w} for t, w in PAIRS[:k]])
        for n, k in (("train", 20), ("validation", 4), ("test", 2))
    }
    source = read(files["train"], validation=str(files["validation"]), test=str(files["test"]))
    for name, split in source.splits.items():
        assert split.columns["text"][0] == f"{name} text 0"
    assert [len(s) for s in source.splits.values()] == [20, 4, 2]
    source = read(files["train"], validation=str(files["validation"]), test=0.0)
    assert [len(s) for s in source.splits.values()] == [20, 4, 0]
    source = read(files["train"], validation=str(files["validation"]), test=0.1)
    assert [len(s) for s in source.splits.values()] == [18, 4, 2], "one file and one fraction"


def test_the_label_column_goes_by_name(tmp_path: Path) -> None:
    rows = [{"headline": t, "label": "other", "sentiment": w} for t, w in PAIRS]
    file = _write(tmp_path / "rows.csv", rows)
    source = read(file, columns={"sentence": "headline", "label": "sentiment"})
    assert source.labels == ["a", "b"] and source.template == "{sentence} label: {label}"
    texts = source.splits["train"].texts(["sentence", "label"], {"sentence": "headline"}, source.labels)
    known = dict(PAIRS)
    assert all(row["label"] == known[row["sentence"]] for row in texts)


@fast_only(0, 4)
@pytest.mark.parametrize("kind", FORMATS)
def test_labels_may_be_numbers_of_the_given_words(tmp_path: Path, kind: str) -> None:
    file = _write(tmp_path / f"rows{kind}", [{"text": f"t{i}", "label": i % 3} for i in range(30)])
    source = read(file, labels=SENTIMENT)
    for split in source.splits.values():
        assert [int(t[1:]) % 3 for t in split.columns["text"]] == split.labels.tolist()
    texts = source.splits["train"].texts(["text", "label"], {}, source.labels)
    assert all(row["label"] == SENTIMENT[int(row["text"][1:]) % 3] for row in texts), "the word, not the number"
    assert read(file).labels == ["0", "1", "2"], "without words the numbers are the words"


def test_a_label_that_is_not_listed_is_named_with_its_row(tmp_path: Path) -> None:
    file = csv_of(tmp_path / "rows.csv", "text,label\nx,a\ny,b\nz,c\n" * 5)
    message = refusal(lambda: read(file, labels=["a", "b"]))
    assert f"row 3 of '{file}'" in message and "'c'" in message and "a, b" in message
    held = csv_of(tmp_path / "held.csv", "text,label\nx,a\ny,z\n")
    message = refusal(lambda: read(file, validation=str(held)))
    assert f"row 2 of '{held}'" in message and "'z'" in message
    empty = csv_of(tmp_path / "empty.csv", "text,label\nx,a\ny,\n" * 5)
    assert f"row 2 of '{empty}' has the label empty" in refusal(lambda: read(empty, labels=["a", "b"]))


def test_a_number_beyond_the_given_words_is_named_with_its_own_row(tmp_path: Path) -> None:
    file = csv_of(tmp_path / "rows.csv", "text,label\nx,0\ny,1\nz,2\nw,3\n")
    message = refusal(lambda: read(file, labels=SENTIMENT))
    assert "'3'" in message and f"row 4 of '{file}'" in message, message


def test_a_missing_column_lists_those_there(tmp_path: Path) -> None:
    file = csv_of(tmp_path / "rows.csv", "text,label\nx,a\ny,b\n" * 5)
    message = refusal(lambda: read(file, columns={"label": "sentiment"}))
    assert message.startswith("data.columns.label: 'sentiment' ") and "text, label" in message
    message = refusal(lambda: read(file, columns={"sentence": "headline"}))
    assert message.startswith("data.columns.sentence: 'headline' ") and "text, label" in message
    plain = csv_of(tmp_path / "plain.csv", "text,other\nx,a\n" * 5)
    message = refusal(lambda: read(plain, needs_labels=True))
    assert "'label'" in message and "text, other" in message
    message = refusal(lambda: read(file, validation=str(plain)))
    assert f"'label' is no column of '{plain}'" in message and "text, other" in message and "validation rows" in message
    split = Split({"text": ["x"]}, None)
    message = refusal(lambda: split.texts(["title"], {}, None))
    assert "{title}" in message and "text" in message and "data.columns" in message


@fast_only(0, 1, 3, 4, 8, 9, 11, 12)
@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("r.csv", b"text,text,label\na,b,c\n", "'text' twice"),
        ("r.csv", b"", "is empty; give a file with rows"),
        ("r.csv", b"text,label\n", "no rows"),
        ("r.csv", "text,label\ncafé,a\n".encode("latin-1"), "not UTF-8"),
        ("r.csv", b"text,label\na,b\na,b,c\n", "line 3"),
        ("r.csv", b'text,label\n"a,b\n', "could not be read as csv"),
        ("r.tsv", "text\tlabel\ncafé\ta\n".encode("latin-1"), "not UTF-8"),
        ("r.json", b"[]", "no rows"),
        ("r.json", b"{", "could not be read as json"),
        ("r.jsonl", b'{"text": "a"}\n{"text"\n', "could not be read as jsonl"),
        ("r.jsonl", "{'text': 'é'}".encode("latin-1"), "r.jsonl"),
        ("r.parquet", b"PAR1", "could not be read as parquet"),
        ("r.xlsx", b"x", "ends in .xlsx"),
        ("r", b"x", "ends in nothing"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(lambda: read(tmp_path / name))
    assert message.startswith("data.path: ") and name in message and why in message


def test_a_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    assert refusal(lambda: read(tmp_path / "no.csv")).startswith(f"data.path: '{tmp_path}/no.csv' does not exist")
    file = csv_of(tmp_path / "rows.csv", "text,label\nx,a\ny,b\n" * 5)
    assert refusal(lambda: read(file, test=str(tmp_path / "no.csv"))).startswith("data.test: ")
    assert f"data.path: '{tmp_path}' is a folder; give a .csv" in refusal(lambda: read(tmp_path))


def test_a_row_with_a_field_too_many_never_shifts_the_columns(tmp_path: Path) -> None:
    """pandas takes the first column for an index where every row has one field more than the header."""
    file = csv_of(
        tmp_path / "rows.csv", "text,label\n" + "".join(f"t{i},{w},extra{i % 2}\n" for i, (_, w) in enumerate(PAIRS))
    )
    assert "rows.csv" in refusal(lambda: read(file))


def test_a_cell_may_hold_a_document(tmp_path: Path) -> None:
    """Longer than the 131,072 characters at which Python's own reader stops, also where another cell is empty."""
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "word " * 40_000 + ",a\nshort,b\nshort," + "\n")
    held = read_table(str(file), "data.path")
    assert [len(t) for t in held.values["text"]] == [200_000, 5, 5]
    assert [missing(v) for v in held.values["label"]] == [False, False, True]


def test_quotes_commas_newlines_and_marks_are_text(tmp_path: Path) -> None:
    hard = ['a, "b"', "two\nlines", "{braces} {0}", "<b>&amp;</b> ${x} %s \\n", "NA", "null", "émoji 🙂", "'"]
    for kind in FORMATS:
        file = _write(tmp_path / f"rows{kind}", [{"text": t, "label": "xy"[i % 2]} for i, t in enumerate(hard * 3)])
        rows = all_rows(read(file), "text", "label")
        assert Counter(t for t, _ in rows) == Counter(hard * 3), kind


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".json", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, kind: str) -> None:
    file = _write(tmp_path / f"rows{kind}", [{"text": t, "label": w} for t, w in PAIRS])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert all_rows(read(file), "text", "label") == sorted(PAIRS)


@fast_only(0, 4)
@pytest.mark.parametrize("kind", FORMATS)
def test_instruction_and_response_pairs_have_no_classes(tmp_path: Path, kind: str) -> None:
    source = read(_write(tmp_path / f"rows{kind}", [{"instruction": f"q{i}", "response": f"r{i}"} for i in range(10)]))
    assert source.labels is None and source.template == "{instruction}\n{response}" and source.text is None
    assert all(s.labels is None for s in source.splits.values())
    texts = source.splits["test"].texts(["instruction", "response"], {}, None)
    assert all(t["instruction"][1:] == t["response"][1:] for t in texts) and len(texts) == 2


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
@fast_only(0, 5)
@pytest.mark.parametrize(
    "answers",
    [["007", "010"], ["1.50", "2.00"], ["0", ""], ["1e3", "5"], ["True", "false"], ["1_000", "12345678901234567890"]],
)
def test_text_that_looks_like_numbers_stays_as_written(tmp_path: Path, kind: str, answers: list[str]) -> None:
    """An answer of a sum, a code with leading zeros, a price: `7`, `1.5` and `0.0` would be other answers."""
    rows = [{"instruction": f"q{i}", "response": a} for i, a in enumerate(answers * 5)]
    source = read(_write(tmp_path / f"rows{kind}", rows))
    texts = [t for s in source.splits.values() for t in s.texts(["instruction", "response"], {}, None)]
    assert {t["instruction"]: t["response"] for t in texts} == {r["instruction"]: r["response"] for r in rows}


def test_whole_numbers_beside_an_empty_cell_stay_whole(tmp_path: Path) -> None:
    answers = [*range(9), None]
    for kind in (".json", ".jsonl"):
        file = _write(
            tmp_path / f"rows{kind}", [{"instruction": f"q{i}", "response": a} for i, a in enumerate(answers)]
        )
        source = read(file)
        texts = [t["response"] for s in source.splits.values() for t in s.texts(["response"], {}, None)]
        assert sorted(texts) == ["", *map(str, range(9))], kind


@pytest.mark.parametrize("dtype", ["Int64", "string", "object"])
def test_a_missing_value_is_never_a_word(tmp_path: Path, dtype: str) -> None:
    """Parquet gives missing values of pandas' own types back as `pd.NA`, whose text is `<NA>`."""
    values = [0, 1] * 5 if dtype == "Int64" else ["a", "b"] * 5
    frame = pd.DataFrame({"text": [f"t{i}" for i in range(10)], "label": pd.array([*values[:9], None], dtype=dtype)})
    frame.to_parquet(tmp_path / "rows.parquet")
    message = refusal(lambda: read(tmp_path / "rows.parquet"))
    assert f"row 10 of '{tmp_path / 'rows.parquet'}' has the label empty" in message
    frame.rename(columns={"label": "response", "text": "instruction"}).to_parquet(tmp_path / "pairs.parquet")
    source = read(tmp_path / "pairs.parquet")
    texts = [t["response"] for s in source.splits.values() for t in s.texts(["response"], {}, None)]
    assert texts.count("") == 1 and "<NA>" not in texts


def test_one_value_or_far_too_many_are_no_classes(tmp_path: Path) -> None:
    one = csv_of(tmp_path / "one.csv", "text,label\n" + "x,a\n" * 9)
    assert "1 different value" in refusal(lambda: read(one))
    many = csv_of(tmp_path / "many.csv", "text,label\n" + "".join(f"x,l{i}\n" for i in range(1200)))
    assert "1200 different values" in refusal(lambda: read(many))


def test_fractions_leave_every_split_a_row_or_say_which_has_none(tmp_path: Path) -> None:
    three = csv_of(tmp_path / "3.csv", "text,label\na,x\nb,y\nc,x\n")
    assert [len(s) for s in read(three).splits.values()] == [1, 1, 1]
    two = csv_of(tmp_path / "2.csv", "text,label\na,x\nb,y\n")
    message = refusal(lambda: read(two))
    assert "train split" in message and "2 in all" in message


def test_a_tables_text_reaches_the_tokens_untouched(tmp_path: Path) -> None:
    """Braces, newlines and markup of the data mean nothing to the template."""
    hard = ["{label} {", "}} {{x}}", "<s> [INST] </s>", "line\nline", "%s {0} ${HOME}"]
    rows = [{"text": f"{t} {i}", "label": "good" if i % 2 else "bad"} for i, t in enumerate(hard * 4)]
    file = _write(tmp_path / "rows.csv", rows)
    exp = Experiment(data={"name": "table", "path": str(file), "template": "{text} => {label}", "max_length": 512})
    parts = prepare(exp)
    for name, split in parts.tokens.items():
        for i in range(len(split)):
            text = parts.tokenizer.decode(split.row(i)[: int(split.prompts[i])], clean_up_tokenization_spaces=False)
            assert text == f"{parts.source.splits[name].columns['text'][i]} =>"


# ------------------------------------------------------------------------------------------------ hub


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local data set folder of CSV files, one a split; what `datasets` caches stays beside it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    place = tmp_path / "my_data"
    place.mkdir()
    for name, n in (("train", 20), ("validation", 6), ("test", 4)):
        _write(place / f"{name}.csv", [{"text": f"{name} {t}", "label": w} for t, w in PAIRS[:n]])
    return place


def from_hub(path: Path | str, **keys: Any) -> Source:
    defaults: dict[str, Any] = {"subset": None, "train": "train", "validation": 0.2, "test": 0.2, "split_seed": 0}
    return hub(path=str(path), **{**defaults, "labels": None, "columns": {}, "needs_labels": None, **keys})


def test_a_local_data_set_folder_gives_its_splits_or_fractions(folder: Path) -> None:
    source = from_hub(folder, validation="validation", test="test")
    assert [len(s) for s in source.splits.values()] == [20, 6, 4] and source.labels == ["a", "b"]
    assert all(t.startswith("validation ") for t in source.splits["validation"].columns["text"])
    source = from_hub(folder)
    assert [len(s) for s in source.splits.values()] == [12, 4, 4]
    assert all(t.startswith("train ") for s in source.splits.values() for t in s.columns["text"])


def test_a_split_that_is_not_there_lists_those_there(folder: Path) -> None:
    message = refusal(lambda: from_hub(folder, validation="dev"))
    assert message.startswith("data.validation: ") and "'dev'" in message and "train, validation, test" in message


def test_class_names_of_a_data_set_keep_their_order(folder: Path, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    names = ["zeta", "beta", "alpha"]
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=names)})
    rows = {"sentence": [f"t{i}" for i in range(15)], "label": [i % 3 for i in range(15)]}
    place = tmp_path / "typed"
    place.mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(str(place / "train.parquet"))
    source = from_hub(place)
    assert source.labels == names and source.template == "{sentence} label: {label}"
    for split in source.splits.values():
        assert [int(t[1:]) % 3 for t in split.columns["sentence"]] == split.labels.tolist()
        assert [names[c] for c in split.labels] == split.columns["label"]
    turned = from_hub(place, labels=["alpha", "beta", "zeta"])
    assert [2 - c for c in source.splits["test"].labels] == turned.splits["test"].labels.tolist()


@fast_only(0, 2, 6)
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("no_such_folder_here/nor_there", "could not be loaded"),
        ("my_other_data", "could not be loaded"),
        ("./nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("/my_data", "does not exist"),
        ("rows.csv", "does not exist"),
        (" ", "does not exist"),
    ],
)
def test_a_data_set_that_cannot_be_loaded_is_one_line(folder: Path, path: str, why: str) -> None:
    message = refusal(lambda: from_hub(path))
    assert message.startswith(f"data.path: {path!r} {why}") and "hub" in message.lower()


def test_the_config_reaches_the_source(folder: Path) -> None:
    exp = Experiment(data={"name": "hub", "path": str(folder), "validation": "validation", "test": 0})
    assert [len(s) for s in load_source(exp).splits.values()] == [20, 6, 0]
    columns = {"name": "headlines", "columns": {"sentence": "text"}}
    assert "data.columns" in refusal(lambda: load_source(Experiment(data=columns)))


def test_json_rows_are_columns_as_pandas_would_have_them_without_pandas(tmp_path: Path) -> None:
    """Columns in the order in which they first come; what a row lacks is NaN, a null stays None, numbers stay as they are."""
    rows = [{"b": 1, "a": "x"}, {"a": None, "c": [1, {"d": 2}]}, {}, {"c": True, "b": 2**70, "a": 1.5}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "import sys; from fedsim.data.sources import read_table; read_table(sys.argv[1], 'x'); print('pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    held, frame = read_table(str(file), "data.path"), pd.DataFrame(rows, dtype=object)
    assert held.columns == list(frame.columns) == ["b", "a", "c"] and len(held) == 4
    assert repr(held.values) == repr({c: frame[c].tolist() for c in frame.columns})
    assert repr(held.records()) == repr(frame.to_dict("records"))


# ------------------------------------------------------------------------------------------------ forms of text files

AG = [
    ("3", "Oil: $46", 'Crude, they say ""rose""'),
    ("1", "Peace talks", "In Oslo"),
    ("4", "New chip", "It is \\ small"),
]
TOPICS = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}


def _news(path: Path, n: int = 40, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    """AG News as its authors publish it: class, title and description, all quoted, no header, classes from 1."""
    lines = [delimiter.join(f'"{cell}"' for cell in (str(i % 4 + 1), *AG[i % 3][1:])) for i in range(n)]
    return csv_of(path, "\n".join(lines) + "\n", encoding)


def test_ag_news_as_published_loads_from_one_yaml(tmp_path: Path) -> None:
    _news(tmp_path / "train.csv")
    _news(tmp_path / "test.csv", 8)
    (tmp_path / "e.yaml").write_text("""
data:
  name: table
  path: train.csv
  test: test.csv
  names: [label, title, description]
  labels: {1: World, 2: Sports, 3: Business, 4: Sci/Tech}
  template: "{title}. {description} topic: {label}"
partition: {name: iid, num_clients: 2}
""")
    parts = prepare(Experiment.load(tmp_path / "e.yaml"))
    assert parts.source.labels == list(TOPICS.values()) and len(parts.source.splits["test"]) == 8
    for name, split in parts.source.splits.items():
        assert [TOPICS[v] for v in split.columns["label"]] == [parts.source.labels[c] for c in split.labels]
        words = [parts.tokenizer.decode(parts.tokens[name].candidates[c]).strip() for c in split.labels]
        assert words == [TOPICS[v] for v in split.columns["label"]]
    assert parts.source.splits["test"].columns["description"][0] == 'Crude, they say "rose"'
    (tmp_path / "again.yaml").write_text(parts.exp.to_yaml())
    again = prepare(Experiment.load(tmp_path / "again.yaml"))
    assert again.run_id() == parts.run_id(), "the resolved config is the same experiment"
    turned = prepare(
        Experiment.load(tmp_path / "e.yaml", ["data.labels={4: Sci/Tech, 3: Business, 2: Sports, 1: World}"])
    )
    assert turned.run_id() != parts.run_id(), "the order of the labels numbers the classes"


def test_numbers_that_count_from_one_say_that_labels_count_from_zero(tmp_path: Path) -> None:
    file = _news(tmp_path / "train.csv")
    message = refusal(lambda: read(file, form=Form(names=["label", "a", "b"]), labels=list(TOPICS.values())))
    assert "row 4 of" in message and "'4'" in message and "from 0, so 4 labels are 0 to 3" in message
    assert "labels={4: WORD" in message
    message = refusal(lambda: read(file, form=Form(names=["label", "a", "b"]), labels={"1": "x", "2": "y", "3": "z"}))
    assert "row 4 of" in message and "'4'; data.labels has: 1, 2, 3" in message
    with pytest.warns(Notice, match=r"count them from 0, and no row of .* has 0 \(zero\)"):
        read(file, form=Form(names=["label", "a", "b"]), labels=["zero", *TOPICS.values()])
    merged = read(file, form=Form(names=["label", "a", "b"]), labels={"1": "x", "2": "y", "3": "x", "4": "y"})
    assert merged.labels == ["x", "y"]
    for split in merged.splits.values():
        assert [(int(v) - 1) % 2 for v in split.columns["label"]] == split.labels.tolist()


@fast_only(1, 3, 4)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16", "utf-16-le"])
@fast_only(0, 2)
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "¦"])
@pytest.mark.filterwarnings("error")
def test_the_same_rows_however_the_text_is_written(tmp_path: Path, encoding: str, delimiter: str) -> None:
    """Oracle: the rows that were written, by Python's own writer."""
    rows = [
        (f"café {i}, „{delimiter}“ naïve" if "utf" in encoding else f"café {i}{delimiter}", "ab"[i % 2])
        for i in range(20)
    ]
    for header in (True, False):
        file = tmp_path / ("rows.csv" if delimiter != "|" else "rows.txt")
        with file.open("w", encoding=encoding, newline="") as handle:
            csv.writer(handle, delimiter=delimiter).writerows([*([("text", "label")] if header else []), *rows])
        form = Form(
            names=None if header else ["text", "label"],
            delimiter=delimiter,
            encoding=None if encoding.startswith("utf-8") else encoding,
        )
        assert all_rows(read(file, form=form), "text", "label") == sorted(rows)
        if not header:
            plain = read(
                file, form=dataclasses.replace(form, header=False, names=None), columns={"text": "0", "label": "1"}
            )
            assert all_rows(plain, "0", "1") == sorted(rows)
    renamed = read(
        _write(tmp_path / "h.csv", [{"a": t, "b": w} for t, w in rows]), form=Form(header=True, names=["text", "label"])
    )
    assert all_rows(renamed, "text", "label") == sorted(rows)


def test_what_a_file_is_not_says_which_key_tells_what_it_is(tmp_path: Path) -> None:
    for mark, name in ((";", "r.csv"), ("\t", "t.csv"), (",", "c.tsv"), ("|", "p.csv")):
        file = csv_of(tmp_path / name, f"text{mark}label\n" + f"x{mark}a\ny{mark}b\n" * 9)
        message = refusal(lambda file=file: read(file))
        assert f"has {mark!r} between its cells" in message and "delimiter" in message
        assert len(all_rows(read(file, form=Form(delimiter=mark)), "text")) == 18
    bare = _news(tmp_path / "bare.csv")
    for columns, needs in (({}, True), ({"text": "title"}, None)):
        message = refusal(lambda columns=columns, needs=needs: read(bare, columns=columns, needs_labels=needs))
        assert "does the first line name the columns?" in message and len(message) < 600
    message = refusal(lambda: read(_write(tmp_path / "r.jsonl", [{"a": 1}]), needs_labels=True))
    assert "first line" not in message
    message = refusal(lambda: read(csv_of(tmp_path / "l.csv", "text,label\né,a\n", "latin-1")))
    assert "is not UTF-8 (byte 11, line 2)" in message and "encoding: latin-1" in message
    message = refusal(lambda: read(csv_of(tmp_path / "u.csv", "text,label\né,a\n"), form=Form(encoding="ascii")))
    assert "is not ascii (byte 11, line 2)" in message
    message = refusal(lambda: read(csv_of(tmp_path / "w.csv", "text,label\né,a\n", "utf-16")))
    assert "encoding: utf-16" in message
    for names in (["a", "b"], ["a", "b", "c", "d"]):
        assert "bare.csv" in refusal(lambda names=names: read(bare, form=Form(names=names)))
    message = refusal(lambda: read(tmp_path / "r.jsonl", form=Form(names=["a"])))
    assert "no separated text" in message


@fast_only(0, 2, 4, 5, 6)
@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"delimiter": ";;"}, "delimiter: ';;' is not one character"),
        ({"delimiter": ""}, "delimiter: '' is not one character"),
        ({"encoding": "utf-88"}, "encoding: 'utf-88' is not known"),
        ({"encoding": "base64"}, "encoding: 'base64' is not known"),
        ({"names": []}, "names: [] is not one name per column"),
        ({"names": ["a", "a"]}, "names: ['a', 'a'] is not one name per column"),
        ({"header": "no"}, "header: 'no' is not true or false"),
    ],
)
def test_a_form_that_cannot_be_is_one_line(keys: dict[str, Any], why: str) -> None:
    assert refusal(lambda: Experiment(data={"name": "table", "path": "x.csv", **keys})).startswith(f"data.{why}")
    source = {"format": "prompt_response", "path": "x.csv", **keys}
    data = {"name": "instructions", "sources": [source]}
    assert refusal(lambda: Experiment(data=data)).startswith(f"data.sources[0].{why}")


def test_prompts_and_answers_may_be_written_otherwise_too(tmp_path: Path) -> None:
    csv_of(tmp_path / "p.csv", "".join(f"q{i};é{i}\n" for i in range(20)), "latin-1")
    entry = {"format": "prompt_response", "path": str(tmp_path / "p.csv"), "names": ["prompt", "response"]}
    data = {"name": "instructions", "sources": [{**entry, "delimiter": ";", "encoding": "latin-1"}]}
    source = load_source(Experiment(data=data))
    assert all_rows(source, "prompt", "response") == sorted((f"q{i}", f"é{i}") for i in range(20))


# ------------------------------------------------------------------------------------------------ folders and the loader's cache


@pytest.mark.parametrize("kind", ["hub", "financial_phrasebank", "instructions"])
def test_a_folder_that_is_gone_is_an_error_whatever_was_read_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By its bare name, as a user in the folder's parent writes it; also where the loader itself has filled its cache."""
    import datasets

    def load(path: str) -> Source:
        if kind == "hub":
            return from_hub(path)
        if kind == "financial_phrasebank":
            return financial_phrasebank(path=path, shuffle_seed=0, labels=None)
        return load_source(Experiment(data={"name": kind, "sources": [{"format": "prompt_response", "path": path}]}))

    names = ("prompt", "response") if kind == "instructions" else ("sentence", "label")
    for file in folder.iterdir():
        _write(file, [{names[0]: f"text {i}", names[1]: SENTIMENT[i % 3]} for i in range(30)])
    monkeypatch.chdir(tmp_path)
    if kind != "financial_phrasebank":  # which asks for a configuration of a name that a folder has not
        assert load("my_data").splits["train"]
    datasets.load_dataset(str(folder))
    folder.rename(tmp_path / "elsewhere")
    for path in ("my_data", "my_data/", "./my_data", str(folder)):
        assert "my_data" in refusal(lambda path=path: load(path))


def test_a_folder_is_read_as_it_is_now(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed under the same path, with the same time and size; and beside another folder of the same name."""
    first = all_rows(from_hub(folder), "text")
    file = folder / "train.csv"
    stat, text = file.stat(), file.read_text()
    file.write_text(text.replace("train text", "other text"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = all_rows(from_hub(folder), "text")
    assert [(t.replace("train", "other"),) for (t,) in first] == second
    twin = tmp_path / "below" / "my_data"
    twin.mkdir(parents=True)
    _write(twin / "train.csv", [{"text": f"twin {t}", "label": w} for t, w in PAIRS])
    monkeypatch.chdir(tmp_path / "below")
    assert all(t.startswith("twin ") for (t,) in all_rows(from_hub("my_data"), "text"))
    (tmp_path / "below" / "csv").mkdir()
    _write(tmp_path / "below" / "csv" / "train.csv", [{"text": t, "label": w} for t, w in PAIRS])
    assert len(all_rows(from_hub("csv"), "text")) == 20, "a folder with the name of one of the loader's own modules"
    assert not list((tmp_path / "cache").glob("my_data*"))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("train.csv", "text,label\na,b\na,b,c,d\n", ("train.csv", "line 3")),
        ("train.jsonl", '{"text": "a"}\n{"text": \n', ("train.jsonl", "JSON parse error")),
        ("train.parquet", "PAR1", ("train.parquet",)),
    ],
)
def test_the_loaders_errors_are_one_line_with_the_file_and_its_bars_stay_away(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: str, parts: tuple[str, ...]
) -> None:
    from_hub(folder)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / name).write_text(content)
    message = refusal(lambda: from_hub(bad))
    assert all(part in message for part in (*parts, "could not be loaded as a data set")), message
    assert capfd.readouterr() == ("", "")
