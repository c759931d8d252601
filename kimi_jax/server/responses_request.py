"""Translates the bodies of OpenAI's Responses API into the server's one form of request.

A conversation is a list of items there. Reasoning, a message and calls of the assistant that follow each other are one
message here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kimi_jax.printable import printable
from kimi_jax.server.errors import RequestError, invalid
from kimi_jax.server.generation import Chat
from kimi_jax.server.openai_request import read_tools, wants_thinking
from kimi_jax.server.openai_schema import TemplateOptions
from kimi_jax.server.responses_schema import ResponsesRequest
from kimi_jax.text import grammar

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
# The fields of what only a server that stores answers can do.
_STORED = ("previous_response_id", "conversation", "prompt", "background")


def responses_request(body: ResponsesRequest) -> Chat:
    """Returns the request of a response. Raises `RequestError` naming the field that is wrong."""
    for name in _STORED:
        if getattr(body, name) not in (None, False):
            raise invalid(f"{name} is not offered here, where nothing is stored; send the whole conversation", name)
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise invalid(f"max_output_tokens is {body.max_output_tokens}, expected at least 1", "max_output_tokens")
    budget = None if body.thinking is None else body.thinking.budget_tokens
    if budget is not None and budget < 0:
        raise invalid(f"thinking.budget_tokens is {budget}, expected at least 0", "thinking")
    effort, field = None if body.reasoning is None else body.reasoning.effort, "reasoning.effort"
    given = {"temperature": body.temperature, "top_p": body.top_p}
    return Chat(
        _messages(body),
        read_tools([_tool(tool, index) for index, tool in enumerate(body.tools or ())]),
        _tool_choice(body.tool_choice),
        body.parallel_tool_calls is not False,
        _content(body),
        wants_thinking(body.thinking, body.chat_template_kwargs or TemplateOptions(), effort, field),
        budget=budget,
        effort=effort,
        effort_field=field,
        form=_form(body),
        max_tokens=body.max_output_tokens,
        sampling={name: value for name, value in given.items() if value is not None},
    )


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Returns the conversation in the server's own form."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not body.input:
        raise invalid("input is empty, expected a text or at least one item", "input")
    turn: dict[str, Any] | None = None  # the assistant's message that items add to
    for index, item in enumerate(body.input):
        where = f"input[{index}]"
        piece = _item(item, where)
        if piece["role"] != "assistant":
            turn = None
            messages.append(piece)
        elif turn is None or not _follows(turn, piece):
            turn = piece
            messages.append(turn)
        else:
            turn |= piece | {"content": turn["content"] + piece["content"]} | _calls(turn, piece)
    return messages


def _follows(turn: Mapping[str, Any], piece: Mapping[str, Any]) -> bool:
    """Says whether an item may belong to an answer so far: it comes in the order reasoning, message, calls."""
    if "reasoning_content" in piece:
        return False
    return "tool_calls" in piece or not (turn["content"] or "tool_calls" in turn)


def _calls(turn: Mapping[str, Any], piece: Mapping[str, Any]) -> dict[str, Any]:
    calls = [*turn.get("tool_calls", ()), *piece.get("tool_calls", ())]
    return {"tool_calls": calls} if calls else {}


def _item(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns one item as a message, or as a part of an assistant's one."""
    match item.get("type", "message"):
        case "message":
            role = item.get("role")
            if role not in _ROLES:
                raise invalid(
                    f"{where}.role is {printable(repr(role), 60)}, expected one of {', '.join(_ROLES)}", "input"
                )
            content = item.get("content")
            if role == "assistant":
                return {"role": role, "content": _joined(content, f"{where}.content")}
            return {"role": role, "content": _content_parts(content, f"{where}.content")}
        case "reasoning":
            # The texts themselves where they are, else what a client kept of them.
            texts = item.get("content") or item.get("summary") or []
            return {"role": "assistant", "content": "", "reasoning_content": _joined(texts, f"{where}.content")}
        case "function_call":
            function = {"name": _text(item, "name", where), "arguments": _text(item, "arguments", where)}
            call = {"id": _text(item, "call_id", where), "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            output = _content_parts(item.get("output"), f"{where}.output")
            return {"role": "tool", "tool_call_id": _text(item, "call_id", where), "content": output}
        case kind:
            raise _unknown(kind, where)


def _content_parts(content: Any, where: str) -> Any:
    """Returns a text, or parts of texts and pictures."""
    if isinstance(content, str):
        return content
    return [_part(part, place) for part, place in _each(content, where)]


def _part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind in _TEXTS:
        return {"type": "text", "text": _text(part, "text", where)}
    if kind == "input_image" and part.get("file_id") is None:
        return {"type": "image_url", "image_url": {"url": _text(part, "image_url", where)}}
    raise _unknown(kind, where)


def _joined(content: Any, where: str) -> str:
    """Returns the texts of an assistant's parts as one."""
    if isinstance(content, str):
        return content
    texts = []
    for part, place in _each(content, where):
        if part.get("type") not in (*_TEXTS, "refusal"):
            raise _unknown(part.get("type"), place)
        texts.append(_text(part, "refusal" if part["type"] == "refusal" else "text", place))
    return "".join(texts)


def _each(parts: Any, where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise invalid(f"{where} is neither a text nor a list of parts", "input")
    for index, part in enumerate(parts):
        yield part, f"{where}[{index}]"


def _text(item: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(item.get(key), str):
        raise invalid(f"{where}.{key} is no text", "input")
    return str(item[key])


def _unknown(kind: object, where: str) -> RequestError:
    return invalid(f"{where}.type is {printable(repr(kind), 60)}, which is not offered here", "input")


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns a tool in the form of chat completions."""
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise invalid(f"tools[{index}] is no function with a name; this server runs no tools", "tools")
    keys = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {key: tool[key] for key in keys if tool.get(key) is not None}}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _content(body: ResponsesRequest) -> str | None:
    """Returns the right side of the grammar's rule for the content."""
    try:
        return grammar.content_rule(_form(body))
    except ValueError as error:
        message = (
            str(error).replace("response_format.json_schema", "text.format").replace("response_format", "text.format")
        )
        raise invalid(message, "text") from None


def _form(body: ResponsesRequest) -> Mapping[str, Any] | None:
    """Returns the form of the content as chat completions have it, None for text."""
    form: Mapping[str, Any] | None = None if body.text is None else body.text.format
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}


def echoed(body: ResponsesRequest) -> dict[str, Any]:
    """Returns the fields of a request that its response repeats."""
    tools: Sequence[Mapping[str, Any]] = body.tools or ()
    form = None if body.text is None else body.text.format
    return {
        "instructions": body.instructions,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": [{"strict": False, "parameters": None, **tool} for tool in tools],
        "max_output_tokens": body.max_output_tokens,
        "text": {"format": {"type": "text"} if form is None else form},
    }
