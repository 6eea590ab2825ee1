"""Robust aggregation against brute force in NumPy, and simulated attackers through the public API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algorithms import POOL, SMALL
from test_equivalence import adapter_of, peft_model, state, texts_of, trained

import fedsim
from fedsim.aggregators import RULES
from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.runs.build import prepare
from fedsim.runs.checks import sampler_of
from fedsim.runs.sweep import Sweep, run_sweep
from fedsim.training.attack import attackers

LOCAL = {"steps": 2, "batch_size": 4, "lr": 5e-3, "keep_state": False}
MANY: dict[str, Any] = {
    **SMALL,
    "modes": ["federated"],
    "local": LOCAL,
    "partition": {"name": "quantity", "num_clients": 8, "exponent": 0.5, "min_rows": 4},
    "cohort": {"size": 7},
}


# ------------------------------------------------------------------------------------------------ brute force


def median(u: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.median(u, axis=0)


def trimmed_mean(u: np.ndarray, w: np.ndarray, beta: float = 0.2) -> np.ndarray:
    cut = int(beta * len(u))
    return np.array([sum(sorted(column)[cut : len(u) - cut]) / (len(u) - 2 * cut) for column in u.T])


def scores(u: np.ndarray, f: int) -> list[float]:
    """Blanchard et al., 2017: the n - f - 2 least squared distances to others."""
    out = []
    for i, a in enumerate(u):
        away = sorted(((a - b) ** 2).sum() for j, b in enumerate(u) if i != j)
        out.append(sum(away[: max(1, len(u) - f - 2)]))
    return out


def most(n: int, each: int) -> int:
    return max(f for f in range(n) if n >= each * f + 3)


def krum(u: np.ndarray, w: np.ndarray, f: int | None = None) -> np.ndarray:
    return u[int(np.argmin(scores(u, most(len(u), 2) if f is None else f)))]


def multi_krum(u: np.ndarray, w: np.ndarray, f: int | None = None) -> np.ndarray:
    f = most(len(u), 2) if f is None else f
    return u[np.argsort(scores(u, f), kind="stable")[: len(u) - f]].mean(axis=0)


def bulyan(u: np.ndarray, w: np.ndarray, f: int | None = None) -> np.ndarray:
    """El Mhamdi et al., 2018: Krum again and again, then the values nearest to the median."""
    f = most(len(u), 4) if f is None else f
    left, chosen = list(range(len(u))), []
    while len(chosen) < len(u) - 2 * f:
        best = left[int(np.argmin(scores(u[left], f)))] if len(left) > 1 else left[0]
        chosen.append(best)
        left.remove(best)
    out = []
    for column in u[sorted(chosen)].T:
        middle = np.median(column)
        out.append(np.mean(sorted(sorted(column), key=lambda v, m=middle: abs(v - m))[: len(chosen) - 2 * f]))
    return np.array(out)


def geometric_median(u: np.ndarray, w: np.ndarray, passes: int = 4, nu: float = 1e-6) -> np.ndarray:
    p = w / w.sum()
    z = p @ u
    for _ in range(passes):
        b = p / np.maximum(nu, np.linalg.norm(u - z, axis=1))
        z = b @ u / b.sum()
    return z


def norm_clip(u: np.ndarray, w: np.ndarray, clip: float = 1.0) -> np.ndarray:
    norms = np.linalg.norm(u, axis=1)
    return w / w.sum() @ (u * np.minimum(1, clip / np.where(norms > 0, norms, 1))[:, None])


BRUTE: list[tuple[str, dict[str, Any], Any]] = [
    ("median", {}, median),
    ("trimmed_mean", {"beta": 0.3}, lambda u, w: trimmed_mean(u, w, 0.3)),
    ("krum", {}, krum),
    ("krum", {"byzantine": 1}, lambda u, w: krum(u, w, 1)),
    ("multi_krum", {}, multi_krum),
    ("multi_krum", {"byzantine": 0}, lambda u, w: multi_krum(u, w, 0)),
    ("bulyan", {}, bulyan),
    ("bulyan", {"byzantine": 0}, lambda u, w: bulyan(u, w, 0)),
    ("geometric_median", {"passes": 3, "nu": 0.3}, lambda u, w: geometric_median(u, w, 3, 0.3)),
    ("norm_clip", {"clip": 1.5}, lambda u, w: norm_clip(u, w, 1.5)),
]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(5, 12), seed=st.integers(0, 10**6), case=st.sampled_from(range(len(BRUTE))), far=st.booleans())
def test_rules_are_brute_force(n: int, seed: int, case: int, far: bool) -> None:
    """In any number of clients and of pieces, with weights, an outlier and an update of zeros; the slots in any order."""
    name, keys, brute = BRUTE[case]
    rng = np.random.default_rng(seed)
    u, w = rng.normal(size=(n, 5)), rng.integers(1, 9, n).astype(float)
    u[-1] = 1e3 if far else 0.0
    rule, slots = RULES[name](**keys), rng.choice(n + 3, n, replace=False)
    ordered = np.argsort(slots)
    acc = {k: torch.zeros(b.rows, 5 if b.by_element else 1).double() for k, b in rule.buffers(n + 3).items()}
    acc = {k: t if rule.buffers(n + 3)[k].by_element else t[:, 0] for k, t in acc.items()}
    for part in np.array_split(np.arange(n), 3):
        rule.add(acc, torch.from_numpy(u[part]), w[part].tolist(), slots[part].tolist())
    found = rule.result(acc, w.sum()).numpy()
    np.testing.assert_allclose(found, brute(u[ordered], w[ordered]), rtol=1e-12, atol=1e-12)


def test_a_rule_is_over_all_parameters_together(lab: Any) -> None:
    """Krum's choice is one client's whole update, tensor by tensor the same; equal clients are what they are."""
    run = lab.run(**{**MANY, "rounds": 1}, aggregator={"name": "krum"}, algorithm={"weights": "uniform"})
    start, end = adapter_of(run / "init"), adapter_of(run / "global")
    moved = torch.cat([(end[n] - start[n]).flatten() for n in start])
    updates = []
    for k in range(8):  # each client alone, from the same start
        one = {**MANY, "rounds": 1, "name": f"one-{k}", "cohort": {"size": "all"}}
        alone = lab.run(**one, simulation={"availability": {f"site-{j + 1}": [int(j == k)] for j in range(8)}})
        there = adapter_of(alone / "global")
        updates.append(torch.cat([(there[n] - start[n]).flatten() for n in start]))
    assert min(float((moved - u).norm()) for u in updates) < 1e-12


# ------------------------------------------------------------------------------------------------ in a run

RULES_IN_RUNS = [{"name": name} for name in RULES if name != "fltrust"] + [{"name": "fltrust", "root_examples": 20}]


@pytest.mark.parametrize("rule", RULES_IN_RUNS, ids=lambda r: r["name"])
def test_workers_and_a_stop_change_no_bit(lab: Any, distance: Any, rule: dict[str, Any]) -> None:
    keys = {
        **MANY,
        "aggregator": rule,
        "rounds": 2,
        "simulation": {"attackers": {"fraction": 0.25, "kind": "gaussian"}},
    }
    whole = lab.run(**keys)
    lab.same_bits(lab.run(**keys, name="pool", executor=POOL), whole)
    stopped = lab.run(**{**keys, "name": "stopped", "rounds": 1})
    fedsim.run(lab.exp(**{**keys, "name": "stopped"}), progress=False, resume=stopped)
    lab.same_bits(stopped, whole)
    alone = lab.run(**{**keys, "name": "alone", "training": {"lanes": 1}})
    assert distance(adapter_of(alone / "global"), adapter_of(whole / "global")) < 1e-9


def test_scaffolds_control_variates_stay_a_sum_beside_a_median(lab: Any) -> None:
    keys = {**MANY, "rounds": 2, "algorithm": {"name": "scaffold"}}
    one, other = lab.run(**keys), lab.run(**keys, name="median", aggregator={"name": "median"})
    assert any(not torch.equal(t, adapter_of(other / "global")[n]) for n, t in adapter_of(one / "global").items())


def test_trust_is_by_the_servers_own_update(lab: Any, distance: Any) -> None:
    """Cao et al., 2021: the server trains like a client on its root set; what points elsewhere counts nothing."""
    keys = {**MANY, "rounds": 1, "cohort": {"size": "all"}, "aggregator": {"name": "fltrust", "root_examples": 20}}
    run, exp = lab.run(**keys), lab.exp(**keys)
    parts = prepare(exp)
    assert parts.root is not None and len(set(parts.root.tolist())) == 20
    start = adapter_of(run / "init")

    def moved(place: Path) -> torch.Tensor:
        return torch.cat([(adapter_of(place)[n] - start[n]).flatten() for n in start]).double()

    updates = []
    for k in range(8):
        one = {**MANY, "rounds": 1, "name": f"one-{k}", "cohort": {"size": "all"}}
        alone = lab.run(**one, simulation={"availability": {f"site-{j + 1}": [int(j == k)] for j in range(8)}})
        updates.append(moved(alone / "global"))
    model, texts = peft_model(exp, run / "init"), texts_of(lab, exp)
    params = trained(model)
    batches = sampler_of(exp).batches(parts.root, stream(exp.seed, "batches", "root", 1), exp.local.steps)
    optimizer = torch.optim.AdamW(
        params,
        lr=exp.local.lr,
        betas=tuple(exp.local.betas),
        eps=exp.local.eps,
        weight_decay=exp.local.weight_decay,
    )
    for numbers in batches:
        optimizer.zero_grad()
        texts.loss(model, numbers).backward()
        if exp.local.clip:
            torch.nn.utils.clip_grad_norm_(params, exp.local.clip)
        optimizer.step()
    own = state(model)
    g0 = torch.cat([(own[n] - start[n]).flatten() for n in start]).double()
    trust = [max(0.0, float(u @ g0 / u.norm() / g0.norm())) for u in updates]
    expected = sum(t * g0.norm() / u.norm() * u for t, u in zip(trust, updates, strict=True)) / sum(trust)
    assert float((moved(run / "global") - expected).norm() / expected.norm()) < 1e-6
    names = {r["client"] for r in lab.metrics(run)}
    assert "root" not in names and names >= {f"site-{k}" for k in range(1, 9)}


def test_too_few_arrivals_leave_the_model_and_say_so(lab: Any) -> None:
    """Krum needs three; clients that drop out make it fewer in some round, and not in the others."""
    keys = {**MANY, "rounds": 4, "cohort": {"size": 4}, "aggregator": {"name": "krum"}}
    for seed in range(20):
        run = lab.run(**keys, seed=seed, name=f"s{seed}", simulation={"drop": 0.4})
        few = [r for r in lab.metrics(run) if r["name"] == "too_few"]
        if few:
            break
    assert few and all(r["value"] < 3 for r in few)
    with pytest.raises(
        UserError, match=r"aggregator.byzantine: 3 needs at least 9 clients in a round, and there are 7"
    ):
        lab.run(**{**MANY, "aggregator": {"name": "krum", "byzantine": 3}})
    with pytest.raises(
        UserError, match=r"aggregator.name: bulyan needs at least 3 clients in a round, and there are 2"
    ):
        lab.run(**{**MANY, "cohort": {"size": 2}, "aggregator": {"name": "bulyan"}})


# ------------------------------------------------------------------------------------------------ attackers


@pytest.mark.parametrize("kind", ["sign_flip", "scaled", "gaussian"])
def test_attackers_send_something_else(lab: Any, kind: str) -> None:
    """One round of all clients: the mean with each attacker's update replaced, in lanes and alone."""
    keys = {**MANY, "rounds": 1, "cohort": {"size": "all"}, "algorithm": {"weights": "uniform"}}
    attack = {"fraction": 0.25, "kind": kind, "factor": 4.0, "std": 0.01}
    run = lab.run(**keys, simulation={"attackers": attack})
    start = adapter_of(run / "init")
    chosen = attackers(lab.exp(**keys).seed, np.arange(8), 0.25)
    assert len(chosen) == 2 and json.loads((run / "model.json").read_text())["attackers"] == sorted(
        f"site-{c + 1}" for c in chosen
    )
    honest = []
    for k in range(8):
        one = {**keys, "name": f"one-{k}"}
        alone = lab.run(**one, simulation={"availability": {f"site-{j + 1}": [int(j == k)] for j in range(8)}})
        there = adapter_of(alone / "global")
        honest.append(torch.cat([(there[n] - start[n]).flatten() for n in start]))
    end = adapter_of(run / "global")
    total = 8 * torch.cat([(end[n] - start[n]).flatten() for n in start])
    sent = total - sum(u for k, u in enumerate(honest) if k not in chosen)
    if kind == "gaussian":
        z = sent / 0.01 / 2**0.5
        assert abs(float(z.mean())) < 0.1 and abs(float(z.std()) - 1) < 0.1
    else:
        expected = sum((-1.0 if kind == "sign_flip" else 4.0) * honest[k] for k in chosen)
        assert float((sent - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_attackers_train_on_flipped_labels_in_federated_rounds_alone(lab: Any, task: str) -> None:
    """Class c becomes C - 1 - c: the same as clients whose data say so; local-only models learn from the true labels."""
    model = {"task": task} if task != "causal_lm" else {}
    keys = {**MANY, "modes": ["local", "federated"], "rounds": 1, "cohort": {"size": "all"}, "model": model}
    run = lab.run(**keys, simulation={"attackers": {"fraction": 0.25, "kind": "label_flip"}})
    honest = lab.run(**keys, name="honest")
    one, other = (adapter_of(r / "local" / "site-1") for r in (run, honest))
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert any(not torch.equal(t, adapter_of(honest / "global")[n]) for n, t in adapter_of(run / "global").items())
    parts = prepare(lab.exp(**keys, simulation={"attackers": {"fraction": 0.25, "kind": "label_flip"}}))
    attack, tokens = parts.attack, parts.tokens["train"]
    assert attack is not None and len(tokens) == attack.total + len(attack.examples)
    for row in attack.examples.tolist():
        (copy,) = attack.seen(min(attack.clients), np.array([row])).tolist()
        assert tokens.labels[copy] == len(tokens.words) - 1 - tokens.labels[row]
        if task == "causal_lm":
            assert tokens.candidates is not None
            prompt = int(tokens.prompts[row])
            new, old = (tokens.candidates[int(tokens.labels[i])] for i in (copy, row))
            assert tokens.row(copy).tolist() == [*tokens.row(row)[:prompt], *new, *tokens.row(row)[prompt + len(old) :]]
        else:
            assert tokens.row(copy).tolist() == tokens.row(row).tolist()


@pytest.mark.parametrize("rule", ["median", "krum", "geometric_median"])
def test_robust_rules_hold_where_the_mean_breaks(lab: Any, rule: str) -> None:
    keys = {**MANY, "rounds": 3, "cohort": {"size": "all"}, "algorithm": {"weights": "uniform"}}
    attack = {"attackers": {"fraction": 0.25, "kind": "gaussian", "std": 0.5}}

    def loss(run: Any) -> float:
        return [
            r["value"]
            for r in lab.metrics(run)
            if r["split"] == "validation" and r["name"] == "loss" and not r["client"]
        ][-1]

    honest, mean = loss(lab.run(**keys)), loss(lab.run(**keys, name="mean", simulation=attack))
    robust = loss(lab.run(**keys, name="robust", aggregator={"name": rule}, simulation=attack))
    assert robust < mean and robust - honest < 0.5 * (mean - honest)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"simulation": {"attackers": {"fraction": 0.01, "kind": "scaled"}}}, "fraction: 0.01 of 8 clients is none"),
        ({"simulation": {"attackers": {"fraction": 0.5, "kind": "steal"}}}, "simulation.attackers.kind: 'steal'"),
        ({"aggregator": {"name": "trimmed_mean", "beta": 0.5}}, r"aggregator.beta: 0.5 is not in \[0, 0.5\)"),
        (
            {"aggregator": {"name": "fltrust", "root_examples": 10**6}},
            "aggregator.root_examples: 1000000, but the clients have",
        ),
        ({"aggregator": {"name": "medain"}}, "did you mean median"),
    ],
)
def test_what_cannot_be_is_one_line(lab: Any, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        lab.run(**MANY, **keys)
    assert "\n" not in str(caught.value)


def test_runs_side_by_side_train_on_their_own_labels(lab: Any, distance: Any) -> None:
    """Attackers of one run train on flipped labels, those of another seed and an honest run beside them do not."""
    flip = {"simulation.attackers": {"fraction": 0.25, "kind": "label_flip"}}
    settings = [{}, flip, {**flip, "seed": 4}]
    ends = []
    for together in (1, 3):
        tree = lab.tree(**{**MANY, "rounds": 1, "results": str(lab.root / f"by-{together}")})
        keys = {"experiment": tree, "list": settings, "workers": 1, "threads": 1, "together": together}
        jobs = run_sweep(Sweep.from_dict({"name": "labels", **keys}), progress=False).jobs
        assert [job.state for job in jobs] == ["finished"] * 3
        ends.append([adapter_of(job.path / "global") for job in jobs])
    assert max(distance(a, b) for a, b in zip(*ends, strict=True)) < 1e-9


def test_the_plan_counts_the_slots(lab: Any) -> None:
    """A mean holds one sum of the whole model, a median the message of each of 7 clients, weight and mark beside it."""
    keys = {**MANY, "rounds": 1, "adapter": {"name": "none"}, "model": {"dtype": "float32"}}
    mean, median = (
        json.loads((lab.run(**keys, name=name, aggregator={"name": name}) / "plan.json").read_text())["memory"]
        for name in ("mean", "median")
    )
    assert mean["sum"] == mean["global"] and "messages" not in mean
    assert median["sum"] == median["messages"] == 7 * (mean["global"] + 2 * 4)
    assert median["predicted"] > median["messages"]
