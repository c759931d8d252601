"""The router, in plain JAX and as an interpreted kernel: its choices against `lax.top_k`, its numbers against
float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernel_numerics import dots, relative_rmse

from pallas_kernels import route
from pallas_kernels.router import mosaic_tpu, reference, shapes

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
SHAPES = pytest.mark.parametrize("shape", shapes.KIMI + shapes.AWKWARD, ids=lambda shape: shape.name)
SCALE = 2.827


def arguments(shape, dtype=jnp.bfloat16, spread=1.0, seed=0):
    """Draws tokens, weights whose logits have the standard deviation `spread`, and a bias."""
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(shape.T, shape.D)), rng.normal(size=(shape.E, shape.D)) * spread / shape.D**0.5
    bias = rng.normal(size=shape.E) * 0.1
    return *(jnp.asarray(array, dtype) for array in (x, weight)), jnp.asarray(bias, jnp.float32)


@jax.jit
def kernel_scores(x, weight):
    """Returns the scores [T, E] of the kernel's own logits."""
    blocks = weight.reshape(-1, mosaic_tpu.block_size(len(weight)), weight.shape[1])
    return jax.nn.sigmoid(jnp.concatenate([mosaic_tpu.logits(x, block) for block in blocks])).T


def check_against_top_k(given, choices):
    """Checks the kernel's choices to be those of `lax.top_k`, and its weights to be right but for rounding."""
    found = partial(route, choices=choices, scale=SCALE, implementation="mosaic_tpu")
    chosen, weights = jax.jit(found)(*given)
    assert chosen.dtype == jnp.int32 and weights.dtype == jnp.float32
    scores = kernel_scores(*given[:2])
    _, expected = jax.lax.top_k(scores + given[2], choices)
    np.testing.assert_array_equal(chosen, expected)
    exact = np.take_along_axis(np.asarray(scores, np.float64), np.asarray(expected), axis=1)
    exact = SCALE * exact / (exact.sum(axis=1, keepdims=True) + 1e-20)
    np.testing.assert_allclose(weights, exact, rtol=1e-6)
    return np.asarray(chosen)


@SHAPES
def test_chooses_as_top_k_does(shape):
    check_against_top_k(arguments(shape._replace(D=256)), shape.J)


def test_saturated_scores_are_ties_that_the_lowest_number_wins():
    # Given logits of hundreds, so that half of the scores are 1 and others 0, and no bias
    x, weight, bias = arguments(shapes.KIMI[0]._replace(D=256), spread=300.0)
    chosen = check_against_top_k((x, weight, 0 * bias), 8)
    # Then experts come in order
    assert (np.diff(chosen, axis=1) > 0).all()


@pytest.mark.parametrize("experts", [256, 384, 896])
def test_equal_experts_are_ties_that_the_lowest_number_wins(experts):
    # Given every expert three times, far from and beside one another
    x, weight, bias = arguments(shapes.RouterShape("", 5, 128, experts, 8))
    number = np.random.default_rng(1).permutation(experts) % (experts // 3)
    chosen = check_against_top_k((x, weight[number], bias[number]), 16)
    # Then equal ones that are chosen are so in order
    repeats = number[chosen][:, 1:] == number[chosen][:, :-1]
    assert repeats.any() and (np.diff(chosen, axis=1)[repeats] > 0).all()


@IMPLEMENTATIONS
@SHAPES
@pytest.mark.parametrize("normalize", [True, False])
def test_against_float64(shape, implementation, normalize):
    shape = shape if shape.T * shape.E < 20000 else shape._replace(T=7, D=256)
    given = arguments(shape, jnp.float32)
    options = {"choices": shape.J, "normalize": normalize, "scale": SCALE}
    chosen, weights = jax.jit(partial(route, implementation=implementation, **options))(*given)
    expected, exact = reference.route(*given, **options)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(weights, exact, rtol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_against_float64(dtype):
    x, weight, _ = arguments(shapes.KIMI[0], dtype, spread=3.0)
    exact = np.asarray(weight, np.float64) @ np.asarray(x, np.float64).T
    assert relative_rmse(mosaic_tpu.logits(x, weight), exact) <= 1e-6


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")])
def test_float32_is_multiplied_as_float32(dtype, precision):
    run = partial(mosaic_tpu.route, choices=2, normalize=True, scale=1.0, interpret=True)
    (found,) = dots(jax.make_jaxpr(run)(*arguments(shapes.AWKWARD[0], dtype)).jaxpr)
    assert found.params["precision"] == (getattr(jax.lax.Precision, precision),) * 2
    assert found.params["preferred_element_type"] == jnp.float32


def test_nan_is_chosen_first_and_what_is_barred_last():
    # Given a token without a number, and experts barred by their bias
    x, weight, bias = arguments(shapes.AWKWARD[0]._replace(T=3))
    x, bias = x.at[1].set(jnp.nan), bias.at[5:].set(-jnp.inf)
    (kernel, weights), (plain, expected) = (
        route(x, weight, bias, choices=8, implementation=one) for one in ("mosaic_tpu", "xla")
    )
    np.testing.assert_array_equal(kernel, plain)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert np.isnan(weights[1]).all() and np.isfinite(weights[jnp.array([0, 2])]).all()
    assert sorted(kernel[0, :5].tolist()) == [0, 1, 2, 3, 4] and kernel[0, 5:].tolist() == [5, 6, 7]


def test_reads_nothing_that_is_out_of_bounds_and_uses_nothing_uninitialised():
    shape = shapes.AWKWARD[3]._replace(J=3)
    careful = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
    given = arguments(shape, jnp.float32)
    try:
        chosen, weights = mosaic_tpu.route(*given, choices=3, normalize=True, scale=1.0, interpret=careful)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    expected, exact = reference.route(*given, choices=3, normalize=True, scale=1.0)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(weights, exact, rtol=2e-5)


def test_the_gradient_is_that_of_plain_jax():
    given = arguments(shapes.AWKWARD[0], jnp.float32)

    def loss(x, weight, implementation):
        return route(x, weight, given[2], choices=2, implementation=implementation)[1][0, 0]

    found, expected = (jax.grad(loss, (0, 1))(*given[:2], one) for one in ("mosaic_tpu", "xla"))
    for one, want in zip(found, expected, strict=True):
        assert np.abs(want).max() > 0
        np.testing.assert_array_equal(one, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": jnp.zeros((128, 64))}, "route: weight has shape (128, 64), expected [E, D=128]"),
        ({"bias": jnp.zeros(64)}, "route: bias has shape (64,), expected [E=128]"),
        ({"choices": 129}, "route: choices is 129, expected 1 to 128, the number of experts"),
        (
            {"groups": 3},
            "route: 1 of 3 groups of 128 experts are kept, expected a number of groups that divides the experts, and 1 "
            "or more of them",
        ),
    ],
)
def test_bad_arguments_are_refused(change, message):
    good = {"x": jnp.zeros((2, 128)), "weight": jnp.zeros((128, 128)), "bias": jnp.zeros(128), "choices": 2}
    assert [one.shape for one in route(**good)] == [(2, 2), (2, 2)]
    with pytest.raises(ValueError) as raised:
        route(**good | change)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": jnp.zeros((129, 128))}, "129 tokens choose 2 experts each, expected 1 to 128 and at most 128"),
        ({"weight": jnp.zeros((9, 128)), "bias": jnp.zeros(9)}, "weight is [9, 128], expected multiples of 16 and 128"),
        ({"groups": 4}, "there are 4 groups of experts, expected one"),
        (
            {"x": jnp.zeros((2, 128), jnp.bfloat16)},
            "x is bfloat16 and weight float32, expected both bfloat16 or both float32",
        ),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused_when_asked_for(change, reason):
    good = {"x": jnp.zeros((2, 128)), "weight": jnp.zeros((128, 128)), "bias": jnp.zeros(128), "choices": 2}
    with pytest.raises(ValueError) as raised:
        route(**good | change, implementation="mosaic_tpu")
    assert str(raised.value) == f"route: the mosaic_tpu kernel cannot serve this call: {reason}"
    options = {name: value for name, value in (good | change).items() if name in ("choices", "groups")}
    jax.eval_shape(partial(route, **options), *((good | change)[name] for name in ("x", "weight", "bias")))
