"""Grouped matmul and gated linear units with INT4 or MXFP4 weights as one Pallas kernel for TPUs.

Rows are cut in blocks; a *visit* is a pair of a block and a group with rows in it, and the grid is (N tiles, visits).
A kernel of one group has that grid. A kernel of several lists the visits first, from the groups' sizes, and emits a
pipeline over as many, so that nothing runs beside it.

A step takes all K rows of an N tile of the visit's group, as half bytes: up to 4 MiB, so that the 220 to 290 bundles
that every step costs matter little. Part after part is unpacked and scaled in vector memory, and the group's rows of
the block are multiplied by it, a window at a time, into a float32 accumulator of the whole block: rows of other groups
enter as zeros, so that nothing has to be merged and groups may begin anywhere. The accumulator is zeroed at a block's
first visit and written at its last. A block of x stays in vector memory for all its visits; weights are streamed once
per visit.

A weight is bf16(code * scale). In bf16 arithmetic (v6e on) the product rounds to that by itself; v5 has none, and
rounds the float32 product. Float32 x is multiplied at HIGHEST precision, bf16 x in one pass with float32 accumulation.
Groups of at most 8 rows of bf16 are multiplied in block-diagonal form: of INT4 on v5 (`int4_block_diagonal`) and, since
it converts int4 to float8, on tpu7x (`float8_block_diagonal`); of MXFP4 on every chip (`mxfp4_product`), whose scales
are read from their bytes once in a step.

Windows of more than 64 rows spill: their product is larger than the register file, and the spills fit beside the matrix
unit's work. (Fewer rows at a time leave it idle for longer.) So do large parts of few rows, up to 1,400 stores and
loads in loops of thousands of bundles: parts are so large because every part begins and ends with idle units.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.formats import Int4, Mxfp4
from pallas_kernels.formats.int4_codec import GROUP_SIZE
from pallas_kernels.grouped_matmul import int4_block_diagonal as block_diagonal
from pallas_kernels.grouped_matmul import mxfp4_product
from pallas_kernels.grouped_matmul.int4_product import (
    FEW_ROWS,
    MXFP4,
    Code,
    GroupRows,
    MatrixOperand,
    Tiles,
    add_products,
    int4_code,
    scale_rows,
)
from pallas_kernels.grouped_matmul.visits import WINDOWS, BlockVisits, every_block, list_visits, window_size
from pallas_kernels.hardware import LANES, VMEM_LIMIT, chip, tpu_in_use

# A part's scales must fill a tile of memory: 16 rows of 32 inputs each.
K_PART = 512
LARGEST_ODD_K = 2048
# Bytes of x in a block and of codes in a step; weights unpacked at a time, for one window of rows and for several.
BLOCK_BYTES, STEP_BYTES, PART_WEIGHTS, SHARED_PART_WEIGHTS = 2**23, 2**22, 2**22, 2**20


Packed = Int4 | Mxfp4


def unsupported(x: Array, weight: Packed, *others: Any) -> str | None:
    """Says why the kernel cannot take these shapes and dtypes; None where it can."""
    (tokens, K), N = x.shape, weight.shape[-2]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, expected bfloat16 or float32"
    if tokens == 0:
        return "x has no rows"
    if N % LANES:
        return f"N is {N}, expected a multiple of {LANES}"
    if K % K_PART and (K % 64 or K > LARGEST_ODD_K):
        return f"K is {K}, expected a multiple of {K_PART}, or of 64 up to {LARGEST_ODD_K}"
    return None


def tiles(
    tokens: int, K: int, N: int, groups: int, dtype: Any, step_bytes: int | None = None, part_weights: int | None = None
) -> Tiles:
    """Chooses sizes for `tokens` rows over `groups` groups.

    Rows are multiplied in numbers near a group's mean. A step takes `step_bytes` of codes, and unpacks `part_weights`
    weights at a time for one window.
    """
    step_bytes, part_weights = step_bytes or STEP_BYTES, part_weights or PART_WEIGHTS
    rows = window_size(tokens, groups)
    most = max(rows, BLOCK_BYTES // (K * jnp.dtype(dtype).itemsize) // rows * rows)
    outputs = max(n for n in range(LANES, N + 1, LANES) if N % n == 0 and (n == LANES or K * n <= 2 * step_bytes))

    def largest_part(weights: int) -> int:
        parts = [part for part in range(K_PART, K + 1, K_PART) if K % part == 0 and part * outputs <= weights]
        return max(parts, default=K_PART if K % K_PART == 0 else K)

    block = min(-(-tokens // rows) * rows, most, 512)
    shared = largest_part(SHARED_PART_WEIGHTS)
    # With many rows the matrix unit has enough to do, and the code of a large part would be very long.
    return Tiles(block, rows, outputs, largest_part(part_weights) if rows == WINDOWS[0] else shared, shared)


def uses_block_diagonal(tile: Tiles, dtype: Any, is_mxfp4: bool = False) -> bool:
    """Tells whether groups of few rows are multiplied in block-diagonal form."""
    few = tile.rows <= 2 * FEW_ROWS and tile.K_part % block_diagonal.INPUTS == 0
    return few and dtype == jnp.bfloat16 and (is_mxfp4 or chip().fp4 or not chip().bf16_vpu)


def grouped_matmul(
    x: Float[Array, "T K"],
    weight: Packed,
    group_sizes: Int32[Array, "all"],
    group_offset: Int[Array, ""],
    *,
    interpret: Any = False,
) -> Float[Array, "T N"]:
    """See `api.grouped_matmul`."""
    return _call(x, [weight], (group_sizes, group_offset), lambda y: y, name="grouped_matmul", interpret=interpret)


def matmul(x: Float[Array, "T K"], weight: Packed, *, interpret: Any = False) -> Float[Array, "T N"]:
    """See `matmul.api.matmul`; `weight` is [1, K, N], a single group of all rows."""
    return _call(x, [weight], None, lambda y: y, name="grouped_matmul", interpret=interpret)


def grouped_glu(
    x: Float[Array, "T K"],
    gate: Packed,
    up: Packed,
    group_sizes: Int32[Array, "all"],
    group_offset: Int[Array, ""],
    *,
    activation: Callable[[Array, Array], Array],
    interpret: Any = False,
) -> Float[Array, "T N"]:
    """See `api.grouped_glu`."""
    return _call(x, [gate, up], (group_sizes, group_offset), activation, name="grouped_glu", interpret=interpret)


def _call(
    x: Float[Array, "T K"],
    weights: list[Packed],
    groups: tuple[Int32[Array, "all"], Int[Array, ""]] | None,
    combine: Callable[..., Array],
    *,
    name: str,
    interpret: Any,
) -> Float[Array, "T N"]:
    (tokens, K), (num_local, N, _) = x.shape, weights[0].shape
    is_mxfp4 = isinstance(weights[0], Mxfp4)
    code = MXFP4 if is_mxfp4 else int4_code(chip())
    tile = tiles(tokens, K, N, num_local, x.dtype, part_weights=code.part_weights)
    blocks = -(-tokens // tile.block)
    few, dtype = uses_block_diagonal(tile, x.dtype, is_mxfp4), x.dtype
    few &= groups is not None or tokens <= FEW_ROWS
    more = not few or tokens > FEW_ROWS
    bf16, columns, cores = chip().bf16_vpu, N // tile.N, chip().cores
    kernel = partial(
        _kernel,
        tile=tile,
        code=code,
        few=few,
        more=more,
        dtype=dtype,
        combine=combine,
        bf16=bf16,
        num_weights=len(weights),
    )
    accumulator = pltpu.VMEM((tile.block, tile.N), jnp.float32)
    scratch = [
        pltpu.VMEM((tile.K_shared, tile.N), dtype),
        *[accumulator] * len(weights),
        *[mxfp4_product.scale_numbers(tile.N, K) if is_mxfp4 else scale_rows(tile, bf16)] * len(weights),
    ]
    if not interpret:
        # Else XLA, which sees no more than an operand, copies all experts' weights to vector memory beforehand.
        weights = jax.tree.map(lambda array: pltpu.with_memory_space_constraint(array, pltpu.HBM), weights)
    arrays = jax.tree.leaves(weights)
    options: dict[str, Any] = {
        # The last block may end beyond the rows; what it has there belongs to no group.
        "out_shape": jax.ShapeDtypeStruct((tokens, N), dtype),
        "cost_estimate": pl.CostEstimate(
            flops=2 * tokens * K * N * len(weights),
            transcendentals=0,
            bytes_accessed=sum(weight.nbytes for weight in weights) + tokens * (K + N) * dtype.itemsize,
        ),
        "name": f"{'mxfp4' if is_mxfp4 else 'int4'}_{name}",
        "interpret": interpret,
    }

    def specs(visit: Callable[[Any, Any], tuple[Any, Any, Any]]) -> tuple[list[pl.BlockSpec], pl.BlockSpec]:
        """Returns the specs of x, the weights and the result; `visit` maps a place in the grid, and what follows it, to
        a tile of N, a block and a group."""

        def spec(shape: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda *at: index(*visit(*at)))

        def weight(rows: int) -> pl.BlockSpec:
            return spec((None, rows, tile.N), lambda n, block, group: (group, 0, n))

        inputs = [spec((tile.block, K), lambda n, block, group: (block, 0))]
        inputs += [weight(K // code.inputs_per_row), weight(K // GROUP_SIZE)] * len(weights)
        return inputs, spec((tile.block, tile.N), lambda n, block, group: (block, n))

    if groups is None:
        in_specs, out_spec = specs(lambda n, v, block, group, *_: (n, block[v], group[v]))
        visit = every_block(tokens, blocks, tile.block)
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=5,
                grid=(columns, visit.total[0]),
                in_specs=in_specs,
                out_specs=out_spec,
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            **options,
        )(*visit, x, *arrays)

    padded = blocks * tile.block  # A pipeline has whole blocks.
    options["out_shape"] = jax.ShapeDtypeStruct((padded, N), dtype)

    def all_visits(sizes_ref: Any, offset_ref: Any, *refs: Any) -> None:
        num = 1 + len(arrays)
        operands, out_ref, visit, scratch = refs[:num], refs[num], BlockVisits(*refs[num + 1 :][:5]), refs[num + 6 :]
        list_visits(sizes_ref, offset_ref, visit, blocks, tile.block)
        each = -(-columns // cores)
        first = pl.program_id(0) * each if cores > 1 else 0
        in_specs, out_spec = specs(lambda n, v: (first + n, visit.block[v], visit.group[v]))

        def step(*refs: Any) -> None:
            kernel(*visit, *refs, *scratch)

        with tpu_in_use():
            pltpu.emit_pipeline(
                step,
                grid=(jnp.minimum(columns - first, each), visit.total[0]),
                in_specs=in_specs,
                out_specs=[out_spec],
            )(*operands, out_ref)

    visits = pltpu.SMEM((blocks + num_local,), jnp.int32)
    edges = pltpu.SMEM((num_local,), jnp.int32)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    x = x if padded == tokens else jnp.pad(x, ((0, padded - tokens), (0, 0)))
    sizes, offset = groups
    if not interpret:
        x, sizes = (pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in (x, sizes))
    out = pl.pallas_call(
        all_visits,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores,) if cores > 1 else (),
            in_specs=[hbm] * (1 + len(arrays)),
            out_specs=hbm,
            scratch_shapes=[visits, visits, pltpu.SMEM((1,), jnp.int32), edges, edges, *scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) if cores > 1 else (), vmem_limit_bytes=VMEM_LIMIT
        ),
        **options,
    )(sizes, offset.reshape(1), x, *arrays)
    return out[:tokens]


def _kernel(
    block_ref: Any,
    group_ref: Any,
    count_ref: Any,
    start_ref: Any,
    end_ref: Any,
    x_ref: Any,
    *refs: Any,
    tile: Tiles,
    code: Code,
    few: bool,
    more: bool,
    dtype: Any,
    combine: Callable[..., Array],
    bf16: bool,
    num_weights: int,
) -> None:
    weights, (out_ref, scaled_ref, *scratch) = refs[: 2 * num_weights], refs[2 * num_weights :]
    totals, scale_scratch = scratch[:num_weights], scratch[num_weights:]
    scales = weights[1::2]
    if code is MXFP4:
        for stored, numbers in zip(scales, scale_scratch, strict=True):
            mxfp4_product.read_scales(stored[...], numbers)
        scales = tuple(scale_scratch)
    operands = tuple(map(MatrixOperand, weights[::2], scales, totals, scale_scratch))
    v = pl.program_id(1)
    last_visit = v == count_ref[0] - 1
    begins = (v == 0) | (block_ref[v] != block_ref[jnp.maximum(v - 1, 0)])
    ends = last_visit | (block_ref[v] != block_ref[jnp.where(last_visit, v, v + 1)])

    def for_windows(wanted: Array, use: Callable[[Any], None]) -> None:
        """Calls `use` with a window at a time: less code, and a loop whose turns can be counted, unlike a branch."""
        turns = jnp.where(wanted, tile.block // tile.rows, 0)
        lax.fori_loop(0, turns, lambda j, _: use(pl.ds(pl.multiple_of(j * tile.rows, tile.rows), tile.rows)), None)

    def zero(window: Any) -> None:
        for total in totals:
            total[window, :] = jnp.zeros((tile.rows, tile.N), jnp.float32)

    for_windows(begins, zero)

    start, end = (
        jnp.clip(edge[group_ref[v]] - block_ref[v] * tile.block, 0, tile.block) for edge in (start_ref, end_ref)
    )

    low = start // tile.rows
    high = jnp.where(end > start, pl.cdiv(end, tile.rows), low)
    first_few = pl.multiple_of(start // FEW_ROWS * FEW_ROWS, FEW_ROWS) if more else 0

    def take_rows(first: Array, count: int, inputs: Any) -> Array:
        """Returns the group's rows of a window, with zeros for rows of other groups."""
        number = first + lax.broadcasted_iota(jnp.int32, (count, 1), 0)
        if count < tile.rows and more:
            # Rows of bf16 are loaded from multiples of 16, and few rows begin at those of 8.
            low = pl.multiple_of(first // tile.rows * tile.rows, tile.rows)
            both = x_ref[pl.ds(low, tile.rows), inputs].astype(jnp.float32)
            rows = jnp.where(first == low, both[:count], both[count:])
        else:
            rows = x_ref[pl.ds(first, count), inputs]
            rows = rows.astype(jnp.float32) if count < tile.rows else rows
        return jnp.where((number >= start) & (number < end), rows, 0)

    rows = GroupRows(take_rows, low, high, first_few, (end > start) & (end - first_few <= FEW_ROWS))
    add_products(rows, operands, scaled_ref, tile, code, few=few, more=more, dtype=dtype, bf16=bf16)

    def write(window: Any) -> None:
        out_ref[window, :] = combine(*(total[window, :] for total in totals)).astype(out_ref.dtype)

    for_windows(ends, write)
