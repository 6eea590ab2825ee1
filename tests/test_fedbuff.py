"""FedBuff: who starts and arrives when, by hand; the run against a plain event loop; and what does not go with it."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from test_algorithms import SMALL
from test_equivalence import adapter_of
from test_hooks import Loop

import fedsim
from fedsim.algorithms import ALGORITHMS, Info, Server
from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.runs.build import prepare
from fedsim.runs.checks import sampler_of
from fedsim.runs.resolve import schedule_of
from fedsim.simulate.buffered import BufferedTimeline


def timeline(seconds: list[float], size: int, at_work: int | None = None) -> BufferedTimeline:
    clients = np.arange(len(seconds))
    return BufferedTimeline(
        clients, size, at_work or len(seconds), seconds.__getitem__, lambda r: stream(5, "cohort", r)
    )


def events(seconds: list[float], size: int, steps: int) -> list[dict[str, Any]]:
    """All that starts when every client is always at work: {client, starts, number, time, arrives, slot}, by scanning a list."""
    started = [{"client": c, "starts": 1, "number": c, "time": s} for c, s in enumerate(seconds)]
    round, there = 1, 0
    while round <= steps:
        now = min(e["time"] for e in started if "arrives" not in e)
        together = [e for e in started if "arrives" not in e and e["time"] == now]
        for e in sorted(together, key=lambda e: e["number"]):
            e |= {"arrives": round, "slot": there, "ends": now}
            there += 1
            if there == size:
                round, there = round + 1, 0
        for c in sorted(e["client"] for e in together):
            started.append({"client": c, "starts": round, "number": len(started), "time": now + seconds[c]})
    return started


def test_the_server_steps_when_its_buffer_is_full_by_hand() -> None:
    """Client 0 takes 1 second, client 1 takes 3, client 2 takes 5; a step takes 2 messages.

    0 arrives at 1 and 2: step 1 at 2. Then 0 and 1 at 3, of which 1 started first: step 2 at 3. 0 at 4, 2 and 0 at 5: step 3 at 5,
    by 0 and 2, and 0 is the first of step 4.
    """
    made = timeline([1.0, 3.0, 5.0], 2)
    found = made.work(1)
    assert [(w.client, w.arrives, w.repeat, w.slot) for w in found.work] == [
        (0, 1, 0, 0),
        (1, 2, 0, 0),
        (2, 3, 0, 1),
        (0, 1, 1, 1),
    ]
    assert [(a, [w.client for w in ws]) for a, ws in found.batches(1)] == [(3, [2]), (2, [1]), (1, [0]), (1, [0])]
    assert (found.seconds, found.clock, found.at_work) == (2.0, 2.0, 2)
    assert [(w.client, w.starts) for w in made.work(2).arrived] == [(1, 1), (0, 2)]
    assert [(w.client, w.starts) for w in made.work(3).arrived] == [(0, 3), (2, 1)]
    assert (made.work(3).clock, made.work(4).arrived[0].client) == (5.0, 0)
    assert timeline([1.0, 3.0, 5.0], 2).work(3) == made.work(3), "a function of the round, whatever was asked before"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_timeline_is_that_of_a_scanned_list(size: int) -> None:
    seconds = [1.0, 1.5, 1.5, 4.0, 0.25]
    made, told = timeline(seconds, size), events(seconds, size, 40)
    for round in range(1, 20):
        expected = [(e["client"], e["arrives"], e["slot"]) for e in told if e["starts"] == round]
        assert [(w.client, w.arrives, w.slot) for w in made.work(round).work] == expected
        arrived = sorted((e for e in told if e.get("arrives") == round), key=lambda e: e["slot"])
        assert [(w.client, w.starts) for w in made.work(round).arrived] == [(e["client"], e["starts"]) for e in arrived]
        assert made.work(round).clock == arrived[-1]["ends"]


def test_no_client_is_at_work_twice_and_all_are_drawn() -> None:
    seconds = [0.1 * (1 + c % 7) for c in range(20)]
    made = timeline(seconds, 4, 6)
    works = list(itertools.chain.from_iterable(made.work(r).work for r in range(1, 200)))
    counts = Counter(w.client for w in works)
    assert set(counts) == set(range(20))
    open_until: dict[int, tuple[int, int]] = {}
    for w in works:
        at = open_until.get(w.client)
        assert at is None or at < (w.starts + 1, 0), "an earlier one has arrived in this round or before"
        open_until[w.client] = (w.arrives or 10**9, w.slot or 0)
    assert all(len(made.work(r).arrived) == 4 for r in range(1, 200))
    assert made.work(7).at_work in (2, 3, 4, 5), "those of 6 that did not just arrive"


SPEEDS = {"site-1": 90.0, "site-2": 400.0, "site-3": 150.0, "site-4": 1000.0}
KEYS = {**SMALL, "cohort": {"size": "all"}, "simulation": {"speeds": SPEEDS}}
WORK = {"batch_size": 4, "lr": 5e-3, "clip": 0.5, "schedule": "linear"}


class Async(Loop):
    """The event loop of the paper: a client trains when it starts, from the model of that moment."""

    def __init__(self, lab: Any, exp: Any, run: Any) -> None:
        super().__init__(lab, exp, run)
        self.schedule = schedule_of(prepare(exp), "federated")

    def again(self, name: str, round: int, repeat: int) -> list[np.ndarray]:
        if not repeat:
            return self.batches(name, round)
        rng = stream(self.exp.seed, "batches", name, round, f"again {repeat}")
        return sampler_of(self.exp).batches(self.examples(name), rng, self.exp.local.steps)


@pytest.mark.parametrize("staleness", ["sqrt", "constant"])
@pytest.mark.parametrize("weights", ["uniform", "samples"])
def test_a_run_is_the_papers_event_loop(lab: Any, distance: Any, staleness: str, weights: str) -> None:
    """Unequal clients and speeds, some of which start twice between two steps; AdamW's moments are kept."""
    method = {"name": "fedbuff", "buffer": 3, "server_lr": 0.7, "staleness": staleness, "weights": weights}
    exp = lab.exp(**KEYS, algorithm=method, local={**WORK, "schedule": "constant"})
    run = lab.run(exp)
    loop = Async(lab, exp, run)
    names = sorted(loop.sizes)
    seconds = [loop.schedule.tokens(c) / SPEEDS[n] for c, n in enumerate(names)]
    told = events(seconds, 3, 30)
    assert any(e["starts"] < e.get("arrives", 0) - 1 for e in told[:12])
    updates, repeats = {}, Counter()
    mean = sum(loop.sizes.values()) / len(names) if weights == "samples" else 1.0
    for round in range(1, 4):
        for e in (e for e in told if e["starts"] == round):
            name = names[e["client"]]
            batches = loop.again(name, round, repeats[name, round])
            repeats[name, round] += 1
            y = loop.fit(name, loop.x, batches)
            updates[e["number"]] = {n: y[n] - x for n, x in loop.x.items()}
        here = [e for e in told if e.get("arrives") == round]
        assert len(here) == 3
        for e in here:
            w = loop.sizes[names[e["client"]]] / mean if weights == "samples" else 1.0
            w *= (1 + round - e["starts"]) ** (-0.5 if staleness == "sqrt" else 0)
            loop.x = {n: x + 0.7 / 3 * w * updates[e["number"]][n] for n, x in loop.x.items()}
    assert max(repeats.values()) > 1, "no client starts twice: the test shows less than it says"
    assert distance(adapter_of(run / "global"), loop.exported(loop.x)) < 1e-9
    stale = [(r["round"], r["client"], r["value"]) for r in lab.metrics(run) if r["name"] == "staleness"]
    expected = sorted((e for e in told if e.get("arrives", 9) <= 3), key=lambda e: (e["arrives"], e["slot"]))
    assert stale == [(e["arrives"], names[e["client"]], e["arrives"] - e["starts"]) for e in expected]
    assert lab.value(run, round=3, name="seconds", client=None, split="simulated") == pytest.approx(
        expected[-1]["ends"]
    )


def test_workers_stops_and_more_rounds_change_no_bit(lab: Any) -> None:
    """Four lanes of a pool; a run of one round that goes on to three. What was at work at its end arrives later."""
    keys = {**KEYS, "algorithm": {"name": "fedbuff", "buffer": 3}, "local": {**WORK, "keep_state": True}}
    keys |= {"messages": {"up": "bf16", "error_feedback": True}}
    whole = lab.run(**keys)
    pool = {"name": "pool", "devices": ["cpu", "cpu", "cpu"], "threads": 1}
    lab.same_bits(lab.run(**keys, name="pool", executor=pool), whole)
    keys["local"] = {**keys["local"], "horizon": 50}
    other = lab.run(**keys, name="horizon")
    stopped = lab.run(**{**keys, "name": "stopped", "rounds": 1})
    left = [r for r in lab.metrics(stopped) if r["name"] == "at_work"]
    assert len(left) == 1 and left[0]["value"] > 0
    fedsim.run(lab.exp(**{**keys, "name": "stopped"}), progress=False, resume=stopped)
    lab.same_bits(stopped, other)


def test_a_step_divides_by_the_buffer() -> None:
    made = ALGORITHMS["fedbuff"](buffer=4, server_lr=0.5)
    server = Server({"w": 1.0}, {})
    assert made.step(server, {"update": {"w": 8.0}}, Info(3, 2, 2.0, 10, 10.0)).params["w"] == 1 + 0.5 / 4 * 8
    assert (made.discount(0), made.discount(3), made.buffered(7).clients) == (1.0, 0.5, 7)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"simulation": {}}, "simulation.speeds: null, but algorithm.name=fedbuff is asynchronous"),
        ({"simulation": {"speeds": 9.0, "deadline_s": 3.0}}, "simulation.deadline_s: 3.0, but algorithm.name=fedbuff"),
        ({"simulation": {"speeds": 9.0, "drop": 0.5}}, "simulation.drop: 0.5, but algorithm.name=fedbuff"),
        ({"simulation": {"speeds": 9.0, "availability": 0.5}}, "simulation.availability: 0.5, but"),
        (
            {"algorithm": {"name": "fedbuff", "concurrency": 9}},
            "algorithm.concurrency: 9, but only 3 clients have examples",
        ),
        (
            {"aggregator": {"name": "sum"}},
            "aggregator.name: 'sum' has no use: algorithm.name=fedbuff fixes its aggregator",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(lab: Any, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        prepare(lab.exp(**{"algorithm": {"name": "fedbuff"}, "simulation": {"speeds": 9.0}, **keys}))
