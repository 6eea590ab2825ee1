"""Where examples come from: the PhraseBank file, a table, a data set of the hub, a user's own source, or the embedded headlines.

Every source gives three splits of named text columns, and the class of each example where there are classes. Instruction
data has a file of its own, `instructions.py`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.core.errors import UserError, nearest_first
from fedsim.data.files import Form, header_hint, read_table
from fedsim.data.hub import load_hub, looks_like_hub_id, table_of_split
from fedsim.data.labels import classes_of, hold_out, missing, sound, words_of
from fedsim.data.memory import Table, table_in, table_of

SPLITS = ("train", "validation", "test")
_SENTIMENT = ["negative", "neutral", "positive"]
_CAUSAL = "{sentence} sentiment: {label}"


@dataclass
class Split:
    """n examples.

    Attributes:
        columns: name -> n values, as the file gives them.
        labels: class of each example, int64 `[n]`, or None.
        file: where the examples come from, for messages; "" = not a file.
        places: number of each example in the file, from 1, the header not counted; None = the examples are all of the file's.
    """

    columns: dict[str, list[Any]]
    labels: np.ndarray | None
    file: str = ""
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def place(self, row: int, split: str) -> str:
        """An example by its number, for messages: in the user's file where it is from one, else in the split."""
        if not self.file:
            return f"row {row + 1} of {split}"
        return f"row {row + 1 if self.places is None else int(self.places[row])} of {self.file!r}"

    def texts(
        self,
        fields: Sequence[str],
        rename: dict[str, str],
        words: list[str] | None,
        split: str = "the data",
        asked: Sequence[str] = (),
    ) -> list[dict[str, str]]:
        """The template's fields of each example as text, whatever it holds; the label as its word.

        Args:
            fields: their names.
            rename: field -> column, where their names differ.
            words: label words.
            split: its name, for messages.
            asked: fields of which an example of the user's file must have one that is not blank.

        Raises:
            UserError: if a field is no column, or a cell is no text: a list or an object, or half of a character. Also for
                an example without any text in front of the answer.
        """
        values: dict[str, list[str]] = {}
        for name in fields:
            if name == "label" and words is not None and self.labels is not None:
                values[name] = [words[c] for c in self.labels]
                continue
            column = rename.get(name, name)
            if column not in self.columns:
                there = f"{nearest_first(name, self.columns)}{header_hint(self.file)}"
                raise UserError(
                    f"data.template: {{{name}}} is no column; the data has: {there} (map names by data.columns={{{name}: COLUMN}})"
                )
            values[name] = [self._text(v, column, row, split) for row, v in enumerate(self.columns[column])]
        if self.file and asked:
            for row, cells in enumerate(zip(*(values[name] for name in asked), strict=True)):
                if not any(cell.strip() for cell in cells):
                    raise UserError(
                        f"data.template: {self.place(row, split)} has no text in {' or '.join(rename.get(n, n) for n in asked)}; fill it in, or take the row out"
                    )
        return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]

    def _text(self, value: Any, column: str, row: int, split: str) -> str:
        if isinstance(value, str):
            text = value
        elif isinstance(value, (dict, list, tuple, set, bytes, np.ndarray)):
            problem = f"{self.place(row, split)} has {str(value)[:60]!r} in the column {column!r}, which is no text"
            raise UserError(f"data.template: {problem}; write its parts as columns of their own")
        else:
            text = "" if missing(value) else str(value)
        if not sound(text):
            problem = f"{self.place(row, split)} has half of a character (a surrogate) in the column {column!r}"
            raise UserError(f"data.template: {problem}; save the file as UTF-8 with whole characters")
        return text


@dataclass
class Source:
    """Three splits.

    Attributes:
        splits: train, validation, test -> examples; test may be empty.
        labels: label words in order, or None where examples have no class.
        template: the template of the source's own for a causal LM, or None.
        text: the template for sequence classification, or None.
        notes: records of the files that became no example, by reason, and how many.
    """

    splits: dict[str, Split]
    labels: list[str] | None
    template: str | None
    text: str | None
    notes: dict[str, int] = field(default_factory=dict)


def headlines(*, seed: int, labels: list[str] | None) -> Source:
    """The embedded headlines: 1,811 / 226 / 227 examples with the PhraseBank's class counts."""
    from fedsim.data.headlines import generate

    words = _same_words(labels)
    splits = {name: _labelled(rows, words) for name, rows in generate(seed).items()}
    return Source(splits, words, _CAUSAL, "{sentence}")


def financial_phrasebank(*, path: str, shuffle_seed: int, labels: list[str] | None) -> Source:
    """Financial PhraseBank, `sentence@label` a line, cut as published.

    P. Malo et al. Good debt or bad debt. JASIST 65(4), 2014. The published runs shuffle all examples once with Python's
    `random` (seed 1234) and take the first 80 % to train, the next 10 % to validate, the rest to test: of the 2,264
    sentences with full agreement 1,811 / 226 / 227.

    Args:
        path: the original file, UTF-8 or ISO-8859-1, or a hub id.
        shuffle_seed: of the shuffle.
        labels: the three label words in another order, or None.

    Raises:
        UserError: for a missing file, or a line that is not `sentence@label`, with its number.
    """
    words = _same_words(labels)
    if (held := table_in(path, "data.path")) is not None:
        raise UserError(
            f"data.path: {held.rows} examples in memory are no PhraseBank file; give them as data.name=table"
        )
    file = Path(path).expanduser()
    if not file.exists() and not looks_like_hub_id(path):
        way = "Sentences_AllAgree.txt is in the Financial PhraseBank v1.0 of its authors; or give a hub id"
        raise UserError(f"data.path: {path!r} does not exist; {way}")
    rows = _read_phrasebank(file) if file.is_file() else _hub_phrasebank(path)
    random.Random(shuffle_seed).shuffle(rows)
    train, validation = int(0.8 * len(rows)), int(0.1 * len(rows))
    cut = {"train": rows[:train], "validation": rows[train : train + validation], "test": rows[train + validation :]}
    if not cut["validation"]:
        raise UserError(f"data.path: {path!r} has {len(rows)} sentences, too few for an 80/10/10 cut")
    return Source({name: _labelled(part, words) for name, part in cut.items()}, words, _CAUSAL, "{sentence}")


def table(*, path: str, validation: str | float, test: str | float, form: Form | None = None, **keys: Any) -> Source:
    """A CSV, TSV, JSON, JSONL or Parquet file of the user's, or examples in memory.

    Args:
        path: the file.
        validation, test: files of their own, or fractions of `path`.
        form: how text files are written.
        keys: see `_source`.

    Raises:
        UserError: for a missing or unreadable file, an unknown label, or splits left empty.
    """
    form = form or Form()
    if Path(path).suffix and form != Form(encoding=form.encoding) and form.separator(Path(path).suffix.lower()) is None:
        raise UserError(f"data.path: {path!r} is no separated text; header, names and delimiter have no use for it")
    held_out = {"validation": validation, "test": test}
    files = {"train": path, **{name: value for name, value in held_out.items() if isinstance(value, str)}}
    tables = {k: read_table(v, "data.path" if k == "train" else f"data.{k}", form) for k, v in files.items()}
    return _source(tables, held_out, path, {**dict.fromkeys(SPLITS, path), **files}, **keys)


def hub(
    *, path: str, subset: str | None, train: str, validation: str | float, test: str | float, **keys: Any
) -> Source:
    """Any data set that `datasets.load_dataset` opens.

    Raises:
        UserError: if it cannot be loaded, a split does not exist, or as for `table`.
    """
    data, held_out = load_hub(path, subset), {"validation": validation, "test": test}
    tables = {}
    for split, name in {"train": train, **held_out}.items():
        if isinstance(name, str):
            if name not in data:
                raise UserError(f"data.{split}: {path!r} has no split {name!r}; it has: {', '.join(data)}")
            tables[split] = table_of_split(data[name], path)
    return _source(tables, held_out, path, **keys)


def own(made: Any, *, by: str, validation: float, test: float, **keys: Any) -> Source:
    """What a user's own source, `by`, returned: examples, or a mapping from splits to examples.

    Raises:
        UserError: if these are no examples, or as for `table`.
    """
    splits = made if isinstance(made, dict) and "train" in made else {"train": made}
    if odd := next((name for name in splits if name not in SPLITS), None):
        raise UserError(f"data.name: {by} returned the split {odd!r}; splits are {', '.join(SPLITS)}")
    tables = {name: table_of(rows, f"data.name: {by} ({name})") for name, rows in splits.items() if rows is not None}
    return _source(tables, {"validation": validation, "test": test}, by, **keys)


def _source(
    tables: dict[str, Table],
    held_out: dict[str, Any],
    path: str,
    files: dict[str, str] | None = None,
    *,
    split_seed: int,
    labels: list[str] | dict[str, str] | None,
    columns: dict[str, str],
    needs_labels: bool | None,
) -> Source:
    """Splits with columns and classes.

    Args:
        tables: of `train`, and of the splits that are given apart.
        held_out: fraction of `train` for each of the other splits.
        path: where the examples come from, for messages.
        files: split -> its file, where there are any.
        split_seed: of the shuffle before fractions are cut off; classes are spread over the splits alike.
        labels: label words in order, what the label column holds -> label word, or None for its sorted values.
        columns: template field -> column; `label` names the label column.
        needs_labels: whether examples must have a class; None = they have one where the label column is there.
    """
    files, train = files or {}, tables["train"]
    has = f"{path!r}, which has"
    for role, name in columns.items():
        if name not in train.columns:
            raise UserError(
                f"data.columns.{role}: {name!r} is no column of {has}: {nearest_first(name, train.columns)}{header_hint(files.get('train'))}"
            )
    column = columns.get("label", "label")
    has_labels = column in train.columns and (needs_labels is not False or labels is not None)
    if needs_labels and not has_labels:
        raise UserError(
            f"data.columns.label: {column!r} is no column of {has}: {nearest_first(column, train.columns)}{header_hint(files.get('train'))}; give the label's as data.columns={{label: COLUMN}}"
        )
    words, classes = None, {}
    if has_labels:
        known = labels if labels is not None else train.classes.get(column) or words_of(train.values[column], path)
        words = list(dict.fromkeys(known.values())) if isinstance(known, dict) else known
        classes = {name: classes_of(held, column, known, name, files.get(name)) for name, held in tables.items()}
    picked = {name: np.arange(len(held)) for name, held in tables.items()}
    if fractions := {name: share for name, share in held_out.items() if name not in tables}:
        picked |= hold_out(len(train), classes.get("train"), fractions, split_seed)
    splits = {}
    for name in SPLITS:
        rows, of = picked[name], name if name in tables else "train"
        if len(rows) == 0 and name != "test":
            raise UserError(
                f"data.{name if name != 'train' else 'path'}: the {name} split of {path!r} is left without an example; it has {len(train)} in all; add some, or hold out fewer"
            )
        part = {c: [values[row] for row in rows.tolist()] for c, values in tables[of].values.items()}
        splits[name] = Split(part, classes[of][rows] if has_labels else None, files.get(name, ""), rows + 1)
    names = {*train.columns, *columns}
    for field_ in ("text", "sentence"):
        if {field_, "label"} <= names:
            return Source(splits, words, f"{{{field_}}} label: {{label}}", f"{{{field_}}}")
    pairs = "{instruction}\n{response}" if {"instruction", "response"} <= names else None
    return Source(splits, words, pairs, None)


# ------------------------------------------------------------------------------------------------ sentences with a sentiment


def _same_words(labels: list[str] | None) -> list[str]:
    if labels is None:
        return list(_SENTIMENT)
    if sorted(labels) != _SENTIMENT:
        raise UserError(
            f"data.labels: {labels!r} are not this source's, which are {', '.join(_SENTIMENT)} (in any order)"
        )
    return list(labels)


def _labelled(rows: Sequence[tuple[str, str]], words: list[str]) -> Split:
    columns = {"sentence": [s for s, _ in rows], "label": [w for _, w in rows]}
    return Split(columns, np.array([words.index(w) for _, w in rows], dtype=np.int64))


def _read_phrasebank(file: Path) -> list[tuple[str, str]]:
    rows, raw = [], file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("iso-8859-1")  # the encoding of the original distribution; every byte is a letter in it
    # Not splitlines(): it also breaks at characters that are text here, such as ISO-8859-1's 0x85.
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if not line.strip():
            continue
        sentence, at, label = line.rpartition("@")
        if not at or label.strip() not in _SENTIMENT or not sentence.strip():
            raise UserError(
                f"{file}: line {number} is {line[:60]!r}, not sentence@label with a label of {', '.join(_SENTIMENT)}"
            )
        rows.append((sentence.strip(), label.strip()))
    if not rows:
        raise UserError(f"{file}: holds no sentences; expected lines of sentence@label")
    return rows


def _hub_phrasebank(path: str) -> list[tuple[str, str]]:
    data = load_hub(path, "sentences_allagree")
    rows = next(iter(data.values()))
    lacking = {"sentence", "label"} - set(rows.column_names)
    if lacking:
        raise UserError(
            f"data.path: {path!r} has no column {', '.join(sorted(lacking))}; it has: {', '.join(rows.column_names)}"
        )
    feature = rows.features["label"]
    names = getattr(feature, "names", _SENTIMENT)
    return [
        (str(r["sentence"]).strip(), r["label"] if isinstance(r["label"], str) else names[r["label"]]) for r in rows
    ]
