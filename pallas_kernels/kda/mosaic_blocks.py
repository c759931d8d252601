"""Rows and products of several heads at a time, for the chunk kernel.

A *pack* is two heads side by side along the lanes (one head where their number is odd): matrices of 64 x 64 then fill
the 128 lanes of a register, and a product with a block diagonal of both heads fills a 256-wide matrix unit.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

CHUNK = 64


def dot(a: Float[Array, "m c"], b: Float[Array, "c n"]) -> Float[Array, "m n"]:
    """Multiplies a b to float32: float32 operands in full precision, bf16 operands in one pass."""
    return _dot(a, b, 0)


def dot_transposed(a: Float[Array, "m c"], b: Float[Array, "n c"]) -> Float[Array, "m n"]:
    """Multiplies a b^T to float32: float32 operands in full precision, bf16 operands in one pass."""
    return _dot(a, b, 1)


def _dot(a: Array, b: Array, contracted: int) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def split_bf16(x: Float[Array, "m n"], parts: int) -> list[Float[Array, "m n"]]:
    """Splits float32 into bf16 parts that add up to it: two hold 16 bits of its significand, three all 24."""
    out = []
    for _ in range(parts - 1):
        out.append(x.astype(jnp.bfloat16))
        x = x - out[-1].astype(jnp.float32)
    return [*out, x.astype(jnp.bfloat16)]


def split_heads(x: Float[Array, "m PD"], pack: int) -> list[Float[Array, "m D"]]:
    """Splits a pack into its heads."""
    width = x.shape[1] // pack
    return [x[:, h * width : (h + 1) * width] for h in range(pack)]


def block_diagonal(heads: list[Float[Array, "m n"]]) -> Float[Array, "Pm Pn"]:
    """Returns [[a, 0], [0, b]] for heads a and b."""
    packs = [[x if h == at else jnp.zeros_like(x) for at in range(len(heads))] for h, x in enumerate(heads)]
    return jnp.concatenate([jnp.concatenate(row, axis=1) for row in packs], axis=0)


def second_halves(x: Shaped[Array, "64 n"], size: int) -> Shaped[Array, "32 n"]:
    """Returns the rows of the second half of each block of twice `size` rows."""
    return jnp.concatenate([x[at + size : at + 2 * size] for at in range(0, CHUNK, 2 * size)], axis=0)
