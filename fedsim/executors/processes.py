"""What all worker processes of fedsim have in common: how they start, and how they end with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import resource_sharer, util
from multiprocessing.connection import wait
from typing import Any

import torch.multiprocessing as mp

DEATHS = 3  # processes that may die of the same work before it is given up
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ROOM = 107 - len("/pymp-12345678/listener-12345678")  # bytes of a temporary directory's path


def die_with_parent() -> None:
    """End at once when the main process is gone, even in the middle of a step; what it can no longer remove goes first.

    On Linux a process that is stopped is woken for it by the kernel.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)
    wait([mp.parent_process().sentinel])
    left = mp.current_process()._config.get("tempdir")  # that of multiprocessing, which a process takes from its parent
    if left is not None:
        shutil.rmtree(left, ignore_errors=True)
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
    _make_temp_dir()  # made here, workers know it and remove it should this process be killed
    if threading.current_thread() is not threading.main_thread():  # only the main thread may say what signals do
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _make_temp_dir() -> None:
    """Make multiprocessing's temporary folder, for its sockets: their paths may have 107 bytes, which a long TMPDIR, as clusters
    have them, leaves no room for. /tmp takes its place then."""
    before = tempfile.gettempdir()
    try:
        if len(os.fsencode(before)) > _ROOM and os.access("/tmp", os.W_OK | os.X_OK):
            tempfile.tempdir = "/tmp"
        util.get_temp_dir()
    finally:
        tempfile.tempdir = before


def remove_temp_dir() -> None:
    """Remove multiprocessing's temporary folder once the last worker has ended: a main process that is killed later, when
    nobody is left to do it, leaves nothing. It is made again where it is needed again.

    A folder that something else still uses, a process or a file in it, stays until the process ends.
    """
    made = mp.current_process()._config.get("tempdir")
    if made is None or mp.active_children():
        return
    resource_sharer.stop(timeout=5)  # its socket lies there
    try:
        if os.listdir(made):
            return
    except OSError:
        return
    for finalizer in list(util._finalizer_registry.values()):  # removing it behind their back fails at the exit
        if getattr(finalizer, "_callback", None) is util._remove_temp_dir:
            finalizer()


def died_of(process: Any) -> str:
    """What ended a process: the name of a signal, or its exit code."""
    process.join(timeout=5)
    code = process.exitcode
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
