"""`kimi-jax demo`: the whole way of a checkpoint on eight simulated devices, with the small trained model k25-digits.

The published folder is converted and loaded over a mesh. Then the model reads a handwritten number, and adds two by
calling a tool, whose result it puts into words. The digits are some that it was not trained on.
"""

import contextlib
import json
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape

import checkpoints
from kimi_jax import small
from kimi_jax.answering import Answer, answer
from kimi_jax.media.opening import open_image
from kimi_jax.model.kimi import Kimi
from kimi_jax.printable import printable
from kimi_jax.processor import Processor
from kimi_jax.runtime.sampling import Sampling
from sharding import make_mesh

MESH = "2x4"
# With its prompt, each answer takes two of the cache's pages of 128 tokens: one program decodes all three
MAX_NEW_TOKENS = 110
READ, ADD = "What number is in the picture?", "Add the numbers."
WIDE = 84  # characters, the width at which a picture is shown


def run(console: Console, *, picture: Path | None = None, keep: Path | None = None) -> None:
    """Prints every stage with its sizes and times.

    picture: an image file to read; None is one of the package's. keep: a folder for the converted checkpoint and the
    pictures, with which the commands that are shown at the end work; None removes them.
    """
    source = small.path("k25-digits")
    console.print("A small Kimi, trained to read digits, in K2.5's published layout (INT4 experts, vision tower):")
    console.print(checkpoints.table(checkpoints.summary(source)))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="kimi-jax-demo-"))) if keep is None else keep
        with checkpoints.progress_bar("converting") as progress:
            report = checkpoints.convert(source, folder / "k25-digits", progress=progress)
        console.print(
            f"Converted to Orbax: {_size(source) / 1e6:.2f} MB in {report.tensors} tensors -> "
            f"{_size(report.destination) / 1e6:.2f} MB in {report.leaves} leaves.\n"
        )
        mesh = make_mesh(MESH)
        model = checkpoints.load(report.destination, mesh=mesh)
        held = bytes_per_device(model)
        console.print(f"Loaded over a mesh of {dict(mesh.shape)}. Bytes on each of its {len(held)} devices:")
        console.print("  " + ", ".join(f"{device}: {size:,}" for device, size in held.items()), highlight=False)
        talk = _Talk(console, model, Processor.from_folder(report.destination))
        shown = small.picture("427") if picture is None else picture
        talk.ask(READ, [shown])
        if picture is None:
            talk.ask(ADD, [small.picture("58"), small.picture("316")])
    if keep is not None:
        kept = shutil.copy(shown, keep) if picture is None else picture
        folder = report.destination
        console.print("\nTry next:")
        for command in (
            ["chat", folder],
            ["generate", folder, "--prompt", READ, "--image", kept],
            ["serve", folder],
        ):
            console.print(f"  kimi-jax {shlex.join(map(str, command))}", highlight=False, markup=False, soft_wrap=True)


def bytes_per_device(model: object) -> dict[str, int]:
    """Returns the bytes of the model's arrays on each device."""
    held: dict[str, int] = {}
    for array in jax.tree.leaves(model):
        for shard in array.addressable_shards:
            bits = 4 if array.dtype == "int4" else 8 * array.dtype.itemsize
            held[str(shard.device)] = held.get(str(shard.device), 0) + shard.data.size * bits // 8
    return held


class _Talk:
    """Asks a model, and shows what it was asked and what it answers."""

    def __init__(self, console: Console, model: Kimi, processor: Processor):
        self.console, self.model, self.processor = console, model, processor

    def ask(self, question: str, pictures: list[Path]) -> None:
        """Shows pictures with a question, and what the model thinks, calls and says."""
        for picture in pictures:
            self.console.print(f"\n{escape(printable(picture.name))}:")
            self.console.print(in_characters(open_image(picture)), highlight=False, markup=False)
        self.console.print(f"\n[bold]You:[/] {question}")
        shown: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
        tools = [small.ADD_TOOL] if len(pictures) == 2 else None
        said = self._answer(messages, tools)
        while said.tool_calls and len(messages) < 6:
            messages.append(
                {"role": "assistant", "content": "", "reasoning_content": said.reasoning, "tool_calls": said.tool_calls}
            )
            for call in said.tool_calls:
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": self._call(call["function"])})
            said = self._answer(messages, tools)

    def _answer(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Answer:
        began = time.monotonic()
        said = answer(
            self.model,
            messages,
            tools,
            True,
            Sampling(temperature=0.0),
            max_new_tokens=MAX_NEW_TOKENS,
            processor=self.processor,
        )
        seconds = time.monotonic() - began
        if said.reasoning:
            self.console.print(f"[dim]thinks: {escape(printable(said.reasoning, 200))}[/]")
        for call in said.tool_calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            self.console.print(f"[bold]calls:[/] {escape(printable(f'{name} {arguments}', 200))}")
        if said.content:
            self.console.print(f"[bold]Kimi:[/] {escape(printable(said.content, 200))}", highlight=False)
        self.console.print(f"[dim]({len(said.token_ids)} tokens in {seconds:.1f} s, compiling included)[/]")
        return said

    def _call(self, function: Mapping[str, str]) -> str:
        """Runs the tool `add`, and returns what the model reads of it."""
        try:
            arguments = json.loads(function["arguments"])
            result = str(int(arguments["a"]) + int(arguments["b"]))
        except (ValueError, TypeError, KeyError) as error:
            result = f"error: {error}"
        self.console.print(f"[bold]tool:[/] {escape(printable(result, 200))}", highlight=False)
        return result


def in_characters(image: Image.Image) -> str:
    """Returns a picture in blocks of characters, at most `WIDE` wide: each shows two pixels, one above the other."""
    width = min(WIDE, image.width)
    height = max(2, round(image.height * width / image.width / 2) * 2)
    dark = np.asarray(image.convert("L").resize((width, height))) < 128
    rows = zip(dark[::2], dark[1::2], strict=True)
    blocks = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
    return "\n".join("".join(blocks[bool(a), bool(b)] for a, b in zip(*row, strict=True)).rstrip() for row in rows)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
