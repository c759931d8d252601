"""Every key of a config.json is read, known to change nothing, refused, or named in a warning."""

import copy
import dataclasses
import json
import math
import warnings

import pytest
from cases import HERE
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.toy import toy_config
from kimi_jax.config_json import ConfigError, from_dict, from_folder, preset, preset_names
from kimi_jax.config_json.keys import ONLY_TEXT, ONLY_VISION

WEIGHTS = "text_config.quantization_config.config_groups.group_0.weights"


def changed(like, **values):
    """Returns the toy's config.json with values set at paths ("a__b" for b inside a)."""
    raw = copy.deepcopy(toy_config(like))
    for where, value in values.items():
        *path, last = where.split("__")
        inner = raw
        for name in path:
            inner = inner[name]
        inner[last] = value
    return raw


def yarn_inside(raw):
    """Returns `raw` with rope_theta and rope_scaling as transformers 5 spells them."""
    text = raw.get("text_config", raw)
    scaling = text.pop("rope_scaling")
    text["rope_parameters"] = scaling | {"rope_type": "yarn", "rope_theta": text.pop("rope_theta")}
    return raw


@pytest.mark.parametrize("like", ["k2", "k2.5"])
def test_both_spellings_of_the_rotation_are_one_configuration(like):
    raw = toy_config(like)
    old, new = from_dict(raw), from_dict(yarn_inside(copy.deepcopy(raw)))
    assert new == old and old.text.rope_theta == 50000.0
    home = raw.get("text_config", raw)
    home["rope_parameters"] = home["rope_scaling"] | {"rope_type": "yarn", "rope_theta": 50000}
    assert from_dict(raw) == old


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", [{"type": "default"}, {"rope_type": "default"}, {}, {"rope_theta": 50000.0}])
def test_the_default_rotation_is_not_scaled(name, kind):
    raw = toy_config("k2")
    del raw["rope_scaling"]
    text = from_dict(raw | {name: kind}).text
    assert text.rope_scaling is None and text.rope_theta == 50000.0


def test_every_key_of_yarn_is_read():
    yarn = {"attention_factor": 1.5, "truncate": False, "beta_fast": 16, "beta_slow": 2, "mscale": 0.5}
    found = from_dict(changed("k2", rope_scaling=toy_config("k2")["rope_scaling"] | yarn)).text.rope_scaling
    assert {name: getattr(found, name) for name in yarn} == yarn


@pytest.mark.parametrize("name", ["kimi-k2", "kimi-k2.5", "kimi-linear-48b"])
def test_what_transformers_saves_is_the_release(name):
    saved = from_dict(json.loads((HERE / "configs" / f"{name}.json").read_text()))
    released = preset(name)
    # transformers gives Kimi K2's architecture DeepSeek's name; neither folder has a generation_config.json
    assert saved.text == dataclasses.replace(released.text, model_type=saved.text.model_type)
    assert saved.vision == released.vision
    assert saved.media_placeholder_token_id == released.media_placeholder_token_id
    assert set(saved.stop_ids) <= set(released.stop_ids)


def test_transformers_own_kimi_linear():
    own = from_dict(json.loads((HERE / "configs" / "kimi-linear-own.json").read_text())).text
    released = preset("kimi-linear-48b").text
    # the default pattern of transformers begins with four KDA layers
    assert own.linear_attn.full_attn_layers == (5, 9, 13, 17, 21, 25)
    assert own == dataclasses.replace(released, linear_attn=own.linear_attn)


def test_transformers_own_vision_names():
    raw = json.loads((HERE / "configs" / "kimi-k2.5.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "pos_emb_height")
    names += ("pos_emb_time", "pos_emb_width", "patch_size", "merge_kernel_size", "hidden_act", "rope_parameters")
    raw["vision_config"] = {name: raw["vision_config"][name] for name in names}
    del raw["media_placeholder_token_id"]
    assert from_dict(raw).vision == preset("kimi-k2.5").vision
    raw["projection_layer_norm_eps"] = 1e-6
    assert from_dict(raw).vision.projector_ln_eps == 1e-6


@pytest.mark.parametrize(
    ("like", "values", "names"),
    [
        ("k2", {"rope_parameters": {"rope_type": "default"}}, ("rope_scaling", "rope_parameters")),
        ("k2", {"rope_parameters": {"rope_theta": 10000.0}}, ("rope_scaling", "rope_parameters")),
        ("k2", {"rope_scaling__rope_theta": 10000.0}, ("rope_theta is given as 10000.0 and as 50000.0",)),
        ("k2", {"rope_scaling__rope_type": "default"}, ("type 'yarn' and rope_type 'default' contradict",)),
        ("k2", {"original_max_position_embeddings": 8192}, ("original_max_position_embeddings 4096 differs",)),
        ("k2", {"rope_scaling__finetuned": True}, ("rope_scaling: finetuned is not known",)),
        ("k2", {"rope_scaling": {"type": "default", "factor": 2.0}}, ("rope_scaling: factor is not known",)),
        ("k2", {"rope_scaling": {"factor": 2.0}}, ("type None",)),
        ("k2", {"rope_scaling": {"full_attention": {"rope_theta": 1e6}}}, ("full_attention is not known",)),
        ("k2", {"rope_scaling__partial_rotary_factor": 0.5}, ("partial_rotary_factor 0.5",)),
        ("k2", {"rope_scaling__mscale": 0.0}, ("mscale 0.0 with mscale_all_dim 1.0",)),
        ("k2", {"rope_scaling__mscale_all_dim": None, "rope_scaling__mscale": 0.5}, ("mscale 0.5",)),
        ("k2", {"rope_scaling__beta_slow": 2.0}, ("beta_fast 1.0 is less than beta_slow 2.0",)),
        ("k2", {"head_dim": 24}, ("head_dim 24", "16, 48, 32")),
        ("k2", {"qk_head_dim": 64}, ("qk_head_dim 64", "only 48")),
        ("k2", {"num_local_experts": 8}, ("n_routed_experts 16 and num_local_experts 8 contradict",)),
        ("k2", {"torch_dtype": "float32"}, ("dtype 'bfloat16' and torch_dtype 'float32' contradict",)),
        ("k2", {"use_grouped_topk": False, "n_group": 2}, ("use_grouped_topk False",)),
        ("k2", {"mlp_layer_types": ["dense", "dense", "sparse"]}, ("mlp_layer_types contradicts",)),
        ("k2.5", {"hidden_size": 64}, ("hidden_size 64 stands beside text_config, which has 256",)),
        ("k2.5", {"rope_parameters": {"rope_theta": 1e6}}, ("rope_parameters", "stands beside text_config")),
        ("k2.5", {"image_token_id": 5}, ("media_placeholder_token_id 533 and image_token_id 5 contradict",)),
        ("k2.5", {"vision_config__num_hidden_layers": 3}, ("vt_num_hidden_layers 2 and num_hidden_layers 3",)),
        ("k2.5", {"projection_layer_norm_eps": 1e-6}, ("projection_layer_norm_eps 1e-06 contradict",)),
        ("k2.5", {"vision_config__rope_parameters": {"rope_theta": 5.0}}, ("rope_theta 5.0",)),
        ("k2.5", {"quantization_config": {"quant_method": "fp8"}}, ("quantization_config differs",)),
        ("k2.5", {f"{WEIGHTS.replace('.', '__')}__actorder": "group"}, ("actorder 'group'",)),
        ("k2.5", {"text_config__quantization_config__kv_cache_scheme": {"num_bits": 8}}, ("kv_cache_scheme",)),
        ("k2", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, ("[64, 64]",)),
        ("kimi-linear", {"linear_attn_config__gate": 1}, ("linear_attn_config: gate is not known",)),
        ("kimi-linear", {"linear_head_dim": 64}, ("head_dim 32 and linear_head_dim 64 contradict",)),
        ("kimi-linear", {"layer_types": ["linear_attention"] * 6}, ("layer_types contradicts",)),
        ("kimi-linear", {"layer_types": ["sliding_attention"] * 6}, ("'sliding_attention'",)),
        ("k2", {"hidden_act": "gelu"}, ("hidden_act 'gelu' is none of silu, situ",)),
        ("k2", {"activation_situ_beta": 4.0}, ("activation_situ_beta 4.0 is not supported",)),
        ("k2", {"latent_moe_use_norm": True}, ("latent_moe_use_norm True is not supported",)),
        ("k3", {"text_config__activation_situ_beta": None}, ("text_config: activation_situ_beta is missing",)),
        ("k3", {"text_config__activation_situ_linear_beta": 0}, ("activation_situ_linear_beta is 0",)),
        ("k3", {"text_config__hidden_act": "silu"}, ("activation_situ_beta 4.0 is not supported",)),
        ("k3", {"text_config__latent_moe_use_norm": False}, ("latent_moe_use_norm False is not supported",)),
        ("k3", {"text_config__routed_expert_hidden_size": 0}, ("routed_expert_hidden_size is 0",)),
        ("k3", {"text_config__attn_res_block_size": 0}, ("attn_res_block_size is 0, expected 1 to",)),
        ("k3", {"text_config__mla_use_output_gate": 1}, ("mla_use_output_gate is 1",)),
        ("k3", {"text_config__linear_attn_config__gate_lower_bound": -5.5}, ("gate_lower_bound is -5.5",)),
        ("k3", {"text_config__linear_attn_config__gate_lower_bound": 0.0}, ("gate_lower_bound is 0.0",)),
        ("k3", {"text_config__linear_attn_config__use_full_rank_gate": 0}, ("use_full_rank_gate is 0",)),
        ("k3", {"vision_config__qkv_hidden_size": 40}, ("qkv_hidden_size 40 does not give",)),
        ("k3", {"vision_config__attn_bias": True}, ("are true, false, false, expected all alike",)),
        ("k3", {"vision_config__norm_type": "batchnorm"}, ("norm_type 'batchnorm' is none of",)),
        ("k3", {"vision_config__pos_emb_interpolation_mode": "nearest"}, ("'nearest' is none of bicubic",)),
        ("k3", {"vision_config__mm_projector_type": "mlp"}, ("mm_projector_type 'mlp' is none of",)),
    ],
)
def test_contradictions_and_other_models_are_refused(like, values, names):
    with pytest.raises(ConfigError, match=r"^config\.json: ") as error:
        from_dict(changed(like, **values))
    assert all(name in str(error.value) for name in names), error.value


OTHER = [("k2", "", ONLY_TEXT), ("k2.5", "vision_config__", ONLY_VISION)]


@pytest.mark.parametrize(
    ("like", "path", "name", "values"),
    [(like, path, name, values) for like, path, table in OTHER for name, values in table.items()],
)
def test_a_key_that_asks_for_another_model_is_refused(like, path, name, values):
    numbers = [int(value) for value in values if isinstance(value, bool)]  # 1 is not true
    for other in (2, "other", *numbers):
        with pytest.raises(ConfigError, match=name):
            from_dict(changed(like, **{path + name: other}))
    for value in (*values, None):
        from_dict(changed(like, **{path + name: value}))


def test_unknown_keys_are_named_in_one_warning():
    raw = changed("k2.5", news=1, text_config__more=[2], vision_config__other="x", text_config__none=None)
    with pytest.warns(UserWarning) as seen:
        config = from_dict(raw, {"eos_token_id": 5, "odd\x1b": 1, "repetition_penalty": 1.2, "temperature": 0.6})
    (warning,) = seen
    assert str(warning.message).startswith("config.json: has keys that are not known, or not acted on: news, more of")
    for name in ("other of vision_config", "odd\\x1b of generation_config.json", "repetition_penalty of generation"):
        assert name in str(warning.message)
    assert "temperature" not in str(warning.message) and "none" not in str(warning.message)
    assert config == from_dict(toy_config("k2.5"), {"eos_token_id": 5})


def test_published_files_are_read_without_a_warning(real_tokenizer_dir):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_folder(real_tokenizer_dir).text == preset("kimi-k2.5").text


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_read_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preset(name)


NUMBERS = ("rms_norm_eps", "mla_inner_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range")
SCALING = ("factor", "beta_fast", "beta_slow", "attention_factor")


@pytest.mark.parametrize("where", [*NUMBERS, *(f"rope_scaling__{name}" for name in SCALING)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0, -1.0, True, "1", [1.0], 1e300, 1e-300, 10**400])
def test_numbers_that_make_no_sense_are_refused(where, value):
    with pytest.raises(ConfigError, match=rf"{where.split('__')[-1]} is "):
        from_dict(changed("k2", **{where: value}))


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "kv_lora_rank", "n_routed_experts")
SIZES += ("q_lora_rank", "moe_intermediate_size", "max_position_embeddings", "num_nextn_predict_layers", "n_group")


@pytest.mark.parametrize("where", SIZES)
@pytest.mark.parametrize(
    "value", [10**10, 2**70, pytest.param(10**5000, id="5001 digits"), -1, True, 64.0, "64", [64], {}]
)
def test_sizes_are_integers_within_limits(where, value):
    with pytest.raises(ConfigError, match=rf"{where} is ") as error:
        from_dict(changed("k2", **{where: value}))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("where", ["norm_topk_prob", "mla_use_nope", "rope_scaling__truncate", "use_grouped_topk"])
@pytest.mark.parametrize("value", [0, 1, "true", 1.0])
def test_flags_are_true_or_false(where, value):
    with pytest.raises(ConfigError, match="expected true or false"):
        from_dict(changed("k2", **{where: value}))


@pytest.mark.parametrize("name", ["bos_token_id", "pad_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, 768, 10**30, True, 1.0, "1", [[1]], [768]])
def test_token_ids_are_in_the_vocabulary(name, value):
    with pytest.raises(ConfigError, match=rf"^config\.json: {name} "):
        from_dict(changed("k2", **{name: value}))
    with pytest.raises(ConfigError, match=rf"^config\.json: {name} "):
        from_dict(changed("k2.5", **{name: value}))
    with pytest.raises(ConfigError, match=rf"^generation_config\.json: {name} "):
        from_dict(toy_config("k2"), {name: value})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths(values, stem=()):
    for name, value in values.items():
        yield (*stem, name)
        if isinstance(value, dict):
            yield from paths(value, (*stem, name))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused_by_our_own_error(data):
    raw = toy_config(data.draw(st.sampled_from(["k2", "k2.5", "k3", "kimi-linear"])))
    for path in data.draw(st.lists(st.sampled_from(list(paths(raw))), min_size=1, max_size=2)):
        inner = raw
        for name in path[:-1]:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[path[-1]] = data.draw(JSON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from_dict(raw, data.draw(st.none() | st.dictionaries(st.text(max_size=5), JSON, max_size=2)))
        except ConfigError as error:
            assert len(str(error)) < 500 and str(error).isprintable()
