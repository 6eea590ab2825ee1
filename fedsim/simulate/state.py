"""Everything that a mode carries from round to round, and what a checkpoint stores of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsim.aggregators import Accumulator
from fedsim.core.params import Layout, Params
from fedsim.core.store import Records

GLOBAL = -2  # the global model among the owners of best models


@dataclass
class Chosen:
    """The best model so far: its validation score and loss, and the round and step at which it was reached."""

    value: float
    round: int
    step: int
    loss: float = math.inf


@dataclass(frozen=True)
class Choice:
    """How the best model is chosen by its validation scores: the metric, and min | max."""

    metric: str
    mode: str

    def better(self, scores: Mapping[str, float], round: int, step: int, than: Chosen | None) -> Chosen | None:
        """The model with these scores if it replaces the best one, else None; `fedsim.analysis.load` applies the same rule.

        The better score wins, of equal scores the lower loss, of equal losses the later round. A score that is missing or NaN
        never wins; a NaN loss loses every tie.
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


@dataclass
class State:
    """What a mode carries from round to round.

    Attributes:
        params: global parameters, flat `[N]`, changed in place.
        server: the algorithm's server state.
        records: which record of the store holds which client's state.
        keeps: whether clients keep state at all.
        steps: optimizer steps done, by client.
        round: the last complete round.
        best: the best global model so far.
        client_best: the best local model so far, by client, where nothing is aggregated.
        best_records: which record holds the best model of which client; that of the global model under `GLOBAL`.
        seen: the round in which each client last began, where that decides what it has to be sent.
        pending: messages under way: the round in which they arrive -> their accumulator.
        best_fold: what the best model has folded into the base.
        clip: norm to which the next round's messages are clipped for privacy; None = they are not.
    """

    params: Tensor
    server: Params
    records: Records
    keeps: bool
    steps: dict[int, int] = field(default_factory=dict)
    round: int = 0
    best: Chosen | None = None
    client_best: dict[int, Chosen] = field(default_factory=dict)
    best_records: Records = field(default_factory=Records)
    seen: dict[int, int] = field(default_factory=dict)
    pending: dict[int, Accumulator] = field(default_factory=dict)
    clip: float | None = None
    best_fold: Params = field(default_factory=dict[str, Tensor])

    @property
    def step(self) -> int:
        """Optimizer steps that a client has done since the start: of the client with the most."""
        return max(self.steps.values(), default=0)

    def tensors(self, layout: Layout, aggregates: bool) -> dict[str, Tensor]:
        """The tensors of a checkpoint: `params.NAME`, `server.NAME` and `pending.ROUND`. Without aggregation everything that
        changes is in the clients' records."""
        out = {f"server.{n}": t for n, t in self.server.items()} | {f"best.{n}": t for n, t in self.best_fold.items()}
        if aggregates:
            out |= {f"params.{n}": t for n, t in layout.views(self.params).items()}
        return out | {f"pending.{r}": acc.total for r, acc in self.pending.items()}

    def info(self) -> dict[str, Any]:
        """The rest of a checkpoint, for JSON. What has one number per client is two lists, which are written much faster
        than an object."""
        return {
            "round": self.round,
            "table": _lists(self.records.table),
            "best_table": _lists(self.best_records.table),
            "steps": _lists(self.steps),
            **({"seen": _lists(self.seen)} if self.seen else {}),
            "best": None if self.best is None else vars(self.best),
            "client_best": {str(c): vars(b) for c, b in self.client_best.items()},
            "pending": {str(r): [acc.weight, acc.clients] for r, acc in self.pending.items()},
            **({} if self.clip is None else {"clip": self.clip}),
        }

    def restore(
        self, layout: Layout, numel: int, infos: list[dict[str, Any]], tensors: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Bring a fresh state to the last of these checkpoints.

        Args:
            layout: of the parameters.
            numel: elements of an accumulator.
            infos: of the checkpoints that are kept, oldest first: the records they refer to stay untouched.
            tensors: of the last one, by name, one at a time.
        """
        info = infos[-1]
        tables, best_tables = ([dict(zip(*i[key], strict=True)) for i in infos] for key in ("table", "best_table"))
        self.records, self.best_records = Records(tables[-1], tables), Records(best_tables[-1], best_tables)
        self.steps = dict(zip(*info["steps"], strict=True))
        self.seen = dict(zip(*info.get("seen", ((), ())), strict=True))
        self.round = info["round"]
        self.clip = info.get("clip")
        self.best = Chosen(**info["best"]) if info["best"] else None
        self.client_best = {int(c): Chosen(**b) for c, b in info["client_best"].items()}
        into = {f"params.{n}": t for n, t in layout.views(self.params).items()}
        into |= {f"server.{n}": t for n, t in self.server.items()}
        into |= {f"best.{n}": t for n, t in self.best_fold.items()}
        for round, (weight, clients) in info["pending"].items():
            self.pending[int(round)] = Accumulator(self.params.new_zeros(numel), weight=weight, clients=clients)
            into[f"pending.{round}"] = self.pending[int(round)].total
        for name, tensor in tensors:
            into[name].copy_(tensor)


def _lists(by_client: dict[int, int]) -> list[list[int]]:
    return [list(by_client), list(by_client.values())]
