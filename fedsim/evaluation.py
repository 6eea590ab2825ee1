"""Scoring a model on a split: loss, accuracy by label log-likelihood or by a head, exact match of generated text.

A causal LM's answer is scored as published for label words: log p(label | prompt), summed over the label's tokens, the
largest wins; `exact_match` compares greedily generated text instead. Sums are carried to the end and divided once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedsim.data.batches import Batch, pad
from fedsim.data.tokens import Tokens
from fedsim.models.forward import Net
from fedsim.types import Scores

_FEW_CLASSES = 20  # with more of them, counts by class would be most of a run's metrics


@dataclass
class RowScores:
    """What is known of each row of a split, n rows.

    Attributes:
        rows: row numbers, int64 `[n]`.
        nll: negative log-likelihood of the answer in nats, float64 `[n]`.
        count: answer tokens (1 for a head), int64 `[n]`.
        predicted: predicted class, int64 `[n]`, or None without classes.
        exact: whether the generated text is the answer, bool `[n]`, or None.
    """

    rows: np.ndarray
    nll: np.ndarray
    count: np.ndarray
    predicted: np.ndarray | None = None
    exact: np.ndarray | None = None


@torch.no_grad()
def score_rows(
    net: Net, tokens: Tokens, *, batch_size: int, tokenizer: Any = None, max_new_tokens: int = 32
) -> RowScores:
    """Score every kept row of a split; batches hold rows of like length.

    Args:
        net: the model.
        tokens: the split, n rows.
        batch_size: rows of a pass.
        tokenizer: given, answers are generated and compared as well.
        max_new_tokens: longest generated answer.
    """
    net.train(False)
    rows = tokens.kept()
    nll, count = np.zeros(len(rows)), np.ones(len(rows), dtype=np.int64)
    labels = tokens.labels.numpy()[rows]
    scores = None
    if tokens.is_classes:
        scores = np.zeros((len(rows), int(_num_classes(net))))
    elif tokens.candidates is not None:
        scores = np.zeros((len(rows), len(tokens.candidates)))
    lengths = tokens.lengths[rows]
    for chunk in _chunks(lengths, batch_size):
        sequences = [tokens.row(r) for r in rows[chunk]]
        if tokens.is_classes:
            batch = pad(sequences, [], tokens.pad_id, labels[chunk]).to(net.device)
            logp = torch.log_softmax(net.logits(batch), dim=-1).double().cpu().numpy()
            nll[chunk] = -logp[np.arange(len(chunk)), labels[chunk]]
            scores[chunk] = logp
            continue
        batch = pad(sequences, tokens.prompts.numpy()[rows[chunk]], tokens.pad_id)
        logp = torch.log_softmax(net.logits(batch.to(net.device)), dim=-1)
        gold = logp.gather(1, batch.targets.to(net.device)[:, None])[:, 0].double().cpu().numpy()
        at = batch.rows.numpy()
        nll[chunk] = np.bincount(at, weights=-gold, minlength=len(chunk))
        count[chunk] = np.bincount(at, minlength=len(chunk))
        if scores is not None:
            scores[chunk] = _single_token_scores(tokens, batch, logp, labels[chunk], gold)
    if scores is not None and not tokens.is_classes:
        _add_long_labels(net, tokens, rows, labels, scores, batch_size)
    predicted = None if scores is None else scores.argmax(axis=1)
    exact = None
    if tokenizer is not None and not tokens.is_classes:
        exact = _generate(net, tokens, rows, tokenizer, batch_size, max_new_tokens)
    return RowScores(rows, nll, count, predicted, exact)


def summarise(scores: RowScores, tokens: Tokens, rows: np.ndarray | None = None) -> dict[str, tuple[float, float]]:
    """Metric name -> (value, rows it rests on), over all scored rows or the given row numbers.

    Beside loss, accuracy and exact match there is `predicted:WORD`, how many rows were predicted to be of each class: it
    shows at once that a site without a class never answers it.

    Args:
        scores: of a split.
        tokens: the split.
        rows: row numbers to look at.
    """
    chosen = np.arange(len(scores.rows)) if rows is None else np.nonzero(np.isin(scores.rows, rows))[0]
    if len(chosen) == 0:
        return {}
    n = float(len(chosen))
    out = {"loss": (float(scores.nll[chosen].sum() / scores.count[chosen].sum()), n)}
    if scores.predicted is not None:
        predicted = scores.predicted[chosen]
        out["accuracy"] = (float((predicted == tokens.labels.numpy()[scores.rows[chosen]]).mean()), n)
        if len(tokens.words) <= _FEW_CLASSES:
            counts = np.bincount(predicted, minlength=len(tokens.words))
            out |= {f"predicted:{w}": (float(c), n) for w, c in zip(tokens.words, counts, strict=True)}
    if scores.exact is not None:
        out["exact_match"] = (float(scores.exact[chosen].mean()), n)
    return out


def to_scores(rows: RowScores, tokens: Tokens, sites: dict[int, np.ndarray] | None = None) -> Scores:
    """The sums that travel: over the whole split, and over each site's own rows where `sites` gives them."""
    by_site = {c: summarise(rows, tokens, own) for c, own in (sites or {}).items() if len(own)}
    return Scores(summarise(rows, tokens), by_site, rows.predicted, int(rows.count.sum()))


def _num_classes(net: Net) -> int:
    return net.model.config.num_labels


def _chunks(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def _single_token_scores(
    tokens: Tokens, batch: Batch, logp: torch.Tensor, labels: np.ndarray, gold: np.ndarray
) -> np.ndarray:
    """`[rows, L]` log p(label | prompt) where the pass over the true answer already tells it; 0 where it does not.

    It tells the first token of every label, hence all of one-token labels, and every token of the true label.
    """
    at = batch.rows.numpy()
    first = np.nonzero(np.diff(at, prepend=-1))[0]  # each row's first scored position: the end of its prompt
    heads = torch.tensor([c[0] for c in tokens.candidates], device=logp.device)
    out = logp[torch.from_numpy(first).to(logp.device)][:, heads].double().cpu().numpy()
    for label, words in enumerate(tokens.candidates):
        if len(words) == 1:
            continue
        out[:, label] = 0.0
        for i in np.nonzero(labels == label)[0]:
            out[i, label] = gold[first[i] : first[i] + len(words)].sum()
    return out


def _add_long_labels(
    net: Net, tokens: Tokens, rows: np.ndarray, labels: np.ndarray, scores: np.ndarray, batch_size: int
) -> None:
    """Fill in log p(label | prompt) of labels of several tokens that are not the row's own, by passes of their own."""
    prompts = tokens.prompts.numpy()[rows]
    for label, words in enumerate(tokens.candidates):
        others = np.nonzero(labels != label)[0]
        if len(words) == 1 or len(others) == 0:
            continue
        for part in _chunks(prompts[others], batch_size):
            chunk = others[part]
            sequences = [np.concatenate([tokens.row(rows[i])[: prompts[i]], words]) for i in chunk]
            batch = pad(sequences, prompts[chunk], tokens.pad_id).to(net.device)
            logp = torch.log_softmax(net.logits(batch), dim=-1).gather(1, batch.targets[:, None])[:, 0]
            scores[chunk, label] = np.bincount(
                batch.rows.cpu().numpy(), weights=logp.double().cpu().numpy(), minlength=len(chunk)
            )


def _generate(
    net: Net, tokens: Tokens, rows: np.ndarray, tokenizer: Any, batch_size: int, max_new_tokens: int
) -> np.ndarray:
    """Whether greedy generation gives the answer, white space at the ends aside; bool `[n]`."""
    exact = np.zeros(len(rows), dtype=bool)
    prompts = tokens.prompts.numpy()[rows]
    for chunk in _chunks(prompts, batch_size):
        width = int(prompts[chunk].max())
        ids = np.full((len(chunk), width), tokens.pad_id, dtype=np.int64)  # padded on the left: answers start together
        mask = np.zeros_like(ids)
        for i, c in enumerate(chunk):
            ids[i, width - prompts[c] :] = tokens.row(rows[c])[: prompts[c]]
            mask[i, width - prompts[c] :] = 1
        made = net.model.generate(
            input_ids=torch.from_numpy(ids).to(net.device),
            attention_mask=torch.from_numpy(mask).to(net.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokens.pad_id,
        )
        texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        for c, text in zip(chunk, texts, strict=True):
            exact[c] = text.strip() == tokens.answers[rows[c]].strip()
    return exact
