"""Reads the answer of a strange HTTP server, within bounds."""

import httptools

from kimi_jax.media.limits import MAX_BYTES

# Bytes on the wire beyond those of the body, for as much again as the body has: headers, trailers, sizes of chunks.
MAX_OVERHEAD = 2**16
_REDIRECTS = (301, 302, 303, 307, 308)


class Answer:
    """Reads the answer to a GET from the bytes that come. A complete one has a `body`, or a `location` to ask instead.

    limit: the most bytes of the body, as many as a request's pictures have left. Every error is a ValueError in words
    for a client.
    """

    def __init__(self, limit: int):
        self.body = bytearray()
        self.location: str | None = None
        self.complete = False
        self._limit, self._received = limit, 0
        self._headers: dict[bytes, bytes] = {}
        self._ended_headers = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Reads further bytes. Raises ValueError for what is no answer with a body or a redirection, or too long."""
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            raise ValueError("its server gives no sound HTTP answer") from None
        length = self._headers.get(b"content-length", b"0")
        if len(self.body) > self._limit or (length.isdigit() and int(length[:20]) > self._limit):
            raise ValueError(f"too long; the pictures that a request names may have {MAX_BYTES:,} bytes together")
        if self._received - len(self.body) > MAX_OVERHEAD + len(self.body):
            raise ValueError("its server sends too much around the picture")
        if self._ended_headers and (status := self._parser.get_status_code()) != 200:
            if status not in _REDIRECTS or b"location" not in self._headers:
                raise ValueError(f"its server answers with status {status}")
            self.location, self.complete = self._headers[b"location"].decode("latin-1"), True

    def end(self) -> None:
        """Takes note that no more bytes come. Raises ValueError where some are missing."""
        framed = b"content-length" in self._headers or b"transfer-encoding" in self._headers
        if not self.complete and (framed or not self._ended_headers):
            raise ValueError("its server ended the answer early")

    # httptools calls these. Answers with status 1xx come before the answer itself.

    def on_message_begin(self) -> None:
        self._headers.clear()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._ended_headers:  # else it is a trailer
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._ended_headers = self._parser.get_status_code() >= 200

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = self._ended_headers
