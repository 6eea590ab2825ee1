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
from fedsim.core.errors import UserError
from fedsim.core.section import plain
from fedsim.core.seeding import stream
from fedsim.core.types import stream_of
from fedsim.core.user_code import UserCode, errors_of
from fedsim.data import instructions, sources
from fedsim.data.files import Form
from fedsim.data.partition import Partition, VirtualPartition
from fedsim.data.sources import Source
from fedsim.data.templates import CHAT_DATE, Template, tells_time
from fedsim.data.tokens import Tokens, encode, encode_chats
from fedsim.models import base, locate, sharing
from fedsim.models.positions import max_positions
from fedsim.privacy.central import CentralPrivacy
from fedsim.privacy.examples import ExamplePrivacy
from fedsim.runs.attacks import with_attack, with_root
from fedsim.runs.checks import check, sampler_of, virtual_tokens
from fedsim.runs.divide import CENTRAL, divide
from fedsim.runs.local_sgd import ledger_of
from fedsim.runs.private import privacy_of
from fedsim.training.attack import Attack


@dataclass
class Rows:
    """What runs with the same data, base and task have in common: the examples, as tokens of that base.

    Attributes:
        source: examples and label words.
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
        rows: the examples, as tokens of the base.
        partition: client -> training examples.
        own: client -> its own validation examples; None where no client has any (virtual).
        report: class counts, sizes and skew of the partition; goes into the run folder.
        privacy: what federated training guarantees of each client; None = nothing.
        ledger: what it guarantees of each example of a client; None = nothing.
        attack: what simulated attackers do; None = there are none.
        root: training examples, ascending, that the server trains on by itself; None = it does not.
    """

    exp: Experiment
    rows: Rows
    partition: Partition | VirtualPartition
    own: Partition | None
    report: dict[str, Any]
    privacy: CentralPrivacy | None = None
    ledger: ExamplePrivacy | None = None
    attack: Attack | None = None
    root: np.ndarray | None = None

    @property
    def source(self) -> Source:
        """Examples and label words."""
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
        """Numbers of the clients that hold examples, int64 ascending; the others are left out of cohorts."""
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
        identity["data"].pop(key, None)  # what comes of them, data sets' names too, is in the examples
    return identity


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((k, _sorted(v)) for k, v in value.items())
    return value


def load_source(exp: Experiment) -> Source:
    """Load the examples.

    Raises:
        UserError: as the source says.
    """
    data = exp.data
    others = ("name", "template", "max_length", "too_long", "chat_template")
    keys = {f.name: getattr(data, f.name) for f in dataclasses.fields(data) if f.name not in others}
    for name in ("path", "validation", "test"):
        if isinstance(keys.get(name), str):
            keys[name] = expand_path(keys[name], f"data.{name}")
    if data.name == "instructions":
        if exp.model.task != "causal_lm":
            raise UserError(
                f"model.task: {exp.model.task!r} needs classes, and the answers of instructions are free text; set model.task=causal_lm"
            )
        del keys["labels"]
        for i, entry in enumerate(data.sources):
            path, key = entry["path"], f"data.sources[{i}].path"
            several = isinstance(path, list)
            full = [expand_path(p, f"{key}[{j}]") for j, p in enumerate(path)] if several else expand_path(path, key)
            keys["sources"] = [*keys["sources"][:i], {**entry, "path": full}, *keys["sources"][i + 1 :]]
        return instructions.instructions(**keys)
    if data.name in ("headlines", "financial_phrasebank"):
        if renamed := keys.pop("columns"):
            raise UserError(
                f"data.columns: {renamed!r} has no use here; the columns of {data.name} are sentence and label"
            )
        return getattr(sources, data.name)(**keys)
    keys["needs_labels"] = _needs_labels(exp)
    if isinstance(data.name, UserCode):
        with errors_of(data.name, "data.name"):
            made = (dataclasses.replace(data, path=keys["path"]) if "path" in keys else data)()
        taken = ("validation", "test", "split_seed", "labels", "columns", "needs_labels")
        return sources.own(made, by=data.name.wanted, **{key: keys[key] for key in taken})
    if data.name == "table":
        keys["form"] = Form(**{f.name: keys.pop(f.name) for f in dataclasses.fields(Form)})
    return getattr(sources, data.name)(**keys)


def _needs_labels(exp: Experiment) -> bool | None:
    """Whether examples must have a class, must not be read as classes, or (None) may have one."""
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
    """What several runs have in common, made once: tokenized examples and loaded bases; pickles as handles to shared memory."""

    def __init__(self) -> None:
        self._rows: dict[str, Rows] = {}
        self._bases: dict[str, nn.Module] = {}

    def rows(self, exp: Experiment) -> Rows:
        """The experiment's examples; read and tokenized at the first call.

        Raises:
            UserError: as `prepare`.
        """
        code = exp.data.name.identity if isinstance(exp.data.name, UserCode) else None
        key = repr((exp.model.path, exp.model.task, plain(exp.data), code, exp.evaluate.max_examples))
        if key not in self._rows:
            self._rows[key] = load_rows(exp)
        return self._rows[key]

    @staticmethod
    def base_key(exp: Experiment) -> str | None:
        """Runs with the same key can share a base; None where the whole model is trained, each of its own copy."""
        if exp.adapter.name == "none" or exp.client is not None:
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
        """Move weights and examples into shared memory, so that other processes read the same pages."""
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
    """Read and tokenize the examples.

    Raises:
        UserError: for a base, data or a template that cannot be.
    """
    exp = _with_max_length(exp)
    model = locate.find(expand_path(exp.model.path, "model.path"))
    source = load_source(exp)
    template, heads = template_of(exp, source), exp.model.task == "sequence_classification"
    fields = [] if template is None else Template.parse(template).fields
    words = source.labels if not heads and fields[-1:] == ["label"] else None
    base.check_task(model, exp.model.task)
    # The examples of instructions have the same names whatever those of the file.
    renamed = {} if exp.data.name == "instructions" else exp.data.columns
    asked = [f for f in (fields if heads else fields[:-1]) if f != "label"]
    texts = {
        name: instructions.conversations(split)
        if template is None
        else split.texts(fields, renamed, source.labels, name, asked)
        for name, split in source.splits.items()
    }
    tokenizer = base.load_tokenizer(model)
    how = {"tokenizer": tokenizer, "max_length": exp.data.max_length, "too_long": exp.data.too_long}
    tokens = {}
    for name, split in source.splits.items():
        told = {**how, "split": name, "place": split.place}
        if template is not None:
            labels = split.labels if words is not None or heads else None
            known = source.labels if heads else words
            written = {"template": template, "task": exp.model.task, "label_words": known}
            tokens[name] = encode(texts[name], labels, **written, **told)
        elif tokenizer.chat_template is None:
            raise UserError(
                f"data.chat_template: true, but the tokenizer of {model.name!r} has no chat template; set it to false, or give a base tuned for chats"
            )
        else:
            tokens[name] = encode_chats(texts[name], **told)
    if (most := exp.evaluate.max_examples) is not None and most < len(kept := tokens["validation"].kept()):
        # Drawn without the experiment's seed: runs that differ in it are evaluated on the same examples.
        out = stream(0, "evaluation examples").choice(kept, len(kept) - most, replace=False)
        tokens["validation"].left_out[f"evaluate.max_examples={most}"] = sorted(out.tolist())
    return Rows(source, model, tokenizer, tokens, template, words)


def _with_max_length(exp: Experiment) -> Experiment:
    """The config with `data.max_length` as a number: where it is null, 1024 or what the base takes besides virtual tokens."""
    if exp.data.max_length is not None:
        return exp
    positions = max_positions(base.load_config(locate.find(expand_path(exp.model.path, "model.path"))))
    room = 1024 if positions is None else positions - virtual_tokens(exp)
    return dataclasses.replace(exp, data=dataclasses.replace(exp.data, max_length=max(2, min(1024, room))))


def prepare(exp: Experiment, shared: Shared | None = None) -> Parts:
    """Load, tokenize, partition and check.

    Args:
        exp: the config.
        shared: examples that other runs have in common with this one are taken from it.

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
                f"data: no example of the {name} split is left ({why}); look at data.template and data.max_length"
            )
    partition, own, report = divide(exp, source, kept)
    report["left_out"] = {s: {k: len(r) for k, r in t.left_out.items()} for s, t in tokens.items() if t.left_out}
    report["notes"] = {**report["notes"], **source.notes}
    report["truncated"] = {s: t.truncated for s, t in tokens.items() if t.truncated}
    parts = Parts(exp, made, partition, own, report)
    check(parts)
    parts = with_root(with_attack(parts))
    parts = dataclasses.replace(parts, ledger=ledger_of(parts))
    privacy = privacy_of(parts)
    if privacy is not None:
        last = privacy.last_round(exp.rounds, exp.privacy.max_epsilon)
        parts = dataclasses.replace(parts, exp=dataclasses.replace(exp, rounds=last), privacy=privacy)
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


def batches(exp: Experiment, client: str | int, round: int, repeat: int = 0) -> list[np.ndarray]:
    """Example numbers (in the training split) of each optimizer step of a client's round, for a plain loop to follow.

    Args:
        exp: the config.
        client: a client's id or number, in federated training, or `central` for the centralized run.
        round: from 1.
        repeat: how often the client has started in this round before; with an asynchronous server alone it is not 0.

    Returns:
        One int64 array per step, `[examples of the batch]`.

    Raises:
        UserError: for a client or a round that does not exist.
    """
    from fedsim.runs.resolve import schedule_of

    if not 1 <= round <= exp.rounds:
        raise UserError(f"round: {round} is outside 1 to rounds={exp.rounds}")
    parts = prepare(exp)
    sampler = sampler_of(exp)
    if parts.ledger is not None and client != CENTRAL:
        sampler = dataclasses.replace(sampler, poisson=True)
    if client == CENTRAL:
        rows = parts.partition.all_rows()
        steps = schedule_of(parts, CENTRAL).central_steps(round)
        return [] if steps == 0 else sampler.batches(rows, stream(exp.seed, "batches", CENTRAL, round), steps)
    number = parts.client(client)
    name = parts.partition.name(number)
    rng = stream(exp.seed, "batches", *stream_of(name, round, repeat))
    return sampler.batches(parts.partition.rows(number), rng, exp.local.steps)
