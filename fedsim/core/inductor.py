"""torch's compiler makes a folder for what it compiles as soon as it is imported, and leaves it behind, empty.

transformers, PEFT and `torch.use_deterministic_algorithms` import it; fedsim compiles nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_KEY = "TORCHINDUCTOR_CACHE_DIR"  # read, and made, by torch/_inductor/runtime/cache_dir_utils.py


@contextmanager
def without_folder() -> Iterator[None]:
    """Inside the block the compiler's import, here or in a process that is started, makes no folder: it is told of one that is
    there, the one for temporary files. What the user has set stays; afterwards all is as it was."""
    if _KEY in os.environ:
        yield
        return
    os.environ[_KEY] = tempfile.gettempdir()
    try:
        yield
    finally:
        os.environ.pop(_KEY, None)
