"""The grouped ops, dense and INT4, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_numerics import relative_rmse

from pallas_kernels import Int4, dequantize_int4, grouped_glu, grouped_matmul, int4_grouped_matmul
from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.grouped_matmul.shapes import AWKWARD, KIMI


def cases(shapes):
    """Returns every shape in float32, and the last in bf16."""
    return [
        *(pytest.param(shape, jnp.float32, 2e-6, id=shape.name) for shape in shapes),
        pytest.param(shapes[-1], jnp.bfloat16, 3e-3, id=f"bf16, {shapes[-1].name}"),
    ]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


int4 = jax.jit(Int4.from_dense)  # op by op, each shape compiles sixteen programs


def arguments(shape, dtype):
    rng = np.random.default_rng(3)
    sizes = np.array(shape.sizes, np.int32)
    x = rng.standard_normal((sizes.sum() + shape.spare, shape.K))
    gate, up = (jnp.asarray(normal(rng, len(sizes), shape.N, shape.K), dtype) for _ in range(2))
    return jnp.asarray(x, dtype), gate, up, sizes


@pytest.mark.parametrize("shape,dtype,tolerance", cases(AWKWARD))
def test_dense(shape, dtype, tolerance):
    x, gate, up, sizes = arguments(shape, dtype)
    found = jax.jit(grouped_matmul)(x, gate, sizes)
    assert found.dtype == dtype
    assert relative_rmse(found, reference.grouped_matmul(x, gate, sizes)) <= tolerance
    assert not np.any(np.asarray(found, np.float32)[sizes.sum() :])
    found = jax.jit(grouped_glu)(x, gate, up, sizes)
    assert relative_rmse(found, reference.grouped_glu(x, gate, up, sizes)) <= tolerance


@pytest.mark.parametrize("shape,dtype,tolerance", cases(KIMI + AWKWARD[3::2]))
def test_int4(shape, dtype, tolerance):
    x, gate, up, sizes = arguments(shape, dtype)
    gate, up = int4(gate), int4(up)
    found = jax.jit(int4_grouped_matmul)(x, gate.codes, gate.scales, sizes)
    assert found.dtype == dtype
    assert relative_rmse(found, reference.grouped_matmul(x, gate, sizes)) <= tolerance
    found = jax.jit(grouped_glu)(x, gate, up, sizes)
    assert relative_rmse(found, reference.grouped_glu(x, gate, up, sizes)) <= tolerance


ROOM = 140
RANDOM = np.random.default_rng(4)
ROWS = normal(RANDOM, ROOM, 32)
MATRICES = normal(RANDOM, 6, 8, 32)
GROUPED = jax.jit(grouped_matmul)
GROUPED_AT = jax.jit(lambda x, weights, sizes, offset: grouped_matmul(x, weights, sizes, group_offset=offset))


@settings(deadline=None, max_examples=15, derandomize=True)
@given(cuts=st.lists(st.integers(0, ROOM), min_size=6, max_size=6))
def test_any_group_sizes(cuts):
    sizes = np.diff(np.sort(cuts), prepend=0).astype(np.int32)
    expected = reference.grouped_matmul(ROWS, MATRICES, sizes)
    np.testing.assert_allclose(GROUPED(ROWS, MATRICES, sizes), expected, rtol=0, atol=2e-6)
    # Halves of the experts, as on two devices: each computes its rows, and leaves those of the other zero.
    for offset in (0, 3):
        local = slice(sizes[:offset].sum(), sizes[: offset + 3].sum())
        part = np.asarray(GROUPED_AT(ROWS, MATRICES[offset : offset + 3], sizes, offset))
        np.testing.assert_allclose(part[local], expected[local], rtol=0, atol=2e-6)
        assert not part[: local.start].any() and not part[local.stop :].any()


def test_int4_at_an_offset():
    sizes = np.array([3, 0, 5, 9, 2, 7], np.int32)
    gate, up = int4(MATRICES[:2]), int4(MATRICES[2:4])
    found = int4_grouped_matmul(ROWS, gate.codes, gate.scales, sizes, group_offset=jnp.int32(2))
    expected = reference.grouped_matmul(ROWS, gate, sizes, 2)
    assert relative_rmse(found, expected) <= 1e-6
    found = grouped_glu(ROWS, gate, up, sizes, group_offset=2)
    assert relative_rmse(found, reference.grouped_glu(ROWS, gate, up, sizes, 2)) <= 1e-6


def test_rows_and_matrices_that_no_group_uses_may_hold_anything():
    x, weights = ROWS.copy(), MATRICES.copy()
    sizes = np.array([0, 20, 0, 37, 0, 5], np.int32)
    x[62:], weights[[0, 2, 4]] = np.nan, np.nan
    found = np.asarray(grouped_matmul(x, weights, sizes))
    clean = reference.grouped_matmul(x[:62], np.nan_to_num(weights), sizes)
    np.testing.assert_allclose(found[:62], clean, rtol=0, atol=2e-6)
    assert not found[62:].any()
    dx, dw = jax.vjp(lambda x, weights: grouped_matmul(x, weights, sizes), x, weights)[1](jnp.ones((ROOM, 8)))
    assert np.isfinite(dx).all() and not np.asarray(dw)[[0, 2, 4]].any() and np.isfinite(dw).all()


@pytest.mark.parametrize("offset", [0, 2])
def test_dense_gradients(offset):
    sizes = np.array([3, 20, 0, 37, 9, 5], np.int32)
    weights, up = MATRICES[offset : offset + 4], MATRICES[::-1][offset : offset + 4]
    dy = jnp.asarray(normal(np.random.default_rng(5), ROOM, 8))

    # Derived by hand: dx_t = Wᵀ dy_t and dW = sum dy_t x_tᵀ over the group's rows.
    pull = jax.vjp(lambda x, weights: grouped_matmul(x, weights, sizes, group_offset=offset), ROWS, weights)[1]
    dx, dweights = pull(dy)
    assert relative_rmse(dx, reference.grouped_matmul(dy, weights.swapaxes(1, 2), sizes, offset)) <= 1e-6
    ends = np.cumsum(sizes)
    expected = [
        np.asarray(dy[end - size : end], np.float64).T @ ROWS[end - size : end]
        for end, size in zip(ends[offset : offset + 4], sizes[offset : offset + 4], strict=True)
    ]
    assert relative_rmse(dweights, np.stack(expected)) <= 1e-6

    # SwiGLU: the dense computation of each row with its own matrices, differentiated by JAX in float64.
    group = np.searchsorted(ends, np.arange(ROOM), side="right") - offset
    local = ((group >= 0) & (group < 4))[:, None]

    def dense(x, gate, up):
        gated, risen = (jnp.einsum("tk,tnk->tn", x, w[np.clip(group, 0, 3)]) for w in (gate, up))
        return jnp.where(local, jax.nn.silu(gated) * risen, 0)

    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in (ROWS, weights, up)]
        expected = jax.vjp(dense, *wide)[1](jnp.asarray(dy, jnp.float64))
    found = jax.vjp(lambda *a: grouped_glu(*a, sizes, group_offset=offset), ROWS, weights, up)[1](dy)
    for gradient, exact in zip(found, expected, strict=True):
        assert relative_rmse(gradient, exact) <= 1e-6


@pytest.mark.parametrize("sizes", [(1, 0, 2), (5, 7, 4), (0, 20, 9)])
def test_dense_gradients_of_few_rows(sizes):
    sizes = np.array(sizes, np.int32)
    total, ends = sizes.sum(), np.cumsum(sizes)
    x, weights, dy = ROWS[:total], MATRICES[:3], jnp.asarray(ROWS[:total, :8])
    dx, dweights = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, weights)[1](dy)
    assert relative_rmse(dx, reference.grouped_matmul(dy, weights.swapaxes(1, 2), sizes)) <= 1e-6
    rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    expected = np.stack([np.asarray(dy, np.float64)[i].T @ x[i] for i in rows])
    assert relative_rmse(dweights, expected) <= 1e-6


def test_int4_gradients_with_respect_to_x():
    sizes = np.array([30, 0, 7], np.int32)
    gate, up = int4(MATRICES[:3]), int4(MATRICES[3:])
    dy = jnp.asarray(normal(np.random.default_rng(6), ROOM, 8))
    wide = [jnp.swapaxes(dequantize_int4(weights.codes, weights.scales, jnp.float32), 1, 2) for weights in (gate, up)]
    for found, expected in (
        (lambda x: int4_grouped_matmul(x, gate.codes, gate.scales, sizes), lambda x: grouped_matmul(x, wide[0], sizes)),
        (lambda x: grouped_glu(x, gate, up, sizes), lambda x: grouped_glu(x, *wide, sizes)),
    ):
        (gradient,), (exact,) = (jax.vjp(op, ROWS)[1](dy) for op in (found, expected))
        assert np.any(exact) and relative_rmse(gradient, exact) <= 1e-6


def test_the_form_for_other_platforms_agrees():
    sizes = jnp.array([3, 20, 0, 37, 9, 5], jnp.int32)
    x, weights = jnp.asarray(ROWS), jnp.asarray(MATRICES[2:])
    found = xla._ragged(x, weights, sizes, 2)
    assert relative_rmse(found, reference.grouped_matmul(x, weights, sizes, 2)) <= 1e-6
    dy = jnp.asarray(normal(np.random.default_rng(7), ROOM, 8))
    both = (vjp(x, weights, sizes, 2, dy) for vjp in (xla._ragged_vjp, xla._loop_vjp))
    for ragged, loop in zip(*both, strict=True):
        assert relative_rmse(ragged, loop) <= 1e-6
    lowered = jax.jit(grouped_matmul).trace(ROWS, MATRICES, sizes).lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_dot" in lowered and "stablehlo.while" not in lowered


def test_bad_arguments_are_refused():
    sizes = np.array([3, 20, 0, 37, 9, 5], np.int32)
    for message, call in (
        (r"weights has shape \(6, 8, 32\), expected \[E, N, K=16\]",
         lambda: grouped_matmul(ROWS[:, :16], MATRICES, sizes)),
        (r"weights is bfloat16, expected float32", lambda: grouped_matmul(ROWS, MATRICES.astype(jnp.bfloat16), sizes)),
        (r"up has shape", lambda: grouped_glu(ROWS, MATRICES, MATRICES[:5], sizes)),
        (r"group_sizes are 3 at least and 150 in all", lambda: grouped_matmul(ROWS, MATRICES[:2], np.int32([3, 147]))),
        (r"group_sizes are -1 at least", lambda: grouped_matmul(ROWS, MATRICES[:2], np.int32([3, -1]))),
        (r"group_sizes is float32, expected int32", lambda: grouped_matmul(ROWS, MATRICES, sizes.astype(np.float32))),
        (r"group_sizes has 6 groups, expected one for each of the 2",
         lambda: grouped_matmul(ROWS, MATRICES[:2], sizes)),
        (r"group_offset is 5, expected 0 to 4", lambda: grouped_matmul(ROWS, MATRICES[:2], sizes, group_offset=5)),
        (r"scales has shape \(6, 2, 8\), expected \[E=6, 1, N=8\]", lambda: int4_grouped_matmul(
            ROWS, int4(MATRICES).codes, np.ones((6, 2, 8), np.float32), sizes)),
        (r"up has shape \(6, 4, 32\), expected \[E=6, N=8, K=32\]", lambda: grouped_glu(
            ROWS, int4(MATRICES), int4(MATRICES[:, :4]), sizes)),
        (r"gate and up are Int4, Dense, expected one format", lambda: grouped_glu(
            ROWS, int4(MATRICES), MATRICES, sizes)),
        (r"up is a tuple, expected an array or a Weight", lambda: grouped_glu(ROWS, MATRICES, (1, 2), sizes)),
        (r"activation is 'relu', expected one of \['gelu_pytorch_tanh', 'silu'\] or a hashable function",
         lambda: grouped_glu(ROWS, MATRICES, MATRICES, sizes, activation="relu")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
