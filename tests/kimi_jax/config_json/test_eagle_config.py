"""The config.json of Eagle3 heads: the published ones, where the layers that they take stand, and what is refused."""

import json

import pytest
from eagle_cases import K3_HEAD, K25_LLAMA_HEAD, K25_MLA_HEAD

from kimi_jax.config_json import (
    ConfigError,
    eagle_from_dict,
    fit_target,
    from_folder,
    is_eagle,
    preset,
    read_config,
)

IDS = "eagle_aux_hidden_state_layer_ids"


def test_the_head_of_k2_5_in_the_form_of_its_target():
    config = eagle_from_dict(K25_MLA_HEAD)
    assert (config.form, config.cache_width, config.draft_vocab_size, config.vocab_map) == ("mla", 576, 163840, False)
    assert config.layer.mla_inner_norm_eps == config.layer.rms_norm_eps == 1e-5
    assert (config.layer.rope_scaling.beta_fast, config.layer.rope_theta) == (1.0, 50000.0)
    assert not config.fc_norm and not config.norm_output
    assert fit_target(config, preset("k2.5")).aux_layers == (1, 29, 57)


def test_the_head_of_k3_has_the_changes_of_3_1():
    config = eagle_from_dict(K3_HEAD)
    assert config.fc_norm and config.norm_output and config.num_aux == 3
    assert fit_target(config, preset("k3")).aux_layers == (1, 45, 89)


def test_the_head_in_llama_s_form():
    config = eagle_from_dict(K25_LLAMA_HEAD)
    assert (config.form, config.cache_width, config.layer.rope_theta) == ("llama", 2 * 64 * 128, 1e6)
    assert config.aux_layers is None and config.num_aux == 3
    assert fit_target(config, preset("k2.5")).aux_layers == (1, 29, 57)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"eagle_config": {IDS: [1, 29, 57]}}, (1, 29, 57)),
        ({"eagle_config": {IDS: [2, 30, 58]}}, (1, 29, 57)),
        ({IDS: [2, 30, 58], "eagle_config": {IDS: [1, 29, 57]}}, (1, 29, 57)),
        ({IDS: [1, 29], "eagle_config": {}}, (0, 28)),
    ],
)
def test_the_layers_that_a_head_takes_are_counted_in_two_ways(change, expected):
    assert eagle_from_dict(K25_MLA_HEAD | change).aux_layers == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["QwenForCausalLMEagle3"]},
            "is no form of an Eagle3 head that is known",
        ),
        ({"num_hidden_layers": 2}, "num_hidden_layers 2 is not supported; only 1"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"draft_vocab_size": 200000}, "draft_vocab_size 200000 is more than vocab_size 163840"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"num_key_value_heads": 8}, "num_key_value_heads 8 differs from num_attention_heads 64"),
        ({"q_lora_rank": None}, "q_lora_rank is missing"),
        ({"fc_norm": "yes"}, "fc_norm is 'yes', expected true or false"),
        ({"use_aux_norm": True, "fc_norm": False}, "contradict each other"),
        ({"eagle_config": [1]}, "eagle_config is [1], expected an object"),
        ({"eagle_config": {"use_mtp_layernorm": True}}, "eagle_config: use_mtp_layernorm True is not supported"),
        ({"eagle_config": {"depth": 2}}, "depth is not known"),
        ({"eagle_config": {IDS: []}}, f"{IDS} is empty"),
        ({IDS: [2, 30, 58], "eagle_config": {IDS: [2, 29, 57]}}, "contradicts that inside it"),
    ],
)
def test_a_head_that_is_not_read_is_refused_in_one_line(change, message):
    with pytest.raises(ConfigError) as error:
        eagle_from_dict(K25_MLA_HEAD | change)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 127}, "head_dim 127 is odd"),
        ({"num_key_value_heads": 7}, "num_attention_heads 64 is not a multiple of num_key_value_heads 7"),
    ],
)
def test_a_head_in_llama_s_form_that_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        eagle_from_dict(K25_LLAMA_HEAD | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_hidden_size": 4096}, "target_hidden_size is 4096, but that of its target is 7168"),
        ({"vocab_size": 129280, "draft_vocab_size": 32000}, "vocab_size is 129280, but that of its target is 163840"),
        ({"eagle_config": {IDS: [1, 45, 89]}}, "the output of layer 89, counted from 0, but its target has 61 layers"),
    ],
)
def test_a_head_of_another_target_is_refused(change, message):
    config = eagle_from_dict(K25_MLA_HEAD | {"bos_token_id": 1, "eos_token_id": 2} | change)
    with pytest.raises(ConfigError, match=message):
        fit_target(config, preset("k2.5"))


def test_unknown_keys_are_warned_of():
    with pytest.warns(UserWarning, match="not known, or not acted on: new_idea"):
        eagle_from_dict(K25_MLA_HEAD | {"new_idea": 1})


def test_a_folder_is_read_as_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(K25_MLA_HEAD))
    assert is_eagle(K25_MLA_HEAD) and read_config(tmp_path) == eagle_from_dict(K25_MLA_HEAD)
    with pytest.raises(ConfigError, match="draft head"):
        from_folder(tmp_path)
