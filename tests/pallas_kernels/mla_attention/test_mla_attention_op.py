"""Latent attention, prefill, decode and cache writes, against float64 numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_numerics import relative_rmse

from pallas_kernels import mla_decode, mla_prefill, mla_write
from pallas_kernels.mla_attention import reference
from pallas_kernels.mla_attention.shapes import DECODE, PREFILL

TOLERANCES = [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3)]
PREFILL_JIT = jax.jit(mla_prefill, static_argnames=("scale", "return_lse"))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def zeros(*shape):
    return np.zeros(shape, np.int32)


@pytest.mark.parametrize("dtype,tolerance", TOLERANCES)
@pytest.mark.parametrize("shape", PREFILL, ids=lambda shape: shape.name)
def test_prefill(shape, dtype, tolerance):
    q, k, v = (
        jnp.asarray(normal(i, shape.B, length, shape.H, width), dtype)
        for i, (length, width) in enumerate([(shape.S, shape.D), (shape.T, shape.D), (shape.T, shape.Dv)])
    )
    # The queries are the last S of T tokens.
    kv_positions = np.tile(np.arange(shape.T, dtype=np.int32), (shape.B, 1))
    q_positions = kv_positions[:, shape.T - shape.S :]
    out, lse = PREFILL_JIT(q, k, v, q_positions=q_positions, kv_positions=kv_positions, scale=0.1, return_lse=True)
    segments = zeros(*q_positions.shape), zeros(*kv_positions.shape)
    wide = (np.asarray(array, np.float32) for array in (q, k, v))
    expected, expected_lse = reference.mla_prefill(*wide, q_positions, kv_positions, *segments, 0.1)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert relative_rmse(out, expected) <= tolerance
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-6)


def packed(seed=0, tokens=530):
    """Returns three images in a row of patches, seen both ways, with padding before, between and after them."""
    q, k, v = (normal(seed + i, 1, tokens, 2, 9) for i in range(3))
    segments = np.full((1, tokens), -1, np.int32)
    for segment, (start, end) in enumerate([(3, 40), (40, 300), (310, 520)]):
        segments[0, start:end] = segment
    return (q, k, v), segments


def test_packed_and_bidirectional_with_poisoned_padding():
    (q, k, v), segments = packed()
    positions = zeros(*segments.shape)
    expected, expected_lse = reference.mla_prefill(q, k, v, positions, positions, segments, segments, 0.3)
    k[segments < 0], v[segments < 0] = np.nan, np.nan
    run = partial(PREFILL_JIT, q_positions=positions, kv_positions=positions, scale=0.3)
    out, lse = run(q, k, v, q_segments=segments, kv_segments=segments, return_lse=True)
    assert relative_rmse(out, expected) <= 1e-6
    assert not np.asarray(out)[segments < 0].any() and np.isneginf(np.asarray(lse)[segments < 0]).all()
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-6)


def test_halves_merge_by_log_sum_exp():
    q, k, v = (normal(i, 1, 20, 2, 8) for i in range(3))
    positions = np.arange(20, dtype=np.int32)[None]
    run = partial(mla_prefill, scale=0.4, return_lse=True, q_positions=positions)
    (a, a_lse), (b, b_lse) = (run(q, k[:, s], v[:, s], kv_positions=positions[:, s]) for s in (np.s_[:9], np.s_[9:]))
    weights = jax.nn.softmax(jnp.stack([a_lse, b_lse]), axis=0)[..., None]
    expected, _ = reference.mla_prefill(q, k, v, positions, positions, zeros(1, 20), zeros(1, 20), 0.4)
    assert relative_rmse(weights[0] * a + weights[1] * b, expected) <= 1e-6


def test_prefill_gradients():
    (q, k, v), segments = packed(5, 530)
    positions = np.arange(530, dtype=np.int32)[None]
    weights, lse_weights = normal(8, *v.shape), normal(9, 1, 530, 2) * (segments >= 0)[..., None]

    def loss(attend, q, k, v):
        out, lse = attend(q, k, v)
        return jnp.sum(out * weights) + jnp.sum(jnp.where((segments >= 0)[..., None], lse, 0) * lse_weights)

    def whole(q, k, v):
        scores = 0.3 * jnp.einsum("bshd,bthd->bsht", q, k)
        sees = (positions[:, None, :] <= positions[:, :, None]) & (segments[:, None, :] == segments[:, :, None])
        sees &= (segments >= 0)[:, :, None]
        scores = jnp.where(sees[:, :, None], scores, -1e30)
        weights = jnp.where(sees[:, :, None], jax.nn.softmax(scores), 0)
        return jnp.einsum("bsht,bthd->bshd", weights, v), jax.nn.logsumexp(scores, axis=-1)

    options = {"q_positions": positions, "kv_positions": positions, "q_segments": segments, "kv_segments": segments}
    ours = partial(loss, partial(mla_prefill, **options, scale=0.3, return_lse=True))
    found = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(q, k, v)
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in (q, k, v)]
        expected = jax.jit(jax.grad(partial(loss, whole), argnums=(0, 1, 2)))(*wide)
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_rmse(mine, theirs) <= 2e-6


@pytest.mark.parametrize("dtype,tolerance", TOLERANCES)
@pytest.mark.parametrize("shape", DECODE, ids=lambda shape: shape.name)
def test_decode(shape, dtype, tolerance):
    batch = len(shape.lengths)
    needed = [-(-length // shape.page) for length in shape.lengths]
    pages = sum(needed) + 1
    order = np.random.default_rng(0).permutation(pages)
    table = np.full((batch, max(needed) + 1), 10**6, np.int32)  # no length reaches these entries
    cache = normal(1, pages, shape.latent + shape.rope, shape.page)
    cache[order[-1]] = np.nan
    for b, count in enumerate(needed):
        table[b, :count] = order[sum(needed[:b]) :][:count]
        if count and shape.lengths[b] % shape.page:
            cache[table[b, count - 1], :, shape.lengths[b] % shape.page :] = np.nan
    q = normal(2, batch, shape.H, shape.latent + shape.rope)
    q, cache = (jnp.asarray(array, dtype) for array in (q, cache))
    lengths = np.array(shape.lengths, np.int32)
    decode = jax.jit(partial(mla_decode, latent=shape.latent, scale=0.05, return_lse=True))
    out, lse = decode(q, cache, table, lengths)
    wide = (np.asarray(array, np.float32) for array in (q, cache))
    expected, expected_lse = reference.mla_decode(*wide, table, lengths, shape.latent, 0.05)
    assert out.dtype == dtype and relative_rmse(out, expected) <= tolerance
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-6)
    assert not np.asarray(out, np.float32)[lengths == 0].any()


def test_write_puts_rows_in_their_pages():
    cache, table = normal(0, 5, 6, 4), np.array([[3, 0], [1, 4]], np.int32)
    latents, positions = normal(1, 2, 3, 6), np.array([[2, 3, 4], [7, -1, 0]], np.int32)
    expected = cache.copy()
    for (page, slot), row in (((3, 2), 0), ((3, 3), 1), ((0, 0), 2)):
        expected[page, :, slot] = latents[0, row]
    expected[4, :, 3], expected[1, :, 0] = latents[1, 0], latents[1, 2]
    write = jax.jit(mla_write, donate_argnums=0)
    np.testing.assert_array_equal(write(jnp.asarray(cache), latents, table, positions), expected)
    # One row per sequence. Rows without a place are dropped, also where their index would count from the end.
    once = np.asarray(write(jnp.asarray(cache), latents[:, 0], np.array([[-1, 0], [1, 4]], np.int32), np.array([2, 9])))
    np.testing.assert_array_equal(once, cache)


def test_bad_arguments_are_refused():
    q, positions = normal(0, 1, 3, 2, 8), np.arange(3, dtype=np.int32)[None]
    cache, table = normal(1, 4, 12, 4), np.array([[0, 3]], np.int32)
    prefill = partial(mla_prefill, q, q_positions=positions, kv_positions=positions, scale=1.0)
    options = {"latent": 8, "scale": 1.0}
    decode = partial(mla_decode, normal(2, 1, 2, 12), **options)
    of_two = partial(mla_decode, normal(2, 1, 2, 2, 12), cache, table, **options)
    for message, call in (
        (r"k has shape \(1, 3, 2, 7\), expected \[B=1, T, H=2, D=8\]", lambda: prefill(q[..., :7], q)),
        (r"v is bfloat16, expected float32", lambda: prefill(q, jnp.asarray(q, jnp.bfloat16))),
        (r"go together", lambda: prefill(q, q, q_segments=positions)),
        (r"cannot serve", lambda: prefill(q, q, implementation="mosaic_tpu")),
        (r"cache has shape \(4, 12, 4\), expected \[pages, width=11, page\]",
         lambda: mla_decode(normal(3, 1, 2, 11), cache, table, np.int32([5]), **options)),
        (r"latent is 13, expected 1 to 12", lambda: decode(cache, table, np.int32([5]), latent=13)),
        (r"shards is 3, expected a divisor of 2 heads", lambda: decode(cache, table, np.int32([5]), shards=3)),
        (r"a sequence has 9 tokens, expected at most 2 pages of 4",
         lambda: decode(cache, table, np.int32([9]))),
        (r"a sequence has -1 tokens, expected 0 or more",
         lambda: decode(cache, table, np.int32([-1]))),
        (r"a sequence has -2 tokens, expected 0 or more", lambda: of_two(np.int32([[5, -2]]))),
        (r"page_table is float32, expected",
         lambda: decode(cache, np.float32(table), np.int32([5]))),
        (r"page_table names pages 0 to 4, expected 0 to 3",
         lambda: decode(cache, np.int32([[0, 4]]), np.int32([5]))),
        (r"mla_write: a sequence has 9 tokens", lambda: mla_write(cache, normal(4, 1, 12), table, np.int32([8]))),
        (r"positions has shape \(1, 1\), expected \[B=1\]",
         lambda: mla_write(cache, normal(4, 1, 12), table, np.int32([[8]]))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
