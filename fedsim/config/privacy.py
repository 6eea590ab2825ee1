"""The section `privacy`: what a run guarantees of each client, and how."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedsim.core.section import OneOf, Positive, Text, section, wrong

Between = Annotated[float, Field(gt=0, lt=1)]


@section
class NoPrivacy:
    """No guarantee."""

    name: Literal["none"] = "none"


@section
class AdaptiveClip:
    """A clip that follows a quantile of the updates' norms (Andrew et al., 2021)."""

    quantile: Between = 0.5
    """Share of clients whose update should be shorter than the clip."""
    lr: Positive = 0.2
    """How fast the clip follows: it is multiplied by exp(-lr (share - quantile))."""
    start: Positive = 0.1
    """The clip of round 1."""


@section
class Central:
    """Client-level differential privacy with a trusted server: each client's update is clipped, noise is added to their sum."""

    name: Literal["central"] = "central"
    clip: Positive | dict[Literal["adaptive"], AdaptiveClip] = 0.1
    """Maximum 2-norm of all that a client sends in a round, as one vector; or {adaptive: {quantile, lr, start}}."""
    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of the noise on the sum of updates / (clip x largest weight). Excludes target_epsilon."""
    target_epsilon: Positive | None = None
    """Epsilon of the whole run, for which the noise is solved before training. Excludes noise_multiplier."""
    delta: Between = 1e-5
    """Delta of the guarantee; well below 1 / clients."""
    accountant: Literal["rdp", "pld"] = "rdp"
    """How epsilon is counted: rdp, or pld (tighter; only with cohort.sampler: poisson)."""
    neighbours: Literal["add_remove", "replace_one", "zero_out"] | None = None
    """What may differ: null = add_remove with Poisson cohorts, replace_one with cohorts of fixed size; zero_out is the weaker relation that a client's update is zero."""
    max_weight: Positive | None = None
    """Largest weight of a client: larger ones are lowered to it, and the noise is for it; null = every client weighs 1."""
    max_epsilon: Positive | None = None
    """The run ends before the round that would pass it; null = it never does."""

    @model_validator(mode="after")
    def _check(self) -> Central:
        _one_of_two(self)
        if isinstance(self.clip, dict) and not self.clip:
            raise wrong("clip", self.clip, "is empty; give a number, or {adaptive: {quantile: 0.5}}")
        return self


@section
class LocalSgd:
    """Example-level differential privacy at each client, by DP-SGD (Abadi et al., 2016): each example's gradient is clipped, noise is added to each batch's sum."""

    name: Literal["local_sgd"] = "local_sgd"
    clip: Positive = 1.0
    """Maximum 2-norm of an example's gradient over all trained parameters."""
    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of the noise on the sum of a batch / clip, the same at all clients. Excludes target_epsilon."""
    target_epsilon: Positive | None = None
    """The largest epsilon of a client after the whole run, for which the noise is solved before training. Excludes noise_multiplier."""
    delta: Between = 1e-5
    """Delta of the guarantee; well below 1 / examples of a client."""

    @model_validator(mode="after")
    def _check(self) -> LocalSgd:
        _one_of_two(self)
        return self


@section
class PercentileFilter:
    """NVFlare's PercentilePrivacy: only the largest changes are sent."""

    percentile: Annotated[float, Field(ge=0, le=100)] = 10.0
    """Changes per step nearer to zero than this percentile of all magnitudes of the update are not sent."""
    gamma: Positive = 0.01
    """Largest change per step that is sent; larger ones are cut off."""


@section
class SparseVectorFilter:
    """NVFlare's SVTPrivacy: a fraction of the changes is chosen by noisy comparisons, and sent with noise."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the numbers that is chosen."""
    epsilon: Positive = 0.1
    """Sets the noise of the threshold and of the comparisons, under NVFlare's name; it is no guarantee."""
    noise_var: Positive = 0.1
    """Sets the noise on what is sent, whose scale is 2 gamma / noise_var."""
    gamma: Positive = 1e-5
    """Changes per step are cut off at +-gamma, with the noise."""
    tau: float = 1e-6
    """The threshold without its noise."""
    replace: bool = True
    """Whether what is sent is drawn with replacement from what passes the threshold; then fewer numbers than the fraction are sent."""


@section
class FilterSet:
    """NVFlare's privacy filters on updates, in the order of these keys. They guarantee nothing: there is no epsilon."""

    name: Literal["filters"] = "filters"
    exclude: Annotated[list[Text], Field(min_length=1)] | Text | None = None
    """Names of trained parameters that are not sent, or a regular expression that is searched for in them."""
    percentile: PercentileFilter | None = None
    """Send the largest changes only; null = all."""
    sparse_vector: SparseVectorFilter | None = None
    """Send a noisy choice of changes; null = all."""

    @model_validator(mode="after")
    def _check(self) -> FilterSet:
        if self.exclude is None and self.percentile is None and self.sparse_vector is None:
            raise wrong(
                "exclude", None, "is the first of three filters, of which none is given; give one, or name: none"
            )
        if isinstance(self.exclude, str):
            try:
                re.compile(self.exclude)
            except re.error as error:
                raise wrong(
                    "exclude", self.exclude, f"is no regular expression ({error}); correct it, or give a list of names"
                ) from None
        return self


def _one_of_two(of: Central | LocalSgd) -> None:
    if (of.noise_multiplier is None) == (of.target_epsilon is None):
        both = (
            "and target_epsilon exclude each other"
            if of.target_epsilon
            else "needs noise_multiplier, or target_epsilon"
        )
        raise wrong("noise_multiplier", of.noise_multiplier, f"{both}; give one of the two")


PRIVACY = {"none": NoPrivacy, "central": Central, "local_sgd": LocalSgd, "filters": FilterSet}
Privacy = Annotated[NoPrivacy | Central | LocalSgd | FilterSet, OneOf(PRIVACY, default="none")]
