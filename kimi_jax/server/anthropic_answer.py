"""Writes answers as the objects and events of Anthropic's API."""

import contextlib
import secrets
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from kimi_jax import json_reader
from kimi_jax.server.counts import Usage
from kimi_jax.server.run import End, Run, Whole
from kimi_jax.text.answers import Delta

# Clients give a block of thinking back with its signature. Nothing here depends on it.
SIGNATURE = "kimi-jax"
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


def whole_message(model: str, answer: Whole) -> dict[str, Any]:
    """Returns a whole answer."""
    parsed = answer.parsed
    content: list[dict[str, Any]] = []
    if parsed.reasoning is not None:
        content.append({"type": "thinking", "thinking": parsed.reasoning, "signature": SIGNATURE})
    if parsed.content is not None:
        content.append({"type": "text", "text": parsed.content})
    for call in parsed.tool_calls:
        function = call["function"]
        used = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": _input(function["arguments"])}
        content.append(used)
    return _head(model) | {"content": content, **_ending(answer.end), "usage": usage_object(answer.end.usage)}


async def events(model: str, run: Run) -> AsyncGenerator[dict[str, Any], None]:
    """Yields the events of an answer, from message_start to message_stop."""
    usage = usage_object(Usage(prompt=len(run.generation.prompt.ids)))
    yield {"type": "message_start", "message": _head(model) | {"content": [], **_ending(None), "usage": usage}}
    blocks = _Blocks()
    async with contextlib.aclosing(run.parts()) as parts:
        async for part in parts:
            for delta in part.deltas:
                for event in blocks.add(delta):
                    yield event
            if part.end is not None:
                for event in blocks.close():
                    yield event
                counts = usage_object(part.end.usage)
                yield {"type": "message_delta", "delta": _ending(part.end), "usage": counts}
    yield {"type": "message_stop"}


class _Blocks:
    """Makes events of blocks from deltas: a block begins where the kind of delta changes, and with each call."""

    def __init__(self) -> None:
        self._index, self._kind = -1, ""

    def add(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.reasoning is not None:
            if self._kind != "thinking":
                yield from self._open("thinking", thinking="", signature="")
            yield self._delta("thinking_delta", thinking=delta.reasoning)
        elif delta.content is not None:
            if self._kind != "text":
                yield from self._open("text", text="")
            yield self._delta("text_delta", text=delta.content)
        for call in delta.tool_calls:
            if "id" in call:
                yield from self._open("tool_use", id=call["id"], name=call["function"]["name"], input={})
            elif call["function"]["arguments"]:
                yield self._delta("input_json_delta", partial_json=call["function"]["arguments"])

    def close(self) -> Iterator[dict[str, Any]]:
        """Ends the open block, if there is one."""
        if self._kind == "thinking":
            yield self._delta("signature_delta", signature=SIGNATURE)
        if self._kind:
            yield {"type": "content_block_stop", "index": self._index}
        self._kind = ""

    def _open(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self._index, self._kind = self._index + 1, kind
        yield {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **fields}}

    def _delta(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **fields}}


def usage_object(usage: Usage) -> dict[str, int]:
    """Returns Anthropic's object of counts, whose input tokens leave out the cached ones."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion,
    }


def _head(model: str) -> dict[str, Any]:
    return {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model}


def _ending(end: End | None) -> dict[str, Any]:
    if end is None:
        return {"stop_reason": None, "stop_sequence": None}
    reason = _REASONS[end.finish_reason] if end.stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": end.stop}


def _input(arguments: str) -> dict[str, Any]:
    """Returns a call's arguments as the object that this API has; those that are none stand in a field of one."""
    try:
        return json_reader.parse_object(arguments, "the arguments")
    except json_reader.JSONError:
        return {"arguments_that_are_no_json_object": arguments}
