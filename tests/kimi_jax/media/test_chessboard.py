"""Transparent pictures of Kimi K3, which are put on a chessboard once they are scaled."""

import io
from typing import Any

import numpy as np
import pytest
from media_cases import config, encode, noise
from PIL import Image

from checkpoints.toy import toy_config
from checkpoints.toy.configs import preprocessor
from kimi_jax.media import MediaConfig, navit_resize, scale_image
from kimi_jax.media.conversation import read_all

K3 = MediaConfig.from_dict(preprocessor(toy_config("k3")))
BOARD = preprocessor(toy_config("k3"))["media_proc_cfg"]["transparent_bg_config"]


def transparent(width: int, height: int) -> Image.Image:
    alpha = np.random.default_rng(1).integers(0, 256, (height, width, 1), dtype=np.uint8)
    alpha[:5], alpha[5:9] = 0, 255
    return Image.fromarray(np.concatenate([noise(width, height), alpha], axis=2))


def put_on_board(levels: np.ndarray) -> np.ndarray:
    """Puts uint8 [h, w, 4] on the published chessboard, pixel by pixel."""
    out = np.zeros((*levels.shape[:2], 3), np.uint8)
    for y, x in np.ndindex(levels.shape[:2]):
        ground = 180.0 if (y // 8 + x // 8) % 2 else 255.0
        alpha = np.float32(levels[y, x, 3]) / np.float32(255)
        for c in range(3):
            out[y, x, c] = int(alpha * np.float32(levels[y, x, c]) + (1 - alpha) * np.float32(ground))
    return out


def test_a_picture_that_is_not_scaled_is_put_on_the_board_and_padded_with_black() -> None:
    picture = transparent(40, 30)
    found = scale_image(picture, K3)
    assert found.shape == (56, 56, 3) and not found[30:].any() and not found[:, 40:].any()
    np.testing.assert_array_equal(found[:30, :40], put_on_board(np.asarray(picture)))
    assert found[0, 0].tolist() == [255] * 3 and found[0, 8].tolist() == [180] * 3


def test_a_picture_is_scaled_in_its_own_mode_before() -> None:
    small = MediaConfig.from_dict(config(in_patch_limit=12, transparent_bg_config=BOARD))
    for picture in (transparent(97, 61), transparent(97, 61).convert("LA"), transparent(97, 61).quantize(20)):
        found = scale_image(picture, small)
        size = navit_resize(97, 61, 12, small)
        scaled = picture.resize((size.width, size.height), Image.Resampling.BICUBIC).convert("RGBA")
        steps = np.abs(found[: size.height, : size.width].astype(int) - put_on_board(np.asarray(scaled)))
        assert steps.max() <= 3  # Pillow's weighting by alpha rounds once more where passes change places


def test_other_pictures_are_those_of_other_models() -> None:
    plain = MediaConfig.from_dict(config(in_patch_limit=12))
    small = MediaConfig.from_dict(config(in_patch_limit=12, transparent_bg_config=BOARD))
    picture = Image.fromarray(noise(97, 61))
    for same in (picture, picture.convert("L"), np.asarray(picture)):
        np.testing.assert_array_equal(scale_image(same, small), scale_image(same, plain))
    palette = picture.quantize(16)
    palette.info["transparency"] = 3
    assert (scale_image(palette, small) == 180).all(axis=-1).any()


def test_a_conversation_keeps_transparency_and_tells_sizes() -> None:
    picture = transparent(40, 30)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    found = read_all([("image", picture), ("image", encode(turned, exif=exif))], K3)
    assert found.sizes == [(40, 30), (40, 30)] and found.grids == [(1, 4, 4)] * 2
    np.testing.assert_array_equal(found.patches[:16], found.patches[16:])
    again = Image.open(io.BytesIO(encode(picture)))
    np.testing.assert_array_equal(scale_image(again, K3), scale_image(picture, K3))


def test_a_picture_has_at_most_65536_patches() -> None:
    found = scale_image(Image.new("RGB", (7000, 3600)), K3)
    rows, columns = found.shape[0] // 14, found.shape[1] // 14
    assert 65536 < 500 * 257 and rows * columns <= 65536 + 2 * (rows + columns) and rows * columns > 64000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transparent_bg_config": "white"}, "transparent_bg_config is 'white', expected an object"),
        ({"transparent_bg_config": BOARD | {"pattern": "stripes"}}, "pattern is 'stripes'; only 'chessboard'"),
        ({"transparent_bg_config": BOARD | {"tilt": 1}}, "transparent_bg_config.tilt is not known"),
        ({"transparent_bg_config": BOARD | {"chessboard_square_size": 0}}, "size is 0, expected a whole number from 1"),
        ({"transparent_bg_config": BOARD | {"chessboard_gray_value": 256}}, "gray_value is 256, expected a whole"),
        ({"transparent_bg_config": BOARD | {"chessboard_square_on_top_left": 1}}, "top_left is 1, expected true or"),
        ({"transparent_bg_fill_stage": "before_resize"}, "fill_stage is 'before_resize'; only 'after_resize'"),
    ],
)
def test_another_background_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"preprocessor_config: media_proc_cfg.*{message}"):
        MediaConfig.from_dict(config(**changes))
