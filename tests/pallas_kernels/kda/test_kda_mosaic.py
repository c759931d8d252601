"""KDA's chunk kernel, interpreted, against the float64 recurrence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from kda_tokens import packed_ids, rounded, rows_of_decays, segments_as_rows, states, tokens
from kernel_numerics import dots, relative_rmse

from pallas_kernels import kda
from pallas_kernels.kda import mosaic_scores, mosaic_tpu, reference
from pallas_kernels.kda.visits import chunk_visits

KERNEL = partial(mosaic_tpu.kda, normalize_qk=False, scale=1.0, lower_bound=None, interpret=True)
SMALL = jax.jit(KERNEL)


@jax.jit
def recurrence(*arrays):
    return reference.kda(*arrays)


def exact(*arrays):
    with jax.enable_x64(True):
        o, state = recurrence(*(jnp.asarray(np.asarray(array, np.float64)) for array in arrays))
        return np.asarray(o), np.asarray(state)


def check_packed(run, dtype, arrays, initial, ids, tolerances):
    """Compares outputs and state of each row, segment and head with the recurrence over its tokens; padding has NaN."""
    # Given the tokens of each segment as a row of its own, padded with tokens that change nothing
    rows, segments = initial.shape[:2]
    for array in arrays:
        array[:, ids < 0] = np.nan
    inputs = rounded(arrays, dtype)
    longest = max(int(np.sum(ids == n)) for n in range(segments))
    width = min(len(ids), -(-longest // 256) * 256)  # few shapes, each of which is compiled
    padded = segments_as_rows(inputs, ids, segments, width)
    expected_o, expected = exact(*padded, np.moveaxis(initial, 1, 0).reshape(segments * rows, *initial.shape[2:]))

    # When the kernel takes the packed rows
    o, after = run(*inputs, jnp.asarray(initial), jnp.asarray(np.tile(ids, (rows, 1))))

    # Then it computes the recurrence, and does not change padding and empty segments
    assert o.dtype == dtype and after.dtype == jnp.float32
    o, after = np.asarray(o, np.float64), np.asarray(after)
    assert not o[:, ids < 0].any()
    for n in range(segments):
        if not (ids == n).any():
            np.testing.assert_array_equal(after[:, n], initial[:, n])
        for row in range(rows):
            at, own = n * rows + row, ids == n
            for head, tolerance in enumerate(tolerances):
                error = relative_rmse(o[row, own, head], expected_o[at, : own.sum(), head])
                assert max(error, relative_rmse(after[row, n, head], expected[at, head])) <= tolerance, (n, row, head)


ANY_DECAY, BOUNDED = (None, (0.01, 0.1, 2, 20, 60, (0.01, 0.1, 2, 20, 60), (0.01, 60))), (-5.0, (0.01, 3, (0.01, 3)))
EXACT, ROUNDED = (jnp.float32, (1e-5, 1e-5)), (jnp.bfloat16, (5e-3, 1e-2))


@pytest.mark.parametrize(
    "lower_bound,decays,dtype,tolerances",
    [
        (*ANY_DECAY, *EXACT),
        (*BOUNDED, *ROUNDED),
        pytest.param(*ANY_DECAY, *ROUNDED, marks=pytest.mark.slow),
        pytest.param(*BOUNDED, *EXACT, marks=pytest.mark.slow),
    ],
)
def test_every_decay_and_length_with_unlike_and_alike_keys(lower_bound, decays, dtype, tolerances):
    # Given a row for each kind of decay, a head for each likeness of keys, and segments of awkward lengths anywhere
    ids = packed_ids((1, 63, 0, 64, 65, 200))
    arrays = rows_of_decays(len(ids), decays)

    # Then outputs and states are those of the recurrence
    run = jax.jit(partial(KERNEL, lower_bound=lower_bound))
    check_packed(run, dtype, arrays, states(len(decays), 6, 2), ids, tolerances)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=150, max_size=150), st.integers(0, 149))
def test_segments_and_padding_anywhere(ids, whole):
    # Given any sorted ids with padding anywhere between them, and a long run of one of them
    ids = np.array(ids, np.int32)
    ids[ids >= 0] = np.sort(ids[ids >= 0])
    first = ids[whole:].max(initial=0)
    ids[whole:] = np.where(ids[whole:] < 0, -1, first)
    check_packed(SMALL, jnp.float32, tokens(1, 150, 2, (0.1, 2)), states(1, 4, 2), ids, (1e-5, 1e-5))


jitted_visits = jax.jit(chunk_visits, static_argnums=(1, 2))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 130), min_size=1, max_size=4), st.integers(0, 70))
def test_visits_meet_every_chunk_and_every_segment_in_order(lengths, gap):
    # Given five segments, some of them empty, and padding between them, in a row of 300 tokens
    ids, segments, chunks = np.full(300, -1, np.int32), 5, 5
    given_ids = packed_ids(lengths, gap)[:300]
    ids[: len(given_ids)] = given_ids

    # When the visits are listed
    found = jitted_visits(jnp.asarray(ids)[None], segments, 64)

    # Then both numbers rise one at a time, so that no state or output block is visited twice; the rest repeat the last
    count, pairs = int(found.total[0]), [*zip(*(array[0].tolist() for array in found[:2]), strict=True)]
    assert count <= len(pairs) == chunks + segments - 1
    assert set(pairs[count:]) <= {pairs[count - 1]}
    assert pairs[0] == (0, 0) and pairs[count - 1] == (chunks - 1, segments - 1)
    steps = np.diff(np.array(pairs[:count]), axis=0)
    assert ((steps == 0) | (steps == 1)).all() and steps.any(axis=1).all()
    assert {(at // 64, n) for at, n in enumerate(ids) if n >= 0} <= set(pairs)


def test_races_with_nothing_and_stays_in_bounds():
    ids = packed_ids((70, 58), gap=1)
    strict = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    check_packed(
        partial(KERNEL, interpret=strict),
        jnp.float32,
        tokens(1, len(ids), 2, (0.1, 2)),
        states(1, 2, 2),
        ids,
        (1e-5, 1e-5),
    )
    assert not interpret_pallas_call.races.races_found


def test_one_head_norms_scale_and_the_transition():
    # Given one head, no segments, and a last chunk that is not full
    q, k, v, g, beta = tokens(2, 70, 1, (0.1, 2))
    initial = states(2, 1, 1)[:, 0]
    run = partial(kda, normalize_qk=True, scale=0.3, implementation="mosaic_tpu")
    expected_o, expected = exact(0.3 * q, k, v, g, beta, initial)

    # When the kernel norms keys and queries and scales queries
    o, state, transition = jax.jit(partial(run, return_transition=True))(
        5 * q, 3 * k, v, g, beta, initial_state=initial
    )

    # Then outputs and state are right, and the transition maps the state
    assert relative_rmse(o, expected_o) <= 1e-5 and relative_rmse(state, expected) <= 1e-5
    without = exact(0.3 * q, k, v, g, beta, np.zeros_like(initial))[1]
    assert relative_rmse(np.einsum("bhij,bhjv->bhiv", transition, initial) + without, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_float32_are_full_and_of_bf16_single(dtype):
    arrays = (*rounded(tokens(1, 64, 2), dtype), jnp.asarray(states(1, 1, 2)), None)
    found = list(dots(jax.make_jaxpr(KERNEL)(*arrays)))
    operands = [{operand.aval.dtype for operand in dot.invars} for dot in found]
    # Sums of decays, six levels of halves and the diagonal, four steps of the inverse, and what the state explains, its
    # solution, outputs and what is written to the state.
    assert len(found) == 1 + 7 + 4 + 4
    # In either case the sums and the inverse are over bf16 parts.
    assert operands.count({jnp.dtype(jnp.bfloat16)}) == (5 if dtype == jnp.float32 else len(found))
    for dot, types in zip(found, operands, strict=True):
        full = types == {jnp.dtype(jnp.float32)}
        assert full or types == {jnp.dtype(jnp.bfloat16)}
        assert set(dot.params["precision"]) == {jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT}
        assert dot.params["preferred_element_type"] == jnp.float32


def test_sums_of_log_decays_are_exact_in_three_parts():
    g = jnp.asarray(tokens(1, 64, 1, (0.01, 0.1, 2, 20, 60))[3][0, :, 0])
    weights = jnp.asarray(np.tile(mosaic_scores.sum_weights(1), (1, 3)), jnp.bfloat16)
    factors = mosaic_scores.decay_factors(mosaic_scores.decay_sums(g, weights), 1)
    until = np.cumsum(np.float64(g)[::-1], axis=0)[::-1] - np.float64(g)
    np.testing.assert_allclose(factors[-64:], np.exp(until), rtol=2e-5, atol=1e-37)
    assert relative_rmse(factors[-128:-64], np.exp(np.cumsum(np.float64(g), axis=0))) <= 1e-6


@pytest.mark.parametrize("lower_bound,base", [(None, 1), (-60.0, 1), (-10.0, 8), (-5.0, 16), (-1.0, 64), (0.0, 64)])
def test_a_bound_on_the_gate_gives_blocks_that_need_no_cut(lower_bound, base):
    assert mosaic_scores.base_block(lower_bound) == base


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda q, k, v, g: (q[..., :64], k[..., :64], v, g[..., :64]), "heads have 64 key and 128 value channels"),
        (lambda q, k, v, g: (q, k.astype(jnp.bfloat16), v, g), "q, k and v are float32, bfloat16 and float32"),
        (lambda q, k, v, g: (q[:, :0], k[:, :0], v[:, :0], g[:, :0]), "it is empty"),
    ],
)
def test_says_why_it_cannot_serve(change, reason):
    *arrays, beta = rounded(tokens(1, 4, 1), jnp.float32)
    q, k, v, g = change(*arrays)
    with pytest.raises(ValueError, match=f"the mosaic_tpu kernel cannot serve this call: {reason}"):
        kda(q, k, v, g, beta[:, : q.shape[1]], implementation="mosaic_tpu")
