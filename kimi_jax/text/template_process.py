"""Runs a process that renders strangers' chat templates: started when it is first needed, ended with this process.

A template is a program. jinja2's sandbox keeps it from Python's objects, but not from a loop of 1e10 steps or a string
of 10 GB; the operating system does (`template_child` sets its own limits, and a clock here ends it where it hangs). A
separate process can be used from any thread, beside JAX's threads (it is spawned, never forked), and may crash without
harm.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from kimi_jax.text import template_child
from kimi_jax.text.template_child import MAX_FRAME, MAX_MEMORY, MAX_SECONDS

MAX_WALL_SECONDS = 30  # well over `MAX_SECONDS`, for a busy machine on which the process gets little processor time


class RenderError(ValueError):
    """Is raised for a template that fails or meets a limit; the message continues "the chat template ..."."""


class TemplateProcess:
    """Owns one child process, which one thread at a time uses and which is started again where a template ends it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, source: str, variables: dict[str, Any], now: str) -> str:
        """Returns the text that the template `source` writes. `now` is the time that it is told, in ISO format.

        Raises `RenderError` where the template does not compile, refuses its variables, or meets a limit.
        """
        request = json.dumps({"source": source, "variables": variables, "now": now}, ensure_ascii=False).encode()
        if len(request) > MAX_FRAME:
            raise RenderError(f"gets {len(request):,} bytes of messages and tools, at most {MAX_FRAME:,} are taken")
        with self._lock:
            child = self._child = self._child or _start()
            late = threading.Event()

            def end(child: subprocess.Popen[bytes] = child, late: threading.Event = late) -> None:
                late.set()
                child.kill()

            clock = threading.Timer(MAX_WALL_SECONDS, end)
            clock.daemon = True
            clock.start()
            kind = b"L"
            try:
                kind, text = _exchange(child, request)
            except (OSError, EOFError):  # the child is gone
                text = _reason(child.wait(), late.is_set())
            finally:  # after an interrupt too: a child that still renders would send its answer to the next request
                clock.cancel()
                clock.join()
                if kind == b"L" or late.is_set():
                    self._end()
        if kind != b"T":
            raise RenderError(text)
        return text

    def close(self) -> None:
        """Ends the child process, where there is one, even while it renders."""
        if (child := self._child) is not None:
            child.kill()
        with self._lock:
            self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                pipe.close()
            child.wait()

    def forget(self) -> None:
        """Closes this process's ends of the pipes after a fork; the child process belongs to the parent."""
        self._lock = threading.Lock()
        child, self._child = self._child, None
        if child is not None:
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                pipe.close()
            child.returncode = 0  # only its parent can wait for it


def _start() -> "subprocess.Popen[bytes]":
    # -S leaves out `site`, which takes half of the starting time; PYTHONPATH has the paths that it would add.
    return subprocess.Popen(
        [sys.executable, "-S", "-P", str(Path(template_child.__file__))],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        start_new_session=True,  # so that Ctrl-C reaches the parent only
    )


def _exchange(child: "subprocess.Popen[bytes]", request: bytes) -> tuple[bytes, str]:
    """Sends `request` and returns the answer's kind and text. Raises OSError or EOFError where the child is gone."""
    assert child.stdin is not None and child.stdout is not None
    unsent = memoryview(len(request).to_bytes(8, "big") + request)
    while unsent:
        unsent = unsent[child.stdin.write(unsent) :]
    length = int.from_bytes(_read(child.stdout, 8), "big")
    if length > MAX_FRAME:
        return b"L", "writes too long a prompt"
    answer = _read(child.stdout, length)
    return answer[:1], answer[1:].decode("utf-8")


def _read(pipe: Any, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = pipe.read(min(count - len(data), 2**20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _reason(returncode: int, late: bool) -> str:
    if late or returncode == -signal.SIGXCPU:
        return f"takes more than {MAX_SECONDS} seconds"
    if returncode > 0:
        return (
            f"cannot be rendered: {sys.executable} ended with {returncode}, which runs jinja2 in a process of its own"
        )
    return (
        f"brought its process down (signal {-returncode}): it nests too deep or needs more than {MAX_MEMORY >> 20} MiB"
    )


shared = TemplateProcess()
atexit.register(shared.close)
os.register_at_fork(after_in_child=shared.forget)
