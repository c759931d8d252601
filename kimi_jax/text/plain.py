"""Copies messages and tools from outside as plain JSON types, so that the code after it need not check them again."""

import math
from collections.abc import Mapping
from typing import Any

from kimi_jax.json_reader import MAX_DEPTH
from kimi_jax.printable import printable

MAX_VALUES = 1_000_000  # a conversation of a million tokens has some ten thousand
_MAX_INT = 10**400  # past the end of float64, 1.8e308; longer integers take quadratic time to print


def plain(value: Any, name: str) -> Any:
    """Returns a copy of `value` made of None, bool, int, float, str, list, and dict with strings as keys.

    Raises ValueError, naming `name`, where a value is of another type, nests deeper than `MAX_DEPTH` (a value that
    contains itself does), holds half of a surrogate pair, or is a number that is not finite, and where there are more
    than `MAX_VALUES` values.
    """
    values = 0

    def copy(value: Any, depth: int) -> Any:
        nonlocal values
        values += 1
        if values > MAX_VALUES:
            raise ValueError(f"{name} holds more than {MAX_VALUES:,} values")
        if isinstance(value, str):
            return plain_text(value, name)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            if abs(value) > _MAX_INT:
                raise ValueError(f"{name} holds an integer of more than 400 digits")
            return int(value)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"{name} holds the number {value}, which JSON does not have")
            return float(value)
        if not isinstance(value, Mapping | list | tuple):
            raise ValueError(f"{name} holds a {type(value).__name__}, which is not JSON")
        if depth == MAX_DEPTH:
            raise ValueError(f"{name} nests deeper than {MAX_DEPTH} levels")
        if isinstance(value, Mapping):
            return {_key(key, name): copy(one, depth + 1) for key, one in value.items()}
        return [copy(one, depth + 1) for one in value]

    return copy(value, 0)


def plain_text(text: str, name: str) -> str:
    """Returns `text` as a plain `str`. Raises ValueError, naming `name`, where it holds half of a surrogate pair."""
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise ValueError(f"{name} holds half of a surrogate pair (\\u{half:04x}), which no tokenizer takes") from None
    return str.__str__(text)


def _key(key: Any, name: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{name} holds the key {printable(repr(key), 60)}, expected a string")
    return plain_text(key, name)
