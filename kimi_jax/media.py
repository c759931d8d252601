"""Images and video to the patches and grids that MoonViT reads, as Kimi K2.5's own processor makes them.

The sizes follow `navit_resize` and the values of `media_proc_cfg` in `preprocessor_config.json`: scale down (never
up) to the patch limits with PIL's bicubic filter on 8-bit RGB, pad right and bottom with black to whole 2 x 2 blocks
of patches, normalise, cut into patches in the order (frame, row, column). Padding comes before normalising, so it is
-1 and not 0.
"""

import base64
import binascii
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from einops import rearrange
from PIL import Image, ImageSequence

Grid = tuple[int, int, int]

# fields whose other values the published processor takes, but no published checkpoint has
_FIXED = {
    "fixed_output_tokens": None,
    "in_patch_limit_video": None,
    "max_num_frames_each_video": None,
    "timestamp_mode": "hh:mm:ss.fff",
}
_NO_DECODER = "; no video decoder comes with kimi-jax; give a GIF, an animated WebP or PNG, or a folder of frames"


def _positive(found: Mapping[str, Any], field: str, kind: Any, name: str) -> Any:
    value = found.get(field)
    if not isinstance(value, kind) or value <= 0:
        expected = "a positive whole number" if kind is int else "a positive number"
        raise ValueError(f"{name}: media_proc_cfg.{field} is {value!r}, expected {expected}")
    return value


def _channels(found: Mapping[str, Any], field: str, name: str) -> tuple[float, float, float]:
    value = found.get(field)
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
        raise ValueError(f"{name}: media_proc_cfg.{field} is {value!r}, expected three numbers")
    return float(value[0]), float(value[1]), float(value[2])


@dataclass(frozen=True)
class MediaConfig:
    """The fields of `media_proc_cfg`. Limits are in patches; mean and std are per RGB channel on the scale 0..1."""

    patch_size: int
    merge_kernel_size: int
    in_patch_limit: int
    in_patch_limit_each_frame: int
    patch_limit_on_one_side: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    sample_fps: float
    temporal_merge_kernel_size: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, name: str = "preprocessor_config") -> "MediaConfig":
        """From the contents of `preprocessor_config.json`; ValueError names a field that is missing or unsupported."""
        found = config.get("media_proc_cfg")
        if not isinstance(found, Mapping):
            raise ValueError(f"{name}: media_proc_cfg is {found!r:.60}, expected an object")
        for fixed, only in _FIXED.items():
            if found.get(fixed, only) != only:
                raise ValueError(f"{name}: media_proc_cfg.{fixed} is {found[fixed]!r}; only {only!r} is supported")
        whole = {entry.name: _positive(found, entry.name, int, name) for entry in fields(cls) if entry.type is int}
        mean, std = (_channels(found, field, name) for field in ("image_mean", "image_std"))
        if min(std) <= 0:
            raise ValueError(f"{name}: media_proc_cfg.image_std is {std}, expected positive numbers")
        sample_fps = float(_positive(found, "sample_fps", (int, float), name))
        return cls(**whole, image_mean=mean, image_std=std, sample_fps=sample_fps)

    @classmethod
    def from_folder(cls, path: str | Path) -> "MediaConfig":
        """Read `preprocessor_config.json` in the folder `path`; FileNotFoundError or ValueError naming it."""
        file = Path(path) / "preprocessor_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; images and video need it")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from error
        return cls.from_dict(config if isinstance(config, dict) else {}, name=str(file))


Config = MediaConfig | Mapping[str, Any]


def _config(config: Config) -> MediaConfig:
    return config if isinstance(config, MediaConfig) else MediaConfig.from_dict(config)


@dataclass(frozen=True)
class Resize:
    """Size in pixels of the scaled picture, and what is added to the right and at the bottom."""

    width: int
    height: int
    pad_width: int
    pad_height: int


@dataclass(frozen=True)
class VideoChunk:
    """Up to four sampled frames, which are one media item.

    patches: float32 [t*h*w, 3, patch, patch]; grid: (t, h, w) in patches; timestamp: `HH:MM:SS.mmm` of the first frame.
    """

    patches: np.ndarray
    grid: Grid
    timestamp: str


def navit_resize(width: int, height: int, patch_limit: int, config: Config) -> Resize:
    """The size to which a picture of `width` x `height` pixels goes under a limit of `patch_limit` patches."""
    config = _config(config)
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} pixels has nothing in it")
    patch, side = config.patch_size, config.patch_limit_on_one_side * config.patch_size
    area = math.sqrt(patch_limit / (max(1, width // patch) * max(1, height // patch)))
    scale = min(1.0, area, side / width, side / height)
    new_width, new_height = (min(max(1, int(size * scale)), side) for size in (width, height))
    block = patch * config.merge_kernel_size
    return Resize(new_width, new_height, -new_width % block, -new_height % block)


def _scaled(picture: Image.Image, size: Resize) -> np.ndarray:
    # Pillow rounds to 8 bits between its two passes, width first until version 13, which may begin with the height;
    # asking for one pass at a time gives the same bytes on all of them
    wide = picture.convert("RGB").resize((size.width, picture.height), Image.Resampling.BICUBIC)
    return np.asarray(wide.resize((size.width, size.height), Image.Resampling.BICUBIC))


def _patches(pictures: Sequence[Image.Image], size: Resize, config: MediaConfig) -> tuple[np.ndarray, Grid]:
    scaled = [_scaled(picture, size) for picture in pictures]
    black = ((0, 0), (0, size.pad_height), (0, size.pad_width), (0, 0))
    mean, std = np.array(config.image_mean, np.float32), np.array(config.image_std, np.float32)
    pixels: np.ndarray = (np.pad(np.stack(scaled), black).astype(np.float32) / np.float32(255) - mean) / std
    patch = config.patch_size
    grid = (len(pictures), pixels.shape[1] // patch, pixels.shape[2] // patch)
    patches = rearrange(pixels, "t (h p) (w q) c -> (t h w) c p q", p=patch, q=patch)
    return np.ascontiguousarray(patches), grid


def image_patches(image: Image.Image, config: Config) -> tuple[np.ndarray, Grid]:
    """Patches float32 [h*w, 3, patch, patch] of a PIL image of any mode, and its grid (1, h, w).

    config: a MediaConfig, or the contents of `preprocessor_config.json`.
    """
    config = _config(config)
    return _patches([image], navit_resize(*image.size, config.in_patch_limit, config), config)


def _timestamp(seconds: float) -> str:
    # through datetime, as published: it rounds to microseconds, the milliseconds are cut off
    return f"{datetime.fromtimestamp(seconds, tz=UTC):%H:%M:%S}.{int(seconds % 1 * 1000):03d}"


def video_patches(frames: Sequence[Image.Image | np.ndarray], fps: float, config: Config) -> list[VideoChunk]:
    """Sample `frames` (PIL images, or uint8 [height, width, 3]) at `sample_fps` at most, four to a chunk.
    fps: frames per second of `frames`. All frames must have one size, and are scaled to the limit for each frame.
    """
    config = _config(config)
    if not len(frames) or not 0 < fps < math.inf:
        raise ValueError(f"{len(frames)} frames at {fps} frames per second are no video")
    pictures = [frame if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in frames]
    for index, picture in enumerate(pictures):
        if picture.size != pictures[0].size:
            raise ValueError(f"frame {index} is {picture.size} pixels, the first {pictures[0].size}; expected one size")
    count = max(round(len(pictures) * min(config.sample_fps, fps) / fps), 1)
    sampled = np.linspace(0, len(pictures) - 1, count).round().astype(int).tolist()
    size = navit_resize(*pictures[0].size, config.in_patch_limit_each_frame, config)
    chunks = []
    for start in range(0, count, config.temporal_merge_kernel_size):
        indices = sampled[start : start + config.temporal_merge_kernel_size]
        patches, grid = _patches([pictures[i] for i in indices], size, config)
        chunks.append(VideoChunk(patches, grid, _timestamp(indices[0] / fps)))
    return chunks


def expand(
    ids: Iterable[SupportsIndex],
    grids: Iterable[Iterable[SupportsIndex]],
    *,
    placeholder_id: int = 163605,
    merge_kernel_size: int = 2,
) -> list[int]:
    """`ids` with the one placeholder of each media item repeated as often as the item has embeddings.

    grids: (t, h, w) of each item in the order of the placeholders; frames are pooled, so an item has h*w/4 embeddings.
    placeholder_id: `media_placeholder_token_id` of config.json, here that of all published models.
    ValueError where there are not as many placeholders as grids.
    """
    tokens = [int(i) for i in ids]
    sizes = [[int(n) // merge_kernel_size for n in grid][1:] for grid in grids]
    places = tokens.count(placeholder_id)
    if places != len(sizes):
        raise ValueError(f"{places} media placeholders (id {placeholder_id}) in the tokens for {len(sizes)} grids")
    counts = iter([h * w for h, w in sizes])
    expanded: list[int] = []
    for token in tokens:
        expanded += [token] * (next(counts) if token == placeholder_id else 1)
    return expanded


def _open(source: str | Path, hint: str = "") -> tuple[Image.Image, str]:
    """The picture that a path or a data URL holds, not decoded yet, and what to call it in an error."""
    text = str(source)
    if text.startswith(("http://", "https://")):
        raise ValueError(f"{text}: not fetched; download it and give its path or a data: URL")
    name, file = text, io.BytesIO()
    if text.startswith("data:"):
        header, comma, body = text.partition(",")
        name = f"{header[:60]} URL"
        try:
            if not comma or not header.endswith(";base64"):
                raise ValueError("it is not base64")
            file = io.BytesIO(base64.b64decode(body, validate=True))
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{name}: cannot be read: {error}") from error
    elif not Path(text).is_file():
        raise FileNotFoundError(f"{text}: no such file")
    else:
        file = io.BytesIO(Path(text).read_bytes())
    try:
        return Image.open(file), name
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not an image that can be read{hint}") from error


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name}: a damaged image: {error}") from error
    return image


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """A path, a `data:` URL (base64) or a PIL image as a decoded PIL image; the first frame of an animation.

    FileNotFoundError or ValueError names the source; http URLs are refused, since nothing here fetches.
    """
    if isinstance(source, Image.Image):
        return source
    return _decoded(*_open(source))


def open_video(
    source: str | Path | Sequence[str | Path | Image.Image], fps: float | None = None
) -> tuple[list[Image.Image], float]:
    """Frames (RGB) and frames per second of an animated GIF, WebP or PNG (path or data URL), or of pictures in a folder
    (in the order of their names) or a list.

    An animation knows its durations, from which the mean rate comes; pictures need `fps`, which wins where it is given.
    Anything else is refused: kimi-jax brings no video decoder.
    """
    if isinstance(source, str | Path) and not (not str(source).startswith("data:") and Path(source).is_dir()):
        return _animation(source, fps)
    if isinstance(source, str | Path):
        pictures: list[Any] = sorted(path for path in Path(source).iterdir() if not path.name.startswith("."))
    else:
        pictures = list(source)
    if not pictures or fps is None:
        raise ValueError(f"{len(pictures)} pictures as a video with fps {fps}: expected at least one, and its fps")
    return [open_image(picture).convert("RGB") for picture in pictures], fps


def _animation(source: str | Path, fps: float | None) -> tuple[list[Image.Image], float]:
    image, name = _open(source, hint=_NO_DECODER)
    if getattr(image, "n_frames", 1) < 2:
        raise ValueError(f"{name}: a still {image.format} and no animation{_NO_DECODER}")
    frames, milliseconds = [], 0.0
    for frame in ImageSequence.Iterator(image):
        frames.append(_decoded(frame, name).convert("RGB"))
        milliseconds += frame.info.get("duration", 0)
    if fps is None and not milliseconds:
        raise ValueError(f"{name}: holds no durations, so its fps must be given")
    return frames, fps if fps is not None else len(frames) * 1000 / milliseconds
