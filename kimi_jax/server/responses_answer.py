"""Writes answers as the objects and events of OpenAI's Responses API: a whole response is what its last event holds."""

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

from kimi_jax.server.counts import Usage
from kimi_jax.server.errors import RequestError
from kimi_jax.server.run import End, Run
from kimi_jax.text.answers import Delta


class Response:
    """Is one response, written once: its items are those that have ended.

    echoed: the fields that the request gave and the response repeats.
    """

    def __init__(self, model: str, echoed: Mapping[str, Any]):
        self.head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **echoed,
        }
        self._items = _Items()
        self._number = 0

    async def whole(self, run: Run) -> dict[str, Any]:
        """Waits for the answer and returns it. Raises `RequestError` where the engine fails."""
        async with contextlib.aclosing(self.events(run)) as events:
            async for event in events:
                last = event
        found: dict[str, Any] = last["response"]
        return found

    async def events(self, run: Run) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the events of an answer, from response.created to response.completed or response.incomplete."""
        for kind in ("created", "in_progress"):
            yield self._numbered({"type": f"response.{kind}", "response": self._object("in_progress")})
        async with contextlib.aclosing(run.parts()) as parts:
            async for part in parts:
                for delta in part.deltas:
                    for event in self._items.add(delta):
                        yield self._numbered(event)
                if part.end is not None:
                    cut = part.end.finish_reason == "length"
                    for event in self._items.close("incomplete" if cut else "completed"):
                        yield self._numbered(event)
                    status = "incomplete" if cut else "completed"
                    yield self._numbered({"type": f"response.{status}", "response": self._object(status, part.end)})

    def failure(self, error: RequestError) -> dict[str, Any]:
        """Returns the event of a response that ends by an error."""
        event = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return self._numbered(event)

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        event["sequence_number"] = self._number
        self._number += 1
        return event

    def _object(self, status: str, end: End | None = None) -> dict[str, Any]:
        return self.head | {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": list(self._items.done),
            "usage": None if end is None else usage_object(end.usage),
        }


class _Items:
    """Makes events of items from deltas: an item begins where the kind of delta changes, and with each call."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._item: dict[str, Any] | None = None
        self._texts: list[str] = []

    def add(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.reasoning is not None:
            if not self._is("reasoning"):
                yield from self._open({"id": _id("rs"), "type": "reasoning", "summary": [], "content": []})
            yield self._text("response.reasoning_text.delta", delta.reasoning)
        elif delta.content is not None:
            if not self._is("message"):
                yield from self._open({"id": _id("msg"), "type": "message", "role": "assistant", "content": []})
            yield self._text("response.output_text.delta", delta.content, logprobs=[])
        for call in delta.tool_calls:
            if "id" in call:
                named = {"call_id": call["id"], "name": call["function"]["name"], "arguments": ""}
                yield from self._open({"id": _id("fc"), "type": "function_call", **named})
            elif call["function"]["arguments"]:
                yield self._piece("response.function_call_arguments.delta", call["function"]["arguments"])

    def close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """Ends the open item, if there is one."""
        item = self._item
        if item is None:
            return
        text, place = "".join(self._texts), self._place(item)
        if item["type"] == "function_call":
            item["arguments"] = text
            yield {
                "type": "response.function_call_arguments.done",
                **place,
                "name": item["name"],
                "arguments": text,
            }
        else:
            part = _part(item["type"], text)
            kind = part["type"]
            more: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
            item["content"] = [part]
            yield {"type": f"response.{kind}.done", **place, "content_index": 0, "text": text, **more}
            yield {"type": "response.content_part.done", **place, "content_index": 0, "part": part}
        self.done.append(item | {"status": status})
        self._item = None
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": self.done[-1]}

    def _is(self, kind: str) -> bool:
        return self._item is not None and self._item["type"] == kind

    def _open(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self._item, self._texts = item, []
        place = self._place(item)
        shown = item | {"status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": place["output_index"], "item": shown}
        if item["type"] != "function_call":
            part = _part(item["type"], "")
            yield {"type": "response.content_part.added", **place, "content_index": 0, "part": part}

    def _text(self, kind: str, text: str, **more: Any) -> dict[str, Any]:
        return self._piece(kind, text, content_index=0, **more)

    def _piece(self, kind: str, text: str, **more: Any) -> dict[str, Any]:
        assert self._item is not None
        self._texts.append(text)
        return {"type": kind, **self._place(self._item), "delta": text, **more}

    def _place(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self.done)}


def usage_object(usage: Usage) -> dict[str, Any]:
    """Returns the Responses API's object of counts."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
