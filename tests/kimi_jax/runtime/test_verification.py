"""Tokens chosen by a verification are distributed as without drafts, and states are those after the tokens it takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.model.context import KDAState
from kimi_jax.runtime.batch import Batch, Chosen, Finish
from kimi_jax.runtime.draw import filtered_weights, sample
from kimi_jax.runtime.program import Program
from kimi_jax.runtime.sampling import Sampling, sampling_rows
from kimi_jax.runtime.verify import verify

DRAWS, WORDS = 20_000, 5


def batch_of(rows, drafts, sampling, seeds, **more):
    """Returns the verification of these drafts, [rows, k], after a token at position 9."""
    nothing = None
    batch = Batch(
        tokens=nothing,
        positions=nothing,
        page_table=np.zeros((rows, 1), np.int32),
        sampling=sampling_rows([sampling], seeds[:1]),
        stop_ids=np.full((rows, 1), -1, np.int32),
        ends=np.full(rows, 100, np.int32),
        choosing=np.ones(rows, bool),
    )
    one = batch.sampling
    values = one._replace(**{name: np.repeat(getattr(one, name), rows, axis=0) for name in one._fields})
    halves = np.stack([seeds >> np.uint64(32), seeds & np.uint64(2**32 - 1)], axis=1).astype(np.uint32)
    zeros = np.zeros(rows, np.int32)
    batch = dataclasses.replace(batch, sampling=values._replace(seeds=halves), **more)
    return batch.verification(np.full(rows, 9), drafts, Chosen(zeros, zeros))


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.8, top_p=0.8, min_p=0.05)])
def test_the_distribution_is_that_of_plain_sampling(sampling):
    # Given a chain whose next word depends on the last one, and drafts that are likely
    chain = np.random.RandomState(0).randn(WORDS, WORDS).astype(np.float32)
    first = 2
    second = int(chain[first].argmax())
    drafts = np.tile([second, int(chain[second].argsort()[-2])], (DRAWS, 1)).astype(np.int32)
    logits = np.broadcast_to(chain[np.array([first, *drafts[0]])], (DRAWS, 3, WORDS))
    batch = batch_of(DRAWS, drafts, sampling, np.arange(DRAWS, dtype=np.uint64))

    # When each is verified, and the rest of three words is drawn without drafts, with other seeds
    verified = jax.jit(verify)(jnp.asarray(logits), batch)
    tokens, counts = np.asarray(verified.tokens), np.asarray(verified.counts)
    words = np.where(np.arange(3) < counts[:, None], tokens, -1)
    fresh = batch_of(DRAWS, drafts, sampling, np.arange(DRAWS, dtype=np.uint64) + np.uint64(10**6)).sampling
    for place in (1, 2):
        drawn = jax.jit(sample)(jnp.asarray(chain[words[:, place - 1]]), fresh, np.full(DRAWS, 20 + place, np.int32))
        words[:, place] = np.where(words[:, place] < 0, drawn, words[:, place])
    assert 0.02 < (counts > 1).mean() < 0.98 and set(counts) == {1, 2, 3}

    # Then all triples are as frequent as in plain sampling
    rows = fresh._replace(**{name: getattr(fresh, name)[:WORDS] for name in fresh._fields})
    weights = np.asarray(filtered_weights(jnp.asarray(chain), rows))
    weights = weights / weights.sum(axis=1, keepdims=True)
    expected = DRAWS * np.einsum("a,ab,bc->abc", weights[first], weights, weights).reshape(-1)
    found = np.bincount(words @ [WORDS**2, WORDS, 1], minlength=WORDS**3)
    assert not found[expected == 0].any()
    likely = expected >= 5
    found, expected = (np.append(x[likely], x[~likely].sum()) for x in (found, expected))
    found, expected = found[expected > 0], expected[expected > 0]
    # The 0.999 quantile of chi-square, as Wilson and Hilferty approximate it; the seeds are fixed
    share = 2 / (9 * (len(found) - 1))
    assert ((found - expected) ** 2 / expected).sum() < (len(found) - 1) * (1 - share + 3.09 * share**0.5) ** 3


def test_where_a_verification_ends():
    # Given rows whose drafts are all right: a stop id, the end of the room, numbers that are not finite, none of these
    best = np.array([[1, 2, 3]] * 5)
    logits = np.array(np.eye(WORDS, dtype=np.float32)[best])
    logits[2, 1, 0] = np.nan
    stops, ends = np.full((5, 1), -1, np.int32), np.full(5, 100, np.int32)
    stops[0], ends[1] = 2, 12
    seeds = np.zeros(5, np.uint64)
    batch = batch_of(5, best[:, :2].astype(np.int32), Sampling(), seeds, stop_ids=stops, ends=ends)
    finished = np.array([0, 0, 0, 0, Finish.STOP], np.int32)
    batch = dataclasses.replace(batch, previous=Chosen(np.array([0, 0, 0, 0, 4], np.int32), finished))

    # Then each ends there, and one that had ended before keeps its values
    verified = jax.jit(verify)(jnp.asarray(logits), batch)
    assert verified.counts.tolist() == [2, 2, 2, 3, 0]
    assert verified.chosen.finish.tolist() == [Finish.STOP, Finish.LENGTH, Finish.NOT_FINITE, 0, Finish.STOP]
    assert verified.chosen.tokens.tolist()[:2] == [2, 2] and verified.chosen.tokens.tolist()[3:] == [3, 4]


def test_states_are_those_after_the_accepted_tokens(two_layer_model):
    # Given states of two rows after prompts
    program, slots = Program(two_layer_model("kimi-linear")), np.array([2, 0], np.int32)
    tokens = np.random.RandomState(0).randint(0, 500, (2, 32)).astype(np.int32)
    batch = dataclasses.replace(
        batch_of(2, np.zeros((2, 1), np.int32), Sampling(), np.zeros(2, np.uint64), slots=slots),
        tokens=tokens,
        positions=np.tile(np.arange(32, dtype=np.int32), (2, 1)),
        page_table=np.array([[0], [1]], np.int32),
        previous=program.nothing_chosen(2),
        phase="prefill",
    )

    def prefilled():
        return program.step(program.cache(2, 3), batch)  # (a step's cache is donated to the next)

    # When decode steps choose five more, and a verification is given three of a row and one of the other, with a
    # wrong one after each
    cache, chosen = prefilled()
    states, words = [], [np.asarray(chosen.tokens)]
    for step in range(4):
        cache, chosen = program.step(cache, batch.next_token(np.full(2, 32 + step), chosen))
        states.append([jax.tree.map(np.asarray, layer) for layer in cache.layers])
        words.append(np.asarray(chosen.tokens))
    words = np.stack(words, axis=1)
    drafts = words[:, 1:5].copy()
    drafts[0, 3], drafts[1, 1] = (drafts[0, 3] + 1) % 500, (drafts[1, 1] + 1) % 500
    cache, chosen = prefilled()
    cache, verified = program.verify(cache, batch.verification(np.full(2, 32), drafts, chosen))

    # Then the states are the ones after so many steps
    assert verified.counts.tolist() == [4, 2]
    np.testing.assert_array_equal(verified.tokens[0, :4], words[0, 1:5])
    for row, steps in enumerate((4, 2)):
        for number, layer in enumerate(cache.layers):
            if isinstance(layer, KDAState):
                for found, expected in zip(layer, states[steps - 1][number], strict=True):
                    np.testing.assert_allclose(found[slots[row]], expected[slots[row]], rtol=1e-6, atol=1e-6)
