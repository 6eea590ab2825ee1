"""The figures: what is drawn is what was measured, and every file is written."""

from __future__ import annotations

import itertools
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
from tiers import fast_only

from fedsim.analysis import plots
from fedsim.analysis.load import load_partition, load_runs
from fedsim.analysis.style import CLIENT_LOOKS
from fedsim.analysis.sweep_plots import _bin_medians
from fedsim.analysis.sweeps import cells, sweep_table
from fedsim.analysis.ticks import label_ends, name_decades, spread
from fedsim.core.errors import UserError

write_run = runpy.run_path(str(Path(__file__).with_name("test_runs.py")))["write_run"]
write_sweep = runpy.run_path(str(Path(__file__).with_name("test_tables.py")))["write_sweep"]


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
    ax = plots.curves(df, x="step")
    merged = _values(df, "federated", merged=True)
    dots = _line(ax, plots.GLOBAL, "o")
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
    assert ax.get_xlabel() == "optimizer steps of each model" and ax.get_ylabel() == "validation accuracy"


def test_curves_local_mean_range_and_central_at_its_own_steps(run: Path) -> None:
    df = load_runs(run)
    ax = plots.curves(df, x="step")
    local = _values(df, "local", merged=False).groupby("step")["value"]
    np.testing.assert_allclose(_line(ax, plots.LOCAL, width=2.2).get_xydata(), local.mean().reset_index(), rtol=1e-12)
    corners = ax.collections[0].get_paths()[0].vertices
    for step, low, high in zip(local.min().index, local.min(), local.max(), strict=True):
        at = corners[np.isclose(corners[:, 0], step), 1]
        assert (at.min(), at.max()) == pytest.approx((low, high))
    central = _values(df, "central", merged=True)
    drawn = _line(ax, plots.CENTRAL).get_xydata()
    np.testing.assert_allclose(drawn[:, 0], central["step"])
    np.testing.assert_allclose(drawn[:, 1], central["value"])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "centralized" in texts and len(texts) == 4, "the config does not say what is matched"
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
    assert texts == ["federated clients, mean", "global model"]


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
    with pytest.raises(UserError, match="no client has scores of 'f1'"):
        plots.sites(df, metric="f1")
    with pytest.raises(UserError, match="class_counts"):
        plots.partition({"sizes": [1]})


def test_seeds_become_a_mean_with_their_range(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "e" / f"s{seed}", seed=seed) for seed in range(3)]
    df = load_runs(folders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = plots.curves(df, x="step")
    final = _values(df, "federated", merged=True).query("step == 1000")["value"]
    assert len(final) == 3 and _line(ax, plots.GLOBAL, "o").get_ydata()[-1] == pytest.approx(final.mean())
    sites = _values(df, "local", merged=False).query("step == 1000").groupby("run", observed=True)["value"].mean()
    corners = ax.collections[0].get_paths()[0].vertices
    ends = corners[np.isclose(corners[:, 0], 1000.0), 1]
    assert (ends.min(), ends.max()) == pytest.approx((sites.min(), sites.max())), "the range of runs, not of sites"
    assert not ax.texts and "local-only, range of 3 runs" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_shorter_run_shortens_the_mean(tmp_path: Path) -> None:
    df = load_runs([write_run(tmp_path / "e" / "a"), write_run(tmp_path / "e" / "b", seed=1, rounds=3)])
    ax = plots.curves(df[df["rounds"].notna()].assign(rounds=5), x="step")
    assert _line(ax, plots.GLOBAL, "o").get_xdata().tolist() == [200, 400, 600]
    assert _line(ax, plots.LOCAL, width=2.2).get_xdata()[-1] == 600


def test_a_mean_over_unlike_settings_is_warned_of(tmp_path: Path) -> None:
    df = load_runs([write_run(tmp_path / "e" / f"r{a}", **{"partition.alpha": a}) for a in (1.0, 10.0)])
    with pytest.warns(UserWarning, match=r"2 settings \(alpha = 1; alpha = 10\)"):
        plots.curves(df)


def test_settings_ignore_what_no_result_depends_on(tmp_path: Path) -> None:
    trivial = ({"executor.name": "serial", "results": "x"}, {"executor.name": "pool", "results": "y"})
    df = load_runs([write_run(tmp_path / "e" / f"r{n}", seed=n, **keys) for n, keys in enumerate(trivial)])
    assert [label for label, _ in plots.settings(df)] == ["2 runs"]
    assert [label for label, _ in plots.settings(df, seeds_apart=True)] == ["seed = 0", "seed = 1"]


def test_a_cohort_whose_clients_sat_rounds_out(tmp_path: Path) -> None:
    df = load_runs(write_run(tmp_path / "e" / "c", sites=12, cohort=3, rounds=6, every=50))
    ax = plots.curves(df, x="step")
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
    assert written == [run / "figures" / f"{name}.png" for name in ("accuracy", "loss", "partition", "clients")]
    for file in written:
        height, width = imread(file).shape[:2]
        assert width == plots.WIDTH * plots.DPI and height > 250
    assert dict(matplotlib.rcParams) == before
    assert plots.save_figures(run, run.parent / "out", "loss") == [
        run.parent / "out" / "loss.png",
        run.parent / "out" / "partition.png",
        run.parent / "out" / "clients.png",
    ]
    (run / "partition.json").unlink()
    (run / "metrics.jsonl").write_text("")
    assert plots.save_figures(run) == []


@pytest.mark.parametrize("modes", [("local",), ("federated",), ("central",), ("local", "central")])
def test_runs_of_some_modes(tmp_path: Path, modes: tuple[str, ...]) -> None:
    run = write_run(tmp_path / "e" / "r", modes=modes)
    assert len(plots.save_figures(run)) == 3 + (modes != ("central",))
    texts = {text.get_text() for text in plots.curves(load_runs(run)).get_legend().get_texts()}
    assert any("central" in text for text in texts) == ("central" in modes)
    assert ("global model" in texts) == ("federated" in modes)


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
        "clients.png",
    ]
    for n in range(1, 6):
        write_run(tmp_path / "e" / f"r{n}", **{"local.lr": 0.5 + n})
    assert [file.name for file in plots.plot_runs([tmp_path], tmp_path / "all")] == ["accuracy.png", "loss.png"]
    panels = plots.compare(load_runs(tmp_path))
    assert [panel.get_title() for panel in panels] == [
        "local-only, mean",
        "federated, global model",
        "centralized",
    ]
    assert [len(panel.lines) for panel in panels] == [6, 6, 6]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in panels[1].lines}
    assert len(looks) == 6
    assert panels[1].lines[0].get_xdata().tolist() == [27000, 54000, 81000, 108000, 135000], "tokens of three clients"
    assert len(panels[0].figure.legends[0].get_texts()) == 6
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


def test_compare_on_axes_of_ones_own(tmp_path: Path) -> None:
    for n in range(2):
        write_run(tmp_path / "e" / f"r{n}", modes=("local", "federated"), **{"local.lr": 0.5 + n})
    df = load_runs(tmp_path)
    own = Figure(figsize=(9, 4)).subplots(2, 2)
    panels = plots.compare(df, axes=own[0])
    assert list(panels) == list(own[0])
    given, new = (
        [line.get_xydata().tolist() for ax in axes for line in ax.lines] for axes in (panels, plots.compare(df))
    )
    assert given == new and len(given) == 4
    assert not own[1, 0].lines and not own[0, 0].figure.legends
    assert [t.get_text() for t in own[0, 1].get_legend().get_texts()] == ["lr = 0.5", "lr = 1.5"]
    with pytest.raises(UserError, match="axes: 3 given, but these runs have 2 scopes: local, federated"):
        plots.compare(df, axes=[*own[0], own[1, 0]])


ALPHAS = (100.0, 0.05, 0.5, 5.0)  # not in order, on purpose


def skewed(alpha: float, seed: int, clients: int = 2, metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    """A run whose scores, sizes and skew follow from alpha and seed by simple rules."""
    skew = 0.4 / (1.0 + alpha) + 0.02 * seed
    names = [f"site-{n + 1}" for n in range(clients)]
    up = 0.01 * seed - 0.002 * clients
    level = (lambda score: 3.0 * (1.0 - score)) if metric == "loss" else (lambda score: score)
    local = {name: level(0.8 - 0.8 * skew + up - 0.01 * n) for n, name in enumerate(names)}
    own = {name: level(0.9 - 0.001 * n) for n, name in enumerate(names)}
    merged_own = {name: level(0.9 - 0.001 * n + skew * (0.1 + 0.02 * (n % 3))) for n, name in enumerate(names)}
    sizes = {name: 8 * (n + 1) ** 2 for n, name in enumerate(names)}
    js = {name: skew + 0.01 * n for n, name in enumerate(names)}
    settings = {"partition.alpha": alpha, "partition.num_clients": clients, "seed": seed}
    report = {"js_mean": skew, "size_gini": 0.5 * skew}
    found = {"local": local, "own": own, "merged_own": merged_own, "federated": level(0.9 - 0.2 * skew + up)}
    return {"settings": settings, **found, "metric": metric, "sizes": sizes, "js": js, "report": report, **more}


def centrals(seeds: int, metric: str = "accuracy") -> list[dict[str, Any]]:
    scores = [0.08 * (3 - n) if metric == "loss" else 0.93 + 0.01 * n for n in range(seeds)]
    return [
        {"settings": {"modes": ["central"], "seed": n}, "central": score, "metric": metric}
        for n, score in enumerate(scores)
    ]


def lines_of(ax: Axes, color: str) -> list[Any]:
    return [line for line in ax.lines if to_hex(line.get_color()).upper() == color.upper()]


def inside(ax: Axes) -> None:
    """Assert that nothing leaves the page, that the legend is below the axes' names, and that no two ticks' names touch."""
    figure = ax.figure
    figure.canvas.draw()
    box, page = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= page[0] + 0.01 and box.y1 <= page[1] + 0.01
    assert ax.get_legend().get_window_extent().y1 < ax.xaxis.label.get_window_extent().y0
    assert ax.get_window_extent().height > 1.2 * figure.dpi
    named = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(named))


def test_scores_are_the_cells_of_the_table(tmp_path: Path) -> None:
    runs = [skewed(alpha, seed) for alpha in ALPHAS for seed in range(3)] + centrals(3)
    table = sweep_table(write_sweep(tmp_path / "s", runs))
    ax = plots.scores(table)
    out = cells(table, ["partition.alpha"]).set_index("scope")
    for scope, color in (("local", plots.LOCAL), ("federated", plots.FEDERATED)):
        (line,) = [one for one in lines_of(ax, color) if len(one.get_xdata()) == 4 and one.get_marker() == "o"]
        np.testing.assert_allclose(line.get_xdata(), sorted(ALPHAS))
        np.testing.assert_allclose(line.get_ydata(), out.loc[scope, "mean"])
    bars = [bar.get_segments() for bar in ax.collections]
    found = [[[low, high] for (_, low), (_, high) in bar] for bar in bars]
    np.testing.assert_allclose(found, [out.loc[scope, ["low", "high"]] for scope in ("local", "federated")])
    (level,) = lines_of(ax, plots.CENTRAL)
    assert level.get_ydata() == pytest.approx([0.94, 0.94]) and len(ax.patches) == 1, "one line, one band"
    assert (ax.patches[0].get_y(), ax.patches[0].get_height()) == pytest.approx((0.93, 0.02))
    assert (
        ax.get_xscale() == "log" and ax.get_xlabel() == "Dirichlet alpha" and ax.get_ylabel() == "validation accuracy"
    )
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0.05", "0.5", "5", "100"]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["local-only, mean", "federated, global model", "centralized"]
    assert ax.get_legend().get_title().get_text() == "mean and 95 % interval over 3 runs"
    inside(ax)


def test_further_keys_have_lines_and_names_of_their_own(tmp_path: Path) -> None:
    runs = [skewed(alpha, 0, clients) for alpha in ALPHAS for clients in (3, 2)] + centrals(1)
    table = sweep_table(write_sweep(tmp_path / "s", runs))
    ax = plots.scores(table, value="best")
    local = {line.get_marker(): line for line in lines_of(ax, plots.LOCAL)}
    assert set(local) == {"o", "s"} and local["o"].get_linestyle() != local["s"].get_linestyle()
    best = table[(table["scope"] == "local") & (table["partition.num_clients"] == 2)]
    np.testing.assert_allclose(local["o"].get_ydata(), best.groupby("partition.alpha")["best"].mean())
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[2:] == ["centralized", "num_clients = 2", "num_clients = 3"]
    assert ax.get_legend().get_title().get_text() == "one run each" and not ax.patches
    assert ax.get_ylabel() == "best validation accuracy"
    few = plots.scores(table, "partition.num_clients")
    assert few.get_xscale() == "linear" and [t.get_text() for t in few.get_xticklabels()] == ["2", "3"]
    assert len(lines_of(few, plots.FEDERATED)) == 4
    inside(ax)
    inside(few)


def test_more_settings_than_looks_are_thin_and_have_a_mean(tmp_path: Path) -> None:
    runs = [skewed(alpha, 0, clients) for alpha in (0.5, 5.0) for clients in range(2, 8)]
    table = sweep_table(write_sweep(tmp_path / "s", runs))
    ax = plots.scores(table)
    federated = lines_of(ax, plots.FEDERATED)
    assert len(federated) == 7 and [line.get_linewidth() for line in federated].count(0.5) == 6
    expected = table[table["scope"] == "federated"].groupby("partition.alpha")["last"].mean()
    np.testing.assert_allclose(federated[-1].get_ydata(), expected)
    assert ax.get_legend().get_title().get_text() == "thin: each of 6 settings; thick: their mean"
    inside(ax)


def test_centralized_models_of_each_setting_are_a_curve_and_of_one_value_a_line(tmp_path: Path) -> None:
    runs = [skewed(alpha, 0, central=0.9 + 0.01 * alpha) for alpha in (0.5, 5.0)]
    ax = plots.scores(sweep_table(write_sweep(tmp_path / "s", runs)))
    (line,) = lines_of(ax, plots.CENTRAL)
    assert line.get_xydata().tolist() == [[0.5, pytest.approx(0.905)], [5.0, pytest.approx(0.95)]]
    del runs[1]["central"]
    ax = plots.scores(sweep_table(write_sweep(tmp_path / "t", runs)))
    (line,) = lines_of(ax, plots.CENTRAL)
    assert list(line.get_xdata()) == [0, 1], "from edge to edge"
    assert line.get_ydata() == pytest.approx([0.905, 0.905])


def test_names_on_the_axis(tmp_path: Path) -> None:
    adapters = [{"name": "p_tuning", "num_virtual_tokens": 20}, {"name": "lora", "r": 8}, {"name": "adapter"}]
    runs = []
    for adapter in adapters:
        for seed in range(2):
            run = skewed(1.0, seed, central=0.95 + 0.001 * seed)
            runs.append(run | {"settings": {"adapter": adapter, "seed": seed}})
    ax = plots.scores(sweep_table(write_sweep(tmp_path / "s", runs)), "adapter")
    names = [text.get_text().replace("\n", " ") for text in ax.get_xticklabels()]
    assert names[1:] == ["lora r=8", "adapter"] and names[0].startswith("p_tuning")
    (dots,) = [line for line in lines_of(ax, plots.LOCAL) if line.get_marker() == "o"]
    assert dots.get_linestyle() == "None", "nothing lies between two adapters"
    assert np.round(dots.get_xdata()).tolist() == [0, 1, 2]
    assert len({float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "o"}) == 3, "side by side"
    inside(ax)


def test_scores_against_measured_skew(tmp_path: Path) -> None:
    runs = [skewed(alpha, seed) for alpha in ALPHAS for seed in range(2)] + centrals(2)
    table = sweep_table(write_sweep(tmp_path / "s", runs))
    ax = plots.scores(table, "js_mean")
    dots = ax.collections[0].get_offsets()
    by_run = table[table["scope"] == "local"].groupby("run", sort=False)[["js_mean", "last"]].mean()
    np.testing.assert_allclose(dots, by_run)
    (line,) = lines_of(ax, plots.LOCAL)
    out = cells(table, ["partition.alpha"])
    out = out[out["scope"] == "local"].sort_values("js_mean")
    np.testing.assert_allclose(line.get_xydata(), out[["js_mean", "mean"]])
    assert len(lines_of(ax, plots.CENTRAL)) == 1 and len(ax.patches) == 1, "the centralized runs stand at no skew"
    assert ax.get_xscale() == "linear" and "bits" in ax.get_xlabel()
    inside(ax)
    inside(plots.scores(table, "size_gini", value="test"))


def test_scores_of_a_loss(tmp_path: Path) -> None:
    runs = [skewed(alpha, seed, metric="loss") for alpha in ALPHAS for seed in range(2)] + centrals(2, "loss")
    ax = plots.scores(sweep_table(write_sweep(tmp_path / "s", runs)))
    assert "loss" in ax.get_ylabel()
    local = next(line for line in lines_of(ax, plots.LOCAL) if line.get_marker() == "o").get_ydata()
    assert local[0] > local[-1], "skew costs"
    inside(ax)


def test_gains_are_those_of_the_table_with_medians_of_bins(tmp_path: Path) -> None:
    runs = [skewed(alpha, seed, 10) for alpha in (0.5, 5.0) for seed in range(2)]
    table = sweep_table(write_sweep(tmp_path / "s", runs))
    local = table[table["scope"] == "local"]
    ax = plots.gains(table)
    dots = pd.DataFrame(ax.collections[0].get_offsets(), columns=["rows", "gain"]).sort_values(["rows", "gain"])
    wanted = local[["rows", "gain_own"]].astype(float).sort_values(["rows", "gain_own"])
    np.testing.assert_allclose(dots, wanted)
    assert ax.lines[0].get_ydata() == [0, 0], "the line of no gain"
    trend = ax.lines[1].get_xydata()
    assert len(trend) == 5, "40 sites, four of each of ten sizes: five bins of eight"
    expected = local.groupby((local["client"].str[5:].astype(int) - 1) // 2)[["rows", "gain_own"]].median()
    np.testing.assert_allclose(trend, expected.astype(float))
    assert ax.get_xscale() == "log" and ax.get_ylabel() == "gain from federation,\nown validation accuracy"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0.5", "5", "median of a bin"]
    assert len({tuple(color) for color in ax.collections[0].get_facecolors()}) == 2
    by_skew = plots.gains(table, "js", value="gain")
    offsets = pd.DataFrame(by_skew.collections[0].get_offsets()).sort_values([0, 1])
    np.testing.assert_allclose(offsets, local[["js", "gain"]].sort_values(["js", "gain"]))
    assert by_skew.get_xscale() == "linear"
    inside(ax)
    inside(by_skew)


def test_bins_of_gains_by_hand() -> None:
    at = np.repeat([1.0, 2.0], 8)
    values = np.array([0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 7.0, 9.0, 1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0])
    assert _bin_medians(at, values).tolist() == [[1.0, 0.4], [2.0, 2.0]]
    assert len(_bin_medians(at[:15], values[:15])) == 0, "fifteen are too few for two bins of eight"
    assert len(_bin_medians(np.ones(16), values)) == 0, "sites of one size have no trend"


def test_few_gains_without_a_swept_key(tmp_path: Path) -> None:
    table = sweep_table(write_sweep(tmp_path / "s", [skewed(1.0, 0)]))
    ax = plots.gains(table)
    assert len(ax.lines) == 1 and [t.get_text() for t in ax.get_legend().get_texts()] == ["one client of one run"]


def test_save_sweep_writes_what_it_has_data_for(tmp_path: Path) -> None:
    runs = [skewed(alpha, 0, clients) for alpha in (0.05, 5.0) for clients in (2, 3)]
    sweep = write_sweep(tmp_path / "s", runs)
    before = dict(matplotlib.rcParams)
    names = [
        "score_by_partition.alpha",
        "score_by_partition.num_clients",
        "score_by_skew",
        "gain_by_size",
        "gain_by_skew",
    ]
    written = plots.save_sweep(sweep)
    assert written == [sweep / "figures" / f"{name}.png" for name in names]
    for file in written:
        height, width = imread(file).shape[:2]
        assert width == plots.WIDTH * plots.DPI and height >= 3.4 * plots.DPI
    assert dict(matplotlib.rcParams) == before
    import matplotlib.pyplot as plt

    assert not plt.get_fignums(), "figures that pyplot does not hold"
    rates = [{"settings": {"local.lr": rate}, "central": 0.5} for rate in (0.1, 0.2)]
    assert plots.save_sweep(write_sweep(tmp_path / "c", rates), tmp_path / "out") == [
        tmp_path / "out/score_by_local.lr.png"
    ]
    bare = [{"settings": {"local.lr": rate}, "local": {"a": 0.5}, "federated": 0.6} for rate in (0.1, 0.2)]
    names = [file.stem for file in plots.save_sweep(write_sweep(tmp_path / "b", bare))]
    assert names == ["score_by_local.lr", "gain_by_size", "gain_by_skew"], "a gain on the shared rows is one, too"


def test_errors_of_the_sweeps_figures(tmp_path: Path) -> None:
    table = sweep_table(write_sweep(tmp_path / "s", [skewed(alpha, 0) for alpha in (0.5, 5.0)]))
    with pytest.raises(UserError, match="x='local.lr' was not swept; use one of partition.alpha, .*js_mean, size_gini"):
        plots.scores(table, "local.lr")
    with pytest.raises(UserError, match="value='gain' is no score"):
        plots.scores(table, value="gain")
    with pytest.raises(UserError, match="no run has both partition.alpha and the score 'test'"):
        plots.scores(table.assign(test=np.nan), value="test")
    with pytest.raises(UserError, match="no run has both js_mean"):
        plots.scores(table.assign(js_mean=np.nan), "js_mean")
    with pytest.raises(UserError, match="x='alpha' is nothing measured of a client; use one of rows, js"):
        plots.gains(table, "alpha")
    with pytest.raises(UserError, match="value='last' is no gain"):
        plots.gains(table, value="last")
    with pytest.raises(UserError, match="no client has both rows and gain_own"):
        plots.gains(table[table["scope"] == "federated"])


def test_scores_and_gains_on_axes_of_ones_own(tmp_path: Path) -> None:
    table = sweep_table(write_sweep(tmp_path / "s", [skewed(alpha, 0) for alpha in (0.5, 5.0)]))
    figure = Figure(figsize=(8, 3))
    left, right = figure.subplots(1, 2)
    assert plots.scores(table, ax=left) is left and plots.gains(table, ax=right) is right
    assert left.lines and right.collections and figure.get_figheight() == 3


# ------------------------------------------------------------------------------------------------ each site


def test_each_site_has_a_curve_of_its_own(run: Path) -> None:
    df = load_runs(run)
    ax = plots.each_site(df, metric="loss", x="step")
    rows = df[(df["name"] == "loss") & (df["split"] == "validation")].astype({"step": float})
    local = rows[rows["scope"] == "local"]
    for name, (color, marker) in zip(("site-1", "site-2", "site-3"), CLIENT_LOOKS, strict=False):
        points = local[local["client"] == name][["step", "value"]]
        np.testing.assert_allclose(_line(ax, color, marker).get_xydata(), points, rtol=1e-12)
    merged = rows[(rows["scope"] == "federated") & rows["client"].isna()]
    dots = _line(ax, plots.GLOBAL, "o").get_xydata()
    np.testing.assert_allclose(dots, merged.loc[merged["step"] > 0, ["step", "value"]], rtol=1e-12)
    central = rows[rows["scope"] == "central"]
    np.testing.assert_allclose(_line(ax, plots.CENTRAL).get_ydata(), central["value"], rtol=1e-12)
    start = _line(ax, "#000000", "s").get_xydata()
    assert start.shape == (1, 2) and start[0, 0] == 0
    assert [text.get_text() for text in ax.texts] and {t.get_text() for t in ax.texts} == {"site-1", "site-2", "site-3"}
    assert {t.get_text() for t in ax.get_legend().get_texts()} >= {"site-2, local-only", "federated clients, mean"}


def test_clients_inside_a_round_have_the_colours_of_their_sites(run: Path) -> None:
    df = load_runs(run)
    ax = plots.each_site(df, metric="loss")
    rows = df[(df["name"] == "loss") & (df["split"] == "validation") & (df["scope"] == "federated")]
    start = rows[rows["client"].isna() & (rows["round"] == 1)]["value"].item()
    for name, (color, _) in zip(("site-1", "site-2", "site-3"), CLIENT_LOOKS, strict=False):
        thin = [one for one in ax.lines if to_hex(one.get_color()).upper() == color and one.get_linewidth() == 0.8]
        assert len(thin) == 5, "one a round"
        own = rows[(rows["client"] == name) & (rows["round"] == 2)]["value"]
        np.testing.assert_allclose(thin[1].get_ydata(), [start, *own], rtol=1e-12)


def test_each_site_of_several_seeds_is_their_mean(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "x" / f"run-{seed}", seed=seed)
    df = load_runs(tmp_path / "x")
    ax = plots.each_site(df, metric="loss")
    local = df[(df["name"] == "loss") & (df["split"] == "validation") & (df["client"] == "site-2")]
    mean = local[local["scope"] == "local"].groupby("step")["value"].mean()
    np.testing.assert_allclose(_line(ax, *CLIENT_LOOKS[1]).get_ydata(), mean, rtol=1e-12)


def test_each_site_of_what_ran(tmp_path: Path) -> None:
    alone = load_runs(write_run(tmp_path / "x" / "a", modes=("local",)))
    assert len(plots.each_site(alone).get_legend().get_texts()) == 4, "three sites and the start"
    together = load_runs(write_run(tmp_path / "y" / "b", modes=("central",)))
    assert not plots.each_site(together).texts
    many = load_runs(write_run(tmp_path / "z" / "c", sites=7))
    with pytest.raises(UserError, match="7 local-only clients, and 6 can be told apart"):
        plots.each_site(many)
    with pytest.raises(UserError, match="is not an axis"):
        plots.each_site(alone, x="epoch")
    with pytest.raises(UserError, match="recorded no"):
        plots.each_site(alone, x="bytes")


# ------------------------------------------------------------------------- budgets, axes, labels, titles, formats


def _central(folder: Path, match: str, factor: float, **config: Any) -> pd.DataFrame:
    """A run whose centralized model did `factor` times the steps and tokens of one client in each round."""
    df = load_runs(write_run(folder, **{"central.match": match, **config}))
    central = df["scope"] == "central"
    df.loc[central, "step"] = (df.loc[central, "step"].astype(float) * factor / 6.0).round().astype("Int64")
    df.loc[central & (df["name"] == "tokens"), "value"] = 9000.0 * factor
    return df


@pytest.mark.parametrize(
    ("match", "factor", "label", "axis", "ends"),
    [
        ("epochs", 3.0, "same examples as all clients", "tokens", (135000.0, 135000.0)),
        ("steps", 1.0, "same steps as one client", "step", (1000.0, 1000.0)),
        ("steps", 0.7, "same steps as one client", "tokens", (135000.0, 31500.0)),  # the mean of unequal clients
    ],
)
def test_the_centralized_curve_says_its_budget_and_ends_where_it_is_spent(
    tmp_path: Path, match: str, factor: float, label: str, axis: str, ends: tuple[float, float]
) -> None:
    df = _central(tmp_path / "e" / "r", match, factor)
    for ax in (plots.curves(df), plots.each_site(df, metric="accuracy"), *plots.compare(df)[1:]):
        assert ax.get_xlabel() in (plots.X_LABELS[axis], "")
    texts = [text.get_text() for text in plots.curves(df).get_legend().get_texts()]
    assert f"centralized ({label})" in texts and not any("budget" in text for text in texts)
    ax = plots.curves(df)
    assert _line(ax, plots.GLOBAL, "o").get_xdata()[-1] == pytest.approx(ends[0])
    assert _line(ax, plots.CENTRAL).get_xdata()[-1] == pytest.approx(ends[1])
    assert label in plots.compare(df)[2].get_title()
    without_tokens = df[df["name"] != "tokens"]
    assert plots.curves(without_tokens).get_xlabel() == plots.X_LABELS[axis if axis == "step" else "round"]


def test_panels_of_other_budgets_say_them_apart(tmp_path: Path) -> None:
    groups = [(match, _central(tmp_path / match, match, n)) for match, n in (("epochs", 3.0), ("steps", 1.0))]
    figure = plots.panels(groups, "accuracy")
    assert [ax.get_title().replace("\n", " ") for ax in figure.axes] == [
        "epochs centralized: same examples as all clients",
        "steps centralized: same steps as one client",
    ]
    assert "centralized" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_labels_stay_at_the_ends_of_their_curves(tmp_path: Path) -> None:
    """Each name begins at its curve's last point; names that would touch are moved no further than they have to be."""
    ends = {"a": (5.0, 0.5), "b": (5.0, 0.5001), "c": (5.0, 0.9), "d": (2.0, 0.5), "at the right": (10.0, 1.0)}
    for scale in ("linear", "log"):
        ax = Figure(figsize=(4, 3), layout="constrained").subplots()
        ax.plot([0, 10], [0.2, 1.0])
        ax.set_yscale(scale)
        label_ends(ax, ends, dict.fromkeys(ends, "black"))
        ax.figure.canvas.draw()
        ax.set_ylim(0.1, 2.0)  # others that share the axis come later
        ax.figure.canvas.draw()
        boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
        for name, point in ends.items():
            at, box = ax.transData.transform(point), boxes[name]
            assert at[0] < box.x0 < at[0] + 10
            assert abs((box.y0 + box.y1) / 2 - at[1]) < (12 if name in "ab" else 1.5), name
        assert max(box.x1 for box in boxes.values()) <= ax.figure.bbox.x1 + 8, (
            "on the page, but for the layout's rounds"
        )
        assert not boxes["a"].overlaps(boxes["b"]) and boxes["a"].y0 < boxes["b"].y0


def test_names_are_spread_with_the_least_moves() -> None:
    assert spread(np.array([0.0, 100.0, 50.0]), 10.0).tolist() == [0.0, 100.0, 50.0]
    assert spread(np.array([4.0, 4.0]), 10.0).tolist() == [-1.0, 9.0]
    assert spread(np.array([9.0, 0.0, 3.0]), 6.0).tolist() == [10.0, -2.0, 4.0], "one block: mean move is zero"


@fast_only(0, 2)
@pytest.mark.parametrize(
    ("level", "metric"), [(0.9, "accuracy"), (0.999, "accuracy"), (0.0, "accuracy"), (2.9, "loss")]
)
def test_a_flat_curve_is_not_stretched(run: Path, level: float, metric: str) -> None:
    df = load_runs(run)
    df["value"] = df["value"].where(~df["name"].isin([metric, f"merged_{metric}"]), level + 1e-4 * (df["value"] % 1))
    least = 0.1 if metric == "accuracy" else 0.29
    for ax in (plots.curves(df, metric=metric), plots.sites(df, metric=metric)):
        low, high = ax.get_ylim() if ax.get_xlabel() == plots.X_LABELS["tokens"] else ax.get_xlim()
        assert least * 0.99 < high - low < 1.3 * least and low < level < high
        assert metric != "accuracy" or (low >= -0.011 and high <= 1.011)


@fast_only(0, 3, 4)
@pytest.mark.parametrize(("low", "high"), [(2.1, 9.5), (1.2, 4.9), (0.3, 1.9), (0.011, 0.049), (1.0, 1e6), (5.1, 5.9)])
def test_a_log_axis_has_labelled_ticks(low: float, high: float) -> None:
    ax = Figure().subplots()
    ax.plot([0, 1], [low, high])
    ax.set_yscale("log")
    name_decades(ax.yaxis)
    ax.figure.canvas.draw()
    a, b = ax.get_ylim()
    named = [t.get_text() for t, at in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True) if a <= at <= b]
    assert len(named) >= 3 and all(named) and len(set(named)) == len(named)


def test_values_that_differ_look_different(tmp_path: Path) -> None:
    rates = (1e-5, 2e-5, 0.1234567, 0.1234568)
    runs = [{"settings": {"local.lr": lr}, "federated": 0.9, "local": {"a": 0.5}} for lr in rates[:2]]
    ax = plots.scores(sweep_table(write_sweep(tmp_path / "s", runs)), "local.lr")
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1e-05", "2e-05"]
    df = load_runs([write_run(tmp_path / "e" / f"r{n}", **{"local.lr": lr}) for n, lr in enumerate(rates)])
    assert [label for label, _ in plots.settings(df)] == [f"lr = {lr!r}" for lr in rates]


def test_titles_say_what_varies(tmp_path: Path) -> None:
    lora = {"adapter.name": "lora", "adapter.r": 8}
    for name, keys in {"a": lora, "b": lora | {"adapter.r": 4}, "c": {"adapter.name": "ia3"}}.items():
        write_run(tmp_path / "e" / name, **keys)
    titles = [label for label, _ in plots.settings(load_runs(tmp_path / "e"))]
    assert titles == ["lora r=8", "lora r=4", "ia3"]
    for n in range(2):  # more than can be read: those that tell most
        keys = {f"local.k{key}": n for key in range(5)}
        write_run(tmp_path / "f" / f"r{n}", **keys)
    titles = [label for label, _ in plots.settings(load_runs(tmp_path / "f"))]
    assert titles == ["k0 = 0, \N{HORIZONTAL ELLIPSIS}", "k0 = 1, \N{HORIZONTAL ELLIPSIS}"]
    write_run(tmp_path / "g" / "r1", **{f"local.k{key}": 1 for key in range(5)})
    both = load_runs([tmp_path / "f" / "r1", tmp_path / "g" / "r1"])
    assert [label for label, _ in plots.settings(both)] == ["f", "g"]


def test_figures_in_other_formats(run: Path) -> None:
    written = plots.save_figures(run, run.parent / "out", "loss", formats=["pdf", "svg"])
    assert [file.name for file in written] == [
        f"{name}.{kind}" for name in ("loss", "partition", "clients") for kind in ("pdf", "svg")
    ]
    assert written[0].read_bytes().startswith(b"%PDF") and b"<svg" in written[1].read_bytes()
    first = [file.read_bytes() for file in written]
    plots.save_figures(run, run.parent / "out", "loss", formats=["pdf", "svg"])
    assert [file.read_bytes() for file in written] == first, "the same figure is the same file"
    with pytest.raises(UserError, match="format 'jpg' is not available; use one of png, pdf, svg"):
        plots.save_figures(run, formats=["jpg"])
