"""From the section `privacy: {name: local_sgd}` to the ledger of each client, and what would break the guarantee."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedsim.config.components import algorithm_of
from fedsim.core.errors import UserError
from fedsim.data.partition import VirtualPartition
from fedsim.privacy.examples import ExamplePrivacy
from fedsim.runs.private import keep_noise, shown_rounds

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.runs.build import Parts
    from fedsim.runs.folder import RunFolder


def ledger_of(parts: Parts) -> ExamplePrivacy | None:
    """What an experiment guarantees of each example of a client; None = nothing.

    Raises:
        UserError: for what breaks the guarantee, with the reason.
    """
    exp = parts.exp
    section = exp.privacy
    if section.name != "local_sgd" or "federated" not in exp.modes:
        return None
    _check(parts)
    z = section.noise_multiplier
    made = ExamplePrivacy(
        section.clip, z or 0.0, section.delta, parts.partition.sizes, parts.clients, exp.local.batch_size
    )
    if z is None:
        *_, last = planned(parts)
        made = dataclasses.replace(made, z=made.solve(section.target_epsilon, last))
    return made


def planned(parts: Parts) -> Iterator[Counter[int]]:
    """After each round, the optimizer steps that each client will have done, by its number; changed in place."""
    from fedsim.runs.resolve import schedule_of

    schedule = schedule_of(parts, "federated")
    front, steps = algorithm_of(parts.exp.algorithm, parts.exp.aggregator).first_steps, Counter[int]()
    for t in range(1, schedule.rounds + 1):
        steps += schedule.steps_of(schedule.timeline.work(t), front)
        yield steps


def _check(parts: Parts) -> None:
    """Refuse what would make the guarantee wrong.

    Raises:
        UserError: with the key, the reason and the way out.
    """
    exp = parts.exp
    algorithm = algorithm_of(exp.algorithm, exp.aggregator)
    named = f"algorithm.name: {exp.algorithm.name}"
    problems = [
        (
            len(algorithm.parts) > 1 or algorithm.batches > 1,
            f"{named} takes several gradients in a step, and the ledger counts one; use one that takes one, such as fedavg",
        ),
        (
            "start_loss" in algorithm.needs,
            f"{named} sends what it makes of a client's loss, to which no noise is added; use one that does not, such as fedavg",
        ),
        (
            parts.root is not None,
            f"aggregator.name: {exp.aggregator.name} trains on examples of the clients without noise; use aggregator.name=mean",
        ),
        (
            exp.adapter.name == "none",
            "adapter.name: none trains the whole model, of which gradients by example do not fit; use an adapter, such as lora",
        ),
    ]
    for wrong, said in problems:
        if wrong:
            raise UserError(f"{said} (privacy.name: local_sgd)")


def keep(folder: RunFolder, ledger: ExamplePrivacy) -> None:
    """Write `privacy.json`.

    Raises:
        UserError: if the run was begun with other noise, as where a target was solved for another number of rounds.
    """
    told = {"level": "example", "noise_multiplier": ledger.z, "clip": ledger.clip, "delta": ledger.delta}
    keep_noise(folder, {**told, "accountant": "rdp", "neighbours": "add_remove", "batch_size": ledger.batch_size})


def table(parts: Parts) -> pd.DataFrame:
    """Epsilon of an example after at most 20 of the rounds: the largest of a client, and the distribution over all clients."""
    import pandas as pd

    assert parts.ledger is not None, "a private experiment has a ledger"
    shown, rows = set(shown_rounds(parts.exp.rounds)), []
    for t, steps in enumerate(planned(parts), 1):
        if t in shown:
            rows.append({"round": t, **parts.ledger.summary(parts.ledger.epsilons(steps))})
    return pd.DataFrame(rows).rename(columns={"epsilon": "epsilon_largest"})


def about(parts: Parts) -> list[str]:
    """What a run with this guarantee tells the user before it trains."""
    ledger, exp = parts.ledger, parts.exp
    assert ledger is not None, "a private experiment has a ledger"
    *_, last = planned(parts)
    found = ledger.summary(ledger.epsilons(last))
    rates = sorted({ledger.sampling(int(c)) for c in ledger.clients})
    out = [
        f"privacy: of each example of a client, epsilon at most {found['epsilon']:.3g} after {exp.rounds} rounds at delta "
        f"{ledger.delta:g} (rdp, add_remove), {found['epsilon_q50']:.3g} in the median over clients; noise {ledger.z:.4g} x clip "
        f"{ledger.clip:g} at each step; each example is in a batch with probability {rates[0]:.4g}"
        + (f" to {rates[-1]:.4g} by client" if len(rates) > 1 else "")
    ]
    if isinstance(parts.partition, VirtualPartition):
        out.append("privacy: virtual clients share examples, and epsilon is of what one client sends")
    if {"local", "central"} & set(exp.modes):
        out.append("privacy: the modes local and central train without noise")
    out.append(
        "privacy: validation and test examples, best/, which is chosen on them, metrics of single clients, and how many examples "
        "a client has are outside the guarantee"
    )
    return out
