"""APFL: Y. Deng, M. M. Kamani, M. Mahdavi. Adaptive Personalized Federated Learning. 2020 (arXiv:2003.13461), algorithm 1.
Beside FedAvg's w each client trains a v of its own, and its model is the mix m = alpha v + (1 - alpha) w. For each batch

    v -= eta alpha grad f(m),  alpha -= eta <v - w, grad f(m)>,  w -= eta grad f(w)

with the v, w and alpha from before the step; alpha stays in [0, 1]. w alone is averaged.

Deviations:
- v and alpha step by the plain gradient at the rate of the step; w by local.optimizer.
- The loss that is logged is the mean of those of m and w.
- v begins as the global model that the client receives when it first takes part.

Peers: PFLlib trains v on its own loss and overwrites it with the mix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsim.algorithms.base import Algorithm, ClientView, per_lane

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.params import Message, Params


@dataclass(frozen=True, kw_only=True)
class APFL(Algorithm):
    """A mix of a global model and one's own (Deng et al., 2020)."""

    blockwise: ClassVar[bool] = False  # alpha's gradient is over all parameters
    batches: ClassVar[int] = 2
    same_batch: ClassVar[bool] = True

    alpha: float = 0.5
    """Share of the client's own v in the mix, at the start."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: {self.alpha} is not in [0, 1]")

    def init(self, params: Params) -> tuple[Params, Params]:
        """v_k, alpha_k, and the mix, which is the client's own model."""
        some = next(iter(params.values()))
        v = {f"v/{n}": p for n, p in params.items()}
        return {}, {**v, "alpha": some.new_full((1,), self.alpha), **{f"own/{n}": p for n, p in params.items()}}

    def scratch(self, c: ClientView) -> Params:
        """v, alpha `[K]`, the gradient at the mix and alpha's own gradient `[K]`."""
        out = {n: c.state[n].clone() for n in c.state if n.startswith("v/")}
        out |= {f"g/{n}": c.state[f"v/{n}"].new_zeros(c.state[f"v/{n}"].shape) for n in c.params}
        alpha = c.state["alpha"][:, 0].clone()
        return {**out, "alpha": alpha, "slope": alpha.new_zeros(alpha.shape)}

    def at(self, params: Params, scratch: Params, c: ClientView) -> Params:
        """The mix, then w."""
        return {n: self._mix(scratch, n, p) for n, p in params.items()} if c.batch == 0 else params

    @staticmethod
    def _mix(scratch: Params, name: str, w: Tensor) -> Tensor:
        """alpha v + (1 - alpha) w."""
        alpha = per_lane(scratch["alpha"], w)
        return alpha * scratch[f"v/{name}"] + (1 - alpha) * w

    def adjust(self, grads: Params, params: Params, scratch: Params, c: ClientView) -> None:
        """Keep the gradient at the mix; the optimizer steps by that at w."""
        if c.batch == 0:
            scratch["slope"].zero_()
            for name, grad in grads.items():
                scratch[f"g/{name}"].copy_(grad)
                away = scratch[f"v/{name}"] - params[name]
                scratch["slope"].add_((away * grad).reshape(len(grad), -1).sum(dim=1))

    def after_step(self, params: Params, scratch: Params, c: ClientView, lr: Tensor) -> None:
        """v -= eta alpha g, alpha -= eta slope, in [0, 1]."""
        for name in params:
            v = scratch[f"v/{name}"]
            v.sub_(per_lane(lr * scratch["alpha"], v) * scratch[f"g/{name}"])
        scratch["alpha"].sub_(lr * scratch["slope"]).clamp_(0, 1)

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """w_k - x; v_k, alpha_k and their mix."""
        own = {f"own/{n}": self._mix(scratch, n, p) for n, p in params.items()}
        v = {n: t for n, t in scratch.items() if n.startswith("v/")}
        return super().finish(params, scratch, c)[0], {**v, "alpha": scratch["alpha"][:, None], **own}
