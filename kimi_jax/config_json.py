"""Reads a published config.json into `config`'s dataclasses.

Nothing is known per release: a value is read, defaulted where the reference implementation defaults it, or refused
by the name of its file and field.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kimi_jax.config import (
    KimiConfig,
    LinearAttnConfig,
    QuantizationConfig,
    TextConfig,
    VisionConfig,
    YarnConfig,
)

TEXT_MODEL_TYPES = ("kimi_k2", "deepseek_v3", "kimi_linear")
MODEL_TYPES = (*TEXT_MODEL_TYPES, "kimi_k25")

# Kimi Linear's spelling -> DeepSeek-V3's.
_LINEAR_NAMES = {
    "num_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "num_expert_group": "n_group",
    "moe_router_activation_func": "scoring_func",
    "moe_renormalize": "norm_topk_prob",
    "model_max_length": "max_position_embeddings",
}


class ConfigError(ValueError):
    """A config.json that this package cannot honour; the message names the file and the field."""


@runtime_checkable
class Folder(Protocol):
    """A Path, or what has files like one (a folder behind a URL)."""

    def __truediv__(self, name: str) -> Any: ...


def from_folder(folder: str | Folder) -> KimiConfig:
    """The configuration of the checkpoint in `folder` (`config.json`, and `generation_config.json` where there is one).

    Raises `ConfigError` naming the file and the field for anything missing, unknown or inconsistent.
    """
    folder = Path(folder) if isinstance(folder, str) else folder
    path, generation = folder / "config.json", folder / "generation_config.json"
    return from_dict(_read(path), _read(generation) if generation.exists() else {}, where=str(path))


def preset(name: str) -> KimiConfig:
    """A published model's configuration by name; `preset_names()` lists them."""
    if name not in preset_names():
        raise ConfigError(f"no preset {name!r}; there are {', '.join(preset_names())}")
    with resources.as_file(resources.files("kimi_jax") / "presets" / name) as folder:
        return from_folder(folder)


def preset_names() -> list[str]:
    presets = resources.files("kimi_jax") / "presets"
    return sorted(p.name for p in presets.iterdir() if (p / "config.json").is_file())


def from_dict(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None, *, where: str = "config.json"
) -> KimiConfig:
    """The same from the parsed contents of config.json and generation_config.json; `where` names the file in errors."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"{where}: model_type {model_type!r} is none of {', '.join(MODEL_TYPES)}")
    if model_type == "kimi_k25":
        fields = _Fields(config, where)
        text_fields = _Fields(fields.require("text_config", dict), f"{where}: text_config")
        if (text_type := text_fields.require("model_type", str)) not in TEXT_MODEL_TYPES:
            raise ConfigError(f"{where}: text_config.model_type {text_type!r} is none of {', '.join(TEXT_MODEL_TYPES)}")
        quantization = config.get("quantization_config")
        text = _text(text_fields, quantization)
        vision = _vision(_Fields(fields.require("vision_config", dict), f"{where}: vision_config"), text)
        placeholder = fields.require("media_placeholder_token_id", int)
        fields.only("tie_word_embeddings", False)
        if not 0 <= placeholder < text.vocab_size:
            raise ConfigError(
                f"{where}: media_placeholder_token_id {placeholder} is outside vocab_size {text.vocab_size}"
            )
    else:
        text, vision, placeholder = _text(_Fields(config, where), None), None, None
    sources = (config.get("eos_token_id"), text.eos_token_ids, (generation or {}).get("eos_token_id"))
    stop_ids = tuple(sorted({i for source in sources for i in _ids(source, where)}))
    return KimiConfig(model_type, text, stop_ids, vision, placeholder)


class _Fields:
    """Reads fields of one JSON object, naming them in errors as the file does (`spelling`: our name -> its name)."""

    def __init__(self, values: Mapping[str, Any], where: str, spelling: Mapping[str, str] | None = None):
        self.values, self.where, self.spelling = values, where, spelling or {}

    def named(self, name: str) -> str:
        return f"{self.where}: {self.spelling.get(name, name)}"

    def require(self, name: str, kind: type) -> Any:
        if self.values.get(name) is None:
            raise ConfigError(f"{self.named(name)} is missing")
        return self.get(name, kind, None)

    def get(self, name: str, kind: type, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.named(name)} is {value!r}, expected {kind.__name__}")
        return value

    def positive(self, name: str) -> int:
        value = self.require(name, int)
        if value <= 0:
            raise ConfigError(f"{self.named(name)} is {value}, expected a positive number")
        return value

    def only(self, name: str, *supported: Any) -> None:
        """Refuses a field whose value is given and is not among those supported."""
        if name in self.values and self.values[name] is not None and self.values[name] not in supported:
            raise ConfigError(
                f"{self.named(name)} {self.values[name]!r} is not supported; only {', '.join(map(repr, supported))}"
            )

    def check(self, holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(f"{self.where}: {message}")


def _text(fields: _Fields, quantization: Mapping[str, Any] | None) -> TextConfig:
    model_type = fields.values["model_type"]
    if model_type == "kimi_linear":
        renamed = {_LINEAR_NAMES.get(name, name): value for name, value in fields.values.items()}
        fields = _Fields(renamed, fields.where, {ours: theirs for theirs, ours in _LINEAR_NAMES.items()})
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("tie_word_embeddings", False)
    fields.only("mla_use_output_gate", False)
    _only_kda_of_kimi_linear(fields)
    dtype = fields.get("dtype", str, None) or fields.get("torch_dtype", str, "bfloat16")
    if dtype not in ("bfloat16", "float32", "float16"):
        raise ConfigError(f"{fields.where}: dtype {dtype!r} is none of bfloat16, float32, float16")
    text = TextConfig(
        model_type=model_type,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=fields.positive("hidden_size"),
        num_hidden_layers=fields.positive("num_hidden_layers"),
        num_attention_heads=fields.positive("num_attention_heads"),
        intermediate_size=fields.positive("intermediate_size"),
        kv_lora_rank=fields.positive("kv_lora_rank"),
        qk_nope_head_dim=fields.positive("qk_nope_head_dim"),
        qk_rope_head_dim=fields.positive("qk_rope_head_dim"),
        v_head_dim=fields.positive("v_head_dim"),
        max_position_embeddings=fields.positive("max_position_embeddings"),
        rms_norm_eps=fields.require("rms_norm_eps", float),
        bos_token_id=fields.get("bos_token_id", int, None),
        pad_token_id=fields.get("pad_token_id", int, 0),
        eos_token_ids=_ids(fields.values.get("eos_token_id"), fields.where),
        q_lora_rank=fields.get("q_lora_rank", int, None),
        mla_inner_norm_eps=fields.get("mla_inner_norm_eps", float, 1e-6),
        mla_use_nope=fields.get("mla_use_nope", bool, False),
        rope_theta=fields.get("rope_theta", float, 10000.0),
        rope_scaling=_yarn(fields),
        n_routed_experts=fields.get("n_routed_experts", int, 0),
        num_experts_per_tok=fields.get("num_experts_per_tok", int, 0),
        n_shared_experts=fields.get("n_shared_experts", int, 0),
        moe_intermediate_size=fields.get("moe_intermediate_size", int, 0),
        first_k_dense_replace=fields.get("first_k_dense_replace", int, 0),
        moe_layer_freq=fields.get("moe_layer_freq", int, 1),
        n_group=fields.get("n_group", int, 1),
        topk_group=fields.get("topk_group", int, 1),
        norm_topk_prob=fields.get("norm_topk_prob", bool, True),
        routed_scaling_factor=fields.get("routed_scaling_factor", float, 1.0),
        num_nextn_predict_layers=fields.get("num_nextn_predict_layers", int, 0),
        initializer_range=fields.get("initializer_range", float, 0.02),
        dtype=dtype,
        linear_attn=_linear_attn(fields),
        quantization=_quantization(fields, quantization),
    )
    _check_text(fields, text)
    return text


def _check_text(fields: _Fields, text: TextConfig) -> None:
    heads = fields.get("num_key_value_heads", int, text.num_attention_heads)
    fields.check(
        heads == text.num_attention_heads,
        f"num_key_value_heads {heads} differs from num_attention_heads {text.num_attention_heads}",
    )
    fields.check(text.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim {text.qk_rope_head_dim} is odd; RoPE turns pairs")
    fields.check(text.moe_layer_freq > 0, f"moe_layer_freq is {text.moe_layer_freq}, expected a positive number")
    if not any(map(text.is_moe, range(text.num_hidden_layers))):
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
        for name in ("hidden_size", "moe_intermediate_size"):
            width = getattr(text, name)
            fields.check(
                width % text.quantization.group_size == 0,
                f"{name} {width} is not a multiple of the quantisation's group_size {text.quantization.group_size}",
            )


def _yarn(fields: _Fields) -> YarnConfig | None:
    scaling = fields.get("rope_scaling", dict, None)
    if scaling is None:
        return None
    inner = _Fields(scaling, f"{fields.where}: rope_scaling")
    kind = scaling.get("type", scaling.get("rope_type"))
    inner.check(kind == "yarn", f"type {kind!r} is not supported; only 'yarn'")
    factor = inner.require("factor", float)
    inner.check(factor >= 1.0, f"factor is {factor}, expected at least 1")
    return YarnConfig(
        factor=factor,
        original_max_position_embeddings=inner.positive("original_max_position_embeddings"),
        beta_fast=inner.get("beta_fast", float, 32.0),
        beta_slow=inner.get("beta_slow", float, 1.0),
        mscale=inner.get("mscale", float, 1.0),
        mscale_all_dim=inner.get("mscale_all_dim", float, 0.0),
    )


def _linear_attn(fields: _Fields) -> LinearAttnConfig | None:
    values = fields.get("linear_attn_config", dict, None)
    if values is None:
        fields.check(fields.values["model_type"] != "kimi_linear", "linear_attn_config is missing")
        return None
    inner = _Fields(values, f"{fields.where}: linear_attn_config")
    kda, full = tuple(inner.require("kda_layers", list)), tuple(inner.require("full_attn_layers", list))
    layers = fields.positive("num_hidden_layers")
    inner.check(
        sorted(kda + full) == list(range(1, layers + 1)),
        f"kda_layers and full_attn_layers must name each of the layers 1 to {layers} once; found {sorted(kda + full)}",
    )
    return LinearAttnConfig(
        kda, full, inner.positive("num_heads"), inner.positive("head_dim"), inner.positive("short_conv_kernel_size")
    )


def _only_kda_of_kimi_linear(fields: _Fields) -> None:
    linear = fields.get("linear_attn_config", dict, None) or {}
    for name in ("gate_lower_bound", "use_full_rank_gate"):
        if linear.get(name):
            raise ConfigError(f"{fields.where}: linear_attn_config: {name} {linear[name]!r} is not supported")


def _quantization(fields: _Fields, outer: Mapping[str, Any] | None) -> QuantizationConfig | None:
    """`quantization_config` sits in text_config, at the top level, or in both. FP8 is a form of the stored tensors
    alone (every Linear has it, experts or not), so a model read from such a file is a dense one."""
    values = fields.get("quantization_config", dict, None) or outer
    if values is None:
        return None
    inner = _Fields(values, f"{fields.where}: quantization_config")
    inner.only("quant_method", "compressed-tensors", "fp8")
    if inner.require("quant_method", str) == "fp8":
        return None
    inner.only("format", "pack-quantized")
    groups = inner.require("config_groups", dict)
    inner.check(len(groups) == 1, f"config_groups names {sorted(groups)}, expected one group")
    ((name, group),) = groups.items()
    weights = _Fields((group or {}).get("weights") or {}, f"{inner.where}: {name}.weights")
    weights.only("type", "int")
    weights.only("strategy", "group")
    weights.only("symmetric", True)
    weights.only("num_bits", 4)
    size = weights.positive("group_size")
    weights.check(size == 32, f"group_size is {size}; only 32 is supported")
    return QuantizationConfig(group_size=size, num_bits=weights.get("num_bits", int, 4))


def _vision(fields: _Fields, text: TextConfig) -> VisionConfig:
    fields.only("pos_emb_type", "divided_fixed")
    fields.only("merge_type", "sd2_tpool")
    fields.only("video_attn_type", "spatial_temporal")
    fields.only("mm_projector_type", "patchmerger")
    fields.only("projector_hidden_act", "gelu")
    merge = tuple(fields.require("merge_kernel_size", list))
    fields.check(
        len(merge) == 2 and all(isinstance(m, int) and m > 0 for m in merge),
        f"merge_kernel_size is {list(merge)}, expected two positive numbers",
    )
    hidden = fields.positive("vt_hidden_size")
    vision = VisionConfig(
        patch_size=fields.positive("patch_size"),
        vt_hidden_size=hidden,
        vt_num_hidden_layers=fields.positive("vt_num_hidden_layers"),
        vt_num_attention_heads=fields.positive("vt_num_attention_heads"),
        vt_intermediate_size=fields.positive("vt_intermediate_size"),
        init_pos_emb_height=fields.positive("init_pos_emb_height"),
        init_pos_emb_width=fields.positive("init_pos_emb_width"),
        init_pos_emb_time=fields.positive("init_pos_emb_time"),
        merge_kernel_size=merge,
        mm_hidden_size=fields.get("mm_hidden_size", int, hidden),
        text_hidden_size=fields.get("text_hidden_size", int, text.hidden_size),
        projector_ln_eps=fields.get("projector_ln_eps", float, 1e-5),
    )
    heads = vision.vt_num_attention_heads
    fields.check(
        hidden % (4 * heads) == 0,
        f"vt_hidden_size {hidden} does not give vt_num_attention_heads {heads} heads of a width that divides by 4",
    )
    fields.check(
        vision.mm_hidden_size == hidden, f"mm_hidden_size {vision.mm_hidden_size} differs from vt_hidden_size {hidden}"
    )
    fields.check(
        vision.text_hidden_size == text.hidden_size,
        f"text_hidden_size {vision.text_hidden_size} differs from text_config.hidden_size {text.hidden_size}",
    )
    return vision


def _ids(value: Any, where: str) -> tuple[int, ...]:
    values = () if value is None else (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(i, int) for i in values):
        raise ConfigError(f"{where}: eos_token_id is {value!r}, expected a number or a list of numbers")
    return values


def _read(path: Any) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
