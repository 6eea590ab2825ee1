"""Configs side by side: what differs between runs, as values and in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MISSING = object()  # a key that a run's settings and config do not have; None is a value
# No model's scores depend on these.
NO_SETTING = ("name", "results", "executor", "tracking", "checkpoint", "aggregation", "modes")


def flatten_config(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config with dotted keys; lists (and empty sections) as JSON strings."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, (list, dict)) else value
    return flat


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The config keys in which runs differ, and each run's value (`MISSING` where its config lacks the key).

    Keys that no result depends on are left out. A section whose `name` differs is one entry.
    """
    flat = [flatten_config(dict(config)) for config in configs]
    differing: list[str] = []
    for key in dict.fromkeys(key for one in flat for key in one):
        if key.split(".")[0] not in NO_SETTING and len({repr(one.get(key, MISSING)) for one in flat}) > 1:
            differing.append(key)
    settings: dict[str, list[Any]] = {}
    for key in differing:
        section = key.rpartition(".")[0]
        if not section or f"{section}.name" not in differing:
            settings[key] = [one.get(key, MISSING) for one in flat]
        elif section not in settings:
            settings[section] = _sections(flat, section, [k for k in differing if k.startswith(f"{section}.")])
    return settings


def _sections(flat: Sequence[Mapping[str, Any]], section: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Of each run the section's name, and those of the keys in which runs of the same name differ."""
    sections = []
    for one in flat:
        name = one.get(f"{section}.name")
        alike = [other for other in flat if other.get(f"{section}.name") == name]
        apart = [key for key in keys if len({repr(other.get(key)) for other in alike}) > 1]
        sections.append({"name": name} | {key.removeprefix(f"{section}."): one[key] for key in apart if key in one})
    return sections


def say(value: Any) -> str:
    """A config value as short text in which different values look different: `1e-05`, `lora r=8`, `[1, 2]`."""
    if isinstance(value, Mapping):
        parts = [str(value["name"])] if "name" in value else []
        return " ".join(parts + [f"{key}={say(one)}" for key, one in value.items() if key != "name"])
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(say, value))}]"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value or value != value else repr(float(value))
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are not."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def as_number(text: str) -> float | None:
    """Text as a number; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None
