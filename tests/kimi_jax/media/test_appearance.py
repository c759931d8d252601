"""Pictures as a viewer shows them; expected pictures follow from EXIF's and PNG's definitions."""

import io
import struct
import zlib

import numpy as np
import pytest
from media_cases import PUBLISHED, data_url, encode, noise
from PIL import Image

from kimi_jax.media import image_patches, open_image, open_video

# EXIF 2.3, 4.6.4: the sides on which row 0 and column 0 of the stored picture are seen
SEEN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}
WHITE = [255, 255, 255]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Returns a PNG with these samples, and `chunks` before the first of them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_orientation(kind: str, orientation: int):
    options = {"lossless": True} if kind == "WEBP" else {}
    stored = Image.fromarray(noise(6, 4))
    plain = np.asarray(Image.open(io.BytesIO(encode(stored, kind, **options))).convert("RGB"))
    seen = open_image(encode(stored, kind, exif=exif(orientation), **options))
    np.testing.assert_array_equal(np.asarray(seen), SEEN[orientation](plain))
    np.testing.assert_array_equal(np.asarray(open_image(seen)), np.asarray(seen))  # and the result is not turned again


def test_a_pil_image_is_turned_as_its_file_is():
    data = encode(Image.fromarray(noise(60, 28)), "PNG", exif=exif(6))
    patches, grid = image_patches(Image.open(io.BytesIO(data)), PUBLISHED)
    assert grid == (1, 6, 2)
    np.testing.assert_array_equal(patches, image_patches(open_image(data), PUBLISHED)[0])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_frames_are_turned(kind: str):
    stored = [Image.fromarray(noise(6, 4, seed)) for seed in range(2)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(stored[0], kind, save_all=True, append_images=stored[1:], duration=500, exif=exif(8), **options)
    frames, _ = open_video(data)
    assert frames.size == (4, 6)
    for seed, frame in enumerate(frames):
        np.testing.assert_array_equal(np.asarray(frame), SEEN[8](noise(6, 4, seed)))


@pytest.mark.parametrize("tags", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\x01" * 99])
def test_damaged_exif_turns_nothing(tags: bytes):
    np.testing.assert_array_equal(np.asarray(open_image(encode(Image.fromarray(noise(6, 4)), exif=tags))), noise(6, 4))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_keep_their_high_byte(mode: str):
    values = np.linspace(0, 65535, 56 * 56).reshape(56, 56)
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (56, 56), values.astype(kind).tobytes())
    grey = np.repeat((values.astype(int) >> 8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(np.asarray(open_image(image)), grey)
    if mode == "I;16":
        np.testing.assert_array_equal(np.asarray(open_image(data_url(image))), grey)


def test_samples_of_no_known_range_are_refused():
    with pytest.raises(ValueError, match="the picture: floating-point samples, whose range is not known"):
        open_image(Image.new("F", (4, 4), 0.5))
    with pytest.raises(ValueError, match="samples from 70000 to 70000, expected 16 bits"):
        open_image(Image.new("I", (4, 4), 70000))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "La", "RGBa"])
def test_alpha_is_composited_on_white(mode: str):
    # Given black of alpha 0, 128 and 255: white, a mean and black
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 128, 255)
    image = Image.fromarray(pixels)
    if mode in ("LA", "La"):
        image = image.convert("LA").convert(mode)
    elif mode == "PA":
        alpha, image = image.getchannel("A"), image.convert("RGB").convert("P")
        image.putalpha(alpha)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    assert np.asarray(open_image(image))[0].tolist() == [WHITE, [127] * 3, [0] * 3]


@pytest.mark.parametrize("palette", ["one colour", "alphas"])
def test_palettes_with_transparency(palette: str):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF") if palette == "one colour" else ("PNG",):
        data = encode(image, kind, transparency=0 if palette == "one colour" else b"\0\x80")
        blue = [0, 0, 255] if palette == "one colour" else [127, 127, 255]
        assert np.asarray(open_image(data))[0].tolist() == [WHITE, blue]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent", "seen"),
    [
        (1, 0, b"\x40", b"\0\1", [[0] * 3, WHITE]),
        (2, 0, b"\x10", b"\0\1", [[0] * 3, WHITE]),
        (4, 0, b"\x25", b"\0\5", [[34] * 3, WHITE]),
        (8, 0, b"\x20\x07", b"\0\7", [[32] * 3, WHITE]),
        (16, 0, b"\x20\x00\x20\x01", b"\x20\x01", [[32] * 3, WHITE]),
        (8, 2, b"\1\2\3\4\5\6", b"\0\4\0\5\0\6", [[1, 2, 3], WHITE]),
        (16, 2, b"\1\0\2\0\3\0\4\7\5\7\6\7", b"\4\7\5\7\6\7", [[1, 2, 3], WHITE]),
    ],
)
def test_a_transparent_colour_at_every_depth(depth: int, colour: int, row: bytes, transparent: bytes, seen: list):
    data = png(2, 1, depth, colour, b"\0" + row, (b"tRNS", transparent))
    assert np.asarray(open_image(data))[0].tolist() == seen


def test_other_colour_spaces_become_rgb():
    for mode, value in (
        ("CMYK", (0, 255, 255, 0)),
        ("YCbCr", (76, 85, 255)),
        ("HSV", (0, 255, 255)),
    ):
        assert np.abs(np.asarray(open_image(Image.new(mode, (1, 1), value))).astype(int) - (255, 0, 0)).max() < 3, mode
