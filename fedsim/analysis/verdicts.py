"""Verdicts on finished runs: what theory demands of local, federated and central curves, and what was seen.

The demands follow from FedAvg on heterogeneous clients (McMahan et al. 2017, "Communication-Efficient Learning of Deep
Networks from Decentralized Data"). Each client's steps pull the model towards the client's own optimum (client drift;
Karimireddy et al. 2020, "SCAFFOLD"), so inside a round the clients' mean score on everybody's rows sags, and the mean of
their parameters, in which the drifts cancel, jumps above them. A site that holds no row of a class has no reason ever
to answer it. The more alike the sites are, the less there is to gain over training alone.

`CHECKS` is the table of checks; `judge` applies one to runs. "At the end" is the last validation score, "better" goes
by the metric's direction, and with several runs (seeds) of a label a demand is judged for each and for their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.analysis.load import load_runs, mode_of
from fedsim.analysis.traces import Traces, traces
from fedsim.core import files
from fedsim.core.errors import UserError

PROPORTIONS = ("accuracy", "exact_match")  # a row is right or wrong: binomial
PAIRED = "paired on the same validation rows"
PAIRED_TEST = "paired on the same test rows, of the models chosen on validation; no scores of single validation rows"
UNPAIRED = "unpaired, binomial: no scores of single rows"
UNKNOWN = "no standard error: no scores of single rows"
TINY = 1e-9  # scores are fractions such as 173/226: rounding must not decide


@dataclass(frozen=True)
class RowScores:
    """Scores of single validation rows by the last models of a run (`scores.npz`); M models, n rows.

    `names` [M] are "federated", "central" and "local SITE"; `labels` int64 [n] and `predicted` int [M, n] hold classes,
    -1 where there are none; `nll` float64 [M, n] is the nats of a row's answer, NaN where the model was not scored,
    `tokens` int64 [n] its length.
    """

    names: list[str]
    labels: np.ndarray
    tokens: np.ndarray
    nll: np.ndarray
    predicted: np.ndarray

    def parts(self, model: str, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A model's score as sum over sum: each row's numerator and denominator, float64 [n]; None if not known."""
        if model not in self.names:
            return None
        at = self.names.index(model)
        if metric == "loss" and not np.isnan(self.nll[at]).any():
            return self.nll[at].astype(float), self.tokens.astype(float)
        if metric == "accuracy" and not (self.labels < 0).any() and not (self.predicted[at] < 0).any():
            return (self.predicted[at] == self.labels).astype(float), np.ones(len(self.labels))
        return None


@dataclass
class FinishedRun:
    """What the files of one finished run say; None where a file is not there."""

    path: Path
    rows: pd.DataFrame
    partition: dict[str, Any] | None
    comparison: dict[str, Any] | None
    scores: RowScores | None
    _traces: dict[str, Traces] = field(default_factory=dict, init=False, repr=False)

    @property
    def seed(self) -> int | None:
        """The seed it ran with."""
        return int(self.rows["seed"].iloc[0]) if "seed" in self.rows else None

    @property
    def rounds(self) -> int:
        """Rounds of the run, planned and, as it is finished, done."""
        return int(self.rows["rounds"].iloc[0] if "rounds" in self.rows else self.rows["round"].max())

    def traces(self, metric: str) -> Traces:
        """Its curves on the shared validation rows, on the axis of rounds."""
        if metric not in self._traces:
            self._traces[metric] = traces(self.rows, metric)
        return self._traces[metric]

    def curve(self, model: str, metric: str) -> np.ndarray:
        """The curve of "federated" (merged models), "central" or "local SITE", float64 [points, 2]; may be empty."""
        found = self.traces(metric)
        one_site = found.local.get(model.removeprefix("local "), np.empty((0, 2)))
        return {"federated": found.merged, "central": found.central}.get(model, one_site)

    def sites(self, metric: str) -> list[str]:
        """The sites that trained alone and were scored."""
        return [site for site in self.traces(metric).local if np.isfinite(self.last(f"local {site}", metric))]

    def last(self, model: str, metric: str) -> float:
        """A model's validation score at the end; NaN if it was not scored after training began."""
        curve = trained(self.curve(model, metric))
        return float(curve[-1, 1]) if len(curve) else float("nan")

    def sign(self, metric: str) -> float:
        """1 where more is better, -1 where less is."""
        return 1.0 if mode_of(self.rows, metric) == "max" else -1.0

    def weight(self, metric: str) -> float:
        """Validation rows that a score rests on; NaN where it was not recorded."""
        rows = self.rows[(self.rows["split"] == "validation") & (self.rows["name"] == metric)]
        found = rows["weight"].dropna()
        return float(found.iloc[-1]) if len(found) else float("nan")


@dataclass(frozen=True)
class Verdict:
    """One demand and how it came out; `passed` is None where it could not be judged, `seen` then says why."""

    name: str
    demanded: str
    seen: str
    passed: bool | None


Runs = Mapping[str, Sequence[FinishedRun]]


class _NotJudged(Exception):
    """A run lacks what a check needs; the message is the reason."""


@dataclass(frozen=True)
class _Finding:
    """One run's outcome: the demand holds where distance + allowance is not below 0 (NaN: allowance not known)."""

    distance: float
    text: str
    allowance: float = 0.0


def load_run(path: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        UserError: no run there, no metrics row in it, or a damaged file.
    """
    path = Path(path)
    rows = load_runs(path)
    if rows.empty or rows["run"].nunique() != 1:
        raise UserError(f"{str(path)!r} is not the folder of one run with metrics; give RESULTS/NAME/ID")
    files.warn_of_damage(path, "partition.json", "comparison.json", "scores.npz")
    scores = _row_scores(path / "scores.npz")
    return FinishedRun(path, rows, read_json(path / "partition.json"), read_json(path / "comparison.json"), scores)


def read_json(file: Path) -> Any:
    """A JSON file's content; None where there is no file.

    Raises:
        UserError: it is not JSON, or holds no object.
    """
    if not file.is_file():
        return None
    return files.read_json(file)


def _row_scores(file: Path) -> RowScores | None:
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as data:
            names = [str(name) for name in data["names"]]
            found = RowScores(
                names, data["validation_labels"], data["tokens"], data["last_nll"], data["last_predicted"]
            )
    except files.DAMAGED_ARRAYS as error:
        why = " ".join(str(error).split())
        raise UserError(f"{file}: not the scores of a run ({why}); delete it or do the run again") from None
    models = (len(names), len(found.labels))
    if found.nll.shape != models or found.predicted.shape != models or found.tokens.shape != models[1:]:
        raise UserError(f"{file}: arrays do not fit {models[0]} models and {models[1]} rows; do the run again")
    return found


def judge(line: Mapping[str, Any], runs: Runs, metric: str = "accuracy") -> Verdict:
    """Judge one line of `verdicts`.

    With several runs of a label each is judged; the verdict is that of the mean distance from the bound, and `seen` says
    for how many seeds the demand held. Two standard errors of a mean over seeds are twice the mean of theirs: all
    seeds are scored on the same rows, so averaging does not shrink what these rows leave open.

    Args:
        line: `check` (a key of `CHECKS`) and what that check takes, see `KEYS`; `metric` overrides the argument.
        runs: finished runs by label.
        metric: the experiment's metric.

    Raises:
        UserError: an unknown check or key, or one missing.
    """
    check_line(line, "verdicts")
    metric = str(line.get("metric") or metric)
    return CHECKS[line["check"]](line, runs, metric)


def check_line(line: Any, where: str) -> None:
    """Raise a UserError, which opens with `where`, if a line of `verdicts` is not one that `judge` takes."""
    if not isinstance(line, Mapping) or "check" not in line:
        raise UserError(f"{where}: {line!r} names no check; give check: one of {', '.join(CHECKS)}")
    name = line["check"]
    if name not in CHECKS:
        raise UserError(f"{where}.check: {name!r} is no check; use one of {', '.join(CHECKS)}")
    required, optional = KEYS[name]
    for key in required:
        if key not in line:
            raise UserError(f"{where}: check {name} needs the key {key!r}; it takes {', '.join(required + optional)}")
    for key in line:
        if key not in ("check", "metric", *required, *optional):
            takes = ", ".join((*required, *optional, "metric"))
            raise UserError(f"{where}.{key}: check {name} takes no such key; it takes {takes}")
    for key in ("rows", "ceiling"):
        value = line.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise UserError(f"{where}.{key}: {value!r} is no number from 0 up; give one or leave the key out")
    labels = line.get("runs", ["", ""])
    if not isinstance(labels, list) or len(labels) < 2:
        raise UserError(f"{where}.runs: {labels!r} is no list of two labels or more; give [first, ..., last]")


def labels_of(line: Mapping[str, Any]) -> list[str]:
    """The labels of runs that a line of `verdicts` or `published` names."""
    return [str(label) for label in line.get("runs", [line.get("run")])]


# ------------------------------------------------------------------------------------------------- the checks


def _lacking_class(line: Mapping[str, Any], runs: Runs, metric: str) -> Verdict:
    """A site without any training row of a class, alone, scores at most the share of validation rows of the other
    classes, plus `rows` rows (default 4) that a base that knows the word may find.

    The upper side alone is judged: how near the ceiling a site comes is a matter of training. Without `scores.npz`
    the classes of the validation rows are taken from `ceiling` (the share, 0 to 1). The metric is accuracy where the
    one asked for is no share of right rows.
    """
    metric = metric if metric in PROPORTIONS else "accuracy"
    site, word, spare = str(line["site"]), str(line["class"]), float(line.get("rows", 4))

    def one(run: FinishedRun) -> _Finding:
        index, held = _rows_of_class(run, site, word)
        if held:
            raise _NotJudged(f"{site} holds {held} {word} rows in this partition")
        curve = trained(run.curve(f"local {site}", metric))
        if not len(curve):
            raise _NotJudged(f"no validation {metric} of {site} alone")
        count = run.weight(metric)
        if run.scores is not None and not (run.scores.labels < 0).any():
            count = float(len(run.scores.labels))
            ceiling = float((run.scores.labels != index).mean())
        elif "ceiling" in line:
            ceiling = float(line["ceiling"])
        else:
            raise _NotJudged("the classes of the validation rows are not known: no scores.npz, and no key ceiling")
        if not np.isfinite(count):
            raise _NotJudged(f"the {metric} rows do not say how many validation rows they rest on")
        bound = ceiling + spare / count
        last, top = float(curve[-1, 1]), curve[np.argmax(curve[:, 1])]
        text = f"{last:.3f} at the end; the ceiling is {ceiling:.3f}, with {spare:g} rows of {count:g} {bound:.3f}"
        if counts := _predictions(run, site):
            text += "; predicted " + ", ".join(f"{name} {rows:g}" for name, rows in counts.items())
        text += f"; highest on the way {top[1]:.3f}, at {100 * top[0] / run.rounds:.0f} % of the steps"
        return _Finding(bound - last, text)

    demanded = f"{metric} at the end at most the share of the other classes' validation rows, plus {spare:g} rows"
    name = f"{site} alone, which holds no {word} row, stays at its ceiling"
    return _over_seeds(name, demanded, line, runs, one)


def _merged_beats_mean(line: Mapping[str, Any], runs: Runs, metric: str) -> Verdict:
    """The merged model at the end is better than the unweighted mean of the sites' own models at the end."""

    def one(run: FinishedRun) -> _Finding:
        merged, alone = _merged_and_mean(run, metric)
        text = f"merged {format_score(merged, metric)}, mean of {len(run.sites(metric))} sites {format_score(alone, metric)}"
        return _Finding(run.sign(metric) * (merged - alone), text)

    than = _than(line, runs, metric)
    demanded = f"{metric} of the merged model at the end {than} the mean of the sites alone"
    return _over_seeds(f"merged model {than} the mean of the sites", demanded, line, runs, one, strict=True)


def _merged_beats_lacking(line: Mapping[str, Any], runs: Runs, metric: str) -> Verdict:
    """The merged model at the end is better than every site alone whose class counts hold a zero.

    A run's distance is that to the best such site.
    """

    def one(run: FinishedRun) -> _Finding:
        merged, report = _last(run, "federated", metric), run.partition or {}
        words, scored = report.get("class_names", []), set(run.sites(metric))
        distances, texts = [], []
        for site, counts in zip(report.get("client_names", []), report.get("class_counts", []), strict=False):
            missing = [str(word) for word, count in zip(words, counts, strict=False) if not count]
            if missing and site in scored:
                alone = run.last(f"local {site}", metric)
                distances.append(run.sign(metric) * (merged - alone))
                texts.append(f"{site} (no {', no '.join(missing)}) {format_score(alone, metric)}")
        if not distances:
            raise _NotJudged("no site that trained alone lacks a class")
        shown = _closest(distances, texts)
        return _Finding(min(distances), f"merged {format_score(merged, metric)}; {shown}")

    than = _than(line, runs, metric)
    demanded = f"{metric} of the merged model at the end {than} that of each site whose training rows lack a class"
    return _over_seeds(f"merged model {than} every site that lacks a class", demanded, line, runs, one, strict=True)


def _merged_near_best_site(line: Mapping[str, Any], runs: Runs, metric: str) -> Verdict:
    """The merged model is no worse than the best site alone by more than two standard errors of their difference.

    Row by row on the validation rows with the last models; else on the test rows with the chosen models
    (`comparison.json`, accuracy only), where the best site is the best on these rows; else unpaired.
    """

    def one(run: FinishedRun) -> _Finding:
        sites = run.sites(metric)
        if not sites:
            raise _NotJudged(f"no validation {metric} of a site alone")
        found, source = differences(run, [f"local {site}" for site in sites], metric)
        sign = run.sign(metric)
        best = min(found, key=lambda model: sign * found[model][0])
        value, error = found[best]
        text = f"{_pair(run, best, metric)}; merged less best site {_difference(value, error, metric)} ({source})"
        return _Finding(sign * value, text, 2.0 * error)

    than = "below" if _than(line, runs, metric) == "above" else "above"
    demanded = f"{metric} of the merged model not {than} the best site's by more than two standard errors"
    return _over_seeds("merged model within two standard errors of the best site", demanded, line, runs, one)


def _gap_shrinks(line: Mapping[str, Any], runs: Runs, metric: str) -> Verdict:
    """The gap at the end between the merged model and the mean of the sites alone (positive: merged is better) is
    greater for the first label than for the last; each label's gap is the mean over its runs.

    A seed counts where the first and the last label both have a run of it.
    """
    labels = labels_of(line)
    name = f"gap to the mean of the sites shrinks from {labels[0]} to {labels[-1]}"
    demanded = f"{metric} of the merged model less that of the mean of the sites: smaller for {labels[-1]}"
    gaps: dict[str, dict[Any, float]] = {}
    try:
        for label in labels:
            gaps[label] = {}
            for number, run in enumerate(_runs(runs, label)):
                merged, alone = _merged_and_mean(run, metric)
                key = number if run.seed is None else run.seed
                gaps[label][key] = run.sign(metric) * (merged - alone)
    except _NotJudged as reason:
        return Verdict(name, demanded, str(reason), None)
    mean = {label: float(np.mean(list(found.values()))) for label, found in gaps.items()}
    seen = "gap " + ", ".join(f"{label} {format_score(mean[label], metric, sign=True)}" for label in gaps)
    first, last = gaps[labels[0]], gaps[labels[-1]]
    both = [seed for seed in first if seed in last]
    if max(len(first), len(last)) > 1 and both:
        held = sum(first[seed] - last[seed] > TINY for seed in both)
        seen = f"held for {held} of {len(both)} seeds; mean {seen}"
    return Verdict(name, demanded, seen, mean[labels[0]] - mean[labels[-1]] > TINY)


def _as_low_as_central(line: Mapping[str, Any], runs: Runs, metric: str) -> Verdict:
    """The merged model at the end is no worse than the centralised one by more than two standard errors of their
    difference, row by row as in `merged_near_best_site`; the loss by the ratio estimator, nats over answer tokens.
    """

    def one(run: FinishedRun) -> _Finding:
        _last(run, "federated", metric), _last(run, "central", metric)
        found, source = differences(run, ["central"], metric)
        value, error = found["central"]
        text = f"{_pair(run, 'central', metric)}; difference {_difference(value, error, metric)} ({source})"
        return _Finding(run.sign(metric) * value, text, 2.0 * error)

    low = "high" if _than(line, runs, metric) == "above" else "low"
    demanded = f"{metric} of the merged model as {low} as that of the centralised one, within two standard errors"
    return _over_seeds(f"federated ends as {low} as centralised within noise", demanded, line, runs, one)


def _below_sites(line: Mapping[str, Any], runs: Runs, metric: str) -> Verdict:
    """The merged model at the end is better than each site alone; a run's distance is that to the best site.

    The standard errors of the differences are printed and do not enter the verdict.
    """

    def one(run: FinishedRun) -> _Finding:
        merged, sign, sites = _last(run, "federated", metric), run.sign(metric), run.sites(metric)
        if not sites:
            raise _NotJudged(f"no validation {metric} of a site alone")
        found, source = differences(run, [f"local {site}" for site in sites], metric)
        distances, texts = [], []
        for site in sites:
            alone = run.last(f"local {site}", metric)
            distances.append(sign * (merged - alone))
            value, error = found[f"local {site}"]
            texts.append(f"{site} {format_score(alone, metric)}, difference {_difference(value, error, metric)}")
        shown = _closest(distances, texts)
        return _Finding(min(distances), f"merged {format_score(merged, metric)}; {shown} ({source})")

    than = _than(line, runs, metric)
    demanded = f"{metric} of the merged model at the end {than} that of every site alone"
    return _over_seeds(f"federated ends {than} each site alone", demanded, line, runs, one, strict=True)


def _below_sites_best(line: Mapping[str, Any], runs: Runs, metric: str) -> Verdict:
    """The merged model at the end is better than the best that each site alone reaches on its way, at any scored step.

    A site alone would have to stop there, which it can only with everybody's validation rows at hand. The standard errors
    are printed and do not enter the verdict: paired where a site's best is its last, else upper bounds, see `_unpaired`.
    """

    def one(run: FinishedRun) -> _Finding:
        merged, sign, sites = _last(run, "federated", metric), run.sign(metric), run.sites(metric)
        if not sites:
            raise _NotJudged(f"no validation {metric} of a site alone")
        distances, texts = [], []
        for site in sites:
            at, best, last = _best_and_last(run, site, metric)
            if best == last:
                error = differences(run, [f"local {site}"], metric)[0][f"local {site}"][1]
            else:
                error = _unpaired(run, ("federated", merged), (f"local {site}", best), metric)
            distances.append(sign * (merged - best))
            apart = _difference(merged - best, error, metric)
            texts.append(
                f"{site} {format_score(best, metric)} at {_per_cent(at, run)} of the steps, difference {apart}"
            )
        return _Finding(min(distances), f"merged {format_score(merged, metric)}; {_closest(distances, texts)}")

    than = _than(line, runs, metric)
    best = "lowest" if than == "below" else "highest"
    demanded = f"{metric} of the merged model at the end {than} the {best} of every site alone on its way"
    return _over_seeds(f"federated ends {than} the {best} of each site alone", demanded, line, runs, one, strict=True)


def _smallest_overfits(line: Mapping[str, Any], runs: Runs, metric: str) -> Verdict:
    """The site with the fewest training rows, alone, gets worse again: its score at the end is worse than its best on the
    way by more than two standard errors, and by more than that of any other site.

    With equal steps the smallest set is gone through most often. The rows of the model at its best are not kept, so the
    standard error is the upper bound of `_unpaired`; where that is not known, no rise can be told from noise.
    """

    def one(run: FinishedRun) -> _Finding:
        sizes = _sizes(run)
        sites = [site for site in run.sites(metric) if site in sizes]
        if len(sites) < 2:
            raise _NotJudged(f"validation {metric} of fewer than two sites alone whose rows are known")
        sign = run.sign(metric)
        found = {site: _best_and_last(run, site, metric) for site in sites}
        rises = {site: sign * (best - last) for site, (_, best, last) in found.items()}
        smallest = min(sites, key=lambda site: sizes[site])
        at, best, last = found[smallest]
        rise, others = rises[smallest], {site: value for site, value in rises.items() if site != smallest}
        error = _unpaired(run, (f"local {smallest}", best), (f"local {smallest}", last), metric)
        margin = rise - max(others.values())
        if np.isnan(error) and min(rise, margin) > TINY:
            raise _NotJudged(f"{smallest} ends {format_score(rise, metric)} worse than its best, but {UNKNOWN}")
        text = (
            f"{smallest} ({sizes[smallest]} rows) {format_score(best, metric)} at {_per_cent(at, run)} of the steps, "
            f"{format_score(last, metric)} at the end, worse by {format_score(rise, metric)}, standard error at most "
            f"{format_score(error, metric)}; the others are worse by "
        )
        text += ", ".join(
            f"{format_score(value, metric)} ({site}, {sizes[site]} rows)" for site, value in others.items()
        )
        return _Finding(min(rise if np.isnan(error) else rise - 2.0 * error, margin), text)

    worse = "below" if _than(line, runs, metric) == "above" else "above"
    demanded = (
        f"{metric} of the site with the fewest rows, alone, at the end {worse} its best by more than two standard errors, "
        "and by more than that of every other site"
    )
    return _over_seeds("the smallest set overfits alone", demanded, line, runs, one, strict=True)


def _saw_tooth(line: Mapping[str, Any], runs: Runs, metric: str) -> Verdict:
    """Sag and jump in the rounds from 2 on that were scored throughout.

    Jump: the mean of the clients' scores just before the merge is worse than the merged model after it, in more than
    half of these rounds. Sag: at some point scored inside the round the clients' mean is worse than the merged model
    that the round began with, in at least half of them. With several seeds the curves are averaged first.
    """
    worse = "below" if _than(line, runs, metric) == "above" else "above"
    name = "sag inside a round and jump at the merge"
    demanded = (
        f"{metric} of the clients' mean {worse} the merged model just before the merge in more than half of the rounds "
        f"from 2 on, and {worse} the one the round began with in at least half"
    )
    try:
        found = _runs(runs, str(line["run"]))
        teeth = [_teeth(run, metric) for run in found]
        if not all(teeth):
            raise _NotJudged(f"no round from 2 on with validation {metric} of the clients just before its merge")
        common = sorted(set.intersection(*(set(one) for one in teeth)))
        if not common:
            raise _NotJudged("the seeds have no scored round from 2 on in common")
    except _NotJudged as reason:
        return _verdict(name, demanded, line, str(reason), None)

    def count(members: Sequence[dict[int, tuple[float, np.ndarray, float]]], numbers: Iterable[int]) -> tuple[int, int]:
        jumps = sags = 0
        for number in numbers:
            starts, curves, ends = zip(*(one[number] for one in members), strict=True)
            at = reduce(np.intersect1d, [curve[:, 0] for curve in curves])  # each holds the place of the merge
            inside = np.mean([curve[np.isin(curve[:, 0], at), 1] for curve in curves], axis=0)
            jumps += bool(inside[-1] < np.mean(ends) - TINY)
            sags += bool(inside.min() < np.mean(starts) - TINY)
        return jumps, sags

    def holds(jumps: int, sags: int, of: int) -> bool:
        return 2 * jumps > of and 2 * sags >= of

    jumps, sags = count(teeth, common)
    seen = f"jump in {jumps} of {len(common)} rounds, sag in {sags} of {len(common)} ({_span(common)})"
    if len(teeth) > 1:
        held = sum(holds(*count([one], one), len(one)) for one in teeth)
        seen = f"held for {held} of {len(teeth)} seeds; mean over seeds: {seen}"
    return _verdict(name, demanded, line, seen, holds(jumps, sags, len(common)))


Check = Callable[[Mapping[str, Any], Runs, str], Verdict]
CHECKS: dict[str, Check] = {
    "lacking_class": _lacking_class,
    "merged_beats_mean": _merged_beats_mean,
    "merged_beats_lacking": _merged_beats_lacking,
    "merged_near_best_site": _merged_near_best_site,
    "gap_shrinks": _gap_shrinks,
    "as_low_as_central": _as_low_as_central,
    "below_sites": _below_sites,
    "saw_tooth": _saw_tooth,
    "below_sites_best": _below_sites_best,
    "smallest_overfits": _smallest_overfits,
}
# What each check takes: keys that it needs, keys that may be there.
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = dict.fromkeys(CHECKS, (("run",), ()))
KEYS["lacking_class"] = (("run", "site", "class"), ("rows", "ceiling"))
KEYS["gap_shrinks"] = (("runs",), ())


# -------------------------------------------------------------------------------------- scores and their errors


def differences(run: FinishedRun, models: Sequence[str], metric: str) -> tuple[dict[str, tuple[float, float]], str]:
    """The merged model's score less that of each of `models`, with the standard error, all from one source.

    Returns:
        Model -> (difference, its standard error, NaN if not known), and which source it was: `PAIRED` (last models,
        scores.npz), `PAIRED_TEST` (chosen models, comparison.json, accuracy), `UNPAIRED` or `UNKNOWN` (last models).
    """
    if run.scores is not None:
        own = run.scores.parts("federated", metric)
        others = [run.scores.parts(model, metric) for model in models]
        if own is not None and all(other is not None for other in others):
            found = {}
            for model, other in zip(models, others, strict=True):
                apart = own[0] - other[0]
                found[model] = (float(apart.sum() / own[1].sum()), ratio_error(apart, own[1]))
            return found, PAIRED
    chosen = run.comparison or {}
    if metric == "accuracy" and all(model in chosen for model in models):
        return {m: (float(chosen[m]["difference"]), float(chosen[m]["standard_error"])) for m in models}, PAIRED_TEST
    merged, found = _last(run, "federated", metric), {}
    for model in models:
        alone = _last(run, model, metric)
        error = float(np.hypot(binomial_error(run, merged, metric), binomial_error(run, alone, metric)))
        found[model] = (merged - alone, error)
    return found, UNPAIRED if metric in PROPORTIONS else UNKNOWN


def ratio_error(total: np.ndarray, size: np.ndarray) -> float:
    """Standard error of sum(total) / sum(size) over independently drawn rows [n], by the ratio estimator.

    With R the ratio and e = total - R size, it is sqrt(n / (n - 1) sum(e^2)) / sum(size): for sizes of 1 the standard
    error of the mean (Cochran, Sampling Techniques, chapter 6). NaN with fewer than two rows.
    """
    rows = len(total)
    if rows < 2:
        return float("nan")
    left = total - total.sum() / size.sum() * size
    return float(np.sqrt(rows / (rows - 1) * np.square(left).sum()) / size.sum())


def binomial_error(run: FinishedRun, value: float, metric: str) -> float:
    """sqrt(p (1 - p) / n) of a share of the n validation rows; NaN for other metrics."""
    if metric not in PROPORTIONS:
        return float("nan")
    return float(np.sqrt(max(value * (1.0 - value), 0.0) / run.weight(metric)))


def _unpaired(run: FinishedRun, a: tuple[str, float], b: tuple[str, float], metric: str) -> float:
    """Standard error of the difference of two models' scores as if they had been scored on different rows; NaN if not known.

    An upper bound: it is the same rows, and what is hard for one model is hard for the other. For a share of right rows
    the two binomial errors; for a loss those of the models' last scores by row, in place of the earlier one's too.
    """

    def single(model: str, value: float) -> float:
        if metric in PROPORTIONS:
            return binomial_error(run, value, metric)
        parts = run.scores.parts(model, metric) if run.scores is not None else None
        return float("nan") if parts is None else ratio_error(*parts)

    return float(np.hypot(single(*a), single(*b)))


def trained(curve: np.ndarray) -> np.ndarray:
    """The points of a curve [points, 2] after training began."""
    return curve[curve[:, 0] > 0]


def inside_rounds(run: FinishedRun, metric: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The cohort's clients inside each round: positions [p] where all of them were scored, scores [clients, p].

    The position of round r's merge is r; the merged model that the round began with is not among the points.
    """
    found = {}
    for number, members in run.traces(metric).clients.items():
        own = [curve[curve[:, 0] > number - 1] for curve in members.values()]
        at = reduce(np.intersect1d, [curve[:, 0] for curve in own])
        if len(at):
            found[number] = (at, np.stack([curve[np.isin(curve[:, 0], at), 1] for curve in own]))
    return found


def format_score(value: float, metric: str, sign: bool = False) -> str:
    """A score or a difference as text: three decimals for shares of rows, else three digits; "-" for NaN."""
    if not np.isfinite(value):
        return "-"
    return f"{value + 0.0:{'+' if sign else ''}{'.3f' if metric in PROPORTIONS else '#.3g'}}".rstrip(".")


# ------------------------------------------------------------------------------------------------------- parts


def _over_seeds(
    name: str,
    demanded: str,
    line: Mapping[str, Any],
    runs: Runs,
    one: Callable[[FinishedRun], _Finding],
    strict: bool = False,
) -> Verdict:
    """Judge every run of the line's label by `one`, and their mean; `strict`: on the bound is not enough."""

    def holds(distance: float, allowance: float) -> bool | None:
        known = distance + (0.0 if np.isnan(allowance) else allowance)
        held = known > TINY if strict else known >= -TINY
        return None if np.isnan(allowance) and not held else held  # an allowance could only have helped

    found: list[tuple[FinishedRun, _Finding]] = []
    reasons: list[tuple[FinishedRun, str]] = []
    try:
        members = _runs(runs, str(line["run"]))
    except _NotJudged as reason:
        return _verdict(name, demanded, line, str(reason), None)
    for run in members:
        try:
            found.append((run, one(run)))
        except _NotJudged as reason:
            reasons.append((run, str(reason)))
    if not found:
        return _verdict(name, demanded, line, "; ".join(dict.fromkeys(text for _, text in reasons)), None)
    passed = holds(*(float(np.mean([getattr(f, key) for _, f in found])) for key in ("distance", "allowance")))
    if len(members) == 1:
        seen = found[0][1].text
    else:
        held = sum(holds(finding.distance, finding.allowance) is True for _, finding in found)
        seen = f"held for {held} of {len(found)} seeds"
        seen += "".join(f". Seed {run.seed}: {finding.text}" for run, finding in found)
        seen += "".join(f". Seed {run.seed} could not be judged: {text}" for run, text in reasons)
    return _verdict(name, demanded, line, seen, passed)


def _verdict(name: str, demanded: str, line: Mapping[str, Any], seen: str, passed: bool | None) -> Verdict:
    return Verdict(f"{name} ({line['run']})", demanded, seen, passed)


def _runs(runs: Runs, label: str) -> Sequence[FinishedRun]:
    if not runs.get(label):
        raise _NotJudged(f"no finished run {label!r}")
    return runs[label]


def _last(run: FinishedRun, model: str, metric: str) -> float:
    value = run.last(model, metric)
    if not np.isfinite(value):
        raise _NotJudged(f"no validation {metric} of the {model} model")
    return value


def _merged_and_mean(run: FinishedRun, metric: str) -> tuple[float, float]:
    sites = run.sites(metric)
    if not sites:
        raise _NotJudged(f"no validation {metric} of a site alone")
    alone = float(np.mean([run.last(f"local {site}", metric) for site in sites]))
    return _last(run, "federated", metric), alone


def _best_and_last(run: FinishedRun, site: str, metric: str) -> tuple[float, float, float]:
    """Of a site alone: where it was best after training began (in rounds), its score there, its score at the end."""
    curve = trained(run.curve(f"local {site}", metric))
    at = int(np.argmax(run.sign(metric) * curve[:, 1]))
    return float(curve[at, 0]), float(curve[at, 1]), float(curve[-1, 1])


def _sizes(run: FinishedRun) -> dict[str, int]:
    """Training rows of each client."""
    report = run.partition or {}
    return {
        str(name): int(size)
        for name, size in zip(report.get("client_names") or [], report.get("sizes") or [], strict=False)
    }


def _per_cent(place: float, run: FinishedRun) -> str:
    return f"{100 * place / run.rounds:.0f} %"


def _rows_of_class(run: FinishedRun, site: str, word: str) -> tuple[int, int]:
    """A class's number and how many training rows of it a site holds."""
    report = run.partition or {}
    sites, words = [list(map(str, report.get(key) or [])) for key in ("client_names", "class_names")]
    for value, known, what in ((site, sites, "site"), (word, words, "class")):
        if value not in known:
            raise _NotJudged(f"the partition has no {what} {value!r}, but {', '.join(known[:10]) or 'none'}")
    index = words.index(word)
    return index, int(report["class_counts"][sites.index(site)][index])


def _predictions(run: FinishedRun, site: str) -> dict[str, float]:
    """Validation rows predicted to be of each class by a site's own model at the end."""
    rows = run.rows
    rows = rows[(rows["scope"] == "local") & (rows["client"] == site) & (rows["split"] == "validation")]
    rows = rows[rows["name"].astype(str).str.startswith("predicted:")]
    last = rows.groupby(rows["name"].astype(str), sort=False)["value"].last()
    return {str(name).removeprefix("predicted:"): float(value) for name, value in last.items()}


def _teeth(run: FinishedRun, metric: str) -> dict[int, tuple[float, np.ndarray, float]]:
    """Rounds from 2 on: merged model at the start, clients' mean inside [p, 2], merged model after; more is better."""
    sign = run.sign(metric)
    merged = {int(at): sign * float(value) for at, value in run.curve("federated", metric)}
    found = {}
    for number, (at, values) in inside_rounds(run, metric).items():
        if number >= 2 and number - 1 in merged and number in merged and at[-1] == number:
            curve = np.column_stack([at, sign * values.mean(axis=0)])
            found[number] = (merged[number - 1], curve, merged[number])
    return found


def _than(line: Mapping[str, Any], runs: Runs, metric: str) -> str:
    """ "above" where more is better, "below" where less is; without a run by the metric's name."""
    found = runs.get(str(line["run"])) or []
    mode = mode_of(found[0].rows if found else pd.DataFrame(), metric)
    return "above" if mode == "max" else "below"


def _pair(run: FinishedRun, model: str, metric: str) -> str:
    ours, other = run.last("federated", metric), run.last(model, metric)
    return (
        f"merged {format_score(ours, metric)}, {model.removeprefix('local ')} {format_score(other, metric)} at the end"
    )


def _difference(value: float, error: float, metric: str) -> str:
    return f"{format_score(value, metric, sign=True)}, standard error {format_score(error, metric)}"


def _closest(distances: Sequence[float], texts: Sequence[str], most: int = 6) -> str:
    """The texts, or where there are many those of the least distances, in their order."""
    if len(texts) <= most:
        return "; ".join(texts)
    shown = sorted(np.argsort(distances, kind="stable")[:most])
    return "; ".join(texts[at] for at in shown) + f"; and {len(texts) - most} more, further away"


def _span(rounds: Sequence[int]) -> str:
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    whole = list(range(rounds[0], rounds[-1] + 1))
    return f"rounds {f'{rounds[0]} to {rounds[-1]}' if list(rounds) == whole else ', '.join(map(str, rounds))}"
