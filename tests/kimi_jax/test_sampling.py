"""The filters against a plain float64 reading of their definitions, and the draw against its probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.sampling import Sampling, filtered, sample

LOGITS = np.random.RandomState(0).normal(size=(4, 50)).astype(np.float32) * 2


def expected(row, sampling):
    """The probabilities of all tokens after the filters, one token at a time."""
    p = np.exp(row.astype(np.float64) / sampling.temperature)
    best_first = sorted(range(len(p)), key=lambda i: -p[i])
    if sampling.top_k:
        for i in best_first[sampling.top_k :]:
            p[i] = 0
    total, reached = p.sum(), 0.0
    for i in best_first:
        if reached >= sampling.top_p * total:
            p[i] = 0
        reached += p[i]
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


SETTINGS = [
    Sampling(1.0),
    Sampling(0.6),
    Sampling(1.0, top_k=5),
    Sampling(1.3, top_p=0.8),
    Sampling(1.0, min_p=0.1),
    Sampling(0.9, top_k=20, top_p=0.9, min_p=0.05),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, top_k=1000),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_filters_keep_what_their_definitions_keep(sampling):
    ranked, order = filtered(jnp.asarray(LOGITS), sampling)
    for row in range(len(LOGITS)):
        got = np.zeros(LOGITS.shape[1])
        got[np.asarray(order[row])] = jax.nn.softmax(ranked[row])
        np.testing.assert_allclose(got, expected(LOGITS[row], sampling), rtol=2e-6, atol=1e-9)


def test_top_k_keeps_exactly_k_of_equals():
    ranked, _ = filtered(jnp.zeros((1, 10)), Sampling(1.0, top_k=3))
    assert int(jnp.isfinite(ranked).sum()) == 3


def test_draws_have_the_right_frequencies():
    sampling, n = Sampling(1.0, top_k=6), 4000
    keys = jax.random.split(jax.random.key(0), n)
    drawn = np.asarray(sample(jnp.broadcast_to(jnp.asarray(LOGITS[0]), (n, 50)), keys, sampling))
    p = expected(LOGITS[0], sampling)
    counts = np.bincount(drawn, minlength=50)
    assert counts[p == 0].sum() == 0
    # chi-square with 5 degrees of freedom stays under 20.5 with probability 0.999; the keys are fixed
    assert (((counts - n * p) ** 2)[p > 0] / (n * p[p > 0])).sum() < 20.5


def test_greedy_is_the_best_token_whatever_the_filters():
    greedy = sample(jnp.asarray(LOGITS), jax.random.split(jax.random.key(0), 4), Sampling(0.0, top_k=3, min_p=0.5))
    np.testing.assert_array_equal(greedy, LOGITS.argmax(-1))
