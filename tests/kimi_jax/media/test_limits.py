"""Files of a few kilobytes that ask for gigabytes are refused by their headers, or read within a bound of memory."""

import struct
import subprocess
import sys
import zlib

import pytest
from media_cases import PUBLISHED, config

from kimi_jax.media import open_image, open_video, sample_video, video_patches


def gif(width: int, height: int, frames: int, extent: tuple[int, int] = (1, 1)) -> bytes:
    """Returns a GIF of frames of 100 ms, each of which draws one pixel; the last one says that it draws `extent`."""
    start = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"

    def frame(size: tuple[int, int]) -> bytes:
        return b"!\xf9\x04\x04\x0a\0\0\0," + struct.pack("<4HB", 0, 0, *size, 0) + b"\x02\x02\x44\x01\0"

    return start + frame((1, 1)) * (frames - 1) + frame(extent) + b";"


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (1, 60_000_000, "1 x 60,000,000 pixels, expected 1 to 65,535 on a side and at most 89,478,485"),
        (65_536, 1, "65,536 x 1 pixels"),
        (9_460, 9_460, "expected .*at most 89,478,485"),
        (2**31 - 1, 2**31 - 1, "expected at most 89,478,485 pixels"),
    ],
)
def test_stills_are_refused_from_their_headers(width: int, height: int, message: str):
    with pytest.raises(ValueError, match=f"the bytes given: {message}"):
        open_image(png_header(width, height))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gif(4000, 4000, 2000), "2,000 frames of 4,000 x 4,000 pixels, expected at most 33,554,432 pixels in a frame"),
        (gif(6000, 6000, 2), "2 frames of 6,000 x 6,000"),
        (gif(8, 8, 3, extent=(6000, 6000)), "3 frames of 6,000 x 6,000"),  # a frame may be larger than the screen
        (gif(1, 1, 10_001), "more than 10,000 frames"),
    ],
)
def test_animations_are_refused_before_a_frame_is_decoded(data: bytes, message: str):
    with pytest.raises(ValueError, match=f"the bytes given: {message}"):
        open_video(data)


def test_sampled_frames_are_counted_before_one_is_decoded():
    # Given 1,500 frames in 150 s, of which 300 are sampled, 64 x 64 patches each
    video = open_video(gif(900, 900, 1500))
    with pytest.raises(ValueError, match=r"the bytes given: 300 frames sampled at 2 per second come to 1,"):
        video_patches(*video, PUBLISHED)
    with pytest.raises(ValueError, match="2 frames sampled at 2 per second come to 8 patches, expected at most 7"):
        sample_video(*open_video(gif(28, 28, 10)), PUBLISHED, max_patches=7)
    assert len(video_patches(*open_video(gif(28, 28, 10)), config(sample_fps=4.0))) == 1


def test_more_bytes_than_are_read_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr("kimi_jax.media.sources.MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(bytes(101))
    for source in (bytes(101), tmp_path / "a.png", "data:;base64," + "A" * 136, "data:;base64," + "A" * 201):
        with pytest.raises(ValueError, match="more than 100 bytes"):
            open_image(source)


def test_a_small_file_of_large_frames_takes_little_memory():
    # 100 frames of 1,500 x 1,500 are 675 MB of RGB; 20 are sampled, in 64 x 64 patches 49 MB of 8 bits
    script = (
        "import resource, sys; from kimi_jax import media\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"media.sample_video(*media.open_video(sys.stdin.buffer.read()), {PUBLISHED!r})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], input=gif(1500, 1500, 100), capture_output=True, check=True)
    assert int(done.stdout) < 200_000  # kilobytes: the samples, and some copies of a frame
