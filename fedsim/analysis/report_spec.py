"""What a report shows: the sections of an experiment's `reproduce.yaml` about figures, published numbers and checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedsim.analysis.verdicts import read_line
from fedsim.core.errors import UserError
from fedsim.core.section import Count, Positive, Text, section, wrong

Fraction = Annotated[float, Field(ge=0, le=1)]


@section
class Published:
    """A published number, and which of ours stands beside it."""

    name: Text
    """What the number is."""
    run: Text
    """Label of the runs."""
    what: Literal["merged", "clients", "local_mean", "local_min", "local_max", "local", "central"]
    """The global model, the clients' mean just before aggregation, local-only models, or the centralized model."""
    site: Text | None = None
    """The client, for what: local."""
    round: Count | None = None
    """The place: after this round."""
    at: Fraction | None = None
    """The place: after this share of the steps; the end where neither is given."""
    best: bool = False
    """The best score after training began, in place of that at a place."""
    metric: Text | None = None
    """Another metric than the experiment's."""
    value: float | None = None
    """The published number; null = none was published."""

    @model_validator(mode="after")
    def _check(self) -> Published:
        if (self.what == "local") != (self.site is not None):
            raise wrong("site", self.site, "does not fit: what: local needs a client, and nothing else takes one")
        if sum((self.round is not None, self.at is not None, self.best)) > 1:
            raise wrong("at", self.at, "is one of two or more places: give one place, by round, at or best")
        return self


@section
class Panel:
    """Curves of one label."""

    run: Text
    """Label of the runs."""
    scopes: Annotated[list[Literal["local", "federated", "central"]], Field(min_length=1)] = Field(
        default_factory=lambda: ["local", "federated", "central"]
    )
    """Curves that are drawn."""
    title: Text | None = None
    """Title of the panel; null = the runs'."""
    draw: Literal["curves", "each_site"] = "curves"
    """How it is drawn: curves, or each_site, a figure of its own with `fedsim.plots.each_site`."""


@section
class Column:
    """A column of a table of zero-shot scores."""

    task: Text
    """Task of `fedsim eval`."""
    metric: Text
    """Metric of the task."""
    items: Count
    """Examples that the published score rests on."""


@section
class Row:
    """A row of a table of zero-shot scores."""

    name: Text
    """Name in the table."""
    model: Text
    """The model, as `fedsim eval` names it."""
    published: list[Fraction]
    """The published scores, one for each column."""


@section
class ZeroShot:
    """A table of zero-shot scores."""

    run: Text
    """Label of the run."""
    tasks: Annotated[list[Text], Field(min_length=1)]
    """Tasks that are scored."""
    columns: Annotated[list[Column], Field(min_length=1)]
    """Columns of the table."""
    rows: Annotated[list[Row], Field(min_length=1)]
    """Rows of the table."""
    limit: dict[str, Count] = Field(default_factory=dict)
    """Size or budget -> examples scored per task; all where it is not named."""
    against: list[Annotated[list[Text], Field(min_length=2, max_length=2)]] = Field(default_factory=list)
    """Pairs of rows whose means are compared."""

    @model_validator(mode="after")
    def _check(self) -> ZeroShot:
        for i, column in enumerate(self.columns):
            if column.task not in self.tasks:
                raise wrong(f"columns[{i}].task", column.task, f"is none of the tasks: {', '.join(self.tasks)}")
        for i, row in enumerate(self.rows):
            if len(row.published) != len(self.columns):
                raise wrong(f"rows[{i}].published", row.published, f"does not fit; give {len(self.columns)} scores")
        names = [row.name for row in self.rows]
        for i, pair in enumerate(self.against):
            if not set(pair) <= set(names):
                raise wrong(f"against[{i}]", pair, f"is no pair of rows; the rows are {', '.join(names)}")
        return self


@section
class Form:
    """A form in which the parameters of a model travel."""

    name: Text
    """Name in the table."""
    bits: Annotated[float, Field(ge=1)]
    """Bits of an element."""
    values: Positive
    """Published MiB of the values."""
    scales: Annotated[float, Field(ge=0)] = 0.0
    """Published MiB of the scales."""
    block: Count | None = None
    """Elements that share a float32 scale."""
    table: Annotated[int, Field(ge=0)] = 0
    """Float32 entries of the code table of each tensor."""


@section
class Messages:
    """Sizes of a message."""

    run: Text
    """Label of the run."""
    parameters: Count
    """Elements of the published model."""
    tensors: Count
    """Tensors of the published model."""
    forms: Annotated[list[Form], Field(min_length=1)]
    """Forms of the message."""


@section
class Report:
    """What a report shows."""

    title: Text = "Report"
    """Title of the report."""
    source: Text | None = None
    """Where the numbers were published."""
    metric: Text = "accuracy"
    """Metric of the figures, the checks, and the published numbers."""
    published: list[Published] = Field(default_factory=list)
    """Published numbers."""
    verdicts: list[dict[str, Any]] = Field(default_factory=list)
    """Checks of expected behavior: `check`, a name of `fedsim.analysis.verdicts.CHECKS`, and its keys."""
    figures: list[Annotated[Panel, BeforeValidator(lambda one: {"run": one} if isinstance(one, str) else one)]] = Field(
        default_factory=list
    )
    """Panels of the figures, a label or more keys each; empty = all labels."""
    zero_shot: ZeroShot | None = None
    """Table of zero-shot scores."""
    messages: Messages | None = None
    """Table of message sizes."""
    notes: str = ""
    """Markdown at the end."""

    @model_validator(mode="after")
    def _check_verdicts(self) -> Report:
        for i, line in enumerate(self.verdicts):
            read_line(line, f"verdicts[{i}]")
        return self

    def labels(self) -> dict[str, list[str]]:
        """Place in the file -> the labels that it names."""
        out = {f"verdicts[{i}]": read_line(line, "").labels for i, line in enumerate(self.verdicts)}
        for key in ("published", "figures"):
            out |= {f"{key}[{i}]": [line.run] for i, line in enumerate(getattr(self, key))}
        return out | {key: [about.run] for key in ("zero_shot", "messages") if (about := getattr(self, key))}

    def check_labels(self, known: Iterable[str]) -> None:
        """Raise a UserError where a label is none of these."""
        known = list(known)
        for where, labels in self.labels().items():
            if unknown := [label for label in labels if label not in known]:
                raise UserError(f"{where}: no run has the label {unknown[0]!r}; the labels are {', '.join(known)}")

    def only(self, known: Iterable[str]) -> Report:
        """Without what is about other labels than these."""
        known = set(known)
        gone = {where for where, labels in self.labels().items() if not known.issuperset(labels)}
        lists = {
            key: [line for i, line in enumerate(getattr(self, key)) if f"{key}[{i}]" not in gone]
            for key in ("published", "verdicts", "figures")
        }
        return replace(self, **lists, **dict.fromkeys(gone & {"zero_shot", "messages"}))
