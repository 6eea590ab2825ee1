"""Cross-site evaluation: every model on every client's own validation examples, as a matrix, CSV files and a heat map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from fedsim.analysis.client_plots import write_cells
from fedsim.analysis.load import metric_mode, read_config, read_metrics, run_path
from fedsim.analysis.style import GLOBAL, canvas, inches, value_label
from fedsim.analysis.ticks import name_ticks
from fedsim.core.errors import UserError
from fedsim.core.files import CROSS, write_atomic

NAMED = 20  # models and clients whose names and values still fit


def cross_site(run: Any, metric: str | None = None) -> pd.DataFrame:
    """Every model of a finished run on every client's own validation examples.

    Args:
        run: its folder, or what `fedsim.run` returned; the run had `evaluate.cross_site: true`.
        metric: "accuracy", "loss" ...; None: the run's `best.metric`.

    Returns:
        The metric, float64 [models, clients]. The index `model` holds `local CLIENT` (the local-only models), `own CLIENT`
        (the models that clients of the federated mode keep), `global` and `central`, those that the run has; the
        columns `site` hold the clients' ids.

    Raises:
        UserError: no such run or metric, or the run has no cross-site evaluation.
    """
    folder = run_path(run)
    config, metrics = read_config(folder), read_metrics(folder)
    rows = metrics[metrics["split"].str.startswith(CROSS)]
    if rows.empty:
        raise UserError(f"{folder}: has no cross-site evaluation; run it with evaluate.cross_site=true")
    metric = metric or (config.get("best") or {}).get("metric") or "loss"
    known = list(rows["name"].unique())
    if metric not in known:
        raise UserError(f"no metric {metric!r} in the cross-site evaluation of {folder}; recorded: {', '.join(known)}")
    rows = rows[rows["name"] == metric]
    merged, alone = rows["scope"] == "federated", rows["client"].isna()
    order, kinds = [~merged & ~alone, merged & ~alone, merged, ~merged], ["local ", "own ", "global", "central"]
    place = np.select(order, range(4), 3)
    model = np.array(kinds, dtype=object)[place] + rows["client"].fillna("").astype(object)
    rows = rows.assign(model=model, site=rows["split"].str.removeprefix(CROSS), place=place)
    rows = rows.sort_values("place", kind="stable")
    table = rows.drop_duplicates(["model", "site"], keep="last").pivot(index="model", columns="site", values="value")
    return table.loc[rows["model"].unique(), rows["site"].unique()]


def write_cross_site(run: Path) -> list[str]:
    """Write `cross_site/METRIC.csv` for each metric; returns the clients of these."""
    metrics = read_metrics(run)
    rows = metrics[metrics["split"].str.startswith(CROSS)]
    for name in rows["name"].unique():
        data = cross_site(run, name).to_csv(lineterminator="\n").encode()
        write_atomic(run / "cross_site" / f"{name}.csv", data)
    return list(rows["split"].str.removeprefix(CROSS).unique())


def sites_matrix(table: pd.DataFrame, ax: Axes | None = None, metric: str = "accuracy") -> Axes:
    """Heat map of cross-site evaluation: models x clients; darker is better, a frame marks a client's own model.

    Args:
        table: what `cross_site(run, metric)` returns.
        ax: axes to draw on; None makes a figure.
        metric: the one that the table holds.
    """
    values = table.to_numpy(np.float64)
    models, sites = values.shape
    shown = np.where(np.isfinite(values), values, np.nan)
    low, high = (np.nanmin(shown), np.nanmax(shown)) if np.isfinite(shown).any() else (0.0, 1.0)
    better = metric_mode(metric) == "max"
    shades = (shown - low if better else high - shown) / (high - low or 1.0)
    with canvas(ax, min(1.6 + 0.24 * models, 7.0)) as ax:
        image = ax.imshow(shown, cmap="Blues" if better else "Blues_r", aspect="auto", vmin=low, vmax=high)
        name_ticks(ax.xaxis, list(table.columns), NAMED)
        name_ticks(ax.yaxis, list(table.index), 2 * NAMED)
        ax.tick_params(axis="x", labelrotation=90)
        fits = sites <= NAMED and models <= 2 * NAMED and inches(ax) / sites > 0.3
        write_cells(ax, values, shades, fits, lambda v: f"{v:.2f}" if v < 10 else f"{v:.3g}", 7)
        for row, column in np.ndindex(values.shape):
            if table.index[row] in (f"local {table.columns[column]}", f"own {table.columns[column]}"):
                look = {"fill": False, "edgecolor": GLOBAL, "linewidth": 1.4 if fits else 0.6, "zorder": 3}
                ax.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, **look))
        apart = sum(name not in ("global", "central") for name in table.index)
        if 0 < apart < models:
            ax.axhline(apart - 0.5, color="white", linewidth=3.0 if models <= 2 * NAMED else 1.0)
        bar = ax.figure.colorbar(image, ax=ax, label=value_label(metric, "site"), pad=0.03, fraction=0.06)
        bar.outline.set_visible(False)
        ax.set(xlabel="validation examples of", ylabel="model")
    return ax
