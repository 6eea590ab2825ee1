"""NVFlare's privacy filters as stages of the channel: what they send, and that no epsilon is named for them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from test_algorithms import POOL, SMALL
from test_equivalence import adapter_of
from torch import Tensor

import fedsim
from fedsim.aggregators.reducer import Reducer
from fedsim.channel import Filters, Senders
from fedsim.channel.filters import Percentile, SparseVector
from fedsim.cli.main import main
from fedsim.core.errors import UserError

SPARSE: dict[str, Any] = {
    "fraction": 0.3,
    "epsilon": 0.5,
    "noise_var": 5.0,
    "gamma": 1e-3,
    "tau": 1e-6,
    "replace": False,
}


def update(scale: float = 1.0) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    shapes = {"b": (2, 6, 5), "a": (2, 40), "one": (2,)}
    return {n: scale * torch.from_numpy(rng.normal(size=s)) for n, s in shapes.items()}


def sent(
    filters: Filters, values: dict[str, Tensor], steps: tuple[int, int] = (4, 1), round: int = 1
) -> dict[str, Tensor]:
    streams = tuple((name, round) for name in ("x", "y"))
    message, state = filters.up({"update": values, "control": values}, Senders(None, None, steps, streams), {})
    assert message["control"] is values and state == {}
    return message["update"]


def test_percentile_is_numpys_client_by_client() -> None:
    values, steps = update(), (4, 1)
    found = sent(Filters(None, Percentile(35.0, 0.4), None, 0), values, steps)
    for k, n in enumerate(steps):
        each = {name: v[k].numpy() / n for name, v in values.items()}
        cutoff = np.percentile(np.abs(np.concatenate([np.ravel(v) for v in each.values()])), 35.0)
        for name, v in each.items():
            expected = v if v.ndim == 0 else np.clip(np.where(np.abs(v) < cutoff, 0.0, v), -0.4, 0.4)
            assert np.allclose(found[name][k].numpy(), expected * n, rtol=1e-12), name
            assert v.ndim == 0 or (0 < (expected == 0).sum() < v.size and (np.abs(expected) == 0.4).any())


def test_what_is_excluded_is_not_sent_nor_counted_to_the_percentile() -> None:
    values = update()
    for exclude in (("a",), "^a$"):
        found = sent(Filters(exclude, Percentile(50.0, 1e9), None, 0), values)
        assert not found["a"].any() and found["b"].any()
        alone = sent(Filters(None, Percentile(50.0, 1e9), None, 0), {n: v for n, v in values.items() if n != "a"})
        assert torch.equal(found["b"], alone["b"])


def test_sparse_vector_sends_a_noisy_fraction() -> None:
    """Values in units of gamma x steps; the same draws for the same client and round, others for others."""
    vector, values = SparseVector(**SPARSE), update(0.1)
    filters = Filters(None, None, vector, 7)
    found = sent(filters, values)
    flat = torch.cat([found[n].reshape(2, -1) for n in ("a", "b")], dim=1)
    count = int(np.ceil(71 * 0.3))
    for k, steps in enumerate((4, 1)):
        chosen = flat[k][flat[k] != 0]
        assert len(chosen) in (count - 1, count) and float(chosen.abs().max()) <= 1e-3 * steps * (1 + 1e-12)
    again = sent(filters, values)
    assert all(torch.equal(found[n], again[n]) for n in found)
    assert not torch.equal(sent(filters, values, round=2)["a"], found["a"])
    assert torch.equal(found["one"], values["one"]), "single numbers are not filtered"
    # Noise is Laplace with scale 2 gamma / noise_var: without a bound that cuts it off, its mean magnitude is that.
    wide = SparseVector(**{**SPARSE, "fraction": 1.0, "noise_var": 1e6})
    drawn = wide.apply(np.full(20000, 5e-4), np.random.default_rng(1)) - 5e-4
    assert np.abs(drawn).mean() == pytest.approx(2e-3 / 1e6, rel=0.05) and abs(np.median(drawn)) < 1e-10
    # The largest are chosen more often where the comparisons have little noise.
    sharp = SparseVector(**{**SPARSE, "epsilon": 1e6, "fraction": 0.1, "tau": 5e-4})
    large = np.array([1e-3] * 10 + [0.0] * 90)
    assert (sharp.apply(large, np.random.default_rng(2))[:10] != 0).all()
    with_repeats = SparseVector(**{**SPARSE, "replace": True}).apply(np.ones(1000), np.random.default_rng(3))
    assert 200 < (with_repeats != 0).sum() < 300
    assert np.isnan(vector.apply(np.array([np.nan, 1.0]), np.random.default_rng(0))[0]), "faults see it"


def keys(**section: Any) -> dict[str, Any]:
    return {**SMALL, "modes": ["federated"], "privacy": {"name": "filters", **section}}


def test_a_run_with_filters_says_that_there_is_no_epsilon(lab: Any, capsys: pytest.CaptureFixture) -> None:
    tree = keys(exclude="lora_A", percentile={"percentile": 60, "gamma": 0.001}, sparse_vector=SPARSE)
    arrived: list[dict[str, Tensor]] = []
    original = Reducer.add

    def add(self: Any, into: Any, message: Any, *args: Any, **more: Any) -> None:
        arrived.append({n: t.clone() for n, t in message["update"].items()})
        original(self, into, message, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reducer, "add", add)
        run = fedsim.run(lab.exp(**tree), progress=True).path
    out = capsys.readouterr()
    assert "guarantee nothing: there is no epsilon" in out.out + out.err
    told = json.loads((run / "privacy.json").read_text())
    assert told["epsilon"] is None and told["level"] == "none" and told["percentile"]["percentile"] == 60
    assert not [r for r in lab.metrics(run) if r["name"].startswith("epsilon")]
    assert all(not t.any() for m in arrived for n, t in m.items() if "lora_A" in n)
    rows = [row for m in arrived for row in torch.cat([t.flatten(1) for n, t in m.items() if "lora_B" in n], dim=1)]
    assert rows and all(0 < (row != 0).double().mean() < 0.31 for row in rows)
    start, end = adapter_of(run / "init"), adapter_of(run / "global")
    assert all(torch.equal(start[n], end[n]) == ("lora_A" in n) for n in start), "what is not sent never changes"
    up = {r["value"] for r in lab.metrics(run) if r["name"] == "bytes_up"}
    assert up == {sum(t.numel() * t.element_size() for n, t in start.items() if "lora_B" in n)}
    lab.same_bits(lab.run(**tree, name="pool", executor=POOL), run)
    file = lab.root / "filters.yaml"
    file.write_text(lab.exp(**tree).to_yaml())
    assert main(["privacy", str(file)]) == 2
    assert "privacy.name: filters guarantees nothing here" in capsys.readouterr().err


def test_filters_come_before_error_feedback_and_codec(lab: Any) -> None:
    """What the percentile leaves out is not what a codec has lost: without a codec the residual is nothing."""
    tree = keys(percentile={"percentile": 50, "gamma": 1.0})
    plain, fed = (
        lab.run(**tree),
        lab.run(**tree, name="fed", messages={"up": "fp32", "error_feedback": True}, model={"dtype": "float64"}),
    )
    one, other = adapter_of(plain / "global"), adapter_of(fed / "global")
    assert max(float((one[n] - other[n]).norm() / one[n].norm().clamp_min(1e-9)) for n in one) < 1e-5


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, "privacy.exclude: None is the first of three filters, of which none is given"),
        ({"exclude": "("}, r"privacy.exclude: '\(' is no regular expression"),
        ({"exclude": "nobody"}, "privacy.exclude: 'nobody' is no trained parameter; these are"),
        ({"exclude": ["nobody"]}, "privacy.exclude: 'nobody' is no trained parameter"),
        ({"percentile": {"percentile": 101}}, "privacy.percentile.percentile: must be <= 100"),
        ({"sparse_vector": {"epsilon": 0.0}}, "privacy.sparse_vector.epsilon: must be > 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(lab: Any, section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        lab.run(**keys(**section))
    assert "\n" not in str(caught.value)
