"""Attention of many queries to many keys as one Pallas kernel for NVIDIA GPUs, which Triton compiles: flash attention
(arXiv 2205.14135, arXiv 2307.08691).

A program takes a block of queries of one head, and in turns the blocks of keys from the first to the last that any of
the queries sees. Those that all of its queries see whole are taken without a mask, and the others after them, as the
smallest and largest position and segment of each block say before the kernel. Widths that are no powers of two are read
in parts that are: 192 as 128 and 64.
"""

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.dispatch import with_gradient
from pallas_kernels.mla_attention import xla
from pallas_kernels.triton_products import LEAST, make_dot

# The widest heads whose parts and results stay in registers.
WIDEST = 256


class Blocks(NamedTuple):
    """Queries of a program and keys of a turn, the program's warps, and the turns whose keys are loaded at one time."""

    queries: int
    keys: int
    warps: int
    stages: int


class Part(NamedTuple):
    """Some of a head's values: the first of them, a power of two of at least 16, and how many of these there are."""

    start: int
    size: int
    there: int


def choose_blocks(q: Array, k: Array) -> Blocks:
    """Chooses the sizes worked on at a time: smaller in float32, and for fewer tokens."""
    most = Blocks(128, 64, 8, 2) if q.dtype == jnp.bfloat16 else Blocks(64, 32, 4, 2)
    queries, keys = (max(LEAST, 1 << (array.shape[1] - 1).bit_length()) for array in (q, k))
    queries = min(most.queries, queries)
    return Blocks(queries, min(most.keys, keys), most.warps if queries == most.queries else 4, most.stages)


def unsupported(q: Array, k: Array, v: Array, *marks: Array) -> str | None:
    """Says why the kernel cannot take these shapes and dtypes; None where it can."""
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "it is empty"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"heads have {q.shape[3]} and {v.shape[3]} values, expected at most {WIDEST}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
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
    return_max: bool = False,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """See `api.mla_prefill`; returns the output in v's dtype, the float32 log-sum-exp, and with `return_max` the
    largest scores [B, H]. Gradients are `xla`'s."""
    options: dict[str, Any] = {"scale": scale, "return_max": return_max}
    run = with_gradient(partial(_forward, **options, interpret=interpret), partial(xla.mla_prefill, **options))
    return run(q, k, v, q_positions, kv_positions, q_segments, kv_segments)


def _forward(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H Dv"],
    q_positions: Int[Array, "B S"],
    kv_positions: Int[Array, "B T"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    *,
    scale: float,
    return_max: bool,
    interpret: bool,
) -> tuple[Array, ...]:
    (batch, length, heads, _), size = q.shape, choose_blocks(q, k)

    def padded(marks: Array, block: int) -> Array:
        return jnp.pad(marks.astype(jnp.int32), [(0, 0), (0, -marks.shape[1] % block)], constant_values=-1)

    of_queries = padded(q_positions, size.queries), padded(q_segments, size.queries)
    of_keys = padded(kv_positions, size.keys), padded(kv_segments, size.keys)
    listed = turns(of_queries[0], of_queries[1], of_keys[0], of_keys[1], size)
    blocks = listed.shape[1]
    out, lse, top = pl.pallas_call(
        partial(_attend, size=size, scale=scale, interpret=interpret),
        grid=(blocks, heads, batch),
        out_shape=(
            jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), v.dtype),
            jax.ShapeDtypeStruct((batch, length, heads), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, blocks), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=size.warps, num_stages=size.stages),
        name="mla_prefill",
        interpret=interpret,
    )(listed, *of_queries, *of_keys, q, k, v)
    return (out, lse, jnp.max(top, axis=2)) if return_max else (out, lse)


def turns(
    q_positions: Int32[Array, "B S"],
    q_segments: Int32[Array, "B S"],
    kv_positions: Int32[Array, "B T"],
    kv_segments: Int32[Array, "B T"],
    size: Blocks,
) -> Int32[Array, "B blocks 4"]:
    """Returns of each block of queries the first block of keys that it may see, the first of those in a row that all of
    its queries see whole, and the ends of these and of those."""

    def ranges(marks: Array, block: int) -> tuple[Array, Array]:
        cut = marks.reshape(marks.shape[0], -1, block)
        return jnp.min(cut, axis=2), jnp.max(cut, axis=2)

    (q_least, q_most), (own_least, own_most) = (ranges(m, size.queries) for m in (q_positions, q_segments))
    (k_least, k_most), (key_least, key_most) = (ranges(m, size.keys) for m in (kv_positions, kv_segments))

    def pairs(of_queries: Array, of_keys: Array) -> tuple[Array, Array]:
        return of_queries[:, :, None], of_keys[:, None, :]

    def at_most(pair: tuple[Array, Array]) -> Array:
        return pair[0] <= pair[1]

    meet = at_most(pairs(own_least, key_most)) & at_most(pairs(own_most, key_least)[::-1])
    some = meet & at_most(pairs(q_most, k_least)[::-1]) & (own_most >= 0)[:, :, None]
    alike = ((own_least == own_most) & (own_least >= 0))[:, :, None] & (key_least == key_most)[:, None, :]
    whole = alike & meet & at_most(pairs(q_least, k_most)[::-1])
    number = jnp.arange(some.shape[2], dtype=jnp.int32)
    count = jnp.int32(some.shape[2])
    first = jnp.min(jnp.where(some, number, count), axis=2)
    end = jnp.max(jnp.where(some, number + 1, 0), axis=2)
    begin = jnp.min(jnp.where(whole, number, count), axis=2)
    stop = jnp.min(jnp.where(~whole & (number >= begin[:, :, None]), number, count), axis=2)
    return jnp.stack([first, begin, stop, end], axis=2)


def _parts(width: int) -> list[Part]:
    parts, start = [], 0
    while start < width:
        size = max(LEAST, 1 << ((width - start).bit_length() - 1))
        parts.append(Part(start, size, min(size, width - start)))
        start += size
    return parts


def _take(ref: Any, b: Array, row: Array, h: Array, part: Part, is_row: Array | None) -> Array:
    """Reads a part of rows of a head, zeros where there is none."""
    channel = jnp.arange(part.size, dtype=jnp.int32)
    at = ref.at[b, row[:, None], h, part.start + channel[None, :]]
    masks = [] if is_row is None else [is_row[:, None]]
    masks += [] if part.there == part.size else [channel[None, :] < part.there]
    if not masks:
        return plgpu.load(at)
    mask = jnp.broadcast_to(math.prod(masks[1:], start=masks[0]), (row.shape[0], part.size))
    return plgpu.load(at, mask=mask, other=0)


def _attend(
    turns_ref: Any,
    q_positions_ref: Any,
    q_segments_ref: Any,
    kv_positions_ref: Any,
    kv_segments_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    top_ref: Any,
    *,
    size: Blocks,
    scale: float,
    interpret: bool,
) -> None:
    # Under causality later blocks see more keys, and begin earlier for it
    i, h, b = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dot = partial(make_dot(interpret), dtype=q_ref.dtype)
    first, begin, stop, end = (turns_ref[b, i, j] for j in range(4))
    row = i * size.queries + jnp.arange(size.queries, dtype=jnp.int32)
    is_row = row < q_ref.shape[1]
    widths, values = _parts(q_ref.shape[3]), _parts(v_ref.shape[3])
    q = [_take(q_ref, b, row, h, part, is_row) for part in widths]
    own = pl.ds(i * size.queries, size.queries)
    q_position, q_segment = q_positions_ref[b, own], q_segments_ref[b, own]

    def turn(block: Array, running: tuple[Any, ...], masked: bool) -> tuple[Any, ...]:
        top, total, outs = running
        number = jnp.arange(size.keys, dtype=jnp.int32)
        key, there = block * size.keys + number, None
        if masked:
            at = pl.ds(block * size.keys, size.keys)
            kv_position, kv_segment = kv_positions_ref[b, at], kv_segments_ref[b, at]
            visible = (kv_position[None, :] <= q_position[:, None]) & (kv_segment[None, :] == q_segment[:, None])
            visible &= (q_segment >= 0)[:, None]
            # A key that no query here sees can hold anything: 0 * NaN is NaN
            there = jnp.max(visible.astype(jnp.int32), axis=0) > 0
        products = (dot(part, _take(k_ref, b, key, h, of, there).T) for part, of in zip(q, widths, strict=True))
        # In powers of two, which the hardware has
        scores = (scale * math.log2(math.e)) * reduce(jnp.add, products)
        if masked:
            scores = jnp.where(visible, scores, -jnp.inf)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        finite = jnp.where(new == -jnp.inf, 0, new) if masked else new
        weights, keep = jnp.exp2(scores - finite[:, None]), jnp.exp2(top - finite)
        total = keep * total + jnp.sum(weights, axis=1)
        seen = [dot(weights, _take(v_ref, b, key, h, of, there)) for of in values]
        return new, total, tuple(keep[:, None] * out + more for out, more in zip(outs, seen, strict=True))

    zeros = jnp.zeros((size.queries,), jnp.float32)
    running = (zeros - jnp.inf, zeros, tuple(jnp.zeros((size.queries, of.size), jnp.float32) for of in values))
    running = lax.fori_loop(begin, stop, lambda j, running: turn(j, running, masked=False), running)
    between = jnp.maximum(stop - begin, 0)

    def masked_turn(j: Array, running: tuple[Any, ...]) -> tuple[Any, ...]:
        return turn(jnp.where(j < begin, j, j + between), running, masked=True)

    top, total, outs = lax.fori_loop(first, end - between, masked_turn, running)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    # Past the end where there is no query: the interpreter writes there too
    row = jnp.where(is_row, row, q_ref.shape[1])
    for of, out in zip(values, outs, strict=True):
        channel = jnp.arange(of.size, dtype=jnp.int32)
        mask = jnp.broadcast_to(is_row[:, None] & (channel < of.there)[None, :], out.shape)
        channel = jnp.where(channel < of.there, of.start + channel, v_ref.shape[3])
        at = out_ref.at[b, row[:, None], h, channel[None, :]]
        plgpu.store(at, (out / total[:, None]).astype(out_ref.dtype), mask=mask)
    lse = jnp.where(seen, math.log(2) * top + jnp.log(total), -jnp.inf)
    plgpu.store(lse_ref.at[b, row, h], lse, mask=is_row)
    top_ref[b, h, i] = math.log(2) * jnp.max(top)
