"""Figures of a sweep, from `sweep_table()`: scores against what was swept and against measured skew, each client's gain."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from fedsim.analysis import style
from fedsim.analysis.configs import say
from fedsim.analysis.load import SCOPES, PathLike, load_runs
from fedsim.analysis.method_plots import AXES, PANELS, compared, methods, panel_keys
from fedsim.analysis.sweeps import cells, sweep_table, swept_keys
from fedsim.analysis.ticks import is_wide, name_decades, name_places, score_axis, tick_values
from fedsim.core.errors import UserError
from fedsim.core.files import check_own

SKEW_LABELS = {
    "js_mean": "mean JS divergence of the clients' labels (bits)",
    "size_gini": "Gini coefficient of the clients' sizes",
}
CLIENT_LABELS = {"rows": "training examples of the client", "js": "JS divergence of the client's labels (bits)"}
KEY_LABELS = {"partition.alpha": "Dirichlet alpha", "partition.num_clients": "clients"}


def scores(table: pd.DataFrame, x: str = "partition.alpha", ax: Axes | None = None, value: str = "last") -> Axes:
    """Local-only, federated and centralized scores of a sweep, against a swept key or the measured skew of the partitions.

    Against a swept key: the mean of each cell (see `fedsim.analysis.sweeps.cells`) with its 95 % bootstrap interval over
    runs, on a log axis where the values span more than 20 times the least; text, such as adapters, side by side. Against
    `js_mean` or `size_gini`: a light dot for each run, and the cell means joined in their order.

    Further keys that were swept are told apart by line and marker; beyond four such settings each is a thin line
    without a name, and a thick one is the mean over them, where all of them have a value. Centralized models that do
    not depend on x - of runs without that key, or all of one value - are a horizontal line with its interval.

    Args:
        table: from `sweep_table`; filter it to leave settings out.
        x: a swept key, "js_mean" (bits) or "size_gini".
        ax: axes to draw on; None makes new ones.
        value: "last", "best", "own" or "test".

    Raises:
        UserError: an unknown x or value, or no run has both.
    """
    keys, skew = swept_keys(table), x in SKEW_LABELS
    if x not in keys and not skew:
        raise UserError(f"x={x!r} was not swept; use one of {', '.join([*keys, *SKEW_LABELS])}")
    if value not in ("last", "best", "own", "test"):
        raise UserError(f"value={value!r} is no score of all three; use one of last, best, own, test")
    budget = table.attrs.get("central_budget")
    flat, table = _independent(table[table[value].notna()], x)
    table = table[table[x].notna()]
    if table.empty:
        raise UserError(f"no run has both {x} and the score {value!r}; choose another x or value")
    along = _skew_key(table) if skew else x
    apart = _varied(table, [key for key in keys if key != along])
    means = cells(table, [along, *apart] if along else apart, value)
    levels = cells(flat, [key for key in apart if key in _varied(flat, apart)], value)
    settings = _number_settings(means, levels, apart)
    numeric = pd.api.types.is_numeric_dtype(means[x])
    names = [] if numeric else list(dict.fromkeys(means[x]))
    means = means.assign(along=means[along] if along else "", x=(means[x] if numeric else means[x].map(names.index)))
    means["x"] = means["x"].astype(float)
    metric = str(pd.concat([flat, table])["metric"].iloc[0])
    with style.canvas(ax, 3.4) as ax:
        if numeric and not skew and is_wide(means["x"]):
            ax.set_xscale("log")
        if skew:
            runs = table.groupby(["scope", "run"], sort=False)[[x, value]].mean().reset_index("scope")
            for scope in SCOPES:
                dots, color = runs[runs["scope"] == scope], style.SCOPE_LOOKS[scope][1]
                ax.scatter(dots[x], dots[value], s=14, color=color, alpha=0.3, linewidths=0, zorder=2)
        entries = _draw_cells(ax, means, len(settings), joined=numeric, intervals=not skew)
        drawn = _draw_levels(ax, levels, len(settings))
        entries = {**drawn, **entries}
        if budget and "central" in entries:
            entries["central"] = (entries["central"][0], f"{style.SCOPE_LOOKS['central'][2]} ({budget})")
        named = [entries[scope] for scope in SCOPES if scope in entries]
        for setting, (line, marker) in (
            zip(settings, style.LINES, strict=False) if 1 < len(settings) <= len(style.LINES) else ()
        ):
            named.append((style.line_handle("#666666", line if numeric else "", marker), _say_setting(apart, setting)))
        ax.set(xlabel=SKEW_LABELS.get(x) or KEY_LABELS.get(x, x))
        split = {"own": "site", "test": "test"}.get(value, "validation")
        ax.set(ylabel=style.value_label(metric, split, "best " * (value == "best")))
        score_axis(ax.yaxis, metric)
        name_decades(ax.yaxis)
        if names:
            name_places(ax, names)
        elif not skew:
            tick_values(ax, np.unique(means["x"]))
        style.legend_below(ax, named, _legend_note(means, levels, numeric, skew, len(settings)))
    return ax


def _independent(table: pd.DataFrame, x: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A sweep's centralized models that do not depend on x, and all its other rows."""
    central, others = table["scope"] == "central", table[table["scope"] != "central"]
    if x in SKEW_LABELS:
        alone = central & ~table["run"].isin(others["run"])  # its run has a partition, but trained no client on it
    elif table.loc[central, x].nunique() == 1 and others[x].nunique() > 1:
        alone = central
    else:
        alone = central & table[x].isna()
    return table[alone], table[~alone]


def _skew_key(table: pd.DataFrame) -> str | None:
    """The key of the partition with the most values: cells of equal other keys are joined along it."""
    counts = table[[key for key in swept_keys(table) if key.split(".")[0] == "partition"]].nunique()
    return str(counts.idxmax()) if (counts > 1).any() else None


def _varied(table: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """Those of the keys in which the models of clients (of all, where there are only centralized ones) differ."""
    trained = table[table["scope"] != "central"]
    rows = trained if len(trained) else table
    apart = [key for key in keys if rows[key].nunique(dropna=False) > 1]
    return [key for key in apart if not _is_told(rows, key)]


def _is_told(rows: pd.DataFrame, section: str) -> bool:
    """Whether the text of a swept section says no more than its own swept keys do, as where only the centralized runs have
    another.
    """
    keys = [key for key in swept_keys(rows) if key.startswith(f"{section}.")]
    return bool(keys) and int(rows.groupby(keys, dropna=False)[section].nunique(dropna=False).max()) == 1


def _number_settings(means: pd.DataFrame, levels: pd.DataFrame, keys: Sequence[str]) -> list[tuple[Any, ...]]:
    """The settings of cells, values of `keys` (None where missing), clients' first; numbers them in a column `setting`.

    A centralized model that names none of the keys belongs to no setting: -1.
    """
    numbers: dict[tuple[Any, ...], int] = {}
    for frame in (means, levels):
        held = frame.reindex(columns=list(keys)).astype(object)
        found = [tuple(row) for row in held.where(held.notna(), None).to_numpy()]
        none = (frame["scope"] == "central") & held.isna().all(axis=1) & bool(keys)
        for at in frame["scope"].map(SCOPES.index).argsort(kind="stable"):
            if not none.iloc[at]:
                numbers.setdefault(found[at], len(numbers))
        frame["setting"] = [numbers.get(one, -1) for one in found]
    return list(numbers)


def _say_setting(keys: Sequence[str], setting: Sequence[Any]) -> str:
    """A setting's values in a few words: `num_clients = 10`; a section's text or a component's name alone."""
    parts = []
    for key, value in zip(keys, setting, strict=True):
        short = key.rpartition(".")[2]
        if value is not None:
            bare = isinstance(value, str) and ("." not in key or short == "name")
            parts.append(say(value, 30) if bare else f"{short} = {say(value, 30)}")
    return ", ".join(parts) or "otherwise"


def _draw_cells(
    ax: Axes, means: pd.DataFrame, settings: int, joined: bool, intervals: bool
) -> dict[str, tuple[Any, str]]:
    """A scope's means in its color, a setting's in its line and marker; returns the legend's entries of the scopes."""
    entries, many = {}, settings > len(style.LINES)
    scopes = [scope for scope in SCOPES if (means["scope"] == scope).any()]
    shift = 0.0 if joined else min(0.16, 0.7 / max(1, len(scopes) * min(settings, len(style.LINES))))
    for number, scope in enumerate(scopes):
        color, marks, name = style.SCOPE_LOOKS[scope]
        look = {"color": color, "markerfacecolor": marks, "markeredgecolor": marks, "markersize": 4.5}
        dashes = style.DASHED if scope == "central" and settings == 1 else "-"
        mark = "o" if many or settings == 1 or not joined else "."
        entries[scope] = (style.line_handle(line=dashes if joined else "", marker=mark, **look), name)
        look["zorder"] = 4 + number
        of_scope = means[means["scope"] == scope].sort_values("x", kind="stable")
        for setting, line in of_scope.groupby("setting"):
            at, mean = line["x"].to_numpy(float), line["mean"].to_numpy(float)
            if many:
                mark = "." if len(line) == 1 or not joined else None
                ax.plot(at, mean, color=color, linewidth=0.5 * joined, alpha=0.5, marker=mark)
                continue
            place = max(int(setting), 0)
            at = at + shift * (number * settings + place - (len(scopes) * settings - 1) / 2)
            dashed = (dashes if settings == 1 else style.LINES[place][0]) if joined else ""
            known = intervals and line["low"].notna().any()
            spread = np.clip([mean - line["low"], line["high"] - mean], 0.0, None) if known else None
            bars = {"yerr": spread, "elinewidth": 1.0, "capsize": 2.0}
            ax.errorbar(at, mean, linewidth=1.4, linestyle=dashed, marker=style.LINES[place][1], **bars, **look)
        if many:
            middle = of_scope.groupby("along", sort=False).agg(x=("x", "mean"), y=("mean", "mean"), count=("x", "size"))
            middle = middle[middle["count"] == of_scope["setting"].nunique()].sort_values("x")
            ax.plot(middle["x"], middle["y"], marker="o", linewidth=2.2 * joined, **look)
    return entries


def _draw_levels(ax: Axes, levels: pd.DataFrame, settings: int) -> dict[str, tuple[Any, str]]:
    """Horizontal lines of centralized models, with their intervals; returns the legend's entry."""
    color, _, name = style.SCOPE_LOOKS["central"]
    for mean, low, high, setting in levels[["mean", "low", "high", "setting"]].itertuples(index=False):
        line = style.LINES[setting][0] if setting >= 0 and 1 < settings <= len(style.LINES) else style.DASHED
        ax.axhline(mean, color=color, linestyle=line, linewidth=1.3, zorder=3)
        if np.isfinite(low):
            ax.axhspan(low, high, color=color, alpha=0.1, linewidth=0, zorder=1)
    return {"central": (style.line_handle(color, style.DASHED, "", linewidth=1.3), name)} if len(levels) else {}


def _legend_note(means: pd.DataFrame, levels: pd.DataFrame, numeric: bool, skew: bool, settings: int) -> str:
    """What marks and bars mean, for the head of the legend."""
    if settings > len(style.LINES):
        small, large = ("thin", "thick") if numeric else ("small", "large")
        return f"{'dots: runs; ' * skew}{small}: each of {settings} settings; {large}: their mean"
    if skew:
        return "dots: runs; lines: mean of each setting"
    counts = pd.concat([means["runs"], levels["runs"]]).astype(int)
    if counts.max() < 2:
        return "one run each"
    return f"mean and 95 % interval over {' to '.join(map(str, sorted({counts.min(), counts.max()})))} runs"


def gains(table: pd.DataFrame, x: str = "rows", ax: Axes | None = None, value: str = "gain_own") -> Axes:
    """What federation gains each client, against the client's size or the skew of its labels: a dot per client and run.

    Above the zero line the global model is better than the client's local-only one, whichever way the metric goes. The
    black line joins the medians of bins of like many clients, eight or more each. Colors tell the values of the first
    swept key that has two to six.

    Args:
        table: from `sweep_table`; filter it to leave settings out.
        x: "rows" (training examples, on a log axis where they span more than 20 times the least) or "js" (bits).
        ax: axes to draw on; None makes new ones.
        value: "gain_own" (on the client's own validation examples) or "gain" (on the shared ones).

    Raises:
        UserError: an unknown x or value, or no client has both.
    """
    if x not in CLIENT_LABELS:
        raise UserError(f"x={x!r} is nothing measured of a client; use one of {', '.join(CLIENT_LABELS)}")
    if value not in ("gain_own", "gain"):
        raise UserError(f"value={value!r} is no gain of a client; use gain_own or gain")
    keys, metric = swept_keys(table), str(table["metric"].iloc[0]) if len(table) else ""
    table = table[(table["scope"] == "local") & table[x].notna() & table[value].notna()]
    if table.empty:
        raise UserError(f"no client has both {x} and {value}; they need runs with modes local and federated")
    table = table.sort_values("client", kind="stable")  # so that no run lies on top of all others
    at, gain = table[x].to_numpy(float), table[value].to_numpy(float)
    key = next((key for key in keys if 2 <= table[key].nunique() <= 6), None)
    values = cells(table, [key], value)[key].dropna().tolist() if key else []
    shades = dict(zip(values, _shades(values), strict=True))
    with style.canvas(ax, 3.4) as ax:
        if x == "rows" and is_wide(at):
            ax.set_xscale("log")
        ax.axhline(0.0, color="#555555", linewidth=1.0, linestyle="--", zorder=2)
        size = float(np.clip(2500.0 / len(table), 5.0, 16.0))
        colors = table[key].map(shades).fillna(style.GREY).tolist() if key else style.LOCAL
        ax.scatter(at, gain, s=size, c=colors, alpha=0.5, linewidths=0, zorder=3)
        named = {say(one, 30): color for one, color in shades.items()} or {"one client of one run": style.LOCAL}
        entries = [(style.line_handle(color, markersize=4), text) for text, color in named.items()]
        if len(middle := _bin_medians(at, gain)):
            (line,) = ax.plot(*middle.T, color="black", marker="o", markersize=3.5, linewidth=1.6, zorder=5)
            entries.append((line, "median of a bin"))
        whose = "site" if value == "gain_own" else "validation"
        ax.set(xlabel=CLIENT_LABELS[x], ylabel=style.value_label(metric, whose, "gain from federation,\n"))
        score_axis(ax.yaxis, metric, signed=True)
        name_decades(ax.xaxis)
        style.legend_below(ax, entries, KEY_LABELS.get(key, key))
    return ax


def _shades(values: Sequence[Any]) -> list[str]:
    """A color for each value: numbers from dark to light in their order, names from the palette."""
    if all(isinstance(value, str) for value in values):
        return list(style.CYCLE[1 : len(values) + 1])
    return [to_hex(matplotlib.colormaps["viridis"](place)) for place in np.linspace(0.0, 0.88, len(values))]


def _bin_medians(at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Medians [bins, 2] of both in up to ten bins of like many points, eight or more each; empty where that is one bin."""
    count = min(10, len(at) // 8)
    if count < 2 or len(np.unique(at)) < 2:
        return np.empty((0, 2))
    bins = pd.qcut(at, count, labels=False, duplicates="drop")
    return pd.DataFrame({"at": at, "value": values}).groupby(bins).median().to_numpy()


def save_sweep(
    path: PathLike, out: PathLike | None = None, metric: str | None = None, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Write a sweep's figures, those it has data for.

    `score_by_<key>.png` for each swept key (but seed) with two or more values, `score_by_skew.png` (against the mean JS
    divergence, where the partition was swept), `gain_by_size.png` and `gain_by_skew.png`; where methods were swept, as whole
    sections, `methods_by_round.png`, `..._bytes.png` and `..._tokens.png`.

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
    target = Path(path) / "figures" if out is None else Path(out)
    if Path(path) in target.parents:
        check_own(Path(path), names=[target.name])
    scored, local = table[table["last"].notna()], table[table["scope"] == "local"]
    wanted: list[tuple[str, Any, dict[str, str]]] = []
    for key in swept_keys(table):
        if scored[key].nunique() > 1 and not _is_told(scored[scored["scope"] != "central"], key):
            wanted.append((f"score_by_{key}", scores, {"x": key}))
    if _skew_key(scored) and scored["js_mean"].nunique() > 1:
        wanted.append(("score_by_skew", scores, {"x": "js_mean"}))
    value = "gain_own" if local["gain_own"].notna().any() else "gain"
    for name, x in (("gain_by_size", "rows"), ("gain_by_skew", "js")):
        if (local[x].notna() & local[value].notna()).any():
            wanted.append((name, gains, {"x": x, "value": value}))
    written = []
    for name, draw, how in wanted:
        with style.offscreen():
            written += style.save_figure(draw(table, **how).figure, target / name, formats)
    return written + _save_methods(Path(path), scored, target, formats)


def _save_methods(path: Path, table: pd.DataFrame, target: Path, formats: Sequence[str]) -> list[Path]:
    """The figures that compare methods, where there are runs to draw."""
    key = compared(table)
    if key is None or len(table.groupby(panel_keys(table, key) or [key])) > PANELS:
        return []
    runs = table.loc[table["scope"] == "federated", "run"].unique()
    df = load_runs([path / run for run in runs])
    written = []
    for x in AXES:
        with contextlib.suppress(UserError):  # an axis that these runs have not recorded
            written += style.save_figure(methods(df, table, key, x), target / f"methods_by_{x}", formats)
    return written
