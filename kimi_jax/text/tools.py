"""Declares tools as TypeScript, the form in which Kimi K2.5 and later read their tools.

The rules are those of Moonshot's `tool_declaration_ts.py`. It raises for schemas that they cannot express (an unknown
`$ref`, an enum whose values do not have the declared type), and the declaration falls back to compact JSON.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from kimi_jax.printable import printable
from kimi_jax.text.plain import plain

INDENT = "  "
Tools = Sequence[Mapping[str, Any]] | Any  # any value a client sends; `read_tools` checks it

_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_UNION = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
_ENUM: dict[str, type | tuple[type, ...]] = {"string": str, "number": (int, float), "integer": int, "boolean": bool}


def read_tools(tools: Tools) -> list[dict[str, Any]]:
    """Returns a copy of `tools`, which may be None, in plain JSON types.

    Raises ValueError, naming the tool, where `tools` is not a list of objects, and where `plain` refuses one of them.
    """
    if not isinstance(tools, list | tuple | None):
        raise ValueError(f"tools is a {type(tools).__name__}, expected a list")
    read = []
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise ValueError(f"tools[{index}] is a {type(tool).__name__}, expected an object")
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        read.append(plain(tool, f"tools[{index}]" + (f" ({printable(name, 60)})" if isinstance(name, str) else "")))
    return read


def deep_sorted(value: Any) -> Any:
    """Returns `value` with the keys of every dict in it sorted; lists keep their order."""
    if isinstance(value, Mapping):
        return {key: deep_sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [deep_sorted(item) for item in value]
    return value


def compact_json(tools: Sequence[Mapping[str, Any]]) -> str:
    """Returns deep-sorted tools as JSON without spaces, the declaration of K2 and of the fallback."""
    return json.dumps(deep_sorted(list(tools)), ensure_ascii=False, separators=(",", ":"))


def _comment(text: str, indent: str) -> str:
    return "".join(f"{indent}// {line}\n" if line else "\n" for line in text.split("\n"))


def _comments(schema: Any, indent: str) -> str:
    """Returns the description and the constraints of a schema as comment lines, each ended by a line feed."""
    if not isinstance(schema, Mapping):
        return ""
    lines = _comment(schema["description"], indent) if schema.get("description") else ""
    # a schema with one of these keys keeps its description only, even where it has a type too
    if not any(key in schema for key in ("$ref", "anyOf", "enum")) and isinstance(schema.get("type"), str):
        kept = [f"{key}: {schema[key]}" for key in _CONSTRAINTS.get(schema["type"], ()) if key in schema]
        if kept:
            lines += f"{indent}// {', '.join(kept)}\n"
    return lines


def _enum(schema: Mapping[str, Any]) -> str:
    declared = schema.get("type")
    if isinstance(declared, list):
        if len(declared) != 1 and (len(declared) != 2 or "null" not in declared):
            raise ValueError(f"enum of the types {declared}")
        declared = next((name for name in declared if name != "null"), "null")
    for value in schema["enum"]:
        if declared in _ENUM and value is not None and not isinstance(value, _ENUM[declared]):
            raise ValueError(f"enum value {value!r} is not a {declared}")
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in schema["enum"])


class _Function:
    """Writes one function's parameters, and collects the definitions and self-references in them."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}
        self.refers_to_itself = False

    def type(self, schema: Any, indent: str) -> str:
        if isinstance(schema, bool):
            return "any" if schema else "null"
        if "$ref" in schema:
            return self.reference(schema["$ref"])
        if "anyOf" in schema:
            return " | ".join([self.type(one, indent) for one in schema["anyOf"]])
        if "enum" in schema:
            return _enum(schema)
        if "type" not in schema:
            if schema:
                raise ValueError(f"schema without a type: {schema}")
            return "any"
        match schema["type"]:
            case list() as names:
                return " | ".join([_UNION[name] for name in names])
            case "object":
                return self.object(schema, indent)
            case "array":
                return self.array(schema, indent)
            case "integer":
                return "number"
            case str() as name:
                return name
        raise ValueError(f"schema of type {schema['type']!r}")

    def reference(self, ref: str) -> str:
        if ref == "#":
            self.refers_to_itself = True
            return "parameters"
        name = ref.removeprefix("#/$defs/").split("/")[-1]
        if not ref.startswith("#/$defs/") or not isinstance(self.definitions.get(name), Mapping):
            raise ValueError(f"$ref {ref!r} leads nowhere")
        return name

    def fields(self, schema: Mapping[str, Any], indent: str) -> list[tuple[bool, str, str]]:
        """Returns (optional, name, text) of each property, in the order of the schema."""
        properties = schema.get("properties", {})
        optional = set(properties) - set(schema.get("required", []))
        found = []
        for name, one in properties.items():
            comments = _comments(one, indent)
            default = one.get("default") if isinstance(one, Mapping) else None
            if default is not None:
                number = isinstance(default, int | float)
                comments += f"{indent}// Default: {default if number else json.dumps(default, ensure_ascii=False)}\n"
            mark = "?" if name in optional else ""
            found.append((name in optional, name, f"{comments}{indent}{name}{mark}: {self.type(one, indent)}"))
        return found

    def object(self, schema: Mapping[str, Any], indent: str) -> str:
        self.definitions.update(schema.get("$defs") or {})
        inner = indent + INDENT
        extra = schema.get("additionalProperties")
        keys = []
        if extra is not None:
            keys = [f"{inner}[k: string]: {'never' if extra is False else self.type(extra, inner)}"]
        lines = [text for _, _, text in sorted(self.fields(schema, inner))] + keys
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}" if lines else "{}"

    def array(self, schema: Mapping[str, Any], indent: str) -> str:
        items = schema.get("items") or {}
        inner = indent + INDENT
        comments = _comments(items, inner)
        if comments:
            return f"Array<\n{comments}{inner}{self.type(items, inner)}\n{indent}>"
        return f"Array<{self.type(items, indent)}>"


def _declare(function: Mapping[str, Any]) -> str:
    parameters = function.get("parameters") or {}
    parser = _Function()
    declared = parser.object(parameters, "")
    interfaces = []
    if parser.refers_to_itself:
        declared = "parameters"
        body = ",\n".join(text for _, _, text in parser.fields(parameters, INDENT))
        interfaces.append("interface parameters {" + (f"\n{body}\n" if body else "") + "}\n")
    for name, schema in list(parser.definitions.items()):
        about = _comment(schema["description"], "") if schema.get("description") else ""
        interfaces.append(f"{about}interface {name} {parser.type(schema, '')}\n")
    about = _comment(function["description"], "") if function.get("description") else ""
    return f"{''.join(interfaces)}{about}type {function.get('name', 'function')} = (_: {declared}) => any;"


def declare_tools(tools: Tools) -> str:
    """Returns the TypeScript declaration of OpenAI-style tools (`{"type": "function", "function": {...}}`).

    Keys are deep-sorted first and tools of another type left out; without functions the text is empty. For a schema
    that the rules cannot express it warns and returns the compact JSON of all tools instead; a tool of type function
    without a function object is left out with a warning. Raises ValueError where `read_tools` does.
    """
    tools = deep_sorted(read_tools(tools))
    for index, tool in enumerate(tools):
        if tool.get("type") == "function" and not tool.get("function"):
            warnings.warn(f"tools[{index}] has no function object, so it is not declared", stacklevel=2)
    try:
        functions = [
            _declare(tool["function"]) for tool in tools if tool.get("type") == "function" and tool.get("function")
        ]
    except Exception as error:  # the published code, too, falls back to JSON on any exception
        warnings.warn(f"tools cannot be declared as TypeScript, declared as JSON: {printable(error)}", stacklevel=2)
        return compact_json(tools)
    if not functions:
        return ""
    return "# Tools\n\n## functions\nnamespace functions {\n" + "\n".join(functions) + "\n}\n"
