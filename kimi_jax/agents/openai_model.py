"""A model behind any server with OpenAI's chat completions: `kimi-jax serve`, Moonshot's own, vLLM, SGLang."""

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import openai

from kimi_jax.agents.model import TEMPERATURE, TOP_P, BusyError, Call, ContextLengthError, Message, Mode, Reply, Usage


class OpenAIModel:
    """Asks `model` of the server behind `client`, by streaming.

    context_length: the tokens of a prompt and its answer. None reads it from the server's list of models before the
        first answer (`max_model_len` or `context_length`); where that has none, the server alone says what is too long.
    """

    def __init__(self, client: openai.AsyncOpenAI, model: str, *, context_length: int | None = None):
        self.client, self.model, self.context_length = client, model, context_length
        host = client.base_url.host
        self._knows_length = context_length is not None
        self._moonshot = host.endswith((".moonshot.ai", ".moonshot.cn"))

    @classmethod
    def at(cls, url: str, model: str, api_key: str = "none", *, context_length: int | None = None) -> "OpenAIModel":
        """Returns a model of the server whose API begins at `url`."""
        return cls(openai.AsyncOpenAI(base_url=url, api_key=api_key), model, context_length=context_length)

    def __str__(self) -> str:
        return self.model

    async def __call__(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        mode: Mode,
        max_tokens: int,
        seed: int | None = None,
    ) -> Reply:
        """Returns the server's answer, asked for once.

        Raises ContextLengthError, BusyError (status 408, 409, 429, 5xx, or no connection), and otherwise what the
        client raises.
        """
        if not self._knows_length:
            self._knows_length = True
            self.context_length = await self._served_length()
        sent = [self._with_reasoning(message) for message in messages] if self._moonshot else list(messages)
        request: dict[str, Any] = {"model": self.model, "messages": sent, "max_tokens": max_tokens}
        if self.context_length is not None and max_tokens > self.context_length // 2:
            del request["max_tokens"]  # servers refuse more than what the prompt leaves, and give that much without it
        request |= {"temperature": TEMPERATURE[mode], "top_p": TOP_P, "extra_body": self._switch(mode)}
        if tools:
            request["tools"] = list(tools)
        if seed is not None:
            request["seed"] = seed
        client = self.client.with_options(max_retries=0)  # the loop asks again, and has it in the trace
        try:
            stream = await client.chat.completions.create(
                **request, stream=True, stream_options={"include_usage": True}
            )
            async with stream:
                return await _join(stream)
        except (openai.APIConnectionError, httpx.TransportError) as error:
            raise BusyError(str(error)) from error
        except openai.APIStatusError as error:
            if error.code == "context_length_exceeded":
                raise ContextLengthError(str(error)) from error
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                after = _seconds(error.response.headers.get("retry-after"))
                raise BusyError(str(error), too_many=error.status_code == 429, after=after) from error
            raise

    def measure(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, mode: Mode, last: Usage
    ) -> tuple[int, int] | None:
        """Returns the tokens of the last prompt and its answer, and those of the context; None where either is unknown.

        The results since then are not counted: where they are too long, the server says so.
        """
        if self.context_length is None or not last.prompt:
            return None
        return last.prompt + last.completion, self.context_length

    async def _served_length(self) -> int | None:
        """Returns the context length that the server's list of models has for this one; None where it has none, or
        there is no such list."""
        try:
            async for one in self.client.with_options(max_retries=0).models.list():
                if getattr(one, "id", None) == self.model:
                    found = one.model_extra or {}
                    length = found.get("max_model_len", found.get("context_length"))
                    return length if isinstance(length, int) and length > 0 else None
        except (openai.OpenAIError, httpx.TransportError):  # what is wrong with the server, the first answer says
            return None
        return None

    def _switch(self, mode: Mode) -> dict[str, Any]:
        """Returns the field by which the server turns thinking on and off."""
        if self._moonshot:
            return {"thinking": {"type": "disabled" if mode == "instant" else "enabled"}}
        return {"chat_template_kwargs": {"thinking": mode != "instant"}}

    def _with_reasoning(self, message: Message) -> Message:
        """Returns a message as Moonshot's API takes it, which refuses calls without reasoning."""
        return (
            {**message, "reasoning_content": message.get("reasoning_content") or " "}
            if "tool_calls" in message
            else message
        )


def _seconds(text: str | None) -> float | None:
    """Returns what a server says in `Retry-After`, one minute at most; None for a date."""
    try:
        return min(max(float(text or ""), 0.0), 60.0)
    except ValueError:
        return None


async def _join(stream: Any) -> Reply:
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, dict[str, str]] = {}
    usage, finish = Usage(), "stop"
    async for chunk in stream:
        usage = _usage(chunk.usage) if chunk.usage is not None else usage
        for choice in chunk.choices[:1]:
            finish, delta = choice.finish_reason or finish, choice.delta
            content.append(delta.content or "")
            extra = delta.model_extra or {}
            reasoning.append(extra.get("reasoning_content") or extra.get("reasoning") or "")
            for part in delta.tool_calls or ():
                call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
                call["id"] = part.id or call["id"]
                if part.function is not None:
                    call["name"] = part.function.name or call["name"]
                    call["arguments"] += part.function.arguments or ""
    made = tuple(Call(**calls[index]) for index in sorted(calls))
    return Reply("".join(content) or None, "".join(reasoning) or None, made, usage, finish)


def _usage(usage: Any) -> Usage:
    details = usage.prompt_tokens_details
    cached = details.cached_tokens if details is not None else (usage.model_extra or {}).get("cached_tokens")
    return Usage(usage.prompt_tokens, cached or 0, usage.completion_tokens)
