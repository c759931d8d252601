"""The grid arithmetic of the vision tower: against torch's bicubic filter and MoonViT's rules in float64."""

import cases
import jax
import numpy as np
import pytest

import kimi_jax
from kimi_jax.config import VisionConfig
from kimi_jax.model.vision_layout import lay_out_patches, padded_size


def vision(height=64, width=64, *, hidden=48, heads=2):
    return VisionConfig(
        patch_size=14,
        vt_hidden_size=hidden,
        vt_num_hidden_layers=1,
        vt_num_attention_heads=heads,
        vt_intermediate_size=64,
        init_pos_emb_height=height,
        init_pos_emb_width=width,
        init_pos_emb_time=4,
        merge_kernel_size=(2, 2),
        mm_hidden_size=hidden,
        text_hidden_size=32,
    )


def grids(*items):
    return np.array(items, np.int32)


def dense_taps(where, patches, cells):
    """Returns the layout's taps as one matrix, patch by cell of the flattened table."""
    matrix = np.zeros((patches, cells))
    for patch in range(patches):
        np.add.at(matrix[patch], where.taps_index[patch], where.taps_weight[patch].astype(np.float64))
    return matrix


def cubic(x, a=-0.75):
    """Computes Keys' cubic convolution kernel (1981)."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resampling(size, out):
    """Returns the matrix [out, size] of bicubic resizing: src = (dst + 0.5) * size / out - 0.5, four taps, clamped."""
    matrix = np.zeros((out, size))
    for dst in range(out):
        src = (dst + 0.5) * size / out - 0.5
        for tap in range(int(np.floor(src)) - 1, int(np.floor(src)) + 3):
            matrix[dst, min(max(tap, 0), size - 1)] += cubic(src - tap)
    return matrix


@pytest.mark.parametrize(("h", "w"), [(6, 10), (2, 64), (90, 4), (100, 2)])
def test_bicubic_weights_are_those_of_the_rule(h, w):
    taps = dense_taps(lay_out_patches(grids((1, h, w)), vision()), h * w, 64 * 64)
    np.testing.assert_allclose(taps, np.kron(resampling(64, h), resampling(64, w)), rtol=0, atol=1e-7)
    np.testing.assert_allclose(taps.sum(1), 1, atol=1e-6)


# torch 2.13, F.interpolate(table, size, mode="bicubic", align_corners=False, antialias=False) in float64
# fmt: off
TORCH = {
    (6, 2): [
        [1.229695638, -1.0201416016], [-0.0450439453, -1.7633056641], [-0.3716001157, -1.2201244213],
        [1.9119646991, 1.6823640046], [0.3770751953, 1.0172119141], [-2.0712754991, -0.8995632595],
    ],
    (2, 8): [
        [-1.8644657135, -0.7394809723, 0.2224807739, -0.6365127563, -2.3227710724, -3.1437129974, 0.3593349457,
         3.6565589905],
        [2.9573001862, 1.3904209137, -0.3106155396, -0.0107040405, 0.6175098419, 0.9434566498, 0.9810581207,
         0.9004478455],
    ],
}
# fmt: on


@pytest.mark.parametrize("shape", TORCH)
def test_bicubic_equals_torch(shape):
    i, j = np.mgrid[:4, :5]
    table = (3 * i * i + 5 * j + i * j) % 7 - 3
    taps = dense_taps(lay_out_patches(grids((1, *shape)), vision(4, 5)), shape[0] * shape[1], 20)
    np.testing.assert_allclose((taps @ table.reshape(-1)).reshape(shape), TORCH[shape], rtol=0, atol=2e-6)


def test_a_grid_of_the_table_s_size_takes_it_as_it_is():
    taps = dense_taps(lay_out_patches(grids((1, 8, 6)), vision(8, 6)), 48, 48)
    np.testing.assert_array_equal(taps, np.eye(48))


def test_time_is_added_to_videos_only():
    where = lay_out_patches(grids((1, 2, 4), (3, 2, 2)), vision())
    assert not where.time[:8].any()
    # Given ω_k = 10000^(-k/24), frame p has [sin(pω) | cos(pω)]
    expected = [
        [np.sin(p * 10000 ** (-k / 24)) for k in range(24)] + [np.cos(p * 10000 ** (-k / 24)) for k in range(24)]
        for p in range(3)
    ]
    np.testing.assert_allclose(where.time[8:20], np.repeat(expected, 4, axis=0), rtol=0, atol=1e-7)
    assert not where.time[20:].any()


def test_rope_turns_by_the_column_first_and_by_the_same_in_every_frame():
    config = vision(hidden=144, heads=2)  # heads of 72, as published
    where = lay_out_patches(grids((2, 4, 6)), config)
    assert where.angles.shape == (64, 36)
    for patch in range(48):
        row, column = divmod(patch % 24, 6)
        for i in range(18):
            freq = 10000.0 ** (-4 * i / 72)
            np.testing.assert_allclose(where.angles[patch, 2 * i : 2 * i + 2], [column * freq, row * freq], rtol=1e-6)


def test_merge_order_and_mean_over_frames():
    t, h, w = 3, 4, 6
    where = lay_out_patches(grids((t, h, w)), vision())
    x = np.random.RandomState(0).standard_normal((t * h * w, 5))
    merged = np.einsum("mcfd,mcf->mcd", x[where.merge_index[:6]], where.merge_weight[:6].astype(np.float64))
    image = x.reshape(t, h, w, 5)
    for row in range(h // 2):
        for column in range(w // 2):
            for kh in range(2):
                for kw in range(2):
                    expected = image[:, 2 * row + kh, 2 * column + kw].mean(axis=0)
                    np.testing.assert_allclose(merged[row * 3 + column, 2 * kh + kw], expected, atol=1e-6)


def test_packed_items_are_the_items_one_after_another():
    config, items = vision(8, 8), [(1, 4, 6), (3, 2, 4), (1, 8, 8)]
    packed = lay_out_patches(grids(*items), config)
    first_patch = first_token = 0
    for number, (t, h, w) in enumerate(items):
        single = lay_out_patches(grids((t, h, w)), config)
        n, m = t * h * w, h * w // 4
        for name in ("taps_index", "taps_weight", "time", "angles"):
            part = getattr(packed, name)[first_patch : first_patch + n]
            np.testing.assert_array_equal(part, getattr(single, name)[:n], err_msg=name)
        assert set(packed.segment[first_patch : first_patch + n]) == {number}
        tokens = slice(first_token, first_token + m)
        np.testing.assert_array_equal(packed.merge_weight[tokens], single.merge_weight[:m])
        seen = single.merge_weight[:m] > 0  # frames that an item does not have carry no weight
        np.testing.assert_array_equal(packed.merge_index[tokens][seen], single.merge_index[:m][seen] + first_patch)
        first_patch, first_token = first_patch + n, first_token + m
    # The rest is padding: no item's segment, no weight
    assert len(packed.segment) == padded_size(first_patch) > first_patch
    assert set(packed.segment[first_patch:]) == {-1}
    assert len(packed.merge_weight) * 4 == len(packed.segment)
    assert not packed.merge_weight[first_token:].any() and not packed.taps_weight[first_patch:].any()


def test_padded_sizes_are_four_per_octave_and_never_smaller():
    sizes = [padded_size(n) for n in range(1, 16385)]
    assert all(size >= n and size % 64 == 0 for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    for low in (256, 512, 1024, 4096, 8192):
        octave = sorted(set(sizes[low : 2 * low]))  # of low + 1 to 2 * low patches
        assert octave == [low * 5 // 4, low * 6 // 4, low * 7 // 4, low * 2]
    assert sorted(set(sizes[:256])) == [64, 128, 192, 256]


def test_items_encoded_together_equal_items_encoded_alone(model):
    kimi, items = model("k2.5"), grids((1, 4, 6), (3, 2, 4), (1, 2, 2))
    patches = [cases.media(grid) for grid in items]
    packed = np.asarray(kimi.encode_media(kimi_jax.Media(np.concatenate(patches), items)))
    single = [
        np.asarray(kimi.encode_media(kimi_jax.Media(part, grid[None])))
        for part, grid in zip(patches, items, strict=True)
    ]
    assert [len(part) for part in single] == [6, 2, 1]
    np.testing.assert_allclose(packed, np.concatenate(single), rtol=0, atol=1e-5)
    assert np.abs(packed).mean() > 0.01


def test_no_weight_is_copied_to_encode_media(model):
    # A call that hands the model's state back makes every weight anew: of K2.5, more than a device has room for
    kimi, grid = model("k2.5"), grids((1, 2, 2))
    before = jax.tree.leaves(kimi)
    kimi.encode_media(kimi_jax.Media(cases.media(grid[0]), grid))
    assert all(after is weight for after, weight in zip(jax.tree.leaves(kimi), before, strict=True))
