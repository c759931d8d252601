"""Films, written here by PyAV: their frames, times, turns and colours, against frames decoded one after another."""

import dataclasses
import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from media_cases import PUBLISHED
from PIL import Image

from kimi_jax.media import film, open_video, sample_video
from kimi_jax.media.config import as_config

av = pytest.importorskip("av", reason="needs kimi-jax[video]")

CONFIG = as_config(PUBLISHED)  # two frames a second
WIDTH, HEIGHT = 64, 32


def written(stamps, pixels, kind="mp4", codec="mpeg4", **options):
    """Returns the bytes of a film with frames at `stamps`, thousandths of a second."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        container.metadata.update({"title": options.pop("title")} if "title" in options else {})
        stream = container.add_stream(codec, rate=1000)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, options.pop("pix_fmt", "yuv420p")
        stream.bit_rate = 4_000_000
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        for stamp, one in zip(stamps, pixels, strict=True):
            frame = one if isinstance(one, av.VideoFrame) else av.VideoFrame.from_ndarray(one, format="rgb24")
            frame.pts = stamp
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def greys(count):
    """Returns frames, each lighter than the one before."""
    return [np.full((HEIGHT, WIDTH, 3), 20 + 8 * i, np.uint8) for i in range(count)]


def decoded(data):
    """Returns all frames, as FFmpeg decodes them one after another."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_frames_that_follow_evenly_are_sampled_by_number():
    data = written(range(0, 3000, 125), greys(24), max_b_frames=2)  # eight a second, stored out of order
    frames, fps = open_video(data)
    assert isinstance(frames, film.Film) and frames.starts is None
    assert fps == pytest.approx(8) and len(frames) == 24 and frames.size == (WIDTH, HEIGHT)
    expected = decoded(data)
    for index in (0, 1, 7, 23, 4):  # the last goes backwards
        assert np.array_equal(np.asarray(frames[index]), expected[index])
    sampled = sample_video(frames, fps, CONFIG)
    numbers = np.linspace(0, 23, 6).round()
    assert sampled.times == pytest.approx((numbers / fps).tolist())
    for one, number in zip(sampled.frames, numbers.astype(int), strict=True):
        level = np.median(expected[number])
        assert np.median(one[:HEIGHT, :WIDTH]) == pytest.approx(level, abs=1)


def test_frames_at_odd_times_are_sampled_by_time():
    stamps = [0, 100, 200, 1500, 1600, 3000]
    frames, fps = open_video(written(stamps, greys(6)))
    assert frames.starts == pytest.approx([stamp / 1000 for stamp in stamps]) and fps == pytest.approx(5 / 3)
    sampled = sample_video(frames, fps, dataclasses.replace(CONFIG, sample_fps=1.0))
    assert sampled.times == pytest.approx([0.0, 1.0, 2.0, 3.0])
    shown = [np.median(np.asarray(frames[index])) for index in (0, 2, 4, 5)]  # those on the screen at these times
    assert [np.median(one[:HEIGHT, :WIDTH]) for one in sampled.frames] == pytest.approx(shown, abs=1)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_film_is_turned_as_it_says(turn):
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[: HEIGHT // 2, : WIDTH // 2] = 255  # the upper left
    data = bytearray(written([0, 100, 200], [pixels] * 3))
    # The track's matrix: a, b, c, d of a turn clockwise by `turn` (ISO 14496-12, tkhd)
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[turn]
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    frames, _ = open_video(bytes(data))
    expected = Image.fromarray(decoded(bytes(data))[1]).rotate(-turn, expand=True)
    assert frames.size == expected.size == ((HEIGHT, WIDTH) if turn != 180 else (WIDTH, HEIGHT))
    assert np.array_equal(np.asarray(frames[1]), np.asarray(expected))


@pytest.mark.parametrize(("matrix", "red", "blue"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114)], ids=["709", "601"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_colours_are_those_of_the_streams_matrix_and_range(matrix, red, blue, full):
    y, cb, cr = 120, 90, 180
    frame = av.VideoFrame(WIDTH, HEIGHT, "yuv444p")
    for plane, level in zip(frame.planes, (y, cb, cr), strict=True):
        plane.update(bytes([level]) * plane.buffer_size)
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    options = {"pix_fmt": "yuv444p", "colorspace": matrix, "color_range": 2 if full else 1}
    frames, _ = open_video(written([0, 100], [frame, frame], "matroska", "ffv1", **options))
    luma, chroma = (y / 255, 255) if full else ((y - 16) / 219, 224)
    b, r = (cb - 128) / chroma, (cr - 128) / chroma
    value = np.array([luma + 2 * (1 - red) * r, 0, luma + 2 * (1 - blue) * b])
    value[1] = (luma - red * value[0] - blue * value[2]) / (1 - red - blue)
    assert np.abs(np.asarray(frames[0], float)[8, 8] - 255 * value).max() <= 2


def test_a_film_that_is_damaged_or_too_large_is_named(monkeypatch, tmp_path: Path):
    data = written(range(0, 1000, 100), greys(10))
    file = tmp_path / "a.mp4"
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.mp4: a film without video that can be decoded"):
        list(open_video(file)[0])
    monkeypatch.setattr(film, "MAX_FILM_FRAMES", 9)
    with pytest.raises(ValueError, match=r"the bytes given: 10 frames of 64 x 32 pixels, expected at most 9 frames"):
        open_video(data)


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi"])
def test_damage_anywhere_is_a_value_error_or_none(kind):
    data = written(range(0, 500, 100), greys(5), kind)
    random = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(data[: random.integers(16, len(data) + 1)])
        for at in random.integers(16, len(damaged) + 1, 8) - 1:
            damaged[at] = random.integers(256)
        try:
            frames, _ = open_video(bytes(damaged))
            list(frames)
        except ValueError as error:
            assert str(error).startswith("the bytes given: ") and "\n" not in str(error)


def test_a_title_in_another_encoding_is_no_damage():
    data = written(range(0, 500, 100), greys(5), "matroska", title="Caf\u00e9")
    assert data.count("Caf\u00e9".encode()) == 1
    frames, _ = open_video(data.replace("Caf\u00e9".encode(), b"Caf\xe9!"))
    assert len(frames) == 5


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        ValueError, match=r"the bytes given: a film, .*: pip install 'kimi-jax\[video\]', or give a GIF"
    ):
        open_video(b"\0\0\0\x20ftypisom" + bytes(99))


@pytest.mark.parametrize("data", [b"#EXTM3U\nfile.ts", b"ffconcat version 1.0\nfile a.mp4", b"GIF89a", b""])
def test_what_is_no_film_is_not_given_to_ffmpeg(data):
    assert film.demuxer(data) is None
