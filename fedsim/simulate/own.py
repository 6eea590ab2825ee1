"""Clients' own models: where they are, what they score after a round, and which of them are kept with the best model.

An own model is the global one with what the client's record has of its own in its place: private parameters, or all of them. A client
that has not taken part yet has the initial ones. Where an algorithm `adapted` clients, each one's model is trained anew from the global one
before it is looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Size, Tensor

from fedsim.core.params import Layout
from fedsim.core.store import Store
from fedsim.core.types import ADAPTED, Pack, Row, Scores, Scoring, Task
from fedsim.simulate.schedule import Schedule
from fedsim.simulate.state import State

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


class _Executor(Protocol):
    def train(self, packs: Sequence[Pack], acc: None) -> Iterator[Any]: ...
    def score(self, requests: Sequence[Scoring]) -> Iterator[list[Scores] | None]: ...


@dataclass(frozen=True)
class OwnModels:
    """Where the clients' own models of a mode are.

    Attributes:
        layout: of the parameters.
        places: parameter -> where a record has it; of the others the global model's are used.
        store, first: records of the clients, and one with the initial parameters.
        adapted: whether records are made by training from the global model, one for each client.
    """

    layout: Layout
    places: Mapping[str, int]
    store: Store
    first: Store
    adapted: bool

    def train(
        self, executor: _Executor, schedule: Schedule, state: State, lanes: int
    ) -> Generator[None, None, dict[int, int]]:
        """Client -> its record, -1 for one that has none; where clients are `adapted`, the executor has the global model."""
        clients = [int(c) for c in schedule.clients]
        if not self.adapted:
            return {c: state.records.read(c) for c in clients}
        packs, records = [], {c: i for i, c in enumerate(clients)}
        for i in range(0, len(clients), lanes):
            tasks = [
                # `repeat`: batches that no round has drawn.
                Task(c, schedule.name(c), max(1, state.round), 1, 0, 0, 1, 1.0, write=records[c], repeat=-1)
                for c in clients[i : i + lanes]
            ]
            packs.append(Pack(len(packs), ADAPTED, tuple(tasks), len(tasks)))
        for report in executor.train(packs, None):
            if report is None:
                yield None
        return records

    def score(
        self, executor: _Executor, records: Mapping[int, int], like: Scoring, lanes: int
    ) -> Generator[None, None, dict[int, Scores]]:
        """Scores of the clients' models by a request like this one; the executor has the global model."""
        store = ADAPTED if self.adapted else "federated"
        like = dataclasses.replace(like, store=store, owned=not self.adapted)
        return (yield from score_records(executor, records, like, lanes))

    def read(self, record: int, flat: Tensor) -> None:
        """Put what a client has of its own into the global parameters, `[N]`, in place."""
        at, own = 0, self.layout.views(flat)
        for name, shape in self.layout.shapes.items():
            size = Size(shape).numel()
            if name in self.places:
                store, place = (self.first, at) if record < 0 else (self.store, self.places[name])
                own[name].copy_(store.read(max(0, record), place, place + size).view(shape))
            at += size

    def keep(self, records: Mapping[int, int], state: State, best: Store) -> None:
        """Write all clients' models beside the best global one."""
        for client, record in records.items():
            flat, into = state.params.clone(), state.best_records.new()
            self.read(record, flat)
            best.write(into, flat)
            state.best_records.wrote(client, into)


def score_records(
    executor: _Executor, records: Mapping[int, int], like: Scoring, lanes: int
) -> Generator[None, None, dict[int, Scores]]:
    """Scores by client of these records, as many side by side as there are lanes."""
    held, found = list(records.values()), []
    asked = [dataclasses.replace(like, records=tuple(held[i : i + lanes])) for i in range(0, len(held), lanes)]
    for answer in executor.score(asked):
        if answer is None:
            yield None
        else:
            found += answer
    return dict(zip(records, found, strict=True))


def own_metrics(
    round: int,
    step: int,
    steps: Mapping[int, int],
    schedule: Schedule,
    found: Mapping[int, Scores],
    splits: Sequence[str] = ("validation", "site"),
) -> list[Row]:
    """Metrics of the clients' own models: `own_NAME` of each client, and over the clients the mean weighted by training examples under
    the plain name (of `site` as `own_NAME_weighted_mean`), `own_NAME_mean`, `_worst` and `_q10` ... `_q90`.

    Args:
        round: after which they were scored.
        step, steps: optimizer steps by then, of the client with the most and of each.
        schedule: of the mode.
        found: scores by client.
        splits: validation or test, and `site` for each client's own validation examples.
    """
    out: list[Row] = []
    for split in splits:
        by_name: dict[str, list[tuple[float, float]]] = {}
        for client, scores in found.items():
            values = scores.sites.get(client, {}) if split == "site" else scores.values
            for name, (value, weight) in ((n, v) for n, v in values.items() if ":" not in n):  # counts by class
                of = schedule.name(client)
                out.append(Row(round, steps.get(client, 0), "federated", of, split, f"own_{name}", value, weight))
                by_name.setdefault(name, []).append((value, float(schedule.sizes[client])))
        for name, each in by_name.items():
            values, sizes = np.array(each).T
            worst = values.max() if name.endswith(("loss", "perplexity")) else values.min()
            mean = f"own_{name}_weighted_mean" if split == "site" else name
            over = {
                mean: np.average(values, weights=sizes),
                f"own_{name}_mean": values.mean(),
                f"own_{name}_worst": worst,
            }
            over |= {f"own_{name}_q{int(q * 100)}": float(np.quantile(values, q)) for q in QUANTILES}
            out += [Row(round, step, "federated", None, split, n, float(v)) for n, v in over.items()]
    return out
