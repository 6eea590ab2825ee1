"""The bits of small runs of every kind stay what they were; `tests/pinned_runs.py` says which runs, and how to pin them anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_runs_of_every_kind_give_the_bits_that_are_pinned() -> None:
    done = subprocess.run([sys.executable, HERE / "pinned_runs.py"], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    found, pinned = json.loads(done.stdout), json.loads((HERE / "pinned_runs.json").read_text())
    assert found == pinned, [name for name in {**found, **pinned} if found.get(name) != pinned.get(name)]
