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
        """A chunk of what the server sends (`flat`), as clients receive it."""
        views = chunk.views(flat[chunk.span].to(self.group.device))
        return self.group.worker.downlink.down(views) if self.group.algorithm.merges else views

    @functools.cached_property
    def params(self) -> Params:
        """Global parameters, `[...]`."""
        return self._sent(self.group.weights, self.chunk)

    @functools.cached_property
    def server(self) -> Params:
        """The server's state, `[...]`."""
        group = self.group
        if not group.algorithm.sends_state:
            return {}
        (whole,) = Layout.of(group.server).chunks()
        here = whole if len(group.chunks) == 1 else self.chunk
        return self._sent(group.server_flat, here)

    @functools.cached_property
    def state(self) -> Params:
        """Each client's own state, `[K, ...]`."""
        group = self.group
        template = group.algorithm.init(self.params)[1]
        if not template:
            return {}
        layout, begin, found = Layout.of(template), self.chunk.start, []
        for task in group.tasks:
            if task.read < 0:
                found.append(template)
                continue
            flat = group.store.read(task.read, begin, begin + layout.numel)
            found.append(layout.views(flat.to(next(iter(template.values())))))
        return {n: torch.stack([s[n] for s in found]) for n in template}


class View(ClientView):
    """A `ClientView` of some of a group's clients that costs nothing until it is looked at."""

    def __init__(self, received: Received, own: slice | list[int], steps: Sequence[int], lr_sum: Tensor) -> None:
        # `ClientView` is frozen.
        tasks = received.group.tasks
        self.__dict__.update(round=tasks[0].round, lr_sum=lr_sum, _received=received, _own=own, _steps=steps)

    @functools.cached_property
    def params(self) -> Params:
        return self._received.params

    @functools.cached_property
    def server(self) -> Params:
        return self._received.server

    @functools.cached_property
    def state(self) -> Params:
        return {n: t[self._own] for n, t in self._received.state.items()}

    @functools.cached_property
    def steps(self) -> Tensor:
        return torch.tensor(self._steps, device=self.lr_sum.device)
