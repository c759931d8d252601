"""Models in memory published again: every byte of what was loaded, and INT4 by the same rule as conversion."""

import json

import jax
import jax.numpy as jnp
import pytest
from checkpoint_oracle import read_all
from flax import nnx

import checkpoints
from checkpoints.published.numerics import GROUP_SIZE
from kimi_jax.model.kimi import abstract


def same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("like", ["k2.5", "k2", "kimi-linear"])
@pytest.mark.parametrize("stored", [False, True], ids=["published", "converted"])
def test_what_was_loaded_is_published_byte_for_byte(like, stored, published, converted, tmp_path):
    # Given a model loaded from either kind of folder
    source = (converted if stored else published)[like]
    model = checkpoints.load(source)
    # When it is published
    form = "int4" if like == "k2.5" else "bf16"
    out = checkpoints.publish(model, source, tmp_path / "out", form=form)
    # Then its tensors and files are those that were published first
    same_tensors(read_all(out), read_all(published[like]))
    for file in published[like].iterdir():
        if file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            assert (out / file.name).read_bytes() == file.read_bytes()


def test_dense_masters_are_published_as_conversion_quantises_them(published, tmp_path):
    # Given the INT4 checkpoint's weights in float32, all dense, of which conversion would make the same codes
    loaded = checkpoints.load(published["k2.5"], dtype=jnp.float32)
    state = nnx.state(abstract(loaded.config.dense(), jnp.float32))
    for path, variable in nnx.to_flat_state(state):
        parent = loaded
        for name in path[:-1]:
            parent = parent[name] if isinstance(name, int) else getattr(parent, name)
        weight = parent.read().dequantize(jnp.float32) if "experts" in path else getattr(parent, path[-1])[...]
        variable.set_value(weight)
    # When they are published in INT4
    out = checkpoints.publish(state, published["k2.5"], tmp_path / "out")
    # Then it is the checkpoint itself: a fixed point
    same_tensors(read_all(out), read_all(published["k2.5"]))
    # And from a bf16 checkpoint, config.json says what the experts are
    dense = checkpoints.convert(published["k2.5"], tmp_path / "bf16", experts="bf16").destination
    again = checkpoints.publish(state, dense, tmp_path / "again")
    same_tensors(read_all(again), read_all(published["k2.5"]))
    scheme = json.loads((again / "config.json").read_text())["text_config"]["quantization_config"]
    assert scheme["config_groups"]["group_0"]["weights"]["group_size"] == GROUP_SIZE
    # And INT4 weights can be published in bf16
    plain = checkpoints.publish(loaded, published["k2.5"], tmp_path / "plain", form="bf16")
    assert not any(name.endswith("weight_packed") for name in read_all(plain))
    same_tensors(read_all(plain), read_all(checkpoints.export(dense, tmp_path / "exported").destination))


def test_weights_of_another_model_are_refused(published, tmp_path):
    model = checkpoints.load(published["k2"])
    with pytest.raises(ValueError, match=r"the weights have no vision_tower|has shape \[|the weights have no"):
        checkpoints.publish(model, published["k2.5"], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="form is 'fp8', expected int4, mxfp4 or bf16"):
        checkpoints.publish(model, published["k2"], tmp_path / "out", form="fp8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        checkpoints.publish(model, published["k2"], tmp_path / "out", form="bf16")


def test_a_full_disk_leaves_nothing(published, tmp_path, monkeypatch):
    from checkpoints.published import shards

    def full(*_):
        raise OSError(28, "No space left on device", "shard")

    monkeypatch.setattr(shards, "_put", full)
    model = jax.tree.map(lambda x: x, checkpoints.load(published["k2"]))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.publish(model, published["k2"], tmp_path / "out", form="bf16")
    assert not list(tmp_path.iterdir())
