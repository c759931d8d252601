"""All images and videos of a conversation, opened within one limit and cut into one array of patches."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kimi_jax.media.config import MediaConfig
from kimi_jax.media.limits import MAX_PATCHES
from kimi_jax.media.opening import open_image
from kimi_jax.media.patches import Grid, grid, normalize, scale_image
from kimi_jax.media.video import SampledVideo, VideoChunk, open_video, sample_video


class Patches(NamedTuple):
    """The patches of a conversation, float32 [n, 3, 14, 14]; the grid (t, h, w) of each image and of each chunk of a
    video, in the order of the conversation; the chunks of each video; and (width, height) in pixels of each image as it
    was opened."""

    patches: np.ndarray
    grids: list[Grid]
    videos: list[list[VideoChunk]]
    sizes: list[tuple[int, int]]


def read_all(sources: Sequence[tuple[str, object]], settings: MediaConfig) -> Patches:
    """Returns the patches of at least one image or video, each "image" or "video" with what
    `open_image` or `open_video` takes.

    Pictures stay in 8 bits until all are opened: the patches, four times larger, are allocated once. Raises ValueError
    or OSError naming a source that cannot be opened, and ValueError for more than `MAX_PATCHES` patches in all.
    """
    pixels: list[np.ndarray] = []
    grids: list[Grid] = []
    videos: list[tuple[int, SampledVideo]] = []  # with the number of patches before each
    sizes: list[tuple[int, int]] = []
    count = 0
    for kind, source in sources:
        if kind == "image":
            image = open_image(source, keep_mode=settings.transparent_bg_config is not None)
            sizes.append(image.size)
            frames = [scale_image(image, settings)]
            new = [grid(frames, settings)]
        else:
            video = sample_video(*open_video(source), settings, max_patches=MAX_PATCHES - count)
            videos.append((count, video))
            frames, new = video.frames, video.grids
        count += sum(map(math.prod, new))
        if count > MAX_PATCHES:
            raise ValueError(f"the messages' media come to {count:,} patches, expected at most {MAX_PATCHES:,}")
        pixels += frames
        grids += new
    patches = normalize(pixels, settings)
    chunks = [video.chunks(patches[start:][: sum(map(math.prod, video.grids))]) for start, video in videos]
    return Patches(patches, grids, chunks, sizes)
