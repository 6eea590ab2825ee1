"""Patched trainers: the rounds of one client are one long training, to the bit, and a server sees what it should.

The oracle is the unpatched trainer. `Server` stands for the simulator: it hands out tasks and keeps the answers.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fedsim
from fedsim import client
from fedsim.core.errors import UserError

TRAIN, EVALUATE, SUBMIT = "train", "validate", "submit_model"
ROUNDS = 3


class Server:
    """One client's side of the API: tasks in, answers out.

    Attributes:
        tasks: what is still to be handed out: (task, parameters, round).
        answers: the models sent.
    """

    def __init__(self, site: str = "site-1", rounds: int | None = ROUNDS) -> None:
        self.site, self.rounds = site, rounds
        self.tasks: list[tuple[str, Any, int]] = []
        self.answers: list[Any] = []
        self.logs: list[tuple[str, float]] = []
        self.now: tuple[str, Any] | None = None

    def receive(self, timeout: float | None = None) -> Any:
        if self.now is None and self.tasks:
            task, params, number = self.tasks.pop(0)
            params = self.answers[-1].params if params == "the last answer" else params
            model = client.FLModel(params=params, current_round=number, total_rounds=self.rounds)
            self.now = task, model
        return None if self.now is None else self.now[1]

    def send(self, model: Any, clear_cache: bool = True) -> None:
        assert self.now is not None, "an answer without a task"
        self.answers.append(model)

    def use(self, monkeypatch: pytest.MonkeyPatch) -> Server:
        """Make this the server that the API talks to."""
        asked = {name: lambda task=task: self.now[0] == task for name, task in KINDS.items()}
        functions = {
            "init": lambda *a, **k: None,
            "receive": self.receive,
            "send": self.send,
            "clear": lambda: setattr(self, "now", None),
            "pending": lambda: self.now is not None,
            "is_running": lambda: self.receive() is not None,
            "get_site_name": lambda: self.site,
            "get_job_id": lambda: "job",
            "get_task_name": lambda: self.now[0],
            "log": lambda name, value, *a, **k: self.logs.append((name, value)),
        }
        for name, function in {**functions, **asked}.items():
            monkeypatch.setattr(client, name, function)
        return self


KINDS = {"is_train": TRAIN, "is_evaluate": EVALUATE, "is_submit_model": SUBMIT}


def rounds(first: Any = None, count: int = ROUNDS) -> list[tuple[str, Any, int]]:
    """Training tasks of a federation of one: each starts from what came back."""
    return [(TRAIN, first if r == 0 else "the last answer", r) for r in range(count)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------- transformers

WORDS, LENGTH = 48, 8


def examples(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def hf(folder: Path, *, lora: bool = True, kind: Any = None, count: int = 10, **args: Any) -> Any:
    """A trainer of a small LLaMA with dropout on shuffled examples: whatever does not go on shows in the bits."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    set_seed(1)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **size, attention_dropout=0.1, pad_token_id=0))
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]))
    usual = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 2, "seed": 3, "use_cpu": True}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(folder), **{**usual, **quiet, **args})
    return (kind or Trainer)(model=model, args=arguments, train_dataset=examples(count), eval_dataset=examples(4, 9))


def adapter(trainer: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return {n: t.detach().clone() for n, t in get_peft_model_state_dict(trainer.model).items()}


def loop(trainer: Any) -> None:
    while client.is_running():
        trainer.evaluate()
        trainer.train()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server().use(monkeypatch)


@pytest.fixture
def patch() -> Callable[..., Any]:
    from fedsim.client import hf as flare

    return flare.patch


def test_rounds_of_one_client_are_one_training(server: Server, patch: Any, tmp_path: Path) -> None:
    """Four steps of five a pass: rounds end in the middle of passes, and the schedule spans them all."""
    plain = hf(tmp_path / "plain", max_steps=4 * ROUNDS, lr_scheduler_type="cosine")
    first = plain.evaluate()  # draws from the random state, as the first evaluation of the other does
    plain.train()
    server.tasks = rounds()
    trainer = patch(hf(tmp_path / "rounds", max_steps=4, lr_scheduler_type="cosine"))
    loop(trainer)
    assert len(server.answers) == ROUNDS
    assert same(server.answers[-1].params, adapter(plain))
    assert all("lora_" in name for name in server.answers[0].params)
    assert server.answers[0].metrics == {"eval_loss": first["eval_loss"]}
    assert [a.meta["NUM_STEPS_CURRENT_ROUND"] for a in server.answers] == [8] * ROUNDS
    assert trainer.args.max_steps == 4


def test_each_round_may_have_its_own_process(server: Server, patch: Any, tmp_path: Path) -> None:
    """A trainer made anew resumes from the checkpoint of the round before: the same bits."""
    server.tasks = rounds()
    loop(patch(hf(tmp_path / "one", max_steps=4)))
    together = server.answers
    server.answers, server.tasks = [], rounds()
    for _ in range(ROUNDS):
        trainer = patch(hf(tmp_path / "many", max_steps=4))
        trainer.evaluate()
        trainer.train()
    assert [same(a.params, b.params) for a, b in zip(together, server.answers, strict=True)] == [True] * ROUNDS
    for number in (
        2,
        1,
    ):  # killed in round 2, which is trained again; then as if round 1 had been lost with its checkpoint
        server.now, server.tasks = None, [(TRAIN, together[number - 1].params, number)]
        again = patch(hf(tmp_path / "many", max_steps=4))
        again.evaluate()
        if number == 2:
            again.train()
            assert same(server.answers[-1].params, together[2].params)
        else:
            with pytest.raises(UserError, match="a checkpoint of the trainer's before it, which is gone"):
                again.train()


def test_training_starts_from_the_received_model(server: Server, patch: Any, tmp_path: Path) -> None:
    """Not from the checkpoint that it resumes from: without learning what comes back is what was sent."""
    trainer = patch(hf(tmp_path, max_steps=1, learning_rate=0.0))
    first = adapter(trainer)
    for number, shift in enumerate((0.1, 0.2, 0.3)):
        params = {n: t + shift for n, t in first.items()}
        server.tasks = [(TRAIN, params, number)]
        loop(trainer)
        assert same(server.answers[-1].params, params)


def test_without_restored_state_each_round_begins_afresh(server: Server, patch: Any, tmp_path: Path) -> None:
    server.tasks = rounds(count=2)
    trainer = patch(hf(tmp_path / "rounds", max_steps=3), restore_state=False)
    trainer.train()
    plain = hf(tmp_path / "plain", max_steps=3)
    plain.train()
    assert same(server.answers[0].params, adapter(plain))
    torch.manual_seed(5)
    assert client.is_running()
    trainer.train()
    torch.manual_seed(5)
    plain.optimizer = plain.lr_scheduler = None
    plain.train()
    assert same(server.answers[1].params, adapter(plain))


@pytest.mark.parametrize(
    ("args", "options", "steps"),
    [
        ({"max_steps": 3, "num_train_epochs": 7}, {"local_steps": 1}, 1),
        ({"max_steps": 3}, {"local_epochs": 0.3}, 2),  # of five steps a pass, rounded up
        ({"max_steps": 3, "num_train_epochs": 7}, {}, 3),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 2}, {}, 3),
    ],
)
def test_budget_of_a_round(server: Server, patch: Any, tmp_path: Path, args: Any, options: Any, steps: int) -> None:
    server.tasks = rounds(count=1)
    trainer = patch(hf(tmp_path, **args), **options)
    trainer.train()
    assert trainer.state.global_step == steps
    examples = 2 * args.get("gradient_accumulation_steps", 1)
    assert server.answers[0].meta["NUM_STEPS_CURRENT_ROUND"] == steps * examples
    assert trainer.state.max_steps == steps * ROUNDS


def test_evaluate_and_submit_tasks(server: Server, patch: Any, tmp_path: Path) -> None:
    """Evaluating others' models changes neither what is submitted nor the training to come."""
    server.tasks = rounds(count=2)
    loop(patch(hf(tmp_path / "plain", max_steps=4)))
    undisturbed = server.answers
    start = adapter(hf(tmp_path / "other"))
    server.answers, server.tasks = [], [*rounds(count=1), (EVALUATE, start, 0), (SUBMIT, None, 0)]
    trainer = patch(hf(tmp_path / "rounds", max_steps=4))
    loop(trainer)
    trained, scores, submitted = server.answers
    assert scores.params is None and scores.metrics["eval_loss"] == trained.metrics["eval_loss"]
    assert same(submitted.params, trained.params) and submitted.meta["NUM_STEPS_CURRENT_ROUND"] == 0
    server.tasks = [(TRAIN, trained.params, 1)]
    loop(trainer)
    assert same(server.answers[-1].params, undisturbed[1].params)


def test_after_the_answer_the_trainer_is_the_users(server: Server, patch: Any, tmp_path: Path) -> None:
    server.tasks = rounds(count=1)
    trainer = patch(hf(tmp_path, max_steps=4))
    loop(trainer)
    assert trainer.evaluate()["eval_loss"] != server.answers[0].metrics["eval_loss"]  # of the trained model
    assert trainer.train() is None and len(server.answers) == 1


def test_a_loop_without_training_ends_in_one_line(server: Server, patch: Any, tmp_path: Path) -> None:
    from fedsim.client import hf as flare

    server.tasks = rounds(count=1)
    trainer = patch(hf(tmp_path, max_steps=1))
    assert flare.is_running() and flare.is_running()  # nobody has begun
    trainer.evaluate()
    with pytest.raises(RuntimeError, match="train, has no answer yet: call the trainer's train or fit"):
        flare.is_running()
    trainer.train()
    assert not flare.is_running()


def test_two_patched_trainers_in_one_process(monkeypatch: pytest.MonkeyPatch, patch: Any, tmp_path: Path) -> None:
    """By turns as alone, although accelerate keeps precision and accumulation for the whole process."""
    from transformers import TrainingArguments

    settings: list[dict[str, Any]] = [
        {"max_steps": 4, "bf16": True},
        {"max_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3},
    ]

    def run(which: list[int]) -> dict[int, dict[str, Tensor]]:
        servers, trainers, states = {}, {}, {}
        for i in dict.fromkeys(which):
            servers[i] = Server(f"site-{i}").use(monkeypatch)
            servers[i].tasks = rounds()
            trainers[i] = patch(hf(tmp_path / "shared", **settings[i]))
            states[i] = torch.get_rng_state()
        for i in which:
            servers[i].use(monkeypatch)
            TrainingArguments(
                output_dir=str(tmp_path / "third"), use_cpu=True
            )  # a third script begins: it clears that state
            torch.set_rng_state(states[i])
            assert client.is_running()
            trainers[i].evaluate()
            trainers[i].train()
            states[i] = torch.get_rng_state()
        return {i: s.answers[-1].params for i, s in servers.items()}

    alone = {**run([0] * ROUNDS), **run([1] * ROUNDS)}
    by_turns = run([0, 1, 1, 0, 0, 1])
    assert [same(alone[i], by_turns[i]) for i in (0, 1)] == [True, True]


def test_whole_models_and_prefixed_names(server: Server, patch: Any, tmp_path: Path) -> None:
    model = hf(tmp_path / "a", lora=False).model
    start = {f"model.{n}": t.detach().float().numpy() + np.float32(0.01) for n, t in model.state_dict().items()}
    server.tasks = rounds(start, count=1)
    trainer = patch(hf(tmp_path / "b", lora=False), server_key_prefix="model.")
    trainer.evaluate()
    state = {f"model.{n}": t.numpy() for n, t in trainer.model.state_dict().items()}
    assert all(np.array_equal(state[n], start[n]) for n in start)
    trainer.model.__fl_meta__ = {"NUM_STEPS_CURRENT_ROUND": 7, "SITE": "x"}
    trainer.train(None)
    sent = server.answers[0]
    assert sent.params.keys() == start.keys() and sent.meta == {"NUM_STEPS_CURRENT_ROUND": 7, "SITE": "x"}
    before = {n: t.clone() for n, t in sent.params.items()}
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1)
    assert same(sent.params, before), "what is sent is a copy"


def test_received_names_and_shapes_have_to_fit(server: Server, patch: Any, tmp_path: Path) -> None:
    good = {n: t.numpy() for n, t in adapter(hf(tmp_path / "a")).items()}
    name = next(iter(good))
    for params, words in (
        ({"weight": np.zeros(2)}, "1 name (weight) not in the model"),
        ({**good, "more": np.zeros(2)}, "1 name (more) not in the model, 0 names not received"),
        ({**good, name: np.zeros((2, 3))}, f"parameter {name} has shape (2, 3), the model's"),
    ):
        server.now, server.tasks = None, [(TRAIN, params, 0)]
        with pytest.raises(UserError, match="") as error:
            patch(hf(tmp_path / "b", max_steps=1)).evaluate()
        assert words in str(error.value) and "\n" not in str(error.value)
    server.now, server.tasks = None, [(TRAIN, {name: good[name], "more": np.zeros(2)}, 0)]
    loop(patch(hf(tmp_path / "c", max_steps=1), load_state_dict_strict=False))
    assert len(server.answers) == 1


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        ({}, {"local_steps": 1, "local_epochs": 1}, "local_epochs or local_steps, not both"),
        ({}, {"params_scope": "all"}, "params_scope: 'all' is not one of"),
        ({"save_only_model": True}, {}, "save_only_model"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1},
            {},
            "load_best_model_at_end",
        ),
    ],
)
def test_refused_settings(server: Server, patch: Any, tmp_path: Path, args: Any, options: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        patch(hf(tmp_path, **args), **options)


def test_other_refusals(server: Server, patch: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="takes a transformers Trainer, not int"):
        patch(3)
    with pytest.raises(UserError, match="needs a PEFT model"):
        patch(hf(tmp_path, lora=False), params_scope="adapter")
    for flag in ("is_fsdp_enabled", "deepspeed"):
        trainer = hf(tmp_path)
        setattr(trainer if flag.startswith("is") else trainer.args, flag, True)
        with pytest.raises(UserError, match="FSDP" if flag.startswith("is") else "DeepSpeed"):
            patch(trainer)
    trainer = patch(hf(tmp_path), local_steps=1)
    assert patch(trainer, local_steps=1) is trainer
    with pytest.raises(UserError, match="patched already"):
        patch(trainer, local_steps=2)
    server.tasks = rounds()
    empty = patch(hf(tmp_path, count=1, dataloader_drop_last=True, max_steps=2))
    with pytest.raises(UserError, match="loader is empty"):
        empty.train()


def test_sft_trainer(server: Server, patch: Any, tmp_path: Path) -> None:
    """TRL's trainer wraps the model itself, and the rounds are one training there, too."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra `trl`)")
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny = Path(fedsim.__file__).parent / "assets/tiny"

    def trainer(folder: str, steps: int) -> Any:
        torch.manual_seed(0)
        datasets = importlib.import_module("datasets")
        rows = datasets.Dataset.from_dict({"text": [f"profit rose by {i} percent" for i in range(6)]})
        config = trl.SFTConfig(
            output_dir=str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=2, use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy="no", max_length=32, bf16=False, learning_rate=1e-2,
        )  # fmt: skip
        return trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny),
            args=config,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(tiny),
            peft_config=LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )

    plain = trainer("plain", 4)
    plain.evaluate()
    plain.train()
    server.tasks = rounds(count=2)
    server.rounds = 2
    loop(patch(trainer("rounds", 2)))
    assert same(server.answers[-1].params, adapter(plain))
    assert "eval_loss" in server.answers[0].metrics


# ------------------------------------------------------------------------------------------- Lightning

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


@pytest.fixture(params=PACKAGES)
def pl(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    package = pytest.importorskip(request.param, reason="Lightning is not installed (extra `lightning`)")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield package


def numbers_in() -> DataLoader:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)


def lit(pl: Any, lora: bool = False) -> Any:
    class Lit(pl.LightningModule):
        """A classifier whose learning rate falls epoch by epoch."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
            if lora:
                from peft import LoraConfig, get_peft_model

                self.net = get_peft_model(self.net, LoraConfig(r=2, target_modules=["0"]))

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def training_step(self, batch: Any, number: int) -> Tensor:
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, number: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    return Lit()


def trainer_of(pl: Any, **args: Any) -> Any:
    usual = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{**usual, **quiet, **args})


def lit_loop(trainer: Any, module: Any, validate: bool = True) -> None:
    while client.is_running():
        if validate:
            trainer.validate(module, numbers_in(), verbose=False)
        trainer.fit(module, numbers_in(), numbers_in())


def lit_patch(trainer: Any, **options: Any) -> Any:
    from fedsim.client import lightning as flare

    return flare.patch(trainer, **options)


@pytest.mark.parametrize(
    ("each", "whole"), [({"max_epochs": 2}, {"max_epochs": 6}), ({"max_steps": 5}, {"max_steps": 15})]
)
def test_lightning_rounds_are_one_training(pl: Any, server: Server, each: Any, whole: Any) -> None:
    """Moments and learning rates go on: AdamW and the steps of the schedule would show it."""
    module = lit(pl)
    trainer_of(pl, **whole).fit(module, numbers_in(), numbers_in())
    server.tasks = rounds()
    lit_loop(lit_patch(trainer_of(pl, **each)), lit(pl))
    assert same(server.answers[-1].params, dict(module.state_dict()))
    assert [a.meta["NUM_STEPS_CURRENT_ROUND"] for a in server.answers] == [10 if "max_epochs" in each else 5] * ROUNDS


def test_lightning_scores_are_of_the_received_model(pl: Any, server: Server) -> None:
    """An explicit validation counts; that inside a fit, and the sanity check before it, do not."""
    first, trained = lit(pl), lit(pl)
    scores = trainer_of(pl).validate(first, numbers_in(), verbose=False)
    trained.net[0].weight.data.add_(1)
    server.tasks = rounds({n: t.numpy() for n, t in first.state_dict().items()}, count=1)
    trained.__fl_meta__ = {"NUM_STEPS_CURRENT_ROUND": 3, "SITE": "x"}
    lit_loop(lit_patch(trainer_of(pl, max_epochs=1)), trained)
    assert server.answers[0].metrics == scores[0]
    assert server.answers[0].meta == {"NUM_STEPS_CURRENT_ROUND": 3, "SITE": "x"}
    server.tasks = rounds(count=1)
    lit_loop(lit_patch(trainer_of(pl, max_epochs=1)), lit(pl), validate=False)
    assert server.answers[1].metrics is None


def test_lightning_evaluate_and_submit_tasks(pl: Any, server: Server) -> None:
    module, other = lit(pl), lit(pl)
    server.tasks = [*rounds(count=1), (EVALUATE, dict(other.state_dict()), 0), (SUBMIT, None, 0)]
    trainer = lit_patch(trainer_of(pl, max_epochs=1))
    lit_loop(trainer, module)
    trained, scores, submitted = server.answers
    assert scores.params is None and scores.metrics == trained.metrics
    assert same(submitted.params, trained.params) and not same(trained.params, dict(other.state_dict()))
    assert trainer.fit(module, numbers_in()) is None and len(server.answers) == 3


def test_lightning_without_restored_state(pl: Any, server: Server) -> None:
    module = lit(pl)
    for _ in range(2):
        trainer_of(pl, max_epochs=2).fit(module, numbers_in())
    server.tasks = rounds(count=2)
    lit_loop(lit_patch(trainer_of(pl, max_epochs=2), restore_state=False), lit(pl), validate=False)
    assert same(server.answers[-1].params, dict(module.state_dict()))


def test_lightning_sends_adapters_alone(pl: Any, server: Server) -> None:
    server.tasks = rounds(count=2)
    lit_loop(lit_patch(trainer_of(pl, max_epochs=1)), lit(pl, lora=True))
    names = {f"net.base_model.model.0.lora_{x}.weight" for x in "AB"}
    assert server.answers[0].params.keys() == names
    assert not same(server.answers[0].params, server.answers[1].params)


def test_lightning_logger_sends_what_the_module_logs(pl: Any, server: Server) -> None:
    from fedsim.client import lightning as flare

    server.tasks = rounds(count=1)
    trainer = lit_patch(trainer_of(pl, max_epochs=1, logger=flare.logger(), log_every_n_steps=1))
    lit_loop(trainer, lit(pl), validate=False)
    assert {"train_loss", "val_loss"} <= {name for name, _ in server.logs}


def test_lightning_refusals(pl: Any, server: Server) -> None:
    with pytest.raises(TypeError, match="takes a Lightning Trainer, not str"):
        lit_patch("trainer")
    trainer = trainer_of(pl, devices=2, strategy="ddp")
    with pytest.raises(UserError, match="on one process, this one has 2"):
        lit_patch(trainer)
    server.tasks = rounds({"w": np.zeros(2)})
    with pytest.raises(UserError, match="not this model's"):
        lit_loop(lit_patch(trainer_of(pl, max_epochs=1)), lit(pl))


# ------------------------------------------------------------------------------------------- whole runs

SCRIPTS = Path(__file__).resolve().parents[1] / "experiments" / "client_api"
needs_runs = pytest.mark.skipif(not hasattr(fedsim, "run_script"), reason="fedsim.run_script is not there")


@needs_runs
def test_a_script_of_transformers_in_one_process_or_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started anew for each round, it goes on from the trainer's checkpoints: the same bits as in one process."""
    monkeypatch.chdir(tmp_path)
    ends = []
    for launch in ("once", "each_round"):
        run = fedsim.run_script(SCRIPTS / "hello_hf.py", rounds=2, launch=launch, results=str(tmp_path), progress=False)
        ends.append(load_file(run.path / "global" / "model.safetensors"))
    assert same(*ends) and all("lora_" in name for name in ends[0])


@needs_runs
def test_a_script_of_lightning_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed (extra `lightning`)")
    monkeypatch.chdir(tmp_path)
    ends = []
    for name in ("one", "two"):
        run = fedsim.run_script(
            SCRIPTS / "hello_lightning.py", rounds=2, name=name, results=str(tmp_path), progress=False
        )
        ends.append(load_file(run.path / "global" / "model.safetensors"))
        lines = map(json.loads, (run.path / "metrics" / "federated.jsonl").read_text().splitlines())
        scores = [row for row in lines if row["name"] == "val_accuracy" and row["client"] is None]
        assert [row["round"] for row in scores] == [0, 1]
    assert same(*ends)
