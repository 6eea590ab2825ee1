"""What can be known to be impossible before a model is loaded: rounds without end, examples longer than the base takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedsim.algorithms import ALGORITHMS, ClientOptimizer
from fedsim.config.components import algorithm_of
from fedsim.config.experiment import Experiment
from fedsim.config.sections import MOST_EXAMPLES, Simulation
from fedsim.core.errors import UserError, shown
from fedsim.core.section import plain
from fedsim.data.batches import BatchSampler
from fedsim.models import base
from fedsim.models.positions import ends_at, max_positions

if TYPE_CHECKING:
    from fedsim.runs.build import Parts

MOST_SITES = 100  # clients of cross-site evaluation, in which every model meets every client's examples
MOST_STEPS = 10**9  # of a client in a run: weeks, even at a millisecond each


def sampler_of(exp: Experiment) -> BatchSampler:
    """How the experiment's clients sample batches."""
    work = exp.local
    return BatchSampler(work.batch_size, work.epochs, work.shuffle, work.drop_last)


def virtual_tokens(exp: Experiment) -> int:
    """Positions that a prompt method takes in front of each example."""
    keys = getattr(exp.adapter, "settings", None) or vars(exp.adapter)  # of a method by its PEFT name, of one of ours
    return keys.get("num_virtual_tokens") or 0


def check(parts: Parts) -> None:
    """Refuse what training or evaluation would only find out later.

    Raises:
        UserError: with the key to change.
    """
    exp, sizes = parts.exp, parts.partition.sizes
    clients = parts.clients
    held = len(clients)
    if held == 0:
        raise UserError("partition: no client has an example; raise the counts or lower num_clients")
    if exp.cohort.size != "all" and exp.cohort.size > held:
        raise UserError(
            f"cohort.size: {exp.cohort.size}, but only {held} clients have examples; use at most {held}, or all"
        )
    _check_algorithm(exp, held)
    work = exp.local
    if work.epochs is not None and work.drop_last:
        small = clients[sizes[clients] < work.batch_size]
        if len(small):
            name, rows = parts.partition.name(int(small[0])), int(sizes[small[0]])
            raise UserError(
                f"local.drop_last: true leaves {name} ({rows} examples, {len(small)} such client(s)) without a step at local.batch_size={work.batch_size}; "
                f"set drop_last=false, batch_size={int(sizes[clients].min())} or less, or local.steps"
            )
    _check_sites(parts)
    _check_work(parts)
    _check_vocabulary(parts)
    positions = max_positions(base.load_config(parts.model))
    extra = virtual_tokens(exp)
    longest = max(int(t.lengths.max(initial=0)) for t in parts.tokens.values())
    if positions is not None and longest + extra > positions:
        virtual = f" and {extra} virtual tokens" if extra else ""
        raise UserError(
            f"data.max_length: {exp.data.max_length} lets examples of {longest} tokens{virtual} through, the base takes {positions}; give {f'at most {positions - extra}' if positions - extra > 1 else 'fewer virtual tokens'}"
        )
    _check_room(parts, positions, extra)


def _check_algorithm(exp: Experiment, held: int) -> None:
    """Whether the algorithm goes with the clients' optimizer, their number `held` and their simulated behavior, and the
    aggregator with how many there are in a round."""
    if "federated" not in exp.modes:
        return
    algorithm, sim = algorithm_of(exp.algorithm, exp.aggregator), exp.simulation
    try:
        algorithm.suits(ClientOptimizer(exp.local.optimizer, exp.local.lr, exp.local.momentum))
    except ValueError as error:
        raise UserError(f"algorithm.{error}") from None
    name = getattr(exp.algorithm.name, "wanted", exp.algorithm.name)
    if algorithm.adapters and exp.adapter.name not in algorithm.adapters:
        needed = " or ".join(sorted(algorithm.adapters))
        raise UserError(
            f"algorithm.name: {name} works on the factors of adapter.name={needed}, and the adapter is {exp.adapter.name}; "
            f"set adapter.name={needed}, or take another algorithm"
        )
    if sim.late == "next" and not algorithm.takes_late:
        raise UserError(
            f"simulation.late: 'next', but algorithm.name={name} changes what clients train from round to round, so that late updates do "
            "not fit; set simulation.late=drop"
        )
    if getattr(exp.adapter, "ranks", None) is not None and not algorithm.takes_ranks:
        taking = ", ".join(n for n, kind in ALGORITHMS.items() if kind.takes_ranks)
        raise UserError(
            f"adapter.ranks: {shown(plain(exp.adapter.ranks))}, but algorithm.name={name} needs one rank for all clients; take one of "
            f"{taking}, or leave it out"
        )
    if algorithm.lora:
        _check_lora(exp)
    size = held if exp.cohort.size == "all" else exp.cohort.size
    buffered = algorithm.buffered(size)
    size = size if buffered is None else buffered.size
    if size < (least := getattr(algorithm.aggregates.get("update"), "least", 1)):
        byzantine = getattr(exp.aggregator, "byzantine", None)
        key, value = ("byzantine", byzantine) if byzantine else ("name", exp.aggregator.name)
        raise UserError(
            f"aggregator.{key}: {value} needs at least {least} clients in a round, and there are {size}; raise cohort.size, or take "
            "another aggregator"
        )
    if buffered is None:
        return
    if sim.speeds is None:
        raise UserError(
            f"simulation.speeds: null, but algorithm.name={name} is asynchronous, and the clients' speeds say who arrives when; set them"
        )
    whys = {
        "deadline_s": "its server waits for a number of messages, not for a time",
        "drop": "a client that fails would leave the server waiting",
        "availability": "its clients start at any time, not in common rounds",
    }
    for key, why in whys.items():
        value = getattr(sim, key)
        if value != getattr(Simulation(), key):
            raise UserError(
                f"simulation.{key}: {shown(value)}, but algorithm.name={name} is asynchronous: {why}; leave it out"
            )
    if buffered.clients > held:
        raise UserError(
            f"algorithm.concurrency: {buffered.clients}, but only {held} clients have examples, and none is at work twice; use at most {held}"
        )


def _check_lora(exp: Experiment) -> None:
    """Whether an algorithm that works on the factors of plain LoRA can have them."""
    name = getattr(exp.algorithm.name, "wanted", exp.algorithm.name)
    odd = {"use_dora", "layer_replication", "lora_bias", "target_parameters", "init_lora_weights"}
    if used := sorted(k for k in exp.adapter.peft if k in odd and exp.adapter.peft[k]):
        raise UserError(
            f"adapter.{used[0]}: set, but algorithm.name={name} is exact for plain LoRA alone; leave it out"
        )
    if exp.aggregator.name != "mean":
        raise UserError(
            f"aggregator.name: {exp.aggregator.name}, but algorithm.name={name} aggregates the clients' factors itself; use mean"
        )


def _check_sites(parts: Parts) -> None:
    """Whether cross-site evaluation is possible."""
    if not parts.exp.evaluate.cross_site:
        return
    if parts.own is None or not parts.own.sizes.any():
        why = "no client has validation examples of its own"
        why += " (virtual clients never have)" if parts.own is None else ""
        raise UserError(f"evaluate.cross_site: true, but {why}; set it to false, or use another partition")
    if len(parts.clients) > MOST_SITES:
        why = f"{len(parts.clients)} clients hold examples, and every model would be evaluated on all of theirs"
        raise UserError(f"evaluate.cross_site: true, but {why}; set it to false, or use at most {MOST_SITES} clients")


def _check_room(parts: Parts, positions: int | None, extra: int) -> None:
    """Whether a base has positions for all that is put behind a prompt in evaluation: generated tokens, and each label."""
    evaluate = parts.exp.evaluate
    scored = [parts.tokens[name] for name in ("validation", "test")]
    prompt = max(int(t.prompts.numpy()[t.kept()].max(initial=0)) for t in scored) + extra
    labels = max((len(c) for t in scored for c in t.candidates or ()), default=0)
    new = evaluate.max_new_tokens - 1 if evaluate.generate else 0  # the last one is not fed back
    if positions is None or prompt + max(labels, new) <= positions or ends_at(parts.model) is None:
        return
    virtual = f" and {extra} virtual tokens" if extra else ""
    if prompt + new > positions:
        shorter = positions - extra - new
        ways = [f"max_new_tokens to at most {positions - prompt + 1}"] * (prompt <= positions)
        ways += [f"data.max_length to at most {shorter}"] * (shorter > 1)
        raise UserError(
            f"evaluate.max_new_tokens: {evaluate.max_new_tokens} after a prompt of {prompt - extra} tokens{virtual} exceeds the {positions} positions of the base; set {' or '.join(ways) or 'both it and data.max_length lower'}"
        )
    raise UserError(
        f"data.max_length: {parts.exp.data.max_length} allows a prompt of {prompt - extra} tokens{virtual}, and with the longest label ({labels} tokens) it exceeds the {positions} positions of the base; set it to at most {max(2, positions - extra - labels)}"
    )


def _check_work(parts: Parts) -> None:
    """Refuse a round, or a run, that is too long to be finished; its batches alone would fill the memory."""
    exp, sizes = parts.exp, parts.partition.sizes[parts.clients]
    work, sampler = exp.local, sampler_of(exp)
    cohort = len(sizes) if exp.cohort.size == "all" else exp.cohort.size
    # The centralized model takes as many examples as the cohort together, unless steps are matched.
    each = np.full(len(sizes), work.batch_size * work.steps) if work.steps is not None else sizes * (work.epochs or 1)
    per_client = examples = int(each.max())
    if "central" in exp.modes and exp.central.match == "epochs":
        examples = int(np.sort(each)[-cohort:].sum())
    key, value = ("steps", work.steps) if work.steps is not None else ("epochs", work.epochs)
    if examples > MOST_EXAMPLES:
        whose = "the centralized model" if examples > per_client else "a client"
        raise UserError(
            f"local.{key}: {value} makes {examples:,} examples per round for {whose}; lower it to at most "
            f"{max(1, int(value * MOST_EXAMPLES / examples))}"
        )
    steps = sampler.count(int(sizes.max()), work.steps)
    if exp.rounds * steps > MOST_STEPS:
        raise UserError(
            f"rounds: {exp.rounds} of {steps:,} optimizer steps each are more than {MOST_STEPS:,} steps; lower rounds or local.{key}"
        )


def _check_vocabulary(parts: Parts) -> None:
    """Whether the base has an embedding for each token: a tokenizer of another model may number more."""
    size = getattr(base.load_config(parts.model).get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        return
    largest = max((int(t.ids.max()) for t in parts.tokens.values() if len(t.ids)), default=0)
    largest = max(largest, parts.tokenizer.pad_token_id)
    if largest >= size:
        word = parts.tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"model.path: the tokenizer of {parts.model.name!r} has token {largest} ({word!r}), but the base has embeddings for {size}; give the folder the tokenizer that the base was trained with"
        )
