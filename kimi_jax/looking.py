"""Looks inside a model: runs its own layers on a prompt, and returns what goes on between them.

The layers are the model's modules, called as `Kimi.forward` calls them; only attention's weights, which no kernel ever
forms, are computed a second time from the layer's own queries and keys.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from numpy.typing import ArrayLike

from kimi_jax.axes import Float, Float32, Hidden, Int32, MediaTokens
from kimi_jax.model import rope
from kimi_jax.model.block import Block, route_and_mix
from kimi_jax.model.context import Context, KDAState
from kimi_jax.model.kda import KDA
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.mla import MLA
from kimi_jax.model.moe import MoE
from kimi_jax.model.residual import ResidualStream
from kimi_jax.model.splice import Media, media_index
from kimi_jax.model.token_ids import token_ids
from kimi_jax.model.vision import VisionBlock
from kimi_jax.model.vision_layout import PatchLayout, lay_out_patches
from sharding import SINGLE_DEVICE, StreamLayout

PARTS = ("hidden", "router", "attention", "kda", "vision")


class Routing(NamedTuple):
    """Holds the experts that a layer chose for each token, the best first, and the weights of their sum."""

    chosen: Int32[jax.Array, "b t j"]
    weights: Float32[jax.Array, "b t j"]


class Memory(NamedTuple):
    """Holds a KDA layer's gates and memory.

    decay: the share of each key channel of the state that a token keeps, above 0 and at most 1.
    beta: how much of the old value under its key a token replaces, between 0 and 1.
    state: keys x values of each head after the last token.
    """

    decay: Float32[jax.Array, "b t h k"]
    beta: Float32[jax.Array, "b t h"]
    state: Float32[jax.Array, "b h k v"]


class Seen(NamedTuple):
    """Holds the patches after a vision layer, those of all items in order, and how much each attends to which."""

    hidden: Float[jax.Array, "p width"]
    attention: Float32[jax.Array, "h p p"]


@dataclasses.dataclass(frozen=True)
class Look:
    """Holds what a run showed, by the number of the layer; a layer that has no such part is not in its dictionary.

    hidden: the residual stream after the layer, [b, t, d], of one with snapshots its running sum. (`model.model.norm`
        of it through the head is the layer's guess of the next token.)
    last: the vectors that the head makes logits of, after the final norm, [b, t, d].
    router: the choices of layers with routed experts.
    attention: the weights of MLA layers, float32 [b, h, t, t], rows are the tokens that attend; each row sums to 1.
    kda: gates and memory of KDA layers.
    vision: the layers of the vision tower.
    media_tokens: what the projector made of the media, [tokens, d]; None without media.
    """

    hidden: dict[int, jax.Array]
    last: jax.Array
    router: dict[int, Routing]
    attention: dict[int, jax.Array]
    kda: dict[int, Memory]
    vision: dict[int, Seen]
    media_tokens: MediaTokens | None


def look(
    model: Kimi,
    tokens: ArrayLike,
    media: Media | None = None,
    layers: Iterable[int] | None = None,
    what: Sequence[str] = PARTS,
) -> Look:
    """Runs token ids [b, t] through the model and returns `what` goes on in `layers` (None: all of them).

    media: belong to the placeholders in `tokens`, as for the model itself. The numbers in `layers` choose from the
    language model and from the vision tower alike.

    Raises ValueError for a model on a mesh, a part that has no such name, a layer that is not there, and what the model
    itself refuses.
    """
    if model.mesh is not None:
        raise ValueError("a model on a mesh cannot be looked into: load it without mesh=")
    if unknown := [part for part in what if part not in PARTS]:
        raise ValueError(f"what has {unknown[0]!r}, expected some of {', '.join(PARTS)}")
    count = len(model.model.layers)
    chosen = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    tower = 0 if model.vision_tower is None else len(model.vision_tower.encoder.blocks)
    if missing := [layer for layer in chosen if not 0 <= layer < max(count, tower)]:
        raise ValueError(f"layers has {missing[0]}, expected numbers from 0 to {max(count, tower) - 1}")
    ids = token_ids(tokens, model.config.text.vocab_size)
    index = media_index(ids, media, model.config)
    embeds, seen = None, {}
    if media is not None:
        embeds = model.encode_media(media)
        seen = _look_at_media(model, media, range(tower) if layers is None else chosen) if "vision" in what else {}
    where = None if index is None else jnp.asarray(index)
    hidden, last, router, attention, kda = _run(model, jnp.asarray(ids), where, embeds, chosen, tuple(what))
    return Look(hidden, last, router, attention, kda, seen, embeds)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _run(
    model: Kimi,
    tokens: jax.Array,
    index: jax.Array | None,
    embeds: jax.Array | None,
    layers: tuple[int, ...],
    what: tuple[str, ...],
) -> tuple[dict[int, jax.Array], jax.Array, dict[int, Routing], dict[int, jax.Array], dict[int, Memory]]:
    layout = model.stream_layout(SINGLE_DEVICE, *tokens.shape)
    context = Context(jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))
    hidden: dict[int, jax.Array] = {}
    router: dict[int, Routing] = {}
    attention: dict[int, jax.Array] = {}
    kda: dict[int, Memory] = {}
    x = ResidualStream(model.embed(tokens, index, embeds, layout))
    for number, block in enumerate(model.model.layers):
        wanted = what if number in layers else ()
        x, h = block.mixer_input(x)
        if "attention" in wanted and isinstance(block.self_attn, MLA):
            attention[number] = _attention(block.self_attn, h, context)
        if "kda" in wanted and isinstance(block.self_attn, KDA):
            kda[number] = _memory(block.self_attn, h, context)
        x, _ = block.mix_tokens(x, context, None, layout)
        x, routing = _feed_forward(block, x, layout)
        if "router" in wanted and routing is not None:
            router[number] = routing
        if "hidden" in wanted:
            hidden[number] = x.total
    return hidden, model.model.last_norm(x), router, attention, kda


def _attention(mla: MLA, h: Hidden, context: Context) -> Float32[jax.Array, "b h t t"]:
    """Computes the weights that the layer's kernel applies to values: a softmax over the tokens up to each."""
    q, latents = mla.project(h, context.positions, SINGLE_DEVICE)
    config = mla.config
    c, pe = jnp.split(latents, [config.kv_lora_rank], axis=-1)
    kv = rearrange(mla.kv_b_proj(c), "b s (h kv) -> b s h kv", h=q.shape[2])
    nope, turned = jnp.split(q.astype(jnp.float32), [config.qk_nope_head_dim], axis=-1)
    k = kv[..., : config.qk_nope_head_dim].astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bthn,bshn->bhts", nope, k, precision=highest)
    scores += jnp.einsum("bthr,bsr->bhts", turned, pe.astype(jnp.float32), precision=highest)
    causal = context.positions[:, None, :, None] >= context.positions[:, None, None, :]
    return jax.nn.softmax(jnp.where(causal, scores * rope.softmax_scale(config), -jnp.inf), axis=-1)


def _memory(kda: KDA, h: Hidden, context: Context) -> Memory:
    g, beta = kda.gates(h, context.valid)
    rows, taps = len(h), kda.taps()
    empty = KDAState(
        jnp.zeros((rows, taps.shape[1] - 1, taps.shape[0]), h.dtype),
        jnp.zeros((rows, kda.heads, kda.head_dim, kda.head_dim), jnp.float32),
    )
    _, state = kda(h, context.valid, empty)
    assert isinstance(state, KDAState)
    return Memory(jnp.exp(g), beta, state.S)


def _feed_forward(block: Block, x: ResidualStream, layout: StreamLayout) -> tuple[ResidualStream, Routing | None]:
    """Adds the feed-forward part to the stream, and returns the choices by which it was computed."""
    if not isinstance(block.mlp, MoE):
        return block.feed_forward(x, layout), None
    x, h = block.forward_input(x)
    y, chosen = route_and_mix(block.mlp, h, layout)
    _, weights = block.mlp.gate(layout.gather_all(h))  # (the compiler computes the gate once)
    shape = (*h.shape[:2], -1)
    return x.add(y), Routing(chosen.reshape(shape), weights.reshape(shape))


def _look_at_media(model: Kimi, media: Media, layers: Sequence[int]) -> dict[int, Seen]:
    """Runs the vision tower's layers on the patches alone, without padding."""
    assert model.config.vision is not None
    count = len(media.patches)
    where = lay_out_patches(np.asarray(media.grids), model.config.vision, count)
    patches = jnp.asarray(np.asarray(media.patches, np.float32), model.dtype)
    return _run_tower(model, patches, jax.tree.map(jnp.asarray, where), tuple(layers))


@functools.partial(jax.jit, static_argnums=3)
def _run_tower(model: Kimi, patches: jax.Array, where: PatchLayout, layers: tuple[int, ...]) -> dict[int, Seen]:
    assert model.vision_tower is not None
    x, found = model.vision_tower.patch_embed(patches, where), {}
    for number, block in enumerate(model.vision_tower.encoder.blocks):
        attention = _patch_attention(block, x, where) if number in layers else None
        x = block(x, where)
        if attention is not None:
            found[number] = Seen(x, attention)
    return found


def _patch_attention(block: VisionBlock, x: jax.Array, where: PatchLayout) -> Float32[jax.Array, "h p p"]:
    """Computes the weights of `VisionBlock.attention`: a softmax over all patches of the same item."""
    q, k, _ = rearrange(block.wqkv(block.norm0(x)), "p (qkv h k) -> qkv 1 p h k", qkv=3, h=block.heads)
    angles = jnp.asarray(where.angles)[None, :, None, :]
    q, k = (rope.rotate(one, angles)[0].astype(jnp.float32) for one in (q, k))
    scores = jnp.einsum("phk,ohk->hpo", q, k, precision=jax.lax.Precision.HIGHEST) * q.shape[-1] ** -0.5
    same = where.segment[:, None] == where.segment[None]
    return jax.nn.softmax(jnp.where(same, scores, -jnp.inf), axis=-1)
