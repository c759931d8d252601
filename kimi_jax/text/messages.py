"""Chat messages in OpenAI's schema: what is accepted, and where the media in them are.

A message is a mapping with `role`, `content` (a string, or a list of parts of type text, image_url or video_url;
transformers' `image` and `video` are taken too), and where they apply `name`, `reasoning_content`, `tool_calls` and
`tool_call_id`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
IMAGE_TYPES = ("image_url", "image")
VIDEO_TYPES = ("video_url", "video")

Message = Mapping[str, Any]
Messages = Sequence[Message] | Any  # from outside, and looked at by `check_messages` alone


@dataclass(frozen=True)
class MediaPart:
    """One image or video of a conversation: `kind` is "image" or "video"; `source` is what the part holds (a URL, a
    path, a PIL image, frames), or None where the caller passes the media by other means."""

    kind: str
    source: Any


def _wrong(where: str, value: Any, expected: str) -> ValueError:
    found = f"{value!r:.60}" if isinstance(value, str) else type(value).__name__
    return ValueError(f"{where} is {found}, expected {expected}")


def _check_part(part: Any, where: str) -> None:
    if not isinstance(part, Mapping):
        raise _wrong(where, part, "an object with a type")
    kind = part.get("type")
    if kind not in ("text", *IMAGE_TYPES, *VIDEO_TYPES):
        raise _wrong(f"{where}.type", kind, "text, image_url, image, video_url or video")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise _wrong(f"{where}.text", part.get("text"), "a string")


def _check_content(message: Message, where: str) -> None:
    content = message.get("content")
    if isinstance(content, list | tuple):
        for index, part in enumerate(content):
            _check_part(part, f"{where}.content[{index}]")
    elif not isinstance(content, str) and (content is not None or message["role"] != "assistant"):
        raise _wrong(f"{where}.content", content, "a string or a list of parts")


def _check_tool_call(call: Any, where: str) -> None:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise ValueError(f"{where} has no function object")
    if not isinstance(call.get("id"), str | None):
        raise _wrong(f"{where}.id", call["id"], "a string")
    name, arguments = call["function"].get("name"), call["function"].get("arguments")
    if not isinstance(name, str) or not name:
        raise _wrong(f"{where}.function.name", name, "a name")
    if not isinstance(arguments, str | Mapping):
        raise _wrong(f"{where}.function.arguments", arguments, "a JSON string or an object")


def check_messages(messages: Messages) -> None:
    """Raise ValueError, naming the message's index and the field, where `messages` is not a conversation."""
    if not isinstance(messages, list | tuple) or not messages:
        raise _wrong("messages", messages, "a list of at least one message")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise _wrong(where, message, "an object")
        role = message.get("role")
        if role not in ROLES:
            raise _wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}")
        _check_content(message, where)
        for field in ("name", "reasoning_content"):
            if not isinstance(message.get(field), str | None):
                raise _wrong(f"{where}.{field}", message[field], "a string")
        if role == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise _wrong(f"{where}.tool_call_id", message.get("tool_call_id"), "the id of the call it answers")
        calls = message.get("tool_calls") or []
        if calls and role != "assistant":
            raise ValueError(f"{where}.tool_calls: a message of role {role} calls no tools")
        if not isinstance(calls, list | tuple):
            raise _wrong(f"{where}.tool_calls", calls, "a list")
        for number, call in enumerate(calls):
            _check_tool_call(call, f"{where}.tool_calls[{number}]")


def _source(part: Mapping[str, Any]) -> Any:
    for key in (part["type"], "url", "path"):
        if part.get(key) is not None:
            value = part[key]
            return value.get("url") if isinstance(value, Mapping) else value
    return None


def media_parts(messages: Messages) -> list[MediaPart]:
    """The images and videos of a conversation in the order in which their placeholders appear in the prompt.

    An image becomes one media item, a video one for each of its chunks. ValueError as for rendering.
    """
    check_messages(messages)
    found = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if part["type"] != "text":
                found.append(MediaPart("image" if part["type"] in IMAGE_TYPES else "video", _source(part)))
    return found
