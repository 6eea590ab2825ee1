"""LoRA methods that aggregate exactly: the server's product against the mean of the clients' products, and whole runs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from test_algorithms import SMALL
from test_equivalence import Texts, adapter_of
from test_hooks import Loop, Named

from fedsim.algorithms import ALGORITHMS, Info, Server
from fedsim.algorithms.lowrank import pairs
from fedsim.core.seeding import stream
from fedsim.models.fold import factors

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("fedex_lora", {}),
    ("flora", {}),
    ("flexlora", {"energy": 1.0}),
    ("flexlora", {"split": "sqrt"}),
]


@pytest.mark.parametrize(("name", "keys"), KINDS)
@pytest.mark.parametrize(("m", "n", "ranked"), [(20, 20, False), (4, 3, False), (24, 16, True)])
def test_server_product_is_the_mean_of_products(name, keys, m, n, ranked):
    torch.manual_seed(3)
    r, p = 4 if m > 4 else 2, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    names = ("q.lora_A.default.weight", "q.lora_B.default.weight", "score.weight")
    shapes = ((r, n), (m, r), (3, n))
    params = {k: torch.randn(s, dtype=torch.float64) for k, s in zip(names, shapes, strict=True)}
    method = ALGORITHMS[name](**keys)
    if name == "flora" or keys.get("energy"):
        params[names[1]].zero_()
    local = {k: torch.randn(3, *s, dtype=torch.float64) for k, s in zip(names, shapes, strict=True)}
    if ranked and name != "fedex_lora":
        for k, rank in enumerate((1, 4, 2)):
            local[names[0]][k, rank:], local[names[1]][k, :, rank:] = 0, 0
    update = {k: local[k] - params[k] for k in names}
    if name == "flexlora":
        update[names[1]] = local[names[1]]
    after = method.step(Server(params, {}), {"update": update}, Info(1, 3, 1.0, 3, 1.0, p, 7))
    (a, b), fold = next(iter(pairs(params).values())), (after.fold or {}).get("q")
    found = after.params[b] @ after.params[a] + (fold[0] @ fold[1] if fold else 0)
    wanted = sum(p[k] * local[names[1]][k] @ local[names[0]][k] for k in range(3))
    if fold is None:  # the best approximation: its residual has the tail of the singular values
        tail = torch.linalg.svdvals(wanted)[r:].square().sum().sqrt()
        assert abs(torch.linalg.norm(wanted - found) - tail) < 1e-12
    else:
        assert (found - wanted).abs().max() < 1e-12
    assert torch.allclose(after.params[names[2]], (p[:, None, None] * local[names[2]]).sum(0), atol=1e-13)


def test_factors_of_a_fold():
    delta = torch.randn(7, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    b, a = factors(delta)
    assert b.shape == (7, 2) and (b @ a - delta).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["fedex_lora", "flora", "flexlora"])
def test_workers_agree_and_the_fold_is_exported(lab, name):
    keys: dict[str, Any] = {
        "rounds": 2,
        "algorithm": {"name": name},
        "partition": {"name": "quantity", "num_clients": 3, "exponent": 0.7, "min_rows": 6},
        "training": {"lanes": 1},
    }
    whole = lab.run(**keys, name="serial")
    pool = {"name": "pool", "devices": ["cpu", "cpu"], "threads": 1}
    lab.same_bits(lab.run(**keys, name="pool", executor=pool), whole)
    rank = [json.loads((whole / f / "adapter_config.json").read_text())["r"] for f in ("init", "global")]
    assert (rank[1] > rank[0]) == (name != "flexlora")


def test_energy_is_checked():
    with pytest.raises(ValueError, match="energy"):
        ALGORITHMS["flexlora"](energy=1.5)


def test_the_aggregation_error_is_logged_by_layer_and_in_all(lab: Any) -> None:
    """Of FedAvg: |sum_k p_k B_k A_k - B A| / |sum_k p_k B_k A_k|, from clients trained alone; of exact methods nothing."""
    keys: dict[str, Any] = {
        "rounds": 1,
        "modes": ["federated"],
        "partition": {"name": "quantity", "num_clients": 3, "exponent": 0.7, "min_rows": 6},
        "local": {"steps": 3, "lr": 5e-2, "keep_state": False},
    }
    run = lab.run(**keys)
    rows = {r["name"]: r["value"] for r in lab.metrics(run) if r["split"] == "aggregation"}
    sizes = np.diff(np.load(run / "partition.npz")["offsets"]).astype(float)
    p, alone = sizes / sizes.sum(), []
    for k in range(3):
        trace = {f"site-{j + 1}": [int(j == k)] for j in range(3)}
        alone.append(adapter_of(lab.run(**keys, name=f"one-{k}", simulation={"availability": trace}) / "global"))
    end, above, below, layers = adapter_of(run / "global"), 0.0, 0.0, 0
    for a in (n for n in end if "lora_A" in n):
        b = a.replace("lora_A", "lora_B")
        mean = sum(w * one[b] @ one[a] for w, one in zip(p, alone, strict=True))
        gap, norm = float((mean - end[b] @ end[a]).norm()), float(mean.norm())
        (found,) = [v for n, v in rows.items() if ":" in n and n.partition(":")[2] in a]
        assert found == pytest.approx(gap / norm, rel=1e-6) and found > 0
        above, below, layers = above + gap**2, below + norm**2, layers + 1
    assert rows["lora_aggregation_error"] == pytest.approx((above / below) ** 0.5, rel=1e-6) and len(rows) == 1 + layers
    methods: list[dict[str, Any]] = [{"name": n} for n in ("ffa_lora", "fedex_lora", "flora", "rolora", "fedsvd")]
    for i, method in enumerate([*methods, {"name": "flora", "reinit": False}]):
        name = f"exact-{i}"
        exact = lab.run(**{**keys, "rounds": 3}, name=name, algorithm=method)
        found = [r["value"] for r in lab.metrics(exact) if r["name"] == "lora_aggregation_error"]
        assert len(found) == 3 and max(found) < 1e-10, name
    pool = {"name": "pool", "devices": ["cpu", "cpu"], "threads": 1}
    lab.same_bits(lab.run(**keys, name="pool", executor=pool), run)
    other = lab.run(**keys, name="personal", algorithm={"name": "fedsa_lora"})
    assert not [r for r in lab.metrics(other) if r["split"] == "aggregation"]


def cut(name: str, value: torch.Tensor, rank: int) -> torch.Tensor:
    """1 where a client of this rank has an element."""
    out = torch.zeros_like(value)
    out[(slice(rank),) if "lora_A" in name else (slice(None), slice(rank))] = 1.0
    return out


class Folding(Loop):
    """A plain loop whose base carries what was folded: W0 + s F."""

    def __init__(self, lab: Any, exp: Any, run: Any) -> None:
        super().__init__(lab, exp, run)
        self.layers = {a.partition(".lora_A.")[0]: (a, a.replace("lora_A", "lora_B")) for a in self.x if "lora_A" in a}
        self.base = {m: self.model.get_submodule(m).get_base_layer().weight for m in self.layers}
        self.first = {m: w.detach().clone() for m, w in self.base.items()}
        self.scale = exp.adapter.alpha / exp.adapter.r
        self.folded = {m: torch.zeros(len(self.x[b]), self.x[a].shape[1]).double() for m, (a, b) in self.layers.items()}

    def fold(self, less: Named | None = None) -> None:
        for m, weight in self.base.items():
            turned = self.model.get_submodule(m).fan_in_fan_out
            folded = self.folded[m] - (less or {}).get(m, 0)
            weight.data.copy_(self.first[m] + self.scale * (folded.T if turned else folded))

    def product(self) -> dict[str, torch.Tensor]:
        return {m: self.scale * (self.folded[m] + self.x[b] @ self.x[a]) for m, (a, b) in self.layers.items()}


CASES = [
    pytest.param(name, kind, ranks, marks=pytest.mark.thorough if thorough else [])
    for name in ("fedex_lora", "flora", "flora kept", "flexlora")
    for kind, ranks, thorough in (("llama", None, False), ("llama", [1, 3, 2, 3], False), ("gpt2", [1, 3, 2, 3], True))
    if not (ranks and name == "fedex_lora")  # its factors are averaged, so they have one rank
] + [pytest.param("fedex_lora", "gpt2", None), pytest.param("flora kept", "gpt2", None)]


@pytest.mark.parametrize(("case", "kind", "ranks"), CASES)
def test_a_run_is_its_papers_loop(lab: Any, case: str, kind: str, ranks: list[int] | None) -> None:
    """Client k trains with alpha / r_k; the server makes new factors of the exact product, or folds it into the base.

    Where clients keep their factors, each trains on a base without its own, and the fold grows by what its product has gained.
    """
    name, keeps = case.split()[0], case == "flora kept"
    local = {
        "steps": 3,
        "batch_size": 4,
        "lr": 2e-2,
        "weight_decay": 0.1,
        "clip": 0.5,
        "keep_state": name == "fedex_lora",
    }
    adapter = {"name": "lora", "r": 3, "alpha": 6, **({"ranks": ranks} if ranks else {})}
    method = {"name": name, **({"reinit": False} if keeps else {})}
    model = {} if kind == "llama" else {"model": {"path": lab.base(kind)}}
    exp = lab.exp(**{**SMALL, "algorithm": method, "local": local, "adapter": adapter, **model})
    run = lab.run(exp)
    loop = Folding(lab, exp, run)
    kept: dict[str, Named] = {}
    held = Texts(exp.model.path, lab.rows["validation"], exp.data.labels, False)
    scored = {
        (r["round"], r["client"]): r["value"]
        for r in lab.metrics(run)
        if (r["split"], r["name"]) == ("validation", "loss")
    }
    for t, cohort in enumerate(loop.cohorts, 1):
        loop.fold()
        found, gained = {}, {}
        for k in cohort:
            rank = ranks[int(k.removeprefix("site-")) - 1] if ranks else 3
            has = {n: cut(n, x, rank) for n, x in loop.x.items()}
            own = {n: 3 / rank if "lora_B" in n else 1.0 for n in has}  # s_k / s stands on B

            def scaled(y: Named, numbers: Any, has: Named = has, own: dict[str, float] = own) -> Named:
                g = loop.grads({n: v * own[n] for n, v in y.items()}, numbers)
                return {n: v * own[n] * has[n] for n, v in g.items()}

            start = {n: x * has[n] / (own[n] if name == "flexlora" else 1.0) for n, x in loop.x.items()}
            start = kept.get(k, start)
            loop.fold({m: own[b] * start[b] @ start[a] for m, (a, b) in loop.layers.items()} if keeps else {})
            who = k if keeps or name == "fedex_lora" else (k, t)
            y = loop.fit(who, start, loop.batches(k, t), gradient=scaled, keep=keeps)
            found[k] = {n: v * own[n] for n, v in y.items()}
            gained[k] = {m: found[k][b] @ y[a] - own[b] * start[b] @ start[a] for m, (a, b) in loop.layers.items()}
            loop.put(found[k])  # a client's own scores are of the model that it trains, with its scale
            with torch.no_grad():
                own_loss = held.loss(loop.model, range(len(held.rows)))
            assert scored[t, k] == pytest.approx(float(own_loss), abs=1e-9)
            if keeps:
                kept[k] = dict(y)
        total = sum(loop.sizes[k] for k in cohort)
        before = dict(loop.x)
        for m, (a, b) in loop.layers.items():
            exact = sum(loop.sizes[k] / total * y[b] @ y[a] for k, y in found.items())
            mean = {n: sum(loop.sizes[k] / total * y[n] for k, y in found.items()) for n in (a, b)}
            if name == "fedex_lora":
                loop.x |= mean
                loop.folded[m] += exact - mean[b] @ mean[a]
            elif keeps:
                loop.folded[m] += sum(loop.sizes[k] / total * gained[k][m] for k in cohort)
            elif name == "flora":
                loop.folded[m] += exact
                bound = before[a].shape[1] ** -0.5
                drawn = stream(exp.seed, "lora_A", t, a).uniform(-bound, bound, tuple(before[a].shape))
                loop.x |= {a: torch.from_numpy(drawn), b: torch.zeros_like(before[b])}
            else:
                u, s, v = torch.linalg.svd(exact, full_matrices=False)
                loop.x |= {a: v[:3], b: u[:, :3] * s[:3]}
    end, config = adapter_of(run / "global"), json.loads((run / "global" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    for m, wanted in loop.product().items():
        (a,) = [n for n in end if "lora_A" in n and n.startswith(m)]
        got = scale * end[a.replace("lora_A", "lora_B")] @ end[a]
        assert float((got - wanted).norm() / wanted.norm()) < 1e-8, m
