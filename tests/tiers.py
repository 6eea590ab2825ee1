"""Which cases of a test run in `make test`; all of them run in `make test-all`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def fast(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """`cases` for `parametrize`, marked `thorough` except for those in `kept`."""
    every = list(cases)
    assert kept and all(case in every for case in kept), "a fast case that does not exist"
    marks = pytest.mark.thorough
    whole = [case if isinstance(case, tuple) else (case,) for case in every]
    return [case if case in kept else pytest.param(*w, marks=marks) for case, w in zip(every, whole, strict=True)]
