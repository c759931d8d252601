"""Escapes text for a terminal: names from files and a model's answers must not steer it."""

import re
import sys

from kimi_jax.printable import printable

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters but line feed and tab
_LONGEST = 10_000  # characters of a line: more than two paths of the 4,096 that Linux allows


def print_line(text: str) -> None:
    """Prints `text` as one line, with steering characters escaped."""
    print(printable(text, _LONGEST))


def escaped(text: str) -> str:
    """Returns `text` with its control characters escaped, except line feeds and tabs."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def for_stdout(text: str) -> str:
    """Returns `text` unchanged where standard output is a file or pipe, `escaped` where it is a terminal."""
    return escaped(text) if sys.stdout.isatty() else text
