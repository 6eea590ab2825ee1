"""What methods share that aggregate LoRA's factors exactly: the clients' factors side by side, and small decompositions.

A layer's update is s B A, with B `[m, r]` and A `[r, n]`; the frozen weight may be stored turned (GPT-2's `Conv1D`), the factors
never are. The server works in units of its one scale s: it folds and splits D = sum_k p_k B_k A_k.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedsim.algorithms.base import Algorithm, ClientView, Factors, Info, Server, per_lane
from fedsim.core.seeding import stream

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.params import Message, Params


def pairs(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Adapted layer -> names of its A and B."""
    found = [n for n in names if ".lora_A." in n]
    return {n.partition(".lora_A.")[0]: (n, n.replace(".lora_A.", ".lora_B.")) for n in found}


def is_factor(name: str) -> bool:
    """Whether a parameter is one of LoRA's factors."""
    return ".lora_A." in name or ".lora_B." in name


@dataclass(frozen=True, kw_only=True)
class LowRank(Algorithm):
    """A method whose server sees the factors of every client. Heads are averaged as in FedAvg."""

    blockwise: ClassVar[bool] = False
    aggregates: ClassVar[Mapping[str, Any]] = {"update": "stack"}
    lora: ClassVar[bool] = True
    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})
    takes_late: ClassVar[bool] = False
    folds: ClassVar[bool] = True

    def init(self, params: Params) -> tuple[Params, Params]:
        """Nothing is folded."""
        if not self.folds:
            return {}, {}
        from fedsim.core.params import FOLD

        shapes = {m: (params[b].shape[0], params[a].shape[1]) for m, (a, b) in pairs(params).items()}
        like = next(iter(params.values()))
        return {FOLD + m: like.new_zeros(shape) for m, shape in shapes.items()}, {}

    def mean(self, server: Server, reduced: Message, info: Info) -> Params:
        """x + sum_k p_k (y_k - x), of all parameters."""
        p = shares(info, reduced)
        return {
            n: x + (per_lane(p, reduced["update"][n]) * reduced["update"][n]).sum(0) for n, x in server.params.items()
        }


def shares(info: Info, reduced: Message) -> Tensor:
    """p_k, in the order of the stack."""
    assert info.shares is not None, "a stack has shares"
    return info.shares.to(next(iter(reduced["update"].values())))


def stacked(bs: Tensor, as_: Tensor, p: Tensor) -> Factors:
    """B = hstack(p_k B_k) and A = vstack(A_k), of `[K, m, r]` and `[K, r, n]`: B A = sum_k p_k B_k A_k."""
    left = (per_lane(p, bs) * bs).movedim(0, 1).reshape(bs.shape[1], -1)
    return left, as_.reshape(-1, as_.shape[2])


def svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) of the product of factors `[m, R]` and `[R, n]`, by their QRs and the SVD of an R x R; dense where R is not smaller."""
    import torch

    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return torch.linalg.svd(left @ right, full_matrices=False)
    ql, rl = torch.linalg.qr(left)
    qr, rr = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(rl @ rr.T, full_matrices=False)
    return ql @ u, s, v @ qr.T


def fresh(params: Params, info: Info, *, like: Params) -> Params:
    """A new adapter: A uniform within 1 / sqrt(n), as PEFT starts it, from the round's stream; B zero. Other parameters stay."""
    import torch

    out = dict(params)
    for a, b in pairs(like).values():
        bound = like[a].shape[1] ** -0.5
        drawn = stream(info.seed, "lora_A", info.round, a).uniform(-bound, bound, tuple(like[a].shape))
        out[a], out[b] = torch.from_numpy(drawn).to(like[a]), torch.zeros_like(like[b])
    return out


def ratio(c: ClientView, b: Tensor) -> Tensor | None:
    """(alpha / r_k) / (alpha / r) of each client, shaped for its B `[K, m, r]`; None where all have the adapter's rank."""
    return None if c.rank is None else per_lane(b.shape[-1] / c.rank.to(b.dtype), b)


@dataclass(frozen=True, kw_only=True)
class RankScaled(LowRank):
    """A method whose clients train with their own scale alpha / r_k, which their messages carry in B."""

    takes_ranks: ClassVar[bool] = True

    def at(self, params: Params, scratch: Params, c: ClientView) -> Params:
        """The server's scale times B (s_k / s) is s_k B."""
        if c.rank is None:
            return params
        return {n: p * ratio(c, p) if ".lora_B." in n else p for n, p in params.items()}

    def adjust(self, grads: Params, params: Params, scratch: Params, c: ClientView) -> None:
        """The chain rule of `at`."""
        for name, grad in grads.items() if c.rank is not None else ():
            if ".lora_B." in name:
                grad.mul_(ratio(c, grad))

    def carried(self, params: Params, c: ClientView) -> Params:
        """B (s_k / s), other parameters as they are."""
        if c.rank is None:
            return params
        return {n: p * ratio(c, p) if ".lora_B." in n else p for n, p in params.items()}
