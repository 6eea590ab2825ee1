"""Verdicts: what is expected of the local-only, federated and centralized curves of finished runs, and what was observed.

The expectations follow from FedAvg on heterogeneous clients (McMahan et al. 2017, "Communication-Efficient Learning of
Deep Networks from Decentralized Data"). Each client's steps pull the model towards the client's own optimum (client
drift; Karimireddy et al. 2020, "SCAFFOLD"): within a round the mean score of the clients on the shared examples falls,
and the mean of their parameters, in which the drifts cancel, is better again. A client without examples of a class never
learns to answer it. The more alike the clients are, the less there is to gain over local-only training.

`CHECKS` is the table of checks: their texts, and a function that looks at one run. "Final" is the last validation score,
"better" goes by the metric's direction. With several runs (seeds) of a label each is judged, and the mean distance from
the bound decides; the standard error of a mean over seeds is the mean of theirs, since all seeds are scored on the same
examples and averaging does not shrink what these leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import yaml
from pydantic import Field

from fedsim.analysis.finished import (
    PROPORTIONS,
    TINY,
    UNKNOWN,
    FinishedRun,
    Runs,
    differences,
    format_score,
    inside_rounds,
    score_error,
    trained,
)
from fedsim.analysis.load import mode_of
from fedsim.core.errors import UserError, shown
from fedsim.core.section import Text, made_of, section

_MOST = 6  # models named in one text


@dataclass(frozen=True)
class Verdict:
    """One expectation and how it came out; `passed` is None where it could not be judged, `observed` then says why."""

    name: str
    expected: str
    observed: str
    passed: bool | None


class _NotJudged(Exception):
    """A run lacks what a check needs; the message is the reason."""


@dataclass(frozen=True)
class _Finding:
    """One run's outcome: the check holds where distance + allowance is not below 0 (NaN: allowance not known)."""

    distance: float
    text: str
    allowance: float = 0.0


@section
class Line:
    """A line of `verdicts` about the runs of one label."""

    run: Text
    """Label of the runs."""
    metric: Text | None = None
    """Metric that is compared; null = the experiment's."""

    @property
    def labels(self) -> list[str]:
        return [self.run]


@section
class LackingClass(Line):
    """A client and the class of which it has no training example."""

    site: Text
    """The client."""
    class_: Annotated[Text, Field(alias="class")]
    """The class."""
    rows: Annotated[float, Field(ge=0)] = 4
    """Validation examples above the ceiling that a base model that knows the word may get right."""
    ceiling: Annotated[float, Field(ge=0)] | None = None
    """Share of validation examples of the other classes, for a run that does not have it in scores.npz."""


@section
class Gap:
    """A line of `verdicts` about the runs of several labels."""

    runs: Annotated[list[Text], Field(min_length=2)]
    """Labels, from the first to the last."""
    metric: Text | None = None
    """Metric that is compared; null = the experiment's."""

    @property
    def labels(self) -> list[str]:
        return self.runs


def judge(line: Mapping[str, Any], runs: Runs, metric: str = "accuracy") -> Verdict:
    """Judge one line of `verdicts`.

    Args:
        line: `check` (a key of `CHECKS`) and the keys of that check's section.
        runs: finished runs by label.
        metric: the experiment's metric, where the line names none.

    Raises:
        UserError: an unknown check or key, or one missing.
    """
    keys, check = read_line(line, "verdicts"), CHECKS[line["check"]]
    metric = keys.metric or metric
    found = runs.get(keys.labels[0]) or []
    more = mode_of(found[0].metrics if found else pd.DataFrame(), metric) == "max"
    words = {"metric": metric, "first": keys.labels[0], "last": keys.labels[-1]}
    words |= dict(zip(("better", "worse"), ("above", "below") if more else ("below", "above"), strict=True))
    words |= {"best": "highest" if more else "lowest", "good": "high" if more else "low"}
    words |= {name: getattr(keys, name, "") for name in ("site", "class_", "rows")}
    try:
        if missing := [label for label in keys.labels if not runs.get(label)]:
            raise _NotJudged(f"no finished run {missing[0]!r}")
        passed, observed = check.judge(check, keys, runs, metric)
    except _NotJudged as reason:
        passed, observed = None, str(reason)
    name, expected = (TEXTS[line["check"]][key].format(**words) for key in ("name", "expected"))
    return Verdict(name, expected, observed, passed)


def read_line(line: Mapping[str, Any], where: str) -> Any:
    """The checked section of a line of `verdicts`; a UserError that opens with `where` for what does not fit."""
    name = line.get("check")
    if name not in CHECKS:
        raise UserError(f"{where}.check: {shown(name)} is not a check; use one of {', '.join(CHECKS)}")
    return made_of(CHECKS[name].keys, {key: value for key, value in line.items() if key != "check"}, where)


# ------------------------------------------------------------------------------------------------- one run, then several


def _over_seeds(check: Check, line: Line, runs: Runs, metric: str) -> tuple[bool | None, str]:
    """Judge every run of the line's label by `check.find`, and their mean."""

    def holds(distance: float, allowance: float) -> bool | None:
        known = distance + (0.0 if np.isnan(allowance) else allowance)
        held = known > TINY if check.strict else known >= -TINY
        return None if np.isnan(allowance) and not held else held  # an allowance could only have helped

    found: list[tuple[FinishedRun, _Finding]] = []
    reasons: list[tuple[FinishedRun, str]] = []
    for run in runs[line.run]:
        try:
            found.append((run, check.find(line, run, metric)))
        except _NotJudged as reason:
            reasons.append((run, str(reason)))
    if not found:
        raise _NotJudged("; ".join(dict.fromkeys(text for _, text in reasons)))
    passed = holds(*np.mean([(one.distance, one.allowance) for _, one in found], axis=0).tolist())
    if len(runs[line.run]) == 1:
        return passed, found[0][1].text
    held = sum(holds(one.distance, one.allowance) is True for _, one in found)
    texts = [f"Seed {run.seed}: {one.text}" for run, one in found]
    texts += [f"Seed {run.seed} could not be judged: {text}" for run, text in reasons]
    return passed, ". ".join([f"held for {held} of {len(found)} seeds", *texts])


# ------------------------------------------------------------------------------------------- the global model and others


@dataclass(frozen=True)
class _Other:
    """A model beside the global one: its score, the difference (global - other), the standard error of that."""

    name: str
    score: float
    difference: float
    error: float = float("nan")
    about: str = ""


Others = tuple[list[_Other], str]  # and the source of the standard errors


def _against(others: Callable[[FinishedRun, str], Others], within: bool = False) -> Callable[..., _Finding]:
    """The final score of the global model is better than that of each other (standard errors are printed alone); or,
    `within`, worse than the best of the others by at most two standard errors of the difference.
    """

    def find(line: Line, run: FinishedRun, metric: str) -> _Finding:
        ours, (found, source) = _last(run, "federated", metric), others(run, metric)
        distances = [run.sign(metric) * (one.difference if within else ours - one.score) for one in found]
        nearest = np.argsort(distances, kind="stable")[: 1 if within else _MOST]
        text = "; ".join(_told(found[at], metric) for at in sorted(nearest))
        if not within and len(found) > _MOST:
            text += f"; and {len(found) - _MOST} more, further away"
        allowance = 2.0 * found[nearest[0]].error if within else 0.0
        return _Finding(min(distances), f"global model {format_score(ours, metric)}; {text}{source}", allowance)

    return find


def _told(one: _Other, metric: str) -> str:
    difference = format_score(one.difference, metric, sign=True)
    error = "" if np.isnan(one.error) else f", standard error {format_score(one.error, metric)}"
    return (
        f"{one.name}{one.about} {format_score(one.score, metric)}, difference (global - {one.name}) {difference}{error}"
    )


def _mean_of_clients(run: FinishedRun, metric: str) -> Others:
    """The unweighted mean of the final scores of the local-only models."""
    clients = _clients(run, metric)
    score = float(np.mean([run.last(f"local {client}", metric) for client in clients]))
    difference = _last(run, "federated", metric) - score
    return [_Other("mean", score, difference, about=f" of {len(clients)} clients")], ""


def _local_only(run: FinishedRun, metric: str, about: Mapping[str, str] | None = None) -> Others:
    """The local-only models of clients (client -> what is said of it; None: all), at the end."""
    about = dict.fromkeys(_clients(run, metric), "") if about is None else about
    return _at_end(run, metric, {f"local {client}": text for client, text in about.items()})


def _central(run: FinishedRun, metric: str) -> Others:
    return _at_end(run, metric, {"central": ""})


def _at_end(run: FinishedRun, metric: str, about: Mapping[str, str]) -> Others:
    """The final scores of models, compared example by example where these scores are kept."""
    scores = {model: _last(run, model, metric) for model in ("federated", *about)}
    found, source = differences(run, list(about), metric)
    others = [_Other(m.removeprefix("local "), scores[m], *found[m], text) for m, text in about.items()]
    return others, f" ({source})"


def _lacking_a_class(run: FinishedRun, metric: str) -> Others:
    """The local-only models of clients that have no example of some class."""
    names, about, scored = run.partition.get("class_names", []), run.partition, set(_clients(run, metric))
    texts = {}
    for client, counts in zip(about.get("client_names", []), about.get("class_counts", []), strict=False):
        missing = [str(name) for name, count in zip(names, counts, strict=False) if not count]
        if missing and client in scored:
            texts[client] = f" (no {', no '.join(missing)})"
    if not texts:
        raise _NotJudged("no client with a local-only model lacks a class")
    return _local_only(run, metric, texts)


def _best_of_clients(run: FinishedRun, metric: str) -> Others:
    """The local-only models at their best scored step: a client that stops there needs the shared validation examples.

    Standard errors are paired where a client's best is its last, else upper bounds, see `_unpaired`.
    """
    ours, others = _last(run, "federated", metric), []
    for client in _clients(run, metric):
        at, best, last = _best_and_last(run, client, metric)
        model = f"local {client}"
        paired = best == last
        error = differences(run, [model], metric)[0][model][1] if paired else _unpaired(run, (model, best), metric)
        others.append(_Other(client, best, ours - best, error, f" at {at:.0f} % of the steps"))
    return others, ""


def _unpaired(run: FinishedRun, other: tuple[str, float], metric: str, model: str = "federated") -> float:
    """Standard error of the difference of two scores as if they were on different examples; NaN if not known.

    An upper bound: the examples are the same, and what is hard for one model is hard for the other. For a loss the errors
    are those of the models' last scores.
    """
    return float(np.hypot(score_error(run, model, run.last(model, metric), metric), score_error(run, *other, metric)))


# ----------------------------------------------------------------------------------------------------- other checks


def _ceiling(line: LackingClass, run: FinishedRun, metric: str) -> _Finding:
    """The upper side alone is judged: how near the ceiling a client comes is a matter of training.

    The metric is accuracy where the one asked for is no share of right examples.
    """
    metric = metric if metric in PROPORTIONS else "accuracy"
    about = run.partition
    clients, classes = [[str(name) for name in about.get(key) or []] for key in ("client_names", "class_names")]
    for value, known, what in ((line.site, clients, "client"), (line.class_, classes, "class")):
        if value not in known:
            raise _NotJudged(f"the partition has no {what} {value!r}, but {', '.join(known[:10]) or 'none'}")
    number = classes.index(line.class_)
    if held := int(about["class_counts"][clients.index(line.site)][number]):
        raise _NotJudged(f"{line.site} has {held} {line.class_} examples in this partition")
    curve = trained(run.curve(f"local {line.site}", metric))
    if not len(curve):
        raise _NotJudged(f"no local-only validation {metric} of {line.site}")
    count, ceiling = run.weight(metric), line.ceiling
    if run.scores is not None and not (run.scores.labels < 0).any():
        count, ceiling = float(len(run.scores.labels)), float((run.scores.labels != number).mean())
    if ceiling is None:
        raise _NotJudged("the classes of the validation examples are not known: no scores.npz, and no key ceiling")
    if not np.isfinite(count):
        raise _NotJudged(f"the {metric} metrics do not say how many validation examples they rest on")
    bound, last, top = ceiling + line.rows / count, float(curve[-1, 1]), curve[np.argmax(curve[:, 1])]
    text = f"final {last:.3f}; the ceiling is {ceiling:.3f}, with {line.rows:g} examples of {count:g} {bound:.3f}"
    shown_ = run.metrics[run.metrics["name"].astype(str).str.startswith("predicted:")]
    shown_ = shown_[(shown_["scope"] == "local") & (shown_["client"] == line.site) & (shown_["split"] == "validation")]
    predicted = shown_.groupby(shown_["name"].astype(str), sort=False)["value"].last()
    if len(predicted):
        text += "; predicted " + ", ".join(f"{n.removeprefix('predicted:')} {v:g}" for n, v in predicted.items())
    text += f"; highest {top[1]:.3f}, at {100 * top[0] / run.rounds:.0f} % of the steps"
    return _Finding(bound - last, text)


def _smallest_overfits(line: Line, run: FinishedRun, metric: str) -> _Finding:
    """With equal steps the smallest data set is repeated most often.

    The scores by example of the model at its best are not kept, so the standard error is the upper bound of `_unpaired`;
    where that is not known, no loss can be told from noise.
    """
    sizes = dict(zip(run.partition.get("client_names") or [], run.partition.get("sizes") or [], strict=False))
    clients = [client for client in run.clients(metric) if client in sizes]
    if len(clients) < 2:
        raise _NotJudged(f"local-only validation {metric} of fewer than two clients whose sizes are known")
    found = {client: _best_and_last(run, client, metric) for client in clients}
    losses = {client: run.sign(metric) * (best - last) for client, (_, best, last) in found.items()}
    smallest = min(clients, key=lambda client: sizes[client])
    (at, best, last), loss = found[smallest], losses.pop(smallest)
    error = _unpaired(run, (f"local {smallest}", best), metric, f"local {smallest}")
    margin = loss - max(losses.values())
    if np.isnan(error) and min(loss, margin) > TINY:
        raise _NotJudged(f"{smallest} ends {format_score(loss, metric)} worse than its best, but {UNKNOWN}")
    best, last, worse, most = (format_score(value, metric) for value in (best, last, loss, error))
    text = (
        f"{smallest} ({sizes[smallest]} examples) {best} at {at:.0f} % of the steps, final {last}, worse by {worse}, "
    )
    text += f"standard error at most {most}; the others are worse by "
    text += ", ".join(f"{format_score(v, metric)} ({client}, {sizes[client]} examples)" for client, v in losses.items())
    return _Finding(min(loss if np.isnan(error) else loss - 2.0 * error, margin), text)


def _gap_shrinks(check: Check, line: Gap, runs: Runs, metric: str) -> tuple[bool, str]:
    """The gap (positive: the global model is better) of a label is the mean over its runs; a seed counts where the first
    and the last label both have a run of it.
    """
    gaps: dict[str, dict[Any, float]] = {label: {} for label in line.runs}
    for label, found in gaps.items():
        for number, run in enumerate(runs[label]):
            ((mean,), _) = _mean_of_clients(run, metric)
            found[number if run.seed is None else run.seed] = run.sign(metric) * mean.difference
    mean = {label: float(np.mean(list(found.values()))) for label, found in gaps.items()}
    observed = "gap " + ", ".join(f"{label} {format_score(gap, metric, sign=True)}" for label, gap in mean.items())
    first, last = gaps[line.runs[0]], gaps[line.runs[-1]]
    both = [seed for seed in first if seed in last]
    if max(len(first), len(last)) > 1 and both:
        held = sum(first[seed] - last[seed] > TINY for seed in both)
        observed = f"held for {held} of {len(both)} seeds; mean {observed}"
    return mean[line.runs[0]] - mean[line.runs[-1]] > TINY, observed


def _drift(check: Check, line: Line, runs: Runs, metric: str) -> tuple[bool, str]:
    """Rounds from 2 on that were scored throughout; with several seeds the curves are averaged first.

    Recovery: the mean of the clients' scores just before aggregation is worse than the global model after it. Drift: at
    some point scored within the round the clients' mean is worse than the global model that the round began with.
    """
    seeds = [_scored_rounds(run, metric) for run in runs[line.run]]
    if not all(seeds):
        raise _NotJudged(f"no round from 2 on with validation {metric} of the clients just before its aggregation")
    common = sorted(set.intersection(*map(set, seeds)))
    if not common:
        raise _NotJudged("the seeds have no scored round from 2 on in common")

    def count(members: Sequence[dict[int, Any]], numbers: Iterable[int]) -> tuple[int, int]:
        recovered = drifted = 0
        for number in numbers:
            starts, curves, ends = zip(*(one[number] for one in members), strict=True)
            at = reduce(np.intersect1d, [curve[:, 0] for curve in curves])  # each holds the place of aggregation
            inside = np.mean([curve[np.isin(curve[:, 0], at), 1] for curve in curves], axis=0)
            recovered += bool(inside[-1] < np.mean(ends) - TINY)
            drifted += bool(inside.min() < np.mean(starts) - TINY)
        return recovered, drifted

    def holds(recovered: int, drifted: int, of: int) -> bool:
        return 2 * recovered > of and 2 * drifted >= of

    recovered, drifted = count(seeds, common)
    gapless = common[-1] - common[0] == len(common) - 1
    span = f"rounds {f'{common[0]} to {common[-1]}' if gapless else ', '.join(map(str, common))}"
    span = span if len(common) > 1 else f"round {common[0]}"
    observed = f"recovery in {recovered} of {len(common)} rounds, drift in {drifted} of {len(common)} ({span})"
    if len(seeds) > 1:
        held = sum(holds(*count([one], one), len(one)) for one in seeds)
        observed = f"held for {held} of {len(seeds)} seeds; mean over seeds: {observed}"
    return holds(recovered, drifted, len(common)), observed


def _scored_rounds(run: FinishedRun, metric: str) -> dict[int, tuple[float, np.ndarray, float]]:
    """Rounds from 2 on: global model at the start, clients' mean inside [p, 2], global model after; more is better."""
    sign = run.sign(metric)
    ours = {int(at): sign * float(value) for at, value in run.curve("federated", metric)}
    return {
        number: (ours[number - 1], np.column_stack([at, sign * values.mean(axis=0)]), ours[number])
        for number, (at, values) in inside_rounds(run, metric).items()
        if number >= 2 and number - 1 in ours and number in ours and at[-1] == number
    }


def _last(run: FinishedRun, model: str, metric: str) -> float:
    value = run.last(model, metric)
    if not np.isfinite(value):
        raise _NotJudged(f"no validation {metric} of the {'global' if model == 'federated' else model} model")
    return value


def _clients(run: FinishedRun, metric: str) -> list[str]:
    if not (found := run.clients(metric)):
        raise _NotJudged(f"no validation {metric} of a local-only model")
    return found


def _best_and_last(run: FinishedRun, client: str, metric: str) -> tuple[float, float, float]:
    """Of a local-only model: where it was best after training began (in % of the steps), its score there, its last score."""
    curve = trained(run.curve(f"local {client}", metric))
    at = int(np.argmax(run.sign(metric) * curve[:, 1]))
    return 100 * float(curve[at, 0]) / run.rounds, float(curve[at, 1]), float(curve[-1, 1])


# ------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Check:
    """One kind of check.

    Attributes:
        find: (line, run, metric) -> what one run shows.
        strict: to be on the bound is not enough.
        keys: the section of its lines.
        judge: (check, line, runs, metric) -> whether it passed, what was observed.
    """

    find: Callable[[Any, FinishedRun, str], _Finding] | None = None
    strict: bool = True
    keys: type = Line
    judge: Callable[[Check, Any, Runs, str], tuple[bool | None, str]] = _over_seeds


# Texts that say what a check expects, with `metric`, the labels, words of the metric's direction, and the line's own keys.
TEXTS: dict[str, dict[str, str]] = yaml.safe_load(
    Path(__file__).parents[1].joinpath("assets", "checks.yaml").read_text()
)
CHECKS = {
    "lacking_class": Check(_ceiling, strict=False, keys=LackingClass),
    "merged_beats_mean": Check(_against(_mean_of_clients)),
    "merged_beats_lacking": Check(_against(_lacking_a_class)),
    "merged_near_best_site": Check(_against(_local_only, within=True), strict=False),
    "gap_shrinks": Check(judge=_gap_shrinks, keys=Gap),
    "as_low_as_central": Check(_against(_central, within=True), strict=False),
    "below_sites": Check(_against(_local_only)),
    "saw_tooth": Check(judge=_drift),
    "below_sites_best": Check(_against(_best_of_clients)),
    "smallest_overfits": Check(_smallest_overfits),
}
