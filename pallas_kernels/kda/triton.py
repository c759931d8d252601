"""Kimi Delta Attention of many tokens as two Pallas kernels for NVIDIA GPUs, which Triton compiles.

The first, `triton_chunk`, computes what needs no state, for all chunks and heads at once. The second takes a segment's
chunks one after the other, with some of a head's value columns of the state in registers. A chunk has tokens of one
segment; which they are is listed beforehand, so that packed rows are read and written where they are.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.kda.triton_chunk import CHUNK, chunk_parts, take_columns
from pallas_kernels.triton_products import make_dot

# Value columns of a program; a matrix product has 16 at least.
COLUMNS = 32


def unsupported(
    q: Array, k: Array, v: Array, g: Array, beta: Array, states: Array, segment_ids: Array | None
) -> str | None:
    """Says why the kernels cannot take these shapes and dtypes; None where they can."""
    keys, values = states.shape[-2:]
    if keys < 16 or values < COLUMNS or keys & (keys - 1) or values & (values - 1):
        return f"Dk and Dv are {keys} and {values}, expected powers of two from 16 and {COLUMNS}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, expected all bfloat16 or all float32"
    if states.dtype != jnp.float32:
        return f"states are {states.dtype}, expected float32"
    return None if q.size else "there are no tokens"


def kda(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T H Dk"],
    v: Float[Array, "B T H Dv"],
    g: Float[Array, "B T H Dk"],
    beta: Float[Array, "B T H"],
    states: Float[Array, "B N H Dk Dv"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    normalize_qk: bool = False,
    scale: float = 1.0,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B N H Dk Dv"]]:
    """See `xla.recurrent`."""
    batch, tokens, heads, _ = q.shape
    (segments, _, keys, values) = states.shape[1:]
    ids = jnp.zeros((batch, tokens), jnp.int32) if segment_ids is None else segment_ids
    order, first, count, own_first, own_count = jax.vmap(partial(_list_chunks, segments=segments))(ids)
    parts = chunk_parts(
        (q, k, g, beta), order, first, count, normalize_qk=normalize_qk, scale=scale, interpret=interpret
    )
    square = pl.BlockSpec((None, None, None, keys, COLUMNS), lambda n, h, b: (b, n % segments, h, 0, n // segments))
    o, after = pl.pallas_call(
        partial(_advance, segments=segments, interpret=interpret),
        grid=(segments * values // COLUMNS, heads, batch),
        in_specs=[pl.no_block_spec] * 12 + [square],
        out_specs=[pl.no_block_spec, square],
        out_shape=[jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(states.shape, states.dtype)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name="kda_states",
        interpret=interpret,
    )(order, first, count, own_first, own_count, v, *parts, states)
    # No program writes the outputs of padding
    return o if segment_ids is None else jnp.where((ids >= 0)[..., None, None], o, 0), after


def _list_chunks(ids: Int32[Array, "T"], segments: int) -> tuple[Array, ...]:
    """Lists a row's tokens by segment, each chunk's first place in that list and number of tokens, and each segment's
    first chunk and number of chunks."""
    tokens = ids.shape[0]
    order = jnp.argsort(jnp.where(ids < 0, segments, ids), stable=True).astype(jnp.int32)
    number = jnp.arange(segments, dtype=jnp.int32)
    sizes = jnp.sum(ids == number[:, None], axis=1, dtype=jnp.int32)
    chunks = (sizes + (CHUNK - 1)) // CHUNK
    earlier = number < number[:, None]
    begin, own_first = (jnp.sum(jnp.where(earlier, many, 0), axis=1, dtype=jnp.int32) for many in (sizes, chunks))
    most = min(tokens, segments) + (tokens - min(tokens, segments)) // CHUNK
    chunk = jnp.arange(most, dtype=jnp.int32)
    segment = jnp.sum(own_first + chunks <= chunk[:, None], axis=1, dtype=jnp.int32)
    there, segment = segment < segments, jnp.minimum(segment, segments - 1)
    done = (chunk - own_first[segment]) * CHUNK
    count = jnp.where(there, jnp.minimum(sizes[segment] - done, CHUNK), 0)
    return order, begin[segment] + done, count, own_first, chunks


def _advance(
    order_ref: Any,
    first_ref: Any,
    count_ref: Any,
    own_first_ref: Any,
    own_count_ref: Any,
    v_ref: Any,
    T_ref: Any,
    Aqk_ref: Any,
    since_ref: Any,
    read_ref: Any,
    written_ref: Any,
    total_ref: Any,
    state_ref: Any,
    o_ref: Any,
    after_ref: Any,
    *,
    segments: int,
    interpret: bool,
) -> None:
    dot = make_dot(interpret)
    program, h, b = (pl.program_id(axis) for axis in range(3))
    segment, dtype = program % segments, T_ref.dtype
    column = program // segments * COLUMNS + jnp.arange(COLUMNS, dtype=jnp.int32)
    number = jnp.arange(CHUNK, dtype=jnp.int32)

    def chunk(i: Array, S: Array) -> Array:
        c = own_first_ref[b, segment] + i
        is_token = number < count_ref[b, c]
        place = jnp.where(is_token, first_ref[b, c] + number, 0)
        # Past the end where there is no token: the interpreter writes there too
        token = plgpu.load(order_ref.at[b, place], mask=is_token, other=o_ref.shape[1])
        v = take_columns(v_ref, b, token, h, column, is_token)
        pseudo = dot(T_ref[b, c, h], v - dot(since_ref[b, c, h], S, dtype), dtype)
        o = dot(read_ref[b, c, h], S, dtype) + dot(Aqk_ref[b, c, h], pseudo, dtype)
        at = o_ref.at[b, token[:, None], h, column[None, :]]
        plgpu.store(at, o.astype(o_ref.dtype), mask=is_token[:, None])
        return total_ref[b, c, h][:, None] * S + dot(written_ref[b, c, h].T, pseudo, dtype)

    after_ref[...] = lax.fori_loop(0, own_count_ref[b, segment], chunk, state_ref[...])
