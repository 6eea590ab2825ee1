"""Differential privacy: what a run spends."""

from fedsim.privacy.accounting import epsilon, noise_multiplier

__all__ = ["epsilon", "noise_multiplier"]
