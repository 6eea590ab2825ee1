"""Whole models: trained, sent, summed, kept and written piece by piece, to the bits and the bytes of doing it at once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiers import fast_only
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedsim
import fedsim.runs.setup
from fedsim.channel.codecs import codec
from fedsim.core.errors import UserError
from fedsim.core.params import ALIGN
from fedsim.runs.build import prepare

NONE = {"adapter": {"name": "none"}}
TWO = {**NONE, "partition": {"name": "iid", "num_clients": 2}, "algorithm": {"name": "fedavg", "weights": "samples"}}
CODECS = ("fp32", "fp16", "bf16", "blockwise8", "nf4")


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Call it with a number of elements: what follows works on so many at a time (a config's least is 1 MiB)."""

    def cut(elements: int | None) -> None:
        original = fedsim.runs.setup.recipe_of

        def recipe(exp: Any) -> Any:
            return dataclasses.replace(original(exp), chunk=elements)

        monkeypatch.setattr(fedsim.runs.setup, "recipe_of", recipe)

    return cut


def whole(folder: Path, name: str = "global") -> dict[str, Tensor]:
    """All tensors of an exported model, whatever the number of its files."""
    return {k: v for f in sorted((folder / name).glob("model*.safetensors")) for k, v in load_file(f).items()}


def loss_of(model: nn.Module, parts: Any, rows: np.ndarray) -> Tensor:
    """Mean negative log-likelihood of all answer tokens of a batch, row by row and without padding."""
    tokens, total, count = parts.tokens["train"], 0.0, 0
    for row in rows:
        ids = torch.tensor(tokens.row(row).astype(np.int64))[None]
        prompt = int(tokens.prompts[row])
        logits = model(input_ids=ids).logits[0, prompt - 1 : -1]
        total = total + F.cross_entropy(logits, ids[0, prompt:], reduction="sum")
        count += ids.shape[1] - prompt
    return total / count


def fine_tune(
    model: nn.Module, exp: Any, parts: Any, client: str, round: int, optimizer: Any = None, cast: bool = False
) -> Any:
    """A client's round in a plain loop, with bfloat16 autocast if asked; the optimizer, to go on with."""
    w = exp.local
    params = list(model.parameters())
    optimizer = optimizer or torch.optim.AdamW(
        params, lr=w.lr, betas=tuple(w.betas), eps=w.eps, weight_decay=w.weight_decay
    )
    for rows in fedsim.batches(exp, client, round):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):  # which keeps cast weights until it ends
            loss = loss_of(model, parts, rows)
        loss.backward()
        if w.clip is not None:
            nn.utils.clip_grad_norm_(params, w.clip)
        optimizer.step()
    return optimizer


def start(exp: Any, dtype: torch.dtype = torch.float64) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(exp.model.path, dtype=dtype).eval()


def named(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# --------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fedavg_of_two_clients_is_the_mean_of_two_fine_tuned_models(lab: Any, distance: Any, kind: str) -> None:
    counts = {"name": "class_counts", "counts": [[2, 3, 1], [4, 9, 7]]}  # 6 and 20 rows
    exp = lab.exp(**{**TWO, "partition": counts}, model={"path": lab.base(kind)}, local={"steps": 3})
    folder, parts = lab.run(exp), prepare(exp)
    tuned = []
    for client in ("site-1", "site-2"):
        model = start(exp)
        fine_tune(model, exp, parts, client, 1)
        tuned.append(named(model))
    expected = {n: (6 * tuned[0][n] + 20 * tuned[1][n]) / 26 for n in tuned[0]}
    found = whole(folder)
    assert distance(found, {n: expected[n] for n in found}) < 1e-9
    assert set(expected) - set(found) <= {"lm_head.weight"}, "a tied head is written once"


@pytest.mark.parametrize("kept", [True, False])
def test_two_rounds_with_and_without_kept_moments(lab: Any, distance: Any, kept: bool) -> None:
    """Each client has a model and an optimizer of its own; only parameters are exchanged."""
    exp = lab.exp(**TWO, rounds=2, local={"steps": 2, "keep_state": kept})
    folder, parts = lab.run(exp), prepare(exp)
    clients, optimizers = {"site-1": start(exp), "site-2": start(exp)}, {}
    for round in (1, 2):
        for name, model in clients.items():
            optimizers[name] = fine_tune(model, exp, parts, name, round, optimizers.get(name) if kept else None)
        each, sizes = [named(m) for m in clients.values()], parts.partition.sizes
        mean = {n: (sizes[0] * each[0][n] + sizes[1] * each[1][n]) / sum(sizes) for n in each[0]}
        for model in clients.values():
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(mean[n])
    found = whole(folder)
    assert distance(found, {n: mean[n] for n in found}) < 1e-9


def test_float32_masters_under_bfloat16_are_autocast(lab: Any, distance: Any) -> None:
    work = {"optimizer": "sgd", "lr": 0.1, "clip": None, "momentum": 0.0, "weight_decay": 0.0}
    exp = lab.exp(**NONE, partition={"name": "iid", "num_clients": 1}, model={"dtype": "bfloat16"}, local=work)
    folder, parts = lab.run(exp), prepare(exp)
    found, moved, before = whole(folder), {}, named(start(exp, torch.float32))
    assert all(t.dtype == torch.float32 for t in found.values())
    for kind, cast in (("sixteen", True), ("full", False)):
        model = start(exp, torch.float32)
        fine_tune(model, exp, parts, "site-1", 1, torch.optim.SGD(model.parameters(), lr=0.1), cast)
        moved[kind] = {n: p - before[n] for n, p in named(model).items() if n in found}
    ours = {n: found[n] - before[n] for n in found}
    # Padded rows and single ones round otherwise in 16 bits; without autocast they would agree to float32's rounding.
    assert distance(ours, moved["sixteen"]) < 0.05
    assert distance(ours, moved["full"]) > 1e-4


def test_sixteen_bit_weights_are_summed_in_float32(lab: Any) -> None:
    """Two clients that move one bfloat16 weight to neighbours: their mean lies between, where bfloat16 has nothing."""
    training = {"lanes": 2, "master_weights": False}
    exp = lab.exp(**TWO, model={"dtype": "bfloat16"}, training=training, local={"lr": 1e-2})
    folder = lab.run(exp)
    found = whole(folder)
    assert all(t.dtype == torch.float32 for t in found.values())
    assert any((t.bfloat16().float() != t).any() for t in found.values()), "not everything fits into 16 bits"
    alone = {**NONE, "partition": {"name": "iid", "num_clients": 1}}
    single = lab.run(**alone, name="one", model={"dtype": "bfloat16"}, training=training, local={"lr": 1e-2})
    for name, tensor in whole(single).items():
        # One client's weights are 16 bits wide; start + (local - start) in float32 gives them back.
        assert torch.allclose(tensor, tensor.bfloat16().float(), rtol=1e-6, atol=1e-7), name
    init = whole(single, "init")
    assert all(t.dtype == torch.bfloat16 for t in init.values())


def test_sixteen_bit_weights_have_exact_counts_losses_and_buffers(lab: Any) -> None:
    """More answer tokens than bfloat16 can count, in many passes: the loss is that of a forward pass over the same rows."""
    work = {"batch_size": 60, "micro_batch": 1, "steps": 1, "lr": 1e-12}
    data = {"template": "{label} {sentence}"}  # long answers: some hundreds of tokens a batch
    exp = lab.exp(
        **NONE,
        data=data,
        partition={"name": "iid", "num_clients": 1},
        model={"dtype": "bfloat16"},
        training={"lanes": 2, "master_weights": False},
        local=work,
        best={"metric": "loss"},
    )
    folder, parts = lab.run(exp), prepare(exp)
    (rows,) = fedsim.batches(exp, "site-1", 1)
    answers = int(parts.tokens["train"].answers_of(rows).sum())
    assert answers > 256 and answers != float(torch.tensor(float(answers)).bfloat16())
    model = start(exp, torch.bfloat16)  # its buffers are float32, as transformers loads them
    with torch.no_grad():
        each = [
            (float(loss_of(model, parts, [r])), int(parts.tokens["train"].answers_of(np.array([r]))[0])) for r in rows
        ]
    expected = sum(loss * n for loss, n in each) / answers
    found = lab.value(folder, split="train", name="loss")
    assert found == pytest.approx(expected, rel=2e-3), "rounding of single logits, of which there are hundreds"


def test_after_too_little_memory_one_model_stays_where_it_is(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that does not fit: nothing of the model's size is made anew, since what is there is still in use."""
    from fedsim.training.trainer import Trainer

    places, shrink = [], Trainer.shrink

    def note(self: Trainer) -> None:
        before = [t.data_ptr() for t in (self.flat, self.grad, *self.optimizer.moments)]
        shrink(self)
        places.append(before == [t.data_ptr() for t in (self.flat, self.grad, *self.optimizer.moments)])

    backward = Trainer.backward

    def short(self: Trainer, batches: Any) -> Any:
        if self.config.micro_batch > 2:
            raise torch.OutOfMemoryError("too many rows")
        return backward(self, batches)

    monkeypatch.setattr(Trainer, "shrink", note)
    monkeypatch.setattr(Trainer, "backward", short)
    folder = lab.run(**NONE, local={"micro_batch": 6})
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["checkpointing"] and plan["micro_batch"] == 2, "first layers are computed twice, then passes are cut"
    assert len(places) >= 2 and all(places)


def test_a_packed_plan_measures_full_passes(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.training.worker import Worker

    measured, measure = [], Worker.measure

    def note(self: Worker, rows: Any, weights: Any) -> Any:
        measured.append(int(sum(self.trainer.tokens.lengths_of(r).sum() for r in rows)))
        return measure(self, rows, weights)

    monkeypatch.setattr(Worker, "measure", note)
    local = {"batch_size": 12, "micro_batch": 2}
    lab.run(**NONE, training={"lanes": 2, "packing": True}, local=local, data={"max_length": 40})
    assert max(measured) > 60, "of 80 tokens that fit into a pass"


def test_workers_let_go_of_the_weights_that_they_were_sent(lab: Any) -> None:
    """Weights and buffers lie in blocks of their own: a buffer that stays would keep all weights in memory."""
    from fedsim.models import sharing

    model = start(lab.exp())
    sharing.share_memory(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    buffers = {b.untyped_storage().data_ptr() for b in model.buffers()}
    assert len(weights) == 1 and buffers and not weights & buffers


@fast_only(1)
@pytest.mark.parametrize("head", [False, True])
def test_micro_batches_checkpointing_and_packing_change_nothing(lab: Any, distance: Any, head: bool) -> None:
    more = {"model": {"path": lab.base("bert"), "task": "sequence_classification"}, "data": {"template": "{sentence}"}}
    ways = {
        "plain": {},
        "micro": {"local": {"micro_batch": 2}},
        "twice": {"training": {"lanes": 2, "checkpointing": True}},
        "packed": {"training": {"lanes": 2, "packing": True}},
        "packed-micro": {
            "training": {"lanes": 2, "packing": True},
            "local": {"micro_batch": 1},
            "data": {"max_length": 40},
        },
        "all": {"training": {"lanes": 2, "packing": True, "checkpointing": True}, "local": {"micro_batch": 3}},
    }
    found = {}
    for name, way in ways.items():
        sections = {**TWO, **(more if head else {})}
        for key, value in way.items():
            sections[key] = {**sections.get(key, {}), **value}
        folder = lab.run(**sections, name=name)
        found[name] = whole(folder)
        used = {r["value"] for r in lab.metrics(folder) if r["name"] == "computed_tokens"}
        useful = {r["value"] for r in lab.metrics(folder) if r["name"] == "tokens"}
        assert (used == useful) == name.startswith(("packed", "all")), "packed rows have no padding"
    for name in ways:
        assert distance(found[name], found["plain"]) < 1e-9, name


def test_a_packed_pass_holds_what_fits_and_never_nothing(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of micro_batch x max_length tokens; a row longer than that cannot be (max_length), and no row is left out."""
    from fedsim.models.stacked import StreamNet

    seen, backward = [], StreamNet.backward

    def note(self: StreamNet, tokens: Any, rows: Any, answers: Any) -> Any:
        seen.append((len(rows[0]), int(tokens.lengths_of(rows[0]).sum())))
        return backward(self, tokens, rows, answers)

    monkeypatch.setattr(StreamNet, "backward", note)
    training = {"lanes": 2, "packing": True}
    lab.run(**NONE, training=training, local={"batch_size": 12, "micro_batch": 2, "steps": 1}, data={"max_length": 30})
    _, *trained = seen
    assert sum(n for n, _ in seen[-len(trained) :]) >= 36 and all(t <= 60 for _, t in seen)
    assert max(n for n, _ in trained) > 2, "short rows share a pass"


def test_packing_is_refused_where_rows_cannot_lie_end_to_end(lab: Any) -> None:
    training = {"lanes": 2, "packing": True}
    with pytest.raises(UserError, match=r"^training.packing: true, but .*set it to false$"):
        lab.run(**NONE, training=training, model={"path": lab.base("bloom")})
    with pytest.raises(UserError, match=r"^training.packing: True is for full fine-tuning"):
        lab.exp(training=training)


def test_checkpointing_of_an_adapter_in_one_lane_draws_the_same_dropout_twice(lab: Any, distance: Any) -> None:
    runs = [
        lab.run(
            name=f"twice-{on}".lower(),
            adapter={"name": "lora", "r": 3, "alpha": 6, "dropout": 0.3},
            training={"lanes": 1, "checkpointing": on},
        )
        for on in (False, True)
    ]
    a, b = (load_file(r / "global/adapter_model.safetensors") for r in runs)
    assert distance(b, a) < 1e-9


# ---------------------------------------------------------------------------------------------- pieces and places

HARD = {
    **TWO,
    "rounds": 3,
    "modes": ["local", "federated", "central"],
    "partition": {"name": "iid", "num_clients": 3},
    "local": {"steps": 2, "keep_state": True},
    "messages": {"up": "nf4", "down": "blockwise8", "error_feedback": True},
    "model": {"dtype": "float32"},
}


@pytest.mark.thorough
def test_neither_pieces_nor_workers_nor_where_sums_lie_change_a_bit(
    lab: Any, pieces: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = lab.run(**HARD, name="at-once")
    pieces(ALIGN)
    cut = lab.run(**HARD, name="cut")
    lab.same_bits(cut, at_once)
    lab.same_bits(lab.run(**HARD, name="host", aggregation={"device": "cpu", "chunk_mb": 1}), at_once)
    pool = {"name": "pool", "devices": ["cpu"], "workers": 2, "threads": 1}
    lab.same_bits(lab.run(**HARD, name="partial", executor=pool), at_once)
    monkeypatch.setattr("fedsim.executors.pool._SLOTS_BELOW", 0)
    lab.same_bits(lab.run(**HARD, name="one-sum", executor=pool), at_once)


def test_a_large_model_gives_the_same_bits_in_serial_and_in_a_pool(
    lab: Any, pieces: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts as large goes straight into the one sum, in one pass over memory; other bits, the same everywhere."""
    for place in ("fedsim.executors.pool._SLOTS_BELOW", "fedsim.core.params.LARGE"):
        monkeypatch.setattr(place, 0)
    pieces(2 * ALIGN)
    # Workers are new processes: they learn of it as they start.
    (lab.root / "sitecustomize.py").write_text("import fedsim.core.params\nfedsim.core.params.LARGE = 0\n")
    root = str(Path(fedsim.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(lab.root), root]))
    keys = {**TWO, "partition": {"name": "iid", "num_clients": 3}, "rounds": 2}
    serial = lab.run(**keys, name="serial")
    pool = lab.run(**keys, name="pool", executor={"name": "pool", "devices": ["cpu"], "workers": 2, "threads": 1})
    lab.same_bits(pool, serial)


@fast_only(1)
@pytest.mark.parametrize("mode", ["local", "federated", "central"])
def test_a_stopped_run_goes_on_to_the_same_bits(
    lab: Any, pieces: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    from fedsim.runs.checkpoints import Checkpoints

    pieces(ALIGN)
    unbroken = lab.run(**HARD, name="unbroken")
    save = Checkpoints.save

    def stop(self: Checkpoints, state: Any, *rest: Any, **more: Any) -> Any:
        saved = save(self, state, *rest, **more)
        if (self.mode, state.round) == (mode, 2):
            raise KeyboardInterrupt
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            lab.run(**HARD, name="stopped")
    lab.same_bits(lab.run(**HARD, name="stopped"), unbroken)


def test_checkpoints_and_exports_are_cut_into_files(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 1 MiB: a model of 2.3 MB in float64 takes at least three; it loads by its folder, and resumes from them."""
    wide = AutoModelForCausalLM.from_pretrained(lab.base("llama")).config
    wide.update({"hidden_size": 96, "intermediate_size": 192})
    folder = lab.root / "wide"
    AutoModelForCausalLM.from_config(wide).save_pretrained(folder)
    for file in Path(lab.base("llama")).glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    keys = {**TWO, "rounds": 2, "model": {"path": str(folder)}, "checkpoint": {"shard_mb": 1}}
    run = lab.run(**keys)
    held = run / "checkpoints/federated/round-00002"
    parts = sorted(p.name for p in held.glob("*.safetensors"))
    assert len(parts) >= 3 and parts[0] == f"tensors-00001-of-{len(parts):05d}.safetensors"
    assert not list((run / "checkpoints/federated").glob(".*"))
    assert len(list((run / "global").glob("model-*.safetensors"))) >= 3
    loaded = AutoModelForCausalLM.from_pretrained(run / "global")
    merged = {k: v for p in parts for k, v in load_file(held / p).items()}
    for name, tensor in named(loaded).items():
        assert torch.equal(tensor, merged[f"params.{name}"]), name
    (held / parts[1]).unlink()  # what is left of round 2 is no checkpoint
    (run / "status.json").write_text(json.dumps({"state": "running", "rounds": 2}))
    (run / "checkpoints/federated/done.json").unlink()
    before = whole(run)
    again = lab.run(**keys)
    assert again == run and all(torch.equal(t, before[n]) for n, t in whole(again).items())


def test_files_with_names_of_their_own_are_read_back_piece_by_piece(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX's head is `embed_out.weight` in files and `lm_head.weight` in the model: no second model is loaded for it, and
    neither a changed byte nor a tensor that is missing is missed."""
    from safetensors.torch import save_file

    from fedsim.models import adapters, export

    model, _ = adapters.attach(
        start(lab.exp(model={"path": lab.base("gpt_neox")})), "none", {}, task="causal_lm", seed=1
    )
    tokenizer = AutoTokenizer.from_pretrained(lab.base("gpt_neox"))

    def loads(*args: Any, **keys: Any) -> None:
        raise AssertionError("a second model")

    monkeypatch.setattr(type(model), "from_pretrained", loads)
    how = {"name": "none", "settings": {}, "base_name": "neox", "tokenizer": tokenizer}
    folder = lab.root / "neox"
    export.save(model, folder, **how)
    written = whole(lab.root, "neox")
    assert "embed_out.weight" in written and "lm_head.weight" not in written
    assert torch.equal(written["embed_out.weight"], model.lm_head.weight)

    original = type(model).save_pretrained
    for name, reason in (("embed_out.weight", "does not read back"), (None, "is not as it was written")):

        def damaged(self: nn.Module, place: Path, name: str | None = name, **keys: Any) -> None:
            original(self, place, **keys)
            held = dict(whole(place.parent, place.name))
            if name is None:
                del held["embed_out.weight"]
            else:
                held[name][-1, -1] += 1
            save_file(held, place / "model.safetensors", metadata={"format": "pt"})

        monkeypatch.setattr(type(model), "save_pretrained", damaged)
        with pytest.raises(OSError, match=reason):
            export.save(model, folder, **how)


# ---------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("adapter", [{"name": "none"}, {"name": "lora", "r": 3, "alpha": 6}])
@fast_only(0, 4)
@pytest.mark.parametrize("up", CODECS)
def test_bytes_in_the_metrics_are_those_of_arithmetic(lab: Any, up: str, adapter: dict[str, Any]) -> None:
    """Elements x width, a float32 scale a block and the table once a tensor; a tied head once."""
    folder = lab.run(adapter=adapter, messages={"up": up}, rounds=2)
    file = whole(folder) if adapter["name"] == "none" else load_file(folder / "global/adapter_model.safetensors")
    sizes = [t.numel() for t in file.values()]
    by_hand = {
        "fp32": 4 * sum(sizes),
        "fp16": 2 * sum(sizes),
        "bf16": 2 * sum(sizes),
        "blockwise8": sum(n + 4 * -(-n // 4096) + 4 * 256 for n in sizes),
        "nf4": sum(-(-n // 2) + 4 * -(-n // 64) + 4 * 16 for n in sizes),
    }
    rows = [r for r in lab.metrics(folder) if r["name"] in ("bytes_up", "bytes_down")]
    assert len(rows) == 2 * 2 * 3, "each client, round and direction"
    assert {r["value"] for r in rows if r["name"] == "bytes_up"} == {by_hand[up]}
    assert {r["value"] for r in rows if r["name"] == "bytes_down"} == {8 * sum(sizes)}, "as trained: float64"
    about = json.loads((folder / "model.json").read_text())
    assert about["bytes_up"] == by_hand[up] == about["up"]["values"] + about["up"]["scales"]


@fast_only(3, 9, 10)
@pytest.mark.parametrize(
    "messages", [{"up": c} for c in CODECS] + [{"down": c} for c in CODECS] + [{"up": "nf4", "down": "fp16"}], ids=str
)
def test_what_travels_is_encoded_and_nothing_else(lab: Any, distance: Any, messages: dict[str, str]) -> None:
    """start_k = D(Q_down(w)), w <- w + sum_k p_k D(Q_up(local_k - start_k)), with the codecs on whole tensors."""
    exp = lab.exp(**TWO, messages=messages)
    folder, parts = lab.run(exp), prepare(exp)
    up, down = codec(messages.get("up")), codec(messages.get("down"))
    begun = named(start(exp))
    trip = lambda c, t: c.round_trip(t.reshape(-1).clone()).view(t.shape)  # noqa: E731
    merged, sizes = {n: t.clone() for n, t in begun.items()}, parts.partition.sizes
    for c, client in enumerate(("site-1", "site-2")):
        model = start(exp)
        received = {n: trip(down, t) for n, t in begun.items()}
        model.load_state_dict(received, strict=False)
        fine_tune(model, exp, parts, client, 1)
        for n, local in named(model).items():
            merged[n] += sizes[c] / sum(sizes) * trip(up, local - received[n])
    found = whole(folder)
    # A float64 value on the edge of two codes may fall on either side: such a weight is a step of its code away.
    apart = {n: (found[n] - merged[n]).abs() > 1e-9 for n in found}
    assert sum(int(a.sum()) for a in apart.values()) <= 1e-3 * sum(a.numel() for a in apart.values())


@fast_only(0)
@pytest.mark.parametrize("adapter", [{"name": "none"}, {"name": "lora", "r": 3, "alpha": 6}])
def test_error_feedback_sends_later_what_a_message_lost(
    lab: Any, adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """e_0 = 0, sent_t = D(Q(u_t + e_{t-1})), e_t = u_t + e_{t-1} - sent_t: over rounds the sum of what arrives is the sum of
    the updates less what the last message lost."""
    from fedsim.channel.feedback import ErrorFeedback
    from fedsim.training.lanes import LaneGroup

    updates, arrived, groups = {}, {}, []
    original, finish = ErrorFeedback.up, LaneGroup.finish

    def note(self: ErrorFeedback, message: Any, *rest: Any) -> Any:
        out, lost = original(self, message, *rest)
        for k, task in enumerate(groups[-1].tasks):
            for name, update in message["update"].items():
                updates.setdefault((task.client, name), []).append(update[k].clone())
                arrived.setdefault((task.client, name), []).append(out["update"][name][k].clone())
        return out, lost

    monkeypatch.setattr(ErrorFeedback, "up", note)
    monkeypatch.setattr(LaneGroup, "finish", lambda self, fit: (groups.append(self), finish(self, fit)))
    folder = lab.run(adapter=adapter, rounds=3, messages={"up": "nf4", "error_feedback": True})
    assert len(next(iter(updates.values()))) == 3
    code = codec("nf4")
    for key, each in updates.items():
        lost = torch.zeros_like(each[0]).reshape(-1)
        for u, got in zip(each, arrived[key], strict=True):
            wanted = u.reshape(-1) + lost
            expected = code.round_trip(wanted)
            assert torch.allclose(got.reshape(-1), expected, rtol=0, atol=1e-12)
            lost = wanted - expected
    kept = json.loads((folder / "model.json").read_text())
    assert kept["kept_bytes_per_client"]["federated"] == 8 * (2 + 1) * kept["trained"], "two moments and what was lost"


def test_unknown_message_types_are_one_line(lab: Any) -> None:
    with pytest.raises(UserError, match=r"^messages.up: .*'int7'.*blockwise8"):
        lab.exp(messages={"up": "int7"})
    with pytest.raises(UserError, match=r"^messages.error_feedback: True needs .*messages.up"):
        lab.exp(messages={"error_feedback": True})
    assert lab.exp(messages={"up": "8bit", "down": "float16"}).messages.up == "blockwise8"


@pytest.mark.parametrize("modes", [["local"], ["federated"]])
def test_messages_without_a_federated_mode_are_said_to_have_no_effect(
    lab: Any, monkeypatch: pytest.MonkeyPatch, modes: list[str]
) -> None:
    from fedsim.runs.progress import Progress

    said: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: said.append(text))
    lab.run(messages={"up": "nf4"}, modes=modes)
    assert any(text.startswith("messages: nothing is sent") for text in said) == (modes == ["local"])


def test_a_place_for_sums_that_is_not_there_is_refused(lab: Any) -> None:
    with pytest.raises(UserError, match=r"^aggregation.device: 'cuda', but training is on cpu; use auto or cpu$"):
        lab.run(aggregation={"device": "cuda"})


def test_ids_of_runs_from_before_messages_stay(lab: Any) -> None:
    exp = lab.exp()
    assert "messages" not in exp.identity() and "aggregation" not in exp.identity()
    assert lab.exp(messages={"up": "nf4"}).identity()["messages"] == {"up": "nf4"}


# ------------------------------------------------------------------------------------------------------ memory

PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, batches = json.loads(open(sys.argv[1]).read())
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for rows in batches:
    optimizer.zero_grad()
    for row in rows:
        ids = torch.tensor(row)[None]
        (model(input_ids=ids, labels=ids).loss / len(rows)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
assert not [name for name in sys.modules if name.startswith("fedsim")]
"""
OURS = "import sys, fedsim; fedsim.run(fedsim.Experiment.load(sys.argv[1]), progress=False)"


def peak_of(script: str, config: Path) -> int:
    """Highest resident memory of a process that runs the script, in bytes, as the system tells it of a child that ended."""
    root = str(Path(fedsim.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script, str(config)], env=env, stderr=subprocess.PIPE, text=True)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, errors[-2000:]
    return usage.ru_maxrss * 1024


def own_peak_of(script: str, config: Path) -> int:
    """The same of the process alone, without that of the workers it has waited for."""
    say = "; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    env = {**os.environ, "PYTHONPATH": str(Path(fedsim.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script + say, str(config)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the unit of ru_maxrss differs between systems")
@pytest.mark.parametrize("size", ["41M", "74M"])
def test_a_round_of_three_whole_models_takes_little_more_memory_than_one(lab: Any, size: str) -> None:
    """Beyond a script of torch and transformers alone that fine-tunes one: the global copy, the running sum and a chunk, by a
    tenth and 100 MB at most, in which fedsim's own libraries have to find room too; the largest also in each of two workers,
    which share the copy and the sum. The process that they work for trains nothing."""
    width, layers, inner, least = {"41M": (640, 8, 1760, 160e6), "74M": (768, 10, 2048, 280e6)}[size]
    config = AutoModelForCausalLM.from_pretrained(lab.base("llama")).config
    config.update({"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner})
    config.update({"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64})
    folder = lab.root / "base"
    model = AutoModelForCausalLM.from_config(config)
    nbytes = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(folder)
    del model
    for file in Path(lab.base("llama")).glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert nbytes > least, "a copy too many must not fit into what is allowed"
    chunk = 16
    exp = lab.exp(
        **NONE,
        model={"path": str(folder), "dtype": "float32"},
        local={"steps": 2, "batch_size": 2, "micro_batch": 1, "keep_state": False},
        aggregation={"chunk_mb": chunk},
        evaluate={"batch_size": 2},
        training={"lanes": 1, "checkpointing": False},
    )
    file, rows = lab.root / "exp.yaml", lab.root / "rows.json"
    file.write_text(exp.to_yaml())
    tokens = prepare(exp).tokens["train"]
    each = [[tokens.row(row).tolist() for row in batch] for batch in fedsim.batches(exp, "site-1", 1)]
    rows.write_text(json.dumps([str(folder), each]))
    plain, ours = peak_of(PLAIN, rows), peak_of(OURS, file)
    allowed = 1.1 * (2 * nbytes + (chunk << 20)) + 100e6
    assert plain > 4 * nbytes, "weights, gradients and two moments"
    assert ours - plain <= allowed, (
        f"{ours / 1e6:.0f} MB, plain {plain / 1e6:.0f} MB, allowed {allowed / 1e6:.0f} MB more"
    )
    if size != "74M":
        return
    pool = dataclasses.replace(exp, name="pool", executor={"name": "pool", "devices": ["cpu"], "workers": 2})
    file.write_text(pool.to_yaml())
    main = own_peak_of(OURS, file)
    (run,) = (lab.root / "results" / "pool").iterdir()
    workers = json.loads((run / "memory.json").read_text())["measured_bytes"]
    assert len(workers) == 2
    assert max(workers) - plain <= allowed, f"{[w / 1e6 for w in workers]} MB"
    assert main <= plain, f"{main / 1e6:.0f} MB"
