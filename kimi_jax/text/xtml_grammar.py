"""Writes the grammars of Kimi K3's answers (`xtml` has the format): content in `response`, calls in `tools`.

An argument of a call is an element, whose body is the text of a string or the JSON of another value. So a schema of
arguments is kept property by property; what has no such form (`$ref` or `anyOf` at the root, a pattern of a string) is
the JSON of a `json` element.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kimi_jax.text.json_rules import json_rule
from kimi_jax.text.tokenizer import Tokenizer
from kimi_jax.text.xtml import CLOSE, OPEN, SEP, escape, kind_of

KINDS = ("string", "number", "boolean", "null", "object", "array")

_TEXT = "TEXT: /(.|\\n)+/"
# Bounds, because digits and names without end are a grammar too.
_NUMBER = "NUMBER: /[1-9][0-9]{0,3}/"
_KEY = 'KEY: /[^"\\n]{1,100}/'
_LONGEST_KEY = 1_000  # characters; the parser takes tags of a few thousand
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_ANNOTATIONS |= {"$comment", "$schema", "$id"}
_DEFINITIONS = ("$defs", "definitions")
_OF_ROOT = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS, *_ANNOTATIONS}
_OF_STRING = {"type", "enum", "const", "minLength", "maxLength", *_DEFINITIONS, *_ANNOTATIONS}

# The type of an element, and the right side of the rule of its body.
_Value = tuple[str, str]


class XtmlGrammar:
    """Writes the grammar of one answer. `tok` has K3's special tokens."""

    def __init__(self, tok: Tokenizer) -> None:
        self._opens, self._closes, self._ends = (f"<[{tok.special_tokens[one.text]}]>" for one in (OPEN, CLOSE, SEP))
        self._rules: list[str] = []

    def write(
        self,
        functions: Mapping[str, Any],
        content: str | None,
        *,
        forced: bool,
        parallel: bool,
        reasoning: bool,
    ) -> str:
        """Returns the grammar.

        functions: the schema of the arguments of each function that may be called, by its name.
        content: the right side of the rule for the content, None where it is any text.
        forced: whether a function has to be called. parallel: whether more than one call may be made.
        reasoning: whether the answer begins in `think`, after which `response` is yet to open.
        """
        self._rules = [_TEXT, f"text: TEXT? {self._closed('response')}"]
        body = "text"
        if content is not None:
            self._rules += [f"content: {content}", f"response: content {self._closed('response')}"]
            body = "response"
        if functions:
            self._write_section(functions, parallel)
            if forced:
                body = f"{self._closed('response')} section"
            elif content is None:
                body = "text section?"
            else:
                body = f"(response | {self._closed('response')} section)"
        opened = f"{self._opened('response')} " if reasoning else ""
        return "\n".join([f"start: {opened}{body} {self._closed('message')}", *self._rules])

    def _write_section(self, functions: Mapping[str, Any], parallel: bool) -> None:
        calls = " | ".join(f"first{index}" for index in range(len(functions)))
        more = " | ".join(f"more{index}" for index in range(len(functions)))
        many = f" ({more})*" if parallel else ""
        self._rules.append(f"section: {self._opened('tools')} ({calls}){many} {self._closed('tools')}")
        if parallel:
            self._rules.append(_NUMBER)
        self._write_free_arguments()
        for index, (name, schema) in enumerate(functions.items()):
            begin = f'call tool="{escape(name)}" index="'
            rest = f"{self._ends} arguments{index} {self._closed('call')}"
            one = json.dumps(begin + '1"')
            self._rules.append(f"first{index}: {self._opens} {one} {rest}")
            if parallel:
                some = json.dumps(begin)
                self._rules.append(f'more{index}: {self._opens} {some} NUMBER "\\"" {rest}')
            self._write_arguments(f"arguments{index}", schema)

    def _write_free_arguments(self) -> None:
        """Writes the rule `free`: arguments of any names and values."""
        bodies = [f'"{kind}\\"" {self._ends} any_{kind}' for kind in KINDS]
        begin = f'{self._opens} "argument key=\\"" KEY "\\" type=\\""'
        self._rules += [
            _KEY,
            f"free: ({begin} ({' | '.join(bodies)}) {self._closed('argument')})*",
            "any_string: TEXT?",
        ]
        self._rules += [f"any_{kind}: {_json({'type': kind})}" for kind in KINDS if kind != "string"]

    def _write_arguments(self, name: str, schema: Mapping[str, Any]) -> None:
        """Writes the rule `name` for the arguments of a call."""
        if _is_free(schema):
            self._rules.append(f"{name}: free")
            return
        values = _properties(schema)
        if values is None:
            self._rules.append(f"{name}_json: {_json(schema)}")
            begin = json.dumps('json type="object"')
            self._rules.append(f"{name}: {self._opens} {begin} {self._ends} {name}_json {self._closed('json')}")
            return
        parts = []
        for index, (key, bodies) in enumerate(values.items()):
            parts.append(f"{name}_{index}" + ("" if key in schema.get("required", ()) else "?"))
            self._write_argument(f"{name}_{index}", key, bodies)
        self._rules.append(f"{name}: {' '.join(parts)}" if parts else f'{name}: ""')

    def _write_argument(self, name: str, key: str, values: list[_Value]) -> None:
        bodies = []
        for number, (kind, body) in enumerate(values):
            self._rules.append(f"{name}_{number}: {body}")
            begin = json.dumps(f'argument key="{escape(key)}" type="{kind}"')
            bodies.append(f"{begin} {self._ends} {name}_{number}")
        self._rules.append(f"{name}: {self._opens} ({' | '.join(bodies)}) {self._closed('argument')}")

    def _opened(self, tag: str) -> str:
        return f'{self._opens} "{tag}" {self._ends}'

    def _closed(self, tag: str) -> str:
        return f'{self._closes} "{tag}" {self._ends}'


def _json(schema: Mapping[str, Any]) -> str:
    return json_rule(schema, blank=" ")  # prompts show arguments with blanks


def _is_free(schema: Mapping[str, Any]) -> bool:
    """Says whether a schema of arguments allows any names and values."""
    return (
        schema.keys() <= _OF_ROOT - {"required"}
        and schema.get("type", "object") == "object"
        and schema.get("properties") in (None, {})
        and schema.get("additionalProperties") in (None, True, {})
    )


def _properties(schema: Mapping[str, Any]) -> dict[str, list[_Value]] | None:
    """Returns the elements that the value of each property may be, None where a schema of arguments says more than
    what properties there are and which are required, or where elements do not keep it."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    plain = (
        schema.keys() <= _OF_ROOT
        and schema.get("type", "object") == "object"
        and isinstance(properties, Mapping)
        and all(len(key) <= _LONGEST_KEY and "\n" not in key for key in properties)
        and isinstance(required, list)
        and all(key in properties for key in required)
        and schema.get("additionalProperties") in (None, True, False, {})
        # (seen from one property, references lead to definitions alone)
        and all(one.startswith(("#/$defs/", "#/definitions/")) for one in _references(schema))
    )
    if not plain:
        return None
    values = {}
    for key, one in properties.items():
        if (found := _values(one, schema)) is None:
            return None
        values[key] = found
    return values


def _values(schema: Any, root: Mapping[str, Any], depth: int = 0) -> list[_Value] | None:
    """Returns the elements that a value of a property may be, None where they are not to be told from its schema."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping) or depth == 8:
        return None
    wanted: Any = dict(schema)
    if "$ref" in wanted and wanted.keys() <= {"$ref", *_ANNOTATIONS}:
        return _values(_definition(root, wanted["$ref"]), root, depth + 1)
    if isinstance(wanted.get("anyOf"), list) and wanted["anyOf"] and wanted.keys() <= {"anyOf", *_ANNOTATIONS}:
        found = [_values(one, root, depth + 1) for one in wanted["anyOf"]]
        return None if any(one is None for one in found) else [value for one in found for value in one or ()]
    kinds = wanted.get("type", list(KINDS))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not kinds or not all(kind in (*KINDS, "integer") for kind in kinds):
        return None
    named = [wanted["const"]] if "const" in wanted else wanted.get("enum")
    if named is not None:
        return _named(wanted, kinds, named)
    definitions = {key: root[key] for key in _DEFINITIONS if key in root}
    values: list[_Value] = []
    for kind in kinds:
        if kind != "string":
            values.append(("number" if kind == "integer" else kind, _json({**definitions, **wanted, "type": kind})))
        elif (body := _string(wanted)) is not None:
            values.append((kind, body))
        else:
            return None
    return values


def _named(schema: Mapping[str, Any], kinds: list[str], named: Any) -> list[_Value] | None:
    """Returns the elements of `enum` or `const`."""
    if not isinstance(named, list) or not named or not schema.keys() <= _OF_STRING - {"minLength", "maxLength"}:
        return None
    values = []
    for one in named:
        if (kind := kind_of(one)) in kinds or (kind == "number" and "integer" in kinds):
            body = one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
            values.append((kind, json.dumps(body)))
    return values or None


def _string(schema: Mapping[str, Any]) -> str | None:
    """Returns the right side of the rule for a text of a schema, None where it is held to more than a length."""
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not schema.keys() <= _OF_STRING or not isinstance(least, int) or not isinstance(most, int | None):
        return None
    if not least and most is None:
        return "TEXT?"
    return f"/(.|\\n){{{least},{'' if most is None else most}}}/"


def _definition(root: Mapping[str, Any], reference: Any) -> Any:
    """Returns the definition that a reference leads to, None where there is none."""
    found: Any = root
    for name in str(reference).removeprefix("#/").split("/"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _references(schema: Mapping[str, Any]) -> Iterator[str]:
    yield from re.findall(r'"\$ref": "((?:[^"\\]|\\.)*)"', json.dumps(schema))
