"""The sections of an experiment: frozen dataclasses with a sentence under each field and a check of their values."""

from __future__ import annotations

import copyreg
import functools
import math
import re
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, Union

from fedsim.algorithms import ALGORITHMS, Algorithm
from fedsim.config.schema import convert, keys_of, unknown_key
from fedsim.core.errors import UserError, shown
from fedsim.core.user_code import load
from fedsim.data.files import Form

_MOST = 1024  # workers, or threads of one
_NAME_LAYERS = "is empty; name layers of the base, or use auto"


def check_that(ok: bool, path: str, value: Any, problem: str) -> None:
    if not ok:
        raise UserError(f"{path}: {shown(value)} {problem}")


def _check_path(value: str, path: str, way: str) -> None:
    check_that(bool(value.strip()), path, value, f"is empty; give {way}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model."""

    path: str = "tiny"
    """`tiny` (ships with fedsim), a hub id, a transformers folder, a GGUF file, or `package:NAME/FILE` for a file or folder inside an installed package."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Type of the frozen base; what is trained stays float32 (float64 under a float64 base)."""
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """Answer written as text and scored by its likelihood, or a classification head on the last token or the pooled output."""
    base_dropout: bool = False
    """Whether the dropout layers inside the base act in training; an adapter's own dropout is a key of the adapter."""

    def check(self, path: str) -> None:
        _check_path(self.path, f"{path}.path", "a hub id, a folder, a GGUF file or tiny")


def _check_peft(section: Any, path: str) -> None:
    if section.peft:
        from fedsim.models.adapters import check_peft_options

        check_peft_options(section.name, section.peft, path)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation (Hu et al., 2021), by PEFT."""

    name: Literal["lora"] = "lora"
    r: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """Scaling: the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout on the input of A, in training only."""
    target_modules: list[str] | Literal["auto", "all-linear"] = "auto"
    """Leaf names of the layers to adapt; auto = the attention input projections: q, k and v, or the fused one."""
    init: Literal["kaiming", "xavier", "gaussian"] = "kaiming"
    """Initialization of A (B starts at zero): kaiming is PEFT's default, xavier that of the published runs."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Further options of PEFT's own config class for the method, e.g. {use_dora: true, modules_to_save: [score]}; they hold over the keys above."""

    def check(self, path: str) -> None:
        _check_peft(self, path)
        check_that(self.r >= 1, f"{path}.r", self.r, "is not a rank; give 1 or more")
        positive = math.isfinite(self.alpha) and self.alpha > 0
        check_that(positive, f"{path}.alpha", self.alpha, "is not a positive number; r or 2 r are usual")
        check_that(len(self.target_modules) > 0, f"{path}.target_modules", self.target_modules, _NAME_LAYERS)
        check_that(0 <= self.dropout < 1, f"{path}.dropout", self.dropout, "is outside [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PTuning:
    """P-tuning (Liu et al., 2021): virtual tokens made by an MLP prompt encoder, by PEFT."""

    name: Literal["p_tuning"] = "p_tuning"
    num_virtual_tokens: int = 10
    """Virtual tokens in front of every input."""
    hidden: int = 1024
    """Width of the prompt encoder's hidden layers."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Further options of PEFT's own config class for the method, e.g. {encoder_reparameterization_type: LSTM}; they hold over the keys above."""

    def check(self, path: str) -> None:
        _check_peft(self, path)
        check_that(self.num_virtual_tokens >= 1, f"{path}.num_virtual_tokens", self.num_virtual_tokens, "is below 1")
        check_that(self.hidden >= 1, f"{path}.hidden", self.hidden, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """Bottleneck adapters (Houlsby et al., 2019) after the attention's and the MLP's output projection; fedsim's own."""

    name: Literal["adapter"] = "adapter"
    bottleneck: int = 32
    """Width of the bottleneck."""
    dropout: float = 0.0
    """Dropout on the adapter's hidden layer, in training only."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """Non-linearity inside the bottleneck."""
    target_modules: list[str] | Literal["auto"] = "auto"
    """Leaf names of the layers whose output is adapted; auto = the output projections of attention and MLP."""

    def check(self, path: str) -> None:
        check_that(self.bottleneck >= 1, f"{path}.bottleneck", self.bottleneck, "is below 1")
        check_that(0 <= self.dropout < 1, f"{path}.dropout", self.dropout, "is outside [0, 1)")
        check_that(len(self.target_modules) > 0, f"{path}.target_modules", self.target_modules, _NAME_LAYERS)


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Prefix tuning (Li and Liang, 2021), by PEFT."""

    name: Literal["prefix"] = "prefix"
    num_virtual_tokens: int = 10
    """Length of the trained key/value prefix of every layer."""
    projection: bool = False
    """Make the prefix by an MLP, as in the paper, or train it directly."""
    hidden: int = 512
    """Width of that MLP."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Further options of PEFT's own config class for the method, e.g. {init_weights: false}; they hold over the keys above."""

    def check(self, path: str) -> None:
        _check_peft(self, path)
        check_that(self.num_virtual_tokens >= 1, f"{path}.num_virtual_tokens", self.num_virtual_tokens, "is below 1")
        check_that(self.hidden >= 1, f"{path}.hidden", self.hidden, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompt tuning (Lester et al., 2021), by PEFT."""

    name: Literal["prompt"] = "prompt"
    num_virtual_tokens: int = 10
    """Trained embeddings in front of every input."""
    init_text: str | None = None
    """Start from the embeddings of this text; null starts from randomly drawn ones."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Further options of PEFT's own config class for the method, e.g. {prompt_tuning_init: SAMPLE_VOCAB}; they hold over the keys above."""

    def check(self, path: str) -> None:
        _check_peft(self, path)
        said = self.init_text is None or bool(self.init_text.strip())
        check_that(said, f"{path}.init_text", self.init_text, "is empty; give some words, or null")
        check_that(self.num_virtual_tokens >= 1, f"{path}.num_virtual_tokens", self.num_virtual_tokens, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Ia3:
    """IA3 (Liu et al., 2022): trained scales on keys, values and the MLP's inner activations, by PEFT."""

    name: Literal["ia3"] = "ia3"
    target_modules: list[str] | Literal["auto"] = "auto"
    """Leaf names of the layers to scale; auto = PEFT's choice for the architecture."""
    feedforward_modules: list[str] | Literal["auto"] = "auto"
    """Those of them whose input is scaled instead of their output; auto = PEFT's choice."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Further options of PEFT's own config class for the method, e.g. {modules_to_save: [lm_head]}; they hold over the keys above."""

    def check(self, path: str) -> None:
        _check_peft(self, path)
        both = (self.target_modules == "auto") == (self.feedforward_modules == "auto")
        check_that(
            both, f"{path}.feedforward_modules", self.feedforward_modules, "goes with target_modules: give both or none"
        )


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Full fine-tuning: every parameter of the base model is trained and exchanged."""

    name: Literal["none"] = "none"

    def check(self, path: str) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class OtherPeft:
    """Any PEFT method by its PEFT name, with PEFT's own settings as keys.

    The methods above go by their names in capitals, e.g. LORA. A `peft.PeftConfig` given in Python becomes such a section.
    """

    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of PEFT's config class for the method."""

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens in front of every input."""
        return self.settings.get("num_virtual_tokens") or 0

    def check(self, path: str) -> None:
        from fedsim.models.adapters import check_peft_settings

        check_peft_settings(self.name, self.settings, path)


@dataclass(frozen=True, kw_only=True)
class _DataKeys:
    template: str | None = None
    """Text of one example with {fields}; the last field is the answer of a causal LM. Null = the source's own default."""
    labels: list[str] | None = None
    """Label words in order, which numbers the classes; null = the source's own, or the sorted values of the label column."""
    columns: dict[str, str] = field(default_factory=dict)
    """Template field -> column of the file, where their names differ, e.g. {sentence: text, label: sentiment}."""
    max_length: int = 128
    """Longest example in tokens, answer included."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to longer ones: cut the prompt from its left (then the answer from its right; a head's text from its right), leave them out, or stop. Special tokens around the text stay."""

    def check(self, path: str) -> None:
        long = self.max_length is None or self.max_length >= 2  # null is known to one section only
        check_that(long, f"{path}.max_length", self.max_length, "is below 2 tokens")
        if self.template is not None:
            check_that(
                "{" in self.template, f"{path}.template", self.template, "has no {field}; name columns in braces"
            )
        if self.labels is not None:
            mapped = isinstance(self.labels, dict)
            words = list(dict.fromkeys(self.labels.values())) if mapped else self.labels
            check_that(len(words) >= 2, f"{path}.labels", self.labels, "has fewer than two labels")
            check_that(len(set(words)) == len(words), f"{path}.labels", self.labels, "names a label twice")
            bare = all(word.strip() == word != "" for word in (*words, *self.labels))
            check_that(bare, f"{path}.labels", self.labels, "has an empty label, or one with white space around it")


@dataclass(frozen=True, kw_only=True)
class Headlines(_DataKeys):
    """The embedded data set: generated financial headlines with the PhraseBank's class counts."""

    name: Literal["headlines"] = "headlines"
    seed: int = 0
    """Seed of the generator."""

    def check(self, path: str) -> None:
        super().check(path)
        check_that(self.seed >= 0, f"{path}.seed", self.seed, "is negative")


@dataclass(frozen=True, kw_only=True)
class FinancialPhraseBank(_DataKeys):
    """Financial PhraseBank (Malo et al., 2014): `sentence@label` lines, the published shuffle and 80/10/10 cut."""

    name: Literal["financial_phrasebank"] = "financial_phrasebank"
    path: str = ""
    """The original text file (UTF-8 or ISO-8859-1), or a hub id."""
    shuffle_seed: int = 1234
    """Seed of the one shuffle before the cut, by Python's `random`."""

    def check(self, path: str) -> None:
        super().check(path)
        _check_path(self.path, f"{path}.path", "Sentences_AllAgree.txt of the Financial PhraseBank v1.0, or a hub id")


@dataclass(frozen=True, kw_only=True)
class Table(_DataKeys):
    """Your own CSV, TSV, JSON, JSONL or Parquet file; in Python a DataFrame, a `datasets.Dataset` or a `DatasetDict`, too."""

    name: Literal["table"] = "table"
    path: str = ""
    """The file; its ending tells the format. In Python examples in memory can stand in its place, and in that of `validation` and `test`."""
    header: bool | None = None
    """Whether the first line of a CSV or TSV file names its columns; null = it does, unless `names` are given. Without either the columns are 0, 1, 2, ..."""
    names: list[str] | None = None
    """Names of the columns in order, in the place of the file's own."""
    delimiter: str | None = None
    """Character between cells; null = a comma in .csv files, a tab in .tsv files. With one, a text file may have any ending."""
    encoding: str | None = None
    """Of text files, e.g. latin-1, cp1252 or utf-16; null = UTF-8."""
    labels: list[str] | dict[str, str] | None = None
    """Label words in order, which numbers the classes from 0; or what the file holds -> label word, e.g. {1: World, 2: Sports}; null = the sorted values of the label column."""
    validation: str | float = 0.1
    """A file of its own, or the fraction of `path` to hold out."""
    test: str | float = 0.1
    """A file of its own, or the fraction of `path` to hold out; 0 = no test rows."""
    split_seed: int = 0
    """Seed of the shuffle before fractions are cut off."""

    def check(self, path: str) -> None:
        super().check(path)
        _check_path(self.path, f"{path}.path", "a .csv, .tsv, .json, .jsonl or .parquet file")
        Form(self.header, self.names, self.delimiter, self.encoding).check(path)
        _check_held_out(self, path, "a file")


def _check_held_out(section: Table | Hub, path: str, named: str) -> None:
    held = 0.0
    for key in ("validation", "test"):
        value = getattr(section, key)
        if isinstance(value, str):
            _check_path(value, f"{path}.{key}", f"{named} or a fraction in [0, 1)")
        else:
            check_that(0 <= value < 1, f"{path}.{key}", value, f"is neither {named} nor a fraction in [0, 1)")
            held += value
    check_that(section.validation != 0, f"{path}.validation", section.validation, "leaves no row to validate on")
    check_that(held < 1, f"{path}.test", section.test, "and validation together leave no training rows")


@dataclass(frozen=True, kw_only=True)
class Hub(_DataKeys):
    """Any data set that `datasets.load_dataset` opens: a hub id or a local data set folder."""

    name: Literal["hub"] = "hub"
    path: str = ""
    """The id or folder."""
    subset: str | None = None
    """Configuration name of the data set."""
    labels: list[str] | dict[str, str] | None = None
    """Label words in order, which numbers the classes from 0; or what the data set holds -> label word; null = the data set's own, or the sorted values of the label column."""
    train: str = "train"
    """Split to train on."""
    validation: str | float = 0.1
    """Split to validate on, or the fraction of the training split to hold out."""
    test: str | float = 0.1
    """Split to test on, or the fraction of the training split to hold out; 0 = no test rows."""
    split_seed: int = 0
    """Seed of the shuffle before fractions are cut off."""

    def check(self, path: str) -> None:
        super().check(path)
        _check_path(self.path, f"{path}.path", "a data set id such as org/name, or a folder")
        _check_held_out(self, path, "a split's name")


_ROLES = {  # format of a data set -> what `columns` can name in it; of those that are always written alike nothing
    **{"alpaca": (), "dolly": (), "oasst1": ()},
    "prompt_response": ("prompt", "response", "context", "category", "user_id"),
    "messages": ("messages", "category", "user_id"),
}


@dataclass(frozen=True, kw_only=True)
class Instructions(_DataKeys):
    """Instruction data: Alpaca, Dolly, OASST1, or your own prompts with answers, or chats; each data set cut by itself."""

    name: Literal["instructions"] = "instructions"
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Data sets, each {format: alpaca | dolly | oasst1 | prompt_response | messages, path: FILE or hub id, or a list of them}; optional name, columns, of a hub id subset and split, and of a text file header, names, delimiter and encoding, as for a table."""
    columns: dict[str, str] = field(default_factory=dict)
    """For prompt_response (prompt, response, context) and messages (messages), and category or user_id of both: role -> column of the file, where their names differ."""
    max_length: int | None = None
    """Longest example in tokens, answer included; null = 1024, or what the base takes where that is less."""
    chat_template: bool = False
    """Write prompts and chats by the tokenizer's chat template instead of `template`. One that writes today's date always writes 26 July 2024."""
    turns: Literal["last", "every"] = "last"
    """Which assistant turns of a chat are answers: the last one, or every one, each a row of its own after the turns before it."""
    validation: float = 0.1
    """Fraction of each data set to validate on, rounded down to whole rows."""
    test: float = 0.1
    """Fraction of each data set to test on, rounded down to whole rows; 0 = no test rows."""
    validation_rows: int | None = None
    """At most so many validation rows, of each data set in proportion and the first in its shuffled order; the others are used for nothing. Null = all."""
    test_rows: int | None = None
    """The same of the test rows; 0 = none, and the training rows stay as they are."""
    split_seed: int = 0
    """Seed of the one shuffle of each data set before the cut, as pandas' `sample` draws it."""
    order_seed: int = 0
    """Seed of the order of instruction and context in a prompt."""
    length_classes: int = 4
    """Classes of about equal size by characters of prompt and answer, in the column `length`."""

    def check(self, path: str) -> None:
        super().check(path)
        check_that(self.labels is None, f"{path}.labels", self.labels, "has no use here: answers are free text")
        shown = self.template is None or not self.chat_template
        check_that(shown, f"{path}.template", self.template, "and chat_template=true exclude each other; give one")
        for key in ("validation", "test"):
            value = getattr(self, key)
            check_that(0 <= value < 1, f"{path}.{key}", value, "is not a fraction in [0, 1)")
        check_that(self.validation > 0, f"{path}.validation", self.validation, "leaves no row to validate on")
        both = self.validation + self.test < 1
        check_that(both, f"{path}.test", self.test, "and validation together leave no training rows")
        for key, least in (("validation_rows", 1), ("test_rows", 0)):
            value = getattr(self, key)
            check_that(
                value is None or value >= least, f"{path}.{key}", value, f"is below {least}; null takes all rows"
            )
        for key in ("split_seed", "order_seed"):
            check_that(0 <= getattr(self, key) < 2**32, f"{path}.{key}", getattr(self, key), "is outside 0 to 2^32 - 1")
        check_that(self.length_classes >= 1, f"{path}.length_classes", self.length_classes, "is below 1")
        _check_sources(self.sources, self.columns, path)


def _check_sources(sources: list[dict[str, Any]], columns: dict[str, str], path: str) -> None:
    way = "is empty; give one or more, e.g. [{format: alpaca, path: alpaca.json}]"
    check_that(len(sources) > 0, f"{path}.sources", sources, way)
    names: set[str] = set()
    for i, source in enumerate(sources):
        at, keys = f"{path}.sources[{i}]", ("format", "path", "name", "columns", "subset", "split", *keys_of(Form))
        for key in source:
            if key not in keys:
                raise UserError(unknown_key(f"{at}.{key}", keys))
        kind, place = source.get("format"), source.get("path")
        check_that(kind in list(_ROLES), f"{at}.format", kind, f"is not known; one of {', '.join(_ROLES)}")
        places = place if isinstance(place, list) else [place]
        named = bool(places) and all(isinstance(p, str) and p.strip() for p in places)
        check_that(named, f"{at}.path", place, "is no path; give a file or a hub id, or a list of them")
        for key in ("name", "subset", "split"):
            value = source.get(key)
            check_that(
                value is None or (isinstance(value, str) and bool(value.strip())), f"{at}.{key}", value, "is no text"
            )
        convert(Form, {k: v for k, v in source.items() if k in keys_of(Form)}, at).check(at)
        name = source.get("name") or kind
        check_that(name not in names, f"{at}.name", name, "names two sources; give each a name of its own")
        names.add(name)
        own = source.get("columns") or {}
        text = isinstance(own, dict) and all(isinstance(c, str) for c in own.values())
        check_that(text, f"{at}.columns", own, "is not a mapping {role: column}")
        for role, column in own.items():
            takes = ", ".join(_ROLES[kind]) or "nothing, its columns are always named alike"
            check_that(role in _ROLES[kind], f"{at}.columns.{role}", column, f"has no use; format {kind} takes {takes}")
    roles = {role for source in sources if not source.get("columns") for role in _ROLES[source["format"]]}
    for role, column in columns.items():
        takes = "has no use; it is for sources of format prompt_response and messages without columns of their own"
        takes += f", which take: {', '.join(sorted(roles))}" if roles else ""
        check_that(role in roles, f"{path}.columns.{role}", column, takes)


@dataclass(frozen=True, kw_only=True)
class _Clients:
    num_clients: int = 3
    """Number of clients."""

    def check(self, path: str, most: int = 10**6) -> None:
        check_that(self.num_clients >= 1, f"{path}.num_clients", self.num_clients, "is below 1")
        many = f"is above {most:,}; use fewer (partition.name=virtual takes up to 100,000,000)"
        check_that(self.num_clients <= most, f"{path}.num_clients", self.num_clients, many)


@dataclass(frozen=True, kw_only=True)
class _ByClass(_Clients):
    by: str | None = None
    """Column whose values are the classes to divide by; null = the label."""


@dataclass(frozen=True, kw_only=True)
class Iid(_Clients):
    """Examples dealt at random; client sizes differ by at most one."""

    name: Literal["iid"] = "iid"


@dataclass(frozen=True, kw_only=True)
class _Dirichlet(_ByClass):
    alpha: float = 1.0
    """Concentration parameter: small = each class on few clients, large = all clients alike."""
    min_rows: int = 10
    """Minimum number of examples per client; the partition is resampled until this holds."""
    max_redraws: int = 100
    """Number of resampling attempts before the partition fails or is repaired."""
    repair: bool = False
    """Instead of failing, take the best attempt and move examples from the largest clients to those below `min_rows`."""

    def check(self, path: str) -> None:
        super().check(path)
        positive = math.isfinite(self.alpha) and self.alpha > 0
        check_that(
            positive, f"{path}.alpha", self.alpha, "is not a positive number; 0.1 is very uneven, 100 nearly even"
        )
        check_that(self.min_rows >= 0, f"{path}.min_rows", self.min_rows, "is negative")
        check_that(self.max_redraws >= 1, f"{path}.max_redraws", self.max_redraws, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Dirichlet(_Dirichlet):
    """Each class divided over the clients by Dirichlet proportions, without a cap."""

    name: Literal["dirichlet"] = "dirichlet"


@dataclass(frozen=True, kw_only=True)
class DirichletFedma(_Dirichlet):
    """The published sampler (FedMA, NVFlare, FedML): a client that already has N/K examples gets none of the remaining classes."""

    name: Literal["dirichlet_fedma"] = "dirichlet_fedma"


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """Explicit numbers of examples per class and client; which ones is drawn by the seed."""

    name: Literal["class_counts"] = "class_counts"
    counts: list[list[int]] = field(default_factory=list)
    """counts[client][class], classes in the order of `data.labels`."""
    by: str | None = None
    """Column whose values are the classes; null = the label."""

    def check(self, path: str) -> None:
        check_that(
            len(self.counts) > 0,
            f"{path}.counts",
            self.counts,
            "is empty; give one list of rows per class for each client",
        )
        same = len({len(row) for row in self.counts}) == 1
        check_that(
            same, f"{path}.counts", self.counts, "has rows of different length; each client needs one count per class"
        )
        check_that(len(self.counts[0]) > 0, f"{path}.counts", self.counts, "names no class; give one count per class")
        check_that(min(map(min, self.counts)) >= 0, f"{path}.counts", self.counts, "has a negative count")


@dataclass(frozen=True, kw_only=True)
class Shards(_ByClass):
    """Each client gets examples of at most s classes."""

    name: Literal["shards"] = "shards"
    classes_per_client: int = 2
    """s, the maximum number of classes per client."""

    def check(self, path: str) -> None:
        super().check(path)
        check_that(self.classes_per_client >= 1, f"{path}.classes_per_client", self.classes_per_client, "is below 1")


@dataclass(frozen=True, kw_only=True)
class ByColumn:
    """One client per value of a column: natural ids such as users, sites or sources."""

    name: Literal["by_column"] = "by_column"
    column: str = ""
    """The column."""
    min_rows: int = 1
    """Minimum number of examples per client; a value with fewer is an error, since every example belongs to a client."""

    def check(self, path: str) -> None:
        check_that(
            bool(self.column), f"{path}.column", self.column, "is empty; name the column that holds the clients' ids"
        )
        check_that(self.min_rows >= 1, f"{path}.min_rows", self.min_rows, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Quantity(_Clients):
    """Examples dealt at random; client sizes follow a power law."""

    name: Literal["quantity"] = "quantity"
    exponent: float = 1.0
    """The size of the k-th largest client is proportional to k^-exponent; 0 = equal sizes."""
    min_rows: int = 10
    """Minimum number of examples per client."""

    def check(self, path: str) -> None:
        super().check(path)
        check_that(
            math.isfinite(self.exponent) and self.exponent >= 0,
            f"{path}.exponent",
            self.exponent,
            "is not a number >= 0",
        )
        check_that(self.min_rows >= 0, f"{path}.min_rows", self.min_rows, "is negative")


@dataclass(frozen=True, kw_only=True)
class Virtual(_Clients):
    """Any number of clients, each with examples sampled with replacement: clients may overlap."""

    name: Literal["virtual"] = "virtual"
    num_clients: int = 1000
    """Number of clients; a client's examples do not depend on it."""
    min_rows: int = 10
    """Minimum number of examples per client."""
    max_rows: int = 100
    """Maximum number of examples per client; sizes are drawn uniformly between the two, both included."""

    def check(self, path: str) -> None:
        super().check(path, 10**8)  # 12 bytes of memory each
        check_that(self.min_rows >= 1, f"{path}.min_rows", self.min_rows, "is below 1: every client draws rows")
        less = f"is below min_rows={self.min_rows}"
        check_that(self.max_rows >= self.min_rows, f"{path}.max_rows", self.max_rows, less)
        check_that(self.max_rows <= 10**7, f"{path}.max_rows", self.max_rows, "is above 10,000,000")


@dataclass(frozen=True, kw_only=True)
class CohortKeys:
    """Client sampling."""

    size: int | Literal["all"] = "all"
    """Clients sampled per round, without replacement; or all."""

    def check(self, path: str) -> None:
        check_that(self.size == "all" or self.size >= 1, f"{path}.size", self.size, "is below 1; give a number or all")


MOST_EXAMPLES = 10**8  # of a model per round: their order is drawn at once and held in memory


@dataclass(frozen=True, kw_only=True)
class LocalWork:
    """Local training: what one client does in one round."""

    steps: int | None = None
    """Optimizer steps per client and round, each on a full batch; the examples are reshuffled after every pass. Excludes epochs."""
    epochs: int | None = None
    """Passes over the client's examples per round; the last batch of a pass may be smaller. 1 if neither steps nor epochs is given."""
    batch_size: int = 32
    """Examples per optimizer step."""
    micro_batch: int | None = None
    """Examples per forward and backward pass; null = the whole batch. Changes memory and speed, not the results."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """torch's AdamW or SGD."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Weight decay of every trained tensor, as torch's optimizer defines it."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the two moment estimates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.0
    """SGD's momentum."""
    clip: float | None = 1.0
    """Maximum global norm of a client's gradient (gradient clipping); null = no clipping."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or a half cosine or a straight line from lr to min_lr at the horizon."""
    warmup: int = 0
    """Steps of linear warm-up from zero."""
    min_lr: float = 0.0
    """Learning rate at the end of a cosine or linear schedule, and after it."""
    horizon: int | None = None
    """Step at which a cosine or linear schedule ends; null = the steps of the whole run (or of the round, with schedule_over: round)."""
    schedule_over: Literal["run", "round"] = "run"
    """`run`: one learning-rate schedule across all rounds; `round`: restart the schedule every round."""
    keep_state: bool = True
    """Whether clients keep their optimizer state between rounds (otherwise it is reset). Local-only and centralized training always keep it."""
    shuffle: bool = True
    """Reshuffle the client's examples before every pass."""
    drop_last: bool = False
    """With epochs: drop the smaller last batch of a pass."""

    def check(self, path: str) -> None:
        if self.steps is not None:
            way = f"and {path}.epochs={self.epochs} are both given; set one of them to null"
            check_that(self.epochs is None, f"{path}.steps", self.steps, way)
            check_that(self.steps >= 1, f"{path}.steps", self.steps, "is below 1")
            check_that(
                not self.drop_last,
                f"{path}.drop_last",
                True,
                "goes with epochs; work in steps always draws full batches",
            )
        if self.epochs is not None:
            check_that(self.epochs >= 1, f"{path}.epochs", self.epochs, "is below 1")
            way = f"passes over the data per round are more than {MOST_EXAMPLES} examples; lower it"
            check_that(self.epochs <= MOST_EXAMPLES, f"{path}.epochs", self.epochs, way)
        check_that(self.batch_size >= 1, f"{path}.batch_size", self.batch_size, "is below 1")
        if self.steps is not None:
            way = f"x batch_size={self.batch_size} are more than {MOST_EXAMPLES} examples per round; lower one of them"
            check_that(self.steps * self.batch_size <= MOST_EXAMPLES, f"{path}.steps", self.steps, way)
        if self.micro_batch is not None:
            fits = 1 <= self.micro_batch <= self.batch_size
            check_that(fits, f"{path}.micro_batch", self.micro_batch, f"is outside 1 to batch_size={self.batch_size}")
        check_that(math.isfinite(self.lr) and self.lr > 0, f"{path}.lr", self.lr, "is not a positive number")
        check_that(0 <= self.min_lr <= self.lr, f"{path}.min_lr", self.min_lr, f"is outside 0 to lr={self.lr}")
        decay = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        check_that(
            decay, f"{path}.weight_decay", self.weight_decay, "is not a finite number, or negative; 0 turns decay off"
        )
        two = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        check_that(two, f"{path}.betas", self.betas, "is not two numbers in [0, 1)")
        check_that(math.isfinite(self.eps) and self.eps > 0, f"{path}.eps", self.eps, "is not a positive number")
        check_that(0 <= self.momentum < 1, f"{path}.momentum", self.momentum, "is outside [0, 1)")
        if self.optimizer == "adamw":
            check_that(self.momentum == 0, f"{path}.momentum", self.momentum, "is a key of sgd; adamw takes betas")
        check_that(
            self.clip is None or 0 < self.clip < math.inf,
            f"{path}.clip",
            self.clip,
            "is not positive and finite; null turns clipping off",
        )
        check_that(self.warmup >= 0, f"{path}.warmup", self.warmup, "is negative")
        if self.horizon is not None:
            way = f"needs {path}.schedule=cosine or linear"
            check_that(self.schedule != "constant", f"{path}.horizon", self.horizon, way)
            check_that(
                self.horizon > self.warmup, f"{path}.horizon", self.horizon, f"is not beyond warmup={self.warmup}"
            )


@dataclass(frozen=True, kw_only=True)
class Central:
    """How the budget of centralized training is matched to federated training."""

    match: Literal["epochs", "steps"] = "epochs"
    """`epochs`: as many examples per round as all sampled clients together; `steps`: as many optimizer steps as one client."""

    def check(self, path: str) -> None:
        pass


@functools.cache
def section_of(name: str, algorithm: type[Algorithm]) -> type:
    """The section of an algorithm: its own fields, and its name."""
    about = {"__doc__": algorithm.__doc__, "__module__": algorithm.__module__}
    about |= {"check": lambda self, path: None, "of": algorithm}
    named = [("name", Literal[name], name)]
    made = make_dataclass(algorithm.__name__, named, bases=(algorithm,), namespace=about, frozen=True, kw_only=True)
    copyreg.pickle(made, lambda section: (_section, (name, algorithm_of(section))))
    return made


def _section(name: str, algorithm: Algorithm) -> Any:
    """The section that describes an algorithm."""
    own = {f.name: getattr(algorithm, f.name) for f in fields(algorithm)}
    return section_of(name, type(algorithm))(**own)


def section_of_user(name: str) -> tuple[str, type]:
    """(name with the whole path, section) of an algorithm in a user's file, `FILE.py:CLASS`."""
    kind = load(name, Algorithm, "algorithm.name")
    file, _, wanted = name.rpartition(":")
    name = f"{Path(file).expanduser().resolve()}:{wanted}"
    return name, section_of(name, kind)


def algorithm_of(section: Any) -> Algorithm:
    """The algorithm that a section describes."""
    kind = type(section).of
    return kind(**{f.name: getattr(section, f.name) for f in fields(kind)})


FedAvgKeys: Any = section_of("fedavg", ALGORITHMS["fedavg"])
AlgorithmKeys: Any = Union[tuple(section_of(name, kind) for name, kind in ALGORITHMS.items())]  # noqa: UP007


@dataclass(frozen=True, kw_only=True)
class Best:
    """How the best model is selected on the validation examples."""

    metric: Literal["accuracy", "loss", "exact_match", "macro_f1", "perplexity"] | None = None
    """Validation metric; null = accuracy where there are label words or a head, else loss."""
    mode: Literal["max", "min"] | None = None
    """Whether a higher or a lower value is better; null = min for loss and perplexity, max otherwise."""

    def check(self, path: str) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """How often the state of the run is saved."""

    every: int = 1
    """Rounds between two checkpoints; a crash loses at most this many rounds."""
    keep: int = 2
    """Number of checkpoints kept; older ones are deleted."""
    shard_mb: int = 1024
    """Maximum size of a safetensors file in a checkpoint or an exported full model, in MiB; a larger tensor gets a file of its own."""

    def check(self, path: str) -> None:
        check_that(self.every >= 1, f"{path}.every", self.every, "is below 1")
        check_that(self.shard_mb >= 1, f"{path}.shard_mb", self.shard_mb, "is below 1")
        check_that(self.keep >= 1, f"{path}.keep", self.keep, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """When and how models are scored on the validation rows."""

    every_steps: int | None = None
    """Score a client inside a round after every so many of its optimiser steps since the start; null = never inside."""
    every_rounds: int = 1
    """Evaluate every N rounds, and always after the last."""
    clients: bool = True
    """Score the clients of a federated round just before they are merged, or the merged model alone."""
    batch_size: int = 64
    """Rows of a scoring batch."""
    generate: bool = False
    """Also generate the answer greedily and count exact matches (causal LM)."""
    max_new_tokens: int = 32
    """Longest generated answer in tokens."""
    max_examples: int | None = None
    """Evaluate on at most this many validation examples: a random subset, the same for every model, round and seed; null = all. Test scores are always of all test examples."""

    def check(self, path: str) -> None:
        check_that(
            self.every_steps is None or self.every_steps >= 1, f"{path}.every_steps", self.every_steps, "is below 1"
        )
        for key in ("every_rounds", "batch_size", "max_new_tokens"):
            check_that(getattr(self, key) >= 1, f"{path}.{key}", getattr(self, key), "is below 1")
        most = self.max_examples
        check_that(most is None or most >= 1, f"{path}.max_examples", most, "is below 1; null evaluates on all")
        long = self.max_new_tokens
        check_that(
            long <= 1 << 16, f"{path}.max_new_tokens", long, "is above 65536, which no evaluation comes to the end of"
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """How clients share a device."""

    lanes: int | Literal["auto", "measure"] = "auto"
    """Clients trained side by side in one forward and backward pass. auto = by the sizes of the experiment and the base and the kind of device, the same wherever it runs; measure = timed once, at the run's first start, so another start may choose otherwise, and its last bits differ; 1 = one after another, PEFT's own model in padded batches."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Compute activations a second time in the backward pass instead of keeping them; auto = where one lane would not fit otherwise."""

    packing: bool = False
    """Where the whole model is trained: rows lie end to end without padding, each attending to itself alone, as many a pass as fit into local.micro_batch x data.max_length tokens. Adapters in lanes are always trained so. Refused for bases whose layers do not take rows so, GPT-Neo among them."""
    master_weights: bool = True
    """Where the whole model is trained under a 16-bit model.dtype: weights, gradients and moments in float32, computing in 16 bits; false = everything in 16 bits, in half the memory. Sums over clients are float32 either way."""

    def check(self, path: str) -> None:
        whole = not isinstance(self.lanes, int) or self.lanes >= 1
        check_that(whole, f"{path}.lanes", self.lanes, "is no number of lanes; give 1 or more, auto or measure")


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """How updates are summed; the results do not depend on it."""

    chunk_mb: int = 16
    """Parameters that are summed, encoded or saved at a time, in MiB of float32; a round needs this much memory besides the global parameters and their running sum."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the global parameters and the running sum are kept: auto = on the training device; cpu = in host memory, which leaves device memory to training; cuda = as auto, but an error without a GPU."""

    def check(self, path: str) -> None:
        check_that(self.chunk_mb >= 1, f"{path}.chunk_mb", self.chunk_mb, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Messages:
    """Compression of what server and clients send; training and aggregation stay in full precision."""

    up: str | None = None
    """Data type of a client's update: fp32, fp16, bf16, blockwise8 (8 bits per value) or nf4 (4 bits); null = no conversion."""
    down: str | None = None
    """Data type of the global parameters that a client receives and starts from; same values as `up`."""
    error_feedback: bool = False
    """Error feedback: each client keeps the compression error of its update and adds it to its next one."""

    def check(self, path: str) -> None:
        for key in ("up", "down"):
            value = getattr(self, key)
            if value is not None:
                from fedsim.channel.codecs import canonical  # torch comes with it

                try:
                    object.__setattr__(self, key, canonical(value))
                except UserError as error:
                    raise UserError(f"{path}.{key}: {error}") from None
        wanted = not self.error_feedback or self.up is not None
        check_that(
            wanted, f"{path}.error_feedback", True, "needs a type that loses something; set messages.up, e.g. nf4"
        )


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What happens to a client whose loss or update is not finite, or whose update is too large."""

    policy: Literal["fail", "skip", "clip"] = "fail"
    """`fail`: abort and name the client; `skip`: drop the client's update for this round; `clip`: scale an update above `max_norm` down to it, and skip one that is not finite."""
    max_norm: float | None = None
    """Maximum 2-norm of a client's update over all trained parameters; null = no limit. Federated rounds only."""

    def check(self, path: str) -> None:
        norm = self.max_norm
        fits = norm is None or (math.isfinite(norm) and norm > 0)
        check_that(fits, f"{path}.max_norm", norm, "is not a positive number; null allows any")
        way = f"needs {path}.max_norm, the norm to scale updates down to"
        check_that(self.policy != "clip" or norm is not None, f"{path}.policy", self.policy, way)


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Client availability, dropout and stragglers, drawn by the seed; see docs/simulation.md."""

    availability: float | dict[str, list[int]] = 1.0
    """Probability that a client is available in a round, or {client: [1, 0, ...]}, a 0/1 trace per client, repeated cyclically. In all modes the cohort is sampled from the available clients."""
    drop: float = 0.0
    """Probability that a client fails during a round; its work is lost."""
    speeds: float | list[float] | dict[str, float] | None = None
    """Compute speed in tokens per second: one number, a range [min, max] from which each client's speed is drawn log-uniformly, or {client: number}; null = no simulated clock."""
    deadline_s: float | None = None
    """Simulated seconds that the server waits in a round; null = until all clients have finished."""
    late: Literal["drop", "next"] = "drop"
    """Updates after the deadline: `drop` discards them, `next` adds them in the next round, in which the client is not sampled."""

    def check(self, path: str) -> None:
        there = self.availability
        if isinstance(there, dict):
            for client, trace in there.items():
                some = len(trace) > 0 and all(x in (0, 1) for x in trace)
                check_that(some, f"{path}.availability.{client}", trace, "is no list of 0 and 1, one a round")
        else:
            check_that(0 < there <= 1, f"{path}.availability", there, "is outside (0, 1]; 1 = always there")
        check_that(0 <= self.drop <= 1, f"{path}.drop", self.drop, "is outside [0, 1]; 0 = nobody fails")
        given = self.speeds
        speeds = given.values() if isinstance(given, dict) else given if isinstance(given, list) else [given]
        positive = given is None or all(math.isfinite(x) and x > 0 for x in speeds)
        check_that(positive, f"{path}.speeds", given, "is no positive number of tokens a second")
        if isinstance(given, list):
            two = len(given) == 2 and given[0] <= given[1]
            check_that(two, f"{path}.speeds", given, "is not [least, most]")
        if self.deadline_s is not None:
            ok = math.isfinite(self.deadline_s) and self.deadline_s > 0
            check_that(ok, f"{path}.deadline_s", self.deadline_s, "is not a positive number of seconds")
            check_that(given is not None, f"{path}.deadline_s", self.deadline_s, f"needs {path}.speeds")
        else:
            check_that(self.late == "drop", f"{path}.late", self.late, f"needs {path}.deadline_s")


@dataclass(frozen=True, kw_only=True)
class AutoExecutor:
    """Every CUDA device there is, one worker process each where there are several; without any, this process on the CPU."""

    name: Literal["auto"] = "auto"
    workers: int | None = None
    """Number of worker processes on the default devices; null = one per CUDA device, none on the CPU."""
    threads: int | None = None
    """CPU threads of a worker; null = the cores divided by the workers, fixed at the run's first start."""
    hang_s: float | None = 600.0
    """As the pool's; without worker processes it has no effect."""

    def check(self, path: str) -> None:
        _check_number(self.workers, f"{path}.workers")
        _check_number(self.threads, f"{path}.threads")
        _check_hang(self.hang_s, f"{path}.hang_s")


@dataclass(frozen=True, kw_only=True)
class Serial:
    """Everything in this process, on one device."""

    name: Literal["serial"] = "serial"
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto = the first CUDA device, else the CPU."""
    threads: int | None = None
    """CPU threads; null = all cores, fixed at the run's first start."""

    def check(self, path: str) -> None:
        _check_device(self.device, f"{path}.device")
        _check_number(self.threads, f"{path}.threads")


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Worker processes that live for the whole run, each pinned to a device."""

    name: Literal["pool"] = "pool"
    devices: list[str] | Literal["auto"] = "auto"
    """Devices, e.g. [cuda:0, cuda:1] or [cpu]; auto = every CUDA device, else the CPU."""
    workers: int | None = None
    """Worker processes, dealt over the devices in turn; null = one per device."""
    threads: int | None = None
    """CPU threads of a worker; null = the cores divided by the workers, fixed at the run's first start."""
    hang_s: float | None = 600.0
    """Seconds without a sign of life after which a worker that is at work is ended and replaced; null = wait for ever. Signs are: something new to do, each forward and backward pass, scoring batch, generated token, and chunk or record that is copied, added or kept. Not limited: loading the model, and waiting for a turn to add."""

    def check(self, path: str) -> None:
        if self.devices != "auto":
            check_that(len(self.devices) > 0, f"{path}.devices", self.devices, "is empty; give [cpu] or [cuda:0, ...]")
            for i, device in enumerate(self.devices):
                _check_device(device, f"{path}.devices[{i}]")
            if self.workers is not None:
                enough = self.workers >= len(self.devices)
                check_that(
                    enough,
                    f"{path}.workers",
                    self.workers,
                    f"leaves some of the {len(self.devices)} devices without work",
                )
        _check_number(self.workers, f"{path}.workers")
        _check_number(self.threads, f"{path}.threads")
        _check_hang(self.hang_s, f"{path}.hang_s")


def _check_hang(seconds: float | None, path: str) -> None:
    fine = seconds is None or (math.isfinite(seconds) and seconds > 0)
    check_that(fine, path, seconds, "is not a positive number of seconds; null = wait for ever")


def _check_number(count: int | None, path: str) -> None:
    """Of workers or threads: what no machine has is a slip, and starting them would take it down."""
    check_that(count is None or count >= 1, path, count, "is below 1")
    check_that(count is None or count <= _MOST, path, count, f"is above {_MOST}; a core has use for one")


def _check_device(device: str, path: str) -> None:
    known = device == "auto" or re.fullmatch(r"cpu|cuda(:\d+)?", device) is not None
    check_that(known, path, device, "is not a device; use cpu, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Experiment trackers, through accelerate."""

    with_: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=list, metadata={"key": "with"})
    """Trackers that get the metrics of each round, and the figures; each needs its own package."""
    clients: bool = False
    """Log each client's metrics, too; otherwise their mean, minimum and maximum."""

    def check(self, path: str) -> None:
        pass


Adapter = Lora | PTuning | Bottleneck | Prefix | Prompt | Ia3 | Whole | OtherPeft
Data = Headlines | FinancialPhraseBank | Table | Hub | Instructions
PartitionKeys = Iid | Dirichlet | DirichletFedma | ClassCounts | Shards | ByColumn | Quantity | Virtual
Executor = AutoExecutor | Serial | Pool
