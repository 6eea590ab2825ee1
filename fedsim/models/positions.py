"""How many positions a base model has, and where they begin."""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch import nn

from fedsim.models.base import load_config, quiet
from fedsim.models.locate import Source

# Their positions begin after the pad token's number.
_SHIFTED = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "longformer", "mpnet"}
_SHIFTED |= {"data2vec-text", "xmod", "ibert", "bertweet"}


def position_offset(config: Any) -> int:
    """The position of the first token of an example."""
    return config.pad_token_id + 1 if config.model_type in _SHIFTED else 0


def max_positions(config: Any) -> int | None:
    """Longest input in tokens, where the config has it."""
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value - position_offset(config)
    return None


def has_position_table(model: nn.Module) -> bool:
    """Whether positions are looked up in a table, which ends; rotary and relative positions have no end."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    names = (name for name, tensor in tensors if tensor.dim() >= 2)
    return any(re.search(r"(^|[._])(wpe|pos|positions?)([._]|$)", name) for name in names)


def ends_at(source: Source) -> int | None:
    """Positions of a base that looks them up in a table; None for other bases, or if the config has no number.

    The model is built without memory for its weights.
    """
    import transformers

    config = load_config(source)
    if (positions := max_positions(config)) is None:
        return None
    with quiet(), torch.device("meta"):
        model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    return positions if has_position_table(model) else None
