"""Small runs of every kind, and hashes of what comes out of each: exported tensors and metrics.

`python tests/pinned_runs.py` prints them as JSON; `--write` puts them into `tests/pinned_runs.json`, against which
`tests/test_pinned_runs.py` compares. Write them anew only in a commit that says why the bits had to change.

The process restricts torch, oneDNN and MKL to kernels that every x86-64 CPU has, so that the hashes hold on other CPUs too.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
FILE = Path(__file__).with_suffix(".json")
METRICS = {"loss", "accuracy", "tokens", "computed_tokens", "bytes_up", "bytes_down", "round_seconds"}
BASE: dict[str, Any] = {
    "seed": 5,
    "rounds": 2,
    "modes": ["federated"],
    "adapter": {"name": "lora", "r": 3, "alpha": 6},
    "data": {"name": "headlines"},
    "partition": {"name": "dirichlet", "num_clients": 6, "alpha": 1.0},
    "local": {"steps": 2, "batch_size": 4, "lr": 5e-3},
    "executor": {"name": "serial", "device": "cpu", "threads": 1},
    "training": {"lanes": 3},
}
POOL = {"name": "pool", "devices": ["cpu", "cpu"], "threads": 1}
LATE = {"drop": 0.1, "speeds": [50, 800], "deadline_s": 1.0, "late": "next"}
RUNS: dict[str, dict[str, Any]] = {
    "lanes": {"modes": ["local", "federated", "central"]},
    "one lane": {"training": {"lanes": 1}, "adapter": {"name": "prefix", "num_virtual_tokens": 3}},
    "whole model": {
        "modes": ["local", "federated", "central"],
        "adapter": {"name": "none"},
        "partition": {"name": "iid", "num_clients": 2},
        "training": {"lanes": 1},
        "local": {"steps": 1, "batch_size": 4, "lr": 1e-3},
    },
    "pool of two": {"modes": ["local", "federated", "central"], "executor": POOL, "training": {"lanes": 2}},
    "sampling and late updates": {
        "rounds": 4,
        "partition": {"name": "dirichlet", "num_clients": 12, "alpha": 1.0},
        "cohort": {"size": 5},
        "simulation": LATE,
        "algorithm": {"name": "fedavg", "weights": "uniform"},
    },
    "codec with error feedback": {"rounds": 3, "messages": {"up": "nf4", "down": "fp16", "error_feedback": True}},
    "resume": {"modes": ["local", "federated", "central"], "local": {**BASE["local"], "keep_state": True}},
}


def bits(path: Path) -> dict[str, str]:
    """Hashes of a run: of every exported tensor by file and name, and of its metrics rows in order."""
    from safetensors import safe_open

    import fedsim

    tensors, rows = hashlib.sha256(), hashlib.sha256()
    folders = [path / part for part in ("init", "global", "best", "central", "local")]
    for file in sorted(f for folder in folders for f in folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name).contiguous()
                tensors.update(f"{file.relative_to(path)}:{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
                tensors.update(tensor.view(-1).numpy().tobytes())
    df = fedsim.load_runs(path)
    for row in df[df["name"].isin(METRICS)].itertuples():
        client = row.client if isinstance(row.client, str) else None
        rows.update(f"{row.round}:{row.step}:{row.scope}:{client}:{row.split}:{row.name}".encode())
        rows.update(struct.pack("<d", row.value))
    return {"tensors": tensors.hexdigest()[:16], "metrics": rows.hexdigest()[:16]}


def all_bits(folder: Path) -> dict[str, dict[str, str]]:
    """The hashes of every run, made under `folder`."""
    import yaml

    import fedsim

    out = {}
    for name, sections in RUNS.items():
        tree = {**BASE, "name": name.replace(" ", "-"), "results": str(folder), **sections}
        if name == "resume":  # stopped after round 2, and taken up again with more rounds
            run = fedsim.run(fedsim.Experiment.from_dict(tree), progress=False)
            tree["rounds"] = 4
            again = fedsim.run(fedsim.Experiment.from_dict(tree), progress=False, resume=run.path)
            assert again.path == run.path
        else:
            run = fedsim.run(fedsim.Experiment.from_dict(tree), progress=False)
        out[name] = bits(run.path)
    sweep = folder / "sweep.yaml"
    experiment = {k: v for k, v in BASE.items() if k != "executor"} | {"results": str(folder)}
    keys = {"name": "together", "experiment": experiment, "grid": {"seed": [0, 1, 2], "local.lr": [1e-3, 5e-3]}}
    sweep.write_text(yaml.safe_dump({**keys, "devices": ["cpu"], "workers": 1, "threads": 1, "together": 3}))
    fedsim.run_sweep(fedsim.Sweep.load(sweep), progress=False)
    for file in (folder / "together").glob("*/config.yaml"):
        config = yaml.safe_load(file.read_text())
        out[f"together, seed {config['seed']}, lr {config['local']['lr']}"] = bits(file.parent)
    return dict(sorted(out.items()))


def main() -> None:
    """Print the hashes, or write them."""
    os.environ.update(PORTABLE)  # before torch is imported
    with tempfile.TemporaryDirectory() as folder:
        found = json.dumps(all_bits(Path(folder)), indent=1) + "\n"
    if "--write" in sys.argv:
        FILE.write_text(found)
    else:
        sys.stdout.write(found)


if __name__ == "__main__":
    main()
