"""Which cases of a test run in `make test`; all of them run in `make test-all`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def fast(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """`cases` for `parametrize`, marked `thorough` except for those in `kept`."""
    every = list(cases)
    assert kept and all(case in every for case in kept), "a fast case that does not exist"
    marks = pytest.mark.thorough
    whole = [case if isinstance(case, tuple) else (case,) for case in every]
    return [case if case in kept else pytest.param(*w, marks=marks) for case, w in zip(every, whole, strict=True)]


def fast_only(*places: int) -> Callable[[Any], Any]:
    """Decorator right above a `parametrize`: its cases are `thorough` except for those at these places, from 0."""

    def mark(test: Any) -> Any:
        names, cases = (made := test.pytestmark.pop()).args
        every, many = list(cases), not isinstance(names, str) or "," in names
        assert places and max(places) < len(every), "a fast case that does not exist"
        for i in set(range(len(every))) - set(places):
            every[i] = pytest.param(*(every[i] if many else [every[i]]), marks=pytest.mark.thorough)
        return pytest.mark.parametrize(names, every, **made.kwargs)(test)

    return mark
