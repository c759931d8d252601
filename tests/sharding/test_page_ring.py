"""Pages and recurrences over the `sequence` axis, against one device's arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from ragged_messages import ragged_all_to_all

from pallas_kernels.mla_projections.xla import merge_packed
from sharding import (
    AXES,
    Partition,
    exchange_partials,
    gather_pages,
    local_lengths,
    local_positions,
    make_mesh,
    page_ring,
    ring_page_numbers,
    scan_shards,
)

PAGE, DEVICES = 4, 4
PARTS, ALL = PartitionSpec("sequence"), PartitionSpec()


PARTITION = Partition(AbstractMesh((1, 1, 2, DEVICES), AXES, (AxisType.Auto,) * 4))


def on_devices(compute, in_specs, out_specs, *arguments):
    mesh = make_mesh("1x1x2x4")
    run = jax.jit(PARTITION.shard_map(compute, in_specs, out_specs))
    return jax.tree.map(np.asarray, run(*jax.device_put(arguments, NamedSharding(mesh, ALL))))


def test_every_token_lies_on_one_device_and_first_in_its_pages():
    # Given rows that end before, at and after the ends of pages and of rounds over the devices
    lengths = np.array([0, 1, 4, 5, 15, 16, 17, 31, 32], np.int32)
    positions = np.where(np.arange(32) < lengths[:, None], np.arange(32), -1).astype(np.int32)
    own, count, numbers = on_devices(
        lambda lengths, positions: (
            local_positions(positions, PAGE, PARTITION)[None],
            local_lengths(lengths, PAGE, PARTITION)[None],
            ring_page_numbers(0, 2, PARTITION),
        ),
        (ALL, ALL),
        (PARTS, PARTS, ALL),
        lengths,
        positions,
    )
    # Then page p is the (p div 4)th of device p mod 4
    np.testing.assert_array_equal(numbers, np.arange(8).reshape(2, 4).T)
    for row, length in enumerate(lengths):
        for device in range(DEVICES):
            local = [position for position in range(length) if position // PAGE % DEVICES == device]
            assert count[device, row] == len(local)
            expected = [position // PAGE // DEVICES * PAGE + position % PAGE for position in local]
            assert own[device, row][own[device, row] >= 0].tolist() == expected == list(range(len(local)))
            assert np.flatnonzero(own[device, row] >= 0).tolist() == local


@pytest.mark.parametrize(
    "gather",
    [lambda x: gather_pages(x, PARTITION), lambda x: page_ring.gather_ragged(("sequence",), x)],
    ids=["gather", "ragged"],
)
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (3, 2)])
def test_what_all_devices_have_in_their_order(monkeypatch, gather, batch, rows):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    x = np.random.RandomState(2).standard_normal((batch, DEVICES * rows, 2, 5)).astype(np.float32)
    found = on_devices(lambda x: gather(x)[None], PartitionSpec(None, "sequence"), PARTS, x)
    np.testing.assert_array_equal(found, np.broadcast_to(x, (DEVICES, *x.shape)))


def test_partial_softmaxes_are_merged_as_if_over_all_tokens():
    # Given scores of 3 rows and 8 heads over 5 tokens on each device; row 0 is masked on one, row 2 on all
    random = np.random.RandomState(0)
    scores, values = 5 * random.standard_normal((DEVICES, 3, 8, 5)), random.standard_normal((DEVICES, 3, 8, 5, 6))
    scores[1, 0], scores[:, 2] = -np.inf, -np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = np.log(np.exp(scores).sum(-1))
        outs = np.nan_to_num(np.einsum("dbht,dbhtv->dbhv", np.exp(scores - lse[..., None]), values))
        weights = np.exp(scores)
        expected = np.einsum("dbht,dbhtv->bhv", weights, values) / weights.sum((0, 3))[..., None]

    # When each device receives those of two heads of its own, of all tokens
    packed = np.concatenate([outs, lse[..., None]], axis=-1).astype(np.float32)
    of_devices = packed.reshape(DEVICES, 3, DEVICES, 2, 7).swapaxes(1, 2)
    found = on_devices(
        lambda packed: merge_packed(exchange_partials(packed[0], PARTITION)),
        (PARTS,),
        PartitionSpec(None, "sequence"),
        of_devices,
    )
    np.testing.assert_allclose(
        found, np.nan_to_num(expected), rtol=0, atol=1e-6 * np.abs(np.nan_to_num(expected)).max()
    )


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_states_are_passed_on_in_order(start):
    # Given maps that do not commute
    random = np.random.RandomState(1)
    M, U = random.standard_normal((DEVICES, 2, 3, 5, 5)), random.standard_normal((DEVICES, 2, 3, 5, 4))
    state = start * random.standard_normal((2, 3, 5, 4))
    before, last = on_devices(
        lambda state, M, U: tuple(s[None] for s in scan_shards(state, M[0], U[0], ("sequence",))),
        (ALL, PARTS, PARTS),
        (PARTS, PARTS),
        *(jnp.asarray(array, jnp.float32) for array in (state, M, U)),
    )
    for device in range(DEVICES):
        np.testing.assert_allclose(before[device], state, rtol=0, atol=1e-5 * max(1, np.abs(state).max()))
        state = M[device] @ state + U[device]
    for device in range(DEVICES):
        np.testing.assert_allclose(last[device], state, rtol=0, atol=1e-5 * np.abs(state).max())
