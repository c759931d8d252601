"""`kimi-jax demo`: the whole way of a checkpoint on eight simulated devices, with random weights.

A toy in K2.5's published layout is written, converted, loaded over a mesh, shown a picture and asked about it.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.markup import escape

import checkpoints
from checkpoints.toy import toy_config, write_toy
from kimi_jax.printable import printable
from kimi_jax.processor import Processor
from kimi_jax.runtime.generate import stream
from kimi_jax.runtime.sampling import Sampling
from kimi_jax.text import StreamDecoder
from sharding import make_mesh

MESH = "2x4"
QUESTION = "What is in this picture?"


def draw_picture(path: Path) -> None:
    """Draws a house at sunset, 320 x 240, as PNG."""
    image = Image.new("RGB", (320, 240), (250, 200, 150))
    pen = ImageDraw.Draw(image)
    pen.ellipse((210, 30, 270, 90), fill=(240, 90, 60))
    pen.rectangle((0, 180, 320, 240), fill=(80, 140, 70))
    pen.rectangle((70, 110, 170, 200), fill=(150, 90, 60))
    pen.polygon([(60, 110), (120, 60), (180, 110)], fill=(120, 40, 40))
    pen.rectangle((110, 150, 135, 200), fill=(60, 40, 30))
    image.save(path)


def bytes_per_device(model: object) -> dict[str, int]:
    """Returns the bytes of the model's arrays on each device."""
    held: dict[str, int] = {}
    for array in jax.tree.leaves(model):
        for shard in array.addressable_shards:
            bits = 4 if array.dtype == "int4" else 8 * array.dtype.itemsize
            held[str(shard.device)] = held.get(str(shard.device), 0) + shard.data.size * bits // 8
    return held


def run(console: Console, *, picture: Path | None = None, max_new_tokens: int = 48) -> None:
    """Prints every stage with its sizes and times. `picture` is any image file; a drawn one where it is None."""
    with TemporaryDirectory(prefix="kimi-jax-demo-") as temporary:
        folder = Path(temporary)
        console.print("[bold]kimi-jax demo[/]: the weights are [bold]random[/], so what it says means nothing.\n")
        if picture is None:
            picture = folder / "picture.png"
            draw_picture(picture)
        source = write_toy(folder / "published", toy_config("k2.5", hidden_size=512, num_hidden_layers=4))
        console.print("A toy in K2.5's published layout (safetensors, INT4 experts, vision tower):")
        console.print(checkpoints.table(checkpoints.summary(source)))
        with checkpoints.progress_bar("converting") as progress:
            report = checkpoints.convert(source, folder / "orbax", progress=progress)
        console.print(
            f"Converted to Orbax: {_size(source) / 1e6:.2f} MB in {report.tensors} tensors -> "
            f"{_size(report.destination) / 1e6:.2f} MB in {report.leaves} leaves.\n"
        )
        _show_and_ask(console, report.destination, picture, max_new_tokens)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _show_and_ask(console: Console, folder: Path, picture: Path, max_new_tokens: int) -> None:
    mesh = make_mesh(MESH)
    model = checkpoints.load(folder, mesh=mesh)
    held = bytes_per_device(model)
    console.print(f"Loaded over a mesh of {dict(mesh.shape)}. Bytes on each of its {len(held)} devices:")
    console.print("  " + ", ".join(f"{device}: {size:,}" for device, size in held.items()), highlight=False)

    processor = Processor.from_folder(folder)
    prompt = processor(QUESTION, images=[picture], thinking=False)
    assert prompt.media is not None
    (grid,) = prompt.media.grids.tolist()
    placeholders = int((prompt.tokens == model.config.media_placeholder_token_id).sum())
    name = escape(printable(picture.name))
    console.print(f"\nThe picture {name}: grid (t, h, w) = {tuple(grid)} in patches, {placeholders} tokens.")
    console.print(f"The prompt: {prompt.tokens.shape[1]} tokens. {QUESTION!r} Kimi answers:\n")

    text, times = StreamDecoder(processor.tokenizer), []
    for column in stream(
        model,
        prompt.tokens,
        media=prompt.media,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=0.8, top_p=0.95),
        stop_ids=(),  # random weights know no end
        seed=1,
    ):
        times.append(time.perf_counter())
        said = _visible(text.push(column.tokens.tolist()))
        console.print(said, end="", markup=False, highlight=False, soft_wrap=True)
    steps = np.diff(times)[1:]  # the first step compiles
    console.print(f"\n\n{len(times)} random tokens, {1 / np.median(steps):.1f} tokens per second after compilation.")


def _visible(text: str) -> str:
    """Control characters as a dot: random bytes should not steer a terminal."""
    return "".join(c if c.isprintable() else "·" for c in text)
