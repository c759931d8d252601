"""The grouped ops as the interpreted kernel for GPUs, against float64, and the visits that it makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_numerics import relative_rmse

from pallas_kernels import Int4, grouped_glu, grouped_matmul
from pallas_kernels.formats import as_weight
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.triton_visits import ROWS, group_visits, most_visits, rows_of_a_visit

TOLERANCES = {jnp.float32: 1e-6, jnp.bfloat16: 4e-3}
# Inputs, outputs, sizes and rows past the last group
SHAPES = {
    "empty first, last and between": (128, 64, (0, 5, 0, 7, 0), 0),
    "one row": (64, 64, (0, 1, 0), 0),
    "no rows in any group": (64, 64, (0, 0), 3),
    "one group has all, more than a visit takes": (128, 192, (0, 150, 0), 0),
    "rows past the last group": (192, 64, (17, 0, 40), 9),
}
QUICK = {("rows past the last group", True, jnp.bfloat16), ("empty first, last and between", False, jnp.float32)}

VISITS = jax.jit(group_visits, static_argnums=(2, 3))


def drawn(name, int4, dtype):
    K, N, sizes, spare = SHAPES[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(sum(sizes) + spare, K)), dtype)
    dense = [jnp.asarray(rng.normal(size=(len(sizes), N, K)), jnp.float32) for _ in range(2)]
    weights = [jax.jit(Int4.from_dense)(weight) if int4 else weight.astype(dtype) for weight in dense]
    return x, weights, jnp.asarray(sizes, jnp.int32)


def cases():
    for name in SHAPES:
        for int4 in (False, True):
            for dtype in TOLERANCES:
                marks = [] if (name, int4, dtype) in QUICK else [pytest.mark.slow]
                label = f"{name}-{'int4' if int4 else 'dense'}-{dtype.__name__}"
                yield pytest.param(name, int4, dtype, id=label, marks=marks)


@pytest.mark.parametrize(("name", "int4", "dtype"), list(cases()))
def test_against_float64(name, int4, dtype):
    x, (gate, up), sizes = drawn(name, int4, dtype)
    run = jax.jit(lambda *arrays: grouped_glu(*arrays, implementation="triton"))
    assert_close(run(x, gate, up, sizes), reference.grouped_glu(x, gate, up, sizes), TOLERANCES[dtype])
    # Given the matrices of two groups alone, the second of them being none of the others'
    local = jax.tree.map(lambda array: array[1:2], as_weight("test", "up", up))
    run = jax.jit(lambda *arrays: grouped_matmul(*arrays, group_offset=1, implementation="triton"))
    expected = reference.grouped_matmul(x, local, sizes, 1)
    assert_close(run(x, local, sizes), expected, TOLERANCES[dtype])


def assert_close(found, expected, tolerance):
    assert relative_rmse(found, expected) <= tolerance
    np.testing.assert_array_equal(found[(expected == 0).all(-1)], 0)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 70), min_size=6, max_size=6), before=st.integers(0, 5), rows=st.sampled_from(ROWS))
def test_visits_take_every_row_once(sizes, before, rows):
    # Given groups whose rows follow one another, and rows of other groups before and after them
    ends = before + np.cumsum(sizes)
    visits = VISITS(*(jnp.asarray(edge, jnp.int32) for edge in (ends - sizes, ends)), 430, rows)
    found = [(g, f + i) for g, f, count in np.stack(visits).T.tolist() for i in range(count)]
    assert found == [(g, row) for g, end in enumerate(ends) for row in range(end - sizes[g], end)]
    assert max(visits.size) <= rows and len(visits.size) == most_visits(430, len(sizes), rows)


def test_rows_of_a_visit():
    assert [rows_of_a_visit(*each) for each in ((1, 1), (32, 1), (2048, 20), (2048, 64), (9999, 900))] == [
        16, 16, 64, 128, 128
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        ((3, 64, jnp.float16), (2, 64, 64, jnp.float16), "x is float16, expected bfloat16 or float32"),
        ((3, 96, jnp.float32), (2, 64, 96, jnp.float32), r"weights are \[64, 96\], expected multiples of 64 and 64"),
        ((0, 64, jnp.float32), (2, 64, 64, jnp.float32), "x has no rows"),
    ],
)
def test_says_why_it_cannot(x, weight, reason):
    with pytest.raises(ValueError, match=f"the triton kernel cannot serve this call: {reason}"):
        sizes = jnp.zeros(weight[0], jnp.int32)
        grouped_matmul(jnp.zeros(x[:-1], x[-1]), jnp.zeros(weight[:-1], weight[-1]), sizes, implementation="triton")
