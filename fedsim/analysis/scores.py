"""The models that a run kept and their scores; the summary table that closes a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from fedsim.analysis.load import SCOPES, mode_of, require_metric, rows_of
from fedsim.core.errors import UserError

MATCHED = {"epochs": "same examples as all clients", "steps": "same steps as one client"}  # by `central.match`
_MODEL = ["scope", "client"]
_SUMMARY = ["model", "round", "validation", "site", "test", "steps"]


def central_budget(matches: Iterable[Any]) -> str:
    """The part of the clients' budget that the centralized runs have, from their `central.match`; "" where they differ or
    do not say.
    """
    found = set(matches)
    return MATCHED.get(found.pop(), "") if len(found) == 1 else ""


def model_scores(df: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The models that one run kept, with their scores: the local models, then the global one, then the centralized one.

    There are two of each, that of the last round and the one that validation chose: the one whose test score is recorded;
    where none is, the best at the ends of rounds by the run's `best.metric`; of equal ones the one with the lower loss, then
    the later one.

    Args:
        df: the rows of one run from `load_runs`.
        metric: a recorded name.

    Returns:
        A row per model: `scope` and `client` (None for the global and the centralized one); of the last model `last_round`,
        `last` (validation), `own` (a client's own validation examples; of the global model, or of the models that clients keep
        in its place, the mean over clients) and `steps` (optimizer steps); of the chosen one `round`, `best` (validation), `best_own`, `test` and `best_steps`.
        Missing where nothing was recorded.
    """
    floats = {"scope": object, "name": object, "round": float, "step": float}
    rows = pd.concat([rows_of(df, scope) for scope in SCOPES]).astype(floats)
    rows["client"] = rows["client"].where(rows["scope"] == "local", "")
    keys = [*_MODEL, "round"]
    steps = rows.groupby(keys)["step"].max()
    at_end = rows[(rows["step"] == rows.groupby(keys)["step"].transform("max")) & (rows["round"] > 0)]
    at_end = at_end.dropna(subset="value")
    validation = at_end[at_end["split"] == "validation"].groupby([*keys, "name"])["value"].last().unstack()
    # What the global model scores on a client's own examples is recorded per client; so are clients' own models.
    merged = df[(df["scope"] == "federated") & (df["split"] == "site") & df["client"].notna()]
    named = f"own_{metric}" if (merged["name"] == f"own_{metric}").any() else f"merged_{metric}"
    merged = merged[merged["name"] == named]
    own = at_end[(at_end["split"] == "site") & (at_end["name"] == metric) & (at_end["scope"] != "federated")]
    merged = merged.assign(client="").astype(floats).groupby(keys)["value"].mean()
    own = pd.concat([own.groupby(keys)["value"].last(), merged])
    tested = rows[rows["split"] == "test"]

    models = rows[_MODEL].drop_duplicates().set_index(_MODEL)
    models["last_round"] = validation.index.to_frame(index=False).groupby(_MODEL)["round"].max()
    models["round"] = tested.groupby(_MODEL)["round"].last()
    models["round"] = models["round"].fillna(_chosen(df, metric, validation))
    models["test"] = tested[tested["name"] == metric].groupby(_MODEL)["value"].last()
    score = validation.get(metric, steps * np.nan)
    columns = {
        "last_round": {"last": score, "own": own},
        "round": {"best": score, "best_own": own, "best_steps": steps},
    }
    for number, of_round in columns.items():
        at = pd.MultiIndex.from_arrays([*map(models.index.get_level_values, _MODEL), models[number]])
        models = models.assign(**{name: values.reindex(at).to_numpy() for name, values in of_round.items()})
    models["steps"] = steps.groupby(_MODEL).max()
    models = models.reset_index()
    return models.assign(client=models["client"].astype(object).where(models["client"] != "", None))


def _chosen(df: pd.DataFrame, metric: str, validation: pd.DataFrame) -> pd.Series:
    """Model -> the round whose model is the best: the rule of `fedsim.simulate.rounds.Choice`, for a run without test scores."""
    said = df["best.metric"].dropna() if "best.metric" in df else ()
    by = str(said.iloc[0]) if len(said) else metric
    none, sign = pd.Series(np.nan, validation.index), 1.0 if mode_of(df, by) == "max" else -1.0
    table = pd.DataFrame({"score": sign * validation.get(by, none), "loss": -validation.get("loss", none)})
    table = table.dropna(subset="score").reset_index().sort_values(["score", "loss", "round"], na_position="first")
    return table.groupby(_MODEL)["round"].last()


def summary(df: pd.DataFrame, metric: str = "accuracy", which: str = "both") -> pd.DataFrame:
    """The table that closes a run: the local models, their mean, federated, central; a row per model.

    Args:
        df: rows from `load_runs`; with several runs a column `run` comes first.
        metric: "accuracy", "loss", "exact_match" or any other recorded name.
        which: "best" = the models that validation chose, "last" = those of the last round; "both" = the chosen ones, and
            where the last one is another model, a row `... (last)` after it.

    Returns:
        Columns `model`, `round` (after which the model was scored, Int64; NA in the mean over clients), `validation`, `site`
        (own validation examples; the mean over clients for the global model), `test` (scored for the chosen models alone),
        `steps` (optimizer steps by then, Int64). NaN where nothing was recorded. The mean over clients is unweighted. Where clients
        have models of their own, the federated row is their mean weighted by training examples, and rows `own mean`, `own worst`,
        `own q10`, ... follow.

    Raises:
        UserError: no run recorded the metric, or `which` is none of these.
    """
    if which not in ("best", "last", "both"):
        raise UserError(f"which={which!r} is unknown; use best, last or both")
    require_metric(df, metric)
    runs = {str(run): _summary(rows, metric, which) for run, rows in df.groupby("run", sort=False, observed=True)}
    out = pd.concat(runs, names=["run"]).reset_index("run")
    return out.drop(columns="run" if len(runs) == 1 else []).reset_index(drop=True)


def _summary(df: pd.DataFrame, metric: str, which: str) -> pd.DataFrame:
    models = model_scores(df, metric)
    local = (models["scope"] == "local").to_numpy()
    models["model"] = models["scope"].where(~local, "local " + models["client"].fillna("")).astype(str)
    best = models[["model", "round", "best", "best_own", "test", "best_steps"]].set_axis(_SUMMARY, axis=1)
    last = models[["model", "last_round", "last", "own", "test", "steps"]].set_axis(_SUMMARY, axis=1)
    last["test"] = last["test"].where(
        last["round"] == best["round"]
    )  # last models are tested only where they are chosen
    if local.any():
        best, last = (pd.concat([one, _mean_of(one[local])]).sort_index() for one in (best, last))
    same = (best.eq(last) | (best.isna() & last.isna())).all(axis=1)
    if which == "both":
        other = last[~same]
        best = pd.concat([best, other.assign(model=other["model"] + " (last)")]).sort_index(kind="stable")
    chosen = last if which == "last" else best
    return pd.concat([chosen, _over_clients(df, metric, chosen)]).astype({"round": "Int64", "steps": "Int64"})


def _over_clients(df: pd.DataFrame, metric: str, models: pd.DataFrame) -> pd.DataFrame:
    """Rows of mean, weighted mean, worst and quantiles over the clients' own models, of the round of the federated row."""
    federated = models[models["model"] == "federated"]
    rows = df[(df["scope"] == "federated") & df["client"].isna() & df["value"].notna()]
    if federated.empty or not (rows["name"] == f"own_{metric}_mean").any():
        return models.iloc[:0]
    of_round = rows[rows["round"] == federated["round"].iloc[0]].astype({"split": object, "name": object})
    values = of_round.groupby(["split", "name"])["value"].last()
    out = []
    for what in ("mean", "weighted_mean", "worst", "q10", "q25", "q50", "q75", "q90"):
        name = f"own_{metric}_{what}"
        found = {s: values.get((s, name), np.nan) for s in ("validation", "site", "test")}
        if what == "weighted_mean":
            found |= {s: federated[s].iloc[0] for s in ("validation", "test")}
        out.append({"model": f"own {what.replace('_', ' ')}", **federated[["round", "steps"]].iloc[0], **found})
    return pd.DataFrame(out)[_SUMMARY]


def _mean_of(clients: pd.DataFrame) -> pd.DataFrame:
    """The row of the mean, which stands behind those of the clients."""
    mean = clients[["validation", "site"]].mean().to_dict()
    mean |= {"test": clients["test"].mean(skipna=False), "steps": clients["steps"].max(), "round": np.nan}
    return pd.DataFrame([{"model": "local mean"} | mean], index=[clients.index[-1] + 0.5])
