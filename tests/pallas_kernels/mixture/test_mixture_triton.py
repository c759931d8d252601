"""A mixture as the interpreted kernels for GPUs, against float64 loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_numerics import relative_rmse

from pallas_kernels import Int4, mixture
from pallas_kernels.mixture import reference, shapes, triton

TOLERANCES = {jnp.float32: 1e-6, jnp.bfloat16: 4e-3}
QUICK = {(shapes.AWKWARD[3], True, jnp.bfloat16), (shapes.AWKWARD[1], False, jnp.float32)}


def arguments(shape, dtype, int4):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(shape.T, shape.K)), dtype)
    chosen = jnp.asarray([rng.permutation(shape.experts)[: shape.J] for _ in range(shape.T)], jnp.int32)
    weights = jnp.asarray(rng.uniform(size=chosen.shape), jnp.float32)

    def matrix(out, in_):
        values = jnp.asarray(rng.normal(size=(shape.num_local, out, in_)), jnp.float32)
        return jax.jit(Int4.from_dense)(values) if int4 else values.astype(dtype)

    return x, chosen, weights, matrix(shape.N, shape.K), matrix(shape.N, shape.K), matrix(shape.K, shape.N)


def run(shape, *arrays):
    call = jax.jit(lambda *arrays: mixture(*arrays, first=shape.first, implementation="triton"))
    return call(*arrays)


def cases():
    for shape in (*shapes.AWKWARD, *shapes.KIMI):
        for int4 in (False, True):
            for dtype in TOLERANCES:
                marks = [] if (shape, int4, dtype) in QUICK else [pytest.mark.slow]
                label = f"{shape.name}-{'int4' if int4 else 'dense'}-{dtype.__name__}"
                yield pytest.param(shape, int4, dtype, id=label, marks=marks)


@pytest.mark.parametrize(("shape", "int4", "dtype"), list(cases()))
def test_against_float64(shape, int4, dtype):
    given = arguments(shape, dtype, int4)
    expected, found = reference.mixture(*given, shape.first), run(shape, *given)
    assert found.dtype == jnp.float32
    assert relative_rmse(found, expected) <= TOLERANCES[dtype]
    np.testing.assert_array_equal(found[(expected == 0).all(-1)], 0)


def test_blocks_of_tokens_and_what_no_token_may_see(monkeypatch):
    # Given more tokens than a block takes, one of which is not finite, and an expert that none has chosen
    monkeypatch.setattr(triton, "BLOCK", 16)
    shape = shapes.MixtureShape("", 11, 2, 128, 64, 5, 1, 4)
    x, chosen, weights, *matrices = arguments(shape, jnp.float32, int4=False)
    chosen = jnp.where(chosen == 2, -1, chosen)
    expected = reference.mixture(x, chosen, weights, *matrices, 1)
    poisoned = [matrix.at[1].set(jnp.nan) for matrix in matrices]
    found = np.asarray(run(shape, x.at[5].set(jnp.nan), chosen, weights, *poisoned))
    assert np.isnan(found[5]).all() == bool((np.asarray(chosen[5]) >= 1).any())
    assert relative_rmse(np.delete(found, 5, 0), np.delete(expected, 5, 0)) <= 1e-6
