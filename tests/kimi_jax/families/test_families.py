"""A file has one family, and nothing else tells releases apart."""

import ast
from collections.abc import Iterator
from pathlib import Path
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
        # K3's language model has Kimi Linear's class, model_type and spelling
        ({"architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "text_config": K3_TEXT}, "k3"),
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
        by_name("k4")


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


ROOT = Path(__file__).parents[3]
MODEL_TYPE = """
config.model_type == "kimi_k2"
"kimi_k2" != config["model_type"]
config.get("model_type") in ("kimi_k2",)
TABLE[text.model_type]
TABLE.get(model_type)
match config.model_type:
    case "kimi_k2": ...
"""


def decisions(source: str) -> Iterator[int]:
    """Yields the lines that compare a model_type, or look something up by it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            asked = [node.slice]
        elif isinstance(node, ast.Match):
            asked = [node.subject]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            asked = node.args[:1]
        else:
            continue
        if any(ast.unparse(one).rstrip("\"')]").endswith("model_type") for one in asked if not is_key(one)):
            yield node.lineno


def is_key(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant)


def test_no_module_but_the_families_asks_for_a_model_type() -> None:
    assert sorted(decisions(MODEL_TYPE)) == [2, 3, 4, 5, 6, 7]
    files = [file for package in ("kimi_jax", "checkpoints", "sharding") for file in (ROOT / package).rglob("*.py")]
    others = [file for file in files if ROOT / "kimi_jax" / "families" not in file.parents]
    assert len(others) > 100
    assert not [f"{file}:{line}" for file in others for line in decisions(file.read_text())]
