"""transformers' `Trainer`, and TRL's `SFTTrainer`, as a client; behaves as NVFlare's `nvflare.client.hf` (docs/client-api.md).

    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()  # the received model: the score by which the best global model is selected
        trainer.train()     # one round

A round ends with a checkpoint of the trainer's own, and the next one resumes from it: optimizer, scheduler, scaler, order of
the examples and random states go on as in one long training, while the parameters are the received ones. Everything lies on the
trainer, so that those of many clients share a process.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from fedsim import client as flare
from fedsim.client import *  # noqa: F403  scripts import the rest of the client API from here, too
from fedsim.client.patching import (
    EVALUATE,
    STEPS,
    SUBMIT,
    TRAIN,
    Task,
    copied,
    is_running,  # noqa: F401  in `__all__`
    load,
    meta_of,
    numbers,
    state_of,
)
from fedsim.core.errors import UserError

__all__ = [*flare.__all__, "patch"]
_log = logging.getLogger(__name__)
_STATE = "trainer_state.json"


def patch(
    trainer: Trainer,
    restore_state: bool = True,
    load_state_dict_strict: bool = True,
    params_scope: str = "auto",
    server_key_prefix: str | None = None,
    local_epochs: float | None = None,
    local_steps: int | None = None,
    stream_metrics: bool = False,
) -> Trainer:
    """Make `trainer.evaluate()` and `trainer.train()` receive the model of the round, and send theirs.

    A round's budget is `local_steps`, else `local_epochs`, else `args.max_steps`, else `args.num_train_epochs`; the schedule of
    the learning rate spans the budgets of all rounds.

    Args:
        trainer: a transformers `Trainer` on one process.
        restore_state: optimizer, scheduler, scaler and order of the examples go on in the next round; False: each begins afresh.
        load_state_dict_strict: received and own names have to be the same.
        params_scope: adapter | model | auto: of a PEFT model the adapter alone travels.
        server_key_prefix: of the server's names, which the trainer's model lacks.
        local_epochs, local_steps: budget of a round.
        stream_metrics: send what the trainer logs as metrics.

    Returns:
        The trainer.

    Raises:
        TypeError: `trainer` is no `Trainer`.
        UserError: for settings that do not go together with rounds.
    """
    options = {name: value for name, value in locals().items() if name != "trainer"}
    if not isinstance(trainer, Trainer):
        raise TypeError(f"patch takes a transformers Trainer, not {type(trainer).__name__}")
    patched: _Rounds | None = getattr(trainer, "_fedsim", None)
    if patched is not None and patched.options != options:
        raise UserError(f"the trainer is patched already, with other settings: {patched.options}")
    if patched is None:
        _refuse(trainer, options)
        trainer._fedsim = _Rounds(trainer, options)
    return trainer


def _refuse(trainer: Trainer, options: dict[str, Any]) -> None:
    """Raises UserError for what cannot be done in rounds."""
    args, restore = trainer.args, options["restore_state"]
    built = trainer.optimizer is not None or trainer.lr_scheduler is not None
    if options["params_scope"] not in ("auto", "adapter", "model"):
        raise UserError(f"params_scope: {options['params_scope']!r} is not one of auto, adapter, model")
    refused = {
        "give local_epochs or local_steps, not both": None not in (options["local_epochs"], options["local_steps"]),
        "DeepSpeed does not work with patch; remove args.deepspeed": bool(args.deepspeed),
        "FSDP does not work with patch; remove args.fsdp": trainer.is_fsdp_enabled,
        "patch takes trainers on one process; start the script without torchrun": args.world_size > 1,
        "load_best_model_at_end would replace the model of the round; the best global model is selected by the server": (
            args.load_best_model_at_end
        ),
        "save_only_model leaves the optimizer out of checkpoints; remove it, or give restore_state=False": (
            args.save_only_model and restore
        ),
        "restore_state=False makes a new optimizer for each round, and cannot do so with one that is given to the trainer": (
            built and not restore
        ),
        "params_scope: 'adapter' needs a PEFT model": (
            options["params_scope"] == "adapter" and not isinstance(trainer.model, PeftModel)
        ),
    }
    for why, holds in refused.items():
        if holds:
            raise UserError(why)


class _Rounds:
    """One patched trainer: the task at hand, and where its rounds stand."""

    def __init__(self, trainer: Trainer, options: dict[str, Any]) -> None:
        self.trainer, self.options, self.task = trainer, options, Task()
        self.budget: int | None = None  # optimizer steps of a round
        self.stop_at, self.inside = 0, False
        self.ours = {shared: dict(shared._shared_state) for shared in (PartialState, AcceleratorState, GradientState)}
        scaler = trainer.accelerator.scaler
        self.scaler = None if scaler is None else scaler.state_dict()
        self.do = {name: getattr(trainer, name) for name in ("train", "evaluate")}
        trainer.train, trainer.evaluate = self.train, self.evaluate
        trainer.add_callback(_Callback(self))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float] | None:
        """`Trainer.evaluate` of the received model; without a task that of the model as it is."""
        if self.inside:  # `train` evaluates, or this is one of several data sets
            return self.do["evaluate"](*args, **kwargs)
        kind = self.task.kind()
        if kind == SUBMIT:
            return self.submit()
        with self._entered():
            if kind is not None:
                self.load()
            metrics = self.do["evaluate"](*args, **kwargs)
        if kind is not None and self.task.metrics is None:
            self.task.metrics = numbers(metrics)
        if kind == EVALUATE:
            self.task.answer()
        return metrics

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train` for one round; where no training is asked for, nothing."""
        kind = self.task.kind()
        if kind == SUBMIT:
            return self.submit()
        if kind != TRAIN:
            _log.info("train is skipped: this task is not to train, or is done")
            return None
        trainer, asked, restore = self.trainer, self.trainer.args.max_steps, self.options["restore_state"]
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(trainer.args.output_dir)
        own = self.checkpoint(before=self.task.model.current_round)
        start = resume_from_checkpoint or (own if restore else None)
        if self.budget is None:
            with self._entered():
                self.budget = self._budget()
        if not restore:
            self._forget()
        before = TrainerState() if start is None else TrainerState.load_from_json(str(Path(start) / _STATE))
        self.stop_at = before.global_step + self.budget
        rounds = (self.task.model.total_rounds or 1) if restore else 1
        trainer.args.max_steps = max(self.budget * rounds, self.stop_at)
        try:
            with self._entered():
                done = self.do["train"](None if start is None else str(start), *args, **kwargs)
                self.save(own)
        finally:
            trainer.args.max_steps = asked
        self.task.answer(self.params(), meta_of(self.model, self._weight(before)))
        return done

    def submit(self) -> None:
        """Send the model as it was after its last round."""
        last = self.checkpoint()
        if last is not None:
            with self._entered():
                self.trainer._load_from_checkpoint(str(last))
        self.task.answer(self.params(), {STEPS: 0})

    @property
    def model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)

    def params(self) -> dict[str, Tensor]:
        """What is sent: copies of the adapter's or the model's tensors, by the server's names."""
        state = state_of(self.model, self.options["params_scope"] == "model")
        return copied(state, self.options["server_key_prefix"] or "")

    def load(self) -> None:
        """Put the received parameters into the model; at most once a task, as training starts from them."""
        if self.task.loaded:
            return
        prefix, strict = self.options["server_key_prefix"] or "", self.options["load_state_dict_strict"]
        received = {n.removeprefix(prefix): value for n, value in (self.task.model.params or {}).items()}
        load(self.model, received, strict, self.options["params_scope"] == "model")
        self.task.loaded = True

    def _budget(self) -> int:
        """Optimizer steps of a round."""
        args, steps, epochs = self.trainer.args, self.options["local_steps"], self.options["local_epochs"]
        loader = self.trainer.get_train_dataloader()
        try:
            batches = len(loader)
        except TypeError:
            batches = None
        if batches == 0:
            raise UserError(
                "the training data loader is empty: look at the data set, the batch size and dataloader_drop_last"
            )
        if steps is None and epochs is None and args.max_steps > 0:
            steps = args.max_steps
        if steps is None and batches is None:
            raise UserError("the training data loader has no length: give patch local_steps")
        if steps is None:
            epochs = args.num_train_epochs if epochs is None else epochs
            steps = math.ceil(epochs * math.ceil(batches / args.gradient_accumulation_steps))
        if steps < 1:
            raise UserError(f"a round has {steps} steps: give local_steps or local_epochs above 0")
        return steps

    def _weight(self, before: TrainerState) -> int:
        """What counts as steps: tokens, where the trainer counts them, else examples."""
        args, state = self.trainer.args, self.trainer.state
        tokens = (state.num_input_tokens_seen or 0) - (before.num_input_tokens_seen or 0)
        examples = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return tokens if tokens > 0 else (state.global_step - before.global_step) * examples

    def _forget(self) -> None:
        """Training starts with a new optimizer and scheduler."""
        self.trainer.optimizer = self.trainer.lr_scheduler = None
        self.trainer._created_lr_scheduler = False
        if self.scaler is not None:
            self.trainer.accelerator.scaler.load_state_dict(self.scaler)

    @property
    def home(self) -> Path:
        """Where the checkpoints of rounds lie: apart by run and client, whoever else has this output folder."""
        return Path(self.trainer.args.output_dir) / "rounds" / flare.get_job_id() / flare.get_site_name()

    def checkpoint(self, before: int | None = None) -> Path | None:
        """The checkpoint of the last round, or of the last one before a round.

        Raises:
            UserError: there was one before that round, and it is gone.
        """
        rounds = {r[0]: (path, r) for path in self.home.glob("round-*") for r in [_rounds_of(path)]}
        found = [number for number in sorted(rounds) if before is None or number < before]
        later = [r for number, (_, r) in sorted(rounds.items()) if number not in found][:1]
        if not found and later and later[0][-1] < before:
            gone = f"round {before} resumes from a checkpoint of the trainer's before it, which is gone"
            raise UserError(f"{gone}; remove {self.home} and start the run anew")
        return rounds[found[-1]][0] if found else None

    def save(self, start: Path | None) -> None:
        """Save the trainer's own checkpoint, whole or not at all; the one it began from stays, for a round that is done again."""
        trainer, args, number = self.trainer, self.trainer.args, self.task.model.current_round or 0
        kept = {name: getattr(args, name) for name in ("output_dir", "save_total_limit", "push_to_hub")}
        home = self.home
        place = home / (f"round-{number}" if start is None else f"round-{number}-since-{_rounds_of(start)[-1]}")
        args.output_dir, args.save_total_limit, args.push_to_hub = str(home), None, False
        try:
            trainer._save_checkpoint(trainer.model, None)
        finally:
            for name, value in kept.items():
                setattr(args, name, value)
        for old in home.glob("round-*"):
            if old != start:
                shutil.rmtree(old)
        (home / f"checkpoint-{trainer.state.global_step}").rename(place)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Run the trainer's own method, with what accelerate keeps for the whole process as this trainer left it."""
        theirs = {shared: dict(shared._shared_state) for shared in self.ours}
        _install(self.ours)
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            self.ours = {shared: dict(shared._shared_state) for shared in self.ours}
            _install(theirs)


def _rounds_of(checkpoint: Path) -> list[int]:
    """The round of a checkpoint, and the first one of the trainer if that was another."""
    return [int(number) for number in re.findall(r"\d+", checkpoint.name)]


def _install(states: dict[Any, dict[str, Any]]) -> None:
    for shared, state in states.items():
        shared._shared_state.clear()
        shared._shared_state.update(state)


class _Callback(TrainerCallback):
    """Starts a round from the received parameters and ends it in time."""

    def __init__(self, rounds: _Rounds) -> None:
        self.rounds = rounds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rounds.task.loaded = False  # resuming has put the weights of the checkpoint there
        self.rounds.load()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.rounds.stop_at:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.rounds.options["stream_metrics"] and flare.pending():
            for name, value in numbers(logs or {}).items():
                flare.log(name, value, global_step=state.global_step)
