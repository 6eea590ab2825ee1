"""Heartbeats of this process, in memory that another process reads: they tell a hang from slow work.

A watched process shares two numbers: how often it has beaten, and how many blocks of work are open in which it has to beat.
Loading a model or drawing a figure is no such block, and may take any time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

LOOK_S = 0.5  # seconds between two looks at a process
_own: np.ndarray | None = None  # [beats, open blocks] of this process; None: nobody watches it


def new_heartbeat() -> Tensor:
    """What a process is watched by: int64 `[2]` in shared memory, zeros."""
    return torch.zeros(2, dtype=torch.int64).share_memory_()


def beat_into(heartbeat: Tensor) -> None:
    """From now on this process beats into `heartbeat`, int64 `[2]`."""
    global _own
    _own = heartbeat.numpy()


def beat() -> None:
    """Show that this process makes progress."""
    if _own is not None:
        _own[0] += 1


@contextmanager
def at_work() -> Iterator[None]:
    """A block of work in which this process has to beat."""
    if _own is None:
        yield
        return
    beat()
    _own[1] += 1
    try:
        yield
    finally:
        _own[1] -= 1


class Watch:
    """Measures for how long a process at work has not beaten.

    Only the time between two looks counts, and little of a long one: a process group that was stopped and continues has not
    been silent meanwhile.

    Args:
        heartbeat: int64 `[2]`, looked at every `LOOK_S`.
    """

    def __init__(self, heartbeat: Tensor) -> None:
        self._heartbeat, self._beats = heartbeat, -1
        self.restart()

    def restart(self) -> None:
        """Measure anew: the process was told something."""
        self._silent, self._last = 0.0, time.monotonic()

    def silent_s(self) -> float:
        """Seconds without a beat so far."""
        beats, blocks = self._heartbeat.tolist()
        now = time.monotonic()
        if beats != self._beats or not blocks:
            self._beats, self._silent = beats, 0.0
        else:
            self._silent += min(now - self._last, 2 * LOOK_S)
        self._last = now
        return self._silent
