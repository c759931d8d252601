"""preprocessor_config.json: every key is read, harmless, or refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_cases import PUBLISHED, config, noise
from PIL import Image

from kimi_jax.media import MediaConfig, image_patches


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
    for text, message in (
        ("{", "not JSON"),
        ("[]", "expected a JSON object, found a list"),
        ("{}", "media_proc_cfg is None, expected an object"),
    ):
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": True}, "patch_size is True, expected a positive whole number up to 256"),
        ({"patch_size": 10**9}, "patch_size is 1000000000"),
        ({"merge_kernel_size": 10**7}, "merge_kernel_size is 10000000, expected a positive whole number up to 16"),
        ({"in_patch_limit": 10**400}, "in_patch_limit is 1000"),
        ({"sample_fps": float("nan")}, "sample_fps is nan"),
        ({"sample_fps": float("inf")}, "sample_fps is inf"),
        ({"image_mean": [True, 0, 0]}, "image_mean is .*, expected three numbers from 0 to 1"),
        ({"image_mean": [10**400, 0, 0]}, "image_mean is"),
        ({"image_std": [float("nan")] * 3}, "image_std is"),
        ({"image_std": [1e-320] * 3}, "image_std is .*, expected three numbers from 0.001 to 1000"),
        ({"resample": 3}, "resample is not known, and could change patches"),
    ],
)
def test_numbers_without_sense_and_unknown_keys_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"media_proc_cfg.{message}"):
        MediaConfig.from_dict(config(**changes))


def test_unknown_keys_beside_are_named_and_names_of_classes_are_not():
    MediaConfig.from_dict(PUBLISHED | {"auto_map": {"AutoProcessor": "a.B"}, "processor_class": "B"})
    with pytest.warns(UserWarning, match="preprocessor_config: not read: do_resize, image_mean"):
        MediaConfig.from_dict(PUBLISHED | {"image_mean": [0, 0, 0], "do_resize": False})


def test_a_limit_that_limits_nothing_is_taken():
    limit = MediaConfig.from_dict(config(in_patch_limit=10**30, patch_limit_on_one_side=10**30))
    assert image_patches(Image.new("RGB", (30, 20)), limit)[1] == (1, 2, 4)
