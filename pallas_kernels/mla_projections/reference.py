"""The projections around `mla_decode` in numpy float64."""

import numpy as np
from numpy.typing import ArrayLike


def mla_query(
    q_a: ArrayLike,
    kv_a: ArrayLike,
    angles: ArrayLike | None,
    q_norm: ArrayLike | None,
    kv_norm: ArrayLike,
    q_b: ArrayLike,
    kv_b: ArrayLike,
    *,
    heads: int,
    eps: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes `api.mla_query`, given q_a and kv_a whole, and `angles` [B, R/2] in radians instead of cos and sin."""
    q_a, kv_a, kv_norm = (np.asarray(array, np.float64) for array in (q_a, kv_a, kv_norm))
    latent = kv_norm.shape[0]
    rope = kv_a.shape[1] - latent
    low = q_a if q_norm is None else _normed(q_a, q_norm, eps)
    q = (low @ np.asarray(q_b, np.float64).T).reshape(len(q_a), heads, -1)
    nope, pe, k_pe = q[..., : q.shape[-1] - rope], q[..., q.shape[-1] - rope :], kv_a[:, latent:]
    if angles is not None:
        pe = np.stack([_rotate(pe[:, h], angles) for h in range(heads)], axis=1)
        k_pe = _rotate(k_pe, angles)
    w_uk = np.asarray(kv_b, np.float64).reshape(heads, -1, latent)[:, : nope.shape[-1]]
    q_latent = np.stack([nope[:, h] @ w_uk[h] for h in range(heads)], axis=1)
    latents = np.concatenate([_normed(kv_a[:, :latent], kv_norm, eps), k_pe], axis=1)
    return np.concatenate([q_latent, pe], axis=2), latents


def mla_output(o: ArrayLike, kv_b: ArrayLike, o_proj: ArrayLike, gate: ArrayLike | None = None) -> np.ndarray:
    """Computes `api.mla_output`."""
    o, o_proj = np.asarray(o, np.float64), np.asarray(o_proj, np.float64)
    share = np.ones((len(o), o_proj.shape[1])) if gate is None else 1 / (1 + np.exp(-np.asarray(gate, np.float64)))
    heads, latent = o.shape[1:]
    width = o_proj.shape[1] // heads
    w_uv = np.asarray(kv_b, np.float64).reshape(heads, -1, latent)[:, -width:]
    of_head = [slice(h * width, (h + 1) * width) for h in range(heads)]
    return sum(o[:, h] @ w_uv[h].T * share[:, at] @ o_proj[:, at].T for h, at in enumerate(of_head))


def _normed(x: np.ndarray, weight: ArrayLike, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64)


def _rotate(x: np.ndarray, angles: ArrayLike) -> np.ndarray:
    """Multiplies each pair, taken as a complex number, by exp(i angle)."""
    rotated = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * np.asarray(angles, np.float64))
    return np.concatenate([rotated.real, rotated.imag], axis=1)
