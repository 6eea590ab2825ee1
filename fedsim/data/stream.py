"""Examples of K lanes laid end to end in one stream of tokens, with the index tables that a model needs to work on it.

Nothing is padded: linear layers, norms and activations see `[1, N, D]`, N tokens of all examples of all lanes. Where lanes or
examples must be told apart - the K stacked weights of an adapter, attention - a `Span` or a `Group` gathers what belongs
together, and puts it back.
"""

from __future__ import annotations

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
    """Examples of like length that one attention call takes, padded to the longest of them.

    Attributes:
        count, length: R examples of T positions.
        rows: int64 `[R]`, their numbers in the stream.
        real: bool `[R, T]`, False at pads; None where there are none.
    """

    count: int
    length: int
    rows: Tensor
    real: Tensor | None


@dataclass
class Groups:
    """All examples of a stream in groups laid end to end, M places.

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
    """The examples of K lanes, end to end: N tokens of R examples, S scored positions.

    Attributes:
        ids: int64 `[N]`; at virtual tokens some id that is not looked at.
        positions: int64 `[N]`, place of each token in its example.
        tokens, rows, scored: how tokens, examples and scored positions divide into lanes.
        virtual: int64 `[R * V]`, positions of the virtual tokens, V in front of each example; None where there are none.
        at: int64 `[S]`, position whose next token is scored; for sequence classification None.
        first, last: int64 `[R]`, position of each example's first and last token.
        targets: int64 `[S]` token to score, or `[R]` class of each example.
        row_of: int64 `[S]`, on the CPU: example of each scored position, counted within its lane.
        attention: examples in groups of like length.
        lengths: tokens of each example, int64 `[R]`, NumPy.
        filled: tokens at the end that belong to no example and are counted to the last lane.
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


def _sent(record: Any, device: torch.device) -> Any:
    """A record, and the records in it, whose index arrays have become tensors on a device: all moved in one copy."""
    parts: list[np.ndarray] = []
    _each_array(record, lambda a: parts.append(np.ascontiguousarray(a, dtype=np.int64).reshape(-1)))
    whole = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    tensors = iter(whole.split([len(p) for p in parts]))
    # Masks travel as numbers, too.
    return _each_array(record, lambda a: next(tensors).view(a.shape).to(torch.bool if a.dtype == bool else torch.int64))


def _each_array(value: Any, put: Callable[[np.ndarray], Any]) -> Any:
    if isinstance(value, np.ndarray):
        return put(value)
    if isinstance(value, list):
        return [_each_array(v, put) for v in value]
    if isinstance(value, (Span, Group, Groups, Stream)):
        return type(value)(**{name: _each_array(v, put) for name, v in vars(value).items()})
    return value


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
    """Lay examples end to end.

    Args:
        ids: tokens of all examples, end to end, `[sum of lengths]`.
        lengths: tokens of each example, `[R]`; examples of lane 0 first.
        lanes: examples of each lane, K numbers.
        prompts: tokens of each example's prompt, `[R]`; the positions from its last on are scored. None: classes.
        targets: class of each example, `[R]`, where there are no prompts.
        virtual: virtual tokens in front of each example.
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
    fill = np.zeros(filled, dtype=np.int64)
    front = position < virtual
    whole = np.zeros(total, dtype=np.int64)
    whole[~front] = ids
    before = np.cumsum(lanes) - lanes  # examples in earlier lanes
    if prompts is not None:
        text = position - virtual
        scored = (text >= np.repeat(np.asarray(prompts) - 1, full)) & (text < np.repeat(full - virtual - 1, full))
        at = np.nonzero(scored)[0]
        row = np.searchsorted(ends, at, side="right")
        targets = whole[at + 1]
        scored_sizes, row_of = np.bincount(lane_of[row], minlength=len(lanes)), row - before[lane_of[row]]
    else:
        at, targets, scored_sizes = None, np.asarray(targets), np.asarray(lanes)
        row_of = np.arange(count) - np.repeat(before, lanes)
    token_sizes = np.bincount(lane_of, weights=full, minlength=len(lanes)).astype(np.int64)
    token_sizes[-1] += filled  # no loss depends on them, so what they add to a gradient is nothing
    usual = int(np.median(full))
    more = [usual] * (filled // usual) + ([filled % usual] if filled % usual else [])
    made = _sent(
        Stream(
            ids=np.concatenate([whole, fill]),
            positions=np.concatenate([position, fill]) + offset,
            tokens=_span(token_sizes),
            rows=_span(np.asarray(lanes, dtype=np.int64)),
            scored=_span(scored_sizes),
            virtual=np.nonzero(front)[0] if virtual else None,
            at=at,
            first=starts,
            last=ends - 1,
            targets=targets,
            row_of=None,
            attention=_groups(np.concatenate([full, np.array(more, dtype=np.int64)]), count),
            lengths=None,
            filled=filled,
        ),
        device,
    )
    made.row_of, made.lengths = row_of, full
    return made


def stream_of(tokens: Tokens, rows: Sequence[np.ndarray], **keys: int | torch.device) -> Stream:
    """The stream of these examples of a split, one array of example numbers a lane; for `keys` see `stream`."""
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


def _span(sizes: np.ndarray) -> Span:
    fixed = tuple(int(s) for s in sizes)
    longest = int(sizes.max())
    if (sizes == longest).all():
        return Span(fixed)
    starts = np.cumsum(sizes) - sizes
    place = np.arange(longest)
    real = place < sizes[:, None]
    index = np.where(real, starts[:, None] + place, 0).reshape(-1)
    real = real.reshape(-1)
    return Span(fixed, index, np.nonzero(real)[0], np.nonzero(~real)[0])


def _rounded(total: int) -> int:
    """The next of 8 numbers between two powers of two, multiples of 8: a twentieth more tokens in the mean."""
    step = max(8, 1 << max(0, total.bit_length() - 4))
    return -(-total // step) * step


def _groups(lengths: np.ndarray, real_rows: int) -> Groups:
    """Examples cut into groups of like length, the longest first; a cut is made where it saves more padding than it costs.

    Examples from `real_rows` on are there to fill up; to whom they belong makes no difference.
    """
    count, starts = len(lengths), np.cumsum(lengths) - lengths
    numbers = np.minimum(np.arange(count), real_rows - 1)
    if (lengths == lengths[0]).all():
        return Groups([Group(count, int(lengths[0]), numbers, None)])
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
        out.append(Group(b - a, length, numbers[rows], None if real.all() else real))
    index, real = np.concatenate(indices), np.concatenate(reals)
    where = np.nonzero(real)[0]
    inverse = np.empty(len(where), dtype=np.int64)
    inverse[index[where]] = where
    return Groups(out, index, inverse, np.nonzero(~real)[0])
