"""Records that travel between the round loop, the executors and the trainers. All of them but `Share`
and `Turn`, which stay in their process, pickle in a few bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ADAPTED = "adapted"  # the mode in which clients train their own models for an evaluation
ROOT = -3  # the server among clients' numbers, where it trains on examples of its own


def stream_of(name: str, round: int, repeat: int = 0) -> tuple[str | int, ...]:
    """The names of a client's random streams in a round, after their purpose; `repeat`: how often it has started in it before."""
    return (name, round, *([f"again {repeat}"] if repeat else []))


@dataclass(frozen=True)
class Task:
    """One client's work in one round.

    Attributes:
        client: the client's number; -1 for the centralized client that holds every row, `ROOT` for the server's own work.
        name: its id as the user reads it.
        round: the round, from 1.
        steps: optimizer steps to do, or None for `epochs` passes.
        steps_done: optimizer steps the client has done before this round.
        schedule_from: place of its first step in a schedule over the run.
        horizon: optimizer steps of that schedule where the config gives none.
        weight: its weight in the mean.
        read: record of the client's stored state to start from, or -1 for a fresh start.
        write: record to leave its state in, or -1 to leave none.
        evaluate: whether it is scored at the end of the round.
        slot: its number among the clients whose messages are merged together.
        repeat: how often the client has started in this round before.
    """

    client: int
    name: str
    round: int
    steps: int | None
    steps_done: int
    schedule_from: int
    horizon: int
    weight: float
    read: int = -1
    write: int = -1
    evaluate: bool = False
    slot: int = 0
    repeat: int = 0

    @property
    def stream(self) -> tuple[str | int, ...]:
        """The names of its random streams, after their purpose."""
        return stream_of(self.name, self.round, self.repeat)


@dataclass(frozen=True)
class Pack:
    """Clients trained together on one device; each takes a lane.

    Attributes:
        index: place in the round: partial sums are merged in this order, whoever made them.
        mode: local | federated | central.
        tasks: one per lane.
        tokens: expected work in tokens, for scheduling and progress.
        clip: norm to which all that a client sends is clipped; None = it is not.
    """

    index: int
    mode: str
    tasks: tuple[Task, ...]
    tokens: int
    clip: float | None = None


class Turn:
    """When a pack may add to a sum that others add to: by default at once."""

    def wait(self) -> bool:
        """Wait until it may; False: it must not, the round is given up."""
        return True

    def done(self) -> None:
        """It has added all it has."""


@dataclass
class Share:
    """One run's part of a pass.

    Attributes:
        worker: the run's own; it knows the run's examples, seed, rates and kept state.
        pack: clients that train in it.
        weights: the run's global parameters, flat `[N]`, on any device.
        server: its server state.
        out: flat, on any device; its clients' messages are added to it.
        turn: when that may be done.
    """

    worker: Any
    pack: Pack
    weights: Any
    server: Any
    out: Any
    turn: Turn = field(default_factory=Turn)


@dataclass(frozen=True)
class Memory:
    """What an executor allocates for a run, which owns it; on the CPU or a GPU, in reach of the workers.

    Attributes:
        params: the global parameters, flat `[N]`.
        total, spare: the buffers of an accumulator; None where no mode aggregates, and where no round has more than one group
            of packs.
    """

    params: Any
    total: Any = None
    spare: Any = None


@dataclass(frozen=True)
class Row:
    """A metric, without the wall-clock seconds that the run adds: see `docs/runs.md`."""

    round: int
    step: int
    scope: str
    client: str | None
    split: str
    name: str
    value: float
    weight: float = 1.0


@dataclass(frozen=True)
class RoundEnd:
    """What a callback of `fedsim.run` is given.

    Attributes:
        mode: local | federated | central.
        round: the round that ended, from 1.
        rounds: how many the mode has.
        metrics: the round's metrics, as in `metrics/<mode>.jsonl`.
    """

    mode: str
    round: int
    rounds: int
    metrics: list[Row]


@dataclass(frozen=True)
class Fault:
    """What went wrong with a client's round.

    Attributes:
        client, name: whose.
        action: failed | skipped | clipped.
        of: loss | update | norm: what was not finite, or, for norm, too large.
        value: the loss or the norm that was seen.
    """

    client: int
    name: str
    action: str
    of: str
    value: float


@dataclass
class Report:
    """What comes back from a pack beside its partial sum.

    Attributes:
        index: the pack's.
        rows: metrics rows.
        steps: optimizer steps done, by client number.
        weight: sum of the weights in the partial sum.
        tokens: tokens trained on.
        computed: tokens that went through the base to train on those, pads and virtual tokens included.
        seconds: wall-clock of the pack.
        scoring: seconds of these that went into evaluation.
        faults: what went wrong with clients of the pack.
        within: clients whose message was not longer than the pack's clip.
    """

    index: int
    rows: list[Row] = field(default_factory=list)
    steps: dict[int, int] = field(default_factory=dict)
    weight: float = 0.0
    tokens: int = 0
    computed: int = 0
    seconds: float = 0.0
    scoring: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    within: int = 0


@dataclass(frozen=True)
class Engine:
    """How trainers train, resolved at a run's first start.

    Attributes:
        packed: clients side by side in lanes; else one after another, by PEFT's own model.
        micro_batch: rows of a client in one pass.
        checkpointing: activations are computed a second time.
    """

    packed: bool
    micro_batch: int
    checkpointing: bool = False


@dataclass(frozen=True)
class Measured:
    """What one forward and backward pass of some lanes took.

    Attributes:
        lanes: how many.
        tokens: tokens of all their rows.
        seconds: wall-clock.
        activations: bytes kept between the forward and the backward pass.
        state: bytes of all lanes' parameters, gradients and moments.
        peak: highest memory allocated on the GPU, in bytes; 0 on the CPU.
    """

    lanes: int
    tokens: int
    seconds: float
    activations: int
    state: int
    peak: int


@dataclass(frozen=True)
class Scoring:
    """A request to score parameters that lie in the shared buffer, or in clients' records.

    Attributes:
        split: validation | test.
        records: records whose parameters are scored, side by side; none = the shared buffer.
        store: which store the records are in.
        generate: also generate answers and compare them.
        sites: also score each site's own validation rows.
        by_row: also hand back each row's negative log-likelihood.
        owned: the records hold what clients have of their own; the rest is in the shared buffer. In place of a record -1 are the
            parameters that training started from.
    """

    split: str
    records: tuple[int, ...] = ()
    store: str = ""
    generate: bool = False
    sites: bool = False
    by_row: bool = False
    owned: bool = False


@dataclass
class Scores:
    """Sums over the rows of a split, divided once at the end.

    Attributes:
        values: metric name -> (value, rows it rests on).
        sites: client number -> the same, on that site's own rows.
        predictions: predicted class by row of the split, or None where there are no classes.
        nll: negative log-likelihood of the answer by row of the split, in nats, float64; None unless asked for.
        tokens: answer tokens scored.
    """

    values: dict[str, tuple[float, float]]
    sites: dict[int, dict[str, tuple[float, float]]] = field(default_factory=dict)
    predictions: Any = None
    nll: Any = None
    tokens: int = 0
