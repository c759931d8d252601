"""Checks chat messages in OpenAI's schema, copies them as plain JSON, and finds the media in them.

A message is a mapping with `role`, `content` (a string, or a list of strings and of parts of type text, image_url or
video_url; transformers' `image` and `video` are accepted too), and optionally `name`, `reasoning_content`,
`tool_calls` and `tool_call_id`. `reasoning` (vLLM, OpenRouter) and `thinking` are other names of `reasoning_content`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_jax.printable import printable
from kimi_jax.text.plain import plain, plain_text

ROLES = ("system", "developer", "user", "assistant", "tool")
IMAGE_TYPES = ("image_url", "image")
VIDEO_TYPES = ("video_url", "video")
REASONING = ("reasoning_content", "reasoning", "thinking")

_READ = {"role", "content", "name", "tool_calls", "tool_call_id", *REASONING}
# Keys that clients store with answers, and that say nothing to the model.
_HARMLESS = frozenset(
    {"id", "index", "object", "model", "created", "created_at", "timestamp", "finish_reason", "stop_reason", "usage"}
    | {"logprobs", "token_ids", "weight", "annotations", "metadata", "cache_control"}
)
_READ_OF_PART = {"type", "url", "path", "uuid", "detail", "cache_control", "annotations"}
_READ_OF_CALL = {"id", "type", "index", "function"}
_READ_OF_FUNCTION = {"name", "arguments"}

Message = Mapping[str, Any]
Messages = Sequence[Message] | Any  # any value a client sends; `read_messages` checks it


@dataclass(frozen=True)
class MediaPart:
    """One image or video of a conversation.

    kind: "image" or "video". source: the value in the message (a URL, a path, a PIL image, frames), or None where the
    caller passes the media by other means.
    """

    kind: str
    source: Any


def _wrong(where: str, value: Any, expected: str) -> ValueError:
    found = printable(repr(value), 60) if isinstance(value, str) else type(value).__name__
    return ValueError(f"{where} is {found}, expected {expected}")


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": plain_text(part, where)}
    if not isinstance(part, Mapping):
        raise _wrong(where, part, "a string or an object with a type")
    kind = part.get("type")
    if kind not in ("text", *IMAGE_TYPES, *VIDEO_TYPES):
        raise _wrong(f"{where}.type", kind, "text, image_url, image, video_url or video")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise _wrong(f"{where}.text", part.get("text"), "a string")
        return plain(part, where)
    # Templates ask whether a part is a picture and never read it; it may have megabytes, or be no JSON at all.
    return plain({key: "" if key in (kind, "url", "path") else value for key, value in part.items()}, where)


def _content(message: Message, where: str) -> Any:
    content = message.get("content")
    if isinstance(content, list | tuple):
        return [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    if not isinstance(content, str) and (content is not None or message["role"] == "user"):
        raise _wrong(f"{where}.content", content, "a string or a list of parts")
    return content


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise ValueError(f"{where} has no function object")
    if not isinstance(call.get("id"), str | None):
        raise _wrong(f"{where}.id", call["id"], "a string")
    function = {"arguments": "{}", **call["function"]}  # the published templates fail where there are none
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise _wrong(f"{where}.function.name", function.get("name"), "a name")
    if not isinstance(function["arguments"], str | Mapping | None):
        raise _wrong(f"{where}.function.arguments", function["arguments"], "a JSON string or an object")
    return {**call, "function": function}


def _tool_calls(message: Message, where: str) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or []
    if calls and message["role"] != "assistant":
        raise ValueError(f"{where}.tool_calls: a message of role {message['role']} calls no tools")
    if not isinstance(calls, list | tuple):
        raise _wrong(f"{where}.tool_calls", calls, "a list")
    return [_tool_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)]


def _reasoning(message: Message, where: str) -> dict[str, str]:
    """Returns the reasoning under each of its names, so that every template finds it."""
    fields = {field: message[field] for field in REASONING if message.get(field) is not None}
    for field, value in fields.items():
        if not isinstance(value, str):
            raise _wrong(f"{where}.{field}", value, "a string")
    texts = {value: field for field, value in fields.items() if value}
    if len(texts) > 1:
        raise ValueError(f"{where} has {' and '.join(sorted(texts.values()))}, which differ; give one of them")
    return dict.fromkeys(REASONING, next(iter(texts), "")) if fields else {}


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(where, message, "an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    content = message.get("content")
    if len(message) == 2 and type(content) is str and role != "tool":  # most messages are no more than this
        return {"role": str.__str__(role), "content": plain_text(content, where)}
    if not isinstance(message.get("name"), str | None):
        raise _wrong(f"{where}.name", message["name"], "a string")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise _wrong(f"{where}.tool_call_id", message.get("tool_call_id"), "the id of the call it answers")
    if message.get("function_call") is not None:
        raise ValueError(f"{where}.function_call: Kimi's templates do not read it, expected tool_calls")
    fields = {key: value for key, value in message.items() if value is not None and key not in _HARMLESS}
    content = _content(message, where)
    if "content" in message:
        fields["content"] = content
    if "tool_calls" in message:
        fields["tool_calls"] = _tool_calls(message, where)
    fields.update(_reasoning(message, where))
    return plain(fields, where)


def read_messages(messages: Messages) -> list[dict[str, Any]]:
    """Returns a checked copy of a conversation in plain JSON types, in which every message is written in one way.

    Strings in a list of parts become text parts, reasoning appears under all of its names, a call without arguments
    gets `{}`, and null fields other than `content` and the sources of media are left out. Raises ValueError, naming the
    message's index and the field, where `messages` is not a conversation.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise _wrong("messages", messages, "a list of at least one message")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def unread_keys(messages: Sequence[Message]) -> list[str]:
    """Returns the paths of the keys in `messages` (from `read_messages`) that the built-in templates do not read."""

    def found() -> Iterator[str]:
        for message in messages:
            if not message.keys() <= _READ:
                yield from message.keys() - _READ
            for part in message["content"] if isinstance(message.get("content"), list) else ():
                yield from (f"content.{key}" for key in part.keys() - _READ_OF_PART - {part["type"]})
            for call in message.get("tool_calls") or ():
                yield from (f"tool_calls.{key}" for key in call.keys() - _READ_OF_CALL)
                yield from (f"tool_calls.function.{key}" for key in call["function"].keys() - _READ_OF_FUNCTION)

    return sorted(set(found()))


def _source(part: Mapping[str, Any]) -> Any:
    for key in (part["type"], "url", "path"):
        if part.get(key) is not None:
            value = part[key]
            return value.get("url") if isinstance(value, Mapping) else value
    return None


def media_parts(messages: Messages) -> list[MediaPart]:
    """Returns the images and videos of a conversation in the order in which their placeholders appear in the prompt.

    An image becomes one media item, a video one for each of its chunks. Raises ValueError where `read_messages` does.
    """
    read_messages(messages)
    found = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and part["type"] != "text":
                found.append(MediaPart("image" if part["type"] in IMAGE_TYPES else "video", _source(part)))
    return found
