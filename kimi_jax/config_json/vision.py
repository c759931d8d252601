"""Reads `vision_config`: MoonViT-3D or MoonViT-V2, and its projector."""

from typing import Any

from kimi_jax.config import TextConfig, VisionConfig
from kimi_jax.config_json.fields import Fields
from kimi_jax.config_json.keys import (
    MAX_GRID,
    MAX_HEADS,
    MAX_KERNEL,
    MAX_LAYERS,
    MAX_WIDTH,
    ONLY_VISION,
)

# The reference code's constant, and the value with which torch's RMSNorm computes where it is given none: float32's
# epsilon, of inputs in bf16 too (measured with torch 2.13).
LAYER_NORM_EPS, TORCH_RMS_NORM_EPS = 1e-5, 1.1920929e-7
_BIASES = ("attn_bias", "linear_bias", "patch_embed_proj_bias")


def vision(fields: Fields, text: TextConfig) -> VisionConfig:
    """Returns the vision tower of a model whose language model is `text`. Raises `ConfigError` for a missing or
    impossible field, and for one that asks for another tower."""
    for name, values in ONLY_VISION.items():
        fields.only(name, *values)
    _only_own_rotation(fields)
    merge = fields.integers("merge_kernel_size", least=1, most=MAX_KERNEL, longest=2)
    fields.check(len(merge) == 2, f"merge_kernel_size is {list(merge)}, expected two positive numbers")
    hidden = fields.integer("vt_hidden_size", least=1, most=MAX_WIDTH)
    bias, own_width = _bias(fields), fields.has("qkv_hidden_size")
    norm: Any = fields.word("norm_type", ("layernorm", "rmsnorm"), "layernorm")
    mode: Any = fields.word("pos_emb_interpolation_mode", ("bicubic", "bilinear"), "bicubic")
    projector: Any = fields.word("mm_projector_type", ("patchmerger", "patchmergerv2"), "patchmerger")
    config = VisionConfig(
        patch_size=fields.integer("patch_size", least=1, most=MAX_KERNEL),
        vt_hidden_size=hidden,
        vt_num_hidden_layers=fields.integer("vt_num_hidden_layers", least=1, most=MAX_LAYERS),
        vt_num_attention_heads=fields.integer("vt_num_attention_heads", least=1, most=MAX_HEADS),
        vt_intermediate_size=fields.integer("vt_intermediate_size", least=1, most=MAX_WIDTH),
        init_pos_emb_height=fields.integer("init_pos_emb_height", least=1, most=MAX_GRID),
        init_pos_emb_width=fields.integer("init_pos_emb_width", least=1, most=MAX_GRID),
        init_pos_emb_time=fields.integer("init_pos_emb_time", least=1, most=MAX_GRID),
        merge_kernel_size=(merge[0], merge[1]),
        mm_hidden_size=fields.integer("mm_hidden_size", hidden, most=MAX_WIDTH),
        text_hidden_size=fields.integer("text_hidden_size", text.hidden_size, most=MAX_WIDTH),
        qkv_hidden_size=fields.integer("qkv_hidden_size", least=1, most=MAX_WIDTH) if own_width else None,
        pos_emb_interpolation_mode=mode,
        norm_type=norm,
        norm_eps=fields.number("rms_norm_eps", TORCH_RMS_NORM_EPS, most=1.0) if norm == "rmsnorm" else LAYER_NORM_EPS,
        bias=bias,
        mm_projector_type=projector,
        projector_ln_eps=fields.number("projector_ln_eps", 1e-5, most=1.0),
    )
    heads, width = config.vt_num_attention_heads, config.attention_width
    name = "qkv_hidden_size" if own_width else "vt_hidden_size"
    fields.check(
        width % (4 * heads) == 0,
        f"{name} {width} does not give vt_num_attention_heads {heads} heads of a width that divides by 4",
    )
    fields.check(hidden % 2 == 0, f"vt_hidden_size {hidden} is odd; the time embedding has pairs of sine and cosine")
    fields.check(
        config.mm_hidden_size == hidden, f"mm_hidden_size {config.mm_hidden_size} differs from vt_hidden_size {hidden}"
    )
    fields.check(
        config.text_hidden_size == text.hidden_size,
        f"text_hidden_size {config.text_hidden_size} differs from text_config.hidden_size {text.hidden_size}",
    )
    return config


def _bias(fields: Fields) -> bool:
    """Says whether the tower has biases. Its three flags have to agree."""
    flags = {name: fields.flag(name, True) for name in _BIASES}
    fields.check(
        len(set(flags.values())) == 1,
        f"{', '.join(_BIASES)} are {', '.join(str(flag).lower() for flag in flags.values())}, expected all alike",
    )
    return flags[_BIASES[0]]


def _only_own_rotation(fields: Fields) -> None:
    """Refuses any value of transformers 5's `rope_parameters` but the tower's rotation along both axes, base 10000."""
    if (inner := fields.object("rope_parameters")) is not None:
        inner.only("rope_type", "axial", "default")
        inner.only("rope_theta", 10000.0)
        inner.nothing_else()
