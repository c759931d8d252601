"""Lists the calls whose kernels are compiled for GPUs: Kimi Linear's and K2.5's shapes, few rows and many."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as ops
from cuda.kernels import KernelCase

BF16, F32, INT32, INT4 = (
    partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32, jnp.int32, jnp.int4)
)
Call = tuple[Callable[..., Any], tuple[Any, ...]]


def _mixture(tokens: int, K: int, N: int, experts: int, int4: bool) -> Call:
    def weight(out: int, in_: int) -> Any:
        if not int4:
            return BF16((experts, out, in_))
        return ops.Int4(INT4((experts, in_, out)), BF16((experts, in_ // 32, out)))

    routes = INT32((tokens, 8)), F32((tokens, 8))
    return ops.mixture, (BF16((tokens, K)), *routes, weight(N, K), weight(N, K), weight(K, N))


def _decode(rows: int, heads: int) -> Call:
    cache = BF16((rows * 64, 576, 128)), INT32((rows, 64)), INT32((rows,))
    return partial(ops.mla_decode, latent=512, scale=0.1), (BF16((rows, heads, 576)), *cache)


def _prefill(tokens: int, heads: int, width: int, values: int) -> Call:
    positions = INT32((1, tokens))

    def prefill(*arrays: Any) -> Any:
        q, k, v, q_positions, kv_positions = arrays
        marks = {"q_positions": q_positions, "kv_positions": kv_positions}
        return ops.mla_prefill(q, k, v, **marks, scale=0.1, return_lse=True)

    key = BF16((1, tokens, heads, width))
    return prefill, (key, key, BF16((1, tokens, heads, values)), positions, positions)


def _step(rows: int) -> Call:
    key = BF16((rows, 32, 128))
    state = F32((rows, 32, 128, 128))
    return partial(ops.kda_step, normalize_qk=True), (key, key, key, F32(key.shape), BF16((rows, 32)), state)


def _prompt(tokens: int) -> Call:
    key = BF16((1, tokens, 32, 128))
    return partial(ops.kda, normalize_qk=True), (key, key, key, F32(key.shape), BF16((1, tokens, 32)))


# Quick in plain JAX on a CPU
TOYS = (
    KernelCase("mixture, 4 tokens", partial(_mixture, 4, 64, 32, 16, False)),
    KernelCase("mixture in INT4, 4 tokens", partial(_mixture, 4, 64, 32, 16, True)),
    KernelCase("mla_decode of a row, 2 heads", partial(_decode, 1, 2)),
    KernelCase("kda_step of a row", partial(_step, 1)),
)
LINEAR, K2 = (2304, 1024, 256), (7168, 2048, 48)
CASES = (
    KernelCase("mixture of Kimi Linear, 4 tokens", partial(_mixture, 4, *LINEAR, False)),
    KernelCase("mixture of Kimi Linear in INT4, 4 tokens", partial(_mixture, 4, *LINEAR, True)),
    KernelCase("mixture of Kimi Linear, 2,048 tokens", partial(_mixture, 2048, *LINEAR, False)),
    KernelCase("mixture of Kimi Linear in INT4, 2,048 tokens", partial(_mixture, 2048, *LINEAR, True)),
    KernelCase("mixture of 48 experts of K2 in INT4, 64 tokens", partial(_mixture, 64, *K2, True)),
    KernelCase("mla_decode of 4 rows, 32 heads", partial(_decode, 4, 32)),
    KernelCase("mla_decode of 64 rows, 8 heads", partial(_decode, 64, 8)),
    KernelCase("mla_prefill of 2,048 tokens", partial(_prefill, 2048, 32, 192, 128)),
    KernelCase("mla_prefill of 4,096 patches", partial(_prefill, 4096, 16, 72, 72)),
    KernelCase("kda_step of 4 rows", partial(_step, 4)),
    KernelCase("kda of 2,048 tokens", partial(_prompt, 2048)),
)
