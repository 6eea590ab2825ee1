"""`fedsim.predict`: what the models of a finished run make of new examples: labels with probabilities, or generated text.

Examples are read, templated, cut and scored as the run does its own, so that accuracy over its validation examples is the
metric that it logged. Nothing but the run folder and the base model is needed.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedsim.analysis.load import find_runs, read_config, read_state, run_path
from fedsim.config.experiment import Experiment, expand_path
from fedsim.core.errors import Notice, UserError, nearest_first
from fedsim.core.files import check_own, check_whole, client_models, write_atomic
from fedsim.core.numerics import settled
from fedsim.data import instructions
from fedsim.data.files import Form, header_hint, read_table
from fedsim.data.labels import missing
from fedsim.data.memory import Table, table_of
from fedsim.data.sources import Split
from fedsim.data.templates import Template
from fedsim.data.tokens import Tokens, encode, encode_chats
from fedsim.models import base as bases
from fedsim.models import locate, sharing
from fedsim.models.export import load_adapter
from fedsim.models.forward import Net
from fedsim.models.positions import ends_at
from fedsim.runs.build import CENTRAL
from fedsim.runs.checks import virtual_tokens
from fedsim.runs.resolve import device_named
from fedsim.training.evaluation import generate, score_rows

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.runs.run import Run

FORMATS = ("csv", "jsonl")
_UNKNOWN = "x"  # in the place of the answer of an example that has none
_PROBABILITY = "probability:"


def predict(
    run: str | os.PathLike[str] | Run,
    examples: Any,
    model: str | None = None,
    *,
    site_column: str | None = None,
    device: str = "auto",
) -> pd.DataFrame:
    """Predict new examples with the models of a finished run.

    Args:
        run: its folder, or what `fedsim.run` returned.
        examples: a CSV, TSV, JSON, JSONL or Parquet file with the columns of the run's data (the answer's may be missing), or
            examples as a DataFrame, a `datasets.Dataset`, a list of records or a mapping of columns.
        model: global (the default), best, central, or client:ID: the client's own model if the algorithm keeps one, else its
            local-only model.
        site_column: column that names each example's client, whose model predicts it; in the place of `model`.
        device: auto | cpu | cuda:0 ...

    Returns:
        A row per example, in their order: `row` (from 0), `model`, and `prediction`. Where the run's answers are labels,
        `prediction` is one, and `probability:LABEL` are the probabilities of all, which sum to 1: of a causal LM
        exp(log p(label | prompt)) over the sum of these. Else it is the greedily generated text. An example without text, or
        one that `data.too_long: drop` leaves out, has no prediction, and a warning says so.

    Raises:
        UserError: for a run that is not finished, an unknown model or client, a missing column, or examples that cannot be
            read.
    """
    folders = find_runs(run_path(run))
    if len(folders) > 1:
        raise UserError(f"run: {str(run)!r} holds {len(folders)} runs; give one of: {', '.join(map(str, folders[:5]))}")
    place = device_named(device)
    trained = _Trained.of(folders[0])
    table = _read(examples, trained)
    chosen = _assign(trained, table, model, site_column)
    with settled([str(place)]), bases.quiet():
        frame, note = _predict(trained, table, chosen, place)
    if note is not None:
        warnings.warn(note, Notice, stacklevel=2)
    return frame


def write_predictions(frame: pd.DataFrame, output: str | os.PathLike[str] | None, form: str | None) -> str | None:
    """Write what `predict` returned as CSV or JSON lines; returns the text if there is no file for it.

    Args:
        frame: from `predict`.
        output: the file.
        form: csv | jsonl; None: by the file's ending, else csv.

    Raises:
        UserError: for an unknown format, or a file that is no file.
    """
    form = form or ("jsonl" if Path(output or "").suffix.lower() in (".jsonl", ".ndjson") else "csv")
    if form not in FORMATS:
        raise UserError(f"--format: {form!r} is not known; give one of {', '.join(FORMATS)}")
    if form == "csv":
        text = frame.to_csv(index=False, lineterminator="\n")
    else:
        text = "".join(json.dumps(_record(row), ensure_ascii=False) + "\n" for row in frame.to_dict("records"))
    if output is None:
        return text
    if Path(output).is_dir():
        raise UserError(f"--output: {str(output)!r} is a folder; give a file")
    check_own(Path(output))
    write_atomic(Path(output), text.encode())
    return None


def _record(row: dict[Any, Any]) -> dict[str, Any]:
    given = {k: None if missing(v) else v for k, v in row.items() if not k.startswith(_PROBABILITY)}
    shares = {k.removeprefix(_PROBABILITY): v for k, v in row.items() if k.startswith(_PROBABILITY)}
    if shares:
        given["probabilities"] = None if any(map(missing, shares.values())) else shares
    return given


def models_of(run: Path) -> dict[str, Path]:
    """The models of a run by the names that `predict` takes; a client's own one goes before its local-only one."""
    out = {name: run / name for name in ("global", "best", CENTRAL) if (run / name).is_dir()}
    return out | {f"client:{client}": run / place for place, client in client_models(run).items()}


@dataclass(frozen=True)
class _Trained:
    """A finished run.

    Attributes:
        run: its folder.
        exp: its config, as far as evaluation needs it: without data and user code.
        data: its section `data`.
        models: name -> folder.
        words: the labels in order; None where the answers are free text.
    """

    run: Path
    exp: Experiment
    data: dict[str, Any]
    models: dict[str, Path]
    words: list[str] | None

    @classmethod
    def of(cls, run: Path) -> _Trained:
        if (state := read_state(run)) != "finished":
            raise UserError(f"{run}: {state}, not finished; run it to its end with fedsim run {run / 'config.yaml'}")
        config = read_config(run)
        exp = Experiment.from_dict(
            {k: config[k] for k in ("model", "adapter", "training", "evaluate", "seed") if k in config}
        )
        data = config.get("data") or {}
        labels, template = data.get("labels"), data.get("template")
        words = list(dict.fromkeys(labels.values())) if isinstance(labels, dict) else labels
        heads = exp.model.task == "sequence_classification"
        if not heads and (template is None or Template.parse(template).fields[-1] != "label"):
            words = None
        return cls(run, exp, data, models_of(run), words)

    @property
    def heads(self) -> bool:
        """Whether the models classify by a head."""
        return self.exp.model.task == "sequence_classification"

    @property
    def chats(self) -> bool:
        """Whether prompts are written by the tokenizer's chat template."""
        return self.data.get("template") is None

    @property
    def renamed(self) -> dict[str, str]:
        """Template field -> column."""
        return {} if self.data.get("name") == "instructions" else self.data.get("columns") or {}

    def folder(self, model: str, whose: str = "model") -> Path:
        """Where a model lies."""
        if model in self.models:
            return self.models[model]
        clients = [name.removeprefix("client:") for name in self.models if name.startswith("client:")]
        if model.startswith("client:") and clients:
            known = nearest_first(model.removeprefix("client:"), clients)
            raise UserError(f"{whose}: {model!r} is no client with a model in {self.run}; clients: {known}")
        known = [name for name in self.models if not name.startswith("client:")] + ["client:ID"] * bool(clients)
        what = "no client has a model" if model.startswith("client:") else "is no model"
        raise UserError(f"{whose}: {model!r}: {what} in {self.run}, which has: {', '.join(known) or 'none'}")


# --------------------------------------------------------------------------------------------------- the examples


def _read(examples: Any, trained: _Trained) -> Split:
    """The examples with all columns that the run's template takes."""
    if isinstance(examples, (str, os.PathLike)):
        path = str(examples)
        keys = {f.name: trained.data[f.name] for f in fields(Form) if f.name in trained.data}
        form = Form(**keys)
        suffix = Path(path).suffix.lower()
        if form.separator(suffix) is None:  # not separated text: only its encoding has a use
            form = Form(encoding=form.encoding)
        table = read_table(path, "input", form)
    else:
        path, table = "", table_of(examples, "input")
    columns = dict(table.values)
    if trained.data.get("name") == "instructions":
        columns |= _prompts(trained, table, path)
    fields_ = ["prompt"] if trained.chats else Template.parse(trained.data["template"]).fields
    asked = fields_ if trained.chats or (trained.heads and fields_[-1] != "label") else fields_[:-1]
    for name in asked:
        column = trained.renamed.get(name, name)
        if column not in columns:
            of = f"{path!r}" if path else "the examples"
            raise UserError(
                f"input: the column {column!r}, which the run's template takes, is not in {of}; found: {nearest_first(column, table.columns)}{header_hint(path)}"
            )
    answer = "response" if trained.chats else trained.renamed.get(fields_[-1], fields_[-1])
    if trained.words is None:  # only a long example's prompt depends on its answer: how much room is left for it
        given = columns.get(answer, [None] * len(table))
        columns[answer] = [_UNKNOWN if missing(v) or not str(v).strip() else v for v in given]
    labels = None if trained.words is None else _classes(trained, columns, len(table))
    return Split(columns, labels, path)


def _classes(trained: _Trained, columns: dict[str, list[Any]], n: int) -> np.ndarray:
    """The class of each example, 0 where the input does not tell it."""
    given, column = trained.data.get("labels"), trained.renamed.get("label", "label")
    number = {word: i for i, word in enumerate(trained.words or ())}
    held = {k: number[w] for k, w in given.items()} if isinstance(given, dict) else number
    return np.array([held.get(str(v).strip(), 0) for v in columns.get(column, [None] * n)], dtype=np.int64)


def _prompts(trained: _Trained, table: Table, path: str) -> dict[str, list[Any]]:
    """The prompt of each instruction: the column `prompt`, or an instruction with or without a context, or a chat's turns."""
    roles = {**{r: r for r in ("prompt", "response", "context", "messages")}, **(trained.data.get("columns") or {})}
    held = {role: table.values[column] for role, column in roles.items() if column in table.values}
    n, out = len(table), {role: values for role, values in held.items() if role == "response"}

    def texts(values: Any) -> list[str]:
        return ["" if missing(v) else str(v) for v in values or [""] * n]

    if "messages" in held and trained.chats:
        turns = [list(v) if isinstance(v, (list, tuple)) else [] for v in held["messages"]]
        for i, chat in enumerate(turns):
            if not chat or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in chat):
                raise UserError(f"input: row {i + 1} has no list of {{role, content}} in {roles['messages']!r}")
        said = [chat[-1]["content"] if chat[-1]["role"] == "assistant" else _UNKNOWN for chat in turns]
        asked = [chat[:-1] if chat[-1]["role"] == "assistant" else chat for chat in turns]
        return {"messages": asked, "prompt": [""] * n, "response": said}
    if (asked := held.get("prompt") or table.values.get("instruction")) is None:
        return out
    contexts = held.get("context") or table.values.get("input")
    seed = trained.data.get("order_seed", 0)
    pairs = zip(texts(asked), texts(contexts), strict=True)
    return {**out, "prompt": [instructions.prompt_of(one, context, seed) for one, context in pairs]}


def _assign(trained: _Trained, split: Split, model: str | None, site_column: str | None) -> list[str]:
    """Each example's model, which the run has."""
    if site_column is None:
        trained.folder(model or "global")
        return [model or "global"] * len(split)
    if model is not None:
        raise UserError(f"site_column: {site_column!r} chooses each example's model, so model={model!r} has no use")
    if site_column not in split.columns:
        raise UserError(
            f"site_column: {site_column!r} is no column; found: {nearest_first(site_column, split.columns)}"
        )
    names = ["" if missing(v) else str(v) for v in split.columns[site_column]]
    for i, name in enumerate(names):
        if f"client:{name}" not in trained.models:
            trained.folder(f"client:{name}", f"site_column: {split.place(i, 'the input')}")
    return [f"client:{name}" for name in names]


def _encode(trained: _Trained, split: Split, tokenizer: Any) -> Tokens:
    data = trained.data
    how = {"tokenizer": tokenizer, "max_length": data["max_length"], "too_long": data.get("too_long", "truncate")}
    how |= {"split": "the input", "place": split.place}
    if trained.chats:
        return encode_chats(instructions.conversations(split), **how)
    fields_ = Template.parse(data["template"]).fields
    asked = [f for f in (fields_ if trained.heads else fields_[:-1]) if f != "label"]
    rows = split.texts(fields_, trained.renamed, trained.words, "the input", asked)
    task, words = trained.exp.model.task, trained.words
    return encode(rows, split.labels, template=data["template"], task=task, label_words=words, **how)


# --------------------------------------------------------------------------------------------------- the models


def _predict(
    trained: _Trained, split: Split, chosen: list[str], device: torch.device
) -> tuple[pd.DataFrame, str | None]:
    """The predictions, and a line about examples that have none."""
    import pandas as pd

    source = locate.find(expand_path(trained.exp.model.path, "model.path"))
    tokenizer = bases.load_tokenizer(source)
    tokens = _encode(trained, split, tokenizer)
    kept = tokens.kept()
    note = None
    if len(out := np.setdiff1d(np.arange(len(split)), kept)):
        why = ", ".join(f"{len(rows)} {reason}" for reason, rows in tokens.left_out.items())
        shown = ", ".join(split.place(int(i), "the input") for i in out[:5])
        note = (
            f"{len(out)} of {len(split)} examples have no prediction ({why}): {shown}{' ...' if len(out) > 5 else ''}"
        )
    limit = _room(trained, source, tokens)
    found: list[str | None] = [None] * len(split)
    words = trained.words
    shares = np.full((len(split), len(words or ())), np.nan)
    by_model: dict[str, list[int]] = {}
    for row in kept.tolist():
        by_model.setdefault(chosen[row], []).append(row)
    base: nn.Module | None = None
    for name, rows in by_model.items():
        folder = trained.folder(name)
        check_whole(folder, "choose another model")
        if trained.exp.adapter.name != "none" and base is None:
            base = _load(trained, source, tokenizer, trained.exp.model.dtype)
        net = None  # the memory of a whole model is free before the next one is loaded
        net = _net(trained, base, folder, tokenizer, device)
        size = trained.exp.evaluate.batch_size
        if words is None:
            for places, made in generate(net, tokens, np.array(rows), tokenizer.eos_token_id, size, limit):
                texts = tokenizer.batch_decode(made, skip_special_tokens=True)
                for at, text in zip(places, texts, strict=True):
                    found[rows[at]] = text.strip()
            continue
        others = np.setdiff1d(np.arange(len(split)), rows).tolist()
        (scored,) = score_rows(net, replace(tokens, left_out={"others": others}), 1, batch_size=size)
        assert scored.scores is not None
        logp = scored.scores - scored.scores.max(axis=1, keepdims=True)
        shares[rows] = np.exp(logp) / np.exp(logp).sum(axis=1, keepdims=True)
        for row, label in zip(rows, logp.argmax(axis=1), strict=True):
            found[row] = words[label]
    frame = pd.DataFrame({"row": range(len(split)), "model": chosen, "prediction": pd.Series(found, dtype=object)})
    for i, word in enumerate(words or ()):
        frame[f"{_PROBABILITY}{word}"] = shares[:, i]
    return frame, note


def _room(trained: _Trained, source: locate.Source, tokens: Tokens) -> int:
    """Longest text that is generated; less than `evaluate.max_new_tokens` where the base has no positions for as many."""
    limit, kept = trained.exp.evaluate.max_new_tokens, tokens.kept()
    if trained.heads or not len(kept) or (positions := ends_at(source)) is None:
        return limit
    longest = int(tokens.prompts.numpy()[kept].max()) + virtual_tokens(trained.exp)
    need = 1 if trained.words is None else max(map(len, tokens.candidates or [[0]]))
    if longest + need - (trained.words is None) > positions:
        raise UserError(f"input: a prompt of {longest} tokens leaves no room in the {positions} positions of the base")
    return min(limit, positions - longest + 1)


def _load(trained: _Trained, source: locate.Source, tokenizer: Any, dtype: str) -> nn.Module:
    keys = {"labels": trained.words if trained.heads else None, "pad_token_id": tokenizer.pad_token_id}
    return bases.load_base(source, task=trained.exp.model.task, dtype=dtype, seed=trained.exp.seed, **keys)


def _net(trained: _Trained, base: nn.Module | None, folder: Path, tokenizer: Any, device: torch.device) -> Net:
    """A model of the run, ready to be evaluated as the run does it."""
    exp, mixed = trained.exp, None
    if base is not None:
        model = load_adapter(sharing.borrow(base), folder)
    else:
        kind = exp.model.dtype
        if kind in ("bfloat16", "float16") and exp.training.master_weights:
            kind, mixed = "float32", getattr(torch, kind)
        model = _load(trained, locate.find(str(folder.resolve())), tokenizer, kind)
    return Net(model.to(device), [], task=exp.model.task, device=device, base_dropout=False, autocast=mixed)
