"""From the section `privacy` to what a run guarantees, and what would break the guarantee."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fedsim.config.components import algorithm_of
from fedsim.config.experiment import Experiment
from fedsim.core.errors import UserError
from fedsim.core.files import read_json
from fedsim.privacy.central import Adaptive, CentralPrivacy, Cohorts, central

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.runs.build import Parts
    from fedsim.runs.folder import RunFolder


def privacy_of(parts: Parts) -> CentralPrivacy | None:
    """What an experiment guarantees of each client; None = nothing.

    Raises:
        UserError: for what breaks the guarantee, with the reason.
    """
    from fedsim.runs.resolve import schedule_of

    exp = parts.exp
    section = exp.privacy
    if section.name != "central" or "federated" not in exp.modes:
        return None
    check(exp)
    clients = len(parts.clients)
    schedule = schedule_of(parts, "federated")
    clip = section.clip
    if isinstance(clip, dict):
        clip = Adaptive(**{f.name: getattr(clip["adaptive"], f.name) for f in dataclasses.fields(Adaptive)})
    return central(
        cohorts=Cohorts(clients if exp.cohort.size == "all" else exp.cohort.size, clients, exp.cohort.sampler),
        rounds=exp.rounds,
        noise=section.noise_multiplier,
        target=section.target_epsilon,
        delta=section.delta,
        accountant=section.accountant,
        neighbours=section.neighbours,
        clip=clip,
        max_weight=1.0 if schedule.weights == "uniform" else section.max_weight,
        weight=schedule.all_weight,
        seed=exp.seed,
    )


def check(exp: Experiment) -> None:
    """Refuse what would make the guarantee wrong.

    Raises:
        UserError: with the key, the reason and the way out.
    """
    algorithm, simulation = algorithm_of(exp.algorithm, exp.aggregator), exp.simulation
    hows = {group: how if isinstance(how, str) else type(how).__name__ for group, how in algorithm.aggregates.items()}
    named = f"algorithm.name: {exp.algorithm.name}"
    problems = [
        (
            exp.aggregator.name not in ("mean", "sum"),
            f"aggregator.name: {exp.aggregator.name} is no sum, whose sensitivity the noise is for; use aggregator.name=mean",
        ),
        (
            not set(hows.values()) <= {"mean", "sum"},
            f"{named} releases more than a sum of clipped updates; use one whose messages are averaged, such as fedavg",
        ),
        (
            bool(algorithm.needs & {"start_loss"}),
            f"{named} weighs clients by their loss, which no clip bounds; use one that does not, such as fedavg",
        ),
        (
            bool(algorithm.exact),
            f"{named} also sends numbers that are not clipped ({', '.join(sorted(algorithm.exact))}); use another, such as fedavg",
        ),
        (
            algorithm.buffered(1) is not None,
            f"{named} is asynchronous, and its steps are not of a sampled cohort; use one with rounds, such as fedavg",
        ),
        (
            simulation.late == "next",
            "simulation.late: next lets a client count in two rounds; set simulation.late=drop",
        ),
        (
            simulation.deadline_s is not None,
            "simulation.deadline_s: who is in time depends on how many tokens a client holds; leave it out",
        ),
        (
            exp.faults.policy != "skip",
            f"faults.policy: {exp.faults.policy} tells of a single client by what the run does; set faults.policy=skip",
        ),
        (
            exp.cohort.sampler == "fixed" and simulation.availability != 1.0,
            "simulation.availability: a cohort of fixed size from fewer clients is a larger share; use cohort.sampler=poisson",
        ),
    ]
    for wrong, said in problems:
        if wrong:
            raise UserError(f"{said} (privacy.name: {exp.privacy.name})")


def keep(folder: RunFolder, privacy: CentralPrivacy) -> None:
    """Write `privacy.json`.

    Raises:
        UserError: if the run was begun with other noise, as where a target was solved for another number of rounds.
    """
    told = {"noise_multiplier": privacy.z, "delta": privacy.delta, "accountant": privacy.accountant}
    told |= {"neighbours": privacy.neighbours, **dataclasses.asdict(privacy.cohorts)}
    told |= {"max_weight": privacy.max_weight, "denominator": privacy.expected_weight, "clip": privacy.start}
    keep_noise(folder, told)


def keep_noise(folder: RunFolder, told: dict[str, Any]) -> None:
    """Write `privacy.json`, whose noise never changes.

    Raises:
        UserError: if the run was begun with other noise.
    """
    place = folder.path / "privacy.json"
    before = read_json(place) if place.is_file() else told
    if before.get("noise_multiplier") != told["noise_multiplier"]:
        raise UserError(
            f"privacy.target_epsilon: the run was begun with a noise multiplier of {before.get('noise_multiplier')}, and now it would be "
            f"{told['noise_multiplier']}: it was solved for another number of rounds; set privacy.noise_multiplier in its place"
        )
    folder.write_json("privacy.json", told)


def table(privacy: CentralPrivacy, rounds: int) -> pd.DataFrame:
    """Epsilon after at most 20 of the rounds, the last one among them."""
    import pandas as pd

    shown = shown_rounds(rounds)
    return pd.DataFrame({"round": shown, "epsilon": [privacy.epsilon(t) for t in shown]})


def shown_rounds(rounds: int) -> list[int]:
    """At most 20 of the rounds, the first and the last one among them."""
    return sorted({round(1 + i * (rounds - 1) / 19) for i in range(20)}) if rounds > 20 else list(range(1, rounds + 1))


def about(privacy: CentralPrivacy, exp: Experiment) -> list[str]:
    """What a run with this guarantee tells the user before it trains."""
    cohorts, last = privacy.cohorts, exp.rounds
    of = "each with probability" if cohorts.sampler == "poisson" else "a cohort of fixed size, a share of"
    out = [
        f"privacy: epsilon {privacy.epsilon(last):.3g} after {last} rounds at delta {privacy.delta:g} ({privacy.accountant}, "
        f"{privacy.neighbours}); noise {privacy.z:.4g} x clip {privacy.start:g} x weight {privacy.max_weight:g}; "
        f"{cohorts.clients} clients, {of} {cohorts.sampling:.4g}"
    ]
    if privacy.neighbours == "zero_out" and cohorts.sampler == "fixed":
        out.append("privacy: zero_out is a weaker relation than replacing a client, which would cost more")
    if exp.privacy.max_weight is None and exp.algorithm.weights != "uniform":
        out.append("privacy: every client weighs 1; privacy.max_weight allows weights up to it")
    if algorithm_of(exp.algorithm, exp.aggregator).overrides("travels"):
        out.append("privacy: parameters that stay with their clients are outside the guarantee")
    out.append("privacy: validation and test examples, and best/, which is chosen on them, are outside the guarantee")
    return out
