"""Rows of freshly drawn documents, each step's a function of a seed and the step's number."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kimi_jax.config import KimiConfig
from kimi_jax.training.packing import Room, make_rows
from kimi_jax.training.rows import Rows
from kimi_jax.training.samples import Document

# Draws documents that belong together, those of one conversation say.
Source = Callable[[np.random.Generator], Sequence[Document]]


def draw_rows(
    source: Source, config: KimiConfig, room: Room, count: int, random: np.random.Generator, patience: int = 6
) -> Rows:
    """Fills `count` rows of `room`, each document into the first row that holds it, until `patience` in succession fit
    nowhere."""
    packed: list[list[Document]] = [[] for _ in range(count)]
    used = [np.zeros(4, int) for _ in range(count)]
    refused = 0
    while refused < patience:
        for document in source(random):
            sizes = np.array(document.sizes)
            place = next((i for i in range(count) if room.holds(used[i] + sizes)), None)
            if place is None:
                refused += 1
                continue
            refused = 0
            packed[place].append(document)
            used[place] = used[place] + sizes
    return make_rows(packed, config, room)


def ahead(batch: Callable[[int], Rows], steps: range) -> Iterator[tuple[int, Rows]]:
    """Yields each step's number and `batch(step)`, drawn by another thread while the step before it is trained."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(batch, step) for step in steps[:2]]
        for step in steps:
            rows = coming.pop(0).result()
            if step + 2 * steps.step in steps:
                coming.append(pool.submit(batch, step + 2 * steps.step))
            yield step, rows
