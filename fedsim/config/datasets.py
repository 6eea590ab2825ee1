"""The data sets of an experiment: embedded, from a file or the hub, and instructions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fedsim.config.components import callable_in_file
from fedsim.core.section import Count, Like, Natural, OneOf, Share, Text, section, wrong
from fedsim.data.files import Form

Seed32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Tokens = Annotated[int, Field(ge=2)]


def _with_a_field(template: str) -> str:
    if "{" not in template:
        raise wrong("", template, "has no {field}; write the names of columns in braces")
    return template


def _label_words(labels: Any) -> Any:
    words = list(dict.fromkeys(labels.values())) if isinstance(labels, dict) else labels
    if len(words) < 2:
        raise wrong("", labels, "has fewer than two labels; list all of them")
    if len(set(words)) < len(words):
        raise wrong("", labels, "has a label twice; remove one")
    if any(word.strip() != word or not word for word in (*words, *labels)):
        raise wrong("", labels, "has an empty label, or one with white space around it; correct it")
    return labels


Template = Annotated[str, AfterValidator(_with_a_field)]


@section
class _DataKeys:
    template: Template | None = None
    """Text of one example with {fields}; the last field is the answer of a causal LM. Null = the data set's own."""
    labels: Annotated[list[str], AfterValidator(_label_words)] | None = None
    """Label words in order, which numbers the classes; null = the data set's own, or the sorted values of the label column."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Template field -> column of the file, where their names differ, e.g. {sentence: text, label: sentiment}."""
    max_length: Tokens = 128
    """Maximum length of an example in tokens, answer included."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """Longer examples: `truncate` the prompt from the left (then the answer from the right; for a head the text from the right), `drop` them, or stop with an `error`. Special tokens around the text stay."""


@section
class Headlines(_DataKeys):
    """The embedded data set: generated financial headlines with the class counts of the PhraseBank."""

    name: Literal["headlines"] = "headlines"
    seed: Natural = 0
    """Seed of the generator."""


@section
class FinancialPhraseBank(_DataKeys):
    """Financial PhraseBank (Malo et al., 2014): `sentence@label` lines, with the published shuffle and 80/10/10 split."""

    name: Literal["financial_phrasebank"] = "financial_phrasebank"
    path: Text
    """The original text file, Sentences_AllAgree.txt of version 1.0 (UTF-8 or ISO-8859-1), or a hub id."""
    shuffle_seed: int = 1234
    """Seed of the shuffle before the split, by Python's `random`."""


def _check_held_out(data: Any) -> None:
    """Examples to train and to validate on must be left; text names a separate file or split."""
    if data.validation == 0:
        raise wrong("validation", data.validation, "leaves no validation examples; give a fraction above 0")
    if sum(share for share in (data.validation, data.test) if not isinstance(share, str)) >= 1:
        raise wrong("test", data.test, "and validation together leave no training examples; their sum must be below 1")


@section
class _OwnExamples(_DataKeys):
    labels: Annotated[list[str] | dict[str, str], AfterValidator(_label_words)] | None = None
    """Label words in order, which numbers the classes from 0; or value in the data -> label word, e.g. {1: World, 2: Sports}; null = the data set's own, or the sorted values of the label column."""


@section
class OwnSource(_OwnExamples):
    """What a data source in a user's own file takes besides its own keys."""

    validation: Share = 0.1
    """Fraction of the examples to hold out, if the source gives no validation split."""
    test: Share = 0.1
    """Fraction of the examples to hold out, if the source gives no test split; 0 = no test examples."""
    split_seed: int = 0
    """Seed of the shuffle before fractions are held out."""


@section
class _Opened(_OwnExamples):
    path: Text
    validation: Text | Share = 0.1
    """A separate file (of a hub data set: a split), or the fraction of the training examples to hold out."""
    test: Text | Share = 0.1
    """A separate file (of a hub data set: a split), or the fraction of the training examples to hold out; 0 = no test examples."""
    split_seed: int = 0
    """Seed of the shuffle before fractions are held out."""

    @model_validator(mode="after")
    def _check(self) -> _Opened:
        _check_held_out(self)
        return self


@section
class Table(_Opened, Form):
    """Your own CSV, TSV, JSON, JSONL or Parquet file; in Python a DataFrame, a `datasets.Dataset` or a `DatasetDict`."""

    name: Literal["table"] = "table"
    path: Text
    """A .csv, .tsv, .json, .jsonl or .parquet file; the file name extension gives the format. In Python also examples in memory, as for `validation` and `test`."""


@section
class Hub(_Opened):
    """A data set that `datasets.load_dataset` opens: a hub id or a local data set folder."""

    name: Literal["hub"] = "hub"
    path: Text
    """A data set id such as org/name, or a folder."""
    subset: str | None = None
    """Configuration name of the data set."""
    train: str = "train"
    """Split to train on."""


_ROLES = {  # format of a data set -> what `columns` can name in it; nothing for formats with fixed columns
    **{"alpaca": (), "dolly": (), "oasst1": ()},
    "prompt_response": ("prompt", "response", "context", "category", "user_id"),
    "messages": ("messages", "category", "user_id"),
}


@section
class Source(Form):
    """One instruction data set."""

    format: Literal["alpaca", "dolly", "oasst1", "prompt_response", "messages"]
    """Format, which says what the columns hold."""
    path: Text | Annotated[list[Text], Field(min_length=1)]
    """A file or a hub id, or a list of them."""
    name: Text | None = None
    """Name of the data set in the column `source`; null = the format."""
    columns: dict[str, str] | None = None
    """Role -> column of the file, if their names differ."""
    subset: Text | None = None
    """Configuration name of a hub data set."""
    split: Text | None = None
    """Split of a hub data set to use."""

    @model_validator(mode="after")
    def _check(self) -> Source:
        takes = ", ".join(_ROLES[self.format]) or "none: its columns have fixed names"
        for role, column in (self.columns or {}).items():
            if role not in _ROLES[self.format]:
                raise wrong(f"columns.{role}", column, f"has no use; roles of format {self.format}: {takes}")
        return self


@section
class Instructions(_DataKeys):
    """Instruction data: Alpaca, Dolly, OASST1, or your own prompts with answers, or chats; each data set is split by itself."""

    name: Literal["instructions"] = "instructions"
    sources: Annotated[list[Annotated[dict[str, Any], Like(Source)]], Field(min_length=1)]
    """Data sets, each {format: alpaca | dolly | oasst1 | prompt_response | messages, path: FILE or hub id, or a list of them}; optional: name, columns; subset and split of a hub id; header, names, delimiter and encoding of a text file, as for a table."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For prompt_response (prompt, response, context) and messages (messages), and for both category or user_id: role -> column of the file, if their names differ."""
    max_length: Tokens | None = None
    """Maximum length of an example in tokens, answer included; null = 1024, or the limit of the base if that is less."""
    chat_template: bool = False
    """Format prompts and chats by the tokenizer's chat template instead of `template`. A template that writes today's date always writes 26 July 2024."""
    turns: Literal["last", "every"] = "last"
    """Which assistant turns of a chat are answers: the last, or every one, each as an example of its own after the turns before it."""
    validation: Share = 0.1
    """Fraction of each data set to validate on, rounded down to whole examples."""
    test: Share = 0.1
    """Fraction of each data set to test on, rounded down to whole examples; 0 = no test examples."""
    validation_rows: Count | None = None
    """Maximum number of validation examples, from each data set in proportion, the first in its shuffled order; the others are not used. Null = all."""
    test_rows: Natural | None = None
    """Maximum number of test examples, likewise; 0 = none, and the training examples stay the same."""
    split_seed: Seed32 = 0
    """Seed of the shuffle of each data set before the split, by pandas' `sample`."""
    order_seed: Seed32 = 0
    """Seed of the order of instruction and context in a prompt."""
    length_classes: Count = 4
    """Classes of about equal size by characters of prompt and answer, in the column `length`."""

    @model_validator(mode="after")
    def _check(self) -> Instructions:
        if self.labels is not None:
            raise wrong("labels", self.labels, "has no use: answers are free text; leave it out")
        if self.template is not None and self.chat_template:
            raise wrong("template", self.template, "and chat_template=true exclude each other; give one")
        _check_held_out(self)
        names = [source.get("name") or source["format"] for source in self.sources]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise wrong(f"sources[{i}].name", name, "is the name of two sources; give each a different one")
        roles = {role for s in self.sources if not s.get("columns") for role in _ROLES[s["format"]]}
        for role, column in self.columns.items():
            if role not in roles:
                takes = f"; their roles: {', '.join(sorted(roles))}" if roles else ""
                of = "prompt_response and messages without columns of their own"
                raise wrong(f"columns.{role}", column, f"has no use; it is for sources of format {of}{takes}")
        return self


DATA = {
    **{"headlines": Headlines, "financial_phrasebank": FinancialPhraseBank, "table": Table, "hub": Hub},
    "instructions": Instructions,
}
Data = Annotated[Any, OneOf(DATA, find=callable_in_file("data", OwnSource))]
