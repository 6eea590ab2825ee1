"""The JSON schema of the YAML files under `experiments/`, for editors: keys, types, bounds and descriptions.

`fedsim schema > docs/experiment.schema.json` writes the committed one.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from fedsim.config.experiment import Experiment


class _WithoutTitles(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema() -> dict[str, Any]:
    """Of an experiment; of a sweep, if there is the key `experiment`; of a reproduction, if there is the key `sizes`."""
    held = TypeAdapter(Experiment).json_schema(schema_generator=_WithoutTitles)
    held["description"] = "One experiment."  # the whole docstring lists all keys again
    whole = json.loads(files("fedsim").joinpath("assets/schema.json").read_text(encoding="utf-8"))
    return {**whole, "$defs": {**held.pop("$defs"), "Experiment": held, **whole["$defs"]}}


def text() -> str:
    """The schema as it is committed."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
