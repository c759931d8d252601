"""The bodies of Anthropic's API, as `msgspec` checks them. Fields that are not here are ignored, as clients expect."""

from typing import Any

import msgspec

from kimi_jax.server.openai_schema import Thinking


class ToolChoice(msgspec.Struct):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(msgspec.Struct):
    """Holds the form of the content, `{"type": "json_schema", "schema": {...}}`, and how much to think."""

    format: dict[str, Any] | None = None
    effort: str | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """The body of /v1/messages/count_tokens."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """The body of /v1/messages."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
