"""Embedded data set: invented financial headlines whose label follows from how they are built.

Three splits of (sentence, label) with the class counts of the Financial PhraseBank cut used in federated LoRA
studies (2,264 examples, 80/10/10), so that a partition by published class counts works on it unchanged. The text is
ours: a small grammar over companies made of syllables, places, amounts and dates, in `fedsim/assets/headlines.yaml`.

What makes it more than word spotting: a figure that is good when large and one that is bad when large are drawn
equally often, and so are rises and falls, so neither word says anything about the label, only the two together.
Many sentences name no direction at all and have to be read off two numbers, in either order. Denials and
avoided events turn the label round, neutral sentences use the same words, and a clause of noise may come before
or after. Source: Malo et al., "Good debt or bad debt", JASIST 65(4), 2014, for the task; no sentence is from there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

import fedsim
from fedsim.core.seeding import stream

LABELS: tuple[str, str, str] = ("negative", "neutral", "positive")
COUNTS: dict[str, tuple[int, int, int]] = {  # examples per class, in the order of LABELS
    "train": (246, 1107, 458),
    "validation": (26, 147, 53),
    "test": (31, 137, 59),
}
MAX_WORDS = 26

T = TypeVar("T")

_DATA: dict[str, Any] = yaml.safe_load(
    (Path(fedsim.__file__).parent / "assets" / "headlines.yaml").read_text(encoding="utf-8")
)
_MEASURES = {  # (name, kind of its amounts) of what is good when it grows (1), bad when it grows (-1), or neither (0)
    merit: [(name, kind) for kind, names in _DATA["measures"][key].items() for name in names]
    for merit, key in ((1, "good"), (-1, "bad"), (0, "neither"))
}


class Draw:
    """Choices from one NumPy generator; a sentence is a function of what it hands out."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._random = rng.random

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self._random() * len(items))]

    def chance(self, p: float) -> bool:
        return self._random() < p

    def whole(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def sign(self) -> int:
        return 1 if self._random() < 0.5 else -1

    def company(self) -> str:
        middle = self.pick(_DATA["mid"]) if self.chance(0.5) else ""
        return self.pick(_DATA["head"]) + middle + self.pick(_DATA["tail"]) + self.pick(_DATA["form"])

    def person(self) -> str:
        return self.say("{first_names} {last_names}")

    def place(self) -> str:
        return self.pick(_DATA["places"])

    def date(self) -> str:
        return self.say("{1-28} {months}")

    def period(self) -> str:
        return self.say("in the {spans}")

    def year(self) -> str:
        return str(self.whole(2001, 2019))

    def one_sum(self) -> str:
        return self.pair("money", 1)[0]

    def pair(self, kind: str, direction: int) -> tuple[str, str]:
        """(now, before), both written alike; now is above (1), equal to (0) or below (-1) before."""
        low, high, tenths, form = _DATA["amounts"][kind]
        if kind == "money":
            tenths, form = self.chance(0.7), self.pick(_DATA["currencies"])
        small = self.whole(low, int(high * 0.7))
        large = min(high, small + max(1, int(small * (0.05 + 0.75 * self._random()))))
        if direction == 0:
            large = small
        texts = [f"{n // 10}.{n % 10}" if tenths else str(n) for n in (large, small)]
        return (form.format(texts[0]), form.format(texts[1]))[:: 1 if direction >= 0 else -1]

    def say(self, form: Any, up: int = 1, **values: str) -> str:
        """A sentence of headlines.yaml, which says what stands in braces; `up` chooses between the sides of a `/`."""
        if isinstance(form, list):
            first, form = form
            for name, text in first.items():
                values[name] = self.say(text, up, **values)

        def put(found: re.Match[str]) -> str:
            word, side = found[1].removeprefix("-"), -up if found[1].startswith("-") else up
            above, _, below = word.partition("/")
            options = (below if below and side < 0 else above).split("|")
            word = options[0] if len(options) == 1 else self.pick(options)
            if word in values:
                return values[word]
            if word in _DATA:
                return self.say(self.pick(_DATA[word]), up, **values)
            if word in ("company", "person", "place", "date", "period", "year", "one_sum"):
                return getattr(self, word)()
            if word == "PLACE":
                return self.place().upper()
            return str(self.whole(*map(int, word.split("-")))) if re.fullmatch(r"\d+-\d+", word) else word

        return re.sub(r"\{(.+?)\}", put, form)

    def one_of(self, kind: str, up: int = 1, **values: str) -> str:
        """One sentence of a kind; all of them are drawn."""
        of = _DATA[kind]
        for name, form in of["first"].items():
            values[name] = self.say(form, up, **values)
        return self.pick([self.say(form, up, **values) for form in of["forms"]])


def _figure(d: Draw, name: str, kind: str, direction: int) -> dict[str, str]:
    """A figure that moved: its name, with and without an article, and its amounts."""
    now, before = d.pair(kind, direction)
    return {"name": name, "bare": name.removeprefix("the "), "now": now, "before": before}


def _change(d: Draw, merit: int, direction: int) -> str:
    return d.one_of("change", direction, **_figure(d, *d.pick(_MEASURES[merit]), direction))


def _outlook(d: Draw, merit: int, direction: int) -> str:
    measure, c = d.pick(_MEASURES[merit]), d.company()
    figure = _figure(d, *measure, direction)
    escaped = "was spared" if merit * direction > 0 else "missed out on"
    return d.say(_DATA["outlook"][d.whole(0, 7)], direction, c=c, escaped=escaped, **figure)


def _event(d: Draw, good: int) -> str:
    first, forms = _DATA["event"].values()
    values = {name: d.say(form) for name, form in first.items()}
    pair, turn = forms[d.whole(0, 8)], d.sign()
    return d.say(pair[0 if turn > 0 else -1], good, **values)


def brief(label: str, d: Draw) -> str:
    """The bare news of a class, without names, numbers or noise: `Net debt fell.`"""
    merit = 0 if label == "neutral" else d.sign()
    direction = merit * (1 if label == "positive" else -1) or d.sign()
    name, _ = d.pick(_MEASURES[merit])
    text = d.one_of("brief", direction, name=name, bare=name.removeprefix("the "))
    return text[0].upper() + text[1:]


def _noise(d: Draw) -> tuple[str, str]:
    """(before, after) a sentence: one of the two is a clause that says nothing good or bad."""
    measure, direction = d.pick(_MEASURES[0]), d.sign()
    before, _, after = d.one_of("noise", direction, **_figure(d, *measure, direction)).partition("[...]")
    return before, after


def sentence(label: str, draw: Draw) -> str:
    """One headline of the class named (one of LABELS), 7 to MAX_WORDS words, ending in a full stop."""
    while True:
        if label == "neutral":
            kind = draw.whole(0, 6)
            if kind < 3:
                core = draw.one_of("still", **_figure(draw, *draw.pick(_MEASURES[draw.sign()]), 0))
            else:
                core = draw.one_of("plain") if kind < 6 else _change(draw, 0, draw.sign())
        else:
            good, merit, kind = (1 if label == "positive" else -1), draw.sign(), draw.whole(0, 4)
            if kind < 2:
                core = _change(draw, merit, merit * good)
            else:
                core = _outlook(draw, merit, merit * good) if kind == 2 else _event(draw, good)
        before, after = _noise(draw) if draw.chance(0.4) else ("", "")
        text = f"{before}{core}{after}."
        if len(text.split()) <= MAX_WORDS:
            text = text.replace(" ,", ",").replace(" :", ":").replace(" ;", ";").replace(" 's ", "'s ")
            return text[0].upper() + text[1:]


def generate(seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """The data set: `{"train", "validation", "test"} -> [(sentence, label), ...]`, COUNTS examples per class.

    No sentence occurs twice, within a split or across splits. The same seed gives the same examples; seed 0 is the
    one that the pretraining of the tiny base left out.
    """
    seen: set[str] = set()
    splits: dict[str, list[tuple[str, str]]] = {}
    for split, counts in COUNTS.items():
        rng = stream(seed, "headlines", split)
        draw = Draw(rng)
        rows: list[tuple[str, str]] = []
        for label in rng.permutation(np.repeat(np.arange(len(LABELS)), counts)):
            text = sentence(LABELS[label], draw)
            while text in seen:
                text = sentence(LABELS[label], draw)
            seen.add(text)
            rows.append((text, LABELS[label]))
        splits[split] = rows
    return splits
