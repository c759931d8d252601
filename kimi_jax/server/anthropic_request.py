"""Translates the bodies of Anthropic's API into the server's one form of request."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kimi_jax.printable import printable
from kimi_jax.server.anthropic_schema import CountRequest, MessagesRequest, ToolChoice
from kimi_jax.server.errors import RequestError, invalid
from kimi_jax.server.generation import Chat
from kimi_jax.server.openai_request import stops
from kimi_jax.text.json_rules import json_rule

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def prompt_request(body: CountRequest) -> Chat:
    """Returns what of a request its prompt depends on. Raises `RequestError` naming the field that is wrong."""
    return Chat(
        read_messages(body),
        read_tools(body.tools),
        _tool_choice(body.tool_choice),
        thinking=thinks(body),
        effort=None if body.output_config is None else body.output_config.effort,
        effort_field="output_config.effort",
        form=_form(body),
    )


def messages_request(body: MessagesRequest) -> Chat:
    """Returns the request of a message to answer. Raises `RequestError` naming the field that is wrong."""
    if body.max_tokens < 1:
        raise invalid(f"max_tokens is {body.max_tokens}, expected at least 1", "max_tokens")
    budget = None if body.thinking is None else body.thinking.budget_tokens
    if budget is not None and budget < 0:
        raise invalid(f"thinking.budget_tokens is {budget}, expected at least 0", "thinking")
    given = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    return dataclasses.replace(
        prompt_request(body),
        parallel=not (body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use),
        content=_content(body),
        budget=budget,
        max_tokens=body.max_tokens,
        sampling={name: value for name, value in given.items() if value is not None},
        stop=stops(body.stop_sequences),
    )


def thinks(body: CountRequest) -> bool:
    """Returns whether the answer is to think, which in this API is off where a request does not say."""
    kind = None if body.thinking is None else body.thinking.type
    if kind not in (None, "enabled", "disabled", "adaptive"):
        raise invalid("thinking.type is none of enabled, disabled and adaptive", "thinking")
    return kind in ("enabled", "adaptive")


def read_messages(body: CountRequest) -> list[dict[str, Any]]:
    """Returns the conversation in the server's own form. An assistant's message at its end is continued."""
    messages: list[dict[str, Any]] = []
    if body.system:
        texts = [body.system] if isinstance(body.system, str) else list(_texts(body.system, "system"))
        messages.append({"role": "system", "content": "\n\n".join(texts)})
    for index, message in enumerate(body.messages):
        messages += _message(message, f"messages[{index}]")
    if not body.messages:
        raise invalid("messages is empty, expected at least one message", "messages")
    if messages and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        messages[-1]["partial"] = True
    return messages


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Returns tools in the server's own form, None where there are none. Raises `RequestError` for tools that
    Anthropic's own servers run."""
    read = []
    for index, tool in enumerate(tools or ()):
        if tool.get("type", "custom") != "custom" or not isinstance(tool.get("name"), str):
            raise invalid(f"tools[{index}] is no tool of the client's own with a name", "tools")
        if not isinstance(tool.get("input_schema"), Mapping):
            raise invalid(f"tools[{index}].input_schema is no object", "tools")
        function = {"name": tool["name"], "parameters": tool["input_schema"]}
        function |= {key: tool[key] for key in ("description", "strict") if tool.get(key) is not None}
        read.append({"type": "function", "function": function})
    return read or None


def _message(message: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise invalid(f"{where}.role is {printable(repr(role), 60)}, expected user or assistant", "messages")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise invalid(f"{where}.content is neither a text nor a list of blocks", "messages")
    if role == "assistant":
        yield _assistant(content, where)
        return
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        place = f"{where}.content[{index}]"
        if block.get("type") != "tool_result":
            parts.append(_part(block, place))
            continue
        if parts:
            yield {"role": role, "content": parts}
            parts = []
        yield _tool_result(block, place)
    if parts:
        yield {"role": role, "content": parts}


def _assistant(content: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    texts, reasoning, calls = [], [], []
    for index, block in enumerate(content):
        place = f"{where}.content[{index}]"
        match block.get("type"):
            case "text":
                texts.append(_text(block, "text", place))
            case "thinking":
                reasoning.append(_text(block, "thinking", place))
            case "redacted_thinking":
                pass  # another server's, which nobody here can read
            case "tool_use":
                function = {"name": _text(block, "name", place), "arguments": json.dumps(block.get("input") or {})}
                calls.append({"id": _text(block, "id", place), "type": "function", "function": function})
            case kind:
                raise _unknown(kind, place)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _tool_result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content") or ""
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    return {"role": "tool", "tool_call_id": _text(block, "tool_use_id", where), "content": content}


def _part(block: Any, where: str) -> dict[str, Any]:
    if not isinstance(block, Mapping):
        raise invalid(f"{where} is no object", "messages")
    match block.get("type"):
        case "text":
            return {"type": "text", "text": _text(block, "text", where)}
        case "image":
            source = block.get("source")
            if not isinstance(source, Mapping) or source.get("type") not in ("base64", "url"):
                raise invalid(f"{where}.source is no object of type base64 or url", "messages")
            if source["type"] == "url":
                url = _text(source, "url", f"{where}.source")
            else:
                data, kind = _text(source, "data", f"{where}.source"), _text(source, "media_type", f"{where}.source")
                url = f"data:{kind};base64,{data}"
            return {"type": "image_url", "image_url": {"url": url}}
        case kind:
            raise _unknown(kind, where)


def _texts(blocks: Sequence[Mapping[str, Any]], where: str) -> Iterator[str]:
    for index, block in enumerate(blocks):
        if block.get("type") != "text":
            raise _unknown(block.get("type"), f"{where}[{index}]")
        yield _text(block, "text", f"{where}[{index}]")


def _text(block: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(block.get(key), str):
        raise invalid(f"{where}.{key} is no text", where.split("[")[0].split(".")[0])
    return str(block[key])


def _unknown(kind: object, where: str) -> RequestError:
    return invalid(f"{where}.type is {printable(repr(kind), 60)}, which is not offered here", where.split("[")[0])


def _tool_choice(choice: ToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name or ""}}
    if choice.type not in _CHOICES:
        raise invalid("tool_choice.type is none of auto, any, tool and none", "tool_choice")
    return _CHOICES[choice.type]


def _form(body: CountRequest) -> dict[str, Any] | None:
    """Returns the form of the content as OpenAI's chat completions have it."""
    form = None if body.output_config is None else body.output_config.format
    if form is None:
        return None
    if form.get("type") != "json_schema" or not isinstance(form.get("schema"), Mapping):
        raise invalid("output_config.format is no object of type json_schema with a schema", "output_config")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form["schema"]}}


def _content(body: CountRequest) -> str | None:
    form = _form(body)
    return None if form is None else json_rule(form["json_schema"]["schema"])
