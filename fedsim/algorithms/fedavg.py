"""FedAvg: H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas. Communication-Efficient Learning of Deep
Networks from Decentralized Data. AISTATS 2017, algorithm 1. A client starts from the global parameters w_t, trains,
and sends u_k = w_k - w_t; the server sets w_{t+1} = w_t + sum_k p_k u_k.

Deviations:
- The weights p_k may be uniform or by steps beside the paper's n_k / n.
- The optimizer of a client may be AdamW, and may keep its moments from round to round; the paper's is plain SGD.

Peers:
- NVFlare: weights by steps. Flower: weights by examples.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.algorithms.base import Algorithm


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Federated averaging (McMahan et al., 2017)."""
