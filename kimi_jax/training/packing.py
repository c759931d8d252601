"""Samples packed into rows of one length."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimi_jax.training.samples import IGNORED, Sample


@dataclass(frozen=True)
class Rows:
    """Rows of packed samples, int32 [b, t] each.

    positions: restart at 0 in each sample; -1 is padding.
    segments: the number of each token's sample in its row, from 0; -1 is padding.
    labels: the token that follows, -100 where it is not trained on.
    media_index: which of its row's media tokens replaces a placeholder; -1 for text.
    order: for each row the numbers of its samples, in order.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    labels: np.ndarray
    media_index: np.ndarray
    order: tuple[tuple[int, ...], ...]


def assign_rows(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Assigns samples to rows of `length` tokens: each, longest first, to the first row with room for it (first-fit
    decreasing).

    Raises:
      ValueError: a sample is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        size = lengths[number]
        if size > length:
            raise ValueError(f"sample {number} has {size} tokens, expected at most {length}, those of a row")
        row = next((row for row, free in enumerate(room) if free >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(number)
        room[row] -= size
    return rows


def pack(samples: Sequence[Sample], length: int, pad_id: int, placeholder_id: int | None = None) -> Rows:
    """Packs samples, whose media are expanded, into as few rows of `length` tokens as first-fit finds.

    pad_id: the token in places without one. placeholder_id: the token that media replace, None for text alone.

    Raises:
      ValueError: a sample is longer than a row.
    """
    order = assign_rows([len(sample.tokens) for sample in samples], length)
    shape = len(order), length
    tokens, labels = np.full(shape, pad_id, np.int32), np.full(shape, IGNORED, np.int32)
    positions, segments = (np.full(shape, -1, np.int32) for _ in range(2))
    for row, members in enumerate(order):
        start = 0
        for segment, number in enumerate(members):
            sample = samples[number]
            place = slice(start, start + len(sample.tokens))
            tokens[row, place], labels[row, place] = sample.tokens, sample.labels
            positions[row, place], segments[row, place] = np.arange(len(sample.tokens)), segment
            start = place.stop
    shown = (tokens == placeholder_id) & (segments >= 0) if placeholder_id is not None else np.zeros(shape, bool)
    media_index = np.where(shown, np.cumsum(shown, axis=1) - 1, -1).astype(np.int32)
    return Rows(tokens, positions, segments, labels, media_index, tuple(map(tuple, order)))
