"""How worker processes start without side effects, and end with their parent."""

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

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """End at once when the main process is gone, even in the middle of a step; blocks until then.

    On Linux the kernel wakes a stopped process for it.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)
    wait([mp.parent_process().sentinel])
    os._exit(1)


@contextlib.contextmanager
def spawning() -> Iterator[None]:
    """Processes started in this block neither import the user's main script nor see Ctrl-C.

    Spawn imports the main script again, which would then need an `if __name__ == "__main__"` guard; workers run only what is
    imported from fedsim. Ctrl-C reaches the whole process group, and the main process decides what it ends.
    """
    _share_handles()
    main, missing = vars(sys.modules["__main__"]), object()
    saved = {name: main.get(name, missing) for name in ("__file__", "__spec__")}
    main.pop("__file__", None)
    main["__spec__"] = None
    in_main_thread = threading.current_thread() is threading.main_thread()  # no other one may set signal handlers
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)
        for name, value in saved.items():
            main.pop(name, None) if value is missing else main.update({name: value})


def _share_handles() -> None:
    """Let multiprocessing pass file handles over a socket that has a name but no file.

    Its own socket lies in a temporary folder, which nobody removes when a signal kills the whole process group. A key that the
    workers inherit guards either socket.
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
    code = process.exitcode
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
