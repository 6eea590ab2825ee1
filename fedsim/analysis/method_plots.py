"""Figures that compare the methods of a sweep: the global model's score as training goes on, a line for each method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedsim.analysis import style
from fedsim.analysis.configs import say
from fedsim.analysis.sweeps import swept_keys
from fedsim.analysis.ticks import score_axis, settle
from fedsim.analysis.traces import scale_of, stack, traces
from fedsim.core.errors import UserError

PANELS = 9  # as many as can be read on a page
AXES = ("round", "bytes", "tokens", "epsilon")


def compared(table: pd.DataFrame) -> str | None:
    """The swept key whose values are methods: a section or its name, the algorithm before others; None where there is none."""
    trained = table[table["scope"] == "federated"]
    named = [k for k in swept_keys(table) if "." not in k.removesuffix(".name")]
    keys = [k for k in named if trained[k].dtype == object and trained[k].nunique() > 1]
    return min(keys, key=lambda key: key.removesuffix(".name") != "algorithm", default=None)


def panel_keys(table: pd.DataFrame, key: str) -> list[str]:
    """The other swept keys that tell panels apart: those that take several values for the same method."""
    trained = table[table["scope"] == "federated"]
    others = [k for k in swept_keys(table) if k != key and trained[k].nunique(dropna=False) > 1]
    apart: list[str] = []
    for other in others:
        cells = trained.groupby([key, *apart], dropna=False)[other].nunique(dropna=False)
        if (cells > 1).any():
            apart.append(other)
    return apart


def methods(df: pd.DataFrame, table: pd.DataFrame, key: str = "algorithm", x: str = "round") -> Figure:
    """The global model's validation score against rounds, bytes or tokens: a line for each method, its mean over the runs that
    differ in their seed alone, in a band, their range; a panel for each setting of what else was swept.

    Args:
        df: rows of the runs from `load_runs`.
        table: of these runs, from `sweep_table`; its metric is drawn. Filter it to leave settings out.
        key: the swept key whose values are the methods.
        x: "round", "bytes" (up and down, all clients, MiB), "tokens" (trained on, all clients) or another axis of `curves`.

    Raises:
        UserError: if no run has a global model's scores on that axis, or there are more panels than can be read.
    """
    metric = str(table["metric"].iloc[0])
    table = table[(table["scope"] == "federated") & table["last"].notna()]
    scales = [scale_of(df[df["run"] == run], "federated", x) for run in table["run"]]
    on_axis = [scale is not None and bool(np.isfinite(scale[1]).all()) for scale in scales]
    table = table[on_axis] if any(on_axis) else table  # runs without noise have no place on an axis of epsilon
    apart = panel_keys(table, key)
    settings = list(table.groupby(apart, sort=False, dropna=False)) if apart else [((), table)]
    if not settings or len(settings) > PANELS:
        raise UserError(
            f"{len(settings)} settings of {', '.join(apart) or key} have a panel each; filter the table to 1 to 9"
        )
    names = list(dict.fromkeys(table[key]))
    looks = {name: _look(number) for number, name in enumerate(names)}
    columns = min(3, len(settings))
    lines = -(-len(settings) // columns)
    drawn, most = set[str](), 1
    with style.offscreen():
        legend_rows = -(-len(names) // (1 + columns))
        figure = style.new_figure(
            0.9 + 2.3 * lines + 0.17 * legend_rows, style.WIDTH if columns == 1 else 2.7 * columns
        )
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for ax in panels[len(settings) :]:
            ax.set_axis_off()
        for ax, (setting, rows) in zip(panels, settings, strict=False):
            for name, runs in rows.groupby(key, sort=False):
                count = _draw(ax, df[df["run"].isin(runs["run"])], metric, x, looks[name])
                drawn |= {str(name)} if count else set()
                most = max(most, count)
            ax.set_title(
                ", ".join(f"{k.rpartition('.')[2]} = {say(v, 20)}" for k, v in zip(apart, setting, strict=True))
            )
            ax.set(xlabel=style.X_LABELS[x], ylabel=style.value_label(metric))
            score_axis(ax.yaxis, metric)
            ax.label_outer()
        if not drawn:
            raise UserError(f"x={x!r}: these runs recorded no {metric} of a global model on that axis")
        settle(*panels[: len(settings)])
        shown = [(style.line_handle(**looks[n]), say(n, 40)) for n in names if n in drawn]
        style.figure_legend(figure, shown, 1 + columns)
        if most > 1:
            figure.suptitle(f"mean and range of {most} runs", fontsize=style.STYLE["axes.titlesize"])
    return figure


def _look(number: int) -> dict[str, str]:
    """Color, line and marker of a method."""
    cycle = style.CYCLE
    return {
        "color": cycle[number % len(cycle)],
        "line": ("-", "--", ":")[number // len(cycle) % 3],
        "marker": "os^Dv"[number % 5],
    }


def _draw(ax: Axes, df: pd.DataFrame, metric: str, x: str, look: dict[str, str]) -> int:
    """One method's line and band; how many runs it is the mean of."""
    curves: Sequence[np.ndarray] = [traces(rows, metric).merged for _, rows in df.groupby("run", observed=True)]
    curves = [one[one[:, 0] > 0] for one in curves if len(one)]
    scale = scale_of(df, "federated", x)
    if not curves or scale is None or not all(map(len, curves)):
        return 0
    grid, values = stack(curves)
    at = np.interp(grid, *scale)
    every = -(-len(at) // 6)
    ax.plot(
        at,
        values.mean(axis=0),
        color=look["color"],
        linestyle=look["line"],
        marker=look["marker"],
        markersize=3.5,
        linewidth=1.3,
        markevery=every,
    )
    if len(values) > 1:
        ax.fill_between(at, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.13, linewidth=0)
    return len(values)
