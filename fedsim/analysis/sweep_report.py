"""The report of a sweep: its settings, its claims and its figures, as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsim.analysis.claims import WORDS, Claim, judge
from fedsim.analysis.documents import render
from fedsim.analysis.load import PathLike, run_labels
from fedsim.analysis.report import environment_of
from fedsim.analysis.sweeps import cells, members_of, sweep_table, swept_keys
from fedsim.analysis.tables import frame_table
from fedsim.core.files import check_own, read_json, write_atomic

NAMES = ("report.md", "report.html")


def write_report(path: PathLike, figures: Sequence[Path] = (), metric: str | None = None) -> list[Path]:
    """Write `report.md` and `report.html` into a sweep's folder.

    Args:
        path: the sweep's folder.
        figures: PNG files below it that are shown.
        metric: as in `sweep_table`.

    Returns:
        The files written.

    Raises:
        UserError: as `sweep_table`; or a claim about a key that was not swept.
    """
    path = Path(path)
    check_own(path, names=NAMES)
    about = read_json(path / "sweep.json")
    table = sweep_table(path, metric)
    members = members_of(path)[1]
    labels = run_labels([run for run, _ in members])
    known = list(zip(labels, (settings for _, settings in members), strict=True))
    judged = [judge(Claim(**one), known, table, about.get("tuned") or ()) for one in about.get("claims") or []]
    counts = [f"{sum(one.holds is holds for one in judged)} {word}" for holds, word in WORDS.items()]
    shown = {figure.relative_to(path).as_posix(): figure for figure in figures if figure.suffix == ".png"}
    markdown, page = render(
        "sweep",
        shown,
        title=about.get("title") or str(about["name"]),
        metric=str(table["metric"].iloc[0]),
        cells=frame_table(cells(table).drop(columns=["js_mean", "size_gini"]), swept_keys(table)),
        judged=sorted(judged, key=lambda one: [*WORDS].index(one.holds)),
        counts=", ".join(counts),
        words=WORDS,
        figures=list(shown),
        setup={"command": about.get("command"), **environment_of(run for run, _ in members)},
        finished=len(members),
        listed=len(about["runs"]),
        notes=(about.get("notes") or "").strip(),
    )
    for name, text in zip(NAMES, (markdown, page), strict=True):
        write_atomic(path / name, text.encode())
    return [path / name for name in NAMES]
