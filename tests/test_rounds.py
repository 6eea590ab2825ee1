"""Who trains when and how much, and which metrics rows a run leaves."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedsim
from fedsim.core.seeding import stream
from fedsim.core.store import Records
from fedsim.data.batches import BatchSampler
from fedsim.runs.progress import Progress
from fedsim.simulate.schedule import CENTRAL, Schedule
from fedsim.simulate.state import Choice, Chosen, State

SIZES = np.array([30, 0, 7, 90, 64, 12])


def schedule(mode: str = "federated", **keys: Any) -> Schedule:
    """Six clients, of which number 1 holds nothing; two steps of 8 rows a round unless told otherwise."""
    given: dict[str, Any] = {"steps": 2, "epochs": 1, "batch_size": 8, "size": 5, **keys}
    draw = BatchSampler(given["batch_size"], given["epochs"] if given["steps"] is None else None)
    base = {
        "mode": mode,
        "seed": 0,
        "rounds": 4,
        "clients": np.nonzero(SIZES)[0],
        "name": lambda c: f"site-{c + 1}",
        "sizes": SIZES,
        "count": draw.count,
        "match": "epochs",
        "weights": "samples",
        "length": lambda c: 10.0,
        "every_rounds": 1,
        "scores_clients": True,
    }
    return Schedule(**{**base, **given})


def state() -> State:
    return State(torch.zeros(1), {}, Records(), keeps=True)


# -------------------------------------------------------------------------------------------------- cohorts


def test_a_cohort_is_a_function_of_seed_and_round() -> None:
    one, other = schedule(size=2), schedule(size=2, rounds=9, steps=7)
    assert [one.cohort(r).tolist() for r in range(1, 9)] == [other.cohort(r).tolist() for r in range(1, 9)]
    reseeded = schedule(size=2, seed=1)
    assert [one.cohort(r).tolist() for r in range(1, 9)] != [reseeded.cohort(r).tolist() for r in range(1, 9)]


def test_a_cohort_holds_clients_with_rows_once_in_order() -> None:
    for r in range(1, 50):
        cohort = schedule(size=3).cohort(r)
        assert len(set(cohort.tolist())) == 3 and cohort.tolist() == sorted(cohort.tolist())
        assert 1 not in cohort
    assert schedule(size=5).cohort(1).tolist() == [0, 2, 3, 4, 5]


def test_cohorts_are_uniform() -> None:
    """4000 rounds of 2 of 5: each of the 10 pairs 400 times, standard deviation sqrt(4000 x 0.1 x 0.9) = 19; within 5."""
    pairs = Counter(tuple(schedule(size=2).cohort(r).tolist()) for r in range(1, 4001))
    assert set(pairs) == set(combinations([0, 2, 3, 4, 5], 2))
    assert all(abs(n - 400) < 95 for n in pairs.values()), pairs


# ---------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("weights", "expected"), [("samples", [30, 7, 90, 64, 12]), ("steps", [4, 1, 12, 8, 2]), ("uniform", [1] * 5)]
)
def test_weights(weights: str, expected: list[int]) -> None:
    """One pass in batches of 8: ceil(30 / 8) = 4 steps and so on."""
    tasks = schedule(steps=None, weights=weights).tasks(1, state())
    assert [t.client for t in tasks] == [0, 2, 3, 4, 5]
    assert [t.weight for t in tasks] == expected


def test_a_schedule_over_the_run_starts_where_the_rounds_before_lead() -> None:
    tasks = schedule(steps=None, epochs=2).tasks(3, state())
    assert [(t.schedule_from, t.horizon) for t in tasks] == [(2 * n, 4 * n) for n in (8, 2, 24, 16, 4)]


def test_packs_go_longest_first_and_ties_by_number() -> None:
    lengths = {0: 10.0, 2: 50.0, 3: 10.0, 4: 20.0, 5: 10.0}
    steps = schedule(length=lengths.get).packs(1, state(), 1)
    assert [p.tasks[0].client for p in steps] == [2, 4, 0, 3, 5]  # in steps all train on as many rows
    assert [p.index for p in steps] == [0, 1, 2, 3, 4]
    passes = schedule(steps=None, length=lengths.get).packs(1, state(), 1)
    assert [p.tasks[0].client for p in passes] == [4, 3, 2, 0, 5]  # 1280, 900, 350, 300, 120 tokens
    assert [p.tokens for p in passes] == [1280, 900, 350, 300, 120]


def test_packs_hold_clients_of_like_steps_and_length_and_are_even() -> None:
    """Rows by client 0, 2, 3, 4, 5: 2 passes in batches of 4 are 8, 2, 24, 16 and 4 steps over the rounds' settings."""
    lengths = {0: 10.0, 2: 50.0, 3: 10.0, 4: 20.0, 5: 10.0}
    for lanes, expected in [
        (1, [[4], [3], [2], [0], [5]]),
        (2, [[4, 0], [5, 2], [3]]),
        (3, [[0, 5, 2], [3, 4]]),
        (5, [[3, 4, 0, 5, 2]]),
        (8, [[3, 4, 0, 5, 2]]),
    ]:
        packs = schedule(steps=None, length=lengths.get).packs(1, state(), lanes)
        assert [p.index for p in packs] == list(range(len(packs)))
        assert sorted([t.client for t in p.tasks] for p in packs) == sorted(expected), lanes
        assert sorted(packs, key=lambda p: -p.tokens) == packs
        assert sum(p.tokens for p in packs) == 2950


def test_records_are_written_only_where_something_is_kept() -> None:
    kept, nothing = state(), replace(state(), keeps=False)
    assert sorted(t.write for t in schedule().tasks(1, kept)) == [0, 1, 2, 3, 4]
    assert {t.write for t in schedule().tasks(1, nothing)} == {-1}


# -------------------------------------------------------------------------------------------------- central


@pytest.mark.parametrize(
    ("match", "keys", "expected"),
    [
        ("epochs", {"steps": 2}, 10),  # 5 sites x 2 steps: as many rows as all sites together
        ("epochs", {"steps": None}, None),  # the same passes, over all rows
        ("steps", {"steps": 2}, 2),  # as many steps as one site
        ("steps", {"steps": None}, 5),  # the mean of 4, 1, 12, 8, 2 is 5.4
    ],
)
def test_central_steps_with_all_sites(match: str, keys: dict, expected: int | None) -> None:
    made = schedule("central", match=match, **keys)
    assert made.central_steps(1) == expected
    (task,) = made.tasks(2, state())
    per_round = 26 if expected is None else expected  # 203 rows in batches of 8 are 26 steps
    assert (task.client, task.steps, task.schedule_from, task.horizon) == (CENTRAL, expected, per_round, 4 * per_round)


def test_central_steps_with_sampled_cohorts() -> None:
    """Passes of a sampled cohort are as many rows of the whole set: rows / 8, to the nearest step."""
    for epochs in (1, 3):
        made = schedule("central", size=2, steps=None, epochs=epochs)
        for r in range(1, 5):
            rows = SIZES[made.cohort(r)].sum() * epochs
            assert made.central_steps(r) == int(rows / 8 + 0.5)
        (task,) = made.tasks(3, state())
        counts = [made.central_steps(r) for r in range(1, 5)]
        assert (task.schedule_from, task.horizon) == (sum(counts[:2]), sum(counts))
    assert schedule("central", size=2, steps=3).central_steps(1) == 6
    assert schedule("central", size=2, steps=3, match="steps").central_steps(1) == 3


# --------------------------------------------------------------------------------------------------- choice


def test_the_best_of_equals_has_the_lower_loss_then_the_later_round_and_nan_never_wins() -> None:
    nan = float("nan")
    for metric, sign in (("accuracy", 1), ("macro_f1", 1), ("perplexity", -1)):
        choice = Choice(metric, "max" if sign == 1 else "min")
        one = choice.better({metric: 0.5 * sign, "loss": 2.0}, 1, 10, None)
        assert one == Chosen(0.5 * sign, 1, 10, 2.0)
        assert choice.better({metric: 0.6 * sign, "loss": 9.0}, 2, 20, one) == Chosen(0.6 * sign, 2, 20, 9.0)
        assert choice.better({metric: 0.4 * sign, "loss": 0.1}, 2, 20, one) is None
        assert choice.better({metric: 0.5 * sign, "loss": 1.9}, 2, 20, one) == Chosen(0.5 * sign, 2, 20, 1.9)
        assert choice.better({metric: 0.5 * sign, "loss": 2.1}, 2, 20, one) is None
        assert choice.better({metric: 0.5 * sign, "loss": 2.0}, 2, 20, one) == Chosen(0.5 * sign, 2, 20, 2.0)
        assert choice.better({metric: 0.5 * sign, "loss": nan}, 2, 20, one) is None
        assert choice.better({metric: nan, "loss": 0.1}, 2, 20, None) is None
    less = Choice("loss", "min")
    assert less.better({"loss": 0.2}, 2, 20, Chosen(0.2, 1, 10, 0.2)) == Chosen(0.2, 2, 20, 0.2)
    assert less.better({"loss": 0.3}, 2, 20, Chosen(0.2, 1, 10, 0.2)) is None


# ----------------------------------------------------------------------------------------- rows of real runs

THREE: dict[str, Any] = {
    "modes": ["local", "federated", "central"],
    "rounds": 3,
    "local": {"steps": 3, "batch_size": 4},
    "evaluate": {"every_steps": 2},
}


@pytest.fixture
def rows(lab: Any) -> list[dict[str, Any]]:
    return lab.metrics(lab.run(**THREE))


def steps_of(rows: list[dict[str, Any]], **where: Any) -> list[int]:
    return [r["step"] for r in rows if r["name"] == "loss" and all(r[k] == v for k, v in where.items())]


def test_every_curve_has_its_rows(rows: list[dict[str, Any]]) -> None:
    """3 rounds of 3 steps, scored every 2 steps and at the end of a round; central takes 9 steps a round."""
    for scope, client in (("local", "site-2"), ("federated", "site-2")):
        expected = [2, 3, 4, 6, 8, 9]
        first = [0] if scope == "local" else []
        assert steps_of(rows, scope=scope, client=client, split="validation") == first + expected
        assert steps_of(rows, scope=scope, client=client, split="site") == expected
        assert steps_of(rows, scope=scope, client=client, split="train") == [3, 6, 9]
    assert steps_of(rows, scope="federated", client=None, split="validation") == [0, 3, 6, 9]
    central = steps_of(rows, scope="central", client=None, split="validation")
    assert central == [0, 2, 4, 6, 8, 9, 10, 12, 14, 16, 18, 20, 22, 24, 26, 27]


def test_the_saw_tooth_has_a_row_before_and_after_each_merge(rows: list[dict[str, Any]]) -> None:
    found = [r for r in rows if r["scope"] == "federated" and r["split"] == "validation" and r["name"] == "loss"]
    for r in (1, 2, 3):
        at = [x["client"] for x in found if (x["round"], x["step"]) == (r, 3 * r)]
        assert sorted(at[:-1]) == ["site-1", "site-2", "site-3"] and at[-1] is None


def test_all_modes_start_from_the_same_scores(rows: list[dict[str, Any]]) -> None:
    start = {(r["name"], r["value"]) for r in rows if r["step"] == 0}
    assert len(start) == len({name for name, _ in start}) >= 2
    assert {(r["scope"], r["client"]) for r in rows if r["step"] == 0} == {
        *(("local", f"site-{i}") for i in (1, 2, 3)),
        ("federated", None),
        ("central", None),
    }


def test_test_rows_are_scored_once(rows: list[dict[str, Any]]) -> None:
    found = Counter((r["scope"], r["client"]) for r in rows if r["split"] == "test" and r["name"] == "accuracy")
    sites = {("local", f"site-{i}"): 1 for i in (1, 2, 3)}
    assert found == {**sites, ("federated", None): 1, ("central", None): 1}


def test_tokens_and_bytes_are_counted(lab: Any) -> None:
    from transformers import AutoTokenizer

    exp = lab.exp()
    run = lab.run(exp)
    tok = AutoTokenizer.from_pretrained(exp.model.path)
    lengths = [len(tok(f"{s} sentiment: {label}")["input_ids"]) + 1 for s, label in lab.rows["train"]]
    tokens = sum(lengths[i] for step in fedsim.batches(exp, "site-1", 1) for i in step)
    assert lab.value(run, client="site-1", name="tokens") == tokens
    size = 8 * 2 * 3 * 2 * 3 * 32  # float64; 2 layers of q, k, v, each A and B of 3 x 32
    for name in ("bytes_up", "bytes_down"):
        assert lab.value(run, client="site-1", name=name) == size


def test_only_the_cohort_trains_alone_as_in_a_federation(lab: Any) -> None:
    exp = lab.exp(modes=["local", "federated"], rounds=4, cohort={"size": 2}, partition={"num_clients": 5})
    found = lab.metrics(lab.run(exp))
    for scope in ("local", "federated"):
        by_round = {r: set() for r in range(1, 5)}
        for row in found:
            if row["scope"] == scope and row["split"] == "train" and row["name"] == "loss":
                by_round[row["round"]].add(row["client"])
        expected = {
            r: {f"site-{c + 1}" for c in stream(3, "cohort", r).choice(5, 2, replace=False, shuffle=False)}
            for r in range(1, 5)
        }
        assert by_round == expected
    assert len(set().union(*expected.values())) > 2, "the cohorts do change"


def test_a_client_that_sits_rounds_out_counts_its_own_steps(lab: Any) -> None:
    """`step` is what a client has done, so its rows have no gaps; a merged row stands at the furthest client."""
    found = lab.metrics(lab.run(rounds=4, cohort={"size": 1}))
    for site in ("site-1", "site-2", "site-3"):
        steps = steps_of(found, client=site, split="train")
        assert steps == [2 * (i + 1) for i in range(len(steps))]
    merged = steps_of(found, client=None, split="validation")
    assert merged == sorted(merged)


def values(path: Path, lab: Any) -> dict[tuple, float]:
    keys = ("round", "step", "scope", "client", "split", "name")
    out = {}
    for row in lab.metrics(path):
        key = tuple(row[k] for k in keys)
        assert key not in out, f"twice: {key}"
        out[key] = row["value"]
    return out


def test_how_often_is_scored_changes_no_number(lab: Any) -> None:
    drop = {"adapter": {"name": "lora", "r": 3, "dropout": 0.3}}
    often = values(lab.run(**{**THREE, **drop, "name": "often", "evaluate": {"every_steps": 1}}), lab)
    seldom = values(lab.run(**{**THREE, **drop, "name": "seldom", "evaluate": {"every_rounds": 2}}), lab)
    assert {k[0] for k in seldom if k[3] is None and k[2] == "federated" and k[4] == "validation"} == {0, 2, 3}
    both = {k for k in often.keys() & seldom.keys() if k[4] != "test"}  # which round is chosen may differ
    assert both == {k for k in seldom if k[4] != "test"}
    assert all(often[k] == seldom[k] for k in both)
    assert len(often) > len(seldom)


def test_clients_need_not_be_scored_before_a_merge(lab: Any) -> None:
    """`evaluate.clients: false` leaves the merged rows, and those of sites alone, as they are."""
    both = {**THREE, "modes": ["local", "federated"], "evaluate": {}}
    with_them = values(lab.run(**{**both, "name": "with"}), lab)
    without = values(lab.run(**{**both, "name": "without", "evaluate": {"clients": False}}), lab)
    own = {k for k in with_them if k[2] == "federated" and k[3] and k[4] != "train" and not k[5].startswith("merged_")}
    assert own
    assert without == {k: v for k, v in with_them.items() if k not in own}


def test_of_equal_accuracies_the_run_keeps_the_model_of_lower_loss_whenever_it_is_stopped(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps too small to change an answer: every round ties in accuracy, and the loss alone tells models apart."""
    keys = {
        **THREE,
        "local": {"steps": 1, "batch_size": 4, "lr": 1e-5, "clip": None},
        "evaluate": {"every_steps": None},
    }
    keys |= {"rounds": 4, "best": {"metric": "accuracy"}}
    whole = lab.run(**keys, name="whole")
    rows = lab.metrics(whole)
    found = 0
    for scope, client in {(r["scope"], r["client"]) for r in rows if r["split"] == "test"}:
        own = [r for r in rows if (r["scope"], r["client"]) == (scope, client) and r["round"] > 0]
        by = {
            n: {r["round"]: r["value"] for r in own if r["split"] == "validation" and r["name"] == n}
            for n in ("accuracy", "loss")
        }
        best = max(by["accuracy"], key=lambda r: (by["accuracy"][r], -by["loss"][r], r))
        assert {r["round"] for r in own if r["split"] == "test"} == {best}
        found += len(set(by["accuracy"].values())) == 1 and best > 1
        table = fedsim.summary(fedsim.load_runs(whole), "loss", which="best").set_index("model")
        row = table.loc[scope if client is None else f"local {client}"]
        test = next(r["value"] for r in own if r["split"] == "test" and r["name"] == "loss")
        assert (row["round"], row["validation"], row["test"]) == (best, by["loss"][best], test)
    assert found >= 3, "ties that the earliest round would have won otherwise"

    class Stopped(Exception):
        pass

    def stop(self: Progress, done: int, headline: str) -> None:
        raise Stopped

    for _ in range(5):
        with monkeypatch.context() as patch, contextlib.suppress(Stopped):
            patch.setattr(Progress, "round", stop)
            lab.run(**keys, name="stopped")
    lab.same_bits(lab.run(**keys, name="stopped"), whole)
