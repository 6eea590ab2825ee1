"""The environment of a run: commit, versions, devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fedsim.core.numerics import promise

_PACKAGES = (
    "fedsim-llm torch transformers peft accelerate datasets numpy scipy pandas matplotlib omegaconf safetensors gguf"
)


def versions() -> dict[str, str | None]:
    """Package -> installed version, or None, of those that a run's numbers or files can depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in _PACKAGES.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def environment(devices: list[str], threads: int) -> dict[str, Any]:
    """Where a run ran: commit, versions, devices, and whether they give the same bits twice; no host names and no paths."""
    import platform
    import subprocess

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "devices": devices,
        "threads": threads,
        "versions": {name: found for name, found in versions().items() if found is not None},
        "deterministic": promise(devices),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two environments that the last bits of a run depend on."""

    def relevant(about: dict[str, Any]) -> dict[str, Any]:
        kinds = sorted({str(d).split(":")[0] for d in about.get("devices") or []})
        cuda = {"GPU": ", ".join(sorted(set(about.get("gpus") or [])))} if "cuda" in kinds else {}
        cpu = {"kernels": about.get("frozen_float32_on_cpu"), "CPU": about.get("cpu")} if "cpu" in kinds else {}
        found = about.get("versions") or {}
        return {
            "device": ", ".join(kinds),
            **cuda,
            **cpu,
            **{n: found.get(n) for n in ("torch", "transformers", "peft")},
        }

    old, new = relevant(before), relevant(now)
    return [f"{k} {old[k]} then, {new[k]} now" for k in old if k in new and old[k] != new[k]]
