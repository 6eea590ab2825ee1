"""The round loop: one engine for each site alone, federated and centralised.

Local-only is the algorithm that never merges; centralised is one client, number -1, that holds every row. So the three
curves differ in who trains and whether a merge follows, and in nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fedsim.aggregators import GROUP, Accumulator
from fedsim.aggregators.reducer import Reducer
from fedsim.algorithms import Algorithm, Info, Server
from fedsim.core.errors import ClientError, OutOfMemory, SumLost
from fedsim.core.params import Layout, Params
from fedsim.core.seeding import stream
from fedsim.core.store import Records
from fedsim.core.types import Fault, Pack, Report, Row, Scores, Scoring, Task
from fedsim.simulate.availability import Life, Turnout

CENTRAL = -1
MERGED = -2
# What `simulation` makes go wrong, as rows of the split `fault` name it, in words.
SIMULATED = {"dropped": "dropped out", "late": "too late", "deferred": "too late, taken in the next round"}
_WAYS = {"dropped": "lower simulation.drop or take another seed", "late": "raise simulation.deadline_s"}


class Executor(Protocol):
    """Where packs run; see `fedsim.executors`."""

    total: Tensor | None
    spare: Tensor | None

    def broadcast(self, weights: Tensor, server: Params) -> None: ...
    def run(self, packs: list[Pack], total: Accumulator | None) -> Iterator[Report]: ...
    def score(self, requests: list[Scoring]) -> list[list[Scores]]: ...


@dataclass(frozen=True)
class Schedule:
    """Who trains when and how much: everything of a mode that is a function of the config and the partition alone.

    Attributes:
        mode: local | federated | central.
        seed, rounds: the experiment's.
        clients: numbers of the clients that hold rows, int64 ascending.
        size: clients of a cohort.
        name: client number -> its id.
        rows: client number -> how many rows it holds, int64 by client.
        count: (rows, steps) -> optimiser steps of a round.
        steps: optimiser steps of a round, or None for passes.
        epochs, batch_size: passes of a round where work is in passes; rows of a batch.
        match: how central is matched: epochs | steps.
        weights: samples | steps | uniform.
        length: mean tokens of a client's row, by client number; places the longest packs first.
        every_rounds, scores_clients: evaluation frequency; whether clients are scored before a merge.
        central_rows: rows the centralised client holds; None = those of `clients` together. Virtual clients draw rows
            with repetition: there it holds every row once, and still does as much work as the cohort.
        life: who is away, fails or is slow; None = nobody.
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
    life: Life | None = None

    def cohort(self, round: int) -> np.ndarray:
        """The clients of a round, ascending: a function of (seed, round). Nobody, where none is there."""
        clients = self.clients if self.life is None else self.life.available(round, self.clients)
        if self.size >= len(clients):
            return clients
        rng = stream(self.seed, "cohort", round)
        return np.sort(clients[rng.choice(len(clients), self.size, replace=False, shuffle=False)])

    @property
    def slots(self) -> int:
        """How many clients can send messages that are merged together: a cohort, and who was late in the round before."""
        return self.size * (2 if self.life is not None and self.life.late == "next" else 1)

    @property
    def many_packs(self) -> bool:
        """Whether a round can have more packs than are summed at once."""
        return self.size > GROUP

    @cached_property
    def all_weight(self) -> float:
        """Sum of the weights of all clients."""
        if self.weights == "uniform":
            return float(len(self.clients))
        sizes, times = np.unique(self.sizes[self.clients], return_counts=True)
        each = sizes if self.weights == "samples" else [self.count(int(n), self.steps) for n in sizes]
        return float(np.dot(each, times))

    def turnout(self, round: int, owed: dict[int, float]) -> Turnout:
        """Who of the cohort answers; everybody, but in a federated round of a simulated life.

        Args:
            round: from 1.
            owed: clients at work on the round before -> simulated seconds left of it.
        """
        if self.life is None or self.mode != "federated":
            return Turnout(self.cohort(round))
        return self.life.turnout(round, self.cohort(round), lambda c: self._work(c)[1], owed)

    def evaluates(self, round: int) -> bool:
        """Whether models are scored at the end of the round."""
        return round % self.every_rounds == 0 or round == self.rounds

    @cached_property
    def last_rounds(self) -> dict[int, int]:
        """Client number -> the last round that it trains in, for the clients that are in some cohort of the run."""
        return {int(c): r for r in range(1, self.rounds + 1) for c in self.cohort(r)}

    def scores_as(self, rounds: int, until: int) -> bool:
        """Whether models are scored after rounds 1 to `until` just as in a run of so many `rounds`, whose last is always scored."""
        if self.every_rounds == 1 or rounds == self.rounds:
            return True
        other = dataclasses.replace(self, rounds=rounds)
        for r in range(1, until + 1):
            if self.evaluates(r) != other.evaluates(r):
                return False
            alone = self.mode == "local" and not self.evaluates(r)
            if alone and any(
                (self.last_rounds[c] == r) != (other.last_rounds[c] == r) for c in map(int, self.cohort(r))
            ):
                return False
        return True

    @cached_property
    def central_total(self) -> int:
        """Rows the centralised client holds."""
        return int(self.sizes[self.clients].sum()) if self.central_rows is None else self.central_rows

    def central_steps(self, round: int) -> int | None:
        """Optimiser steps of the centralised client in a round, or None for as many passes as a site makes."""
        sizes = self.sizes[self.cohort(round)]
        if not len(sizes):
            return 0
        site = [self.count(int(n), self.steps) for n in sizes]
        if self.match == "steps":
            return max(1, round_half_up(sum(site) / len(site)))
        held = int(sizes.sum())
        if self.steps is None and held == self.central_total:  # all clients: its passes are theirs
            return None
        rows = sum(site) * self.batch_size if self.steps is not None else held * self.epochs
        return max(1, round_half_up(rows / self.batch_size))

    @cached_property
    def _central_counts(self) -> list[int]:
        steps = [self.central_steps(r) for r in range(1, self.rounds + 1)]
        return [0 if s == 0 else self.count(self.central_total, s) for s in steps]

    def tasks(self, round: int, state: State, clients: np.ndarray | None = None, slot: int = 0) -> list[Task]:
        """What each client of the round does, or each of these, whose messages take the slots from `slot` on."""
        if self.mode == "central":
            steps = self.central_steps(round)
            if steps == 0:
                return []
            done = self._central_counts
            return [self._task(CENTRAL, "central", round, steps, sum(done[: round - 1]), sum(done), 1.0, state)]
        out = []
        for i, c in enumerate(map(int, self.cohort(round) if clients is None else clients), slot):
            n = int(self.sizes[c])
            per_round = self.count(n, self.steps)
            weight = {"samples": n, "steps": per_round, "uniform": 1}[self.weights]
            out.append(
                self._task(
                    c,
                    self.name(c),
                    round,
                    self.steps,
                    (round - 1) * per_round,
                    self.rounds * per_round,
                    float(weight),
                    state,
                    i,
                )
            )
        return out

    def _task(
        self,
        client: int,
        name: str,
        round: int,
        steps: int | None,
        start: int,
        horizon: int,
        weight: float,
        state: State,
        slot: int = 0,
    ) -> Task:
        write = state.records.new() if state.keeps else -1
        done = state.steps.get(client, 0)
        read = state.records.read(client)
        return Task(client, name, round, steps, done, start, horizon, weight, read, write, slot=slot)

    def _work(self, client: int, steps: int | None = None) -> tuple[int, float]:
        """(optimiser steps, tokens) of a client's round; `steps` where they are not the config's."""
        total = self.central_total if client == CENTRAL else int(self.sizes[client])
        given = self.steps if client != CENTRAL else steps
        done = self.count(total, given)
        rows = done * self.batch_size if given is not None else total * self.epochs
        return done, rows * self.length(client)

    def packs(
        self, round: int, state: State, lanes: int, clients: np.ndarray | None = None, slot: int = 0
    ) -> list[Pack]:
        """Clients of like step count and row length side by side, at most `lanes` of them; the longest pack first.

        A function of the cohort, the config and the lanes: partial sums are merged in this order, whoever made them. Packs
        are as even as can be: 20 clients in 8 lanes are 7, 7 and 6.
        """
        work = []
        for task in self.tasks(round, state, clients, slot):
            steps, tokens = self._work(task.client, task.steps)
            scored = self.evaluates(round) and (self.scores_clients or self.mode != "federated")
            last = self.mode == "local" and self.last_rounds[task.client] == round
            length = self.length(task.client)
            work.append((-steps, -length, task.client, tokens, dataclasses.replace(task, evaluate=scored or last)))
        if not work:
            return []
        work.sort(key=lambda w: w[:3])
        count = -(-len(work) // lanes)
        cuts = [len(work) * i // count for i in range(count + 1)]
        parts = [work[a:b] for a, b in itertools.pairwise(cuts)]
        packs = [Pack(0, self.mode, tuple(w[4] for w in part), int(sum(w[3] for w in part))) for part in parts]
        packs.sort(key=lambda p: (-p.tokens, p.tasks[0].client))
        return [dataclasses.replace(p, index=i) for i, p in enumerate(packs)]


def round_half_up(x: float) -> int:
    """The nearest whole number, halves up: Python's own rounds them to even."""
    return int(np.floor(x + 0.5))


@dataclass
class Chosen:
    """The best model so far: its score and loss on the validation rows, and the round and step it was reached at."""

    value: float
    round: int
    step: int
    loss: float = math.inf


@dataclass
class State:
    """All that a mode carries from round to round; a checkpoint holds it.

    Attributes:
        params: global parameters, flat `[N]`: the executor's own buffer, changed in place.
        server: the algorithm's server state.
        records: where client states lie; `keeps` says whether there are any.
        steps: optimiser steps done, by client.
        round: the last complete round.
        best: best merged model so far.
        site_best: by client, the best of its own models, where nothing is merged.
        best_records: where the best models' parameters lie, by client; that of the merged one under `MERGED`.
        late: the messages of the clients that were late in the last round; None where there are none.
        owed: those clients -> simulated seconds left of their work.
        clock: simulated seconds so far.
        evaluation_seconds: what evaluating the merged model took in the last round; no part of a checkpoint.
    """

    params: Tensor
    server: Params
    records: Records
    keeps: bool
    steps: dict[int, int] = field(default_factory=dict)
    round: int = 0
    best: Chosen | None = None
    site_best: dict[int, Chosen] = field(default_factory=dict)
    best_records: Records = field(default_factory=Records)
    late: Accumulator | None = None
    owed: dict[int, float] = field(default_factory=dict)
    clock: float = 0.0
    evaluation_seconds: float = 0.0


@dataclass(frozen=True)
class Choice:
    """How the best model is chosen, on validation rows."""

    metric: str
    mode: str

    def better(self, scores: Mapping[str, float], round: int, step: int, than: Chosen | None) -> Chosen | None:
        """The model with these scores, where it replaces the best one; `fedsim.analysis.load` reads runs by the same rule.

        The better score wins, of equal ones the lower loss, of equal losses the later round. A score that is missing or NaN
        never wins, a loss that is NaN loses every tie.
        """
        value, loss = scores.get(self.metric, math.nan), scores.get("loss", math.nan)
        if math.isnan(value):
            return None
        found = Chosen(value, round, step, math.inf if math.isnan(loss) else loss)
        if than is None:
            return found
        if value != than.value:
            return found if (value > than.value) == (self.mode == "max") else None
        return found if found.loss <= than.loss else None


def run_rounds(
    schedule: Schedule,
    algorithm: Algorithm,
    layout: Layout,
    reducer: Reducer,
    executor: Executor,
    state: State,
    choice: Choice,
    *,
    lanes: Callable[[int], int],
    halve: Callable[[int], None],
    generate: bool,
    chunk: int | None,
    bytes_of: Callable[[int, int], tuple[int, int]],
    copy_best: Callable[[int | None, int], None],
    on_pack: Callable[[int, Report], None],
    on_round: Callable[[int, list[Row]], None],
) -> State:
    """Run a mode's remaining rounds.

    Args:
        schedule: who trains when.
        algorithm: whose `step` makes the next global parameters.
        layout: of the parameters.
        reducer: how messages become one.
        executor: where packs run.
        state: from the start or from a checkpoint; carried forward in place.
        choice: how the best model is chosen.
        lanes: round -> clients side by side, at most.
        halve: called with the round when memory was too little for them; `lanes` then gives fewer, or it raises.
        generate: whether merged models are scored on generated text as well.
        chunk: elements that are merged at a time; None = all.
        bytes_of: (round, client) -> bytes of the client's message to the server, and of the server's to it.
        copy_best: (record of a client's state, or None for the global parameters; record to keep its parameters in).
        on_pack: called after each pack.
        on_round: called after each round with its metrics rows, to log and checkpoint.
    """
    executor.broadcast(state.params, algorithm.sent(state.server))
    for round in range(state.round + 1, schedule.rounds + 1):
        turnout = schedule.turnout(round, state.owed)
        packs, reports, total, late = _train(
            schedule, round, state, executor, reducer, algorithm.merges, lanes, halve, on_pack, turnout
        )
        rows = [row for report in reports for row in report.rows]
        _settle(packs, reports, state)
        rows += _faults(round, schedule, packs, reports, state, turnout)
        if algorithm.merges:
            _take_late(late, turnout, state)
            if total.weight > 0:  # else nobody was there, or all are still at work
                arrived = sum(len(r.steps) for r in reports)
                info = Info(round, arrived, total.weight, len(schedule.clients), schedule.all_weight)
                _merge(algorithm, reducer, layout, total, state, info, chunk)
                executor.broadcast(state.params, algorithm.sent(state.server))
            rows += _traffic(round, packs, turnout, schedule, state, bytes_of)
            rows += _clock(round, schedule, turnout, state)
            began = time.monotonic()
            if schedule.evaluates(round):
                rows += _score_merged(round, executor, state, choice, generate, schedule, copy_best)
            state.evaluation_seconds = time.monotonic() - began
        else:
            _choose_by_site(packs, rows, state, choice, copy_best)
        state.round = round
        on_round(round, rows)
    return state


def _merge(
    algorithm: Algorithm,
    reducer: Reducer,
    layout: Layout,
    total: Accumulator,
    state: State,
    info: Info,
    chunk: int | None,
) -> None:
    """The next global parameters, in place: chunk by chunk where the algorithm allows it and the server keeps no state."""
    apart = algorithm.blockwise and reducer.blockwise and not state.server

    def travels(name: str) -> bool:
        return algorithm.travels(name, info.round)

    for part in layout.chunks(chunk if apart else None):
        here = {n: view for n, view in part.views(state.params[part.span]).items() if travels(n)}
        after = algorithm.step(Server(here, state.server), reducer.result(total, part, travels), info)
        for name, view in here.items():
            view.copy_(after.params[name])
        state.server = state.server | after.state  # what the step does not return stays
        del after  # before those of the next chunk are made


def _train(
    schedule: Schedule,
    round: int,
    state: State,
    executor: Executor,
    reducer: Reducer,
    merges: bool,
    lanes: Callable[[int], int],
    halve: Callable[[int], None],
    on_pack: Callable[[int, Report], None],
    turnout: Turnout,
) -> tuple[list[Pack], list[Report], Accumulator | None, Accumulator | None]:
    """Train a round's packs, whose messages are summed in the executor's buffers; from the start again where the sum was lost with a
    worker, and with fewer lanes where memory was too little.

    Returns:
        The packs, their reports, the sum of what is merged now, and that of the late clients, which is merged in the next round.
    """
    while True:
        now = schedule.packs(round, state, lanes(round), turnout.on_time)
        after = schedule.packs(round, state, lanes(round), turnout.late, schedule.size) if len(turnout.late) else []
        reports: list[Report] = []
        late: Accumulator | None = None
        try:
            if after:  # one sum is in the workers' reach: it is taken out of it before the others'
                late = reducer.zero(executor.total, executor.spare)
                reports += _pass(round, executor, after, late, on_pack)
                late = Accumulator(late.total.clone(), weight=late.weight)
            total = reducer.zero(executor.total, executor.spare) if merges else None
            if total is not None and state.late is not None:
                reducer.merge(total, state.late)
            reports += _pass(round, executor, now, total, on_pack)
            return [*after, *now], reports, total, late
        except (OutOfMemory, SumLost) as error:
            short = isinstance(error, OutOfMemory)
            for record in reversed([t.write for p in (*now, *after) for t in p.tasks if t.write >= 0]):
                state.records.give_back(record)
        late = None
        if short:
            halve(round)  # outside the handler: what the error refers to is freed


def _pass(
    round: int, executor: Executor, packs: list[Pack], total: Accumulator | None, on_pack: Callable[[int, Report], None]
) -> list[Report]:
    reports = []
    for report in executor.run(packs, total):
        for fault in report.faults:
            if fault.action == "failed":
                raise ClientError(
                    f"round {round}, client {fault.name}: {_seen(fault)}; lower local.lr or set local.clip, or leave such "
                    "clients out with faults.policy=skip"
                )
        reports.append(report)
        on_pack(round, report)
    return reports


def _seen(fault: Fault) -> str:
    if fault.of == "norm":
        return f"its update has norm {fault.value:.4g}, above faults.max_norm"
    what = "training loss" if fault.of == "loss" else "update"
    return f"its {what} is not finite" + (f" ({fault.value})" if fault.of == "loss" else "")


def _settle(packs: list[Pack], reports: list[Report], state: State) -> None:
    """Note what clients have done; one whose round counts for nothing keeps the state it had."""
    for report in reports:
        for client, steps in report.steps.items():
            state.steps[client] = state.steps.get(client, 0) + steps
    skipped = {f.client for r in reports for f in r.faults if f.action == "skipped"}
    for task in (t for p in packs for t in p.tasks if t.write >= 0):
        if task.client in skipped:
            state.records.give_back(task.write)
        else:
            state.records.wrote(task.client, task.write)


def _faults(
    round: int, schedule: Schedule, packs: list[Pack], reports: list[Report], state: State, turnout: Turnout
) -> list[Row]:
    """Rows of what went wrong.

    Raises:
        ClientError: if it did with all clients of the round.
    """
    found = [f for r in reports for f in r.faults]
    out = []
    for f in found:
        name = None if schedule.mode == "central" else f.name
        out.append(
            Row(round, state.steps.get(f.client, 0), schedule.mode, name, "fault", f"{f.action}_{f.of}", f.value)
        )
    deferred = {int(c): "deferred" for c in turnout.late}
    for client, why in sorted({**turnout.lost, **deferred}.items()):
        row = Row(round, state.steps.get(client, 0), schedule.mode, schedule.name(client), "fault", why, 1.0)
        out.append(row)
    skipped = [f for f in found if f.action == "skipped"]
    failed, trained = len(skipped) + len(turnout.lost), sum(len(p.tasks) for p in packs)
    if failed and trained == len(skipped) and state.late is None:
        reasons = [f"{f.name}: {_seen(f)}" for f in skipped[:3]]
        reasons += [f"{n} {why}" for why, n in Counter(turnout.lost.values()).items()]
        ways = ["lower local.lr or raise faults.max_norm"] if skipped else []
        ways += [way for why, way in _WAYS.items() if why in turnout.lost.values()]
        raise ClientError(f"round {round}: all {failed} clients failed: {'; '.join(reasons)}; {', '.join(ways)}")
    return out


def describe_faults(mode: str, rows: Iterable[dict[str, Any]]) -> list[str]:
    """A mode's faults in one line, or none; from all rows of the split `fault`."""
    by_kind: dict[str, list[str]] = {}
    for row in rows:
        if row["scope"] == mode:
            action, _, of = row["name"].partition("_")
            kind = f"{action} for their {of}" if of else SIMULATED[action]
            by_kind.setdefault(kind, []).append(f"{row['client'] or mode} in round {row['round']}")
    parts = []
    for kind, whose in by_kind.items():
        more = f" and {len(whose) - 5} more" if len(whose) > 5 else ""
        parts.append(f"{len(whose)} {kind} ({', '.join(whose[:5])}{more})")
    return [f"{mode}: clients' rounds that went wrong: {'; '.join(parts)}"] if parts else []


def _take_late(late: Accumulator | None, turnout: Turnout, state: State) -> None:
    """Keep the sum of the late clients' updates for the next round; that of the round before is merged by now."""
    state.late = late if late is not None and late.weight > 0 else None
    state.owed = {int(c): turnout.seconds[int(c)] - turnout.round_seconds for c in turnout.late}


def _clock(round: int, schedule: Schedule, turnout: Turnout, state: State) -> list[Row]:
    """Rows of simulated time, where clients have speeds."""
    if schedule.life is None or schedule.life.speeds is None:
        return []
    state.clock += turnout.round_seconds
    step = max(state.steps.values(), default=0)
    out = [
        Row(round, state.steps.get(c, 0), "federated", schedule.name(c), "simulated", "seconds", s)
        for c, s in turnout.seconds.items()
    ]
    clock = {"round_seconds": turnout.round_seconds, "seconds": state.clock}
    return out + [Row(round, step, "federated", None, "simulated", name, value) for name, value in clock.items()]


def _traffic(
    round: int,
    packs: list[Pack],
    turnout: Turnout,
    schedule: Schedule,
    state: State,
    bytes_of: Callable[[int, int], tuple[int, int]],
) -> list[Row]:
    """Rows of bytes; a client whose work is lost has received its message, and sends none."""
    out = []
    for task in (t for p in packs for t in p.tasks):
        step = state.steps.get(task.client, 0)
        for name, size in zip(("bytes_up", "bytes_down"), bytes_of(round, task.client), strict=True):
            out.append(Row(round, step, "federated", task.name, "train", name, float(size)))
    for client in sorted(turnout.lost):
        step, (_, down) = state.steps.get(client, 0), bytes_of(round, client)
        out.append(Row(round, step, "federated", schedule.name(client), "train", "bytes_down", float(down)))
    return out


def merged_rows(round: int, step: int, scores: Scores, scope: str, name: Callable[[int], str]) -> list[Row]:
    """Rows of a model that no client owns: on the shared rows, and on each site's own as `merged_...`."""
    out = [Row(round, step, scope, None, "validation", n, v, w) for n, (v, w) in scores.values.items()]
    for client, values in scores.sites.items():
        out += [Row(round, step, scope, name(client), "site", f"merged_{n}", v, w) for n, (v, w) in values.items()]
    return out


def _score_merged(
    round: int,
    executor: Executor,
    state: State,
    choice: Choice,
    generate: bool,
    schedule: Schedule,
    copy_best: Callable[[int | None, int], None],
) -> list[Row]:
    scores = executor.score([Scoring("validation", generate=generate, sites=True)])[0][0]
    step = max(state.steps.values(), default=0)
    found = choice.better({n: v for n, (v, _) in scores.values.items()}, round, step, state.best)
    if found is not None:
        state.best = found
        _keep_best(state, MERGED, None, copy_best)
    return merged_rows(round, step, scores, "federated", schedule.name)


def _choose_by_site(
    packs: list[Pack], rows: list[Row], state: State, choice: Choice, copy_best: Callable[[int | None, int], None]
) -> None:
    scored: dict[tuple[str | None, int], dict[str, float]] = {}
    for r in (r for r in rows if r.split == "validation"):
        scored.setdefault((r.client, r.step), {})[r.name] = r.value
    for task in (t for p in packs for t in p.tasks if t.evaluate):
        name, step = None if task.client == CENTRAL else task.name, state.steps.get(task.client)
        best = state.site_best.get(task.client)
        found = choice.better(scored.get((name, step), {}), task.round, step, best)
        if found is not None:
            state.site_best[task.client] = found
            _keep_best(state, task.client, task.write, copy_best)


def _keep_best(state: State, client: int, record: int | None, copy_best: Callable[[int | None, int], None]) -> None:
    into = state.best_records.new()
    copy_best(record, into)
    state.best_records.wrote(client, into)


def state_tensors(state: State, layout: Layout, merges: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint: `params.NAME`, `server.NAME` and the messages of late clients, `late`. Where nothing is merged, all
    that changes lies in the clients' records."""
    out = {f"server.{n}": t for n, t in state.server.items()}
    if merges:
        out |= {f"params.{n}": t for n, t in layout.views(state.params).items()}
    if state.late is not None:
        out["late"] = state.late.total
    return out


def state_info(state: State) -> dict[str, Any]:
    """The rest of a checkpoint, for JSON; by client only for those that were seen.

    What has one number a client is two lists, clients and numbers: an object takes seven times as long to write, in
    every round.
    """
    return {
        "table": _lists(state.records.table),
        "best_table": _lists(state.best_records.table),
        "steps": _lists(state.steps),
        "best": None if state.best is None else vars(state.best),
        "site_best": {str(c): vars(b) for c, b in state.site_best.items()},
        "life": {
            "late_weight": None if state.late is None else state.late.weight,
            "owed": {str(c): s for c, s in state.owed.items()},
            "clock": state.clock,
        },
    }


def _lists(by_client: dict[int, int]) -> list[list[int]]:
    return [list(by_client), list(by_client.values())]


def restore(
    state: State, layout: Layout, numel: int, infos: list[dict[str, Any]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Bring a fresh state to the last of these checkpoints.

    Args:
        state: fresh; changed in place.
        layout: of the parameters.
        numel: elements of an accumulator.
        infos: what the kept checkpoints say, oldest first: the records they refer to stay untouched.
        tensors: of the last one, by name, one at a time.
    """
    info = infos[-1]
    tables = [dict(zip(*i["table"], strict=True)) for i in infos]
    best_tables = [dict(zip(*i["best_table"], strict=True)) for i in infos]
    state.records, state.best_records = Records(tables[-1], tables), Records(best_tables[-1], best_tables)
    state.steps = dict(zip(*info["steps"], strict=True))
    state.round = info["round"]
    state.best = Chosen(**info["best"]) if info["best"] else None
    state.site_best = {int(c): Chosen(**b) for c, b in info["site_best"].items()}
    into = {f"params.{n}": t for n, t in layout.views(state.params).items()}
    into |= {f"server.{n}": t for n, t in state.server.items()}
    life = info["life"]
    state.owed, state.clock = {int(c): s for c, s in life["owed"].items()}, life["clock"]
    if life["late_weight"] is not None:
        state.late = Accumulator(state.params.new_zeros(numel), weight=life["late_weight"])
        into["late"] = state.late.total
    for name, tensor in tensors:
        into[name].copy_(tensor)
