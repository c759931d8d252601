"""Microbatches: sums and largest values over parts of a step's rows, with gradients sharded as the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax.model.statistics import Statistics
from kimi_jax.training import Rows
from kimi_jax.training.microbatches import accumulate
from sharding import TRAIN, Partition, make_mesh

TOKENS = np.random.RandomState(0).randint(0, 100, (8, 16)).astype(np.int32)


def compute(rows):
    """Returns what a model might return of its rows, each a sum or a largest value over rows."""
    total = jnp.sum(rows.tokens).astype(jnp.float32)
    weight = nnx.Param(jnp.full((32, 64), total), axes=("mlp", "embed"), full_shape=(32, 64))
    columns = jnp.sum(rows.tokens, axis=0)
    return nnx.State({"weight": weight}), (total,), Statistics(columns[None], -columns[None].astype(jnp.float32))


@pytest.mark.parametrize("count", [1, 2, 8])
def test_parts_make_the_whole(count):
    mesh = make_mesh("2x2x2x1")
    partition = Partition(mesh, TRAIN)
    rows = jax.device_put(Rows.whole(TOKENS), NamedSharding(mesh, PartitionSpec("data")))
    gradients, (total,), seen = jax.jit(lambda rows: accumulate(compute, rows, count, partition))(rows)
    assert float(total) == TOKENS.sum()
    np.testing.assert_array_equal(gradients["weight"][...], np.full((32, 64), TOKENS.sum()))
    np.testing.assert_array_equal(seen.expert_counts, TOKENS.sum(axis=0, keepdims=True))
    # Part i has rows i, i + count, ...
    parts = TOKENS.reshape(-1, count, 16).sum(axis=0)
    np.testing.assert_array_equal(seen.max_logits, -parts.min(axis=0, keepdims=True))
    if count > 1:
        assert gradients["weight"][...].sharding.shard_shape((32, 64)) == (8, 32)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="8 rows do not divide into 3 microbatches"):
        accumulate(compute, Rows.whole(TOKENS), 3)
