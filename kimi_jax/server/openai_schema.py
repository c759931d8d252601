"""The bodies of OpenAI's API, as `msgspec` checks them. Fields that are not here are ignored, as clients expect.

Messages, tools and formats are checked where they are read: `kimi_jax.text.messages`, `kimi_jax.text.grammar`.
"""

from typing import Any

import msgspec

from kimi_jax.server.backend import SAMPLING


class Thinking(msgspec.Struct):
    """Moonshot's field. `keep` "all" keeps the reasoning of all earlier answers."""

    type: str | None = None
    keep: str | None = None
    budget_tokens: int | None = None


class TemplateOptions(msgspec.Struct):
    """vLLM's and SGLang's `chat_template_kwargs`."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None


class StructuredOutputs(msgspec.Struct):
    """vLLM's extension: the content is one of `choice`, or text of the regular expression `regex`."""

    choice: list[str] | None = None
    regex: str | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Sampled(msgspec.Struct, kw_only=True):
    """The fields of chat and text completions alike."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    max_tokens: int | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self) -> dict[str, float | int]:
        """Returns the values for drawing tokens that the client gave."""
        return {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}


class ChatRequest(Sampled, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: int | None = None
    preserve_thinking: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionRequest(Sampled, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
