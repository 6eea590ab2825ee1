"""What a client's record holds, and the files of these records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedsim.algorithms import Algorithm
from fedsim.core.params import Layout, meta
from fedsim.core.store import Store
from fedsim.training.config import LocalTrainingConfig


@dataclass(frozen=True)
class RecordLayout:
    """Elements of a record, in this order: the algorithm's client state; optimizer state; what its messages have lost so far."""

    state: int
    optimizer: int
    lost: int

    @classmethod
    def of(cls, mode: str, algorithm: Algorithm, layout: Layout, config: LocalTrainingConfig) -> RecordLayout:
        """What a client keeps in this mode; each part may be of no elements."""
        return cls(
            sum(t.numel() for t in algorithm.init(meta(layout))[1].values()),
            config.optim.num_moments * layout.numel if config.keep_state[mode] else 0,
            sum(sent.numel for sent in algorithm.messages(layout.sums).values()) if config.error_feedback else 0,
        )

    @property
    def width(self) -> int:
        """Elements in all."""
        return self.state + self.optimizer + self.lost


def stores_of(
    folder: Path, algorithms: dict[str, Algorithm], layout: Layout, config: LocalTrainingConfig
) -> dict[str, Store]:
    """Mode -> file of client state, one record per client; a record of width 0 means that the mode keeps nothing.

    `best-<mode>` holds the parameters of best models: each client's where nothing is merged, else the global one's.
    """
    dtype, out = layout.sums.dtype, {}
    for mode, algorithm in algorithms.items():
        width = RecordLayout.of(mode, algorithm, layout, config).width
        out[mode] = Store(folder / f"{mode}.bin", width, dtype)
        out[f"best-{mode}"] = Store(folder / f"best-{mode}.bin", layout.numel, dtype)
    return out
