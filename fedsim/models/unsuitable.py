"""What keeps a base from packing, as far as its config and its modules tell; `fedsim.models.probe` finds the rest."""

from __future__ import annotations

from typing import Any

from torch import nn

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
_BY_LENGTH = {"dynamic", "longrope", "su", "yarn_dynamic"}


class Unsuitable(Exception):
    """The base or the method needs something that examples laid end to end cannot give; the text says what."""


def cannot_pack(base: nn.Module, task: str) -> str | None:
    """Why a base cannot train in lanes, or None where nothing is known against it."""
    config = base.config.get_text_config()
    if any((getattr(config, key, None) or 0) > 1 for key in _EXPERTS):
        return "it routes tokens to experts, and a router's losses and capacities couple the lanes"
    if frequencies_by_length(config):
        return "its rotary frequencies depend on the longest example of a pass, of whichever client"
    for name, module in base.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{name} takes statistics over the batch, which couples the lanes"
    if task == "causal_lm" and base.get_output_embeddings() is None:
        return "it has no output head that could be told from its body"
    return None


def frequencies_by_length(config: Any) -> bool:
    """Whether the rotary frequencies of a base depend on the length of its input, so that cached keys go stale."""
    config = config.get_text_config()
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return bool(_rotary_types(scaling) & _BY_LENGTH)


def _rotary_types(value: Any) -> set[str]:
    """The kinds of rotary scaling that a config names, at any depth."""
    if not isinstance(value, dict):
        return set()
    own = {str(value[k]) for k in ("rope_type", "type") if k in value}
    return own.union(*(_rotary_types(v) for v in value.values()))
