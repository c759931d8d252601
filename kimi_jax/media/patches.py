"""Scales, pads and normalises pictures and cuts them into patches, by the rules of the releases' own processors.

The sizes follow `navit_resize` and the values of `media_proc_cfg` in `preprocessor_config.json`: scale down (never
up) to the patch limits with PIL's bicubic filter on 8-bit RGB (Kimi K3: on the picture's own mode, before transparent
ones are put on a chessboard), pad right and bottom with black to whole 2 x 2 blocks
of patches, normalise, cut into patches in the order (frame, row, column). Padding comes before normalising, so it is
-1 and not 0.
"""

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from einops import rearrange
from PIL import Image

from kimi_jax.media.appearance import as_seen, on_chessboard
from kimi_jax.media.config import Config, MediaConfig, as_config
from kimi_jax.media.opening import as_image

Grid = tuple[int, int, int]
_LARGE, _MOST_BANDS = 1_000_000, 4  # pixels from which threads pay, and how many of them
_WEIGHTED = {"RGBA": "RGBa", "LA": "La"}  # modes with alpha -> those whose colours are multiplied by it


@dataclass(frozen=True)
class Resize:
    """Size in pixels of the scaled picture, and of the padding to the right and at the bottom."""

    width: int
    height: int
    pad_width: int
    pad_height: int

    @property
    def padded(self) -> tuple[int, int]:
        """Returns width and height with the padding."""
        return self.width + self.pad_width, self.height + self.pad_height


def navit_resize(width: int, height: int, patch_limit: int, config: Config) -> Resize:
    """Returns the size to which a picture of `width` x `height` pixels is scaled for at most `patch_limit` patches."""
    config = as_config(config)
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} pixels has nothing in it")
    patch, side = config.patch_size, config.patch_limit_on_one_side * config.patch_size
    area = math.sqrt(patch_limit / (max(1, width // patch) * max(1, height // patch)))
    scale = min(1.0, area, side / width, side / height)
    new_width, new_height = (min(max(1, int(size * scale)), side) for size in (width, height))
    block = patch * config.merge_kernel_size
    return Resize(new_width, new_height, -new_width % block, -new_height % block)


def _resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scales a picture along its width, then along its height.

    Pillow rounds to 8 bits between its two passes, width first until version 13, which may begin with the height: one
    pass at a time gives the same bytes in all versions.
    """
    for size in ((width, picture.height), (width, height)):
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return picture


def scale(picture: Image.Image, size: Resize) -> np.ndarray:
    """Scales and pads an RGB picture; returns uint8 [height, width, 3].

    Pixels across the direction of a pass do not depend on each other: bands of a large picture are scaled side by side,
    each in a thread, first along the width and then along the height.
    """
    pixels = np.zeros((*size.padded[::-1], 3), np.uint8)
    bands = min(os.cpu_count() or 1, _MOST_BANDS)
    if bands == 1 or picture.width * picture.height < _LARGE:
        pixels[: size.height, : size.width] = np.asarray(_resize(picture, size.width, size.height))
        return pixels
    wide = Image.new("RGB", (size.width, picture.height))

    def scale_rows(start: int, stop: int) -> None:
        rows = picture.crop((0, start, picture.width, stop))
        wide.paste(rows.resize((size.width, stop - start), Image.Resampling.BICUBIC), (0, start))

    def scale_columns(start: int, stop: int) -> None:
        columns = wide.crop((start, 0, stop, wide.height))
        scaled = columns.resize((stop - start, size.height), Image.Resampling.BICUBIC)
        pixels[: size.height, start:stop] = np.asarray(scaled)

    with ThreadPoolExecutor(bands) as pool:
        for scale_band, length in ((scale_rows, wide.height), (scale_columns, wide.width)):
            cuts = sorted({length * band // bands for band in range(bands + 1)})  # (no empty bands)
            list(pool.map(scale_band, cuts[:-1], cuts[1:]))  # to the end, or the first error
    return pixels


def _padded(pixels: np.ndarray, size: Resize) -> np.ndarray:
    return np.pad(pixels, ((0, size.pad_height), (0, size.pad_width), (0, 0)))


def _scale_in_mode(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scales a picture as Pillow does in its mode: nearest pixels of a palette, colours weighted by their alpha."""
    if picture.size == (width, height):
        return picture
    weighted, mode = _WEIGHTED.get(picture.mode), picture.mode
    colours = _resize(picture if weighted is None else picture.convert(weighted), width, height)
    return colours if weighted is None else colours.convert(mode)


def scale_image(image: Image.Image | np.ndarray, config: Config) -> np.ndarray:
    """Scales and pads a still picture as a viewer shows it; returns uint8 [height, width, 3] of whole blocks."""
    config = as_config(config)
    board = config.transparent_bg_config
    picture = as_seen(as_image(image), keep_mode=board is not None)
    size = navit_resize(*picture.size, config.in_patch_limit, config)
    if board is None:
        return scale(picture, size)
    return _padded(on_chessboard(_scale_in_mode(picture, size.width, size.height), board), size)


def count_patches(pixels: np.ndarray, config: MediaConfig) -> int:
    """Returns how many patches `pixels`, uint8 [height, width, 3], are cut into."""
    return pixels.shape[0] * pixels.shape[1] // config.patch_size**2


def grid(pixels: Sequence[np.ndarray], config: MediaConfig) -> Grid:
    """Returns the grid (t, h, w) of frames of one size, each uint8 [height, width, 3]."""
    height, width, _ = pixels[0].shape
    return len(pixels), height // config.patch_size, width // config.patch_size


def normalize(pixels: Sequence[np.ndarray], config: MediaConfig) -> np.ndarray:
    """Cuts scaled pictures, each uint8 [height, width, 3], into patches and normalises them.

    Returns float32 [patches, 3, patch, patch], one array for all pictures.
    """
    mean, std = np.array(config.image_mean, np.float32), np.array(config.image_std, np.float32)
    patch = config.patch_size
    patches = np.empty((sum(count_patches(one, config) for one in pixels), 3, patch, patch), np.float32)
    start = 0
    for one in pixels:
        for strip in rearrange(one, "(h p) w c -> h c p w", p=patch):  # in parts that stay in a processor's cache
            levels = np.divide(strip, np.float32(255), order="C", dtype=np.float32)
            levels -= mean[:, None, None]
            levels /= std[:, None, None]
            cut = rearrange(levels, "c p (w q) -> w c p q", q=patch)
            patches[start : start + len(cut)] = cut
            start += len(cut)
    return patches


def image_patches(image: Image.Image | np.ndarray, config: Config) -> tuple[np.ndarray, Grid]:
    """Returns the patches of a picture as a viewer shows it, float32 [h*w, 3, patch, patch], and its grid (1, h, w).

    image: a PIL image of any mode, or uint8 [height, width] with 3 (RGB) or 4 (RGBA) channels or none.
    config: a MediaConfig, or the contents of `preprocessor_config.json`.
    """
    config = as_config(config)
    pixels = [scale_image(image, config)]
    return normalize(pixels, config), grid(pixels, config)


def expand(
    ids: Iterable[SupportsIndex],
    grids: Iterable[Iterable[SupportsIndex]],
    *,
    placeholder_id: int = 163605,
    merge_kernel_size: int = 2,
) -> list[int]:
    """Repeats the placeholder of each media item in `ids` as often as the item has embeddings.

    grids: (t, h, w) of each item in the order of the placeholders; frames are pooled, so an item has h*w/4 embeddings.
    placeholder_id: `media_placeholder_token_id` of config.json; the default is that of all published models.
    Raises ValueError where there are not as many placeholders as grids.
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
