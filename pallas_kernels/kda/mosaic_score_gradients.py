"""Gradients of the decayed products of `mosaic_scores`, for any gate, with respect to keys, queries and exponents.

An entry (i, j) below the diagonal belongs to one level, the halves that part i from j, with the factors f_i and f_j.
With X the gradient of k k^T and P that of q k^T, of which a level has the entries that are its own,
    dk = f * ((X + X^T) (f * k) + P^T (f * q)),   dq = f * (P (f * k)),
which is one product of [[X + X^T, P^T], [P, 0]] with f * k above f * q. The gradient of the logarithm of f is
k * dk + q * dq, of this level's parts only; the gradient of a log decay g_t adds those of the exponents that have g_t
in their sum. So, as in the forward direction, nothing is added that would have to cancel: where tokens decay to
nothing, the gradients of their log decays are as small as they should be.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.kda.mosaic_blocks import CHUNK, dot, split_heads
from pallas_kernels.kda.mosaic_scores import level_weights, levels

LEVELS = levels(1)
# Exponents whose gradients are summed: one of each level, those of the decays up to a token and after it.
EXPONENTS = len(LEVELS) + 2


def gradient_codes(pack: int) -> np.ndarray:
    """Returns int32 [128, pack * 128], the level of each entry of [[X + X^T, P^T], [P, 0]]; 0 is none."""
    i, j = np.indices((CHUNK, CHUNK))
    code = np.zeros((CHUNK, CHUNK), np.int32)
    for size in LEVELS:
        code[(i // (2 * size) == j // (2 * size)) & (i // size != j // size)] = size
    lower, upper = np.where(i > j, code, 0), np.where(i < j, code, 0)
    blocks = np.block([[code, upper], [lower, np.zeros_like(code)]])
    return np.tile(blocks, (1, pack)).astype(np.int32)


def exponent_weights() -> np.ndarray:
    """Returns [64, EXPONENTS * 64], one where a row's log decay is in the sum that is a column's exponent."""
    t, i = np.indices((CHUNK, CHUNK))
    sets = [level_weights(size).T for size in LEVELS]
    return np.concatenate([*sets, t <= i, t > i], axis=1).astype(np.float32)


def level_gradients(
    k: Float[Array, "64 PD"],
    q: Float[Array, "64 PD"],
    factor: Float[Array, "64 PD"],
    gradients: Float[Array, "128 P128"],
    codes: Int32[Array, "128 P128"],
    size: int,
    pack: int,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "64 PD"], Float[Array, "64 PD"], Float[Array, "64 PD"]]:
    """Returns a level's parts of dk and dq, and the gradient of its exponents.

    `gradients` are [[X + X^T, P^T], [P, 0]] of each head, 128 lanes a head. Operands are rounded to `dtype`.
    """
    keys, queries = k * factor, q * factor
    left = jnp.where(codes == size, gradients, 0).astype(dtype)
    out = dot(left, stack_heads(keys.astype(dtype), queries.astype(dtype), pack))
    dk, dq = out[:CHUNK], out[CHUNK:]
    return factor * dk, factor * dq, keys * dk + queries * dq


def stack_heads(a: Float[Array, "64 PD"], b: Float[Array, "64 PD"], pack: int) -> Float[Array, "P128 PD"]:
    """Returns the rows of a and then of b of each head, in that head's lanes, with zeros in those of others."""
    rows = []
    for h, pair in enumerate(zip(split_heads(a, pack), split_heads(b, pack), strict=True)):
        rows += [jnp.concatenate([x if at == h else jnp.zeros_like(x) for at in range(pack)], axis=1) for x in pair]
    return jnp.concatenate(rows, axis=0)
