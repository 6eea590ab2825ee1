"""Figures of clients and classes: the partition, confusion matrices, each client's scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fedsim.analysis.configs import say
from fedsim.analysis.load import PathLike, load_partition, metric_mode, rows_of
from fedsim.analysis.style import (
    CENTRAL,
    FEDERATED,
    GLOBAL,
    GREY,
    LOCAL,
    REST,
    canvas,
    inches,
    legend_below,
    line_handle,
    plain,
    value_label,
)
from fedsim.analysis.ticks import name_ticks, score_axis
from fedsim.core.errors import UserError
from fedsim.core.files import CROSS

NAMED = 30  # clients whose names and numbers still fit


def partition(report: dict[str, Any] | PathLike, ax: Axes | None = None) -> Axes:
    """Heat map of a partition: clients x classes, examples per cell, with the clients' sizes beside it.

    Of virtual clients those that the report holds, at most 1,000 of them; the title says so.

    Args:
        report: a run folder, or the report that `load_partition` reads from it; used are `class_counts` `[C][L]` and, where
            present, `class_names` `[L]`, `client_names` `[C]`, `num_clients`, `js_mean` (bits) and `size_gini`.

    Raises:
        UserError: the report has no class counts.
    """
    if not isinstance(report, dict):
        report = load_partition(report)
    if not report.get("class_counts"):
        raise UserError("the partition report holds no class_counts; give what load_partition(run) returns")
    counts = np.atleast_2d(np.asarray(report["class_counts"], dtype=np.int64))
    clients, classes = counts.shape
    sizes = counts.sum(axis=1)
    top, largest = max(int(counts.max()), 1), max(int(sizes.max()), 1)
    with canvas(ax, min(1.5 + 0.27 * clients, 5.5)) as ax:
        image = ax.imshow(counts, cmap="Blues", aspect="auto", vmin=0, vmax=top)
        name_ticks(ax.xaxis, report.get("class_names") or range(classes), 20)
        name_ticks(ax.yaxis, report.get("client_names") or [f"site-{n + 1}" for n in range(clients)], NAMED)
        labels = ax.get_xticklabels()
        letter = 0.6 * labels[0].get_size() / 72.0  # a letter's width in inches, roughly
        if letter * sum(len(label.get_text()) + 2 for label in labels) > 0.75 * inches(ax):
            ax.tick_params(axis="x", labelrotation=90)
        write_cells(ax, counts, counts / top, visible=clients <= NAMED and len(str(top)) * classes <= 30)
        side = ax.inset_axes((1.02, 0.0, 0.15, 1.0), sharey=ax)
        edges = np.repeat(np.arange(clients + 1) - 0.5, 2)[1:-1]
        side.fill_betweenx(edges, 0, np.repeat(sizes, 2), color=REST, linewidth=0)
        if clients <= NAMED:
            side.hlines(np.arange(1, clients) - 0.5, 0, largest, color="white", linewidth=1.0)
            for row, size in enumerate(sizes):
                side.text(0.05 * largest, row, str(size), va="center", fontsize=8)
        side.set(xlim=(0, largest), xticks=[], xlabel="size")
        side.tick_params(axis="y", left=False, labelleft=False)
        side.spines[:].set_visible(False)
        shape = {"pad": 0.03, "fraction": 0.06, "aspect": 20 if clients <= 12 else 40}
        ax.figure.colorbar(image, ax=ax, label="examples", **shape).outline.set_visible(False)
        facts = (("mean JS divergence {:.3f} bits", "js_mean"), ("size Gini {:.2f}", "size_gini"))
        title = ", ".join(text.format(report[key]) for text, key in facts if report.get(key) is not None)
        every = report.get("num_clients", clients)
        ax.set_title(f"a sample of {clients:,} of {every:,} clients\n{title}" if every > clients else title)
        ax.set(xlabel="class", ylabel="client")
    return ax


def confusion(table: pd.DataFrame, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Heat map of a confusion matrix: each true class's share of predictions as color, the examples as numbers.

    Args:
        table: what `confusion_matrix(run)` returns.
        ax: axes to draw on; None makes a figure.
        title: None leaves it out.
    """
    counts = table.to_numpy(np.int64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with canvas(ax, 3.4) as ax:
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        name_ticks(ax.xaxis, table.columns, 12)
        name_ticks(ax.yaxis, table.index, 12)
        ax.tick_params(axis="x", labelrotation=90)
        write_cells(ax, counts, shares, visible=len(counts) <= 12)
        ax.set(xlabel="predicted", ylabel="label", title=title or "")
    return ax


def write_cells(
    ax: Axes, values: np.ndarray, shades: np.ndarray, visible: bool, form: Callable[[Any], str] = str, size: float = 8
) -> None:
    """A frame around the cells; each cell's number, if visible, readable on its shade (0 to 1)."""
    ax.spines[:].set(visible=True, color=REST)
    for (row, column), value in np.ndenumerate(values) if visible else ():
        color = "white" if shades[row, column] > 0.55 else "black"
        ax.text(column, row, form(value), ha="center", va="center", color=color, fontsize=size)


def _by_client(df: pd.DataFrame, scope: str, split: str, name: str, value: str = "value") -> pd.Series:
    """Each client's last value of a metric, averaged over runs."""
    rows = df[(df["scope"] == scope) & (df["split"] == split) & (df["name"] == name)]
    ends = rows[rows["client"].notna()].groupby(["run", "client"], sort=False, observed=True)[value].last()
    return ends.groupby("client", sort=False).mean()


def spread_table(df: pd.DataFrame, metric: str = "accuracy") -> pd.DataFrame:
    """How models do on each client's own validation examples, as rounds and cross-site evaluation tell: what `spread` draws.

    Returns:
        float64 [clients, 2 per kind], columns (kind, "value" or "examples"); the kinds that there are, of `local` (the client's
        local-only model), `own` (the one it keeps in the federated mode), `global` and `central`.
    """
    last = df[df["value"].notna()].astype({"scope": object, "split": object, "name": object})
    site = last["split"].str.removeprefix(CROSS).where(last["split"].str.startswith(CROSS))
    home = last[(last["scope"] == "federated") & (last["client"] == site)]
    last = pd.concat(  # where a round recorded the same, that holds
        [
            home.assign(split="site", name="own_" + home["name"]),
            last.assign(client=site, split="site")[(last["scope"] == "central") & site.notna()],
            last,
        ]
    )
    names = {"local": metric, "own": f"own_{metric}", "global": f"merged_{metric}", "central": metric}
    found = {
        (kind, what): _by_client(
            last, {"own": "federated", "global": "federated"}.get(kind, kind), "site", name, column
        )
        for kind, name in names.items()
        for what, column in (("value", "value"), ("examples", "weight"))
    }
    return pd.DataFrame(found).dropna(axis="columns", how="all")


_KINDS = {"local": (LOCAL, "local-only"), "own": (FEDERATED, "own model"), "global": (GLOBAL, "global model")}
_KINDS |= {"central": (CENTRAL, "centralized")}


def spread(df: pd.DataFrame, ax: Axes | None = None, metric: str = "accuracy") -> Axes:
    """How models do over the clients, each on its own validation examples: a dot per client, quantiles, mean and the worst client.

    Values are the last recorded, averaged over runs; the mean is weighted by the clients' examples.

    Raises:
        UserError: no client was evaluated with this metric on examples of its own.
    """
    table = spread_table(df, metric)
    if table.empty:
        raise UserError(f"no client has scores of {metric!r} on validation examples of its own")
    kinds = list(dict.fromkeys(kind for kind, _ in table.columns))
    better = metric_mode(metric)
    with canvas(ax, 1.5 + 0.55 * len(kinds)) as ax:
        ax.margins(x=0.1)
        for row, kind in enumerate(kinds):
            color, part = _KINDS[kind][0], table[kind].dropna()
            values = part["value"].to_numpy()
            worst = int(values.argmin() if better == "max" else values.argmax())
            low, q25, median, q75, high = np.quantile(values, (0.1, 0.25, 0.5, 0.75, 0.9))
            ax.hlines(row, low, high, color=color, linewidth=1.2)
            ax.hlines(row, q25, q75, color=color, linewidth=6.0, alpha=0.35)
            ax.vlines(median, row - 0.14, row + 0.14, color=color, linewidth=1.6)
            at = row - 0.26 + 0.1 * (np.arange(len(values)) % 3 - 1) * (len(values) > NAMED)
            ax.plot(
                values, np.broadcast_to(at, values.shape), "o", color=color, markersize=3.0, alpha=0.6, clip_on=False
            )
            mean = np.average(values, weights=part["examples"])
            ax.plot(mean, row, "D", color="white", markeredgecolor=color, markersize=5.0, zorder=4)
            ax.plot(values[worst], row, "x", color="black", markersize=5.0, zorder=5)
            name = say(plain(part.index[worst]), 18)
            above = {"xytext": (0, -10), "textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 7}
            ax.annotate(name, (values[worst], row), **above)
        ax.set_yticks(range(len(kinds)), [_KINDS[kind][1] for kind in kinds])
        ax.tick_params(axis="y", length=0)
        ax.set(ylim=(len(kinds) - 0.4, -0.55), xlabel=value_label(metric, "site").replace("\n", " "))
        score_axis(ax.xaxis, metric, grid="x")
        marks = [
            (line_handle(GREY, marker="o", markersize=3.0), "client"),
            (line_handle("black", marker="x"), "worst client"),
        ]
        marks += [(line_handle(GREY, "-", "", linewidth=1.2), "10 % to 90 % of the clients")]
        marks += [(line_handle(GREY, "-", "", linewidth=6.0, alpha=0.35), "25 % to 75 %")]
        marks += [(line_handle(GREY, marker="|", markersize=8.0, markeredgewidth=1.6), "median")]
        marks += [(line_handle("white", marker="D", markeredgecolor=GREY), "mean, by examples")]
        legend_below(ax, marks)
    return ax


def sites(df: pd.DataFrame, ax: Axes | None = None, metric: str = "accuracy") -> Axes:
    """Per client: its local-only model against the global one, on the client's own validation examples and on the shared
    ones.

    Values are the last recorded, averaged over runs. Clients stand in the order of the rows; beyond 30 in the order of
    what the global model gains on their own examples.

    Raises:
        UserError: no client was evaluated with this metric.
    """
    last = df[df["value"].notna()]
    table = pd.DataFrame(
        {
            "local own": _by_client(last, "local", "site", metric),
            "global own": _by_client(last, "federated", "site", f"merged_{metric}"),
            "local shared": _by_client(last, "local", "validation", metric),
        }
    )
    if table.empty:
        raise UserError(f"no client has scores of {metric!r}: run the local or the federated mode with validation on")
    table = table.loc[[client for client in last["client"].unique() if client in table.index]]
    shared = rows_of(last[(last["split"] == "validation") & (last["name"] == metric)], "federated")
    table["global shared"] = shared.groupby("run", observed=True)["value"].last().mean()
    few = len(table) <= NAMED
    if not few:
        table = table.loc[(table["global own"] - table["local own"]).sort_values(kind="stable").index]
    with canvas(ax, 1.5 + 0.36 * len(table) if few else 6.0) as ax:
        entries: list[tuple[Any, str]] = []
        for examples, shift in (("own", -0.17), ("shared", 0.17)):
            at = np.arange(len(table)) + shift
            ends = (table[f"local {examples}"], table[f"global {examples}"])
            ax.hlines(at, *ends, color=GREY, linewidth=1.0 if few else 0.4)
            for values, color, marker, model in zip(
                ends, (LOCAL, GLOBAL), "so", ("local-only", "global model"), strict=True
            ):
                if values.notna().any():
                    look = {"color": color, "markerfacecolor": color if examples == "own" else "white"}
                    (dots,) = ax.plot(values, at, marker, markersize=5.5 if few else 2.0, zorder=3, **look)
                    entries.append((dots, f"{model}, {examples} examples"))
        name_ticks(ax.yaxis, table.index, NAMED)
        ax.set(ylim=(len(table) - 0.5, -0.5), xlabel=value_label(metric).replace("\n", " "))
        score_axis(ax.xaxis, metric, grid="x")
        legend_below(ax, entries)
    return ax
