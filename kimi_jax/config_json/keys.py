"""Lists the keys that are not read as values: other spellings that any file may have (`families` has those of one
family), keys without effect here, and keys that may have only the values listed. It also has the limits of sizes.

Sources: the releases' config.json and `generation_config.json`, the configuration classes of transformers 5.23
(deepseek_v3, kimi_linear, kimi_k25, `PreTrainedConfig`, `GenerationConfig`) and of compressed-tensors 0.12.
"""

from collections.abc import Mapping
from typing import Any

# Limits on sizes, far above every release, whose largest are 93 layers, 896 experts, a width of 33,792, 96 heads and
# 163,840 tokens. They bound the work that a config.json without tensors can ask for.
MAX_LAYERS = 1_024
MAX_EXPERTS = 16_384
MAX_WIDTH = 2**20
MAX_HEADS = 2**14
MAX_VOCAB = 2**24
MAX_POSITIONS = 2**31 - 1  # positions are int32
MAX_KERNEL = 1_024  # taps of a convolution, pixels of a patch
MAX_GRID = 4_096  # patches on one side of the table of positions, and its frames

# transformers' spellings -> DeepSeek-V3's.
TEXT_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
    "torch_dtype": "dtype",
}
LINEAR_ALIASES = {
    "linear_num_heads": "num_heads",
    "linear_head_dim": "head_dim",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}
ROPE_ALIASES = {"type": "rope_type"}
TOP_ALIASES = {"torch_dtype": "dtype"}

# fmt: off
# Options of transformers and labels of its outputs, which change nothing in the model's arithmetic.
_BOOKKEEPING = frozenset((
    "architectures", "auto_map", "transformers_version", "model_type", "name_or_path", "tokenizer_class", "prefix",
    "task_specific_params", "problem_type", "finetuning_task", "id2label", "label2id", "num_labels", "torchscript",
    "return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "use_cache", "use_bfloat16",
    "tf_legacy_loss", "tie_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "chunk_size_feed_forward",
    "decoder_start_token_id", "sep_token_id", "cls_token_id", "unk_token_id", "keys_to_ignore_at_inference",
))
# Losses, dropout, and the parallelism of training.
_TRAINING = frozenset((
    "attention_dropout", "hidden_dropout", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "router_z_loss_coef",
    "output_router_logits", "ep_size", "pretraining_tp", "ignore_index", "gradient_checkpointing",
))
# Sampling and the form of results, which callers of `generate` choose themselves.
_SAMPLING = frozenset((
    "temperature", "top_k", "top_p", "min_p", "typical_p", "do_sample", "early_stopping", "length_penalty",
    "num_return_sequences", "max_length", "max_new_tokens", "max_time", "output_scores", "output_logits",
    "return_dict_in_generate", "cache_implementation", "cache_config", "remove_invalid_values", "renormalize_logits",
    "disable_compile", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "is_assistant", "assistant_early_exit", "use_model_defaults",
))
HARMLESS_TEXT = _BOOKKEEPING | _TRAINING | _SAMPLING
HARMLESS_GENERATION = _BOOKKEEPING | _SAMPLING
HARMLESS_VISION = _BOOKKEEPING | _TRAINING | {"dtype", "torch_dtype", "initializer_range"}
# Texts around media and their markers, which the chat template writes.
HARMLESS_TOP = _BOOKKEEPING | _TRAINING | _SAMPLING | {
    "use_unified_vision_chunk", "video_placeholder", "image_placeholder", "video_token_id", "vision_start_token_id",
    "vision_end_token_id", "initializer_range",
}
# The tensors show which Linears are quantised; the method that found their scales does not change the arithmetic.
HARMLESS_QUANTIZATION = frozenset((
    "ignore", "quantization_status", "global_compression_ratio", "version", "modules_to_not_convert", "ignored_layers",
    "scale_fmt",
))
HARMLESS_QUANTIZATION_GROUP = frozenset(("targets",))
HARMLESS_QUANTIZATION_WEIGHTS = frozenset(("observer", "observer_kwargs", "scale_dtype", "zp_dtype"))

# Parts of decoding that `generate` does not have, with the values that change nothing; a warning names other values.
NEUTRAL_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0.0,),
    "min_length": (0,), "min_new_tokens": (0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": ({},),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,), "penalty_alpha": (0.0,), "stop_strings": ([],), "watermarking_config": (),
}

# Keys that ask for a model that is not built here, with the values that do not; () means that every value does.
ONLY_TEXT: Mapping[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "mlp_bias": (False,),
    "attention_bias": (False,), "tie_word_embeddings": (False,), "rope_interleave": (True,), "lm_head_bias": (False,),
    "partial_rotary_factor": (1.0,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "pruned_heads": ({},), "sliding_window": (), "use_sliding_window": (False,), "attention_chunk_size": (),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "logit_softcapping": (), "clip_qkv": (),
    "query_pre_attn_scalar": (), "use_qk_norm": (False,), "qk_norm": (False,), "qk_layernorm": (False,),
    "embedding_multiplier": (1.0,), "residual_multiplier": (1.0,), "logits_scaling": (1.0,), "logit_scale": (1.0,),
    "attention_multiplier": (1.0,), "scale_emb": (1.0,), "alibi": (False,),
    # DeepSeek-V3.2's sparse attention.
    "index_topk": (), "index_n_heads": (), "index_head_dim": (),
}
ONLY_VISION: Mapping[str, tuple[Any, ...]] = {
    "pos_emb_type": ("divided_fixed",), "merge_type": ("sd2_tpool",), "video_attn_type": ("spatial_temporal",),
    "projector_hidden_act": ("gelu",), "hidden_act": ("gelu_pytorch_tanh",), "activation_func": ("gelu_pytorch_tanh",),
    "mlp_type": ("mlp2",),
}
# fmt: on
