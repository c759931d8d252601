"""Carries events from the engine's thread to the streams that an event loop reads."""

import asyncio
from collections import deque

from kimi_jax.engine.requests import Event


class Mailbox:
    """The way to all streams of one event loop. Waking a loop is a system call: a step's events wake it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._undelivered: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._woken = False

    def put(self, events: asyncio.Queue[Event], event: Event) -> None:
        """Puts an event in a stream's queue, soon. Raises RuntimeError where the loop is closed."""
        if self._loop.is_closed():
            raise RuntimeError("the event loop is closed")
        self._undelivered.append((events, event))
        if not self._woken:
            self._woken = True  # before the loop can deliver, which takes it back
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # an event that comes from here on wakes the loop again, at worst for nothing
        while self._undelivered:
            events, event = self._undelivered.popleft()
            events.put_nowait(event)
