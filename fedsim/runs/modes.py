"""One mode of a run: resume it, train its remaining rounds, and evaluate and export its models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Generator
from typing import Any

import numpy as np

from fedsim.core.errors import CallbackError
from fedsim.core.files import CROSS, OWN, folder_names, record
from fedsim.core.params import FOLD, Params, clone
from fedsim.core.store import Records
from fedsim.core.types import ADAPTED, RoundEnd, Row, Scores, Scoring
from fedsim.runs.build import CENTRAL
from fedsim.runs.checks import MOST_SITES
from fedsim.runs.export import save_model, write_cards
from fedsim.runs.folder import Metrics
from fedsim.runs.plan import save_plan
from fedsim.runs.predictions import ByRow, by_row, load_by_row, save_by_row
from fedsim.runs.resolve import schedule_of
from fedsim.runs.setup import Setup
from fedsim.runs.tracking import Tracking
from fedsim.simulate.faults import SIMULATED, describe_faults
from fedsim.simulate.own import OwnModels, own_metrics, score_records
from fedsim.simulate.rounds import Halved, PackDone, Round, World, collect, global_metrics, rounds
from fedsim.simulate.schedule import CENTRAL as CENTRAL_CLIENT
from fedsim.simulate.schedule import Schedule
from fedsim.simulate.state import GLOBAL, State
from fedsim.training.packs import factors, reducer_of
from fedsim.training.records import RecordLayout

SHARED = "shared"  # the global model among scores by example, where clients have models of their own
BY_ROW_CLIENTS = (
    MOST_SITES  # local models that are evaluated example by example at the end; of more, only the best ones
)


def run_mode(
    setup: Setup,
    mode: str,
    seconds: Callable[[], float],
    tracking: Tracking,
    callback: Callable[[RoundEnd], object] | None,
) -> Generator[None, None, dict[str, ByRow]]:
    """Run a mode, resume it, or take it as it is if it has come to its end.

    Returns:
        Scores by example of its last and best models, by model.
    """
    folder, show, exp = setup.folder, setup.show, setup.exp
    checkpoints = setup.checkpoints(mode)
    done, why = checkpoints.done(exp.rounds)
    if done is not None:
        Metrics(folder.path, mode, done["metrics"]).close()  # cuts off what came after
        tracking.tell(mode, done["metrics"])
        return load_by_row(folder, mode)
    if why is not None:
        show.warn(f"{mode}: {why}; its end is done again")
    world = _world(setup, mode)
    state, info = resume_mode(setup, world, mode)
    metrics = Metrics(folder.path, mode, info and info["metrics"])
    try:
        if metrics.torn:
            show.warn(f"metrics/{mode}.jsonl: its last line was torn, and is cut off")
        tracking.cut(mode, metrics.mark())
        yield from _begin(setup, world, state, info, metrics, seconds, tracking)
        yield from train_rounds(setup, world, state, info, metrics, seconds, tracking, callback)
        for line in describe_faults(mode, faults := list(metrics.of_split("fault"))):
            (show.note if all(m["name"] in SIMULATED for m in faults) else show.warn)(line)
        if left := [m["value"] for m in metrics.of_split("simulated") if m["name"] == "at_work"]:
            show.note(
                f"{mode}: {left[-1]:.0f} client(s) were still at work after the last round; their updates are dropped"
            )
        found, tested, exported = yield from _finish(setup, world, state)
        save_by_row(folder, mode, found)
        metrics.log(tested, seconds())
        scored = [m for split in ("validation", "test") for m in metrics.of_split(split)]
        write_cards(setup.parts, folder, mode, exported, scored, world.own is not None)
        mark = metrics.mark()
        files = record(folder.path, [*exported, f"checkpoints/{mode}/by_row.npz"])
        checkpoints.end(rounds=exp.rounds, models=len(found), metrics=mark, files=files)
        tracking.tell(mode, mark)
    finally:
        metrics.close()
    show.end()
    return found


def _world(setup: Setup, mode: str) -> World:
    algorithm = setup.spec.algorithms[mode]
    return World(
        schedule_of(setup.parts, mode),
        algorithm,
        setup.layout,
        reducer_of(algorithm, setup.layout, setup.spec.recipe),
        setup.choice,
        setup.plan,
        setup.memory,
        setup.stores[mode],
        setup.stores[f"best-{mode}"],
        setup.exp.evaluate.generate,
        setup.spec.recipe.chunk,
        setup.bytes_of,
        setup.parts.privacy if mode == "federated" else None,
        _own(setup) if algorithm.merges else None,
        factors(algorithm, setup.layout),
        ledger=setup.parts.ledger if mode == "federated" else None,
    )


def _own(setup: Setup) -> OwnModels | None:
    """Where the clients' own models are."""
    adapted = ADAPTED in setup.spec.algorithms
    mode = ADAPTED if adapted else "federated"
    record = RecordLayout.of(mode, setup.spec.algorithms[mode], setup.layout, setup.spec.recipe)
    places = record.places if adapted else record.own
    return OwnModels(setup.layout, places, setup.stores[mode], setup.first, adapted) if places else None


def _fresh(setup: Setup, world: World) -> State:
    flat = setup.read(setup.first, 0)
    server = clone(world.algorithm.init(setup.layout.views(flat))[0])
    clip = None if world.privacy is None else world.privacy.start
    best = clone({n: t for n, t in server.items() if n.startswith(FOLD)})
    return State(flat, server, Records(), keeps=world.store.width > 0, clip=clip, best_fold=best)


def resume_mode(setup: Setup, world: World, mode: str) -> tuple[State, dict[str, Any] | None]:
    """The state of the newest valid checkpoint, and its manifest; a fresh state if there is none."""
    checkpoints, show = setup.checkpoints(mode), setup.show
    kept = checkpoints.kept()
    for round, info in reversed(kept):
        why = checkpoints.why_not(info)
        if why is None and not world.schedule.scores_as(info["rounds"], round):
            why = f"a run of {info['rounds']} rounds evaluates after other rounds"
        if why is None:
            state = _fresh(setup, world)
            why = checkpoints.restore(state, setup.layout, world.reducer.numel, round)
        if why is None:
            checkpoints.drop_after(round)
            return state, info
        show.warn(f"{mode}: the checkpoint of round {round} is not used: {why}")
    if kept:
        show.warn(f"{mode}: no checkpoint can be used; starts from the beginning")
    checkpoints.drop_after(0)
    for store in (world.store, world.best):
        store.path.unlink(missing_ok=True)
    return _fresh(setup, world), None


def _begin(
    setup: Setup,
    world: World,
    state: State,
    info: dict[str, Any] | None,
    metrics: Metrics,
    seconds: Callable[[], float],
    tracking: Tracking,
) -> Generator[None, None, None]:
    """Log what the first round to come follows: the scores before training, or nothing new on a resume."""
    mode, schedule = world.schedule.mode, world.schedule
    known: Collection[int] | None = ()
    if info is not None:
        tracking.tell(mode, info["metrics"])
        setup.show.note(f"{mode}: resumed after round {state.round}")
        former = dataclasses.replace(schedule, rounds=info["rounds"])
        # More rounds may sample more clients.
        known = former.last_rounds if mode == "local" and former.rounds != schedule.rounds else None
    if known is not None:
        if setup.initial is None:
            setup.executor.broadcast(state.params, world.algorithm.sent(state.server))
        scores = yield from setup.initial_scores()
        metrics.log(_initial(schedule, scores, known), seconds())
    setup.show.begin(mode, state.round)


def _initial(schedule: Schedule, scores: Scores, known: Collection[int]) -> list[Row]:
    """Scores before training, the start of every curve: every mode and client starts from the same parameters.

    A client that is in no cohort never trains and has no curve; `known` clients have their metrics.
    """
    initial, names = global_metrics(0, 0, scores, schedule.mode, schedule), [None]
    if schedule.mode == "local":
        names = [schedule.name(c) for c in sorted(set(schedule.last_rounds) - set(known))]
    return [dataclasses.replace(m, client=name) for name in names for m in initial]


def train_rounds(
    setup: Setup,
    world: World,
    state: State,
    info: dict[str, Any] | None,
    metrics: Metrics,
    seconds: Callable[[], float],
    tracking: Tracking,
    callback: Callable[[RoundEnd], object] | None,
) -> Generator[None, None, None]:
    """Train the remaining rounds: after each one log, checkpoint and show it."""
    exp, show, mode = setup.exp, setup.show, world.schedule.mode
    checkpoints, costs = setup.checkpoints(mode), _costs(state, mode, info, seconds) if info else None
    useful = computed = 0
    spent: list[tuple[float, float]] = []  # seconds of evaluation, and all seconds, by pack of the round
    for event in rounds(world, state, setup.executor):
        match event:
            case None:
                yield
            case PackDone(round, report):
                useful, computed = useful + report.tokens, computed + report.computed
                spent.append((report.scoring, report.seconds))
                show.pack(round, report)
            case Halved(round, lanes):
                save_plan(setup.folder, setup.plan)
                show.warn(f"{mode}: out of memory in round {round}; it starts again with {lanes} lane(s)")
            case Round(round, rows, evaluation):
                share, total = np.sum([*spent, (evaluation, evaluation)], axis=0)
                if share > total / 2 and not setup.slow_evaluation:
                    setup.slow_evaluation = True
                    show.note(
                        f"evaluation took {share / total:.0%} of round {round}; to spend less, set evaluate.max_examples, "
                        f"or evaluate.every_rounds above {exp.evaluate.every_rounds}"
                    )
                spent.clear()
                if costs is not None:  # what a checkpoint took is known once it is there: logged with the next round
                    metrics.log(*costs)
                    costs = None
                metrics.log(rows, seconds())
                if round % exp.checkpoint.every == 0 or round == exp.rounds:
                    tensors = state.tensors(setup.layout, world.algorithm.merges)
                    more = {"rounds": exp.rounds, "plan": dataclasses.asdict(setup.plan)}
                    info = checkpoints.save(state, tensors, metrics, **more)
                    costs = _costs(state, mode, info, seconds)
                    tracking.tell(mode, info["metrics"])
                show.round(round, _headline(rows, exp.best.metric))
                if callback is not None:
                    try:
                        callback(RoundEnd(mode, round, exp.rounds, list(rows)))
                    except Exception as error:
                        raise CallbackError(error) from error
    if costs is not None:
        metrics.log(*costs)
    if computed:
        show.note(f"{mode}: padding overhead {1 - useful / computed:.1%} ({useful:,} of {computed:,} computed tokens)")


def _costs(state: State, mode: str, info: dict[str, Any], seconds: Callable[[], float]) -> tuple[list[Row], float]:
    """What a checkpoint took, as metrics, with the time at which they are logged."""
    took = {"checkpoint_seconds": info["seconds"], "checkpoint_bytes": float(info["bytes"])}
    return [Row(state.round, state.step, mode, None, "run", n, v) for n, v in took.items()], seconds()


def _headline(metrics: list[Row], metric: str) -> str:
    """What a round came to, in a few words."""
    last = [m for m in metrics if m.split == "validation" and m.name == metric]
    model = [m.value for m in last if m.client is None]
    own = [m.value for m in {m.client: m for m in last if m.client is not None}.values()]
    train = [m.value for m in metrics if m.split == "train" and m.name == "loss"]
    parts = [f"train loss {np.mean(train):.3f}"] if train else []
    parts += [f"clients' {metric} {np.mean(own):.3f}"] if own else []
    parts += [f"{metric} {model[-1]:.3f}"] if model else []
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------- the end


def _finish(
    setup: Setup, world: World, state: State
) -> Generator[None, None, tuple[dict[str, ByRow], list[Row], dict[str, tuple[str | None, int]]]]:
    """Export last and best models, and evaluate the best ones once on the test examples.

    Returns:
        Scores by example by model; the test metrics, and those of cross-site evaluation; the folders that were written, with client and round of the model.
    """
    mode, executor, exported = world.schedule.mode, setup.executor, {}

    def export(place: str, client: str | None, round: int, server: Params | None = None) -> None:
        """Write a folder of the model whose parameters were just read."""
        save_model(setup.parts, setup.folder, setup.spec, setup.model, setup.layout, setup.memory.params, place, server)
        exported[place] = (client, round)

    folders = folder_names(setup.parts.partition.names or ())
    owners: list[tuple[str | None, Any, str]] = []  # of best models: client, choice, label
    crossed: list[Row] = []
    request = Scoring("validation", by_row=True)
    if cross := setup.exp.evaluate.cross_site:
        request = dataclasses.replace(request, generate=setup.exp.evaluate.generate, sites=True)
    own: dict[int, int] = {}  # records of clients' own models, chosen with the best global one
    if world.algorithm.merges:
        export("global", None, state.round, state.server)
        answers = yield from collect(executor.score([request]))
        label = mode if world.own is None else SHARED
        last = _by_row("validation", [label], answers)
        crossed += cross_site_rows(world.schedule, state.round, state.step, None, answers[0][0])
        if world.own is not None:
            crossed += yield from _own_last(setup, world, state, request if cross else None, export)
        requests = []
        if state.best is not None:
            executor.broadcast(setup.read(world.best, state.best_records.read(GLOBAL)), state.best_fold)
            export("best", None, state.best.round, state.best_fold)
            requests.append(Scoring("test"))
            owners.append((None, state.best, label))
            own = {c: r for c, r in state.best_records.table.items() if c != GLOBAL}
        for client, at in sorted(own.items()):
            name = world.schedule.name(client)
            if (place := f"{OWN}/{folders.get(name, name)}") in exported:
                setup.read(world.best, at)
                export(f"{place}/best", name, state.best.round)
    else:
        labels, trained, records, best_records = [], [], [], []
        for client, at in sorted(state.records.table.items()):
            name = None if client == CENTRAL_CLIENT else world.schedule.name(client)
            place, label = (CENTRAL, CENTRAL) if name is None else (f"local/{folders.get(name, name)}", f"local {name}")
            setup.read(world.store, at)
            export(place, name, state.round)
            labels.append(label)
            trained.append((name, client))
            records.append(at)
            if client in state.client_best:
                best = state.best_records.read(client)
                setup.read(world.best, best)
                export(f"{place}/best", name, state.client_best[client].round)
                best_records.append(best)
                owners.append((name, state.client_best[client], label))
        few = slice(0, BY_ROW_CLIENTS)
        answers = yield from collect(executor.score(_packed(setup, mode, mode, records[few], request)))
        last = _by_row("validation", labels[few], answers)
        for (name, client), scores in zip(trained[few], (s for part in answers for s in part), strict=True):
            crossed += cross_site_rows(world.schedule, state.round, state.steps.get(client, 0), name, scores)
        requests = _packed(setup, mode, f"best-{mode}", best_records, request)
    if len(setup.parts.tokens["test"].kept()) == 0:
        return last, crossed, exported
    generate = setup.exp.evaluate.generate
    asked = [dataclasses.replace(r, split="test", generate=generate, sites=False, by_row=True) for r in requests]
    answers = yield from collect(executor.score(asked))
    shared = "shared_" if own else ""
    tested = [
        Row(best.round, best.step, mode, client, "test", shared + n, v, w)
        for scores, (client, best, _) in zip((s for part in answers for s in part), owners, strict=True)
        for n, (v, w) in scores.values.items()
    ]
    if own:
        lanes = max(1, setup.plan.lanes_at(mode, setup.exp.rounds))
        asked_own = Scoring("test", store=f"best-{mode}", generate=generate)
        of = yield from score_records(executor, own, asked_own, lanes)
        tested += own_metrics(state.best.round, state.best.step, {}, world.schedule, of, ("test",))
    chosen = _by_row("test", [label for *_, label in owners], answers)
    found = {label: {**last.get(label, {}), **chosen.get(label, {})} for label in {**last, **chosen}}
    return found, crossed + tested, exported


def cross_site_rows(schedule: Schedule, round: int, step: int, client: str | None, scores: Scores) -> list[Row]:
    """Metrics of a model on each client's own validation examples, of split `site:CLIENT`; counts by class are left out."""
    return [
        Row(round, step, schedule.mode, client, f"{CROSS}{schedule.name(c)}", n, v, w)
        for c, values in scores.sites.items()
        for n, (v, w) in values.items()
        if ":" not in n
    ]


def _own_last(
    setup: Setup, world: World, state: State, request: Scoring | None, export: Callable[[str, str, int], None]
) -> Generator[None, None, list[Row]]:
    """Export the last own model of each client that has one; metrics of cross-site evaluation, by the request."""
    own, names = world.own, folder_names(setup.parts.partition.names or ())
    assert own is not None, "clients have models of their own"
    lanes, shared = max(1, setup.plan.lanes_at(world.schedule.mode, state.round)), state.params.clone()
    records = yield from own.train(setup.executor, world.schedule, state, lanes)
    records = {c: r for c, r in sorted(records.items()) if r >= 0}
    found: dict[int, Scores] = {}
    if request is not None:
        found = yield from own.score(setup.executor, records, request, lanes)
    for client, at in records.items():
        own.read(at, setup.memory.params)
        name = world.schedule.name(client)
        export(f"{OWN}/{names.get(name, name)}", name, state.round)
        setup.memory.params.copy_(shared)
    return [
        row
        for client, scores in found.items()
        for row in cross_site_rows(
            world.schedule, state.round, state.steps.get(client, 0), world.schedule.name(client), scores
        )
    ]


def _packed(setup: Setup, mode: str, store: str, records: list[int], like: Scoring) -> list[Scoring]:
    """A request like this one for these records, as many side by side as there are lanes."""
    lanes = setup.plan.lanes_at(mode, setup.exp.rounds)
    parts = [tuple(records[i : i + lanes]) for i in range(0, len(records), lanes)]
    return [dataclasses.replace(like, records=part, store=store) for part in parts]


def _by_row(split: str, labels: list[str], answers: list[list[Scores]]) -> dict[str, ByRow]:
    found = [scores for part in answers for scores in part]
    return {label: by_row(split, scores) for label, scores in zip(labels, found, strict=True)}
