"""Frames of films (MP4, QuickTime, Matroska, WebM, AVI, Ogg, MPEG), decoded by PyAV, FFmpeg's libraries for Python.

The demuxer follows from a file's first bytes and is never guessed by FFmpeg, whose playlists would open other files.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from kimi_jax.media.limits import MAX_FILM_FRAMES, MAX_FILM_PIXELS, MAX_FRAME_PIXELS
from kimi_jax.printable import printable

_STILLS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # brands of pictures, which begin as MP4 does
_BEGINNINGS = (
    (b"\x1aE\xdf\xa3", "matroska"),
    (b"OggS", "ogg"),
    (b"FLV\x01", "flv"),
    (b"\0\0\x01\xba", "mpeg"),
)
# ITU-R BT.709 is what players assume of HD that says nothing, and BT.601 of smaller frames
_HD_HEIGHT, _UNSPECIFIED, _BT709, _BT601 = 720, 2, 1, 5
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def demuxer(data: bytes) -> str | None:
    """Returns FFmpeg's name for the container of a film, None where `data` begins as none."""
    if data[4:8] == b"ftyp":
        return None if data[8:12] in _STILLS else "mov"
    if data[4:8] in (b"moov", b"mdat", b"wide"):  # QuickTime's older files have no brand
        return "mov"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[:1] == data[188:189] == data[376:377] == b"G":  # packets of 188 bytes
        return "mpegts"
    return next((name for first, name in _BEGINNINGS if data.startswith(first)), None)


class Film(Sequence[Image.Image]):
    """The frames of a film's first video stream as a player shows them: turned, and in RGB by the stream's own matrix
    and range. They are decoded in order, so access is fast with rising indices only.

    size: width and height of every frame. fps: the mean rate. starts: seconds at which the frames appear; None where
    they follow each other evenly, but for the rounding of time stamps.
    """

    def __init__(self, data: bytes, name: str) -> None:
        """Reads the time stamps of all frames, and decodes the first. Raises ValueError where PyAV is not installed,
        and where `data` is damaged, has no video, or exceeds a limit."""
        self.name, self._data = name, data
        with self._open() as container:
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            packets = (packet for packet in container.demux(stream) if packet.pts is not None)
            self._stamps = sorted(packet.pts for packet in packets if not packet.is_discard)
            count, tick = len(self._stamps), float(stream.time_base or 0)
        if count == 0 or tick == 0:
            raise ValueError(f"{name}: a film without time stamps")
        if width * height > MAX_FRAME_PIXELS or count > MAX_FILM_FRAMES or width * height * count > MAX_FILM_PIXELS:
            raise ValueError(
                f"{name}: {count:,} frames of {width:,} x {height:,} pixels, expected at most {MAX_FILM_FRAMES:,} "
                f"frames, {MAX_FRAME_PIXELS:,} pixels in a frame and {MAX_FILM_PIXELS:,} in all"
            )
        ticks = np.array(self._stamps) - self._stamps[0]
        step = ticks[-1] / (count - 1) if count > 1 else 1 / tick
        if step == 0:
            raise ValueError(f"{name}: {count:,} frames at one time")
        self.fps = 1 / (step * tick)
        even = bool((np.abs(ticks - step * np.arange(count)) <= 1).all())  # a tick is what rounding may shift
        self.starts: list[float] | None = None if even else (ticks * tick).tolist()
        self._frames: Iterator[Any] = iter(())
        self._last: Any = None  # the frame that was decoded last
        self.size: tuple[int, int] = self[0].size

    def __len__(self) -> int:
        return len(self._stamps)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        wanted = self._stamps[index]
        if self._last is None or wanted < self._last.pts:
            self._frames, self._last = self._decode(), None
        while self._last is None or self._last.pts < wanted:
            self._last = next(self._frames, None)
            if self._last is None or self._last.pts > wanted:
                raise ValueError(f"{self.name}: a damaged film: frame {index:,} of {len(self):,} cannot be decoded")
        return _as_seen(self._last)

    def _decode(self) -> Iterator[Any]:
        """Yields the frames in the order in which they are shown."""
        with self._open() as container:
            for frame in container.decode(container.streams.video[0]):
                if frame.pts is not None:
                    yield frame

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """Opens the film, and turns FFmpeg's errors into a ValueError of one line."""
        try:
            import av
        except ModuleNotFoundError:
            raise ValueError(
                f"{self.name}: a film, which needs a decoder: pip install 'kimi-jax[video]', or give a GIF, an "
                "animated WebP or PNG, or a folder of frames"
            ) from None
        # A title in another encoding is no fault of the film; PyAV 19 and newer always take it
        lenient: dict[str, Any] = (
            {"metadata_errors": "replace"} if hasattr(av.container.Container, "metadata_errors") else {}
        )
        try:
            with av.open(io.BytesIO(self._data), format=demuxer(self._data), **lenient) as container:
                video = container.streams.video
                if not video or video[0].codec_context is None:
                    raise ValueError(f"{self.name}: a film without video that can be decoded")
                yield container
        except av.FFmpegError as error:
            raise ValueError(f"{self.name}: a damaged film: {printable(error.strerror)}") from error


def _as_seen(frame: Any) -> Image.Image:
    """Converts a frame to RGB and turns it."""
    matrix = int(frame.colorspace)
    if matrix == _UNSPECIFIED:
        matrix = _BT709 if frame.height >= _HD_HEIGHT else _BT601
    picture = Image.fromarray(frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray())
    turn = _TURNS.get(round(frame.rotation) % 360)
    return picture if turn is None else picture.transpose(turn)
