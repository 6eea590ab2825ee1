"""Components that are their own config sections: fedsim's own, or in a user's file, named `FILE.py:NAME`."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from types import FunctionType
from typing import Annotated, Any, Literal

from pydantic import WrapValidator

from fedsim import aggregators, algorithms
from fedsim.core.section import OneOf, as_given, made_of, plain, section
from fedsim.core.user_code import errors_of, is_user_code, load, read
from fedsim.data.partitioners import PARTITIONERS


@functools.cache
def section_of(name: str, kind: type, again: Callable[[Mapping[str, Any]], Any], *more: type) -> Any:
    """The section of a component that is a frozen dataclass: its own fields, its name, and the keys of `more` sections.

    `again` makes a section from its keys where it is unpickled.
    """
    text = Annotated[Literal[str(name)], WrapValidator(as_given)]  # a name may carry what a user's file holds
    required = {f.name: f.type for f in fields(kind) if f.default is f.default_factory is MISSING}
    about = {"__annotations__": {"name": text, **required}, "name": name, "of": kind}  # keyword-only, so in any order
    about |= {"__doc__": kind.__doc__, "__module__": kind.__module__}
    made = section(type(kind.__name__, (kind, *more), about))
    copyreg.pickle(made, lambda held: (again, (plain(held),)))
    return made


def component_of(held: Any) -> Any:
    """The component that a section of `section_of` describes."""
    kind = type(held).of
    return kind(**{f.name: getattr(held, f.name) for f in fields(kind)})


@dataclass(frozen=True)
class InFile:
    """Finds the section of a component in a user's file, whose name is `FILE.py:NAME`; None for another name.

    Attributes:
        key: of the section, e.g. `algorithm`.
        what, fits: see `load`.
        more: sections whose keys it takes too.
    """

    key: str
    what: str
    fits: Callable[[Any], bool]
    more: tuple[type, ...] = ()

    def __call__(self, keys: Mapping[str, Any]) -> Any:
        if not is_user_code(keys["name"]):
            return None
        name = f"{self.key}.name"
        code = read(keys["name"], name)
        kind = load(code, name, self.what, self.fits)
        with errors_of(code, name):
            made = section_of(code, kind, self, *self.more)
            return made_of(made, {k: value for k, value in keys.items() if k != "name"}, self.key)


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


def _is_algorithm(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, algorithms.Algorithm)


def _is_aggregator(found: Any) -> bool:
    return isinstance(found, type) and {"blockwise", "buffers", "add", "result"} <= {*dir(found)}


def _is_callable(found: Any) -> bool:
    return isinstance(found, FunctionType) or (isinstance(found, type) and "__call__" in dir(found))


def _built_in(keys: Mapping[str, Any]) -> Any:
    return ALGORITHMS[keys["name"]](**keys)


def _rule(keys: Mapping[str, Any]) -> Any:
    return AGGREGATORS[keys["name"]](**keys)


def callable_in_file(key: str, *more: type) -> InFile:
    """For a partitioner or a data source."""
    return InFile(key, "function, or class with __call__,", _is_callable, more)


ALGORITHMS = {name: section_of(name, kind, _built_in) for name, kind in algorithms.ALGORITHMS.items()}
FedAvg: Any = ALGORITHMS["fedavg"]
AGGREGATORS: dict[str, Any] = {"mean": Mean, "sum": Sum}
AGGREGATORS |= {name: section_of(name, kind, _rule) for name, kind in aggregators.RULES.items()}
OWN_ALGORITHM = InFile("algorithm", "class derived from fedsim.algorithms.Algorithm", _is_algorithm)
OWN_AGGREGATOR = InFile("aggregator", "class with blockwise, buffers, add and result", _is_aggregator)
Algorithm = Annotated[Any, OneOf(ALGORITHMS, default="fedavg", find=OWN_ALGORITHM)]
Aggregator = Annotated[Any, OneOf(AGGREGATORS, default="mean", find=OWN_AGGREGATOR)]
Partitioner = Annotated[Any, OneOf(PARTITIONERS, find=callable_in_file("partition"))]
