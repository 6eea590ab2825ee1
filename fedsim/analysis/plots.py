"""Figures from `load_runs()`: the three curves, the partition, the sites, settings against each other; and of a sweep,
from `sweep_table()`: scores against what was swept and against measured skew, the gain of federation per site.

Every function draws on the axes it is given, or on new ones of pyplot's, which a notebook shows at the end of its cell.
Colours are from the
palette of Okabe and Ito (jfly.uni-koeln.de/color), chosen to differ in brightness, with line styles and markers, so
that a grey print can be read too.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox, offset_copy

from fedsim.analysis.load import (
    COLUMNS,
    MISSING,
    SCOPES,
    PathLike,
    Traces,
    central_budget,
    class_predictions,
    confusion_matrix,
    differences,
    find_runs,
    load_partition,
    load_runs,
    require_metric,
    round_ends,
    rows_of,
    say,
    traces,
)
from fedsim.analysis.tables import cells, sweep_table, swept_keys
from fedsim.core.errors import Notice, UserError, visible
from fedsim.core.files import check_own, write_figure

LOCAL, FEDERATED, MERGED, CENTRAL = "#0072B2", "#E69F00", "#C8102E", "#000000"
CYCLE = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
METRICS = ("accuracy", "loss", "exact_match")
DPI = 150
FORMATS = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}  # and what their files say of themselves
WIDTH = 4.5  # inches; text of 9 points is still 7 when the figure is set 3.5 inches wide
NAMED = 30  # clients whose names and numbers still fit
STYLE = {"font.size": 9.0, "axes.titlesize": 9.0, "axes.labelsize": 9.0, "legend.fontsize": 8.0}
STYLE |= {"xtick.labelsize": 8.0, "ytick.labelsize": 8.0, "axes.spines.top": False, "axes.spines.right": False}
X_LABELS = {
    "step": "optimizer steps per client",
    "own_step": "optimizer steps of each model",
    "round": "rounds",
    "tokens": "tokens trained on, all clients",
    "seconds": "wall-clock time (s)",
    "bytes": "sent up and down, all clients (MiB)",
    "simulated": "simulated seconds",
}
SKEW_LABELS = {
    "js_mean": "mean JS divergence of the sites' labels (bits)",
    "size_gini": "Gini coefficient of the sites' sizes",
}
SITE_LABELS = {"rows": "training rows of the site", "js": "JS divergence of the site's labels (bits)"}
KEY_LABELS = {"partition.alpha": "Dirichlet alpha", "partition.num_clients": "clients"}
SCOPE_LOOKS = {  # colour of the line, colour of the marks, name in the legend
    "local": (LOCAL, LOCAL, "local, mean of sites"),
    "federated": (FEDERATED, MERGED, "federated, merged model"),
    "central": (CENTRAL, CENTRAL, "centralized"),
}
SITE_LOOKS = (
    ("#0072B2", "o"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#D55E00", "P"),
    ("#7F7F7F", "X"),
)
LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # further settings than these are drawn thin, without names
DASHED = (0, (4, 2))
WIDE = 20.0  # values that span more than this many times the least one stand on a log axis
SHARES = ("accuracy", "exact_match", "macro_f1")  # between 0 and 1
LEAST_SPAN = 0.1
WIDE_LOSS = 4  # highest over lowest loss, above which its axis is logarithmic
Y_LABELS = {"accuracy": "accuracy", "loss": "loss (nats per answer token)", "exact_match": "exact match"}
Y_LABELS |= {"macro_f1": "macro-F1", "perplexity": "perplexity"}


def curves(
    df: pd.DataFrame, ax: Axes | None = None, metric: str = "accuracy", x: str | None = None, split: str = "validation"
) -> Axes:
    """Local, federated and centralized over the course of training.

    Local sites: a thin line each, their mean and their range. Federated: the mean of the cohort's clients inside each
    round, the jump at each merge, a red dot on each merged model. Centralized: dashed; the legend says what of the clients'
    budget it has, by `central.match`. With several runs each line is the mean over runs, as far as all of them have
    come, and each band their range.

    Args:
        df: rows of one or more runs from `load_runs`; a warning says so where they differ in more than the seed.
        ax: axes to draw on; None makes new ones.
        metric: "accuracy", "loss", "exact_match" or any other recorded name.
        x: "step" (optimizer steps: of a client, the furthest where they differ, and the centralized model's own),
            "round", or the scope's own running total of "tokens" (trained on, all clients), "seconds" (wall clock since
            the scope's training began) or "bytes" (up and down, all clients). A scope without that total, as one that
            sends nothing, is left out. None: steps where the centralized model does as many as a client, else tokens.
        split: "validation", or "site" for each site's own validation rows.

    Raises:
        UserError: an unknown x or metric, or x = tokens, seconds or bytes where no scope recorded them.
    """
    require_metric(df, metric, split)
    if len(groups := settings(df)) > 1:
        labels = "; ".join(label for label, _ in groups[:4])
        warnings.warn(
            f"curves draws one mean over {len(groups)} settings ({labels}); filter first or use compare",
            Notice,
            stacklevel=2,
        )
    with _style(ax):
        own = ax is None
        ax = ax or _new_axes(3.4)
        _legend_below(ax, _draw_curves(ax, df, metric, x, split, name_sites=True))
        if own:
            _grow(ax)
    return ax


def each_site(
    df: pd.DataFrame, ax: Axes | None = None, metric: str = "loss", x: str | None = None, split: str = "validation"
) -> Axes:
    """A few sites that differ in kind: each alone in a colour and with a mark of its own, against federated and central.

    Federated: the saw-tooth of the clients' mean, thick, with each client's own in the colour of its site, thin; a red dot
    on each merged model. Central: dashed. The square at the start, with its value, is the model before training. With
    several runs each line is the mean over runs, as far as all of them have come.

    Args:
        df: rows of one run, or of runs that differ in the seed alone, from `load_runs`.
        ax: axes to draw on; None makes new ones.
        metric, x, split: as in `curves`.

    Raises:
        UserError: an unknown x or metric, more sites than there are colours, or no curve on that axis.
    """
    require_metric(df, metric, split)
    found = [traces(rows, metric, split) for _, rows in df.groupby("run", observed=True)]
    names = [name for name in found[0].local if all(name in one.local for one in found)]
    if len(names) > len(SITE_LOOKS):
        raise UserError(f"{len(names)} sites trained alone, and {len(SITE_LOOKS)} can be told apart; use curves")
    looks = dict(zip(names, SITE_LOOKS, strict=False))
    x, scales = _axis(df, x)
    entries: list[tuple[Any, str]] = []
    ends: dict[str, tuple[float, float]] = {}
    with _style(ax):
        own = ax is None
        ax = ax or _new_axes(3.6)
        for name in names if scales["local"] else []:
            curve = _mean([one.local[name] for one in found])
            at, look = np.interp(curve[:, 0], *scales["local"]), {"markersize": 3.0, "linewidth": 1.3}
            (line,) = ax.plot(at, curve[:, 1], color=looks[name][0], marker=looks[name][1], zorder=3, **look)
            ends[name] = (float(at[-1]), float(curve[-1, 1]))
            entries.append((line, f"{name} alone"))
        central = [one.central for one in found if len(one.central)]
        if central and scales["central"]:
            curve = _mean(central)
            at = np.interp(curve[:, 0], *scales["central"])
            (line,) = ax.plot(at, curve[:, 1], color=CENTRAL, linewidth=1.6, linestyle=(0, DASHED[1]), zorder=4)
            entries.append((line, _central_name(df)))
        federated = [one for one in found if one.clients or len(one.merged)]
        if federated and (scale := scales["federated"]):
            _draw_clients(ax, df, federated, metric, split, scale, looks)
            places, values, at_merge = _saw_tooth(federated)
            at, mean = np.interp(places, *scale), values.mean(axis=0)
            (line,) = ax.plot(at, mean, color=FEDERATED, linewidth=2.2, zorder=5)
            (dots,) = ax.plot(at[at_merge], mean[at_merge], "o", color=MERGED, markersize=5.0, zorder=6)
            entries += [(line, "federated clients, mean"), (dots, "merged model")]
        _draw_start(ax, found, entries)
        _dress(ax, metric, x, split)
        if scales["local"]:
            _label_ends(ax, ends, {name: look[0] for name, look in looks.items()})
        _legend_below(ax, entries)
        if own:
            _grow(ax)
    return ax


def partition(report: dict[str, Any] | PathLike, ax: Axes | None = None) -> Axes:
    """Heat map of a partition: clients x classes, rows per cell, with the clients' sizes beside it.

    Of virtual clients those that the report holds, at most 1,000 of them; the title says so.

    Args:
        report: a run folder, or the report that `load_partition` reads from it; used are `class_counts` [C][L] and, where present, `class_names` [L],
            `client_names` [C], `num_clients`, `js_mean` (bits) and `size_gini`.

    Raises:
        UserError: the report has no class counts.
    """
    if not isinstance(report, dict):
        report = load_partition(report)
    if not report.get("class_counts"):
        raise UserError("the partition report holds no class_counts; give what load_partition(run) returns")
    counts = np.atleast_2d(np.asarray(report["class_counts"], dtype=np.int64))
    clients, classes = counts.shape
    top, sizes = max(int(counts.max()), 1), counts.sum(axis=1)
    with _style(ax):
        ax = ax or _new_axes(min(1.5 + 0.27 * clients, 5.5))
        image = ax.imshow(counts, cmap="Blues", aspect="auto", vmin=0, vmax=top)
        _name_ticks(ax.xaxis, report.get("class_names") or [str(n) for n in range(classes)], 20)
        _name_ticks(ax.yaxis, report.get("client_names") or [f"site-{n + 1}" for n in range(clients)], NAMED)
        labels = ax.get_xticklabels()
        letter = 0.6 * labels[0].get_size() / 72.0  # a letter's width in inches, roughly
        if letter * sum(len(label.get_text()) + 2 for label in labels) > 0.75 * _inches(ax):
            ax.tick_params(axis="x", labelrotation=90)
        if clients <= NAMED and len(str(top)) * classes <= 30:
            for (row, column), value in np.ndenumerate(counts):
                color = "white" if value > 0.55 * top else "black"
                ax.text(column, row, str(value), ha="center", va="center", color=color, fontsize=8)
        side = ax.inset_axes((1.02, 0.0, 0.15, 1.0), sharey=ax)
        edges = np.repeat(np.arange(clients + 1) - 0.5, 2)[1:-1]
        side.fill_betweenx(edges, 0, np.repeat(sizes, 2), color="#BDBDBD", linewidth=0)
        if clients <= NAMED:
            side.hlines(np.arange(1, clients) - 0.5, 0, sizes.max(), color="white", linewidth=1.0)
            for row, size in enumerate(sizes):
                side.text(0.05 * max(sizes.max(), 1), row, str(size), va="center", fontsize=8)
        side.set(xlim=(0, max(int(sizes.max()), 1)), xticks=[], xlabel="size")
        side.tick_params(axis="y", left=False, labelleft=False)
        side.spines[:].set_visible(False)
        ax.spines[:].set(visible=True, color="#BDBDBD")
        shape = {"pad": 0.03, "fraction": 0.06, "aspect": 20 if clients <= 12 else 40}
        ax.figure.colorbar(image, ax=ax, label="rows", **shape).outline.set_visible(False)
        facts = (("mean JS divergence {:.3f} bits", "js_mean"), ("size Gini {:.2f}", "size_gini"))
        title = ", ".join(text.format(report[key]) for text, key in facts if report.get(key) is not None)
        every = report.get("num_clients", clients)
        ax.set_title(f"a sample of {clients:,} of {every:,} clients\n{title}" if every > clients else title)
        ax.set(xlabel="class", ylabel="client")
    return ax


def confusion(table: pd.DataFrame, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Heat map of a confusion matrix: each true class's share of predictions as colour, the examples as numbers.

    Args:
        table: what `confusion_matrix(run)` returns.
        ax: axes to draw on; None makes a figure.
        title: None leaves it out.
    """
    counts = table.to_numpy(np.int64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with _style(ax):
        ax = ax or _new_axes(3.4)
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        _name_ticks(ax.xaxis, [str(name) for name in table.columns], 12)
        _name_ticks(ax.yaxis, [str(name) for name in table.index], 12)
        ax.tick_params(axis="x", labelrotation=90)
        if len(counts) <= 12:
            for (row, column), value in np.ndenumerate(counts):
                color = "white" if shares[row, column] > 0.55 else "black"
                ax.text(column, row, str(value), ha="center", va="center", color=color, fontsize=8)
        ax.spines[:].set(visible=True, color="#BDBDBD")
        ax.set(xlabel="predicted", ylabel="label", title=title or "")
    return ax


def sites(df: pd.DataFrame, ax: Axes | None = None, metric: str = "accuracy") -> Axes:
    """Per site: its own model against the merged one, on the site's own validation rows and on the shared ones.

    Values are the last recorded, averaged over runs. Sites stand in the order of the rows; beyond 30 in the order of
    what the merged model gains on their own rows.

    Raises:
        UserError: no site was scored with this metric.
    """
    last = df[df["value"].notna()]

    def by_site(scope: str, split: str, name: str) -> pd.Series:
        rows = last[(last["scope"] == scope) & (last["split"] == split) & (last["name"] == name)]
        ends = rows.groupby(["run", "client"], sort=False, observed=True)["value"].last()
        return ends.groupby("client", sort=False).mean()

    table = pd.DataFrame(
        {
            "alone_own": by_site("local", "site", metric),
            "merged_own": by_site("federated", "site", f"merged_{metric}"),
            "alone_shared": by_site("local", "validation", metric),
        }
    )
    if table.empty:
        raise UserError(f"no site was scored with {metric!r}: run the local or the federated mode with validation on")
    table = table.loc[[client for client in last["client"].unique() if client in table.index]]
    shared = last[(last["split"] == "validation") & (last["name"] == metric)]
    table["merged_shared"] = rows_of(shared, "federated").groupby("run", observed=True)["value"].last().mean()
    few = len(table) <= NAMED
    if not few:
        table = table.loc[(table["merged_own"] - table["alone_own"]).sort_values(kind="stable").index]
    with _style(ax):
        ax = ax or _new_axes(1.5 + 0.36 * len(table) if few else 6.0)
        entries: list[tuple[Any, str]] = []
        for rows, shift, empty in (("own", -0.17, False), ("shared", 0.17, True)):
            at = np.arange(len(table)) + shift
            ax.hlines(
                at, table[f"alone_{rows}"], table[f"merged_{rows}"], color="#999999", linewidth=1.0 if few else 0.4
            )
            for model, color, marker in (("alone", LOCAL, "s"), ("merged", MERGED, "o")):
                if (values := table[f"{model}_{rows}"]).notna().any():
                    look = {"markersize": 5.5 if few else 2.0, "markerfacecolor": "white" if empty else color}
                    (dots,) = ax.plot(values, at, marker, color=color, zorder=3, **look)
                    entries.append((dots, f"{'site alone' if model == 'alone' else 'merged model'}, {rows} rows"))
        _name_ticks(ax.yaxis, [str(name) for name in table.index], NAMED)
        ax.set(ylim=(len(table) - 0.5, -0.5), xlabel=_value_label(metric, "validation"))
        ax.grid(axis="x", color="#E5E5E5", linewidth=0.6)
        _fit(ax.xaxis, metric)
        _legend_below(ax, entries)
    return ax


def compare(
    df: pd.DataFrame, metric: str = "accuracy", x: str | None = None, axes: Sequence[Axes] | None = None
) -> np.ndarray:
    """Settings against each other: a panel for each scope, a line for each setting (the mean over its seeds).

    Args:
        df: rows of several runs from `load_runs`; federated lines join the merged models. The untrained model, the
            same for all, is left out: it would press the differences together.
        metric: a name recorded on the validation rows.
        x: as in `curves`.
        axes: axes to draw on, one for each scope that the runs have, in the order local, federated, central; None
            makes new ones.

    Returns:
        The axes, an array [scopes].

    Raises:
        UserError: no run recorded the metric, none recorded what x asks for, or `axes` is not one for each scope.
    """
    groups, shown, x = _lines_by_scope(df, metric, x)
    if axes is not None and len(axes) != len(shown):
        raise UserError(f"axes: {len(axes)} given, but these runs have {len(shown)} scopes: {', '.join(shown)}")
    with _style(None if axes is None else axes[0]):
        if axes is not None:
            panels = np.array(list(axes), dtype=object)
            entries = _draw_settings(panels, groups, shown, metric, x, _central_name(df))
            _legend_below(panels[len(panels) // 2], entries)
        else:
            import matplotlib.pyplot as plt

            width, height = _compare_size(groups, shown)
            figure = plt.figure(figsize=(width, height), layout="constrained")
            panels = _compare_panels(figure, groups, shown, metric, x, _central_name(df))
    return panels


def scores(table: pd.DataFrame, x: str = "partition.alpha", ax: Axes | None = None, value: str = "last") -> Axes:
    """Local, federated and central scores of a sweep, against a swept key or the measured skew of the partitions.

    Against a swept key: the mean of each cell (see `fedsim.analysis.tables.cells`) with its 95 % bootstrap interval over runs,
    on a log axis where the values span more than 20 times the least; text, such as adapters, side by side. Against
    `js_mean` or `size_gini`: a light dot for each run, and the cell means joined in their order.

    Further keys that were swept are told apart by line and marker; beyond four such settings each is a thin line
    without a name, and a thick one is the mean over them, where all of them have a value. Centralised models that do
    not depend on x - of runs without that key, or all of one value - are a horizontal line with its interval.

    Args:
        table: from `sweep_table`; filter it to leave settings out.
        x: a swept key, "js_mean" (bits) or "size_gini".
        ax: axes to draw on; None makes new ones.
        value: "last", "best", "own" or "test".

    Raises:
        UserError: an unknown x or value, or no run has both.
    """
    keys = swept_keys(table)
    if x not in keys and x not in SKEW_LABELS:
        raise UserError(f"x={x!r} was not swept; use one of {', '.join([*keys, *SKEW_LABELS])}")
    if value not in ("last", "best", "own", "test"):
        raise UserError(f"value={value!r} is no score of all three; use one of last, best, own, test")
    table = table[table[value].notna()]
    flat, table = _independent(table, x)
    table = table[table[x].notna()]
    if table.empty:
        raise UserError(f"no run has both {x} and the score {value!r}; choose another x or value")
    along = _skew_key(table) if x in SKEW_LABELS else x
    apart = _varied(table, [key for key in keys if key != along])
    means = cells(table, [along, *apart] if along else apart, value)
    means["along"] = means[along] if along else ""
    means["x"] = means[x].astype(float) if pd.api.types.is_numeric_dtype(means[x]) else means[x]
    levels = cells(flat, [key for key in apart if key in _varied(flat, apart)], value)
    settings = _number_settings(means, levels, apart)
    metric = str(pd.concat([flat, table])["metric"].iloc[0])
    with _style(ax):
        own = ax is None
        ax = ax or _new_axes(3.4)
        names = None if pd.api.types.is_numeric_dtype(means[x]) else list(dict.fromkeys(means["x"]))
        if names is not None:
            means["x"] = means["x"].map(names.index).astype(float)
        log = names is None and x not in SKEW_LABELS and _is_wide(means["x"])
        if log:
            ax.set_xscale("log")
        if x in SKEW_LABELS:
            _draw_runs(ax, table, x, value)
        scopes = [scope for scope in SCOPES if (means["scope"] == scope).any()]
        shift = min(0.16, 0.7 / max(1, len(scopes) * min(len(settings), len(LINES)))) if names is not None else 0.0
        entries = _draw_cells(ax, means, len(settings), shift, with_interval=x not in SKEW_LABELS, joined=names is None)
        entries += _draw_levels(ax, levels, len(settings), named="central" not in scopes)
        if budget := table.attrs.get("central_budget"):
            central = SCOPE_LOOKS["central"][2]
            entries = [(handle, f"{name} ({budget})" if name == central else name) for handle, name in entries]
        if 1 < len(settings) <= len(LINES):
            for setting, look in zip(settings, LINES, strict=False):
                entries.append((_handle("#666666", look, names is None), _say_setting(apart, setting)))
        ax.set_xlabel(SKEW_LABELS.get(x) or KEY_LABELS.get(x, x))
        ax.set_ylabel(_score_label(metric, value))
        _grid(ax, metric)
        _name_decades(ax.yaxis)
        lines = 1.0
        if names is not None:
            lines = _name_places(ax, names)
        elif x not in SKEW_LABELS:
            _tick_values(ax, np.unique(means["x"]), log)
        _legend_below(ax, entries, _legend_note(means, levels, x, len(settings)), lines)
        if own:
            _grow(ax, lines)
    return ax


def gains(table: pd.DataFrame, x: str = "rows", ax: Axes | None = None, value: str = "gain_own") -> Axes:
    """What federation gains each site, against the site's size or the skew of its labels: a dot for each site and run.

    Above the zero line the merged model is better than the site's own, whichever way the metric goes. The black line
    joins the medians of bins of like many sites, eight or more each. Colours tell the values of the first swept key
    that has two to six.

    Args:
        table: from `sweep_table`; filter it to leave settings out.
        x: "rows" (training rows, on a log axis where they span more than 20 times the least) or "js" (bits).
        ax: axes to draw on; None makes new ones.
        value: "gain_own" (on the site's own validation rows) or "gain" (on the shared ones).

    Raises:
        UserError: an unknown x or value, or no site has both.
    """
    if x not in SITE_LABELS:
        raise UserError(f"x={x!r} is nothing measured of a site; use one of {', '.join(SITE_LABELS)}")
    if value not in ("gain_own", "gain"):
        raise UserError(f"value={value!r} is no gain of a site; use gain_own or gain")
    keys = swept_keys(table)
    table = table[(table["scope"] == "local") & table[x].notna() & table[value].notna()]
    if table.empty:
        raise UserError(f"no site has both {x} and {value}; they need runs with modes local and federated")
    table = table.sort_values("client", kind="stable")  # so that no run lies on top of all others
    at, gain = table[x].to_numpy(float), table[value].to_numpy(float)
    entries: list[tuple[Any, str]] = []
    with _style(ax):
        own = ax is None
        ax = ax or _new_axes(3.4)
        colors, title = np.full(len(table), LOCAL, dtype=object), None
        if key := next((key for key in keys if 2 <= table[key].nunique() <= 6), None):
            values = cells(table, [key], value)[key].dropna().tolist()
            shades = _shades(values)
            colors = table[key].map(dict(zip(values, shades, strict=True))).fillna("#999999").to_numpy()
            title = KEY_LABELS.get(key, key)
            for one, shade in zip(values, shades, strict=True):
                entries.append((Line2D([], [], color=shade, marker="o", linestyle="", markersize=4), _say(one)))
        else:
            entries.append((Line2D([], [], color=LOCAL, marker="o", linestyle="", markersize=4), "a site of a run"))
        if x == "rows" and _is_wide(at):
            ax.set_xscale("log")
        ax.axhline(0.0, color="#555555", linewidth=1.0, linestyle="--", zorder=2)
        size = float(np.clip(2500.0 / len(table), 5.0, 16.0))
        ax.scatter(at, gain, s=size, c=list(colors), alpha=0.5, linewidths=0, zorder=3)
        if len(middle := _bin_medians(at, gain)):
            (line,) = ax.plot(*middle.T, color="black", marker="o", markersize=3.5, linewidth=1.6, zorder=5)
            entries.append((line, "median of a bin"))
        ax.set_xlabel(SITE_LABELS[x])
        whose = "site" if value == "gain_own" else "validation"
        ax.set_ylabel(
            "gain from federation,\n" + _value_label(str(table["metric"].iloc[0]), whose).replace(" (", "\n(")
        )
        _grid(ax, str(table["metric"].iloc[0]), signed=True)
        _name_decades(ax.xaxis)
        _legend_below(ax, entries, title)
        if own:
            _grow(ax)
    return ax


def save_figures(
    run_path: PathLike,
    out: PathLike | None = None,
    metric: str | None = None,
    x: str | None = None,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Write one run's figures: `accuracy.png`, `loss.png`, `exact_match.png`, `partition.png`, those it has data for, and
    `confusion.png` of the chosen merged and centralised models on the test examples.

    Curves over an axis that is asked for, other than steps, are `accuracy_by_bytes.png` and so on.

    Args:
        run_path: the run folder.
        out: folder to write to; the run's own `figures/` if None.
        metric: draw only this metric's curves, beside the partition; None draws all there are.
        x: as in `curves`.
        formats: of `FORMATS`; a file for each.

    Returns:
        The files written.

    Raises:
        UserError: no run there, or it did not record `metric` or what x asks for.
    """
    folder = Path(run_path)
    df = load_runs(folder)
    figures = {}
    with matplotlib.rc_context(STYLE):  # figures of their own, which pyplot does not know and nobody has to close
        for name in _recorded(df, metric):
            ax = curves(df, _figure(3.4).add_subplot(), name, x)
            _grow(ax)
            figures[_curves_file(name, x)] = ax.figure
        if (folder / "partition.json").is_file() and (report := load_partition(folder)).get("class_counts"):
            height = min(1.5 + 0.27 * len(report["class_counts"]), 5.5)
            figures["partition"] = partition(report, _figure(height).add_subplot()).figure
        predicted = class_predictions(folder, "test") if metric is None else {}
        if models := [model for model in ("federated", "central") if model in predicted]:
            figure = _figure(3.4, 1.2 + 3.3 * len(models))
            for ax, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
                confusion(confusion_matrix(folder, model), ax, f"{model}, test")
            figures["confusion"] = figure
    target = folder / "figures" if out is None else Path(out)
    if folder in target.parents:
        check_own(folder)
    return [file for name, figure in figures.items() for file in save_figure(figure, target / name, formats)]


def save_sweep(
    path: PathLike, out: PathLike | None = None, metric: str | None = None, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Write a sweep's figures, those it has data for.

    `score_by_<key>.png` for each swept key (but seed) with two or more values, `score_by_skew.png` (against the mean JS
    divergence, where the partition was swept), `gain_by_size.png` and `gain_by_skew.png`.

    Args:
        path: the sweep's folder.
        out: folder to write to; the sweep's own `figures/` if None.
        metric: as in `sweep_table`.
        formats: as in `save_figures`.

    Returns:
        The files written.

    Raises:
        UserError: as `sweep_table`.
    """
    table = sweep_table(path, metric)
    sites_of = table[table["scope"] == "local"]
    target = Path(path) / "figures" if out is None else Path(out)
    if Path(path) in target.parents:
        check_own(Path(path), names=[target.name])
    written = []
    with matplotlib.rc_context(STYLE):

        def save(name: str, draw: Any, **how: Any) -> None:
            ax = draw(ax=_figure(3.4).add_subplot(), **how)
            _grow(ax, _tick_lines(ax))
            written.extend(save_figure(ax.figure, target / name, formats))

        scored = table[table["last"].notna()]
        for key in swept_keys(table):
            if scored[key].nunique() > 1 and not _is_told(scored[scored["scope"] != "central"], key):
                save(f"score_by_{key}", scores, table=table, x=key)
        if _skew_key(scored) and scored["js_mean"].nunique() > 1:
            save("score_by_skew", scores, table=table, x="js_mean")
        for name, x in (("gain_by_size", "rows"), ("gain_by_skew", "js")):
            value = "gain_own" if sites_of["gain_own"].notna().any() else "gain"
            if (sites_of[x].notna() & sites_of[value].notna()).any():
                save(name, gains, table=table, x=x, value=value)
    return written


def _curves_file(metric: str, x: str | None) -> str:
    return metric if x in (None, "step") else f"{metric}_by_{x}"


def plot_runs(
    paths: PathLike | Iterable[PathLike],
    out: PathLike,
    metric: str | None = None,
    x: str | None = None,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Write the figures of one run, or of several together, to the folder `out`, made where missing.

    One run: as `save_figures`. Up to four: a panel each with shared axes. More: those that differ in nothing but the
    seed share a panel with their range; beyond four such settings `compare` lays them over each other.

    Args:
        paths: run folders, experiment folders or results roots.
        out: the folder for the files.
        metric: the only metric drawn; None draws all that were recorded.
        x: as in `curves`.
        formats: as in `save_figures`.

    Raises:
        UserError: a missing path, no run in it, or no run recorded `metric` or what x asks for.
    """
    folders = find_runs(paths)
    if len(folders) == 1:
        return save_figures(folders[0], out, metric, x, formats)
    df = load_runs(folders)
    written = []
    for name in _recorded(df, metric):
        scored = df.loc[(df["name"] == name) & (df["split"] == "validation"), "run"].unique()
        rows = df[df["run"].isin(scored)]
        groups = settings(rows, seeds_apart=len(scored) <= 4)
        figure = panels(groups, name, x) if len(groups) <= 4 else _compared(rows, name, x)
        written += save_figure(figure, Path(out) / _curves_file(name, x), formats)
    return written


def settings(df: pd.DataFrame, seeds_apart: bool = False) -> list[tuple[str, pd.DataFrame]]:
    """Runs by setting: (what tells it from the others, its rows), in the order of the rows.

    A setting is the config but for `seed` (unless `seeds_apart`) and but for what no result depends on: `results`,
    `executor`, `tracking`, `checkpoint`. The label is what varies, as `alpha = 0.1, lr = 1e-05`; of more than three keys
    those that tell most; a run's id where nothing else tells it from the others.
    """
    skip = {*COLUMNS, "run", "results", "executor", "tracking", "checkpoint", "aggregation"} | (
        set() if seeds_apart else {"seed"}
    )
    config = df.drop_duplicates("run").set_index("run").rename_axis(None)
    config = config[[key for key in config if key.split(".")[0] not in skip]].astype(object)
    config = config.map(lambda value: None if value != value else value)
    told = config.map(str)
    told = told.loc[:, told.nunique() > 1]
    by = [*told, "run"] if seeds_apart else list(told)
    told["run"] = told.index.astype(str)
    members = [runs.index for _, runs in told.groupby(by, sort=False)] if by else [told.index]
    labels = _tell_apart([config.loc[runs[0]].dropna().to_dict() for runs in members])
    groups = []
    for label, runs in zip(labels, members, strict=True):
        unlike = str(runs[0]) if len(runs) == 1 else f"{len(runs)} runs"
        shown = label if label and labels.count(label) == 1 else ", ".join(filter(None, (label, unlike)))
        groups.append((shown, df[df["run"].isin(runs)]))
    return groups


def _tell_apart(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each flat config that says what varies; of more than three keys those that tell most, and an ellipsis."""
    found = {key: values for key, values in differences(configs).items() if key != "experiment"}
    found = {key: [None if value is MISSING else value for value in values] for key, values in found.items()}
    # A key that only some configs have differs in earnest only where nothing else does.
    several = [key for key, values in found.items() if len({say(value) for value in values if value is not None}) > 1]
    keys, said = several or list(found), {key: _say_all(values) for key, values in found.items()}
    if len({config.get("experiment") for config in configs}) > 1 and (len(keys) > 3 or not keys):
        said["experiment"] = [str(config.get("experiment")) for config in configs]
        keys = ["experiment", *keys]
    chosen = keys if len(keys) <= 3 else []
    while len(chosen) < len(keys) > 3:

        def tells(key: str) -> tuple[int, int]:
            texts = [said[one] for one in [*chosen, key]]
            return len(set(zip(*texts, strict=True))), -max(map(len, said[key]))

        best = max((key for key in keys if key not in chosen), key=tells)
        if chosen and tells(best)[0] == len(set(zip(*(said[key] for key in chosen), strict=True))):
            break
        chosen.append(best)
    chosen = [key for key in keys if key in chosen]
    last = [key.rpartition(".")[2] for key in chosen]
    names = [end if last.count(end) == 1 else key for key, end in zip(chosen, last, strict=True)]
    labels = []
    for number in range(len(configs)):
        parts = []
        for key, name in zip(chosen, names, strict=True):
            bare = key == "experiment" or name == "name" or isinstance(found[key][number], Mapping)
            if key not in several or key == "experiment" or found[key][number] is not None:
                parts.append(said[key][number] if bare else f"{name} = {said[key][number]}")
        left_out = ["\N{HORIZONTAL ELLIPSIS}"] if set(keys) - {*chosen, "experiment"} else []
        labels.append(", ".join(parts + left_out))
    return labels


def panels(groups: Sequence[tuple[str, pd.DataFrame]], metric: str, x: str | None = None) -> Figure:
    """Curves of one to four settings, a panel each, with one scale and one legend.

    Args:
        groups: title and rows from `load_runs` of each setting.
        metric: a name recorded on the validation rows of all.
        x: as in `curves`, of all the rows together.
    """
    columns = len(groups) if len(groups) <= 3 else 2
    lines = -(-len(groups) // columns)
    every = pd.concat([rows for _, rows in groups])
    x, _ = _axis(every, x)
    central = _central_name(every)
    titles = [textwrap.fill(title, 60 if columns == 1 else 34 if columns == 2 else 30) for title, _ in groups]
    with matplotlib.rc_context(STYLE):
        height = 1.1 + (2.5 if columns == 1 else 2.2) * lines + 0.14 * max(title.count("\n") for title in titles)
        figure = _figure(height, width=WIDTH if columns == 1 else 2.7 * columns + 0.4)
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        entries: dict[str, dict[str, Any]] = {}  # kind of line -> what panels call it -> its handle
        for ax, title, (_, rows) in zip(axes, titles, groups, strict=True):
            for handle, text in _draw_curves(ax, rows, metric, x, "validation", name_sites=True):
                entries.setdefault(text.split()[0].rstrip(","), {})[text] = handle
            own = _central_name(rows)
            if own != central and (rows["scope"] == "central").any():  # the legend cannot say it for all panels
                title += f"\n{own.replace(' (', ': ').rstrip(')')}"
            ax.set_title(title, fontsize=STYLE["axes.titlesize"] - (columns > 1))
            ax.label_outer()
        _settle(*axes)
        common = {"local": "local sites, mean", "federated": "federated clients, mean", "centralized": central}
        texts = [next(iter(found)) if len(found) == 1 else common[kind] for kind, found in entries.items()]
        handles = [next(iter(found.values())) for found in entries.values()]
        _figure_legend(figure, handles, texts, 4 if columns == 3 else 2)
    return figure


def _figure_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], most: int) -> None:
    """A legend below all panels, in at most so many columns, as many as fit."""
    ncols = max(1, min(most, int(14 * figure.get_figwidth() / max(map(len, labels)))))
    figure.legend(handles, list(map(_plain, labels)), loc="outside lower center", ncols=ncols, frameon=False)


def _compared(df: pd.DataFrame, metric: str, x: str | None) -> Figure:
    """`compare` on a figure that pyplot does not know."""
    groups, shown, x = _lines_by_scope(df, metric, x)
    with matplotlib.rc_context(STYLE):
        width, height = _compare_size(groups, shown)
        figure = _figure(height, width)
        _compare_panels(figure, groups, shown, metric, x, _central_name(df))
    return figure


def _lines_by_scope(
    df: pd.DataFrame, metric: str, x: str | None
) -> tuple[list[tuple[str, pd.DataFrame]], dict[str, dict[int, np.ndarray]], str]:
    """The settings; of each scope that has any: number of a setting -> its mean line [points, 2]; and the axis."""
    require_metric(df, metric, "validation")
    x, _ = _axis(df, x)
    groups = settings(df)
    lines: dict[str, dict[int, np.ndarray]] = {scope: {} for scope in SCOPES}
    for number, (_, rows) in enumerate(groups):
        found = [traces(part, metric) for _, part in rows.groupby("run", observed=True)]
        members = {
            "local": [list(one.local.values()) for one in found if one.local],
            "federated": [[one.merged] for one in found if len(one.merged)],
            "central": [[one.central] for one in found if len(one.central)],
        }
        for scope, runs in members.items():
            if runs and (scale := _scale(rows, scope, x)) is not None:
                grid, values = _bundle(runs)
                line = np.column_stack([np.interp(grid, *scale), values.mean(axis=0)])
                lines[scope][number] = line[grid > 0]
    return groups, {scope: found for scope, found in lines.items() if found}, x


def _compare_size(groups: Sequence[Any], shown: dict[str, Any]) -> tuple[float, float]:
    return max(2.4 * len(shown), WIDTH), 2.8 + 0.17 * -(-len(groups) // len(shown))


def _compare_panels(
    figure: Figure,
    groups: Sequence[tuple[str, Any]],
    shown: dict[str, dict[int, np.ndarray]],
    metric: str,
    x: str,
    central: str,
) -> np.ndarray:
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    entries = _draw_settings(panels, groups, shown, metric, x, central)
    for panel in panels:
        panel.label_outer()
    _figure_legend(figure, [handle for handle, _ in entries], [label for _, label in entries], len(shown))
    return panels


def _draw_settings(
    panels: Sequence[Axes],
    groups: Sequence[tuple[str, Any]],
    shown: dict[str, dict[int, np.ndarray]],
    metric: str,
    x: str,
    central: str,
) -> list[tuple[Any, str]]:
    """Draw a scope's settings on each panel; returns the legend's entries."""
    entries: dict[int, Any] = {}
    titles = {
        "local": "local, mean of sites",
        "federated": "federated, merged",
        "central": central.replace(" (", "\n("),
    }
    for panel, (scope, found) in zip(panels, shown.items(), strict=True):
        for at, line in found.items():
            look = {"color": CYCLE[at % 7], "linestyle": ("-", "--", ":")[at // 7 % 3], "marker": "os^Dv"[at % 5]}
            (entries[at],) = panel.plot(*line.T, markersize=3.5, linewidth=1.3, markevery=-(-len(line) // 6), **look)
        panel.set_title(titles[scope])
        _dress(panel, metric, x, "validation")
    return [(entries[at], groups[at][0]) for at in sorted(entries)]


def _independent(table: pd.DataFrame, x: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A sweep's centralised models that do not depend on x, and all its other rows."""
    central, others = table["scope"] == "central", table[table["scope"] != "central"]
    if x in SKEW_LABELS:
        alone = central & ~table["run"].isin(others["run"])  # its run has a partition, but trained no site on it
    else:
        alone = central & table[x].isna()
        if table.loc[central, x].nunique() == 1 and others[x].nunique() > 1:
            alone = central
    return table[alone], table[~alone]


def _skew_key(table: pd.DataFrame) -> str | None:
    """The key of the partition with the most values: cells of equal other keys are joined along it."""
    keys = {key: table[key].nunique() for key in swept_keys(table) if key.split(".")[0] == "partition"}
    keys = {key: count for key, count in keys.items() if count > 1}
    return max(keys, key=keys.__getitem__) if keys else None


def _varied(table: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """Those of the keys in which the models of sites (of all, where there are only centralised ones) differ."""
    trained = table[table["scope"] != "central"]
    rows = trained if len(trained) else table
    apart = [key for key in keys if rows[key].nunique(dropna=False) > 1]
    return [key for key in apart if not _is_told(rows, key)]


def _is_told(rows: pd.DataFrame, section: str) -> bool:
    """Whether the text of a swept section says no more than its own swept keys do, as where only the centralised runs have another."""
    keys = [key for key in swept_keys(rows) if key.startswith(f"{section}.")]
    return bool(keys) and int(rows.groupby(keys, dropna=False)[section].nunique(dropna=False).max()) == 1


def _number_settings(means: pd.DataFrame, levels: pd.DataFrame, keys: Sequence[str]) -> list[tuple[Any, ...]]:
    """The settings of cells, values of `keys` (None where missing), sites' first; numbers them in a column `setting`.

    A centralised model that names none of the keys belongs to no setting: -1.
    """
    settings: list[tuple[Any, ...]] = []
    for frame in (means, levels):
        held = [frame[key].astype(object).tolist() if key in frame else [None] * len(frame) for key in keys]
        found = [tuple(None if pd.isna(row[n]) else row[n] for row in held) for n in range(len(frame))]
        sites_first = frame["scope"].map(SCOPES.index).argsort(kind="stable").tolist()
        for n in sites_first:
            central_alone = frame["scope"].iloc[n] == "central" and keys and not any(v is not None for v in found[n])
            if found[n] not in settings and not central_alone:
                settings.append(found[n])
        frame["setting"] = [settings.index(one) if one in settings else -1 for one in found]
    return settings


def _say(value: Any, most: int = 30) -> str:
    text = say(value)
    return text if len(text) <= most else f"{text[: most - 12]}\N{HORIZONTAL ELLIPSIS}{text[-11:]}"


def _say_all(values: Sequence[Any]) -> list[str]:
    """Each value in as few letters as tell all of them apart, from 30 on."""
    for most in (30, 60, 120):
        texts = [_say(value, most) for value in values]
        if len(set(texts)) == len({say(value) for value in values}):
            return texts
    return [say(value) for value in values]


def _say_setting(keys: Sequence[str], setting: Sequence[Any]) -> str:
    """A setting's values in a few words: `num_clients = 10`; a section's text or a component's name alone."""
    parts = []
    for key, value in zip(keys, setting, strict=True):
        short = key.rpartition(".")[2]
        if value is not None:
            bare = isinstance(value, str) and ("." not in key or short == "name")
            parts.append(_say(value) if bare else f"{short} = {_say(value)}")
    return ", ".join(parts) or "otherwise"


def _handle(color: str, look: tuple[Any, str], joined: bool, marks: str | None = None) -> Line2D:
    style = {"markersize": 4.5, "markerfacecolor": marks or color, "markeredgecolor": marks or color}
    return Line2D([], [], color=color, linestyle=look[0] if joined else "", marker=look[1], linewidth=1.4, **style)


def _draw_runs(ax: Axes, table: pd.DataFrame, x: str, value: str) -> None:
    """A light dot for each run and scope; of local models the mean over sites."""
    runs = table.groupby(["scope", "run"], sort=False)[[x, value]].mean().reset_index()
    for scope in SCOPES:
        dots = runs[runs["scope"] == scope]
        ax.scatter(dots[x], dots[value], s=14, color=SCOPE_LOOKS[scope][1], alpha=0.3, linewidths=0, zorder=2)


def _draw_cells(
    ax: Axes, means: pd.DataFrame, settings: int, shift: float, with_interval: bool, joined: bool
) -> list[tuple[Any, str]]:
    """A scope's means in its colour, a setting's in its line and marker; returns the legend's entries of the scopes."""
    entries = []
    scopes = [scope for scope in SCOPES if (means["scope"] == scope).any()]
    for number, scope in enumerate(scopes):
        color, marks, name = SCOPE_LOOKS[scope]
        of_scope = means[means["scope"] == scope]
        if settings > len(LINES):
            for _, line in of_scope.sort_values("x", kind="stable").groupby("setting"):
                mark = "." if len(line) == 1 or not joined else None
                ax.plot(line["x"], line["mean"], color=color, linewidth=0.5 * joined, alpha=0.5, marker=mark)
            middle = of_scope.groupby("along", sort=False).agg(x=("x", "mean"), y=("mean", "mean"), count=("x", "size"))
            middle = middle[middle["count"] == of_scope["setting"].nunique()].sort_values("x")
            look = {"marker": "o", "markersize": 4.5, "linewidth": 2.2 * joined, "zorder": 4 + number}
            ax.plot(middle["x"], middle["y"], color=color, markerfacecolor=marks, markeredgecolor=marks, **look)
            entries.append((_handle(color, ("-", "o"), joined, marks), name))
            continue
        dashed = scope == "central" and settings == 1
        for setting, line in of_scope.groupby("setting"):
            line = line.sort_values("x", kind="stable")
            at, mean = line["x"].to_numpy(float), line["mean"].to_numpy(float)
            place = max(int(setting), 0)
            at = at + shift * (number * settings + place - (len(scopes) * settings - 1) / 2)
            style = {"markersize": 4.5, "markerfacecolor": marks, "markeredgecolor": marks, "linewidth": 1.4}
            style |= {"linestyle": (DASHED if dashed else LINES[place][0]) if joined else "", "marker": LINES[place][1]}
            known = with_interval and line["low"].notna().any()
            spread = np.clip([mean - line["low"], line["high"] - mean], 0.0, None) if known else None
            ax.errorbar(at, mean, yerr=spread, elinewidth=1.0, capsize=2.0, color=color, zorder=4 + number, **style)
        mark = "o" if settings == 1 or not joined else "."
        entries.append((_handle(color, (DASHED if dashed else "-", mark), joined, marks), name))
    return entries


def _draw_levels(ax: Axes, levels: pd.DataFrame, settings: int, named: bool) -> list[tuple[Any, str]]:
    """Horizontal lines of centralised models, with their intervals; returns the legend's entry."""
    color = SCOPE_LOOKS["central"][0]
    for mean, low, high, setting in levels[["mean", "low", "high", "setting"]].itertuples(index=False):
        look = LINES[setting][0] if setting >= 0 and 1 < settings <= len(LINES) else DASHED
        ax.axhline(mean, color=color, linestyle=look, linewidth=1.3, zorder=3)
        if np.isfinite(low):
            ax.axhspan(low, high, color=color, alpha=0.1, linewidth=0, zorder=1)
    return (
        [(Line2D([], [], color=color, linestyle=DASHED, linewidth=1.3), SCOPE_LOOKS["central"][2])]
        if named and len(levels)
        else []
    )


def _legend_note(means: pd.DataFrame, levels: pd.DataFrame, x: str, settings: int) -> str:
    """What marks and bars mean, for the head of the legend."""
    if settings > len(LINES):
        small, large = ("thin", "thick") if pd.api.types.is_numeric_dtype(means[x]) else ("small", "large")
        return f"{'dots: runs; ' * (x in SKEW_LABELS)}{small}: each of {settings} settings; {large}: their mean"
    if x in SKEW_LABELS:
        return "dots: runs; lines: mean of each setting"
    counts = pd.concat([means["runs"], levels["runs"]]).astype(int)
    if counts.max() < 2:
        return "one run each"
    runs = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.max()}"
    return f"mean and 95 % interval over {runs} runs"


def _score_label(metric: str, value: str) -> str:
    split = {"own": "site", "test": "test"}.get(value, "validation")
    return ("best " if value == "best" else "") + _value_label(metric, split).replace(" (", "\n(")


def _is_wide(values: Any) -> bool:
    values = np.asarray(values, dtype=float)
    return len(values) > 0 and bool(values.min() > 0) and bool(values.max() > WIDE * values.min())


def _grid(ax: Axes, metric: str, signed: bool = False) -> None:
    ax.grid(color="#E5E5E5", linewidth=0.6)
    ax.set_axisbelow(True)
    _fit(ax.yaxis, metric, signed)


def _fit(axis: Axis, metric: str, signed: bool = False) -> None:
    """Scale an axis of scores, or of their differences (`signed`): logarithmic where a loss falls far, and never zoomed into noise.

    Shares of examples span a tenth at least, other metrics a tenth of their mean.
    """
    along_y = axis.axis_name == "y"
    low, high = axis.axes.dataLim.intervaly if along_y else axis.axes.dataLim.intervalx
    if not (np.isfinite(low) and np.isfinite(high)):
        return
    if (
        "loss" in metric and not signed and low > 0 and high > WIDE_LOSS * low
    ):  # or the first point would flatten all the rest
        (axis.axes.set_yscale if along_y else axis.axes.set_xscale)("log")
        _name_decades(axis)
        return
    share = metric in SHARES
    middle, least = (low + high) / 2.0, LEAST_SPAN * (1.0 if share else abs(low + high) / 2.0)
    if high - low < least:
        if share and not signed and low >= 0.0 and high <= 1.0:
            middle = float(np.clip(middle, least / 2.0, 1.0 - least / 2.0))
        ends = np.array([middle - least / 2.0, middle + least / 2.0])
        at = axis.axes.dataLim.intervalx if along_y else axis.axes.dataLim.intervaly
        # as if there were points: the axis goes on scaling itself, with others that share it
        axis.axes.update_datalim(np.column_stack([at, ends] if along_y else [ends, at]))
        axis.axes.autoscale_view()


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


def _name_decades(axis: Axis) -> None:
    """Labelled ticks on a log axis; others are left as they are."""
    if axis.get_scale() == "log":
        axis.set_major_locator(_LogTicks())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _tick_values(ax: Axes, values: np.ndarray, log: bool) -> None:
    """Ticks at the values that were swept, named where the names do not touch; the first and the last always."""
    place = np.log10(values) if log else values
    inches = 0.9 * _inches(ax) * (place - place[0]) / max(place[-1] - place[0], 1e-12)
    half = 0.5 * np.array([0.058 * len(say(float(value))) + 0.05 for value in values])  # of a name, in inches

    def apart(one: int, other: int) -> bool:
        return abs(inches[one] - inches[other]) >= half[one] + half[other]

    last, named = len(values) - 1, [0]
    for number in range(1, last):
        if apart(number, named[-1]) and apart(number, last):
            named.append(number)
    named += [last] if last > 0 else []
    ax.xaxis.set_major_locator(FixedLocator(values[named]))
    ax.xaxis.set_major_formatter(lambda value, _: say(float(value)))
    ax.xaxis.set_minor_locator(FixedLocator([value for n, value in enumerate(values) if n not in named]))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _name_places(ax: Axes, names: Sequence[str]) -> float:
    """Names at 0, 1, ...: broken into lines where there is room, else upright; returns how many lines they take."""
    letters = int(_inches(ax) / len(names) / 0.065)
    texts = [_say(name) for name in names]
    ax.set_xlim(-0.5, len(names) - 0.5)
    upright = letters < min(8, max(map(len, texts)))
    if not upright:
        texts = [_broken(text, letters) for text in texts]
    ax.set_xticks(range(len(names)), texts, rotation=90 if upright else 0)
    ax.tick_params(axis="x", length=0)
    return _tick_lines(ax)


def _broken(text: str, letters: int) -> str:
    """Text in lines of about so many letters, broken after spaces and `_`, where `textwrap` would split words."""
    lines = [""]
    for part in re.findall(r"[^ _]*[ _]?", text):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > letters:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _tick_lines(ax: Axes) -> float:
    """How many lines of text the names of the ticks take below the axes."""
    labels = ax.get_xticklabels()
    if any(label.get_rotation() for label in labels):
        return max(0.52 * len(label.get_text()) for label in labels)
    return float(max((label.get_text().count("\n") + 1 for label in labels), default=1))


def _shades(values: Sequence[Any]) -> list[str]:
    """A colour for each value: numbers from dark to light in their order, names from the palette."""
    if all(isinstance(value, str) for value in values):
        return list(CYCLE[1 : len(values) + 1])
    return [to_hex(matplotlib.colormaps["viridis"](place)) for place in np.linspace(0.0, 0.88, len(values))]


def _bin_medians(at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Medians [bins, 2] of both in up to ten bins of like many points, eight or more each; empty where that is one bin."""
    count = min(10, len(at) // 8)
    if count < 2 or len(np.unique(at)) < 2:
        return np.empty((0, 2))
    bins = pd.qcut(at, count, labels=False, duplicates="drop")
    return pd.DataFrame({"at": at, "value": values}).groupby(bins).median().to_numpy()


def _draw_curves(
    ax: Axes, df: pd.DataFrame, metric: str, x: str | None, split: str, name_sites: bool = False
) -> list[tuple[Any, str]]:
    """Draw one setting's runs; returns the legend's entries."""
    x, scales = _axis(df, x)
    found = [traces(rows, metric, split) for _, rows in df.groupby("run", observed=True)]
    several = len(found) > 1
    of_runs = f"range of {len(found)} runs"
    entries: list[tuple[Any, str]] = []
    local = [list(one.local.values()) for one in found if one.local]
    if local and (scale := scales["local"]):
        grid, values = _bundle(local)
        band, line = _banded(ax, np.interp(grid, *scale), values, LOCAL, 0.15, linewidth=2.2, zorder=4)
        for curve in [] if several else local[0]:
            width = max(0.2, 0.65 - 0.01 * len(local[0]))
            ax.plot(np.interp(curve[:, 0], *scale), curve[:, 1], color=LOCAL, linewidth=width, alpha=0.6, zorder=2)
        entries.append(((band, line), f"local, {of_runs}" if several else "local sites, mean and range"))
    central = [[one.central] for one in found if len(one.central)]
    if central and (scale := scales["central"]):
        grid, values = _bundle(central)
        band, line = _banded(ax, np.interp(grid, *scale), values, CENTRAL, 0.12, linewidth=1.3, linestyle=(0, (4, 2)))
        entries.append(((band, line) if several else line, _central_name(df)))
    federated = [one for one in found if one.clients or len(one.merged)]
    if federated and (scale := scales["federated"]):
        places, values, at_merge = _saw_tooth(federated)
        at = np.interp(places, *scale)
        band, line = _banded(ax, at, values, FEDERATED, 0.25 if several else 0.0, linewidth=1.7, zorder=5)
        clients = f"federated, {of_runs}" if several else "federated clients, mean"
        entries.append(((band, line) if several else line, clients))
        (dots,) = ax.plot(at[at_merge], values.mean(axis=0)[at_merge], "o", color=MERGED, markersize=4.5, zorder=6)
        entries.append((dots, "merged model"))
    _dress(ax, metric, x, split)
    if name_sites and local and not several and scales["local"] and len(found[0].local) <= 6:
        last = {name: curve[-1] for name, curve in found[0].local.items()}
        _label_ends(ax, {n: (float(np.interp(at, *scales["local"])), float(v)) for n, (at, v) in last.items()})
    return entries


def _draw_clients(
    ax: Axes,
    df: pd.DataFrame,
    found: Sequence[Traces],
    metric: str,
    split: str,
    scale: tuple[np.ndarray, np.ndarray],
    looks: dict[str, tuple[str, str]],
) -> None:
    """Each client inside each round, from the merged model that the round began with, in the colour of its site."""
    rows = df[(df["scope"] == "federated") & (df["split"] == split) & (df["name"] == metric) & df["client"].notna()]
    for number in sorted(set.intersection(*(set(one.clients) for one in found))):
        # `traces` has the clients of a round in the order of their ids.
        ids = sorted(rows.loc[rows["round"] == number, "client"].unique())
        if any(len(one.clients[number]) != len(ids) for one in found):
            continue  # other seeds, other cohorts: there is no mean of one client
        for place, name in enumerate(ids):
            curve = _mean([one.clients[number][place] for one in found])
            color = looks.get(name, ("#999999", ""))[0]
            ax.plot(np.interp(curve[:, 0], *scale), curve[:, 1], color=color, linewidth=0.8, alpha=0.75, zorder=2)


def _draw_start(ax: Axes, found: Sequence[Traces], entries: list[tuple[Any, str]]) -> None:
    """A square on the model before training, whichever of the curves begin with it."""
    curves_of = [[one.merged, one.central, *one.local.values()] for one in found]
    starts = [float(curve[0, 1]) for members in curves_of for curve in members if len(curve) and curve[0, 0] == 0]
    if starts:
        value = float(np.mean(starts))
        (mark,) = ax.plot([0.0], [value], "s", color="black", markersize=4.5, zorder=7)
        entries.append((mark, f"before training: {value:.3g}"))


def _banded(ax: Axes, at: np.ndarray, values: np.ndarray, color: str, alpha: float, **look: Any) -> tuple[Any, Any]:
    band = ax.fill_between(at, values.min(axis=0), values.max(axis=0), color=color, alpha=alpha, linewidth=0, zorder=1)
    (line,) = ax.plot(at, values.mean(axis=0), color=color, **look)
    return band, line


def _saw_tooth(found: Sequence[Traces]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Federated curves as far as all runs have come: positions [n], values [runs, n], which are merged models [n]."""
    merged = [dict(one.merged) for one in found]
    places, values, at_merge = [np.empty(0)], [np.empty((len(found), 0))], [np.empty(0, dtype=bool)]
    for number in sorted({int(key) for one in found for key in (*one.clients, *one.merged[:, 0])}):
        if all(number in one.clients for one in found):
            grid, inside = _stack([_mean(one.clients[number]) for one in found])
            places.append(grid)
            values.append(inside)
            at_merge.append(np.zeros(len(grid), dtype=bool))
        if all(number in one for one in merged):
            places.append(np.array([float(number)]))
            values.append(np.array([[one[number]] for one in merged]))
            at_merge.append(np.array([number > 0]))  # the model before training is no merge
    return np.concatenate(places), np.concatenate(values, axis=1), np.concatenate(at_merge)


def _mean(members: Sequence[np.ndarray]) -> np.ndarray:
    grid, values = _stack(members)
    return np.column_stack([grid, values.mean(axis=0)])


def _stack(members: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Curves [n, 2] on one grid: the positions [G] that all of them reach, values [members, G]."""
    grid = np.unique(np.concatenate([one[:, 0] for one in members]))
    grid = grid[(grid >= max(one[0, 0] for one in members)) & (grid <= min(one[-1, 0] for one in members))]
    return grid, np.stack([np.interp(grid, one[:, 0], one[:, 1]) for one in members])


def _bundle(runs: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The curves of one run, or the mean curve of each of several, on one grid."""
    return _stack(runs[0]) if len(runs) == 1 else _stack([_mean(run) for run in runs])


def _axis(df: pd.DataFrame, x: str | None) -> tuple[str, dict[str, tuple[np.ndarray, np.ndarray] | None]]:
    """The axis that `x` stands for, a key of `X_LABELS`, and each scope's scale on it."""
    if x not in (None, *X_LABELS):
        raise UserError(f"x={x!r} is not an axis; use one of {', '.join(key for key in X_LABELS if key != 'own_step')}")
    alike = _same_steps(df)
    if x is None:
        there = [scope for scope in SCOPES if (df["scope"] == scope).any()]
        known = all(_scale(df, scope, "tokens") for scope in there)
        x = "step" if alike else "tokens" if known else "round"
    scales = {scope: _scale(df, scope, x) for scope in SCOPES}
    if all(scale is None for scale in scales.values()):
        raise _no_axis(x)
    return "own_step" if x == "step" and not alike else x, scales


def _same_steps(df: pd.DataFrame) -> bool:
    """Whether centralized models do as many optimizer steps in each round as the clients of their run, or of some run."""
    runs = [rows for _, rows in df.groupby("run", observed=True)]
    sites_of = [_steps(rows, "local") for rows in runs if (rows["scope"] != "central").any()]
    for rows in runs:
        if not (rows["scope"] == "central").any():
            continue
        own = [_steps(rows, "local")] if (rows["scope"] != "central").any() else sites_of
        pairs = [pd.concat([_steps(rows, "central"), other], axis=1, join="inner") for other in own]
        if pairs and not any((pair[0] == pair[1]).all() for pair in pairs):
            return False
    return True


def _scale(df: pd.DataFrame, scope: str, x: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Rounds and where their ends lie on axis `x` for a scope (mean over runs); None where it has no rows for that."""
    ends = []
    for _, run in df.groupby("run", observed=True):
        rows = run[run["scope"] == scope]
        if rows.empty:
            continue
        if x == "round":
            ends.append(pd.Series(np.arange(int(run["round"].max()) + 1.0)))
        elif x in ("step", "own_step"):
            ends.append(_steps(run, scope))
        elif x == "seconds":
            clock = rows[~rows["split"].isin(("test", "run"))].groupby("round")["seconds"].max().dropna()
            ends.append(clock - clock.get(0, rows["seconds"].min()))
        elif x == "simulated":
            clock = rows[(rows["split"] == "simulated") & (rows["name"] == "seconds") & rows["client"].isna()]
            if len(clock):
                ends.append(pd.concat([pd.Series({0: 0.0}), clock.set_index("round")["value"]]))
        else:
            spent = rows[rows["name"].isin(("bytes_up", "bytes_down") if x == "bytes" else ("tokens",))]
            total = spent[spent["round"] > 0].groupby("round")["value"].sum().cumsum() / (2**20 if x == "bytes" else 1)
            ends.append(total if total.empty else pd.concat([pd.Series({0: 0.0}), total]))
    mean = pd.concat([pd.Series(dtype=float), *ends], axis=1).sort_index().mean(axis=1).dropna()
    return (mean.index.to_numpy(float), mean.to_numpy(float)) if len(mean) else None


def _steps(run: pd.DataFrame, scope: str) -> pd.Series:
    """Optimizer steps at each round's end: the centralized model's, or those of the client that is furthest."""
    scopes = [scope] if scope == "central" else [s for s in ("federated", "local") if (run["scope"] == s).any()]
    return pd.concat([round_ends(run, s) for s in scopes], axis=1).max(axis=1).sort_index()


def _central_name(df: pd.DataFrame) -> str:
    """The centralized model's name in a legend, with what of the clients' budget it has."""
    found = df.loc[df["scope"] == "central"]
    budget = central_budget(found["central.match"].dropna().unique()) if "central.match" in df else ""
    return f"centralized ({budget})" if budget else "centralized"


def _no_axis(x: str) -> UserError:
    missing = {"tokens": "tokens rows", "bytes": "bytes_up or bytes_down rows", "simulated": "simulated seconds"}.get(
        x, f"{x} values"
    )
    return UserError(f"x={x!r}: these runs recorded no {missing}; use x='step' or x='round'")


def _dress(ax: Axes, metric: str, x: str, split: str) -> None:
    ax.set(xlabel=X_LABELS[x], ylabel=_value_label(metric, split).replace(" (", "\n("))
    ax.grid(color="#E5E5E5", linewidth=0.6)
    ax.set_axisbelow(True)
    if x == "tokens":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=x in ("step", "own_step", "round")))
    _fit(ax.yaxis, metric)


def _value_label(metric: str, split: str) -> str:
    whose = "own validation" if split == "site" else split
    return f"{whose} {Y_LABELS.get(metric, metric.replace('_', ' '))}"


class _EndLabel(Annotation):
    """A name at the end of a curve; names that would touch are moved up or down as little as can be, when they are drawn."""

    group: list[_EndLabel]

    def update_positions(self, renderer: Any) -> None:
        axes, fontsize = self.axes, renderer.points_to_pixels(self.get_fontsize())
        ends = np.array([axes.transData.transform(label.xy) for label in self.group])
        # a name stands in the way of those that begin left of its own end
        near = np.abs(ends[:, 0] - axes.transData.transform(self.xy)[0]) < 8.0 * fontsize
        group = [label for label, one in zip(self.group, near, strict=True) if one]
        places = _spread(ends[near, 1], 1.15 * fontsize)
        at = group.index(self)
        shift = (places[at] - ends[near][at, 1]) / renderer.points_to_pixels(1.0)
        self.set_position((4.0, shift))
        super().update_positions(renderer)

    def get_tightbbox(self, renderer: Any = None) -> Any:
        # `Text` takes the offset for a place in the data, of which a log axis has none at 0. The room beside it is for the
        # curve's end, which moves as the layout makes the axes narrower.
        box = self.get_window_extent(renderer)
        return Bbox.from_extents(box.x0, box.y0, box.x1 + 0.15 * box.width, box.y1)


def _spread(at: np.ndarray, least: float) -> np.ndarray:
    """Places at least so far apart, in the same order, with the least sum of squared moves: isotonic regression."""
    order = np.argsort(at, kind="stable")
    slack = np.arange(len(at)) * least
    blocks: list[list[float]] = []  # mean, count
    for value in at[order] - slack:
        blocks.append([float(value), 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (mean, count), (before, more) = blocks.pop(), blocks.pop()
            blocks.append([(mean * count + before * more) / (count + more), count + more])
    out = np.empty(len(at))
    out[order] = np.repeat([mean for mean, _ in blocks], [int(count) for _, count in blocks]) + slack
    return out


def _label_ends(ax: Axes, ends: dict[str, tuple[float, float]], colors: dict[str, str] | None = None) -> None:
    """Name curves where they end: name -> its last point."""
    group: list[_EndLabel] = []
    for name, point in ends.items():
        look = {
            "color": (colors or {}).get(name, LOCAL),
            "fontsize": 7.5,
            "va": "center",
            "zorder": 8,
            "clip_on": False,
        }
        label = _EndLabel(_plain(name), point, xytext=(4.0, 0.0), textcoords="offset points", **look)
        label.set_path_effects([withStroke(linewidth=2.0, foreground="white")])
        label.group = group
        group.append(ax.add_artist(label))
    _settle(ax)


def _settle(*axes: Axes) -> None:
    """Scale the axes now: the layout leaves no room for labels that lie outside the limits of before."""
    for ax in axes:
        ax.get_xlim(), ax.get_ylim()


def _inches(ax: Axes) -> float:
    return float(ax.get_window_extent().width / ax.figure.dpi)


def _legend_below(
    ax: Axes, entries: Sequence[tuple[Any, str]], title: str | None = None, tick_lines: float = 1.0
) -> None:
    # in points below the axes, past tick labels and axis label: it holds for axes of any size
    drop = 1.2 * (ax.xaxis.label.get_size() + tick_lines * ax.xaxis.get_ticklabels()[0].get_size()) + 12
    place = offset_copy(ax.transAxes, ax.figure, y=-drop, units="points")
    handles, labels = [handle for handle, _ in entries], [_plain(label) for _, label in entries]
    look = {"frameon": False, "borderaxespad": 0.0, "columnspacing": 1.2, "handlelength": 2.4, "fontsize": 8}
    look["ncols"] = _legend_columns(ax, labels)
    ax.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=place,
        title=title,
        title_fontsize=8,
        **look,
    )


def _legend_columns(ax: Axes, labels: Sequence[str]) -> int:
    half = -(-len(labels) // 2)  # matplotlib fills the first column first
    letters = sum(max(map(len, column), default=0) for column in (labels[:half], labels[half:]))
    return 2 if _inches(ax) > max(3.2, 0.058 * letters + 0.2) else 1


def _grow(ax: Axes, tick_lines: float = 1.0) -> None:
    """Make room for a legend of more than two lines, its title, and names of ticks of more than one."""
    legend = ax.get_legend()
    labels = [text.get_text() for text in legend.get_texts()]
    rows = -(-len(labels) // _legend_columns(ax, labels)) + bool(legend.get_title().get_text())
    more = 0.16 * max(0, rows - 2) + 0.13 * (tick_lines - 1.0)
    ax.figure.set_figheight(ax.figure.get_figheight() + more)


def _plain(text: Any) -> str:
    """A name out of the user's data: no formula, whatever dollars it holds, and nothing that has no glyph."""
    return visible(str(text), lines=True).replace("$", r"\$")


def _name_ticks(axis: Axis, names: Sequence[str], most: int) -> None:
    """Names on the ticks 0, 1, ...; where there are more than `most`, on about eight of them."""
    count = len(names)
    at = np.arange(count) if count <= most else np.unique(np.linspace(0, count - 1, 8).astype(int))
    short = [
        name if len(name) <= 18 else f"{name[:10]}\N{HORIZONTAL ELLIPSIS}{name[-7:]}" for name in map(_plain, names)
    ]
    axis.set_ticks(at, [short[place] for place in at])
    axis.set_tick_params(length=0 if count <= most else 3)


def _recorded(df: pd.DataFrame, metric: str | None) -> list[str]:
    if metric is not None:
        require_metric(df, metric, "validation")
        return [metric]
    names = set(df.loc[df["split"] == "validation", "name"])
    return [name for name in METRICS if name in names]


def _style(ax: Axes | None) -> AbstractContextManager[None]:
    """Our style for axes of our own; a user's axes keep theirs."""
    if ax is not None:
        return nullcontext()
    import matplotlib.pyplot as plt

    # The first figure switches to the backend, a notebook's too; inside rc_context that switch would be undone again.
    plt.close(plt.figure())
    return matplotlib.rc_context(STYLE)


def _new_axes(height: float) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(WIDTH, height), layout="constrained")[1]


def _figure(height: float, width: float = WIDTH) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


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
