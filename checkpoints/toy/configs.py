"""Configurations of toys: small ones of every family, and the published ones cut down."""

import json
from collections.abc import Mapping
from copy import deepcopy
from importlib import resources
from typing import Any

from checkpoints.published.quantization_config import int4, mxfp4
from kimi_jax.config_json import preset_names
from kimi_jax.families import family_of, text_fields
from kimi_jax.families.k3 import K3
from kimi_jax.text.tiny import K3_SLOTS, K25_SLOTS, Slots

TINY_VOCAB = 768
SPECIAL_SLOTS = 256  # the last ids of a vocabulary
# Kimi-K2.5's own list.
_IGNORE = ("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*")
# Kimi K3's.
_K3_IGNORE = (*_IGNORE[1:], "re:.*lm_head.*", "re:.*vision_tower.*", "re:.*mm_projector.*")

# fmt: off
_YARN = {
    "type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "dtype": "bfloat16",
    "vocab_size": TINY_VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24, "attention_bias": False, "attention_dropout": 0.0,
    "moe_intermediate_size": 256, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.827, "aux_loss_alpha": 0.001,
    "seq_aux": True, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 131072,
    "rope_theta": 50000.0, "rope_scaling": _YARN, "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
    "initializer_range": 0.02, "use_cache": True, "quantization_config": None,
}
_K25 = {
    "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "dtype": "bfloat16",
    "ignore_index": -100, "use_unified_vision_chunk": True, "tie_word_embeddings": False,
    "video_placeholder": "<|kimi_k25_video_placeholder|>",
    "text_config": _K2 | {
        "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "quantization_config": int4(_IGNORE),
        "rope_scaling": _YARN | {"factor": 64.0, "beta_fast": 32.0},
    },
    "vision_config": {
        "patch_size": 14, "vt_hidden_size": 96, "vt_intermediate_size": 160, "vt_num_attention_heads": 4,
        "vt_num_hidden_layers": 2, "init_pos_emb_height": 8, "init_pos_emb_width": 8, "init_pos_emb_time": 4,
        "pos_emb_type": "divided_fixed", "merge_kernel_size": [2, 2], "merge_type": "sd2_tpool",
        "video_attn_type": "spatial_temporal", "mm_projector_type": "patchmerger", "mm_hidden_size": 96,
        "projector_hidden_act": "gelu", "projector_ln_eps": 1e-5, "text_hidden_size": 256,
    },
}
_LINEAR = {
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "dtype": "bfloat16",
    "vocab_size": TINY_VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32, "q_lora_rank": None, "kv_lora_rank": 64,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24, "mla_use_nope": True,
    "linear_attn_config": {
        "full_attn_layers": [4, 6], "kda_layers": [1, 2, 3, 5], "head_dim": 32, "num_heads": 8,
        "short_conv_kernel_size": 4,
    },
    "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_token": 4, "num_shared_experts": 1,
    "num_expert_group": 1, "topk_group": 1, "use_grouped_topk": True, "moe_layer_freq": 1, "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid", "first_k_dense_replace": 1, "routed_scaling_factor": 2.446,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
    "model_max_length": 1048576, "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
    "initializer_range": 0.02, "use_cache": True,
}
_K3 = {
    "architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "dtype": "bfloat16",
    "ignore_index": -100, "tie_word_embeddings": False, "image_placeholder": "<|kimi_image_placeholder|>",
    "text_config": {
        "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "dtype": "bfloat16",
        "vocab_size": TINY_VOCAB, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 48, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "mla_use_nope": True,
        "mla_use_output_gate": True,
        "linear_attn_config": {
            "full_attn_layers": [4, 5], "kda_layers": [1, 2, 3], "head_dim": 16, "num_heads": 4,
            "short_conv_kernel_size": 4, "gate_lower_bound": -5.0, "use_full_rank_gate": True,
        },
        "num_experts": 8, "num_experts_per_token": 3, "num_shared_experts": 2, "moe_intermediate_size": 64,
        "moe_layer_freq": 1, "first_k_dense_replace": 1, "routed_expert_hidden_size": 64, "latent_moe_use_norm": True,
        "moe_router_activation_func": "sigmoid", "topk_method": "noaux_tc", "use_grouped_topk": True,
        "num_expert_group": 1, "topk_group": 1, "moe_renormalize": True, "routed_scaling_factor": 1.0,
        "hidden_act": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0,
        "attn_res_block_size": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.02, "max_position_embeddings": 1048576,
        "num_nextn_predict_layers": 0, "use_cache": True, "tie_word_embeddings": False,
        "quantization_config": mxfp4(_K3_IGNORE),
    },
    "vision_config": {
        "patch_size": 14, "init_pos_emb_height": 8, "init_pos_emb_width": 8, "init_pos_emb_time": 4,
        "pos_emb_type": "divided_fixed", "pos_emb_interpolation_mode": "bilinear", "vt_hidden_size": 48,
        "vt_num_hidden_layers": 3, "vt_num_attention_heads": 4, "qkv_hidden_size": 64, "vt_intermediate_size": 96,
        "norm_type": "rmsnorm", "mlp_type": "mlp2", "activation_func": "gelu_pytorch_tanh", "attn_bias": False,
        "linear_bias": False, "patch_embed_proj_bias": False, "merge_kernel_size": [2, 2], "merge_type": "sd2_tpool",
        "mm_projector_type": "patchmergerv2", "mm_hidden_size": 48, "projector_hidden_act": "gelu",
        "projector_ln_eps": 1e-5, "text_hidden_size": 96,
    },
}
_K25_MEDIA = {
    "in_patch_limit": 16384, "patch_size": 14, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "merge_kernel_size": 2, "fixed_output_tokens": None, "patch_limit_on_one_side": 512,
    "in_patch_limit_each_frame": 4096, "in_patch_limit_video": None, "sample_fps": 2.0,
    "max_num_frames_each_video": None, "temporal_merge_kernel_size": 4, "timestamp_mode": "hh:mm:ss.fff",
}
_K3_MEDIA = {
    "in_patch_limit": 65536, "patch_size": 14, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "merge_kernel_size": 2, "fixed_output_tokens": None, "patch_limit_on_one_side": 512,
    "in_patch_limit_each_frame": 16384, "sample_fps": 8.0, "temporal_merge_kernel_size": 4,
    "transparent_bg_config": {
        "pattern": "chessboard", "chessboard_square_size": 8, "chessboard_square_on_top_left": True,
        "chessboard_white_value": 255, "chessboard_gray_value": 180,
    },
    "transparent_bg_fill_stage": "after_resize",
}
# fmt: on


def toy_config(like: str, **overrides: Any) -> dict[str, Any]:
    """Returns a published-format config.json (as a dict): of a small model of the families k3, k2.5, k2 and
    kimi-linear, or of a preset at its real widths (kimi-k2.5, kimi-k2, ...).

    An override replaces the field of that name wherever it stands (text_config and vision_config included); what has
    to agree follows it: the token ids sit in the last 256 of `vocab_size`, the vision tower's `text_hidden_size` is
    the text model's `hidden_size`, and `mm_hidden_size` the tower's. `quantization_config=None` gives bf16 experts.

    Raises ValueError for an unknown name, and for a field that its config does not have.
    """
    small = {"k3": _K3, "k2.5": _K25, "k2": _K2, "kimi-linear": _LINEAR}
    presets = resources.files("kimi_jax") / "presets"
    if like in small:
        config: dict[str, Any] = deepcopy(small[like])
    elif like in preset_names():
        config = json.loads((presets / like / "config.json").read_text())
        config.pop("_comment", None)
    else:
        raise ValueError(f"toy_config: like={like!r}, expected one of {sorted([*small, *preset_names()])}")
    parts = [config, *(config[key] for key in ("text_config", "vision_config") if key in config)]
    for name, value in overrides.items():
        homes = [part for part in parts if name in part]
        if not homes:
            raise ValueError(f"toy_config: a {like} config has no field {name!r}")
        for part in homes:
            part[name] = deepcopy(value)
    text = text_fields(config)
    if text.get("quantization_config", ...) is None:
        del text["quantization_config"]
    first_special = text["vocab_size"] - SPECIAL_SLOTS
    im_end = first_special + 2
    # As released: K2 stops at [EOS], Kimi Linear at <|im_end|>, and K2.5's two levels each name one of them.
    ids = {"bos_token_id": first_special, "eos_token_id": first_special + 1, "pad_token_id": text["vocab_size"] - 1}
    text.update(ids | ({"eos_token_id": im_end} if "linear_attn_config" in text else {}))
    if "vision_config" in config:
        config.update(ids | {"eos_token_id": im_end, "media_placeholder_token_id": first_special + 21})
        vision = config["vision_config"]
        vision.update(text_hidden_size=text["hidden_size"], mm_hidden_size=vision["vt_hidden_size"])
    return config


def preprocessor(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preprocessor_config.json of a model with vision, as its family publishes it."""
    return {"media_proc_cfg": deepcopy(_K3_MEDIA if _is_k3(config) else _K25_MEDIA)}


def slots(config: Mapping[str, Any]) -> Slots:
    """Returns the names of the special ids, as the family of `config` has them."""
    return K3_SLOTS if _is_k3(config) else K25_SLOTS


def _is_k3(config: Mapping[str, Any]) -> bool:
    family = family_of(config)
    return family is not None and family.name == K3.name


def cut_config(
    config: Mapping[str, Any],
    *,
    layers: int | None = None,
    experts: int | None = None,
    vision_layers: int | None = None,
) -> dict[str, Any]:
    """Returns `config` with only its first `layers`, `experts` of each and `vision_layers`; None leaves all of them.

    Raises ValueError for more than there are, and for fewer than one.
    """
    cut = deepcopy(dict(config))
    text, vision = text_fields(cut), cut.get("vision_config", {})
    counts = (
        (text, "num_hidden_layers", layers),
        (text, "num_experts" if "num_experts" in text else "n_routed_experts", experts),
        (vision, "vt_num_hidden_layers", vision_layers),
    )
    for part, name, count in counts:
        if count is None:
            continue
        if not 1 <= count <= part.get(name, 0):
            raise ValueError(f"{name} cannot be {count}: expected 1 to {part.get(name, 0)}, which the model has")
        part[name] = count
    if layers is not None and (attention := text.get("linear_attn_config")):
        for kind in ("kda_layers", "full_attn_layers"):
            attention[kind] = [layer for layer in attention[kind] if layer <= layers]
    if experts is not None:
        chosen = "num_experts_per_token" if "num_experts_per_token" in text else "num_experts_per_tok"
        text[chosen] = min(text[chosen], experts)
    return cut
