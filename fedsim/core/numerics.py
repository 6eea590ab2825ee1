"""Process-wide settings of torch on which results depend; and whether a device gives the same bits twice.

The results of a run are a function of its config, lanes and threads. A notebook or a script may have changed torch's
settings (default type, autocast, precision of float32 products, choice of kernels), and worker processes do not inherit
them. `settled` gives them one state for the time of a run and restores them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fedsim.core.inductor import without_folder

# Operations of our models whose CUDA kernels add in no fixed order: by torch's documentation of `use_deterministic_algorithms`
# and `scaled_dot_product_attention`. Not listed, though their kernels add atomically: gradients of `index_select` and
# `index_copy` in fedsim/models, whose positions all differ. Embeddings sort first. cuBLAS gives the same bits if a process
# uses one stream, as fedsim's do.
ATOMIC = (
    "gradient of scaled_dot_product_attention: flash, memory-efficient and cuDNN kernels, in all modes",
    "gradient of gather and of repeated indices: attention by relative distance (DeBERTa), one client at a time",
    "index_add: routed experts, one client at a time",
    "gradient of convolutions: state-space models (Mamba), one client at a time",
)
_WAY_OUT = (
    "torch.use_deterministic_algorithms(True) before the run and CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment; "
    "float64 on a CPU to compare with"
)


@contextmanager
def settled(devices: Sequence[str] = ()) -> Iterator[None]:
    """Gives torch's process-wide settings the state that every run has; restores them afterwards.

    Gradients are on, autocast is off, new tensors are float32 on the CPU, float32 products are exact, small numbers are not
    flushed to zero. On CPUs alone kernels are deterministic; for GPUs that setting is left as it is.

    Args:
        devices: where the run trains.
    """
    with ExitStack() as stack:
        stack.enter_context(without_folder())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        for place in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul):
            if place.fp32_precision not in ("none", "ieee"):
                stack.callback(setattr, place, "fp32_precision", place.fp32_precision)
                place.fp32_precision = "ieee"
        if _flushes():
            stack.callback(torch.set_flush_denormal, True)
            torch.set_flush_denormal(False)
        if devices and not any(d.startswith("cuda") for d in devices):
            filled = torch.utils.deterministic.fill_uninitialized_memory
            stack.callback(setattr, torch.utils.deterministic, "fill_uninitialized_memory", filled)
            stack.callback(use_kernels, kernels())
            settle_cpu()
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """This number of CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_cpu() -> None:
    """Deterministic kernels on the CPU, where operations have them: with several threads the gradient of `x[i]` with repeated
    positions would be added in no fixed order (docs/log.md)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that takes time


def kernels() -> str:
    """torch's setting of deterministic kernels: off | warn | on."""
    if not torch.are_deterministic_algorithms_enabled():
        return "off"
    return "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "on"


def use_kernels(mode: str) -> None:
    """Set deterministic kernels: off | warn | on."""
    torch.use_deterministic_algorithms(mode != "off", warn_only=mode == "warn")


def _flushes() -> bool:
    """Whether this thread flushes subnormal numbers to zero."""
    return (torch.tensor(torch.finfo(torch.float64).tiny, dtype=torch.float64, device="cpu") / 2).item() == 0


def promise(devices: Sequence[str]) -> dict[str, Any]:
    """Whether the same seed, config, lanes and threads give the same bits on these devices; if not, why.

    Args:
        devices: one per worker: cpu, cuda:0, ...

    Returns:
        `promised`; else or on a GPU `because` and `way_out`, and on a GPU what the promise depends on.
    """
    kinds = {_kind(device) for device in devices}
    because = []
    if len(kinds) > 1:
        because.append(
            f"devices of several kinds, and a client trains on whichever is free: {', '.join(sorted(kinds))}"
        )
    if kinds == {"cpu"}:
        return {"promised": True}
    if kernels() != "on":
        because += [f"kernels that add in any order; {operation}" for operation in ATOMIC]
    about: dict[str, Any] = {"promised": not because}
    if because:
        about |= {"because": because, "way_out": _WAY_OUT}
    about["deterministic_algorithms"] = kernels()
    about["cublas_workspace_config"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return about


def _kind(device: str) -> str:
    """cpu, or the name of the GPU: GPUs of one name give the same bits."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
