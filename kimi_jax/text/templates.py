"""Writes the prompts of Kimi K2 and K2.5 as segments, each of which is one special token or plain text, and lists all
built-in templates.

Both write the text of the published `chat_template.jinja`. Only text that the template itself writes is ever a marker,
so people and tools cannot forge a marker in a prompt that is encoded from segments (`kimi_jax.chat.encode`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_jax.text.messages import IMAGE_TYPES, VIDEO_TYPES, Message
from kimi_jax.text.segments import Segment, media_segments
from kimi_jax.text.tools import compact_json, declare_tools
from kimi_jax.text.xtml import k3

VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"
DEFAULT_SYSTEM_PROMPT = "You are Kimi, an AI assistant created by Moonshot AI."

_START = {role: Segment(f"<|im_{role}|>", True) for role in ("system", "user", "assistant")}
_MIDDLE, _END = Segment("<|im_middle|>", True), Segment("<|im_end|>", True)
_THINK, _END_THINK = Segment("<think>", True), Segment("</think>", True)


def _turn(role: str, header: str, body: Sequence[Segment]) -> list[Segment]:
    return [_START.get(role, _START["system"]), Segment(header), _MIDDLE, *body, _END]


def _content(message: Message) -> list[Segment]:
    content = message.get("content")
    if isinstance(content, str):
        return [Segment(content)]
    segments: list[Segment] = []
    for part in content or ():
        if part["type"] in IMAGE_TYPES:
            segments += [*media_segments("image"), Segment("\n")]
        elif part["type"] in VIDEO_TYPES:
            segments.append(Segment(VIDEO_PLACEHOLDER, True))
        else:
            segments.append(Segment(part["text"]))
    return segments


def _tool_section(calls: Sequence[Mapping[str, Any]], first: int) -> Iterator[Segment]:
    yield Segment("<|tool_calls_section_begin|>", True)
    for number, call in enumerate(calls, start=first):
        arguments = call["function"]["arguments"]
        yield Segment("<|tool_call_begin|>", True)
        yield Segment(call.get("id") or f"functions.{call['function']['name']}:{number}")
        yield Segment("<|tool_call_argument_begin|>", True)
        yield Segment(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
        yield Segment("<|tool_call_end|>", True)
    yield Segment("<|tool_calls_section_end|>", True)


def _turns(messages: Sequence[Message], reasoning: Sequence[str] | None) -> list[Segment]:
    """Returns all turns. `reasoning` has a string for each message, put before an answer; None writes no `<think>`."""
    turns: list[Segment] = []
    calls_so_far = 0
    for index, message in enumerate(messages):
        role, body = message["role"], _content(message)
        if role == "tool":
            body = [Segment(f"## Return of {message['tool_call_id']}\n"), *body]
        elif role == "assistant":
            if reasoning is not None:
                body = [_THINK, Segment(reasoning[index]), _END_THINK, *body]
            if calls := message.get("tool_calls"):
                body += _tool_section(calls, calls_so_far)
                calls_so_far += len(calls)
        turns += _turn(role, message.get("name") or role, body)
    return turns


def _generation(*markers: str) -> list[Segment]:
    opening = [_START["assistant"], Segment("assistant"), _MIDDLE]
    return opening + [Segment(marker, True) for marker in markers]


def _kept_reasoning(messages: Sequence[Message], thinking: bool, preserve_thinking: bool) -> list[str]:
    """Keeps reasoning through a chain of tool calls and drops it once an answer without calls has ended the chain."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")]
    last = answers[-1] if answers else -1
    kept = [preserve_thinking or (thinking and index > last) for index in range(len(messages))]
    return [(m.get("reasoning_content") or "") if keep else "" for m, keep in zip(messages, kept, strict=True)]


def k25(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    thinking: bool,
    preserve_thinking: bool,
    add_generation_prompt: bool,
) -> list[Segment]:
    """Writes the prompt of Kimi K2.5 (with `preserve_thinking` K2.6's): TypeScript tools, no default system prompt,
    always `<think>`."""
    segments = []
    if tools:
        segments += _turn("system", "tool_declare", [Segment(declare_tools(tools) or compact_json(tools))])
    segments += _turns(messages, _kept_reasoning(messages, thinking, preserve_thinking))
    if add_generation_prompt:
        segments += _generation(*(["<think>"] if thinking else ["<think>", "</think>"]))
    return segments


def k2(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    thinking: bool,
    preserve_thinking: bool,
    add_generation_prompt: bool,
) -> list[Segment]:
    """Writes the prompt of Kimi K2 Instruct: tools as compact JSON, a default system prompt, no reasoning, so that
    `thinking` and `preserve_thinking` change nothing.

    Raises ValueError for media, which K2 does not read.
    """
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list | tuple) and any(part["type"] != "text" for part in content):
            raise ValueError(f"messages[{index}].content holds media, but K2 reads text only")
    segments = []
    if tools:
        segments += _turn("system", "tool_declare", [Segment(compact_json(tools))])
    if messages[0]["role"] != "system":
        segments += _turn("system", "system", [Segment(DEFAULT_SYSTEM_PROMPT)])
    segments += _turns(messages, None)
    if add_generation_prompt:
        segments += _generation()
    return segments


@dataclass(frozen=True)
class Template:
    """A built-in chat template.

    title: its name in messages. write: takes messages and tools as `read_messages` and `read_tools` return them, with
    the options of `k25` and those of `options`. reads_media: it takes images and videos. reads: keys of messages that
    it reads besides everybody's. is_xtml: prompts and answers are K3's elements; each segment is encoded for itself.
    """

    title: str
    write: Callable[..., list[Segment]]
    reads_media: bool
    options: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    is_xtml: bool = False


BUILT_IN: Mapping[str, Template] = {
    "k2.5": Template("K2.5", k25, reads_media=True),
    "k2": Template("K2", k2, reads_media=False),
    "k3": Template(
        "K3",
        k3,
        reads_media=True,
        options=frozenset({"thinking_effort", "tool_choice", "response_format", "image_sizes"}),
        reads=frozenset({"tools"}),
        is_xtml=True,
    ),
}


def template_options(template: str | Path) -> frozenset[str]:
    """Returns the options that a template has and others have not; a folder's own template has none."""
    return BUILT_IN[str(template)].options if str(template) in BUILT_IN else frozenset()
