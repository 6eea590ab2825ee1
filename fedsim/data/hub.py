"""Data sets that `datasets.load_dataset` opens: of the hub, or local folders."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsim.core.errors import UserError
from fedsim.data.memory import Table, of_dataset, table_in

_DATA_FILES = {
    f".{end}"
    for end in [
        "csv",
        "tsv",
        "json",
        "jsonl",
        "ndjson",
        "parquet",
        "arrow",
        "txt",
        "xml",
        "h5",
        "hdf5",
        "lance",
        "eval",
        "zip",
        "tar",
        "gz",
        "tgz",
        "bz2",
        "xz",
        "zst",
        "lz4",
        "7z",
        "rar",
    ]
}
_LOOKED_AT = 20_000  # names in a folder that may hold a data set; looking at more takes seconds


def looks_like_hub_id(path: str) -> bool:
    """Whether a path that is not there may be the id of a data set."""
    return 0 < len(path.split()) < 2 and path.count("/") <= 1 and path[0] not in "./~" and not Path(path).suffix


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


def table_of_split(rows: Any, path: str) -> Table:
    """A split of a data set, the names of classes in the place of their numbers.

    Raises:
        UserError: if it cannot be read.
    """
    import datasets

    with _loading(path, "data.path"):
        plain = Table.of(rows.to_pandas())
        named = of_dataset(rows, [c for c, f in rows.features.items() if isinstance(f, datasets.ClassLabel)])
    return Table({**plain.values, **named.values}, len(rows), named.classes)
