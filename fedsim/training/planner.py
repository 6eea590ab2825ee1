"""How many clients train side by side: resolved once, at a run's first start, and written into `plan.json`.

`lanes: auto` is a rule: a pass holds as many tokens as still pay, by the base's sizes and the kind of device, so the same
experiment has the same lanes, and the same bits, wherever and beside whatever it runs. `lanes: measure` times passes on the
first device - the clients of round 1, their own first batches - and takes the fewest lanes beyond which a pass does no more
tokens a second, if they fit. A resume reads the plan.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsim.core.errors import UserError
from fedsim.core.types import Engine, Measured

# Tokens of a pass beyond which more lanes bring nothing; on the CPU also bytes of a layer's widest activation: larger blocks
# are mapped and zeroed anew in every layer (docs/log.md, "Too many lanes collapse").
_PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
_WIDEST_BYTES = 8 << 20
_LANE_BYTES = 1 << 30  # parameters, gradients and moments of all lanes on the CPU
_GAIN = 1.03  # tokens a second that more lanes must bring to be worth their memory
_PATIENCE_S = 4.0  # on the CPU, where a pass may take seconds
_TRIAL_S = 0.4  # short passes are repeated for so long
_ROOM = 0.85  # share of the free memory that a plan fills


@dataclass
class Plan:
    """What a run's packs are formed and trained by; `plan.json`.

    Attributes:
        threads: CPU threads of a worker.
        packed: whether clients train in lanes; `why_not` says why they do not.
        lanes: clients side by side, at most.
        micro_batch: rows of a client in one pass.
        checkpointing: activations are computed a second time.
        memory: bytes by what for: base (once a device), lane (parameters, gradient, moments), activations (of the lanes'
            largest pass), predicted (highest), by worker; of a whole model also global (parameters), sum, chunk; empty
            where nothing was measured.
        measured: passes on the way: lanes, tokens, seconds.
        halved: mode, round and lanes from there on, where memory was too little.
    """

    threads: int
    packed: bool = False
    why_not: str | None = None
    lanes: int = 1
    micro_batch: int = 0
    checkpointing: bool = False
    memory: dict[str, int] = field(default_factory=dict)
    measured: list[dict[str, float]] = field(default_factory=list)
    halved: list[dict[str, Any]] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        """What trainers are told."""
        return Engine(self.packed, self.micro_batch, self.checkpointing)

    def saw(self, peak: int) -> None:
        """Predict at least a peak that was measured, in bytes, such as that of evaluating the initial model."""
        self.memory["predicted"] = max(self.memory["predicted"], peak)

    def lanes_at(self, mode: str, round: int) -> int:
        """Clients side by side in a round."""
        return min([self.lanes, *(h["lanes"] for h in self.halved if h["mode"] == mode and h["round"] <= round)])

    def halve(self, mode: str, round: int) -> int:
        """Half the lanes from this round on; how many that are.

        Raises:
            UserError: if there is but one.
        """
        now = self.lanes_at(mode, round)
        if now == 1:
            raise UserError(
                f"memory: round {round} ({mode}) does not fit with one lane; lower local.micro_batch (now {self.micro_batch}), "
                "evaluate.batch_size or data.max_length, or set training.checkpointing=true"
            )
        self.halved.append({"mode": mode, "round": round, "lanes": now // 2})
        return now // 2


@dataclass
class Packs:
    """The packs of the first round, for the planner.

    Attributes:
        clients: most clients of a round.
        first: (lanes, rows) -> row numbers of the first pass of the largest pack, one array a client.
        last: the same of their last steps, which may be short; None where all steps are alike.
        steps: optimizer steps of a client.
        largest: (lanes, rows) -> tokens of the largest pass of round 1.
        mean: tokens of a training row in the mean, virtual ones included.
    """

    clients: int
    first: Callable[[int, int], list[np.ndarray]]
    largest: Callable[[int, int], int]
    last: Callable[[int, int], list[np.ndarray]] | None = None
    steps: int = 1
    mean: float = 1.0


def lanes_of(
    packs: Packs, rows: int, *, token_bytes: int, lane_bytes: int, kept: float, room: int | None, on_gpu: bool
) -> int:
    """Lanes of `auto`: a function of the experiment, the sizes of the base and the kind of device.

    Args:
        packs: what round 1 trains.
        rows: of a client in one pass.
        token_bytes: of a token's activation in the widest layer.
        lane_bytes: of a lane's parameters, gradient and moments.
        kept: bytes a token that are kept for the backward pass.
        room: bytes for lanes and activations on a GPU: of the device, not what happens to be free; None = unknown.
        on_gpu: the kind of device.
    """
    tokens = rows * packs.mean
    if on_gpu:
        most = _PASS_TOKENS["cuda"] / tokens
        most = most if room is None else min(most, _ROOM * room / (lane_bytes + kept * tokens))
    else:
        most = min(_PASS_TOKENS["cpu"], _WIDEST_BYTES / token_bytes) / tokens
        most = min(most, _LANE_BYTES / max(1, lane_bytes))
    return max(1, min(packs.clients, int(most)))


def choose_lanes(
    plan: Plan,
    packs: Packs,
    measure: Callable[[Sequence[np.ndarray]], Measured | None],
    configure: Callable[[Engine], None],
    peak: Callable[[], int],
    *,
    workers: int,
    lanes: int | str,
    checkpointing: bool | str,
    base_bytes: int,
    token_bytes: int,
    free: int | None,
    total: int | None,
    resident: int,
    on_gpu: bool,
) -> None:
    """Fill in the plan: lanes, micro-batch, checkpointing, memory.

    What a pass takes is counted on one of one lane. Time is looked at for `measure` alone; memory that is free decides where
    one lane does not fit, and bounds the lanes of `measure`.

    Args:
        plan: changed in place; its `micro_batch` is the config's.
        packs: what round 1 trains.
        measure: a pass over these rows, one array a lane; None where it does not fit.
        configure: tells the trainers of another micro-batch or of checkpointing.
        peak: highest memory so far, in bytes: of the GPU's allocator since the last pass, or resident in the process.
        workers: workers that must have something to do, under `measure`.
        lanes, checkpointing: as the config says.
        base_bytes: of the base.
        token_bytes: of a token's activation in the base's widest layer.
        total: bytes of a GPU's memory; None on the CPU.
        free: bytes that a worker may still take on its device, or None where nobody knows.
        resident: bytes that are taken whatever the lanes: on the CPU those of the process.
        on_gpu: whether peaks are those of the GPU's allocator.

    Raises:
        UserError: if one lane does not fit however it is cut.
    """
    most = max(1, -(-packs.clients // workers)) if lanes == "measure" else packs.clients
    most = min(most, lanes) if isinstance(lanes, int) else most
    plan.checkpointing = checkpointing is True
    configure(plan.engine)
    may_checkpoint = checkpointing == "auto"
    one = _make_one_fit(plan, packs, measure, configure, may_checkpoint)
    # The largest pass of the round may be larger than the first one, and one lane cannot be halved.
    most_kept = one.activations * packs.largest(1, plan.micro_batch) / max(1, one.tokens)
    if may_checkpoint and not plan.checkpointing and free is not None and most_kept > _ROOM * free:
        plan.checkpointing = True
        configure(plan.engine)
        one = _make_one_fit(plan, packs, measure, configure, may_checkpoint)
    per_token = one.activations / max(1, one.tokens)
    fixed = 0
    if on_gpu:  # what the allocator's peak holds beside activations and lanes: the base, workspaces
        two = measure(packs.first(min(2, most), plan.micro_batch))
        if two is not None and two.tokens > one.tokens:
            per_token = max(per_token, (two.peak - two.state - one.peak + one.state) / (two.tokens - one.tokens))
        fixed = max(0, int(one.peak - one.state - per_token * one.tokens))

    def predict(k: int) -> int:
        tokens = packs.largest(k, plan.micro_batch)
        return int((fixed if on_gpu else resident) + k * one.state / one.lanes + per_token * tokens)

    def fits(k: int) -> bool:
        return free is None or k == 1 or predict(k) - (fixed if on_gpu else resident) <= _ROOM * free

    state = one.state // one.lanes
    if lanes == "measure":
        plan.lanes = _fastest(plan, packs, measure, most, fits, on_gpu)
    elif lanes == "auto":
        room, kept = None if total is None else total - base_bytes, one.activations / max(1, one.tokens)
        sizes = {"token_bytes": token_bytes, "lane_bytes": state, "kept": kept}
        plan.lanes = lanes_of(packs, plan.micro_batch, **sizes, room=room, on_gpu=on_gpu)
    else:
        plan.lanes = most
    largest = packs.largest(plan.lanes, plan.micro_batch)
    predicted = predict(plan.lanes)
    if plan.packed and not on_gpu:
        # A pass also holds what it does not keep, and the C heap what passes left in it: one is done as rounds will do it.
        full = one if plan.lanes == 1 else measure(packs.first(plan.lanes, plan.micro_batch))
        if full is not None:
            predicted = max(predicted, int(resident + (peak() - resident) * max(1.0, largest / max(1, full.tokens))))
    plan.memory = {
        "base": base_bytes,
        "lane": state,
        "activations": int(per_token * largest),
        "predicted": max(predicted, peak()),
    }


def _make_one_fit(plan: Plan, packs: Packs, measure: Callable, configure: Callable, may_checkpoint: bool) -> Measured:
    """One lane's pass; with checkpointing, then with ever smaller micro-batches, where it does not fit otherwise."""
    while True:
        one = measure(packs.first(1, plan.micro_batch))
        if one is not None:
            return one
        if may_checkpoint and not plan.checkpointing:
            plan.checkpointing = True
        elif plan.micro_batch > 1:
            plan.micro_batch = -(-plan.micro_batch // 2)
        else:
            raise UserError(
                "memory: one row of one client does not fit on the device; lower data.max_length or use a smaller base"
            )
        configure(plan.engine)


def _fastest(plan: Plan, packs: Packs, measure: Callable, most: int, fits: Callable[[int], bool], on_gpu: bool) -> int:
    """The fewest lanes that do about as many tokens a second as any, among 1, 2, 4, ... and the most there are."""
    began, rates, worse = time.perf_counter(), {}, 0
    ladder = itertools.takewhile(lambda k: k < most, (2**i for i in itertools.count()))
    for k in [*ladder, most]:
        late = not on_gpu and time.perf_counter() - began > _PATIENCE_S
        if not fits(k) or late:
            break
        found = _mean_pass(packs, measure, k, plan.micro_batch)
        if found is None:
            break
        plan.measured.append({"lanes": k, "tokens": found.tokens, "seconds": round(found.seconds, 5)})
        rates[k] = found.tokens / found.seconds
        # One disappointing count may be noise, or a size that the kernels do not like: two in a row are a trend.
        worse = worse + 1 if rates[k] < max(rates.values()) else 0
        if worse == 2:
            break
    best = max(rates.values(), default=0.0)
    return min((k for k, r in rates.items() if r * _GAIN >= best), default=1)


def _mean_pass(packs: Packs, measure: Callable, lanes: int, rows: int) -> Measured | None:
    """A pass of the mean step of a round: short last steps want more lanes than full ones. None where one does not fit."""
    full = _best_of(measure, packs.first(lanes, rows))
    if full is None or packs.last is None:
        return full
    short = _best_of(measure, packs.last(lanes, rows))
    if short is None:
        return None
    n = packs.steps
    seconds = ((n - 1) * full.seconds + short.seconds) / n
    tokens = ((n - 1) * full.tokens + short.tokens) // n
    return dataclasses.replace(full, seconds=seconds, tokens=tokens)


def _best_of(measure: Callable, rows: Sequence[np.ndarray]) -> Measured | None:
    """The fastest of a few passes, after one that pays for what is made once: kernels, caches, room."""
    best = measure(rows)
    if best is None:
        return None
    spent, warm = best.seconds, True
    while warm or spent < _TRIAL_S:
        found = measure(rows)
        if found is None:
            return None
        spent += found.seconds
        best = found if warm or found.seconds < best.seconds else best
        warm = False
    return best


def describe(plan: Plan, device: str) -> list[str]:
    """Lines for the user before training."""
    m = {k: f"{v / 1e6:,.1f} MB" for k, v in plan.memory.items()}
    more = f", micro-batch {plan.micro_batch}" + (", checkpointing" if plan.checkpointing else "")
    if not plan.packed:
        why = f": {plan.why_not}" if plan.why_not else ""
        out = [f"plan: {device}, clients one after another{more if plan.memory else ''}{why}"]
        if "sum" in m:
            out.append(
                f"memory: {m['lane']} (parameters, gradient, moments), global parameters {m['global']}, their sum {m['sum']}, "
                f"a chunk {m['chunk']}; activations {m['activations']}; predicted peak {m['predicted']}"
            )
        return out
    out = [f"plan: {device}, {plan.lanes} lane{'s' if plan.lanes > 1 else ''}{more}"]
    if m:
        messages = f"messages of all clients {m['messages']}; " if "messages" in m else ""
        out.append(
            f"memory: base {m['base']} once; a lane {m['lane']} (parameters, gradient, moments); {messages}"
            f"activations {m['activations']}; predicted peak {m['predicted']}"
        )
    if plan.measured:
        tried = ", ".join(f"{p['lanes']:.0f}: {p['tokens'] / p['seconds']:,.0f}" for p in plan.measured)
        out.append(f"tokens a second by lanes: {tried}")
    return out
