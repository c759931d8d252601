"""Sequences of frames that decode one frame at a time, on access: those of an animated file, or a file for each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from kimi_jax.media.appearance import SIDEWAYS, as_seen, find_turn, pillow_errors
from kimi_jax.media.durations import first_frame, read_frames
from kimi_jax.media.limits import MAX_FRAME_PIXELS, MAX_VIDEO_PIXELS
from kimi_jax.media.opening import open_header, open_image

KINDS = "; a video is an MP4 or another film, a GIF, an animated WebP or PNG, or a folder of frames"


class Animation(Sequence[Image.Image]):
    """The frames of an animated GIF, WebP or PNG as a viewer shows them, in RGB. Formats that draw each frame upon the
    one before are decoded in order, so access is fast with rising indices only.

    size: width and height of every frame. fps: the mean rate, 0 where no durations are stated. starts: seconds at which
    the frames appear; None where all frames last equally long.
    """

    def __init__(self, data: bytes, name: str) -> None:
        """Reads the header and the durations. Raises ValueError where `data` is no animation or exceeds a limit."""
        self.name, self._data = name, data
        self._image = open_header(data, name, KINDS)
        kind = str(self._image.format)
        frames = read_frames(data, kind, name)
        if len(frames) < 2:
            raise ValueError(f"{name}: a still {kind} and no animation{KINDS}")
        self._first = first_frame(data, kind)
        width = max(self._image.width, *(frame.right for frame in frames))
        height = max(self._image.height, *(frame.bottom for frame in frames))
        if width * height > MAX_FRAME_PIXELS or width * height * len(frames) > MAX_VIDEO_PIXELS:
            raise ValueError(
                f"{name}: {len(frames):,} frames of {width:,} x {height:,} pixels, expected at most "
                f"{MAX_FRAME_PIXELS:,} pixels in a frame and {MAX_VIDEO_PIXELS:,} in all"
            )
        sideways = find_turn(self._image) in SIDEWAYS
        self.size = self._image.size[::-1] if sideways else self._image.size
        durations = [frame.duration for frame in frames]
        total = sum(durations)
        self.fps = len(frames) * 1000 / total if total else 0.0
        ends = np.cumsum(durations) / 1000
        self.starts = None if len(set(durations)) == 1 else [0.0, *ends[:-1].tolist()]
        self._count = len(frames)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        if index + self._first < self._image.tell():  # some plugins of Pillow miscount when they seek backwards
            self._image = open_header(self._data, self.name)
        with pillow_errors(self.name):
            self._image.seek(index + self._first)
        return as_seen(self._image, self.name)


class Pictures(Sequence[Image.Image]):
    """Frames that are separate pictures, each a source that `open_image` takes."""

    def __init__(self, sources: Sequence[object]) -> None:
        self._sources = sources

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: Any) -> Any:
        return open_image(self._sources[index])
