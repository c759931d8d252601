"""Experts split over a mesh give each token the same sum as all of them on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax import config_json
from kimi_jax.model.moe import MoE
from kimi_jax.model.param import Init
from sharding import make_mesh, mesh_of, over_experts, using

EXPERTS, HIDDEN = 8, 6
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
RNG = np.random.default_rng(0)
MATRICES = RNG.normal(size=(EXPERTS, HIDDEN, HIDDEN)).astype(np.float32)


def dense(rows, scale, experts, first):
    """Every held expert for every token; what a token did not choose counts nothing. A row is [x, chosen, weights]."""
    x, chosen, weights = jnp.split(scale * rows, [HIDDEN, HIDDEN + 2], axis=1)
    numbers = first + jnp.arange(experts.shape[0])
    share = jnp.sum(jnp.where(chosen[:, :, None] == numbers, weights[:, :, None], 0), axis=1)
    return jnp.einsum("te,td,edf->tf", share, x, experts, precision=jax.lax.Precision.HIGHEST)


@pytest.mark.parametrize("shape", ["1x8", "2x4", "8x1", "1x1"])
@pytest.mark.parametrize(
    ("tokens", "choice"),
    [(8, "spread"), (8, "all to one"), (1, "spread"), (7, "spread"), (13, "none to the first half")],
)
def test_each_token_gets_the_sum_over_its_experts(shape, tokens, choice):
    # Given tokens with two experts each
    x = RNG.normal(size=(tokens, HIDDEN)).astype(np.float32)
    chosen = RNG.integers(4 if "first half" in choice else 0, EXPERTS, size=(tokens, 2)).astype(np.int32)
    chosen = np.full_like(chosen, 3) if choice == "all to one" else chosen
    weights = RNG.uniform(0.1, 1, size=(tokens, 2)).astype(np.float32)
    expected = np.einsum("tj,td,tjdf->tf", *(a.astype(np.float64) for a in (weights, x, MATRICES[chosen])))

    # When the experts lie on a mesh
    size = int(np.prod([int(n) for n in shape.split("x")]))
    mesh = make_mesh(shape, devices=jax.devices()[:size])

    @jax.jit
    def split(*arrays):
        with using(mesh.abstract_mesh):
            return over_experts(dense, *arrays)

    with jax.set_mesh(mesh):
        found = split(np.concatenate([x, chosen, weights], axis=1), jnp.ones(()), MATRICES)

    # Then the sums are the same, and nothing was dropped
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_without_a_mesh_nothing_is_split():
    calls = []
    over_experts(lambda *a: calls.append(a[-1]) or a[0], jnp.ones((3, 2)), None, jnp.asarray(MATRICES))
    assert calls == [0]
    assert mesh_of(jnp.ones(3)) is None


def test_a_layer_moves_activations_and_no_weights():
    # Given a mixture with INT4 experts of more bytes than its activations
    config = config_json.preset("kimi-k2.5").text
    config = dataclasses.replace(
        config, hidden_size=64, moe_intermediate_size=32, n_routed_experts=16, num_experts_per_tok=4
    )
    layer = MoE(Init(jax.random.key(0), jnp.dtype(jnp.float32)), config)
    mesh = make_mesh("2x4")
    graph, state = nnx.split(layer)

    @jax.jit
    def run(state, x):
        with using(mesh.abstract_mesh):
            return nnx.merge(graph, state)(x)

    # When it is compiled with the experts split
    by_expert, by_row, everywhere = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("expert", "data", None))
    state = jax.tree.map(lambda a: jax.device_put(a, by_expert if a.ndim == 3 else everywhere), state)
    text = run.lower(state, jax.device_put(jnp.ones((4, 1, 64)), by_row)).compile().as_text()

    # Then its one collective is the sum of the results
    collectives = [line for line in text.splitlines() if any(f" {name}(" in line for name in COLLECTIVES)]
    assert len(collectives) == 1, collectives
    assert " all-reduce(" in collectives[0] and "f32[2,64]" in collectives[0]
