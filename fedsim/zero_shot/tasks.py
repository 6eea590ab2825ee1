"""Tasks of lm-evaluation-harness with local files in place of the hub's data sets.

The task definition (prompt, choices, preprocessing, metrics) is lm-eval's own; only the data files are replaced.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.core.errors import UserError
from fedsim.core.files import write_atomic

TASKS = ("hellaswag", "piqa", "winogrande")


@dataclass(frozen=True)
class LocalTask:
    """A task's examples in the hub's columns, from a local file."""

    file: Path
    rows: list[dict[str, Any]]
    note: str | None = None


_FORMS = {
    "hellaswag": (".jsonl", ".parquet", ".txt"),
    "piqa": (".jsonl", ".parquet"),
    "winogrande": (".jsonl", ".parquet"),
}
_COLUMNS = {
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
}


def local_task(task: str, data: Path, capitals: bool = False) -> LocalTask | None:
    """A task's validation examples from `data/<task>/`, or None if that folder does not exist.

    Args:
        task: hellaswag | piqa | winogrande.
        data: the folder around the tasks' folders.
        capitals: begin the last sentence of HellaSwag's text form with a capital letter; see `_hellaswag_text`.

    Raises:
        UserError: for a folder without such a file or with several, or an invalid file.
    """
    folder = data / task
    if not folder.is_dir():
        return None
    forms = _FORMS[task]
    held_out = [f for f in sorted(folder.iterdir()) if f.suffix in forms and not re.search("train|test", f.name)]
    ranks = [(not re.search("val|dev", f.name), forms.index(f.suffix)) for f in held_out]
    files = [f for f, rank in zip(held_out, ranks, strict=True) if rank == min(ranks)]
    if len(files) != 1:
        why = f"holds {', '.join(f.name for f in files)}" if files else "holds no validation file"
        raise UserError(f"{folder}: {why}; keep one there, such as validation.jsonl ({', '.join(forms)})")
    file = files[0]
    if file.suffix == ".txt":
        return LocalTask(file, *_hellaswag_text(file, capitals))
    rows = _read(file)
    labels = file.with_name(f"{file.stem}-labels.lst")
    if task == "piqa" and labels.is_file():
        answers = labels.read_text(encoding="utf-8").split()
        if len(answers) != len(rows):
            why = f"{len(answers)} labels, but {file.name} has {len(rows)} rows"
            raise UserError(f"{labels}: {why}; use files of one set")
        rows = [{**row, "label": answer} for row, answer in zip(rows, answers, strict=True)]
    return LocalTask(file, [_checked(task, row, f"{file}: row {i + 1}") for i, row in enumerate(rows)])


def _read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return [
            {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}
            for row in pd.read_parquet(file).to_dict("records")
        ]
    rows = []
    for number, line in enumerate(_lines(file), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{file}: line {number} is no JSON object; keep one example per line")
        rows.append(row)
    return rows


def _lines(file: Path) -> list[str]:
    """Lines by line feeds alone - texts may hold other separators - without blank ones at the end."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start}); convert it") from None
    return text.rstrip("\n").split("\n") if text.strip() else []


def _checked(task: str, row: dict[str, Any], where: str) -> dict[str, Any]:
    """The columns of an example in the hub's types."""
    for column in _COLUMNS[task]:
        if column not in row:
            raise UserError(f"{where} has no {column!r}; {task} needs: {', '.join(_COLUMNS[task])}")
    out = {column: row[column] for column in _COLUMNS[task]}
    key = "answer" if task == "winogrande" else "label"
    answers = {"hellaswag": "0123", "piqa": "01", "winogrande": "12"}[task]
    if str(out[key]) not in [*answers]:
        raise UserError(f"{where}: {key} is {out[key]!r}, not one of {', '.join(answers)}; use the validation set")
    out[key] = int(out[key]) if task == "piqa" else str(out[key])
    texts = [out[c] for c in _COLUMNS[task] if c not in (key, "endings")]
    endings = out.get("endings", [""] * 4)
    if not all(isinstance(t, str) for t in (*texts, *endings)) or len(endings) != 4:
        raise UserError(f"{where}: {', '.join(_COLUMNS[task])} must be texts{', 4 endings' * (task == 'hellaswag')}")
    if task == "winogrande" and "_" not in out["sentence"]:
        raise UserError(f"{where}: the sentence has no '_' to put the options in; use the validation set")
    return out


def _hellaswag_text(file: Path, capitals: bool) -> tuple[list[dict[str, Any]], str | None]:
    """HellaSwag as preprocessed text: six lines per example, `activity_label: ctx`, the label and four endings.

    The text has lost where `ctx_b`, the beginning of the sentence to be completed, starts; the harness writes its first
    letter as a capital. Every ctx that does not end a sentence ends in one, so with `capitals` it is cut behind the last
    full stop, question or exclamation mark, and the prompts equal those of the hub; without, they are the file's lines.

    Returns:
        Rows such that the harness's own preprocessing gives these prompts and endings, and what to tell the user.
    """
    lines = [line.removesuffix("\r") for line in _lines(file)]
    if len(lines) % 6:
        raise UserError(f"{file}: {len(lines)} lines, but an item has 6: activity and context, label, 4 endings")
    rows, cut = [], 0
    for start in range(0, len(lines), 6):
        context, label, *endings = lines[start : start + 6]
        activity, colon, ctx = _kept(context).partition(": ")
        if not colon:
            raise UserError(f"{file}: line {start + 1} has no ': ' between activity and context; keep 6 lines an item")
        last = re.fullmatch(r"(.*[.!?][\"')]* *) ([^.!?]*[^.!?\"') ])", ctx)
        cut += last is not None
        ctx_a, ctx_b = last.groups() if last is not None and capitals else (ctx, "")
        row = {"activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b, "label": label.strip()}
        row["endings"] = [_kept(e) for e in endings]
        rows.append(_checked("hellaswag", row, f"{file}: item {start // 6 + 1}"))
    return rows, None if capitals or not cut else (
        f"hellaswag: {file.name} is used as it is; the hub's rows begin the last sentence of {cut:,} of {len(rows):,} "
        "prompts with a capital letter, --capitals does too"
    )


def _kept(text: str) -> str:
    """A text whose runs of blanks survive the harness's preprocessing, which joins blanks in pairs."""
    return re.sub(r" {2,}", lambda blanks: blanks[0] * 2, text)


def write_task_files(tasks: dict[str, LocalTask], folder: Path, cache: Path | None = None) -> None:
    """Write each task for the harness: NAME.jsonl, and NAME.yaml that includes the harness's own definition.

    `lm_eval --include_path FOLDER --tasks NAME` runs the same.

    Args:
        tasks: by name.
        folder: made if it is not there.
        cache: where `datasets` keeps its copy; None: its usual place.
    """
    for name, task in tasks.items():
        file = folder.resolve() / f"{name}.jsonl"
        write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in task.rows).encode())
        config = {
            "include": _definition(name),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(file)}, **({"cache_dir": str(cache)} if cache else {})},
            "training_split": None,
        }
        write_atomic(file.with_suffix(".yaml"), (json.dumps(config, indent=2) + "\n").encode())  # JSON is YAML


def _definition(task: str) -> str:
    """The harness's own file of one of our three tasks."""
    folder = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks" / task
    return str(folder / {"winogrande": "default.yaml"}.get(task, f"{task}.yaml"))


def load_tasks(names: list[str], folder: Path, local: Iterable[str]) -> dict[str, Any]:
    """The harness's tasks, with files of `folder` in place of the hub's for those that are local."""
    from lm_eval.tasks import TaskManager

    local = set(local)
    places = {n: str(folder / f"{n}.yaml") if n in local else _definition(n) if n in TASKS else n for n in names}
    others = [n for n in names if n not in TASKS and not Path(n).is_file()]
    manager = TaskManager(include_defaults=bool(others))  # reading the harness's thousands of definitions takes long
    for name in others:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"--tasks: {name!r} is not known to the harness; {hint}`lm_eval ls tasks` lists them")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            one = manager.load(places[name])
        except Exception as error:  # a dozen kinds, by data set and transport, with the same meaning for the user
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            way = "check the network (HF_HUB_OFFLINE must not be 1)" + (
                f", or give --data FOLDER with {name}/validation.jsonl" if name in TASKS else ""
            )
            raise UserError(f"--tasks: the data of {name!r} could not be loaded from the hub ({why}); {way}") from None
        for key, value in one.items():
            loaded[key] |= value
    for task in loaded["tasks"].values():  # as the harness's command line does
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return loaded


def find_local(names: list[str], data: str | os.PathLike[str] | None, capitals: bool) -> dict[str, LocalTask]:
    """The tasks that are read from local files.

    Args:
        names: of the tasks asked for.
        data: the folder that the user named; None: `$FEDSIM_DATA`, for the tasks it has; "hub": none.
        capitals: see `local_task`.

    Raises:
        UserError: if the folder that the user named lacks a task, and as `local_task`.
    """
    given = data if data is not None else os.environ.get("FEDSIM_DATA")
    if not given or str(given) == "hub":
        return {}
    root = Path(given).expanduser()
    if data is not None and not root.is_dir():
        raise UserError(f"--data: no folder {str(root)!r}; give one with {', '.join(f'{t}/' for t in TASKS)}, or hub")
    out = {}
    for name in names:
        task = local_task(name, root, capitals) if name in TASKS else None
        if task is not None:
            if not task.rows:
                raise UserError(f"{task.file}: holds no row; use the validation set")
            out[name] = task
        elif data is not None and name in TASKS:
            raise UserError(f"--data: {str(root)!r} has no folder {name}/; put validation.jsonl there, or give hub")
    return out


def origin(task: LocalTask | None) -> dict[str, Any]:
    """The origin of a task's examples."""
    if task is None:
        return {"from": "hub"}
    return {"from": task.file.name, "sha256": hashlib.sha256(task.file.read_bytes()).hexdigest()}
