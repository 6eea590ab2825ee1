"""What only a GPU can show; the same code paths run on the CPU in the other tests."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fedsim

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def _run(folder: Path, executor: dict, **keys: object) -> dict[str, str]:
    """Runs a small federation; name -> hash of every file of tensors in the run folder."""
    exp = fedsim.Experiment(
        name="cuda",
        results=str(folder),
        rounds=2,
        modes=["local", "federated"],
        partition={"name": "iid", "num_clients": 4},
        local={"steps": 3, "batch_size": 8, "lr": 1e-3},
        executor=executor,
        **keys,
    )
    path = fedsim.run(exp, progress=False).path
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in path.rglob("*.safetensors")}


def test_two_workers_on_one_gpu_give_the_bits_of_the_serial_executor(tmp_path: Path) -> None:
    serial = _run(tmp_path / "serial", {"name": "serial", "device": "cuda:0", "threads": 1})
    pool = _run(tmp_path / "pool", {"name": "pool", "devices": ["cuda:0"], "workers": 2, "threads": 1})
    assert serial == pool


def test_workers_on_a_gpu_that_die_are_replaced_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is killed in a step, in another a kernel fails."""
    from frail import arm, armed
    from test_faults import FrailBundle

    import fedsim.runs.setup

    one = {"training": {"lanes": 1}}
    serial = _run(tmp_path / "serial", {"name": "serial", "device": "cuda:0", "threads": 1}, **one)
    points = tmp_path / "points"
    points.mkdir()
    arm(points, "federated-1-site-2-step", "kill")
    arm(points, "federated-2-site-1-step", "assert")
    monkeypatch.setenv("FEDSIM_TEST_POINTS", str(points))
    monkeypatch.setattr(fedsim.runs.setup, "WorkerSpec", FrailBundle)
    pool = _run(tmp_path / "pool", {"name": "pool", "devices": ["cuda:0"], "workers": 2, "threads": 1}, **one)
    assert armed(points) == [] and pool == serial


def test_default_executor_uses_every_device(tmp_path: Path) -> None:
    from fedsim.runs.resolve import devices_of

    kind, devices = devices_of(fedsim.Experiment())
    assert devices == [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    assert kind == ("pool" if len(devices) > 1 else "serial")


def test_cuda_and_cpu_agree_in_float64(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name, executor in (
        ("cpu", {"name": "serial", "device": "cpu"}),
        ("gpu", {"name": "serial", "device": "cuda:0"}),
    ):
        _run(tmp_path / name, executor, model={"path": "tiny", "dtype": "float64"})
    cpu, gpu = (load_file(next((tmp_path / n).rglob("global/adapter_model.safetensors"))) for n in ("cpu", "gpu"))
    for key, tensor in cpu.items():
        assert (gpu[key] - tensor).norm() <= 1e-9 * tensor.norm()


TWICE = """
import sys, torch, fedsim
torch.use_deterministic_algorithms(True)
for executor in ({"name": "serial", "device": "cuda:0"}, {"name": "pool", "devices": ["cuda:0"], "workers": 2}):
    exp = fedsim.Experiment(
        name="twice", results=sys.argv[1] + executor["name"], rounds=2, modes=["local", "federated"],
        model={"path": "tiny", "dtype": "bfloat16"}, adapter={"name": "lora", "dropout": 0.1}, training={"lanes": 2},
        partition={"name": "iid", "num_clients": 4}, local={"steps": 3, "batch_size": 8}, executor={**executor, "threads": 1},
    )
    print(fedsim.run(exp, progress=False).path)
"""


def test_a_gpu_that_promises_the_same_bits_gives_them_twice(tmp_path: Path) -> None:
    """As `environment.json` says what has to be done for it; in a process of its own, since cuBLAS is told at its start."""
    root = Path(fedsim.__file__).parent.parent
    env = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": str(root)}
    runs = []
    for which in ("first", "second"):
        command = [sys.executable, "-c", TWICE, str(tmp_path / which)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)
        assert done.returncode == 0, done.stderr
        runs += [Path(line) for line in done.stdout.split()]
    assert len(runs) == 4
    for run in runs:
        about = json.loads((run / "environment.json").read_text())["deterministic"]
        assert about["promised"] is True and about["deterministic_algorithms"] == "on"
        found = fedsim.diff_runs(runs[0], run)
        assert found.agree, str(found)


def test_a_gpu_that_promises_nothing_says_why(tmp_path: Path) -> None:
    _run(tmp_path, {"name": "serial", "device": "cuda:0", "threads": 1})
    (file,) = tmp_path.rglob("environment.json")
    about = json.loads(file.read_text())["deterministic"]
    assert about["promised"] is False and about["because"] and about["deterministic_algorithms"] == "off"
