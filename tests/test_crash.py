"""Any write, sync or rename of a run may fail: the resumed run equals one that was never disturbed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.core.errors import UserError

CALLS = ("fsync", "pwrite", "rename", "replace")  # pathlib calls these of `os`, too
KEYS: dict[str, Any] = {
    "modes": ["local", "federated"],
    "rounds": 2,
    "cohort": {"size": 2},
    "model": {"dtype": "float32"},
    "local": {"steps": 1, "batch_size": 4, "keep_state": True},
    "messages": {"up": "blockwise8", "error_feedback": True},
}


class Disk:
    """Counts the calls; the one numbered `fails`, and with `stays` every later one, raises `OSError`."""

    def __init__(self, patch: pytest.MonkeyPatch, fails: int = 0, stays: bool = False) -> None:
        self.names, self.fails, self.stays = [], fails, stays
        for name in CALLS:
            patch.setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name: str, call: Any) -> Any:
        def wrapped(*args: Any, **keys: Any) -> Any:
            self.names.append(name)
            done = len(self.names)
            if done == self.fails or (self.stays and 0 < self.fails < done):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **keys)

        return wrapped


@pytest.mark.parametrize("examples", [8, pytest.param(80, marks=pytest.mark.thorough)])
def test_a_run_whose_write_fails_resumes_to_the_same_bits(
    lab: Any, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        whole = lab.run(**KEYS, name="whole")
    places = {name: [i + 1 for i, n in enumerate(disk.names) if n == name] for name in CALLS}
    assert all(places.values()), {name: len(found) for name, found in places.items()}

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=HealthCheck)
    @given(st.sampled_from(CALLS).flatmap(lambda name: st.sampled_from(places[name])), st.booleans())
    def crash(fails: int, stays: bool) -> None:
        shutil.rmtree(lab.root / "results/crashed", ignore_errors=True)
        with monkeypatch.context() as patch, contextlib.suppress(UserError):
            Disk(patch, fails, stays)
            lab.run(**KEYS, name="crashed")
        resumed = lab.run(**KEYS, name="crashed")
        lab.same_bits(resumed, whole)
        assert [f.name for f in resumed.rglob(".*") if f.name != ".lock"] == [], "nothing half-written stays"

    crash()
