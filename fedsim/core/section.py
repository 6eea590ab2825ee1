"""Config sections: dataclasses that pydantic checks, components chosen by `name`, and one line about what does not fit.

A section states its keys once: type, default and bounds in the annotation, the sentence under the field. Help, reference
page, JSON schema and messages come from there.
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
    """The message about a key, given by its full path, where only `known` ones are taken."""
    section, dot, name = path.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1)
    return unknown_key(path, known, f"did you mean {section}{dot}{near[0]}?" if near else "")


def unknown_key(path: str, known: Sequence[str], hint: str) -> str:
    return f"unknown key {cut(path)}{f' ({hint})' if hint else ''}. Valid keys: {', '.join(known)}"


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
            raise UserError(_message(error, made, unknown)) from None

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
        raise UserError(_message(error, cls, unknown, path)) from None
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
        return f"{path}.name: {shown(name)} is not known{_near(name, self.table)} one of {names}"


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


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, each with its marks."""
    inner = bare(hint)
    return get_args(inner) if get_origin(inner) in (types.UnionType, typing.Union) else ()


def describe(hint: Any) -> str:
    """A type in words: `a whole number or null`."""
    if members := _members(hint):
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
    """What YAML could hold of what Python gives; refuses what no number, file name or YAML file can hold."""
    if isinstance(value, dict):
        return {str(k): _tidy(v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tidy(v, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{path}: {shown(value)} is larger than a number can be; give one below 2^63")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(value) if isinstance(value, int) else float(value)  # NumPy's are written otherwise
    if isinstance(value, str) and (odd := re.search("[\0\ud800-\udfff]", value)):
        kind = "a zero byte" if odd[0] == "\0" else "half of a character (a surrogate), or bytes that are not UTF-8"
        raise UserError(f"{path}: {shown(value)} holds {kind}; take it out")
    return value


# ------------------------------------------------------------------------------------------------ messages

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
        return {*map(bare, (self.hint, *_members(self.hint)))}

    @property
    def words(self) -> list[Any]:
        """The words that are allowed beside other types."""
        return [m for m in _members(self.hint) if get_origin(bare(m)) is Literal]

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


def _message(error: ValidationError, cls: type, unknown: Callable[[str, Sequence[str]], str], start: str = "") -> str:
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
    near = _near(value, map(str, options)).rstrip(";") if isinstance(value, str) else ""
    whole = f"; write {int(value)}" if isinstance(value, float) and value.is_integer() and int in p.takes else ""
    return f"{p.path}: {shown(value)} is not {describe(p.hint)}{near}{quotes}{whole}"


def _near(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), [*known], n=1)
    return f"; did you mean {near[0]}?" if near else ";"


def _located(error: Any, cls: type, start: str) -> _Problem:
    """Follows pydantic's path, in which names of components and of a union's types stand between the keys."""
    path, key, hint, about, owner, chosen = start, start, cls, "", cls, False
    for part in error["loc"]:
        if component := one_of(hint):
            hint = component.choices[part]
            continue
        members = [m for m in _members(hint) if m is not type(None)]
        if len(members) > 1 and not chosen:
            chosen = True
            continue
        if members:
            wanted = list if isinstance(part, int) else dict
            hint = next(m for m in members if get_origin(bare(m)) is wanted)
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
