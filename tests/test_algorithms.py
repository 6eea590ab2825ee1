"""Each algorithm against a plain loop written from its paper, and what all of them have in common.

The loops train PEFT's own model, one client at a time, by torch's optimizers; they share nothing with the package but the rows,
the cohorts and the initial tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_equivalence import adapter_of, peft_model, state, texts_of, trained
from tiers import fast_only
from torch import Tensor

import fedsim
from fedsim.algorithms import ALGORITHMS, Info, Server, reference
from fedsim.core.errors import UserError
from fedsim.runs.build import prepare
from fedsim.runs.resolve import schedule_of

ROUNDS, CLIENTS, COHORT = 3, 4, 3
SMALL: dict[str, Any] = {
    "rounds": ROUNDS,
    "partition": {"name": "quantity", "num_clients": CLIENTS, "exponent": 0.7, "min_rows": 6},
    "cohort": {"size": COHORT},
    "training": {"lanes": 2},
}
SGD = {
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.0,
    "clip": 0.05,
    "epochs": 1,
    "steps": None,
    "schedule": "linear",
    "keep_state": False,
}
ADAMW = {
    "optimizer": "adamw",
    "lr": 5e-3,
    "clip": 1.0,
    "epochs": 1,
    "steps": None,
    "schedule": "linear",
    "keep_state": False,
}
Vector = dict[str, Tensor]


class Plain:
    """A federated run of a plain loop; `rule` is told of every step, client and round."""

    def __init__(self, lab: Any, exp: Any, run: Path) -> None:
        self.exp, self.model = exp, peft_model(exp, run / "init")
        self.texts, self.params = texts_of(lab, exp), trained(self.model)
        held = np.load(run / "partition.npz")
        self.offsets, self.indices = held["offsets"], held["indices"]
        self.sizes = {f"site-{k + 1}": float(n) for k, n in enumerate(np.diff(self.offsets))}
        rows = [r for r in lab.metrics(run) if r["split"] == "train" and r["name"] == "loss"]
        self.cohorts = [sorted({r["client"] for r in rows if r["round"] == t}) for t in range(1, ROUNDS + 1)]
        assert len({tuple(c) for c in self.cohorts}) > 1 and len(set(self.sizes.values())) > 1
        self.x = [p.detach().clone() for p in self.params]
        self.buffers: dict[str, list[Tensor]] = {}  # SGD's momentum, by client

    def examples(self, name: str) -> np.ndarray:
        """Numbers of a client's training examples."""
        k = int(name.removeprefix("site-"))
        return self.indices[self.offsets[k - 1] : self.offsets[k]]

    def client(
        self,
        name: str,
        round: int,
        before: Callable[[list[Tensor]], None] = lambda raw: None,
        after: Callable[[float], None] = lambda lr: None,
    ) -> tuple[list[Tensor], list[float]]:
        """(y - x, the learning rates used); `before` sees the raw gradients, whose parameters it may correct."""
        work, rates = self.exp.local, []
        for p, x in zip(self.params, self.x, strict=True):
            p.data.copy_(x)
        if work.optimizer == "sgd":
            keys = {"momentum": work.momentum, "weight_decay": work.weight_decay}
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.params, lr=work.lr, **keys)
            for p, buffer in zip(self.params, self.buffers.get(name, ()) if work.keep_state else (), strict=False):
                optimizer.state[p]["momentum_buffer"] = buffer
        else:
            keys = {"betas": tuple(work.betas), "eps": work.eps, "weight_decay": work.weight_decay}
            optimizer = torch.optim.AdamW(self.params, lr=work.lr, **keys)
        batches = list(fedsim.batches(self.exp, name, round))
        for i, numbers in enumerate(batches):
            optimizer.zero_grad()
            self.texts.loss(self.model, numbers).backward()
            before([p.grad for p in self.params])
            torch.nn.utils.clip_grad_norm_(self.params, work.clip)
            rates.append(work.lr * (1 - i / len(batches)))  # linear, over the round
            optimizer.param_groups[0]["lr"] = rates[-1]
            optimizer.step()
            with torch.no_grad():
                after(rates[-1])
        if work.momentum:
            self.buffers[name] = [optimizer.state[p]["momentum_buffer"] for p in self.params]
        return [p.detach() - x for p, x in zip(self.params, self.x, strict=True)], rates

    def mean(self, found: dict[str, list[Tensor]]) -> list[Tensor]:
        """sum_k n_k u_k / sum_k n_k."""
        weights = [self.sizes[name] for name in found]
        return [
            sum(w * u for w, u in zip(weights, each, strict=True)) / sum(weights)
            for each in zip(*found.values(), strict=True)
        ]

    def result(self) -> Vector:
        for p, x in zip(self.params, self.x, strict=True):
            p.data.copy_(x)
        return state(self.model)


def fedprox(plain: Plain, mu: float) -> None:
    """Li et al., 2020: the gradient of h_k(w) = F_k(w) + mu / 2 |w - w_t|^2."""

    def before(grads: list[Tensor]) -> None:
        for g, p, x in zip(grads, plain.params, plain.x, strict=True):
            g += mu * (p.detach() - x)

    for t, cohort in enumerate(plain.cohorts, 1):
        mean = plain.mean({name: plain.client(name, t, before)[0] for name in cohort})
        plain.x = [x + d for x, d in zip(plain.x, mean, strict=True)]


def fedadam(plain: Plain, server_lr: float, beta1: float, beta2: float, tau: float) -> None:
    """Reddi et al., 2021, algorithm 2, from v = tau^2."""
    m = [torch.zeros_like(x) for x in plain.x]
    v = [torch.full_like(x, tau * tau) for x in plain.x]
    for t, cohort in enumerate(plain.cohorts, 1):
        delta = plain.mean({name: plain.client(name, t)[0] for name in cohort})
        m = [beta1 * a + (1 - beta1) * d for a, d in zip(m, delta, strict=True)]
        v = [beta2 * a + (1 - beta2) * d * d for a, d in zip(v, delta, strict=True)]
        plain.x = [x + server_lr * a / (b**0.5 + tau) for x, a, b in zip(plain.x, m, v, strict=True)]


def scaffold(plain: Plain, correction: str, server_lr: float) -> None:
    """Karimireddy et al., 2020, algorithm 1, option II; c is the mean of all c_k, weighted by rows."""
    zero = [torch.zeros_like(x) for x in plain.x]
    own = dict.fromkeys(plain.sizes, zero)
    everybody = sum(plain.sizes.values())
    for t, cohort in enumerate(plain.cohorts, 1):
        c = [sum(plain.sizes[k] * own[k][i] for k in own) / everybody for i in range(len(zero))]
        updates = {}
        for name in cohort:
            c_k, raw = own[name], []

            def before(grads: list[Tensor], c_k: Any = c_k, raw: list = raw, c: Any = c) -> None:
                raw.append([g.clone() for g in grads])
                if correction == "before":
                    for g, a, b in zip(grads, c, c_k, strict=True):
                        g += a - b

            def after(lr: float, c_k: Any = c_k, c: Any = c) -> None:
                if correction == "after":
                    for p, a, b in zip(plain.params, c, c_k, strict=True):
                        p -= lr * (a - b)

            updates[name], rates = plain.client(name, t, before, after)
            if correction == "after":
                own[name] = [b - a - u / sum(rates) for a, b, u in zip(c, c_k, updates[name], strict=True)]
            else:
                own[name] = [sum(g) / len(raw) for g in zip(*raw, strict=True)]
        plain.x = [x + server_lr * d for x, d in zip(plain.x, plain.mean(updates), strict=True)]


CASES: dict[str, tuple[dict[str, Any], Callable[..., None], dict[str, Any]]] = {
    "fedprox": ({"mu": 0.5}, fedprox, ADAMW),
    "fedadam": ({"server_lr": 0.02, "beta1": 0.8, "beta2": 0.95, "tau": 0.01}, fedadam, ADAMW),
    "scaffold after adamw": ({"correction": "after", "server_lr": 0.7}, scaffold, ADAMW),
    "scaffold after sgd": ({"correction": "after", "server_lr": 1.0}, scaffold, SGD),
    "scaffold before sgd": ({"correction": "before", "server_lr": 0.7}, scaffold, SGD),
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


# ------------------------------------------------------------------------------------------- what all have in common

METHODS: list[dict[str, Any]] = [
    {"name": "fedprox", "mu": 0.5},
    {"name": "fedadam"},
    {"name": "scaffold"},
    {"name": "scaffold", "correction": "before"},
    {"name": "fednova", "normalise": "steps"},
    {"name": "fedavgm"},
    {"name": "fedyogi"},
    {"name": "fedadagrad"},
    {"name": "feddyn"},
    {"name": "qfedavg"},
    {"name": "fedbuff", "buffer": 3},
    {"name": "ditto", "lam": 0.5},
    {"name": "fedper"},
    {"name": "fedrep", "head_steps": 2},
    {"name": "apfl"},
    {"name": "pfedme", "inner_steps": 2},
    {"name": "perfedavg"},
    {"name": "ffa_lora"},
    {"name": "rolora"},
    {"name": "fedsa_lora"},
    {"name": "hetlora"},
    {"name": "fedsvd"},
    {"name": "fedrot_lora"},
    {"name": "fedex_lora"},
    {"name": "flora"},
    {"name": "flora", "reinit": False},
    {"name": "flexlora"},
]
KEYS_OF = {"fedbuff": {"simulation": {"speeds": [30, 900]}}}  # sections that an algorithm needs
POOL = {"name": "pool", "devices": ["cpu", "cpu"], "threads": 1}


def test_every_algorithm_of_the_table_is_tested() -> None:
    assert {"fedavg", *(m["name"] for m in METHODS)} == set(ALGORITHMS)


@fast_only(2)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_workers_and_a_stop_change_no_bit_and_lanes_only_round(lab: Any, distance: Any, method: dict[str, Any]) -> None:
    keys = {**SMALL, "algorithm": method, **KEYS_OF.get(method["name"], {})}
    whole = lab.run(**keys)
    lab.same_bits(lab.run(**keys, name="pool", executor=POOL), whole)
    stopped = lab.run(**{**keys, "name": "stopped", "rounds": 2})
    fedsim.run(lab.exp(**{**keys, "name": "stopped"}), progress=False, resume=stopped)
    lab.same_bits(stopped, whole)
    alone = lab.run(**{**keys, "name": "alone", "training": {"lanes": 1}})
    assert distance(adapter_of(alone / "global"), adapter_of(whole / "global")) < 1e-9


# A whole model has no factors; of one, a layer is private.
WHOLE = [
    {**m, "private": ["layers.1"]} if m["name"] in ("fedper", "fedrep") else m
    for m in METHODS
    if not ALGORITHMS[m["name"]].adapters
]


@fast_only(1, 2)
@pytest.mark.parametrize("method", WHOLE, ids=str)
def test_a_whole_model_in_chunks_is_the_same_in_one_piece(
    lab: Any, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    keys = {**SMALL, "rounds": 2, "adapter": {"name": "none"}, "algorithm": method, "local": {"lr": 1e-3}}
    keys |= KEYS_OF.get(method["name"], {})
    whole = lab.run(**keys)
    original = fedsim.runs.setup.recipe_of
    monkeypatch.setattr(fedsim.runs.setup, "recipe_of", lambda exp: dataclasses.replace(original(exp), chunk=4096))
    lab.same_bits(lab.run(**keys, name="chunks"), whole)


PARTITION = """
def by_name(labels, rng, *, reverse: bool = False):
    held = {f"hospital-{k}": [i for i in range(len(labels)) if i * i % 7 % 3 == k] for k in range(3)}
    return dict(reversed(held.items())) if reverse else held
"""


@fast_only(2, 4, 9)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_order_of_the_clients_only_rounds(lab: Any, distance: Any, method: dict[str, Any]) -> None:
    (lab.root / "order.py").write_text(PARTITION)
    name = f"{lab.root}/order.py:by_name"
    keys = {"rounds": 2, "algorithm": method, **KEYS_OF.get(method["name"], {})}
    one, other = (lab.run(**keys, partition={"name": name, "reverse": r}, name=f"order-{r}") for r in (False, True))
    assert distance(adapter_of(one / "global"), adapter_of(other / "global")) < 1e-9


# Settings that are FedAvg: to the bit, or (1e-12) where sums are divided in another order.
NEUTRAL: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "fedprox": ({"mu": 0.0}, {}, 0.0),
    "fedavgm": ({"beta1": 0.0}, {}, 0.0),
    "qfedavg": ({"q": 0.0, "weights": "uniform"}, {}, 1e-12),
    # beta1 = beta2 = 0 and a tau beside which |D| vanishes leave eta D / tau; powers of two divide without rounding.
    "fedadam": ({"server_lr": 2.0**60, "beta1": 0.0, "beta2": 0.0, "tau": 2.0**60}, {}, 0.0),
    # Of a single client c = c_k, so that it is never corrected; from round 3 on they differ by rounding.
    "scaffold": (
        {"weights": "uniform"},
        {"partition": {"name": "iid", "num_clients": 1}, "cohort": {"size": "all"}, "rounds": 2},
        0.0,
    ),
    "fedbuff": ({"weights": "uniform", "buffer": COHORT}, {}, 1e-12),  # of clients that take the same time
    "ditto": ({}, {"training": {"lanes": 1}}, 0.0),  # the shared part
    "hetlora": ({"mean": "zero_pad"}, {}, 1e-12),
    "fedrot_lora": ({"lam": 0.0}, {"local": {"keep_state": False}}, 0.0),
}
# Algorithms of which no setting is FedAvg, and why.
NOT_NEUTRAL = {
    "fednova": "divides by each client's work, which unequal steps make unequal",
    "fedyogi": "divides by the root of the second moment",
    "fedadagrad": "divides by the root of the second moment",
    "feddyn": "alpha divides the server's state, so it is above 0",
    "apfl": "its gradients are taken at two points; w alone is FedAvg's",
    "pfedme": "w moves by lam (w - theta)",
    "perfedavg": "each step is by a second batch",
    "fedper": "private parameters are not averaged",
    "fedrep": "private parameters are not averaged",
    "ffa_lora": "A does not train",
    "rolora": "one half trains at a time",
    "fedsa_lora": "B is not averaged",
    "fedsvd": "A does not train",
    "fedex_lora": "folds the error of the means",
    "flora": "folds the product",
    "flexlora": "splits the product anew",
}


def test_every_algorithm_has_a_neutral_setting_or_says_why_not() -> None:
    assert sorted(["fedavg", *NEUTRAL, *NOT_NEUTRAL]) == sorted(ALGORITHMS)


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_hyperparameters_are_fedavg(lab: Any, distance: Any, name: str) -> None:
    method, keys, most = NEUTRAL[name]
    keys = {**SMALL, **keys, "algorithm": {"name": "fedavg", "weights": method.get("weights", "samples")}}
    fedavg = lab.run(**keys)
    if name in KEYS_OF:
        made = schedule_of(prepare(lab.exp(**keys)), "federated")
        keys |= {"simulation": {"speeds": {made.name(c): made.tokens(c) for c in range(CLIENTS)}}}
    found = lab.run(**{**keys, "name": "neutral", "algorithm": {"name": name, **method}})
    assert distance(adapter_of(found / "global"), adapter_of(fedavg / "global")) <= most


def test_the_table_of_algorithms_is_current_and_complete() -> None:
    committed = Path(__file__).resolve().parents[1] / "docs" / "algorithms.md"
    how = "run: python -m fedsim.algorithms.reference > docs/algorithms.md"
    assert committed.read_text(encoding="utf-8") == reference.page(), how
    for name, kind in ALGORITHMS.items():
        assert reference.paper(kind), (
            f"{name}: its file does not begin with `NAME: authors. Title. Venue year (arXiv id).`"
        )
        assert all(reference.items(kind, part) for part in ("Deviations", "Peers")), name
    cells = {name: reference.row(name, kind) for name, kind in ALGORITHMS.items()}
    assert cells["scaffold"][2:6] == [
        "`update`: A, B, head<br>`control`: A, B, head",
        "A, B, head; server state, 1 x",
        "2.00 / 2.00",
        "1 x / 1 x",
    ]
    assert cells["fedavgm"][1].endswith("2019 (arXiv:1909.06335), section 4.4")


def test_a_scaffold_message_counts_both_ways(lab: Any) -> None:
    """A client sends its update and its control variate, and receives the parameters and the server's."""
    sent = {}
    for name in ("fedavg", "scaffold"):
        run = lab.run(name=name, algorithm={"name": name})
        rows = [r for r in lab.metrics(run) if r["client"] == "site-1"]
        sent[name] = [next(r["value"] for r in rows if r["name"] == f"bytes_{way}") for way in ("up", "down")]
    assert sent["scaffold"] == [2 * size for size in sent["fedavg"]]


def test_the_servers_variate_stays_the_mean_of_all_clients() -> None:
    """Karimireddy et al., 2020: c = 1 / N sum_k c_k, also where |S| < N; one step of the server on known numbers."""
    algorithm = ALGORITHMS["scaffold"](server_lr=0.5)
    server = Server({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.25])})
    reduced = {"update": {"w": torch.tensor([4.0])}, "control": {"w": torch.tensor([6.0])}}  # sums over a cohort of 2
    found = algorithm.step(server, reduced, Info(1, 2, 2.0, 8, 8.0))
    assert found.params["w"].item() == 3.0 and found.state["w"].item() == 1.0


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "fedprox", "mu": -1.0}, "algorithm.mu: -1.0 is not a number of at least 0"),
        ({"name": "fedadam", "beta2": 1.0}, "algorithm.beta2: 1.0 is not in"),
        ({"name": "scaffold", "correction": "during"}, "algorithm.correction: 'during' is not one of after, before"),
        (
            {"name": "scaffold", "mu": 1.0},
            r"unknown key algorithm.mu \(did you mean .*fedprox.*\?\). Valid keys: .*correction, server_lr",
        ),
        ({"name": "scafold"}, "algorithm.name: 'scafold' is not known; did you mean scaffold"),
    ],
)
def test_wrong_keys_are_told_in_one_line(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        fedsim.Experiment(algorithm=section)
    assert "\n" not in str(caught.value)
