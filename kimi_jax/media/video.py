"""Samples a video's frames by time, decodes and keeps those only, and groups them in chunks of up to four."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kimi_jax.media import sources
from kimi_jax.media.animation import Animation, Pictures
from kimi_jax.media.appearance import as_seen
from kimi_jax.media.config import Config, MediaConfig, as_config
from kimi_jax.media.film import Film, demuxer
from kimi_jax.media.limits import MAX_PATCHES
from kimi_jax.media.opening import as_image
from kimi_jax.media.patches import Grid, grid, navit_resize, normalize, scale

_LONGEST = 10**9  # seconds, some thirty years; dates end before ten thousand


@dataclass(frozen=True)
class VideoChunk:
    """Up to four sampled frames, which make one media item.

    patches: float32 [t*h*w, 3, patch, patch]; grid: (t, h, w) in patches; timestamp: `HH:MM:SS.mmm` of the first frame.
    """

    patches: np.ndarray
    grid: Grid
    timestamp: str


@dataclass(frozen=True)
class SampledVideo:
    """The frames chosen from a video, scaled and padded, uint8 [height, width, 3] each, and their times in seconds."""

    frames: list[np.ndarray]
    times: list[float]
    config: MediaConfig

    @property
    def grids(self) -> list[Grid]:
        """Returns the grid of each chunk."""
        step = self.config.temporal_merge_kernel_size
        return [grid(self.frames[start : start + step], self.config) for start in range(0, len(self.frames), step)]

    def chunks(self, patches: np.ndarray) -> list[VideoChunk]:
        """Returns the chunks as views of `patches`, the array that `normalize` makes of `frames`."""
        ends = np.cumsum([math.prod(one) for one in self.grids])
        stamps = [_timestamp(seconds) for seconds in self.times[:: self.config.temporal_merge_kernel_size]]
        return [VideoChunk(*chunk) for chunk in zip(np.split(patches, ends[:-1]), self.grids, stamps, strict=True)]


def _timestamp(seconds: float) -> str:
    # datetime rounds to microseconds, and milliseconds are cut from those, as the published processor does
    return f"{datetime.fromtimestamp(seconds, tz=UTC):%H:%M:%S}.{int(seconds % 1 * 1000):03d}"


def video_patches(frames: Sequence[Any], fps: float, config: Config) -> list[VideoChunk]:
    """Samples at most `sample_fps` frames per second, four to a chunk, and cuts them in patches.

    frames: from `open_video`, or PIL images, or uint8 [height, width, 3]. fps: frames per second of `frames`. All
    frames must have one size, and are scaled to `in_patch_limit_each_frame`.
    """
    video = sample_video(frames, fps, config)
    return video.chunks(normalize(video.frames, video.config))


def sample_video(frames: Sequence[Any], fps: float, config: Config, *, max_patches: int | None = None) -> SampledVideo:
    """Samples frames for `video_patches`, and decodes and scales them one after another.

    max_patches: a limit for all sampled frames together; by default `MAX_PATCHES` for a file and none for frames.
    Raises ValueError where they have more, for a file before it decodes all of them.
    """
    config = as_config(config)
    if not len(frames) or not 0 < fps < math.inf:
        raise ValueError(f"{len(frames)} frames at {fps} frames per second are no video")
    if len(frames) / fps > _LONGEST:
        raise ValueError(f"{len(frames)} frames at {fps} frames per second last more than {_LONGEST:,} seconds")
    indices, times = _sample(frames, fps, config.sample_fps)
    if max_patches is None and isinstance(frames, Animation | Film):
        max_patches = MAX_PATCHES
    first = frames.size if isinstance(frames, Animation | Film) else _picture(frames, 0).size
    size = navit_resize(*first, config.in_patch_limit_each_frame, config)
    patches = len(indices) * math.prod(size.padded) // config.patch_size**2
    if max_patches is not None and patches > max_patches:
        raise ValueError(
            f"{getattr(frames, 'name', 'the video')}: {len(indices):,} frames sampled at {config.sample_fps:g} per "
            f"second come to {patches:,} patches, expected at most {max_patches:,}"
        )
    scaled: dict[int, np.ndarray] = {}
    for index in indices:
        if index in scaled:
            continue
        picture = _picture(frames, index)
        if picture.size != first:
            raise ValueError(f"frame {index} is {picture.size} pixels, the first {first}; expected one size")
        scaled[index] = scale(picture, size)
    return SampledVideo([scaled[index] for index in indices], times, config)


def _picture(frames: Sequence[Any], index: int) -> Image.Image:
    frame = frames[index]
    return frame if isinstance(frames, Animation | Film | Pictures) else as_seen(as_image(frame), f"frame {index}")


def _sample(frames: Sequence[Any], fps: float, sample_fps: float) -> tuple[list[int], list[float]]:
    """Returns the numbers of the frames to sample, and their times in seconds.

    At a steady rate it chooses the published processor's: evenly from the first frame to the last, rounded. Where the
    durations of a file's frames differ, it chooses the frames on the screen at evenly spaced times.
    """
    starts = frames.starts if isinstance(frames, Animation | Film) and fps == frames.fps else None
    count = max(round(len(frames) * min(sample_fps, fps) / fps), 1)
    if starts is None:
        indices = np.linspace(0, len(frames) - 1, count).round().astype(int).tolist()
        return indices, [index / fps for index in indices]
    times = np.linspace(0, starts[-1], count)
    indices = (np.searchsorted(starts, times + 1e-6, side="right") - 1).tolist()  # a frame is visible at its start
    return indices, times.tolist()


def open_video(source: object, fps: float | None = None) -> tuple[Sequence[Any], float]:
    """Returns frames (as a viewer shows them, in RGB, decoded on access) and frames per second.

    source: an animated GIF, WebP or PNG, or with kimi-jax[video] a film (a path, a base64 `data:` URL or bytes); a
    folder of pictures (in the order of their names), or a list of sources that `open_image` takes. The rate of a file
    is the mean of its durations unless `fps` is given; pictures need `fps`. Raises OSError or ValueError naming the
    source.
    """
    if isinstance(source, list | tuple) or sources.is_folder(source):
        pictures = source if isinstance(source, list | tuple) else _files(Path(str(source)))
        if not pictures or fps is None:
            raise ValueError(f"{len(pictures)} pictures as a video with fps {fps}: expected at least one, and its fps")
        return Pictures(pictures), fps
    if not isinstance(source, str | Path | bytes | bytearray | memoryview):
        raise ValueError(f"a video is given as {type(source).__name__}, expected a path, a data: URL, bytes or a list")
    data, name = sources.read(source)
    if demuxer(data) is not None:
        film = Film(data, name)
        return film, film.fps if fps is None else fps
    animation = Animation(data, name)
    if fps is None and not animation.fps:
        raise ValueError(f"{animation.name}: holds no durations, so its fps must be given")
    return animation, animation.fps if fps is None else fps


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
