"""Config sections: dataclasses that pydantic checks, and components chosen by `name`.

A section defines its keys once: type, default and bounds in the annotation, the description under the field. Help, reference
page, JSON schema and messages (`section_errors.py`) come from there.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, dataclass_transform, get_args, get_origin

import pydantic.dataclasses
from pydantic import ConfigDict, Field, ValidationError, WrapValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, core_schema

from fedsim.core.errors import UserError, cut, shown

_CONFIG = ConfigDict(
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
    validate_by_alias=True,
    validate_by_name=True,
)


def as_given(value: Any, check: Callable[[Any], Any]) -> Any:
    """Check text without making it plain: it may be a subclass of str that carries examples or code."""
    check(value)
    return value


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(pattern=r"\S"), WrapValidator(as_given)]


def near_key(path: str, known: Sequence[str]) -> str:
    """The message about an unknown key, given by its full path, with the most similar one of `known`."""
    section, dot, name = path.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1)
    return unknown_key(path, known, f"did you mean {section}{dot}{near[0]}?" if near else "")


def unknown_key(path: str, known: Sequence[str], hint: str) -> str:
    """The message about an unknown key."""
    return f"unknown key {cut(path)}{f' ({hint})' if hint else ''}. Valid keys: {', '.join(known)}"


def did_you_mean(name: Any, known: Any) -> str:
    """`; did you mean ...?`, or only the semicolon."""
    found = difflib.get_close_matches(str(name), [*known], n=1)
    return f"; did you mean {found[0]}?" if found else ";"


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def section(cls: type, *, unknown: Callable[[str, Sequence[str]], str] = near_key) -> Any:
    """Make a class a frozen dataclass whose values are checked, strictly, when it is made.

    Args:
        cls: its annotated fields, each with a sentence under it, and pydantic validators.
        unknown: (full path, known keys) -> the message about an unknown key.
    """
    cls.__get_pydantic_core_schema__ = classmethod(_section_schema)  # type: ignore[attr-defined]
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls)
    init = made.__init__

    @functools.wraps(init)
    def checked(self: Any, /, **given: Any) -> None:
        try:
            init(self, **{key: _tidy(value, key) for key, value in given.items()})
        except ValidationError as error:
            from fedsim.core.section_errors import message

            raise UserError(message(error, made, unknown)) from None

    made.__init__ = checked
    return made


def made_of(
    cls: Any, given: Mapping[str, Any], path: str, unknown: Callable[[str, Sequence[str]], str] = near_key
) -> Any:
    """A section from its keys, whose errors name the full path.

    Raises:
        UserError: for what does not fit.
    """
    made = cls.__new__(cls)
    try:
        cls.__init__.__wrapped__(made, **{key: _tidy(value, f"{path}.{key}") for key, value in given.items()})
    except ValidationError as error:
        from fedsim.core.section_errors import message

        raise UserError(message(error, cls, unknown, path)) from None
    return made


def _sentences(cls: type) -> dict[str, str]:
    """Field of a dataclass -> the sentence under it; none for a class whose source is not at hand."""
    if "__dataclass_fields__" not in vars(cls):
        return {}
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError):
        return {}
    return {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in itertools.pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if not ast.unparse(field.annotation).startswith("ClassVar")
    }


def _section_schema(cls: Any, source: Any, handler: Any) -> Any:
    for base in cls.__mro__[1:]:  # pydantic reads the sentences of a class's own fields alone
        for name, about in _sentences(base).items():
            own = cls.__pydantic_fields__[name]
            own.description = own.description or about
    schema = inner = handler(source)
    while inner["type"] != "dataclass":
        inner = inner["schema"]
    inner["strict"] = False  # its values are strict, but a mapping may stand for it
    return schema


@dataclass(frozen=True)
class OneOf:
    """Marks a field that holds one component of a table, chosen by its `name`: `Annotated[Lora | Ia3, OneOf(ADAPTERS)]`.

    Attributes:
        table: name -> section; it may grow until the class with the field is made.
        default: the name where none is given; None = one must be given.
        other: the section for all other names, with their keys in its field `settings`; None = they are unknown.
        find: (keys, of a name that is not in the table) -> the checked section, or None where it has none either.
    """

    table: Mapping[str, type]
    default: str | None = None
    other: type | None = None
    find: Callable[[Mapping[str, Any]], Any] | None = None

    @property
    def choices(self) -> dict[str, type]:
        """name -> section, `""` for all other names."""
        return dict(self.table) if self.other is None else {**self.table, "": self.other}

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        choices = {name: handler.generate_schema(cls) for name, cls in self.choices.items()}
        union = core_schema.tagged_union_schema(choices, discriminator=self._tag)
        return core_schema.no_info_wrap_validator_function(self._check, union)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        refs = dict(zip(self.choices, handler(schema)["oneOf"], strict=True))
        for name, ref in refs.items():
            if name != self.default:
                held = handler.resolve_ref_schema(ref)
                held["required"] = list(dict.fromkeys(["name", *held.get("required", [])]))
        if self.other is not None:
            refs[""] = {
                "type": "object",
                "properties": {"name": {"type": "string", "not": {"enum": [*self.table]}}},
                "required": ["name"],
            }
        if self.find is not None:
            named = {"type": "string", "pattern": r"\.py:\w+$"}
            refs["file"] = {"type": "object", "properties": {"name": named}, "required": ["name"]}
        return {"anyOf": list(refs.values())}

    def _check(self, value: Any, by_table: Callable[[Any], Any]) -> Any:
        name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
        if self.find is not None and isinstance(name, str) and name not in self.table:
            found = self.find(value) if isinstance(value, dict) else value
            if found is not None:
                return found
        return by_table(self._named(value))

    def _tag(self, value: Any) -> str:
        name = value["name"] if isinstance(value, dict) else value.name
        return name if name in self.table else ""

    def _named(self, value: Any) -> Any:
        if type(value) in self.choices.values():
            return value
        name = value.get("name", self.default) if isinstance(value, dict) else None
        if not isinstance(name, str) or (name not in self.table and self.other is None):
            raise PydanticCustomError("component", "no component")
        if name not in self.table:
            return {"name": name, "settings": {k: v for k, v in value.items() if k != "name"}}
        return {**value, "name": name}

    def problem(self, value: Any, path: str, unknown: Callable[[str, Sequence[str]], str]) -> str:
        """The message about a value that names no component."""
        names = ", ".join(self.table)
        if isinstance(value, str):
            return f"{path}: {shown(value)} is not a section; write {path}={{name: {value}}} or {path}.name={value}"
        if not isinstance(value, dict):
            return f"{path}: {shown(value)} is not a section with a name; names: {names}"
        name = value.get("name")
        if name is None:
            known = list(dict.fromkeys(key for cls in self.choices.values() for key in keys_of(cls)))
            wrong = next((key for key in value if key not in known), None)
            if wrong is not None:
                return unknown(f"{path}.{wrong}", known)
            return f"{path}.name: missing beside {', '.join(value) or 'nothing'}; one of {names}"
        return f"{path}.name: {shown(name)} is not known{did_you_mean(name, self.table)} one of {names}"


@dataclass(frozen=True)
class Like:
    """Marks a plain dict that has to fit a section: `Annotated[dict[str, Any], Like(Source)]`."""

    section: type

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_wrap_validator_function(as_given, handler.generate_schema(self.section))


def wrong(key: str, value: Any, problem: str) -> PydanticCustomError:
    """The error that a validator of a whole section raises about one of its keys."""
    return PydanticCustomError("wrong", "{problem}", {"key": key, "value": shown(value), "problem": problem})


# ------------------------------------------------------------------------------------------------ what a section says


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Field -> type, with the names in annotations resolved."""
    return typing.get_type_hints(cls, include_extras=True)


def fields_of(cls: Any) -> dict[str, FieldInfo]:
    """Key, as the user writes it -> pydantic's account of the field."""
    return {info.alias or name: info for name, info in cls.__pydantic_fields__.items()}


def keys_of(cls: type) -> list[str]:
    """The keys that a section takes, as the user writes them."""
    return [*fields_of(cls)]


def hint_of(cls: Any, key: str) -> Any:
    """The annotation of a key."""
    return hints_of(cls)[next(name for name, info in cls.__pydantic_fields__.items() if key in (name, info.alias))]


def defaults_of(cls: type) -> dict[str, Any]:
    """Key -> its default as plain values; keys that must be given are left out."""
    infos = fields_of(cls).items()
    return {key: plain(i.get_default(call_default_factory=True)) for key, i in infos if not i.is_required()}


def one_of(hint: Any) -> OneOf | None:
    """The table of an annotation that holds one component of several."""
    return next((m for m in _metadata(hint) if isinstance(m, OneOf)), None)


def bare(hint: Any) -> Any:
    """An annotation without what is marked on it."""
    like = next((m for m in _metadata(hint) if isinstance(m, Like)), None)
    return like.section if like else bare(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def _metadata(hint: Any) -> tuple[Any, ...]:
    return hint.__metadata__ if get_origin(hint) is Annotated else ()


def members_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union, each with its marks."""
    inner = bare(hint)
    return get_args(inner) if get_origin(inner) in (types.UnionType, typing.Union) else ()


def describe(hint: Any) -> str:
    """A type in words: `a whole number or null`."""
    if members := members_of(hint):
        return " or ".join(map(describe, members))
    inner = bare(hint)
    origin = get_origin(inner)
    if origin is Literal:
        options = [str(a) for a in get_args(inner)]
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if origin is list:
        return f"a list (each {describe(get_args(inner)[0])})"
    if origin is dict or dataclasses.is_dataclass(inner):
        return "a mapping {key: value}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(inner, str(inner))


def plain(value: Any) -> Any:
    """Nested dicts, lists and scalars of a section, which takes them back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {info.alias or f: plain(getattr(value, f)) for f, info in value.__pydantic_fields__.items()}
        if "settings" in out:  # a component whose keys are somebody else's
            return {"name": out["name"], **out["settings"]}
        return {"name": out.pop("name"), **out} if "name" in out else out  # inherited keys would stand before the name
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def _tidy(value: Any, path: str) -> Any:
    """A Python value as YAML has it; refuses what cannot be a number or a file name, or be written as YAML."""
    if isinstance(value, dict):
        return {str(k): _tidy(v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tidy(v, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{path}: {shown(value)} is too large; give a number below 2^63")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(value) if isinstance(value, int) else float(value)  # NumPy's are written otherwise
    if isinstance(value, str) and (odd := re.search("[\0\ud800-\udfff]", value)):
        kind = "a zero byte" if odd[0] == "\0" else "a surrogate, or bytes that are not UTF-8"
        raise UserError(f"{path}: {shown(value)} contains {kind}; remove it")
    return value
