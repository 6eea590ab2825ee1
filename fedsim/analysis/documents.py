"""A document from a template in `fedsim/assets`: as Markdown, and the same as one HTML file without scripts and links.

Whatever a template prints is plain text and is escaped, unless the template says that it is Markdown (`| safe`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from fedsim.analysis.style import DPI
from fedsim.analysis.tables import escape_markdown, one_line, without_unprintable

SCREEN_DPI = 120  # letters of 9 points in a figure are then as tall as 15 pixels, as the text is
_TIGHT_FROM = 100  # characters of a row, at the widest of each column; a page has room for about so many
_LONG_FROM = 24  # characters of a cell, from which its column keeps a least width


def render(template: str, pictures: Mapping[str, Path], **values: Any) -> tuple[str, str]:
    """A document as Markdown (GitHub's flavor) and as HTML.

    Args:
        template: of `assets/TEMPLATE.md.jinja`; its `title` is also the title of the HTML file.
        pictures: place of an image relative to the document -> its PNG file, which the HTML holds inside.
        values: what the template prints.
    """
    markdown = _templates(_as_markdown).get_template(f"{template}.md.jinja").render(values).strip() + "\n"
    page = _templates(lambda text: text).get_template("page.html.jinja")
    return markdown, page.render(title=one_line(values["title"]), body=Markup(to_html(markdown, pictures))) + "\n"


def _templates(finalize: Any) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "assets"),
        **{"autoescape": True, "finalize": finalize, "undefined": jinja2.StrictUndefined},
        **{"trim_blocks": True, "lstrip_blocks": True},
    )
    made.filters |= {"line": line, "fence": fence}
    return made


def _as_markdown(text: Any) -> Markup:
    return text if isinstance(text, Markup) else Markup(escape_markdown(str(text)))


def line(text: str) -> Markup:
    """Text at the start of a line of Markdown, where further signs would open a list, a rule or a heading."""
    return Markup(re.sub(r"^(\d+)([.)])", r"\1\\\2", re.sub(r"^([-+=])", r"\\\1", escape_markdown(text))))


def fence(text: str) -> Markup:
    """Lines that stand as they are."""
    marks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup("\n".join([marks, without_unprintable("\n".join(text.splitlines())), marks]))


def to_html(markdown: str, pictures: Mapping[str, Path] | None = None) -> str:
    """The body of an HTML page. Of images those in `pictures` are shown; HTML and links in the Markdown stay text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink"])
    rules, pictures = parser.renderer.rules, pictures or {}

    def image(tokens: Sequence[Any], at: int, *_: Any) -> str:
        shows = escape(parser.renderer.renderInlineAsText(tokens[at].children or [], parser.options, {}))
        place = tokens[at].attrs["src"]
        if place not in pictures:
            return shows
        data = pictures[place].read_bytes()
        width = round(int.from_bytes(data[16:20], "big") * SCREEN_DPI / DPI)  # PNG: its width stands there
        source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
        return f'<img src="{source}" width="{width}" alt="{shows}">'

    def table(tokens: Sequence[Any], at: int, *_: Any) -> str:
        return f'<div class="wide"><table{parser.renderer.renderAttrs(tokens[at])}>\n'

    rules |= {"image": image, "table_open": table, "table_close": lambda *_: "</table></div>\n"}
    tokens = parser.parse(markdown)
    ends = [at for at, token in enumerate(tokens) if token.type in ("table_open", "table_close")]
    for begin, end in zip(ends[::2], ends[1::2], strict=True):
        _set_widths(tokens[begin:end])
    body = parser.renderer.render(tokens, parser.options, {})
    for word in ("PASSED", "FAILED"):
        body = body.replace(f"<strong>{word}</strong>", f'<strong class="{word.lower()}">{word}</strong>')
    return body


def _set_widths(table: Sequence[Any]) -> None:
    """Classes for a table that a page has no room for, and for the cells of columns with long texts."""
    cells = [(cell, text) for cell, text in pairwise(table) if cell.type in ("th_open", "td_open")]
    columns = sum(cell.type == "th_open" for cell, _ in cells)
    widest = [max(len(text.content) for _, text in cells[column::columns]) for column in range(columns)]
    if sum(widest) > _TIGHT_FROM:
        table[0].attrSet("class", "tight")
    for at, (cell, _) in enumerate(cells):
        if widest[at % columns] > _LONG_FROM and not cell.attrs:
            cell.attrSet("class", "long")
