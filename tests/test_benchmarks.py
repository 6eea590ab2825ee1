"""Each benchmark's one command runs end to end in a small size on the CPU, and what it writes is complete.

Nothing here looks at how fast anything was.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "benchmarks"
SPREAD = {"median", "min", "max"}
# `forkserver` loads the libraries once for all sides; a real run has each side load its own.
SMALL = ["--start", "forkserver", "--threads", "1", "--steps", "1", "--repeats", "1"]


def run(name: str, out: Path, *words: str) -> subprocess.CompletedProcess:
    """Run a benchmark's command from the repository's root."""
    command = [sys.executable, str(FOLDER / name / "run.py"), "--out", str(out), *SMALL, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)


def results(done: subprocess.CompletedProcess, out: Path, figure: str) -> dict[str, Any]:
    """What a run that went well has written; no path of this machine is in it."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / figure).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == sorted([figure, "results.json"]), "nothing else is left behind"
    text = (out / "results.json").read_text()
    assert str(ROOT) not in text and "/tmp" not in text
    value = json.loads(text)
    assert value["environment"]["versions"]["torch"] and value["environment"]["devices"] == ["cpu"]
    assert value["options"]["threads"] == 1
    return value


def load(name: str) -> ModuleType:
    """The module of a benchmark's command."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


def test_packing_measures_lanes_and_both_baselines(tmp_path: Path) -> None:
    words = ["--bases", "gpt2-medium,tiny", "--batches", "2", "--lanes", "1,2,4", "--processes", "2", "--clients", "3"]
    value = results(done := run("packing", tmp_path, *words), tmp_path, "packing.png")
    assert "GPU" in value["skipped"]["gpt2-medium"] and "gpt2-medium: skipped" in done.stdout
    (case,) = value["cases"]
    shape = {"base": "tiny", "batch": 2, "clients": 3, "steps": 1, "rows_of_a_round": 6}
    assert {k: case[k] for k in shape} == shape
    assert case["config"]["adapter"]["name"] == "lora" and case["config"]["model"]["path"] == "tiny"
    sides = case["sides"]
    assert set(sides) == {"plain", "2 processes", "lanes 1", "lanes 2"}, "four lanes have no four clients"
    for name, side in sides.items():
        for key in ("seconds", "samples_per_s", "tokens_per_s", "speed"):
            assert set(side[key]) == SPREAD and all(v > 0 for v in side[key].values()), (name, key)
        assert side["peak_mb"] > 0 and side["lanes"] == (2 if name == "lanes 2" else 1)
        assert side["useful_tokens"] == sides["plain"]["useful_tokens"], "all train on the same tokens"
        assert name == "plain" or side["apart"]["relative"] <= 1e-4
    assert sides["plain"]["computed_tokens"] == sides["lanes 1"]["computed_tokens"] >= sides["plain"]["useful_tokens"]
    assert 0 < sides["lanes 2"]["useful_of_computed"] <= 1
    assert value["bases"]["tiny"]["loading_s"]["2 processes"] > 0 and not value["bases"]["tiny"]["failed"]
    assert value["same_parameters"]["same"] and value["same_parameters"]["checked"]
    for name in sides:
        assert f"\n{name} " in done.stdout


def test_federation_tax_measures_all_sides_on_as_many_rows(tmp_path: Path) -> None:
    words = ["--bases", "tiny", "--batches", "2", "--clients", "3"]
    value = results(done := run("federation_tax", tmp_path, *words), tmp_path, "federation_tax.png")
    (case,) = value["cases"]
    assert case["config"]["central"]["match"] == "epochs" and not value["problems"]
    central = {"central", "central, in a lane"}
    assert set(case["sides"]) == {"federated, lanes auto", "federated, lanes 1", *central}
    for name, side in case["sides"].items():
        assert side["rows_a_round"] == [6] and set(side["seconds"]) == SPREAD and side["peak_mb"] > 0
        assert name in central or ({*SPREAD, "beside"} == set(side["tax"]) and side["tax"]["beside"] in central)
    assert case["sides"]["federated, lanes auto"]["apart"]["relative"] <= 1e-4
    assert "federated, lanes auto" in done.stdout and "tax" in done.stdout


def test_gpu_runs_the_same_code_on_the_cpu(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--clients", "2", "--batch", "2", "--tokens", "16", "--rounds", "4", "--workers", "1,2"]
    value = results(done := run("gpu", tmp_path, *words, "--matmul", "64", "--copy", "8"), tmp_path, "gpu.png")
    assert value["options"]["dtype"] == "bfloat16" and value["options"]["base"] == "gpt2-mini" and not value["failed"]
    assert value["config"]["model"] == {**value["config"]["model"], "path": "gpt2-mini", "dtype": "bfloat16"}
    assert set(value["sides"]) == {"plain", "central", "lanes 2"}
    for name, side in value["sides"].items():
        assert set(side["tokens_per_s"]) == SPREAD and side["peak_mb"] > 0 and value["share_of_peak"][name] > 0
        assert side["useful_tokens"] == 2 * 2 * 16, "one timed round of two clients' two rows of 16 tokens"
    assert set(value["speed"]) == SPREAD and set(value["tax"]) == SPREAD
    assert value["layer_parameters"] == 2 * (12 * 64 * 64 + 13 * 64), "GPT-2's two layers of 64 features"
    limits = value["limits"]
    assert limits["bf16_flops_per_s"]["best"] > 0 and limits["copy_bytes_per_s"]["best"] > 0 and limits["gpu"] is None
    found = value["aggregation"]
    assert found["bytes"] == 4 * found["trained_parameters"] * (3 * 2 + 5 * 1 + 8)
    assert found["seconds"] > 0 and 0 < found["share_of_round"]["median"] < 1
    memory = value["memory"]
    assert sum(memory["parts_mb"].values()) == pytest.approx(memory["predicted_mb"]) and memory["measured_mb"] > 0
    assert memory["lanes"] == memory["lanes_asked_for"] == 2 and memory["parts_mb"]["base"] > 0
    assert len(value["flat"]["mb"]["rss"]) == 3, "rounds 2 to 4"
    assert value["flat"]["gpu"]["value"] is None and "CUDA" in value["flat"]["gpu"]["reason"]
    assert set(value["workers"]["sides"]) == {"workers 1", "workers 2"} and value["workers"]["same_bits"]
    assert (
        "2 x parameters" not in value["share_of_peak"]["formula"] and value["share_of_peak"]["formula"] in done.stdout
    )


@pytest.mark.thorough
def test_whole_model_runs_the_same_code_on_the_cpu(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--base", "gpt-neo-mini", "--rounds", "2", "--batch", "2", "--micro", "1"]
    words += ["--tokens", "16", "--rows", "12", "--chunks", "1,4", "--matmul", "64", "--copy", "8"]
    value = results(done := run("whole_model", tmp_path, *words), tmp_path, "whole_model.png")
    full, bandwidth, large = (value[part] for part in ("full", "bandwidth", "large"))
    layers = 2 * (4 * 64 * 64 + 64 + 2 * 4 * 64 * 64 + 5 * 64 + 4 * 64)  # q, k, v, out; the MLP; two norms
    numel = layers + (1536 + 512 + 2) * 64
    assert full["parameters"] == full["trained"] == numel and full["layer_parameters"] == layers
    for part, packs in ((full, 3), (large, 1)):
        assert part["config"]["model"]["dtype"] == "bfloat16" and part["environment"]["versions"]["torch"]
        warm, counted = part["rounds"]
        assert (
            warm["tokens"] == counted["tokens"] == 3 * 2 * 16 and counted["packs"] == packs and counted["clients"] == 3
        )
        assert set(counted["parts"]) == set(part["round"]["seconds"]) - {"all"}, "nothing that a round does is left out"
        assert sum(counted["parts"].values()) == pytest.approx(counted["seconds"])
        spent, rates = part["round"]["seconds"], part["round"]["tokens_per_s"]
        assert all(
            spent[n]["median"] > 0 for n in ("training", "copying in", "adding the update", "merging", "checkpoint")
        )
        assert rates["training"]["median"] == pytest.approx(96 / spent["training"]["median"])
        assert rates["round"]["median"] == pytest.approx(96 / counted["seconds"])
        with_all = part["round"]["not_training_with"]["median"]
        assert with_all == pytest.approx(1 - spent["training"]["median"] / counted["seconds"])
        assert 0 < part["round"]["not_training_without"]["median"] < with_all < 1
        assert part["memory"]["measured_mb"] > 0 and part["memory"]["predicted_mb"] > 0
        assert part["memory"]["off"] == pytest.approx(
            part["memory"]["measured_mb"] / part["memory"]["predicted_mb"] - 1
        )
    memory = full["memory"]
    assert memory["parts_mb"]["global"] == memory["parts_mb"]["sum"] == pytest.approx(4e-6 * numel)
    assert memory["global_sum_chunk_mb"] == pytest.approx(3 * 4e-6 * numel), "a chunk holds all of so small a model"
    assert full["same_work"]["same"] and full["plain"]["rounds"][0]["tokens"] == 2 * 16
    assert large["lanes"] == {"asked_for": 3, "had": 3, "packs_a_round": 1, "why_not": None}
    assert list(bandwidth["chunks"]) == ["1", "4"] and bandwidth["result_is_off_by"] == 0
    moved = {"copying in": 4, "adding": 4, "clearing": 1, "server step": 3, "a round": 4 * 3 + 4}
    assert bandwidth["bytes"] == {name: 4 * numel * times for name, times in moved.items()}
    copy = bandwidth["limits"]["copy_bytes_per_s"]["best"]
    for seconds in bandwidth["chunks"].values():
        for name, nbytes in bandwidth["bytes"].items():
            found = seconds[name]["of_copy_bandwidth"] * copy * seconds[name]["median"]
            assert found == pytest.approx(nbytes), "bytes a second over the copy's"
    assert bandwidth["default"]["value"] is None and "16 MiB" in bandwidth["default"]["reason"]
    for words in (
        "not training, without scoring and files",
        "beyond the plain loop",
        "3 lanes, 1 pack(s)",
        "chunk MiB",
    ):
        assert words in done.stdout

    # One part alone leaves the others as they are; without room on the disk it says so.
    small = ["--device", "cpu", "--part", "full", "--rounds", "2"]
    script = "import runpy, shutil, sys; from types import SimpleNamespace; sys.argv = sys.argv[1:]; "
    script += (
        "shutil.disk_usage = lambda path: SimpleNamespace(free=10**6); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", script, str(FOLDER / "whole_model" / "run.py"), "--out", str(tmp_path), *small]
    done = subprocess.run([*command, *SMALL[2:], "--base", "gpt-neo-mini"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["full"]["value"] is None and "GB of disk are needed, 0 are free" in again["full"]["reason"]
    assert again["bandwidth"] == bandwidth and again["large"] == large


def test_a_round_is_divided_among_the_innermost_of_what_is_timed() -> None:
    """training 1 + (start 2) + 3 + (score 4) + 5, then merge 6, and 7 that nobody asked for."""
    now = [0.0]
    clock = load("whole_model").Clock(lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    start, score, merge = (clock.timed(n, passes) for n in ("start", "score", "merge"))

    def train() -> None:
        passes(1)
        start(2)
        passes(3)
        score(4)
        passes(5)

    passes(100)
    clock.begin()
    clock.timed("training", train)()
    merge(6)
    passes(7)
    clock.end(tokens=8)
    expected = {"training": 9, "start": 2, "score": 4, "merge": 6, "other": 7}
    assert clock.rounds == [{"seconds": 28, "parts": expected, "tokens": 8}]
    clock.end()
    assert clock.rounds[1] == {"seconds": 0, "parts": {"other": 0}}, "the next round begins where one ends"


def test_shares_of_a_round_and_the_steps_that_meet_the_target() -> None:
    whole = load("whole_model")
    warm = {"seconds": 99.0, "tokens": 1, "parts": {"training": 99.0}}
    parts = {"training": 16.0, "copying in": 1.0, "adding the update": 1.0, "merging": 1.5, "other": 0.5}
    counted = {"seconds": 25.0, "tokens": 80, "parts": {**parts, "scoring": 2.0, "checkpoint": 3.0}}
    found = whole.round_of([warm, counted], steps=10)
    assert found["counted"] == 1 and found["seconds"]["best model to disk"]["median"] == 0
    without, everything = found["not_training_without"], found["not_training_with"]
    assert (without["median"], everything["median"]) == (4 / 20, 9 / 25)
    # 10 steps take 16 s: n of them take 1.6 n, and 4 / (1.6 n + 4) = 0.05 at n = 47.5.
    assert without["steps_for_target"] == pytest.approx(47.5)
    assert everything["steps_for_target"] == pytest.approx(47.5 * 9 / 4)
    assert {n: r["median"] for n, r in found["tokens_per_s"].items()} == {"training": 5.0, "without": 4.0, "round": 3.2}


def test_packing_tells_other_work_from_the_same() -> None:
    packing = load("packing")

    def case(apart: float) -> list[dict[str, Any]]:
        return [{"base": "tiny", "batch": 1, "sides": {"plain": {}, "lanes 2": {"apart": {"relative": apart}}}}]

    assert packing.verdict(case(9e-5), "float32")[1] and not packing.verdict(case(2e-4), "float32")[1]
    assert not packing.verdict([*case(float("nan")), *case(1e-6)], "float32")[1]
    assert not packing.verdict([], "float32")[1], "nothing compared is not the same"


def test_a_difference_is_told_over_the_norm_of_all_parameters(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    common = load("packing").common
    start, plain, other = (tmp_path / f"{n}.safetensors" for n in ("start", "plain", "other"))
    save_file({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([2.0])}, start)
    save_file({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}, plain)
    save_file({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.5])}, other)
    found = common._compare({"x": str(other)}, str(plain), str(start))["x"]
    assert found == {"relative": 0.5 / 5, "worst_tensor": 0.5 / 4, "of_the_change": 0.5 / 2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run("gpu", tmp_path, "--device", "cuda")
    assert done.returncode == 2 and "use --device cpu" in done.stderr.splitlines()[-1] and not done.stdout
