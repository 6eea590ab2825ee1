"""Errors that a user can put right: one clear line each, exit code 2 on the command line."""

import difflib
import re
from collections.abc import Iterable

# Control characters, marks that turn the direction of writing, line and paragraph separators, halves of characters.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_UNSEEN_BUT_LINES = re.compile(_UNSEEN.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


_LONGEST = 1000  # characters of an error: a longer line has its middle cut out, since the end says what to do


def shown(value: object) -> str:
    """A value in a message: its `repr`, of which a long one shows the beginning and its length."""
    return cut(repr(value))


def cut(text: str, most: int = 200) -> str:
    """Text, of which a long one shows the beginning and its length."""
    return text if len(text) <= most else f"{text[: most - 50]}... ({len(text):,} characters)"


class UserError(ValueError):
    """Something the user wrote cannot work: names the thing, the value and the way out, in one line."""

    def __init__(self, message: object = "") -> None:
        text = str(message)
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 400]} [...] {text[-390:]}")


class Notice(UserWarning):
    """Something a user should know that stops nothing: a warning in Python, a plain line on standard error on the command line."""


def visible(text: str, lines: bool = False) -> str:
    """Text that may be of a user's data, fit for a terminal: what is not seen, or steers it, as an escape such as `\\x1b`.

    Args:
        text: anything.
        lines: leave line ends and tabs as they are.
    """
    pattern = _UNSEEN_BUT_LINES if lines else _UNSEEN
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def nearest_first(name: str, known: Iterable[str], most: int = 30) -> str:
    """Names to choose from as text, those that look like `name` first; of more than `most` the rest as a number."""
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
    """Worker processes died of the same work again and again: what they were at, and how each has ended, in its first line."""


class SumLost(RuntimeError):
    """A worker process died while it added to the one sum, which holds a part of its update: the round starts again."""


class OutOfMemory(RuntimeError):
    """Clients trained side by side needed more memory than the device has; fewer of them may fit."""


class Ended(SystemExit):
    """A signal asked the process to end: raised where it was, with the exit code 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; not imported here
        return True
    text = str(error)
    says = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in text for words in says)


def is_lost_context(error: BaseException) -> bool:
    """Whether an error says that the process can compute nothing more on its GPU: a kernel failed, or the device did."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in text or "device-side assert" in text
