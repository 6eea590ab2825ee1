"""Client behavior in simulation: availability, dropout and speed.

Every draw is a function of (seed, config, round, client). Nothing here measures time: simulated seconds are tokens divided
by a client's speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.core.errors import UserError, nearest_first
from fedsim.core.seeding import stream


@dataclass(frozen=True)
class ClientAvailability:
    """The config section `simulation`, for the clients of one run.

    Attributes:
        seed: of the experiment.
        name: client number -> id.
        availability: probability that a client is available in a round; or client number -> a 0/1 trace by round, repeated
            cyclically; a client without a trace is always available.
        drop: probability that a participating client fails within its round.
        speeds: tokens per second of every client; or (lowest, highest), between which each client's speed is drawn
            log-uniformly; or client number -> speed; or None: no simulated clock.
        deadline_s: simulated seconds that the server waits in a round; None = for every client.
        late: what happens to updates that miss the deadline: drop | next.
    """

    seed: int
    name: Callable[[int], str]
    availability: float | dict[int, list[int]] = 1.0
    drop: float = 0.0
    speeds: float | tuple[float, float] | dict[int, float] | None = None
    deadline_s: float | None = None
    late: str = "drop"

    def available(self, round: int, clients: np.ndarray) -> np.ndarray:
        """The clients (numbers, ascending) that can be sampled in a round."""
        if isinstance(self.availability, dict):
            away = {c for c, trace in self.availability.items() if not trace[(round - 1) % len(trace)]}
            return clients[~np.isin(clients, list(away))] if away else clients
        if self.availability >= 1:
            return clients
        return clients[stream(self.seed, "available", round).random(len(clients)) < self.availability]

    def fails_at(self, round: int, client: int) -> float | None:
        """The fraction of its work, in [0, 1), after which a client fails in a round; None if it does not fail."""
        if self.drop <= 0:
            return None
        fails, at = stream(self.seed, "drop", self.name(client), round).random(2)
        return float(at) if fails < self.drop else None

    def speed(self, client: int) -> float:
        """Tokens per second of a client."""
        if isinstance(self.speeds, dict):
            return self.speeds[client]
        if isinstance(self.speeds, tuple):
            low, high = map(math.log, self.speeds)
            return math.exp(low + (high - low) * float(stream(self.seed, "speed", self.name(client)).random()))
        return float(self.speeds)


def by_number(given: dict[str, Any], names: Sequence[str], needed: Sequence[int], key: str) -> dict[int, Any]:
    """Values that a config gives by client id, by client number.

    Args:
        given: client id -> value.
        names: the id of each client, by number.
        needed: numbers of the clients that must have a value.
        key: the config key, for errors.

    Raises:
        UserError: for an id that no client has, or a client that needs a value and has none.
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
