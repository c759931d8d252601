"""Reads the language model's fields, which are at the top of the file or in `text_config`."""

from kimi_jax.config import LinearAttnConfig, QuantizationConfig, TextConfig
from kimi_jax.config_json.fields import Fields
from kimi_jax.config_json.keys import (
    LINEAR_ALIASES,
    MAX_EXPERTS,
    MAX_HEADS,
    MAX_KERNEL,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    NEUTRAL_SAMPLING,
    ONLY_TEXT,
)
from kimi_jax.config_json.rope import rope
from kimi_jax.families import Family

DTYPES = ("bfloat16", "float32", "float16")
_KDA, _MLA = "linear_attention", "full_attention"
_SITU, _SITU_BOUNDS = "situ", ("activation_situ_beta", "activation_situ_linear_beta")
# The bounds of a log-decay that the reference implementations take. A step keeps e^-5 of a state at the least.
_LOWEST_BOUND, _HIGHEST_BOUND = -5.0, -1e-3


def text(fields: Fields, family: Family, quantization: QuantizationConfig | None) -> TextConfig:
    """Returns the configuration of a language model of `family`. Raises `ConfigError` for a missing or impossible
    field, and for one that asks for another model."""
    for name, values in ONLY_TEXT.items():
        fields.only(name, *values)
    fields.neutral(NEUTRAL_SAMPLING)
    layers = fields.integer("num_hidden_layers", least=1, most=MAX_LAYERS)
    vocab_size = fields.integer("vocab_size", least=1, most=MAX_VOCAB)
    pad = fields.token_id("pad_token_id", vocab_size)
    theta, yarn = rope(fields)
    bounds = _activation_bounds(fields)
    config = TextConfig(
        model_type=fields.raw("model_type"),
        family=family.name,
        vocab_size=vocab_size,
        hidden_size=_width(fields, "hidden_size"),
        num_hidden_layers=layers,
        num_attention_heads=fields.integer("num_attention_heads", least=1, most=MAX_HEADS),
        intermediate_size=_width(fields, "intermediate_size"),
        kv_lora_rank=_width(fields, "kv_lora_rank"),
        qk_nope_head_dim=_width(fields, "qk_nope_head_dim"),
        qk_rope_head_dim=_width(fields, "qk_rope_head_dim"),
        v_head_dim=_width(fields, "v_head_dim"),
        max_position_embeddings=fields.integer("max_position_embeddings", least=1, most=MAX_POSITIONS),
        rms_norm_eps=fields.number("rms_norm_eps", most=1.0),
        bos_token_id=fields.token_id("bos_token_id", vocab_size),
        pad_token_id=0 if pad is None else pad,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        q_lora_rank=_width(fields, "q_lora_rank") if fields.has("q_lora_rank") else None,
        mla_inner_norm_eps=fields.number("mla_inner_norm_eps", 1e-6, most=1.0),
        mla_use_nope=fields.flag("mla_use_nope", family.config.no_rotation),
        mla_use_output_gate=fields.flag("mla_use_output_gate", False),
        rope_theta=theta,
        rope_scaling=yarn,
        n_routed_experts=fields.integer("n_routed_experts", 0, most=MAX_EXPERTS),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 0, most=MAX_EXPERTS),
        n_shared_experts=fields.integer("n_shared_experts", 0, most=MAX_EXPERTS),
        moe_intermediate_size=fields.integer("moe_intermediate_size", 0, most=MAX_WIDTH),
        routed_expert_hidden_size=_expert_width(fields),
        first_k_dense_replace=fields.integer("first_k_dense_replace", _dense_layers(fields, layers), most=MAX_LAYERS),
        moe_layer_freq=fields.integer("moe_layer_freq", 1, least=1, most=MAX_LAYERS),
        n_group=fields.integer("n_group", 1, most=MAX_EXPERTS),
        topk_group=fields.integer("topk_group", 1, most=MAX_EXPERTS),
        norm_topk_prob=fields.flag("norm_topk_prob", True),
        routed_scaling_factor=fields.number("routed_scaling_factor", 1.0),
        activation_situ_beta=bounds[0],
        activation_situ_linear_beta=bounds[1],
        attn_res_block_size=_snapshots(fields),
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", 0, most=MAX_LAYERS),
        initializer_range=fields.number("initializer_range", 0.02),
        dtype=fields.word("dtype", DTYPES, "bfloat16"),
        linear_attn=_linear_attention(fields, family, layers),
        quantization=quantization,
    )
    check_attention(fields, config)
    _check_experts(fields, config)
    return config


def _width(fields: Fields, name: str) -> int:
    return fields.integer(name, least=1, most=MAX_WIDTH)


def _activation_bounds(fields: Fields) -> tuple[float | None, float | None]:
    """Returns the two bounds of SiTU-GLU, None for SwiGLU, which has none."""
    if fields.word("hidden_act", ("silu", _SITU), "silu") != _SITU:
        for name in _SITU_BOUNDS:
            fields.only(name)
        return None, None
    linear = fields.number(_SITU_BOUNDS[1]) if fields.has(_SITU_BOUNDS[1]) else None
    return fields.number(_SITU_BOUNDS[0]), linear


def _expert_width(fields: Fields) -> int | None:
    """Returns the width of latent experts, None where experts have the stream's."""
    if not fields.has("routed_expert_hidden_size"):
        fields.only("latent_moe_use_norm", False)
        return None
    fields.only("latent_moe_use_norm", True)
    return _width(fields, "routed_expert_hidden_size")


def _snapshots(fields: Fields) -> int | None:
    if not fields.has("attn_res_block_size"):
        return None
    return fields.integer("attn_res_block_size", least=1, most=MAX_LAYERS)


def check_attention(fields: Fields, text: TextConfig) -> None:
    """Raises `ConfigError` where fields of MLA's heads contradict one another."""
    heads = fields.integer("num_key_value_heads", text.num_attention_heads, most=MAX_HEADS)
    fields.check(
        heads == text.num_attention_heads,
        f"num_key_value_heads {heads} differs from num_attention_heads {text.num_attention_heads}",
    )
    fields.check(text.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim {text.qk_rope_head_dim} is odd; RoPE turns pairs")
    fields.only("qk_head_dim", text.qk_head_dim)
    # transformers rotates head_dim channels; older files set it to hidden_size / num_attention_heads; NoPE ignores it
    known = (text.qk_rope_head_dim, text.qk_head_dim, text.hidden_size // text.num_attention_heads)
    if not (fields.has("head_dim") and text.mla_use_nope):
        fields.only("head_dim", *known)


def _check_experts(fields: Fields, text: TextConfig) -> None:
    if not (fields.flag("use_grouped_topk", True) or text.n_group == 1):
        fields.only("use_grouped_topk", True)
    kinds = tuple("sparse" if text.is_moe(i) else "dense" for i in range(text.num_hidden_layers))
    if fields.has("mlp_layer_types"):
        found = fields.words("mlp_layer_types", ("dense", "sparse"), text.num_hidden_layers)
        fields.check(
            found == kinds, "mlp_layer_types contradicts first_k_dense_replace, moe_layer_freq or n_routed_experts"
        )
    if "sparse" not in kinds:
        return
    experts, groups = text.n_routed_experts, text.n_group
    fields.check(text.moe_intermediate_size > 0, "moe_intermediate_size is missing")
    fields.check(
        groups > 0 and experts % groups == 0, f"n_routed_experts {experts} is not a multiple of n_group {groups}"
    )
    fields.check(0 < text.topk_group <= groups, f"topk_group {text.topk_group} is not between 1 and n_group {groups}")
    fields.check(
        groups == 1 or experts // groups >= 2, f"n_group {groups} leaves fewer than 2 of {experts} experts to a group"
    )
    eligible = experts // groups * text.topk_group
    fields.check(
        0 < text.num_experts_per_tok <= eligible,
        f"num_experts_per_tok {text.num_experts_per_tok} is not between 1 and {eligible}, all that topk_group leaves",
    )
    if text.quantization is not None:
        inputs = "hidden_size" if text.routed_expert_hidden_size is None else "routed_expert_hidden_size"
        for name in (inputs, "moe_intermediate_size"):
            width = getattr(text, name)
            fields.check(
                width % text.quantization.group_size == 0,
                f"{name} {width} is not a multiple of the quantisation's group_size {text.quantization.group_size}",
            )


def _dense_layers(fields: Fields, layers: int) -> int:
    """Returns the number of layers before the first with experts in transformers 5's list, 0 without the list."""
    if not fields.has("mlp_layer_types"):
        return 0
    kinds = fields.words("mlp_layer_types", ("dense", "sparse"), layers)
    return kinds.index("sparse") if "sparse" in kinds else layers


def _linear_attention(fields: Fields, family: Family, layers: int) -> LinearAttnConfig | None:
    """Returns the layers of KDA and their heads: of `linear_attn_config`, or of transformers 5's `layer_types` and
    `linear_...` keys."""
    kinds = fields.words("layer_types", (_KDA, _MLA), layers) if fields.has("layer_types") else None
    inner = fields.object("linear_attn_config", LINEAR_ALIASES)
    if inner is None:
        fields.check(not family.config.needs_kda or kinds is not None, "linear_attn_config is missing")
        if kinds is None or _KDA not in kinds:
            return None
        inner = Fields({}, fields.where)
    inner.adopt(fields, LINEAR_ALIASES)
    if inner.has("kda_layers") or inner.has("full_attn_layers") or kinds is None:
        limits = {"least": 1, "most": layers, "longest": layers}
        kda, full = inner.integers("kda_layers", **limits), inner.integers("full_attn_layers", **limits)
        inner.check(
            sorted(kda + full) == list(range(1, layers + 1)),
            f"kda_layers and full_attn_layers must name each of the layers 1 to {layers} once",
        )
        fields.check(
            kinds is None or all((kind == _KDA) == (i in kda) for i, kind in enumerate(kinds, 1)),
            "layer_types contradicts linear_attn_config",
        )
    else:
        kda = tuple(i for i, kind in enumerate(kinds, 1) if kind == _KDA)
        full = tuple(i for i, kind in enumerate(kinds, 1) if kind == _MLA)
    config = LinearAttnConfig(
        kda_layers=kda,
        full_attn_layers=full,
        num_heads=inner.integer("num_heads", least=1, most=MAX_HEADS),
        head_dim=_width(inner, "head_dim"),
        short_conv_kernel_size=inner.integer("short_conv_kernel_size", least=1, most=MAX_KERNEL),
        gate_lower_bound=_lower_bound(inner),
        use_full_rank_gate=inner.flag("use_full_rank_gate", False),
    )
    inner.nothing_else()
    return config


def _lower_bound(fields: Fields) -> float | None:
    if not fields.has("gate_lower_bound"):
        return None
    return fields.number("gate_lower_bound", least=_LOWEST_BOUND, above=False, most=_HIGHEST_BOUND)
