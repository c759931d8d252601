"""Reads JSON from outside: configuration files, headers, indexes, manifests, conversations.

Python's `json` module accepts more than the standard (NaN, Infinity, numbers that overflow to infinity, a name given
twice, of which the last wins), and deep input ends in a RecursionError. Values read here are bounded in size and depth
and have finite numbers only, so code that uses them need not check this.
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
MAX_DEPTH = 64  # tool schemas, the deepest JSON that people write, have some ten levels


class JSONError(ValueError):
    """Is raised for JSON that cannot be read or has another form than expected; the message names its source."""


@runtime_checkable
class File(Protocol):
    """Is what this module needs of a file: a `Path` has it, and so has a file behind a URL."""

    def read_bytes(self) -> bytes: ...


def read_object(file: File, *, max_bytes: int = MAX_BYTES, error: type[ValueError] = JSONError) -> dict[str, Any]:
    """Returns the JSON object in `file`. Raises OSError where `file` cannot be read, and `error` where it is longer
    than `max_bytes`, `parse` refuses it, or it has another kind of value."""
    return parse_object(_bytes(file, max_bytes, error), str(file), error=error)


def read(file: File, *, max_bytes: int = MAX_BYTES, error: type[ValueError] = JSONError) -> Any:
    """Returns the JSON value in `file`. Raises OSError where `file` cannot be read, and `error` where it is longer than
    `max_bytes` or `parse` refuses it."""
    return parse(_bytes(file, max_bytes, error), str(file), error=error)


def parse_object(data: bytes | str, name: str, *, error: type[ValueError] = JSONError) -> dict[str, Any]:
    """Returns the JSON object in `data`. Raises `error` where `parse` does, and for any other kind of value."""
    value = parse(data, name, error=error)
    if not isinstance(value, dict):
        raise error(f"{printable(name)}: expected a JSON object, found {_kind(value)}")
    return value


def parse(data: bytes | str, name: str, *, error: type[ValueError] = JSONError) -> Any:
    """Returns the JSON value in `data`; `name` is its source in errors.

    Raises `error` where `data` is not UTF-8 or not JSON, gives a name twice in one object, nests deeper than
    `MAX_DEPTH`, or has a lone surrogate, a number that is not finite, or one of more digits than Python reads (4,300).
    The error names the kind of file where `file_kinds` recognises it.
    """

    def wrong(found: str) -> ValueError:
        return error(f"{printable(name)}: {printable(found)}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            ((repeated, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise wrong(f"gives the name {repeated!r} twice")
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
        if "\\u" in text:  # an escape may spell half of a surrogate pair, which no encoder accepts
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
    if isinstance(file, Path):  # its size cannot be asked first: a device or pipe has none, and perhaps no end
        with file.open("rb") as stream:
            data = read_at_most(stream, max_bytes)
    else:
        data = file.read_bytes()
    if len(data) > max_bytes:
        size = file.stat().st_size if isinstance(file, Path) else len(data)
        raise error(f"{printable(file)}: has {max(size, len(data)):,} bytes, expected at most {max_bytes:,}")
    return data


def _deeper(value: Any, depth: int) -> bool:
    """Says whether lists and objects nest more than `depth` times. It does not recurse, so no depth is too deep."""
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
