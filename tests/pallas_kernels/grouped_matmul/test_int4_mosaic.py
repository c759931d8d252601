"""The Pallas kernels of the INT4 matmuls, interpreted: against float64, at ragged and empty groups; their precision."""

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

from pallas_kernels import Int4, grouped_glu, grouped_matmul, int4_grouped_matmul, int4_matmul, quantize_int4
from pallas_kernels.activations import silu_gated
from pallas_kernels.formats.reference import numbers
from pallas_kernels.grouped_matmul import mosaic_int4 as mosaic_tpu
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.hardware import CHIPS
from pallas_kernels.matmul import reference as single

K, N, EXPERTS = 256, 128, 4
RNG = np.random.default_rng(3)
TOLERANCES = [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-3)]
quantize = jax.jit(quantize_int4)  # op by op, each shape compiles sixteen programs
GATE, UP = (Int4(*quantize(jnp.asarray(RNG.normal(size=(EXPERTS, K, N)), jnp.float32))) for _ in range(2))


V5, TPU7X = (CHIPS[name].facts for name in ("v5e", "tpu7x"))


def rows(tokens, span, dtype, inputs=K):
    """Draws x with NaN in the rows outside `span`, and returns it and its float64 copy with zeros there."""
    x = jnp.asarray(RNG.normal(size=(tokens, inputs)), dtype)
    inside = ((span.start <= jnp.arange(tokens)) & (jnp.arange(tokens) < span.stop))[:, None]
    return jnp.where(inside, x, jnp.nan), np.asarray(jnp.where(inside, x, 0), np.float64)


def compiled():
    """Returns the two ops; their compiled code is kept for as long as the kernel is built for one chip."""
    return [jax.jit(functools.partial(op, implementation="mosaic_tpu")) for op in (grouped_matmul, grouped_glu)]


OPS = compiled()


def check(sizes, tokens, dtype, tolerance, first=0, experts=EXPERTS, ops=OPS, draws=1):
    """Compares both ops with float64, over `draws` of x."""
    edges = np.concatenate([[0], np.cumsum(sizes)])
    sizes = jnp.asarray(sizes, jnp.int32)
    gate, up = jax.tree.map(lambda array: array[:experts], (GATE, UP))
    xs, exacts = zip(
        *[rows(tokens, slice(edges[first], edges[first + experts]), dtype) for _ in range(draws)], strict=True
    )
    for op, exact_op, weights in (
        (ops[0], reference.grouped_matmul, (gate,)),
        (ops[1], reference.grouped_glu, (gate, up)),
    ):
        found = [op(x, *weights, sizes, group_offset=first) for x in xs]
        assert found[0].dtype == dtype
        found, expected = np.stack(found), np.stack([exact_op(exact, *weights, sizes, first) for exact in exacts])
        assert relative_rmse(found, expected) <= tolerance
        np.testing.assert_array_equal(found[(expected == 0).all(-1)], 0)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (40, [3, 0, 20, 17]),  # an empty group, windows shared by groups
        (40, [0, 0, 1, 0]),  # one row
        (40, [0, 0, 0, 9]),  # rows past the last group
        (1100, [0, 513, 1, 580]),  # several blocks, a group in two of them
        (1100, [0, 0, 0, 3]),  # blocks in which no group has rows
    ],
)
def test_ragged_groups(tokens, sizes, dtype, tolerance):
    check(sizes, tokens, dtype, tolerance)


@pytest.mark.parametrize("first", [0, 2, 5])
def test_groups_held_elsewhere_give_zeros(first):
    check([4, 7, 0, 9, 2, 11, 3], 40, jnp.float32, 1e-5, first, experts=2)


@pytest.mark.parametrize("chip", [V5, TPU7X], ids=["v5e", "tpu7x"])
def test_few_rows_in_block_diagonal_form(monkeypatch, chip):
    monkeypatch.setattr(mosaic_tpu, "chip", lambda: chip)
    # Never for float32, which needs the weights rounded to bf16 first.
    tile = mosaic_tpu.tiles(40, K, N, EXPERTS, jnp.float32)
    assert mosaic_tpu.uses_block_diagonal(tile, jnp.bfloat16) and not mosaic_tpu.uses_block_diagonal(tile, jnp.float32)
    ops = compiled()
    # Groups of few rows within a window of 8 or across two, one in several windows of 16; one row; the last window.
    for sizes in ([3, 0, 20, 17], [1, 6, 8, 12], [32, 0, 1, 7]):
        check(sizes, 40, jnp.bfloat16, 3e-3, ops=ops)
    # The 128 products of a single row with gate and up vary: a quarter of all draws would exceed the tolerance.
    check([0, 0, 0, 1], 40, jnp.bfloat16, 3e-3, ops=ops, draws=32)
    check([0, 2, 3, 2], 7, jnp.bfloat16, 3e-3, ops=ops)


@pytest.mark.parametrize("chip", [V5, TPU7X, None])
def test_a_step_in_parts_and_outputs_in_tiles(monkeypatch, chip):
    monkeypatch.setattr(mosaic_tpu, "STEP_BYTES", 2**16)
    monkeypatch.setattr(mosaic_tpu, "PART_WEIGHTS", 2**16)
    monkeypatch.setattr(mosaic_tpu, "SHARED_PART_WEIGHTS", 2**16)
    if chip:
        monkeypatch.setattr(mosaic_tpu, "chip", lambda: chip)
    tile = mosaic_tpu.tiles(40, 1024, 256, 3, jnp.bfloat16)
    assert (tile.N, tile.K_part, tile.K_shared) == (128, 512, 512)
    x, exact = rows(40, slice(0, 36), jnp.bfloat16, inputs=1024)
    codes, scales = quantize(jnp.asarray(RNG.normal(size=(3, 1024, 256)), jnp.float32))
    sizes = jnp.asarray([5, 25, 6], jnp.int32)
    found = int4_grouped_matmul(x, codes, scales, sizes, implementation="mosaic_tpu")
    assert relative_rmse(found, reference.grouped_matmul(exact, Int4(codes, scales), sizes)) <= 3e-3


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(0, 275), min_size=EXPERTS, max_size=EXPERTS))
def test_any_sizes(sizes):
    check(sizes, 1100, jnp.float32, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(("tokens", "inputs"), [(1, 64), (130, 96 * 2), (7, 1024)])
def test_one_matrix(tokens, inputs, dtype, tolerance):
    x = jnp.asarray(RNG.normal(size=(tokens, inputs)), dtype)
    codes, scales = quantize(jnp.asarray(RNG.normal(size=(inputs, 128)), jnp.float32))
    found = int4_matmul(x, codes, scales, implementation="mosaic_tpu")
    assert found.dtype == dtype
    assert relative_rmse(found, single.matmul(x, Int4(codes, scales))) <= tolerance


def test_the_gradient_is_that_of_the_reference():
    x = jnp.asarray(RNG.normal(size=(24, K)), jnp.float32)
    sizes, cotangent = jnp.asarray([5, 0, 12, 7], jnp.int32), jnp.asarray(RNG.normal(size=(24, N)), jnp.float32)
    run = functools.partial(int4_grouped_matmul, group_sizes=sizes, implementation="mosaic_tpu")
    (found,) = jax.vjp(lambda x: run(x, GATE.codes, GATE.scales), x)[1](cotangent)
    matrices = numbers(GATE)
    expected = np.concatenate(
        [cotangent[:5] @ matrices[0], cotangent[5:17] @ matrices[2], cotangent[17:] @ matrices[3]]
    )
    assert relative_rmse(found, expected) <= 1e-5


@pytest.mark.parametrize(
    ("op", "chip", "dtype", "tolerance"),
    [
        ("grouped_matmul", V5, jnp.bfloat16, 3e-3),
        ("grouped_glu", None, jnp.float32, 1e-5),
    ],
)
def test_no_race_and_nothing_read_out_of_bounds_or_uninitialised(monkeypatch, op, chip, dtype, tolerance):
    if chip:
        monkeypatch.setattr(mosaic_tpu, "chip", lambda: chip)
    x, exact = rows(40, slice(0, 33), dtype)
    sizes = jnp.asarray([3, 0, 20, 10], jnp.int32)
    weights, options = ((GATE,), {}) if op == "grouped_matmul" else ((GATE, UP), {"activation": silu_gated})
    careful = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    try:
        found = getattr(mosaic_tpu, op)(x, *weights, sizes, jnp.int32(0), **options, interpret=careful)
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert relative_rmse(found, getattr(reference, op)(exact, *weights, sizes)) <= tolerance


@pytest.mark.parametrize("chip", [V5, None])
@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")])
def test_float32_is_multiplied_as_float32(monkeypatch, chip, dtype, precision):
    if chip:
        monkeypatch.setattr(mosaic_tpu, "chip", lambda: chip)
    x = jnp.zeros((40, K), dtype)
    run = functools.partial(mosaic_tpu.grouped_matmul, interpret=True)
    found = list(dots(jax.make_jaxpr(run)(x, GATE, jnp.full(EXPERTS, 10, jnp.int32), jnp.int32(0)).jaxpr))
    assert found
    for equation in found:
        assert equation.invars[0].aval.dtype == equation.invars[1].aval.dtype == dtype
        assert equation.params["precision"] == (getattr(jax.lax.Precision, precision),) * 2
        assert equation.params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize(
    ("x", "outputs", "reason"),
    [
        (jnp.zeros((4, 64)), 96, "N is 96, expected a multiple of 128"),
        (jnp.zeros((4, 2112)), 128, "K is 2112, expected a multiple of 512, or of 64 up to 2048"),
        (jnp.zeros((4, 64), jnp.float16), 128, "x is float16, expected bfloat16 or float32"),
        (jnp.zeros((0, 64)), 128, "x has no rows"),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused_when_asked_for(x, outputs, reason):
    codes = jnp.zeros((x.shape[1], outputs), jnp.int4)
    scales = jnp.ones((x.shape[1] // 32, outputs), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"int4_matmul: the mosaic_tpu kernel cannot serve this call: {reason}"):
        int4_matmul(x, codes, scales, implementation="mosaic_tpu")
    assert int4_matmul(x, codes, scales).shape == (x.shape[0], outputs)
