"""The codecs for NumPy and for JAX arrays: bit for bit alike, in either orientation, eagerly and compiled."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats import Fp8, fp8, int4_codec


def weights(seed: int, *shape: int) -> np.ndarray:
    """Returns bf16 of many magnitudes, some of them zero, and one group of zeros."""
    random = np.random.RandomState(seed)
    values = random.standard_normal(shape) * np.exp(random.uniform(-9, 2, shape))
    values[random.uniform(size=shape) < 0.05] = 0
    values[..., 0, :32] = 0
    return values.astype(ml_dtypes.bfloat16)


def assert_alike(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        mine, theirs = np.asarray(mine), np.asarray(theirs)
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "jit"])
def test_jax_and_numpy_make_the_same_int4(compile_it):
    run = jax.jit if compile_it else lambda function, **_: function
    weight = weights(0, 3, 20, 96)
    codes, scales = int4_codec.quantize(weight)
    assert codes.dtype == np.int8 and scales.dtype == ml_dtypes.bfloat16 and scales.shape == (3, 20, 3)
    assert not scales[:, 0, 0].any() and not codes[:, 0, :32].any()
    words = int4_codec.pack(codes)
    np.testing.assert_array_equal(int4_codec.unpack(words), codes)

    assert_alike(run(int4_codec.quantize)(jnp.asarray(weight)), (codes, scales))
    assert_alike([run(int4_codec.pack)(jnp.asarray(codes))], [words])
    assert_alike([run(int4_codec.unpack)(jnp.asarray(words))], [codes])
    read = int4_codec.dequantize(codes, scales)
    assert_alike([run(int4_codec.dequantize)(jnp.asarray(codes), jnp.asarray(scales))], [read])
    # Inputs first, as kernels have them
    turned = int4_codec.quantize(weight.swapaxes(1, 2), axis=-2)
    assert_alike([array.swapaxes(1, 2).copy() for array in turned], (codes, scales))
    found = run(partial(int4_codec.quantize, axis=-2))(jnp.asarray(weight).swapaxes(1, 2))
    assert_alike(found, [np.ascontiguousarray(array) for array in turned])


def test_every_word_is_read_back():
    words = np.random.RandomState(1).randint(-(2**31), 2**31, (4, 6)).astype(np.int32)
    codes = int4_codec.unpack(words)
    assert codes.min() == -8 and codes.max() == 7
    np.testing.assert_array_equal(int4_codec.pack(codes), words)


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (2, 129, 64)])
def test_jax_and_numpy_make_the_same_fp8(shape):
    weight = weights(2, *shape).astype(np.float32)
    values, scales = fp8.quantize(weight)
    assert_alike(jax.jit(fp8.quantize)(jnp.asarray(weight)), (values, scales))
    for dtype in (ml_dtypes.bfloat16, np.float32):
        read = fp8.dequantize(values, scales, dtype)
        found = jax.jit(Fp8.dequantize, static_argnums=1)(Fp8(jnp.asarray(values), jnp.asarray(scales)), dtype)
        assert_alike([found], [read])
    # half of e4m3's last step, 16 of 448, of the largest weight of a block
    error = np.abs(fp8.dequantize(values, scales, np.float32) - weight).max()
    assert error <= np.abs(weight).max() / 28
