"""The events of one request, on the side of who reads them."""

import asyncio
from collections.abc import Callable
from typing import Any

from kimi_jax.engine.requests import Event


class Stream:
    """The events of one request: an async iterator, which ends after the event with a finish reason."""

    def __init__(self, cancel: Callable[[], Any], events: asyncio.Queue[Event]):
        self._cancel, self._events, self._ended = cancel, events, False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await self._events.get()
        self._ended = event.finish_reason is not None
        return event

    def cancel(self) -> None:
        """Cancels the request, if it has not ended. Its last event still comes, with the usage."""
        self._cancel()

    async def aclose(self) -> None:
        """Cancels the request, if it has not ended, and ends the iterator."""
        self._close()

    def _close(self) -> None:
        self._ended = True
        self._cancel()

    def __del__(self) -> None:
        self._close()
