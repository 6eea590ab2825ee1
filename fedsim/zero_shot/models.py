"""The models that a path stands for, and how each is loaded: as the harness itself loads the exported folder."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsim.analysis.load import experiment_name, find_runs, read_config, read_state
from fedsim.config.tree import expand_path
from fedsim.core.errors import UserError
from fedsim.core.files import check_whole, client_folders, client_models, is_run, model_name, read_json
from fedsim.models import base as bases
from fedsim.models import locate
from fedsim.models.export import BOTTLENECK
from fedsim.models.positions import has_position_table, max_positions

_ADAPTERS = ("adapter_config.json", BOTTLENECK)


@dataclass(frozen=True)
class Candidate:
    """A model to be evaluated.

    Attributes:
        run: experiment and id of its run, or "".
        name: `base`, the path inside the run folder (`global`, `local/site-1`, `central/best`), or what the user wrote.
        base: its base model, as a `model.path`; None if unknown.
        folder: of an adapter or a full model; None for the base model itself.
        home: the run folder.
    """

    run: str
    name: str
    base: str | None
    folder: Path | None
    home: Path | None = None

    @property
    def borrows(self) -> bool:
        """Whether it is its base, or an adapter on it; a full model is loaded by itself."""
        return self.folder is None or _is_adapter(self.folder)

    @property
    def loads(self) -> str:
        """The `model.path` of the weights it needs."""
        return str(self.base if self.borrows else self.folder)


def find_models(
    models: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    which: str = "last",
    only: Sequence[str] | None = None,
    base: bool = True,
    base_path: str | None = None,
) -> list[Candidate]:
    """The models that paths stand for, grouped by base, each group behind its base.

    Args:
        models: run folders, folders of several runs, adapter folders, transformers folders, or any `model.path`.
        which: last | best | both checkpoints of a run.
        only: patterns of names of a run's models, such as `global` or `local/*`; None = all.
        base: also the base models.
        base_path: base model in place of the one that config or adapter names.

    Raises:
        UserError: for a path that is none of these, a run without such models, or one of a classifier.
    """
    if which not in ("last", "best", "both"):
        raise UserError(f"--which: {which!r} is not known; give last, best or both")
    paths = [models] if isinstance(models, (str, os.PathLike)) else list(models)
    if not paths:
        raise UserError("no model given: name at least one run folder or model folder")
    found: dict[str | Path, Candidate] = {}  # each once, by whatever path it was named
    for path in paths:
        for one in _candidates(str(path), which, only, base_path):
            found.setdefault(one.name if one.folder is None else one.folder.resolve(), one)
    groups: dict[str | None, list[Candidate]] = {}
    for one in found.values():
        groups.setdefault(one.base, []).append(one)
    named = [name for name in groups if name is not None]
    out: list[Candidate] = []
    for name, group in groups.items():
        plain = [one for one in group if one.folder is None]  # the user named the base itself
        if name is not None and base and not plain:
            homes = {one.home for one in group}
            run = group[0].run if len(homes) == 1 else ""
            out.append(Candidate(run, "base" if len(named) == 1 else f"base {name}", name, None))
        out += [*plain, *(one for one in group if one.folder is not None)]
    for one in out:
        if one.folder is not None:
            check_whole(one.folder, "leave it out with --only")
    return out


def _candidates(path: str, which: str, only: Sequence[str] | None, base_path: str | None) -> list[Candidate]:
    folder = Path(path).expanduser()
    if len(folder.parts) > 1 and folder.parent.is_dir() and not folder.exists():
        raise UserError(f"no folder {path!r}; give a run folder, or a PEFT or transformers folder")
    if not folder.is_dir():  # tiny, package:, a GGUF file, a hub id; `locate.find` says if it is none
        return [Candidate("", path, path, None)]
    if is_run(folder):
        return _of_run(folder, which, only, base_path)
    if _is_adapter(folder):
        return [Candidate("", path, base_path or _base_of_adapter(folder), folder)]
    if (folder / "config.json").is_file():
        run = next((p for p in folder.resolve().parents if is_run(p)), None)
        known = base_path or (_base_of_run(read_config(run), run) if run is not None else None)
        return [Candidate("", path, known, folder)]
    try:
        runs = find_runs(folder)
    except UserError:
        way = "give a run folder, or a PEFT or transformers folder"
        raise UserError(f"{path}: holds neither a run nor a model; {way}") from None
    return [one for run in runs for one in _of_run(run, which, only, base_path)]


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _ADAPTERS)


def _of_run(run: Path, which: str, only: Sequence[str] | None, base_path: str | None) -> list[Candidate]:
    config = read_config(run)
    task = (config.get("model") or {}).get("task", "causal_lm")
    if task != "causal_lm":
        raise UserError(f"{run}: model.task is {task}; zero-shot tasks need a causal_lm run")
    last = ["global", "central", *client_models(run)]
    best = ["best", *(f"{name}/best" for name in last[1:])]
    wanted = {"last": last, "best": best, "both": [n for pair in zip(last, best, strict=True) for n in pair]}[which]
    there = [n for n in wanted if _is_adapter(run / n) or (run / n / "config.json").is_file()]
    if not there:
        kind = "" if which == "both" else f"{which} "
        raise UserError(f"{run}: holds no {kind}model yet ({read_state(run)}); let the run finish")
    clients = client_folders(run)
    names = {n: model_name(n, clients) for n in there}
    chosen = [n for n in there if only is None or any(fnmatch.fnmatchcase(names[n], p) for p in only)]
    if not chosen:
        raise UserError(
            f"--only: {', '.join(only or [])} fits no model of {run}, which has: {', '.join(names.values())}"
        )
    label = f"{experiment_name(config, run)}/{run.resolve().name}"
    known = base_path or _base_of_run(config, run)
    return [Candidate(label, names[place], known, run / place, run) for place in chosen]


def _base_of_run(config: dict[str, Any], run: Path) -> str:
    return _resolved(str((config.get("model") or {}).get("path") or "tiny"), str(run))


def _base_of_adapter(folder: Path) -> str:
    file = next(folder / name for name in _ADAPTERS if (folder / name).is_file())
    name = read_json(file).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{file}: names no base model; give it with --base-path")
    return _resolved(str(name), str(folder))


def _resolved(text: str, where: str) -> str:
    """A base's name with environment variables put in: run folders keep them as they were written."""
    try:
        return expand_path(text, where)
    except UserError:
        way = "set that variable, or give --base-path"
        raise UserError(f"{where}: its base {text!r} cannot be resolved; {way}") from None


def _own_dtype(source: locate.Source) -> str:
    """The type that `dtype="auto"` means to transformers, and so to the harness: what the model's own files say."""
    if source.gguf:
        return "float32"
    kind = getattr(bases.load_config(source), "dtype", None)
    if kind is None and not source.is_hub:
        from safetensors import safe_open

        with safe_open(min(Path(source.location).glob("*.safetensors")), framework="pt") as handle:
            kinds = (handle.get_tensor(key).dtype for key in handle.keys())  # noqa: SIM118  no mapping
            kind = next((k for k in kinds if k.is_floating_point), None)
    return str(kind or torch.float32).removeprefix("torch.")


def load(path: str, dtype: str, device: torch.device) -> tuple[nn.Module, Any, str]:
    """A whole model on the device, its tokenizer, and the name of its type."""
    source = locate.find(path)
    bases.check_task(source, "causal_lm")
    tokenizer = bases.load_tokenizer(source)
    kind = _own_dtype(source) if dtype == "auto" else dtype
    pad = tokenizer.pad_token_id
    model = bases.load_base(source, task="causal_lm", dtype=kind, labels=None, pad_token_id=pad, seed=0)
    return model.to(device), tokenizer, kind


def longest(model: nn.Module) -> int | None:
    """Tokens of text that fit beside virtual ones if positions are an embedding; None leaves it to the harness.

    The harness knows nothing of virtual tokens: a base with learned positions would look one up that is not there.
    """
    prompt = getattr(model, "peft_config", {}).get("default")
    if prompt is None or not prompt.is_prompt_learning:
        return None
    base = model.get_base_model()
    positions = max_positions(base.config) if has_position_table(base) else None
    return None if positions is None else positions - prompt.num_virtual_tokens
