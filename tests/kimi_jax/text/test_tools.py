"""Tool declarations against the published converter's vectors, and against its rules one by one."""

import json
from pathlib import Path
from typing import Any

import pytest

from kimi_jax.text import declare_tools


def declare(parameters: Any, **function: Any) -> str:
    """Returns the declaration of one function `f`, without the lines around it."""
    text = declare_tools([{"type": "function", "function": {"name": "f", "parameters": parameters, **function}}])
    head, tail = "# Tools\n\n## functions\nnamespace functions {\n", "\n}\n"
    assert text.startswith(head) and text.endswith(tail)
    return text[len(head) : -len(tail)]


def field(schema: Any, required: bool = True) -> str:
    """Returns the declaration of a property `x` with this schema."""
    text = declare({"type": "object", "properties": {"x": schema}, "required": ["x"] if required else []})
    head, tail = "type f = (_: {\n", "\n}) => any;"
    assert text.startswith(head) and text.endswith(tail)
    return text[len(head) : -len(tail)]


def test_published_vectors(real_tokenizer_dir: Path):
    cases = json.loads((real_tokenizer_dir / "vectors.json").read_text(encoding="utf-8"))["tools"]
    assert len(cases) >= 2
    for case in cases:
        assert declare_tools(case["tools"]) == case["typescript"]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer"}, "  x: number"),
        ({"type": "null"}, "  x: null"),
        ({}, "  x: any"),
        (True, "  x: any"),
        (False, "  x: null"),
        ({"type": ["string", "null"]}, "  x: string | null"),
        ({"type": ["object", "array", "integer"]}, "  x: {} | Array<any> | number"),
        ({"enum": ["a", 1, None, True]}, '  x: "a" | 1 | None | True'),
        ({"enum": ["a", None], "type": ["string", "null"]}, '  x: "a" | None'),
        ({"anyOf": [{"type": "string", "description": "no"}, {"type": "null"}]}, "  x: string | null"),
        ({"type": "array"}, "  x: Array<any>"),
        ({"type": "array", "items": {"type": "integer"}}, "  x: Array<number>"),
        (
            {"type": "array", "items": {"type": "string", "minLength": 2}},
            "  x: Array<\n    // minLength: 2\n    string\n  >",
        ),
        ({"type": "object"}, "  x: {}"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "  x: {\n    [k: string]: number\n  }"),
        ({"type": "object", "additionalProperties": {}}, "  x: {\n    [k: string]: any\n  }"),
        ({"type": "string", "description": "a\n\nb"}, "  // a\n\n  // b\n  x: string"),
        (
            {"type": "string", "pattern": "^a", "minLength": 1, "maxLength": 3, "maximum": 5},
            "  // maxLength: 3, minLength: 1, pattern: ^a\n  x: string",
        ),
        (
            {"type": "number", "minimum": 0, "maximum": 1.5, "minLength": 1},
            "  // maximum: 1.5, minimum: 0\n  x: number",
        ),
        ({"type": "array", "maxItems": 2, "minItems": 1}, "  // maxItems: 2, minItems: 1\n  x: Array<any>"),
        ({"type": "boolean", "default": False}, "  // Default: False\n  x: boolean"),
        ({"type": "string", "default": "é"}, '  // Default: "é"\n  x: string'),
        ({"type": "array", "default": [1, True]}, "  // Default: [1, true]\n  x: Array<any>"),
        ({"type": "string", "default": None}, "  x: string"),
        ({"enum": ["a"], "type": "string", "minLength": 3, "description": "d"}, '  // d\n  x: "a"'),
    ],
)
def test_types(schema: Any, expected: str):
    assert field(schema) == expected
    assert field(schema, required=False) == expected.replace("  x:", "  x?:")


def test_required_first_then_alphabetical_and_deep_sorted():
    properties = {name: {"type": "string"} for name in "dbca"}
    assert declare({"properties": properties, "required": ["c", "b"], "type": "object"}) == (
        "type f = (_: {\n  b: string,\n  c: string,\n  a?: string,\n  d?: string\n}) => any;"
    )


def test_self_reference_becomes_an_interface_in_schema_order():
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "next": {"$ref": "#"}}, "required": ["next"]}
    assert declare(schema, description="A list.") == (
        "interface parameters {\n  a?: string,\n  next: parameters\n}\n// A list.\ntype f = (_: parameters) => any;"
    )


def test_definitions_come_first():
    schema = {
        "type": "object",
        "$defs": {"Point": {"type": "object", "description": "In 1D.", "properties": {"x": {"type": "number"}}}},
        "properties": {"at": {"$ref": "#/$defs/Point", "description": "Where."}},
    }
    assert declare(schema) == (
        "// In 1D.\ninterface Point {\n  x?: number\n}\ntype f = (_: {\n  // Where.\n  at?: Point\n}) => any;"
    )


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/definitions/X"},
        {"$ref": "#/$defs/X"},
        {"enum": [1], "type": "string"},
        {"enum": [], "type": ["string", "integer"]},
        {"description": "no type"},
        {"type": ["string", "date"]},
        {"type": "object", "additionalProperties": "yes"},
    ],
)
def test_what_cannot_be_said_falls_back_to_json_with_a_warning(schema: Any):
    tools = [{"type": "function", "function": {"parameters": {"properties": {"é": schema}}, "name": "f"}}]
    with pytest.warns(UserWarning, match="declared as JSON"):
        text = declare_tools(tools)
    assert json.loads(text) == tools
    assert text.startswith('[{"function":{"name":"f","parameters":{"properties":{"é":')
    assert ", " not in text.replace(json.dumps("no type"), "")


def test_other_kinds_of_tools_are_left_out():
    f = {"type": "function", "function": {"name": "f"}}
    assert declare_tools([{"type": "_plugin", "x": 1}, f]) == declare_tools([f])
    assert declare_tools([f]).endswith("{\ntype f = (_: {}) => any;\n}\n")
    assert declare_tools([{"type": "_plugin"}]) == declare_tools([]) == ""


@pytest.mark.parametrize(("tools", "message"), [(["f"], r"tools\[0\] is a str"), ({"f": 1}, "tools is a dict")])
def test_not_a_list_of_tools(tools: Any, message: str):
    with pytest.raises(ValueError, match=message):
        declare_tools(tools)
