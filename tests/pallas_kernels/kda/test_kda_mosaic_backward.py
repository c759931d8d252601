"""The gradient kernel of KDA, interpreted, against the float64 recurrence differentiated by JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from kda_tokens import packed_ids, rounded, rows_of_decays, segments_as_rows, states, tokens
from kernel_numerics import dots, relative_rmse

from pallas_kernels import kda
from pallas_kernels.kda import mosaic_backward, mosaic_score_gradients, mosaic_tpu, reference

PLAIN = {"normalize_qk": False, "scale": 1.0}
NAMES = ("q", "k", "v", "g", "beta", "initial state")


def gradients(inputs, initial, ids, do, dstates, **options):
    """Returns the op's gradients: the kernel's, from the states that the forward kernel saves."""

    def run(*arrays):
        packed = {"segment_ids": ids, "num_segments": initial.shape[1], "initial_state": arrays[5]}
        return kda(*arrays[:5], **packed, **options, implementation="mosaic_tpu")

    return jax.vjp(run, *inputs, initial)[1]((do, dstates))


def recurrence(options, q, k, *rest):
    if options["normalize_qk"]:
        q, k = (x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
    return reference.kda(options["scale"] * q, k, *rest)


def check(run, options, dtype, arrays, ids, segments, tolerances):
    """Compares all gradients of each row and head; padding has NaN in all that is given."""
    rng = np.random.default_rng(2)
    rows, _, heads, _ = arrays[0].shape
    initial, dstates = states(rows, segments, heads), np.float32(rng.standard_normal((rows, segments, heads, 128, 128)))
    do = rng.standard_normal(arrays[2].shape)
    for array in (*arrays, do):
        array[:, ids < 0] = np.nan
    inputs, do = rounded(arrays, dtype), jnp.asarray(do, dtype)

    # Given the recurrence over the tokens of each segment, differentiated in float64
    longest = max(int(np.sum(ids == n)) for n in range(segments))
    *padded, padded_do = segments_as_rows((*inputs, do), ids, segments, longest)
    given = [np.float64(np.moveaxis(array, 1, 0).reshape(-1, *array.shape[2:])) for array in (initial, dstates)]
    with jax.enable_x64(True):
        pull = jax.jit(lambda arrays, results: jax.vjp(partial(recurrence, options), *arrays)[1](results))
        expected = [np.asarray(array) for array in pull((*padded, given[0]), (padded_do, given[1]))]

    # When the kernels take the packed rows
    found = run(inputs, jnp.asarray(initial), jnp.asarray(np.tile(ids, (rows, 1))), do, jnp.asarray(dstates))

    # Then each gradient is that of the recurrence, and padding has none
    assert [array.dtype for array in found] == [*(array.dtype for array in inputs), jnp.float32]
    found = [np.asarray(array, np.float64) for array in found]
    assert not any(array[:, ids < 0].any() for array in found[:5])
    tokens_of = [np.flatnonzero(ids == n) for n in range(segments)]
    for n, at in enumerate(tokens_of):
        if not at.size:
            np.testing.assert_array_equal(found[5][:, n], dstates[:, n])
    expected = [array.reshape(segments, rows, *array.shape[1:]) for array in expected]
    errors = {}
    for row, head in np.ndindex(rows, heads):
        for i, name in enumerate(NAMES):
            if i < 5:
                one = np.concatenate([found[i][row, at, head] for at in tokens_of])
                other = np.concatenate([expected[i][n, row, : at.size, head] for n, at in enumerate(tokens_of)])
            else:
                one, other = found[i][row, :, head], expected[i][:, row, head]
            errors[name, row, head] = relative_rmse(one, other)
    # (dbeta is one sum over channels and has no more terms to average over: it may have twice the others' error.)
    excess = {key: error for key, error in errors.items() if error > tolerances[key[2]] * (1 + (key[0] == "beta"))}
    assert not excess


@pytest.mark.parametrize(
    "dtype,tolerances,options",
    [
        (jnp.float32, (1e-5, 1e-5), {"normalize_qk": True, "scale": 0.3}),
        pytest.param(jnp.bfloat16, (5e-3, 1e-2), PLAIN, marks=pytest.mark.slow),
    ],
)
def test_every_decay_and_length_with_unlike_and_alike_keys(dtype, tolerances, options):
    # Given a row for each kind of decay, a head for each likeness of keys, and segments of awkward lengths anywhere
    ids = packed_ids((1, 0, 63, 80))
    arrays = rows_of_decays(len(ids), (0.01, 2, 60, (0.01, 0.1, 2, 20, 60)))

    # Then no gradient, dg neither, is further from its own size than outputs are from theirs
    check(jax.jit(partial(gradients, **options)), options, dtype, arrays, ids, 4, tolerances)


@pytest.mark.slow
def test_races_with_nothing_and_stays_in_bounds():
    ids = packed_ids((70, 58), gap=1)
    strict = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")

    def run(inputs, initial, ids, do, dstates):
        saved = jax.jit(partial(mosaic_tpu.kda, lower_bound=None, visit_states=True, interpret=True, **PLAIN))
        arrays = (*inputs, initial, saved(*inputs, initial, ids)[2], do, dstates, ids)
        return mosaic_backward.kda_backward(*arrays, interpret=strict, **PLAIN)

    try:
        check(run, PLAIN, jnp.float32, tokens(1, len(ids), 2, (0.1, 2)), ids, 2, (1e-5, 1e-5))
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.slow
def test_one_head_with_wide_values():
    # Given one head, no segments, a token alone in the last chunk, and more channels of values than of keys
    q, k, v, g, beta = tokens(1, 65, 1, (0.1, 2))
    v, initial = (np.concatenate([x, 2 * x[..., ::-1]], axis=-1) for x in (v, states(1, 1, 1)[:, 0]))

    def loss(run, *arrays):
        o, state = run(*arrays)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(state))

    def kernel(*arrays):
        options = {"normalize_qk": True, "scale": 0.3, "implementation": "mosaic_tpu"}
        return kda(*arrays[:5], initial_state=arrays[5], **options)

    # Then the op's gradients are those of the recurrence
    arrays = (5 * q, 3 * k, v, g, beta, initial)
    found = jax.jit(jax.grad(partial(loss, kernel), argnums=range(6)))(*arrays)
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in arrays]
        exact = partial(loss, partial(recurrence, {"normalize_qk": True, "scale": 0.3}))
        expected = jax.jit(jax.grad(exact, argnums=range(6)))(*wide)
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert relative_rmse(one, other) <= 1e-5, name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_float32_are_full_and_of_bf16_single(dtype):
    inputs, initial = rounded(tokens(1, 64, 2), dtype), jnp.asarray(states(1, 1, 2))
    run = partial(mosaic_backward.kda_backward, interpret=True, **PLAIN)
    found = list(dots(jax.make_jaxpr(run)(*inputs, initial, initial, inputs[2], initial, None)))
    operands = [{operand.aval.dtype for operand in dot.invars} for dot in found]
    # The forward kernel's, of which two with the state and V'; four for dV' and its way through the inverse, two for
    # decayed products, four for states and their decay, six levels, and the sums of exponents.
    assert len(found) == 1 + 7 + 4 + 2 + 4 + 2 + 4 + 6 + 1
    assert operands.count({jnp.dtype(jnp.bfloat16)}) == (6 if dtype == jnp.float32 else len(found))
    for dot, types in zip(found, operands, strict=True):
        full = types == {jnp.dtype(jnp.float32)}
        assert full or types == {jnp.dtype(jnp.bfloat16)}
        assert set(dot.params["precision"]) == {jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT}
        assert dot.params["preferred_element_type"] == jnp.float32


def test_exponents_are_sums_of_their_own_log_decays():
    # Given factors that are a log decay's sum from or to a cut, up to a token, or after it, as the weights say
    g = tokens(1, 64, 1)[3][0, :, 0].astype(np.float64)
    sums = (mosaic_score_gradients.exponent_weights().T @ g).reshape(-1, 64, 128)

    # Then two tokens are decayed by the factors of the one level that parts them
    codes = mosaic_score_gradients.gradient_codes(1)[:64, :64]
    for i, j in ((1, 0), (17, 16), (40, 3), (63, 31), (63, 62), (13, 9)):
        level = mosaic_score_gradients.LEVELS.index(codes[i, j])
        np.testing.assert_allclose(sums[level, i] + sums[level, j], g[j + 1 : i + 1].sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sums[-2] + sums[-1], np.broadcast_to(g.sum(axis=0), (64, 128)), rtol=1e-12)
