"""What signals do: those that ask for an end raise where the program is, so that all it started is ended in order."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from fedsim.core.errors import Ended

_PATIENCE_S = 5.0  # a second Ctrl-C within it changes nothing


@contextlib.contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP raise `Ended` in the main thread while this is open; those that were ignored stay so.

    One that comes within seconds of another is left out: what the first one ends is ending.

    Yields:
        The numbers of those that came.
    """
    came: list[int] = []
    last = -math.inf

    def end(number: int, frame: Any) -> None:
        nonlocal last
        came.append(number)
        recent, last = time.monotonic() - last < _PATIENCE_S, time.monotonic()
        if not recent:
            raise Ended(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread may say what signals do
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, end)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
