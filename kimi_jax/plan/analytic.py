"""Memory and traffic of a step on each device, by arithmetic: the shapes of the real model under the real rules.

Times are lower bounds: every byte once at the HBM's peak, every product at the matrix units', every message over all of
a chip's links at once; nothing waits for anything else but small operations, of which a compiler has to say how long
they take.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from kimi_jax.model.context import PAGE
from kimi_jax.model.eagle import check_head
from kimi_jax.model.kimi import check_heads
from kimi_jax.plan.job import Job, Parameter, head_parameters, parameters, pool_sizes
from kimi_jax.plan.traffic import Collective
from kimi_jax.runtime import pools
from kimi_jax.runtime.eagle import page_bytes

# Programs, and what the compiler keeps beside buffers: 61 layers' kernels came to 60 to 250 MB.
PROGRAM_BYTES = 300 * 10**6


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device by kind, out of `available`."""

    available: int
    experts: int
    attention: int
    embeddings: int
    other_weights: int
    vision: int
    draft_head: int
    cache: int
    temporaries: int

    @property
    def weights(self) -> int:
        """Bytes of the weights that a text step reads, without the vision tower's."""
        return self.experts + self.attention + self.embeddings + self.other_weights + self.draft_head

    @property
    def headroom(self) -> int:
        """Bytes that are left; negative where the job does not fit."""
        return self.available - self.weights - self.vision - self.cache - self.temporaries


@dataclasses.dataclass(frozen=True)
class StepBound:
    """Bytes that a device reads and sends and products that it computes in a step. The longest of these three times
    bounds it, together with `small_seconds`, the compiler's estimate for small operations between them (0 where nothing
    was compiled): they keep a core from its kernels."""

    hbm_bytes: float
    flops: float
    sent_bytes: float
    hbm_seconds: float
    flops_seconds: float
    sent_seconds: float
    small_seconds: float = 0.0

    @property
    def longest_seconds(self) -> float:
        """The longest of the times of HBM, products and messages."""
        return max(self.hbm_seconds, self.flops_seconds, self.sent_seconds)

    @property
    def lower_bound_seconds(self) -> float:
        return self.longest_seconds + self.small_seconds

    @property
    def bound_by(self) -> str:
        times = {
            "HBM": self.hbm_seconds,
            "FLOPs": self.flops_seconds,
            "links": self.sent_seconds,
            "small": self.small_seconds,
        }
        return max(times, key=times.__getitem__)


@dataclasses.dataclass(frozen=True)
class EnginePools:
    """The pools that `kimi_jax.Engine` makes, by default, of what weights leave: `cache_memory` bytes of each device.

    Slots, pages and places for copies of recurrent states are those of all devices. `sequences` of the job's context
    are computed at one time.
    """

    cache_memory: int
    slots: int
    pages: int
    places: int
    sequences: int


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """The last layer's share, with its part of the cache: bytes on a device, and bytes that a step reads there."""

    resident: int
    read: float


def memory(job: Job, temporaries: int | None = None) -> Memory:
    """Computes memory by kind; `temporaries` are the compiler's, an estimate where None.

    Raises ValueError where the mesh divides the job's batch, heads or widths unevenly.
    """
    check_heads(job.config, job.partition)
    if job.draft is not None and job.draft.head is not None:
        check_head(job.draft.head, job.partition)
    of_kind = dict.fromkeys(("experts", "attention", "embeddings", "other weights", "vision"), 0)
    for weight, count in parameters(job.config):
        of_kind[weight.kind] += count * weight.local_bytes(job.sizes)
    return Memory(
        available=job.topology.chip.memory,
        experts=of_kind["experts"],
        attention=of_kind["attention"],
        embeddings=of_kind["embeddings"],
        other_weights=of_kind["other weights"],
        vision=of_kind["vision"],
        draft_head=sum(weight.local_bytes(job.sizes) for weight in _of_head(job)),
        cache=cache_bytes(job),
        temporaries=_temporaries(job) if temporaries is None else temporaries,
    )


def cache_bytes(job: Job) -> int:
    """Computes the bytes of all layers' caches on each device, the draft head's among them."""
    pages, slots = pool_sizes(job.batch, job.context, job.partition)
    return pools.cache_bytes(job.config, pages, slots, job.dtype, job.partition) + _head_cache(job)


def _of_head(job: Job) -> tuple[Parameter, ...]:
    return () if job.draft is None or job.draft.head is None else head_parameters(job.draft.head)


def _head_page(job: Job) -> int:
    head = None if job.draft is None else job.draft.head
    return 0 if head is None else page_bytes(head, jnp.dtype(head.layer.dtype), job.partition)


def _head_cache(job: Job) -> int:
    pages, _ = pool_sizes(job.batch, job.context, job.partition)
    return pages // job.partition.num_shards("pages") * _head_page(job)


def engine_pools(job: Job) -> EnginePools | None:
    """Computes the pools of an engine with a slot for each of the job's rows; None where it finds no room."""
    without_cache = memory(job, 0)
    left = without_cache.available - without_cache.weights - without_cache.vision
    cache_memory = int(left * pools.HEADROOM)
    try:
        mesh, head_page = job.partition.mesh, _head_page(job)
        found = pools.pools_within(job.config, cache_memory, job.batch, job.dtype, mesh, head_page=head_page)
    except ValueError:
        return None
    data = job.mesh["data"]
    fit = found.pages // data // pools.row_pages(job.context, job.partition)
    sequences = min(job.batch, data * fit) if "mla" in job.config.text.layer_kinds else job.batch
    return EnginePools(cache_memory, found.slots, found.pages, found.places, sequences)


def _temporaries(job: Job) -> int:
    """Estimates temporaries: the stream in float32 twice and its snapshots, one mixture's rows sorted by expert, the
    logits, the program."""
    text, partition = job.config.text, job.partition
    stream = job.tokens * text.hidden_size * (8 + job.dtype.itemsize * text.snapshots)
    share = min(1.0, 2 / partition.devices) if job.phase == "prefill" else 1.0
    rows = job.tokens * text.num_experts_per_tok * share
    sorted_rows = rows * (text.expert_width * 6 + text.moe_intermediate_size * 4)
    words = text.vocab_size // partition.num_shards("vocab")
    return int(stream + sorted_rows + _with_logits(job) / partition.num_shards("batch") * words * 8) + PROGRAM_BYTES


def _with_logits(job: Job) -> int:
    """Counts the tokens of which the step computes logits."""
    return job.tokens if job.phase == "decode" else job.batch


def touched(job: Job) -> float:
    """Computes the share of experts that some token of the step chooses, where all choices are equally likely."""
    text = job.config.text
    return (
        1.0 - (1.0 - text.num_experts_per_tok / text.n_routed_experts) ** job.tokens if text.n_routed_experts else 0.0
    )


def hbm_bytes(job: Job) -> float:
    """Computes HBM bytes: weights once (the chosen share of experts), latents once, KDA states read and written once; a
    draft head's once for each draft."""
    latents, states = _layer_cache(job)
    kinds = job.config.text.layer_kinds
    own = latents * kinds.count("mla") + 2 * states * kinds.count("kda")
    return _weights_read(job, parameters(job.config)) + own + _head_bytes(job)


def _head_bytes(job: Job) -> int:
    if job.draft is None:
        return 0
    runs = job.draft.tokens
    total = runs * _head_cache(job)
    for weight in _of_head(job):
        if not weight.path.startswith(("embed_tokens", "d2t")):  # of which a row, or a number, per token
            total += weight.local_bytes(job.sizes) * (1 if weight.path.startswith("fc") else runs)
    return total


def _layer_cache(job: Job) -> tuple[int, int]:
    """Computes the bytes on each device of an MLA layer's and of a KDA layer's cache."""
    pages, slots = pool_sizes(job.batch, job.context, job.partition)
    each = pools.layer_bytes(job.config, job.dtype, job.partition)
    shards = job.partition.num_shards
    return pages // shards("pages") * each.page, slots // shards("batch") * each.slot


def _weights_read(job: Job, read: tuple[tuple[Parameter, int], ...]) -> float:
    total = 0.0
    for weight, count in read:
        if weight.kind != "vision" and "embed_tokens" not in weight.path:  # a row of that table per token
            share = touched(job) if weight.kind == "experts" else 1.0
            total += count * weight.local_bytes(job.sizes) * share
    return total


def per_layer(job: Job) -> PerLayer:
    """Computes the share of the last layer, a mixture in every published model."""
    text = job.config.text
    last = parameters(job.config, text.num_hidden_layers - 1)
    latents, states = _layer_cache(job)
    kept, moved = (latents, latents) if text.layer_kinds[-1] == "mla" else (states, 2 * states)
    resident = sum(count * weight.local_bytes(job.sizes) for weight, count in last)
    return PerLayer(resident + kept, _weights_read(job, last) + moved)


def flops(job: Job) -> float:
    """Counts the products of weights with the tokens that meet them on a device, and attention's own."""
    text, partition, layout = job.config.text, job.partition, job.layout
    rows = job.tokens / partition.num_devices(layout.row_axes)  # all tokens of a device's rows
    local = rows / partition.num_devices(layout.token_axes)
    routed = job.tokens / partition.devices if layout.dispatches else job.tokens
    total = 0.0
    for weight, count in parameters(job.config):
        products = 2 * count * weight.local(job.sizes)
        if weight.kind == "experts":  # each expert's tokens, were they spread evenly
            total += products * job.tokens * text.num_experts_per_tok / text.n_routed_experts
        elif "lm_head" in weight.path:
            total += products * _with_logits(job) / partition.num_devices(layout.row_axes)
        elif ".mlp.gate." in weight.path or ".mlp.routed_expert_" in weight.path:
            total += products * routed
        elif ".shared_experts." in weight.path:
            # where tokens travel to experts, as sharded as a dense layer's, for a device's rows
            reach = partition.num_shards("shared_mlp") / partition.num_shards("mlp") * rows
            total += products * (reach if layout.dispatches else job.tokens)
        elif weight.kind in ("attention", "other weights"):
            total += products * (local if "kda_heads" in weight.axes else rows)
    kinds = text.layer_kinds
    own = kinds.count("mla") * _mla_flops(job) + kinds.count("kda") * _kda_flops(job, local)
    return total + own + _head_flops(job)


def _head_flops(job: Job) -> float:
    """Counts what a draft head multiplies, for the tokens that it takes in and for its own drafts but the last."""
    if job.draft is None or job.draft.head is None:
        return 0.0
    head, runs = job.draft.head, job.draft.tokens
    rows = job.batch / job.partition.num_shards("batch")
    layer, tokens = head.layer, job.chunk + runs - 1
    total = 0.0
    for weight in _of_head(job):
        if len(weight.shape) == 2 and "embed_tokens" not in weight.path:
            times = {"fc": job.chunk, "lm_head": runs}.get(weight.path.partition(".")[0], tokens)
            total += 2 * weight.local(job.sizes) * rows * times
    absorbed = layer.latent_dim + layer.kv_lora_rank
    width = absorbed if head.form == "mla" else layer.qk_head_dim + layer.v_head_dim
    heads = layer.num_attention_heads / job.partition.num_shards("heads")
    return total + 2 * rows * tokens * job.context * heads * width


def _mla_flops(job: Job) -> float:
    """Counts scores and their products with values: absorbed in a decode step, over every head's keys and values for
    more."""
    text, partition = job.config.text, job.partition
    heads = text.num_attention_heads / partition.num_shards("heads")
    pairs = job.batch / partition.num_shards("batch") * job.chunk * (job.context - (job.chunk - 1) / 2)
    absorbed = text.latent_dim + text.kv_lora_rank
    return 2 * pairs * heads * (absorbed if job.phase == "decode" else text.qk_head_dim + text.v_head_dim)


def _kda_flops(job: Job, tokens: float) -> float:
    """Counts two products with the state and its update, for a device's `tokens`."""
    linear = job.config.text.linear_attn
    if linear is None:
        return 0.0
    heads = linear.num_heads / job.partition.num_shards("kda_heads")
    return tokens * heads * 6 * linear.head_dim**2


def step(job: Job, sent: Sequence[Collective], small_seconds: float = 0.0) -> StepBound:
    """Computes the step's lower bounds, with the messages that it sends and the time of its small operations."""
    chip, read, products = job.topology.chip, hbm_bytes(job), flops(job)
    over_links = sum((collective.sent for collective in sent), 0.0)
    return StepBound(
        hbm_bytes=read,
        flops=products,
        sent_bytes=over_links,
        hbm_seconds=read / (chip.hbm * chip.cores),
        flops_seconds=products / (chip.bf16 * chip.cores),
        sent_seconds=over_links / chip.links,
        small_seconds=small_seconds,
    )


def largest_batch(job: Job, temporaries: int | None = None) -> int:
    """Finds the most rows that fit with this context, a multiple of the `data` axis; 0 where none do."""
    data = job.mesh["data"]

    def fits(parts: int) -> bool:
        return headroom(dataclasses.replace(job, batch=parts * data), job, temporaries) >= 0

    return data * _last(fits, 2**20)


def largest_context(job: Job, temporaries: int | None = None) -> int:
    """Finds the most tokens a row that fit with this batch, in whole pages; 0 where none do."""
    pages = job.config.text.max_position_embeddings // PAGE

    def fits(count: int) -> bool:
        return headroom(with_context(job, count * PAGE), job, temporaries) >= 0

    return PAGE * _last(fits, pages)


def with_context(job: Job, context: int) -> Job:
    """Returns the job with so many tokens in each row."""
    return dataclasses.replace(job, context=context, chunk=min(job.chunk, context))


def headroom(job: Job, measured: Job, temporaries: int | None) -> int:
    """Computes the bytes that the job leaves on a device; `temporaries` are those compiled for the `measured` job, and
    their growth is estimated."""
    if temporaries is not None:
        temporaries += max(0, _temporaries(job) - _temporaries(measured))
    return memory(job, temporaries).headroom


def _last(true_up_to: Callable[[int], bool], most: int) -> int:
    """Finds the greatest n of 1 to `most` for which it is true, given that it is true up to some n; 0 where never."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if true_up_to(middle) else (low, middle - 1)
    return low
