"""Chooses each sequence's next token from its logits, and computes what only some requests ask for: penalties on tokens
that occurred, masks of allowed tokens, logprobs. A step that nobody asks for them takes none of their branches."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.axes import AnyArray, Array, Bool, Float32, Int32, LastLogits, UInt32
from kimi_jax.runtime.batch import Batch, Chosen, Finish
from kimi_jax.runtime.draw import sample
from kimi_jax.runtime.sampling import NO_PENALTIES

# The most alternatives of which logprobs are computed.
MOST_LOGPROBS = 20
# In counts of tokens, is added once for a token that the prompt has; it is more than any number of tokens.
IN_PROMPT = 2**24


class Logprobs(NamedTuple):
    """Holds logarithms of probabilities of the model itself, before any filter, penalty or mask: that of the chosen
    token, and the most likely tokens with theirs, the best first. All are 0 in a step that nobody asks for them."""

    chosen: Float32[Array, "b"]
    top_tokens: Int32[Array, "b 20"]
    top: Float32[Array, "b 20"]


def choose(logits: LastLogits, batch: Batch, data: int = 1) -> Chosen:
    """Chooses each sequence's next token, and says whether it is the last. `data` is the number of data shards, by
    which `batch.slots` are numbered."""
    finite = jnp.isfinite(logits).all(axis=-1)
    # Rows that choose nothing ask for nothing, whatever was there before
    choosing, sampling = jnp.asarray(batch.choosing), batch.sampling
    sampling = sampling._replace(
        temperature=jnp.where(choosing, sampling.temperature, 0),
        penalties=jnp.where(choosing[:, None], sampling.penalties, jnp.array(NO_PENALTIES)),
    )
    token = sample(_allowed(logits, batch, sampling.penalties, data), sampling, last_positions(batch) + 1)
    finish = finish_of(token[:, None], last_positions(batch)[:, None], finite[:, None], batch)[:, 0]
    found = None if batch.logprobs is None else logprobs(logits, token, choosing & batch.logprobs)
    if batch.previous is None:
        return Chosen(token, finish, found)
    chooses = choosing & (batch.previous.finish == Finish.NOT_YET)
    tokens = jnp.where(chooses, token, batch.previous.tokens)
    return Chosen(tokens, jnp.where(chooses, finish, batch.previous.finish), found)


def finish_of(
    tokens: Int32[Array, "b t"], positions: Int32[Array, "b t"], finite: Bool[Array, "b t"], batch: Batch
) -> Int32[jax.Array, "b t"]:
    """Returns the `Finish` of each token that is chosen after the one at its position, from logits that were
    `finite`."""
    finish = jnp.where(positions + 2 >= batch.ends[:, None], Finish.LENGTH, Finish.NOT_YET)
    finish = jnp.where((tokens[:, :, None] == batch.stop_ids[:, None]).any(axis=-1), Finish.STOP, finish)
    return jnp.where(finite, finish, Finish.NOT_FINITE).astype(jnp.int32)


def last_positions(batch: Batch) -> Int32[jax.Array, "b"]:
    """Returns the position of each sequence's last token of the step."""
    columns = batch.context.last().reshape(len(batch.positions), -1)
    return jnp.take_along_axis(batch.positions, columns, axis=1).reshape(-1)


def _allowed(logits: LastLogits, batch: Batch, penalties: Float32[AnyArray, "b 3"], data: int) -> LastLogits:
    """Returns the logits after penalties, -inf where the mask forbids a token or it is banned."""
    counts, mask, banned = batch.counts, batch.mask, batch.banned
    if counts is not None:

        def lowered() -> jax.Array:
            return penalized(logits, _of_slots(counts, batch.slots, data), jnp.asarray(penalties))

        asked = jnp.any(penalties != jnp.array(NO_PENALTIES))
        logits = jax.lax.cond(asked, lowered, lambda: logits)
    if mask is not None:
        everything = jnp.uint32(2**32 - 1)
        logits = jax.lax.cond(jnp.any(mask != everything), lambda: masked(logits, mask), lambda: logits)
    if banned is not None:
        logits = jax.lax.cond(jnp.any(banned >= 0), lambda: without(logits, banned), lambda: logits)
    return logits


def masked(logits: LastLogits, mask: UInt32[Array, "b words"]) -> LastLogits:
    """Returns the logits, -inf where a token's bit in the mask is 0."""
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return jnp.where(bits.reshape(len(mask), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def without(logits: LastLogits, banned: Int32[AnyArray, "b n"]) -> LastLogits:
    """Returns the logits, -inf for each sequence's banned tokens."""
    words = jnp.arange(logits.shape[1], dtype=jnp.int32)
    return jnp.where((words == banned[:, :, None]).any(axis=1), -jnp.inf, logits)


def penalized(logits: LastLogits, counts: Int32[Array, "b w"], penalties: Float32[Array, "b 3"]) -> LastLogits:
    """Returns the logits after the penalties of `Sampling`, given counts of the tokens that occurred."""
    presence, frequency, repetition = (penalties[:, i : i + 1] for i in range(3))
    generated = (counts % IN_PROMPT).astype(jnp.float32)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts > 0, repeated, logits)
    return logits - frequency * generated - jnp.where(generated > 0, presence, 0)


def logprobs(logits: LastLogits, tokens: Int32[Array, "b"], asked: Bool[Array, "b"]) -> Logprobs:
    """Returns the logprobs of the chosen tokens and of the most likely ones, found one after another; zeros where no
    sequence asks. (`top_k` would sort, and gather logits whose words are sharded.)"""
    rows, words = logits.shape
    index = jnp.arange(words, dtype=jnp.int32)

    Best = tuple[jax.Array, jax.Array]

    def next_best(before: Best, _: None) -> tuple[Best, Best]:
        value, token = (x[:, None] for x in before)
        rest = jnp.where((logits < value) | ((logits == value) & (index > token)), logits, -jnp.inf)
        found = rest.max(axis=-1), jnp.argmax(rest, axis=-1).astype(jnp.int32)
        return found, found

    def computed() -> Logprobs:
        total = jax.nn.logsumexp(logits, axis=-1)
        first = jnp.full(rows, jnp.inf), jnp.full(rows, -1, jnp.int32)
        _, (values, best) = jax.lax.scan(next_best, first, length=MOST_LOGPROBS)
        chosen = jnp.where(index == tokens[:, None], logits, 0).sum(axis=-1)
        return Logprobs(chosen - total, best.T, values.T - total[:, None])

    zeros = jnp.zeros((rows, MOST_LOGPROBS), jnp.int32)
    return jax.lax.cond(jnp.any(asked), computed, lambda: Logprobs(jnp.zeros(rows), zeros, zeros.astype(jnp.float32)))


def count_tokens(
    counts: Int32[Array, "slots w"], tokens: Int32[Array, "slots"], counted: Bool[Array, "slots"]
) -> Int32[jax.Array, "slots w"]:
    """Returns the counts with one more of each slot's token where `counted`."""
    words = jnp.where(counted, tokens, counts.shape[1])  # past the end, where the scatter drops it
    return counts.at[jnp.arange(len(counts)), words].add(1, mode="drop")


def occurred(prompt: Sequence[int] | np.ndarray, generated: Sequence[int], words: int) -> np.ndarray:
    """Returns a slot's row of `Batch.counts`, int32 [words], for a sequence of these tokens."""
    counts = np.bincount(np.asarray(generated, np.int64), minlength=words).astype(np.int32)
    counts[np.unique(np.asarray(prompt, np.int64))] += IN_PROMPT
    return counts


def _of_slots(values: Array, slots: Int32[Array, "b"] | None, data: int) -> Array:
    """Returns the rows of `values` of each sequence's slot, as numbered in its data shard."""
    if slots is None:
        return values
    shards, local = values.reshape(data, -1, values.shape[1]), jnp.maximum(slots, 0).reshape(data, -1)
    return jax.vmap(lambda shard, at: shard[at])(shards, local).reshape(len(slots), -1)
