"""FLoRA: Z. Wang, Z. Shen, Y. He, G. Sun, H. Wang, L. Lyu, A. Li. FLoRA: Federated Fine-Tuning Large Language Models with
Heterogeneous Low-Rank Adaptations. NeurIPS 2024 (arXiv:2409.05976), algorithm 1. The server stacks the clients' factors, of any
ranks, and every client folds the stack into its base, then starts a fresh adapter:

    W += sum_k p_k s_k B_k A_k,  A drawn anew,  B = 0

Deviations:
- The weights stand on B, not on A; the product is the same.
- A is drawn uniform within 1 / sqrt(n), PEFT's default, whatever `adapter.init` is, from a stream named by round and layer.
- Optimizer state of the factors starts anew in each round, as they do; that of a head is kept under `local.keep_state`.
- The fold is kept as one dense sum of products by layer, added to the original weight and cast once.
- Clients that keep their adapters (`reinit: false`) are refused.

Peers:
- The authors' code sets alpha_k = 2 r_k, so that all scales are 2; its baseline FedIT averages into a misspelt name.
- FedLLM-Factory leaves out the scale s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim.algorithms.base import ClientView, Info, Server
from fedsim.algorithms.lowrank import RankScaled, fresh, is_factor, pairs, shares, stacked

if TYPE_CHECKING:
    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class Flora(RankScaled):
    """Stacks of LoRA's factors, folded into the base (Wang et al., 2024)."""

    reinit: bool = True
    """Start each round from a fresh adapter, as in the paper."""

    def __post_init__(self) -> None:
        if not self.reinit:
            raise ValueError("reinit: False is not supported, a lane cannot yet subtract its own product; use true")

    @property
    def warning(self) -> str | None:
        """What a user should know before training."""
        return "flora starts a fresh adapter in every round, which costs much where local work is short; compare fedex_lora"

    def resets(self, name: str, round: int) -> bool:
        """Moments of the factors, which are new."""
        return is_factor(name)

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """y - x, with the client's scale in B."""
        return {"update": {n: p - c.params[n] for n, p in self.carried(params, c).items()}}, c.state

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """Fold sum_k p_k B_k A_k; a fresh adapter."""
        p, update, fold = shares(info, reduced), reduced["update"], {}
        for module, (a, b) in pairs(server.params).items():
            fold[module] = stacked(server.params[b] + update[b], server.params[a] + update[a], p)
        return Server(fresh(self.mean(server, reduced, info), info, like=server.params), {}, fold)
