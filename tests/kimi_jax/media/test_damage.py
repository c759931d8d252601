"""Damaged pictures of every format give one line of ours, whatever Pillow raises."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_cases import PUBLISHED, encode, noise
from PIL import Image

from kimi_jax.media import image_patches, open_image, open_video, video_patches

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FRAMES = [Image.fromarray(noise(24, 20, seed)) for seed in range(3)]
TAGS = Image.Exif()
TAGS[0x0112] = 6
WHOLE = [encode(FRAMES[0], kind, **({} if kind in ("GIF", "BMP") else {"exif": TAGS})) for kind in KINDS]
WHOLE += [encode(FRAMES[0].convert("P"), "PNG", transparency=3), encode(Image.new("I;16", (9, 9), 700), "PNG")]
WHOLE += [
    encode(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:], duration=[100, 300, 200])
    for kind in ("GIF", "WEBP", "PNG")
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draws a small file with bytes replaced (most of them near its start), cut, and with a piece doubled."""
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, min(len(data) - 1, draw(st.sampled_from([40, 200, 10**6])))))
        piece = draw(
            st.sampled_from([b"\0\0\0\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0"])
            | st.binary(min_size=1, max_size=2)
        )
        data[at : at + len(piece)] = piece
    if draw(st.booleans()):
        del data[draw(st.integers(1, len(data))) :]
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data)))
        data[at:at] = data[at : at + draw(st.integers(0, 64))]
    return bytes(data)


def survives(data: bytes) -> None:
    for read in (
        lambda: image_patches(open_image(data), PUBLISHED),
        lambda: video_patches(*open_video(data), PUBLISHED),
    ):
        try:
            read()
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 500


@given(damaged())
@settings(max_examples=150, deadline=None)
def test_damage_is_said_in_a_line(data: bytes):
    survives(data)


@pytest.mark.slow
@given(damaged() | st.binary(max_size=400))
@settings(max_examples=20_000, deadline=None)
def test_much_damage_is_said_in_a_line(data: bytes):
    survives(data)


@pytest.mark.parametrize("failure", [SyntaxError, EOFError, MemoryError, ZeroDivisionError, AssertionError, IndexError])
@pytest.mark.parametrize("call", ["open", "Image.load"])
def test_whatever_pillow_raises_names_the_file(monkeypatch: pytest.MonkeyPatch, failure: type[Exception], call: str):
    def fail(*args: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr(f"PIL.Image.{call}", fail)
    source = FRAMES[0] if call == "Image.load" else WHOLE[0]
    with pytest.raises(ValueError, match=r"(the bytes given|the picture): (a damaged image: |no memory to decode it)"):
        open_image(source)
