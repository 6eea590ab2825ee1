"""Personalized methods: against plain loops written from their papers, and who sees what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_algorithms import POOL, SMALL
from test_equivalence import adapter_of
from test_hooks import Loop, Named

import fedsim
from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.runs.build import prepare
from fedsim.runs.checks import sampler_of

WORK = {"steps": 3, "batch_size": 4, "lr": 5e-3, "weight_decay": 0.1, "clip": 0.5, "keep_state": False}


def run_and_loop(lab: Any, algorithm: dict[str, Any], **more: Any) -> tuple[Any, Loop]:
    exp = lab.exp(**{**SMALL, "algorithm": algorithm, "local": WORK, **more})
    run = lab.run(exp)
    return run, Loop(lab, exp, run)


def test_ditto_is_its_papers_loop(lab: Any, distance: Any) -> None:
    """Li et al., 2021: the own model's moments live on although clients start afresh; both see the same batches."""
    run, loop = run_and_loop(lab, {"name": "ditto", "lam": 0.3})
    own: dict[str, Named] = {}
    for t, cohort in enumerate(loop.cohorts, 1):
        found, x = {}, loop.x
        for k in cohort:
            batches = loop.batches(k, t)

            def near(y: Named, numbers: Any, x: Named = x) -> Named:
                return {n: g + 0.3 * (y[n] - x[n]) for n, g in loop.grads(y, numbers).items()}

            found[k] = loop.fit(("shared", k, t), x, batches)
            own[k] = loop.fit(("own", k), own.get(k, x), batches, gradient=near, keep=True)
        loop.average(found)
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9
    for k, model in own.items():
        assert distance(adapter_of(run / "clients" / k), loop.exported(model)) < 1e-9


def test_dittos_shared_part_is_fedavg_and_its_free_own_part_is_local_training(lab: Any) -> None:
    keys = {**SMALL, "cohort": {"size": "all"}, "local": WORK, "training": {"lanes": 1}}
    plain = lab.run(**keys, modes=["local", "federated"])
    found = lab.run(**keys, name="ditto", algorithm={"name": "ditto", "lam": 0.0}, modes=["federated"])
    for place, other in [("global", "global"), *((f"local/site-{k}", f"clients/site-{k}") for k in range(1, 5))]:
        one, same = adapter_of(plain / place), adapter_of(found / other)
        assert all(torch.equal(one[n], same[n]) for n in one), place


@pytest.mark.parametrize("method", ["fedper", "fedrep"])
def test_private_parts_stay_with_their_clients(lab: Any, distance: Any, method: str) -> None:
    """Arivazhagan et al., 2019; Collins et al., 2021: here every B of LoRA; FedRep trains it first, in steps of its own."""
    head = 4 if method == "fedrep" else 0
    run, loop = run_and_loop(lab, {"name": method, **({"head_steps": head} if head else {})})
    parts, sampler = prepare(loop.exp), sampler_of(loop.exp)
    heads: dict[str, Named] = {}
    first = dict(loop.x)
    for t, cohort in enumerate(loop.cohorts, 1):
        found = {}
        for k in cohort:
            own = lambda n: "lora_B" in n  # noqa: E731
            start = {n: heads.get(k, first)[n] if own(n) else x for n, x in loop.x.items()}
            rows = parts.partition.rows(int(k.removeprefix("site-")) - 1)
            more = sampler.batches(rows, stream(loop.exp.seed, "first batches", k, t), head) if head else []
            trains = lambda n, i: not head or (i < head) == ("lora_B" in n)  # noqa: E731
            found[k] = heads[k] = loop.fit((k, t), start, [*more, *loop.batches(k, t)], trains)
        loop.average(found, lambda n: "lora_B" not in n)
    assert (
        distance(
            adapter_of(run / "global"), loop.exported({n: first[n] if "lora_B" in n else x for n, x in loop.x.items()})
        )
        < 1e-9
    )
    for k, head_ in heads.items():
        model = {n: head_[n] if "lora_B" in n else x for n, x in loop.x.items()}
        assert distance(adapter_of(run / "clients" / k), loop.exported(model)) < 1e-9
    steps = {r["step"] for r in lab.metrics(run) if r["client"] == "site-1" and r["name"] == "tokens"}
    assert min(steps) == 3 + head


def test_private_patterns_are_checked(lab: Any) -> None:
    with pytest.raises(UserError, match=r"algorithm.private: \['nothing'\] matches none of the"):
        lab.run(**SMALL, algorithm={"name": "fedper", "private": ["nothing"]})
    with pytest.raises(UserError, match=r"algorithm.private: \['\*'\] matches each of the"):
        lab.run(**SMALL, algorithm={"name": "fedper", "private": ["*"]})
    run = lab.run(**SMALL, algorithm={"name": "fedper", "private": ["layers.1.*lora_A"]})
    start, end = adapter_of(run / "init"), adapter_of(run / "global")
    assert {n for n in start if torch.equal(start[n], end[n])} == {
        n for n in start if "layers.1." in n and "lora_A" in n
    }
    assert fedsim.load_runs(run)["value"].notna().any()


def test_per_fedavg_steps_by_a_second_batch(lab: Any, distance: Any) -> None:
    """Fallah et al., 2020, first order: w -= step of grad f(w - alpha grad f(w; D); D')."""
    run, loop = run_and_loop(lab, {"name": "perfedavg", "alpha": 0.05})
    parts, sampler = prepare(loop.exp), sampler_of(loop.exp)
    for t, cohort in enumerate(loop.cohorts, 1):
        found = {}
        for k in cohort:
            rows = parts.partition.rows(int(k.removeprefix("site-")) - 1)
            second = sampler.batches(rows, stream(loop.exp.seed, "batches", k, t, 1), loop.exp.local.steps)

            def ahead(y: Named, numbers: Any) -> Named:
                g = loop.grads(y, numbers[0])
                return loop.grads({n: v - 0.05 * g[n] for n, v in y.items()}, numbers[1])

            found[k] = loop.fit((k, t), loop.x, list(zip(loop.batches(k, t), second, strict=True)), gradient=ahead)
        loop.average(found)
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9


def test_per_fedavgs_clients_are_scored_one_step_away(lab: Any, distance: Any) -> None:
    """Fallah et al., 2020, the problem: F_k = f_k(w - alpha grad f_k(w)); here on a batch that no round has drawn."""
    run, loop = run_and_loop(lab, {"name": "perfedavg", "alpha": 5.0}, modes=["federated"])
    end = adapter_of(run / "global")
    loop.x = {n: end[n.replace(".default", "")] for n in loop.x}
    parts, sampler = prepare(loop.exp), sampler_of(loop.exp)
    rows = {(r["split"], r["name"], r["client"], r["round"]): r["value"] for r in lab.metrics(run)}
    for c, k in enumerate(loop.sizes):
        (batch,) = sampler.batches(parts.partition.rows(c), stream(loop.exp.seed, "batches", k, 3, "again -1"), 1)
        g = loop.grads(loop.x, batch)
        own = {n: v - 5.0 * g[n] for n, v in loop.x.items()}
        assert distance(adapter_of(run / "clients" / k), loop.exported(own)) < 1e-9
        assert rows["validation", "own_loss", k, 3] != rows["validation", "shared_loss", None, 3]
    assert rows["validation", "own_untrained", None, 3] == 0


def test_pfedme_is_its_papers_loop(lab: Any, distance: Any) -> None:
    """Dinh et al., 2020: inner steps on the same batch, then w by lam (w - theta); the server goes beta of the way."""
    run, loop = run_and_loop(lab, {"name": "pfedme", "lam": 3.0, "inner_steps": 3, "beta": 0.7})
    lr, own = loop.exp.local.lr, {}
    for t, cohort in enumerate(loop.cohorts, 1):
        found, before = {}, dict(loop.x)
        for k in cohort:

            def outer(w: Named, numbers: Any, k: str = k) -> Named:
                theta = {n: v.clone() for n, v in w.items()}
                for _ in range(3):
                    g = loop.grads(theta, numbers)
                    theta = {n: v - lr * (g[n] + 3.0 * (v - w[n])) for n, v in theta.items()}
                own[k] = theta
                return {n: 3.0 * (w[n] - theta[n]) for n in w}

            found[k] = loop.fit((k, t), loop.x, loop.batches(k, t), gradient=outer)
        loop.average(found)
        loop.x = {n: x + 0.7 * (loop.x[n] - x) for n, x in before.items()}
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9
    for k, theta in own.items():
        assert distance(adapter_of(run / "clients" / k), loop.exported(theta)) < 1e-9


def test_apfl_is_its_papers_loop(lab: Any, distance: Any) -> None:
    """Deng et al., 2020: v by the gradient at the mix, alpha by its own, w by FedAvg; all from before the step."""
    run, loop = run_and_loop(lab, {"name": "apfl", "alpha": 0.4})
    lr, vs, alphas, own = loop.exp.local.lr, {}, {}, {}
    for t, cohort in enumerate(loop.cohorts, 1):
        found = {}
        for k in cohort:
            v, alpha = {n: x.clone() for n, x in vs.get(k, loop.x).items()}, alphas.get(k, 0.4)

            def step(w: Named, numbers: Any) -> Named:
                nonlocal v, alpha
                g = loop.grads({n: alpha * v[n] + (1 - alpha) * w[n] for n in w}, numbers)
                slope = sum(float(((v[n] - w[n]) * g[n]).sum()) for n in w)
                v = {n: v[n] - lr * alpha * g[n] for n in w}
                alpha = min(1.0, max(0.0, alpha - lr * slope))
                return loop.grads(w, numbers)

            found[k] = loop.fit((k, t), loop.x, loop.batches(k, t), gradient=step)
            vs[k], alphas[k] = v, alpha
            own[k] = {n: alpha * v[n] + (1 - alpha) * found[k][n] for n in v}
        loop.average(found)
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9
    assert len(set(alphas.values())) > 1
    for k, model in own.items():
        assert distance(adapter_of(run / "clients" / k), loop.exported(model)) < 1e-9


@pytest.mark.parametrize("method", ["ditto", "fedper", "apfl"])
def test_clients_own_models_are_scored_after_each_round(lab: Any, distance: Any, method: str) -> None:
    """As cross-site evaluation scores them at the end; the curve and the best model go by their weighted mean."""
    keys = {
        **SMALL,
        "algorithm": {"name": method},
        "local": WORK,
        "modes": ["federated"],
        "evaluate": {"cross_site": True},
    }
    run, parts = lab.run(**keys), prepare(lab.exp(**keys))
    rows = lab.metrics(run)
    sizes = {parts.partition.name(c): float(n) for c, n in enumerate(parts.partition.sizes)}

    def last(split: str, name: str, client: str | None, round: int = 3) -> float | None:
        found = [
            r["value"]
            for r in rows
            if (r["split"], r["name"], r["client"], r["round"], r["scope"]) == (split, name, client, round, "federated")
        ]
        return found[-1] if found else None

    compared = 0
    for k in sizes:
        crossed = last(f"site:{k}", "loss", k)
        if crossed is not None:
            assert last("site", "own_loss", k) == pytest.approx(crossed, abs=1e-9)
            compared += 1
    assert compared >= 3
    for t in (1, 2, 3):
        each = {k: last("validation", "own_loss", k, t) for k in sizes}
        values = np.array([v for v in each.values() if v is not None])
        assert len(values) == len(sizes)
        mean = sum(sizes[k] * v for k, v in each.items() if v is not None) / sum(sizes.values())
        assert last("validation", "loss", None, t) == pytest.approx(mean)
        assert last("validation", "own_loss_mean", None, t) == pytest.approx(values.mean())
        assert last("validation", "own_loss_worst", None, t) == values.max()
        assert last("validation", "own_loss_q25", None, t) == pytest.approx(np.quantile(values, 0.25))
        assert last("validation", "shared_loss", None, t) is not None
    cohorts = [{r["client"] for r in rows if r["round"] == t and r["name"] == "tokens"} for t in (1, 2, 3)]
    assert last("validation", "own_untrained", None, 1) == len(sizes) - len(cohorts[0])
    (idle,) = sizes.keys() - cohorts[0]  # it has the initial part: the whole model, or (fedper) every B, which is 0
    assert last("validation", "own_loss", idle, 1) == pytest.approx(last("validation", "loss", None, 0), abs=1e-12)
    assert last("validation", "own_untrained", None, 3) == len(sizes) - len(set.union(*cohorts))
    best = max(
        (1, 2, 3), key=lambda t: (last("validation", "accuracy", None, t), -last("validation", "loss", None, t), t)
    )
    table = fedsim.summary(fedsim.load_runs(run), which="best")
    assert int(table.loc[table["model"] == "federated", "round"].iloc[0]) == best
    each = [v for k in sizes if (v := last("site", "own_loss", k)) is not None]
    last_row = fedsim.summary(fedsim.load_runs(run), "loss", "last").set_index("model").loc["federated"]
    assert last_row["site"] == pytest.approx(np.mean(each))
    table = fedsim.summary(fedsim.load_runs(run), "loss").set_index("model")
    of_best = {n: last("validation", n, None, best) for n in ("own_loss_mean", "own_loss_worst", "own_loss_q10")}
    rows_of = {n: table.loc[n[4:].replace("loss_", "own "), "validation"] for n in of_best}
    assert (
        rows_of == pytest.approx(of_best) and table.loc["own worst", "validation"] > table.loc["own q10", "validation"]
    )
    tested = {k: last("test", "own_loss", k, best) for k in sizes}
    mean = sum(sizes[k] * v for k, v in tested.items() if v is not None) / sum(sizes.values())
    assert table.loc["federated", "test"] == pytest.approx(mean) and None not in tested.values()
    assert last("test", "shared_loss", None, best) not in (None, pytest.approx(mean))
    assert all((run / "clients" / k / "best" / "adapter_model.safetensors").is_file() for k in set.union(*cohorts))
    card = (run / "global" / "README.md").read_text()
    assert (
        f"| validation | loss | {last('validation', 'shared_loss', None):.4f} |" in card
        and "initial value here" in card
    )
    own = (run / "clients" / "site-1" / "README.md").read_text()
    assert (
        f"| validation | loss | {last('validation', 'own_loss', 'site-1'):.4f} |" in own and "initial value" not in own
    )
    again = lab.run(**keys, name="pool", executor=POOL)
    lab.same_bits(again, run)
