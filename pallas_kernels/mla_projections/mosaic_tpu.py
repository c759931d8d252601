"""The projections around `mla_decode` as Pallas kernels for TPUs: a decode step's rows are few, and weights streamed.

`mla_query`: the grid is (blocks of heads, heads of a block). Norms, the rotation and the product with a head's `kv_b`
stay in vector memory between the products, where XLA makes some twenty operations of them. De-interleaving is a product
with zeros and ones, exact in any precision that does not round x. A block's results are collected and written at its
last head.

Columns that devices have gathered of the low ranks are joined in vector memory too.

`mla_output`: the grid is (cores, tiles of `o_proj`); the heads' values are made at a core's first, after partial
attentions have been merged where devices have exchanged them.
"""

import functools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.hardware import LANES, SUBLANES, VMEM_LIMIT, chip
from pallas_kernels.mla_projections.xla import Rotation, merge_packed
from pallas_kernels.norm.mosaic_tpu import normed

MOST_ROWS, HEADS, STEP_BYTES = 128, 8, 2**21
# The most bytes of packed attentions that `mla_output` merges itself: it has two buffers for them in vector memory.
MERGED_BYTES = VMEM_LIMIT // 4


def query_unsupported(
    q_a: Array | None,
    kv_a: Array,
    rotation: Rotation | None,
    q_norm: Array | None,
    kv_norm: Array,
    q_b: Array,
    kv_b: Array,
    *,
    heads: int,
) -> str | None:
    """Says why the kernel cannot take these shapes and dtypes; None where it can."""
    latent, low = kv_norm.shape[0], q_b.shape[1]
    rope = len(kv_a) * kv_a.shape[2] - (low if q_a is None else 0) - latent
    nope = q_b.shape[0] // heads - rope
    sizes = {"C": low, "L": latent, "N": nope}
    return _unsupported(kv_a.dtype, kv_a.shape[1], sizes, heads, nope, kv_b)


def output_unsupported(o: Array, kv_b: Array, o_proj: Array, gate: Array | None = None) -> str | None:
    """Says why the kernel cannot take these shapes and dtypes; None where it can."""
    batch, heads, _ = o.shape[-3:]
    value = o_proj.shape[1] // heads
    sizes = {"L": kv_b.shape[1], "V": value, "D": o_proj.shape[0]}
    return _unsupported(kv_b.dtype, batch, sizes, heads, value, kv_b)


def _unsupported(dtype: jnp.dtype, batch: int, sizes: dict[str, int], heads: int, half: int, kv_b: Array) -> str | None:
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {dtype}, expected bfloat16 or float32"
    if not 0 < batch <= MOST_ROWS:
        return f"B is {batch}, expected 1 to {MOST_ROWS}"
    for name, size in sizes.items():
        if size % LANES or not size:
            return f"{name} is {size}, expected a multiple of {LANES}"
    if kv_b.shape[0] != 2 * half * heads:
        return f"kv_b has {kv_b.shape[0]} rows, expected keys and values of {half} channels for each of {heads} heads"
    return f"there are {heads} heads, expected 1, 2, 4 or a multiple of 8" if HEADS % heads and heads % HEADS else None


def mla_query(
    q_a: Float[Array, "B C"] | None,
    kv_a: Float[Array, "S B columns"],
    rotation: Rotation | None,
    q_norm: Float[Array, "C"] | None,
    kv_norm: Float[Array, "L"],
    q_b: Float[Array, "heads_key C"],
    kv_b: Float[Array, "heads_keyvalue L"],
    *,
    heads: int,
    eps: float,
    interpret: Any = False,
) -> tuple[Float[Array, "B H width"], Float[Array, "B width"]]:
    """See `api.mla_query`."""
    (shards, batch, columns), (rows, width), latent = kv_a.shape, q_b.shape, kv_norm.shape[0]
    cached = shards * columns - (width if q_a is None else 0)
    rope, dtype = cached - latent, kv_a.dtype
    key, block = rows // heads, min(heads, HEADS)
    q_b, kv_b = q_b.reshape(heads, key, width), kv_b.reshape(heads, 2, key - rope, latent)
    if not interpret:
        q_b, kv_b = (pltpu.with_memory_space_constraint(weight, pltpu.HBM) for weight in (q_b, kv_b))
    small = [kv_a, kv_norm, *([] if q_a is None else [q_a]), *(rotation or ()), *([] if q_norm is None else [q_norm])]

    def whole(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    q, latents = pl.pallas_call(
        partial(
            _query_kernel,
            eps=eps,
            latent=latent,
            apart=q_a is not None,
            rotates=rotation is not None,
            norms=q_norm is not None,
        ),
        grid=(heads // block, block),
        in_specs=[
            *map(whole, small),
            pl.BlockSpec((None, key, width), lambda i, j: (i * block + j, 0, 0)),
            pl.BlockSpec((None, None, key - rope, latent), lambda i, j: (i * block + j, 0, 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((batch, block, cached), lambda i, j: (0, i, 0)),
            pl.BlockSpec((batch, cached), lambda i, j: (0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, cached), dtype),
            jax.ShapeDtypeStruct((batch, cached), dtype),
        ],
        scratch_shapes=[
            pltpu.VMEM((batch, width), dtype),
            pltpu.VMEM((block, batch, latent), dtype),
            pltpu.VMEM((block, batch, rope), dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * (q_b.size + kv_b.size // 2),
            transcendentals=2 * batch,
            bytes_accessed=q_b.nbytes + kv_b.nbytes // 2 + batch * (heads + 1) * cached * dtype.itemsize,
        ),
        name="mla_query",
        interpret=interpret,
    )(*small, q_b, kv_b)
    return q, latents


def _query_kernel(
    kv_a_ref: Any,
    kv_norm_ref: Any,
    *refs: Any,
    eps: float,
    latent: int,
    apart: bool,
    rotates: bool,
    norms: bool,
) -> None:
    *optional, q_b_ref, w_uk_ref, q_ref, latents_ref, low_ref, latent_heads, rope_heads = refs
    q_a, cos_sin, q_norm = optional[:apart], optional[apart : apart + 2 * rotates], optional[apart + 2 * rotates :]
    i, j = pl.program_id(0), pl.program_id(1)
    dtype = kv_a_ref.dtype

    def rotate(x: Array) -> Array:
        if not rotates:
            return x
        cos, sin = (ref[...] for ref in cos_sin)
        in_place, swapped = (_dot(x, _pairs(x.shape[1], x.dtype, second), 0) for second in (False, True))
        return (in_place * cos + swapped * sin).astype(dtype)

    @pl.when((i == 0) & (j == 0))
    def _once() -> None:
        shares = (0 if apart else low_ref.shape[1] // kv_a_ref.shape[0]), latents_ref.shape[1] // kv_a_ref.shape[0]
        low = q_a[0][...] if apart else _columns(kv_a_ref, 0, shares[0])
        low_ref[...] = normed(low, q_norm[0][...], eps) if norms else low
        kv = _columns(kv_a_ref, *shares)
        latents_ref[:, :latent] = normed(kv[:, :latent], kv_norm_ref[...], eps)
        latents_ref[:, latent:] = rotate(kv[:, latent:])

    q = _dot(low_ref[...], q_b_ref[...], 1).astype(dtype)
    nope = q_b_ref.shape[0] - rope_heads.shape[2]
    latent_heads[j] = _dot(q[:, :nope], w_uk_ref[...], 0).astype(dtype)
    rope_heads[j] = rotate(q[:, nope:])

    @pl.when(j == pl.num_programs(1) - 1)
    def _write() -> None:
        for head in range(latent_heads.shape[0]):
            q_ref[:, head, :latent] = latent_heads[head]
            q_ref[:, head, latent:] = rope_heads[head]


def _columns(shards_ref: Any, first: int, count: int) -> Array:
    """Joins the `count` columns from `first` on of each shard [B, columns]."""
    parts = [shards_ref[shard, :, first : first + count] for shard in range(shards_ref.shape[0])]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _pairs(width: int, dtype: Any, second: bool) -> Array:
    """Returns the matrix that maps interleaved pairs to [first | second], or with `second` to [-second | first]."""
    row, column = (lax.broadcasted_iota(jnp.int32, (width, width), axis) for axis in (0, 1))
    late = column >= width // 2
    pair = jnp.where(late, column - width // 2, column)
    if not second:
        return jnp.where(row == 2 * pair + late.astype(jnp.int32), 1.0, 0.0).astype(dtype)
    other = row == 2 * pair + 1 - late.astype(jnp.int32)
    return jnp.where(other, jnp.where(late, 1.0, -1.0), 0.0).astype(dtype)


def mla_output(
    o: Float[Array, "B H L"] | Float32[Array, "S B H packed"],
    kv_b: Float[Array, "heads_keyvalue L"],
    o_proj: Float[Array, "D heads_value"],
    gate: Float[Array, "B heads_value"] | None = None,
    *,
    interpret: Any = False,
) -> Float32[Array, "B D"]:
    """See `api.mla_output`."""
    if o.ndim == 4 and _padded_bytes(o) > MERGED_BYTES:
        o = merge_packed(o).astype(kv_b.dtype)
    (batch, heads, _), latent, (outputs, values) = o.shape[-3:], kv_b.shape[1], o_proj.shape
    cores = chip().cores if outputs // LANES % chip().cores == 0 else 1
    core_outputs = outputs // cores
    fit = [n for n in range(LANES, core_outputs + 1, LANES) if core_outputs % n == 0]
    tile = max(n for n in fit if n == LANES or n * values * o_proj.dtype.itemsize <= STEP_BYTES)
    kv_b = kv_b.reshape(heads, 2, values // heads, latent)
    if not interpret:
        kv_b, o_proj = (pltpu.with_memory_space_constraint(weight, pltpu.HBM) for weight in (kv_b, o_proj))
    tiles = core_outputs // tile
    return pl.pallas_call(
        _output_kernel,
        grid=(cores, tiles),
        in_specs=[
            pl.BlockSpec(o.shape, lambda c, n: (0,) * o.ndim),
            pl.BlockSpec((heads, None, values // heads, latent), lambda c, n: (0, 1, 0, 0)),
            pl.BlockSpec((tile, values), lambda c, n: (c * tiles + n, 0)),
            *([] if gate is None else [pl.BlockSpec(gate.shape, lambda c, n: (0, 0))]),
        ],
        out_specs=pl.BlockSpec((batch, tile), lambda c, n: (0, c * tiles + n)),
        out_shape=jax.ShapeDtypeStruct((batch, outputs), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((batch, values), kv_b.dtype),
            *([pltpu.VMEM((batch, heads, latent), jnp.float32)] if o.ndim == 4 else []),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * (kv_b.size // 2 + o_proj.size),
            transcendentals=0 if gate is None else gate.size,
            bytes_accessed=kv_b.nbytes // 2 + o_proj.nbytes + o.nbytes + 4 * batch * outputs,
        ),
        name="mla_output",
        interpret=interpret,
    )(o, kv_b, o_proj, *([] if gate is None else [gate]))


def _padded_bytes(array: Array) -> int:
    """Counts the bytes of a float32 array in vector memory, whose last two axes are padded to registers."""
    *outer, rows, columns = array.shape
    return 4 * math.prod(outer) * -(-rows // SUBLANES) * SUBLANES * -(-columns // LANES) * LANES


def _output_kernel(o_ref: Any, w_uv_ref: Any, o_proj_ref: Any, *refs: Any) -> None:
    scratch = 3 if len(o_ref.shape) == 4 else 2
    gate_ref, (out_ref, values_ref, *merged) = refs[:-scratch], refs[-scratch:]

    @pl.when(pl.program_id(1) == 0)
    def _once() -> None:
        for ref in merged:
            _merge(o_ref, ref)
        of_heads = merged[0] if merged else o_ref
        heads, width, _ = w_uv_ref.shape
        for head in range(heads):
            o = of_heads[:, head, :].astype(values_ref.dtype)
            value, columns = _dot(o, w_uv_ref[head], 1), slice(head * width, (head + 1) * width)
            if gate_ref:
                value = value * jax.nn.sigmoid(gate_ref[0][:, columns].astype(jnp.float32))
            values_ref[:, columns] = value.astype(values_ref.dtype)

    out_ref[...] = _dot(values_ref[...], o_proj_ref[...], 1)


def _merge(packed_ref: Any, merged_ref: Any) -> None:
    """Merges packed attentions as `xla.merge_packed` does, a token after another."""
    shards, latent = packed_ref.shape[0], merged_ref.shape[2]

    def token(b: Array, _: None) -> None:
        lses = [packed_ref[shard, b, :, latent:] for shard in range(shards)]
        top = functools.reduce(jnp.maximum, lses)
        top = jnp.where(top == -jnp.inf, 0, top)
        weights = [jnp.exp(lse - top) for lse in lses]
        total = sum(weights)
        whole = sum(weight * packed_ref[shard, b, :, :latent] for shard, weight in enumerate(weights))
        merged_ref[b] = whole / jnp.where(total == 0, 1, total)

    lax.fori_loop(0, merged_ref.shape[0], token, None)


def _dot(x: Array, weight: Array, axis: int) -> Array:
    """Multiplies x by the weight, whose `axis` is contracted, in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    contract = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, weight, contract, precision=precision, preferred_element_type=jnp.float32)
