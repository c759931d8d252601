"""Draws tokens in proportion to the weights that temperature, top-k, top-p and min-p leave, and sorts no vocabulary.

A filter keeps the most likely tokens whose weights add up to a target. The least likely of them is found bit by bit: a
masked sum for each of the 32 bits of a float's place among all floats. On a mesh such a sum is one number for each row
and device, so that logits whose words are sharded stay where they are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kimi_jax.axes import AnyArray, Array, Bool, Float32, Int32, LastLogits, UInt32
from kimi_jax.runtime.sampling import SamplingRows


def sample(logits: LastLogits, rows: SamplingRows, positions: Int32[Array, "b"]) -> Int32[jax.Array, "b"]:
    """Chooses a token for each row, the one at `positions` of its sequence.

    A draw's key is made of the row's seed and this position, so it depends neither on the row's place in a batch nor on
    other rows. Where all rows are greedy nothing else is computed than the best token.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        weights = filtered_weights(logits, rows)
        keys = jax.random.wrap_key_data(jnp.asarray(rows.seeds), impl="threefry2x32")
        keys = jax.vmap(jax.random.fold_in)(keys, positions)
        draws = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys)
        token = index_of(weights, draws * weights.sum(axis=-1))
        return jnp.where(rows.temperature > 0, token, greedy)

    return jax.lax.cond(jnp.any(rows.temperature > 0), drawn, lambda: greedy)


def filtered_weights(logits: LastLogits, rows: SamplingRows) -> Float32[jax.Array, "b w"]:
    """Returns each token's probability as a multiple of the best one's, 0 where a filter drops it. Of equally likely
    tokens a filter keeps those with lower ids."""
    temperature, min_p = rows.temperature, jnp.asarray(rows.min_p)
    top_k, top_p = jnp.where(temperature > 0, rows.top_k, 0), jnp.where(temperature > 0, rows.top_p, 1)
    # The best logit is subtracted first, so that no temperature, however small, makes it infinite
    shifted = logits - logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(shifted / jnp.where(temperature > 0, temperature, 1)[:, None])
    places = float_places(logits)

    def best_k() -> jax.Array:
        count = jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)
        return jnp.where(most_likely(places, jnp.ones_like(logits), count), weights, 0)

    weights = jax.lax.cond(jnp.any(top_k > 0), best_k, lambda: weights)

    def nucleus() -> jax.Array:
        target = jnp.where(top_p < 1, top_p * weights.sum(axis=-1), jnp.inf)
        return jnp.where(most_likely(places, weights, target), weights, 0)

    weights = jax.lax.cond(jnp.any(top_p < 1), nucleus, lambda: weights)
    return jnp.where(weights >= min_p[:, None], weights, 0)


def most_likely(
    places: UInt32[Array, "b w"], weights: Float32[Array, "b w"], target: Float32[Array, "b"]
) -> Bool[jax.Array, "b w"]:
    """Marks the fewest tokens, from the last of `places` down, whose weights add up to `target`; all where they do not.

    Tokens of one place have one weight; those with lower ids are taken first.
    """
    least = bisect(32, lambda place: _masked_sum(weights, places >= place[:, None]) >= target, len(places))
    above, equal = places > least[:, None], places == least[:, None]
    each = jnp.where(equal, weights, 0).max(axis=-1)
    wanted = jnp.ceil((target - _masked_sum(weights, above)) / each)
    ones = jnp.where(equal, 1.0, 0.0)

    def lowest_ids() -> jax.Array:
        index = jnp.arange(places.shape[1], dtype=jnp.uint32)
        last = bisect(_bits(places), lambda i: _masked_sum(ones, index < i[:, None]) < wanted, len(places))
        return above | (equal & (index <= last[:, None]))

    return jax.lax.cond(jnp.any(ones.sum(axis=-1) > wanted), lowest_ids, lambda: above | equal)


def index_of(weights: Float32[Array, "b w"], target: Float32[Array, "b"]) -> Int32[jax.Array, "b"]:
    """Returns the first token up to which weights add up to more than `target`, which is less than their sum: a token
    whose weight is not 0."""
    index = jnp.arange(weights.shape[1], dtype=jnp.uint32)
    found = bisect(_bits(weights), lambda i: _masked_sum(weights, index < i[:, None]) <= target, len(weights))
    # Where rounding brings the target up to the sum
    last = jnp.where(weights > 0, index, 0).max(axis=-1)
    return jnp.minimum(found, last).astype(jnp.int32)


def float_places(x: Float32[Array, "b w"]) -> UInt32[jax.Array, "b w"]:
    """Returns integers that are ordered and equal as the floats are."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # (-0 is 0)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def bisect(bits: int, holds: Callable[[jax.Array], AnyArray], rows: int) -> UInt32[jax.Array, "rows"]:
    """Returns for each row the largest number below `2**bits` for which `holds` [rows], asked with a number for each
    row, is true. It must be true up to there and false from there on; 0 is not asked."""

    def set_bit(number: jax.Array, bit: jax.Array) -> tuple[jax.Array, None]:
        larger = number | (jnp.uint32(1) << bit)
        return jnp.where(holds(larger), larger, number), None

    return jax.lax.scan(set_bit, jnp.zeros(rows, jnp.uint32), jnp.arange(bits, dtype=jnp.uint32)[::-1])[0]


def _bits(array: Array) -> int:
    return (array.shape[1] - 1).bit_length()


def _masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, values, 0).sum(axis=-1)
