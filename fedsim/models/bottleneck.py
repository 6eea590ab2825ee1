"""Bottleneck adapters: a small trained MLP on the output of a frozen projection.

N. Houlsby et al. Parameter-Efficient Transfer Learning for NLP. ICML 2019, figure 2: after the output projections of
attention and MLP, before the residual is added, h + up(act(down(h))), with `up` starting at zero, so that training starts
from the base exactly. Deviations: layer norms of the base stay frozen (the paper trains them), no layer norm inside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.models.targets import block_outputs, matching, projections

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class Bottleneck(nn.Module):
    """A frozen projection and the trained bottleneck on its output.

    Args:
        base_layer: `nn.Linear` or transformers' `Conv1D`, `[..., D_in] -> [..., D]`; kept as it is.
        width: features of the bottleneck, W.
        dropout: on the bottleneck's activations, in training.
        activation: gelu | relu | silu.
        dtype: of the trained weights.
    """

    def __init__(self, base_layer: nn.Module, width: int, dropout: float, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        features = base_layer.nf if hasattr(base_layer, "nf") else base_layer.out_features
        self.base_layer = base_layer
        self.adapter_down = nn.Linear(features, width, dtype=dtype)
        self.adapter_up = nn.Linear(width, features, dtype=dtype)
        self.act = _ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.adapter_up.weight)
        nn.init.zeros_(self.adapter_up.bias)

    @property
    def weight(self) -> Tensor:
        """The frozen projection's weight: some architectures look at its dtype."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D_in] -> [..., D]`, in the type of the frozen projection's output."""
        h = self.base_layer(x)
        z = self.dropout(self.act(self.adapter_down(h.to(self.adapter_down.weight.dtype))))  # [..., W]
        return h + self.adapter_up(z).to(h.dtype)


def attach_bottleneck(
    model: nn.Module,
    *,
    bottleneck: int,
    dropout: float,
    activation: str,
    target_modules: list[str] | str,
    dtype: torch.dtype,
) -> None:
    """Put a `Bottleneck` on each target, in place.

    Raises:
        UserError: if a target does not exist; the line lists those that do.
    """
    layers, auto = projections(model), target_modules == "auto"
    for name in block_outputs(model) if auto else matching(model, layers, target_modules):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Bottleneck(layers[name], bottleneck, dropout, activation, dtype))
