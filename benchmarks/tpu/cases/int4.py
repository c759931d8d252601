"""Lists cases of the INT4 matmul and its grouped forms, and of MXFP4's: K2's and K3's expert shapes, few and many rows.
HBM bytes are those of codes and scales."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Int4, Mxfp4, grouped_glu, grouped_matmul, matmul
from pallas_kernels.grouped_matmul import mosaic_int4
from pallas_kernels.grouped_matmul.int4_product import FEW_ROWS, MXFP4, int4_code
from pallas_kernels.hardware import chip
from tpu.case import Case

GROUPS = 8


def _arguments(K: int, N: int, rows: int, groups: int | None) -> tuple[Any, Int4]:
    lead = () if groups is None else (groups,)
    weight = Int4(
        jax.ShapeDtypeStruct((*lead, K, N), jnp.int4),
        jax.ShapeDtypeStruct((*lead, K // 32, N), jnp.bfloat16),
    )
    return jax.ShapeDtypeStruct((rows * (groups or 1), K), jnp.bfloat16), weight


def _mxfp4_arguments(K: int, N: int, rows: int, groups: int) -> tuple[Any, Mxfp4]:
    codes, scales = (jax.ShapeDtypeStruct((groups, K // per_row, N), jnp.uint8) for per_row in (2, 32))
    return jax.ShapeDtypeStruct((rows * groups, K), jnp.bfloat16), Mxfp4(codes, scales)


def _trips(K: int, N: int, rows: int, groups: int | None, matrices: int, is_mxfp4: bool = False) -> tuple[int, ...]:
    """Returns the trips of the kernel's loops.

    The loops are: of groups, those on other devices, those here, their visits, and blocks after the last; the grid;
    windows of a block to zero; parts of a step for a group of few rows, by their number; parts for a group within one
    window; parts for a group in several windows, and those windows; windows of a block to write.
    A group's rows begin at a multiple of their number here, so that all visits are of one kind.
    """
    is_grouped, groups = groups is not None, groups or 1
    few_rows = is_grouped or rows <= FEW_ROWS
    code = MXFP4 if is_mxfp4 else int4_code(chip())
    tile = mosaic_int4.tiles(rows * groups, K, N, groups, jnp.bfloat16, part_weights=code.part_weights)
    columns, blocks = N // tile.N, -(-rows * groups // tile.block)
    visits = max(groups, blocks)
    steps, block_windows = columns * visits, columns * blocks * tile.block // tile.rows
    parts, shared_parts = steps * K // tile.K_part, steps * K // tile.K_shared
    few_parts, parts = parts, parts if code.large_window else shared_parts
    windows = min(rows, tile.block) // tile.rows
    few_rows &= mosaic_int4.uses_block_diagonal(tile, jnp.bfloat16, is_mxfp4)
    few = [few_parts * (rows <= FEW_ROWS)] if few_rows else []
    listing = (0, groups, visits, 0) if is_grouped else ()
    if few and rows * groups <= FEW_ROWS:
        return (*listing, steps, block_windows, *few, block_windows)
    one, shared = (0, 0) if any(few) else (parts, 0) if windows <= 1 else (0, shared_parts)
    multiplied = [shared * windows] * matrices
    return (*listing, steps, block_windows, *few, one, shared, *multiplied, block_windows)


def _case(op: Callable[..., Any], name: str, K: int, N: int, rows: int, groups: int | None) -> Case:
    of_a_group = 2 if op is grouped_glu else 1
    matrices = of_a_group * (groups or 1)

    def build() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        run = functools.partial(op, implementation="mosaic_tpu")
        x, weight = _arguments(K, N, rows, groups)
        if groups is None:
            return run, (x, weight)
        sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
        return run, (x, *[weight] * of_a_group, sizes)

    return Case(
        name=name,
        kernel="int4_grouped_glu" if op is grouped_glu else "int4_grouped_matmul",
        build=build,
        trips=lambda: _trips(K, N, rows, groups, of_a_group),
        units=matrices * K * N * 0.5625 / 1024,
        unit="KiB of weights",
        hbm_bytes=matrices * K * N * 0.5625,
        flops=2.0 * matrices * rows * K * N,
    )


def _mxfp4_case(K: int, N: int, rows: int) -> Case:
    def build() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        x, weight = _mxfp4_arguments(K, N, rows, GROUPS)
        run = functools.partial(grouped_matmul, implementation="mosaic_tpu")
        return run, (x, weight, jax.ShapeDtypeStruct((GROUPS,), jnp.int32))

    nbytes = GROUPS * K * N * 17 / 32
    return Case(
        name=f"mxfp4_grouped_matmul {K}x{N} M={rows} x {GROUPS}",
        kernel="mxfp4_grouped_matmul",
        build=build,
        trips=lambda: _trips(K, N, rows, GROUPS, 1, is_mxfp4=True),
        units=nbytes / 1024,
        unit="KiB of weights",
        hbm_bytes=nbytes,
        flops=2.0 * GROUPS * rows * K * N,
    )


SHAPES = ((7168, 2048), (2048, 7168))
CASES = [
    *[_case(matmul, f"int4_matmul {K}x{N} M={M}", K, N, M, None) for K, N in SHAPES for M in (8, 16, 512)],
    *[
        _case(grouped_matmul, f"int4_grouped_matmul {K}x{N} M={M} x {GROUPS}", K, N, M, GROUPS)
        for K, N in SHAPES
        for M in (8, 16, 512)
    ],
    *[_mxfp4_case(*shape, M) for shape in ((7168, 2048), (3584, 3072), (3072, 3584)) for M in (8, 16, 512)],
    *[_case(grouped_glu, f"int4_grouped_glu 7168x2048 M={M} x {GROUPS}", 7168, 2048, M, GROUPS) for M in (8, 16)],
]
