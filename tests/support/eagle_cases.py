"""The config.json of published Eagle3 heads, and toys of heads for toys of their targets."""

_YARN = {
    "type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_EAGLE = {
    "use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True,
    "use_mtp_layernorm": False,
}  # fmt: skip
K25_MLA_HEAD = {
    "architectures": ["Eagle3DeepseekV2ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 1, "num_attention_heads": 64,
    "num_key_value_heads": 64, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-05, "vocab_size": 163840,
    "draft_vocab_size": 163840, "tie_word_embeddings": False, "max_position_embeddings": 262144, "rope_theta": 50000.0,
    "rope_scaling": _YARN, "bos_token_id": 163584, "eos_token_id": 163585, "attention_bias": False,
    "eagle_config": _EAGLE | {"eagle_aux_hidden_state_layer_ids": [1, 29, 57]},
}  # fmt: skip
K3_HEAD = K25_MLA_HEAD | {
    "fc_norm": True, "norm_output": True,
    "eagle_config": _EAGLE | {"eagle_aux_hidden_state_layer_ids": [1, 45, 89]},
}  # fmt: skip
K25_LLAMA_HEAD = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "torch_dtype": "bfloat16",
    "hidden_size": 7168, "intermediate_size": 12288, "num_hidden_layers": 1, "num_attention_heads": 64,
    "num_key_value_heads": 64, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-06, "vocab_size": 163840,
    "tie_word_embeddings": False, "max_position_embeddings": 262144, "max_window_layers": 36, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False, "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 163584, "eos_token_id": 163585, "initializer_range": 0.02,
    "use_cache": True, "transformers_version": "4.51.0",
}  # fmt: skip
