"""Experiment trackers - TensorBoard, W&B, MLflow - through accelerate: one step per round, with a few named metrics.

A name is `scope/split/metric`: `federated/validation/loss` is of the global model, `local/validation/loss_mean` (`_min`, `_max`)
of all clients; tokens and bytes are sums over clients. The step is the round.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.core.errors import UserError

_PACKAGE = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_SUMS = ("tokens", "computed_tokens", "bytes_up", "bytes_down")
_LATE = ("run", "test")  # known after their round: they go with what is logged next
_MOST_SIBLINGS = 200
_UNUSABLE = re.compile(r"[^\w .-]")  # characters that MLflow refuses in names


def check_trackers(names: Sequence[str]) -> None:
    """Whether the trackers' packages are here.

    Raises:
        UserError: if one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(_PACKAGE[name]) is None:
            raise UserError(
                f"tracking.with: {name!r} is not installed; pip install {_PACKAGE[name]}, or take it off the list"
            )


class Trackers:
    """The trackers of one run; see `check_trackers` for what they need.

    Args:
        names: tensorboard | wandb | mlflow.
        experiment: the experiment's or sweep's name: project and group in W&B, experiment in MLflow.
        folder: the run folder; TensorBoard writes into it.
        config: the resolved config.
        state: what an earlier start of this run had as `state`: a resumed run goes on in the same places.
        clients: log each client's metrics, too.

    Attributes:
        state: the run's name, its id in W&B and MLflow, and the last round that was logged of each scope.
    """

    def __init__(
        self,
        names: Sequence[str],
        experiment: str,
        folder: Path,
        config: dict[str, Any],
        state: Mapping[str, Any] | None = None,
        clients: bool = False,
    ) -> None:
        self._trackers: list[Any] = []
        self._clients = clients
        self.state: dict[str, Any] = {"rounds": {}, **(state or {})}
        if not names:
            return
        from accelerate import PartialState, tracking

        PartialState()  # what the trackers log with; W&B alone would not make it

        run_name = self.state.setdefault("name", _name(folder, config))
        for name in names:
            known = self.state.get(name)
            if name == "tensorboard":
                place = re.sub(r"[^\w.,=+-]", "_", run_name)[:100]
                tracker = tracking.TensorBoardTracker(run_name=place, logging_dir=folder / "tensorboard")
            elif name == "wandb":
                settings = {"name": run_name, "group": experiment, "id": known, "resume": "allow" if known else None}
                tracker = tracking.WandBTracker(run_name=experiment, **settings)
            else:
                tracker = tracking.MLflowTracker(experiment_name=experiment, run_name=run_name, run_id=known)
            tracker.start()
            if name == "wandb":
                tracker.run.define_metric("round")
                tracker.run.define_metric("*", step_metric="round")
            if known is None:  # MLflow refuses a second value of a parameter
                tracker.store_init_configuration(_flat(config))
            self.state[name] = _id(name, tracker)
            self._trackers.append(tracker)

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log committed metrics rows, as `metrics.jsonl` has them: one call for each round of a scope.

        Rounds that were logged before are left out: a run with more rounds writes rows of its later modes again.
        """
        logged = self.state["rounds"]

        def is_new(row: Mapping[str, Any]) -> bool:
            before = logged.get(row["scope"], -1)
            return row["split"] == "test" or row["round"] > before - (row["split"] == "run")

        rows = [row for row in rows if is_new(row)]
        for round, values in by_round(rows, self._clients) if self._trackers else ():
            for tracker in self._trackers:
                # W&B drops what is logged for a step behind its last one, and each scope starts at round 0.
                if tracker.name == "wandb":
                    tracker.log({"round": round, **values})
                else:
                    tracker.log(values, step=round)
        for row in rows:
            if row["split"] not in _LATE:
                logged[row["scope"]] = max(row["round"], logged.get(row["scope"], 0))

    def log_figures(self, folder: Path, round: int) -> None:
        """Log the figures in a folder: as an artifact, in TensorBoard as images.

        Args:
            folder: with PNG files.
            round: the run's last round.
        """
        files = sorted(folder.glob("*.png"))
        for tracker in self._trackers if files else ():
            if tracker.name == "wandb":
                tracker.run.log_artifact(str(folder), name=f"figures-{tracker.run.id}", type="figures")
            elif tracker.name == "mlflow":
                tracker.log_artifacts(str(folder), "figures")
            else:
                from matplotlib.image import imread

                for file in files:
                    tracker.writer.add_image(f"figures/{file.stem}", imread(file)[..., :3], round, dataformats="HWC")

    def close(self) -> None:
        """Finish; may be called twice."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def by_round(rows: Sequence[Mapping[str, Any]], clients: bool = False) -> Iterator[tuple[int, dict[str, float]]]:
    """The rounds in metrics rows, in their order, each with its named values.

    Args:
        rows: as `metrics.jsonl` has them. Counts of predictions by word are left out.
        clients: give each client's values under `clients/scope/split/metric/client`, too.
    """
    groups: list[tuple[str, int, list[Mapping[str, Any]]]] = []
    late: list[Mapping[str, Any]] = []

    def end_late() -> None:
        if late and groups and groups[-1][0] == late[0]["scope"]:
            groups[-1][2].extend(late)
        elif late:
            groups.append((late[0]["scope"], max(row["round"] for row in late), list(late)))
        late.clear()

    for row in rows:
        scope, round = row["scope"], row["round"]
        if row["split"] in _LATE:
            late.append(row)
            continue
        if not groups or groups[-1][:2] != (scope, round):
            if late and late[0]["scope"] != scope:
                end_late()
            groups.append((scope, round, []))
        groups[-1][2].extend([*late, row])
        late.clear()
    end_late()
    for scope, round, members in groups:
        yield round, _values(scope, members, clients)


def _values(scope: str, rows: Sequence[Mapping[str, Any]], clients: bool) -> dict[str, float]:
    values: dict[str, float] = {}
    of_clients: dict[str, dict[str, float]] = {}
    for row in rows:
        if ":" in row["name"] or row["value"] is None:
            continue
        key = f"{scope}/{row['split']}/{row['name']}"
        if row["client"] is None:
            values[key] = float(row["value"])
        else:
            of_clients.setdefault(key, {})[row["client"]] = float(row["value"])
    for key, found in of_clients.items():
        split, name = key.split("/")[1:3]
        if name in _SUMS:
            values[key] = sum(found.values())
        elif split == "fault":
            values[key] = float(len(found))  # clients
        else:
            values |= {f"{key}_mean": sum(found.values()) / len(found)}
            values |= {f"{key}_min": min(found.values()), f"{key}_max": max(found.values())}
        for client, value in found.items() if clients else ():
            values[f"clients/{key}/{_UNUSABLE.sub('_', client)}"] = value
    seconds = [row["seconds"] for row in rows if row.get("seconds") is not None]
    return values | ({f"{scope}/seconds": max(seconds)} if seconds else {})


def _id(name: str, tracker: Any) -> str:
    if name == "wandb":
        return str(tracker.run.id)
    return str(tracker.active_run.info.run_id) if name == "mlflow" else "tensorboard"


def _name(folder: Path, config: dict[str, Any]) -> str:
    """A run's name in a tracker: its settings in the sweep, else where its config differs from the runs beside it."""
    from fedsim.analysis.configs import MISSING, differences, say
    from fedsim.analysis.load import read_config

    settings: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        listed = json.loads((folder.parent / "sweep.json").read_text(encoding="utf-8"))["runs"]
        settings = next(
            dict(run["settings"])
            for run in [*listed, {"run": folder.name, "settings": {}}]
            if run["run"] == folder.name
        )
    if not settings:
        beside = [config]
        for file in sorted(folder.parent.glob("*/config.yaml"))[:_MOST_SIBLINGS]:
            with contextlib.suppress(UserError, OSError):
                beside.append(read_config(file.parent))
        settings = {key: values[0] for key, values in differences(beside).items() if values[0] is not MISSING}
    return " ".join(f"{key}={say(value)}" for key, value in (settings or {"seed": config.get("seed")}).items())


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return out
