"""Reads JSON that others wrote: configuration files, headers, indexes, manifests, conversations.

Python's `json` module takes more than the standard (NaN, Infinity, numbers that overflow to infinity, a name given
twice, of which the last wins) and leaves its recursion limit to the input. Everything read here is bounded in size and
depth and holds finite numbers only, so whoever uses a value need not ask.
"""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kimi_jax.bounded_read import read_at_most
from kimi_jax.file_kinds import HEAD, mistaken
from kimi_jax.printable import printable

MAX_BYTES = 128 * 2**20  # the index of a release with 200,000 tensors has 20 MB
MAX_DEPTH = 64  # tool schemas are the deepest that is written by hand, some ten levels


class JSONError(ValueError):
    """JSON that cannot be read, or is not what it should be; the message names where it comes from."""


@runtime_checkable
class File(Protocol):
    """A `Path`, or a file behind a URL."""

    def read_bytes(self) -> bytes: ...


def read_object(file: File, *, max_bytes: int = MAX_BYTES, error: type[ValueError] = JSONError) -> dict[str, Any]:
    """Returns the JSON object in `file`. Raises what `parse_object` raises, and OSError where `file` cannot be read."""
    return parse_object(_bytes(file, max_bytes, error), str(file), error=error)


def read(file: File, *, max_bytes: int = MAX_BYTES, error: type[ValueError] = JSONError) -> Any:
    """Returns the JSON value in `file`. Raises what `parse` raises, and OSError where `file` cannot be read."""
    return parse(_bytes(file, max_bytes, error), str(file), error=error)


def parse_object(data: bytes | str, name: str, *, error: type[ValueError] = JSONError) -> dict[str, Any]:
    """Returns the JSON object that `data` holds. Raises `error` as `parse` does, and for any other kind of value."""
    value = parse(data, name, error=error)
    if not isinstance(value, dict):
        raise error(f"{printable(name)}: expected a JSON object, found {_kind(value)}")
    return value


def parse(data: bytes | str, name: str, *, error: type[ValueError] = JSONError) -> Any:
    """Returns the JSON value that `data` holds; `name` says in errors where it comes from.

    Raises `error` where `data` is not UTF-8 or not JSON, gives a name twice in one object, nests deeper than
    `MAX_DEPTH`, or holds a number that is not finite or has more digits than Python takes (4,300), or a lone surrogate.
    Bytes of another kind of file that is known (`file_kinds`) are called what they are.
    """

    def wrong(found: str) -> ValueError:
        return error(f"{printable(name)}: {printable(found)}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise wrong(f"gives the name {twice!r} twice")
        return values

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise wrong(f"holds the number {text}, which is not finite in float64")
        return value

    def refuse(text: str) -> None:
        raise wrong(f"holds {text}, which is not JSON")

    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=refuse)
        text.encode("utf-8")
        if "\\u" in text:  # half of a surrogate pair, which no encoder takes, may be written as an escape
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (json.JSONDecodeError, UnicodeError) as failure:
        if isinstance(data, bytes) and (kind := mistaken(data[:HEAD])):
            raise wrong(f"is {kind}") from None
        raise wrong(f"not {'UTF-8 text' if isinstance(failure, UnicodeError) else 'JSON'} ({failure})") from None
    except RecursionError:
        raise wrong(f"nests deeper than {MAX_DEPTH} levels") from None
    except error:
        raise
    except ValueError:  # a hook for each number would double the time of a large header
        raise wrong(f"holds a number of more than {sys.get_int_max_str_digits():,} digits") from None
    if _deeper(value, MAX_DEPTH):
        raise wrong(f"nests deeper than {MAX_DEPTH} levels")
    return value


def _bytes(file: File, max_bytes: int, error: type[ValueError]) -> bytes:
    if isinstance(file, Path):  # a device or pipe has no size, and perhaps no end
        with file.open("rb") as stream:
            data = read_at_most(stream, max_bytes)
    else:
        data = file.read_bytes()
    if len(data) > max_bytes:
        size = file.stat().st_size if isinstance(file, Path) else len(data)
        raise error(f"{printable(file)}: has {max(size, len(data)):,} bytes, expected at most {max_bytes:,}")
    return data


def _deeper(value: Any, depth: int) -> bool:
    """Says whether lists and objects nest more than `depth` times; without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        level = [
            one
            for outer in level
            for one in (outer.values() if type(outer) is dict else outer)
            if type(one) is dict or type(one) is list
        ]
        if not level:
            return False
    return bool(level)


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")
