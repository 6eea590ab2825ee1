"""What went wrong with clients in a round, as metrics and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fedsim.core.errors import ClientError
from fedsim.core.types import Fault, Pack, Report, Row
from fedsim.simulate.schedule import Schedule
from fedsim.simulate.state import State
from fedsim.simulate.timeline import RoundWork

# Simulated faults: the name of their metric -> in words.
SIMULATED = {
    **{"dropped": "dropped out", "late": "too late", "deferred": "too late, taken in the next round"},
    "too_few": "with too few clients for the aggregator, whose round left the global model as it was",
}
_WAYS = {"dropped": "lower simulation.drop or take another seed", "late": "raise simulation.deadline_s"}


def fault_metrics(
    round: int,
    schedule: Schedule,
    work: RoundWork,
    packs: Sequence[Pack],
    reports: Sequence[Report],
    state: State,
    arriving: bool,
) -> list[Row]:
    """One metric of the split `fault` for each fault of a round.

    Args:
        arriving: whether messages of earlier rounds arrive in this one.

    Raises:
        ClientError: if every client failed and no other message arrives.
    """
    found, out = [f for r in reports for f in r.faults], []

    def note(client: int, name: str | None, what: str, value: float) -> None:
        out.append(Row(round, state.steps.get(client, 0), schedule.mode, name, "fault", what, value))

    for f in found:
        note(f.client, None if schedule.mode == "central" else f.name, f"{f.action}_{f.of}", f.value)
    for w in work.work:
        if schedule.buffered is None and w.arrives != round:
            note(w.client, schedule.name(w.client), w.lost or "deferred", 1.0)
    skipped, lost = [f for f in found if f.action == "skipped"], [w.lost for w in work.arriving(None)]
    lost = [] if schedule.buffered is not None else lost
    failed, trained = len(skipped) + len(lost), sum(len(p.tasks) for p in packs)
    if failed and trained == len(skipped) and not arriving:
        reasons = [f"{f.name}: {seen(f)}" for f in skipped[:3]] + [f"{n} {why}" for why, n in Counter(lost).items()]
        ways = ["lower local.lr or raise faults.max_norm"] if skipped else []
        ways += [way for why, way in _WAYS.items() if why in lost]
        raise ClientError(f"round {round}: all {failed} clients failed: {'; '.join(reasons)}; {', '.join(ways)}")
    return out


def check(round: int, report: Report) -> None:
    """Stop at a fault that the config does not tolerate.

    Raises:
        ClientError: for a fault under `faults.policy=fail`.
    """
    for fault in report.faults:
        if fault.action == "failed":
            raise ClientError(
                f"round {round}, client {fault.name}: {seen(fault)}; lower local.lr or set local.clip, or leave such "
                "clients out with faults.policy=skip"
            )


def seen(fault: Fault) -> str:
    """A fault in words."""
    if fault.of == "norm":
        return f"its update has norm {fault.value:.4g}, above faults.max_norm"
    what = "training loss" if fault.of == "loss" else "update"
    return f"its {what} is not finite" + (f" ({fault.value})" if fault.of == "loss" else "")


def describe_faults(mode: str, metrics: Iterable[dict[str, Any]]) -> list[str]:
    """The faults of a mode in one line, or no line; from its metrics of the split `fault`."""
    by_kind: dict[str, list[str]] = {}
    for metric in metrics:
        action, _, of = metric["name"].partition("_")
        kind = SIMULATED.get(metric["name"]) or f"{action} for their {of}"
        by_kind.setdefault(kind, []).append(f"{metric['client'] or mode} in round {metric['round']}")
    parts = []
    for kind, whose in by_kind.items():
        more = f" and {len(whose) - 5} more" if len(whose) > 5 else ""
        parts.append(f"{len(whose)} {kind} ({', '.join(whose[:5])}{more})")
    return [f"{mode}: client faults: {'; '.join(parts)}"] if parts else []
