"""How far the server's low-rank products are from the mean of the clients' products: `lora_aggregation_error`.

With A_k, B_k what client k has trained, p_k its weight, B, A what the server makes of them and F what it folds into the base, the error of
a layer is |sum_k p_k B_k A_k - (B A + F)| / |sum_k p_k B_k A_k| in the Frobenius norm; that of all layers has the sums of squares above and
below. It is zero for a method that aggregates exactly. The clients' factors are kept in slots beside their messages; nobody sends them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.params import Layout, Params

MOST = 16 << 20  # bytes of all clients' factors, above which the error is not measured


def factors_of(params: Layout, names: Mapping[str, tuple[str, str]], slots: int) -> Layout | None:
    """The layout of the factors, by layer and half; None where there are none, or all clients' are too many to keep.

    Args:
        params: of what a client sends of the trained parameters.
        names: adapted layer -> names of its A and B.
        slots: clients of a round.
    """
    from fedsim.core.params import Layout

    shapes = {
        f"{half} of {layer}": params.shapes[n]
        for layer, both in names.items()
        for half, n in zip("AB", both, strict=True)
    }
    found = Layout(shapes, params.dtype)
    return found if shapes and slots * found.nbytes <= MOST else None


def errors(
    names: Mapping[str, tuple[str, str]], held: Params, shares: Tensor, params: Params, folded: Params
) -> dict[str, tuple[float, float]]:
    """Layer -> (norm of the error, norm of the mean of products), float64.

    Args:
        names: adapted layer -> names of its A and B.
        held: the clients' factors, by the names of `factors_of`, `[K, ...]`.
        shares: p_k, `[K]`.
        params: the server's parameters after its step.
        folded: adapted layer -> what the round has folded, `[m, n]`.
    """
    import torch

    out = {}
    p = shares.double().view(-1, 1, 1)
    for layer, (a, b) in names.items():
        bs, as_ = held[f"B of {layer}"].double(), held[f"A of {layer}"].double()
        left = (p * bs).movedim(0, 1).reshape(bs.shape[1], -1)
        right = as_.reshape(-1, as_.shape[2])
        both = torch.cat([left, -params[b].double()], dim=1), torch.cat([right, params[a].double()])
        gap = product_norm(*both) if layer not in folded else float((both[0] @ both[1] - folded[layer].double()).norm())
        out[layer] = gap, product_norm(left, right)
    return out


def product_norm(left: Tensor, right: Tensor) -> float:
    """The Frobenius norm of a product, by QRs of its factors where these are thinner than it."""
    import torch

    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return float((left @ right).norm())
    return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T).norm())
