"""The figures: what is drawn is what was measured, and every file is written."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from fedsim import plots
from fedsim.errors import UserError
from fedsim.runs import load_partition, load_runs

write_run = runpy.run_path(str(Path(__file__).with_name("test_runs.py")))["write_run"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "results" / "lora" / "a1b2c3")


def _line(ax: Axes, color: str, marker: str = "None", width: float | None = None) -> Any:
    found = [
        line
        for line in ax.lines
        if to_hex(line.get_color()).upper() == color.upper()
        and line.get_marker() == marker
        and (width is None or line.get_linewidth() == width)
    ]
    assert len(found) == 1
    return found[0]


def _values(df: pd.DataFrame, scope: str, merged: bool) -> pd.DataFrame:
    rows = df[(df["scope"] == scope) & (df["name"] == "accuracy") & (df["split"] == "validation")]
    return rows[rows["client"].isna() == merged].astype({"step": float})


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_curves_draw_the_measured_saw_tooth(run: Path) -> None:
    df = load_runs(run)
    ax = plots.curves(df)
    merged = _values(df, "federated", merged=True)
    dots = _line(ax, plots.MERGED, "o")
    np.testing.assert_allclose(dots.get_xydata(), merged.loc[merged["step"] > 0, ["step", "value"]], rtol=1e-12)
    clients = _values(df, "federated", merged=False).groupby("step")["value"].mean()
    tooth = _line(ax, plots.FEDERATED).get_xydata()
    for step in (200.0, 400.0, 600.0, 800.0, 1000.0):
        at = tooth[tooth[:, 0] == step, 1]
        after = merged.set_index("step").loc[step, "value"]
        assert at[:2] == pytest.approx([clients[step], after]), "just before the merge, then the merged model"
        assert at[2:] == pytest.approx([after] * len(at[2:])), "the next round starts from the merged model"
    middle = tooth[tooth[:, 0] == 500.0, 1]
    assert middle == pytest.approx([clients[500.0]])
    assert ax.get_xlabel() == "optimiser steps per site" and ax.get_ylabel() == "validation accuracy"


def test_curves_local_mean_range_and_central_on_the_sites_budget(run: Path) -> None:
    df = load_runs(run)
    ax = plots.curves(df)
    local = _values(df, "local", merged=False).groupby("step")["value"]
    np.testing.assert_allclose(_line(ax, plots.LOCAL, width=2.2).get_xydata(), local.mean().reset_index(), rtol=1e-12)
    corners = ax.collections[0].get_paths()[0].vertices
    for step, low, high in zip(local.min().index, local.min(), local.max(), strict=True):
        at = corners[np.isclose(corners[:, 0], step), 1]
        assert (at.min(), at.max()) == pytest.approx((low, high))
    central = _values(df, "central", merged=True)
    drawn = _line(ax, plots.CENTRAL).get_xydata()
    np.testing.assert_allclose(drawn[:, 0], central["step"] / 6.0, err_msg="6,000 steps are the sites' 1,000")
    np.testing.assert_allclose(drawn[:, 1], central["value"])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "central (same budget)" in texts and len(texts) == 4
    assert {text.get_text() for text in ax.texts} == {"site-1", "site-2", "site-3"}


@pytest.mark.parametrize(
    ("x", "scope", "last"),
    [
        ("round", plots.CENTRAL, 5.0),
        ("tokens", plots.CENTRAL, 5 * 27000.0),
        ("tokens", plots.FEDERATED, 5 * 3 * 9000.0),
        ("bytes", plots.FEDERATED, 5 * 3 * 2.0),
    ],
)
def test_other_axes_end_at_the_running_total(run: Path, x: str, scope: str, last: float) -> None:
    ax = plots.curves(load_runs(run), x=x)
    assert _line(ax, scope).get_xdata()[-1] == pytest.approx(last)
    assert ax.get_xlabel() == plots.X_LABELS[x]


def test_bytes_axis_leaves_out_what_sends_nothing(run: Path) -> None:
    texts = [text.get_text() for text in plots.curves(load_runs(run), x="bytes").get_legend().get_texts()]
    assert texts == ["federated clients, mean", "merged model"]


def test_seconds_start_where_a_scope_starts(run: Path) -> None:
    df = load_runs(run)
    ax = plots.curves(df, x="seconds")
    rows = df[(df["scope"] == "central") & (df["split"] != "test")]
    start = rows.loc[rows["round"] == 0, "seconds"].max()
    at = _line(ax, plots.CENTRAL).get_xdata()
    assert (at[0], at[-1]) == pytest.approx((0.0, rows["seconds"].max() - start))


def test_errors_name_the_way_out(run: Path) -> None:
    df = load_runs(run)
    for x in ("tokens", "bytes"):
        bare = df[~df["name"].isin(["tokens", "bytes_up", "bytes_down"])]
        with pytest.raises(UserError, match=f"x='{x}': these runs recorded no .*use x='step'"):
            plots.curves(bare, x=x)
        with pytest.raises(UserError, match="recorded no"):
            plots.compare(bare, x=x)
    with pytest.raises(UserError, match="recorded no seconds"):
        plots.curves(df.assign(seconds=np.nan), x="seconds")
    with pytest.raises(UserError, match="'epochs' is not an axis; use one of step, round"):
        plots.curves(df, x="epochs")
    with pytest.raises(UserError, match="no metric 'f1' in split 'validation'; recorded: accuracy, loss"):
        plots.curves(df, metric="f1")
    with pytest.raises(UserError, match="no site was scored with 'f1'"):
        plots.sites(df, metric="f1")
    with pytest.raises(UserError, match="class_counts"):
        plots.partition({"sizes": [1]})


def test_seeds_become_a_mean_with_their_range(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "e" / f"s{seed}", seed=seed) for seed in range(3)]
    df = load_runs(folders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = plots.curves(df)
    final = _values(df, "federated", merged=True).query("step == 1000")["value"]
    assert len(final) == 3 and _line(ax, plots.MERGED, "o").get_ydata()[-1] == pytest.approx(final.mean())
    sites = _values(df, "local", merged=False).query("step == 1000").groupby("run", observed=True)["value"].mean()
    corners = ax.collections[0].get_paths()[0].vertices
    ends = corners[np.isclose(corners[:, 0], 1000.0), 1]
    assert (ends.min(), ends.max()) == pytest.approx((sites.min(), sites.max())), "the range of runs, not of sites"
    assert not ax.texts and "local, range of 3 runs" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_shorter_run_shortens_the_mean(tmp_path: Path) -> None:
    df = load_runs([write_run(tmp_path / "e" / "a"), write_run(tmp_path / "e" / "b", seed=1, rounds=3)])
    ax = plots.curves(df[df["rounds"].notna()].assign(rounds=5))
    assert _line(ax, plots.MERGED, "o").get_xdata().tolist() == [200, 400, 600]
    assert _line(ax, plots.LOCAL, width=2.2).get_xdata()[-1] == 600


def test_a_mean_over_unlike_settings_is_warned_of(tmp_path: Path) -> None:
    df = load_runs([write_run(tmp_path / "e" / f"r{a}", **{"partition.alpha": a}) for a in (1.0, 10.0)])
    with pytest.warns(UserWarning, match=r"2 settings \(partition.alpha = 1.0; partition.alpha = 10.0\)"):
        plots.curves(df)


def test_settings_ignore_what_no_result_depends_on(tmp_path: Path) -> None:
    trivial = ({"executor.name": "serial", "results": "x"}, {"executor.name": "pool", "results": "y"})
    df = load_runs([write_run(tmp_path / "e" / f"r{n}", seed=n, **keys) for n, keys in enumerate(trivial)])
    assert [label for label, _ in plots.settings(df)] == ["2 runs"]
    assert [label for label, _ in plots.settings(df, seeds_apart=True)] == ["seed = 0", "seed = 1"]


def test_a_cohort_whose_clients_sat_rounds_out(tmp_path: Path) -> None:
    df = load_runs(write_run(tmp_path / "e" / "c", sites=12, cohort=3, rounds=6, every=50))
    ax = plots.curves(df)
    tooth = _line(ax, plots.FEDERATED).get_xdata()
    assert set(np.round(tooth, 6)) == set(np.arange(0.0, 1201.0, 50.0)), "a client's own count is put into the round"
    assert not ax.texts, "twelve names would not fit"


def test_partition_cells_sizes_and_title(run: Path) -> None:
    ax = plots.partition(load_partition(run))
    cells = [int(text.get_text()) for text in ax.texts]
    assert cells == [6, 59, 25, 221, 525, 0, 19, 523, 433]
    assert [text.get_text() for text in ax.child_axes[0].texts] == ["90", "746", "975"]
    assert ax.get_title() == "mean JS divergence 0.137 bits, size Gini 0.33"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["site-1", "site-2", "site-3"]
    back = {text.get_text(): to_hex(text.get_color()) for text in ax.texts}
    assert back["525"] == "#ffffff" and back["6"] == "#000000"


def test_partition_of_hundreds_and_of_one() -> None:
    many = plots.partition({"class_counts": np.arange(1500).reshape(500, 3).tolist()})
    assert not many.texts and len(many.get_yticks()) < 12 and many.figure.get_figheight() <= 6.0
    one = plots.partition({"class_counts": [[0]]})
    assert [text.get_text() for text in one.texts] == ["0"]


def test_sites_last_values(run: Path) -> None:
    df = load_runs(run)
    ax = plots.sites(df)
    own = df[(df["split"] == "site") & (df["scope"] == "local") & (df["name"] == "accuracy")]
    last = own.groupby("client")["value"].last()
    np.testing.assert_allclose(ax.lines[0].get_xdata(), last.loc[["site-1", "site-2", "site-3"]])
    merged = _values(df, "federated", merged=True)["value"].iloc[-1]
    np.testing.assert_allclose(ax.lines[3].get_xdata(), [merged] * 3)
    assert len(plots.sites(df[df["scope"] == "local"]).lines) == 2, "no merged model, no marks for it"


def test_save_figures_writes_what_there_is_and_leaves_matplotlib_alone(run: Path) -> None:
    before = dict(matplotlib.rcParams)
    written = plots.save_figures(run)
    assert written == [run / "figures" / f"{name}.png" for name in ("accuracy", "loss", "partition")]
    for file in written:
        height, width = imread(file).shape[:2]
        assert width == plots.WIDTH * plots.DPI and height > 250
    assert dict(matplotlib.rcParams) == before
    assert plots.save_figures(run, run.parent / "out", "loss") == [
        run.parent / "out" / "loss.png",
        run.parent / "out" / "partition.png",
    ]
    (run / "partition.json").unlink()
    (run / "metrics.jsonl").write_text("")
    assert plots.save_figures(run) == []


@pytest.mark.parametrize("modes", [("local",), ("federated",), ("central",), ("local", "central")])
def test_runs_of_some_modes(tmp_path: Path, modes: tuple[str, ...]) -> None:
    run = write_run(tmp_path / "e" / "r", modes=modes)
    assert len(plots.save_figures(run)) == 3
    texts = {text.get_text() for text in plots.curves(load_runs(run)).get_legend().get_texts()}
    assert any("central" in text for text in texts) == ("central" in modes)
    assert ("merged model" in texts) == ("federated" in modes)


@pytest.mark.parametrize(("alphas", "seeds", "panels"), [((1.0, 5.0), 2, 4), ((1.0,), 5, 1), ((1.0, 5.0, 10.0), 2, 3)])
def test_plot_runs_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alphas: tuple[float, ...], seeds: int, panels: int
) -> None:
    for alpha in alphas:
        for seed in range(seeds):
            write_run(tmp_path / "e" / f"{alpha}-{seed}", seed=seed, **{"partition.alpha": alpha})
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    assert plots.plot_runs([tmp_path / "e"], tmp_path / "out", "accuracy") == [tmp_path / "out" / "accuracy.png"]
    assert len(drawn[0].axes) == panels
    assert all(len(panel.lines) >= 4 for panel in drawn[0].axes)


def test_plot_runs_one_run_and_beyond_four_settings(tmp_path: Path) -> None:
    first = write_run(tmp_path / "e" / "r0", **{"local.lr": 0.5})
    assert [file.name for file in plots.plot_runs(first, tmp_path / "one")] == [
        "accuracy.png",
        "loss.png",
        "partition.png",
    ]
    for n in range(1, 6):
        write_run(tmp_path / "e" / f"r{n}", **{"local.lr": 0.5 + n})
    assert [file.name for file in plots.plot_runs([tmp_path], tmp_path / "all")] == ["accuracy.png", "loss.png"]
    figure = plots.compare(load_runs(tmp_path))
    assert [len(panel.lines) for panel in figure.axes] == [6, 6, 6]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[1].lines}
    assert len(looks) == 6
    assert figure.axes[1].lines[0].get_xdata().tolist() == [200, 400, 600, 800, 1000]
    with pytest.raises(UserError, match="no metric 'exact_match'"):
        plots.plot_runs([tmp_path], tmp_path / "none", "exact_match")


def test_nothing_is_clipped_or_laid_over_the_curves(run: Path) -> None:
    for ax in (
        plots.curves(load_runs(run), metric="loss"),
        plots.sites(load_runs(run)),
        plots.partition(load_partition(run)),
    ):
        figure = ax.figure
        figure.draw_without_rendering()
        figure.canvas.draw()
        box, page = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= page[0] + 0.01 and box.y1 <= page[1] + 0.01
        if legend := ax.get_legend():
            low = legend.get_window_extent().y1
            assert low < ax.xaxis.label.get_window_extent().y0 < ax.get_window_extent().y0
