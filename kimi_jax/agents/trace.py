"""The record of a run: one JSON object an event, in memory or appended to a file line by line."""

import base64
import binascii
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Trace:
    """Keeps the events of a run: in `events`, or as lines of the file `path`, each complete when the next begins.

    Every event has `t` (seconds since the start), `agent`, `parent` and `event`. A trace whose last line is the `stop`
    of the agent "main" is complete. `listen` is given each event, too. Raises FileExistsError where `path` exists.
    """

    def __init__(self, path: str | Path | None = None, *, listen: Callable[[dict[str, Any]], object] | None = None):
        self.path, self._listen = None if path is None else Path(path), listen
        self.events: list[dict[str, Any]] = []
        self._start = time.monotonic()
        self._texts = 0
        if self.path is not None:
            self.path.touch(exist_ok=False)

    def add(self, event: str, agent: str, parent: str | None, **fields: Any) -> None:
        """Adds one event. A picture in it, a `data:` URL, becomes its SHA-256, which names a file beside the trace."""
        seconds = round(time.monotonic() - self._start, 6)
        entry = {"t": seconds, "agent": agent, "parent": parent, "event": event, **self._without_pictures(fields)}
        if self.path is None:
            self.events.append(entry)
        else:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=True) + "\n")
        if self._listen is not None:
            self._listen(entry)

    def _without_pictures(self, value: Any) -> Any:
        return without_pictures(value, self.path)

    def keep_text(self, text: str) -> Path | None:
        """Writes a result that is too long for a prompt to a file beside the trace, and returns its path; returns None
        where the trace has no file."""
        if self.path is None:
            return None
        self._texts += 1
        file = self.path.with_name(f"{self.path.stem}.result-{self._texts}.txt")
        file.write_text(text, encoding="utf-8", errors="backslashreplace")
        return file


def without_pictures(value: Any, beside: Path | None = None) -> Any:
    """Returns a value of JSON with the SHA-256 of each picture in its place; `beside` is a file in whose folder the
    pictures are written."""
    if isinstance(value, dict):
        return {key: without_pictures(one, beside) for key, one in value.items()}
    if isinstance(value, list):
        return [without_pictures(one, beside) for one in value]
    if not (isinstance(value, str) and value.startswith("data:image/")):
        return value
    head, _, body = value.partition(",")
    try:
        data = base64.b64decode(body, validate=True)
    except binascii.Error:
        return value
    digest = hashlib.sha256(data).hexdigest()
    if beside is not None:
        kind = "".join(filter(str.isalnum, head.removeprefix("data:image/").partition(";")[0]))
        beside.with_name(f"{digest}.{kind[:8]}").write_bytes(data)
    return f"sha256:{digest}"
