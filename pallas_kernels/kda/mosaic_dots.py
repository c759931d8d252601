"""Matrix products of several heads at a time, for the chunk kernel.

A *pack* is two heads side by side along the lanes (one, where their number is odd): matrices of 64 x 64 then fill the
128 lanes of a register, and a product with a block diagonal of both heads fills a 256-wide matrix unit.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

CHUNK = 64


def dot(a: Float[Array, "m c"], b: Float[Array, "c n"]) -> Float[Array, "m n"]:
    """Float32 out of full float32, or of one pass over bf16."""
    return _dot(a, b, 0)


def dot_transposed(a: Float[Array, "m c"], b: Float[Array, "n c"]) -> Float[Array, "m n"]:
    """a b^T, as `dot`."""
    return _dot(a, b, 1)


def _dot(a: Array, b: Array, contracted: int) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def split(x: Float[Array, "*shape"], parts: int) -> list[Float[Array, "*shape"]]:
    """Float32 as a sum of bf16 parts: two hold 16 bits of its significand, three all 24."""
    out = []
    for _ in range(parts - 1):
        out.append(x.astype(jnp.bfloat16))
        x = x - out[-1].astype(jnp.float32)
    return [*out, x.astype(jnp.bfloat16)]


def heads_of(x: Float[Array, "m PD"], pack: int) -> list[Float[Array, "m D"]]:
    """The heads of a pack."""
    width = x.shape[1] // pack
    return [x[:, h * width : (h + 1) * width] for h in range(pack)]


def block_diagonal(heads: list[Float[Array, "m n"]]) -> Float[Array, "Pm Pn"]:
    """[[a, 0], [0, b]]"""
    rows = [
        jnp.concatenate([x if h == at else jnp.zeros_like(x) for at in range(len(heads))], axis=1)
        for h, x in enumerate(heads)
    ]
    return jnp.concatenate(rows, axis=0)


def dot_in_three(
    a: Float[Array, "m PC"], b: Float[Array, "C PC"], pack: int
) -> Float[Array, "m PC"]:
    """a b of each head (`b` lies packed, too) in three bf16 passes, exact to 2^-17: hi hi + hi lo + lo hi."""
    rows, columns = a.shape
    lane = lax.broadcasted_iota(jnp.int32, b.shape, 1) // CHUNK

    def spread(part: Array) -> Array:
        return jnp.concatenate([jnp.where(lane == h, part, jnp.zeros_like(part)) for h in range(pack)], axis=0)

    left = jnp.concatenate(split(a, 2), axis=0)
    both = dot(left, jnp.concatenate([spread(part) for part in split(b, 2)], axis=1))
    return both[:rows, :columns] + (both[:rows, columns:] + both[rows:, :columns])
