"""What a user sees while runs go on: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from fedsim.core.errors import visible
from fedsim.core.types import Report


class Progress:
    """Of one run: round, clients done, training tokens per second and time left.

    The time left is one estimate for the run: the rounds of all modes to come, training and evaluation, without the final
    evaluation and export of each mode. It is renewed at the end of each round and counts down in between. Throughput is of
    training alone.

    Args:
        show: False shows warnings alone.
        rounds: rounds of each mode.
    """

    def __init__(self, show: bool, rounds: int) -> None:
        self.show, self.rounds = show, rounds
        self._live: Any = None  # rich's progress bar, on a terminal
        self._mode, self._round = "", 0
        self._clients: set[int] = set()  # of the round
        self._tokens, self._training = 0, 0.0  # trained on in this mode, and seconds of it
        self._mark = self._last = 0.0  # when the last pack, and the last round, ended
        self._work: dict[str, tuple[float, int]] = {}
        self._done: dict[str, list[float]] = {}  # mode -> seconds of its rounds
        self._ends: float | None = None  # when the last round will have ended

    def plan(self, work: dict[str, tuple[float, int]]) -> None:
        """What is to come: mode -> (work of a round, in a unit that all modes share; rounds left), in order."""
        self._work = work

    def note(self, text: str) -> None:
        """One line."""
        if self.show:
            _print(text, self._live)

    def warn(self, text: str) -> None:
        """One line on what went wrong or may come out otherwise, shown in any case."""
        _print(text, self._live)

    def begin(self, mode: str, done: int) -> None:
        """A mode begins, `done` of its rounds behind it."""
        self._mode, self._tokens, self._training, self._round = mode, 0, 0.0, done
        self._clients.clear()
        now = time.monotonic()
        if self._ends is not None:  # what came between, final evaluation and export, is no part of the estimate
            self._ends += now - self._last
        self._mark = self._last = now
        if self.show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}")
            self._live = Bar(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
            self._live.start()
            self._live.add_task(mode, total=self.rounds, completed=done, text="")

    def pack(self, round: int, report: Report) -> None:
        """A pack is done."""
        # Packs of several workers overlap: the time since the last report, less the share that went into evaluation.
        now = time.monotonic()
        evaluated = min(1.0, report.scoring / report.seconds) if report.seconds > 0 else 0.0
        self._training += (now - self._mark) * (1.0 - evaluated)
        self._mark = now
        self._tokens += report.tokens
        self._clients |= report.steps.keys()  # a round may start again, and a client twice in a round
        self._update(text=f"round {round}/{self.rounds}, {self._counted()} done{self._pace()}")

    def round(self, round: int, text: str) -> None:
        """A round is done; `text` says what came out."""
        now = time.monotonic()
        self._done.setdefault(self._mode, []).append(now - self._last)
        self._mark = self._last = now
        self._round = round
        self._estimate(now)
        self._update(completed=round, text=f"round {round}/{self.rounds} done{self._pace()}")
        if self.show:
            _print(f"{self._mode:9s} round {round}/{self.rounds}  {self._counted()}{self._pace()}  {text}", self._live)
        self._clients.clear()

    def end(self) -> None:
        """The mode is over; may be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _update(self, **shown: Any) -> None:
        if self._live is not None:
            self._live.update(self._live.task_ids[0], **shown)

    def _counted(self) -> str:
        return f"{len(self._clients)} client{'s' * (len(self._clients) != 1)}"

    def _to_come(self) -> list[str]:
        """Modes that have rounds left, the present one first."""
        modes = list(self._work)
        later = modes[modes.index(self._mode) + 1 :] if self._mode in modes else []
        now = [self._mode] if self._round < self.rounds else []
        return now + [mode for mode in later if self._work[mode][1] > 0]

    def _estimate(self, now: float) -> None:
        """When the last round will have ended: this mode at its own pace, later ones at that of all work so far."""
        own = self._done[self._mode]
        left = (self.rounds - self._round) * sum(own) / len(own)
        worked = sum(len(each) * self._work.get(mode, (0.0, 0))[0] for mode, each in self._done.items())
        if worked > 0:
            later = [self._work[mode] for mode in self._to_come() if mode != self._mode]
            left += sum(work * rounds for work, rounds in later) * sum(map(sum, self._done.values())) / worked
        self._ends = now + left if self._to_come() else None

    def _pace(self) -> str:
        rate = f", {self._tokens / self._training:,.0f} training tokens/s" if self._training > 0 else ""
        if self._ends is None:
            return rate
        seconds = max(0.0, self._ends - time.monotonic())
        near = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        about = near if seconds < 5400 else f"{seconds / 3600:.1f} h"
        return f"{rate}, about {about} left ({', '.join(self._to_come())})"


class Relay(Progress):
    """Of one of many runs, told to whoever shows them all.

    Args:
        tell: called with `shows` or `warns`, and a line.
    """

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        super().__init__(False, 0)
        self._tell = tell

    def round(self, round: int, text: str) -> None:
        """A round is done."""
        self._tell("shows", f"{self._mode} round {round}: {text}")

    def warn(self, text: str) -> None:
        """One line on what went wrong."""
        self._tell("warns", text)


class Board:
    """Of many runs: a live table on a terminal, a line for each change elsewhere.

    Args:
        show: False shows warnings alone.
        names: what each run is called.
    """

    def __init__(self, show: bool, names: list[str]) -> None:
        self.show, self.names = show, [visible(name) for name in names]
        self.states, self.texts = ["waiting"] * len(names), [""] * len(names)
        self._began, self._live = time.monotonic(), None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), get_renderable=self._table, refresh_per_second=2)
            self._live.start()

    def update(self, run: int, state: str, text: str) -> None:
        """A run has another state, or more to say."""
        before, self.states[run], self.texts[run] = self.states[run], state, visible(text)
        if self.show and self._live is None and state != before:
            place = f"{run + 1}/{len(self.names)}"
            _print(f"{place:>9s}  {state:8s}  {self.names[run]}  {self.texts[run]}".rstrip())

    def warn(self, run: int, text: str) -> None:
        """A line on what went wrong in a run, shown in any case."""
        _print(f"{run + 1}/{len(self.names)}  {self.names[run]}  {text}", self._live)

    def tell(self, run: int, kind: str, text: str) -> None:
        """What a run's `Relay` says."""
        if kind == "warns":
            self.warn(run, text)
        else:
            self.update(run, "running", text)

    def end(self) -> None:
        """All is over; may be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Any:
        """As many runs as the terminal has lines for: those at work first, then failed, the latest finished, the next."""
        from rich.table import Table
        from rich.text import Text

        looks = {"finished": "green", "running": "bold", "failed": "red", "waiting": "dim"}
        of = {s: [i for i, state in enumerate(self.states) if state == s] for s in looks}
        done, minutes = len(of["finished"]) + len(of["failed"]), (time.monotonic() - self._began) / 60
        counts = ", ".join(f"{len(runs)} {state}" for state, runs in of.items() if runs)
        title = f"{done} of {len(self.names)} runs, {minutes:.0f} min: {counts}"
        table = Table(title=title, title_justify="left", expand=True)
        for name in ("#", "run", "state", ""):
            table.add_column(name, no_wrap=name != "")
        room = max(4, (self._live.console.height if self._live is not None else 24) - 6)
        urgent = of["running"] + of["failed"]
        left = max(0, room - len(urgent))
        late = of["finished"][-max(3, left - len(of["waiting"])) :][-left:] if left else []
        for i in sorted([*urgent, *late, *of["waiting"][: left - len(late)]][:room]):
            state = self.states[i]
            table.add_row(str(i + 1), Text(self.names[i]), Text(state, style=looks[state]), Text(self.texts[i]))
        return table


def _print(text: str, live: Any = None) -> None:
    """A line on standard error, above what is live there; clients' ids and label words come from the user's data."""
    if live is not None:
        live.console.print(visible(text), markup=False, highlight=False)
    else:
        print(visible(text), file=sys.stderr, flush=True)
