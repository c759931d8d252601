"""Fetches the pictures that requests name by http(s) URLs: from named domains, public addresses, within limits.

A name is resolved once for each connection. Every address that it leads to must be public, and the connection goes to
one of these addresses, with the name in its Host header and TLS handshake: a name that changes its address between the
check and the connection (DNS rebinding) changes nothing.
"""

import asyncio
import contextlib
import dataclasses
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urljoin

from kimi_jax.media.limits import MAX_BYTES
from kimi_jax.media.opening import open_header
from kimi_jax.media.sources import NamedBytes
from kimi_jax.printable import printable
from kimi_jax.server.errors import RequestError, invalid
from kimi_jax.server.generation import Chat
from kimi_jax.server.media_answer import Answer
from kimi_jax.server.media_urls import Target, is_public, read_url

SECONDS = 20.0  # for all pictures of a request, and as many for a place among those that fetch
CONNECT_SECONDS = 5.0  # for each address
MAX_ADDRESSES = 4  # that are tried; all are checked
MAX_REDIRECTS = 3
MAX_PICTURES = 32  # different ones of a request
MAX_REQUESTS = 8  # that fetch, or keep what they fetched until their prompt is made, at one time
PIECE = 2**16

# Returns the addresses of a host.
Resolve = Callable[[str, int], Awaitable[list[str]]]
# Connects to an address and port; with TLS as the host that is named, where one is.
Connect = Callable[[str, int, str | None], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class PictureFetcher:
    """Replaces http(s) URLs of pictures in requests by the pictures' bytes.

    domains: from `media_domain`; without any, all such URLs are refused. resolve, connect: for tests without a network.
    """

    def __init__(self, domains: Sequence[str], resolve: Resolve | None = None, connect: Connect | None = None):
        self.domains = tuple(domains)
        self._resolve, self._connect = resolve or self._look_up, connect or _connect
        self._places = asyncio.Semaphore(MAX_REQUESTS)
        # Its own threads: names whose servers are slow must not hold up the threads that make prompts.
        self._resolvers = ThreadPoolExecutor(MAX_REQUESTS, "kimi-jax resolver")

    @contextlib.asynccontextmanager
    async def fetched(self, request: Chat) -> AsyncGenerator[Chat, None]:
        """Yields the request with its pictures in the places of their URLs.

        Raises `RequestError`: 400 naming the URL and what is wrong with it, 429 where too many requests fetch.
        """
        targets: dict[str, Target] = {}
        for url in _urls(request.messages):
            with _errors_of(url):
                targets[url] = read_url(url, self.domains)
        if not targets:
            yield request
            return
        if len(targets) > MAX_PICTURES:
            raise invalid(f"the messages name {len(targets)} pictures, expected at most {MAX_PICTURES}", "messages")
        async with self._place():
            pictures = await self._fetch_all(targets)
            yield dataclasses.replace(request, messages=[_replaced(one, pictures) for one in request.messages])

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncGenerator[None, None]:
        try:
            async with asyncio.timeout(SECONDS):
                await self._places.acquire()
        except TimeoutError:
            message = f"{MAX_REQUESTS} requests fetch pictures, which is the most"
            raise RequestError(429, message, code="rate_limit_exceeded", retry_after=1) from None
        try:
            yield
        finally:
            self._places.release()

    async def _fetch_all(self, targets: Mapping[str, Target]) -> dict[str, NamedBytes]:
        """Returns the pictures by URL, and under its name. Together they may have as many bytes as one `data:` URL."""
        found: dict[str, NamedBytes] = {}
        url, left = "", MAX_BYTES
        try:
            async with asyncio.timeout(SECONDS):
                for url, target in targets.items():
                    with _errors_of(url):
                        found[url] = NamedBytes(await self._fetch(target, left), printable(url, 100))
                    left -= len(found[url])
                    try:
                        await asyncio.to_thread(open_header, found[url], found[url].name)
                    except (ValueError, OSError) as error:
                        raise _refused(str(error)) from None
        except TimeoutError:
            raise _refused(f"{printable(url, 100)}: did not come within {SECONDS:g} s") from None
        return found

    async def _fetch(self, target: Target, limit: int) -> bytes:
        """Returns the body that a URL leads to. Raises ValueError in words that do not repeat the URL."""
        for _ in range(1 + MAX_REDIRECTS):
            answer = await self._ask(target, limit)
            if answer.location is None:
                return bytes(answer.body)
            try:
                target = read_url(urljoin(target.url, answer.location), self.domains)
            except ValueError:
                raise ValueError("it redirects to where the server may not fetch pictures from") from None
        raise ValueError(f"it redirects more than {MAX_REDIRECTS} times")

    async def _ask(self, target: Target, limit: int) -> Answer:
        reader, writer = await self._open(target)
        try:
            writer.write(
                f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: kimi-jax\r\n"
                "Accept: image/*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
            )
            answer = Answer(limit)
            while not answer.complete and (piece := await reader.read(PIECE)):
                answer.feed(piece)
            answer.end()
            return answer
        except OSError:
            raise ValueError("the connection with its server broke off") from None
        finally:
            writer.transport.abort()  # closing would wait for the other side

    async def _open(self, target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connects to a checked address of the target's host."""
        try:
            addresses = await self._resolve(target.host, target.port)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise ValueError("its host is not known")
        if not all(map(is_public, addresses)):
            raise ValueError("its host is not in the public Internet")
        server_name = target.host if target.scheme == "https" else None
        failure = "its server cannot be reached"
        for address in addresses[:MAX_ADDRESSES]:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    return await self._connect(address, target.port, server_name)
            except ssl.SSLCertVerificationError:
                failure = "its server has no valid certificate"
            except OSError:
                pass  # the next address may answer
        raise ValueError(failure)

    async def _look_up(self, host: str, port: int) -> list[str]:
        def look_up() -> list[str]:
            return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]

        return await asyncio.get_running_loop().run_in_executor(self._resolvers, look_up)


async def _connect(
    address: str, port: int, server_name: str | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    tls = None if server_name is None else ssl.create_default_context()
    return await asyncio.open_connection(address, port, ssl=tls, server_hostname=server_name, limit=PIECE)


@contextlib.contextmanager
def _errors_of(url: str) -> Iterator[None]:
    """Turns a ValueError into the answer to the client who sent the URL."""
    try:
        yield
    except ValueError as error:
        raise _refused(f"{printable(url, 100)}: {error}") from None


def _refused(message: str) -> RequestError:
    return invalid(message, "messages", "invalid_image_url")


def _urls(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the http(s) URLs of pictures."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if (url := _url(part)) is not None:
                yield url


def _url(part: Any) -> str | None:
    """Returns the http(s) URL of a part that is a picture."""
    if not isinstance(part, Mapping) or part.get("type") != "image_url":
        return None
    source = part.get("image_url")
    url = source.get("url") if isinstance(source, Mapping) else source
    is_http = isinstance(url, str) and url[:8].lower().startswith(("http://", "https://"))
    return url if is_http else None


def _replaced(message: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [part if (url := _url(part)) is None else part | {"image_url": pictures[url]} for part in content]
    return {**message, "content": parts}
