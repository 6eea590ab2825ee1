"""Users' scripts as clients: against plain loops, and whatever stops, spreads or breaks them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

import fedsim
from fedsim.core.errors import ClientError, UserError

PLUS = """
import os, random, sys
import numpy as np
import fedsim.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    w = model.params["w"]
    by = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    flare.log("drawn", random.random())
    flare.send(flare.FLModel(params={"w": w + by}, metrics={"mean": float(w.mean())}, meta={"NUM_STEPS_CURRENT_ROUND": 2}))
"""
REGRESSION = """
import argparse
import numpy as np, torch
import fedsim.client as flare
from model import Net, data

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=3)
steps = parser.parse_args().steps
flare.init()
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
x, y = data(flare.get_site_name())
while flare.is_running():
    model = flare.receive()
    net.load_state_dict(model.params)
    with torch.no_grad():
        loss = float(torch.nn.functional.mse_loss(net(x), y))
    for _ in range(steps):
        batch = torch.randperm(len(x))[:8]
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x[batch]), y[batch]).backward()
        optimizer.step()
    flare.send(flare.FLModel(params=net.state_dict(), metrics={"loss": loss}, meta={"NUM_STEPS_CURRENT_ROUND": steps}))
"""
MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        torch.nn.init.zeros_(self.layer.bias)
        torch.nn.init.constant_(self.layer.weight, 0.1)

    def forward(self, x):
        self.seen += 1
        return self.layer(x)

def data(site):
    rng = torch.Generator().manual_seed(int(site.split("-")[1]))
    x = torch.randn(20, 4, dtype=torch.float64, generator=rng)
    return x, x @ torch.ones(4, 2, dtype=torch.float64) + 0.1 * torch.randn(20, 2, dtype=torch.float64, generator=rng)
"""


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """Runs a script's text as clients."""

    def make(text: str, *, clients: Any = 3, rounds: int = 3, start: Any = None, name: str = "c", **keys: Any) -> Path:
        (tmp_path / "model.py").write_text(MODEL)
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        if "init" not in keys:
            np.savez(tmp_path / "start.npz", w=np.zeros((2, 3), np.float32) if start is None else start)
            keys["init"] = str(tmp_path / "start.npz")
        keys = {"results": str(tmp_path / "results"), **keys}
        return fedsim.run_script(file, clients=clients, rounds=rounds, progress=False, **keys).path

    return make


def rows(run: Path, **where: Any) -> list[float]:
    lines = [json.loads(line) for f in sorted(run.glob("metrics/*.jsonl")) for line in f.read_text().splitlines()]
    return [r["value"] for r in lines if all(r[k] == v for k, v in where.items())]


def same(one: Path, other: Path) -> None:
    """The same models to the bit, and the same metrics but for times."""
    files = sorted(f.relative_to(one) for f in one.glob("*/**/*.safetensors") if "checkpoints" not in f.parts)
    assert files and files == sorted(
        f.relative_to(other) for f in other.glob("*/**/*.safetensors") if "checkpoints" not in f.parts
    )
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    left = [
        [
            (r["round"], r["client"], r["split"], r["name"], r["value"])
            for r in map(json.loads, (run / "metrics/federated.jsonl").read_text().splitlines())
            if not r["name"].startswith("checkpoint")
        ]
        for run in (one, other)
    ]
    assert left[0] == left[1]


def test_a_script_adds_one(script: Any) -> None:
    """Three rounds from zero, in both modes; the scores are of the models received."""
    run = script(PLUS, modes=["local", "federated"])
    for place in ("global", "local/site-1", "local/site-3"):
        held = load_file(run / place / "model.safetensors")
        assert held.keys() == {"w"} and held["w"].dtype == np.float32 and (held["w"] == 3).all(), place
    assert (load_file(run / "best" / "model.safetensors")["w"] == 2).all()  # the last model that clients scored
    assert rows(run, scope="federated", split="validation", name="mean", client=None) == [0.0, 1.0, 2.0]
    assert len(set(rows(run, scope="federated", name="drawn"))) == 9  # streams of their own
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert not {"model", "data", "partition", "local"} & config.keys() and config["client"]["script"].endswith("c.py")
    again = fedsim.run(fedsim.Experiment.load(run / "config.yaml"), progress=False)
    assert again.path.resolve() == run.resolve()


def test_a_torch_script_is_a_plain_loop(script: Any, tmp_path: Path) -> None:
    """FedAvg weighted by steps, of clients whose arguments differ; each draws from its own stream, once seeded."""
    from fedsim.core.seeding import stream_seed

    keys = {"exchange": "torch", "init": f"{tmp_path}/model.py:Net"}
    clients = {"site-1": "--steps 2", "site-2": "--steps 5", "site-3": ""}
    run = script(REGRESSION, clients=clients, name="reg", **keys)
    space: dict[str, Any] = {}
    exec(MODEL, space)
    world = {n: t.clone() for n, t in space["Net"]().state_dict().items()}
    states = {}
    losses = []
    for _ in range(3):
        sent, scored = {}, {}
        for k, steps in (("site-1", 2), ("site-2", 5), ("site-3", 3)):
            net = space["Net"]()
            if k in states:
                torch.set_rng_state(states[k])
            else:
                torch.manual_seed(stream_seed(0, "script", k))
                space["Net"]()
            net.load_state_dict(world)
            x, y = space["data"](k)
            scored[k] = float(torch.nn.functional.mse_loss(net(x), y))
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
            for _ in range(steps):
                batch = torch.randperm(len(x))[:8]
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(net(x[batch]), y[batch]).backward()
                optimizer.step()
            states[k], sent[k] = torch.get_rng_state(), (steps, net.state_dict())
        total = sum(steps for steps, _ in sent.values())
        losses.append(sum(sent[k][0] * v for k, v in scored.items()) / total)
        mean = {n: sum(s * p[n].double() for s, p in sent.values()) / total for n in world}
        world = {n: t.round().to(world[n].dtype) if world[n].dtype == torch.int64 else t for n, t in mean.items()}
    held = load_file(run / "global" / "model.safetensors")
    assert held["seen"].dtype == np.int64
    for name in ("layer.weight", "layer.bias"):
        assert np.abs(held[name] - world[name].numpy()).max() < 1e-12
    found = rows(run, scope="federated", split="validation", name="loss", client=None)
    assert found == pytest.approx(losses, abs=1e-12)


@pytest.mark.parametrize("launch", ["once", "each_round"])
def test_workers_and_stops_change_no_bit(script: Any, tmp_path: Path, launch: str) -> None:
    """A script that lives on is given its tasks again, and brings its optimizer, random states and arguments back."""
    keys = {"exchange": "torch", "init": f"{tmp_path}/model.py:Net", "launch": launch, "name": "reg", "clients": 4}
    keys |= {"cohort": {"size": 3}}
    one = script(REGRESSION, **keys, results=str(tmp_path / "one"))
    pool = script(
        REGRESSION, **keys, results=str(tmp_path / "pool"), executor={"name": "pool", "workers": 2, "devices": ["cpu"]}
    )
    same(one, pool)

    def stop(end: Any) -> None:
        if end.round == 2:
            raise KeyboardInterrupt

    own = {"script": str(tmp_path / "reg.py"), **{k: keys[k] for k in ("exchange", "init", "launch")}}
    tree = {
        "name": "reg",
        "client": own,
        "clients": 4,
        "rounds": 3,
        "cohort": {"size": 3},
        "results": str(tmp_path / "two"),
    }
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(tree, progress=False, callback=stop)
    same(one, fedsim.run(tree, progress=False).path)


def test_a_replay_that_gives_another_answer_is_refused(script: Any, tmp_path: Path) -> None:
    text = PLUS.replace("w + by", "w + by + os.getpid()")

    def stop(end: Any) -> None:
        raise KeyboardInterrupt

    script(PLUS)
    (tmp_path / "odd.py").write_text(text)
    tree = {
        "name": "odd",
        "client": {"script": str(tmp_path / "odd.py"), "init": str(tmp_path / "start.npz")},
        "rounds": 2,
    }
    tree["results"] = str(tmp_path / "odd")
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(tree, progress=False, callback=stop)
    with pytest.raises(UserError, match="gives another answer to round 1 than before the stop"):
        fedsim.run(tree, progress=False)


WRONG = [
    ("receive()\nsend(FLModel(params={'w': np.zeros(2)}))", "round 1: w has shape (2,), received (2, 3)"),
    (
        "m = receive()\nsend(FLModel(params={'v': m.params['w']}))",
        "round 1: parameters v, w were not received; send the names",
    ),
    ("receive()", "ends without an answer to the task train: call send once"),
    ("receive()\nclear()\nreceive()", "asks for the next task without an answer to the task train"),
    ("m = receive()\nsend(m)\nsend(FLModel(params={'w': 1}))", "send without receive"),
    ("m = receive()\nsend(m, clear_cache=False)\nsend(m)", "this task has its answer already"),
    ("m = receive()\nsend(m)", "ended after its first tasks and there is one more"),
    ("receive()\nraise ZeroDivisionError('of mine')", "ZeroDivisionError: of mine"),
    ("receive()\nraise SystemExit(3)", "ended by SystemExit: 3"),
    ("receive()\nsend(FLModel())", "neither params nor metrics"),
    ("receive()\nsend(FLModel(metrics={'a': 1}))", "the answer to train has no params"),
]


@pytest.mark.parametrize(("lines", "said"), WRONG, ids=[w[0][:40] for w in WRONG])
def test_a_wrong_script_is_told_with_client_and_round(script: Any, lines: str, said: str) -> None:
    text = "import numpy as np\nfrom fedsim.client import *\ninit()\n" + lines
    with pytest.raises((UserError, ClientError)) as error:
        script(text, clients=1, name="wrong")
    assert said in str(error.value) and "client site-1" in str(error.value)
    assert "runner.py" not in str(error.value) and "pool.py" not in str(error.value)


def test_what_scripts_change_is_exchanged_at_each_hand_over(script: Any, tmp_path: Path) -> None:
    """Working directory, environment, arguments, random states, warnings, logging and modules beside the script."""
    text = """
import logging, os, random, sys, warnings
import numpy as np
import torch
import fedsim.client as flare
import model
flare.init()
site = flare.get_site_name()
os.environ["WHO"], sys.argv[1:], model.who = site, [site], site
os.makedirs(site, exist_ok=True)
os.chdir(site)
random.seed(site); np.random.seed(7); torch.set_default_dtype(torch.float64 if site == "site-1" else torch.float32)
logging.getLogger().setLevel(10 + int(site[-1]))
turns = 0
while flare.is_running():
    got = flare.receive()
    assert os.environ["WHO"] == site and sys.argv[1:] == [site] and os.getcwd().endswith(site) and model.who == site
    assert torch.get_default_dtype() == (torch.float64 if site == "site-1" else torch.float32)
    assert logging.getLogger().level == 10 + int(site[-1])
    turns += 1
    flare.log("turn", turns)
    flare.log("python", random.random())
    flare.log("numpy", np.random.rand())
    flare.send(got)
raise SystemExit(0)
"""
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        run = script(text, clients=2, name="own")
    finally:
        os.chdir(before)
    plain = np.random.RandomState(7).rand(3)
    for site in ("site-1", "site-2"):
        assert rows(run, client=site, name="turn") == [1, 2, 3]
        assert rows(run, client=site, name="numpy") == plain.tolist()


def test_a_script_that_raises_is_skipped_where_faults_are(script: Any) -> None:
    text = PLUS.replace(
        "    w = model",
        "    if flare.get_site_name() == 'site-2' and model.current_round == 1:\n        raise ValueError('mine')\n    w = model",
    )
    with pytest.raises(ClientError, match=r"client site-2, round 2: its script raised:\n(.|\n)*ValueError: mine"):
        script(text)
    run = script(text, faults={"policy": "skip"}, name="skips")
    assert (load_file(run / "global" / "model.safetensors")["w"] == 3).all()
    assert rows(run, client="site-2", split="fault") == [pytest.approx(float("nan"), nan_ok=True)]


LOADS = """
import os
import torch
import fedsim.client as flare
flare.init()
data = torch.utils.data.TensorDataset(torch.arange(8.0))
loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2)
while flare.is_running():
    model = flare.receive()
    flare.log("sum", sum(float(b[0].sum()) for b in loader))
    flare.log("pid", os.getpid())
    flare.log("workers", loader.num_workers)
    flare.send(model)
"""


@pytest.mark.parametrize("spawn", [False, True])
def test_data_loaders_have_workers_where_each_client_has_a_process(script: Any, spawn: bool) -> None:
    run = script(LOADS, clients=2, rounds=1, spawn=spawn, name="loads")
    assert rows(run, name="sum") == [28.0, 28.0] and rows(run, name="workers") == [2.0 * spawn] * 2
    assert len(set(rows(run, name="pid"))) == 1 + spawn


SHARES = """
import torch
from transformers import AutoModelForCausalLM
import fedsim.client as flare
flare.init()
model = AutoModelForCausalLM.from_pretrained(BASE)
while flare.is_running():
    got = flare.receive()
    flare.log("where", next(model.parameters()).data_ptr() % 2**40)
    flare.send(got)
"""


@pytest.mark.parametrize("share", [False, True])
def test_a_base_is_shared_where_asked(script: Any, lab: Any, share: bool) -> None:
    run = script(
        SHARES.replace("BASE", repr(str(lab.base("llama")))), clients=2, rounds=1, share_base=share, name="base"
    )
    assert len(set(rows(run, name="where"))) == 2 - share


def test_rounds_that_scripts_were_told_stay(script: Any, tmp_path: Path) -> None:
    run = script(PLUS, rounds=2)
    tree = yaml.safe_load((run / "config.yaml").read_text()) | {"rounds": 3}
    with pytest.raises(UserError, match="which its scripts were told"):
        fedsim.run(tree, progress=False, resume=run)


def test_a_sweep_of_scripts_and_the_metric_that_chooses(script: Any, tmp_path: Path) -> None:
    run = script(PLUS.replace("w + by", "w - by"), metric="mean", name="down")
    assert (load_file(run / "best" / "model.safetensors")["w"] == 0).all()
    own = {"script": str(tmp_path / "down.py"), "init": str(tmp_path / "start.npz")}
    tree = {"rounds": 2, "client": own, "results": str(tmp_path / "swept")}
    swept = fedsim.run_sweep(
        {"name": "s", "experiment": tree, "grid": {"clients": [1, 2]}}, progress=False, metric="mean"
    )
    assert not swept.failed and swept.table("mean")["last"].tolist() == [-1.0, -1.0]


def test_names_of_clients_never_lead_out_of_the_run(script: Any, tmp_path: Path) -> None:
    run = script(PLUS + "print('here')\n", clients=["../../out", "a/b", "site"], rounds=1)
    inside = {f.relative_to(run) for f in run.rglob("*.log")}
    assert len(inside) == 3 and set(tmp_path.rglob("*.log")) == {run / f for f in inside}
    assert set(rows(run, name="merged_mean")) == {0.0}
    with pytest.raises(UserError, match="clients: .* has a twice"):
        script(PLUS, clients=["a", "a"])


def test_damage_to_a_finished_run_is_named(script: Any, capfd: Any) -> None:
    run = script(PLUS, rounds=1)
    with (run / "global" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    fedsim.run(fedsim.Experiment.load(run / "config.yaml"), progress=True)
    assert "global/model.safetensors" in capfd.readouterr().err


def test_fifty_clients_in_one_process(script: Any) -> None:
    run = script(PLUS, clients=50, rounds=2)
    assert (load_file(run / "global" / "model.safetensors")["w"] == 2).all()
    assert len(set(rows(run, name="drawn"))) == 100


def test_nvflares_names_and_differences(script: Any) -> None:
    text = PLUS.replace(
        "import fedsim.client as flare",
        "import nvflare.client as flare\nfrom nvflare.app_common.np.constants import NPConstants",
    )
    text = text.replace('params={"w": w + by}', 'params_type=flare.ParamsType.DIFF, params={"w": 0 * w + by}')
    run = script(text, compat=True, name="nv")
    assert (load_file(run / "global" / "model.safetensors")["w"] == 3).all()


EVALUATES = """
import fedsim.client as flare
flare.init()
site = int(flare.get_site_name()[-1])
own = None
while flare.is_running():
    model = flare.receive()
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics={"score": float(model.params["w"].mean()) + site}))
    elif flare.is_submit_model():
        flare.send(flare.FLModel(params=own))
    else:
        own = {"w": model.params["w"] + site}
        flare.send(flare.FLModel(params=dict(own)))
"""


def test_cross_site_evaluation_asks_the_scripts(script: Any) -> None:
    """Two sites add 1 and 2: after two rounds the global model is 3, and the sites' own are 2.5 and 3.5."""
    run = script(EVALUATES, clients=2, rounds=2, name="x", evaluate={"cross_site": True})
    table = fedsim.cross_site(run, "score")
    assert table.loc["global"].tolist() == [4.0, 5.0]
    assert table.loc["own site-1"].tolist() == [3.5, 4.5] and table.loc["own site-2"].tolist() == [4.5, 5.5]
    assert rows(run, split="validation", name="score", client=None) == [4.5]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"algorithm": {"name": "scaffold"}}, "algorithm.name: 'scaffold' works between a client's steps"),
        ({"algorithm": {"name": "ditto"}}, "algorithm.name: 'ditto'"),
        ({"algorithm": {"name": "qfedavg"}}, "needs start_loss"),
        ({"modes": ["central"]}, "modes: .* holds central"),
        ({"data": {"name": "headlines", "template": "{sentence} {label}"}}, "data: .* has no use where client.script"),
        ({"init": "nothing.npz"}, "client.init: 'nothing.npz' cannot be read"),
        ({"launch": "twice"}, "client.launch"),
    ],
)
def test_what_scripts_cannot_do_is_refused(script: Any, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        script(PLUS, **keys)


def test_server_optimizers_medians_and_codecs_work_with_scripts(script: Any) -> None:
    text = PLUS.replace("by = float", "by = int(flare.get_site_name()[-1]) ** 2 if True else float")
    mean = script(text, rounds=1, name="m")
    assert np.allclose(load_file(mean / "global" / "model.safetensors")["w"], 14 / 3)
    median = script(text, rounds=1, name="m", aggregator={"name": "median"})
    assert (load_file(median / "global" / "model.safetensors")["w"] == 4).all()
    adam = script(text, rounds=1, name="m", algorithm={"name": "fedadam", "server_lr": 0.5})
    assert np.allclose(load_file(adam / "global" / "model.safetensors")["w"], 0.5, atol=0.01)
    coded = script(text, rounds=1, name="m", messages={"up": "fp16"})
    assert np.allclose(load_file(coded / "global" / "model.safetensors")["w"], 14 / 3, atol=1e-2)


def test_the_id_holds_script_and_modules_beside_it(script: Any, tmp_path: Path) -> None:
    keys = {"exchange": "torch", "init": f"{tmp_path}/model.py:Net", "name": "reg", "rounds": 1}
    first = script(REGRESSION, **keys)
    assert script(REGRESSION, **keys) == first
    assert script(REGRESSION.replace("lr=0.05", "lr=0.06"), **keys) != first
    assert script(REGRESSION, **keys, args="--steps 1") != first


@pytest.mark.parametrize(("name", "metric"), [("numpy", "distance"), ("torch", "loss")])
def test_the_hello_scripts_learn(tmp_path: Path, name: str, metric: str) -> None:
    file = Path(__file__).resolve().parents[1] / "experiments" / "client_api" / f"hello_{name}.py"
    run = fedsim.run_script(file, rounds=3, results=str(tmp_path), progress=False).path
    found = rows(run, split="validation", name=metric, client=None)
    assert len(found) == 3 and found[-1] < found[0]


def test_the_constants_that_scripts_import_are_there() -> None:
    """In a process of its own: what stands under NVFlare's names stays there."""
    import subprocess
    import sys

    lines = [
        "import fedsim.client; fedsim.client.compat()",
        "from nvflare.client.config import ConfigKey, ExchangeFormat",
        "from nvflare.app_common.app_constant import AlgorithmConstants, ModelName",
        "from nvflare.app_common.abstract.fl_model import FLModel, ParamsType",
        "from nvflare.apis.fl_constant import FLMetaKey",
        "import nvflare.client.api, nvflare.client.tracking",
        "print(ExchangeFormat.NUMPY, FLMetaKey.NUM_STEPS_CURRENT_ROUND, ModelName.BEST_MODEL)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["numpy", "NUM_STEPS_CURRENT_ROUND", "best_model"], done.stderr
