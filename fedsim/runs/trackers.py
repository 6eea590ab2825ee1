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
from fedsim.core.files import CROSS

_SUMS = ("tokens", "computed_tokens", "bytes_up", "bytes_down")
_LATE = ("run", "test")  # known after their round: they go with what is logged next
_MOST_SIBLINGS = 200
_UNUSABLE = re.compile(r"[^\w .-]")  # characters that MLflow refuses in names


def check_trackers(names: Sequence[str]) -> None:
    """Whether the trackers' packages, which are called as they are, can be imported.

    Raises:
        UserError: if one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracking.with: {name!r} is not installed; pip install {name}, or take it off the list")


class Trackers:
    """The trackers of one run; see `check_trackers` for what they need.

    Args:
        names: tensorboard | wandb | mlflow.
        experiment: the experiment's or sweep's name: project and group in W&B, experiment in MLflow.
        folder: the run folder; TensorBoard writes into it.
        config: the resolved config.
        state: of an earlier start of this run: a resumed run continues in the same places.
        clients: log each client's metrics, too.

    Attributes:
        state: the run's name, its id in each tracker, and the last round that was logged of each scope.
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
            self.state[name] = name
            if name == "wandb":
                tracker.run.define_metric("round")
                tracker.run.define_metric("*", step_metric="round")
                self.state[name] = str(tracker.run.id)
            elif name == "mlflow":
                self.state[name] = str(tracker.active_run.info.run_id)
            if known is None:  # MLflow refuses a second value of a parameter
                tracker.store_init_configuration(_parameters(config))
            self._trackers.append(tracker)

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log committed metrics, as the run folder has them: one call per round and scope.

        Rounds that were logged before are left out: a run with more rounds writes metrics of its later modes again.
        """
        logged = self.state["rounds"]

        def is_new(row: Mapping[str, Any]) -> bool:
            if row["split"].startswith(CROSS):  # of a matrix: its figure is logged
                return False
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
        """Log the PNG files in a folder, of the run's last round: as an artifact, in TensorBoard as images."""
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
    """The rounds in metrics, in their order, each with its named values.

    Args:
        rows: as the run folder has them. Counts of predictions by word are left out.
        clients: give each client's values under `clients/scope/split/metric/client`, too.
    """
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    late: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["split"] in _LATE:
            late.setdefault(row["scope"], []).append(row)
        else:
            groups.setdefault((row["scope"], row["round"]), []).extend([*late.pop(row["scope"], ()), row])
    for scope, rest in late.items():  # with the last round of their scope
        own = (scope, max(row["round"] for row in rest))
        groups.setdefault(next((key for key in reversed(groups) if key[0] == scope), own), []).extend(rest)
    for (scope, round), members in groups.items():
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
        each = list(found.values())
        split, name = key.split("/")[1:3]
        if name in _SUMS:
            values[key] = sum(each)
        elif split == "fault":
            values[key] = float(len(each))  # clients
        else:
            values |= {f"{key}_mean": sum(each) / len(each), f"{key}_min": min(each), f"{key}_max": max(each)}
        if clients:
            values |= {f"clients/{key}/{_UNUSABLE.sub('_', client)}": value for client, value in found.items()}
    seconds = [row["seconds"] for row in rows if row.get("seconds") is not None]
    return values | ({f"{scope}/seconds": max(seconds)} if seconds else {})


def _parameters(config: dict[str, Any]) -> dict[str, Any]:
    from fedsim.analysis.configs import flatten_config

    flat = flatten_config(config).items()
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in flat}


def _name(folder: Path, config: dict[str, Any]) -> str:
    """A run's name in a tracker: its settings in the sweep, else where its config differs from the runs beside it."""
    from fedsim.analysis.configs import MISSING, differences, say
    from fedsim.analysis.load import read_config

    settings: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        listed = json.loads((folder.parent / "sweep.json").read_text(encoding="utf-8"))["runs"]
        settings = next((dict(run["settings"]) for run in listed if run["run"] == folder.name), {})
    if not settings:
        beside = [config]
        for file in sorted(folder.parent.glob("*/config.yaml"))[:_MOST_SIBLINGS]:
            with contextlib.suppress(UserError, OSError):
                beside.append(read_config(file.parent))
        settings = {key: values[0] for key, values in differences(beside).items() if values[0] is not MISSING}
    return " ".join(f"{key}={say(value)}" for key, value in (settings or {"seed": config.get("seed")}).items())
