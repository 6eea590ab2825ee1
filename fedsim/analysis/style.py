"""One look for every figure: colors, sizes, axis names, axes to draw on, legends, files.

The colors are from the palette of Okabe and Ito (jfly.uni-koeln.de/color), chosen to differ in brightness; lines and
markers differ too, so that a grey print can be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import offset_copy

from fedsim.core.errors import UserError, visible
from fedsim.core.files import write_figure

LOCAL, FEDERATED, GLOBAL, CENTRAL = "#0072B2", "#E69F00", "#C8102E", "#000000"
GREY, GRID, REST = "#999999", "#E5E5E5", "#BDBDBD"
CYCLE = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
SCOPE_LOOKS = {  # color of the line, color of the markers, name in the legend
    "local": (LOCAL, LOCAL, "local-only, mean"),
    "federated": (FEDERATED, GLOBAL, "federated, global model"),
    "central": (CENTRAL, CENTRAL, "centralized"),
}
CLIENT_LOOKS = (
    *(("#0072B2", "o"), ("#009E73", "^"), ("#CC79A7", "D")),
    *(("#56B4E9", "v"), ("#D55E00", "P"), ("#7F7F7F", "X")),
)
LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # of settings; more than these are thin lines without names
DASHED = (0, (4, 2))

DPI = 150
FORMATS = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}  # and the metadata of their files
WIDTH = 4.5  # inches; text of 9 points is still 7 when the figure is set 3.5 inches wide
STYLE = {
    **{"font.size": 9.0, "axes.titlesize": 9.0, "axes.labelsize": 9.0, "legend.fontsize": 8.0},
    **{"xtick.labelsize": 8.0, "ytick.labelsize": 8.0, "axes.spines.top": False, "axes.spines.right": False},
}

_OFFSCREEN = ContextVar("offscreen", default=False)

X_LABELS = {
    "step": "optimizer steps per client",
    "own_step": "optimizer steps of each model",
    "round": "rounds",
    "tokens": "tokens trained on, all clients",
    "seconds": "wall-clock time (s)",
    "bytes": "sent up and down, all clients (MiB)",
    "simulated": "simulated seconds",
    "epsilon": "epsilon spent",
}
Y_LABELS = {
    "accuracy": "accuracy",
    "loss": "loss (nats per answer token)",
    "exact_match": "exact match",
    "macro_f1": "macro-F1",
    "perplexity": "perplexity",
}


def value_label(metric: str, split: str = "validation", prefix: str = "") -> str:
    """The name of a metric on an axis; its unit is on a line of its own."""
    whose = "own validation" if split == "site" else split
    return f"{prefix}{whose} {Y_LABELS.get(metric, metric.replace('_', ' '))}".replace(" (", "\n(")


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure (inches) that pyplot does not know. Draw on it inside `rc_context(STYLE)`."""
    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def offscreen() -> Iterator[None]:
    """Our style, and new figures that pyplot does not know, so that nobody has to close them."""
    token = _OFFSCREEN.set(True)
    try:
        with matplotlib.rc_context(STYLE):
            yield
    finally:
        _OFFSCREEN.reset(token)


@contextmanager
def own_figure(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """A figure (inches) in our style: of pyplot's, which a notebook shows, or `offscreen`."""
    if _OFFSCREEN.get():
        yield new_figure(height, width)
        return
    import matplotlib.pyplot as plt

    # The first figure switches to the backend, a notebook's too; inside rc_context that switch would be undone again.
    plt.close(plt.figure())
    with matplotlib.rc_context(STYLE):
        yield plt.figure(figsize=(width, height), layout="constrained")


@contextmanager
def canvas(ax: Axes | None, height: float) -> Iterator[Axes]:
    """Axes to draw on: the user's, in the style they have; or, for None, those of `own_figure`, which grows with the legend."""
    if ax is not None:
        yield ax
        return
    with own_figure(height) as figure:
        ax = figure.add_subplot()
        yield ax
        grow(ax)


def line_handle(color: str, line: Any = "", marker: str = "o", **look: Any) -> Line2D:
    """A line for a legend alone."""
    return Line2D([], [], color=color, linestyle=line, marker=marker, **({"markersize": 4.5, "linewidth": 1.4} | look))


def legend_below(ax: Axes, entries: Sequence[tuple[Any, str]], title: str | None = None) -> None:
    """A legend below the names of the x axis; `entries` are pairs (handle, label)."""
    # in points below the axes, past tick labels and axis label: it holds for axes of any size
    drop = 1.2 * (ax.xaxis.label.get_size() + tick_lines(ax) * ax.xaxis.get_ticklabels()[0].get_size()) + 12
    labels = [plain(label) for _, label in entries]
    ax.legend(
        *([handle for handle, _ in entries], labels),
        **{"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "borderaxespad": 0.0},
        bbox_transform=offset_copy(ax.transAxes, ax.figure, y=-drop, units="points"),
        **{"title": title, "title_fontsize": 8, "fontsize": 8, "frameon": False},
        **{"columnspacing": 1.2, "handlelength": 2.4, "ncols": _legend_columns(ax, labels)},
    )


def figure_legend(figure: Figure, entries: Sequence[tuple[Any, str]], most: int) -> None:
    """A legend below all panels, in as many columns as fit, at most `most`."""
    labels = [plain(label) for _, label in entries]
    columns = max(1, min(most, int(14 * figure.get_figwidth() / max(map(len, labels)))))
    handles = [handle for handle, _ in entries]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _legend_columns(ax: Axes, labels: Sequence[str]) -> int:
    half = -(-len(labels) // 2)  # matplotlib fills the first column first
    letters = sum(max(map(len, column), default=0) for column in (labels[:half], labels[half:]))
    return 2 if inches(ax) > max(3.2, 0.058 * letters + 0.2) else 1


def grow(ax: Axes) -> None:
    """Make the figure higher for a legend of more than two lines and tick labels of more than one."""
    if legend := ax.get_legend():
        labels = [text.get_text() for text in legend.get_texts()]
        rows = -(-len(labels) // _legend_columns(ax, labels)) + bool(legend.get_title().get_text())
        more = 0.16 * max(0, rows - 2) + 0.13 * (tick_lines(ax) - 1.0)
        ax.figure.set_figheight(ax.figure.get_figheight() + more)


def tick_lines(ax: Axes) -> float:
    """How many lines of text the tick labels take below the axes."""
    labels = ax.get_xticklabels()
    if any(label.get_rotation() for label in labels):
        return max(0.52 * len(label.get_text()) for label in labels)
    return float(max((label.get_text().count("\n") + 1 for label in labels), default=1))


def inches(ax: Axes) -> float:
    """The width of axes."""
    return float(ax.get_window_extent().width / ax.figure.dpi)


def plain(text: Any) -> str:
    """A name from the user's data: never a formula, whatever dollars it holds, and nothing that has no glyph."""
    return visible(str(text), lines=True).replace("$", r"\$")


def broken(text: str, letters: int) -> str:
    """Text in lines of about so many letters, broken after spaces and `_`, where `textwrap` would split words."""
    lines = [""]
    for part in re.findall(r"[^ _]*[ _]?", text):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > letters:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def save_figure(figure: Figure, file: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write a figure as `file`, without a suffix, in each format; returns the files.

    Text in PDF is TrueType, and no file holds the time at which it was written.

    Raises:
        UserError: a format that is not one of `FORMATS`.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"format {name!r} is not available; use one of {', '.join(FORMATS)}")
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "fedsim"}):
        files = {file.with_name(f"{file.name}.{name}"): FORMATS[name] for name in formats}
        return [write_figure(path, figure, DPI, metadata) for path, metadata in files.items()]
