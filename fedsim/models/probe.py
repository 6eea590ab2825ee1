"""Whether a base and a method can be packed: from their config, and by a trial on a few random examples.

An architecture that mixes tokens outside the attention interface or counts positions in a way of its own, and a method
that does not call the layers it trains, fail the trial, before a run would be wrong without a sign of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.models.forward import Net
from fedsim.models.stacked import StackedNet, StreamNet
from fedsim.models.unsuitable import Unsuitable

_FAILS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


def probe(net: StackedNet) -> None:
    """Compare logits and gradients of a few random examples end to end with the model's own in padded batches.

    A `StackedNet` is compared at two lanes of unlike weights, a `StreamNet` at the weights it has.

    Raises:
        Unsuitable: if they differ by more than rounding.
    """
    rng = np.random.default_rng(0)
    vocabulary, pad = int(net.base.get_input_embeddings().weight.shape[0]), net.base.config.pad_token_id or 0
    examples = [rng.integers(0, vocabulary, n) for n in (7, 3, 12, 7, 5)]
    given = (examples, None if net.task != "causal_lm" else np.array([3, 1, 8, 6, 2]), pad)
    before = {name: p.data for name, p in net.params.items()}
    lanes: Sequence[Tensor | None] = [None]
    try:
        if not isinstance(net, StreamNet):
            start = net.layout.fill(net.layout.empty(net.device), before)
            lanes = start + 0.02 * torch.from_numpy(rng.normal(size=(2, len(start)))).to(start)
            net.begin([1, 2])
            net.train(True)
            net.bind(lanes, torch.zeros_like(lanes))
            with torch.no_grad():
                net.logits(*given)  # its dropout layers must see what belongs to lanes
        net.train(False)
        found, _, _ = net.logits(*given)
        ask = torch.from_numpy(rng.normal(size=tuple(found.shape[1:]))).to(found)
        grads = _gradients((found * ask).sum(), net.leaves.values())
        for k, lane in enumerate(lanes):
            if lane is not None:
                Net.bind(net, lane[None].clone(), None)
                own = [g[k] for g in grads]
            else:
                own = grads
            expected = Net.logits(net, *given)[0][0]
            _compare(net, found[k], expected, own, _gradients((expected * ask).sum(), net.params.values()))
    except _FAILS as error:
        raise Unsuitable(f"examples laid end to end fail in it ({' '.join(str(error).split())[:160]})") from None
    finally:
        for name, parameter in net.params.items():
            parameter.data = before[name]


def _compare(
    net: StackedNet, found: Tensor, expected: Tensor, found_grads: list[Tensor], expected_grads: list[Tensor]
) -> None:
    in_logits, in_gradients = {torch.float64: (1e-8, 1e-6), torch.float32: (1e-3, 2e-2)}.get(net.base.dtype, (0.1, 0.5))
    apart = _apart([found], [expected])
    if not apart <= in_logits:
        why = "examples laid end to end give other results in it than examples alone"
        raise Unsuitable(f"{why} (relative difference {apart:.1e})")
    apart = _apart(found_grads, expected_grads)
    if not apart <= in_gradients:
        raise Unsuitable(f"its gradients in lanes differ from those alone (relative difference {apart:.1e})")


def _gradients(value: Tensor, of: Iterable[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, list(of), allow_unused=True, materialize_grads=True)
    return [g.detach() for g in found]


def _apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference, relative to the norm of the expected tensors."""
    apart = sum(float((a - b).detach().double().square().sum()) for a, b in zip(found, expected, strict=True))
    norm = sum(float(b.detach().double().square().sum()) for b in expected)
    return float(np.sqrt(apart) / max(np.sqrt(norm), 1e-12))
