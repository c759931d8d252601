"""Answers in a conversation: an engine in this process, or a server with OpenAI's API."""

import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kimi_jax.printable import printable
from kimi_jax.text.answers import Delta, FinishReason

if TYPE_CHECKING:
    from kimi_jax.engine import Engine
    from kimi_jax.processor import Processor
    from kimi_jax.runtime.sampling import Sampling

MAX_NEW_TOKENS = 32_768  # where nobody says: Ctrl-C ends an answer that is too long

Messages = Sequence[Mapping[str, Any]]


@runtime_checkable
class Speaker(Protocol):
    """Lists the methods of what answers."""

    def answer(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]], thinking: bool
    ) -> AsyncGenerator[Delta, None]:
        """Yields the pieces of the answer; closing it cancels the rest.

        Raises ValueError or OSError where the conversation cannot be answered.
        """

    async def aclose(self) -> None:
        """Ends what connects it with who answers."""

    @property
    def tokens(self) -> int | None:
        """Returns the number of tokens of the last answer, None where it is not known."""


class EngineSpeaker:
    """Answers by an engine in this process, with pictures in `data:` URLs.

    sampling: how answers are drawn with thinking (True) and without.
    """

    def __init__(
        self,
        engine: "Engine",
        processor: "Processor",
        sampling: Mapping[bool, "Sampling"],
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
    ):
        self.engine, self.processor, self.sampling = engine, processor, sampling
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.tokens: int | None = None

    async def answer(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]], thinking: bool
    ) -> AsyncGenerator[Delta, None]:
        from kimi_jax.engine import Request
        from kimi_jax.text import chat

        processor, self.tokens = self.processor, 0
        prompt = processor(messages, tools or None, thinking)
        ids = prompt.tokens[0]
        room = self.engine.sizes.max_length - len(ids)
        request = Request(
            ids,
            max_new_tokens=self.max_new_tokens or max(1, min(MAX_NEW_TOKENS, room)),
            sampling=self.sampling[thinking],
            seed=secrets.randbelow(2**63) if self.seed is None else self.seed,
            media=prompt.media,
        )
        starts_in = chat.answer_starts_in(processor.tokenizer, ids)
        parser = chat.Parser(processor.tokenizer, thinking, tools, processor.template, starts_in=starts_in)
        events = self.engine.submit(request)
        try:
            async for event in events:
                self.tokens += len(event.tokens)
                for delta in parser.feed(event.tokens):
                    yield delta
        finally:
            await events.aclose()
        if self.engine.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.engine.failure}") from self.engine.failure
        if event.error is not None:
            raise ValueError(event.error)
        for delta in parser.end("length" if event.finish_reason == "length" else "stop"):
            yield delta

    async def aclose(self) -> None:
        """Does nothing: the engine is its owner's to close."""


class ServerSpeaker:
    """Answers by a server with OpenAI's API at `url`.

    model: the name that the server knows it by; None is the first that it lists.
    sampling: the values that are given; the server chooses the others, and the length where `max_new_tokens` is None.

    Raises ValueError where the `openai` package is not installed.
    """

    def __init__(
        self,
        url: str,
        key: str,
        model: str | None,
        sampling: Mapping[str, float | int],
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
    ):
        try:
            import openai
        except ModuleNotFoundError:
            raise ValueError("to talk to a server takes the openai package: pip install 'kimi-jax[chat]'") from None
        self._errors = openai.OpenAIError
        self.client: Any = openai.AsyncOpenAI(base_url=url, api_key=key)
        self.url, self.model = url, model
        given: dict[str, Any] = {name: sampling[name] for name in ("temperature", "top_p") if name in sampling}
        given |= {"max_tokens": max_new_tokens, "seed": seed}
        self._fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self._extra: dict[str, Any] = {name: sampling[name] for name in ("top_k", "min_p") if name in sampling}
        self.tokens: int | None = None

    async def answer(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]], thinking: bool
    ) -> AsyncGenerator[Delta, None]:
        fields = self._fields | ({"tools": list(tools)} if tools else {})
        self.tokens = None
        try:
            if self.model is None:
                listed = await self.client.models.list()
                if not listed.data:
                    raise ValueError(f"{printable(self.url)}: the server lists no models; --model names one")
                self.model = listed.data[0].id
            chunks = await self.client.chat.completions.create(
                model=self.model,
                messages=list(messages),
                stream=True,
                stream_options={"include_usage": True},
                extra_body=self._extra | {"chat_template_kwargs": {"thinking": thinking}},
                **fields,
            )
            async with chunks:
                async for chunk in chunks:
                    if chunk.usage is not None:
                        self.tokens = chunk.usage.completion_tokens
                    for choice in chunk.choices:
                        for delta in _deltas(choice):
                            yield delta
        except self._errors as error:
            raise ValueError(f"{printable(self.url)}: {printable(error, 400)}") from None

    async def aclose(self) -> None:
        """Closes the connections."""
        await self.client.close()


def _deltas(choice: Any) -> list[Delta]:
    """Returns a chunk's piece of the answer, of any server: one may have several fields, or put `reasoning` for
    `reasoning_content`."""
    delta, found = choice.delta, []
    reasoning = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)
    if reasoning:
        found.append(Delta(reasoning=str(reasoning)))
    if delta.content:
        found.append(Delta(content=delta.content))
    for call in delta.tool_calls or ():
        function: dict[str, Any] = {"arguments": (call.function and call.function.arguments) or ""}
        one: dict[str, Any] = {"index": call.index, "function": function}
        if call.id:
            one |= {"id": call.id, "type": "function"}
            function["name"] = (call.function and call.function.name) or ""
        found.append(Delta(tool_calls=[one]))
    if choice.finish_reason is not None:
        reason: FinishReason = choice.finish_reason if choice.finish_reason in ("length", "tool_calls") else "stop"
        found.append(Delta(finish_reason=reason))
    return found
