"""Ends a command: writes errors and warnings as one line each on standard error, handles SIGTERM and closed pipes."""

import os
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kimi_jax.cli.terminal import escaped
from kimi_jax.printable import printable

LINE = 800  # characters of a message: ten lines of a terminal, room for two long paths
# Made before memory runs out.
_OUT_OF_MEMORY = b"kimi-jax: out of memory on this machine; a smaller --memory, --batch or model takes less\n"


def report(error: Exception, trace: bool) -> int:
    """Writes the error to standard error in one line, with `trace` also its traceback, and returns the exit code.

    Returns 0 and writes nothing where the error is only that the reader of standard output has gone.
    """
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return 0
    if isinstance(error, MemoryError):
        os.write(2, _OUT_OF_MEMORY)
    else:
        print(f"kimi-jax: {_in_words(error)}", file=sys.stderr)
    if trace:
        print(escaped("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return 1


def _in_words(error: Exception) -> str:
    text = _one_line(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        names = [name for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(printable(name, LINE // 2) for name in names)}: {printable(error.strerror)}"
    if isinstance(error, ValueError | OSError):
        return text
    if "RESOURCE_EXHAUSTED" in text:  # jaxlib's error for allocations on a device
        return f"out of memory on a device: {text}"
    return f"unexpected {type(error).__name__}: {text}; this is a fault in kimi-jax, --trace shows where"


def _one_line(message: Warning | Exception | str) -> str:
    """Returns the message without line breaks, cut and escaped; the class's name where there is none."""
    if isinstance(message, KeyError) and len(message.args) == 1:
        message = str(message.args[0])  # KeyError.__str__ would put it in quotes
    return printable(" ".join(str(message).split()), LINE) or type(message).__name__


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Shows Python warnings as one line on standard error, without file and source, while in this context."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"kimi-jax: warning: {_one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Raises SystemExit(143) on SIGTERM while in this context, so that half-written files are removed on the way out.

    A second SIGTERM ends the process at once. A handler that was installed before stays.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def flush_output() -> None:
    """Flushes standard output. Raises OSError where it cannot be written."""
    if sys.stdout is not None:  # it is None after `>&-`
        sys.stdout.flush()


def drop_unwritten_output() -> None:
    """Discards buffered output that standard output does not accept; the interpreter would fail over it at its exit."""
    try:
        flush_output()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _reader_is_gone() -> bool:
    try:
        flush_output()
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # polls for errors only, which a pipe without a reader has
        return bool(poll.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError):  # standard output is no file
        return False
