"""One token of Kimi Delta Attention as a Pallas kernel for NVIDIA GPUs, which Triton compiles.

A program takes some of a head's value columns: it reads its part of the state once and writes it once, in place.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

# Value columns of a program: 16 KiB of a state's 64.
COLUMNS = 32


def unsupported(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array) -> str | None:
    """Says why the kernel cannot take these shapes and dtypes; None where it can."""
    keys, values = state.shape[-2:]
    if keys & (keys - 1) or values % COLUMNS:
        return f"Dk and Dv are {keys} and {values}, expected a power of two and a multiple of {COLUMNS}"
    if state.dtype != jnp.float32:
        return f"state is {state.dtype}, expected float32"
    return None if state.size else "there is no state"


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
    interpret: bool = False,
) -> tuple[Float[Array, "B H Dv"], Float[Array, "B H Dk Dv"]]:
    """See `api.kda_step`."""
    batch, heads, keys, values = state.shape
    key = pl.BlockSpec((None, None, keys), lambda c, h, b: (b, h, 0))
    value = pl.BlockSpec((None, None, COLUMNS), lambda c, h, b: (b, h, c))
    square = pl.BlockSpec((None, None, keys, COLUMNS), lambda c, h, b: (b, h, 0, c))
    return pl.pallas_call(
        partial(_step, normalize_qk=normalize_qk, scale=scale),
        grid=(values // COLUMNS, heads, batch),
        in_specs=[key, key, value, key, pl.BlockSpec((None, None), lambda c, h, b: (b, h)), square],
        out_specs=(value, square),
        out_shape=(jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, state.dtype)),
        input_output_aliases={5: 1},
        compiler_params=plgpu.CompilerParams(num_warps=4),
        name="kda_step",
        interpret=interpret,
    )(q, k, v, g, beta, state)


def norm_factor(x: Array) -> Array:
    """Returns 1 / sqrt(sum of squares + 1e-6) of vectors along the last axis."""
    return lax.rsqrt(jnp.sum(x * x, axis=-1) + 1e-6)


def _step(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    g_ref: Any,
    beta_ref: Any,
    state_ref: Any,
    o_ref: Any,
    new_ref: Any,
    *,
    normalize_qk: bool,
    scale: float,
) -> None:
    q, k = (ref[...].astype(jnp.float32) for ref in (q_ref, k_ref))
    if normalize_qk:
        q, k = norm_factor(q) * q, norm_factor(k) * k
    state = jnp.exp(g_ref[...].astype(jnp.float32))[:, None] * state_ref[...]
    read = jnp.sum(k[:, None] * state, axis=0)
    update = beta_ref[...].astype(jnp.float32) * (v_ref[...].astype(jnp.float32) - read)
    state += k[:, None] * update[None, :]
    new_ref[...] = state
    o_ref[...] = jnp.sum((scale * q)[:, None] * state, axis=0).astype(o_ref.dtype)
