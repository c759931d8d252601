"""Defines a model's configuration as frozen dataclasses; `config_json` reads them from a published config.json.

Field names are DeepSeek-V3's, which the files of Kimi K2 have. `families` says how other files spell them, and has
those that `family` names; `model_type` is the file's own word, which is printed and decides nothing.
"""

import dataclasses
from typing import Literal

LayerKind = Literal["mla", "kda"]


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071), applied to sequences of every length. `attention_factor` multiplies cos and sin; None
    derives the factor from `mscale` and `mscale_all_dim`. `truncate` rounds the ramp to whole pairs."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Weights of four bits in groups along the input dimension: compressed-tensors' "pack-quantized" (symmetric INT4)
    or "mxfp4-pack-quantized"."""

    format: Literal["int4", "mxfp4"] = "int4"
    group_size: int = 32
    num_bits: int = 4


@dataclasses.dataclass(frozen=True)
class LinearAttnConfig:
    """`linear_attn_config`: the layers of Kimi Delta Attention, counted from 1, and its heads.

    `gate_lower_bound` bounds the log-decay of a step from below, None leaves it unbounded. `use_full_rank_gate` makes
    the output gate one matrix instead of two of low rank.
    """

    kda_layers: tuple[int, ...]
    full_attn_layers: tuple[int, ...]
    num_heads: int
    head_dim: int
    short_conv_kernel_size: int
    gate_lower_bound: float | None = None
    use_full_rank_gate: bool = False

    @property
    def float32_weights(self) -> bool:
        """Says whether the convolutions and the output norm are float32: in releases with a bounded decay they are."""
        return self.gate_lower_bound is not None

    @property
    def stored_decays(self) -> int:
        """Returns the length of a layer's `A_log` in a release: `num_heads`, in releases with a bounded decay padded to
        the next power of two (128 for the 96 heads of Kimi K3)."""
        return self.num_heads if self.gate_lower_bound is None else 1 << self.num_heads.bit_length()


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The language model.

    mla_inner_norm_eps: the epsilon of MLA's two inner norms: 1e-6 in the reference code, whatever `rms_norm_eps` is,
        unless config.json has another.
    mla_use_output_gate: MLA's heads are multiplied by the sigmoid of a projection of the layer's input.
    activation_situ_beta, activation_situ_linear_beta: the bounds of SiTU-GLU; without the first, layers have SwiGLU.
    routed_expert_hidden_size: the width at which routed experts compute, None for `hidden_size`.
    attn_res_block_size: the number of layers between two snapshots of the residual stream, None for plain residuals.
    """

    model_type: str
    family: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    bos_token_id: int | None
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    q_lora_rank: int | None = None
    mla_inner_norm_eps: float = 1e-6
    mla_use_nope: bool = False
    mla_use_output_gate: bool = False
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | None = None
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    n_shared_experts: int = 0
    moe_intermediate_size: int = 0
    routed_expert_hidden_size: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    activation_situ_beta: float | None = None
    activation_situ_linear_beta: float | None = None
    attn_res_block_size: int | None = None
    num_nextn_predict_layers: int = 0
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    linear_attn: LinearAttnConfig | None = None
    quantization: QuantizationConfig | None = None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Returns the number of values cached per token and MLA layer: `kv_lora_rank + qk_rope_head_dim`."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def expert_width(self) -> int:
        """Returns the width of the vectors that routed experts take and give."""
        return self.hidden_size if self.routed_expert_hidden_size is None else self.routed_expert_hidden_size

    @property
    def snapshots(self) -> int:
        """Returns the number of snapshots of the residual stream that the last layer reads."""
        every = self.attn_res_block_size
        return 0 if every is None else -(-self.num_hidden_layers // every)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Returns the token mixer of every layer, counted from 0."""
        kda = () if self.linear_attn is None else self.linear_attn.kda_layers
        return tuple("kda" if i + 1 in kda else "mla" for i in range(self.num_hidden_layers))

    def is_moe(self, layer: int) -> bool:
        """Says whether layer `layer`, counted from 0, has routed experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """MoonViT-3D or MoonViT-V2 and its projector, under the published names.

    qkv_hidden_size: the width of all heads' queries, None for `vt_hidden_size`.
    norm_type, norm_eps: the tower's norms. `bias`: Linears and the patch embedding have biases.
    mm_projector_type: "patchmerger" normalises each patch before its two Linears, "patchmergerv2" each token after
        them, and has no biases. `projector_ln_eps` is the epsilon of that norm.
    """

    patch_size: int
    vt_hidden_size: int
    vt_num_hidden_layers: int
    vt_num_attention_heads: int
    vt_intermediate_size: int
    init_pos_emb_height: int
    init_pos_emb_width: int
    init_pos_emb_time: int
    merge_kernel_size: tuple[int, int]
    mm_hidden_size: int
    text_hidden_size: int
    qkv_hidden_size: int | None = None
    pos_emb_interpolation_mode: Literal["bicubic", "bilinear"] = "bicubic"
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    bias: bool = True
    mm_projector_type: Literal["patchmerger", "patchmergerv2"] = "patchmerger"
    projector_ln_eps: float = 1e-5

    @property
    def attention_width(self) -> int:
        """Returns the width of the queries of all heads."""
        return self.vt_hidden_size if self.qkv_hidden_size is None else self.qkv_hidden_size


@dataclasses.dataclass(frozen=True)
class KimiConfig:
    """A whole model. `stop_ids` are those of config.json, its text_config and generation_config.json together.

    `folder` is the folder or URL that `checkpoints.load` filled the model from, None before that. Configurations that
    differ in `folder` alone are equal, so that a model found elsewhere runs the programs compiled for this one.
    """

    model_type: str
    family: str
    text: TextConfig
    stop_ids: tuple[int, ...]
    vision: VisionConfig | None = None
    media_placeholder_token_id: int | None = None
    folder: str | None = dataclasses.field(default=None, compare=False)

    def dense(self) -> "KimiConfig":
        """Returns the configuration of this model with its routed experts in plain floating point."""
        return dataclasses.replace(self, text=dataclasses.replace(self.text, quantization=None))


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """An Eagle3 draft head (arXiv 2503.01840): one layer that drafts tokens from the hidden vectors of a target model.

    form: "mla" caches latents, as its target does; "llama" caches the keys and values of `num_key_value_heads` heads.
    layer: the widths of the layer, its norms' epsilon and its rotation. `vocab_size` is that of the target. In the
        Llama form, heads rotate all of their `qk_rope_head_dim` channels, and `kv_lora_rank` is 0.
    draft_vocab_size: the number of words that it can draft.
    target_hidden_size: the width of the target's hidden vectors.
    aux_layers: the target's layers, counted from 0, whose outputs it takes; None: its rule (`config_json.fit_target`).
    fc_norm, norm_output: the two changes of Eagle 3.1: a norm for each layer's vectors, and the norm's output, not its
        input, for the next draft.
    norm_before_residual: attention is added to the normed vectors.
    own_embedding: the checkpoint has the table of embeddings; else it is the target's.
    vocab_map: the checkpoint maps the words that it drafts to the target's (`d2t`).
    """

    model_type: str
    form: Literal["mla", "llama"]
    layer: TextConfig
    num_key_value_heads: int
    draft_vocab_size: int
    target_hidden_size: int
    aux_layers: tuple[int, ...] | None = None
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    own_embedding: bool = True
    vocab_map: bool = False

    @property
    def num_aux(self) -> int:
        """Returns the number of the target's layers whose outputs it takes."""
        return 3 if self.aux_layers is None else len(self.aux_layers)

    @property
    def cache_width(self) -> int:
        """Returns the number of values that it caches of a token."""
        if self.form == "mla":
            return self.layer.latent_dim
        return 2 * self.num_key_value_heads * self.layer.qk_rope_head_dim
