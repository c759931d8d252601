"""Weights as pytrees: shapes, axes, bytes and published tensors of each format; through JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Dense, Fp8, Int4, matmul, quantize_int4
from pallas_kernels.formats import FakeInt4, Part

SHAPE, AXES = (3, 160, 64), ("expert", "mlp", "embed")
FORMATS = pytest.mark.parametrize("weight_format", [Dense, Int4, Fp8, FakeInt4])


def values(*shape):
    return jnp.asarray(np.random.RandomState(0).standard_normal(shape), jnp.bfloat16)


@FORMATS
def test_a_weight_knows_its_shape_and_its_parts(weight_format):
    weight = weight_format.from_dense(values(*SHAPE))
    assert weight.shape == SHAPE and weight.dtype == jnp.bfloat16
    assert weight.dequantize().shape == SHAPE and weight.dequantize(jnp.float32).dtype == jnp.float32
    weight.check("op", "weight")
    for part, array in zip(weight.parts, weight.arrays, strict=True):
        assert part.shape(SHAPE) == array.shape
        assert len(part.axes(AXES)) == array.ndim
    assert [part.shape(SHAPE) for part in weight.stored] == [tensor.shape for tensor in weight.to_stored()]
    assert [part.dtype or jnp.bfloat16 for part in weight.stored] == [tensor.dtype for tensor in weight.to_stored()]
    again = weight_format.from_stored(*weight.to_stored())
    np.testing.assert_array_equal(again.dequantize(jnp.float32), weight.dequantize(jnp.float32))


def test_bytes_and_axes():
    count = np.prod(SHAPE)
    made = {kind: kind.from_dense(values(*SHAPE)).nbytes for kind in (Dense, Int4, Fp8)}
    assert made == {Dense: 2 * count, Int4: count // 2 + count // 16, Fp8: count + 3 * 2 * 4}
    assert [part.axes(AXES) for part in Int4.parts] == [("expert", "embed", "mlp")] * 2
    assert [part.axes(AXES) for part in Int4.stored] == [AXES] * 2
    assert [part.axes(AXES) for part in Fp8.parts] == [AXES, ("expert", None, None)]
    for part in (*Int4.parts, *Int4.stored):
        assert part.weight_shape(part.shape(SHAPE)) == SHAPE and part.weight_axes(part.axes(AXES)) == AXES
    assert Part("weight").shape((7,)) == (7,)  # of a norm


@FORMATS
def test_through_jit_vmap_and_scan(weight_format):
    weight = weight_format.from_dense(values(*SHAPE))
    x = values(5, SHAPE[2]).astype(jnp.float32)
    dense = weight.dequantize(jnp.float32)
    expected = np.einsum("tk,enk->etn", x, dense)
    found = jax.jit(jax.vmap(lambda matrix: matmul(x, matrix)))(weight)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    _, found = jax.lax.scan(lambda _, matrix: (None, matmul(x, matrix)), None, weight)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    one = jax.jit(lambda weight, i: weight.at(i))(weight, 2)
    assert type(one) is weight_format and one.shape == SHAPE[1:]
    np.testing.assert_array_equal(one.dequantize(jnp.float32), dense[2])


@FORMATS
def test_matmul_and_its_gradient(weight_format):
    # Given leading axes of any number, and a result in another dtype than x
    weight = weight_format.from_dense(values(*SHAPE[1:]))
    x = values(2, 3, SHAPE[2]).astype(jnp.float32)
    dense = np.asarray(weight.dequantize(jnp.float32), np.float64)
    found, pull = jax.vjp(lambda x: matmul(x, weight), x)
    np.testing.assert_allclose(found, x @ dense.T, rtol=0, atol=1e-4)
    dy = values(2, 3, SHAPE[1]).astype(jnp.float32)
    np.testing.assert_allclose(pull(dy)[0], dy @ dense, rtol=0, atol=1e-4)
    assert matmul(x.astype(jnp.bfloat16), weight, dtype=jnp.float32).dtype == jnp.float32


def test_weights_that_do_not_fit_are_refused():
    codes, scales = quantize_int4(values(64, 160))
    x = jnp.ones((2, 64), jnp.float32)
    for message, call in (
        (r"matmul: x has shape \(2, 32\), expected \[..., 64\]", lambda: matmul(x[:, :32], Int4(codes, scales))),
        (r"matmul: codes are int8, expected int4", lambda: matmul(x, Int4(codes.astype(jnp.int8), scales))),
        (r"matmul: scales have shape \(1, 160\)", lambda: matmul(x, Int4(codes, scales[:1]))),
        (r"matmul: weight has shape \(3, 160, 64\), expected \[N, K\]", lambda: matmul(x, values(*SHAPE))),
        (r"matmul: weight's weight_scale_inv have shape \(1, 1\), expected \(2, 1\)",
         lambda: matmul(x, Fp8(values(160, 64).astype(jnp.float8_e4m3fn), jnp.ones((1, 1))))),
        (r"matmul: weight's weight are float32, expected float8_e4m3fn",
         lambda: matmul(x, Fp8(jnp.ones((160, 64)), jnp.ones((2, 1))))),
        (r"implementation 'mosaic_tpu' is not available, expected None or one of \['xla'\]",
         lambda: matmul(x, values(160, 64), implementation="mosaic_tpu")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
