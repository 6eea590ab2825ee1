"""The JSON schema of the YAML files under `experiments/`, for editors: keys, types, bounds and sentences while one writes.

`fedsim schema > docs/experiment.schema.json` writes the committed one.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from fedsim.config.experiment import Experiment

_SETTINGS = {"type": "object"}  # dotted key -> value, or of a grid -> list of values
_COUNT = {"type": "integer", "minimum": 1, "maximum": 1024}
_SWEEP = {
    "name": {"type": "string", "description": "Folder of the runs under `results`."},
    "experiment": {
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/Experiment"}],
        "description": "An experiment's file, or its sections.",
    },
    "grid": {
        "anyOf": [_SETTINGS, {"type": "array", "items": _SETTINGS}],
        "description": "Key -> list of values, of which every combination is run; or a list of such grids.",
    },
    "list": {"type": "array", "items": _SETTINGS, "description": "Single settings, each key -> value."},
    "devices": {
        "anyOf": [{"type": "array", "items": {"type": "string"}, "minItems": 1}, {"const": "auto"}],
        "description": "Where runs go; auto = all CUDA devices, else the CPU.",
    },
    "workers": {**_COUNT, "description": "Worker processes."},
    "threads": {**_COUNT, "description": "CPU threads of each worker."},
    "together": {**_COUNT, "description": "Runs whose clients a worker trains in the same passes."},
}
_REPRODUCTION = {
    "type": "object",
    "required": ["title", "sizes", "runs"],
    "properties": {
        "sizes": {"type": "object", "additionalProperties": {"type": "object", "required": ["file"]}},
        "runs": {"type": "array", "items": {"type": "object", "required": ["label", "title"]}},
    },
}


class _WithoutTitles(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema() -> dict[str, Any]:
    """Of an experiment; of a sweep, where there is the key `experiment`; of a reproduction, where there are `sizes`."""
    held = TypeAdapter(Experiment).json_schema(schema_generator=_WithoutTitles)
    defs = held.pop("$defs")
    held["description"] = "One experiment."  # the whole docstring lists all keys again
    sweep = {"type": "object", "properties": _SWEEP, "required": ["experiment"], "additionalProperties": False}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "fedsim",
        "if": {"required": ["experiment"]},
        "then": {"$ref": "#/$defs/Sweep"},
        "else": {
            "if": {"required": ["sizes"]},
            "then": {"$ref": "#/$defs/Reproduction"},
            "else": {"$ref": "#/$defs/Experiment"},
        },
        "$defs": {**defs, "Experiment": held, "Sweep": sweep, "Reproduction": _REPRODUCTION},
    }


def text() -> str:
    """The schema as it is committed."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
