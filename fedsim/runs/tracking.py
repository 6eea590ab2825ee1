"""Trackers are told each committed metric once, whatever stops the run."""

from __future__ import annotations

import json
from typing import Any

from fedsim.config.experiment import Experiment
from fedsim.core.files import read_checked, write_checked
from fedsim.runs.folder import RunFolder
from fedsim.runs.trackers import Trackers


class Tracking:
    """The trackers of a run, and what they have been told: `checkpoints/tracked.json`."""

    def __init__(self, exp: Experiment, folder: RunFolder) -> None:
        self._folder, self._file = folder.path, folder.path / "checkpoints" / "tracked.json"
        known = read_checked(self._file) or {}
        self._told: dict[str, int] = dict(known.get("told", {}))  # bytes of each mode's metrics
        settings = exp.tracking
        self.trackers = Trackers(
            settings.with_, exp.name, folder.path, exp.to_dict(), known.get("trackers"), settings.clients
        )
        self._note()

    def tell(self, mode: str, mark: dict[str, Any]) -> None:
        """Log a mode's metrics up to a mark, less those that were logged before."""
        begin = self._told.get(mode, 0)
        if not self.trackers or begin >= mark["bytes"]:
            return
        with (self._folder / "metrics" / f"{mode}.jsonl").open("rb") as file:
            file.seek(begin)
            lines = file.read(mark["bytes"] - begin).splitlines()
        self.trackers.log([json.loads(line) for line in lines])
        self._told[mode] = mark["bytes"]
        self._note()

    def cut(self, mode: str, mark: dict[str, Any]) -> None:
        """A mode's metrics now end here: later ones will be other bytes, of which trackers leave out the rounds they know."""
        if self._told.get(mode, 0) > mark["bytes"]:
            self._told[mode] = mark["bytes"]
            self._note()

    def _note(self) -> None:
        if self.trackers:
            self._file.parent.mkdir(exist_ok=True)
            write_checked(self._file, {"told": self._told, "trackers": self.trackers.state})

    def close(self) -> None:
        """Finish; may be called twice."""
        self.trackers.close()
