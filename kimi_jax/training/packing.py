"""Packs documents into rows of one shape, in an order that is a function of a seed and a step.

Every row of a run has the same room: tokens, labels, documents and patches. So one program trains all of them, and a
run that goes on after a stop needs nothing but the number of its step.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from kimi_jax.config import KimiConfig
from kimi_jax.model.vision_layout import PatchLayout, lay_out_patches, padded_size
from kimi_jax.training.rows import Rows
from kimi_jax.training.samples import Document

# A row has room for this many times the labels, documents and patches that a full row has on average.
SPARE = 1.5
MULTIPLE = 64
# Rows that are filled at a time; earlier ones take no more documents.
OPEN_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Room:
    """The room of a row: at most so many tokens, labels, documents and patches (0 without media)."""

    tokens: int
    labels: int
    documents: int
    patches: int

    @classmethod
    def of(cls, documents: Sequence[Document], tokens: int) -> "Room":
        """Returns the room of rows of `tokens` tokens for these documents. Raises ValueError where one has more tokens
        than a row, and where there is no document, or none with a label."""
        if not documents:
            raise ValueError("there are no documents to train on")
        sizes = np.array([document.sizes for document in documents])
        if (longest := int(sizes[:, 0].max())) > tokens:
            number = int(sizes[:, 0].argmax())
            raise ValueError(f"document {number} has {longest} tokens, but a row has {tokens}")
        if not sizes[:, 1].any():
            raise ValueError("no document has a token to train")
        full = tokens * sizes.sum(axis=0) / sizes[:, 0].sum()  # of a row without padding
        most = np.maximum(np.ceil(SPARE * full), sizes.max(axis=0)).astype(int)
        labels = min(-(-int(most[1]) // MULTIPLE) * MULTIPLE, tokens)
        return cls(tokens, labels, int(most[2]), padded_size(int(most[3])) if most[3] else 0)

    def holds(self, sizes: np.ndarray) -> bool:
        """Tells whether documents with these sizes together fit into a row."""
        return bool((sizes <= dataclasses.astuple(self)).all())


class Packing:
    """Gives the rows of each step: `rows` of `room`, from `documents` in an order drawn from `seed` for each epoch."""

    def __init__(self, documents: Sequence[Document], config: KimiConfig, room: Room, rows: int, seed: int = 0):
        self.documents, self.config, self.room, self.rows, self.seed = tuple(documents), config, room, rows, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._pack)
        self._starts = [0]  # the first step of each epoch

    def batch(self, step: int) -> Rows:
        """Returns the rows of step `step`, counted from 0. The last rows of an epoch may be empty."""
        while self._starts[-1] <= step:
            packed = self._epoch(len(self._starts) - 1)
            self._starts.append(self._starts[-1] - -len(packed) // self.rows)
        epoch = bisect.bisect_right(self._starts, step) - 1
        first = (step - self._starts[epoch]) * self.rows
        chosen = self._epoch(epoch)[first : first + self.rows]
        return make_rows([*chosen, *[[]] * (self.rows - len(chosen))], self.config, self.room)

    def _pack(self, epoch: int) -> list[list[Document]]:
        """Puts the documents of an epoch into rows, each into the first that has room for it."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.documents))
        bins: list[list[Document]] = []
        used: list[np.ndarray] = []
        first = 0  # rows before it are full
        for number in order:
            document = self.documents[number]
            sizes = np.array(document.sizes)
            fits = (i for i in range(first, len(bins)) if self.room.holds(used[i] + sizes))
            if (place := next(fits, None)) is None:
                bins.append([])
                used.append(np.zeros(4, int))
                place = len(bins) - 1
            bins[place].append(document)
            used[place] = used[place] + sizes
            first = max(first, len(bins) - OPEN_ROWS)
        return bins


def make_rows(packed: Sequence[Sequence[Document]], config: KimiConfig, room: Room) -> Rows:
    """Makes the arrays of rows of documents; a row without documents is all padding."""
    count = len(packed)
    tokens, media_index = np.zeros((count, room.tokens), np.int32), np.full((count, room.tokens), -1, np.int32)
    positions, segments = (np.full((count, room.tokens), -1, np.int32) for _ in range(2))
    columns, labels = np.full((count, room.labels), -1, np.int32), np.zeros((count, room.labels), np.int32)
    for row, documents in enumerate(packed):
        at = label = item = 0
        for number, document in enumerate(documents):
            size, trained = len(document.tokens), document.labels
            here = slice(at, at + size)
            tokens[row, here], positions[row, here] = document.tokens, np.arange(size)
            segments[row, here] = number
            columns[row, label : label + len(trained)] = at + trained
            labels[row, label : label + len(trained)] = document.tokens[trained + 1]
            if document.grids is not None:
                placeholders = at + np.flatnonzero(document.tokens == config.media_placeholder_token_id)
                media_index[row, placeholders] = item + np.arange(len(placeholders))
                item += len(placeholders)
            at, label = at + size, label + len(trained)
    rows = Rows(tokens, positions, segments, columns, labels, documents=room.documents)
    if not room.patches:
        return rows
    media = [_row_media(documents, config, room.patches) for documents in packed]
    layout = PatchLayout(*(np.stack(arrays) for arrays in zip(*(where for _, where in media), strict=True)))
    patches = np.stack([patches for patches, _ in media])
    return dataclasses.replace(rows, media_index=media_index, patches=patches, patch_layout=layout)


def _row_media(documents: Sequence[Document], config: KimiConfig, room: int) -> tuple[np.ndarray, PatchLayout]:
    """Returns the patches of a row's documents [room, 3, h, w], and their places."""
    assert config.vision is not None
    patch = config.vision.patch_size
    grids = [document.grids for document in documents if document.grids is not None]
    found = [document.patches for document in documents if document.patches is not None]
    joined = np.concatenate([np.zeros((0, 3, patch, patch), np.float32), *found])
    patches = np.pad(joined, [(0, room - len(joined)), (0, 0), (0, 0), (0, 0)])
    return patches, lay_out_patches(np.concatenate([np.zeros((0, 3), np.int32), *grids]), config.vision, room)
