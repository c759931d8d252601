"""One token of Kimi Delta Attention for a batch of sequences, as one TPU kernel that updates the states in place.

A step reads and writes every state once and computes little in between. Layout: projections stay [B, H * D], as they
come from a matmul, and states [B, H, Dk, Dv]. A grid step has eight sequences (a tile's rows) and as many heads as fill
2 MiB; a loop over the heads, unrolled over the sequences, keeps one head's 16 vectors of state in registers.

The state's rows are keys, so sums over keys are additions of whole vectors; their factors (decay, key, query) are
columns. One transpose makes the columns of eight sequences, and each is broadcast over the lanes: these 48 lane
permutations per head bound the schedule, at 0.53 of the states' HBM time on v5e, 0.85 on v6e and 1.53 on tpu7x (32
heads, 64 sequences). A matrix product instead of the sums would have to split the state into bfloat16 parts to keep it
exact. There is none here: all arithmetic is float32.

With D = exp(g) S and u = beta (v - D^T k), the new state D + k u^T gives q the output D^T q + (k . q) u, so that both
reads are of D, before u is known.

Spills: the compiler begins the permutations of the next sequences early and parks the results, 16 stores and as many
loads per head among 115 bundles whose load and store slots are mostly free.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.hardware import LANES

SEQUENCES = 8
# Bytes of states that a grid step reads; with as many written, and both for two steps, half of a v5e's default limit.
BLOCK_BYTES = 2 * 2**20


def unsupported(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array) -> str | None:
    """Says why the kernel cannot serve these arguments; None where it can."""
    if 0 in state.shape:
        return "it is empty"
    keys, values = state.shape[2:]
    if keys % LANES or values % LANES:
        return f"a state is {keys} x {values}, expected multiples of {LANES}"
    if SEQUENCES * _state_bytes(state) > BLOCK_BYTES:
        return f"a state is {keys} x {values}, expected at most {BLOCK_BYTES // SEQUENCES} bytes"
    if state.dtype != jnp.float32:
        return f"the state is {state.dtype}, expected float32"
    if other := {array.dtype.name for array in (q, k, v, beta)} - {"float32", "bfloat16"}:
        return f"operands are {', '.join(sorted(other))}, expected bfloat16 or float32"
    return None


def block_heads(state: Array | jax.ShapeDtypeStruct) -> int:
    """Returns the heads of a grid step: as many as fit, and at most eight, since a single sequence's steps overlap
    too."""
    heads, fit = state.shape[1], BLOCK_BYTES // (min(SEQUENCES, state.shape[0]) * _state_bytes(state))
    return _divisor(heads, min(8, fit))


def _divisor(number: int, most: int) -> int:
    """Returns the largest divisor of `number` that is at most `most`."""
    return max(n for n in range(1, min(number, most) + 1) if number % n == 0)


def _state_bytes(state: Array | jax.ShapeDtypeStruct) -> int:
    return state.dtype.itemsize * state.shape[2] * state.shape[3]


def kda_step(
    q: Float[Array, "B H Dk"],
    k: Float[Array, "B H Dk"],
    v: Float[Array, "B H Dv"],
    g: Float[Array, "B H Dk"],
    beta: Float[Array, "B H"],
    state: Float[Array, "B H Dk Dv"],
    *,
    normalize_qk: bool = False,
    scale: float = 1.0,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[Float[Array, "B H Dv"], Float[Array, "B H Dk Dv"]]:
    """See `api.kda_step`; o comes in v's dtype."""
    batch, heads, keys, values = state.shape
    block = block_heads(state)

    def rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((SEQUENCES, block * width), lambda b, h: (b, h))

    # The last block of sequences may be short: results for rows past its end are not written.
    states = pl.BlockSpec((min(SEQUENCES, batch), block, keys, values), lambda b, h: (b, h, 0, 0))
    o, state = pl.pallas_call(
        partial(_step_kernel, normalize_qk=normalize_qk, scale=scale),
        grid=(pl.cdiv(batch, SEQUENCES), heads // block),
        in_specs=[
            *(rows(width) for width in (keys, keys, values, keys)),
            pl.BlockSpec((SEQUENCES, heads), lambda b, h: (b, 0)),
            states,
        ],
        out_specs=[rows(values), states],
        out_shape=[
            # (In float32, which XLA tiles by eight rows: bfloat16 is by 16 in some programs.)
            jax.ShapeDtypeStruct((batch, heads * values), jnp.float32),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ],
        scratch_shapes=[pltpu.VMEM((SEQUENCES, values), jnp.float32)],
        input_output_aliases={5: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="kda_step",
    )(*(array.reshape(batch, -1) for array in (q, k, v, g)), beta, state)
    return o.reshape(v.shape).astype(v.dtype), state


def _step_kernel(q, k, v, g, beta, state, o, new, row, *, normalize_qk, scale):
    sequences, heads, keys, values = state.shape
    lane = lax.broadcasted_iota(jnp.int32, beta.shape, 1) - pl.program_id(1) * heads

    def head(h):
        of_keys = pl.ds(pl.multiple_of(h * keys, LANES), keys)
        of_values = pl.ds(pl.multiple_of(h * values, LANES), values)
        query, key = q[:, of_keys].astype(jnp.float32), k[:, of_keys].astype(jnp.float32)
        if normalize_qk:
            query, key = (tile * lax.rsqrt(jnp.sum(tile * tile, axis=1, keepdims=True) + 1e-6) for tile in (query, key))
        query = scale * query
        columns = jnp.concatenate([jnp.exp(g[:, of_keys]), key, query]).T  # [keys, 3 * SEQUENCES]
        step = jnp.sum(jnp.where(lane == h, beta[...].astype(jnp.float32), 0), axis=1, keepdims=True)
        target = v[:, of_values].astype(jnp.float32)
        both = jnp.sum(query * key, axis=1, keepdims=True)
        for i in range(sequences):
            one = slice(i, i + 1)
            decay, k_column, q_column = (columns[:, i + at : i + at + 1] for at in range(0, 3 * SEQUENCES, SEQUENCES))
            decayed = decay * state[i, h]
            seen = jnp.sum(k_column * decayed, axis=0, keepdims=True)
            update = step[one] * (target[one] - seen)
            row[one] = jnp.sum(q_column * decayed, axis=0, keepdims=True) + both[one] * update
            new[i, h] = decayed + k_column * update
        o[:, of_values] = row[...]

    # Few sequences: several heads at a time, to the same effect.
    together = _divisor(heads, SEQUENCES // sequences)

    @pl.loop(0, heads // together)
    def _(group):
        for i in range(together):
            head(group * together + i)
