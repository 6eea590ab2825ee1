"""The head of a sequence classifier: which of its rows belong to which label, and when it starts anew."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedsim.core.seeding import stream_seed


@contextmanager
def start(seed: int) -> Iterator[None]:
    """Inside the block torch draws from the stream of new heads; its own state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "init", "head"))
        yield


def owns(model: nn.Module, task: str, name: str) -> bool:
    """Whether a parameter belongs to a classification head, or to the pooler in front of it."""
    body = model.base_model_prefix
    outside = hasattr(model, body) and not name.startswith(f"{body}.")
    return task == "sequence_classification" and (outside or "pooler" in name.split("."))


def fit(
    model: nn.Module, held: Sequence[str], labels: Sequence[str], report: dict[str, Any], *, base: str, seed: int
) -> str | None:
    """Give the head one row for each label, in their order: its own rows where it is trained for these labels, else new ones.

    Args:
        model: as transformers loaded it; its config and `starts_anew` are updated.
        held: from `class_names`.
        labels: names of the classes.
        report: transformers' report of the load.
        base: name of the base in messages.
        seed: new rows start from the stream `init` of this seed.

    Returns:
        What the user should know of it, or None.
    """
    rows, count = rows_of(held, labels), model.config.num_labels
    model.config.id2label = dict(enumerate(labels))  # an export names the rows as they are now
    model.config.label2id = {name: i for i, name in enumerate(labels)}
    model.num_labels = len(labels)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == count}
    layers = {n: m for n, m in layers.items() if n.split(".")[0] != model.base_model_prefix}
    if not layers:
        return None
    name, layer = layers.popitem()
    trained = f"{name}.weight" not in report["missing_keys"]
    about, scratch, why = f"the classification head of {base!r}", "it is trained from scratch", None
    if f"{name}.weight" in {key[0] for key in report["mismatched_keys"]}:
        return f"{about} has another number of classes than data.labels ({len(labels)}): {scratch}"
    changed = rows != list(range(count))
    if trained and rows is not None:
        for parameter in layer.parameters():
            parameter.data = parameter.data[rows]
    elif trained and _are_numbers(held):
        names = ", ".join(labels)[:200]
        return f"{about} does not name its classes: they are taken to be those of data.labels, in this order: {names}"
    elif trained and not _are_numbers(labels):
        why = f"{about} is for {', '.join(held)[:200]}, not for data.labels ({', '.join(labels)[:200]}): {scratch}"
    if why is not None or (not trained and count != len(labels)):
        with start(seed):
            fresh = nn.Linear(layer.in_features, len(labels), layer.bias is not None, dtype=layer.weight.dtype)
            model._init_weights(fresh)
        for parameter, new in zip(layer.parameters(), fresh.parameters(), strict=True):
            parameter.data = new.data
    layer.out_features = len(labels)
    if trained and changed:
        model.starts_anew = sorted({*model.starts_anew, *(f"{name}.{n}" for n, _ in layer.named_parameters())})
    return why


def rows_of(held: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """Row of a trained head for each label, by the names of its rows, whatever their case; None where it lacks one."""
    for fold in (str, str.casefold):
        names, wanted = list(map(fold, held)), list(map(fold, labels))
        if len(set(names)) == len(names) and len(set(wanted)) == len(wanted) and set(wanted) <= set(names):
            return [names.index(label) for label in wanted]
    return None


def class_names(config: dict[str, Any]) -> list[str]:
    """Names of the classes of a head in the order of its rows, from the base's config; none where it has none."""
    try:
        by_row = {int(row): str(name) for row, name in (config.get("id2label") or {}).items()}
        if _are_numbers(by_row.values()):
            by_row = {int(row): str(name) for name, row in (config.get("label2id") or {}).items()} or by_row
    except (AttributeError, TypeError, ValueError):  # configs can hold anything
        return []
    return [by_row[row] for row in sorted(by_row)]


def _are_numbers(names: Iterable[str]) -> bool:
    """Whether names are only the numbers of rows: 0, 1, ... or transformers' LABEL_0, LABEL_1, ..."""
    return all(re.fullmatch(r"(label[_ ]?)?\d+", name, re.IGNORECASE) for name in names)
