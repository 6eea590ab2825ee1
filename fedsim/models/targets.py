"""Which layers of a base an adapter is put on, by full name or by the end of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from fedsim.core.errors import UserError, nearest_first

_QKV = {
    *("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin"),
    *("query_proj", "key_proj", "value_proj", "c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv"),
}
# The output projections of attention and MLP in the layers of the usual architectures, by full module name.
_OUTPUTS = re.compile(
    r"((self_attn|attn|attention|self_attention|attn\.attention)\.(o_proj|out_proj|c_proj|dense|out_lin|wo)"
    r"|attention\.output\.dense|\d+\.output\.dense"
    r"|(mlp|feed_forward|ffn)\.(down_proj|c_proj|fc2|dense_4h_to_h|fc_out|lin2|w2)|layers\.\d+\.fc2)$"
)


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> layer of every `nn.Linear` and `Conv1D` in the model."""
    from transformers.pytorch_utils import Conv1D

    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def attention_inputs(model: nn.Module) -> list[str]:
    """Leaf names of the attention's input projections: what `auto` is for LoRA.

    Raises:
        UserError: if there is none.
    """
    leaves = _leaves(model)
    if found := [leaf for leaf in leaves if leaf in _QKV]:
        return found
    why = f"finds no attention input projection in this base; name some of {', '.join(leaves)}"
    raise UserError(f"adapter.target_modules: 'auto' {why}")


def block_outputs(model: nn.Module) -> list[str]:
    """Full names of the output projections of attention and MLP: what `auto` is for bottleneck adapters.

    Raises:
        UserError: if there is none.
    """
    if found := [name for name in projections(model) if _OUTPUTS.search(name)]:
        return found
    leaves = nearest_first("auto", _leaves(model))
    raise UserError(f"adapter.target_modules: 'auto' fits no layer of this base; it has: {leaves}")


def matching(model: nn.Module, names: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Those of some modules' full names that a target fits.

    Raises:
        UserError: for a target that fits none.
    """
    names = list(names)
    found = {t: {name for name in names if name == t or name.endswith(f".{t}")} for t in targets}
    for target in (t for t in targets if not found[t]):
        why = f"does not exist in this base; it has: {nearest_first(target, _leaves(model))}"
        raise UserError(f"adapter.target_modules: {target!r} {why}")
    return [name for name in names if any(name in fitting for fitting in found.values())]


def _leaves(model: nn.Module) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in projections(model)})
