"""Sizes of pools in bytes of a device: of a page, of a slot, and of all that fits into some memory.

The engine allocates by these numbers, and the planner counts by them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from kimi_jax.config import KimiConfig
from kimi_jax.model.context import PAGE, KDAState, MLACache
from kimi_jax.runtime.cache import empty, specs
from sharding import Partition

# Of the memory that a device has left beside the weights; the rest is for what a step computes with.
HEADROOM = 0.6
# Of a cache's memory, for copies of recurrent states.
SNAPSHOT_SHARE = 0.1
FEWEST_PLACES = 4  # copies of a data shard: a system prompt's, and of some conversations


class PoolBytes(NamedTuple):
    """Bytes of one page and of one slot on each device that has it; 0 where a model has none. A place for a copy of
    recurrent states takes as much as a slot."""

    page: int
    slot: int


@functools.cache
def layer_bytes(config: KimiConfig, dtype: jnp.dtype, partition: Partition) -> PoolBytes:
    """Computes the bytes of a page and of a slot in one layer that has them.

    Raises ValueError where the mesh does not divide the recurrent heads.
    """
    pages, slots = partition.num_shards("pages"), partition.num_shards("batch")
    shapes = jax.eval_shape(functools.partial(empty, config, pages, slots, dtype))

    def nbytes(array: jax.ShapeDtypeStruct, spec: Any) -> int:
        return partition.local_size(array.shape, spec) * array.dtype.itemsize

    sized = jax.tree.map(nbytes, shapes, specs(shapes, partition))
    of_kind = {type(layer): sum(layer) for layer in sized.layers}
    return PoolBytes(of_kind.get(MLACache, 0), of_kind.get(KDAState, 0))


def pool_bytes(config: KimiConfig, dtype: jnp.dtype, partition: Partition) -> PoolBytes:
    """Computes the bytes of a page and of a slot in all layers together. Raises `layer_bytes`' errors."""
    each, kinds = layer_bytes(config, dtype, partition), config.text.layer_kinds
    return PoolBytes(each.page * kinds.count("mla"), each.slot * kinds.count("kda"))


def cache_bytes(config: KimiConfig, pages: int, slots: int, dtype: jnp.dtype, partition: Partition) -> int:
    """Computes the bytes on each device of a cache of `pages` and `slots` over all devices. Raises `layer_bytes`'
    errors."""
    each = pool_bytes(config, dtype, partition)
    return pages // partition.num_shards("pages") * each.page + slots // partition.num_shards("batch") * each.slot


def pages_within(
    config: KimiConfig,
    nbytes: int,
    slots: int,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | AbstractMesh | None = None,
    head_page: int = 0,
) -> int:
    """Returns how many pages, over all devices, a cache of `slots` slots can have within `nbytes` of each device, where
    a draft head has `head_page` bytes in each page.

    Raises ValueError where not even one page on every device fits.
    """
    partition = Partition(mesh)
    parts, page = partition.num_shards("pages"), pool_bytes(config, jnp.dtype(dtype), partition).page + head_page
    fixed = cache_bytes(config, 0, slots, jnp.dtype(dtype), partition)
    count = (nbytes - fixed) // page if page else 0
    if count < 1:
        raise ValueError(
            f"a cache of {nbytes:,} bytes on each device: {slots} slots and one page take {fixed + page:,}"
        )
    return count * parts


@dataclasses.dataclass(frozen=True)
class Pools:
    """An engine's pools over all devices, `places` being those for copies of recurrent states. `nbytes` are what they
    take of each device, `longest` the tokens of the longest sequence."""

    pages: int
    slots: int
    places: int
    nbytes: int
    longest: int


def pools_within(
    config: KimiConfig,
    memory: int,
    slots: int,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | AbstractMesh | None = None,
    longest: int | None = None,
    head_page: int = 0,
) -> Pools:
    """Returns the pools of an engine of `slots` sequences, of `longest` tokens each (None: the model's longest) or as
    many as one data shard has pages for, within `memory` bytes of each device; `head_page` is that of `pages_within`.

    Raises ValueError where the mesh's data axis does not divide `slots`, or the memory holds no page beside them.
    """
    partition, text, dtype = Partition(mesh), config.text, jnp.dtype(dtype)
    data, parts = partition.num_shards("batch"), partition.num_shards("pages")
    if slots < 1 or slots % data:
        raise ValueError(f"slots is {slots}, expected a multiple of the data axis, {data}")
    longest = min(longest or text.max_position_embeddings, text.max_position_embeddings)
    slot = pool_bytes(config, dtype, partition).slot
    places = 0
    if slot:
        places = max(FEWEST_PLACES, min(int(memory * SNAPSHOT_SHARE) // slot, slots * 16))
    pages = parts
    if "mla" in text.layer_kinds:
        pages = pages_within(config, memory - places * slot, slots, dtype, mesh, head_page)
        pages = min(pages, slots * row_pages(longest, partition))
        longest = min(longest, pages // data * PAGE)
    nbytes = cache_bytes(config, pages, slots + places * data, dtype, partition) + pages // parts * head_page
    return Pools(pages, slots, places * data, nbytes, longest)


def row_pages(tokens: int, partition: Partition) -> int:
    """Returns the pages of a sequence of `tokens` tokens, over the shards of a row's pages: as many on each."""
    shards = partition.num_shards("row_pages")
    return -(-tokens // (PAGE * shards)) * shards
