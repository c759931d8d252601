"""INT4 packing, quantising and the matmul: against published bits, and against numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kernel_numerics import relative_rmse

from pallas_kernels import Int4, dequantize_int4, int4_matmul, pack_int4, quantize_int4, unpack_int4
from pallas_kernels.formats.reference import dequantize_int4 as dequantize_exactly
from pallas_kernels.matmul import reference
from pallas_kernels.matmul.shapes import AWKWARD, KIMI

# Kimi-K2.6, layer 1, expert 0, gate_proj, row 0, first 64 columns: words, scales and dequantised weights (bf16 bits),
# as published in NovaSky-AI/SkyRL, tests/backends/skyrl_train/_fake_int4_qat_golden.py.
WORDS = [1467423512, -1771734362, 1525177177, -1138393451, -1984456792, 2020181896, -1733860218, 2136586633]
SCALES = [15328, 15450]
WEIGHTS = [
    *(0, 48452, 15528, 48452, 48096, 48096, 48096, 48296, 48224, 15456, 15456, 48096, 48296, 48224, 48224, 15328),
    *(15328, 48296, 15528, 48296, 0, 15656, 15456, 48296, 48296, 15328, 15656, 48096, 48296, 48424, 15584, 15528),
    *(0, 15578, 48218, 15450, 48218, 15652, 15450, 0, 0, 0, 48218, 0, 15450, 48346, 0, 48218),
    *(48346, 0, 48474, 48346, 48218, 15578, 0, 15450, 15450, 0, 15450, 15652, 15450, 48420, 15807, 48218),
]


def bf16(bits: list[int]) -> np.ndarray:
    return np.array(bits, np.uint16).view(ml_dtypes.bfloat16)


def bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.bfloat16)).view(np.uint16)


def weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_published_weights_come_out_bit_for_bit(dtype):
    codes, scales = unpack_int4(np.array([WORDS], np.int32), bf16(SCALES)[None])
    assert codes.shape == (64, 1) and scales.shape == (2, 1) and codes.dtype == jnp.int4
    dequantised = jax.jit(dequantize_int4, static_argnums=2)(codes, scales, dtype)
    np.testing.assert_array_equal(bits(dequantised)[:, 0], WEIGHTS)
    np.testing.assert_array_equal(np.asarray(dequantised, np.float32)[:, 0], bf16(WEIGHTS).astype(np.float32))


def test_published_weights_are_a_fixed_point_of_the_quantiser():
    published = bf16(WEIGHTS)[:, None]
    words, scales = pack_int4(*quantize_int4(published))
    np.testing.assert_array_equal(words, [WORDS])
    np.testing.assert_array_equal(bits(scales), [SCALES])


def test_every_scale_of_a_binade():
    # All 128 significands of bf16, each with all codes; the largest code is 7, as in every group of the quantiser.
    scales = bf16(list(range(15328, 15328 + 128)))[None]
    codes = np.tile(np.concatenate([np.arange(-7, 8), np.arange(-7, 8), [7, 0]]), (128, 1)).T
    dequantised = dequantize_int4(codes.astype(ml_dtypes.int4), scales)
    again_codes, again_scales = quantize_int4(dequantised)
    np.testing.assert_array_equal(np.asarray(again_codes, np.int8), codes)
    moved = bits(again_scales) != scales.view(np.uint16)
    # By the definition of the quantiser, bf16(bf16(7 s) / 7) is not s for these.
    largest = (7 * scales.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(moved, (largest / np.float32(7)).astype(ml_dtypes.bfloat16) != scales)
    assert moved.sum() == 14
    # Nor can the quantiser make them: its own results are fixed points.
    once_more = quantize_int4(dequantize_int4(again_codes, again_scales))
    np.testing.assert_array_equal(bits(once_more[1]), bits(again_scales))
    np.testing.assert_array_equal(np.asarray(once_more[0], np.int8), codes)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_the_quantiser_makes_is_a_fixed_point(dtype):
    # 4,096 groups, so that every significand occurs
    weights = np.random.RandomState(0).normal(size=(32 * 64, 64)).astype(dtype)
    codes, scales = quantize_int4(weights)
    again_codes, again_scales = quantize_int4(dequantize_int4(codes, scales, jnp.float32))
    np.testing.assert_array_equal(bits(again_scales), bits(scales))
    np.testing.assert_array_equal(np.asarray(again_codes, np.int8), np.asarray(codes, np.int8))


@settings(deadline=None, max_examples=8, derandomize=True)
@given(words=hnp.arrays(np.int32, st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([4, 8, 12]))))
def test_packing_inverts_unpacking(words):
    scales = np.arange(words.size // 4, dtype=np.float32).reshape(*words.shape[:-1], -1)
    codes, kernel_scales = unpack_int4(words, scales)
    assert codes.shape == (words.shape[0], words.shape[2] * 8, words.shape[1])
    np.testing.assert_array_equal(kernel_scales, scales.swapaxes(1, 2))
    packed, published = pack_int4(codes, kernel_scales)
    np.testing.assert_array_equal(packed, words)
    np.testing.assert_array_equal(published, scales)


def test_unpacking_reads_the_low_nibble_first():
    words = np.zeros((1, 4), np.uint32)
    words[0, 1] = 0xF0000007
    codes, _ = unpack_int4(words.view(np.int32), np.ones((1, 1), np.float32))
    expected = np.full(32, -8)
    expected[8], expected[15] = -1, 7
    np.testing.assert_array_equal(np.asarray(codes, np.int8)[:, 0], expected)


def test_the_quantiser_is_that_of_quantisation_aware_training():
    w = weights(np.random.default_rng(0), 3, 96, 20)
    w[1, 32:64, 5] = 0
    codes, scales = quantize_int4(w)
    groups = w.astype(ml_dtypes.bfloat16).astype(np.float32).reshape(3, 3, 32, 20)
    expected = (np.abs(groups).max(2) / np.float32(7)).astype(ml_dtypes.bfloat16)
    expected[1, 1, 5] = 1
    quotient = np.rint(groups / expected.astype(np.float32)[:, :, None]).clip(-7, 7).reshape(w.shape)
    np.testing.assert_array_equal(bits(scales), expected.view(np.uint16))
    np.testing.assert_array_equal(np.asarray(codes, np.int8), quotient)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
@pytest.mark.parametrize("shape", KIMI[1:] + AWKWARD, ids=lambda shape: shape.name)
def test_matmul(shape, dtype, tolerance):
    rng = np.random.default_rng(1)
    x = jnp.asarray(weights(rng, shape.M, shape.K), dtype)
    codes = jnp.asarray(rng.integers(-8, 8, (shape.K, shape.N)), jnp.int4)
    scales = jnp.asarray(rng.uniform(0.5, 2, (shape.K // 32, shape.N)), jnp.bfloat16)
    found = jax.jit(int4_matmul)(x, codes, scales)
    assert found.dtype == dtype
    assert relative_rmse(found, reference.matmul(x, Int4(codes, scales))) <= tolerance


def test_gradient_with_respect_to_x():
    rng = np.random.default_rng(2)
    x, dy = weights(rng, 5, 64), weights(rng, 5, 6)
    codes, scales = quantize_int4(weights(rng, 64, 6))
    (dx,) = jax.vjp(lambda x: int4_matmul(x, codes, scales), x)[1](dy)
    assert relative_rmse(dx, dy @ dequantize_exactly(codes, scales).T) <= 1e-6


def test_bad_arguments_are_refused():
    codes, scales = quantize_int4(np.ones((64, 8), np.float32))
    x = np.ones((2, 64), np.float32)
    for message, call in (
        (r"codes has shape \(64, 8\), expected \[K=32, N\]", lambda: int4_matmul(x[:, :32], codes, scales)),
        (r"scales has shape \(1, 8\), expected \[2, N=8\]", lambda: int4_matmul(x, codes, scales[:1])),
        (r"codes are int8, expected int4", lambda: int4_matmul(x, codes.astype(jnp.int8), scales)),
        (r"x is int32, expected floating", lambda: int4_matmul(x.astype(np.int32), codes, scales)),
        (r"multiple of 32", lambda: int4_matmul(x[:, :40], codes[:40], scales[:1])),
        (r"cannot serve", lambda: int4_matmul(x, codes, scales, implementation="mosaic_tpu")),
        (r"quantize_int4: weights have shape \(40, 8\)", lambda: quantize_int4(np.ones((40, 8), np.float32))),
        (r"unpack_int4: words is float32", lambda: unpack_int4(x, scales)),
        (
            r"unpack_int4: scales have shape",
            lambda: unpack_int4(np.zeros((8, 8), np.int32), np.ones((8, 3), np.float32)),
        ),
        (r"pack_int4: scales have shape", lambda: pack_int4(codes, scales.T)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
