"""Sizes of an engine's pools and programs: pages for a number of bytes, lengths of pieces, numbers of rows."""

import math
import re
from dataclasses import dataclass

import jax

from kimi_jax.model.context import PAGE
from kimi_jax.model.kimi import Kimi
from kimi_jax.runtime.cache import pages_within, slot_bytes
from kimi_jax.runtime.program import Program

# Of the memory that a device has left when the engine begins; the rest is for what a step computes with.
HEADROOM = 0.6
# Of the pages' memory, for snapshots of recurrent states.
SNAPSHOT_SHARE = 0.1
FEWEST_PLACES = 4  # snapshots of a data shard: a system prompt's, and of some conversations
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
    model: Kimi, slots: int, cache_memory: int | str | None, prefill_chunk: int, max_length: int | None
) -> Sizes:
    """Returns the sizes of an engine's pools. Raises ValueError where arguments do not fit the mesh or the memory."""
    program, text = Program(model), model.config.text
    data, parts = program.data, program.data * program.sequence
    if slots < 1 or slots % data:
        raise ValueError(f"slots is {slots}, expected a multiple of the data axis, {data}")
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk is {prefill_chunk}, expected at least 1")
    longest = min(max_length or text.max_position_embeddings, text.max_position_embeddings)
    recurrent = "kda" in text.layer_kinds
    latent = "mla" in text.layer_kinds
    most = slots * -(-longest // (PAGE * program.sequence)) * program.sequence
    each_state = slot_bytes(model.config, program.dtype, program.mesh)
    memory = free_memory() if cache_memory is None else parse_bytes(cache_memory)
    budget = int(memory * (1 - SNAPSHOT_SHARE)) if recurrent else memory
    pages = min(pages_within(model.config, budget, slots, program.dtype, program.mesh), most) if latent else parts
    places = 0
    if recurrent:
        places = max(FEWEST_PLACES, min(int(memory * SNAPSHOT_SHARE) // each_state, slots * 16)) * data
    shard_tokens = pages // data * PAGE
    longest = min(longest, shard_tokens) if latent else longest
    row_pages = -(-longest // (PAGE * program.sequence)) * program.sequence
    return Sizes(
        pages, places, row_pages, piece_lengths(prefill_chunk), decode_row_counts(slots, data), longest, recurrent
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
