"""One token of KDA: the kernel, interpreted, and the plain form against the float64 recurrence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from kernel_numerics import dots, relative_rmse

from pallas_kernels import kda, kda_step
from pallas_kernels.kda import mosaic_step, reference
from pallas_kernels.kda.shapes import STEP, KdaStepShape

RUN = {
    implementation: jax.jit(partial(kda_step, implementation=implementation))
    for implementation in ("mosaic_tpu", "triton", "xla")
}


def arguments(shape, dtype, decays=(0.01, 0.1, 2, 20, 60), seed=0):
    """Draws keys and queries of length one, decays mixed over channels, and beta near 0 and 1 too."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, shape.B, shape.H, shape.Dk))
    q, k = (array / np.linalg.norm(array, axis=-1, keepdims=True) for array in (q, k))
    v, state = rng.standard_normal((shape.B, shape.H, shape.Dv)), rng.standard_normal(shape)
    g = -rng.uniform(0.5, 1.5, k.shape) * rng.choice(decays, k.shape)
    beta = rng.choice([1e-3, 0.5, 0.999], (shape.B, shape.H))
    g, state = (jnp.asarray(array, jnp.float32) for array in (g, state))
    return *(jnp.asarray(array, dtype) for array in (q, k, v)), g, jnp.asarray(beta, dtype), state


def exact(*arrays):
    with jax.enable_x64(True):
        return reference.kda_step(*(jnp.asarray(np.asarray(array, np.float64)) for array in arrays))


def check(found, arrays, tolerance):
    o, state = found
    assert o.dtype == arrays[2].dtype and state.dtype == jnp.float32
    expected_o, expected_state = exact(*arrays)
    assert relative_rmse(o, expected_o) <= tolerance
    assert relative_rmse(state, expected_state) <= 1e-6


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3)])
@pytest.mark.parametrize("shape", STEP, ids=str)
@pytest.mark.parametrize("implementation", RUN)
def test_step(implementation, shape, dtype, tolerance):
    arrays = arguments(shape, dtype)
    check(RUN[implementation](*arrays), arrays, tolerance)


@pytest.mark.parametrize("implementation", RUN)
def test_steps_are_the_recurrence_over_tokens(implementation):
    norm = {"normalize_qk": True, "scale": 0.3}
    step = jax.jit(partial(kda_step, implementation=implementation, **norm))
    tokens = [arguments(STEP[2], jnp.float32, (0.1, 2), seed=t) for t in range(4)]
    tokens = [(3 * q, 5 * k, *rest) for q, k, *rest in tokens]
    state = tokens[0][5]
    row = (jnp.stack(arrays, axis=1) for arrays in list(zip(*tokens, strict=True))[:5])
    expected, expected_state = kda(*row, initial_state=state, **norm)
    for t, arrays in enumerate(tokens):
        o, state = step(*arrays[:5], state)
        assert relative_rmse(o, expected[:, t]) <= 1e-6
    assert relative_rmse(state, expected_state) <= 1e-6


def test_the_kernel_races_with_nothing_stays_in_bounds_and_in_place():
    strict = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    arrays = arguments(KdaStepShape(8, 3, 128, 128), jnp.bfloat16)
    check(mosaic_step.kda_step(*arrays, interpret=strict), arrays, 5e-3)
    assert not interpret_pallas_call.races.races_found
    (call,) = [
        equation
        for equation in jax.make_jaxpr(partial(mosaic_step.kda_step, interpret=True))(*arrays).eqns
        if equation.primitive.name == "pallas_call"
    ]
    assert call.params["input_output_aliases"] == ((5, 1),)


def test_poison_stays_with_its_sequence():
    arrays = [np.array(array) for array in arguments(STEP[2], jnp.float32)]
    for array in arrays:
        array[1] = np.nan
    clean = np.array([0, 2, 3, 4])
    found = RUN["mosaic_tpu"](*arrays)
    check([array[clean] for array in found], [array[clean] for array in arrays], 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_has_no_product_that_a_matrix_unit_would_round(dtype):
    # Vector units do not round float32: the kernel is as exact on a TPU as interpreted
    jaxpr = jax.make_jaxpr(partial(mosaic_step.kda_step, interpret=True))(*arguments(STEP[0], dtype))
    assert "pallas_call" in str(jaxpr) and not list(dots(jaxpr))


@pytest.mark.parametrize("implementation", RUN)
def test_a_step_has_the_gradient_of_the_recurrence(implementation):
    arrays = arguments(KdaStepShape(1, 1, 128, 128), jnp.float32, (0.1, 2))

    def loss(run, *arrays):
        o, state = run(*arrays)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(state))

    found = jax.grad(partial(loss, RUN[implementation]), argnums=range(6))(*arrays)
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in arrays]
        expected = jax.grad(partial(loss, reference.kda_step), argnums=range(6))(*wide)
    for one, other in zip(found, expected, strict=True):
        assert relative_rmse(one, other) <= 2e-6


@pytest.mark.parametrize(
    "shape,dtype,reason",
    [
        (KdaStepShape(2, 2, 64, 128), jnp.float32, "a state is 64 x 128, expected multiples of 128"),
        (KdaStepShape(2, 2, 512, 256), jnp.float32, "a state is 512 x 256, expected at most 262144 bytes"),
        (KdaStepShape(2, 2, 128, 128), jnp.float16, "operands are float16, expected bfloat16 or float32"),
        (KdaStepShape(0, 2, 128, 128), jnp.float32, "it is empty"),
    ],
    ids=str,
)
def test_the_kernel_says_why_it_cannot_serve(shape, dtype, reason):
    arrays = arguments(shape, dtype)
    with pytest.raises(ValueError, match=reason):
        kda_step(*arrays, implementation="mosaic_tpu")
    check(jax.jit(kda_step)(*arrays), arrays, 1e-3)  # and by default the call uses XLA
