"""The forward pass that trainers and evaluators share: logits at the scored positions only.

The output head of a language model is a fifth of a small one's work, and most of its rows belong to prompts and padding.
A hook in front of the head picks the positions that are scored, whatever the architecture.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.data.batches import Batch


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
        self.model, self.own, self.task, self.device = model, own, task, device
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

    def train(self, on: bool) -> None:
        """Switch dropout on or off: the adapter's own, and the base's only where asked."""
        if on == self._training:
            return
        self._training = on
        self.model.train(on and self.base_dropout)
        for module in self.own:
            module.training = on

    def logits(self, batch: Batch) -> Tensor:
        """Causal LM: `[S, V]` at the batch's scored positions; sequence classification: `[B, L]`. At least float32."""
        context = nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)
        self._batch = batch
        try:
            with context:
                out = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        finally:
            self._batch = None
        if self.task == "causal_lm":
            shift = out.shape[1] - batch.input_ids.shape[1]  # virtual tokens stand in front
            out = out[0] if self._picks else out[batch.rows, batch.cols + shift]
        return out if out.dtype == torch.float64 else out.float()

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the negative log-likelihood over the answer tokens (or rows) of the batch, in nats; a scalar."""
        return F.cross_entropy(self.logits(batch), batch.targets, reduction="sum")

    def _pick_positions(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._batch is None:
            return None  # generation needs every position it asks for
        hidden, batch = args[0], self._batch  # [B, T', D]
        shift = hidden.shape[1] - batch.input_ids.shape[1]
        return (hidden[batch.rows, batch.cols + shift].unsqueeze(0), *args[1:])  # [1, S, D]

    def _pick_last(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        dtype = next(p for p in module.parameters() if p.is_floating_point()).dtype
        if self.autocast is None:
            hidden = hidden.to(dtype)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if self._batch is not None and hidden.dim() == 3 and hasattr(base, "score"):
            # Decoders look for the last token by pad id, which fails behind virtual tokens and where a pad token is text.
            batch, width = self._batch, hidden.shape[1]
            last = batch.lengths - 1 + width - batch.input_ids.shape[1]
            hidden = hidden[torch.arange(len(last), device=last.device), last].unsqueeze(1).expand(-1, width, -1)
        return (hidden, *args[1:])
