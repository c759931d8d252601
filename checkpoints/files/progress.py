"""Reports the progress of a long command, to people (a bar) and to programs (a JSON object a line)."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from checkpoints.files.pipeline import Progress

INTERVAL_S = 1.0  # between two lines of JSON: a job of hours then writes some thousands
PLAIN_INTERVAL_S = 30.0  # between two lines for people where there is no terminal


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Shows a bar with bytes, rate and time left on standard error; where that is no terminal, a line every 30 s."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal) as bar:
        tasks: list[Any] = []
        began = last = time.monotonic()
        first = 0

        def progress(done: int, total: int) -> None:
            nonlocal began, first, last
            now = time.monotonic()
            if not tasks:
                tasks.append(bar.add_task(title, total=total, completed=done))
                began, first, last = now, done, now
            bar.update(tasks[0], completed=done)
            if not console.is_terminal and now - last >= PLAIN_INTERVAL_S and done < total:
                last = now
                print(_line(title, done, total, (done - first) / (now - began)), file=sys.stderr, flush=True)

        yield progress


def _line(title: str, done: int, total: int, rate: float) -> str:
    left = f", {(total - done) / rate:,.0f} s left" if rate else ""
    return f"{title}: {done / 1e9:,.2f} of {total / 1e9:,.2f} GB, {rate / 1e6:,.0f} MB/s{left}"


@contextmanager
def progress_events(event: str) -> Iterator[Progress]:
    """Prints lines {"event": `event`, "done_bytes", "total_bytes", "bytes_per_second", "seconds_left"}: the first
    report, the last, and one a second between. The rate is since the first report, in which it is null."""
    began, first, last = 0.0, -1, 0.0

    def progress(done: int, total: int) -> None:
        nonlocal began, first, last
        now = time.monotonic()
        if first < 0:
            began, first = now, done
        elif done < total and now - last < INTERVAL_S:
            return
        last = now
        rate = (done - first) / (now - began) if now > began else 0.0
        line = {
            "event": event,
            "done_bytes": done,
            "total_bytes": total,
            "bytes_per_second": round(rate) or None,
            "seconds_left": round((total - done) / rate, 1) if rate else None,
        }
        print(json.dumps(line), flush=True)

    yield progress
