"""The gradient kernels of the dense grouped matmul, interpreted: against float64, at ragged and empty groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from kernel_numerics import dots, relative_rmse

from pallas_kernels import Dense, Int4, grouped_glu, grouped_matmul
from pallas_kernels.formats.fake_int4 import FakeInt4
from pallas_kernels.formats.reference import numbers
from pallas_kernels.grouped_matmul import mosaic_gradients, mosaic_tpu, reference
from pallas_kernels.grouped_matmul.visits import group_visits

K, N, EXPERTS = 256, 128, 4
RNG = np.random.default_rng(8)
WEIGHTS = jnp.asarray(RNG.normal(size=(EXPERTS, N, K)) / np.sqrt(K), jnp.float32)
jitted_visits = jax.jit(group_visits, static_argnums=(2, 3, 4))
GRADIENTS = jax.jit(functools.partial(mosaic_gradients.gradients, interpret=True))


def draw(tokens, dtype, own):
    """Draws x and dy with NaN in rows that are not `own`; also returns them in float64 with zeros there."""
    arrays = [jnp.asarray(RNG.normal(size=(tokens, width)), dtype) for width in (K, N)]
    exact = [np.where(own[:, None], np.asarray(array, np.float64), 0) for array in arrays]
    return [jnp.where(own[:, None], array, jnp.nan) for array in arrays], exact


def check(sizes, tokens, dtype, tolerance, first=0, experts=EXPERTS, run=GRADIENTS):
    # Given rows of local groups, and NaN in all others
    ends = np.cumsum(sizes)
    starts = ends - sizes
    local = range(first, first + experts)
    own = (np.arange(tokens) >= starts[local[0]]) & (np.arange(tokens) < ends[local[-1]])
    (x, dy), (exact_x, exact_dy) = draw(tokens, dtype, own)
    weights = WEIGHTS[:experts].astype(dtype)

    # When the kernels compute dx and dW
    sizes = jnp.asarray(sizes, jnp.int32)
    dx, dweights = run(x, Dense(weights), sizes, jnp.int32(first), dy)

    # Then they are dy W and the sum of dy xT over each group's rows, zero where there are none
    assert dx.dtype == dweights.weight.dtype == dtype
    turned = np.swapaxes(numbers(Dense(weights)), 1, 2)
    assert relative_rmse(dx, reference.grouped_matmul(exact_dy, turned, sizes, first)) <= tolerance
    assert not np.any(np.asarray(dx)[~own])
    for expert, group in enumerate(local):
        rows = slice(starts[group], ends[group])
        assert relative_rmse(dweights.weight[expert], exact_dy[rows].T @ exact_x[rows]) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 3e-3)])
@pytest.mark.parametrize("sizes", [[3, 0, 20, 17], [0, 0, 1, 0]])
def test_ragged_groups(sizes, dtype, tolerance):
    check(sizes, 40, dtype, tolerance)


def test_several_blocks():
    check([0, 513, 1, 580], 1100, jnp.bfloat16, 3e-3)


@pytest.mark.parametrize("first", [0, 2, 5])
def test_groups_held_elsewhere_have_no_gradient(first):
    check([4, 7, 0, 9, 2, 11, 3], 40, jnp.float32, 2e-6, first, experts=2)


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(0, 10), min_size=EXPERTS, max_size=EXPERTS))
def test_any_sizes(sizes):
    check(sizes, 40, jnp.float32, 2e-6)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=7, max_size=7), first=st.integers(0, 4))
def test_visits_meet_every_local_group_and_every_block_of_it_in_order(sizes, first):
    blocks, size, local = 18, 16, 3
    found = jitted_visits(jnp.asarray(sizes, jnp.int32), jnp.int32(first), local, blocks, size)
    pairs = [*zip(found.group.tolist(), found.block.tolist(), strict=True)]
    count, ends = int(found.total[0]), np.cumsum(sizes)
    assert count <= len(pairs) == blocks + local - 1
    assert pairs[:count] == sorted(set(pairs)) and {group for group, _ in pairs} == set(range(local))
    needed = {
        (n, row // size) for n in range(local) for row in range(ends[n + first] - sizes[n + first], ends[n + first])
    }
    assert needed <= set(pairs) and all(0 <= block < blocks for _, block in pairs)


def test_tiles_of_all_sides(monkeypatch):
    # Given tiles smaller than the matrices, for which every row is read several times
    monkeypatch.setattr(mosaic_gradients, "MOST_SIDE", 128)
    monkeypatch.setattr(mosaic_tpu, "STEP_BYTES", 2**16)
    careful = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    try:
        run = functools.partial(mosaic_gradients.gradients, interpret=careful)
        check([3, 0, 20, 10], 40, jnp.float32, 2e-6, run=run)
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("format", [FakeInt4, Int4])
def test_nothing_scatters_when_compiled_for_a_tpu(format):
    # Given a mixture's products with trained weights that are rounded to INT4, or with frozen ones, in bf16
    weights = format.from_dense(WEIGHTS.astype(jnp.bfloat16))
    x, sizes = jnp.zeros((1100, K), jnp.bfloat16), jnp.full(EXPERTS, 100, jnp.int32)

    def pulled(x, weights, sizes):
        y, pull = jax.vjp(
            lambda x, weights: (grouped_glu(x, weights, weights, sizes), grouped_matmul(x, weights, sizes)), x, weights
        )
        return pull(y)

    # Then its gradients have kernels or loops, and no scatter
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("TPU v6 lite", 1, "tpu"))):
        text = jax.jit(pulled).trace(x, weights, sizes).lower(lowering_platforms=("tpu",)).as_text()
    assert "scatter" not in text and "ragged_dot" not in text
    for kernel in ("grouped_rows_gradient", "grouped_weights_gradient"):
        assert (f'kernel_name = "{kernel}"' in text) == (format is FakeInt4)


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")])
def test_float32_is_multiplied_as_float32(dtype, precision):
    weights, sizes = Dense(jnp.zeros((EXPERTS, N, K), dtype)), jnp.full(EXPERTS, 10, jnp.int32)
    arguments = jnp.zeros((40, K), dtype), weights, sizes, jnp.int32(0), jnp.zeros((40, N), dtype)
    run = functools.partial(mosaic_gradients.gradients, interpret=True)
    found = list(dots(jax.make_jaxpr(run)(*arguments).jaxpr))
    assert len(found) == 2
    for equation in found:
        assert equation.params["precision"] == (getattr(jax.lax.Precision, precision),) * 2
        assert equation.params["preferred_element_type"] == jnp.float32
