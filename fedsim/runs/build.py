"""From a config to data, partition and checks: everything that can fail before a model is loaded."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fedsim.config.experiment import Experiment, expand_path
from fedsim.config.sections import MOST_EXAMPLES
from fedsim.core.errors import UserError, nearest_first
from fedsim.core.section import plain
from fedsim.core.seeding import stream
from fedsim.data import instructions, sources
from fedsim.data.batches import Draw
from fedsim.data.files import Form
from fedsim.data.partition import (
    PARTITIONERS,
    Partition,
    VirtualPartition,
    measure,
    site_rows,
    site_rows_by_column,
)
from fedsim.data.sources import Source, Split
from fedsim.data.tokens import CHAT_DATE, Template, Tokens, encode, encode_chats, tells_time
from fedsim.models import base, locate, sharing
from fedsim.models.positions import ends_at, max_positions

CENTRAL = "central"
MOST_STEPS = 10**9  # of a client in a run: weeks, even at a millisecond each


@dataclass
class Rows:
    """What runs with the same data, base and task have in common: the rows, as tokens of that base.

    Attributes:
        source: rows and label words.
        model: where the base comes from.
        tokenizer: the base's.
        tokens: split -> arrays.
        template: the prompt template in force; None where the tokenizer's chat template is.
        words: label words, where the answers are labels.
    """

    source: Source
    model: locate.Source
    tokenizer: Any
    tokens: dict[str, Tokens]
    template: str | None
    words: list[str] | None

    @functools.cached_property
    def model_hash(self) -> str:
        """Of the base's files."""
        return locate.content_hash(self.model)


@dataclass
class Parts:
    """What an experiment is made of, up to the model.

    Attributes:
        exp: the config.
        rows: the rows, as tokens of the base.
        partition: client -> rows of the training split.
        own: client -> rows of the validation split, the site's own validation; None where no client has any (virtual).
        report: class counts, sizes and skew of the partition; goes into the run folder.
    """

    exp: Experiment
    rows: Rows
    partition: Partition | VirtualPartition
    own: Partition | None
    report: dict[str, Any]

    @property
    def source(self) -> Source:
        """Rows and label words."""
        return self.rows.source

    @property
    def model(self) -> locate.Source:
        """Where the base comes from."""
        return self.rows.model

    @property
    def tokenizer(self) -> Any:
        """The base's."""
        return self.rows.tokenizer

    @property
    def tokens(self) -> dict[str, Tokens]:
        """Split -> arrays."""
        return self.rows.tokens

    @property
    def clients(self) -> np.ndarray:
        """Numbers of the clients that hold rows, int64 ascending; the others are left out of cohorts."""
        return np.nonzero(self.partition.sizes > 0)[0]

    def client(self, name: str | int) -> int:
        """A client's number from its id, or from its number.

        Raises:
            UserError: if there is no such client.
        """
        held = self.partition
        number = held.number(name) if isinstance(name, str) else None
        if isinstance(name, int) and 0 <= name < held.num_clients:
            number = name
        if number is not None:
            return number
        known = ", ".join(held.name(c) for c in range(min(20, held.num_clients)))
        raise UserError(
            f"client: {name!r} is none of this partition's: {known}{' ...' if held.num_clients > 20 else ''}"
        )

    def run_id(self) -> str:
        """Hash of all that the numbers depend on: the config, with content hashes in place of data and model paths."""
        identity = identity_of(self.exp)
        identity["model"]["path"] = self.rows.model_hash
        digest = hashlib.sha256(repr(_sorted(identity)).encode())
        if self.rows.template is None:
            digest.update(repr(self.tokenizer.chat_template).encode())
            if tells_time(self.tokenizer):
                digest.update(CHAT_DATE.encode())
        for name in sources.SPLITS:
            digest.update(repr(sorted(self.source.splits[name].columns.items())).encode())
        return digest.hexdigest()[:12]


def identity_of(exp: Experiment) -> dict[str, Any]:
    """The part of the config that the numbers depend on, without paths: their content stands for them."""
    identity = exp.identity()
    identity["model"]["path"] = None
    for key in ("path", "validation", "test"):
        if isinstance(identity["data"].get(key), str):
            identity["data"][key] = None
    labels = identity["data"].get("labels")
    if isinstance(labels, dict):  # in their order, which numbers the classes
        identity["data"]["labels"] = [list(pair) for pair in labels.items()]
    for key in ("sources", "columns") if exp.data.name == "instructions" else ():
        identity["data"].pop(key, None)  # what comes of them, data sets' names too, is in the rows
    return identity


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((k, _sorted(v)) for k, v in value.items())
    return value


def draw_of(exp: Experiment) -> Draw:
    """How the experiment's clients draw batches."""
    work = exp.local
    return Draw(work.batch_size, work.epochs, work.shuffle, work.drop_last)


def load_source(exp: Experiment) -> Source:
    """Load the rows.

    Raises:
        UserError: as the source says.
    """
    data = exp.data
    if data.name == "instructions":
        return _load_instructions(exp)
    keys = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    for name in ("template", "max_length", "too_long", "name"):
        keys.pop(name)
    for name in ("path", "validation", "test"):
        if isinstance(keys.get(name), str):
            keys[name] = expand_path(keys[name], f"data.{name}")
    if data.name == "table":
        keys["form"] = Form(**{f.name: keys.pop(f.name) for f in dataclasses.fields(Form)})
    if data.name in ("headlines", "financial_phrasebank"):
        renamed = keys.pop("columns")
        if renamed:
            raise UserError(
                f"data.columns: {renamed!r} has no use here; the columns of {data.name} are sentence and label"
            )
        return getattr(sources, data.name)(**keys)
    return getattr(sources, data.name)(**keys, needs_labels=_needs_labels(exp))


def _load_instructions(exp: Experiment) -> Source:
    data = exp.data
    if exp.model.task != "causal_lm":
        raise UserError(
            f"model.task: {exp.model.task!r} needs classes, and the answers of instructions are free text; set model.task=causal_lm"
        )
    keys = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    for name in ("name", "template", "labels", "max_length", "too_long", "chat_template"):
        keys.pop(name)
    keys["sources"] = [
        {**entry, "path": _expanded(entry["path"], f"data.sources[{i}].path")} for i, entry in enumerate(data.sources)
    ]
    return instructions.instructions(**keys)


def _expanded(path: str | list[str], key: str) -> str | list[str]:
    if isinstance(path, list):
        return [expand_path(p, f"{key}[{i}]") for i, p in enumerate(path)]
    return expand_path(path, key)


def _needs_labels(exp: Experiment) -> bool | None:
    """Whether rows must have a class, must not be read as classes, or (None) may have one."""
    if exp.model.task == "sequence_classification":
        return True
    if exp.data.template is None:
        return None
    return Template.parse(exp.data.template).fields[-1] == "label"


def template_of(exp: Experiment, source: Source) -> str | None:
    """The prompt template in force; None where the tokenizer's chat template is.

    Raises:
        UserError: if the config gives none and the source has none of its own.
    """
    if exp.data.template is not None or getattr(exp.data, "chat_template", False):
        return exp.data.template
    own = source.text if exp.model.task == "sequence_classification" else source.template
    if own is None:
        columns = ", ".join(source.splits["train"].columns)
        raise UserError(
            f"data.template: null, and these columns have no template of their own: {columns}; write one, e.g. '{{instruction}} {{response}}'"
        )
    return own


class Shared:
    """What several runs have in common, made once: tokenised rows and loaded bases; pickles as handles to shared memory."""

    def __init__(self) -> None:
        self._rows: dict[str, Rows] = {}
        self._bases: dict[str, nn.Module] = {}

    def rows(self, exp: Experiment) -> Rows:
        """The experiment's rows; read and tokenised at the first call.

        Raises:
            UserError: as `prepare`.
        """
        key = repr((exp.model.path, exp.model.task, plain(exp.data), exp.evaluate.max_examples))
        if key not in self._rows:
            self._rows[key] = load_rows(exp)
        return self._rows[key]

    @staticmethod
    def base_key(exp: Experiment) -> str | None:
        """Runs with the same key can share a base; None where the whole model is trained, each of its own copy."""
        if exp.adapter.name == "none":
            return None
        heads = exp.model.task == "sequence_classification"
        # A head that the folder does not hold starts from the seed.
        return repr((exp.model.path, exp.model.dtype, exp.model.task, (exp.seed, exp.data.labels) if heads else None))

    def base(self, parts: Parts) -> nn.Module:
        """A model of one's own around the weights that all runs with the same base share.

        Raises:
            UserError: if the weights cannot be loaded.
        """
        key = self.base_key(parts.exp)
        if key is None:
            return load_base(parts)
        if key not in self._bases:
            self._bases[key] = load_base(parts)
        return sharing.borrow(self._bases[key])

    def keep_only(self, keys: Collection[str | None]) -> None:
        """Free the bases that no run to come needs."""
        self._bases = {k: m for k, m in self._bases.items() if k in keys}

    def share(self) -> None:
        """Move weights and rows into shared memory, so that other processes read the same pages."""
        for model in self._bases.values():
            sharing.share_memory(model)
        for rows in self._rows.values():
            for tokens in rows.tokens.values():
                tokens.share()


def load_base(parts: Parts) -> nn.Module:
    """The experiment's base, frozen, on the CPU; in float32 where that is trained under a 16-bit type.

    Raises:
        UserError: if the weights cannot be loaded.
    """
    exp = parts.exp
    masters = exp.adapter.name == "none" and exp.training.master_weights and exp.model.dtype == "bfloat16"
    return base.load_base(
        parts.model,
        task=exp.model.task,
        dtype="float32" if masters else exp.model.dtype,
        labels=parts.source.labels if exp.model.task == "sequence_classification" else None,
        pad_token_id=parts.tokenizer.pad_token_id,
        seed=exp.seed,
    )


def load_rows(exp: Experiment) -> Rows:
    """Read and tokenise the rows.

    Raises:
        UserError: for a base, data or a template that cannot be.
    """
    exp = _with_max_length(exp)
    model = locate.find(expand_path(exp.model.path, "model.path"))
    source = load_source(exp)
    template = template_of(exp, source)
    words = source.labels if _answers_are_labels(exp, template, source) else None
    base.check_task(model, exp.model.task)
    made = _load_chats(exp, model, source) if template is None else _load_texts(exp, model, source, template, words)
    if exp.evaluate.max_examples is not None:
        _sample(made.tokens["validation"], exp.evaluate.max_examples)
    return made


def _sample(tokens: Tokens, count: int) -> None:
    """Leave out all but so many rows, drawn at random without the experiment's seed: runs that differ in it are scored on
    the same rows."""
    kept = tokens.kept()
    if count < len(kept):
        out = stream(0, "evaluation examples").choice(kept, len(kept) - count, replace=False)
        tokens.left_out[f"evaluate.max_examples={count}"] = sorted(out.tolist())


def _load_texts(exp: Experiment, model: locate.Source, source: Source, template: str, words: list[str] | None) -> Rows:
    fields = Template.parse(template).fields
    # The rows of instructions have the same names whatever those of the file.
    renamed = {} if exp.data.name == "instructions" else exp.data.columns
    heads = exp.model.task == "sequence_classification"
    asked = [f for f in (fields if heads else fields[:-1]) if f != "label"]
    texts = {name: split.texts(fields, renamed, source.labels, name, asked) for name, split in source.splits.items()}
    tokenizer = base.load_tokenizer(model)
    tokens = {
        name: encode(
            texts[name],
            split.labels if words is not None or heads else None,
            template=template,
            tokenizer=tokenizer,
            task=exp.model.task,
            label_words=source.labels if heads else words,
            max_length=exp.data.max_length,
            too_long=exp.data.too_long,
            split=name,
            place=split.place,
        )
        for name, split in source.splits.items()
    }
    return Rows(source, model, tokenizer, tokens, template, words)


def _load_chats(exp: Experiment, model: locate.Source, source: Source) -> Rows:
    tokenizer = base.load_tokenizer(model)
    if tokenizer.chat_template is None:
        raise UserError(
            f"data.chat_template: true, but the tokenizer of {model.name!r} has no chat template; set it to false, or give a base tuned for chats"
        )
    tokens = {
        name: encode_chats(
            instructions.conversations(split),
            tokenizer=tokenizer,
            max_length=exp.data.max_length,
            too_long=exp.data.too_long,
            split=name,
            place=split.place,
        )
        for name, split in source.splits.items()
    }
    return Rows(source, model, tokenizer, tokens, None, None)


def _with_max_length(exp: Experiment) -> Experiment:
    """The config with `data.max_length` as a number: where it is null, 1024 or what the base takes besides virtual tokens."""
    if exp.data.max_length is not None:
        return exp
    positions = max_positions(base.load_config(locate.find(expand_path(exp.model.path, "model.path"))))
    room = 1024 if positions is None else positions - _virtual_tokens(exp)
    return dataclasses.replace(exp, data=dataclasses.replace(exp.data, max_length=max(2, min(1024, room))))


def _virtual_tokens(exp: Experiment) -> int:
    """Positions that a prompt method takes in front of each example."""
    keys = getattr(exp.adapter, "settings", None) or vars(exp.adapter)  # of a method by its PEFT name, of one of ours
    return keys.get("num_virtual_tokens") or 0


def prepare(exp: Experiment, shared: Shared | None = None) -> Parts:
    """Load, tokenise, partition and check.

    Args:
        exp: the config.
        shared: rows that other runs have in common with this one are taken from it.

    Raises:
        UserError: for whatever can be known to be impossible before a model is loaded.
    """
    if exp.seeds is not None:
        raise UserError(
            f"seeds: {exp.seeds!r} is for fedsim run and sweeps; give one seed here, e.g. seed={exp.seeds[0]}"
        )
    exp = _with_max_length(exp)
    made = load_rows(exp) if shared is None else shared.rows(exp)
    source, tokens = made.source, made.tokens
    exp = _resolve(exp, source, made.template, made.words)
    kept = {name: tokens[name].kept() for name in sources.SPLITS}
    for name in ("train", "validation"):
        if len(kept[name]) == 0:
            why = ", ".join(f"{len(r)} {k}" for k, r in tokens[name].left_out.items())
            raise UserError(
                f"data: no row of the {name} split is left ({why}); look at data.template and data.max_length"
            )
    partition, own, report = _partition(exp, source, kept)
    report["left_out"] = {s: {k: len(r) for k, r in t.left_out.items()} for s, t in tokens.items() if t.left_out}
    report["notes"] = {**report["notes"], **source.notes}
    report["truncated"] = {s: t.truncated for s, t in tokens.items() if t.truncated}
    parts = Parts(exp, made, partition, own, report)
    _check(parts)
    return parts


def _resolve(exp: Experiment, source: Source, template: str | None, words: list[str] | None) -> Experiment:
    """The config with what the data decided written out; resolving it again changes nothing, so the run's id stays."""
    classes = words is not None or exp.model.task == "sequence_classification"
    if exp.best.metric in ("accuracy", "macro_f1") and not classes:
        raise UserError(
            f"best.metric: {exp.best.metric!r} needs label words or a head; these answers are free text, use loss, perplexity or exact_match"
        )
    metric = exp.best.metric or ("accuracy" if classes else "loss")
    mode = exp.best.mode or ("min" if metric in ("loss", "perplexity") else "max")
    best = dataclasses.replace(exp.best, metric=metric, mode=mode)
    labels = exp.data.labels if isinstance(exp.data.labels, dict) else source.labels
    return dataclasses.replace(exp, best=best, data=dataclasses.replace(exp.data, template=template, labels=labels))


def _answers_are_labels(exp: Experiment, template: str | None, source: Source) -> bool:
    return (
        source.labels is not None and exp.model.task == "causal_lm" and Template.parse(template).fields[-1] == "label"
    )


def _classes(exp: Experiment, source: Source) -> tuple[dict[str, np.ndarray], list[str]]:
    """Split -> class of each row, by which clients are divided and skew is measured; and the classes' names."""
    by = getattr(exp.partition, "by", None)
    train = source.splits["train"]
    needed = exp.partition.name in ("dirichlet", "dirichlet_fedma", "class_counts", "shards")
    if by is None and exp.data.name == "instructions" and not needed:
        by = "source"  # nothing is divided by it: skew is measured by it, and validation rows are dealt by it
    if by is not None:
        if by not in train.columns:
            raise UserError(f"partition.by: {by!r} is no column; the data has: {nearest_first(by, train.columns)}")
        names = sorted({str(v) for v in train.columns[by]})
        index = {n: i for i, n in enumerate(names)}
        return {
            s: np.array([index.get(str(v), -1) for v in split.columns.get(by, [])], dtype=np.int64)
            for s, split in source.splits.items()
        }, names
    if source.labels is not None:
        return {s: split.labels for s, split in source.splits.items()}, source.labels
    if needed:
        raise UserError(
            f"partition.by: null, but these rows have no classes to divide by; name one of: {', '.join(train.columns)}"
        )
    return {s: np.zeros(len(split), dtype=np.int64) for s, split in source.splits.items()}, ["rows"]


def _partition(
    exp: Experiment, source: Source, kept: dict[str, np.ndarray]
) -> tuple[Partition | VirtualPartition, Partition | None, dict[str, Any]]:
    classes, names = _classes(exp, source)
    train, held = classes["train"][kept["train"]], classes["validation"]
    held_kept = kept["validation"] if len(held) else np.empty(0, dtype=np.int64)
    held = held[held_kept]
    known = held >= 0
    keys = {f.name: getattr(exp.partition, f.name) for f in dataclasses.fields(exp.partition)}
    name = keys.pop("name")
    keys.pop("by", None)
    rng = stream(exp.seed, "partition")
    if name == "by_column":
        column = keys.pop("column")
        columns = source.splits["train"].columns
        if column not in columns:
            raise UserError(
                f"partition.column: {column!r} is no column; the data has: {nearest_first(column, columns)}"
            )
        _check_ids(source.splits["train"], column)
        keys["values"] = [columns[column][r] for r in kept["train"]]
        _check_emptied(exp, columns[column], kept["train"])
    if name == "class_counts":
        _check_counts(keys["counts"], names)
    partition = PARTITIONERS[name].draw(train, rng, **keys)
    report = {**measure(partition, train, len(names)), "class_names": names, "partitioner": name}
    if isinstance(partition, VirtualPartition):  # validation rows dealt to a million clients would be none for most
        return dataclasses.replace(partition, kept=kept["train"]), None, report
    if name == "by_column":
        there = source.splits["validation"].columns.get(column)
        own = site_rows_by_column(partition, [there[r] for r in held_kept] if there is not None else [])
    else:
        own = site_rows(partition, train, held[known], stream(exp.seed, "site validation"))
        own = Partition(own.offsets, np.nonzero(known)[0][own.indices], partition.names)
    if name == "by_column" and CENTRAL in (partition.names or ()):
        raise UserError(
            f"partition.column: a value of {column!r} is {CENTRAL!r}, the name of the centralised run; rename it in the data"
        )
    mapped = Partition(partition.offsets, kept["train"][partition.indices], partition.names, partition.notes)
    return mapped, Partition(own.offsets, held_kept[own.indices], partition.names), report


def _check_ids(split: Split, column: str) -> None:
    """Whether a column names clients."""
    for row, value in enumerate(split.columns[column]):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        named = isinstance(value, str) and value.strip() and not value.endswith("\0") and sources.sound(value)
        if not whole and not named:
            shown = "nothing" if sources.missing(value) else repr(value)[:60]
            way = "every row needs an id, text that is not blank or a whole number"
            raise UserError(f"partition.column: {split.place(row, 'train')} has {shown} in {column!r}; {way}")


def _check_emptied(exp: Experiment, ids: list[Any], kept: np.ndarray) -> None:
    """Whether each client still has a row after those that cannot be trained on were left out."""
    held = {str(ids[r]) for r in kept}
    gone = sorted({str(v) for v in ids} - held)
    if gone:
        rows = sum(str(v) == gone[0] for v in ids)
        others = f" ({len(gone)} such clients)" if len(gone) > 1 else ""
        way = f"none fits data.max_length={exp.data.max_length} with data.too_long={exp.data.too_long} and has text and an answer"
        raise UserError(
            f"partition.column: client {gone[0]!r} is left without a row{others}: of its {rows} {way}; change these keys, or take its rows out"
        )


def _check_counts(counts: list[list[int]], names: list[str]) -> None:
    for i, row in enumerate(counts):
        if len(row) != len(names):
            raise UserError(
                f"partition.counts[{i}]: {row!r} has {len(row)} counts for {len(names)} classes: {', '.join(names)}"
            )


def _check(parts: Parts) -> None:
    exp, sizes = parts.exp, parts.partition.sizes
    clients = parts.clients
    held = len(clients)
    if held == 0:
        raise UserError("partition: no client holds a row; raise the counts or lower num_clients")
    if exp.cohort.size != "all" and exp.cohort.size > held:
        raise UserError(
            f"cohort.size: {exp.cohort.size} clients a round, but only {held} hold rows; give at most {held}, or all"
        )
    work = exp.local
    if work.epochs is not None and work.drop_last:
        small = clients[sizes[clients] < work.batch_size]
        if len(small):
            name, rows = parts.partition.name(int(small[0])), int(sizes[small[0]])
            raise UserError(
                f"local.drop_last: true leaves {name} ({rows} rows, {len(small)} such client(s)) without a step at local.batch_size={work.batch_size}; "
                f"set drop_last=false, batch_size={int(sizes[clients].min())} or less, or local.steps"
            )
    _check_work(parts)
    _check_vocabulary(parts)
    positions = max_positions(base.load_config(parts.model))
    extra = _virtual_tokens(exp)
    longest = max(int(t.lengths.max(initial=0)) for t in parts.tokens.values())
    if positions is not None and longest + extra > positions:
        virtual = f" and {extra} virtual tokens" if extra else ""
        raise UserError(
            f"data.max_length: {exp.data.max_length} lets rows of {longest} tokens{virtual} through, the base takes {positions}; give {f'at most {positions - extra}' if positions - extra > 1 else 'fewer virtual tokens'}"
        )
    _check_room(parts, positions, extra)


def _check_room(parts: Parts, positions: int | None, extra: int) -> None:
    """Whether a base has positions for all that is put behind a prompt in evaluation: generated tokens, and each label."""
    evaluate = parts.exp.evaluate
    scored = [parts.tokens[name] for name in ("validation", "test")]
    prompt = max(int(t.prompts.numpy()[t.kept()].max(initial=0)) for t in scored) + extra
    labels = max((len(c) for t in scored for c in t.candidates or ()), default=0)
    new = evaluate.max_new_tokens - 1 if evaluate.generate else 0  # the last one is not fed back
    if positions is None or prompt + max(labels, new) <= positions or ends_at(parts.model) is None:
        return
    virtual = f" and {extra} virtual tokens" if extra else ""
    if prompt + new > positions:
        shorter = positions - extra - new
        ways = [f"max_new_tokens to at most {positions - prompt + 1}"] * (prompt <= positions)
        ways += [f"data.max_length to at most {shorter}"] * (shorter > 1)
        raise UserError(
            f"evaluate.max_new_tokens: {evaluate.max_new_tokens} after a prompt of {prompt - extra} tokens{virtual} exceeds the {positions} positions of the base; set {' or '.join(ways) or 'both it and data.max_length lower'}"
        )
    raise UserError(
        f"data.max_length: {parts.exp.data.max_length} allows a prompt of {prompt - extra} tokens{virtual}, and with the longest label ({labels} tokens) it exceeds the {positions} positions of the base; set it to at most {max(2, positions - extra - labels)}"
    )


def _check_work(parts: Parts) -> None:
    """Refuse a round, or a run, that is too long to be finished; its batches alone would fill the memory."""
    exp, sizes = parts.exp, parts.partition.sizes[parts.clients]
    work, draw = exp.local, draw_of(exp)
    cohort = len(sizes) if exp.cohort.size == "all" else exp.cohort.size
    # The centralised model takes as many examples as the cohort together, unless steps are matched.
    each = np.full(len(sizes), work.batch_size * work.steps) if work.steps is not None else sizes * (work.epochs or 1)
    per_client = examples = int(each.max())
    if "central" in exp.modes and exp.central.match == "epochs":
        examples = int(np.sort(each)[-cohort:].sum())
    key, value = ("steps", work.steps) if work.steps is not None else ("epochs", work.epochs)
    if examples > MOST_EXAMPLES:
        whose = "the centralised model" if examples > per_client else "a client"
        raise UserError(
            f"local.{key}: {value} makes {examples:,} examples per round for {whose}; lower it to at most "
            f"{max(1, int(value * MOST_EXAMPLES / examples))}"
        )
    steps = draw.count(int(sizes.max()), work.steps)
    if exp.rounds * steps > MOST_STEPS:
        raise UserError(
            f"rounds: {exp.rounds} of {steps:,} optimiser steps each are more than {MOST_STEPS:,} steps; lower rounds or local.{key}"
        )


def _check_vocabulary(parts: Parts) -> None:
    """Whether the base has an embedding for each token: a tokenizer of another model may number more."""
    size = getattr(base.load_config(parts.model).get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        return
    largest = max((int(t.ids.max()) for t in parts.tokens.values() if len(t.ids)), default=0)
    largest = max(largest, parts.tokenizer.pad_token_id)
    if largest >= size:
        word = parts.tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"model.path: the tokenizer of {parts.model.name!r} has token {largest} ({word!r}), but the base has embeddings for {size}; give the folder the tokenizer that the base was trained with"
        )


def batches(exp: Experiment, client: str | int, round: int) -> list[np.ndarray]:
    """Row numbers (in the training split) of each optimiser step of a client's round: a plain loop can follow them.

    Args:
        exp: the config.
        client: a client's id or number, or `central` for the centralised run.
        round: from 1.

    Returns:
        One int64 array a step, `[rows of the batch]`.

    Raises:
        UserError: for a client or a round that does not exist.
    """
    from fedsim.runs.resolve import schedule_of

    if not 1 <= round <= exp.rounds:
        raise UserError(f"round: {round} is outside 1 to rounds={exp.rounds}")
    parts = prepare(exp)
    draw = draw_of(exp)
    if client == CENTRAL:
        rows = parts.partition.all_rows()
        steps = schedule_of(parts, CENTRAL).central_steps(round)
        return [] if steps == 0 else draw.batches(rows, stream(exp.seed, "batches", CENTRAL, round), steps)
    number = parts.client(client)
    name = parts.partition.name(number)
    return draw.batches(parts.partition.rows(number), stream(exp.seed, "batches", name, round), exp.local.steps)
