"""Small random checkpoints in the published layout, for tests, goldens and the demo.

Tensor names, shapes and dtypes are those of the released safetensors (Kimi-K2.5 and K2-Thinking with INT4 experts,
Kimi-K2 in bf16, Kimi-Linear-48B), so whatever reads a toy reads the real thing. Every tensor comes from its own
generator, seeded by (seed, crc32(name)): a toy is the same on every machine, and in whatever order it is made.
Weights have a standard deviation of about 1/sqrt(fan_in), which keeps activations and logits at unit scale; what a
norm follows at once is smaller (embeddings, low-rank latents), so that the norm's epsilon shows in the logits.

The INT4 convention is that of Kimi's quantisation-aware training: groups of 32 along the input dimension,
scale = bf16(amax / 7), q = clip(round_half_even(w / scale), -7, 7), stored as q + 8, eight to an int32, low nibble
first; a weight is read back as bf16(q * scale).
"""

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from kimi_jax.text.tiny import write_tiny_tokenizer

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
GROUP_SIZE = 32
_BEFORE_NORM = 0.1
TINY_VOCAB = 768

# fmt: off
_INT4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": None, "output_activations": None,
        "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE,
            "dynamic": False, "actorder": None, "observer": "minmax", "block_structure": None,
        },
    }},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
}
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
        "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "quantization_config": _INT4,
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
_PREPROCESSOR = {"media_proc_cfg": {
    "in_patch_limit": 16384, "patch_size": 14, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "merge_kernel_size": 2, "fixed_output_tokens": None, "patch_limit_on_one_side": 512,
    "in_patch_limit_each_frame": 4096, "in_patch_limit_video": None, "sample_fps": 2.0,
    "max_num_frames_each_video": None, "temporal_merge_kernel_size": 4, "timestamp_mode": "hh:mm:ss.fff",
}}
# fmt: on


def toy_config(like: str, **overrides: Any) -> dict[str, Any]:
    """A published-format config.json (as a dict) of a small model.

    An override replaces the field of that name wherever it stands (text_config and vision_config included); what has
    to agree follows it: the token ids sit in the last 256 of `vocab_size`, the vision tower's `text_hidden_size` is
    the text model's `hidden_size`, and `mm_hidden_size` the tower's. `quantization_config=None` gives bf16 experts.

    Raises ValueError for an unknown family, KeyError for a field that its config does not have.
    """
    bases = {"k2.5": _K25, "k2": _K2, "kimi-linear": _LINEAR}
    if like not in bases:
        raise ValueError(f"toy_config: like={like!r}, expected one of {sorted(bases)}")
    config: dict[str, Any] = deepcopy(bases[like])
    parts = [config, *(config[key] for key in ("text_config", "vision_config") if key in config)]
    for name, value in overrides.items():
        homes = [part for part in parts if name in part]
        if not homes:
            raise KeyError(f"toy_config: a {like} config has no field {name!r}")
        for part in homes:
            part[name] = deepcopy(value)
    text = config.get("text_config", config)
    if text.get("quantization_config", ...) is None:
        del text["quantization_config"]
    first_special = text["vocab_size"] - 256
    im_end = first_special + 2
    # As released: K2 stops at [EOS], Kimi Linear at <|im_end|>, and K2.5's two levels each name one of them.
    ids = {"bos_token_id": first_special, "eos_token_id": first_special + 1, "pad_token_id": text["vocab_size"] - 1}
    text.update(ids | ({"eos_token_id": im_end} if like == "kimi-linear" else {}))
    if like == "k2.5":
        config.update(ids | {"eos_token_id": im_end, "media_placeholder_token_id": first_special + 21})
        vision = config["vision_config"]
        vision.update(text_hidden_size=text["hidden_size"], mm_hidden_size=vision["vt_hidden_size"])
    return config


@dataclass(frozen=True)
class _Tensor:
    """One tensor before quantisation: `std` (by row, if an array) times a normal, around `mean`.

    A_log and dt_bias are instead drawn as at the start of training (arXiv 2510.26692).
    """

    name: str
    shape: tuple[int, ...]
    std: float | np.ndarray
    mean: float = 0.0
    dtype: np.dtype = BF16
    quantized: bool = False

    def float64(self, seed: int) -> np.ndarray:
        # RandomState, not Generator: NumPy promises that its stream never changes.
        random = np.random.RandomState([seed, crc32(self.name.encode())])
        if self.name.endswith(".A_log"):
            return np.log(random.uniform(1.0, 16.0, self.shape))
        if self.name.endswith(".dt_bias"):
            dt = np.exp(random.uniform(math.log(0.001), math.log(0.1), self.shape))
            return dt + np.log(-np.expm1(-dt))  # inverse softplus
        return self.mean + self.std * random.standard_normal(self.shape)

    def published(self, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        value = self.float64(seed).astype(np.float32)
        if not self.quantized:
            yield self.name, value.astype(self.dtype)
            return
        packed, scale = quantize(value)
        stem = self.name.removesuffix(".weight")
        yield f"{stem}.weight_packed", packed
        yield f"{stem}.weight_scale", scale
        yield f"{stem}.weight_shape", np.array(self.shape, np.int32)

    @property
    def nbytes(self) -> int:
        size = math.prod(self.shape)
        return size // 2 + 2 * size // GROUP_SIZE + 8 if self.quantized else size * self.dtype.itemsize


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise [out, in] to INT4: packed int32 [out, in / 8] and scale bf16 [out, in / 32].

    The weight is rounded to bf16 first, as the weights that are trained are bf16. Only then is what `dequantize` gives
    a fixed point: of the scales s that share bf16(7 s), one at the most is bf16(amax / 7) of a bf16 amax.

    Raises ValueError if the input dimension is not a multiple of 32.
    """
    if weight.ndim != 2 or weight.shape[1] % GROUP_SIZE:
        raise ValueError(f"quantize: shape {weight.shape}, expected [out, in] with in a multiple of {GROUP_SIZE}")
    groups = weight.astype(BF16).astype(np.float32).reshape(weight.shape[0], -1, GROUP_SIZE)
    scale = (np.abs(groups).max(-1) / np.float32(7)).astype(BF16)
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))[..., None]
    codes = np.clip(np.rint(groups / divisor), -7, 7).astype(np.int64) + 8
    nibbles = codes.reshape(weight.shape[0], -1, 8) << (4 * np.arange(8))
    return nibbles.sum(-1).astype(np.uint32).view(np.int32), scale


def dequantize(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """bf16 [out, in] = bf16(q * scale) of packed int32 [out, in / 8] and scale bf16 [out, in / 32]."""
    codes = (packed.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 0xF
    q = codes.reshape(*scale.shape, GROUP_SIZE).astype(np.float32) - 8
    return (q * scale.astype(np.float32)[..., None]).astype(BF16).reshape(packed.shape[0], -1)


def _linear(name: str, out: int, fan_in: int, **kind: Any) -> _Tensor:
    return _Tensor(f"{name}.weight", (out, fan_in), fan_in**-0.5, **kind)


def _norm(name: str, size: int) -> _Tensor:
    return _Tensor(f"{name}.weight", (size,), 0.1, mean=1.0)


def _bias(name: str, size: int) -> _Tensor:
    return _Tensor(f"{name}.bias", (size,), 0.1)


def _glu(prefix: str, hidden: int, inner: int, names: tuple[str, str, str], **kind: Any) -> Iterator[_Tensor]:
    gate, up, down = names
    yield _linear(f"{prefix}.{gate}", inner, hidden, **kind)
    yield _linear(f"{prefix}.{up}", inner, hidden, **kind)
    yield _linear(f"{prefix}.{down}", hidden, inner, **kind)


def _mla(prefix: str, c: dict[str, Any]) -> Iterator[_Tensor]:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    nope, rope, v, kv_rank = (c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    if c["q_lora_rank"] is None:
        yield _linear(f"{prefix}.q_proj", heads * (nope + rope), hidden)
    else:
        yield _Tensor(f"{prefix}.q_a_proj.weight", (c["q_lora_rank"], hidden), _BEFORE_NORM * hidden**-0.5)
        yield _norm(f"{prefix}.q_a_layernorm", c["q_lora_rank"])
        yield _linear(f"{prefix}.q_b_proj", heads * (nope + rope), c["q_lora_rank"])
    # The shared key has no norm.
    std = np.repeat([_BEFORE_NORM, 1.0], [kv_rank, rope])[:, None] * hidden**-0.5
    yield _Tensor(f"{prefix}.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden), std)
    yield _norm(f"{prefix}.kv_a_layernorm", kv_rank)
    yield _linear(f"{prefix}.kv_b_proj", heads * (nope + v), kv_rank)
    yield _linear(f"{prefix}.o_proj", hidden, heads * v)


def _kda(prefix: str, c: dict[str, Any]) -> Iterator[_Tensor]:
    hidden, linear = c["hidden_size"], c["linear_attn_config"]
    heads, dim, taps = linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]
    for name in "qkv":
        yield _linear(f"{prefix}.{name}_proj", heads * dim, hidden)
        yield _Tensor(f"{prefix}.{name}_conv1d.weight", (heads * dim, 1, taps), taps**-0.5)
    yield _Tensor(f"{prefix}.A_log", (1, 1, heads, 1), 1.0, dtype=F32)
    yield _Tensor(f"{prefix}.dt_bias", (heads * dim,), 1.0, dtype=F32)
    for gate in "fg":
        yield _linear(f"{prefix}.{gate}_a_proj", dim, hidden)
        yield _linear(f"{prefix}.{gate}_b_proj", heads * dim, dim)
    yield _linear(f"{prefix}.b_proj", heads, hidden)
    yield _norm(f"{prefix}.o_norm", dim)
    yield _linear(f"{prefix}.o_proj", hidden, heads * dim)


def _moe(prefix: str, c: dict[str, Any], *, quantized: bool) -> Iterator[_Tensor]:
    linear = c["model_type"] == "kimi_linear"
    experts, shared = (
        (c["num_experts"], c["num_shared_experts"]) if linear else (c["n_routed_experts"], c["n_shared_experts"])
    )
    hidden, inner = c["hidden_size"], c["moe_intermediate_size"]
    yield _linear(f"{prefix}.gate", experts, hidden)
    # Large enough to change which experts are chosen, small enough not to choose them all by itself.
    yield _Tensor(f"{prefix}.gate.e_score_correction_bias", (experts,), 0.1, dtype=BF16 if linear else F32)
    names = ("w1", "w3", "w2") if linear else ("gate_proj", "up_proj", "down_proj")
    for expert in range(experts):
        yield from _glu(f"{prefix}.experts.{expert}", hidden, inner, names, quantized=quantized)
    yield from _glu(f"{prefix}.shared_experts", hidden, inner * shared, ("gate_proj", "up_proj", "down_proj"))


def _text(prefix: str, c: dict[str, Any], *, quantized: bool) -> Iterator[_Tensor]:
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    linear = c["model_type"] == "kimi_linear"
    moe = "block_sparse_moe" if linear else "mlp"
    yield _Tensor(f"{prefix}model.embed_tokens.weight", (vocab, hidden), 0.3)
    for index in range(c["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{index}"
        yield _norm(f"{layer}.input_layernorm", hidden)
        kda = linear and index + 1 in c["linear_attn_config"]["kda_layers"]  # the list counts from 1
        yield from (_kda if kda else _mla)(f"{layer}.self_attn", c)
        yield _norm(f"{layer}.post_attention_layernorm", hidden)
        if index < c["first_k_dense_replace"] or index % c["moe_layer_freq"]:
            yield from _glu(f"{layer}.mlp", hidden, c["intermediate_size"], ("gate_proj", "up_proj", "down_proj"))
        else:
            yield from _moe(f"{layer}.{moe}", c, quantized=quantized)
    yield _norm(f"{prefix}model.norm", hidden)
    yield _linear(f"{prefix}lm_head", vocab, hidden)


def _vision(c: dict[str, Any]) -> Iterator[_Tensor]:
    hidden, inner, patch = c["vt_hidden_size"], c["vt_intermediate_size"], c["patch_size"]
    tower, merged = "vision_tower", c["mm_hidden_size"] * math.prod(c["merge_kernel_size"])
    yield _Tensor(f"{tower}.patch_embed.proj.weight", (hidden, 3, patch, patch), (3 * patch * patch) ** -0.5)
    yield _bias(f"{tower}.patch_embed.proj", hidden)
    table = (c["init_pos_emb_height"], c["init_pos_emb_width"], hidden)
    yield _Tensor(f"{tower}.patch_embed.pos_emb.weight", table, 0.5)

    def with_bias(name: str, out: int, fan_in: int) -> Iterator[_Tensor]:
        yield _linear(name, out, fan_in)
        yield _bias(name, out)

    def layer_norm(name: str, size: int) -> Iterator[_Tensor]:
        yield _norm(name, size)
        yield _bias(name, size)

    for index in range(c["vt_num_hidden_layers"]):
        block = f"{tower}.encoder.blocks.{index}"
        yield from layer_norm(f"{block}.norm0", hidden)
        yield from with_bias(f"{block}.wqkv", 3 * hidden, hidden)
        yield from with_bias(f"{block}.wo", hidden, hidden)
        yield from layer_norm(f"{block}.norm1", hidden)
        yield from with_bias(f"{block}.mlp.fc0", inner, hidden)
        yield from with_bias(f"{block}.mlp.fc1", hidden, inner)
    yield from layer_norm(f"{tower}.encoder.final_layernorm", hidden)
    yield from layer_norm("mm_projector.pre_norm", c["mm_hidden_size"])
    yield from with_bias("mm_projector.proj.0", merged, merged)
    yield from with_bias("mm_projector.proj.2", c["text_hidden_size"], merged)


def _tensors(config: dict[str, Any]) -> Iterator[_Tensor]:
    """Every weight of `config`, in file order; refuses a model or a quantisation that it does not know."""
    kind, text = config["model_type"], config.get("text_config", config)
    known = ("deepseek_v3", "kimi_k2", "kimi_k25", "kimi_linear")
    if kind not in known:
        raise ValueError(f"config.json: model_type is {kind!r}, expected one of {known}")
    quantization = text.get("quantization_config") or config.get("quantization_config")
    method = quantization and quantization["quant_method"]
    if method not in (None, "compressed-tensors"):
        raise ValueError(f"config.json: quant_method is {method!r}, a toy can only have 'compressed-tensors'")
    prefix = "language_model." if kind == "kimi_k25" else ""
    yield from _text(prefix, text, quantized=method is not None)
    if kind == "kimi_k25":
        yield from _vision(config["vision_config"])


def published_tensors(config: dict[str, Any], seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Each (name, array) of the checkpoint of `config` and `seed`, in file order and one at a time.

    Arrays are bf16, float32 (K2's router bias, `A_log`, `dt_bias`) or int32 (`weight_packed`, `weight_shape`).
    """
    for tensor in _tensors(config):
        yield from tensor.published(seed)


def write_toy(folder: str | Path, config: dict[str, Any], *, seed: int = 0, shards: int = 3) -> Path:
    """Write the random checkpoint of `config` and `seed` to `folder` and return the folder.

    Leaves config.json, generation_config.json, safetensors shards of about equal size with their index, for kimi_k25
    preprocessor_config.json, and for a vocabulary of 768 the synthetic tokenizer. One shard is in memory at a time.

    Raises FileExistsError if `folder` holds anything, ValueError if there are fewer tensors than shards.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty, and a toy checkpoint is only written to a new or empty folder")
    tensors = list(_tensors(config))
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"write_toy: shards={shards}, expected 1 to {len(tensors)}, the number of weights")
    folder.mkdir(parents=True, exist_ok=True)

    ends = np.cumsum([tensor.nbytes for tensor in tensors])
    cuts = [0, *np.searchsorted(ends, ends[-1] * np.arange(1, shards) / shards), len(tensors)]
    # Each shard has a tensor at the least, however large its neighbour's.
    for i in range(1, shards):
        cuts[i] = min(max(cuts[i], cuts[i - 1] + 1), len(tensors) - shards + i)
    weight_map: dict[str, str] = {}
    total = 0
    for number, (start, stop) in enumerate(pairwise(cuts), 1):
        file = f"model-{number:05d}-of-{shards:06d}.safetensors"
        shard = dict(pair for tensor in tensors[start:stop] for pair in tensor.published(seed))
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(array.nbytes for array in shard.values())

    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / "config.json", config)
    text = config.get("text_config", config)
    im_end = text["vocab_size"] - 254
    _write_json(folder / "generation_config.json", {"eos_token_id": im_end, "max_length": _longest(text)})
    if config["model_type"] == "kimi_k25":
        _write_json(folder / "preprocessor_config.json", _PREPROCESSOR)
    if text["vocab_size"] == TINY_VOCAB:
        write_tiny_tokenizer(folder)
    return folder


def _longest(text: dict[str, Any]) -> int:
    return text["model_max_length"] if text["model_type"] == "kimi_linear" else text["max_position_embeddings"]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
