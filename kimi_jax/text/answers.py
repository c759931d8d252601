"""Holds the parts of an answer, whole (`Parsed`) and as they come (`Delta`), in the objects of OpenAI's API."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

EngineFinish = Literal["stop", "length"]
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Delta:
    """One piece of an answer: exactly one of the fields is set, and no text is empty.

    reasoning, content: more text of the reasoning or of the content.
    tool_calls: one object. A call begins with `{index, id, type: "function", function: {name, arguments: ""}}`; each
        further `{index, function: {arguments}}` adds to its arguments.
    finish_reason: set in the last delta of an answer, and in no other.
    """

    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """A whole answer.

    reasoning, content: its texts, None where there is none.
    tool_calls: `{id, type: "function", function: {name, arguments}}` of each call, arguments as the model wrote them.
    finish_reason: "length" where the tokens ran out, else "tool_calls" where there are calls, else "stop".
    """

    reasoning: str | None
    content: str | None
    tool_calls: list[dict[str, Any]]
    finish_reason: FinishReason


def join(deltas: Iterable[Delta]) -> Parsed:
    """Returns the answer that the deltas of a parser, up to its last one, are pieces of."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[dict[str, Any]] = []
    arguments: list[list[str]] = []
    finish_reason: FinishReason = "stop"
    for delta in deltas:
        reasoning.append(delta.reasoning or "")
        content.append(delta.content or "")
        for call in delta.tool_calls:
            if "id" in call:
                calls.append(call)
                arguments.append([])
            arguments[call["index"]].append(call["function"]["arguments"])
        finish_reason = delta.finish_reason or finish_reason
    return Parsed(
        reasoning="".join(reasoning) or None,
        content="".join(content) or None,
        tool_calls=[
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["function"]["name"], "arguments": "".join(pieces)},
            }
            for call, pieces in zip(calls, arguments, strict=True)
        ],
        finish_reason=finish_reason,
    )
