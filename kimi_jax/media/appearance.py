"""Converts pictures to what a viewer shows: turned as EXIF says, 8-bit RGB, transparency on white.

The orientation is EXIF's tag 0x0112. vLLM composites on white too. 16-bit samples keep their high byte, which is
Pillow's own rule for 16-bit colour.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image

from kimi_jax.media.config import Chessboard
from kimi_jax.media.limits import MAX_PIXELS, MAX_SIDE
from kimi_jax.printable import printable

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {_TURNS[value] for value in (5, 6, 7, 8)}  # width and height change places
_WIDE = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # modes of 16-bit grey; "I" has 32 bits, but files fill 16 of them


@contextmanager
def pillow_errors(name: str) -> Iterator[None]:
    """Turns any exception that Pillow raises for damaged bytes into a ValueError of one line. Its plugins raise
    SyntaxError, EOFError, struct.error, IndexError, AssertionError and more, so only calls of Pillow belong inside."""
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"{name}: no memory to decode it") from error
    except Exception as error:
        reason = printable(error) or type(error).__name__
        raise ValueError(f"{name}: a damaged image: {' '.join(reason.split())}") from error


def as_seen(image: Image.Image, name: str = "the picture", *, keep_mode: bool = False) -> Image.Image:
    """Decodes `image` and returns the RGB picture that a viewer shows, without EXIF, so that it is not turned again.

    With `keep_mode` it stays in its own mode of 8 bits, transparency too, for `on_chessboard`.

    Raises ValueError where `image` is too large, damaged, or has samples whose range is not known.
    """
    width, height = image.size
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise ValueError(
            f"{name}: {width:,} x {height:,} pixels, expected 1 to {MAX_SIDE:,} on a side and at most {MAX_PIXELS:,}"
        )
    with pillow_errors(name):
        image.load()
        turn = find_turn(image)
    if image.mode == "F":
        raise ValueError(f"{name}: floating-point samples, whose range is not known; expected 8 or 16 bits")
    if image.mode in _WIDE:
        image = _high_bytes(image, name)
    with pillow_errors(name):
        if keep_mode:
            picture = image.copy()
        else:
            picture = _on_white(image) if image.has_transparency_data else image.convert("RGB")
        picture.info = {name: value for name, value in image.info.items() if keep_mode and name == "transparency"}
        return picture if turn is None else picture.transpose(turn)


def find_turn(image: Image.Image) -> Image.Transpose | None:
    """Returns the transposition that EXIF asks for, None without; some PNGs have their EXIF after the pixels."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises anything for damaged EXIF; the pixels are intact, and viewers show them unturned
        return None


def _high_bytes(image: Image.Image, name: str) -> Image.Image:
    """Returns 16-bit grey in mode L, or in LA where one value is transparent."""
    with pillow_errors(name):
        values = np.asarray(image if image.mode == "I" else image.convert("I"))
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name}: samples from {values.min()} to {values.max()}, expected 16 bits")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def on_chessboard(image: Image.Image, board: Chessboard) -> np.ndarray:
    """Returns a picture of any mode of 8 bits as levels, uint8 [height, width, 3], transparent ones on a chessboard.

    alpha * picture + (1 - alpha) * background is computed in float32, and its fraction is dropped.
    """
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    levels = np.asarray(image.convert("RGBA")).astype(np.float32)
    rows, columns = (np.arange(size) // board.chessboard_square_size for size in levels.shape[:2])
    is_first = (rows[:, None] + columns) % 2 == 0
    white, gray = np.float32(board.chessboard_white_value), np.float32(board.chessboard_gray_value)
    background = np.where(is_first == board.chessboard_square_on_top_left, white, gray)[:, :, None]
    alpha = levels[:, :, 3:] / np.float32(255)
    return (alpha * levels[:, :, :3] + (1 - alpha) * background).astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white
