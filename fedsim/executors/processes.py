"""What all worker processes of fedsim have in common: how they start, and how they end with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_sharer
from multiprocessing.connection import Listener, wait
from typing import Any

import torch.multiprocessing as mp

DEATHS = 3  # processes that may die of the same work before it is given up
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """End at once when the main process is gone, even in the middle of a step.

    On Linux a process that is stopped is woken for it by the kernel.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)
    wait([mp.parent_process().sentinel])
    os._exit(1)


@contextlib.contextmanager
def main_not_imported() -> Iterator[None]:
    """Start processes that do not import the user's main script: it needs no `if __name__ == "__main__"` guard then.

    What a worker runs is imported from fedsim; spawn would otherwise run the script again in each of them.
    """
    main = sys.modules["__main__"]
    missing = object()
    saved = {name: main.__dict__.get(name, missing) for name in ("__file__", "__spec__")}
    main.__dict__.pop("__file__", None)
    main.__dict__["__spec__"] = None
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is missing:
                main.__dict__.pop(name, None)
            else:
                main.__dict__[name] = value


@contextlib.contextmanager
def without_interrupt() -> Iterator[None]:
    """Start processes that ignore Ctrl-C from their first moment: it reaches the whole group, and the main process decides."""
    _share_handles()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may say what signals do
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _share_handles() -> None:
    """Let multiprocessing pass file handles over a socket that has a name but no file.

    It would make a folder in the temporary directory for its socket, which nobody is left to remove when a signal kills the
    whole process group. A key that the workers inherit guards either socket.
    """
    sharer = resource_sharer._resource_sharer
    with sharer._lock:
        if sharer._address is None:
            name = f"\0fedsim-{os.getpid()}-{secrets.token_hex(8)}"
            sharer._listener = Listener(name, "AF_UNIX", backlog=128, authkey=mp.current_process().authkey)
            sharer._address = sharer._listener.address
            sharer._thread = threading.Thread(target=sharer._serve, daemon=True)
            sharer._thread.start()


def died_of(process: Any) -> str:
    """What ended a process: the name of a signal, or its exit code."""
    process.join(timeout=5)
    code = process.exitcode
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
