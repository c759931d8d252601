"""Listens on a port with uvicorn, in a thread of its own, so that a program can load its model meanwhile."""

import asyncio
import socket
import threading
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# A request's headers must come within so many seconds of its first byte, or of the connection.
HEADER_SECONDS = 30.0
MAX_CONNECTIONS = 1_024
BACKLOG = 2_048


class _Protocol(HttpToolsProtocol):
    """Aborts a connection on which a request's headers are late, and lets an application abort one."""

    def connection_made(self, transport: Any) -> None:  # asyncio's, or uvloop's, which is no subclass of it
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["abort"] = self.transport.abort
        self._late.cancel()
        self._late = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def on_headers_complete(self) -> None:
        self._late.cancel()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shuts down. Transports that are being closed close their sockets in the loop's next round: it has one."""
        await super().shutdown(sockets)
        await asyncio.sleep(0)


class Listener:
    """An application on a port. `port` is the one that was free where 0 was asked for.

    behind_proxy: takes a client's address from the X-Forwarded-For of a proxy on this machine.

    Raises OSError where the port cannot be had.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, *, behind_proxy: bool = False):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            self._socket.listen(BACKLOG)
        except BaseException:
            self._socket.close()
            raise
        self.host, self.port = host, self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=behind_proxy,
            limit_concurrency=MAX_CONNECTIONS,
            backlog=BACKLOG,
        )
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._run, name="kimi-jax server", daemon=True)
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        """The address of the server, without a path."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}"

    def start(self) -> "Listener":
        """Begins to answer, and returns this."""
        self._thread.start()
        return self

    def stop(self, seconds: float, cut: Any = None) -> bool:
        """Takes no more connections, waits so long for running answers, and ends those that are left.

        cut: called before they are ended, so that their clients can be told. Returns whether all had ended before.
        """
        self._server.should_exit = True
        self._thread.join(seconds)
        if not self._thread.is_alive():
            return True
        if cut is not None:
            cut()
            self._thread.join(2.0)
        self._server.force_exit = True
        self._thread.join(5.0)
        return False

    def _run(self) -> None:
        try:
            self._server.run([self._socket])
        finally:
            self._socket.close()
            self.ended.set()
