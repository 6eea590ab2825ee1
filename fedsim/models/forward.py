"""One model in padded batches, as PEFT and transformers run it: the reference, and what takes any method and any base.

The output head of a language model is a fifth of a small one's work, and most of its rows belong to prompts and padding.
A hook in front of the head picks the positions that are scored, whatever the architecture. `StackedNet` has the same
methods for K lanes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedsim.core.errors import UserError
from fedsim.core.params import Layout
from fedsim.data.batches import Batch, collate, pad
from fedsim.data.tokens import Tokens
from fedsim.models import flat
from fedsim.models.adapters import trained
from fedsim.models.dropout import Draws, put_dropout


class Net:
    """A model ready to be trained and scored.

    Args:
        model: from `attach`.
        own: the adapter's own modules, whose dropout acts in training.
        task: causal_lm | sequence_classification.
        device: where the model lies.
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
        flat.register()  # a worker's model names the attention functions and does not bring them
        self.model, self.task, self.device = model, task, device
        self.base_dropout, self.autocast = base_dropout, autocast
        self._batch: Batch | None = None
        self._training: bool | None = None
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = (
            base.get_output_embeddings()
            if task == "causal_lm"
            else getattr(base, "score", getattr(base, "classifier", None))
        )
        self._picks = head is not None
        if head is not None:
            hook = self._pick_positions if task == "causal_lm" else self._pick_last
            head.register_forward_pre_hook(hook)
        summary = getattr(base, "sequence_summary", None)
        if task == "sequence_classification" and getattr(summary, "summary_type", None) == "last":
            summary.register_forward_pre_hook(self._last_of_rows)  # XLNet's takes the last position, pads or not
        if task == "sequence_classification" and autocast is None:
            for module in base.modules():
                if hasattr(module, "modules_to_save"):  # trained copies over a 16-bit body are float32
                    module.register_forward_pre_hook(_cast)
        self.draws = Draws()
        self._drops = put_dropout(model, own, task, self.draws)
        self.own = [*own, *self._drops]
        self.layout = Layout.of(trained(model))
        prompt = getattr(model, "peft_config", {}).get("default")
        in_front = prompt is not None and prompt.is_prompt_learning and prompt.peft_type.value != "PREFIX_TUNING"
        self._virtual = prompt.num_virtual_tokens if in_front else 0
        self._recompute: Recompute | None = None

    def adopt(self, weights: Tensor) -> None:
        """Move the trained parameters as they are into `weights`, `[1, N]`, one by one; what they lay in is let go."""
        views = self.layout.views(weights[0])
        for name, parameter in trained(self.model).items():
            views[name].copy_(parameter.data)
            parameter.data = views[name]

    def checkpoint(self, on: bool) -> None:
        """Compute each layer's activations a second time in the backward pass instead of keeping them, or not.

        Raises:
            UserError: if the architecture has no layers that can be.
        """
        if on and self._recompute is None:
            self._recompute = Recompute(self.model, lambda: self._batch is not None)
        if self._recompute is not None:
            self._recompute.on = on

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
        """Whether layers draw by lanes in the pass that comes."""
        return bool(self._drops and self._training)

    def bind(self, weights: Tensor, grad: Tensor | None) -> None:
        """Use these weights from now on.

        Args:
            weights: `[1, N]`, read in place.
            grad: `[1, N]`, gradients are added here; None where nothing is trained.
        """
        views = self.layout.views(weights[0])
        grads = None if grad is None else self.layout.views(grad[0])
        for name, parameter in trained(self.model).items():
            parameter.data = views[name]
            parameter.grad = None if grads is None else grads[name]

    def show(self, lane: int) -> None:
        """Put a lane's weights into the model itself; they are there."""

    def begin(self, seeds: Sequence[int]) -> None:
        """A client begins: its stream of dropout, for the layers that draw by lanes."""
        self.draws.begin(seeds)

    def backward(self, tokens: Tokens, rows: Sequence[np.ndarray], answers: Tensor) -> tuple[Tensor, list[int]]:
        """Add the gradient of the mean loss.

        Args:
            tokens: the training split.
            rows: row numbers of the pass, one array.
            answers: scored positions of the whole optimiser step, `[1]`.

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
        """Logits of rows.

        Args:
            sequences: tokens of each row.
            prompts: tokens of each row's prompt, or None for a classification head.
            pad_id: fills up the shorter rows.

        Returns:
            Logits `[1, S, V]` at scored positions (`[1, R, L]` of rows), the row of each position `[S]`, and the tokens
            that follow there, `[S]`.
        """
        classes = np.zeros(len(sequences), dtype=np.int64) if prompts is None else None
        batch = pad(sequences, [] if prompts is None else prompts, pad_id, classes)
        rows = np.arange(len(sequences)) if prompts is None else batch.rows.numpy()
        batch = batch.to(self.device)
        return self._logits(batch)[None], rows, batch.targets

    def _logits(self, batch: Batch) -> Tensor:
        """Causal LM: `[S, V]` at the batch's scored positions; sequence classification: `[B, L]`. At least float32."""
        context = nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)
        self._batch = batch
        if self.drops:
            sizes = {"tokens": [int(batch.lengths.sum())], "scored": [len(batch.targets)], "rows": [len(batch.lengths)]}
            self.draws.next(sizes, batch.attention_mask.bool())
        try:
            with context:
                out = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        finally:
            self._batch = None
        if self.task == "causal_lm":
            shift = out.shape[1] - batch.input_ids.shape[1]  # virtual tokens stand in front
            out = out[0] if self._picks else out[batch.rows, batch.cols + shift]
        return out if out.dtype == torch.float64 else out.float()

    def _pick_positions(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._batch is None:
            return None  # generation needs every position it asks for
        hidden, batch = args[0], self._batch  # [B, T', D]
        shift = hidden.shape[1] - batch.input_ids.shape[1]
        return (hidden[batch.rows, batch.cols + shift].unsqueeze(0), *args[1:])  # [1, S, D]

    def _pick_last(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        dtype = head_dtype(module)
        if self.autocast is None:
            hidden = hidden.to(dtype)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if self._batch is not None and hidden.dim() == 3 and hasattr(base, "score"):
            # Decoders look for the last token by pad id, which fails behind virtual tokens and where a pad token is text.
            (hidden,) = self._last_of_rows(module, (hidden,))
        return (hidden, *args[1:])

    def _last_of_rows(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The hidden state of each row's last token in all of its positions, `[B, T, D]`."""
        if self._batch is None:
            return None
        hidden, width = args[0], args[0].shape[1]
        last = self._batch.lengths - 1 + width - self._batch.input_ids.shape[1]
        rows = torch.arange(len(last), device=last.device)
        return (hidden[rows, last].unsqueeze(1).expand(-1, width, -1), *args[1:])


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model whose activations can be computed a second time; none where it does not mark them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


class Recompute:
    """Layers whose activations are computed a second time instead of kept, while `on`.

    transformers' own switch works in training mode alone, which would turn the base's dropout on.

    Args:
        model: whose `GradientCheckpointingLayer`s are meant; they are changed in place.
        active: whether a pass of ours is under way.

    Raises:
        UserError: if the architecture has no such layers.
    """

    def __init__(self, model: nn.Module, active: Callable[[], bool]) -> None:
        self.on, self._active = False, active
        self.layers = layers_of(model)
        if not self.layers:
            kind = model.config.model_type
            raise UserError(
                f"training.checkpointing: true, but the layers of this base ({kind}) cannot be computed twice"
            )
        for layer in self.layers:
            layer.forward = self._twice(layer.forward)

    def release(self) -> None:
        """Give the layers back as they were."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)

    def _twice(self, original: Callable) -> Callable:
        def forward(*args: Any, **keys: Any) -> Any:
            if not (self.on and self._active() and torch.is_grad_enabled()):
                return original(*args, **keys)
            # A layer appends to the cache that holds its prefix: each time it is computed it gets the cache as it came.
            return checkpoint(
                lambda *a, **k: original(*_own_caches(a), **_own_caches(k)), *args, use_reentrant=False, **keys
            )

        return forward


def _own_caches(values: Any) -> Any:
    """Arguments of a layer, its caches copied so that what it appends stays there; their tensors are shared."""
    from transformers import Cache

    if isinstance(values, dict):
        return {k: _own_caches(v) for k, v in values.items()}
    if isinstance(values, tuple):
        return tuple(map(_own_caches, values))
    if not isinstance(values, Cache):
        return values
    out = copy.copy(values)
    out.layers = [copy.copy(layer) for layer in values.layers]
    return out


def head_dtype(head: nn.Module) -> torch.dtype:
    """What a classification head computes in: the type of what is trained of it, if anything is."""
    parameters = [p for p in head.parameters() if p.is_floating_point()]
    return next((p for p in parameters if p.requires_grad), parameters[0]).dtype


def _cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].to(head_dtype(module)), *args[1:])
