"""What a client's record holds, and the files of these records."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Size

from fedsim.algorithms import Algorithm
from fedsim.channel import uplink
from fedsim.core.params import Chunk, Layout, meta
from fedsim.core.store import Store
from fedsim.training.config import LocalTrainingConfig

START = "start"  # the store of the parameters that training starts from


@dataclass(frozen=True)
class RecordLayout:
    """Where a client's record has what, in elements, in this order.

    Attributes:
        states: the algorithm's client state, of each part.
        optimizer: optimizer state, of each part: moments, then step counts by parameter where `counts` of these differ.
        lost: what its messages have lost so far.
        personal: where each personal parameter lies, by name.
        own: where each parameter of the client's own model lies that the global model does not have: the personal ones, or the
            whole model of a part of its own, or that of the state's `own/NAME`.
        width: elements in all.
        places: where each parameter lies in the flat vector of all.
    """

    states: tuple[int, ...]
    optimizer: int
    counts: int
    lost: int
    personal: dict[str, int]
    own: dict[str, int]
    width: int
    places: dict[str, int]

    @classmethod
    def of(cls, mode: str, algorithm: Algorithm, layout: Layout, config: LocalTrainingConfig) -> RecordLayout:
        """What a client keeps in this mode; each part may be of no elements."""
        state = algorithm.init(meta(layout))[1]
        states = tuple(sum(t.numel() for t in algorithm.part_state(state, p).values()) for p in algorithm.parts)
        keeps = (config.keep_state[mode] or bool(algorithm.lives_on)) and config.optim.num_moments > 0
        counts = len(layout.shapes) if keeps and algorithm.overrides("trains", "resets") else 0
        optimizer = config.optim.num_moments * layout.numel + counts if keeps else 0
        keeps_lost = uplink(config.up, config.error_feedback).keeps
        coded = [sent for group, sent in algorithm.messages(layout).items() if group not in algorithm.exact]
        lost = sum(sent.numel for sent in coded) if keeps_lost else 0
        at, personal, places, chosen = 0, {}, {}, algorithm.personal(layout.shapes)
        begin = sum(states) + len(states) * optimizer + lost
        for name, tensor in meta(layout).items():
            places[name], at = at, at + tensor.numel()
            if name in chosen:
                personal[name], begin = begin, begin + tensor.numel()
        own, last = personal, algorithm.part_state(state, algorithm.parts[-1])
        if len(states) > 1 and last.keys() == layout.shapes.keys():
            own = {name: sum(states[:-1]) + place for name, place in places.items()}
        elif len(states) == 1 and {f"own/{name}" for name in layout.shapes} <= state.keys():
            begins = dict(
                zip(state, itertools.accumulate((t.numel() for t in state.values()), initial=0), strict=False)
            )
            own = {name: begins[f"own/{name}"] for name in layout.shapes}
        return cls(states, optimizer, counts, lost, personal, own, begin, places)

    def state_at(self, part: int) -> int:
        """Where a part's state begins."""
        return sum(self.states[:part])

    def optimizer_at(self, part: int) -> int:
        """Where a part's optimizer state begins."""
        return sum(self.states) + part * self.optimizer

    @property
    def lost_at(self) -> int:
        """Where that begins which messages have lost."""
        return sum(self.states) + len(self.states) * self.optimizer

    def personal_in(self, chunk: Chunk) -> Iterator[tuple[str, int]]:
        """Personal parameters, or their pieces, in a chunk, and where the record has them."""
        at = chunk.start
        for name, shape in chunk.shapes.items() if self.personal else ():
            if name in self.personal:
                yield name, self.personal[name] + at - self.places[name]
            at += Size(shape).numel()


def stores_of(
    folder: Path, algorithms: dict[str, Algorithm], layout: Layout, config: LocalTrainingConfig
) -> dict[str, Store]:
    """Mode -> file of client state, one record per client; a record of width 0 means that the mode keeps nothing.

    `best-<mode>` holds the parameters of best models, of clients and of the global model; `START` those of the start, as record 0.
    """
    dtype, out = layout.sums.dtype, {START: Store(folder / f"{START}.bin", layout.numel, layout.sums.dtype)}
    for mode, algorithm in algorithms.items():
        width = RecordLayout.of(mode, algorithm, layout, config).width
        out[mode] = Store(folder / f"{mode}.bin", width, dtype)
        out[f"best-{mode}"] = Store(folder / f"best-{mode}.bin", layout.numel, dtype)
    return out
