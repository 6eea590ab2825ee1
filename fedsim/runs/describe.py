"""What a run tells the user before it trains: what is trained, sent and kept, and what the data holds."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from fedsim.algorithms import Algorithm
from fedsim.channel import Filters, Sizes, downlink, uplink
from fedsim.config.sections import Messages
from fedsim.core.errors import UserError, shown
from fedsim.core.params import FOLD, Layout, meta
from fedsim.core.store import Store
from fedsim.models import adapters
from fedsim.runs.build import Parts
from fedsim.runs.folder import RunFolder
from fedsim.runs.local_sgd import about as about_ledger
from fedsim.runs.local_sgd import keep as keep_ledger
from fedsim.runs.private import about as about_privacy
from fedsim.runs.private import keep
from fedsim.runs.progress import Progress
from fedsim.runs.resolve import schedule_of
from fedsim.runs.worker_spec import WorkerSpec
from fedsim.training.packs import factors, reducer_of
from fedsim.training.planner import Plan
from fedsim.training.ranks import shape_at


def describe(
    parts: Parts,
    folder: RunFolder,
    show: Progress,
    spec: WorkerSpec,
    model: nn.Module,
    layout: Layout,
    stores: dict[str, Store],
    where: str,
    plan: Plan,
) -> Callable[[int, int, int], tuple[int, int]]:
    """Show it, and write `model.json`.

    Returns:
        (round, client, round in which it last began, or 0) -> bytes that it sends and receives.
    """
    exp, messages, trained = parts.exp, parts.exp.messages, adapters.trained(model)
    about, dtype = adapters.describe(model, trained), next(iter(trained.values())).dtype
    algorithm = spec.algorithms.get("federated", Algorithm())
    scale = Sizes(0, 4 if parts.privacy is not None else 0)  # what a clipped message is multiplied by, a float32
    excludes = (lambda name: False) if spec.recipe.filters is None else spec.recipe.filters.excludes
    sizes = functools.cache(functools.partial(_sizes, algorithm, layout, messages, dtype, scale, excludes))
    up, down = sizes(1, None, 0)
    about |= {"bytes_up": up.total, "bytes_down": down.total, "up": vars(up), "down": vars(down)}
    kept = {m: stores[m].nbytes for m in exp.modes}
    attacked = {"attackers": sorted(map(parts.partition.name, parts.attack.clients))} if parts.attack else {}
    folder.write_json("model.json", {**about, "adapter": exp.adapter.name, **attacked, "kept_bytes_per_client": kept})
    how = [f" as {name}" if name else "" for name in (messages.up, messages.down)]
    show.note(
        f"{exp.adapter.name} on {exp.model.path}: {about['trained']:,} of {about['parameters']:,} parameters are trained "
        f"({about['per_cent']:.2f} %); per client and round: {up.total / 1e6:.2f} MB up{how[0]}, {down.total / 1e6:.2f} MB down{how[1]}"
    )
    if "federated" not in exp.modes and any(how):
        show.note("messages: nothing is sent without the mode federated, so messages.up and down have no effect")
    _tell_aggregator(parts, algorithm, spec, layout, show)
    if algorithm.warning:
        show.warn(f"algorithm: {algorithm.warning}")
    if parts.privacy is not None:
        keep(folder, parts.privacy)
        for line in about_privacy(parts.privacy, exp):
            show.note(line)
    if spec.recipe.filters is not None and "federated" in exp.modes:
        tell_filters(folder, spec.recipe.filters, layout, show)
    if parts.ledger is not None:
        keep_ledger(folder, parts.ledger)
        for line in about_ledger(parts):
            show.note(line)
    if any(kept.values()):
        most = exp.checkpoint.keep + 1 + (exp.checkpoint.every > 1)  # a round writes beside what checkpoints refer to
        total = sum(b * most * (1 if m == "central" else len(parts.clients)) for m, b in kept.items()) / 1e6
        each = ", ".join(f"{b / 1e6:,.1f} MB ({m})" for m, b in kept.items() if b)
        show.note(f"client state on disk: {each} per client; at most {total:,.1f} MB in total")
    report = parts.report
    skew = f"mean JS divergence {report['js_mean']:.3f} bits, size Gini {report['size_gini']:.2f}"
    show.note(f"{len(parts.clients)} clients, {report['rows']} examples, {skew}; {where}, {plan.threads} thread(s)")
    tokenizer = parts.tokenizer
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        show.note(f"examples are padded with the end-of-text token {tokenizer.eos_token!r}")
    if "overlap" in report["notes"]:
        show.note(f"virtual clients: {report['notes']['overlap']}")
    if names := report["empty_clients"]:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        show.note(f"left out, no examples: {', '.join(names[:10])}{more}")
    for split, why in report["left_out"].items():
        if empty := ", ".join(f"{n} examples left out ({k})" for k, n in why.items() if k != "too long"):
            show.note(f"{split}: {empty}")
    for split, tokens in parts.tokens.items():
        if (over := tokens.over(exp.data.max_length)) is not None:
            share, text = over
            (show.warn if share > 0.05 else show.note)(f"{'warning: ' if share > 0.05 else ''}{split}: {text}")
    rank_of = functools.partial(spec.recipe.rank_of, algorithm)
    stack = _stacks(algorithm, parts, layout, messages, dtype, rank_of) if algorithm.folds else lambda round: 0

    def bytes_of(round: int, client: int, since: int) -> tuple[int, int]:
        up, down = sizes(round, rank_of(client), since)
        return up.total, down.total + sum(map(stack, range(max(since, 1), round)))

    return bytes_of


def tell_filters(folder: RunFolder, filters: Filters, layout: Layout, show: Progress) -> None:
    """What the filters are, and are not; into `privacy.json`, too.

    Raises:
        UserError: for excluded parameters that are not trained.
    """
    out = [name for name in layout.shapes if filters.excludes(name)]
    absent = (
        [name for name in filters.exclude if name not in layout.shapes] if isinstance(filters.exclude, tuple) else []
    )
    if absent or (filters.exclude is not None and not out):
        near = ", ".join(list(layout.shapes)[:4])
        raise UserError(
            f"privacy.exclude: {shown(absent[0] if absent else filters.exclude)} is no trained parameter; these are: {near} ..."
        )
    says = "filters change what clients send, and guarantee nothing: there is no epsilon"
    told = {"level": "none", "epsilon": None, "note": says, "excluded": out}
    told |= {
        n: f and vars(f) for n, f in (("percentile", filters.percentile), ("sparse_vector", filters.sparse_vector))
    }
    folder.write_json("privacy.json", told)
    show.note(f"privacy: {says}")


def _stacks(
    algorithm: Algorithm,
    parts: Parts,
    layout: Layout,
    messages: Messages,
    dtype: torch.dtype,
    rank_of: Callable[[int], int | None],
) -> Callable[[int], int]:
    """Round -> bytes of the stack of its cohort's factors, which a client receives for each round since it last began."""
    schedule = schedule_of(parts, "federated")
    sent = algorithm.messages(layout)["update"].shapes
    factors = [(n, s, layout.shapes[n]) for n, s in sent.items() if ".lora_A." in n or ".lora_B." in n]

    @functools.cache
    def stack(round: int) -> int:
        ranks = Counter(rank_of(int(client)) for client in schedule.cohort(round))
        each = {
            r: downlink(messages.down).nbytes([shape_at(n, s, r, own) for n, s, own in factors], dtype).total
            for r in ranks
        }
        return sum(each[rank] * count for rank, count in ranks.items())

    return stack


def _tell_aggregator(parts: Parts, algorithm: Algorithm, spec: WorkerSpec, layout: Layout, show: Progress) -> None:
    """Who attacks, what an aggregator makes of weights, and what is not measured."""
    exp, attack = parts.exp, parts.attack
    if attack is not None:
        names = [parts.partition.name(client) for client in sorted(attack.clients)]
        show.note(
            f"attackers ({attack.kind}): {', '.join(names[:20])}{f' and {len(names) - 20} more' * (len(names) > 20)}"
        )
    metered = "federated" in exp.modes and spec.recipe.meter and factors(algorithm, layout)
    if metered and reducer_of(algorithm, layout, spec.recipe).metered is None:
        show.note("the clients' factors are too many to keep, so lora_aggregation_error is not measured")
    rule = algorithm.aggregates.get("update")
    if "federated" in exp.modes and not getattr(rule, "weighs", True) and exp.algorithm.weights != "uniform":
        show.note(f"aggregator.name={exp.aggregator.name} does not use algorithm.weights={exp.algorithm.weights}")


def _sizes(
    algorithm: Algorithm,
    layout: Layout,
    messages: Messages,
    dtype: torch.dtype,
    scale: Sizes,
    excludes: Callable[[str], bool],
    round: int,
    rank: int | None,
    since: int,
) -> tuple[Sizes, Sizes]:
    """Bytes of a client's message in a round, and of what it receives: what has changed since it last began, in round `since`."""
    sent, exact = [], []
    for group, tensors in algorithm.messages(layout).items():
        out = excludes if group == "update" else lambda name: False
        names = [(n, s) for n, s in tensors.shapes.items() if algorithm.travels(n, round) and not out(n)]
        (exact if group in algorithm.exact else sent).extend(names)
    stays, state = algorithm.stays(layout.shapes), algorithm.sent(algorithm.init(meta(layout))[0])
    received = [*layout.shapes.items(), *((n, tuple(t.shape)) for n, t in state.items() if not n.startswith(FOLD))]
    missed = range(since, round) if since else ()
    received = [
        (n, s)
        for n, s in received
        if n not in stays and (n in state or not missed or any(algorithm.changes(n, r) for r in missed))
    ]
    sends, plain, receives = (
        [shape_at(n, s, rank, layout.shapes.get(n)) for n, s in each] for each in (sent, exact, received)
    )
    up = uplink(messages.up).nbytes(sends, dtype) + uplink(None).nbytes(plain, dtype) + scale
    return up, downlink(messages.down).nbytes(receives, dtype)
