"""Shows agents at work on a terminal: reasoning, calls and results, and for a swarm a table of who does what."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kimi_jax.cli.dialogue.screen import ARROW, BAR, WrappedText, result_line
from kimi_jax.cli.terminal import escaped
from kimi_jax.printable import printable

LINE = 300  # characters of a call or result
REFRESH = 0.25  # seconds
MAIN = "main"


class Steps:
    """Takes the events of a trace, and shows them on `log` where that is a terminal. It is an async
    context manager.

    table: whether sub-agents are shown, in a live table below what the main agent does.
    asking: names of tools whose calls are shown by who asks for each.
    """

    def __init__(self, log: Console, *, table: bool = False, asking: Collection[str] = ()):
        self.log, self._asking = log, asking
        self._rows: dict[str, dict[str, Any]] = {}
        self._done = 0
        self._late: list[tuple[str, str]] = []  # lines that wait while a person is asked
        self._paused = False
        # Drawn by the event loop alone: with rich's own thread, lines that come meanwhile leave parts of tables behind
        live = Live(get_renderable=self._table, console=log, auto_refresh=False, transient=True)
        self._live = live if table and log.is_terminal else None

    async def __aenter__(self) -> "Steps":
        if self._live is not None:
            self._live.start()
            self._drawing = asyncio.create_task(self._draw(self._live))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._live is not None:
            self._drawing.cancel()
            self._live.stop()

    async def _draw(self, live: Live) -> None:
        while True:
            await asyncio.sleep(REFRESH)
            if live.is_started:
                live.refresh()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Shows nothing while in this context, and what came meanwhile afterwards."""
        self._paused = True
        if self._live is not None:
            self._live.stop()
        try:
            yield
        finally:
            self._paused = False
            for text, style in self._late:
                self._line(text, style)
            self._late.clear()
            if self._live is not None:
                self._live.start()

    def __call__(self, entry: dict[str, Any]) -> None:
        """Shows one event."""
        if not self.log.is_terminal:
            return
        self._follow(entry)
        if entry["agent"] != MAIN:
            return
        match entry["event"]:
            case "message" if entry["message"].get("tool_calls"):
                self._say(entry["message"].get("reasoning_content"), entry["message"]["content"])
            case "message":
                self._say(entry["message"].get("reasoning_content"), None)  # the answer is for standard output
            case "call" if not (entry["name"] in self._asking and sys.stdin.isatty()):
                self._line(f"{ARROW}{entry['name']} {entry['arguments']}", "cyan")
            case "result":
                self._line(result_line(entry["content"]), "" if entry["ok"] else "red")

    def _say(self, reasoning: str | None, content: str | None) -> None:
        for text, margin, style in ((reasoning, BAR, "dim"), (content, "", "")):
            if text:
                wrapped = WrappedText(lambda: self.log.width, margin)
                lines = wrapped.push(escaped(text)) + wrapped.finish()
                self.log.out(lines, style=style, highlight=False)

    def _line(self, text: str, style: str) -> None:
        if self._paused:
            self._late.append((text, style))
        else:
            self.log.print(printable(text, LINE), style=style, markup=False, highlight=False)

    def _follow(self, entry: dict[str, Any]) -> None:
        """Keeps the table's rows."""
        name = entry["agent"]
        match entry["event"]:
            case "run":
                self._rows[name] = {"step": 0, "call": "", "since": time.monotonic()}
            case "step" if name in self._rows:
                self._rows[name]["step"] = entry["n"]
            case "call" if name in self._rows:
                self._rows[name]["call"] = printable(f"{entry['name']} {entry['arguments']}", LINE)
            case "stop":
                self._rows.pop(name, None)
                self._done += name != MAIN

    def _table(self) -> Group:
        """Returns the agents that run, as many as the terminal has lines for, and their number."""
        table = Table(box=None, expand=True, pad_edge=False, header_style="dim")
        table.add_column("agent", no_wrap=True, max_width=24)
        table.add_column("step", justify="right")
        table.add_column("last call", no_wrap=True, ratio=1)
        table.add_column("s", justify="right", min_width=5)
        now = time.monotonic()
        for name, row in list(self._rows.items())[: max(self.log.height - 6, 1)]:
            cells = (printable(name, 60), str(row["step"]), row["call"], f"{now - row['since']:.1f}")
            table.add_row(*(Text(cell, overflow="ellipsis") for cell in cells))
        running = sum(name != MAIN for name in self._rows)
        return Group(table, Text(f"{running} sub-agents run, {self._done} are done", style="dim"))
