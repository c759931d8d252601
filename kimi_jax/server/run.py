"""Runs a generation on the engine: one stream of parts for streamed answers and whole ones."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from kimi_jax.printable import printable
from kimi_jax.server.backend import Backend, Event, Stream, TokenLogprobs
from kimi_jax.server.counts import Usage
from kimi_jax.server.errors import RequestError, failed, unavailable
from kimi_jax.server.generation import Generation
from kimi_jax.server.metrics import Metrics
from kimi_jax.server.stop_text import StopText
from kimi_jax.text import StreamDecoder, Tokenizer, chat
from kimi_jax.text.answers import Delta, FinishReason, Parsed

log = logging.getLogger("kimi_jax.server")


@dataclass(frozen=True)
class End:
    """Says why a choice ended, at which stop string if at any, and what it took."""

    finish_reason: FinishReason
    stop: str | None
    usage: Usage


@dataclass(frozen=True)
class Part:
    """Adds to one choice of an answer. `logprobs` are those of its tokens, each with its id; `end` is set in the
    choice's last part."""

    choice: int
    deltas: Sequence[Delta]
    logprobs: Sequence[tuple[int, TokenLogprobs]] = ()
    end: End | None = None


@dataclass(frozen=True)
class Whole:
    """A choice of an answer, complete."""

    parsed: Parsed
    end: End
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)


@runtime_checkable
class Reader(Protocol):
    """Makes deltas of token ids: `chat.Parser`, or `PlainReader`."""

    reasoning_tokens: int

    def feed(self, ids: Any) -> list[Delta]: ...

    def end(self, finish: Literal["stop", "length"]) -> list[Delta]: ...


class PlainReader:
    """Reads an answer in which nothing has a meaning: all of it is content."""

    reasoning_tokens = 0

    def __init__(self, tok: Tokenizer):
        self._decoder = StreamDecoder(tok)

    def feed(self, ids: Any) -> list[Delta]:
        """Returns the text that further ids complete."""
        return self._content(self._decoder.push(ids))

    def end(self, finish: Literal["stop", "length"]) -> list[Delta]:
        """Returns the rest, and the reason."""
        return [*self._content(self._decoder.finish()), Delta(finish_reason=finish)]

    def _content(self, text: str) -> list[Delta]:
        return [Delta(content=text)] if text else []


class Run:
    """One generation on its way. Make it in the event loop that reads it: it submits the first choice at once, so that
    what the engine refuses is raised here, as `RequestError`. The other choices follow the first one's first token, and
    find its prompt computed."""

    def __init__(self, backend: Backend, generation: Generation, metrics: Metrics):
        self.backend, self.generation, self.metrics = backend, generation, metrics
        self._first = backend.submit(generation.prompt, generation.settings[0])

    async def parts(self) -> AsyncGenerator[Part, None]:
        """Yields the parts of all choices as they come. Raises `RequestError` where the engine fails."""
        if len(self.generation.settings) == 1:
            async with contextlib.aclosing(self._choice(0, self._first)) as first:
                async for part in first:
                    yield part
            return
        parts: asyncio.Queue[Part | BaseException] = asyncio.Queue()
        begun = asyncio.Event()

        async def follow(choice: int) -> None:
            try:
                if choice:
                    await begun.wait()
                    stream = self.backend.submit(self.generation.prompt, self.generation.settings[choice])
                else:
                    stream = self._first
                async with contextlib.aclosing(self._choice(choice, stream)) as found:
                    async for part in found:
                        begun.set()
                        parts.put_nowait(part)
            except Exception as failure:
                parts.put_nowait(failure)
            finally:
                begun.set()

        tasks = [asyncio.create_task(follow(choice)) for choice in range(len(self.generation.settings))]
        try:
            running = len(tasks)
            while running:
                found = await parts.get()
                if isinstance(found, BaseException):
                    raise found
                running -= found.end is not None
                yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def whole(self) -> list[Whole]:
        """Waits for all choices. Raises `RequestError` where the engine fails."""
        count = len(self.generation.settings)
        deltas: list[list[Delta]] = [[] for _ in range(count)]
        logprobs: list[list[tuple[int, TokenLogprobs]]] = [[] for _ in range(count)]
        ends: dict[int, End] = {}
        async with contextlib.aclosing(self.parts()) as parts:
            async for part in parts:
                deltas[part.choice] += part.deltas
                logprobs[part.choice] += part.logprobs
                if part.end is not None:
                    ends[part.choice] = part.end
        return [Whole(chat.join(deltas[choice]), ends[choice], logprobs[choice]) for choice in range(count)]

    async def _choice(self, choice: int, stream: Stream) -> AsyncGenerator[Part, None]:
        generation = self.generation
        reader, mask = self._reader(), generation.settings[choice].mask_provider
        stop = StopText(generation.stop) if generation.stop else None
        logprobs: list[tuple[int, TokenLogprobs]] = []
        try:
            event: Event
            async for event in stream:
                reason = event.finish_reason
                if reason == "stop" and mask is not None and mask.shortened:
                    reason = "length"  # the form is complete, but shorter than the model would have it
                deltas: list[Delta] = []
                if stop is None or stop.found is None:
                    deltas = reader.feed(event.tokens)
                    logprobs += zip(event.tokens, event.logprobs, strict=False)
                    if reason == "cancelled" or reason == "error":
                        raise self._failure(event.error)
                    if reason is not None:
                        deltas += reader.end(reason)
                    if stop is not None:
                        deltas = stop.filter(deltas)
                        if stop.found is not None and reason is None:
                            stream.cancel()
                if reason is None:
                    if deltas:
                        yield Part(choice, deltas, logprobs)
                        logprobs = []
                    continue
                found = None if stop is None else stop.found
                if found is not None:
                    deltas.append(Delta(finish_reason="stop"))
                usage, times = event.usage, event.times
                assert usage is not None and times is not None
                counts = Usage(
                    usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, reader.reasoning_tokens
                )
                finish = deltas[-1].finish_reason
                assert finish is not None
                self.metrics.ended(finish, counts, times)
                yield Part(choice, deltas, logprobs, End(finish, found, counts))
                return
        finally:
            await stream.aclose()

    def _reader(self) -> Reader:
        backend, generation = self.backend, self.generation
        if generation.plain:
            return PlainReader(backend.tokenizer)
        starts_in = chat.answer_starts_in(backend.tokenizer, generation.prompt.ids)
        return chat.Parser(backend.tokenizer, tools=generation.tools, model=backend.template, starts_in=starts_in)

    def _failure(self, error: str | None) -> RequestError:
        log.error("a request failed: %s", printable(error, 1_000))
        self.metrics.finished.labels("error").inc()
        if error == "the engine was closed":
            return unavailable("the server is stopping, and cut this answer off")
        if self.backend.failed:
            return unavailable("the engine has failed; the server's log says why")
        return failed()
