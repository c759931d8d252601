"""Lists cases of a decode step's mixture: 64 tokens and two rows an expert for K2 (INT4) and Kimi Linear (bf16), and
256 tokens and 16 rows an expert for K2. HBM bytes are those of the experts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Dense, Int4, Weight, mixture
from pallas_kernels.grouped_matmul.int4_product import FEW_ROWS
from pallas_kernels.mixture.stages import STAGES, Int4Stage
from tpu.case import Case

CHOICES, EXPERTS = 8, 8


def _weight(in_: int, out: int, int4: bool) -> Weight:
    if not int4:
        return Dense(jax.ShapeDtypeStruct((EXPERTS, out, in_), jnp.bfloat16))
    codes = jax.ShapeDtypeStruct((EXPERTS, in_, out), jnp.int4)
    return Int4(codes, jax.ShapeDtypeStruct((EXPERTS, in_ // 32, out), jnp.bfloat16))


def _products(of: Any, steps: int, rows: int) -> list[int]:
    """Returns the trips of a stage's products: parts of a step for groups of few rows, on chips that treat those apart;
    windows of other groups, and their parts."""
    if not isinstance(of, Int4Stage):
        return [steps]
    windows = [steps, steps * of.inputs // of.tiles.K_part]
    if not of.few:
        return windows
    return [steps * of.inputs // of.tiles.K_part, 0, 0] if rows <= FEW_ROWS else [0, *windows]


def _trips(K: int, N: int, int4: bool, tokens: int, rows: int) -> tuple[int, ...]:
    """Returns the trips of the kernel's loops: the grid; windows of the sums to zero; rows to gather; for gate and up,
    windows to zero, products and windows to write; for down, windows to zero, products and rows to add."""
    stage = STAGES[Int4 if int4 else Dense]
    into, out_of = (stage.choose(_weight(*size, int4), jnp.bfloat16, n) for size, n in (((K, N), 2), ((N, K), 1)))
    steps = EXPERTS * N // into.tile, EXPERTS * K // out_of.tile
    into_loops, out_loops = _products(into, steps[0], rows), _products(out_of, steps[1], rows)
    return (
        sum(steps),
        tokens // 16,
        EXPERTS * rows,
        *[steps[0]] * 2,
        *into_loops,
        steps[0],
        steps[1],
        *out_loops,
        rows * steps[1],
    )


def _case(name: str, K: int, N: int, int4: bool, tokens: int, rows: int) -> Case:
    def build() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        def run(*arrays: Any) -> Any:
            return mixture(*arrays, implementation="mosaic_tpu")

        into, out_of = _weight(K, N, int4), _weight(N, K, int4)
        routes = [jax.ShapeDtypeStruct((tokens, CHOICES), dtype) for dtype in (jnp.int32, jnp.float32)]
        return run, (jax.ShapeDtypeStruct((tokens, K), jnp.bfloat16), *routes, into, into, out_of)

    moved = EXPERTS * 3 * K * N * (0.5625 if int4 else 2.0)
    return Case(
        name=name,
        kernel="mixture",
        build=build,
        trips=lambda: _trips(K, N, int4, tokens, rows),
        units=moved / 1024,
        unit="KiB of weights",
        hbm_bytes=moved,
        flops=2.0 * EXPERTS * rows * 3 * K * N,
    )


CASES = [
    _case(f"mixture of {EXPERTS} INT4 experts, 7168x2048", 7168, 2048, True, 64, 2),
    _case(f"mixture of {EXPERTS} INT4 experts of 16 rows, 7168x2048", 7168, 2048, True, 256, 16),
    _case(f"mixture of {EXPERTS} experts, 2304x1024", 2304, 1024, False, 64, 2),
]
