"""Scoring a run's models on tasks, one after another, with lm-evaluation-harness."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from fedsim.zero_shot.models import Candidate, find_models, load, longest
from fedsim.zero_shot.scores import Evaluation, Result, baselines, scores_of
from fedsim.zero_shot.tasks import TASKS, find_local, load_tasks, origin, write_task_files

CPU_BATCH = 8
EVERY = 60.0  # seconds between two lines
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
    """Score models on zero-shot tasks with lm-evaluation-harness.

    Args:
        models: run folders, folders of several runs, PEFT or transformers folders, or any `model.path`.
        tasks: names of the harness's tasks, groups or tags; one text with commas between them works too.
        data: folder with `hellaswag/`, `piqa/`, `winogrande/` in local files; None: `$FEDSIM_DATA` where that has the
            task, else the hub; "hub": the hub.
        limit: the first so many items of each task; None takes all.
        batch_size: rows a pass; auto: on a GPU what the harness finds to fit, on the CPU 8.
        device: auto | cpu | cuda:0 ...
        dtype: of the base: auto (what its files say, as the harness does), float32, bfloat16, float16, float64.
        which: of a run the last models, those that validation chose (best), or both.
        only: of a run the models whose names fit one of these patterns.
        base: the bases themselves too, as the first row.
        base_path: the base in place of the one that config or adapter name.
        against: the row that the others are compared with: base (each with its own; the default where there is one), best
            (by the mean), or a row's name.
        capitals: begin the last sentence of HellaSwag's text form with a capital letter, as the hub's rows do.
        task_files: keep the local tasks there, for `lm_eval --include_path`.
        progress: show on standard error what goes on.

    Returns:
        The scores: `table()` is a DataFrame, `save()` writes `eval.json` and `eval.csv`.

    Raises:
        UserError: for what the user can put right; unknown tasks, data and models before anything is scored.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "fedsim eval needs lm-evaluation-harness; install it with: pip install lm-eval (the extra: pip install -e '.[eval]')"
        )
    names = list(dict.fromkeys(t.strip() for t in (tasks.split(",") if isinstance(tasks, str) else tasks) if t.strip()))
    if not names:
        raise UserError(f"--tasks: none given; name some, such as {','.join(TASKS)}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit: {limit} items cannot be scored; give a number from 1 up, or leave it out")
    size, place = _batch_size(batch_size), _device(device)
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
    stream = sys.stderr  # bound here: inside `quiet` it is another
    say = (lambda text: print(text, file=stream, flush=True)) if progress else (lambda text: None)
    with tempfile.TemporaryDirectory() as scratch, _harness():
        write_task_files(local, Path(scratch), cache=Path(scratch, "cache"))
        if task_files is not None:
            write_task_files(local, Path(task_files))
        with bases.quiet():
            loaded = load_tasks(names, Path(scratch), local)
        for note in (t.note for t in local.values() if t.note):
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
        "versions": {k: v for k, v in versions().items() if v is not None} | {"lm-eval": _version("lm-eval")},
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
    """Each model's scores, a base loaded once for all its adapters; and what the harness says of the tasks."""
    found: list[Result] = []
    lent: tuple[str, nn.Module, Any, str] | None = None
    results: dict[str, Any] = {}
    for number, one in enumerate(candidates, 1):
        began = time.monotonic()
        say(f"{number}/{len(candidates)}  {' '.join(filter(None, (one.run, one.name)))}")
        if lent is not None and not any(c.borrows and c.loads == lent[0] for c in candidates[number - 1 :]):
            lent = None  # gone before the next one comes
            _free(device)
        if one.borrows:
            if lent is None:
                lent = (one.loads, *load(one.loads, dtype, device))
            _, model, tokenizer, kind = lent
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
    """A line now and then where there is no terminal for the harness's bars: rows done and the time left."""

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
    size = CPU_BATCH if size == "auto" and on_cpu else size  # there every size fits, and trying them takes minutes
    try:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=longest(model))
        results = evaluate(lm, loaded, limit=limit)
    except AssertionError as error:
        if str(error):
            raise
        # Of two assertions without a text, the one that a data set can break: contexts are cut, answers never.
        raise UserError(
            "--tasks: an answer is longer than what this model takes; give a smaller --limit, or another base"
        ) from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"--batch-size: {size} did not fit in memory; give a smaller number") from None
    return results, size if size != "auto" else sorted(set(lm.batch_sizes.values()))


@contextmanager
def _harness() -> Iterator[None]:
    """The harness's own seeds for what draws (0 for Python, 1234 for NumPy and torch), and none of its log lines; the
    caller's generators are as they were afterwards."""
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


def _batch_size(value: int | str) -> int | str:
    text = str(value)
    if text == "auto" or (text.isdigit() and int(text) > 0):
        return text if text == "auto" else int(text)
    raise UserError(f"--batch-size: {value!r} is neither auto nor a number from 1 up")


def _device(name: str) -> torch.device:
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        return torch.device(cuda[0] if cuda else "cpu")
    name = "cuda:0" if name == "cuda" else name
    if name not in ("cpu", *cuda):
        raise UserError(f"--device: {name!r} is not on this machine, which has: {', '.join(['cpu', *cuda])}")
    return torch.device(name)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
