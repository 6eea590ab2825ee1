"""Figures: the curves of runs, each client's, settings against each other, and the files of a run's figures.

Every function draws on the axes it is given, or on new ones of pyplot's, which a notebook shows at the end of its cell.
Figures of clients and classes are in `client_plots`, those of a sweep in `sweep_plots`; all are reached from here.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from fedsim.analysis import load, style
from fedsim.analysis.client_plots import confusion, partition, sites, spread, spread_table
from fedsim.analysis.configs import NO_SETTING, name_settings
from fedsim.analysis.cross_site import cross_site, sites_matrix
from fedsim.analysis.load import PathLike
from fedsim.analysis.scores import central_budget
from fedsim.analysis.style import CENTRAL, DPI, FEDERATED, FORMATS, GLOBAL, LOCAL, STYLE, WIDTH, X_LABELS, save_figure
from fedsim.analysis.sweep_plots import gains, save_sweep, scores
from fedsim.analysis.ticks import label_ends, score_axis, settle
from fedsim.analysis.traces import bundle, mean_curve, saw_tooth, scale_of, scales_of, stack, traces
from fedsim.core.errors import Notice, UserError
from fedsim.core.files import CROSS, check_own

__all__ = ["CENTRAL", "DPI", "FEDERATED", "FORMATS", "GLOBAL", "LOCAL", "STYLE", "WIDTH", "X_LABELS"]
__all__ += ["compare", "confusion", "curves", "each_site", "gains", "panels", "partition", "plot_runs"]
__all__ += ["save_figure", "save_figures", "save_sweep", "scores", "settings", "sites", "sites_matrix", "spread"]
METRICS = ("accuracy", "loss", "exact_match")
Entries = dict[str, tuple[Any, str]]  # kind of line -> its handle and its label in the legend


def curves(
    df: pd.DataFrame, ax: Axes | None = None, metric: str = "accuracy", x: str | None = None, split: str = "validation"
) -> Axes:
    """Local-only, federated and centralized training.

    Local-only: a thin line per client, their mean and their range. Federated: the mean of the cohort's clients inside each
    round, the jump at each aggregation, a red dot at each global model. Centralized: dashed; the legend says which part
    of the clients' budget it has, by `central.match`. With several runs each line is the mean over runs, as far as all of
    them go, and each band their range.

    Args:
        df: rows of one or more runs from `load_runs`; a warning says so where they differ in more than the seed.
        ax: axes to draw on; None makes new ones.
        metric: "accuracy", "loss", "exact_match" or any other recorded name.
        x: "step" (optimizer steps: of a client, the furthest where they differ, and the centralized model's own),
            "round", or the scope's own running total of "tokens" (trained on, all clients), "seconds" (wall clock since
            the scope's training began) or "bytes" (up and down, all clients). A scope without that total, as one that
            sends nothing, is left out. None: steps where the centralized model does as many as a client, else tokens.
        split: "validation", or "site" for each client's own validation examples.

    Raises:
        UserError: an unknown x or metric, or x = tokens, seconds or bytes where no scope recorded them.
    """
    load.require_metric(df, metric, split)
    if len(groups := settings(df)) > 1:
        labels = "; ".join(label for label, _ in groups[:4])
        text = f"curves draws one mean over {len(groups)} settings ({labels}); filter first or use compare"
        warnings.warn(text, Notice, stacklevel=2)
    with style.canvas(ax, 3.4) as ax:
        style.legend_below(ax, list(_draw_curves(ax, df, metric, x, split).values()))
    return ax


def each_site(
    df: pd.DataFrame, ax: Axes | None = None, metric: str = "loss", x: str | None = None, split: str = "validation"
) -> Axes:
    """A few clients that differ in kind: each local-only model in a color and with a marker of its own, against federated
    and centralized.

    Federated: the saw-tooth of the clients' mean, thick, with each client's own in its color, thin; a red dot at each
    global model. Centralized: dashed. The square at the start, with its value, is the model before training. With
    several runs each line is the mean over runs, as far as all of them go.

    Args:
        df: rows of one run, or of runs that differ in the seed alone, from `load_runs`.
        ax: axes to draw on; None makes new ones.
        metric, x, split: as in `curves`.

    Raises:
        UserError: an unknown x or metric, more clients than there are colors, or no curve on that axis.
    """
    load.require_metric(df, metric, split)
    with style.canvas(ax, 3.6) as ax:
        style.legend_below(ax, list(_draw_curves(ax, df, metric, x, split, each=True).values()))
    return ax


def _draw_curves(ax: Axes, df: pd.DataFrame, metric: str, x: str | None, split: str, each: bool = False) -> Entries:
    """Draw the runs of one setting; `each`: every client's curves, and the model before training."""
    x, scales = scales_of(df, x)
    found = [traces(rows, metric, split) for _, rows in df.groupby("run", observed=True)]
    several, of_runs = len(found) > 1, f"range of {len(found)} runs"
    entries: Entries = {}

    def draw(scope: str, at: np.ndarray, values: np.ndarray, color: str, band: float, **look: Any) -> Any:
        """The mean of values [curves, n] at positions [n], and their range in a band."""
        at = np.interp(at, *scales[scope])
        (line,) = ax.plot(at, values.mean(axis=0), color=color, **look)
        if each or not band or len(values) == 1:
            return line
        low, high = values.min(axis=0), values.max(axis=0)
        return ax.fill_between(at, low, high, color=color, alpha=band, linewidth=0, zorder=1), line

    local = [one.local for one in found if one.local] if scales["local"] else []
    names = [name for name in local[0] if all(name in one for one in local)] if local else []
    looks = dict(zip(names, style.CLIENT_LOOKS, strict=False)) if each else {}
    if each and len(names) > len(style.CLIENT_LOOKS):
        raise UserError(f"{len(names)} local-only clients, and {len(style.CLIENT_LOOKS)} can be told apart; use curves")
    for name, (color, marker) in looks.items():
        look = {"marker": marker, "markersize": 3.0, "linewidth": 1.3, "zorder": 3}
        line = draw("local", *stack(one[name] for one in local), color, 0.0, **look)
        entries[name] = (line, f"{name}, local-only")
    if local and not each:
        handle = draw("local", *bundle([one.values() for one in local]), style.LOCAL, 0.15, linewidth=2.2, zorder=4)
        entries["local"] = (handle, f"local-only, {of_runs}" if several else "local-only, mean and range")
        for curve in [] if several else local[0].values():
            look = {"linewidth": max(0.2, 0.65 - 0.01 * len(local[0])), "alpha": 0.6, "zorder": 2}
            ax.plot(np.interp(curve[:, 0], *scales["local"]), curve[:, 1], color=style.LOCAL, **look)
    central = [[one.central] for one in found if len(one.central)]
    if central and scales["central"]:
        look = {"linewidth": 1.6 if each else 1.3, "linestyle": style.DASHED, "zorder": 4 if each else 2}
        entries["central"] = (draw("central", *bundle(central), style.CENTRAL, 0.12, **look), _central_name(df))
    federated = [one for one in found if one.clients or len(one.merged)]
    if federated and scales["federated"]:
        rounds = set.intersection(*(set(one.clients) for one in federated)) if each else ()
        for clients in ([one.clients[number] for one in federated] for number in sorted(rounds)):
            for name in clients[0] if all(one.keys() == clients[0].keys() for one in clients) else ():
                color = (
                    looks[name][0] if name in looks else style.GREY
                )  # with other cohorts there is no mean of one client
                look = {"linewidth": 0.8, "alpha": 0.75, "zorder": 2}
                draw("federated", *stack(one[name] for one in clients), color, 0.0, **look)
        at, values, aggregated = saw_tooth(federated)
        handle = draw("federated", at, values, style.FEDERATED, 0.25, linewidth=2.2 if each else 1.7, zorder=5)
        entries["federated"] = (handle, f"federated, {of_runs}" if several and not each else "federated clients, mean")
        look = {"linestyle": "", "marker": "o", "markersize": 4.5, "zorder": 6}
        dots = draw("federated", at[aggregated], values[:, aggregated], style.GLOBAL, 0.0, **look)
        entries["global"] = (dots, "global model")
    first = [
        c[0, 1] for one in found for c in (one.merged, one.central, *one.local.values()) if len(c) and c[0, 0] == 0
    ]
    if each and first:
        (mark,) = ax.plot([0.0], [np.mean(first)], "s", color="black", markersize=4.5, zorder=7)
        entries["start"] = (mark, f"before training: {np.mean(first):.3g}")
    _dress(ax, metric, x, split)
    if each or (local and not several and len(names) <= 6):
        last = {name: mean_curve(one[name] for one in local)[-1] for name in names}
        ends = {
            name: (float(np.interp(place, *scales["local"])), float(value)) for name, (place, value) in last.items()
        }
        label_ends(ax, ends, {name: looks[name][0] if each else style.LOCAL for name in names})
    return entries


def _central_name(df: pd.DataFrame) -> str:
    """The centralized model's name in a legend, with what of the clients' budget it has."""
    found = df.loc[df["scope"] == "central"]
    budget = central_budget(found["central.match"].dropna().unique()) if "central.match" in df else ""
    return f"centralized ({budget})" if budget else "centralized"


def _dress(ax: Axes, metric: str, x: str, split: str) -> None:
    ax.set(xlabel=style.X_LABELS[x], ylabel=style.value_label(metric, split))
    if x == "tokens":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=x in ("step", "own_step", "round")))
    score_axis(ax.yaxis, metric)


def settings(df: pd.DataFrame, seeds_apart: bool = False) -> list[tuple[str, pd.DataFrame]]:
    """Runs by setting: (what tells it from the others, its rows), in the order of the rows.

    A setting is the config but for `seed` (unless `seeds_apart`) and but for what no result depends on. The label is what
    varies, as `alpha = 0.1, lr = 1e-05`; of more than three keys those that tell most; a run's id where nothing else tells
    it from the others.
    """
    skip = {*load.COLUMNS, "run", *NO_SETTING} - {"modes"} | (set() if seeds_apart else {"seed"})
    config = df.drop_duplicates("run").set_index("run").rename_axis(None)
    config = config[[key for key in config if key.split(".")[0] not in skip]].astype(object)
    config = config.map(lambda value: None if value != value else value)
    told = config.map(str).assign(run=config.index.astype(str))
    by = [key for key in told if told[key].nunique() > 1 and (key != "run" or seeds_apart)]
    members = [runs.index for _, runs in told.groupby(by, sort=False)] if by else [told.index]
    labels = name_settings([config.loc[runs[0]].dropna().to_dict() for runs in members])
    groups = []
    for label, runs in zip(labels, members, strict=True):
        unlike = str(runs[0]) if len(runs) == 1 else f"{len(runs)} runs"
        shown = label if label and labels.count(label) == 1 else ", ".join(filter(None, (label, unlike)))
        groups.append((shown, df[df["run"].isin(runs)]))
    return groups


def panels(groups: Sequence[tuple[str, pd.DataFrame]], metric: str, x: str | None = None) -> Figure:
    """Curves of one to four settings, a panel each, with one scale and one legend.

    Args:
        groups: title and rows from `load_runs` of each setting.
        metric: a name recorded on the validation examples of all.
        x: as in `curves`, of all the rows together.
    """
    columns = len(groups) if len(groups) <= 3 else 2
    lines = -(-len(groups) // columns)
    every = pd.concat([rows for _, rows in groups])
    x, central = scales_of(every, x)[0], _central_name(every)
    titles = [textwrap.fill(title, {1: 60, 2: 34}.get(columns, 30)) for title, _ in groups]
    found: list[Entries] = []
    with style.offscreen():
        height = 1.1 + (2.5 if columns == 1 else 2.2) * lines + 0.14 * max(title.count("\n") for title in titles)
        figure = style.new_figure(height, style.WIDTH if columns == 1 else 2.7 * columns + 0.4)
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for ax, title, (_, rows) in zip(axes, titles, groups, strict=True):
            found.append(_draw_curves(ax, rows, metric, x, "validation"))
            own = _central_name(rows)
            if own != central and (rows["scope"] == "central").any():  # the legend cannot say it for all panels
                title += f"\n{own.replace(' (', ': ').rstrip(')')}"
            ax.set_title(title, fontsize=style.STYLE["axes.titlesize"] - (columns > 1))
            ax.label_outer()
        settle(*axes)
        common = {"local": "local-only, mean", "federated": "federated clients, mean", "central": central}
        entries = []
        for kind in dict.fromkeys(kind for one in found for kind in one):
            labels = {one[kind][1]: one[kind][0] for one in reversed(found) if kind in one}
            text, handle = next(reversed(labels.items()))
            entries.append((handle, text if len(labels) == 1 else common[kind]))
        style.figure_legend(figure, entries, 4 if columns == 3 else 2)
    return figure


def compare(
    df: pd.DataFrame, metric: str = "accuracy", x: str | None = None, axes: Sequence[Axes] | None = None
) -> np.ndarray:
    """Settings against each other: a panel per scope, a line per setting (the mean over its seeds).

    Args:
        df: rows of several runs from `load_runs`; federated lines join the global models. The untrained model, the
            same for all, is left out: it would press the differences together.
        metric: a name recorded on the validation examples.
        x: as in `curves`.
        axes: axes to draw on, one for each scope that the runs have, in the order local, federated, central; None
            makes new ones.

    Returns:
        The axes, an array [scopes].

    Raises:
        UserError: no run recorded the metric, none recorded what x asks for, or `axes` is not one for each scope.
    """
    load.require_metric(df, metric, "validation")
    x, _ = scales_of(df, x)
    groups = settings(df)
    lines: dict[str, dict[int, np.ndarray]] = {scope: {} for scope in load.SCOPES}
    for number, (_, rows) in enumerate(groups):
        found = [traces(part, metric) for _, part in rows.groupby("run", observed=True)]
        members = {
            "local": [one.local.values() for one in found if one.local],
            "federated": [[one.merged] for one in found if len(one.merged)],
            "central": [[one.central] for one in found if len(one.central)],
        }
        for scope, runs in members.items():
            if runs and (scale := scale_of(rows, scope, x)):
                grid, values = bundle(runs)
                lines[scope][number] = np.column_stack([np.interp(grid, *scale), values.mean(axis=0)])[grid > 0]
    shown = {scope: of_scope for scope, of_scope in lines.items() if of_scope}
    if axes is not None:
        if len(axes) != len(shown):
            raise UserError(f"axes: {len(axes)} given, but these runs have {len(shown)} scopes: {', '.join(shown)}")
        entries = _draw_settings(axes, shown, groups, metric, x, _central_name(df))
        style.legend_below(axes[len(axes) // 2], entries)
        return np.array(list(axes), dtype=object)
    height, width = 2.8 + 0.17 * -(-len(groups) // len(shown)), max(2.4 * len(shown), style.WIDTH)
    with style.own_figure(height, width) as figure:
        axes = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
        style.figure_legend(figure, _draw_settings(axes, shown, groups, metric, x, _central_name(df)), len(shown))
        for ax in axes:
            ax.label_outer()
    return axes


def _draw_settings(
    axes: Sequence[Axes], shown: dict[str, Any], groups: Sequence[Any], metric: str, x: str, central: str
) -> list[tuple[Any, str]]:
    """A scope's lines on each of the axes, by number of the setting; returns the legend's entries."""
    titles = {scope: name for scope, (_, _, name) in style.SCOPE_LOOKS.items()}
    titles["central"] = central.replace(" (", "\n(")
    entries: dict[int, Any] = {}
    for ax, (scope, lines) in zip(axes, shown.items(), strict=True):
        for at, line in lines.items():
            look = {"color": style.CYCLE[at % 7], "linestyle": ("-", "--", ":")[at // 7 % 3], "marker": "os^Dv"[at % 5]}
            look |= {"markersize": 3.5, "linewidth": 1.3, "markevery": -(-len(line) // 6)}
            (handle,) = ax.plot(*line.T, **look)
            entries[at] = (handle, groups[at][0])
        ax.set_title(titles[scope])
        _dress(ax, metric, x, "validation")
    return [entries[at] for at in sorted(entries)]


# ---------------------------------------------------------------------------------------------------------- files


def save_figures(
    run_path: PathLike,
    out: PathLike | None = None,
    metric: str | None = None,
    x: str | None = None,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Write one run's figures: `accuracy.png`, `loss.png`, `exact_match.png`, `partition.png`, those it has data for, and
    `confusion.png` of the chosen global and centralized models on the test examples, `cross_site.png` of every model on every
    client's validation examples, `clients.png` of how the models do over the clients.

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
    df = load.load_runs(folder)
    figures = {}
    with style.offscreen():
        for name in _recorded(df, metric):
            figures[_curves_file(name, x)] = curves(df, None, name, x).figure
        if (folder / "partition.json").is_file() and (report := load.load_partition(folder)).get("class_counts"):
            figures["partition"] = partition(report).figure
        predicted = load.class_predictions(folder, "test") if metric is None else {}
        if models := [model for model in ("federated", "central") if model in predicted]:
            figures["confusion"] = style.new_figure(3.4, 1.2 + 3.3 * len(models))
            axes = figures["confusion"].subplots(1, len(models), squeeze=False)[0]
            for ax, model in zip(axes, models, strict=True):
                confusion(load.confusion_matrix(folder, model), ax, f"{model}, test")
        best = metric or next(iter(df.get("best.metric", ())), "loss")
        if len(spread_table(df, best)) > 1:
            figures["clients"] = spread(df, None, best).figure
        if best in set(df.loc[df["split"].astype(str).str.startswith(CROSS), "name"]):
            figures["cross_site"] = sites_matrix(cross_site(folder, best), None, best).figure
    target = folder / "figures" if out is None else Path(out)
    if folder in target.parents:
        check_own(folder)
    return [file for name, figure in figures.items() for file in save_figure(figure, target / name, formats)]


def _recorded(df: pd.DataFrame, metric: str | None) -> list[str]:
    if metric is not None:
        load.require_metric(df, metric, "validation")
        return [metric]
    names = set(df.loc[df["split"] == "validation", "name"])
    return [name for name in METRICS if name in names]


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
    folders = load.find_runs(paths)
    if len(folders) == 1:
        return save_figures(folders[0], out, metric, x, formats)
    df = load.load_runs(folders)
    written = []
    for name in _recorded(df, metric):
        scored = df.loc[(df["name"] == name) & (df["split"] == "validation"), "run"].unique()
        rows = df[df["run"].isin(scored)]
        groups = settings(rows, seeds_apart=len(scored) <= 4)
        if len(groups) <= 4:
            figure = panels(groups, name, x)
        else:
            with style.offscreen():
                figure = compare(rows, name, x)[0].figure
        written += save_figure(figure, Path(out) / _curves_file(name, x), formats)
    return written
