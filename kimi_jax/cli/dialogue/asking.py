"""Asks the person at the terminal before a tool runs."""

import asyncio
import contextlib
import json
import os
import sys
import termios
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kimi_jax.cli.dialogue.screen import BAR
from kimi_jax.printable import printable

if TYPE_CHECKING:
    from kimi_jax.agents import Tool

QUESTION = "y once, a always, n no, n REASON no and why> "


class Asker:
    """Asks before each call, one question at a time.

    log: the console of the questions. pause: makes a context in which nothing else is shown there. asking: the names of
    the tools to ask for, from which "always" removes one.
    """

    def __init__(
        self,
        log: Console,
        asking: set[str],
        pause: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        self._log, self._asking, self._pause = log, asking, pause
        self._turn = asyncio.Lock()

    async def __call__(self, tool: "Tool", arguments: dict[str, Any]) -> None:
        """Returns where the call may run. Raises ToolError where it may not, with the person's reason, and where nobody
        can be asked."""
        from kimi_jax.agents import ToolError

        if tool.name in self._asking and not (sys.stdin.isatty() and self._log.is_terminal):
            raise ToolError(f"{tool.name} runs only where a person says yes, and nobody can be asked here")
        async with self._turn:
            if tool.name not in self._asking:
                return
            with self._pause():
                self._show(tool.name, arguments)
                answer, reason = await self._ask()
        if answer == "a":
            self._asking.discard(tool.name)
        elif answer == "n":
            raise ToolError("the person refused this call" + (f": {reason}" if reason else ""))

    def _show(self, name: str, arguments: dict[str, Any]) -> None:
        """Shows the whole call: what is cut off cannot be agreed to."""
        self._log.out(f"{printable(name, 100)} wants to run with", style="yellow", highlight=False)
        for key, value in arguments.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            first, *rest = text.split("\n")
            for line in [f"{key}:", first, *rest] if rest else [f"{key}: {first}"]:
                self._log.out(BAR + printable(line, len(line)), highlight=False)

    async def _ask(self) -> tuple[str, str]:
        """Returns "y", "a" or "n", and the reason; the end of the input is no."""
        termios.tcflush(sys.stdin, termios.TCIFLUSH)  # what was typed before the question does not answer it
        while True:
            self._log.out(QUESTION, style="yellow", highlight=False, end="")
            self._log.file.flush()
            line = b""
            try:
                line = await _line()
            finally:
                if not line.endswith(b"\n"):
                    self._log.out("")
            if not line:
                return "n", ""
            answer, _, reason = line.decode(errors="replace").strip().partition(" ")
            if answer.lower() in ("y", "yes", "a", "always", "n", "no"):
                return answer[0].lower(), reason.strip(" :,")


async def _line() -> bytes:
    """Waits for a line from the terminal, and for nothing where this is cancelled."""
    loop = asyncio.get_running_loop()
    got: asyncio.Future[bytes] = loop.create_future()

    def take() -> None:
        if not got.done():
            got.set_result(os.read(sys.stdin.fileno(), 4096))

    loop.add_reader(sys.stdin, take)
    try:
        return await got
    finally:
        loop.remove_reader(sys.stdin)
