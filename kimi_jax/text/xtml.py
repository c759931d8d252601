"""Writes the prompts of Kimi K3 as segments: its XTML, elements whose tags are spelt between special tokens.

    <|open|>message role="user"<|sep|>Hello<|close|>message<|sep|><|end_of_msg|>

Source: Moonshot's `encoding_k3.py`, which has no Jinja template. Each segment is encoded for itself: tokens never
straddle two of them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from kimi_jax import json_reader
from kimi_jax.printable import printable
from kimi_jax.text.messages import IMAGE_TYPES, Message
from kimi_jax.text.segments import Segment, media_segments
from kimi_jax.text.tools import compact_json, deep_sorted

OPEN, CLOSE, SEP, END_OF_MESSAGE = (
    Segment(f"<|{name}|>", is_marker=True) for name in ("open", "close", "sep", "end_of_msg")
)
EFFORTS = ("low", "high", "max")
TOOL_CHOICES = {
    "required": "The system is invoked with `tool_choice=required`.\nYou MUST call tools in the next message.",
    "none": "The system is invoked with `tool_choice=none`.\nYou MUST NOT call any tools in the next message.",
}
_DECLARED = "# Tools\nHere are the available tools, described in JSONSchema.\n\n"
_DECLARED_LATER = (
    "## New Tools Available\nThe system dynamically extends the toolset via lazy-loading.\n"
    "You have access to all existing and extended tools.\nHere are the specs for the extended tools.\n\n"
)
_EFFORT = (
    "`thinking_effort` guides on how much to think in your thinking channel (not including the response channel), "
    "supported values include `low`, `medium`, `high`, and `max`.\n"
    "Now the system is invoked with `thinking_effort={}`."
)
_FORMAT = (
    "The system is invoked with `response_format={}`.\n"
    "Your response must be raw JSON data without markdown code blocks (```json) or any additional formatting."
)


def k3(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    thinking: bool,
    preserve_thinking: bool,
    add_generation_prompt: bool,
    thinking_effort: str | None = None,
    tool_choice: str | None = None,
    response_format: Mapping[str, Any] | None = None,
    image_sizes: Sequence[tuple[int, int]] = (),
) -> list[Segment]:
    """Writes the prompt of Kimi K3. All earlier reasoning is kept with `thinking`, so `preserve_thinking` changes
    nothing.

    thinking_effort: "low", "high" or "max", which is the default. tool_choice: "required" or "none". response_format:
    OpenAI's object of type json_object or json_schema. image_sizes: the width and height of each image, in pixels, as
    it was before it was scaled. Raises ValueError for other values and where `image_sizes` are not as many as images.
    """
    segments: list[Segment] = []
    if tools:
        segments += _system("tool-declare", _DECLARED + _fenced(compact_json(tools)))
    effort = "max" if thinking_effort is None else thinking_effort
    if effort not in EFFORTS:
        raise ValueError(f"thinking_effort is {printable(repr(effort), 60)}, expected {', '.join(EFFORTS)}")
    if thinking:
        segments += _system("thinking-effort", _EFFORT.format(effort))
    sizes = list(image_sizes)
    calls: Sequence[Mapping[str, Any]] = ()
    for is_results, group in groupby(enumerate(messages), lambda pair: pair[1]["role"] == "tool"):
        if is_results:
            segments += _results(list(group), calls, sizes)
            continue
        for index, message in group:
            segments += _message(message, f"messages[{index}]", thinking, sizes)
            if message["role"] == "assistant":
                calls = message.get("tool_calls") or ()
    if sizes:
        raise ValueError(f"the sizes of {len(image_sizes)} images are given, which are more than the messages hold")
    if tool_choice not in (None, "auto"):
        if tool_choice not in TOOL_CHOICES:
            raise ValueError(f"tool_choice is {printable(repr(tool_choice), 60)}, expected auto, required or none")
        segments += _system("tool-choice", TOOL_CHOICES[tool_choice])
    segments += _response_format(response_format)
    if add_generation_prompt:
        segments += [*_open("message", role="assistant"), *_open("think" if thinking else "response")]
    return segments


def escape(value: str) -> str:
    """Returns the value of an attribute as it stands between quotes."""
    return value.replace("&", "&amp;").replace('"', "&quot;")


def kind_of(value: Any) -> str:
    """Returns the type of an argument's element, for a value as JSON has it."""
    match value:
        case str():
            return "string"
        case bool():
            return "boolean"
        case None:
            return "null"
        case int() | float():
            return "number"
        case list():
            return "array"
    return "object"


def _open(tag: str, **attributes: str) -> Iterator[Segment]:
    yield OPEN
    yield Segment(tag)
    for key, value in attributes.items():
        yield Segment(f" {key}")
        yield Segment('="')
        yield Segment(escape(value))
        yield Segment('"')
    yield SEP


def _element(tag: str, body: Iterable[Segment], **attributes: str) -> list[Segment]:
    return [*_open(tag, **attributes), *body, CLOSE, Segment(tag), SEP]


def _turn(body: Iterable[Segment], **attributes: str) -> list[Segment]:
    return [*_element("message", body, **attributes), END_OF_MESSAGE]


def _system(kind: str, text: str) -> list[Segment]:
    return _turn([Segment(text)], role="system", type=kind)


def _fenced(text: str) -> str:
    return f"```json\n{text}\n```"


def _message(message: Message, where: str, thinking: bool, sizes: list[tuple[int, int]]) -> list[Segment]:
    role = "system" if message["role"] == "developer" else message["role"]
    if role == "system" and message.get("tools"):
        return _system("tool-declare", _DECLARED_LATER + _fenced(compact_json(message["tools"])))
    body = _content(message, where, sizes)
    if role == "assistant":
        calls = message.get("tool_calls") or ()
        reasoning = message.get("reasoning_content") or ""
        think = _element("think", [Segment(reasoning)] if reasoning.strip() else []) if thinking else []
        body = think + _element("response", body) + (_calls(calls, where) if calls else [])
    return _turn(body, role=role, **({"name": message["name"]} if message.get("name") else {}))


def _content(message: Message, where: str, sizes: list[tuple[int, int]]) -> list[Segment]:
    """Returns the content's segments; each image takes its size off the beginning of `sizes`."""
    content = message.get("content") or ()
    if isinstance(content, str):
        return [Segment(content)]
    segments = []
    for part in content:
        if part["type"] == "text":
            segments.append(Segment(part["text"]))
        elif part["type"] not in IMAGE_TYPES:
            raise ValueError(f"{where}.content holds a {part['type']}, but K3 reads text and images only")
        elif not sizes:
            raise ValueError(f"{where}.content holds an image whose size is not given")
        else:
            width, height = sizes.pop(0)
            segments += media_segments(f"image {width}x{height}")
    return segments


def _calls(calls: Sequence[Mapping[str, Any]], where: str) -> list[Segment]:
    body: list[Segment] = []
    for number, call in enumerate(calls):
        function = call["function"]
        arguments = _arguments(function["arguments"], f"{where}.tool_calls[{number}].function.arguments")
        body += _element("call", arguments, tool=function["name"], index=str(number + 1))
    return _element("tools", body)


def _arguments(arguments: Any, where: str) -> list[Segment]:
    values = {} if arguments is None else arguments
    if isinstance(values, str):
        try:
            values = json_reader.parse(values, where)
        except json_reader.JSONError:
            return _element("json", [Segment(arguments)], type="object")
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is JSON, but not of an object")
    segments = []
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        segments += _element("argument", [Segment(text)], key=key, type=kind_of(value))
    return segments


def _results(
    run: list[tuple[int, Message]], calls: Sequence[Mapping[str, Any]], sizes: list[tuple[int, int]]
) -> list[Segment]:
    """Returns a run of results, in the order of the calls that they answer if all of them answer one."""
    places = {call["id"]: place for place, call in reversed(list(enumerate(calls))) if call.get("id")}
    bodies = [_content(message, f"messages[{index}]", sizes) for index, message in run]
    found = [places.get(message["tool_call_id"]) for _, message in run]
    names = [message.get("name") for _, message in run]
    order = list(range(len(run)))
    matched = [place for place in found if place is not None]
    if len(matched) == len(run):
        order.sort(key=lambda i: matched[i])
        names = [calls[place]["function"]["name"] for place in matched]
    segments = []
    for position, i in enumerate(order):
        name = names[i] or (calls[position]["function"]["name"] if position < len(calls) else None)
        if name is None:
            raise ValueError(f"messages[{run[i][0]}] answers no call before it and has no name of a tool")
        segments += _turn(bodies[i], role="tool", tool=name, index=str(position + 1))
    return segments


def _response_format(wanted: Mapping[str, Any] | None) -> list[Segment]:
    kind = None if wanted is None else wanted.get("type")
    if wanted is None or kind == "text":
        return []
    if kind not in ("json_object", "json_schema"):
        raise ValueError(
            f"response_format.type is {printable(repr(kind), 60)}, expected text, json_object or json_schema"
        )
    text = _FORMAT.format(kind)
    if kind == "json_schema":
        described = wanted.get("json_schema")
        if not isinstance(described, Mapping) or "schema" not in described:
            raise ValueError("response_format.json_schema has no schema")
        schema = json.dumps(deep_sorted(described["schema"]), ensure_ascii=False, separators=(",", ":"))
        text += f"\nThe JSON data must match the following schema:\n{_fenced(schema)}"
    return _system("response-format", text)
