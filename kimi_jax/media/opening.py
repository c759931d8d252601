"""Opens pictures of the formats named here and no others: Pillow would run Ghostscript for an EPS under any name."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from kimi_jax.media import sources
from kimi_jax.media.appearance import as_seen, pillow_errors
from kimi_jax.media.limits import MAX_PIXELS
from kimi_jax.printable import printable

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# first bytes of other files that people give as pictures, and of formats whose damaged headers Pillow does not open
_OTHER_FORMATS = (
    (b"\x89PNG", "a damaged PNG"),
    (b"\xff\xd8", "a damaged JPEG"),
    (b"RIFF", "a RIFF file"),
    (b"GIF8", "a damaged GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
    (b"<!DOCTYPE html", "HTML"),
    (b"\x1aE\xdf\xa3", "Matroska"),
    (b"version https://git-lfs", "a Git LFS pointer"),
)


def open_image(source: object, *, keep_mode: bool = False) -> Image.Image:
    """Returns the picture in `source` as a viewer shows it, in RGB, or with `keep_mode` in its own mode; the first
    frame of an animation.

    source: a path, a base64 `data:` URL, the bytes of a file, a uint8 array [height, width], [height, width, 3] (RGB)
    or [height, width, 4] (RGBA), or a PIL image. Any string but a `data:` URL is opened as a path, so pass strings of
    strangers through `from_message` first. Raises OSError or ValueError naming the source.
    """
    if isinstance(source, Image.Image | np.ndarray):
        return as_seen(as_image(source), keep_mode=keep_mode)
    data, name = sources.read(source)
    return as_seen(open_header(data, name), name, keep_mode=keep_mode)


def as_image(picture: Image.Image | np.ndarray) -> Image.Image:
    """Converts an array of levels to a PIL image; returns a PIL image unchanged."""
    if isinstance(picture, Image.Image):
        return picture
    shape = picture.shape
    if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and shape[2] in (3, 4))):
        raise ValueError(
            f"an array of {picture.dtype} {[*shape]} is no picture, expected uint8 [height, width], "
            "[height, width, 3] or [height, width, 4]"
        )
    if not picture.size:
        raise ValueError(f"a picture of {shape[1]} x {shape[0]} pixels has nothing in it")
    return Image.fromarray(picture)


def open_header(data: bytes, name: str, hint: str = "") -> Image.Image:
    """Returns the image in `data`, its pixels not decoded yet. Raises ValueError, with `hint` at its end where the
    format is not one of `FORMATS`."""
    with pillow_errors(name):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _scale_transparency(image)
            return image
        except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            failure = error
    if not isinstance(failure, UnidentifiedImageError):
        raise ValueError(f"{name}: expected at most {MAX_PIXELS:,} pixels ({printable(failure)})") from failure
    found = _other_format(data)
    found = f" (found {found}, expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]})"
    raise ValueError(f"{name}: not an image that can be read{found}{hint}") from failure


def _other_format(data: bytes) -> str:
    if data[4:8] == b"ftyp":  # ISO base media: a still picture if its brand says so, else a video
        brand = data[8:12].decode("latin-1")
        return {"avif": "AVIF", "heic": "HEIC", "mif1": "HEIF"}.get(brand, "MP4")
    start = data[:64].lstrip()
    return next((kind for first, kind in _OTHER_FORMATS if start.startswith(first)), f"{len(data):,} other bytes")


def _scale_transparency(image: Image.Image) -> None:
    """Scales the transparent value of a PNG to 8 bits; Pillow scales samples of 2, 4 and 16 bits, but not the value."""
    value = image.info.get("transparency")
    tiles = getattr(image, "tile", []) if image.format == "PNG" else []
    raw = tiles[0][3] if tiles else None
    if raw in ("L;2", "L;4") and isinstance(value, int):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[raw]
    elif raw == "RGB;16B" and isinstance(value, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in value)
