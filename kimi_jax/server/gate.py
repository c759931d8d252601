"""Stands before the application: keys, hosts, limits for each client, and a log without contents."""

import collections
import hmac
import json
import logging
import time
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_jax.printable import printable
from kimi_jax.server import page
from kimi_jax.server.errors import RequestError, Style
from kimi_jax.server.metrics import Metrics

access_log = logging.getLogger("kimi_jax.server.access")

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_OPEN = frozenset({"/health", *page.PATHS})  # answered without a key


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients may do.

    api_key: None lets everybody in. hosts: the names under which the server may be called, None for any: without a key,
    a page whose name leads to this machine could talk to it. max_body, all_bodies: bytes of a request's body, and of
    those of all running requests together. per_client: requests of one address at one time.
    body_seconds: in which a request's body must come. media_domains: those of `--allow-media-domain`, as
    `media_urls.media_domain` returns them.
    """

    api_key: str | None = None
    hosts: frozenset[str] | None = LOOPBACK
    max_body: int = 32 * 2**20
    all_bodies: int = 2**30
    per_client: int = 256
    body_seconds: float = 60.0
    media_domains: tuple[str, ...] = ()
    log_requests: bool = False


class Gate:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, paths: frozenset[str]):
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths
        self._running: collections.Counter[str] = collections.Counter()
        self._held = 0  # bytes of bodies of running requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, held, status = time.monotonic(), 0, 499  # nginx's number for a client that went before an answer
        client, path = (scope.get("client") or ("unknown",))[0], scope["path"]

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def hold() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            held += size
            self._held += size
            if self._held > self.limits.all_bodies:
                raise RequestError(
                    429,
                    f"the bodies of all running requests have more than {self.limits.all_bodies:,} bytes",
                    code="rate_limit_exceeded",
                    retry_after=1,
                )
            return message

        self._running[client] += 1
        try:
            refused = self._refusal(Headers(scope=scope), path, client)
            if refused is None:
                await self.app(scope, hold, note)
            else:
                answer = JSONResponse(refused.body(style(path)), refused.status, refused.headers)
                await answer(scope, receive, note)
        finally:
            self._held -= held
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
            self.metrics.responses.labels(path if path in self.paths else "other", str(status)).inc()
            if self.limits.log_requests:
                seconds = round(time.monotonic() - began, 3)
                line = {"client": client, "method": scope["method"], "path": printable(path), "status": status}
                access_log.info(json.dumps(line | {"seconds": seconds}))

    def _refusal(self, headers: Headers, path: str, client: str) -> RequestError | None:
        limits = self.limits
        if limits.hosts is not None and _name(headers.get("host", "")) not in limits.hosts:
            return RequestError(403, "the server is not known by this host name; give it an API key to allow others")
        if path in _OPEN:
            return None
        if limits.api_key is not None and not _has_key(headers, limits.api_key):
            return RequestError(401, "the API key is missing or wrong", code="invalid_api_key")
        if self._running[client] > limits.per_client:
            return RequestError(
                429,
                f"{limits.per_client} requests of this client are running, which is the most",
                code="rate_limit_exceeded",
                retry_after=1,
            )
        return None


def style(path: str) -> Style:
    """Returns whose API a path belongs to."""
    return "anthropic" if path == "/v1/messages" or path.startswith("/v1/messages/") else "openai"


def _has_key(headers: Headers, key: str) -> bool:
    """Says whether the request has the key. The comparison takes as long for a wrong key as for the right one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return hmac.compare_digest(given.encode("latin-1"), key.encode())  # (a header is bytes)


def _name(host: str) -> str:
    """Returns a Host header without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
