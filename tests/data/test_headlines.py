"""The embedded data set keeps its promises, and the embedded base model is what its certificate says."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedsim.core.seeding import stream
from fedsim.data.headlines import COUNTS, LABELS, MAX_WORDS, Draw, generate, sentence

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "fedsim" / "assets" / "tiny"
LABEL_WORD = re.compile(r"\b(negative|neutral|positive)\b")
PUBLISHED = {"train": (246, 1107, 458), "validation": (26, 147, 53), "test": (31, 137, 59)}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[tuple[str, str]]]:
    return generate(0)


@pytest.fixture(scope="module")
def pretrain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_pretrain", ROOT / "experiments" / "tiny_base" / "pretrain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_class_counts_are_those_of_the_published_cut(rows: dict[str, list[tuple[str, str]]]) -> None:
    assert COUNTS == PUBLISHED
    for split, counts in PUBLISHED.items():
        found = Counter(label for _, label in rows[split])
        assert tuple(found[label] for label in LABELS) == counts
    assert tuple(np.sum(list(PUBLISHED.values()), axis=0)) == (303, 1391, 570)


def test_rows_are_shuffled_not_sorted_by_class(rows: dict[str, list[tuple[str, str]]]) -> None:
    head = Counter(label for _, label in rows["train"][:400])
    assert all(head[label] > 20 for label in LABELS)


@pytest.mark.parametrize(("seed", "start"), [(0, "eb795732e4c56587"), (5, "aadb948b951c6dca")])
def test_the_sentences_of_a_seed_never_change(seed: int, start: str) -> None:
    """Runs and the base model were made with them."""
    assert hashlib.sha256(repr(generate(seed)).encode()).hexdigest().startswith(start)


def test_another_seed_is_other_text(rows: dict[str, list[tuple[str, str]]]) -> None:
    first = {text for split in rows.values() for text, _ in split}
    second = {text for split in generate(1).values() for text, _ in split}
    assert len(first & second) < 0.02 * len(first)


def test_no_sentence_occurs_twice(rows: dict[str, list[tuple[str, str]]]) -> None:
    texts = [text for split in rows.values() for text, _ in split]
    assert len(texts) == 2264 == len(set(texts))


def test_sentences_are_tidy(rows: dict[str, list[tuple[str, str]]]) -> None:
    for text, _ in itertools.chain.from_iterable(rows.values()):
        assert 6 <= len(text.split()) <= MAX_WORDS
        assert text.endswith(".")
        assert text[0] == text[0].upper()
        assert not re.search(r"[{}]|  | [,;:]", text), text
        assert not LABEL_WORD.search(text), "a label word would give the label away"


def test_no_direction_word_gives_the_label_away() -> None:
    """A rise or a fall, of whatever, is good as often as bad."""
    words = ["rose", "increased", "grew", "fell", "declined", "shrank", "profit", "loss", "costs", "higher", "lower"]
    seen: dict[str, Counter[str]] = {word: Counter() for word in words}
    for label in ("negative", "positive"):
        draw = Draw(stream(5, "test"))
        for _ in range(6000):
            for word in set(re.findall(r"[a-z]+", sentence(label, draw).lower())) & seen.keys():
                seen[word][label] += 1
    for word, found in seen.items():
        share = found["positive"] / found.total()
        assert found.total() > 100, (word, found)
        assert 0.38 < share < 0.62, (word, found)


@pytest.mark.parametrize("direction", [-1, 0, 1])
def test_pairs_of_amounts_stand_as_asked(direction: int) -> None:
    draw = Draw(stream(3, "pairs"))
    for kind in ("money", "percent", "count", "small", "area"):
        for _ in range(300):
            now, before = (float(re.findall(r"[\d.]+", text)[0]) for text in draw.pair(kind, direction))
            assert np.sign(now - before) == direction


def test_the_task_format_and_the_rows_are_absent_from_pretraining(
    rows: dict[str, list[tuple[str, str]]], pretrain: ModuleType
) -> None:
    withheld = {text for split in rows.values() for text, _ in split}
    headlines = elsewhere = 0
    for text, follow in itertools.islice(pretrain.documents(0, "train"), 20000):
        assert "sentiment:" not in f"{text} {follow}".lower()
        assert text not in withheld
        if LABEL_WORD.search(text):  # about something else: headlines have no label word, as tested above
            elsewhere += 1
        else:
            assert not LABEL_WORD.search(follow)
            headlines += bool(follow)
    assert headlines > 10000
    assert elsewhere > 1000


def test_rows_of_the_data_set_would_be_filtered(pretrain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter acts: withhold headlines that the generator is about to say, and it does not say them."""
    texts = [text for text, follow in itertools.islice(pretrain.documents(7, "x"), 200) if follow]
    said = [text for text in texts if len(text.split()) > 12 and not LABEL_WORD.search(text)]
    monkeypatch.setattr(pretrain, "generate", lambda seed: {"test": [(text, "neutral") for text in said[-9:]]})
    again = {text for text, _ in itertools.islice(pretrain.documents(7, "x"), 200)}
    assert set(said[:-9]) <= again
    assert not again & set(said[-9:])


def test_tokenizer_loads_and_keeps_label_words_whole(rows: dict[str, list[tuple[str, str]]]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    ids = [tokenizer(f" {label}")["input_ids"] for label in LABELS]
    assert [len(i) for i in ids] == [1, 1, 1]
    assert len({i[0] for i in ids}) == 3
    for text, label in rows["validation"]:
        whole, prompt = tokenizer(f"{text} sentiment: {label}"), tokenizer(f"{text} sentiment:")
        assert len(whole["input_ids"]) <= 48
        assert whole["input_ids"] == prompt["input_ids"] + tokenizer(f" {label}")["input_ids"]
        assert tokenizer.decode(whole["input_ids"]) == f"{text} sentiment: {label}"


def test_model_loads_small_and_knows_its_text(pretrain: ModuleType) -> None:
    """On documents that nobody has seen, the loss is the certificate's; an untrained model is at ln(1536) = 7.3."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 5_000_000
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert model.config.vocab_size == len(tokenizer)
    assert model.num_parameters() < 1_500_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    fresh = pretrain.encoded(tokenizer, 99, "fresh", 128)
    loss = pretrain.held_out_loss(model.eval(), fresh, tokenizer.pad_token_id)
    recorded = re.search(r"final loss ([\d.]+) nats", (TINY / "README.md").read_text(encoding="utf-8"))
    assert recorded is not None
    assert loss < 1.3
    assert abs(loss - float(recorded[1])) < 0.1, "the weights are not those of the certificate"
