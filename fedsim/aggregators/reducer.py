"""All groups of a message, each with its aggregator, in one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Size, Tensor

from fedsim.aggregators import AGGREGATORS
from fedsim.aggregators.base import Accumulator, Aggregator, Buffer
from fedsim.aggregators.stack import Stack
from fedsim.core.params import Chunk, Layout, Message, Params


class Group:
    """A message group: its aggregator, its layout, and where its buffers lie in the flat one, from `start` to `stop`."""

    def __init__(self, aggregator: Aggregator, layout: Layout, slots: int, start: int) -> None:
        self.aggregator, self.layout = aggregator, layout
        (self.everything,) = layout.chunks()
        self.places: dict[str, tuple[Buffer, int, int]] = {}
        for name, buffer in aggregator.buffers(slots).items():
            size = buffer.rows * (layout.numel if buffer.by_element else 1)
            self.places[name] = buffer, start, start + size
            start += size
        self.stop = start

    def views(self, flat: Tensor, span: slice) -> dict[str, Tensor]:
        """Its buffers at these elements of the group."""
        return {
            name: flat[a:b].view(buffer.rows, -1)[:, span] if buffer.by_element else flat[a:b]
            for name, (buffer, a, b) in self.places.items()
        }


def always(name: str) -> bool:
    """Every tensor travels."""
    return True


class Reducer:
    """How messages become one.

    Args:
        aggregates: message group -> aggregator, or its name.
        layouts: message group -> what a client sends in it.
        params: layout of the trained parameters.
        slots: how many clients can send a message in one round.

    Attributes:
        numel: elements of an accumulator's buffer.
        least: how many clients the aggregators need at least.
        metered: where the clients' factors are kept for the aggregation error; None = nowhere.
        blockwise: whether messages may be added and read chunk by chunk of the parameters: each group is laid out like these.
    """

    def __init__(
        self, aggregates: Mapping[str, str | Aggregator], layouts: Mapping[str, Layout], params: Layout, slots: int
    ) -> None:
        self.params, self.numel, self._slots = params, 0, slots
        self.metered: Group | None = None
        self.groups: dict[str, Group] = {}
        (self.everything,) = params.chunks()
        for name, how in aggregates.items():
            if isinstance(how, str):
                if how not in AGGREGATORS:
                    raise ValueError(f"aggregates: {how!r} of group {name!r} is none of {', '.join(AGGREGATORS)}")
                how = AGGREGATORS[how](params.nbytes)
            self.groups[name] = Group(how, layouts[name], slots, self.numel)
            self.numel = self.groups[name].stop
        self.least = max((int(getattr(g.aggregator, "least", 1)) for g in self.groups.values()), default=1)
        self.blockwise = all(g.layout.shapes == params.shapes and g.aggregator.blockwise for g in self.groups.values())

    def measure(self, factors: Layout) -> None:
        """Also keep the clients' factors of this layout, for the aggregation error."""
        self.metered = Group(Stack(), factors, self._slots, self.numel)
        self.numel = self.metered.stop

    def add_factors(self, into: Tensor, factors: Params, weights: Sequence[float], slots: Sequence[int]) -> None:
        """Keep K clients' factors, name -> `[K, ...]`, beside their messages; in place."""
        assert self.metered is not None, "factors are kept where they are measured"
        acc = self.metered.views(into, self.metered.everything.span)
        flat = torch.cat([factors[n].reshape(len(weights), -1) for n in self.metered.layout.shapes], dim=1)
        self.metered.aggregator.add(acc, flat.to(into), weights, slots)

    def factors(self, acc: Accumulator) -> tuple[Params, Tensor] | None:
        """The clients' factors, name -> `[K, ...]`, and their shares of the weight; None where they are not kept."""
        if self.metered is None:
            return None
        acc_of = self.metered.views(acc.total, self.metered.everything.span)
        held = self.metered.everything.views(self.metered.aggregator.result(acc_of, acc.weight))
        weights = acc_of["weights"][acc_of["sent"] > 0]
        return held, weights / weights.sum()

    def zero(self, total: Tensor, spare: Tensor | None = None) -> Accumulator:
        """An empty accumulator in these buffers, `[numel]`, which are cleared."""
        for buffer in (total, spare):
            if buffer is not None:
                buffer.zero_()
        return Accumulator(total, spare)

    def add(
        self,
        into: Tensor,
        message: Message,
        weights: Sequence[float],
        slots: Sequence[int],
        chunk: Chunk | None = None,
        travels: Callable[[str], bool] = always,
        partly: bool = False,
    ) -> None:
        """Add the messages of K clients to a flat buffer on any device; in place.

        Args:
            into: `[numel]`.
            message: group -> name -> `[K, ...]`, of the chunk.
            weights: of each client.
            slots: each client's number in the round.
            chunk: of the parameters; None = all.
            travels: which tensors are sent in this round.
            partly: the other groups of the message come by themselves.

        Raises:
            ValueError: if the message has other groups, names or shapes than were announced.
        """
        if not (message.keys() <= self.groups.keys() if partly else message.keys() == self.groups.keys()):
            raise ValueError(f"a message holds {sorted(message)}, but the algorithm aggregates {sorted(self.groups)}")
        for name, tensors in message.items():
            group = self.groups[name]
            here = self.chunk_of(group, chunk)
            sent = {n for n in here.shapes if travels(n)}
            if tensors.keys() != sent:
                odd = sorted(tensors.keys() ^ sent)
                raise ValueError(f"message group {name!r}: {', '.join(odd[:3])} is either missing or unknown")
            acc, at = group.views(into, here.span), 0
            for tensor, shape in here.shapes.items():
                if tensor not in sent:
                    at += Size(shape).numel()
                    continue
                values = tensors[tensor]
                if tuple(values.shape) != (len(weights), *shape):
                    raise ValueError(
                        f"message group {name!r}: {tensor} has shape {tuple(values.shape)}, expected {(len(weights), *shape)}"
                    )
                values = values.reshape(len(weights), -1).to(into.device)
                stop = at + values.shape[1]
                part = {b: v[:, at:stop] if group.places[b][0].by_element else v for b, v in acc.items()}
                group.aggregator.add(part, values, weights, slots)
                at = stop

    def merge(self, into: Accumulator, other: Accumulator) -> None:
        """Add what another accumulator holds, which may lie on another device; in place."""
        into.total.add_(other.total.to(into.total.device))
        into.weight += other.weight
        into.clients += other.clients

    def perturb(self, acc: Accumulator, noise: Callable[[str, str, tuple[int, ...]], np.ndarray]) -> None:
        """Add noise to the sums of all tensors, in place: `noise(group, name, shape)`.

        Raises:
            ValueError: if an aggregator keeps more than one sum.
        """
        for name, group in self.groups.items():
            views = group.views(acc.total, group.everything.span)
            if views.keys() != {"sum"}:
                raise ValueError(f"message group {name!r}: {type(group.aggregator).__name__} is no sum")
            for tensor, view in group.everything.views(views["sum"][0]).items():
                view.add_(torch.from_numpy(noise(name, tensor, tuple(view.shape))).to(view))

    def shares(self, acc: Accumulator) -> Tensor | None:
        """Each client's share of the weight, in the order of a stack; None where no group is stacked."""
        for group in self.groups.values():
            if isinstance(group.aggregator, Stack):
                views = group.views(acc.total, group.everything.span)
                weights = views["weights"][views["sent"] > 0]
                return weights / weights.sum()
        return None

    def result(self, acc: Accumulator, chunk: Chunk | None = None, travels: Callable[[str], bool] = always) -> Message:
        """Group -> name -> tensor, of a chunk of the parameters or of all; those that were sent.

        Raises:
            ZeroDivisionError: if nothing, or only weight zero, was added.
        """
        if acc.weight == 0:
            raise ZeroDivisionError("the mean of no updates, or of updates whose weights are all zero")
        out: Message = {}
        for name, group in self.groups.items():
            here = self.chunk_of(group, chunk)
            found = here.views(group.aggregator.result(group.views(acc.total, here.span), acc.weight))
            out[name] = {n: t for n, t in found.items() if travels(n)}
        return out

    def chunk_of(self, group: Group, chunk: Chunk | None) -> Chunk:
        """A group's elements of a chunk of the parameters: all, where messages have to be whole."""
        if chunk is None or chunk.shapes == self.everything.shapes:
            return group.everything
        assert self.blockwise, "messages that have to be whole come in one chunk"
        return chunk
