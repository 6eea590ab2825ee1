"""Where the runs of a sweep go, and which of them share passes."""

from __future__ import annotations

import os

from fedsim.config.experiment import Experiment
from fedsim.core.section import plain
from fedsim.runs.build import Parts, Shared
from fedsim.runs.resolve import devices_of


def places_of(devices: list[str] | str, workers: int | None, threads: int | None) -> tuple[list[str], int]:
    """(the device of each worker, threads of each)."""
    found = devices_of(Experiment(executor={"name": "pool", "devices": devices}))[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is None:
        # One thread per run: on a CPU runs beside each other waste less than threads that wait for each other.
        workers = max(len(found), max(1, cores // (threads or 1)) if found == ["cpu"] else 1)
    places = [found[i % len(found)] for i in range(workers)]
    return places, threads or max(1, cores // len(places))


def crews_of(group: list[tuple[int, Parts]], together: int) -> list[list[int]]:
    """Runs that go side by side, at most `together` of them: those that agree in all that a pass has in common.

    A run whose attackers train on other labels has examples of its own, and one with private gradients has passes of its own.
    """
    alike: dict[str, list[int]] = {}
    for i, parts in group:
        apart = (
            together == 1
            or parts.exp.client is not None
            or (parts.attack is not None and parts.attack.relabels)
            or parts.ledger is not None
        )
        alike.setdefault(repr(i) if apart else _pass_key(parts.exp), []).append(i)
    return [runs[a : a + together] for runs in alike.values() for a in range(0, len(runs), together)]


def _pass_key(exp: Experiment) -> str:
    """What runs must have in common to share passes; rates, schedules, steps, seeds, clients and partitions may differ."""
    own = ("steps", "epochs", "lr", "min_lr", "warmup", "schedule", "schedule_over", "horizon", "keep_state", "shuffle")
    local = {k: v for k, v in plain(exp.local).items() if k not in (*own, "drop_last")}
    how = ("batch_size", "generate", "max_new_tokens", "max_examples")
    evaluate = {k: v for k, v in plain(exp.evaluate).items() if k in how}
    same = (plain(exp.model), plain(exp.data), plain(exp.adapter), local, evaluate, plain(exp.training))
    # An initial head is the seed's, see Shared.base_key; with full fine-tuning a model has a device to itself.
    return repr((Shared.base_key(exp) or id(exp), same))
