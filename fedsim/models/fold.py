"""What a server has folded into the frozen base: products of low-rank factors, by adapted layer.

A fold is `fold/MODULE` -> `[out, in]`, in units of the adapter: the layer's scale is not in it. It is added to the original
weight in float32 (float64 for a float64 base) and cast once, and only for as long as a pass takes: the shared weight is never
written, so that modes and runs on one base do not see each other's folds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedsim.core.params import FOLD

if TYPE_CHECKING:
    from fedsim.models.forward import Net


def of_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a server's state that is folded into the base."""
    return {n: t for n, t in state.items() if n.startswith(FOLD)}


@contextmanager
def folded(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """The base with the fold of a server's state, inside the block."""
    held: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for name, delta in of_state(state).items():
            if not delta.any():  # nothing was folded yet: the shared weight serves
                continue
            layer = model.get_submodule(name.removeprefix(FOLD))
            base = layer.get_base_layer()
            own, scale = base.weight, layer.scaling["default"]
            wide = torch.promote_types(own.dtype, torch.float32)
            delta = (delta.T if layer.fan_in_fan_out else delta).to(own.device, wide)
            held.append((base, own))
            base.weight = nn.Parameter((own.detach().to(wide) + scale * delta).to(own.dtype), requires_grad=False)
        yield
    finally:
        for base, own in held:
            base.weight = own


@contextmanager
def beside(net: Net, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Each lane without the product of its own factors B `[K, m, R]` and A `[K, R, n]`, by adapted layer, inside the block."""
    with ExitStack() as hooks:
        for name, (b, a) in factors.items():
            layer = net.model.get_submodule(name)
            base, scale = layer.get_base_layer(), layer.scaling["default"]

            def less(
                module: nn.Module, args: tuple[Tensor, ...], out: Tensor, a: Tensor = a, b: Tensor = b, s: float = scale
            ) -> Tensor:
                return out - (s * net.multiply(module, args[0].to(a.dtype), a, b)).to(out.dtype)

            hooks.callback(base.register_forward_hook(less).remove)
        yield


def factors(delta: Tensor) -> tuple[Tensor, Tensor]:
    """(B, A) with B A = delta `[m, n]` and as few columns of B as its rounding allows, by the rule of `numpy.linalg.matrix_rank`."""
    u, s, v = torch.linalg.svd(delta.double().cpu(), full_matrices=False)
    kept = int((s > s.max() * max(delta.shape) * torch.finfo(delta.dtype).eps).sum())
    root = s[:kept].sqrt()
    return u[:, :kept] * root, root[:, None] * v[:kept]


def export(model: nn.Module, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Make a PEFT folder of LoRA one of a higher rank, which holds the adapter's factors and those of the fold side by side.

    Each layer's own scale goes into B; the folder's is 1.
    """
    from safetensors.torch import load_file, save_file

    deltas = {n.removeprefix(FOLD): t for n, t in of_state(state).items() if t.any()}
    if not deltas:
        return
    file, about = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, config = load_file(file), json.loads(about.read_text(encoding="utf-8"))
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for name in [n for n in tensors if ".lora_A." in n]:
        module = name.partition(".lora_A.")[0]
        a, b = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
        scale = model.get_submodule(module).scaling["default"]
        more = factors(deltas[module]) if module in deltas else (b.new_zeros(b.shape[0], 0), a.new_zeros(0, a.shape[1]))
        made[name] = scale * torch.cat([b, more[0].to(b)], dim=1), torch.cat([a, more[1].to(a)])
    rank = max(a.shape[0] for _, a in made.values())
    for name, (b, a) in made.items():
        pad = rank - a.shape[0]
        tensors[name] = torch.nn.functional.pad(a, (0, 0, 0, pad)).contiguous()
        tensors[name.replace(".lora_A.", ".lora_B.")] = torch.nn.functional.pad(b, (0, pad)).contiguous()
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    save_file(tensors, file, metadata={"format": "pt"})
    about.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
