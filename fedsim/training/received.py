"""What clients received and kept, read when an algorithm first looks at it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsim.algorithms import ClientView
from fedsim.core.params import Chunk, Layout, Params

if TYPE_CHECKING:
    from fedsim.training.lanes import LaneGroup


class Received:
    """A chunk of what a group's clients received and kept."""

    def __init__(self, group: LaneGroup, chunk: Chunk) -> None:
        self.group, self.chunk = group, chunk

    def _sent(self, flat: Tensor, chunk: Chunk) -> Params:
        """A chunk of what the server sends (`flat`), as clients receive it; what never travels is as it was at first."""
        run = self.group.run
        views = chunk.views(flat[chunk.span].to(self.group.device))
        if not run.algorithm.merges:
            return views
        return views | run.worker.downlink.down({n: t for n, t in views.items() if n not in run.setup.stays})

    @functools.cached_property
    def sent(self) -> Params:
        """Global parameters, `[...]`."""
        return self._sent(self.group.run.weights, self.chunk)

    @functools.cached_property
    def params(self) -> Params:
        """Global parameters, `[...]`, and the clients' own personal ones, `[K, ...]`."""
        group, out = self.group, dict(self.sent)
        for name, place in group.run.setup.record.personal_in(self.chunk):
            initial = self.sent[name]
            out[name] = torch.stack(
                [
                    initial if t.read < 0 else self._read(t.read, place, initial.numel(), initial).view(initial.shape)
                    for t in group.tasks
                ]
            )
        if group.slots is not None:
            out = {n: out[n] * has for n, has in self.chunk.views(group.slots[:, self.chunk.span]).items()}
        return out

    @functools.cached_property
    def server(self) -> Params:
        """The server's state, `[...]`."""
        run = self.group.run
        if not run.algorithm.sends_state:
            return {}
        (whole,) = Layout.of(run.server).chunks()
        return self._sent(run.server_flat, whole if len(run.setup.chunks) == 1 else self.chunk)

    @functools.cached_property
    def state(self) -> Params:
        """Each client's own state, `[K, ...]`."""
        group, algorithm = self.group, self.group.run.algorithm
        template = algorithm.part_state(algorithm.init(self.sent)[1], group.part)
        if not template:
            return {}
        layout, begin = Layout.of(template), group.run.setup.record.state_at(group.number) + self.chunk.start
        like = next(iter(template.values()))
        found = [
            template if t.read < 0 else layout.views(self._read(t.read, begin, layout.numel, like)) for t in group.tasks
        ]
        return {n: torch.stack([s[n] for s in found]) for n in template}

    def _read(self, record: int, start: int, size: int, like: Tensor) -> Tensor:
        return self.group.run.setup.store.read(record, start, start + size).to(like)


class View(ClientView):
    """A `ClientView` of some of a group's clients that costs nothing until it is looked at.

    Args:
        received: what all of them received.
        own: places of these clients among the group's.
        steps: done by each of them, K in number.
        lr_sum: `[K]`.
        batch: of the step.
    """

    def __init__(
        self, received: Received, own: slice | list[int], steps: Sequence[int], lr_sum: Tensor, batch: int = 0
    ) -> None:
        # `ClientView` is frozen.
        group = received.group
        facts = {n: t[own] for n, t in group.facts.items()}
        rank = None if group.ranks is None else group.ranks[own]
        about = {"round": group.tasks[0].round, "part": group.part, "batch": batch, "facts": facts, "rank": rank}
        about |= {"optim": group.optim}
        self.__dict__.update(about, lr_sum=lr_sum, _received=received, _own=own, _steps=steps)

    @functools.cached_property
    def params(self) -> Params:
        setup = self._received.group.run.setup
        by_lane = self._received.params if setup.ranked else setup.record.personal
        return {n: t[self._own] if n in by_lane else t for n, t in self._received.params.items()}

    @functools.cached_property
    def server(self) -> Params:
        return self._received.server

    @functools.cached_property
    def state(self) -> Params:
        return {n: t[self._own] for n, t in self._received.state.items()}

    @functools.cached_property
    def steps(self) -> Tensor:
        return torch.tensor(self._steps, device=self.lr_sum.device)
