"""Every key below a config's dataclass, with its type, default and sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

from fedsim.config.schema import components_of, describe, hints_of, keys_of, plain, sentences


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
    hints, about = hints_of(cls), sentences(cls)
    for f, key in zip(dataclasses.fields(cls), keys_of(cls), strict=True):
        if owner and key == "name":
            continue
        hint, path = hints[f.name], f"{section}.{key}" if section else key
        default = plain(f.default if f.default is not dataclasses.MISSING else f.default_factory())
        table = components_of(hint)
        if table is not None:
            names = ", ".join(filter(None, table)) + ("; or another method of PEFT" if "" in table else "")
            names += "; or FILE.py:CLASS, see docs/extend.md" if path == "algorithm" else ""
            yield Key(
                f"{path}.name", "", f"one of {names}", default["name"], f"{about[f.name]} The other keys depend on it."
            )
            for name, component in table.items():
                if name:
                    yield from keys_below(component, path, name)
        elif dataclasses.is_dataclass(hint):
            yield from keys_below(hint, path)
        else:
            yield Key(path, owner, describe(hint), json.dumps(default, ensure_ascii=False), about[f.name])


def document(cls: type) -> str:
    """A dataclass's docstring, with a line for each key below it."""
    lines = [
        f"    {k.path}{f' ({k.owner})' if k.owner else ''}: {k.about} {k.type[:1].upper()}{k.type[1:]}; default {k.default}."
        for k in keys_below(cls)
    ]
    return "\n".join([*(cls.__doc__ or "").rstrip().splitlines(), "", "Keys:", *lines])
