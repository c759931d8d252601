"""Attention of many queries to many keys as one TPU kernel: flash attention (arXiv 2205.14135, arXiv 2307.08691).

Layout: arrays stay as projections give them, [tokens, heads * width], and are cut along lanes in groups of heads that
are whole vectors wide. A head that begins in the middle of a vector (every other head of width 192) is read with its
neighbour's lanes, which are multiplied by zeros in the query.

A grid step is a group of heads and a block of queries. Within it a loop runs over the blocks of keys from the first to
the last that any of the queries sees; while one block is worked on, the next is fetched, and after the last block the
first of the next step. Which keys a block of queries sees follows from the smallest and largest position and segment of
each block, in scalar memory, and is found once for all groups of heads: where all queries see all keys of a block
nothing is masked; else smaller parts of the block are taken, of which those that are seen whole are not masked either,
and left out where no query sees a key. Values of keys that no query of a block sees are set to zero, since they may
hold anything and 0 * NaN is NaN.

The outermost grid axis halves the heads for chips whose two cores share a kernel.

Spills: a whole block's scores, 2,048 vectors, pass through 64 registers while the scores of one head and the softmax of
another overlap: some 1,900 stores and loads in 4,130 bundles on v6e. Strips of 256 queries instead of 512 spill 740,
and take 20 % more bundles; blocks of half as many keys 13 % more. On v5e the matrix unit is 98 % taken.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import with_gradient
from pallas_kernels.hardware import LANES, VMEM_LIMIT
from pallas_kernels.mla_attention import xla
from pallas_kernels.mla_attention.mosaic_prefill_block import (
    PrefillScratch,
    Ref,
    attend,
    begin,
    finish,
    mark_visible,
    scratch_shapes,
    set_ones,
)

LARGEST = 2**31 - 1


class Blocks(NamedTuple):
    """The sizes worked on at a time: heads of a group, queries, keys, and keys of a part where some are hidden."""

    heads: int
    queries: int
    keys: int
    part: int


def choose_blocks(q: Array, k: Array) -> Blocks:
    """Chooses the sizes worked on at a time: smaller in float32, whose products take six times as long."""
    most = Blocks(4, 512, 1024, 512) if q.dtype == jnp.bfloat16 else Blocks(2, 256, 512, 256)
    queries, keys = (max(LANES, 1 << (array.shape[1] - 1).bit_length()) for array in (q, k))
    keys = min(most.keys, keys)
    return Blocks(math.gcd(q.shape[2], most.heads), min(most.queries, queries), keys, min(most.part, keys))


def unsupported(q: Array, k: Array, v: Array, *marks: Array) -> str | None:
    """Says why the prefill kernel cannot serve these arguments; None where it can."""
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "it is empty"
    if q.shape[3] % 64 or v.shape[3] % LANES:
        return f"heads have {q.shape[3]} and {v.shape[3]} values, expected multiples of 64 and {LANES}"
    if q.shape[2] % 2 and q.shape[2] > 1 and q.shape[3] % LANES:
        return f"there are {q.shape[2]} heads of {q.shape[3]}, expected an even number or one"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"operands are {q.dtype}, expected bfloat16 or float32"
    return None


def mla_prefill(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H Dv"],
    q_positions: Int[Array, "B S"],
    kv_positions: Int[Array, "B T"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    *,
    scale: float,
    return_max: bool = False,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[Array, ...]:
    """See `api.mla_prefill`; returns the output in v's dtype, the float32 log-sum-exp, and with `return_max` the
    largest scores [B, H]. Gradients are `xla`'s."""
    options: dict[str, Any] = {"scale": scale, "return_max": return_max}
    run = with_gradient(partial(_forward, **options, interpret=interpret), partial(xla.mla_prefill, **options))
    return run(q, k, v, q_positions, kv_positions, q_segments, kv_segments)


def _forward(q, k, v, q_positions, kv_positions, q_segments, kv_segments, *, scale, interpret, return_max=False):
    (batch, length, heads, width), values = q.shape, v.shape[3]
    size = choose_blocks(q, k)
    groups = heads // size.heads
    cores = 2 if groups % 2 == 0 else 1
    q_marks, kv_marks = (
        [_padded(marks[:, None], block, 2, -1) for marks in pair]
        for block, pair in ((size.queries, (q_positions, q_segments)), (size.keys, (kv_positions, kv_segments)))
    )
    q_blocks, tokens = q_marks[0].shape[2] // size.queries, kv_marks[0].shape[2]

    def column(core, group):
        return core * (groups // cores) + group

    def rows(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, size.queries, lanes), lambda core, b, group, i, *_: (b, i, column(core, group)))

    # The log-sum-exp and the largest score of each query
    per_query = [
        pl.BlockSpec((1, 1, size.heads, size.queries), lambda core, b, group, i, *_: (b, column(core, group), 0, i))
    ] * (2 if return_max else 1)
    query_shape = jax.ShapeDtypeStruct((batch, groups, size.heads, q_blocks * size.queries), jnp.float32)

    out, *found = pl.pallas_call(
        partial(_prefill_kernel, scale=scale, size=size, width=width, outputs=1 + len(per_query)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(cores, batch, groups // cores, q_blocks),
            in_specs=[
                *[pl.BlockSpec((1, 1, size.queries), lambda core, b, group, i, *_: (b, 0, i))] * 2,
                *[pl.BlockSpec((1, 1, tokens), lambda core, b, group, i, *_: (b, 0, 0))] * 2,
                rows(size.heads * width),
                *[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            ],
            out_specs=[
                rows(size.heads * values),
                *per_query,
            ],
            scratch_shapes=[
                pltpu.VMEM((2, size.keys, size.heads * width), k.dtype),
                pltpu.VMEM((2, size.keys, size.heads * values), v.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SMEM((batch * q_blocks,), jnp.int32),
                pltpu.SMEM((batch * q_blocks,), jnp.int32),
                *scratch_shapes(*size, width, values, q.dtype),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, heads * values), v.dtype),
            *[query_shape] * len(per_query),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="mla_prefill",
    )(
        *_ends(q_marks, size.queries, -LARGEST),
        *_ends(kv_marks, size.part, LARGEST),
        *q_marks,
        *kv_marks,
        q.reshape(batch, length, -1),
        # Rows are stored in tiles, so that this only fills up the last one.
        _padded(k.reshape(batch, -1, heads * width), LANES, 1),
        _padded(v.reshape(batch, -1, heads * values), LANES, 1),
    )
    lse, *top = (array.reshape(batch, heads, -1) for array in found)
    lse = jnp.moveaxis(lse, 1, 2)[:, :length]
    return out.reshape(batch, length, heads, values), lse, *(jnp.max(array, axis=-1) for array in top)


def _padded(array: Array, block: int, axis: int, fill: int = 0) -> Array:
    if not (short := -array.shape[axis] % block):
        return array
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, short)
    return jnp.pad(array, padding, constant_values=fill)


def _ends(marks: list[Int[Array, "B 1 tokens"]], size: int, padding: int) -> list[Int[Array, "blocks"]]:
    """Returns, for each block of `size` tokens, the smallest and largest position and the smallest and largest segment.

    A token of padding counts as one at the position `padding`, in no segment.
    """
    positions, segments = marks
    real = segments >= 0
    positions, first = jnp.where(real, positions, padding), jnp.where(real, segments, LARGEST)
    ends = (positions, jnp.min), (positions, jnp.max), (first, jnp.min), (segments, jnp.max)
    return [reduce(array.reshape(-1, size), axis=1) for array, reduce in ends]


class Seen(NamedTuple):
    """First and last position, and first and last segment, of each block of queries and part of keys, in scalar
    memory."""

    q: tuple[Ref, ...]
    kv: tuple[Ref, ...]

    def some(self, block, part):
        """Tells whether a query of the block may see a key of the part."""
        _, q_last, *q_segments = (end[block] for end in self.q)
        first, _, *segments = (end[part] for end in self.kv)
        return (first <= q_last) & (segments[0] <= q_segments[1]) & (q_segments[0] <= segments[1])

    def all(self, block, part):
        """Tells whether all queries of the block see all keys of the part."""
        q_first, _, *q_segments = (end[block] for end in self.q)
        _, last, *segments = (end[part] for end in self.kv)
        one = (q_segments[0] == q_segments[1]) & (segments[0] == segments[1]) & (segments[0] == q_segments[0])
        return (last <= q_first) & one


def _prefill_kernel(*refs, scale, size, width, outputs):
    """Works on one group of heads and one block of queries.

    `half_ref` holds the half of the buffers k and v that receives the step's first block; `first_ref` and `end_ref`
    hold, for each block of queries, the number of the first block of keys that it sees and the one after its last.
    """
    seen = Seen(refs[:4], refs[4:8])
    q_positions, q_segments, kv_positions, kv_segments, q, k_hbm, v_hbm = refs[8:15]
    out, *found = refs[15 : 15 + outputs]
    k, v, arrived, half_ref, first_ref, end_ref, *rest = refs[15 + outputs :]
    work = PrefillScratch(*rest)
    core, batch, group, q_block = (pl.program_id(i) for i in range(4))
    batches, groups, q_blocks = (pl.num_programs(i) for i in range(1, 4))
    tokens, parts = k_hbm.shape[1], size.keys // size.part
    kv_blocks = pl.cdiv(tokens, size.keys)

    def find_span(row, nothing):
        """Finds the blocks that a block of queries sees.

        There is at least one, so that every step has a block that is fetched during the step before.
        """

        def widen(part, ends):
            some, block = seen.some(row, row // q_blocks * kv_blocks * parts + part), part // parts
            first = jnp.where(some & (ends[1] == 0), block, ends[0])
            return first, jnp.where(some, block + 1, ends[1])

        first_ref[row], end = lax.fori_loop(0, kv_blocks * parts, widen, (0, 0))
        end_ref[row] = jnp.maximum(end, 1)
        return nothing

    def fetch(batch, group, block, half, act):
        """Calls `act` with the copies of a block's keys and values; the last block may be short."""

        def copy(rows):
            for source, target in ((k_hbm, k), (v_hbm, v)):
                lanes = target.shape[2]
                first = (core * groups + group) * lanes
                place = source.at[
                    batch,
                    pl.ds(pl.multiple_of(block * size.keys, LANES), rows),
                    pl.ds(first if lanes % LANES else pl.multiple_of(first, LANES), lanes),
                ]
                act(pltpu.make_async_copy(place, target.at[half, pl.ds(0, rows)], arrived.at[half]))

        if not (short := tokens % size.keys):
            copy(size.keys)
            return
        if kv_blocks > 1:
            pl.when(block < kv_blocks - 1)(lambda: copy(size.keys))
        pl.when(block == kv_blocks - 1)(lambda: copy(short))

    @pl.when((batch == 0) & (group == 0) & (q_block == 0))
    def _():
        half_ref[0] = 0
        set_ones(work)
        lax.fori_loop(0, batches * q_blocks, find_span, None)
        fetch(0, 0, first_ref[0], 0, lambda copy: copy.start())

    begin(work, q.at[0], width)
    row = batch * q_blocks + q_block
    end = end_ref[row]

    def attend_block(block, half):
        last = block + 1 == end

        @pl.when(~last)
        def _():
            fetch(batch, group, block + 1, 1 - half, lambda copy: copy.start())

        @pl.when(last)
        def _():
            wraps = q_block + 1 == q_blocks
            row_ends = wraps & (group + 1 == groups)
            next_group = jnp.where(wraps, jnp.where(row_ends, 0, group + 1), group)
            next_batch = batch + row_ends

            @pl.when(next_batch < batches)
            def _():
                next_row = next_batch * q_blocks + jnp.where(wraps, 0, q_block + 1)
                fetch(next_batch, next_group, first_ref[next_row], 1 - half, lambda copy: copy.start())

        fetch(batch, group, block, half, lambda copy: copy.wait())
        part = (batch * kv_blocks + block) * parts
        whole = seen.all(row, part)
        for i in range(1, parts):
            whole &= seen.all(row, part + i)

        # Loops of one turn or none instead of branches: a schedule then shows how often each is taken.
        def once(condition, act):
            lax.fori_loop(0, condition.astype(jnp.int32), lambda *_: act(), None)

        once(whole, lambda: attend(work, k.at[half], v.at[half], width, scale, hidden=False))

        def attend_part(i, nothing):
            at = pl.multiple_of(i * size.part, LANES)
            keys, rows = pl.ds(pl.multiple_of(block * size.keys + at, LANES), size.part), pl.ds(at, size.part)
            add = partial(attend, work, k.at[half, rows], v.at[half, rows], width, scale)
            all_seen = seen.all(row, part + i)

            def add_shown():
                mark_visible(
                    work,
                    (q_positions.at[0], q_segments.at[0]),
                    (kv_positions.at[0, :, keys], kv_segments.at[0, :, keys]),
                )
                add(hidden=True)

            once(all_seen, partial(add, hidden=False))
            once(seen.some(row, part + i) & ~all_seen, add_shown)
            return nothing

        lax.fori_loop(0, jnp.where(whole, 0, parts), attend_part, None)
        return 1 - half

    half_ref[0] = lax.fori_loop(first_ref[row], end, attend_block, half_ref[0])
    finish(work, out.at[0], *(array.at[0, 0] for array in found))
