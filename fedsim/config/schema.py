"""From plain values, as YAML gives them, to typed dataclasses and back.

A section that holds one of several components is chosen by its `name`; each component takes its own keys. What does not
fit raises `UserError`: one line with the full key path, the value and the way out.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import itertools
import math
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fedsim.core.errors import UserError, cut, shown
from fedsim.core.user_code import is_user_code


def hints_of(cls: type) -> dict[str, Any]:
    """Field -> type, with the names in annotations resolved."""
    return get_type_hints(cls)


def _key(f: dataclasses.Field) -> str:
    return f.metadata.get("key", f.name)


def keys_of(cls: type) -> list[str]:
    """The keys a section takes, as the user writes them."""
    return [_key(f) for f in dataclasses.fields(cls)]


def plain(value: Any) -> Any:
    """Nested dicts, lists and scalars of a dataclass; `convert` takes them back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {_key(f): plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if "settings" in out:  # a component whose keys are somebody else's
            return {"name": out["name"], **out["settings"]}
        return {"name": out.pop("name"), **out} if "name" in out else out  # inherited keys would stand before the name
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def check_keys(cls: type, value: dict[str, Any], path: str) -> None:
    """Refuse keys that a section does not take.

    Raises:
        UserError: naming the key, what was probably meant, and all that are taken.
    """
    known = keys_of(cls)
    for key in value:
        if key not in known:
            raise UserError(unknown_key(f"{path}.{key}" if path else str(key), known))


def unknown_key(path: str, known: Sequence[str]) -> str:
    """The message about a key, given by its full path, where only `known` ones are taken."""
    from fedsim.config.reference import suggestion  # reads the whole config, and is needed for this message alone

    near = suggestion(path, known)
    hint = f" ({near})" if near else ""
    return f"unknown key {cut(path)}{hint}. Valid keys: {', '.join(known)}"


@functools.cache
def _sentences(file: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the string under it, in a source file."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            fields = found.setdefault(node.name, {})
            for field, after in itertools.pairwise(node.body):
                text = after.value if isinstance(after, ast.Expr) else None
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Constant):
                    fields[field.target.id] = " ".join(str(text.value).split())
    return found


def sentences(cls: type) -> dict[str, str]:
    """Field -> the sentence under it in the source, inherited ones included."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            out |= _sentences(sys.modules[base.__module__].__file__).get(base.__name__, {})
    return out


def _is_component(cls: type) -> bool:
    """Whether a dataclass is one of several that a section chooses by `name`."""
    return get_origin(hints_of(cls).get("name")) is Literal or "settings" in hints_of(cls)


def components_of(annotation: Any) -> dict[str, type] | None:
    """name -> dataclass where an annotation is one component or several to choose from by `name`."""
    members = get_args(annotation) if get_origin(annotation) in (types.UnionType, typing.Union) else (annotation,)
    if not all(dataclasses.is_dataclass(m) and _is_component(m) for m in members):
        return None
    table = {}
    for member in members:
        table[next(f.default for f in dataclasses.fields(member) if f.name == "name")] = member
    return table


def convert(annotation: Any, value: Any, path: str) -> Any:
    """A plain value as the type that an annotation names.

    Raises:
        UserError: with the full key path, the value and the way out.
    """
    table = components_of(annotation)
    if table is not None:
        return _convert_component(table, value, path)
    if dataclasses.is_dataclass(annotation):
        return _convert_section(annotation, value, path)
    return _convert_leaf(annotation, value, path)


def _convert_component(table: dict[str, type], value: Any, path: str) -> Any:
    names = [n for n in table if n]
    if isinstance(value, str):
        raise UserError(
            f"{path}: {shown(value)} is not a section; write {path}={{name: {value}}} or {path}.name={value}"
        )
    if not isinstance(value, dict):
        raise UserError(f"{path}: {shown(value)} is not a section with a name; names: {', '.join(names)}")
    default = next(iter(names)) if len(names) == 1 or path in ("executor", "algorithm") else None
    name = value.get("name", default)
    if name is None:
        known = list(dict.fromkeys(key for cls in table.values() for key in keys_of(cls)))
        for key in value:
            if key not in known:
                raise UserError(unknown_key(f"{path}.{key}", known))
        raise UserError(
            f"{path}.name: missing beside {', '.join(map(str, value)) or 'nothing'}; one of {', '.join(names)}"
        )
    if not isinstance(name, str):
        raise UserError(f"{path}.name: {shown(name)} is not a name; one of {', '.join(names)}")
    if path == "algorithm" and is_user_code(name):
        from fedsim.config.sections import section_of_user  # which imports this module

        name, cls = section_of_user(name)
        return _convert_section(cls, {**value, "name": name}, path)
    if name not in table:
        if "" not in table:
            near = difflib.get_close_matches(name, names, n=1)
            raise UserError(
                f"{path}.name: {shown(name)} is not known{f'; did you mean {near[0]}?' if near else ';'} one of {', '.join(names)}"
            )
        return table[""](name=name, settings={k: v for k, v in value.items() if k != "name"})
    return _convert_section(table[name], {**value, "name": name}, path)


def _convert_section(cls: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {shown(value)} is not a section; its keys are {', '.join(keys_of(cls))}")
    check_keys(cls, value, path)
    hints = hints_of(cls)
    out = {}
    for f in dataclasses.fields(cls):
        if _key(f) in value:
            out[f.name] = convert(hints[f.name], value[_key(f)], f"{path}.{_key(f)}")
    try:
        return cls(**out)
    except UserError:
        raise
    except ValueError as error:  # of a component that checks its own fields
        raise UserError(f"{path}.{error}") from None


_MISMATCH = object()


def _convert_leaf(annotation: Any, value: Any, path: str) -> Any:
    result = _try_leaf(annotation, value, path)
    if result is _MISMATCH:
        quotes = "; put it in quotes" if _takes_text(annotation) and not isinstance(value, (list, dict)) else ""
        raise UserError(f"{path}: {shown(value)} is not {describe(annotation)}{quotes}")
    return result


def _try_leaf(annotation: Any, value: Any, path: str) -> Any:
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin is Literal:
        return value if any(value == a and type(value) is type(a) for a in get_args(annotation)) else _MISMATCH
    if origin in (types.UnionType, typing.Union):
        for member in get_args(annotation):
            result = _try_leaf(member, value, path)
            if result is not _MISMATCH:
                return result
        return _MISMATCH
    if origin is list:
        if not isinstance(value, (list, tuple)):
            return _MISMATCH
        return [_convert_leaf(get_args(annotation)[0], v, f"{path}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            return _MISMATCH
        return {str(k): _convert_leaf(get_args(annotation)[1], v, f"{path}.{k}") for k, v in value.items()}
    if annotation in (None, type(None)):
        return None if value is None else _MISMATCH
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if annotation is int and isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not value.is_integer():  # NaN and infinity are none either
            return _MISMATCH
        if abs(value) >= 2**63:
            raise UserError(f"{path}: {shown(value)} is larger than a number can be; give one below 2^63")
        return int(value)
    if annotation is str and isinstance(value, str):
        return _sound(value, path)
    if annotation in (str, bool):
        return value if isinstance(value, annotation) else _MISMATCH
    return _MISMATCH


def _sound(text: str, path: str) -> str:
    """Refuse what no file name, label or YAML file can hold."""
    odd = next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None)
    if odd is not None:
        kind = "a zero byte" if odd == "\0" else "half of a character (a surrogate), or bytes that are not UTF-8"
        raise UserError(f"{path}: {shown(text)} holds {kind}; take it out")
    return text


def _takes_text(annotation: Any) -> bool:
    """Whether text is allowed, which YAML takes for a number, a boolean or null where it looks like one."""
    return annotation is str or str in get_args(annotation)


def describe(annotation: Any) -> str:
    """A type in words: `a whole number or null`."""
    origin = get_origin(annotation)
    if origin is Literal:
        options = [str(a) for a in get_args(annotation)]
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(a) for a in get_args(annotation))
    if origin is list:
        return f"a list (each {describe(get_args(annotation)[0])})"
    if origin is dict:
        return "a mapping {key: value}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, str(annotation))
