"""Lists cases of dense grouped matmuls: Kimi Linear's experts in bf16, few rows and many. HBM bytes are those of the
matrices, and for gradients of the rows too."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import grouped_glu, grouped_matmul
from pallas_kernels.grouped_matmul import mosaic_gradients, mosaic_tpu
from tpu.case import Case

GROUPS = 32


def _case(op: Any, K: int, N: int, rows: int) -> Case:
    """Returns the case with `rows` rows in each group, which fill whole windows or are within one."""
    of_a_group = 2 if op is grouped_glu else 1

    def build() -> tuple[Any, tuple[Any, ...]]:
        weight = jax.ShapeDtypeStruct((GROUPS, N, K), jnp.bfloat16)
        x, sizes = jax.ShapeDtypeStruct((rows * GROUPS, K), jnp.bfloat16), jax.ShapeDtypeStruct((GROUPS,), jnp.int32)
        return functools.partial(op, implementation="mosaic_tpu"), (x, *[weight] * of_a_group, sizes)

    def trips() -> tuple[int, ...]:
        steps = GROUPS * (N // mosaic_tpu.outputs_of_a_step(N, K, 2))
        return (steps, steps * max(1, rows // mosaic_tpu.window_rows(rows * GROUPS, GROUPS)))

    weights = of_a_group * GROUPS * N * K
    return Case(
        name=f"{op.__name__} {K}x{N} M={rows} x {GROUPS}",
        kernel=op.__name__,
        build=build,
        trips=trips,
        units=2 * weights / 1024,
        unit="KiB of weights",
        hbm_bytes=2.0 * weights,
        flops=2.0 * weights * rows,
    )


def _gradient_case(kernel: str, K: int, N: int, rows: int) -> Case:
    """Returns the case of one gradient of `grouped_matmul`, for groups as in `_case`."""
    tokens, of_rows = rows * GROUPS, kernel == "grouped_rows_gradient"

    def build() -> tuple[Any, tuple[Any, ...]]:
        x, dy = (jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16) for width in (K, N))
        weight, sizes = (
            jax.ShapeDtypeStruct((GROUPS, N, K), jnp.bfloat16),
            jax.ShapeDtypeStruct((GROUPS,), jnp.int32),
        )

        def gradient(x, weight, sizes, dy):
            product = functools.partial(grouped_matmul, group_sizes=sizes, implementation="mosaic_tpu")
            return jax.vjp(product, x, weight)[1](dy)[0 if of_rows else 1]

        return gradient, (x, weight, sizes, dy)

    def trips() -> tuple[int, ...]:
        window = mosaic_tpu.window_rows(tokens, GROUPS)
        tiles = N // mosaic_gradients.tile_side(N) * (K // mosaic_gradients.tile_side(K))
        steps = GROUPS * (K // mosaic_tpu.outputs_of_a_step(K, N, 2) if of_rows else tiles)
        return (steps, steps * max(1, rows // window))

    weights = GROUPS * N * K
    return Case(
        name=f"{kernel} {K}x{N} M={rows} x {GROUPS}",
        kernel=kernel,
        build=build,
        trips=trips,
        units=2 * weights / 1024,
        unit="KiB of weights",
        hbm_bytes=2.0 * (weights + tokens * (N + K)),
        flops=2.0 * weights * rows,
    )


CASES = [
    _case(op, K, N, rows) for op, K, N in ((grouped_glu, 2304, 1024), (grouped_matmul, 1024, 2304)) for rows in (8, 512)
] + [
    _gradient_case(kernel, 2304, 1024, rows)
    for kernel in ("grouped_rows_gradient", "grouped_weights_gradient")
    for rows in (8, 512)
]
