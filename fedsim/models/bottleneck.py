"""Bottleneck adapters: a small trained MLP on the output of a frozen projection.

N. Houlsby et al. Parameter-Efficient Transfer Learning for NLP. ICML 2019, figure 2: after the output projections of
attention and MLP, before the residual is added, h + up(act(down(h))), with `up` starting at zero, so that training starts
from the base exactly. Deviations: layer norms of the base stay frozen (the paper trains them), no layer norm inside.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsim.core.errors import UserError, nearest_first

CONFIG, WEIGHTS = "fedsim_adapter.json", "fedsim_adapter.safetensors"
_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}
# The output projections of attention and MLP in the layers of the usual architectures, by full module name.
_AUTO = re.compile(
    r"((self_attn|attn|attention|self_attention|attn\.attention)\.(o_proj|out_proj|c_proj|dense|out_lin|wo)"
    r"|attention\.output\.dense|\d+\.output\.dense"
    r"|(mlp|feed_forward|ffn)\.(down_proj|c_proj|fc2|dense_4h_to_h|fc_out|lin2|w2)|layers\.\d+\.fc2)$"
)


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


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> layer of every `nn.Linear` and `Conv1D` in the model."""
    from transformers.pytorch_utils import Conv1D

    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def attach_bottleneck(
    model: nn.Module,
    *,
    bottleneck: int,
    dropout: float,
    activation: str,
    target_modules: list[str] | str,
    dtype: torch.dtype,
) -> list[str]:
    """Put a `Bottleneck` on each target, in place; returns the targets' full names.

    Raises:
        UserError: if a target does not exist; the line lists those that do.
    """
    layers = projections(model)
    if target_modules == "auto":
        chosen = [name for name in layers if _AUTO.search(name)]
    else:
        chosen = [name for name in layers if any(name == t or name.endswith(f".{t}") for t in target_modules)]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in layers})
    if not chosen:
        asked = "auto" if target_modules == "auto" else target_modules[0]
        raise UserError(
            f"adapter.target_modules: {asked!r} fits no layer of this base; it has: {nearest_first(asked, leaves)}"
        )
    for target in [] if target_modules == "auto" else target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise UserError(
                f"adapter.target_modules: {target!r} does not exist in this base; it has: {nearest_first(target, leaves)}"
            )
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Bottleneck(layers[name], bottleneck, dropout, activation, dtype))
    return chosen


def save_bottleneck(folder: Path, state: dict[str, Tensor], settings: dict) -> None:
    """Write the trained tensors and the settings that rebuild them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().cpu().contiguous() for n, t in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"adapter": "bottleneck", **settings}, indent=2) + "\n")


def load_bottleneck(model: nn.Module, folder: Path) -> nn.Module:
    """Attach and fill the adapters that `save_bottleneck` wrote.

    Raises:
        UserError: if the file's tensors do not fit the base.
    """
    from safetensors.torch import load_file

    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    state = load_file(folder / WEIGHTS)
    keys = ("bottleneck", "dropout", "activation", "target_modules")
    dtype = next(iter(state.values())).dtype
    attach_bottleneck(model, **{k: settings[k] for k in keys}, dtype=dtype)
    own = dict(model.named_parameters())
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(
                f"{folder}: tensor {name} {list(tensor.shape)} does not fit this base; load it on the base it was trained on"
            )
        own[name].data = tensor.to(own[name].device)
    model.eval()
    return model
