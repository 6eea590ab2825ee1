"""LoRA's factors by name: A is `[R, D]` and B is `[D, R]`, in this order in a product s B A."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

_A = re.compile(r"(^|\.)lora_(embedding_)?A(\.|$)")
_B = re.compile(r"(^|\.)lora_(embedding_)?B(\.|$)")
_HEAD = re.compile(r"(^|\.)(modules_to_save|classifier|score|lm_head|qa_outputs)(\.|$)")


def is_a(name: str) -> bool:
    """Whether a parameter is a factor A."""
    return bool(_A.search(name))


def is_b(name: str) -> bool:
    """Whether a parameter is a factor B."""
    return bool(_B.search(name))


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the head of a model."""
    return bool(_HEAD.search(name)) and not is_a(name) and not is_b(name)


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """(A, B) of each adapted layer."""
    names = list(names)
    partners = {re.sub(r"(lora_(?:embedding_)?)B", r"\1A", n): n for n in names if is_b(n)}
    return [(n, partners[n]) for n in names if n in partners]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name holds one of these, in which * stands for anything."""
    return any(fnmatchcase(name, f"*{pattern}*") for pattern in patterns)
