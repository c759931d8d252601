"""Choosing the next token: greedy, or drawn after temperature, top-k, top-p (nucleus sampling, arXiv 1904.09751) and
min-p (arXiv 2407.01082)."""

import dataclasses

import jax
import jax.numpy as jnp

from kimi_jax.axes import Int32, LastLogits


@dataclasses.dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy. The filters apply in the order of the fields: the `top_k` most likely tokens (0: all),
    then the fewest whose probabilities reach `top_p`, then those with at least `min_p` of the best one's probability.

    Raises ValueError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")


def filtered(logits: LastLogits, sampling: Sampling) -> tuple[LastLogits, Int32[jax.Array, "b w"]]:
    """Logits over the temperature, best first, -inf where a filter drops them; and the tokens they belong to."""
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    if sampling.top_k:
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    if sampling.min_p > 0:
        ranked = jnp.where(ranked >= ranked[:, :1] + jnp.log(sampling.min_p), ranked, -jnp.inf)
    return ranked, order


def sample(logits: LastLogits, keys: jax.Array, sampling: Sampling) -> Int32[jax.Array, "b"]:
    """One token per row; `keys` one random key per row, so that a row's draw does not depend on its neighbours."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    ranked, order = filtered(logits, sampling)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
