"""Patches and grids against transformers' processors, a float64 derivation of the bicubic filter, and the rules."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kimi_jax import media
from kimi_jax.media import MediaConfig, expand, image_patches, navit_resize, open_image, open_video, video_patches

PUBLISHED: dict[str, Any] = {
    "media_proc_cfg": {
        "in_patch_limit": 16384,
        "patch_size": 14,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_kernel_size": 2,
        "fixed_output_tokens": None,
        "patch_limit_on_one_side": 512,
        "in_patch_limit_each_frame": 4096,
        "in_patch_limit_video": None,
        "sample_fps": 2.0,
        "max_num_frames_each_video": None,
        "temporal_merge_kernel_size": 4,
        "timestamp_mode": "hh:mm:ss.fff",
    }
}
GOLDEN = np.load(Path(__file__).parent / "golden" / "media.npz")
ULP = 2.4e-7  # two steps of float32 just below 2: what dividing and scaling may round


def config(**changes: Any) -> dict[str, Any]:
    return {"media_proc_cfg": PUBLISHED["media_proc_cfg"] | changes}


def normalised(levels: np.ndarray) -> np.ndarray:
    return (levels.astype(np.float64) / 255 - 0.5) / 0.5


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- against transformers ---------------------------------------------------------------------------------------------


def test_image_equals_transformers_where_nothing_is_scaled():
    patches, grid = image_patches(Image.fromarray(GOLDEN["plain_pixels"]), PUBLISHED)
    assert grid == tuple(GOLDEN["plain_grid"]) == (1, 4, 4)
    assert patches.dtype == np.float32 and patches.shape == (16, 3, 14, 14)
    np.testing.assert_allclose(patches, normalised(GOLDEN["plain_patches"]), rtol=0, atol=ULP)


def test_scaled_image_is_transformers_but_for_its_other_bicubic_filter():
    patches, grid = image_patches(Image.fromarray(GOLDEN["scaled_pixels"]), config(in_patch_limit=12))
    assert grid == tuple(GOLDEN["scaled_grid"])
    steps = np.abs(patches - normalised(GOLDEN["scaled_patches"])) * 255 / 2
    assert steps.max() < 1.01 and (steps > 0.5).mean() < 0.02


def test_video_equals_transformers():
    chunks = video_patches(list(GOLDEN["video_pixels"]), 2.0, PUBLISHED)
    assert [chunk.grid for chunk in chunks] == [tuple(grid) for grid in GOLDEN["video_grids"]] == [(4, 4, 4), (1, 4, 4)]
    patches = np.concatenate([chunk.patches for chunk in chunks])
    np.testing.assert_allclose(patches, normalised(GOLDEN["video_patches"]), rtol=0, atol=ULP)


# --- against a derivation ---------------------------------------------------------------------------------------------


def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Keys' cubic kernel with a = -1/2, widened by the factor when shrinking, cut at the border and normalised."""
    scale = size_in / size_out
    centres = (np.arange(size_out)[:, None] + 0.5) * scale
    x = np.abs(np.arange(size_in) + 0.5 - centres) / max(scale, 1.0)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def levels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(values + 0.5), 0, 255)


@pytest.mark.parametrize(("width", "height", "limit"), [(150, 61, 16), (40, 200, 9), (97, 97, 20)])
def test_scaling_padding_and_patches_in_float64(width: int, height: int, limit: int):
    pixels = noise(width, height)
    size = navit_resize(width, height, limit, PUBLISHED)
    assert size.width < width and size.height < height
    wide = levels(np.einsum("ow,hwc->hoc", bicubic_matrix(width, size.width), pixels.astype(np.float64)))
    both = levels(np.einsum("oh,hwc->owc", bicubic_matrix(height, size.height), wide))
    grid_h, grid_w = (size.height + size.pad_height) // 14, (size.width + size.pad_width) // 14
    expected = np.zeros((grid_h * grid_w, 3, 14, 14))
    for row, column in np.ndindex(grid_h, grid_w):
        tile = both[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        expected[row * grid_w + column, :, : tile.shape[0], : tile.shape[1]] = tile.transpose(2, 0, 1)
    patches, grid = image_patches(Image.fromarray(pixels), config(in_patch_limit=limit))
    assert grid == (1, grid_h, grid_w)
    steps = np.abs(patches - normalised(expected)) * 255 / 2
    # PIL's weights have 22 bits: a value may round to the other side of a half
    assert steps.max() < 1.01 and (steps > 0.01).mean() < 0.002


def test_mean_and_std_are_per_channel_and_padding_is_black():
    means, stds = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    patches, grid = image_patches(Image.new("RGB", (20, 30), (255, 51, 0)), config(image_mean=means, image_std=stds))
    assert grid == (1, 4, 2)
    inside = [(1 - 0.1) / 0.5, (0.2 - 0.2) / 0.25, (0 - 0.3) / 2]
    np.testing.assert_allclose(patches[0], np.broadcast_to(np.array(inside)[:, None, None], (3, 14, 14)), atol=ULP)
    black = [-0.1 / 0.5, -0.2 / 0.25, -0.3 / 2]
    right = np.broadcast_to(np.array(black)[:, None, None], (3, 14, 8))
    np.testing.assert_allclose(patches[1][:, :, 6:], right, atol=ULP)
    np.testing.assert_allclose(patches[-1][:, 0, 0], black, atol=ULP)


@pytest.mark.parametrize(
    ("size", "expected", "tokens"),
    [
        ((1, 1), (1, 1, 27, 27), 1),
        ((28, 28), (28, 28, 0, 0), 1),
        ((29, 28), (29, 28, 27, 0), 2),
        ((1792, 1792), (1792, 1792, 0, 0), 4096),
        ((3584, 1792), (2534, 1267, 14, 21), 4186),  # half the patches: a scale of sqrt(1/2)
        ((20000, 10), (7168, 3, 0, 25), 256),  # one side's limit, 512 patches
        ((10, 20000), (3, 7168, 25, 0), 256),
    ],
)
def test_navit_resize(size: tuple[int, int], expected: tuple[int, ...], tokens: int):
    found = navit_resize(*size, 16384, PUBLISHED)
    assert (found.width, found.height, found.pad_width, found.pad_height) == expected
    assert (found.width + found.pad_width) * (found.height + found.pad_height) == tokens * 28 * 28


@given(width=st.integers(1, 30000), height=st.integers(1, 30000), limit=st.sampled_from([4096, 16384]))
def test_navit_resize_keeps_its_limits(width: int, height: int, limit: int):
    found = navit_resize(width, height, limit, PUBLISHED)
    assert 1 <= found.width <= min(width, 7168) and 1 <= found.height <= min(height, 7168)
    assert 0 <= found.pad_width < 28 and (found.width + found.pad_width) % 28 == 0
    assert 0 <= found.pad_height < 28 and (found.height + found.pad_height) % 28 == 0
    # no more than the limit beyond what whole pixels and the padded border can add
    columns, rows = (found.width + found.pad_width) // 14, (found.height + found.pad_height) // 14
    shortest = 14 * min(columns, rows) < 56
    assert shortest or (columns - 3) * (rows - 3) <= limit


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_other_modes_become_rgb(mode: str):
    image = Image.fromarray(noise(30, 20)).convert(mode)
    np.testing.assert_array_equal(image_patches(image, PUBLISHED)[0], image_patches(image.convert("RGB"), PUBLISHED)[0])


def test_transparency_is_dropped_as_published():
    image = Image.new("RGBA", (14, 14), (255, 255, 255, 0))
    assert image_patches(image, PUBLISHED)[0][0].min() == 1.0


# --- video ------------------------------------------------------------------------------------------------------------


def first_levels(chunk: media.VideoChunk) -> list[int]:
    """The red level of each frame's first pixel."""
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
        (3, 1.0, [0, 1, 2], ["00.000"]),  # never more frames than there are
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
    alone = [image_patches(frame, config(in_patch_limit=8))[0] for frame in frames]
    np.testing.assert_array_equal(chunk.patches, np.concatenate(alone))


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


# --- expand -----------------------------------------------------------------------------------------------------------


def test_expand():
    pad = 163605
    assert expand([1, pad, 2, pad, 3], [(1, 4, 6), (4, 2, 2)]) == [1, *[pad] * 6, 2, pad, 3]
    assert expand(np.array([533, 9]), np.array([[3, 2, 4]]), placeholder_id=533) == [533, 533, 9]
    assert expand([5], []) == [5]


@pytest.mark.parametrize("grids", [[], [(1, 2, 2)] * 3])
def test_expand_needs_a_placeholder_for_each_grid(grids: list[tuple[int, int, int]]):
    with pytest.raises(ValueError, match=rf"2 media placeholders \(id 163605\) in the tokens for {len(grids)} grids"):
        expand([163605, 163605], grids)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_config_from_folder_is_the_published_one(real_tokenizer_dir: Path):
    assert MediaConfig.from_folder(real_tokenizer_dir) == MediaConfig.from_dict(PUBLISHED)


def test_config_from_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config.json"):
        MediaConfig.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config(sample_fps=4)))
    assert MediaConfig.from_folder(tmp_path).sample_fps == 4
    image = Image.fromarray(noise(20, 20))
    np.testing.assert_array_equal(
        image_patches(image, MediaConfig.from_folder(tmp_path))[0], image_patches(image, PUBLISHED)[0]
    )
    for text, message in (("{", "not JSON"), ("[]", "media_proc_cfg is None, expected an object")):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"preprocessor_config.json: {message}"):
            MediaConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fixed_output_tokens": 64}, "fixed_output_tokens is 64; only None is supported"),
        ({"in_patch_limit_video": 9}, "in_patch_limit_video is 9; only None"),
        ({"max_num_frames_each_video": 8}, "max_num_frames_each_video is 8; only None"),
        ({"timestamp_mode": "mm:ss"}, "timestamp_mode is 'mm:ss'; only 'hh:mm:ss.fff'"),
        ({"patch_size": None}, "patch_size is None, expected a positive whole number"),
        ({"merge_kernel_size": [2, 2]}, r"merge_kernel_size is \[2, 2\]"),
        ({"in_patch_limit": 0}, "in_patch_limit is 0"),
        ({"in_patch_limit": 9.5}, "in_patch_limit is 9.5"),
        ({"sample_fps": "2"}, "sample_fps is '2', expected a positive number"),
        ({"image_std": [0.5, 0.5]}, "image_std is"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is"),
        ({"image_mean": 0.5}, "image_mean is 0.5"),
    ],
)
def test_unsupported_config_is_refused_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"media_proc_cfg.{message}"):
        image_patches(Image.new("RGB", (28, 28)), config(**changes))


# --- files ------------------------------------------------------------------------------------------------------------


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def test_open_image(tmp_path: Path):
    image = Image.fromarray(noise(5, 4))
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), image, data_url(image)):
        np.testing.assert_array_equal(np.asarray(open_image(source)), noise(5, 4))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("https://example.org/a.png", ValueError, "https://example.org/a.png: not fetched; download it"),
        ("no/such.png", FileNotFoundError, "no/such.png: no such file"),
        ("data:image/png,abc", ValueError, "data:image/png URL: cannot be read: it is not base64"),
        ("data:image/png;base64,a*b", ValueError, "data:image/png;base64 URL: cannot be read"),
        ("data:image/png;base64,AAAA", ValueError, "data:image/png;base64 URL: not an image that can be read"),
    ],
)
def test_no_image(source: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        open_image(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_text_and_truncated_files_are_no_images(tmp_path: Path, kind: str):
    file = tmp_path / "a.png"
    file.write_text("I am no image")
    with pytest.raises(ValueError, match=r"a.png: not an image that can be read$"):
        open_image(file)
    Image.fromarray(noise(64, 64)).save(file, kind)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"a.png: a damaged image"):
        open_image(file)


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
        open_video(tmp_path, fps=3.0)


def test_no_video_file(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(99))
    with pytest.raises(ValueError, match=r"a.mp4: not an image that can be read; no video decoder comes with kimi-jax"):
        open_video(tmp_path / "a.mp4")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png: a still PNG and no animation; no video decoder"):
        open_video(tmp_path / "a.png")
    pictures = [Image.new("L", (4, 4), i) for i in (0, 255)]
    with pytest.raises(ValueError, match="gif;base64 URL: holds no durations, so its fps must be given"):
        open_video(data_url(pictures[0], "GIF", save_all=True, append_images=pictures[1:], duration=0))
