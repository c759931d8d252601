"""Rows computed where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding import everywhere, make_mesh, over_rows, using


def add_pages(shift, rows, shard):
    """Each row's number times its pages' sum, plus shift; says where its part began."""
    numbers, pages = rows
    per_row = pages.shape[0] // numbers.shape[0]
    sums = pages.reshape(numbers.shape[0], per_row, -1).sum((1, 2))
    return numbers * sums + shift, jnp.full_like(numbers, shard)


@pytest.mark.parametrize(
    ("shape", "parts"), [("2x4", [0, 0, 1, 1]), ("4x2", [0, 1, 2, 3]), ("8x1", [0] * 4), ("1x8", [0] * 4)]
)
def test_each_part_of_the_rows_meets_its_own_pages(shape, parts):
    # Given four rows of two pages each
    numbers, pages = np.arange(1.0, 5.0, dtype=np.float32), np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    mesh = make_mesh(shape)

    @jax.jit
    def run(shift, rows):
        with using(mesh.abstract_mesh):
            return over_rows(add_pages, shift, rows)

    # When they lie on a mesh (eight data shards do not divide four rows: all compute all)
    place = NamedSharding(mesh, PartitionSpec("data" if shape != "8x1" else None))
    shift = jax.device_put(jnp.float32(0.5), NamedSharding(mesh, PartitionSpec()))
    found, shards = run(shift, jax.device_put((numbers, pages), place))

    # Then each row has the sum of its pages, computed by the part that holds it
    np.testing.assert_array_equal(found, numbers * pages.reshape(4, 6).sum(1) + 0.5)
    np.testing.assert_array_equal(shards, parts)


def test_without_a_mesh_or_on_one_device_nothing_is_split():
    rows = (jnp.ones(2), jnp.ones((4, 3)))
    found, shards = over_rows(add_pages, 0.0, rows)
    np.testing.assert_array_equal(found, [6.0, 6.0])
    np.testing.assert_array_equal(shards, [0, 0])
    assert everywhere(lambda a, b: a + b, 1, 2) == 3


def test_everywhere_every_device_computes_the_same():
    mesh = make_mesh("2x4")

    @jax.jit
    def run(a, b):
        with using(mesh.abstract_mesh):
            return everywhere(lambda a, b: a @ b, a, b)

    everything = NamedSharding(mesh, PartitionSpec())
    a, b = (jax.device_put(np.arange(9.0, dtype=np.float32).reshape(3, 3), everything) for _ in range(2))
    text = run.lower(a, b).compile().as_text()
    assert not any(f" {name}(" in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    np.testing.assert_array_equal(run(a, b), np.asarray(a) @ np.asarray(b))
