"""A run's pack in a pass: what the lanes of its clients share, and what it comes to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsim.aggregators import meter
from fedsim.aggregators.reducer import Reducer
from fedsim.algorithms import Algorithm
from fedsim.algorithms.factors import pairs
from fedsim.core.params import Chunk, Layout, Message, Params, meta
from fedsim.core.store import Store
from fedsim.core.types import Report, Share, Task
from fedsim.training.config import LocalTrainingConfig
from fedsim.training.records import RecordLayout

if TYPE_CHECKING:
    from fedsim.training.worker import Worker


@dataclass(frozen=True)
class Setup:
    """A run's mode.

    Attributes:
        algorithm, reducer: its algorithm, and how messages become one.
        chunks: chunks of the parameters that the algorithm's client side is called on.
        record, store: what a client keeps, and where.
        stays: parameters that never travel.
        ranked: whether clients have ranks of their own.
    """

    algorithm: Algorithm
    reducer: Reducer
    chunks: list[Chunk]
    record: RecordLayout
    store: Store
    stays: frozenset[str]
    ranked: bool

    @classmethod
    def of(cls, mode: str, algorithm: Algorithm, layout: Layout, config: LocalTrainingConfig, store: Store) -> Setup:
        """Of a mode with this algorithm; `layout` is that of the parameters."""
        reducer = reducer_of(algorithm, layout.sums, config)
        whole = (config.attack is not None and config.attack.whole) or config.filters is not None
        chunks = chunks_of(algorithm, layout, reducer, None if whole else config.chunk)
        record = RecordLayout.of(mode, algorithm, layout, config)
        stays = algorithm.stays(layout.shapes)
        ranked = mode == "federated" and (config.ranks is not None or algorithm.overrides("rank"))
        return cls(algorithm, reducer, chunks, record, store, stays, ranked)


def reducer_of(algorithm: Algorithm, layout: Layout, config: LocalTrainingConfig) -> Reducer:
    """How the messages of the algorithm's clients become one."""
    made = Reducer(algorithm.aggregates, algorithm.messages(layout), layout, config.slots)
    sent = algorithm.messages(layout).get("update", layout)
    metered = meter.factors_of(sent, factors(algorithm, layout), config.slots) if config.meter else None
    if metered is not None and algorithm.merges:
        made.measure(metered)
    return made


def factors(algorithm: Algorithm, layout: Layout) -> dict[str, tuple[str, str]]:
    """Adapted layer -> names of its A and B, where the server has both of all layers."""
    found = dict(
        zip(layers := [a.partition(".lora_A.")[0] for a, _ in pairs(layout.shapes)], pairs(layout.shapes), strict=True)
    )
    own = algorithm.personal(layout.shapes)
    return {} if any(n in own for both in found.values() for n in both) or len(layers) != len(set(layers)) else found


def chunks_of(algorithm: Algorithm, layout: Layout, reducer: Reducer, most: int | None) -> list[Chunk]:
    """Chunks of the parameters that an algorithm's client side is called on: one, where it has to see all at once."""
    server, client = algorithm.init(meta(layout))
    kept = [algorithm.sent(server), *(algorithm.part_state(client, part) for part in algorithm.parts)]
    same = all(Layout.of(p).shapes == layout.shapes for p in kept if p)
    return layout.chunks(most if algorithm.blockwise and reducer.blockwise and same else None)


class RunPack:
    """A run's pack in a pass.

    Args:
        share: the run's part of the pass.

    Attributes:
        report: what it comes to.
    """

    def __init__(self, share: Share) -> None:
        self.worker: Worker = share.worker
        self.pack, self.weights, self.server = share.pack, share.weights, share.server
        self.setup = self.worker.setups[share.pack.mode]
        self.algorithm, self.report = self.setup.algorithm, Report(share.pack.index)
        self._out, self._turn = share.out, share.turn
        self._may_add: bool | None = None if self.algorithm.merges else True
        self._sent: set[str] = set()

    @functools.cached_property
    def server_flat(self) -> Tensor:
        """The server's state end to end."""
        return torch.cat([t.reshape(-1) for t in self.server.values()])

    @property
    def failed(self) -> set[int]:
        """The clients whose round counts for nothing."""
        return {f.client for f in self.report.faults if f.action != "clipped"}

    def counts(self, client: int) -> bool:
        """Whether a client's round counts."""
        return self._may_add is not False and client not in self.failed

    def travels(self, name: str) -> bool:
        """Whether a tensor is part of the round's messages."""
        return self.algorithm.travels(name, self.pack.tasks[0].round)

    def may_add(self) -> bool:
        """Wait for the pack's turn to add messages; False: the round is given up."""
        if self._may_add is None:
            self._may_add = self._turn.wait()
        return self._may_add

    def add(self, message: Message, tasks: Sequence[Task], chunk: Chunk) -> None:
        """Add a chunk of these clients' messages."""
        self._sent |= message.keys()
        partly = len(self.algorithm.parts) > 1
        weights, slots = [t.weight for t in tasks], [t.slot for t in tasks]
        self.setup.reducer.add(self._out, message, weights, slots, chunk, self.travels, partly)

    def add_factors(self, factors: Params, tasks: Sequence[Task]) -> None:
        """Keep these clients' factors beside their messages."""
        self.setup.reducer.add_factors(self._out, factors, [t.weight for t in tasks], [t.slot for t in tasks])

    def done(self, tasks: Sequence[Task], steps: Sequence[int]) -> None:
        """These clients count, with so many optimizer steps, and all their messages are added."""
        if self.algorithm.merges:
            if tasks and (missing := self.setup.reducer.groups.keys() - self._sent):
                raise ValueError(f"no part of the algorithm sends the message group {min(missing)!r}")
            self.report.weight = sum((t.weight for t in tasks), 0.0)
            self._turn.done()
        self.report.steps = {t.client: n for t, n in zip(tasks, steps, strict=True)}
