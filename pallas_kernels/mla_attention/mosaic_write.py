"""New rows into a paged cache, as one TPU kernel that writes in place.

XLA's scatter wants the cache in another layout and copies all of it, there and back. Here a grid step is a row: its
page comes to VMEM unless it is there, the row, turned into a column, takes its lane, and the page goes back when
another is wanted. While a row is worked on, the page of the next is on its way to the other half of the buffer, and the
one before on its way back. A half is read into only when what was in it is written, so whatever pages rows share,
nothing is lost.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128


def unsupported(cache: Array, latents: Array) -> str | None:
    """Why the kernel cannot serve these arguments; None where it can."""
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
    chosen = jnp.where(listed & (chosen >= 0) & (chosen < pages), chosen, -1)
    rows = latents.astype(cache.dtype).reshape(-1, 1, width)
    return pl.pallas_call(
        _write_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows.shape[0],),
            in_specs=[pl.BlockSpec((1, 1, width), lambda i, *_: (i, 0, 0)), pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((2, width, page), cache.dtype),
                pltpu.SMEM((3,), jnp.int32),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        # Counting the two scalar operands.
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=rows.nbytes + 2 * rows.shape[0] * width * page * cache.dtype.itemsize,
        ),
        interpret=interpret,
        name="mla_write",
    )(chosen.reshape(-1), (positions % page).reshape(-1), rows, cache)


def _write_kernel(chosen, lanes, row, _before, cache, buffer, state, writing, arrived, left):
    """`state`: the half of the buffer in hand, its page (-1 is none), and whether the next row's page is on its way to
    the other half; `writing`: which halves are on their way back."""
    half, held, coming = range(3)
    step, last = pl.program_id(0), pl.num_programs(0) - 1
    target, following = chosen[step], chosen[jnp.minimum(step + 1, last)]

    def bring(page, half):
        return pltpu.make_async_copy(cache.at[page], buffer.at[half], arrived.at[half])

    def put_back(page, half):
        return pltpu.make_async_copy(buffer.at[half], cache.at[page], left.at[half])

    def finish_writing(half):
        @pl.when(writing[half] != 0)
        def _():
            put_back(0, half).wait()
            writing[half] = 0

    @pl.when(step == 0)
    def _():
        state[half], state[held], state[coming] = 0, -1, 0
        writing[0] = writing[1] = 0

    @pl.when((target >= 0) & (target != state[held]))
    def _():
        before, now = state[half], 1 - state[half]

        @pl.when(state[held] >= 0)
        def _():
            put_back(state[held], before).start()
            writing[before] = 1

        @pl.when(state[coming] == 0)
        def _():
            finish_writing(now)
            bring(target, now).start()

        bring(target, now).wait()
        state[half], state[held], state[coming] = now, target, 0

    @pl.when((step < last) & (following >= 0) & (following != state[held]))
    def _():
        finish_writing(1 - state[half])  # perhaps of this very page
        bring(following, 1 - state[half]).start()
        state[coming] = 1

    @pl.when(target >= 0)
    def _():
        now, (_, width, page) = state[half], buffer.shape
        columns = jnp.broadcast_to(row[0].astype(jnp.float32), (LANES, width)).T
        for at in range(0, page, LANES):
            lane = at + lax.broadcasted_iota(jnp.int32, columns.shape, 1)
            old = buffer[now, :, at : at + LANES].astype(jnp.float32)
            buffer[now, :, at : at + LANES] = jnp.where(lane == lanes[step], columns, old).astype(buffer.dtype)

    @pl.when(step == last)
    def _():
        @pl.when(state[held] >= 0)
        def _():
            put_back(state[held], state[half]).start()
            writing[state[half]] = 1

        finish_writing(0)
        finish_writing(1)
