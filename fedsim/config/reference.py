"""The config in words: suggestions for unknown keys, `fedsim config --explain`, `help(Experiment)` and docs/config.md.

`python -m fedsim.config.reference > docs/config.md` writes the reference page.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from importlib.resources import files

from fedsim.config import yaml_text
from fedsim.config.experiment import Experiment
from fedsim.config.keys import Key, keys_below
from fedsim.core.errors import UserError
from fedsim.core.section import fields_of, hints_of, one_of
from fedsim.core.section import unknown_key as unknown_key_with


@functools.cache
def every_key() -> tuple[Key, ...]:
    """Every key of a config, those of all components included, in the order of the sections."""
    return tuple(keys_below(Experiment))


# ------------------------------------------------------------------------------------------------ suggestions


def unknown_key(path: str, known: Sequence[str]) -> str:
    """The message about a key, given by its full path, where only `known` ones are taken."""
    return unknown_key_with(path, known, suggestion(path, known))


def suggestion(path: str, known: Sequence[str]) -> str:
    """What an unknown key probably means: `did you mean local.lr?`, or nothing.

    Args:
        path: the key's full path.
        known: the keys that its section takes.
    """
    section, _, name = path.rpartition(".")
    here = f"{section}." if section else ""
    same = [k for k in known if _bare(k) == _bare(name)]
    meant = synonyms().get(_bare(path)) or synonyms().get(_bare(name)) or ""
    if not same and not (meant and meant.rpartition(".")[0] == section):
        same = difflib.get_close_matches(name, known, n=2, cutoff=0.8)
    if same:
        return _meant([here + k for k in same])
    if (known_as := synonyms().get(_bare(path)) or synonyms().get(_bare(name))) is not None:
        return _meant([known_as])
    found = _elsewhere(_bare(name), section)
    if not found:
        leaves = {_bare(k.path.rpartition(".")[2]) for k in every_key()}
        near = difflib.get_close_matches(_bare(name), [*leaves, *synonyms()], n=1, cutoff=0.85)
        found = (
            [synonyms()[near[0]]] if near and near[0] in synonyms() else _elsewhere(near[0], section) if near else []
        )
    return _meant(found[:3] or [here + k for k in difflib.get_close_matches(name, known, n=1)])


def _meant(keys: Sequence[str]) -> str:
    return f"did you mean {' or '.join(keys)}?" if keys else ""


def _bare(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


@functools.cache
def synonyms() -> dict[str, str]:
    """What other libraries call a key, without case and separators -> the key here."""
    text = files("fedsim").joinpath("assets/synonyms.yaml").read_text(encoding="utf-8")
    return {_bare(name): key for key, names in yaml_text.parse(text).items() for name in names}


def _elsewhere(bare: str, section: str) -> list[str]:
    """Where a name is a key or a component; of the same section only, if it is one of another of its components."""
    owners: dict[str, list[str]] = {}
    for key in every_key():
        if _bare(key.path.rpartition(".")[2]) == bare and not key.path.endswith(".name"):
            owners.setdefault(key.path, []).append(key.owner)
    own = {path: names for path, names in owners.items() if section and path.startswith(f"{section}.")}
    if own:
        return [f"{path} with {section}.name={' or '.join(names)}" for path, names in own.items()]
    return [*owners] or [f"{s}.name={name}" for s, table in _components() for name in table if _bare(name) == bare]


def _components() -> list[tuple[str, dict[str, type]]]:
    """Sections of which each holds one of several components: (key, name -> dataclass)."""
    tables = [(section, one_of(hint)) for section, hint in hints_of(Experiment).items()]
    return [(section, dict(held.table)) for section, held in tables if held]


# ------------------------------------------------------------------------------------------------ explanations


def explain(name: str) -> str:
    """A key, a section or a component in words, each key with its type, default and sentence.

    Args:
        name: a full key (`local.lr`), a section (`local`) or a component (`lora`, `adapter.name=lora`).

    Raises:
        UserError: for none of them.
    """
    exact = [k for k in every_key() if k.path == name]
    if exact:
        return "\n\n".join(map(_explained, exact))
    if name in fields_of(Experiment):
        own = [k for k in every_key() if k.path.startswith(f"{name}.")]
        return "\n\n".join([f"{name}: {fields_of(Experiment)[name].description}", *map(_explained, own)])
    for section, table in _components():
        for component in table.keys() & {name, name.removeprefix(f"{section}.name=")}:
            own = [k for k in every_key() if k.owner == component and k.path.startswith(f"{section}.")]
            return "\n\n".join([f"{section}.name={component}: {_first_line(table[component])}", *map(_explained, own)])
    raise UserError(unknown_key(name, [*fields_of(Experiment)]))


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0]


def _explained(key: Key) -> str:
    owner = f"  (with {key.path.partition('.')[0]}.name={key.owner})" if key.owner else ""
    return f"{key.path}{owner}\n  {key.about}\n  type: {key.type}\n  default: {key.default}"


def page() -> str:
    """docs/config.md."""
    lines = [
        "# Config reference",
        "",
        "Every key of an experiment's YAML file. Generated by `python -m fedsim.config.reference > docs/config.md`; on the command line",
        "`fedsim config --explain KEY` shows the same.",
    ]
    tables = dict(_components())
    for section in dict.fromkeys(k.path.partition(".")[0] for k in every_key() if "." in k.path):
        lines += ["", f"## `{section}`", "", fields_of(Experiment)[section].description]
        keys = [k for k in every_key() if k.path.startswith(f"{section}.")]
        for owner in dict.fromkeys(k.owner for k in keys):
            if owner:
                lines += ["", f"### `{section}: {{name: {owner}}}`", "", _first_line(tables[section][owner])]
            lines += ["", *_table([k for k in keys if k.owner == owner])]
    top = [k for k in every_key() if "." not in k.path]
    lines[4:4] = ["", "## Top level", "", *_table(top)]
    return "\n".join(lines) + "\n"


def _table(keys: Sequence[Key]) -> list[str]:
    rows = [" | ".join((f"`{k.path}`", k.type, f"`{k.default}`", k.about.replace("|", "\\|"))) for k in keys]
    return ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *(f"| {row} |" for row in rows)]


if __name__ == "__main__":
    print(page(), end="")
