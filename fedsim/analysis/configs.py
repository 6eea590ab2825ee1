"""Configs side by side: what differs between runs, as values and in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MISSING = object()  # a key that a run's settings and config do not have; None is a value
# No model's scores depend on these.
NO_SETTING = ("name", "results", "executor", "tracking", "checkpoint", "aggregation", "modes")
_MORE = "\N{HORIZONTAL ELLIPSIS}"


def flatten_config(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
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
    flat = [flatten_config(config) for config in configs]
    known = [key for key in dict.fromkeys(key for one in flat for key in one) if key.split(".")[0] not in NO_SETTING]
    differing = [key for key in known if len({repr(one.get(key, MISSING)) for one in flat}) > 1]
    settings: dict[str, list[Any]] = {}
    for key in differing:
        section = key.rpartition(".")[0]
        if not section or f"{section}.name" not in differing:
            settings[key] = [one.get(key, MISSING) for one in flat]
        elif section not in settings:
            settings[section] = _sections(flat, section, [k for k in differing if k.startswith(f"{section}.")])
    return settings


def _sections(flat: Sequence[Mapping[str, Any]], section: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Each run's section: its name, and those of the keys in which runs of the same name differ."""
    sections = []
    for one in flat:
        name = one.get(f"{section}.name")
        alike = [other for other in flat if other.get(f"{section}.name") == name]
        apart = [key for key in keys if len({repr(other.get(key)) for other in alike}) > 1]
        sections.append({"name": name} | {key.removeprefix(f"{section}."): one[key] for key in apart if key in one})
    return sections


def say(value: Any, most: int | None = None) -> str:
    """A config value as short text in which different values look different: `1e-05`, `lora r=8`, `[1, 2]`.

    Text of more than `most` characters has an ellipsis in it.
    """
    if isinstance(value, Mapping):
        parts = [str(value["name"])] if "name" in value else []
        text = " ".join(parts + [f"{key}={say(one)}" for key, one in value.items() if key != "name"])
    elif isinstance(value, (list, tuple)):
        text = f"[{', '.join(map(say, value))}]"
    elif isinstance(value, float):
        text = f"{value:g}" if float(f"{value:g}") == value or value != value else repr(float(value))
    else:
        text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return text if most is None or len(text) <= most else f"{text[: most - 12]}{_MORE}{text[-11:]}"


def _say_all(values: Sequence[Any]) -> list[str]:
    """Each value in as few characters as tell all of them apart, from 30 on."""
    whole = list(map(say, values))
    shorter = ([say(value, most) for value in values] for most in (30, 60, 120))
    return next((texts for texts in shorter if len(set(texts)) == len(set(whole))), whole)


def name_settings(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each flat config that says what varies, as `alpha = 0.1, lr = 1e-05`.

    Of more than three keys those that tell most are named, and an ellipsis stands for the others.
    """
    found = {key: values for key, values in differences(configs).items() if key != "experiment"}
    found = {key: [None if value is MISSING else value for value in values] for key, values in found.items()}
    # A key that only some configs have is named only where nothing else differs.
    several = [key for key, values in found.items() if len({say(value) for value in values if value is not None}) > 1]
    keys, said = several or list(found), {key: _say_all(values) for key, values in found.items()}
    experiments = [str(config.get("experiment")) for config in configs]
    if len(set(experiments)) > 1 and (len(keys) > 3 or not keys):
        found["experiment"] = said["experiment"] = experiments
        keys = ["experiment", *keys]
    chosen = keys if len(keys) <= 3 else _telling(keys, said)
    last = [key.rpartition(".")[2] for key in chosen]
    labels = []
    for number in range(len(configs)):
        parts = []
        for key, end in zip(chosen, last, strict=True):
            value, text = found[key][number], said[key][number]
            name = end if last.count(end) == 1 else key
            bare = key == "experiment" or name == "name" or isinstance(value, Mapping)
            if key not in several or value is not None:
                parts.append(text if bare else f"{name} = {text}")
        labels.append(", ".join([*parts, *([_MORE] if set(keys) - {*chosen, "experiment"} else [])]))
    return labels


def _telling(keys: Sequence[str], said: Mapping[str, Sequence[str]]) -> list[str]:
    """The keys that tell settings apart: one by one that which tells most more of them apart, or is shortest."""
    chosen: list[str] = []

    def apart(*more: str) -> int:
        return len(set(zip(*(said[key] for key in (*chosen, *more)), strict=True)))

    while len(chosen) < len(keys):
        best = max(set(keys) - {*chosen}, key=lambda key: (apart(key), -max(map(len, said[key])), -keys.index(key)))
        if chosen and apart(best) == apart():
            break
        chosen.append(best)
    return [key for key in keys if key in chosen]


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are not."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def as_number(text: str) -> float | None:
    """Text as a number; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None
