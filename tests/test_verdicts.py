"""Verdicts: each check on curves whose outcome is worked out by hand, standard errors in closed form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiers import fast_only

from fedsim.analysis.finished import (
    PAIRED,
    PAIRED_TEST,
    UNKNOWN,
    UNPAIRED,
    FinishedRun,
    differences,
    format_score,
    inside_rounds,
    load_run,
    ratio_error,
)
from fedsim.analysis.verdicts import CHECKS, TEXTS, Verdict, judge
from fedsim.core.errors import UserError
from fedsim.core.section import keys_of

REFERENCE = Path(__file__).parents[1] / "results/reference/lora_sentiment_smollm2/e5594966fe4e"
COUNTS = {"site-1": [6, 59, 25], "site-2": [221, 525, 0], "site-3": [19, 523, 433]}
WORDS = ["negative", "neutral", "positive"]
STEPS = 10  # a round; scored in its middle and at its end


def write(
    folder: Path,
    local: Mapping[str, Sequence[float]] | None = None,
    merged: Sequence[float] = (),
    clients: Mapping[str, Sequence[float]] | None = None,
    central: Sequence[float] = (),
    metric: str = "accuracy",
    weight: float | None = 226.0,
    seed: int = 0,
    counts: Mapping[str, Sequence[int]] | None = None,
    predicted: Mapping[str, float] | None = None,
    rounds: int | None = None,
) -> Path:
    """A finished run with given scores.

    `local`, `central`: at 0, in the middle of round 1, at its end, in the middle of round 2, ...; `clients`: the same
    without the first; `merged`: before training, after round 1, 2, ...; `predicted`: rows by class of site-2 alone.
    """
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []

    def log(half: int, scope: str, client: str | None, value: float, name: str = metric) -> None:
        base = {"round": -(-half // 2), "step": half * STEPS // 2, "scope": scope, "client": client}
        base |= {"split": "validation", "name": name, "value": value, "weight": weight, "seconds": float(len(rows))}
        rows.append(base)

    for site, curve in (local or {}).items():
        for half, value in enumerate(curve):
            log(half, "local", site, value)
        if site == "site-2":
            for word, count in (predicted or {}).items():
                log(0, "local", site, 99.0, f"predicted:{word}")
                log(len(curve) - 1, "local", site, count, f"predicted:{word}")
    for number, value in enumerate(merged):
        for site, curve in (clients or {}).items():
            for half in (2 * number - 1, 2 * number) if number else ():
                log(half, "federated", site, curve[half - 1])
        log(2 * number, "federated", None, value)
    for half, value in enumerate(central):
        log(half, "central", None, value)
    last = max((row["round"] for row in rows), default=0)
    config = {"name": "made", "seed": seed, "rounds": rounds or last, "best": {"metric": metric}}
    config["best"]["mode"] = "min" if metric == "loss" else "max"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "rounds": last, "seconds": 75.0}))
    counts = COUNTS if counts is None else counts
    report = {"class_names": WORDS, "client_names": list(counts), "class_counts": list(counts.values())}
    report |= {"num_clients": len(counts), "sizes": [sum(one) for one in counts.values()]}
    (folder / "partition.json").write_text(json.dumps(report))
    return folder


def write_scores(
    folder: Path,
    labels: np.ndarray,
    predicted: Mapping[str, np.ndarray] | None = None,
    nll: Mapping[str, np.ndarray] | None = None,
    tokens: np.ndarray | None = None,
) -> None:
    """`scores.npz` of a run, by model."""
    names, n = list(predicted or nll or {}), len(labels)
    nothing = {name: np.full(n, -1) for name in names}
    arrays = {
        "validation_rows": np.arange(n),
        "validation_labels": np.asarray(labels, dtype=np.int64),
        "names": np.array(names),
        "last_nll": np.array([(nll or nothing)[name] for name in names], dtype=np.float64).reshape(len(names), n),
        "tokens": np.ones(n, dtype=np.int64) if tokens is None else np.asarray(tokens, dtype=np.int64),
        "last_predicted": np.array([(predicted or nothing)[name] for name in names], dtype=np.int16).reshape(-1, n),
    }
    np.savez(folder / "scores.npz", **arrays)


def verdict(line: dict[str, Any], *runs: Path, metric: str = "accuracy", label: str = "a") -> Verdict:
    return judge({"run": label, **line}, {label: [load_run(run) for run in runs]}, metric)


# ------------------------------------------------------------------------------------------- standard errors


def test_ratio_error_with_sizes_of_one_is_the_error_of_the_mean() -> None:
    values = np.array([0.0, 1.0, 1.0, 3.0, -2.0])
    assert ratio_error(values, np.ones(5)) == pytest.approx(values.std(ddof=1) / np.sqrt(5), rel=1e-12)


def test_ratio_error_by_hand() -> None:
    # R = 4/3, e = 1 - 4/3, 3 - 8/3 = -1/3, 1/3; sqrt(2 / 1 * 2/9) / 3 = 2/9
    assert ratio_error(np.array([1.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx(2 / 9)
    assert ratio_error(np.array([2.0, 4.0]), np.array([1.0, 2.0])) == 0.0, "one ratio in all rows"
    assert np.isnan(ratio_error(np.array([2.0]), np.array([1.0])))


def test_difference_is_paired_by_rows_where_they_are_kept(tmp_path: Path) -> None:
    run = write(tmp_path / "r", {"site-1": [0.2, 0.5, 0.5]}, [0.2, 0.75])
    labels = np.array([0, 1, 2, 0])
    scores = {"federated": np.array([0, 1, 2, 1]), "local site-1": np.array([0, 2, 1, 0])}  # right - right: 0 1 1 -1
    write_scores(run, labels, scores)
    found, source = differences(load_run(run), ["local site-1"], "accuracy")
    assert source == PAIRED
    assert found["local site-1"] == pytest.approx((0.25, np.std([0, 1, 1, -1], ddof=1) / 2))


def test_difference_of_losses_is_over_answer_tokens(tmp_path: Path) -> None:
    run = write(tmp_path / "r", None, [9.0, 1.0], central=[9.0, 2.0, 1.0], metric="loss")
    nll = {"federated": np.array([1.0, 5.0]), "central": np.array([0.0, 2.0])}  # apart 1, 3 over 1, 2 tokens
    write_scores(run, np.array([-1, -1]), nll=nll, tokens=np.array([1, 2]))
    found, source = differences(load_run(run), ["central"], "loss")
    assert source == PAIRED and found["central"] == pytest.approx((4 / 3, 2 / 9))
    nll["central"] = np.full(2, np.nan)  # not scored
    write_scores(run, np.array([-1, -1]), nll=nll, tokens=np.array([1, 2]))
    assert differences(load_run(run), ["central"], "loss")[1] == UNKNOWN


def test_difference_falls_back_to_the_test_rows_then_to_unpaired(tmp_path: Path) -> None:
    run = write(tmp_path / "r", {"site-1": [0.2, 0.5, 0.8]}, [0.2, 0.9], weight=100.0)
    found, source = differences(load_run(run), ["local site-1"], "accuracy")
    assert source == UNPAIRED
    assert found["local site-1"] == pytest.approx((0.1, np.sqrt(0.9 * 0.1 / 100 + 0.8 * 0.2 / 100)))
    said = {"local site-1": {"rows": 50, "difference": -0.04, "standard_error": 0.03}}
    (run / "comparison.json").write_text(json.dumps(said))
    found, source = differences(load_run(run), ["local site-1"], "accuracy")
    assert source == PAIRED_TEST and found["local site-1"] == (-0.04, 0.03)


def test_difference_of_losses_without_rows_has_no_error(tmp_path: Path) -> None:
    run = load_run(write(tmp_path / "r", None, [9.0, 1.5], central=[9.0, 2.0, 1.0], metric="loss"))
    found, source = differences(run, ["central"], "loss")
    assert source == UNKNOWN and found["central"][0] == pytest.approx(0.5) and np.isnan(found["central"][1])


def test_clients_inside_a_round_are_read_where_all_were_scored(tmp_path: Path) -> None:
    clients = {"site-1": [0.3, 0.4, 0.5, 0.6], "site-2": [0.5, 0.6, 0.7, 0.8]}
    found = inside_rounds(load_run(write(tmp_path / "r", None, [0.1, 0.7, 0.9], clients)), "accuracy")
    at, values = found[2]
    assert at.tolist() == [1.5, 2.0], "without the merged model that round 2 began with"
    assert values.tolist() == [[0.5, 0.6], [0.7, 0.8]]


@fast_only(0, 1, 3, 7)
@pytest.mark.parametrize(
    ("value", "metric", "sign", "text"),
    [
        (0.96, "accuracy", False, "0.960"),
        (0.0123, "accuracy", True, "+0.012"),
        (6.54, "loss", False, "6.54"),
        (0.0141, "loss", False, "0.0141"),
        (-0.5, "loss", True, "-0.500"),
        (123.4, "loss", False, "123"),
        (-0.0, "loss", False, "0.00"),
        (float("nan"), "loss", False, "-"),
    ],
)
def test_scores_as_text(value: float, metric: str, sign: bool, text: str) -> None:
    assert format_score(value, metric, sign) == text


# ------------------------------------------------------------------------------------------- lacking_class

LABELS = np.repeat([0, 1, 2], [26, 147, 53])  # the ceiling without the last class is 173 / 226
LACKING = {"check": "lacking_class", "site": "site-2", "class": "positive"}


def lacking(folder: Path, rows: int, scores: bool = True, **more: Any) -> Path:
    """A run whose site-2 ends with so many of 226 rows right."""
    run = write(folder, {"site-2": [0.2, 200 / 226, rows / 226]}, **more)
    if scores:
        write_scores(run, LABELS, {"federated": np.zeros(226)})
    return run


@pytest.mark.parametrize(("rows", "passed"), [(150, True), (173, True), (177, True), (178, False)])
def test_lacking_class_is_judged_at_its_upper_side(tmp_path: Path, rows: int, passed: bool) -> None:
    found = verdict(LACKING, lacking(tmp_path / "r", rows))
    assert found.passed is passed
    assert f"final {rows / 226:.3f}; the ceiling is 0.765, with 4 examples of 226 0.783" in found.observed
    assert "highest 0.885, at 50 % of the steps" in found.observed


def test_lacking_class_tolerance_and_predictions(tmp_path: Path) -> None:
    run = lacking(tmp_path / "r", 174, predicted={"negative": 30.0, "neutral": 195.0, "positive": 1.0})
    assert verdict(LACKING | {"rows": 1}, run).passed is True
    strict = verdict(LACKING | {"rows": 0}, run)
    assert strict.passed is False and "predicted negative 30, neutral 195, positive 1;" in strict.observed


def test_lacking_class_without_row_scores_needs_the_ceiling(tmp_path: Path) -> None:
    run = lacking(tmp_path / "r", 178, scores=False)
    assert verdict(LACKING, run).passed is None and "no scores.npz" in verdict(LACKING, run).observed
    assert verdict(LACKING | {"ceiling": 173 / 226}, run).passed is False
    assert verdict(LACKING | {"ceiling": 174 / 226}, run).passed is True
    unsaid = lacking(tmp_path / "s", 178, scores=False, weight=None)
    assert verdict(LACKING | {"ceiling": 174 / 226}, unsaid).passed is None


def test_lacking_class_with_loss_as_the_metric_looks_at_accuracy(tmp_path: Path) -> None:
    assert verdict(LACKING, lacking(tmp_path / "r", 170), metric="loss").passed is True


def test_lacking_class_is_not_judged_where_the_site_holds_it(tmp_path: Path) -> None:
    run = lacking(tmp_path / "r", 150)
    found = verdict(LACKING | {"class": "neutral"}, run)
    assert found.passed is None and found.observed == "site-2 has 525 neutral examples in this partition"
    assert "no client 'site-9'" in verdict(LACKING | {"site": "site-9"}, run).observed
    assert "no class 'sad'" in verdict(LACKING | {"class": "sad"}, run).observed
    only_merged = write(tmp_path / "s", None, [0.2, 0.9])
    assert "no local-only validation accuracy of site-2" in verdict(LACKING, only_merged).observed


# --------------------------------------------------------------------------------- the merged model and sites


@pytest.mark.parametrize(("merged", "passed"), [(0.81, True), (0.8, False), (0.79, False)])
def test_merged_beats_mean(tmp_path: Path, merged: float, passed: bool) -> None:
    run = write(tmp_path / "r", {"site-1": [0.2, 0.95, 0.7], "site-2": [0.2, 0.1, 0.9]}, [0.2, merged])
    found = verdict({"check": "merged_beats_mean"}, run)
    assert found.passed is passed and found.observed.startswith(
        f"global model {merged:.3f}; mean of 2 clients 0.800, difference (global - mean)"
    )
    assert found.name == "global model above the mean of the clients (a)"


def test_merged_beats_mean_by_loss(tmp_path: Path) -> None:
    run = write(tmp_path / "r", {"site-1": [9.0, 1.0, 0.2]}, [9.0, 0.1], metric="loss")
    found = verdict({"check": "merged_beats_mean"}, run, metric="loss")
    assert found.passed is True and "below the mean" in found.name
    worse = write(tmp_path / "s", {"site-1": [9.0, 1.0, 0.2]}, [9.0, 0.3], metric="loss")
    assert verdict({"check": "merged_beats_mean", "metric": "loss"}, worse).passed is False


def test_a_mode_that_did_not_run_is_not_judged(tmp_path: Path) -> None:
    central = write(tmp_path / "r", central=[0.2, 0.5, 0.9])
    for check in ("merged_beats_mean", "merged_beats_lacking", "merged_near_best_site", "below_sites", "saw_tooth"):
        assert verdict({"check": check}, central).passed is None
    assert verdict({"check": "as_low_as_central"}, central).observed == "no validation accuracy of the global model"
    untrained = write(tmp_path / "s", {"site-1": [0.2]}, [0.2])
    assert verdict({"check": "merged_beats_mean"}, untrained).passed is None, "a score before training is no end"


def test_merged_beats_lacking_looks_at_sites_without_a_class_alone(tmp_path: Path) -> None:
    local = {"site-1": [0.2, 0.3, 0.99], "site-2": [0.2, 0.3, 0.77], "site-3": [0.2, 0.3, 0.6]}
    run = write(tmp_path / "r", local, [0.2, 0.8])
    found = verdict({"check": "merged_beats_lacking"}, run)
    assert found.passed is True and found.observed.startswith(
        "global model 0.800; site-2 (no positive) 0.770, difference (global - site-2) +0.030"
    )
    two = {"site-1": [0, 5, 0], "site-2": [1, 1, 0], "site-3": [1, 1, 1]}
    worst = verdict({"check": "merged_beats_lacking"}, write(tmp_path / "s", local, [0.2, 0.8], counts=two))
    assert worst.passed is False and "site-1 (no negative, no positive) 0.990" in worst.observed
    whole = verdict(
        {"check": "merged_beats_lacking"}, write(tmp_path / "t", local, [0.2, 0.8], counts={"site-1": [1] * 3})
    )
    assert whole.passed is None and whole.observed == "no client with a local-only model lacks a class"


def right(n: int, *spans: tuple[int, int]) -> np.ndarray:
    """Predictions that are right (class 0) in these spans of n rows of class 0, wrong elsewhere."""
    out = np.ones(n, dtype=int)
    for low, high in spans:
        out[low:high] = 0
    return out


def test_near_best_site_is_judged_by_the_paired_error(tmp_path: Path) -> None:
    # The site is right in 8 rows more and in all that the merged model has: difference -0.08, error 0.0273 paired
    # (sqrt((8 - 0.64) / 99 / 100)), 0.0487 unpaired (sqrt((0.82 * 0.18 + 0.90 * 0.10) / 100)).
    run = write(tmp_path / "r", {"site-1": [0.1, 0.5, 0.90], "site-2": [0.1, 0.5, 0.7]}, [0.1, 0.82], weight=100.0)
    unpaired = verdict({"check": "merged_near_best_site"}, run)
    assert unpaired.passed is True and "(global - site-1) -0.080, standard error 0.049 (unpaired" in unpaired.observed
    predicted = {
        "federated": right(100, (0, 82)),
        "local site-1": right(100, (0, 90)),
        "local site-2": right(100, (0, 70)),
    }
    write_scores(run, np.zeros(100), predicted)
    found = verdict({"check": "merged_near_best_site"}, run)
    assert found.passed is False
    assert "global model 0.820; site-1 0.900," in found.observed
    assert "-0.080, standard error 0.027 (paired on the same validation examples)" in found.observed


def test_near_best_site_within_two_errors_passes(tmp_path: Path) -> None:
    run = write(tmp_path / "r", {"site-1": [0.1, 0.5, 0.92]}, [0.1, 0.90], weight=100.0)
    # right by the merged one alone: 6 rows, by the site alone: 8: -0.02, error sqrt((14 - 0.04) / 99 / 100) = 0.0376
    write_scores(run, np.zeros(100), {"federated": right(100, (0, 90)), "local site-1": right(100, (6, 98))})
    found = verdict({"check": "merged_near_best_site"}, run)
    assert found.passed is True and "-0.020, standard error 0.038" in found.observed


def test_near_best_site_on_test_rows_takes_the_site_that_is_best_there(tmp_path: Path) -> None:
    run = write(tmp_path / "r", {"site-1": [0.1, 0.5, 0.9], "site-2": [0.1, 0.5, 0.8]}, [0.1, 0.9])
    said = {"local site-1": {"difference": 0.05, "standard_error": 0.01}}
    said["local site-2"] = {"difference": -0.05, "standard_error": 0.02}
    (run / "comparison.json").write_text(json.dumps(said))
    found = verdict({"check": "merged_near_best_site"}, run)
    assert found.passed is False and "site-2 0.800" in found.observed and "same test examples" in found.observed


# ------------------------------------------------------------------------------------------------ gap_shrinks


def gap_run(folder: Path, gap: float, seed: int = 0, metric: str = "accuracy") -> FinishedRun:
    better = -gap if metric == "loss" else gap
    return load_run(write(folder, {"site-1": [0.1, 0.5, 0.5]}, [0.1, 0.5 + better], metric=metric, seed=seed))


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_gap_shrinks_from_first_to_last(tmp_path: Path, metric: str) -> None:
    runs = {
        label: [gap_run(tmp_path / label, gap, 0, metric)] for label, gap in zip("abc", (0.1, 0.2, 0.05), strict=True)
    }
    found = judge({"check": "gap_shrinks", "runs": ["a", "b", "c"]}, runs, metric)
    texts = {"accuracy": "a +0.100, b +0.200, c +0.050", "loss": "a +0.100, b +0.200, c +0.0500"}
    assert found.passed is True and found.observed == f"gap {texts[metric]}"
    assert judge({"check": "gap_shrinks", "runs": ["a", "b"]}, runs, metric).passed is False
    assert judge({"check": "gap_shrinks", "runs": ["a", "a"]}, runs, metric).passed is False, "no less is no shrinking"
    missing = judge({"check": "gap_shrinks", "runs": ["a", "z"]}, runs, metric)
    assert missing.passed is None and missing.observed == "no finished run 'z'"


def test_gap_shrinks_pairs_seeds(tmp_path: Path) -> None:
    runs = {
        "a": [gap_run(tmp_path / "a0", 0.30, 0), gap_run(tmp_path / "a1", 0.10, 1)],
        "b": [gap_run(tmp_path / "b1", 0.15, 1), gap_run(tmp_path / "b0", 0.05, 0), gap_run(tmp_path / "b7", 0.1, 7)],
    }
    found = judge({"check": "gap_shrinks", "runs": ["a", "b"]}, runs)
    assert found.passed is True
    assert found.observed == "held for 1 of 2 seeds; mean gap a +0.200, b +0.100"


# ------------------------------------------------------------------------------------ federated and centralized


def losses(folder: Path, merged: float, central: float, scores: bool = True) -> Path:
    """A run that ends at these losses; two rows of 1 and 2 tokens, on which the merged model is 0.5 off either way."""
    run = write(folder, None, [9.0, merged], central=[9.0, 5.0, central], metric="loss")
    if scores:
        base = np.array([1.0, 2.0])
        nll = {"federated": merged * base + np.array([0.5, -0.5]), "central": central * base}
        write_scores(run, np.array([-1, -1]), nll=nll, tokens=np.array([1, 2]))
    return run


def test_as_low_as_central_within_two_errors(tmp_path: Path) -> None:
    # d = merged - central; row differences d + 0.5 and 2 d - 0.5 over 1 and 2 tokens: R = d, e = 0.5, -0.5,
    # error = sqrt(2 * 0.5) / 3 = 1/3; two of them 0.667
    check = {"check": "as_low_as_central", "metric": "loss"}
    near = verdict(check, losses(tmp_path / "near", 1.6, 1.0))
    assert (
        near.passed is True
        and "difference (global - central) +0.600, standard error 0.333 (paired on the same" in near.observed
    )
    far = verdict(check, losses(tmp_path / "far", 1.7, 1.0))
    assert far.passed is False and "global model 1.70; central 1.00," in far.observed


def test_as_low_as_central_without_an_error_passes_only_if_lower(tmp_path: Path) -> None:
    check = {"check": "as_low_as_central", "metric": "loss"}
    assert verdict(check, losses(tmp_path / "low", 0.9, 1.0, scores=False)).passed is True
    higher = verdict(check, losses(tmp_path / "high", 1.1, 1.0, scores=False))
    assert higher.passed is None and "no standard error" in higher.observed


def test_as_high_as_central_by_accuracy(tmp_path: Path) -> None:
    run = write(tmp_path / "r", None, [0.2, 0.8], central=[0.2, 0.5, 0.9], weight=100.0)
    found = verdict({"check": "as_low_as_central"}, run)  # error sqrt(0.16 / 100 + 0.09 / 100) = 0.05
    assert found.passed is True and "as high as" in found.name
    more = write(tmp_path / "s", None, [0.2, 0.8], central=[0.2, 0.5, 0.9], weight=110.0)
    assert verdict({"check": "as_low_as_central"}, more).passed is False


def test_below_sites_prints_each(tmp_path: Path) -> None:
    local = {"site-1": [9.0, 1.0, 0.4], "site-2": [9.0, 1.0, 0.3]}
    run = write(tmp_path / "r", local, [9.0, 0.2], metric="loss")
    found = verdict({"check": "below_sites"}, run, metric="loss")
    assert found.passed is True
    assert found.observed.startswith(
        "global model 0.200; site-1 0.400, difference (global - site-1) -0.200; site-2 0.300"
    )
    equal = verdict({"check": "below_sites"}, write(tmp_path / "s", local, [9.0, 0.3], metric="loss"), metric="loss")
    assert equal.passed is False and equal.name == "federated ends below each client (a)"


def test_many_sites_print_the_closest(tmp_path: Path) -> None:
    local = {f"site-{n}": [0.1, 0.1, 0.5 + n / 100] for n in range(20)}
    found = verdict({"check": "below_sites"}, write(tmp_path / "r", local, [0.1, 0.9], counts=COUNTS))
    assert found.passed is True and "site-19 0.690" in found.observed and "site-13 0.630" not in found.observed
    assert "and 14 more, further away" in found.observed


# ------------------------------------------------------------------------------- each site's best; the smallest set


def test_below_the_best_of_each_site_looks_at_every_scored_step(tmp_path: Path) -> None:
    local = {"site-1": [9.0, 1.0, 2.0], "site-2": [9.0, 3.0, 1.5]}
    check = {"check": "below_sites_best"}
    run = write(tmp_path / "r", local, [9.0, 1.1], metric="loss")
    found = verdict(check, run, metric="loss")
    assert found.passed is False and found.name == "federated ends below the lowest of each client (a)"
    assert found.observed.startswith(
        "global model 1.10; site-1 at 50 % of the steps 1.00, difference (global - site-1) +0.100;"
    )
    assert found.observed.endswith("site-2 at 100 % of the steps 1.50, difference (global - site-2) -0.400")
    assert verdict({"check": "below_sites"}, run, metric="loss").passed is True, "at the end it is below both"
    assert verdict(check, write(tmp_path / "s", local, [9.0, 0.9], metric="loss"), metric="loss").passed is True
    assert verdict(check, write(tmp_path / "t", local, [9.0, 1.0], metric="loss"), metric="loss").passed is False


def test_below_the_best_by_accuracy_is_above_it(tmp_path: Path) -> None:
    local = {"site-1": [0.1, 0.8, 0.5]}
    for merged, passed in ((0.81, True), (0.79, False)):
        run = write(tmp_path / str(merged), local, [0.1, merged], weight=100.0)
        found = verdict({"check": "below_sites_best"}, run)
        assert found.passed is passed and "above the highest of each client" in found.name
        error = np.sqrt((merged * (1 - merged) + 0.8 * 0.2) / 100)
        assert f"standard error {error:.3f}" in found.observed


def test_errors_of_a_sites_best_are_paired_only_where_it_is_the_last(tmp_path: Path) -> None:
    # Over 1 and 2 tokens: merged 4/3 with error 2/9; site-1 on the same rows 1 and 5: 2, e = -1, 1, error sqrt(4) / 3 = 2/3.
    nll = {"federated": np.array([1.0, 3.0]), "local site-1": np.array([1.0, 5.0])}
    told = {}
    for name, curve in (("last", [9.0, 3.0, 2.0]), ("earlier", [9.0, 1.5, 2.0])):
        run = write(tmp_path / name, {"site-1": curve}, [9.0, 4 / 3], metric="loss")
        write_scores(run, np.array([-1, -1]), nll=nll, tokens=np.array([1, 2]))
        told[name] = verdict({"check": "below_sites_best"}, run, metric="loss").observed
    # Paired: 0, -2 over 1 and 2: R = -2/3, e = 2/3, -2/3, error sqrt(2 * 8/9) / 3 = 4/9.
    assert told["last"].endswith("(global - site-1) -0.667, standard error 0.444")
    assert told["earlier"].endswith(f"(global - site-1) -0.167, standard error {np.hypot(2 / 9, 2 / 3):.3f}")


SIZES = {"site-1": [10, 10, 10], "site-2": [2, 2, 2], "site-3": [5, 5, 5]}


def overfitted(folder: Path, best: float, last: float, other: float, scores: bool = True) -> Path:
    """The smallest site, site-2, goes from `best` to `last`; site-3 rises by `other`, site-1 falls. Row errors by hand."""
    local = {"site-1": [9.0, 2.0, 1.0], "site-2": [9.0, best, last], "site-3": [9.0, 1.0, 1.0 + other]}
    run = write(folder, local, [9.0, 1.0], metric="loss", counts=SIZES)
    if (
        scores
    ):  # e = 0.3, -0.3 over 1 and 2 tokens: error sqrt(2 * 0.18) / 3 = 0.2, of two models sqrt(2) as much: 0.283
        base = np.array([1.0, 2.0])
        nll = {name: last * base + np.array([0.3, -0.3]) for name in ("federated", "local site-2")}
        write_scores(run, np.array([-1, -1]), nll=nll, tokens=np.array([1, 2]))
    return run


@pytest.mark.parametrize(
    ("best", "last", "other", "passed"),
    [
        (1.0, 1.6, 0.2, True),  # 0.6 is more than twice 0.283
        (1.0, 1.55, 0.2, False),  # 0.55 is not
        (1.0, 2.0, 1.1, False),  # site-3 rises more
        (2.0, 1.0, 0.1, False),  # it does not rise at all
    ],
)
def test_the_smallest_set_overfits(tmp_path: Path, best: float, last: float, other: float, passed: bool) -> None:
    found = verdict({"check": "smallest_overfits"}, overfitted(tmp_path / "r", best, last, other), metric="loss")
    assert found.passed is passed
    assert found.observed.startswith("site-2 (6 examples)") and "standard error at most 0.283" in found.observed
    assert f"0.00 (site-1, 30 examples), {format_score(other, 'loss')} (site-3, 15 examples)" in found.observed


def test_a_rise_without_a_standard_error_is_not_judged(tmp_path: Path) -> None:
    check = {"check": "smallest_overfits", "metric": "loss"}
    risen = verdict(check, overfitted(tmp_path / "r", 1.0, 3.0, 0.2, scores=False))
    assert risen.passed is None and risen.observed.startswith(
        "site-2 ends 2.00 worse than its best, but no standard error"
    )
    less = verdict(check, overfitted(tmp_path / "s", 1.0, 1.1, 0.2, scores=False))
    assert less.passed is False, "no error is needed to see that another site rises more"
    alone = write(tmp_path / "t", {"site-1": [9.0, 1.0, 2.0]}, metric="loss", counts=SIZES)
    assert "fewer than two clients" in verdict(check, alone).observed
    unsaid = write(tmp_path / "u", {"site-8": [9.0, 1.0, 2.0], "site-9": [9.0, 1.0, 2.0]}, metric="loss", counts=SIZES)
    assert verdict(check, unsaid).passed is None


def test_the_smallest_set_by_accuracy(tmp_path: Path) -> None:
    # 0.9 falls to 0.6 of 100 rows: errors 0.03 and 0.049, 0.0574 together
    local = {"site-1": [0.1, 0.5, 0.6], "site-2": [0.1, 0.9, 0.6], "site-3": [0.1, 0.8, 0.7]}
    found = verdict({"check": "smallest_overfits"}, write(tmp_path / "r", local, weight=100.0, counts=SIZES))
    assert found.passed is True and "worse by 0.300, standard error at most 0.057" in found.observed
    few = verdict({"check": "smallest_overfits"}, write(tmp_path / "s", local, weight=10.0, counts=SIZES))
    assert few.passed is False, "of 10 rows it is 0.181, and 0.3 within two"


# --------------------------------------------------------------------------------------------------- saw_tooth


@pytest.mark.parametrize(
    ("merged", "clients", "passed", "seen"),
    [
        # middle and end of rounds 1, 2, 3
        ([0.1, 0.8, 0.9, 0.92], [0.5, 0.6, 0.7, 0.85, 0.91, 0.915], True, "recovery in 2 of 2 rounds, drift in 1 of 2"),
        (
            [0.1, 0.8, 0.9, 0.92],
            [0.5, 0.6, 0.81, 0.85, 0.91, 0.915],
            False,
            "recovery in 2 of 2 rounds, drift in 0 of 2",
        ),
        ([0.1, 0.8, 0.9, 0.92], [0.5, 0.6, 0.7, 0.85, 0.8, 0.93], False, "recovery in 1 of 2 rounds, drift in 2 of 2"),
        ([0.1, 0.8, 0.9, 0.92], [0.9, 0.9, 0.7, 0.9, 0.8, 0.92], False, "recovery in 0 of 2 rounds, drift in 2 of 2"),
    ],
)
def test_saw_tooth_counts(tmp_path: Path, merged: list[float], clients: list[float], passed: bool, seen: str) -> None:
    both = {"site-1": [value - 0.05 for value in clients], "site-2": [value + 0.05 for value in clients]}
    run = write(tmp_path / "r", None, merged, both)
    found = verdict({"check": "saw_tooth"}, run)
    assert found.passed is passed and found.observed == f"{seen} (rounds 2 to 3)"
    turned = {site: [1.0 - value for value in curve] for site, curve in both.items()}
    by_loss = write(tmp_path / "s", None, [1.0 - value for value in merged], turned, metric="loss")
    found = verdict({"check": "saw_tooth"}, by_loss, metric="loss")
    assert found.passed is passed and found.observed == f"{seen} (rounds 2 to 3)", "for the loss the directions turn"


def test_saw_tooth_needs_a_second_round_and_clients(tmp_path: Path) -> None:
    one = write(tmp_path / "one", None, [0.1, 0.8], {"site-1": [0.5, 0.6]})
    assert verdict({"check": "saw_tooth"}, one).passed is None
    without = write(tmp_path / "without", None, [0.1, 0.8, 0.9])
    assert "no round from 2 on" in verdict({"check": "saw_tooth"}, without).observed


def test_saw_tooth_of_the_mean_over_seeds(tmp_path: Path) -> None:
    # round 2 begins with 0.8 in both; the clients' mean dips to 0.6 with one seed, to 0.9 with the other
    dips = write(tmp_path / "a", None, [0.1, 0.8, 0.95], {"site-1": [0.5, 0.5, 0.6, 0.9]}, seed=0)
    climbs = write(tmp_path / "b", None, [0.1, 0.8, 0.95], {"site-1": [0.5, 0.5, 0.9, 0.9]}, seed=1)
    found = verdict({"check": "saw_tooth"}, dips, climbs)
    assert found.passed is True, "0.75 in the middle, on average"
    assert (
        found.observed == "held for 1 of 2 seeds; mean over seeds: recovery in 1 of 1 rounds, drift in 1 of 1 (round 2)"
    )


# ------------------------------------------------------------------------------------------------------- seeds


def test_the_mean_over_seeds_decides_and_each_is_told(tmp_path: Path) -> None:
    up = write(tmp_path / "a", {"site-1": [0.1, 0.5, 0.5]}, [0.1, 0.7], seed=3)
    down = write(tmp_path / "b", {"site-1": [0.1, 0.5, 0.5]}, [0.1, 0.4], seed=4)
    found = verdict({"check": "merged_beats_mean"}, up, down)
    assert found.passed is True and found.observed.startswith("held for 1 of 2 seeds. Seed 3: global model 0.700")
    far = write(tmp_path / "c", {"site-1": [0.1, 0.5, 0.5]}, [0.1, 0.2], seed=5)
    assert verdict({"check": "merged_beats_mean"}, up, far).passed is False
    central = write(tmp_path / "d", central=[0.1, 0.5, 0.5], seed=6)
    partly = verdict({"check": "merged_beats_mean"}, up, central)
    assert partly.passed is True and partly.observed.endswith(
        "Seed 6 could not be judged: no validation accuracy of the global model"
    )
    assert "held for 1 of 1 seeds" in partly.observed


def test_errors_of_seeds_are_averaged_not_shrunk(tmp_path: Path) -> None:
    # each seed: difference 0.6, error 1/3; the mean of four has 0.6 and 1/3 too
    four = [losses(tmp_path / str(n), 1.6, 1.0) for n in range(4)]
    assert verdict({"check": "as_low_as_central", "metric": "loss"}, *four).passed is True


# -------------------------------------------------------------------------------------- a real run; mistakes


@pytest.fixture(scope="module")
def reference() -> FinishedRun:
    return load_run(REFERENCE)


def test_the_reference_run(reference: FinishedRun, tmp_path: Path) -> None:
    runs = {"lora-1": [reference]}
    mean = judge({"check": "merged_beats_mean", "run": "lora-1"}, runs)
    assert mean.passed is True and mean.observed.startswith("global model 0.929; mean of 3 clients 0.858")
    site = judge(LACKING | {"run": "lora-1", "ceiling": 173 / 226}, runs)
    assert site.passed is True and "positive 1;" in site.observed and "highest 0.814, at 60 %" in site.observed
    best = judge({"check": "merged_near_best_site", "run": "lora-1"}, runs)
    assert (
        best.passed is True and "site-3" in best.observed and "+0.018, standard error 0.022 (paired on" in best.observed
    )
    lacking_sites = judge({"check": "merged_beats_lacking", "run": "lora-1"}, runs)
    assert lacking_sites.passed is True and lacking_sites.observed.startswith(
        "global model 0.929; site-2 (no positive) 0.770"
    )
    tooth = judge({"check": "saw_tooth", "run": "lora-1"}, runs)
    assert tooth.passed is True and tooth.observed == "recovery in 4 of 4 rounds, drift in 4 of 4 (rounds 2 to 5)"
    assert judge(LACKING | {"run": "lora-1"}, runs).passed is True
    bare = tmp_path / "without"
    shutil.copytree(REFERENCE, bare, ignore=shutil.ignore_patterns("scores.npz"))
    assert judge(LACKING | {"run": "lora-1"}, {"lora-1": [load_run(bare)]}).passed is None, "no scores by row"


def test_every_check_has_texts_and_says_what_it_expects() -> None:
    assert set(TEXTS) == set(CHECKS)
    for name, check in CHECKS.items():
        line = {"check": name, "run": "x", "runs": ["x", "y"], "site": "site-2", "class": "positive"}
        line = {key: value for key, value in line.items() if key in ("check", *keys_of(check.keys))}
        found = judge(line, {})
        assert found.passed is None and found.observed == "no finished run 'x'" and found.expected and found.name


@fast_only(0, 1, 3, 5, 7)
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"run": "a"}, ["verdicts.check: None", "gap_shrinks"]),
        ({"check": "saw_teeth", "run": "a"}, ["'saw_teeth'", "saw_tooth"]),
        ({"check": "lacking_class", "run": "a", "site": "s"}, ["verdicts.class"]),
        ({"check": "saw_tooth", "run": "a", "round": 1}, ["unknown key verdicts.round", "run, metric"]),
        ({"check": "gap_shrinks", "runs": "abc"}, ["verdicts.runs", "'abc'"]),
        ({"check": "gap_shrinks", "runs": ["a"]}, ["verdicts.runs", ">= 2"]),
        (LACKING | {"run": "a", "rows": "many"}, ["verdicts.rows", "'many'"]),
        (LACKING | {"run": "a", "ceiling": -0.1}, ["verdicts.ceiling", "-0.1"]),
    ],
)
def test_a_wrong_line_is_one_clear_error(line: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        judge(line, {})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = write(tmp_path / "r", None, [0.1, 0.9])
    (run / "scores.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="scores.npz"):
        load_run(run)
    write_scores(run, np.zeros(4), {"federated": np.zeros(4)}, tokens=np.ones(3))
    with pytest.raises(UserError, match="do not fit 1 models and 4 examples"):
        load_run(run)
    (run / "scores.npz").unlink()
    (run / "comparison.json").write_text("{")
    with pytest.raises(UserError, match="comparison.json"):
        load_run(run)
    (run / "comparison.json").unlink()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="not the folder of one run"):
        load_run(run)
