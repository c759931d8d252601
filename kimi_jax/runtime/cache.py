"""Allocates the pools of device memory that decoding carries from step to step: pages of latents, slots of KDA states.

A cache does not know its owners: the host says in each step's `Batch` which pages and which slot a sequence uses. It
is a pytree, donated to each step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kimi_jax.axes import Array, Int32
from kimi_jax.config import KimiConfig, TextConfig
from kimi_jax.model.context import PAGE, KDAState, LayerCache, MLACache, cache_specs
from sharding import Partition


class Cache(NamedTuple):
    """Holds each layer's pool: `MLACache` [pages, channels, PAGE], or `KDAState` [slots, ...]. All MLA layers have the
    same number of pages and all KDA layers of slots, so one page table and one slot serve a sequence in every layer.
    `head` is the pool of a draft head, with as many pages; None without one."""

    layers: tuple[LayerCache, ...]
    head: MLACache | None = None

    @property
    def pages(self) -> int:
        """Returns the number of pages over all devices, 0 in a model without MLA layers."""
        return next((len(layer.pages) for layer in self.layers if isinstance(layer, MLACache)), 0)

    @property
    def slots(self) -> int:
        """Returns the number of slots over all devices, 0 in a model without KDA layers."""
        return next((len(layer.S) for layer in self.layers if isinstance(layer, KDAState)), 0)


def empty(config: KimiConfig, pages: int, slots: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Returns pools of zeros: `pages` of PAGE tokens and `slots` states over all devices, latents and tails in `dtype`,
    KDA states in float32."""
    return Cache(tuple(_layer(config.text, kind, pages, slots, dtype) for kind in config.text.layer_kinds))


def _layer(text: TextConfig, kind: str, pages: int, slots: int, dtype: jax.typing.DTypeLike) -> LayerCache:
    if kind == "mla":
        return MLACache(jnp.zeros((pages, text.latent_dim, PAGE), dtype))
    kda = text.linear_attn
    assert kda is not None
    tail = (slots, kda.short_conv_kernel_size - 1, 3 * kda.num_heads * kda.head_dim)
    return KDAState(jnp.zeros(tail, dtype), jnp.zeros((slots, kda.num_heads, kda.head_dim, kda.head_dim), jnp.float32))


def states_alone(cache: Cache) -> Cache:
    """Returns the cache without its pools of pages: a pool for copies of states."""
    nothing: Any = None
    return Cache(tuple(layer if isinstance(layer, KDAState) else nothing for layer in cache.layers))


def specs(cache: Cache, partition: Partition) -> Any:
    """Returns the PartitionSpec of every array of a cache's layers.

    Raises ValueError where the mesh's axes do not divide a pool.
    """
    return Cache(cache_specs(cache.layers, partition))


def copy_slots(
    cache: Cache, source: Int32[Array, "n"], target: Int32[Array, "n"], origin: Cache | None = None
) -> Cache:
    """Returns the cache with the KDA states of slots `source` of `origin` in its slots `target`.

    `origin` is another pool of the same model, or the cache itself where it is None. A negative target is dropped.
    Slots are numbered as in a device's part of a pool. A prefix that several sequences share is one state, copied.
    """

    def copied(pool: Any, other: Any) -> Any:
        if not isinstance(pool, KDAState):
            return pool
        to = jnp.where(target >= 0, target, len(pool.S))  # past the end, where the scatter drops it
        return jax.tree.map(lambda x, y: x.at[to].set(y[jnp.maximum(source, 0)], mode="drop"), pool, other)

    others = cache if origin is None else origin
    return Cache(tuple(map(copied, cache.layers, others.layers)))
