"""Grouped matmul and SwiGLU with INT4 weights as one Pallas kernel for TPUs.

Rows are cut in blocks; a *visit* is a pair of a block and a group with rows in it, and the grid is (N tiles, visits),
the number of visits dynamic. A step takes all K rows of an N tile of the visit's group, as half bytes: up to 4 MiB, so
that the 280 or so bundles of a step's own cost little. Part after part is unpacked and scaled in vector memory, and the
group's rows of the block are multiplied by it, a window at a time, into a float32 accumulator of the whole block: rows
of other groups enter as zeros, so that nothing has to be merged and groups may begin anywhere. A block of x stays in
vector memory for all its visits; weights are streamed once per visit.

A weight is bf16(code * scale). In bf16 arithmetic (v6e on) the product rounds to that by itself; v5 has none, and
rounds the float32 product. Float32 x is multiplied at HIGHEST precision, bf16 x in one pass with float32 accumulation.

Windows of more than 64 rows spill: their product is larger than the register file, and the spills fit beside the matrix
unit's work. (Fewer rows at a time leave it idle for longer.)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int4, Int32

from pallas_kernels.chip import chip
from pallas_kernels.grouped_matmul.blocks import local_groups
from pallas_kernels.int4_matmul.packing import GROUP_SIZE

Quantised = tuple[Int4[Array, "E K N"], Float[Array, "E K32 N"]]

# A part's scales must fill a tile of memory: 16 rows of 32 inputs each.
K_PART = 512
LARGEST_ODD_K = 2048
# Of x in a block, of codes in a step, and weights unpacked at a time.
BLOCK_BYTES, STEP_BYTES, PART_WEIGHTS = 2**23, 2**22, 2**20


class Tiles(NamedTuple):
    """Rows of a block, rows multiplied at once, outputs of a step, and inputs unpacked at once."""

    block: int
    rows: int
    N: int
    K_part: int


def unsupported(x: Array, codes: Array) -> str | None:
    """Why the kernel cannot take these shapes and dtypes."""
    (tokens, K), N = x.shape, codes.shape[-1]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, expected bfloat16 or float32"
    if tokens == 0:
        return "x has no rows"
    if N % 128:
        return f"N is {N}, expected a multiple of 128"
    if K % K_PART and (K % 64 or K > LARGEST_ODD_K):
        return f"K is {K}, expected a multiple of {K_PART}, or of 64 up to {LARGEST_ODD_K}"
    return None


def tiles(tokens: int, K: int, N: int, groups: int, dtype: Any) -> Tiles:
    """Sizes for `tokens` rows over `groups` groups. Rows are multiplied in numbers near a group's mean."""
    mean = -(-tokens // groups)
    rows = next(n for n in (16, 32, 64, 128, 256, 512) if n >= min(mean, 512))
    most = max(rows, BLOCK_BYTES // (K * jnp.dtype(dtype).itemsize) // rows * rows)
    outputs = max(n for n in range(128, N + 1, 128) if N % n == 0 and (n == 128 or K * n <= 2 * STEP_BYTES))
    parts = [part for part in range(K_PART, K + 1, K_PART) if K % part == 0 and part * outputs <= PART_WEIGHTS]
    K_part = max(parts, default=K_PART if K % K_PART == 0 else K)
    return Tiles(min(-(-tokens // rows) * rows, most, 512), rows, outputs, K_part)


def int4_grouped_matmul(
    x: Float[Array, "T K"],
    codes: Int4[Array, "E K N"],
    scales: Float[Array, "E K32 N"],
    group_sizes: Int32[Array, "all"],
    group_offset: Int[Array, ""],
    *,
    interpret: Any = False,
) -> Float[Array, "T N"]:
    """See `api.int4_grouped_matmul`."""
    return _call(
        x, [(codes, scales)], group_sizes, group_offset, lambda y: y, name="int4_grouped_matmul", interpret=interpret
    )


def int4_grouped_swiglu(
    x: Float[Array, "T K"],
    gate: Quantised,
    up: Quantised,
    group_sizes: Int32[Array, "all"],
    group_offset: Int[Array, ""],
    *,
    interpret: Any = False,
) -> Float[Array, "T N"]:
    """See `api.int4_grouped_swiglu`."""

    def combine(gate: Array, up: Array) -> Array:
        return gate * jax.nn.sigmoid(gate) * up

    return _call(x, [gate, up], group_sizes, group_offset, combine, name="int4_grouped_swiglu", interpret=interpret)


class Visits(NamedTuple):
    """Of each visit its block, its group, and the group's first row and end in the block; and how many there are."""

    block: Int32[Array, "visits"]
    group: Int32[Array, "visits"]
    start: Int32[Array, "visits"]
    end: Int32[Array, "visits"]
    total: Int32[Array, ""]


def visits(
    group_sizes: Int32[Array, "all"], group_offset: Int[Array, ""], num_local: int, blocks: int, size: int
) -> Visits:
    """Pairs of a block and a local group with rows in it, block by block; a block without any visits group 0, whose
    rows there are none, so that every block is written."""
    starts, ends = local_groups(group_sizes, group_offset, num_local)
    first = size * jnp.arange(blocks, dtype=jnp.int32)[:, None]
    start, end = jnp.clip(starts - first, 0, size), jnp.clip(ends - first, 0, size)
    wanted = end > start
    wanted = wanted.at[:, 0].set(wanted[:, 0] | ~wanted.any(axis=1))
    (chosen,) = jnp.nonzero(wanted.reshape(-1), size=blocks + num_local, fill_value=0)
    chosen = chosen.astype(jnp.int32)
    return Visits(
        chosen // num_local,
        chosen % num_local,
        start.reshape(-1)[chosen],
        end.reshape(-1)[chosen],
        jnp.sum(wanted, dtype=jnp.int32),
    )


def _call(
    x: Float[Array, "T K"],
    weights: list[Quantised],
    group_sizes: Int32[Array, "all"],
    group_offset: Int[Array, ""],
    combine: Callable[..., Array],
    *,
    name: str,
    interpret: Any,
) -> Float[Array, "T N"]:
    (tokens, K), (num_local, _, N) = x.shape, weights[0][0].shape
    tile = tiles(tokens, K, N, num_local, x.dtype)
    blocks = -(-tokens // tile.block)
    x = jnp.pad(x, [(0, blocks * tile.block - tokens), (0, 0)])
    visit = visits(group_sizes, group_offset, num_local, blocks, tile.block)

    def weight(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, tile.N), lambda n, v, block, group, *_: (group[v], 0, n))

    accumulator = pltpu.VMEM((tile.block, tile.N), jnp.float32)
    if not interpret:
        # Else XLA, which sees no more than an operand, copies all experts' weights to vector memory beforehand.
        weights = [
            (
                pltpu.with_memory_space_constraint(codes, pltpu.HBM),
                pltpu.with_memory_space_constraint(scales, pltpu.HBM),
            )
            for codes, scales in weights
        ]
    cost = pl.CostEstimate(
        flops=2 * tokens * K * N * len(weights),
        transcendentals=0,
        bytes_accessed=sum(codes.size // 2 + scales.nbytes for codes, scales in weights)
        + tokens * (K + N) * x.dtype.itemsize,
    )
    out = pl.pallas_call(
        functools.partial(_kernel, tile=tile, num_weights=len(weights), combine=combine, bf16=chip().bf16_vpu),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(N // tile.N, visit.total),
            in_specs=[
                pl.BlockSpec((tile.block, K), lambda n, v, block, *_: (block[v], 0)),
                *[weight(K), weight(K // GROUP_SIZE)] * len(weights),
            ],
            out_specs=pl.BlockSpec((tile.block, tile.N), lambda n, v, block, *_: (block[v], n)),
            scratch_shapes=[pltpu.VMEM((tile.K_part, tile.N), x.dtype), *[accumulator] * len(weights)],
        ),
        out_shape=jax.ShapeDtypeStruct((blocks * tile.block, N), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        cost_estimate=cost,
        name=name,
        interpret=interpret,
    )(*visit[:4], visit.total[None], x, *(array for pair in weights for array in pair))
    return out[:tokens]


def _kernel(
    block_ref: Any,
    group_ref: Any,
    start_ref: Any,
    end_ref: Any,
    count_ref: Any,
    x_ref: Any,
    *refs: Any,
    tile: Tiles,
    num_weights: int,
    combine: Callable[..., Array],
    bf16: bool,
) -> None:
    weights, out_ref, scaled_ref, totals = (
        refs[: 2 * num_weights],
        refs[2 * num_weights],
        refs[2 * num_weights + 1],
        refs[2 * num_weights + 2 :],
    )
    v = pl.program_id(1)
    last_visit = v == count_ref[0] - 1
    begins = (v == 0) | (block_ref[v] != block_ref[jnp.maximum(v - 1, 0)])
    ends = last_visit | (block_ref[v] != block_ref[jnp.where(last_visit, v, v + 1)])

    @pl.when(begins)
    def _zero() -> None:
        for total in totals:
            total[...] = jnp.zeros_like(total)

    start, end = start_ref[v], end_ref[v]

    low = start // tile.rows
    high = jnp.where(end > start, pl.cdiv(end, tile.rows), low)

    def multiply(window: Array, inputs: Any, matrix: Array, total: Any) -> None:
        first = pl.multiple_of(window * tile.rows, tile.rows)
        rows = pl.ds(first, tile.rows)
        number = first + lax.broadcasted_iota(jnp.int32, (tile.rows, 1), 0)
        own = jnp.where((number >= start) & (number < end), x_ref[rows, inputs], 0).astype(matrix.dtype)
        precision = lax.Precision.HIGHEST if own.dtype == jnp.float32 else lax.Precision.DEFAULT
        total[rows, :] += jnp.dot(own, matrix, precision=precision, preferred_element_type=jnp.float32)

    def over_parts(use: Callable[[Any, Array, Any], None]) -> None:
        groups = tile.K_part // GROUP_SIZE

        def part(k: Array, _: None) -> None:
            inputs = pl.ds(pl.multiple_of(k * tile.K_part, tile.K_part), tile.K_part)
            of_groups = pl.ds(pl.multiple_of(k * groups, groups), groups)
            for codes, scales, total in zip(weights[::2], weights[1::2], totals, strict=True):
                use(inputs, _dequantise(codes[inputs, :], scales[of_groups, :], x_ref.dtype, bf16), total)

        lax.fori_loop(0, x_ref.shape[1] // tile.K_part, part, None)

    @pl.when(high - low <= 1)
    def _one_window() -> None:
        over_parts(lambda inputs, matrix, total: multiply(low, inputs, matrix, total))

    @pl.when(high - low > 1)
    def _windows() -> None:
        def use(inputs: Any, matrix: Array, total: Any) -> None:
            scaled_ref[...] = matrix
            lax.fori_loop(low, high, lambda j, _: multiply(j, inputs, scaled_ref[...], total), None)

        over_parts(use)

    @pl.when(ends)
    def _write() -> None:
        out_ref[...] = combine(*(total[...] for total in totals)).astype(out_ref.dtype)


def _dequantise(codes: Array, scales: Array, dtype: Any, bf16: bool) -> Array:
    """bf16(code * scale) in `dtype`, [K tile, N tile]."""
    K, N = codes.shape
    wide = jnp.bfloat16 if bf16 else jnp.float32
    grouped = codes.astype(wide).reshape(K // GROUP_SIZE, GROUP_SIZE, N)
    product = grouped * scales.astype(wide)[:, None, :]
    return product.reshape(K, N).astype(jnp.bfloat16).astype(dtype)
