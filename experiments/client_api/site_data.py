"""A site's examples for the scripts beside this file, in the order in which the declared experiment trains on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fedsim
from fedsim.runs.build import load_base, prepare


class Site:
    """One site of a declared experiment.

    Args:
        config: the experiment's YAML file.
        name: the site.

    Attributes:
        exp: the experiment.
        train: the training examples of all rounds, batch after batch.
        validation: the validation examples that all sites share.
        words: the token of each label word.
    """

    def __init__(self, config: str, name: str) -> None:
        self.exp = fedsim.Experiment.load(config)
        self._parts = prepare(self.exp)
        order = [n for r in range(self.exp.rounds) for batch in fedsim.batches(self.exp, name, r + 1) for n in batch]
        self.train = self._examples("train", order)
        self.validation = self._examples("validation", self._parts.tokens["validation"].kept())
        self.words = torch.tensor(self._parts.tokens["train"].candidates)[:, 0]
        self._pad = self._parts.tokenizer.pad_token_id

    def base(self) -> nn.Module:
        """The base model."""
        return load_base(self._parts)

    def _examples(self, split: str, numbers: Any) -> list[dict[str, Tensor]]:
        tokens = self._parts.tokens[split]
        rows = [(torch.tensor(tokens.row(n), dtype=torch.int64), int(tokens.prompts[n])) for n in numbers]
        return [{"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) < p, -100, ids)} for ids, p in rows]

    def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch, padded on the right; prompts and padding have the label -100."""
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([e["input_ids"] for e in examples], batch_first=True, padding_value=self._pad)
        labels = pad([e["labels"] for e in examples], batch_first=True, padding_value=-100)
        lengths = torch.tensor([len(e["input_ids"]) for e in examples])
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        }

    def scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of each example the sum of its answer's negative log-likelihoods, the answer's tokens and whether the label is right.

        Args:
            logits: `[B, T, V]`.
            labels: `[B, T]`.

        Returns:
            `[B, 3]`.
        """
        logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(
            labels.shape
        )
        answer = labels != -100
        rows, first = torch.arange(len(labels)), answer.int().argmax(dim=1)
        chosen = self.words[logits[rows, first][:, self.words].argmax(dim=1)]
        return torch.stack([losses.sum(1), answer.sum(1), chosen == labels[rows, first]], dim=1)
