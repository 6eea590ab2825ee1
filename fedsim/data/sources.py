"""Where rows come from: the PhraseBank file, a table of the user's, a hub data set, or the embedded headlines.

Every source gives three splits of named text columns. A classification source also gives the class of each row. Instruction
data has a file of its own, `instructions.py`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.errors import UserError

SPLITS = ("train", "validation", "test")
_SENTIMENT = ["negative", "neutral", "positive"]
_CAUSAL = "{sentence} sentiment: {label}"


@dataclass
class Split:
    """n rows.

    Attributes:
        columns: name -> n values, as the file gives them.
        labels: class of each row, int64 `[n]`, or None.
    """

    columns: dict[str, list[Any]]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def texts(self, fields: Sequence[str], rename: dict[str, str], words: list[str] | None) -> list[dict[str, str]]:
        """The template's fields of each row as text; the label as its word.

        Raises:
            UserError: if a field is no column.
        """
        values = {}
        for name in fields:
            if name == "label" and words is not None and self.labels is not None:
                values[name] = [words[c] for c in self.labels]
                continue
            column = rename.get(name, name)
            if column not in self.columns:
                raise UserError(
                    f"data.template: {{{name}}} is no column; the data has: {', '.join(self.columns)} (map names by data.columns={{{name}: COLUMN}})"
                )
            values[name] = ["" if missing(v) else str(v) for v in self.columns[column]]
        return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


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
    file = Path(path).expanduser()
    if file.is_file():
        rows = _read_phrasebank(file)
    elif looks_like_hub_id(path):
        rows = _hub_phrasebank(path)
    else:
        way = "Sentences_AllAgree.txt is in the Financial PhraseBank v1.0 of its authors; or give a hub id"
        raise UserError(f"data.path: {path!r} does not exist; {way}")
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
    labels: list[str] | None,
    columns: dict[str, str],
    needs_labels: bool | None,
) -> Source:
    """A CSV, TSV, JSON, JSONL or Parquet file of the user's.

    Args:
        path: the file.
        validation, test: files of their own, or fractions of `path`.
        split_seed: of the shuffle before fractions are cut off; rows of one class are spread over the splits alike.
        labels: label words in order, or None for the sorted values of the label column.
        columns: template field -> column; `label` names the label column.
        needs_labels: whether rows must have a class; None = they have one where the label column is there.

    Raises:
        UserError: for a missing or unreadable file, an unknown label, or splits left empty.
    """
    frames = {"train": read_table(path, "data.path")}
    fractions = {}
    for name, value in (("validation", validation), ("test", test)):
        if isinstance(value, str):
            frames[name] = read_table(value, f"data.{name}")
        else:
            fractions[name] = value
    return _from_frames(frames, fractions, split_seed, labels, columns, needs_labels, path)


def hub(
    *,
    path: str,
    subset: str | None,
    train: str,
    validation: str | float,
    test: str | float,
    split_seed: int,
    labels: list[str] | None,
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
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.ClassLabel):
                named = [feature.int2str(v) if v >= 0 else None for v in rows[column]]
                rows = rows.remove_columns(column).add_column(column, named)
                if column == columns.get("label", "label") and labels is None:
                    labels = list(feature.names)
        frames[split] = rows.to_pandas()
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
    return path.count("/") <= 1 and not path.startswith((".", "/", "~")) and not Path(path).suffix


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

    try:
        return datasets.load_dataset(path, subset)
    except Exception as error:  # transport, format and script errors of many kinds; to the user each means the same
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {path!r} could not be loaded as a data set ({type(error).__name__}: {text}); check the id, the subset and the network"
        ) from None


def read_table(path: str, key: str) -> Any:
    """A CSV, TSV, JSON, JSONL or Parquet file as a DataFrame; `key` is the config's, for messages.

    Raises:
        UserError: for a missing, unreadable or empty file, or one that is not UTF-8.
    """
    import pandas as pd

    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: {path!r} does not exist; give a .csv, .tsv, .json, .jsonl or .parquet file")
    kind = file.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            separator = "," if kind == ".csv" else "\t"
            frame = _read_delimited(file, separator)
            if not isinstance(frame.index, pd.RangeIndex):
                raise UserError(
                    f"{key}: {path!r} has rows with more fields than its header; quote text that holds {separator!r}"
                )
            _no_repeated_columns(file, separator, key)
        elif kind in (".jsonl", ".ndjson"):
            lines = file.read_text(encoding="utf-8-sig").split("\n")
            frame = _frame([json.loads(line) for line in lines if line.strip()])
        elif kind == ".json":
            frame = _frame(json.loads(file.read_text(encoding="utf-8-sig")))
        elif kind == ".parquet":
            import pyarrow.parquet

            frame = _frame(pyarrow.parquet.read_table(file).to_pylist())
        else:
            raise UserError(
                f"{key}: {path!r} ends in {kind or 'nothing'}; give a .csv, .tsv, .json, .jsonl or .parquet file"
            )
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (ValueError, OSError, KeyError) as error:  # pandas' and Arrow's parse errors are ValueErrors
        raise UserError(
            f"{key}: {path!r} could not be read as {kind[1:]} ({' '.join(str(error).split())[:160]})"
        ) from None
    if len(frame) == 0:
        raise UserError(f"{key}: {path!r} has no rows")
    frame.columns = [str(c) for c in frame.columns]
    return frame


def _read_delimited(file: Path, separator: str) -> Any:
    """A CSV or TSV file as text: "007", "1.50" and "True" are answers as they stand.

    Many TSV files do not quote: a lone quotation mark is text in them, and reading it as an opening quote would swallow
    the rows up to the next one. Where a file read without quoting has more rows, and each is complete, it was such a file.
    """
    import csv

    import pandas as pd

    def read(quoting: int) -> Any:
        return pd.read_csv(
            file, sep=separator, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig", quoting=quoting
        )

    if separator == ",":
        return read(csv.QUOTE_MINIMAL)
    try:
        plain = read(csv.QUOTE_NONE)
    except pd.errors.ParserError:
        return read(csv.QUOTE_MINIMAL)
    try:
        quoted = read(csv.QUOTE_MINIMAL)
    except pd.errors.ParserError:
        return plain
    complete = isinstance(plain.index, pd.RangeIndex) and bool(plain.iloc[:, -1].notna().all())
    return plain if complete and len(plain) > len(quoted) else quoted


def _frame(records: Any) -> Any:
    """Records as a DataFrame of the values as they are: a missing value turns no whole number into a float."""
    import pandas as pd

    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise ValueError("expected a list of objects, one a row")
    return pd.DataFrame(records, dtype=object)


def _no_repeated_columns(file: Path, separator: str, key: str) -> None:
    import csv

    with file.open(encoding="utf-8-sig", newline="") as handle:
        names = next(csv.reader(handle, delimiter=separator), [])
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise UserError(f"{key}: {str(file)!r} has the column {repeated[0]!r} twice; rename one")


def missing(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or (isinstance(value, float) and np.isnan(value))


def _from_frames(
    frames: dict[str, Any],
    fractions: dict[str, float],
    seed: int,
    labels: list[str] | None,
    columns: dict[str, str],
    needs_labels: bool | None,
    path: str,
) -> Source:
    column = columns.get("label", "label")
    for role, name in columns.items():
        if name not in frames["train"].columns:
            raise UserError(
                f"data.columns.{role}: {name!r} is no column of {path!r}, which has: {', '.join(frames['train'].columns)}"
            )
    has_labels = column in frames["train"].columns and (needs_labels is not False or labels is not None)
    if needs_labels and not has_labels:
        raise UserError(
            f"data.columns.label: {column!r} is no column of {path!r}, which has: {', '.join(frames['train'].columns)}"
        )
    words = None
    classes: dict[str, np.ndarray] = {}
    if has_labels:
        words = labels if labels is not None else _words(frames["train"][column], path)
        classes = {name: _classes(frame, column, words, name) for name, frame in frames.items()}
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
                f"data.{name if name != 'train' else 'path'}: the {name} split of {path!r} is left without a row; it has {len(frames['train'])} in all"
            )
        part = frames[name].iloc[rows]
        splits[name] = Split({c: part[c].tolist() for c in part.columns}, classes[name][rows] if has_labels else None)
    names = set(frames["train"].columns) | set(columns)
    template = text = None
    if {"text", "label"} <= names:
        template, text = "{text} label: {label}", "{text}"
    elif {"sentence", "label"} <= names:
        template, text = "{sentence} label: {label}", "{sentence}"
    elif {"instruction", "response"} <= names:
        template = "{instruction}\n{response}"
    return Source(splits, words, template, text)


def _words(values: Any, path: str) -> list[str]:
    words = sorted({_word(v) for v in values.tolist() if not missing(v)})
    if len(words) < 2:
        raise UserError(
            f"data.columns.label: the label column of {path!r} holds {len(words)} different value(s); classification needs two or more"
        )
    if len(words) > 1000:
        raise UserError(
            f"data.columns.label: the label column of {path!r} holds {len(words)} different values; name the right column, or list data.labels"
        )
    return words


def _word(value: Any) -> str:
    # A column of whole numbers with a gap in it comes back as floats: 1.0 means 1.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _classes(frame: Any, column: str, words: list[str], split: str) -> np.ndarray:
    if column not in frame.columns:
        raise UserError(
            f"data.columns.label: {column!r} is no column of the {split} file, which has: {', '.join(frame.columns)}"
        )
    index = {w: i for i, w in enumerate(words)}
    values = [None if missing(v) else _word(v) for v in frame[column].tolist()]
    by_number = not any(v in index for v in values) and all(v is not None and v.isdigit() for v in values)
    out = np.empty(len(values), dtype=np.int64)
    for i, value in enumerate(values):
        if by_number and int(value) < len(words):
            out[i] = int(value)
        elif value not in index:
            shown = "empty" if value is None else repr(value)
            raise UserError(
                f"data.columns.label: row {i} of {split} has the label {shown}; data.labels has: {', '.join(words)}"
            )
        else:
            out[i] = index[value]
    return out


def _hold_out(n: int, classes: np.ndarray | None, fractions: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Rows of train and of each held-out split, ascending; classes are spread alike over the splits."""
    from fedsim.seeding import stream

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
