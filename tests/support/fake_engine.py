"""An engine without a model: it checks requests as the real one does, and answers with what a test wrote."""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from kimi_jax.engine.engine import Engine
from kimi_jax.engine.job import make_job
from kimi_jax.engine.requests import Event, QueueFullError, Times, TokenLogprobs, Usage
from kimi_jax.engine.stats import Stats


class FakeStream:
    """The events of one answer. `answer` chooses each next token from those before it, and None to stop."""

    def __init__(self, engine: "FakeEngine", request: Any, job: Any, answer: Callable[[list[int]], int | None]):
        self.engine, self.request, self.job, self.answer = engine, request, job, answer
        self.tokens: list[int] = []
        self.waiting: list[int] = []
        self.ended = self.cancelled = False
        self.began = time.monotonic()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.ended:
            raise StopAsyncIteration
        await asyncio.sleep(self.engine.pause)
        if self.engine.error is not None:
            return self.end("error", error=self.engine.error)
        if self.cancelled:
            return self.end("cancelled")
        if len(self.tokens) == self.request.max_new_tokens:
            return self.end("length")
        if self.job.guide is not None and self.job.guide.stopped(self.tokens):
            return self.end("stop")
        token = self.next_token()
        if token is None or token in self.job.stop_ids:
            return self.end("stop")
        self.tokens.append(token)
        logprobs = ()
        if self.request.top_logprobs is not None:
            top = tuple((token + index, -1.0 - index) for index in range(self.request.top_logprobs))
            logprobs = (TokenLogprobs(-1.0, top),)
        return Event((token,), logprobs=logprobs)

    def next_token(self):
        if self.job.guide is None:
            return self.answer(self.tokens)
        if not self.waiting:
            self.waiting = self.job.guide.forced(self.tokens)
        if self.waiting:
            return self.waiting.pop(0)
        mask = self.job.guide.mask(self.tokens)
        if mask is None:
            return self.answer(self.tokens)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        wanted = self.answer(self.tokens)
        return wanted if wanted in allowed else int(self.engine.random.choice(allowed))

    def end(self, reason, error=None):
        self.ended = True
        usage = Usage(len(self.job.sequence.tokens), len(self.tokens) + (reason == "stop"), self.engine.cached)
        return Event((), reason, usage, Times(self.began, time.monotonic(), time.monotonic()), error)

    def cancel(self):
        self.cancelled = True

    async def aclose(self):
        self.engine.closed_streams.append(self)
        self.ended = True


class FakeEngine(Engine):
    """Answers with `text`, in which markers are spelt, or with what `answer` makes of a request."""

    def __init__(self, processor, text="", max_length=600):
        self.processor, self.sizes = processor, SimpleNamespace(max_length=max_length)
        self.text, self.answer = text, None
        self.pause, self.cached = 0.0, 0
        self.error: str | None = None
        self.full = self._closed = False
        self.requests: list[Any] = []
        self.closed_streams: list[FakeStream] = []
        self.random = np.random.default_rng(0)

    def submit(self, request):
        if self._closed:
            raise RuntimeError("the engine has failed: /secret/path")
        if self.full:
            raise QueueFullError("3 requests wait already; try again later")
        job = make_job(request, self.processor.config, self.sizes.max_length, None, 0, lambda event: None)
        self.requests.append(request)
        ids = self.processor.tokenizer.encode(self.text)

        def written(tokens):
            return ids[len(tokens)] if len(tokens) < len(ids) else None

        return FakeStream(self, request, job, written if self.answer is None else self.answer(request))

    def stats(self):
        counts = {"drafts": 4, "drafted_tokens": 9, "accepted_tokens": 5}
        counts |= {"acceptance_rate": 5 / 9, "accepted_length": 1.25}
        return Stats(compiled_programs=3, pages=8, free_pages=6, slots=4, free_slots=3, waiting=0, running=1, **counts)

    def fail(self, failure):
        self.error, self._closed = f"the engine has failed: {failure}", True

    def close(self):
        self.error, self._closed = "the engine was closed", True
