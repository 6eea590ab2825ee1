"""YAML text to plain values and back, with the scalars of YAML 1.2 and JSON.

YAML 1.1, which PyYAML reads by itself, takes `yes`, `off`, `2024-01-01`, `1_000`, `010` and `1:30` for booleans, dates and
numbers. Here they are the text that was written. Null is empty, `~` or `null`; booleans are `true` and `false`; numbers are
decimal, without leading zeros or underscores. The keys of a mapping are always text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_SCALARS = {  # tag -> (what it looks like, first characters)
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?(0|[1-9]\d*)", [*"-+0123456789"]),
    "float": (
        r"[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    "merge": (r"<<", ["<"]),
}
_DEEPEST, _LARGEST = 50, 1_000_000  # an alias may stand for ever more values, or for one that holds it


class _Loader(yaml.SafeLoader):
    """Composes nodes; only their tags differ from PyYAML's."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), _first)


def parse(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: for text that is no YAML, has tags, a key twice, or too many values. It may be nested too deep for
            Python, too (RecursionError).
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _value(node, 0, [0])
    finally:
        loader.dispose()


def _value(node: yaml.Node, depth: int, count: list[int]) -> Any:
    count[0] += 1
    if depth > _DEEPEST or count[0] > _LARGEST:
        what = "values nested too deep" if depth > _DEEPEST else f"more than {_LARGEST:,} values"
        raise _refused(f"{what}, or a recursive alias", node)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    kind = "seq" if isinstance(node, yaml.SequenceNode) else "map"
    if node.tag != _TAG + kind:
        raise _refused(f"the tag {_short(node.tag)}", node)
    if kind == "seq":
        return [_value(child, depth + 1, count) for child in node.value]
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refused("a key that is a list or a mapping, not text", key)
        value = _value(child, depth + 1, count)
        if key.tag == _TAG + "merge":
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, dict) for part in parts):
                raise _refused("<< merges mappings, and this is none", child)
            for part in reversed(parts):
                merged.update(part)
        elif key.value in own:
            raise _refused(f"found duplicate key {key.value}", key)
        else:
            own[key.value] = value
    return {**merged, **own}


def _scalar(node: yaml.ScalarNode) -> Any:
    text, name = node.value, node.tag.removeprefix(_TAG)
    if name in ("str", "merge"):
        return text
    if name not in _SCALARS or not re.fullmatch(_SCALARS[name][0], text):
        raise _refused(f"the tag {_short(node.tag)}", node)
    if name == "null":
        return None
    if name == "bool":
        return text.lower() == "true"
    if len(text) > 400:
        raise _refused(f"a number of {len(text):,} digits", node)
    if name == "int":
        return int(text)
    return float(text.replace(".", "") if text[-1].isalpha() else text)  # .inf and .nan


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def dump(tree: Any) -> str:
    """Text that `parse` and every YAML 1.1 reader take for the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2, unlike 1.1, reads as a number: 1e3."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "'" if re.fullmatch(r"[-+]?[\d_.]+([eE][-+]?\d+)?", value) else None
    return dumper.represent_scalar(_TAG + "str", value, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_multi_representer(str, _text)  # text of a subclass, such as that of examples in memory


def problem(error: Exception) -> str:
    """Where YAML text is wrong, why, and what to do: the end of the line `FILE: invalid YAML`."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem is not None:
        mark = error.problem_mark or error.context_mark
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        text = " ".join(error.problem.split()).rstrip(".")
        way = "correct that line"
        if "'\\t'" in text or "cannot start any token" in text:
            way = "indent with spaces, not tabs, and quote text that begins with a special character"
        elif text.startswith("the tag "):
            text = f"{text} is not supported"
            way = "no code is run; write plain text, numbers, lists and sections"
        elif "duplicate key" in text:
            way = "remove one of them"
        return f"{at}: {text}; {way}"
    return f": {' '.join(str(error).split()).rstrip('.')}; see experiments/ for examples"
