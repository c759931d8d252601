"""Makes the pictures of the chat page in docs/.

`PYTHONPATH=tests/kimi_jax/server python tests/support/chat_page_pictures.py docs` writes them.

The server is the real one, its engine a fake that says what stands here.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from chat_page import CALL, FOUR, SEVEN, TWO, answer_with, browser, draw
from fake_engine import FakeEngine

from checkpoints.toy import toy_config, write_toy
from kimi_jax.processor import Processor
from kimi_jax.server import Listener, Service
from kimi_jax.serving import EngineBackend

ANSWERS = (
    "I see 4, 2 and 7.</think>The number is **427**.",
    "I see 17 and 25, which the tool can add.</think>" + CALL.format(name="add", arguments='{"a": 17, "b": 25}'),
    "The tool says 42.</think>The sum is **42**. In Python:\n\n```python\nprint(17 + 25)  # 42\n```\n\n"
    "| a | b | sum |\n| --- | --- | --- |\n| 17 | 25 | 42 |\n",
)


def start_drawing(page: Any, engine: FakeEngine) -> None:
    """Opens the drawing area and draws a number."""
    answer_with(engine, *ANSWERS)
    page.locator("[data-starter=draw]").click()
    for cell, strokes in enumerate((FOUR, TWO, SEVEN)):
        draw(page, cell, strokes)


def converse(page: Any) -> None:
    """Sends the drawing, asks for a sum, and shows them both."""
    page.get_by_role("button", name="Add drawing").click()
    page.keyboard.press("Enter")
    page.locator(".retry").wait_for()
    page.locator("#calculator").check()
    page.locator("#question").fill("What is 17 + 25?")
    page.keyboard.press("Enter")
    page.locator("article:nth-of-type(4) .retry").wait_for()
    page.locator(".reasoning summary").first.click()
    page.wait_for_timeout(300)


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        config = toy_config("k2.5", hidden_size=64, num_hidden_layers=1, n_routed_experts=8, quantization_config=None)
        processor = Processor.from_folder(write_toy(Path(scratch) / "toy", config))
        engine = FakeEngine(processor, max_length=4_000)
        service = Service(["k25-digits"])
        listener = Listener(service.app(), "127.0.0.1", 0).start()
        service.ready(EngineBackend(engine, processor))
        with browser() as chromium:
            for name, width, height, scheme in (("wide", 1100, 860, "light"), ("narrow", 360, 720, "dark")):
                page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                page.goto(listener.url)
                page.locator("#model", has_text="k25-digits").wait_for()
                start_drawing(page, engine)
                page.screenshot(path=folder / f"page-{name}-drawing.png")
                converse(page)
                page.screenshot(path=folder / f"page-{name}.png")
                page.close()
        listener.stop(2.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
