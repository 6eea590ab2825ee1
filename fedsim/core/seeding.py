"""Named random streams: every generator is a function of (seed, names), never of call order.

`stream(seed, "cohort", round)` and `stream(seed, "batches", client, round)` are independent of each other and
of how many workers there are, so adding a consumer never shifts anyone else's draws.
"""

from __future__ import annotations

import hashlib

import numpy as np


def _entropy(seed: int, names: tuple[str | int, ...]) -> list[int]:
    # A type tag keeps stream(0, 1) apart from stream(0, "1"); the separator keeps ("ab", "c") apart from ("a", "bc").
    text = "\x1f".join(f"{type(n).__name__[0]}:{n}" for n in names)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return [seed, int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the purpose named.

    Args:
        seed: the experiment's seed, >= 0.
        names: what the draws are for, e.g. `"batches", "site-1", 3`; strings and integers.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(_entropy(seed, names))))


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit integer from the same named stream, for `torch.Generator.manual_seed`."""
    return int(stream(seed, *names).integers(0, 2**63 - 1))
