"""KDA against the recurrence in float64, against the reference model's values, and its gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from kernel_numerics import relative_rmse

from pallas_kernels import kda, kda_step
from pallas_kernels.kda import chunk_groups, reference, xla
from pallas_kernels.kda.shapes import AWKWARD, KIMI, KdaShape

FORMS = {"recurrent": jax.jit(xla.recurrent), "chunked": jax.jit(xla.chunked)}
SMALL = KdaShape("small", 1, 200, 2, 16, 24)


def arguments(shape, decay, cosine=0.5, seed=0):
    """Draws q, k, v, g, beta and a state; `decay` is a magnitude, or several that g mixes along time and channels."""
    rng = np.random.default_rng(seed)
    tokens = (shape.B, shape.T, shape.H)
    k = np.sqrt(cosine) * rng.standard_normal((1, 1, shape.H, shape.Dk))
    k = k + np.sqrt(1 - cosine) * rng.standard_normal((*tokens, shape.Dk))
    q = rng.standard_normal((*tokens, shape.Dk))
    q, k = (array / np.linalg.norm(array, axis=-1, keepdims=True) for array in (q, k))
    g = -rng.uniform(0.5, 1.5, k.shape) * rng.choice(np.atleast_1d(decay), k.shape)
    beta = rng.choice([1e-3, 0.5, 0.999], tokens)
    v, state = rng.standard_normal((*tokens, shape.Dv)), rng.standard_normal((shape.B, shape.H, shape.Dk, shape.Dv))
    return [np.asarray(array, np.float32) for array in (q, k, v, g, beta, state)]


def exact(*arrays):
    with jax.enable_x64(True):
        return jax.jit(reference.kda)(*(jnp.asarray(array, jnp.float64) for array in arrays))


def check(form, inputs, tolerance):
    o, states = FORMS[form](*map(jnp.asarray, inputs[:5]), jnp.asarray(inputs[5][:, None]), None)
    expected_o, expected_state = exact(*inputs)
    assert relative_rmse(o, expected_o) <= tolerance
    assert relative_rmse(states[:, 0], expected_state) <= tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", KIMI + AWKWARD, ids=lambda shape: shape.name)
def test_shapes(shape, form):
    check(form, arguments(shape, 0.1), 1e-6)


DECAYS = (0.01, 0.1, 2, 20, 60, "along time", "along channels", "everywhere")
COSINES = (0.5, 0.99)


def every_kind(tokens, dtype, seed=0):
    """Draws arguments with a row for each of COSINES and a head for each of DECAYS, the last of which mixes all of
    them."""
    shape = KdaShape("", len(COSINES), tokens, len(DECAYS), 16, 24)
    rng = np.random.default_rng(seed)
    rows = [arguments(shape._replace(B=1), 1, cosine, seed) for cosine in COSINES]
    q, k, v, g, beta, state = (np.concatenate(arrays) for arrays in zip(*rows, strict=True))
    for head, decay in enumerate(DECAYS):
        vary = {"along time": (tokens, 1), "along channels": (1, 16), "everywhere": (tokens, 16)}.get(decay, ())
        g[:, :, head] *= rng.choice(DECAYS[:5] if vary else [decay], vary)
    return *(jnp.asarray(array, dtype) for array in (q, k, v)), g, jnp.asarray(beta, dtype), state


def check_every_kind(found, expected, tolerance):
    """Checks the error of each row and head; heads are axis 2 of outputs, 1 of states."""
    axis = found.ndim - 2 if found.shape[-2] == len(DECAYS) else 1
    for row, cosine in enumerate(COSINES):
        for head, decay in enumerate(DECAYS):
            one, other = (np.take(np.asarray(array)[row : row + 1], head, axis) for array in (found, expected))
            assert relative_rmse(one, other) <= tolerance, (cosine, decay)


@pytest.mark.parametrize(
    "form,tokens,dtype",
    [
        *[("chunked", tokens, jnp.float32) for tokens in (1, 63, 64, 65, 200)],
        ("recurrent", 200, jnp.float32),
        ("chunked", 200, jnp.bfloat16),
        ("recurrent", 65, jnp.bfloat16),
    ],
)
def test_every_decay_with_unlike_and_alike_keys(form, tokens, dtype):
    *inputs, state = every_kind(tokens, dtype)
    o, states = FORMS[form](*inputs, jnp.asarray(state[:, None]), None)
    expected_o, expected_state = exact(*inputs, state)
    assert o.dtype == dtype and states.dtype == jnp.float32
    check_every_kind(o, expected_o, 2e-6 if dtype == jnp.float32 else 4e-3)
    check_every_kind(states[:, 0], expected_state, 2e-6)


def test_every_decay_with_boundaries_inside_chunks():
    *inputs, state = every_kind(150, jnp.float32)
    ids = np.repeat([[0, 2, 3, -1]], [40, 1, 89, 20], axis=1).repeat(len(COSINES), axis=0).astype(np.int32)
    initial = np.stack([state, 2 * state, -state, state], axis=1)
    o, states = FORMS["chunked"](*inputs, initial, ids)
    np.testing.assert_array_equal(states[:, 1], initial[:, 1])
    for segment, span in ((0, slice(0, 40)), (2, slice(40, 41)), (3, slice(41, 130))):
        expected_o, expected_state = exact(*(array[:, span] for array in inputs), initial[:, segment])
        check_every_kind(o[:, span], expected_o, 2e-6)
        check_every_kind(states[:, segment], expected_state, 2e-6)


def test_the_reference_models_values():
    # transformers 5.23.0, modeling_kimi_linear.recurrent_kimi_delta_attention and chunk_kimi_delta_attention
    # (they agree to 3e-8), with use_qk_l2norm_in_kernel, which scale q by Dk^-0.5: last token, second head's state.
    index = np.arange(5 * 7 * 2 * 4).reshape(5, 1, 7, 2, 4)
    q, k, v, g, _ = np.float32(np.sin(1.7 * index + (0.3 * index) % 5))
    g = np.float32(-3 * g.astype(np.float64) ** 2)
    beta = np.float32(0.5 + 0.4 * np.cos(np.arange(14.0)).reshape(1, 7, 2))
    state = np.float32(np.cos(np.arange(32.0)).reshape(1, 2, 4, 4))
    o, after = kda(q, k, v, g, beta, initial_state=state, normalize_qk=True, scale=0.5)
    last = [0.334298, -0.173808, -0.189682, 0.331675, -0.109173, -0.281327, 0.341205, -0.394123]
    states = [-0.112315, -0.266713, 0.330102, -0.399511, -0.024024, -0.471406, 0.425833, -0.177782]
    states += [0.181996, 0.457437, -0.562577, 0.657163, -0.067274, -0.154453, 0.190829, -0.236038]
    np.testing.assert_allclose(np.asarray(o)[0, -1].ravel(), last, atol=2e-6, rtol=0)
    np.testing.assert_allclose(np.asarray(after)[0, 1].ravel(), states, atol=2e-6, rtol=0)


def test_step_continues_prefill():
    inputs = arguments(SMALL, (0.1, 2))
    step = jax.jit(kda_step)
    state = inputs[5]
    for t in range(5):
        o, state = step(*(array[:, t] for array in inputs[:5]), state)
    expected_o, expected_state = exact(*(array[:, :5] for array in inputs[:5]), inputs[5])
    assert relative_rmse(o, expected_o[:, 4]) <= 1e-6 and relative_rmse(state, expected_state) <= 1e-6


@pytest.mark.parametrize("tokens", [5, 70])
def test_transition_maps_the_state(tokens):
    inputs = arguments(SMALL._replace(T=tokens), (0.1, 2))
    _, without, transition = kda(*inputs[:5], return_transition=True)
    expected = exact(*inputs)[1]
    assert relative_rmse(np.einsum("bhij,bhjv->bhiv", transition, inputs[5]) + without, expected) <= 2e-6


PACKED = 90
PACKED_INPUTS = arguments(KdaShape("packed", 1, PACKED, 1, 8, 4), (0.1, 2))
PACKED_STATES = np.random.default_rng(9).standard_normal((1, 4, 1, 8, 4)).astype(np.float32)
PACKED_FORMS = {name: jax.jit(getattr(xla, name)) for name in FORMS}


@settings(deadline=None, max_examples=8, derandomize=True)
@given(cuts=st.lists(st.integers(0, PACKED), min_size=5, max_size=5))
def test_packed_rows_are_their_sequences(cuts):
    # Given five spans, the first of them padding, some perhaps empty, with boundaries anywhere
    edges = [0, *sorted(cuts)]
    ids = np.full((1, PACKED), -1, np.int32)
    for segment in range(4):
        ids[0, edges[segment + 1] : edges[segment + 2]] = segment
    inputs = [
        np.where((ids >= 0).reshape(1, PACKED, *(1,) * (array.ndim - 2)), array, 0) for array in PACKED_INPUTS[:5]
    ]
    for form in PACKED_FORMS.values():
        o, states = form(*map(jnp.asarray, inputs), jnp.asarray(PACKED_STATES), jnp.asarray(ids))
        # Then each has the result that it has in a row of its own
        for segment in range(4):
            state = PACKED_STATES[:, segment].astype(np.float64)
            for t in range(edges[segment + 1], edges[segment + 2]):
                q, k, v, g, beta = (np.float64(array[:, t]) for array in inputs)
                state = np.exp(g)[..., None] * state
                error = v - np.einsum("bhkv,bhk->bhv", state, k)
                state = state + beta[..., None, None] * k[..., None] * error[..., None, :]
                np.testing.assert_allclose(o[:, t], np.einsum("bhkv,bhk->bhv", state, q), atol=3e-6, rtol=0)
            np.testing.assert_allclose(states[:, segment], state, atol=3e-6, rtol=0)
        assert not np.asarray(o)[ids < 0].any()


def test_padding_may_hold_anything():
    ids = np.full((1, PACKED), -1, np.int32)
    ids[0, 3:80] = 0
    poisoned = [array.copy() for array in PACKED_INPUTS[:5]]
    for array in poisoned:
        array[ids < 0] = np.nan
    o, states = jax.jit(partial(kda, num_segments=1))(*poisoned, segment_ids=ids)
    expected_o, expected = exact(*(array[:, 3:80] for array in PACKED_INPUTS[:5]), np.zeros((1, 1, 8, 4)))
    assert relative_rmse(o[:, 3:80], expected_o) <= 1e-6 and relative_rmse(states[:, 0], expected) <= 1e-6
    assert not np.asarray(o)[ids < 0].any()


def loss(run, weights, *arrays):
    o, state = run(*arrays)
    return jnp.sum(o.astype(weights[0].dtype) * weights[0]) + jnp.sum(state * weights[1])


def exact_gradients(weights, *arrays):
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in arrays]
        weights = [jnp.asarray(array, jnp.float64) for array in weights]
        return jax.jit(jax.grad(partial(loss, reference.kda, weights), argnums=range(6)))(*wide)


def check_gradients(found, expected, tolerance):
    """Checks RMSE over RMS of each gradient; for dg, over at least a thousandth of the largest other RMS."""
    found, expected = ([np.asarray(array, np.float64) for array in arrays] for arrays in (found, expected))
    assert all(np.isfinite(array).all() for array in found)
    sizes = [np.sqrt(np.mean(array**2)) for array in expected]
    sizes[3] = max(sizes[3], 1e-3 * max(sizes))
    errors = [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(found, expected, strict=True)]
    assert all(error <= tolerance * size for error, size in zip(errors, sizes, strict=True)), (errors, sizes)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-3)])
def test_gradients_of_every_decay(dtype, tolerance, monkeypatch):
    # Given two groups of one chunk each
    monkeypatch.setattr(chunk_groups, "GROUP", 1)
    inputs = every_kind(100, dtype)
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.standard_normal(array.shape), dtype) for array in (inputs[2], inputs[5])]
    run = partial(loss, lambda *arrays: kda(*arrays[:5], initial_state=arrays[5]), weights)
    found = jax.jit(jax.grad(run, argnums=range(6)))(*inputs)
    assert [array.dtype for array in found] == [array.dtype for array in inputs]
    expected = exact_gradients(weights, *inputs)
    for row in range(len(COSINES)):
        for head in range(len(DECAYS)):
            # Heads are axis 1 of the state, axis 2 of the others
            one, other = (
                [array[row, :, head] for array in arrays[:5]] + [arrays[5][row, head]] for arrays in (found, expected)
            )
            check_gradients(one, other, tolerance)


def test_gradients_of_packed_rows_with_poisoned_padding(monkeypatch):
    # Given padding around and between three segments, one of them empty and one of two chunks; every chunk is a group
    monkeypatch.setattr(chunk_groups, "GROUP", 1)
    ids = np.repeat([[-1, 0, -1, 2, -1]], [3, 12, 2, 70, 3], axis=1).astype(np.int32)
    poisoned = [np.where((ids >= 0).reshape(1, PACKED, *(1,) * (a.ndim - 2)), a, np.nan) for a in PACKED_INPUTS[:5]]
    initial = PACKED_STATES[:, :3]
    weights = [np.random.default_rng(2).standard_normal(a.shape).astype(np.float32) for a in (poisoned[2], initial)]
    run = partial(kda, segment_ids=ids, num_segments=3, normalize_qk=True, scale=0.3)
    found = jax.jit(
        jax.grad(partial(loss, lambda *arrays: run(*arrays[:5], initial_state=arrays[5]), weights), argnums=range(6))
    )(*poisoned, initial)

    # Then each has the gradients of a row of its own, and padding has zeros
    def normed(q, k, *rest):
        q, k = (x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
        return reference.kda(0.3 * q, k, *rest)

    for segment in (0, 2):
        tokens = ids[0] == segment
        with jax.enable_x64(True):
            wide = [jnp.asarray(array[:, tokens], jnp.float64) for array in PACKED_INPUTS[:5]]
            state = jnp.asarray(initial[:, segment], jnp.float64)
            exact_loss = partial(loss, normed, [weights[0][:, tokens], weights[1][:, segment]])
            expected = jax.jit(jax.grad(exact_loss, argnums=range(6)))(*wide, state)
        check_gradients([*(array[:, tokens] for array in found[:5]), found[5][:, segment]], expected, 1e-5)
    np.testing.assert_array_equal(found[5][:, 1], weights[1][:, 1])
    assert not any(np.asarray(array)[ids < 0].any() for array in found[:5])


def test_segments_that_share_chunks_are_those_with_chunks_of_their_own():
    # Given segments that begin and end in chunks of others, one of a token, one empty, and poisoned padding
    ids = np.repeat([[-1, 0, 1, -1, 3, 4, -1]], [3, 12, 1, 2, 60, 9, 3], axis=1).astype(np.int32)
    poisoned = [np.where((ids >= 0).reshape(1, PACKED, *(1,) * (a.ndim - 2)), a, np.nan) for a in PACKED_INPUTS[:5]]
    weight = np.random.default_rng(2).standard_normal(poisoned[2].shape).astype(np.float32)

    def outputs_loss(options, *arrays):
        o, _ = kda(*arrays, segment_ids=ids, num_segments=5, normalize_qk=True, scale=0.3, **options)
        return jnp.sum(o * weight), o

    (_, o), found = jax.jit(
        jax.value_and_grad(partial(outputs_loss, {"return_state": False}), argnums=range(5), has_aux=True)
    )(*poisoned)
    (_, expected_o), expected = jax.jit(jax.value_and_grad(partial(outputs_loss, {}), argnums=range(5), has_aux=True))(
        *poisoned
    )
    assert relative_rmse(o, expected_o) <= 1e-6
    check_gradients(found, expected, 2e-6)
    assert not any(np.asarray(array)[ids < 0].any() for array in (o, *found))


def test_time_does_not_depend_on_the_room_for_segments():
    beta, ids = jnp.zeros((2, 200, 3)), jnp.zeros((2, 200), jnp.int32)
    few, many = (chunk_groups.ChunkGroups.make(beta, jnp.zeros((2, room, 3, 8, 4)), ids, True) for room in (1, 50))
    assert jax.tree.map(jnp.shape, few) == jax.tree.map(jnp.shape, many)
    assert many.carried(jnp.zeros((2, 50, 3, 8, 4))).shape == (2, 1, 3, 8, 4)


def test_a_broken_lower_bound_is_an_error_under_checkify():
    q, k, v, g, beta, _ = arguments(KdaShape("", 1, 6, 1, 8, 4), 1.0)
    ids = np.repeat([[0, -1]], [4, 2], axis=1).astype(np.int32)
    g[:, 4:] = np.nan
    run = partial(kda, num_segments=1, lower_bound=-5.0)
    checked = checkify.checkify(jax.jit(run), errors=checkify.user_checks)
    error, _ = checked(q, k, v, g, beta, segment_ids=ids)
    error.throw()
    g[0, 3, 0, 2] = -7.5
    run(q, k, v, g, beta, segment_ids=ids)  # the result is undefined, and the call not refused
    error, _ = checked(q, k, v, g, beta, segment_ids=ids)
    with pytest.raises(checkify.JaxRuntimeError, match=r"kda: g goes down to -7\.5, lower_bound promises -5\.0 <= g"):
        error.throw()


def test_bad_arguments_are_refused():
    q, k, v, g, beta, state = arguments(KdaShape("", 1, 4, 1, 8, 4), 1.0)
    ids = np.zeros((1, 4), np.int32)
    for message, options in (
        (r"k has shape \(1, 4, 1, 7\), expected \[B=1, T=4, H=1, Dk=8\]", {"k": k[..., :7]}),
        (r"g is bfloat16, expected float32 or float64", {"g": jnp.asarray(g, jnp.bfloat16)}),
        (r"initial_state has shape \(1, 1, 4, 8\)", {"initial_state": state.swapaxes(2, 3)}),
        (r"go together", {"segment_ids": ids}),
        (r"segment_ids run from 0 to 3, expected -1 to 1", {"segment_ids": [[0, 1, 2, 3]], "num_segments": 2}),
        (r"decrease", {"segment_ids": [[1, 1, -1, 0]], "num_segments": 2}),
        (r"lower_bound is 5", {"lower_bound": 5}),
        (r"heads have 8 key and 4 value channels", {"implementation": "mosaic_tpu"}),
    ):  # fmt: skip
        arrays = {"q": q, "k": k, "v": v, "g": g, "beta": beta} | options
        arrays = {name: np.int32(value) if name == "segment_ids" else value for name, value in arrays.items()}
        with pytest.raises(ValueError, match=message):
            kda(**arrays)
    with pytest.raises(ValueError, match="kda_step: state is bfloat16, expected float32"):
        kda_step(*(array[:, 0] for array in (q, k, v, g, beta)), jnp.asarray(state, jnp.bfloat16))
