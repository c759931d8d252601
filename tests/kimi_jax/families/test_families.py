"""Which family a file is of."""

from typing import Any

import pytest

from checkpoints.toy import toy_config
from kimi_jax.config_json import from_dict, preset
from kimi_jax.families import FAMILIES, by_name, family_of, prefix_of, published_name, text_fields

K3_TEXT = {"architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "num_hidden_layers": 93}


@pytest.mark.parametrize(
    ("name", "of_file", "of_text"),
    [
        ("kimi-k2", "k2", "k2"),
        ("kimi-k2-thinking", "k2", "k2"),
        ("kimi-k2.5", "k2.5", "k2"),
        ("kimi-linear-48b", "kimi-linear", "kimi-linear"),
    ],
)
def test_families_of_the_releases(name: str, of_file: str, of_text: str) -> None:
    config = preset(name)
    assert (config.family, config.text.family) == (of_file, of_text)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (toy_config("k2.5"), "k2.5"),
        # a class that nobody has: a fine-tune's own, none, and no list
        (toy_config("k2") | {"architectures": ["MyModel"]}, "k2"),
        (toy_config("kimi-linear") | {"architectures": None}, "kimi-linear"),
        (toy_config("kimi-linear") | {"architectures": "KimiLinearForCausalLM"}, "kimi-linear"),
        # the language model cut out of K2.5, under the class of the whole
        (toy_config("k2") | {"architectures": ["KimiK25ForConditionalGeneration"]}, "k2"),
        # K3 is nobody's, though its language model has Kimi Linear's class, model_type and spelling
        ({"architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "text_config": K3_TEXT}, None),
        (K3_TEXT, "kimi-linear"),
        ({"model_type": "llama"}, None),
        ({}, None),
    ],
)
def test_which_family_a_file_has(config: dict[str, Any], expected: str | None) -> None:
    family = family_of(config)
    assert (None if family is None else family.name) == expected


def test_every_name_is_one_family_s() -> None:
    for names in (
        [family.name for family in FAMILIES],
        [one for family in FAMILIES for one in family.architectures],
        [one for family in FAMILIES for one in family.model_types],
    ):
        assert len(set(names)) == len(names)
    with pytest.raises(KeyError):
        by_name("k3")


def test_a_language_model_in_a_nested_file_has_its_own_family_s_names() -> None:
    # As K3's: Kimi Linear's names, under the prefix of the whole
    nested = toy_config("k2.5") | {"text_config": toy_config("kimi-linear", vocab_size=768)}
    config = from_dict(nested)
    assert (config.family, config.text.family) == ("k2.5", "kimi-linear")
    path = "model.layers.1.mlp.experts.{}.gate_proj.weight"
    assert published_name(config, path) == "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    assert published_name(from_dict(toy_config("k2.5")), path) == path
    assert text_fields(nested) == nested["text_config"] and text_fields(nested["text_config"]) == nested["text_config"]


def test_the_prefix_is_seen_in_the_names() -> None:
    assert prefix_of(["mm_projector.x", "language_model.lm_head.weight"]) == "language_model."
    assert prefix_of(["lm_head.weight", "language_modelling.x"]) == ""
