"""An audit of `privacy: {name: central}`: whether a canary client takes part must not be easier to tell than epsilon allows.

M. Jagielski, J. Ullman, A. Oprea. Auditing Differentially Private Machine Learning. NeurIPS 2020: a test for the canary with true and
false positive rates t and f shows, at a given delta, an epsilon of at least max(log((t - delta) / f), log((1 - f - delta) / (1 - t))).
The canary sends as much as it can in one direction, all other clients nothing; each round is a trial with a cohort and noise of its own.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from test_algorithms import SMALL

from fedsim.privacy import epsilon
from fedsim.privacy.central import CentralPrivacy
from fedsim.runs.build import prepare

pytest.importorskip("dp_accounting")
CANARY = '''
import json
from dataclasses import dataclass

import torch

from fedsim.algorithms import Algorithm, per_lane


@dataclass(frozen=True)
class Canary(Algorithm):
    """The client with the most steps sends a long update along the last parameter, if it is there; the server notes what it sees."""

    log: str = ""
    steps: int = 1
    there: bool = True

    def finish(self, params, scratch, c):
        last = next(reversed(params))
        mine = (c.steps >= self.steps) * (1e3 if self.there else 0.0)
        return {"update": {n: per_lane(mine, p) * torch.ones_like(p) * (n == last) for n, p in params.items()}}, {}

    def step(self, server, reduced, info):
        *_, last = reduced["update"].values()
        with open(self.log, "a") as file:
            file.write(json.dumps(float(last.sum()) / last.numel() ** 0.5 * info.weight) + "\\n")
        return server
'''
ROUNDS, SEEDS, CLIP, DELTA, RISK = 100, 3, 0.05, 0.1, 1e-3


def seen(lab: Any, name: str, there: bool, seeds: range) -> tuple[np.ndarray, float]:
    """What the server sees along the canary's direction in each round, in units of the clip; and the epsilon that the run claims for a round."""
    file = lab.root / "canary.py"
    file.write_text(CANARY)
    out, spent = [], math.nan
    for seed in seeds:
        log = lab.root / f"{name}-{seed}.jsonl"
        tree = {
            **SMALL,
            "name": name,
            "seed": seed,
            "rounds": ROUNDS,
            "modes": ["federated"],
            "local": {"steps": None, "epochs": 1, "batch_size": 8, "keep_state": False},
            "cohort": {"size": 3, "sampler": "poisson"},
            "faults": {"policy": "skip"},
            "evaluate": {"every_rounds": ROUNDS, "clients": False},
            "checkpoint": {"every": ROUNDS},
            "training": {"lanes": 4},
            "privacy": {"name": "central", "clip": CLIP, "noise_multiplier": 1.0, "delta": DELTA},
        }
        sizes = prepare(lab.exp(**tree)).partition.sizes
        most = -(-int(sizes.max()) // 8)
        assert (-(-sizes // 8) == most).sum() == 1, "one client has the most steps"
        run = lab.run(**tree, algorithm={"name": f"{file}:Canary", "log": str(log), "steps": most, "there": there})
        out += [json.loads(line) for line in log.read_text().splitlines()]
        (spent,) = [r["value"] for r in lab.metrics(run) if r["name"] == "epsilon" and r["round"] == 1]
    return np.array(out) / CLIP, spent


def shown(there: np.ndarray, absent: np.ndarray) -> float:
    """An epsilon that the canary has at least, but for a probability of `RISK`; the threshold is chosen on half of the trials."""

    def bound(t: float, f: float) -> float:
        found = [(t - DELTA, f), (1 - f - DELTA, 1 - t)]
        return max(math.log(a / b) if min(a, b) > 0 else -math.inf for a, b in found)

    (a, b), (c, d) = ((x[0::2], x[1::2]) for x in (there, absent))
    best = max(np.concatenate([a, c]), key=lambda at: bound(*((x >= at).mean().clip(0.02, 0.98) for x in (a, c))))
    low, high = (
        scipy.stats.binomtest(int((x >= best).sum()), len(x)).proportion_ci(1 - RISK, method="exact") for x in (b, d)
    )
    return max(bound(low.low, high.high), bound(low.low, high.high))


def test_a_canary_is_no_easier_to_tell_than_epsilon_allows(lab: Any) -> None:
    (there, claimed), (absent, _) = (seen(lab, f"canary-{x}", x, range(SEEDS)) for x in (True, False))
    spent = epsilon(sampling=0.75, noise_multiplier=1.0, rounds=1, delta=DELTA, accountant="pld")
    assert spent <= claimed, "the tightest accountant is the harder bound"
    assert len(there) == len(absent) == SEEDS * ROUNDS
    # The noise of a seed and round is the same with and without the canary, which moves the sum by the clip, or was not drawn.
    gap = there - absent
    assert (np.isclose(gap, 0, atol=1e-6) | np.isclose(gap, 1, atol=1e-6)).all() and 0.65 < gap.mean() < 0.85
    assert scipy.stats.kstest(absent, "norm").pvalue > 1e-3
    assert shown(there, absent) <= spent


def test_the_audit_notices_less_noise(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CentralPrivacy.noise
    monkeypatch.setattr(CentralPrivacy, "noise", lambda self, *args: 0.2 * original(self, *args))
    (there, claimed), (absent, _) = (seen(lab, f"quiet-{x}", x, range(SEEDS - 1)) for x in (True, False))
    assert shown(there, absent) > claimed
