"""Makes an engine that answers by a list."""

import asyncio
import types

import pytest
from answer_cases import spell

from kimi_jax.engine import Event, Usage


class ListEngine:
    """Answers each request with the next text of a list; the first new token waits until `begin` is set."""

    def __init__(self, processor, *texts, max_length=1280, reason="stop"):
        self.tokenizer, self.texts, self.reason = processor.tokenizer, list(texts), reason
        self.sizes, self.failure = types.SimpleNamespace(max_length=max_length), None
        self.requests, self.closed, self.ready, self.begin = [], 0, False, asyncio.Event()
        self.begin.set()

    def prefix_ready(self, tokens, media=None):
        assert len(tokens) % 128 == 0
        return self.ready

    async def submit(self, request):
        self.requests.append(request)
        try:
            await self.begin.wait()
            ids = spell(self.tokenizer, self.texts.pop(0))
            yield Event(tuple(ids))
            usage = Usage(len(request.tokens), len(ids), 128)
            yield Event(finish_reason=self.reason, usage=usage, error="no memory" if self.reason == "error" else None)
        finally:
            self.closed += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="session")
def list_engine():
    return ListEngine
