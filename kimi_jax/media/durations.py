"""Reads the durations of an animation's frames from its blocks or chunks, without decoding a pixel.

GIF89a: graphic control extensions. WebP: ANMF chunks (RFC 9649, section 2.7.1). PNG: fcTL chunks (Third Edition,
section 11.3.6.3).
"""

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kimi_jax.media.limits import MAX_FRAMES


@dataclass(frozen=True)
class Frame:
    """One frame: milliseconds on the screen, and the right and lower edge of what it draws, 0 where not stated."""

    duration: float
    right: int = 0
    bottom: int = 0


def read_frames(data: bytes, kind: str, name: str) -> list[Frame]:
    """Returns the frames of a GIF, WEBP or PNG in order: at most one for a still picture, none for another format.

    Raises ValueError, naming the file, where there are more than `MAX_FRAMES` or a block is cut off.
    """
    readers = {"GIF": _gif, "WEBP": _webp, "PNG": _png}
    if kind not in readers:
        return []
    try:
        frames = list(itertools.islice(readers[kind](data), MAX_FRAMES + 1))
    except (IndexError, struct.error) as error:
        raise ValueError(f"{name}: a damaged image: a {kind} that ends within a frame's description") from error
    if len(frames) > MAX_FRAMES:
        raise ValueError(f"{name}: more than {MAX_FRAMES:,} frames")
    return frames


def first_frame(data: bytes, kind: str) -> int:
    """Returns Pillow's number for the first frame: 1 in a PNG whose own picture is no part of its animation, else 0."""
    chunks = _png_chunks(data) if kind == "PNG" else iter(())
    return int(next((name for name, _ in chunks if name in (b"IDAT", b"fcTL")), b"") == b"IDAT")


def _gif(data: bytes) -> Iterator[Frame]:
    def palette(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 128 else 0

    at, duration = 13 + palette(data[10]), 0
    while at < len(data) and data[at] != 0x3B:
        if data[at] == 0x21:  # an extension
            if data[at + 1] == 0xF9:
                duration = 10 * struct.unpack_from("<H", data, at + 4)[0]
            at += 2
        elif data[at] == 0x2C:  # a frame
            left, top, width, height, flags = struct.unpack_from("<4HB", data, at + 1)
            yield Frame(float(duration), left + width, top + height)
            duration = 0
            at += 11 + palette(flags)
        else:  # decoders skip bytes between blocks
            at += 1
            continue
        while at < len(data) and data[at]:  # sub-blocks, each preceded by its length
            at += 1 + data[at]
        at += 1


def _webp(data: bytes) -> Iterator[Frame]:
    at = 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind == b"ANMF":
            yield Frame(float(struct.unpack_from("<I", data, at + 20)[0] & 0xFFFFFF))
        at += 8 + size + size % 2


def _png(data: bytes) -> Iterator[Frame]:
    for kind, at in _png_chunks(data):
        if kind == b"fcTL":
            seconds, of = struct.unpack_from(">2H", data, at + 20)
            yield Frame(1000 * seconds / (of or 100))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields the type of each chunk and the place where its data begin."""
    at = 8
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at + 8
        at += 12 + size
