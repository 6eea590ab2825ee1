"""Where rows come from: the PhraseBank file, a table of the user's, a hub data set, or the embedded headlines.

Every source gives three splits of named text columns. A classification source also gives the class of each row. Instruction
data has a file of its own, `instructions.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.core.errors import Notice, UserError, nearest_first
from fedsim.data.files import Form, header_hint, read_table
from fedsim.data.memory import Table, of_dataset, table_in

SPLITS = ("train", "validation", "test")
_SENTIMENT = ["negative", "neutral", "positive"]
_CAUSAL = "{sentence} sentiment: {label}"


@dataclass
class Split:
    """n rows.

    Attributes:
        columns: name -> n values, as the file gives them.
        labels: class of each row, int64 `[n]`, or None.
        file: where the rows come from, for messages; "" = not a file.
        places: number of each row in the file, from 1, the header not counted; None = the rows are all of the file's.
    """

    columns: dict[str, list[Any]]
    labels: np.ndarray | None
    file: str = ""
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def place(self, row: int, split: str) -> str:
        """A row by its number, for messages: in the user's file where it is from one, else in the split."""
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
        """The template's fields of each row as text, whatever it holds; the label as its word.

        Args:
            fields: their names.
            rename: field -> column, where their names differ.
            words: label words.
            split: its name, for messages.
            asked: fields of which a row of the user's file must have one that is not blank.

        Raises:
            UserError: if a field is no column, or a cell is no text: a list or an object, or half of a character. Also for
                a row without any text in front of the answer.
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


def sound(text: str) -> bool:
    """Whether text can be written as UTF-8: JSON can hold halves of characters, which no tokenizer or file takes."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class Source:
    """Three splits.

    Attributes:
        splits: train, validation, test -> rows; test may be empty.
        labels: label words in order, or None where rows have no class.
        template: the template of the source's own for a causal LM, or None.
        text: the template for sequence classification, or None.
        notes: records of the files that became no row, by reason, and how many.
    """

    splits: dict[str, Split]
    labels: list[str] | None
    template: str | None
    text: str | None
    notes: dict[str, int] = field(default_factory=dict)


def headlines(*, seed: int, labels: list[str] | None) -> Source:
    """The embedded headlines: 1,811 / 226 / 227 rows with the PhraseBank's class counts."""
    from fedsim.data.headlines import generate

    words = _same_words(labels)
    splits = {name: _labelled(rows, words) for name, rows in generate(seed).items()}
    return Source(splits, words, _CAUSAL, "{sentence}")


def financial_phrasebank(*, path: str, shuffle_seed: int, labels: list[str] | None) -> Source:
    """Financial PhraseBank, `sentence@label` a line, cut as published.

    P. Malo et al. Good debt or bad debt. JASIST 65(4), 2014. The published runs shuffle all rows once with Python's
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


def table(
    *,
    path: str,
    validation: str | float,
    test: str | float,
    split_seed: int,
    labels: list[str] | dict[str, str] | None,
    columns: dict[str, str],
    needs_labels: bool | None,
    form: Form | None = None,
) -> Source:
    """A CSV, TSV, JSON, JSONL or Parquet file of the user's, or examples in memory.

    Args:
        path: the file.
        validation, test: files of their own, or fractions of `path`.
        split_seed: of the shuffle before fractions are cut off; rows of one class are spread over the splits alike.
        labels: label words in order, what the file holds -> label word, or None for the sorted values of the label column.
        columns: template field -> column; `label` names the label column.
        needs_labels: whether rows must have a class; None = they have one where the label column is there.
        form: how text files are written.

    Raises:
        UserError: for a missing or unreadable file, an unknown label, or splits left empty.
    """
    form = form or Form()
    if Path(path).suffix and form != Form(encoding=form.encoding) and form.separator(Path(path).suffix.lower()) is None:
        raise UserError(f"data.path: {path!r} is no separated text; header, names and delimiter have no use for it")
    frames, files, fractions = {"train": read_table(path, "data.path", form)}, {"train": path}, {}
    for name, value in (("validation", validation), ("test", test)):
        if isinstance(value, str):
            frames[name], files[name] = read_table(value, f"data.{name}", form), value
        else:
            fractions[name], files[name] = value, path
    return _from_frames(frames, fractions, split_seed, labels, columns, needs_labels, path, files)


def hub(
    *,
    path: str,
    subset: str | None,
    train: str,
    validation: str | float,
    test: str | float,
    split_seed: int,
    labels: list[str] | dict[str, str] | None,
    columns: dict[str, str],
    needs_labels: bool | None,
) -> Source:
    """Any data set that `datasets.load_dataset` opens.

    Raises:
        UserError: if it cannot be loaded, a split does not exist, or as for `table`.
    """
    import datasets

    data = load_hub(path, subset)
    names = {"train": train} | {k: v for k, v in (("validation", validation), ("test", test)) if isinstance(v, str)}
    frames = {}
    for split, name in names.items():
        if name not in data:
            raise UserError(f"data.{split}: {path!r} has no split {name!r}; it has: {', '.join(data)}")
        rows = data[name]
        with _loading(path, "data.path"):
            frames[split] = Table.of(rows.to_pandas())
            named = of_dataset(rows, [c for c, f in rows.features.items() if isinstance(f, datasets.ClassLabel)])
        frames[split] = Table({**frames[split].values, **named.values}, len(rows), named.classes)
    fractions = {k: v for k, v in (("validation", validation), ("test", test)) if not isinstance(v, str)}
    return _from_frames(frames, fractions, split_seed, labels, columns, needs_labels, path)


# ------------------------------------------------------------------------------------------------ helpers


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


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("iso-8859-1")  # the encoding of the original distribution; every byte is a letter in it


def _read_phrasebank(file: Path) -> list[tuple[str, str]]:
    rows = []
    # Not splitlines(): it also breaks at characters that are text here, such as ISO-8859-1's 0x85.
    for number, line in enumerate(re.split(r"\r\n|\n|\r", _decode(file.read_bytes())), 1):
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


def looks_like_hub_id(path: str) -> bool:
    """Whether a path that is not there may be the id of a data set."""
    return 0 < len(path.split()) < 2 and path.count("/") <= 1 and path[0] not in "./~" and not Path(path).suffix


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


def load_hub(path: str, subset: str | None, key: str = "data.path") -> Any:
    """The splits of a data set of the hub, or of a local data set folder; `key` is the config's, for the message.

    Raises:
        UserError: if it cannot be loaded.
    """
    import datasets

    folder = Path(path).expanduser()
    if (held := table_in(path, key)) is not None:
        raise UserError(
            f"{key}: {held.rows} examples in memory are no data set of the hub; give them as data.name=table"
        )
    if folder.is_dir():
        _check_holds_data(path, key)
        # The loader's cache goes by a folder's name. What another folder of that name held, or this one before it was
        # changed, is found in it, so there is a new one for each call.
        with _loading(path, key), tempfile.TemporaryDirectory(prefix="fedsim-") as cache:
            return datasets.load_dataset(str(folder.resolve()), subset, cache_dir=cache, keep_in_memory=True)
    if folder.exists() or not looks_like_hub_id(path):
        problem = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{key}: {path!r} {problem}; give a data set folder or a hub id, or a file as data.name=table")
    with _loading(path, key):
        data = datasets.load_dataset(path, subset)
    caches = {Path(held["filename"]).parent.name for rows in data.values() for held in rows.cache_files}
    # Without the hub the loader takes what its cache has by that name, and a folder's rows are in it under the bare name.
    # A data set of the hub lies under its commit.
    if "/" not in path and not all(re.fullmatch(r"[0-9a-f]{40}", name) for name in caches):
        way = "check the path, or the id and the network"
        raise UserError(
            f"{key}: {path!r} is no folder, and not known from the hub (a folder of that name was once read); {way}"
        )
    return data


@contextlib.contextmanager
def _loading(path: str, key: str) -> Iterator[None]:
    """Keep the loader's bars, log lines and warnings off the terminal; its errors are one line.

    Raises:
        UserError: for any error of the block.
    """
    import logging

    import datasets
    from huggingface_hub import utils as hub_utils

    said: list[str] = []
    listener = logging.Handler(logging.ERROR)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before = [(log.handlers, log.propagate) for log in loggers]
    bars = [(u, u.are_progress_bars_disabled()) for u in (datasets.utils, hub_utils)]
    for log in loggers:
        log.handlers, log.propagate = [listener], False
    for utils, _ in bars:
        utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # transport, format and script errors of many kinds; to the user each means the same
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # The file and the row are in what the loader logs; what it raises says only that something was wrong.
        text = next((t for t in reversed(said) if "Failed" in t), None) or f"{type(cause).__name__}: {cause}"
        text = " ".join(
            re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", text).replace("Error tokenizing data. C error: ", "").split()
        )
        way = "check the files" if Path(path).expanduser().is_dir() else "check the id, the subset and the network"
        raise UserError(f"{key}: {path!r} could not be loaded as a data set ({text[:300]}); {way}") from None
    finally:
        for log, (handlers, propagate) in zip(loggers, before, strict=True):
            log.handlers, log.propagate = handlers, propagate
        for utils, disabled in bars:
            if not disabled:
                utils.enable_progress_bars()


_DATA_FILES = {
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".ndjson",
    ".parquet",
    ".arrow",
    ".txt",
    ".xml",
    ".h5",
    ".hdf5",
    ".lance",
}
_DATA_FILES |= {".eval", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar"}
_LOOKED_AT = 20_000  # names in a folder that may hold a data set; looking at more takes seconds


def _check_holds_data(path: str, key: str) -> None:
    """Refuse a folder in which the loader would look for data for minutes, as a home folder.

    The loader takes every file below it into account. Here names are looked at, those nearest to the top first, until one is
    a data file's.

    Raises:
        UserError: if there is none, or none among the first so many.
    """
    seen, level = 0, [path]
    while level and seen < _LOOKED_AT:
        below: list[str] = []
        for folder in level:
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in itertools.islice(entries, _LOOKED_AT - seen):
                    seen += 1
                    if entry.name.startswith((".", "_")):
                        continue  # the loader leaves these out
                    if entry.is_dir():
                        below.append(entry.path)
                    elif Path(entry.name).suffix.lower() in _DATA_FILES or (
                        folder == path and entry.name == "README.md"
                    ):
                        return
        level = below
    where = "" if seen < _LOOKED_AT else f" among its first {_LOOKED_AT:,} names"
    raise UserError(
        f"{key}: {path!r} is a folder without a data file{where}; give one with .csv, .json, .jsonl, .parquet or .txt files, or a hub id"
    )


def missing(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or (isinstance(value, float) and np.isnan(value))


def _from_frames(
    frames: dict[str, Table],
    fractions: dict[str, float],
    seed: int,
    labels: list[str] | dict[str, str] | None,
    columns: dict[str, str],
    needs_labels: bool | None,
    path: str,
    files: dict[str, str] | None = None,
) -> Source:
    """Splits of the frames; `files` says of which file each is, where there are any."""
    files = files or {}
    column = columns.get("label", "label")
    for role, name in columns.items():
        if name not in frames["train"].columns:
            raise UserError(
                f"data.columns.{role}: {name!r} is no column of {path!r}, which has: {nearest_first(name, frames['train'].columns)}{header_hint(path)}"
            )
    has_labels = column in frames["train"].columns and (needs_labels is not False or labels is not None)
    if needs_labels and not has_labels:
        raise UserError(
            f"data.columns.label: {column!r} is no column of {path!r}, which has: {nearest_first(column, frames['train'].columns)}{header_hint(path)}; give the label's as data.columns={{label: COLUMN}}"
        )
    words = None
    classes: dict[str, np.ndarray] = {}
    if has_labels:
        train, known = frames["train"], labels
        if labels is None:
            known = train.classes.get(column) or _words(train.values[column], path)
        words = list(dict.fromkeys(known.values())) if isinstance(known, dict) else known
        classes = {name: _classes(frame, column, known, name, files.get(name, "")) for name, frame in frames.items()}
    picked = {name: np.arange(len(frame)) for name, frame in frames.items()}
    if fractions:
        cut = _hold_out(len(frames["train"]), classes.get("train"), fractions, seed)
        for name, rows in cut.items():
            frames[name], picked[name] = frames["train"], rows
            if has_labels:
                classes[name] = classes["train"]
    splits = {}
    for name in SPLITS:
        rows = picked[name]
        if len(rows) == 0 and name != "test":
            raise UserError(
                f"data.{name if name != 'train' else 'path'}: the {name} split of {path!r} is left without a row; it has {len(frames['train'])} in all; add rows, or hold out fewer"
            )
        held = classes[name][rows] if has_labels else None
        part = {c: [v[row] for row in rows.tolist()] for c, v in frames[name].values.items()}
        splits[name] = Split(part, held, files.get(name, ""), rows + 1)
    names = set(frames["train"].columns) | set(columns)
    template = text = None
    if {"text", "label"} <= names:
        template, text = "{text} label: {label}", "{text}"
    elif {"sentence", "label"} <= names:
        template, text = "{sentence} label: {label}", "{sentence}"
    elif {"instruction", "response"} <= names:
        template = "{instruction}\n{response}"
    return Source(splits, words, template, text)


def _words(values: list[Any], path: str) -> list[str]:
    words = sorted({_word(v, row, path) for row, v in enumerate(values) if not missing(v)} - {""})
    if len(words) < 2:
        raise UserError(
            f"data.columns.label: the label column of {path!r} holds {len(words)} different value(s){f', {words[0]!r}' if words else ''}; classification needs two or more: name the right column, or list data.labels"
        )
    if len(words) > 1000:
        raise UserError(
            f"data.columns.label: the label column of {path!r} holds {len(words)} different values; name the right column, or list data.labels"
        )
    return words


def _word(value: Any, row: int, of: str) -> str:
    if isinstance(value, (dict, list, tuple, bytes, np.ndarray)) or (
        isinstance(value, str) and ("\0" in value or not sound(value))
    ):
        problem = f"row {row + 1} of {of!r} has {str(value)[:60]!r}, which is no label"
        raise UserError(f"data.columns.label: {problem}; write a word or a whole number")
    # A column of whole numbers with a gap in it comes back as floats: 1.0 means 1.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _classes(frame: Table, column: str, labels: list[str] | dict[str, str], split: str, file: str) -> np.ndarray:
    """Class of each row; `labels` are the words in order, or what the file holds -> word."""
    of = repr(file) if file else split
    if column not in frame.columns:
        raise UserError(
            f"data.columns.label: {column!r} is no column of {of}, which has: {nearest_first(column, frame.columns)}{header_hint(file)}; the {split} rows need it too"
        )
    mapped = isinstance(labels, dict)
    words = list(dict.fromkeys(labels.values())) if mapped else labels
    number = {w: i for i, w in enumerate(words)}
    index = {held: number[w] for held, w in labels.items()} if mapped else number
    values = [None if missing(v) else _word(v, i, file or split) or None for i, v in enumerate(frame.values[column])]
    numbered = all(v is not None and v.isdecimal() and len(v) < 10 for v in values)
    counted = numbered and not mapped and not any(v in index for v in values)
    if counted:
        index |= {v: int(v) for v in set(values) if int(v) < len(words)}
    out = np.empty(len(values), dtype=np.int64)
    for i, value in enumerate(values):
        if value not in index:
            shown = "empty" if value is None else repr(value)
            way = "put the row right, or list all labels"
            if value is not None and value.isdecimal() and not mapped:
                count = f"numbers count data.labels from 0, so {len(words)} labels are 0 to {len(words) - 1}"
                way = f"{count}; where the file counts otherwise, map what it holds: labels={{{value}: WORD, ...}}"
            raise UserError(
                f"data.columns.label: row {i + 1} of {of} has the label {shown}; data.labels has: {nearest_first(value or '', labels)}; {way}"
            )
        out[i] = index[value]
    if counted and split == "train" and "0" not in values:
        way = "where the file counts from 1, map what it holds: labels={1: WORD, ...}"
        said = f"data.labels: numbers count them from 0, and no row of {of} has 0 ({words[0]}); {way}"
        warnings.warn(said, Notice, stacklevel=2)
    return out


def _hold_out(n: int, classes: np.ndarray | None, fractions: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Rows of train and of each held-out split, ascending; classes are spread alike over the splits."""
    from fedsim.core.seeding import stream

    rng = stream(seed, "hold out")
    order = rng.permutation(n)
    if classes is not None:
        # Sorting a shuffled order by its rank inside the class, relative to the class's size, interleaves the classes.
        rank = np.empty(n)
        for c in np.unique(classes):
            own = order[classes[order] == c]
            rank[own] = (np.arange(len(own)) + rng.random()) / len(own)
        order = order[np.argsort(rank[order], kind="stable")]
    out, start = {}, 0
    for name, fraction in fractions.items():
        size = max(1, round(fraction * n)) if fraction > 0 else 0
        out[name] = np.sort(order[start : start + size])
        start += size
    out["train"] = np.sort(order[start:])
    return out
