"""Pairs of a token and an expert that travel for training: sums and gradients are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding import REPLICATED, TRAIN, Partition, dispatch_pairs, make_mesh, pair_dispatch

TOKENS, WIDTH, CHOSEN = 64, 16, 2


def compute(matrices, rows, expert):
    """Computes Wᵀ tanh(W x) with each row's W [width of this device, inputs], and zeros for no expert."""
    chosen = jnp.where((expert >= 0)[:, None, None], matrices[jnp.maximum(expert, 0)], 0)
    return jnp.einsum("mwi,mw->mi", chosen, jnp.tanh(jnp.einsum("mwi,mi->mw", chosen, rows)))


@pytest.fixture(scope="module")
def numbers():
    random = np.random.RandomState(0)
    shapes = ((TOKENS, WIDTH), (TOKENS, CHOSEN), (8, 32, WIDTH), (TOKENS, WIDTH))
    return tuple(random.randn(*shape).astype(np.float32) for shape in shapes)


def choices(experts):
    """Returns experts [tokens, j]: spread, all on few devices, and none on half of them."""
    random = np.random.RandomState(1)
    spread, half = (np.argsort(random.rand(TOKENS, n))[:, :CHOSEN] for n in (experts, experts // 2))
    found = {"spread": spread, "all alike": np.broadcast_to([3, 2], (TOKENS, CHOSEN)), "half": experts // 2 + half}
    return {name: chosen.astype(np.int32) for name, chosen in found.items()}


def on_one_device(x, weights, matrices, chosen):
    results = compute(matrices, jnp.repeat(x, CHOSEN, axis=0), chosen.reshape(-1)).reshape(TOKENS, CHOSEN, WIDTH)
    return jnp.sum(weights[:, :, None] * results, axis=1)


def on_mesh(shape, experts, compute=compute):
    """Returns the sums as a function of x, weights, matrices and choices, with tokens sharded over all devices."""
    partition = Partition(make_mesh(shape), TRAIN)
    tokens = PartitionSpec(partition.mesh_axes)
    spec = partition.spec(("expert", "expert_mlp", None), (experts, 32, WIDTH))

    def on_device(x, weights, matrices, chosen):
        return dispatch_pairs(x, chosen, weights, matrices, compute, len(matrices), experts, partition)

    return partition.shard_map(on_device, (tokens, tokens, spec, tokens), tokens)


def with_gradients(run, target):
    return jax.jit(jax.value_and_grad(lambda *arguments: jnp.sum(run(*arguments) * target), argnums=(0, 1, 2)))


# Whole experts on every device, or their widths shared by two; one round where choices are spread, or four
@pytest.mark.parametrize(("shape", "experts", "slack"), [("2x2x2x1", 8, 1.25), ("4x2x1x1", 4, 0.3)])
def test_sums_and_gradients_are_those_of_one_device(monkeypatch, numbers, shape, experts, slack):
    monkeypatch.setattr(pair_dispatch, "SLACK", slack)
    x, weights, matrices, target = numbers
    run, single = (with_gradients(run, target) for run in (on_mesh(shape, experts), on_one_device))
    for name, chosen in choices(experts).items():
        arguments = x, weights, matrices[:experts], chosen
        placed = jax.device_put(arguments, NamedSharding(make_mesh(shape), REPLICATED))
        (loss, found), (want_loss, want) = run(*placed), single(*arguments)
        assert float(loss) == pytest.approx(float(want_loss), rel=1e-5), name
        for one, other in zip(found, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max(), err_msg=name)


def test_a_gradient_scatters_no_rows_and_sends_them_five_times(numbers):
    x, weights, matrices, target = numbers
    run = on_mesh("2x2x2x1", 8, lambda matrices, rows, expert: rows * matrices[0, 0])
    gradient = with_gradients(run, target)
    text = str(jax.make_jaxpr(gradient)(x, weights, matrices, choices(8)["spread"]))
    assert "scatter" not in text.replace("reduce_scatter", "")
    assert "f32[8,8,16] = all_to_all[" in text  # eight devices' blocks of rows: 10 pairs a device, one eighth of 16
    assert text.count("f32[8,8,16] = all_to_all[") == 5
