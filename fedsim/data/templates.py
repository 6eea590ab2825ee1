"""Prompts and answers as text: prompt templates, and the chat templates of tokenizers.

A prompt template names columns in braces; its last field is the answer of a causal LM, everything before it the prompt.
White space between the two belongs to the answer, as subword tokenizers want it: `... sentiment:` + ` neutral`.
"""

from __future__ import annotations

import datetime
import string
from dataclasses import dataclass
from typing import Any

from fedsim.core.errors import UserError
from fedsim.data.specials import Specials

CHAT_DATE = "2024-07-26"  # for every chat template that writes the date: the one Llama 3.1's has where it knows none


@dataclass(frozen=True)
class Template:
    """A parsed template: `parts` are (literal text, field or None) in order.

    Text of the data is put in as it is: braces in it mean nothing.
    """

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read `"{sentence} sentiment: {label}"`.

        Raises:
            UserError: for unbalanced braces, an unnamed field or a format specification.
        """
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(
                f"data.template: {text!r} cannot be read ({error}); double a brace that is meant as text"
            ) from None
        parts = []
        for literal, name, spec, conversion in pieces:
            if name is not None and (not name.isidentifier() or spec or conversion):
                raise UserError(
                    f"data.template: {text!r} has the field {{{name}}}; a field is one plain column name in braces"
                )
            parts.append((literal, name))
        if not any(name for _, name in parts):
            raise UserError(f"data.template: {text!r} has no {{field}}; name columns in braces")
        return cls(tuple(parts))

    @property
    def fields(self) -> list[str]:
        """Field names in order."""
        return [name for _, name in self.parts if name]

    def split(self, row: dict[str, str]) -> tuple[str, str]:
        """(prompt, answer) of an example; the answer carries the white space before it and any text after it."""
        last = max(i for i, (_, name) in enumerate(self.parts) if name)
        prompt = "".join(literal + (row[name] if name else "") for literal, name in self.parts[:last])
        prompt += self.parts[last][0]
        answer = row[self.parts[last][1]] + "".join(literal for literal, _ in self.parts[last + 1 :])
        stripped = prompt.rstrip()
        return stripped, prompt[len(stripped) :] + answer

    def answer(self, text: str) -> str:
        """An answer as it follows every prompt: white space before it is the template's alone, never the data's."""
        return self.split({**dict.fromkeys(self.fields, "x"), self.fields[-1]: text})[1]

    def text(self, row: dict[str, str]) -> str:
        """The whole text of an example."""
        return "".join(literal + (row[name] if name else "") for literal, name in self.parts)


def tells_time(tokenizer: Any) -> bool:
    """Whether the chat template asks what time it is: `strftime_now` is the one way that transformers gives it."""
    return "strftime_now" in str(tokenizer.chat_template)


def chat_template(tokenizer: Any) -> str | None:
    """The chat template with one date for all days: a macro of the function's name stands in front of it.

    With the clock's date the tokens would depend on the day on which a run is started, or resumed. None = as it is.
    """
    held = tokenizer.chat_template
    held = held.get("default") if isinstance(held, dict) else held  # of several, by name
    if held is None or not tells_time(tokenizer):
        return None
    day = datetime.datetime.fromisoformat(CHAT_DATE)
    codes = [flag + letter for flag in ("", "-") for letter in "aAbBcdDeFGgHhIjklmMnpPrRsStTuUVwWxXyYzZ"]
    steps = "".join(f"|replace('%{code}', {day.strftime('%' + code)!r})" for code in codes)
    # The line end is the block's own (trim_blocks), so the template behind it begins a line as before.
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ format{steps} }}}}{{%- endmacro %}}\n"
    return macro + held


def render_chat(
    turns: list[dict[str, str]], answer: str, tokenizer: Any, specials: Specials, row: str, template: str | None
) -> tuple[str, str]:
    """(prompt, answer) of a chat as the template writes them, what is the data's in them guarded."""
    turns = [{name: specials.guard(text) for name, text in turn.items()} for turn in turns]
    answer = specials.guard(answer)
    try:
        keys = {"tokenize": False, "chat_template": template}
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **keys)
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], **keys)
    except Exception as error:  # templates are programs; they refuse roles and orders in words of their own
        why = " ".join(str(error).split())[:160]
        raise UserError(
            f"data.chat_template: {row} is refused by the tokenizer's template ({why}); change its turns, or set chat_template=false"
        ) from None
    if not whole.startswith(prompt):
        raise UserError(
            f"data.chat_template: the tokenizer's template writes {row} with its answer otherwise than without; set chat_template=false"
        )
    return prompt, whole[len(prompt) :].rstrip()
