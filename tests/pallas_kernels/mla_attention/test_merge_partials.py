"""Two halves of the keys, merged, against all of them at once, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import merge_partials


def attention(scores, values):
    scores = np.asarray(scores, np.float64)
    top = scores.max(-1, keepdims=True, initial=-1e300)
    weights = np.exp(scores - top)
    return weights @ values / weights.sum(-1, keepdims=True), (np.log(weights.sum(-1)) + top[..., 0])


@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0])
def test_merged_halves_are_the_whole(shift):
    random = np.random.RandomState(0)
    scores, values = 3 * random.normal(size=(5, 40)), random.normal(size=(40, 8))
    scores[:, 25:] += shift
    halves = [attention(scores[:, part], values[part]) for part in (slice(0, 25), slice(25, 40))]
    (out, lse) = merge_partials(*(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), half) for half in halves))
    expected, expected_lse = attention(scores, values)
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-7 * np.abs(values).max() * 5)
    np.testing.assert_allclose(lse, expected_lse, rtol=3e-7)


def test_a_part_that_saw_nothing_changes_nothing_and_two_give_zeros():
    some = (jnp.full((2, 3), 7.0), jnp.array([1.0, -2.0]))
    nothing = (jnp.zeros((2, 3)), jnp.full(2, -jnp.inf))
    for merged in (merge_partials(some, nothing), merge_partials(nothing, some)):
        np.testing.assert_array_equal(merged[0], some[0])
        np.testing.assert_array_equal(merged[1], some[1])
    out, lse = merge_partials(nothing, nothing)
    assert (out == 0).all() and jnp.isneginf(lse).all()
