"""Text of the data that looks like a special token is text: it closes no turn, ends no answer, and forges no mark.

A tokenizer takes `<|im_end|>` for its mark wherever it stands. Templates mean it so; examples do not. What examples hold is guarded
before the template is filled in: a character that no text has goes into each such name, and comes out again where the text
is turned into tokens piece by piece. A text without any is tokenized as ever.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_GUARD = "\ufdd0"  # a noncharacter: no text that is exchanged holds it


class Specials:
    """The special tokens of a tokenizer.

    Args:
        tokenizer: a base's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        known = {i: t.content for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
        names = {str(t) for t in tokenizer.all_special_tokens} | set(known.values())
        names = sorted((n for n in names if len(n) > 1), key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, names))) if names else None
        guarded = "|".join(re.escape(n[0] + _GUARD + n[1:]) for n in names)
        self._guarded = re.compile(guarded) if names else None
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
        # An unknown word is text, unless its token has another use too, as in GPT-2's tokenizer.
        self._marks = (set(tokenizer.all_special_ids) | set(known)) - ({tokenizer.unk_token_id} - ends)
        self._wrap: tuple[list[int], list[int]] | None = None

    def guard(self, text: str) -> str:
        """A text of the data, its special tokens guarded."""
        if self._any is None or self._any.search(text) is None:
            return text
        return self._any.sub(lambda found: found[0][0] + _GUARD + found[0][1:], text)

    def guard_seams(self, text: str, literals: int) -> str:
        """A filled-in template, all its special tokens guarded where it has more than the template's own: examples that are
        put side by side, or beside the template's text, can make one of their ends."""
        if self._any is None or len(self._any.findall(text)) == literals:
            return text
        return self.guard(text)

    def count(self, text: str) -> int:
        """How many special tokens a text holds that are not guarded."""
        return 0 if self._any is None else len(self._any.findall(text))

    def plain(self, text: str) -> str:
        """The text as it was before it was guarded."""
        if self._guarded is None or _GUARD not in text:
            return text
        return self._guarded.sub(lambda found: found[0].replace(_GUARD, "", 1), text)

    def ids(self, texts: Sequence[str], wrapped: bool = True) -> list[list[int]]:
        """Token ids of each text; what is guarded in it is text.

        Args:
            texts: any number.
            wrapped: with the tokens that the tokenizer puts around a text.
        """
        if not texts:
            return []
        # The tokenizer's own warning about long texts is left out: `max_length` settles them.
        out = self._tokenizer(list(texts), verbose=False, add_special_tokens=wrapped)["input_ids"]
        for i, text in enumerate(texts):
            if self._guarded is not None and self._guarded.search(text) is not None:
                before, after = self.wrap() if wrapped else ([], [])
                out[i] = [*before, *self._pieces(text), *after]
        return out

    def around(self, ids: Sequence[int]) -> tuple[int, int]:
        """How many special tokens stand before and behind the text: the tokenizer's, the template's, a chat's first mark."""
        before = next((i for i, t in enumerate(ids) if t not in self._marks), len(ids))
        behind = next((i for i, t in enumerate(reversed(ids)) if t not in self._marks), 0)
        return before, behind

    def wrap(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text."""
        if self._wrap is None:
            bare, full = (self._tokenizer("a", add_special_tokens=w)["input_ids"] for w in (False, True))
            at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
            self._wrap = full[:at], full[at + len(bare) :]
        return self._wrap

    def _pieces(self, text: str) -> list[int]:
        out: list[int] = []
        start = 0
        for found in self._any.finditer(text):
            out += self._text(text[start : found.start()])
            out.append(self._tokenizer.convert_tokens_to_ids(found[0]))
            start = found.end()
        return out + self._text(text[start:])

    def _text(self, text: str) -> list[int]:
        if not text:
            return []
        keys = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self._tokenizer(self.plain(text), **keys)["input_ids"]
