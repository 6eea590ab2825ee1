"""The scaling of rotary frequencies in a GGUF file, which transformers' loader of such files ignores.

llama.cpp scales them by metadata (`ARCH.rope.scaling.*`) or divides them by a tensor, `rope_freqs.weight`, into which its
converter has worked Llama 3's rule. A config that names the same rule gives the same frequencies, here and in an export.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.models.locate import wrong

_KEYS = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
_KNOWN = {"type", "finetuned", *_KEYS}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # 3.1 to 3.3


def scale_rotary(config: Any, file: Path) -> None:
    """Put the file's scaling into its config, in place.

    Args:
        config: as transformers reads it from the file.
        file: the GGUF file.

    Raises:
        UserError: for a scaling that no rule of transformers is known to reproduce.
    """
    scaling, factors, others = _scaling(file, file.stat().st_mtime_ns)
    way = "give the transformers folder that it was made from"
    kind = scaling.get("type", "none")
    if kind == "none" and factors is None and not others:
        return
    rope = getattr(config, "rope_parameters", None)
    plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default" and "rope_theta" in rope
    odd = sorted(set(scaling) - _KNOWN) + others
    if not plain or odd or kind not in ("none", "linear", "yarn") or (factors is not None and kind != "none"):
        what = ", ".join(odd) or f"{kind} of {config.model_type}"
        raise wrong(file.name, f"scales its rotary frequencies in an unknown way ({what}); {way}")
    if factors is None:
        scaled = {"rope_type": kind, **{_KEYS[k]: scaling[k] for k in _KEYS if k in scaling}}
    else:
        scaled = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    config.rope_parameters = {**rope, **scaled}
    if factors is not None and not _same(config, factors):
        raise wrong(file.name, f"divides its rotary frequencies by a table that is not Llama 3's; {way}")


def _same(config: Any, factors: np.ndarray) -> bool:
    """Whether Llama 3's rule divides the frequencies of this config by these factors."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    usual = config.rope_parameters["rope_theta"] ** -(torch.arange(len(found)) / len(found))
    return len(found) == len(factors) and np.allclose(usual / found, factors, rtol=1e-3)


@functools.lru_cache(maxsize=2)
def _scaling(file: Path, modified: int) -> tuple[dict[str, Any], np.ndarray | None, list[str]]:
    """(key -> value of the scaling, `rope_freqs` or None, other tensors of factors) of a file, read once while it stays."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    found = {n.split(".rope.scaling.")[1]: f.contents() for n, f in reader.fields.items() if ".rope.scaling." in n}
    older = [f.contents() for n, f in reader.fields.items() if n.endswith(".rope.scale_linear")]
    found |= {"type": "linear", "factor": older[0]} if older else {}
    tables = {t.name: t for t in reader.tensors if t.name.startswith("rope_f")}
    freqs = tables.pop("rope_freqs.weight", None)
    return found, None if freqs is None else np.array(freqs.data, dtype=np.float64), sorted(tables)
