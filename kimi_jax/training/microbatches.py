"""Gradients of a batch in parts, one after another, where the activations of all its rows do not fit at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from kimi_jax.model.param import weight_specs
from kimi_jax.model.statistics import Statistics
from kimi_jax.training.rows import Rows
from sharding import SINGLE_DEVICE, Partition


def accumulate(
    compute: Callable[[Rows], tuple[Any, Any, Statistics]],
    rows: Rows,
    count: int,
    partition: Partition = SINGLE_DEVICE,
) -> tuple[Any, Any, Statistics]:
    """Adds up the gradients and sums that `compute` returns of each of `count` microbatches of the rows.

    Of statistics, counts are added, and the largest logits taken. Microbatch i has rows i, i + count, ..., so that
    rows that are sharded stay where they are. Gradients are sharded as the weights are, `partition` says how.

    Raises:
      ValueError: the rows do not divide into so many.
    """
    if count == 1:
        return compute(rows)
    if len(rows.tokens) % count:
        raise ValueError(f"{len(rows.tokens)} rows do not divide into {count} microbatches")
    parts = jax.tree.map(lambda x: jnp.swapaxes(jnp.reshape(x, (-1, count, *x.shape[1:])), 0, 1), rows)

    def add(total: Any, part: Rows) -> tuple[Any, None]:
        gradients, sums, seen = compute(part)
        added = jax.tree.map(jnp.add, total[:2], (_placed(gradients, partition), sums))
        counts = total[2].expert_counts + seen.expert_counts
        return (*added, Statistics(counts, jnp.maximum(total[2].max_logits, seen.max_logits))), None

    shapes = jax.eval_shape(compute, jax.tree.map(lambda x: x[0], parts))
    gradients, sums, seen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    nothing = Statistics(seen.expert_counts, jnp.full_like(seen.max_logits, -jnp.inf))
    return lax.scan(add, (_placed(gradients, partition), sums, nothing), parts)[0]


def _placed(gradients: Any, partition: Partition) -> Any:
    """Returns gradients sharded as the weights that they are of."""
    if partition.mesh is None or partition.devices == 1:
        return gradients
    mesh, specs = partition.mesh, weight_specs(gradients, partition)
    return jax.tree.map(lambda x, spec: lax.with_sharding_constraint(x, NamedSharding(mesh, spec)), gradients, specs)
