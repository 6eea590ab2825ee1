"""Examples as columns of values, and those that a script hands over in Python instead of a file: DataFrames and data sets."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fedsim.core.errors import UserError

_MARK = "in memory: "


@dataclass
class Table:
    """Columns of n values: Python's own, so that reading a file does not need pandas in memory.

    Attributes:
        values: column -> n values; what an example lacks is NaN.
        rows: n.
        classes: column -> names of its classes in order, where the data set says so.
    """

    values: dict[str, list[Any]]
    rows: int
    classes: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, frame: Any) -> Table:
        """What a DataFrame holds."""
        return cls({str(c): frame[c].tolist() for c in frame.columns}, len(frame))

    @classmethod
    def of_records(cls, records: list[dict[str, Any]]) -> Table:
        """Records as columns, in the order in which they first come, of the values as they are."""
        names = dict.fromkeys(str(name) for record in records for name in record)
        return cls({n: [record.get(n, math.nan) for record in records] for n in names}, len(records))

    @property
    def columns(self) -> list[str]:
        """Their names, in order."""
        return list(self.values)

    def __len__(self) -> int:
        return self.rows

    def records(self) -> list[dict[str, Any]]:
        """One dict per example."""
        return [dict(zip(self.values, row, strict=True)) for row in zip(*self.values.values(), strict=True)]


class InMemory(str):
    """Examples in the place of a file's path. As text, which is what `config.yaml` holds, it says how many and which.

    Attributes:
        table: the examples.
    """

    table: Table

    def __new__(cls, table: Table) -> InMemory:
        digest = hashlib.sha256(repr((sorted(table.values.items()), table.classes)).encode("utf-8", "surrogatepass"))
        held = super().__new__(cls, f"{_MARK}{len(table):,} examples, sha256 {digest.hexdigest()[:16]}")
        held.table = table
        return held

    def __reduce__(self) -> tuple[Any, ...]:
        return InMemory, (self.table,)

    def __deepcopy__(self, memo: dict[int, Any]) -> InMemory:
        return self


def table_in(path: str, key: str) -> Table | None:
    """The examples where a path stands for some in memory; None for the path of a file.

    Raises:
        UserError: for the text of such a path from a `config.yaml`: the examples are gone with the script.
    """
    if isinstance(path, InMemory):
        return path.table
    if path.startswith(_MARK):
        way = "run that script again, with the same examples, or write them to a file and give its path"
        raise UserError(f"{key}: the examples were given in Python ({path.removeprefix(_MARK)}); {way}")
    return None


def hold(data: Any) -> Any:
    """A `data` section in which every DataFrame and data set is an `InMemory`, whatever key it stands at.

    Examples alone are the whole section. `{"data": ...}` of a table is another name for its `path`. Of a `DatasetDict` the
    splits of the names train, validation and test are taken; `validation` and `test` may name others.

    Raises:
        UserError: where there is no example, for a column twice, or a `DatasetDict` without such a split.
    """
    if _is_rows(data) or _is_splits(data):
        data = {"name": "table", "path": data}
    if not isinstance(data, dict):
        return data
    data = dict(data)
    if "data" in data and "path" not in data and (_is_rows(data["data"]) or _is_splits(data["data"])):
        data["path"] = data.pop("data")
    if _is_splits(data.get("path")):
        splits, data["path"] = data["path"], data.get("train", "train")
        data.pop("train", None)
        for key in ("path", "validation", "test"):
            name = data.get(key, key)
            named = isinstance(name, str)
            if named and name in splits:
                data[key] = splits[name]
            elif key in data and named:
                raise UserError(f"data.{key}: no split {name!r} in the DatasetDict; it has: {', '.join(splits)}")
            elif key in splits:
                data[key] = splits[key]
    return _held(data, "data")


def _held(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {k: _held(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_held(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if _is_rows(value):
        try:
            return InMemory(table_of(value, key))
        except RecursionError:
            raise UserError(
                f"{key}: a cell of the {type(value).__name__} is nested too deep; give flat columns"
            ) from None
    if type(value).__module__.split(".")[0] in ("pandas", "datasets", "polars", "pyarrow"):
        kind = type(value).__name__
        raise UserError(f"{key}: a {kind} cannot be read; give a pandas DataFrame, a datasets.Dataset or a DatasetDict")
    return value


def _is_rows(value: Any) -> bool:
    """Whether it is a pandas DataFrame or a `datasets.Dataset`; neither library is imported to tell."""
    names = {(t.__module__.split(".")[0], t.__name__) for t in type(value).__mro__}
    return bool(names & {("pandas", "DataFrame"), ("datasets", "Dataset")})


def _is_splits(value: Any) -> bool:
    """Whether it is a `datasets.DatasetDict`, or a plain dict of examples."""
    return isinstance(value, dict) and bool(value) and all(map(_is_rows, value.values()))


def table_of(rows: Any, key: str) -> Table:
    """Examples given in Python as a table: a DataFrame, a data set, a list of records or a mapping of columns.

    Raises:
        UserError: for anything else, no example, or columns of different length or with one name.
    """
    records = isinstance(rows, list) and all(isinstance(record, dict) for record in rows)
    columns = isinstance(rows, dict) and all(hasattr(column, "__len__") for column in rows.values())
    if not (records or columns or _is_rows(rows)):
        way = "give a DataFrame, a datasets.Dataset, a list of records or a mapping of columns"
        raise UserError(f"{key}: {type(rows).__name__} holds no examples; {way}")
    sizes = {len(column) for column in rows.values()} if columns else {len(rows)}
    if len(sizes) > 1:
        raise UserError(f"{key}: columns have different lengths, {', '.join(map(str, sorted(sizes)))}")
    if not any(sizes):
        raise UserError(f"{key}: the {type(rows).__name__} has no rows")
    if records:
        return Table.of_records(rows)
    if columns:
        return Table({str(name): [_own(v) for v in column] for name, column in rows.items()}, sizes.pop())
    if hasattr(rows, "column_names"):
        return of_dataset(rows)
    names = [str(c) for c in rows.columns]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"{key}: the DataFrame has the column {twice!r} twice; rename one")
    columns = (rows.iloc[:, i] for i in range(len(names)))
    # pandas has several values for a cell that holds nothing (None, NaN, NA, NaT); here it is one.
    values = [
        [math.nan if empty else _own(v) for v, empty in zip(c.tolist(), c.isna().tolist(), strict=True)]
        for c in columns
    ]
    return Table(dict(zip(names, values, strict=True)), len(rows))


def _own(value: Any) -> Any:
    """A cell as Python's own value: pandas keeps lists of Parquet files as arrays."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_own(v) for v in value] if isinstance(value, list) else value


def of_dataset(rows: Any, columns: Iterable[str] | None = None) -> Table:
    """What a `datasets.Dataset` holds, the names of classes in the place of their numbers."""
    from datasets import ClassLabel

    rows = rows.with_format(None)
    values, classes = {}, {}
    for name in rows.column_names if columns is None else columns:
        values[name], feature = list(rows[name]), rows.features[name]
        if isinstance(feature, ClassLabel):
            classes[name] = [n.strip() for n in feature.names]
            values[name] = [None if v is None or v < 0 else classes[name][v] for v in values[name]]
    return Table(values, len(rows), classes)
