"""Compiles and runs steps of a model over a cache, for `generate`, the planner, tests and an engine.

A model is split once into its arrays and their structure; models of one structure share the compiled programs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from kimi_jax.axes import AnyArray, Int32, LastLogits
from kimi_jax.config import KimiConfig
from kimi_jax.model import kda
from kimi_jax.model.context import PAGE, Context, KDAState, Phase, draft_spec, read_slots, write_slots
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.param import weight_specs
from kimi_jax.runtime import cache as caches
from kimi_jax.runtime.batch import BANNED, CHOSEN_BEFORE, CHOSEN_HERE, MOST_VERIFIED, STOP_IDS, Batch, Chosen, Finish
from kimi_jax.runtime.cache import Cache
from kimi_jax.runtime.choose import choose, count_tokens
from kimi_jax.runtime.eagle import EagleDrafter, HeadProgram
from kimi_jax.runtime.placement import as_returned, compiler_options
from kimi_jax.runtime.sampling import SamplingRows
from kimi_jax.runtime.verify import Verified, verify
from sharding import REPLICATED, Partition, choose_layout


class Program:
    """Runs steps of one model. Every cache given to a step is donated: keep only the one that it returns.

    `config`, `dtype` and `mesh` are the model's. `data` must divide a batch's rows, and `sequence` the width of its
    page table. With a `drafter` each step runs its head too, whose cache is part of the steps' cache, and
    `Chosen.drafts` of decode steps and verifications are `draft_tokens` guesses of what comes next.
    """

    def __init__(self, model: Kimi, drafter: EagleDrafter | None = None, draft_tokens: int = 0):
        """Raises ValueError for a drafter whose head is on other devices than the model."""
        self.config, self.dtype = model.config, model.dtype
        self.arrays, tree = jax.tree.flatten(model)  # (in a tenth of the time that `nnx.split` takes)
        self.placement: Sharding = model.model.embed_tokens.weight.get_value().sharding
        self.mesh = self.placement.mesh if isinstance(self.placement, NamedSharding) else None
        self.drafter = drafter
        if drafter is not None and drafter.jitted.partition != Partition(self.mesh):
            raise ValueError("the draft head is on other devices than its target; load it with the same mesh")
        head = () if drafter is None else (drafter.jitted, drafter.aux_layers, draft_tokens)
        self.head_arrays = None if drafter is None else drafter.arrays
        self.jitted = _jitted(tree, self.mesh, compiler_options(self.placement), *head)
        shape = {"data": 1, "sequence": 1} if self.mesh is None else self.mesh.shape
        self.data, self.sequence = shape["data"], shape["sequence"]

    def step(self, cache: Cache, batch: Batch) -> tuple[Cache, Chosen]:
        """Runs the batch's tokens and chooses the next ones. Returns the cache, and tokens and `Finish`, int32 [b]
        each, on every device. A sequence that chooses nothing, or is finished, keeps its values of `batch.previous`.
        The next step takes `Chosen.plain`."""
        self.check(batch)
        return self.jitted.step(self.arrays, cache, batch, self.head_arrays)

    def verify(self, cache: Cache, batch: Batch) -> tuple[Cache, Verified]:
        """Runs each sequence's token and the drafts after it (`Batch.verification`), and takes in those that are what
        steps of one token would have chosen. Returns the cache as those steps would leave it, and `Verified`."""
        self.check(batch)
        return self.jitted.verify(self.arrays, cache, batch, self.head_arrays)

    def logits(self, cache: Cache, batch: Batch) -> tuple[Cache, LastLogits]:
        """Runs the batch's tokens. Returns the cache, and float32 logits [b, vocab_size] after each sequence's last
        token, which mean nothing for a sequence without tokens."""
        self.check(batch)
        return self.jitted.logits(self.arrays, cache, batch)

    def copy_slots(
        self, cache: Cache, source: Int32[AnyArray, "n"], target: Int32[AnyArray, "n"], origin: Cache | None = None
    ) -> Cache:
        """Calls `cache.copy_slots` on every device: on a mesh the numbers are split over `data`, a part for each part
        of the pool. `cache` is donated, `origin` is not."""
        if origin is not None:
            origin = origin._replace(head=None)
        # (a draft head has no states)
        copied = self.jitted.copy_slots(cache._replace(head=None), source, target, origin)
        return copied._replace(head=cache.head)

    def cache(self, pages: int, slots: int) -> Cache:
        """Allocates an empty cache on the model's own devices. Raises ValueError where `data * sequence` does not
        divide `pages`, or `data` does not divide `slots`."""
        shardings = jax.tree.map(lambda x: x.sharding, self.cache_shapes(pages, slots)._replace(head=None))
        leaves, tree = jax.tree.flatten(shardings)
        cache: Cache = _empty(self.config, pages, slots, self.dtype, tuple(leaves), tree)()
        return cache if self.drafter is None else cache._replace(head=self.drafter.cache(pages))

    def cache_shapes(self, pages: int, slots: int) -> Cache:
        """Returns the shapes, dtypes and shardings of the arrays that `cache` allocates."""
        shapes = jax.eval_shape(functools.partial(caches.empty, self.config, pages, slots, self.dtype))
        if self.mesh is None:
            shardings = jax.tree.map(lambda _: self.placement, shapes)
        else:
            mesh = self.mesh
            specs = caches.specs(shapes, Partition(mesh))
            shardings = jax.tree.map(lambda spec: NamedSharding(mesh, as_returned(spec)), specs)
        layers = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
        )
        return layers if self.drafter is None else layers._replace(head=self.drafter.cache_shapes(pages))

    def nothing_chosen(self, sequences: int) -> Chosen:
        """Returns `Batch.previous` for a first step: no sequence has a chosen token, none is finished."""
        array = self.replicate(np.zeros(sequences, np.int32))
        return Chosen(array, array)

    def replicate(self, array: np.ndarray) -> jax.Array:
        """Copies an array of the host to every device."""
        everywhere = self.placement if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        return jax.make_array_from_callback(array.shape, everywhere, array.__getitem__)

    def counts(self, slots: int) -> jax.Array:
        """Allocates `Batch.counts` for `slots` sequences, int32 [slots, vocab_size], in which no token occurred."""
        zeros = np.zeros((slots, self.config.text.vocab_size), np.int32)
        return jax.make_array_from_callback(zeros.shape, self._counts_sharding(slots), zeros.__getitem__)

    def count_tokens(self, counts: jax.Array, tokens: Int32[AnyArray, "slots"], counted: np.ndarray) -> jax.Array:
        """Adds one for each slot's token where `counted`, bool [slots]. `counts` is donated."""
        return self.jitted.count_tokens(counts, tokens, counted)

    def set_counts(self, counts: jax.Array, slot: int, row: np.ndarray) -> jax.Array:
        """Replaces the counts of a slot, numbered over all devices, by `row`, int32 [vocab_size]. `counts` is
        donated."""
        return self.jitted.set_counts(counts, np.int32(slot), row)

    def batch_shapes(
        self, phase: Phase, rows: int, tokens: int, row_pages: int, stop_ids: int = STOP_IDS, extras: bool = False
    ) -> Batch:
        """Returns the shapes, dtypes and shardings of a batch without segments and media, whose tokens are all given,
        to compile a step without values. `extras` are masks, banned tokens, penalties and logprobs, which the engine's
        steps have;
        row i is slot i."""

        def array(*shape: int, dtype: jax.typing.DTypeLike = jnp.int32, spec: Any = ("data",)) -> Any:
            sharding = self.placement if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*spec))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        # Values that say which branches of a step run are on all devices, as the host's arrays are
        number, seeds = array(rows, dtype=jnp.float32, spec=()), array(rows, 2, dtype=jnp.uint32)
        penalties, words = array(rows, 3, dtype=jnp.float32, spec=()), self.config.text.vocab_size
        counts = self._counts_sharding(rows) if extras else None
        return Batch(
            tokens=array(rows, tokens),
            positions=array(rows, tokens),
            page_table=array(rows, row_pages, spec=("data", "sequence")),
            sampling=SamplingRows(number, array(rows, spec=()), number, number, seeds, penalties),
            stop_ids=array(rows, stop_ids),
            ends=array(rows),
            choosing=array(rows, dtype=jnp.bool_, spec=()),
            mask=array(rows, -(-words // 32), dtype=jnp.uint32, spec=()) if extras else None,
            banned=array(rows, BANNED, spec=()) if extras else None,
            counts=jax.ShapeDtypeStruct((rows, words), jnp.int32, sharding=counts) if extras else None,
            logprobs=array(rows, dtype=jnp.bool_, spec=()) if extras else None,
            phase=phase,
        )

    def _counts_sharding(self, slots: int) -> Sharding:
        if self.mesh is None:
            return self.placement
        if slots % self.data:
            raise ValueError(f"counts for {slots} sequences cannot be sharded over a data axis of {self.data}")
        return NamedSharding(self.mesh, _counts_spec(Partition(self.mesh)))

    @property
    def compiled(self) -> int:
        """The number of programs compiled so far for models of this structure: steps, copies of states, counts."""
        jitted = self.jitted
        steps = jitted.step, jitted.verify, jitted.logits, jitted.copy_slots
        return sum(function._cache_size() for function in (*steps, jitted.count_tokens, jitted.set_counts))

    def check(self, batch: Batch) -> None:
        """Raises ValueError for a batch that the mesh does not divide, for a decode step of several tokens each, and
        for a verification of one or of more than MOST_VERIFIED, and for a prefill that does not say which tokens follow
        where a draft head has to know."""
        rows, tokens = batch.tokens.shape
        if rows % self.data:
            raise ValueError(f"a batch of {rows} rows cannot be sharded over a data axis of {self.data}")
        if batch.page_table.shape[1] % self.sequence:
            raise ValueError(
                f"a page table of {batch.page_table.shape[1]} pages a row cannot be sharded over a sequence axis of "
                f"{self.sequence}"
            )
        if batch.phase == "decode" and (tokens != 1 or batch.segments is not None):
            raise ValueError(f"a decode step has rows of {tokens} tokens, expected one token and no segments")
        if batch.phase == "verify" and not 2 <= tokens <= MOST_VERIFIED:
            raise ValueError(f"a verification has rows of {tokens} tokens, expected 2 to {MOST_VERIFIED}")
        if batch.phase == "prefill" and self.drafter is not None and batch.following is None:
            raise ValueError("a prefill for a draft head has no `following`, expected the token after each")


class _Jitted:
    """Holds the jitted functions of all models of one structure, one object for each: `jit` compares identities."""

    def __init__(
        self,
        tree: jax.tree_util.PyTreeDef,
        mesh: Mesh | AbstractMesh | None,
        compiler_options: tuple[tuple[str, int], ...],
        head: HeadProgram | None = None,
        aux_layers: tuple[int, ...] = (),
        draft_tokens: int = 0,
    ):
        self.tree, self.partition = tree, Partition(mesh)
        self.head, self.aux_layers, self.draft_tokens = head, aux_layers, draft_tokens
        everywhere = counts = None
        if mesh is not None:
            everywhere = NamedSharding(mesh, PartitionSpec())
            counts = NamedSharding(mesh, _counts_spec(self.partition))
        options: Any = {"donate_argnames": "cache", "compiler_options": dict(compiler_options)}
        self.step: Any = jax.jit(self.run_and_choose, out_shardings=(None, everywhere), **options)
        self.verify: Any = jax.jit(self.run_and_verify, out_shardings=(None, everywhere), **options)
        self.logits: Any = jax.jit(self.run_alone, **options)
        self.copy_slots: Any = jax.jit(self.copy, donate_argnames="cache")
        self.count_tokens: Any = jax.jit(count_tokens, donate_argnames="counts", out_shardings=counts)
        self.set_counts: Any = jax.jit(_set_row, donate_argnames="array", out_shardings=counts)

    def run_alone(self, arrays: list[jax.Array], cache: Cache, batch: Batch) -> tuple[Cache, jax.Array]:
        cache, logits, _ = self.run(arrays, cache, batch)
        return cache, logits

    def run(
        self, arrays: list[jax.Array], cache: Cache, batch: Batch, aux_layers: tuple[int, ...] = ()
    ) -> tuple[Cache, jax.Array, jax.Array | None]:
        model = jax.tree.unflatten(self.tree, arrays)
        batch = _with_tokens(batch)
        partition = self.partition
        decodes = None if batch.phase == "prefill" else True
        layout = model.stream_layout(partition, *batch.tokens.shape, decodes=decodes)
        if batch.segments is not None:
            # A short convolution reads earlier tokens of its own sequence, which must be on its own device
            layout = dataclasses.replace(layout, token_axes=())

        graph, params = nnx.split(model)
        context, tree = jax.tree.flatten(batch.context)

        def run_local(params: Any, layers: Any, tokens: Any, context: Any, *media: Any) -> tuple[Any, Any, Any]:
            model, described = nnx.merge(graph, params), jax.tree.unflatten(tree, context)
            return model.extend_with_aux(layers, tokens, described, *media, layout, aux_layers)

        rows, layers = layout.row_spec(), caches.specs(cache, partition).layers
        context_specs = [layout.row_spec("row_pages") if array is batch.page_table else rows for array in context]
        in_specs = (weight_specs(params, partition), layers, rows, context_specs, rows, REPLICATED)
        logits_spec, after = layout.row_spec("vocab"), layers
        if batch.phase == "verify":
            drafted = draft_spec(layout)
            after = tuple(drafted if isinstance(spec, KDAState) else spec for spec in layers)
            logits_spec = layout.row_spec(None, "vocab")
        run = partition.shard_map(run_local, in_specs, (logits_spec, after, rows))
        inputs = (batch.tokens, context, batch.media_index, batch.media_tokens)
        logits, new_layers, aux = run(params, cache.layers, *inputs)
        return cache._replace(layers=new_layers), logits, aux

    def run_and_choose(
        self, arrays: list[jax.Array], cache: Cache, batch: Batch, head: list[jax.Array] | None = None
    ) -> tuple[Cache, Chosen]:
        cache, logits, aux = self.run(arrays, cache, batch, self.aux_layers)
        chosen = choose(logits, batch, self.partition.num_shards("batch"))
        if head is None:
            return cache, chosen
        following = chosen.tokens[:, None]
        if batch.phase == "prefill":
            following = jnp.where(batch.following == CHOSEN_HERE, _of_tokens(batch, chosen.tokens), batch.following)
        cache, drafts = self.draft(head, cache, batch, aux, following, _with_tokens(batch).positions)
        return cache, chosen._replace(drafts=drafts)

    def run_and_verify(
        self, arrays: list[jax.Array], cache: Cache, batch: Batch, head: list[jax.Array] | None = None
    ) -> tuple[Cache, Verified]:
        with_drafts, logits, aux = self.run(arrays, cache, batch, self.aux_layers)
        batch = _with_tokens(batch)
        verified = verify(logits, batch, self.partition.num_shards("batch"))
        cache = self.take_in(cache, with_drafts, verified.counts, batch.slots)
        if head is None:
            return cache, verified
        right = jnp.arange(batch.tokens.shape[1]) < verified.counts[:, None]
        positions = jnp.where(right, batch.positions, -1)
        cache, drafts = self.draft(head, cache, batch, aux, verified.tokens, positions)
        return cache, verified._replace(chosen=verified.chosen._replace(drafts=drafts))

    def draft(
        self,
        head: list[jax.Array],
        cache: Cache,
        batch: Batch,
        aux: jax.Array | None,
        following: jax.Array,
        positions: jax.Array,
    ) -> tuple[Cache, jax.Array | None]:
        """Lets the draft head take in the tokens at `positions`, each with the one `following` it, and but for prefill
        draft what comes after them: no further than the head's own writes stay in the page of a row's last token, since
        the row may not have the next page yet."""
        assert self.head is not None and cache.head is not None
        inputs = (head, cache.head, aux, following, positions, batch.page_table)
        if batch.phase == "prefill":
            return cache._replace(head=self.head.take_in(*inputs, batch.segments)), None
        room = (jnp.max(positions, axis=1) // PAGE + 1) * PAGE
        pages, drafts = self.head.draft(*inputs, self.draft_tokens, room)
        return cache._replace(head=pages), drafts

    def take_in(self, before: Cache, with_drafts: Cache, counts: jax.Array, slots: jax.Array | None) -> Cache:
        """Returns the cache with the first `counts` tokens of each sequence's drafts in its states. Pages have all
        drafts: what is not taken is written over before a token sees it."""
        partition = self.partition
        layout = choose_layout(partition, len(counts), 1)
        states, drafts = before.layers, with_drafts.layers

        def take_in_local(states: Any, drafts: Any, counts: jax.Array, slots: jax.Array | None) -> Any:
            context = Context(counts[:, None], None, slots, phase="verify")
            return tuple(
                write_slots(state, kda.take_in(read_slots(state, context), draft, counts), context)
                if isinstance(state, KDAState)
                else draft
                for state, draft in zip(states, drafts, strict=True)
            )

        rows, specs, drafted = layout.row_spec(), caches.specs(before, partition).layers, draft_spec(layout)
        after = tuple(drafted if isinstance(spec, KDAState) else spec for spec in specs)
        run = partition.shard_map(take_in_local, (specs, after, rows, rows), specs)
        return with_drafts._replace(layers=run(states, drafts, counts, slots))

    def copy(self, cache: Cache, source: jax.Array, target: jax.Array, origin: Cache | None) -> Cache:
        specs = caches.specs(cache, self.partition)
        numbers = choose_layout(self.partition, self.partition.num_shards("batch"), 1).row_spec()
        origin_specs = None if origin is None else caches.specs(origin, self.partition)
        in_specs = (specs, numbers, numbers, origin_specs)
        return self.partition.shard_map(caches.copy_slots, in_specs, specs)(cache, source, target, origin)


def _set_row(array: jax.Array, number: jax.Array, row: jax.Array) -> jax.Array:
    return array.at[number].set(row)


_jitted = functools.lru_cache(maxsize=16)(_Jitted)


@functools.lru_cache(maxsize=64)
def _empty(
    config: KimiConfig,
    pages: int,
    slots: int,
    dtype: jnp.dtype,
    shardings: tuple[Sharding, ...],
    tree: jax.tree_util.PyTreeDef,
) -> Any:
    """Returns a jitted function that allocates a cache. It is cached, since a new function would compile again."""
    make = functools.partial(caches.empty, config, pages, slots, dtype)
    return jax.jit(make, out_shardings=jax.tree.unflatten(tree, shardings))


def _counts_spec(partition: Partition) -> PartitionSpec:
    """Returns the PartitionSpec of counts [slots, words]: that of a decode step's logits."""
    return PartitionSpec(*(partition.axis_names(axis) or None for axis in ("batch", "vocab")))


def _with_tokens(batch: Batch) -> Batch:
    """Returns the batch with the tokens of `previous` in place of CHOSEN_BEFORE, and positions -1 (padding) for the
    tokens of finished sequences."""
    if batch.previous is None:
        return batch
    token, finish = (_of_tokens(batch, x) for x in (batch.previous.tokens, batch.previous.finish))
    return dataclasses.replace(
        batch,
        tokens=jnp.where(batch.tokens == CHOSEN_BEFORE, token, batch.tokens),
        positions=jnp.where(finish == Finish.NOT_YET, batch.positions, -1),
    )


def _of_tokens(batch: Batch, values: Int32[jax.Array, "b"]) -> Int32[jax.Array, "rows t"]:
    """Returns each token's value among those of the sequences; [rows, 1] where a row is one sequence."""
    if batch.segments is None:
        return values[:, None]
    return jnp.take_along_axis(values.reshape(len(batch.tokens), -1), jnp.maximum(batch.segments, 0), axis=1)
