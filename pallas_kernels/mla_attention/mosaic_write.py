"""Writing of new rows into a paged cache, as one TPU kernel that writes in place.

XLA's scatter wants the cache in another layout and copies all of it before and after. Here rows are cut into *runs*: a
run is consecutive rows for consecutive tokens, in one block of 128 rows and one *unit* of the cache, 128 tokens of a
page. A prompt's runs are whole blocks, or two to a block if it begins within a unit; a decoding sequence's run is a
row.

A block is transposed once, so that its rows are columns; these, rotated to a run's lanes, are merged into the unit in
VMEM. Consecutive runs in one unit make a *visit*: the unit is read ahead, unless the first run fills it, and written
back while other visits go on, `SLOTS` of them at once. A unit is read only after an earlier visit to it has been
written, so whatever units rows share, nothing is lost, and of two rows for one token the later one stays.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hardware import LANES

SLOTS = 8  # units in VMEM: 147 kB each of Kimi's, so that a megabyte is on its way there and back


def unsupported(cache: Array, latents: Array, page_table: Array, positions: Array) -> str | None:
    """Says why the kernel cannot serve these arguments; None where it can."""
    if 0 in (*cache.shape, *latents.shape):
        return "it is empty"
    if cache.shape[1] % 16 or cache.shape[2] % LANES:
        return f"a page is {cache.shape[1:]}, expected multiples of 16 and {LANES}"
    if cache.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the cache is {cache.dtype}, expected bfloat16 or float32"
    return None


def mla_write(
    cache: Float[Array, "pages width page"],
    latents: Float[Array, "B S width"],
    page_table: Int[Array, "B max_pages"],
    positions: Int[Array, "B S"],
    *,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "pages width page"]:
    """See `api.mla_write`."""
    pages, width, page = cache.shape
    entry = positions // page
    listed = (positions >= 0) & (entry < page_table.shape[1])
    chosen = jnp.take_along_axis(page_table, jnp.where(listed, entry, 0), axis=1)
    places = jnp.where(listed & (chosen >= 0) & (chosen < pages), chosen * page + positions % page, -1)
    blocks = pl.cdiv(places.size, LANES)
    places = jnp.pad(places.reshape(-1), (0, -places.size % LANES), constant_values=-1)
    rows = latents.astype(cache.dtype).reshape(-1, width)
    # The last of several blocks may reach past the rows, a block may not be larger than all of them.
    block, few = min(LANES, len(rows)), len(rows) < LANES
    words = width * cache.dtype.itemsize // 4
    if not interpret:
        # Else XLA moves a cache that fits to vector memory and back, all of it.
        cache = pltpu.with_memory_space_constraint(cache, pltpu.HBM)
    written = pl.pallas_call(
        _write_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(blocks,),
            in_specs=[pl.BlockSpec((block, width), lambda i, *_: (i, 0)), pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((words, LANES), jnp.int32),
                pltpu.VMEM((SLOTS, width, LANES), cache.dtype),
                pltpu.SMEM((SLOTS,), jnp.int32),
                pltpu.SMEM((3,), jnp.int32),
                pltpu.SemaphoreType.DMA((SLOTS,)),
                *([pltpu.VMEM((LANES, width), cache.dtype)] if few else []),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        # Counting the two scalar operands.
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            # As of one row per sequence, or of prompts.
            bytes_accessed=rows.nbytes + 2 * max(positions.shape[0], blocks) * width * LANES * cache.dtype.itemsize,
        ),
        interpret=interpret,
        name="mla_write",
    )(jnp.pad(places, 1, constant_values=-1), _ends(places), rows, cache)
    # libtpu 0.0.42 refuses a program's result whose memory is constrained.
    return lax.optimization_barrier(written)


def _ends(places: Int[Array, "rows"]) -> Int[Array, "rows"]:
    """Returns, for each row, the first row after its run. Rows without a place make runs too."""
    block, row = places.reshape(-1, LANES), jnp.arange(LANES, dtype=jnp.int32)
    expected = jnp.where(block < 0, -1, block + 1)[:, :-1]
    begins = (block[:, 1:] != expected) | (block[:, 1:] % LANES == 0)
    last = jnp.pad(begins, ((0, 0), (0, 1)), constant_values=True)
    # One fusion; a cumulative minimum is several on TPU.
    ends = 1 + jnp.min(jnp.where(last[:, None, :] & (row >= row[:, None]), row, LANES - 1), axis=-1)
    return (ends + LANES * jnp.arange(len(block), dtype=jnp.int32)[:, None]).reshape(-1)


def _write_kernel(places, ends, rows, _before, cache, columns, buffer, units, cursor, moved, *whole):
    """Writes one block of rows, of which there may be fewer than a block has if `whole` has room for one.

    `places` has a -1 before the first row and after the last. `columns` is the block, a token to a lane, as words of 32
    bits. `units` has the unit in each slot, -1 once it is written. `cursor` counts the closed visits (their writing has
    begun) and the opened ones (their reading has begun), and has the first row not yet examined for more.
    """
    closed, opened, ahead = range(3)
    first, total = pl.program_id(0) * LANES, pl.num_programs(0) * LANES

    def unit_of(row):
        return places[row + 1] >> 7  # log2(LANES): -1 stays

    def is_read(row):
        return ends[row] - row < LANES

    def opens(row):
        return unit_of(row) != unit_of(row - 1)

    def window(unit):
        tiles = cache.shape[2] // LANES
        lane = pl.multiple_of(lax.rem(unit, tiles) * LANES, LANES)
        return cache.at[lax.div(unit, tiles), :, pl.ds(lane, LANES)]

    def read(unit, slot):
        return pltpu.make_async_copy(window(unit), buffer.at[slot], moved.at[slot])

    def write(unit, slot):
        return pltpu.make_async_copy(buffer.at[slot], window(unit), moved.at[slot])

    def finish_writing(slot):
        @pl.when(units[slot] >= 0)
        def _():
            write(0, slot).wait()
            units[slot] = -1

    def look_ahead():
        """Opens later visits, until no slot is free or the next visit's unit is still to be written by another."""

        def look(state):
            row, visit = state[:2]
            unit = unit_of(row)
            new = (unit >= 0) & opens(row)
            taken = new & (sum((units[slot] == unit).astype(jnp.int32) for slot in range(SLOTS)) > 0)
            none_open = visit == cursor[closed]

            @pl.when(taken & none_open)
            def _():
                for slot in range(SLOTS):
                    finish_writing(slot)

            goes = new & (none_open | ~taken)

            @pl.when(goes)
            def _():
                slot = lax.rem(visit, SLOTS)
                finish_writing(slot)
                units[slot] = unit

                @pl.when(is_read(row))
                def _():
                    read(unit, slot).start()

            waits = new & ~goes
            return jnp.where(waits, row, ends[row]), visit + goes.astype(jnp.int32), waits

        def more(state):
            row, visit, waits = state
            return (row < total) & (visit - cursor[closed] < SLOTS) & ~waits

        cursor[ahead], cursor[opened], _ = lax.while_loop(more, look, (cursor[ahead], cursor[opened], jnp.bool_(False)))

    def merge(row):
        unit, end, slot = unit_of(row), ends[row], lax.rem(cursor[closed], SLOTS)

        @pl.when(opens(row) & is_read(row))
        def _():
            read(unit, slot).wait()

        lane = places[row + 1] & (LANES - 1)
        turned = pltpu.roll(columns[...], (lane - row) & (LANES - 1), 1)
        at = lax.broadcasted_iota(jnp.int32, turned.shape, 1)
        old = pltpu.bitcast(buffer[slot], jnp.int32)
        new = jnp.where((at >= lane) & (at < lane + end - row), turned, old)
        buffer[slot] = pltpu.bitcast(new, buffer.dtype)

        @pl.when(unit_of(end) != unit)
        def _():
            write(unit, slot).start()
            cursor[closed] += 1

    @pl.when(first == 0)
    def _():
        cursor[closed] = cursor[opened] = cursor[ahead] = 0
        for slot in range(SLOTS):
            units[slot] = -1

    for room in whole:  # what is in its other rows goes nowhere
        room[: rows.shape[0], :] = rows[...]
    columns[...] = pltpu.bitcast((whole[0] if whole else rows)[...].T, jnp.int32)

    def run(row):
        look_ahead()
        pl.when(places[row + 1] >= 0)(lambda: merge(row))
        return ends[row]

    lax.while_loop(lambda row: row < first + LANES, run, first)

    @pl.when(first + LANES == total)
    def _():
        for slot in range(SLOTS):
            finish_writing(slot)
