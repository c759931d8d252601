"""Work that ends when its client goes away, and server-sent events."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

_T = TypeVar("_T")

PING_SECONDS = 15.0
# A client that takes nothing for so long has gone, whatever its connection says.
STALLED_SECONDS = 300.0


class ClientGoneError(Exception):
    """Ends the work for a client that has gone away, or takes nothing."""


async def until_gone(work: Coroutine[Any, Any, _T], *watchers: Coroutine[Any, Any, None]) -> _T:
    """Returns the work's result. Cancels it, and raises `ClientGoneError`, where a watcher ends before it."""
    task = asyncio.create_task(work)
    others = [asyncio.create_task(watcher) for watcher in watchers]
    try:
        await asyncio.wait({task, *others}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for one in (task, *others):
            one.cancel()
        await asyncio.gather(task, *others, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """Answers with server-sent events, and with pings while there are none.

    frames: whole events, as bytes. ping: the event or comment that keeps a connection open.
    """

    def __init__(self, frames: AsyncGenerator[bytes, None], ping: bytes):
        self.frames, self.ping = frames, ping
        self._sending: float | None = None  # since when the client has not taken what is sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(self._write(send), disconnected(receive), self._keep_open(send))
        except ClientGoneError:
            if (abort := scope.get("state", {}).get("abort")) is not None:
                abort()  # closing would wait until the client has taken the rest

    async def _write(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx would hold events back
        ]
        async with contextlib.aclosing(self.frames):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for frame in self.frames:
                self._sending = time.monotonic()
                await send({"type": "http.response.body", "body": frame, "more_body": True})
                self._sending = None
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_open(self, send: Send) -> None:
        """Sends pings; returns when the client takes nothing."""
        while self._sending is None or time.monotonic() - self._sending < STALLED_SECONDS:
            await asyncio.sleep(PING_SECONDS)
            if self._sending is None:
                await send({"type": "http.response.body", "body": self.ping, "more_body": True})
