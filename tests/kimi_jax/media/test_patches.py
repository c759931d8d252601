"""Patches and grids against transformers' processors, a float64 derivation of the bicubic filter, and the rules."""

import numpy as np
import pytest
from einops import rearrange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_cases import GOLDEN, PUBLISHED, ULP, config, noise, normalised
from PIL import Image

from kimi_jax.media import expand, image_patches, navit_resize, patches


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


def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Returns Keys' cubic kernel with a = -1/2, widened by the factor when shrinking, cut at the border and
    normalised."""
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
    # PIL's weights have 22 bits, so a value near a half may round to the other side
    assert steps.max() < 1.01 and (steps > 0.01).mean() < 0.002


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(*[st.integers(1, 90)] * 4),
    bands=st.integers(2, 4),
    mean=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    std=st.lists(st.floats(0.1, 2), min_size=3, max_size=3),
)
def test_bands_and_strips_give_the_bits_of_whole_passes_and_of_a_table(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], bands: int, mean: list[float], std: list[float]
):
    for name, value in {"_LARGE": 0, "_MOST_BANDS": bands}.items():
        monkeypatch.setattr(patches, name, value)
    monkeypatch.setattr(patches.os, "cpu_count", lambda: 8)
    width, height, new_width, new_height = sizes
    picture = Image.fromarray(noise(width, height))
    size = patches.Resize(new_width, new_height, -new_width % 28, -new_height % 28)
    wide = picture.resize((new_width, height), Image.Resampling.BICUBIC)
    whole = np.zeros((*size.padded[::-1], 3), np.uint8)
    whole[:new_height, :new_width] = np.asarray(wide.resize((new_width, new_height), Image.Resampling.BICUBIC))
    scaled = patches.scale(picture, size)
    np.testing.assert_array_equal(scaled, whole)
    channels = np.array(mean, np.float32), np.array(std, np.float32)
    table = (np.arange(256, dtype=np.float32)[:, None] / np.float32(255) - channels[0]) / channels[1]
    expected = rearrange(table[whole, np.arange(3)], "(h p) (w q) c -> (h w) c p q", p=14, q=14)
    media_config = patches.as_config(config(image_mean=mean, image_std=std))
    np.testing.assert_array_equal(patches.normalize([scaled], media_config), expected)


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
    # at most the limit and what whole pixels and the padded border can add
    columns, rows = (found.width + found.pad_width) // 14, (found.height + found.pad_height) // 14
    shortest = 14 * min(columns, rows) < 56
    assert shortest or (columns - 3) * (rows - 3) <= limit


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_other_modes_become_rgb(mode: str):
    image = Image.fromarray(noise(30, 20)).convert(mode)
    np.testing.assert_array_equal(image_patches(image, PUBLISHED)[0], image_patches(image.convert("RGB"), PUBLISHED)[0])


def test_expand():
    pad = 163605
    assert expand([1, pad, 2, pad, 3], [(1, 4, 6), (4, 2, 2)]) == [1, *[pad] * 6, 2, pad, 3]
    assert expand(np.array([533, 9]), np.array([[3, 2, 4]]), placeholder_id=533) == [533, 533, 9]
    assert expand([5], []) == [5]


@pytest.mark.parametrize("grids", [[], [(1, 2, 2)] * 3])
def test_expand_needs_a_placeholder_for_each_grid(grids: list[tuple[int, int, int]]):
    with pytest.raises(ValueError, match=rf"2 media placeholders \(id 163605\) in the tokens for {len(grids)} grids"):
        expand([163605, 163605], grids)
