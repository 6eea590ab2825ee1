"""FLoRA: Z. Wang, Z. Shen, Y. He, G. Sun, H. Wang, L. Lyu, A. Li. FLoRA: Federated Fine-Tuning Large Language Models with
Heterogeneous Low-Rank Adaptations. NeurIPS 2024 (arXiv:2409.05976), algorithm 1. The server stacks the clients' factors, of any
ranks, and every client folds the stack into its base, then starts a fresh adapter:

    W += sum_k p_k s_k B_k A_k,  A drawn anew,  B = 0

Deviations:
- The weights stand on B, not on A; the product is the same.
- A is drawn uniform within 1 / sqrt(n), PEFT's default, whatever `adapter.init` is, from a stream named by round and layer.
- Optimizer state of the factors starts anew in each round, as they do; that of a head is kept under `local.keep_state`.
- The fold is kept as one dense sum of products by layer, added to the original weight and cast once.
- With `reinit: false` client k goes on from its own A_k, B_k and their moments. What these were at the round's start is in the base
  by then, so its model is without it, and it sends what has come on top: B_k' A_k' - B_k A_k, of rank 2 r_k.

Peers:
- The authors' code sets alpha_k = 2 r_k, so that all scales are 2; its baseline FedIT averages into a misspelt name.
- FedLLM-Factory leaves out the scale s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim.algorithms.base import ClientView, Factors, Info, Server
from fedsim.algorithms.lowrank import RankScaled, fresh, is_factor, pairs, shares, stacked

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class Flora(RankScaled):
    """Stacks of LoRA's factors, folded into the base (Wang et al., 2024)."""

    reinit: bool = True
    """Start each round from a fresh adapter, as in the paper; false: clients keep their adapters and these' moments."""

    @property
    def warning(self) -> str | None:
        """What a user should know before training."""
        costs = "flora starts a fresh adapter in every round, which costs much where local work is short; compare "
        return costs + "algorithm.reinit=false, fedex_lora" if self.reinit else None

    @property
    def lives_on(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Moments belong to the adapters that clients keep."""
        return frozenset() if self.reinit else frozenset(self.parts)

    def resets(self, name: str, round: int) -> bool:
        """Moments of the factors, where these are new."""
        return self.reinit and is_factor(name)

    def changes(self, name: str, round: int) -> bool:
        """The server has no factors of its own where clients keep theirs."""
        return self.reinit or not is_factor(name)

    def init(self, params: Params) -> tuple[Params, Params]:
        """Nothing is folded; each client's factors, where it keeps them."""
        return super().init(params)[0], {} if self.reinit else {n: p for n, p in params.items() if is_factor(n)}

    def message(self, params: Params) -> Message:
        """The factors, beside those of the start where clients keep them."""
        if self.reinit:
            return super().message(params)
        wide = {n: _side_by_side(n, p, p) if is_factor(n) else p for n, p in params.items()}
        return {"update": wide}

    def start(self, c: ClientView) -> Params:
        """What was received; the client's own factors."""
        return {**c.params, **c.state}

    def beside(self, c: ClientView) -> Factors:
        """s_k B_k A_k of the start, which is in the base."""
        own = super().carried(c.state, c)
        return {module: (own[b], own[a]) for module, (a, b) in pairs(own).items()}

    def carried(self, params: Params, c: ClientView) -> Params:
        """B_k' A_k', less the B_k A_k of the start; the client's scale in B."""
        now, before = super().carried(params, c), super().carried(c.state, c)
        less = {n: _side_by_side(n, now[n], -b if ".lora_B." in n else b) for n, b in before.items()}
        return {**now, **less}

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """y - x; of factors that the client keeps, what its product has gained."""
        state = {n: params[n] for n in c.state}
        sent = self.carried(params, c)
        return {"update": {n: p if n in state else p - c.params[n] for n, p in sent.items()}}, state

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """Fold sum_k p_k B_k A_k; a fresh adapter, or none."""
        p, update, fold = shares(info, reduced), reduced["update"], {}
        for module, (a, b) in pairs(update).items():
            whole = {n: server.params[n] + update[n] if self.reinit else update[n] for n in (a, b)}
            fold[module] = stacked(whole[b], whole[a], p)
        mean = self.mean(server, reduced, info)
        return Server(fresh(mean, info, like=server.params) if self.reinit else mean, {}, fold)


def _side_by_side(name: str, now: Tensor, before: Tensor) -> Tensor:
    """Both on the axis of ranks: columns of B `[..., m, R]`, rows of A `[..., R, n]`."""
    import torch

    return torch.cat([now, before], dim=-1 if ".lora_B." in name else -2)
