"""Attention of many queries to many keys as one TPU kernel: flash attention (arXiv 2205.14135, arXiv 2307.08691).

A grid step is a block of queries and one of keys of one head, keys innermost; maximum, sum and output stay in VMEM
until a query block has met every key block. Heads come first, so that a head's tokens are rows, and values have their
tokens along the lanes: the mask over keys is then a row for scores and for values alike. Positions and segments of the
queries come as two columns, those of the keys as two rows.

Two blocks of which no query can see a key are skipped: the smallest and largest position and segment of each block are
in scalar memory. Keys that no query of a block sees are zeroed in it, for they may hold anything and 0 * NaN is NaN.

Spills: a block's float32 scores, 256 vectors, wait in memory between maximum, exponential and product (some 2,400
stores and loads in 2,160 bundles on v6e).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import with_gradient
from pallas_kernels.mla_attention import xla

QUERIES, KEYS = 512, 512
LANES = 128
# Below every score, yet finite: the difference to a score of -inf is then no NaN.
LOWEST = -1e37


def unsupported(q: Array, k: Array, v: Array) -> str | None:
    """Why the prefill kernel cannot serve these arguments; None where it can."""
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "it is empty"
    if q.shape[3] % 64 or v.shape[3] % 64:
        return f"heads have {q.shape[3]} and {v.shape[3]} values, expected multiples of 64"
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
    interpret: bool | pltpu.InterpretParams,
) -> tuple[Float[Array, "B S H Dv"], Float[Array, "B S H"]]:
    """See `api.mla_prefill`; returns the output in v's dtype and the float32 log-sum-exp. Gradients are `xla`'s."""
    run = with_gradient(partial(_forward, scale=scale, interpret=interpret), partial(xla.mla_prefill, scale=scale))
    return run(q, k, v, q_positions, kv_positions, q_segments, kv_segments)


def _forward(q, k, v, q_positions, kv_positions, q_segments, kv_segments, *, scale, interpret):
    (batch, length, heads, width), values = q.shape, v.shape[3]
    queries, keys = (min(most, -(-size // LANES) * LANES) for most, size in ((QUERIES, length), (KEYS, k.shape[1])))
    q_rows, k_rows = _padded(jnp.moveaxis(q, 2, 1), queries, 2), _padded(jnp.moveaxis(k, 2, 1), keys, 2)
    v_columns = _padded(jnp.transpose(v, (0, 2, 3, 1)), keys, 3)
    q_marks = _padded(jnp.stack([q_positions, q_segments], axis=2), queries, 1, -1)
    kv_marks = _padded(jnp.stack([kv_positions, kv_segments], axis=1), keys, 2, -1)
    q_blocks, kv_blocks = q_marks.shape[1] // queries, kv_marks.shape[2] // keys

    def block(shape, *axes):
        """A block of `shape` whose place along each axis is that of the named grid axis, or 0."""
        return pl.BlockSpec(shape, lambda *at: tuple(0 if axis is None else at[axis] for axis in axes))

    out, lse = pl.pallas_call(
        partial(_prefill_kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, q_blocks, kv_blocks),
            in_specs=[
                block((1, queries, 2), 0, 2, None),
                block((1, 2, keys), 0, None, 3),
                block((1, 1, queries, width), 0, 1, 2, None),
                block((1, 1, keys, width), 0, 1, 3, None),
                block((1, 1, values, keys), 0, 1, None, 3),
            ],
            out_specs=[block((1, 1, queries, values), 0, 1, 2, None), block((1, 1, queries, 1), 0, 1, 2, None)],
            scratch_shapes=[
                pltpu.VMEM((queries, 1), jnp.float32),
                pltpu.VMEM((queries, LANES), jnp.float32),
                pltpu.VMEM((queries, values), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*q_rows.shape[:3], values), v.dtype),
            jax.ShapeDtypeStruct((*q_rows.shape[:3], 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        interpret=interpret,
        name="mla_prefill",
    )(
        _extremes(q_marks.reshape(batch, q_blocks, queries, 2), 2),
        _extremes(kv_marks.reshape(batch, 2, kv_blocks, keys).transpose(0, 2, 3, 1), 2),
        q_marks,
        kv_marks,
        q_rows,
        k_rows,
        v_columns,
    )
    return jnp.moveaxis(out, 1, 2)[:, :length], jnp.moveaxis(lse[..., 0], 1, 2)[:, :length]


def _prefill_kernel(q_ends, kv_ends, q_marks, kv_marks, q, k, v, out, lse, top, total, acc, *, scale):
    batch, keys, blocks = pl.program_id(0), pl.program_id(3), pl.num_programs(3)
    # Where each block's four numbers begin: first and last position, first and last segment.
    mine = 4 * (batch * pl.num_programs(2) + pl.program_id(2))
    theirs = 4 * (batch * blocks + keys)

    @pl.when(keys == 0)
    def _():
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    earlier = kv_ends[theirs] <= q_ends[mine + 1]
    overlap = (kv_ends[theirs + 2] <= q_ends[mine + 3]) & (q_ends[mine + 2] <= kv_ends[theirs + 3])

    @pl.when(earlier & overlap & (q_ends[mine + 3] >= 0) & (kv_ends[theirs + 3] >= 0))
    def _():
        positions, segments = q_marks[0, :, 0:1], q_marks[0, :, 1:2]
        visible = (kv_marks[0, 0:1] <= positions) & (kv_marks[0, 1:2] == segments) & (segments >= 0)
        used = jnp.max(visible.astype(jnp.float32), axis=0, keepdims=True) > 0
        scores = jnp.where(visible, _dot_last(q[0, 0], k[0, 0]) * (scale / math.log(2)), -jnp.inf)
        new_top = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
        weights, keep = jnp.exp2(scores - new_top), jnp.exp2(top[...] - new_top)
        top[...] = new_top
        # Lane by lane; summed over the lanes once per query block.
        total[...] = keep * total[...] + sum(weights[:, at : at + LANES] for at in range(0, weights.shape[1], LANES))
        known = jnp.where(used, v[0, 0].astype(jnp.float32), 0).astype(v.dtype)
        acc[...] = keep * acc[...] + _dot_last(weights.astype(v.dtype), known)

    @pl.when(keys == blocks - 1)
    def _():
        weight = jnp.sum(total[...], axis=1, keepdims=True)
        seen = weight > 0
        weight = jnp.where(seen, weight, 1)
        out[0, 0] = (acc[...] / weight).astype(out.dtype)
        lse[0, 0] = jnp.where(seen, math.log(2) * top[...] + jnp.log(weight), -jnp.inf)


def _dot_last(a: Float[Array, "m c"], b: Float[Array, "n c"]) -> Float[Array, "m n"]:
    """a [m, c] times b [n, c]^T; float32 out of full float32 or of bf16 products."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _padded(array: Array, block: int, axis: int, fill: int = 0) -> Array:
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -array.shape[axis] % block)
    return jnp.pad(array, padding, constant_values=fill)


def _extremes(marks: Int[Array, "B blocks size 2"], axis: int) -> Int[Array, "ends"]:
    """Per block the smallest and largest position, then segment, of tokens that are no padding; flat."""
    real = marks[..., 1:] >= 0
    limits = jnp.iinfo(marks.dtype)
    smallest = jnp.min(jnp.where(real, marks, limits.max), axis=axis)
    largest = jnp.max(jnp.where(real, marks, limits.min), axis=axis)
    return jnp.stack([smallest, largest], axis=-1).reshape(-1)
