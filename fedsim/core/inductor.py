"""torch's compiler creates an empty cache folder as soon as it is imported, by transformers, PEFT and
`torch.use_deterministic_algorithms`. fedsim compiles nothing, and leaves no such folder behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_KEY = "TORCHINDUCTOR_CACHE_DIR"  # read, and made, by torch/_inductor/runtime/cache_dir_utils.py


@contextmanager
def without_folder() -> Iterator[None]:
    """Inside the block the compiler creates no folder, in child processes too: its cache is the folder for temporary files.
    A user's own setting stays."""
    if _KEY in os.environ:
        yield
        return
    os.environ[_KEY] = tempfile.gettempdir()
    try:
        yield
    finally:
        os.environ.pop(_KEY, None)
