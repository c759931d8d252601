"""The sum of a residual stream and its norm, in plain JAX and as an interpreted kernel, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernel_numerics import relative_rmse

from pallas_kernels import add_norm, rms_norm
from pallas_kernels.norm import mosaic_tpu, reference, shapes

EPS = 1e-6
SHAPES = pytest.mark.parametrize("shape", shapes.KIMI + shapes.AWKWARD, ids=lambda shape: shape.name)


def arguments(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(shape.T, shape.D)) for _ in range(2))
    return tuple(jnp.asarray(array, dtype) for array in (*rows, 1 + 0.1 * rng.normal(size=shape.D)))


def against_float64():
    """Returns the cases of shapes and dtypes; Kimi's own shapes are quick in bf16."""
    for shape in shapes.KIMI + shapes.AWKWARD:
        for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)):
            slow = shape in shapes.KIMI and dtype == jnp.float32
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(shape, dtype, tolerance, id=f"{shape.name}-{dtype.__name__}", marks=marks)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
@pytest.mark.parametrize(("shape", "dtype", "tolerance"), list(against_float64()))
def test_against_float64(shape, dtype, tolerance, implementation):
    given = arguments(shape, dtype)
    run = jax.jit(partial(add_norm, eps=EPS, rows=shape.rows, implementation=implementation))
    total, normed = run(*given, block=shape.block)
    exact, _ = reference.add_norm(*given, EPS)
    # The norm is of the sum as it is rounded
    assert total.dtype == normed.dtype == dtype and relative_rmse(total, exact) <= tolerance
    _, expected = reference.add_norm(total, 0 * total, given[2], EPS, shape.rows, shape.block)
    assert normed.shape == expected.shape and relative_rmse(normed, expected) <= tolerance


@SHAPES
def test_the_sum_is_that_of_plain_jax_bit_for_bit(shape):
    x, y, weight = arguments(shape, jnp.bfloat16)
    total, normed = add_norm(x, y, weight, eps=EPS, rows=shape.rows, block=shape.block, implementation="mosaic_tpu")
    np.testing.assert_array_equal(total, x + y)
    rows = slice(shape.block * shape.rows, (shape.block + 1) * shape.rows)
    assert relative_rmse(normed, np.asarray(rms_norm((x + y)[rows], weight, EPS), np.float64)) <= 1e-3


def test_reads_nothing_that_is_out_of_bounds_and_uses_nothing_uninitialised():
    careful = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan", detect_races=True)
    for shape in shapes.AWKWARD[1:]:
        given = arguments(shape, jnp.float32)
        try:
            found = mosaic_tpu.add_norm(*given, jnp.int32(shape.block), eps=EPS, rows=shape.rows, interpret=careful)
        finally:
            pltpu.reset_tpu_interpret_mode_state()
        for one, expected in zip(found, reference.add_norm(*given, EPS, shape.rows, shape.block), strict=True):
            assert relative_rmse(one, expected) <= 1e-6


def test_the_gradient_is_that_of_plain_jax():
    given = arguments(shapes.AWKWARD[2], jnp.float32)

    def loss(x, y, weight, implementation):
        total, normed = add_norm(x, y, weight, eps=EPS, rows=24, block=2, implementation=implementation)
        return (jnp.sin(total) + 1).sum() + (normed**2 * jnp.arange(384)).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    found, expected = (gradient(*given, one) for one in ("mosaic_tpu", "xla"))
    for one, want in zip(found, expected, strict=True):
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": jnp.zeros((16, 64))}, "add_norm: y has shape (16, 64), expected [T=16, D=128]"),
        ({"weight": jnp.zeros(64)}, "add_norm: weight has shape (64,), expected [D=128]"),
        ({"y": jnp.zeros((16, 128), jnp.bfloat16)}, "add_norm: y is bfloat16, expected float32"),
        ({"rows": 17}, "add_norm: rows is 17, expected 0 to 16"),
        (
            {"rows": 4, "implementation": "mosaic_tpu"},
            "add_norm: the mosaic_tpu kernel cannot serve this call: 4 of 16 rows are normed, expected all or a "
            "multiple of 8",
        ),
    ],
)
def test_bad_arguments_are_refused(change, message):
    good = {"x": jnp.zeros((16, 128)), "y": jnp.zeros((16, 128)), "weight": jnp.zeros(128), "eps": EPS}
    assert [one.shape for one in add_norm(**good, rows=8)] == [(16, 128), (8, 128)]
    with pytest.raises(ValueError) as raised:
        add_norm(**good | change)
    assert str(raised.value) == message
