"""MXFP4: its numbers against a table and the OCP rule, NumPy and JAX alike, bytes kept, ops that multiply by it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import grouped_glu, grouped_matmul, matmul
from pallas_kernels.formats import Mxfp4, mxfp4

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def numbers(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the numbers in float64, by the table of the format."""
    values = np.array([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    spread = np.stack([values[codes & 15], values[codes >> 4]], axis=-1).reshape(*codes.shape[:-1], -1)
    return spread * np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=-1)


def random_bytes(seed: int, *shape: int, low: int = 100, high: int = 140) -> tuple[np.ndarray, np.ndarray]:
    """Returns any codes of a weight [..., out, in], and scales of a middling range."""
    random = np.random.RandomState(seed)
    *outer, in_ = shape
    codes = random.randint(0, 256, (*outer, in_ // 2)).astype(np.uint8)
    return codes, random.randint(low, high, (*outer, in_ // 32)).astype(np.uint8)


def test_the_published_example():
    """Bytes 0x21 0xFE with the scale byte 126 are 0.25, 0.5, -2, -3."""
    codes = np.zeros((1, 16), np.uint8)
    codes[0, :2] = 0x21, 0xFE
    found = mxfp4.dequantize(codes, np.array([[126]], np.uint8))
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found[0, :5].astype(np.float64), [0.25, 0.5, -2, -3, 0])


@pytest.mark.parametrize("scale", [2, 127, 200, 251])
def test_every_code_is_read_exactly_by_both(scale):
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    scales = np.full((2, 8), scale, np.uint8)
    right = numbers(codes, scales)
    for found in (mxfp4.dequantize(codes, scales), jax.jit(mxfp4.dequantize)(codes, scales)):
        np.testing.assert_array_equal(np.asarray(found, np.float64), right)
        np.testing.assert_array_equal(np.signbit(np.asarray(found, np.float64)), np.signbit(right))


def test_a_scale_of_255_is_nan():
    codes, scales = np.full((1, 16), 0x21, np.uint8), np.array([[255]], np.uint8)
    for found in (mxfp4.dequantize(codes, scales), mxfp4.dequantize(jnp.asarray(codes), jnp.asarray(scales))):
        assert np.isnan(np.asarray(found, np.float32)).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_quantising_follows_the_rule(dtype):
    random = np.random.RandomState(0)
    weight = (random.standard_normal((24, 96)) * np.exp(random.uniform(-20, 20, (24, 96)))).astype(dtype)
    weight[0, :32], weight[1, :32] = 0, np.resize([-6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, -7.9, -0.0], 32)
    codes, scales = mxfp4.quantize(weight)
    # Given a group's scale, a code is the nearest, and of two the one whose mantissa is even
    groups = weight.astype(np.float64).reshape(24, 3, 32)
    largest = np.abs(groups).max(-1)
    expected = np.where(largest > 0, np.floor(np.log2(np.where(largest > 0, largest, 1))) - 2 + 127, 127)
    np.testing.assert_array_equal(scales, expected)
    quotients = np.clip(groups / 2.0 ** (expected[..., None] - 127), -6, 6).astype(ml_dtypes.float4_e2m1fn)
    right = quotients.astype(np.float64) * 2.0 ** (expected[..., None] - 127)
    np.testing.assert_array_equal(numbers(codes, scales), right.reshape(24, 96))
    # And JAX gives the same bytes
    for mine, theirs in zip(jax.jit(mxfp4.quantize)(jnp.asarray(weight)), (codes, scales), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_numbers_are_a_fixed_point():
    codes, scales = random_bytes(1, 16, 128)
    read = mxfp4.dequantize(codes, scales)
    again = mxfp4.dequantize(*mxfp4.quantize(read))
    assert again.tobytes() == read.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_that_is_not_finite_has_the_scale_of_nan(bad):
    weight = np.ones((2, 64), np.float32)
    weight[1, 40] = bad
    with np.errstate(invalid="ignore"):
        scales = mxfp4.quantize(weight)[1]
    assert scales.tolist() == [[125, 125], [125, 255]]


def test_published_bytes_are_given_back():
    codes, scales = random_bytes(2, 3, 24, 64, low=0, high=255)
    weight = Mxfp4.from_stored(jnp.asarray(codes), jnp.asarray(scales))
    assert weight.shape == (3, 24, 64) and weight.nbytes == 3 * 24 * 64 * 17 // 32
    for found, right in zip(weight.to_stored(), (codes, scales), strict=True):
        assert np.asarray(found).tobytes() == right.tobytes()


def test_ops_multiply_by_it():
    codes, scales = random_bytes(3, 2, 24, 64, low=120, high=132)
    weight = Mxfp4.from_stored(jnp.asarray(codes), jnp.asarray(scales))
    x = np.random.RandomState(4).standard_normal((5, 64)).astype(np.float32)
    right = numbers(codes, scales)
    sizes = jnp.array([2, 3], jnp.int32)
    grouped = np.concatenate([x[:2] @ right[0].T, x[2:] @ right[1].T])
    near = {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(matmul(x, weight.at(1)), x @ right[1].T, **near)
    np.testing.assert_allclose(grouped_matmul(jnp.asarray(x), weight, sizes), grouped, **near)
    silu = grouped / (1 + np.exp(-grouped)) * grouped
    np.testing.assert_allclose(grouped_glu(jnp.asarray(x), weight, weight, sizes), silu, rtol=1e-5, atol=1e-3)


def test_what_is_no_weight_is_refused():
    with pytest.raises(ValueError, match=r"Mxfp4: weight has shape \(4, 40\), expected .* in a multiple of 32"):
        Mxfp4.from_dense(jnp.ones((4, 40)))
    with pytest.raises(ValueError, match="matmul: weight's scales have shape"):
        matmul(jnp.ones((1, 64)), Mxfp4(jnp.zeros((32, 8), jnp.uint8), jnp.zeros((3, 8), jnp.uint8)))
    with pytest.raises(ValueError, match="matmul: weight has 48 inputs, expected a multiple of 32"):
        matmul(jnp.ones((1, 48)), Mxfp4(jnp.zeros((24, 8), jnp.uint8), jnp.zeros((1, 8), jnp.uint8)))
