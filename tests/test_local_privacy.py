"""Example-level differential privacy: gradients by example in lanes, their clip and noise, and each client's ledger."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from test_algorithms import COHORT, POOL, ROUNDS, SMALL
from test_equivalence import adapter_of, peft_model, texts_of
from test_lanes import CPU, METHODS, Bench
from tiers import fast
from torch import Tensor

import fedsim
from fedsim.aggregators.reducer import Reducer
from fedsim.cli.main import main
from fedsim.core.errors import UserError
from fedsim.core.types import Engine
from fedsim.models.forward import Net
from fedsim.models.per_example import Examples, clipped_sums
from fedsim.privacy import epsilon
from fedsim.runs.build import prepare
from fedsim.runs.local_sgd import planned
from fedsim.training.private import PrivateExamples, PrivateLane

pytest.importorskip("dp_accounting")
SGD = {
    "optimizer": "sgd",
    "lr": 0.5,
    "momentum": 0.0,
    "clip": None,
    "weight_decay": 0.0,
    "batch_size": 4,
    "steps": 2,
    "keep_state": False,
}
ONE = {**SGD, "steps": 1}
ALONE = {"partition": {"name": "iid", "num_clients": 1}, "cohort": {"size": "all"}, "rounds": 1, "local": ONE}
CASES = [("llama", m) for m in METHODS] + [("gpt2", "lora"), ("bert", "lora"), ("bert", "adapter"), ("roberta", "ia3")]


def keys(**privacy: Any) -> dict[str, Any]:
    section = {"name": "local_sgd", "clip": 0.05, **privacy}
    section |= {} if {"noise_multiplier", "target_epsilon"} & section.keys() else {"noise_multiplier": 1.0}
    return {**SMALL, "modes": ["federated"], "local": SGD, "privacy": section}


def spent(lab: Any, run: Any, name: str = "epsilon", client: str | None = None) -> list[float]:
    rows = [r for r in lab.metrics(run) if r["split"] == "privacy" and r["name"] == name and r["client"] == client]
    return [r["value"] for r in rows]


# --------------------------------------------------------------------------------------- gradients by example


def unlike(net: Any, layout: Any, lanes: int) -> Tensor:
    """Parameters of unlike lanes, `[K, N]`."""
    start = torch.cat([p.detach().flatten() for p in net.params.values()])
    return start + 0.02 * torch.from_numpy(np.random.default_rng(1).normal(size=(lanes, len(start))))


def by_example(net: Any, tokens: Any, rows: np.ndarray, weights: Tensor) -> list[tuple[float, Tensor]]:
    """Loss and gradient `[N]` of each example, one after another by PEFT's own model in padded batches."""
    out = []
    for row in rows[:, None]:
        grad = torch.zeros_like(weights)[None]
        Net.bind(net, weights[None].clone(), grad)
        loss, _ = Net.backward(net, tokens, [row], torch.tensor(tokens.answers_of(row)))
        out.append((float(loss), grad[0].clone()))
    return out


def clipped(grads: list[Tensor], clip: float, like: Tensor) -> Tensor:
    """Their clipped sum, one example after another."""
    out = torch.zeros_like(like)
    for g in grads:
        out += g * min(1.0, clip / (float(g.norm()) + 1e-6))
    return out


@pytest.mark.parametrize(("kind", "method"), fast(CASES, ("llama", "lora"), ("llama", "p_tuning"), ("bert", "lora")))
def test_clipped_sums_of_lanes_are_a_plain_loop_over_examples(lab: Any, kind: str, method: str) -> None:
    bench = Bench(lab, kind, method, heads=True if kind in ("bert", "roberta") else None)
    worker = bench.worker(3)
    net, layout = worker.trainer.net, worker.layout
    weights = unlike(net, layout, 3)
    rows = [np.array([4, 0, 9, 2]), np.array([], dtype=np.int64), np.array([11, 7])]
    alone = [by_example(net, bench.tokens, r, w) for r, w in zip(rows, weights, strict=True)]
    clip = float(np.median([float(g.norm()) for a in alone for _, g in a]))  # some are clipped, some are not
    expected = torch.stack([clipped([g for _, g in a], clip, weights[0]) for a in alone])
    found, trainer = torch.zeros_like(weights), worker.trainer
    net.train(False)
    net.begin([0, 0, 0])
    net.bind(weights, found)
    loss, _ = net.clipped(bench.tokens, rows, clip)
    assert float((found - expected).norm() / expected.norm()) < 1e-9 and not found[1].any()
    assert loss.tolist() == pytest.approx([sum(value for value, _ in a) for a in alone], rel=1e-9)
    trainer.reserve(3)
    trainer.flat.copy_(weights)
    for size in (1, 3):  # micro-batches of one logical batch
        trainer.configure(Engine(True, size))
        net.bind(trainer.flat, trainer.grad)
        private = [PrivateExamples(clip, 1.0).lane(2.0, lambda step: step)] * 3
        trainer.backward_private(rows, private)
        assert float((trainer.grad - expected / 2).norm() / expected.norm()) < 1e-9


def test_what_does_not_train_is_outside_the_norm(lab: Any) -> None:
    """As under FFA-LoRA and RoLoRA; and by lane."""
    bench = Bench(lab)
    worker = bench.worker(2)
    net, layout = worker.trainer.net, worker.layout
    weights, names = unlike(net, layout, 2), list(layout.shapes)
    trains = np.array([["lora_B" in n for n in names], ["lora_A" in n for n in names]])
    rows = [np.array([4, 0, 9]), np.array([11, 7])]
    mask = torch.cat(
        [torch.from_numpy(trains[:, [i]]).expand(2, math.prod(layout.shapes[n])) for i, n in enumerate(names)], dim=1
    )
    alone = [
        [g * m for _, g in by_example(net, bench.tokens, r, w)] for r, w, m in zip(rows, weights, mask, strict=True)
    ]
    clip = float(np.median([float(g.norm()) for a in alone for g in a]))
    expected = torch.stack([clipped(a, clip, weights[0]) for a in alone])
    found = torch.zeros_like(weights)
    net.train(False)
    net.begin([0, 0])
    net.bind(weights, found)
    net.clipped(bench.tokens, rows, clip, trains)
    assert float((found - expected).norm() / expected.norm()) < 1e-9


def test_an_example_that_is_not_finite_counts_nothing_and_stays_in_its_lane() -> None:
    grads = [torch.ones(4, 2, 3), torch.ones(4, 5)]
    grads[0][1, 0, 0], grads[1][3, 2] = math.nan, math.inf
    found = clipped_sums(grads, Examples([2, 0, 2], CPU), 1.0, torch.ones(3, 2, dtype=torch.bool))
    for g in found:
        assert torch.allclose(g[0], torch.full_like(g[0], 1 / math.sqrt(11)), atol=1e-6) and torch.equal(g[2], g[0])
        assert not g[1].any()


def test_a_client_equals_opacus(lab: Any) -> None:
    """Steps of plain SGD without noise, by a whole run, beside Opacus on PEFT's own model."""
    pytest.importorskip("opacus", reason="opacus is not installed: pip install --no-deps opacus==1.6.0")
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    exp = lab.exp(**{**keys(noise_multiplier=0.0), **ALONE, "local": {**SGD, "steps": 3, "batch_size": 8}})
    run = lab.run(exp)
    batches = fedsim.batches(exp, "site-1", 1)
    assert len({len(b) for b in batches}) > 1, "Poisson batches"
    model, texts = peft_model(exp, run / "init").train(), texts_of(lab, exp)
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
    own = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    sgd = torch.optim.SGD(own.values(), lr=0.5)
    how = {"noise_multiplier": 0.0, "max_grad_norm": 0.05, "expected_batch_size": 8, "loss_reduction": "sum"}
    optimizer = DPOptimizer(sgd, **how)
    for batch in batches:
        made = texts.batch(batch)
        labels = made.pop("labels")[:, 1:]
        nll = F.cross_entropy(wrapped(**made).logits[:, :-1].transpose(1, 2), labels, reduction="none")
        (nll.sum(dim=1) / (labels >= 0).sum(dim=1)).sum().backward()
        optimizer.clip_and_accumulate()
        with torch.no_grad():
            for parameter in own.values():
                parameter -= 0.5 * parameter.summed_grad / 8
        optimizer.zero_grad()
    before, after = adapter_of(run / "init"), adapter_of(run / "global")
    for name, parameter in own.items():
        moved = float((after[name] - before[name]).norm())
        assert (
            0 < moved < 0.5 * 0.05 * 3 * 20 / 8 and float((after[name] - parameter.detach()).norm()) < 1e-6 * moved
        ), name


# ------------------------------------------------------------------------------------------------------ noise


def test_noise_is_added_once_to_each_logical_batch(lab: Any) -> None:
    """N(0, (z C)^2) on the sum of a batch, whatever the micro-batch; another draw at each step, client and round."""
    runs = [lab.run(**{**keys(noise_multiplier=z), **ALONE, "name": f"z{z}"}) for z in (0.0, 2.0)]
    cut = lab.run(**{**keys(noise_multiplier=2.0), **ALONE, "name": "cut", "local": {**ONE, "micro_batch": 1}})
    for noisy in (runs[1], cut):
        gap = torch.cat(
            [(b - adapter_of(noisy / "global")[n]).flatten() for n, b in adapter_of(runs[0] / "global").items()]
        )
        drawn = (gap * 4 / (0.5 * 2.0 * 0.05)).numpy()
        assert scipy.stats.kstest(drawn, "norm").pvalue > 1e-3 and len(drawn) > 500
    tree = lab.tree(**keys(noise_multiplier=1.0))
    made = _drawn(lab, tree)
    assert len(made) == COHORT * 2 * ROUNDS and len({tuple(m[:3].tolist()) for m in made}) == len(made)
    together = torch.stack(made).numpy()
    assert scipy.stats.kstest(together.flatten(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(together) - np.eye(len(made))).max() < 5 / math.sqrt(together.shape[1])


def _drawn(lab: Any, tree: dict[str, Any]) -> list[Tensor]:
    """The noise of a run's steps, each in units of its standard deviation."""
    out, original = [], PrivateLane.noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateLane, "noise", lambda self, step, like: _noted(out, self, original(self, step, like)))
        lab.run(fedsim.Experiment.from_dict(tree))
    return out


def _noted(out: list[Tensor], lane: Any, noise: Tensor) -> Tensor:
    out.append(noise.clone() * lane.expected / lane.std)
    return noise


def test_noise_stays_within_a_clients_rank(lab: Any) -> None:
    seen, original = [], Reducer.add

    def add(self: Any, into: Any, message: Any, *args: Any, **more: Any) -> None:
        seen.append(message["update"])
        original(self, into, message, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reducer, "add", add)
        lab.run(
            **keys(), adapter={"name": "lora", "r": 3, "alpha": 6, "ranks": [1, 1, 3, 1]}, algorithm={"name": "hetlora"}
        )
    widths = {
        int((u.abs().sum(dim=1) > 0).sum())
        for update in seen
        for n, t in update.items()
        if "lora_A" in n
        for u in t.float()
    }
    assert widths == {1, 3}


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("algorithm", fast(["fedavg", "ffa_lora", "rolora", "scaffold", "fedsvd"], "fedavg", "rolora"))
def test_lanes_workers_micro_batches_and_a_stop_change_nothing(lab: Any, distance: Any, algorithm: str) -> None:
    tree = {**keys(), "algorithm": {"name": algorithm}}
    whole = lab.run(**tree)
    lab.same_bits(lab.run(**tree, name="pool", executor=POOL), whole)
    stopped = lab.run(**{**tree, "name": "stopped", "rounds": 2})
    fedsim.run(lab.exp(**{**tree, "name": "stopped"}), progress=False, resume=stopped)
    lab.same_bits(stopped, whole)
    assert spent(lab, stopped) == spent(lab, whole) and len(spent(lab, whole)) == 3
    for name, more in {
        "one": {"training": {"lanes": 1}},
        "four": {"training": {"lanes": 4}},
        "cut": {"local": {**SGD, "micro_batch": 1}},
        "twice": {"training": {"lanes": 2, "checkpointing": True}},
    }.items():
        other = lab.run(**{**tree, **more, "name": name})
        assert distance(adapter_of(other / "global"), adapter_of(whole / "global")) < 1e-9, name


def test_dropout_is_of_the_client_and_not_of_the_lane(lab: Any, distance: Any) -> None:
    tree = {**keys(), "adapter": {"name": "lora", "r": 3, "alpha": 6, "dropout": 0.3}}
    runs = [lab.run(**{**tree, "name": f"lanes{n}", "training": {"lanes": n}}) for n in (1, 2, 4)]
    off = lab.run(**keys(), name="off")
    for other in runs[1:]:
        assert distance(adapter_of(other / "global"), adapter_of(runs[0] / "global")) < 1e-9
    assert distance(adapter_of(off / "global"), adapter_of(runs[0] / "global")) > 1e-3


def test_lost_work_costs_nothing(lab: Any) -> None:
    """The plan's steps are those of the rounds in which a client has trained; its ledger follows them."""
    tree = {**keys(), "rounds": 6, "cohort": {"size": "all"}, "simulation": {"drop": 0.4}}
    run, parts = lab.run(**tree), prepare(lab.exp(**tree))
    trained = Counter(r["client"] for r in lab.metrics(run) if r["name"] == "tokens" and r["scope"] == "federated")
    (*_, steps) = planned(parts)
    assert 0 < min(trained.values()) < 6
    assert {parts.partition.name(c): n for c, n in steps.items()} == {k: SGD["steps"] * n for k, n in trained.items()}
    for client, n in steps.items():
        q, name = parts.ledger.sampling(client), parts.partition.name(client)
        wanted = epsilon(sampling=q, noise_multiplier=parts.ledger.z, rounds=n, delta=parts.ledger.delta)
        assert spent(lab, run, client=name)[-1] == pytest.approx(wanted)


def test_batches_are_drawn_example_by_example(lab: Any) -> None:
    """Each example with probability batch_size / n at each step, and `fedsim.batches` tells which."""
    tree = {**keys(), "local": {**SGD, "steps": 500}}
    exp = lab.exp(**tree)
    parts = prepare(exp)
    for client in range(2):
        rows = parts.partition.rows(client)
        drawn = np.array([np.isin(rows, b) for b in fedsim.batches(exp, client, 1)])
        q = min(1.0, 4 / len(rows))
        assert len(drawn) == 500 and np.abs(drawn.mean(axis=0) - q).max() < 5 * math.sqrt(q * (1 - q) / 500)
        assert np.abs(np.corrcoef(drawn.T) - np.eye(len(rows))).max() < 5 / math.sqrt(500)
        assert len(set(drawn.sum(axis=1))) > 3


def test_each_client_has_a_ledger(lab: Any) -> None:
    tree = keys(noise_multiplier=0.8)
    run, parts = lab.run(**tree), prepare(lab.exp(**tree))
    done: dict[str, int] = {}
    for t in (1, 2, 3):
        trained = {
            r["client"] for r in lab.metrics(run) if r["round"] == t and r["split"] == "train" and r["name"] == "loss"
        }
        for name in trained:
            done[name] = done.get(name, 0) + 2
            n = int(parts.partition.sizes[parts.client(name)])
            how: dict[str, Any] = {"sampling": min(1.0, 4 / n), "noise_multiplier": 0.8, "delta": 1e-5}
            (row,) = [
                r for r in lab.metrics(run) if r["round"] == t and r["client"] == name and r["split"] == "privacy"
            ]
            assert row["value"] == epsilon(rounds=done[name], **how)
        each = parts.ledger.epsilons({parts.client(n): s for n, s in done.items()})
        (largest,) = [
            r["value"] for r in lab.metrics(run) if r["round"] == t and r["name"] == "epsilon" and r["client"] is None
        ]
        assert largest == max(each.values()) and len(each) == 4
    *_, last = planned(parts)
    assert last == {parts.client(n): s for n, s in done.items()}
    assert spent(lab, run, "epsilon_q10")[0] == 0.0, "a client that has done nothing has spent nothing"


def test_a_target_is_the_largest_epsilon_of_a_client(lab: Any) -> None:
    tree = {**keys(target_epsilon=4.0), "cohort": {"size": "all"}, "local": {**SGD, "steps": None, "epochs": 1}}
    run = lab.run(**tree)
    assert 3.98 < spent(lab, run)[-1] <= 4.0
    last = [spent(lab, run, client=f"site-{c}")[-1] for c in (1, 2, 3, 4)]
    assert max(last) == spent(lab, run)[-1] > min(last)
    with pytest.raises(UserError, match="privacy.target_epsilon: the run was begun with a noise multiplier of"):
        fedsim.run(lab.exp(**{**tree, "rounds": 4}), progress=False, resume=run)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"adapter": {"name": "none"}}, "adapter.name: none trains the whole model"),
        (
            {"adapter": {"name": "LOHA", "r": 2}},
            "privacy.name: local_sgd needs the gradient of each example, .* has no stacked form",
        ),
        (
            {"adapter": {"name": "lora", "peft": {"use_dora": True}}},
            "privacy.name: local_sgd needs the gradient of each example",
        ),
        ({"model": {"base_dropout": True}}, "local_sgd needs .* model.base_dropout draws for all rows"),
        ({"algorithm": {"name": "ditto"}}, "algorithm.name: ditto takes several gradients in a step"),
        ({"algorithm": {"name": "perfedavg"}}, "algorithm.name: perfedavg takes several gradients in a step"),
        ({"algorithm": {"name": "qfedavg"}}, "algorithm.name: qfedavg sends what it makes of a client's loss"),
        (
            {"aggregator": {"name": "fltrust", "root_examples": 6}},
            "aggregator.name: fltrust trains on examples of the clients without noise",
        ),
        ({"privacy": {"target_epsilon": 1.0}}, "privacy.noise_multiplier: 1.0 and target_epsilon exclude each other"),
        ({"privacy": {"clip": 0.0}}, "privacy.clip"),
        ({"privacy": {"max_weight": 1.0}}, "unknown key privacy.max_weight"),
    ],
)
def test_what_breaks_the_guarantee_is_refused_in_one_line(lab: Any, more: dict[str, Any], said: str) -> None:
    tree = keys(noise_multiplier=1.0)
    section = {**tree["privacy"], **more.pop("privacy", {})}
    with pytest.raises(UserError, match=said) as caught:
        lab.run(**{**tree, **more, "privacy": section})
    assert "\n" not in str(caught.value)


def test_the_other_modes_train_as_without_privacy(lab: Any) -> None:
    tree = {**keys(), "modes": ["local", "central"]}
    lab.same_bits(lab.run(**tree), lab.run(**{**tree, "privacy": {"name": "none"}, "name": "plain"}))


def test_the_command_prints_the_plan(lab: Any, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    exp = lab.exp(**keys(noise_multiplier=1.0))
    file = tmp_path / "dp.yaml"
    file.write_text(exp.to_yaml())
    assert main(["privacy", str(file), "rounds=30", "cohort.size=all"]) == 0
    out = capsys.readouterr().out
    sizes = prepare(exp).partition.sizes
    worst = max(epsilon(sampling=min(1.0, 4 / int(n)), noise_multiplier=1.0, rounds=60, delta=1e-5) for n in sizes)
    assert (
        f"epsilon at most {worst:.3g} after 30 rounds at delta 1e-05 (rdp, add_remove)" in out and f"{worst:.4f}" in out
    )
