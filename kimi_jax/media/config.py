"""Reads the numbers in `preprocessor_config.json`: every key is read, known to change nothing, or refused."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kimi_jax import json_reader
from kimi_jax.printable import printable

# fields and the only value of each that published checkpoints have, though the published processor takes others
_FIXED = {
    "fixed_output_tokens": None,
    "in_patch_limit_video": None,
    "max_num_frames_each_video": None,
    "timestamp_mode": "hh:mm:ss.fff",
    "transparent_bg_fill_stage": "after_resize",
}
# keys beside media_proc_cfg that name Python classes
_HARMLESS = {"_comment", "auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}
_LARGEST = {"patch_size": 256, "merge_kernel_size": 16, "temporal_merge_kernel_size": 1024, "sample_fps": 1000}
_NO_LIMIT = 10**30  # a patch limit that large limits nothing, and still fits a float
_BOARD = "transparent_bg_config"
_STD = (1e-3, 1e3)  # divided by less or more, a step of one level (1/255) leaves the range that a network is trained on


def _shown(value: Any) -> str:
    return printable(repr(value), 60)


def _positive(found: Mapping[str, Any], field: str, kind: Any, name: str) -> Any:
    value, largest = found.get(field), _LARGEST.get(field, _NO_LIMIT)
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= largest:
        expected = "a positive whole number" if kind is int else "a positive number"
        up_to = f" up to {largest}" if field in _LARGEST else ""
        raise ValueError(f"{name}: media_proc_cfg.{field} is {_shown(value)}, expected {expected}{up_to}")
    return value


def _channels(found: Mapping[str, Any], field: str, least: float, most: float, name: str) -> tuple[float, float, float]:
    value = found.get(field)
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(isinstance(v, int | float) and not isinstance(v, bool) and least <= v <= most for v in value)
    ):
        raise ValueError(
            f"{name}: media_proc_cfg.{field} is {_shown(value)}, expected three numbers from {least:g} to {most:g}"
        )
    return float(value[0]), float(value[1]), float(value[2])


@dataclass(frozen=True)
class Chessboard:
    """The fields of `transparent_bg_config`: the background of transparent pictures, in squares of pixels and levels.

    The first square is white where it is `chessboard_square_on_top_left`, and else gray.
    """

    chessboard_square_size: int
    chessboard_square_on_top_left: bool
    chessboard_white_value: int
    chessboard_gray_value: int


def _chessboard(values: Any, name: str) -> Chessboard | None:
    """Reads `transparent_bg_config`. Raises ValueError naming a field that is missing, unknown or makes no sense."""
    if values is None:
        return None
    where = f"{name}: media_proc_cfg.{_BOARD}"
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {_shown(values)}, expected an object")
    if values.get("pattern") != "chessboard":
        raise ValueError(f"{where}.pattern is {_shown(values.get('pattern'))}; only 'chessboard' is supported")
    expected = {entry.name: entry.type for entry in fields(Chessboard)}
    if unknown := sorted(set(values) - set(expected) - {"pattern"}):
        raise ValueError(f"{where}.{printable(unknown[0], 60)} is not known, and could change patches")
    for field, kind in expected.items():
        value, least, most = values.get(field), int(field.endswith("_size")), 255
        whole = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        if not (isinstance(value, bool) if kind is bool else whole):
            meant = "true or false" if kind is bool else f"a whole number from {least} to {most}"
            raise ValueError(f"{where}.{field} is {_shown(value)}, expected {meant}")
    return Chessboard(**{field: values[field] for field in expected})


@dataclass(frozen=True)
class MediaConfig:
    """The fields of `media_proc_cfg`. Limits are in patches; mean and std are per RGB channel on the scale 0..1.

    Transparent pictures are put on `transparent_bg_config` once they are scaled; on white before that where it is None.
    """

    patch_size: int
    merge_kernel_size: int
    in_patch_limit: int
    in_patch_limit_each_frame: int
    patch_limit_on_one_side: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    sample_fps: float
    temporal_merge_kernel_size: int
    transparent_bg_config: Chessboard | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, name: str = "preprocessor_config") -> "MediaConfig":
        """Reads the contents of `preprocessor_config.json`, which `name` stands for in errors.

        Raises ValueError naming a field of `media_proc_cfg` that is missing, not supported or not known; warns of
        unknown keys beside `media_proc_cfg`.
        """
        found = config.get("media_proc_cfg")
        if not isinstance(found, Mapping):
            raise ValueError(f"{name}: media_proc_cfg is {_shown(found)}, expected an object")
        read = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(found) - read - set(_FIXED)):
            raise ValueError(
                f"{name}: media_proc_cfg.{printable(unknown[0], 60)} is not known, and could change patches"
            )
        for fixed, only in _FIXED.items():
            if found.get(fixed, only) != only:
                raise ValueError(
                    f"{name}: media_proc_cfg.{fixed} is {_shown(found[fixed])}; only {only!r} is supported"
                )
        if unread := sorted(set(config) - _HARMLESS - {"media_proc_cfg"}):
            warnings.warn(f"{name}: not read: {printable(', '.join(unread))}", stacklevel=2)
        whole = {entry.name: _positive(found, entry.name, int, name) for entry in fields(cls) if entry.type is int}
        mean, std = _channels(found, "image_mean", 0.0, 1.0, name), _channels(found, "image_std", *_STD, name)
        sample_fps = float(_positive(found, "sample_fps", (int, float), name))
        board = _chessboard(found.get(_BOARD), name)
        return cls(**whole, image_mean=mean, image_std=std, sample_fps=sample_fps, transparent_bg_config=board)

    @classmethod
    def from_folder(cls, path: str | Path) -> "MediaConfig":
        """Reads `preprocessor_config.json` in the folder `path`. Raises FileNotFoundError or ValueError naming it."""
        file = Path(path) / "preprocessor_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{printable(file)}: no such file; images and video need it")
        return cls.from_dict(json_reader.read_object(file), name=printable(file))


Config = MediaConfig | Mapping[str, Any]


def as_config(config: Config) -> MediaConfig:
    """Returns `config` itself, or reads it where it is the contents of a `preprocessor_config.json`."""
    return config if isinstance(config, MediaConfig) else MediaConfig.from_dict(config)
