"""FedEx-LoRA: R. Singhal, K. Ponkshe, P. Vepakomma. FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models. ACL 2025 (arXiv:2410.09432), algorithm 1. The server averages the factors, and folds what the product of the
means lacks of the mean of the products into the frozen weight:

    A = sum_k p_k A_k,  B = sum_k p_k B_k,  W += s (sum_k p_k B_k A_k - B A)

The residual equals sum_k p_k (B_k - B) (A_k - A), which has no cancellation: these are the factors that are folded.

Deviations:
- The weights p_k are those of `algorithm.weights`, in means and residual alike; the paper's are uniform.
- Moments of kept optimizers stay: the factors go on from their means.
- The fold is kept as one dense sum of products by layer, added to the original weight and cast once.

Peers:
- fedex-lora adds the residual turned, which is right for `Conv1D` alone; its copy in fed-sb is right for `nn.Linear` alone.
- FedLLM-Factory leaves out the scale s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim.algorithms.base import Info, Server
from fedsim.algorithms.lowrank import LowRank, pairs, shares, stacked

if TYPE_CHECKING:
    from fedsim.core.params import Message


@dataclass(frozen=True, kw_only=True)
class FedExLora(LowRank):
    """Means of LoRA's factors, and their error folded into the base (Singhal et al., 2025)."""

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """The means; fold sum_k p_k (B_k - B) (A_k - A)."""
        p, update, fold = shares(info, reduced), reduced["update"], {}
        params = self.mean(server, reduced, info)
        for module, (a, b) in pairs(params).items():
            apart = (server.params[n] + update[n] - params[n] for n in (b, a))
            fold[module] = stacked(*apart, p)
        return Server(params, {}, fold)
