"""Expert parallelism: every device multiplies the tokens of all by the experts that it holds.

Nothing is sent before the experts but the tokens, and no token can be dropped; the sum of partial results is the only
other message. Weights never move.
"""

import jax
from jaxtyping import Array

from sharding.collectives import index, split
from sharding.rules import WEIGHTS, divided


def first_expert(held: int, experts: int) -> Array | int:
    """The number of the first of the `held` experts that this device has of `experts`."""
    names, _ = divided(list(split(WEIGHTS["expert"])), experts, jax.sharding.get_abstract_mesh())
    return held * index(tuple(names))
