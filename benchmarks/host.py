"""Times what the host does with text and pictures beside the libraries that do its heavy part.

    python benchmarks/host.py --tokenizer FOLDER [--rounds 30] [--only text|picture]

FOLDER has Kimi's `tiktoken.model` and `tokenizer_config.json`. Encoding, decoding and chat prompts are compared with
tiktoken itself on the same text (for a prompt, as it is rendered, with special tokens allowed), the patches of a 4K
picture with one `Image.resize` to the same size. Both sides take turns, and each number is the least over the rounds.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from kimi_jax import media
from kimi_jax.media.config import MediaConfig
from kimi_jax.media.patches import navit_resize
from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.tokenizer import MAX_ENCODE_CHARS

REPOSITORY = Path(__file__).parents[1]
RUN = 30_000  # characters without a space, of which tiktoken takes 25,000 at once
K25 = {  # media_proc_cfg of Kimi K2.5
    "in_patch_limit": 16384,
    "in_patch_limit_each_frame": 4096,
    "patch_limit_on_one_side": 512,
    "patch_size": 14,
    "merge_kernel_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "sample_fps": 2.0,
    "temporal_merge_kernel_size": 4,
}

Side = Callable[[], Any]


def least(ours: Side, peer: Side, rounds: int) -> tuple[float, float]:
    """Returns the least seconds of the two sides, which take turns after a round that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for side, found in zip((ours, peer), times, strict=True):
            start = time.perf_counter()
            side()
            found.append(time.perf_counter() - start)
    return min(times[0][1:]), min(times[1][1:])


def texts() -> Iterator[tuple[str, str]]:
    """Yields texts under their names: prose and code of this repository, of several lengths, and one with long runs."""
    prose = "".join(file.read_text() for file in sorted((REPOSITORY / "docs").glob("*.md")))
    code = "".join(file.read_text() for file in sorted((REPOSITORY / "kimi_jax").rglob("*.py")))
    yield "200 characters", prose[:200]
    yield "4,000 characters", prose[:4_000]
    yield f"prose, {len(prose):,} characters", prose
    yield "code, 1,000,000 characters", code[:1_000_000]
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz0123456789+/", k=RUN)
    yield "a run of 30,000 characters in prose", prose[:50_000] + "".join(letters) + prose[50_000:]


def conversation(text: str, turns: int, characters: int) -> list[dict[str, str]]:
    cuts = [text[start : start + characters] for start in range(0, turns * characters, characters)]
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": cut} for number, cut in enumerate(cuts)]


def measure_text(tok: Tokenizer, rounds: int) -> Iterator[tuple[str, float, float]]:
    """Yields what was done, our seconds and tiktoken's."""
    encoding = tok.encoding
    for name, text in texts():
        ids = tok.encode(text, allow_special=False)
        if "a run" not in name and len(text) <= MAX_ENCODE_CHARS:  # tiktoken itself does not cut, and gives other ids
            assert ids == encoding.encode_ordinary(text)
        yield (
            f"encode, {name}",
            *least(
                lambda text=text: tok.encode(text, allow_special=False),
                lambda text=text: encoding.encode_ordinary(text),
                rounds,
            ),
        )
        assert tok.decode(ids) == text
        yield f"decode, {name}", *least(lambda ids=ids: tok.decode(ids), lambda ids=ids: encoding.decode(ids), rounds)
    prose = dict(texts())["code, 1,000,000 characters"].replace("<|", "<")
    for turns, characters in ((1, 200), (1, 4_000), (1, 100_000), (81, 600), (400, 200)):
        messages = conversation(prose, turns, characters)
        prompt = chat.render(messages)
        assert chat.encode(tok, messages) == encoding.encode(prompt, allowed_special="all")
        yield (
            f"prompt of {turns} messages of {characters:,} characters",
            *least(
                lambda messages=messages: chat.encode(tok, messages),
                lambda prompt=prompt: encoding.encode(prompt, allowed_special="all"),
                rounds,
            ),
        )


def measure_picture(rounds: int) -> Iterator[tuple[str, float, float]]:
    """Yields the picture, the seconds of its patches and those of one resize."""
    config = MediaConfig.from_dict({"media_proc_cfg": K25})
    noise = np.random.default_rng(0).integers(0, 256, (135, 240, 3), np.uint8)
    picture = Image.fromarray(noise).resize((3840, 2160))
    size = navit_resize(*picture.size, config.in_patch_limit, config)
    yield (
        f"patches of a picture of 3840 x 2160, scaled to {size.width} x {size.height}",
        *least(
            lambda: media.image_patches(picture, config),
            lambda: picture.resize((size.width, size.height), Image.Resampling.BICUBIC),
            rounds,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="the folder of Kimi's tokenizer")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", choices=("text", "picture"))
    options = parser.parse_args()
    if options.only != "picture" and options.tokenizer is None:
        parser.error("--tokenizer: expected the folder of Kimi's tokenizer")
    table = Table("what", "ms", "tiktoken's or Pillow's ms", "ratio")
    found: list[tuple[str, float, float]] = []
    if options.only != "picture":
        found += measure_text(Tokenizer.from_folder(options.tokenizer), options.rounds)
    if options.only != "text":
        found += measure_picture(options.rounds)
    for name, ours, peer in found:
        table.add_row(name, f"{1e3 * ours:.3f}", f"{1e3 * peer:.3f}", f"{ours / peer:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
