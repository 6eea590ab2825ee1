"""Three small instruction sets of our own words, in the file formats of Alpaca, Dolly and OASST1, for `tiny.yaml`.

    python experiments/sft_instructions/make_data.py --out experiments/sft_instructions/data

The sets differ in style, as the published ones do: short orders with a few words to work on, questions about a passage, and
long friendly replies to a person. Every row is put together from word lists by a seeded generator; nobody's data is in it.
The last set is the smallest by far, so that a model trained on it alone sees each of its rows many times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"alpaca": 400, "dolly": 250, "oasst1": 90}
NOUNS = [
    "lamp",
    "river",
    "stone",
    "apple",
    "chair",
    "cloud",
    "bread",
    "tiger",
    "candle",
    "ladder",
    "pencil",
    "window",
    "garden",
    "basket",
    "hammer",
]
COLORS = ["red", "blue", "green", "white", "black", "yellow", "brown", "grey"]
PEOPLE = ["Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas"]
TOWNS = ["Alder Brook", "Clay Harbour", "Dunmere", "Eastwick", "Fern Hill", "Grayport", "Holm", "Inverleigh"]
TRADES = {
    "baker": ("bread", "oven"),
    "smith": ("nails", "forge"),
    "weaver": ("blankets", "loom"),
    "potter": ("bowls", "wheel"),
    "carpenter": ("tables", "saw"),
    "tailor": ("coats", "needle"),
}
CHORES = {
    "wash a woollen jumper": ("fill a bowl with cool water", "add a little soap", "press it gently and lay it flat"),
    "pot a small plant": ("put stones into the pot", "fill it with fresh soil", "water it slowly"),
    "pack for a short trip": ("write a list", "roll the clothes", "keep the ticket on top"),
    "fix a dripping tap": ("close the main valve", "change the worn washer", "open the valve and look"),
    "make vegetable soup": ("cut the vegetables", "cook them in salted water", "season it and serve it hot"),
    "learn a short poem": ("read it aloud twice", "cover the second half", "say it before you sleep"),
}
MOODS = ("I am a bit lost", "I have never done this", "My friend could not tell me", "I tried twice and failed")
THANKS = ("Thanks a lot!", "Many thanks in advance.", "Any help is welcome.", "Please be patient with me.")

Row = dict[str, Any]


def orders(rng: np.random.Generator) -> Row:
    """A row of short orders: instruction, input, output."""
    words = [str(w) for w in rng.choice(NOUNS, size=int(rng.integers(3, 6)), replace=False)]
    numbers = [int(n) for n in rng.choice(90, size=4, replace=False) + 10]
    text, digits = " ".join(words), " ".join(map(str, numbers))
    tasks: list[tuple[str, str, str]] = [
        ("Write the words in reverse order.", text, " ".join(reversed(words))),
        ("Sort the words by the alphabet.", text, " ".join(sorted(words))),
        ("Write the words in capital letters.", text, text.upper()),
        ("How many words are there?", text, str(len(words))),
        ("Name the last word.", text, words[-1]),
        ("Name the largest number.", digits, str(max(numbers))),
        ("Put a comma between the numbers.", digits, ", ".join(map(str, numbers))),
        (f"Name a thing that is {(color := str(rng.choice(COLORS)))}.", "", f"a {color} {words[0]}"),
        (f"Use the word {words[0]} in a short sentence.", "", f"The {words[0]} is near the {words[1]}."),
    ]
    instruction, given, output = tasks[int(rng.integers(len(tasks)))]
    return {"instruction": instruction, "input": given, "output": output}


def questions(rng: np.random.Generator) -> Row:
    """A row of questions, most of them about a passage: instruction, context, response, category."""
    person, town = str(rng.choice(PEOPLE)), str(rng.choice(TOWNS))
    trade = str(rng.choice(list(TRADES)))
    goods, tool = TRADES[trade]
    years = int(rng.integers(2, 40))
    passage = (
        f"{person} has worked as a {trade} in {town} for {years} years. "
        f"In the morning {person} makes {goods}, and in the afternoon the {tool} is cleaned."
    )
    asked: list[tuple[str, str, str, str]] = [
        (f"Where does {person} work?", passage, f"{person} works in {town}.", "closed_qa"),
        (f"How long has {person} done this work?", passage, f"{person} has done it for {years} years.", "closed_qa"),
        ("What is cleaned in the afternoon?", passage, f"In the afternoon the {tool} is cleaned.", "closed_qa"),
        ("List name, trade and place.", passage, f"{person}; {trade}; {town}", "information_extraction"),
        ("Say it in one sentence.", passage, f"{person} is a {trade} in {town}.", "summarization"),
        (f"What does a {trade} make?", "", f"A {trade} makes {goods}.", "open_qa"),
        (f"Who needs a {tool} at work?", "", f"A {trade} needs a {tool} at work.", "open_qa"),
    ]
    instruction, context, response, category = asked[int(rng.integers(len(asked)))]
    return {"instruction": instruction, "context": context, "response": response, "category": category}


def talk(rng: np.random.Generator) -> Row:
    """What a person writes, and a long friendly reply: said, reply."""
    chore = str(rng.choice(list(CHORES)))
    first, second, third = CHORES[chore]
    name = str(rng.choice(PEOPLE))
    said = f"Hi, {name} here. {rng.choice(MOODS)}: how do I {chore}? {rng.choice(THANKS)}"
    openings = [f"Hello {name}, I am glad to help!", f"Of course, {name}!", "Sure, that is a fine question."]
    opening = str(rng.choice(openings))
    closing = str(rng.choice(["Tell me how it went!", "I hope this helps you.", "Do you want to know more?"]))
    reply = f"{opening} Here are three steps:\n1. {first}\n2. {second}\n3. {third}\n{closing}"
    return {"said": said, "reply": reply}


def threads(rng: np.random.Generator, count: int) -> list[Row]:
    """`count` messages that start a thread, each with a best reply (rank 0) and a second one, as OASST1's flat table."""
    rows: list[Row] = []
    for number, one in enumerate(distinct(talk, rng, count)):
        start = f"m{number:03d}"
        common = {"lang": "en", "message_tree_id": start}
        user = f"user-{int(rng.integers(12)):02d}"
        rows.append({"message_id": start, "parent_id": None, "user_id": user, "text": one["said"], "role": "prompter"})
        rows[-1] |= {**common, "rank": None}
        for rank, text in enumerate((one["reply"], "I do not know, sorry.")):
            row = {"message_id": f"{start}-{rank}", "parent_id": start, "user_id": f"helper-{(number + rank) % 9}"}
            rows.append({**row, "text": text, "role": "assistant", **common, "rank": rank})
    return rows


def distinct(make: Callable[[np.random.Generator], Row], rng: np.random.Generator, count: int) -> list[Row]:
    """`count` rows, no two alike: what is validated on was then never trained on word for word."""
    found: dict[str, Row] = {}
    while len(found) < count:
        row = make(rng)
        found.setdefault(json.dumps(row), row)
    return list(found.values())


def make_all(seed: int = 0) -> dict[str, str]:
    """File name -> text of the three files."""
    rngs = [np.random.default_rng([seed, number]) for number in range(3)]
    alpaca = distinct(orders, rngs[0], SIZES["alpaca"])
    dolly = distinct(questions, rngs[1], SIZES["dolly"])
    oasst1 = threads(rngs[2], SIZES["oasst1"])
    return {
        "orders.json": "[\n" + ",\n".join(map(json.dumps, alpaca)) + "\n]\n",
        "questions.jsonl": "".join(json.dumps(row) + "\n" for row in dolly),
        "talk.jsonl": "".join(json.dumps(row) + "\n" for row in oasst1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in make_all(args.seed).items():
        (args.out / name).write_text(text, encoding="utf-8")
        print(args.out / name)


if __name__ == "__main__":
    main()
