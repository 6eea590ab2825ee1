"""Evaluation of models on tasks, one after another, with lm-evaluation-harness."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedsim.core.errors import UserError, is_out_of_memory
from fedsim.core.inductor import without_folder
from fedsim.models import base as bases
from fedsim.models import locate, sharing
from fedsim.models.export import load_adapter
from fedsim.runs.environment import versions
from fedsim.runs.resolve import device_named
from fedsim.zero_shot.models import Candidate, find_models, load, longest
from fedsim.zero_shot.scores import Evaluation, Result, baselines, scores_of
from fedsim.zero_shot.tasks import TASKS, find_local, load_tasks, origin, write_task_files

CPU_BATCH = 8
EVERY = 60.0  # seconds between two progress lines
_DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")


@without_folder()
def evaluate_zero_shot(
    models: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tasks: str | Sequence[str] = TASKS,
    *,
    data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int | str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    which: str = "last",
    only: Sequence[str] | None = None,
    base: bool = True,
    base_path: str | None = None,
    against: str | None = None,
    capitals: bool = False,
    task_files: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate models on zero-shot tasks with lm-evaluation-harness.

    Args:
        models: run folders, folders of several runs, PEFT or transformers folders, or any `model.path`.
        tasks: names of the harness's tasks, groups or tags; or one text with commas between them.
        data: folder with `hellaswag/`, `piqa/`, `winogrande/` in local files; None: `$FEDSIM_DATA` for the tasks it has,
            else the hub; "hub": the hub.
        limit: evaluate only the first N examples of each task.
        batch_size: examples per batch; auto: on a GPU what the harness finds to fit, on the CPU 8.
        device: auto | cpu | cuda:0 ...
        dtype: of the base: auto (the dtype of the checkpoint, as in the harness), float32, bfloat16, float16, float64.
        which: last | best (by validation) | both checkpoints of a run.
        only: evaluate only models of a run whose names match one of these patterns.
        base: also evaluate the base models, first.
        base_path: base model in place of the one that config or adapter names.
        against: the model that the others are compared with: base (each with its own; the default if there is one), best
            (by the mean), or a row's name.
        capitals: begin the last sentence of HellaSwag's text form with a capital letter, as the hub's examples do.
        task_files: folder in which to keep the local tasks, for `lm_eval --include_path`.
        progress: show progress on standard error.

    Returns:
        The scores: `table()` is a DataFrame, `save()` writes `eval.json` and `eval.csv`.

    Raises:
        UserError: for a user's mistake; unknown tasks, data and models are found before the evaluation.
    """
    if importlib.util.find_spec("lm_eval") is None:
        way = "install it with: pip install lm-eval (the extra: pip install -e '.[eval]')"
        raise UserError(f"fedsim eval needs lm-evaluation-harness; {way}")
    names = list(dict.fromkeys(t.strip() for t in (tasks.split(",") if isinstance(tasks, str) else tasks) if t.strip()))
    if not names:
        raise UserError(f"--tasks: none given; name some, such as {','.join(TASKS)}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit: must be >= 1 (got {limit}); leave it out for all examples")
    if not re.fullmatch("auto|0*[1-9][0-9]*", str(batch_size)):
        raise UserError(f"--batch-size: {batch_size!r} is neither auto nor a number from 1 up")
    size, place = "auto" if batch_size == "auto" else int(batch_size), device_named(device)
    if dtype not in _DTYPES:
        raise UserError(f"--dtype: {dtype!r} is not known; give one of {', '.join(_DTYPES)}")
    candidates = find_models(models, which=which, only=only, base=base, base_path=base_path)
    against_rows = baselines(candidates, against)
    for one in {c.loads: c for c in candidates}.values():
        try:
            bases.check_task(locate.find(one.loads), "causal_lm")
        except UserError as error:
            if not one.borrows or one.name == one.base:
                raise
            raise UserError(f"{one.folder or one.run}: its base cannot be used: {error}; or give --base-path") from None
    local = find_local(names, data, capitals)
    stream = sys.stderr  # `quiet` replaces it
    say = (lambda text: print(text, file=stream, flush=True)) if progress else (lambda text: None)
    with tempfile.TemporaryDirectory() as scratch, _harness():
        write_task_files(local, Path(scratch), cache=Path(scratch, "cache"))
        if task_files is not None:
            write_task_files(local, Path(task_files))
        with bases.quiet():
            loaded = load_tasks(names, Path(scratch), local)
        for note in filter(None, (task.note for task in local.values())):
            say(note)
        found, info = _score_all(candidates, loaded, limit, size, place, dtype, say, progress and stream.isatty())
    done = Evaluation(found, against_rows or [None] * len(found))
    if against_rows is None:
        done.against_best()
    done.settings = {
        "tasks": {n: about | origin(local.get(n)) for n, about in info.items()},
        "limit": limit,
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "versions": {k: v for k, v in versions().items() if v is not None} | {"lm-eval": version("lm-eval")},
    }
    return done


def _score_all(
    candidates: list[Candidate],
    loaded: dict[str, Any],
    limit: int | None,
    size: int | str,
    device: torch.device,
    dtype: str,
    say: Callable[[str], None],
    bars: bool,
) -> tuple[list[Result], dict[str, dict[str, Any]]]:
    """The scores of each model, with a base loaded once for all its adapters; and the harness's facts about the tasks."""
    found: list[Result] = []
    shared: tuple[str, nn.Module, Any, str] | None = None  # the base that adapters are put on
    results: dict[str, Any] = {}
    for number, one in enumerate(candidates, 1):
        began = time.monotonic()
        say(f"{number}/{len(candidates)}  {' '.join(filter(None, (one.run, one.name)))}")
        if shared is not None and not any(c.borrows and c.loads == shared[0] for c in candidates[number - 1 :]):
            shared = None  # free its memory before the next one is loaded
            _free(device)
        if one.borrows:
            if shared is None:
                shared = (one.loads, *load(one.loads, dtype, device))
            _, model, tokenizer, kind = shared
            if one.folder is not None:
                model = load_adapter(sharing.borrow(model), one.folder).to(device)
        else:
            model, tokenizer, kind = load(one.loads, dtype, device)
        hook = None if bars else model.register_forward_pre_hook(_Lines(loaded, say), with_kwargs=True)
        with nullcontext() if bars else bases.quiet():
            results, used = _score(model, tokenizer, loaded, limit, size)
        if hook is not None:
            hook.remove()  # the base is used again
        del model, hook
        _free(device)
        found.append(Result(one, scores_of(results), time.monotonic() - began, {"dtype": kind, "batch_size": used}))
    return found, {
        name: {
            "version": results["versions"].get(name),
            "few_shot": results["n-shot"].get(name),
            "items": counts["effective"],
            "of": counts["original"],
        }
        for name, counts in results["n-samples"].items()
    }


class _Lines:
    """Progress lines if there is no terminal for the harness's progress bars: answers done and the time left."""

    def __init__(self, loaded: dict[str, Any], say: Callable[[str], None]) -> None:
        self._tasks, self._say = loaded["tasks"].values(), say
        self._began = self._last = time.monotonic()
        self._rows = 0

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._rows and now - self._last > EVERY:
            total = sum(len(task.instances) for task in self._tasks)
            left = (now - self._began) / self._rows * max(0, total - self._rows)
            self._say(f"      {self._rows:,} of {total:,} answers, about {left / 60:.0f} min left")
            self._last = now
        self._rows += len(args[0] if args else kwargs["input_ids"])


def _score(
    model: nn.Module, tokenizer: Any, loaded: dict[str, Any], limit: int | None, size: int | str
) -> tuple[dict[str, Any], int | list[int]]:
    """The harness's results of one model, and the batch sizes it used."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    on_cpu = next(model.parameters()).device.type == "cpu"
    size = CPU_BATCH if size == "auto" and on_cpu else size  # on the CPU every size fits, and trying them takes minutes
    try:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=longest(model))
        results = evaluate(lm, loaded, limit=limit)
    except AssertionError as error:
        if str(error):
            raise
        # One of two assertions without a text; the other cannot fail here. Contexts are truncated, answers never.
        way = "give a smaller --limit, or another base"
        raise UserError(f"--tasks: an answer is longer than the model's maximum length; {way}") from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"--batch-size: {size} did not fit in memory; give a smaller number") from None
    return results, size if size != "auto" else sorted(set(lm.batch_sizes.values()))


@contextmanager
def _harness() -> Iterator[None]:
    """The harness's own random seeds (0 for Python, 1234 for NumPy and torch), without its log lines; restores the caller's
    generators."""
    logger = logging.getLogger("lm_eval")
    level, python, numpy = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    random.setstate(random.Random(0).getstate())
    np.random.set_state(np.random.RandomState(1234).get_state())
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(1234)
            yield
    finally:
        logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
