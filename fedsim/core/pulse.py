"""Signs of life of this process, in memory that another process looks at: a hang is told from slow work by them.

Whoever watches shares two numbers, how often the process has given a sign, and whether it is at work that gives signs: what
loads a model or draws a figure gives none, and is not limited.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

LOOK_S = 0.5  # seconds between two looks at a process
_shared: np.ndarray | None = None  # [signs, depth of the work]; of the process


def pulses(number: int) -> Tensor:
    """What as many processes are watched by: int64 `[number, 2]` in shared memory, zeros."""
    return torch.zeros(number, 2, dtype=torch.int64).share_memory_()


def watched_by(pulse: Tensor) -> None:
    """Give this process's signs here from now on, int64 `[2]`."""
    global _shared
    _shared = pulse.numpy()


def beat() -> None:
    """A sign of life; where nobody watches, nothing."""
    if _shared is not None:
        _shared[0] += 1


@contextmanager
def at_work() -> Iterator[None]:
    """While this is open the process gives signs, or hangs."""
    if _shared is None:
        yield
        return
    beat()
    _shared[1] += 1
    try:
        yield
    finally:
        _shared[1] -= 1


def silence(limit_s: float) -> str:
    """Why a process was ended that was silent for so long."""
    return f"no sign of life for {limit_s:g} s (executor.hang_s)"


class Watch:
    """Measures for how long a process has been silent at its work.

    Beats are counted, and time is what passes between two looks, so that a process group that was stopped and goes on has
    not been silent meanwhile.

    Args:
        pulse: int64 `[2]` of `pulses`; looked at every `LOOK_S`.
    """

    def __init__(self, pulse: Tensor) -> None:
        self._pulse = pulse
        self._signs, self._silent = -1, 0.0

    def told(self) -> None:
        """The process was told something: its silence begins anew."""
        self._silent = 0.0

    def look(self, passed: float, at_work: bool = True) -> float:
        """Seconds of silence so far, `passed` seconds after the last look; `at_work` says what only the watcher knows."""
        signs, depth = self._pulse.tolist()
        if signs != self._signs or not depth or not at_work:
            self._signs, self._silent = signs, 0.0
        else:
            self._silent += min(passed, 2 * LOOK_S)
        return self._silent
