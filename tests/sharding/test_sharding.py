"""Meshes, slices of chips, and partitions of arrays over them."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels.hardware import CHIPS, GPUS
from sharding import AXES, SERVE, TRAIN, Partition, Rule, default_shape, make_mesh
from sharding.topologies import SHAPES, topologies


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("2x4", (2, 4, 1, 1)),
        ((2, 4), (2, 4, 1, 1)),
        ("1x2x4", (1, 2, 4, 1)),
        ("1x2x2x2", (1, 2, 2, 2)),
        ("sequence=2, data=4", (4, 1, 1, 2)),
        ("tensor=8", (1, 1, 8, 1)),
    ],
)
def test_a_mesh_has_the_four_axes(shape, sizes):
    mesh = make_mesh(shape)
    assert dict(mesh.shape) == dict(zip(("data", "expert", "tensor", "sequence"), sizes, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}


def test_a_mesh_of_chosen_devices():
    devices = jax.devices()[3:5]
    assert make_mesh("1x2", devices=devices).devices.flatten().tolist() == devices


def test_every_chip_has_slices_small_ones_first():
    assert SHAPES.keys() == (CHIPS | GPUS).keys()
    for name, smallest in (("v5e", 4), ("v5p", 4), ("v6e", 4), ("tpu7x", 8)):
        devices = [slice_.devices for slice_ in topologies(name)]
        assert devices[0] == smallest and devices == sorted(devices)


@pytest.mark.parametrize(
    "shape",
    ["", "8", "2x", "axb", "2x2x2x1x1", "0x8", "-1x-8", "2,4", (0, 8), "data=", "data=2,data=4", "expert=2,row=4"],
)
def test_what_is_no_shape_is_refused(shape):
    with pytest.raises(ValueError, match="expected two to four positive numbers for the axes data x expert") as error:
        make_mesh(shape)
    assert repr(shape) in str(error.value)


@pytest.mark.parametrize(("shape", "asked"), [("2x2", 4), ("4x4", 16), ((1, 1), 1), ("tensor=2,data=2", 4)])
def test_a_mesh_takes_all_devices_or_none(shape, asked):
    with pytest.raises(ValueError, match=f"asks for {asked} devices, there are 8"):
        make_mesh(shape)


@pytest.mark.parametrize(
    ("devices", "heads", "batch", "shape"),
    [
        (1, 64, 1, (1, 1, 1, 1)),
        (8, 64, 1, (1, 1, 8, 1)),
        (8, 6, 3, (1, 4, 2, 1)),
        (64, 64, 64, (8, 1, 8, 1)),
        (64, 64, 1, (1, 8, 8, 1)),
        (128, 64, 24, (8, 2, 8, 1)),
    ],
)
def test_the_default_uses_all_devices_and_divides(devices, heads, batch, shape):
    assert default_shape(devices, heads, batch) == shape
    assert np.prod(shape) == devices and heads % shape[2] == 0 and batch % shape[0] == 0


def partition(sizes, rules=SERVE):
    return Partition(AbstractMesh(sizes, AXES), rules)


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        # Whole experts, sharded over all devices
        (("expert", "expert_mlp", "embed"), (384, 2048, 7168), (8, 1, 8, 1), (("data", "tensor"), None, None)),
        (("expert", "expert_mlp", "embed"), (256, 1024, 2304), (1, 1, 1, 8), ("sequence", None, None)),
        # 384 = 16 x 24: the other 16 devices divide the width of each; 128 of 2048 are four groups of 32 inputs
        (("expert", "expert_mlp", "embed"), (384, 2048, 7168), (16, 1, 16, 1), ("data", "tensor", None)),
        (("expert", "expert_mlp", "embed"), (384, 64, 7168), (16, 1, 16, 1), ("data", "tensor", None)),
        (("heads", None), (12288, 1536), (2, 2, 4, 2), (("tensor", "sequence"), None)),
        (("kda_heads", "embed"), (4096, 2304), (2, 2, 2, 4), ("tensor", None)),
        (("vocab", "embed"), (163840, 7168), (8, 2, 4, 2), (("expert", "tensor", "sequence"), None)),
        (("latent", "embed"), (576, 7168), (1, 1, 8, 8), (("tensor", "sequence"), None)),
        (("latent", "embed"), (576, 7168), (1, 1, 128, 1), (None, None)),
        (("pages", None, None), (64, 576, 128), (8, 1, 2, 4), (("data", "sequence"), None, None)),
        (("batch", "row_pages"), (64, 64), (8, 1, 2, 4), ("data", "sequence")),
        (("expert_scores", "embed"), (384, 7168), (8, 1, 8, 1), (None, None)),
        ((), (), (2, 2, 2, 1), ()),
    ],
)
def test_the_spec_of_an_array(axes, shape, sizes, expected):
    assert partition(sizes).spec(axes, shape) == PartitionSpec(*expected)


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        # What serving replicates is sharded over data and expert too
        (("heads", "embed"), (64, 7168), (2, 2, 2, 1), ("tensor", ("data", "expert"))),
        (("embed", "heads"), (7168, 64), (4, 1, 1, 2), ("data", "sequence")),
        (("vocab", "embed"), (163840, 7168), (2, 2, 2, 1), (("expert", "tensor"), "data")),
        (("expert_scores", "embed"), (384, 7168), (4, 1, 2, 1), (None, "data")),
        # An axis that no other dimension takes and that divides the width; without one, none
        (("expert", "embed", "expert_mlp"), (384, 7168, 2048), (8, 1, 8, 1), (("data", "tensor"), None, None)),
        (("embed", "shared_mlp"), (7168, 2048), (8, 1, 1, 1), (None, "data")),
        (("latent", "embed"), (576, 66), (4, 3, 1, 1), (None, "expert")),
    ],
)
def test_training_shards_what_serving_replicates(axes, shape, sizes, expected):
    train, serve = partition(sizes, TRAIN), partition(sizes)
    assert train.spec(axes, shape) == PartitionSpec(*expected)
    # And weights that are gathered before use are sharded as in serving after it
    gathered = train.gathered_axes(axes, shape)
    left = [None if i in gathered else names for i, names in enumerate(train.spec(axes, shape))]
    assert PartitionSpec(*left) == serve.spec(axes, shape)


def test_a_table_decides_nothing_by_name():
    # Given the model's rules under other names
    renamed = tuple(Rule(f"{r.axis}2", r.mesh_axes, r.uneven, r.taken, r.gathered) for r in TRAIN)
    for axes, shape in ((("expert", "expert_mlp", "embed"), (384, 2048, 7168)), (("latent", "embed"), (576, 7168))):
        for sizes in ((16, 1, 16, 1), (1, 1, 128, 1), (2, 2, 2, 2)):
            expected = partition(sizes, TRAIN).spec(axes, shape)
            assert partition(sizes, renamed).spec(tuple(f"{axis}2" for axis in axes), shape) == expected


def test_equal_partitions_are_equal_values():
    mesh = make_mesh("2x4")
    same = Partition(mesh.abstract_mesh), Partition(make_mesh("data=2,expert=4"), SERVE)
    assert {Partition(mesh), *same} == {Partition(mesh)}
    assert Partition(mesh, TRAIN) != Partition(mesh) != Partition(make_mesh("4x2"))


def test_without_a_mesh_nothing_is_sharded():
    for single_device in (Partition(), partition((1, 1, 1, 1), TRAIN)):
        assert single_device.spec(("expert", "embed"), (3, 5)) == PartitionSpec(None, None)
        assert (single_device.devices, single_device.num_shards("heads"), single_device.mesh_axes) == (1, 1, ())
        assert single_device.shard_map(print, (), ()) is print


def test_each_device_holds_its_share():
    mesh = make_mesh("2x4")
    values = np.arange(8 * 3).reshape(8, 3)
    array = jax.device_put(values, NamedSharding(mesh, Partition(mesh).spec(("expert", "embed"), values.shape)))
    for shard in array.addressable_shards:
        row, column = (int(n[0]) for n in np.nonzero(mesh.devices == shard.device)[:2])
        np.testing.assert_array_equal(shard.data, values[4 * row + column][None])


def test_a_mesh_axis_serves_one_dimension():
    with pytest.raises(ValueError, match=r"\('heads', 'mlp'\) of shape \(8, 8\) use a mesh axis twice"):
        partition((1, 2, 4, 1)).spec(("heads", "mlp"), (8, 8))


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "message"),
    [
        (("heads", None), (6, 4), (1, 2, 4, 1), "axis 'heads' of 6 does not divide by mesh axis 'tensor' of 4"),
        (("batch",), (3,), (2, 4, 1, 1), "axis 'batch' of 3 does not divide by mesh axis 'data' of 2"),
        (
            ("vocab", None),
            (10, 1),
            (1, 2, 2, 2),
            "'vocab' of 10 .* 'expert' of 2 x 'tensor' of 2 x 'sequence' of 2",
        ),
        # The axes that experts leave must divide their width; scales have one row for 32 inputs, and no group is cut
        (("expert", "expert_mlp", None), (6, 6, 1), (1, 4, 1, 1), "axis 'expert_mlp' of 6 .* mesh axis 'expert' of 4"),
        (("expert", "expert_mlp", None), (6, 2, 1), (1, 4, 1, 1), "axis 'expert_mlp' of 2 .* mesh axis 'expert' of 4"),
    ],
)
def test_a_dimension_must_divide(axes, shape, sizes, message):
    with pytest.raises(ValueError, match=message):
        partition(sizes).spec(axes, shape)


def test_every_dimension_has_a_logical_axis():
    with pytest.raises(ValueError, match=r"1 logical axes \('expert',\) for an array of shape \(4, 4\)"):
        partition((2, 4, 1, 1)).spec(("expert",), (4, 4))
