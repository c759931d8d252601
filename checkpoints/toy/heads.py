"""Configurations of draft heads that fit a target of any size."""

from collections.abc import Mapping
from typing import Any

from kimi_jax.families import text_fields

# The published kinds: the form of the layer, and the version.
HEADS = ("eagle3-mla", "eagle3.1-mla", "eagle3-llama")
_YARN = {
    "type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def head_config(target: Mapping[str, Any], kind: str, **overrides: Any) -> dict[str, Any]:
    """Returns the config.json of a head of a `kind` among HEADS for the model of `target`, a parsed config.json.

    It takes the outputs of three layers, and has its target's widths, where it has MLA too. One in Llama's form
    drafts every second word of its target's, and takes its embeddings. An override replaces a field.

    Raises ValueError for another kind, and for a field that the head does not have.
    """
    if kind not in HEADS:
        raise ValueError(f"head_config: kind={kind!r}, expected one of {', '.join(HEADS)}")
    text = text_fields(target)
    hidden, heads, layers = text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"]
    config = {
        "architectures": ["Eagle3DeepseekV2ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": text["intermediate_size"], "num_hidden_layers": 1,
        "num_attention_heads": heads, "num_key_value_heads": heads, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "vocab_size": text["vocab_size"], "draft_vocab_size": text["vocab_size"], "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "rope_theta": 50000.0, "rope_scaling": _YARN,
        "eagle_aux_hidden_state_layer_ids": [max(1, layers * i // 3) for i in (1, 2, 3)],
    }  # fmt: skip
    if kind == "eagle3-llama":
        config |= {
            "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "head_dim": hidden // heads // 2 * 2,
            "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads, "rms_norm_eps": 1e-6,
            "draft_vocab_size": text["vocab_size"] // 2, "rope_scaling": _YARN | {"beta_fast": 32.0},
        }  # fmt: skip
    else:
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        config |= {name: text[name] for name in names} | {"q_lora_rank": text.get("q_lora_rank") or hidden // 2}
    if kind == "eagle3.1-mla":
        config |= {"fc_norm": True, "norm_output": True}
    for name in overrides:
        if name not in config:
            raise ValueError(f"head_config: an {kind} head has no field {name!r}")
    return config | overrides
