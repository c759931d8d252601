"""Penalties, masks and logprobs against plain numpy, and that nobody pays for them who does not ask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.runtime.batch import BANNED, Batch, Finish, padded_stop_ids
from kimi_jax.runtime.choose import IN_PROMPT, MOST_LOGPROBS, choose, count_tokens, occurred
from kimi_jax.runtime.sampling import Sampling, checked_seeds, sampling_rows

ROWS, WORDS = 4, 50
LOGITS = np.random.RandomState(0).normal(size=(ROWS, WORDS)).astype(np.float32) * 2
LOGITS[:, 40:44] = LOGITS[:, 3:4]  # equals
ALL = np.full((ROWS, 2), 2**32 - 1, np.uint32)
run = jax.jit(choose, static_argnums=2)


GREEDY = (Sampling(),) * ROWS


def batch(sampling=GREEDY, **more):
    """Returns a decode step whose rows are slots 0 to 3, with everything that requests can ask for."""
    values = {
        "mask": ALL,
        "banned": np.full((ROWS, BANNED), -1, np.int32),
        "counts": jnp.zeros((ROWS, WORDS), jnp.int32),
        "logprobs": np.zeros(ROWS, bool),
        "choosing": np.ones(ROWS, bool),
    } | more
    return Batch(
        np.zeros((ROWS, 1), np.int32),
        np.zeros((ROWS, 1), np.int32),
        np.zeros((ROWS, 1), np.int32),
        sampling_rows(sampling, checked_seeds(0, ROWS)),
        padded_stop_ids((), ROWS, WORDS),
        np.full(ROWS, 99, np.int32),
        phase="decode",
        **values,
    )


def expected_penalized(row, prompt, generated, sampling):
    row = row.astype(np.float64)
    for token in {*prompt, *generated}:
        row[token] *= 1 / sampling.repetition_penalty if row[token] > 0 else sampling.repetition_penalty
    for token in set(generated):
        row[token] -= sampling.frequency_penalty * generated.count(token) + sampling.presence_penalty
    return row


@pytest.mark.parametrize("slots", [None, [1, 0, 1, 0]])
def test_penalties_lower_tokens_that_occurred(slots):
    # Given slots of two data shards where rows are not all slots, and one row without penalties
    numbers = np.arange(4) if slots is None else np.array([1, 0, 3, 2])
    prompts, answers = [[3, 3, 7], [], [9], [1, 2]], [[3, 5, 5], [4], [], [8] * 9]
    counts = np.stack([occurred(prompts[i], answers[i], WORDS) for i in range(ROWS)])
    settings = [
        Sampling(presence_penalty=1.5, frequency_penalty=0.25, repetition_penalty=1.3),
        Sampling(presence_penalty=-2.0),
        Sampling(),
        Sampling(frequency_penalty=2.0, repetition_penalty=0.5),
    ]
    step = batch(settings, counts=jnp.asarray(counts), slots=None if slots is None else np.array(slots, np.int32))
    for row, number in enumerate(numbers):
        want = expected_penalized(LOGITS[row], prompts[number], answers[number], settings[row])
        # A token that is just better than the best one after penalties is chosen, one just worse is not
        for difference, chosen in ((1e-3, 20), (-1e-3, None)):
            logits = LOGITS.copy()
            logits[row, 20] = np.delete(want, 20).max() + difference
            token = int(run(logits, step, 1 if slots is None else 2).tokens[row])
            assert (token == 20) == (chosen == 20), f"row {row}"


def test_counts_follow_the_tokens():
    prompt, answer = [1, 1, 2], [2, 3, 3]
    counts = jnp.asarray(np.stack([occurred(prompt, answer[:1], WORDS), occurred((), (), WORDS)]))
    for token in answer[1:]:
        counts = count_tokens(counts, jnp.array([token, 4], jnp.int32), jnp.array([True, False]))
    np.testing.assert_array_equal(counts[0], occurred(prompt, answer, WORDS))
    assert counts[0, :4].tolist() == [0, IN_PROMPT, IN_PROMPT + 1, 2] and not counts[1].any()


def test_masks_allow_what_their_bits_say():
    mask = ALL.copy()
    mask[1], mask[2] = [0, 1 << 5], [1 << 31, 0]
    step = batch([Sampling(), Sampling(), Sampling(1.0), Sampling(1.0)], mask=mask)
    assert run(LOGITS, step, 1).tokens.tolist()[:3] == [LOGITS[0].argmax(), 37, 31]


def test_banned_tokens_are_never_chosen():
    best = np.argsort(-LOGITS, axis=1, kind="stable")
    banned = np.full((ROWS, BANNED), -1, np.int32)
    banned[0, :2], banned[2, :BANNED], banned[3, 1] = best[0, :2], best[2, :BANNED], best[3, 1]
    sampling = [Sampling(), Sampling(), Sampling(1.0, top_k=1), Sampling()]
    chosen = run(LOGITS, batch(sampling, banned=banned), 1)
    expected = [best[0, 2], best[1, 0], best[2, BANNED], best[3, 0]]
    assert chosen.tokens.tolist() == expected and not any(chosen.finish)


def test_logprobs_are_the_models_own():
    # Given masks, penalties and filters, which change the token but not the logprobs
    asked = np.array([True, False, True, False])
    mask = ALL.copy()
    mask[2] = [1 << 6, 0]
    counts = jnp.asarray(np.stack([occurred((), [int(LOGITS[0].argmax())] * 99, WORDS)] * ROWS))
    settings = [Sampling(frequency_penalty=2.0), Sampling(), Sampling(0.5, top_k=2), Sampling()]
    chosen = run(LOGITS, batch(settings, mask=mask, counts=counts, logprobs=asked), 1)
    probabilities = np.exp(LOGITS.astype(np.float64))
    want = np.log(probabilities / probabilities.sum(-1, keepdims=True))
    assert chosen.tokens[2] == 6 and chosen.tokens[0] != LOGITS[0].argmax()
    for row in np.flatnonzero(asked):
        order = np.argsort(-LOGITS[row], kind="stable")[:MOST_LOGPROBS]
        np.testing.assert_allclose(chosen.logprobs.chosen[row], want[row, chosen.tokens[row]], rtol=1e-5)
        np.testing.assert_array_equal(chosen.logprobs.top_tokens[row], order)
        np.testing.assert_allclose(chosen.logprobs.top[row], want[row, order], rtol=1e-5)


def test_rows_that_choose_nothing_ask_for_nothing():
    # Given a row that asks for everything, and chooses nothing: what a slot's last request left behind
    everything = Sampling(1.0, top_k=5, top_p=0.5, presence_penalty=1.0)
    stale = batch(
        [everything, *[Sampling()] * 3],
        logprobs=np.array([True, False, False, False]),
        choosing=np.array([False, True, True, True]),
    )
    found = run(LOGITS, stale, 1)
    assert found.tokens.tolist() == LOGITS.argmax(-1).tolist()
    assert not any(np.asarray(array).any() for array in found.logprobs)
    # Then all that is outside branches is the argmax, the finish, and which branches to take
    outside = {eqn.primitive.name for eqn in jax.make_jaxpr(choose)(LOGITS, stale).jaxpr.eqns}
    assert not outside & {"sort", "top_k", "scan", "while", "exp", "log", "random_bits"} and "cond" in outside


def test_a_row_that_is_not_finite_is_told_whatever_is_asked():
    logits = LOGITS.copy()
    logits[1, 3] = np.nan
    settings = [Sampling(1.0, top_k=3, top_p=0.5, frequency_penalty=1.0)] * ROWS
    finish = run(logits, batch(settings, logprobs=np.ones(ROWS, bool)), 1).finish.tolist()
    assert finish == [Finish.NOT_YET, Finish.NOT_FINITE, Finish.NOT_YET, Finish.NOT_YET]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5, expected between -2 and 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected between 0.01 and 100"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
    ],
)
def test_penalties_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
