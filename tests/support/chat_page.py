"""Opens the chat page in a headless Chromium, where there is one."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TO_GET_ONE = "no Chromium is found: `make browser` says how to get one"


def find_browser() -> str | None:
    """Returns the path of a Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Starts a browser, and ends it."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # the sandbox does not run as root
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=find_browser(), args=arguments)
        try:
            yield started
        finally:
            started.close()


def answer_with(engine: Any, *texts: str) -> None:
    """Makes a fake engine answer its next requests with these texts, the last of them from then on."""
    waiting = list(texts)

    def answer(request: Any) -> Any:
        ids = engine.processor.tokenizer.encode(waiting.pop(0) if len(waiting) > 1 else waiting[0])
        return lambda tokens: ids[len(tokens)] if len(tokens) < len(ids) else None

    engine.answer = answer


def draw(page: Any, cell: int, strokes: list[list[tuple[float, float]]]) -> None:
    """Draws lines through points of a cell, 0 to 1, into the open drawing area of one row."""
    box = page.locator("#canvas").bounding_box()
    side = box["height"]
    for first, *others in strokes:
        page.mouse.move(box["x"] + (cell + first[0]) * side, box["y"] + first[1] * side)
        page.mouse.down()
        for x, y in others:
            page.mouse.move(box["x"] + (cell + x) * side, box["y"] + y * side, steps=4)
        page.mouse.up()


FOUR = [[(0.6, 0.12), (0.2, 0.62), (0.8, 0.62)], [(0.62, 0.4), (0.62, 0.9)]]
TWO = [[(0.25, 0.3), (0.35, 0.15), (0.6, 0.13), (0.72, 0.32), (0.5, 0.58), (0.22, 0.87), (0.8, 0.87)]]
SEVEN = [[(0.2, 0.15), (0.8, 0.15), (0.4, 0.9)]]
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>{arguments}"
    "<|tool_call_end|><|tool_calls_section_end|>"
)
