"""When clients start and arrive at an asynchronous server, which steps once enough messages are there.

A fixed number of clients is at work all the time: one that arrives is replaced at once, from the model of that moment. Between two
server steps the model stays as it is, so a round, which is one step, is also the version of the model that clients start from. All
of it follows from the seed, the speeds and the token counts; nothing of it from training.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fedsim.simulate.timeline import RoundWork, Work

FAR = 10_000  # server steps after which work is not waited for: its client is at work to the end of any run


@dataclass
class BufferedTimeline:
    """The work of each round of an asynchronous server.

    Attributes:
        clients: that can be drawn, ascending.
        size: messages of a server step.
        at_work: how many clients are at work at a time.
        seconds: client -> simulated seconds of its work.
        rng: round -> generator that draws the clients that start in it.
    """

    clients: np.ndarray
    size: int
    at_work: int
    seconds: Callable[[int], float]
    rng: Callable[[int], np.random.Generator]
    _round: int = 0  # under way
    _flying: list[tuple[float, int, Work]] = field(default_factory=list)  # heap of (arrival, dispatch number, work)
    _number: int = 0
    _started: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # round -> how many have started
    _starts: dict[int, list[tuple[int, Work]]] = field(default_factory=lambda: defaultdict(list))  # those that arrived
    _arrived: dict[int, list[Work]] = field(default_factory=lambda: defaultdict(list))
    _ends: dict[int, float] = field(default_factory=lambda: {0: 0.0})  # round -> time of its step
    _left: dict[int, int] = field(default_factory=dict[int, int])  # round -> clients at work just after its step
    _times: Counter[int] = field(default_factory=Counter[int])  # how often each client has started in this round

    @property
    def delay(self) -> int:
        """Rounds by which a message can come late; here a round takes what is there."""
        return 0

    def work(self, round: int) -> RoundWork:
        """The work that starts in a round, from 1: known once all of it has arrived."""
        if not self._round:
            self._next_round()
            self._start(0.0)
        while self._round <= round or (len(self._starts[round]) < self._started[round] and self._round <= round + FAR):
            self._go_on()
        late = [(n, w) for _, n, w in self._flying if w.starts == round]
        work = [w for _, w in sorted([*self._starts[round], *late], key=lambda each: each[0])]
        seconds = self._ends[round] - self._ends[round - 1]
        return RoundWork(tuple(work), seconds, self._ends[round], tuple(self._arrived[round]), self._left[round])

    def _go_on(self) -> None:
        """All that arrive next at the same time, in the order in which they started; then others start in their place."""
        now = self._flying[0][0]
        while self._flying and self._flying[0][0] == now:
            _, number, work = heapq.heappop(self._flying)
            here = self._arrived[self._round]
            here.append(Work(work.client, work.starts, self._round, "", work.seconds, work.repeat, len(here)))
            self._starts[work.starts].append((number, here[-1]))
            if len(here) == self.size:
                self._ends[self._round], self._left[self._round] = now, len(self._flying)
                self._next_round()
        self._start(now)

    def _next_round(self) -> None:
        self._round += 1
        self._times.clear()
        self._rng = self.rng(self._round)

    def _start(self, now: float) -> None:
        """Clients that are not at work start, until enough are."""
        idle = np.setdiff1d(self.clients, [w.client for _, _, w in self._flying])
        missing = self.at_work - len(self._flying)
        if missing < len(idle):
            idle = np.sort(idle[self._rng.choice(len(idle), missing, replace=False, shuffle=False)])
        for client in map(int, idle):
            seconds = self.seconds(client)
            work = Work(client, self._round, None, "at work", seconds, self._times[client])
            heapq.heappush(self._flying, (now + seconds, self._number, work))
            self._number += 1
            self._started[self._round] += 1
            self._times[client] += 1
