"""`kimi_jax.looking`: what is shown is what the model itself computes, for every family."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from kimi_jax.looking import look
from kimi_jax.model.context import Context
from kimi_jax.model.moe import Router
from kimi_jax.model.splice import Media
from kimi_jax.model.vision_layout import lay_out_patches
from sharding import SINGLE_DEVICE


@pytest.fixture(scope="module")
def shown(two_layer_model):
    """Returns the prompt of each golden's model of two layers, with a picture where it has vision."""

    def prompt(name):
        kimi = two_layer_model(name)
        tokens = np.random.RandomState(3).randint(0, 300, (2, 12)).astype(np.int32)
        if kimi.vision_tower is None:
            return kimi, tokens, None
        grids = np.array([[1, 4, 4], [1, 2, 4]], np.int32)
        tokens[0, 2:6] = tokens[1, 1:3] = kimi.config.media_placeholder_token_id
        patches = np.random.RandomState(4).randn(24, 3, 14, 14).astype(np.float32)
        return kimi, tokens, Media(patches, grids)

    return prompt


def recorded_run(kimi, tokens, media, monkeypatch):
    """Returns the logits of the model's own run, and what its router returned in it."""
    used = []

    def record(router, x, **options):
        found = route(router, x, **options)
        jax.debug.callback(lambda *arrays: used.append(arrays), *found)
        return found

    route = Router.__call__
    monkeypatch.setattr(Router, "__call__", record)
    run = nnx.jit(lambda model, *rest: model.forward(*rest), static_argnums=4)
    monkeypatch.setattr("kimi_jax.model.kimi._logits", run)
    logits = kimi(tokens, media)
    jax.effects_barrier()
    monkeypatch.undo()
    return logits, used


@pytest.mark.parametrize(
    "name",
    [name if name == "kimi-linear" else pytest.param(name, marks=pytest.mark.slow) for name in cases.CASES],
)
def test_every_family_shows_its_own_run(shown, name, monkeypatch):
    kimi, tokens, media = shown(name)
    logits, used = recorded_run(kimi, tokens, media, monkeypatch)
    found = look(kimi, tokens, media)
    # The head makes the model's logits of what is shown last
    again = kimi.logits(found.last, SINGLE_DEVICE)
    assert float(jnp.abs(again - logits).max()) < 1e-5
    assert sorted(found.hidden) == [0, 1]
    np.testing.assert_allclose(kimi.model.norm(found.hidden[1]), found.last, atol=1e-6)
    # The choices are those of the one layer with experts in that run
    ((chosen, weights),) = used
    assert sorted(found.router) == [1]
    np.testing.assert_array_equal(found.router[1].chosen.reshape(chosen.shape), chosen)
    np.testing.assert_allclose(found.router[1].weights.reshape(weights.shape), weights, atol=1e-6)
    # Each kind of layer has its own part
    kinds = kimi.config.text.layer_kinds
    assert sorted(found.attention) == [i for i, kind in enumerate(kinds) if kind == "mla"]
    assert sorted(found.kda) == [i for i, kind in enumerate(kinds) if kind == "kda"]
    assert sorted(found.vision) == ([] if media is None else list(range(len(kimi.vision_tower.encoder.blocks))))
    # Attention's weights give what the layer adds to the stream
    context = Context(jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))
    layer = max(found.attention)
    block = kimi.model.layers[layer]
    h = block.input_layernorm(found.hidden[layer - 1])
    _, latents = block.self_attn.project(h, context.positions, SINGLE_DEVICE)
    width = kimi.config.text.v_head_dim
    latent = latents[..., : kimi.config.text.kv_lora_rank]
    kv = rearrange(block.self_attn.kv_b_proj(latent), "b s (h kv) -> b s h kv", h=kimi.config.text.num_attention_heads)
    mixed = block.self_attn.output(jnp.einsum("bhts,bshv->bthv", found.attention[layer], kv[..., -width:]), h)
    np.testing.assert_allclose(mixed, block.self_attn(h, context)[0], atol=1e-5)
    np.testing.assert_allclose(found.attention[layer].sum(-1), 1, atol=1e-6)
    assert float(jnp.abs(jnp.triu(found.attention[layer], 1)).max()) == 0


def test_the_state_is_that_of_the_delta_rule(shown):
    kimi, tokens, _ = shown("kimi-linear")
    memory = look(kimi, tokens, layers=[0], what=["kda"]).kda[0]
    kda = kimi.model.layers[0].self_attn
    h = kimi.model.layers[0].input_layernorm(kimi.model.embed_tokens(jnp.asarray(tokens)))
    raw = jnp.concatenate([kda.q_proj(h), kda.k_proj(h), kda.v_proj(h)], axis=-1)
    mixed, _ = kda.convolve(raw, jnp.ones(tokens.shape, bool), None)
    _, k, v = (np.asarray(x).reshape(2, 12, kda.heads, -1) for x in jnp.split(mixed, 3, axis=-1))
    k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
    state = np.zeros(memory.state.shape)
    for t in range(tokens.shape[1]):
        state = state * np.asarray(memory.decay)[:, t, :, :, None]
        error = v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])
        state += np.einsum("bh,bhk,bhv->bhkv", np.asarray(memory.beta)[:, t], k[:, t], error)
    np.testing.assert_allclose(memory.state, state, atol=1e-4)
    assert np.all(memory.decay > 0) and np.all(memory.decay <= 1)


def test_patches_are_seen_as_the_tower_sees_them(shown):
    kimi, tokens, media = shown("k2.5")
    found = look(kimi, tokens, media, what=["vision"])
    assert not found.hidden and not found.router and not found.attention
    np.testing.assert_allclose(found.media_tokens, kimi.encode_media(media), atol=1e-6)
    last = max(found.vision)
    where = jax.tree.map(jnp.asarray, lay_out_patches(media.grids, kimi.config.vision, len(media.patches)))
    x = kimi.vision_tower.encoder.final_layernorm(found.vision[last].hidden)
    merged = jnp.einsum("mcfd,mcf->mcd", x[where.merge_index], where.merge_weight)
    np.testing.assert_allclose(kimi.mm_projector(merged), found.media_tokens, atol=1e-5)
    block = kimi.vision_tower.encoder.blocks[last]
    qkv = block.wqkv(block.norm0(found.vision[last - 1].hidden))
    v = rearrange(qkv, "p (qkv h k) -> qkv p h k", qkv=3, h=block.heads)[2]
    mixed = rearrange(jnp.einsum("hpo,ohk->phk", found.vision[last].attention, v), "p h k -> p (h k)")
    np.testing.assert_allclose(mixed, block.attention(qkv, where), atol=1e-5)
    assert float(found.vision[last].attention[:, :16, 16:].max()) == 0  # no item sees another


def test_what_is_not_there_is_refused_and_what_is_not_asked_for_is_left_out(shown):
    kimi, tokens, _ = shown("k2")
    with pytest.raises(ValueError, match="layers has 2, expected numbers from 0 to 1"):
        look(kimi, tokens, layers=[2])
    with pytest.raises(ValueError, match="what has 'heads', expected some of hidden"):
        look(kimi, tokens, what=["heads"])
    with pytest.raises(ValueError, match="token ids lie between"):
        look(kimi, tokens + 10**6)
    assert list(look(kimi, tokens, layers=[1], what=["hidden"]).hidden) == [1]
