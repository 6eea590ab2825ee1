"""FedPer: M. G. Arivazhagan, V. Aggarwal, A. K. Singh, S. Choudhary. Federated Learning with Personalization Layers. 2019
(arXiv:1912.00818), algorithm 1. Some parameters are private: each client keeps its own, and the rest is averaged.

FedRep: L. Collins, H. Hassani, A. Mokhtari, S. Shakkottai. Exploiting Shared Representations for Personalized Federated Learning.
ICML 2021 (arXiv:2102.07078), algorithm 1. In each round a client first trains its private parameters for some steps, then the shared
ones.

Deviations:
- What is private is chosen by name: by default the head of a model and, for LoRA, every B; FedPer with LoRA on a language model is then
  FedSA-LoRA.
- FedRep's head steps come in addition to local.steps or local.epochs, on batches of their own, at the rate of the round's first
  step.

Peers: PFLlib trains FedRep's head by epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.algorithms.base import Algorithm
from fedsim.algorithms.factors import is_b, is_head, matches


@dataclass(frozen=True, kw_only=True)
class FedPer(Algorithm):
    """Private parameters beside averaged ones (Arivazhagan et al., 2019)."""

    private: list[str] | None = None
    """Parts of the names of the private parameters, in which * stands for anything; null = the head, and for LoRA also every B."""

    def is_private(self, name: str) -> bool:
        """Whether a parameter stays with its client."""
        return is_head(name) or is_b(name) if self.private is None else matches(name, self.private)

    def check_names(self, names: tuple[str, ...]) -> None:
        """Something has to be private, and something shared."""
        held = sum(map(self.is_private, names))
        if held in (0, len(names)):
            kind = "none" if held == 0 else "each"
            raise ValueError(
                f"private: {self.private} matches {kind} of the {len(names)} trained parameters; give parts of names such as {names[0]}"
            )

    def travels(self, name: str, round: int) -> bool:
        """What is shared."""
        return not self.is_private(name)


@dataclass(frozen=True, kw_only=True)
class FedRep(FedPer):
    """The private parameters first, then the shared ones (Collins et al., 2021)."""

    head_steps: int = 10
    """Optimizer steps of the private parameters, before and in addition to the round's."""

    def __post_init__(self) -> None:
        if self.head_steps < 1:
            raise ValueError(f"head_steps: {self.head_steps} is not a number of at least 1")

    @property
    def first_steps(self) -> int:
        """Those of the private parameters."""
        return self.head_steps

    def trains(self, name: str, round: int, step: int) -> bool:
        """Private parameters in the first steps, shared ones after them."""
        return self.is_private(name) == (step < self.head_steps)
