"""Instruction data: Alpaca, Dolly, OASST1, and any file of prompts with answers or of chats, as examples with a prompt and a response.

Cut and composed as in the published runs on three instruction sets (NVFlare 2.4.0, supervised fine-tuning). For each data
set by itself: its examples are shuffled once, by NumPy's legacy generator with `split_seed`, which is what pandas'
`sample(frac=1, random_state=0)` draws; the first `int(test x n)` of them test, the next `int(validation x n)` validate, the
rest train. An example is an instruction with or without a context. The prompt is the instruction; with a context that is not
blank it is both, stripped, a blank line between them, in random order.

Deviation: the published scripts draw that order from an unseeded generator; here it is a function of `order_seed` and the
example's own texts, whatever stands beside the example and wherever in the file it stands.

Sources: Taori et al., Stanford Alpaca, 2023; Conover et al., databricks-dolly-15k, 2023; Köpf et al., OpenAssistant
Conversations, 2023 (arXiv:2304.07327).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.data.files import Form, header_hint, read_table
from fedsim.data.hub import load_hub, looks_like_hub_id
from fedsim.data.labels import missing, sound
from fedsim.data.memory import table_in
from fedsim.data.sources import SPLITS, Source, Split

TEMPLATE = "{prompt}\n\n{response}"
ROLES = {"prompt_response": ("prompt", "response", "context"), "messages": ("messages",)}  # what a user may rename
_ANY = ("category", "user_id")  # of a user's file too, where they are there
_OWN = ("prompt", "response", "source", "category", "user_id", "characters", "length", "instruction", "context")

Row = dict[str, Any]  # instruction, context, response; where there are any category, user_id, messages, extra
Record = dict[str, Any]  # column -> value, as a file holds it
Reader = Callable[
    [list[Record], dict[str, str], str, dict[str, int]], list[list[Row]]
]  # (.., role -> column, turns, notes)


def instructions(
    *,
    sources: Sequence[dict[str, Any]],
    columns: dict[str, str],
    validation: float,
    test: float,
    split_seed: int,
    order_seed: int,
    turns: str,
    length_classes: int,
    validation_rows: int | None = None,
    test_rows: int | None = None,
) -> Source:
    """One or several instruction data sets, each cut by itself, end to end in the order in which they are given.

    The columns of a row: `prompt`, `response`; `source`, its data set's name; `category`, of Dolly and of files that have
    one, else the data set's name; `user_id`, who wrote the reply (OASST1, files that have one), else None; `characters` of
    prompt and response together; `length`, the class of that number, `0012-0231` being all examples of 12 to 231 characters;
    `instruction` and `context` apart. A user's file keeps its other columns. Where a data set is of chats, `messages`
    holds the turns before the answer, None for the examples of the others.

    Args:
        sources: for each data set `format` (alpaca, dolly, oasst1, prompt_response, messages), `path` (a file, a data set
            folder or a hub id, or a list of them) and optionally `name`, `columns`, `subset` and `split` (of a hub id).
        columns: role -> column for the user's files that do not name their own: prompt, response, context, messages,
            category, user_id.
        validation, test: fractions of each data set, rounded down to whole examples.
        split_seed: of the shuffle.
        order_seed: of the order of instruction and context.
        turns: of a chat of several assistant turns, `last` makes one example, whose answer is the last of them, `every` a
            example for each; what follows the answer is left out. All examples of a chat are in one split.
        length_classes: classes of about equal size into which the examples are divided by length.
        validation_rows, test_rows: at most so many examples of the split, see `_fewer`; nothing else changes. None = all.

    Raises:
        UserError: for a file that cannot be read, lacks a column or holds no example, or a validation split without an example.
    """
    cut: dict[str, list[Row]] = {name: [] for name in SPLITS}
    notes: dict[str, int] = {}
    for i, entry in enumerate(sources):
        name = entry.get("name") or entry["format"]
        examples = _examples(entry, f"data.sources[{i}]", columns, turns, notes)
        for split, picked in _cut(len(examples), validation, test, split_seed).items():
            cut[split] += [{**row, "source": name} for k in picked for row in examples[k]]
    if not cut["validation"]:
        counts = f"{len(cut['train'])} rows train, {len(cut['test'])} test"
        raise UserError(
            f"data.validation: {validation!r} of each data set, rounded down, is no row ({counts}); raise it"
        )
    for row in (r for rows in cut.values() for r in rows):
        row["prompt"] = prompt_of(row["instruction"], row["context"], order_seed)
        row["characters"] = len(row["prompt"]) + len(row["response"])
    _name_lengths([r for rows in cut.values() for r in rows], length_classes)
    for split, most in (("validation", validation_rows), ("test", test_rows)):
        cut[split] = cut[split] if most is None else _fewer(cut[split], most)
    extra = sorted({c for rows in cut.values() for r in rows for c in r.get("extra", ())})
    chats = any(r.get("messages") is not None for rows in cut.values() for r in rows)
    splits = {name: Split(_columns(rows, extra, chats), None) for name, rows in cut.items()}
    return Source(splits, None, TEMPLATE, None, notes)


def conversations(split: Split) -> list[tuple[list[dict[str, str]], str]]:
    """(turns before the answer, answer) of each example; an example that is no chat is one turn of the user's."""
    n = len(split)
    messages = split.columns.get("messages", [None] * n)
    prompts, responses = split.columns["prompt"], split.columns["response"]
    return [(messages[i] or [{"role": "user", "content": prompts[i]}], responses[i]) for i in range(n)]


# ------------------------------------------------------------------------------------------------ examples


def _cut(n: int, validation: float, test: float, seed: int) -> dict[str, np.ndarray]:
    """Numbers of the examples of each split, in the shuffled order."""
    order = np.random.RandomState(seed).permutation(n)
    first, second = int(n * test), int(n * test) + int(n * validation)
    return {"train": order[second:], "validation": order[first:second], "test": order[:first]}


def _fewer(rows: list[Row], most: int) -> list[Row]:
    """`most` examples of a split, a random sample by the shuffle before the cut: of each data set the first in its shuffled order.

    A data set's share is in proportion to its examples, rounded by largest remainder (at a tie the set named first), so that
    the mean over the examples kept estimates that over all of them.
    """
    if most >= len(rows):
        return rows
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["source"]] = sizes.get(row["source"], 0) + 1
    shares = {name: most * size // len(rows) for name, size in sizes.items()}
    left = sorted(sizes, key=lambda name: -(most * sizes[name] % len(rows)))
    for name in left[: most - sum(shares.values())]:
        shares[name] += 1
    out = []
    for row in rows:
        shares[row["source"]] -= 1
        if shares[row["source"]] >= 0:
            out.append(row)
    return out


def prompt_of(instruction: str, context: str, seed: int) -> str:
    if not context.strip():
        return instruction
    if not instruction.strip():
        return context.strip()
    parts = [instruction.strip(), context.strip()]
    if stream(seed, "order", instruction, context).integers(2):
        parts.reverse()
    return "\n\n".join(parts)


def _name_lengths(rows: list[Row], classes: int) -> None:
    """Give each example its `length`: the range of characters of its class, padded with zeros so that text sorts as numbers."""
    lengths = np.array([r["characters"] for r in rows])
    # Examples of equal length are of one class, so many of one length make fewer classes; no more than there are examples.
    classes = min(classes, len(lengths))
    borders = np.quantile(lengths, np.arange(1, classes) / classes, method="lower")
    number = np.searchsorted(np.unique(borders), lengths, side="left")
    width = len(str(lengths.max()))
    names = {}
    for c in np.unique(number):
        own = lengths[number == c]
        names[int(c)] = f"{own.min():0{width}d}-{own.max():0{width}d}"
    for row, c in zip(rows, number.tolist(), strict=True):
        row["length"] = names[c]


def _columns(rows: list[Row], extra: list[str], chats: bool) -> dict[str, list[Any]]:
    out = {name: [r.get(name) for r in rows] for name in _OWN}
    out["category"] = [r["source"] if r.get("category") is None else r["category"] for r in rows]
    out |= {name: [r.get("extra", {}).get(name) for r in rows] for name in extra}
    return out | {"messages": [r.get("messages") for r in rows]} if chats else out


# ------------------------------------------------------------------------------------------------ formats


def _examples(
    entry: dict[str, Any], at: str, columns: dict[str, str], turns: str, notes: dict[str, int]
) -> list[list[Row]]:
    """What of a data set goes into a split together: one example, or those of a chat."""
    kind = entry["format"]
    needs, knows, read = _FORMATS[kind]
    paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
    key = f"{at}.columns" if entry.get("columns") else "data.columns"
    given = (entry.get("columns") or columns) if kind in ROLES else {}
    names = {role: given.get(role, role) for role in (*needs, *knows)}
    records = []
    for j, path in enumerate(paths):
        place = f"{at}.path[{j}]" if isinstance(entry["path"], list) else f"{at}.path"
        wanted = None if kind in ROLES else {*needs, *knows}
        there, rows = _records(path, place, at, entry, wanted)
        for role in names:
            if role in given and given[role] not in there:
                raise UserError(
                    f"{key}.{role}: {given[role]!r} is no column of {path!r}, which has: {', '.join(there)}{header_hint(path)}"
                )
        lacking = [names[role] for role in needs if names[role] not in there]
        if lacking:
            way = "name its columns by data.columns" if kind in ROLES else "or give format: prompt_response and columns"
            raise UserError(
                f"{at}: {path!r} has no column {lacking[0]!r}, which format {kind} needs; it has: {', '.join(there)}{header_hint(path)}; {way}"
            )
        _check_cells(rows, [c for role, c in names.items() if role != "messages"], place, path)
        if kind == "messages":
            for i, r in enumerate(rows, 1):
                r[names["messages"]] = _turns(r.get(names["messages"]), f"{place}: in {path!r} row {i}")
        records += rows
    examples = read(records, names, turns, notes)
    if not examples:
        raise UserError(f"{at}.path: {entry['path']!r} holds no English assistant reply of rank 0 to a prompt in it")
    return examples


def _records(
    path: str, place: str, at: str, entry: dict[str, Any], wanted: set[str] | None
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and records of a file or of examples in memory, or of the splits of a data set of the hub."""
    file = Path(path).expanduser()
    if table_in(path, place) is not None or file.is_file():
        for key in ("subset", "split"):
            if entry.get(key):
                raise UserError(f"{at}.{key}: {entry[key]!r} has no use for the file {path!r}; it is for hub ids")
        held = read_table(
            path, place, Form(**{key: entry[key] for key in (f.name for f in fields(Form)) if key in entry})
        )
        return held.columns, held.records()
    if not file.is_dir() and not looks_like_hub_id(path):
        raise UserError(
            f"{place}: {path!r} does not exist; give a .json, .jsonl, .parquet, .csv or .tsv file, or a hub id"
        )
    data = load_hub(path, entry.get("subset"), place)
    there, records = [], []
    for name in (entry.get("split") or "train").split("+"):
        if name not in data:
            raise UserError(f"{at}.split: {path!r} has no split {name!r}; it has: {', '.join(data)}")
        rows = data[name]
        there = list(rows.column_names)
        records += (rows if wanted is None else rows.select_columns([c for c in there if c in wanted])).to_list()
    return there, records


def _check_cells(records: list[Record], columns: list[str], place: str, path: str) -> None:
    """Whether cells hold text, a number or nothing; no list or object, and whole characters."""
    for column in columns:
        for row, record in enumerate(records, 1):
            value = record.get(column)
            if isinstance(value, (dict, list, bytes)) or (isinstance(value, str) and not sound(value)):
                shown = str(value)[:60]
                raise UserError(
                    f"{place}: row {row} of {path!r} has {shown!r} in the column {column!r}, which is no text; write text in whole characters"
                )


def _text(record: Record, column: str) -> str:
    value = record.get(column)
    return "" if missing(value) else str(value)


def _tags(record: Record, names: dict[str, str]) -> Row:
    """Category and user, where the format knows them and the record has them."""
    found = {role: record.get(names[role]) for role in _ANY if role in names}
    whole = isinstance(found.get("user_id"), int) and not isinstance(found["user_id"], bool)
    return {
        role: None if missing(v) or not str(v).strip() else v if role == "user_id" and whole else str(v)
        for role, v in found.items()
    }


def _extra(record: Record, names: dict[str, str]) -> Row:
    """A user's further columns; those that would stand in the place of one of ours are left out."""
    taken = {*names.values(), *_OWN, "messages"}
    return {"extra": {str(k): None if missing(v) else v for k, v in record.items() if k not in taken}}


def _pairs(instruction: str, context: str, response: str, own: bool = False) -> Reader:
    """Reads an example from each record, whose texts stand under these roles."""
    roles = {"instruction": instruction, "context": context, "response": response}

    def read(records: list[Record], names: dict[str, str], turns: str, notes: dict[str, int]) -> list[list[Row]]:
        texts = [{k: _text(r, names[role]) for k, role in roles.items()} | _tags(r, names) for r in records]
        return [[row | (_extra(r, names) if own else {})] for row, r in zip(texts, records, strict=True)]

    return read


def _oasst1(records: list[Record], names: dict[str, str], turns: str, notes: dict[str, int]) -> list[list[Row]]:
    """Each English assistant reply of rank 0 with the text of the message it answers, its direct parent."""
    by_id = {r["message_id"]: r for r in records}
    out = []
    for r in records:
        best = str(r["rank"]) in ("0", "0.0")  # beside missing ranks, whole numbers may come as floats
        if r["role"] != "assistant" or r["lang"] != "en" or not best:
            continue
        parent = by_id.get(r["parent_id"])
        if parent is None:
            notes["replies_without_parent"] = notes.get("replies_without_parent", 0) + 1
            continue
        row = {"instruction": _text(parent, "text"), "context": "", "response": _text(r, "text")}
        out.append([{**row, **_tags(r, names)}])
    return out


def _chats(records: list[Record], names: dict[str, str], turns: str, notes: dict[str, int]) -> list[list[Row]]:
    out = []
    for r in records:
        chat = r[names["messages"]]
        answers = [k for k, turn in enumerate(chat) if turn["role"] == "assistant"] or [len(chat)]
        rows = []
        for k in answers if turns == "every" else answers[-1:]:
            # Without a chat template the turns before the answer are the prompt, a blank line between them.
            said = "\n\n".join(t["content"] for t in chat[:k] if t["content"].strip())
            response = chat[k]["content"] if k < len(chat) else ""
            row = {"instruction": said, "context": "", "response": response, "messages": chat[:k]}
            rows.append({**row, **_tags(r, names), **_extra(r, names)})
        out.append(rows)
    return out


def _turns(value: Any, row: str) -> list[dict[str, str]]:
    """A chat as `{role, content}` turns; in CSV it is JSON in a cell. `row` says which, for messages."""
    wanted = f"{row} of the messages is not a list of {{role, content}} turns"
    way = 'write each turn as {"role": "user", "content": "TEXT"}'
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except RecursionError:
            raise UserError(f"{wanted}: it is nested too deep; {way}") from None
        except ValueError:
            raise UserError(f"{wanted} ({value[:40]!r} is no JSON); {way}") from None
    if missing(value):
        return []
    if not isinstance(value, list):
        raise UserError(f"{wanted}, but {str(value)[:60]!r}; {way}")
    out = []
    for turn in value:
        role = turn.get("role") if isinstance(turn, dict) else None
        content = turn.get("content", "") if isinstance(turn, dict) else None
        if not isinstance(role, str) or not (content is None or (isinstance(content, str) and sound(content))):
            raise UserError(f"{wanted}: it has {str(turn)[:60]!r}; {way}")
        out.append({"role": role, "content": content or ""})
    return out


# format -> (columns it needs, columns it knows, reader)
_FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Reader]] = {
    "alpaca": (("instruction", "output"), ("input",), _pairs("instruction", "input", "output")),
    "dolly": (
        ("instruction", "response"),
        ("context", "category"),
        _pairs("instruction", "context", "response"),
    ),
    "oasst1": (("message_id", "parent_id", "text", "role", "lang", "rank"), ("user_id",), _oasst1),
    "prompt_response": (("prompt", "response"), ("context", *_ANY), _pairs("prompt", "context", "response", own=True)),
    "messages": (("messages",), _ANY, _chats),
}
