"""Pieces of a prompt: markers, which the template wrote, and text, in which a marker that is spelt stays text."""

from typing import NamedTuple


class Segment(NamedTuple):
    """A piece of a prompt: a marker, which is one special token (or the video placeholder, which stands for several),
    or text in which special tokens have no meaning."""

    text: str
    is_marker: bool = False


def media_segments(kind: str) -> list[Segment]:
    """Returns `<|media_begin|>{kind}<|media_content|><|media_pad|><|media_end|>`, the placeholder of one media item."""
    return [
        Segment("<|media_begin|>", True),
        Segment(kind),
        Segment("<|media_content|>", True),
        Segment("<|media_pad|>", True),
        Segment("<|media_end|>", True),
    ]
