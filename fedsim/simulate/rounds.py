"""The round loop, the same for local-only, federated and centralized training.

Local-only is the algorithm that never aggregates; centralized is one client, number -1, that has every example. So the three
curves differ in who trains and in whether aggregation follows, and in nothing else.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from torch import Tensor

from fedsim.aggregators import Accumulator, meter
from fedsim.aggregators.reducer import Reducer
from fedsim.algorithms import Algorithm, Info, Server
from fedsim.core.errors import OutOfMemory, SumLost
from fedsim.core.params import FOLD, Layout, Params
from fedsim.core.store import Store
from fedsim.core.types import ROOT, Memory, Pack, Report, Row, Scores, Scoring
from fedsim.privacy.central import CentralPrivacy
from fedsim.privacy.examples import ExamplePrivacy
from fedsim.simulate.faults import check, fault_metrics
from fedsim.simulate.own import OwnModels, own_metrics
from fedsim.simulate.schedule import CENTRAL, Schedule
from fedsim.simulate.state import GLOBAL, Choice, State
from fedsim.simulate.timeline import RoundWork

T = TypeVar("T")


class Executor(Protocol):
    """Where packs run; see `fedsim.executors`. What it yields is None while it waits for other runs on the same device."""

    def broadcast(self, params: Tensor, server: Params) -> None: ...
    def train(self, packs: Sequence[Pack], acc: Accumulator | None) -> Iterator[Report | None]: ...
    def score(self, requests: Sequence[Scoring]) -> Iterator[list[Scores] | None]: ...


class Lanes(Protocol):
    """How many clients train side by side; see `fedsim.training.planner.Plan`."""

    def lanes_at(self, mode: str, round: int) -> int: ...
    def halve(self, mode: str, round: int) -> int: ...


@dataclass(frozen=True)
class World:
    """Everything of a mode that stays as it is from round to round.

    Attributes:
        schedule: who trains when.
        algorithm: how clients and server work.
        layout: of the global parameters.
        reducer: how messages become one.
        choice: how the best model is chosen.
        plan: lanes by round.
        memory: the buffers of accumulators.
        store, best: records of client state, and of best models.
        generate: whether the global model is also evaluated by generation.
        chunk: elements of the parameters that are aggregated at a time; None = all.
        bytes_of: (round, client, round in which it last began, or 0) -> bytes that it sends and receives.
        privacy: what the mode guarantees of each client; None = nothing.
        own: where clients' own models are; None = they have none.
        factors: adapted layer -> names of its A and B, where the aggregation error is measured.
        scripted: clients are users' scripts: each lives in one worker and scores the model that it receives.
        incoming: keeps the global parameters that each round starts from, by round; None = nobody asks for them again.
        ledger: what the mode guarantees of each example of a client; None = nothing.
    """

    schedule: Schedule
    algorithm: Algorithm
    layout: Layout
    reducer: Reducer
    choice: Choice
    plan: Lanes
    memory: Memory
    store: Store
    best: Store
    generate: bool
    chunk: int | None
    bytes_of: Callable[[int, int, int], tuple[int, int]]
    privacy: CentralPrivacy | None = None
    own: OwnModels | None = None
    factors: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    scripted: bool = False
    incoming: Store | None = None
    ledger: ExamplePrivacy | None = None


@dataclass(frozen=True)
class PackDone:
    """A pack has trained; its round may still start again."""

    round: int
    report: Report


@dataclass(frozen=True)
class Halved:
    """Memory was too small: the round starts again with so many lanes."""

    round: int
    lanes: int


@dataclass(frozen=True)
class Round:
    """A round is complete: its metrics, and the seconds that evaluating the global model took."""

    round: int
    metrics: list[Row]
    evaluation_seconds: float


Event = PackDone | Halved | Round | None


def rounds(world: World, state: State, executor: Executor) -> Iterator[Event]:
    """The remaining rounds of a mode. `state` is changed in place; after each `Round` it is that of a checkpoint.

    Raises:
        ClientError: if a client fails under `faults.policy=fail`, or all of a round fail.
        UserError: if one lane does not fit into memory.
    """
    schedule, algorithm = world.schedule, world.algorithm
    executor.broadcast(state.params, algorithm.sent(state.server))
    spent = Counter[int]()  # a function of the schedule alone, so that no stop changes it
    for t in range(1, state.round + 1) if world.ledger is not None else ():
        spent += schedule.steps_of(schedule.timeline.work(t), algorithm.first_steps)
    for t in range(state.round + 1, schedule.rounds + 1):
        if world.incoming is not None:
            world.incoming.write(t, state.params)
        work, arriving = schedule.timeline.work(t), t in state.pending
        packs, reports = yield from _train(world, state, executor, t, work)
        _commit(packs, reports, state)
        metrics = [row for report in reports for row in report.rows]
        metrics += fault_metrics(t, schedule, work, packs, reports, state, arriving)
        if world.ledger is not None:
            spent += (now := schedule.steps_of(work, algorithm.first_steps))
            metrics += _spent(world.ledger, schedule, state, t, spent, now)
        if world.scripted and algorithm.merges:
            metrics += _received(world, state, t, metrics)
        began = time.monotonic()
        if algorithm.merges:
            acc = state.pending.pop(t)
            if world.privacy is not None:
                metrics += _private_round(world.privacy, world.reducer, acc, state, t, sum(r.within for r in reports))
            if 0 < acc.clients < world.reducer.least:
                metrics.append(Row(t, state.step, schedule.mode, None, "fault", "too_few", float(acc.clients)))
            elif acc.weight > 0:  # otherwise no client was available, or all are still at work
                shares = world.reducer.shares(acc)
                info = Info(
                    t, acc.clients, acc.weight, len(schedule.clients), schedule.all_weight, shares, schedule.seed
                )
                folded = server_step(algorithm, world.reducer, world.layout, acc, state, info, world.chunk)
                metrics += _aggregation_error(world, state, t, acc, folded)
                executor.broadcast(state.params, algorithm.sent(state.server))
            metrics += _traffic(world, state, t, work, packs) + _clock(schedule, state, t, work)
            began = time.monotonic()
            if schedule.evaluates(t) and not world.scripted:
                metrics += yield from _evaluate(world, state, executor, t)
        else:
            _choose_local(world, state, packs, metrics)
        state.round = t
        yield Round(t, metrics, time.monotonic() - began if algorithm.merges else 0.0)


def collect(answers: Iterator[T | None]) -> Generator[None, None, list[T]]:
    """What an executor yields, as a list; its waits are passed on."""
    out = []
    for answer in answers:
        if answer is None:
            yield None
        else:
            out.append(answer)
    return out


def _train(
    world: World, state: State, executor: Executor, round: int, work: RoundWork
) -> Generator[Event, None, tuple[list[Pack], list[Report]]]:
    """Train the work that starts in a round, one accumulator for each round of arrival, into `state.pending`.

    The round starts again if a worker's sum was lost with it, and with fewer lanes if memory was too small.
    """
    schedule, reducer, merges = world.schedule, world.reducer, world.algorithm.merges
    while True:
        packs: list[Pack] = []
        reports: list[Report] = []
        pending = dict(state.pending)
        latest: dict[int, tuple[int, int]] = {}
        batches = work.batches(round)
        try:
            for i, (arrives, starting) in enumerate(batches, 1):
                lanes = max(1, world.plan.lanes_at(schedule.mode, round) // len(world.algorithm.parts))
                these = schedule.packs(round, state, lanes, starting, latest, root=i == len(batches))
                home = (lambda pack: pack.tasks[0].client) if world.scripted else lambda pack: None
                these = [dataclasses.replace(pack, clip=state.clip, home=home(pack)) for pack in these]
                packs += these
                acc = reducer.zero(world.memory.total, world.memory.spare) if merges else None
                if acc is not None and arrives in pending:
                    reducer.merge(acc, pending[arrives])
                for report in executor.train(these, acc):
                    if report is None:
                        yield None
                        continue
                    check(round, report)
                    reports.append(report)
                    tasks = {t.client: t for t in packs[len(reports) - 1].tasks}
                    latest |= {c: (tasks[c].write, tasks[c].steps_done + n) for c, n in report.steps.items()}
                    if acc is not None:
                        acc.clients += len(report.steps.keys() - {ROOT})
                    yield PackDone(round, report)
                if acc is not None and i == len(batches):  # of this round: it stays in the buffers
                    pending[arrives] = acc
                elif acc is not None and acc.weight > 0:
                    pending[arrives] = Accumulator(acc.total.clone(), weight=acc.weight, clients=acc.clients)
            state.pending = pending
            return packs, reports
        except (OutOfMemory, SumLost) as error:
            short = isinstance(error, OutOfMemory)
            for record in reversed([t.write for p in packs for t in p.tasks if t.write >= 0]):
                state.records.give_back(record)
        acc = None
        if short:  # outside the handler, which keeps alive what the error refers to
            yield Halved(round, world.plan.halve(schedule.mode, round))


def _private_round(
    privacy: CentralPrivacy, reducer: Reducer, acc: Accumulator, state: State, round: int, within: int
) -> list[Row]:
    """Add noise to the sum of messages, in place, over a denominator that does not depend on who took part; metrics of it."""
    assert state.clip is not None, "a private mode has a clip"
    clip = state.clip
    reducer.perturb(acc, lambda group, name, shape: privacy.noise(round, group, name, shape, clip))
    acc.weight = privacy.expected_weight  # the noise stands for the clients of an empty cohort
    state.clip = privacy.next_clip(round, clip, within)
    found = {"epsilon": privacy.epsilon(round), "clip": clip, "noise_std": privacy.z_update * clip * privacy.max_weight}
    return [Row(round, state.step, "federated", None, "privacy", n, v) for n, v in found.items()]


def _spent(
    ledger: ExamplePrivacy, schedule: Schedule, state: State, round: int, spent: Counter[int], now: Counter[int]
) -> list[Row]:
    """What examples of the clients have spent after so many steps: the largest and the distribution over all clients, and of each
    that has trained `now`."""
    each = ledger.epsilons(spent)
    found = ledger.summary(each)
    return [Row(round, state.step, "federated", None, "privacy", n, v) for n, v in found.items()] + [
        Row(round, spent[c], "federated", schedule.name(c), "privacy", "epsilon", each[c]) for c in sorted(now)
    ]


def _commit(packs: Sequence[Pack], reports: Sequence[Report], state: State) -> None:
    """Note what clients have done; a client whose update was skipped keeps the state that it had."""
    for pack, report in zip(packs, reports, strict=True):
        for client, steps in report.steps.items():
            state.steps[client] = state.steps.get(client, 0) + steps
        skipped = {f.client for f in report.faults if f.action == "skipped"}
        for task in (t for t in pack.tasks if t.write >= 0):
            if task.client in skipped:
                state.records.give_back(task.write)
            else:
                state.records.wrote(task.client, task.write)


def server_step(
    algorithm: Algorithm,
    reducer: Reducer,
    layout: Layout,
    acc: Accumulator,
    state: State,
    info: Info,
    chunk: int | None,
) -> Params:
    """The next global parameters, in place: in chunks if the algorithm allows it and the server keeps no state.

    Returns:
        What was folded into the base, by layer, `[m, n]`.
    """
    folded: Params = {}
    apart = algorithm.blockwise and reducer.blockwise and not state.server

    def travels(name: str) -> bool:
        return algorithm.travels(name, info.round)

    for part in layout.chunks(chunk if apart else None):
        views = part.views(state.params[part.span])
        here = {n: view for n, view in views.items() if algorithm.changes(n, info.round)}
        after = algorithm.step(Server(here, state.server), reducer.result(acc, part, travels), info)
        for name, view in here.items():
            view.copy_(after.params[name])
        state.server = state.server | after.state  # what the step does not return stays
        for layer, (b, a) in (after.fold or {}).items():
            folded[layer] = b @ a
            state.server[FOLD + layer] = state.server[FOLD + layer] + folded[layer]
        del after  # before those of the next chunk are made
    return folded


def _aggregation_error(world: World, state: State, round: int, acc: Accumulator, folded: Params) -> list[Row]:
    """How far the server's low-rank products are from the mean of the clients', by layer and in all, where it is measured."""
    kept = world.reducer.factors(acc)
    if kept is None:
        return []
    params = world.layout.views(state.params)
    found = meter.errors(world.factors, *kept, params, folded)
    name = "lora_aggregation_error"
    by_layer = {f"{name}:{layer}": gap / norm for layer, (gap, norm) in found.items() if norm > 0}
    gap, norm = (sum(each[i] ** 2 for each in found.values()) ** 0.5 for i in (0, 1))
    over = {name: gap / norm, **by_layer} if norm > 0 else {}
    return [Row(round, state.step, "federated", None, "aggregation", n, v) for n, v in over.items()]


def _traffic(world: World, state: State, round: int, work: RoundWork, packs: Sequence[Pack]) -> list[Row]:
    """Bytes by client; a client whose message is lost has received the global model and sends nothing."""
    sent: dict[tuple[int, str, str], int] = {}
    lost = [(w.client, world.schedule.name(w.client)) for w in work.arriving(None)]
    trained = [
        (t.client, t.name) for p in packs for t in p.tasks if t.client != ROOT
    ]  # one that starts twice sends twice
    for i, (client, name) in enumerate([*trained, *lost]):
        up, down = world.bytes_of(round, client, state.seen.get(client, 0))
        for what, n in (("bytes_up", up), ("bytes_down", down)) if i < len(trained) else (("bytes_down", down),):
            sent[client, name, what] = sent.get((client, name, what), 0) + n
    if world.algorithm.folds or world.algorithm.overrides("travels", "changes"):  # else the same travels always
        state.seen |= dict.fromkeys((client for client, _ in [*trained, *lost]), round)
    return [
        Row(round, state.steps.get(c, 0), "federated", of, "train", what, float(n)) for (c, of, what), n in sent.items()
    ]


def _clock(schedule: Schedule, state: State, round: int, work: RoundWork) -> list[Row]:
    """Simulated seconds by client, of the round and since the start, if clients have speeds."""
    if schedule.behavior is None or schedule.behavior.speeds is None:
        return []
    out: list[Row] = []

    def note(client: int, what: str, value: float, weight: float = 1.0) -> None:
        at = state.steps.get(client, 0)
        out.append(Row(round, at, "federated", schedule.name(client), "simulated", what, value, weight))

    took: dict[int, float] = {}  # a client may start, or arrive, more than once
    stale: dict[int, list[int]] = {}
    for w in work.work:
        if w.seconds is not None:
            took[w.client] = took.get(w.client, 0.0) + w.seconds
    for w in work.arrived:
        stale.setdefault(w.client, []).append(round - w.starts)
    for client, seconds in took.items():
        note(client, "seconds", seconds)
    for client, each in stale.items():
        note(client, "staleness", sum(each) / len(each), float(len(each)))
    clock = {"round_seconds": work.seconds, "seconds": work.clock}
    if work.at_work is not None:
        clock["at_work"] = float(work.at_work)
    return out + [Row(round, state.step, "federated", None, "simulated", n, v) for n, v in clock.items()]


def _evaluate(world: World, state: State, executor: Executor, round: int) -> Generator[None, None, list[Row]]:
    """Evaluate the global model, and keep it if it is the best so far; where clients have models of their own, these."""
    request = Scoring("validation", generate=world.generate, sites=True)
    ((scores,),) = yield from collect(executor.score([request]))
    metrics = global_metrics(round, state.step, scores, "federated", world.schedule)
    values = {n: v for n, (v, _) in scores.values.items()}
    records: dict[int, int] = {}
    if world.own is not None:
        lanes = max(1, world.plan.lanes_at("federated", round))
        records = yield from world.own.train(executor, world.schedule, state, lanes)
        found = yield from world.own.score(executor, records, request, lanes)
        of_clients = own_metrics(round, state.step, state.steps, world.schedule, found)
        values = {r.name: r.value for r in of_clients if r.client is None and r.split == "validation"}
        # The curve is that of the clients' own models; the global model's is beside it.
        metrics = [dataclasses.replace(r, name=f"shared_{r.name}") if r.client is None else r for r in metrics]
        untrained = float(sum(record < 0 for record in records.values()))
        metrics += [*of_clients, Row(round, state.step, "federated", None, "validation", "own_untrained", untrained)]
    chosen = world.choice.better(values, round, state.step, state.best)
    if chosen is not None:
        state.best = chosen
        into = state.best_records.new()
        world.best.write(into, state.params)
        state.best_fold = {n: t.clone() for n, t in state.server.items() if n.startswith(FOLD)}
        state.best_records.wrote(GLOBAL, into)
        if world.own is not None:
            world.own.keep(records, state, world.best)
    return metrics


def _received(world: World, state: State, round: int, metrics: Sequence[Row]) -> list[Row]:
    """The global model of the round before, as the clients that have received it score it; it is kept if it is the best so far."""
    out = mean_of_received(metrics, round - 1)
    values = {r.name: r.value for r in out}
    metric = world.choice.metric or next((n for n in ("accuracy", "loss", *sorted(values)) if n in values), "")
    mode = "min" if not world.choice.metric and metric.endswith(("loss", "perplexity")) else world.choice.mode
    choice, step = dataclasses.replace(world.choice, metric=metric, mode=mode), max((r.step for r in out), default=0)
    chosen = choice.better(values, round - 1, step, state.best)
    if chosen is not None:
        state.best = chosen
        into = state.best_records.new()
        world.best.write(into, state.params)
        state.best_records.wrote(GLOBAL, into)
    return out


def mean_of_received(metrics: Sequence[Row], round: int) -> list[Row]:
    """Means of the clients' scores of the global model of a round, by their weights."""
    scored = [r for r in metrics if r.round == round and r.split == "site" and r.name.startswith("merged_")]
    step = max((r.step for r in scored), default=0)
    sums: dict[str, tuple[float, float]] = {}
    for r in scored:
        total, weight = sums.get(r.name, (0.0, 0.0))
        sums[r.name] = total + r.weight * r.value, weight + r.weight
    place = round, step, "federated", None, "validation"
    return [Row(*place, n.removeprefix("merged_"), s / w, w) for n, (s, w) in sums.items()]


def global_metrics(round: int, step: int, scores: Scores, scope: str, schedule: Schedule) -> list[Row]:
    """Metrics of a model that no client owns: on the shared validation examples, and on each client's own as `merged_...`."""
    out = [Row(round, step, scope, None, "validation", n, v, w) for n, (v, w) in scores.values.items()]
    for client, values in scores.sites.items():
        of = schedule.name(client)
        out += [Row(round, step, scope, of, "site", f"merged_{n}", v, w) for n, (v, w) in values.items()]
    return out


def _choose_local(world: World, state: State, packs: Sequence[Pack], metrics: Sequence[Row]) -> None:
    """Keep each client's best model so far, where nothing is aggregated."""
    scored: dict[tuple[str | None, int], dict[str, float]] = {}
    for m in (m for m in metrics if m.split == "validation"):
        scored.setdefault((m.client, m.step), {})[m.name] = m.value
    for task in (t for p in packs for t in p.tasks if t.evaluate):
        name, step = None if task.client == CENTRAL else task.name, state.steps.get(task.client, 0)
        found = world.choice.better(scored.get((name, step), {}), task.round, step, state.client_best.get(task.client))
        if found is not None:
            state.client_best[task.client] = found
            into = state.best_records.new()
            world.store.copy(task.write, world.best, into, world.layout.numel)
            state.best_records.wrote(task.client, into)
