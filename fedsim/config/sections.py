"""The sections of an experiment: types and bounds in the annotations, a sentence under each field.

What a bound cannot say is a validator beside its fields. A component is a section and one line in its table.
"""

from __future__ import annotations

import copyreg
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WrapValidator, model_validator

from fedsim import algorithms
from fedsim.core.section import (
    Count,
    Like,
    Natural,
    OneOf,
    Positive,
    Share,
    Text,
    as_given,
    made_of,
    plain,
    section,
    wrong,
)
from fedsim.core.user_code import errors_of, is_user_code, load, read
from fedsim.data.files import Form
from fedsim.data.partitioners import PARTITIONERS

MOST_EXAMPLES = 10**8  # of a model per round: their order is drawn at once and held in memory

Layers = Annotated[list[str], Field(min_length=1)]
NotNegative = Annotated[float, Field(ge=0)]
Seed32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Tokens = Annotated[int, Field(ge=2)]
Trace = Annotated[list[Literal[0, 1]], Field(min_length=1)]
Workers = Annotated[int, Field(ge=1, le=1024)]  # more than any machine has cores is a slip that would take it down


def _with_a_field(template: str) -> str:
    if "{" not in template:
        raise wrong("", template, "has no {field}; name columns in braces")
    return template


def _label_words(labels: Any) -> Any:
    words = list(dict.fromkeys(labels.values())) if isinstance(labels, dict) else labels
    if len(words) < 2:
        raise wrong("", labels, "has fewer than two labels")
    if len(set(words)) < len(words):
        raise wrong("", labels, "names a label twice")
    if any(word.strip() != word or not word for word in (*words, *labels)):
        raise wrong("", labels, "has an empty label, or one with white space around it")
    return labels


def _known_type(name: str) -> str:
    from fedsim.channel.codecs import canonical  # torch comes with it

    try:
        return canonical(name)
    except ValueError as error:
        raise ValueError(str(error)) from None  # a UserError would stand without the key


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise wrong("", device, "is not a device; use cpu, cuda or cuda:N")
    return device


Template = Annotated[str, AfterValidator(_with_a_field)]
DataType = Annotated[str, AfterValidator(_known_type)]
Device = Annotated[str, AfterValidator(_known_device)]


@section
class Model:
    """The base model."""

    path: Text = "tiny"
    """`tiny` (ships with fedsim), a hub id, a transformers folder, a GGUF file, or `package:NAME/FILE` for a file or folder inside an installed package."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Type of the frozen base; what is trained stays float32 (float64 under a float64 base)."""
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """Answer written as text and scored by its likelihood, or a classification head on the last token or the pooled output."""
    base_dropout: bool = False
    """Whether the dropout layers inside the base act in training; an adapter's own dropout is a key of the adapter."""


@section
class _OfPeft:
    @model_validator(mode="after")
    def _check_options(self) -> Any:
        if self.peft:  # a field of each method, since the options differ
            from fedsim.models.adapters import check_peft_options

            check_peft_options(self.name, self.peft, "adapter")
        return self


@section
class Lora(_OfPeft):
    """Low-rank adaptation (Hu et al., 2021), by PEFT."""

    name: Literal["lora"] = "lora"
    r: Count = 8
    """Rank of the update."""
    alpha: Positive = 16.0
    """Scaling: the update is multiplied by alpha / r."""
    dropout: Share = 0.0
    """Dropout on the input of A, in training only."""
    target_modules: Layers | Literal["auto", "all-linear"] = "auto"
    """Leaf names of the layers to adapt; auto = the attention input projections: q, k and v, or the fused one."""
    init: Literal["kaiming", "xavier", "gaussian"] = "kaiming"
    """Initialization of A (B starts at zero): kaiming is PEFT's default, xavier that of the published runs."""
    peft: dict[str, Any] = Field(default_factory=dict)
    """Further options of PEFT's own config class for the method, e.g. {use_dora: true, modules_to_save: [score]}; they hold over the keys above."""


@section
class PTuning(_OfPeft):
    """P-tuning (Liu et al., 2021): virtual tokens made by an MLP prompt encoder, by PEFT."""

    name: Literal["p_tuning"] = "p_tuning"
    num_virtual_tokens: Count = 10
    """Virtual tokens in front of every input."""
    hidden: Count = 1024
    """Width of the prompt encoder's hidden layers."""
    peft: dict[str, Any] = Field(default_factory=dict)
    """Further options of PEFT's own config class for the method, e.g. {encoder_reparameterization_type: LSTM}; they hold over the keys above."""


@section
class Bottleneck:
    """Bottleneck adapters (Houlsby et al., 2019) after the attention's and the MLP's output projection; fedsim's own."""

    name: Literal["adapter"] = "adapter"
    bottleneck: Count = 32
    """Width of the bottleneck."""
    dropout: Share = 0.0
    """Dropout on the adapter's hidden layer, in training only."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """Non-linearity inside the bottleneck."""
    target_modules: Layers | Literal["auto"] = "auto"
    """Leaf names of the layers whose output is adapted; auto = the output projections of attention and MLP."""


@section
class Prefix(_OfPeft):
    """Prefix tuning (Li and Liang, 2021), by PEFT."""

    name: Literal["prefix"] = "prefix"
    num_virtual_tokens: Count = 10
    """Length of the trained key/value prefix of every layer."""
    projection: bool = False
    """Make the prefix by an MLP, as in the paper, or train it directly."""
    hidden: Count = 512
    """Width of that MLP."""
    peft: dict[str, Any] = Field(default_factory=dict)
    """Further options of PEFT's own config class for the method, e.g. {init_weights: false}; they hold over the keys above."""


@section
class Prompt(_OfPeft):
    """Prompt tuning (Lester et al., 2021), by PEFT."""

    name: Literal["prompt"] = "prompt"
    num_virtual_tokens: Count = 10
    """Trained embeddings in front of every input."""
    init_text: Text | None = None
    """Start from the embeddings of this text; null starts from randomly drawn ones."""
    peft: dict[str, Any] = Field(default_factory=dict)
    """Further options of PEFT's own config class for the method, e.g. {prompt_tuning_init: SAMPLE_VOCAB}; they hold over the keys above."""


@section
class Ia3(_OfPeft):
    """IA3 (Liu et al., 2022): trained scales on keys, values and the MLP's inner activations, by PEFT."""

    name: Literal["ia3"] = "ia3"
    target_modules: list[str] | Literal["auto"] = "auto"
    """Leaf names of the layers to scale; auto = PEFT's choice for the architecture."""
    feedforward_modules: list[str] | Literal["auto"] = "auto"
    """Those of them whose input is scaled instead of their output; auto = PEFT's choice."""
    peft: dict[str, Any] = Field(default_factory=dict)
    """Further options of PEFT's own config class for the method, e.g. {modules_to_save: [lm_head]}; they hold over the keys above."""

    @model_validator(mode="after")
    def _check(self) -> Ia3:
        if (self.target_modules == "auto") != (self.feedforward_modules == "auto"):
            raise wrong("feedforward_modules", self.feedforward_modules, "goes with target_modules: give both or none")
        return self


@section
class Whole:
    """Full fine-tuning: every parameter of the base model is trained and exchanged."""

    name: Literal["none"] = "none"


@section
class OtherPeft:
    """Any PEFT method by its PEFT name, with PEFT's own settings as keys.

    The methods above go by their names in capitals, e.g. LORA. A `peft.PeftConfig` given in Python becomes such a section.
    """

    name: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keys of PEFT's config class for the method."""

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens in front of every input."""
        return self.settings.get("num_virtual_tokens") or 0

    @model_validator(mode="after")
    def _check(self) -> OtherPeft:
        from fedsim.models.adapters import check_peft_settings

        check_peft_settings(self.name, self.settings, "adapter")
        return self


@section
class _DataKeys:
    template: Template | None = None
    """Text of one example with {fields}; the last field is the answer of a causal LM. Null = the source's own default."""
    labels: Annotated[list[str], AfterValidator(_label_words)] | None = None
    """Label words in order, which numbers the classes; null = the source's own, or the sorted values of the label column."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Template field -> column of the file, where their names differ, e.g. {sentence: text, label: sentiment}."""
    max_length: Tokens = 128
    """Longest example in tokens, answer included."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to longer ones: cut the prompt from its left (then the answer from its right; a head's text from its right), leave them out, or stop. Special tokens around the text stay."""


@section
class Headlines(_DataKeys):
    """The embedded data set: generated financial headlines with the PhraseBank's class counts."""

    name: Literal["headlines"] = "headlines"
    seed: Natural = 0
    """Seed of the generator."""


@section
class FinancialPhraseBank(_DataKeys):
    """Financial PhraseBank (Malo et al., 2014): `sentence@label` lines, the published shuffle and 80/10/10 cut."""

    name: Literal["financial_phrasebank"] = "financial_phrasebank"
    path: Text
    """The original text file, Sentences_AllAgree.txt of version 1.0 (UTF-8 or ISO-8859-1), or a hub id."""
    shuffle_seed: int = 1234
    """Seed of the one shuffle before the cut, by Python's `random`."""


def _check_held_out(data: Any) -> None:
    """Rows to train and to validate on have to be left; text names a file or a split of its own."""
    if data.validation == 0:
        raise wrong("validation", data.validation, "leaves no row to validate on")
    if sum(share for share in (data.validation, data.test) if not isinstance(share, str)) >= 1:
        raise wrong("test", data.test, "and validation together leave no training rows")


@section
class OwnData(_DataKeys):
    """What a data source in a user's own file takes besides its own keys."""

    labels: Annotated[list[str] | dict[str, str], AfterValidator(_label_words)] | None = None
    """Label words in order, which numbers the classes from 0; or what the label column holds -> label word; null = the sorted values of the label column."""
    validation: Share = 0.1
    """Fraction of the examples to hold out, where the source gives no validation split."""
    test: Share = 0.1
    """Fraction of the examples to hold out, where the source gives no test split; 0 = no test examples."""
    split_seed: int = 0
    """Seed of the shuffle before fractions are cut off."""


@section
class Table(Form, _DataKeys):
    """Your own CSV, TSV, JSON, JSONL or Parquet file; in Python a DataFrame, a `datasets.Dataset` or a `DatasetDict`, too."""

    name: Literal["table"] = "table"
    path: Text
    """A .csv, .tsv, .json, .jsonl or .parquet file; its ending tells the format. In Python examples in memory can stand in its place, and in that of `validation` and `test`."""
    labels: Annotated[list[str] | dict[str, str], AfterValidator(_label_words)] | None = None
    """Label words in order, which numbers the classes from 0; or what the file holds -> label word, e.g. {1: World, 2: Sports}; null = the sorted values of the label column."""
    validation: Text | Share = 0.1
    """A file of its own, or the fraction of `path` to hold out."""
    test: Text | Share = 0.1
    """A file of its own, or the fraction of `path` to hold out; 0 = no test rows."""
    split_seed: int = 0
    """Seed of the shuffle before fractions are cut off."""

    @model_validator(mode="after")
    def _check(self) -> Table:
        _check_held_out(self)
        return self


@section
class Hub(_DataKeys):
    """Any data set that `datasets.load_dataset` opens: a hub id or a local data set folder."""

    name: Literal["hub"] = "hub"
    path: Text
    """A data set id such as org/name, or a folder."""
    subset: str | None = None
    """Configuration name of the data set."""
    labels: Annotated[list[str] | dict[str, str], AfterValidator(_label_words)] | None = None
    """Label words in order, which numbers the classes from 0; or what the data set holds -> label word; null = the data set's own, or the sorted values of the label column."""
    train: str = "train"
    """Split to train on."""
    validation: Text | Share = 0.1
    """Split to validate on, or the fraction of the training split to hold out."""
    test: Text | Share = 0.1
    """Split to test on, or the fraction of the training split to hold out; 0 = no test rows."""
    split_seed: int = 0
    """Seed of the shuffle before fractions are cut off."""

    @model_validator(mode="after")
    def _check(self) -> Hub:
        _check_held_out(self)
        return self


_ROLES = {  # format of a data set -> what `columns` can name in it; of those that are always written alike nothing
    **{"alpaca": (), "dolly": (), "oasst1": ()},
    "prompt_response": ("prompt", "response", "context", "category", "user_id"),
    "messages": ("messages", "category", "user_id"),
}


@section
class Source(Form):
    """One data set of instructions."""

    format: Literal["alpaca", "dolly", "oasst1", "prompt_response", "messages"]
    """Its format, which says what its columns hold."""
    path: Text | Annotated[list[Text], Field(min_length=1)]
    """A file or a hub id, or a list of them."""
    name: Text | None = None
    """Name of its rows in the column `source`; null = the format's."""
    columns: dict[str, str] | None = None
    """Role -> column of the file, where their names differ."""
    subset: Text | None = None
    """Configuration name of a hub data set."""
    split: Text | None = None
    """Split of a hub data set to take."""

    @model_validator(mode="after")
    def _check(self) -> Source:
        takes = ", ".join(_ROLES[self.format]) or "nothing, its columns are always named alike"
        for role, column in (self.columns or {}).items():
            if role not in _ROLES[self.format]:
                raise wrong(f"columns.{role}", column, f"has no use; format {self.format} takes {takes}")
        return self


@section
class Instructions(_DataKeys):
    """Instruction data: Alpaca, Dolly, OASST1, or your own prompts with answers, or chats; each data set cut by itself."""

    name: Literal["instructions"] = "instructions"
    sources: Annotated[list[Annotated[dict[str, Any], Like(Source)]], Field(min_length=1)]
    """Data sets, each {format: alpaca | dolly | oasst1 | prompt_response | messages, path: FILE or hub id, or a list of them}; optional name, columns, of a hub id subset and split, and of a text file header, names, delimiter and encoding, as for a table."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For prompt_response (prompt, response, context) and messages (messages), and category or user_id of both: role -> column of the file, where their names differ."""
    max_length: Tokens | None = None
    """Longest example in tokens, answer included; null = 1024, or what the base takes where that is less."""
    chat_template: bool = False
    """Write prompts and chats by the tokenizer's chat template instead of `template`. One that writes today's date always writes 26 July 2024."""
    turns: Literal["last", "every"] = "last"
    """Which assistant turns of a chat are answers: the last one, or every one, each a row of its own after the turns before it."""
    validation: Share = 0.1
    """Fraction of each data set to validate on, rounded down to whole rows."""
    test: Share = 0.1
    """Fraction of each data set to test on, rounded down to whole rows; 0 = no test rows."""
    validation_rows: Count | None = None
    """At most so many validation rows, of each data set in proportion and the first in its shuffled order; the others are used for nothing. Null = all."""
    test_rows: Natural | None = None
    """The same of the test rows; 0 = none, and the training rows stay as they are."""
    split_seed: Seed32 = 0
    """Seed of the one shuffle of each data set before the cut, as pandas' `sample` draws it."""
    order_seed: Seed32 = 0
    """Seed of the order of instruction and context in a prompt."""
    length_classes: Count = 4
    """Classes of about equal size by characters of prompt and answer, in the column `length`."""

    @model_validator(mode="after")
    def _check(self) -> Instructions:
        if self.labels is not None:
            raise wrong("labels", self.labels, "has no use here: answers are free text")
        if self.template is not None and self.chat_template:
            raise wrong("template", self.template, "and chat_template=true exclude each other; give one")
        _check_held_out(self)
        names = [source.get("name") or source["format"] for source in self.sources]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise wrong(f"sources[{i}].name", name, "names two sources; give each a name of its own")
        roles = {role for s in self.sources if not s.get("columns") for role in _ROLES[s["format"]]}
        for role, column in self.columns.items():
            if role not in roles:
                takes = (
                    "has no use; it is for sources of format prompt_response and messages without columns of their own"
                )
                takes += f", which take: {', '.join(sorted(roles))}" if roles else ""
                raise wrong(f"columns.{role}", column, takes)
        return self


@section
class CohortKeys:
    """Client sampling."""

    size: Count | Literal["all"] = "all"
    """Clients sampled per round, without replacement; or all."""


@section
class LocalWork:
    """Local training: what one client does in one round."""

    steps: Count | None = None
    """Optimizer steps per client and round, each on a full batch; the examples are reshuffled after every pass. Excludes epochs."""
    epochs: Annotated[int, Field(ge=1, le=MOST_EXAMPLES)] | None = None
    """Passes over the client's examples per round; the last batch of a pass may be smaller. 1 if neither steps nor epochs is given."""
    batch_size: Count = 32
    """Examples per optimizer step."""
    micro_batch: Count | None = None
    """Examples per forward and backward pass; null = the whole batch. Changes memory and speed, not the results."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """torch's AdamW or SGD."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 0.01
    """Weight decay of every trained tensor, as torch's optimizer defines it."""
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the two moment estimates."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    momentum: Share = 0.0
    """SGD's momentum."""
    clip: Positive | None = 1.0
    """Maximum global norm of a client's gradient (gradient clipping); null = no clipping."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or a half cosine or a straight line from lr to min_lr at the horizon."""
    warmup: Natural = 0
    """Steps of linear warm-up from zero."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of a cosine or linear schedule, and after it."""
    horizon: Count | None = None
    """Step at which a cosine or linear schedule ends; null = the steps of the whole run (or of the round, with schedule_over: round)."""
    schedule_over: Literal["run", "round"] = "run"
    """`run`: one learning-rate schedule across all rounds; `round`: restart the schedule every round."""
    keep_state: bool = True
    """Whether clients keep their optimizer state between rounds (otherwise it is reset). Local-only and centralized training always keep it."""
    shuffle: bool = True
    """Reshuffle the client's examples before every pass."""
    drop_last: bool = False
    """With epochs: drop the smaller last batch of a pass."""

    @model_validator(mode="after")
    def _check(self) -> LocalWork:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 1)
        if self.steps is not None:
            if self.epochs is not None:
                both = f"and local.epochs={self.epochs} are both given; set one of them to null"
                raise wrong("steps", self.steps, both)
            if self.drop_last:
                raise wrong("drop_last", True, "goes with epochs; work in steps always draws full batches")
            if self.steps * self.batch_size > MOST_EXAMPLES:
                many = f"x batch_size={self.batch_size} are more than {MOST_EXAMPLES} examples per round; lower one of them"
                raise wrong("steps", self.steps, many)
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise wrong("micro_batch", self.micro_batch, f"is above batch_size={self.batch_size}")
        if self.min_lr > self.lr:
            raise wrong("min_lr", self.min_lr, f"is above lr={self.lr}")
        if self.optimizer == "adamw" and self.momentum != 0:
            raise wrong("momentum", self.momentum, "is a key of sgd; adamw takes betas")
        if self.horizon is not None:
            if self.schedule == "constant":
                raise wrong("horizon", self.horizon, "needs local.schedule=cosine or linear")
            if self.horizon <= self.warmup:
                raise wrong("horizon", self.horizon, f"is not beyond warmup={self.warmup}")
        return self


@section
class Central:
    """How the budget of centralized training is matched to federated training."""

    match: Literal["epochs", "steps"] = "epochs"
    """`epochs`: as many examples per round as all sampled clients together; `steps`: as many optimizer steps as one client."""


@functools.cache
def section_of(part: str, name: str, kind: type, *keys: type) -> Any:
    """The section of a component that states its keys by its fields: these, its name, and further keys."""
    text = Annotated[Literal[str(name)], WrapValidator(as_given)]  # a name may carry what a user's file holds
    # By keyword alone, as all keys are: a field without a default may then follow others.
    required = {f.name: f.type for f in fields(kind) if f.default is f.default_factory is MISSING}
    about = {"__annotations__": {"name": text, **required}, "name": name, "of": kind}
    about |= {"__doc__": kind.__doc__, "__module__": kind.__module__}
    made = section(type(kind.__name__, (kind, *keys), about))
    copyreg.pickle(made, lambda held: (_component, (part, plain(held))))
    return made


def _component(part: str, keys: Mapping[str, Any]) -> Any:
    if not is_user_code(keys["name"]):
        return ALGORITHMS[keys["name"]](**keys)
    return _IN_FILES[part](keys)


def _in_file(part: str, base: type | None = None, *more: type) -> Callable[[Mapping[str, Any]], Any]:
    """Finds the section of a component in a user's file, whose name is `FILE.py:NAME`; None for another name."""

    def find(keys: Mapping[str, Any]) -> Any:
        if not is_user_code(keys["name"]):
            return None
        code = read(keys["name"], f"{part}.name")
        kind = load(code, base, f"{part}.name")
        with errors_of(code, f"{part}.name"):
            made = section_of(part, code, kind, *more)
            return made_of(made, {key: value for key, value in keys.items() if key != "name"}, part)

    return find


def algorithm_of(held: Any) -> algorithms.Algorithm:
    """The algorithm that a section describes."""
    kind = type(held).of
    return kind(**{f.name: getattr(held, f.name) for f in fields(kind)})


FedAvgKeys: Any = section_of("algorithm", "fedavg", algorithms.ALGORITHMS["fedavg"])


@section
class Best:
    """How the best model is selected on the validation examples."""

    metric: Literal["accuracy", "loss", "exact_match", "macro_f1", "perplexity"] | None = None
    """Validation metric; null = accuracy where there are label words or a head, else loss."""
    mode: Literal["max", "min"] | None = None
    """Whether a higher or a lower value is better; null = min for loss and perplexity, max otherwise."""


@section
class Checkpoint:
    """How often the state of the run is saved."""

    every: Count = 1
    """Rounds between two checkpoints; a crash loses at most this many rounds."""
    keep: Count = 2
    """Number of checkpoints kept; older ones are deleted."""
    shard_mb: Count = 1024
    """Maximum size of a safetensors file in a checkpoint or an exported full model, in MiB; a larger tensor gets a file of its own."""


@section
class Evaluate:
    """When and how models are scored on the validation rows."""

    every_steps: Count | None = None
    """Score a client inside a round after every so many of its optimiser steps since the start; null = never inside."""
    every_rounds: Count = 1
    """Evaluate every N rounds, and always after the last."""
    clients: bool = True
    """Score the clients of a federated round just before they are merged, or the merged model alone."""
    batch_size: Count = 64
    """Rows of a scoring batch."""
    generate: bool = False
    """Also generate the answer greedily and count exact matches (causal LM)."""
    max_new_tokens: int = Field(32, ge=1, le=1 << 16)
    """Longest generated answer in tokens."""
    max_examples: Count | None = None
    """Evaluate on at most this many validation examples: a random subset, the same for every model, round and seed; null = all. Test scores are always of all test examples."""


@section
class Training:
    """How clients share a device."""

    lanes: Count | Literal["auto", "measure"] = "auto"
    """Clients trained side by side in one forward and backward pass. auto = by the sizes of the experiment and the base and the kind of device, the same wherever it runs; measure = timed once, at the run's first start, so another start may choose otherwise, and its last bits differ; 1 = one after another, PEFT's own model in padded batches."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Compute activations a second time in the backward pass instead of keeping them; auto = where one lane would not fit otherwise."""

    packing: bool = False
    """Where the whole model is trained: rows lie end to end without padding, each attending to itself alone, as many a pass as fit into local.micro_batch x data.max_length tokens. Adapters in lanes are always trained so. Refused for bases whose layers do not take rows so, GPT-Neo among them."""
    master_weights: bool = True
    """Where the whole model is trained under a 16-bit model.dtype: weights, gradients and moments in float32, computing in 16 bits; false = everything in 16 bits, in half the memory. Sums over clients are float32 either way."""


@section
class Aggregation:
    """How updates are summed; the results do not depend on it."""

    chunk_mb: Count = 16
    """Parameters that are summed, encoded or saved at a time, in MiB of float32; a round needs this much memory besides the global parameters and their running sum."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the global parameters and the running sum are kept: auto = on the training device; cpu = in host memory, which leaves device memory to training; cuda = as auto, but an error without a GPU."""


@section
class Messages:
    """Compression of what server and clients send; training and aggregation stay in full precision."""

    up: DataType | None = None
    """Data type of a client's update: fp32, fp16, bf16, blockwise8 (8 bits per value) or nf4 (4 bits); null = no conversion."""
    down: DataType | None = None
    """Data type of the global parameters that a client receives and starts from; same values as `up`."""
    error_feedback: bool = False
    """Error feedback: each client keeps the compression error of its update and adds it to its next one."""

    @model_validator(mode="after")
    def _check(self) -> Messages:
        if self.error_feedback and self.up is None:
            raise wrong("error_feedback", True, "needs a type that loses something; set messages.up, e.g. nf4")
        return self


@section
class Faults:
    """What happens to a client whose loss or update is not finite, or whose update is too large."""

    policy: Literal["fail", "skip", "clip"] = "fail"
    """`fail`: abort and name the client; `skip`: drop the client's update for this round; `clip`: scale an update above `max_norm` down to it, and skip one that is not finite."""
    max_norm: Positive | None = None
    """Maximum 2-norm of a client's update over all trained parameters; null = no limit. Federated rounds only."""

    @model_validator(mode="after")
    def _check(self) -> Faults:
        if self.policy == "clip" and self.max_norm is None:
            raise wrong("policy", "clip", "needs faults.max_norm, the norm to scale updates down to")
        return self


@section
class Simulation:
    """Client availability, dropout and stragglers, drawn by the seed; see docs/simulation.md."""

    availability: Annotated[float, Field(gt=0, le=1)] | dict[str, Trace] = 1.0
    """Probability that a client is available in a round, or {client: [1, 0, ...]}, a 0/1 trace per client, repeated cyclically. In all modes the cohort is sampled from the available clients."""
    drop: float = Field(0.0, ge=0, le=1)
    """Probability that a client fails during a round; its work is lost."""
    speeds: Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] | dict[str, Positive] | None = None
    """Compute speed in tokens per second: one number, a range [min, max] from which each client's speed is drawn log-uniformly, or {client: number}; null = no simulated clock."""
    deadline_s: Positive | None = None
    """Simulated seconds that the server waits in a round; null = until all clients have finished."""
    late: Literal["drop", "next"] = "drop"
    """Updates after the deadline: `drop` discards them, `next` adds them in the next round, in which the client is not sampled."""

    @model_validator(mode="after")
    def _check(self) -> Simulation:
        if isinstance(self.speeds, list) and self.speeds[0] > self.speeds[1]:
            raise wrong("speeds", self.speeds, "is not [least, most]")
        if self.deadline_s is not None and self.speeds is None:
            raise wrong("deadline_s", self.deadline_s, "needs simulation.speeds")
        if self.late != "drop" and self.deadline_s is None:
            raise wrong("late", self.late, "needs simulation.deadline_s")
        return self


@section
class AutoExecutor:
    """Every CUDA device there is, one worker process each where there are several; without any, this process on the CPU."""

    name: Literal["auto"] = "auto"
    workers: Workers | None = None
    """Number of worker processes on the default devices; null = one per CUDA device, none on the CPU."""
    threads: Workers | None = None
    """CPU threads of a worker; null = the cores divided by the workers, fixed at the run's first start."""
    hang_s: Positive | None = 600.0
    """As the pool's; null = wait for ever. Without worker processes it has no effect."""


@section
class Serial:
    """Everything in this process, on one device."""

    name: Literal["serial"] = "serial"
    device: Device = "auto"
    """cpu, cuda, cuda:1, ...; auto = the first CUDA device, else the CPU."""
    threads: Workers | None = None
    """CPU threads; null = all cores, fixed at the run's first start."""


@section
class Pool:
    """Worker processes that live for the whole run, each pinned to a device."""

    name: Literal["pool"] = "pool"
    devices: Annotated[list[Device], Field(min_length=1)] | Literal["auto"] = "auto"
    """Devices, e.g. [cuda:0, cuda:1] or [cpu]; auto = every CUDA device, else the CPU."""
    workers: Workers | None = None
    """Worker processes, dealt over the devices in turn; null = one per device."""
    threads: Workers | None = None
    """CPU threads of a worker; null = the cores divided by the workers, fixed at the run's first start."""
    hang_s: Positive | None = 600.0
    """Seconds without a sign of life after which a worker that is at work is ended and replaced; null = wait for ever. Signs are: something new to do, each forward and backward pass, scoring batch, generated token, and chunk or record that is copied, added or kept. Not limited: loading the model, and waiting for a turn to add."""

    @model_validator(mode="after")
    def _check(self) -> Pool:
        if self.devices != "auto" and self.workers is not None and self.workers < len(self.devices):
            few = f"leaves some of the {len(self.devices)} devices without work"
            raise wrong("workers", self.workers, few)
        return self


@section
class Tracking:
    """Experiment trackers, through accelerate."""

    with_: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list, alias="with")
    """Trackers that get the metrics of each round, and the figures; each needs its own package."""
    clients: bool = False
    """Log each client's metrics, too; otherwise their mean, minimum and maximum."""


ADAPTERS = {
    "lora": Lora,
    "p_tuning": PTuning,
    "adapter": Bottleneck,
    "prefix": Prefix,
    "prompt": Prompt,
    "ia3": Ia3,
    "none": Whole,
}
DATA = {
    "headlines": Headlines,
    "financial_phrasebank": FinancialPhraseBank,
    "table": Table,
    "hub": Hub,
    "instructions": Instructions,
}
ALGORITHMS = {name: section_of("algorithm", name, kind) for name, kind in algorithms.ALGORITHMS.items()}
EXECUTORS = {"auto": AutoExecutor, "serial": Serial, "pool": Pool}

Adapter = Annotated[
    Lora | PTuning | Bottleneck | Prefix | Prompt | Ia3 | Whole | OtherPeft, OneOf(ADAPTERS, other=OtherPeft)
]
_IN_FILES = {
    "algorithm": _in_file("algorithm", algorithms.Algorithm),
    "partition": _in_file("partition"),
    "data": _in_file("data", None, OwnData),
}
Data = Annotated[Any, OneOf(DATA, find=_IN_FILES["data"])]
Partitioner = Annotated[Any, OneOf(PARTITIONERS, find=_IN_FILES["partition"])]
Algorithm = Annotated[Any, OneOf(ALGORITHMS, default="fedavg", find=_IN_FILES["algorithm"])]
Executor = Annotated[AutoExecutor | Serial | Pool, OneOf(EXECUTORS, default="auto")]
