"""From `simulation.attackers` to what which clients do, and the examples by which a server knows them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from fedsim.config.components import algorithm_of
from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.data.partition import VirtualPartition
from fedsim.training.attack import Attack, attackers

if TYPE_CHECKING:
    from fedsim.runs.build import Parts


def with_attack(parts: Parts) -> Parts:
    """An experiment's parts with its attackers, and with the examples that these train on.

    Raises:
        UserError: for an attack that is impossible here, with the reason.
    """
    section = parts.exp.simulation.attackers
    if section is None or "federated" not in parts.exp.modes:
        return parts
    clients = attackers(parts.exp.seed, parts.clients, section.fraction)
    if not clients:
        raise UserError(
            f"simulation.attackers.fraction: {section.fraction:g} of {len(parts.clients)} clients is none of them; raise it"
        )
    tokens, rows = parts.tokens["train"], np.empty(0, dtype=np.int64)
    total = len(tokens)
    if section.kind == "label_flip":
        if not tokens.words:
            raise UserError(
                "simulation.attackers.kind: label_flip needs classes, and these answers are free text; use sign_flip, gaussian or scaled"
            )
        if isinstance(parts.partition, VirtualPartition):
            raise UserError(
                "simulation.attackers.kind: label_flip needs clients with examples of their own, and virtual clients share them; use "
                "sign_flip, gaussian or scaled, or another partition"
            )
        rows = np.sort(np.concatenate([parts.partition.rows(client) for client in clients]))
        flipped = tokens.relabeled(rows, len(tokens.words) - 1 - tokens.labels.numpy()[rows])
        held = dataclasses.replace(parts.rows, tokens={**parts.tokens, "train": flipped})
        parts = dataclasses.replace(parts, rows=held)
    attack = Attack(section.kind, frozenset(clients), section.factor, section.std, parts.exp.seed, rows, total)
    return dataclasses.replace(parts, attack=attack)


def with_root(parts: Parts) -> Parts:
    """An experiment's parts with the examples that the server trains on, where its aggregator has it do so.

    Raises:
        UserError: if there are not that many.
    """
    if "federated" not in parts.exp.modes:
        return parts
    rule = algorithm_of(parts.exp.algorithm, parts.exp.aggregator).aggregates.get("update")
    count = getattr(rule, "root_examples", 0)
    if not count:
        return parts
    held = np.sort(parts.partition.all_rows())
    if count > len(held):
        raise UserError(
            f"aggregator.root_examples: {count}, but the clients have {len(held)} examples in all; lower it"
        )
    chosen = stream(parts.exp.seed, "root examples").choice(held, count, replace=False)
    return dataclasses.replace(parts, root=np.sort(chosen))
