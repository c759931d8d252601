"""Reads the body of a request: bounded, as JSON by the reader for all JSON from outside, as a struct by `msgspec`."""

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from kimi_jax import json_reader
from kimi_jax.server.errors import RequestError, invalid

_Struct = TypeVar("_Struct", bound=msgspec.Struct)

# Values of JSON; a body of brackets would otherwise take a hundred times its size as objects.
MAX_VALUES = 2_000_000
# Bytes from which reading takes longer than other requests should wait for it.
_LARGE = 100_000
_FIELD = re.compile(r"`?\$\.([A-Za-z_]+)")


async def read_body(request: Request, kind: type[_Struct], max_bytes: int, timeout: float) -> _Struct:
    """Returns the body as `kind`.

    Raises `RequestError`: 415 where it is not said to be JSON, 413 for more than `max_bytes`, 408 where it is not there
    after `timeout` seconds, 400 where it is no JSON or of another form, with the path of the field.
    """
    said = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if said != "application/json":  # a page of another origin cannot send this unasked
        raise RequestError(415, "the content-type is not application/json", code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout):
            data = bytearray()
            async for piece in request.stream():
                data += piece
                if len(data) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise RequestError(408, f"the body did not come within {timeout:g} s", code="timeout") from None
    except ClientDisconnect:
        raise RequestError(400, "the client went away") from None
    body = bytes(data)
    if len(body) > _LARGE:
        return await asyncio.to_thread(parse_body, body, kind)
    return parse_body(body, kind)


def parse_body(data: bytes, kind: type[_Struct]) -> _Struct:
    """Returns a body's JSON as `kind`. Raises `RequestError`, naming the path of the field that is wrong."""
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise invalid(f"the body holds more than {MAX_VALUES:,} values")
    try:
        value: dict[str, Any] = json_reader.parse_object(data, "the body")
        return msgspec.convert(value, kind)
    except json_reader.JSONError as error:
        raise invalid(str(error)) from None
    except msgspec.ValidationError as error:
        found = _FIELD.search(str(error))
        missing = re.search(r"required field `(\w+)`", str(error))
        raise invalid(str(error), found[1] if found else missing[1] if missing else None) from None


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(413, f"the body has more than {max_bytes:,} bytes", code="request_too_large")
