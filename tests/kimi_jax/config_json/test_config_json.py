"""A published config.json is read whole, or refused by the name of its field."""

import copy
import json
from importlib import resources

import pytest

from checkpoints.toy import toy_config
from kimi_jax.config_json import ConfigError, from_dict, from_folder, preset


def test_k25_reads_every_field_from_its_three_objects():
    # Given the published values
    config = preset("kimi-k2.5")
    text, vision = config.text, config.vision
    # Then they are in the dataclasses
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (7168, 61, 163840)
    assert (text.q_lora_rank, text.kv_lora_rank, text.qk_head_dim, text.latent_dim) == (1536, 512, 192, 576)
    assert (text.n_routed_experts, text.num_experts_per_tok, text.routed_scaling_factor) == (384, 8, 2.827)
    assert (text.rope_scaling.factor, text.rope_scaling.beta_fast, text.rope_theta) == (64.0, 32.0, 50000.0)
    assert (text.rms_norm_eps, text.mla_inner_norm_eps) == (1e-5, 1e-6)
    assert text.quantization.group_size == 32
    assert [text.is_moe(i) for i in (0, 1, 60)] == [False, True, True]
    assert set(text.layer_kinds) == {"mla"}
    assert (vision.vt_hidden_size, vision.vt_num_hidden_layers, vision.merge_kernel_size) == (1152, 27, (2, 2))
    assert config.media_placeholder_token_id == 163605
    assert config.stop_ids == (163585, 163586)


def test_kimi_linear_layer_lists_count_from_one():
    text = preset("kimi-linear-48b").text
    assert [i for i, kind in enumerate(text.layer_kinds) if kind == "mla"] == [3, 7, 11, 15, 19, 23, 26]
    assert (text.n_routed_experts, text.num_experts_per_tok, text.n_shared_experts) == (256, 8, 1)
    assert (text.max_position_embeddings, text.mla_use_nope, text.q_lora_rank) == (1048576, True, None)


def test_presets_differ_where_the_releases_do():
    k2, thinking = preset("kimi-k2").text, preset("kimi-k2-thinking").text
    assert (k2.rope_scaling.factor, k2.rope_scaling.beta_fast, k2.rms_norm_eps) == (32.0, 1.0, 1e-6)
    assert (thinking.rope_scaling.factor, thinking.rms_norm_eps) == (64.0, 1e-5)
    assert k2.quantization is None and thinking.quantization is not None


def test_any_hybrid_pattern_builds_from_the_lists():
    raw = toy_config("kimi-linear")
    raw["num_hidden_layers"] = 4
    raw["linear_attn_config"] |= {"full_attn_layers": [1, 3], "kda_layers": [4, 2]}
    assert from_dict(raw).text.layer_kinds == ("mla", "kda", "mla", "kda")


def test_stop_ids_are_the_union_of_three_places():
    raw = toy_config("k2.5")
    raw["eos_token_id"] = 5
    raw["text_config"]["eos_token_id"] = [6, 7]
    assert from_dict(raw, {"eos_token_id": [7, 9]}).stop_ids == (5, 6, 7, 9)


def test_quantization_is_found_at_the_top_level_too():
    raw = toy_config("k2.5")
    raw["quantization_config"] = raw["text_config"].pop("quantization_config")
    assert from_dict(raw).text.quantization.group_size == 32


def _changed(like, where, value):
    raw = copy.deepcopy(toy_config(like))
    *path, last = where.split(".")
    inner = raw
    for name in path:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return raw


WEIGHTS = "text_config.quantization_config.config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("like", "where", "value", "names"),
    [
        ("k2", "model_type", "llama", "model_type 'llama'"),
        ("k2", "hidden_size", None, "hidden_size is missing"),
        ("k2", "hidden_size", "big", "hidden_size is 'big'"),
        ("k2", "hidden_size", -1, "hidden_size is -1"),
        ("k2", "scoring_func", "softmax", "scoring_func 'softmax'"),
        ("k2", "topk_method", "greedy", "topk_method 'greedy'"),
        ("k2", "hidden_act", "gelu", "hidden_act 'gelu'"),
        ("k2", "tie_word_embeddings", True, "tie_word_embeddings True"),
        ("k2", "rope_scaling.type", "linear", "rope_scaling: type 'linear'"),
        ("k2", "rope_scaling.factor", None, "rope_scaling: factor is missing"),
        ("k2", "qk_rope_head_dim", 15, "qk_rope_head_dim 15"),
        ("k2", "num_key_value_heads", 2, "num_key_value_heads 2"),
        ("k2", "n_group", 3, "n_routed_experts 16 is not a multiple of n_group 3"),
        ("k2", "num_experts_per_tok", 17, "num_experts_per_tok 17"),
        ("k2", "topk_group", 2, "topk_group 2"),
        ("k2.5", "text_config.model_type", "qwen", "text_config: model_type 'qwen'"),
        ("k2.5", "text_config.moe_intermediate_size", 40, "moe_intermediate_size 40"),
        ("k2.5", WEIGHTS + ".group_size", 64, "group_size is 64"),
        ("k2.5", WEIGHTS + ".num_bits", 8, "num_bits 8"),
        ("k2.5", "text_config.quantization_config.quant_method", "gptq", "quant_method 'gptq'"),
        ("k2.5", "vision_config.vt_num_attention_heads", 7, "vt_num_attention_heads 7"),
        ("k2.5", "vision_config.merge_type", "mlp", "merge_type 'mlp'"),
        ("k2.5", "vision_config.text_hidden_size", 1, "text_hidden_size 1"),
        ("k2.5", "media_placeholder_token_id", 10**6, "media_placeholder_token_id 1000000"),
        ("k2.5", "vision_config", None, "vision_config is missing"),
        ("kimi-linear", "linear_attn_config", None, "linear_attn_config is missing"),
        ("kimi-linear", "linear_attn_config.kda_layers", [1, 2, 3, 4], "must name each of the layers 1 to 6 once"),
        ("kimi-linear", "linear_attn_config.gate_lower_bound", -6.0, "gate_lower_bound is -6.0"),
        ("kimi-linear", "moe_router_activation_func", "softmax", "moe_router_activation_func 'softmax'"),
        ("kimi-linear", "num_experts_per_token", "x", "num_experts_per_token is 'x'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(like, where, value, names):
    with pytest.raises(ConfigError, match=r"^config\.json: ") as error:
        from_dict(_changed(like, where, value))
    assert names in str(error.value)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json: not found"):
        from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json: not JSON"):
        from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object, found a list"):
        from_folder(tmp_path)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ConfigError, match=r"kimi-k2, kimi-k2-thinking, kimi-k2\.5, kimi-k3, kimi-linear-48b"):
        preset("kimi-k9")


def test_a_preset_says_what_is_not_settled():
    text = (resources.files("kimi_jax") / "presets" / "kimi-k2-thinking" / "config.json").read_text()
    assert "Not settled: rope_scaling.beta_fast" in json.loads(text)["_comment"]
