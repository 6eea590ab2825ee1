"""Scoring a model on a split: loss, accuracy by label log-likelihood or by a head, exact match of generated text.

A causal LM's answer is scored as published for label words: log p(label | prompt), summed over the label's tokens, the
largest wins; where one label begins another, the end-of-text token behind it is counted too. `exact_match` compares
greedily generated text instead. Sums are carried to the end and divided once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedsim.core.heartbeat import beat
from fedsim.core.types import Scores
from fedsim.data.tokens import Tokens
from fedsim.models.forward import Net
from fedsim.models.stacked import StackedNet
from fedsim.models.unsuitable import frequencies_by_length

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
        scores: log p(label | prompt), or a head's log-probability of each class, float64 `[n, L]`, or None.
    """

    rows: np.ndarray
    nll: np.ndarray
    count: np.ndarray
    predicted: np.ndarray | None = None
    exact: np.ndarray | None = None
    scores: np.ndarray | None = None


@torch.no_grad()
def score_rows(
    net: Net | StackedNet,
    tokens: Tokens,
    lanes: int,
    *,
    batch_size: int,
    tokenizer: Any = None,
    max_new_tokens: int = 32,
    wanted: Sequence[int] | None = None,
) -> list[RowScores]:
    """Score every kept row of a split under the weights of each lane; batches hold rows of like length.

    Args:
        net: the model.
        tokens: the split, n rows.
        lanes: K, as bound.
        batch_size: rows of a pass, over all lanes.
        tokenizer: given, answers are generated and compared as well.
        max_new_tokens: longest generated answer.
        wanted: the lanes whose scores are asked for; None = all. The others are computed all the same, but for what is
            generated.

    Returns:
        One record a lane that is wanted.
    """
    net.train(False)
    rows = tokens.kept()
    n, size = len(rows), max(1, batch_size // lanes)
    nll, count = np.zeros((lanes, n)), np.ones(n, dtype=np.int64)
    labels = tokens.labels.numpy()[rows]
    scores, prompts = None, tokens.prompts.numpy()[rows]
    for chunk in _chunks(tokens.lengths[rows], size):
        beat()
        sequences = [tokens.row(r) for r in rows[chunk]]
        logits, at, targets = net.logits(sequences, None if tokens.is_classes else prompts[chunk], tokens.pad_id)
        logp = torch.log_softmax(logits, dim=-1)  # [K, S, V]
        if tokens.is_classes:
            found = logp.double().cpu().numpy()
            nll[:, chunk] = -found[:, np.arange(len(chunk)), labels[chunk]]
        else:
            gold = logp.gather(2, targets[None, :, None].expand(lanes, -1, 1))[:, :, 0].double().cpu().numpy()
            first = np.nonzero(np.diff(at, prepend=-1))[0]  # each row's first scored position: the end of its prompt
            nll[:, chunk] = -np.add.reduceat(gold, first, axis=1)
            count[chunk] = np.diff(first, append=len(at))
            if tokens.candidates is None:
                continue
            found = _scores_at_hand(tokens, first, count[chunk], logp, labels[chunk], gold)
        if scores is None:
            scores = np.zeros((lanes, n, found.shape[2]))
        scores[:, chunk] = found
    if scores is not None and not tokens.is_classes:
        _add_long_labels(net, tokens, rows, labels, count, scores, size)
    predicted = None if scores is None else scores.argmax(axis=2)
    wanted = range(lanes) if wanted is None else wanted
    out = [
        RowScores(rows, nll[k], count)
        if scores is None
        else RowScores(rows, nll[k], count, predicted[k], scores=scores[k])
        for k in wanted
    ]
    if tokenizer is not None and not tokens.is_classes:
        for k, each in zip(wanted, out, strict=True):
            net.show(k)
            each.exact = _matches(net, tokens, rows, tokenizer, batch_size, max_new_tokens)
    return out


def summarize(scores: RowScores, tokens: Tokens, rows: np.ndarray | None = None) -> dict[str, tuple[float, float]]:
    """Metric name -> (value, rows it rests on), over all scored rows or the given row numbers.

    Of a causal LM `perplexity` is the exponential of the loss, which is the mean over all answer tokens (not over
    examples). Of classes there are accuracy, `macro_f1` (see there) and `predicted:WORD`, how many rows were predicted to
    be of each class: it shows at once that a site without a class never answers it.

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
        labels = tokens.labels.numpy()[scores.rows[chosen]]
        out["accuracy"] = (float((predicted == labels).mean()), n)
        out["macro_f1"] = (macro_f1(labels, predicted), n)
        if len(tokens.words) <= _FEW_CLASSES:
            counts = np.bincount(predicted, minlength=len(tokens.words))
            out |= {f"predicted:{w}": (float(c), n) for w, c in zip(tokens.words, counts, strict=True)}
    if scores.exact is not None:
        out["exact_match"] = (float(scores.exact[chosen].mean()), n)
    if not tokens.is_classes:
        with np.errstate(over="ignore"):
            out["perplexity"] = (float(np.exp(out["loss"][0])), n)
    return out


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of the classes' F1, each 2 TP / (2 TP + FP + FN), over the classes that occur among labels or predictions.

    As `f1_score(labels, predicted, average="macro")` of scikit-learn. A class that occurs in neither has no F1; one that is
    never predicted rightly has 0.

    Args:
        labels, predicted: classes, int `[n]`, n > 0.
    """
    size = int(max(labels.max(), predicted.max())) + 1
    right, true, found = (np.bincount(x, minlength=size) for x in (labels[labels == predicted], labels, predicted))
    occurs = true + found > 0
    return float((2 * right[occurs] / (true + found)[occurs]).mean())


def to_scores(
    rows: RowScores, tokens: Tokens, sites: dict[int, np.ndarray] | None = None, by_row: bool = False
) -> Scores:
    """What travels: sums over the whole split, over each site's own rows where `sites` gives them, and rows if asked for."""
    by_site = {c: summarize(rows, tokens, own) for c, own in (sites or {}).items() if len(own)}
    return Scores(summarize(rows, tokens), by_site, rows.predicted, rows.nll if by_row else None, int(rows.count.sum()))


def _chunks(lengths: np.ndarray, size: int, spread: float = np.inf) -> list[np.ndarray]:
    """Places of rows of like length, at most `size` together, whose lengths differ by at most `spread`."""
    out: list[list[int]] = []
    for i in np.argsort(lengths, kind="stable"):
        if not out or len(out[-1]) == size or lengths[i] - lengths[out[-1][0]] > spread:
            out.append([])
        out[-1].append(i)
    return [np.array(chunk) for chunk in out]


def _scores_at_hand(
    tokens: Tokens, first: np.ndarray, count: np.ndarray, logp: torch.Tensor, labels: np.ndarray, gold: np.ndarray
) -> np.ndarray:
    """`[K, rows, L]` log p(label | prompt) where the pass over the true answer already tells it; 0 where it does not.

    It tells the first token of every label, hence all of one-token labels, and every token of the true label.

    Args:
        tokens: the split.
        first: scored position at the end of each row's prompt, `[rows]`.
        count: scored positions of each row, `[rows]`.
        logp: `[K, S, V]`.
        labels: class of each row.
        gold: log-probability of the token that follows, `[K, S]`.
    """
    heads = torch.tensor([c[0] for c in tokens.candidates], device=logp.device)
    out = logp[:, torch.from_numpy(first).to(logp.device)][:, :, heads].double().cpu().numpy()
    for label, words in enumerate(tokens.candidates):
        if len(words) == 1:
            continue
        out[:, :, label] = 0.0
        for i in np.nonzero((labels == label) & (count >= len(words)))[0]:
            out[:, i, label] = gold[:, first[i] : first[i] + len(words)].sum(axis=1)
    return out


def _add_long_labels(
    net: Net | StackedNet,
    tokens: Tokens,
    rows: np.ndarray,
    labels: np.ndarray,
    count: np.ndarray,
    scores: np.ndarray,
    size: int,
) -> None:
    """Fill in log p(label | prompt) of labels of several tokens that are not the row's own, by passes of their own."""
    prompts = tokens.prompts.numpy()[rows]
    for label, words in enumerate(tokens.candidates):
        others = np.nonzero((labels != label) | (count < len(words)))[0]  # an answer that was truncated is no label
        if len(words) == 1 or len(others) == 0:
            continue
        for part in _chunks(prompts[others], size):
            beat()
            chunk = others[part]
            sequences = [np.concatenate([tokens.row(rows[i])[: prompts[i]], words]) for i in chunk]
            logits, at, targets = net.logits(sequences, prompts[chunk], tokens.pad_id)
            index = targets[None, :, None].expand(len(logits), -1, 1)
            logp = torch.log_softmax(logits, dim=-1).gather(2, index)[:, :, 0].double().cpu().numpy()
            scores[:, chunk, label] = np.add.reduceat(logp, np.nonzero(np.diff(at, prepend=-1))[0], axis=1)


def _matches(
    net: Net | StackedNet,
    tokens: Tokens,
    rows: np.ndarray,
    tokenizer: Any,
    batch_size: int,
    max_new_tokens: int,
) -> np.ndarray:
    """Whether the greedily generated text is the answer, apart from white space at the ends; bool `[n]`.

    The answer is compared as the tokenizer decodes its own tokens, since one that normalizes text (lower case, Unicode
    forms) writes no other, and as the data has it. Unknown tokens, which are not decoded, are counted.
    """
    exact = np.zeros(len(rows), dtype=bool)
    prompts = tokens.prompts.numpy()[rows]
    end, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
    if unknown in (end, tokens.pad_id):
        unknown = None
    for chunk, made in generate(net, tokens, rows, end, batch_size, max_new_tokens):
        sequences = [tokens.row(rows[c]) for c in chunk]
        gold = [s[prompts[c] :].tolist() for c, s in zip(chunk, sequences, strict=True)]
        whole = [end is None or g[-1] == end for g in gold]  # else it was truncated
        texts, answers = (
            [(text.strip(), ids.count(unknown)) for text, ids in zip(decoded, found, strict=True)]
            for found in (made, gold)
            for decoded in [tokenizer.batch_decode(found, skip_special_tokens=True)]
        )
        for c, text, answer, all_there in zip(chunk, texts, answers, whole, strict=True):
            exact[c] = (all_there and text == answer) or text == (tokens.answers[rows[c]].strip(), 0)
    return exact


def generate(
    net: Net | StackedNet, tokens: Tokens, rows: np.ndarray, end: int | None, batch_size: int, limit: int
) -> Iterator[tuple[np.ndarray, list[list[int]]]]:
    """Generate answers to these rows, by prompts of like length: the places of a batch in `rows`, and its new tokens."""
    prompts = tokens.prompts.numpy()[rows]
    for chunk in _chunks(prompts, batch_size, spread=limit):  # a longer prompt costs its batch a pass a token
        yield chunk, greedy(net, [tokens.row(rows[c])[: prompts[c]] for c in chunk], limit, end)


@torch.no_grad()
def greedy(
    net: Net | StackedNet,
    prompts: Sequence[np.ndarray],
    limit: int,
    end: int | None,
) -> list[list[int]]:
    """The most likely next token after each prompt, again and again; the base's `generation_config.json` has no say.

    The batch is not padded: all prompts start at position 0, and the longer ones go on with tokens of their own while
    the shorter ones are being answered. So no text depends on the texts beside it, whatever the positions (learned,
    rotary, ALiBi, recurrent), the attention window or the prompt method.

    Args:
        net: the model, the wanted lane shown.
        prompts: token ids of each.
        limit: most new tokens of each.
        end: the token that ends a text, or None.

    Returns:
        New tokens of each prompt, without `end`.
    """
    base = net.model.get_base_model() if hasattr(net.model, "get_base_model") else net.model
    peft = getattr(net.model, "peft_config", {}).get("default")
    virtual = peft is not None and peft.is_prompt_learning  # put in front once, at the first pass
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    caches = not frequencies_by_length(base.config)
    lengths = np.array([len(p) for p in prompts])
    given = np.zeros((len(prompts), lengths.max()), dtype=np.int64)
    for row, prompt in zip(given, prompts, strict=True):
        row[: len(prompt)] = prompt
    ids, cache = torch.from_numpy(given[:, : lengths.min()]).to(net.device), None
    out: list[list[int]] = [[] for _ in prompts]
    going = np.ones(len(prompts), dtype=bool)
    while True:
        beat()
        if cache is None:
            found = net.model(input_ids=ids, use_cache=caches, **last)
        else:
            found = (base if virtual else net.model)(
                input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, **last
            )
        cache = getattr(found, "past_key_values", None) if caches else None
        picked, width = found.logits[:, -1].argmax(-1).cpu().numpy(), ids.shape[1]
        answering = width >= lengths
        for i in np.nonzero(answering & going)[0]:
            going[i] = picked[i] != end
            if going[i]:
                out[i].append(int(picked[i]))
                going[i] = len(out[i]) < limit
        if not going.any():
            return out
        if not answering.all():
            picked = np.where(answering, picked, given[:, width])
        ids = torch.cat([ids, torch.from_numpy(picked)[:, None].to(ids)], dim=1)
