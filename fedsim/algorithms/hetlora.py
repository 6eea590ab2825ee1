"""HetLoRA: Y. J. Cho, L. Liu, Z. Xu, A. Fahrezi, G. Joshi. Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
Models. EMNLP 2024 (arXiv:2401.06432), section 3. Clients have ranks r_k of their own: client k receives the first r_k slots of the
global A and B, trains them, and the server averages what comes back, padded with zeros, with weights proportional to |B_k A_k|.

RBLA: S. Chen, O. Tavallaie, N. Nazemi, A. Y. Zomaya. RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning Heterogeneous Models in FLaaS.
2024 (arXiv:2408.08699): slot i is the mean over the clients with r_k > i alone (mean: slot).

Deviations:
- |B_k A_k| is the Frobenius norm over all adapted layers together, without alpha / r. mean = norm and uniform do not use `weights`.
- Ranks are not pruned in training. alpha / r is that of the largest rank on every client.
- Parameters without a rank, such as a head, are averaged with the same weights.

Peers: there is no official code; public copies pad and average by examples (mean: zero_pad).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsim.algorithms.base import Algorithm, ClientView, Info, Server, per_lane
from fedsim.algorithms.factors import is_a, is_b, pairs

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.params import Message, Params

SHARE = "share"  # the message group of which slots a client has, times its weight


@dataclass(frozen=True, kw_only=True)
class HetLora(Algorithm):
    """LoRA with ranks by client, averaged slot by slot (Cho et al., 2024)."""

    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})
    takes_ranks: ClassVar[bool] = True
    blockwise: ClassVar[bool] = False
    aggregates: ClassVar[Mapping[str, Any]] = {"update": "mean", SHARE: "mean"}
    exact: ClassVar[frozenset[str]] = frozenset({SHARE})

    mean: Literal["zero_pad", "slot", "norm", "uniform"] = "norm"
    """Missing slots count as zeros (zero_pad) or not at all (slot); with weights by the norm of B A, zeros too (norm); uniform: zeros, equal weights."""

    @property
    def weighing(self) -> str:
        """The kind of weights of the messages' mean."""
        return self.weights if self.mean in ("zero_pad", "slot") else "uniform"

    def message(self, params: Params) -> Message:
        """What a client has of every factor, the update, and its share of each slot; the last element is for what has no rank."""
        some = next(p for n, p in params.items() if is_a(n))
        return {"update": params, SHARE: {SHARE: some.new_zeros(some.shape[0] + 1)}}

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """s_k (y_k - x_k) and s_k [i < r_k], where x_k is what the client received."""
        import torch

        some = next(p for n, p in params.items() if is_a(n))
        k, most = some.shape[0], some.shape[1]
        weight = some.new_ones(k)
        if self.mean == "norm":
            squares = some.new_zeros(k)
            for a, b in pairs(params):
                squares = squares + torch.bmm(params[b], params[a]).square().flatten(1).sum(dim=1)
            weight = squares.sqrt()
        slots = torch.arange(most + 1, device=some.device)
        rank = torch.full((k,), most, device=some.device) if c.rank is None else c.rank
        has = ((slots < rank[:, None]) | (slots == most)).to(some.dtype)
        update = {n: per_lane(weight, p) * (p - c.params[n]) for n, p in params.items()}
        return {"update": update, SHARE: {SHARE: weight[:, None] * has}}, c.state

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """Padded with zeros x = share x + update, else x += update / share; of the clients' weights that have a slot."""
        share = reduced[SHARE][SHARE]
        whole, slots = share[-1], share[:-1]
        params: Params = {}
        for name, x in server.params.items():
            u, part = reduced["update"][name], self._by_slot(name, slots, whole)
            held = part.where(part > 0, 1.0)
            if self.mean == "slot":
                params[name] = x + (u / held).where(part > 0, 0.0)
            else:
                params[name] = (part * x + u) / whole.where(whole > 0, 1.0) if float(whole) > 0 else x
        return Server(params, server.state)

    @staticmethod
    def _by_slot(name: str, slots: Tensor, whole: Tensor) -> Tensor:
        """The share of each slot, shaped to go with a parameter."""
        return slots[:, None] if is_a(name) else slots[None, :] if is_b(name) else whole
