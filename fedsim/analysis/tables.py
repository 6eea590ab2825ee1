"""One table writer: aligned text for a terminal, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedsim.analysis.configs import as_number, say
from fedsim.core.errors import visible

# Control characters, those that turn the direction of writing, and halves of pairs that no file can hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """A table of text; `numbers` are the columns aligned right, `strong` the cells (row, column) in bold."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[int] = frozenset()
    strong: Collection[tuple[int, int]] = frozenset()

    def text(self) -> str:
        """Lines for a terminal: whole words and whole paths, whatever its width."""
        lines = [list(map(visible, row)) for row in (self.head, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        sides = [str.rjust if n in self.numbers else str.ljust for n in range(len(widths))]
        return "\n".join(
            "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
            for row in lines
        )

    def markdown(self) -> str:
        """GitHub's flavor."""
        rule = ["---:" if n in self.numbers else "---" for n in range(len(self.head))]
        rows = [list(map(escape_markdown, row)) for row in self.rows]
        for i, j in self.strong:
            rows[i][j] = f"**{rows[i][j]}**"
        return "\n".join(f"| {' | '.join(row)} |" for row in [[*map(escape_markdown, self.head)], rule, *rows])


def frame_table(frame: pd.DataFrame, exact: Collection[str] = ()) -> Table:
    """A DataFrame as a table: four decimals of scores, three digits of small ones, `-` for a missing value.

    `exact` names the columns of config values, in which different values look different.
    """

    def cell(value: Any, key: str) -> str:
        if value is None or value is pd.NA or (isinstance(value, float) and pd.isna(value)):
            return "-"
        if not isinstance(value, float) or key in exact:
            return say(value)
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"

    rows = [[*map(cell, row, frame.columns)] for row in frame.itertuples(index=False)]
    columns = enumerate(frame.columns)
    numbers = {n for n, _ in columns if all(row[n] == "-" or as_number(row[n]) is not None for row in rows)}
    return Table(list(map(str, frame.columns)), rows, numbers)


def text_table(frame: pd.DataFrame, exact: Collection[str] = ()) -> str:
    """`frame_table` as lines for a terminal."""
    return frame_table(frame, exact).text()


def one_line(text: str) -> str:
    """Text on one line, without characters that no document should hold."""
    return without_unprintable(" ".join(text.split()))


def without_unprintable(text: str) -> str:
    """Text with a replacement mark for each character that no document should hold."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def escape_markdown(text: str) -> str:
    """Text inside a line of Markdown, with everything escaped that would be more than text."""
    text = re.sub(r"([\\`*\[\]<>|~&$#])", r"\\\1", one_line(text))
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it is no mark
    return text.replace("://", "\\://").replace("www.", "www\\.").replace("@", "\\@")  # no links from bare addresses
