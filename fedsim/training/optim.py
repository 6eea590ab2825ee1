"""The optimizer of a client over one flat vector of parameters: torch's own, with a schedule and state that can be kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

_AT_ONCE_CPU = 1 << 19  # elements: what a rule makes on the way to a step stays in the cache, and needs little memory


@dataclass(frozen=True)
class Optim:
    """Hyperparameters; see the keys of the same names under `local`."""

    optimizer: str
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    momentum: float
    clip: float | None
    schedule: str
    warmup: int
    min_lr: float

    @property
    def num_moments(self) -> int:
        """Vectors of state beside the parameters: 2 for AdamW, 1 for SGD with momentum, else 0."""
        return 2 if self.optimizer == "adamw" else int(self.momentum > 0)

    def lr_at(self, step: int, horizon: int) -> float:
        """Learning rate of a step, counted from 0; as in transformers, but never below `min_lr` and flat after the horizon.

        Linear from 0 over `warmup` steps; then lr (constant), min_lr + (lr - min_lr) (1 - p) (linear) or
        min_lr + (lr - min_lr) (1 + cos(pi p)) / 2 (cosine), with p = (step - warmup) / (horizon - warmup), at most 1.
        """
        if step < self.warmup:
            return self.lr * step / self.warmup
        if self.schedule == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup) / max(1, horizon - self.warmup))
        left = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr + (self.lr - self.min_lr) * left


Kept = Callable[[int, int], Tensor]
"""(start, stop) -> that stretch of a client's kept moments, which lie end to end, `[num_moments * N]` in all."""


class FlatOptimizer:
    """torch's AdamW or SGD on one vector that holds all trained parameters: elementwise rules do not see the difference.

    The vector is handed to torch in pieces: what its rules make on the way is then no larger than a piece.

    Args:
        optim: hyperparameters.
        flat: the parameters, `[1, N]`; updated in place.
        grad: their gradient, `[1, N]`; filled by the backward pass.
        piece: elements of a piece at most; None = all in one. On the CPU they are smaller in any case.
        sizes: elements of each parameter, where parameters have step counts of their own; None = they all step alike.
    """

    def __init__(
        self, optim: Optim, flat: Tensor, grad: Tensor, piece: int | None = None, sizes: Sequence[int] | None = None
    ) -> None:
        self.optim, self.grad = optim, grad[0]
        flat, size = flat[0], piece or flat.shape[1]
        if flat.device.type == "cpu":
            size = min(size, _AT_ONCE_CPU)
        self.moments = [torch.zeros_like(flat) for _ in range(optim.num_moments)]
        ends = np.cumsum([0, *(sizes or [len(flat)])]).tolist()
        self.places = [  # parameter, start, stop
            (i, a, min(a + size, end)) for i, (start, end) in enumerate(pairwise(ends)) for a in range(start, end, size)
        ]
        self.pieces = [nn.Parameter(flat[a:b], requires_grad=True) for _, a, b in self.places]
        # The fused kernels round scalars to float32, which would be the largest error of a float64 run.
        fused = flat.device.type == "cuda" and flat.dtype != torch.float64
        # On a GPU unfused rules would take all pieces at once, and make temporaries of all of them.
        how = {"fused": True} if fused else {"foreach": False}
        if optim.optimizer == "adamw":
            self.torch: torch.optim.Optimizer = torch.optim.AdamW(
                self.pieces, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, **how
            )
        else:
            self.torch = torch.optim.SGD(
                self.pieces, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, **how
            )
        self.steps = np.zeros((1, len(ends) - 1), dtype=np.int64)

    def reset(self, lane: int, steps: int | np.ndarray, moments: Kept | None, fresh: np.ndarray | None = None) -> None:
        """Begin a client's round: fresh, or with the moments of its steps so far.

        Args:
            lane: 0.
            steps: optimizer steps behind these moments, of all parameters or of each `[P]`; AdamW's bias correction needs them.
            moments: reads the kept moments; None = a fresh start.
            fresh: which parameters start afresh even so, bool `[P]`.
        """
        self.steps[0] = 0 if moments is None else steps
        if fresh is not None:
            self.steps[0][fresh] = 0
        for i, moment in enumerate(self.moments):
            start = i * len(moment)
            for at, a, b in self.places:
                if moments is None or (fresh is not None and fresh[at]):
                    moment[a:b].zero_()
                else:
                    moment[a:b].copy_(moments(start + a, start + b))
        for parameter, (at, a, b) in zip(self.pieces, self.places, strict=True):
            state = self.torch.state[parameter]
            state.clear()
            if self.optim.optimizer == "adamw":
                step = torch.tensor(float(self.steps[0, at]), dtype=torch.float32, device=parameter.device)
                state.update(step=step, exp_avg=self.moments[0][a:b], exp_avg_sq=self.moments[1][a:b])
            elif self.moments:
                state.update(momentum_buffer=self.moments[0][a:b])

    def kept(self, lane: int) -> list[Tensor]:
        """The moments, each `[N]`."""
        return self.moments

    def step(self, rates: list[float], trains: np.ndarray | None = None) -> None:
        """Clip the gradient to the norm limit and take one step with this one learning rate.

        Args:
            rates: the learning rate.
            trains: which parameters do, bool `[1, P]`; None = all. The others keep their values and their moments.
        """
        (lr,) = rates
        for parameter, (at, a, b) in zip(self.pieces, self.places, strict=True):
            parameter.grad = self.grad[a:b]
            if trains is not None and not trains[0, at]:
                parameter.grad.zero_()
                parameter.grad = None
        if self.optim.clip is not None:
            norm = torch.linalg.vector_norm(self.grad)
            self.grad.mul_((self.optim.clip / (norm + 1e-6)).clamp_(max=1.0))  # as torch's clip_grad_norm_
        self.torch.param_groups[0]["lr"] = lr
        self.torch.step()
        self.steps += 1 if trains is None else trains


class LaneOptimizer:
    """AdamW or SGD on K vectors at once, each with its own rate, step counts, norm limit and moments.

    The rules are elementwise, so K rows of one tensor take a step as K optimizers would; torch's own take one rate for a
    tensor, and a loop over K of them is most of a small model's time. AdamW: Loshchilov and Hutter, ICLR 2019, algorithm
    2, in the order of operations of torch.optim.

    Args:
        optim: hyperparameters.
        flat: the parameters, `[K, N]`; updated in place.
        grad: their gradients, `[K, N]`.
        sizes: elements of each parameter, P in number.
    """

    def __init__(self, optim: Optim, flat: Tensor, grad: Tensor, sizes: Sequence[int] | None = None) -> None:
        self.optim, self.flat, self.grad = optim, flat, grad
        self.moments = [torch.zeros_like(flat) for _ in range(optim.num_moments)]
        self.ends = np.cumsum([0, *(sizes or [flat.shape[1]])]).tolist()
        self.steps = np.zeros((len(flat), len(self.ends) - 1), dtype=np.int64)

    def reset(self, lane: int, steps: int | np.ndarray, moments: Kept | None, fresh: np.ndarray | None = None) -> None:
        """Begin a client's round in a lane; see `FlatOptimizer.reset`."""
        size = self.flat.shape[1]
        self.steps[lane] = 0 if moments is None else steps
        for i, moment in enumerate(self.moments):
            if moments is None:
                moment[lane].zero_()
            else:
                moment[lane].copy_(moments(i * size, (i + 1) * size))
        for at in () if fresh is None else np.flatnonzero(fresh):
            self.steps[lane, at] = 0
            for moment in self.moments:
                moment[lane, self.ends[at] : self.ends[at + 1]].zero_()

    def kept(self, lane: int) -> list[Tensor]:
        """A lane's moments, each `[N]`."""
        return [m[lane] for m in self.moments]

    def step(self, rates: list[float], trains: np.ndarray | None = None) -> None:
        """Clip and step the first `len(rates)` lanes, each with its own learning rate; the others keep every bit.

        Args:
            rates: learning rate of each lane.
            trains: which parameters do, bool `[K, P]`; None = all. The others keep their values and their moments.
        """
        k, g = len(rates), self.grad[: len(rates)]
        if trains is not None:
            for lanes, places, _ in self._alike(~trains):
                g[lanes, places] = 0.0
        if self.optim.clip is not None:
            norms = torch.linalg.vector_norm(g, dim=1, keepdim=True)
            g.mul_((self.optim.clip / (norms + 1e-6)).clamp_(max=1.0))
        every = np.ones_like(self.steps[:k], dtype=bool) if trains is None else trains
        for lanes, places, counts in self._alike(every):
            self._step(lanes, places, rates[lanes], counts)
        self.steps[:k] += every

    def _alike(self, chosen: np.ndarray) -> Iterator[tuple[slice, slice, list[int]]]:
        """Rectangles of lanes and elements that are chosen (bool `[K, P]`) and whose parameters have the same step counts, by lane."""
        counts = np.where(chosen, self.steps[: len(chosen)], -1)
        cuts = np.flatnonzero((counts[:, 1:] != counts[:, :-1]).any(axis=0)) + 1
        for a, b in pairwise([0, *cuts.tolist(), counts.shape[1]]):
            lanes = np.flatnonzero(chosen[:, a])
            for run in np.split(lanes, np.flatnonzero(np.diff(lanes) != 1) + 1) if len(lanes) else ():
                here = slice(int(run[0]), int(run[-1]) + 1)
                yield here, slice(self.ends[a], self.ends[b]), counts[here, a].tolist()

    def _step(self, lanes: slice, places: slice, rates: list[float], counts: list[int]) -> None:
        """One step of a rectangle, after so many steps of each lane."""
        o = self.optim
        p, g = self.flat[lanes, places], self.grad[lanes, places]
        lr = self._column(rates)
        if o.optimizer == "adamw":
            (b1, b2), (m, v) = o.betas, (x[lanes, places] for x in self.moments)
            counts = [n + 1 for n in counts]
            p.mul_(1 - lr * o.weight_decay)
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            root = v.sqrt().div_(self._column([math.sqrt(1 - b2**t) for t in counts])).add_(o.eps)
            p.sub_(m.div(root).mul_(self._column([r / (1 - b1**t) for r, t in zip(rates, counts, strict=True)])))
        else:
            if o.weight_decay:
                g.add_(p, alpha=o.weight_decay)
            if self.moments:
                m = self.moments[0][lanes, places]
                m.mul_(o.momentum).add_(g)  # from zero, so that the first step's is the gradient, as torch's
                g = m
            p.sub_(g * lr)

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=self.flat.dtype, device=self.flat.device)[:, None]
