"""Sizes of an engine's pools and programs: pages for a number of bytes, lengths of pieces, numbers of rows."""

import math
import re
from dataclasses import dataclass

import jax

from kimi_jax.model.kimi import Kimi
from kimi_jax.runtime.eagle import EagleDrafter
from kimi_jax.runtime.pools import HEADROOM, pools_within, row_pages
from kimi_jax.runtime.program import Program
from sharding import Partition

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Sizes:
    """`pages` and `places` (for snapshots) over all devices, pages of a row of the table, and the shapes of programs.
    `max_length` is the longest prompt with its answer."""

    pages: int
    places: int
    row_pages: int
    chunks: tuple[int, ...]
    decode_rows: tuple[int, ...]
    max_length: int
    recurrent: bool


def parse_bytes(size: int | str) -> int:
    """Returns the number of bytes that "512MiB", "1.5GB" or a number says. Raises ValueError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size) if isinstance(size, str) else None
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"a size is {size!r}, expected bytes, such as 1073741824, '512MiB' or '1GiB'")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def pool_sizes(
    model: Kimi,
    slots: int,
    cache_memory: int | str | None,
    prefill_chunk: int,
    max_length: int | None,
    drafter: EagleDrafter | None = None,
) -> Sizes:
    """Returns the sizes of an engine's pools, which have room for a draft head's cache too. Raises ValueError where
    arguments do not fit the mesh or the memory."""
    program = Program(model)
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk is {prefill_chunk}, expected at least 1")
    memory = free_memory() if cache_memory is None else parse_bytes(cache_memory)
    head_page = 0 if drafter is None else drafter.page_bytes
    pools = pools_within(model.config, memory, slots, program.dtype, program.mesh, max_length, head_page)
    return Sizes(
        pools.pages,
        pools.places,
        row_pages(pools.longest, Partition(program.mesh)),
        piece_lengths(prefill_chunk),
        decode_row_counts(slots, program.data),
        pools.longest,
        "kda" in model.config.text.layer_kinds,
    )


def piece_lengths(longest: int) -> tuple[int, ...]:
    """Returns the lengths of a piece of prefill for which programs are compiled, ascending: each a quarter of the next,
    in multiples of 16, so that the last piece of a prompt is padded to four times its length at most."""
    whole = -(-longest // 16) * 16
    return tuple(sorted({whole, *(max(16, whole // part // 16 * 16) for part in (4, 16))}))


def decode_row_counts(slots: int, data: int) -> tuple[int, ...]:
    """Returns the numbers of rows for which decode steps are compiled, ascending.

    Rows without a token cost an accelerator nothing that it would not spend anyway: weights are read once a step. On a
    CPU they cost as much as others.
    """
    if data > 1 or jax.default_backend() != "cpu":
        return (slots,)
    return tuple(sorted({min(count, slots) for count in (1, 4, slots)}))


def free_memory() -> int:
    """Returns the bytes for a cache on each device: a share of what is free on the one that has least."""
    free = []
    for device in jax.local_devices():
        stats = device.memory_stats()
        if stats is None or "bytes_limit" not in stats:
            return 2**30  # a CPU does not say: what a laptop can spare
        free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    return math.floor(min(free) * HEADROOM)
