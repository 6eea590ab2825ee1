"""What a run shows while it goes on: one estimate of the time left, and the throughput of training."""

from __future__ import annotations

import re
from typing import Any

import pytest

import fedsim.runs.progress
from fedsim.core.types import Report
from fedsim.runs.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(fedsim.runs.progress.time, "monotonic", lambda: now[0])
    return now


def test_one_estimate_covers_the_modes_to_come_and_ends_with_the_last_round(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """A round of local takes 10 s for 10 units; of federated, twice the work, 20 s at first sight and 30 s as it comes out."""
    show = Progress(True, 2)
    show.plan({"local": (10.0, 2), "federated": (20.0, 2)})
    lines = []

    def round(number: int, at: float) -> None:
        clock[0] = at
        show.round(number, "")
        lines.append(capsys.readouterr().err)

    show.begin("local", 0)
    for clients, said in ((1, "1 client,"), (2, "2 clients,")):
        show.pack(clients, Report(0, steps=dict.fromkeys(range(clients), 1)))
        round(clients, 10 * clients)
        assert f"  {said}" in lines[-1]
    clock[0] = 25  # exports
    show.begin("federated", 0)
    assert show._pace() == ", about 40 s left (federated)", "what came between took nothing off"
    clock[0] = 35
    assert show._pace() == ", about 30 s left (federated)", "it counts down inside a round"
    round(1, 55)
    round(2, 85)
    left = [re.findall(r"about (\d+) s left \((.*)\)", line) for line in lines]
    assert left == [[("50", "local, federated")], [("40", "federated")], [("30", "federated")], []]
    assert show._pace() == "", "nothing is left after the last round"


def test_a_resumed_run_counts_the_rounds_that_are_left(clock: list[float]) -> None:
    show = Progress(False, 10)
    show.plan({"local": (1.0, 0), "federated": (1.0, 2), "central": (1.0, 10)})
    show.begin("federated", 8)
    clock[0] = 60
    show.round(9, "")
    assert show._pace() == ", about 11 min left (federated, central)"


@pytest.mark.parametrize("workers", [1, 2])
def test_throughput_is_of_training_alone(clock: list[float], workers: int) -> None:
    """Packs of 60 tokens train for 2 s and are evaluated for 6; two workers report two packs at a time."""
    show = Progress(False, 9)
    show.begin("local", 0)
    for number in range(1, 4):
        for index in range(4):
            if index % workers == 0:
                clock[0] += 8
            show.pack(number, Report(index, steps={index: 1}, tokens=60, seconds=8.0, scoring=6.0))
        clock[0] += 100  # the global model is evaluated, a checkpoint is written
        show.round(number, "")
    assert show._pace().startswith(f", {30 * workers} training tokens/s")


def test_packs_report_how_long_they_were_evaluated(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that moves in evaluation alone, all of a pack's seconds are evaluation."""
    from fedsim.training import scoring

    now, reports, score, pack = [0.0], [], scoring.Evaluator.score, Progress.pack

    def slow(self: Any, *args: Any, **keys: Any) -> Any:
        now[0] += 5.0
        return score(self, *args, **keys)

    monkeypatch.setattr(scoring.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(scoring.Evaluator, "score", slow)
    monkeypatch.setattr(
        Progress, "pack", lambda self, round, report: (reports.append(report), pack(self, round, report))
    )
    lab.run(modes=["local"], local={"steps": 4}, evaluate={"every_steps": 2})
    assert [(r.seconds, r.scoring) for r in reports] == [(10.0, 10.0)] * 2, "inside the round and at its end"
