"""Wrong things that a user can write, in one table: each is one line that names the place, the value and the way out, ends
with exit code 2, and leaves nothing behind. All go through the command line's entry function, some through real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lab
from fuzz_input import fuzz
from tiers import fast_only

from fedsim.cli.main import main
from fedsim.core.errors import UserError, nearest_first, visible

YAML = """
name: wrong
rounds: 1
modes: [federated]
data: {name: table, path: rows.csv, columns: {sentence: text, label: label}, template: "{sentence} label: {label}", validation: 0.25, test: 0.25}
partition: {name: iid, num_clients: 2}
local: {steps: 1, batch_size: 2}
training: {lanes: 1}
executor: {name: serial, device: cpu, threads: 1}
"""
ROWS = "".join(f"some text {i},{'ab'[i % 2]},u{i % 3}\n" for i in range(40))
CSV = "text,label,user\n" + ROWS
RECORDS = [{"text": f"some text {i}", "label": "ab"[i % 2], "user": f"u{i % 3}"} for i in range(40)]
Build = Callable[[Path, Lab], None]


def put(name: str, content: str | bytes) -> Build:
    """A file with this content."""

    def build(here: Path, lab: Lab) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return build


def table(content: str | bytes) -> Build:
    return put("rows.csv", content)


def config(text: str | bytes) -> Build:
    return put("e.yaml", text)


def lines(row: int, text: str) -> Build:
    """The rows as JSON lines, one of them written otherwise."""
    texts = [json.dumps(r) for r in RECORDS]
    texts[row - 1] = text
    return put("rows.jsonl", "\n".join(texts) + "\n")


def folder(name: str) -> Build:
    return lambda here, lab: (here / name).mkdir(parents=True)


def every(*builds: Build) -> Build:
    def build(here: Path, lab: Lab) -> None:
        for one in builds:
            one(here, lab)

    return build


def source(kind: str, rows: list[Any], **keys: Any) -> Build:
    """An experiment on instruction data, and its file."""
    data = {"name": "instructions", "sources": [{"format": kind, "path": "d.jsonl", **keys}]}
    text = re.sub(r"data: .*\n", f"data: {json.dumps(data)}\n", YAML)
    return every(config(text), put("d.jsonl", "\n".join(json.dumps(r) for r in rows) + "\n"))


def base(kind: str = "llama", change: Callable[[Path], None] = lambda m: None) -> Build:
    """A small base in the folder m, changed."""

    def build(here: Path, lab: Lab) -> None:
        shutil.copytree(lab.base(kind), here / "m")
        change(here / "m")

    return build


def keys(file: str, **values: Any) -> Callable[[Path], None]:
    """Other values in a JSON file; None takes a key out."""

    def change(m: Path) -> None:
        held = {**json.loads((m / file).read_text()), **values}
        (m / file).write_text(json.dumps({k: v for k, v in held.items() if v is not None}))

    return change


def without(*patterns: str) -> Callable[[Path], None]:
    def change(m: Path) -> None:
        for file in [f for p in patterns for f in m.glob(p)]:
            file.unlink()

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda m: put(name, content)(m, None)  # type: ignore[arg-type]


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(m: Path) -> None:
        for one in changes:
            one(m)

    return change


def half(m: Path) -> None:
    raw = (m / "model.safetensors").read_bytes()
    (m / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def other_shape(m: Path) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(m / "model.safetensors")
    name = next(n for n in held if "q_proj" in n)
    save_file({**held, name: held[name][:10].contiguous()}, m / "model.safetensors", metadata={"format": "pt"})


def one_less(m: Path) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(m / "model.safetensors")
    del held["model.layers.1.self_attn.q_proj.weight"]
    save_file(held, m / "model.safetensors", metadata={"format": "pt"})


def not_a_number(m: Path) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(m / "model.safetensors")
    held[next(n for n in held if "q_proj" in n)][3, 4] = float("nan")
    save_file(held, m / "model.safetensors", metadata={"format": "pt"})


def pickled(m: Path) -> None:
    without("*.safetensors")(m)
    (m / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch PWNED'\ntR.")


def parquet(here: Path, lab: Lab) -> None:
    import pandas as pd

    pd.DataFrame({"text": [{"x": 1}] * 40, "label": ["a", "b"] * 20}).to_parquet(here / "rows.parquet")


def parquet_twice(here: Path, lab: Lab) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    held = pa.Table.from_arrays([pa.array(["x"] * 40), pa.array(["a", "b"] * 20)], names=["text", "text"])
    pyarrow.parquet.write_table(held, here / "rows.parquet")


RUN = ["run", "e.yaml", "-q"]
JSONL, JSON, M = "data.path=rows.jsonl", "data.path=rows.json", "model.path=m"
LORA = "adapter.name=lora"
BY_USER = "partition={name: by_column, column: user}"
BAD = "is no column of '.*rows.csv', which has"
SWEEP = "experiment: e.yaml\ngrid: {seed: [0]}\n"

Case = tuple[str, Build | None, list[str], str]
CASES: list[Case] = [
    # ---- the config
    ("tab", config("name:\n\t- a\n"), [], r"e\.yaml: .*line 2, column 1: .*spaces, not tabs"),
    ("duplicate key", config("seed: 1\nseed: 2\n"), [], r"line 2.*duplicate key seed; remove one of them"),
    ("cycle", config("local: &a {x: *a}\n"), [], r"line 1.*recursive"),
    ("python tag", config("name: !!python/object/apply:os.system ['touch PWNED']\n"), [], "tag !!python/object/apply:os.system is not supported; no code is run"),
    ("boolean tag", config("modes: !!bool maybe\n"), [], "line 1, column 8: the tag !!bool is not supported"),
    ("date tag", config("seed: !!timestamp x\n"), [], "line 1, column 7: the tag !!timestamp is not supported"),
    ("values without end", config("a: &a [1, 1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrstu", "bcdefghijklmnopqrstuv", strict=True))),
     [], "more than 1,000,000 values"),
    ("other tag", config("name: !x y\n"), [], "line 1, column 7: the tag !x is not supported"),
    ("huge number", config("seed: " + "9" * 5000 + "\n"), [], "invalid YAML at line 1, column 7: a number of 5,000 digits"),
    ("large number", None, ["seed=99999999999999999999"], "seed: 99999999999999999999 is too large; .* below 2\\^63"),
    ("rounds without end", None, ["rounds=10000000000"], "rounds: must be <= 1,000,000 .got 10000000000"),
    ("rounds of a billion", None, ["rounds=1000000000"], "rounds: must be <= 1,000,000 .got 1000000000"),
    ("rounds of more steps than can be done", None, ["rounds=1000000", "local.steps=2000"], "rounds: 1000000 of 2,000 optimizer steps"),
    ("steps without end", None, ["local.steps=2000000000"], "local.steps: 2000000000 x batch_size=2"),
    ("steps of a billion in batches of one", None, ["local.steps=1000000000", "local.batch_size=1"], "local.steps: 1000000000 x batch_size=1"),
    ("steps of all clients together", None, ["local.steps=40000000", "modes=[central]"], r"local.steps: 40000000 makes [\d,]+ examples per round for the centralized model; lower it to at most \d+"),
    ("epochs without end", None, ["local={epochs: 1000000000000}"], "local.epochs: must be <= 100,000,000 .got 1000000000000"),
    ("epochs of more examples than fit", None, ["local={epochs: 90000000}"], r"local.epochs: 90000000 makes [\d,]+ examples per round for a client; lower it to at most \d+"),
    ("not a number", None, ["local.lr=.nan"], "local.lr: must be a finite number .got nan"),
    ("infinity", None, ["local.clip=.inf"], "local.clip: must be a finite number .got inf.; null = no clipping"),
    ("boolean for a number", None, ["rounds=true"], "rounds: True is not a whole number"),
    ("list for a section", None, ["local=[1]"], r"local: \[1\] is not a section; its keys are steps"),
    ("null key", config("null: 4\n"), [], "unknown key null. Valid keys: name, seed"),
    ("number key", config("1: 2\n"), [], "unknown key 1. Valid keys: name, seed"),
    ("too deep", config("name: " + "[" * 3000 + "]" * 3000), [], r"e\.yaml: values nested too deep"),
    ("deep", config("name: " + "{a: " * 400 + "1" + "}" * 400), [], "nested too deep"),
    ("interpolation cycle", config("name: ${seed}\nseed: ${name}\n"), [], "name: .*[Rr]ecursive.*; interpolations are"),
    ("broken interpolation", config("name: ${\n"), [], r"name: .*; interpolations are"),
    ("broken path", None, ["model.path='${data'"], "model.path: '.*data' cannot be resolved|data.*not readable"),
    ("no such variable", None, ["data.path='${oc.env:FEDSIM_NO}/x.csv'"], "data.path: .* set FEDSIM_NO to the folder"),
    ("binary", config(bytes(range(256))), [], r"e\.yaml: not UTF-8 text .*save the YAML file as UTF-8"),
    ("UTF-16", config(YAML.encode("utf-16")), [], r"e\.yaml: not UTF-8 text"),
    ("two documents", config("name: a\n---\nname: b\n"), [], "line 2.*another document; correct that line"),
    ("escape in a key", config('"a\\e[31m\\nb": 1\n'), [], r"unknown key a\\x1b\[31m\\nb\. Valid keys"),
    ("escape in a value", config('local: {optimizer: "\\e[31m"}\n'), [], r"local.optimizer: '\\x1b\[31m' is not one of adamw"),
    ("zero byte", config('results: "a\\0b"\n'), [], r"results: 'a\\x00b' contains a zero byte; remove it"),
    ("empty results", None, ["results=''"], "results: must not be empty .got ''.; give the root folder of all runs"),
    ("nobody's home", None, ["results=~nobody-here/x"], "results: '~nobody-here/x' .* give the whole path"),
    ("results in a file", None, ["results=rows.csv"], "results: 'rows.csv/.*' cannot be written to .*results=FOLDER"),
    ("long name", None, ["name=" + "x" * 300], "name: 'x+... .302 characters. is longer"),
    ("name of a path", None, ["name=../x"], "name: '../x' is not a valid folder name; use letters"),
    ("unknown key", None, ["local.lrr=1"], "unknown key local.lrr .did you mean local.lr\\?.. Valid keys: steps"),
    ("deep override", None, ["modes.0=local"], "modes: .* is not a section; cannot set modes.0"),
    ("no such file", None, ["run", "nowhere.yaml"], "nowhere.yaml: no such file; give the YAML file"),
    ("a folder for a file", folder("d.yaml"), ["run", "d.yaml"], "d.yaml: no such file; give the YAML file"),
    ("escape in an argument", None, ["run", "a\x1b[31m\nb"], r"a\\x1b\[31m\\nb: no such file"),
    ("impossible together", None, ["adapter={name: none}", "model.dtype=float16"], "model.dtype: 'float16' .* bfloat16"),
    # ---- tables
    ("no such column", table(CSV.replace("text,", "txt,", 1)), [], f"data.columns.sentence: 'text' {BAD}: txt, label"),
    ("no label column", table(CSV.replace("label", "lable", 1)), [], f"data.columns.label: 'label' {BAD}: lable, text"),
    ("no such field", None, ["data.template='{titel} {label}'"], "data.template: {titel} is no column; the data has: text"),
    ("unknown label", None, ["data.labels=[a, c]"], r"row 2 of '.*rows.csv' has the label 'b'; data.labels has: a, c"),
    ("escape in a label", table(CSV.replace("5,b", "5,b\x1b[31m")), ["data.labels=[a, b]"], r"row 6 .* 'b\\x1b\[31m'"),
    ("no label", table(CSV.replace("5,b", "5,")), [], "row 6 of .* has the label empty; data.labels has: a, b"),
    ("no text", table(CSV.replace("some text 5,", " ,")), [], "row 6 of '.*rows.csv' has no text in text; fill it in"),
    ("not UTF-8", table(CSV.encode().replace(b"text 5", b"text \xff")), [], "not UTF-8 .byte .*, line 7.; give its encoding, e.g. encoding: latin-1, or save it as UTF-8"),
    ("column twice", table(CSV.replace("user", "text", 1)), [], "has the column 'text' twice; rename one"),
    ("empty file", table(""), [], "data.path: '.*rows.csv' is empty; give a file with rows"),
    ("only line ends", table("\n\n\n"), [], "data.path: '.*rows.csv' could not be read as csv"),
    ("header alone", table("text,label\n"), [], "data.path: '.*rows.csv' has no rows"),
    ("long row", table(CSV.replace("5,b,", "5,b,c,d,")), [], "Expected 3 fields in line 7, saw 5.; quote cells"),
    ("long rows", table("text,label\n" + ROWS), [], "more fields than its header; quote text that holds ','"),
    ("short row", table(CSV.replace("5,b,u2", "5,b")), [], "line 7 has 2 cell.s., the header has 3; add"),
    ("open quote", table(CSV.replace("some text 5", '"some text 5')), [], "could not be read as csv .*row 6.; quote cells"),
    ("zero bytes", table(CSV.replace("text 5", "text \0")), [], "has a zero byte in line 7, so it is no text file"),
    ("one label", table("text,label\n" + "x,a\n" * 40), [], "holds 1 different value.s., 'a'; .*data.labels"),
    ("label with a blank", None, ["data.labels=[a, 'b ']"], "data.labels: .*white space around it"),
    ("label twice", None, ["data.labels=[a, a]"], "data.labels: .*has a label twice"),
    ("too few rows", table("text,label\nx,a\ny,b\n"), [], "left without an example; it has 2 in all; add some"),
    ("validation without rows", put("v.csv", "text,label\n"), ["data.validation=v.csv"], "data.validation: .*no rows"),
    ("validation's label", put("v.csv", "text,label\nx,c\n"), ["data.validation=v.csv"], "row 1 of '.*v.csv' has the label 'c'"),
    ("validation's column", put("v.csv", "text,lbl\nx,a\n"), ["data.validation=v.csv"], "'label' is no column of '.*v.csv'"),
    ("no such data", None, ["data.path=row.csv"], "data.path: 'row.csv' does not exist; give a .csv"),
    ("folder for data", folder("d.csv"), ["data.path=d.csv"], "data.path: '.*d.csv' is a folder; give a .csv"),
    ("other ending", put("x.xlsx", "PK"), ["data.path=x.xlsx"], "ends in .xlsx; give a .csv"),
    ("row too long", None, ["data.max_length=4", "data.too_long=error"], "data.max_length: 4, but row 2 of '.*rows.csv' has"),
    ("all rows too long", None, ["data.max_length=4", "data.too_long=drop"], "no example of the train split is left .20 too long"),
    # ---- JSON and Parquet
    ("line is no JSON", lines(6, '{"text": x}'), [JSONL], "could not be read as jsonl .line 6: Expecting value"),
    ("line is a list", lines(6, "[1, 2]"), [JSONL], r"line 6 holds '\[1, 2\]', no object"),
    ("key twice", lines(6, '{"text": "x", "text": "y", "label": "a"}'), [JSONL], "line 6: the key 'text' is there twice"),
    ("line too deep", lines(6, "[" * 99999), [JSONL], "line 6 is nested too deep"),
    ("nested text", lines(6, '{"text": {"x": 1}, "label": "b"}'), [JSONL], "row 6 of '.*' has .*in the column 'text', which is no text"),
    ("null text", lines(6, '{"text": null, "label": "b"}'), [JSONL], "row 6 of .* has no text in text"),
    ("folder without data", every(put("d/x/y/notes.md", "x"), put("d/.hidden/z.csv", "a,b")), ["data={name: hub, path: d}"],
     "data.path: '.*d' is a folder without a data file; give one with"),
    ("half a character", lines(6, '{"text": "\\ud800", "label": "b"}'), [JSONL], "row 6 .* half of a character"),
    ("nested label", lines(6, '{"text": "x", "label": ["b"]}'), [JSONL], "row 6 .*which is no label; write a word"),
    ("label with a zero byte", lines(6, '{"text": "x", "label": "a\\u0000"}'), [JSONL], r"row 6 of '.*rows.jsonl' has 'a\\x00', which is no label"),
    ("label with a zero byte, known", lines(6, '{"text": "x", "label": "a\\u0000"}'), [JSONL, "data.labels=[a, b]"], "row 6 of '.*rows.jsonl' has"),
    ("JSON is an object", put("rows.json", '{"text": []}'), [JSON], "expected a list of objects, one a row"),
    ("JSON holds a number", put("rows.json", '[{"text": "x"}, 3]'), [JSON], "but row 2 is '3'"),
    ("JSON too deep", put("rows.json", "[" * 99999), [JSON], "nested too deep; give a list of objects"),
    ("no Parquet", put("rows.parquet", "x" * 50), ["data.path=rows.parquet"], "could not be read as parquet .*write the file anew"),
    ("Parquet column twice", parquet_twice, ["data.path=rows.parquet"], "has the column 'text' twice; rename one"),
    ("nested Parquet", parquet, ["data.path=rows.parquet"], "row 2 of '.*rows.parquet' has .*which is no text"),
    # ---- partitions
    ("clients without end", None, ["partition.num_clients=500000000"], "num_clients: 500000000 is above 1,000,000; use fewer"),
    ("virtual clients without end", None, ["partition={name: virtual, num_clients: 500000000}"], "partition.num_clients: must be <= 100,000,000 .got 500000000"),
    ("more clients than rows", None, ["partition.num_clients=400"], "partition.num_clients: 400 .* give at most 20"),
    ("class too small", None, ["partition={name: class_counts, counts: [[50, 1]]}"], "class 0 is asked for 50 examples.* is 10"),
    ("no client column", None, ["partition={name: by_column, column: usr}"], "partition.column: 'usr' is no column; the data has: user"),
    ("row without client", table(CSV.replace("5,b,u2", "5,b,")), [BY_USER], "row 6 of '.*' has nothing in 'user'; every example needs"),
    ("client of a list", lines(2, '{"text": "x", "label": "b", "user": [1]}'), [JSONL, BY_USER], r"has \[1\] in 'user'"),
    ("client of long rows", table(re.sub(r"some text (\d+),(.),u1", r"a \1 b c d e f g h i j k l m n o p,\2,u1", CSV)),
     [BY_USER, "data.max_length=14", "data.too_long=drop"], "client 'u1' is left without an example: .*data.too_long=drop"),
    ("no client with rows", None, ["partition={name: class_counts, counts: [[0, 0]]}"], "no client has an example; raise the counts"),
    # ---- templates
    ("open brace", None, ["data.template='{sentence {label}'"], "data.template: .*double a brace that is meant as text"),
    ("positional", None, ["data.template='{} {label}'"], "has the field {}; a field is one plain column name"),
    ("numbered", None, ["data.template='{0} {label}'"], "has the field .0.; a field is one plain column name"),
    ("attribute", None, ["data.template='{sentence} {label.__class__}'"], "has the field {label.__class__}"),
    ("index", None, ["data.template='{sentence} {label[0]}'"], r"has the field {label\[0\]}"),
    ("format", None, ["data.template='{sentence:>9} {label}'"], "a field is one plain column name in braces"),
    ("conversion", None, ["data.template='{sentence!r} {label}'"], "a field is one plain column name in braces"),
    # ---- instructions
    ("alpaca without output", source("alpaca", [{"instruction": "x"}] * 30), [], "no column 'output', which format alpaca needs"),
    ("dolly without response", source("dolly", [{"instruction": "x"}] * 30), [], "no column 'response', which format dolly needs"),
    ("oasst1 without roles", source("oasst1", [{"text": "x"}] * 30), [], "no column 'message_id', which format oasst1 needs"),
    ("pairs without response", source("prompt_response", [{"prompt": "x"}] * 30), [], "name its columns by data.columns"),
    ("chats without chats", source("messages", [{"chat": []}] * 30), [], "no column 'messages'"),
    ("turn without role", source("messages", [{"messages": [{"content": "x"}]}] * 30), [], "row 1 of the messages is not a list of"),
    ("chat of text", source("messages", [{"messages": "hello"}] * 30), [], "row 1 .*'hello' is no JSON"),
    ("nested instruction", source("alpaca", [{"instruction": [1], "output": "y"}] * 30), [], r"row 1 of '.*' has '\[1\]' in the column"),
    ("no answers", source("alpaca", [{"instruction": "x", "output": " "}] * 30), [], "no example of the train split is left .24 empty answer"),
    ("unknown format", source("alpacca", [{}] * 3), [], r"data.sources\[0\].format: 'alpacca' is not one of alpaca, .*; did you mean alpaca\?"),
    ("no such source", source("alpaca", [{}], path="no.jsonl"), [], "path: 'no.jsonl' does not exist"),
    ("chat cell too deep", put("d.csv", "messages\n" + "[" * 5000 + "]" * 5000 + "\n"),
     ["data={name: instructions, sources: [{format: messages, path: d.csv}]}"], "row 1 of the messages .*nested too deep"),
    # ---- empty paths
    *((f"empty {key} {value}", None, [f"{key}={value}"], f"{key}: .*{re.escape(value)}") for key in ("model.path", "data.path", "data.validation", "data.test", "results") for value in ("' '", "[]")),
    *((f"empty source {i}", None, [f"data={{name: instructions, sources: [{{format: alpaca, path: {value}}}]}}"], r"data.sources\[0\].path\S*: .*(is not text|got |is empty)")
      for i, value in enumerate(("[]", "' '", "[[]]", "null", "{}", "['x.json', '']"))),
    *((f"empty argument {i}", None, command, "an argument is empty; give a value, or leave it out")
      for i, command in enumerate((["run", ""], ["partition", "e.yaml", "--out", ""], ["plot", ""], ["plot", ".", "--out="], ["diff", "", "x"], ["eval", ""], ["list", ""], ["run", "e.yaml", " "]))),
    ("clients beyond memory", None, ["partition={name: dirichlet, num_clients: 500000000, alpha: 1, min_rows: 0}"],
     "partition.num_clients: 500000000 is above 1,000,000; .*partition.name=virtual"),
    # ---- bases
    ("no weights", base(change=without("*.safetensors")), [M], "model.path: '.*m' holds no .safetensors weights; give"),
    ("no config", base(change=without("config.json")), [M], "has no config.json; give a folder that save_pretrained wrote"),
    ("config is no JSON", base(change=written("config.json", "{")), [M], "could not be read .*not a valid JSON"),
    ("unknown type", base(change=keys("config.json", model_type="nope")), [M], "model type `nope`"),
    ("weights of another shape", base(change=other_shape), [M, LORA], r"q_proj.weight as \[10, 32\], its config makes it \[32, 32\]"),
    ("config of another shape", base(change=keys("config.json", hidden_size=64)), [M], r"its config makes it \[1536, 64\]"),
    ("weights that lack a layer", base(change=keys("config.json", num_hidden_layers=3)), [M], "hold 2 blocks, its config asks for 3 .num_hidden_layers.; give"),
    ("weights that lack ten million", base(change=keys("config.json", num_hidden_layers=10_000_000)), [M], "hold 2 blocks, its config asks for 10000000"),
    ("weights that lack a tensor", base(change=one_less), [M], r"lack model.layers.1.self_attn.q_proj.weight .1 such"),
    ("weights with a layer more", base(change=keys("config.json", num_hidden_layers=1)), [M], "hold model.layers.1.* no place .9 such.; give"),
    ("weights that are no numbers", base(change=not_a_number), [M, LORA], "hold NaN or infinite values in .*q_proj.weight; check"),
    ("adapter for a base", base(change=both(without("*"), written("adapter_config.json", "{}"))), [M], "holds an adapter, no base model; give the base"),
    ("half the weights", base(change=half), [M], "could not be loaded .SafetensorError.*check that the folder is complete"),
    ("index of another folder", base(change=both(without("*.safetensors"), written("model.safetensors.index.json",
     '{"weight_map": {"a": "../x.safetensors"}}'))), [M], "names '../x.safetensors', outside the folder"),
    ("pickled weights", base(change=pickled), [M], "pickled weights .pytorch_model.bin., which can run code .*convert them"),
    ("file of pickled weights", base(change=pickled), ["model.path=m/pytorch_model.bin"], "pickled weights, which can run code"),
    ("code in the folder", base(change=both(keys("config.json", model_type="odd", auto_map={"AutoConfig": "odd.C"}),
     written("odd.py", "open('PWNED', 'w')"))), [M], "auto_map in config.json., which is never run"),
    ("no tokenizer", base(change=without("tok*", "special*")), [M], "no tokenizer could be loaded from '.*m'"),
    ("no pad token", base(change=keys("tokenizer_config.json", pad_token=None, eos_token=None)), [M], "neither a pad nor an end-of-text token; add"),
    ("token without embedding", base(change=keys("config.json", vocab_size=900)), [M], "embeddings for 900; give the folder the tokenizer"),
    ("no GGUF", put("m.gguf", "nonsense"), ["model.path=m.gguf"], "m.gguf' could not be read"),
    ("half a GGUF", put("m.gguf", b"GGUF\3\0\0\0" + bytes(16)), ["model.path=m.gguf"], "m.gguf' could not be read"),
    ("hub without a network", None, ["model.path=org/none"], "'org/none' could not be read .*check the id, the network, or give a local"),
    ("no such package", None, ["model.path=package:no_such/x"], "needs the package no_such; install it with"),
    ("encoder that is to write", base("bert"), [M], "'causal_lm' cannot be done by .* use model.task=sequence_classification"),
    ("base without a head", base("mamba"), [M, "model.task=sequence_classification"], "transformers has no such head"),
    ("too many virtual tokens", base(), [M, "adapter={name: prompt, num_virtual_tokens: 250}"], "250 virtual tokens through, the base takes 256"),
    # ---- adapters
    ("no such layer", base(), [M, LORA, "adapter.target_modules=[qproj]"], "'qproj' does not exist in this base; it has: q_proj, "),
    ("no layer for a bottleneck", base(), [M, "adapter={name: adapter, target_modules: [qproj]}"], "'qproj' .*it has: q_proj, "),
    ("nothing for lora", base("mamba"), [M, LORA], "'auto' finds no attention input projection .*name some of dt_proj"),
    ("prefix without heads", base("mamba"), [M, "adapter={name: prefix}"], "'prefix' cannot be put on this base .mamba."),
    ("method that trains nothing", base("gpt2"), [M, "adapter={name: osf}"], "'osf' finds nothing to train on this base .gpt2."),
    ("key of another kind", base(), [M, "adapter={name: loha, r: x}"], "adapter.r: 'x' is not a whole number"),
    ("method unknown", None, ["adapter={name: loora}"], "adapter.name: 'loora' is not known; did you mean lora"),
    ("adapter without end", base(), [M, LORA, "adapter.r=1000000000000"], "r=1000000000000 needs more memory than there is"),
    ("empty start", None, ["adapter={name: prompt, init_text: ' '}"], "adapter.init_text: must not be empty .got ' '."),
    # ---- devices
    ("no such device", None, ["executor={name: serial, device: 'cuda:9'}"], "'cuda:9' is not on this machine, which has: cpu"),
    ("no device", None, ["executor={name: serial, device: gpu}"], "executor.device: 'gpu' is not a device; use cpu"),
    ("a million workers", None, ["executor={name: pool, workers: 1000000}"], "executor.workers: must be <= 1,024 .got 1000000"),
    ("a million threads", None, ["executor={name: serial, threads: 1000000}"], "executor.threads: must be <= 1,024 .got 1000000"),
    # ---- the other commands
    ("sweep's key", put("s.yaml", SWEEP + "grids: 1\n"), ["sweep", "s.yaml"], r"unknown key grids \(did you mean grid\?\)"),
    ("sweep over nothing", put("s.yaml", "experiment: e.yaml\ngrid: {seed: []}\n"), ["sweep", "s.yaml"], r"s.yaml: grid.seed: \[\] is empty; give one value"),
    ("sweep on nothing", put("s.yaml", SWEEP + "devices: []\n"), ["sweep", "s.yaml"], r"s.yaml: devices: \[\] is not a list of devices"),
    ("sweep of a number", put("s.yaml", "experiment: e.yaml\ngrid: {3: [1]}\n"), ["sweep", "s.yaml"], "run with 3=1: unknown key 3. Valid keys: name, seed"),
    ("sweep's device", put("s.yaml", SWEEP + "devices: ['cuda:9']\n"), ["sweep", "s.yaml"], "'cuda:9' is not on this machine"),
    ("sweep without end", put("s.yaml", f"experiment: e.yaml\ngrid: {{seed: {list(range(300))}, local.steps: {list(range(1, 300))}}}\n"),
     ["sweep", "s.yaml"], "grid: 89700 combinations are more than 20000"),
    ("reproduction's seeds", put("r/reproduce.yaml", "sizes: {tiny: {file: ../e.yaml}}\nruns: [{label: a, title: b, seeds: 3}]\n"),
     ["reproduce", "r"], r"runs\[0\].seeds: 3 is not a mapping"),
    ("nothing to plot", None, ["plot", "."], "no run in '.'"),
    ("nothing to list", None, ["list", "nowhere"], "no folder 'nowhere'"),
    ("config of a run", every(put("r/config.yaml", "best: 3\n"), put("r/metrics.jsonl", "")), ["list", "r"], "config.yaml: best: 3 is not a section"),
    ("metrics of a run", every(put("r/config.yaml", "name: x\n"), put("r/metrics.jsonl", "x\ny\n")), ["list", "r"], "metrics.jsonl, line 1: not JSON; correct"),
    ("nothing to compare", None, ["diff", "nowhere", "."], "no folder 'nowhere'"),
    ("no model to score", folder("x"), ["eval", "x"], "x: holds neither a run nor a model"),
    ("resume a stranger's", None, ["run", "e.yaml", "--resume", "~nosuch/x"], "--resume: '~nosuch/x' is of a user who is not known here; give"),
    ("run a stranger's", None, ["run", "~nosuch/e.yaml"], "FILE: '~nosuch/e.yaml' is of a user"),
    ("sweep a stranger's", None, ["sweep", "~nosuch/s.yaml"], "FILE: '~nosuch/s.yaml' is of a user"),
    ("sweep of a stranger's", put("s.yaml", "experiment: ~nosuch/e.yaml\ngrid: {seed: [0]}\n"), ["sweep", "s.yaml"],
     "s.yaml: experiment: '~nosuch/e.yaml' is of a user"),
    ("reproduce a stranger's", None, ["reproduce", "~nosuch/r"], "EXPERIMENT: '~nosuch/r' is of a user"),
    ("partition at a stranger's", None, ["partition", "e.yaml", "--out", "~nosuch/x"], "--out: '~nosuch/x' is of a user"),
    ("plot a stranger's", None, ["plot", "~nosuch/x"], "RUNS: '~nosuch/x' is of a user"),
    ("plot at a stranger's", None, ["plot", ".", "--out", "~nosuch/x"], "--out: '~nosuch/x' is of a user"),
    ("list a stranger's", None, ["list", "~nosuch/x"], "PATH: '~nosuch/x' is of a user"),
    ("compare a stranger's", None, ["diff", ".", "~nosuch/x"], "RUN: '~nosuch/x' is of a user"),
    ("score a stranger's", None, ["eval", "~nosuch/x"], "RUN: '~nosuch/x' is of a user"),
    ("score at a stranger's", None, ["eval", "tiny", "--out", "~nosuch/x"], "--out: '~nosuch/x' is of a user"),
    ("score a stranger's data", None, ["eval", "tiny", "--data", "~nosuch/x"], "--data: '~nosuch/x' is of a user"),
    ("score a stranger's base", None, ["eval", "tiny", "--base-path", "~nosuch/x"], "--base-path: '~nosuch/x' is of a user"),
    ("scores into a file", put("file", "x"), ["eval", "tiny", "--out", "file"], "--out: 'file' is a file; give a folder"),
    ("scores below a file", put("file", "x"), ["eval", "tiny", "--out", "file/x/y"], "--out: 'file/x/y' lies below '.*file', a file"),
    ("scores into the usual place", put("eval", "x"), ["eval", "tiny"], "--out: 'eval' is a file; give a folder"),
    ("scores over a folder", folder("eval/eval.csv"), ["eval", "tiny"], "--out: 'eval/eval.csv' is a folder, where the scores"),
    ("partition of nothing", table(""), ["partition", "e.yaml"], "rows.csv' is empty; give a file with rows"),
    ("long path", None, ["data.path=" + "x" * 9000], "^.{1,300}: File name too long; give another"),
    ("long option", None, ["run", "e.yaml", "--" + "x" * 9000], "^.{1,600}; see fedsim --help"),
    ("many labels", None, [f"data.labels=[{', '.join(f'w{i}' for i in range(9000))}]"], "^fedsim: .{1,1000}$"),
    ("no such option", None, ["run", "e.yaml", "--fast"], "No such option"),
]  # fmt: skip
PROCESSES = (
    "python tag",
    "escape in a key",
    "unknown label",
    "line is a list",
    "client of long rows",
    "pickled weights",
    "code in the folder",
    "no such layer",
)


@pytest.fixture
def here(tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with an experiment and its data."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.delenv("FEDSIM_NO", raising=False)
    (place / "e.yaml").write_text(YAML)
    (place / "rows.csv").write_text(CSV)
    return place


def arguments(given: list[str]) -> list[str]:
    return given if given and "=" not in given[0] else [*RUN, *given]


def everything(place: Path) -> set[str]:
    return {str(p.relative_to(place)) for p in place.rglob("*")}


def check(code: int, out: str, err: str, why: str) -> None:
    assert code == 2, err
    assert out == ""
    assert err.startswith("fedsim: ") and err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err, err
    assert err[:-1].isprintable(), repr(err)
    assert re.search(why, err), err


# One case or two of each way to go wrong, for `make test`.
FAST = {
    *("tab", "cycle", "python tag", "values without end", "huge number", "rounds of a billion"),
    *("steps without end", "not a number", "list for a section", "too deep", "interpolation cycle"),
    *("no such variable", "binary", "escape in a key", "zero byte", "results in a file", "name of a path"),
    *("unknown key", "no such file", "no such column", "unknown label", "not UTF-8", "empty file", "long row"),
    *("open quote", "too few rows", "no such data", "row too long", "line is no JSON", "line too deep"),
    *("nested text", "half a character", "JSON is an object", "no Parquet", "clients without end"),
    *("no client column", "client of long rows", "open brace", "attribute", "oasst1 without roles"),
    *("turn without role", "unknown format", "empty argument 0", "clients beyond memory", "no weights"),
    *("weights of another shape", "weights that lack a layer", "half the weights", "pickled weights"),
    *("code in the folder", "token without embedding", "no GGUF", "hub without a network"),
    *("too many virtual tokens", "no such layer", "key of another kind", "no such device", "a million workers"),
    *("sweep over nothing", "sweep without end", "reproduction's seeds", "nothing to plot", "config of a run"),
    *("no model to score", "resume a stranger's", "scores into a file", "long path", "no such option"),
}


@fast_only(*(i for i, case in enumerate(CASES) if case[0] in FAST))
@pytest.mark.parametrize(("build", "given", "why"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_wrong_thing_is_one_line_and_leaves_nothing(
    build: Build | None, given: list[str], why: str, here: Path, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    if build is not None:
        build(here, lab)
    before = everything(here)
    capsys.readouterr()  # what building a base says
    code = main(arguments(given))
    out, err = capsys.readouterr()
    check(code, out, err, why)
    assert everything(here) == before


@fast_only(2, 4)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_same_in_a_real_process(name: str, here: Path, lab: Lab) -> None:
    ((build, given, why),) = [c[1:] for c in CASES if c[0] == name]
    if build is not None:
        build(here, lab)
    before = everything(here)
    command = [sys.executable, "-m", "fedsim", *arguments(given)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    check(done.returncode, done.stdout, done.stderr, why)
    assert everything(here) == before


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 80 and len({c[0] for c in CASES}) == len(CASES)
    assert len(PROCESSES) == 8 and {c[0] for c in CASES} >= set(PROCESSES)


# ------------------------------------------------------------------------------------------------ what is taken


@pytest.mark.parametrize(
    "raw", [b"\xef\xbb\xbf" + CSV.encode(), CSV.replace("\n", "\r\n").encode()], ids=["BOM", "CRLF"]
)
def test_marks_and_line_ends_of_other_systems_are_taken(raw: bytes, here: Path) -> None:
    from fedsim.config.experiment import Experiment
    from fedsim.runs.build import prepare

    (here / "other.csv").write_bytes(raw)
    text = YAML.replace("rows.csv", "other.csv").replace("\n", "\r\n")
    (here / "other.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    plain, other = (prepare(Experiment.load(f)) for f in ("e.yaml", "other.yaml"))
    assert plain.run_id() == other.run_id()


def test_rows_without_an_answer_are_left_out_and_counted(here: Path, lab: Lab) -> None:
    from fedsim.config.experiment import Experiment
    from fedsim.runs.build import prepare

    rows = [{"instruction": f"say {i}", "output": " " if i % 10 == 0 else "yes"} for i in range(40)]
    source("alpaca", rows)(here, lab)
    report = prepare(Experiment.load("e.yaml")).report
    assert sum(why.get("empty answer", 0) for why in report["left_out"].values()) == 4


WILD = [
    "{label} {0} {} {label.__class__}", "%s %(label)s %n", "a\\nb \\x1b", "line\nline\ttab\rend", "\x1b[31mred\x1b[0m \x9b1m",
    "\u202eright to left\u2066", "[red]markup[/red] [link=x]", "zero \0 byte", "emoji 👩‍👩‍👧 é ß 漢字", "<|endoftext|> </s>", "${oc.env:HOME}",
]  # fmt: skip


@fast_only(0, 3, 4, 7, 9)
@pytest.mark.parametrize("text", WILD)
def test_text_of_the_data_is_its_own_text_and_no_more(text: str) -> None:
    from fedsim.data.sources import Split
    from fedsim.data.templates import Template

    split = Split({"text": [text], "label": ["yes"]}, None, "f.csv", np.array([1]))
    (row,) = split.texts(["text", "label"], {}, None, "train", ["text"])
    template = Template.parse("A {text} B {{x}} {label}")
    assert template.split(row) == (f"A {text} B {{x}}", " yes")
    assert template.text(row) == f"A {text} B {{x}} yes"


@fast_only(0, 3, 4, 5, 6, 11)
@pytest.mark.parametrize("text", [*WILD, "\ud800 half", "\x7f\x85\u2028"])
def test_nothing_steers_a_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    import pandas as pd

    from fedsim.cli import show
    from fedsim.runs.progress import Board, Progress

    shown = visible(text)
    assert shown.replace("\u200d", "").isprintable()  # what joins an emoji stays
    assert visible(shown) == shown
    show.table(pd.DataFrame({"client": pd.Series([text], dtype=object)}), text)
    show = Progress(True, 1)
    show.note(f"left out, no rows: {text}")
    show.round(1, text)
    board = Board(True, [text])
    board.update(0, "failed", text)
    board.end()
    captured = capsys.readouterr()
    for line in (captured.out + captured.err).split("\n"):
        assert line.replace("\u200d", "").isprintable(), repr(line)
    assert captured.err.count("\n") == 3 and shown in captured.out


def test_a_client_may_be_called_like_a_formula(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from fedsim.analysis import plots

    names = ["$\\frac{$", "\x1b[31m", "a$b$c_{"]
    report = {"class_counts": [[1, 2]] * 3, "class_names": ["a", "$b_$"], "sizes": [3] * 3, "client_names": names}
    report |= {"num_clients": 3, "js_mean": 0.0, "size_gini": 0.0}
    figure = Figure()
    plots.partition(report, figure.subplots())
    figure.savefig(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 100


def test_clients_with_wild_names_are_shown_with_escapes_and_have_folders_of_their_own(
    here: Path, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["../../x", "\x1b[31mred", "[red]a[/red]", "a/b"]
    rows = [{**r, "user": names[i % 4]} for i, r in enumerate(RECORDS)]
    put("rows.jsonl", "\n".join(map(json.dumps, rows)) + "\n")(here, lab)
    assert main(["partition", "e.yaml", JSONL, BY_USER]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[31mred" in out and "[red]a[/red]" in out
    assert main(["run", "e.yaml", JSONL, BY_USER, "modes=[local]"]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    (run,) = [p for p in (here / "results" / "wrong").iterdir() if p.name != "partition"]
    assert len(list((run / "local").iterdir())) == 4
    assert {p.name for p in here.iterdir()} == {"e.yaml", "rows.csv", "rows.jsonl", "results"}


# ------------------------------------------------------------------------------------------------ nothing unsafe


def test_a_checkpoint_that_names_files_elsewhere_is_refused(lab: Lab, tmp_path: Path) -> None:
    from fedsim.core.files import read_checked, write_checked
    from fedsim.core.store import Store
    from fedsim.runs.checkpoints import Checkpoints

    run = lab.run()
    (info,) = (run / "checkpoints" / "federated").glob("round-*/manifest.json")
    held = read_checked(info)
    ((name, digest),) = held["files"].items()
    outside = tmp_path / "x.safetensors"
    shutil.copy(info.with_name(name), outside)
    for wrong in (str(outside), f"../../../../../{outside.name}", "sub/x"):
        write_checked(info, {**held, "files": {wrong: digest}})
        checkpoints = Checkpoints(run, "federated", *[Store(run, 0, torch.float32)] * 2)
        ((_, found),) = checkpoints.kept()
        with pytest.raises(UserError, match="is not a file of its own folder; .*delete it") as caught:
            checkpoints.why_not(found)
        assert wrong in str(caught.value) and str(info) in str(caught.value)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"adapter_model.bin": b"\x80\x04."}, "pickled weights .adapter_model.bin., which can run code; save"),
        ({}, "holds no adapter_model.safetensors; save"),
        ({"adapter_model.safetensors": b"nonsense"}, "its adapter could not be loaded"),
        ({"adapter_config.json": b"{", "adapter_model.safetensors": b""}, "its adapter could not be loaded"),
    ],
    ids=["pickle", "nothing", "damaged", "config"],
)
def test_adapters_that_are_no_safetensors_are_refused(files: dict[str, bytes], why: str, lab: Lab) -> None:
    from transformers import AutoModelForCausalLM

    from fedsim.models.export import load_adapter

    place = lab.root / "a"
    place.mkdir()
    (place / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    for name, content in files.items():
        (place / name).write_bytes(content)
    with pytest.raises(UserError, match=why) as caught:
        load_adapter(AutoModelForCausalLM.from_pretrained(lab.base("llama")), place)
    assert str(place) in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ devices


def test_more_workers_than_memory_holds_are_refused_before_they_start(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **keys: Any) -> Any:
        raise AssertionError("workers were started")

    monkeypatch.setattr("fedsim.runs.setup.PoolExecutor", never)
    monkeypatch.setattr("fedsim.runs.resolve.free_memory", lambda device: 3 << 30)
    before = everything(here)
    assert main([*RUN, "executor={name: pool, devices: [cpu], workers: 40}"]) == 2
    out, err = capsys.readouterr()
    check(2, out, err, "executor.workers: 40 on cpu need at least 11.7 GiB .*3.0 are free; give at most 10")
    assert everything(here) == before
    with pytest.raises(AssertionError, match="workers were started"):
        main([*RUN, "executor={name: pool, devices: [cpu], workers: 10}"])


def test_bfloat16_where_a_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fedsim import Experiment
    from fedsim.runs.resolve import devices_of

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    exp = Experiment(model={"dtype": "bfloat16"}, executor={"name": "serial", "device": "cuda"})
    with pytest.raises(UserError, match=r"model.dtype: 'bfloat16', which cuda:0 .Old GPU. .*use float32 or float16"):
        devices_of(exp)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert devices_of(exp) == ("serial", ["cuda:0"])


# ------------------------------------------------------------------------------------------------ the rest


def test_names_to_choose_from_come_nearest_first() -> None:
    assert nearest_first("qproj", ["a", "b", "q_proj"]) == "q_proj, a, b"
    assert nearest_first("x", []) == "nothing"
    assert nearest_first("x", [f"c{i}" for i in range(50)]).endswith("c29 and 20 more")


def test_an_error_once_rows_are_logged_keeps_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **keys: Any) -> Any:
        raise UserError("out of something in round 1")

    monkeypatch.setattr("fedsim.runs.modes.rounds", fail)
    assert main(RUN) == 2
    (run,) = (here / "results" / "wrong").iterdir()
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


def test_an_error_at_a_later_start_keeps_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(RUN) == 0
    (run,) = (here / "results" / "wrong").iterdir()
    (run / "status.json").write_text(json.dumps({"state": "running", "rounds": 1}))
    before = everything(here)
    capsys.readouterr()
    assert main([*RUN, "executor.threads=7"]) == 2
    check(2, *capsys.readouterr(), r"executor\.threads: 7, but .* the run was started with another number")
    assert everything(here) == before


def test_random_damage_is_refused_or_harmless(lab: Lab) -> None:
    counts = fuzz(30, seed=1)
    assert counts["refused"] >= 10 and sum(counts.values()) == 30, counts
