"""docs/algorithms.md: one table of all algorithms, from their classes and the docstrings of their files.

`python -m fedsim.algorithms.reference > docs/algorithms.md` writes the page. A file's docstring begins with `NAME: authors. Title.
Venue year (arXiv id), algorithm n.` and ends with the lists `Deviations:` and `Peers:`, of items that begin with a dash.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping

import torch

from fedsim.algorithms import ALGORITHMS, Algorithm
from fedsim.algorithms.factors import is_a, is_b
from fedsim.core.params import FOLD, Layout, meta

ROUNDS = range(1, 9)
"""Rounds over which bytes are averaged."""
KINDS = {"lora_A": "A", "lora_B": "B", "score": "head"}
"""Part of a name -> what it is called in the table."""


def example() -> Layout:
    """LoRA of rank 8 on two layers' query and value projections of 128 features, with a head of 77 classes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in (f"layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"):
        shapes[f"base_model.model.model.{module}.lora_A.default.weight"] = (8, 128)
        shapes[f"base_model.model.model.{module}.lora_B.default.weight"] = (128, 8)
    shapes["base_model.model.score.modules_to_save.default.weight"] = (77, 128)
    return Layout(shapes, torch.float32)


def paper(kind: type[Algorithm]) -> str:
    """The paper of an algorithm: what follows the name in its file's docstring, up to the end of the citation."""
    text = " ".join((sys.modules[kind.__module__].__doc__ or "").partition("\n\n")[0].split())
    found = re.match(r".*?: (.*?\b(?:19|20)\d\d\b(?: \([^)]*\))?(?:[^.(]|\.\d)*)\.(?: |$)", text)
    return found[1] if found else ""


def items(kind: type[Algorithm], part: str) -> list[str]:
    """The items of a list (`Deviations`, `Peers`) in the docstring of the algorithm's file."""
    text = sys.modules[kind.__module__].__doc__ or ""
    _, found, after = text.partition(f"\n{part}:")
    block = re.split(r"\n\n|\n(?=[A-Z][a-z]+:\n)", after.lstrip("\n "))[0]
    return [" ".join(item.split()) for item in re.split(r"(?:^|\n)- ", block) if item.strip()] if found else []


def kinds(names: Iterable[str]) -> str:
    """Names in words: `A, B, head`."""
    return ", ".join(dict.fromkeys(word for n in names for key, word in KINDS.items() if key in n)) or "nothing"


def _by_round(sent: Mapping[int, str]) -> str:
    """What is sent in each round, in words; rounds that are alike together."""
    if len(set(sent.values())) == 1:
        return next(iter(sent.values()))
    alike: dict[str, list[str]] = {}
    for round, what in list(sent.items())[:4]:
        alike.setdefault(what, []).append(str(round))
    return "; ".join(f"{what} in rounds {', '.join(rounds)}, ..." for what, rounds in alike.items())


def _size(elements: int, layout: Layout) -> str:
    """A number of elements, as a multiple of the trained parameters where it is no small one."""
    if elements <= 8:
        return "-" if not elements else "1 number" if elements == 1 else f"{elements} numbers"
    return f"{elements / layout.numel:.3g} x"


def _numbered(texts: list[str]) -> str:
    if len(texts) < 2:
        return texts[0] if texts else "-"
    return "<br>".join(f"{i}. {text}" for i, text in enumerate(texts, 1))


def row(name: str, kind: type[Algorithm]) -> list[str]:
    """The cells of an algorithm."""
    made, layout = kind(), example()
    params = meta(layout)
    server, client = made.init(params)
    up: list[str] = []
    bytes_up = 0.0
    for group, sent in made.messages(layout).items():
        travelling = {r: [n for n in sent.shapes if made.travels(n, r)] for r in ROUNDS}
        bytes_up += sum(torch.Size(sent.shapes[n]).numel() for names in travelling.values() for n in names) / len(
            ROUNDS
        )
        same = sent.shapes.keys() <= layout.shapes.keys()
        what = _by_round({r: kinds(n) for r, n in travelling.items()}) if same else _size(sent.numel, layout)
        up.append(f"`{group}`: {what}")
    changed = {r: [n for n in layout.shapes if made.changes(n, r)] for r in ROUNDS}
    folded = {n: t for n, t in server.items() if n.startswith(FOLD)}
    server = {n: t for n, t in server.items() if n not in folded}
    state = sum(t.numel() for t in made.sent(server).values())
    bytes_down = sum(params[n].numel() for names in changed.values() for n in names) / len(ROUNDS) + state
    down = _by_round({r: kinds(names) for r, names in changed.items()})
    down += f"; server state, {_size(state, layout)}" if state else ""
    down += "; every client's A and B of the round" if folded else ""
    personal = made.personal(layout.shapes)
    own = [n for n in layout.shapes if n in personal]
    kept = [_size(sum(t.numel() for t in client.values()), layout)] * bool(client) + [kinds(own)] * bool(own)
    per = f"{bytes_up / layout.numel:.2f} / {bytes_down / layout.numel:.2f}"
    factors = sum(params[n].numel() for n in layout.shapes if is_a(n) or is_b(n))
    per += f" + {factors / layout.numel:.2f} for each client of the round" if folded else ""
    state_of = f"{', '.join(kept) or '-'} / {_size(sum(t.numel() for t in server.values()), layout)}"
    state_of += ", and what is folded, as large as the adapted layers" if folded else ""
    lists = [_numbered(items(kind, part)) for part in ("Deviations", "Peers")]
    return [f"`{name}`", paper(kind), "<br>".join(up), down, per, state_of, *lists]


def page() -> str:
    """docs/algorithms.md."""
    head = ["name", "paper", "travels up", "travels down", "bytes up / down", "state of a client / the server"]
    head += ["deviations from the paper", "other implementations"]
    lines = [
        "# Algorithms",
        "",
        "`algorithm: {name: ...}` in one table. Generated by `python -m fedsim.algorithms.reference > docs/algorithms.md`; the keys of",
        "each are in the [config reference](config.md#algorithm), the formulas in its file in `fedsim/algorithms/`.",
        "",
        "What travels, bytes and state are those of LoRA's factors A and B and a classification head, at the defaults of the algorithm.",
        "Bytes are without compression, relative to FedAvg's, as a mean over the first eight rounds of a client that is in all of them; one that",
        "has missed rounds also receives what has changed in these. State is in multiples of the trained",
        "parameters, without the optimizer state of clients (`local.keep_state`) and what error feedback keeps.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for name, kind in ALGORITHMS.items():
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row(name, kind))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
