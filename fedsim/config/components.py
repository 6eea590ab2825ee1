"""The algorithm and the aggregator of a run: fedsim's own, or a class in a user's file, each its own config section."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from fedsim import algorithms
from fedsim.core.section import OneOf, made_of, section
from fedsim.core.user_code import is_user_code, load


@functools.cache
def section_of(name: str, kind: type) -> Any:
    """The section of a component that is a frozen dataclass: its own fields, and its name."""
    about = {"__annotations__": {"name": Literal[name]}, "name": name, "of": kind}
    about |= {"__doc__": kind.__doc__, "__module__": kind.__module__}
    made = section(type(kind.__name__, (kind,), about))
    copyreg.pickle(made, lambda held: (_section_again, (name, component_of(held))))
    return made


def _section_again(name: str, component: Any) -> Any:
    return section_of(name, type(component))(**{f.name: getattr(component, f.name) for f in fields(component)})


def component_of(held: Any) -> Any:
    """The component that a section of `section_of` describes."""
    kind = type(held).of
    return kind(**{f.name: getattr(held, f.name) for f in fields(kind)})


def _in_file(key: str, fits: Callable[[type], bool], what: str) -> Callable[[Mapping[str, Any]], Any]:
    """What finds the section of a component in a user's file by its name, `FILE.py:CLASS`; None for another name."""

    def find(keys: Mapping[str, Any]) -> Any:
        if not is_user_code(keys["name"]):
            return None
        kind = load(keys["name"], f"{key}.name", fits, what)
        file, _, wanted = keys["name"].rpartition(":")
        name = f"{Path(file).expanduser().resolve()}:{wanted}"
        return made_of(section_of(name, kind), {**keys, "name": name}, key)

    return find


def algorithm_of(held: Any, aggregator: Any = None) -> algorithms.Algorithm:
    """The algorithm that a section describes, whose message group `update` is aggregated as the other section says."""
    made = component_of(held)
    if aggregator is not None and aggregator.name != "mean":
        how = component_of(aggregator) if hasattr(type(aggregator), "of") else aggregator.name
        object.__setattr__(made, "aggregates", {**made.aggregates, "update": how})  # else a constant of its class
    return made


@section
class Mean:
    """The mean, weighted as `algorithm.weights` says."""

    name: Literal["mean"] = "mean"


@section
class Sum:
    """The sum of weight times update."""

    name: Literal["sum"] = "sum"


def _is_aggregator(kind: type) -> bool:
    return all(hasattr(kind, name) for name in ("blockwise", "buffers", "add", "result"))


ALGORITHMS = {name: section_of(name, kind) for name, kind in algorithms.ALGORITHMS.items()}
FedAvg: Any = ALGORITHMS["fedavg"]
AGGREGATORS = {"mean": Mean, "sum": Sum}
Algorithm = Annotated[
    Any,
    OneOf(
        ALGORITHMS,
        default="fedavg",
        find=_in_file("algorithm", lambda kind: issubclass(kind, algorithms.Algorithm), "derived from Algorithm"),
    ),
]
Aggregator = Annotated[
    Any,
    OneOf(
        AGGREGATORS,
        default="mean",
        find=_in_file("aggregator", _is_aggregator, "with blockwise, buffers, add and result"),
    ),
]
