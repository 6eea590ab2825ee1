"""The typed config: YAML and `key=value` overrides in, `Experiment` out, and the resolved config back to YAML.

Every section is a frozen dataclass with a sentence under each field. Sections that hold one of several components
(`adapter`, `data`, `partition`, `algorithm`, `executor`) are chosen by their `name`; each component takes its own keys.
What a user wrote wrongly raises `UserError`: one line with the full key path, the value and the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from fedsim.errors import UserError

_NOT_IN_ID = ("rounds", "results", "executor", "tracking", "checkpoint")
_PATHS = (("model", "path"), ("data", "path"), ("data", "validation"), ("data", "test"), ("results",))


def _check(ok: bool, path: str, value: Any, problem: str) -> None:
    if not ok:
        raise UserError(f"{path}: {value!r} {problem}")


# ---------------------------------------------------------------------------------------------------- sections


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
        _check(bool(self.path), f"{path}.path", self.path, "is empty; give a hub id, a folder, a GGUF file or tiny")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation (Hu et al., 2021), by PEFT."""

    name: Literal["lora"] = "lora"
    r: int = 8
    """Rank of the update."""
    alpha: float = 16
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout on the input of A, in training only."""
    target_modules: list[str] | Literal["auto", "all-linear"] = "auto"
    """Leaf names of the layers to adapt; auto = the attention input projections: q, k and v, or the fused one."""
    init: Literal["kaiming", "xavier", "gaussian"] = "kaiming"
    """How A starts (B starts at zero): kaiming is PEFT's default, xavier the one of the published runs."""

    def check(self, path: str) -> None:
        _check(self.r >= 1, f"{path}.r", self.r, "is not a rank; give 1 or more")
        _check(self.alpha > 0, f"{path}.alpha", self.alpha, "is not positive; r or 2 r are usual")
        _check(0 <= self.dropout < 1, f"{path}.dropout", self.dropout, "is outside [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PTuning:
    """P-tuning (Liu et al., 2021): virtual tokens made by an MLP prompt encoder, by PEFT."""

    name: Literal["p_tuning"] = "p_tuning"
    num_virtual_tokens: int = 10
    """Virtual tokens in front of every input."""
    hidden: int = 1024
    """Width of the prompt encoder's hidden layers."""

    def check(self, path: str) -> None:
        _check(self.num_virtual_tokens >= 1, f"{path}.num_virtual_tokens", self.num_virtual_tokens, "is below 1")
        _check(self.hidden >= 1, f"{path}.hidden", self.hidden, "is below 1")


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
        _check(self.bottleneck >= 1, f"{path}.bottleneck", self.bottleneck, "is below 1")
        _check(0 <= self.dropout < 1, f"{path}.dropout", self.dropout, "is outside [0, 1)")


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

    def check(self, path: str) -> None:
        _check(self.num_virtual_tokens >= 1, f"{path}.num_virtual_tokens", self.num_virtual_tokens, "is below 1")
        _check(self.hidden >= 1, f"{path}.hidden", self.hidden, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompt tuning (Lester et al., 2021), by PEFT."""

    name: Literal["prompt"] = "prompt"
    num_virtual_tokens: int = 10
    """Trained embeddings in front of every input."""
    init_text: str | None = None
    """Start from the embeddings of this text; null starts from randomly drawn ones."""

    def check(self, path: str) -> None:
        _check(self.num_virtual_tokens >= 1, f"{path}.num_virtual_tokens", self.num_virtual_tokens, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Ia3:
    """IA3 (Liu et al., 2022): trained scales on keys, values and the MLP's inner activations, by PEFT."""

    name: Literal["ia3"] = "ia3"
    target_modules: list[str] | Literal["auto"] = "auto"
    """Leaf names of the layers to scale; auto = PEFT's choice for the architecture."""
    feedforward_modules: list[str] | Literal["auto"] = "auto"
    """Those of them whose input is scaled instead of their output; auto = PEFT's choice."""

    def check(self, path: str) -> None:
        both = (self.target_modules == "auto") == (self.feedforward_modules == "auto")
        _check(
            both, f"{path}.feedforward_modules", self.feedforward_modules, "goes with target_modules: give both or none"
        )


@dataclass(frozen=True, kw_only=True)
class Whole:
    """No adapter: every parameter of the base is trained and exchanged."""

    name: Literal["none"] = "none"

    def check(self, path: str) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class OtherPeft:
    """Any other PEFT method by its PEFT name, with PEFT's own settings as keys."""

    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of PEFT's config class for the method."""

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
    """What happens to longer ones: cut the prompt from its left (then the answer from its right), leave them out, or stop."""

    def check(self, path: str) -> None:
        _check(self.max_length >= 2, f"{path}.max_length", self.max_length, "is below 2 tokens")
        if self.template is not None:
            _check("{" in self.template, f"{path}.template", self.template, "has no {field}; name columns in braces")
        if self.labels is not None:
            _check(len(self.labels) >= 2, f"{path}.labels", self.labels, "has fewer than two labels")
            _check(len(set(self.labels)) == len(self.labels), f"{path}.labels", self.labels, "names a label twice")


@dataclass(frozen=True, kw_only=True)
class Headlines(_DataKeys):
    """The embedded data set: generated financial headlines with the PhraseBank's class counts."""

    name: Literal["headlines"] = "headlines"
    seed: int = 0
    """Seed of the generator."""

    def check(self, path: str) -> None:
        super().check(path)
        _check(self.seed >= 0, f"{path}.seed", self.seed, "is negative")


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
        way = "is empty; give the path of Sentences_AllAgree.txt from the Financial PhraseBank v1.0, or a hub id"
        _check(bool(self.path), f"{path}.path", self.path, way)


@dataclass(frozen=True, kw_only=True)
class Table(_DataKeys):
    """Your own CSV, TSV, JSON, JSONL or Parquet file."""

    name: Literal["table"] = "table"
    path: str = ""
    """The file; its ending tells the format."""
    validation: str | float = 0.1
    """A file of its own, or the fraction of `path` to hold out."""
    test: str | float = 0.1
    """A file of its own, or the fraction of `path` to hold out; 0 = no test rows."""
    split_seed: int = 0
    """Seed of the shuffle before fractions are cut off."""

    def check(self, path: str) -> None:
        super().check(path)
        _check(
            bool(self.path), f"{path}.path", self.path, "is empty; give a .csv, .tsv, .json, .jsonl or .parquet file"
        )
        held = 0.0
        for key in ("validation", "test"):
            value = getattr(self, key)
            if not isinstance(value, str):
                _check(0 <= value < 1, f"{path}.{key}", value, "is neither a file nor a fraction in [0, 1)")
                held += value
        _check(self.validation != 0, f"{path}.validation", self.validation, "leaves no row to validate on")
        _check(held < 1, f"{path}.test", self.test, "and validation together leave no training rows")


@dataclass(frozen=True, kw_only=True)
class Hub(_DataKeys):
    """Any data set that `datasets.load_dataset` opens: a hub id or a local data set folder."""

    name: Literal["hub"] = "hub"
    path: str = ""
    """The id or folder."""
    subset: str | None = None
    """Configuration name of the data set."""
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
        _check(bool(self.path), f"{path}.path", self.path, "is empty; give a data set id such as org/name")
        for key in ("validation", "test"):
            value = getattr(self, key)
            if not isinstance(value, str):
                _check(0 <= value < 1, f"{path}.{key}", value, "is neither a split's name nor a fraction in [0, 1)")
        _check(self.validation != 0, f"{path}.validation", self.validation, "leaves no row to validate on")


@dataclass(frozen=True, kw_only=True)
class _Clients:
    num_clients: int = 3
    """Number of clients."""

    def check(self, path: str) -> None:
        _check(self.num_clients >= 1, f"{path}.num_clients", self.num_clients, "is below 1")


@dataclass(frozen=True, kw_only=True)
class _ByClass(_Clients):
    by: str | None = None
    """Column whose values are the classes to divide by; null = the label."""


@dataclass(frozen=True, kw_only=True)
class Iid(_Clients):
    """Rows dealt at random, sizes equal to within one."""

    name: Literal["iid"] = "iid"


@dataclass(frozen=True, kw_only=True)
class _Dirichlet(_ByClass):
    alpha: float = 1.0
    """Concentration: small = each class on few clients, large = every client alike."""
    min_rows: int = 10
    """Fewest rows a client may end with; a draw below it is drawn again."""
    max_redraws: int = 100
    """Draws before giving up or repairing."""
    repair: bool = False
    """Take the best draw and move rows from the largest clients to those below `min_rows`, instead of failing."""

    def check(self, path: str) -> None:
        super().check(path)
        positive = math.isfinite(self.alpha) and self.alpha > 0
        _check(positive, f"{path}.alpha", self.alpha, "is not a positive number; 0.1 is very uneven, 100 nearly even")
        _check(self.min_rows >= 0, f"{path}.min_rows", self.min_rows, "is negative")
        _check(self.max_redraws >= 1, f"{path}.max_redraws", self.max_redraws, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Dirichlet(_Dirichlet):
    """Each class divided over the clients by Dirichlet proportions, without a cap."""

    name: Literal["dirichlet"] = "dirichlet"


@dataclass(frozen=True, kw_only=True)
class DirichletFedma(_Dirichlet):
    """The published sampler (FedMA, NVFlare, FedML): a client that holds N/K rows drops out of a class's draw."""

    name: Literal["dirichlet_fedma"] = "dirichlet_fedma"


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """Explicit rows per class and client, drawn by the seed."""

    name: Literal["class_counts"] = "class_counts"
    counts: list[list[int]] = field(default_factory=list)
    """counts[client][class], classes in the order of `data.labels`."""
    by: str | None = None
    """Column whose values are the classes; null = the label."""

    def check(self, path: str) -> None:
        _check(
            len(self.counts) > 0,
            f"{path}.counts",
            self.counts,
            "is empty; give one list of rows per class for each client",
        )
        same = len({len(row) for row in self.counts}) == 1
        _check(
            same, f"{path}.counts", self.counts, "has rows of different length; each client needs one count per class"
        )
        _check(min(min(r) for r in self.counts if r) >= 0, f"{path}.counts", self.counts, "has a negative count")


@dataclass(frozen=True, kw_only=True)
class Shards(_ByClass):
    """Each client gets rows of at most s classes."""

    name: Literal["shards"] = "shards"
    classes_per_client: int = 2
    """s, the most classes a client holds."""

    def check(self, path: str) -> None:
        super().check(path)
        _check(self.classes_per_client >= 1, f"{path}.classes_per_client", self.classes_per_client, "is below 1")


@dataclass(frozen=True, kw_only=True)
class ByColumn:
    """One client per value of a column: natural ids such as users, sites or sources."""

    name: Literal["by_column"] = "by_column"
    column: str = ""
    """The column."""
    min_rows: int = 1
    """Fewest rows of a client; a value with fewer is an error, since every row belongs to someone."""

    def check(self, path: str) -> None:
        _check(
            bool(self.column), f"{path}.column", self.column, "is empty; name the column that holds the clients' ids"
        )
        _check(self.min_rows >= 1, f"{path}.min_rows", self.min_rows, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Quantity(_Clients):
    """Random rows, sizes by a power law."""

    name: Literal["quantity"] = "quantity"
    exponent: float = 1.0
    """The k-th largest client is proportional to k to the power of minus this; 0 = equal sizes."""
    min_rows: int = 10
    """Fewest rows of a client."""

    def check(self, path: str) -> None:
        super().check(path)
        _check(
            math.isfinite(self.exponent) and self.exponent >= 0,
            f"{path}.exponent",
            self.exponent,
            "is not a number >= 0",
        )
        _check(self.min_rows >= 0, f"{path}.min_rows", self.min_rows, "is negative")


@dataclass(frozen=True, kw_only=True)
class CohortKeys:
    """Who takes part in a round."""

    size: int | Literal["all"] = "all"
    """Clients drawn for each round, without repetition, or all of them."""

    def check(self, path: str) -> None:
        _check(self.size == "all" or self.size >= 1, f"{path}.size", self.size, "is below 1; give a number or all")


@dataclass(frozen=True, kw_only=True)
class LocalWork:
    """What one client does in one round."""

    steps: int | None = None
    """Optimiser steps a round; full batches from an endless stream of reshuffled passes. Not together with epochs."""
    epochs: int | None = None
    """Passes over the client's rows a round; the last batch of a pass may be short. One pass where neither is given."""
    batch_size: int = 32
    """Rows of an optimiser step."""
    micro_batch: int | None = None
    """Rows in one forward and backward pass; null = the whole batch. Changes memory and speed, not the numbers."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """torch's AdamW or SGD."""
    lr: float = 1e-3
    """Learning rate at the top of the schedule."""
    weight_decay: float = 0.01
    """Decay of every trained tensor, as torch's optimiser defines it."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the two moments."""
    eps: float = 1e-8
    """AdamW's term in the denominator."""
    momentum: float = 0.0
    """SGD's momentum."""
    clip: float | None = 1.0
    """Largest global norm of a client's gradient; null = no clipping."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or half a cosine from lr to min_lr at the horizon."""
    warmup: int = 0
    """Steps of linear warm-up from zero."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine and after it."""
    horizon: int | None = None
    """Step at which the cosine ends; null = the steps of the whole run (or of the round, with schedule_over: round)."""
    schedule_over: Literal["run", "round"] = "run"
    """One schedule over the whole run, in which a round begins where (round - 1) x its steps a round lead, or one every round."""
    keep_state: bool = True
    """A client keeps its optimiser's moments from round to round, or starts each round fresh. Alone and central always keep them."""
    shuffle: bool = True
    """Reshuffle the client's rows before every pass."""
    drop_last: bool = False
    """With epochs: leave the short last batch of a pass out."""

    def check(self, path: str) -> None:
        if self.steps is not None:
            way = f"and {path}.epochs={self.epochs} are both given; set one of them to null"
            _check(self.epochs is None, f"{path}.steps", self.steps, way)
            _check(self.steps >= 1, f"{path}.steps", self.steps, "is below 1")
            _check(
                not self.drop_last,
                f"{path}.drop_last",
                True,
                "goes with epochs; work in steps always draws full batches",
            )
        if self.epochs is not None:
            _check(self.epochs >= 1, f"{path}.epochs", self.epochs, "is below 1")
        _check(self.batch_size >= 1, f"{path}.batch_size", self.batch_size, "is below 1")
        if self.micro_batch is not None:
            fits = 1 <= self.micro_batch <= self.batch_size
            _check(fits, f"{path}.micro_batch", self.micro_batch, f"is outside 1 to batch_size={self.batch_size}")
        _check(math.isfinite(self.lr) and self.lr > 0, f"{path}.lr", self.lr, "is not a positive number")
        _check(0 <= self.min_lr <= self.lr, f"{path}.min_lr", self.min_lr, f"is outside 0 to lr={self.lr}")
        _check(self.weight_decay >= 0, f"{path}.weight_decay", self.weight_decay, "is negative")
        two = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        _check(two, f"{path}.betas", self.betas, "is not two numbers in [0, 1)")
        _check(self.eps > 0, f"{path}.eps", self.eps, "is not positive")
        _check(0 <= self.momentum < 1, f"{path}.momentum", self.momentum, "is outside [0, 1)")
        if self.optimizer == "adamw":
            _check(self.momentum == 0, f"{path}.momentum", self.momentum, "is a key of sgd; adamw takes betas")
        _check(
            self.clip is None or self.clip > 0, f"{path}.clip", self.clip, "is not positive; null turns clipping off"
        )
        _check(self.warmup >= 0, f"{path}.warmup", self.warmup, "is negative")
        if self.horizon is not None:
            _check(self.schedule == "cosine", f"{path}.horizon", self.horizon, f"goes with {path}.schedule=cosine")
            _check(self.horizon > self.warmup, f"{path}.horizon", self.horizon, f"is not beyond warmup={self.warmup}")


@dataclass(frozen=True, kw_only=True)
class Central:
    """How the centralised run is matched to the federated one."""

    match: Literal["epochs", "steps"] = "epochs"
    """As many rows a round as all sites of the cohort together (the same passes over the data), or as many steps as one site."""

    def check(self, path: str) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class FedAvgKeys:
    """Federated averaging (McMahan et al., 2017)."""

    name: Literal["fedavg"] = "fedavg"
    weights: Literal["samples", "steps", "uniform"] = "samples"
    """A client's weight in the mean: its rows, the optimiser steps it did in the round, or one."""

    def check(self, path: str) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Best:
    """How the best model is chosen, on validation rows."""

    metric: Literal["accuracy", "loss", "exact_match"] | None = None
    """Validation metric; null = accuracy where there are label words or a head, else loss."""
    mode: Literal["max", "min"] | None = None
    """Whether more or less is better; null = min for loss, max otherwise."""

    def check(self, path: str) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """How often the state of the run is kept."""

    every: int = 1
    """Rounds between two checkpoints; at most this many rounds are lost."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""

    def check(self, path: str) -> None:
        _check(self.every >= 1, f"{path}.every", self.every, "is below 1")
        _check(self.keep >= 1, f"{path}.keep", self.keep, "is below 1")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """When and how models are scored on the validation rows."""

    every_steps: int | None = None
    """Score a client inside a round after every so many of its optimiser steps since the start; null = never inside."""
    every_rounds: int = 1
    """Score at every so manieth merge, and always at the last."""
    batch_size: int = 64
    """Rows of a scoring batch."""
    generate: bool = False
    """Also generate the answer greedily and count exact matches (causal LM)."""
    max_new_tokens: int = 32
    """Longest generated answer in tokens."""

    def check(self, path: str) -> None:
        _check(self.every_steps is None or self.every_steps >= 1, f"{path}.every_steps", self.every_steps, "is below 1")
        for key in ("every_rounds", "batch_size", "max_new_tokens"):
            _check(getattr(self, key) >= 1, f"{path}.{key}", getattr(self, key), "is below 1")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How clients share a device."""

    lanes: int | Literal["auto"] = "auto"
    """Clients trained in one pass; this version trains one client at a time, and auto means just that."""

    def check(self, path: str) -> None:
        one = self.lanes in ("auto", 1)
        _check(
            one,
            f"{path}.lanes",
            self.lanes,
            "is not available: this version trains one client at a time; use 1 or auto",
        )


@dataclass(frozen=True, kw_only=True)
class AutoExecutor:
    """Every CUDA device there is, one worker process each where there are several; without any, this process on the CPU."""

    name: Literal["auto"] = "auto"
    workers: int | None = None
    """That many worker processes on the default devices; null = as described."""
    threads: int | None = None
    """CPU threads of a worker; null = the cores divided by the workers, fixed at the run's first start."""

    def check(self, path: str) -> None:
        _check(self.workers is None or self.workers >= 1, f"{path}.workers", self.workers, "is below 1")
        _check(self.threads is None or self.threads >= 1, f"{path}.threads", self.threads, "is below 1")


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
        _check(self.threads is None or self.threads >= 1, f"{path}.threads", self.threads, "is below 1")


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

    def check(self, path: str) -> None:
        if self.devices != "auto":
            _check(len(self.devices) > 0, f"{path}.devices", self.devices, "is empty; give [cpu] or [cuda:0, ...]")
            for i, device in enumerate(self.devices):
                _check_device(device, f"{path}.devices[{i}]")
            if self.workers is not None:
                enough = self.workers >= len(self.devices)
                _check(
                    enough,
                    f"{path}.workers",
                    self.workers,
                    f"leaves some of the {len(self.devices)} devices without work",
                )
        _check(self.workers is None or self.workers >= 1, f"{path}.workers", self.workers, "is below 1")
        _check(self.threads is None or self.threads >= 1, f"{path}.threads", self.threads, "is below 1")


def _check_device(device: str, path: str) -> None:
    known = device == "auto" or re.fullmatch(r"cpu|cuda(:\d+)?", device) is not None
    _check(known, path, device, "is not a device; use cpu, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Experiment trackers, through accelerate."""

    with_: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=list, metadata={"key": "with"})
    """Trackers that get every metrics row; each needs its own package."""

    def check(self, path: str) -> None:
        pass


Adapter = Lora | PTuning | Bottleneck | Prefix | Prompt | Ia3 | Whole | OtherPeft
Data = Headlines | FinancialPhraseBank | Table | Hub
PartitionKeys = Iid | Dirichlet | DirichletFedma | ClassCounts | Shards | ByColumn | Quantity
Executor = AutoExecutor | Serial | Pool


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment: what goes in. Sections may be given as dataclasses or as plain dicts.

    Raises:
        UserError: for an unknown key, a wrong type or an impossible value, with the key's full path.
    """

    name: str = "experiment"
    """Folder of its runs under `results`."""
    seed: int = 0
    """Every random draw is a function of it."""
    modes: list[Literal["local", "federated", "central"]] = field(
        default_factory=lambda: ["local", "federated", "central"]
    )
    """Which of the three curves to make: each site alone, federated, centralised."""
    rounds: int = 5
    """Federated rounds; the other modes do the same work, cut at the same places."""
    results: str = "results"
    """Root of the run folders."""
    model: Model = field(default_factory=Model)
    """The base model."""
    adapter: Adapter = field(default_factory=Lora)
    """What is trained."""
    data: Data = field(default_factory=Headlines)
    """The rows."""
    partition: PartitionKeys = field(default_factory=Iid)
    """Which client holds which rows."""
    cohort: CohortKeys = field(default_factory=CohortKeys)
    """Who takes part in a round."""
    local: LocalWork = field(default_factory=LocalWork)
    """What a client does in a round."""
    central: Central = field(default_factory=Central)
    """How the centralised run is matched."""
    algorithm: FedAvgKeys = field(default_factory=FedAvgKeys)
    """How updates become the next global model."""
    best: Best = field(default_factory=Best)
    """How the best model is chosen."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """How often state is kept."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """When and how models are scored."""
    training: Training = field(default_factory=Training)
    """How clients share a device."""
    executor: Executor = field(default_factory=AutoExecutor)
    """Where the work runs."""
    tracking: Tracking = field(default_factory=Tracking)
    """Trackers."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = _convert(_hints(Experiment)[f.name], _plain(getattr(self, f.name)), f.name)
            object.__setattr__(self, f.name, value)
        _check(
            re.fullmatch(r"[\w.+-]*\w[\w.+-]*", self.name) is not None,
            "name",
            self.name,
            "is not a folder's name: use letters, digits, . _ + -",
        )
        _check(self.seed >= 0, "seed", self.seed, "is negative")
        _check(self.rounds >= 1, "rounds", self.rounds, "is below 1")
        _check(len(self.modes) > 0, "modes", self.modes, "is empty; name some of local, federated, central")
        _check(len(set(self.modes)) == len(self.modes), "modes", self.modes, "names a mode twice")
        for f in dataclasses.fields(self):
            section = getattr(self, f.name)
            if dataclasses.is_dataclass(section):
                section.check(f.name)
        if self.local.steps is None and self.local.epochs is None:
            object.__setattr__(self, "local", dataclasses.replace(self.local, epochs=1))
        self._check_together()

    def _check_together(self) -> None:
        if self.model.task == "sequence_classification":
            _check(
                not self.evaluate.generate,
                "evaluate.generate",
                True,
                "goes with model.task=causal_lm; a head writes no text",
            )
        if self.adapter.name == "none":
            way = "cannot train a whole model without loss scaling; use bfloat16 or float32"
            _check(self.model.dtype != "float16", "model.dtype", self.model.dtype, way)
        if self.best.metric == "exact_match":
            _check(self.evaluate.generate, "best.metric", "exact_match", "needs evaluate.generate=true")

    @classmethod
    def load(cls, file: str | Path, overrides: Sequence[str] = ()) -> Experiment:
        """The experiment of a YAML file.

        Args:
            file: the YAML file.
            overrides: `key=value` strings, applied in order, as on the command line. One that changes a section's
                `name`, or the whole section, drops the keys that the file gave that section.

        Raises:
            UserError: for a missing file, bad YAML, an unknown key, a wrong type or an impossible value.
        """
        path = Path(file)
        tree = _read_yaml(path)
        for override in overrides:
            _override(tree, override)
        tree = _interpolate(tree)
        _absolute_paths(tree, path.resolve().parent)
        return cls.from_dict(tree)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Experiment:
        """The experiment of a nested dict, as YAML gives it."""
        _check_keys(cls, tree, "")
        return cls(**tree)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, lists and scalars; `Experiment.from_dict` takes them back."""
        return _plain(self)

    def to_yaml(self) -> str:
        """The resolved config; `fedsim run` takes it as it is."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)

    def identity(self) -> dict[str, Any]:
        """The part of the config that the numbers depend on: the run's id hashes it, with content hashes for paths."""
        return {key: value for key, value in self.to_dict().items() if key not in _NOT_IN_ID}


# ------------------------------------------------------------------------------------- from plain values to types


def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _key(f: dataclasses.Field) -> str:
    return f.metadata.get("key", f.name)


def keys_of(cls: type) -> list[str]:
    """The keys a section takes, as the user writes them."""
    return [_key(f) for f in dataclasses.fields(cls)]


def _plain(value: Any) -> Any:
    if isinstance(value, OtherPeft):
        return {"name": value.name, **_plain(value.settings)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {_key(f): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"name": out.pop("name"), **out} if "name" in out else out  # inherited keys would stand before the name
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _check_keys(cls: type, value: dict[str, Any], path: str, owner: str = "") -> None:
    known = keys_of(cls)
    for key in value:
        if key not in known:
            full = f"{path}.{key}" if path else str(key)
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{full}: {value[key]!r} is for no known key{hint or ';'} {owner or path or 'the top level'} takes: {', '.join(known)}"
            )


def _components(annotation: Any) -> dict[str, type] | None:
    """name -> dataclass where an annotation is one component or several to choose from by `name`."""
    members = get_args(annotation) if get_origin(annotation) in (types.UnionType, typing.Union) else (annotation,)
    if not all(dataclasses.is_dataclass(m) and "name" in _hints(m) for m in members) or Experiment in members:
        return None
    table = {}
    for member in members:
        table[next(f.default for f in dataclasses.fields(member) if f.name == "name")] = member
    return table


def components(section: str) -> dict[str, type]:
    """name -> dataclass of the components a section can hold; `""` stands for any PEFT method.

    Raises:
        KeyError: if the section holds no components.
    """
    table = _components(_hints(Experiment)[section])
    if table is None:
        raise KeyError(section)
    return table


def _convert(annotation: Any, value: Any, path: str) -> Any:
    table = _components(annotation)
    if table is not None:
        return _convert_component(table, value, path)
    if dataclasses.is_dataclass(annotation):
        return _convert_section(annotation, value, path)
    return _convert_leaf(annotation, value, path)


def _convert_component(table: dict[str, type], value: Any, path: str) -> Any:
    names = [n for n in table if n]
    if isinstance(value, str):
        raise UserError(f"{path}: {value!r} is not a section; write {path}={{name: {value}}} or {path}.name={value}")
    if not isinstance(value, dict):
        raise UserError(f"{path}: {value!r} is not a section with a name; names: {', '.join(names)}")
    default = next(iter(names)) if len(names) == 1 or path == "executor" else None
    name = value.get("name", default)
    if name is None:
        raise UserError(
            f"{path}.name: missing beside {', '.join(map(str, value)) or 'nothing'}; one of {', '.join(names)}"
        )
    if not isinstance(name, str):
        raise UserError(f"{path}.name: {name!r} is not a name; one of {', '.join(names)}")
    if name not in table:
        if "" not in table:
            near = difflib.get_close_matches(name, names, n=1)
            raise UserError(
                f"{path}.name: {name!r} is not known{f'; did you mean {near[0]}?' if near else ';'} one of {', '.join(names)}"
            )
        return table[""](name=name, settings={k: v for k, v in value.items() if k != "name"})
    return _convert_section(table[name], {**value, "name": name}, path, owner=f"{path} {name}")


def _convert_section(cls: type, value: Any, path: str, owner: str = "") -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {value!r} is not a section; its keys are {', '.join(keys_of(cls))}")
    _check_keys(cls, value, path, owner)
    hints = _hints(cls)
    out = {}
    for f in dataclasses.fields(cls):
        if _key(f) in value:
            out[f.name] = _convert(hints[f.name], value[_key(f)], f"{path}.{_key(f)}")
    return cls(**out)


_MISMATCH = object()


def _convert_leaf(annotation: Any, value: Any, path: str) -> Any:
    result = _try_leaf(annotation, value, path)
    if result is _MISMATCH:
        raise UserError(f"{path}: {value!r} is not {_describe(annotation)}")
    return result


def _try_leaf(annotation: Any, value: Any, path: str) -> Any:
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin is Literal:
        return value if any(value == a and type(value) is type(a) for a in get_args(annotation)) else _MISMATCH
    if origin in (types.UnionType, typing.Union):
        for member in get_args(annotation):
            result = _try_leaf(member, value, path)
            if result is not _MISMATCH:
                return result
        return _MISMATCH
    if origin is list:
        if not isinstance(value, (list, tuple)):
            return _MISMATCH
        return [_convert_leaf(get_args(annotation)[0], v, f"{path}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            return _MISMATCH
        return {str(k): _convert_leaf(get_args(annotation)[1], v, f"{path}.{k}") for k, v in value.items()}
    if annotation in (None, type(None)):
        return None if value is None else _MISMATCH
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if annotation is int and isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(value) if math.isfinite(value) and float(value).is_integer() else _MISMATCH
    if annotation in (str, bool):
        return value if isinstance(value, annotation) else _MISMATCH
    return _MISMATCH


def _describe(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        options = [str(a) for a in get_args(annotation)]
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(a) for a in get_args(annotation))
    if origin is list:
        return f"a list (each {_describe(get_args(annotation)[0])})"
    if origin is dict:
        return "a mapping {key: value}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, str(annotation))


# ------------------------------------------------------------------------------------------ YAML and overrides


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give the YAML file of an experiment, e.g. experiments/lora_sentiment/tiny.yaml"
        )
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save the YAML file as UTF-8"
        ) from None
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}, not sections with keys; see experiments/ for examples")
    return tree


def _override(tree: dict[str, Any], text: str) -> None:
    from omegaconf import OmegaConf

    key, equals, _ = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{text!r}: not an override; write key=value, e.g. local.lr=1e-3")
    try:
        node = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    except Exception as error:  # OmegaConf and PyYAML raise a dozen kinds here; each means that the text is malformed
        raise UserError(f"{text!r}: not readable as key=value: {' '.join(str(error).split())}") from None
    path = key.strip().split(".")
    value: Any = node
    for part in path:
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"{text!r}: not readable as key=value; keys are dotted names, e.g. local.lr=1e-3")
        value = value[part]
    section = tree.get(path[0])
    renames = (
        len(path) == 2 and path[1] == "name" and path[0] in ("adapter", "data", "partition", "algorithm", "executor")
    )
    if renames and isinstance(section, dict) and section.get("name") != value:
        tree[path[0]] = {"name": value}
        return
    target = tree
    for depth, part in enumerate(path[:-1]):
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise UserError(f"{'.'.join(path[: depth + 1])}: {target!r} is no section, so {key} cannot be set")
    target[path[-1]] = value


def _interpolate(tree: dict[str, Any]) -> dict[str, Any]:
    """Resolve ${...}, but leave environment variables in paths as they are: the resolved config then runs elsewhere."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    kept = {}
    for path in _PATHS:
        text = _get(tree, path)
        if isinstance(text, str) and "${" in text:
            kept[path] = text
            expand_path(text, ".".join(path))
            _set(tree, path, "")
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        message = str(error).split("\n")[0]
        raise UserError(f"{getattr(error, 'full_key', None) or 'config'}: {message}") from None
    for path, text in kept.items():
        _set(resolved, path, text)
    return resolved


def _get(tree: dict[str, Any], path: Sequence[str]) -> Any:
    value: Any = tree
    for part in path:
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree[part]
    tree[path[-1]] = value


def expand_path(text: str, key: str) -> str:
    """Put environment variables (`${oc.env:NAME}`) and `~` into a path.

    Raises:
        UserError: if a variable is not set.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if "${" in text:
        try:
            text = str(OmegaConf.create({"value": text}).value)
        except OmegaConfBaseException as error:
            name = re.search(r"oc\.env:(\w+)", text)
            way = (
                f"set {name[1]} to the folder that holds it, or give {key}=PATH" if name else str(error).split("\n")[0]
            )
            raise UserError(f"{key}: {text!r} cannot be resolved; {way}") from None
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _absolute_paths(tree: dict[str, Any], folder: Path) -> None:
    """A relative path that exists from here or from the YAML's folder becomes absolute: the resolved config stands alone."""
    for path in _PATHS[:-1]:
        text = _get(tree, path)
        if not isinstance(text, str) or not text or "${" in text or text == "tiny" or text.startswith("package:"):
            continue
        for candidate in (Path(text).expanduser(), folder / text):
            if candidate.exists():
                _set(tree, path, str(candidate.resolve()))
                break
