"""Lists every weight of a configuration's model under its published name, with the distribution that it is drawn from.

Names, shapes and dtypes are those of the released safetensors, written down here a second time and not taken from the
model's tree: toys are what the reading side is tested with.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from zlib import crc32

import numpy as np

from checkpoints.published.numerics import BF16, F32, quantize_fp8, quantize_int4, quantize_mxfp4
from checkpoints.published.quantization_config import FORMATS, Form, form_of
from checkpoints.published.shards import TensorHeader
from kimi_jax.config_json import is_eagle
from kimi_jax.families import FAMILIES, family_of, text_fields

_BEFORE_NORM = 0.1


@dataclass(frozen=True)
class ToyWeight:
    """A weight before it is put in its stored form: `std` (by row, if an array) times a normal variable, plus `mean`.

    With `draw` "decay" or "time step" it is instead drawn as `A_log` or `dt_bias` at the start of training (arXiv
    2510.26692), and with "given" it is the `mean`. The last `padding` numbers are zeros.
    """

    name: str
    shape: tuple[int, ...]
    std: float | np.ndarray
    mean: float | np.ndarray = 0.0
    dtype: np.dtype = BF16
    form: Form = "bf16"  # the weight is stored in `dtype`
    draw: Literal["normal", "decay", "time step", "given"] = "normal"
    padding: int = 0

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        """The headers of the published tensors that hold the weight."""
        if self.form == "bf16":
            return (TensorHeader(self.name, self.dtype, self.shape),)
        stem, found = self.name.rpartition(".")[0], FORMATS[self.form]
        headers = [TensorHeader(f"{stem}.{p.name}", np.dtype(p.dtype), p.shape(self.shape)) for p in found.stored]
        if found.stored_shape:
            headers.append(TensorHeader(f"{stem}.{found.stored_shape}", np.dtype(np.int32), (2,)))
        return tuple(headers)

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for header in self.headers)

    def float64(self, seed: int) -> np.ndarray:
        if self.draw == "given":
            return np.broadcast_to(self.mean, self.shape).astype(np.float64)
        # RandomState, not Generator: NumPy promises that its stream never changes.
        random = np.random.RandomState([seed, crc32(self.name.encode())])
        if self.draw == "decay":
            used = np.arange(math.prod(self.shape)).reshape(self.shape) < math.prod(self.shape) - self.padding
            return np.where(used, np.log(random.uniform(1.0, 16.0, self.shape)), 0.0)
        if self.draw == "time step":
            dt = np.exp(random.uniform(math.log(0.001), math.log(0.1), self.shape))
            return dt + np.log(-np.expm1(-dt))  # inverse softplus
        return self.mean + self.std * random.standard_normal(self.shape)

    def published(self, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the weight's tensors, (name, array), drawn whole."""
        value = self.float64(seed).astype(np.float32)
        arrays = {
            "bf16": lambda: (value.astype(self.dtype),),
            "fp8": lambda: quantize_fp8(value),
            "mxfp4": lambda: quantize_mxfp4(value),
            "int4": lambda: (*quantize_int4(value), np.array(self.shape, np.int32)),
        }[self.form]()
        yield from zip((header.name for header in self.headers), arrays, strict=True)


def _linear(name: str, out: int, fan_in: int) -> ToyWeight:
    return ToyWeight(f"{name}.weight", (out, fan_in), fan_in**-0.5)


def _norm(name: str, size: int) -> ToyWeight:
    return ToyWeight(f"{name}.weight", (size,), 0.1, mean=1.0)


def _bias(name: str, size: int) -> ToyWeight:
    return ToyWeight(f"{name}.bias", (size,), 0.1)


def _glu(prefix: str, hidden: int, inner: int, names: tuple[str, str, str]) -> Iterator[ToyWeight]:
    gate, up, down = names
    yield _linear(f"{prefix}.{gate}", inner, hidden)
    yield _linear(f"{prefix}.{up}", inner, hidden)
    yield _linear(f"{prefix}.{down}", hidden, inner)


def _mla(prefix: str, c: dict[str, Any], inputs: int | None = None) -> Iterator[ToyWeight]:
    hidden, heads = inputs or c["hidden_size"], c["num_attention_heads"]
    nope, rope, v, kv_rank = (c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    if c["q_lora_rank"] is None:
        yield _linear(f"{prefix}.q_proj", heads * (nope + rope), hidden)
    else:
        yield ToyWeight(f"{prefix}.q_a_proj.weight", (c["q_lora_rank"], hidden), _BEFORE_NORM * hidden**-0.5)
        yield _norm(f"{prefix}.q_a_layernorm", c["q_lora_rank"])
        yield _linear(f"{prefix}.q_b_proj", heads * (nope + rope), c["q_lora_rank"])
    # The shared key has no norm.
    std = np.repeat([_BEFORE_NORM, 1.0], [kv_rank, rope])[:, None] * hidden**-0.5
    yield ToyWeight(f"{prefix}.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden), std)
    yield _norm(f"{prefix}.kv_a_layernorm", kv_rank)
    yield _linear(f"{prefix}.kv_b_proj", heads * (nope + v), kv_rank)
    if c.get("mla_use_output_gate"):
        yield _linear(f"{prefix}.g_proj", heads * v, hidden)
    yield _linear(f"{prefix}.o_proj", c["hidden_size"], heads * v)


def _kda(prefix: str, c: dict[str, Any]) -> Iterator[ToyWeight]:
    hidden, linear = c["hidden_size"], c["linear_attn_config"]
    heads, dim, taps = linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]
    bounded = "gate_lower_bound" in linear  # as in Kimi K3, whose small tensors are float32
    small = F32 if bounded else BF16
    for name in "qkv":
        yield _linear(f"{prefix}.{name}_proj", heads * dim, hidden)
        yield ToyWeight(f"{prefix}.{name}_conv1d.weight", (heads * dim, 1, taps), taps**-0.5, dtype=small)
    if bounded:
        stored = 1 << heads.bit_length()  # 128 for 96 heads
        yield ToyWeight(f"{prefix}.A_log", (stored,), 1.0, dtype=F32, draw="decay", padding=stored - heads)
        yield ToyWeight(f"{prefix}.dt_bias", (heads * dim,), 1.0, mean=-1.0, dtype=F32)
    else:
        yield ToyWeight(f"{prefix}.A_log", (1, 1, heads, 1), 1.0, dtype=F32, draw="decay")
        yield ToyWeight(f"{prefix}.dt_bias", (heads * dim,), 1.0, dtype=F32, draw="time step")
    for gate in "f" if linear.get("use_full_rank_gate") else "fg":
        yield _linear(f"{prefix}.{gate}_a_proj", dim, hidden)
        yield _linear(f"{prefix}.{gate}_b_proj", heads * dim, dim)
    if linear.get("use_full_rank_gate"):
        yield _linear(f"{prefix}.g_proj", heads * dim, hidden)
    yield _linear(f"{prefix}.b_proj", heads, hidden)
    yield replace(_norm(f"{prefix}.o_norm", dim), dtype=small)
    yield _linear(f"{prefix}.o_proj", hidden, heads * dim)


def _moe(prefix: str, c: dict[str, Any]) -> Iterator[ToyWeight]:
    linear = "linear_attn_config" in c
    experts, shared = (
        (c["num_experts"], c["num_shared_experts"]) if linear else (c["n_routed_experts"], c["n_shared_experts"])
    )
    hidden, inner = c["hidden_size"], c["moe_intermediate_size"]
    yield _linear(f"{prefix}.gate", experts, hidden)
    # Large enough to change which experts are chosen, small enough not to choose them all by itself.
    latent = c.get("routed_expert_hidden_size")
    bias = BF16 if linear and latent is None else F32
    yield ToyWeight(f"{prefix}.gate.e_score_correction_bias", (experts,), 0.1, dtype=bias)
    if latent is not None:
        yield _linear(f"{prefix}.routed_expert_down_proj", latent, hidden)
        yield _norm(f"{prefix}.routed_expert_norm", latent)
        yield _linear(f"{prefix}.routed_expert_up_proj", hidden, latent)
    names = ("w1", "w3", "w2") if linear else ("gate_proj", "up_proj", "down_proj")
    for expert in range(experts):
        yield from _glu(f"{prefix}.experts.{expert}", latent or hidden, inner, names)
    yield from _glu(f"{prefix}.shared_experts", hidden, inner * shared, ("gate_proj", "up_proj", "down_proj"))


def _depth_attention(prefix: str, hidden: int) -> Iterator[ToyWeight]:
    yield _norm(f"{prefix}_norm", hidden)
    yield _linear(f"{prefix}_proj", 1, hidden)


def _text(prefix: str, c: dict[str, Any]) -> Iterator[ToyWeight]:
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    linear = "linear_attn_config" in c
    moe = "block_sparse_moe" if linear else "mlp"
    yield ToyWeight(f"{prefix}model.embed_tokens.weight", (vocab, hidden), 0.3)
    for index in range(c["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{index}"
        yield _norm(f"{layer}.input_layernorm", hidden)
        kda = linear and index + 1 in c["linear_attn_config"]["kda_layers"]  # the list counts from 1
        yield from (_kda if kda else _mla)(f"{layer}.self_attn", c)
        yield _norm(f"{layer}.post_attention_layernorm", hidden)
        if "attn_res_block_size" in c:
            yield from _depth_attention(f"{layer}.self_attention_res", hidden)
            yield from _depth_attention(f"{layer}.mlp_res", hidden)
        if index < c["first_k_dense_replace"] or index % c["moe_layer_freq"]:
            yield from _glu(f"{layer}.mlp", hidden, c["intermediate_size"], ("gate_proj", "up_proj", "down_proj"))
        else:
            yield from _moe(f"{layer}.{moe}", c)
    yield _norm(f"{prefix}model.norm", hidden)
    if "attn_res_block_size" in c:
        yield from _depth_attention(f"{prefix}model.output_attn_res", hidden)
    yield _linear(f"{prefix}lm_head", vocab, hidden)


def _vision(c: dict[str, Any]) -> Iterator[ToyWeight]:
    hidden, inner, patch = c["vt_hidden_size"], c["vt_intermediate_size"], c["patch_size"]
    tower, merged = "vision_tower", c["mm_hidden_size"] * math.prod(c["merge_kernel_size"])
    of_heads, has_bias = c.get("qkv_hidden_size", hidden), c.get("linear_bias", True)
    second = c["mm_projector_type"] == "patchmergerv2"
    yield ToyWeight(f"{tower}.patch_embed.proj.weight", (hidden, 3, patch, patch), (3 * patch * patch) ** -0.5)
    if has_bias:
        yield _bias(f"{tower}.patch_embed.proj", hidden)
    table = (c["init_pos_emb_height"], c["init_pos_emb_width"], hidden)
    yield ToyWeight(f"{tower}.patch_embed.pos_emb.weight", table, 0.5)

    def linear(name: str, out: int, fan_in: int, bias: bool = has_bias) -> Iterator[ToyWeight]:
        yield _linear(name, out, fan_in)
        if bias:
            yield _bias(name, out)

    def norm(name: str, size: int, bias: bool = c.get("norm_type") != "rmsnorm") -> Iterator[ToyWeight]:
        yield _norm(name, size)
        if bias:
            yield _bias(name, size)

    for index in range(c["vt_num_hidden_layers"]):
        block = f"{tower}.encoder.blocks.{index}"
        yield from norm(f"{block}.norm0", hidden)
        yield from linear(f"{block}.wqkv", 3 * of_heads, hidden)
        yield from linear(f"{block}.wo", hidden, of_heads)
        yield from norm(f"{block}.norm1", hidden)
        yield from linear(f"{block}.mlp.fc0", inner, hidden)
        yield from linear(f"{block}.mlp.fc1", hidden, inner)
    yield from norm(f"{tower}.encoder.final_layernorm", hidden)
    if not second:
        yield from norm("mm_projector.pre_norm", c["mm_hidden_size"], bias=True)
    yield from linear("mm_projector.proj.0", merged, merged, bias=not second)
    yield from linear("mm_projector.proj.2", c["text_hidden_size"], merged, bias=not second)
    if second:
        yield _norm("mm_projector.post_norm", c["text_hidden_size"])


def _eagle(c: dict[str, Any]) -> Iterator[ToyWeight]:
    """Yields the weights of a draft head. One that drafts fewer words than its target has takes its embeddings."""
    hidden, vocab, latent = c["hidden_size"], c["vocab_size"], "kv_lora_rank" in c
    words, target = c.get("draft_vocab_size", vocab), c.get("target_hidden_size", hidden)
    aux = len(c.get("eagle_aux_hidden_state_layer_ids", (1, 2, 3)))
    layer = "layers.0" if latent else "midlayer"
    if words == vocab:
        yield ToyWeight("embed_tokens.weight", (vocab, hidden), 0.3)
    yield _linear("fc", hidden, aux * target)
    if c.get("fc_norm"):
        for i in range(aux):
            yield _norm(f"fc_norm.{i}", target)
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        yield _norm(f"{layer}.{name}", hidden)
    if latent:
        yield from _mla(f"{layer}.self_attn", c, 2 * hidden)
    else:
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads", "v": "num_key_value_heads"}
        for name, count in heads.items():
            yield _linear(f"{layer}.self_attn.{name}_proj", c[count] * c["head_dim"], 2 * hidden)
        yield _linear(f"{layer}.self_attn.o_proj", hidden, c["num_attention_heads"] * c["head_dim"])
    yield from _glu(f"{layer}.mlp", hidden, c["intermediate_size"], ("gate_proj", "up_proj", "down_proj"))
    yield _norm("norm", hidden)
    yield _linear("lm_head", words, hidden)
    if words < vocab:
        ids = np.arange(words) * vocab // words
        yield ToyWeight("d2t", (words,), 0.0, mean=ids - np.arange(words), dtype=np.dtype(np.int64), draw="given")
        chosen = np.isin(np.arange(vocab), ids)
        yield ToyWeight("t2d", (vocab,), 0.0, mean=chosen, dtype=np.dtype(np.bool_), draw="given")


# The weights of each form: routed experts; every Linear of the text model but the router and the head.
_STORED = {
    "int4": re.compile(r"\.experts\.\d+\."),
    "mxfp4": re.compile(r"\.experts\.\d+\."),
    "fp8": re.compile(r"\.(self_attn|mlp|block_sparse_moe)\..*(proj|proj_with_mqa|w[123])\.weight$"),
}


def weights(config: Mapping[str, Any]) -> Iterator[ToyWeight]:
    """Yields every weight of `config`, a model's or a draft head's, in file order. Raises ValueError for a model type
    that it does not know."""
    if is_eagle(config):
        yield from _eagle(dict(config))
        return
    family = family_of(config)
    if family is None:
        known = tuple(name for family in FAMILIES for name in family.model_types)
        raise ValueError(f"config.json: model_type is {config.get('model_type')!r}, expected one of {known}")
    form = form_of(config)
    for weight in _text(family.tensors.prefix, dict(text_fields(config))):
        stored = form != "bf16" and _STORED[form].search(weight.name)
        yield replace(weight, form=form) if stored else weight
    if "vision_config" in config:
        yield from _vision(config["vision_config"])


def published_tensors(config: Mapping[str, Any], seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each (name, array) of the checkpoint of `config` and `seed`, in file order and one weight at a time.

    Arrays are bf16, float32 (K2's router bias, `A_log`, `dt_bias`), int32 or uint8 (`weight_packed`, `weight_scale`,
    `weight_shape`), or e4m3 with float32 scales.
    """
    for weight in weights(config):
        yield from weight.published(seed)
