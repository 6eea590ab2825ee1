"""Errors that a user can put right: one clear line each, exit code 2 on the command line."""

import difflib
import re
from collections.abc import Iterable

# Control characters, direction marks, line and paragraph separators, surrogates.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_UNSEEN_BUT_LINES = re.compile(_UNSEEN.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
_LONGEST = 1000  # characters of an error; a longer line loses its middle, since the end states the fix


def shown(value: object) -> str:
    """The `repr` of a value for a message; of a long one the beginning and the length."""
    return cut(repr(value))


def cut(text: str, most: int = 200) -> str:
    """Text for a message; of a long one the beginning and the length."""
    return text if len(text) <= most else f"{text[: most - 50]}... ({len(text):,} characters)"


class UserError(ValueError):
    """A mistake that the user can fix: one line that names the setting, its value and the fix."""

    def __init__(self, message: object = "") -> None:
        text = str(message)
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 400]} [...] {text[-390:]}")


class Notice(UserWarning):
    """A warning for the user: a Python warning, or a plain line on standard error on the command line."""


def visible(text: str, lines: bool = False) -> str:
    """Text, perhaps from a user's data, made safe for a terminal: invisible and control characters as escapes such as `\\x1b`.

    Args:
        text: any text.
        lines: keep line ends and tabs.
    """
    pattern = _UNSEEN_BUT_LINES if lines else _UNSEEN
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def nearest_first(name: str, known: Iterable[str], most: int = 30) -> str:
    """Names to choose from, those most like `name` first; beyond `most` only their number."""
    names = [text if len(text) <= 60 else text[:57] + "..." for text in map(str, known)]
    near = difflib.get_close_matches(name, names, n=3)
    ordered = [*near, *(n for n in dict.fromkeys(names) if n not in near)]
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(ordered[:most]) or "nothing") + more


class ClientError(RuntimeError):
    """A client's training raised: the message opens with round and client and carries its own traceback."""


class CallbackError(RuntimeError):
    """A user's callback raised `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"the callback raised {type(cause).__name__}: {cause}")
        self.cause = cause


class WorkerDied(ClientError):
    """Worker processes died repeatedly at the same work; the first line says at which, and how each ended."""


class SumLost(RuntimeError):
    """A worker process died while it added to the shared sum, which is then incomplete: the round starts again."""


class OutOfMemory(RuntimeError):
    """Clients in lanes need more memory than the device has; fewer lanes may fit."""


class Ended(SystemExit):
    """A signal asked the process to end; the exit code is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is about too little memory, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; not imported here
        return True
    text = str(error)
    says = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in text for words in says)


def is_lost_context(error: BaseException) -> bool:
    """Whether after an error the process can compute nothing more on its GPU: a kernel or the device failed."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in text or "device-side assert" in text
