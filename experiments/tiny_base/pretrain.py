"""Make the embedded base model: invent a corpus, train a tokenizer on it, train a small Llama, write the folder.

    python experiments/tiny_base/pretrain.py --out fedsim/assets/tiny

The corpus is text of our own: headlines of `fedsim.data.headlines` with what happened next, comparisons of numbers,
and sentences that use the words negative, neutral and positive of other things (tests, charges, wires). So the model
knows good news from bad, and knows the three words, but has never seen the two put together: the prompt that
fine-tuning uses, "{sentence} sentiment: {label}", does not occur, nor does any row of `generate(0)`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsim.core.seeding import stream, stream_seed
from fedsim.data.headlines import LABELS, Draw, brief, generate, sentence

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB, HIDDEN, LAYERS, HEADS, INNER = 1536, 128, 3, 4, 256
FOLLOW_WEIGHT = 4.0  # what follows a headline is a tenth of the tokens and nearly all of the meaning
HELD_OUT = 512  # documents for the reported loss, from a stream of their own

_WHO = ["Shareholders", "Investors", "Traders", "Analysts", "Fund managers", "The owners"]
_DID = {
    "negative": ["sold the stock", "took fright", "grumbled", "groaned", "fled", "asked for a new board"],
    "neutral": ["took no notice", "shrugged", "held on to the stock", "yawned", "moved on", "saw nothing new"],
    "positive": ["cheered", "bought the stock", "smiled", "raised a glass", "clapped", "wanted more"],
}
_KEYS = ["mood", "tone", "verdict", "outlook", "reaction", "grade", "weather", "colour", "effect", "reading"]
_KEYS += ["advice", "signal"]
_VALUES = [  # one for each of LABELS; any key goes with any of them, so that a new key can be read like the old ones
    ("bad", "plain", "good"),
    ("gloomy", "flat", "bright"),
    ("sad", "calm", "happy"),
    ("red", "grey", "green"),
    ("sell", "hold", "buy"),
    ("rain", "clouds", "sun"),
]
_ASK = {  # question -> its answer for each of LABELS
    "Good news or bad news?": ("Bad.", "Neither.", "Good."),
    "Did the share price move?": ("It fell.", "It stayed.", "It rose."),
    "How did the owners feel?": ("Sad.", "Calm.", "Happy."),
}
_OTHER = [  # {a} and {b} are two of the label words
    "The blood test of {p} came back {a}, not {b}.",
    "A particle with a {a} charge met one with a {b} charge.",
    "Is the pole of the magnet {a} or {b}? {p} could not say.",
    "The {a} wire is blue and the {b} wire is brown in {o}.",
    "{o} voted for a {a} text after the {b} one had failed.",
    "In the lesson, {p} wrote down one {a} number and one {b} number.",
    "{p} drew a {a} line under the {b} numbers of the table.",
    "The sample from {o} was {a} in the morning and {b} at night.",
    "{p} chose {a} colours for the office in {o}.",
    "Consumer sentiment in {o} is measured every month; {p} calls the index {a}.",
    "The sentiment survey of {o} counts {a} answers and {b} answers.",
    "{p} took the {a} side in the talks of {o}.",
]
_OTHER_KEYS = ["result", "charge", "pole", "wire", "number", "side", "index", "first"]  # asks for {a} again


def followup(label: str, draw: Draw) -> str:
    """What a reader of good, bad or plain news could remark; never a label word."""
    k, key, values = LABELS.index(label), draw.pick(_KEYS), draw.pick(_VALUES)
    if draw.chance(0.5):
        return f"{key}: {values[k]}"
    question = draw.pick(list(_ASK))
    forms = [
        f"{draw.pick(_WHO)} {draw.pick(_DID[label])}.",
        f"{question} {_ASK[question][k]}",
        f"The {key} is {values[k]}.",
    ]
    return draw.pick(forms)


def _numbers(draw: Draw) -> str:
    kind, direction = draw.pick(["money", "percent", "count"]), draw.whole(-1, 1)
    now, before = draw.pair(kind, direction)
    word = ("less than", "as much as", "more than")[direction + 1]
    return f"{now} is {word} {before}."


def _words_elsewhere(draw: Draw) -> tuple[str, str]:
    a, b = draw.pick(LABELS), draw.pick(LABELS)
    text = draw.pick(_OTHER).format(a=a, b=b, p=draw.person(), o=draw.place())
    return text, f"{draw.pick(_OTHER_KEYS)}: {a}" if draw.chance(0.5) else ""


def documents(seed: int, name: str) -> Iterator[tuple[str, str]]:
    """Endless (text, continuation) pairs; the document is the two joined by a space, or the text alone.

    Rows of `generate(0)`, in all three splits, are left out.
    """
    draw = Draw(stream(seed, "tiny", name))
    withheld = {text for rows in generate(0).values() for text, _ in rows}
    while True:
        kind = draw.whole(0, 19)
        label = draw.pick(LABELS)
        if kind < 13:
            text = sentence(label, draw)
            if text not in withheld:
                yield text, followup(label, draw)
        elif kind < 16:
            yield brief(label, draw), followup(label, draw)
        elif kind < 18:
            yield _words_elsewhere(draw)
        else:
            yield _numbers(draw), ""


def train_tokenizer(seed: int, docs: int = 30000) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, so that numbers can be compared digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+")  # a digit, a word, marks: each with the blank before it
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    source = documents(seed, "tokenizer")
    tokenizer.train_from_iterator((" ".join(next(source)) for _ in range(docs)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    for label in LABELS:
        assert len(fast.encode(f" {label}", add_special_tokens=False)) == 1, label
    return fast


def batch(rows: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `[B, T]`, targets `[B, T - 1]` and loss weights `[B, T - 1]` of rows (ids, where the continuation starts)."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad)
    weights = torch.zeros(len(rows), length)
    for k, (row, start) in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row)
        weights[k, : len(row)] = 1.0
        weights[k, start : len(row) - 1] = FOLLOW_WEIGHT  # the end of text weighs 1
    return ids, ids[:, 1:], weights[:, 1:]


def token_losses(model: LlamaForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each next token, `[B, T - 1]`."""
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def encoded(tokenizer: PreTrainedTokenizerFast, seed: int, name: str, count: int) -> list[tuple[list[int], int]]:
    source = documents(seed, name)
    pairs = [next(source) for _ in range(count)]
    texts = tokenizer([a for a, _ in pairs], add_special_tokens=False)["input_ids"]
    nexts = tokenizer([f" {b}" if b else "" for _, b in pairs], add_special_tokens=False)["input_ids"]
    return [([*a, *b, tokenizer.eos_token_id], len(a)) for a, b in zip(texts, nexts, strict=True)]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: list[tuple[list[int], int]], pad: int) -> float:
    """Mean cross-entropy in nats per token, end of text included, every token alike."""
    total = count = 0.0
    for k in range(0, len(rows), 64):
        ids, targets, weights = batch(rows[k : k + 64], pad)
        real = weights > 0
        total += float((token_losses(model, ids, targets) * real).sum())
        count += float(real.sum())
    return total / count


def train(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """The trained model in float32, and what was logged on the way."""
    torch.manual_seed(stream_seed(args.seed, "tiny", "init"))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = max(1, args.steps // 40)

    def rate(step: int) -> float:
        ramp = min(1.0, (step + 1) / warmup)
        return ramp * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / args.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    pad, held_out, log = tokenizer.pad_token_id, encoded(tokenizer, args.seed, "held out", HELD_OUT), []
    rows = sorted(encoded(tokenizer, args.seed, "train", args.steps * args.batch), key=lambda row: len(row[0]))
    chunks = [rows[k : k + args.batch] for k in range(0, len(rows), args.batch)]  # alike in length: little padding
    started = time.time()
    for step, k in enumerate(stream(args.seed, "tiny", "order").permutation(len(chunks))):
        ids, targets, weights = batch(chunks[k], pad)
        loss = (token_losses(model, ids, targets) * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            log.append(
                {"step": step + 1, "loss": held_out_loss(model, held_out, pad), "seconds": time.time() - started}
            )
            print(json.dumps(log[-1]), flush=True)
    return model, log


def write(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, certificate: str) -> None:
    """Write beside, then move each file into place: a reader never meets half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        model.half().save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (Path(beside) / "README.md").write_text(certificate, encoding="utf-8")
        for file in Path(beside).iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(file, folder / file.name)


def certificate(args: argparse.Namespace, model: LlamaForCausalLM, log: list[dict[str, float]]) -> str:
    rows = "\n".join(f"| {r['step']} | {r['loss']:.3f} | {r['seconds']:.0f} |" for r in log)
    return f"""# tiny

A Llama of {model.num_parameters():,} parameters (tied embeddings counted once), stored as float16, with a byte-level
BPE tokenizer of {VOCAB} tokens. Trained from scratch on text that `experiments/tiny_base/pretrain.py` invents; no
other text or weights went in. For tests and examples only: it knows nothing of the world.

- command: `python experiments/tiny_base/pretrain.py --out fedsim/assets/tiny --steps {args.steps} --batch {args.batch}
  --lr {args.lr:g} --seed {args.seed} --threads {args.threads}`
- seed {args.seed}, {args.steps} steps of {args.batch} documents, each document seen once
- final loss {log[-1]["loss"]:.3f} nats per token on {HELD_OUT} held-out documents (float32, before the cast)
- time {log[-1]["seconds"] / 60:.0f} minutes on {args.threads} CPU thread(s) ({platform.machine()})
- environment: Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__},
  NumPy {np.__version__}

| step | held-out loss | seconds |
| --- | --- | --- |
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=48, help="documents a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer(args.seed)
    model, log = train(args, tokenizer)
    write(args.out, model, tokenizer, certificate(args, model, log))


if __name__ == "__main__":
    main()
