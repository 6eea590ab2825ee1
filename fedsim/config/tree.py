"""A YAML file and `key=value` overrides as one tree of plain values, with interpolations and paths resolved."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedsim.config import yaml_text
from fedsim.core.errors import UserError, shown
from fedsim.core.user_code import is_user_code

_PATHS = {  # keys that hold a path, or a list of them
    *(("model", "path"), ("data", "path"), ("data", "validation"), ("data", "test"), ("data", "sources", "path")),
    ("results",),
}
_Place = tuple[str | int, ...]  # keys and positions in lists that lead to a value


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file, interpolations unresolved.

    Raises:
        UserError: for a missing file, or one that is not a YAML mapping in UTF-8.
    """
    if not path.is_file():
        example = "experiments/lora_sentiment/tiny.yaml"
        raise UserError(f"{path}: no such file; give the YAML file of an experiment, e.g. {example}")
    try:
        tree = yaml_text.parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        why = f"not UTF-8 text ({error.reason} at byte {error.start})"
        raise UserError(f"{path}: {why}; save the YAML file as UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: values nested too deep; an experiment has sections of keys and lists") from None
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: invalid YAML{yaml_text.problem(error)}") from None
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}, not sections with keys; see experiments/ for examples")
    return tree or {}


# ------------------------------------------------------------------------------------------------ overrides


def override(tree: dict[str, Any], overrides: Sequence[str], settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of a tree with `key=value` texts applied, then dotted key -> value.

    A new `name` of a section, or the whole section, drops the keys that the tree has in that section.

    Raises:
        UserError: for a text that is not an override, or a key inside a value.
    """
    tree = copy.deepcopy(tree)
    given = [(str(key).split("."), copy.deepcopy(value)) for key, value in (settings or {}).items()]
    for changes in ([_parse(text) for text in overrides], given):
        named = {path[0] for path, _ in changes} & {"seed", "seeds"}
        if len(named) == 1:  # over whichever of the two the file has
            tree.pop("seeds" if named == {"seed"} else "seed", None)
        # Whole sections first, then names: neither drops a key that stands beside it on the command line.
        for path, value in sorted(
            changes, key=lambda change: (len(change[0]) > 1) + (change[0][1:] not in ([], ["name"]))
        ):
            _set(tree, path, value)
    return tree


def _parse(text: str) -> tuple[list[str], Any]:
    """`key=value` -> (the key's parts, the value)."""
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(re.fullmatch(r"[^\s\[\]{}.]+", part) for part in path):
        raise UserError(f"{shown(text)}: not an override; write key=value with a dotted key, e.g. local.lr=1e-3")
    try:
        return path, yaml_text.parse(value)
    except (yaml.YAMLError, RecursionError, ValueError):
        way = "quote a value that holds braces, colons or commas"
        example = "'data.template=\"{sentence} topic: {label}\"'"
        raise UserError(f"{shown(text)}: not readable as key=value; {way}, e.g. {example}") from None


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    at = tree
    for depth, part in enumerate(path[:-1], 1):
        if at.get(part) is None:
            at[part] = {}
        if not isinstance(at[part], dict):
            raise UserError(
                f"{'.'.join(path[:depth])}: {shown(at[part])} is not a section; cannot set {'.'.join(path)}"
            )
        at = at[part]
    if len(path) == 2 and path[1] == "name" and at.get("name") != value:
        at.clear()
    at[path[-1]] = value


# ------------------------------------------------------------------------------------------------ interpolations, paths


def _walk(value: Any, change: Callable[[_Place, Any], Any], place: _Place = ()) -> Any:
    """A copy of a tree with `change(place, value)` for each value that is neither a mapping nor a list."""
    if isinstance(value, dict):
        return {key: _walk(held, change, (*place, key)) for key, held in value.items()}
    if isinstance(value, list):
        return [_walk(held, change, (*place, i)) for i, held in enumerate(value)]
    return change(place, value)


def _is_path(place: _Place) -> bool:
    return tuple(part for part in place if isinstance(part, str)) in _PATHS


def _key(place: _Place) -> str:
    """`data.sources[0].path`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place)[1:]


def escape(tree: dict[str, Any]) -> dict[str, Any]:
    """Protect `${` in text from being taken for an interpolation, but leave the environment variables of paths."""

    def change(place: _Place, value: Any) -> Any:
        if not isinstance(value, str) or _is_path(place):
            return value
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)

    return _walk(tree, change)


def resolve(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of a tree with interpolations resolved, and relative paths absolute that exist from here or from `folder`.

    Environment variables in paths stay: the resolved config then runs on another machine.

    Raises:
        UserError: for an interpolation that cannot be resolved.
    """
    kept: dict[_Place, str] = {}

    def hide(place: _Place, value: Any) -> Any:
        carries = isinstance(value, str) and type(value) is not str  # examples or code, which OmegaConf would drop
        if not carries and not (isinstance(value, str) and "${" in value and _is_path(place)):
            return value
        if not carries:
            expand_path(value, _key(place))
        kept[place] = value
        return ""

    tree = _walk(tree, hide)
    if "${" in repr(tree):
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            key, why = getattr(error, "full_key", None) or "config", str(error).splitlines()[0]
            way = "interpolations are ${oc.env:NAME} and ${section.key}; write \\${ for plain text"
            raise UserError(f"{key}: {why}; {way}") from None
    return _walk(tree, lambda place, value: _absolute(place, kept.get(place, value), folder))


def _absolute(place: _Place, value: Any, folder: Path) -> Any:
    if type(value) is not str or "${" in value:
        return value
    if place[1:] == ("name",) and is_user_code(value):
        file, _, wanted = value.rpartition(":")
        return f"{_found(file, _key(place), folder)}:{wanted}"
    no_file = value in ("", "tiny") or value.startswith("package:") or place == ("results",)
    return _found(value, _key(place), folder) if _is_path(place) and not no_file else value


def _found(text: str, key: str, folder: Path) -> str:
    """The path from here or from `folder`, whichever exists; else the text as it is."""
    for candidate in (Path(expand_path(text, key)), folder / text):
        try:
            if candidate.exists():
                return str(candidate.resolve())
        except (OSError, ValueError):  # too long, or not a path at all: an error where it is read
            pass
    return text


def expand_path(text: str, key: str) -> str:
    """Put environment variables (`${oc.env:NAME}`) and `~` into a path.

    Raises:
        UserError: for an empty path, a variable that is not set, or an unknown user in `~user`.
    """
    if not text.strip():
        raise UserError(f"{key}: {text!r} is empty; give a path")
    if "${" in text:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            text = str(OmegaConf.create({"value": text}).value)
        except OmegaConfBaseException as error:
            name = re.search(r"oc\.env:(\w+)", text)
            way = str(error).split("\n")[0]
            way = f"set {name[1]} to the folder that holds it, or give {key}=PATH" if name else way
            raise UserError(f"{key}: {text!r} cannot be resolved; {way}") from None
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise UserError(f"{key}: {text!r} is of a user who is not known here; give the whole path") from None
