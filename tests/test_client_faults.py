"""Clients whose training goes wrong: a loss or an update that is not finite, an update that is too large."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics_lines
from safetensors.torch import load_file, save_file
from torch import Tensor

import fedsim.runs.setup
from fedsim.core.errors import ClientError, UserError

WORDS = [
    "the",
    "company",
    "said",
    "its",
    "profit",
    "rose",
    "and",
    "sales",
    "fell",
    "in",
    "this",
    "quarter",
    "while",
    "orders",
    "grew",
]
CLIENTS = {"good-1": 14, "good-2": 9, "bad": 11}
ONE_LANE = {"training": {"lanes": 1}}


def model(folder: Path, name: str = "global") -> dict[str, Tensor]:
    return load_file(folder / name / "adapter_model.safetensors")


def rows(folder: Path, split: str, name: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in metrics_lines(folder)]
    return [r for r in found if r["split"] == split and name in (None, r["name"])]


@pytest.fixture
def poisoned(lab: Any) -> Callable[..., dict[str, Any]]:
    """Call it with the clients that there are: sections of an experiment on a base that knows one word as NaN, which only the
    rows of the client `bad` hold."""

    def make(*clients: str) -> dict[str, Any]:
        folder = lab.root / "poisoned"
        if not folder.exists():
            from transformers import AutoTokenizer

            shutil.copytree(lab.base("gpt_neox"), folder)
            (token, *_) = AutoTokenizer.from_pretrained(folder)("sales zloty", add_special_tokens=False)["input_ids"][
                -1:
            ]
            weights = load_file(folder / "model.safetensors")
            (table,) = [n for n in weights if n.endswith("embed_in.weight")]
            weights[table][token] = math.nan
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        lines, labels = [], ["negative", "neutral", "positive"]
        for client in clients:
            for i in range(CLIENTS[client]):
                words = [WORDS[(i * 7 + k * 3 + len(client)) % len(WORDS)] for k in range(4 + i % 3)]
                text = " ".join([*words, "zloty"] if client == "bad" else words)
                lines.append(json.dumps({"sentence": text, "label": labels[i % 3], "client": client}))
        file = lab.root / f"{'-'.join(clients)}.jsonl"
        file.write_text("\n".join(lines) + "\n")
        return {
            "model": {"path": str(folder), "dtype": "float64"},
            "adapter": {"name": "lora", "r": 3, "alpha": 6},
            "data": {"name": "table", "path": str(file), "test": 0},
            "partition": {"name": "by_column", "column": "client"},
            "rounds": 3,
        }

    return make


EVERYONE = ("good-1", "good-2", "bad")


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_skipped_client_is_as_if_it_were_not_there(lab: Any, poisoned: Any, distance: Any, lanes: int) -> None:
    found = lab.run(**poisoned(*EVERYONE), training={"lanes": lanes}, faults={"policy": "skip"})
    without = lab.run(**poisoned(*EVERYONE[:2]), training={"lanes": lanes})
    assert distance(model(found), model(without)) < 1e-9
    faults = rows(found, "fault")
    assert [(r["round"], r["scope"], r["client"], r["name"]) for r in faults] == [
        (r, "federated", "bad", "skipped_loss") for r in (1, 2, 3)
    ]
    assert all(math.isnan(r["value"]) for r in faults)
    assert {r["client"] for r in rows(found, "train", "loss")} == {"good-1", "good-2"}
    assert all(math.isfinite(r["value"]) for r in rows(found, "validation"))


def test_by_default_the_run_ends_and_says_who(lab: Any, poisoned: Any) -> None:
    tree = {**lab.tree(**poisoned(*EVERYONE))}
    with pytest.raises(
        ClientError, match=r"^round 1, client bad: its training loss is not finite \(nan\); .*faults\.policy=skip"
    ):
        fedsim.run(tree, progress=False)
    (folder,) = (lab.root / "results" / "lab").iterdir()
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


def test_the_command_line_ends_with_one_line(lab: Any, poisoned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    from fedsim.cli.main import main

    file = lab.root / "bad.yaml"
    file.write_text(yaml.safe_dump(lab.tree(**poisoned(*EVERYONE))))
    assert main(["run", str(file), "-q"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("fedsim: round 1, client bad: its training loss is not finite")


def test_the_end_of_a_mode_says_what_went_wrong(lab: Any, poisoned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fedsim.run(lab.tree(**poisoned(*EVERYONE), faults={"policy": "skip"}), progress=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "client faults" in line]
    assert said == [
        "federated: client faults: 3 skipped for their loss (bad in round 1, bad in round 2, bad in round 3)"
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_went_wrong_is_said_without_progress_too(
    lab: Any, poisoned: Any, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    """By a run, and by the runs of a sweep, in this process and in others; what a user asked to go wrong is not."""
    import yaml

    from fedsim.cli.main import main

    file, plan = lab.root / "bad.yaml", lab.root / "sweep.yaml"
    asked = {"rounds": 1, "simulation": {"drop": 0.6}}
    file.write_text(yaml.safe_dump(lab.tree(**{**poisoned(*EVERYONE), **asked}, faults={"policy": "skip"})))
    plan.write_text(
        yaml.safe_dump({"experiment": "bad.yaml", "list": [{"seed": 1}, {"seed": 2}], "workers": workers, "threads": 1})
    )
    line = "federated: client faults: "
    capfd.readouterr()
    assert main(["run", str(file), "-q", "simulation.drop=0"]) == 0
    assert capfd.readouterr().err.splitlines() == [line + "1 skipped for their loss (bad in round 1)"]
    sound = ["model.path=tiny", "partition={name: iid, num_clients: 6}", "simulation.drop=0.4"]
    assert main(["run", str(file), "-q", "modes=[federated]", *sound]) == 0
    assert capfd.readouterr().err == ""
    dropped = [rows(folder, "fault", "dropped") for folder in (lab.root / "results" / "lab").iterdir()]
    assert sum(map(bool, dropped)) == 1
    assert main(["sweep", str(plan), "-q", "simulation.drop=0"]) == 0
    said = sorted(capfd.readouterr().err.splitlines())
    assert said == [f"{i}/2  seed={i}  {line}1 skipped for their loss (bad in round 1)" for i in (1, 2)]


def test_alone_a_site_that_goes_wrong_stays_where_it_was_and_the_others_do_not_notice(lab: Any, poisoned: Any) -> None:
    keys = {"modes": ["local"], **ONE_LANE}
    found = lab.run(**poisoned(*EVERYONE), **keys, faults={"policy": "skip"})
    without = lab.run(**poisoned(*EVERYONE[:2]), **keys)
    assert not (found / "local" / "bad").exists()
    assert len(rows(found, "fault", "skipped_loss")) == 3
    for site in ("good-1", "good-2"):
        for name, tensor in model(without, f"local/{site}").items():
            assert torch.allclose(tensor, model(found, f"local/{site}")[name], rtol=0, atol=1e-12), (site, name)


@pytest.mark.parametrize("mode", ["local", "federated", "central"])
def test_where_all_of_a_round_go_wrong_the_run_ends(lab: Any, mode: str) -> None:
    burst = {"local": {"lr": 1e200, "clip": None}, "faults": {"policy": "skip"}, "modes": [mode], "rounds": 2}
    with pytest.raises(ClientError, match=r"^round \d: all \d clients? failed: "):
        lab.run(**burst)


LIMITED = {"partition": {"name": "iid", "num_clients": 1}, **ONE_LANE}


def norm_of(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[n] - other[n]).square().sum()) for n in one))


def test_an_update_that_is_too_large_is_scaled_down_by_hand(lab: Any) -> None:
    free = lab.run(**LIMITED)
    start, full = model(free, "init"), model(free)
    norm = norm_of(full, start)
    most = norm / 3
    found = lab.run(**LIMITED, faults={"policy": "clip", "max_norm": most})
    for name, tensor in model(found).items():
        expected = start[name] + (full[name] - start[name]) / 3
        assert torch.allclose(tensor, expected, rtol=0, atol=1e-13), name
    assert norm_of(model(found), start) == pytest.approx(most, rel=1e-9)
    (fault,) = rows(found, "fault")
    assert fault["name"] == "clipped_norm"
    assert fault["value"] == pytest.approx(norm, rel=1e-9)
    roomy = lab.run(**LIMITED, faults={"policy": "clip", "max_norm": norm * 1.001})
    assert all(torch.equal(t, model(roomy)[n]) for n, t in full.items())
    assert not rows(roomy, "fault")
    with pytest.raises(ClientError, match=r"^round 1, client site-1: its update has norm .* above faults\.max_norm; "):
        lab.run(**LIMITED, faults={"policy": "fail", "max_norm": most})
    with pytest.raises(ClientError, match=r"^round 1: all 1 clients? failed: site-1: its update has norm"):
        lab.run(**LIMITED, faults={"policy": "skip", "max_norm": most})


def test_only_the_updates_that_are_too_large_are_left_out(lab: Any, distance: Any) -> None:
    keys = {"partition": {"name": "quantity", "num_clients": 3, "exponent": 1.0}, **ONE_LANE}
    keys["local"] = {"epochs": 2, "steps": None}  # more rows, more steps, a longer way
    norms = {}
    for client in ("site-1", "site-2", "site-3"):
        trace = {c: [int(c == client)] for c in ("site-1", "site-2", "site-3")}
        alone = lab.run(**keys, simulation={"availability": trace})
        norms[client] = norm_of(model(alone), model(alone, "init"))
    ranked = sorted(norms, key=lambda c: norms[c])
    most = (norms[ranked[1]] + norms[ranked[2]]) / 2
    found = lab.run(**keys, faults={"policy": "skip", "max_norm": most})
    trace = {ranked[2]: [0]}
    same = lab.run(**keys, simulation={"availability": trace})
    assert all(torch.equal(t, model(found)[n]) for n, t in model(same).items())
    (fault,) = rows(found, "fault")
    assert (fault["client"], fault["name"]) == (ranked[2], "skipped_norm")
    assert fault["value"] == pytest.approx(norms[ranked[2]], rel=1e-9)


def test_scaling_is_the_same_in_chunks_in_lanes_and_in_workers(
    lab: Any, monkeypatch: pytest.MonkeyPatch, distance: Any
) -> None:
    import dataclasses

    keys: dict[str, Any] = {"adapter": {"name": "none"}, "rounds": 2, "model": {"dtype": "float32"}}
    keys |= {"faults": {"policy": "clip", "max_norm": 0.05}, "messages": {"up": "nf4", "error_feedback": True}}
    plain = lab.run(**keys)
    assert len(rows(plain, "fault", "clipped_norm")) == 6
    pool = {"name": "pool", "devices": ["cpu"], "workers": 2, "threads": 1}
    lab.same_bits(lab.run(**keys, name="pool", executor=pool), plain)
    original = fedsim.runs.setup.recipe_of
    monkeypatch.setattr(fedsim.runs.setup, "recipe_of", lambda e: dataclasses.replace(original(e), chunk=4096))
    lab.same_bits(lab.run(**keys, name="chunks"), plain)
    lora = {"faults": {"policy": "clip", "max_norm": 0.01}, "rounds": 2}
    one, three = (lab.run(**lora, training={"lanes": n}) for n in (1, 3))
    assert distance(model(three), model(one)) < 1e-9


def test_a_stopped_run_goes_on_with_the_same_bits(lab: Any, poisoned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.runs.progress import Progress

    keys = {**poisoned(*EVERYONE), "faults": {"policy": "skip"}}
    whole = lab.run(**keys)

    class Stopped(Exception):
        pass

    def stop(self: Progress, done: int, headline: str) -> None:
        raise Stopped

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Progress, "round", stop)
            with pytest.raises(Stopped):
                lab.run(**keys, name="stopped")
    lab.same_bits(lab.run(**keys, name="stopped"), whole)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"policy": "clip"}, r"^faults\.policy: 'clip' needs faults\.max_norm"),
        ({"policy": "ignore"}, r"^faults\.policy: 'ignore' is not one of fail, skip, clip"),
        ({"max_norm": 0}, r"^faults\.max_norm: must be > 0 \(got 0\)"),
        ({"max_norm": float("nan")}, r"^faults\.max_norm: must be a finite number \(got nan\)"),
    ],
)
def test_what_cannot_be_is_one_line(lab: Any, section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lab.exp(faults=section)
