"""The Pallas kernel of the dense grouped matmuls, interpreted: against float64, at ragged and empty groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from kernel_numerics import dots, relative_rmse

from pallas_kernels import Dense, grouped_glu, grouped_matmul
from pallas_kernels.activations import silu_gated
from pallas_kernels.grouped_matmul import mosaic_tpu, reference

K, N, EXPERTS = 128, 256, 4
RNG = np.random.default_rng(8)
GATE, UP = (jnp.asarray(RNG.normal(size=(EXPERTS, N, K)) / np.sqrt(K), jnp.float32) for _ in range(2))
MATMUL, SWIGLU = (jax.jit(functools.partial(op, implementation="mosaic_tpu")) for op in (grouped_matmul, grouped_glu))


def check(sizes, tokens, dtype, tolerance, first=0, experts=EXPERTS):
    edges = np.concatenate([[0], np.cumsum(sizes)])
    x = jnp.asarray(RNG.normal(size=(tokens, K)), dtype)
    gate, up = (jnp.asarray(weights[:experts], dtype) for weights in (GATE, UP))
    own = ((edges[first] <= jnp.arange(tokens)) & (jnp.arange(tokens) < edges[first + experts]))[:, None]
    poisoned, exact = jnp.where(own, x, jnp.nan), jnp.where(own, x, 0)
    sizes = jnp.asarray(sizes, jnp.int32)
    found = MATMUL(poisoned, gate, sizes, group_offset=first)
    assert found.dtype == dtype
    assert relative_rmse(found, reference.grouped_matmul(exact, gate, sizes, first)) <= tolerance
    found = SWIGLU(poisoned, gate, up, sizes, group_offset=first)
    assert relative_rmse(found, reference.grouped_glu(exact, gate, up, sizes, first)) <= tolerance
    assert not np.any(np.asarray(found)[~np.asarray(own)[:, 0]])


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 3e-3)])
@pytest.mark.parametrize("sizes", [[3, 0, 20, 17], [0, 0, 1, 0], [0, 33, 0, 0]])
def test_ragged_groups(sizes, dtype, tolerance):
    check(sizes, 40, dtype, tolerance)


def test_several_blocks():
    check([0, 513, 1, 580], 1100, jnp.bfloat16, 3e-3)
    check([0, 0, 0, 3], 1100, jnp.bfloat16, 3e-3)


@pytest.mark.parametrize("first", [0, 2, 5])
def test_groups_held_elsewhere_give_zeros(first):
    check([4, 7, 0, 9, 2, 11, 3], 40, jnp.float32, 2e-6, first, experts=2)


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(0, 10), min_size=EXPERTS, max_size=EXPERTS))
def test_any_sizes(sizes):
    check(sizes, 40, jnp.float32, 2e-6)


def test_no_race_and_nothing_read_out_of_bounds_or_uninitialised(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "STEP_BYTES", 2**16)
    assert mosaic_tpu.outputs_of_a_step(N, K, 4) == 128
    x, sizes = jnp.asarray(RNG.normal(size=(40, K)), jnp.float32), jnp.asarray([3, 0, 20, 17], jnp.int32)
    careful = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    try:
        found = mosaic_tpu.grouped_glu(
            x, Dense(GATE), Dense(UP), sizes, jnp.int32(0), activation=silu_gated, interpret=careful
        )
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert relative_rmse(found, reference.grouped_glu(x, GATE, UP, sizes)) <= 2e-6


def test_gradients_are_those_of_the_plain_form():
    x, sizes = jnp.asarray(RNG.normal(size=(40, K)), jnp.float32), jnp.asarray([3, 0, 20, 10], jnp.int32)
    x, dy = x.at[33:].set(jnp.nan), jnp.asarray(RNG.normal(size=(40, N)), jnp.float32)

    def pulled(implementation):
        run = functools.partial(grouped_glu, group_sizes=sizes, implementation=implementation)
        return jax.vjp(run, x, GATE, UP)[1](dy)

    for found, expected in zip(pulled("mosaic_tpu"), pulled("xla"), strict=True):
        assert np.any(found) and relative_rmse(found, expected) <= 1e-6


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")])
def test_float32_is_multiplied_as_float32(dtype, precision):
    arguments = jnp.zeros((40, K), dtype), Dense(jnp.zeros((EXPERTS, N, K), dtype)), jnp.full(EXPERTS, 10, jnp.int32)
    run = functools.partial(mosaic_tpu.grouped_matmul, interpret=True)
    found = list(dots(jax.make_jaxpr(run)(*arguments, jnp.int32(0)).jaxpr))
    assert found
    for equation in found:
        assert equation.params["precision"] == (getattr(jax.lax.Precision, precision),) * 2
        assert equation.params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((4, 96), jnp.float32, r"weights are \[256, 96\], expected multiples of 128"),
        ((4, 128), jnp.float16, "x is float16, expected bfloat16 or float32"),
        ((0, 128), jnp.float32, "x has no rows"),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused_when_asked_for(shape, dtype, reason):
    x, weights, sizes = (
        jnp.zeros(shape, dtype),
        jnp.zeros((1, 256, shape[1]), dtype),
        jnp.asarray([shape[0]], jnp.int32),
    )
    with pytest.raises(ValueError, match=f"grouped_matmul: the mosaic_tpu kernel cannot serve this call: {reason}"):
        grouped_matmul(x, weights, sizes, implementation="mosaic_tpu")
    assert grouped_matmul(x, weights, sizes).shape == (shape[0], 256)
