"""The frames of a video that are sampled, their times, and how much of an animation is decoded."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_cases import GOLDEN, PUBLISHED, ULP, config, data_url, encode, noise, normalised
from PIL import Image

from kimi_jax import media
from kimi_jax.media import image_patches, open_video, video_patches


def test_video_equals_transformers():
    chunks = video_patches(list(GOLDEN["video_pixels"]), 2.0, PUBLISHED)
    assert [chunk.grid for chunk in chunks] == [tuple(grid) for grid in GOLDEN["video_grids"]] == [(4, 4, 4), (1, 4, 4)]
    patches = np.concatenate([chunk.patches for chunk in chunks])
    np.testing.assert_allclose(patches, normalised(GOLDEN["video_patches"]), rtol=0, atol=ULP)


def first_levels(chunk: media.VideoChunk) -> list[int]:
    """Returns the red level of each frame's first pixel."""
    t, h, w = chunk.grid
    return [round((float(chunk.patches[i * h * w, 0, 0, 0]) + 1) * 127.5) for i in range(t)]


@pytest.mark.parametrize(
    ("count", "fps", "frames", "times"),
    [
        # 10 s at 10 fps -> 20 frames, evenly from the first to the last; 6.3 % 1 * 1000 is 299.99..., and cut
        (
            100,
            10.0,
            np.linspace(0, 99, 20).round().astype(int).tolist(),
            ["00.000", "02.100", "04.200", "06.299", "08.300"],
        ),
        (3, 1.0, [0, 1, 2], ["00.000"]),  # never more samples than frames
        (9, 2.0, list(range(9)), ["00.000", "02.000", "04.000"]),
        (1, 30.0, [0], ["00.000"]),
        (5, 30.0, [0], ["00.000"]),
        (6, 8.0, [0, 5], ["00.000"]),  # 1.5 frames are 2
        (10, 8.0, [0, 9], ["00.000"]),  # and 2.5 are 2: Python rounds halves to even
    ],
)
def test_video_sampling(count: int, fps: float, frames: list[int], times: list[str]):
    pictures = [Image.new("RGB", (28, 28), (i, 0, 0)) for i in range(count)]
    chunks = video_patches(pictures, fps, PUBLISHED)
    assert [level for chunk in chunks for level in first_levels(chunk)] == frames
    assert [chunk.grid[0] for chunk in chunks] == [min(4, len(frames) - i) for i in range(0, len(frames), 4)]
    assert [chunk.timestamp for chunk in chunks] == [f"00:00:{seconds}" for seconds in times]


def test_video_timestamps_reach_hours_and_cut_milliseconds():
    pictures = [Image.new("RGB", (28, 28))] * 9
    stamps = [chunk.timestamp for chunk in video_patches(pictures, 3 / 4000, PUBLISHED)]
    assert stamps == ["00:00:00.000", "01:28:53.333", "02:57:46.666"]


def test_video_frames_have_their_own_limit():
    frames = [Image.fromarray(noise(90, 60, seed)) for seed in range(2)]
    chunk = video_patches(frames, 2.0, config(in_patch_limit_each_frame=8))[0]
    assert chunk.grid == (2, 4, 4)
    stills = [image_patches(frame, config(in_patch_limit=8))[0] for frame in frames]
    np.testing.assert_array_equal(chunk.patches, np.concatenate(stills))


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        ([], 2.0, "0 frames at 2.0"),
        ([Image.new("RGB", (2, 2))], 0.0, "1 frames at 0.0"),
        ([Image.new("RGB", (2, 2))], math.nan, "at nan"),
        ([Image.new("RGB", (2, 2)), Image.new("RGB", (2, 3))], 2.0, r"frame 1 is \(2, 3\) pixels, the first \(2, 2\)"),
    ],
)
def test_no_video(frames: list[Image.Image], fps: float, message: str):
    with pytest.raises(ValueError, match=message):
        video_patches(frames, fps, PUBLISHED)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations(tmp_path: Path, kind: str):
    colours = [(255, 0, 0), (0, 0, 255), (255, 255, 255)]
    pictures = [Image.new("RGB", (8, 6), colour) for colour in colours]
    options = {"save_all": True, "append_images": pictures[1:], "duration": [100, 200, 300]}
    pictures[0].save(tmp_path / "a", kind, **options | ({"lossless": True} if kind == "WEBP" else {}))
    frames, fps = open_video(tmp_path / "a")
    assert [frame.getpixel((3, 3)) for frame in frames] == colours and {frame.mode for frame in frames} == {"RGB"}
    assert fps == pytest.approx(3 / 0.6)
    assert open_video(str(tmp_path / "a"), fps=7.0)[1] == 7.0


def test_folder_and_list_of_frames(tmp_path: Path):
    for i in (2, 0, 1):
        Image.new("L", (4, 4), i).save(tmp_path / f"frame{i}.png")
    (tmp_path / ".hidden").write_text("x")
    frames, fps = open_video(tmp_path, fps=3.0)
    assert [frame.getpixel((0, 0)) for frame in frames] == [(i, i, i) for i in range(3)] and fps == 3.0
    listed, _ = open_video([tmp_path / "frame1.png", Image.new("L", (4, 4), 9)], fps=3.0)
    assert [frame.getpixel((0, 0)) for frame in listed] == [(1, 1, 1), (9, 9, 9)]
    with pytest.raises(ValueError, match="3 pictures as a video with fps None: expected at least one, and its fps"):
        open_video(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes.txt: not an image"):
        list(open_video(tmp_path, fps=3.0)[0])


def test_no_video_file(tmp_path: Path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x20ftypheic" + bytes(99))
    with pytest.raises(ValueError, match=r"a.heic: not an image .*found HEIC, .*\); a video is an MP4 or another film"):
        open_video(tmp_path / "a.heic")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png: a still PNG and no animation; a video is an MP4"):
        open_video(tmp_path / "a.png")
    pictures = [Image.new("L", (4, 4), i) for i in (0, 255)]
    with pytest.raises(ValueError, match="gif;base64 URL: holds no durations, so its fps must be given"):
        open_video(data_url(pictures[0], "GIF", save_all=True, append_images=pictures[1:], duration=0))


# --- animations are sampled by time, and decoded no further than that -------------------------------------------------


def moving(kind: str, durations: list[int], size: tuple[int, int] = (28, 28)) -> bytes:
    """Returns an animation of flat frames whose red levels are 0, 20, 40 ..."""
    frames = [Image.new("RGB", size, (20 * i, 0, 0)) for i in range(len(durations))]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=durations, **options)


def sampled(source: object, fps: float | None = None, **changes: Any) -> tuple[list[int], list[str]]:
    chunks = video_patches(*open_video(source, fps), config(**changes))
    return [level // 20 for chunk in chunks for level in first_levels(chunk)], [chunk.timestamp for chunk in chunks]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_that_last_differently_are_sampled_by_time(kind: str):
    # Given a frame of three seconds and five of 200 ms: 4 s, sampled six times (never more often than it has frames)
    # from 0 to the last frame's start at 3.8 s, every 760 ms, of which the first frame is on the screen at the first
    # four
    data = moving(kind, [3000, 200, 200, 200, 200, 200])
    assert sampled(data) == ([0, 0, 0, 0, 1, 5], ["00:00:00.000", "00:00:03.040"])
    # but by index where a rate is given
    assert sampled(data, fps=2.0) == ([0, 1, 2, 3, 4, 5], ["00:00:00.000", "00:00:02.000"])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize(("count", "duration"), [(6, 120), (9, 100), (7, 500), (2, 10)])
def test_frames_of_one_duration_are_sampled_as_a_list_at_their_rate(kind: str, count: int, duration: int):
    frames = [Image.new("RGB", (28, 28), (20 * i, 0, 0)) for i in range(count)]
    of_file = video_patches(*open_video(moving(kind, [duration] * count)), PUBLISHED)
    of_list = video_patches(frames, count * 1000 / (count * duration), PUBLISHED)
    assert [(chunk.grid, chunk.timestamp) for chunk in of_file] == [(chunk.grid, chunk.timestamp) for chunk in of_list]
    for one, other in zip(of_file, of_list, strict=True):
        np.testing.assert_array_equal(one.patches, other.patches)


def test_a_frame_of_no_duration_is_never_seen():
    assert sampled(moving("PNG", [500, 0, 500, 500, 500]))[0] == [0, 2, 3, 4]


def test_a_png_whose_own_picture_is_no_frame():
    frames = [Image.new("RGB", (28, 28), (20 * i, 0, 0)) for i in range(3)]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True, duration=500)
    assert sampled(data) == ([1, 2], ["00:00:00.000"])


def test_transparent_frames_are_white():
    frames = [Image.new("RGBA", (28, 28), (20, 0, 0, alpha)) for alpha in (255, 0)]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=500, blend=0)
    assert [frame.getpixel((0, 0)) for frame in open_video(data)[0]] == [(20, 0, 0), (255, 255, 255)]


def test_only_sampled_frames_are_decoded_from_files_of_their_own(tmp_path: Path):
    for i in range(8):
        Image.new("RGB", (28, 28), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    for unread in (1, 2, 5):
        (tmp_path / f"{unread}.png").write_text("no picture")
    assert sampled(tmp_path, fps=7.0, sample_fps=2.0)[0] == [0, 7]


def test_times_beyond_the_calendar_are_refused():
    with pytest.raises(ValueError, match="last more than 1,000,000,000 seconds"):
        video_patches([Image.new("RGB", (28, 28))], 1e-300, PUBLISHED)
