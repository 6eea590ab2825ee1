"""Embedded data set: invented financial headlines whose label follows from how they are built.

Three splits of (sentence, label) with the class counts of the Financial PhraseBank cut used in federated LoRA
studies (2,264 rows, 80/10/10), so that a partition by published class counts works on it unchanged. The text is
ours: a small grammar over companies made of syllables, places, amounts and dates. No file, no download.

What makes it more than word spotting: a figure that is good when large and one that is bad when large are drawn
equally often, and so are rises and falls, so neither word says anything about the label, only the two together.
Many sentences name no direction at all and have to be read off two numbers, in either order. Denials and
avoided events turn the label round, neutral sentences use the same words, and a clause of noise may come before
or after. Source: Malo et al., "Good debt or bad debt", JASIST 65(4), 2014, for the task; no sentence is from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from fedsim.core.seeding import stream

LABELS: tuple[str, str, str] = ("negative", "neutral", "positive")
COUNTS: dict[str, tuple[int, int, int]] = {  # rows per class, in the order of LABELS
    "train": (246, 1107, 458),
    "validation": (26, 147, 53),
    "test": (31, 137, 59),
}
MAX_WORDS = 26

T = TypeVar("T")


def _words(text: str, separator: str = " ") -> list[str]:
    return text.split(separator)


_HEAD = _words("Val Nor Kem Tor Lin Sal Har Vik Pel Mar Rau Os Ber Tam Fin Gal Kor Lum Ter Zan Bel Dor Eks Hol")
_MID = _words("ta ri so me lo va ne ki du ra mi po")
_TAIL = _words("ra lis kon mar dex tek via nor lund vik sen ron lia max gas fors")
_FORM = ["", "", "", " Oyj", " Plc", " AB", " Group", " Corp", " Holding", " SA"]
_PLACES = _words(
    "Helsinki Oslo Riga Tallinn Vienna Lyon Turin Porto Gdansk Malmo Leeds Bremen Vilnius Aarhus Ghent Basel"
)
_FIRST_NAMES = _words("Anna Erik Maria Jonas Laura Peter Helena Oskar Ida Tomas Sofia Martin")
_LAST_NAMES = _words("Lahti Berg Novak Rossi Weber Dahl Costa Virta Holm Silva Moser Kallio")
_MONTHS = _words("January February March April May June July August September October November December")
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday")
_PRODUCTS = _words("pumps tyres cranes lifts valves sensors cables phones engines trams boilers boats filters drills")
_SPANS = _words("first quarter|second quarter|third quarter|last quarter|first half|second half|full year", "|")
_EARLIER = ["a year earlier", "a year ago", "in the same period last year", "in the previous period"]
_LATER = ["next year", "this year", "in the coming months"]
_CURRENCIES = ["EUR {} mln", "EUR {} mln", "USD {} mln", "SEK {} mln", "{} mln euros", "{} mln dollars"]

_AMOUNTS: dict[str, tuple[int, int, bool, str]] = {  # kind -> lowest, highest, in tenths, how it is written
    "money": (12, 980, True, ""),  # in tenths or whole millions, of several currencies
    "percent": (21, 480, True, "{} pct"),
    "count": (110, 940, False, "{}"),
    "small": (4, 12, False, "{}"),
    "area": (120, 980, False, "{} square metres"),
}
# (names, kind of their amounts): what is good when it grows (1), bad when it grows (-1), or neither (0)
_MEASURES: dict[int, list[tuple[str, str]]] = {
    1: [
        ("net sales|operating profit|pretax profit|net profit|revenue|order intake|the order backlog", "money"),
        ("operating cash flow|export sales|fee income|rental income", "money"),
        ("gross margin|market share|the occupancy rate|return on equity", "percent"),
        ("passenger numbers|new subscriptions|customer visits|the number of new orders", "count"),
    ],
    -1: [
        ("the operating loss|the pretax loss|the net loss|operating costs|net debt|credit losses", "money"),
        ("interest expenses|impairment charges|energy costs|unpaid invoices|legal costs", "money"),
        ("the vacancy rate|the cost ratio|the share of bad loans|the scrap rate", "percent"),
        ("customer complaints|warranty claims|work accidents|the number of late deliveries", "count"),
    ],
    0: [
        ("the number of shares|the number of owners|the number of pages in the report", "count"),
        ("the share of foreign owners|the voting rights of foreign owners|the free float", "percent"),
        ("the number of board members|the notice period in weeks", "small"),
        ("the share capital", "money"),
        ("the floor area of the head office", "area"),
    ],
}
_NAMED = {
    merit: [(name, kind) for names, kind in groups for name in _words(names, "|")]
    for merit, groups in _MEASURES.items()
}

_UP = ["rose", "increased", "climbed", "grew", "went up", "jumped", "edged up"]
_DOWN = ["fell", "decreased", "declined", "dropped", "went down", "shrank", "edged down"]
_TO_UP, _TO_DOWN = ["rise", "increase", "climb", "grow"], ["fall", "decrease", "decline", "drop"]
_A_UP, _A_DOWN = ["a rise", "an increase", "a jump", "growth"], ["a fall", "a decrease", "a decline", "a drop"]


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
        middle = self.pick(_MID) if self.chance(0.5) else ""
        return self.pick(_HEAD) + middle + self.pick(_TAIL) + self.pick(_FORM)

    def person(self) -> str:
        return f"{self.pick(_FIRST_NAMES)} {self.pick(_LAST_NAMES)}"

    def place(self) -> str:
        return self.pick(_PLACES)

    def date(self) -> str:
        return f"{self.whole(1, 28)} {self.pick(_MONTHS)}"

    def period(self) -> str:
        return f"in the {self.pick(_SPANS)}"

    def year(self) -> int:
        return self.whole(2001, 2019)

    def money(self) -> str:
        return self.pair("money", 1)[0]

    def pair(self, kind: str, direction: int) -> tuple[str, str]:
        """(now, before), both written alike; now is above (1), equal to (0) or below (-1) before."""
        low, high, tenths, form = _AMOUNTS[kind]
        if kind == "money":
            tenths, form = self.chance(0.7), self.pick(_CURRENCIES)
        small = self.whole(low, int(high * 0.7))
        large = min(high, small + max(1, int(small * (0.05 + 0.75 * self._random()))))
        if direction == 0:
            large = small
        texts = [f"{n // 10}.{n % 10}" if tenths else str(n) for n in (large, small)]
        return (form.format(texts[0]), form.format(texts[1]))[:: 1 if direction >= 0 else -1]


def _measure(d: Draw, merit: int) -> tuple[str, str]:
    """A figure that is good (1) or bad (-1) when it grows, or neither (0), with the kind of its amounts."""
    return d.pick(_NAMED[merit])


def _way(direction: int, up: Sequence[str], down: Sequence[str]) -> Sequence[str]:
    return up if direction > 0 else down


def _own(d: Draw, name: str) -> str:
    """`operating costs` -> `operating costs at Valtora`, or with the company in front of it."""
    bare = name.removeprefix("the ")
    return d.pick([f"{name} at {{c}}", f"{{c}} said its {bare}", f"{{c}} said that its {bare}"]).format(c=d.company())


def _of(d: Draw, name: str) -> str:
    form = d.pick([f"{name} at {{c}}", f"{name} of {{c}}", f"{{c}} 's {name.removeprefix('the ')}"])
    return form.format(c=d.company())


def _change(d: Draw, merit: int, direction: int) -> str:
    """A figure that moved. Some forms leave the direction to the two numbers."""
    name, kind = _measure(d, merit)
    now, before = d.pair(kind, direction)
    verb, mark = d.pick(_way(direction, _UP, _DOWN)), ("up" if direction > 0 else "down")
    period, earlier, own, of = d.period(), d.pick(_EARLIER), _own(d, name), _of(d, name)
    forms = [
        f"{own} {verb} to {now} {period} from {before} {earlier}",
        f"{own} {verb} by {d.whole(3, 48)} pct {period} and came to {now}",
        f"from {before} {earlier} , {of} {verb} to {now} {period}",
        f"{period} {own} {verb} from {before} to {now}",
        f"{of} totalled {now} {period} , {mark} from {before} {earlier}",
        f"{of} came to {now} {period} , compared with {before} {earlier}",
        f"{own} stood at {now} , against {before} {earlier}",
        f"{before} {earlier} , {now} {period} : {name} at {d.company()}",
    ]
    return d.pick(forms)


def _outlook(d: Draw, merit: int, direction: int) -> str:
    """Forecasts, denials and avoided events; the direction is that of the news, not of the verb in it."""
    name, kind = _measure(d, merit)
    own, c = name.removeprefix("the "), d.company()
    now, before = d.pair(kind, direction)
    up, opposite = _way(direction, _TO_UP, _TO_DOWN), _way(-direction, _TO_UP, _TO_DOWN)
    form = d.whole(0, 7)
    if form == 0:
        raised = d.pick(_way(direction, ["raised", "lifted", "increased"], ["cut", "lowered", "reduced"]))
        return f"{c} {raised} its forecast for {own} in {d.year()} to {now} from {before}"
    if form == 1:
        return f"{c} expects its {own} to {d.pick(up)} {d.pick(_LATER)}"
    if form == 2:
        return f"{c} no longer expects its {own} to {d.pick(opposite)} {d.period()}"
    if form == 3:
        escaped = "was spared" if merit * direction > 0 else "missed out on"
        return f"{c} {escaped} {d.pick(_way(-direction, _A_UP, _A_DOWN))} in {name} {d.period()}"
    if form == 4:
        turned = d.pick(_way(direction, _A_UP, _A_DOWN))
        return f"the {d.pick(opposite)} in {name} that {c} had forecast has turned into {turned}"
    if form == 5:
        more = d.pick(_way(direction, ["higher", "larger"], ["lower", "smaller"]))
        return f"{_of(d, name)} {d.period()} was {more} than the {before} that analysts had expected"
    if form == 6:
        return f"analysts had expected {before} , but {_of(d, name)} {d.period()} came in at {now}"
    more = _way(direction, ["higher", "up"], ["lower", "down"])
    return f"{_of(d, name)} ended the {d.pick(_SPANS)} {d.whole(3, 48)} pct {d.pick(more)}"


def _event(d: Draw, good: int) -> str:
    """Things that happened: the same nouns and verbs in good (1) and bad (-1) news."""
    c, other, place, money = d.company(), d.company(), d.place(), d.money()
    form, turn = d.whole(0, 8), d.sign()
    yes = good * turn > 0
    if form == 0:
        theirs = f"the claim of {money} that {c} had brought against {other}"
        claim = theirs if turn > 0 else f"a claim of {money} against {c}"
        return f"a court in {place} {'upheld' if yes else 'threw out'} {claim}"
    if form == 1:
        what = f"a complaint about {c}" if turn < 0 else f"the plan of {c} to sell {d.pick(_PRODUCTS)} in {place}"
        return f"the regulator {d.pick(['approved', 'accepted'] if yes else ['rejected', 'turned down'])} {what}"
    if form == 2:
        product, verb = d.pick(_PRODUCTS), ("won" if good > 0 else "lost")
        return f"{c} {verb} an order for {product} worth {money} {'ahead of' if good > 0 else 'to'} its rival {other}"
    if form == 3:
        order = f"an order for {d.whole(12, 90)} {d.pick(_PRODUCTS)}"
        if turn > 0:
            return f"{other} {'placed' if good > 0 else 'cancelled'} {order} with {c} worth {money}"
        return f"{c} {'was handed' if good > 0 else 'was stripped of'} {order} worth {money} by {other}"
    if form == 4:
        if turn > 0:
            return f"the strike at the {place} plant of {c} {'ended' if good > 0 else 'began'} on {d.pick(_DAYS)}"
        return f"{c} {'restarted' if good > 0 else 'halted'} output of {d.pick(_PRODUCTS)} in {place} after a fire"
    if form == 5:
        what = d.pick(["default risk", "funding cost"]) if turn < 0 else d.pick(["credit rating", "fair value"])
        return f"{other} {d.pick(['raised', 'lifted'] if yes else ['lowered', 'cut'])} its view of the {what} of {c}"
    if form == 6:
        found = "no faults" if good > 0 else d.pick(["faults", "cracks"])
        return f"{c} found {found} in the {d.whole(110, 940)} {d.pick(_PRODUCTS)} that it inspected in {place}"
    now, before = d.money(), d.money()
    left, right = ("profit", "loss") if good > 0 else ("loss", "profit")
    if form == 7:
        return f"{c} swung to a {left} of {now} {d.period()} from a {right} of {before} {d.pick(_EARLIER)}"
    return f"after a {right} of {before} {d.pick(_EARLIER)} , {c} posted a {left} of {now} {d.period()}"


def _still(d: Draw) -> str:
    """Neutral with the words of the other two classes: unchanged figures, open questions, figures on their own."""
    name, kind = _measure(d, d.sign())
    now, _ = d.pair(kind, 0)
    c, bare, own, of = d.company(), name.removeprefix("the "), _own(d, name), _of(d, name)
    period, earlier, up, down = d.period(), d.pick(_EARLIER), d.pick(_UP), d.pick(_DOWN)
    forms = [
        f"{own} stayed unchanged at {now} {period}",
        f"{of} came to {now} {period} , compared with {now} {earlier}",
        f"{own} stood at {now} , against {now} {earlier}",
        f"{c} did not say whether its {bare} {up} or {down} {period}",
        f"{c} will tell on {d.date()} whether its {bare} {d.pick([up, down])} {period}",
        f"{c} expects its {bare} neither to {d.pick(_TO_UP)} nor to {d.pick(_TO_DOWN)} {d.pick(_LATER)}",
        f"{of} totalled {now} {period} , in line with the {now} that analysts had expected",
        f"{c} kept its forecast for {bare} in {d.year()} at {now}",
        f"{of} came to {now} {period} , the company in {d.place()} reports",
    ]
    return d.pick(forms)


def _plain(d: Draw) -> str:
    """Neutral: appointments, moves, schedules, sizes, agreements of unstated effect."""
    c, other, place, there, product = d.company(), d.company(), d.place(), d.place(), d.pick(_PRODUCTS)
    job = d.pick(["chief executive", "head of sales", "board member", "finance director"])
    unit = d.pick(["head office", "warehouse", "legal unit"])
    forms = [
        f"{c} has appointed {d.person()} {job} from {d.date()} , following {d.person()}",
        f"{c} will move its {unit} from {place} to {there} in {d.pick(_MONTHS)}",
        f"{c} moved its annual meeting {d.pick(['up', 'back'])} by {d.whole(4, 12)} days to {d.date()}",
        f"{c} has signed an agreement with {other} on {product} ; the terms were not disclosed",
        f"the new {product} of {c} weigh up to {d.whole(12, 90)} kilos and come down in {d.whole(4, 12)} parts",
        f"a court in {place} will hear a claim of {d.money()} against {c} on {d.date()}",
        f"the regulator has received the plan of {c} to sell {product} in {place}",
        f"{c} , which makes {product} in {place} , has {d.whole(110, 940)} employees and net sales of {d.money()}",
        f"{c} will publish its report on profit and loss {d.period()} on {d.date()} in {place}",
        f"{c} changed the name of its {product} unit to {other} on {d.pick(_DAYS)}",
    ]
    return d.pick(forms)


def brief(label: str, d: Draw) -> str:
    """The bare news of a class, without names, numbers or noise: `Net debt fell.`"""
    merit = 0 if label == "neutral" else d.sign()
    direction = merit * (1 if label == "positive" else -1) or d.sign()
    name, _ = _measure(d, merit)
    forms = [
        f"{name} {d.pick(_way(direction, _UP, _DOWN))}.",
        f"{d.pick(_way(direction, _A_UP, _A_DOWN))} in {name}.",
        f"{d.pick(_way(direction, ['higher', 'more'], ['lower', 'less']))} {name.removeprefix('the ')}.",
    ]
    text = d.pick(forms)
    return text[0].upper() + text[1:]


def _noise(d: Draw) -> tuple[str, str]:
    """(before, after) a sentence: one of the two is a clause that says nothing good or bad."""
    name, kind = _measure(d, 0)
    direction = d.sign()
    now, before = d.pair(kind, direction)
    moved = f"{name} {d.pick(_way(direction, _UP, _DOWN))} to {now}"
    forms = [
        (f"after a board meeting in {d.place()} on {d.pick(_DAYS)} , ", ""),
        (f"{d.place().upper()} , {d.date()} - ", ""),
        (f"according to {d.person()} of {d.place()} , ", ""),
        (f"as {moved} from {before} , ", ""),
        ("", f" , while {moved}"),
        ("", f" , the company said on {d.pick(_DAYS)}"),
        ("", f" , says a report from {d.place()}"),
    ]
    return d.pick(forms)


def sentence(label: str, draw: Draw) -> str:
    """One headline of the class named (one of LABELS), 7 to MAX_WORDS words, ending in a full stop."""
    while True:
        if label == "neutral":
            kind = draw.whole(0, 6)
            core = _still(draw) if kind < 3 else _plain(draw) if kind < 6 else _change(draw, 0, draw.sign())
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
    """The data set: `{"train", "validation", "test"} -> [(sentence, label), ...]`, COUNTS rows per class.

    No sentence occurs twice, within a split or across splits. The same seed gives the same rows; seed 0 is the
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
