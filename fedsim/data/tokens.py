"""Examples tokenized once into flat arrays, which all workers share.

In front of each answer stands its prompt; see `templates.py` for what the two are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core.errors import UserError
from fedsim.data.specials import Specials
from fedsim.data.templates import Template, chat_template, render_chat


@dataclass
class Tokens:
    """A split as flat arrays. n examples, N tokens in all.

    Attributes:
        ids: int32 `[N]`, examples end to end.
        offsets: int64 `[n + 1]`.
        prompts: int32 `[n]`, prompt tokens of each example (all of them for sequence classification).
        labels: int64 `[n]`, class of each example, -1 where there are no classes.
        pad_id: the pad token.
        is_classes: True for sequence classification.
        words: names of the classes in order; empty where there are none.
        candidates: tokens of each label word, for scoring a causal LM; with end-of-text where one label begins another, else
            without. None without label words.
        answers: answer texts by example, for exact match.
        left_out: examples that are not trained or scored on, and why: {"too long": [...], "empty answer": [...]}.
        truncated: examples that were cut to `max_length`.
        fits: tokens that hold 95 % of the examples whole (but for those without text or answer); 0 where there are none.
    """

    ids: Tensor
    offsets: Tensor
    prompts: Tensor
    labels: Tensor
    pad_id: int
    is_classes: bool
    words: list[str] = field(default_factory=list)
    candidates: list[list[int]] | None = None
    answers: list[str] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=dict)
    truncated: int = 0
    fits: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 `[n]`."""
        return np.diff(self.offsets.numpy())

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of these examples."""
        offsets = self.offsets.numpy()
        return offsets[rows + 1] - offsets[rows]

    def answers_of(self, rows: np.ndarray) -> np.ndarray:
        """Scored positions of these rows: answer tokens, or 1 for a class."""
        return (
            np.ones(len(rows), dtype=np.int64)
            if self.is_classes
            else self.lengths_of(rows) - self.prompts.numpy()[rows]
        )

    def row(self, index: int) -> np.ndarray:
        """Token ids of an example."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.ids.numpy()[start:end]

    def kept(self) -> np.ndarray:
        """Examples that are trained or scored on, int64, ascending."""
        out = np.ones(len(self), dtype=bool)
        for rows in self.left_out.values():
            out[rows] = False
        return np.nonzero(out)[0]

    def over(self, max_length: int) -> tuple[float, str] | None:
        """The share of the examples that are longer than `max_length`, and a line about them; None where all fit."""
        dropped = len(self.left_out.get("too long", ()))
        if not self.truncated + dropped:
            return None
        # Of those without text or answer nothing is cut.
        total = len(self) - sum(map(len, self.left_out.values())) + dropped
        share = (self.truncated + dropped) / total
        done = "left out, longer than" if dropped else "cut to"
        counts = f"{self.truncated + dropped:,} of {total:,} examples ({share:.1%})"
        return share, f"{counts} {done} data.max_length={max_length}; 95 % of them have at most {self.fits} tokens"

    def relabeled(self, rows: np.ndarray, labels: np.ndarray) -> Tokens:
        """These examples once more behind all others, with other classes: `rows[i]` again as number `len(self) + i`.

        Args:
            rows: examples, int64 `[k]`.
            labels: their new classes, int64 `[k]`.
        """
        again = []
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            ids = self.row(row)
            if self.candidates is not None and not self.is_classes:
                prompt = int(self.prompts[row])
                own = len(self.candidates[int(self.labels[row])])
                ids = np.concatenate([ids[:prompt], self.candidates[label], ids[prompt + own :]])
            again.append(ids)
        ends = self.offsets[-1] + torch.from_numpy(np.cumsum([len(ids) for ids in again]))
        return dataclasses.replace(
            self,
            ids=torch.cat([self.ids, torch.from_numpy(np.concatenate(again).astype(np.int32))]),
            offsets=torch.cat([self.offsets, ends]),
            prompts=torch.cat([self.prompts, self.prompts[torch.from_numpy(rows)]]),
            labels=torch.cat([self.labels, torch.from_numpy(labels)]),
        )

    def share(self) -> None:
        """Move the arrays into shared memory, in place."""
        for name in ("ids", "offsets", "prompts", "labels"):
            getattr(self, name).share_memory_()


def encode(
    rows: Sequence[dict[str, str]],
    labels: np.ndarray | None,
    *,
    template: str,
    tokenizer: Any,
    task: str,
    label_words: Sequence[str] | None,
    max_length: int,
    too_long: str,
    split: str,
    place: Callable[[int, str], str] | None = None,
) -> Tokens:
    """Tokenize a split.

    Args:
        rows: field -> text of each example, n of them.
        labels: class of each example, int64 `[n]`, or None.
        template: see `Template`.
        tokenizer: the base's.
        task: causal_lm | sequence_classification.
        label_words: names of the classes in order, where the answer or the head is for one of them.
        max_length: most tokens of an example, answer and end-of-text included.
        too_long: truncate | drop | error.
        split: its name, for messages.
        place: (example, split) -> the example as messages name it.

    Raises:
        UserError: for an example that is too long where `too_long` is error, or a template that ends in no answer.
    """
    parsed = Template.parse(template)
    specials = Specials(tokenizer)
    rows = [{name: specials.guard(text) for name, text in row.items()} for row in rows]
    own = [specials.count(half) for half in parsed.split(dict.fromkeys(parsed.fields, ""))]  # the template's
    classes = np.full(len(rows), -1, dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
    if task == "sequence_classification":
        if "label" in parsed.fields[:-1]:
            raise UserError(
                f"data.template: {template!r} shows the head the label it is to find; leave {{label}} out, or put it last"
            )
        cut = parsed.fields[-1] == "label"
        texts = [parsed.split(r)[0] if cut else parsed.text(r) for r in rows]
        sequences = specials.ids([specials.guard_seams(t, own[0] if cut else sum(own)) for t in texts])
        answers, candidates = [[] for _ in sequences], None
        answer_texts: list[str] = []
        empty = [None] * len(sequences)
    else:
        halves = [parsed.split(r) for r in rows]
        if label_words is not None:  # as candidates are scored, whatever blanks a text ends in
            halves = [(p, parsed.answer(r[parsed.fields[-1]])) for (p, _), r in zip(halves, rows, strict=True)]
        pairs = [(specials.guard_seams(p, own[0]), specials.guard_seams(a, own[1])) for p, a in halves]
        anchor = parsed.split(dict.fromkeys(parsed.fields, "x"))[0][-8:]
        encoded = _encode_answers(specials, sorted({a for _, a in pairs}), anchor)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        sequences = _without_end(specials, specials.ids([p for p, _ in pairs]))
        answers = [encoded[a] + end for _, a in pairs]
        answer_texts = [specials.plain(a) for _, a in pairs]
        candidates = None
        if label_words is not None:
            spaced = [specials.guard_seams(parsed.answer(specials.guard(word)), own[1]) for word in label_words]
            words = _encode_answers(specials, spaced, anchor)
            candidates = _tell_apart([words[w] for w in spaced], label_words, end)
        empty = [None if a.strip() else "empty answer" for a in answer_texts]
    return _lay_out(
        sequences,
        answers,
        empty,
        classes,
        task=task,
        specials=specials,
        pad_id=tokenizer.pad_token_id,
        max_length=max_length,
        too_long=too_long,
        split=split,
        place=place or _place,
        words=list(label_words or []),
        candidates=candidates,
        texts=answer_texts,
    )


def encode_chats(
    chats: Sequence[tuple[list[dict[str, str]], str]],
    *,
    tokenizer: Any,
    max_length: int,
    too_long: str,
    split: str,
    place: Callable[[int, str], str] | None = None,
) -> Tokens:
    """Tokenize a split through the tokenizer's chat template, for a causal LM.

    The prompt is what the template makes of the turns before the answer, with the header that opens an assistant's turn.
    The answer is what it puts behind that when the answer is in its place, less the white space at the end, so that the
    mark that ends a turn is learned; the end-of-text token follows where that mark is another one.

    Args:
        chats: (turns `{role, content}` before the answer, answer) of each example, n of them.
        tokenizer: the base's; it has a chat template.
        max_length, too_long, split, place: as for `encode`.

    Raises:
        UserError: for an example that is too long where `too_long` is error, or turns that the template refuses.
    """
    empty: list[str | None] = []
    for turns, answer in chats:
        said = any(turn["content"].strip() for turn in turns)
        empty.append("empty answer" if not answer.strip() else None if said else "empty text")
    specials, template = Specials(tokenizer), chat_template(tokenizer)
    pairs = [
        ("", "") if empty[i] else render_chat(turns, answer, tokenizer, specials, (place or _place)(i, split), template)
        for i, (turns, answer) in enumerate(chats)
    ]
    anchor = next((specials.plain(p)[-8:] for p, _ in pairs if p), "")
    encoded = _encode_answers(specials, sorted({a for _, a in pairs}), anchor)
    sequences = specials.ids([p for p, _ in pairs], wrapped=False)
    answers = [encoded[a] for _, a in pairs]
    end = tokenizer.eos_token_id
    if end is not None:
        answers = [a if a[-1:] == [end] else [*a, end] for a in answers]
    return _lay_out(
        sequences,
        answers,
        empty,
        np.full(len(chats), -1, dtype=np.int64),
        task="causal_lm",
        specials=specials,
        pad_id=tokenizer.pad_token_id,
        max_length=max_length,
        too_long=too_long,
        split=split,
        place=place or _place,
        words=[],
        candidates=None,
        texts=[answer for _, answer in chats],
    )


def _place(row: int, split: str) -> str:
    return f"row {row + 1} of {split}"


def _lay_out(
    sequences: list[list[int]],
    answers: list[list[int]],
    empty: Sequence[str | None],
    classes: np.ndarray,
    *,
    task: str,
    specials: Specials,
    pad_id: int,
    max_length: int,
    too_long: str,
    split: str,
    place: Callable[[int, str], str],
    words: list[str],
    candidates: list[list[int]] | None,
    texts: list[str],
) -> Tokens:
    """Prompt and answer tokens of each example as flat arrays; `empty` says why an example is left out, where it is."""
    ids, offsets, kept_prompts, lengths = [], [0], [], []
    left_out: dict[str, list[int]] = {}
    truncated = 0
    for i, (prompt, answer) in enumerate(zip(sequences, answers, strict=True)):
        why = empty[i] or (None if prompt else "empty text")
        over = len(prompt) + len(answer) > max_length
        if why is not None:
            left_out.setdefault(why, []).append(i)
        else:
            lengths.append(len(prompt) + len(answer))
        if why is None and over:
            if too_long == "error":
                length = len(prompt) + len(answer)
                raise UserError(
                    f"data.max_length: {max_length}, but {place(i, split)} has {length} tokens; raise it, or set data.too_long to truncate or drop"
                )
            if too_long == "drop":
                left_out.setdefault("too long", []).append(i)
            truncated += too_long == "truncate"
        if over:  # examples that are left out too: no example in the arrays is longer than max_length
            prompt, answer = _truncate(prompt, answer, max_length, task, specials)
        ids.append(np.asarray([*prompt, *answer], dtype=np.int32))
        offsets.append(offsets[-1] + len(ids[-1]))
        kept_prompts.append(len(prompt))
    flat = np.concatenate(ids) if ids else np.empty(0, dtype=np.int32)
    return Tokens(
        ids=torch.from_numpy(flat),
        offsets=torch.tensor(offsets, dtype=torch.int64),
        prompts=torch.tensor(kept_prompts, dtype=torch.int32),
        labels=torch.from_numpy(classes.copy()),
        pad_id=pad_id,
        is_classes=task == "sequence_classification",
        words=words,
        candidates=candidates,
        answers=texts,
        left_out=left_out,
        truncated=truncated,
        fits=int(np.quantile(lengths, 0.95, method="inverted_cdf")) if lengths else 0,
    )


def _encode_answers(specials: Specials, answers: Sequence[str], anchor: str) -> dict[str, list[int]]:
    """Tokens of each answer as it continues a prompt: those that follow the anchor's own, where it keeps its own.

    Tokenized alone, an answer would get the word-start mark that sentence-piece tokenizers put before a text.
    """
    if not answers:
        return {}
    (head,) = specials.ids([anchor], wrapped=False)
    joint = specials.ids([anchor + a for a in answers], wrapped=False)
    alone = specials.ids(answers, wrapped=False)
    out = {}
    for answer, both, single in zip(answers, joint, alone, strict=True):
        out[answer] = list(both[len(head) :]) if both[: len(head)] == head else list(single)
    return out


def _tell_apart(candidates: list[list[int]], words: Sequence[str], end: list[int]) -> list[list[int]]:
    """Candidates of which none begins another: where one does, as 1 begins 10, all end in end-of-text, as in training.

    Without it log p(1) is never below log p(10), since the one is a factor of the other.

    Raises:
        UserError: for labels that no likelihood can tell apart.
    """
    order = sorted(
        range(len(candidates)), key=lambda i: candidates[i]
    )  # a label stands right before one that it begins
    pairs = [(a, b) for a, b in itertools.pairwise(order) if candidates[b][: len(candidates[a])] == candidates[a]]
    for a, b in pairs:
        why = f"{words[a]!r} and {words[b]!r}"
        if candidates[a] == candidates[b]:
            raise UserError(
                f"data.labels: {why} are the same tokens to this tokenizer; rename one, or use another base"
            )
        if not end:
            raise UserError(
                f"data.labels: {why} begin alike, and this tokenizer has no end-of-text token to tell them apart; end data.template in text after the label, such as a full stop"
            )
    return [c + end for c in candidates] if pairs else candidates


def _without_end(specials: Specials, sequences: list[list[int]]) -> list[list[int]]:
    """Prompts without what some tokenizers put behind a text: the answer follows."""
    _, end = specials.wrap()
    return [s[: -len(end)] if end and len(s) > len(end) and s[-len(end) :] == end else s for s in sequences]


def _truncate(
    prompt: list[int], answer: list[int], limit: int, task: str, specials: Specials
) -> tuple[list[int], list[int]]:
    """An example of at most `limit` tokens; the special tokens around its text stay, as the base always sees them."""
    before, behind = specials.around(prompt)
    if task == "sequence_classification":
        return [*prompt[: max(limit - behind, 0)], *prompt[len(prompt) - behind :]][:limit], []
    room = limit - len(answer)
    if room >= max(before, 1):
        return [*prompt[:before], *prompt[len(prompt) - room + before :]], answer
    # The answer alone is too long: it needs something in front of it.
    kept = prompt[: min(before, limit - 1)] or prompt[-1:]
    return kept, answer[: limit - len(kept)]
