"""Meshes and the rules that lay logical axes on them."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sharding import make_mesh, spec


@pytest.mark.parametrize("shape", ["2x4", (2, 4)])
def test_a_mesh_has_data_rows_and_expert_columns(shape):
    mesh = make_mesh(shape)
    assert dict(mesh.shape) == {"data": 2, "expert": 4}
    assert mesh.axis_names == ("data", "expert")
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}


def test_a_mesh_of_chosen_devices():
    devices = jax.devices()[3:5]
    mesh = make_mesh("1x2", devices=devices)
    assert mesh.devices.tolist() == [devices]


@pytest.mark.parametrize("shape", ["", "8", "2x", "axb", "2x2x2", "0x8", "-1x-8", "2,4", (0, 8)])
def test_what_is_no_shape_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"expected two positive numbers for the axes data x expert, like 2x4$"
    ) as error:
        make_mesh(shape)
    assert repr(shape) in str(error.value)


@pytest.mark.parametrize(("shape", "asked"), [("2x2", 4), ("4x4", 16), ((1, 1), 1)])
def test_a_mesh_takes_all_devices_or_none(shape, asked):
    with pytest.raises(ValueError, match=f"asks for {asked} devices, there are 8"):
        make_mesh(shape)


def test_experts_and_batch_are_sharded_and_nothing_else():
    mesh = make_mesh("2x4")
    assert spec(("expert", "mlp", "embed"), (16, 6, 10), mesh) == PartitionSpec("expert", None, None)
    assert spec(("batch", None), (4, 3), mesh) == PartitionSpec("data", None)
    assert spec(("batch", "expert"), (4, 8), mesh) == PartitionSpec("data", "expert")
    for axis in ("embed", "mlp", "heads", "vocab", "kv_lora", "q_lora", "expert_scores", None):
        assert spec((axis,), (7,), mesh) == PartitionSpec(None)
    assert spec((), (), mesh) == PartitionSpec()


def test_each_device_holds_its_share():
    mesh = make_mesh("2x4")
    values = np.arange(8 * 3).reshape(8, 3)
    array = jax.device_put(values, NamedSharding(mesh, spec(("expert", "mlp"), values.shape, mesh)))
    for shard in array.addressable_shards:
        column = int(np.argwhere(mesh.devices == shard.device)[0, 1])
        np.testing.assert_array_equal(shard.data, values[2 * column : 2 * column + 2])


def test_a_mesh_axis_serves_one_dimension():
    with pytest.raises(ValueError, match=r"\('expert', 'expert'\) of shape \(4, 4\) use a mesh axis twice"):
        spec(("expert", "expert"), (4, 4), make_mesh("2x4"))


def test_a_dimension_must_divide():
    with pytest.raises(ValueError, match=r"axis 'expert' of 6 does not divide by mesh axis 'expert' of 4"):
        spec(("expert", "mlp"), (6, 4), make_mesh("2x4"))
    with pytest.raises(ValueError, match=r"axis 'batch' of 3 does not divide by mesh axis 'data' of 2"):
        spec(("batch",), (3,), make_mesh("2x4"))


def test_every_dimension_has_a_logical_axis():
    with pytest.raises(ValueError, match=r"1 logical axes \('expert',\) for an array of shape \(4, 4\)"):
        spec(("expert",), (4, 4), make_mesh("2x4"))
