"""Who trains in which round, and how much: a function of the config and the partition alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedsim.aggregators import GROUP
from fedsim.algorithms import Buffered
from fedsim.core.seeding import stream
from fedsim.core.types import ROOT, Pack, Task
from fedsim.simulate.availability import ClientAvailability
from fedsim.simulate.buffered import BufferedTimeline
from fedsim.simulate.state import State
from fedsim.simulate.timeline import RoundWork, Timeline, Work

CENTRAL = -1


@dataclass(frozen=True)
class Schedule:
    """Who trains when and how much, in one mode.

    Attributes:
        mode: local | federated | central.
        seed, rounds: of the experiment.
        clients: numbers of the clients that have examples, int64, ascending.
        size: clients of a cohort.
        name: client number -> id.
        sizes: examples by client number, int64.
        count: (examples, steps) -> optimizer steps of a round.
        steps: optimizer steps of a round; None where a round is given in epochs.
        epochs, batch_size: epochs of a round; examples of a batch.
        match: how the centralized baseline is matched: epochs | steps.
        weights: samples | steps | uniform.
        length: client number -> mean tokens of its examples; the longest packs go first.
        every_rounds, scores_clients: evaluation frequency; whether clients are evaluated before aggregation.
        central_rows: examples of the centralized baseline; None = those of `clients` together. Virtual clients draw examples
            with repetition: there it holds each example once, and still does as much work as the cohort.
        behavior: availability, dropout and speeds of the clients; None = every client is available and in time.
        root: examples that the server trains on beside the clients of each federated round; 0 = it does not.
        sampler: fixed, or poisson: each client with probability size / clients.
        max_weight: larger weights are lowered to it; None = no limit.
        buffered: how an asynchronous server works; None = in rounds of a cohort.
        discount: server steps since the model that a message is made from -> what its weight is multiplied by.
    """

    mode: str
    seed: int
    rounds: int
    clients: np.ndarray
    size: int
    name: Callable[[int], str]
    sizes: np.ndarray
    count: Callable[[int, int | None], int]
    steps: int | None
    epochs: int
    batch_size: int
    match: str
    weights: str
    length: Callable[[int], float]
    every_rounds: int
    scores_clients: bool = True
    central_rows: int | None = None
    behavior: ClientAvailability | None = None
    root: int = 0
    sampler: str = "fixed"
    max_weight: float | None = None
    buffered: Buffered | None = None
    discount: Callable[[int], float] = lambda staleness: 1.0

    def cohort(self, round: int) -> np.ndarray:
        """The clients of a round, ascending: a function of (seed, round). Empty if no client is available."""
        clients = self.clients if self.behavior is None else self.behavior.available(round, self.clients)
        rng = stream(self.seed, "cohort", round)
        if self.sampler == "poisson":
            return clients[rng.random(len(clients)) < self.size / len(self.clients)]
        if self.size >= len(clients):
            return clients
        return np.sort(clients[rng.choice(len(clients), self.size, replace=False, shuffle=False)])

    @cached_property
    def timeline(self) -> Timeline | BufferedTimeline:
        """When clients start and their messages arrive; dropout and deadlines are simulated in the mode federated alone."""
        behavior = self.behavior if self.mode == "federated" else None
        if self.buffered is not None and behavior is not None:
            return BufferedTimeline(
                self.clients,
                self.buffered.size,
                self.buffered.clients,
                lambda client: self.tokens(client) / behavior.speed(client),
                lambda round: stream(self.seed, "cohort", round),
            )
        return Timeline(self.cohort, self.tokens, behavior)

    @property
    def slots(self) -> int:
        """How many clients can send messages that are aggregated together."""
        return self.most * (1 + self.timeline.delay) if self.buffered is None else self.buffered.size

    @property
    def most(self) -> int:
        """How many clients a cohort can have."""
        return self.size if self.sampler == "fixed" else len(self.clients)

    @property
    def many_packs(self) -> bool:
        """Whether a round can have more packs than one group of the accumulator."""
        most = self.most if self.buffered is None else self.buffered.size
        return most + (self.root > 0) > GROUP

    @cached_property
    def all_weight(self) -> float:
        """Sum of the weights of all clients."""
        if self.weights == "uniform":
            return float(len(self.clients))
        sizes, times = np.unique(self.sizes[self.clients], return_counts=True)
        return float(np.dot([self._weight(int(n)) for n in sizes], times))

    def _weight(self, examples: int) -> float:
        """The weight of a client with so many examples."""
        each = {"samples": examples, "steps": self.count(examples, self.steps), "uniform": 1}[self.weights]
        return float(each) if self.max_weight is None else min(float(each), self.max_weight)

    def steps_of(self, work: RoundWork, front: int) -> Counter[int]:
        """Optimizer steps by client of a round's work that is not lost, whatever becomes of its messages; `front` come before its own."""
        out = Counter[int]()
        for w in (w for w in work.work if w.arrives is not None):
            out[w.client] += front + self.count(int(self.sizes[w.client]), self.steps)
        return out

    def evaluates(self, round: int) -> bool:
        """Whether models are evaluated at the end of a round."""
        return round % self.every_rounds == 0 or round == self.rounds

    @cached_property
    def last_rounds(self) -> dict[int, int]:
        """Client number -> the last round in which it trains, for clients that are in at least one cohort of the run."""
        return {int(c): r for r in range(1, self.rounds + 1) for c in self.cohort(r)}

    def scores_as(self, rounds: int, until: int) -> bool:
        """Whether rounds 1 to `until` are evaluated as in a run of `rounds` rounds, of which the last is always evaluated."""
        if self.every_rounds == 1 or rounds == self.rounds:
            return True
        other = dataclasses.replace(self, rounds=rounds)
        for r in range(1, until + 1):
            if self.evaluates(r) != other.evaluates(r):
                return False
            only_last = self.mode == "local" and not self.evaluates(r)  # clients whose last round it is
            if only_last and any(
                (self.last_rounds[c] == r) != (other.last_rounds[c] == r) for c in map(int, self.cohort(r))
            ):
                return False
        return True

    @cached_property
    def central_total(self) -> int:
        """Examples of the centralized baseline."""
        return int(self.sizes[self.clients].sum()) if self.central_rows is None else self.central_rows

    def central_steps(self, round: int) -> int | None:
        """Optimizer steps of the centralized baseline in a round; None for as many epochs as a client trains."""
        sizes = self.sizes[self.cohort(round)]
        if not len(sizes):
            return 0
        counts = [self.count(int(n), self.steps) for n in sizes]
        if self.match == "steps":
            return max(1, round_half_up(sum(counts) / len(counts)))
        held = int(sizes.sum())
        if self.steps is None and held == self.central_total:  # every client takes part: the epochs are theirs
            return None
        rows = sum(counts) * self.batch_size if self.steps is not None else held * self.epochs
        return max(1, round_half_up(rows / self.batch_size))

    @cached_property
    def _central_counts(self) -> list[int]:
        steps = [self.central_steps(r) for r in range(1, self.rounds + 1)]
        return [0 if s == 0 else self.count(self.central_total, s) for s in steps]

    def tasks(
        self,
        round: int,
        state: State,
        work: Sequence[Work] | None = None,
        latest: Mapping[int, tuple[int, int]] | None = None,
        root: bool = False,
    ) -> list[Task]:
        """The work of the cohort's clients, or this `work`, all of which arrives in the same round.

        `latest`: client -> (record of its state, steps done) where these are newer than in the state; `root`: and the server's.
        """
        if self.mode == "central":
            steps, counts = self.central_steps(round), self._central_counts
            given = (
                [(CENTRAL, "central", steps, sum(counts[: round - 1]), sum(counts), 1.0, 0, 0)] if steps != 0 else []
            )
        else:
            given = []
            work = [Work(int(c), round, round) for c in self.cohort(round)] if work is None else work
            for i, w in enumerate(work):
                n, stale = int(self.sizes[w.client]), (w.arrives or round) - round
                each = self.count(n, self.steps)
                slot = self.most * stale + i if w.slot is None else w.slot
                place = (self.steps, (round - 1) * each, self.rounds * each)
                given.append(
                    (w.client, self.name(w.client), *place, self._weight(n) * self.discount(stale), slot, w.repeat)
                )
            if root and self.root and given:
                each = self.count(self.root, self.steps)
                place = (self.steps, (round - 1) * each, self.rounds * each)
                given.append((ROOT, "root", *place, 0.0, self.slots, 0))
        out = []
        for client, name, steps, start, horizon, weight, slot, repeat in given:
            write = state.records.new() if state.keeps else -1
            read, done = (latest or {}).get(client) or (state.records.read(client), state.steps.get(client, 0))
            task = Task(client, name, round, steps, done, start, horizon, weight, read, write, slot=slot, repeat=repeat)
            out.append(task)
        return out

    def tokens(self, client: int) -> float:
        """Tokens of a client's work in a round."""
        return self._work(client)[1]

    def _work(self, client: int, steps: int | None = None) -> tuple[int, float]:
        """(optimizer steps, tokens) of a client's round; `steps` are those of the centralized baseline."""
        total = {CENTRAL: self.central_total, ROOT: self.root}.get(client) or int(self.sizes[client])
        given = self.steps if client != CENTRAL else steps
        done = self.count(total, given)
        rows = done * self.batch_size if given is not None else total * self.epochs
        return done, rows * self.length(client)

    def packs(
        self,
        round: int,
        state: State,
        lanes: int,
        work: Sequence[Work] | None = None,
        latest: Mapping[int, tuple[int, int]] | None = None,
        root: bool = False,
    ) -> list[Pack]:
        """Clients of similar step count and length trained together, at most `lanes` of them; the longest pack first.

        A function of the cohort, the config and the lanes, not of the workers: messages are aggregated in this order. Packs
        are as even as possible: 20 clients in 8 lanes are 7, 7 and 6.
        """
        found = []
        for task in self.tasks(round, state, work, latest, root):
            steps, tokens = self._work(task.client, task.steps)
            scored = self.evaluates(round) and (self.scores_clients or self.mode != "federated") and task.client != ROOT
            last = self.mode == "local" and self.last_rounds[task.client] == round
            length = self.length(task.client)
            found.append((-steps, -length, task.client, tokens, dataclasses.replace(task, evaluate=scored or last)))
        if not found:
            return []
        found.sort(key=lambda w: w[:3])
        count = -(-len(found) // lanes)
        cuts = [len(found) * i // count for i in range(count + 1)]
        parts = [found[a:b] for a, b in itertools.pairwise(cuts)]
        packs = [Pack(0, self.mode, tuple(w[4] for w in part), int(sum(w[3] for w in part))) for part in parts]
        packs.sort(key=lambda p: (-p.tokens, p.tasks[0].client))
        return [dataclasses.replace(p, index=i) for i, p in enumerate(packs)]


def round_half_up(x: float) -> int:
    """The nearest integer, halves up; Python's own `round` takes them to the even one."""
    return int(np.floor(x + 0.5))
