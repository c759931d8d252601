"""Answers a file of prompts through an engine: many at once, each result as it finishes, continued after a stop.

A line of the file is a JSON object: `prompt` (a text) or `messages` (a conversation in OpenAI's schema, with `tools`
if it has any), and where the command's values are not wanted `id`, `max_new_tokens`, `temperature`, `top_k`, `top_p`,
`min_p`, `seed` and `thinking`. A line without an id is known by its number, from 0 on. A line that cannot be answered
has a result with an `error`, and the others go on.
"""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from kimi_jax import json_reader
from kimi_jax.answering import checked_max_new_tokens
from kimi_jax.engine import Engine, Request
from kimi_jax.printable import printable
from kimi_jax.processor import Processor
from kimi_jax.runtime.sampling import Sampling

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_KEYS = {"id", "prompt", "messages", "tools", "max_new_tokens", "seed", "thinking", *_SAMPLING}
# Prompts that are made ready while others are computed, for each slot of the engine.
AHEAD = 2


@dataclass(frozen=True)
class Defaults:
    """Values of lines that do not have their own. `files` is the folder whose files the messages may name."""

    sampling: Sampling
    max_new_tokens: int | None = None
    seed: int = 0
    thinking: bool = True
    files: Path | None = None


@dataclass(frozen=True)
class Line:
    """A line of the file, or the reason why it is none. `id` is a text."""

    id: str
    fields: dict[str, Any]
    error: str | None = None


def read_lines(path: Path, done: Container[str] = (), part: tuple[int, int] = (0, 1)) -> Iterator[Line]:
    """Yields the lines of a file whose ids are not in `done`; empty lines are none.

    part: (index, count) leaves out all but every `count`th line, beginning with number `index`.
    """
    with path.open("rb") as file:
        for number, data in enumerate(file):
            if not data.strip() or number % part[1] != part[0]:
                continue
            try:
                fields = json_reader.parse_object(data, f"{path}: line {number + 1}")
                line = Line(str(fields.get("id", number)), fields, _wrong(fields))
            except ValueError as error:
                line = Line(str(number), {}, str(error))
            if line.id not in done:
                yield line


def open_results(path: Path) -> tuple[set[str], TextIO]:
    """Opens a file of results to add to it, and returns the ids of those that it has.

    A last line that a stop cut off is no result, and is taken away.
    """
    whole = path.read_bytes() if path.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    ids = {str(json_reader.parse_object(line, str(path)).get("id")) for line in whole.splitlines()}
    out = path.open("a", encoding="utf-8")
    out.truncate(len(whole))
    return ids, out


async def answer_lines(
    engine: Engine, processor: Processor, lines: Iterator[Line], defaults: Defaults, *, in_order: bool = False
) -> AsyncIterator[dict[str, Any]]:
    """Yields the result of each line when it is there, or in the lines' order: id, content, reasoning and tool_calls
    (where the model has some), finish_reason and usage, or id and error. Raises RuntimeError where the engine
    fails."""
    running: list[asyncio.Task[dict[str, Any]]] = []
    more = True
    while more or running:
        while more and len(running) < AHEAD * engine.stats().slots:
            if (line := next(lines, None)) is None:
                more = False
            else:
                running.append(asyncio.create_task(_answer(engine, processor, line, defaults)))
        if not running:
            return
        if in_order:
            yield await running.pop(0)
            continue
        finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        running = [task for task in running if task not in finished]
        for task in finished:
            yield task.result()


def result_line(result: dict[str, Any]) -> str:
    """Returns a result as one line of JSON."""
    return json.dumps(result, ensure_ascii=False) + "\n"


async def _answer(engine: Engine, processor: Processor, line: Line, defaults: Defaults) -> dict[str, Any]:
    try:
        if line.error is not None:
            raise ValueError(line.error)
        # (pictures are opened and cut here, while the engine computes)
        request = await asyncio.to_thread(_request, processor, line.fields, defaults)
        ids: list[int] = []
        async for event in engine.submit(request):
            ids += event.tokens
        if engine.failure is not None:  # no fault of this line, which is to be answered after a new start
            raise RuntimeError(f"the engine has failed: {engine.failure}") from engine.failure
        if event.usage is None or event.error is not None:
            raise ValueError(event.error or "the request was cancelled")
    except (ValueError, OSError) as error:
        return {"id": line.id, "error": printable(error)}
    reason: Literal["stop", "length"] = "length" if event.finish_reason == "length" else "stop"
    parsed = processor.parse(ids, tools=line.fields.get("tools"), finish=reason, prompt=np.asarray(request.tokens))
    result: dict[str, Any] = {"id": line.id, "content": parsed.content or ""}
    if parsed.reasoning is not None:
        result["reasoning"] = parsed.reasoning
    if parsed.tool_calls:
        result["tool_calls"] = parsed.tool_calls
    return result | {"finish_reason": parsed.finish_reason, "usage": dataclasses.asdict(event.usage)}


def _request(processor: Processor, fields: dict[str, Any], defaults: Defaults) -> Request:
    messages = fields["prompt"] if "prompt" in fields else fields["messages"]
    thinking = fields.get("thinking", defaults.thinking)
    prompt = processor(messages, fields.get("tools"), thinking, files=defaults.files)
    values: dict[str, Any] = {
        name: fields[name] if name == "top_k" else float(fields[name]) for name in _SAMPLING if name in fields
    }
    return Request(
        prompt.tokens[0],
        max_new_tokens=checked_max_new_tokens(
            processor.config, prompt, fields.get("max_new_tokens", defaults.max_new_tokens)
        ),
        sampling=dataclasses.replace(defaults.sampling, **values),
        seed=fields.get("seed", defaults.seed),
        media=prompt.media,
    )


def _wrong(fields: dict[str, Any]) -> str | None:
    """Returns what is wrong with a line's fields."""
    if unknown := sorted(fields.keys() - _KEYS):
        return f"has the field {printable(unknown[0])!r}, expected {', '.join(sorted(_KEYS))}"
    if ("prompt" in fields) == ("messages" in fields):
        return "expected either prompt or messages"
    kinds: tuple[tuple[str, type | tuple[type, ...]], ...] = (
        ("prompt", str),
        ("messages", list),
        ("tools", list),
        ("thinking", bool),
        ("max_new_tokens", int),
        ("seed", int),
        *((name, (int, float)) for name in _SAMPLING),
    )
    for name, kind in kinds:
        value = fields.get(name)
        if name in fields and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            return f"{name} is {printable(value, 60)!r}, which is of another kind than expected"
    return None
