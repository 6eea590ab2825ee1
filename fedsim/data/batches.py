"""Which examples make each optimizer step, and their padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.data.tokens import Tokens


@dataclass(frozen=True)
class BatchSampler:
    """How a client's examples become batches; see the keys of the same names under `local`."""

    batch_size: int
    epochs: int | None = None
    shuffle: bool = True
    drop_last: bool = False
    poisson: bool = False
    """Each example is in each batch with probability `rate`, independently of all else: batches differ in size, and may be empty."""

    def batches(self, rows: np.ndarray, rng: np.random.Generator, steps: int | None) -> list[np.ndarray]:
        """Example numbers of each optimizer step.

        Args:
            rows: the client's examples, `[n]`.
            rng: shuffles each pass.
            steps: this many full batches from an endless stream of passes, a batch may span passes and even hold an
                example twice where it is larger than a pass; None = `epochs` passes, the last batch of each may be short.
        """
        if len(rows) == 0:
            return []
        if self.poisson:
            return [rows[rng.random(len(rows)) < self.rate(len(rows))] for _ in range(self.count(len(rows), steps))]
        size, passes = (
            self.batch_size,
            (self.epochs or 1) if steps is None else -(-steps * self.batch_size // len(rows)),
        )
        orders = [rng.permutation(rows) if self.shuffle else rows for _ in range(passes)]
        if steps is not None:
            return np.array_split(np.concatenate(orders)[: steps * size], steps)
        cut = [order[i : i + size] for order in orders for i in range(0, len(order), size)]
        return [b for b in cut if len(b) == size] if self.drop_last else cut

    def rate(self, num_rows: int) -> float:
        """The probability of each of so many examples to be in a batch, where these are drawn so that `batch_size` are expected."""
        return min(1.0, self.batch_size / num_rows)

    def count(self, num_rows: int, steps: int | None) -> int:
        """Optimizer steps that `batches` gives for a client of `num_rows` examples."""
        if num_rows == 0 or steps is not None:
            return steps if num_rows else 0
        per_pass = num_rows // self.batch_size if self.drop_last else -(-num_rows // self.batch_size)
        return per_pass * (self.epochs or 1)


@dataclass
class Batch:
    """Examples padded on the right to the longest of them. B examples, T tokens, S scored positions.

    Attributes:
        input_ids: int64 `[B, T]`.
        attention_mask: int64 `[B, T]`, 1 where there is a token.
        lengths: int64 `[B]`.
        rows: int64 `[S]`, place in the batch of each position whose next token is scored (causal LM).
        cols: int64 `[S]`, its column.
        targets: int64 `[S]`, the token that follows it; for sequence classification the class, `[B]`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    lengths: Tensor
    rows: Tensor
    cols: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        return Batch(*(getattr(self, f).to(device, non_blocking=True) for f in self.__dataclass_fields__))


def pad(
    sequences: Sequence[np.ndarray], prompts: Sequence[int], pad_id: int, classes: np.ndarray | None = None
) -> Batch:
    """Pad token sequences into a batch.

    Args:
        sequences: prompt and answer tokens of each example.
        prompts: tokens of the prompt of each example; the positions from its last token on are scored.
        pad_id: token that fills up.
        classes: class of each example for sequence classification; None for a causal LM.
    """
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    ids = np.full((len(sequences), int(lengths.max())), pad_id, dtype=np.int64)
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    ids[mask] = np.concatenate(sequences)
    if classes is not None:
        rows = cols = np.empty(0, dtype=np.int64)
        targets = np.asarray(classes, dtype=np.int64)
    else:
        position = np.arange(ids.shape[1])
        scored = (position >= np.asarray(prompts)[:, None] - 1) & (position < lengths[:, None] - 1)
        rows, cols = np.nonzero(scored)
        targets = ids[rows, cols + 1]
    arrays = (ids, mask.astype(np.int64), lengths, rows, cols, targets)
    return Batch(*(torch.from_numpy(a) for a in arrays))


def collate(tokens: Tokens, rows: np.ndarray) -> Batch:
    """The batch of these examples of a split."""
    sequences = [tokens.row(r) for r in rows]
    if tokens.is_classes:
        return pad(sequences, [], tokens.pad_id, tokens.labels.numpy()[rows])
    return pad(sequences, tokens.prompts.numpy()[rows], tokens.pad_id)
