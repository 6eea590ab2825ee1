"""The training loop: several models side by side, each in its lane, on one device.

All trained tensors of all lanes are views of one `[K, N]` tensor (K lanes, N elements), so an optimizer step is a few calls,
whatever the method. With `Net` K is 1 and the model is PEFT's own in padded batches; with `StackedNet` K lanes share each
forward and backward pass.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.core.heartbeat import beat
from fedsim.core.types import Engine
from fedsim.data.tokens import Tokens
from fedsim.models.forward import Net
from fedsim.models.stacked import StackedNet, StreamNet
from fedsim.training.config import LocalTrainingConfig
from fedsim.training.memory import trim
from fedsim.training.optim import FlatOptimizer, Kept, LaneOptimizer
from fedsim.training.private import PrivateLane


@dataclass(frozen=True)
class Lane:
    """What one lane does in a round.

    Attributes:
        batches: example numbers of each optimizer step's batches.
        rates: learning rate of each step.
        dropout: seed of its dropout.
        steps_done: optimizer steps behind its optimizer state, of all parameters or of each `[P]`.
        optimizer_state: reads the optimizer state to start from; None = a fresh start.
        due: whether it is to be evaluated after so many steps of the round.
        fresh: which parameters start with fresh optimizer state even so, bool `[P]`.
        private: what DP-SGD does with its gradients; None = they are not private. All lanes of a pass have it, or none.
    """

    batches: Sequence[Sequence[np.ndarray]]
    rates: Sequence[float]
    dropout: int
    steps_done: int | np.ndarray
    optimizer_state: Kept | None
    due: Callable[[int], bool]
    fresh: np.ndarray | None = None
    private: PrivateLane | None = None


class Hooks(Protocol):
    """What is called around each optimizer step for some of the lanes, while the first `active` lanes still have steps to do.

    `step` counts the steps that are done, of learning rates with the sums `lr_sums`, `[K]`; `batch` the batches of a step.

    Attributes:
        batches: batches of each step.
        moves: whether gradients are taken elsewhere than at the parameters.
        freezes: whether some parameters do not train at some steps.
    """

    batches: int
    moves: bool
    freezes: bool

    def at(self, point: Tensor, active: int, step: int, lr_sums: Tensor, batch: int) -> None:
        """Change `point`, a copy of the parameters `[K, N]`, to where the gradient is taken."""
        ...

    def adjust(self, active: int, step: int, lr_sums: Tensor, batch: int) -> None:
        """Change the gradients."""
        ...

    def freeze(self, trains: np.ndarray, step: int) -> None:
        """Mark which parameters the step changes, bool `[active, P]`."""
        ...

    def after_step(self, active: int, step: int, lr_sums: Tensor, rates: Tensor) -> None:
        """Change the parameters; the step just done had these learning rates, `[K]`."""
        ...


@dataclass(frozen=True)
class Fit:
    """What lanes have done in a round.

    Attributes:
        losses: sum of the mean losses of its steps, by lane.
        tokens: tokens trained on, by lane.
        computed: tokens that went through the base for these, pads and virtual tokens included.
        steps: optimizer steps, by lane.
        lr_sums: sum of their learning rates, `[K]`.
    """

    losses: list[float]
    tokens: np.ndarray
    computed: np.ndarray
    steps: list[int]
    lr_sums: Tensor


class Trainer:
    """Owns a device: the model, parameters, gradients and optimizer state of all lanes.

    Args:
        net: the model on its device.
        tokens: the training split.
        config: how to train.
        by_name: parameters may step at different times; several lanes are prepared for that in any case.

    Attributes:
        flat, grad: parameters and gradients of all lanes, `[K, N]`.
    """

    def __init__(
        self, net: Net | StackedNet, tokens: Tokens, config: LocalTrainingConfig, by_name: bool = False
    ) -> None:
        self.net, self.tokens, self.config, self.layout, self._by_name = net, tokens, config, net.layout, by_name
        self._allocate(1)
        if not self.stacked:
            net.adopt(self.flat)
        self.trim()  # what reading the examples and loading the base have held

    @property
    def stacked(self) -> bool:
        """Whether there can be more than one lane."""
        return isinstance(self.net, StackedNet) and not isinstance(self.net, StreamNet)

    def reserve(self, lanes: int) -> None:
        """Have room for so many lanes at least."""
        if lanes > len(self.flat):
            self._allocate(lanes)

    def _allocate(self, lanes: int) -> None:
        """Room for so many lanes: parameters, gradients, optimizer state."""
        self.optimizer = self.flat = self.grad = None  # freed before the new ones are made
        self.flat, self.grad = (
            torch.zeros(lanes, self.layout.numel, dtype=self.layout.dtype, device=self.net.device) for _ in range(2)
        )
        optim, sizes = self.config.optim, [torch.Size(s).numel() for s in self.layout.shapes.values()]
        if self.stacked:
            self.optimizer = LaneOptimizer(optim, self.flat, self.grad, sizes)
        else:
            sizes = sizes if self._by_name else None
            self.optimizer = FlatOptimizer(optim, self.flat, self.grad, self.config.chunk, sizes)

    def fit(self, lanes: Sequence[Lane], hooks: Sequence[Hooks], evaluate: Callable[[list[int], int], None]) -> Fit:
        """Train the first lanes from the parameters that are in `flat`.

        Args:
            lanes: those with the most steps first: the lanes that still work are then always the first ones, and the rest rests.
            hooks: called around each step, in order; they agree in the batches of a step.
            evaluate: called with the lanes that are due in the middle of the round, and their steps so far.
        """
        k, steps = len(lanes), [len(lane.batches) for lane in lanes]
        for j, lane in enumerate(lanes):
            beat()
            self.optimizer.reset(j, lane.steps_done, lane.optimizer_state, lane.fresh)
        rates = [
            [lane.rates[i] if i < n else 0.0 for lane, n in zip(lanes, steps, strict=True)] for i in range(steps[0])
        ]
        lrs = torch.tensor(rates, dtype=self.layout.sums.dtype, device=self.net.device).view(-1, k)
        lr_sums = torch.cat([lrs.new_zeros(1, k), lrs.cumsum(dim=0)])  # before each step, and at the end
        loss = torch.zeros(k, dtype=torch.float64, device=self.net.device)
        useful, computed = np.zeros(k, dtype=np.int64), np.zeros(k, dtype=np.int64)
        self.net.begin([lane.dropout for lane in lanes])
        moves, freezes = any(h.moves for h in hooks), any(h.freezes for h in hooks)
        weights, bound = torch.zeros_like(self.flat[:k]) if moves else self.flat, 0
        for i in range(steps[0]):
            active = sum(n > i for n in steps)
            if active != bound:
                self.net.train(True)
                self.net.bind(weights[:active], self.grad[:active])
                bound = active
            trains = np.ones((active, len(self.layout.shapes)), dtype=bool) if freezes else None
            for hook in hooks if freezes else ():
                hook.freeze(trains, i)
            for b in range(hooks[0].batches):
                if moves:
                    weights[:active].copy_(self.flat[:active])
                    for hook in hooks:
                        hook.at(weights, active, i, lr_sums[i], b)
                batches = [lane.batches[i][b] for lane in lanes[:active]]
                if private := [p for lane in lanes[:active] if (p := lane.private) is not None]:
                    step_loss, step_useful, step_computed = self.backward_private(batches, private, trains)
                else:
                    step_loss, step_useful, step_computed = self.backward(batches)
                for hook in hooks:
                    hook.adjust(active, i, lr_sums[i], b)
                loss[:active] += step_loss / hooks[0].batches
                useful[:active] += step_useful
                computed[:active] += step_computed
            self.optimizer.step(rates[i][:active], trains)
            for hook in hooks:
                hook.after_step(active, i + 1, lr_sums[i + 1], lrs[i])
            due = [j for j in range(active) if i + 1 < steps[j] and lanes[j].due(i + 1)]
            if due:
                evaluate(due, i + 1)
                bound = 0
        for j in (j for j, lane in enumerate(lanes) if lane.private is not None):  # batches differ in size
            loss[j] *= steps[j] / max(1, sum(len(b) for step in lanes[j].batches for b in step))
        return Fit(loss.tolist(), useful, computed, steps, lr_sums[-1])

    def losses(self, examples: Sequence[np.ndarray]) -> Tensor:
        """Mean loss of each lane's model over all answer tokens of these examples, one array per lane; `[K]`, without dropout."""
        k = len(examples)
        self.net.train(False)
        self.net.begin([0] * k)
        self.net.bind(self.flat[:k], self.grad[:k])
        return self.backward(examples)[0]

    def backward(self, batches: Sequence[np.ndarray]) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Gradient of each lane's mean loss over all answer tokens of its batch, into `grad`.

        Returns:
            Those losses `[K]`, tokens trained on and tokens computed, by lane.
        """
        tokens, k = self.tokens, len(batches)
        self.grad[:k].zero_()
        batches = self._sorted(batches)
        every = np.concatenate(batches)
        lane_of = np.repeat(np.arange(k), [len(b) for b in batches])
        useful = np.bincount(lane_of, weights=tokens.lengths_of(every), minlength=k).astype(np.int64)
        answers = np.bincount(lane_of, weights=tokens.answers_of(every), minlength=k)
        # In the type of sums: bfloat16 cannot count beyond 256.
        over = torch.from_numpy(answers).to(self.net.device, self.layout.sums.dtype, non_blocking=True)
        loss: Tensor | None = None
        computed = np.zeros(k, dtype=np.int64)
        for examples in self._passes(batches):
            beat()
            part, sizes = self.net.backward(tokens, examples, over)
            loss = part if loss is None else loss + part
            computed += sizes
        return loss, useful, computed

    def backward_private(
        self, batches: Sequence[np.ndarray], private: Sequence[PrivateLane], trains: np.ndarray | None = None
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Sum of the clipped gradients of each lane's examples, over the number that its batch is expected to have, into `grad`.

        Args:
            batches: of each lane; some may be empty.
            private: how each lane clips; the clip is the same in all.
            trains: which parameters do, bool `[K, P]`; None = all.

        Returns:
            As `backward`, with the sum of the examples' losses.
        """
        k = len(batches)
        self.grad[:k].zero_()
        batches = self._sorted(batches)
        useful = np.array([self.tokens.lengths_of(b).sum() for b in batches], dtype=np.int64)
        loss, computed = torch.zeros(k, dtype=torch.float64, device=self.net.device), np.zeros(k, dtype=np.int64)
        for examples in self._passes(batches) if any(map(len, batches)) else ():
            beat()
            part, sizes = self.net.clipped(self.tokens, examples, private[0].clip, trains)
            loss += part
            computed += sizes
        expected = torch.tensor([p.expected for p in private], dtype=torch.float64, device=self.net.device)
        self.grad[:k] /= expected[:, None].to(self.grad.dtype)
        return loss, useful, computed

    def _sorted(self, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Like lengths together: less padding, the same sum. A batch that is not cut stays as it is, whoever is beside it."""
        several, size = self.config.row_tokens is not None, self.config.micro_batch
        return [
            b[np.argsort(self.tokens.lengths_of(b), kind="stable")] if several or size < len(b) else b for b in batches
        ]

    def _passes(self, batches: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """The examples of each forward and backward pass, one array per lane."""
        size = self.config.micro_batch
        if self.config.row_tokens is None:
            for i in range(0, max(map(len, batches)), size):
                yield [b[i : i + size] for b in batches]
            return
        (batch,) = batches
        yield from ([part] for part in filled(batch, self.tokens.lengths_of(batch), size * self.config.row_tokens))

    def configure(self, engine: Engine) -> None:
        """Train like this from now on."""
        self.config = dataclasses.replace(self.config, micro_batch=engine.micro_batch)
        self.net.checkpoint(engine.checkpointing)
        if self.net.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.net.device)

    def trim(self) -> None:
        """Return freed memory to the system, on the CPU."""
        if self.net.device.type == "cpu":
            trim()

    def shrink(self) -> None:
        """Free all lanes' memory, after there was too little of it; a single model's weights and optimizer state stay in place."""
        if self.stacked:
            self._allocate(1)
        gc.collect()
        if self.net.device.type == "cuda":
            torch.cuda.empty_cache()


def filled(examples: np.ndarray, lengths: np.ndarray, room: int) -> Iterator[np.ndarray]:
    """Examples in order, cut where the next one would not fit into `room` tokens; a longer one is by itself."""
    begin, held = 0, 0
    for i, n in enumerate(lengths):
        if i > begin and held + n > room:
            yield examples[begin:i]
            begin, held = i, 0
        held += int(n)
    yield examples[begin:]
