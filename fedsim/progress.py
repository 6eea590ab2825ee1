"""What a user sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from fedsim.errors import visible
from fedsim.types import Report


class Progress:
    """Round, phase, clients done, tokens per second and time left.

    Args:
        show: False shows warnings alone.
        rounds: rounds of each mode.
    """

    def __init__(self, show: bool, rounds: int) -> None:
        self.show, self.rounds = show, rounds
        self._live: Any = None
        self._task: Any = None
        self._terminal = show and sys.stderr.isatty()
        self._mode, self._began, self._tokens, self._first = "", 0.0, 0, 0
        self._clients, self._round = 0, 0

    def note(self, text: str) -> None:
        """One line."""
        if self.show:
            self._print(text)

    def warn(self, text: str) -> None:
        """One line on what went wrong or may come out otherwise: shown where progress is not, too."""
        if self.show:
            self.note(text)
        else:
            self._print(text)

    def begin(self, mode: str, done: int) -> None:
        """A mode begins, `done` of its rounds behind it."""
        self._mode, self._began, self._tokens, self._first, self._round = mode, time.monotonic(), 0, done, done
        self._clients = 0
        if not self._terminal:
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
        )
        self._live = Bar(*columns, console=Console(stderr=True), transient=True)
        self._live.start()
        self._task = self._live.add_task(mode, total=self.rounds, completed=done, text="")

    def pack(self, round: int, report: Report) -> None:
        """A pack is done."""
        self._tokens += report.tokens
        self._clients = (self._clients if report.index else 0) + len(report.steps)  # a round may start again
        if self._live is not None:
            rate = self._tokens / max(1e-9, time.monotonic() - self._began)
            text = f"round {round}/{self.rounds}, {self._clients} clients done, {rate:,.0f} tokens/s{self._left()}"
            self._live.update(self._task, text=text)

    def round(self, round: int, text: str) -> None:
        """A round is done; `text` says what came out."""
        self._round = round
        if self._live is not None:
            self._live.update(self._task, completed=round)
        if self.show:
            rate = self._tokens / max(1e-9, time.monotonic() - self._began)
            self._print(
                f"{self._mode:9s} round {round}/{self.rounds}  {self._clients} clients  {rate:,.0f} tokens/s{self._left()}  {text}"
            )
        self._clients = 0

    def end(self) -> None:
        """The mode is over; may be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left(self) -> str:
        done = self._round - self._first
        if done == 0 or self._round >= self.rounds:
            return ""
        seconds = (time.monotonic() - self._began) / done * (self.rounds - self._round)
        return f", {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"

    def _print(self, text: str) -> None:
        text = visible(text)  # clients' ids and label words come from the user's data
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


class Board:
    """Many runs: a live table on a terminal, a line for each change elsewhere.

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
            print(
                f"{place:>9s}  {state:8s}  {self.names[run]}  {self.texts[run]}".rstrip(), file=sys.stderr, flush=True
            )

    def warn(self, run: int, text: str) -> None:
        """A line on what went wrong in a run; shown where the table is not, too."""
        line = visible(f"{run + 1}/{len(self.names)}  {self.names[run]}  {text}")
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def reporter(self, run: int) -> Progress:
        """Where a run in this process says what goes on."""
        return _Reporter(self, run)

    def end(self) -> None:
        """All is over; may be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Any:
        """As many runs as the terminal has lines for: those at work first, then failed, the latest finished, the next."""
        from rich.table import Table
        from rich.text import Text

        counts = {s: self.states.count(s) for s in ("finished", "running", "failed", "waiting")}
        done, minutes = counts["finished"] + counts["failed"], (time.monotonic() - self._began) / 60
        said = ", ".join(f"{n} {s}" for s, n in counts.items() if n)
        table = Table(
            title=f"{done} of {len(self.names)} runs, {minutes:.0f} min: {said}", title_justify="left", expand=True
        )
        for name in ("#", "run", "state", ""):
            table.add_column(name, no_wrap=name != "")
        room = max(4, (self._live.console.height if self._live is not None else 24) - 6)
        of = {s: [i for i, state in enumerate(self.states) if state == s] for s in counts}
        urgent = of["running"] + of["failed"]
        left = max(0, room - len(urgent))
        late = of["finished"][-max(3, left - len(of["waiting"])) :][-left:] if left else []
        shown = [*urgent, *late, *of["waiting"][: left - len(late)]][:room]
        look = {"running": "bold", "failed": "red", "finished": "green", "waiting": "dim"}
        for i in sorted(shown):
            state = self.states[i]
            table.add_row(str(i + 1), Text(self.names[i]), Text(state, style=look[state]), Text(self.texts[i]))
        return table


class _Reporter(Progress):
    def __init__(self, board: Board, run: int) -> None:
        super().__init__(False, 0)
        self._board, self._run = board, run

    def round(self, round: int, text: str) -> None:
        """A round is done."""
        self._board.update(self._run, "running", f"{self._mode} round {round}: {text}")

    def warn(self, text: str) -> None:
        """One line on what went wrong."""
        self._board.warn(self._run, text)
