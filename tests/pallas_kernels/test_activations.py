"""An activation is an argument: by name or as a function of its own, in plain JAX and in the interpreted kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_numerics import relative_rmse

from pallas_kernels import Int4, grouped_glu, mixture
from pallas_kernels.activations import SituGated
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.mixture import reference as mixtures

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(24, 128)), jnp.float32)
GATE, UP, DOWN = (jnp.asarray(RNG.normal(size=(3, 128, 128)) / 11, jnp.float32) for _ in range(3))
SIZES = jnp.asarray([9, 0, 15], jnp.int32)


def situ(gate, up):
    return 0.5 * np.tanh(gate / 0.5) / (1 + np.exp(-gate)) * 0.7 * np.tanh(up / 0.7)


def gelu(gate, up):
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


CASES = pytest.mark.parametrize(
    ("activation", "exact"), [("gelu_pytorch_tanh", gelu), (SituGated(0.5, 0.7), situ)], ids=["gelu", "situ"]
)


@CASES
@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_grouped_glu(activation, exact, int4, implementation):
    gate, up = (Int4.from_dense(weight) if int4 else weight for weight in (GATE, UP))
    found = grouped_glu(X, gate, up, SIZES, activation=activation, implementation=implementation)
    assert relative_rmse(found, reference.grouped_glu(X, gate, up, SIZES, activation=exact)) <= 1e-5


@CASES
@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_mixture(activation, exact, implementation):
    chosen = jnp.asarray([RNG.permutation(3)[:2] for _ in range(24)], jnp.int32)
    weights = jnp.asarray(RNG.uniform(size=chosen.shape), jnp.float32)
    arguments = X, chosen, weights, GATE, UP, DOWN
    found = mixture(*arguments, activation=activation, implementation=implementation)
    assert relative_rmse(found, mixtures.mixture(*arguments, activation=exact)) <= 1e-5


def test_the_gradient_is_that_of_the_activation():
    step = 1e-3
    along = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)
    dy = jnp.asarray(RNG.normal(size=(24, 128)), jnp.float32)
    (dx,) = jax.vjp(lambda x: grouped_glu(x, GATE, UP, SIZES, activation=SituGated(0.5, 0.7)), X)[1](dy)
    moved = [
        np.sum(np.asarray(dy, np.float64) * reference.grouped_glu(X + sign * step * along, GATE, UP, SIZES, 0, situ))
        for sign in (1, -1)
    ]
    np.testing.assert_allclose(np.sum(dx * along), (moved[0] - moved[1]) / (2 * step), rtol=1e-3)


def test_two_that_are_equal_share_a_program():
    traced = []

    @jax.jit
    def run(x):
        traced.append(None)
        return x

    glu = jax.jit(lambda x, activation: run(grouped_glu(x, GATE, UP, SIZES, activation=activation)), static_argnums=1)
    for _ in range(2):
        glu(X, SituGated(0.5, 0.7))
    assert len(traced) == 1


@pytest.mark.parametrize("activation", ["relu", 3, ["silu"]])
def test_what_is_no_activation_is_refused(activation):
    with pytest.raises(ValueError, match=r"grouped_glu: activation is .*, expected one of \['gelu_"):
        grouped_glu(X, GATE, UP, SIZES, activation=activation)
