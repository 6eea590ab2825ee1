"""Client-level differential privacy: what is clipped, what is added, what is divided by, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from test_algorithms import POOL, SMALL
from test_equivalence import adapter_of

import fedsim
from fedsim.aggregators.reducer import Reducer
from fedsim.cli.main import main
from fedsim.core.errors import UserError
from fedsim.privacy import epsilon
from fedsim.privacy.central import Adaptive, CentralPrivacy, Cohorts
from fedsim.runs.build import prepare
from fedsim.runs.resolve import schedule_of

pytest.importorskip("dp_accounting")
LOCAL = {"steps": 2, "batch_size": 4, "lr": 5e-3, "keep_state": False}


def keys(**privacy: Any) -> dict[str, Any]:
    """An experiment of four clients, of which each takes part with probability 3/4."""
    section = {"name": "central", "clip": 0.05, **privacy}
    section |= {} if {"noise_multiplier", "target_epsilon"} & section.keys() else {"noise_multiplier": 1.0}
    cohort = {"size": 3, "sampler": "poisson"}
    return {
        **SMALL,
        "modes": ["federated"],
        "local": LOCAL,
        "cohort": cohort,
        "faults": {"policy": "skip"},
        "privacy": section,
    }


def rows_of(lab: Any, run: Any, name: str) -> list[float]:
    return [r["value"] for r in lab.metrics(run) if r["split"] == "privacy" and r["name"] == name]


def test_without_noise_and_with_a_wide_clip_it_is_the_uniform_mean_to_the_bit(lab: Any) -> None:
    common = {**SMALL, "modes": ["federated"], "local": LOCAL, "cohort": {"size": "all"}}
    plain = lab.run(**common, algorithm={"name": "fedavg", "weights": "uniform"})
    private = {**keys(clip=1e6, noise_multiplier=0.0), **common, "name": "private"}
    found = lab.run(**private)
    one, other = adapter_of(plain / "global"), adapter_of(found / "global")
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert rows_of(lab, found, "epsilon") == [math.inf] * 3


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
@pytest.mark.parametrize("messages", [{}, {"up": "nf4", "error_feedback": True}], ids=["plain", "coded"])
def test_what_arrives_is_no_longer_than_the_clip(
    lab: Any, monkeypatch: pytest.MonkeyPatch, algorithm: str, messages: dict[str, Any]
) -> None:
    """All groups as one vector, after codec and error feedback; and the residual is what the codec lost alone."""
    seen: list[float] = []
    original = Reducer.add

    def add(self: Any, into: Any, message: Any, *args: Any, **more: Any) -> None:
        squares = sum(t.double().reshape(len(t), -1).square().sum(dim=1) for g in message.values() for t in g.values())
        seen.extend(squares.sqrt().tolist())
        original(self, into, message, *args, **more)

    monkeypatch.setattr(Reducer, "add", add)
    tree = keys(noise_multiplier=0.0)
    run = lab.run(**tree, algorithm={"name": algorithm}, messages=messages, model={"dtype": "float32"})
    assert len(seen) >= 6 and max(seen) <= 0.05 * (1 + 1e-6) and min(seen) > 0.05 * (1 - 1e-5)
    sent = {
        r["name"]: r["value"] for r in lab.metrics(run) if r["client"] == "site-1" and r["name"].startswith("bytes")
    }
    free = lab.run(
        **{**tree, "privacy": {"name": "none"}},
        name="free",
        algorithm={"name": algorithm},
        messages=messages,
        model={"dtype": "float32"},
    )
    bare = {
        r["name"]: r["value"] for r in lab.metrics(free) if r["client"] == "site-1" and r["name"].startswith("bytes")
    }
    assert sent["bytes_up"] == bare["bytes_up"] + 4 and sent["bytes_down"] == bare["bytes_down"]


def test_noise_is_added_once_to_the_sum_over_a_fixed_denominator(lab: Any) -> None:
    """What a round of noise adds is N(0, (z C)^2) / (q N), whoever takes part; so is a round without any client."""
    tree = {**keys(noise_multiplier=2.0), "rounds": 1}
    noisy, quiet = (
        lab.run(**tree),
        lab.run(**{**tree, **{"privacy": keys(noise_multiplier=0.0)["privacy"]}, "name": "quiet"}),
    )
    gap = torch.cat([(a - adapter_of(quiet / "global")[n]).flatten() for n, a in adapter_of(noisy / "global").items()])
    scaled = (gap * 3.0 / (2.0 * 0.05)).numpy()
    assert scipy.stats.kstest(scaled, "norm").pvalue > 1e-3 and len(scaled) > 500
    empty = {**tree, "cohort": {"size": 1, "sampler": "poisson"}, "name": "empty"}
    exp = next(
        e
        for e in (lab.exp(**{**empty, "seed": s}) for s in range(20))
        if not len(schedule_of(prepare(e), "federated").cohort(1))
    )
    run = lab.run(exp)
    moved = torch.cat([(t - adapter_of(run / "init")[n]).flatten() for n, t in adapter_of(run / "global").items()])
    assert scipy.stats.kstest((moved * 1.0 / (2.0 * 0.05)).numpy(), "norm").pvalue > 1e-3


def test_weights_are_capped_and_enter_noise_and_denominator(lab: Any) -> None:
    tree = {**keys(max_weight=12.0, noise_multiplier=0.0, clip=1e6), "cohort": {"size": "all"}}
    run = lab.run(**tree)
    sizes = prepare(lab.exp(**tree)).partition.sizes
    assert (sizes > 12).any() and (sizes < 12).any()
    parts = prepare(lab.exp(**tree))
    assert parts.privacy is not None and parts.privacy.expected_weight == np.minimum(sizes, 12).sum()
    assert rows_of(lab, lab.run(**{**keys(max_weight=12.0), "name": "noisy"}), "noise_std") == [12 * 0.05] * 3
    weights = {t.client: t.weight for t in schedule_of(parts, "federated").tasks(1, _state())}
    assert weights == {c: min(float(n), 12.0) for c, n in enumerate(sizes)}
    assert run.is_dir()


def _state() -> Any:
    from fedsim.core.store import Records
    from fedsim.simulate.state import State

    return State(torch.empty(0), {}, Records(), keeps=False)


def test_the_ledger_is_the_accountants_and_survives_a_stop(lab: Any) -> None:
    tree = keys(clip={"adaptive": {"quantile": 0.3, "start": 0.02}}, noise_multiplier=0.1)
    whole = lab.run(**tree)
    spent = rows_of(lab, whole, "epsilon")
    how: dict[str, Any] = {"sampling": 0.75, "noise_multiplier": 0.1, "delta": 1e-5}
    assert spent == [epsilon(rounds=t, **how) for t in (1, 2, 3)]
    lab.same_bits(lab.run(**tree, name="pool", executor=POOL), whole)
    stopped = lab.run(**{**tree, "name": "stopped", "rounds": 2})
    fedsim.run(lab.exp(**{**tree, "name": "stopped"}), progress=False, resume=stopped)
    lab.same_bits(stopped, whole)
    assert rows_of(lab, stopped, "clip") == rows_of(lab, whole, "clip") and len(set(rows_of(lab, whole, "clip"))) == 3


def test_a_clip_follows_the_quantile() -> None:
    """Andrew et al., 2021: where all updates are longer than the clip it must rise; the noise of the updates grows for the count."""

    def made(z: float) -> CentralPrivacy:
        adaptive = Adaptive(quantile=0.5, lr=0.2, start=0.1)
        return CentralPrivacy(Cohorts(100, 1000, "poisson"), z, 1e-5, "rdp", "add_remove", adaptive, 1.0, 1000.0, 0)

    quiet = made(0.0)
    assert quiet.next_clip(1, 0.1, within=0) == pytest.approx(0.1 * math.exp(0.1))
    assert quiet.next_clip(1, 0.1, within=100) == pytest.approx(0.1 * math.exp(-0.1))
    assert quiet.next_clip(1, 0.1, within=50) == 0.1
    noisy = made(1.0)
    assert noisy.z_update == pytest.approx((1 - (2 * 5) ** -2) ** -0.5)
    found = [math.log(noisy.next_clip(t, 1.0, 50)) / -0.2 * 100 for t in range(1, 2001)]
    assert scipy.stats.kstest(np.array(found) / 5, "norm").pvalue > 1e-3


def test_the_run_ends_before_it_spends_too_much(lab: Any) -> None:
    per_round = [epsilon(sampling=0.75, noise_multiplier=1.0, rounds=t, delta=1e-5) for t in (1, 2, 3)]
    run = lab.run(**keys(max_epsilon=(per_round[1] + per_round[2]) / 2))
    assert rows_of(lab, run, "epsilon") == per_round[:2]
    with pytest.raises(UserError, match=r"privacy.max_epsilon: 0.1, but one round has epsilon"):
        lab.run(**keys(max_epsilon=0.1))


def test_a_target_is_solved_for_all_rounds_and_for_no_other_number(lab: Any) -> None:
    run = lab.run(**{**keys(target_epsilon=4.0), "rounds": 2})
    assert 3.98 < rows_of(lab, run, "epsilon")[-1] <= 4.0
    with pytest.raises(UserError, match="privacy.target_epsilon: the run was begun with a noise multiplier of"):
        fedsim.run(lab.exp(**{**keys(target_epsilon=4.0), "rounds": 3}), progress=False, resume=run)


def test_poisson_cohorts_are_independent(lab: Any) -> None:
    tree = {**keys(), "rounds": 4000}
    schedule = schedule_of(prepare(lab.exp(**tree)), "federated")
    drawn = np.zeros((4000, 4))
    for t in range(1, 4001):
        drawn[t - 1, schedule.cohort(t)] = 1
    assert np.abs(drawn.mean(axis=0) - 0.75).max() < 0.03 and np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.06
    assert schedule.slots == 4 and {len(schedule.cohort(t)) for t in range(1, 200)} >= {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"faults": {}}, r"faults.policy: fail tells of a single client .*set faults.policy=skip"),
        ({"aggregator": {"name": "sum"}, "simulation": {"speeds": 50, "deadline_s": 1.0}}, "simulation.deadline_s"),
        (
            {"simulation": {"speeds": 50, "deadline_s": 1.0, "late": "next"}},
            "simulation.late: next lets a client count",
        ),
        (
            {"cohort": {"size": 3}, "simulation": {"availability": 0.5}},
            "simulation.availability: a cohort of fixed size",
        ),
        ({"cohort": {"size": 3}, "privacy": {"accountant": "pld"}}, "accountant: pld has no bound"),
        ({"cohort": {"size": 3}, "privacy": {"neighbours": "add_remove"}}, "neighbours: add_remove does not go with"),
        ({"privacy": {"neighbours": "replace_one"}}, "has no bound under rdp"),
        ({"privacy": {"target_epsilon": 1.0}}, "privacy.noise_multiplier: 1.0 and target_epsilon exclude each other"),
        (
            {"privacy": {"noise_multiplier": None}},
            "privacy.noise_multiplier: None needs noise_multiplier, or target_epsilon",
        ),
        (
            {"privacy": {"clip": {"adaptive": {}}, "noise_multiplier": 2.0}},
            "privacy.clip: adaptive with cohort.size=3 counts",
        ),
        ({"privacy": {"clip": 0.0}}, "privacy.clip"),
        ({"algorithm": {"name": "qfedavg"}}, "algorithm.name: qfedavg weighs clients by their loss"),
        (
            {"algorithm": {"name": "fednova", "normalise": "steps"}},
            "algorithm.name: fednova also sends numbers that are not clipped",
        ),
        ({"algorithm": {"name": "fedbuff"}, "simulation": {"speeds": 50}}, "algorithm.name: fedbuff is asynchronous"),
        ({"aggregator": {"name": "median"}}, "aggregator.name: median is no sum"),
        ({"privacy": {"delta": 0.0}}, "privacy.delta"),
    ],
)
def test_what_breaks_the_guarantee_is_refused_in_one_line(lab: Any, more: dict[str, Any], said: str) -> None:
    tree = keys(noise_multiplier=1.0)
    section = {**tree["privacy"], **more.pop("privacy", {})}
    with pytest.raises(UserError, match=said) as caught:
        lab.run(**{**tree, **more, "privacy": section})
    assert "\n" not in str(caught.value)


def test_the_command_prints_the_plan(lab: Any, capsys: pytest.CaptureFixture) -> None:
    exp = lab.exp(**keys(noise_multiplier=1.0))
    file = lab.root / "dp.yaml"
    file.write_text(exp.to_yaml())
    assert main(["privacy", str(file), "rounds=30"]) == 0
    out = capsys.readouterr().out
    spent = epsilon(sampling=0.75, noise_multiplier=1.0, rounds=30, delta=1e-5)
    assert f"epsilon {spent:.3g} after 30 rounds at delta 1e-05 (rdp, add_remove)" in out and f"{spent:.4f}" in out
    assert main(["privacy", str(file), "privacy={name: none}"]) == 2
