"""MoonViT-3D (Kimi K2.5, arXiv 2602.02276) and MoonViT-V2 (Kimi K3, arXiv 2607.24653), and their projectors: patches of
images and video chunks -> embeddings.

Every item attends to itself alone, over all its frames; frames are averaged, 2 x 2 patches become one token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from kimi_jax.axes import Float, MediaTokens, Patches
from kimi_jax.config import VisionConfig
from kimi_jax.model import rope
from kimi_jax.model.norm import LayerNorm, RMSNorm
from kimi_jax.model.param import Init, Linear
from kimi_jax.model.vision_layout import PatchLayout
from pallas_kernels import mla_prefill


def make_norm(init: Init, config: VisionConfig) -> LayerNorm | RMSNorm:
    """Makes a norm of the tower, of the kind that the configuration names."""
    kind = RMSNorm if config.norm_type == "rmsnorm" else LayerNorm
    return kind(init, config.vt_hidden_size, config.norm_eps)


class PatchProjection(nnx.Module):
    """A convolution whose stride is its kernel: `weight` [width, 3, patch, patch]."""

    def __init__(self, init: Init, width: int, patch: int, bias: bool):
        self.weight = init.normal((width, 3, patch, patch), (None, None, None, None))
        self.bias = init.zeros((width,), (None,)) if bias else None

    def __call__(self, patches: Patches) -> Float[jax.Array, "p width"]:
        y = jnp.einsum("pcij,ocij->po", patches, self.weight[...], preferred_element_type=jnp.float32)
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(patches.dtype)


class PositionTable(nnx.Module):
    """`weight` [height, width, channels], resampled to each item's grid."""

    def __init__(self, init: Init, config: VisionConfig):
        shape = (config.init_pos_emb_height, config.init_pos_emb_width, config.vt_hidden_size)
        self.weight = init.normal(shape, (None, None, None))

    def __call__(self, layout: PatchLayout) -> Float[jax.Array, "p width"]:
        cells = rearrange(self.weight[...], "h w d -> (h w) d")[layout.taps_index]
        return jnp.einsum("pnd,pn->pd", cells, layout.taps_weight, preferred_element_type=jnp.float32)


class PatchEmbed(nnx.Module):
    """Patches, plus embeddings of their place and time."""

    def __init__(self, init: Init, config: VisionConfig):
        self.proj = PatchProjection(init, config.vt_hidden_size, config.patch_size, config.bias)
        self.pos_emb = PositionTable(init, config)

    def __call__(self, patches: Patches, layout: PatchLayout) -> Float[jax.Array, "p width"]:
        x = self.proj(patches)
        return x + (self.pos_emb(layout) + layout.time).astype(x.dtype)


class VisionMLP(nnx.Module):
    """fc1(gelu_tanh(fc0 x))."""

    def __init__(self, init: Init, width: int, hidden: int, bias: bool):
        self.fc0 = Linear(init, hidden, width, (None, None), bias=bias)
        self.fc1 = Linear(init, width, hidden, (None, None), bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc1(jax.nn.gelu(self.fc0(x), approximate=True))


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP; attention is bidirectional within an item."""

    def __init__(self, init: Init, config: VisionConfig):
        width, of_heads = config.vt_hidden_size, config.attention_width
        self.heads = config.vt_num_attention_heads
        self.norm0 = make_norm(init, config)
        self.wqkv = Linear(init, 3 * of_heads, width, (None, None), bias=config.bias)
        self.wo = Linear(init, width, of_heads, (None, None), bias=config.bias)
        self.norm1 = make_norm(init, config)
        self.mlp = VisionMLP(init, width, config.vt_intermediate_size, config.bias)

    def __call__(self, x: Float[jax.Array, "p width"], layout: PatchLayout) -> Float[jax.Array, "p width"]:
        x = x + self.wo(self.attention(self.wqkv(self.norm0(x)), layout))
        return x + self.mlp(self.norm1(x))

    def attention(self, qkv: Float[jax.Array, "p qkv"], layout: PatchLayout) -> Float[jax.Array, "p heads"]:
        q, k, v = rearrange(qkv, "p (qkv h k) -> qkv 1 p h k", qkv=3, h=self.heads)
        angles = jnp.asarray(layout.angles)[None, :, None, :]
        q, k = rope.rotate(q, angles), rope.rotate(k, angles)
        segment = jnp.asarray(layout.segment)[None]
        everywhere = jnp.zeros_like(segment)  # with one position for all, causal attention hides nothing
        out = mla_prefill(
            q,
            k,
            v,
            q_positions=everywhere,
            kv_positions=everywhere,
            q_segments=segment,
            kv_segments=segment,
            scale=q.shape[-1] ** -0.5,
        )
        assert isinstance(out, jax.Array)  # and no log-sum-exp with it
        return rearrange(out, "1 p h k -> p (h k)")


class Encoder(nnx.Module):
    """The blocks and their last norm."""

    def __init__(self, init: Init, config: VisionConfig):
        self.blocks = nnx.List([VisionBlock(init, config) for _ in range(config.vt_num_hidden_layers)])
        self.final_layernorm = make_norm(init, config)

    def __call__(self, x: Float[jax.Array, "p width"], layout: PatchLayout) -> Float[jax.Array, "p width"]:
        for block in self.blocks:
            x = block(x, layout)
        return self.final_layernorm(x)


class VisionTower(nnx.Module):
    """Patches -> [tokens, kernel cells, width]: frames averaged, the cells of the merge kernel side by side."""

    def __init__(self, init: Init, config: VisionConfig):
        self.patch_embed = PatchEmbed(init, config)
        self.encoder = Encoder(init, config)

    def __call__(self, patches: Patches, layout: PatchLayout) -> Float[jax.Array, "m cells width"]:
        x = self.encoder(self.patch_embed(patches, layout), layout)
        frames = x[layout.merge_index]
        merged = jnp.einsum("mcfd,mcf->mcd", frames, layout.merge_weight, preferred_element_type=jnp.float32)
        return merged.astype(x.dtype)


def exact_gelu(x: jax.Array) -> jax.Array:
    """Computes x Φ(x). (Equal models share compiled code, as they would not with a lambda of their own.)"""
    return jax.nn.gelu(x, approximate=False)


class Projector(nnx.Module):
    """proj.2(gelu(proj.0(concat(pre_norm(cells))))) with biases, or of MoonViT-V2 without them
    post_norm(proj.2(gelu(proj.0(concat(cells))))); with the exact GELU."""

    def __init__(self, init: Init, config: VisionConfig):
        cells = config.merge_kernel_size[0] * config.merge_kernel_size[1]
        width = cells * config.mm_hidden_size
        second = config.mm_projector_type == "patchmergerv2"
        self.pre_norm = None if second else LayerNorm(init, config.mm_hidden_size, config.projector_ln_eps)
        self.proj: nnx.List[Any] = nnx.List(
            [
                Linear(init, width, width, (None, None), bias=not second),
                exact_gelu,
                Linear(init, config.text_hidden_size, width, ("embed", None), bias=not second),
            ]
        )
        self.post_norm = RMSNorm(init, config.text_hidden_size, config.projector_ln_eps) if second else None

    def __call__(self, x: Float[jax.Array, "m cells width"]) -> MediaTokens:
        x = rearrange(x if self.pre_norm is None else self.pre_norm(x), "m cells d -> m (cells d)")
        first, activation, second = self.proj
        y = second(activation(first(x)))
        return y if self.post_norm is None else self.post_norm(y)
