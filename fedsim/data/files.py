"""Files of a user's own: CSV, TSV and other separated text by pandas, JSON, JSON lines, Parquet."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import model_validator

from fedsim.core.errors import UserError
from fedsim.core.section import section, wrong
from fedsim.data.memory import InMemory, Table, table_in

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_KINDS = (*_SEPARATORS, ".json", ".jsonl", ".ndjson", ".parquet")


@section
class Form:
    """How a text file is written, where it is not a CSV or TSV file in UTF-8 whose first line names the columns."""

    header: bool | None = None
    """Whether the first line of a CSV or TSV file names its columns; null = it does, unless `names` are given. Without either the columns are 0, 1, 2, ..."""
    names: list[str] | None = None
    """Names of the columns in order, in the place of the file's own."""
    delimiter: str | None = None
    """Character between cells; null = a comma in .csv files, a tab in .tsv files. With one, a text file may have any ending."""
    encoding: str | None = None
    """Of text files, e.g. latin-1, cp1252 or utf-16; null = UTF-8."""

    @model_validator(mode="after")
    def _check_form(self) -> Form:
        names, mark = self.names, self.delimiter
        if names is not None and (not names or len(set(names)) < len(names) or not all(n.strip() for n in names)):
            raise wrong("names", names, "is not one name per column, each another; name all columns in order")
        if mark is not None and (len(mark) != 1 or mark in '"\r\n') and mark != "\\t":
            raise wrong("delimiter", mark, 'is not one character; give ; or | or another, or "\\t" for a tab')
        try:
            text = self.encoding is None or codecs.lookup(self.encoding)._is_text_encoding
        except (LookupError, ValueError):
            text = False
        if not text:
            way = "is not known; give utf-8, latin-1, cp1252, utf-16 or another of Python's"
            raise wrong("encoding", self.encoding, way)
        return self

    def separator(self, kind: str) -> str | None:
        """Between cells of a file with this ending; None = it is no separated text."""
        given = None if self.delimiter is None else self.delimiter.replace("\\t", "\t")
        return _SEPARATORS.get(kind) if given is None or kind in _KINDS[2:] else given

    @property
    def codec(self) -> str:
        """The encoding; a byte order mark is never part of the text."""
        name = self.encoding or "utf-8"
        return "utf-8-sig" if codecs.lookup(name).name == "utf-8" else name


def header_hint(path: str | None) -> str:
    """What may be wrong where a column is not in a file: text without a header has its first row for one."""
    text = path and Path(path).suffix and Path(path).suffix.lower() not in _KINDS[2:] and not isinstance(path, InMemory)
    return " (does the first line name the columns? if not, give their names)" if text else ""


def read_table(path: str, key: str, form: Form | None = None) -> Table:
    """A CSV, TSV, JSON, JSONL or Parquet file, or examples in memory; `key` is the config's, for messages.

    Raises:
        UserError: for a missing, unreadable or empty file, or one in another encoding or form.
    """
    form = form or Form()
    if (held := table_in(path, key)) is not None:
        if form != Form():
            raise UserError(
                f"{key}: header, names, delimiter and encoding have no use for examples in memory; leave them out"
            )
        return held
    file = Path(path).expanduser()
    kind = file.suffix.lower()
    separator = form.separator(kind)
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"{key}: {path!r} {problem}; give a .csv, .tsv, .json, .jsonl or .parquet file")
    if separator is None and kind not in _KINDS:
        way = "give a .csv, .tsv, .json, .jsonl or .parquet file, or the delimiter of a text file"
        raise UserError(f"{key}: {path!r} ends in {kind or 'nothing'}; {way}")
    if file.stat().st_size == 0:
        raise UserError(f"{key}: {path!r} is empty; give a file with rows")
    try:
        if separator is not None:
            held = _read_delimited(file, separator, key, form)
        elif kind == ".parquet":
            import pyarrow.parquet

            arrow = pyarrow.parquet.ParquetFile(file).read()
            _refuse_twice(arrow.column_names, str(file), key)
            held = _table(arrow.to_pylist())
        elif kind == ".json":
            held = _table(json.loads(file.read_text(encoding=form.codec), object_pairs_hook=_object))
        else:
            lines = file.read_text(encoding=form.codec).split("\n")
            held = _table([_json_line(text, i) for i, text in enumerate(lines, 1) if text.strip()])
    except (UserError, MemoryError):
        raise
    except UnicodeError as error:
        at = (
            f" (byte {error.start}{_line_of(file, error, form.codec)})" if isinstance(error, UnicodeDecodeError) else ""
        )
        said = form.encoding or "UTF-8"
        with file.open("rb") as handle:
            marked = handle.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        way = f"give its encoding, e.g. encoding: {'utf-16' if marked else 'latin-1'}, or save it as UTF-8"
        raise UserError(f"{key}: {path!r} is not {said}{at}; {way}") from None
    except RecursionError:
        raise UserError(f"{key}: {path!r} is nested too deep; give a list of objects, one a row") from None
    except Exception as error:  # pandas' and Arrow's are of a dozen kinds; each means that the file is not what it says
        why = " ".join(str(error).replace("Error tokenizing data. C error: ", "").split())[:200]
        way = "quote cells that hold separators or line ends" if separator is not None else "write the file anew"
        raise UserError(f"{key}: {path!r} could not be read as {kind[1:] or 'text'} ({why}); {way}") from None
    if len(held) == 0:
        raise UserError(f"{key}: {path!r} has no rows; give a file with rows")
    return held


def _line_of(file: Path, error: UnicodeDecodeError, codec: str) -> str:
    """In which line the byte lies that cannot be read; where pandas reads in pieces, it counts from the piece's start."""
    raw = file.read_bytes()
    try:
        raw.decode(codec)
    except UnicodeDecodeError as found:
        error = found
    return f", line {raw.count(10, 0, error.start) + 1}"


def _json_line(text: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"line {number} is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"line {number} holds {text.strip()[:40]!r}, no object {{column: value}}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is there twice no reader can tell which value is meant."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice in one object")
    return out


def _read_delimited(file: Path, separator: str, key: str, form: Form) -> Table:
    """Separated text, each cell as it is written: "007", "1.50" and "True" are answers as they stand.

    Many TSV files do not quote: a lone quotation mark is text in them, and reading it as an opening quote would swallow
    the rows up to the next one. Where a file read without quoting has more rows, and each is complete, it was such a file.
    """
    import pandas as pd  # 60 MB of memory, with Arrow: only where it reads the file

    names, header = form.names, form.names is None if form.header is None else form.header
    first = _first_line(file, form.codec)
    other = (
        next((c for c in ",;\t|" if c in first), None) if form.delimiter is None and separator not in first else None
    )
    if other is not None:
        way = f"give its delimiter, {other!r}, or {separator!r} if that is text"
        raise UserError(f"{key}: {str(file)!r} has {other!r} between its cells, not {separator!r}; {way}")

    def read(quoting: int) -> Any:
        keys = {"dtype": str, "keep_default_na": False, "na_values": [""], "encoding": form.codec, "quoting": quoting}
        if not separator.isascii():  # pandas' C parser splits at one byte
            keys["engine"] = "python"
        return pd.read_csv(file, sep=separator, header=0 if header else None, names=names, **keys)

    frame = None
    if separator == "\t":
        with contextlib.suppress(pd.errors.ParserError):
            frame = read(csv.QUOTE_NONE)
    if frame is None:
        frame = read(csv.QUOTE_MINIMAL)
    elif separator == "\t":
        with contextlib.suppress(pd.errors.ParserError):
            quoted = read(csv.QUOTE_MINIMAL)
            complete = isinstance(frame.index, pd.RangeIndex) and bool(frame.iloc[:, -1].notna().all())
            frame = frame if complete and len(frame) > len(quoted) else quoted
    if not isinstance(frame.index, pd.RangeIndex):
        have = "its header" if names is None else f"names ({len(names)})"
        raise UserError(
            f"{key}: {str(file)!r} has rows with more fields than {have}; quote text that holds {separator!r}, or name all columns"
        )
    _check_delimited(file, separator, key, frame, form.codec, header, names)
    return Table.of(frame)


def _first_line(file: Path, codec: str) -> str:
    with file.open(encoding=codec) as handle:
        return next((line for line in handle if line.strip()), "")


def _table(records: Any) -> Table:
    if not isinstance(records, list):
        raise ValueError("expected a list of objects, one a row")
    odd = next((i for i, r in enumerate(records, 1) if not isinstance(r, dict)), None)
    if odd is not None:
        raise ValueError(f"expected a list of objects, one a row, but row {odd} is {str(records[odd - 1])[:40]!r}")
    return Table.of_records(records)


def _check_delimited(
    file: Path, separator: str, key: str, frame: Any, codec: str, header: bool, names: list[str] | None
) -> None:
    """Refuse what pandas mends without a word: a column's name that is there twice, rows with fewer cells than others."""
    text = file.read_text(encoding=codec)
    if (at := text.find("\0")) >= 0:  # where pandas would end the cell
        line = text.count("\n", 0, at) + 1
        raise UserError(f"{key}: {str(file)!r} has a zero byte in line {line}, so it is no text file; save it as UTF-8")
    del text
    width = len(frame.columns)
    with file.open(encoding=codec, newline="") as handle, _long_cells():
        reader = csv.reader(handle, delimiter=separator)
        if header:
            own = next((row for row in reader if row), [])
            if names is None:
                _refuse_twice(own, str(file), key)
        # Only where a row's last cell is empty can it be short; the file is then read a second time to find the line.
        if separator == "\t" or width < 2 or not bool(frame.iloc[:, -1].isna().any()):
            return
        for row in reader:
            if 0 < len(row) < width and any(cell.strip() for cell in row):
                problem = f"line {reader.line_num} has {len(row)} cell(s), the {'header has' if names is None else 'names are'} {width}"
                raise UserError(f"{key}: {str(file)!r}: {problem}; add the missing separators, or quote the text")


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Let Python's reader take cells as long as pandas does: whole documents."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _refuse_twice(names: list[str], file: str, key: str) -> None:
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise UserError(f"{key}: {file!r} has the column {repeated[0]!r} twice; rename one")
