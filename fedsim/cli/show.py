"""What commands print: tables, components, the report of a partition, failed runs, the environment."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from fedsim.core.errors import visible


def table(frame: Any, title: str, exact: Sequence[str] = ()) -> None:
    """Print a DataFrame; `exact` names the columns of config values."""
    from fedsim.analysis.tables import text_table

    print(f"\n{visible(title)}\n{text_table(frame, exact)}")


def lines(values: Iterable[Any]) -> None:
    """Print one value per line."""
    for value in values:
        print(value)


def say(text: str) -> None:
    """Print a line on standard error."""
    print(visible(text), file=sys.stderr)


def pairs(found: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    found = list(found)
    width = max(len(name) for name, _ in found)
    lines(f"{name:{width}s}  {value}" for name, value in found)


def failed(jobs: Sequence[Any], more: str = "") -> None:
    """Print on standard error which runs of a sweep failed, and why."""
    from fedsim.runs.sweep_plan import said

    bad = [job for job in jobs if job.state == "failed"]
    say(f"{len(bad)} of {len(jobs)} run(s) failed{more}:")
    for job in bad:
        say(f"  {said(job.settings)}: {job.reason}")


def components() -> None:
    """Print the components that a config can name, with their keys."""
    from fedsim.config.experiment import components
    from fedsim.core.section import keys_of

    for section in ("data", "partition", "adapter", "algorithm", "aggregator", "executor"):
        print(f"{section}:")
        for name, cls in components(section).items():
            keys = ", ".join(key for key in keys_of(cls) if key != "name")
            print(f"  {name:22s} {keys}" if name else f"  {'(any PEFT method)':22s} the keys of its config class")


def partition(report: dict[str, Any], most: int = 40) -> None:
    """Print the report of a partition."""
    import pandas as pd

    counts = pd.DataFrame(report["class_counts"], columns=report["class_names"])
    frame = pd.concat([pd.DataFrame({"client": report["client_names"], "rows": report["sizes"]}), counts], axis=1)
    frame["JS (bits)"] = [None if v is None else round(v, 4) for v in report["js"]]
    clients = report["num_clients"]
    sample = clients > len(frame)
    title = f"{clients} clients, {report['rows']} examples{f'; a sample of {len(frame)} clients' * sample}"
    table(frame.head(most), title)
    if len(frame) > most:
        print(f"... and {len(frame) - most} more clients{' of the sample' * sample}; see partition.json for all")
    if sample:
        least, median, largest = (report[f"{name}_rows"] for name in ("min", "median", "max"))
        print(f"examples per client: {least} to {largest}, median {median:g}")
    js = f"mean JS divergence {report['js_mean']:.4f} bits (max {report['js_max']:.4f})"
    print(f"{js}, size Gini {report['size_gini']:.3f}")
    if notes := [f"{k.replace('_', ' ')}: {v}" for k, v in report["notes"].items() if v]:
        print(visible("; ".join(notes)))
    if report["empty_clients"]:
        print(visible(f"clients without examples, never sampled: {', '.join(report['empty_clients'])}"))


def environment() -> None:
    """Print installed versions, devices and available features."""
    import os
    import platform
    from importlib.util import find_spec

    import torch

    from fedsim.runs.environment import versions

    def supported(name: str, package: str) -> tuple[str, str]:
        return name, "available" if find_spec(package) is not None else f"not available: pip install {package}"

    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    bf16 = f"bfloat16 {'with AMX' if amx else 'without AMX (usually slower than float32)'}"
    missing = "missing: pip install fedsim-llm, or pip install -e . in the repository"
    found = [("python", platform.python_version())]
    found += [(name, version or missing) for name, version in versions().items() if name != "gguf"]
    found += [supported("GGUF models", "gguf")]
    found += [supported(f"tracker {name}", name) for name in ("tensorboard", "wandb", "mlflow")]
    found += [("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads by default, {bf16}")]
    count = torch.cuda.device_count()
    for i in range(count):
        about = torch.cuda.get_device_properties(i)
        bf16 = f"bfloat16 {'' if torch.cuda.is_bf16_supported() else 'not '}supported"
        found.append((f"cuda:{i}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}"))
    executor = (
        f"pool of {count} workers, one per CUDA device" if count > 1 else f"serial on {'cuda:0' if count else 'cpu'}"
    )
    found += [] if count else [("CUDA", "no device; runs use the CPU")]
    found += [("default executor", executor)]
    found += [("FEDSIM_DATA", os.environ.get("FEDSIM_DATA", "not set; experiments on real data read files below it"))]
    pairs(found)
