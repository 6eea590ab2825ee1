"""The channel: stages in order, in both directions, and what a clip bounds behind error feedback and a codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.channel import Channel, Senders, Sizes, Stage, downlink, uplink
from fedsim.channel.codecs import codec
from fedsim.core.seeding import stream
from fedsim.training.faults import norms


@dataclass
class Affine(Stage):
    """x -> factor x + shift, in every direction."""

    factor: float
    shift: float

    def up(self, message: Any, c: Senders, state: Any) -> Any:
        return {g: self.down(t) for g, t in message.items()}, state

    def down(self, params: Any) -> Any:
        return {n: self.factor * t + self.shift for n, t in params.items()}


def test_stages_follow_each_other() -> None:
    chain, x = Channel([Affine(2.0, 0.0), Stage(), Affine(1.0, 3.0)]), {"w": torch.tensor([[1.0], [-1.0]])}
    assert chain.up({"update": x}, Senders(), {})[0]["update"]["w"].tolist() == [[5.0], [1.0]]
    assert chain.down(x)["w"].tolist() == [[5.0], [1.0]]
    assert chain.nbytes([4], torch.float32) is None


@pytest.mark.parametrize("name", [None, "bf16", "nf4"])
def test_bytes_are_the_codecs_whatever_else_happens(name: str | None) -> None:
    expected = codec(name).nbytes([(3, 5), 7], torch.float32)
    for made in (uplink(name), uplink(name, name is not None, 1.0), downlink(name)):
        assert made.nbytes([(3, 5), 7], torch.float32) == expected
    assert isinstance(expected, Sizes)


def updates(seed: int, scales: list[float]) -> dict[str, Tensor]:
    rng = stream(seed, "updates")
    return {
        n: torch.from_numpy(np.array(scales).reshape(-1, 1, 1) * rng.normal(size=(len(scales), *s)))
        for n, s in {"a": (40, 30), "b": (7, 11)}.items()
    }


@pytest.mark.parametrize("name", ["nf4", "blockwise8", "bf16"])
def test_what_leaves_a_client_is_bounded_after_error_feedback(name: str) -> None:
    """p = clip(u + e), sent = D(Q(p)), e' = p - sent; |sent| is at most the bound, and is the bound where p was clipped."""
    most, coded, chain = 20.0, codec(name), uplink(name, True, 20.0)
    assert chain.keeps and not uplink(name, False, most).keeps
    lost = {n: torch.zeros_like(t) for n, t in updates(0, [0.0, 0.0]).items()}
    for step in range(4):
        message = {"update": updates(step, [0.1, 5.0])}
        raw, _ = chain.up(message, Senders(), {"update": lost})
        found = norms([raw["update"]], 2)
        sent, kept = chain.up(message, Senders(found), {"update": lost})
        for n, u in message["update"].items():
            wanted = (u + lost[n]) * torch.tensor([1.0, most / found[1]])[:, None, None]
            expected = coded.round_trip(wanted.reshape(2, -1)).view(u.shape)
            torch.testing.assert_close(sent["update"][n], expected, rtol=1e-6, atol=0)
            torch.testing.assert_close(kept["update"][n], wanted - expected, rtol=1e-5, atol=1e-5)
        small, large = norms([sent["update"]], 2)
        assert found[0] < most < found[1] and small < most
        assert large == pytest.approx(most, rel=1e-2 if name == "bf16" else 1e-5)
        lost = kept["update"]


def test_norms_do_not_depend_on_pieces() -> None:
    whole = updates(1, [1.0, 3.0, 0.5])
    pieces = [{"a": whole["a"]}, {"b": whole["b"]}]
    assert norms([whole], 3) == norms(pieces, 3)
    expected = [np.sqrt(sum(float(t[k].square().sum()) for t in whole.values())) for k in range(3)]
    np.testing.assert_allclose(norms([whole], 3), expected, rtol=1e-12)
