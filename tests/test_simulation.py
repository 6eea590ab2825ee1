"""Clients that are away, fail, or are slow: who answers when, what is merged, and what the clock says - by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import metrics_lines
from tiers import fast_only
from torch import Tensor

import fedsim
from fedsim.config.experiment import Experiment
from fedsim.core.errors import ClientError, UserError
from fedsim.runs.build import prepare
from fedsim.runs.progress import Progress
from fedsim.runs.resolve import schedule_of
from fedsim.simulate.availability import ClientAvailability
from fedsim.simulate.timeline import RoundWork, Timeline

ONE_LANE = {"training": {"lanes": 1}, "evaluate": {"every_rounds": 100}}


def life(**keys: Any) -> ClientAvailability:
    return ClientAvailability(7, "site-{}".format, **keys)


def model(folder: Path, name: str = "global") -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / name / "adapter_model.safetensors")


def rows(folder: Path, split: str, name: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in metrics_lines(folder)]
    return [r for r in found if r["split"] == split and name in (None, r["name"])]


# ------------------------------------------------------------------------------------------------ who is there


def test_a_fraction_of_the_clients_is_there_each_round_and_others_under_another_seed() -> None:
    clients = np.arange(1000)
    there = [life(availability=0.3).available(r, clients) for r in range(1, 41)]
    sizes = np.array([len(t) for t in there])
    assert abs(sizes.mean() - 300) < 4 * np.sqrt(210 / 40)  # four standard errors of a binomial mean
    counts = np.bincount(np.concatenate(there), minlength=1000)
    assert abs(counts.var() - 40 * 0.3 * 0.7) < 1.6  # no client is favoured: the spread of a binomial, 8.4
    assert np.array_equal(there[4], life(availability=0.3).available(5, clients))
    other = ClientAvailability(8, "site-{}".format, availability=0.3).available(5, clients)
    assert not np.array_equal(there[4], other)


def test_a_trace_is_read_round_by_round_over_and_over() -> None:
    made = life(availability={0: [1, 0], 2: [0, 0, 1]})
    there = [made.available(r, np.arange(4)).tolist() for r in range(1, 7)]
    assert there == [[0, 1, 3], [1, 3], [0, 1, 2, 3], [1, 3], [0, 1, 3], [1, 2, 3]]


def test_a_cohort_is_drawn_from_those_that_are_there(lab: Any) -> None:
    trace = {"site-1": [0, 1], "site-4": [0, 0, 1]}
    keys = {"partition": {"name": "iid", "num_clients": 5}, "cohort": {"size": 3}, "rounds": 6}
    exp = lab.exp(**keys, simulation={"availability": trace})
    for mode in ("local", "federated"):
        schedule = schedule_of(prepare(exp), mode)
        for round in range(1, 7):
            cohort = schedule.cohort(round).tolist()
            away = {c for c, t in ((0, trace["site-1"]), (3, trace["site-4"])) if not t[(round - 1) % len(t)]}
            assert not away & set(cohort)
            assert len(cohort) == min(3, 5 - len(away))
    plain = schedule_of(prepare(lab.exp(**keys)), "federated")
    whole = schedule_of(prepare(lab.exp(**keys, simulation={"drop": 0.5})), "federated")
    assert all(np.array_equal(plain.cohort(r), whole.cohort(r)) for r in range(1, 7))


def test_rounds_without_anybody_pass_and_leave_every_model_as_it_is(lab: Any) -> None:
    keys = {**ONE_LANE, "modes": ["local", "federated", "central"], "partition": {"name": "iid", "num_clients": 2}}
    keys["evaluate"] = {}
    away = {"site-1": [1, 0, 1], "site-2": [1, 0, 1]}
    gap = lab.run(**keys, rounds=3, simulation={"availability": away})
    scores = [r for r in rows(gap, "validation", "loss") if r["scope"] == "federated" and r["client"] is None]
    assert [r["round"] for r in scores] == [0, 1, 2, 3]
    assert scores[1]["value"] == scores[2]["value"] != scores[3]["value"]
    for scope in ("local", "federated", "central"):
        assert {r["round"] for r in rows(gap, "train", "loss") if r["scope"] == scope} == {1, 3}


def test_centralized_training_is_matched_to_the_clients_that_are_there(lab: Any) -> None:
    exp = lab.exp(
        rounds=2, simulation={"availability": {"site-1": [1, 0]}}, partition={"name": "iid", "num_clients": 4}
    )
    schedule = schedule_of(prepare(exp), "central")
    assert [schedule.central_steps(r) for r in (1, 2)] == [8, 6]  # 2 steps a site


# ------------------------------------------------------------------------------------------------ drops


def test_how_many_fail_and_where_is_drawn_by_seed_round_and_client() -> None:
    made = life(drop=0.25)
    at = [made.fails_at(r, c) for r in range(1, 51) for c in range(40)]
    failed = [x for x in at if x is not None]
    assert abs(len(failed) - 500) < 4 * np.sqrt(2000 * 0.25 * 0.75)
    assert all(0 <= x < 1 for x in failed)
    assert abs(np.mean(failed) - 0.5) < 4 * np.sqrt(1 / 12 / len(failed))
    assert at == [life(drop=0.25).fails_at(r, c) for r in range(1, 51) for c in range(40)]
    assert life().fails_at(1, 1) is None


def dropped(folder: Path) -> dict[int, set[str]]:
    out: dict[int, set[str]] = {}
    for row in rows(folder, "fault", "dropped"):
        out.setdefault(row["round"], set()).add(row["client"])
    return out


def test_the_mean_is_over_those_that_answered(lab: Any) -> None:
    keys = {**ONE_LANE, "rounds": 5, "partition": {"name": "quantity", "num_clients": 3, "exponent": 0.5}}
    found = lab.run(**keys, simulation={"drop": 0.35})
    gone = dropped(found)
    assert gone, "nobody failed: the test shows nothing"
    trace = {f"site-{c}": [int(f"site-{c}" not in gone.get(r, ())) for r in range(1, 6)] for c in (1, 2, 3)}
    same = lab.run(**keys, simulation={"availability": trace})  # away, in place of failing
    for name, tensor in model(same).items():
        assert torch.equal(tensor, model(found)[name]), name
    up = {(r["round"], r["client"]) for r in rows(found, "train", "bytes_up")}
    down = {(r["round"], r["client"]) for r in rows(found, "train", "bytes_down")}
    assert down - up == {(r, c) for r, who in gone.items() for c in who}  # they received, and sent nothing


def test_a_round_in_which_all_fail_ends_the_run_at_the_last_checkpoint(lab: Any) -> None:
    keys = {**ONE_LANE, "partition": {"name": "iid", "num_clients": 2}, "rounds": 3}
    with pytest.raises(
        ClientError, match=r"^round 1: all 2 clients failed: 2 dropped; lower simulation\.drop or take another seed$"
    ):
        lab.run(**keys, simulation={"drop": 1.0})
    (folder,) = (lab.root / "results" / "lab").iterdir()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"].startswith("round 1: all 2 clients failed")


# ------------------------------------------------------------------------------------------------ slow ones


def test_who_is_late_and_how_long_a_round_takes_by_hand() -> None:
    tokens = {0: 100.0, 1: 100.0, 2: 300.0}.__getitem__
    speeds = {0: 10.0, 1: 50.0, 2: 10.0}
    cohort = np.arange(3)

    def timeline(**keys: Any) -> Timeline:
        return Timeline(lambda round: cohort, tokens, life(speeds=speeds, **keys))

    def clients(found: RoundWork, round: int | None) -> list[int]:
        return [w.client for w in found.arriving(round)]

    found = timeline().work(1)
    assert (clients(found, 1), found.seconds) == ([0, 1, 2], 30.0)
    assert [w.seconds for w in found.work] == [10.0, 2.0, 30.0]
    found = timeline(deadline_s=10.0).work(1)
    assert (clients(found, 1), found.arriving(None)[0].lost, found.seconds) == ([0, 1], "late", 10.0)
    made = timeline(deadline_s=12.0, late="next")
    found = made.work(1)
    assert (clients(found, 1), clients(found, 2), [r for r, _ in found.batches(1)], found.seconds) == (
        [0, 1],
        [2],
        [2, 1],
        12.0,
    )
    found = made.work(2)  # client 2 needs 18 of its 30 seconds more: it sits the round out, which lasts to the deadline
    assert (clients(found, 2), found.seconds, found.clock) == ([0, 1], 12.0, 24.0)
    assert clients(made.work(3), 4) == [2], "and is sampled again once its message has arrived"
    assert timeline(deadline_s=12.0, late="next").work(3) == made.work(3), (
        "a function of the round, whatever was asked before"
    )
    tokens = {0: 100.0, 1: 100.0, 2: 200.0}.__getitem__
    assert timeline(deadline_s=12.0, late="next").work(2).seconds == 10.0, (
        "8 seconds are left of client 2's 20, client 0 takes 10"
    )
    assert life(speeds=20.0).speed(5) == 20.0


def test_drawn_speeds_lie_between_the_two_and_belong_to_the_client() -> None:
    made = life(speeds=(10.0, 1000.0))
    drawn = np.array([made.speed(c) for c in range(400)])
    assert drawn.min() >= 10
    assert drawn.max() <= 1000
    logs = np.log10(drawn)  # uniform in [1, 3]: mean 2, standard error 0.577 / 20
    assert abs(logs.mean() - 2) < 4 * 0.577 / 20
    assert made.speed(3) == life(speeds=(10.0, 1000.0)).speed(3)


PAIR = {**ONE_LANE, "partition": {"name": "quantity", "num_clients": 2, "exponent": 1.0}, "rounds": 2}
SLOW = {"speeds": {"site-1": 1e6, "site-2": 1.0}, "deadline_s": 1.0}  # site-2 is always late


def test_late_updates_that_are_dropped_are_as_if_the_client_were_away(lab: Any) -> None:
    found = lab.run(**PAIR, simulation=SLOW)
    alone = lab.run(**PAIR, simulation={"availability": {"site-2": [0]}})
    assert {(r["round"], r["client"]) for r in rows(found, "fault", "late")} == {(1, "site-2"), (2, "site-2")}
    for name, tensor in model(alone).items():
        assert torch.equal(tensor, model(found)[name]), name


def test_late_updates_are_added_to_the_next_round_by_hand(lab: Any) -> None:
    found = lab.run(**PAIR, simulation={**SLOW, "late": "next"})
    sizes = prepare(lab.exp(**PAIR)).partition.sizes
    (fast,), (slow,) = sizes[:1].tolist(), sizes[1:].tolist()
    start = model(found, "init")
    only_fast = {"availability": {"site-2": [0]}}
    one = model(lab.run(**{**PAIR, "rounds": 1}, name="one", simulation=only_fast))
    two = model(lab.run(**PAIR, name="two", simulation=only_fast))
    other = model(lab.run(**{**PAIR, "rounds": 1}, name="other", simulation={"availability": {"site-1": [0]}}))
    for name, tensor in model(found).items():
        update_fast, update_slow = two[name] - one[name], other[name] - start[name]
        expected = one[name] + (fast * update_fast + slow * update_slow) / (fast + slow)
        assert torch.allclose(tensor, expected, rtol=0, atol=1e-12), name
        assert not torch.allclose(tensor, two[name], rtol=0, atol=1e-6), name
    assert [(r["round"], r["client"]) for r in rows(found, "fault")] == [
        (1, "site-2")
    ]  # in round 2 it is still at work
    assert {(r["round"], r["client"]) for r in rows(found, "train", "loss")} == {
        (1, "site-1"),
        (1, "site-2"),
        (2, "site-1"),
    }


BUSY = {
    "modes": ["federated"],
    "rounds": 5,
    "partition": {"name": "quantity", "num_clients": 5, "exponent": 0.5, "min_rows": 4},
    "simulation": {"availability": 0.8, "drop": 0.15, "speeds": [20.0, 400.0], "deadline_s": 4.0, "late": "next"},
}


class Stopped(Exception):
    """Stands for the end of a process."""


@fast_only(1)
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_stopped_life_goes_on_with_the_same_bits(lab: Any, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    whole = lab.run(**BUSY)
    kinds = {r["name"] for r in rows(whole, "fault")}
    assert kinds == {"deferred", "dropped"}, "the test shows nothing"

    def stop(self: Progress, done: int, headline: str) -> None:
        if done == after:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "round", stop)
        with pytest.raises(Stopped):
            lab.run(**BUSY, name="stopped")
    lab.same_bits(lab.run(**BUSY, name="stopped"), whole)


def test_workers_and_a_sum_that_packs_add_to_in_turn_give_the_same_bits(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serial = lab.run(**BUSY)
    pool = {"name": "pool", "devices": ["cpu"], "workers": 2, "threads": 1}
    lab.same_bits(lab.run(**BUSY, name="pool", executor=pool), serial)
    monkeypatch.setattr("fedsim.executors.pool._SLOTS_BELOW", 0)
    lab.same_bits(lab.run(**BUSY, name="turns", executor=pool), serial)


def test_the_clock_in_the_metrics_is_that_of_the_timeline(lab: Any) -> None:
    folder = lab.run(**BUSY)
    schedule = schedule_of(prepare(lab.exp(**BUSY)), "federated")
    clock = 0.0
    for round in range(1, 6):
        work = schedule.timeline.work(round)
        clock += work.seconds
        found = {(r["client"], r["name"]): r["value"] for r in rows(folder, "simulated") if r["round"] == round}
        assert found.pop((None, "seconds")) == clock
        assert work.seconds <= 4.0, "simulated: the deadline"
        assert found.pop((None, "round_seconds")) == work.seconds
        assert found == {(schedule.name(w.client), "seconds"): w.seconds for w in work.work}
    for w in schedule.timeline.work(1).work:
        if w.lost != "dropped":
            mean = prepare(lab.exp(**BUSY)).tokens["train"].lengths[_rows_of(lab, w.client)].mean()
            assert w.seconds == pytest.approx(
                2 * 6 * mean / schedule.behavior.speed(w.client), rel=1e-12
            )  # 2 steps of 6 rows


def _rows_of(lab: Any, client: int) -> np.ndarray:
    return prepare(lab.exp(**BUSY)).partition.rows(client)


def test_curves_can_be_drawn_over_simulated_seconds(lab: Any) -> None:
    from fedsim import load_runs
    from fedsim.analysis.plots import curves

    folder = lab.run(**BUSY)
    ax = curves(load_runs(folder), metric="loss", x="simulated")
    total = rows(folder, "simulated", "seconds")[-1]["value"]
    assert max(line.get_xdata().max() for line in ax.lines if len(line.get_xdata())) == pytest.approx(total)
    assert ax.get_xlabel() == "simulated seconds"
    with pytest.raises(UserError, match="simulated"):
        curves(load_runs(lab.run()), metric="loss", x="simulated")


# ------------------------------------------------------------------------------------------------ the config


def test_a_config_that_says_nothing_of_it_is_the_run_it_was(lab: Any) -> None:
    plain = lab.exp().identity()
    assert lab.exp(simulation={}, faults={}).identity() == plain
    assert "simulation" not in plain
    assert "faults" not in plain
    assert lab.exp(simulation={"drop": 0.1}).identity() != plain


@fast_only(0, 2, 5, 9, 12, 13)
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"availability": 0}, r"^simulation\.availability: must be > 0 \(got 0\)$"),
        ({"availability": 1.5}, r"^simulation\.availability: must be <= 1 \(got 1\.5\)"),
        (
            {"availability": {"site-1": []}},
            r"^simulation\.availability\.site-1: number of values must be >= 1 \(got \[\]\); give a list \(each one of 0, 1\)$",
        ),
        ({"availability": {"site-1": [1, 2]}}, r"^simulation\.availability\.site-1\[1\]: 2 is not one of 0, 1$"),
        ({"availability": {"sit-1": [1]}}, r"^simulation\.availability\.sit-1: .*no client; clients are: site-1, "),
        ({"drop": -0.1}, r"^simulation\.drop: must be >= 0 \(got -0\.1\)"),
        ({"speeds": 0}, r"^simulation\.speeds: must be > 0 \(got 0\); null = no simulated clock$"),
        ({"speeds": [5, 1]}, r"^simulation\.speeds: \[5\.0, 1\.0\] is not \[min, max\]"),
        ({"speeds": [5]}, r"^simulation\.speeds: number of values must be >= 2 \(got \[5\]\)"),
        ({"speeds": {"site-1": 5}}, r"^simulation\.speeds: site-2, site-3 missing; name every client"),
        ({"deadline_s": 3}, r"^simulation\.deadline_s: 3\.0 needs simulation\.speeds"),
        ({"speeds": 5, "deadline_s": 0}, r"^simulation\.deadline_s: must be > 0 \(got 0\); null = "),
        ({"late": "next"}, r"^simulation\.late: 'next' needs simulation\.deadline_s"),
        ({"lat": "next"}, r"^unknown key simulation\.lat \(did you mean simulation\.late\?\)\. Valid keys"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(lab: Any, section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fedsim.run(Experiment.from_dict({**lab.tree(), "simulation": section}), progress=False)
