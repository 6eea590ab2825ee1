"""The same seed, config, lanes and threads give the same numbers, whatever else is different; another seed gives others."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Lab, metrics_lines
from tiers import fast_only

import fedsim
import fedsim.runs.run
import fedsim.runs.setup
from fedsim.analysis.diff import diff_runs
from fedsim.core import numerics
from fedsim.runs.build import batches, prepare
from fedsim.runs.environment import environment
from fedsim.runs.resolve import schedule_of
from fedsim.runs.worker_spec import WorkerSpec

ROOT = Path(fedsim.__file__).parent.parent
# Clients of unlike size in cohorts below all, passes instead of steps, short last batches, dropout: where lanes, packs and
# workers are all uneven. float32, where the order of sums shows.
UNEVEN: dict[str, Any] = {
    "modes": ["local", "federated", "central"],
    "rounds": 2,
    "model": {"dtype": "float32"},
    "adapter": {"name": "lora", "r": 3, "dropout": 0.2},
    "data": {"columns": {"sentence": "sentence", "label": "label"}},
    "partition": {"name": "quantity", "num_clients": 5, "min_rows": 4},
    "cohort": {"size": 4},
    "local": {"steps": None, "epochs": 1, "batch_size": 4},
    "evaluate": {"every_steps": 3},
}
KEY = ("round", "scope", "client", "step", "split", "name")


@pytest.fixture(scope="module")
def _home(tmp_path_factory: pytest.TempPathFactory, _shared: Any) -> tuple[Lab, Path]:
    import fedsim.analysis.plots

    place = Lab(tmp_path_factory.mktemp("repeat"), *_shared)
    threads, draw = torch.get_num_threads(), fedsim.plots.save_figures
    torch.set_num_threads(1)
    fedsim.plots.save_figures = lambda folder: []
    try:
        return place, place.run(name="plain", **UNEVEN)
    finally:
        fedsim.plots.save_figures = draw
        torch.set_num_threads(threads)


@pytest.fixture
def plain(_home: tuple[Lab, Path]) -> Path:
    """The experiment above, in this process and left in peace."""
    return _home[1]


def agree(lab: Lab, one: Path, other: Path) -> None:
    """Two runs hold the same bits, the partition too, and `fedsim diff` says so."""
    lab.same_bits(one, other)
    for name in ("partition.npz", "partition.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    found = diff_runs(one, other)
    assert found.agree, str(found)


def rows(lab: Lab, run: Path) -> dict[tuple[Any, ...], tuple[float, float]]:
    return {tuple(r[k] for k in KEY): (r["value"], r["weight"]) for r in lab.metrics(run)}


# ------------------------------------------------------------------------------------------------- where it runs


@dataclasses.dataclass
class Late(WorkerSpec):
    """The run's bundle, whose first packs of a round take longest: later ones are ready before them."""

    def worker(self, *args: Any) -> Any:
        made = super().worker(*args)
        train = made.train

        def late(pack: Any, *rest: Any, **keys: Any) -> Any:
            done = train(pack, *rest, **keys)
            time.sleep(max(0.0, 0.4 - 0.2 * pack.index))
            return done

        made.train = late
        return made


@fast_only(1)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_whoever_is_first(
    workers: int, lab: Any, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedsim.runs.setup, "WorkerSpec", Late)
    pool = {"name": "pool", "devices": ["cpu"], "workers": workers, "threads": 1}
    agree(lab, plain, lab.run(name=f"pool-{workers}", **{**UNEVEN, "executor": pool, "training": {"lanes": 2}}))


@pytest.mark.thorough
def test_large_updates_in_any_order(lab: Any, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that go straight into the one sum; every pack is of one client, the longest is the last to be ready."""
    monkeypatch.setattr(fedsim.runs.setup, "WorkerSpec", Late)
    monkeypatch.setattr("fedsim.executors.pool._SLOTS_BELOW", 0)
    pool = {"name": "pool", "devices": ["cpu"], "workers": 2, "threads": 1}
    alone = {**UNEVEN, "modes": ["federated"], "training": {"lanes": 1}, "evaluate": {"clients": False}}
    agree(lab, lab.run(name="serial", **alone), lab.run(name="pool", **{**alone, "executor": pool}))


def backwards(tree: Any) -> Any:
    """The same mapping, every key in the opposite order."""
    return {k: backwards(v) for k, v in reversed(tree.items())} if isinstance(tree, dict) else tree


def test_the_command_line_in_another_place_time_zone_locale_and_order(lab: Any, plain: Path) -> None:
    """With its progress on, strings hashed otherwise, keys and columns in another order, paths relative to another folder."""
    tree = lab.tree(name="plain", **UNEVEN)
    tree["results"] = "elsewhere"
    for key in ("path", "validation", "test"):
        tree["data"][key] = os.path.relpath(tree["data"][key], lab.root)
    place = lab.root / "other"
    place.mkdir()
    (lab.root / "typed.yaml").write_text(yaml.safe_dump(backwards(tree), sort_keys=False), encoding="utf-8")
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "OMP_", "MKL_", "PYTHON"))}
    own = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77", "TZ": "Asia/Kathmandu", "OMP_NUM_THREADS": "2"}
    own |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "COLUMNS": "40"}
    command = [sys.executable, "-m", "fedsim", "run", "../typed.yaml"]
    done = subprocess.run(command, cwd=place, env={**bare, **own}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (folder,) = (place / "elsewhere" / "plain").iterdir()
    assert folder.name == plain.name, "the same id"
    agree(lab, plain, folder)


@pytest.mark.thorough
def test_a_notebook_whose_torch_is_set_otherwise(lab: Any, plain: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    cells = [
        "import random, numpy as np, torch, fedsim\nfedsim.plots.save_figures = lambda folder: []",
        "random.seed(5); np.random.seed(5); torch.manual_seed(5); torch.set_default_dtype(torch.float64)",
        f"torch.set_grad_enabled(False)\nrun = fedsim.run({lab.tree(name='cell', **UNEVEN)!r})\nprint(run.path)",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(lab.root)}}).execute()
    said = "".join(out["text"] for out in book.cells[-1]["outputs"] if out.get("name") == "stdout")
    agree(lab, plain, Path(said.strip().splitlines()[-1]))


# ---------------------------------------------------------------------------------------------- what torch was told


@pytest.fixture
def disturbed() -> Iterator[Callable[[], dict[str, Any]]]:
    """Everything is set that a script may have set before; a call says how it is now."""

    def state() -> dict[str, Any]:
        places = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
        return {
            "dtype": torch.get_default_dtype(),
            "device": torch.get_default_device(),
            "precision": [place.fp32_precision for place in places],
            "kernels": numerics.kernels(),
            "fill": torch.utils.deterministic.fill_uninitialized_memory,
            "threads": torch.get_num_threads(),
            "flushes": numerics._flushes(),
            "draws": (torch.initial_seed(), torch.rand(1, device="cpu").item(), random.random(), np.random.random()),
        }

    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)

    try:
        yield state
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_a_thread_of_a_process_whose_torch_is_set_otherwise(
    lab: Any, plain: Path, disturbed: Callable[[], dict[str, Any]]
) -> None:
    """All switches at once, in a thread that has autocast on and gradients off; afterwards they are as they were."""
    exp, state = lab.exp(name="thread", **UNEVEN), disturbed
    found: list[Any] = []

    def reseed() -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(11)

    def body() -> None:
        torch.set_flush_denormal(True)  # of a thread, as is what follows
        torch.set_default_device("meta")
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            reseed()
            before = state()
            reseed()
            path = fedsim.run(exp, progress=False).path
            found.extend([path, before, state(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")])

    worker = threading.Thread(target=body)
    worker.start()
    worker.join()
    path, before, after, grad, autocast = found
    assert before["dtype"] == torch.float64 and before["flushes"] and before["kernels"] == "on"
    assert after == before, "switches, and the streams of random numbers that are the user's own"
    assert not grad and autocast
    agree(lab, plain, path)


def test_switches_are_given_back_after_an_error(disturbed: Callable[[], dict[str, Any]]) -> None:
    before = {k: v for k, v in disturbed().items() if k != "draws"}

    def fails() -> None:
        with torch.no_grad(), numerics.settled(["cpu"]):
            assert torch.is_grad_enabled() and torch.empty(1).dtype == torch.float32
            assert torch.empty(1).device.type == "cpu" and numerics.kernels() == "warn"
            assert not numerics._flushes()
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert {k: v for k, v in disturbed().items() if k != "draws"} == before
    with numerics.settled(["cuda:0"]):
        assert numerics.kernels() == "on", "on a GPU it is the user's to say"


def test_repeated_places_are_added_up_in_one_order_on_the_cpu() -> None:
    """The gradient of x[i, j] with two threads: torch adds atomically unless it is told not to."""

    def gradient() -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(2, 4, 64, generator=draw).requires_grad_()
        i, j = (torch.randint(n, (20_000,), generator=draw) for n in (2, 4))
        y = x[i, j]
        (y * torch.randn(y.shape, generator=draw)).sum().backward()
        return x.grad

    with numerics.settled(["cpu"]), numerics.threads(2):
        first = gradient()
        assert all(torch.equal(first, gradient()) for _ in range(5))


# ------------------------------------------------------------------------------------------- how often it is scored

OFTEN: dict[str, Any] = {
    **UNEVEN,
    "rounds": 3,
    "partition": {"name": "quantity", "num_clients": 4, "min_rows": 6},
    "cohort": {"size": 3},
    "training": {"lanes": 3},
    "local": {"steps": None, "epochs": 1, "batch_size": 4},
}


def in_common(lab: Lab, one: Path, other: Path) -> None:
    """The rows that both runs have, the last models and what was exported of them are the same; `fedsim diff` says so.

    Test rows are the chosen models', and which are chosen depends on where they were scored.
    """
    a, b = ({k: v for k, v in rows(lab, run).items() if k[4] != "test"} for run in (one, other))
    both = a.keys() & b.keys()
    train = {k for k in a if k[4] == "train"}
    assert train <= both and len(both) > len(train), "what training says of itself, and some scores"
    assert {k: a[k] for k in both} == {k: b[k] for k in both}
    models = [
        {n: t for n, t in lab.tensors(run).items() if "best" not in n and "checkpoints" not in n}
        for run in (one, other)
    ]
    assert models[0].keys() == models[1].keys() and models[0]
    for file, tensors in models[0].items():
        assert all(torch.equal(t, models[1][file][n]) for n, t in tensors.items()), file
    found = diff_runs(one, other)
    assert found.agree, str(found)


@pytest.mark.thorough
def test_rows_that_two_runs_have_are_the_same_at_any_evaluation_frequency(lab: Any) -> None:
    """Clients of unlike length, so that other lanes of a pack are due at other frequencies."""
    every = lab.run(name="every", **{**OFTEN, "evaluate": {"every_steps": 1}})
    sparse = {
        "never": {},
        "second": {"every_steps": 2},
        "last": {"every_rounds": 3},
        "merged": {"every_steps": 3, "every_rounds": 2, "clients": False},
    }
    runs = [lab.run(name=name, **{**OFTEN, "evaluate": ev}) for name, ev in sparse.items()]
    for run in runs:
        in_common(lab, every, run)
    in_common(lab, runs[1], runs[3])


def test_progress_trackers_and_checkpoints_change_nothing(
    lab: Any, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker that draws from every stream of random numbers, progress on, a checkpoint every second round."""
    from accelerate import tracking

    logged = []

    class Tracker:
        name = "tensorboard"

        def __init__(self, run_name: str, logging_dir: Path) -> None:
            self.finish = lambda: None
            self.start = lambda: None
            self.store_init_configuration = lambda config: None

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append(values)
            torch.manual_seed(len(logged)), np.random.seed(len(logged)), random.seed(len(logged))

    monkeypatch.setattr("fedsim.runs.trackers.check_trackers", lambda names: None)
    monkeypatch.setattr("fedsim.runs.run.check_trackers", lambda names: None)
    monkeypatch.setattr(tracking, "TensorBoardTracker", Tracker)
    keys = {**UNEVEN, "tracking": {"with": ["tensorboard"]}, "checkpoint": {"every": 2, "keep": 1}}
    run = fedsim.run(lab.exp(name="tracked", **keys), progress=True).path
    told = metrics_lines(run)  # what checkpoints took, too
    assert 0 < len(logged) < len(told) / 5
    assert lab.metrics(run) == lab.metrics(plain)
    found = diff_runs(plain, run)
    assert found.agree, str(found)
    assert (run / "scores.npz").read_bytes() == (plain / "scores.npz").read_bytes()


def test_rows_scored_at_once_decide_the_last_bits_alone(lab: Any, plain: Path) -> None:
    """`evaluate.batch_size`: the models are the same, scores up to rounding; `fedsim diff` says so."""
    other = lab.run(name="batches", **{**UNEVEN, "evaluate": {"every_steps": 3, "batch_size": 7}})
    a, b = rows(lab, plain), rows(lab, other)
    losses = [k for k in a if k[5] == "loss"]
    assert losses and all(a[k][0] == pytest.approx(b[k][0], rel=1e-5) for k in losses)
    assert {k: v for k, v in a.items() if k[4] == "train"} == {k: v for k, v in b.items() if k[4] == "train"}
    found = diff_runs(plain, other, rtol=1e-5)
    assert found.agree, str(found)
    assert "evaluate.batch_size 64 / 7" in str(found)


@fast_only(0)
@pytest.mark.parametrize(
    "keys",
    [
        {"adapter": {"name": "p_tuning", "num_virtual_tokens": 3}},
        {"adapter": {"name": "prefix", "num_virtual_tokens": 3}, "evaluate": {"generate": True, "max_new_tokens": 2}},
        {"adapter": {"name": "adapter", "bottleneck": 4}, "partition": {"name": "virtual", "num_clients": 40}},
        {"adapter": {"name": "none"}, "model": {"dtype": "float32", "base_dropout": True}, "modes": ["federated"]},
    ],
    ids=lambda keys: keys["adapter"]["name"],
)
def test_other_methods_at_another_frequency_and_twice(keys: dict[str, Any], lab: Any) -> None:
    keys = {**UNEVEN, "modes": ["local", "federated"], "partition": {"name": "iid", "num_clients": 3}, **keys}
    keys["cohort"] = {"size": 2}
    if keys["partition"]["name"] == "virtual":
        keys["partition"] = {**keys["partition"], "min_rows": 3, "max_rows": 9}
    ev = keys.get("evaluate", {})
    once = lab.run(name="once", **{**keys, "evaluate": {**ev, "every_steps": 1}})
    torch.manual_seed(1)
    agree(lab, once, lab.run(name="twice", **{**keys, "evaluate": {**ev, "every_steps": 1}}))
    in_common(lab, once, lab.run(name="seldom", **{**keys, "evaluate": {**ev, "every_steps": None, "every_rounds": 2}}))


# -------------------------------------------------------------------------------------------------------- the seed


def test_the_seed_changes_cohort_batches_partition_and_initialization(lab: Any, tmp_path: Path) -> None:
    """Looked at one by one: a result alone would change with any of them."""
    exps = [lab.exp(seed=seed, **UNEVEN) for seed in (0, 0, 1)]
    parts = [prepare(exp) for exp in exps]
    cohorts = [[schedule_of(p, "federated").cohort(r).tolist() for r in range(1, 9)] for p in parts]
    assert cohorts[0] == cohorts[1] != cohorts[2]
    assert len({tuple(c) for c in cohorts[0]}) > 1, "and with the round"
    held = [{c: p.partition.rows(c).tolist() for c in range(5)} for p in parts]
    assert held[0] == held[1] != held[2]
    # Of batches the order alone, on the same rows: the partition is given.
    columns = {"partition": {"name": "iid", "num_clients": 1}}
    drawn = [
        [[b.tolist() for b in batches(lab.exp(seed=seed, **{**UNEVEN, **columns, "cohort": {"size": "all"}}), 0, r)]
         for r in (1, 2)]
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[2][0] and drawn[0][0] != drawn[0][1]
    assert sorted(chain(*drawn[0][0])) == sorted(chain(*drawn[2][0])), "the same rows in another order"
    short = {"modes": ["federated"], "rounds": 1, "local": {"steps": 1, "batch_size": 2}}
    starts = []
    for i, seed in enumerate((0, 0, 1)):
        run = lab.run(name=f"init-{i}", seed=seed, **short)
        starts.append(next(t for n, t in lab.tensors(run).items() if n.startswith("init/")))
    first, again, other = starts
    changed = [n for n in first if not torch.equal(first[n], other[n])]
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert changed and all(("lora_A" in n) == (n in changed) for n in first), "B starts at zero"


# ------------------------------------------------------------------------------------------------ what is promised


def test_a_run_says_whether_its_device_gives_the_same_bits(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads((plain / "environment.json").read_text())["deterministic"] == {"promised": True}
    assert environment(["cpu", "cpu"], 1)["deterministic"] == {"promised": True}

    names = {"cuda:0": "one kind", "cuda:1": "one kind", "cuda:2": "another"}
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    about = numerics.promise(["cuda:0", "cuda:1"])
    assert about["promised"] is False and about["deterministic_algorithms"] == "off"
    assert any("scaled_dot_product_attention" in reason for reason in about["because"])
    assert "use_deterministic_algorithms" in about["way_out"] and about["cublas_workspace_config"] == ":4096:8"
    for mode, promised in (("warn", False), ("on", True)):
        numerics.use_kernels(mode)
        try:
            assert numerics.kernels() == mode
            about = numerics.promise(["cuda:0", "cuda:1"])
            mixed = [numerics.promise(devices) for devices in (["cuda:0", "cuda:2"], ["cuda:0", "cpu"])]
        finally:
            numerics.use_kernels("off")
        assert about["promised"] is promised and about["deterministic_algorithms"] == mode
        assert ("because" in about) is not promised
        for each in mixed:
            assert each["promised"] is False and "several kinds" in each["because"][0]
    json.dumps(about)
