"""Cross-site evaluation, and figures of how clients fare: every model on every client's own validation examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import colors
from test_evaluation import LABELS, by_words, in_double
from test_hooks import toy
from transformers import AutoTokenizer

import fedsim
from fedsim.analysis import plots
from fedsim.core.errors import UserError
from fedsim.core.files import OWN
from fedsim.runs.build import prepare

ALL = ["local", "federated", "central"]
UNEVEN = {"name": "dirichlet", "num_clients": 4, "alpha": 0.5, "min_rows": 4}
POOL = {"name": "pool", "workers": 2, "threads": 1}
WORK = {"steps": 6, "batch_size": 6, "lr": 2e-2}


def crossed(lab: Any, **keys: Any) -> Any:
    sections = {"modes": ALL, "partition": UNEVEN, "local": WORK, "evaluate": {"cross_site": True}, **keys}
    return lab.exp(**{**sections, "algorithm": keys.get("algorithm", toy("Ditto"))})


def test_each_model_meets_each_site(lab: Any) -> None:
    """The exported folders, by plain PEFT, on the examples that the partition gives each client."""
    exp = crossed(lab)
    run = lab.run(exp)
    parts, tok = prepare(exp), AutoTokenizer.from_pretrained(exp.model.path)
    names = [parts.partition.name(c) for c in range(4)]
    own = {name: rows for c, name in enumerate(names) if len(rows := parts.own.rows(c))}
    places = {**{f"local {n}": f"local/{n}" for n in names}, **{f"own {n}": f"{OWN}/{n}" for n in names}}
    places |= {"global": "global", "central": "central"}
    tables = {metric: fedsim.cross_site(run, metric) for metric in ("accuracy", "loss")}
    assert fedsim.cross_site(fedsim.run(exp, progress=False)).equals(tables["accuracy"]), "best.metric"
    seen = set()
    for metric, table in tables.items():
        assert list(table.index) == list(places) and list(table.columns) == list(own)
        kept = pd.read_csv(run / "cross_site" / f"{metric}.csv", index_col="model")
        assert list(kept.index) == list(places) and list(kept.columns) == list(own)
        assert np.allclose(kept, table, rtol=1e-14, atol=0), "the file holds what the metrics do"
    for model, place in places.items():
        loaded = in_double(exp, run / place)
        for site, rows in own.items():
            loss, accuracy, _ = by_words(loaded, tok, [lab.rows["validation"][r] for r in rows], LABELS)
            assert tables["loss"].loc[model, site] == pytest.approx(loss, rel=1e-9)
            assert tables["accuracy"].loc[model, site] == pytest.approx(accuracy)
            seen.add(round(loss, 9))
    assert len(own) > 2 and len(seen) == len(places) * len(own), "all of them differ"
    df = fedsim.load_runs(run)
    spread = plots.spread_table(df)
    for site in own:
        assert spread.loc[site, ("own", "value")] == tables["accuracy"].loc[f"own {site}", site]
    rows = df[(df["split"] == f"site:{names[0]}") & (df["name"] == "loss")]
    assert len(rows) == len(places) and (rows["weight"] == len(own[names[0]])).all() and (rows["round"] == 1).all()
    before = df[(df["scope"] == "federated") & (df["split"] == "site") & (df["name"] == "merged_loss")]
    for site, value in zip(before["client"], before["value"], strict=True):
        assert tables["loss"].loc["global", site] == pytest.approx(value, rel=1e-12)


def test_nothing_else_changes_and_a_pool_gives_the_same(lab: Any) -> None:
    run = lab.run(crossed(lab))
    without = lab.run(crossed(lab, evaluate={"cross_site": False}))
    assert lab.metrics(without) == [m for m in lab.metrics(run) if not m["split"].startswith("site:")]
    lab.same_bits(run, lab.run(crossed(lab, name="pool", executor=POOL)))
    with pytest.raises(UserError, match=r"no cross-site evaluation; run it with evaluate.cross_site=true"):
        fedsim.cross_site(without)
    with pytest.raises(UserError, match="no metric 'exact_match'"):
        fedsim.cross_site(run, "exact_match")


@pytest.mark.parametrize("at", ["score", "csv"])
def test_a_stopped_evaluation_is_done_again(lab: Any, monkeypatch: Any, at: str) -> None:
    """Stopped in the middle of the models of the federated mode, and once all modes are done."""
    import fedsim.analysis.cross_site as matrix
    from fedsim.executors import SerialExecutor

    whole = lab.run(crossed(lab, name="whole"))
    exp, score, seen = crossed(lab), SerialExecutor.score, []

    def stops(self: Any, requests: Any) -> Any:
        if any(r.sites and r.by_row for r in requests):
            seen.append(1)
            if len(seen) == 4:  # after the local models, the global one and a client's own
                raise KeyboardInterrupt
        return score(self, requests)

    def fails(run: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((SerialExecutor, "score", stops) if at == "score" else (matrix, "write_cross_site", fails)))
        with pytest.raises(KeyboardInterrupt):
            lab.run(exp)
    resumed = lab.run(exp)
    lab.same_bits(whole, resumed)
    for file in (whole / "cross_site").iterdir():
        assert file.read_bytes() == (resumed / "cross_site" / file.name).read_bytes()


def test_generated_answers_are_compared_too(lab: Any) -> None:
    data = {"labels": None, "template": "{label}: {sentence}"}
    evaluate = {"cross_site": True, "generate": True, "max_new_tokens": 3}
    run = lab.run(
        crossed(
            lab,
            data=data,
            evaluate=evaluate,
            partition={"name": "iid", "num_clients": 2},
            modes=["local", "federated"],
            algorithm={"name": "fedavg"},
        )
    )
    table = fedsim.cross_site(run, "exact_match")
    assert list(table.index)[-1] == "global" and np.isfinite(table.to_numpy()).all()
    assert {f.stem for f in (run / "cross_site").iterdir()} == {"loss", "exact_match", "perplexity"}


def test_clients_without_examples_are_named(lab: Any, capsys: Any) -> None:
    """24 validation examples for 30 clients: the others have no column."""
    exp = crossed(lab, partition={"name": "iid", "num_clients": 30}, modes=["federated"], algorithm={"name": "fedavg"})
    run = fedsim.run(exp, progress=True).path
    table = fedsim.cross_site(run)
    left = 30 - len(table.columns)
    assert left > 0 and list(table.index) == ["global"]
    assert (
        f"cross-site evaluation: {left} of 30 clients have no validation examples of their own"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("partition", "why"),
    [
        (
            {"name": "virtual", "num_clients": 5, "min_rows": 3, "max_rows": 5},
            "no client has validation examples of its own",
        ),
        ({"name": "iid", "num_clients": 101}, "101 clients hold examples"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    lab: Any, partition: dict[str, Any], why: str, tmp_path: Path
) -> None:
    lines = "".join(f'{{"sentence": "word {i}", "label": "{LABELS[i % 3]}"}}\n' for i in range(150))
    (tmp_path / "many.jsonl").write_text(lines)
    exp = crossed(lab, partition=partition, modes=["federated"], data={"path": str(tmp_path / "many.jsonl")})
    with pytest.raises(UserError, match=why) as caught:
        lab.run(exp)
    assert "evaluate.cross_site: true" in str(caught.value) and "\n" not in str(caught.value)


def test_the_heat_map_shows_the_matrix() -> None:
    table = pd.DataFrame(
        [[0.9, 0.2], [0.1, 0.8], [0.5, np.nan]],
        index=pd.Index(["local a", "local b", "global"], name="model"),
        columns=pd.Index(["a", "b"], name="site"),
    )
    for metric in ("accuracy", "loss"):
        ax = plots.sites_matrix(table, metric=metric)
        (image,) = ax.get_images()
        assert np.array_equal(np.ma.filled(image.get_array(), np.nan), table.to_numpy(), equal_nan=True)
        best = image.cmap(image.norm(0.9 if metric == "accuracy" else 0.1))
        worst = image.cmap(image.norm(0.1 if metric == "accuracy" else 0.9))
        assert sum(colors.to_rgb(best)) < sum(colors.to_rgb(worst)), "darker is better"
        assert [text.get_text() for text in ax.texts] == ["0.90", "0.20", "0.10", "0.80", "0.50", "nan"]
        assert sorted(tuple(np.round(p.get_xy(), 2)) for p in ax.patches) == [(-0.46, -0.46), (0.54, 0.54)]


def test_the_spread_over_clients_is_that_of_the_metrics() -> None:
    """Dots, quantiles, mean by examples and worst client of each kind of model, of the last round."""
    rng, rows, told = np.random.default_rng(1), [], {}
    names = {"local": "{}", "federated own": "own_{}", "federated": "merged_{}"}
    for metric in ("accuracy", "loss"):
        for scope, name in names.items():
            for round in (1, 2):
                values, sizes = rng.random(11), rng.integers(1, 9, 11)
                about = {
                    "round": round,
                    "scope": scope.split()[0],
                    "split": "site",
                    "name": name.format(metric),
                    "run": "a",
                }
                rows += [
                    {**about, "client": f"site-{k:02}", "value": v, "weight": float(n)}
                    for k, (v, n) in enumerate(zip(values, sizes, strict=True))
                ]
            told[metric, scope] = values, sizes
    df = pd.DataFrame(rows)
    for metric in ("accuracy", "loss"):
        ax = plots.spread(df, metric=metric)
        assert [t.get_text() for t in ax.get_yticklabels()] == ["local-only", "own model", "global model"]
        lines = iter(ax.get_lines())
        for row, scope in enumerate(names):
            values, sizes = told[metric, scope]
            dots, mean, worst = next(lines), next(lines), next(lines)
            assert np.array_equal(dots.get_xdata(), values)
            assert mean.get_xdata()[0] == pytest.approx((values * sizes).sum() / sizes.sum())
            extreme = values.min() if metric == "accuracy" else values.max()
            assert worst.get_xdata()[0] == extreme
            assert ax.texts[row].get_text() == f"site-{values.tolist().index(extreme):02}"
            tenth, quarter, median = (c.get_segments()[0][:, 0] for c in ax.collections[3 * row : 3 * row + 3])
            assert tenth == pytest.approx(np.quantile(values, [0.1, 0.9]))
            assert quarter == pytest.approx(np.quantile(values, [0.25, 0.75]))
            assert median[0] == pytest.approx(np.quantile(values, 0.5))
    with pytest.raises(UserError, match="no client has scores of 'macro_f1' on validation examples of its own"):
        plots.spread(df, metric="macro_f1")


def test_a_run_draws_its_clients_and_its_matrix(tmp_path: Path) -> None:
    exp = {"name": "drawn", "results": str(tmp_path), "rounds": 1, "partition": {"name": "iid", "num_clients": 3}}
    exp |= {"local": {"steps": 1, "batch_size": 4}, "evaluate": {"cross_site": True, "max_examples": 40}}
    run = fedsim.run({**exp, "executor": {"name": "serial", "threads": 1}}, progress=False).path
    assert {"clients.png", "cross_site.png"} <= {f.name for f in (run / "figures").iterdir()}
    table, matrix = plots.spread_table(fedsim.load_runs(run)), fedsim.cross_site(run)
    for site in matrix.columns:
        assert table.loc[site, ("global", "value")] == pytest.approx(matrix.loc["global", site])
        assert table.loc[site, ("central", "value")] == pytest.approx(matrix.loc["central", site])
        assert table.loc[site, ("local", "value")] == pytest.approx(matrix.loc[f"local {site}", site])
