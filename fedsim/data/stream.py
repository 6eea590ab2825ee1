"""Rows of K lanes laid end to end in one stream of tokens, with the index tables that a model needs to work on it.

Nothing is padded: linear layers, norms and activations see `[1, N, D]`, N tokens of all rows of all lanes. Where lanes or
rows must be told apart - the K stacked weights of an adapter, attention - a `Span` or a `Group` gathers what belongs
together, and puts it back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.tokens import Tokens

_GROUP_COST = 256  # tokens of padding that are cheaper than another attention call; tried on 2 cores, see docs/log.md


class _Gather(torch.autograd.Function):
    """`x[index]`, zero at `zeros`; the backward pass is a gather too, where autograd's own would add atomically."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, zeros: Tensor | None, back: Tensor, back_zeros: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, back_zeros)
        out = x.index_select(0, index)
        return out if zeros is None else out.index_fill_(0, zeros, 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        back, zeros = ctx.saved_tensors
        out = grad.index_select(0, back)
        return (out if zeros is None else out.index_fill_(0, zeros, 0)), None, None, None, None


def gather(x: Tensor, index: Tensor, inverse: Tensor, pads: Tensor) -> Tensor:
    """`[N, D]` -> `[M, D]`: row m is x's row `index[m]`, zero at `pads`; `inverse` `[N]` is the place of each row of x."""
    return _Gather.apply(x, index, pads, inverse, None)


def scatter(y: Tensor, index: Tensor, inverse: Tensor, pads: Tensor) -> Tensor:
    """`[M, D]` -> `[N, D]`, the inverse of `gather`."""
    return _Gather.apply(y, inverse, None, index, pads)


@dataclass
class Span:
    """How N positions divide into K lanes: the first `sizes[0]` are lane 0's, and so on.

    Attributes:
        sizes: positions of each lane, K of them; a lane may have none.
        index: int64 `[K * L]`, position at each place of the lanes padded to the longest, L; None where all have L.
        inverse: int64 `[N]`, place of each position.
        pads: int64 `[P]`, places that hold no position.
    """

    sizes: tuple[int, ...]
    index: Tensor | None = None
    inverse: Tensor | None = None
    pads: Tensor | None = None

    @property
    def longest(self) -> int:
        """L, positions of the longest lane."""
        return max(self.sizes)

    def split(self, x: Tensor) -> Tensor:
        """`[N, D]` -> `[K, L, D]`, zero where a lane is shorter than L."""
        if self.index is not None:
            x = gather(x, self.index, self.inverse, self.pads)
        return x.reshape(len(self.sizes), self.longest, x.shape[-1])

    def join(self, y: Tensor) -> Tensor:
        """`[K, L, D]` -> `[N, D]`, the inverse of `split`."""
        y = y.reshape(-1, y.shape[-1])
        return y if self.index is None else scatter(y, self.index, self.inverse, self.pads)


@dataclass
class Group:
    """Rows of like length that one attention call takes, padded to the longest of them.

    Attributes:
        count, length: R rows of T positions.
        rows: int64 `[R]`, their numbers in the stream.
        real: bool `[R, T]`, False at pads; None where there are none.
    """

    count: int
    length: int
    rows: Tensor
    real: Tensor | None


@dataclass
class Groups:
    """All rows of a stream in groups laid end to end, M places.

    Attributes:
        groups: attention calls.
        index, inverse, pads: places and positions, as in `Span`; None where the stream itself is one group.
    """

    groups: list[Group]
    index: Tensor | None = None
    inverse: Tensor | None = None
    pads: Tensor | None = None

    def gather(self, x: Tensor) -> Tensor:
        """`[N, D]` -> `[M, D]`."""
        return x if self.index is None else gather(x, self.index, self.inverse, self.pads)

    def scatter(self, y: Tensor) -> Tensor:
        """`[M, D]` -> `[N, D]`."""
        return y if self.index is None else scatter(y, self.index, self.inverse, self.pads)


@dataclass
class Stream:
    """The rows of K lanes, end to end: N tokens of R rows, S scored positions.

    Attributes:
        ids: int64 `[N]`; at virtual tokens some id that is not looked at.
        positions: int64 `[N]`, place of each token in its row.
        tokens, rows, scored: how tokens, rows and scored positions divide into lanes.
        virtual: int64 `[R * V]`, positions of the virtual tokens, V in front of each row; None where there are none.
        at: int64 `[S]`, position whose next token is scored; for sequence classification None.
        first, last: int64 `[R]`, position of each row's first and last token.
        targets: int64 `[S]` token to score, or `[R]` class of each row.
        row_of: int64 `[S]`, on the CPU: row of each scored position, counted within its lane.
        attention: rows in groups of like length.
        lengths: tokens of each row, int64 `[R]`, NumPy.
        filled: tokens at the end that belong to no row and are counted to the last lane.
    """

    ids: Tensor
    positions: Tensor
    tokens: Span
    rows: Span
    scored: Span
    virtual: Tensor | None
    at: Tensor | None
    first: Tensor
    last: Tensor
    targets: Tensor
    row_of: np.ndarray
    attention: Groups
    lengths: np.ndarray
    filled: int


class _Shipment:
    """Many small index arrays, moved to a device in one copy."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, array: np.ndarray) -> int:
        self._parts.append(np.ascontiguousarray(array, dtype=np.int64).reshape(-1))
        return len(self._parts) - 1

    def deliver(self, device: torch.device) -> list[Tensor]:
        whole = torch.from_numpy(np.concatenate(self._parts))
        if device.type == "cuda":
            whole = whole.pin_memory().to(device, non_blocking=True)
        return list(whole.split([len(p) for p in self._parts]))


def stream(
    ids: np.ndarray,
    lengths: np.ndarray,
    lanes: Sequence[int],
    *,
    prompts: np.ndarray | None,
    targets: np.ndarray | None,
    virtual: int,
    offset: int,
    device: torch.device,
    round_up: bool = False,
) -> Stream:
    """Lay rows end to end.

    Args:
        ids: tokens of all rows, end to end, `[sum of lengths]`.
        lengths: tokens of each row, `[R]`; rows of lane 0 first.
        lanes: rows of each lane, K numbers.
        prompts: tokens of each row's prompt, `[R]`; the positions from its last on are scored. None: classes.
        targets: class of each row, `[R]`, where there are no prompts.
        virtual: virtual tokens in front of each row.
        offset: added to all positions; virtual keys and values of prefix tuning come before the first token.
        device: where the tables are needed.
        round_up: fill up to one of few numbers of tokens: some kernels are compiled anew for each number they meet.
    """
    full = np.asarray(lengths, dtype=np.int64) + virtual
    count, total = len(full), int(full.sum())
    ends = np.cumsum(full)
    starts = ends - full
    position = np.arange(total) - np.repeat(starts, full)
    lane_of = np.repeat(np.arange(len(lanes)), lanes)
    filled = _rounded(total) - total if round_up else 0
    ship = _Shipment()
    places = {}
    if virtual:
        front = position < virtual
        whole = np.zeros(total, dtype=np.int64)
        whole[~front] = ids
        places["virtual"] = ship.add(np.nonzero(front)[0])
    else:
        whole = ids.astype(np.int64, copy=False)
    fill = np.zeros(filled, dtype=np.int64)
    places |= {"ids": ship.add(np.concatenate([whole, fill]))}
    places |= {"positions": ship.add(np.concatenate([position, fill]) + offset)}
    places |= {"first": ship.add(starts), "last": ship.add(ends - 1)}
    if prompts is not None:
        text = position - virtual
        scored = (text >= np.repeat(np.asarray(prompts) - 1, full)) & (text < np.repeat(full - virtual - 1, full))
        at = np.nonzero(scored)[0]
        row = np.searchsorted(ends, at, side="right")
        places |= {"at": ship.add(at), "targets": ship.add(whole[at + 1])}
        scored_sizes = np.bincount(lane_of[row], minlength=len(lanes))
        row_of = row - (np.cumsum(lanes) - lanes)[lane_of[row]]
    else:
        places["targets"] = ship.add(targets)
        scored_sizes, row_of = np.asarray(lanes), np.arange(count) - np.repeat(np.cumsum(lanes) - lanes, lanes)
    token_sizes = np.bincount(lane_of, weights=full, minlength=len(lanes)).astype(np.int64)
    token_sizes[-1] += filled  # no loss depends on them, so what they add to a gradient is nothing
    spans = {
        "tokens": _span(token_sizes, ship),
        "rows": _span(np.asarray(lanes, dtype=np.int64), ship),
        "scored": _span(scored_sizes, ship),
    }
    if filled:
        usual = int(np.median(full))
        more = [usual] * (filled // usual) + ([filled % usual] if filled % usual else [])
        whole_rows = np.concatenate([full, more])
        groups = _groups(whole_rows, np.cumsum(whole_rows) - whole_rows, count, ship)
    else:
        groups = _groups(full, starts, count, ship)
    sent = ship.deliver(device)
    got = {name: sent[i] for name, i in places.items()}
    return Stream(
        ids=got["ids"],
        positions=got["positions"],
        **{name: span(sent) for name, span in spans.items()},
        virtual=got.get("virtual"),
        at=got.get("at"),
        first=got["first"],
        last=got["last"],
        targets=got["targets"],
        row_of=row_of,
        attention=groups(sent),
        lengths=full,
        filled=filled,
    )


def stream_of(tokens: Tokens, rows: Sequence[np.ndarray], **keys: int | torch.device) -> Stream:
    """The stream of these rows of a split, one array of row numbers a lane; for `keys` see `stream`."""
    every = np.concatenate(rows)
    lengths = tokens.lengths_of(every)
    starts = tokens.offsets.numpy()[every]
    ends = np.cumsum(lengths)
    index = np.arange(int(ends[-1])) + np.repeat(starts - ends + lengths, lengths)
    classes = tokens.is_classes
    return stream(
        tokens.ids.numpy()[index],
        lengths,
        [len(r) for r in rows],
        prompts=None if classes else tokens.prompts.numpy()[every],
        targets=tokens.labels.numpy()[every] if classes else None,
        **keys,
    )


class _Later:
    """A record whose tensors are still under way; called with what has arrived, it makes the record."""

    def __init__(self, make: Callable, *fixed: Any, **places: int) -> None:
        self.make, self.fixed, self.places = make, fixed, places

    def __call__(self, sent: list[Tensor]) -> Any:
        fixed = [[f(sent) for f in part] if isinstance(part, list) else part for part in self.fixed]
        return self.make(*fixed, **{name: sent[i] for name, i in self.places.items()})


def _span(sizes: np.ndarray, ship: _Shipment) -> _Later:
    fixed = tuple(int(s) for s in sizes)
    longest = int(sizes.max())
    if (sizes == longest).all():
        return _Later(Span, fixed)
    starts = np.cumsum(sizes) - sizes
    place = np.arange(longest)
    real = place < sizes[:, None]
    index = np.where(real, starts[:, None] + place, 0)
    real = real.reshape(-1)
    inverse, pads = ship.add(np.nonzero(real)[0]), ship.add(np.nonzero(~real)[0])
    return _Later(Span, fixed, index=ship.add(index), inverse=inverse, pads=pads)


def _rounded(total: int) -> int:
    """The next of 8 numbers between two powers of two, multiples of 8: a twentieth more tokens in the mean."""
    step = max(8, 1 << max(0, total.bit_length() - 4))
    return -(-total // step) * step


def _groups(lengths: np.ndarray, starts: np.ndarray, real_rows: int, ship: _Shipment) -> _Later:
    """Rows cut into groups of like length, the longest first; a cut is made where it saves more padding than it costs.

    Rows from `real_rows` on are there to fill up; to whom they belong makes no difference.
    """
    count = len(lengths)
    numbers = np.minimum(np.arange(count), real_rows - 1)
    if (lengths == lengths[0]).all():
        whole = functools.partial(Group, count, int(lengths[0]), real=None)
        return _Later(Groups, [_Later(whole, rows=ship.add(numbers))])
    order = np.argsort(-lengths, kind="stable")
    sizes = lengths[order]
    cuts, top = [0], int(sizes[0])
    for i in np.nonzero(np.diff(sizes))[0] + 1:
        if (top - int(sizes[i])) * (count - i) > _GROUP_COST:
            cuts.append(int(i))
            top = int(sizes[i])
    out, indices, reals = [], [], []
    for a, b in zip(cuts, [*cuts[1:], count], strict=True):
        rows, length = order[a:b], int(sizes[a])
        place, own = np.arange(length), lengths[rows][:, None]
        real = place < own
        indices.append((starts[rows][:, None] + np.minimum(place, own - 1)).reshape(-1))
        reals.append(real.reshape(-1))
        padded = {} if real.all() else {"real": ship.add(real)}
        out.append(_Later(functools.partial(_group, len(rows), length), rows=ship.add(numbers[rows]), **padded))
    index, real = np.concatenate(indices), np.concatenate(reals)
    where = np.nonzero(real)[0]
    inverse = np.empty(len(where), dtype=np.int64)
    inverse[index[where]] = where
    pads = ship.add(np.nonzero(~real)[0])
    return _Later(Groups, out, index=ship.add(index), inverse=ship.add(inverse), pads=pads)


def _group(count: int, length: int, rows: Tensor, real: Tensor | None = None) -> Group:
    return Group(count, length, rows, None if real is None else real.view(count, length).bool())
