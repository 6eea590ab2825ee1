"""Memory of a training process: what a pass takes, the peak so far, and giving freed memory back."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsim.core.types import Measured

if TYPE_CHECKING:
    from fedsim.training.trainer import Trainer

_TRIM_EVERY_S = 2.0
_trimmed = -_TRIM_EVERY_S


def measure(trainer: Trainer, examples: Sequence[np.ndarray], weights: Tensor) -> Measured:
    """What one forward and backward pass without a step takes.

    Args:
        trainer: whose lanes are used; they are overwritten.
        examples: numbers of training examples, one array per lane.
        weights: the parameters to do it at, flat `[N]`.
    """
    k, device, net = len(examples), trainer.net.device, trainer.net
    cuda = device.type == "cuda"
    trainer.reserve(k)
    trainer.flat[:k] = weights
    net.train(True)
    net.begin([0] * k)
    net.bind(trainer.flat[:k], trainer.grad[:k])
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    known = {t.untyped_storage().data_ptr() for t in (*net.model.parameters(), *net.model.buffers())}
    known |= {trainer.flat.untyped_storage().data_ptr(), trainer.grad.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.random.fork_rng(devices=[device] if cuda else []),
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
    ):
        began = time.perf_counter()
        if (private := trainer.config.examples) is None:
            _, useful, _ = trainer.backward(examples)
        else:
            _, useful, _ = trainer.backward_private(examples, [private.lane(1.0, lambda step: 0)] * k)
        if cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    state = k * trainer.layout.nbytes * (2 + trainer.config.optim.num_moments)
    return Measured(k, int(sum(useful)), seconds, sum(kept.values()), state, peak)


def peak(device: torch.device) -> int:
    """Highest memory so far, in bytes: allocated on the GPU, or resident in this process where there is none."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory_now("VmHWM")


def memory_now(key: str) -> int:
    """This process's resident memory (`VmRSS`) or its highest so far (`VmHWM`), in bytes; 0 where Linux does not tell."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


def trim() -> None:
    """Return freed memory to the system, now and then: passes of ever new sizes leave holes in the C heap."""
    global _trimmed
    now = time.monotonic()
    if now - _trimmed > _TRIM_EVERY_S:
        _trimmed = now
        with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
