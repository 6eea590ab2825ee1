"""Clients whose training goes wrong: which updates count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from fedsim.core.params import ALIGN, Params
from fedsim.core.types import Fault, Task


def judge(
    tasks: Sequence[Task], losses: Sequence[float], norms: Sequence[float], policy: str, most: float | None
) -> tuple[list[int], list[Fault]]:
    """Which clients count, as places in `tasks`, and what went wrong.

    Args:
        tasks: of each client.
        losses: training loss.
        norms: 2-norm of what it sends; where there is no limit, of its parameters, which tells as well whether they are finite.
        policy: fail | skip | clip.
        most: largest norm, or None.
    """
    good, faults = [], []
    for i, (task, loss, norm) in enumerate(zip(tasks, losses, norms, strict=True)):
        of = "loss" if not math.isfinite(loss) else "update" if not math.isfinite(norm) else "norm"
        clips = of == "norm" and policy == "clip"
        wrong = of != "norm" or (most is not None and norm > most)
        if wrong:
            action = "failed" if policy == "fail" else "clipped" if clips else "skipped"
            faults.append(Fault(task.client, task.name, action, of, loss if of == "loss" else norm))
        if not wrong or clips:
            good.append(i)
    return good, faults


def norms(pieces: Iterable[Params], clients: int) -> list[float]:
    """2-norms over pieces of the clients' updates, each name -> `[K, ...]`.

    Squares are summed in blocks of `ALIGN` elements of a tensor and the blocks exactly, so a norm does not depend on how the
    parameters are cut into pieces.
    """
    squares: list[list[float]] = [[] for _ in range(clients)]
    for piece in pieces:
        for update in piece.values():
            for found, x in zip(squares, update, strict=True):
                found += _block_sums(x)
    return [math.sqrt(math.fsum(s)) for s in squares]


def _block_sums(x: Tensor) -> list[float]:
    """Sums of squares of each block of `ALIGN` elements."""
    flat = x.double().reshape(-1).square()
    full = flat.numel() // ALIGN * ALIGN
    return [*flat[:full].view(-1, ALIGN).sum(dim=1).tolist(), float(flat[full:].sum())]
