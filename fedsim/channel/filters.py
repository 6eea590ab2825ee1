"""NVFlare's privacy filters: they change what a client sends, and guarantee nothing that an epsilon could be named for.

`nvflare.app_common.filters` (NVIDIA FLARE 2.9): ExcludeVars, PercentilePrivacy (R. Shokri, V. Shmatikov, Privacy-Preserving Deep
Learning, CCS 2015) and SVTPrivacy (W. Li et al., Privacy-Preserving Federated Brain Tumour Segmentation, MLMI 2019). All act on the
update divided by the client's optimizer steps, and multiply by these again.

Why none of them is a guarantee: the percentile's cut-off is the client's own, and nothing is random; the sparse vector's budget is
for one number of one round, and grows with the numbers that are sent, thousands of them in each round.

Deviation: of the numbers that the sparse vector accepts and does not choose, NVFlare sends the exact values. Here they are 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.channel.base import Senders, Stage
from fedsim.core.params import Message, Params
from fedsim.core.seeding import stream


@dataclass(frozen=True)
class Percentile:
    """Zero what is nearer to zero than a percentile of all magnitudes of the update, and clip the rest to +-gamma."""

    percentile: float
    gamma: float

    def apply(self, flat: Tensor) -> Tensor:
        """`[K, N]` -> `[K, N]`, client by client."""
        ordered = flat.abs().sort(dim=1).values
        at = (flat.shape[1] - 1) * self.percentile / 100
        low = int(at)
        cutoff = torch.lerp(ordered[:, low], ordered[:, min(low + 1, flat.shape[1] - 1)], at - low)[:, None]
        return torch.where(flat.abs() < cutoff, 0.0, flat).clamp(-self.gamma, self.gamma)


@dataclass(frozen=True)
class SparseVector:
    """Choose a fraction of the numbers by noisy comparisons with a noisy threshold, and send these with noise, clipped to +-gamma."""

    fraction: float
    epsilon: float
    noise_var: float
    gamma: float
    tau: float
    replace: bool

    def apply(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`[N]` -> `[N]`, of one client."""
        if not np.isfinite(values).all():  # `faults` sees it; no comparison would ever end
            return values
        count = int(min(np.ceil(len(values) * self.fraction), len(values)))
        threshold = self.tau + rng.laplace(scale=self.gamma * 2 / self.epsilon)
        spread = self.gamma * 4 * count / (self.epsilon * (2 * count) ** (2 / 3))
        clipped = np.abs(np.clip(values, -self.gamma, self.gamma))
        accepted, left = np.empty(0, dtype=np.int64), np.arange(len(values))
        while len(accepted) < count:
            above = clipped[left] + rng.laplace(scale=spread, size=len(left)) >= threshold
            accepted, left = np.concatenate([accepted, left[above]]), left[~above]
        chosen = rng.choice(accepted, count, replace=self.replace)
        out = np.zeros_like(values)
        noise = rng.laplace(scale=self.gamma * 2 / self.noise_var, size=count)
        out[chosen] = np.clip(values[chosen] + noise, -self.gamma, self.gamma)
        return out


@dataclass(frozen=True)
class Filters(Stage):
    """The filters of a run on the group `update`, in this order; a message has to be whole.

    Attributes:
        exclude: names of parameters that are not sent, or a regular expression that is searched for in them; None = all are sent.
        percentile, sparse_vector: see there; None = not used.
        seed: of the experiment, for the stream `sparse vector` by client and round.
    """

    exclude: tuple[str, ...] | str | None
    percentile: Percentile | None
    sparse_vector: SparseVector | None
    seed: int

    def excludes(self, name: str) -> bool:
        """Whether a parameter is not sent: the server sees no change of it."""
        if isinstance(self.exclude, str):
            return re.search(self.exclude, name) is not None
        return name in (self.exclude or ())

    def up(self, message: Message, c: Senders, state: Message) -> tuple[Message, Message]:
        """Filter each client's update."""
        update = message.get("update", {})
        kept = {n: u for n, u in update.items() if not self.excludes(n)}
        kept = self._changed(kept, c) if kept and (self.percentile or self.sparse_vector) else kept
        return {**message, "update": {n: kept.get(n, torch.zeros_like(u)) for n, u in update.items()}}, state

    def _changed(self, update: Params, c: Senders) -> Params:
        names = sorted(update)
        first = update[names[0]]
        steps = torch.tensor([max(1, n) for n in c.steps], dtype=first.dtype, device=first.device)[:, None]
        flat = torch.cat([update[n].reshape(len(first), -1) for n in names], dim=1) / steps
        if self.percentile is not None:
            flat = self.percentile.apply(flat)
        if self.sparse_vector is not None:
            rows = flat.double().cpu().numpy()
            made = [
                self.sparse_vector.apply(row, stream(self.seed, "sparse vector", *names_of))
                for row, names_of in zip(rows, c.streams, strict=True)
            ]
            flat = torch.from_numpy(np.stack(made)).to(flat)
        parts = (flat * steps).split([update[n][0].numel() for n in names], dim=1)
        made_of = {n: part.reshape(update[n].shape) for n, part in zip(names, parts, strict=True)}
        return {n: made_of[n] if update[n].dim() > 1 else update[n] for n in names}  # single numbers stay as they are
