"""When clients start and when their messages arrive: dropout, deadlines and stragglers are one mechanism.

A client trains from the global model of the round in which it starts; its message is aggregated in the round in which it
arrives, or is lost. All of it is known before a round is trained, so no worker computes what is thrown away, and a resumed
run meets the same clients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fedsim.simulate.availability import ClientAvailability


@dataclass(frozen=True)
class Work:
    """One client's part in one round.

    Attributes:
        client: its number.
        starts: the round from whose global model it trains.
        arrives: the round in which its message is aggregated; None = it is lost.
        lost: why it is lost: dropped | late; empty if it arrives.
        seconds: simulated seconds until it answers, fails, or would have answered; None without speeds.
        repeat: how often it has started in this round before.
        slot: its number among the messages of the round in which it arrives; None = by its place among those that start.
    """

    client: int
    starts: int
    arrives: int | None
    lost: str = ""
    seconds: float | None = None
    repeat: int = 0
    slot: int | None = None


@dataclass(frozen=True)
class RoundWork:
    """The work that starts in one round.

    Attributes:
        work: in the order of their start.
        seconds: simulated seconds of the round; 0 without speeds.
        clock: simulated seconds from the start of the run to the end of the round.
        arrived: at an asynchronous server, what arrives in this round, whenever it started; in order.
        at_work: at an asynchronous server, clients at work at the end of the round, whose messages come later.
    """

    work: tuple[Work, ...]
    seconds: float = 0.0
    clock: float = 0.0
    arrived: tuple[Work, ...] = ()
    at_work: int | None = None

    def arriving(self, round: int | None) -> list[Work]:
        """The work whose message arrives in this round; None = the lost work."""
        return [w for w in self.work if w.arrives == round]

    def batches(self, round: int) -> list[tuple[int, list[Work]]]:
        """(round of arrival, what arrives then), in the order in which it is trained; the last one is of this `round`.

        Clients that start a second time come after all that start for the first time, and so on.
        """
        by: dict[tuple[int, int], list[Work]] = {}
        for w in self.work:
            if w.arrives is not None:
                by.setdefault((w.repeat, -w.arrives), []).append(w)
        out = [(-late, by[repeat, late]) for repeat, late in sorted(by)]
        return out if out and out[-1][0] == round else [*out, (round, [])]


@dataclass
class Timeline:
    """The work of each round: a function of the seed, the speeds and the token counts, never of training.

    Attributes:
        cohort: round -> sampled clients, ascending.
        tokens: client -> tokens of its work in a round.
        behavior: dropout, speeds and deadline; None = every client answers in time.
    """

    cohort: Callable[[int], np.ndarray]
    tokens: Callable[[int], float]
    behavior: ClientAvailability | None = None
    _round: int = 0
    _clock: float = 0.0
    _in_flight: dict[int, float] = field(default_factory=dict)  # client -> seconds left of the round before

    @property
    def delay(self) -> int:
        """Rounds by which a message can come late."""
        return 1 if self.behavior is not None and self.behavior.late == "next" else 0

    def work(self, round: int) -> RoundWork:
        """The work that starts in a round, from 1. Rounds before it are replayed where they were not asked for."""
        if self.behavior is None:
            return RoundWork(tuple(Work(c, round, round) for c in map(int, self.cohort(round))))
        if round <= self._round:
            self._round, self._clock, self._in_flight = 0, 0.0, {}
        while True:
            self._round += 1
            found = self._next(self._round, self.behavior)
            if self._round == round:
                return found

    def _next(self, round: int, behavior: ClientAvailability) -> RoundWork:
        """One round; clients that are still at work on the round before sit it out."""
        out, ends = [], list(self._in_flight.values())
        for client in map(int, self.cohort(round)):
            if client in self._in_flight:
                continue
            fails, seconds = behavior.fails_at(round, client), None
            if behavior.speeds is not None:
                seconds = self.tokens(client) / behavior.speed(client) * (1.0 if fails is None else fails)
                ends.append(seconds)
            late = fails is None and seconds is not None and seconds > (behavior.deadline_s or float("inf"))
            lost = "dropped" if fails is not None else "late" if late and not self.delay else ""
            out.append(Work(client, round, None if lost else round + late, lost, seconds))
        lasts = max(ends, default=0.0)
        lasts = lasts if behavior.deadline_s is None else min(lasts, behavior.deadline_s)
        self._clock += lasts
        self._in_flight = {w.client: w.seconds - lasts for w in out if w.arrives is not None and w.arrives > round}
        return RoundWork(tuple(out), lasts, self._clock)
