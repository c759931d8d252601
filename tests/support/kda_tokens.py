"""Draws arguments for KDA's chunk kernels: keys alike or not, decays weak and strong, segments packed in rows."""

import jax.numpy as jnp
import numpy as np


def tokens(batch, length, heads, decay=0.1, cosine=0.5, seed=0):
    """Draws q, k, v, g, beta: keys that partly have one direction, decays around a magnitude or a mixture of
    several."""
    rng = np.random.default_rng(seed)
    k = np.sqrt(cosine) * rng.standard_normal((1, 1, heads, 128))
    k = k + np.sqrt(1 - cosine) * rng.standard_normal((batch, length, heads, 128))
    q, v = rng.standard_normal((2, *k.shape))
    q, k = (array / np.linalg.norm(array, axis=-1, keepdims=True) for array in (q, k))
    g = -rng.uniform(0.5, 1.5, k.shape) * rng.choice(np.atleast_1d(decay), k.shape)
    return [np.float32(array) for array in (q, k, v, g, rng.choice([1e-3, 0.5, 0.999], k.shape[:3]))]


def rows_of_decays(length, decays, cosines=(0.5, 0.99)):
    """Draws tokens with a row for each decay and a head for each likeness of keys."""
    rows = [[tokens(1, length, 1, decay, cosine) for cosine in cosines] for decay in decays]
    rows = [[np.concatenate(heads, axis=2) for heads in zip(*row, strict=True)] for row in rows]
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]


def states(batch, segments, heads):
    return np.random.default_rng(9).standard_normal((batch, segments, heads, 128, 128)).astype(np.float32)


def rounded(arrays, dtype):
    q, k, v, g, beta = arrays
    return *(jnp.asarray(array, dtype) for array in (q, k, v)), jnp.asarray(g), jnp.asarray(beta)


def packed_ids(lengths, gap=2):
    """Returns segment ids, one segment after another, each followed by padding."""
    return np.concatenate([np.repeat([n, -1], [length, gap]) for n, length in enumerate(lengths)]).astype(np.int32)


def segments_as_rows(arrays, ids, segments, width):
    """Returns float64 [segments * rows, width, ...] of packed arrays [rows, T, ...], each segment then padded with
    zeros."""
    placed = [np.zeros((segments, len(array), width, *array.shape[2:]), np.float64) for array in arrays]
    for array, into in zip(arrays, placed, strict=True):
        for n in range(segments):
            into[n, :, : np.sum(ids == n)] = np.asarray(array, np.float64)[:, ids == n]
    return [into.reshape(-1, *into.shape[2:]) for into in placed]
