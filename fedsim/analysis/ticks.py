"""Axes of scores and of swept values: limits, ticks and their labels, names at the ends of curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from fedsim.analysis.configs import say
from fedsim.analysis.style import GRID, broken, inches, plain

WIDE = 20.0  # values that span more than this many times the least one stand on a log axis
WIDE_LOSS = 4  # highest over lowest loss, above which its axis is logarithmic
SHARES = ("accuracy", "exact_match", "macro_f1")  # between 0 and 1
LEAST_SPAN = 0.1


def is_wide(values: Any) -> bool:
    """Whether positive values belong on a log axis."""
    values = np.asarray(values, dtype=float)
    return len(values) > 0 and bool(values.min() > 0) and bool(values.max() > WIDE * values.min())


def score_axis(axis: Axis, metric: str, signed: bool = False, grid: str = "both") -> None:
    """A grid, and an axis of scores, or of their differences (`signed`): logarithmic where a loss falls far, and never zoomed
    into noise.

    Shares of examples span a tenth at least, other metrics a tenth of their mean.
    """
    ax, along_y = axis.axes, axis.axis_name == "y"
    ax.grid(axis=grid, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    low, high = ax.dataLim.intervaly if along_y else ax.dataLim.intervalx
    if not (np.isfinite(low) and np.isfinite(high)):
        return
    if "loss" in metric and not signed and low > 0 and high > WIDE_LOSS * low:  # the first point would flatten the rest
        (ax.set_yscale if along_y else ax.set_xscale)("log")
        name_decades(axis)
        return
    share = metric in SHARES
    middle, least = (low + high) / 2.0, LEAST_SPAN * (1.0 if share else abs(low + high) / 2.0)
    if high - low < least:
        if share and not signed and low >= 0.0 and high <= 1.0:
            middle = float(np.clip(middle, least / 2.0, 1.0 - least / 2.0))
        ends = np.array([middle - least / 2.0, middle + least / 2.0])
        at = ax.dataLim.intervalx if along_y else ax.dataLim.intervaly
        # as if there were points: the axis goes on scaling itself, with others that share it
        ax.update_datalim(np.column_stack([at, ends] if along_y else [ends, at]))
        ax.autoscale_view()


class _LogTicks(LogLocator):
    """Ticks of a log axis at the roundest values of which at least three are in view."""

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        low, high = sorted((vmin, vmax))
        for subs in ((1.0,), (1.0, 2.0, 5.0), np.arange(1.0, 10.0)):
            self.set_params(subs=subs)
            ticks = np.asarray(super().tick_values(low, high))
            if np.count_nonzero((ticks >= low) & (ticks <= high)) >= 3:
                return ticks
        return MaxNLocator(4).tick_values(low, high)


def name_decades(axis: Axis) -> None:
    """Labelled ticks on a log axis; others are left as they are."""
    if axis.get_scale() == "log":
        axis.set_major_locator(_LogTicks())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def tick_values(ax: Axes, values: np.ndarray) -> None:
    """Ticks at the values that were swept, labelled where the labels do not touch; the first and the last always."""
    place = np.log10(values) if ax.get_xscale() == "log" else values
    at = 0.9 * inches(ax) * (place - place[0]) / max(place[-1] - place[0], 1e-12)
    half = 0.5 * np.array([0.058 * len(say(float(value))) + 0.05 for value in values])  # of a label, in inches
    last, named = len(values) - 1, [0]
    for number in range(1, last):
        if all(abs(at[number] - at[other]) >= half[number] + half[other] for other in (named[-1], last)):
            named.append(number)
    named = sorted({*named, last})
    ax.xaxis.set_major_locator(FixedLocator(values[named]))
    ax.xaxis.set_major_formatter(lambda value, _: say(float(value)))
    ax.xaxis.set_minor_locator(FixedLocator(np.delete(values, named)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def name_places(ax: Axes, names: Sequence[Any]) -> None:
    """Names at 0, 1, ... of the x axis: broken into lines where there is room, else upright."""
    letters = int(inches(ax) / len(names) / 0.065)
    texts = [say(name, 30) for name in names]
    ax.set_xlim(-0.5, len(names) - 0.5)
    upright = letters < min(8, max(map(len, texts)))
    ax.set_xticks(range(len(names)), texts if upright else [broken(text, letters) for text in texts])
    ax.tick_params(axis="x", length=0, labelrotation=90 if upright else 0)


def name_ticks(axis: Axis, names: Sequence[Any], most: int) -> None:
    """Names on the ticks 0, 1, ...; where there are more than `most`, on about eight of them."""
    count = len(names)
    at = np.arange(count) if count <= most else np.unique(np.linspace(0, count - 1, 8).astype(int))
    axis.set_ticks(at, [say(plain(names[place]), 18) for place in at])
    axis.set_tick_params(length=0 if count <= most else 3)


class _EndLabel(Annotation):
    """A name at the end of a curve; names that would touch are moved up or down as little as can be, when they are drawn."""

    group: list[_EndLabel]

    def update_positions(self, renderer: Any) -> None:
        axes, fontsize = self.axes, renderer.points_to_pixels(self.get_fontsize())
        ends = np.array([axes.transData.transform(label.xy) for label in self.group])
        # a name stands in the way of those that begin left of its own end
        near = np.abs(ends[:, 0] - axes.transData.transform(self.xy)[0]) < 8.0 * fontsize
        at = [label for label, one in zip(self.group, near, strict=True) if one].index(self)
        places = spread(ends[near, 1], 1.15 * fontsize)
        self.set_position((4.0, (places[at] - ends[near][at, 1]) / renderer.points_to_pixels(1.0)))
        super().update_positions(renderer)

    def get_tightbbox(self, renderer: Any = None) -> Any:
        # `Text` takes the offset for a place in the data, of which a log axis has none at 0. The room beside it is for the
        # curve's end, which moves as the layout makes the axes narrower.
        box = self.get_window_extent(renderer)
        return Bbox.from_extents(box.x0, box.y0, box.x1 + 0.15 * box.width, box.y1)


def spread(at: np.ndarray, least: float) -> np.ndarray:
    """Places at least so far apart, in the same order, with the least sum of squared moves: isotonic regression."""
    from scipy.optimize import isotonic_regression  # half a second to import

    order = np.argsort(at, kind="stable")
    slack = np.arange(len(at)) * least
    out = np.empty(len(at))
    out[order] = isotonic_regression(at[order] - slack).x + slack
    return out


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    """Name curves where they end: name -> its last point, and its color."""
    group: list[_EndLabel] = []
    for name, point in ends.items():
        look = {"color": colors[name], "fontsize": 7.5, "va": "center", "zorder": 8, "clip_on": False}
        label = _EndLabel(plain(name), point, xytext=(4.0, 0.0), textcoords="offset points", **look)
        label.set_path_effects([withStroke(linewidth=2.0, foreground="white")])
        label.group = group
        group.append(ax.add_artist(label))
    settle(ax)


def settle(*axes: Axes) -> None:
    """Scale the axes now: the layout leaves no room for labels that lie outside the limits of before."""
    for ax in axes:
        ax.get_xlim(), ax.get_ylim()
