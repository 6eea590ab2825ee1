"""FedNova, FedAvgM, FedYogi, FedAdagrad, FedDyn, q-FedAvg and SCAFFOLD's choices: plain loops written from the papers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_algorithms import ADAMW, SGD, SMALL, Plain
from test_equivalence import adapter_of
from torch import Tensor

import fedsim
from fedsim.algorithms import ALGORITHMS, ClientOptimizer, ClientView, Info, Server
from fedsim.core.errors import UserError
from fedsim.runs.build import prepare

MOMENTUM = {**SGD, "momentum": 0.7}


def add(x: list[Tensor], d: list[Tensor], by: float = 1.0) -> list[Tensor]:
    return [a + by * b for a, b in zip(x, d, strict=True)]


def fednova(plain: Plain, mu: float = 0.0, normalise: str = "exact") -> None:
    """Wang et al., 2020: the vector a_k holds the weight of each gradient in x - y; here all of it, by brute force.

    A gradient's weight is found by sending 1 through the recursion of the optimizer at its step, and 0 at the others.
    """
    work, done = plain.exp.local, dict.fromkeys(plain.sizes, 0)

    def vector(rates: list[float], earlier: int) -> list[float]:
        out = []
        for j in range(-earlier, len(rates)):
            moved, velocity = 0.0, work.momentum ** (-j - 1) if j < 0 else 0.0
            for i, lr in enumerate(rates):
                velocity = work.momentum * velocity + (i == j) - mu * moved
                moved += lr * velocity
            out.append(moved)
        return out

    for t, cohort in enumerate(plain.cohorts, 1):
        weights, directions = {}, {}
        for name in cohort:

            def before(grads: list[Tensor]) -> None:
                for g, p, x in zip(grads, plain.params, plain.x, strict=True):
                    g += mu * (p.detach() - x)

            update, rates = plain.client(name, t, before)
            a = sum(abs(w) for w in vector(rates, done[name] if work.keep_state else 0)) / work.lr
            weights[name] = float(len(rates)) if normalise == "steps" else a
            directions[name] = [u / weights[name] for u in update]
            done[name] += len(rates)
        total = sum(plain.sizes[k] for k in cohort)
        effective = sum(plain.sizes[k] * weights[k] for k in cohort) / total
        plain.x = add(plain.x, plain.mean(directions), effective)


def fedavgm(plain: Plain, server_lr: float, beta1: float) -> None:
    """Hsu et al., 2019."""
    v = [torch.zeros_like(x) for x in plain.x]
    for t, cohort in enumerate(plain.cohorts, 1):
        delta = plain.mean({name: plain.client(name, t)[0] for name in cohort})
        v = [beta1 * a + d for a, d in zip(v, delta, strict=True)]
        plain.x = add(plain.x, v, server_lr)


def adaptive(rule: str) -> Callable[..., None]:
    """Reddi et al., 2021, algorithm 2, and Flower's variant of it."""

    def run(
        plain: Plain, server_lr: float, beta1: float, tau: float, beta2: float = 0.0, flavour: str = "paper"
    ) -> None:
        m = [torch.zeros_like(x) for x in plain.x]
        v = [torch.full_like(x, tau * tau if flavour == "paper" else 0.0) for x in plain.x]
        for t, cohort in enumerate(plain.cohorts, 1):
            delta = plain.mean({name: plain.client(name, t)[0] for name in cohort})
            m = [beta1 * a + (1 - beta1) * d for a, d in zip(m, delta, strict=True)]
            new = []
            for a, d in zip(v, delta, strict=True):
                s = d * d
                new.append(
                    {
                        "fedadagrad": a + s,
                        "fedyogi": torch.where(a > s, a - (1 - beta2) * s, a + (1 - beta2) * s),
                        "fedadam": beta2 * a + (1 - beta2) * s,
                    }[rule]
                )
            v, lr = new, server_lr
            if flavour == "flower" and rule == "fedadam":
                lr *= (1 - beta2 ** (t + 1)) ** 0.5 / (1 - beta1 ** (t + 1))
            plain.x = [x + lr * a / (b**0.5 + tau) for x, a, b in zip(plain.x, m, v, strict=True)]

    return run


def feddyn(plain: Plain, alpha: float, weights: str = "samples") -> None:
    """Acar et al., 2021, algorithm 1; with weights, h is the weighted mean of all g_k."""
    w = plain.sizes if weights == "samples" else dict.fromkeys(plain.sizes, 1.0)
    own = {name: [torch.zeros_like(x) for x in plain.x] for name in plain.sizes}
    for t, cohort in enumerate(plain.cohorts, 1):
        updates = {}
        for name in cohort:

            def before(grads: list[Tensor], g_k: list[Tensor] = own[name]) -> None:
                for g, p, x, mine in zip(grads, plain.params, plain.x, g_k, strict=True):
                    g += alpha * (p.detach() - x) - mine

            updates[name], _ = plain.client(name, t, before)
            own[name] = add(own[name], updates[name], -alpha)
        h = [sum(w[k] * own[k][i] for k in own) / sum(w.values()) for i in range(len(plain.x))]
        total = sum(w[k] for k in cohort)
        mean = [sum(w[k] * updates[k][i] for k in cohort) / total for i in range(len(plain.x))]
        plain.x = [x + d - a / alpha for x, d, a in zip(plain.x, mean, h, strict=True)]


def qfedavg(plain: Plain, q: float, weights: str = "uniform") -> None:
    """Li et al., 2020, algorithm 2: the loss of the received model on all examples of the client."""
    steep = 1 / plain.exp.local.lr
    for t, cohort in enumerate(plain.cohorts, 1):
        above, below = [torch.zeros_like(x) for x in plain.x], 0.0
        for name in cohort:
            for p, x in zip(plain.params, plain.x, strict=True):
                p.data.copy_(x)
            with torch.no_grad():
                loss = float(plain.texts.loss(plain.model, plain.examples(name)))
            change = [-steep * u for u in plain.client(name, t)[0]]
            w = plain.sizes[name] if weights == "samples" else 1.0
            norm = sum(float((d * d).sum()) for d in change)
            above = add(above, change, w * loss**q)
            below += w * (q * loss ** (q - 1) * norm + steep * loss**q)
        plain.x = add(plain.x, above, -1 / below)


ADAPTIVE = {"server_lr": 0.02, "beta1": 0.8, "tau": 0.01}
KEPT, STEPS = {"keep_state": True}, {"epochs": None, "steps": 2, "batch_size": 4}
CASES: dict[str, tuple[dict[str, Any], Callable[..., None], dict[str, Any]]] = {
    "fednova sgd": ({}, fednova, SGD),
    "fednova momentum": ({}, fednova, MOMENTUM),
    "fednova momentum kept": ({}, fednova, {**MOMENTUM, **KEPT}),
    "fednova prox": ({"mu": 2.0}, fednova, SGD),
    "fednova prox and momentum": ({"mu": 0.5}, fednova, MOMENTUM),
    "fednova steps": ({"normalise": "steps"}, fednova, ADAMW),
    "fedavgm adamw": ({"server_lr": 0.8, "beta1": 0.6}, fedavgm, ADAMW),
    "fedyogi adamw": ({**ADAPTIVE, "beta2": 0.9}, adaptive("fedyogi"), ADAMW),
    "fedadagrad adamw": (ADAPTIVE, adaptive("fedadagrad"), ADAMW),
    "fedadam flower": ({**ADAPTIVE, "beta2": 0.9, "flavour": "flower"}, adaptive("fedadam"), ADAMW),
    "fedyogi flower": ({**ADAPTIVE, "beta2": 0.9, "flavour": "flower"}, adaptive("fedyogi"), ADAMW),
    "fedadagrad flower": ({**ADAPTIVE, "flavour": "flower"}, adaptive("fedadagrad"), ADAMW),
    "feddyn sgd": ({"alpha": 0.3}, feddyn, SGD),
    "feddyn adamw uniform": ({"alpha": 0.3, "weights": "uniform"}, feddyn, ADAMW),
    "qfedavg sgd": ({"q": 1.0}, qfedavg, SGD),
    "qfedavg some examples": ({"q": 0.4, "weights": "samples"}, qfedavg, {**SGD, **STEPS}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_algorithm_is_its_papers_loop(lab: Any, distance: Any, case: str) -> None:
    """In lanes, with clients of unequal size, of which some stay away, under a learning rate that changes."""
    keys, rule, local = CASES[case]
    exp = lab.exp(**SMALL, algorithm={"name": case.split()[0], **keys}, local={**local, "schedule_over": "round"})
    run = lab.run(exp)
    plain = Plain(lab, exp, run)
    rule(plain, **keys)
    assert distance(adapter_of(run / "global"), plain.result()) < 1e-9


def test_defaults_are_those_of_the_papers_and_of_reddi() -> None:
    def keys(name: str) -> dict[str, Any]:
        return fedsim.Experiment(algorithm={"name": name}).to_dict()["algorithm"]

    assert keys("fedavgm") == {"name": "fedavgm", "weights": "samples", "server_lr": 1.0, "beta1": 0.9}
    adam = {"weights": "samples", "server_lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "flavour": "paper"}
    assert keys("fedadam") == {"name": "fedadam", **adam} and keys("fedyogi") == {"name": "fedyogi", **adam}
    del adam["beta2"]
    assert keys("fedadagrad") == {"name": "fedadagrad", **adam, "beta1": 0.0}
    buffered = {"buffer": 10, "server_lr": 1.0, "staleness": "sqrt", "concurrency": None}
    assert keys("fedbuff") == {"name": "fedbuff", "weights": "uniform", **buffered}
    assert keys("feddyn")["alpha"] == 0.1 and keys("qfedavg")["q"] == 1.0 and keys("scaffold")["correction"] is None


def test_fednova_says_which_optimizers_it_is_exact_for(lab: Any) -> None:
    why = r"^algorithm\.normalise: 'exact' is for local\.optimizer=sgd; an update of adamw is no weighted sum of gradients; set .*=steps$"
    with pytest.raises(UserError, match=why):
        prepare(lab.exp(algorithm={"name": "fednova"}))
    prepare(lab.exp(algorithm={"name": "fednova"}, modes=["local"]))  # where nothing is merged it does not matter


@pytest.mark.parametrize(("optimizer", "usual"), [("sgd", "before"), ("adamw", "after")])
def test_scaffold_corrects_gradients_under_sgd_and_steps_under_adamw(lab: Any, optimizer: str, usual: str) -> None:
    keys = {**SMALL, "local": {"optimizer": optimizer, "lr": 0.01, "clip": 0.01}}
    found = {
        c: lab.run(**keys, name=str(c), algorithm={"name": "scaffold", "correction": c})
        for c in (None, "before", "after")
    }
    tensors = {c: adapter_of(run / "global") for c, run in found.items()}
    other = {"before": "after", "after": "before"}[usual]
    assert all(torch.equal(t, tensors[usual][n]) for n, t in tensors[None].items())
    assert any(not torch.equal(t, tensors[other][n]) for n, t in tensors[None].items())


@pytest.mark.parametrize("correction", ["before", "after"])
def test_a_scaffold_client_without_rates_keeps_its_variate(correction: str) -> None:
    """Three clients: one did two steps, one none, one two steps of rate 0."""
    one = torch.ones(3, 2, dtype=torch.float64)
    rates = torch.tensor([0.2, 0.0, 0.0], dtype=torch.float64)
    view = ClientView(1, {"w": one[0]}, {"w": one[0]}, {"w": 5 * one}, torch.tensor([2, 0, 2]), rates)
    made = ALGORITHMS["scaffold"](correction=correction)
    message, state = made.finish({"w": 3 * one}, {"w": 8 * one}, view)
    assert state["w"][1:].tolist() == [[5, 5], [5, 5]] and message["control"]["w"][1:].abs().max() == 0
    assert state["w"][0, 0].item() == pytest.approx({"before": 4.0, "after": 5 - 1 - 2 / 0.2}[correction], abs=1e-12)


def test_a_fair_norm_is_over_all_parameters_whatever_their_shapes() -> None:
    """q = 2, L = 1 / 0.5, two scalars and a matrix: h = 2 F |2 u|^2 + 2 F^2."""
    x = {"a": torch.zeros(2, 2, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
    y = {n: t.new_full((1, *t.shape), 1.0) for n, t in x.items()}
    lr = torch.ones(1, dtype=torch.float64)
    view = ClientView(
        1, x, {}, {}, torch.tensor([1]), lr, facts={"start_loss": 3 * lr}, optim=ClientOptimizer("sgd", 0.5)
    )
    message, _ = ALGORITHMS["qfedavg"](q=2.0).finish(y, {}, view)
    assert message["scale"]["scale"].item() == pytest.approx(2 * 3 * (4 * 5) + 2 * 9)
    assert message["update"]["a"][0, 0, 0].item() == pytest.approx(9 * 2.0)


def test_feddyn_holds_the_mean_of_all_clients_gradients() -> None:
    made = ALGORITHMS["feddyn"](alpha=0.5)
    server = Server({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.25])})
    found = made.step(server, {"update": {"w": torch.tensor([4.0])}}, Info(1, 2, 2.0, 8, 8.0))
    assert found.state["w"].item() == 0.25 - 0.5 * 2 / 8 * 4 and found.params["w"].item() == 1 + 4 + 0.25 / 0.5


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "feddyn", "alpha": 0.0}, "algorithm.alpha: 0.0 is not a number above 0"),
        ({"name": "qfedavg", "q": -1.0}, "algorithm.q: -1.0 is not a number of at least 0"),
        ({"name": "fedavgm", "beta1": 1.0}, r"algorithm.beta1: 1.0 is not in \[0, 1\)"),
        ({"name": "fedyogi", "tau": 0.0}, "algorithm.tau: 0.0 is not a number above 0"),
        ({"name": "fedadam", "flavour": "flwr"}, "algorithm.flavour: 'flwr' is not one of paper, flower"),
        ({"name": "fedadagrad", "beta2": 0.9}, "unknown key algorithm.beta2"),
    ],
)
def test_wrong_keys_are_told_in_one_line(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fedsim.Experiment(algorithm=section)


def test_what_the_server_divides_by_is_not_compressed(lab: Any, distance: Any) -> None:
    """Numbers of 1e6 and above, which float16 does not hold; values of the update are far below."""
    keys = {**SMALL, "algorithm": {"name": "qfedavg"}, "local": {"optimizer": "sgd", "lr": 1e-7, "clip": None}}
    exact = lab.run(**keys)
    half = lab.run(**keys, name="half", messages={"up": "fp16", "error_feedback": True})
    first, *last = (adapter_of(f) for f in (exact / "init", exact / "global", half / "global"))
    moved, other = ({n: t - first[n] for n, t in found.items()} for found in last)
    assert distance(other, moved) < 0.01


def test_one_number_more_is_sent(lab: Any) -> None:
    up = {}
    for name in ("fedavg", "qfedavg"):
        run = lab.run(name=name, algorithm={"name": name})
        up[name] = json.loads((run / "model.json").read_text())["bytes_up"]
    assert up["qfedavg"] == up["fedavg"] + 8 and np.isfinite(up["fedavg"])
