"""Draft heads as checkpoints: names and sizes of published ones, there and back byte for byte, and damaged ones."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_oracle import read_all
from eagle_cases import K3_HEAD, K25_LLAMA_HEAD, K25_MLA_HEAD
from safetensors.numpy import save_file

from checkpoints import CheckpointError, convert, export, load, load_head, publish, summary, verify
from checkpoints.stored.eagle import expect
from checkpoints.toy import HEADS, head_config, toy_config, write_toy
from kimi_jax.cli import arguments, main
from kimi_jax.config_json import ConfigError, eagle_from_dict, from_dict

MODEL = toy_config("k2", vocab_size=512, hidden_size=64, intermediate_size=96, num_attention_heads=4)
MODEL["num_key_value_heads"] = 4
TARGET = from_dict(MODEL)
kinds = pytest.mark.parametrize("kind", HEADS)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published heads")
    return {kind: write_toy(folder / kind, head_config(MODEL, kind)) for kind in HEADS}


@pytest.mark.parametrize(
    ("config", "names", "tensors", "nbytes"),
    [
        (K3_HEAD, ["layers.0.mlp.up_proj.weight"], 20, 6_031_251_456),
        (K25_MLA_HEAD, ["layers.0.mlp.up_proj.weight"], 17, 6_031_251_456 - 3 * 7168 * 2),
        (K25_LLAMA_HEAD, ["midlayer.mlp.up_proj.weight"], 14, 2 * 3_178_262_528),
    ],
)
def test_published_heads_have_these_tensors_and_bytes(config, names, tensors, nbytes):
    _, leaves = expect(eagle_from_dict(config), [*names, "embed_tokens.weight"])
    assert (len(leaves), sum(leaf.nbytes for leaf in leaves)) == (tensors, nbytes)
    assert names[0] in {leaf.pattern for leaf in leaves}


@kinds
def test_a_head_goes_there_and_back_byte_for_byte(published, tmp_path, kind):
    report = convert(published[kind], tmp_path / "orbax")
    assert report.whole and not report.skipped
    export(tmp_path / "orbax", tmp_path / "again")
    before, after = read_all(published[kind]), read_all(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype and array.tobytes() == after[name].tobytes()
    assert (tmp_path / "again/config.json").read_bytes() == (published[kind] / "config.json").read_bytes()
    assert not verify(tmp_path / "orbax").problems and not verify(published[kind], tmp_path / "orbax").problems
    one, other = (load_head(folder, TARGET, dtype=jnp.float32) for folder in (published[kind], tmp_path / "orbax"))
    assert jnp.array_equal(one.lm_head.weight[...], other.lm_head.weight[...])
    assert one.config == other.config and one.config.aux_layers == (0, 1, 2)
    assert summary(tmp_path / "orbax").nbytes == sum(array.nbytes for array in before.values())


def test_other_weights_in_float32_leave_the_map_of_words_as_it_is(published, tmp_path):
    convert(published["eagle3-llama"], tmp_path / "orbax", dtype="float32")
    head = load_head(tmp_path / "orbax", TARGET)
    assert (head.dtype, head.d2t.dtype) == (jnp.float32, jnp.int32) and head.embed_tokens is None
    ids = np.asarray(head.target_ids(jnp.arange(256)))
    np.testing.assert_array_equal(ids, np.arange(0, 512, 2))
    export(tmp_path / "orbax", tmp_path / "again")
    found = read_all(tmp_path / "again")
    assert (found["d2t"].dtype, found["t2d"].dtype) == (np.int64, np.bool_)


def change_map(index, value):
    def change(tensors):
        tensors["d2t"][index] = value

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("eagle3-mla", lambda t: t.pop("fc.weight"), "1 tensors are missing: fc.weight"),
        ("eagle3.1-mla", lambda t: t.pop("fc_norm.1.weight"), "1 tensors are missing: fc_norm.1.weight"),
        ("eagle3-mla", lambda t: t.update(extra=t["norm.weight"]), "1 tensors belong to no part of this model: extra"),
        (
            "eagle3-mla",
            lambda t: t.update({"fc.weight": t["fc.weight"][:, 1:].copy()}),
            "fc.weight has shape [64, 191]",
        ),
        ("eagle3-llama", lambda t: t.pop("d2t"), "1 tensors are missing: d2t"),
        ("eagle3-llama", lambda t: t.update(d2t=t["d2t"][1:].copy()), "d2t has shape [255], expected [256]"),
        ("eagle3-llama", lambda t: t.update(d2t=t["d2t"].astype("f4")), "d2t has dtype float32, expected int64"),
        ("eagle3-llama", change_map(255, 257), "d2t maps word 255 to 512, outside the target's vocabulary of 512"),
        ("eagle3-llama", change_map(3, -4), "d2t maps word 3 to -1, outside"),
        ("eagle3-llama", change_map(0, 2**40), "d2t maps word 0 to 1099511627776, outside"),
        ("eagle3-llama", change_map(1, 1 + 2), "d2t maps two words to one of the target's"),
        ("eagle3-llama", change_map(1, 2), "t2d chooses other words than d2t maps to"),
    ],
)
def test_a_damaged_head_is_refused_in_one_line(published, tmp_path, kind, change, message):
    tensors = read_all(published[kind])
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((published[kind] / "config.json").read_bytes())
    for read in (lambda: load_head(tmp_path, TARGET), lambda: convert(tmp_path, tmp_path / "orbax")):
        with pytest.raises(CheckpointError) as error:
            read()
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "orbax").exists()


def test_heads_and_models_are_not_mistaken_for_each_other(published, tmp_path):
    with pytest.raises(CheckpointError, match="is a draft head, not a model"):
        load(published["eagle3-mla"])
    with pytest.raises(CheckpointError, match="is a draft head without experts; experts=int4 is for models"):
        convert(published["eagle3-mla"], tmp_path / "orbax", experts="int4")
    with pytest.raises(ValueError, match="is a draft head, expected a model"):
        publish({}, published["eagle3-mla"], tmp_path / "new")
    model = write_toy(tmp_path / "model", MODEL)
    with pytest.raises(CheckpointError, match="is a model, not a draft head"):
        load_head(model, TARGET)
    with pytest.raises(ConfigError, match=r"config.json: target_hidden_size is 64, but that of its target is 256"):
        load_head(published["eagle3-mla"], from_dict(toy_config("k2", vocab_size=512)))


def test_commands_make_convert_export_and_show_a_head(tmp_path, capsys):
    assert arguments.HEADS == HEADS
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(MODEL))
    toy, orbax, again = (str(tmp_path / name) for name in ("toy", "orbax", "again"))
    make = ["make-toy", toy, "--head-for", str(tmp_path / "model")]
    assert main([*make, "--layers", "2"]) == 1 and "a draft head has one layer" in capsys.readouterr().err
    assert main([*make, "--set", "hidden=2"]) == 1 and "has no field 'hidden'" in capsys.readouterr().err
    assert main([*make, "--set", "vocab_size=8"]) == 1 and "is more than vocab_size 8" in capsys.readouterr().err
    assert main([*make, "--head", "eagle3-llama"]) == 0
    assert main(["convert", toy, orbax]) == 0 and main(["export", orbax, again]) == 0
    capsys.readouterr()
    assert main(["verify", toy, again]) == 0 and main(["inspect", orbax]) == 0
    out = capsys.readouterr().out
    assert "llama draft head" in out and "map of words" in out
