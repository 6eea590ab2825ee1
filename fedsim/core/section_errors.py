"""One line about what does not fit in a config section, from pydantic's errors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from fedsim.core.errors import UserError, shown
from fedsim.core.section import bare, describe, did_you_mean, fields_of, hint_of, keys_of, members_of, one_of

_BOUNDS = {  # pydantic's error -> what the value must be, and the number in it
    "greater_than_equal": ("must be >=", "ge"),
    "greater_than": ("must be >", "gt"),
    "less_than_equal": ("must be <=", "le"),
    "less_than": ("must be <", "lt"),
    "finite_number": ("must be a finite number", ""),
    "too_short": ("number of values must be >=", "min_length"),
    "too_long": ("number of values must be <=", "max_length"),
    "string_pattern_mismatch": ("must not be empty", ""),
}


@dataclass(frozen=True)
class _Problem:
    """One of pydantic's errors, and where in the config it is.

    Attributes:
        error: as `ValidationError.errors` lists it.
        path: of the value, e.g. `local.betas[1]`.
        key: of the field that holds it, e.g. `local.betas`.
        hint: annotation of the value; None for an unknown key.
        about: description of the field.
        owner: the section that holds the field.
    """

    error: Any
    path: str
    key: str
    hint: Any
    about: str
    owner: type

    @property
    def rank(self) -> tuple[bool, bool, int]:
        """Which of several errors says most: an unknown key, a value out of bounds, the innermost value."""
        kind = self.error["type"]
        return kind == "unexpected_keyword_argument", kind in _BOUNDS, self.path.count("[") + self.path.count(".")

    @property
    def takes(self) -> set[Any]:
        """The types that are allowed, without their bounds."""
        return {*map(bare, (self.hint, *members_of(self.hint)))}

    @property
    def words(self) -> list[Any]:
        """The words that are allowed beside other types."""
        return [m for m in members_of(self.hint) if get_origin(bare(m)) is Literal]

    def wanted(self) -> str:
        """`give ` and the choices, or the start of the field's description."""
        if "one of" in describe(self.hint) and not self.words:
            return f"give {describe(self.hint)}"
        about = re.split(r"(?<!e\.g)[.;] |\.$", self.about or "a value")[0]
        return f"give {', or '.join([about[:1].lower() + about[1:], *map(describe, self.words)])}"

    def out_of_bounds(self) -> str:
        """What the value must be, and what to write in its place."""
        kind, found = self.error["type"], self.error.get("ctx", {})
        must, key = _BOUNDS[kind]
        limit = found.get(key)
        must += "" if limit is None else f" {int(limit) if limit == int(limit) else limit:,}"
        fix = ""
        if kind in ("string_pattern_mismatch", "too_short") or str in self.takes:
            fix = f"; {self.wanted()}"
        elif null := re.search(r"[Nn]ull = (.+?)(?:[.;] |[.;]?$)", self.about):
            fix = f"; null = {null[1]}"
        elif self.words:
            fix = f"; give {describe(self.hint)}"
        return f"{must} (got {shown(self.error['input'])}){fix}"


def message(error: ValidationError, cls: type, unknown: Callable[[str, Sequence[str]], str], start: str = "") -> str:
    """What does not fit, in one line: the full key path, the value and the fix."""
    problems = [_located(e, cls, start) for e in error.errors(include_url=False)]
    first = max(problems, key=lambda p: p.error["type"] == "unexpected_keyword_argument")
    p = max((p for p in problems if p.key == first.key), key=lambda p: p.rank)
    kind, value, found = p.error["type"], p.error["input"], p.error.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return unknown(p.path, keys_of(p.owner))
    if kind == "component":
        return one_of(p.hint).problem(value, p.path, unknown)  # type: ignore[union-attr]
    if kind == "wrong":
        return f"{'.'.join(filter(None, (p.path, found['key'])))}: {found['value']} {found['problem']}"
    if kind == "value_error":
        of_section = "." if dataclasses.is_dataclass(bare(p.hint)) else ": "  # its own check begins with the key
        return str(found["error"]) if isinstance(found["error"], UserError) else f"{p.path}{of_section}{found['error']}"
    if kind == "missing":
        return f"{p.path}: missing; {p.wanted()}"
    if dataclasses.is_dataclass(bare(p.hint)):
        return f"{p.path}: {shown(value)} is not a section; its keys are {', '.join(keys_of(bare(p.hint)))}"
    if kind in _BOUNDS:
        return f"{p.path}: {p.out_of_bounds()}"
    quotes = "; put it in quotes" if str in p.takes and not isinstance(value, (list, dict)) else ""
    options = get_args(bare(p.hint)) if get_origin(bare(p.hint)) is Literal else ()
    meant = did_you_mean(value, map(str, options)).rstrip(";") if isinstance(value, str) else ""
    whole = f"; write {int(value)}" if isinstance(value, float) and value.is_integer() and int in p.takes else ""
    return f"{p.path}: {shown(value)} is not {describe(p.hint)}{meant}{quotes}{whole}"


def _located(error: Any, cls: type, start: str) -> _Problem:
    """Follows pydantic's path, in which names of components and of a union's types stand between the keys."""
    path, key, hint, about, owner, chosen = start, start, cls, "", cls, False
    for part in error["loc"]:
        if component := one_of(hint):
            hint = component.choices[part]
            continue
        members = [m for m in members_of(hint) if m is not type(None)]
        if len(members) > 1 and not chosen:
            chosen = True
            continue
        if members:
            wanted = list if isinstance(part, int) else dict
            hint = members[0] if len(members) == 1 else next(m for m in members if get_origin(bare(m)) is wanted)
        inner, chosen = bare(hint), False
        if dataclasses.is_dataclass(inner):
            path = key = f"{path}.{part}" if path else str(part)
            info = fields_of(inner).get(part)
            about = (info and info.description) or ""
            owner, hint = inner, None if info is None else hint_of(inner, part)
        elif get_origin(inner) is list:
            path, hint = f"{path}[{part}]", get_args(inner)[0]
        elif part != "[key]":
            path, hint = f"{path}.{part}", get_args(inner)[1]
    return _Problem(error, path, key, hint, about, owner)
