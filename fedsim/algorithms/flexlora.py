"""FlexLoRA: J. Bai, D. Chen, B. Qian, L. Yao, Y. Li. Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources. NeurIPS 2024 (arXiv:2402.11505), algorithm 1. The server splits the mean of the products by an SVD, and client k
receives its best part of rank r_k:

    D = sum_k p_k s_k B_k A_k = U S V,  s_k B_k A_k = U[:, :r_k] S[:r_k] V[:r_k]

With `energy` tau it is FLoRIST (H. Ramesh, J. R. Murugan. arXiv:2506.09199): the fewest directions whose squared singular values
reach tau of their sum are folded into the base, W += U_p S_p V_p, and every client starts a fresh adapter; tau = 1 is FLoRA.

Deviations:
- The singular values go to B (`split: b`), or their square roots to both factors; the paper leaves this open.
- B travels whole, not as a difference: a client of a smaller rank has none of the rest. Codecs and clips see that.
- Optimizer state of the factors starts anew in each round.
- By QR of the stacks and the SVD of a matrix of K r rows, dense only where K r is not smaller than the layer.
- A fresh A is drawn as in FLoRA. The ledger counts FLoRIST's downlink as the whole
  stack of the cohort, an upper bound.

Peers:
- FedLLM-Factory puts the square root of the singular values on B and nothing on A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedsim.algorithms.base import ClientView, Info, Server
from fedsim.algorithms.lowrank import RankScaled, fresh, is_factor, pairs, ratio, shares, stacked, svd

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class FlexLora(RankScaled):
    """The mean of LoRA's products, split anew by an SVD (Bai et al., 2024), or folded by its energy (FLoRIST)."""

    split: Literal["b", "sqrt"] = "b"
    """Where the singular values go: all to B, or their square roots to A and B."""
    energy: float | None = None
    """FLoRIST's threshold: the share of squared singular values that is folded into the base; null = plain FlexLoRA."""

    def __post_init__(self) -> None:
        if self.split not in ("b", "sqrt"):
            raise ValueError(f"split: {self.split!r} is neither b nor sqrt")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy: {self.energy} is not above 0 and at most 1; null is plain FlexLoRA")

    @property
    def folds(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """FLoRIST folds."""
        return self.energy is not None

    def resets(self, name: str, round: int) -> bool:
        """Moments of the factors, which are new."""
        return is_factor(name)

    def start(self, c: ClientView) -> Params:
        """The best part of the client's rank, whose B has the server's scale: B (s / s_k)."""
        if c.rank is None:
            return c.params
        return {n: p / ratio(c, p) if ".lora_B." in n else p for n, p in c.params.items()}

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """y - x; B whole, with the client's scale in it."""
        made = self.carried(params, c)
        return {"update": {n: p if ".lora_B." in n else p - c.params[n] for n, p in made.items()}}, c.state

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """The SVD of sum_k p_k B_k A_k: its first directions are the new factors, or those of enough energy are folded."""
        p, update, params, fold = shares(info, reduced), reduced["update"], self.mean(server, reduced, info), {}
        for module, (a, b) in pairs(server.params).items():
            u, s, v = svd(*stacked(update[b], server.params[a] + update[a], p))
            if self.energy is not None:
                kept = self._kept(s)
                fold[module] = u[:, :kept] * s[:kept], v[:kept]
                continue
            kept = min(server.params[a].shape[0], len(s))
            left, right = (s[:kept], s.new_ones(kept)) if self.split == "b" else (s[:kept].sqrt(), s[:kept].sqrt())
            params[a], params[b] = (server.params[n].new_zeros(server.params[n].shape) for n in (a, b))
            params[a][:kept], params[b][:, :kept] = right[:, None] * v[:kept], u[:, :kept] * left
        if self.energy is None:
            return Server(params, {})
        return Server(fresh(params, info, like=server.params), {}, fold)

    def _kept(self, s: Tensor) -> int:
        """The fewest directions whose squared singular values reach the threshold."""
        if self.energy == 1.0:
            return len(s)
        sums = s.double().square().cumsum(0)
        return min(len(s), int((sums < self.energy * sums[-1]).sum()) + 1)
