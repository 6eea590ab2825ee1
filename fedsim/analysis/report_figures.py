"""The figures of a report: curves of each setting, and each different partition once."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from fedsim.analysis import plots
from fedsim.analysis.finished import FinishedRun
from fedsim.analysis.load import load_runs
from fedsim.analysis.report_spec import Panel, Report
from fedsim.analysis.style import STYLE, new_figure, save_figure


@dataclass(frozen=True)
class RunGroup:
    """The runs of one label, which differ in their seed alone."""

    label: str
    title: str
    runs: list[FinishedRun]

    def metrics(self) -> pd.DataFrame:
        """Their metrics in one table; copies of one run in several folders stay apart."""
        return self.runs[0].metrics if len(self.runs) == 1 else load_runs([run.path for run in self.runs])


@dataclass(frozen=True)
class Picture:
    """A PNG file, its place relative to the report, what it shows in a few words, and its caption."""

    file: Path
    place: str
    shows: str
    caption: str


def draw_figures(
    report: Report, groups: Mapping[str, RunGroup], out: Path, formats: Sequence[str]
) -> tuple[list[Picture], list[str]]:
    """Write the figures to `out/figures`.

    Returns:
        The figures, and the titles of panels that cannot be drawn.
    """
    metric, pictures, missing = report.metric, [], []
    wanted = report.figures or [Panel(run=label) for label in groups]
    drawn: dict[str, list[tuple[RunGroup, str, pd.DataFrame]]] = {"curves": [], "each_site": []}
    for panel in wanted:
        group = groups.get(panel.run)
        rows = None if group is None else (table := group.metrics())[table["scope"].isin(panel.scopes)]
        if rows is None or not ((rows["split"] == "validation") & (rows["name"] == metric)).any():
            missing.append(panel.title or panel.run)
        else:
            drawn[panel.draw].append((group, panel.title or group.title, rows))

    def save(figure: Figure, name: str, number: int, of: int, shows: str, caption: str) -> None:
        name = re.sub(r"[^A-Za-z0-9.-]", "_", name) + (f"-{number}" if of > 1 else "")
        file, *_ = save_figure(figure, out / "figures" / name, formats)
        pictures.append(Picture(file, f"figures/{file.name}", shows, caption))

    with matplotlib.rc_context(STYLE):
        for number, (group, title, rows) in enumerate(alone := drawn["each_site"], start=1):
            figure = new_figure(4.2)
            plots.each_site(rows, figure.add_subplot(), metric).set_title(textwrap.fill(title, 60))
            over = f" Means over {len(group.runs)} runs." if len(group.runs) > 1 else ""
            caption = f"{title}.{over} Thin lines: individual clients, colored by client."
            save(figure, f"{metric}-sites", number, len(alone), f"Validation {metric}, local-only", caption)
        curves = drawn["curves"]
        each = 4 if len(curves) <= 4 else 3  # panels in one figure
        parts = [curves[at : at + each] for at in range(0, len(curves), each)]
        for number, part in enumerate(parts, start=1):
            seeds = max(len(group.runs) for group, _, _ in part)
            caption = "; ".join(dict.fromkeys(title for _, title, _ in part)) + "."
            caption += f" Means and ranges of {seeds} runs where there are several." if seeds > 1 else ""
            figure = plots.panels([(title, rows) for _, title, rows in part], metric)
            save(figure, metric, number, len(parts), f"Validation {metric}", caption)
        partitions: dict[str, list[RunGroup]] = {}
        for group in dict.fromkeys(panel.run for panel in wanted if panel.run in groups):
            if counts := groups[group].runs[0].partition.get("class_counts"):
                partitions.setdefault(str(counts), []).append(groups[group])
        for number, found in enumerate(partitions.values(), start=1):
            first = found[0].runs[0]
            figure = new_figure(min(1.5 + 0.27 * len(first.partition["class_counts"]), 5.5))
            plots.partition(first.partition, figure.add_subplot())
            caption = f"{'; '.join(group.title for group in found)}."
            if any(len({str(run.partition.get("class_counts")) for run in group.runs}) > 1 for group in found):
                caption += f" Drawn by seed {first.seed}; other seeds draw other examples."
            save(figure, "partition", number, len(partitions), "Training examples per client and class", caption)
    return pictures, missing
