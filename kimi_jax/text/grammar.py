"""Writes the grammars that an answer is held to: calls of tools, JSON of a schema, a pattern, a choice.

The text is llguidance's Lark: special tokens stand in it by id, JSON schemas inline. A grammar describes the answer
from the end of its reasoning on, and ends where a token that ends a text may come. Special tokens that it does not name
are never allowed, so that no string in arguments forges a turn.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kimi_jax.printable import printable
from kimi_jax.text.answer_states import Marker
from kimi_jax.text.json_rules import OBJECT, json_rule
from kimi_jax.text.messages import Message
from kimi_jax.text.plain import plain
from kimi_jax.text.tokenizer import Tokenizer
from kimi_jax.text.tools import Tools, read_tools
from kimi_jax.text.xtml import OPEN
from kimi_jax.text.xtml_grammar import XtmlGrammar

MAX_TOOLS = 128  # as Moonshot's and OpenAI's APIs have it

_TEXT = "TEXT: /(.|\\n)+/"
# A bound, because digits without end are a grammar too.
_NUMBER = "NUMBER: /0|[1-9][0-9]{0,3}/"
_CALL_NUMBER = re.compile(r".+:([0-9]{1,6})")


def content_rule(response_format: Any) -> str | None:
    """Returns the right side of the rule for a `response_format` of OpenAI's API; None where any text will do.

    `json_object`, and `json_schema` whose `strict` is false, stand for any object. Raises ValueError naming the field
    that is wrong.
    """
    if response_format is None:
        return None
    form = _object(plain(response_format, "response_format"), "response_format")
    match form.get("type"):
        case "text":
            return None
        case "json_object":
            return json_rule(OBJECT)
        case "json_schema":
            named = _object(form.get("json_schema"), "response_format.json_schema")
            _text(named.get("name"), "response_format.json_schema.name")
            schema = _object(named.get("schema"), "response_format.json_schema.schema")
            strict = named.get("strict")
            if not isinstance(strict, bool | None):
                raise _wrong("response_format.json_schema.strict", strict, "a boolean")
            return json_rule(OBJECT if strict is False else schema)
    raise _wrong("response_format.type", form.get("type"), "text, json_object or json_schema")


def choice_rule(choices: Sequence[str]) -> str:
    """Returns the right side of the rule for one of some texts. Raises ValueError where there are none."""
    if not isinstance(choices, list | tuple) or not choices:
        raise _wrong("choice", choices, "a list of at least one text")
    return " | ".join(json.dumps(_text(one, f"choice[{index}]")) for index, one in enumerate(choices))


def pattern_rule(pattern: str) -> str:
    """Returns the right side of the rule for text of a regular expression, in the syntax of Rust's `regex`.

    Raises ValueError where it is empty or ends inside an escape.
    """
    _text(pattern, "regex")
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise ValueError("regex ends in a single backslash")
    # A slash would end the expression here, and a line feed the rule.
    written = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    return "/" + re.sub(r"(?s)\\.|/|\n", lambda found: written.get(found[0], found[0]), pattern) + "/"


def write_grammar(
    tok: Tokenizer,
    tools: Tools = None,
    tool_choice: Any = None,
    *,
    content: str | None = None,
    parallel: bool = True,
    number: int = 0,
    reasoning: bool = True,
) -> str | None:
    """Returns the grammar of an answer, or None where it may be anything.

    tools: the arguments of one whose `strict` is true keep its schema, those of others are any object.
    tool_choice: "auto" (None, too, where there are tools), "none", "required", or the function to call, as OpenAI has
        it: `{"type": "function", "function": {"name": ...}}`.
    content: the right side of the rule for an answer that calls nothing (`content_rule`, `choice_rule`, ...); None is
        any text, which may then also stand before calls.
    parallel: whether more than one call may be made.
    number: the number of the first call, `next_number` of the conversation; the model numbers further ones. (K3 counts
        an answer's calls from one.)
    reasoning: whether the answer begins in reasoning, after which K3's content is yet to open.

    Raises ValueError naming the field that is wrong.
    """
    functions = _functions(tools)
    chosen, forced = _chosen(tool_choice, functions)
    if content is None and not functions:
        return None
    if OPEN.text in tok.special_tokens:
        return XtmlGrammar(tok).write(chosen, content, forced=forced, parallel=parallel, reasoning=reasoning)
    rules = [_TEXT] if content is None else [f"content: {content}"]
    if not chosen:
        return "\n".join(["start: TEXT?" if content is None else "start: content", *rules])
    if forced:
        rules = ["start: section"]
    else:
        rules.insert(0, "start: TEXT? section?" if content is None else "start: content | section")
    return "\n".join([*rules, *_section(tok, chosen, parallel, number)])


def next_number(messages: Sequence[Message]) -> int:
    """Returns the number of a conversation's next call: the count of calls so far, or one more than an id has."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    numbers = [int(found[1]) + 1 for call in calls if (found := _CALL_NUMBER.fullmatch(call.get("id") or ""))]
    return max([len(calls), *numbers])


def _section(tok: Tokenizer, functions: Mapping[str, Any], parallel: bool, number: int) -> Iterator[str]:
    def token(marker: Marker) -> str:
        if marker.value not in tok.special_tokens:
            raise ValueError(
                f"the tokenizer has no special token {marker.value}, with which calls of tools are written"
            )
        return f"<[{tok.special_tokens[marker.value]}]>"

    def call(name: str) -> str:
        names = " | ".join(f"{name}{index}" for index in range(len(functions)))
        return f"{name}: {token(Marker.BEGIN_CALL)} ({names}) {token(Marker.END_CALL)}"

    more = " more*" if parallel else ""
    yield f"section: {token(Marker.BEGIN_SECTION)} first{more} {token(Marker.END_SECTION)}"
    yield call("first")
    if parallel:
        yield call("more")
        yield _NUMBER
    for index, (name, schema) in enumerate(functions.items()):
        begin = f"functions.{name}:"
        arguments = f"{token(Marker.BEGIN_ARGUMENTS)} arguments{index}"
        yield f"first{index}: {json.dumps(f'{begin}{number}')} {arguments}"
        if parallel:
            yield f"more{index}: {json.dumps(begin)} NUMBER {arguments}"
        yield f"arguments{index}: {json_rule(schema)}"


def _functions(tools: Tools) -> dict[str, Any]:
    """Returns the schema of the arguments of each function in `tools`, by its name."""
    functions: dict[str, Any] = {}
    if len(read := read_tools(tools)) > MAX_TOOLS:
        raise ValueError(f"tools has {len(read)} tools, expected at most {MAX_TOOLS}")
    for index, tool in enumerate(read):
        where = f"tools[{index}].function"
        function = _object(tool.get("function"), where)
        name = _text(function.get("name"), f"{where}.name")
        if name in functions:
            raise ValueError(f"{where}.name is {printable(repr(name), 60)}, which an earlier tool has")
        if "\n" in name:
            raise _wrong(f"{where}.name", name, "a name in one line")
        strict = function.get("strict")
        if not isinstance(strict, bool | None):
            raise _wrong(f"{where}.strict", strict, "a boolean")
        parameters = _object(function.get("parameters") or {}, f"{where}.parameters")
        functions[name] = _of_object(parameters) if strict else OBJECT
    return functions


def _chosen(tool_choice: Any, functions: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Returns the functions that may be called, and whether one has to be."""
    match tool_choice:
        case "none":
            return {}, False
        case None | "auto":
            return functions, False
        case "required":
            if not functions:
                raise ValueError("tool_choice is 'required', which needs tools")
            return functions, True
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in functions:
                raise ValueError(f"tool_choice names {printable(repr(name), 60)}, which is none of the tools")
            return {name: functions[name]}, True
    raise _wrong("tool_choice", tool_choice, "auto, none, required, or an object that names a function")


def _of_object(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a schema of arguments, which are an object even where it does not say so."""
    says = ("type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const")
    return schema if any(key in schema for key in says) else {**OBJECT, **schema}


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "an object")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(where, value, "a text")
    return value


def _wrong(where: str, value: Any, expected: str) -> ValueError:
    found = printable(repr(value), 60) if isinstance(value, str | None) else f"of type {type(value).__name__}"
    return ValueError(f"{where} is {found}, expected {expected}")
