"""Simulated life: clients that are away, that fail in the middle of a round, that are slow.

Everything is a function of (seed, config, round, client), worked out before a round is trained: who is away, fails or comes
too late is known from the start, so no worker is kept busy with work that nobody takes, and a resumed run meets the same
life. Nothing here measures time; simulated seconds are tokens divided by a client's speed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsim.core.errors import UserError, nearest_first
from fedsim.core.seeding import stream


@dataclass(frozen=True)
class Turnout:
    """Who of a round's cohort answers.

    Attributes:
        on_time: numbers of the clients whose updates are merged in this round, ascending.
        late: of those whose updates are taken in the next round, ascending.
        lost: of those whose work is lost -> why: `dropped` | `late`.
        busy: of those that are still at work on the round before, and sit this one out.
        seconds: client -> simulated seconds until it answers, fails or would have answered; empty without speeds.
        round_seconds: simulated seconds until the server merges; 0 without speeds.
    """

    on_time: np.ndarray
    late: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    lost: dict[int, str] = field(default_factory=dict)
    busy: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    seconds: dict[int, float] = field(default_factory=dict)
    round_seconds: float = 0.0


@dataclass(frozen=True)
class Life:
    """What the config's section `simulation` says of the clients of a run.

    Attributes:
        seed: the experiment's.
        name: client number -> its id.
        availability: how likely a client is there in a round, or client number -> one 0 or 1 a round, over and over; a client
            that is not named is always there.
        drop: how likely a client that takes part fails in the middle of its round.
        speeds: tokens a second of every client; or the least and the most, between which each client's is drawn log-uniformly;
            or client number -> its own; or None: no clock.
        deadline_s: simulated seconds that the server waits in a round, or None: for all.
        late: what becomes of updates that come later: drop | next.
    """

    seed: int
    name: Callable[[int], str]
    availability: float | dict[int, list[int]] = 1.0
    drop: float = 0.0
    speeds: float | tuple[float, float] | dict[int, float] | None = None
    deadline_s: float | None = None
    late: str = "drop"

    def available(self, round: int, clients: np.ndarray) -> np.ndarray:
        """Those of all clients of a run (numbers, ascending) that are there in a round."""
        if isinstance(self.availability, dict):
            away = {c for c, trace in self.availability.items() if not trace[(round - 1) % len(trace)]}
            return clients[~np.isin(clients, list(away))] if away else clients
        if self.availability >= 1:
            return clients
        return clients[stream(self.seed, "available", round).random(len(clients)) < self.availability]

    def fails_at(self, round: int, client: int) -> float | None:
        """The part of its work, in [0, 1), after which a client fails in a round; None where it does not."""
        if self.drop <= 0:
            return None
        fails, at = stream(self.seed, "drop", self.name(client), round).random(2)
        return float(at) if fails < self.drop else None

    def speed(self, client: int) -> float:
        """A client's tokens a second."""
        if isinstance(self.speeds, dict):
            return self.speeds[client]
        if isinstance(self.speeds, tuple):
            low, high = map(math.log, self.speeds)
            return math.exp(low + (high - low) * float(stream(self.seed, "speed", self.name(client)).random()))
        return float(self.speeds)

    def turnout(
        self, round: int, cohort: np.ndarray, tokens: Callable[[int], float], owed: dict[int, float]
    ) -> Turnout:
        """Who of a cohort answers in a round.

        Args:
            round: from 1.
            cohort: numbers of its clients, ascending.
            tokens: client -> tokens of its round's work.
            owed: clients that are still at work on the round before -> simulated seconds left of it.
        """
        busy = cohort[np.isin(cohort, list(owed))]
        on_time, late, lost, seconds = [], [], {}, {}
        ends = list(owed.values())
        for client in map(int, cohort[~np.isin(cohort, busy)]):
            fails = self.fails_at(round, client)
            needs = tokens(client) / self.speed(client) if self.speeds is not None else 0.0
            needs *= 1.0 if fails is None else fails
            if self.speeds is not None:
                seconds[client] = needs
                ends.append(needs)
            if fails is not None:
                lost[client] = "dropped"
            elif self.deadline_s is None or needs <= self.deadline_s:
                on_time.append(client)
            elif self.late == "next":
                late.append(client)
            else:
                lost[client] = "late"
        lasts = max(ends, default=0.0)
        lasts = lasts if self.deadline_s is None else min(lasts, self.deadline_s)
        as_numbers = functools.partial(np.array, dtype=np.int64)
        return Turnout(as_numbers(on_time), as_numbers(late), lost, busy, seconds, lasts)


def by_number(given: dict[str, Any], names: Sequence[str], needed: Sequence[int], key: str) -> dict[int, Any]:
    """What a config says client by client, by the clients' numbers.

    Args:
        given: client's id -> value.
        names: the ids of all clients, by number.
        needed: numbers of the clients that have to be named.
        key: the config's key, for errors.

    Raises:
        UserError: for an id that no client has, or a client that is needed and not named.
    """
    number = {name: i for i, name in enumerate(names)}
    for name in given:
        if name not in number:
            raise UserError(
                f"{key}.{name}: {given[name]!r} is for no client; clients are: {nearest_first(name, names, 10)}"
            )
    missing = [names[c] for c in needed if names[c] not in given]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        way = "name every client, or give one number or [least, most]"
        raise UserError(f"{key}: {', '.join(missing[:5])}{more} missing; {way}")
    return {number[name]: value for name, value in given.items()}
