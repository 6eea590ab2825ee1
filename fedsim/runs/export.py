"""Models as folders that PEFT or transformers read, with a card of what each scored."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.files import OWN
from fedsim.core.params import Layout
from fedsim.models import export, fold
from fedsim.models.card import write_card
from fedsim.runs.build import Parts
from fedsim.runs.folder import RunFolder
from fedsim.runs.worker_spec import WorkerSpec


def save_model(
    parts: Parts,
    folder: RunFolder,
    spec: WorkerSpec,
    model: nn.Module,
    layout: Layout,
    flat: Tensor | None,
    name: str,
    server: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model with these parameters, `[N]`, into a folder of the run; None = with those it has."""
    exp = parts.exp
    full = exp.adapter.name == "none"
    for key, view in ({} if flat is None else layout.views(flat)).items():
        parameter = model.get_parameter(key)
        if full:
            parameter.data = view  # a copy would take the memory of a second model
        else:
            parameter.data.copy_(view)
    if full:  # transformers copies tensors that share one block of memory
        for parameter in model.parameters():
            parameter.data = torch.from_dlpack(parameter.data)
    place = folder.path / name
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    # Clients can be many and their adapters small: a tokenizer in each would be most of what is written.
    small = name.startswith(("local/", f"{OWN}/")) and not full
    try:
        export.save(
            model,
            beside,
            name=exp.adapter.name,
            settings=spec.settings,
            base_name=parts.model.reference,
            tokenizer=None if small else parts.tokenizer,
            shard_mb=exp.checkpoint.shard_mb,
        )
        fold.export(model, beside, server or {})
        folder.replace(name, beside)
    except BaseException:  # a full disk gets its space back
        shutil.rmtree(beside, ignore_errors=True)
        raise


def write_cards(
    parts: Parts,
    folder: RunFolder,
    mode: str,
    exported: Mapping[str, tuple[str | None, int]],
    metrics: Iterable[dict[str, Any]],
    owns: bool = False,
) -> None:
    """Write a model card into each exported folder.

    Args:
        parts: of the run.
        folder: of the run.
        mode: whose models they are.
        exported: folder -> the client whose model it is (None: no client's) and the model's round.
        metrics: of the mode, on validation and test examples.
        owns: clients of the mode have models of their own: the scores of the global model are `shared_NAME`, theirs `own_NAME`.
    """
    scores: dict[tuple[str | None, int], dict[tuple[str, str], float]] = {}
    for m in metrics:  # of two of a round the later is the global model's
        scores.setdefault((m["client"], m["round"]), {})[m["split"], m["name"]] = m["value"]
    examples = len(parts.tokens["train"].kept())
    for place, (client, last) in exported.items():
        round = max((r for c, r in scores if c == client and r <= last), default=last)  # a client may have sat some out
        title = f"{mode} model{f' of {client}' if client else ''} after round {round}"
        scored = scores.get((client, round), {})
        if owns:
            mine = "shared_" if client is None else "own_"
            scored = {(s, n.removeprefix(mine)): v for (s, n), v in scored.items() if n.startswith(mine)}
        found = [(*key, value) for key, value in scored.items() if ":" not in key[1]]
        note = "Parameters that stay with the clients have their initial value here." if owns and client is None else ""
        about = {"title": title, "scores": found, "examples": examples, "note": note}
        write_card(folder.path / place, parts.exp.to_dict(), parts.model, **about)
