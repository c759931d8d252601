"""Says which drafted tokens a sequence goes on with: those that steps of one token each would have chosen.

A draw depends on the seed and the position alone, so each position is drawn as it would be without drafts, and a draft
is taken where it is the token drawn. A draft x, which does not depend on the draw, is then taken with the probability
p(x) that its target gives it, and a token drawn in its place is distributed as p without x. That is the lossless rule
of speculative sampling (arXiv 2211.17192) for drafters that draw nothing, as ours, and the tokens are the very ones of
steps without drafts.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kimi_jax.axes import Int32, Logits
from kimi_jax.runtime.batch import Batch, Chosen, Finish
from kimi_jax.runtime.choose import choose, finish_of, without
from kimi_jax.runtime.draw import sample
from kimi_jax.runtime.sampling import SamplingRows


class Verified(NamedTuple):
    """A verification's result: of each sequence's `tokens` the first `counts` are chosen, 0 where it chooses nothing;
    `chosen` has the last of them, and its `Finish`."""

    tokens: Int32[jax.Array, "b t"]
    counts: Int32[jax.Array, "b"]
    chosen: Chosen


def verify(logits: Logits, batch: Batch, data: int = 1) -> Verified:
    """Chooses each sequence's next tokens from the logits after its own token and after each draft, up to the first
    that is no draft's. A sequence with drafts has no penalties, mask and logprobs, which depend on the tokens before.
    """
    rows, columns, words = logits.shape
    positions, drafts = jnp.asarray(batch.positions), jnp.asarray(batch.tokens)[:, 1:]
    first = choose(logits[:, 0], dataclasses.replace(batch, positions=positions[:, :1]), data)

    later, following = logits[:, 1:].reshape(-1, words), positions[:, 1:]
    each = SamplingRows(*(jnp.repeat(jnp.asarray(values), columns - 1, axis=0) for values in batch.sampling))
    # Padding draws nothing, and where all rows are greedy nothing is drawn
    each = each._replace(temperature=jnp.where(following.reshape(-1) >= 0, each.temperature, 0))
    allowed = later
    if (banned := batch.banned) is not None:
        every = jnp.repeat(jnp.asarray(banned), columns - 1, axis=0)
        allowed = jax.lax.cond(jnp.any(every >= 0), lambda: without(later, every), lambda: later)
    drawn = sample(allowed, each, following.reshape(-1) + 1).reshape(rows, -1)
    finite = jnp.isfinite(later).all(axis=-1).reshape(rows, -1)
    finish = finish_of(drawn, following, finite, batch)

    tokens = jnp.concatenate([first.tokens[:, None], drawn], axis=1)
    finish = jnp.concatenate([first.finish[:, None], finish], axis=1)
    right = (tokens[:, :-1] == drafts) & (finish[:, :-1] == Finish.NOT_YET) & (following >= 0)
    chooses = jnp.asarray(batch.choosing)
    if batch.previous is not None:
        chooses &= batch.previous.finish == Finish.NOT_YET
    counts = jnp.where(chooses, 1 + jnp.cumprod(right.astype(jnp.int32), axis=1).sum(axis=1), 0)
    last = jnp.maximum(counts - 1, 0)[:, None]
    token, end = (jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (tokens, finish))
    return Verified(tokens, counts, Chosen(token, end, first.logprobs))
