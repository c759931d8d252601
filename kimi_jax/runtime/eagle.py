"""Runs an Eagle3 head beside its target: a step that takes in what the target has verified, and drafts what follows.

The head caches a vector of each token, in pages like those of the target's layers, so that one page table serves both.
What it caches of its own drafts is not what it would cache of them once the target has been there; the next step
writes over it. Nothing is rolled back: a step's positions say how much is valid.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from kimi_jax.axes import AnyArray, Float, Int32, PageTable, Positions, Tokens
from kimi_jax.config import EagleConfig
from kimi_jax.config_json import fit_target
from kimi_jax.model.context import PAGE, Context, MLACache, Phase
from kimi_jax.model.eagle import EagleHead, check_head
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.param import weight_specs
from kimi_jax.runtime.batch import MOST_VERIFIED
from kimi_jax.runtime.placement import as_returned, compiler_options, is_on_cpu
from sharding import Partition, StreamLayout


class EagleDrafter:
    """Drafts tokens of one target with a head. Every cache given to a method is donated: keep the one it returns.

    `aux_layers` are the target's layers, counted from 0, whose outputs `Kimi.extend_with_aux` has to give out.
    """

    def __init__(self, head: EagleHead, target: Kimi):
        """Shares the target's embeddings where the head has none.

        Raises ConfigError for a head that was made for another target, and ValueError where the mesh does not divide
        its heads of keys and values.
        """
        self.config = fit_target(head.config, target.config)
        assert self.config.aux_layers is not None
        self.aux_layers = self.config.aux_layers
        whole = nnx.merge(*nnx.split(head))  # a tree of its own, with the same arrays
        if whole.embed_tokens is None:
            whole.embed_tokens = nnx.data(target.model.embed_tokens)
        graph, params = nnx.split(whole)
        self.arrays, tree = jax.tree.flatten(params)
        self.dtype, self.placement = head.dtype, head.fc.weight.get_value().sharding
        mesh = self.placement.mesh if isinstance(self.placement, NamedSharding) else None
        unroll = not is_on_cpu(self.placement)
        self.jitted = _jitted(graph, tree, mesh, self.config.form, unroll, compiler_options(self.placement))
        check_head(self.config, self.jitted.partition)

    def cache(self, pages: int) -> MLACache:
        """Allocates an empty cache of `pages` pages, as many as the target's cache has."""
        shape = self.cache_shapes(pages).pages
        return MLACache(jnp.zeros(shape.shape, shape.dtype, device=shape.sharding))

    def cache_shapes(self, pages: int) -> Any:
        """Returns the shape, dtype and sharding of what `cache` allocates."""
        shape, placement = (pages, self.config.cache_width, PAGE), self.placement
        if isinstance(placement, NamedSharding):
            placement = NamedSharding(placement.mesh, as_returned(self.jitted.cache_spec(shape)))
        shapes: Any = jax.ShapeDtypeStruct(shape, self.dtype, sharding=placement)
        return MLACache(shapes)

    @property
    def page_bytes(self) -> int:
        """The bytes of a page of the cache on each device that has it."""
        return page_bytes(self.config, self.dtype, self.jitted.partition)

    def extend(
        self,
        cache: MLACache,
        aux: Float[AnyArray, "b t n"],
        tokens: Int32[AnyArray, "b t"],
        positions: Int32[AnyArray, "b t"],
        page_table: Int32[AnyArray, "b row_pages"],
    ) -> MLACache:
        """Takes in a chunk of prompts, and returns the cache with it. The arguments are those of `propose`."""
        self._check(tokens, page_table)
        return self.jitted.extend(self.arrays, cache, aux, tokens, positions, page_table)

    def propose(
        self,
        cache: MLACache,
        aux: Float[AnyArray, "b t n"],
        tokens: Int32[AnyArray, "b t"],
        positions: Int32[AnyArray, "b t"],
        page_table: Int32[AnyArray, "b row_pages"],
        count: int,
    ) -> tuple[MLACache, Int32[jax.Array, "b count"]]:
        """Takes in the tokens that the target has verified, and drafts the `count` tokens after them greedily.

        aux: [b, t, n * d], the target's outputs of `aux_layers` at `positions`.
        tokens: [b, t], the token *after* each position, the last of which the target has just chosen.
        positions: [b, t], -1 for padding, which is last in a row.
        page_table: [b, row_pages], with room for `count` - 1 tokens after each row's last position.

        Returns the cache, and the drafts as ids of the target's, int32 [b, count], -1 for a row of padding. A program
        is compiled for each combination of shapes and `count`. Raises ValueError for a `count` below 1, and for rows
        and pages that the mesh does not divide.
        """
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1 token to draft")
        self._check(tokens, page_table)
        return self.jitted.propose(self.arrays, cache, aux, tokens, positions, page_table, count)

    def _check(self, tokens: AnyArray, page_table: AnyArray) -> None:
        for what, size, axis in (("rows", len(tokens), "batch"), ("pages a row", page_table.shape[1], "row_pages")):
            if size % (shards := self.jitted.partition.num_shards(axis)):
                raise ValueError(f"draft head: {size} {what} do not divide over {shards} devices")


class HeadProgram:
    """Runs all heads of one structure, one object for each: `jit` compares identities. `extend` and `propose` are
    jitted; `take_in` and `draft`, which they are, are also called inside the target's steps. `unroll` writes each draft
    out: a compiler then fetches a draft's weights while the one before is computed, for which a loop has no place. On a
    CPU that would gain nothing, and compile for longer."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        tree: jax.tree_util.PyTreeDef,
        mesh: Mesh | AbstractMesh | None,
        form: str,
        unroll: bool,
        compiler_options: tuple[tuple[str, int], ...],
    ):
        self.graph, self.tree, self.partition, self.form, self.unroll = graph, tree, Partition(mesh), form, unroll
        options: Any = {"donate_argnames": "cache", "compiler_options": dict(compiler_options)}
        self.extend: Any = jax.jit(self.take_in, **options)
        self.propose: Any = jax.jit(self.draft, static_argnames="count", **options)

    def cache_spec(self, shape: tuple[int, ...]) -> Any:
        """Returns the PartitionSpec of the cache."""
        return _cache_spec(self.form, shape, self.partition)

    def run(
        self,
        params: Any,
        cache: MLACache,
        vectors: Float[jax.Array, "b t n"],
        tokens: Tokens,
        positions: Positions,
        page_table: PageTable,
        phase: Phase,
        combines: bool,
        segments: Positions | None = None,
    ) -> tuple[MLACache, jax.Array, jax.Array]:
        """Runs the head on the target's outputs (`combines`) or on vectors of its own. Returns the cache, and of each
        row's last token the logits [b, words] and the vector for the next draft [b, d]; with `segments`, packed rows
        as in `Context`, those of a row's last token are of no use."""
        partition = self.partition
        layout = StreamLayout(partition, partition.axis_names("batch", len(tokens)))

        def on_device(params: Any, cache: Any, vectors: Any, tokens: Any, positions: Any, table: Any, own: Any) -> Any:
            head = nnx.merge(self.graph, params)
            hidden = head.combine(vectors, partition) if combines else vectors
            context = Context(positions, table, segments=own, phase=phase)
            normed, following, cache = head(hidden, tokens, context, cache, layout)
            last = dataclasses.replace(context, segments=None).last()
            return cache, head.logits(layout.take_token(normed, last)), layout.take_token(following, last)

        rows, pages = layout.row_spec(), MLACache(self.cache_spec(cache.pages.shape))
        in_specs = (weight_specs(params, partition), pages, rows, rows, rows, layout.row_spec("row_pages"), rows)
        compute = partition.shard_map(on_device, in_specs, (pages, layout.row_spec("vocab"), rows))
        return compute(params, cache, vectors, tokens, positions, page_table, segments)

    def take_in(
        self,
        arrays: list[jax.Array],
        cache: MLACache,
        aux: Any,
        tokens: Any,
        positions: Any,
        page_table: Any,
        segments: Any = None,
    ) -> MLACache:
        """Returns the cache with the tokens in it. Their rows may be packed, with `segments` as in `Context`."""
        params = jax.tree.unflatten(self.tree, arrays)
        return self.run(params, cache, aux, tokens, positions, page_table, "prefill", True, segments)[0]

    def draft(
        self,
        arrays: list[jax.Array],
        cache: MLACache,
        aux: Any,
        tokens: Any,
        positions: Any,
        page_table: Any,
        count: int,
        room: Any = None,
    ) -> tuple[MLACache, jax.Array]:
        """Returns the cache with the tokens in it, and the drafts. `room`, int32 [b], is the number of tokens that each
        row's pages hold, None where they hold all drafts: those that would be drafted of more are -1, and so are those
        of a row of padding."""
        params = jax.tree.unflatten(self.tree, arrays)
        head = nnx.merge(self.graph, params)

        def choose(logits: jax.Array) -> jax.Array:
            return head.target_ids(jnp.argmax(logits, axis=-1).astype(jnp.int32))

        def next_draft(carry: Any, _: None) -> Any:
            cache, token, vector, position = carry
            fits = (position >= 0) if room is None else (position >= 0) & (position + 1 < room)
            position = jnp.where(fits, position + 1, -1)
            inputs = vector[:, None], token[:, None], position[:, None]
            cache, logits, vector = self.run(params, cache, *inputs, page_table, "decode", False)
            token = jnp.where(fits, choose(logits), -1)
            return (cache, token, vector, position), token

        phase: Phase = "decode" if tokens.shape[1] == 1 else "verify" if tokens.shape[1] <= MOST_VERIFIED else "prefill"
        cache, logits, vector = self.run(params, cache, aux, tokens, positions, page_table, phase, True)
        last = jnp.max(positions, axis=-1)
        first = jnp.where(last >= 0, choose(logits), -1)
        start: Any = (cache, first, vector, last)
        (cache, *_), rest = jax.lax.scan(next_draft, start, None, length=count - 1, unroll=self.unroll)
        return cache, jnp.concatenate([first[None], rest]).T


def page_bytes(config: EagleConfig, dtype: jnp.dtype, partition: Partition) -> int:
    """Computes the bytes of a page of a head's cache on each device that has it."""
    shape = (partition.num_shards("pages"), config.cache_width, PAGE)
    return partition.local_size(shape, _cache_spec(config.form, shape, partition)) * dtype.itemsize


def _cache_spec(form: str, shape: tuple[int, ...], partition: Partition) -> Any:
    """Returns the PartitionSpec of a cache: keys and values are sharded by their heads, latents are not."""
    return partition.spec(("pages", "heads" if form == "llama" else None, None), shape)


_jitted = functools.lru_cache(maxsize=16)(HeadProgram)
