"""Writes the rules of a llguidance grammar for JSON of a schema."""

import json
from collections.abc import Mapping
from typing import Any

OBJECT: Mapping[str, Any] = {"type": "object"}

# Keywords whose values are schemas by name, and those whose values are no schemas.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("enum", "const", "default", "examples", "required")


def json_rule(schema: Mapping[str, Any], blank: str = "") -> str:
    """Returns the right side of a rule for JSON of a schema, with `blank` after each comma and colon and nowhere else.

    (With optional blanks, weights that know nothing of JSON write blanks for ever.) `$id` is left out, because
    references are followed inside the schema alone and llguidance refuses ids that are no URI. llguidance says later
    which of a schema's keywords it cannot keep.
    """
    separators = {"whitespace_flexible": False, "item_separator": f",{blank}", "key_separator": f":{blank}"}
    return "%json " + json.dumps({**_without_ids(schema), "x-guidance": separators})


def _without_ids(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_ids(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: _without_ids(one) for name, one in value.items()}
        elif key != "$id":
            kept[key] = value if key in _VALUES else _without_ids(value)
    return kept
