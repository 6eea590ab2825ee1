"""Every key below a config's dataclass, with its type, default and sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

from fedsim.core.section import bare, describe, fields_of, hint_of, one_of, plain


@dataclass(frozen=True)
class Key:
    """A key of a config.

    Attributes:
        path: full, e.g. `adapter.r`.
        owner: the component that takes it, e.g. `lora`; empty where its section has no components.
        type: in words; with the allowed values where they are a list.
        default: as YAML.
        about: a sentence.
    """

    path: str
    owner: str
    type: str
    default: str
    about: str


def keys_below(cls: type, section: str = "", owner: str = "") -> Iterator[Key]:
    """The keys of a dataclass and of the sections in it, in their order; of a section that is one of several components the
    keys of all of them.

    Args:
        cls: the dataclass.
        section: path of its own.
        owner: its name, where it is a component.
    """
    for key, info in fields_of(cls).items():
        if owner and key == "name":
            continue
        hint, path, about = hint_of(cls, key), f"{section}.{key}" if section else key, info.description or ""
        default = None if info.is_required() else plain(info.get_default(call_default_factory=True))
        if held := one_of(hint):
            names = ", ".join(held.table) + ("; or another method of PEFT" if held.other else "")
            names += "; or FILE.py:NAME, see docs/extend.md" if held.find else ""
            yield Key(f"{path}.name", "", f"one of {names}", default["name"], f"{about} The other keys depend on it.")
            for name, component in held.table.items():
                yield from keys_below(component, path, name)
        elif dataclasses.is_dataclass(bare(hint)):
            yield from keys_below(bare(hint), path)
        else:
            value = "(required)" if info.is_required() else json.dumps(default, ensure_ascii=False)
            yield Key(path, owner, describe(hint), value, about)


def document(cls: type) -> str:
    """A dataclass's docstring, with a line for each key below it."""
    lines = [
        f"    {k.path}{f' ({k.owner})' if k.owner else ''}: {k.about} {k.type[:1].upper()}{k.type[1:]}; default {k.default}."
        for k in keys_below(cls)
    ]
    return "\n".join([*(cls.__doc__ or "").rstrip().splitlines(), "", "Keys:", *lines])
