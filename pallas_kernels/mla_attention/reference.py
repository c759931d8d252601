"""Latent attention with the whole score matrix, in numpy float64.

DeepSeek-V2 (arXiv 2405.04434), section 2.1: prefill with expanded heads, decode absorbed, where every head reads the
latent itself.
"""

import numpy as np


def mla_prefill(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    kv_positions: np.ndarray,
    q_segments: np.ndarray,
    kv_segments: np.ndarray,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns output [B, S, H, Dv] and log-sum-exp [B, S, H], float64; arguments are those of `api.mla_prefill`."""
    attends = (kv_positions[:, None, :] <= q_positions[:, :, None]) & (
        q_segments[:, :, None] == kv_segments[:, None, :]
    )
    attends &= (q_segments[:, :, None] >= 0) & (kv_segments[:, None, :] >= 0)
    scores = np.einsum("bshd,bthd->bsht", *(np.asarray(array, np.float64) for array in (q, k))) * scale
    weights, lse = softmax(np.where(attends[:, :, None, :], scores, -np.inf))
    return np.einsum("bsht,bthd->bshd", weights, np.asarray(v, np.float64)), lse


def mla_decode(
    q: np.ndarray,
    cache: np.ndarray,
    page_table: np.ndarray,
    lengths: np.ndarray,
    latent: int,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns output and log-sum-exp like those of `api.mla_decode`, float64, one sequence after another."""
    if lengths.ndim == 2:
        each = [
            mla_decode(q[:, :, t], cache, page_table, lengths[:, t], latent, scale) for t in range(lengths.shape[1])
        ]
        outs, lses = zip(*each, strict=True)
        return np.stack(outs, axis=2), np.stack(lses, axis=2)
    q = q.astype(np.float64)
    batch, heads, _ = q.shape
    out, lse = np.zeros((batch, heads, latent)), np.full((batch, heads), -np.inf)
    for b in range(batch):
        pages = page_table[b, : -(-lengths[b] // cache.shape[2])]
        tokens = np.concatenate([cache[page].T for page in pages] + [np.zeros((0, cache.shape[1]))])[
            : lengths[b]
        ].astype(np.float64)
        weights, lse[b] = softmax(q[b] @ tokens.T * scale)
        out[b] = weights @ tokens[:, :latent]
    return out, lse


def softmax(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns weights over the last axis and the log-sum-exp; zeros and -inf where all scores are -inf."""
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + np.where(np.isfinite(top), top, 0)
    return weights / np.where(total == 0, 1, total), lse[..., 0]
