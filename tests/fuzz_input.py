"""Configs and data files with random damage, through the command line's entry function: the exit code is 0 or 2, in the
second case with one line on standard error, and no exception comes out. Nothing is trained.

python tests/fuzz_input.py --n 500 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

WORDS = ["good", "bad"]
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    2.5,
    1e400,
    10**30,
    float("nan"),
    "",
    " ",
    "x",
    "\0",
    "{",
    "${",
    "${x}",
    "~x",
    "../x",
]
ODD += [
    "\x1b[31m",
    "\u202e",
    "[red]",
    "é",
    "😀",
    [],
    [[]],
    [1],
    {},
    {"x": 1},
    {"name": "x"},
    "null",
    "1e3",
    "auto",
    "tiny",
]
BYTES = [
    b"\0",
    b"\xff",
    b"\n",
    b"\r",
    b'"',
    b",",
    b"{",
    b"}",
    b"[",
    b":",
    b"\t",
    b"\xef\xbb\xbf",
    b"\x1b[31m",
    b"'",
    b"\\",
    b"|",
]


def trees() -> list[dict[str, Any]]:
    """Sound experiments, one for each kind of data and most components."""
    table = {"name": "table", "path": "rows.csv", "template": "{text} label: {label}", "validation": 0.25, "test": 0.25}
    small = {"name": "fuzz", "rounds": 1, "modes": ["federated"], "local": {"steps": 1, "batch_size": 2}}
    small |= {"executor": {"name": "serial", "device": "cpu", "threads": 1}, "training": {"lanes": 1}}
    chats = {"name": "instructions", "sources": [{"format": "messages", "path": "chats.jsonl"}], "max_length": 64}
    pairs = {"name": "instructions", "sources": [{"format": "prompt_response", "path": "pairs.json"}]}
    return [
        {**small, "data": table, "partition": {"name": "iid", "num_clients": 2}, "adapter": {"name": "lora", "r": 2}},
        {**small, "data": {**table, "path": "rows.tsv"}, "partition": {"name": "by_column", "column": "user"}},
        {**small, "data": {**table, "path": "rows.jsonl", "labels": WORDS}, "partition": {"name": "dirichlet", "num_clients": 2, "min_rows": 1}},
        {**small, "data": {**table, "path": "rows.json"}, "partition": {"name": "class_counts", "counts": [[2, 2], [3, 1]]}},
        {**small, "data": {**table, "path": "rows.parquet"}, "partition": {"name": "virtual", "num_clients": 4, "min_rows": 1, "max_rows": 3}},
        {**small, "data": chats, "partition": {"name": "quantity", "num_clients": 2, "min_rows": 1}},
        {**small, "data": pairs, "partition": {"name": "by_column", "column": "source"}, "adapter": {"name": "p_tuning", "hidden": 8}},
    ]  # fmt: skip


def write_data(place: Path) -> None:
    """The data files that the experiments name."""
    import pandas as pd

    rows = [{"text": f"some words {i}", "label": WORDS[i % 2], "user": f"u{i % 3}"} for i in range(40)]
    frame = pd.DataFrame(rows)
    frame.to_csv(place / "rows.csv", index=False)
    frame.to_csv(place / "rows.tsv", index=False, sep="\t")
    frame.to_parquet(place / "rows.parquet")
    (place / "rows.json").write_text(json.dumps(rows))
    (place / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    pairs = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(30)]
    (place / "pairs.json").write_text(json.dumps(pairs))
    turns = [
        {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["response"]}]}
        for p in pairs
    ]
    (place / "chats.jsonl").write_text("\n".join(json.dumps(t) for t in turns) + "\n")  # fmt: skip


def bend(value: Any, rng: random.Random) -> Any:
    """A nested value with one place in it changed: another value, a key or an item less, renamed, or twice."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        what = rng.random()
        if what < 0.7:
            return {**value, key: bend(value[key], rng)}
        if what < 0.8:
            return {k: v for k, v in value.items() if k != key}
        renamed = rng.choice([f"{key}x", key[:-1] if isinstance(key, str) else "x", "\x1b[31m", 3, None])
        return {(renamed if k == key else k): v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.6:
        i = rng.randrange(len(value))
        return [bend(v, rng) if k == i else v for k, v in enumerate(value)] + ([value[i]] if rng.random() < 0.3 else [])
    return rng.choice(ODD)


def damage(raw: bytes, rng: random.Random) -> bytes:
    """A file with bytes or lines changed, put in, taken out, repeated or cut off."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, what = rng.randrange(len(raw) + 1), rng.randrange(7)
        end = min(len(raw), at + rng.choice([1, 2, 10, 200]))
        if what == 0:
            raw = raw[:at] + rng.choice(BYTES) + raw[at:]
        elif what == 1:
            raw = raw[:at] + raw[end:]
        elif what == 2:
            raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        elif what == 3:
            raw = raw[:at]
        elif what == 4:
            raw = raw[:at] + raw[at:end] * 2 + raw[end:]
        elif what == 5:
            lines = raw.split(b"\n")
            rng.shuffle(lines)
            raw = b"\n".join(lines)
        else:
            raw = raw.replace(rng.choice([b"text", b"label", b"good", b"some", b'"', b",", b"user"]), rng.choice([b"", b"x", b"null", b"3"]), rng.choice([1, -1]))  # fmt: skip
    return raw


class Passed(BaseException):
    """Raised where training would begin."""


@contextlib.contextmanager
def _inside(place: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def one(place: Path, seed: int) -> tuple[str, str]:
    """Run one case: (refused | passed, what was said).

    Raises:
        AssertionError: with the case, if anything but 0 or 2 with one line comes out.
    """
    from fedsim.cli.main import main

    rng = random.Random(seed)
    write_data(place)
    tree = rng.choice(trees())
    file = place / "e.yaml"
    if rng.random() < 0.6:
        for _ in range(rng.choice([1, 1, 2])):
            tree = bend(tree, rng)
            if not isinstance(tree, dict):
                break
        text = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
        file.write_bytes(damage(text, rng) if rng.random() < 0.3 else text)
    else:
        file.write_text(yaml.safe_dump(tree))
        data = tree["data"]
        target = place / (data.get("path") or data["sources"][0]["path"])
        target.write_bytes(damage(target.read_bytes(), rng))
    out, err = io.StringIO(), io.StringIO()
    before = set(place.rglob("*"))
    try:
        stop = mock.patch("fedsim.runs.setup._fill_in", side_effect=Passed)
        with _inside(place), stop, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["run", "e.yaml", "-q"])
    except Passed:
        return "passed", ""
    except Exception:
        raise AssertionError(f"seed {seed}: {traceback.format_exc()}\n{file.read_bytes()[:3000]!r}") from None
    said = err.getvalue()
    made = set(place.rglob("*")) - before
    fine = code == 2 and said.startswith("fedsim: ") and said.count("\n") == 1 and said[:-1].isprintable() and not made
    assert fine, f"seed {seed}: code {code}, {said!r}, made {sorted(map(str, made))}\n{file.read_bytes()[:3000]!r}"
    return "refused", said


def fuzz(n: int, seed: int, show: bool = False) -> dict[str, int]:
    """Run n cases; how many were refused and how many would have been trained."""
    counts = {"refused": 0, "passed": 0}
    for i in range(n):
        with tempfile.TemporaryDirectory() as place:
            kind, said = one(Path(place), seed * 1_000_003 + i)
        counts[kind] += 1
        if show:
            print(f"{seed * 1_000_003 + i}  {kind}  {said.strip()[:200]}", flush=True)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(fuzz(given.n, given.seed, given.show), file=sys.stderr)
