"""Classes in a user's own file, named `FILE.py:CLASS`: every process loads the bytes that were read first."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import hashlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fedsim.core.errors import UserError


def is_user_code(name: str) -> bool:
    """Whether a component's name is of the form `FILE.py:CLASS`."""
    file, colon, _ = name.rpartition(":")
    return bool(colon) and file.endswith(".py")


def load(name: str, key: str, fits: Callable[[type], bool], what: str) -> type:
    """The class that `FILE.py:CLASS` names: a frozen dataclass each of whose fields has a default.

    Instances of it may be sent to other processes, where the class is made from the same bytes.

    Args:
        name: as the user writes it; a relative file is looked for in the working directory.
        key: of the config, for messages.
        fits: whether a class is of the kind that is wanted.
        what: that kind in words, for messages, e.g. `derived from Algorithm`.

    Raises:
        UserError: for a file that cannot be read or run, or has no such class.
    """
    text, _, wanted = name.rpartition(":")
    file = Path(text).expanduser()
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {text!r} cannot be read ({error.strerror}); give FILE.py:CLASS") from None
    try:
        module = _module(source, str(file.resolve()))
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file.resolve())]
        line = error.lineno if isinstance(error, SyntaxError) else next(iter(lines), 0)
        what = " ".join(str(error).split())
        raise UserError(f"{key}: {text}, line {line}: {type(error).__name__}: {what}") from None
    found = getattr(module, wanted, None)
    if not (isinstance(found, type) and fits(found)):
        own = [n for n, o in vars(module).items() if _is_own(o, module) and fits(o)]
        there = f"it has {', '.join(own)}" if own else "see docs/extend.md"
        raise UserError(f"{key}: {text} has no class {wanted!r} {what}; {there}")
    if "__dataclass_fields__" not in vars(found) or not found.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise UserError(f"{key}: {name}: {wanted} is not a frozen dataclass; put @dataclass(frozen=True) above it")
    for field in dataclasses.fields(found):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{key}: {name}: {field.name} has no default; give it one")
    return found


def digest(kind: type) -> str:
    """SHA-256 of the file that a class was loaded from; empty for a class that was not."""
    return sys.modules[kind.__module__].__dict__.get("__sha256__", "")


def _is_own(value: Any, module: ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


@functools.cache
def _module(source: bytes, file: str) -> ModuleType:
    """The module that a file's bytes make; its classes pickle as these bytes."""
    sha = hashlib.sha256(source).hexdigest()
    module = ModuleType(f"fedsim_user_{hashlib.sha256(file.encode()).hexdigest()[:8]}_{sha[:16]}")
    module.__dict__.update(__file__=file, __sha256__=sha)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    for value in list(vars(module).values()):
        if _is_own(value, module):
            copyreg.pickle(value, functools.partial(_reduce, source, file))
    return module


def _reduce(source: bytes, file: str, value: Any) -> tuple[Any, ...]:
    return _rebuild, (source, file, type(value).__qualname__, dict(vars(value)))


def _rebuild(source: bytes, file: str, name: str, state: dict[str, Any]) -> Any:
    kind = getattr(_module(source, file), name)
    made = object.__new__(kind)
    made.__dict__.update(state)
    return made
