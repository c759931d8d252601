"""New rows into a paged cache, as one TPU kernel that writes in place.

XLA's scatter wants the cache in another layout and copies all of it, there and back. Here a grid step is a row: its
page comes to VMEM unless it is there, the row, turned into a column, takes its lane, and the page goes back when
another is wanted. Rows are taken in order, so whatever page they share, nothing is lost; no read hides
behind another.
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
    if not interpret:
        # Else XLA moves a cache that fits to vector memory and back, all of it.
        cache = pltpu.with_memory_space_constraint(cache, pltpu.HBM)
    return pl.pallas_call(
        _write_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows.shape[0],),
            in_specs=[pl.BlockSpec((1, 1, width), lambda i, *_: (i, 0, 0)), pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((width, page), cache.dtype),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype) if interpret else pltpu.HBM(cache.shape, cache.dtype),
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


def _write_kernel(chosen, lanes, row, _before, cache, held, which, done):
    step = pl.program_id(0)
    target = chosen[step]

    def put_back():
        copy = pltpu.make_async_copy(held, cache.at[which[0]], done)
        copy.start()
        copy.wait()

    @pl.when(step == 0)
    def _():
        which[0] = -1

    @pl.when((target >= 0) & (target != which[0]))
    def _():
        pl.when(which[0] >= 0)(put_back)
        copy = pltpu.make_async_copy(cache.at[target], held, done)
        copy.start()
        copy.wait()
        which[0] = target

    @pl.when(target >= 0)
    def _():
        width, page = held.shape
        columns = jnp.broadcast_to(row[0].astype(jnp.float32), (LANES, width)).T
        for at in range(0, page, LANES):
            lane = at + lax.broadcasted_iota(jnp.int32, columns.shape, 1)
            old = held[:, at : at + LANES].astype(jnp.float32)
            held[:, at : at + LANES] = jnp.where(lane == lanes[step], columns, old).astype(held.dtype)

    pl.when((step == pl.num_programs(0) - 1) & (which[0] >= 0))(put_back)
