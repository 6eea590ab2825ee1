"""One model in padded batches, as PEFT and transformers run it: the reference, for any method and any base.

The output head of a language model is a fifth of a small one's work, and most of its positions belong to prompts and
padding. A hook in front of the head picks the positions that are scored, whatever the architecture. `StackedNet` has the
same methods for K lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.core.params import Layout
from fedsim.data.batches import Batch, collate, pad
from fedsim.data.tokens import Tokens
from fedsim.models import attention
from fedsim.models.adapters import base_of, prompt_of, trained
from fedsim.models.dropout import Draws, put_dropout
from fedsim.models.recompute import compute_twice


class Net:
    """A model ready to be trained and scored.

    Args:
        model: from `attach`.
        own: the adapter's own modules, whose dropout acts in training.
        task: causal_lm | sequence_classification.
        device: of the model.
        base_dropout: whether the base's dropout acts in training.
        autocast: compute in this type over float32 weights, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        own: list[nn.Module],
        *,
        task: str,
        device: torch.device,
        base_dropout: bool,
        autocast: torch.dtype | None,
    ) -> None:
        attention.register()  # a worker's model names the attention functions and does not bring them
        self.model, self.task, self.device = model, task, device
        self.base_dropout, self.autocast = base_dropout, autocast
        self._batch: Batch | None = None
        self._training: bool | None = None
        self._checkpointing: bool | None = None  # None: no layer has been changed yet
        self.base = base = base_of(model)
        if task == "causal_lm":
            head = base.get_output_embeddings()
        else:
            head = getattr(base, "score", getattr(base, "classifier", None))
            if getattr(getattr(base, "sequence_summary", None), "summary_type", None) == "last":
                # XLNet's takes the last position, pads or not.
                base.sequence_summary.register_forward_pre_hook(self._last_of_rows)
            if autocast is None:
                for module in base.modules():
                    if hasattr(module, "modules_to_save"):  # trained copies over a 16-bit body are float32
                        module.register_forward_pre_hook(_cast)
        self._picks = head is not None
        if head is not None:
            head.register_forward_pre_hook(self._pick_positions if task == "causal_lm" else self._pick_last)
        self.draws = Draws()
        self._drops = put_dropout(model, own, task, self.draws)
        self.own = [*own, *self._drops]
        self.params = trained(model)
        self.layout = Layout.of(self.params)
        prompt = prompt_of(model)
        in_front = prompt is not None and prompt.peft_type.value != "PREFIX_TUNING"
        self._virtual = prompt.num_virtual_tokens if in_front else 0

    def adopt(self, weights: Tensor) -> None:
        """Move the trained parameters as they are into `weights`, `[1, N]`, one by one; their old memory is freed."""
        views = self.layout.views(weights[0])
        for name, parameter in self.params.items():
            views[name].copy_(parameter.data)
            parameter.data = views[name]

    def in_pass(self) -> bool:
        """Whether a training or scoring pass is under way."""
        return self._batch is not None

    def checkpoint(self, on: bool) -> None:
        """Compute each layer's activations a second time in the backward pass instead of keeping them, or not.

        Raises:
            UserError: if the architecture has no layers that can be.
        """
        if on and self._checkpointing is None:
            compute_twice(self.model, lambda: self._checkpointing and self.in_pass())
        if on or self._checkpointing is not None:
            self._checkpointing = on

    def train(self, on: bool) -> None:
        """Switch dropout on or off: the adapter's own, and the base's only where asked."""
        if on == self._training:
            return
        self._training = on
        self.model.train(on and self.base_dropout)
        for module in self.own:
            module.training = on

    @property
    def drops(self) -> bool:
        """Whether layers draw by lanes in the next pass."""
        return bool(self._drops and self._training)

    def bind(self, weights: Tensor, grad: Tensor | None) -> None:
        """Use these weights from now on.

        Args:
            weights: `[1, N]`, read in place.
            grad: `[1, N]`, gradients are added here; None where nothing is trained.
        """
        views = self.layout.views(weights[0])
        grads = {} if grad is None else self.layout.views(grad[0])
        for name, parameter in self.params.items():
            parameter.data, parameter.grad = views[name], grads.get(name)

    def multiply(self, layer: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """x A^T B^T of a layer's input `[..., n]`, by each lane's own A `[K, R, n]` and B `[K, m, R]`."""
        return x @ a[0].T @ b[0].T

    def show(self, lane: int) -> None:
        """Put a lane's weights into the model itself, where they are already."""

    def begin(self, seeds: Sequence[int]) -> None:
        """A pack begins: streams of dropout, one for each lane."""
        self.draws.begin(seeds)

    def backward(self, tokens: Tokens, rows: Sequence[np.ndarray], answers: Tensor) -> tuple[Tensor, list[int]]:
        """Add the gradient of the mean loss.

        Args:
            tokens: the training split.
            rows: example numbers of the pass, one array.
            answers: scored positions of the whole optimizer step, `[1]`.

        Returns:
            Sum of the negative log-likelihood over `answers`, in nats, `[1]`; and tokens computed, pads and virtual
            tokens included.
        """
        batch = collate(tokens, rows[0])
        computed = batch.input_ids.numel() + self._virtual * len(batch.input_ids)
        batch = batch.to(self.device)
        loss = F.cross_entropy(self._logits(batch), batch.targets, reduction="sum") / answers
        loss.sum().backward()
        return loss.detach(), [computed]

    def logits(
        self, sequences: Sequence[np.ndarray], prompts: np.ndarray | None, pad_id: int
    ) -> tuple[Tensor, np.ndarray, Tensor]:
        """Logits of examples.

        Args:
            sequences: tokens of each example.
            prompts: tokens of each prompt, or None for a classification head.
            pad_id: fills up the shorter examples.

        Returns:
            Logits `[1, S, V]` at scored positions (`[1, R, L]` of examples), the example of each position `[S]`, and the
            tokens that follow there, `[S]`.
        """
        classes = np.zeros(len(sequences), dtype=np.int64) if prompts is None else None
        batch = pad(sequences, [] if prompts is None else prompts, pad_id, classes)
        rows = np.arange(len(sequences)) if prompts is None else batch.rows.numpy()
        batch = batch.to(self.device)
        return self._logits(batch)[None], rows, batch.targets

    def _logits(self, batch: Batch) -> Tensor:
        """Causal LM: `[S, V]` at the batch's scored positions; sequence classification: `[B, L]`. At least float32."""
        self._batch = batch
        if self.drops:
            sizes = {"tokens": [int(batch.lengths.sum())], "scored": [len(batch.targets)], "rows": [len(batch.lengths)]}
            self.draws.next(sizes, batch.attention_mask.bool())
        try:
            with autocast(self.device, self.autocast):
                out = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        finally:
            self._batch = None
        if self.task == "causal_lm":
            shift = out.shape[1] - batch.input_ids.shape[1]  # virtual tokens stand in front
            out = out[0] if self._picks else out[batch.rows, batch.cols + shift]
        return at_least_float32(out)

    def _pick_positions(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._batch is None:
            return None  # generation needs every position it asks for
        hidden, batch = args[0], self._batch  # [B, T', D]
        shift = hidden.shape[1] - batch.input_ids.shape[1]
        return (hidden[batch.rows, batch.cols + shift].unsqueeze(0), *args[1:])  # [1, S, D]

    def _pick_last(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.autocast is None:
            args = _cast(module, args)
        if self._batch is not None and args[0].dim() == 3 and hasattr(self.base, "score"):
            # Decoders look for the last token by pad id, which fails after virtual tokens and where a pad token is text.
            return self._last_of_rows(module, args)
        return args

    def _last_of_rows(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The hidden state of each example's last token at all of its positions, `[B, T, D]`."""
        if self._batch is None:
            return None
        hidden, width = args[0], args[0].shape[1]
        last = self._batch.lengths - 1 + width - self._batch.input_ids.shape[1]
        rows = torch.arange(len(last), device=last.device)
        return (hidden[rows, last].unsqueeze(1).expand(-1, width, -1), *args[1:])


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """A block that computes in this type over float32 weights; None = in the type of the weights."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def at_least_float32(logits: Tensor) -> Tensor:
    """float64 as it is, other types in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def head_dtype(head: nn.Module) -> torch.dtype:
    """What a classification head computes in: the type of what is trained of it, if anything is."""
    parameters = [p for p in head.parameters() if p.is_floating_point()]
    return next((p for p in parameters if p.requires_grad), parameters[0]).dtype


def _cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].to(head_dtype(module)), *args[1:])
