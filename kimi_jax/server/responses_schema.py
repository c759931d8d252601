"""The body of OpenAI's Responses API, as `msgspec` checks it. Fields that are not here are ignored, as clients expect.

Items and tools are checked where they are read: `responses_request`.
"""

from typing import Any

import msgspec

from kimi_jax.server.openai_schema import TemplateOptions, Thinking


class Reasoning(msgspec.Struct):
    """Holds OpenAI's switch of thinking: `effort` "none" turns it off."""

    effort: str | None = None


class Text(msgspec.Struct):
    """Holds the form of the content: `{"type": "json_schema", "name": ..., "schema": {...}}`."""

    format: dict[str, Any] | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """The body of /v1/responses."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    text: Text | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    metadata: dict[str, Any] | None = None
